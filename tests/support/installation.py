"""Wheels built from a copy of the sources, installed in an environment with their declared dependencies only."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
OFFLINE = ["--no-index", "--no-cache-dir"]
NOT_COPIED = shutil.ignore_patterns(".*", "build", "runs", "*.egg-info", "__pycache__")


def build_wheel(project: Path, folder: Path) -> Path:
    """Build the wheel of a project folder into `folder`, without a network; the project is copied first."""
    source = folder / f"source-{project.name}"  # a build writes into its source
    shutil.copytree(project, source, ignore=NOT_COPIED)
    before = set(folder.glob("*.whl"))
    build = [*PIP, "wheel", *OFFLINE, "--no-build-isolation", "--no-deps", "-w", str(folder), str(source)]
    subprocess.run(build, check=True)
    (wheel,) = set(folder.glob("*.whl")) - before
    return wheel


def install(wheel: Path, folder: Path, extras: Sequence[str] = ()) -> Path:
    """A new environment in `folder` with the wheel and what it declares; returns its `bin`.

    The dependencies are links to the packages of this environment. pip installs the wheel without an index and with
    its dependencies: it refuses if one of them is missing.
    """
    venv.create(folder, with_pip=False)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    (declared,) = metadata.distributions(path=[str(wheel)])
    for distribution in closure(declared.requires or [], extras).values():
        for path in top_level(distribution):
            (packages / path.name).symlink_to(path)
    python = str(folder / "bin" / "python")
    subprocess.run([*PIP, "--python", python, "install", *OFFLINE, str(wheel)], check=True)
    return folder / "bin"


def closure(requirements: Sequence[str], extras: Sequence[str] = ()) -> dict[str, metadata.Distribution]:
    """The installed distributions that requirements name, with everything that those require."""
    found: dict[str, metadata.Distribution] = {}
    for text in requirements:
        wanted = Requirement(text)
        marker = wanted.marker
        if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            continue
        made = metadata.distribution(wanted.name)
        found[canonicalize_name(wanted.name)] = made
        found |= closure([r for r in made.requires or [] if "extra ==" not in r])
    return found


def top_level(distribution: metadata.Distribution) -> Iterator[Path]:
    """The files and folders of a distribution directly in site-packages."""
    root = Path(str(distribution.locate_file("")))
    for name in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
        yield root / name
