"""Files and folders that are either whole or absent, whenever the process is killed.

Everything is written next to its target under a hidden name, flushed to the disk, and then renamed. Until the rename,
the target is what it was before. Modes are those of newly created files, so they obey the umask.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
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
def folder(path: str | Path) -> Iterator[Path]:
    """`with atomic.folder(path) as partial:` fill the new folder `partial`; it becomes `path` at the end of the block.

    Missing parent folders are created. If the block raises, `partial` is deleted and `path` stays as it was.
    """
    path = Path(path)
    partial = _partial(path)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        replace(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write one UTF-8 text file; missing parent folders are created."""
    with file(path) as partial:
        partial.write_text(text, encoding="utf-8")


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


def _partial(path: Path) -> Path:
    """The hidden name next to `path`. The process id keeps two processes that write the same target apart."""
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


def _flush(path: Path) -> None:
    """Flush a file, or a folder and everything in it, so that a rename cannot reach the disk before the content."""
    for entry in [*path.rglob("*"), path]:  # rglob of a file is empty
        descriptor = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
