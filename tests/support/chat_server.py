"""A chat model behind OpenAI's API on this machine."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

NOWHERE = "http://127.0.0.1:9/v1"  # the discard port, on which nothing listens


@contextlib.contextmanager
def chat_server(reply, statuses=(), cut_off=False):
    """Serve `reply(question)`; the first requests fail with `statuses`. Yields the URL and a list of the requests.

    With `cut_off` every reply ends in the middle.
    """
    failures, requests = list(statuses), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, self.headers.get("Authorization"), body))
            status = failures.pop(0) if failures else 200
            content = json.dumps({"choices": [{"message": {"content": reply(body["messages"][-1]["content"])}}]})
            content = content if status == 200 else "no such model"
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            if cut_off:
                self.send_header("Content-Length", str(len(content) + 1000))
            self.end_headers()
            self.wfile.write(content.encode())

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()
