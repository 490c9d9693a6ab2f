"""A checkpoint by its folder or by its name on the Hugging Face Hub, such as Qwen/Qwen2.5-VL-3B-Instruct.

A name is looked up in the cache of `huggingface_hub` first. Only what is missing there is downloaded, and nothing if
that library is offline (HF_HUB_OFFLINE=1).
"""

from __future__ import annotations

import re
from pathlib import Path

from fastvst import jsonl
from fastvst.model.checkpoint_files import CONFIG, INDEX, SINGLE

NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
PATTERNS = ("*.json", "*.safetensors", "*.jinja")  # everything that is read


def local_checkpoint(name: str | Path) -> Path:
    """The folder of a checkpoint.

    Args:
        name: a folder, or "owner/name" on the Hub where no such folder exists.

    Returns:
        The folder; for a name on the Hub that of its snapshot in the cache.

    Raises:
        FileNotFoundError: files of a checkpoint on the Hub are missing and cannot be downloaded. The message names
            them and where they were looked for.
        NotADirectoryError: `name` is a file.
    """
    path = Path(name).expanduser()
    if path.is_file():
        raise NotADirectoryError(f"{path} is a file; expected the folder of a checkpoint, with {CONFIG}")
    if path.exists() or not NAME.fullmatch(str(name)) or path.parent.exists():
        return path
    return _from_hub(str(name))


def _from_hub(name: str) -> Path:
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    cache = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    folder: Path | None = None
    try:
        folder = Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        missing = [CONFIG, "tokenizer.json", PROCESSORS[0], f"{SINGLE} or {INDEX} with its files"]
    else:
        missing = missing_files(folder)
    if folder is not None and not missing:
        return folder
    why = "huggingface_hub is offline (HF_HUB_OFFLINE)"
    if not constants.HF_HUB_OFFLINE:
        try:
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=list(PATTERNS)))
            missing = missing_files(folder)
            why = "the repository on the Hub does not have them"
        except (OSError, HfHubHTTPError, HFValidationError) as error:
            why = f"they cannot be downloaded: {next(iter(str(error).splitlines()), type(error).__name__)}"
        if folder is not None and not missing:
            return folder
    raise FileNotFoundError(
        f"there is no folder {name}, and of the Hub's {name} these files are missing: {', '.join(missing)}. They were "
        f"looked for in {folder or cache}; {why}. Pass the folder of a checkpoint, or download it where there is a "
        f"network: hf download {name}"
    )


def missing_files(folder: Path) -> list[str]:
    """Names of the files that a checkpoint in `folder` lacks."""
    missing = [name for name in (CONFIG, "tokenizer.json") if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in PROCESSORS):
        missing.append(PROCESSORS[0])
    if (folder / INDEX).is_file():
        shards = set(jsonl.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        missing += sorted(shard for shard in shards if not (folder / shard).is_file())
    elif not (folder / SINGLE).is_file():
        missing.append(f"{SINGLE} or {INDEX} with its files")
    return missing
