"""Which checkpoint a run resumes from: whole ones only, the newest of the current branch first.

A run that resumes from an older checkpoint than the newest starts a new branch. The marker of every checkpoint has its
branch, the branch's parent, and a serial number in the order of writing. `branch.json` names the current branch, so
that `--resume auto` never takes a checkpoint of an abandoned one for newer. A checkpoint of another branch that has the
name of a new one is renamed (step-000030-1), and checkpoint.keep counts it in the order of writing.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastvst import atomic, checksum, jsonl
from fastvst.checksum import MARKER, Damaged
from fastvst.train.distributed import World

NAME = re.compile(r"step-(\d+)(-\d+)?")
BRANCH = "branch.json"
BEST = "best"  # a link to the checkpoint with the best evaluation
OWNED = ("state/**/*", "rank-*.json")  # what `load` would read even if the marker did not list it
WORTH_SAYING = 10.0  # seconds of a check after which its speed is printed


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message names it, the reason, and the checkpoints that remain."""


@dataclass(frozen=True)
class Lineage:
    """Where the checkpoints of a run come from.

    Attributes:
        branch: 1 for the first run in a folder.
        parent: name of the checkpoint from which the branch started; "" for the first branch.
    """

    branch: int = 1
    parent: str = ""


def resolve(resume: str, folder: Path, world: World | None = None) -> Path | None:
    """The checkpoint of `--resume`, see `find`."""
    return find(resume, folder, world)[0]


def find(resume: str, folder: Path, world: World | None = None) -> tuple[Path | None, dict[Path, str]]:
    """The checkpoint of `--resume`: "" = none, "auto" = the newest whole one in `folder` if any, else a path.

    The checksums of the result have been verified. With a `world`, every rank calls it and reads its share.

    Returns:
        (the checkpoint or None, newer damaged checkpoint that "auto" passed over -> reason; it is printed).

    Raises:
        CheckpointError: the named checkpoint is damaged, or "auto" finds checkpoints and none of them is whole.
    """
    damaged: dict[Path, str] = {}
    if not resume:
        return None, damaged
    if resume != "auto":
        named = Path(resume)
        named = named.parent / named.readlink() if named.is_symlink() else named  # checkpoints/best
        verify(named, world)
        return named, damaged
    for path in _candidates(folder):
        try:
            verify(path, world)
        except CheckpointError as error:
            damaged[path] = str(error)
            _say(world, f"passed over: {error}")
        else:
            return path, damaged
    if damaged:
        reasons = "; ".join(damaged.values())
        raise CheckpointError(f"no checkpoint in {folder} is whole: {reasons}. Move the folder away to start anew")
    return None, damaged


def _candidates(folder: Path) -> list[Path]:
    """Folders of checkpoints: damaged markers, the current branch, its parent, then the others, newest first."""
    paths = [p for p in folder.glob("step-*") if NAME.fullmatch(p.name) and p.is_dir()]
    whole = complete(folder)[::-1]
    broken = sorted((p for p in paths if p not in whole), key=_step, reverse=True)
    current = current_branch(folder)
    if current is not None:
        branches = {path: _marker(path).get("branch") for path in whole}
        own = [p for p in whole if branches[p] == current.branch]
        own += [p for p in whole if p.name == current.parent and p not in own]
        whole = own + [p for p in whole if p not in own]
    return broken + whole


def complete(folder: Path) -> list[Path]:
    """Checkpoints in `folder` with a readable marker, in the order of writing."""
    found = []
    for path in folder.glob("step-*"):
        if NAME.fullmatch(path.name) and is_complete(path):
            found.append((int(_marker(path).get("serial", 0)), _step(path), path.name, path))
    return [path for *_, path in sorted(found)]


def is_complete(path: Path) -> bool:
    """True if `path` has a readable marker; see `check` for its files."""
    try:
        checksum.read_marker(path)
    except (Damaged, OSError):
        return False
    return True


def _marker(path: Path) -> dict[str, Any]:
    return checksum.read_marker(path)


def branch_of(path: Path) -> int | None:
    """The branch of a complete checkpoint; None if it is not complete or has none."""
    return _marker(path).get("branch") if is_complete(path) else None


