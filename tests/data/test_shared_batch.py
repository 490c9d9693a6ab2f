"""A pack that went through shared memory is the same pack, and nothing of it stays in /dev/shm."""

from __future__ import annotations

import multiprocessing
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fake_data import FakeProcessor, fake_rows, write_jsonl
from fastvst.batch import PackedBatch, empty_sample, pack
from fastvst.data.shared_batch import SharedBatch
from fastvst.data.sources import open_source


def batch(tmp_path, count: int = 9, **options) -> PackedBatch:
    samples = open_source(write_jsonl(tmp_path / "a.jsonl", fake_rows(count)))
    return pack([FakeProcessor().encode(sample) for sample in samples], **options)


def send(pipe, found: PackedBatch) -> None:
    pipe.send(SharedBatch(found))
    pipe.recv()


def through_a_process(found: PackedBatch) -> PackedBatch:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=send, args=(there, found))
    process.start()
    received = here.recv()
    here.send("done")
    process.join()
    assert process.exitcode == 0
    return received


def test_every_field_arrives_bit_for_bit_and_can_be_written(tmp_path) -> None:
    before = set(Path("/dev/shm").iterdir())
    for sent in (batch(tmp_path), batch(tmp_path, 3, groups=[-1, 0, 0]), pack([empty_sample()])):
        received = through_a_process(sent)  # the sender has ended
        assert received.equal(sent)
        received.validate()
        received.tokens.add_(1)
        assert torch.equal(received.tokens, sent.tokens + 1)
    names = {path.name for path in set(Path("/dev/shm").iterdir()) - before}
    assert not any(name.startswith(("torch_", "fastvst")) for name in names)


CODE = """
import sys
from fastvst.data import LoaderConfig, MixtureConfig, Processor, SourceConfig, make_loader
mixture = MixtureConfig((SourceConfig(sys.argv[1]),), shuffle_buffer=0)
config = LoaderConfig(tokens_per_pack=512, num_workers=1, buffer_samples=8, timeout_s=40)
print(next(iter(make_loader(mixture, Processor.preset("tiny"), config))).num_patches, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", ["4k", "64k"])
def test_a_small_dev_shm_is_enough_or_named_at_once(tmp_path, size) -> None:
    from PIL import Image

    Image.new("RGB", (448, 448), (1, 2, 3)).save(tmp_path / "p.png")
    rows = [{"id": i, "image": "p.png", "question": "What is this?", "answer": "A chair."} for i in range(20)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm"
    private = ["unshare", "-m", "sh", "-c"]
    if not shutil.which("unshare") or subprocess.run([*private, mount], capture_output=True).returncode:
        pytest.skip("this test mounts its own /dev/shm, which this user may not do")
    (tmp_path / "code.py").write_text(CODE)
    command = f"{mount} && exec {sys.executable} {tmp_path}/code.py {path}"
    done = subprocess.run([*private, command], capture_output=True, text=True, timeout=100)
    if size == "64k":  # a pack has 256 patches of 4.7 KB
        assert done.returncode == 0 and int(done.stdout) > 256, done.stderr[-600:]
    else:
        assert "/dev/shm is full" in done.stderr and "--shm-size" in done.stderr, done.stderr[-600:]
