"""The files of a model directory: which of them belong together, and how one of them is read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from fastvst import atomic, jsonl

CONFIG = "config.json"
GENERATION = "generation_config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_JSON = 2**26  # bytes; the index of the 72B model has 0.1 MB
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")

# The first name of a group is always written. The others say the same in another form: where a save does not write
# one of them, transformers would read the old one in place of what was saved.
GROUPS = (
    ("tokenizer.json", "special_tokens_map.json", "added_tokens.json"),
    ("tokenizer.json", "chat_template.jinja", "chat_template.json", "additional_chat_templates"),
    ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
)


def update(directory: Path) -> AbstractContextManager[Path]:
    """`with update(directory) as partial:` write files of a model directory into `partial` (see `atomic.into`).

    They replace the files of the same names and the ones that mean the same: weights in another number of files, for
    instance. Every other file and folder of `directory` stays. config.json arrives last.
    """
    return atomic.into(directory, last=CONFIG, stale=_stale)


def _stale(directory: Path, names: set[str]) -> Iterator[str]:
    """Files that contradict the new files `names`."""
    if SINGLE in names or INDEX in names:
        for path in directory.iterdir():
            if path.name not in names and (path.name in (SINGLE, INDEX) or SHARD.fullmatch(path.name)):
                yield path.name
    found = {name for first, *others in GROUPS if first in names for name in others}
    for name in sorted(found):
        path = directory / name
        inside = [f"{name}/{p.name}" for p in path.glob("*.jinja")] if path.is_dir() else [name]
        yield from (one for one in inside if one not in names)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: not UTF-8, not JSON (the message has the line), nested too deeply, too large, or not an object.
    """
    check_pointer(path)
    check_size(path, MAX_JSON)
    try:
        content = jsonl.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} contains a {type(content).__name__}; expected a JSON object")
    return content


def check_size(path: Path, most: int) -> None:
    """Raise ValueError if a file has more than `most` bytes, before anything is read."""
    size = path.stat().st_size
    if size > most:
        raise ValueError(f"{path} has {size:,} bytes; expected at most {most:,}")


def check_pointer(path: Path) -> None:
    """Raise ValueError if a file is a pointer of Git LFS in place of the content."""
    with open(path, "rb") as file:
        if file.read(24).startswith(b"version https://git-lfs"):
            raise ValueError(f"{path} is a Git LFS pointer, not the file; run `git lfs pull` in {path.parent}")


def json_text(content: Any) -> str:
    """The text of a JSON file."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
