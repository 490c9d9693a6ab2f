"""Robot actions as text of a vision-language model: normalisation, bins, chunks."""

from fastvst.vla.action_statistics import ActionStatistics
from fastvst.vla.actions import ActionCodec, ActionError

__all__ = ["ActionCodec", "ActionError", "ActionStatistics"]
