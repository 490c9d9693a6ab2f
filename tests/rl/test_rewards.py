"""Rewards: VST's rules one by one, beside scipy, brute force and the evaluation's own scorers."""

from __future__ import annotations

import itertools
import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from fastvst.evaluate.vsi_bench import mean_relative_accuracy
from fastvst.rl import rewards
from fastvst.rl.rewards.matching import assign
from fastvst.rl.rewards.verifiable import levenshtein, overlong, score
from fastvst.rl.rewards.vqa import normalise
from fastvst.spatial.boxes import format_boxes, iou_3d

THINK = "<think>the chair is left of the lamp</think> "


# ------------------------------------------------------------------------------------------------------------ format


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<think>a</think> B", 1),
        ("well <think>a\nb</think>\nB. left", 1),
        ("<think></think> B", 1),
        ("B", 0),
        ("<think>a</think>", 0),
        ("<think>a</think>  \n", 0),
        ("<think>a</think> x <think>b</think> B", 0),
        ("<think>a B", 0),
        ("a</think> B", 0),
        ("", 0),
    ],
)
def test_the_format_is_one_thought_and_an_answer_after_it(response: str, expected: int) -> None:
    found = score(response, "B", ["multi_choices_score"])
    assert found.format == expected
    assert found.overall == pytest.approx(0.5 * found.accuracy + 0.5 * expected)


def test_a_direct_answer_has_no_format_to_keep_but_must_not_be_empty() -> None:
    assert score("B", "B", ["multi_choices"], thinking=False).overall == 1
    assert score("  ", "B", ["multi_choices"], thinking=False).overall == 0
    assert score("B", "B", ["multi_choices"], format_weight=0.1).overall == pytest.approx(0.9)


# ---------------------------------------------------------------------------------------------------------- accuracy


@pytest.mark.parametrize(
    ("mode", "response", "answer", "expected"),
    [
        ("multi_choices", "B. southwest", "B", 1),
        ("multi_choices", "``C`` or B", "C. left and forward", 1),
        ("multi_choices", "`D` then ``C``", "C", 1),
        ("multi_choices", "A chair is B", "B", 1),
        ("multi_choices", "A chair", "A", 0),
        ("multi_choices", "the left one", "the right one", 0),  # no letter on either side is no match
        ("multi_choices", "b", "B", 1),  # equal without case
        ("multi_choices", "G", "B", 0),
        ("relaxed", "104.9", "100", 1),
        ("relaxed", "105.1", "100", 0),
        ("relaxed", "10%", "10", 1),
        ("relaxed", "1,000", "1000", 1),
        ("relaxed", "2011", "2010", 0),  # years are exact
        ("relaxed", "0", "0.0", 1),
        ("relaxed", "0.01", "0", 0),
        ("relaxed", "Chair", "chair", 1),
        ("relaxed", "nan", "3", 0),
        ("relaxed", r"\boxed{3}", "3", 1),
        ("relaxed", "3", r"so \boxed{3}", 1),
        ("relaxed", r"\boxed{\frac{1}{2}}", r"\boxed{\frac{1}{2}}", 1),
        ("vqa", "The 2 dogs", "two dogs", 1),
        ("vqa", "dont know", "don't know!", 1),
        ("vqa", "cat", "dog", 0),
        ("mra", "100 cm", "100", 1),
        ("mra", "no idea", "100", 0),
    ],
)
def test_each_text_rule(mode: str, response: str, answer: str, expected: float) -> None:
    assert score(THINK + response, answer, [mode + "_score"]).accuracy == expected
    assert score(THINK + response, answer, [mode]).accuracy == expected


def test_math_is_checked_by_meaning() -> None:
    pytest.importorskip("math_verify")
    assert score(THINK + r"the area is \boxed{\frac{1}{2}}", "0.5", ["math_score"]).accuracy == 1
    assert score(THINK + r"$2\sqrt{3}$", r"\sqrt{12}", ["math"]).accuracy == 1
    assert score(THINK + r"\boxed{3}", "4", ["math"]).accuracy == 0
    assert score(THINK + r"\frac{", "4", ["math"]).accuracy == 0


def test_anls_is_higher_when_better() -> None:
    assert score("", "invoice", ["anls"]).accuracy == 0
    values = [score(THINK + text, "invoice", ["anls_score"]).accuracy for text in ("Invoice", "invoyce", "in", "xyz")]
    assert values == [1.0, pytest.approx(1 - 1 / 7), 0.0, 0.0]  # below 0.5 it is 0


