"""Atomic files and folders: what a crash or a kill leaves behind, and the modes of what is written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastvst import atomic


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_file_appears_whole_with_its_parents(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "page.html"
    for text in ("first \u2028 line", "second"):
        atomic.write_text(path, text)
        assert path.read_text(encoding="utf-8") == text and names(path.parent) == ["page.html"]


def test_an_exception_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="half-way"), atomic.file(path) as partial:
        partial.write_text("new, but not yet wh")
        raise RuntimeError("half-way")
    assert path.read_text() == "old" and names(tmp_path) == ["f"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_folder(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "f"
    with atomic.folder(path) as partial:
        (partial / "one").write_text("1")
    with pytest.raises(error), atomic.folder(path) as partial:
        (partial / "two").write_text("2")
        raise error
    assert names(path) == ["one"] and names(tmp_path) == ["f"]


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with atomic.folder(tmp_path / "deep" / "f") as partial:
            (partial / "sub").mkdir()
            (partial / "sub" / name).write_text(name)
        assert names(tmp_path / "deep" / "f" / "sub") == [name] and names(tmp_path / "deep") == ["f"]


def test_the_old_folder_comes_back_when_the_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    with atomic.folder(path) as partial:
        (partial / "old").write_text("old")
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if ".partial-" in str(source):
            raise PermissionError(13, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(PermissionError), atomic.folder(path) as partial:
        (partial / "new").write_text("new")
    assert names(path) == ["old"] and names(tmp_path) == ["f"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_modes_obey_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        atomic.write_text(tmp_path / "file", "x")
        with atomic.folder(tmp_path / "folder") as partial:
            (partial / "inside").write_text("x")
    finally:
        os.umask(before)
    assert mode(tmp_path / "file") == mode(tmp_path / "folder" / "inside") == 0o666 & ~mask
    assert mode(tmp_path / "folder") == 0o777 & ~mask


KILLED = """
import os, signal, sys
from fastvst import atomic
with atomic.{what}(sys.argv[1]) as partial:
    ({target}).write_text("new, but not yet wh")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("what, target", [("file", "partial"), ("folder", "partial / 'content'")])
def test_a_kill_leaves_the_old_one(tmp_path: Path, what: str, target: str) -> None:
    path = tmp_path / "f"
    content = path if what == "file" else path / "content"
    content.parent.mkdir(exist_ok=True)
    content.write_text("old")
    program = KILLED.format(what=what, target=target)
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert content.read_text() == "old"
    assert all(name == "f" or name.startswith(".f.partial-") for name in names(tmp_path))  # a hidden rest may stay
