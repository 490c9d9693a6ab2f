"""VSI-Bench against the authors' formulas, restated here."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import ugly
from benchmark_files import write_jsonl, write_parquet
from fastvst.evaluate import vsi_bench
from fastvst.evaluate.files import Row

OPTIONS = ["A. left", "B. right", "C. back"]


def cells(count: int, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    kinds = vsi_bench.CHOICES + vsi_bench.NUMBERS
    made = []
    for i in range(count):
        kind = kinds[i % len(kinds)]
        number = kind in vsi_bench.NUMBERS
        truth = str(round(float(rng.uniform(0.5, 9)), 1)) if number else "ABC"[int(rng.integers(3))]
        scene = f"scene{int(rng.integers(12)):04d}_00"
        made.append(
            {
                "id": i,
                "dataset": "scannet",
                "scene_name": scene,
                "question_type": kind,
                "question": f"q{i}?",
                "ground_truth": truth,
                "options": None if number else OPTIONS,
            }
        )
    return made


def answers(count: int) -> list[str]:
    mixed = zip(ugly.choices(count), ugly.numbers(count), strict=True)
    return [choice if i % 10 < 6 else number for i, (choice, number) in enumerate(mixed)]


def official(row: Row, text: str) -> float:
    """thinking-in-space: first word, closing dots cut; equality, or ten thresholds."""
    word = text.split(" ")[0].rstrip(".").strip()
    if row.category in vsi_bench.CHOICES:
        return 1.0 if word.lower() == row.answer.lower() else 0.0
    try:
        given = float(word)
    except ValueError:
        return 0.0
    error = abs(given - float(row.answer)) / float(row.answer)
    return sum(error <= 1 - threshold for threshold in np.linspace(0.5, 0.95, 10)) / 10


def test_two_thousand_ugly_answers_score_as_the_authors_score_them(tmp_path: Path) -> None:
    rows = vsi_bench.load(write_jsonl(tmp_path / "test.jsonl", cells(2000)))
    texts = answers(2000)
    report = vsi_bench.score(rows, texts)
    assert [line.score for line in report.rows] == pytest.approx(
        [official(r, t) for r, t in zip(rows, texts, strict=True)]
    )
    kinds = {}
    for row, text in zip(rows, texts, strict=True):
        kinds.setdefault(row.category, []).append(official(row, text))
    means = {kind: float(np.mean(values)) for kind, values in kinds.items()}
    direction = np.mean([means.pop(f"object_rel_direction_{level}") for level in ("easy", "medium", "hard")])
    assert report.overall.value.mean == pytest.approx(np.mean([*means.values(), direction]), abs=1e-12)
    by_name = {score.name: score.value.mean for score in report.categories}
    assert by_name["object_rel_direction"] == pytest.approx(direction)
    assert len(by_name) == 8 and report.overall.value.low < report.overall.value.mean < report.overall.value.high
    assert {line.score for line in report.rows} > {0.0, 1.0}, "the answers must not all be right or all wrong"


@pytest.mark.parametrize(
    ("given", "truth", "expected"), [(5, 4, 0.6), (3, 4, 0.6), (0.9, 1.0, 0.9), (4, 4, 1.0), (8, 4, 0.0)]
)
def test_mean_relative_accuracy(given: float, truth: float, expected: float) -> None:
    assert vsi_bench.mean_relative_accuracy(given, truth) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "original", "lmms_eval", "easi"),
    [
        ("4", 4, 4, 4),
        ("four", None, 4, 4),
        ("There are 4", None, 4, 4),
        ("1,200", None, 1, 200),
        ("3 to 5", 3, 3, 5),
        ("3.5m", None, 3.5, 3.5),
        ("about 3", None, 3, 3),
        ("twenty-one", None, 21, -1),
        ("", None, None, None),
    ],
)
def test_three_named_ways_to_read_a_number(text: str, original: float, lmms_eval: float, easi: float) -> None:
    modes = {name: number(text) for name, (_, number) in vsi_bench.EXTRACTIONS.items()}
    assert modes == {"original": original, "lmms_eval": lmms_eval, "easi": easi}


def test_prompt_is_the_official_text(tmp_path: Path) -> None:
    rows = vsi_bench.load(write_parquet(tmp_path / "test-00000-of-00001.parquet", cells(10)))
    sample = vsi_bench.prompt(rows[0])
    video, text = sample.messages[0]["content"]
    assert video["video"] == tmp_path / "scannet" / f"{rows[0].scene.split('/')[1]}.mp4"
    assert text["text"] == (
        "These are frames of a video.\nq0?\nOptions:\nA. left\nB. right\nC. back\n"
        "Answer with the option's letter from the given choices directly."
    )
    number = vsi_bench.prompt(rows[6]).parts("text")[0]["text"]
    assert number == "These are frames of a video.\nq6?\nPlease answer the question using a single word or phrase."
    thinking = vsi_bench.prompt(rows[6], thinking=True)
    assert thinking.messages[0]["role"] == "system" and "<think>" in thinking.messages[0]["content"][0]["text"]


def test_thinking_scores_what_follows_the_tag(tmp_path: Path) -> None:
    rows = vsi_bench.load(write_jsonl(tmp_path / "test.jsonl", cells(10)))
    texts = [f"<think>not Z, 77</think>\n{row.answer}" for row in rows]
    assert vsi_bench.score(rows, texts, thinking=True).overall.value.mean == 1.0
    assert vsi_bench.score(rows, texts).overall.value.mean == 0.0


def test_failed_questions_are_wrong_named_and_kept(tmp_path: Path) -> None:
    rows = vsi_bench.load(write_jsonl(tmp_path / "test.jsonl", cells(20)))
    texts: list[str | None] = [row.answer for row in rows]
    texts[3] = None
    report = vsi_bench.score(rows, texts, failures={rows[5].id: "broken_video: it ends early"})
    assert [line.id for line in report.failed] == ["3", "5"] and len(report.rows) == 20
    assert report.rows[5].score == 0.0, "a failed question is wrong even if some text is there"
    assert "broken_video" in report.markdown() and "2 questions failed and count as wrong" in report.markdown()


def test_intervals_draw_scenes() -> None:
    """Twenty equal questions of one scene carry the information of one question."""
    rows = [Row(str(i), "", "4", "object_counting", scene=f"s{i // 20}") for i in range(200)]
    texts = ["4" if i // 20 % 2 else "9" for i in range(200)]
    by_scene = vsi_bench.score(rows, texts).overall.value
    alone = vsi_bench.score([dataclasses.replace(row, scene="") for row in rows], texts).overall.value
    assert by_scene.mean == alone.mean == 0.5
    assert (by_scene.high - by_scene.low) > 3 * (alone.high - alone.low)


def test_markdown_has_the_papers_rows(tmp_path: Path) -> None:
    rows = vsi_bench.load(write_jsonl(tmp_path / "test.jsonl", cells(5130)))
    text = vsi_bench.score(rows, answers(5130)).markdown()
    overall = next(line for line in text.splitlines() if line.startswith("| overall"))
    assert "61.2" in overall and "VST-7B-RL (paper)" in text and "2511.05491" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("scene_name"), "scene_name.*Download test.jsonl"),
        (lambda c: c.update(question_type="x"), "unknown question_type 'x'"),
    ],
)
def test_wrong_files_say_what_to_do(tmp_path: Path, change, message: str) -> None:
    table = cells(4)
    change(table[2])
    with pytest.raises(ValueError, match=message):
        vsi_bench.load(write_jsonl(tmp_path / "test.jsonl", table))
    with pytest.raises(FileNotFoundError, match="arkitscenes.zip"):
        vsi_bench.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="3 predictions for 4 questions"):
        vsi_bench.score([Row(str(i), "", "A", "route_planning") for i in range(4)], ["A"] * 3)
    with pytest.raises(ValueError, match="expected one of original, lmms_eval, easi"):
        vsi_bench.score([Row("0", "", "A", "route_planning")], ["A"], extraction="best")
