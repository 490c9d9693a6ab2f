"""The base of the tiny preset: how its rows become packs, and what the shipped weights are."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from fastvst.batch import PackedBatch, pack, pack_groups
from fastvst.data import Sample
from fastvst.generate.parquet import to_row, write_rows
from fastvst.generate.presets import BASE
from fastvst.generate.rooms import scene_samples
from fastvst.model import Qwen25VL
from fastvst.model.tiny_start import ALIGNED
from fastvst.scenes.scene import Scene
from tools.build_base import CURRICULUM, IGNORE, Batches, Recipe, Stage, group, make_optimizers, train
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


def test_half_of_the_rows_ask_for_the_new_skill_and_half_for_those_before_it(
    talks: list[Sample], tmp_path: Path
) -> None:
    write_rows(tmp_path / "rows.parquet", [to_row(sample, 95) for sample in talks])
    processor = tiny_processor()
    stages = (
        Stage(3, "general_marks", "[Ww]hich part"),
        Stage(20, "general_marks", "farther left"),
        Stage(9, "general"),
    )
    made = list(itertools.islice(Batches(tmp_path, Recipe(stages=stages)), 32))
    assert all(0 < batch.num_tokens <= 1024 for batch in made)

    def kinds(batch: PackedBatch) -> list[set[str]]:
        """What every row of a pack asks for."""
        ends = batch.cu_seqlens.tolist()
        found: dict[int, set[str]] = defaultdict(set)
        for a, b, prompt in zip(ends, ends[1:], batch.groups.tolist(), strict=False):
            text = processor.tokenizer.decode(batch.tokens[a:b].tolist())
            if prompt >= 0:
                found[prompt].add(next((k for k in ("hich part", "farther left") if k in text), "other"))
        return list(found.values())

    assert all(asked == {"hich part"} for batch in made[:3] for asked in kinds(batch))
    second = [asked for batch in made[3:23] for asked in kinds(batch)]
    assert 0.35 < second.count({"farther left"}) / len(second) < 0.65
    assert second.count({"farther left"}) + second.count({"hich part"}) == len(second)
    third = [asked for batch in made[23:] for asked in kinds(batch)]
    assert {"other"} in third and any("other" not in asked for asked in third)


def test_every_question_of_the_rows_belongs_to_a_stage(talks: list[Sample]) -> None:
    for sample in talks:
        patterns = [stage.questions for stage in CURRICULUM if stage.task == sample.metadata["task"]]
        for question in said(sample):
            found = [pattern for pattern in patterns if re.search(pattern, question)]
            assert len(found) == 1, (question, found)


def said(sample: Sample) -> list[str]:
    """The questions of a row."""
    return [message["content"][-1]["text"] for message in sample.messages[::2]]


def test_muon_has_the_matrices_adamw_the_rest_and_nothing_the_aligned_parts() -> None:
    model = Qwen25VL.fresh("tiny")
    muon, adamw = make_optimizers(model, Recipe())
    named = {id(p): n for n, p in model.named_parameters()}
    first = {named[id(p)] for group in muon.param_groups for p in group["params"]}
    rest = [named[id(p)] for group in adamw.param_groups for p in group["params"]]
    fixed = {n for n, _ in model.named_parameters() if n.startswith(ALIGNED)}
    assert len(fixed) == 7, "the table, and three parameters of attention in two layers"
    matrices = {n for n, p in model.named_parameters() if n.startswith("model.layers") and p.dim() == 2}
    assert first == matrices - fixed
    assert sorted([*first, *rest]) == sorted(set(named.values()) - fixed), "every other parameter once"


def test_the_rate_rises_holds_and_falls() -> None:
    recipe = Recipe(stages=(Stage(600, "general"), Stage(400, "general_pair")), decay=200)
    assert recipe.learned(599) == (recipe.stages[0], ()) and recipe.learned(600) == (
        recipe.stages[1],
        recipe.stages[:1],
    )
    rates = [recipe.rate(step) for step in range(1000)]
    assert rates[0] == pytest.approx(1 / 50) and rates[49] == rates[799] == 1.0 and rates[-1] == pytest.approx(1 / 200)
    assert rates == sorted(rates[:500]) + sorted(rates[500:], reverse=True)


def test_training_writes_models_and_a_log(talks: list[Sample], tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    write_rows(rows / "rows.parquet", [to_row(sample, 95) for sample in talks])
    before = Qwen25VL.fresh("tiny", start="aligned")
    model = train(rows, tmp_path, Recipe(stages=(Stage(1, "general_marks"), Stage(1, "general")), decay=1), every=2)
    again = Qwen25VL.from_pretrained(tmp_path / "step-00002")
    torch.manual_seed(0)
    start = dict(Qwen25VL.fresh("tiny", start="aligned").named_parameters())
    assert all(torch.equal(p, start[n]) == n.startswith(ALIGNED) for n, p in again.named_parameters() if p.dim() == 2)
    tower = (m.visual.patch_embed.proj.weight for m in (before, model))
    assert not torch.equal(*tower), "the tower is trained too"
