"""The LM head fused with its loss: cross entropy, log-probabilities, policy losses."""
