"""The dashboard's pages. A page is rendered with the API's answer; its script then polls the API for updates."""

from typing import Annotated, Any, Literal

import yaml
from fastapi import APIRouter, Depends, Form, Header, Query, Request, Response
from pydantic import BaseModel

from app.dashboard import assets
from app.dashboard.pages import HOME, PageRoute, own_page, redirect, render
from app.datasets.endpoints import get_dataset, list_datasets
from app.errors import NotFound
from app.http.auth import SESSION_COOKIE, SESSION_S, CurrentCaller, check_same_origin, find_caller, start_session
from app.http.dependencies import DatabaseDep, SettingsDep
from app.http.pagination import PageQuery, page_query
from app.http.problems import problems
from app.jobs.endpoints import get_job, list_jobs
from app.jobs.schemas import JobStatus
from app.request_models import Line
from app.states import JOB_MOVES
from app.workers.endpoints import list_workers

router = APIRouter(include_in_schema=False)
pages = APIRouter(route_class=PageRoute, include_in_schema=False)

PageQueryDep = Annotated[PageQuery, Depends(page_query)]


@router.get("/assets/{version}/{name}", responses=problems(NotFound))
def get_asset(version: str, name: str, accept_encoding: Annotated[str, Header()] = "") -> Response:
    """Serve a style sheet, a script or an image. Its URL changes with its content, so browsers may cache it."""
    return assets.respond(version, name, accept_encoding)


@pages.get("/")
def root() -> Response:
    """Redirect to the jobs."""
    return redirect(HOME)


@pages.get("/login")
def login_page(next_page: Annotated[str, Query(alias="next")] = HOME) -> Response:
    """Show the form for an API key."""
    return _login_form(next_page)


@pages.post("/login")
def log_in(
    request: Request,
    database: DatabaseDep,
    settings: SettingsDep,
    key: Annotated[str, Form()] = "",
    next_page: Annotated[str, Form(alias="next")] = HOME,
) -> Response:
    """Start a session with an API key. Only from the dashboard's own form: no other site may sign a user in."""
    check_same_origin(request)
    with database.read() as session:
        caller = find_caller(session, settings, key.strip())
    if caller is None:
        error = "This key is unknown or has been revoked. A key begins with dk_ and has 46 characters."
        return _login_form(next_page, error=error, status=401)
    response = redirect(own_page(next_page))
    start_session(response, request, settings, caller.key_id)
    return response


@pages.post("/logout")
def log_out(request: Request) -> Response:
    """Delete this browser's session cookie."""
    check_same_origin(request)
    response = redirect("/login")
    response.delete_cookie(SESSION_COOKIE, path="/", httponly=True, samesite="lax")
    return response


def _login_form(next_page: str, *, error: str = "", status: int = 200) -> Response:
    return render(
        "login.html",
        status=status,
        signed_in=False,
        next=own_page(next_page),
        error=error,
        session_hours=SESSION_S // 3600,
    )


def _data(resource: BaseModel) -> dict[str, Any]:
    """Return a resource exactly as the API would send it."""
    return resource.model_dump(mode="json", by_alias=True)


@pages.get("/jobs")
def jobs_page(
    caller: CurrentCaller,
    database: DatabaseDep,
    settings: SettingsDep,
    page: PageQueryDep,
    name: Annotated[Line, Query()] = "",
    status: JobStatus | Literal[""] = "",
) -> Response:
    """List jobs. The filter's form also sends its empty fields, which do not filter."""
    found = list_jobs(caller, database, settings, page, status=status or None, dataset=None, name=name or None)
    filters = {"name": name, "status": status}
    return render("jobs.html", section="jobs", initial=_data(found), filters=filters, statuses=list(JOB_MOVES))


@pages.get("/jobs/{job_id}")
def job_page(job_id: str, caller: CurrentCaller, database: DatabaseDep, settings: SettingsDep) -> Response:
    """Show a job."""
    job = _data(get_job(job_id, caller, database, settings))
    spec = job["spec"]
    return render(
        "job.html",
        section="jobs",
        initial=job,
        job=job,
        method=_methods(spec["distillation"]),
        teacher=spec["teacher"] and _detector(spec["teacher"]),
        student=_detector(spec["student"]),
        spec_yaml=yaml.safe_dump(spec, sort_keys=False, allow_unicode=True),
        plotly=assets.url(assets.PLOTLY),
        plotly_map_style_id=assets.PLOTLY_MAP_STYLE_ID,
    )


def _methods(distillation: dict[str, Any] | list[dict[str, Any]]) -> str:
    """Return the name of the method, or of all combined methods: "defeat + pkd"."""
    chosen = distillation if isinstance(distillation, list) else [distillation]
    return " + ".join(one["method"] for one in chosen)


def _detector(side: dict[str, Any]) -> str:
    """Describe a teacher or student briefly; a pretrained teacher's detector is the name of its preset."""
    detector = side["detector"]
    if isinstance(detector, str):
        return f"{detector}, {side['weights']}"
    return f"{detector['architecture'].replace('_', ' ')}, {detector['backbone']}"


@pages.get("/datasets")
def datasets_page(caller: CurrentCaller, database: DatabaseDep, page: PageQueryDep) -> Response:
    """List datasets."""
    return render("datasets.html", section="datasets", initial=_data(list_datasets(caller, database, page)))


@pages.get("/datasets/{dataset_id}")
def dataset_page(dataset_id: str, caller: CurrentCaller, database: DatabaseDep) -> Response:
    """Show a dataset."""
    dataset = _data(get_dataset(dataset_id, caller, database))
    return render("dataset.html", section="datasets", initial=dataset, dataset=dataset)


@pages.get("/workers")
def workers_page(caller: CurrentCaller, database: DatabaseDep, settings: SettingsDep) -> Response:
    """List workers."""
    return render("workers.html", section="workers", initial=_data(list_workers(caller, database, settings)))


router.include_router(pages)
