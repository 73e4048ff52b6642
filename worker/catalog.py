"""The old spelling of `python -m defeat.engine.catalog`."""

from app import deprecated

if __name__ == "__main__":
    deprecated.run("worker.catalog", "python -m defeat.engine.catalog", "defeat.engine.catalog")
