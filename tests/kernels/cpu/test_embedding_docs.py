"""The code blocks of docs/embedding.md run, each as a script in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "embedding.md").read_text(encoding="utf-8"), re.DOTALL)
PREPARE = "import torch\ntorch.distributed.init_process_group('gloo')\n"


def free_port() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


def run(word: str, before: str = "") -> str:
    (block,) = (block for block in BLOCKS if word in block)
    env = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()} if before else {}
    done = subprocess.run(
        [sys.executable, "-c", before + block], env=os.environ | env, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_there_is_a_test_for_every_block() -> None:
    assert len(BLOCKS) == 3


def test_plain_loop_with_fsdp_and_compile() -> None:
    first, last = map(float, re.findall(r"\d+\.\d+", run("fully_shard", PREPARE)))
    assert last < 0.5 * first


def test_trainer_of_transformers() -> None:
    found = run("TrainingArguments")
    assert "replaced loss" in found and found.count("grad_norm") == 5


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_trl() -> None:
    run("GRPOTrainer")
