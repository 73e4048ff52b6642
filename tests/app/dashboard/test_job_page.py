"""A job's page: live progress, curves, classes, gallery, downloads, cancelling and failures."""

import json
import re
from datetime import timedelta
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, expect

from app.models import Artifact, Dataset, Job, JobEvaluation, JobMetric
from tests.app.dashboard.conftest import Complaints, Service, wait_until
from tests.support.dashboard_rows import Seeder

DETECTOR = {"architecture": "faster_rcnn", "backbone": "timm/resnet18"}
# Resolves when nothing has been loaded for a moment.
QUIET = """new Promise((resolve) => {
  let timer = setTimeout(resolve, 400);
  new PerformanceObserver(() => { clearTimeout(timer); timer = setTimeout(resolve, 400); }).observe({type: "resource"});
})"""


@pytest.fixture
def running_job(service: Service) -> str:
    """The id of a running job of this test's own, without metrics."""
    with service.database.write() as session:
        dataset = session.get_one(Dataset, service.seeded.dataset)
        seeder = Seeder(session, service.storage, service.seeded.tenant_id)
        progress = {"phase": "distillation", "epoch": 1, "epochs": 12, "step": 0, "steps": 312, "fraction": 0.1}
        return seeder.job("live", dataset, status="running", age=timedelta(seconds=9), attempt=1, progress=progress).id


def open_job(page: Page, job_id: str) -> None:
    page.goto(f"/jobs/{job_id}")


def curves(page: Page, chart: str) -> dict[str, dict[str, Any]]:
    """Wait until the chart is drawn; return what Plotly drew, by name."""
    page.wait_for_selector(f"#{chart} .trace", state="attached")
    data = page.evaluate(f"document.querySelector('#{chart}').data.map(({{name, x, y}}) => ({{name, x, y}}))")
    return {trace["name"]: trace for trace in data}


def test_the_head_shows_state_and_progress(page: Page, service: Service) -> None:
    open_job(page, service.seeded.running)
    expect(page.locator("#status")).to_have_text("Running")
    expect(page.locator("#phase")).to_have_text("Distilling the student")
    expect(page.locator("#fraction")).to_have_text("68 %")
    for name, text in {"epoch": "7 / 12", "step": "177 / 312", "rate": "41.6", "eta": "10 min 12 s"}.items():
        expect(page.locator(f"#fact-{name}")).to_have_text(text)
    expect(page.locator("#fact-elapsed")).to_have_text(re.compile(r"^2\d min \d\d s$"))


@pytest.mark.parametrize(
    ("teacher", "text"),
    [
        (
            {"source": "pretrained", "detector": "fasterrcnn_resnet50_fpn", "weights": "COCO_V1"},
            "resnet50_fpn, COCO_V1",
        ),
        ({"source": "checkpoint", "id": "ckpt_1", "detector": DETECTOR}, "faster rcnn, timm/resnet18"),
    ],
)
def test_a_teacher_that_is_not_trained_is_named_and_has_no_losses(
    teacher: dict[str, Any], text: str, page: Page, service: Service, running_job: str
) -> None:
    with service.database.write() as session:
        job = session.get_one(Job, running_job)
        job.spec = {**job.spec, "teacher": teacher}
    open_job(page, running_job)
    expect(page.locator(".facts-line")).to_contain_text(text)
    expect(page.locator("#loss-subject")).to_be_hidden()


def test_the_losses_are_drawn_by_part_for_teacher_and_student(page: Page, service: Service) -> None:
    open_job(page, service.seeded.succeeded)
    student = curves(page, "loss-chart")
    assert next(iter(student)) == "total"
    assert {"classifier", "box reg", "neck object", "neck background", "head object"} <= set(student)
    with service.database.read() as session:
        logged = session.query(JobMetric).filter_by(job_id=service.seeded.succeeded, subject="student")
        expected = [(row.step, row.values["loss/total"]) for row in logged.order_by(JobMetric.step)]
    assert list(zip(student["total"]["x"], student["total"]["y"], strict=True)) == expected
    page.get_by_role("button", name="Teacher", exact=True).click()
    wait_until(page, "!document.querySelector('#loss-chart').data.some(({name}) => name === 'neck object')")
    assert "classifier" in curves(page, "loss-chart")
    page.get_by_role("button", name="Log").click()
    wait_until(page, "document.querySelector('#loss-chart').layout.yaxis.type === 'log'")
    expect(page.get_by_role("button", name="Log")).to_have_attribute("aria-pressed", "true")


