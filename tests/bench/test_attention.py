"""bench/gpu/attention.py without a GPU: what it measures becomes the choice of backend="auto"."""

import torch

from bench.cases.attention import CASES
from bench.gpu import attention
from fastvst_kernels.attention.choice import TABLE, Case, fastest, read_rows, record


def test_measured_times_become_the_choice_of_auto(monkeypatch, tmp_path):
    path = tmp_path / "table.json"
    path.write_text(TABLE.read_text())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(attention, "record", lambda *given: record(*given, path))
    case = next(c for c in CASES if c.prompts is not None)
    figures = {
        "fastvst": {"forward_ms": 1.0, "backward_ms": 2.0},
        "flash-attn-3": {"forward_ms": 0.5, "backward_ms": 3.0},
        "flash-attn-2": {"not_measured": "RuntimeError"},
        "cudnn": {"forward_ms": 0.1, "backward_ms": 0.1},
    }
    attention.record_choice(case, figures)
    chosen = {
        training: fastest(
            Case((9, 0), "NVIDIA H100", case.width, training, True, case.tokens // len(case.lengths)),
            read_rows(path),
            ("flash-attn-3",),
        )[0]
        for training in (False, True)
    }
    assert chosen == {False: "flash-attn-3", True: "triton"}
    attention.record_choice(case, {"flash-attn-3": figures["flash-attn-3"]})  # no time of ours: nothing is compared
    assert len(read_rows(path)) == len(read_rows(TABLE)) + 2
