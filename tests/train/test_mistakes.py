"""Mistakes of a user, tried through the real scripts: each ends with one line that says what to change."""

from __future__ import annotations

import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from rl_run import REWARD, rl_arguments, write_questions
from small_run import ROOT, arguments, write_data, write_model

SFT = "sft.py"
RL = "rl.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model, sft/data.jsonl, rl/questions.jsonl, reward.py and things that are wrong."""
    folder = tmp_path_factory.mktemp("place")
    model = write_model(folder / "model")
    write_data(folder / "sft", 12)
    write_questions(folder / "rl", 12)
    (folder / "reward.py").write_text(REWARD)
    (folder / "empty.jsonl").write_text("")
    (folder / "empty").mkdir()
    (folder / "useless.jsonl").write_text('{"id": "0", "conversations": []}\n' * 3)
    (folder / "bad.toml").write_text("steps = = 3\n")
    (folder / "key.toml").write_text("[optimiser]\nlr = 1e-3\n")
    (folder / "type.toml").write_text('[optimizer]\nclip = "high"\n')
    (folder / "syntax.py").write_text("def letters(responses, rows)\n")
    (folder / "imports.py").write_text("import no_such_package\n")
    (folder / "one.py").write_text("def letters(responses):\n    return [1.0]\n")
    (folder / "raises.py").write_text("def letters(responses, rows):\n    return [rows[0]['colour']]\n")
    (folder / "flat.py").write_text("def letters(responses, rows):\n    return [1.0] * len(responses)\n")
    for name in ("cut", "no_weights", "tokenizer", "json", "adapter"):
        shutil.copytree(model, folder / name)
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (folder / "no_weights" / "model.safetensors").unlink()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    (folder / "json" / "config.json").write_text("{")
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "adapter" / "model.safetensors").unlink()
    return folder


def command(script: str, place: Path, out: Path, more: list[str]) -> list[str]:
    """The command line of one step; {} in `more` stands for the folder of `place`."""
    options = [word.replace("{}", str(place)) for word in more]
    if script == SFT:
        return arguments(out, place / "sft" / "data.jsonl", place / "model", "steps=1", *options)
    reward = place / "reward.py"
    return rl_arguments(out, place / "rl" / "questions.jsonl", place / "model", reward, "steps=1", *options)


