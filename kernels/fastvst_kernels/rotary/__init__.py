"""Rotary embedding by the cosines and sines of another model."""
