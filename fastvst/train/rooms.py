"""The rendered rooms that a training script uses when data.sources is empty."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from fastvst.config import ConfigError
from fastvst.data import MixtureConfig, SourceConfig
from fastvst.train.distributed import World

if TYPE_CHECKING:
    from fastvst.generate.rooms import RoomsConfig


@dataclass(frozen=True)
class RoomsOptions:
    """The rendered rooms, which are used when data.sources is empty.

    Attributes:
        samples: rows to train on.
        heldout: rows about other rooms, for the evaluation; the tasks have equal shares.
        seed: random seed of the rooms.
        workers: rendering processes.
        folder: where the rows are cached; none = the user's cache folder.
    """

    samples: int = 8760
    heldout: int = 1200
    seed: int = 0
    workers: int = 2
    folder: str | None = None


def find_data(data: MixtureConfig, rooms: RoomsOptions, world: World) -> tuple[MixtureConfig, tuple[str, str] | None]:
    """The mixture to train on; for rooms also the folders of (training rows, held-out rows).

    Raises:
        ConfigError: so few rows that a task has none. The report needs some: its baselines come from them.
    """
    if data.sources:
        return data, None
    from fastvst.generate.presets import LEARNABLE
    from fastvst.generate.rooms import apportion

    shares = LEARNABLE.shares or {}
    without = shares.keys() - set(apportion(shares, rooms.samples))
    if without:
        least = math.ceil(sum(shares.values()) / min(shares.values())) + 1
        names = ", ".join(sorted(without))
        raise ConfigError(
            f"rooms.samples is {rooms.samples}, which leaves no row of {names}; expected at least {least}"
        )
    train = make_rooms(world, rooms, "train", rooms.samples, LEARNABLE, seed=rooms.seed)
    source = SourceConfig(path=train, name="rooms")
    return dataclasses.replace(data, sources=(source,)), (train, heldout_rooms(rooms, world))


def heldout_rooms(rooms: RoomsOptions, world: World) -> str:
    """The folder of rows about rooms that training never sees."""
    from fastvst.generate.presets import HELDOUT

    return make_rooms(world, rooms, "heldout", rooms.heldout, HELDOUT, seed=rooms.seed)


class Place(Protocol):
    """Where rows are cached, and the number of rendering processes."""

    @property
    def folder(self) -> str | None: ...
    @property
    def workers(self) -> int: ...


def make_rooms(world: World, place: Place, split: str, samples: int, rows: RoomsConfig, *, seed: int) -> str:
    """The folder of `samples` rows, rendered by the first process of each node if they are not cached."""
    from fastvst.generate.rooms_subprocess import make_rooms_in_subprocess

    return world.once_per_node(
        f"rooms {split}",
        lambda: make_rooms_in_subprocess(place.folder, samples, seed, place.workers, rows, split=split),
    )