def _step(path: Path) -> int:
    match = NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def check(path: Path) -> dict[str, Any]:
    """The marker of a checkpoint whose files have the listed sizes and to which no foreign file was added.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged; the message has the reason.
    """
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint {path}; --resume takes 'auto' or a folder step-XXXXXX")
    try:
        marker = checksum.read_marker(path)
        checksum.check_sizes(path, marker, OWNED)
    except (Damaged, OSError) as error:
        others = some([p.name for p in complete(path.parent) if p != path])
        raise CheckpointError(f"{error}: the checkpoint is damaged. Complete checkpoints there: {others}") from error
    return marker


def verify(path: Path, world: World | None = None) -> None:
    """Compare every file of a checkpoint with its marker; the ranks share the reading.

    Raises:
        CheckpointError: on every rank, as `check`, or with the name of the file whose checksum is wrong.
    """
    marker: dict[str, Any] = {"files": {}}
    error: CheckpointError | None = None
    try:
        marker = check(path)
    except CheckpointError as caught:
        error = caught
    if _sum(world, torch.tensor([float(error is not None)])).item():
        raise error or CheckpointError(f"{path}: another rank finds it damaged; see its message")
    blocks = checksum.blocks_of(marker)
    if not blocks:
        _say(world, f"{path} has no checksums; only the sizes of its files were compared")
        return
    start = time.perf_counter()
    wrong = torch.zeros(len(blocks))
    share = slice(world.rank, None, world.size) if world is not None else slice(None)
    try:
        found = checksum.checksums(path, [(name, number) for name, number, _ in blocks[share]])
        wrong[share] = torch.tensor([float(a != b[2]) for a, b in zip(found, blocks[share], strict=True)])
    except OSError:  # a disk that cannot read a block
        wrong[share] = 1
    wrong = _sum(world, wrong)
    if wrong.any():
        text = checksum.describe(path, blocks[int(wrong.argmax())])
        raise CheckpointError(f"{text}: the checkpoint is damaged")
    seconds = time.perf_counter() - start
    if seconds > WORTH_SAYING:
        total = sum(entry["size"] for entry in marker["files"].values()) / 1e9
        _say(world, f"checked the {total:.0f} GB of {path} in {seconds:.0f} s")


def prune(folder: Path, keep: int) -> None:
    """Delete all but the last `keep` written checkpoints and the best one, and point the link `best` to it.

    Each marker goes first: a partly deleted checkpoint is incomplete.
    """
    best = point_to_best(folder)
    for path in complete(folder)[:-keep]:
        if path == best:
            continue
        (path / MARKER).unlink()
        shutil.rmtree(path, ignore_errors=True)


def point_to_best(folder: Path) -> Path | None:
    """Make the link `folder/best` point to the best complete checkpoint of any branch; returns it, or None.

    A checkpoint that was written because its evaluation was the best so far has this in the key "best" of train.json:
    {"step", "metric", "better": "lower" or "higher", "value"}. Only those with the metric of the last one are compared.
    """
    found = []
    for path in complete(folder):
        try:
            best = jsonl.loads((path / "train.json").read_text(encoding="utf-8")).get("best") or {}
        except (OSError, ValueError):  # damaged: `find` says so
            continue
        if best.get("step") == _step(path):
            found.append((path, best))
    link = folder / BEST
    if not found:
        link.unlink(missing_ok=True)
        return None
    metric, better = (found[-1][1][key] for key in ("metric", "better"))
    sign = 1 if better == "lower" else -1
    chosen = min((one for one in found if one[1]["metric"] == metric), key=lambda one: sign * one[1]["value"])[0]
    if not link.is_symlink() or link.readlink() != Path(chosen.name):
        new = folder / f".{BEST}"
        new.unlink(missing_ok=True)
        new.symlink_to(chosen.name)
        new.replace(link)
    return chosen


