"""The rooms of the training scripts: which rows they have, and how few are too few."""

from __future__ import annotations

import re

import pytest

from fastvst.config import ConfigError
from fastvst.data import MixtureConfig, SourceConfig
from fastvst.generate.presets import HELDOUT, LEARNABLE
from fastvst.train import distributed, rooms
from fastvst.train.distributed import ParallelConfig, World
from fastvst.train.rooms import RoomsOptions, find_data


@pytest.fixture
def world() -> World:
    return distributed.start(ParallelConfig(device="cpu", threads=1), environment={})


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What would be rendered."""
    calls: list[tuple] = []

    def make(world: World, place: RoomsOptions, split: str, samples: int, config: object, *, seed: int) -> str:
        calls.append((split, samples, config, seed))
        return f"/rows/{split}"

    monkeypatch.setattr(rooms, "make_rooms", make)
    return calls


def test_training_rows_are_learnable_and_held_out_rows_of_equal_shares(world: World, made: list[tuple]) -> None:
    mixture, found = find_data(MixtureConfig(sources=()), RoomsOptions(seed=3), world)
    assert [source.path for source in mixture.sources] == ["/rows/train"] and found == ("/rows/train", "/rows/heldout")
    assert made == [("train", 8760, LEARNABLE, 3), ("heldout", 1200, HELDOUT, 3)]
    own = MixtureConfig(sources=(SourceConfig(path="own.jsonl"),))
    assert find_data(own, RoomsOptions(), world) == (own, None) and len(made) == 2


def test_too_few_rows_for_a_task_are_refused_before_anything_is_rendered(world: World, made: list[tuple]) -> None:
    with pytest.raises(ConfigError, match="no row of detection_3d") as refused:
        find_data(MixtureConfig(sources=()), RoomsOptions(samples=40), world)
    least = int(re.search(r"at least (\d+)", str(refused.value))[1])
    assert not made
    find_data(MixtureConfig(sources=()), RoomsOptions(samples=least), world)
    assert made[0][1] == least
