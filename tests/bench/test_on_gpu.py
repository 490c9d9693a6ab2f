"""bench/gpu/on_gpu.py without a GPU: it says so; parts run, fail, run out of time, and are skipped when done."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def on_gpu():
    spec = importlib.util.spec_from_file_location("on_gpu_script", BENCH / "gpu" / "on_gpu.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


def test_without_a_gpu_it_says_what_is_missing(on_gpu, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert on_gpu.main(["--out", str(tmp_path), "--minutes", "1"]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err


def test_every_part_names_a_file_or_module_that_exists(on_gpu):
    for part in on_gpu.PARTS:
        for word in part.command:
            if word.startswith(("bench/", "tests/")):
                assert (BENCH.parent / word).exists(), word


def test_parts_run_fail_run_out_of_time_and_are_skipped_when_done(on_gpu, tmp_path, monkeypatch, capsys):
    def part(name, code):
        return on_gpu.Part(name, f"{name}.txt", ("-c", code), 1.0)

    parts = (
        part("good", "open(r'{out}', 'w').write('{minutes}')"),
        part("bad", "raise SystemExit(3)"),
        part("slow", "import time; time.sleep(60)"),
    )
    assert on_gpu.run_part(parts[2], tmp_path, 0.5) == "out of time"
    monkeypatch.setattr(on_gpu, "PARTS", parts[:2])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert on_gpu.main(["--out", str(tmp_path)]) == 1
    assert float((tmp_path / "good.txt").read_text()) > 1
    said = json.loads((tmp_path / "parts.json").read_text())
    assert said == {"good": "ok", "bad": "failed (exit 3; see bad.log)"}
    assert on_gpu.main(["--out", str(tmp_path), "--only", "good", "--skip-done"]) == 0
    assert "good: done before" in capsys.readouterr().out


def test_the_table_names_ours_and_the_best_peer(on_gpu, tmp_path):
    assert on_gpu.summary(tmp_path) == ["attention: not measured", "pointwise: not measured"]
    figures = {"fastvst": {"forward_tflops": 500.0}, "a": {"forward_tflops": 400.0}, "b": {"not_measured": "no"}}
    (tmp_path / "attention.json").write_text(json.dumps({"cases": {"case": figures}}))
    lines = on_gpu.summary(tmp_path)
    assert lines[0] == "case forward_tflops: fastvst 500, a 400"
    figures = {"fastvst": {"forward_tbps": 4.0, "forward_share": 0.95}, "goal": {"forward": 3.9}}
    (tmp_path / "pointwise.json").write_text(json.dumps({"cases": {"norm": figures}}))
    assert "norm forward: fastvst 4.00 TB/s (95% of copy), no peer" in on_gpu.summary(tmp_path)


def test_the_counted_figures_of_groups():
    sys.path.insert(0, str(BENCH))
    try:
        from bench.cases.attention import Case, grouped
    finally:
        sys.path.remove(str(BENCH))
    case = Case("g", heads=2, kv_heads=1, width=16, causal=True, **grouped(2, 3, (2, 1)))
    # One group: 6 pairs in the prompt, 2 x 3 + 3 and 1 x 3 + 1 in the completions.
    assert case.pairs() == 2 * (6 + 9 + 4) and case.prompts == (-1, 0, 0, -1, 3, 3)
    assert case.repeated().lengths == (5, 4, 5, 4)
    assert case.flops()[0] == 4 * 2 * 16 * case.pairs()


BARE = """
import importlib.util, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"PIL", "transformers", "tokenizers", "jinja2", "pyarrow", "datasets", "scipy"}:
            raise ModuleNotFoundError(f"{name} is not installed on this machine")

sys.meta_path.insert(0, Absent())
for number, path in enumerate(sys.argv[1:]):
    spec = importlib.util.spec_from_file_location(f"part{number}", path)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
import fastvst.rollout.batch_invariant, fastvst_kernels.tuning.tune, teacher
from fastvst.model import ModelConfig, Qwen25VL
from fastvst.rollout import Engine, SamplingParams
from bench.gpu.rollout import text_prompt
model = Qwen25VL(ModelConfig.preset("tiny"))
assert len(Engine(model, memory=1 << 24).generate([text_prompt(model.config, 5, 0)], SamplingParams(max_tokens=2))) == 1
"""


def test_every_part_loads_on_a_machine_with_torch_and_little_else(on_gpu):
    root = BENCH.parent
    scripts = [root / word for part in on_gpu.PARTS for word in part.command if word.endswith(".py")]
    scripts = [path for path in scripts if path.is_file()] + sorted((root / on_gpu.GPU_TESTS).glob("test_*.py"))
    paths = os.pathsep.join(map(str, (root, root / "kernels", BENCH, root / "tests" / "support")))
    done = subprocess.run(
        [sys.executable, "-c", BARE, *dict.fromkeys(map(str, scripts))],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
