"""Small things to try the service with."""
