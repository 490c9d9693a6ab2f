"""`fastvst rooms` and `fastvst evaluate`: thin commands around library functions."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fastvst.evaluate import command


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `fastvst` command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="fastvst", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    rooms = commands.add_parser("rooms", help="render furnished rooms and write their questions as VST parquet")
    rooms.add_argument("--out", required=True, help="folder for the parquet files")
    rooms.add_argument("--samples", type=int, default=2000, help="number of rows (default 2000)")
    rooms.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes (default 0)")
    rooms.add_argument("--workers", type=int, default=2, help="rendering processes (default 2)")

    evaluate = commands.add_parser("evaluate", help="answer a benchmark's questions and score them, or score a file")
    command.add_arguments(evaluate)
    evaluate.add_argument("--train-data", help="rooms: the training rows, from which the baselines are made")

    arguments = parser.parse_args(argv)
    try:
        return _rooms(arguments) if arguments.command == "rooms" else _evaluate(arguments)
    except (ValueError, OSError) as error:
        print(f"fastvst {arguments.command}: {error}", file=sys.stderr)
        return 2


def _rooms(arguments: argparse.Namespace) -> int:
    from fastvst.spatial.rooms.generate import make_rooms  # a renderer is imported only where one is asked for

    print(make_rooms(arguments.out, samples=arguments.samples, seed=arguments.seed, workers=arguments.workers))
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    if arguments.benchmark != ["rooms"]:
        command.run(arguments)
        return 0
    if not arguments.model or not arguments.train_data:
        raise ValueError("evaluate rooms needs --model and --train-data")
    from fastvst.data import Processor
    from fastvst.evaluate import rooms
    from fastvst.model import Qwen25VL

    device = arguments.devices[0]
    model = Qwen25VL.from_pretrained(arguments.model, device=device)
    processor = Processor.from_pretrained(arguments.model)
    results = rooms.evaluate(model, processor, arguments.data, device, train_path=arguments.train_data, examples=0)
    print(results.table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
