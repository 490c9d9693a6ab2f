"""Data sets as they are on disk -> Samples, without a conversion step; `open_source` looks at what the files are."""

from fastvst.data.sources.source import FORMATS, Source, open_source

__all__ = ["FORMATS", "Source", "open_source"]