def commit(partial: Path, target: Path, files: dict[str, dict[str, Any]], lineage: Lineage | None) -> None:
    """Mark `partial` as complete, flush it to the disk, and rename it to `target`.

    A complete checkpoint of that name is renamed, an incomplete one is replaced.

    Args:
        files: result of `checksum.measure` for every file.
    """
    present = {str(p.relative_to(partial)) for p in partial.rglob("*") if p.is_file()}
    if present != set(files):
        raise RuntimeError(f"{partial}: the checksums are of other files: {some(sorted(present ^ set(files)))}")
    serial = 1 + max((int(_marker(path).get("serial", 0)) for path in complete(target.parent)), default=0)
    origin = asdict(lineage) if lineage is not None else {}
    checksum.write_marker(partial, files, serial=serial, **origin)
    if is_complete(target):
        target.rename(_free(target, "-{}"))
    atomic.replace(partial, target)


def set_damaged_aside(path: Path) -> Path:
    """Rename a damaged checkpoint to step-XXXXXX.damaged, so that it is not tried and not counted again."""
    new = _free(path, ".damaged") if not path.with_name(f"{path.name}.damaged").exists() else _free(path, ".damaged-{}")
    return path.rename(new)


def _free(path: Path, ending: str) -> Path:
    """The first of path + ending, with the numbers from 1, that does not exist."""
    names = (path.with_name(path.name + ending.format(number)) for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def current_branch(folder: Path) -> Lineage | None:
    """The branch in which the last run of this folder was; None if no run has left the first branch."""
    path = folder / BRANCH
    if not path.is_file():
        return None
    try:
        content = jsonl.loads(path.read_text(encoding="utf-8"))
        return Lineage(int(content["branch"]), str(content["parent"]))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); delete it and name a checkpoint with --resume") from error


def lineage_of(path: Path | None, folder: Path) -> Lineage:
    """The lineage of a run in `folder` that resumes from the checkpoint `path`, which may be in another folder.

    It is the checkpoint's own, or that of a new branch if `folder` has checkpoints that were written later.
    """
    if path is None:
        return Lineage()
    here = complete(folder)
    current = current_branch(folder)
    inside = path.resolve().parent == folder.resolve()
    marker = _marker(path)
    own = Lineage(int(marker.get("branch", 1)), str(marker.get("parent", "")))
    if not inside:
        return Lineage(_last_branch(folder) + 1, str(path)) if here else Lineage(1, str(path))
    if current is not None and path.name == current.parent:  # no checkpoint of that branch has been written
        return current if not any(_marker(p).get("branch") == current.branch for p in here) else _new(path, folder)
    newest = next((p for p in reversed(here) if current is None or _marker(p).get("branch") == current.branch), None)
    return own if newest is not None and newest.samefile(path) else _new(path, folder)


def _new(path: Path, folder: Path) -> Lineage:
    return Lineage(_last_branch(folder) + 1, path.name)


def _last_branch(folder: Path) -> int:
    current = current_branch(folder)
    found = [int(_marker(path).get("branch", 1)) for path in complete(folder)]
    return max([*found, current.branch if current is not None else 1])


def start_branch(folder: Path, path: Path) -> list[str]:
    """Record the lineage of a run in `folder` that resumes from `path`; returns what to say about it."""
    lineage = lineage_of(path, folder)
    before = current_branch(folder) or Lineage()
    if lineage == before:
        return []
    atomic.write_text(folder / BRANCH, json.dumps(asdict(lineage)) + "\n")
    if lineage.branch == 1:
        return []
    left = [p.name for p in complete(folder) if p.name != lineage.parent]
    figures = folder.parent / "metrics.jsonl"
    lines = [f"branch {lineage.branch} of this run starts from {lineage.parent}; of other branches: {some(left)}"]
    if figures.is_file():
        copy = figures.with_name(f"metrics-branch-{before.branch}.jsonl")
        shutil.copy2(figures, copy)
        lines.append(f"the figures of branch {before.branch} stay in {copy.name}")
    return lines


def _sum(world: World | None, values: torch.Tensor) -> torch.Tensor:
    return values if world is None else world.sum(values.to(world.device)).cpu()


def _say(world: World | None, text: str) -> None:
    say: Callable[[str], object] = print if world is None else world.say
    say(text)


def some(names: list[str], limit: int = 8) -> str:
    if not names:
        return "none"
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
