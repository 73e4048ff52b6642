"""What the service deletes by itself, by the operator's rules; see docs/operations.md."""
