"""What `pytest bench/` says at its end: the table, goals, and what is missing; what it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.table import Result, number, rows_of_contenders, table

ROOT = Path(__file__).parents[2]
OPTIONAL = ("accelerate", "av", "datasets", "embreex", "moderngl", "trl")

BENCH = """
from pathlib import Path

import pytest

import bench.conftest
from bench.table import Result

bench.conftest.RESULTS = Path(__file__).parent / "results"


def test_measured(record):
    record("steps", Result("ms", 2.0, "host", 5.0, less=True, goal=3.0), Result("rows/s", 12345.0, goal=1e4), ms=2.0)


def test_one_that_breaks_after_it_measured(record):
    record("other", Result("GB", 1.5, less=True, goal=2.0), gb=1.5)
    raise AssertionError


@pytest.mark.needs("no_such_package")
def test_of_a_package_that_is_missing(record):
    import no_such_package


@pytest.mark.needs(("no_such_package", "json"))
def test_of_one_package_of_two(record):
    record("third", other=1.0)


@pytest.mark.full
def test_long(record):
    record("long", Result("s", 1.0), s=1.0)


def test_of_a_gpu(record, gpu_options):
    raise AssertionError
"""


def run(*arguments: str, blocked: tuple[str, ...] = (), folder: Path) -> subprocess.CompletedProcess[str]:
    """pytest in its own process, where the modules `blocked` are not installed."""
    (folder / "blocked.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({blocked!r}))\n")
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, "-m", "pytest", "-p", "blocked", "-p", "no:cacheprovider", "-q", *arguments]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_ratio_says_how_many_times_as_good_ours_is():
    assert Result("s", 2.0, "peer", 6.0, less=True).ratio == 3 and Result("rows/s", 2.0, "peer", 6.0).ratio == 1 / 3
    assert Result("s", 2.0).ratio is None and Result("s", 2.0).hit is None
    assert Result("s", 0.0, "peer", 1.0, less=True).ratio == float("inf")


@pytest.mark.parametrize(
    ("result", "hit"),
    [
        (Result("s", 2.0, "peer", 6.0, less=True, goal=3.0), True),
        (Result("s", 2.0, "peer", 5.9, less=True, goal=3.0), False),
        (Result("s", 2.0, less=True, goal=2.0), True),
        (Result("s", 2.1, less=True, goal=2.0), False),
        (Result("rows/s", 1.9, goal=2.0), False),
        (Result("rows/s", 2.0, goal=2.0), True),
    ],
)
def test_a_goal_is_a_ratio_where_there_is_a_peer_else_a_bound(result, hit):
    assert result.hit is hit
    assert result.cells("b", "c")[-1].endswith("hit" if hit else "MISSED")


def test_columns_are_aligned_and_numbers_have_three_digits():
    found = table(
        [
            ("attention", "groups", Result("ms", 0.01234, "repeated", 1.0, less=True, what="forward")),
            ("sft", "tiny", Result("tokens/s", 123456.0, "Trainer", 1411.0, goal=2.0)),
        ]
    )
    words = (("case", "ours"), ("groups", "0.0123"), ("tiny", "123,000"))
    places = {tuple(map(line.index, pair)) for line, pair in zip(found, words, strict=True)}
    assert len(places) == 1
    assert "81.04x" in found[1] and "groups, forward" in found[1] and found[2].endswith("2x hit")
    assert [number(x) for x in (0, 0.5, 99.96, 1234.5, 1e6)] == ["0", "0.5", "100", "1,230", "1,000,000"]


def test_the_best_peer_of_each_direction_is_the_one_compared_with():
    figures = {
        "fastvst": {"forward_ms": 2.0, "backward_ms": 4.0},
        "a": {"forward_ms": 1.0, "backward_ms": 9.0},
        "b": {"forward_ms": 3.0, "backward_ms": 3.8},
        "c": {"not_measured": "ImportError"},
    }
    forward, backward = rows_of_contenders(figures, {"backward": 0.9})
    assert (forward.peer, forward.ratio, forward.goal) == ("a", 0.5, None)
    assert (backward.peer, backward.ratio, backward.hit) == ("b", 0.95, True)
    alone = rows_of_contenders({"fastvst": figures["fastvst"]}, {"backward": 0.9})
    assert [row.hit for row in alone] == [None, None]
    assert rows_of_contenders({"a": figures["a"]}, {}) == []


@pytest.mark.parametrize("full", [False, True])
def test_one_table_at_the_end_and_files_only_with_full(tmp_path, full):
    (tmp_path / "test_tiny.py").write_text(BENCH)
    done = run("-p", "bench.conftest", str(tmp_path), *["--full"] * full, folder=tmp_path)
    end = done.stdout.partition("ours and the peers on cpu")[2]
    assert done.stdout.count("ours and the peers on") == 1, done.stdout + done.stderr
    lines = [" ".join(line.split()) for line in end.splitlines()]
    assert "tiny steps 2 ms host 5 2.50x 3x MISSED" in lines
    assert "tiny steps 12,300 rows/s 10,000 rows/s hit" in lines
    assert "tiny other 1.5 GB 2 GB hit" in lines
    assert "not measured (1): needs no_such_package: pip install 'fastvst[bench]'" in lines
    assert "not measured (1): compares kernels on a GPU, and torch sees none" in lines
    assert ("not measured (1): takes long: pytest bench/ --full" in lines) is not full
    written = tmp_path / "results" / "cpu" / "tiny.json"
    assert written.exists() is full
    if full:
        assert set(json.loads(written.read_text())["figures"]) == {"steps", "other", "third", "long"}


@pytest.mark.slow
def test_every_bench_can_be_collected_without_the_optional_packages_and_says_what_is_missing(tmp_path):
    done = run("bench", "-m", "needs", blocked=OPTIONAL, folder=tmp_path)
    assert done.returncode == 0 and "error" not in done.stdout.lower(), done.stdout + done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("not measured") and ": needs " in line]
    named = {name for name in OPTIONAL for line in said if f" {name}" in line}
    assert {"accelerate", "av", "moderngl", "trl"} <= named and all("fastvst[bench]" in line for line in said), said
