"""`defeat datasets …`."""

from itertools import islice
from typing import Annotated, Any

import typer

from defeat.cli.console import FAILED, JsonFlag, Output, percent, size
from defeat.client.client import Client
from defeat.client.errors import ApiError
from defeat.client.types import Dataset, Report

app = typer.Typer(no_args_is_help=True, help="Images with boxes.")

DatasetId = Annotated[str, typer.Argument(metavar="ID", help="ds_…")]
Limit = Annotated[int, typer.Option(min=1, help="Maximum number to show, newest first.")]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until the server has checked the content.")]


@app.command()
def add(
    path: Annotated[str, typer.Argument(help="A directory, an archive (zip, tar, tar.gz), or a file:// URI.")],
    name: Annotated[str | None, typer.Option(help="Default: the last part of the path.")] = None,
    max_dropped_fraction: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Largest fraction of boxes and images that may be unusable; default: the server's."
        ),
    ] = None,
    wait: Wait = True,
    as_json: JsonFlag = False,
) -> None:
    """Upload a dataset and have the server check it."""
    out = Output(as_json)
    with Client() as client:
        with out.transfer(f"uploading {path}") as on_progress:
            dataset = client.datasets.add(path, name, max_dropped_fraction, on_progress)
        report: Report | None = None
        if wait:
            dataset = client.datasets.wait(dataset["id"], on_update=lambda d: out.line(d["id"], d["status"]))
            if dataset["status"] in ("ready", "invalid"):
                report = _report_if_any(client, dataset["id"])
        else:
            out.line(dataset["id"], dataset["status"])
    out.json(dataset)
    if report is not None:
        _show_report(out, report)
    _exit_by_status(out, dataset)


@app.command("list")
def list_(limit: Limit = 20, as_json: JsonFlag = False) -> None:
    """List datasets, newest first."""
    out = Output(as_json)
    with Client() as client:
        rows = list(islice(client.datasets.list(), limit))
    out.json(rows)
    out.table(
        ["id", "name", "status", "format", "images", "classes", "size", "created"],
        [
            (
                d["id"],
                d["name"],
                d["status"],
                d["format"],
                sum(split["images"] for split in (d["splits"] or {}).values()) or None,
                len(d["classes"]) if d["classes"] else None,
                size(d["size_bytes"]),
                d["created_at"],
            )
            for d in rows
        ],
    )


@app.command()
def show(dataset_id: DatasetId, as_json: JsonFlag = False) -> None:
    """Show one dataset."""
    out = Output(as_json)
    with Client() as client:
        dataset = client.datasets.get(dataset_id)
    out.json(dataset)
    out.table(
        ["dataset", dataset["id"]],
        [
            ("name", dataset["name"]),
            ("status", dataset["status"]),
            ("format", dataset["format"]),
            ("classes", ", ".join(dataset["classes"] or []) or None),
            *((f"split {name}", _counts(split)) for name, split in (dataset["splits"] or {}).items()),
            ("content", dataset["content_hash"]),
            ("size", size(dataset["size_bytes"])),
            ("created", dataset["created_at"]),
        ],
    )
    if dataset["failure"]:
        out.failure(f"{dataset['id']} is {dataset['status']}", dataset["failure"])


@app.command()
def report(dataset_id: DatasetId, as_json: JsonFlag = False) -> None:
    """Show the report of a dataset's check: counts by class and split, and problems."""
    out = Output(as_json)
    with Client() as client:
        found = client.datasets.report(dataset_id)
    out.json(found)
    _show_report(out, found)


@app.command()
def delete(dataset_id: DatasetId, as_json: JsonFlag = False) -> None:
    """Delete a dataset that no job refers to."""
    out = Output(as_json)
    with Client() as client:
        client.datasets.delete(dataset_id)
    out.json({"id": dataset_id, "deleted": True})
    out.line(f"{dataset_id} deleted")


def _report_if_any(client: Client, dataset_id: str) -> Report | None:
    """Return the report; None if the check ended before it wrote one."""
    try:
        return client.datasets.report(dataset_id)
    except ApiError as error:
        if error.status != 404:
            raise
        return None


def _counts(split: Any) -> str:
    return f"{split['images']} images, {split['boxes']} boxes"


def _show_report(out: Output, report: Report) -> None:
    dropped, most = percent(report["dropped_fraction"]), percent(report["max_dropped_fraction"])
    if report["images"] is not None:
        out.line(f"{report['format']}: {_counts(report)}, {dropped} dropped (limit {most})")
    splits = list(report["splits"])
    out.table(
        ["class", *(f"{split} boxes" for split in splits)],
        [
            (found["name"], *(found["splits"].get(split, {}).get("boxes", 0) for split in splits))
            for found in report["classes"]
        ],
    )
    for problem in report["problems"]:
        out.line(f"{problem['severity']}: {problem['summary']} ({problem['code']}, {problem['count']} times)")
        for example in problem["examples"][:3]:
            out.line(f"    {example['file']}: {example['detail']}")


def _exit_by_status(out: Output, dataset: Dataset) -> None:
    if dataset["status"] in ("invalid", "failed"):
        out.failure(f"{dataset['id']} is {dataset['status']}", dataset["failure"])
        raise typer.Exit(FAILED)
