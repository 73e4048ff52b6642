"""The service's jobs."""
