"""Answering a benchmark, from questions with images to predictions on disk, and transformers' batched `generate`."""

from __future__ import annotations

import dataclasses
import io
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench.cases.transformers_peer import padded, peer
from bench.table import Result
from fastvst.data import Processor, open_source
from fastvst.evaluate import mmstar, rooms, run
from fastvst.evaluate.files import Row
from fastvst.generate.presets import ALL_TASKS
from fastvst.generate.rooms_subprocess import make_rooms_in_subprocess
from fastvst.model import ModelConfig, Qwen25VL
from fastvst.rollout import Engine
from fastvst.tasks import PAIRS, SINGLE

PICTURES = 16  # a quarter of them without --full
QUESTIONS = 8
TOKENS = 32
BATCH = 32  # VSI-Bench asks 18 questions about each of its videos
ROOM_ROWS = 96  # a third of them without --full


def make_rows(pictures: int) -> list[Row]:
    rng = np.random.default_rng(0)
    rows = []
    for number in range(pictures):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (224, 280, 3), dtype=np.uint8)).save(buffer, format="PNG")
        image = buffer.getvalue()
        options = {"A": "left", "B": "right", "C": "front", "D": "back"}
        for k in range(QUESTIONS):
            text = f"Question {k}: on which side of the table is the chair?"
            rows.append(Row(f"{number}-{k}", text, "A", "near", images=(image,), options=options))
    return rows


def in_turns(
    ours: Callable[[], int], generate: Callable[[], int], tokens: int, goal: float | None
) -> tuple[Result, dict[str, float]]:
    """Run both twice, alternating; each run makes `tokens` tokens. Returns the figures of the faster runs."""
    best: dict[str, float] = {}
    for _ in range(2):
        for name, function in {"evaluate": ours, "generate": generate}.items():
            begin = time.perf_counter()
            assert function() == tokens
            best[name] = min(best.get(name, float("inf")), time.perf_counter() - begin)
    row = Result("tokens/s", tokens / best["evaluate"], "transformers generate", tokens / best["generate"], goal=goal)
    return row, {
        "evaluate_tokens_per_s": row.ours,
        "transformers_tokens_per_s": tokens / best["generate"],
        "ratio": best["generate"] / best["evaluate"],
    }


def test_answers_beside_generate(record: Callable[..., None], full: bool, tmp_path: Path) -> None:
    """From rows to texts in both, image decoding included; all answers have the full length. The two alternate."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Qwen25VL(ModelConfig.preset("tiny"))
    processor = Processor.preset("tiny")
    rows = make_rows(PICTURES if full else PICTURES // 4)
    theirs = peer(model)
    greedy = dataclasses.replace(run.GREEDY, ignore_eos=True)
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
                **inputs,
                do_sample=False,
                max_new_tokens=TOKENS,
                min_new_tokens=TOKENS,
                pad_token_id=model.config.pad_token_id,
            )
            made = out[:, inputs["input_ids"].shape[1] :]
            count += sum(len(processor.decode(row.tolist())) >= 0 for row in made) * made.shape[1]
        return count

    name = f"tiny, {len(rows) // QUESTIONS} images x {QUESTIONS} questions x {TOKENS} tokens"
    row, figures = in_turns(ours, generate, len(rows) * TOKENS, None)
    record(name, row, **figures)


@pytest.mark.needs(("moderngl", "embreex"))
def test_rooms_beside_generate(record: Callable[..., None], full: bool, tmp_path: Path) -> None:
    """The image tasks of the rooms benchmark: prompts with one or two images, answers as long as the true ones.

    A true answer is a word, a list of boxes or a caption. A batch of `generate` waits for its longest answer.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Qwen25VL(ModelConfig.preset("tiny"))
    processor = Processor.preset("tiny", max_pixels=168 * 126, max_seq_len=2048, fov_base_width=200)
    theirs = peer(model)
    engine = Engine(model, processor, max_sequences=BATCH)
    count = ROOM_ROWS if full else ROOM_ROWS // 3
    config = dataclasses.replace(ALL_TASKS, rows=dict.fromkeys([*SINGLE, *PAIRS], 1.0), walk=None)
    folder = make_rooms_in_subprocess(str(tmp_path), count, 0, 2, config, split="heldout")
    asked = [q.sample for q in rooms.questions(open_source(folder))][:count]
    prompts = [dataclasses.replace(s, messages=s.messages[:-1]) for s in asked]
    replies = [s.messages[-1]["content"][0]["text"] for s in asked]
    lengths = [len(processor.tokenizer.encode(reply)) + 1 for reply in replies]
    greedy = [dataclasses.replace(run.GREEDY, ignore_eos=True, max_tokens=n, logprobs=False) for n in lengths]

    def ours() -> int:
        return sum(len(found[0].tokens) for found in engine.generate(prompts, greedy))

    @torch.inference_mode()
    def generate() -> int:
        count = 0
        for first in range(0, len(prompts), BATCH):
            part = prompts[first : first + BATCH]
            wanted = lengths[first : first + BATCH]
            inputs = padded(model.config, [processor.encode(p, add_generation_prompt=True) for p in part])
            out = theirs.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=max(wanted),
                min_new_tokens=max(wanted),
                pad_token_id=model.config.pad_token_id,
            )
            made = out[:, inputs["input_ids"].shape[1] :].tolist()
            count += sum(
                len(row[:n]) for row, n in zip(made, wanted, strict=True) if processor.decode(row[:n]) is not None
            )
        return count

    name = f"tiny, {count} questions of the rooms benchmark, answers of {min(lengths)} to {max(lengths)} tokens"
    row, figures = in_turns(ours, generate, sum(lengths), 3.0)
    record(name, row, mean_tokens=sum(lengths) / len(lengths), goal=3.0, **figures)
