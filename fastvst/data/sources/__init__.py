"""Data sets on disk -> Samples, without a conversion step; `open_source` recognises the format of the files."""

from fastvst.data.sources.source import FORMATS, Source, open_source

__all__ = ["FORMATS", "Source", "open_source"]
