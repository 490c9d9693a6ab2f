"""Rows of scenes that are read instead of rendered, as VST parquet: other people's scans, in the formats of FORMATS."""

from __future__ import annotations

import concurrent.futures
import functools
import json
import multiprocessing
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

import pyarrow.parquet as pq

from fastvst import atomic
from fastvst.generate.parquet import SCHEMA, Encoded, to_row, write_rows
from fastvst.generate.rooms import GENERATOR_VERSION, ROWS_PER_FILE, RoomsConfig, scene_samples
from fastvst.processes import helper_result, start_helper
from fastvst.scenes.adapters.arkitscenes import read_arkitscenes
from fastvst.scenes.adapters.checks import Report
from fastvst.scenes.adapters.colmap import read_nerfstudio, read_scannetpp
from fastvst.scenes.adapters.depth_maps import Meaning, read_depth_maps
from fastvst.scenes.adapters.frames import ScanOptions
from fastvst.scenes.adapters.hypersim import read_hypersim
from fastvst.scenes.adapters.images import LateImageError
from fastvst.scenes.adapters.omni3d import read_omni3d
from fastvst.scenes.adapters.posed import read_posed
from fastvst.scenes.adapters.scannet import read_scannet
from fastvst.scenes.adapters.scannetpp_dslr import read_scannetpp_dslr
from fastvst.scenes.scene import Scene
from fastvst.tasks import PAIRS, SINGLE, WALKS, TaskConfig

ALL = (*SINGLE, *PAIRS, *WALKS)
PHOTOGRAPHS = (*SINGLE, *(task for task in PAIRS if task != "camera_motion"))
# Format -> tasks that its data allow. Hypersim and the DSLR camera of ScanNet++ have images of a room, but no video and
# no small motions. Omni3D has single images. A depth map alone has no objects.
FORMATS: dict[str, tuple[str, ...]] = {
    "scannet": ALL,
    "scannetpp": ALL,
    "scannetpp_dslr": PHOTOGRAPHS,
    "arkitscenes": ALL,
    "nerfstudio": ALL,
    "posed": ALL,
    "hypersim": PHOTOGRAPHS,
    "omni3d": tuple(SINGLE),
    "depth": ("depth_comparison",),
}
RELATIVE = TaskConfig(depth_gap=0.0, depth_ratio=0.1)  # depth without a unit: only a gap of 10 % counts


@dataclass(frozen=True)
class ScansConfig:
    """What is read and asked.

    Attributes:
        format: one of FORMATS.
        tasks: names of tasks; empty is every task that the format allows.
        tries: attempts of a task for each still, pair of views or video. Doubtful attempts give no row.
        scan: what is taken from a scan.
        image_folder: Omni3D: folder that the file paths are relative to; None is the folder of the JSON file.
        exclude: Omni3D: ids or file paths of images to leave out, such as a test split.
        label_map: ScanNet: scannetv2-labels.combined.tsv.
        depth: "depth": what the numbers of a depth map mean.
        quality: JPEG quality, or 0 for PNG.
    """

    format: str
    tasks: tuple[str, ...] = ()
    tries: float = 2.0
    scan: ScanOptions = field(default_factory=ScanOptions)
    image_folder: str | None = None
    exclude: tuple[str, ...] = ()
    label_map: str | None = None
    depth: Meaning = "metric"
    quality: int = 95

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"scans: format {self.format!r}; expected one of {sorted(FORMATS)}")
        refused = [task for task in self.tasks if task not in FORMATS[self.format]]
        if refused:
            raise ValueError(f"scans: {self.format} does not allow {refused}; it allows {list(FORMATS[self.format])}")

    @property
    def rows(self) -> RoomsConfig:
        """The questions to ask about every scene."""
        tasks = TaskConfig() if self.format != "depth" or self.depth == "metric" else RELATIVE
        rows = dict.fromkeys(self.tasks or FORMATS[self.format], self.tries)
        return RoomsConfig(rows=rows, tasks=tasks, quality=self.quality)


def scan_folders(format: str, folder: str | Path) -> list[Path]:
    """The scans of this format in a folder, at most two levels below it, sorted; for Omni3D its JSON files.

    Raises:
        FileNotFoundError: none; names what was looked for.
    """
    folder = Path(folder)
    if format == "omni3d":
        found = [folder] if folder.is_file() else sorted(folder.glob("*.json"))
        looked_for = "JSON files"
    elif format == "depth":
        found = [folder] if (folder / "images").is_dir() else []
        looked_for = "images/ and depth/"
    else:
        marks, looked_for = _MARKS[format]
        places = [folder, *sorted(folder.glob("*/")), *sorted(folder.glob("*/*/"))]
        found = [place for place in places if place.is_dir() and marks(place)]
    if not found:
        raise FileNotFoundError(f"{folder}: no {format} scan: {looked_for} in it or in its folders")
    return found


