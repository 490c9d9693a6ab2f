"""The stream of rows: shares, epochs, shuffling, and a state that can be restored at every position."""

from __future__ import annotations

import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_data import fake_row, fake_rows, write_jsonl
from fastvst.data.ledger import SampleError
from fastvst.data.mixture import Mixture, MixtureConfig, SourceConfig, iterate_once, open_mixture, rows_of_each
from fastvst.data.sample import Sample


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    rows = fake_rows(50, 1, "p")
    table = [{**r, "image": None, "images": None, "conversations": r["conversations"]} for r in rows]
    for row in table:
        row["conversations"] = [dict(t, value=t["value"].replace("<image>", "")) for t in row["conversations"]]
    pq.write_table(
        pa.Table.from_pylist([{k: v for k, v in r.items() if v is not None} for r in table]),
        folder / "p.parquet",
        row_group_size=7,
    )
    return [write_jsonl(folder / "j.jsonl", fake_rows(600, 0, "j")), folder / "p.parquet"]


def config(paths, weights=(None, None), **options) -> MixtureConfig:
    sources = tuple(SourceConfig(str(path), weight=weight) for path, weight in zip(paths, weights))
    return MixtureConfig(sources, **{"shuffle_buffer": 30, **options})


def ids(stream, count: int) -> list[str]:
    return [drawn.sample.id for _, drawn in zip(range(count), stream)]


def test_an_epoch_holds_every_row_once_in_an_order_of_the_seed(paths) -> None:
    everything = sorted([f"j{i}" for i in range(600)] + [f"p{i}" for i in range(50)])
    orders = [ids(open_mixture(config(paths, seed=seed, epochs=1)), 10**6) for seed in (0, 0, 1)]
    assert all(sorted(order) == everything for order in orders)
    assert orders[0] == orders[1] != orders[2]
    two = ids(open_mixture(config(paths, epochs=2)), 10**6)
    assert Counter(two) == dict.fromkeys(everything, 2)


def test_with_weights_an_epoch_holds_as_many_rows_in_the_shares_of_the_weights(paths) -> None:
    for epochs, weights in ((1, (1.0, 3.0)), (3, (1.0, 3.0)), (2, (7.0, 0.1)), (1, (1.0, 1.0))):
        drawn = ids(open_mixture(config(paths, weights, epochs=epochs)), 10**6)
        found = Counter(name[0] for name in drawn)
        assert len(drawn) == 650 * epochs
        for name, weight in zip("jp", weights):
            assert abs(found[name] - 650 * epochs * weight / sum(weights)) <= 0.5
        for name, rows in (("j", 600), ("p", 50)):  # no row comes twice more often than another
            counts = Counter(i for i in drawn if i[0] == name)
            repeats = [counts[f"{name}{i}"] for i in range(rows)]
            assert max(repeats) - min(repeats) <= 1


@given(st.integers(1, 5), st.lists(st.tuples(st.integers(1, 10**6), st.floats(1e-3, 1e3)), min_size=1, max_size=6))
def test_the_rows_of_an_epoch_are_divided_exactly(epochs: int, sources: list[tuple[int, float]]) -> None:
    rows = [number for number, _ in sources]
    weights = [weight for _, weight in sources]
    limits = rows_of_each(epochs, rows, weights)
    assert sum(limits) == epochs * sum(rows)
    for limit, weight in zip(limits, weights):
        assert abs(limit - epochs * sum(rows) * weight / sum(weights)) < 1 + 1e-6


def test_without_a_buffer_one_source_comes_in_order(paths) -> None:
    stream = open_mixture(config(paths[:1], shuffle_buffer=0, epochs=2))
    assert ids(stream, 10**6) == [f"j{i}" for i in range(600)] * 2


def test_shuffling_reorders_blocks_and_rows_anew_in_every_epoch(paths) -> None:
    stream = open_mixture(config(paths[1:], shuffle_buffer=5))
    first = ids(stream, 50)
    second = ids(stream, 50)
    assert first != second and first != [f"p{i}" for i in range(50)]


