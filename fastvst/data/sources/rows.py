"""One row of a data set -> Sample. There are three row forms, distinguished by their keys; the file type is irrelevant.

    conversations   VST (conversations, data_source, images, type, meta_info), LLaVA and ShareGPT
    messages        OpenAI: role and content, which is a string or content parts
    question        VST's RL rows: question, images, thought, answer, answer_gt, meta_info

Marks in the text say where the images are. They are `<|image_pad|>` and `<|video_pad|>` (with or without vision_start /
vision_end around them) or, in a row without these, `<image>` and `<video>`. In a row with images and without marks all
images come before its first human turn, as in VST.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastvst.data.chat import system_prompt
from fastvst.data.ledger import SampleError
from fastvst.data.sample import Message, Part, Sample
from fastvst.data.sources.tools import calls_text, response_text, tools_text

# The columns that the row forms read; tables skip all others.
COLUMNS = (
    "conversations",
    "messages",
    "question",
    "id",
    "data_source",
    "images",
    "image",
    "videos",
    "video",
    "type",
    "meta_info",
    "answer",
    "answer_gt",
    "thought",
    "system",
    "fps",
    "tools",
    "functions",
)
FORMS = {"conversations": "conversations", "messages": "messages", "question": "question"}
ROLE_NAMES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",
    "function_call": "call",
    "tool_call": "call",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
TURN_KEYS = ("from", "role", "value", "content", "weight", "loss", "tool_calls", "function_call", "refusal")
PART_KEYS = ("type", "text", "image", "image_url", "video", "video_url", "path", "url", "bytes")
PADS = re.compile(r"(?:<\|vision_start\|>)?<\|(image|video)_pad\|>(?:<\|vision_end\|>)?")
TAGS = re.compile(r"<(image|video)>")
# Options of an image or a video that are kept from a content part; video.py and vision_inputs.py read them.
PART_OPTIONS = (
    "min_pixels",
    "max_pixels",
    "resized_width",
    "resized_height",
    "fps",
    "sample_fps",
    "nframes",
    "min_frames",
    "max_frames",
    "video_start",
    "video_end",
    "total_pixels",
)
# First bytes of image files: PNG, JPEG, GIF, BMP, TIFF (both byte orders); WebP is RIFF....WEBP.
IMAGE_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\x00", b"MM\x00*")


def row_form(columns: Any) -> str | None:
    """The form of rows with these keys, or None."""
    return next((form for key, form in FORMS.items() if key in columns), None)


def to_sample(row: dict[str, Any], *, source: str, where: str, folder: Path) -> Sample:
    """Turn one row into a Sample.

    Args:
        row: the row as Python objects.
        source: name of the data set, used if the row has no `data_source`.
        where: file and row; also the sample's id if the row has none.
        folder: folder in which relative image paths start.

    Raises:
        SampleError: "bad_schema", "mark_count", "bad_base64", "remote_media".
    """
    name = str(row.get("data_source") or source)
    identifier = str(_first(row, "id", default=where)).encode("utf-8", "backslashreplace").decode("utf-8")

    def fail(reason: str, detail: str) -> SampleError:
        return SampleError(reason, name, identifier, f"{detail} (at {where})")

    form = row_form([key for key, value in row.items() if value is not None])
    if form is None:
        raise fail("bad_schema", f"the row has {sorted(row)[:12]}; expected one of {sorted(FORMS)}")
    kind = str(row.get("type") or "qa")
    metadata: dict[str, Any] = {}
    meta_info = _json(row.get("meta_info"), fail)
    if meta_info is not None:
        metadata["meta_info"] = meta_info
    answer = None
    if form == "question":
        turns, answer, kind = _question_turns(row, meta_info, fail)
        metadata |= {key: row[key] for key in ("thought", "answer_gt") if row.get(key)}
    else:
        turns = read_turns(row[form], row.get("system"), fail)
        try:
            listed = tools_text(_first(row, "tools", "functions"))
        except ValueError as error:
            raise fail("bad_tools", str(error)) from error
        turns = _with_tools(turns, listed, system_prompt(kind))
        answer = _answer(row.get("answer"), metadata)
    images, videos = _media(row, kind, folder, fail)
    _apply_sizes(images, meta_info)
    messages = _place([turn[:2] for turn in turns], images, videos, folder, fail)
    for message, turn in zip(messages, turns, strict=True):
        if turn[2:] == (False,):
            message["learn"] = False
    try:
        sample = Sample.from_messages(messages, id=identifier, source=name, kind=kind, answer=answer, metadata=metadata)
        sample.notes = ignored_keys(row, form)
        return sample
    except ValueError as error:
        raise fail("bad_schema", str(error)) from error


def _first(row: dict[str, Any], *keys: str, default: Any = None) -> Any:
    return next((row[key] for key in keys if row.get(key) is not None), default)


def _json(value: Any, fail: Callable[[str, str], SampleError]) -> Any:
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise fail("bad_schema", f"meta_info is not JSON: {error}") from error


def read_turns(rows: Any, system: Any, fail: Callable[[str, str], SampleError]) -> list[tuple[Any, ...]]:
    """(role, content, whether it is learnt) of every turn; content is a string or a list of parts."""
    while isinstance(rows, (list, tuple)) and len(rows) == 1 and isinstance(rows[0], (list, tuple)):
        rows = rows[0]  # VST's first converter put the list into another list
    if not isinstance(rows, (list, tuple)) or not rows:
        raise fail("bad_schema", f"expected a list of turns; got {_short(rows)}")
    turns: list[tuple[Any, ...]] = [("system", system, True)] if isinstance(system, str) and system else []
    before = ""
    for index, turn in enumerate(rows):
        role = ROLE_NAMES.get(str(_first(turn, "from", "role")), "") if isinstance(turn, dict) else ""
        try:
            content = _turn_content(role, turn) if role else None
            learn = _is_learnt(turn) if role else True
        except ValueError as error:
            raise fail("bad_turn", f"turn {index}: {error}") from error
        if not isinstance(content, (str, list)):
            raise fail(
                "bad_schema",
                f"turn {index} is {_short(turn)}; expected {{from: human|gpt|system, value: text}} or "
                "{role: user|assistant|system|tool, content: text or parts}",
            )
        spoken = {"call": "assistant", "tool": "user"}.get(role, role)
        if role == before and role in ("call", "tool") and isinstance(turns[-1][1], str) and isinstance(content, str):
            turns[-1] = (spoken, f"{turns[-1][1]}\n{content}", turns[-1][2] and learn)
        else:
            turns.append((spoken, content, learn))
        before = role
    return turns


def _turn_content(role: str, turn: dict[str, Any]) -> Any:
    """Text or parts of a turn, with its tool calls. Raises ValueError for calls and refusals that cannot be read."""
    content = _first(turn, "value", "content")
    if role == "call":
        return calls_text(content)
    if role == "tool":
        if not isinstance(content, str):
            raise ValueError(f"a tool's answer is {_short(content)}; expected text")
        return response_text(content)
    calls = calls_text(_first(turn, "tool_calls", "function_call")) if role == "assistant" else ""
    refusal = turn.get("refusal")
    if refusal:
        if content or not isinstance(refusal, str):
            raise ValueError(f"content {_short(content)} and refusal {_short(refusal)}; expected one text")
        content = refusal
    if not calls:
        return content
    if isinstance(content, list):
        return [*content, {"type": "text", "text": f"\n{calls}"}]
    return f"{content.strip()}\n{calls}" if isinstance(content, str) and content.strip() else calls


def _is_learnt(turn: dict[str, Any]) -> bool:
    """`weight` (OpenAI: 0 or 1) and `loss` (ms-swift: true or false) of a turn. Raises ValueError for other values."""
    found = set()
    for key in ("weight", "loss"):
        value = turn.get(key)
        if value is None:
            continue
        text = str(value).strip().lower()
        if text not in ("0", "0.0", "1", "1.0", "true", "false"):
            raise ValueError(f"{key} is {_short(value)}; expected 0 or 1")
        found.add(text in ("1", "1.0", "true"))
    if len(found) > 1:
        raise ValueError("weight and loss contradict each other")
    return found != {False}


def _with_tools(turns: list[tuple[Any, ...]], listed: str, system: str) -> list[tuple[Any, ...]]:
    """The turns with the tools at the end of the system message."""
    if not listed:
        return turns
    if turns[0][0] != "system":
        return [("system", system + listed, True), *turns]
    content = turns[0][1]
    text = content.strip() + listed if isinstance(content, str) else [*content, {"type": "text", "text": listed}]
    return [("system", text, True), *turns[1:]]


def ignored_keys(row: dict[str, Any], form: str) -> tuple[str, ...]:
    """Keys with a value that nothing reads: of the row, of its turns ("messages[].name") and of their parts."""
    found = {key for key, value in row.items() if value is not None and key not in COLUMNS}
    turns = row[form] if isinstance(row[form], (list, tuple)) else []
    for turn in [turn for turn in turns if isinstance(turn, dict)]:
        found |= {f"{form}[].{key}" for key, value in turn.items() if value is not None and key not in TURN_KEYS}
        parts = turn.get("content")
        for part in [part for part in (parts if isinstance(parts, list) else []) if isinstance(part, dict)]:
            known = (*PART_KEYS, *PART_OPTIONS)
            found |= {f"{form}[].content[].{k}" for k, v in part.items() if v is not None and k not in known}
    return tuple(sorted(found))


def _question_turns(
    row: dict[str, Any], meta_info: Any, fail: Callable[[str, str], SampleError]
) -> tuple[list[tuple[Any, ...]], dict[str, Any] | None, str]:
    """User and assistant turn, checkable answer and kind of an RL row.

    The kind is "thought" (VST's thinking system prompt) unless the row is rewarded as 3D boxes ("bbox3d" mode).
    """
    if not isinstance(row["question"], str):
        raise fail("bad_schema", f"question is {_short(row['question'])}; expected text")
    meta = meta_info if isinstance(meta_info, dict) else {}
    modes = [meta["mode"]] if isinstance(meta.get("mode"), str) else list(meta.get("mode") or [])
    boxes = "bbox3d" in modes
    truth = _first(row, "answer_gt", "answer")
    turns: list[tuple[Any, ...]] = [("user", row["question"])]
    response = _first(row, "answer", "answer_gt")
    if response is not None:
        thought = row.get("thought")
        turns.append(("assistant", f"<think>{thought}</think> {response}" if thought else str(response)))
    choice = meta.get("question_type") == "multi_choices" or "multi_choices_score" in modes
    answer = None
    if truth is not None:
        answer = {"type": "boxes" if boxes else "choice" if choice else "text", "value": truth, "mode": modes}
    return turns, answer, str(row.get("type") or ("bbox_3d" if boxes else "thought"))


def _answer(value: Any, metadata: dict[str, Any]) -> dict[str, Any] | None:
    """The optional `answer` column as a checkable answer.

    A checkable answer has a "type" and a "value". It, or {"answer": it, "metadata": {...}}, may be an object or its
    JSON text, as fastvst writes it. Every other value is the true value itself and is kept as it is: a text with all
    its characters ("null", "1.50"), a number, a list of alternatives, an object. None and NaN, which columns of numbers
    have in place of None, are no answer.
    """
    known = value
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            known = json.loads(value)
        except (ValueError, RecursionError):
            known = value
    if isinstance(known, dict) and isinstance(known.get("answer"), dict) and _is_checkable(known["answer"]):
        metadata.update(known.get("metadata") or {})
        return known["answer"]
    if isinstance(known, dict) and "metadata" in known and known.get("answer", 0) is None:
        metadata.update(known["metadata"] or {})
        return None
    if isinstance(known, dict) and _is_checkable(known):
        return known
    if value is None or (isinstance(value, float) and value != value):
        return None
    return {"type": "text", "value": value if isinstance(value, (str, int, float, list, dict)) else str(value)}


def _is_checkable(answer: dict[str, Any]) -> bool:
    return isinstance(answer.get("type"), str) and "value" in answer


def _media(
    row: dict[str, Any], kind: str, folder: Path, fail: Callable[[str, str], SampleError]
) -> tuple[list[Part], list[Part]]:
    """The row's images and videos as parts, in order."""
    images = [item for key in ("image", "images") for item in _as_list(row.get(key))]
    videos = [item for key in ("video", "videos") for item in _as_list(row.get(key))]
    if "video" in kind and not videos:  # VST stores video files or frames in `images`
        frames = [payload(item, folder, fail) for item in images if not isinstance(item, list)]
        if frames and all(_is_image(frame) for frame in frames):
            images = [frames]
        videos = images
        images = []
    video_parts = [{"type": "video", "video": payload(item, folder, fail)} for item in videos]
    if isinstance(row.get("fps"), (int, float)):
        for part in video_parts:
            part["fps"] = float(row["fps"])
    return [{"type": "image", "image": payload(item, folder, fail)} for item in images], video_parts


def _as_list(value: Any) -> list[Any]:
    return [] if value is None or value == "" else list(value) if isinstance(value, (list, tuple)) else [value]


def _is_image(media: Any) -> bool:
    if isinstance(media, bytes):
        return media.startswith(IMAGE_MAGIC) or (media[:4] == b"RIFF" and media[8:12] == b"WEBP")
    return str(media).lower().endswith((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"))


def payload(item: Any, folder: Path, fail: Callable[[str, str], SampleError]) -> Any:
    """The value of an image or video in a row -> encoded bytes, a path, or a list of these (frames).

    Accepted: bytes; {bytes, path}; a path, relative to `folder`; a file:// URL; a base64 data URI; {"url": any of
    these}; a list of frames. No file is opened and nothing is downloaded.
    """
    if isinstance(item, dict):
        if item.get("bytes") is not None:
            return bytes(item["bytes"])
        item = _first(item, "path", "url")
    if isinstance(item, (bytes, bytearray)):
        return bytes(item)
    if isinstance(item, (list, tuple)):
        return [payload(frame, folder, fail) for frame in item]
    if not isinstance(item, str) or not item:
        raise fail("bad_schema", f"an image is {_short(item)}; expected bytes, {{bytes, path}}, a path or a data URI")
    if item.startswith("data:"):
        try:
            return base64.b64decode(item.partition(",")[2], validate=True)
        except binascii.Error as error:
            raise fail("bad_base64", f"{item[:40]}...: {error}") from error
    if item.startswith(("http://", "https://")):
        raise fail("remote_media", f"{item[:120]}: nothing is fetched while training; download it and give its path")
    encoded = item.encode("utf-8", "replace")
    longest = max(len(part) for part in encoded.split(b"/"))
    if "\0" in item or longest > 255 or len(encoded) > 4000 or encoded.decode("utf-8") != item:
        raise fail(
            "bad_path", f"{ascii(item[:80])} is no path: a part of {longest} bytes, a NUL, or half a surrogate pair"
        )
    path = Path(item.removeprefix("file://"))
    return str(path if path.is_absolute() else folder / path)


def _apply_sizes(images: list[Part], meta_info: Any) -> None:
    """Set the sizes of VST's meta_info: {resized_width, resized_height, ...} for each image; -1 = unchanged."""
    if not isinstance(meta_info, list) or len(meta_info) != len(images):
        return
    for part, info in zip(images, meta_info, strict=True):
        sizes = {key: info.get(key) for key in ("resized_width", "resized_height")} if isinstance(info, dict) else {}
        if all(isinstance(size, int) and size > 0 for size in sizes.values()):
            part.update(sizes)


def _place(
    turns: list[tuple[Any, ...]],
    images: list[Part],
    videos: list[Part],
    folder: Path,
    fail: Callable[[str, str], SampleError],
) -> list[Message]:
    """Put the images at the marks of the human turns; without marks, all of them before the first human turn."""
    texts = [text for role, content in turns if role == "user" for text in _strings(content)]
    pieces = [piece for _, content in turns if isinstance(content, list) for piece in content]
    pads = any(PADS.search(text) for text in texts)
    marks = PADS if pads else TAGS
    found = [match.group(1) for text in texts for match in marks.finditer(text)]
    if not pads and not images and not videos and any(_part_kind(p) and not _is_empty(p) for p in pieces):
        found = []  # the parts contain the images themselves, so "<image>" is ordinary text
    found += [_part_kind(piece) for piece in pieces if _is_empty(piece)]
    have = {"image": images, "video": videos}
    for kind, media in have.items():
        if (found or not media) and found.count(kind) != len(media):
            raise fail("mark_count", f"{found.count(kind)} {kind} marks in the human turns, but {len(media)} {kind}s")
    queues = {kind: iter(media) for kind, media in have.items()}
    front = [] if found else [*images, *videos]
    messages: list[Message] = []
    for role, content in turns:
        parts: list[Part] = []
        for piece in content if isinstance(content, list) else [{"type": "text", "text": content}]:
            text = piece.get("text") if isinstance(piece, dict) and piece.get("type") == "text" else None
            if _is_empty(piece):
                parts.append(next(queues[_part_kind(piece)]))
            elif not isinstance(text, str):
                parts.append(_content_part(piece, folder, fail))
            elif role != "user" or not (images or videos):
                parts.append({"type": "text", "text": text})
            else:
                if pads:
                    text = TAGS.sub("", text)  # VST removes the older marks
                parts += _split(text, marks, queues) if found else [{"type": "text", "text": text}]
        if role == "user" and front:
            parts = [*front, *parts]
            front = []
        messages.append({"role": role, "content": parts})
    if front:
        raise fail("mark_count", f"{len(front)} images, but no human turn to put them into")
    return messages


def _strings(content: Any) -> list[str]:
    if isinstance(content, str):
        return [content]
    return [p["text"] for p in content if isinstance(p, dict) and isinstance(p.get("text"), str)]


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
    return _first(piece, kind, f"{kind}_url", "path", "url", "bytes") if kind else None


def _is_empty(piece: Any) -> bool:
    """Whether a part is only a mark, {"type": "image"}; the image is in the row's `images` (TRL, ms-swift)."""
    return bool(_part_kind(piece)) and _part_media(piece) is None


def _content_part(piece: Any, folder: Path, fail: Callable[[str, str], SampleError]) -> Part:
    """A part from {"type": "image_url", "image_url": {"url": ...}}, {"type": "image", "image": ...}, ... (OpenAI)."""
    kind = _part_kind(piece)
    if not kind:
        raise fail("bad_schema", f"a content part is {_short(piece)}; expected type text, image, image_url or video")
    keep = {k: v for k, v in piece.items() if k in PART_OPTIONS and v is not None}
    media = payload(_part_media(piece), folder, fail)
    cut = next((key for key in ("video_start", "video_end") if key in keep and isinstance(media, list)), None)
    if cut:
        raise fail("unsupported_option", f"{cut} is {keep[cut]!r} on a list of frames; leave out the other frames")
    return {"type": kind, kind: media, **keep}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
