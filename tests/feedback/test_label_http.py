"""The server of the labelling page over plain HTTP: what it rejects, and what it does not reveal."""

import asyncio
import contextlib
import http.client
import json
import re
import socket
import time

from rlhf_recipes.feedback.labels import Group
from rlhf_recipes.feedback.labels.app import PAGE, shown_order
from rlhf_recipes.feedback.labels.guard import MAX_BODY, SECURITY_HEADERS, OriginGuard

import pytest
from starlette.exceptions import HTTPException

GROUP = Group("g1", "Question 1?", ["one", "two", "three", "four"], [f"secret-{number}" for number in range(4)])


def request(site, path="/", method="GET", body=None, **headers):
    """Return status, headers and text of the response."""
    connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=20)
    headers = {"host": f"127.0.0.1:{site.port}"} | headers
    headers = {name.replace("_", "-"): value for name, value in headers.items() if value is not None}
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    if content is not None:
        headers = {"content-type": "application/json", "content-length": str(len(content))} | headers
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders(content)
    reply = connection.getresponse()
    text = reply.read().decode()
    connection.close()
    return reply.status, {name.lower(): value for name, value in reply.getheaders()}, text


def sign_in(site, name="anna", **more):
    status, _, text = request(site, "/api/session", "POST", {"name": name} | more)
    return status, json.loads(text)


def test_every_response_has_the_security_headers(serve):
    site = serve([GROUP])
    replies = [request(site, path) for path in ("/", "/label.js", "/label.css", "/nothing", "/docs", "/openapi.json")]
    replies += [request(site, "/api/task", "POST", {}), request(site, host="evil.example"), request(site, "/", "DELETE")]
    assert [status for status, _, _ in replies] == [200, 200, 200, 404, 404, 404, 401, 421, 411]
    for _, headers, _ in replies:
        assert {name: headers.get(name) for name in SECURITY_HEADERS} == SECURITY_HEADERS
        assert "access-control-allow-origin" not in headers
        assert "server" not in headers
    policy = dict(part.split(" ", 1) for part in SECURITY_HEADERS["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"


def test_only_the_files_of_the_page_can_be_read(serve):
    site = serve([GROUP])
    for value in ("bytes=abc", "bytes=9999999-"):
        assert request(site, "/label.js", range=value)[0] == 200
    for path in ("../app.py", "%2e%2e/app.py", "..%2fapp.py", "/etc/passwd", "%2fetc%2fpasswd", "../../../../pyproject.toml"):
        status, _, text = request(site, f"/{path}")
        assert (status, text) == (404, '{"detail":"Not Found"}'), path
    for path in ("/", "/label.js", "/label.css"):
        assert request(site, path)[2] == (PAGE / (path[1:] or "index.html")).read_text()
        assert request(site, f"{path}?file=../app.py")[2] == request(site, path)[2]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:{port}", 200),
        ("localhost:9000", 200),  # a tunnel
        ("[::1]:{port}", 200),
        ("LABELS.example", 200),
        ("evil.example", 421),
        ("evil.example:{port}", 421),
        ("127.0.0.1.evil.example", 421),
        ("evil.example@127.0.0.1:{port}", 421),
        ("192.168.0.7:{port}", 421),
        ("[", 421),
        ("", 421),
    ],
)
def test_other_host_names_are_rejected(serve, host, status):
    """In DNS rebinding a name of the attacker resolves to this machine; the browser still sends that name."""
    site = serve([GROUP])
    assert request(site, host=host.format(port=site.port))[0] == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"origin": "http://127.0.0.1:{port}"}, 200),
        ({"origin": "http://127.0.0.1:1"}, 403),
        ({"origin": "http://localhost:{port}"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://["}, 403),
        ({"sec_fetch_site": "cross-site"}, 403),
        ({"content_type": "text/plain"}, 422),  # a form of another site can send this without a preflight request
        ({"content_type": "application/json; charset=utf-8"}, 200),
    ],
)
def test_requests_of_other_sites_are_rejected(serve, headers, status):
    site = serve([GROUP])
    headers = {name: value.format(port=site.port) for name, value in headers.items()}
    assert request(site, "/api/session", "POST", {"name": "anna"}, **headers)[0] == status
    assert bool(site.execute("SELECT * FROM labellers")) == (status == 200)


