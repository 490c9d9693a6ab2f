"""fastvst: a trainer for spatial vision-language models (Visual Spatial Tuning, arXiv 2511.05491).

The names below are what a program of one's own needs; docs/python.md uses each of them.

    import fastvst

    model, processor = fastvst.load("runs/sft/hf")             # a Qwen2.5-VL directory
    sample = fastvst.Sample.from_messages(messages)            # OpenAI-style messages with images and videos
    batch = fastvst.pack([processor.encode(sample)])           # one packed row: no padding, no attention mask
    loss = model.loss(batch)                                   # () float32; call loss.backward()
    hidden = model(batch)                                      # (T, hidden_size), compute dtype
    engine = fastvst.Engine(model, processor)                  # samples from the model's current weights
    rollouts = engine.generate([sample], fastvst.SamplingParams(temperature=0))
    fastvst.score(rollouts[0][0].text, answer)                 # in [0, 1]

`import fastvst` takes milliseconds: a name is imported when it is first used (PEP 562). The training scripts are
`fastvst sft`, `fastvst rl` and `fastvst cold-start`; `fastvst --help` lists all commands.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastvst.batch import EncodedSample, PackedBatch, pack
    from fastvst.data.processor import Processor
    from fastvst.data.sample import Sample
    from fastvst.data.sources import open_source
    from fastvst.evaluate.answers import score
    from fastvst.model import ModelConfig, Qwen25VL
    from fastvst.rollout import Engine, Rollout, SamplingParams
    from fastvst.rollout.load import load

__version__ = "0.1.0"

_HOME = {
    "EncodedSample": "fastvst.batch",
    "Engine": "fastvst.rollout",
    "ModelConfig": "fastvst.model",
    "PackedBatch": "fastvst.batch",
    "Processor": "fastvst.data.processor",
    "Qwen25VL": "fastvst.model",
    "Rollout": "fastvst.rollout",
    "Sample": "fastvst.data.sample",
    "SamplingParams": "fastvst.rollout",
    "load": "fastvst.rollout.load",
    "open_source": "fastvst.data.sources",
    "pack": "fastvst.batch",
    "score": "fastvst.evaluate.answers",
}

__all__ = [
    "EncodedSample",
    "Engine",
    "ModelConfig",
    "PackedBatch",
    "Processor",
    "Qwen25VL",
    "Rollout",
    "Sample",
    "SamplingParams",
    "load",
    "open_source",
    "pack",
    "score",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastvst' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
