"""Whole runs of examples/rl.py on a small model: learning, resuming, and the files of a run."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from fastvst.config import ConfigError, leaves, load_config
from fastvst.model import Qwen25VL
from fastvst.rl.filtering import NoUpdate
from fastvst.rl.rewards.pool import RewardError
from fastvst.train.checkpoint import complete
from fastvst.train.guard import GuardError
from fastvst.train.run import read_config
from ranks import run_ranks
from rl_run import REWARD, load_rl, rl_arguments, rl_curve, run_rl, write_questions
from small_run import ROOT, write_model

rl = load_rl()
RESTING = '''
import pathlib, time

def letters(responses, rows):
    """As slow as a step; touches a file while it runs."""
    pathlib.Path(__file__).with_name("resting").touch()
    time.sleep(0.15)
    return [min(1.0, 3 * text.count("e") / max(len(text), 1)) for text in responses]
'''


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reward") / "mine.py"
    path.write_text(REWARD)
    return path


@pytest.fixture(scope="module")
def whole(model: Path, data: Path, reward: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 8 steps."""
    out = tmp_path_factory.mktemp("whole") / "run"
    test = f"evaluation.path={data}"
    rl.main(rl_arguments(out, data, model, reward, "steps=8", test, "evaluation.every=4", "evaluation.questions=6"))
    return out


