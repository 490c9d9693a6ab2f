"""`fastvst rooms make`: rendered rooms as VST parquet."""

from __future__ import annotations

import argparse
import dataclasses

# The names in fastvst.generate.presets. Importing that module loads pyarrow and all tasks; `fastvst --help` should not.
PRESETS = ("default", "learnable", "heldout", "all", "vst_p", "vst_p_rest", "cold_start", "base", "general")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", nargs="?", choices=["make"], default="make", help="make: write rows (the default)")
    parser.add_argument(
        "--out",
        required=True,
        help="parent folder; the rows go into a folder named after the options, 500 rows a file. A repeated command "
        "finds finished rows and resumes unfinished work",
    )
    parser.add_argument("--samples", type=int, default=2000, help="number of rows (default: 2000)")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="decides the rooms and everything in them; different seeds have no room in common (default: 0)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=2,
        help="rendering processes, 0 to render in this one; the bytes do not depend on it (default: 2)",
    )
    parser.add_argument(
        "--split",
        choices=["train", "heldout", "base", "general"],
        default="train",
        help="training or held-out rooms, those of the base model, or those of the benchmark general; no two of them "
        "have a room in common (default: train)",
    )
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="default",
        help="default: the six tasks of examples/sft.py; learnable: as many rows of each as a small reader needs; "
        "all: all nineteen tasks; vst_p: all nineteen in VST-P's "
        "proportions; vst_p_rest: the four of them that the published data lack; cold_start: rows with reasoning, and "
        "a sixth without; base: conversations about images, none of the nineteen tasks; general: single questions of "
        "the same kinds (default: default)",
    )
    parser.add_argument(
        "--videos",
        choices=["frames", "mp4"],
        default="frames",
        help="frames: store every frame of a video as an image; mp4: store one file, as VST's own rows do (lossy; "
        "needs the extra [video]) (default: frames)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Make the rows, or find them, and print their folder."""
    from fastvst.generate.presets import PRESETS as presets
    from fastvst.generate.rooms import make_rooms  # only this command needs a renderer

    config = dataclasses.replace(presets[arguments.preset], videos=None if arguments.videos == "frames" else "mp4")
    folder = make_rooms(
        arguments.out, arguments.samples, arguments.seed, arguments.workers, config, split=arguments.split
    )
    print(folder)
