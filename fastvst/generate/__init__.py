"""Rows from scenes: rendered rooms, scans, presets, and rows for RL."""
