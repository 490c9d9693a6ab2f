"""bench/gpu/lease.py without a GPU: the whole run at tiny sizes, and processes that die, hang and run out of time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from bench.gpu import lease
from bench.gpu.block import LOST_DEVICE, Options, read_lines, run_cases, write_line
from bench.gpu.lease import BLOCKS, RESERVE, Block, Lease, chosen_blocks, summary
from bench.gpu.places import NOTE

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_everything_runs_on_a_cpu_at_tiny_sizes(tmp_path):
    command = [sys.executable, "-m", "bench.gpu.lease", "--dry", "--minutes", "15", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    lines = read_lines(tmp_path / "results.jsonl")
    blocks = [block.name for block in chosen_blocks("", dry=True)]
    assert [x["case"] for x in lines if x["block"] == "driver" and "state" in x] == blocks
    assert all(x["state"] == "ok" for x in lines if "state" in x)
    for block in blocks:
        assert any("took" in x for x in lines if x["block"] == block), block
    assert all(x["ok"] for x in lines if x["block"] == "smoke" and "took" in x)
    assert sum(x["block"] == "smoke" and "took" in x for x in lines) > 25
    assert {p.name for p in tmp_path.iterdir() if p.is_file()} == {"results.jsonl", "summary.txt", "lease.tar.xz"}
    with tarfile.open(tmp_path / "lease.tar.xz") as tar:
        names = tar.getnames()
    assert "lease/profile-tiny-light.txt" in names and "lease/smoke.log" in names
    assert not any("/triton/" in name for name in names)


def script(tmp_path: Path, text: str) -> list[str]:
    head = "import os, signal, sys, time\nfrom pathlib import Path\n"
    file = tmp_path / "block.py"
    file.write_text(head + f"out = Path({str(tmp_path / 'work' / 'results.jsonl')!r})\n" + text)
    return [sys.executable, str(file)]


def run(tmp_path: Path, monkeypatch, text: str, seconds: float = 30.0, one_case: float = 60.0) -> list[dict]:
    """Run one block whose process is a script; the lines of its block."""
    made = Lease(tmp_path, False, time.monotonic() + 100)
    monkeypatch.setattr(made, "command", lambda block, left: script(tmp_path, text))
    monkeypatch.setattr(lease, "ONE_CASE", one_case)
    made.run(Block("x", seconds))
    made.write(final=True)
    return [line for line in read_lines(tmp_path / "results.jsonl") if line["block"] == "x" and "began" not in line]


CASES = """
from bench.gpu.block import *

def cases():
    yield "first", lambda: {"figure": 1}
    yield "second", lambda: BAD
    yield "third", lambda: {"figure": 3}
