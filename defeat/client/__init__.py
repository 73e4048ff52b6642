"""The Python client of the service. Uses HTTP only; imports neither the service nor the engine."""
