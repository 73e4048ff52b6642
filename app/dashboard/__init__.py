"""The service's dashboard."""
