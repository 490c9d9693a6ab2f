"""Special tokens as text: refused by default, allowed by an option of the source."""

from dataclasses import dataclass

import pytest

from fastvst.batch import IGNORE
from fastvst.config import from_dict
from fastvst.data import Processor, Sample
from fastvst.data.ledger import SampleError
from fastvst.data.mixture import MixtureConfig, SourceConfig, limit_pixels


@dataclass(frozen=True)
class Options:
    data: MixtureConfig = MixtureConfig(sources=())


BOX = "<|box_start|>(1,2),(3,4)<|box_end|>"


def row(answer: str) -> Sample:
    return Sample.from_messages([{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}])


def test_refused_by_default_and_the_option_is_named() -> None:
    with pytest.raises(SampleError, match=r'special_tokens = \["<\|box_start\|>"\]'):
        Processor.preset("tiny").encode(row(BOX))


def test_an_option_of_the_source_makes_them_trainable_text() -> None:
    table = {"sources": [{"path": "x", "special_tokens": ["<|box_start|>", "<|box_end|>", "<|im_end|>"]}]}
    source = from_dict(Options, {"data": table}).data.sources[0]
    assert isinstance(source, SourceConfig)
    processor = Processor.preset("tiny")
    encoded = processor.encode(limit_pixels(row(BOX), source))
    assert processor.token_id("<|box_start|>") in encoded.labels[encoded.labels != IGNORE].tolist()
    with pytest.raises(SampleError, match="im_end"):  # structure is never text
        processor.encode(limit_pixels(row("a<|im_end|>"), source))
