"""What a training run needs around the model: plain functions and small frozen dataclasses."""
