"""Data: sources -> Sample -> EncodedSample -> PackedBatch, with a ledger of what could not be used."""

from fastvst.data.batch import IGNORE, Cost, EncodedSample, PackedBatch, pack
from fastvst.data.encode import Processor
from fastvst.data.ledger import Ledger, SampleError, TooManyBadSamples
from fastvst.data.loader import Loader, LoaderConfig, make_loader
from fastvst.data.mixture import Mixture, MixtureConfig, SourceConfig, iterate_once, open_mixture
from fastvst.data.packing import PackingConfig, PackingReport
from fastvst.data.processor_files import ProcessorConfig
from fastvst.data.sample import Sample
from fastvst.data.sources import Source, open_source

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
