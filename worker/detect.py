"""The old spelling of `python -m defeat.engine.detect`."""

from app import deprecated

if __name__ == "__main__":
    deprecated.run("worker.detect", "python -m defeat.engine.detect", "defeat.engine.detect")
