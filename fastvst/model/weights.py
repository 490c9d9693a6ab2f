"""Model directories in the published layout: config.json and safetensors, never a pickle."""

from __future__ import annotations

import json
import math
import re
import struct
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastvst import atomic, checksum, jsonl
from fastvst.model import checkpoint_files as files
from fastvst.model import config_json, refusals
from fastvst.model.checkpoint_files import INDEX, SINGLE
from fastvst.model.config import ModelConfig
from fastvst.model.published import zero_padding

# transformers 5.x uses other module names in memory than in files.
RENAMES = (("model.visual.", "visual."), ("model.language_model.", "model."))
# Buffers that old versions of transformers saved; the config determines them.
DERIVED = re.compile(r"(^|\.)rotary_(pos_)?emb\.inv_freq$")


MAX_HEADER = 100_000_000  # bytes; the limit of safetensors itself
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
MAX_SHARD = 5_000_000_000  # bytes of tensors in one file; transformers has the same limit
SHOWN = 5  # problems in a message; a wrong model has a thousand


class WeightsError(ValueError):
    """The files do not hold the model's tensors; the message names the first wrong ones and their number."""


def load(model: nn.Module, directory: Path, *, tied: bool, dtype: torch.dtype, device: torch.device) -> None:
    """Fill a model with the tensors of a directory.

    Args:
        model: on the meta device, with published parameter names; it gets memory on `device`, in `dtype`.
        tied: the LM head is the embedding; files may repeat it as `lm_head.weight`.

    Raises:
        FileNotFoundError: the directory has no safetensors files.
        WeightsError: missing, unexpected, wrong-shaped or truncated tensors, or NaN; names the first ones.
        Damaged: the directory is part of a run's checkpoint whose marker has another checksum of a file.
    """
    found = _matched(directory, model, tied)
    checksum.check_inner(directory, [path.name for path in found])
    model.to(dtype).to_empty(device=device)
    zero_padding(model)
    parameters = model.state_dict()  # views of the parameters
    for path, names in found.items():
        with safe_open(path, framework="pt", device="cpu") as file, torch.no_grad():
            for stored, name in names:
                if name is not None:
                    parameters[name].copy_(_finite(file.get_tensor(stored), stored, path))
    if tied:
        _check_tied(found, parameters["model.embed_tokens.weight"], directory)


def check_files(directory: Path, model: nn.Module, *, tied: bool) -> dict[Path, list[str]]:
    """The safetensors files of a directory with the names of their tensors, without reading the tensors.

    Args:
        model, tied: as for `load`; a tied LM head that the files repeat is left out.

    Raises:
        FileNotFoundError, WeightsError: as `load`.
    """
    found = _matched(directory, model, tied)
    return {path: [stored for stored, name in names if name is not None] for path, names in found.items()}


