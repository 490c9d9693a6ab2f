"""The weighted average of checkpoints (model soups, arXiv 2203.05482), one tensor at a time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fastvst.model import checkpoint_files, weights
from fastvst.model.checkpoint_files import INDEX, SINGLE
from fastvst.model.config import ModelConfig

Headers = dict[str, tuple[Path, dict[str, Any]]]  # published name -> file, header entry with the stored name


class AverageError(ValueError):
    """Checkpoints that cannot be averaged; the message names the first difference."""


@torch.no_grad()
def average(sources: Sequence[Path], shares: Sequence[float], out: Path) -> int:
    """Write the files with the weights of `out`: sum of shares[i] * sources[i]; returns the number of tensors.

    The sum is taken in float64 and stored in the dtype and in the files of the first source, so the host holds one
    tensor of each source and the tensors of one file.

    Args:
        sources: two or more model directories.
        shares: one for each source; they sum to 1.
        out: an existing folder (see `checkpoint_files.update`).

    Raises:
        AverageError: other tensors, shapes or config fields than in the first source, or a wrong number of shares.
        WeightsError, FileNotFoundError: files of a source that are missing or damaged.
    """
    if len(shares) != len(sources) or not abs(sum(shares) - 1) < 1e-6:
        raise AverageError(f"{len(sources)} checkpoints and the weights {list(shares)}; expected one each, sum 1")
    tied = _check_configs(sources)
    headers = [_headers(source, tied) for source in sources]
    for source, header in zip(sources[1:], headers[1:], strict=True):
        _check_same(sources[0], headers[0], source, header)
    with ExitStack() as stack:
        places = [_open(stack, header) for header in headers]
        for path in dict.fromkeys(path for path, _ in headers[0].values()):
            names = [name for name, (holder, _) in headers[0].items() if holder == path]
            mixed = {name: _mix([place[name] for place in places], shares) for name in names}
            weights.write_tensors(mixed, out / path.name)
    if not (sources[0] / SINGLE).is_file():
        metadata = checkpoint_files.read_json(sources[0] / INDEX).get("metadata") or {}
        content = {"metadata": metadata, "weight_map": {name: path.name for name, (path, _) in headers[0].items()}}
        (out / INDEX).write_text(checkpoint_files.json_text(content), encoding="utf-8")
    return len(headers[0])


def _check_configs(sources: Sequence[Path]) -> bool:
    """True if the embeddings are tied. Raises AverageError if the models differ in a field that fastvst reads."""
    first, *others = [_fields(source) for source in sources]
    for source, fields in zip(sources[1:], others, strict=True):
        name = next((n for n, value in first.items() if fields[n] != value), None)
        if name is not None:
            raise AverageError(
                f"{source} is another model than {sources[0]}: {name} is {fields[name]}, there {first[name]}"
            )
    return bool(first["tie_word_embeddings"])


def _fields(source: Path) -> dict[str, Any]:
    return {name: value for name, value in vars(ModelConfig.from_pretrained(source)).items() if name != "stored"}


def _headers(source: Path, tied: bool) -> Headers:
    """All tensors of a model directory, without copies and derived ones."""
    found: Headers = {}
    for path in weights.weight_files(source):
        header, problem = weights.read_header(path)
        if problem:
            raise weights.WeightsError(f"{source}: {problem}")
        for stored, entry in header.items():
            name = weights.published_name(stored)
            if not weights.DERIVED.search(name) and not (tied and name == "lm_head.weight"):
                found[name] = (path, {**entry, "stored": stored})
    return found


def _check_same(first: Path, wanted: Headers, source: Path, found: Headers) -> None:
    different = sorted(wanted.keys() ^ found.keys())
    if different:
        where = first if different[0] in wanted else source
        count = len(different)
        raise AverageError(f"{count} tensors are only in one of {first} and {source}: {different[0]} in {where}")
    for name, (path, entry) in found.items():
        shape = wanted[name][1]["shape"]
        if entry["shape"] != shape:
            raise AverageError(f"{name} is {entry['shape']} in {path} and {shape} in {first}")


def _open(stack: ExitStack, header: Headers) -> dict[str, tuple[Any, str]]:
    """Published name -> (open file, stored name)."""
    paths = {path for path, _ in header.values()}
    opened = {path: stack.enter_context(safe_open(path, framework="pt", device="cpu")) for path in paths}
    return {name: (opened[path], entry["stored"]) for name, (path, entry) in header.items()}


def _mix(places: Sequence[tuple[Any, str]], shares: Sequence[float]) -> Tensor:
    """The weighted sum of one tensor, in the dtype of the first source."""
    total: Tensor | None = None
    dtype = torch.float32
    for number, ((file, stored), share) in enumerate(zip(places, shares, strict=True)):
        tensor = file.get_tensor(stored)
        if not tensor.is_floating_point():
            raise AverageError(f"{stored} is {tensor.dtype}; expected a float type")
        dtype = tensor.dtype if number == 0 else dtype
        part = tensor.double().mul_(share)
        total = part if total is None else total.add_(part)
    assert total is not None
    if not torch.isfinite(total).all():
        raise AverageError(f"{places[0][1]} contains NaN or infinite values")
    return total.to(dtype)
