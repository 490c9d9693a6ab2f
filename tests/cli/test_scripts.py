"""`fastvst sft`, `rl`, `cold-start` and `examples`, from the checkout and from an installed wheel."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import zipfile
from pathlib import Path

import pytest

from fastvst import __version__
from fastvst.cli import main, scripts
from installation import build_wheel, install
from own_rows import write_forty_rows

ROOT = Path(__file__).parents[2]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], (None, [])),
        (["--steps", "2"], (None, ["--steps", "2"])),
        (["--nproc", "2", "--dry-run"], (2, ["--dry-run"])),
        (["--steps", "2", "--nproc=8"], (8, ["--steps", "2"])),
        (["--nproc-per-node", "2"], (None, ["--nproc-per-node", "2"])),
    ],
)
def test_nproc_is_taken_and_the_rest_passes_through(words, expected):
    assert scripts.take_nproc(words) == expected
    assert scripts.take_nproc(tuple(words)) == expected, "the words are not changed"


@pytest.mark.parametrize("words", [["--nproc"], ["--nproc", "0"], ["--nproc=-1"], ["--nproc", "1.5"], ["--nproc="]])
def test_a_wrong_number_of_processes_is_an_error(words):
    with pytest.raises(ValueError, match="--nproc is .*expected the number of processes"):
        scripts.take_nproc(words)


def test_examples_are_copied_and_nothing_is_overwritten(tmp_path, capsys):
    out = tmp_path / "a" / "examples"
    assert main(["examples", "--out", str(out)]) == 0
    given = {path.name: path.read_bytes() for path in (ROOT / "examples").iterdir() if path.is_file()}
    assert {path.name: path.read_bytes() for path in out.iterdir()} == given
    (out / "sft.py").write_text("mine")
    assert main(["examples", "--out", str(out)]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err and (out / "sft.py").read_text() == "mine"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build_wheel(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def command(wheel, tmp_path_factory) -> str:
    """The `fastvst` of an environment with the wheel and its declared dependencies, no extra."""
    return str(install(wheel, tmp_path_factory.mktemp("environment") / "env") / "fastvst")


def run(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, env=ONE_THREAD, timeout=300)


@pytest.mark.slow
def test_the_wheel_has_every_file_of_the_sources_and_the_examples(wheel):
    listed = subprocess.run(
        ["git", "ls-files", "fastvst", "kernels/fastvst_kernels", "examples"], cwd=ROOT, text=True, capture_output=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    expected = {name.removeprefix("kernels/") for name in listed.stdout.split() if not name.startswith("examples/")}
    expected |= {f"fastvst/{name}" for name in listed.stdout.split() if name.startswith("examples/")}
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert found == expected


@pytest.mark.slow
def test_both_wheels_install_together(wheel, command, tmp_path):
    """fastvst carries the kernels; the kernels' own wheel, for other trainers, has the same files."""
    kernels = zipfile.ZipFile(build_wheel(ROOT / "kernels", tmp_path))
    both = zipfile.ZipFile(wheel)
    names = [name for name in kernels.namelist() if ".dist-info/" not in name]
    assert names and all(kernels.read(name) == both.read(name) for name in names)


@pytest.mark.slow
def test_every_command_of_the_wheel_runs_from_another_folder(command, tmp_path):
    assert run(command, "--version", folder=tmp_path).stdout == f"fastvst {__version__}\n"
    module = run(str(Path(command).with_name("python")), "-m", "fastvst", "--version", folder=tmp_path)
    assert module.stdout == f"fastvst {__version__}\n"
    for name, option in (("sft", "--loader.tokens_per_pack"), ("rl", "--reward.function"), ("cold-start", "--samples")):
        shown = run(command, name, "--help", folder=tmp_path)
        assert shown.returncode == 0 and f"{option} <" in shown.stdout, shown.stderr
    for name in ("examples", "rooms", "data", "evaluate", "chat", "generate", "merge"):
        shown = run(command, name, "--help", folder=tmp_path)
        assert shown.returncode == 0 and shown.stdout.startswith(f"usage: fastvst {name}"), shown.stderr

    rows = write_forty_rows(tmp_path / "own")
    plan = run(command, "sft", "--data.sources", str(rows), "--dry-run", folder=tmp_path)
    assert plan.returncode == 0 and "one pass over the 40 samples" in plan.stdout, plan.stderr
    words = ("--data.sources", str(rows), "--steps", "2")
    alone = run(command, "sft", *words, "--out", "alone", folder=tmp_path)
    assert alone.returncode == 0 and (tmp_path / "alone" / "hf" / "config.json").is_file(), alone.stderr
    two = run(command, "sft", *words, "--nproc", "2", "--out", "two", folder=tmp_path)
    assert two.returncode == 0 and "2 process(es) on CPU" in two.stdout, two.stderr
    assert (tmp_path / "two" / "hf" / "config.json").is_file()
    learned = run(command, "rl", "--model.path", "alone/hf", *words[:2], "--dry-run", folder=tmp_path)
    assert learned.returncode == 0, learned.stdout + learned.stderr
    started = run(command, "cold-start", "--model", "nowhere", folder=tmp_path)
    assert started.returncode == 1 and "no checkpoint in nowhere" in started.stderr


@pytest.mark.slow
def test_an_error_is_one_line_with_its_status_and_a_signal_saves(command, tmp_path):
    rows = write_forty_rows(tmp_path / "own")
    for words in ((), ("--nproc", "2")):
        wrong = run(command, "sft", *words, "--stepz", "2", folder=tmp_path)
        assert wrong.returncode == 1
        assert wrong.stderr.splitlines() == ["sft.py: ConfigError: unknown option 'stepz'; did you mean 'steps'?"]
        missing = run(command, "sft", *words, "--data.sources", "gone.jsonl", folder=tmp_path)
        assert missing.returncode == 1 and len(missing.stderr.splitlines()) == 1 and "gone.jsonl" in missing.stderr
    for words, status in (((), 0), (("--nproc", "2"), 128 + signal.SIGINT)):
        out = tmp_path / f"stopped-{len(words)}"
        log = (tmp_path / "log").open("w+")
        asked = [command, "sft", *words, "--data.sources", str(rows), "--steps", "100000", "--out", str(out)]
        process = subprocess.Popen(asked, stdout=log, stderr=subprocess.STDOUT, env=ONE_THREAD)
        begin = time.monotonic()
        while not (out / "metrics.jsonl").is_file() and process.poll() is None and time.monotonic() - begin < 240:
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=240) == status
        log.seek(0)
        shown = log.read()
        assert "stopped by a signal" in shown and "Traceback" not in shown and list(out.glob("checkpoints/step-*"))
