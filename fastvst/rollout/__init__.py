"""Generating answers from the trainer's own weights."""

from fastvst.rollout.greedy import greedy

__all__ = ["greedy"]
