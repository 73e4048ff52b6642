"""The service's workers."""
