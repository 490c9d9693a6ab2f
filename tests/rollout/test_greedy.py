"""Greedy decoding against `transformers.generate`, token for token."""

import pytest
import torch

from fastvst.rollout import greedy
from hf_parity import hf_inputs, make_models, make_sample, small_config

PROMPTS = [
    [("text", 7)],
    [("text", 3), ("image", 3, 5), ("text", 11)],
    [("image", 1, 1), ("text", 2), ("image", 6, 2), ("text", 1)],
    [("text", 30)],
]


def generate(theirs, config, sample, count, stops):
    """transformers' tokens before the stop token, and the smallest margin between its best two logits."""
    inputs = hf_inputs(config, sample, theirs)
    del inputs["position_ids"]  # generate() makes its own from the token types
    out = theirs.generate(
        **inputs, max_new_tokens=count, do_sample=False, eos_token_id=stops, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    tokens = out.sequences[0, len(sample) :].tolist()
    best = torch.stack(out.logits)[:, 0].topk(2, dim=-1).values
    margin = (best[:, 0] - best[:, 1]).min().item()
    return next((tokens[:i] for i, t in enumerate(tokens) if t in stops), tokens), margin


@pytest.mark.parametrize("tied", [False, True])
def test_equals_transformers_token_for_token(tied):
    config = small_config(tie_word_embeddings=tied)
    ours, theirs = make_models(config, torch.float64, seed=3)
    samples = [make_sample(config, parts, seed=i) for i, parts in enumerate(PROMPTS)]
    free = greedy(ours, samples, max_new_tokens=12, stop_token_ids=())
    assert [len(f) for f in free] == [12] * 4
    stops = [free[0][4], free[2][1]]  # a token that comes up, so that sequences end at different times
    got = greedy(ours, samples, max_new_tokens=12, stop_token_ids=stops)
    for sample, mine in zip(samples, got, strict=True):
        expected, margin = generate(theirs, config, sample, 12, stops)
        assert margin > 1e-9  # the comparison means something
        assert mine == expected
    assert len({len(g) for g in got}) > 1


def test_batch_equals_one_by_one_and_full_recomputation():
    config = small_config()
    ours, _ = make_models(config, torch.float64, seed=4)
    samples = [make_sample(config, parts, seed=i) for i, parts in enumerate(PROMPTS)]
    together = greedy(ours, samples, max_new_tokens=5, stop_token_ids=())
    assert together == [greedy(ours, [s], max_new_tokens=5, stop_token_ids=())[0] for s in samples]


def test_forbidden_tokens_are_never_chosen():
    config = small_config()
    ours, _ = make_models(config, torch.float32, seed=5)
    samples = [make_sample(config, PROMPTS[0])]
    first = greedy(ours, samples, max_new_tokens=4, stop_token_ids=())[0]
    again = greedy(ours, samples, max_new_tokens=4, stop_token_ids=(), forbidden_token_ids=set(first))[0]
    assert not set(first) & set(again)


def test_bad_arguments_are_named():
    config = small_config()
    ours, _ = make_models(config, torch.float32)
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        greedy(ours, [make_sample(config, PROMPTS[0])], max_new_tokens=0, stop_token_ids=())
    with pytest.raises(ValueError, match="memory/9.*no tokens"):
        greedy(ours, [make_sample(config, [("text", 0)], seed=9)], max_new_tokens=1, stop_token_ids=())
    assert greedy(ours, [], max_new_tokens=1, stop_token_ids=()) == []
