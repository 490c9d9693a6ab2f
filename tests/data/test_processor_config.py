"""Every numeric option of processor, loader, videos, mixture and sources refuses what cannot be, with its name."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest

from fastvst.config import ConfigError, load_config
from fastvst.data import LoaderConfig, MixtureConfig, ProcessorConfig, SourceConfig
from fastvst.data.video import VideoConfig

GIVEN: dict[type, dict[str, Any]] = {
    ProcessorConfig: {},
    LoaderConfig: {},
    VideoConfig: {},
    MixtureConfig: {"sources": ()},
    SourceConfig: {"path": "a"},
}
OPTIONAL = ("weight", "min_pixels", "max_pixels", "epochs")
ZERO_MEANS_SOMETHING = ("num_workers", "timeout_s", "seed", "shuffle_buffer")
PAIRS = [("min_pixels", "max_pixels"), ("min_frames", "max_frames"), ("video_min_pixels", "video_max_pixels")]


def numbers(cls: type) -> list[str]:
    """Fields of a dataclass that hold one number."""
    fields = dataclasses.fields(cls)
    return [f.name for f in fields if type(f.default) in (int, float) or (f.default is None and f.name in OPTIONAL)]


ALL = [(cls, name) for cls in GIVEN for name in numbers(cls)]
BAD = [math.nan, math.inf, -math.inf, -1, -0.5, 0, True]


def test_all_numbers_are_found() -> None:
    assert len(ALL) == 12 + 7 + 6 + 3 + 3
    assert len(numbers(ProcessorConfig)) == 12 and len(numbers(LoaderConfig)) == 7


@pytest.mark.parametrize(("cls", "name"), ALL, ids=[f"{cls.__name__}.{name}" for cls, name in ALL])
def test_a_number_that_cannot_be_is_refused_by_name(cls: type, name: str) -> None:
    for value in BAD:
        if value == 0 and value is not True and name in ZERO_MEANS_SOMETHING:
            assert getattr(cls(**GIVEN[cls], **{name: value}), name) == 0
            continue
        with pytest.raises(ValueError, match=rf"\b{name} is ") as caught:
            cls(**GIVEN[cls], **{name: value})
        assert str(value) in str(caught.value)


def test_limits_in_the_wrong_order_are_refused_by_both_names() -> None:
    for cls, (low, high) in itertools.product(GIVEN, PAIRS):
        names = numbers(cls)
        if low in names and high in names:
            with pytest.raises(ValueError, match=f"{low} is 3000.* and {high} is 2000.*expected {low} <= {high}"):
                cls(**GIVEN[cls], **{low: 3000, high: 2000})
            cls(**GIVEN[cls], **{low: 2000, high: 2000})


def test_colours() -> None:
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="image_mean is"):
            ProcessorConfig(image_mean=(0.5, bad, 0.5))
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="image_std is"):
            ProcessorConfig(image_std=(0.5, bad, 0.5))


def test_the_command_line_names_the_option_and_the_source() -> None:
    @dataclasses.dataclass(frozen=True)
    class Config:
        loader: LoaderConfig = LoaderConfig()
        data: MixtureConfig = MixtureConfig(sources=())

    with pytest.raises(ConfigError, match="loader: accumulation is 0; expected at least 1"):
        load_config(Config, ["--loader.accumulation", "0"])
    with pytest.raises(ConfigError, match=r"data.sources\[1\]: weight is -1.0; expected a number above 0"):
        load_config(Config, ["--data.sources", '[{path = "a"}, {path = "b", weight = -1.0}]'])
    with pytest.raises(
        ConfigError, match=r"data.sources\[0\]: columns: unknown name 'qestion'; did you mean 'question'"
    ):
        load_config(Config, ["--data.sources", '[{path = "a", columns = {qestion = "q"}}]'])
    found = load_config(
        Config, ["--data.sources", '[{path = "a", columns = {question = "q"}, question = "Describe."}]']
    )
    assert found.data.sources[0].columns == {"question": "q"} and found.data.sources[0].question == "Describe."
