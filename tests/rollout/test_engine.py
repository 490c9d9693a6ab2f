"""The engine against `transformers.generate`, token by token, and against itself: alone, batched, short of pages."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastvst.data.ledger import SampleError
from fastvst.data.sample import Sample
from fastvst.rollout import Engine, RolloutError, SamplingParams
from hf_parity import hf_inputs, make_models, make_sample, small_config

PROMPTS = [
    [("text", 7)],
    [("text", 3), ("image", 3, 5), ("text", 11)],
    [("image", 1, 1), ("text", 2), ("image", 6, 2), ("text", 1)],
    [("text", 2), ("video", 2, 2, 3, 1.0), ("text", 4)],
    [("text", 30)],
]
COUNT = 14


@pytest.fixture(scope="module")
def config():
    return small_config()


@pytest.fixture(scope="module")
def models(config):
    return make_models(config, torch.float64, seed=3)


@pytest.fixture(scope="module")
def samples(config):
    return [make_sample(config, parts, seed=i) for i, parts in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def expected(config, models, samples):
    """Greedy tokens of transformers for every prompt alone, without an EOS token."""
    found = []
    for sample, parts in zip(samples, PROMPTS, strict=True):
        inputs = hf_inputs(config, sample, models[1])
        del inputs["position_ids"]  # generate() computes them
        seconds = [p[4] for p in parts if p[0] == "video"]
        if seconds:
            inputs["second_per_grid_ts"] = torch.tensor(seconds)
        out = models[1].generate(
            **inputs,
            max_new_tokens=COUNT,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
            suppress_tokens=[90, 91],
        )
        logits = torch.stack(out.logits)[:, 0]
        logits[:, 90:92] = -torch.inf  # placeholders are never sampled
        best = logits.topk(2, dim=-1).values
        assert (best[:, 0] - best[:, 1]).min() > 1e-9, "the two best tokens are clearly apart"
        found.append(out.sequences[0, len(sample) :].tolist())
    return found


def engine(model, **options) -> Engine:
    return Engine(model, **{"page_size": 4, "memory": 1 << 20, **options})


def pages(model, count: int, page_size: int = 4) -> int:
    """Bytes of `count` pages."""
    c = model.config
    return (count + 1) * 2 * c.num_hidden_layers * page_size * c.num_key_value_heads * c.head_dim * 8


GREEDY = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True)


@pytest.mark.parametrize(
    "options",
    [{}, {"page_size": 64}, {"max_sequences": 2}, {"prefill_tokens": 5}, {"prefill_tokens": 1}],
    ids=str,
)
def test_greedy_equals_transformers(models, samples, expected, options):
    made = engine(models[0], **options)
    found = made.generate(samples, GREEDY)
    assert [r[0].tokens for r in found] == expected
    assert made.scheduler.pool.used == 0 and made.idle
    assert made.stats.vision_runs == 3


def test_greedy_equals_transformers_under_preemption(models, samples, expected):
    made = engine(models[0], memory=pages(models[0], 25))
    found = made.generate(samples, SamplingParams(**{**GREEDY.__dict__, "n": 3}))
    assert [[r.tokens for r in many] for many in found] == [[tokens] * 3 for tokens in expected]
    assert made.stats.preemptions > 3 and made.scheduler.pool.used == 0
    assert max(r.preemptions for many in found for r in many) > 0
    assert made.stats.vision_runs == 3, "pages that leave the device are saved, not computed again"


def test_eos_tokens_end_a_completion_and_are_kept(models, samples, expected):
    model = models[0]
    stops = {expected[0][3], expected[2][0], expected[4][9]}
    made = engine(model)
    made.stop_tokens = stops
    for rollouts, whole in zip(
        made.generate(samples, SamplingParams(temperature=0, max_tokens=COUNT)), expected, strict=True
    ):
        end = next((i for i, t in enumerate(whole) if t in stops), None)
        assert rollouts[0].tokens == (whole if end is None else whole[: end + 1])
        assert rollouts[0].finish_reason == ("length" if end is None else "stop")


def test_a_seed_fixes_a_completion_whatever_else_is_in_the_batch(models, samples):
    params = SamplingParams(n=3, max_tokens=9, seed=5, ignore_eos=True)
    together = engine(models[0]).generate(samples, params)
    alone = [engine(models[0]).generate([s], params)[0] for s in samples]
    squeezed = engine(models[0], max_sequences=2, prefill_tokens=6).generate(samples[::-1], params)[::-1]
    first = [[r.tokens for r in many] for many in together]
    assert first == [[r.tokens for r in many] for many in alone]
    assert first == [[r.tokens for r in many] for many in squeezed]
    assert len({tuple(t) for many in first for t in many}) == 15, "completions differ from each other"
    other = engine(models[0]).generate(samples, SamplingParams(n=3, max_tokens=9, seed=6, ignore_eos=True))
    assert all(a.tokens != b.tokens for m, n in zip(together, other, strict=True) for a, b in zip(m, n, strict=True))


def test_equivalent_parameters_give_the_same_tokens(models, samples):
    made = engine(models[0])
    tokens = [
        made.generate(samples[:1], SamplingParams(max_tokens=9, ignore_eos=True, **extra))[0][0].tokens
        for extra in ({}, {"top_k": -1, "stop": None}, {"top_k": 10**9}, {"seed": None}, {"seed": None})
    ]
    assert tokens[0] == tokens[1] == tokens[2] and tokens[3] != tokens[4], "seed=None takes a new seed each time"


def test_logprobs_are_those_of_the_full_forward(models, samples, config):
    """Teacher forcing by transformers: one forward over prompt and completion."""
    temperature = 0.7
    for sample in (samples[0], samples[1]):
        params = SamplingParams(max_tokens=6, temperature=temperature, ignore_eos=True)
        (rollout,) = engine(models[0]).generate([sample], params)[0]
        inputs = hf_inputs(config, sample, models[1])
        del inputs["position_ids"]
        ids = torch.cat([inputs["input_ids"], torch.tensor([rollout.tokens])], dim=1)
        kinds = torch.cat([inputs["mm_token_type_ids"], torch.zeros(1, 6, dtype=torch.int32)], dim=1)
        grids = {k: v for k, v in inputs.items() if k.endswith("grid_thw") or k.startswith("pixel")}
        models[1].model.rope_deltas = None
        logits = models[1](
            input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds, use_cache=False, **grids
        ).logits[0, len(sample) - 1 : -1]
        for scale, found in ((1.0, rollout.raw_logprobs), (temperature, rollout.logprobs)):
            wanted = torch.log_softmax(logits / scale, -1).gather(1, torch.tensor(rollout.tokens)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), wanted.double(), rtol=1e-6, atol=1e-8)


def test_placeholders_are_never_sampled(models, config):
    """Not even if the model gives them nearly all probability."""
    model = models[0]
    sample = make_sample(config, PROMPTS[0])
    saved = model.head_weight.clone()
    hidden: list = []
    handle = model.model.norm.register_forward_hook(lambda m, i, out: hidden.append(out.detach()))
    try:
        engine(model).generate([sample], SamplingParams(max_tokens=1))
        with torch.no_grad():
            direction = hidden[0][-1] / hidden[0][-1].norm() ** 2
            model.lm_head.weight[config.image_token_id] = 30 * direction
            model.lm_head.weight[config.video_token_id] = 900 * direction
        for params in (
            SamplingParams(n=40, max_tokens=1),
            SamplingParams(n=40, max_tokens=1, temperature=2.0, top_k=3),
            SamplingParams(n=1, max_tokens=1, temperature=0),
            SamplingParams(n=40, max_tokens=1, top_p=0.5),
        ):
            (found,) = engine(model).generate([sample], params)
            assert not {t for r in found for t in r.tokens} & {config.image_token_id, config.video_token_id}
            assert all(-1000 < r.raw_logprobs[0] < -100 for r in found), "and the model's own probability is reported"
    finally:
        handle.remove()
        with torch.no_grad():
            model.lm_head.weight.copy_(saved)


@pytest.mark.parametrize("numerics", ["fast", "bitwise"])
def test_allowed_tokens_hold_by_position_in_a_mixed_batch_under_preemption(models, samples, expected, numerics):
    """Positions count from the first token of a completion, over the prefill and after a swap to the host and back."""
    sets = ((11, 12), (13,), (14, 15, 16), (17, 18))
    params = [
        SamplingParams(temperature=1.0, n=3, max_tokens=COUNT, ignore_eos=True, seed=i, allowed=sets if i % 2 else ())
        for i in range(len(samples))
    ]
    made = engine(models[0], memory=pages(models[0], 18), numerics=numerics)
    for i, rollouts in enumerate(made.generate(samples, params)):
        for rollout in rollouts:
            inside = [one in sets[min(at, 3)] for at, one in enumerate(rollout.tokens)]
            assert len(inside) == COUNT and (all(inside) or not i % 2)
    assert made.stats.preemptions > 0


def test_allowed_tokens_that_cannot_be_sampled_are_named(models, samples, config):
    for wrong in (config.image_token_id, config.vocab_size, -1):
        with pytest.raises(ValueError, match=rf"allowed\[1\] has the token {wrong}"):
            Engine(models[0]).generate(samples[:1], SamplingParams(allowed=((3,), (4, wrong))))
    with pytest.raises(ValueError, match="empty set"):
        SamplingParams(allowed=((3,), ()))


def test_prompts_that_cannot_fit_are_refused_before_anything_is_computed(models, samples):
    made = engine(models[0], memory=pages(models[0], 10))
    with pytest.raises(
        RolloutError, match="memory/1: a prompt of 31 tokens and a completion of up to 14 need 12 pages of 4"
    ):
        made.generate(samples, GREEDY)
    assert made.stats.prefill_tokens == 0 and made.idle
    assert len(made.generate(samples[:1], GREEDY)[0][0].tokens) == COUNT
    with pytest.raises(RolloutError, match="one page of 4 tokens is"):
        engine(models[0], memory=100).generate(samples, GREEDY)


def test_an_exception_inside_a_step_leaves_the_engine_usable(models, samples, expected):
    made = engine(models[0], max_sequences=3)
    calls = []

    def fail(module, inputs):
        calls.append(1)
        if len(calls) == 9:
            raise MemoryError("inside a step")

    handle = models[0].model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        made.generate(samples, GREEDY)
    handle.remove()
    assert made.scheduler.pool.used == 0 and made.idle
    assert [r[0].tokens for r in made.generate(samples, GREEDY)] == expected


ODD_PARAMS = {
    "greedy": {"temperature": 0},
    "plain": {"temperature": 1},
    "scaled": {"temperature": 0.7},
    "filtered": {"temperature": 0.7, "top_p": 0.5, "top_k": 5, "min_p": 0.1},
    "penalty": {"temperature": 0, "repetition_penalty": 1.1},
    "bitwise": {"temperature": 1},
}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("logprobs", [True, False])
@pytest.mark.parametrize("name", ODD_PARAMS)
def test_nonfinite_logits_are_named_and_leave_nothing_behind(models, samples, expected, name, logprobs, value):
    made = engine(models[0], numerics="bitwise" if name == "bitwise" else "fast")
    params = SamplingParams(max_tokens=3, logprobs=logprobs, **ODD_PARAMS[name])
    weight = models[0].model.layers[0].self_attn.v_proj.weight
    saved = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = value
    try:
        with pytest.raises(RolloutError, match="memory/0: the logits after 0 completion tokens are not finite"):
            made.generate(samples, params)
    finally:
        with torch.no_grad():
            weight.copy_(saved)
    if name == "greedy":
        assert [r[0].tokens for r in made.generate(samples, GREEDY)] == expected, "no NaN stays in the pages"


def test_a_token_whose_logits_overflow_is_named_in_the_middle_of_a_completion(models, samples):
    made = engine(models[0])
    calls = []

    def overflow(module, inputs, output):
        calls.append(1)
        return output * torch.nan if len(calls) == 4 else output

    handle = models[0].model.layers[-1].register_forward_hook(overflow)
    try:
        with pytest.raises(RolloutError, match="memory/0: the logits after 3 completion tokens are not finite"):
            made.generate(samples[:1], dataclasses.replace(GREEDY, logprobs=False, ignore_eos=True))
    finally:
        handle.remove()


def test_requests_can_be_mixed_and_cancelled(models, samples, expected):
    made = engine(models[0], max_sequences=4)
    first = made.add(samples[0], SamplingParams(n=2, temperature=0, max_tokens=COUNT, ignore_eos=True))
    for _ in range(5):
        made.step()
    second = made.add(samples[4], GREEDY)
    third = made.add(samples[1], GREEDY)
    for _ in range(3):
        made.step()
    made.cancel(first)
    made.cancel(third)
    while not second.done:
        made.step()
    assert second.rollouts[0].tokens == expected[4]
    assert all(r.finish_reason == "cancelled" and r.tokens == expected[0][: len(r.tokens)] for r in first.rollouts)
    assert 0 < len(first.rollouts[0].tokens) < COUNT
    assert made.scheduler.pool.used == 0 and made.idle


def test_bad_arguments_are_named(models, samples):
    with pytest.raises(ValueError, match=r"unknown engine options \['pages'\]"):
        Engine(models[0], pages=3)
    with pytest.raises(ValueError, match="page_size is 0"):
        Engine(models[0], page_size=0)
    with pytest.raises(ValueError, match="temperature is -1; expected 0 or more; max_tokens is 0"):
        SamplingParams(temperature=-1, max_tokens=0)
    made = engine(models[0])
    with pytest.raises(ValueError, match="2 SamplingParams for 5 prompts"):
        made.generate(samples, [GREEDY, GREEDY])
    with pytest.raises(ValueError, match="without processor"):
        made.generate([Sample.from_messages([{"role": "user", "content": "hello"}])])
    with pytest.raises(ValueError, match="memory/9 has no tokens"):
        made.generate([make_sample(models[0].config, [("text", 0)], seed=9)])
    assert made.generate([]) == []
    assert issubclass(SampleError, ValueError)
