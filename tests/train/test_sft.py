"""Whole runs of examples/sft.py on a small model: the same curve on any number of ranks, after any interruption."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvst.config import ConfigError, leaves, usage
from fastvst.data import Processor, TooManyBadSamples, open_source, pack
from fastvst.model import Qwen25VL
from fastvst.train import distributed
from fastvst.train.checkpoint import CheckpointError, complete
from fastvst.train.distributed import ParallelConfig
from fastvst.train.guard import GuardError
from fastvst.train.watchdog import EXIT_STATUS
from ranks import run_ranks, start_ranks
from small_run import arguments, curve, load_script, rows_of, run_sft, write_data, write_model

sft = load_script()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), image_every=5)


@pytest.fixture(scope="module")
def whole(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, float]]:
    """The curve of 20 uninterrupted steps of two packs in one process."""
    out = tmp_path_factory.mktemp("whole") / "run"
    sft.main(arguments(out, data, model, "steps=20", "loader.accumulation=2"))
    rows = rows_of(out)
    assert any(row["images"] == 1 for row in rows)  # one of the two packs has no image
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]
    assert min(row["fill"] for row in rows) > 0.5
    return curve(out)


def _flat(pairs: list[tuple[float, float]]) -> list[float]:
    return [value for pair in pairs for value in pair]


# ------------------------------------------------------------------------------------------------------------- one step


def _packs(model: Path, data: Path, groups: list[int]) -> list[Any]:
    processor = Processor.from_pretrained(model)
    samples = list(open_source(data))[: sum(groups)]
    encoded = [dataclasses.replace(processor.encode(s), origin=i % 2) for i, s in enumerate(samples)]
    ends = [sum(groups[: i + 1]) for i in range(len(groups))]
    return [pack(encoded[end - size : end]) for size, end in zip(groups, ends, strict=True)]


@pytest.mark.parametrize("groups", [[6], [2, 4], [1, 1, 1, 1, 1, 1]])
def test_the_loss_is_the_mean_over_all_supervised_tokens_however_they_are_packed(
    model: Path, data: Path, groups: list[int]
) -> None:
    world = distributed.start(ParallelConfig(device="cpu", threads=1), environment={})
    net = Qwen25VL.from_pretrained(model, dtype=torch.float64)
    (everything,) = _packs(model, data, [6])
    logits = net.logits(everything)[everything.loss_rows]
    expected = torch.nn.functional.cross_entropy(logits, everything.targets)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    totals, losses, shares = sft.accumulate(net, _packs(model, data, groups), world, 0, (False, True))
    assert totals.loss == pytest.approx(expected.item(), rel=1e-6)
    assert sum(loss.item() for loss in losses) == pytest.approx(totals.loss) and sum(shares) == pytest.approx(1)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-8)
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
    assert totals.grad_norm == pytest.approx(norm, rel=1e-6)
    assert (totals.packs, totals.tokens) == (len(groups), everything.num_tokens)
    assert (totals.stop, totals.save) == (False, True)


def test_a_step_reads_the_device_once(model: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Device values are read by `item` or `tolist`; only one read is allowed, losses of two sources included."""
    world = distributed.start(ParallelConfig(device="cpu", threads=1), environment={})
    net = Qwen25VL.from_pretrained(model)
    reads = []
    tolist = torch.Tensor.tolist
    packs = _packs(model, data, [2, 2])

    def counted(tensor: torch.Tensor) -> Any:
        if tensor.requires_grad or tensor.dtype.is_floating_point:
            reads.append(tuple(tensor.shape))
        return tolist(tensor)

    def forbidden(tensor: torch.Tensor) -> Any:
        raise AssertionError("Tensor.item() on the hot path")

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    monkeypatch.setattr(torch.Tensor, "item", forbidden)
    totals, *_ = sft.accumulate(net, packs, world, 1.0, (False, False), sources=("a", "b"))
    assert reads == [(14,)] and totals.samples == 4 and list(totals.losses) == ["a", "b"]


