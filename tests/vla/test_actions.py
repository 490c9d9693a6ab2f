"""Actions as text: OpenVLA's arithmetic, bins, malformed text, tokens, and completions that are always well-formed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvst.data.tokenizer import tiny_tokenizer
from fastvst.vla import ActionCodec, ActionError, ActionStatistics
from fastvst.vla.actions import add_action_tokens

STATISTICS = ActionStatistics((-0.4, -0.9, 0.0), (0.5, -0.2, 1.0), (True, True, False))
CODECS = [
    ActionCodec(kind, bins, 3, chunk, statistics)
    for kind, bins in (("tokens", 256), ("tokens", 5), ("text", 1000), ("text", 999), ("text", 9))
    for chunk in (1, 4, 16)
    for statistics in (None, STATISTICS)
]


def openvla_tokens(actions: np.ndarray, vocabulary: int) -> np.ndarray:
    """Token ids by the formula of prismatic/vla/action_tokenizer.py (github.com/openvla/openvla)."""
    return vocabulary - np.digitize(np.clip(actions, -1.0, 1.0), np.linspace(-1, 1, 256))


def openvla_actions(ids: np.ndarray, vocabulary: int) -> np.ndarray:
    edges = np.linspace(-1, 1, 256)
    centres = (edges[:-1] + edges[1:]) / 2.0
    return centres[np.clip(vocabulary - ids - 1, a_min=0, a_max=centres.shape[0] - 1)]


def test_tokens_are_those_of_openvla_at_the_end_of_the_vocabulary() -> None:
    codec = ActionCodec("tokens", dims=1)
    vocabulary = 1000 + 256  # the action tokens have the last 256 ids
    edges = np.linspace(-1, 1, 256)
    near = np.concatenate([edges, np.nextafter(edges, -9), np.nextafter(edges, 9), np.linspace(-1.5, 1.5, 997)])
    for value in near:
        (token,) = openvla_tokens(np.array([value]), vocabulary)
        text = codec.encode(np.array([value]))
        assert text == f"<|action_{token - 1000}|>"
        assert codec.decode(text) == openvla_actions(np.array([token]), vocabulary)


@pytest.mark.parametrize("codec", CODECS, ids=str)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_decoding_is_within_half_a_bin(codec: ActionCodec, seed: int) -> None:
    scaled = np.random.default_rng(seed).uniform(-1, 1, (codec.chunk, 3))
    scaled[0] = np.random.default_rng(seed).choice([-1.0, 0.0, 1.0], 3)
    actions = scaled if codec.statistics is None else codec.statistics.denormalise(scaled)
    found = codec.decode(codec.encode(actions))
    back = found if codec.statistics is None else codec.statistics.normalise(found)
    assert found.shape == actions.shape and np.abs(back - scaled).max() <= codec.half_bin + 1e-9
    assert np.array_equal(codec.decode(codec.encode(found)), found)  # a decoded action is written as itself


def test_values_beyond_the_range_are_clipped_to_it() -> None:
    codec = ActionCodec("text", 1000, 3, statistics=STATISTICS)
    assert codec.encode(np.array([9.0, -9.0, 0.5])) == "1000 0000 0750"


@pytest.mark.parametrize(
    "codec, text, code",
    [
        (ActionCodec("tokens", dims=2), "", "wrong_count"),
        (ActionCodec("tokens", dims=2), "<|action_1|>", "wrong_count"),
        (ActionCodec("tokens", dims=2), "<|action_1|><|action_2|><|action_3|>", "wrong_count"),
        (ActionCodec("tokens", dims=2), "<|action_1|><|action_256|>", "out_of_range"),
        (ActionCodec("tokens", dims=2), "<|action_1|> and <|action_2|>", "not_action_text"),
        (ActionCodec("tokens", dims=2), "12 14", "not_action_text"),
        (ActionCodec("text", 999, 2), "12", "wrong_count"),
        (ActionCodec("text", 999, 2), "12 1000", "out_of_range"),
        (ActionCodec("text", 999, 2), "12 " + "9" * 5000, "out_of_range"),
        (ActionCodec("text", 999, 2), "12 -4", "not_action_text"),
        (ActionCodec("text", 999, 2), "1.5 4", "not_action_text"),
        (ActionCodec("text", 999, 2), "nan nan", "not_action_text"),
    ],
    ids=str,
)
def test_malformed_text_is_named_and_never_an_action(codec: ActionCodec, text: str, code: str) -> None:
    with pytest.raises(ActionError) as caught:
        codec.decode(text)
    assert caught.value.code == code


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_action_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ActionError, match="not_finite"):
        ActionCodec(dims=2).encode(np.array([0.0, bad]))


def test_a_wrong_shape_is_refused() -> None:
    with pytest.raises(ActionError, match=r"\(2, 3\); expected \(1, 7\)"):
        ActionCodec().encode(np.zeros((2, 3)))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"kind": "fast"}, "kind is 'fast'"),
        ({"bins": 1}, "bins is 1"),
        ({"chunk": 17}, "chunk 17"),
        ({"dims": 0}, "dims is 0"),
        ({"dims": 7, "statistics": STATISTICS}, "the statistics have 3"),
    ],
)
def test_options_that_make_no_codec_are_refused(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ActionCodec(**options)


@pytest.mark.parametrize("codec", [ActionCodec("tokens", 16, 2, 2), ActionCodec("text", 999, 2, 2)], ids=str)
def test_whatever_is_allowed_at_each_position_is_an_action(codec: ActionCodec) -> None:
    tokenizer = tiny_tokenizer()
    add_action_tokens(tokenizer, codec, rows=5000)
    allowed = codec.allowed(tokenizer)
    assert allowed[-1] == (tokenizer.token_to_id("<|im_end|>"),)
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids = [int(rng.choice(choices)) for choices in allowed]
        assert codec.decode_tokens(ids, tokenizer).shape == (2, 2)
    for actions in itertools.islice(np.random.default_rng(1).uniform(-1, 1, (50, 2, 2)), 50):
        ids = [*tokenizer.encode(codec.encode(actions)).ids, tokenizer.token_to_id("<|im_end|>")]
        assert len(ids) == len(allowed) and all(one in choices for one, choices in zip(ids, allowed, strict=True))


def test_tokens_are_added_once_and_only_where_the_embedding_has_rows() -> None:
    codec = ActionCodec("tokens")
    tokenizer = tiny_tokenizer()
    size = tokenizer.get_vocab_size()
    with pytest.raises(ValueError, match=r"256 action tokens do not fit.*0 are free"):
        add_action_tokens(tokenizer, codec, rows=size)
    with pytest.raises(ValueError, match="add_action_tokens"):
        codec.allowed(tokenizer)
    assert add_action_tokens(tokenizer, codec, rows=size + 256) == 256
    assert add_action_tokens(tokenizer, codec, rows=size + 256) == 0
    assert [tokenizer.token_to_id(name) for name in codec.token_names] == list(range(size, size + 256))
    assert tokenizer.encode("<|action_255|><|action_0|>").ids == [size + 255, size]
    assert add_action_tokens(tokenizer, ActionCodec("text", 999), rows=0) == 0
