"""`defeat jobs …`."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Annotated, cast

import typer
import yaml

from defeat.cli.console import FAILED, INTERRUPTED, JsonFlag, Output, ap, percent, queued, seconds, size
from defeat.cli.datasets import Limit
from defeat.cli.watching import JobView, show_results
from defeat.client.client import Client
from defeat.client.errors import InvalidInput
from defeat.client.specs import load_spec
from defeat.client.types import Artifact, Job, JobStatus, RetryFrom

app = typer.Typer(no_args_is_help=True, help="Distillations.")

JobId = Annotated[str, typer.Argument(metavar="ID", help="job_…")]
SpecFile = Annotated[Path, typer.Argument(metavar="SPEC", help="YAML file with the job spec.")]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY.PATH=VALUE", help="Change a value of the spec, e.g. schedule.epochs=3; may be repeated."
    ),
]


@app.command()
def submit(
    spec: SpecFile,
    changes: Changes = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Show progress until the job ends; exit with 0 only if it succeeds.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Submit a job. Without --wait, exit with 0 once the server has accepted it."""
    out = Output(as_json)
    with Client() as client:
        job = client.jobs.submit(load_spec(spec, changes or []))
        if wait:
            _follow(out, client, job["id"])
        else:
            out.json(job)
            out.line(job["id"], job["status"])


@app.command()
def validate(spec: SpecFile, changes: Changes = None, as_json: JsonFlag = False) -> None:
    """Validate a job spec and print it with every default, without creating a job."""
    out = Output(as_json)
    with Client() as client:
        resolved = client.jobs.validate(load_spec(spec, changes or []))
    out.json(resolved)
    out.line(yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True).rstrip())


@app.command("list")
def list_(
    status: Annotated[str | None, typer.Option(help="queued, preparing, running, succeeded, …")] = None,
    dataset: Annotated[str | None, typer.Option(metavar="ID", help="Only jobs on this dataset.")] = None,
    name: Annotated[str | None, typer.Option(help="Only jobs whose name contains this.")] = None,
    limit: Limit = 20,
    as_json: JsonFlag = False,
) -> None:
    """List jobs, newest first."""
    out = Output(as_json)
    with Client() as client:
        rows = list(islice(client.jobs.list(status=cast(JobStatus, status), dataset=dataset, name=name), limit))
    out.json(rows)
    out.table(
        ["id", "name", "status", "done", "ETA", "student AP", "created"],
        [
            (
                job["id"],
                job["name"],
                job["status"],
                percent(job["progress"]["fraction"]) if job["progress"] else None,
                seconds(job["progress"]["eta_s"]) if job["progress"] else None,
                ap(((job["results"] or {}).get("student") or {}).get("ap")),
                job["created_at"],
            )
            for job in rows
        ],
    )


@app.command()
def show(job_id: JobId, as_json: JsonFlag = False) -> None:
    """Show one job, its spec, its results and its files."""
    out = Output(as_json)
    with Client() as client:
        job = client.jobs.get(job_id)
        artifacts = client.jobs.artifacts(job_id)
    out.json({**job, "artifacts": artifacts})
    progress = job["progress"]
    out.table(
        ["job", job["id"]],
        [
            ("name", job["name"]),
            ("status", job["status"]),
            *([("queue", queued(job["queue"]))] if job["queue"] else []),
            ("priority", job["priority"]),
            ("progress", f"{progress['phase']}, {percent(progress['fraction'])}" if progress else None),
            ("attempt", job["attempt"]),
            *([("tried again at", job["not_before"])] if job["not_before"] else []),
            *([("adjusted", yaml.safe_dump(job["adjustments"]).strip())] if job["adjustments"] else []),
            ("dataset", job["dataset_id"]),
            *((f"label {key}", value) for key, value in job["labels"].items()),
            ("created", job["created_at"]),
            ("started", job["started_at"]),
            ("finished", job["finished_at"]),
        ],
    )
    show_results(out, job)
    out.table(["file", "kind", "size"], [(a["name"], a["kind"], size(a["size_bytes"])) for a in artifacts])
    if job["failure"]:
        out.failure(f"{job['id']} {job['status']}", job["failure"])


