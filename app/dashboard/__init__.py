"""The dashboard: server-rendered pages that keep themselves live over the JSON API."""
