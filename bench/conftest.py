"""`pytest bench/` measures at sizes that a user waits for and ends with one table: ours, the peer, the ratio, the goal.

`pytest bench/ --full` measures at the sizes of the recorded figures, and writes them to
bench/results/<device>/<file>.json, next to what they were measured with. A bench whose optional package is missing is
left out, and the end says what to install.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import platform
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import ceilings
from bench.gpu.block import Options, run_cases
from bench.table import Result, table

RESULTS = Path(__file__).parent / "results"
Record = Callable[..., None]
ROW = "bench row"  # key of the properties of a test's report, which also pytest-xdist brings to the end
INSTALL = "pip install 'fastvst[bench]'"
FULL = "takes long: pytest bench/ --full"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="the sizes of the recorded figures, which are written")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(*modules): optional packages that this bench imports, or one of a tuple")
    config.addinivalue_line("markers", "full: only with --full")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("full") and not item.config.getoption("--full"):
        pytest.skip(FULL)
    for marker in item.iter_markers("needs"):
        for names in marker.args:
            choice = names if isinstance(names, tuple) else (names,)
            if not any(importlib.util.find_spec(name) for name in choice):
                pytest.skip(f"needs {' or '.join(choice)}: {INSTALL}")


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether to measure at the sizes of the recorded figures."""
    return bool(request.config.getoption("--full"))


def device_name() -> str:
    """Folder name of this machine: the GPU's name, or cpu."""
    if not torch.cuda.is_available():
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def gpu_options(tmp_path_factory: pytest.TempPathFactory, full: bool) -> Options:
    """What the GPU benches need, with the ceilings of this GPU measured; a machine without one skips."""
    if not torch.cuda.is_available():
        pytest.skip("compares kernels on a GPU, and torch sees none")
    options = Options(tmp_path_factory.mktemp("gpu") / "figures.jsonl", full=full)
    run_cases("ceilings", itertools.islice(ceilings.cases(options), 2), options)
    return options


@pytest.fixture
def record(request: pytest.FixtureRequest, full: bool) -> Iterator[Record]:
    """record(case, *rows, **figures): keep what one bench found.

    Rows are lines of the table at the end. Figures (floats, ints, short strings, with their units in the key) are
    written with --full only; those of the same file are merged by case, so that a partial run replaces only what it
    measured.
    """
    figures: dict[str, dict[str, Any]] = {}

    def keep(case: str, *rows: Result, **values: Any) -> None:
        request.node.user_properties.extend((ROW, (case, asdict(row))) for row in rows)
        if values:
            figures[case] = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in values.items()}
            print(f"\n{case}: " + ", ".join(f"{k}={v}" for k, v in figures[case].items()))

    yield keep
    if full and figures:
        write(RESULTS / device_name() / f"{bench_name(request.node.path)}.json", figures)


def bench_name(path: Path) -> str:
    """ "packing" for bench/cpu/test_packing.py."""
    return path.stem.removeprefix("test_")


def write(path: Path, figures: dict[str, dict[str, Any]]) -> None:
    """Merge figures into a file of results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(path.read_text()) if path.exists() else {"figures": {}}
    import transformers

    made = {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
    }
    path.write_text(
        json.dumps({"made_with": made, "figures": old["figures"] | figures}, indent=1, sort_keys=True) + "\n"
    )


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table, then what was not measured and why."""
    reports = [r for kind in ("passed", "failed", "skipped") for r in terminalreporter.stats.get(kind, [])]
    reports = [r for r in reports if isinstance(r, pytest.TestReport)]
    rows = [
        (bench_name(Path(report.nodeid.partition("::")[0])), case, Result(**row))
        for report in reports
        if report.when == "call"
        for key, (case, row) in ((k, v) for k, v in report.user_properties if k == ROW)
    ]
    missing = Counter(r.longrepr[2].removeprefix("Skipped: ") for r in reports if r.skipped and r.longrepr)
    if not rows and not missing:
        return
    terminalreporter.section(f"ours and the peers on {device_name()}")
    for line in table(sorted(rows, key=lambda row: row[0])) if rows else ["nothing was measured"]:
        terminalreporter.write_line(line)
    for reason, count in sorted(missing.items()):
        terminalreporter.write_line(f"not measured ({count}): {reason}")
