"""The steps of the training scripts and of the engine on a pretended GPU: where the host waits, what is launched."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from torch import Tensor

from fastvst.batch import pack
from fastvst.config import load_config
from fastvst.model import ModelConfig, Qwen25VL
from fastvst.rollout import Engine, SamplingParams
from fastvst.rollout.decode import DecodeState, Sizes, decode_step, forward_tables
from fastvst.rollout.kv_cache import PagePool
from fastvst.rollout.sampler import make_rows
from fastvst.train import guard
from fastvst.train.distributed import ParallelConfig, World, start
from fastvst.train.optimizer import OptimizerConfig, clip_gradients, make_optimizer
from fastvst_kernels.shared.tensors import send
from hf_parity import make_sample
from pretended_gpu import CUDA, LATE, NEWEST, Seen, pretended_gpu
from rl_groups import make_groups, small_processor
from rl_run import load_rl
from small_run import load_script, small_config

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
ROW = [("text", 90), ("image", 6, 8), ("text", 70), ("video", 2, 4, 6, 1.0), ("text", 30)]
READ = "tensor read by the host"
SIZE = "size read by the host"


def world_of_one_gpu() -> World:
    world = start(ParallelConfig(device="cpu"), environment={})
    return dataclasses.replace(world, device=CUDA, dtype=torch.bfloat16)


def model_of(config: ModelConfig, layers: int = 2) -> Qwen25VL:
    tower = dataclasses.replace(config.vision, depth=2, fullatt_block_indexes=(1,))
    with torch.device("meta"):
        model = Qwen25VL(dataclasses.replace(config, num_hidden_layers=layers, vision=tower)).to(torch.bfloat16)
    model.recompute = "light"
    return model


def said(seen: Seen) -> str:
    return "\n".join(map(str, seen.waits))


@pytest.mark.parametrize("state", ["fp32", "bf16", "8bit"])
def test_an_sft_step_waits_once(state) -> None:
    """Two micro-batches and the optimizer; the one read has the numbers of the guard and of the log."""
    config = ModelConfig.preset("3b") if state == "fp32" else small_config()
    packs = [pack([make_sample(config, ROW, seed=3 * i + j) for j in range(3)]) for i in range(2)]
    step = load_script().accumulate
    world = world_of_one_gpu()
    with pretended_gpu() as seen:
        packs = [p.pin_memory() for p in packs]  # as the loader's thread does
        model = model_of(config)
        optimizer = make_optimizer(model, OptimizerConfig(state=state))
        for _ in range(2):  # the first step makes tables of angles
            seen.clear()
            step(model, packs, world, 1.0, (False, False), ["small"])
            optimizer.step()
            optimizer.zero_grad()
    assert seen.places() == {("examples/sft.py", "accumulate", READ): 1}, said(seen)


def test_an_rl_update_waits_once_a_micro_batch_and_once_an_optimizer_step() -> None:
    rl = load_rl()
    options = ["model.path=none", "update.tokens_per_pack=96", "update.minibatches=2", "optimizer.freeze=[]"]
    config = load_config(rl.Config, options)
    groups = make_groups(small_processor(), 6)
    world = world_of_one_gpu()
    with pretended_gpu() as seen:
        model = model_of(small_config())
        optimizer = make_optimizer(model, OptimizerConfig())
        for _ in range(2):
            seen.clear()
            found, sharing, _ = rl.improve(config, model, None, optimizer, groups, guard.Recent(), 0, world)
    assert found["updates"] == 2 and sharing.packs > 2
    assert seen.places() == {
        # The rows whose gradient is 0 skip their products, so the host must know how many there are.
        ("kernels/fastvst_kernels/lm_head/policy_loss.py", "rows_with_loss", SIZE): sharing.packs,
        ("fastvst/rl/policy_update.py", "reduce_stats", READ): 2,
        ("fastvst/rl/policy_update.py", "_global_counts", READ): 1,  # of the whole RL step
    }, said(seen)


def test_a_decode_step_reads_its_tokens_and_their_logprobs() -> None:
    """In one copy, and when the next step is queued: the GPU waits for the host at the ends of completions only."""
    groups = make_groups(small_processor(), 2)
    options = [{}, {"top_p": 0.9}, {"repetition_penalty": 1.2, "temperature": 0.5}, {"logprobs": False}]
    options += [{"allowed": ((5, 6), (7, 8))}]
    for more in options:
        places: list[Counter[tuple[str, str, str]]] = []
        with pretended_gpu() as seen:
            engine = Engine(model_of(small_config()), memory=1 << 22, page_size=16, cuda_graphs=False)
            for tokens in (8, 8, 18):
                seen.clear()
                params = SamplingParams(n=4, max_tokens=tokens, ignore_eos=True, **more)
                engine.generate([g.prompt for g in groups], params)
                places.append(seen.places())
        late, newest = (("fastvst/rollout/sampler.py", "values", what) for what in (LATE, NEWEST))
        # The first tokens, and the last ones, behind which nothing is left to do.
        assert places[1:] == [{newest: 2, late: 6}, {newest: 2, late: 16}], said(seen)


def test_a_batch_that_changes_waits_for_nothing() -> None:
    """Completions end at different steps: the next batch takes the tokens that nobody has read from the last one."""
    groups = make_groups(small_processor(), 4)
    with pretended_gpu() as seen:
        engine = Engine(model_of(small_config()), memory=1 << 22, page_size=16, cuda_graphs=False)
        for tokens in (2, 30):
            seen.clear()
            each = [SamplingParams(n=2, max_tokens=tokens - i, ignore_eos=True) for i in range(2)]
            each += [SamplingParams(n=2, max_tokens=1 + 5 * i, ignore_eos=True) for i in range(2)]
            engine.generate([g.prompt for g in groups], each)
    late, newest = (("fastvst/rollout/sampler.py", "values", what) for what in (LATE, NEWEST))
    assert seen.places() == {newest: 2, late: 28}, said(seen)


def test_a_wait_is_named_with_file_and_line() -> None:
    with pretended_gpu() as seen:
        x = torch.ones(4, 3, device="cuda", requires_grad=True)
        assert x.is_cuda and x.device == CUDA and not x.is_meta
        for wait in (
            lambda: x.sum().item(),
            lambda: x[x[:, 0] > 0],
            lambda: x.nonzero(),
            lambda: bool((x > 0).any()),
            lambda: x.detach().cpu(),
            lambda: x.tolist(),
            lambda: torch.ones(3).to("cuda"),
            lambda: torch.ones(3).to("cuda", non_blocking=True),
            lambda: torch.tensor([1, 2], device="cuda"),
            lambda: x.detach().copy_(torch.ones(4, 3)),
            lambda: torch.repeat_interleave(x, torch.ones(4, device="cuda", dtype=torch.int64), dim=0),
            lambda: torch.cuda.synchronize(),
        ):
            seen.clear()
            wait()
            assert len(seen.waits) == 1, said(seen)
            assert seen.waits[0].file == "tests/examples/test_gpu_step.py"
            assert seen.waits[0].line == wait.__code__.co_firstlineno and "lambda: " in seen.waits[0].text
        seen.clear()
        send(torch.ones(3), "cuda")
        send(torch.ones(3), CUDA).masked_fill_(x[0] > 0, 2.0)
        (x * 2).sum().backward()
        assert x.grad is not None and x.grad.is_cuda and not seen.waits, said(seen)


def test_a_wait_in_a_backward_pass_is_seen() -> None:
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            assert grad.is_cuda
            return grad * float(grad.sum())

    with pretended_gpu() as seen:
        Reads.apply(torch.ones(3, device="cuda", requires_grad=True)).sum().backward()
    assert [(w.function, w.what) for w in seen.waits] == [("backward", "value read by the host")]


# ------------------------------------------------------------------------------------------------------ launch budgets


def decode_launches(preset: str, layers: int, *, whole: bool) -> Counter[str]:
    """Launches of a step of 32 rows with 4 prompts, as a CUDA graph captures it: of the model, or of all of it."""
    config = dataclasses.replace(ModelConfig.preset(preset), num_hidden_layers=layers)
    with pretended_gpu() as seen, torch.no_grad():
        model = model_of(config, layers)
        pool = PagePool(config, pages=400, page_size=16, dtype=torch.bfloat16, device=CUDA)
        rows = make_rows(
            [SamplingParams(temperature=0.8)] * 32, list(range(32)), config.vocab_size, torch.device("cpu")
        )
        sizes = Sizes(rows=32, own=4, groups=4, prompt=128, most=8)
        state = DecodeState(sizes, config.vocab_size, CUDA, rows)
        forbidden = torch.empty(2, dtype=torch.int64, device="cuda")
        for _ in range(2):
            seen.clear()
            if whole:
                decode_step(model, pool, state, forbidden)
            else:
                forward_tables(model, pool, state.tables)
    assert not seen.waits, said(seen)
    return seen.launches


@pytest.mark.parametrize("preset", ["3b", "7b"])
def test_launches_of_a_decode_step(preset) -> None:
    """A layer: 2 norms, 4 products, bias with rope and page write, 2 of the attention, SwiGLU."""
    one, two = (decode_launches(preset, layers, whole=True) for layers in (1, 2))
    layer = two - one
    assert layer.total() <= 10, layer
    assert layer["paged_rope_kernel"] == 1 and layer["decode_partial_kernel"] == 1 and not layer["clone"]
    # Embeddings, the last norm, drawing in two launches, what is read in three, tokens, and all counts at once.
    assert (one - layer).total() <= 9, one - layer
    assert decode_launches(preset, 1, whole=False).total() <= 12


def update_launches(layers: int) -> tuple[Counter[str], int]:
    """Launches of an RL update of a text pack without the optimizer's step, and its packs."""
    rl = load_rl()
    options = [
        "model.path=none",
        "update.tokens_per_pack=4096",
        "update.minibatches=1",
        "optimizer.freeze=['vision', 'merger']",
    ]
    config = load_config(rl.Config, options)
    groups = make_groups(small_processor(), 4)[1::3]  # without images
    with pretended_gpu() as seen:
        model = model_of(small_config(), layers)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, foreach=True)
        for _ in range(2):
            seen.clear()
            _, sharing, _ = rl.improve(config, model, None, optimizer, groups, guard.Recent(), 0, world_of_one_gpu())
    return seen.launches, sharing.packs


