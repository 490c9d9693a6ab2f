"""Qwen2.5-VL from scratch: config, positions, vision tower, decoder, weights."""

from fastvst.model.config import ModelConfig, VisionConfig
from fastvst.model.qwen25vl import Qwen25VL

__all__ = ["ModelConfig", "Qwen25VL", "VisionConfig"]
