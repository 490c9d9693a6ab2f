"""Rewards: each of VST's rules, and comparisons with the benchmarks' own scores."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvst.evaluate.vsi_bench import mean_relative_accuracy
from fastvst.rl import rewards
from fastvst.rl.rewards.verifiable import levenshtein, overlong, score

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
        ("<think>a<think>b</think></think> B", 0),
        ("<think>a</think></think></think> B", 0),
        ("<think><think>a</think> B", 0),
        ("</think> a <think> B", 0),
        ("<think>a</think> B <THINK>", 0),
        ("<think>a</ think></think> B", 0),
        ("", 0),
    ],
)
def test_the_format_is_one_thought_with_an_answer_after_it(response: str, expected: int) -> None:
    found = score(response, "B", ["multi_choices_score"])
    assert found.format == expected
    assert found.overall == pytest.approx(0.5 * found.accuracy + 0.5 * expected)


def test_a_direct_answer_has_the_format_unless_it_is_empty() -> None:
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
        ("multi_choices", "the left one", "the right one", 0),  # without a letter on both sides there is no match
        ("multi_choices", "b", "B", 1),  # case is ignored
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


def test_math_is_checked_by_value() -> None:
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


def test_a_typed_answer_is_scored_by_its_type() -> None:
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
def test_mra_equals_the_benchmarks(truth: float, given_: float) -> None:
    truth = round(truth, 3)
    given_ = round(given_, 3)
    ours = score(f"{given_:f}", f"{truth:f}", ["mra"]).accuracy
    theirs = mean_relative_accuracy(given_, truth)
    assert ours == pytest.approx(theirs, abs=0.11)  # rounding may move the error across one threshold
    if all(abs(abs(given_ - truth) / truth - t) > 1e-6 for t in np.linspace(0, 0.5, 11)):
        assert ours == pytest.approx(theirs)


@given(st.text("ab c", max_size=8), st.text("ab c", max_size=8), st.text("ab c", max_size=8))
@settings(max_examples=60, deadline=None)
def test_edit_distance_is_a_metric_with_bounds_from_the_lengths(a: str, b: str, c: str) -> None:
    d = levenshtein(a, b)
    assert d == levenshtein(b, a) and abs(len(a) - len(b)) <= d <= max(len(a), len(b))
    assert (d == 0) == (a == b) and levenshtein(a, c) <= d + levenshtein(b, c)
    assert levenshtein("x" + a, "x" + b) == d


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


def test_overlong_is_the_ramp_of_dapo() -> None:
    assert [overlong(n, 100, 20) for n in (0, 80, 90, 100, 120)] == [0, 0, -0.5, -1, -1]
    assert overlong(100, 100, 0) == 0
