"""Geometry of boxes, cameras and image marks."""
