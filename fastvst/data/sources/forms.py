"""The forms of a row, distinguished by its columns: a list of turns, or a question and its response.

    conversations   VST, LLaVA and ShareGPT: from and value
    messages        OpenAI and ms-swift: role and content, which is a text or content parts
    texts           the Cauldron: pairs of user and assistant
    question        question, answer; with `thought`, `answer_gt` or a mode in meta_info one of VST's RL rows
    instruction     Alpaca: instruction, input, output
    query           ms-swift: query, response, history
    problem         problem, solution
    prompt          TRL: prompt, completion; texts or lists of messages
    caption         a caption of an image, asked with the question of the source

`columns` of a source gives columns these names; `named` applies it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from fastvst.data.sources.row_context import RowContext, short
from fastvst.data.sources.turns import Turn, content_parts, first, read_turns
from fastvst.data.sources.values import is_absent, parsed

# form -> columns of its response, in the order of preference
RESPONSES = {
    "question": ("answer", "answer_gt", "response"),
    "instruction": ("output", "response"),
    "query": ("response", "answer"),
    "problem": ("solution", "answer"),
    "prompt": ("completion", "response", "solution", "answer"),
    "caption": ("caption", "text", "txt"),
}
TALKS = ("conversations", "messages", "texts")
FORMS = (*TALKS, *RESPONSES)
IMAGE_COLUMNS = ("image", "images")
VIDEO_COLUMNS = ("video", "videos")
# Names that others give the image of a row; read where a row has neither `image` nor `images`.
IMAGE_ALIASES = (
    "file_name",
    "file_names",
    "image_path",
    "image_paths",
    "image_file",
    "image_url",
    "image_urls",
    "img",
    "img_path",
    *("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"),  # columns of a WebDataset
)
VIDEO_ALIASES = ("video_path", "video_file", "video_url", "mp4", "mkv", "webm", "mov", "avi")
MEDIA_COLUMNS = (*IMAGE_COLUMNS, *VIDEO_COLUMNS, *IMAGE_ALIASES, *VIDEO_ALIASES)
COMMON = (*MEDIA_COLUMNS, "id", "data_source", "type", "meta_info", "system", "fps", "tools", "functions", "answer")
# The columns that a form reads besides itself and COMMON.
ALSO = {
    "question": ("answer_gt", "thought", "response"),
    "instruction": ("input", "output", "response", "history"),
    "query": ("response", "history"),
    "problem": ("solution",),
    "prompt": ("completion", "response", "solution", "history", "kind"),
    "caption": ("text", "txt"),
}
OPTIONS = ("choices", "options")  # of a question: not read, see `check_options`
REFUSED = ("chosen", "rejected", "rejected_response", "audio", "audios", "objects", "label", *OPTIONS, *"ABCD")
# All columns that a row form looks at; tables skip the others.
COLUMNS = tuple(dict.fromkeys((*FORMS, *COMMON, *(name for names in ALSO.values() for name in names), *REFUSED)))
NAMES = tuple(name for name in COLUMNS if name not in REFUSED)  # what `columns` of a source may name


def row_form(columns: Any, question: str | None = None) -> str | None:
    """The form of rows with these columns, or None.

    Args:
        question: the question of captions; without it a caption alone is no form.
    """
    found = next((form for form in FORMS if form != "caption" and form in columns), None)
    if found is None and question is not None and any(name in columns for name in RESPONSES["caption"]):
        return "caption"
    return found


def check_names(columns: Mapping[str, str]) -> None:
    """Raise ValueError if `columns` of a source gives a name that no row form reads."""
    for name, column in columns.items():
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; the names are {', '.join(NAMES)}"
            raise ValueError(f"columns: unknown name {name!r}{hint}")
        if not isinstance(column, str) or not column:
            raise ValueError(f"columns: {name} is {column!r}; expected the name of a column")


def named(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row with the names that `columns` gives. A column that had such a name itself is not read."""
    if not columns:
        return row
    read = {*columns, *columns.values()}
    read |= {"rejected"} if "chosen" in read else set()  # the chosen answer is asked for by name
    kept = {key: value for key, value in row.items() if key not in read}
    return {**kept, **{name: row[column] for name, column in columns.items() if column in row}}


def ignored_columns(row: Mapping[str, Any], form: str, columns: Mapping[str, str]) -> set[str]:
    """Columns with a value that this form does not read; names as in the file."""
    read = {form, *COMMON, *ALSO.get(form, ())}
    files = {columns.get(name, name) for name in read} if columns else read
    return {key for key, value in row.items() if not is_absent(value) and key not in files}


def turns_of(row: dict[str, Any], form: str, context: RowContext, question: str | None) -> list[Turn]:
    """The turns of a row of any form, without the system message of its column `system`.

    Raises:
        SampleError: "bad_schema", "bad_turn", "preference_pair", "unread_choices", "unsupported_media",
            "unsupported_option".
    """
    _refuse(row, form, context)
    if form == "texts":
        return _pairs(row["texts"], "texts", context)
    if form in TALKS:
        return read_turns(row[form], form, context)
    asked = question if form == "caption" else row[form]
    turns = _pairs(row.get("history"), "history", context) if "history" in ALSO[form] else []
    if form == "prompt" and isinstance(asked, str):
        found = parsed(asked)
        if isinstance(found, list) and found and all(isinstance(turn, dict) and "role" in turn for turn in found):
            context.changed("json_text", f"prompt is the text {short(asked)}")
            asked = found
    if form == "prompt" and isinstance(asked, (list, dict)):
        turns += read_turns([asked] if isinstance(asked, dict) else asked, form, context)
    else:
        turns.append(("user", _asked(row, form, asked, context), {}))
    return turns + _response(row, form, context)


