"""The loss modules against torch's own, and as parts of a module: copied, pickled, compiled, sharded."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvst_kernels import LinearCrossEntropyLoss, LinearLogProbs, LinearPolicyLoss, linear_cross_entropy
from fastvst_kernels.objectives import DAPO
from ranks import run_ranks


def case() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    target = torch.randint(0, 29, (3, 5))
    target[0, 2] = target[1, 0] = 7
    return torch.randn(3, 5, 12, requires_grad=True), torch.randn(29, 12, requires_grad=True), target


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore", [-100, 7])
def test_equals_torch(ignore: int, reduction: str, smoothing: float) -> None:
    input, weight, target = case()
    bias = torch.randn(29)
    options = {"ignore_index": ignore, "reduction": reduction, "label_smoothing": smoothing}
    if reduction == "none" and smoothing:
        with pytest.raises(ValueError, match="reduction='none' has no label_smoothing"):
            LinearCrossEntropyLoss(**options)
        return
    ours = LinearCrossEntropyLoss(**options)(input, weight, target, bias)
    logits = F.linear(input, weight, bias).flatten(0, 1)
    theirs = nn.CrossEntropyLoss(**options)(logits, target.flatten()).view(ours.shape)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(x.sum(), (input, weight)) for x in (ours, theirs)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_logprobs_and_policy_loss_take_batches() -> None:
    input, weight, target = case()
    logprobs, entropy = LinearLogProbs(ignore_index=7, temperature=0.7)(input, weight, target)
    wanted = torch.log_softmax(input @ weight.t() / 0.7, -1)
    picked = wanted.gather(-1, target[..., None]).squeeze(-1)
    torch.testing.assert_close(logprobs, torch.where(target == 7, 0.0, picked), rtol=1e-5, atol=1e-5)
    assert entropy.shape == target.shape
    loss, stats = LinearPolicyLoss(DAPO())(input, weight, target, torch.randn(3, 5), old_logprobs=picked.detach())
    assert loss.dim() == 0 and stats["rows_total"] == 15


def test_shapes_and_reductions_are_checked() -> None:
    input, weight, target = case()
    with pytest.raises(ValueError, match=r"expected \(..., H\) and \(...\)"):
        LinearCrossEntropyLoss()(input, weight, target[:2])
    with pytest.raises(ValueError, match="reduction is 'batchmean'"):
        LinearCrossEntropyLoss(reduction="batchmean")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(12, 12)
        self.head = nn.Linear(12, 29)
        self.loss = LinearCrossEntropyLoss(label_smoothing=0.1, softcap=5.0)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.body(x), self.head.weight, target, self.head.bias)  # type: ignore[no-any-return]


def test_copied_pickled_and_compiled() -> None:
    input, _, target = case()
    model = Model()
    expected = model(input, target)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), compiled):
        torch.testing.assert_close(other(input, target), expected)
    assert not list(model.loss.parameters())


def test_lora_on_the_head_gets_gradients() -> None:
    input, weight, target = case()
    a = torch.randn(4, 12, requires_grad=True)
    b = torch.randn(29, 4, requires_grad=True)
    frozen = weight.detach()
    ours = LinearCrossEntropyLoss()(input.detach(), frozen + 0.5 * b @ a, target)
    theirs = F.cross_entropy((input.detach() @ (frozen + 0.5 * b @ a).t()).flatten(0, 1), target.flatten())
    for x, y in zip(*(torch.autograd.grad(loss, (a, b)) for loss in (ours, theirs)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def _sharded(env: dict[str, str]) -> dict[str, float | str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    rank = int(env["RANK"])
    torch.distributed.init_process_group("gloo", f"file://{env['INIT_FILE']}", rank=rank, world_size=2)
    batches = [(torch.randn(6, 12, generator=torch.Generator().manual_seed(s)), torch.arange(6)) for s in (1, 2)]
    plain = Model()
    torch.stack([plain(*batch) for batch in batches]).mean().backward()
    found: dict[str, float | str] = {}
    ddp = DistributedDataParallel(Model())
    ddp(*batches[rank]).backward()
    found["ddp"] = max(
        float((a.grad - b.grad).abs().max())  # type: ignore[operator]
        for a, b in zip(ddp.module.parameters(), plain.parameters(), strict=True)
    )
    mesh = init_device_mesh("cpu", (2,))
    for name, dtype in (("fsdp", torch.float32), ("fsdp bf16", torch.bfloat16)):
        model = Model()
        fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))
        model(*batches[rank]).backward()
        found[name] = max(
            float((a.grad.full_tensor() - b.grad).abs().max() / b.grad.abs().max())  # type: ignore[union-attr]
            for a, b in zip(model.parameters(), plain.parameters(), strict=True)
        )
    model = Model()
    fully_shard(model, mesh=mesh)
    try:
        linear_cross_entropy(batches[rank][0], model.head.weight, batches[rank][1])
        found["refused"] = "no"
    except ValueError as error:
        found["refused"] = str(error)
    torch.distributed.destroy_process_group()
    return found


def test_ddp_fsdp_and_a_sharded_head() -> None:
    for found in run_ranks(_sharded, 2):
        assert found["ddp"] < 1e-6 and found["fsdp"] < 1e-5 and found["fsdp bf16"] < 3e-2
        assert "got weight as a DTensor" in found["refused"] and "VocabularyShard" in found["refused"]
