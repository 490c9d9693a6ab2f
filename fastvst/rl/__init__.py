"""Reinforcement learning with verifiable rewards: the parts of `examples/rl.py`."""
