"""The old spelling of `defeat admin workers`."""

from app import deprecated

deprecated.run("app.workers", "defeat admin workers", "app.ops.admin", "workers")
