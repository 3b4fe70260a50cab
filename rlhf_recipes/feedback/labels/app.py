"""The page's server: signing in, the next task, saving and undoing."""

import asyncio
import hashlib
import hmac
import logging
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.feedback.labels.groups import MOST_COMPLETIONS, Group
from rlhf_recipes.feedback.labels.guard import OriginGuard
from rlhf_recipes.feedback.labels.store import (
    LONGEST_DEMONSTRATION,
    LONGEST_NAME,
    LONGEST_NOTE,
    AlreadyLabelledError,
    BadLabelError,
    KnownNameError,
    Label,
    Store,
)
from rlhf_recipes.feedback.labels.task_view import TaskView

import uvicorn
from fastapi import FastAPI, Header, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from pydantic import BaseModel, ConfigDict, Field

logger = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page"
_STATUS = {BadLabelError: 400, AlreadyLabelledError: 409, KnownNameError: 409}
_KINDS = {AlreadyLabelledError: "labelled", KnownNameError: "known"}  # errors that the page can do something about


Authorization = Annotated[str, Header()]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class SignIn(_Strict):
    """Who wants to label."""

    name: str = Field(max_length=LONGEST_NAME)
    password: str = Field(default="", max_length=1000)
    known: bool = False


class Submission(_Strict):
    """A label as the page sends it: ranks are of the completions in the order shown; without them it is a skip."""

    id: str = Field(min_length=1)  # with a limit, a text that UTF-8 cannot hold is refused too
    submission: str = Field(min_length=16, max_length=64)
    ranks: list[int | None] | None = Field(max_length=MOST_COMPLETIONS)
    demonstration: str = Field(max_length=LONGEST_DEMONSTRATION)
    note: str = Field(max_length=LONGEST_NOTE)


class Undo(_Strict):
    """Which label is to be undone: the one that the page was told is the newest."""

    label: int | None = Field(default=None, ge=1, le=2**63 - 1)


def make_server(
    store: Store, password: str = "", names: Iterable[str] = (), addresses: bool = False, delay: float = 1.0
) -> uvicorn.Server:
    """What serves the page, guarded, on a socket that listens (`run(sockets=[...])`).

    Args:
        store: where groups come from and labels go.
        password: what labellers must give to sign in; none where empty.
        names: host names under which the page is reached, besides localhost.
        addresses: whether it is reached under other addresses than loopback.
        delay: seconds for which a wrong password holds up all that come after it.
    """
    config = uvicorn.Config(
        OriginGuard(create_app(store, password, delay), frozenset(name.lower() for name in names), addresses),
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


def create_app(store: Store, password: str, delay: float) -> FastAPI:
    """The application over a store; the arguments are those of `Desk`."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    desk = Desk(store, password, delay)
    # All are POST, since all change something: the next task is claimed.
    for path, answer in (("session", desk.sign_in), ("task", desk.next_task), ("label", desk.save), ("undo", desk.undo)):
        app.post(f"/api/{path}")(answer)
    for path, file in (("/", "label.html"), ("/label.js", "label.js"), ("/label.css", "label.css")):
        app.get(path)(_page(file))
    app.exception_handler(RecipeError)(desk.explain)
    app.exception_handler(HTTPException)(_refuse)
    app.exception_handler(RequestValidationError)(_reject)
    return app


def _page(file: str) -> Callable[[], FileResponse]:
    """What answers with a file of the page. It takes no argument: FastAPI would read one from the address."""
    return lambda: FileResponse(PAGE / file)


class Desk:
    """What the page asks for.

    Args:
        store: where groups come from and labels go.
        password: what labellers must give to sign in; none where empty.
        delay: seconds for which a wrong password holds up all that come after it.
    """

    def __init__(self, store: Store, password: str, delay: float) -> None:
        self.store, self.password, self.delay = store, password, delay
        self._guesses = asyncio.Lock()

    async def sign_in(self, asked: SignIn) -> dict[str, str]:
        """A token for a session, and the name under which it labels."""
        if self.password:
            await self._check_password(asked.password)
        token = secrets.token_urlsafe(32)
        # In a thread: while the store waits for the disk, others are answered
        name = await run_in_threadpool(self.store.sign_in, asked.name, self._session(token), asked.known)
        return {"name": name, "token": token}

    def next_task(self, authorization: Authorization = "") -> dict[str, Any]:
        """The group to label now, or none."""
        name = self._labeller(authorization)
        return self._task(self.store.claim(name), name)

    def save(self, sent: Submission, authorization: Authorization = "") -> dict[str, bool]:
        """Says that a label is saved, when it is."""
        name, ranks = self._labeller(authorization), sent.ranks
        if ranks is not None:
            try:
                ranks = self._shown(self.store.group(sent.id), name).ranks_of_group(ranks)
            except ValueError:
                raise BadLabelError("not as many ranks as answers are shown") from None
        self.store.save(Label(sent.id, name, ranks, sent.demonstration, sent.note), sent.submission)
        return {"saved": True}

    def undo(self, asked: Undo, authorization: Authorization = "") -> dict[str, Any]:
        """The group of the label that was undone, to be labelled again."""
        name = self._labeller(authorization)
        label = asked.label and self.store.undo(name, asked.label)
        if not label:
            raise BadLabelError("There is nothing to undo.")
        return self._task(self.store.group(label.group), name)

    async def _check_password(self, given: str) -> None:
        if not given:
            raise HTTPException(401, "The password, please.")
        async with self._guesses:  # one at a time, so that guessing many takes long
            if not hmac.compare_digest(given.encode(), self.password.encode()):
                await asyncio.sleep(self.delay)
                raise HTTPException(401, "That is not the password.")

    def _session(self, token: str) -> str:
        """What the store keeps of a session: no token that could be used, and none that outlives its password."""
        return hashlib.sha256(f"{self.password}\0{token}".encode()).hexdigest()

    def _labeller(self, authorization: str) -> str:
        name = self.store.signed_in(self._session(authorization.removeprefix("Bearer ")))
        if name is None:
            raise HTTPException(401, "Sign in again: this session is not known here.")
        return name

    def _shown(self, group: Group, name: str) -> TaskView:
        return TaskView(group, name, self.store.seed)

    def _task(self, group: Group | None, name: str) -> dict[str, Any]:
        mine, left = self.store.progress(name)
        content = group and self._shown(group, name).page(self.store.withdrawn(name, group.id))
        held = 0 if group else self.store.held(name)
        return {"task": content, "mine": mine, "left": left, "held": held, "newest": self.store.newest(name)}

    def explain(self, _: Request, error: RecipeError) -> JSONResponse:
        """What went wrong, without the path of the store, which is nothing to labellers."""
        status = _STATUS.get(type(error), 503)
        if status == 503:
            logger.error("%s", error)
        return _error(status, str(error).removeprefix(f"{self.store.path}: "), _KINDS.get(type(error), ""))


def _refuse(_: Request, error: HTTPException) -> JSONResponse:
    return _error(error.status_code, error.detail, "sign in" if error.status_code == 401 else "")


def _reject(_: Request, error: RequestValidationError) -> JSONResponse:
    problem = error.errors()[0]
    return _error(422, f"{'.'.join(str(part) for part in problem['loc'][1:])}: {problem['msg']}")


def _error(status: int, text: str, kind: str = "") -> JSONResponse:
    return JSONResponse({"error": text, "kind": kind}, status)
