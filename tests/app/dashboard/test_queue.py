"""Where a queued job stands, its priority, and the list of workers."""

from datetime import timedelta

from playwright.sync_api import Page, expect

from app.models import Dataset, Job
from tests.app.dashboard.conftest import Service
from tests.app.workers.test_workers import worker
from tests.support.dashboard_rows import Seeder


def test_a_queued_job_shows_its_place_and_priority_moves_it(page: Page, service: Service) -> None:
    with service.database.write() as session:
        dataset = session.get_one(Dataset, service.seeded.dataset)
        seeder = Seeder(session, service.storage, service.seeded.tenant_id)
        job_id = seeder.job("last of all", dataset, status="queued", age=timedelta(seconds=1)).id
        session.get_one(Job, job_id).worker_label = "lab"
    page.goto(f"/jobs/{job_id}")
    expect(page.locator("#queue-place")).to_contain_text("ahead · waits for a worker")
    page.get_by_label("Priority").fill("9")
    page.get_by_role("button", name="Change").click()
    expect(page.locator("#fact-priority")).to_have_text("9")
    expect(page.locator("#queue-place")).to_contain_text("Next in the queue")
    expect(page.locator("#events")).to_contain_text("the priority was changed from 0 to 9")
    with service.database.write() as session:
        session.get_one(Job, job_id).status = "succeeded"
    expect(page.locator("#queue")).to_be_hidden()


def test_workers_are_listed_live(page: Page, service: Service) -> None:
    page.goto("/workers")
    expect(page.get_by_role("heading", name="No workers")).to_be_visible()
    with service.database.write() as session:
        session.add(worker("gpu@one", labels=["lab"], device="cuda", gpus=2, processes=2, gpu_memory_gb=80.0))
    row = page.locator("#workers tbody tr")
    for text in ("gpu@one", "Idle", "jobs", "lab", "2", "80 GB"):
        expect(row).to_contain_text(text)
    page.set_viewport_size({"width": 360, "height": 780})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
