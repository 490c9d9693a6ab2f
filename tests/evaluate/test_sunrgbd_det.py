"""AP@15 against a direct loop written from the COCO definition, and properties of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastvst.evaluate import sunrgbd_det
from fastvst.evaluate.average_precision import (
    DEPTHS,
    THRESHOLDS,
    Question,
    average_precision,
    match,
    pool,
    resampled,
)
from fastvst.evaluate.files import Row
from fastvst.spatial.boxes import format_boxes, iou_3d

INTRINSICS = {"fx": 529.5, "fy": 529.5, "cx": 365.0, "cy": 265.0}


def boxes(count: int, rng: np.random.Generator, depth: tuple[float, float] = (1.5, 6)) -> np.ndarray:
    """(count, 9) boxes in front of the camera; two decimals, angles a multiple of 1.8 degrees (0.01 of 180)."""
    centre = np.stack([rng.uniform(-2, 2, count), rng.uniform(-1, 1, count), rng.uniform(*depth, count)], 1)
    angle = rng.integers(-99, 100, (count, 3)) * 1.8
    return np.concatenate([centre.round(2), rng.uniform(0.2, 2, (count, 3)).round(2), angle], 1)


def questions(seed: int, count: int = 60, **more: tuple[float, float]) -> list[Row]:
    rng = np.random.default_rng(seed)
    return [
        Row(
            f"u{i}",
            "Detect",
            "",
            f"class{i % 4}",
            scene=f"pic{i // 3}",
            fields={"boxes": boxes(int(rng.integers(1, 5)), rng, **more), "height": 530, "intrinsics": INTRINSICS},
        )
        for i in range(count)
    ]


def answers(rows: list[Row], seed: int) -> list[str]:
    """Shifted ground truth, missing and invented boxes, wrong order, some broken answers."""
    rng = np.random.default_rng(seed)
    texts = []
    for row in rows:
        found = row.fields["boxes"].copy()
        found[:, :3] += rng.normal(0, 0.15, (len(found), 3))
        found = np.concatenate([found[rng.random(len(found)) < 0.8], boxes(int(rng.integers(0, 3)), rng)])
        rng.shuffle(found)
        texts.append("no boxes" if rng.random() < 0.1 else format_boxes(found, ["any"] * len(found)))
    return texts


def brute_force(truth: list[np.ndarray], found: list[np.ndarray], threshold: float) -> float:
    """One category: 101-point average precision in plain loops."""
    total = sum(map(len, truth))
    outcome = []
    for gt, dt in zip(truth, found, strict=True):
        used: set[int] = set()
        for box in dt[:100]:
            best = -1
            best_iou = threshold
            for g in range(len(gt)):
                iou = iou_3d(box[None], gt[g : g + 1])[0, 0]
                if g not in used and iou >= best_iou:
                    best = g
                    best_iou = iou
            outcome.append(best >= 0)
            used.add(best)
    precision = []
    recall = []
    hits = 0
    for rank, hit in enumerate(outcome, 1):
        hits += hit
        precision.append(hits / rank)
        recall.append(hits / total)
    values = []
    for r in np.linspace(0, 1, 101):
        reached = [p for p, q in zip(precision, recall, strict=True) if q >= r]
        values.append(max(reached, default=0.0))
    return sum(values) / 101


@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_plain_loops(seed: int) -> None:
    rows = questions(seed)
    texts = answers(rows, seed)
    report = sunrgbd_det.score(rows, texts)
    found = [sunrgbd_det.parse_boxes(t)[0] for t in texts]
    for threshold, score in ((0.15, report.overall), (0.25, report.others[0]), (0.5, report.others[1])):
        per = []
        for name in {row.category for row in rows}:
            chosen = [i for i, row in enumerate(rows) if row.category == name]
            per.append(brute_force([rows[i].fields["boxes"] for i in chosen], [found[i] for i in chosen], threshold))
        assert score.value.mean == pytest.approx(np.mean(per), abs=1e-9)
    assert 0.2 < report.overall.value.mean < 0.95
    assert report.overall.value.low < report.overall.value.mean < report.overall.value.high


def test_perfect_and_empty_predictions() -> None:
    rows = questions(5)
    perfect = sunrgbd_det.score(rows, [format_boxes(r.fields["boxes"], ["x"] * len(r.fields["boxes"])) for r in rows])
    assert {s.name: s.value.mean for s in (perfect.overall, *perfect.others)} == pytest.approx(
        {"AP15": 1, "AP25": 1, "AP50": 1, "AP (mean of IoU 0.05 to 0.50)": 1, "AP near": 1}
    ), "no medium and far: nothing lies there"
    assert all(line.score == 1 for line in perfect.rows)
    assert sunrgbd_det.score(rows, [""] * len(rows)).overall.value.mean == 0
    none = sunrgbd_det.score(rows, [None] * len(rows))
    assert none.overall.value.mean == 0 and len(none.failed) == len(rows)


def test_order_is_part_of_the_data() -> None:
    """All scores are equal, so a wrong box costs more before the right ones than after them."""
    truth = boxes(4, np.random.default_rng(0))
    row = Row("u", "", "", "chair", scene="p", fields={"boxes": truth, "height": 530, "intrinsics": INTRINSICS})
    wrong = truth[:1] + np.array([50.0, 0, 0, 0, 0, 0, 0, 0, 0])
    front = sunrgbd_det.score([row], [format_boxes(np.concatenate([wrong, truth]), ["x"] * 5)])
    behind = sunrgbd_det.score([row], [format_boxes(np.concatenate([truth, wrong]), ["x"] * 5)])
    assert behind.overall.value.mean == pytest.approx(1) and front.overall.value.mean == pytest.approx(0.8)
    rows = questions(7)
    texts = answers(rows, 7)
    back = sunrgbd_det.score(rows[::-1], texts[::-1]).overall.value.mean
    assert back != sunrgbd_det.score(rows, texts).overall.value.mean


def test_angles_are_fractions_of_180_degrees() -> None:
    truth = np.array([[0, 0, 3, 2.0, 0.4, 0.6, 0, 45, 0]])
    row = Row("u", "", "", "sofa", scene="p", fields={"boxes": truth, "height": 530, "intrinsics": INTRINSICS})
    text = '```json\n[\n\t{"bbox_3d":[0,0,3,2.0,0.4,0.6,0,%s,0],"label":"sofa"}\n]\n```'
    assert sunrgbd_det.score([row], [text % 0.25]).others[1].value.mean == pytest.approx(1)
    assert sunrgbd_det.score([row], [text % 45]).others[1].value.mean < 1.0
    assert sunrgbd_det.score(
        [row], ["<think>[]</think>" + text % 0.25], thinking=True
    ).overall.value.mean == pytest.approx(1)


def test_ignored_ground_truth_neither_counts_nor_punishes() -> None:
    truth = np.array(
        [[0, 0, 3, 1, 1, 1, 0, 0, 0], [0, 0, 0.52, 1, 1, 1, 0, 0, 0], [1, 0, 3, 1, 0, 1, 0, 0, 0]], dtype=float
    )
    assert sunrgbd_det.is_ignored(truth, INTRINSICS["fy"], INTRINSICS["cy"], 530).tolist() == [False, True, True]
    row = Row("u", "", "", "box", scene="p", fields={"boxes": truth, "height": 530, "intrinsics": INTRINSICS})
    both = format_boxes(truth[[1, 0]], ["x"] * 2)
    assert sunrgbd_det.score([row], [both]).overall.value.mean == pytest.approx(1), (
        "the box on ignored ground truth is no false positive"
    )


def test_depth_ranges() -> None:
    rows = questions(3, depth=(5, 60))
    rng = np.random.default_rng(0)
    keep = {r.id: r.fields["boxes"][rng.random(len(r.fields["boxes"])) < 0.7] for r in rows}
    report = sunrgbd_det.score(rows, [format_boxes(keep[r.id], ["x"] * len(keep[r.id])) for r in rows])
    found = {s.name: s.value.mean for s in report.others}
    for label in ("near", "medium", "far"):
        low, high = DEPTHS[label]
        per = []
        for name in sorted({r.category for r in rows}):
            inside = [(r.fields["boxes"][:, 2], keep[r.id][:, 2]) for r in rows if r.category == name]
            total = sum(((z >= low) & (z <= high)).sum() for z, _ in inside)
            kept = sum(((z >= low) & (z <= high)).sum() for _, z in inside)
            per += [np.floor(kept / total * 100 + 1e-9 + 1) / 101 if kept else 0.0] if total else []
        assert found[f"AP {label}"] == pytest.approx(np.mean(per), abs=1e-9)  # all found ones are right


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000))
def test_matching_is_greedy_and_one_to_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    iou = rng.integers(0, 12, (int(rng.integers(0, 6)), int(rng.integers(0, 5)))) / 20  # many ties, many at a threshold
    ignored = rng.random(iou.shape[1]) < 0.3
    found = match(Question(iou, np.full(len(iou), 3.0), np.full(iou.shape[1], 3.0), ignored), DEPTHS["all"])
    order = np.argsort(ignored, kind="stable")
    for t, threshold in enumerate(THRESHOLDS):
        used: set[int] = set()
        for d in range(len(iou)):
            best = -1
            best_iou = threshold  # COCO's loop
            for g in order:
                if g in used or (best >= 0 and not ignored[best] and ignored[g]) or iou[d, g] < best_iou:
                    continue
                best = int(g)
                best_iou = iou[d, g]
            assert found.hit[t, d] == (best >= 0) and found.skipped[t, d] == (best >= 0 and ignored[best])
            used |= {best}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
@example(15)  # ten boxes count: 7 / 10 is below the 71st recall by one rounding
def test_a_bootstrap_draw_is_the_average_precision_of_the_questions_drawn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    made = [
        match(
            Question(rng.random((d, 2)) * 0.6, np.full(d, 2.0), np.full(2, 2.0), np.zeros(2, dtype=bool)), DEPTHS["all"]
        )
        for d in rng.integers(0, 4, 6)
    ]
    kept = rng.integers(0, 2, 6)
    left = [m for m, k in zip(made, kept, strict=True) if k]
    whole, part, none = resampled(pool(made), np.stack([np.ones(6, dtype=int), kept, np.zeros(6, dtype=int)]))
    np.testing.assert_allclose(whole, average_precision(pool(made)), rtol=0, atol=1e-6)
    np.testing.assert_allclose(part, average_precision(pool(left)) if left else np.nan, rtol=0, atol=1e-6)
    assert np.isnan(none).all()
    np.testing.assert_allclose(resampled(pool(made), np.full((1, 6), 2))[0], whole, rtol=0, atol=1e-6)


def files(folder: Path) -> list[dict]:
    cells = [
        {
            "uid": f"u{i}",
            "image_path": f"images/{i}.jpg",
            "width": 730,
            "height": 530,
            "category": "bed",
            "camera_intrinsics": INTRINSICS,
            "answer": boxes(2, np.random.default_rng(i)).tolist(),
        }
        for i in range(3)
    ]
    (folder / "sunrgbd_total3d_val_metaqa.json").write_text(json.dumps(cells))
    prompts = [{"id": c["uid"], "image_path": c["image_path"], "question": f"stored prompt {c['uid']}"} for c in cells]
    (folder / "sunrgbd_val_total3d-prompt_v4_norm.json").write_text(json.dumps(prompts))
    return cells


def test_files_as_published(tmp_path: Path) -> None:
    cells = files(tmp_path)
    rows = sunrgbd_det.load(tmp_path)
    sample = sunrgbd_det.prompt(rows[1])
    assert sample.kind == "bbox_3d" and sample.parts("text")[0]["text"] == "stored prompt u1"
    assert sample.parts("image")[0]["image"] == tmp_path / "images" / "1.jpg"
    alone = sunrgbd_det.load(tmp_path / "sunrgbd_total3d_val_metaqa.json")
    assert "f_x=529.5" in alone[0].question and alone[0].question.endswith("Detect the 3D bounding boxes of bed")
    with pytest.raises(FileNotFoundError, match="vst_3d_grounding_benchmark"):
        sunrgbd_det.load(tmp_path / "images")
    del cells[0]["category"]
    (tmp_path / "sunrgbd_total3d_val_metaqa.json").write_text(json.dumps(cells))
    with pytest.raises(ValueError, match="lacks the column category"):
        sunrgbd_det.load(tmp_path)
