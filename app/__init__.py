"""The HTTP service: datasets, checkpoints, jobs and their artifacts. Imports no torch."""