def test_the_best_mode_counts_and_several_truths_are_alternatives() -> None:
    assert score(THINK + "invoyce", "invoice", ["relaxed", "anls"]).accuracy > 0.8
    assert score(THINK + "b", ["a", "b"], ["relaxed"]).accuracy == 1
    people = ["red"] * 2 + ["blue"] * 8
    assert score(THINK + "red!", people, ["vqa"]).accuracy == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)


def test_an_answer_brings_its_own_rule() -> None:
    number = {"type": "number", "value": 120, "unit": "cm", "tolerance": 0.1}
    assert score("1.2 m", number, thinking=False).accuracy == 1
    assert score("110 cm", number, thinking=False).accuracy == mean_relative_accuracy(110, 120)
    choice = {"type": "choice", "value": "pillow-B", "candidates": ["chair", "pillow-B"]}
    assert score("Distance[a, b]=0.7m\nSo, the answer is pillow-B.", choice, thinking=False).accuracy == 1
    assert score("chair", choice, thinking=False).accuracy == 0


def test_unknown_modes_are_named() -> None:
    with pytest.raises(ValueError, match=r"bleu.*multi_choices"):
        score("a", "b", ["bleu_score"])
    with pytest.raises(ValueError, match="mix boxes with texts"):
        score("a", "b", ["bbox3d", "relaxed"])


@given(st.floats(0.1, 1e4), st.floats(0, 2e4))
@settings(max_examples=50, deadline=None)
def test_mra_is_the_benchmarks(truth: float, given_: float) -> None:
    truth = round(truth, 3)
    given_ = round(given_, 3)
    ours = score(f"{given_:f}", f"{truth:f}", ["mra"]).accuracy
    theirs = mean_relative_accuracy(given_, truth)
    assert ours == pytest.approx(theirs, abs=0.11)  # one threshold may fall to either side of a rounding
    if all(abs(abs(given_ - truth) / truth - t) > 1e-6 for t in np.linspace(0, 0.5, 11)):
        assert ours == pytest.approx(theirs)


@given(st.text("ab c", max_size=8), st.text("ab c", max_size=8), st.text("ab c", max_size=8))
@settings(max_examples=60, deadline=None)
def test_edit_distance_is_a_metric_bounded_by_lengths(a: str, b: str, c: str) -> None:
    d = levenshtein(a, b)
    assert d == levenshtein(b, a) and abs(len(a) - len(b)) <= d <= max(len(a), len(b))
    assert (d == 0) == (a == b) and levenshtein(a, c) <= d + levenshtein(b, c)
    assert levenshtein("x" + a, "x" + b) == d


def test_the_evaluation_servers_normalisation() -> None:
    assert normalise("The  Two,  dogs.") == "2 dogs"
    assert normalise("1,000") == "1000"
    assert normalise("3.5 m") == "3.5 m"
    assert normalise("left/right") == "left right"


UGLY = [
    "",
    "\x00\x1b[31m",
    "\ud800",
    "<script>alert(1)</script>",
    "a" * 20_000,
    "</think>" * 500,
    "<think>" * 500,
    "```json\n" + "[" * 5000,
    "{" * 3000,
    r"\boxed{" * 300,
    "�" * 50,
    "1e999 nan inf",
    "😀" * 100,
]


@pytest.mark.parametrize("mode", [m for m in rewards.MODES if m != "math"] + ["bbox3d"])
def test_no_response_raises(mode: str) -> None:
    for response in UGLY:
        found = score(response, "```json\n[]\n```" if mode == "bbox3d" else "3 chairs", [mode])
        assert 0 <= found.accuracy < 1 and found.format in (0, 1)


def test_overlong_is_daposs_ramp() -> None:
    assert [overlong(n, 100, 20) for n in (0, 80, 90, 100, 120)] == [0, 0, -0.5, -1, -1]
    assert overlong(100, 100, 0) == 0


# ------------------------------------------------------------------------------------------------------------- boxes

TRUTH = np.array(
    [[0, 0, 3, 1, 1, 1, 0, 30, 0], [2, 0, 4, 1, 2, 1, 10, 0, 0], [-2, 0.5, 5, 0.5, 0.5, 0.5, 0, 0, 45]], dtype=float
)


