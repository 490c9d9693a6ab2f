"""`fastvst rooms make`: rendered rooms as VST parquet."""

from __future__ import annotations

import argparse
import dataclasses

PRESETS = (
    "default",
    "all",
    "vst_p",
    "vst_p_rest",
    "cold_start",
)  # rooms/presets.py, which takes a renderer's imports to read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", nargs="?", choices=["make"], default="make")
    parser.add_argument(
        "--out", required=True, help="folder for the parquet files, 500 rows each; unfinished work goes on"
    )
    parser.add_argument("--samples", type=int, default=2000, help="number of rows (default 2000)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes (default 0)")
    parser.add_argument("--workers", type=int, default=2, help="rendering processes; the bytes do not depend on it")
    parser.add_argument(
        "--split", choices=["train", "heldout"], default="train", help="rooms of one are never in the other"
    )
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="default",
        help="default: the six tasks of examples/sft.py; all: nineteen tasks; vst_p: VST-P's proportions; vst_p_rest: "
        "those of its tasks that are not public; cold_start: reasoned rows with a replay share",
    )
    parser.add_argument(
        "--videos",
        choices=["frames", "mp4"],
        default="frames",
        help="a video's frames as pictures, or one file as in VST's own rows (lossy; needs the extra [video])",
    )


def run(arguments: argparse.Namespace) -> None:
    """Make the rows (or find them made) and print the folder."""
    from fastvst.generate.presets import PRESETS as known
    from fastvst.generate.rooms import make_rooms  # a renderer is imported only where one is asked for

    config = dataclasses.replace(known[arguments.preset], videos=None if arguments.videos == "frames" else "mp4")
    folder = make_rooms(
        arguments.out,
        arguments.samples,
        arguments.seed,
        arguments.workers,
        config,
        split=arguments.split,
    )
    print(folder)
