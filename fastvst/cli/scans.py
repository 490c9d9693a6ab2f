"""`fastvst scans`: questions about other people's scans, as VST parquet."""

from __future__ import annotations

import argparse

# The names in fastvst.generate.scans. Importing that module loads pyarrow and all tasks; `fastvst --help` should not.
FORMATS = (
    "scannet",
    "scannetpp",
    "scannetpp_dslr",
    "arkitscenes",
    "hypersim",
    "nerfstudio",
    "posed",
    "omni3d",
    "depth",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("format", choices=FORMATS, help="how the scans are stored; see docs/scans.md")
    parser.add_argument("folder", help="one scan, or a folder with scans (Omni3D: the JSON file)")
    parser.add_argument("--out", required=True, help="rows.parquet for one file, or a folder for one file a scan")
    parser.add_argument(
        "--tasks", default="", help="names with commas between them (default: all that the format allows)"
    )
    parser.add_argument("--tries", type=float, default=2.0, help="attempts of a task for each image, pair or video")
    parser.add_argument("--workers", type=int, default=2, help="processes, 0 to read in this one (default: 2)")
    parser.add_argument("--frames", type=int, default=20, help="frames of a scan's video (default: 20)")
    parser.add_argument("--stills", type=int, default=4, help="frames for questions about one image (default: 4)")
    parser.add_argument("--width", type=int, default=640, help="longer side of the images, pixels (default: 640)")
    parser.add_argument("--seed", type=int, default=0, help="decides marks and pairs (default: 0)")
    parser.add_argument("--image-folder", help="Omni3D: folder that the file paths are relative to")
    parser.add_argument("--exclude", help="Omni3D: text file with ids or paths of images to leave out, one a line")
    parser.add_argument("--label-map", help="ScanNet: scannetv2-labels.combined.tsv (default: the annotators' labels)")
    parser.add_argument(
        "--depth",
        choices=["metric", "relative", "inverse"],
        default="metric",
        help="depth: what larger numbers mean: metres, farther, or nearer (default: metric)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the rows and print how many of each task there are."""
    from pathlib import Path

    from fastvst.generate.scans import ScansConfig, make_scan_rows
    from fastvst.scenes.adapters.frames import ScanOptions

    excluded = Path(arguments.exclude).read_text(encoding="utf-8").split("\n") if arguments.exclude else []
    config = ScansConfig(
        arguments.format,
        tuple(name for name in arguments.tasks.split(",") if name),
        arguments.tries,
        ScanOptions(arguments.frames, arguments.stills, width=arguments.width, seed=arguments.seed),
        arguments.image_folder,
        tuple(line.strip() for line in excluded if line.strip()),
        arguments.label_map,
        arguments.depth,
    )
    counts = make_scan_rows(arguments.folder, arguments.out, config, workers=arguments.workers)
    problems = counts.pop("problems", 0)
    scans = counts.pop("scans", 0)
    for task, number in sorted(counts.items()):
        print(f"{task:<22}{number:>8}")
    print(f"{scans} scans, {sum(counts.values())} new rows in {arguments.out}")
    if problems:
        print(f"{problems} problems, listed in {arguments.out}.problems.jsonl")
    print(f"look at them: fastvst data check {arguments.out} --out DIR")
    return 0
