"""The old spelling of `defeat doctor`."""

from app import deprecated

if __name__ == "__main__":
    deprecated.run("app.doctor", "defeat doctor", "app.ops.doctor")
