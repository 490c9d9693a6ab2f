"""Where the images of a row are in its text.

Marks are `<|image_pad|>` and `<|video_pad|>` (with or without vision_start and vision_end around them) or, in a row
without these, `<image>` and `<video>`, or else another spelling of them (OTHER_TAGS). In a row with images and without
marks all images come before its first human turn, as in VST.
"""

from __future__ import annotations

import re
from typing import Any

from fastvst.data.sample import Message, Part
from fastvst.data.sources.media import payload
from fastvst.data.sources.row_context import RowContext, short
from fastvst.data.sources.turns import Turn, first
from fastvst.data.sources.values import as_number, is_absent

PADS = re.compile(r"(?:<\|vision_start\|>)?<\|(image|video)_pad\|>(?:<\|vision_end\|>)?")
TAGS = re.compile(r"<(image|video)>")
# <image_1>, <image 1>, <Image>, <image/>, <img>, <|image|>, <|image_1|>, <image_placeholder>, <ImageHere>, [IMG]
OTHER_TAGS = re.compile(
    r"<\|?(?P<kind>image|img|video)(?:[_ -]?(?:(?P<number>\d{1,3})|here|token|placeholder))?\s*/?\|?>"
    r"(?:</(?:image|img|video)>)?"
    r"|\[(?P<kind2>image|img|video)(?:[_ -]?(?P<number2>\d{1,3}))?\]",
    re.IGNORECASE,
)
NUMBERED = re.compile(r"<\|?(?:image|video)[_ -]?\d{1,3}\|?>|<\|(?:image|video)\|>", re.IGNORECASE)
PATH_IN_TEXT = re.compile(r"<(img|image|video)>([^<>\n]{1,1000}\.\w{2,5})</\1>", re.IGNORECASE)  # Qwen-VL
PLACEHOLDERS = re.compile(r"<bbox>|<ref-object>|<audio>")
PART_KEYS = ("type", "text", "image", "image_url", "video", "video_url", "path", "url", "bytes", "value", "content")
# Options of an image or a video that are kept from a content part; video.py and vision_inputs.py read them.
IMAGE_OPTIONS = ("min_pixels", "max_pixels", "resized_width", "resized_height")
PART_OPTIONS = (
    *IMAGE_OPTIONS,
    "fps",
    "sample_fps",
    "nframes",
    "min_frames",
    "max_frames",
    "video_start",
    "video_end",
    "total_pixels",
)


def place(turns: list[Turn], images: list[Part], videos: list[Part], row: RowContext) -> list[Message]:
    """Messages with the images at the marks of the human turns; without marks, all before the first human turn.

    Raises:
        SampleError: "mark_count", "bad_schema", and what `payload` raises.
    """
    turns, images = _in_one_spelling(turns, images, videos, row)
    texts = [text for role, content, _ in turns if role == "user" for text in _strings(content)]
    pieces = [piece for _, content, _ in turns if isinstance(content, list) for piece in content]
    pads = any(PADS.search(text) for text in texts)
    marks = PADS if pads else TAGS
    found = [match.group(1) for text in texts for match in marks.finditer(text)]
    if not pads and not images and not videos and any(_part_kind(p) and not _is_empty(p) for p in pieces):
        found = []  # the parts contain the images themselves, so "<image>" is ordinary text
    found += [_part_kind(piece) for piece in pieces if _is_empty(piece)]
    have = {"image": images, "video": videos}
    for kind, media in have.items():
        if (found or not media) and found.count(kind) != len(media):
            raise row.fail(
                "mark_count", f"{found.count(kind)} {kind} marks in the human turns, but {len(media)} {kind}s"
            )
    queues = {kind: iter(media) for kind, media in have.items()}
    front = [] if found else [*images, *videos]
    messages: list[Message] = []
    for role, content, flags in turns:
        parts: list[Part] = []
        for piece in content if isinstance(content, list) else [{"type": "text", "text": content}]:
            text = piece.get("text") if isinstance(piece, dict) and piece.get("type") == "text" else None
            if _is_empty(piece):
                parts.append({**next(queues[_part_kind(piece)]), **_options(piece, row)})
            elif not isinstance(text, str):
                parts.append(_content_part(piece, row))
            elif role != "user" or not (images or videos):
                parts.append({"type": "text", "text": text})
            else:
                if pads:
                    text = TAGS.sub("", text)  # VST removes the older marks
                parts += _split(text, marks, queues) if found else [{"type": "text", "text": text}]
        if role == "user" and front:
            parts = [*front, *parts]
            front = []
        messages.append({"role": role, "content": parts, **flags})
    if front:
        raise row.fail("mark_count", f"{len(front)} images, but no human turn to put them into")
    return messages