def test_labels_are_validated_and_limited(serve):
    site = serve([GROUP])
    assert request(site, "/api/session", "POST", b" " * (MAX_BODY + 1))[0] == 413
    token = sign_in(site)[1]["token"]
    label = {"id": "g1", "submission": "s" * 16, "ranks": [1, 2, 3, 4], "demonstration": "", "note": ""}
    for change, status in (
        ({"note": "x" * 2001}, 422),
        ({"demonstration": "x" * 20_001}, 422),
        ({"ranks": [1] * 65}, 422),
        ({"ranks": [1, 2, 3]}, 400),
        ({"ranks": [1, 2, 3, 0]}, 400),
        ({"ranks": ["1", 2, 3, 4]}, 422),
        ({"id": "g2"}, 400),
        ({"id": "\ud800"}, 422),
        ({"id": ""}, 422),
        ({"labeller": "berta"}, 422),
        ({"note": "\ud800"}, 422),
        ({"demonstration": "\U0001f600" * 20_000}, 200),
    ):
        reply = request(site, "/api/label", "POST", label | change, authorization=f"Bearer {token}")
        assert (reply[0], bool(site.labels())) == (status, status == 200), change
        if status != 200:
            assert json.loads(reply[2])["detail"]
    assert sign_in(site, "x" * 61)[0] == 422


def test_every_request_needs_a_session(serve):
    site = serve([GROUP])
    sign_in(site)
    for path in ("task", "label", "undo"):
        body = {"id": "g1", "submission": "s" * 16, "ranks": None, "demonstration": "", "note": ""} if path == "label" else {}
        for authorization in (None, "Bearer ", "Bearer anna"):
            assert request(site, f"/api/{path}", "POST", body, authorization=authorization)[0] == 401
    assert not site.labels()


def test_a_new_password_ends_old_sessions(serve):
    site = serve([GROUP], password="correct horse")
    assert sign_in(site) == (401, {"detail": "The password, please."})
    assert sign_in(site, password="correct hors")[0] == 401
    status, session = sign_in(site, password="correct horse")
    assert status == 200
    options = {"method": "POST", "body": {}, "authorization": f"Bearer {session['token']}"}
    assert request(site, "/api/task", **options)[0] == 200
    site.close()
    other = serve([GROUP], password="another horse")
    assert request(other, "/api/task", **options)[0] == 401


def test_each_labeller_gets_a_fixed_random_order():
    orders = [[GROUP.completions[index] for (index,) in shown_order(GROUP, f"labeller {n}", "seed")] for n in range(40)]
    assert len(set(map(tuple, orders))) > 10
    assert all(sorted(order) == sorted(GROUP.completions) for order in orders)
    assert [GROUP.completions[index] for (index,) in shown_order(GROUP, "labeller 0", "seed")] == orders[0]


def test_ranks_are_in_the_order_shown_and_sources_stay_secret(serve):
    site = serve([Group("g", "Q", ["a", "b", "c", "b ", "d"], [f"secret-{number}" for number in range(5)])])
    token = sign_in(site)[1]["token"]

    def post(path, body):
        status, _, text = request(site, f"/api/{path}", "POST", body, authorization=f"Bearer {token}")
        assert (status, "secret" in text) == (200, False)
        return json.loads(text)

    shown = post("task", {})["task"]["completions"]
    assert sorted(shown) == ["a", "b", "c", "d"]
    ranks = [{"a": 1, "b": 2, "c": None, "d": 2}[text] for text in shown]
    post("label", {"id": "g", "submission": "s" * 16, "ranks": ranks, "demonstration": "", "note": "n"})
    assert site.labels()["anna", "g"].ranks == [1, 2, None, 2, 2]
    task = post("undo", {"label": post("task", {})["newest"]})["task"]
    assert task["before"] == {"ranks": ranks, "demonstration": "", "note": "n"}
    assert task["completions"] == shown


