"""fastvst: a fast, small trainer for spatial vision-language models (Visual Spatial Tuning, arXiv 2511.05491)."""

__version__ = "0.1.0"
