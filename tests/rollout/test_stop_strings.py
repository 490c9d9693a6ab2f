"""Text of completions: stop strings across token borders, incomplete characters, streaming, endless repetition."""

from __future__ import annotations

import pytest
import torch

from fastvst.data.processor import Processor
from fastvst.data.sample import Sample
from fastvst.model import ModelConfig, Qwen25VL
from fastvst.rollout import Engine, SamplingParams
from fastvst.rollout.stop_strings import cut_at_stop, visible_tokens

VOCABULARY = 4096
BITS = 12
CODES = (torch.arange(VOCABULARY)[:, None] >> torch.arange(BITS) & 1) * 2.0 - 1  # every token is closest to itself


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.preset("tiny")


class Script(Qwen25VL):
    """A model whose i-th completion token is `script[i]`, whatever the prompt."""

    script: list[int]
    first: int

    @property
    def head_weight(self) -> torch.Tensor:
        return CODES


@pytest.fixture
def say(processor):
    """say(script, **params) -> (engine, prompt, params) of a model that samples the script."""
    config = ModelConfig.preset("tiny")
    prompt = processor.encode(
        Sample.from_messages([{"role": "user", "content": "hello"}, {"role": "assistant", "content": "x"}]),
        add_generation_prompt=True,
    )
    first = int(prompt.positions.max())

    def make(script: list[int], **options):
        model = Qwen25VL(config)

        class Decoder(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.embed_tokens = model.model.embed_tokens

            def forward(self, x, positions, attend):
                hidden = torch.zeros(x.shape[0], BITS)
                for row, position in enumerate(positions[0].tolist()):
                    place = position - first
                    hidden[row] = 10 * CODES[script[place] if 0 <= place < len(script) else script[-1]]
                return hidden

        model.model = Decoder()
        model.config = config
        made = Script.__new__(Script)
        made.__dict__ = model.__dict__
        return Engine(made, processor, memory=1 << 22), prompt, SamplingParams(temperature=0, **options)

    return make


def test_a_stop_string_across_token_borders(say, processor):
    text = "the answer is </answer> and more"
    ids = processor.tokenizer.encode(text, add_special_tokens=False).ids
    engine, prompt, params = say(ids, max_tokens=len(ids), stop=["</answer>"])
    ((rollout,),) = engine.generate([prompt], params)
    assert rollout.text == "the answer is " and rollout.finish_reason == "stop"
    assert rollout.tokens == ids[: len(rollout.tokens)] and "</answer>" in processor.decode(rollout.tokens)
    assert "</answer>" not in processor.decode(rollout.tokens[:-1]), "it ended with that token"
    assert engine.scheduler.pool.used == 0


def test_streaming_shows_whole_characters_and_no_part_of_a_stop_string(say, processor):
    text = "caf\u00e9 \U0001f600 \u4f60\u597d STOP never"
    ids = processor.tokenizer.encode(text, add_special_tokens=False).ids
    engine, prompt, params = say(ids, max_tokens=len(ids), stop="STOP")
    pieces = list(engine.stream(prompt, params))
    assert "".join(pieces) == "caf\u00e9 \U0001f600 \u4f60\u597d " and len(pieces) > 3
    assert all("\ufffd" not in p and "S" not in p for p in pieces)
    assert engine.idle and engine.scheduler.pool.used == 0


def test_invalid_utf8_empty_and_endless_completions(say, processor):
    emoji = processor.tokenizer.encode("\U0001f600", add_special_tokens=False).ids
    end = processor.token_id("<|im_end|>")
    if len(emoji) > 1:  # several tokens: the first alone is no complete character
        engine, prompt, params = say([emoji[0], end], max_tokens=9)
        ((broken,),) = engine.generate([prompt], params)
        assert broken.tokens == [emoji[0], end] and broken.text == "\ufffd"
    engine, prompt, params = say([end], max_tokens=9)
    ((empty,),) = engine.generate([prompt], params)
    assert (empty.tokens, empty.text, empty.finish_reason) == ([end], "", "stop")
    word = processor.tokenizer.encode("a", add_special_tokens=False).ids[0]
    engine, prompt, params = say([word], max_tokens=300)
    ((endless,),) = engine.generate([prompt], params)
    assert endless.tokens == [word] * 300 and endless.finish_reason == "length" and endless.text == "a" * 300


def test_closing_a_stream_early_frees_everything(say, processor):
    ids = processor.tokenizer.encode("one two three four five six", add_special_tokens=False).ids
    engine, prompt, params = say(ids, max_tokens=len(ids))
    stream = engine.stream(prompt, params)
    next(stream)
    stream.close()
    assert engine.idle and engine.scheduler.pool.used == 0


def test_text_is_cut_at_stop_strings_and_eos():
    assert cut_at_stop("abc", ("c", "b")) == "a" and cut_at_stop("abc", ()) == "abc"
    assert visible_tokens([1, 2, 9], {9}) == [1, 2] and visible_tokens([1, 9, 2], {9}) == [1, 9, 2]
