"""rollouts.jsonl, and the figures of a step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastvst.rl.packing import Sharing
from fastvst.rl.page import write_report
from fastvst.rl.policy_update import UpdateConfig
from fastvst.rl.records import PARTS, RolloutLog, progress_text, step_figures, step_rates
from fastvst.rl.rewards.verifiable import Reward
from fastvst.train import distributed
from fastvst.train.distributed import ParallelConfig
from rl_records import UGLY_TEXTS, record

WORLD = distributed.start(ParallelConfig(device="cpu", threads=1), environment={})


def test_the_log_has_every_completion_and_a_resumed_run_replaces_its_steps(tmp_path: Path) -> None:
    group = record(0, UGLY_TEXTS, [0, 0, 1, 0, 0])
    group.advantages = [-0.5, -0.5, 2.0, -0.5, -0.5]
    log = RolloutLog(tmp_path, rank=0, done=0)
    for step in (1, 2, 3):
        log.write(step, [group, record(1, ["3"], [1], "too_easy")])
    rows = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 1, 2, 2, 3, 3] and [r["verdict"] for r in rows[:2]] == ["keep", "too_easy"]
    assert [a["text"] for a in rows[0]["answers"]] == UGLY_TEXTS and rows[0]["answers"][2]["advantage"] == 2
    assert len(rows[0]["pictures"]) == 1 and rows[1]["pictures"] == [] and (tmp_path / rows[0]["pictures"][0]).exists()
    with (tmp_path / "rollouts.jsonl").open("a") as file:
        file.write('{"step": 3, "torn')
    log = RolloutLog(tmp_path, rank=0, done=2)
    log.write(3, [group])
    rows = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 1, 2, 2, 3]


def test_the_figures_of_a_step_are_means_over_all_completions() -> None:
    groups = [record(0, ["ab", "x" * 200], [1.0, 0.0]), record(1, ["c", "d"], [0, 0], "too_hard")]
    groups[0].penalties = [0.0, -0.5]
    found = step_figures(groups, WORLD)
    assert (found["questions"], found["kept"], found["too_hard"], found["answers"]) == (2, 1, 1, 4)
    assert found["reward"] == (1.0 + 0.0 + 0.5 + 0.5) / 4 == found["reward/mra"]
    assert (found["accuracy"], found["clipped"], found["length_max"]) == (0.25, 0.25, 200)
    assert found["answer_tokens"] == 204 and step_figures([], WORLD)["reward"] == 0
    parts = ("prefill", "decode", "reward", "update")
    timing = {f"{p}_seconds": 1.0 for p in parts} | {f"{p}_tokens_per_s": 5.0 for p in parts}
    update = {"step": 1, "loss": 0.1, "lr": 1e-3, "grad_norm": 1.0, "token_saving": 2.5, "split_groups": 3.0}
    text = progress_text(found | timing | update | {"seconds": 4.0, "memory_gib": 1.0, "eta": 60.0}, 10)
    for part in ("reward 0.5000 (mra 0.500)", "groups 1/2", "max 200", "2.50x", "decode 1.0", "3 groups did not fit"):
        assert part in text


def test_a_completion_without_a_score_has_no_number_in_the_log(tmp_path: Path) -> None:
    group = record(0, ["a", "b"], [1.0, 1.0])
    group.rewards = [Reward(0.0, 0.0, 0.0, "error: KeyError"), Reward(1.0, 1.0, 1.0, "mra")]
    RolloutLog(tmp_path, rank=0, done=0).write(1, [group])
    first, second = json.loads((tmp_path / "rollouts.jsonl").read_text())["answers"]
    assert [first[k] for k in ("accuracy", "format", "overall", "reason")] == [None, None, None, "error: KeyError"]
    assert [second[k] for k in ("accuracy", "format", "overall")] == [1.0, 1.0, 1.0]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5, "answers": 2}\n')
    assert "no score" in write_report(tmp_path, {}).read_text(encoding="utf-8")


@pytest.mark.parametrize("missing", ["prefill", "decode", "update"])
def test_a_part_that_took_no_time_has_no_rate(missing: str) -> None:
    """A server reports no seconds of prefill: 595 tokens in 0 seconds are not 595,000,000,000 tokens/s."""
    seconds = dict.fromkeys((*PARTS, "step"), 2.0) | {missing: 0.0}
    counts = {"prompt_tokens": 595, "images": 0, "completion_tokens": 100.0}
    found = step_rates(Sharing(shared=300, repeated=400), seconds, WORLD, update=UpdateConfig(), **counts)
    rates = {"prefill": 297.5, "decode": 50.0, "update": 150.0}
    parts = {k.removesuffix("_tokens_per_s"): v for k, v in found.items() if k.endswith("_tokens_per_s")}
    assert parts == {part: rate for part, rate in rates.items() if part != missing}
    row = step_figures([], WORLD) | found | {"step": 1, "loss": 0.0, "lr": 1.0, "grad_norm": 0.0}
    text = progress_text(row | {"memory_gib": 1.0, "eta": 1.0}, 10)
    assert f"{missing} not measured" in text and "000,000" not in text
