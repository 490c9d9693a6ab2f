"""One row of a data set -> Sample. The columns decide its form (forms.py); the file type is irrelevant."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastvst import jsonl
from fastvst.data.chat import system_prompt
from fastvst.data.sample import Part, Sample
from fastvst.data.sources import forms, vst
from fastvst.data.sources.forms import COLUMNS, row_form
from fastvst.data.sources.marks import IMAGE_OPTIONS, PADS, PART_KEYS, PART_OPTIONS, TAGS, option, place
from fastvst.data.sources.media import all_images, media_list, payload
from fastvst.data.sources.row_context import RowContext, short
from fastvst.data.sources.tools import tools_text
from fastvst.data.sources.turns import CONTENT_KEYS, TURN_KEYS, Turn, first
from fastvst.data.sources.values import is_absent, parsed, plain

__all__ = ["COLUMNS", "PADS", "TAGS", "row_form", "to_sample"]


def to_sample(
    row: dict[str, Any],
    *,
    source: str,
    where: str,
    folder: Path,
    columns: Mapping[str, str] | None = None,
    question: str | None = None,
    roots: tuple[str, ...] | None = None,
    absolute: bool = True,
) -> Sample:
    """Turn one row into a Sample.

    Args:
        row: the row as it was read.
        source: name of the data set, used if the row has no `data_source`.
        where: file and row; also the sample's id if the row has none.
        folder: folder in which relative image paths start.
        columns, question: of the source, see `SourceConfig`.
        roots: real paths of the folders in which images may lie; None: anywhere.
        absolute: absolute paths may lead anywhere.

    Raises:
        SampleError: "bad_schema", "bad_turn", "bad_tools", "bad_field", "bad_fps", "bad_path", "outside_path",
            "bad_base64", "mark_count", "remote_media", "preference_pair", "unread_choices", "unsupported_media",
            "unsupported_option".
    """
    columns = columns or {}
    keys = {key: value for key, value in row.items() if not is_absent(value)}
    row = plain(forms.named(row, columns))
    context = RowContext(str(row.get("data_source") or source), "", where, folder, roots, absolute)
    context.id = _identifier(row.get("id"), context)
    form = row_form([key for key, value in row.items() if not _is_null(value)], question)
    if form is None:
        raise context.fail(
            "bad_schema", f"the row has {sorted(map(str, row))[:12]}; expected one of {list(forms.FORMS)}"
        )
    meta_info = _meta_info(row.get("meta_info"), context)
    metadata: dict[str, Any] = {} if meta_info is None else {"meta_info": meta_info}
    kind = _kind(row, form, meta_info)
    turns = _with_system(forms.turns_of(row, form, context, question), row, kind, context)
    answer = _truth(row, form, meta_info, metadata)
    images, videos = _media(row, kind, context)
    _apply_sizes(images, meta_info, context)
    is_vst = vst.is_vst(row, form)
    if is_vst:
        turns = vst.vst_turns(turns, len(images), context)
    if is_vst and vst.shows_no_images(kind) and (images or videos):
        context.changed("images_not_shown", f"type {kind!r}: VST shows none of the {len(images) + len(videos)} images")
        images = []
        videos = []
    messages = place(turns, images, videos, context)
    messages = vst.stripped(messages) if is_vst else messages
    try:
        sample = Sample.from_messages(
            messages, id=context.id, source=context.source, kind=kind, answer=answer, metadata=metadata
        )
    except ValueError as error:
        raise context.fail("bad_schema", str(error)) from error
    sample.notes = tuple(sorted(forms.ignored_columns(keys, form, columns) | _ignored_inside(row, form)))
    sample.changes = tuple(context.changes)
    return sample


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)


def _identifier(value: Any, context: RowContext) -> str:
    """The id as text. Bytes are decoded, and half of a surrogate pair is escaped."""
    if _is_null(value):
        return context.where.encode("utf-8", "backslashreplace").decode("utf-8")
    text = value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
    clean = text.encode("utf-8", "backslashreplace").decode("utf-8")
    if clean != text:
        context.changed("id_escaped", f"id is {ascii(text[:80])}")
    return clean


def _meta_info(value: Any, context: RowContext) -> Any:
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return jsonl.loads(value)
    except (ValueError, RecursionError) as error:
        found = parsed(value)
        if found is value:
            raise context.fail("bad_schema", f"meta_info is not JSON: {error}") from error
        context.changed("json_text", f"meta_info is the Python literal {short(value)}")
        return found


def _modes(meta_info: Any) -> list[Any]:
    """VST's reward modes of an RL row."""
    mode = meta_info.get("mode") if isinstance(meta_info, dict) else None
    return [mode] if isinstance(mode, str) else list(mode or [])


def _kind(row: dict[str, Any], form: str, meta_info: Any) -> str:
    """The kind of a row: its `type`; for VST's RL rows "bbox_3d" by their mode, or "thought"; else "qa".

    A question with an answer is an ordinary question. VST's RL rows have a thought, an `answer_gt`, or a mode.
    """
    given = row.get("type") or (row.get("kind") if form == "prompt" else None)
    if given or form != "question":
        return str(given or "qa")
    modes = _modes(meta_info)
    if "bbox3d" in modes:
        return "bbox_3d"
    asked = isinstance(meta_info, dict) and meta_info.get("question_type")
    return "thought" if row.get("thought") or not is_absent(row.get("answer_gt")) or modes or asked else "qa"


