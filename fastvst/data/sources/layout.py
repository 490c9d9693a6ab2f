"""Which files of a folder are the rows of a data set. The rules are those of the Hugging Face `datasets` library.

    dataset_dict.json, state.json   `save_to_disk`: these files name the splits and the data files
    configs: in README.md           the files of every split, as the Hub reads them
    data/train-00000-of-00002.*     the name of the split is in the shard's name
    train/*, my_test/*              a folder's name contains a split keyword
    train.jsonl, my-test-1.jsonl    a file's name contains a split keyword
    anything else                   one split, "train"

The first rule that matches is used (https://huggingface.co/docs/datasets/repository_structure). Hidden files, caches of
`datasets` (cache-*.arrow) and temporary files are never rows.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastvst import jsonl

SUFFIXES = {
    ".parquet": ".parquet",
    ".arrow": ".arrow",
    ".jsonl": ".jsonl",
    ".ndjson": ".jsonl",
    ".json": ".json",
    ".csv": ".csv",
    ".tsv": ".tsv",
    ".tar": ".tar",
    ".hdf5": ".hdf5",
    ".h5": ".hdf5",
}
KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SEPARATOR = "[-._ 0-9]"
SHARD = re.compile(r"data/([^/]*)-[0-9]{5}-of-[0-9]{5}[^/]*\.[^/]*")
# Files that describe a data set; `datasets` never takes them for rows either.
DESCRIPTIONS = (
    "README.md",
    "config.json",
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
)
CACHE = r"(cache|indices)-.*\.arrow"
PARTIAL = r"tmp[a-z0-9_]{8}(\..*)?|.*(\.lock|\.incomplete|\.tmp|\.part|\.crdownload|~)"  # tmp...: Python's tempfile
TEMPORARY = re.compile(f"{CACHE}|{PARTIAL}")


@dataclass
class Layout:
    """The files of one split.

    Attributes:
        files: the data files, in order.
        split: name of the split; None if the folder does not name any.
        others: files of the folder that are not read, by kind: (kind, number, first name).
    """

    files: list[Path]
    split: str | None = None
    others: list[tuple[str, int, str]] = field(default_factory=list)


def find_files(root: Path, kinds: Sequence[str], split: str | None) -> Layout:
    """The data files of `root`, a file or a folder.

    Args:
        kinds: values of SUFFIXES that are read, in the order of preference; files of one kind are read.
        split: name of the split; None if there is only one.

    Raises:
        ValueError: several splits and no name, an unknown name, or a description that cannot be followed. `files` is
            empty if the folder has no data files.
    """
    if root.is_file():
        _check_single(root, split)
        return Layout([root], split)
    root = _snapshot(root)
    if (root / "dataset_dict.json").is_file():
        return _saved(root / _choose(root, _saved_splits(root), split), None)
    if (root / "state.json").is_file():
        return _saved(root, split)
    _check_registry(root)
    return _search(root, kinds, split)


def _check_registry(root: Path) -> None:
    """Raise ValueError for a data folder of LLaMA-Factory: each of its files is a data set of its own."""
    path = root / "dataset_info.json"
    try:
        content = jsonl.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return
    entries = content.values() if isinstance(content, dict) else []
    files = [str(entry["file_name"]) for entry in entries if isinstance(entry, dict) and "file_name" in entry]
    if files:
        raise ValueError(f"{path} names data sets of their own: {files[:12]}; give the path of one of them")


def _search(root: Path, kinds: Sequence[str], split: str | None) -> Layout:
    visible = [path for path in sorted(root.rglob("*")) if path.is_file() and not _is_hidden(path.relative_to(root))]
    candidates = [path for path in visible if _kind(path) in kinds]
    found = _declared(root, candidates) or _named(root, candidates)
    if not candidates:
        return Layout([], None, _by_kind(root, visible))
    chosen = _choose(root, sorted(found), split) if found else _choose(root, ["train"], split)
    members = found[chosen] if found else candidates
    rank = min(kinds.index(_kind(path)) for path in members)
    files = [path for path in members if _kind(path) == kinds[rank]]
    _check_members(root, files, found or {})
    splits = {path for paths in (found or {}).values() for path in paths}
    unread = [path for path in visible if path not in {*files, *(splits - set(members))} and not _is_dull(path)]
    lost = [path for path in unread if path in candidates and path not in splits and kinds.index(_kind(path)) <= rank]
    if found and split is None and lost:
        raise ValueError(
            f"{root}: the file names name the split {chosen!r}, but {lost[0].relative_to(root)} belongs to no split; "
            f"say split={chosen!r}, or give the path of the files"
        )
    return Layout(files, chosen if found else None, _by_kind(root, unread))


def _is_hidden(relative: Path) -> bool:
    """Names with a dot in front, and folders with an underscore in front (__pycache__, _temporary of Spark)."""
    return any(part.startswith(".") for part in relative.parts) or any(
        part.startswith("_") for part in relative.parent.parts
    )


def _kind(path: Path) -> str:
    """The value of SUFFIXES of a data file, "" of any other file."""
    if path.name in DESCRIPTIONS or TEMPORARY.fullmatch(path.name):
        return ""
    return SUFFIXES.get(path.suffix.lower(), "")


def _is_dull(path: Path) -> bool:
    return path.name in DESCRIPTIONS or path.name.upper().startswith(("LICENSE", "README"))


def _by_kind(root: Path, paths: Sequence[Path]) -> list[tuple[str, int, str]]:
    kinds: dict[str, list[Path]] = {}
    for path in paths:
        cache = path.suffix.lower() in SUFFIXES and TEMPORARY.fullmatch(path.name)
        kinds.setdefault("cache" if cache else path.suffix.lower() or "no suffix", []).append(path)
    return [(kind, len(found), str(found[0].relative_to(root))) for kind, found in sorted(kinds.items())]


def _choose(root: Path, splits: Sequence[str], split: str | None) -> str:
    """The name of the split to read. Raises ValueError if it is not among `splits`, or not given and not the only."""
    if split is None and len(splits) == 1:
        return splits[0]
    if split is None or split not in splits:
        asked = "" if split is None else f"; there is no {split!r}"
        raise ValueError(f"{root}: the data set has the splits {sorted(splits)}; name one of them (split=...){asked}")
    return split


def _check_single(file: Path, split: str | None) -> None:
    """A file is the split that its name contains; without a keyword it is "train", as in `load_dataset`."""
    names = [name for name, words in KEYWORDS.items() if _has_keyword(file.name, words, whole=False)] or ["train"]
    shard = SHARD.fullmatch(f"data/{file.name}")
    if split is not None and split not in ([shard[1]] if shard else names):
        raise ValueError(f"{file}: the file is the split {shard[1] if shard else names[0]!r}, not {split!r}")


# --- datasets.save_to_disk -----------------------------------------------------------------------------------------


def _saved_splits(root: Path) -> list[str]:
    try:
        return [str(name) for name in jsonl.loads((root / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{root / 'dataset_dict.json'} names no splits: {error!r}") from error


def _saved(folder: Path, split: str | None) -> Layout:
    """The files that `state.json` names. Raises ValueError if it selects rows by an index, as `datasets` 1.x did."""
    try:
        state = jsonl.loads((folder / "state.json").read_text(encoding="utf-8"))
        names = [entry["filename"] for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder / 'state.json'} names no data files: {error!r}") from error
    outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if outside:
        raise ValueError(f"{folder / 'state.json'} names {outside[0]!r}; expected a file of its own folder")
    if state.get("_indices_data_files"):
        raise ValueError(f"{folder}: state.json selects rows by {state['_indices_data_files']}; save the data set anew")
    own = state.get("_split") or "train"
    if split is not None and split != own:
        raise ValueError(f"{folder}: the saved data set is the split {own!r}; there is no {split!r}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder}: state.json names {missing[0]!r}, one of {len(missing)} missing files")
    files = [folder / name for name in names]
    unread = [path for path in sorted(folder.iterdir()) if path.is_file() and path not in files and not _is_dull(path)]
    return Layout(files, state.get("_split"), _by_kind(folder, unread))


def _check_members(root: Path, files: Sequence[Path], splits: dict[str, list[Path]]) -> None:
    """Raise ValueError if a file is in two splits, or if the files are several data sets of `load_dataset`'s cache."""
    counts = Counter(path for paths in splits.values() for path in paths)
    twice = next((path for path in files if counts[path] > 1), None)
    if twice is not None:
        raise ValueError(f"{root}: {twice.relative_to(root)} belongs to several of the splits {sorted(splits)}")
    prepared = sorted({path.parent for path in files if (path.parent / "dataset_info.json").is_file()})
    if len(prepared) > 1 and all(path.suffix == ".arrow" for path in files):
        names = [str(path.relative_to(root)) for path in prepared]
        raise ValueError(f"{root}: {len(prepared)} prepared data sets: {names[:6]}; give the path of one of them")


