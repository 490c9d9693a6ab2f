"""The benchmarks by name, and what `NAME=PATH` means where a path may be a benchmark."""

from __future__ import annotations

import difflib
import importlib
from typing import Any

BENCHMARKS = {
    "vsi_bench": "fastvst.evaluate.vsi_bench",
    "mmsi_bench": "fastvst.evaluate.mmsi_bench",
    "cv_bench": "fastvst.evaluate.cv_bench",
    "blink": "fastvst.evaluate.blink",
    "3dsrbench": "fastvst.evaluate.srbench_3d",
    "realworldqa": "fastvst.evaluate.realworldqa",
    "mmstar": "fastvst.evaluate.mmstar",
    "mmbench": "fastvst.evaluate.mmbench",
    "ai2d": "fastvst.evaluate.ai2d",
    "mmmu": "fastvst.evaluate.mmmu",
    "ocrbench": "fastvst.evaluate.ocrbench",
    "viewspatial": "fastvst.evaluate.viewspatial",
    "mindcube": "fastvst.evaluate.mindcube",
    "sunrgbd_det": "fastvst.evaluate.sunrgbd_det",
}
ROOMS = "rooms"
GENERAL = "general"  # a base model's own skills: the name of its preset of rows and of the split of its rooms, too
OWN = "own"  # questions of one's own


def module_of(name: str) -> Any:
    """The module of a published benchmark."""
    return importlib.import_module(BENCHMARKS[name])


def spelled(name: str) -> str:
    """A name as it is in BENCHMARKS: small letters and underscores."""
    return name.lower().replace("-", "_")


def nearest(name: str, *others: str) -> str:
    """ "; did you mean 'vsi_bench'?" for a name that is near to one of the benchmarks or of `others`, else ""."""
    names = [*BENCHMARKS, ROOMS, GENERAL, OWN, *others]
    near = [one for one in names if one.startswith(name)] or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
