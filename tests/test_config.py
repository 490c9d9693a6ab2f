from __future__ import annotations

import ast
import dataclasses
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastvst import config as cfg
from fastvst.config import ConfigError, load_config


@dataclass(frozen=True)
class Source:
    path: str
    weight: float = 1.0


@dataclass(frozen=True)
class Train:
    """Options.

    Attributes:
        steps: how long
            it runs.
        rate: how fast.
    """

    steps: int = 10
    rate: float = 1e-3
    fused: bool = False
    kind: Literal["cosine", "linear"] = "cosine"
    limit: float | None = None
    freeze: tuple[str, ...] = ()
    betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps is {self.steps}")


@dataclass(frozen=True)
class Data:
    sources: tuple[Source, ...] = ()
    weights: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Config:
    out: str = "runs"
    dry_run: bool = False
    train: Train = Train(steps=20)
    data: Data = Data()


def test_defaults_of_the_owner_of_the_section_win_over_those_of_the_class() -> None:
    assert load_config(Config) == Config()
    assert load_config(Config, ["train.rate=2"]).train == Train(steps=20, rate=2.0)


@pytest.mark.parametrize(
    ("arguments", "path", "value"),
    [
        (["--train.steps", "200"], ("train", "steps"), 200),
        (["--train.steps=200"], ("train", "steps"), 200),
        (["train.steps=200"], ("train", "steps"), 200),
        (["--train.rate", "5e-5"], ("train", "rate"), 5e-5),
        (["--train.rate", "1"], ("train", "rate"), 1.0),
        (["--dry-run"], ("dry_run",), True),
        (["--dry-run", "--out", "a b"], ("dry_run",), True),
        (["--train.fused", "False"], ("train", "fused"), False),
        (["--out", "123"], ("out",), "123"),
        (["--out=a=b"], ("out",), "a=b"),
        (["--train.kind", "linear"], ("train", "kind"), "linear"),
        (["--train.limit", "none"], ("train", "limit"), None),
        (["--train.limit", "3"], ("train", "limit"), 3.0),
        (["--train.freeze", "vision,merger"], ("train", "freeze"), ("vision", "merger")),
        (["--train.freeze", '["vision"]'], ("train", "freeze"), ("vision",)),
        (["--train.betas", "[0.8, 1]"], ("train", "betas"), (0.8, 1.0)),
        (["--data.sources", '[{path = "x", weight = 2}]'], ("data", "sources"), (Source("x", 2.0),)),
        (["--data.sources", "x.jsonl"], ("data", "sources"), (Source("x.jsonl"),)),
        (["--data.sources=x, y,2024"], ("data", "sources"), (Source("x"), Source(" y"), Source("2024"))),
        (["--data.weights", "{a = 1}"], ("data", "weights"), {"a": 1.0}),
        (["--data.weights.a", "3"], ("data", "weights"), {"a": 3.0}),
    ],
)
def test_overrides(arguments: list[str], path: tuple[str, ...], value: object) -> None:
    found: object = load_config(Config, arguments)
    for part in path:
        found = getattr(found, part)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--train.stpes", "3"], ["'train.stpes'", "did you mean 'train.steps'"]),
        (["--steps", "3"], ["did you mean 'train.steps'"]),
        (["--trian.rate", "3"], ["did you mean 'train.rate'"]),
        (["--train", "3"], ["section", "train.steps"]),
        (["--train.steps", "many"], ["train.steps", "int", "'many'", "str"]),
        (["--train.steps", "1.5"], ["train.steps", "int", "1.5", "float"]),
        (["--train.steps", "true"], ["train.steps", "int", "bool"]),
        (["--train.rate", "fast"], ["train.rate", "float", "'fast'"]),
        (["--train.fused", "1"], ["train.fused", "bool", "1"]),
        (["--train.kind", "square"], ["train.kind", "'cosine' | 'linear'", "square"]),
        (["--train.betas", "[1]"], ["train.betas", "tuple[float, float]"]),
        (["--train.steps", "none"], ["train.steps", "int"]),
        (["--train.steps", "-1"], ["train", "steps is -1"]),
        (["--data.sources", "[{weight = 2}]"], ["data.sources[0]", "lacks path"]),
        (["--data.sources", '[{path = "x", wieght = 2}]'], ["data.sources[0].wieght", "data.sources[0].weight"]),
        (["--data.sources", '["x"]'], ["data.sources[0]", "Source", "'x'"]),
        (["--out"], ["--out needs a value", "str"]),
        (["rooms"], ["'rooms'", "key"]),
        (["--config", "/nowhere.toml"], ["/nowhere.toml", "no such file"]),
    ],
)
def test_errors_say_what_came_and_what_was_expected(arguments: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(Config, arguments)
    for word in words:
        assert word in str(error.value)


def test_toml_file_lies_between_defaults_and_arguments(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('out = "x"\n[train]\nsteps = 5\nrate = 1\n[[data.sources]]\npath = "p"\n')
    config = load_config(Config, ["--train.steps", "7", "--config", str(file)])
    assert (config.out, config.train.steps, config.train.rate) == ("x", 7, 1.0)
    assert config.data.sources == (Source("p"),)
    file.write_text("[trian]\nsteps = 5\n")
    with pytest.raises(ConfigError, match="trian"):
        load_config(Config, ["--config", str(file)])
    file.write_text("train = 5\n")
    with pytest.raises(ConfigError, match="train is a section"):
        load_config(Config, ["--config", str(file)])
    file.write_text("train = = 5\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(Config, ["--config", str(file)])


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # machines may be busy
@given(
    st.builds(
        Config,
        out=st.text(),
        dry_run=st.booleans(),
        train=st.builds(
            Train,
            steps=st.integers(0, 10**6),
            rate=st.floats(allow_nan=False, allow_infinity=False),
            limit=st.none() | st.floats(0, 1),
            freeze=st.lists(st.text(), max_size=3).map(tuple),
        ),
        data=st.builds(Data, sources=st.lists(st.builds(Source, path=st.text()), max_size=3).map(tuple)),
    )
)
def test_json_round_trip(config: Config) -> None:
    assert cfg.from_dict(Config, cfg.to_dict(config)) == config


def test_render_marks_what_was_changed_and_help_names_everything() -> None:
    text = cfg.render(load_config(Config, ["--train.steps", "21"]))
    assert [line for line in text.splitlines() if line.startswith("*")] == [
        line for line in text.splitlines() if "train.steps" in line
    ]
    assert "train.steps  = 21" in text
    names = [name for name, _ in cfg.leaves(Config())]
    assert names == [
        *("out", "dry_run", "train.steps", "train.rate", "train.fused", "train.kind", "train.limit", "train.freeze"),
        *("train.betas", "data.sources", "data.weights"),
    ]
    usage = cfg.usage(Config)
    assert all(f"--{name} <" in usage for name in names)
    assert (
        "How long it runs." in usage
        and "--train.limit <float | None>  (default none)" in usage
        and "it runs. rate" not in usage
    )


def test_values_cannot_be_changed_afterwards() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config(Config).train.steps = 3  # type: ignore[misc]


@dataclass(frozen=True)
class Reader:
    rows: int = 5
    start_method: str = cfg.not_an_option("fork")


@dataclass(frozen=True)
class Whole:
    reader: Reader = Reader(rows=6)


def test_a_field_for_callers_only_is_no_option() -> None:
    assert Reader(start_method="spawn").start_method == "spawn"
    assert [name for name, _ in cfg.leaves(Whole())] == ["reader.rows"]
    assert "start_method" not in cfg.usage(Whole) + cfg.render(Whole()) + str(cfg.to_dict(Whole()))
    with pytest.raises(ConfigError, match=r"unknown option 'reader\.start_method'"):
        load_config(Whole, ["reader.start_method=spawn"])
    assert load_config(Whole, ["reader.rows=7"]) == Whole(Reader(rows=7))


ROOT = Path(__file__).parents[1]


def config_of(script: str, monkeypatch: pytest.MonkeyPatch) -> type:
    """The configuration of a training script; the scripts import each other by their file names."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module(script).Config


def docstrings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield ast.get_docstring(node) or ""


@pytest.mark.parametrize(
    ("file", "script"),
    [
        ("fastvst/config.py", "sft"),
        ("examples/sft.py", "sft"),
        ("examples/rl.py", "rl"),
        ("examples/cold_start.py", "cold_start"),
        ("examples/vla.py", "vla"),
        ("examples/vla_rl.py", "vla_rl"),
    ],
)
def test_options_that_docstrings_show_exist(file: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n".join(docstrings(ROOT / file))
    text = re.sub(r"torchrun [^\n]*?examples/\w+\.py", "", text)  # torchrun has options of its own
    shown = re.findall(r"(?<![\w-])--([a-z][\w.-]*\w)", text) + re.findall(r"(?<![\w.])([a-z_]+\.[a-z_]+)=", text)
    names = {name.replace("-", "_") for name in shown} - {"config", "help", "section.name", "nproc"}
    assert names
    assert names <= {name for name, _ in cfg.leaves(config_of(script, monkeypatch)())}


@pytest.mark.parametrize("script", ["sft", "rl", "cold_start", "vla", "vla_rl"])
def test_every_option_of_a_script_has_a_help_text(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config_class = config_of(script, monkeypatch)
    lines = cfg.usage(config_class).splitlines()
    assert len(lines) == 2 * len(list(cfg.leaves(config_class())))  # a line for the option and a line for its text
    assert not [line for line in lines if re.match(r" {6}(See|Of) ", line)]
    assert [line for line in lines[1::2] if line[6].islower()] == [], "every text begins like a sentence"
