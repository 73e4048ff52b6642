"""The service's keys."""
