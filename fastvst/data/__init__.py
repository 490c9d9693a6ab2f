"""Data: sources -> Sample -> EncodedSample -> PackedBatch, with a ledger of what could not be used.

Names are imported when first used (PEP 562): the processes that render rooms need `Sample` and neither torch nor the
tokenizer, which would cost each of them four seconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastvst.data.batch import IGNORE, Cost, EncodedSample, PackedBatch, pack
    from fastvst.data.encode import Processor
    from fastvst.data.ledger import Ledger, SampleError, TooManyBadSamples
    from fastvst.data.loader import Loader, LoaderConfig, make_loader
    from fastvst.data.mixture import Mixture, MixtureConfig, SourceConfig, iterate_once, open_mixture
    from fastvst.data.packing import PackingConfig, PackingReport
    from fastvst.data.processor_files import ProcessorConfig
    from fastvst.data.sample import Sample
    from fastvst.data.sources import Source, open_source

_HOME = {
    "IGNORE": "batch",
    "Cost": "batch",
    "EncodedSample": "batch",
    "PackedBatch": "batch",
    "pack": "batch",
    "Processor": "encode",
    "Ledger": "ledger",
    "SampleError": "ledger",
    "TooManyBadSamples": "ledger",
    "Loader": "loader",
    "LoaderConfig": "loader",
    "make_loader": "loader",
    "Mixture": "mixture",
    "MixtureConfig": "mixture",
    "SourceConfig": "mixture",
    "iterate_once": "mixture",
    "open_mixture": "mixture",
    "PackingConfig": "packing",
    "PackingReport": "packing",
    "ProcessorConfig": "processor_files",
    "Sample": "sample",
    "Source": "sources",
    "open_source": "sources",
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
    return getattr(importlib.import_module(f"fastvst.data.{_HOME[name]}"), name)
