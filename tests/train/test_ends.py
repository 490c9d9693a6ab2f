"""Whatever ends a run, it is gone within ten seconds, says why, and leaves no process and no shared memory."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from pathlib import Path

import pytest

from fastvst.train import lock
from fastvst.train.checkpoint import complete
from processes import Started, children, started
from small_run import ROOT, arguments, rows_of, write_data, write_model

pytestmark = pytest.mark.slow
SECONDS = 10.0  # on a machine that starts a run within twice that time; other tests may keep this one busy


def terminate(run: Started) -> None:
    run.process.send_signal(signal.SIGTERM)


def interrupt_twice(run: Started) -> None:
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    run.process.send_signal(signal.SIGINT)


def kill_rank(run: Started) -> None:
    os.kill(run.rank(1), signal.SIGKILL)


def kill_planner(run: Started) -> None:
    os.kill(children(run.rank(0))[0], signal.SIGKILL)  # the first process that a rank starts; workers are replaced


def fill_disk(run: Started) -> None:
    for rank in (0, 1):
        resource.prlimit(run.rank(rank), resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))


def kill_launcher(run: Started) -> None:
    run.process.kill()


CASES = {
    terminate: "stopped by a signal after step",
    interrupt_twice: "",  # torchrun itself says that it got signal 2; the ranks may have saved before the second one
    kill_rank: "rank 1 on ",
    kill_planner: "planner exited unexpectedly",
    fill_disk: "File too large",
    kill_launcher: "stopped by a signal after step",
}


@pytest.mark.parametrize("end", CASES, ids=lambda end: end.__name__)
def test_a_run_under_torchrun_ends_soon_and_whole(tmp_path: Path, end) -> None:
    out = tmp_path / "run"
    words = arguments(out, write_data(tmp_path / "data", 40), write_model(tmp_path / "model"), "steps=100000")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "examples" / "sft.py"), *words, "loader.num_workers=1", "checkpoint.every=3"]
    began = time.monotonic()
    with started(command, env={**os.environ, "OMP_NUM_THREADS": "1"}) as run:
        run.wait_until(lambda: len(rows_of(out)) >= 5 and complete(out / "checkpoints"), 600)
        most = max(SECONDS, (time.monotonic() - began) / 2)
        end(run)
        run.seconds_until_gone(most)
        assert CASES[end] in run.text, run.text
        assert run.process.returncode != 0 and run.shared_memory_left() == set()
    assert complete(out / "checkpoints") and not (out / "hf").exists()
    lock.acquire(out)  # nobody holds the folder
    lock.release(out)
