"""Where the Triton cache of the lease is, on the machine that fills it and on the GPU machine."""

from pathlib import Path

CACHE = Path("/tmp/fastvst-triton-cache")  # the groups of a Triton cache hold absolute paths, so the place is fixed
NOTE = "fastvst.json"  # in it: what the keys of its kernels depend on
