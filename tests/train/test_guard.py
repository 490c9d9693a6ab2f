from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvst.train.guard import WINDOW, GuardConfig, GuardError, Recent, check, record_skip, skip_row
from small_run import arguments, load_script, write_model


def _after(values: list[float], config: GuardConfig | None = None) -> Recent:
    config = config or GuardConfig()
    recent = Recent()
    for value in values:
        _, recent = check(config, recent, value, 1.0)
    return recent


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_at_once(bad: float) -> None:
    assert "loss" in (check(GuardConfig(), Recent(), bad, 1.0)[0] or "")
    assert "gradient norm" in (check(GuardConfig(), Recent(), 1.0, bad)[0] or "")


def test_a_spike_is_measured_against_the_recent_median() -> None:
    recent = _after([2.0] * 20)
    assert check(GuardConfig(spike=10), recent, 19.9, 1.0)[0] is None
    reason = check(GuardConfig(spike=10), recent, 20.1, 1.0)[0]
    assert reason is not None and "loss" in reason and "10.1 times" in reason
    assert "gradient norm" in (check(GuardConfig(spike=10), recent, 2.0, 10.1)[0] or "")
    assert check(GuardConfig(spike=0), recent, 1e9, 1e9)[0] is None
    assert check(GuardConfig(spike=10), _after([2.0] * 5), 1e9, 1.0)[0] is None  # too few steps for a median


def test_a_norm_that_clipping_leaves_as_it_is_is_no_spike() -> None:
    recent = Recent(losses=(2.0,) * 20, norms=(0.02,) * 20)
    assert check(GuardConfig(spike=10), recent, 2.0, 0.9, clip=1.0)[0] is None
    assert "gradient norm" in (check(GuardConfig(spike=10), recent, 2.0, 1.1, clip=1.0)[0] or "")
    assert "gradient norm" in (check(GuardConfig(spike=10), recent, 2.0, 0.9, clip=0)[0] or "")  # 0 = no clipping
    assert "loss" in (check(GuardConfig(spike=10), _after([0.02] * 20), 0.9, 0.02, clip=1.0)[0] or "")
    assert "nan" in (check(GuardConfig(spike=10), recent, 2.0, math.nan, clip=1.0)[0] or "")


def test_a_skipped_step_leaves_no_trace_in_the_median() -> None:
    recent = _after([2.0] * 20)
    _, after = check(GuardConfig(), recent, 1e9, 1.0)
    assert after.losses == recent.losses and (after.in_a_row, after.skipped) == (1, 1)
    _, again = check(GuardConfig(), after, 2.0, 1.0)
    assert (again.in_a_row, again.skipped) == (0, 1)


@given(st.lists(st.floats(0.1, 10), max_size=2 * WINDOW))
def test_memory_is_bounded_and_survives_json(values: list[float]) -> None:
    recent = _after(values, GuardConfig(spike=0))
    assert list(recent.losses) == values[-WINDOW:]
    assert Recent.from_json(json.loads(json.dumps(recent.to_json()))) == recent


def test_the_run_stops_after_k_skips_in_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = GuardConfig(patience=3)
    recent = Recent()
    rows = []
    for step in (1, 2, 3):
        reason, recent = check(config, recent, math.nan, 1.0)
        rows.append(skip_row(0, step, reason or "", [math.nan], [1.0], [["a/1"]]))
        if step < 3:
            record_skip(config, recent, tmp_path, rows[-1])
    with pytest.raises(GuardError, match=r"step 3: 3 steps in a row.*loss is nan.*skipped-\*\.jsonl"):
        record_skip(config, recent, tmp_path, rows[-1])
    assert [json.loads(line) for line in (tmp_path / "skipped-00000.jsonl").read_text().splitlines()] == rows
    assert "rank 0, step 1 skipped, the loss is nan" in capsys.readouterr().out


def test_the_report_names_the_samples_and_is_json() -> None:
    row = skip_row(1, 7, "the loss is nan", [0.5, math.nan], [0.25, 0.75], [["a/1"], ["b/2", "b/3"]])
    assert json.loads(json.dumps(row, allow_nan=False))["packs"] == [
        {"loss": 2.0, "samples": ["a/1"]},
        {"loss": "nan", "samples": ["b/2", "b/3"]},
    ]


def test_a_run_on_prompts_without_answers_ends_with_an_error_and_writes_no_model(tmp_path: Path) -> None:
    """Its loss is 0 in every step, and weight decay would move the weights."""
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"What is {n}?", "label": "a number"}) + "\n" for n in range(20)))
    model = write_model(tmp_path / "model")
    with pytest.raises(GuardError, match="no token of this step is supervised.*`columns` of a source"):
        load_script().main(arguments(tmp_path / "run", rows, model, "steps=2"))
    assert not (tmp_path / "run" / "hf").exists()