def test_launches_of_an_rl_update() -> None:
    """A decoder layer costs what it costs in SFT: shared prompts add no launch. The rest is the loss."""
    (one, packs), (two, _) = (update_launches(layers) for layers in (1, 2))
    layer = two - one
    assert packs == 1 and layer.total() <= 32, layer
    assert (one - layer).total() <= 256, one - layer


def optimizer_launches(state: str, layers: int) -> tuple[int, int]:
    """Launches of clipping and of the optimizer's second step, and the number of parameters."""
    with pretended_gpu() as seen:
        model = model_of(small_config(), layers)
        optimizer = make_optimizer(model, OptimizerConfig(state=state))
        for _ in range(2):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            seen.clear()
            clip_gradients(model.parameters(), 1.0)
            optimizer.step()
    assert not seen.waits, said(seen)
    return seen.launches.total(), len(list(model.parameters()))


@pytest.mark.parametrize("state, most", [("fp32", 0), ("bf16", 67), ("8bit", 55)])
def test_launches_of_clipping_and_of_the_optimizer(state: str, most: int) -> None:
    """AdamW is fused. The low-memory states launch for each parameter, and for each 4 M values of it."""
    (few, parameters), (many, more) = (optimizer_launches(state, layers) for layers in (1, 3))
    assert (many - few) / (more - parameters) <= most
    assert few - parameters * most <= 30
