"""The list of jobs: live, filtered, by pages, whatever the names hold and whether or not the server answers."""

import re
from datetime import timedelta

import pytest
from playwright.sync_api import BrowserContext, Locator, Page, Route, expect

from app.models import Dataset, Job
from tests.app.dashboard.conftest import Complaints, Service, sign_in
from tests.support.dashboard_rows import Seeder

HOSTILE = "<script>window.hacked=1</script><img src=x onerror=window.hacked=1>{{7*7}}</script>"


@pytest.fixture
def moving_job(service: Service) -> str:
    """The id of a job of this test's own, queued."""
    with service.database.write() as session:
        dataset = session.get_one(Dataset, service.seeded.dataset)
        seeder = Seeder(session, service.storage, service.seeded.tenant_id)
        return seeder.job("moving", dataset, status="queued", age=timedelta(seconds=1)).id


def row(page: Page, job_id: str) -> Locator:
    return page.locator(f'#jobs tr[data-key="{job_id}"]')


def test_a_row_shows_a_jobs_progress_and_accuracy(page: Page, service: Service) -> None:
    page.goto("/jobs")
    running = row(page, service.seeded.running)
    expect(running).to_contain_text("cells-mobilenet-defeat-decoupled")
    expect(running).to_contain_text("Distilling the student · epoch 7 / 12")
    expect(running).to_contain_text("10 min 12 s left")
    expect(running.locator("progress")).to_have_attribute("value", "0.683")
    expect(running.locator(".badge")).to_have_class("badge running")
    with service.database.read() as session:
        results = session.get_one(Job, service.seeded.succeeded).results
    assert results is not None
    done = row(page, service.seeded.succeeded).locator(".pair").first
    expect(done).to_have_text(f"{results['student']['ap']:.3f} / {results['teacher']['ap']:.3f}")
    expect(row(page, service.seeded.baseline).locator(".pair").first).to_have_text(re.compile(r"^0\.\d{3} / \u2013$"))


def test_a_change_shows_without_a_reload_and_keeps_the_focus(page: Page, service: Service, moving_job: str) -> None:
    page.goto("/jobs")
    expect(row(page, moving_job).locator(".badge")).to_have_text("Queued")
    page.evaluate("window.notReloaded = true")
    row(page, moving_job).get_by_role("link").focus()
    with service.database.write() as session:
        job = session.get_one(Job, moving_job)
        job.status = "running"
        job.progress = {"phase": "teacher", "epoch": 3, "epochs": 9, "fraction": 0.25, "eta_s": 90.0}
    expect(row(page, moving_job).locator(".badge")).to_have_text("Running")
    expect(row(page, moving_job)).to_contain_text("Training the teacher · epoch 3 / 9")
    expect(row(page, moving_job)).to_contain_text("1 min 30 s left")
    expect(row(page, moving_job).get_by_role("link")).to_be_focused()
    assert page.evaluate("window.notReloaded")


def test_filters_by_status_and_name_and_keeps_them_in_the_address(page: Page, service: Service) -> None:
    page.goto("/jobs")
    page.get_by_label("Status").select_option("failed")
    expect(page.locator("#jobs tbody tr")).to_have_count(1)
    expect(page).to_have_url(re.compile(r"/jobs\?status=failed$"))
    page.get_by_label("Status").select_option("")
    page.get_by_label("Name").fill("SWEEP-07")
    expect(page).to_have_url(re.compile(r"/jobs\?name=SWEEP-07$"))
    expect(page.locator("#jobs tbody tr")).to_have_count(1)
    page.reload()
    expect(page.get_by_label("Name")).to_have_value("SWEEP-07")
    expect(page.locator("#jobs tbody tr")).to_have_count(1)
    page.get_by_label("Name").fill("no such job")
    expect(page.get_by_role("heading", name="No job matches")).to_be_visible()


def test_turns_pages_and_comes_back(page: Page) -> None:
    page.goto("/jobs")
    expect(page.locator("#jobs tbody tr")).to_have_count(20)
    expect(page.get_by_role("link", name="Newest")).to_be_hidden()
    first = page.locator("#jobs tbody tr a").all_inner_texts()
    page.get_by_role("link", name="Older").click()
    expect(page.get_by_role("link", name="Newest")).to_be_visible()
    second = page.locator("#jobs tbody tr a").all_inner_texts()
    assert not set(first) & set(second)
    expect(page.get_by_role("link", name="Older")).to_be_hidden()
    page.get_by_role("link", name="Newest").click()
    expect(page).to_have_url(re.compile("/jobs$"))


