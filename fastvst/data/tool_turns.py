"""Tool conversations for a model's own chat template: tools, calls and responses instead of their text.

The sources write tools in Qwen2.5's text form (fastvst/data/sources/tools.py) and set "tools" on each message that
contains such text. This module takes the text apart again; text that the row itself had stays text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastvst import jsonl
from fastvst.data.sample import Message, Part
from fastvst.data.sources.tools import HEAD, TAIL

ADDED = "added"  # the value of "tools" on a system message that the row did not have
CALL = ("<tool_call>\n", "\n</tool_call>")
RESPONSE = ("<tool_response>\n", "\n</tool_response>")


def take_apart(messages: Sequence[Message], *, keep_added: bool) -> tuple[list[Message], list[Any] | None]:
    """(messages with `tool_calls` and messages of role "tool", tools or None) as transformers' templates expect them.

    Args:
        keep_added: keep the text of a system message that was added for the tools, without them.

    Raises:
        ValueError: several responses in one message, of which one has images.
    """
    tools: list[Any] | None = None
    turns: list[Message] = []
    for message in messages:
        how = message.get("tools")
        if not how:
            turns.append(message)
        elif message["role"] == "system":
            text = message["content"][-1]["text"]
            start = text.rindex(HEAD)
            tools = [jsonl.loads(line) for line in text[start + len(HEAD) : -len(TAIL)].strip("\n").split("\n")]
            if how != ADDED or keep_added:
                turns.append({**message, "content": _without_empty(message["content"][:-1], text[:start])})
        elif message["role"] == "assistant":
            turns.append(_with_calls(message))
        else:
            turns += [{"role": "tool", "content": content} for content in _responses(message["content"])]
    return turns, tools


def _with_calls(message: Message) -> Message:
    *before, last = message["content"]
    text = last["text"]
    start = text.find(CALL[0])
    if start < 0:
        return message  # an empty list of calls
    blocks = text[start + len(CALL[0]) : -len(CALL[1])].split(f"{CALL[1]}\n{CALL[0]}")
    calls = [{"type": "function", "function": jsonl.loads(block)} for block in blocks]
    return {**message, "content": _without_empty(before, text[:start].removesuffix("\n")), "tool_calls": calls}


def _responses(content: Sequence[Part]) -> list[list[Part]]:
    """The parts of each response in a user's message."""
    if all(part["type"] == "text" for part in content):
        text = "".join([part["text"] for part in content])
        texts = text[len(RESPONSE[0]) : -len(RESPONSE[1])].split(f"{RESPONSE[1]}\n{RESPONSE[0]}")
        return [[{"type": "text", "text": one}] for one in texts]
    parts = [dict(part) for part in content]
    first = next(part for part in parts if part["type"] == "text")
    last = next(part for part in reversed(parts) if part["type"] == "text")
    first["text"] = first["text"].removeprefix(RESPONSE[0])
    last["text"] = last["text"].removesuffix(RESPONSE[1])
    if any(RESPONSE[0] in part["text"] for part in parts if part["type"] == "text"):
        raise ValueError("several responses of tools in a row, of which one has images; give each its own user turn")
    return [_without_empty(parts, "")]


def _without_empty(parts: Sequence[Part], text: str) -> list[Part]:
    """The parts and a last text; at least one part."""
    kept = [part for part in parts if part["type"] != "text" or part["text"]]
    return [*kept, {"type": "text", "text": text}] if text or not kept else kept
