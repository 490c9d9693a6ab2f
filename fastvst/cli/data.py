"""`fastvst data check`: what training would read, change, ignore and reject."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
from typing import Any

from fastvst.cli import scripts
from fastvst.config import ConfigError
from fastvst.data.check import check_source
from fastvst.data.gallery import write_gallery
from fastvst.data.mixture import SourceConfig
from fastvst.data.processor import Processor
from fastvst.data.sources import FORMATS
from fastvst.data.sources.source import OUTSIDE_PATHS
from fastvst.train.run import build_processor


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """The keys of a source (`SourceConfig`) as arguments."""
    add = parser.add_argument
    add("--format", default="auto", help=f"auto (default), or the only format that is read: {', '.join(FORMATS)}")
    add("--image-folder", help="folder in which relative image paths start (default: that of the file that names them)")
    add("--split", help="split of the data set (default: the only one)")
    add("--columns", type=json.loads, help='names of columns, e.g. \'{"question": "prompt", "image": "path"}\'')
    add("--question", help="question that is asked about images that have only a caption")
    add(
        "--outside-paths",
        default="absolute",
        choices=OUTSIDE_PATHS,
        help="images that may lie outside of the data folder and the image folder (default: those with absolute paths)",
    )


def source_of(path: str, arguments: argparse.Namespace) -> SourceConfig:
    """The source that the arguments of `add_source_arguments` describe."""
    return SourceConfig(
        path,
        arguments.format,
        image_folder=arguments.image_folder,
        split=arguments.split,
        columns=arguments.columns or {},
        question=arguments.question,
        outside_paths=arguments.outside_paths,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fastvst data check PATH`."""
    add = parser.add_argument
    add("action", choices=["check"], help="check: read every row and report what training would use")
    add("path", nargs="?", help="file or folder of the data set (default: the sources of --config)")
    add("--config", help="TOML file of a run: its limits are used, and its sources if PATH is not given")
    add("--model", help="model directory whose tokenizer counts the tokens (default: that of the tiny preset)")
    add_source_arguments(parser)
    add("--limit", type=int, help="number of rows to check (default: all)")
    add("--max-seq-len", type=int, help="most tokens in a row; longer rows are rejected (default: 16384)")
    add("--out", help="folder for a page with examples and for check.json; with several sources, a folder for each")


def run(arguments: argparse.Namespace) -> int:
    """Check the data sets, print the reports and write the pages. Returns 1 if any row has a problem, else 0.

    Raises:
        ValueError: neither PATH nor sources, or a configuration that no training script accepts.
    """
    config = run_config(arguments) if arguments.config else None
    sources = [source_of(arguments.path, arguments)] if arguments.path else list(config.data.sources if config else ())
    if not sources:
        raise ValueError("give the PATH of a data set, or a --config whose data.sources name one")
    processor, tokens_per_pack = _limits(arguments, config)
    status = 0
    for number, source in enumerate(sources):
        report = check_source(source, processor, limit=arguments.limit, tokens_per_pack=tokens_per_pack)
        print(report.table())
        if arguments.out:
            out = arguments.out if len(sources) == 1 else f"{arguments.out}/{number}-{report.name}"
            print(f"page: {write_gallery(report, processor, out)}")
        status = max(status, int(bool(report.counts)))
    length = processor.config.max_seq_len
    print(f"limits: max_seq_len {length}, tokens_per_pack {tokens_per_pack or length}, of {_whose(arguments, config)}")
    return status


def run_config(arguments: argparse.Namespace) -> Any:
    """The configuration of examples/sft.py, or else of examples/rl.py, with the file of `--config`.

    Raises:
        ValueError: neither script accepts the file; the message has the reason of each.
    """
    words = ["--config", arguments.config]
    words += ["--model.path", arguments.model] if arguments.model else []
    words += ["--processor.max_seq_len", str(arguments.max_seq_len)] if arguments.max_seq_len else []
    reasons = []
    for name in ("sft", "rl"):
        try:
            return script_module(name).read(words)
        except ConfigError as error:
            reasons.append(f"{name}: {error}")
    raise ValueError("; ".join(reasons))


def script_module(name: str) -> Any:
    """A training script as a module."""
    path = scripts.folder() / scripts.SCRIPTS[name]
    spec = importlib.util.spec_from_file_location(f"fastvst_script_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module


def _limits(arguments: argparse.Namespace, config: Any) -> tuple[Processor, int | None]:
    """The processor, and the most tokens of a pack."""
    if config is not None:
        fields = {field.name for field in dataclasses.fields(config)}
        return build_processor(config.processor, config.model.path, data=config.data), (
            config.loader.tokens_per_pack if "loader" in fields else None
        )
    options: dict[str, Any] = {"max_seq_len": arguments.max_seq_len or 16384}
    model = arguments.model
    return (Processor.from_pretrained(model, **options) if model else Processor.preset("tiny", **options)), None


def _whose(arguments: argparse.Namespace, config: Any) -> str:
    model = config.model.path if config is not None else arguments.model
    return f"{arguments.config or 'the defaults'}; tokens of {model or 'the tiny preset (--model chooses another)'}"
