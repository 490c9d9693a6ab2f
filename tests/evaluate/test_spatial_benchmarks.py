"""MMSI-Bench, ViewSpatial-Bench and MindCube against their authors' formulas, restated here."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

import ugly
from benchmark_files import png, write_jsonl, write_parquet, write_tsv
from fastvst.evaluate import mindcube, mmsi_bench, viewspatial


def mmsi_cells(count: int) -> list[dict]:
    return [
        {
            "id": i,
            "images": [png(1), png(2)],
            "question_type": ["MSR", "Motion (Cam.)"][i % 2],
            "question": f"q{i}? Options: A: x, B: y",
            "answer": "ABCD"[i % 4],
            "thought": "",
        }
        for i in range(count)
    ]


def official_mmsi(text: str) -> str | None:
    """The README of MMSI-Bench."""
    for pattern in (r"``([^`]*)``", r"`([^`]*)`", r"\{([^}]*)\}"):
        match = re.search(pattern, text)
        text = match.group(1) if match else text
    match = re.search(r"\b[A-D]\b(?!\s[a-zA-Z])", text)
    return match.group() if match else None


def test_mmsi_two_thousand_ugly_answers(tmp_path: Path) -> None:
    write_parquet(tmp_path / "MMSI_Bench.parquet", mmsi_cells(2000))
    rows = mmsi_bench.load(tmp_path)
    texts = ugly.choices(2000)
    report = mmsi_bench.score(rows, texts)
    hits = [official_mmsi(t) == r.answer for t, r in zip(texts, rows, strict=True)]
    assert [bool(line.score) for line in report.rows] == hits and 0.05 < np.mean(hits) < 0.95
    assert report.overall.value.mean == np.mean(hits) and not report.overall.paper
    assert mmsi_bench.score(rows[:1000], texts[:1000]).overall.paper["VST-7B-RL"] == 34.8
    assert "non-circular" in report.protocol and len(report.categories) == 2


@pytest.mark.parametrize(
    ("text", "official", "vst", "lmms_eval"),
    [
        ("``B``", "B", "B", "B"),
        ("b", "", "", "B"),
        ("{C}", "C", "C", "C"),
        ("E, A", "A", "E", "E"),
        ("A chair, so B", "B", "B", "B"),
        ("`` {D} ``", "D", "D", "D"),
        ("A {B}", "B", "A", "B"),
        ("", "", "", ""),
    ],
)
def test_mmsi_named_extractions(text: str, official: str, vst: str, lmms_eval: str) -> None:
    found = {name: mmsi_bench.EXTRACTIONS[name](text) for name in ("official", "vst", "lmms_eval")}
    assert found == {"official": official, "vst": vst, "lmms_eval": lmms_eval}


def test_mmsi_prompt_and_tsv(tmp_path: Path) -> None:
    (row, *_) = mmsi_bench.load(write_parquet(tmp_path / "MMSI_Bench.parquet", mmsi_cells(2)))
    sample = mmsi_bench.prompt(row)
    assert [p["type"] for p in sample.messages[0]["content"]] == ["image", "image", "text"]
    assert sample.parts("text")[0]["text"] == (
        "q0? Options: A: x, B: y\nAnswer with the option's letter from the given choices directly. "
        "Enclose the option's letter within ``."
    )
    table = [{"index": 0, "question": "q?", "answer": "A", "category": "MSR", "image": ""}]
    assert mmsi_bench.load(write_tsv(tmp_path / "MMSI_Bench.tsv", table))[0].category == "MSR"
    with pytest.raises(ValueError, match="not a Parquet file.*RunsenXu/MMSI-Bench"):
        (tmp_path / "MMSI_Bench.parquet").write_text("version https://git-lfs")
        mmsi_bench.load(tmp_path / "MMSI_Bench.parquet")


def test_viewspatial(tmp_path: Path) -> None:
    folder = tmp_path / "ViewSpatial-Bench"
    folder.mkdir()
    cells = [
        {
            "question_type": viewspatial.ORDER[i % 5],
            "image_path": [f"ViewSpatial-Bench/val/{i}.png"],
            "question": f"q{i}",
            "answer": f"{'ABCD'[i % 4]}. left",
            "choices": "A. left\nB. right\nC. up\nD. down",
        }
        for i in range(2000)
    ]
    (folder / "ViewSpatial-Bench.json").write_text(json.dumps(cells))
    rows = viewspatial.load(folder)
    texts = ugly.choices(2000)
    assert rows[3].images == (folder / "val" / "3.png",)
    match = [re.search(r"\b([A-D])\b", t.split("\n")[-1], re.IGNORECASE) for t in texts]
    hits = [bool(m) and m.group(1).upper() == r.answer[0] for m, r in zip(match, rows, strict=True)]
    report = viewspatial.score(rows, texts)
    assert [bool(line.score) for line in report.rows] == hits
    assert [s.name for s in report.categories] == list(viewspatial.ORDER) and not report.overall.paper
    assert (
        viewspatial.prompt(rows[0])
        .parts("text")[0]["text"]
        .endswith("Reply only to the corresponding option.\nAnswer:")
    )


def test_mindcube(tmp_path: Path) -> None:
    cells = [
        {
            "id": f"{name}_{i}",
            "question": "Which? A. Sofa B. Bed",
            "images": ["other_all_image/a.png", "other_all_image/b.png"],
            "gt_answer": "A",
        }
        for i, name in enumerate(["around", "aroundnew", "among", "rotation"])
    ]
    write_jsonl(tmp_path / "raw" / "MindCube_tinybench.jsonl", cells)
    rows = mindcube.load(tmp_path)
    assert [row.category for row in rows] == ["around", "around", "among", "rotation"]
    assert rows[0].images[0] == tmp_path / "other_all_image" / "a.png"
    report = mindcube.score(rows, ["A. Sofa", "I was thinking B. but A. Sofa", "<Answer>A</Answer>", "B"])
    assert [line.score for line in report.rows] == [1, 1, 1, 0]
    interleaved = mindcube.load(
        write_jsonl(tmp_path / "own.jsonl", [cells[0] | {"input_prompt": "first <image> then <image> which?"}])
    )
    kinds = [p["type"] for p in mindcube.prompt(interleaved[0]).messages[0]["content"]]
    assert kinds == ["text", "image", "text", "image", "text"]