def rows_of(out: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def test_a_run_writes_its_files(whole: Path, model: Path) -> None:
    rows = rows_of(whole)
    assert [r["step"] for r in rows] == list(range(1, 9))
    keys = "reward accuracy format length length_max clipped entropy grad_norm clip_low clip_high kl_old_k3 too_easy "
    keys += "too_hard kept sampler_gap sampler_gap_max prefill_seconds decode_seconds reward_seconds update_seconds "
    keys += "decode_tokens_per_s update_tokens_per_s token_saving split_groups kept_share reward/relaxed"
    assert set(keys.split()) <= set(rows[-1]), set(keys.split()) - set(rows[-1])
    assert max(r["sampler_gap_max"] for r in rows) < 1e-4 and rows[-1]["token_saving"] > 1.5
    assert all(
        r["ratio_max"] == 1.0 for r in rows if "ratio_max" in r
    )  # the only update of a step is on policy: no old log-probabilities
    asked = rows_of(whole, "rollouts.jsonl")
    assert {g["step"] for g in asked} == set(range(1, 9)) and all(len(g["answers"]) == 4 for g in asked)
    kept = [g for g in asked if g["verdict"] == "keep"]
    assert all(abs(sum(a["advantage"] for a in g["answers"])) < 1e-4 for g in kept)
    assert [r["step"] for r in rows_of(whole, "evaluation.jsonl")] == [0, 4, 8]
    assert (whole / "report" / "index.html").stat().st_size > 5000
    before = Qwen25VL.from_pretrained(model)
    after = Qwen25VL.from_pretrained(whole / "hf")
    assert not torch.equal(before.head_weight, after.head_weight)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_in_bitwise_numerics_sampler_and_trainer_agree_exactly(
    model: Path, data: Path, reward: Path, tmp_path: Path, temperature: float
) -> None:
    options = ["steps=2", "sampling.numerics=bitwise", f"sampling.temperature={temperature}"]
    rl.main(rl_arguments(tmp_path / "run", data, model, reward, *options))
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 2 and all(r["sampler_gap_max"] == r["kl_sampler_k3"] == 0.0 for r in rows), rows


def test_a_kept_engine_trains_the_same_model(
    model: Path, data: Path, reward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a memory model that has room for it the engine lives through the run; every loss has the same bits."""
    found = []
    for name, options in (("freed", ()), ("kept", ("device_memory=80",))):
        rl.main(rl_arguments(tmp_path / name, data, model, reward, "steps=3", *options))
        assert f"the engine is {name}" in capsys.readouterr().out
        found.append([(row["loss"], row["grad_norm"], row["reward"]) for row in rows_of(tmp_path / name)])
    assert found[0] == found[1] and len(found[0]) == 3


@pytest.mark.slow
def test_a_run_earns_more(model: Path, data: Path, reward: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = rl_arguments(out, data, model, reward, "steps=25", "sampling.answers=8", "optimizer.lr=1e-2")
    rl.main(command)
    rewards = [r["reward"] for r in rows_of(out)]
    assert sum(rewards[-5:]) > 1.15 * sum(rewards[:5]), rewards


def test_parked_completions_continue_with_the_log_probabilities_of_the_trainer(
    model: Path, data: Path, reward: Path, tmp_path: Path
) -> None:
    """With a learning rate of 0 the tokens of earlier weights are those of today's."""
    options = ["sampling.unfinished=park", "update.importance=token", "filter.tries=6", "optimizer.lr=0"]
    more = ["optimizer.vision_lr=0", "sampling.max_tokens=20", "sampling.prompts=2", "steps=4"]
    rl.main(rl_arguments(tmp_path / "run", data, model, reward, *options, *more))
    rows = rows_of(tmp_path / "run")
    assert any(row["stale"] > 0 for row in rows) and all(row["thrown_away"] == 0 for row in rows)
    assert max(row["sampler_gap_max"] for row in rows) < 1e-4
    groups = rows_of(tmp_path / "run", "rollouts.jsonl")
    assert [group["number"] for group in groups] == list(range(len(groups)))
    continued = [a for group in groups for a in group["answers"] if len(a.get("versions", [])) > 1]
    assert continued and all(sum(n for _, n in a["versions"]) == a["tokens"] for a in continued)
    for change, words in (("update.importance=none", "earlier weights"), ("sampling.base_url=http://x", "a server")):
        with pytest.raises(ConfigError, match=f"unfinished is park.*{words}"):
            rl.main(rl_arguments(tmp_path / "bad", data, model, reward, *options, change))


# -------------------------------------------------------------------------------------------------------- interruptions


def _start(command: list[str]) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=run_rl, args=({}, command))
    process.start()
    return process


def _wait(reached: object, process: multiprocessing.process.BaseProcess) -> None:
    limit = time.monotonic() + 120
    while not reached() and process.is_alive():  # type: ignore[operator]
        assert time.monotonic() < limit
        time.sleep(0.005)


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.slow
def test_killed_in_rollout_reward_or_update_a_run_resumes_with_the_same_curve(
    model: Path, data: Path, tmp_path: Path
) -> None:
    slow = tmp_path / "slow.py"
    slow.write_text(RESTING)
    command = ["steps=5", "checkpoint.every=1", "checkpoint.keep=1"]
    plain = rl_arguments(tmp_path / "plain", data, model, slow, *command)
    rl.main(plain)
    out = tmp_path / "run"
    killed = rl_arguments(out, data, model, slow, *command, "resume=auto")
    resting = tmp_path / "resting"
    for phase in ("rollout", "reward", "update"):
        done = _lines(out / "metrics.jsonl")
        resting.unlink(missing_ok=True)
        process = _start(killed)
        if phase == "rollout":  # the row of a step is written, so the next step samples
            _wait(lambda done=done: _lines(out / "metrics.jsonl") > done, process)
        elif phase == "reward":  # a reward process is running
            _wait(resting.exists, process)
        else:  # the rollouts of a step are written just before its update
            known = _lines(out / "rollouts.jsonl")
            _wait(lambda known=known: _lines(out / "rollouts.jsonl") > known, process)
        assert process.pid is not None and process.is_alive()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    process = _start(killed)
    process.join(120)
    assert process.exitcode == 0
    assert rl_curve(out) == rl_curve(tmp_path / "plain")
    asked, expected = (rows_of(folder, "rollouts.jsonl") for folder in (out, tmp_path / "plain"))
    assert asked == expected


@pytest.mark.slow
def test_sigterm_saves_and_the_run_resumes(model: Path, data: Path, reward: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = rl_arguments(out, data, model, reward, "steps=8", "resume=auto")
    process = _start(command)
    _wait(lambda: _lines(out / "metrics.jsonl") >= 2, process)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 0 and not (out / "hf").exists()
    done = _lines(out / "metrics.jsonl")
    assert 2 <= done < 8 and complete(out / "checkpoints")[-1].name == f"step-{done:06d}"
    rl.main(command)
    assert rl_curve(out) == rl_curve(whole)


# ----------------------------------------------------------------------------------------------- objectives and options


@pytest.mark.slow
def test_every_objective_and_advantage_runs(model: Path, data: Path, reward: Path, tmp_path: Path) -> None:
    ways = [
        (
            "dapo",
            "grpo",
            "update.kl=k3",
            "update.epochs=2",
            "update.minibatches=2",
            "update.old_logprobs=recompute",
            "update.importance=token",
        ),
        ("dr_grpo", "dr_grpo", "update.minibatches=2", "update.old_logprobs=sampler", "optimizer.freeze=vision,merger"),
        ("gspo", "grpo", "update.minibatches=2", "update.importance=sequence"),
        ("cispo", "rloo", "update.entropy_coef=0.01", "reward.overlong_buffer=6"),
        ("sapo", "reinforce++", "update.epochs=2", "filter.tries=0"),
        ("reinforce", "rloo", "sampling.temperature=0.8", "sampling.top_p=0.95"),
    ]
    for objective, advantages, *more in ways:
        out = tmp_path / objective
        command = [f"update.objective={objective}", f"update.advantages={advantages}", "steps=2", *more]
        rl.main(rl_arguments(out, data, model, reward, *command))
        rows = rows_of(out)
        assert all(abs(r["loss"]) < 100 and r["grad_norm"] > 0 for r in rows), objective
        assert rows[0]["updates"] == 2 ** len({"update.epochs=2", "update.minibatches=2"} & set(more))
        if "update.old_logprobs=recompute" in more:  # recomputed log-probabilities are those of the sampling weights
            assert all(r["sampler_gap_max"] < 1e-4 and r["ratio_max"] > 1.001 for r in rows)
        assert ("kl_ref_k3" in rows[0]) == ("update.kl=k3" in more)
        assert rows[0]["token_saving"] > 1
        assert (rows[0]["kept"] == rows[0]["questions"]) == ("filter.tries=0" in more) or objective != "sapo"
    start = Qwen25VL.from_pretrained(model)
    frozen = Qwen25VL.from_pretrained(tmp_path / "dr_grpo" / "hf")
    same = {
        name for (name, p), q in zip(start.named_parameters(), frozen.parameters(), strict=True) if torch.equal(p, q)
    }
    assert {n for n, _ in start.named_parameters() if n.startswith("visual.")} <= same and len(same) < 60


# ---------------------------------------------------------------------------------------------------------- bad numbers


def _with_a_nan(env: dict[str, str], command: list[str], steps: tuple[int, ...]) -> str:
    """The last rank gets NaN advantages in some steps."""
    real = rl.collect
    calls = []

    def collect(*arguments: object, **more: object) -> object:
        found = real(*arguments, **more)
        calls.append(1)
        if len(calls) - 1 in steps and int(env.get("RANK", 0)) == int(env.get("WORLD_SIZE", 1)) - 1:
            for group in found.groups:
                for answer in group.answers:
                    object.__setattr__(answer, "advantage", float("nan"))
        return found

    rl.collect = collect
    try:
        rl.main(command, env)
    finally:
        rl.collect = real
    return "finished"


def test_a_nan_skips_the_step_and_names_the_prompts(model: Path, data: Path, reward: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    _with_a_nan({}, rl_arguments(out, data, model, reward, "steps=3"), (1,))
    rows = rows_of(out)
    assert ["skipped" in r for r in rows] == [False, True, False]
    (note,) = rows_of(out, "skipped-00000.jsonl")
    asked = {f"{g['source']}/{g['id']}" for g in rows_of(out, "rollouts.jsonl") if g["step"] == 2}
    named = {name for part in note["packs"] for name in part["samples"]}
    assert note["step"] == 2 and named and named <= asked
    assert torch.isfinite(Qwen25VL.from_pretrained(out / "hf").head_weight).all()
    with pytest.raises(GuardError, match="2 steps in a row"):
        _with_a_nan({}, rl_arguments(tmp_path / "b", data, model, reward, "guard.patience=2"), (0, 1, 2))


# ------------------------------------------------------------------------------------------------------ unusual rewards


def test_rewards_that_fail_stop_the_run_with_the_reason(model: Path, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text("def letters(responses, rows):\n    raise KeyError('colour')\n")
    with pytest.raises(RewardError, match="colour"):
        rl.main(rl_arguments(tmp_path / "run", data, model, file, "steps=20", "filter.tries=1"))
    assert rows_of(tmp_path / "run", "rollouts.jsonl")[0]["answers"][0]["reason"].startswith("error: KeyError")


def test_equal_rewards_train_nothing_and_write_no_model(model: Path, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "flat.py"
    file.write_text("def letters(responses, rows):\n    return [0.9] * len(responses)\n")
    for tries in (0, 1):
        out = tmp_path / f"run{tries}"
        with pytest.raises(NoUpdate, match="without a single update"):
            rl.main(rl_arguments(out, data, model, file, "steps=1", f"filter.tries={tries}", "filter.low=none"))
        (row,) = rows_of(out)
        assert row["loss"] == 0 and row["grad_norm"] == 0 and row["reward"] == pytest.approx(0.9)
        assert not (out / "hf").exists() and not (out / "checkpoints").exists()


def test_the_defaults_of_the_rooms_belong_to_the_rooms(data: Path) -> None:
    rooms = read_config(rl.Config, [], None, rl.layers)
    own = read_config(rl.Config, [f'data.sources=[{{path = "{data}"}}]', "sampling.answers=3"], None, rl.layers)
    assert (rooms.filter.low, rooms.update.entropy_coef, rooms.sampling.max_tokens) == (-0.01, -0.1, 96)
    assert rooms.optimizer.freeze == ("vision", "merger") and rooms.sampling.answers == 8
    assert (own.filter.low, own.update.entropy_coef, own.optimizer.freeze) == (None, 0.0, ())
    assert own.sampling.answers == 3


# -------------------------------------------------------------------------------------------------------------- options


def test_dry_run_prints_the_cost_of_a_step(
    model: Path, data: Path, reward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rl.main(rl_arguments(tmp_path / "run", data, model, reward, "--dry-run"))
    text = capsys.readouterr().out
    for part in (
        "4 prompts x 4 completions of at most 12 tokens",
        "TFLOP",
        "KV cache",
        "GiB on each GPU",
        "no reference",
    ):
        assert part in text
    assert not (tmp_path / "run").exists()


def test_contradicting_options_are_refused(model: Path, data: Path, reward: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="update.tokens_per_pack is 100"):
        rl.main(rl_arguments(tmp_path / "run", data, model, reward, "update.tokens_per_pack=100"))
    with pytest.raises(ConfigError, match="set update.importance to token"):
        rl.main(rl_arguments(tmp_path / "run", data, model, reward, "sampling.base_url=http://127.0.0.1:9/v1"))
    # optimizer.state, device_memory, checkpoint.every_minutes and log.peak_tflops: as in tests/train/test_sft.py.
    # sampling.unfinished: whether long completions are cancelled or continued by later weights is a choice of the user.
    # sampling.follow, sampling.api_key_file: how servers get new weights, and their key, which nothing else tells.
    assert len(list(leaves(rl.Config()))) <= 92
    stage = load_config(rl.Config, ["--config", str(ROOT / "examples" / "vst_rl.toml")])
    assert (stage.sampling.answers, stage.optimizer.lr, stage.update.minibatches) == (5, 1e-6, 2)


@pytest.mark.slow
def test_two_ranks_train_one_model_and_skip_together(model: Path, data: Path, reward: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = rl_arguments(out, data, model, reward, "steps=3", "checkpoint.every=2")
    assert run_ranks(_with_a_nan, 2, command, (1,)) == ["finished"] * 2
    rows = rows_of(out)
    assert ["skipped" in r for r in rows] == [False, True, False]
    assert (out / "rollouts-00001.jsonl").exists() and rows_of(out, "skipped-00000.jsonl")
    one = tmp_path / "one"
    rl.main(rl_arguments(one, data, model, reward, "steps=1"))
    assert rows[0]["reward"] == pytest.approx(rows_of(one)[0]["reward"], abs=1e-6)
    assert rows[0]["loss"] == pytest.approx(rows_of(one)[0]["loss"], abs=1e-5)
    assert rows[0]["grad_norm"] == pytest.approx(rows_of(one)[0]["grad_norm"], rel=1e-4)