def _matched(directory: Path, model: nn.Module, tied: bool) -> dict[Path, list[tuple[str, str | None]]]:
    """`_match`, with problems as WeightsError."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found, problems = _match(weight_files(directory), wanted, tied)
    if problems:
        raise WeightsError(_summary(directory, problems, found, wanted))
    return found


def _summary(
    directory: Path,
    problems: list[str],
    found: Mapping[Path, list[tuple[str, str | None]]],
    wanted: Mapping[str, tuple[int, ...]],
) -> str:
    """The first problems and how many there are, or what is wrong with all of the names or tensors."""
    entries = {name: entry for path in found for name, entry in read_header(path)[0].items()}
    known = refusals.quantised_tensors(entries) or refusals.wrapped_names(entries)
    if known:
        return f"{directory}: {known}"
    headers = list(entries)
    for name in headers:
        prefix, ending, _ = name.partition("model.embed_tokens.weight")
        prefix = prefix if ending else name.partition("model.language_model.embed_tokens.weight")[0]
        fitting = [n for n in headers if prefix and published_name(n.removeprefix(prefix)) in wanted]
        if prefix != name and len(fitting) > len(wanted) / 2:
            return (
                f"{directory}: all tensor names begin with {prefix!r}, which is not part of the published names; write "
                "the files again without it"
            )
    rest = f"\n  ... and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    listed = "\n  ".join(problems[:SHOWN])
    return f"{directory} does not hold the weights of its config.json:\n  {listed}{rest}"


def _finite(tensor: Tensor, name: str, path: Path) -> Tensor:
    """The tensor. Raises WeightsError if it has NaN or infinite values; a sum finds them without a second tensor."""
    if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
        raise WeightsError(f"{path}: {name} contains NaN or infinite values; the training that wrote it has diverged")
    return tensor


def save(
    directory: Path,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    *,
    processor: Any = None,
    max_shard_bytes: int = MAX_SHARD,
) -> None:
    """Write config.json, generation_config.json and safetensors with published names (see `save_pretrained`).

    Other files and folders of `directory` stay; weights that it had under other names (shards, an index) are replaced.

    Args:
        state: parameter name -> tensor (gathered if the model is sharded); each is stored in its own dtype.
        max_shard_bytes: tensor bytes in one file; a larger tensor gets its own file.

    Raises:
        OSError: disk full, no permission, ...; the content of `directory` is what it was before.
    """
    sizes = sizes_of(state)
    shards = plan_shards(sizes, max_shard_bytes)
    with files.update(directory) as partial:
        write_shards(partial, shards, state)
        write_index(partial, shards, sizes)
        write_settings(partial, config, (tensor.dtype for tensor in state.values()), processor)


def _config_text(config: ModelConfig, dtypes: set[torch.dtype]) -> str:
    """config.json for these tensors; a warning names what differs from the file that was read."""
    content = config.config_content()
    fields, tower = config.changes()
    said = [f"{name} is {value}" for name, value in (fields | tower).items()]
    if len(dtypes) == 1:
        dtype = str(dtypes.pop()).removeprefix("torch.")
        before = config_json.set_dtype(content, dtype)
        said += [f"the dtype is {dtype}, it was {before}"] if before else []
    if said:
        warnings.warn(f"config.json differs from the file that was read: {'; '.join(said)}", stacklevel=5)
    return files.json_text(content)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a directory: those that the index names, or the only one."""
    index = directory / INDEX
    if (directory / SINGLE).is_file():
        if index.is_file() and set(_weight_map(index).values()) != {SINGLE}:
            warnings.warn(f"{directory}: {SINGLE} is used, as in transformers; {INDEX} is ignored", stacklevel=4)
        return [directory / SINGLE]
    if index.is_file():
        names = sorted(set(_weight_map(index).values()))
        others = sorted(p.name for p in directory.iterdir() if files.SHARD.fullmatch(p.name) and p.name not in names)
        if others:
            warnings.warn(f"{directory}: {INDEX} does not list {', '.join(others[:SHOWN])}; not read", stacklevel=4)
        outside = [n for n in names if Path(n).name != n]
        if outside:
            raise WeightsError(f"{index} names files outside its directory: {outside}")
        return [directory / n for n in names]
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in directory.glob(pattern))
    hint = refusals.hint(directory)
    if pickled and not hint:
        new = directory.resolve().with_name(f"{directory.resolve().name}-safetensors")
        hint = (
            f". It holds {pickled}, which are pickles. Loading a pickle can run any code, so fastvst never does. "
            "Convert them with transformers:\n"
            '  python -c "from transformers import Qwen2_5_VLForConditionalGeneration as M; '
            f"M.from_pretrained('{directory.resolve()}').save_pretrained('{new}')\""
        )
    raise FileNotFoundError(f"{directory} has neither {SINGLE} nor {INDEX}{hint}")


def _weight_map(index: Path) -> dict[str, str]:
    found = files.read_json(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise WeightsError(f"{index} has no weight_map from tensors to files")
    return found


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], str | None]:
    """The header of a safetensors file (name -> dtype, shape, data_offsets), and its problem in words, or None."""
    if not path.is_file():
        return {}, f"{path.name}: the file is missing"
    try:
        files.check_pointer(path)
    except ValueError as error:
        return {}, str(error)
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= size - 8:
            return {}, f"{path.name}: truncated or not safetensors ({size} bytes)"
        if length > MAX_HEADER:
            return {}, f"{path.name}: its header has {length:,} bytes; safetensors allows {MAX_HEADER:,}"
        try:
            header = jsonl.loads(file.read(length))
            header.pop("__metadata__", None)
            wrong = next((name for name, entry in header.items() if not _is_tensor(entry)), None)
        except (ValueError, AttributeError, TypeError, RecursionError):
            return {}, f"{path.name}: its header is not JSON; not a safetensors file"
    if wrong is not None:
        return {}, f"{path.name}: the header entry of {wrong[:80]} is {str(header[wrong])[:120]}; the file is damaged"
    cut = [n for n, t in header.items() if 8 + length + t["data_offsets"][1] > size]
    if cut:
        need = 8 + length + max(t["data_offsets"][1] for t in header.values())
        return header, f"{path.name}: truncated at {size} of {need} bytes; cut off: {', '.join(sorted(cut)[:SHOWN])}"
    return header, None


