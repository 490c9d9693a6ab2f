"""A rehearsal of the real start: torchrun, HSDP 2 x 2, asynchronous checkpoints, a killed rank, fewer ranks.

The clock asks for checkpoints as well as the steps.

What can be equal: on the same number of ranks the resumed curve equals the uninterrupted one bit for bit. On another
number the packs of a step are the same, but their gradients are added in another order, so that the curve agrees to
float32 rounding (1e-6 here, over the whole run), and the restored tensors are equal bit for bit.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fastvst import checksum
from fastvst.model import Qwen25VL
from fastvst.train.checkpoint import complete
from processes import started
from small_run import ROOT, arguments, curve, rows_of, write_data, write_model

pytestmark = pytest.mark.slow
STEPS = 24
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def ranks(count: int, words: Sequence[str]) -> list[str]:
    return [*TORCHRUN, str(count), str(ROOT / "examples" / "sft.py"), *words]


def finish(count: int, words: Sequence[str]) -> str:
    with started(ranks(count, words), env=ENVIRONMENT) as run:
        status = run.process.wait(600)
        run.seconds_until_gone(60)
        assert status == 0, run.text
        return run.text


def test_hsdp_with_a_killed_rank_resumes_on_four_and_on_two_ranks(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    data = write_data(tmp_path / "data", 60)
    heldout = write_data(tmp_path / "heldout", 8, seed=1)

    def words(out: Path, accumulation: int, replicas: int) -> list[str]:
        more = [f"steps={STEPS}", f"loader.accumulation={accumulation}", f"parallel.replicas={replicas}"]
        more += [f"evaluation.path={heldout}", "evaluation.every=8", "evaluation.rows=8"]
        more += ["loader.num_workers=1", "checkpoint.hf=true", "checkpoint.every=4", "checkpoint.keep=99"]
        return arguments(out, data, model, *more, "checkpoint.every_minutes=0.002", "resume=auto")

    whole = tmp_path / "whole"
    text = finish(4, words(whole, 1, 2))
    assert "sharded over (2, 2)" in text and "written while training continues" in text
    assert len(curve(whole)) == STEPS

    broken = tmp_path / "broken"
    with started(ranks(4, words(broken, 1, 2)), env=ENVIRONMENT) as run:
        run.wait_until(lambda: len(rows_of(broken)) >= 10 and complete(broken / "checkpoints"), 600)
        os.kill(run.rank(2), signal.SIGKILL)
        run.seconds_until_gone(60)
        assert run.process.returncode != 0 and "rank 2" in run.text and "--resume auto" in run.text
    assert len(rows_of(broken)) < STEPS and not (broken / "hf").exists()

    two = tmp_path / "two"
    shutil.copytree(broken, two, symlinks=True)
    first = int(complete(two / "checkpoints")[-1].name.rpartition("-")[2])
    assert "resumed from" in finish(4, words(broken, 1, 2))
    assert curve(broken) == curve(whole)  # the same number of ranks: bit for bit

    assert "resumed from" in finish(2, words(two, 2, 1))  # the same global batch: two packs on each of two ranks
    assert curve(two)[:first] == curve(whole)[:first]  # from before the kill
    flat = [value for pair in curve(two) for value in pair]
    assert flat == pytest.approx([value for pair in curve(whole) for value in pair], rel=1e-6)
    assert evaluations(broken) == evaluations(whole) and len(evaluations(whole)) == STEPS // 8
    for mine, other in zip(evaluations(two), evaluations(whole), strict=True):
        assert mine == pytest.approx(other, rel=1e-6)
    best = [(out / "checkpoints" / "best").readlink().name for out in (whole, broken, two)]
    assert best == best[:1] * 3
    assert [row["tokens"] for row in rows_of(two)] == [row["tokens"] for row in rows_of(whole)]

    check_files(whole)
    theirs = Qwen25VL.from_pretrained(whole / "hf").state_dict()
    for name, tensor in Qwen25VL.from_pretrained(broken / "hf").state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
    for name, tensor in Qwen25VL.from_pretrained(two / "hf").state_dict().items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4)


def evaluations(out: Path) -> list[tuple[float, int]]:
    """(loss, step of the best one so far) of every evaluation during training."""
    found = [row["evaluation"] for row in rows_of(out) if "evaluation" in row]
    return [(row["loss"], row["best_step"]) for row in found]


def check_files(out: Path) -> None:
    """Every rank has written its part of the Hugging Face directories, and the marker has a checksum of every file."""
    for path in complete(out / "checkpoints"):
        listed = set(checksum.read_marker(path)["files"])
        assert listed == {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()} - {checksum.MARKER}
        assert sum(name.startswith("hf/model-") for name in listed) == 4
    files = sorted((out / "hf").glob("model-*.safetensors"))
    assert [file.name for file in files] == [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    sizes = []
    for file in files:
        with safe_open(file, framework="pt") as content:
            sizes.append(sum(content.get_tensor(name).numel() for name in content.keys()))  # noqa: SIM118
    assert max(sizes) < sum(sizes)


def test_the_clock_saves_on_all_ranks_after_the_same_step(tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = arguments(out, write_data(tmp_path / "data", 40), write_model(tmp_path / "model"), "steps=12")
    finish(2, [*words, "checkpoint.every=0", "checkpoint.every_minutes=0.0001", "checkpoint.keep=99"])
    steps = [int(path.name.rpartition("-")[2]) for path in complete(out / "checkpoints")]
    assert len(steps) > 1 and steps[-1] == 12