def test_the_shares_of_the_gradient_add_up(page: Page, service: Service) -> None:
    open_job(page, service.seeded.succeeded)
    page.get_by_role("button", name="Gradient").click()
    wait_until(page, "document.querySelector('#loss-chart').data?.[0].stackgroup === 'shares'")
    drawn = curves(page, "loss-chart")
    assert {"classifier", "neck object", "head background"} <= set(drawn)
    assert "total" not in drawn
    for shares in zip(*(curve["y"] for curve in drawn.values()), strict=True):
        assert sum(shares) == pytest.approx(1)


def test_a_teacher_in_training_shows_its_own_losses(page: Page, service: Service) -> None:
    open_job(page, service.seeded.at_teacher)
    expect(page.get_by_role("button", name="Teacher", exact=True)).to_have_attribute("aria-pressed", "true")
    assert "neck object" not in curves(page, "loss-chart")


def test_the_accuracy_is_drawn_with_the_teacher_as_a_line(page: Page, service: Service) -> None:
    open_job(page, service.seeded.succeeded)
    drawn = curves(page, "map-chart")
    with service.database.read() as session:
        rows = session.query(JobEvaluation).filter_by(job_id=service.seeded.succeeded).order_by(JobEvaluation.epoch)
        student = [row.metrics for row in rows if row.subject == "student"]
        teacher = [row.metrics for row in rows if row.subject == "teacher"][-1]
    assert drawn["Student AP"]["x"] == list(range(1, 13))
    assert drawn["Student AP"]["y"] == [metrics["ap"] for metrics in student]
    assert drawn["Student AP50"]["y"] == [metrics["ap50"] for metrics in student]
    assert set(drawn["Teacher AP"]["y"]) == {teacher["ap"]}
    assert (drawn["Teacher AP"]["x"][0], drawn["Teacher AP"]["x"][-1]) == (0, 12)
    expect(page.locator("#map-chart")).to_have_attribute(
        "aria-label", re.compile(f"epoch 12 is {student[-1]['ap']:.3f}")
    )


def test_tiles_and_classes_compare_student_and_teacher(page: Page, service: Service) -> None:
    open_job(page, service.seeded.succeeded)
    with service.database.read() as session:
        results = session.get_one(Job, service.seeded.succeeded).results
    assert results is not None
    student, teacher = results["student"], results["teacher"]
    expect(page.locator("#tile-student")).to_have_text(f"{student['ap']:.3f}")
    expect(page.locator("#tile-share")).to_have_text(f"{100 * student['ap'] / teacher['ap']:.0f} %")
    rows = page.locator("#classes tr")
    for number, (ours, theirs) in enumerate(zip(student["per_class"], teacher["per_class"], strict=True)):
        expect(rows.nth(number)).to_contain_text(ours["class"])
        expect(rows.nth(number)).to_contain_text(f"{ours['ap']:.3f}")
        expect(rows.nth(number)).to_contain_text(f"{theirs['ap']:.3f}")
        bars = rows.nth(number).locator(".ap-bar")
        ratio = bars.nth(0).bounding_box()["width"] / bars.nth(1).bounding_box()["width"]  # type: ignore[index]
        assert ratio == pytest.approx(ours["ap"] / theirs["ap"], abs=0.01)
    page.get_by_role("button", name="Student AP").click()
    best = max(student["per_class"], key=lambda row: row["ap"])
    expect(rows.first).to_contain_text(best["class"])
    expect(page.locator("th[aria-sort=descending]")).to_have_text("Student AP")


def test_measured_masks_are_shown(page: Page, service: Service) -> None:
    with service.database.write() as session:
        job = session.get_one(Job, service.seeded.succeeded)
        plain = job.results
        assert plain is not None
        masks = {"student": {"ap50": 0.25}, "teacher": {"ap50": 0.5}}
        job.results = plain | {subject: {**plain[subject], "masks": numbers} for subject, numbers in masks.items()}
    try:
        open_job(page, service.seeded.succeeded)
        expect(page.locator("#tile-ap50-note")).to_have_text("masks 0.250 / 0.500")
    finally:
        with service.database.write() as session:
            session.get_one(Job, service.seeded.succeeded).results = plain