def end_of(script: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The message with which a script exits. Anything but SystemExit with a message is a failure."""
    monkeypatch.setattr(sys, "argv", [str(ROOT / "examples" / script), *words])
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples"), *sys.path])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
    assert isinstance(end.value.code, str), end.value.code
    return end.value.code


BOTH = [
    (["--optimiser.lr", "1"], "unknown option 'optimiser.lr'; did you mean 'optimizer.lr'"),
    (["--steps"], "--steps needs a value of type int"),
    (["steps=many"], "steps must be int.*got 'many'"),
    (["steps=0"], "steps is 0; expected at least 1"),
    (["steps=-3"], "steps is -3"),
    (["optimizer=3"], "'optimizer' is a section"),
    (["optimizer.lr=-1"], "optimizer: lr is -1.0"),
    (["optimizer.lr=nan"], "optimizer: lr is nan"),
    (["optimizer.vision_lr=inf"], "optimizer: vision_lr is inf"),
    (["optimizer.clip=-1"], "optimizer: clip is -1"),
    (["optimizer.weight_decay=-1"], "optimizer: weight_decay is -1"),
    (["optimizer.betas=[0.9, 1.5]"], "optimizer: betas"),
    (["optimizer.freeze=eyes"], "freeze names .*eyes.*; expected a part"),
    (["optimizer.freeze=vision,model.layers.99"], "optimizer: freeze names .'model.layers.99'., which no parameter"),
    (["optimizer.freeze=vision,merger,decoder"], "freeze names every part"),
    (["schedule.warmup=-0.1"], r"schedule: warmup \(-0.1\).*must not be negative"),
    (["checkpoint.keep=0"], "checkpoint: keep is 0; expected at least 1"),
    (["log.every=0"], "log: every is 0; expected at least 1"),
    (["guard.patience=-1"], "guard: patience is -1"),
    (["parallel.threads=-2"], "parallel: threads is -2"),
    (["parallel.replicas=-1"], "parallel: replicas is -1"),
    (["parallel.device=gpu"], "parallel.device must be .*got 'gpu'"),
    (["--config", "{}/lost.toml"], "lost.toml: no such file"),
    (["--config", "{}/empty"], "empty: Is a directory"),
    (["--config", "{}/bad.toml"], "bad.toml is not valid TOML.*line 1"),
    (["--config", "{}/key.toml"], "unknown option 'optimiser'; did you mean 'optimizer.*'"),
    (["--config", "{}/type.toml"], r"optimizer.clip must be float; got 'high' \(str\)"),
    (["model.path={}/lost"], "model.path: .*lost"),
    (["model.path={}/reward.py"], "reward.py is a file; expected the folder of a checkpoint"),
    (["model.path={}/empty"], "model.path: .*empty.*config.json"),
    (["model.path={}/cut"], "model.path: .*truncated"),
    (["model.path={}/no_weights"], "model.path: .*no_weights"),
    (["model.path={}/tokenizer"], "model.path: .*tokenizer.json"),
    (["model.path={}/json"], "model.path: .*config.json"),
    (["model.path={}/adapter"], "model.path: .*adapter"),
    (["model.path=Nobody/nothing-here"], "these files are missing: config.json.*were looked for in.*offline"),
    (['data.sources=[{path = "{}/lost.jsonl"}]'], "data.sources: .*lost.jsonl"),
    (['data.sources=[{path = "{}/empty.jsonl"}]'], "data|no usable|empty"),
    (['data.sources=[{path = "{}/empty"}]'], "data.sources: .*empty"),
    (['data.sources=[{path = "{}/reward.py"}]'], "data.sources: .*reward.py"),
    (['data.sources=[{path = "{}/useless.jsonl"}]'], "usable|rejected|bad_schema"),
    (['data.sources=[{file = "a"}]'], r"data.sources\[0\].file"),
    (["data.sources=[{weight = 2}]"], r"data.sources\[0\] lacks path"),
    (["out={}/reward.py"], "out: .*reward.py cannot be a run folder: File exists"),
    (["out={}/reward.py/run"], "out: .*run cannot be a run folder: Not a directory"),
    (["resume={}/step-000007"], "step-000007"),
    (["resume={}/empty"], "empty"),
    (["--resume.data", "other"], "resume_data must be 'same' | 'anew'"),
    (["log.wandb=project"], "log.wandb is on, but wandb is not installed: pip install wandb"),
]
ONLY_SFT = [
    (["model.preset=3b", "model.path=none"], "model.preset.*3b.*model.path"),
    (["model.preset=huge", "model.path=none"], "model.preset.*huge"),
    (["bad_samples.max_fraction=2"], "bad_samples: max_fraction is 2"),
    (["loader.tokens_per_pack=8"], "a pack holds 8"),
    (["processor.max_seq_len=4"], "max_seq_len is 4"),
]
ONLY_RL = [
    (["reward.function={}/lost.py:letters"], "there is no file .*lost.py"),
    (["reward.function={}/reward.py"], "expected file.py:function"),
    (["reward.function={}/reward.py:words"], "has no function 'words'; it has letters"),
    (["reward.function={}/syntax.py:letters"], "syntax.py: SyntaxError"),
    (["reward.function={}/imports.py:letters"], "imports.py, line 1: ModuleNotFoundError"),
    (["reward.function={}/one.py:letters"], r"has the arguments \(responses\); expected \(responses, rows\)"),
    (["reward.function={}/raises.py:letters"], "no completion has a score.*KeyError: 'colour'"),
    (["reward.function={}/flat.py:letters"], "without a single update.*equal rewards"),
    (["reward.functions=[{path = '{}/reward.py:letters', weight = inf}]"], "weight .* is inf"),
    (["reward.function=", "sampling.system=think", 'data.sources=[{path = "{}/sft/data.jsonl"}]'], "no_answer"),
    (["reward.workers=0"], "reward: workers is 0"),
    (["reward.time_limit=0"], "reward: time_limit is 0"),
    (["reward.memory_gib=-1"], "reward: memory_gib is -1"),
    (["sampling.answers=1"], "sampling: answers is 1; expected at least 2"),
    (["sampling.prompts=0"], "sampling: prompts is 0"),
    (["sampling.max_tokens=0"], "sampling: max_tokens is 0"),
    (["sampling.temperature=0"], "temperature is 0"),
    (["sampling.base_url=http://127.0.0.1:9/v1", "update.importance=token"], "127.0.0.1:9.*check sampling.base_url"),
    (["evaluation.every=1", "evaluation.path={}/lost.jsonl"], "evaluation.path: .*lost.jsonl"),
    (["evaluation.every=1", "evaluation.path={}/useless.jsonl"], "no held-out prompt"),
    (["evaluation.every=-1"], "evaluation: every is -1"),
    (["update.clip_low=-1"], "update: "),
    (["update.minibatches=0"], "update: minibatches is 0"),
    (["bad_samples=-1"], "bad_samples is -1"),
]
CASES = [
    *[(script, more, message) for more, message in BOTH for script in (SFT, RL)],
    *[(SFT, more, message) for more, message in ONLY_SFT],
    *[(RL, more, message) for more, message in ONLY_RL],
]


@pytest.mark.parametrize(
    ("script", "more", "message"), CASES, ids=[f"{s[:-3]} {' '.join(m)}".replace("{}/", "") for s, m, _ in CASES]
)
def test_a_mistake_ends_with_what_to_do(
    script: str, more: list[str], message: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    if "wandb" in more[0]:
        monkeypatch.setitem(sys.modules, "wandb", None)
    text = end_of(script, command(script, place, tmp_path / "run", more), monkeypatch)
    assert text.startswith(f"{script}: ") and re.search(message, text, re.DOTALL), text
    assert not (tmp_path / "run" / "hf").exists()


@pytest.mark.parametrize(
    ("script", "more", "message"),
    [
        (SFT, ['data.sources=[{path = "{}/useless.jsonl"}]'], r"ledger: \d+ rejected of.*none of its first 3 rows"),
        (RL, ['data.sources=[{path = "{}/useless.jsonl"}]'], r"ledger: [\d,]+ rejected of"),
        (RL, ["reward.function={}/syntax.py:letters"], "syntax.py: SyntaxError"),
        (RL, ["reward.function={}/raises.py:letters"], "no reward for prompt small/.*KeyError: 'colour'"),
    ],
)
def test_a_dry_run_ends_with_an_error_if_nothing_can_be_trained(
    script: str, more: list[str], message: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = end_of(script, command(script, place, tmp_path / "run", [*more, "--dry-run"]), monkeypatch)
    assert re.search(message, text, re.DOTALL), text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", [SFT, RL])
def test_a_dry_run_shows_sources_rejects_and_the_reward(
    script: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "sft/data.jsonl" if script == SFT else "rl/questions.jsonl"
    sources = '{path = "{}/NAME", name = "good"}, {path = "{}/useless.jsonl", name = "bad"}'.replace("NAME", name)
    words = command(script, place, tmp_path / "run", [f"data.sources=[{sources}]", "--dry-run"])
    monkeypatch.setattr(sys, "argv", [script, *words])
    runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
    text = capsys.readouterr().out
    assert "good: 12 of its first 12 rows can be used" in text
    assert "WARNING: bad: none of its first 3 rows can be used; the first reason: bad/0: " in text
    assert re.search(r"ledger: \d+ rejected of \d+ samples seen\n +\d+  \w+ +e\.g\. bad/0", text)
    assert "GiB on each GPU" in text
    if script == RL:
        assert re.search(r"reward for prompt good/\d+: 'red': 1 \(.*\); '': 0 ", text), text
