"""HTML pages: rendering, headers, and errors as pages instead of problem documents."""

import re
from collections.abc import Callable, Coroutine
from functools import cache
from typing import Any, Final
from urllib.parse import quote

from fastapi import Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.routing import APIRoute
from jinja2 import Environment, PackageLoader, StrictUndefined

from app.dashboard import assets
from app.errors import ServiceError, Unauthorized
from app.http.auth import SESSION_COOKIE
from app.http.problems import as_service_error

# No inline scripts or styles. Images are artifacts from this origin.
CONTENT_SECURITY_POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
        "base-uri 'none'",
    )
)
PAGE_HEADERS: Final = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
HOME: Final = "/jobs"
# Matches the dashboard's own pages only, so that no address of another site passes.
_OWN_PAGE: Final = re.compile(r"/(?:jobs|datasets|workers)(?:/[A-Za-z0-9_]{1,60})?(?:\?[A-Za-z0-9_.~%=&+-]{0,1000})?")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("app.dashboard"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["asset"] = assets.url
    return environment


def render(template: str, *, status: int = 200, signed_in: bool = True, section: str = "", **values: Any) -> Response:
    """Render a template.

    `signed_in` shows the navigation, and `section` is its current entry; `values` are the template's variables.
    """
    html = _environment().get_template(template).render(status=status, signed_in=signed_in, section=section, **values)
    return HTMLResponse(html, status_code=status)


def own_page(address: str) -> str:
    """Return `address` if it is one of the dashboard's pages, else the home page."""
    return address if _OWN_PAGE.fullmatch(address) else HOME


def redirect(address: str) -> Response:
    """Return a redirect that is followed with GET."""
    return RedirectResponse(address, status_code=303)


def _to_login(request: Request) -> Response:
    query = f"?{request.url.query}" if request.url.query else ""
    return redirect(f"/login?next={quote(own_page(request.url.path + query), safe='')}")


def _error_page(request: Request, error: ServiceError) -> Response:
    response = render(
        "error.html",
        status=error.status,
        signed_in=SESSION_COOKIE in request.cookies,
        title=error.title,
        detail=error.detail,
        mistakes=[mistake["detail"] for mistake in error.errors],
    )
    response.headers.update(error.headers)
    return response


class PageRoute(APIRoute):
    """A route for browsers: redirects to the sign-in page without a session, and renders errors as pages."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap FastAPI's own handler."""
        handler = super().get_route_handler()

        async def _handle(request: Request) -> Response:
            try:
                response = await handler(request)
            except Unauthorized:
                response = _to_login(request)
            except Exception as error:
                # The API's errors and logging; only the format differs.
                response = _error_page(request, as_service_error(error))
            response.headers.update(PAGE_HEADERS)
            return response

        return _handle