def test_combined_methods_are_named_together(page: Page, service: Service) -> None:
    with service.database.write() as session:
        dataset = session.get_one(Dataset, service.seeded.dataset)
        job = Seeder(session, service.storage, service.seeded.tenant_id).job(
            "combined", dataset, status="queued", age=timedelta(0)
        )
        members = [{"method": "defeat", "weight": 1.0}, {"method": "pkd", "weight": 0.5}]
        job.spec = {**job.spec, "distillation": members}
    page.goto("/jobs")
    expect(row(page, job.id)).to_contain_text("defeat + pkd")
    row(page, job.id).get_by_role("link").click()
    expect(page.locator(".facts-line")).to_contain_text("defeat + pkd")
    page.goto("about:blank")  # the page asks for its job again and again
    with service.database.write() as session:
        session.delete(session.get_one(Job, job.id))


def test_hostile_names_are_shown_as_text(page: Page, service: Service) -> None:
    with service.database.write() as session:
        dataset = session.get_one(Dataset, service.seeded.dataset)
        seeder = Seeder(session, service.storage, service.seeded.tenant_id)
        job = seeder.job(HOSTILE, dataset, status="queued", age=timedelta(0), labels={"<b>team</b>": HOSTILE})
        seeder.event(job, "info", "note", HOSTILE, job.created_at)
    page.goto("/jobs")
    expect(row(page, job.id).get_by_role("link")).to_have_text(HOSTILE)
    expect(row(page, job.id)).to_contain_text("<b>team</b>: <script>")
    row(page, job.id).get_by_role("link").click()
    expect(page.get_by_role("heading", level=1)).to_have_text(HOSTILE)
    expect(page.locator("#events")).to_contain_text(HOSTILE)
    expect(page).to_have_title(f"{HOSTILE} · defeat")
    assert page.evaluate("window.hacked") is None
    with service.database.write() as session:
        session.delete(session.get_one(Job, job.id))


def test_the_page_reports_an_unreachable_server_and_recovers(
    page: Page, service: Service, moving_job: str, complaints: Complaints
) -> None:
    complaints.expected = ["net::ERR_FAILED"]
    page.goto("/jobs")
    banner = page.locator("#connection")
    expect(banner).to_be_hidden()

    def _away(route: Route) -> None:
        route.abort()

    page.route("**/v1/jobs*", _away)
    expect(banner).to_contain_text("Cannot reach the server; retrying.")
    expect(row(page, moving_job)).to_be_visible()
    with service.database.write() as session:
        session.get_one(Job, moving_job).status = "cancelled"
    page.unroute("**/v1/jobs*", _away)
    expect(row(page, moving_job).locator(".badge")).to_have_text("Cancelled")
    expect(banner).to_be_hidden()


def test_without_jobs_the_page_shows_how_to_start(visitor: BrowserContext, service: Service) -> None:
    key_id, _ = service.new_key("newcomers")
    sign_in(visitor, service, key_id)
    page = visitor.new_page()
    page.goto("/jobs")
    expect(page.get_by_role("heading", name="No jobs yet")).to_be_visible()
    expect(page.locator("#no-jobs code")).to_contain_text("defeat jobs submit")
    page.goto("/datasets")
    expect(page.get_by_role("heading", name="No datasets yet")).to_be_visible()
    expect(page.locator("#no-datasets code")).to_contain_text("defeat datasets add")


@pytest.mark.parametrize(
    "path", ["/jobs", "/jobs/{succeeded}", "/jobs/{failed}", "/jobs/{queued}", "/datasets", "/datasets/{dataset}"]
)
def test_a_phone_needs_no_sideways_scrolling(path: str, page: Page, service: Service) -> None:
    page.set_viewport_size({"width": 360, "height": 780})
    page.goto(path.format_map(vars(service.seeded)))
    expect(page.locator("main .badge:visible").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
