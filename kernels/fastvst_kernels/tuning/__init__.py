"""Compile and time tile candidates; write the tile tables."""