def test_a_wrong_password_waits_and_holds_no_right_one_back(serve, caplog):
    site = serve([GROUP], password="correct horse", delay=3.0)
    start, body = time.monotonic(), b'{"name": "eve", "password": "wrong"}'
    head = f"POST /api/session HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    with contextlib.ExitStack() as guesses:
        waiting = [guesses.enter_context(connect(site)) for _ in range(30)]
        for one in waiting:
            one.sendall(f"{head}\r\n\r\n".encode() + body)
        assert sign_in(site, password="correct horse")[0] == 200, "one after the other, they would take 90 seconds"
        assert all(b"401 Unauthorized" in one.recv(1000) for one in waiting)
    assert time.monotonic() - start >= 3.0
    assert "10 wrong passwords, the last one from 127.0.0.1" in caplog.text


# --- What is not a request of the page ----------------------------------------------------------------------------------


def connect(site):
    return socket.create_connection(("127.0.0.1", site.port), timeout=20)


def exchange(site, *parts):
    """Send bytes until the server closes the connection; return the number sent and the reply."""
    sent, reply = 0, b""
    with connect(site) as connection, contextlib.suppress(ConnectionError):
        for part in parts:
            connection.sendall(part)
            sent += len(part)
        while more := connection.recv(65536):
            reply += more
    return sent, reply


@pytest.mark.parametrize("method", ["POST", "GET", "DELETE"])
@pytest.mark.parametrize("length", ["", "content-length: 2\r\n"], ids=["alone", "with a length"])
def test_a_chunked_body_is_not_read(serve, method, length):
    site = serve([GROUP])
    head = f"{method} /api/session HTTP/1.1\r\nhost: localhost\r\n{length}transfer-encoding: chunked\r\n\r\n".encode()
    _, reply = exchange(site, head)
    assert (reply.split()[1], reply.partition(b"\r\n\r\n")[2][:10]) == (b"411", b'{"detail":')
    chunk = b"100000\r\n" + b" " * 2**20 + b"\r\n"
    sent, _ = exchange(site, head, *[chunk] * 64)
    assert sent < 32 * 2**20, "what the buffers of both sockets hold"


@pytest.mark.parametrize("length", ["9" * 20, str(MAX_BODY + 1)])
@pytest.mark.parametrize("method", ["POST", "GET"])
def test_a_long_body_is_refused_before_it_is_read(serve, method, length):
    head = f"{method} / HTTP/1.1\r\nhost: localhost\r\ncontent-length: {length}\r\n\r\n"
    assert exchange(serve([GROUP]), head.encode())[1].split()[1] == b"413"


def test_no_more_than_the_limit_is_read_whatever_the_headers_say():
    read = []

    async def app(scope, receive, send):
        while (message := await receive())["more_body"]:
            read.append(len(message["body"]))

    async def receive():
        return {"type": "http.request", "body": b" " * 2**16, "more_body": True}

    scope = {"type": "http", "method": "POST", "headers": [(b"host", b"localhost"), (b"content-length", b"2")]}
    with pytest.raises(HTTPException) as caught:
        asyncio.run(OriginGuard(app)(scope, receive, None))
    assert caught.value.status_code == 413
    assert sum(read) == MAX_BODY


@pytest.mark.parametrize(
    "body",
    [b"[" * 100_000, b'{"name":' * 30_000, b"1" * 5000, b'{"name": -' + b"9" * 5000 + b"}", b'{"name": "\xff"}'],
    ids=["lists", "objects", "number", "negative number", "not UTF-8"],
)
def test_json_that_cannot_be_read_is_one_detail(serve, body):
    status, headers, text = request(serve([GROUP]), "/api/session", "POST", body)
    assert (status, text, headers["x-frame-options"]) == (400, '{"detail":"body: JSON that cannot be read"}', "DENY")


@pytest.mark.parametrize(
    "head",
    ["GARBAGE", "GET / HTTP/1.1", "GET / HTTP/1.1\r\nhost: a\r\ncontent-length: x", "GET / HTTP/1.1\r\nhost: a\r\nhost: b"],
)
def test_what_is_not_http_is_one_detail(serve, head):
    head, _, text = exchange(serve([GROUP]), f"{head}\r\n\r\n".encode())[1].decode().partition("\r\n\r\n")
    assert (head.split()[1], json.loads(text)) == ("400", {"detail": "Invalid HTTP request received."})
    assert "x-frame-options: DENY" in head


def test_the_page_loads_nothing_from_elsewhere_and_evaluates_nothing():
    files = list(PAGE.iterdir())
    assert len(files) == 3
    for file in files:
        assert not re.search(r"https?://|innerHTML|eval\(", file.read_text())
