"""The fused policy loss: masks, chunks, ranks and precision. test_objectives.py tests the objectives' formulas."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastvst_kernels.lm_head import policy_loss
from fastvst_kernels.lm_head.cross_entropy import linear_cross_entropy
from fastvst_kernels.lm_head.logprobs import linear_logprobs
from fastvst_kernels.lm_head.policy_loss import linear_policy_loss, linear_policy_loss_reference, rows_with_loss
from fastvst_kernels.lm_head.types import VocabularyShard
from fastvst_kernels.objectives import CISPO, DAPO, GRPO, GSPO, SAPO, DrGRPO, Importance, Objective, Reinforce
from lm_head_case import LOGITS, logit_options
from ranks import run_ranks

OBJECTIVES: tuple[Objective, ...] = (
    GRPO(kl="k3", kl_coef=0.05),
    DAPO(dual_clip=1.5),
    DrGRPO(kl="k1", entropy_coef=0.02),
    GSPO(clip_low=0.2, clip_high=0.2),
    GSPO(clip_low=0.2, clip_high=0.2, entropy_coef=-0.01, kl="k2"),
    CISPO(clip_high=0.1),
    SAPO(importance=Importance("sequence", "truncate", high=1.5)),
    Reinforce(importance=Importance("token", "mask", low=0.7, high=1.4)),
)


def make(
    rows: int, dtype: torch.dtype = torch.float64, width: int = 8, vocabulary: int = 31, seed: int = 0
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    hidden = normal(rows, width).requires_grad_()
    weight = normal(vocabulary, width).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), generator=g)
    now = torch.log_softmax(hidden @ weight.t() / 0.8, -1).gather(1, targets[:, None]).squeeze(1).detach()
    logprobs = {f"{name}_logprobs": now + 0.3 * normal(rows) for name in ("old", "ref", "sampler")}
    ids = torch.arange(rows) // 5 * 3 - 7
    return {
        "hidden": hidden,
        "weight": weight,
        "targets": targets,
        "advantages": normal(rows),
        "row_weights": normal(rows).abs(),
        "sequence_ids": ids,
        **logprobs,
    }


def run(problem: dict[str, Tensor], objective: Objective, **options: object) -> tuple[Tensor, dict[str, Tensor]]:
    return linear_policy_loss(objective=objective, temperature=0.8, **problem, **options)


def with_gradients(loss: Tensor, problem: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return loss.detach(), *torch.autograd.grad(loss, (problem["hidden"], problem["weight"]))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 33), st.sampled_from(OBJECTIVES), st.sampled_from([1, 4, None]), st.booleans(), st.data())
def test_masked_rows_equal_the_formula_on_the_remaining_rows(rows, objective, chunk, on_policy, data) -> None:
    problem = make(rows, seed=rows)
    # 0: kept, 1: ignored target, 2: weight 0, 3: advantage 0.
    kinds = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows)), dtype=torch.long)
    problem["targets"] = torch.where(kinds == 1, -100, problem["targets"])
    problem["row_weights"] = torch.where(kinds == 2, 0.0, problem["row_weights"])
    problem["advantages"] = torch.where(kinds == 3, 0.0, problem["advantages"])
    for name in ("old_logprobs", "ref_logprobs", "sampler_logprobs", "advantages"):
        problem[name] = torch.where(kinds == 1, torch.nan, problem[name])  # a prompt has no log-probabilities
    if on_policy:
        problem["old_logprobs"] = None  # type: ignore[assignment]
    loss, stats = run(problem, objective, chunk_rows=chunk)
    counted = (kinds == 0) | (kinds == 3)
    rest = {n: v if v is None or n in ("hidden", "weight") else v[counted] for n, v in problem.items()}
    rest["sequence_ids"] = torch.unique(rest["sequence_ids"], return_inverse=True)[1]
    rest["hidden"] = problem["hidden"][counted]
    want = linear_policy_loss_reference(objective=objective, temperature=0.8, **rest)
    for a, b in zip(with_gradients(loss, problem), with_gradients(want, problem), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert stats["rows_total"] == rows and stats["rows_backward"] <= stats["rows_computed"] <= counted.sum()
    assert all(bool(v.isfinite()) for v in stats.values())


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_gradcheck(objective: Objective) -> None:
    problem = make(6, vocabulary=9, width=3)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return run(problem | {"hidden": hidden, "weight": weight}, objective, chunk_rows=4)[0]

    if isinstance(objective, CISPO):  # its weight counts as a constant, which finite differences do not know
        problem["old_logprobs"] = problem["old_logprobs"] - 10  # every weight is at its bound, so its derivative is 0
    assert torch.autograd.gradcheck(loss, (problem["hidden"], problem["weight"]))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_float32_is_near_float64_at_any_chunk_and_the_same_from_run_to_run(objective: Objective) -> None:
    exact = make(60)
    single = {n: v.detach().float() if v.is_floating_point() else v for n, v in exact.items()}
    for name in ("hidden", "weight"):
        single[name].requires_grad_()
    want = with_gradients(run(exact, objective)[0], exact)
    for chunk in (1, 7, 60):
        got = with_gradients(run(single, objective, chunk_rows=chunk)[0], single)
        again = with_gradients(run(single, objective, chunk_rows=chunk)[0], single)
        for a, b, c in zip(got, want, again, strict=True):
            assert a.dtype == torch.float32
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-5)
            assert torch.equal(a, c)


@pytest.mark.parametrize("scale", [1e4, -1e4])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_huge_logits_give_no_nan(objective: Objective, scale: float) -> None:
    problem = make(20, torch.float32)
    problem["hidden"] = torch.full((20, 8), 1.0).requires_grad_()
    problem["weight"] = (torch.randn(31, 8).abs() * scale / 8).requires_grad_()
    loss, stats = run(problem, objective)
    for value in (*with_gradients(loss, problem), *stats.values()):
        assert value.isfinite().all()


def test_rows_without_gradient_skip_the_products() -> None:
    """Ignored, zero-advantage and clipped rows must not reach the products: NaN hidden states have no effect."""
    problem = make(40)
    problem["targets"][:10] = -100
    problem["advantages"][10:20] = 0
    with torch.no_grad():
        problem["hidden"][:20] = torch.nan
    loss, stats = run(problem, DAPO(clip_low=0.0, clip_high=0.0))
    gradients = with_gradients(loss, problem)
    assert all(g.isfinite().all() for g in gradients) and gradients[1][:20].abs().max() == 0
    assert stats["rows_computed"] == 20
    clipped = 20 * float(stats["clip_low"] + stats["clip_high"])
    assert clipped > 0 and float(stats["rows_backward"]) == pytest.approx(20 - clipped)
    assert float(stats["gemm_saved"]) == pytest.approx(1 - (20 + 2 * (20 - clipped)) / 120)
    loss, stats = run(problem | {"hidden": problem["hidden"].nan_to_num()}, DAPO(entropy_coef=0.1))
    assert stats["rows_computed"] == 30  # with an entropy term rows of advantage 0 count


@pytest.mark.parametrize("objective", [DAPO(), GSPO()], ids=lambda o: type(o).__name__)
def test_no_row_to_compute(objective: Objective) -> None:
    problem = make(12)
    for change in ({"targets": torch.full((12,), -100)}, {"advantages": torch.zeros(12).double()}):
        loss, stats = run(problem | change, objective)
        assert all(g.abs().max() == 0 for g in with_gradients(loss, problem)) and stats["gemm_saved"] == 1


def test_frozen_inputs_no_grad_and_second_backward() -> None:
    problem = make(16)
    want = with_gradients(run(problem, DAPO())[0], problem)
    for name, gradient in zip(("hidden", "weight"), want[1:], strict=True):
        frozen = problem | {n: problem[n].detach() for n in ("hidden", "weight") if n != name}
        (got,) = torch.autograd.grad(run(frozen, DAPO())[0], problem[name])
        torch.testing.assert_close(got, gradient)
    with torch.no_grad():
        loss, _ = run(problem, DAPO())
    assert torch.equal(loss, want[0]) and not loss.requires_grad
    loss, _ = run(problem, DAPO())
    inputs = (problem["hidden"], problem["weight"])
    for factor in (2.0, 3.0):
        for a, b in zip(torch.autograd.grad(loss * factor, inputs, retain_graph=True), want[1:], strict=True):
            torch.testing.assert_close(a, factor * b)


def test_tied_embedding_gets_both_gradients() -> None:
    problem = make(16, vocabulary=31)
    weight = problem["weight"]
    tied = problem | {"hidden": torch.tanh(weight[problem["targets"]])}
    want = linear_policy_loss_reference(objective=DAPO(), temperature=0.8, **tied)
    (b,) = torch.autograd.grad(want, weight)
    tied = problem | {"hidden": torch.tanh(weight[problem["targets"]])}
    (a,) = torch.autograd.grad(run(tied, DAPO())[0], weight)
    torch.testing.assert_close(a, b)


def test_bfloat16_products_are_not_rounded_to_bfloat16() -> None:
    problem = make(50, torch.float32, width=64, vocabulary=200)
    half = problem | {n: problem[n].detach().bfloat16().requires_grad_() for n in ("hidden", "weight")}
    wide = problem | {n: half[n].detach().double().requires_grad_() for n in ("hidden", "weight")}
    got = run(half, DAPO())
    want = run(wide, DAPO())
    torch.testing.assert_close(got[1]["logprob"].double(), want[1]["logprob"], rtol=1e-6, atol=1e-6)
    for a, b in zip(with_gradients(got[0], half)[1:], with_gradients(want[0], wide)[1:], strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.double(), b, rtol=4e-3, atol=1e-4)  # the result is rounded once


@pytest.mark.parametrize(
    "change, message",
    [
        ({"targets": torch.full((12,), 31)}, "target 31 at row 0 is outside the vocabulary of 31"),
        ({"advantages": torch.zeros(11)}, r"advantages is torch.float32 of shape \(11,\)"),
        ({"row_weights": torch.zeros(12).bool()}, "row_weights is torch.bool"),
        ({"ref_logprobs": None}, "give ref_logprobs"),
        ({"sampler_logprobs": None}, "give sampler_logprobs"),
        ({"sequence_ids": None}, "give sequence_ids"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"chunk_rows": 0}, "chunk_rows is 0"),
        ({"weight": torch.zeros(31, 7).double()}, r"expected \(M, H\) and \(V, H\)"),
        ({"weight": torch.zeros(31, 8)}, "expected one floating dtype"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], message: str) -> None:
    problem = make(12) | {"temperature": 0.8} | change
    objective = GSPO(kl="k3", importance=Importance())
    with pytest.raises(ValueError, match=message):
        linear_policy_loss(objective=objective, **problem)


def test_a_loss_of_the_wrong_shape_is_refused() -> None:
    class Mean(Objective):
        def surrogate(self, ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> Tensor:
            return logprobs.mean()

    with pytest.raises(ValueError, match="Mean.loss returned shape"):
        run(make(8), Mean())


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("kind", LOGITS)
def test_bias_scale_and_softcap(objective: Objective, kind: str) -> None:
    problem = make(21)
    problem["sequence_ids"] = torch.arange(21) // 5  # the plain formula needs them dense
    options = logit_options(kind, problem["weight"])
    inputs = [x for x in (problem["hidden"], problem["weight"], options.get("bias")) if x is not None]
    got = run(problem, objective, chunk_rows=8, **options)[0]
    want = linear_policy_loss_reference(objective=objective, temperature=0.8, **problem, **options)
    for a, b in zip(*((x.detach(), *torch.autograd.grad(x, inputs)) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_masked_and_traced_rows_equal_compacted_rows(monkeypatch: pytest.MonkeyPatch, objective: Objective) -> None:
    """On a GPU rows without a loss are zeros; a traced call is the log-probabilities and the objective's formula."""
    problem = make(30)
    problem["targets"][::4] = -100
    problem["advantages"][5:10] = 0
    with torch.no_grad():
        problem["hidden"][::4] = torch.nan
        problem["old_logprobs"][::4] = torch.nan
    loss, stats = run(problem, objective, chunk_rows=8)
    want = with_gradients(loss, problem)
    names = ("targets", "advantages", "row_weights", "old_logprobs", "sampler_logprobs", "sequence_ids")
    rows = rows_with_loss(objective, **{name: problem[name] for name in names})
    assert len(rows) == stats["rows_computed"]
    given = run(problem, objective, chunk_rows=8, rows=rows)
    monkeypatch.setattr(policy_loss, "select_rows", lambda keep, rows: (None, keep))
    masked = run(problem, objective, chunk_rows=8)
    monkeypatch.setattr(policy_loss, "is_traced", lambda *tensors: True)
    for loss, other in (given, masked, run(problem, objective)):
        for a, b in zip(with_gradients(loss, problem), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        assert other.keys() == stats.keys()
        for name in stats.keys() - {"rows_computed", "rows_backward", "gemm_saved"}:
            torch.testing.assert_close(other[name], stats[name], msg=name)


def _sharded(env: dict[str, str], rank_sizes: tuple[int, int]) -> float:
    rank = int(env["RANK"])
    torch.distributed.init_process_group("gloo", f"file://{env['INIT_FILE']}", rank=rank, world_size=2)
    start = sum(rank_sizes[:rank])
    shard = VocabularyShard(torch.distributed.group.WORLD, start, sum(rank_sizes))
    worst = 0.0
    for objective in OBJECTIVES:
        problem = make(21, vocabulary=sum(rank_sizes))
        want = with_gradients(run(problem, objective, chunk_rows=8)[0], problem)
        mine = problem | {"weight": problem["weight"].detach()[start : start + rank_sizes[rank]].requires_grad_()}
        got = with_gradients(run(mine, objective, chunk_rows=8, shard=shard)[0], mine)
        want = (want[0], want[1], want[2][start : start + rank_sizes[rank]])
        worst = max(worst, *(float((a - b).abs().max()) for a, b in zip(got, want, strict=True)))
    for loss in (_smooth_cross_entropy, _squares_of_logprobs_and_entropy):
        problem = make(21, vocabulary=sum(rank_sizes))
        want = with_gradients(loss(problem, None), problem)
        mine = problem | {"weight": problem["weight"].detach()[start : start + rank_sizes[rank]].requires_grad_()}
        got = with_gradients(loss(mine, shard), mine)
        want = (want[0], want[1], want[2][start : start + rank_sizes[rank]])
        worst = max(worst, *(float((a - b).abs().max()) for a, b in zip(got, want, strict=True)))
    torch.distributed.destroy_process_group()
    return worst


def _smooth_cross_entropy(problem: dict[str, Tensor], shard: VocabularyShard | None) -> Tensor:
    inputs = (problem["hidden"], problem["weight"], problem["targets"])
    weights = problem["row_weights"]
    return linear_cross_entropy(
        *inputs, row_weights=weights, label_smoothing=0.1, z_loss=0.01, chunk_rows=8, shard=shard
    )


def _squares_of_logprobs_and_entropy(problem: dict[str, Tensor], shard: VocabularyShard | None) -> Tensor:
    inputs = (problem["hidden"], problem["weight"], problem["targets"])
    logprobs, entropy = linear_logprobs(*inputs, temperature=0.8, chunk_rows=8, shard=shard)
    return logprobs.square().sum() + entropy.square().sum()


def test_vocabulary_on_two_ranks_equals_one() -> None:
    assert max(run_ranks(_sharded, 2, (13, 18))) < 1e-12


class _Model(nn.Module):
    def __init__(self, weight: Tensor, problem: dict[str, Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.problem = problem
        self.body = nn.Linear(8, 8, dtype=torch.float64)
        nn.init.eye_(self.body.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        return run(self.problem | {"hidden": self.body(hidden), "weight": self.weight}, DAPO())[0]


def _fsdp(env: dict[str, str]) -> float:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank = int(env["RANK"])
    torch.distributed.init_process_group("gloo", f"file://{env['INIT_FILE']}", rank=rank, world_size=2)
    problems = [make(15, seed=s) for s in (1, 2)]
    for problem in problems:
        problem["weight"] = problems[0]["weight"].detach().clone()
    torch.manual_seed(0)
    plain = _Model(problems[0]["weight"], problems[0])
    total = 0.0
    for problem in problems:
        plain.problem = problem
        total = total + plain(problem["hidden"].detach()) / 2
    total.backward()  # type: ignore[attr-defined]
    torch.manual_seed(0)
    model = _Model(problems[0]["weight"], problems[rank])
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    model(problems[rank]["hidden"].detach()).backward()
    worst = max(
        float((p.grad.full_tensor() - q.grad).abs().max())
        for p, q in zip(model.parameters(), plain.parameters(), strict=True)
    )
    torch.distributed.destroy_process_group()
    return worst


def test_weight_as_an_unsharded_fsdp_parameter() -> None:
    assert max(run_ranks(_fsdp, 2)) < 1e-12
