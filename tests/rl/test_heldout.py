"""Held-out prompts and their rows."""

from __future__ import annotations

import json
from pathlib import Path

from fastvst.data import Ledger, MixtureConfig, Processor, SourceConfig, open_mixture
from fastvst.rl.heldout import evaluation_row, read_prompts, write_evaluation
from fastvst.rl.prompts import PromptStream
from fastvst.train import distributed
from fastvst.train.distributed import ParallelConfig
from rl_records import question, record

WORLD = distributed.start(ParallelConfig(device="cpu", threads=1), environment={})


def test_evaluations_have_intervals_over_rooms_and_replace_rows_of_later_steps(tmp_path: Path) -> None:
    questions = [question(i, room=i // 2, task="size" if i < 4 else "gap") for i in range(6)]
    records = [
        record(i, ["a", "b"], [1.0, 0.0] if i < 4 else [0.0, 0.0]) for i in range(5)
    ]  # no group for the last one
    row = evaluation_row(10, questions, records, WORLD)
    assert row["questions"] == 5 and row["accuracy"] == 0.4 and row["reward"] == 0.7
    assert row["tasks"]["size"]["reward"] == 0.75 and row["tasks"]["gap"]["questions"] == 1
    assert row["low"] <= row["reward"] <= row["high"]
    for step in (0, 10, 20, 10):
        text = write_evaluation(tmp_path, row | {"step": step}, WORLD)
    assert "reward 0.7000" in text
    assert [json.loads(line)["step"] for line in (tmp_path / "evaluation.jsonl").read_text().splitlines()] == [0, 10]


def test_unusable_questions_are_in_the_ledger(tmp_path: Path) -> None:
    rows: list[dict] = [{"id": str(i), "question": "why", "answer": "x"} for i in range(4)]
    rows[1] = {"id": "1", "question": "why"}
    rows[2] = {"id": "2"}
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    ledger = Ledger()
    config = MixtureConfig((SourceConfig(str(tmp_path / "rows.jsonl")),))
    stream = PromptStream(open_mixture(config), Processor.preset("tiny"), ledger)
    assert [(q.number, q.sample.id) for q in read_prompts(tmp_path / "rows.jsonl", 9, stream)] == [(0, "0"), (1, "3")]
    assert ledger.counts == {"no_answer": 1, "bad_schema": 1}
    assert len(read_prompts(tmp_path / "rows.jsonl", 1, stream)) == 1
