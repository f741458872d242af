"""The labelling page as a web application for browsers on this machine.

Other pages in the same browser are strangers: requests with a foreign Host (DNS rebinding) or Origin are refused, and
what changes something must be JSON from this page. The page is never told which image is whose: images are called by
question and side, and their pixels are encoded anew, so that neither names, sizes of files nor notes in them tell.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from fastapi.templating import Jinja2Templates
from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints

from attune.labelling.asking import (
    MAX_NAME,
    NoImage,
    NotNow,
    Session,
    annotator_name,
    image_png,
    save_answer,
    state,
    undo,
)

HERE = Path(__file__).parent
MAX_BODY = 10_000  # bytes of a request
SECURITY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",  # another session on the same port has other images
}


Name = Annotated[str, AfterValidator(annotator_name)]
Id = Annotated[str, StringConstraints(pattern="^[0-9a-f]{24}$")]


class AnswerBody(BaseModel):
    """An answer to the question that the page shows."""

    model_config = ConfigDict(extra="forbid")

    annotator: Name
    question: Id
    choice: Literal["left", "right", "tie", "bad"]


class UndoBody(BaseModel):
    """The wish to take the last answer back."""

    model_config = ConfigDict(extra="forbid")

    annotator: Name
    question: Id | None  # that the page shows; None after the last


def create_app(session: Session, port: int, when_done: Callable[[], None]) -> FastAPI:
    """The application.

    Args:
        session: what is asked.
        port: where it is served, which Host and Origin must name.
        when_done: called when an annotator has answered everything.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    templates = Jinja2Templates(HERE / "templates")
    app.mount("/static", StaticFiles(directory=HERE / "static"))

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = refusal(request, port) or await call_next(request)
        response.headers.update(SECURITY)
        return response

    @app.exception_handler(NotNow)
    def not_now(request: Request, error: NotNow) -> Response:
        return JSONResponse({"detail": "this is not the question that is to be answered now"}, 409)

    @app.get("/")
    def page(request: Request) -> HTMLResponse:
        values = {"annotator": session.annotator, "pairs": len(session.pairs), "max_name": MAX_NAME}
        return templates.TemplateResponse(request, "page.html", values)

    @app.get("/state")
    def read_state(annotator: Annotated[Name, Query()]) -> dict[str, Any]:
        return state(session, annotator)

    @app.get("/image/{question}/{side}")
    def read_image(question: Id, side: Literal["left", "right"], annotator: Annotated[Name, Query()]) -> Response:
        try:
            return Response(image_png(session, annotator, question, side), media_type="image/png")
        except NoImage as error:
            raise HTTPException(404, str(error)) from None

    @app.post("/answer")
    def write_answer(body: AnswerBody) -> dict[str, Any]:
        found = save_answer(session, body.annotator, body.question, body.choice)
        if found["question"] is None:
            when_done()
        return found

    @app.post("/undo")
    def write_undo(body: UndoBody) -> dict[str, Any]:
        return undo(session, body.annotator, body.question)

    return app


def refusal(request: Request, port: int) -> Response | None:
    """Why a request is refused; None where it is not."""
    headers, host = request.headers, request.headers.get("host", "")
    if host not in {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}:
        return JSONResponse({"detail": f"this page is http://127.0.0.1:{port}"}, 403)
    writes = request.method not in ("GET", "HEAD")
    if headers.get("origin", "" if writes else f"http://{host}") != f"http://{host}":
        return JSONResponse({"detail": "requests from other pages are refused"}, 403)
    if not writes:
        return None
    if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        return JSONResponse({"detail": "expected JSON"}, 415)
    length = headers.get("content-length", "")
    if not length.isdecimal() or int(length) > MAX_BODY:
        return JSONResponse({"detail": f"expected at most {MAX_BODY} bytes, and their number"}, 413)
    return None
