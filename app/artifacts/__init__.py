"""The service's artifacts."""
