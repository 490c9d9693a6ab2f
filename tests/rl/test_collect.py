"""The sampling phase: the same groups for a seed, however slow a reward is, on any number of ranks, after a resume."""

from __future__ import annotations

import dataclasses
import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fastvst.data import Ledger, MixtureConfig, Processor, SourceConfig, open_mixture
from fastvst.rl.collect import Collector
from fastvst.rl.filtering import FilterConfig, FilterState
from fastvst.rl.prompts import NoPrompts, PromptStream
from fastvst.rl.rewards.pool import RewardConfig, RewardPool
from fastvst.rl.rollouts import SamplingConfig
from fastvst.train import distributed
from fastvst.train.distributed import ParallelConfig
from ranks import run_ranks
from rl_run import write_questions
from scripted_engine import ScriptedEngine, as_row

# Drops every group whose first completion has an even number of tokens, about half of them.
REWARDS = """
import time
def kept(responses, rows):
    odd = len(responses[0].split()) % 2
    return [float(odd and index) for index in range(len(responses))]
def slow(responses, rows):
    time.sleep(0.002 * (len(responses[0]) % 7))
    return kept(responses, rows)
"""


@dataclasses.dataclass(frozen=True)
class Config:
    """The sections of examples/rl.py that a Collector reads."""

    sampling: SamplingConfig
    filter: FilterConfig
    reward: RewardConfig
    seed: int = 3


@contextmanager
def collector(folder: Path, env: dict[str, str] | None = None, state: dict[str, Any] | None = None, **more: Any):
    """(collector, prompts, engine) of a run on the rows and rewards in `folder`."""
    options = {"function": "kept", "unfinished": "cancel", "tries": 6, "prompts": 5, "epochs": None} | more
    config = Config(
        SamplingConfig(prompts=options["prompts"], answers=3, max_tokens=40, unfinished=options["unfinished"]),
        FilterConfig(tries=options["tries"]),
        RewardConfig(function=f"{folder / 'rewards.py'}:{options['function']}"),
    )
    world = distributed.start(ParallelConfig(device="cpu", threads=1), environment=env or {})
    mixture = MixtureConfig(
        (SourceConfig(str(folder / "questions.jsonl")),), shuffle_buffer=7, epochs=options["epochs"]
    )
    processor = Processor.preset("tiny", max_pixels=56 * 56, max_seq_len=160)
    prompts = PromptStream(open_mixture(mixture), processor, Ledger(), rank=world.rank, size=world.size)
    engine = ScriptedEngine()
    try:
        if state is not None:
            prompts.load_state_dict(state["stream"])
        parked = None if state is None else state["parked"]
        with (
            RewardPool(config.reward) as pool,
            Collector(config, engine, prompts, pool, world, parked) as made,  # type: ignore[arg-type]
        ):
            yield made, prompts, engine
    finally:
        distributed.stop(world)


def steps(made: Collector, count: int, filtered: FilterState | None = None, first: int = 0) -> list[Any]:
    """`count` steps as examples/rl.py makes them."""
    found = []
    filtered = filtered or FilterState()
    for step in range(first, first + count):
        found.append(made.collect(step, filtered))
        filtered = found[-1].filtered
        made.prepare(filtered)
    return found


