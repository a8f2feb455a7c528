from __future__ import annotations

import sys
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def as_if_nothing_was_ever_compiled() -> None:
    """Once something has been compiled in a process, no update is traced as it runs there: others must not be concerned by it."""
    utils: Any = sys.modules.get("torch._dynamo.utils")
    if utils is not None:
        utils.counters.clear()
