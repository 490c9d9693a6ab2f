"""Scoring and reading on one core. Goals: 5,000 predictions in under 2 s, a TSV of 1,000 questions in under 5 s."""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bench.table import Result
from fastvst.evaluate import cv_bench, mmsi_bench, mmstar, sunrgbd_det, vsi_bench
from fastvst.evaluate.files import Row
from fastvst.spatial.boxes import format_boxes, iou_3d

OPTIONS = {"A": "a red chair", "B": "the table", "C": "3.5", "D": "left and forward"}
ANSWERS = ("A", "(B)", "C. 3.5", "the table", "The answer is D.", "3.5", "about 3", "4 chairs", "", "word " * 400)


def rows(kind: Callable[[int], str], **fields: Callable[[int], str]) -> list[Row]:
    return [
        Row(
            str(i),
            "?",
            "ABCD"[i % 4],
            kind(i),
            options=OPTIONS,
            scene=f"s{i % 288}",
            fields={k: f(i) for k, f in fields.items()},
        )
        for i in range(5000)
    ]


def best(function: Callable[[], object], rounds: int = 3) -> float:
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def test_score_5000(record: Callable[..., None]) -> None:
    texts = [ANSWERS[i % len(ANSWERS)] for i in range(5000)]
    kinds = vsi_bench.CHOICES + vsi_bench.NUMBERS
    vsi = [
        Row(str(i), "?", "3.5" if kinds[i % 10] in vsi_bench.NUMBERS else "A", kinds[i % 10], scene=f"s{i % 288}")
        for i in range(5000)
    ]
    cv = rows(
        lambda i: "Count", type=lambda i: "2D" if i % 2 else "3D", source=lambda i: "COCO" if i % 4 == 1 else "ADE20K"
    )
    mmsi = rows(lambda i: f"category {i % 11}")
    seconds = {
        "vsi_original": best(lambda: vsi_bench.score(vsi, texts)),
        "vsi_easi": best(lambda: vsi_bench.score(vsi, texts, extraction="easi")),
        "mmsi": best(lambda: mmsi_bench.score(mmsi, texts)),
        "cv_bench": best(lambda: cv_bench.score(cv, texts)),
    }
    found = [Result("s", s, less=True, goal=2.0, what=name) for name, s in seconds.items()]
    record("score 5000 predictions", *found, **{f"{name}_s": s for name, s in seconds.items()}, goal_s=2.0)


def test_exact_iou(record: Callable[..., None]) -> None:
    """Overlapping pairs of boxes, the costly case; 9 degrees of freedom, float64, exact."""
    rng = np.random.default_rng(0)
    first = np.concatenate(
        [rng.normal(0, 0.2, (150, 3)), rng.uniform(0.5, 2, (150, 3)), rng.uniform(-180, 180, (150, 3))], 1
    )
    second = np.concatenate(
        [rng.normal(0, 0.2, (150, 3)), rng.uniform(0.5, 2, (150, 3)), rng.uniform(-180, 180, (150, 3))], 1
    )
    assert (np.asarray(iou_3d(first, second)) > 0).mean() > 0.99
    rate = 22_500 / best(lambda: iou_3d(first, second))
    row = Result("pairs/s", rate, goal=20_000)
    record("exact IoU of 22500 overlapping pairs", row, pairs_per_s=rate, goal=20_000)


def test_score_5000_detection_questions(record: Callable[..., None]) -> None:
    rng = np.random.default_rng(0)
    asked = []
    texts = []
    for i in range(5000):
        count = int(rng.integers(1, 4))
        boxes = np.concatenate(
            [rng.uniform([-2, -1, 2], [2, 1, 6], (count, 3)), rng.uniform(0.3, 2, (count, 3)), np.zeros((count, 3))], 1
        )
        intrinsics = {"fx": 529.5, "fy": 529.5, "cx": 365.0, "cy": 265.0}
        fields = {"boxes": boxes, "height": 530, "intrinsics": intrinsics}
        asked.append(Row(str(i), "?", "", f"class {i % 33}", scene=f"p{i // 2}", fields=fields))
        texts.append(format_boxes(boxes + rng.normal(0, 0.1, boxes.shape) * [1, 1, 1, 0, 0, 0, 0, 0, 0], ["x"] * count))
    seconds = best(lambda: sunrgbd_det.score(asked, texts), 1)
    record(
        "score 5000 detection questions",
        Result("s", seconds, less=True, goal=2.0),
        seconds=seconds,
        boxes=sum(len(r.fields["boxes"]) for r in asked),
    )


@pytest.mark.parametrize("kilobytes", [60, pytest.param(300, marks=pytest.mark.full)])
def test_read_tsv(record: Callable[..., None], tmp_path: Path, kilobytes: int) -> None:
    image = base64.b64encode(os.urandom(kilobytes * 1000)).decode("ascii")
    head = "index\tquestion\tA\tB\tanswer\tcategory\timage\n"
    path = tmp_path / "MMStar.tsv"
    with open(path, "w", encoding="utf-8") as file:
        file.write(head)
        file.writelines(f'{i}\t"Which one,\nof two?"\tleft\tright\tA\tx\t{i:04d}{image}\n' for i in range(1000))
    seconds = best(lambda: mmstar.load(path))
    record(
        f"read a TSV of 1000 questions with {kilobytes} kB images",
        Result("s", seconds, less=True, goal=5.0),
        seconds=seconds,
        file_MB=path.stat().st_size / 1e6,
        goal_s=5.0,
    )
