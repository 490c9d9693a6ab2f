r"""The chat template of Qwen2.5-VL, and which of its tokens are supervised.

Every message is `<|im_start|>role\n` + content + `<|im_end|>\n`; a conversation without a system message starts with
the default one; an image is `<|vision_start|>` + N pads + `<|vision_end|>`. The content is stripped, as in VST. The
published template does not strip, so the two agree on stripped text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fastvst.data.images import MediaError
from fastvst.data.sample import Message

DEFAULT_SYSTEM = "You are a helpful assistant."
# The system prompt of VST's thinking mode, for samples whose kind contains "thought".
THINK_SYSTEM = (
    "You are a helpful assistant who first thinks about the reasoning process in the mind and then gives the user the "
    "answer. The reasoning process is enclosed within <think> </think> tags, i.e., "
    "<think> reasoning process here </think> answer here."
)
SUPERVISE = ("message", "content")
# Tokens that only the template may write.
STRUCTURE = {"<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"}
STRUCTURE |= {"<|image_pad|>", "<|video_pad|>"}
PADS = {"image": "<|image_pad|>", "video": "<|video_pad|>"}

# The same template for transformers' apply_chat_template; it is saved with every model directory.
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


class Segment(NamedTuple):
    """A piece of the rendered conversation that is tokenised in one call.

    Attributes:
        kind: "text", "special" (one special token), "image" or "video" (the pads of one image or video).
        text: the text, or the name of the special token or pad.
        supervised: whether the loss covers these tokens.
    """

    kind: str
    text: str
    supervised: bool


def system_prompt(kind: str) -> str:
    """The system prompt of a sample without a system message: VST's thinking prompt if `kind` contains "thought"."""
    return THINK_SYSTEM if "thought" in kind else DEFAULT_SYSTEM


def render(
    messages: Sequence[Message], *, system: str, supervise: str = "message", add_generation_prompt: bool = False
) -> list[Segment]:
    r"""The conversation as segments, in order.

    Args:
        messages: role and parts as in `Sample.messages`.
        system: system prompt, used if the first message is not a system message.
        supervise: "message": each assistant message, with its `<|im_start|>assistant\n` header and its `<|im_end|>\n`
            (VST); "content": only the content and `<|im_end|>`. Vision tokens are never supervised.
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
        answer = message["role"] == "assistant" and message.get("learn") is not False
        frame = answer and supervise == "message"
        segments.append(Segment("special", "<|im_start|>", frame))
        segments.append(Segment("text", message["role"] + "\n", frame))
        for kind, text in content_parts(message):
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


def content_parts(message: Message) -> list[tuple[str, str]]:
    """(kind, text) of a message's parts: adjacent texts are joined, and the message is stripped at both ends."""
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
    """Join adjacent texts of equal supervision.

    Texts of different supervision ("content" mode: header | content) may be tokenised separately: the header ends with
    a line feed, the content starts with a non-blank, and the pre-tokeniser always cuts between the two.
    """
    merged: list[Segment] = []
    for segment in segments:
        last = merged[-1] if merged else None
        if last and segment.kind == last.kind == "text" and segment.supervised == last.supervised:
            merged[-1] = Segment("text", last.text + segment.text, last.supervised)
        else:
            merged.append(segment)
    return merged


def check_literals(messages: Sequence[Message], pattern: re.Pattern[str], allowed: Iterable[str] = ()) -> None:
    """Reject text that contains the name of a special token; the tokenizer would silently turn it into that token.

    Args:
        pattern: matches the name of any special token.
        allowed: names that text may contain; those of the conversation's structure never.

    Raises:
        MediaError: "literal_special_token", naming the token and the message; "bad_text": half of a surrogate pair.
    """
    for index, message in enumerate(messages):
        text = "".join([part["text"] if part["type"] == "text" else "\0" for part in message["content"]])
        half = re.search("[\ud800-\udfff]", text)
        if half:
            raise MediaError(
                "bad_text", f"message {index} ({message['role']}) has {ascii(half.group())}, half of a surrogate pair"
            )
        usable = set(allowed) - STRUCTURE
        found = next((match for match in pattern.finditer(text) if match.group() not in usable), None)
        if found:
            raise MediaError(
                "literal_special_token",
                f"message {index} ({message['role']}) contains {found.group()!r} as text; images are parts of type "
                '"image" or "video"; a token of the answer\'s language is allowed by the option special_tokens of the '
                f'source, e.g. special_tokens = ["{found.group()}"]',
            )
