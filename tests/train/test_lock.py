"""One trainer for each run folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastvst.train import lock

HOLD = """
import pathlib, sys, time
from fastvst.train import lock
lock.acquire(pathlib.Path(sys.argv[1]))
print('held', flush=True)
time.sleep(60)
"""


def test_a_folder_in_use_is_refused_with_the_process_and_free_after_its_death(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(lock.FolderInUse, match=f"process {holder.pid} .*another --out"):
            lock.acquire(tmp_path)
    finally:
        holder.kill()
        holder.communicate()
    lock.acquire(tmp_path)
    assert f"process {os.getpid()} " in (tmp_path / ".lock").read_text()
    lock.release()


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    lock.acquire(tmp_path)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.read(read, 1)
        os._exit(0)
    lock.release()
    try:
        code = HOLD.replace("time.sleep(60)", "")
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
        assert done.stdout == "held\n", done.stderr
    finally:
        os.write(write, b"x")
        os.waitpid(child, 0)
