"""Furnished rooms: layout, meshes, cameras and renderers."""