def _expected_losses(net: Qwen25VL, packs: list[Any], count: int) -> list[float]:
    """Mean loss of each source in float64, sample by sample."""
    sums: list[list[float]] = [[] for _ in range(count)]
    for packed in packs:
        logits = net.logits(packed)[packed.loss_rows]
        losses = torch.nn.functional.cross_entropy(logits, packed.targets, reduction="none").tolist()
        ends = packed.cu_seqlens[1:].tolist()
        for row, loss in zip(packed.loss_rows.tolist(), losses, strict=True):
            sums[packed.origins.tolist()[next(i for i, end in enumerate(ends) if row < end)]].append(loss)
    return [sum(one) / len(one) for one in sums]


def test_the_loss_of_each_source_is_the_mean_over_its_supervised_tokens(model: Path, data: Path) -> None:
    world = distributed.start(ParallelConfig(device="cpu", threads=1), environment={})
    net = Qwen25VL.from_pretrained(model, dtype=torch.float64)
    packs = _packs(model, data, [3, 2, 4])
    totals, losses, _ = sft.accumulate(net, packs, world, 0, (False, False), sources=("a", "b", "c"))
    expected = dict(zip("ab", _expected_losses(net, packs, 2), strict=True))  # no sample is of source "c"
    assert totals.losses == pytest.approx(expected, rel=1e-5)
    assert totals.losses["a"] != pytest.approx(totals.losses["b"], rel=1e-3)
    plain, *_ = sft.accumulate(net, packs, world, 0, (False, False))
    assert plain.loss == totals.loss and plain.losses == {}


# ------------------------------------------------------------------------------------------------------- the same curve


@pytest.mark.slow
def test_two_ranks_give_the_curve_of_one_process(
    model: Path, data: Path, whole: list[tuple[float, float]], tmp_path: Path
) -> None:
    run_ranks(run_sft, 2, arguments(tmp_path / "run", data, model, "steps=20"))
    assert _flat(curve(tmp_path / "run")) == pytest.approx(_flat(whole), rel=1e-5)


@pytest.mark.slow
def test_hybrid_sharding_gives_the_same_curve(
    model: Path, data: Path, whole: list[tuple[float, float]], tmp_path: Path
) -> None:
    run_ranks(run_sft, 2, arguments(tmp_path / "run", data, model, "steps=20", "parallel.replicas=2"))
    assert _flat(curve(tmp_path / "run")) == pytest.approx(_flat(whole), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["light", "full"])
def test_recompute_gives_the_same_curve_bit_for_bit(
    model: Path, data: Path, whole: list[tuple[float, float]], tmp_path: Path, policy: str
) -> None:
    command = arguments(tmp_path / "run", data, model, "steps=20", "loader.accumulation=2", f"model.recompute={policy}")
    sft.main(command)
    assert curve(tmp_path / "run") == whole


@pytest.mark.slow
def test_text_only_packs_do_not_hang(model: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", 12, image_every=1000)
    run_ranks(run_sft, 2, arguments(tmp_path / "run", data, model, "steps=4", "data.shuffle_buffer=0"))
    sft.main(arguments(tmp_path / "one", data, model, "steps=4", "data.shuffle_buffer=0", "loader.accumulation=2"))
    assert _flat(curve(tmp_path / "run")) == pytest.approx(_flat(curve(tmp_path / "one")), rel=1e-5)
    assert sum(row["images"] for row in rows_of(tmp_path / "run")) < 8


@pytest.mark.slow
def test_bfloat16_follows_float32(model: Path, data: Path, whole: list[tuple[float, float]], tmp_path: Path) -> None:
    command = arguments(tmp_path / "run", data, model, "steps=20", "loader.accumulation=2", "parallel.dtype=bfloat16")
    run_ranks(run_sft, 1, command)
    assert [loss for loss, _ in curve(tmp_path / "run")] == pytest.approx([loss for loss, _ in whole], rel=0.1)


@pytest.mark.slow
def test_a_finite_data_set_ends_the_run_on_all_ranks(model: Path, data: Path, tmp_path: Path) -> None:
    command = arguments(tmp_path / "run", data, model, "steps=500", "data.epochs=1")
    run_ranks(run_sft, 2, command)
    steps = len(rows_of(tmp_path / "run"))
    assert 3 < steps < 30 and complete(tmp_path / "run" / "checkpoints")[-1].name == f"step-{steps:06d}"


# -------------------------------------------------------------------------------------------------------- interruptions


def _start(command: list[str]) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=run_sft, args=({}, command))
    process.start()
    return process


