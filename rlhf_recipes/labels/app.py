"""The page's server: signing in, the next task, saving and undoing."""

import asyncio
import hashlib
import hmac
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from rlhf_recipes.errors import RecipeError
from rlhf_recipes.labels.groups import MOST_COMPLETIONS, Group
from rlhf_recipes.labels.guard import Guard
from rlhf_recipes.labels.shown import Shown
from rlhf_recipes.labels.store import (
    LONGEST_DEMONSTRATION,
    LONGEST_NAME,
    LONGEST_NOTE,
    AlreadyLabelledError,
    BadLabelError,
    KnownNameError,
    Label,
    Store,
)

import uvicorn
from fastapi import Depends, FastAPI, Header, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from pydantic import BaseModel, ConfigDict, Field

PAGE = Path(__file__).parent / "page"
_STATUS = {BadLabelError: 400, AlreadyLabelledError: 409, KnownNameError: 409}
_KINDS = {AlreadyLabelledError: "labelled", KnownNameError: "known"}  # errors that the page can do something about


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class SignIn(_Strict):
    """Who wants to label."""

    name: str = Field(max_length=LONGEST_NAME)
    password: str = Field(default="", max_length=1000)
    known: bool = False


class Submission(_Strict):
    """A label as the page sends it: ranks are of the completions in the order shown; without them it is a skip."""

    id: str
    submission: str = Field(min_length=16, max_length=64)
    ranks: list[int | None] | None = Field(max_length=MOST_COMPLETIONS)
    demonstration: str = Field(max_length=LONGEST_DEMONSTRATION)
    note: str = Field(max_length=LONGEST_NOTE)


def make_server(store: Store, password: str = "", names: Iterable[str] = (), addresses: bool = False) -> uvicorn.Server:
    """What serves the page, guarded, on a socket that listens (`run(sockets=[...])`).

    Args:
        store: where groups come from and labels go.
        password: what labellers must give to sign in; none where empty.
        names: host names under which the page is reached, besides localhost.
        addresses: whether it is reached under other addresses than loopback.
    """
    config = uvicorn.Config(
        Guard(create_app(store, password), frozenset(name.lower() for name in names), addresses),
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=5,
    )
    return uvicorn.Server(config)


def create_app(store: Store, password: str = "", delay: float = 1.0) -> FastAPI:
    """The application over a store.

    Args:
        store: where groups come from and labels go.
        password: what labellers must give to sign in; none where empty.
        delay: seconds for which a wrong password holds up all that come after it.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    guesses = asyncio.Lock()

    def session(token: str) -> str:
        """What the store keeps of a session: no token that could be used, and none that outlives its password."""
        return hashlib.sha256(f"{password}\0{token}".encode()).hexdigest()

    def signed_in(authorization: Annotated[str, Header()] = "") -> str:
        name = store.signed_in(session(authorization.removeprefix("Bearer ")))
        if name is None:
            raise HTTPException(401, "Sign in again: this session is not known here.")
        return name

    Labeller = Annotated[str, Depends(signed_in)]  # noqa: N806, a type

    def shown(group: Group, name: str) -> Shown:
        return Shown(group, name, store.seed)

    def task(group: Group | None, name: str) -> dict[str, Any]:
        mine, left = store.progress(name)
        content = group and shown(group, name).page(store.withdrawn(name, group.id))
        return {"task": content, "mine": mine, "left": left}

    @app.post("/api/session")
    async def sign_in(asked: SignIn) -> dict[str, str]:
        if password and not asked.password:
            raise HTTPException(401, "The password, please.")
        async with guesses:  # one at a time, so that guessing takes as long as it takes
            if not hmac.compare_digest(asked.password.encode(), password.encode()) and password:
                await asyncio.sleep(delay)
                raise HTTPException(401, "That is not the password.")
        token = secrets.token_urlsafe(32)
        return {"name": store.sign_in(asked.name, session(token), asked.known), "token": token}

    @app.post("/api/task")  # it claims what it returns, so it is no GET
    def next_task(name: Labeller) -> dict[str, Any]:
        return task(store.claim(name), name)

    @app.post("/api/label")
    def save(sent: Submission, name: Labeller) -> dict[str, bool]:
        ranks = sent.ranks
        if ranks is not None:
            try:
                ranks = shown(store.group(sent.id), name).ranks_of_group(ranks)
            except ValueError:
                raise BadLabelError("not as many ranks as answers are shown") from None
        store.save(Label(sent.id, name, ranks, sent.demonstration, sent.note), sent.submission)
        return {"saved": True}

    @app.post("/api/undo")
    def undo(name: Labeller) -> dict[str, Any]:
        label = store.undo(name)
        if label is None:
            raise BadLabelError("There is nothing to undo.")
        return task(store.group(label.group), name)

    for path, file in (("/", "label.html"), ("/label.js", "label.js"), ("/label.css", "label.css")):
        app.get(path)(lambda file=file: FileResponse(PAGE / file))

    @app.exception_handler(RecipeError)
    def explain(_: Request, error: RecipeError) -> JSONResponse:
        return _error(_STATUS.get(type(error), 503), str(error), _KINDS.get(type(error), ""))

    @app.exception_handler(HTTPException)
    def refuse(_: Request, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, error.detail, "sign in" if error.status_code == 401 else "")

    @app.exception_handler(RequestValidationError)
    def reject(_: Request, error: RequestValidationError) -> JSONResponse:
        problem = error.errors()[0]
        return _error(422, f"{'.'.join(str(part) for part in problem['loc'][1:])}: {problem['msg']}")

    return app


def _error(status: int, text: str, kind: str = "") -> JSONResponse:
    return JSONResponse({"error": text, "kind": kind}, status)
