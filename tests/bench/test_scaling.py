"""The bench of model and data sizes: its models, its loss, and the page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from bench.scaling import __main__ as bench
from bench.scaling.page import sizes, write_page
from fastvst.data import Processor, open_source, pack
from fastvst.generate.parquet import to_row, write_rows
from fastvst.model import Qwen25VL


def results() -> dict:
    runs = []
    for layers in (2, 4, 8):
        for rows in (250, 1000, 4000):
            share = 0.4 + 0.02 * layers + rows / 20000
            task = {"loss": 1.5 - share, "accuracy": share, "low": share - 0.05, "high": share + 0.05}
            tasks = {"depth_comparison": task, "measurement": task}
            parameters = 1_000_000 * layers
            runs.append(
                {"layers": layers, "rows": rows, "parameters": parameters, "training_loss": 0.1, "tasks": tasks}
            )
    made = {"commit": "abc", "seed": 0, "steps": 9, "held_out": 300, "tasks": ["depth_comparison", "measurement"]}
    return {"made_with": made, "runs": runs}


def test_the_page_shows_every_run() -> None:
    found = results()
    page = write_page(found)
    assert sizes(found["runs"]) == [(2, 2_000_000), (4, 4_000_000), (8, 8_000_000)]
    assert page.count("<svg") == 4 and page.count("<polyline") == 12 and page.count("<circle") == 36
    assert "53.0 [48.0, 58.0]" in page, "4 layers, 1,000 rows"
    # more rows are farther right, a higher share is farther up
    points = re.search(r'accuracy on held-out rooms.*?points="([^"]+)"', page)[1].split()
    x, y = zip(*(map(float, point.split(",")) for point in points), strict=True)
    assert list(x) == sorted(x) and list(y) == sorted(y, reverse=True)


def test_models_differ_by_their_layers_and_share_the_tower(tmp_path: Path) -> None:
    two, three = (Qwen25VL.from_pretrained(bench.write_model(n, tmp_path / str(n))) for n in (2, 3))
    assert [len(m.model.layers) for m in (two, three)] == [2, 3]
    assert all(torch.equal(a, b) for a, b in zip(two.visual.parameters(), three.visual.parameters(), strict=True))
    assert torch.equal(three.visual.patch_embed.proj.weight, Qwen25VL.fresh("tiny").visual.patch_embed.proj.weight)


def test_the_loss_of_rows_is_that_of_one_pack(tmp_path: Path, scenes) -> None:
    from fastvst.generate.presets import HELDOUT
    from fastvst.generate.rooms import scene_samples

    samples = scene_samples(scenes[0], 0, HELDOUT)[:4]
    write_rows(tmp_path / "rows.parquet", [to_row(sample, 95) for sample in samples])
    model = Qwen25VL.from_pretrained(bench.write_model(2, tmp_path / "model")).eval()
    processor = Processor.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        together = float(model.loss(pack([processor.encode(s) for s in open_source(tmp_path / "rows.parquet")])))
    assert bench.loss_of(model, processor, str(tmp_path / "rows.parquet")) == pytest.approx(together, rel=1e-4)
