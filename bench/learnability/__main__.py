"""How many questions of each task a small reader needs: learning curves of nineteen tasks, and a page of charts.

    python -m bench.learnability --out bench/results/cpu      # learnability.json and learnability.html
    python -m bench.learnability --tower other.safetensors    # with another tower's tokens

Renders the questions once (about ten minutes on 2 cores) and keeps them in --cache. The rooms are of their own: no
preset trains on them. A quarter of the rooms is the test.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.learnability import page, readers
from bench.learnability.questions import SEED, read, render
from fastvst import atomic
from fastvst.generate.rooms import GENERATOR_VERSION, cache_root
from fastvst.model.qwen25vl import TINY_TOWER
from fastvst.tasks import VST_P

Question = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu"), help="folder of the results")
    parser.add_argument("--cache", type=Path, default=cache_root(), help="folder of the rendered questions")
    parser.add_argument("--tower", type=Path, default=TINY_TOWER, help="file of tools/build_tower.py")
    parser.add_argument("--rooms", type=int, default=450, help="rooms with stills and pairs")
    parser.add_argument("--videos", type=int, default=200, help="rooms with a video")
    parser.add_argument("--most", type=int, default=2400, help="questions of one task")
    parser.add_argument("--workers", type=int, default=2, help="processes that render, threads that read")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    questions, batches = read(render(options.cache, options.rooms, options.videos, options.workers), options.most)
    begin = time.monotonic()
    reading = readers.read_tokens(options.tower, batches, options.workers)
    print(
        f"{len(questions)} questions, {len(reading.tokens)} images read in {time.monotonic() - begin:.0f} s", flush=True
    )
    lookup = readers.Lookup(reading)
    results = {}
    for task in VST_P:
        results[task] = learn([q for q in questions if q["task"] == task], lookup)
        print(f"{task:22}", page.line(results[task]), flush=True)
    made_with = {
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip(),
        "seed": SEED,
        "rooms": options.rooms,
        "video_rooms": options.videos,
        "most": options.most,
        "generator_version": GENERATOR_VERSION,
        "tower": options.tower.name,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"made_with": made_with, "marks": marks(questions, lookup), "tasks": results}, indent=1)
    atomic.write_text(options.out / "learnability.json", text + "\n")
    atomic.write_text(options.out / "learnability.html", page.write(json.loads(text)))
    print(page.markdown(json.loads(text)), f"wrote {options.out / 'learnability.html'}", sep="\n\n")


def learn(questions: list[Question], lookup: readers.Lookup) -> dict[str, Any]:
    """Baselines and curves of one task."""
    train, test = readers.split(questions)
    names = {name: k for k, name in enumerate(sorted({n for q in questions for n in q["names"]}))}
    held = [questions[k] for k in test]
    answer = readers.constant([questions[k] for k in train])
    found: dict[str, Any] = {
        "kind": questions[0]["kind"],
        "train": len(train),
        "test": len(test),
        "constant": float(np.mean([readers.right(q, answer) for q in held])),
        "exact": float(np.mean([q["exact"] for q in questions])),
    }
    for reader, features in (
        ("cues", [readers.cue_features(q, names) for q in questions]),
        ("tokens", [readers.token_features(q, names, lookup) for q in questions]),
    ):
        parts = [([questions[k] for k in part], [features[k] for k in part]) for part in (train, test)]
        found[reader] = readers.curve(*parts)
    return found


def marks(questions: list[Question], lookup: readers.Lookup) -> dict[str, float]:
    """What the stored directions of the tower read, with nothing learned, over all questions.

    Returns:
        dots, rings, boxes: share of those named whose token has the largest component of their colour. A dot or a ring
            has one token, a box has the tokens of its outline.
        nearer point: share of the depth questions whose nearer dot has the smaller depth.
        motion: share of the questions about a camera's motion with the right word.
    """
    found: dict[str, list[bool]] = {"dots": [], "rings": [], "boxes": [], "nearer point": [], "motion": []}
    for q in questions:
        if q["task"] == "depth_comparison":
            depths = [lookup.depth(q["images"][look[0]], *look[1:]) for look in q["look"]]
            found["nearer point"].append(int(np.argmin(depths)) == q["label"])
        if q["task"] == "camera_motion":
            found["motion"].append(lookup.motion(*q["images"]) == q["label"])
        kind = {"depth_comparison": "dots", "correspondence": "rings", "distance": "boxes"}.get(q["task"])
        for look, tokens in zip(q["look"], q.get("tokens", []), strict=False):
            if kind is not None:
                found[kind].append(lookup.place(q["images"][look[0]], *look[1:]) in tokens)
    return {kind: float(np.mean(values)) for kind, values in found.items()}


if __name__ == "__main__":
    main()
