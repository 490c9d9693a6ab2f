"""bench/gpu/prebuild.py: what it compiles is all that the blocks launch, and a second start compiles nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from bench.gpu import prebuild
from bench.gpu.block import Options
from bench.gpu.places import NOTE
from pretended_gpu import pretended_gpu

ROOT = Path(__file__).parents[2]


def run(cache: Path, *arguments: str) -> tuple[int, int]:
    """(compiled, cached) of a run in a process of its own."""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "tests" / "support")))
    command = [sys.executable, "-m", "bench.gpu.prebuild", "--cache", str(cache), *arguments]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    compiled, cached = re.findall(r"^(\d+) compiled, (\d+) in the cache, 0 cases failed$", done.stdout, re.MULTILINE)[0]
    return int(compiled), int(cached)


@pytest.mark.slow
def test_a_second_start_compiles_nothing(tmp_path: Path) -> None:
    """The norms at the sizes of the memory checker; `prebuild.py` without --only does the same for all, in minutes."""
    options = ("--blocks", "smoke", "--only", "rms_norm 96")
    first = run(tmp_path / "cache", *options, "--out", str(tmp_path / "cache.tar.xz"))
    assert first[0] >= 4 and run(tmp_path / "cache", *options) == (0, first[0] + first[1])
    with tarfile.open(tmp_path / "cache.tar.xz") as tar:
        names = tar.getnames()
        note = json.loads(tar.extractfile(f"cache/{NOTE}").read())
    assert note == prebuild.hashes() and sum(name.endswith(".cubin") for name in names) == first[0]
    assert "norm/kernels.py" in note["sources"] and len(note["key"]) == 64


def test_every_case_of_every_block_runs_on_the_pretended_gpu() -> None:
    """Nothing is compiled here: the launches are counted."""
    launched = set()
    with pretended_gpu() as seen:
        for name, work in prebuild.all_cases(["smoke", "step", "attention", "pointwise"], ""):
            if name.startswith("step") and name != "step / 3b, full":
                continue
            seen.clear()
            work()
            kernels = {kernel for kernel in seen.launches if kernel.endswith("_kernel")}
            assert kernels, name
            launched |= kernels
    assert len(launched) >= 19, sorted(launched)


def test_the_lm_head_and_decoding_are_launched() -> None:
    options = Options(Path("none"), compile_only=True)
    with pretended_gpu() as seen:
        name, work = next(iter(prebuild.BLOCKS["lm_head"](options)))
        work()
        assert {"partial_statistics_kernel", "row_gradient_kernel"} <= set(seen.launches), name


def test_tuning_launches_all_candidates_of_the_published_shapes() -> None:
    options = Options(Path("none"), compile_only=True)
    with pretended_gpu():
        names = [name for name, _ in prebuild.tuning_cases(options)]
    assert sum("attention_forward 16x128" in name for name in names) > 10
    assert any("window_backward 16x80" in name for name in names) and not any("32x" in name for name in names)


def test_an_unknown_block_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        prebuild.main(["--cache", str(tmp_path), "--blocks", "smok"])
    assert "names ['smok']; the blocks are smoke" in capsys.readouterr().err


def test_a_module_that_is_built_is_found_with_and_without_the_program_file(tmp_path: Path) -> None:
    import triton

    before = triton.knobs.cache.dir
    triton.knobs.cache.dir = str(tmp_path)
    try:
        prebuild.make_module("#include <stddef.h>\nint answer(void) { return 42; }\n", "probe")
        made = list(tmp_path.rglob("probe*.so"))
        assert len({path.parent.name for path in made}) == 2
    finally:
        triton.knobs.cache.dir = before
