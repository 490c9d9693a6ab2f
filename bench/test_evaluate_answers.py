"""Answering a benchmark: questions with pictures to predictions on disk, beside transformers' batched `generate`."""

from __future__ import annotations

import dataclasses
import io
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastvst.data import Processor
from fastvst.evaluate import mmstar, run
from fastvst.evaluate.files import Row
from fastvst.model import ModelConfig, Qwen25VL
from test_rollout import padded, peer

PICTURES, QUESTIONS, TOKENS, BATCH = 16, 8, 32, 32  # VSI-Bench asks 18 questions about each of its videos


def make_rows() -> list[Row]:
    rng = np.random.default_rng(0)
    rows = []
    for number in range(PICTURES):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (224, 280, 3), dtype=np.uint8)).save(buffer, format="PNG")
        picture, options = buffer.getvalue(), {"A": "left", "B": "right", "C": "front", "D": "back"}
        for k in range(QUESTIONS):
            text = f"Question {k}: on which side of the table is the chair?"
            rows.append(Row(f"{number}-{k}", text, "A", "near", images=(picture,), options=options))
    return rows


def test_answers_beside_generate(record: Callable[..., None], tmp_path: Path) -> None:
    """From rows to texts in both, decoding of pictures included; every answer has all its tokens. Alternating turns."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, processor, rows = Qwen25VL(ModelConfig.preset("tiny")), Processor.preset("tiny"), make_rows()
    theirs, greedy = peer(model), dataclasses.replace(run.GREEDY, ignore_eos=True)
    files = iter(tmp_path / f"{k}.jsonl" for k in range(9))

    def ours() -> int:
        return run.answer(
            model, processor, rows, mmstar.prompt, next(files), max_new_tokens=TOKENS, batch_size=BATCH, sampling=greedy
        ).tokens

    @torch.inference_mode()
    def generate() -> int:
        count = 0
        for first in range(0, len(rows), BATCH):
            samples = [
                processor.encode(mmstar.prompt(r), add_generation_prompt=True) for r in rows[first : first + BATCH]
            ]
            inputs = padded(model.config, samples)
            out = theirs.generate(
                **inputs, do_sample=False, max_new_tokens=TOKENS, min_new_tokens=TOKENS,
                pad_token_id=model.config.pad_token_id,
            )  # fmt: skip
            made = out[:, inputs["input_ids"].shape[1] :]
            count += sum(len(processor.decode(row.tolist())) >= 0 for row in made) * made.shape[1]
        return count

    best: dict[str, float] = {}
    for _ in range(2):
        for name, function in {"evaluate": ours, "generate": generate}.items():
            begin = time.perf_counter()
            assert function() == len(rows) * TOKENS
            best[name] = min(best.get(name, float("inf")), time.perf_counter() - begin)
    tokens = len(rows) * TOKENS
    record(
        f"tiny, {PICTURES} pictures x {QUESTIONS} questions x {TOKENS} tokens",
        evaluate_tokens_per_s=tokens / best["evaluate"], transformers_tokens_per_s=tokens / best["generate"],
        ratio=best["generate"] / best["evaluate"], goal=3.0,
    )  # fmt: skip
