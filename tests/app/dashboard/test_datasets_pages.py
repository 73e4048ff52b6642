"""The list of datasets and one dataset's page."""

from playwright.sync_api import Page, expect

from app.models import Dataset
from tests.app.dashboard.conftest import Service


def test_the_list_shows_state_and_size(page: Page, service: Service) -> None:
    page.goto("/datasets")
    row = page.locator(f'#datasets tr[data-key="{service.seeded.dataset}"]')
    for text in ("blood-cells", "Ready", "VOC", "364", "4,888", "7.4 MB", "train 205 · val 87 · test 72"):
        expect(row).to_contain_text(text)
    row.get_by_role("link").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("blood-cells")


def test_a_ready_dataset_shows_its_classes_splits_and_problems(page: Page, service: Service) -> None:
    page.goto(f"/datasets/{service.seeded.dataset}")
    expect(page.locator("#splits tr")).to_have_count(3)
    expect(page.locator("#splits-foot")).to_contain_text("2,805")
    expect(page.locator("#problems > li")).to_have_count(2)
    page.get_by_text("Examples: 2 of 2").click()
    expect(page.locator("#problems")).to_contain_text("Annotations/BloodImage_00338.xml")
    expect(page.locator("#fact-dropped")).to_have_text("0.0 % / 5.0 %")


def test_an_invalid_dataset_shows_why(page: Page, service: Service) -> None:
    page.goto(f"/datasets/{service.seeded.invalid_dataset}")
    expect(page.locator("#failure")).to_contain_text("31 % of the boxes are unusable")
    expect(page.locator("#problems .fatal").first).to_be_visible()


def test_a_check_that_ends_shows_without_a_reload(page: Page, service: Service) -> None:
    with service.database.read() as session:
        dataset_id = session.query(Dataset).filter_by(name="digits").one().id
        report = session.get_one(Dataset, service.seeded.dataset).report
    page.goto(f"/datasets/{dataset_id}")
    expect(page.locator("#state-note")).to_have_text("A worker is unpacking and checking it.")
    expect(page.locator("#splits-card")).to_be_hidden()
    with service.database.write() as session:
        row = session.get_one(Dataset, dataset_id)
        row.status, row.report = "ready", report
    expect(page.locator("#status")).to_have_text("Ready")
    expect(page.locator("#splits tr")).to_have_count(3)
