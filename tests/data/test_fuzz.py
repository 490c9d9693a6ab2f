"""3,000 damaged files of every format, and the corpus (docs/reliability.md; CONTRIBUTING.md has the command)."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

import fuzz

READABLE = ("latin-1-title.mp4", "rows.deep.jsonl", "rows.latin-1.csv", "rows.repeated-key.json", "scans.jpg")


def test_three_thousand_damaged_files() -> None:
    counts, failed = fuzz.run(seed=0, count=3000)
    assert failed == []
    assert 600 < counts["read"] < 2400 and counts["memory"] < fuzz.MEMORY


@pytest.mark.parametrize("path", sorted(fuzz.CORPUS.iterdir()), ids=lambda path: path.name)
def test_what_was_found_before(path: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert fuzz.read(path.name, path.read_bytes(), tmp_path) == (path.name in READABLE)


def test_inputs_are_the_same_in_every_run_and_no_two_are_alike() -> None:
    whole = {"a.png": fuzz.image("PNG"), "rows.csv": fuzz.tables()["rows.csv"]}
    made = [fuzz.made(number, 5, whole) for number in range(200)]
    assert made == [fuzz.made(number, 5, whole) for number in range(200)]
    assert len({data for _, data in made}) > 190 and made != [fuzz.made(number, 6, whole) for number in range(200)]


def test_a_crash_and_a_hang_are_found(monkeypatch, tmp_path) -> None:
    script = tmp_path / "child.py"
    script.write_text(
        "import os, sys, time\n"
        "first = int(sys.argv[sys.argv.index('--child') + 1])\n"
        "for n in range(first, 4):\n"
        "    print(n, flush=True)\n"
        "    if n == 1: os.abort()\n"
        "    if n == 2: time.sleep(100)\n"
        'print(\'{"read": 2, "memory": 5}\')\n'
    )
    monkeypatch.setattr(fuzz, "__file__", str(script))
    monkeypatch.setattr(fuzz, "HANG_SECONDS", 5.0)
    monkeypatch.setattr(fuzz, "CORPUS", tmp_path)
    monkeypatch.setattr(fuzz, "seeds", lambda: {"a.png": b"0123456789" * 9})
    counts, failed = fuzz.run(0, 4)
    assert [number for number, _ in failed] == [1, 2] and counts == {"read": 2, "memory": 5}
    assert "status -6" in failed[0][1] and "no end within 5 s" in failed[1][1]
    assert len(list(tmp_path.glob("found-0-*.png"))) == 2
