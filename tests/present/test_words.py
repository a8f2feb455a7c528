"""Numbers, places and endings in words."""

from __future__ import annotations

import pytest

from gradwatch.present import words


@pytest.mark.parametrize(
    ("count", "noun", "said"),
    [
        (1, "update", "1 update"),
        (0, "update", "0 updates"),
        (1, "backward pass", "1 backward pass"),
        (3, "backward pass", "3 backward passes"),
    ],
)
def test_a_count_has_its_plural(count: int, noun: str, said: str) -> None:
    assert words.plural(count, noun) == said


class Wrong(Exception):
    """Of the user's own."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        pytest.param(None, "", id="nothing"),
        pytest.param(ValueError("a long story"), "ValueError", id="an-exception"),
        pytest.param(Wrong(), "Wrong", id="of-the-users-own"),
        pytest.param(KeyboardInterrupt(), "KeyboardInterrupt", id="ctrl-c"),
        pytest.param(SystemExit(), "", id="exit"),
        pytest.param(SystemExit(0), "", id="exit-0"),
        pytest.param(SystemExit(False), "", id="exit-false"),
        pytest.param(SystemExit(3), "sys.exit(3)", id="exit-3"),
        pytest.param(SystemExit(True), "sys.exit(1)", id="exit-true"),
        pytest.param(SystemExit("no such file"), "sys.exit", id="exit-with-a-message"),
        pytest.param(GeneratorExit(), "", id="a-generator-closed"),
    ],
)
def test_what_stopped_a_run_is_named_by_its_kind(error: BaseException | None, said: str) -> None:
    assert words.stopper(error) == said