def _is_tensor(entry: Any) -> bool:
    """True for a header entry whose shape, dtype and place agree."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape = entry.get("shape")
    offsets = entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list):
        return False
    if not all(type(number) is int and number >= 0 for number in [*shape, *offsets]):
        return False
    width = BYTES.get(entry["dtype"])
    used = offsets[1] - offsets[0] if len(offsets) == 2 else -1
    return used >= 0 and len(shape) <= 8 and (width is None or used == width * math.prod(shape))


def published_name(name: str) -> str:
    """The published name of a tensor, from that name or from the in-memory name of transformers 5.x."""
    for prefix, replacement in RENAMES:
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return name


def _match(
    files: list[Path], wanted: Mapping[str, tuple[int, ...]], tied: bool
) -> tuple[dict[Path, list[tuple[str, str | None]]], list[str]]:
    """For every file its (stored name, parameter name or None for a tied LM head), and every problem in words."""
    found: dict[Path, list[tuple[str, str | None]]] = {}
    problems = []
    seen = set()
    for path in files:
        header, problem = read_header(path)
        if problem:
            problems.append(problem)
        found[path] = []
        for stored, tensor in header.items():
            name = published_name(stored)
            shape = tuple(tensor["shape"])
            if tied and name == "lm_head.weight":
                found[path].append((stored, None))
            elif name in seen:
                problems.append(f"twice: {name} ({path.name})")
            elif name in wanted:
                seen.add(name)
                found[path].append((stored, name))
                if shape != wanted[name]:
                    problems.append(f"wrong shape: {name} is {shape} in {path.name}, expected {wanted[name]}")
                elif tensor["dtype"] not in ("F64", "F32", "F16", "BF16"):
                    problems.append(f"wrong dtype: {name} is {tensor['dtype']} in {path.name}, expected a float type")
            elif not DERIVED.search(name):
                problems.append(f"unexpected: {stored} {shape} in {path.name}")
    problems += [f"missing: {name} {shape}" for name, shape in wanted.items() if name not in seen]
    return found, problems


def _check_tied(found: dict[Path, list[tuple[str, str | None]]], embedding: Tensor, directory: Path) -> None:
    """The files of a tied model may repeat the embedding as lm_head.weight; another value is an error."""
    for path, names in found.items():
        for stored, name in names:
            if name is not None:
                continue
            with safe_open(path, framework="pt", device="cpu") as file:
                head = file.get_tensor(stored).to(embedding)
            if head.shape != embedding.shape or not torch.equal(head, embedding):
                raise WeightsError(
                    f"{directory}: config.json ties the embeddings, but {path.name} holds a {stored} that differs from "
                    "embed_tokens; set tie_word_embeddings to false"
                )


@dataclass(frozen=True)
class Shard:
    """One safetensors file of a model.

    Attributes:
        file: its name.
        part: number of the process that writes it.
        names: of its tensors.
    """

    file: str
    part: int
    names: tuple[str, ...]


def plan_shards(sizes: Mapping[str, int], max_shard_bytes: int = MAX_SHARD, parts: int = 1) -> list[Shard]:
    """Divide tensors into files, in their order, so that `parts` processes write about the same number of bytes.

    Args:
        sizes: tensor name -> bytes.
        max_shard_bytes: tensor bytes in one file; a larger tensor gets its own file.
    """
    total = max(1, sum(sizes.values()))
    groups: list[tuple[int, list[str]]] = []
    filled = 0
    before = 0
    for name, size in sizes.items():
        part = min(parts - 1, (before + size // 2) * parts // total)
        if not groups or groups[-1][0] != part or filled + size > max_shard_bytes:
            groups.append((part, []))
            filled = 0
        groups[-1][1].append(name)
        filled += size
        before += size
    if len(groups) == 1:
        return [Shard(SINGLE, groups[0][0], tuple(groups[0][1]))]
    count = len(groups)
    return [
        Shard(f"model-{index + 1:05d}-of-{count:05d}.safetensors", part, tuple(names))
        for index, (part, names) in enumerate(groups)
    ]


def write_shards(directory: Path, shards: Sequence[Shard], tensors: Mapping[str, Tensor]) -> None:
    """Write the files of `shards`, all of whose tensors are in `tensors`."""
    for shard in shards:
        write_tensors({name: tensors[name] for name in shard.names}, directory / shard.file)


def write_index(directory: Path, shards: Sequence[Shard], sizes: Mapping[str, int]) -> None:
    """Write the index of several files; a single file needs none."""
    if len(shards) < 2:
        return
    places = {name: shard.file for shard in shards for name in shard.names}
    content = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
    (directory / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_settings(directory: Path, config: ModelConfig, dtypes: Iterable[torch.dtype], processor: Any = None) -> None:
    """Write everything of a model directory except the tensors: config.json, generation_config.json, processor."""
    (directory / files.CONFIG).write_text(_config_text(config, set(dtypes)), encoding="utf-8")
    (directory / files.GENERATION).write_text(config.generation_json(), encoding="utf-8")
    if processor is not None:
        processor.save_pretrained(directory)


def sizes_of(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Tensor name -> bytes."""
    return {name: tensor.numel() * tensor.element_size() for name, tensor in state.items()}


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write one safetensors file."""
    save_file({n: t.detach().to("cpu").contiguous() for n, t in tensors.items()}, path, metadata={"format": "pt"})
    atomic.give_new_mode(path)
