"""Matrix products and attention whose results do not depend on the batch."""
