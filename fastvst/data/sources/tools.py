r"""Tool conversations as text, in the format of Qwen2.5's chat template.

The tools are listed at the end of the system message, a call is a `<tool_call>` block of the assistant, and a response
is a `<tool_response>` block of the user. Source: chat_template in tokenizer_config.json of Qwen/Qwen2.5-VL-7B-Instruct.
"""

from __future__ import annotations

import json
from typing import Any

from fastvst import jsonl

HEAD = (
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)


def decoded(value: Any, what: str, kinds: tuple[type, ...]) -> Any:
    """A value of one of `kinds`, or the JSON text of one. Raises ValueError for anything else."""
    found = value
    if isinstance(value, str):
        try:
            found = jsonl.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{what} is {value[:80]!r}; expected JSON") from error
    if not isinstance(found, kinds):
        raise ValueError(f"{what} is {str(value)[:80]!r}; expected {' or '.join(kind.__name__ for kind in kinds)}")
    return found


def tools_text(tools: Any) -> str:
    """The end of the system message that lists the tools; "" without tools."""
    entries = decoded(tools, "tools", (list, tuple)) if tools is not None and tools != "" else []
    if not entries:
        return ""
    listed = [json.dumps(decoded(tool, "a tool", (dict,)), ensure_ascii=False) for tool in entries]
    return HEAD + "".join(f"\n{tool}" for tool in listed) + TAIL


def calls_text(calls: Any) -> str:
    """The `<tool_call>` blocks of a turn, from OpenAI's `tool_calls` or a ShareGPT `function_call`; "" without calls.

    Raises:
        ValueError: a call without a name, or with arguments that are not a JSON object.
    """
    if calls is None:
        return ""
    entries = decoded(calls, "tool_calls", (list, tuple, dict))
    blocks = []
    for entry in [entries] if isinstance(entries, dict) else entries:
        call = decoded(entry, "a tool call", (dict,))
        call = call.get("function") if isinstance(call.get("function"), dict) else call
        name = call.get("name")
        if not isinstance(name, str) or not name:
            raise ValueError(f"a tool call has the name {name!r}; expected text")
        given = call.get("arguments")
        arguments = {} if given is None or given == "" else decoded(given, f"arguments of the call of {name}", (dict,))
        block = f'{{"name": "{name}", "arguments": {json.dumps(arguments, ensure_ascii=False)}}}'
        blocks.append(f"<tool_call>\n{block}\n</tool_call>")
    return "\n".join(blocks)


def response_text(content: str) -> str:
    """The `<tool_response>` block of a tool's answer."""
    return f"<tool_response>\n{content}\n</tool_response>"
