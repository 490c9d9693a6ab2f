"""Packed attention over one row of sequences, with shared-prompt groups."""
