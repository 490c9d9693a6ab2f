"""Runs Gluon kernels for Hopper on a CPU, unchanged, and names their hazards.

`triton.experimental.gluon` has no interpreter. This package executes the Python source of a kernel with torch
operations, every program of the grid and every partition of `warp_specialize`. TMA copies and wgmma are asynchronous:
a seeded scheduler picks the moment at which they read and write. A happens-before check by vector clocks finds what no
barrier and no wait orders, in schedules too where the numbers come out right. See `emulator.Emulator`.
"""

from __future__ import annotations

from gluon_emulator.emulator import Emulator
from gluon_emulator.hazards import Hazard

__all__ = ["Emulator", "Hazard"]
