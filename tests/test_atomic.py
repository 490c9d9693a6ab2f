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
    with atomic.into(path) as partial:
        (partial / "one").write_text("1")
    with pytest.raises(error), atomic.into(path) as partial:
        (partial / "two").write_text("2")
        raise error
    assert names(path) == ["one"] and names(tmp_path) == ["f"]


def test_files_of_other_names_stay(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "f"
    for name in ("one", "two"):
        with atomic.into(path, stale=lambda folder, new: ["old", "absent"]) as partial:
            (partial / "sub").mkdir()
            (partial / "sub" / name).write_text(name)
            (partial / "same").write_text(name)
        (path / "old").write_text("old")
    assert names(path / "sub") == ["one", "two"] and names(tmp_path / "deep") == ["f"]
    assert (path / "same").read_text() == "two" and names(path) == ["old", "same", "sub"]
    with atomic.into(path, stale=lambda folder, new: ["old", "absent"]) as partial:
        pass
    assert names(path) == ["same", "sub"]


def write_into(path: Path | str) -> None:
    with atomic.into(path) as partial:
        (partial / "file").write_text("new")


def test_targets_of_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    (real / "file").symlink_to(tmp_path / "blob")  # a file of a download cache
    (tmp_path / "blob").write_text("shared")
    write_into(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and names(real) == ["file"]
    assert (real / "file").read_text() == "new" and (tmp_path / "blob").read_text() == "shared"
    monkeypatch.chdir(real)
    (real / "file").write_text("old")
    write_into(".")
    assert names(real) == ["file"] and (real / "file").read_text() == "new"
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for target, error in (
        (tmp_path / "blob", NotADirectoryError),
        (tmp_path / "blob" / "deep" / "below", NotADirectoryError),
        (tmp_path / "dangling", FileNotFoundError),
    ):
        with pytest.raises(error):
            write_into(target)
    assert names(tmp_path) == ["blob", "dangling", "link", "real"]


def test_a_folder_at_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a").write_text("old")
    with pytest.raises(IsADirectoryError, match="'b'"), atomic.into(tmp_path) as partial:
        (partial / "a").write_text("new")
        (partial / "b").write_text("new")
    assert (tmp_path / "a").read_text() == "old" and names(tmp_path) == ["a", "b"]


def test_created_parents_disappear_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic.into(tmp_path / "a" / "b" / "c"):
        raise RuntimeError
    assert names(tmp_path) == []


@pytest.mark.skipif(os.name != "posix", reason="needs modes of folders")
def test_a_parent_without_write_permission(tmp_path: Path) -> None:
    """root may write everywhere, so a root process becomes nobody for this test."""
    parent = tmp_path / "parent"
    mine = parent / "mine"
    mine.mkdir(parents=True)
    root = os.geteuid() == 0
    shared = tmp_path.parents[2]
    modes = {p: mode(p) for p in (tmp_path, *tmp_path.parents) if shared in (p, *p.parents)}
    for folder in modes:
        folder.chmod(modes[folder] | 0o055)
    if root:
        os.chown(mine, 65534, 65534)
    parent.chmod(0o555)
    if root:
        os.seteuid(65534)
    try:
        write_into(mine)
        with pytest.raises(PermissionError):
            write_into(parent / "new")
    finally:
        if root:
            os.seteuid(0)
        parent.chmod(0o755)
        for folder, old in modes.items():
            folder.chmod(old)
    assert names(mine) == ["file"] and names(parent) == ["mine"]


def test_the_old_folder_comes_back_when_the_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    with atomic.into(path) as partial:
        (partial / "old").write_text("old")
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if ".partial-" in str(source):
            raise PermissionError(13, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(PermissionError), atomic.into(path) as partial:
        (partial / "new").write_text("new")
    assert names(path) == ["old"] and names(tmp_path) == ["f"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_modes_obey_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        atomic.write_text(tmp_path / "file", "x")
        with atomic.into(tmp_path / "folder") as partial:
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


@pytest.mark.parametrize("what, target", [("file", "partial"), ("into", "partial / 'content'")])
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


def test_a_file_gets_the_mode_of_a_new_one(tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.touch(0o600)
    before = os.umask(0o022)
    try:
        atomic.give_new_mode(private)
        assert private.stat().st_mode & 0o777 == 0o644
        os.umask(0o077)
        atomic.give_new_mode(private)
        assert private.stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)
    assert [p.name for p in tmp_path.iterdir()] == ["private"]