_MARKS: dict[str, tuple[Callable[[Path], bool], str]] = {
    "scannet": (lambda p: (p / f"{p.name}.txt").is_file(), "sceneXXXX_XX/sceneXXXX_XX.txt"),
    "scannetpp": (lambda p: (p / "iphone").is_dir() and (p / "scans").is_dir(), "iphone/ and scans/"),
    "scannetpp_dslr": (lambda p: (p / "dslr").is_dir() and (p / "scans").is_dir(), "dslr/ and scans/"),
    "arkitscenes": (lambda p: (p / f"{p.name}_3dod_annotation.json").is_file(), "<video>_3dod_annotation.json"),
    "hypersim": (lambda p: (p / "_detail").is_dir(), "_detail/"),
    "nerfstudio": (
        lambda p: (p / "boxes.json").is_file() and ((p / "transforms.json").is_file() or (p / "sparse").is_dir()),
        "boxes.json beside transforms.json or sparse/0/",
    ),
    "posed": (lambda p: (p / "boxes.json").is_file() and (p / "pose").is_dir(), "boxes.json and pose/"),
}


def read_scenes(path: Path, config: ScansConfig, report: Report) -> Iterator[Scene]:
    """The scenes of one scan (or of one Omni3D file, or of one folder of depth maps)."""
    options = config.scan
    source = options.source or config.format
    if config.format == "omni3d":
        images = config.image_folder or path.parent
        yield from read_omni3d(path, images, source=source, exclude=config.exclude, report=report)
    elif config.format == "depth":
        yield from read_depth_maps(path, meaning=config.depth, source=source, seed=options.seed, report=report)
    elif config.format == "hypersim":
        for camera in sorted(p.name for p in (path / "_detail").glob("cam_*")):
            yield read_hypersim(path, options, camera=camera, report=report)
    elif config.format == "scannet":
        yield read_scannet(path, options, label_map=config.label_map, report=report)
    elif config.format == "posed":
        counts = {name: getattr(options, name) for name in ("frames", "stills", "pairs", "motions", "fps", "seed")}
        yield read_posed(path, source=source, report=report, **counts)
    else:
        readers = {"scannetpp": read_scannetpp, "arkitscenes": read_arkitscenes, "nerfstudio": read_nerfstudio}
        readers["scannetpp_dslr"] = read_scannetpp_dslr
        yield readers[config.format](path, options, report=report)


def scan_rows(scenes: Iterable[Scene], config: RoomsConfig, counts: Counter | None = None) -> Iterator[dict[str, Any]]:
    """The rows that `config` makes of every scene. The random stream of a scene depends only on its name.

    counts: incremented for every row under its task.
    """
    for scene in scenes:
        encoded: Encoded = {}
        for sample in scene_samples(scene, zlib.crc32(scene.name.encode()), config):
            if counts is not None:
                counts[sample.metadata["task"]] += 1
            yield to_row(sample, config.quality, encoded)


def write_scenes(scenes: Iterable[Scene], out_dir: str | Path, config: RoomsConfig, *, prefix: str = "scenes") -> int:
    """Write the rows that `config` makes of every scene as <prefix>-00000.parquet, ..., 500 a file.

    The rows of a scene do not depend on the other scenes. On several machines give each machine its own scenes and its
    own prefix.

    Returns:
        The number of rows.
    """
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    count = 0
    for row in scan_rows(scenes, config):
        rows.append(row)
        if len(rows) == ROWS_PER_FILE:
            write_rows(folder / f"{prefix}-{count // ROWS_PER_FILE:05d}.parquet", rows)
            count += len(rows)
            rows = []
    if rows:
        write_rows(folder / f"{prefix}-{count // ROWS_PER_FILE:05d}.parquet", rows)
    return count + len(rows)