# --- repositories of the Hub ---------------------------------------------------------------------------------------


def _snapshot(root: Path) -> Path:
    """The snapshot of a cached repository (snapshots/<commit>, with refs/main), or `root` itself."""
    if not ((root / "snapshots").is_dir() and (root / "blobs").is_dir()):
        return root
    snapshots = sorted(path for path in (root / "snapshots").iterdir() if path.is_dir())
    main = root / "refs" / "main"
    if main.is_file():
        snapshots = [path for path in snapshots if path.name == main.read_text(encoding="utf-8").strip()] or snapshots
    if len(snapshots) != 1:
        raise ValueError(f"{root}: snapshots {[path.name for path in snapshots]}; give the path of one of them")
    return snapshots[0]


def _named(root: Path, files: Sequence[Path]) -> dict[str, list[Path]] | None:
    """Split -> files by the names of shards, folders or files; None if no name contains a split."""
    relative = {path: path.relative_to(root).as_posix() for path in files}
    shards: dict[str, list[Path]] = {}
    for path, name in relative.items():
        match = SHARD.fullmatch(name)
        if match:
            shards.setdefault(match[1], []).append(path)
    odd = [split for split in shards if not re.match(r"^\w+(\.\w+)*$", split)]
    if odd:
        raise ValueError(f"{root}: a shard names the split {odd[0]!r}; expected words joined by dots")
    if shards:
        return shards
    for whole in (True, False):  # folders first, then files
        found: dict[str, list[Path]] = {}
        for path, name in relative.items():
            parts = name.split("/")
            for split, words in KEYWORDS.items():
                if any(_has_keyword(part, words, whole) for part in (parts[:-1] if whole else parts[-1:])):
                    found.setdefault(split, []).append(path)
        if found:
            return found
    return None


