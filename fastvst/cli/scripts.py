"""`fastvst sft`, `fastvst rl` and `fastvst cold-start` run the training scripts; `fastvst examples` copies them.

The scripts are the files of `examples/`. The wheel carries them in `fastvst/examples/`; in a checkout they are read
from their own folder.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
SCRIPTS = {"sft": "sft.py", "rl": "rl.py", "cold-start": "cold_start.py"}
# Seconds that the processes have after SIGTERM or Ctrl-C to save a checkpoint, before torchrun kills them. Torch 2.13
# reads it from this variable; older versions always wait 30 seconds.
SHUTDOWN_TIMEOUT = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1800"}


def folder() -> Path:
    """The folder of the training scripts.

    Raises:
        FileNotFoundError: the installation lacks them.
    """
    for found in (PACKAGE / "examples", PACKAGE.parent / "examples"):
        if (found / SCRIPTS["sft"]).is_file():
            return found
    raise FileNotFoundError(f"the training scripts are not in {PACKAGE / 'examples'}; install fastvst again")


def run(name: str, words: Sequence[str]) -> int:
    """Run the script of command `name` with the options `words`.

    Without `--nproc` the script replaces this process, so that signals and the exit status are its own. With
    `--nproc N` torchrun starts N processes.

    Returns:
        The exit status of `--nproc N`: 0, that of the first process that failed, or 128 + the number of the signal.

    Raises:
        ValueError: `--nproc` without a number of at least 1.
    """
    script = str(folder() / SCRIPTS[name])
    processes, rest = take_nproc(words)
    if processes is None:
        os.execv(sys.executable, [sys.executable, script, *rest])
    return _torchrun(name, processes, [script, *rest])


def take_nproc(words: Sequence[str]) -> tuple[int | None, list[str]]:
    """(N of `--nproc N` or `--nproc=N`, the other words); N is None without the option.

    Raises:
        ValueError: N is missing, or is not a whole number of at least 1.
    """
    rest = list(words)
    number: str | None = None
    for index, word in enumerate(rest):
        if word == "--nproc":
            number = rest[index + 1] if index + 1 < len(rest) else ""
            del rest[index : index + 2]
            break
        if word.startswith("--nproc="):
            number = rest.pop(index).partition("=")[2]
            break
    if number is None:
        return None, rest
    if not number.isascii() or not number.isdecimal() or int(number) < 1:
        raise ValueError(f"--nproc is {number!r}; expected the number of processes, one for each GPU")
    return int(number), rest


def _torchrun(name: str, processes: int, command: Sequence[str]) -> int:
    """Run the command in N processes of this node; a free port is chosen, so that several runs fit on one node."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # The script's own line says what was wrong; torchrun would add twenty lines and a traceback of itself.
    logging.disable(logging.ERROR)
    os.environ.update(SHUTDOWN_TIMEOUT)
    try:
        torchrun.run(torchrun.parse_args(["--standalone", "--nproc-per-node", str(processes), *command]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            text = f"process {rank} of {processes} was ended by {failure.signal_name()}"
            hint = "; the system may have run out of memory" if failure.signal_name() == "SIGKILL" else ""
            print(f"fastvst {name}: {text}{hint}", file=sys.stderr)
            return 128 - failure.exitcode
        return failure.exitcode
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fastvst examples`."""
    parser.add_argument("--out", type=Path, default=Path("examples"), help="folder to write (default: examples)")


def copy(arguments: argparse.Namespace) -> int:
    """Copy the scripts and their settings into a new folder; returns the exit status.

    Raises:
        FileExistsError: the folder is there and not empty.
    """
    out: Path = arguments.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is there already; nothing is overwritten, choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    names = sorted(path.name for path in folder().iterdir() if path.suffix in (".py", ".toml"))
    for name in names:
        shutil.copyfile(folder() / name, out / name)
    print(f"{out}: {', '.join(names)}")
    return 0
