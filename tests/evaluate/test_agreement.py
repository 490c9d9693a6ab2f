"""The same predictions through our scorers and through lmms-eval, VLMEvalKit and pycocotools, where they are installed.

`pip install lmms-eval` and `pip install ms-vlmeval`, each into an environment of its own (they disagree on versions).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import ugly
from fastvst.evaluate import (
    blink,
    choice,
    cv_bench,
    easi,
    mindcube,
    mmbench,
    mmmu,
    mmsi_bench,
    sunrgbd_det,
    viewspatial,
    vsi_bench,
)
from fastvst.evaluate.average_precision import DEPTHS, RECALLS, THRESHOLDS
from fastvst.evaluate.files import Row
from fastvst.spatial.boxes import format_boxes
from peers import peer

pytestmark = pytest.mark.slow
COUNT = 2000
OPTIONS = ugly.OPTIONS
LMMS = "lmms-eval"
VLMEVAL = "ms-vlmeval"


def letters(categories: Sequence[str] = ("x", "y"), **fields: Any) -> list[Row]:
    return [
        Row(
            str(i),
            f"q{i}",
            "ABCD"[i % 4],
            categories[i % len(categories)],
            options=dict(OPTIONS),
            fields={k: v(i) for k, v in fields.items()},
        )
        for i in range(COUNT)
    ]


def vsi() -> tuple[list[Row], list[str]]:
    kinds = vsi_bench.CHOICES + vsi_bench.NUMBERS
    rng = np.random.default_rng(0)
    rows = []
    texts = []
    for i, (text, number) in enumerate(zip(ugly.choices(COUNT), ugly.numbers(COUNT), strict=True)):
        kind = kinds[i % 10]
        truth = str(round(float(rng.uniform(0.5, 9)), 1)) if kind in vsi_bench.NUMBERS else "ABCD"[i % 4]
        rows.append(Row(str(i), "?", truth, kind))
        texts.append(number if kind in vsi_bench.NUMBERS else text)
    return rows, texts


def scores(report: Any) -> list[float]:
    return [line.score for line in report.rows]


def test_vsi_bench_with_lmms_eval() -> None:
    theirs = peer("lmms_eval.tasks.vsibench.utils", LMMS)
    rows, texts = vsi()
    docs = [
        theirs.vsibench_process_results({"question_type": r.category, "ground_truth": r.answer}, [t])[
            "vsibench_overall"
        ]
        for r, t in zip(rows, texts, strict=True)
    ]
    expected = [doc.get("accuracy", doc.get("MRA:.5:.95:.05")) for doc in docs]
    ours = vsi_bench.score(rows, texts, extraction="lmms_eval")
    assert scores(ours) == expected
    assert ours.overall.value.mean == pytest.approx(theirs.vsibench_aggregate_overall(docs), abs=1e-6)  # they round
    original = vsi_bench.score(rows, texts)
    differing = [r for r, a, b in zip(rows, scores(original), expected, strict=True) if a != b]
    assert differing and all(r.category in vsi_bench.NUMBERS for r in differing), (
        "only their reading of numbers differs"
    )


def test_vsi_bench_with_vlmevalkit() -> None:
    theirs = peer("vlmeval.dataset.utils.spatial_bench.cal_scores", VLMEVAL)
    import pandas

    rows, texts = vsi()
    table = pandas.DataFrame(
        {"prediction": texts, "answer": [r.answer for r in rows], "kind": [r.category for r in rows]}
    )
    chosen = table["kind"].isin(vsi_bench.CHOICES)
    expected = np.zeros(COUNT)
    expected[chosen] = theirs.compute_mcq_score(table[chosen])["hit"]
    expected[~chosen] = theirs.compute_na_score(table[~chosen])["MRA:.5:.95:.05"]
    assert scores(vsi_bench.score(rows, texts, extraction="easi")) == pytest.approx(expected.tolist())


def test_mmsi_bench_with_lmms_eval() -> None:
    theirs = peer("lmms_eval.tasks.mmsi_bench.utils", LMMS)
    rows = letters(("MSR", "Motion (Cam.)"))
    texts = ugly.choices(COUNT)
    docs = [
        theirs.msr_process_results({"id": r.id, "answer": r.answer, "question_type": r.category}, [t])["average"]
        for r, t in zip(rows, texts, strict=True)
    ]
    ours = mmsi_bench.score(rows, texts, extraction="lmms_eval")
    assert scores(ours) == [doc["score"] for doc in docs]
    assert ours.overall.value.mean == pytest.approx(theirs.msr_aggregate_results(docs))


def test_mmsi_bench_with_vlmevalkit() -> None:
    theirs = peer("vlmeval.dataset.utils.spatial_bench.matching_func", VLMEVAL)
    rows = letters()
    texts = ugly.choices(COUNT)
    expected = [float(theirs.can_match_option(t) == r.answer) for r, t in zip(rows, texts, strict=True)]
    assert scores(mmsi_bench.score(rows, texts, extraction="easi")) == expected


def test_cv_bench_with_lmms_eval() -> None:
    theirs = peer("lmms_eval.tasks.cv_bench.utils", LMMS)
    sources = ("ADE20K", "COCO", "Omni3D", "Omni3D")
    rows = letters(type=lambda i: "3D" if i % 4 > 1 else "2D", source=lambda i: sources[i % 4])
    texts = ugly.choices(COUNT)
    docs = [
        theirs.cv_bench_process_results(
            {
                "idx": r.id,
                "answer": f"({r.answer})",
                "type": r.fields["type"],
                "task": r.category,
                "source": r.fields["source"],
            },
            [t],
        )["cv_bench_acc"]
        for r, t in zip(rows, texts, strict=True)
    ]
    ours = cv_bench.score(rows, texts, extraction="lmms_eval")
    assert scores(ours) == [float(doc["is_correct"]) for doc in docs]
    assert ours.overall.value.mean == pytest.approx(theirs.cv_bench_default_aggregate_results(docs))
    plain = {s.name: s.value.mean for s in ours.others}["all rows"]
    assert plain == pytest.approx(theirs.cv_bench_aggregate_results(docs))


def frame(rows: Sequence[Row], texts: Sequence[str]) -> Any:
    import pandas

    cells = [
        {
            "index": int(r.id),
            "question": r.question,
            **r.options,
            "answer": r.answer,
            "GT": r.answer,
            "prediction": t,
            "category": r.category,
            **r.fields,
        }
        for r, t in zip(rows, texts, strict=True)
    ]
    return pandas.DataFrame(cells)


def vlmeval_hits(rows: Sequence[Row], texts: Sequence[str]) -> Any:
    theirs = peer("vlmeval.dataset.utils.multiple_choice", VLMEVAL)
    table = frame(rows, texts)
    table["hit"] = [theirs.eval_vanilla(None, table.iloc[i], "any")["hit"] for i in range(len(table))]
    return theirs, table


def test_cv_bench_with_vlmevalkit() -> None:
    sources = ("ADE20K", "COCO", "Omni3D", "Omni3D")
    rows = letters(
        type=lambda i: "3D" if i % 4 > 1 else "2D",
        source=lambda i: sources[i % 4],
        split=lambda i: "3D" if i % 4 > 1 else "2D",
    )
    texts = ugly.choices(COUNT)
    theirs, table = vlmeval_hits(rows, texts)
    ours = cv_bench.score(rows, texts)
    assert scores(ours) == table["hit"].tolist()
    two = peer("vlmeval.dataset.image_mcq", VLMEVAL).CVBench.report_accuracy(None, table[table["split"] == "2D"])[
        "Overall"
    ][0]
    three = theirs.report_acc(table[table["split"] == "3D"])["Overall"][0]
    assert ours.overall.value.mean == pytest.approx((two + three) / 2)


def test_blink_with_vlmevalkit_and_circular_mmbench() -> None:
    rows = letters(("Counting", "Jigsaw", "IQ_Test"))
    texts = ugly.choices(COUNT)
    theirs, table = vlmeval_hits(rows, texts)
    ours = blink.score(rows, texts)
    assert scores(ours) == table["hit"].tolist()
    reported = theirs.report_acc(table)
    assert ours.overall.value.mean == pytest.approx(reported["Overall"][0])
    assert {s.name: s.value.mean for s in ours.categories} == pytest.approx(
        {n: reported[n][0] for n in ("Counting", "Jigsaw", "IQ_Test")}
    )

    easy = [t if i % 3 else r.answer for i, (r, t) in enumerate(zip(rows, texts, strict=True))]
    rotated = [
        Row(str(i // 2 + i % 2 * 1_000_000), r.question, r.answer, r.category, options=r.options)
        for i, r in enumerate(rows)
    ]
    circular = mmbench.score(rotated, easy)
    table = frame(rotated, easy)
    groups = [theirs.prefetch_circular_group(table[table["index"] % 1_000_000 == k]) for k in range(COUNT // 2)]
    assert circular.overall.value.mean == pytest.approx(np.mean([bool(g and g["hit"]) for g in groups]))


def test_mmmu_open_questions_with_vlmevalkit() -> None:
    rows = letters(split=lambda i: "validation")
    rows = [r if i % 3 else Row(r.id, r.question, "12 ohm", r.category, fields=r.fields) for i, r in enumerate(rows)]
    texts = [t if i % 2 else f"about 12 Ohm {t[:20]}" for i, t in enumerate(ugly.choices(COUNT))]
    theirs = peer("vlmeval.dataset.utils.multiple_choice", VLMEVAL)
    table = theirs.MMMU_preproc(frame(rows, texts))
    table["GT"] = [a if a in "ABCD" else "A" for a in table["answer"]]
    expected = [theirs.eval_vanilla(None, table.iloc[i], "MMMU")["hit"] for i in range(COUNT)]
    assert scores(mmmu.score(rows, texts)) == expected


def test_blink_with_lmms_eval() -> None:
    theirs = peer("lmms_eval.tasks.blink.utils", LMMS)
    rows = letters()
    texts = ugly.choices(COUNT)
    docs = [
        theirs.blink_process_results(
            {"idx": r.id, "answer": f"({r.answer})", "choices": list(OPTIONS), "sub_task": r.category}, [t]
        )["blink_acc"]
        for r, t in zip(rows, texts, strict=True)
    ]
    assert scores(blink.score(rows, texts, extraction="lmms_eval")) == [float(doc["is_correct"]) for doc in docs]


def test_mindcube_and_viewspatial_with_lmms_eval() -> None:
    cube = peer("lmms_eval.tasks.mindcube.utils", LMMS)
    view = peer("lmms_eval.tasks.viewspatial.utils", LMMS)
    for text in ugly.choices(COUNT):
        assert mindcube.letter(text.strip()) == (cube.extract_answer(text.strip()) or "")
        assert viewspatial.letter(text) == (view.extract_option(text.split("\n")[-1]) or "")


def test_readers_with_vlmevalkit() -> None:
    letter = peer("vlmeval.utils.matching_util", VLMEVAL)
    spatial = peer("vlmeval.dataset.utils.spatial_bench.matching_func", VLMEVAL)
    texts = ugly.choices(COUNT) + ugly.numbers(COUNT)
    for text in texts:
        for table in (OPTIONS, {"A": "yes", "B": "no"}, {"A": "1", "B": "2", "C": "A"}):
            assert choice.infer(text, table) == (letter.can_infer(text, dict(table)) or "")
        assert easi.option(text) == (spatial.can_match_option(text) or "")
        ours = easi.number(text)
        theirs = spatial.can_match_na(text)
        assert ours == theirs or (ours != ours and theirs != theirs)


def detections(seed: int) -> tuple[list[Row], list[str]]:
    """80 questions of five categories with three boxes each, and answers that miss, shift and invent boxes."""
    rng = np.random.default_rng(seed)
    rows = []
    texts = []
    for i in range(80):
        boxes = np.concatenate(
            [rng.uniform([-2, -1, 2], [2, 1, 45], (3, 3)), rng.uniform(0.5, 3, (3, 3)), np.zeros((3, 3))], 1
        )
        rows.append(
            Row(
                f"u{i}",
                "?",
                "",
                f"c{i % 5}",
                scene=f"p{i}",
                fields={
                    "boxes": boxes,
                    "height": 530,
                    "intrinsics": {"fx": 529.5, "fy": 529.5, "cx": 365.0, "cy": 265.0},
                },
            )
        )
        found = np.concatenate([boxes[rng.random(3) < 0.7], boxes[:1] + rng.normal(0, 2, (1, 9)) * ([1] * 3 + [0] * 6)])
        found[:, :3] += rng.normal(0, 0.3, (len(found), 3))
        rng.shuffle(found)
        texts.append(format_boxes(found, ["x"] * len(found)) if i % 9 else "nothing")
    return rows, texts


def cocoeval(rows: list[Row], texts: list[str]) -> np.ndarray:
    """pycocotools' precision (T, R, categories, depths): a box's area is its depth, the IoU is ours."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    names = sorted({r.category for r in rows})
    truth = []
    given = []
    pairs = {}
    for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
        found = sunrgbd_det.parse_boxes(text)[0]
        category = names.index(row.category) + 1
        pairs[i + 1, category] = sunrgbd_det.overlaps([found], [row.fields["boxes"]])[0]
        for box in row.fields["boxes"]:
            truth.append(
                {
                    "id": len(truth) + 1,
                    "image_id": i + 1,
                    "category_id": category,
                    "area": box[2],
                    "iscrowd": 0,
                    "bbox": [0, 0, 1, 1],
                }
            )
        given += [
            {"image_id": i + 1, "category_id": category, "bbox": [0, 0, 1, 1], "score": 1.0, "depth": b[2]}
            for b in found
        ]
    gt = COCO()
    gt.dataset = {
        "info": {},
        "images": [{"id": i + 1} for i in range(len(rows))],
        "annotations": truth,
        "categories": [{"id": k + 1, "name": n} for k, n in enumerate(names)],
    }
    gt.createIndex()
    dt = gt.loadRes(given)
    for annotation in dt.dataset["annotations"]:
        annotation["area"] = annotation["depth"]
    theirs = COCOeval(gt, dt, "bbox")
    theirs.params.iouThrs = THRESHOLDS
    theirs.params.recThrs = RECALLS
    theirs.params.areaRng = [list(d) for d in DEPTHS.values()]
    theirs.params.areaRngLbl = list(DEPTHS)
    theirs.computeIoU = lambda image, category: (
        pairs.get((image, category), []) if len(pairs.get((image, category), [])) else []
    )
    theirs.evaluate()
    theirs.accumulate()
    return theirs.eval["precision"][..., -1]


@pytest.mark.parametrize("seed", range(3))
def test_detection_with_pycocotools(seed: int) -> None:
    """Their matching, accumulation and averaging; a box's area is replaced by its depth, their IoU by ours."""
    peer("pycocotools", "pycocotools")
    rows, texts = detections(seed)
    report = sunrgbd_det.score(rows, texts)
    precision = cocoeval(rows, texts)  # (T, R, categories, depths)

    def mean(values: np.ndarray) -> float:
        return float(values[values > -1].mean())

    expected = {
        "AP15": mean(precision[2, :, :, 0]),
        "AP25": mean(precision[4, :, :, 0]),
        "AP50": mean(precision[9, :, :, 0]),
        "AP (mean of IoU 0.05 to 0.50)": mean(precision[..., 0]),
    }
    expected |= {f"AP {label}": mean(precision[..., k]) for k, label in enumerate(DEPTHS) if k}
    assert {s.name: s.value.mean for s in (report.overall, *report.others)} == pytest.approx(expected, abs=1e-9)
