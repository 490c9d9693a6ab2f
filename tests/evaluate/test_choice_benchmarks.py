"""The benchmarks that VLMEvalKit scores, against its formulas restated here."""

from __future__ import annotations

import string
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import ugly
from benchmark_files import base64_png, mcq, png, write_parquet, write_tsv
from fastvst.evaluate import (
    ai2d,
    blink,
    choice,
    cv_bench,
    mmbench,
    mmmu,
    mmstar,
    ocrbench,
    realworldqa,
    srbench_3d,
)

OPTIONS = ugly.OPTIONS


def letter(answer: str, options: dict[str, str]) -> str | None:
    """VLMEvalKit's can_infer in other words: "Z" for refusals, None for nothing."""
    refusals = ("Sorry, I can't help with images of people yet.", "Cannot determine the answer")
    if any(r in answer for r in refusals):
        return "Z"
    words = "".join(" " if c in ".()[],:;!*#{}" else c for c in answer).split()
    alone = {w for w in words if w in options}
    if len(alone) == 1:
        (one,) = alone
        if len(words) - words.index(one) < 5:
            return one
    elif not alone and "Z" in words:
        return "Z"
    if len(answer) > 2 * sum(map(len, options.values())):
        return None
    inside = [k for k, v in options.items() if v.lower() in answer.lower()]
    return inside[0] if len(inside) == 1 else None


def test_letters_of_ugly_answers() -> None:
    for table in (OPTIONS, {"A": "yes", "B": "no"}, {"A": "1", "B": "2", "C": "A"}):
        for text in ugly.choices(2000, options=table) + ugly.numbers(500):
            assert (choice.infer(text, table) or None) == letter(text, table), text[:100]


@pytest.mark.parametrize(
    ("module", "file"),
    [(realworldqa, "RealWorldQA.tsv"), (mmstar, "MMStar.tsv"), (ai2d, "AI2D_TEST.tsv"), (blink, "BLINK.tsv")],
)
def test_plain_accuracy(module: ModuleType, file: str, tmp_path: Path) -> None:
    write_tsv(tmp_path / file, mcq(2000, OPTIONS))
    rows = module.load(tmp_path)
    texts = ugly.choices(2000)
    report = module.score(rows, texts)
    hits = np.array([letter(t, OPTIONS) == r.answer for t, r in zip(texts, rows, strict=True)])
    assert report.overall.value.mean == hits.mean() and 0.05 < hits.mean() < 0.95
    near = np.array([r.category == "near" for r in rows])
    assert {s.name: s.value.mean for s in report.categories} == {"near": hits[near].mean(), "far": hits[~near].mean()}
    assert report.overall.paper == {} and "about 2,000" in report.markdown(), "not the number of the paper's questions"
    assert report.to_json()["questions"] == 2000
    text = module.prompt(rows[1]).parts("text")[0]["text"]
    assert text == (
        "Question: Question 1?\nOptions:\nA. a red chair\nB. The table\nC. 3.5\nD. left and forward\n"
        "Please select the correct answer from the options above."
    )
    assert module.prompt(rows[1]).parts("image")[0]["image"] == png(1)


def test_tsv_shares_images_and_keeps_words(tmp_path: Path) -> None:
    table = [
        {
            "index": 1,
            "image": f"['{base64_png(1)}', '{base64_png(2)}']",
            "question": 'two\nlines "quoted"\tand tab',
            "A": "None",
            "B": "NA",
            "answer": "A",
            "category": "x",
        },
        {"index": 2, "image": "1", "question": "same images", "A": "1.50", "answer": "A", "category": "x"},
    ]
    first, second = mmstar.load(write_tsv(tmp_path / "MMStar.tsv", table))
    assert first.images == (png(1), png(2)) and second.images is first.images
    assert first.options == {"A": "None", "B": "NA"} and second.options == {"A": "1.50"}
    assert first.question == 'two\nlines "quoted"\tand tab'


