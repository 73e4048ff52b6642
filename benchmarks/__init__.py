"""Programs that measure what the README and docs/results.md say: `python -m benchmarks.NAME`."""
