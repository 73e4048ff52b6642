"""The service's datasets."""
