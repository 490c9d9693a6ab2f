"""The scripts under a real torchrun with two ranks on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastvst.train import lock
from fastvst.train.checkpoint import complete
from processes import children, started
from small_run import ROOT, arguments, rows_of, write_data, write_model

pytestmark = pytest.mark.slow
ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def torchrun(words: list[str]) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*command, str(ROOT / "examples" / "sft.py"), *words]


@pytest.mark.parametrize("mistake", ["model.path={}/lost", 'data.sources=[{path = "{}/lost"}]', "steps=0"])
def test_one_rank_speaks_about_a_mistake(tmp_path: Path, mistake: str) -> None:
    command = arguments(tmp_path / "run", write_data(tmp_path / "data", 12), write_model(tmp_path / "model"))
    words = torchrun([*command, mistake.replace("{}", str(tmp_path))])
    process = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENV, timeout=300)
    text = process.stdout
    assert process.returncode != 0
    assert sum(line.startswith("sft.py: ") for line in text.splitlines()) == 1, text
    # no traceback of ours; torchrun prints its own, and it may be installed under the root
    assert f'File "{ROOT}/examples' not in text and f'File "{ROOT}/fastvst' not in text


def test_the_processes_of_a_killed_launcher_save_and_end(tmp_path: Path) -> None:
    out = tmp_path / "run"
    data = write_data(tmp_path / "data", 40)
    with started(torchrun(arguments(out, data, write_model(tmp_path / "model"), "steps=100000")), env=ENV) as run:
        run.wait_until(lambda: len(rows_of(out)) >= 3)
        assert len(children(run.process.pid)) >= 2
        run.process.kill()
        run.seconds_until_gone(240)
    assert complete(out / "checkpoints") and not (out / "hf").exists()
    lock.acquire(out)  # nobody holds the folder
    lock.release(out)
