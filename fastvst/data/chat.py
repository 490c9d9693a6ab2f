r"""The chat template of Qwen2.5-VL, and which of its tokens are supervised.

`<|im_start|>role\n` + content + `<|im_end|>\n` for every message; a conversation without a system message starts with
the default one; a picture stands as `<|vision_start|>` + N pads + `<|vision_end|>`. The content is stripped, as VST
does (the published template leaves it as it is, so the two agree on stripped text).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fastvst.data.images import MediaError
from fastvst.data.sample import Message

DEFAULT_SYSTEM = "You are a helpful assistant."
# VST's thinking mode, for samples whose kind contains "thought": two sentences, the second with the pattern.
THINK_SYSTEM = (
    "You are a helpful assistant who first thinks about the reasoning process in the mind and then gives the user the "
    "answer. The reasoning process is enclosed within <think> </think> tags, i.e., "
    "<think> reasoning process here </think> answer here."
)
SUPERVISE = ("message", "content")
PADS = {"image": "<|image_pad|>", "video": "<|video_pad|>"}

# The same template for transformers' apply_chat_template, saved with every model directory.
JINJA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    f"<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' or 'video' in part %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Segment:
    """A stretch of the rendered conversation that is tokenised in one call.

    Attributes:
        kind: "text", "special" (`text` is one special token's name), "image" or "video" (the pads of one picture).
        text: the text, or the special token.
        supervised: the loss is taken on these tokens.
    """

    kind: str
    text: str
    supervised: bool


def system_prompt(kind: str) -> str:
    """The system prompt of a sample that brings none: VST's thinking prompt if `kind` contains "thought"."""
    return THINK_SYSTEM if "thought" in kind else DEFAULT_SYSTEM


def render(
    messages: Sequence[Message], *, system: str, supervise: str = "message", add_generation_prompt: bool = False
) -> list[Segment]:
    r"""The conversation as segments, in order.

    Args:
        messages: role and parts as in `Sample.messages`.
        system: put in front if the first message is not a system message.
        supervise: "message": each assistant message with its `<|im_start|>assistant\n` header and its `<|im_end|>\n`
            (VST); "content": the content and `<|im_end|>` only. Vision tokens are never supervised.
        add_generation_prompt: end with `<|im_start|>assistant\n`, unsupervised.

    Raises:
        ValueError: an unknown `supervise`.
    """
    if supervise not in SUPERVISE:
        raise ValueError(f"supervise is {supervise!r}; expected one of {SUPERVISE}")
    turns = list(messages)
    if not turns or turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    segments: list[Segment] = []
    for message in turns:
        answer = message["role"] == "assistant"
        frame = answer and supervise == "message"
        segments.append(Segment("special", "<|im_start|>", frame))
        segments.append(Segment("text", message["role"] + "\n", frame))
        for kind, text in _content(message):
            if kind == "text":
                segments.append(Segment("text", text, answer))
            else:
                segments.append(Segment("special", "<|vision_start|>", False))
                segments.append(Segment(kind, PADS[kind], False))
                segments.append(Segment("special", "<|vision_end|>", False))
        segments.append(Segment("special", "<|im_end|>", answer))
        segments.append(Segment("text", "\n", frame))
    if add_generation_prompt:
        segments.append(Segment("special", "<|im_start|>", False))
        segments.append(Segment("text", "assistant\n", False))
    return _merge(segments)


def _content(message: Message) -> list[tuple[str, str]]:
    """(kind, text) of a message's parts: neighbouring texts joined, the whole stripped at both ends."""
    parts: list[tuple[str, str]] = []
    for part in message["content"]:
        kind = part["type"]
        text = part["text"] if part["type"] == "text" else ""
        if kind == "text" and parts and parts[-1][0] == "text":
            parts[-1] = ("text", parts[-1][1] + text)
        else:
            parts.append((kind, text))
    if parts and parts[0][0] == "text":
        parts[0] = ("text", parts[0][1].lstrip())
    if parts and parts[-1][0] == "text":
        parts[-1] = ("text", parts[-1][1].rstrip())
    return [(kind, text) for kind, text in parts if kind != "text" or text]


def _merge(segments: list[Segment]) -> list[Segment]:
    """Join neighbouring texts that are supervised alike.

    Where they are not ("content" mode: header | content), cutting is harmless: the header ends with a line feed, the
    content starts with a non-blank, and the pre-tokeniser always cuts there.
    """
    merged: list[Segment] = []
    for segment in segments:
        last = merged[-1] if merged else None
        if last and segment.kind == last.kind == "text" and segment.supervised == last.supervised:
            merged[-1] = Segment("text", last.text + segment.text, last.supervised)
        else:
            merged.append(segment)
    return merged


def check_literals(messages: Sequence[Message], pattern: re.Pattern[str]) -> None:
    """Refuse text that spells a special token: the tokenizer would turn it into that token without a word.

    Args:
        pattern: matches any special token's name.

    Raises:
        MediaError: "literal_special_token", naming the token and the message.
    """
    for index, message in enumerate(messages):
        text = "".join([part["text"] if part["type"] == "text" else "\0" for part in message["content"]])
        found = pattern.search(text)
        if found:
            raise MediaError(
                "literal_special_token",
                f"message {index} ({message['role']}) contains {found.group()!r} as text; pictures are parts of type "
                '"image" or "video", and other special tokens must be removed or spelled differently',
            )
