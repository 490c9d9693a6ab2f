"""README.md: a test runs every command; the section "Your own data" is run line by line on forty rows."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastvst.data import Processor
from fastvst.model import Qwen25VL
from own_rows import write_forty_rows

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
MODEL = "Qwen2.5-VL-3B-Instruct"  # the folder in the README's commands; here a tiny model
HERE = "tests/test_readme.py"
INSTALL = "python3 -m venv .venv && . .venv/bin/activate && pip install -q -c constraints.txt -e"
# The first words of every command, and what runs it.
TESTED = {
    f'{INSTALL} ".[rooms]"': "tests/train/test_sft.py",
    f'{INSTALL} ".[test]"': ".ci/run",
    "fastvst data check": HERE,
    "fastvst sft": HERE,
    "xdg-open": HERE,
    "fastvst evaluate own": HERE,
    "fastvst chat": HERE,
    "fastvst generate": HERE,
    "fastvst rl": HERE,
    "vllm serve": "tests/model/test_weights.py",  # that transformers opens the directory; vLLM needs a GPU
}


def commands(section: str = "") -> list[str]:
    """Commands of the bash blocks, of all sections or of one."""
    text = TEXT if not section else TEXT.partition(f"## {section}\n")[2].partition("\n## ")[0]
    return [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]


def test_every_command_is_run_by_a_test():
    unknown = [line for line in commands() if not any(line.startswith(known) for known in TESTED)]
    assert unknown == [] and all((ROOT / path).is_file() for path in TESTED.values())
    assert all(any(line.startswith(known) for line in commands()) for known in TESTED)
    assert len(commands("Your own data")) == 9


def test_the_page_is_short_and_links_every_page_of_the_documentation():
    assert len(TEXT.splitlines()) < 150
    named = TEXT + (ROOT / "docs" / "what_works.md").read_text(encoding="utf-8")
    assert [page.name for page in (ROOT / "docs").glob("*.md") if page.name not in named] == []


@pytest.fixture
def folder(tmp_path) -> Path:
    """A working folder with rows, a model directory, the scripts' settings and a `fastvst` on the path."""
    write_forty_rows(tmp_path / "own")
    for path in (tmp_path / "own").iterdir():
        path.rename(tmp_path / path.name)
    torch.manual_seed(0)
    Qwen25VL.fresh("tiny").save_pretrained(tmp_path / MODEL, processor=Processor.preset("tiny"))
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    Image.new("RGB", (80, 60), "white").save(tmp_path / "room.jpg")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "Which colour?", "images": ["room.jpg"]}) + "\n")
    (tmp_path / "my_reward.py").write_text(
        "def exact(responses, rows):\n    return [float(len(text) + i % 2) for i, text in enumerate(responses)]\n"
    )
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, line in (("fastvst", f'exec "{sys.executable}" -m fastvst "$@"'), ("xdg-open", 'test -s "$1"')):
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)
    return tmp_path


def run(line: str, folder: Path, text: str = "") -> str:
    """What a command prints; it must succeed."""
    paths = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-c", line], cwd=folder, env={**os.environ, **paths}, input=text, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.slow
def test_your_own_data(folder):
    check, plan, train, look, evaluate, talk, generate, _, learn = commands("Your own data")
    assert "40 rows, 40 usable" in run(check, folder)
    assert "one pass over the 40 samples" in run(plan, folder) and not (folder / "runs").exists()
    assert "model: runs/own/hf" in run(train, folder)
    run(look, folder)
    run(evaluate, folder)
    assert (folder / "scores" / "results.json").is_file()
    shown = run(f"{talk} --max-tokens 4", folder, "/image room.jpg\nWhich colour is the image?\n/quit\n")
    assert "goes with your next message" in shown
    run(f"{generate} --max-tokens 4", folder)
    (row,) = map(json.loads, (folder / "out.jsonl").read_text().splitlines())
    assert row["answers"]
    short = "--steps 1 --sampling.prompts 4 --sampling.answers 2 --sampling.max_tokens 4 --evaluation.every 0"
    assert "model: runs/rl/hf" in run(f"{learn} {short}", folder)


@pytest.mark.slow
def test_the_python_of_the_page(folder):
    shutil.copytree(folder / MODEL, folder / "runs" / "own" / "hf")
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    (folder / "page.py").write_text(block + "assert loss.isfinite()\n")
    run(f'"{sys.executable}" page.py', folder)
