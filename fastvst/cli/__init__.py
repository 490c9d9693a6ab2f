"""The `fastvst` command. Each of its commands is a thin layer over the library."""

from __future__ import annotations

import argparse
import difflib
import importlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from fastvst import __version__
from fastvst.cli import scripts


@dataclass(frozen=True)
class Command:
    """A command of `fastvst`.

    Attributes:
        help: one line for `fastvst --help`.
        example: shown by the command's own `--help`.
        module: where its functions are; imported when the command runs. Empty for a training script.
        arguments, run: names of the functions that add its arguments and that run it.
    """

    help: str
    example: str
    module: str = ""
    arguments: str = "add_arguments"
    run: str = "run"


COMMANDS = {
    "sft": Command("train a model on rows (supervised fine-tuning)", "fastvst sft --data.sources rows.jsonl"),
    "rl": Command("train a model on its own completions with a reward", "fastvst rl --model.path runs/sft/hf"),
    "cold-start": Command("train a model to think before it answers", "fastvst cold-start --model runs/sft/hf"),
    "examples": Command(
        "copy the training scripts and their settings into a folder",
        "fastvst examples --out examples",
        "fastvst.cli.scripts",
        run="copy",
    ),
    "plan": Command(
        "estimate step time, hours and disk of a training run from stated peaks",
        "fastvst plan --config examples/vst.toml --model.size 7b --gpus 8 --device h100",
        "fastvst.cli.plan",
    ),
    "rooms": Command(
        "render furnished rooms and write questions about them",
        "fastvst rooms make --out rows --samples 2000",
        "fastvst.cli.rooms",
    ),
    "scans": Command(
        "read other people's scans and write questions about them",
        "fastvst scans scannet scans --out rows.parquet",
        "fastvst.cli.scans",
    ),
    "data": Command(
        "inspect a data set before training on it", "fastvst data check rows.jsonl --out check", "fastvst.cli.data"
    ),
    "vla": Command(
        "make demonstrations of robot tasks with a simulator's scripted experts",
        "fastvst vla demos --tasks reach push --episodes 40 --out demos",
        "fastvst.cli.vla",
    ),
    "evaluate": Command(
        "answer and score a benchmark, or score predictions",
        "fastvst evaluate cv_bench --data cv_bench --model runs/sft/hf --out scores",
        "fastvst.cli.evaluate",
        run="run_command",
    ),
    "chat": Command(
        "talk to a model about images and videos",
        "fastvst chat --model runs/sft/hf",
        "fastvst.cli.generate",
        "add_chat_arguments",
        "run_chat",
    ),
    "generate": Command(
        "answer the rows of a file",
        "fastvst generate --model runs/sft/hf --input prompts.jsonl --output out.jsonl",
        "fastvst.cli.generate",
        "add_generate_arguments",
        "run_generate",
    ),
    "merge": Command(
        "average checkpoints, or merge a LoRA adapter into its base",
        "fastvst merge --adapter adapter --out merged",
        "fastvst.cli.merge",
    ),
}


def _wide(prog: str) -> argparse.HelpFormatter:
    """Help texts as they are written, every command on one line."""
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=100)


class Parser(argparse.ArgumentParser):
    """Says what was wrong in one line, and names the nearest word that exists."""

    def error(self, message: str) -> NoReturn:
        found = re.search(r"invalid choice: '(.*?)'|unrecognized arguments: (\S+)", message)
        wrong = (found[1] or found[2]).partition("=")[0] if found else ""
        near = difflib.get_close_matches(wrong, self._words(), n=1, cutoff=0.6)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        self.exit(2, f"{self.prog}: {message}{hint} (`{self.prog} --help` lists what there is)\n")

    def _words(self) -> list[str]:
        actions = self._actions
        return [word for a in actions for word in (*a.option_strings, *map(str, a.choices or ()))]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `fastvst` command; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0] if words else "--help"
    try:
        if name in scripts.SCRIPTS:
            return scripts.run(name, words[1:])
        parser, command = _parser(name)
        if name not in COMMANDS and not name.startswith("-"):
            near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5) or ["--help"]
            parser.exit(2, f"fastvst: there is no command {name!r}; did you mean `fastvst {near[0]}`?\n")
        arguments, unknown = parser.parse_known_args(words or [name])
        if unknown:
            command.error(f"unrecognized arguments: {' '.join(unknown)}")
        status = _function(name, COMMANDS[name].run)(arguments)
        return status if isinstance(status, int) else 0
    except (ValueError, OSError) as error:
        print(f"fastvst {name}: {error}", file=sys.stderr)
        return 2


def _parser(chosen: str) -> tuple[Parser, Parser]:
    """The parser of `fastvst`, and that of the chosen command, the only one that has its arguments."""
    epilog = (
        f"`fastvst COMMAND --help` lists the options of a command. sft, rl and cold-start run the scripts in\n"
        f"{scripts.folder()}; --nproc N starts N processes, one for each GPU."
    )
    parser = Parser(
        prog="fastvst",
        usage="fastvst COMMAND [OPTIONS]",
        description="Train, run and evaluate spatial vision-language models.",
        epilog=epilog,
        formatter_class=_wide,
    )
    parser.add_argument("--version", action="version", version=f"fastvst {__version__}", help="show the version")
    group = parser.add_subparsers(
        prog="fastvst", dest="command", required=True, metavar="COMMAND [OPTIONS]", title="commands"
    )
    found = parser
    for name, command in COMMANDS.items():
        made = group.add_parser(
            name,
            help=command.help,
            description=f"{command.help[0].upper()}{command.help[1:]}.",
            epilog=f"example:\n  {command.example}",
            formatter_class=_wide,
        )
        if name == chosen:
            _function(name, command.arguments)(made)
            found = made
    return parser, found


def _function(name: str, function: str) -> Any:
    return getattr(importlib.import_module(COMMANDS[name].module), function)


if __name__ == "__main__":
    sys.exit(main())