@app.command()
def watch(job_id: JobId, as_json: JsonFlag = False) -> None:
    """Show a job's progress until it ends; exit with 0 only if it succeeds."""
    with Client() as client:
        _follow(Output(as_json), client, job_id)


@app.command(context_settings={"ignore_unknown_options": True})
def priority(
    job_id: JobId,
    value: Annotated[int, typer.Argument(metavar="N", min=-100, max=100, help="-100 to 100; higher begins first.")],
    as_json: JsonFlag = False,
) -> None:
    """Set a job's priority."""
    out = Output(as_json)
    with Client() as client:
        job = client.jobs.set_priority(job_id, value)
    out.json(job)
    out.line(job["id"], job["status"], f"priority {job['priority']}")
    if job["queue"] is not None:
        out.line(queued(job["queue"]))


@app.command()
def cancel(job_id: JobId, as_json: JsonFlag = False) -> None:
    """Cancel a job; a running one saves its work first."""
    with Client() as client:
        _show_status(Output(as_json), client.jobs.cancel(job_id))


@app.command()
def pause(job_id: JobId, as_json: JsonFlag = False) -> None:
    """Pause a job until it is resumed; a running one saves a checkpoint first."""
    with Client() as client:
        _show_status(Output(as_json), client.jobs.pause(job_id))


@app.command()
def resume(job_id: JobId, as_json: JsonFlag = False) -> None:
    """Queue a paused job again, to continue from its last checkpoint."""
    with Client() as client:
        _show_status(Output(as_json), client.jobs.resume(job_id))


@app.command()
def retry(
    job_id: JobId,
    start: Annotated[
        str | None,
        typer.Option("--from", metavar="checkpoint|beginning", help="Default: the last checkpoint if there is one."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Queue another attempt of a job that failed or was cancelled."""
    if start not in (None, "checkpoint", "beginning"):
        raise InvalidInput(f"--from must be checkpoint or beginning; got {start!r}")
    with Client() as client:
        _show_status(Output(as_json), client.jobs.retry(job_id, start=cast(RetryFrom | None, start)))


def _show_status(out: Output, job: Job) -> None:
    out.json(job)
    out.line(job["id"], job["status"])


@app.command()
def download(
    job_id: JobId,
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Default: the best student.")] = None,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Directory to write to.")] = Path(),
    as_json: JsonFlag = False,
) -> None:
    """Download a job's files; resumes an interrupted download."""
    out = Output(as_json)
    written = []
    with Client() as client:
        for name in names or [_best_student(job_id, client.jobs.artifacts(job_id))]:
            with out.transfer(f"downloading {name}") as on_progress:
                path = client.jobs.download(job_id, name, _target(output, name), on_progress)
            out.line(path)
            written.append({"name": name, "path": str(path)})
    out.json({"id": job_id, "files": written})


def _follow(out: Output, client: Client, job_id: str) -> None:
    """Show a job until it ends; exit 0 only if it succeeded."""
    try:
        with JobView(out) as view:
            for update in client.jobs.watch(job_id):
                out.json({"object": "update", **update})
                view.show(update)
                job: Job = update["job"]
    except KeyboardInterrupt:
        out.errors.print(
            f"\n{job_id} continues on the server: `defeat jobs watch {job_id}` shows it again, "
            f"`defeat jobs pause {job_id}` pauses it, `defeat jobs cancel {job_id}` cancels it"
        )
        raise typer.Exit(INTERRUPTED) from None
    out.json(job)
    show_results(out, job)
    if job["status"] != "succeeded":
        out.failure(f"{job_id} {job['status']}", job["failure"])
        raise typer.Exit(FAILED)


def _best_student(job_id: str, artifacts: Sequence[Artifact]) -> str:
    students = [artifact["name"] for artifact in artifacts if artifact["kind"] == "student"]
    if not students:
        raise InvalidInput(f"{job_id} has no student yet; `defeat jobs show {job_id}` lists its files")
    return next((name for name in students if "best" in name), students[0])


def _target(directory: Path, name: str) -> Path:
    """Return the path for an artifact. Raises `InvalidInput` for a name that points outside the directory."""
    parts = PurePosixPath(name).parts
    if not parts or parts[0] == "/" or ".." in parts or "\\" in name or ":" in name:
        raise InvalidInput(f"the artifact's name {name!r} points outside {directory}; it was not downloaded")
    return directory.joinpath(*parts)
