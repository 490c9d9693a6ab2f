"""Files and folders that are either whole or absent, whenever the process is killed.

Everything is written next to its target under a hidden name, flushed to the disk, and then renamed. Until the rename,
the target is what it was before. Modes are those of newly created files, so they obey the umask.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def file(path: str | Path) -> Iterator[Path]:
    """`with atomic.file(path) as partial:` write the file `partial`; it becomes `path` at the end of the block.

    Missing parent folders are created. If the block raises, `partial` is deleted and `path` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    try:
        yield partial
        replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def into(
    path: str | Path, *, last: str = "", stale: Callable[[Path, set[str]], Iterable[str]] | None = None
) -> Iterator[Path]:
    """`with atomic.into(path) as partial:` fill the new folder `partial`; its files move into the folder `path`.

    A missing `path` appears by one rename, parents included. In an existing folder (also a mount point or a symlink to
    a folder; its parent need not be writable) only files of the same names are replaced. Everything else stays. If the
    block or a rename raises, every file is what it was before.

    Args:
        last: file without which the folder counts as incomplete. It disappears first and comes back last, so a killed
            process never leaves a mixture that looks complete.
        stale: called as stale(path, names of the new files); the files of `path` that it returns are deleted.

    Raises:
        OSError: `path` is a file or a dangling symlink, or it cannot be written; nothing has been written then.
    """
    path = Path(path)
    _check_target(path)
    partial = path / f".partial-{os.getpid()}" if path.exists() else _partial(path)
    missing = [parent for parent in partial.parents if not parent.exists()]
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        _flush(partial)
        if path.exists():
            _move_files(partial, path, last, stale)
        else:
            os.rename(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write one UTF-8 text file; missing parent folders are created.

    Half of a surrogate pair, which UTF-8 cannot hold, is written as an escape ("\\ud83d"), which JSON reads back.
    """
    with file(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def give_new_mode(path: Path) -> None:
    """Give a file the mode of a newly created one: safetensors and tempfile make files that only their owner reads."""
    fresh = path.with_name(f".{path.name}.mode-{os.getpid()}")
    descriptor = os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        path.chmod(os.fstat(descriptor).st_mode & 0o777)
    finally:
        os.close(descriptor)
        fresh.unlink()


def replace(partial: Path, path: Path) -> None:
    """Flush the finished file or folder `partial` and rename it to `path`, which may exist.

    A folder cannot take the place of another in one step: the old one is first renamed to a hidden name. If the second
    rename fails, the old folder gets its name back.
    """
    _flush(partial)
    if not partial.is_dir():
        os.replace(partial, path)
        return
    if not path.exists():
        os.rename(partial, path)
        return
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    shutil.rmtree(old, ignore_errors=True)
    os.rename(path, old)
    try:
        os.rename(partial, path)
    except OSError:
        os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _check_target(path: Path) -> None:
    """Raise OSError if `path` cannot be a folder."""
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(f"{path} is a symlink to {os.readlink(path)}, which does not exist")
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file; expected a folder or a new name")


def _move_files(partial: Path, path: Path, last: str, stale: Callable[[Path, set[str]], Iterable[str]] | None) -> None:
    """Move every file of `partial` to its place in the existing folder `path`; after an error, restore `path`."""
    names = [str(p.relative_to(partial)) for p in partial.rglob("*") if not p.is_dir()]
    names.sort(key=lambda name: (name == last, name))
    blocked = [name for name in names if (path / name).is_dir()]
    if blocked:
        raise IsADirectoryError(f"{path} contains folders where files belong: {blocked}; nothing was changed")
    leaving = [*reversed(names), *(stale(path, set(names)) if stale else ())]
    old = path / f".old-{os.getpid()}"
    moves: list[tuple[Path, Path]] = []
    try:
        for name in leaving:
            if os.path.lexists(path / name):
                _move(path / name, old / name, moves)
        for name in names:
            _move(partial / name, path / name, moves)
    except BaseException:
        for source, target in reversed(moves):
            os.replace(target, source)
        shutil.rmtree(old, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(partial, ignore_errors=True)
    _sync(path)


def _move(source: Path, target: Path, moves: list[tuple[Path, Path]]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    os.rename(source, target)
    moves.append((source, target))


def _partial(path: Path) -> Path:
    """The hidden name next to `path`. The process id keeps two processes that write the same target apart."""
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


def _flush(path: Path) -> None:
    """Flush a file, or a folder and everything in it, so that a rename cannot reach the disk before the content."""
    for entry in [*path.rglob("*"), path]:  # rglob of a file is empty
        _sync(entry)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