def response_of(row: dict[str, Any], form: str) -> Any:
    """The response of a row of question and response; None without one."""
    return first(row, *RESPONSES[form]) if form in RESPONSES else None


def _asked(row: dict[str, Any], form: str, asked: Any, context: RowContext) -> Any:
    if isinstance(asked, (int, float)) and not isinstance(asked, bool):
        raise context.fail("bad_schema", f"{form} is {short(asked)}; expected text")
    content = asked if isinstance(asked, str) else content_parts(asked, context) if form == "prompt" else None
    if not isinstance(content, (str, list)):
        raise context.fail("bad_schema", f"{form} is {short(asked)}; expected text")
    more = row.get("input") if form == "instruction" else None
    if is_absent(more):
        return content
    if not isinstance(more, str):
        raise context.fail("bad_schema", f"input is {short(more)}; expected text")
    return f"{content}\n{more}"


def _response(row: dict[str, Any], form: str, context: RowContext) -> list[Turn]:
    response = response_of(row, form)
    if response is None or (isinstance(response, float) and response != response):
        return []
    if isinstance(response, str) and form == "prompt":
        found = parsed(response)
        if isinstance(found, list) and found and all(isinstance(turn, dict) and "role" in turn for turn in found):
            context.changed("json_text", f"completion is the text {short(response)}")
            response = found
    if isinstance(response, list) and response and all(isinstance(turn, dict) and "role" in turn for turn in response):
        return read_turns(response, "completion", context)
    if isinstance(response, list) and len(response) == 1 and isinstance(response[0], str):
        context.changed("list_of_one", f"the answer is {short(response)}")
        response = response[0]
    if isinstance(response, (list, dict, bool)):
        context.changed("answer_not_learnt", f"the answer is {short(response)}; only a text or a number is learnt")
        return []
    if not isinstance(response, str):
        context.changed("number_as_text", f"the answer is the number {response!r}")
    thought = row.get("thought") if form == "question" else None
    return [("assistant", f"<think>{thought}</think> {response}" if thought else str(response), {})]


def _pairs(value: Any, key: str, context: RowContext) -> list[Turn]:
    """Turns of a list of [question, answer] or {user, assistant}; a list of {role, content} is read too."""
    value = parsed(value) if isinstance(value, str) else value
    if is_absent(value) or value == []:
        return []
    if not isinstance(value, list):
        raise context.fail("bad_schema", f"{key} is {short(value)}; expected a list of pairs")
    turns: list[Turn] = []
    for pair in value:
        if isinstance(pair, dict) and "user" in pair and "assistant" in pair:
            pair = [pair["user"], pair["assistant"]]
        elif isinstance(pair, dict):
            return read_turns(value, key, context)
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise context.fail("bad_schema", f"{key} holds {short(pair)}; expected [question, answer]")
        turns += [("user", pair[0], {}), ("assistant", pair[1], {})]
    return turns


def _refuse(row: dict[str, Any], form: str, context: RowContext) -> None:
    """Raise SampleError for columns without which the row means something else."""
    for name in ("rejected", "rejected_response"):
        if not is_absent(row.get(name)):
            raise context.fail(
                "preference_pair",
                f"the row has `{name}`: pairs of a chosen and a rejected answer are not read; columns = {{completion = "
                '"chosen"} trains on the chosen ones',
            )
    if isinstance(row.get("label"), bool) and form == "prompt":
        raise context.fail("preference_pair", "the row has a `label`, true or false, for its completion; leave it out")
    for name in ("audio", "audios"):
        if row.get(name):
            raise context.fail("unsupported_media", f"{name} is {short(row[name])}; images and videos are read")
    if row.get("objects") and any(mark in str(row.get(form)) for mark in ("<bbox>", "<ref-object>")):
        raise context.fail(
            "unsupported_option", "`objects` fills <bbox> and <ref-object> (ms-swift); write the boxes into the text"
        )
    if form in RESPONSES and form != "caption":
        _check_options(row, str(row.get(form)), context)


def _check_options(row: dict[str, Any], asked: str, context: RowContext) -> None:
    """Raise SampleError if the options of a question are in columns of their own, and not in its text."""
    options: Any = [row[name] for name in "ABCD" if isinstance(row.get(name), str)]
    name = "A, B"
    if len(options) < 2:
        name, options = next(((key, row[key]) for key in OPTIONS if not is_absent(row.get(key))), ("", []))
    options = parsed(options) if isinstance(options, str) else options
    texts = options.get("text", list(options.values())) if isinstance(options, dict) else options
    if not isinstance(texts, Sequence) or isinstance(texts, str):
        return
    missing = [text for text in texts if isinstance(text, (str, int, float)) and str(text).strip() not in asked]
    if missing:
        raise context.fail(
            "unread_choices",
            f"the options in {name} are not in the question, e.g. {short(missing[0])}; write them into it",
        )


def preference_pairs(columns: Any) -> bool:
    """Whether a data set consists of pairs of a chosen and a rejected answer."""
    return "chosen" in columns and "rejected" in columns
