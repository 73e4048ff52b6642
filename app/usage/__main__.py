"""The old spelling of `defeat admin usage`."""

from app import deprecated

deprecated.run("app.usage", "defeat admin usage", "app.ops.admin", "usage")
