"""The service's checkpoints."""