def _wait_for_rows(out: Path, count: int) -> None:
    limit = time.monotonic() + 120
    while len(_lines(out)) < count:
        assert time.monotonic() < limit, f"{out} has {len(_lines(out))} rows after 120 s; waiting for {count}"
        time.sleep(0.01)


def _lines(out: Path) -> list[str]:
    file = out / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.slow
def test_resume_after_a_kill_gives_the_uninterrupted_curve_bit_for_bit(
    model: Path, data: Path, whole: list[tuple[float, float]], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = arguments(
        *(out, data, model, "steps=20", "loader.accumulation=2", "checkpoint.every=3", "resume=auto"),
        "loader.num_workers=1",
    )
    for kill_after in (random.randint(4, 9), random.randint(13, 18)):
        process = _start(command)
        _wait_for_rows(out, kill_after)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert len(_lines(out)) < 20
    process = _start(command)
    process.join(120)
    assert process.exitcode == 0
    assert [row["step"] for row in rows_of(out)] == list(range(1, 21))
    assert curve(out) == whole


@pytest.mark.slow
def test_sigterm_saves_and_exits_cleanly(
    model: Path, data: Path, whole: list[tuple[float, float]], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = arguments(out, data, model, "steps=20", "loader.accumulation=2", "resume=auto")
    process = _start(command)
    _wait_for_rows(out, 5)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 0
    done = len(rows_of(out))
    assert 5 <= done < 20 and complete(out / "checkpoints")[-1].name == f"step-{done:06d}"
    assert not (out / "hf").exists() and not (out / "report").exists()
    sft.main(command)
    assert curve(out) == whole and (out / "hf" / "config.json").exists()


@pytest.mark.slow
def test_going_back_and_a_flipped_bit_give_the_same_curve_and_lose_nothing(
    model: Path, data: Path, whole: list[tuple[float, float]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = arguments(
        out, data, model, "steps=20", "loader.accumulation=2", "checkpoint.every=5", "checkpoint.keep=9"
    )
    sft.main(command)
    sft.main([*command, f"resume={out / 'checkpoints' / 'step-000005'}"])
    assert "branch 2 of this run starts from step-000005" in capsys.readouterr().out
    names = {p.name for p in (out / "checkpoints").glob("step-*")}
    assert names == {"step-000005"} | {f"step-0000{n}{end}" for n in (10, 15, 20) for end in ("", "-1")}
    assert curve(out) == whole and len((out / "metrics-branch-1.jsonl").read_text().splitlines()) == 20
    shard = next((out / "checkpoints" / "step-000020" / "state").iterdir())
    content = bytearray(shard.read_bytes())
    content[-9] ^= 4
    shard.write_bytes(content)
    sft.main([*command, "resume=auto"])
    said = capsys.readouterr().out
    assert f"passed over: {shard} was changed" in said and f"resumed from {out}/checkpoints/step-000015\n" in said
    assert curve(out) == whole and (out / "checkpoints" / "step-000020.damaged").is_dir()
    assert complete(out / "checkpoints")[-1].name == "step-000020"


def _signal_one(env: dict[str, str], command: list[str], out: Path, number: int) -> str:
    """Rank 1 sends itself a signal after step 3."""

    def send() -> None:
        _wait_for_rows(out, 3)
        os.kill(os.getpid(), number)

    if env["RANK"] == "1":
        threading.Thread(target=send, daemon=True).start()
    return run_sft(env, command)


@pytest.mark.slow
def test_sigterm_to_one_rank_stops_all_at_the_same_step_and_another_number_of_ranks_goes_on(
    model: Path, data: Path, whole: list[tuple[float, float]], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = arguments(out, data, model, "steps=20", "resume=auto")
    assert run_ranks(_signal_one, 2, command, out, signal.SIGTERM) == ["finished"] * 2
    assert 3 <= len(rows_of(out)) < 20
    sft.main([*command, "loader.accumulation=2"])
    assert _flat(curve(out)) == pytest.approx(_flat(whole), rel=1e-5)


@pytest.mark.slow
def test_when_a_rank_is_killed_the_other_one_ends(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    begin = time.monotonic()
    ends = start_ranks(_signal_one, 2, arguments(out, data, model, "steps=2000"), out, signal.SIGKILL)
    assert [code for code, _ in ends] == [EXIT_STATUS, -signal.SIGKILL]
    assert time.monotonic() - begin < 60


def test_a_new_run_renames_the_folder_of_the_old_one(model: Path, data: Path, tmp_path: Path) -> None:
    command = arguments(tmp_path / "run", data, model, "steps=1")
    for _ in range(3):
        sft.main(command)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run-1", "run-2"]
    assert len(rows_of(tmp_path / "run-1")) == 1


# ------------------------------------------------------------------------------------------------------- after training


@pytest.mark.slow
def test_the_written_directory_opens_in_transformers(model: Path, data: Path, tmp_path: Path) -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration

    out = tmp_path / "run"
    run_ranks(run_sft, 2, arguments(out, data, model, "steps=3", "checkpoint.hf=true", "checkpoint.every=2"))
    for folder in (out / "hf", out / "checkpoints" / "step-000002" / "hf", out / "checkpoints" / "step-000003" / "hf"):
        theirs, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ours = Qwen25VL.from_pretrained(out / "hf")
    start = Qwen25VL.from_pretrained(model)
    saved = theirs.state_dict()
    assert torch.equal(saved["lm_head.weight"], ours.head_weight)
    assert not torch.equal(start.head_weight, ours.head_weight)
    assert Processor.from_pretrained(out / "hf").tokenizer.get_vocab_size() > 1000
    assert (out / "report" / "index.html").stat().st_size > 1000


def test_frozen_parts_do_not_move(model: Path, data: Path, tmp_path: Path) -> None:
    sft.main(arguments(tmp_path / "run", data, model, "steps=2", "optimizer.freeze=vision,merger", "schedule.warmup=0"))
    before = Qwen25VL.from_pretrained(model)
    after = Qwen25VL.from_pretrained(tmp_path / "run" / "hf")
    for (name, p), q in zip(before.named_parameters(), after.parameters(), strict=True):
        assert torch.equal(p, q) == name.startswith("visual."), name


def test_dry_run_prints_the_cost_and_writes_nothing(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sft.main(arguments(tmp_path / "run", data, model, "--dry-run"))
    text = capsys.readouterr().out
    parameters = sum(p.numel() for p in Qwen25VL.from_pretrained(model).parameters())
    for part in (f"parameters: {parameters:,}", "packing: fill", "TFLOP", "optimizer.lr", "GiB on each GPU", "decoder"):
        assert part in text
    assert "first 40 samples" in text and "over the 40 samples" in text
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------------ bad input


def test_an_unknown_option_names_the_nearest(model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'optimiser.lr'; did you mean 'optimizer.lr'"):
        sft.main(arguments(tmp_path / "run", data, model, "--optimiser.lr", "1"))
    with pytest.raises(ConfigError, match=r"steps must be int.*; got 'many'"):
        sft.main(arguments(tmp_path / "run", data, model, "--steps", "many"))


def test_missing_directories_are_named(model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no_model"):
        sft.main(arguments(tmp_path / "run", data, tmp_path / "no_model", "steps=1"))
    with pytest.raises(ConfigError, match="data.sources.*no_data"):
        sft.main(arguments(tmp_path / "run", tmp_path / "no_data.jsonl", model, "steps=1"))
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((model / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match="bare.*tokenizer"):
        sft.main(arguments(tmp_path / "run", data, bare, "steps=1"))
    with pytest.raises(CheckpointError, match="step-7"):
        sft.main(arguments(tmp_path / "run", data, model, "steps=1", f"resume={tmp_path}/step-7"))


@pytest.mark.parametrize("rows", ["", '{"id": "0", "conversations": []}\n' * 5])
def test_data_without_a_usable_sample(model: Path, tmp_path: Path, rows: str) -> None:
    (tmp_path / "data.jsonl").write_text(rows)
    with pytest.raises((ValueError, TooManyBadSamples), match=r"data|small"):
        sft.main(arguments(tmp_path / "run", tmp_path / "data.jsonl", model, "steps=1"))


def test_all_samples_rejected_is_a_summary(model: Path, data: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) | {"image": "gone.png"} for line in data.read_text().splitlines() if "image" in line]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(TooManyBadSamples, match="no usable sample(.|\n)*missing_image"):
        sft.main(arguments(tmp_path / "run", tmp_path / "data.jsonl", model, "steps=1", "data.epochs=1"))


def test_out_of_memory_says_what_to_change(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(sft, "accumulate", full)
    with pytest.raises(RuntimeError) as error:
        sft.main(arguments(tmp_path / "run", data, model, "steps=1"))
    text = str(error.value)
    for part in ("rank 0", "out of memory", "--model.recompute light", "--loader.tokens_per_pack 64", "--dry-run"):
        assert part in text
    with pytest.raises(RuntimeError, match="--model.recompute light"):
        sft.main(arguments(tmp_path / "run", data, model, "steps=1"))
    with pytest.raises(RuntimeError) as error:
        sft.main(arguments(tmp_path / "run", data, model, "steps=1", "model.recompute=full"))
    assert "--model.recompute" not in str(error.value)


def _diverge(env: dict[str, str], command: list[str]) -> str:
    try:
        return run_sft(env, command)
    except GuardError as error:
        return str(error)


@pytest.mark.slow
def test_a_diverging_run_is_stopped_on_all_ranks_and_its_samples_are_recorded(
    model: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = arguments(out, data, model, "steps=50", "optimizer.lr=1e30", "guard.patience=3", "schedule.warmup=0")
    messages = run_ranks(_diverge, 2, command)
    assert all("3 steps in a row were skipped" in message and "skipped-" in message for message in messages)
    for rank in range(2):
        rows = [json.loads(line) for line in (out / f"skipped-{rank:05d}.jsonl").read_text().splitlines()]
        assert len(rows) == 3 and {row["rank"] for row in rows} == {rank}
        assert all(name.startswith("small/") for row in rows for pack in row["packs"] for name in pack["samples"])
    assert [row["step"] for row in rows_of(out)][-1] < 10


def test_the_script_has_at_most_72_options() -> None:
    names = [name for name, _ in leaves(sft.Config())]
    # checkpoint.every_minutes: steps of unknown length cannot be turned into a bound on lost work.
    # evaluation.*, log.profile, log.peak_tflops: a run of fifty hours is chosen and mended by what it shows.
    # optimizer.state: 7B on one GPU needs 8-bit moments. device_memory: a laptop plans a run on a node.
    assert len(names) <= 74, f"{len(names)} options: {names}"
    assert all(f"--{name} <" in usage(sft.Config) for name, _ in leaves(sft.Config()))
