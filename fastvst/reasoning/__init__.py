"""Reasoning (VST-R): traces composed from geometry or written by a teacher model, and the bird's-eye view."""
