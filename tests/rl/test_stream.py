"""The stream of a step: the groups that it uses do not depend on time or on the number of ranks; few others start."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvst.rl.stream import DROPPED, KEPT, RUNNING, GroupStream

N = 4  # completions of a group


def play(stream: GroupStream, keep: Callable[[int], bool], ends: Callable[[int], int], data: int = 10**6) -> int:
    """Run a stream whose group g ends `ends(g)` ticks after its start; returns the number of ticks."""
    born: dict[int, int] = {}
    tick = 0
    while stream.used is None:
        while stream.wants():
            if len(stream.verdicts) == data:
                stream.end_data()
                break
            born[len(stream.verdicts)] = tick
            stream.start(100.0)
        tick += 1
        done = [tick >= born[g] + ends(g) for g in range(len(stream.verdicts))]
        told = [(KEPT if keep(g) else DROPPED) if over else RUNNING for g, over in enumerate(done)]
        busy = [N * sum(not over for g, over in enumerate(done) if stream.places[g] == r) for r in range(stream.ranks)]
        stream.tick(told, busy, busy)
        assert tick < 10_000, "the stream does not end"
    return tick


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 8), st.floats(0, 1), st.integers(0, 99), st.booleans())
def test_the_used_groups_are_the_first_kept_ones_whatever_ends_first(
    target: int, tries: int, ranks: int, share: float, seed: int, park: bool
) -> None:
    rng = random.Random(seed)
    kept = [rng.random() < share for _ in range(tries * target)]
    found = set()
    for turn in range(3):
        time = random.Random(turn)
        ticks = [time.randint(1, 40) for _ in kept]
        stream = GroupStream(target, tries * target, N, slots=time.randint(1, 12) * N, ranks=ranks, park=park)
        play(stream, kept.__getitem__, ticks.__getitem__)
        assert stream.used is not None
        found.add(stream.used)
        assert all(v != RUNNING for v in stream.verdicts[: stream.used]), "no group that is used up is undecided"
    expected = [g + 1 for g in range(len(kept)) if kept[: g + 1].count(True) == target]
    assert found == {expected[0] if expected else len(kept)}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 20), st.integers(1, 8), st.integers(1, 5), st.integers(0, 99))
def test_no_rank_has_more_than_its_slots_and_no_slot_waits(target: int, ranks: int, groups: int, seed: int) -> None:
    rng = random.Random(seed)
    stream = GroupStream(target, 10 * target, N, slots=groups * N, ranks=ranks, prior=0.5, prior_groups=target)
    while stream.wants():
        stream.start(rng.randint(1, 1000))
    assert max(stream.unfinished) <= groups * N
    room = any(busy + N <= groups * N for busy in stream.unfinished)
    expected = stream.share * len(stream.verdicts)
    assert not room or expected >= target, "a slot is free and the update is not filled yet"
    assert expected - stream.share < target, "one prompt less would not have filled it"


def test_a_long_prompt_is_worth_many_short_ones() -> None:
    """By number every other prompt would go to the rank that has the video."""
    stream = GroupStream(8, 8, N, slots=64, ranks=2)
    assert [stream.start(tokens) for tokens in (9000, 100, 100, 100, 100, 100, 100, 100)] == [0, 1, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("share", [0.3, 0.45, 0.8])
def test_few_groups_are_started_in_vain(share: float) -> None:
    """Lengths differ 40-fold; a stream that fills all slots would throw away those of half the slots."""
    started = []
    used = []
    for seed in range(10):
        rng = random.Random(seed)
        kept = [rng.random() < share for _ in range(20 * 256)]
        ticks = [rng.randint(1, 40) for _ in kept]
        stream = GroupStream(256, 20 * 256, N, slots=320, ranks=8, prior=share, prior_groups=256)
        play(stream, kept.__getitem__, ticks.__getitem__)
        started.append(len(stream.verdicts))
        used.append(stream.used or 0)
    assert sum(started) <= 1.08 * sum(used)


def test_one_round_replaces_nothing_and_the_data_may_end() -> None:
    once = GroupStream(6, 6, N, slots=100)
    play(once, lambda g: False, lambda g: 1)
    assert (once.used, once.verdicts) == (6, [DROPPED] * 6)
    short = GroupStream(6, 60, N, slots=100)
    play(short, lambda g: g % 2 == 0, lambda g: 1, data=9)
    assert (short.used, len(short.verdicts)) == (9, 9)
    empty = GroupStream(6, 60, N, slots=100)
    empty.end_data()
    assert empty.used == 0 and not empty.wants()


def test_the_prior_starts_as_many_prompts_as_the_update_will_need() -> None:
    def first_wave(prior: float, groups: int) -> int:
        stream = GroupStream(100, 2000, N, slots=10**6, prior=prior, prior_groups=groups)
        while stream.wants():
            stream.start(1.0)
        return len(stream.verdicts)

    assert first_wave(1.0, 0) == 100, "nothing is known: as many as the update needs"
    assert first_wave(0.5, 100) == 200 and first_wave(0.8, 100) == 125


def test_parking_fills_every_slot() -> None:
    stream = GroupStream(2, 40, N, slots=10 * N, ranks=2, park=True)
    while stream.wants():
        stream.start(1.0)
    assert stream.unfinished == [10 * N, 10 * N]