def gallery_of(service: Service) -> dict[str, Any]:
    with service.database.read() as session:
        row = session.query(Artifact).filter_by(job_id=service.seeded.succeeded, name="gallery.json").one()
    return json.loads(b"".join(service.storage.stream(row.storage_key)))


def pixel_box(shown: Locator, rect: Locator, width: int) -> list[float]:
    """Return where a drawn outline lies on its image, in pixels of the image."""
    image = shown.locator("img").bounding_box()
    box = rect.evaluate("(e) => { const b = e.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; }")
    origin = shown.locator("img").evaluate("(e) => { const b = e.getBoundingClientRect(); return [b.left, b.top]; }")
    assert image is not None
    scale = width / image["width"]
    return [(value - origin[number % 2]) * scale for number, value in enumerate(box)]


def test_the_gallerys_boxes_lie_where_they_belong(page: Page, service: Service) -> None:
    open_job(page, service.seeded.succeeded)
    images = gallery_of(service)["images"]
    expect(page.locator("#gallery .image")).to_have_count(len(images))
    shown, image = page.locator("#gallery .image").first, images[0]
    wait_until(page, "document.querySelector('#gallery img').naturalWidth === 320")
    outlines = shown.locator(".truth rect:not(.halo)")
    expect(outlines).to_have_count(len(image["truth"]))
    for number, truth in enumerate(image["truth"]):
        # The outline's own width counts in: allow for its two pixels.
        assert pixel_box(shown, outlines.nth(number), 320) == pytest.approx(truth["box"], abs=2.5)


def test_toggles_and_threshold_choose_what_is_drawn(page: Page, service: Service) -> None:
    open_job(page, service.seeded.succeeded)
    image = gallery_of(service)["images"][0]
    shown = page.locator("#gallery .image").first
    teacher, student = shown.locator(".teacher rect:not(.halo)"), shown.locator(".student rect:not(.halo):visible")
    expect(teacher.first).to_be_hidden()
    page.get_by_label("Teacher", exact=True).check()
    expect(teacher.first).to_be_visible()
    expect(student).to_have_count(sum(box["score"] >= 0.5 for box in image["student"]))
    page.get_by_label("Minimum score").fill("0.8")
    expect(page.locator("#threshold-value")).to_have_text("0.80")
    expect(student).to_have_count(sum(box["score"] >= 0.8 for box in image["student"]))
    page.get_by_label("Student", exact=True).uncheck()
    expect(student).to_have_count(0)
    expect(shown.locator(".truth rect:not(.halo):visible")).to_have_count(len(image["truth"]))


def test_an_image_opens_large_with_its_labels(page: Page, service: Service) -> None:
    open_job(page, service.seeded.succeeded)
    image = gallery_of(service)["images"][0]
    page.get_by_role("button", name=f"Enlarge {image['name']}").click()
    viewer = page.get_by_role("dialog")
    expect(viewer.locator("#viewer-name")).to_have_text(image["name"])
    expect(viewer.locator(".student text:visible").first).to_have_text(re.compile(r"^(RBC|WBC|Platelets) 0\.\d\d$"))
    page.keyboard.press("Escape")
    expect(viewer).to_be_hidden()


def test_files_are_listed_and_come_whole(page: Page, service: Service) -> None:
    open_job(page, service.seeded.succeeded)
    rows = page.locator("#downloads tbody tr")
    expect(rows).to_have_count(5)
    best = rows.filter(has_text="student-best.safetensors")
    expect(best).to_contain_text("1.5 MB")
    with page.expect_download() as download:
        best.get_by_role("link").click()
    assert download.value.suggested_filename == "student-best.safetensors"
    assert download.value.path().read_bytes() == b"\x08" * 1_482_116


def test_a_failure_shows_class_code_detail_and_log(page: Page, service: Service) -> None:
    open_job(page, service.seeded.failed)
    panel = page.locator("#failure")
    expect(panel).to_contain_text("out_of_memory")
    expect(panel).to_contain_text("lower schedule.batch_size")
    expect(panel.locator("pre")).to_contain_text("torch.OutOfMemoryError")
    expect(page.get_by_role("button", name="Cancel job")).to_be_disabled()


