"""The scripts under a real torchrun with two ranks on the CPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastvst.train import lock
from fastvst.train.checkpoint import complete
from small_run import ROOT, arguments, rows_of, write_data, write_model

pytestmark = pytest.mark.slow


def torchrun(words: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*command, str(ROOT / "examples" / "sft.py"), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("mistake", ["model.path={}/lost", 'data.sources=[{path = "{}/lost"}]', "steps=0"])
def test_one_rank_speaks_about_a_mistake(tmp_path: Path, mistake: str) -> None:
    command = arguments(tmp_path / "run", write_data(tmp_path / "data", 12), write_model(tmp_path / "model"))
    process = torchrun([*command, mistake.replace("{}", str(tmp_path))])
    text = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert sum(line.startswith("sft.py: ") for line in text.splitlines()) == 1, text
    # no traceback of ours; torchrun prints its own, and it may be installed under the root
    assert f'File "{ROOT}/examples' not in text and f'File "{ROOT}/fastvst' not in text


def test_the_processes_of_a_killed_launcher_save_and_end(tmp_path: Path) -> None:
    out = tmp_path / "run"
    data = write_data(tmp_path / "data", 40)
    process = torchrun(arguments(out, data, write_model(tmp_path / "model"), "steps=100000"))
    limit = time.monotonic() + 120
    while len(rows_of(out)) < 3:
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.1)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert len(children) >= 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < limit, "the processes outlive their launcher"
        time.sleep(0.1)
    assert complete(out / "checkpoints") and not (out / "hf").exists()
    lock.acquire(out)  # nobody holds the folder
    lock.release(out)
