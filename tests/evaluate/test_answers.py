import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from answer_pairs import pairs
from fastvst.evaluate.answers import chosen_option, score
from fastvst.evaluate.options import stated_letter
from fastvst.evaluate.quantities import quantities, read_number
from fastvst.evaluate.statistics import best_constant, bootstrap
from fastvst.evaluate.units import UNITS, named_unit

BOX = {"bbox_3d": [0.1, 0.2, 2.5, 1.0, 0.8, 0.6, 0.0, 0.25, 0.0], "label": "chair"}


def fenced(boxes):
    return "```json\n[\n" + ",\n".join("\t" + json.dumps(b, separators=(",", ":")) for b in boxes) + "\n]\n```"


@pytest.mark.parametrize(
    "response, value, expected",
    [
        ("trash can", "trash can", 1),
        (" The Trash  Can. ", "trash can", 1),
        ("can", "trash can", 0),
        ("", "left", 0),
        ("D point-D", "D point-D", 1),
        ("D. left and forward", "D. left and forward", 1),
        ("D", "D. left and forward", 1),
        ("A. left and forward", "D. left and forward", 0),
        ("Distance[a, b]=0.7m\nDistance[a, c]=1.2m\nSo, the answer is blinds.", "blinds", 1),
        ("<think>left, no, right</think> left", "left", 1),
    ],
)
def test_text(response, value, expected):
    assert score(response, {"type": "text", "value": value}) == expected


@pytest.mark.parametrize(
    "response, expected",
    [("71 cm", 1), ("0.71 m", 1), ("about 80", 0), ("75", 1), ("", 0), ("1,071 cm", 0), ("tall", 0), ("-71", 0)],
)
def test_number(response, expected):
    assert score(response, {"type": "number", "value": 71.0, "unit": "cm", "tolerance": 0.1}) == expected


def test_hand_made_pairs():
    found = [(answer["value"], response, score(response, answer), wanted) for answer, response, wanted in pairs()]
    assert len(found) > 300
    assert [pair for pair in found if pair[2] != pair[3]] == []


@given(st.integers(1, 10_000), st.sampled_from(sorted(UNITS)), st.sampled_from(sorted(UNITS)))
def test_a_number_may_be_written_in_any_unit_of_its_dimension(count, unit, other):
    value = count / 8
    factor = UNITS[unit].factor / UNITS[other].factor
    answer = {"type": "number", "value": value, "unit": unit, "tolerance": 1e-6}
    same = UNITS[unit].dimension == UNITS[other].dimension
    assert score(f"{value * factor:.12g} {other}", answer) == same
    if same:
        assert score(f"{value * factor * 1.01:.12g} {other}", answer) == 0


@given(st.sampled_from(["chair", "left", "71 cm", "armchair", "B. left", "red car", "sofa"]), st.booleans())
def test_an_article_never_changes_a_verdict(text, lettered):
    options = ["right", "left", "armchair", "chair"]
    answers = [{"type": "text", "value": truth} for truth in ("chair", "A chair", "A", "B. left", "the red car")]
    answers.append({"type": "number", "value": 71.0, "unit": "cm", "tolerance": 0.1})
    answers.append({"type": "choice", "value": "left", "candidates": options, "letter": "B"})
    for answer in answers:
        for article in ("a", "an", "the", "A", "An", "The"):
            for said in (text, f"The answer is {text}") if lettered else (text,):
                with_article = said.replace(text, f"{article} {text}")
                assert text == "B. left" or score(with_article, answer) == score(said, answer), (answer, with_article)


@pytest.mark.parametrize(
    "text", ["A chair", "a chair", "I think so", "I see a dog", "A dog and a cat", "In a room", ""]
)
def test_articles_and_pronouns_are_no_letters(text):
    assert stated_letter(text) is None
    assert stated_letter(f"The answer is {text}") is None


def test_a_letter_with_the_text_of_another_option_states_none():
    options = ["left", "right", "left and forward"]
    assert chosen_option("A. left", options) == "left"
    assert chosen_option("The answer is C. left and forward", options) == "left and forward"
    assert chosen_option("A. left and forward", options) is None
    assert chosen_option("B. left", options) is None
    assert chosen_option("D", options) is None
    assert chosen_option("A chair", ["table", "chair"]) == "chair"


@given(st.text(alphabet="0123456789.,/-x ~e^'\"°½mcinft()to", max_size=24))
def test_any_text_is_read_without_an_error(text):
    assert all(q.low <= q.high and q.start < q.end for q in quantities(text))
    read_number(text, "cm")
    stated_letter(text)
    named_unit(text)


def test_boxes():
    other = BOX | {"label": "table"}
    moved = BOX | {"bbox_3d": [3.0] + BOX["bbox_3d"][1:]}
    in_degrees = BOX | {"bbox_3d": BOX["bbox_3d"][:6] + [0.0, 45.0, 0.0]}
    answer = {"type": "boxes", "value": [in_degrees]}
    assert score(fenced([BOX]), answer) == 1.0
    assert score(fenced([moved]), answer) == 0.0
    assert score(fenced([other]), answer) == 0.0, "labels are compared"
    assert score(fenced([BOX, moved]), answer) == pytest.approx(2 / 3)
    assert score(fenced([BOX, BOX]), answer) == pytest.approx(2 / 3), "a true box is matched once"
    assert score("no boxes", answer) == 0.0
    assert score("```json\n[]\n```", {"type": "boxes", "value": []}) == 1.0


def test_unknown_type_is_an_error():
    with pytest.raises(ValueError, match="unknown answer type"):
        score("x", {"type": "poem", "value": "x"})


def test_bootstrap_equals_the_normal_interval_for_independent_scores():
    scores = np.random.default_rng(1).random(400) < 0.3
    interval = bootstrap(scores.astype(float).tolist(), range(400))
    half = 1.96 * np.sqrt(0.3 * 0.7 / 400)
    assert interval.mean == pytest.approx(scores.mean())
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.15)


def test_bootstrap_is_wider_when_questions_share_rooms():
    scores = np.repeat(np.random.default_rng(2).random(40) < 0.5, 10).astype(float).tolist()
    alone = bootstrap(scores, range(400))
    shared = bootstrap(scores, np.repeat(np.arange(40), 10).tolist())
    assert shared.high - shared.low > 2 * (alone.high - alone.low)


def test_best_constant_beats_the_most_frequent_number():
    values = [50, 50, 50] + list(range(96, 105))  # 50 is the mode, but 100 is within 5 % of nine values
    gold = [{"type": "number", "value": float(v), "unit": "cm", "tolerance": 0.05} for v in values]
    assert 96 <= float(best_constant([f"{v} cm" for v in values], gold, score).split()[0]) <= 104