def _with_system(turns: list[Turn], row: dict[str, Any], kind: str, context: RowContext) -> list[Turn]:
    """The turns with the row's system message, and with its tools at the end of the system message."""
    system = row.get("system")
    if not is_absent(system):
        if not isinstance(system, str):
            raise context.fail("bad_schema", f"system is {short(system)}; expected text")
        if turns[0][0] == "system" and turns[0][1] != system:
            raise context.fail("bad_schema", f"two system messages: {short(system)} and {short(turns[0][1])}")
        turns = turns if turns[0][0] == "system" else [("system", system, {}), *turns]
    try:
        listed = tools_text(first(row, "tools", "functions"))
    except ValueError as error:
        raise context.fail("bad_tools", str(error)) from error
    if not listed:
        return turns
    if turns[0][0] != "system":
        return [("system", system_prompt(kind) + listed, {"tools": "added"}), *turns]
    content = turns[0][1]
    text = content.strip() + listed if isinstance(content, str) else [*content, {"type": "text", "text": listed}]
    return [("system", text, {"tools": True}), *turns[1:]]


def _ignored_inside(row: dict[str, Any], form: str) -> set[str]:
    """Keys with a value that nothing reads: of the row's turns ("messages[].name") and of their parts."""
    found: set[str] = set()
    turns = row[form] if isinstance(row.get(form), list) and form != "texts" else []
    for turn in [turn for turn in turns if isinstance(turn, dict)]:
        found |= {f"{form}[].{key}" for key, value in turn.items() if not is_absent(value) and key not in TURN_KEYS}
        parts = turn.get("content")
        for part in [part for part in (parts if isinstance(parts, list) else []) if isinstance(part, dict)]:
            options = IMAGE_OPTIONS if "image" in str(part.get("type")) else PART_OPTIONS
            known = (*PART_KEYS, *options)
            found |= {f"{form}[].content[].{k}" for k, v in part.items() if not is_absent(v) and k not in known}
    return found


def _truth(row: dict[str, Any], form: str, meta_info: Any, metadata: dict[str, Any]) -> dict[str, Any] | None:
    """The checkable answer of a row, with its value as it was read."""
    if form == "question":
        metadata |= {key: row[key] for key in ("thought", "answer_gt") if row.get(key)}
        truth = first(row, "answer_gt", "answer", "response")
        if _is_null(truth):
            return None
        modes = _modes(meta_info)
        meta = meta_info if isinstance(meta_info, dict) else {}
        choice = meta.get("question_type") == "multi_choices" or "multi_choices_score" in modes
        kind = "boxes" if "bbox3d" in modes else "choice" if choice else "text"
        return {"type": kind, "value": truth, "mode": modes}
    answer = _answer(row.get("answer"), metadata)
    response = forms.response_of(row, form)
    if answer is not None or _is_null(response):
        return answer
    if isinstance(response, list) and response and isinstance(response[-1], dict):  # messages
        response = first(response[-1], *CONTENT_KEYS)
    return {"type": "text", "value": response} if isinstance(response, (str, int, float)) else None


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
            known = jsonl.loads(value)
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
    if _is_null(value):
        return None
    return {"type": "text", "value": value if isinstance(value, (str, int, float, list, dict)) else str(value)}


def _is_checkable(answer: dict[str, Any]) -> bool:
    return isinstance(answer.get("type"), str) and "value" in answer


def _media(row: dict[str, Any], kind: str, context: RowContext) -> tuple[list[Part], list[Part]]:
    """The row's images and videos as parts, in order."""
    images = _listed(row, forms.IMAGE_COLUMNS, forms.IMAGE_ALIASES, context)
    videos = _listed(row, forms.VIDEO_COLUMNS, forms.VIDEO_ALIASES, context)
    if "video" in kind and not videos:  # VST stores video files or frames in `images`
        frames = [payload(item, context) for item in images if not isinstance(item, list)]
        videos = [frames] if len(frames) == len(images) and all_images(frames) else images
        images = []
    parts: list[Part] = [{"type": "video", "video": payload(item, context)} for item in videos]
    if not is_absent(row.get("fps")):
        fps = float(option("fps", row["fps"], context))
        for part in parts:
            part["fps"] = fps
    return [{"type": "image", "image": payload(item, context)} for item in images], parts


def _listed(row: dict[str, Any], names: tuple[str, ...], aliases: tuple[str, ...], context: RowContext) -> list[Any]:
    """The images in the columns `names`; without any, in the first of `aliases` that has a value."""
    found = [item for name in names for item in media_list(row.get(name), name, context)]
    if found:
        return found
    alias = next((name for name in aliases if not is_absent(row.get(name))), None)
    return media_list(row[alias], alias, context) if alias else []


def _apply_sizes(images: list[Part], meta_info: Any, context: RowContext) -> None:
    """Set the sizes of VST's meta_info: {resized_width, resized_height, ...} for each image; -1 = unchanged.

    In an RL row, whose meta_info is an object, they are its "sizes".
    """
    if isinstance(meta_info, dict):
        meta_info = meta_info.get("sizes")
    if not isinstance(meta_info, list) or len(meta_info) != len(images):
        return
    for part, info in zip(images, meta_info, strict=True):
        given = {key: info.get(key) for key in ("resized_width", "resized_height")} if isinstance(info, dict) else {}
        sizes = {key: option(key, value, context) for key, value in given.items() if not is_absent(value)}
        if len(sizes) == 2 and all(size > 0 for size in sizes.values()):
            part.update({key: int(size) for key, size in sizes.items()})
