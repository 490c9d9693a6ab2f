"""Next-token sampling from hidden states."""
