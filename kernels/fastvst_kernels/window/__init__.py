"""Attention inside the windows of the vision tower."""
