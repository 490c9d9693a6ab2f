"""The `fastvst` command: rooms, data, evaluate, chat, generate and merge.

Each command is a thin layer over the library.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fastvst import __version__
from fastvst.cli import compare_rooms
from fastvst.cli import evaluate as command
from fastvst.cli import generate as rollout_command
from fastvst.cli import merge as merge_command
from fastvst.cli import rooms as rooms_command
from fastvst.data import gallery


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `fastvst` command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="fastvst", description=__doc__)
    parser.add_argument("--version", action="version", version=f"fastvst {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    rooms = commands.add_parser("rooms", help="render furnished rooms and write questions about them as VST parquet")
    rooms_command.add_arguments(rooms)
    data = commands.add_parser("data", help="inspect a data set before training on it")
    gallery.add_arguments(data)

    evaluate = commands.add_parser("evaluate", help="answer and score a benchmark, or score predictions")
    command.add_arguments(evaluate)
    compare_rooms.add_arguments(evaluate)

    rollout_command.add_chat_arguments(commands.add_parser("chat", help="talk to a model about images and videos"))
    rollout_command.add_generate_arguments(commands.add_parser("generate", help="answer the rows of a JSONL file"))

    merge_command.add_arguments(commands.add_parser("merge", help="merge a LoRA adapter into its base model"))

    arguments = parser.parse_args(argv)
    try:
        if arguments.command in ("chat", "generate"):
            return (rollout_command.run_chat if arguments.command == "chat" else rollout_command.run_generate)(
                arguments
            )
        if arguments.command == "merge":
            return merge_command.run(arguments)
        if arguments.command == "data":
            return gallery.run(arguments)
        return _rooms(arguments) if arguments.command == "rooms" else _evaluate(arguments)
    except (ValueError, OSError) as error:
        print(f"fastvst {arguments.command}: {error}", file=sys.stderr)
        return 2


def _rooms(arguments: argparse.Namespace) -> int:
    rooms_command.run(arguments)
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    (compare_rooms if arguments.benchmark == ["rooms"] else command).run(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
