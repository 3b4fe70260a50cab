"""The HTTP interface of the page: sign in, get a task, save and undo labels."""

import asyncio
import hashlib
import hmac
import logging
import random
import re
import secrets
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from rlhf_recipes.config.sample import MAX_COMPLETIONS
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.feedback.groups import Group
from rlhf_recipes.feedback.labels import label as rules
from rlhf_recipes.feedback.labels.guard import OriginGuard, Protocol
from rlhf_recipes.feedback.labels.label import InvalidLabelError, Label
from rlhf_recipes.feedback.labels.store import Store

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ConfigDict, Field

logger = logging.getLogger(__name__)
router = APIRouter(prefix="/api")
PAGE = Path(__file__).parent / "page"
_STATUS = {InvalidLabelError: 400, rules.AlreadyLabelledError: 409, rules.NameTakenError: 409}


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class SignIn(_Body):
    """A labeller's name, and the password of the page if it has one."""

    name: str = Field(max_length=rules.MAX_NAME)
    password: str = Field(default="", max_length=1000)
    known: bool = False


class Submission(_Body):
    """A label. Ranks are in the order shown; None is a skip."""

    id: str = Field(min_length=1)  # with a limit, pydantic rejects text that UTF-8 cannot hold
    submission: str = Field(min_length=16, max_length=64)
    ranks: list[int | None] | None = Field(max_length=MAX_COMPLETIONS)
    demonstration: str = Field(max_length=rules.MAX_DEMONSTRATION)
    note: str = Field(max_length=rules.MAX_NOTE)


class Undo(_Body):
    """The number of the label to undo, which the page received as the newest."""

    label: int | None = Field(default=None, ge=1, le=2**63 - 1)


