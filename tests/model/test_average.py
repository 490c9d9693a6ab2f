"""`fastvst merge A B --out DIR`: the weighted average, compared with the formula in float64."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastvst.cli import main
from fastvst.data import Processor
from fastvst.model import Qwen25VL


def save(folder, seed, dtype=torch.float32, **options):
    torch.manual_seed(seed)
    model = Qwen25VL.fresh("tiny").to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, processor=Processor.preset("tiny"), **options)
    return model.state_dict()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("average")
    return folder, [save(folder / "a", 1, max_shard_bytes=3_000_000), save(folder / "b", 2), save(folder / "c", 3)]


@pytest.mark.parametrize("shares", [None, [0.5, 0.3, 0.2], [2, 1, 1], [1.5, -0.25, -0.25]])
def test_the_average_is_that_of_the_formula(sources, tmp_path, shares, capsys):
    folder, states = sources
    out = tmp_path / "out"
    given = ["--weights", *map(str, shares)] if shares else []
    assert main(["merge", *[str(folder / n) for n in "abc"], "--out", str(out), *given]) == 0
    total = sum(shares) if shares else 3
    parts = [share / total for share in shares or [1, 1, 1]]
    again = Qwen25VL.from_pretrained(out).state_dict()
    for name, tensor in again.items():
        expected = sum(part * state[name].double() for part, state in zip(parts, states))
        torch.testing.assert_close(tensor, expected.float(), rtol=0, atol=1e-7)
    names = {p.name for p in out.iterdir()}
    assert names == {p.name for p in (folder / "a").iterdir()} and len(names) > 12
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        assert (out / name).read_bytes() == (folder / "a" / name).read_bytes()
    assert "x " + str(folder / "b") in capsys.readouterr().out


def test_the_dtype_is_that_of_the_first_and_equal_models_stay_equal(tmp_path):
    state = save(tmp_path / "a", 1, torch.bfloat16)
    Qwen25VL.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")  # the same numbers in float32
    assert main(["merge", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "a")]) == 0  # in place
    again = load_file(tmp_path / "a" / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items() if name in again)


def fails(capsys, *arguments):
    assert main(["merge", *map(str, arguments)]) != 0
    return capsys.readouterr().err


def test_what_cannot_be_averaged_is_named_and_nothing_is_written(sources, tmp_path, capsys):
    folder, _ = sources
    out = tmp_path / "out"
    bad = tmp_path / "bad"
    shutil.copytree(folder / "b", bad)
    state = load_file(bad / "model.safetensors")
    save_file({n: t for n, t in state.items() if n != "model.norm.weight"}, bad / "model.safetensors")
    assert "1 tensors are only in one of" in fails(capsys, folder / "a", bad, "--out", out)
    save_file(state | {"model.norm.weight": torch.ones(5)}, bad / "model.safetensors")
    assert "model.norm.weight is [5]" in fails(capsys, folder / "a", bad, "--out", out)
    save_file(state | {"model.norm.weight": torch.full((192,), float("nan"))}, bad / "model.safetensors")
    assert "contains NaN" in fails(capsys, folder / "a", bad, "--out", out)
    config = json.loads((bad / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 1e-3
    (bad / "config.json").write_text(json.dumps(config))
    assert "another model" in fails(capsys, folder / "a", bad, "--out", out)
    assert "two or more" in fails(capsys, folder / "a", "--out", out)
    assert "two or more" in fails(capsys, folder / "a", folder / "b", "--out", out, "--weights", 1)
    assert "pass --out" in fails(capsys, folder / "a", folder / "b")
    assert "either two or more" in fails(capsys, folder / "a", "--adapter", bad)
    assert not out.exists() and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