def _in_one_spelling(
    turns: list[Turn], images: list[Part], videos: list[Part], row: RowContext
) -> tuple[list[Turn], list[Part]]:
    """The turns with `<image>` and `<video>` in place of other spellings, and the images in the order of their marks.

    Rows with the usual marks are not changed: other spellings are ordinary text there, as they are in a row without
    images. A numbered mark of an image that the row does not have is an error.
    """
    texts = [text for role, content, _ in turns if role == "user" for text in _strings(content)]
    pieces = [piece for _, content, _ in turns if isinstance(content, list) for piece in content]
    if any(PADS.search(text) or TAGS.search(text) for text in texts) or any(_part_kind(piece) for piece in pieces):
        return turns, images
    if not images and not videos:
        lost = next((match for text in texts if (match := NUMBERED.search(text))), None)
        if lost:
            raise row.fail("mark_count", f"the text has the mark {lost.group()!r}, but the row has no images")
        return [
            (role, _with_paths(text, row) if role == "user" else text, flags) for role, text, flags in turns
        ], images
    found = [match for text in texts for match in OTHER_TAGS.finditer(text)]
    kinds = ["video" if (match["kind"] or match["kind2"]).lower() == "video" else "image" for match in found]
    numbers = [int(match["number"] or match["number2"] or -1) for match in found]
    if not found:
        return turns, images
    counts = {"image": len(images), "video": len(videos)}
    order = [number - min(numbers) for number in numbers]
    numbered = min(numbers) in (0, 1) and sorted(order) == list(range(len(images))) and not videos
    if any(kinds.count(kind) != count for kind, count in counts.items()) or not (numbered or set(numbers) == {-1}):
        raise row.fail(
            "mark_count",
            f"the text has the marks {[match.group() for match in found][:6]}, but the row has {counts['image']} "
            f"images and {counts['video']} videos; expected one mark for each",
        )
    row.changed("mark_spelling", f"{found[0].group()!r} is <{kinds[0]}>")
    ordered = [images[index] for index in order] if numbered else images

    def spelled(text: str) -> str:
        return OTHER_TAGS.sub(lambda m: "<video>" if (m["kind"] or m["kind2"]).lower() == "video" else "<image>", text)

    return [
        (role, _map(content, spelled) if role == "user" else content, flags) for role, content, flags in turns
    ], ordered


def _map(content: Any, change: Any) -> Any:
    if isinstance(content, str):
        return change(content)
    return [{**p, "text": change(p["text"])} if _is_text(p) else p for p in content]


def _with_paths(content: Any, row: RowContext) -> Any:
    """Content with the images that its text names as `<img>path</img>` (Qwen-VL), as parts."""
    if not any(PATH_IN_TEXT.search(text) for text in _strings(content)):
        return content
    parts: list[Part] = []
    for piece in content if isinstance(content, list) else [{"type": "text", "text": content}]:
        text = piece["text"] if _is_text(piece) else ""
        if not text:
            parts.append(piece)
            continue
        at = 0
        for match in PATH_IN_TEXT.finditer(text):
            kind = "video" if match[1].lower() == "video" else "image"
            parts += [{"type": "text", "text": text[at : match.start()]}, {"type": kind, kind: match[2].strip()}]
            row.changed("path_in_text", match.group()[:80])
            at = match.end()
        parts.append({"type": "text", "text": text[at:]})
    return parts


def _is_text(piece: Any) -> bool:
    return isinstance(piece, dict) and isinstance(piece.get("text"), str)


def _strings(content: Any) -> list[str]:
    return [content] if isinstance(content, str) else [piece["text"] for piece in content if _is_text(piece)]


def _split(text: str, marks: re.Pattern[str], queues: dict[str, Any]) -> list[Part]:
    """Text and images in reading order; each mark is replaced by an image."""
    parts: list[Part] = []
    at = 0
    for match in marks.finditer(text):
        if match.start() > at:
            parts.append({"type": "text", "text": text[at : match.start()]})
        parts.append(next(queues[match.group(1)]))
        at = match.end()
    if at < len(text):
        parts.append({"type": "text", "text": text[at:]})
    return parts


def _part_kind(piece: Any) -> str:
    """The kind of a content part: "image" or "video" (type image, image_url, input_image, video, ...), else ""."""
    kind = str(piece.get("type", "")).removeprefix("input_").removesuffix("_url") if isinstance(piece, dict) else ""
    return kind if kind in ("image", "video") else ""


def _part_media(piece: Any) -> Any:
    kind = _part_kind(piece)
    return first(piece, kind, f"{kind}_url", "path", "url", "bytes") if kind else None


def _is_empty(piece: Any) -> bool:
    """Whether a part is only a mark, {"type": "image"}; the image is in the row's `images` (TRL, ms-swift)."""
    return bool(_part_kind(piece)) and is_absent(_part_media(piece))


def _content_part(piece: Any, row: RowContext) -> Part:
    """A part from {"type": "image_url", "image_url": {"url": ...}}, {"type": "image", "image": ...}, ... (OpenAI)."""
    kind = _part_kind(piece)
    if not kind:
        raise row.fail("bad_schema", f"a content part is {short(piece)}; expected type text, image, image_url or video")
    options = _options(piece, row)
    media = payload(_part_media(piece), row)
    cut = next((key for key in ("video_start", "video_end") if key in options and isinstance(media, list)), None)
    if cut:
        raise row.fail(
            "unsupported_option", f"{cut} is {options[cut]!r} on a list of frames; leave out the other frames"
        )
    return {"type": kind, kind: media, **options}


def _options(piece: dict[str, Any], row: RowContext) -> dict[str, Any]:
    """The options of a part for its kind, as numbers."""
    names = IMAGE_OPTIONS if _part_kind(piece) == "image" else PART_OPTIONS
    return {name: option(name, piece[name], row) for name in names if not is_absent(piece.get(name))}


def option(name: str, value: Any, row: RowContext) -> int | float:
    """The number of an option. Raises SampleError "bad_field" or "bad_fps" for anything else."""
    number = as_number(value)
    if number is None:
        reason = "bad_fps" if name in ("fps", "sample_fps") else "bad_field"
        raise row.fail(reason, f"{name} is {short(value)}; expected a number")
    if isinstance(value, str):
        row.changed("number_text", f"{name} is the text {value!r}")
    return number
