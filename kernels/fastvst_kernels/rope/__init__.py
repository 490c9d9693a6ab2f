"""Rotary position embedding (M-RoPE and the vision tower's 2D form)."""
