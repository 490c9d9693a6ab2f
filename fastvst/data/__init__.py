"""Data: sources -> Sample -> EncodedSample -> PackedBatch, with a ledger of what could not be used.

Names are imported when first used (PEP 562): the processes that render rooms need `Sample` and neither torch nor the
tokenizer, which would cost each of them four seconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastvst.batch import IGNORE, Cost, EncodedSample, PackedBatch, pack
    from fastvst.data.ledger import Ledger, SampleError, TooManyBadSamples
    from fastvst.data.loader import Loader, LoaderConfig, make_loader
    from fastvst.data.mixture import Mixture, MixtureConfig, SourceConfig, iterate_once, open_mixture
    from fastvst.data.packing import PackingConfig, PackingReport
    from fastvst.data.processor import Processor
    from fastvst.data.processor_config import ProcessorConfig
    from fastvst.data.sample import Sample
    from fastvst.data.sources import Source, open_source

_HOME = {
    "IGNORE": "fastvst.batch",
    "Cost": "fastvst.batch",
    "EncodedSample": "fastvst.batch",
    "PackedBatch": "fastvst.batch",
    "pack": "fastvst.batch",
    "Processor": "fastvst.data.processor",
    "Ledger": "fastvst.data.ledger",
    "SampleError": "fastvst.data.ledger",
    "TooManyBadSamples": "fastvst.data.ledger",
    "Loader": "fastvst.data.loader",
    "LoaderConfig": "fastvst.data.loader",
    "make_loader": "fastvst.data.loader",
    "Mixture": "fastvst.data.mixture",
    "MixtureConfig": "fastvst.data.mixture",
    "SourceConfig": "fastvst.data.mixture",
    "iterate_once": "fastvst.data.mixture",
    "open_mixture": "fastvst.data.mixture",
    "PackingConfig": "fastvst.data.packing",
    "PackingReport": "fastvst.data.packing",
    "ProcessorConfig": "fastvst.data.processor_config",
    "Sample": "fastvst.data.sample",
    "Source": "fastvst.data.sources",
    "open_source": "fastvst.data.sources",
}

__all__ = [
    "IGNORE",
    "Cost",
    "EncodedSample",
    "Ledger",
    "Loader",
    "LoaderConfig",
    "Mixture",
    "MixtureConfig",
    "PackedBatch",
    "PackingConfig",
    "PackingReport",
    "Processor",
    "ProcessorConfig",
    "Sample",
    "SampleError",
    "Source",
    "SourceConfig",
    "TooManyBadSamples",
    "iterate_once",
    "make_loader",
    "open_mixture",
    "open_source",
    "pack",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastvst.data' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