sys.exit(run_cases("x", cases(), Options(out)))
"""


def test_a_process_that_dies_goes_on_behind_the_case(tmp_path, monkeypatch):
    lines = run(tmp_path, monkeypatch, CASES.replace("BAD", "os.kill(os.getpid(), signal.SIGSEGV)"))
    assert [x["case"] for x in lines] == ["first", "second", "third"]
    assert lines[1]["error"] == "the process died: exit -11" and lines[2]["figure"] == 3
    text = (tmp_path / "summary.txt").read_text()
    assert text.startswith("FAILURES\n  x / second: the process died: exit -11")


def test_a_broken_device_gets_a_new_process(tmp_path, monkeypatch):
    lost = "(_ for _ in ()).throw(torch.AcceleratorError('illegal memory access'))"
    lines = run(tmp_path, monkeypatch, "import torch\n" + CASES.replace("BAD", lost))
    assert [x["case"] for x in lines] == ["first", "second", "third"] and "illegal memory" in lines[1]["error"]


def test_a_case_that_hangs_is_named_and_left_behind(tmp_path, monkeypatch):
    lines = run(tmp_path, monkeypatch, CASES.replace("BAD", "time.sleep(1000)"), seconds=60, one_case=2.0)
    assert [x.get("error") for x in lines] == [None, "hangs", None]


def test_a_block_that_dies_outside_a_case_is_not_tried_again(tmp_path, monkeypatch):
    lines = run(tmp_path, monkeypatch, "with (out.parent / 'tries').open('a') as f:\n f.write('x')\nsys.exit(7)")
    assert lines == [] and (tmp_path / "work" / "tries").read_text() == "x"
    assert "x: exit 7" in (tmp_path / "summary.txt").read_text()


def test_a_limit_ends_the_block_and_its_children(tmp_path, monkeypatch):
    child = "import subprocess\np = subprocess.Popen(['sleep', '1000'])\n(out.parent / 'pid').write_text(str(p.pid))\n"
    run(tmp_path, monkeypatch, child + "time.sleep(1000)", seconds=15.0)
    assert "x: out of time" in (tmp_path / "summary.txt").read_text()
    pid = int((tmp_path / "work" / "pid").read_text())
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and Path(f"/proc/{pid}").exists():
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{pid}").exists()


def test_sigterm_leaves_results_and_archive(tmp_path):
    command = [sys.executable, "-m", "bench.gpu.lease", "--dry", "--blocks", "ceilings,smoke", "--out", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    results = tmp_path / "work" / "results.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not any("tflops" in x for x in read_lines(results)):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    assert any("tflops" in x for x in read_lines(tmp_path / "results.jsonl"))
    assert (tmp_path / "lease.tar.xz").exists()


def test_a_failed_case_does_not_end_the_block_and_done_cases_are_skipped(tmp_path):
    ran = []

    def cases():
        yield "bad", lambda: 1 / 0
        yield "wrong", lambda: {"ok": False}
        yield "good", lambda: ran.append(1) or {"ok": True}

    options = Options(tmp_path / "x.jsonl")
    assert run_cases("b", cases(), options) == 1
    assert run_cases("b", cases(), options) == 0 and ran == [1]
    lines = [x for x in read_lines(options.out) if "began" not in x]
    assert lines[0]["error"].startswith("ZeroDivisionError") and lines[1]["ok"] is False
    assert LOST_DEVICE not in (0, 1)


def test_a_cut_last_line_is_left_out(tmp_path):
    file = tmp_path / "x.jsonl"
    write_line(file, "b", "c", figure=1.0)
    with file.open("a") as out:
        out.write('{"block": "b", "ca')
    assert read_lines(file) == [{"block": "b", "case": "c", "figure": 1.0}]


def test_blocks_can_be_chosen_and_unknown_ones_are_named():
    assert [b.name for b in chosen_blocks("smoke,step", dry=False)] == ["smoke", "step"]
    assert [b.name for b in chosen_blocks("", dry=False)] == [b.name for b in BLOCKS]
    with pytest.raises(ValueError, match=r"names \['smok'\]"):
        chosen_blocks("smok", dry=False)
    for block in BLOCKS:
        assert block.command or block.name == "sanitizer" or (ROOT / "bench" / "gpu" / f"{block.name}.py").exists()


def test_the_memory_checkers_report_is_read(tmp_path):
    made = Lease(tmp_path, False, time.monotonic() + 100)
    (made.work / "sanitizer.log").write_text(
        "========= Invalid __global__ read of size 2 bytes\n========= ERROR SUMMARY: 3 errors\n"
    )
    made.read_sanitizer()
    (line,) = read_lines(made.results)
    assert (
        line["ok"] is False
        and line["summary"] == ["ERROR SUMMARY: 3 errors"]
        and "Invalid __global__" in line["invalid"][0]
    )
    assert summary([line], {}).startswith("FAILURES\n  sanitizer / memcheck")


BARE = """
import importlib, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"PIL", "transformers", "tokenizers", "jinja2", "pyarrow", "datasets", "scipy"}:
            raise ModuleNotFoundError(f"{name} is not installed on this machine")

sys.meta_path.insert(0, Absent())
for name in sys.argv[1:]:
    importlib.import_module(f"bench.gpu.{name}")
