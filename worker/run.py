"""The old spelling of `python -m defeat.engine.run`."""

from app import deprecated

if __name__ == "__main__":
    deprecated.run("worker.run", "python -m defeat.engine.run", "defeat.engine.run")
