"""Programs that run in the Python environment of a simulator; see serve.py."""
