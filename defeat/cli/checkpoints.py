"""`defeat checkpoints …`."""

from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from defeat.cli.console import FAILED, JsonFlag, Output, size
from defeat.cli.datasets import Limit, Wait
from defeat.client.client import Client
from defeat.client.specs import load_spec
from defeat.client.types import Checkpoint

app = typer.Typer(no_args_is_help=True, help="Weights of detectors: teachers and initial students.")

CheckpointId = Annotated[str, typer.Argument(metavar="ID", help="ckpt_…")]


@app.command()
def add(
    path: Annotated[Path, typer.Argument(help="A safetensors file, or a torch file of tensors.")],
    name: Annotated[str | None, typer.Option(help="Default: the file's name.")] = None,
    detector: Annotated[
        Path | None, typer.Option(help="YAML file with the detector spec; default: the weights file's header.")
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(help="File with one class name per line, in order; default: the weights file's header."),
    ] = None,
    wait: Wait = True,
    as_json: JsonFlag = False,
) -> None:
    """Upload a detector's weights and have the server check them."""
    out = Output(as_json)
    spec = None if detector is None else load_spec(detector)
    names = None if classes is None else [line for line in classes.read_text("utf-8").splitlines() if line]
    with Client() as client:
        with out.transfer(f"uploading {path}") as on_progress:
            checkpoint = client.checkpoints.add(path, name or path.name, spec, names, on_progress)
        if wait:
            checkpoint = client.checkpoints.wait(checkpoint["id"], on_update=lambda c: out.line(c["id"], c["status"]))
        else:
            out.line(checkpoint["id"], checkpoint["status"])
    out.json(checkpoint)
    if checkpoint["status"] in ("invalid", "failed"):
        out.failure(f"{checkpoint['id']} is {checkpoint['status']}", checkpoint["failure"])
        raise typer.Exit(FAILED)
    if coverage := _coverage(checkpoint):
        out.line(coverage)


@app.command("list")
def list_(limit: Limit = 20, as_json: JsonFlag = False) -> None:
    """List checkpoints, newest first."""
    out = Output(as_json)
    with Client() as client:
        rows = list(islice(client.checkpoints.list(), limit))
    out.json(rows)
    out.table(
        ["id", "name", "status", "backbone", "classes", "size", "created"],
        [
            (
                c["id"],
                c["name"],
                c["status"],
                (c["detector"] or {}).get("backbone"),
                len(c["classes"]) if c["classes"] else None,
                size(c["size_bytes"]),
                c["created_at"],
            )
            for c in rows
        ],
    )


@app.command()
def show(checkpoint_id: CheckpointId, as_json: JsonFlag = False) -> None:
    """Show one checkpoint."""
    out = Output(as_json)
    with Client() as client:
        checkpoint = client.checkpoints.get(checkpoint_id)
    out.json(checkpoint)
    out.table(
        ["checkpoint", checkpoint["id"]],
        [
            ("name", checkpoint["name"]),
            ("status", checkpoint["status"]),
            *((f"detector {key}", value) for key, value in (checkpoint["detector"] or {}).items()),
            ("classes", ", ".join(checkpoint["classes"] or []) or None),
            ("tensors", _coverage(checkpoint)),
            ("trained by", checkpoint["source_job_id"]),
            ("sha256", checkpoint["sha256"]),
            ("size", size(checkpoint["size_bytes"])),
            ("created", checkpoint["created_at"]),
        ],
    )
    if checkpoint["failure"]:
        out.failure(f"{checkpoint['id']} is {checkpoint['status']}", checkpoint["failure"])


@app.command()
def download(
    checkpoint_id: CheckpointId,
    output: Annotated[Path | None, typer.Option(help="File to write; default: <ID>.safetensors here.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Download a checkpoint's weights to a file; resumes an interrupted download."""
    out = Output(as_json)
    with Client() as client, out.transfer(f"downloading {checkpoint_id}") as on_progress:
        path = client.checkpoints.download(checkpoint_id, output or Path(f"{checkpoint_id}.safetensors"), on_progress)
    out.json({"id": checkpoint_id, "path": str(path)})
    out.line(path)


@app.command()
def delete(checkpoint_id: CheckpointId, as_json: JsonFlag = False) -> None:
    """Delete a checkpoint."""
    out = Output(as_json)
    with Client() as client:
        client.checkpoints.delete(checkpoint_id)
    out.json({"id": checkpoint_id, "deleted": True})
    out.line(f"{checkpoint_id} deleted")


def _coverage(checkpoint: Checkpoint) -> str | None:
    coverage = checkpoint["coverage"]
    return None if coverage is None else f"{coverage['loaded']}/{coverage['total']} tensors loaded"