def test_weights_are_shares_of_samples(paths) -> None:
    drawn = Counter(name[0] for name in ids(open_mixture(config(paths, (1.0, 3.0))), 4000))
    assert drawn["p"] / 4000 == pytest.approx(0.75, abs=0.03)  # 4 sigma of a binomial
    natural = Counter(name[0] for name in ids(open_mixture(config(paths)), 4000))
    assert natural["p"] / 4000 == pytest.approx(50 / 650, abs=0.02)
    partly = Counter(name[0] for name in ids(open_mixture(config(paths, (3.0, None))), 4000))
    assert partly["p"] / 4000 == pytest.approx(0.25, abs=0.03)  # a source without a weight weighs 1
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weight is"):
            config(paths, (weight, None))


@settings(max_examples=25, deadline=None)
@given(at=st.integers(0, 700), buffer=st.sampled_from([0, 1, 30, 1000]), epochs=st.sampled_from([None, 1, 2]))
def test_a_saved_position_is_restored_exactly(paths, at: int, buffer: int, epochs: int | None) -> None:
    settings_ = config(paths, (2.0, 1.0), shuffle_buffer=buffer, epochs=epochs, seed=5)
    stream = open_mixture(settings_)
    ids(stream, at)
    state = json.loads(json.dumps(stream.state_dict()))
    again = open_mixture(settings_)
    again.load_state_dict(state)
    assert again.state_dict() == state
    assert ids(stream, 120) == ids(again, 120)


def test_bad_rows_keep_their_places(paths, tmp_path) -> None:
    rows = fake_rows(9)
    rows[4] = {"id": "odd"}
    stream = open_mixture(config([write_jsonl(tmp_path / "a.jsonl", rows)], shuffle_buffer=0, epochs=1))
    kinds = [type(drawn.sample) for drawn in stream]
    assert kinds == [Sample] * 4 + [SampleError] + [Sample] * 4


def test_a_state_of_other_files_is_refused(paths, tmp_path) -> None:
    state = open_mixture(config(paths)).state_dict()
    with pytest.raises(ValueError, match="does not fit this mixture: seed was 0, is now 3"):
        open_mixture(config(paths, seed=3)).load_state_dict(state)
    shorter = [write_jsonl(tmp_path / "j.jsonl", fake_rows(599)), paths[1]]
    with pytest.raises(ValueError, match="sources was .*600.*599"):
        open_mixture(config(shorter)).load_state_dict(state)


def test_a_state_of_other_columns_is_refused(paths) -> None:
    def mixture(**keys) -> Mixture:
        return open_mixture(MixtureConfig((SourceConfig(str(paths[0]), **keys),)))

    state = mixture(columns={"id": "id"}).state_dict()
    mixture(columns={"id": "id"}).load_state_dict(json.loads(json.dumps(state)))
    for other in ({}, {"columns": {"id": "image"}}, {"columns": {"id": "id"}, "question": "Describe."}):
        with pytest.raises(ValueError, match="does not fit this mixture: sources"):
            mixture(**other).load_state_dict(state)


def test_pixel_limits_of_a_source_are_set_on_its_images(tmp_path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [fake_row("0", 4, ("1x1", "2x2"))])
    source = SourceConfig(str(path), min_pixels=3136, max_pixels=100352)
    for sample in (next(open_mixture(MixtureConfig((source,)))).sample, next(iterate_once(source))):
        assert [(p["min_pixels"], p["max_pixels"]) for p in sample.parts("image")] == [(3136, 100352)] * 2
    plain = next(iterate_once(SourceConfig(str(path))))
    assert all("min_pixels" not in part for part in plain.parts("image"))


def test_a_mixture_needs_sources() -> None:
    with pytest.raises(ValueError, match="at least one source"):
        Mixture([], MixtureConfig(()))
