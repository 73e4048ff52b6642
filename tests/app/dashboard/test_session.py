"""Signing in and out, and what the pages' headers and addresses allow."""

import re
from contextlib import suppress

import httpx2
import pytest
from playwright.sync_api import BrowserContext, expect
from playwright.sync_api import Error as PlaywrightError

from app.dashboard.pages import own_page
from app.http.auth import SESSION_COOKIE
from app.keys.service import revoke_key
from tests.app.dashboard.conftest import Complaints, Service, sign_in

SAME_ORIGIN = {"Sec-Fetch-Site": "same-origin"}


def test_signing_in_leads_to_the_page_that_was_asked_for(visitor: BrowserContext, service: Service) -> None:
    page = visitor.new_page()
    page.goto(f"/jobs/{service.seeded.queued}")
    expect(page).to_have_url(re.compile(r"/login\?next=%2Fjobs%2Fjob_"))
    page.get_by_label("API key").fill(service.key)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("cells-mobilenet-seed-1")
    (cookie,) = visitor.cookies()
    assert (cookie["name"], cookie["httpOnly"], cookie["sameSite"]) == (SESSION_COOKIE, True, "Lax")
    assert service.key not in cookie["value"]


def test_a_wrong_key_is_reported_and_changes_nothing(visitor: BrowserContext, complaints: Complaints) -> None:
    complaints.expected = ["401"]
    page = visitor.new_page()
    page.goto("/login")
    page.get_by_label("API key").fill("dk_" + "x" * 43)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).to_contain_text("unknown or has been revoked")
    expect(page.get_by_label("API key")).to_have_value("")
    assert visitor.cookies() == []


def test_signing_out_ends_the_session(visitor: BrowserContext, service: Service) -> None:
    sign_in(visitor, service, service.key_id)
    page = visitor.new_page()
    page.goto("/jobs")
    page.get_by_role("button", name="Sign out").click()
    expect(page).to_have_url(re.compile("/login$"))
    page.goto("/jobs")
    expect(page).to_have_url(re.compile("/login"))


def test_a_session_that_ends_on_an_open_page_leads_to_sign_in(
    visitor: BrowserContext, service: Service, complaints: Complaints
) -> None:
    complaints.expected = ["401"]
    key_id, key = service.new_key("short-lived")
    page = visitor.new_page()
    page.goto("/login")
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("heading", name="No jobs yet")).to_be_visible()
    with service.database.write() as session:
        revoke_key(session, key_id)
    with suppress(PlaywrightError):  # the page's own poll may lead to the sign-in page first
        page.evaluate("window.dispatchEvent(new Event('online'))")
    expect(page).to_have_url(re.compile(r"/login\?next=%2Fjobs$"))


@pytest.mark.parametrize(
    "address",
    [
        "//evil.example/jobs",
        "https://evil.example/jobs",
        "/\\evil.example",
        "/jobs/../../evil",
        "/\t/evil.example",
        "/jobs\r\nSet-Cookie: a=b",
        "javascript:alert(1)",
        "/jobs@evil.example",
        "/jobs/job_1#x",
        "",
    ],
)
def test_sign_in_leads_to_no_other_site(address: str, service: Service) -> None:
    assert own_page(address) == "/jobs"
    form = {"key": service.key, "next": address}
    response = httpx2.post(f"{service.url}/login", data=form, headers=SAME_ORIGIN, follow_redirects=False)
    assert (response.status_code, response.headers["location"]) == (303, "/jobs")


@pytest.mark.parametrize(
    "address", ["/jobs", "/jobs/job_01abc", "/datasets?after=eyJ", "/jobs?name=a%20b&status=failed"]
)
def test_sign_in_leads_back_to_the_dashboards_own_pages(address: str) -> None:
    assert own_page(address) == address


@pytest.mark.parametrize("path", ["/login", "/logout"])
def test_another_site_can_sign_nobody_in_or_out(path: str, service: Service) -> None:
    headers = {"Sec-Fetch-Site": "cross-site", "Cookie": f"{SESSION_COOKIE}={service.cookie(service.key_id)}"}
    response = httpx2.post(f"{service.url}{path}", data={"key": service.key}, headers=headers)
    assert response.status_code == 403
    assert "set-cookie" not in response.headers
    assert "Request from another site" in response.text


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/login", 200),
        ("/jobs", 200),
        ("/datasets", 200),
        ("/jobs/job_nope", 404),
        ("/jobs?status=odd", 422),
        ("/", 303),
    ],
)
def test_every_page_carries_the_strict_policy(path: str, status: int, service: Service) -> None:
    cookies = {SESSION_COOKIE: service.cookie(service.key_id)}
    response = httpx2.get(f"{service.url}{path}", cookies=cookies)
    assert response.status_code == status
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "data:" not in policy
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"<script(?![^>]*(src=|application/json))", response.text)
    assert " style=" not in response.text


@pytest.mark.parametrize("kind", ["job", "dataset"])
def test_another_tenants_page_is_not_found(kind: str, service: Service) -> None:
    key_id, _ = service.new_key("curious")
    row_id = service.seeded.succeeded if kind == "job" else service.seeded.dataset
    response = httpx2.get(f"{service.url}/{kind}s/{row_id}", cookies={SESSION_COOKIE: service.cookie(key_id)})
    assert response.status_code == 404
    assert response.headers["content-type"].startswith("text/html")
    assert "cells" not in response.text
