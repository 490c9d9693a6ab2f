"""Rows from scenes: rendered rooms and scans, their presets, and rows for RL."""
