"""The prompts of a run: their images are not in memory before a rank asks them."""

from __future__ import annotations

import base64
import io
import json
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fastvst.data import Ledger, MixtureConfig, Processor, SourceConfig, open_mixture
from fastvst.data.file_range import FileRange
from fastvst.rl.heldout import read_prompts
from fastvst.rl.prompts import PromptStream
from fastvst.rl.rooms import open_prompts

ROWS = 120
CONFIG = SimpleNamespace(sampling=SimpleNamespace(system="none"), reward=SimpleNamespace(needs_answer=True))


def write(folder: Path, kind: str) -> Path:
    """120 rows with a noise image of 100 KB each."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(ROWS):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (182, 182, 3), dtype=np.uint8)).save(buffer, "PNG")
        image: object = {"bytes": buffer.getvalue(), "path": None}
        if kind == "json":
            image = base64.b64encode(buffer.getvalue()).decode()
        rows.append({"id": str(index), "question": "How far?", "answer": "2", "image": image, "extra": index})
    path = folder / f"rows.{'jsonl' if kind == 'json' else 'parquet'}"
    if kind == "json":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=20, compression=kind, use_dictionary=False)
    return path


@pytest.mark.parametrize("kind", ["none", "snappy", "json"])
def test_images_of_prompts_are_not_in_memory(kind, tmp_path) -> None:
    path = write(tmp_path, kind)
    data = MixtureConfig((SourceConfig(str(path)),), shuffle_buffer=ROWS - 20)
    processor = Processor.preset("tiny", max_seq_len=512)
    plain = PromptStream(open_mixture(data, whole_rows=True), processor, Ledger(), rank=1, size=4)
    expected = plain.take(12)
    del plain
    tracemalloc.start()
    stream = open_prompts(CONFIG, data, processor, Ledger(), rank=1, size=4)
    taken = stream.take(12)
    held = tracemalloc.get_traced_memory()[0]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    batch = 20 * 110e3 if kind == "snappy" else 0.0  # rows of the row group that is being read
    assert held < 1e6 + batch, f"{held / 1e6:.1f} MB of 12 MB of images"
    assert peak < (1e6 if kind == "none" else 20 * 300e3)  # what pyarrow reads is not counted; 20 rows become objects
    assert [p.number for p in taken] == [p.number for p in expected] and len(taken) == 3
    for one, other in zip(taken, expected, strict=True):
        assert isinstance(one.sample.parts("image")[0]["image"], FileRange)
        assert one.row("2") == other.row("2") and one.row("2").columns["extra"] == other.sample.row["extra"]
    found = [encoded for _, encoded in stream.encode(taken)]
    for one, (_, other) in zip(found, stream.encode(expected), strict=True):
        assert torch.equal(one.patches, other.patches) and torch.equal(one.tokens, other.tokens)
    state = json.loads(json.dumps(stream.state_dict()))
    following = [p.sample.id for p in stream.take(20)]
    again = open_prompts(CONFIG, data, processor, Ledger(), rank=1, size=4)
    again.load_state_dict(state)
    assert [p.sample.id for p in again.take(20)] == following
    tracemalloc.start()
    questions = read_prompts(path, 100, stream)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(stream.encode(questions[:5])) == 5 and held < 1e6
