"""The turns of a conversation: who speaks, what, and whether it is learnt."""

from __future__ import annotations

from typing import Any

from fastvst.data.sources.row_context import RowContext, short
from fastvst.data.sources.tools import calls_text, response_text
from fastvst.data.sources.values import is_absent, parsed

ROLE_NAMES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatbot": "assistant",
    "chatgpt": "assistant",
    "ai": "assistant",
    "system": "system",
    "developer": "system",
    "function_call": "call",
    "tool_call": "call",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
ROLE_KEYS = ("from", "role", "speaker")
CONTENT_KEYS = ("value", "content", "text")
TURN_KEYS = (*ROLE_KEYS, *CONTENT_KEYS, "weight", "loss", "tool_calls", "function_call", "refusal")
TEXT_TYPES = ("text", "input_text", "output_text")
EXPECTED = (
    "expected {from: human|gpt|system, value: text} or {role: user|assistant|system|tool, content: text or parts}"
)

Turn = tuple[str, Any, dict[str, Any]]  # role, text or parts, further keys of the message ("learn", "tools")


def first(row: dict[str, Any], *keys: str, default: Any = None) -> Any:
    """The first of these keys that has a value."""
    return next((row[key] for key in keys if row.get(key) is not None), default)


def read_turns(rows: Any, key: str, row: RowContext) -> list[Turn]:
    """(role, content, further keys of the message) of every turn; content is a text or a list of parts.

    Args:
        rows: a list of {from, value} or {role, content}, or the JSON text of it.
        key: column that holds it, for messages.

    Raises:
        SampleError: "bad_schema", "bad_turn".
    """
    if isinstance(rows, str):
        found = parsed(rows)
        if isinstance(found, str):
            raise row.fail("bad_schema", f"{key} is the text {short(rows)}; expected a list of turns")
        row.changed("json_text", f"{key} is the text {short(rows)}")
        rows = found
    while isinstance(rows, (list, tuple)) and len(rows) == 1 and isinstance(rows[0], (list, tuple)):
        rows = rows[0]  # VST's first converter put the list into another list
    if not isinstance(rows, (list, tuple)) or not rows:
        raise row.fail("bad_schema", f"{key}: expected a list of turns; got {short(rows)}")
    turns: list[Turn] = []
    before = ""
    for index, turn in enumerate(rows):
        role = _role(turn, row)
        try:
            content = turn_content(role, turn, row) if role else None
            flags = _flags(role, turn) if role else {}
        except ValueError as error:
            if error.__class__ is not ValueError:
                raise
            raise row.fail("bad_turn", f"turn {index}: {error}") from error
        if not isinstance(content, (str, list)):
            raise row.fail("bad_schema", f"turn {index} is {short(turn)}; {EXPECTED}")
        spoken = {"call": "assistant", "tool": "user"}.get(role, role)
        if role == before and role in ("call", "tool") and isinstance(turns[-1][1], str) and isinstance(content, str):
            turns[-1] = (spoken, f"{turns[-1][1]}\n{content}", turns[-1][2] | flags)
        else:
            turns.append((spoken, content, flags))
        before = role
    return turns


def _role(turn: Any, row: RowContext) -> str:
    """The role of a turn, "" if it has none that is known."""
    given = str(first(turn, *ROLE_KEYS)) if isinstance(turn, dict) else ""
    name = given.strip().rstrip(":").lower()
    role = ROLE_NAMES.get(name, "")
    if role and given not in ROLE_NAMES:
        row.changed("role_name", f"{given!r} is {name!r}")
    return role


def turn_content(role: str, turn: dict[str, Any], row: RowContext) -> Any:
    """Text or parts of a turn, with its tool calls. Raises ValueError for calls and refusals that cannot be read."""
    content = first(turn, *CONTENT_KEYS)
    if role == "call":
        return calls_text(content)
    content = content_parts(content, row)
    if role == "tool":
        if not isinstance(content, str):
            raise ValueError(f"a tool's answer is {short(content)}; expected text")
        return response_text(content)
    calls = calls_text(first(turn, "tool_calls", "function_call")) if role == "assistant" else ""
    refusal = turn.get("refusal")
    if refusal:
        if content or not isinstance(refusal, str):
            raise ValueError(f"content {short(content)} and refusal {short(refusal)}; expected one text")
        content = refusal
    if not calls:
        return content
    if isinstance(content, list):
        return [*content, {"type": "text", "text": f"\n{calls}"}]
    return f"{content.strip()}\n{calls}" if isinstance(content, str) and content.strip() else calls


def content_parts(content: Any, row: RowContext) -> Any:
    """A content as text, or as a list of parts with their types.

    One part in place of a list, lists in lists, texts among the parts, and parts without a type ({"text": ...} and
    {"image": ...}, as Qwen-VL writes them) can be read in one way only. So can a number.
    """
    if isinstance(content, (int, float)) and not isinstance(content, bool):
        row.changed("number_as_text", f"a turn is the number {content!r}")
        return str(content)
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        return content
    parts: list[Any] = []
    waiting = list(reversed(content))
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            row.changed("nested_parts", f"a content holds the list {short(part)}")
            waiting += reversed(part)
        else:
            parts.append(_typed(part, row))
    return parts


def _typed(part: Any, row: RowContext) -> Any:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        return part
    kind = part.get("type")
    if kind in TEXT_TYPES:
        text = first(part, "text", "value", "content")
        return {**part, "type": "text", "text": text} if isinstance(text, str) else part
    if kind is not None:
        return part
    found = [name for name in ("text", "image", "image_url", "video", "video_url") if not is_absent(part.get(name))]
    if len(found) != 1 or (found == ["text"] and not isinstance(part["text"], str)):
        return part
    row.changed("part_without_type", f"a part is {short(part)}")
    return {**part, "type": found[0]}


def _flags(role: str, turn: dict[str, Any]) -> dict[str, Any]:
    """Keys of the message: "learn": False, and "tools": True if its text was made of calls or responses of tools."""
    made = role in ("call", "tool") or (role == "assistant" and first(turn, "tool_calls", "function_call") is not None)
    return ({} if _is_learnt(turn) else {"learn": False}) | ({"tools": True} if made else {})


def _is_learnt(turn: dict[str, Any]) -> bool:
    """`weight` (OpenAI: 0 or 1) and `loss` (ms-swift: true or false) of a turn. Raises ValueError for other values."""
    found = set()
    for key in ("weight", "loss"):
        value = turn.get(key)
        if value is None:
            continue
        text = str(value).strip().lower()
        if text not in ("0", "0.0", "1", "1.0", "true", "false"):
            raise ValueError(f"{key} is {short(value)}; expected 0 or 1")
        found.add(text in ("1", "1.0", "true"))
    if len(found) > 1:
        raise ValueError("weight and loss contradict each other")
    return found != {False}
