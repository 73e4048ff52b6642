"""Distillation for object detectors: the client of the service, and the engine that trains and loads detectors.

`from defeat import Client` talks to a service over HTTP. `from defeat import load` reads a downloaded student; it needs
torch (`pip install "defeat-service[worker]"`), which nothing else here imports.
"""