import fastvst.rollout.batch_invariant, fastvst_kernels.tuning.tune, teacher
from fastvst.model import ModelConfig, Qwen25VL
from fastvst.rollout import Engine, SamplingParams
from bench.gpu.rollout import text_prompt
model = Qwen25VL(ModelConfig.preset("tiny"))
assert len(Engine(model, memory=1 << 24).generate([text_prompt(model.config, 5, 0)], SamplingParams(max_tokens=2))) == 1
"""


def test_every_block_loads_on_a_machine_with_torch_and_little_else():
    names = [path.stem for path in sorted((ROOT / "bench" / "gpu").glob("*.py"))]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "tests" / "support")))
    done = subprocess.run(
        [sys.executable, "-c", BARE, *names], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_without_a_gpu_a_block_says_so(tmp_path, capsys):
    from bench.gpu import ceilings
    from bench.gpu.block import command

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert command("ceilings", ceilings.cases, None, ["--out", str(tmp_path / "x")]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err


def test_shares_need_a_measured_ceiling(tmp_path):
    from bench.gpu.ceilings import copy_tbps

    options = Options(tmp_path / "x.jsonl")
    with pytest.raises(LookupError, match="run python -m bench.gpu.ceilings"):
        copy_tbps(options)
    (tmp_path / "x.jsonl").write_text(json.dumps({"block": "ceilings", "case": "copy 2 GiB", "tbps": 3.5}) + "\n")
    assert copy_tbps(options) == 3.5


def test_the_counted_figures_of_groups():
    from bench.cases.attention import Case, grouped

    case = Case("g", heads=2, kv_heads=1, width=16, causal=True, **grouped(2, 3, (2, 1)))
    # One group: 6 pairs in the prompt, 2 x 3 + 3 and 1 x 3 + 1 in the completions.
    assert case.pairs() == 2 * (6 + 9 + 4) and case.prompts == (-1, 0, 0, -1, 3, 3)
    assert case.repeated().lengths == (5, 4, 5, 4)
    assert case.flops()[0] == 4 * 2 * 16 * case.pairs()


def test_the_limits_of_all_blocks_are_two_calls_of_a_lease():
    """A call takes 9.5 minutes and a lease 15; the second call begins where the first one ended."""
    whole = 9.5 * 60 - RESERVE
    first = 0.0
    for block in BLOCKS:
        if first + block.seconds > whole:
            break
        first += block.seconds
    rest = sum(block.seconds for block in BLOCKS) - first
    assert rest < whole and first + rest + 2 * RESERVE < 15 * 60 - 45  # the machine's start counts too
    assert BLOCKS.index(block) >= 5  # ceilings, smoke, step, attention and LM head are in the first call


def test_a_second_call_begins_no_block_again(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(
        Lease, "run", lambda self, block: ran.append(block.name) or self.states.update({block.name: "ok"})
    )
    results = tmp_path / "work" / "results.jsonl"
    results.parent.mkdir()
    write_line(results, "driver", "ceilings", state="ok")
    write_line(results, "driver", "smoke", state="out of time")
    assert lease.main(["--out", str(tmp_path), "--dry", "--blocks", "ceilings,smoke"]) == 0
    assert ran == ["smoke"]


def cache_lines(tmp_path: Path, monkeypatch, note: dict | None) -> tuple[dict, list[str]]:
    """The line that `prepare_cache` writes for a prebuilt cache with this note, and whether it compiled."""
    source = tmp_path / "source" / "cache"
    source.mkdir(parents=True)
    made = Lease(tmp_path / "out", False, time.monotonic() + 100)
    compiled: list[str] = []
    monkeypatch.setattr(lease, "CACHE", tmp_path / "place" / "cache")
    monkeypatch.setattr(lease, "PREBUILT", tmp_path / "cache.tar.xz")
    now = {"key": "k", "sources": {"a.py": "1", "b.py": "2"}}
    monkeypatch.setattr(made, "python", lambda code: json.dumps(now))
    monkeypatch.setattr(made, "compile_here", lambda: compiled.append("yes"))
    if note is not None:
        (source / NOTE).write_text(json.dumps(note))
        with tarfile.open(lease.PREBUILT, "w:xz") as tar:
            tar.add(source, arcname="cache")
    made.prepare_cache()
    (line,) = read_lines(made.results)
    return line, compiled


@pytest.mark.parametrize(
    "note, expected",
    [
        ({"key": "k", "sources": {"a.py": "1", "b.py": "2"}}, (True, True, [], [])),
        ({"key": "k", "sources": {"a.py": "1", "b.py": "0"}}, (True, True, ["b.py"], ["yes"])),
        ({"key": "other", "sources": {"a.py": "1", "b.py": "2"}}, (True, False, [], ["yes"])),
        (None, (False, False, [], ["yes"])),
    ],
)
def test_the_prebuilt_cache_is_unpacked_and_compared(tmp_path, monkeypatch, note, expected):
    line, compiled = cache_lines(tmp_path, monkeypatch, note)
    assert (line["prebuilt"], line["same_triton"], line["changed_sources"], compiled) == expected
    assert (lease.CACHE / NOTE).exists() == (note is not None)


def test_a_damaged_cache_is_named_and_the_blocks_still_run(tmp_path, monkeypatch):
    made = Lease(tmp_path / "out", False, time.monotonic() + 100)
    monkeypatch.setattr(lease, "CACHE", tmp_path / "place" / "cache")
    monkeypatch.setattr(lease, "PREBUILT", tmp_path / "cache.tar.xz")
    monkeypatch.setattr(made, "python", lambda code: json.dumps({"key": "k", "sources": {"a.py": "1"}}))
    monkeypatch.setattr(made, "compile_here", lambda: None)
    for data in (b"", b"no archive", b"\xfd7zXZ\x00 cut"):
        lease.PREBUILT.write_bytes(data)
        made.prepare_cache()
    lines = read_lines(made.results)
    assert [("damaged" in x.get("error", "")) for x in lines] == [True, False] * 3
    assert not any(x["prebuilt"] for x in lines[1::2])