def test_cancelling_asks_first(page: Page, service: Service, running_job: str) -> None:
    open_job(page, running_job)
    page.get_by_role("button", name="Cancel job").click()
    page.get_by_role("button", name="Keep running").click()
    expect(page.locator("#status")).to_have_text("Running")
    page.get_by_role("button", name="Cancel job").click()
    page.get_by_role("button", name="Cancel the job").click()
    expect(page.locator("#status")).to_have_text("Cancelling")
    expect(page.get_by_role("button", name="Cancel job")).to_be_disabled()
    with service.database.read() as session:
        assert session.get_one(Job, running_job).status == "cancelling"


def test_a_job_is_paused_resumed_and_retried(page: Page, service: Service, running_job: str) -> None:
    def _leave(status: str) -> None:
        with service.database.write() as session:
            session.get_one(Job, running_job).status = status

    status, button = page.locator("#status"), lambda name: page.get_by_role("button", name=name, exact=True)
    open_job(page, running_job)
    expect(button("Resume")).to_be_hidden()
    button("Pause").click()
    expect(status).to_have_text("Pausing")
    expect(page.locator("#phase")).to_have_text("Saving a checkpoint before pausing")
    expect(button("Pause")).to_be_hidden()
    _leave("paused")
    button("Resume").click()
    expect(status).to_have_text("Queued")
    _leave("failed")
    expect(status).to_have_text("Failed")
    button("Retry").click()
    expect(status).to_have_text("Queued")
    expect(button("Retry")).to_be_hidden()
    expect(page.locator("#events")).to_contain_text("the job is retried")


def test_a_rejected_action_shows_why(page: Page, running_job: str, complaints: Complaints) -> None:
    complaints.expected = ["409 (Conflict)"]
    open_job(page, running_job)
    page.route("**/pause", lambda route: route.fulfill(status=409, json={"detail": "it is cancelling"}))
    page.get_by_role("button", name="Pause", exact=True).click()
    expect(page.locator("#action-error")).to_have_text("it is cancelling")


def log_steps(service: Service, job_id: str, steps: range, value: float) -> None:
    with service.database.write() as session:
        for step in steps:
            values = {"loss/total": value, "loss/box_reg": None}
            session.merge(JobMetric(job_id=job_id, subject="student", step=step, epoch=step / 26, values=values))


def test_curves_grow_while_the_job_runs_and_polling_ends_with_it(
    page: Page, service: Service, running_job: str
) -> None:
    open_job(page, running_job)
    expect(page.locator("#loss-empty")).to_be_visible()
    log_steps(service, running_job, range(3), 2.0)
    assert curves(page, "loss-chart")["total"]["x"] == [0, 1, 2]
    log_steps(service, running_job, range(3, 5), 1.0)
    wait_until(page, "document.querySelector('#loss-chart').data[0].x.length === 5")
    assert curves(page, "loss-chart")["total"]["y"] == [2, 2, 2, 1, 1]
    with page.expect_response(lambda response: response.url.endswith("/artifacts?limit=100")):
        with service.database.write() as session:
            session.get_one(Job, running_job).status = "succeeded"
        expect(page.locator("#status")).to_have_text("Succeeded")
    page.evaluate(QUIET)
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    # A poll that has not ended would ask at once.
    page.evaluate("window.dispatchEvent(new Event('online'))")
    page.evaluate(QUIET)
    assert requests == []


def test_another_attempt_replaces_what_the_first_logged(page: Page, service: Service, running_job: str) -> None:
    log_steps(service, running_job, range(1, 6), 2.0)
    open_job(page, running_job)
    assert curves(page, "loss-chart")["total"]["y"] == [2, 2, 2, 2, 2]
    log_steps(service, running_job, range(3, 5), 1.5)
    with service.database.write() as session:
        session.get_one(Job, running_job).attempt = 2
    wait_until(page, "document.querySelector('#loss-chart').data[0].y.includes(1.5)")
    assert curves(page, "loss-chart")["total"]["y"] == [2, 2, 1.5, 1.5, 2]
    expect(page.locator("#fact-attempt")).to_have_text("2")


def test_the_resolved_spec_is_shown_as_yaml(page: Page, service: Service) -> None:
    open_job(page, service.seeded.succeeded)
    page.get_by_text("Resolved spec").click()
    expect(page.locator(".spec code")).to_contain_text("neck_background_weight: 16.0")
