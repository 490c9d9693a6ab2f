"""Reasoned rows (VST-R): traces composed from geometry or by a teacher model, and rows for reinforcement learning."""