def make_server(
    store: Store, password: str = "", names: Iterable[str] = (), any_address: bool = False, delay: float = 1.0
) -> uvicorn.Server:
    """Return the server of the page; start it with `run(sockets=[...])`.

    Args:
        store: of groups and labels.
        password: that labellers need to sign in; empty for none.
        names: as in `OriginGuard`.
        any_address: as in `OriginGuard`.
        delay: seconds until a wrong password is answered.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.state.store, app.state.password, app.state.delay, app.state.wrong_passwords = store, password, delay, 0
    app.include_router(router)
    app.mount("/", StaticFiles(directory=PAGE, html=True))
    app.exception_handler(RecipeError)(_recipe_error)
    app.exception_handler(RequestValidationError)(_validation_error)
    app.exception_handler(400)(_unreadable)
    options = {"loop": "asyncio", "http": Protocol, "ws": "none", "lifespan": "off", "log_level": "warning"}
    options |= {"access_log": False, "server_header": False, "proxy_headers": False, "timeout_graceful_shutdown": 5}
    return uvicorn.Server(uvicorn.Config(OriginGuard(app, names, any_address), **options))


# --- Endpoints: all POST, since all change something. Those that wait for the disk run in threads -----------------------


def _store(request: Request) -> Store:
    return request.app.state.store


def _labeller(
    request: Request, bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]
) -> str:
    name = bearer and _store(request).labeller_in(_session(request, bearer.credentials))
    if not name:
        raise HTTPException(401, "Sign in again: this session is not known here.")
    return name


StoreDependency = Annotated[Store, Depends(_store)]
Labeller = Annotated[str, Depends(_labeller)]


@router.post("/session")
async def sign_in(request: Request, body: SignIn) -> dict[str, str]:
    """Start a session and return its token and the name as stored."""
    if request.app.state.password:
        await _check_password(request, body.password)
    token = secrets.token_urlsafe(32)
    name = await run_in_threadpool(_store(request).start_session, body.name, _session(request, token), body.known)
    return {"name": name, "token": token}


@router.post("/task")
def next_task(store: StoreDependency, name: Labeller) -> dict[str, Any]:
    """Return the group to label now, if any."""
    return _task(store, store.claim(name), name)


@router.post("/label")
def save(store: StoreDependency, name: Labeller, body: Submission) -> dict[str, bool]:
    """Save a label. It is on the disk when this returns."""
    ranks = body.ranks
    if ranks is not None:
        shown = shown_order(store.group(body.id), name, store.seed)
        if len(ranks) != len(shown):
            raise InvalidLabelError("ranks: give one for each completion shown")
        rank_of = {index: rank for indices, rank in zip(shown, ranks, strict=True) for index in indices}
        ranks = [rank_of[index] for index in range(len(rank_of))]
    store.save(Label(body.id, name, ranks, body.demonstration, body.note), body.submission)
    return {"saved": True}


@router.post("/undo")
def undo(store: StoreDependency, name: Labeller, body: Undo) -> dict[str, Any]:
    """Undo a label and return its group, to be labelled again."""
    label = body.label and store.undo(name, body.label)
    if not label:
        raise InvalidLabelError("There is nothing to undo.")
    return _task(store, store.group(label.group), name)


def _task(store: Store, group: Group | None, name: str) -> dict[str, Any]:
    """Return how far a labeller is, and what the page shows of a group: never sources."""
    progress, newest = store.progress(name), store.newest(name)
    reply = {"task": None, "mine": progress.done, "left": progress.left, "held": progress.held, "newest": newest}
    if not group:
        return reply
    shown, texts, undone, before = shown_order(group, name, store.seed), group.texts(), store.withdrawn(name, group.id), None
    if undone:
        ranks = undone.ranks and [undone.ranks[indices[0]] for indices in shown]
        before = {"ranks": ranks, "demonstration": undone.demonstration or "", "note": undone.note or ""}
    task = {
        "id": group.id,
        "key": hashlib.sha256(f"{store.seed}/{name.casefold()}/{group.id}".encode()).hexdigest()[:16],  # of the draft
        "prompt": group.prompt if group.conversational else [{"role": "", "content": group.prompt}],
        "completions": [texts[indices[0]] for indices in shown],
        "before": before,
    }
    return reply | {"task": task, "held": 0}


def shown_order(group: Group, labeller: str, seed: str) -> list[list[int]]:
    """Return the completions in the order of a labeller: indices, equal ones together."""
    indices = defaultdict(list)
    for index, text in enumerate(group.texts()):
        indices[text].append(index)
    shown = list(indices.values())
    random.Random(f"{seed}/{labeller.casefold()}/{group.id}").shuffle(shown)
    return shown


async def _check_password(request: Request, password: str) -> None:
    state = request.app.state
    if not password:
        raise HTTPException(401, "The password, please.")
    if not hmac.compare_digest(password.encode(), state.password.encode()):
        state.wrong_passwords += 1
        if re.fullmatch("10+", str(state.wrong_passwords)):
            logger.warning("%d wrong passwords, the last one from %s", state.wrong_passwords, request.client.host)
        await asyncio.sleep(state.delay)  # holds back no other attempt: it may have the right one
        raise HTTPException(401, "That is not the password.")


def _session(request: Request, token: str) -> str:
    """Return a hash of token and password: another password ends the session."""
    return hashlib.sha256(f"{request.app.state.password}\0{token}".encode()).hexdigest()


def _recipe_error(request: Request, error: RecipeError) -> JSONResponse:
    """Answer without the path of the store. Log what labellers cannot fix."""
    status = _STATUS.get(type(error), 503)
    if status == 503:
        logger.error("%s", error)
    return JSONResponse({"detail": str(error).removeprefix(f"{_store(request).path}: ")}, status)


def _validation_error(_: Request, error: RequestValidationError) -> JSONResponse:
    """Answer without the input, which FastAPI repeats and UTF-8 may not hold."""
    problem = error.errors()[0]
    place = [] if problem["type"] == "json_invalid" else problem["loc"][1:]
    return JSONResponse({"detail": f"{'.'.join(map(str, place)) or 'body'}: {problem['msg']}"}, 422)


def _unreadable(_: Request, error: HTTPException) -> JSONResponse:
    """Answer where JSON is nested too deeply, has too long a number, or is not UTF-8."""
    return JSONResponse({"detail": "body: JSON that cannot be read"}, 400)
