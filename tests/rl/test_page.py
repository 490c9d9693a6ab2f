"""rollouts.jsonl and the page: everything is there, and nothing that a model wrote can act."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastvst.data import Ledger, Sample
from fastvst.rl.heldout import evaluation_row, read_questions, write_evaluation
from fastvst.rl.page import visible, write_report
from fastvst.rl.prompts import Prompt, make_prompt
from fastvst.rl.records import GroupRecord, RolloutLog, progress_text, step_figures
from fastvst.rl.rewards.verifiable import Reward
from fastvst.train import distributed
from fastvst.train.distributed import ParallelConfig

UGLY = ["<script>alert(1)</script>", "\x00\x1b[31m\x7f", "half \ud83d a character", "", "x" * 50_000]
WORLD = distributed.start(ParallelConfig(device="cpu", threads=1), environment={})


def question(number: int = 0, room: int = 0, task: str = "size") -> Prompt:
    image = Image.fromarray(np.full((40, 60, 3), 128, dtype=np.uint8))
    messages = [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "<b>how</b>?"}]}
    ]
    sample = Sample.from_messages(
        messages, id=f"q{number}", answer={"type": "number", "value": 3}, metadata={"task": task, "room_seed": room}
    )
    return make_prompt(sample, number=number)


def asked(number: int, texts: list[str], rewards: list[float], verdict: str = "keep", **more: object) -> GroupRecord:
    scored = [Reward(r, 1.0, 0.5 + r / 2, "mra") for r in rewards]
    lengths = [len(t) for t in texts]
    finishes = ["length" if len(t) > 100 else "stop" for t in texts]
    return GroupRecord(question(number, **more), texts, lengths, finishes, scored, [0.0] * len(texts), verdict)  # type: ignore[arg-type]


def test_the_log_has_every_answer_and_a_resumed_run_writes_its_steps_again(tmp_path: Path) -> None:
    group = asked(0, UGLY, [0, 0, 1, 0, 0])
    group.advantages = [-0.5, -0.5, 2.0, -0.5, -0.5]
    log = RolloutLog(tmp_path, rank=0, first_step=0)
    for step in range(3):
        log.write(step, [group, asked(1, ["3"], [1], "too_easy")])
    rows = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [0, 0, 1, 1, 2, 2] and [r["verdict"] for r in rows[:2]] == ["keep", "too_easy"]
    assert [a["text"] for a in rows[0]["answers"]] == UGLY and rows[0]["answers"][2]["advantage"] == 2
    assert len(rows[0]["pictures"]) == 1 and rows[1]["pictures"] == [] and (tmp_path / rows[0]["pictures"][0]).exists()
    with (tmp_path / "rollouts.jsonl").open("a") as file:
        file.write('{"step": 2, "torn')
    log = RolloutLog(tmp_path, rank=0, first_step=2)
    log.write(2, [group])
    rows = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [0, 0, 1, 1, 2]


def test_the_page_escapes_what_models_and_rows_say(tmp_path: Path) -> None:
    group = asked(0, UGLY, [0, 0, 1, 0, 0], task="<i>task</i>")
    log = RolloutLog(tmp_path, rank=0, first_step=0)
    log.write(0, [group])
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "reward": 0.5, "answers": 5}\n')
    row = evaluation_row(0, [question(0)], [asked(0, ["3"], [1.0])], WORLD)
    write_evaluation(tmp_path, row, WORLD)
    html = write_report(tmp_path, {"out": "</pre><script>"}).read_text(encoding="utf-8")
    assert "<script>" not in html and "<b>how" not in html and "<i>task" not in html
    assert "&lt;script&gt;alert(1)" in html and "\u2400\u241b[31m\ufffd" in html and "(empty)" in html
    assert len(html) < 60_000 and "data:image/jpeg;base64," in html and "advantage" in html
    assert visible("a\tb\nc") == "a\tb\nc"


def test_held_out_rewards_have_intervals_over_rooms_and_take_the_place_of_older_rows(tmp_path: Path) -> None:
    questions = [question(i, room=i // 2, task="size" if i < 4 else "gap") for i in range(6)]
    answers = [asked(i, ["a", "b"], [1.0, 0.0] if i < 4 else [0.0, 0.0]) for i in range(5)]  # one could not be asked
    row = evaluation_row(10, questions, answers, WORLD)
    assert row["questions"] == 5 and row["accuracy"] == 0.4 and row["reward"] == 0.7
    assert row["tasks"]["size"]["reward"] == 0.75 and row["tasks"]["gap"]["questions"] == 1
    assert row["low"] <= row["reward"] <= row["high"]
    for step in (0, 10, 20, 10):
        text = write_evaluation(tmp_path, row | {"step": step}, WORLD)
    assert "reward 0.7000" in text
    assert [json.loads(line)["step"] for line in (tmp_path / "evaluation.jsonl").read_text().splitlines()] == [0, 10]


def test_questions_that_cannot_be_read_are_in_the_ledger(tmp_path: Path) -> None:
    rows: list[dict] = [{"id": str(i), "question": "why", "answer": "x"} for i in range(4)]
    rows[1] = {"id": "1", "question": "why"}
    rows[2] = {"id": "2"}
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    ledger = Ledger()
    assert [(q.number, q.sample.id) for q in read_questions(tmp_path / "rows.jsonl", 9, ledger)] == [(0, "0"), (1, "3")]
    assert ledger.counts == {"no_answer": 1, "bad_schema": 1}
    assert len(read_questions(tmp_path / "rows.jsonl", 1, Ledger())) == 1


def test_the_figures_of_a_step() -> None:
    groups = [asked(0, ["ab", "x" * 200], [1.0, 0.0]), asked(1, ["c", "d"], [0, 0], "too_hard")]
    groups[0].penalties = [0.0, -0.5]
    found = step_figures(groups, WORLD)
    assert (found["questions"], found["kept"], found["too_hard"], found["answers"]) == (2, 1, 1, 4)
    assert found["reward"] == (1.0 + 0.0 + 0.5 + 0.5) / 4 == found["reward/mra"]
    assert (found["accuracy"], found["clipped"], found["length_max"]) == (0.25, 0.25, 200)
    assert found["answer_tokens"] == 204 and step_figures([], WORLD)["reward"] == 0
    parts = ("prefill", "decode", "reward", "update")
    timing = {f"{p}_seconds": 1.0 for p in parts} | {f"{p}_tokens_per_s": 5.0 for p in parts}
    more = {
        "step": 0,
        "loss": 0.1,
        "lr": 1e-3,
        "grad_norm": 1.0,
        "seconds": 4.0,
        "token_saving": 2.5,
        "split_groups": 3.0,
        "memory_gib": 1.0,
    }
    text = progress_text(found | timing | more | {"eta": 60.0}, 10)
    for part in ("reward 0.5000 (mra 0.500)", "groups 1/2", "max 200", "2.50x", "decode 1.0", "3 groups did not fit"):
        assert part in text
    assert torch.get_num_threads() >= 1
