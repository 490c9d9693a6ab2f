"""docs/python.md: every block runs; `import fastvst` is light, and its names are what the documentation says."""

from __future__ import annotations

import inspect
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import fastvst
from fastvst.data import Processor
from fastvst.model import ModelConfig, Qwen25VL
from own_rows import write_forty_rows

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder with a model in runs/sft/hf, an image and rows."""
    torch.manual_seed(0)
    processor = Processor.preset("tiny", max_pixels=56 * 56)
    Qwen25VL(ModelConfig.preset("tiny")).save_pretrained(tmp_path / "runs" / "sft" / "hf", processor=processor)
    Image.new("RGB", (80, 60), "white").save(tmp_path / "room.jpg")
    write_forty_rows(tmp_path / "own").rename(tmp_path / "rows.jsonl")
    (tmp_path / "own" / "images").rename(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_block_of_the_page_runs(folder, capsys):
    names: dict[str, object] = {}
    for block in BLOCKS:
        exec(compile(block, "docs/python.md", "exec"), names)
    shown = capsys.readouterr().out.splitlines()
    assert shown[-2:] == ["1.0", "[1.0, 1.0, 0.0]"], "as the comments of the page say"
    assert (folder / "tuned" / "model.safetensors").is_file()
    assert all(name in PAGE for name in fastvst.__all__ if name != "ModelConfig")


def test_blocks_are_about_ten_lines():
    assert len(BLOCKS) == 5
    for block in BLOCKS:
        assert len([line for line in block.splitlines() if line.strip()]) <= 13, block


def test_the_import_is_light_and_every_name_resolves():
    code = "import sys, fastvst; print(sorted({'torch', 'numpy', 'transformers', 'PIL'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    for name in fastvst.__all__:
        assert inspect.getdoc(getattr(fastvst, name)), name
    assert set(fastvst.__all__) <= set(dir(fastvst))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fastvst.nothing  # noqa: B018


def test_help_shows_the_names_with_their_docstrings():
    text = pydoc.render_doc(fastvst, renderer=pydoc.plaintext)
    for name in fastvst.__all__:
        assert re.search(rf"^    (class )?{name}\b", text, re.MULTILINE), name
    assert "(T, hidden_size)" in text and "docs/python.md" in text


def test_load_chooses_the_dtype_and_passes_options_on(folder):
    model, processor = fastvst.load("runs/sft/hf", max_pixels=28 * 28 * 9)
    assert model.dtype == torch.float32 and not model.training and processor.config.max_pixels == 28 * 28 * 9
    assert fastvst.load(Path("runs/sft/hf"), dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fastvst.load("nowhere")


def test_the_loss_is_the_mean_of_torchs_cross_entropy(folder):
    model, processor = fastvst.load("runs/sft/hf", dtype=torch.float64)
    rows = list(fastvst.open_source("rows.jsonl"))[:3]
    batch = fastvst.pack([processor.encode(row) for row in rows])
    logits = model.logits(batch)
    expected = torch.nn.functional.cross_entropy(logits[batch.loss_rows], batch.targets)
    assert torch.allclose(model.loss(batch).double(), expected, rtol=1e-6)
    prompt = fastvst.Sample.from_messages([{"role": "user", "content": "Hello"}])
    encoded = processor.encode(prompt, add_generation_prompt=True)
    with pytest.raises(ValueError, match="no token of memory/0 is supervised"):
        model.loss(fastvst.pack([encoded]))
