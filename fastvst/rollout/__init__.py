"""Sampling completions from the trainer's own weights."""

from fastvst.rollout.engine import Engine, EngineConfig
from fastvst.rollout.request import Rollout, RolloutError, SamplingParams

__all__ = ["Engine", "EngineConfig", "Rollout", "RolloutError", "SamplingParams"]
