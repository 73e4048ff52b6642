"""The old spelling of `defeat admin retention`."""

from app import deprecated

deprecated.run("app.retention", "defeat admin retention", "app.ops.admin", "retention")
