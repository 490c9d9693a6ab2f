"""The bench that compares what a robot policy starts from: which weights differ, and what the table says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from scipy.stats import binomtest

from bench.vla_starts import __main__ as bench
from fastvst.model import Qwen25VL


def result(good: dict[str, int], trials: int = 20) -> dict:
    tasks = {name: {"mean": won / trials} for name, won in good.items()}
    mean = sum(one["mean"] for one in tasks.values()) / len(tasks)
    return {"tasks": tasks, "mean": {"mean": mean}, "episodes": trials * len(good)}


def test_random_weights_follow_the_seed_and_the_base_is_the_shipped_one(tmp_path: Path) -> None:
    assert bench.write_start("tuned", 3, tmp_path, Path("tuned")) == Path("tuned")
    paths = [bench.write_start(start, seed, tmp_path, Path("tuned")) for start in ("random", "base") for seed in (3, 4)]
    random, other, base, again = (Qwen25VL.from_pretrained(path).head_weight for path in paths)
    assert not torch.equal(random, other) and torch.equal(base, again)
    assert torch.equal(base.float(), Qwen25VL.fresh("tiny", start="base").head_weight)


def test_the_page_has_the_rates_of_all_seeds_and_a_finished_run_is_not_repeated(tmp_path: Path, monkeypatch) -> None:
    wins = {"random": (2, 4, 6), "base": (8, 10, 12), "tuned": (14, 16, 18)}
    for start, numbers in wins.items():
        for seed, won in enumerate(numbers):
            path = tmp_path / "runs" / f"{start}-{seed}" / "report" / "results.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps({"policies": {bench.POLICY: result({"a": won, "b": won})}}))
    monkeypatch.setattr(bench.subprocess, "run", lambda *_, **__: pytest.fail("a finished run was started again"))
    found = {s: {n: bench.run(tmp_path / "runs" / f"{s}-{n}", tmp_path, n, []) for n in range(3)} for s in wins}
    rate = bench.pooled(found["base"])["mean over tasks"]
    interval = binomtest(60, 120).proportion_ci(method="wilson")
    assert rate.mean == 0.5 and (rate.low, rate.high) == pytest.approx((interval.low, interval.high), abs=1e-4)
    bench.write(tmp_path / "out", {"commit": "x"}, found)
    page = (tmp_path / "out" / "vla_starts.html").read_text()
    assert "40  50  60" in page and page.count("<rect") == 3 + 3 * 3
    assert (
        json.loads((tmp_path / "out" / "vla_starts.json").read_text())["runs"]["tuned"]["2"]["tasks"]["a"]["mean"]
        == 0.9
    )
