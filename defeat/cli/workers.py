"""`defeat workers`: the server's workers."""

from defeat.cli.console import JsonFlag, Output
from defeat.client.client import Client


def workers(as_json: JsonFlag = False) -> None:
    """List the server's workers: their resources and their work."""
    out = Output(as_json)
    with Client() as client:
        rows = client.workers()
    out.json(rows)
    out.table(
        ["worker", "status", "works on", "queues", "labels", "GPUs", "GPU memory", "since"],
        [
            (
                row["name"],
                row["status"],
                row["working_on"]["id"] if row["working_on"] else None,
                ", ".join(row["queues"]),
                ", ".join(row["labels"]) or None,
                row["gpus"],
                None if row["gpu_memory_gb"] is None else f"{row['gpu_memory_gb']:g} GB",
                row["started_at"],
            )
            for row in rows
        ],
    )