def make_scan_rows(
    folder: str | Path,
    out: str | Path,
    config: ScansConfig,
    *,
    workers: int = 2,
    progress: TextIO | None = sys.stderr,
) -> Counter:
    """Read all scans of a folder and write their rows.

    `out` that ends in .parquet is one file; else it is a folder with one file a scan. A repeated call reads only the
    scans that have no rows yet; a finished file is found again. What was left out is listed in <out>.problems.jsonl,
    the options are in <out>.settings.json.

    Args:
        workers: processes; 0 reads in this process. The rows do not depend on it.
        progress: stream for the progress lines; None prints nothing.

    Returns:
        Rows by task, "scans" read, and "problems".

    Raises:
        FileNotFoundError: no scan of this format.
        ValueError: no scan gave a row; the message holds the first problem. Or `out` has rows of other options.
    """
    out = Path(out)
    scans = scan_folders(config.format, folder)
    settings = _settle(out, config)
    if out.is_file() and settings.get("scans") == [str(scan) for scan in scans]:
        return Counter(scans=len(scans))
    parts = out if out.suffix != ".parquet" else out.with_name(f".{out.name}.parts")
    parts.mkdir(parents=True, exist_ok=True)
    names = _part_names(scans)
    total: Counter = Counter()
    problems: list[dict[str, str]] = []
    todo = [scan for scan in scans if not (parts / names[scan]).is_file()]
    total["scans"] = len(scans) - len(todo)
    start = time.monotonic()
    for done, (scan, counts, found) in enumerate(_work(todo, names, parts, config, workers), 1):
        total += counts
        problems += [{"scan": str(scan), "problem": text} for text in found]
        if progress is not None:
            left = (time.monotonic() - start) / done * (len(todo) - done)
            rows = sum(counts.values())
            print(f"{scan.name}: {rows} rows, {done}/{len(todo)} scans, {left:.0f} s left", file=progress, flush=True)
    total["scans"] += len(todo)
    total["problems"] = len(problems)
    listed = "".join(json.dumps(entry) + "\n" for entry in problems)
    atomic.write_text(out.with_name(f"{out.name}.problems.jsonl"), listed)
    files = sorted(parts.glob("*.parquet"))
    if not any(pq.read_metadata(file).num_rows for file in files):
        first = problems[0]["problem"] if problems else "every question would have been doubtful"
        raise ValueError(f"{folder}: {len(scans)} scans, no row: {first}")
    if parts != out:
        _join(files, out)
        atomic.write_text(
            _settings_file(out), json.dumps({**settings, "scans": [str(scan) for scan in scans]}, indent=1)
        )
    return total


def _settings_file(out: Path) -> Path:
    return out.with_name(f"{out.name}.settings.json")


def _settle(out: Path, config: ScansConfig) -> dict[str, Any]:
    """The options of the rows in `out`, kept in a file of its own; ValueError if it has rows of other ones."""
    path = _settings_file(out)
    options = json.loads(json.dumps({"version": GENERATOR_VERSION, **asdict(config)}))
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() and out.exists() else {}
    differing = [
        f"{name}: {before.get(name)!r}, now {options[name]!r}" for name in options if before.get(name) != options[name]
    ]
    if before and differing:
        raise ValueError(
            f"{out} has rows of other options ({'; '.join(differing)}); choose another --out, or remove it"
        )
    if not before:
        out.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(path, json.dumps(options, indent=1))
    return before or options


def _part_names(scans: list[Path]) -> dict[Path, str]:
    """A file name for each scan; scans of one name get the names of their parents, too."""
    count = Counter(scan.stem for scan in scans)
    return {s: f"{s.stem if count[s.stem] == 1 else f'{s.parent.name}-{s.stem}'}.parquet" for s in scans}


def _work(
    scans: list[Path], names: dict[Path, str], parts: Path, config: ScansConfig, workers: int
) -> Iterator[tuple[Path, Counter, list[str]]]:
    task = functools.partial(_one_scan, config=config)
    if workers == 0 or len(scans) < 2:
        yield from (task(scan, parts / names[scan]) for scan in scans)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(workers, len(scans)), context, start_helper) as pool:
        waiting = [pool.submit(task, scan, parts / names[scan]) for scan in scans]
        for future in concurrent.futures.as_completed(waiting):
            yield helper_result(future, "scans")


def _one_scan(scan: Path, target: Path, config: ScansConfig) -> tuple[Path, Counter, list[str]]:
    """Write the rows of one scan; whatever is wrong with its files is a problem of this scan alone."""
    problems: list[str] = []
    counts: Counter = Counter()
    try:
        try:
            rows = list(scan_rows(read_scenes(scan, config, problems.append), config.rows, counts))
        except LateImageError:  # the scan is read again so that this frame is left out, and named, like any other
            problems.clear()
            counts.clear()
            whole = replace(config, scan=replace(config.scan, decode=True))
            rows = list(scan_rows(read_scenes(scan, whole, problems.append), config.rows, counts))
    except ImportError:
        raise
    except Exception as error:  # files of strangers: a damaged one may raise anything in the libraries that read it
        problems.append(f"{scan}: {error if str(error) else repr(error)}; the scan is left out")
        return scan, Counter(), problems
    write_rows(target, rows)
    return scan, counts, problems


def _join(files: list[Path], out: Path) -> None:
    """One file with the row groups of all parts; the parts are removed."""
    with atomic.file(out) as partial, pq.ParquetWriter(partial, SCHEMA, compression="none") as writer:
        for file in files:
            for group in range(pq.ParquetFile(file).num_row_groups):
                writer.write_table(pq.ParquetFile(file).read_row_group(group))
    for file in files:
        file.unlink()
    files[0].parent.rmdir()