def test_tsv_errors_say_what_to_download(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Download MMStar.tsv"):
        mmstar.load(tmp_path)
    rows = mcq(3, OPTIONS)
    write_tsv(tmp_path / "MMStar.tsv", [{k: v for k, v in row.items() if k != "category"} for row in rows])
    with pytest.raises(ValueError, match="lacks the column category; it has .*index.* Download MMStar.tsv"):
        mmstar.load(tmp_path)
    write_tsv(tmp_path / "MMStar.tsv", [rows[0] | {"image": "77"}])
    assert "its image is row '77', which has no image" in mmstar.load(tmp_path)[0].unaskable
    write_tsv(tmp_path / "MMStar.tsv", [rows[0] | {"image": rows[0]["image"][:-3]}, rows[1]])
    broken, whole_row = mmstar.load(tmp_path)
    assert "row 0: its image is not base64" in broken.unaskable and whole_row.askable
    write_tsv(tmp_path / "MMStar.tsv", [rows[0], rows[0]])
    with pytest.raises(ValueError, match="two rows with id '0'"):
        mmstar.load(tmp_path)
    whole = write_tsv(tmp_path / "MMStar.tsv", rows).read_text()
    (tmp_path / "MMStar.tsv").write_text(whole + "9\thalf a row")
    with pytest.raises(ValueError, match="is not a whole TSV.*download it again"):
        mmstar.load(tmp_path)


@pytest.mark.parametrize("container", ["tsv", "parquet"])
def test_cv_bench_is_the_mean_of_two_and_three_d(container: str, tmp_path: Path) -> None:
    sources = {"2D": ("ADE20K", "ADE20K", "COCO"), "3D": ("Omni3D",)}
    for part, names in sources.items():
        table = mcq(600, OPTIONS, source=lambda i, n=names: n[i % len(n)], prompt=lambda i: f"prompt {i}", split=part)
        if container == "tsv":
            write_tsv(tmp_path / f"CV-Bench-{part}.tsv", table)
        else:
            cells = [
                {
                    "idx": r["index"],
                    "type": part,
                    "task": r["category"],
                    "image": {"bytes": png(1), "path": "1.png"},
                    "question": r["question"],
                    "choices": list(OPTIONS.values()),
                    "answer": f"({r['answer']})",
                    "prompt": r["prompt"],
                    "source": r["source"],
                }
                for r in table
            ]
            write_parquet(tmp_path / f"test_{part.lower()}.parquet", cells)
    rows = cv_bench.load(tmp_path)
    texts = ugly.choices(1200)
    report = cv_bench.score(rows, texts)
    hits = np.array([letter(t, OPTIONS) == r.answer.strip("()") for t, r in zip(texts, rows, strict=True)])
    of = {s: hits[[r.fields["source"] == s for r in rows]].mean() for s in ("ADE20K", "COCO", "Omni3D")}
    assert report.overall.value.mean == pytest.approx(((of["ADE20K"] + of["COCO"]) / 2 + of["Omni3D"]) / 2)
    others = {s.name: s.value.mean for s in report.others}
    assert others["2D"] == pytest.approx((of["ADE20K"] + of["COCO"]) / 2) and others["3D"] == pytest.approx(
        of["Omni3D"]
    )
    assert others["all rows"] == pytest.approx(hits.mean()) != pytest.approx(report.overall.value.mean)
    assert cv_bench.prompt(rows[5]).parts("text")[0]["text"] == choice.question_text(rows[5])
    assert cv_bench.prompt(rows[5], prompt_style="published").parts("text")[0]["text"] == "prompt 5"
    assert "prompt: not known (the paper's setting is vlmevalkit)" in report.protocol
    assert "prompt: published" in cv_bench.score(rows, texts, prompt_style="published").markdown()
    with pytest.raises(ValueError, match="expected one of vlmevalkit, published"):
        cv_bench.prompt(rows[5], prompt_style="own")


def test_blink_parquet_and_mean_of_tasks(tmp_path: Path) -> None:
    for task, count in (("Counting", 30), ("Jigsaw", 90)):
        cells = [
            {
                "idx": f"val_{task}_{i}",
                "question": "Which?",
                "sub_task": task,
                "choices": ["x1", "x2"],
                "answer": "(A)",
                "image_1": {"bytes": png(1), "path": None},
                "image_2": {"bytes": png(2), "path": None} if task == "Jigsaw" else None,
            }
            for i in range(count)
        ]
        write_parquet(tmp_path / task / "val-00000-of-00001.parquet", cells)
    rows = blink.load(tmp_path)
    report = blink.score(rows, ["A" if row.category == "Jigsaw" else "B" for row in rows])
    assert report.overall.value.mean == 0.75 and report.others[0].value.mean == 0.5
    assert [len(blink.prompt(r).parts("image")) for r in (rows[0], rows[-1])] == [1, 2]


def test_3dsrbench_four_settings(tmp_path: Path) -> None:
    suffixes = ["", "-1", "-flip", "-flip-1"]
    table = [
        row | {"qid": f"Q{i // 4:07d}{suffixes[i % 4]}", "category": "height"}
        for i, row in enumerate(mcq(800, OPTIONS))
    ]
    rows = srbench_3d.load(write_tsv(tmp_path / "3DSRBench.tsv", table))
    rng = np.random.default_rng(0)
    right = rng.random(800) < 0.8
    texts = [row.answer if ok else "E" for row, ok in zip(rows, right, strict=True)]
    report = srbench_3d.score(rows, texts)
    copies = right.reshape(200, 4)  # plain, rotated, flipped, flipped and rotated
    others = {s.name: s.value.mean for s in report.others}
    assert report.overall.value.mean == pytest.approx(right.mean())
    assert others["flip"] == pytest.approx((copies[:, [0, 1]] & copies[:, [2, 3]]).mean())
    assert others["circular"] == pytest.approx((copies[:, [0, 2]] & copies[:, [1, 3]]).mean())
    assert others["flip and circular"] == pytest.approx(copies.all(1).mean())


def test_mmbench_circular_and_vanilla(tmp_path: Path) -> None:
    table = mcq(400, OPTIONS, index=lambda i: i // 4 + 1 + i % 4 * 1_000_000)
    rows = mmbench.load(write_tsv(tmp_path / "MMBench_DEV_EN.tsv", table))
    right = np.random.default_rng(1).random(400) < 0.8
    texts = [row.answer if ok else "" for row, ok in zip(rows, right, strict=True)]
    report = mmbench.score(rows, texts)
    vanilla = mmbench.score(rows, texts, circular=False)
    assert report.overall.value.mean == right.reshape(100, 4).all(1).mean() and report.overall.questions == 100
    assert vanilla.overall.value.mean == right.reshape(100, 4)[:, 0].mean()
    assert len(report.rows) == 400, "every rotation is in the JSON"


def test_mmmu_validation_and_open_questions(tmp_path: Path) -> None:
    table = mcq(40, OPTIONS, split=lambda i: "validation" if i % 4 else "dev")
    table[1] = {k: v for k, v in table[1].items() if k not in string.ascii_uppercase} | {"answer": "12 ohm"}
    rows = mmmu.load(write_tsv(tmp_path / "MMMU_DEV_VAL.tsv", table))
    texts = [row.answer if row.fields["split"] == "validation" else "" for row in rows]
    texts[1] = "it is 12 Ohm"
    report = mmmu.score(rows, texts)
    assert report.overall.value.mean == 1.0 and report.overall.questions == 30
    assert {s.name: s.value.mean for s in report.others} == {
        "split dev": 0.0,
        "split validation": 1.0,
        "all splits": 0.75,
    }
    assert "Options" not in mmmu.prompt(rows[1]).parts("text")[0]["text"]
    texts[1] = "Other Answers"
    assert mmmu.score(rows, texts).overall.value.mean == pytest.approx(29 / 30)


def test_ocrbench_contains(tmp_path: Path) -> None:
    table = [
        {"index": i, "image": base64_png(), "question": "text?", "answer": a, "category": c}
        for i, (a, c) in enumerate(
            [
                ("['CENTRE']", ocrbench.RECOGNITION[0]),
                ("['a b', 'c']", ocrbench.FORMULA),
                ("['one\\ntwo']", "Doc-oriented VQA"),
                ("['x']", "Key Information Extraction"),
            ]
        )
    ]
    rows = ocrbench.load(write_tsv(tmp_path / "OCRBench.tsv", table))
    report = ocrbench.score(rows, ["the word is Centre.", "z= a\nb +1", "ONE TWO", ""])
    assert [line.score for line in report.rows] == [1, 1, 1, 0]
    assert report.overall.value.mean == 0.75 and report.others[0].name == "Text Recognition"
    assert ocrbench.prompt(rows[0]).parts("text")[0]["text"].startswith("text?\nPlease try to answer")
