"""Every bench writes what it measured to bench/results/<device>/<file>.json, next to what it was measured with."""

from __future__ import annotations

import itertools
import json
import platform
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import ceilings
from bench.gpu.block import Options, run_cases

RESULTS = Path(__file__).parent / "results"


def device_name() -> str:
    """Folder name of this machine: the GPU's name, or cpu."""
    if not torch.cuda.is_available():
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def gpu_options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    """What the GPU benches need, with the ceilings of this GPU measured; a machine without one skips."""
    if not torch.cuda.is_available():
        pytest.skip("this compares kernels on a GPU: not measured")
    options = Options(tmp_path_factory.mktemp("gpu") / "figures.jsonl")
    run_cases("ceilings", itertools.islice(ceilings.cases(options), 2), options)
    return options


@pytest.fixture(scope="module")
def record(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """record(name, **figures): keep figures (floats, ints, short strings with their units in the key) of one bench.

    Figures of the same file are merged by name, so that a partial run replaces only what it measured.
    """
    figures: dict[str, dict[str, Any]] = {}

    def keep(name: str, **values: Any) -> None:
        figures[name] = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in values.items()}
        print(f"\n{name}: " + ", ".join(f"{k}={v}" for k, v in figures[name].items()))

    yield keep
    if not figures:
        return
    path = RESULTS / device_name() / (Path(request.node.path).stem.removeprefix("test_") + ".json")
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


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Leave the host's name and serial facts out of saved files."""
    for key in ("node", "cpu"):
        machine_info.pop(key, None)
