"""The Python SDK and the `defeat` command. Speaks HTTP, imports neither the service nor the engine."""
