"""Rows of VST's published data sets, with the meaning that VST's own trainer gives them.

Source: `convert_llava2qwen` and `SampleTransform` in vst/preprocess.py of github.com/Yangr116/VST. Other data sets keep
their own rules. Where VST loses something without a word, fastvst does not follow: a system turn is kept (VST drops
it). A number of `<|image_pad|>` that is not the number of images is an error (VST leaves the other images out), and so
is `<image>` in a row without images (VST trains on that text). `<image>` next to `<|image_pad|>` is removed (VST reads
it as text).
"""

from __future__ import annotations

from typing import Any

from fastvst.data.sample import Message
from fastvst.data.sources.row_context import RowContext, short
from fastvst.data.sources.turns import Turn

COLUMNS = frozenset(("conversations", "data_source", "type", "meta_info"))
PADS = ("<|image_pad|>", "<|video_pad|>")


def is_vst(row: dict[str, Any], form: str) -> bool:
    """Whether a row has VST's columns."""
    return form == "conversations" and row.keys() >= COLUMNS


def shows_no_images(kind: str) -> bool:
    """Whether VST leaves out the images of rows of this type: its name contains "text"."""
    return "text" in kind


def vst_turns(turns: list[Turn], images: int, context: RowContext) -> list[Turn]:
    """The turns without a first one that no human speaks, and without `<image>` in the first human turn.

    VST puts all images before the text of the first human turn if that has no `<|image_pad|>`. `images`: their number.
    """
    start = 1 if turns[0][0] == "system" else 0
    if len(turns) > start and turns[start][0] != "user":
        context.changed("first_turn_dropped", f"the first turn is {turns[start][0]}'s: {short(turns[start][1])}")
        turns = [*turns[:start], *turns[start + 1 :]]
    if len(turns) <= start:
        raise context.fail("bad_schema", "no turn of a human")
    role, text, flags = turns[start]
    if images and isinstance(text, str) and "<image>" in text and not any(pad in text for pad in PADS):
        context.changed("marks_moved", f"all images come before {short(text)}")
        text = text.replace("<image>\n", "").replace("\n<image>", "").replace("<image>", "")
        turns = [*turns[:start], (role, text, flags), *turns[start + 1 :]]
    return turns


def stripped(messages: list[Message]) -> list[Message]:
    """The messages; in human turns with images, texts have no white space around them and empty texts are left out."""
    found = []
    for message in messages:
        parts = message["content"]
        if message["role"] == "user" and any(part["type"] != "text" for part in parts):
            texts = [{**part, "text": part["text"].strip()} if part["type"] == "text" else part for part in parts]
            message = {**message, "content": [part for part in texts if part["type"] != "text" or part["text"]]}
        found.append(message)
    return found
