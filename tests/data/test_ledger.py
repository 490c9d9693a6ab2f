"""The ledger: file, counts, threshold, strict mode, saved state."""

from __future__ import annotations

import json
import pickle

import pytest

from fastvst.data.ledger import Ledger, SampleError, TooManyBadSamples


def error(index: int, reason: str = "broken_image") -> SampleError:
    return SampleError(reason, "rooms", str(index), f"detail {index}")


def test_errors_survive_pickling() -> None:
    again = pickle.loads(pickle.dumps(error(3)))
    assert (again.reason, again.source, again.id, again.detail) == ("broken_image", "rooms", "3", "detail 3")
    assert str(again) == "rooms/3: broken_image: detail 3"


def test_every_bad_sample_is_written_once_with_its_reason(tmp_path) -> None:
    ledger = Ledger(tmp_path / "deep" / "l.jsonl")
    ledger.saw(50)
    ledger.record(error(1), where="a[0][1]")
    ledger.record(error(1), where="a[0][7]")  # ids are not unique in published data; rows are
    ledger.record(error(2, "too_long"))
    ledger.record(error(1), where="a[0][1]")  # the next epoch
    ledger.record(error(9), write=False)  # another rank writes it
    rows = [json.loads(line) for line in (tmp_path / "deep" / "l.jsonl").read_text().splitlines()]
    assert [(r["id"], r["where"], r["reason"]) for r in rows] == [
        ("1", "a[0][1]", "broken_image"),
        ("1", "a[0][7]", "broken_image"),
        ("2", "", "too_long"),
    ]
    assert rows[0]["source"] == "rooms" and rows[0]["detail"] == "detail 1"
    assert ledger.counts == {"broken_image": 4, "too_long": 1} and ledger.total == 5
    lines = ledger.summary().splitlines()
    assert lines[0] == "ledger: 5 rejected of 50 samples seen"
    assert lines[1].split()[:2] == ["4", "broken_image"] and "rooms/1: detail 1" in lines[1]


def test_the_threshold_waits_for_enough_samples_and_then_stops_with_the_summary() -> None:
    ledger = Ledger(max_fraction=0.01, min_samples=1000)
    ledger.saw(999)
    for index in range(500):
        ledger.record(error(index))
    ledger.check()
    ledger.saw(1)
    with pytest.raises(TooManyBadSamples, match=r"50.0% of 1000 samples(.|\n)*500  broken_image"):
        ledger.check()
    calm = Ledger(max_fraction=0.01, min_samples=1000)
    calm.saw(1000)
    for index in range(10):
        calm.record(error(index))
    calm.check()  # exactly 1 % is allowed
    calm.record(error(11), weight=0.5)
    with pytest.raises(TooManyBadSamples):
        calm.check()


def test_strict_raises_the_first_error_itself() -> None:
    with pytest.raises(SampleError, match="rooms/5: broken_image"):
        Ledger(strict=True).record(error(5))


def test_a_restored_ledger_forgets_what_came_after(tmp_path) -> None:
    path = tmp_path / "l.jsonl"
    ledger = Ledger(path)
    ledger.saw(10)
    ledger.record(error(1))
    state = json.loads(json.dumps(ledger.state_dict()))
    before = path.read_text()
    ledger.record(error(2))
    again = Ledger(path)
    again.load_state_dict(state)
    assert path.read_text() == before and again.state_dict() == state
    again.record(error(1))
    assert path.read_text() == before  # it is in the file already
    again.record(error(2))
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["1", "2"]


def test_a_new_run_starts_a_new_file(tmp_path) -> None:
    path = tmp_path / "l.jsonl"
    path.write_text('{"id": "of another run"}\n')
    Ledger(path).record(error(1))
    assert "another run" not in path.read_text() and len(path.read_text().splitlines()) == 1


@pytest.mark.parametrize("strict", [False, True])
def test_a_deferred_ledger_leaves_the_end_to_its_owner(strict: bool) -> None:
    ledger = Ledger(max_fraction=0.1, min_samples=10, strict=strict, deferred=True)
    for number in range(2):
        ledger.saw(5)
        ledger.record(SampleError("broken_image", "set", str(number), "torn"))
        ledger.check()
        assert (ledger.failure() is not None) == (strict or number == 1)
    assert "set/0: broken_image: torn" in str(ledger.failure()) if strict else "20.0% of 10" in str(ledger.failure())
    assert ledger.figures() == {"rejected": 2, "rejected_share": 0.2}
