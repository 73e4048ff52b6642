"""The old spelling of `defeat admin keys`."""

from app import deprecated

deprecated.run("app.keys", "defeat admin keys", "app.ops.admin", "keys")
