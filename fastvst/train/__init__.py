"""Everything around the model that a training run needs, as plain functions and small frozen dataclasses."""
