"""The base of the tiny preset: how its rows become packs, and what the shipped weights are."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch

from fastvst.batch import pack, pack_groups
from fastvst.data import Sample
from fastvst.generate.parquet import to_row, write_rows
from fastvst.generate.presets import BASE
from fastvst.generate.rooms import scene_samples
from fastvst.model import Qwen25VL
from fastvst.scenes.scene import Scene
from tools.build_base import IGNORE, MARK, PART, Batches, Recipe, group, make_optimizers, train
from tools.tower_batches import tiny_processor


@pytest.fixture(scope="module")
def talks(scenes: list[Scene]) -> list[Sample]:
    return [row for number, scene in enumerate(scenes[:3]) for row in scene_samples(scene, number, BASE)]


def alone(sample: Sample, turn: int) -> Sample:
    """One turn of a conversation with all of its images."""
    question, reply = (dict(message) for message in sample.messages[2 * turn : 2 * turn + 2])
    images = [part for part in sample.messages[0]["content"] if part["type"] == "image"]
    question["content"] = [*images, question["content"][-1]]
    return dataclasses.replace(sample, messages=[question, reply])


def test_a_turn_is_what_the_processor_makes_of_it_alone(talks: list[Sample]) -> None:
    processor = tiny_processor()
    seen = set()
    for sample in talks[:: max(1, len(talks) // 25)]:
        seen.add(sample.metadata["task"])
        prompt, completions = group(sample, processor)
        assert len(completions) == len(sample.messages) // 2
        for turn, completion in enumerate(completions):
            whole = processor.encode(alone(sample, turn))
            assert torch.equal(torch.cat([prompt.tokens, completion.tokens]), whole.tokens)
            assert torch.equal(torch.cat([prompt.positions, completion.positions], 1), whole.positions)
            reply = sample.messages[2 * turn + 1]["content"][-1]["text"]
            learned = completion.tokens[completion.labels != IGNORE].tolist()
            assert processor.tokenizer.decode(learned, skip_special_tokens=False) == f"{reply}<|im_end|>\n"
            assert (completion.labels == IGNORE).any() and (prompt.labels == IGNORE).all()
    assert seen == {"general", "general_marks", "general_pair", "general_text"}


def test_the_loss_is_that_of_the_turns_alone(talks: list[Sample]) -> None:
    """Side by side, no turn sees another: the mean over the replies' tokens is that of separate samples."""
    processor = tiny_processor()
    torch.manual_seed(0)
    model = Qwen25VL.fresh("tiny").eval()
    sample = next(row for row in talks if row.metadata["task"] == "general_pair")
    prompt, completions = group(sample, processor)
    total = 0.0
    count = 0
    for turn, completion in enumerate(completions):
        whole = processor.encode(alone(sample, turn))
        labels = torch.cat([prompt.labels, completion.labels])
        learned = int((labels != IGNORE).sum())
        total += float(model.loss(pack([dataclasses.replace(whole, labels=labels)])).detach()) * learned
        count += learned
    together = float(model.loss(pack_groups([(prompt, completions)])).detach())
    assert together == pytest.approx(total / count, rel=1e-4)


def test_the_curriculum_asks_for_parts_then_about_marks_then_everything(talks: list[Sample], tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.parquet", [to_row(sample, 95) for sample in talks])
    processor = tiny_processor()
    made = list(itertools.islice(Batches(tmp_path, Recipe(steps=6, parts=2, marks=4)), 8))
    assert all(0 < batch.num_tokens <= 1024 for batch in made)

    def spoken(batch) -> list[str]:
        ends = batch.cu_seqlens.tolist()
        parts = zip(ends, ends[1:], batch.groups.tolist(), strict=False)
        return [processor.tokenizer.decode(batch.tokens[a:b].tolist()) for a, b, prompt in parts if prompt >= 0]

    assert all(PART.search(text) for batch in made[:2] for text in spoken(batch))
    later = [text for batch in made[2:4] for text in spoken(batch)]
    assert not all(PART.search(text) for text in later)
    listed = {text for sample in talks if sample.metadata["task"] == "general_marks" for text in said(sample)}
    assert all(MARK.search(text) or any(turn in text for turn in listed) for text in later)
    everything = [text for batch in made[4:] for text in spoken(batch)]
    assert any(not MARK.search(text) and not any(turn in text for turn in listed) for text in everything)


def said(sample: Sample) -> list[str]:
    """The questions of a row."""
    return [message["content"][-1]["text"] for message in sample.messages[::2]]


def test_muon_has_the_matrices_of_the_layers_and_adamw_the_rest() -> None:
    model = Qwen25VL.fresh("tiny")
    muon, adamw = make_optimizers(model, Recipe())
    named = {id(p): n for n, p in model.named_parameters()}
    first = {named[id(p)] for group in muon.param_groups for p in group["params"]}
    rest = [named[id(p)] for group in adamw.param_groups for p in group["params"]]
    assert first == {n for n, p in model.named_parameters() if n.startswith("model.layers") and p.dim() == 2}
    assert sorted([*first, *rest]) == sorted(named.values()), "every parameter once"


def test_the_rate_rises_holds_and_falls() -> None:
    recipe = Recipe(steps=1000, decay=200)
    rates = [recipe.rate(step) for step in range(1000)]
    assert rates[0] == pytest.approx(1 / 50) and rates[49] == rates[799] == 1.0 and rates[-1] == pytest.approx(1 / 200)
    assert rates == sorted(rates[:500]) + sorted(rates[500:], reverse=True)


def test_training_writes_models_and_a_log(talks: list[Sample], tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    write_rows(rows / "rows.parquet", [to_row(sample, 95) for sample in talks])
    before = Qwen25VL.fresh("tiny")
    model = train(rows, tmp_path, Recipe(steps=2, marks=1, decay=1), every=2)
    again = Qwen25VL.from_pretrained(tmp_path / "step-00002")
    assert torch.equal(again.head_weight, model.head_weight)
    tower = (m.visual.patch_embed.proj.weight for m in (before, model))
    assert not torch.equal(*tower), "the tower is trained too"
