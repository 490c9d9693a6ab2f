"""Reinforcement learning with verifiable rewards: what `examples/rl.py` is made of."""