def rows(found: list[Any]) -> list[list[dict[str, Any]]]:
    return [[as_row(record) for record in part.records] for part in found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("collect")
    write_questions(folder, 40, image_every=4)
    (folder / "rewards.py").write_text(REWARDS)
    return folder


@pytest.fixture(scope="module")
def plain(folder: Path) -> list[list[dict[str, Any]]]:
    """The records of four steps."""
    with collector(folder) as (made, _, _):
        return rows(steps(made, 4))


def test_a_step_has_the_first_kept_groups_in_the_order_of_the_data(folder: Path, plain: list) -> None:
    numbers = [row["number"] for step in plain for row in step]
    assert numbers == list(range(len(numbers))), "no prompt is left out, and none comes twice"
    assert all([row["verdict"] for row in step].count("keep") == 5 for step in plain)
    assert all(step[-1]["verdict"] == "keep" for step in plain), "a step ends with the group that fills it"
    assert all(len(row["texts"]) == 3 and row["finishes"] != ["cancelled"] * 3 for step in plain for row in step)
    with collector(folder) as (made, _, _):
        found = steps(made, 4)
    drawn = sum(len(step) for step in plain)
    equal = sum(row["verdict"] == "equal" for step in plain for row in step)
    assert found[-1].filtered == FilterState(drawn, 0, 0, equal) and equal > 2
    assert all(set(part.seconds) == {"rollout", "prefill", "decode", "reward", "encode"} for part in found)
    assert all(0 <= part.figures["thrown_away"] < 0.6 and part.figures["stale"] == 0 for part in found)


@pytest.mark.parametrize("unfinished", ["cancel", "park"])
def test_a_slow_reward_changes_nothing(folder: Path, unfinished: str) -> None:
    found = []
    for function in ("kept", "slow"):
        with collector(folder, function=function, unfinished=unfinished) as (made, _, engine):
            found.append((rows(steps(made, 3)), engine.asked))
    assert found[0] == found[1]


@pytest.mark.parametrize("unfinished", ["cancel", "park"])
def test_a_resumed_run_has_the_groups_of_an_uninterrupted_one(folder: Path, unfinished: str) -> None:
    with collector(folder, unfinished=unfinished) as (made, _, _):
        whole = rows(steps(made, 5))
    with collector(folder, unfinished=unfinished) as (made, prompts, _):
        first = steps(made, 2)
        state = json.loads(json.dumps({"stream": prompts.state_dict(), "parked": made.state_dict()}))
        assert bool(state["parked"]["parked"]) == (unfinished == "park")
    with collector(folder, unfinished=unfinished, state=state) as (made, _, _):
        rest = steps(made, 3, first[-1].filtered, first=2)
    assert rows(first) + rows(rest) == whole


def test_what_is_parked_continues_and_nothing_is_thrown_away(folder: Path) -> None:
    with collector(folder, unfinished="park") as (made, prompts, engine):
        found = steps(made, 4)
    assert [r["number"] for step in rows(found) for r in step] == list(range(sum(len(p.records) for p in found)))
    assert all(part.figures["thrown_away"] == 0 for part in found)
    assert found[0].figures["stale"] == 0 and any(part.figures["stale"] > 0 for part in found[1:])
    for step, part in enumerate(found):
        for record, group in part.kept:
            for answer, text, versions in zip(group.answers, record.texts, record.versions or [[]] * 3, strict=True):
                assert len(answer.tokens) == len(answer.logprobs) <= 40
                if record.versions:
                    assert sum(count for _, count in versions) == len(answer.tokens)
                    assert all(version <= step for version, _ in versions)
                    assert text == prompts.processor.decode(answer.tokens.tolist())
    longer = {number: max(size for n, size in engine.asked if n == number) for number, _ in engine.asked}
    assert any(longer[number] > size for number, size in engine.asked), "a continuation has the tokens before it"


def _ranks(env: dict[str, str], folder: str, unfinished: str) -> list[list[dict[str, Any]]]:
    with collector(Path(folder), env, unfinished=unfinished) as (made, _, _):
        return rows(steps(made, 4))


def test_two_ranks_have_the_groups_of_one(folder: Path, plain: list) -> None:
    ranks = run_ranks(_ranks, 2, str(folder), "cancel")
    for step, expected in enumerate(plain):
        together = sorted((row for rank in ranks for row in rank[step]), key=lambda row: row["number"])
        assert together == expected
    assert all(any(rank[step] for step in range(4)) for rank in ranks), "both ranks have groups"


def test_two_ranks_park_and_continue_where_the_tokens_are(folder: Path) -> None:
    ranks = run_ranks(_ranks, 2, str(folder), "park")
    numbers = [sorted(row["number"] for rank in ranks for row in rank[step]) for step in range(4)]
    assert [n for step in numbers for n in step] == list(range(sum(map(len, numbers))))
    assert any(row["versions"] for rank in ranks for step in rank for row in step)


def test_a_prompt_that_cannot_be_encoded_is_replaced_and_recorded(folder: Path, tmp_path: Path) -> None:
    path = write_questions(tmp_path, 12, image_every=3)
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:200])  # its header is whole
    assert path.exists()
    with collector(tmp_path, prompts=4, epochs=1) as (made, prompts, _):
        found = [made.collect(0, FilterState())]
        while True:
            try:
                found.append(made.collect(len(found), found[-1].filtered))
            except NoPrompts as error:
                assert "the data end after 12 prompts" in str(error)
                break
    ids = {record.prompt.sample.id for part in found for record in part.records}
    assert ids == {str(i) for i in range(12)} - {"3"} and prompts.ledger.total == 1


def test_without_a_filter_each_prompt_is_asked_once(folder: Path) -> None:
    with collector(folder, tries=0) as (made, _, engine):
        found = steps(made, 2)
    assert [len(part.kept) for part in found] == [5, 5] and found[1].figures["thrown_away"] == 0
    assert [number for number, _ in engine.asked] == list(range(10))
