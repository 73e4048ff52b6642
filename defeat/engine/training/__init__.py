"""The training engine: names no method and no detector."""
