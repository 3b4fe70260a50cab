"""Published models without a network, for all tests of memory plans."""

from rlhf_recipes.memory import estimator
from support import published

import pytest


@pytest.fixture(autouse=True)
def hub(monkeypatch):
    """Give plans the configurations of the models of configs/, as if there were a network."""
    monkeypatch.setattr(estimator, "load_config", published.load_config)