def _has_keyword(name: str, words: Sequence[str], whole: bool) -> bool:
    """Whether a name contains a keyword between separators; `whole`: the end of the name is a separator too."""
    end = f"(?:{SEPARATOR}|$)" if whole else SEPARATOR
    return any(re.search(f"(?:^|{SEPARATOR}){word}{end}", name) for word in words)


def _declared(root: Path, files: Sequence[Path]) -> dict[str, list[Path]] | None:
    """Split -> files by the `configs` in the front matter of README.md; None without them.

    Raises:
        ValueError: several configurations without a default one.
    """
    configs = _configs(root / "README.md")
    if not configs:
        return None
    names = [str(config.get("config_name", "default")) for config in configs]
    default = [c for c, name in zip(configs, names, strict=True) if c.get("default") or name == "default"]
    if len(configs) > 1 and len(default) != 1:
        raise ValueError(f"{root}: README.md has the configurations {names}; give the path of the files of one of them")
    config = configs[0] if len(configs) == 1 else default[0]
    folder = root / str(config.get("data_dir", "."))
    files = [path for path in files if path.is_relative_to(folder)]
    if "data_files" not in config:
        return _named(folder, files) or {"train": files}
    found: dict[str, list[Path]] = {}
    for split, patterns in _patterns(config["data_files"]):
        for pattern in patterns:
            matcher = re.compile(glob_regex(pattern.removeprefix("./")))
            matched = [path for path in files if matcher.fullmatch(path.relative_to(folder).as_posix())]
            found.setdefault(split, []).extend(path for path in matched if path not in found.get(split, []))
    if not any(found.values()):
        raise ValueError(f"{root}: no file of README.md's data_files {config['data_files']} is there")
    return {split: paths for split, paths in found.items() if paths}


def _configs(readme: Path) -> list[dict[str, Any]]:
    if not readme.is_file():
        return []
    text = readme.read_text(encoding="utf-8-sig", errors="replace")
    match = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", text, re.DOTALL)
    if not match or not re.search(r"^configs\s*:", match[1], re.MULTILINE):
        return []
    try:
        import yaml
    except ImportError as error:
        raise ValueError(f"{readme} lists the files of the data set; reading it needs `pip install pyyaml`") from error
    try:
        content = yaml.safe_load(match[1])
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(f"{readme}: the front matter is not YAML: {error}") from error
    configs = content.get("configs") if isinstance(content, dict) else None
    return [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []


def _patterns(data_files: Any) -> list[tuple[str, list[str]]]:
    """(split, patterns) of `data_files`: a pattern, a list of patterns, or a list of {split, path}."""
    entries = data_files if isinstance(data_files, list) else [data_files]
    if isinstance(data_files, dict):
        entries = [{"split": split, "path": path} for split, path in data_files.items()]
    found = []
    for entry in entries:
        path = entry.get("path") if isinstance(entry, dict) else entry
        split = entry.get("split", "train") if isinstance(entry, dict) else "train"
        found.append((str(split), [str(one) for one in (path if isinstance(path, list) else [path])]))
    return found


def glob_regex(pattern: str) -> str:
    """The regular expression of a glob pattern: `*` stays within a folder, `**` does not."""
    pieces = []
    for token in re.findall(r"\*\*/|\*\*|\*|\?|\[[^\]]*\]|[^*?\[]+|\[", pattern):
        simple = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(token)
        if simple is None:
            simple = token.replace("[!", "[^", 1) if len(token) > 1 and token[0] == "[" else re.escape(token)
        pieces.append(simple)
    return "".join(pieces)