def _text(boxes: np.ndarray) -> str:
    return format_boxes(boxes, ["chair"] * len(boxes))


def test_perfect_boxes_score_one_in_any_order_and_any_form_of_the_truth() -> None:
    as_list = [{"bbox_3d": box.tolist(), "label": "chair"} for box in TRUTH]
    sample_answer = {"type": "boxes", "value": as_list, "unit": "m, degrees"}
    raw = _text(TRUTH).removeprefix("```json\n").removesuffix("\n```")
    for truth in (
        _text(TRUTH),
        raw,
        as_list,
        sample_answer,
        {"type": "boxes", "value": _text(TRUTH), "mode": ["bbox3d"]},
    ):
        found = score(_text(TRUTH[::-1]), truth, ["bbox3d"])
        assert found.accuracy > 0.97 and found.format == 1  # two decimals of text, and of an angle / 180


def test_small_angles_of_a_sample_are_degrees_and_of_a_text_half_turns() -> None:
    box = [0, 0, 3, 1, 1, 4, 0, 0.5, 0]
    straight = _text(np.array([[*box[:6], 0, 0, 0]], dtype=float))
    listed = [{"bbox_3d": box, "label": "chair"}]
    assert score(straight, {"type": "boxes", "value": listed, "unit": "m, degrees"}).accuracy > 0.95
    assert score(straight, listed, ["bbox3d"]).accuracy < 0.8  # a quarter turn of a long box


def test_accuracy_is_half_iou_half_f1_of_the_best_assignment() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        guess = TRUTH[: rng.integers(1, 4)] + rng.normal(0, 0.15, (1, 9)) * ([1] * 6 + [20] * 3)
        guess[:, 3:6] = np.abs(guess[:, 3:6]) + 0.1
        text = _text(guess)
        boxes = np.array([e["bbox_3d"] for e in json.loads(text.split("\n", 1)[1].rsplit("\n", 1)[0])])
        boxes[:, 6:] *= 180
        iou = iou_3d(boxes, TRUTH)
        best = max(
            (iou[range(len(boxes)), list(order)] for order in itertools.permutations(range(3), len(boxes))),
            key=lambda pairs: pairs.sum(),
        )
        hits = (best >= 0.25).sum()
        precision = hits / len(boxes)
        recall = hits / 3
        f1 = 2 * precision * recall / (precision + recall) if hits else 0
        assert score(text, [{"bbox_3d": b} for b in TRUTH.tolist()], ["bbox3d"]).accuracy == pytest.approx(
            0.5 * best.sum() / 3 + 0.5 * f1
        )


@pytest.mark.parametrize(
    ("response", "accuracy", "shape"),
    [
        ("no boxes", 0, 0),
        ("```json\n[]\n```", 0, 0),
        ("```json\n{\n```", 0, 0),
        ('```json\n[{"bbox_3d":[1,2,3],"label":"chair"}]\n```', 0, 0),
        ('```json\n[{"bbox_3d":[1,2,3,1,1,1,0,0,"x"],"label":"chair"}]\n```', 0, 0),
        ('```json\n[{"bbox_3d":[90,2,3,1,1,1,0,0,0],"label":"chair"}]\n```', 0, 1),
        ('```json\n[{"bbox_3d":[0,0,3,1,1,1,0,0.166667,0]}]\n```', None, 0),  # no label: boxes count, the form does not
    ],
)
def test_boxes_that_are_not_as_asked(response: str, accuracy: float | None, shape: int) -> None:
    found = score(response, _text(TRUTH[:1]), ["bbox3d"])
    assert found.format == shape
    assert found.accuracy == accuracy if accuracy is not None else found.accuracy > 0.95


@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 2**31))
@settings(max_examples=80, deadline=None)
def test_assignments_are_scipys(rows: int, columns: int, seed: int) -> None:
    cost = np.random.default_rng(seed).integers(-5, 6, (rows, columns)).astype(float)
    pairs = assign(cost)
    assert len(pairs) == min(rows, columns) == len({r for r, _ in pairs}) == len({c for _, c in pairs})
    assert sum(cost[r, c] for r, c in pairs) == cost[linear_sum_assignment(cost)].sum()


def test_rewards_are_light_to_import() -> None:
    import subprocess

    code = (
        "import sys, fastvst.rl.rewards.worker; print([m for m in ('torch', 'scipy', 'pyarrow') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
