"""Fixtures of the tests of the labelling page."""

import contextlib
import threading

from rlhf_recipes.feedback.labels import Store
from rlhf_recipes.feedback.labels.app import make_server
from rlhf_recipes.feedback.labels.server import listen, url_of

import pytest


class Site:
    """A store with its server in this process."""

    def __init__(self, path, groups, password="", delay=0.2):
        self.store = Store(path, overlap=1.0)
        self.execute = self.store._database.execute
        self.execute("PRAGMA synchronous = OFF")  # faster; tests need not survive a power cut
        self.store.add(groups)
        self.listener = listen("127.0.0.1", 0, password)
        self.url = url_of(self.listener)
        self.port = self.listener.getsockname()[1]
        self.server = make_server(self.store, password, names=["labels.example"], delay=delay)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})
        self.thread.start()

    def close(self):
        self.server.should_exit = True
        self.thread.join()
        self.store.close()

    def labels(self):
        return {(label.labeller, label.group): label for label in self.store.labels()}


@pytest.fixture
def serve(tmp_path):
    """`serve(groups, password, delay)` starts a site, which ends with the test."""
    with contextlib.ExitStack() as sites:

        def start(*options, **more):
            site = Site(tmp_path / "labels.sqlite", *options, **more)
            sites.callback(site.close)
            return site

        yield start
