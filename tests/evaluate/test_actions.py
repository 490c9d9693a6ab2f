"""Scores of robot actions: token accuracy and errors by hand, malformed answers, and the evaluation of a run."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from action_data import actions, write_libero
from fastvst.data.sources import open_source
from fastvst.data.sources.action_rows import ActionRows
from fastvst.evaluate.actions import action_questions, errors, max_new_tokens, score
from fastvst.evaluate.rooms import prompt
from fastvst.evaluate.training_page import write_report
from small_run import arguments, load_script, write_model

OPTIONS = ActionRows("text", 999, chunk=2)


@pytest.fixture
def rows(tmp_path):
    write_libero(tmp_path / "open_it_demo.hdf5", {"demo_0": actions(6)})
    return action_questions(list(open_source(tmp_path, actions=OPTIONS)))


def test_right_answers_have_no_error(rows) -> None:
    texts = [row.answer for row in rows]
    assert score(OPTIONS, rows, texts, {})[0] == 1.0
    assert errors(OPTIONS, rows, texts) == {
        "well-formed": 1.0,
        "gripper right": 1.0,
        "position, m": 0.0,
        "rotation, degrees": 0.0,
    }
    assert all(m["role"] != "assistant" for m in prompt(rows[0]).messages)


def test_errors_are_distances_in_metres_and_degrees(rows) -> None:
    texts = []
    for row in rows:
        chunk = OPTIONS.codec.decode(row.answer)
        chunk = np.clip(chunk, -0.8, 0.8)
        row.__dict__["answer"] = OPTIONS.codec.encode(chunk)
        true = OPTIONS.codec.decode(row.answer)
        other = true + np.array([0.1, 0, 0, 0, 0.2, 0, 0])
        other[1, 6] = -true[1, 6] if abs(true[1, 6]) > 0.3 else true[1, 6] + 0.7  # another command of the gripper
        texts.append(OPTIONS.codec.encode(other))
    found = errors(OPTIONS, rows, texts)
    assert found["position, m"] == pytest.approx(0.1 * 0.05, rel=0.02)
    assert found["rotation, degrees"] == pytest.approx(math.degrees(0.5) * 0.2, rel=0.02)
    assert found["gripper right"] == 0.5
    assert score(OPTIONS, rows, texts, {})[0] == pytest.approx((14 - 5) / 14)


def test_malformed_answers_are_wrong_and_counted(rows) -> None:
    texts = [row.answer for row in rows[:3]] + [None, "", "left a bit"]
    assert score(OPTIONS, rows, texts, {})[0] == 0.5
    assert errors(OPTIONS, rows, texts)["well-formed"] == 0.5
    assert errors(OPTIONS, rows, [None] * 6) == {"well-formed": 0.0}
    assert max_new_tokens(OPTIONS) == 14 * 4 + 1 and max_new_tokens(ActionRows(chunk=3)) == 22


@pytest.mark.slow
def test_a_run_reports_them(tmp_path) -> None:
    write_libero(tmp_path / "train_demo.hdf5", {"demo_0": actions(20)})
    write_libero(tmp_path / "held_demo.hdf5", {"demo_0": actions(6, seed=1)})
    table = 'actions = {kind = "text", bins = 999}'
    options = [
        "steps=4",
        "evaluation.every=2",
        f'evaluation.path=[{{path = "{tmp_path}/held_demo.hdf5", {table}}}]',
        f'data.sources=[{{path = "{tmp_path}/train_demo.hdf5", {table}}}]',
        "processor.max_seq_len=512",
        "loader.tokens_per_pack=1024",
    ]
    sft = load_script()
    sft.main(arguments(tmp_path / "run", tmp_path, write_model(tmp_path / "model"), *options))
    last = json.loads((tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 4 and 0 <= last["accuracies"]["held_demo"] <= 1
    assert 0 <= last["errors"]["held_demo"]["well-formed"] <= 1
    assert "Errors of robot actions" in (tmp_path / "run" / "report" / "index.html").read_text()
    assert "well-formed, held_demo" in (tmp_path / "run" / "hf" / "README.md").read_text()


def test_the_page_of_a_run_draws_the_error_of_the_position(tmp_path) -> None:
    def row(step: int, error: float | None) -> dict:
        found = {"well-formed": 0.0} if error is None else {"well-formed": 1.0, "position, m": error}
        evaluation = {"step": step, "accuracy": 0.5, "accuracies": {"held": 0.5}, "errors": {"held": found}}
        return {"step": step, "loss": 1.0, "evaluation": {**evaluation, "best_step": step}}

    lines = [row(1, None), row(2, 0.031), row(3, 0.0123)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    page = write_report(tmp_path / "report", tmp_path / "metrics.jsonl", None, {}).read_text()
    assert "Errors of robot actions" in page and "held: error, m" in page and "0.0123" in page
