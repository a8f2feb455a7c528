"""Which thread's training a watch follows: one at a time, and another only when that one has fallen silent."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from gradwatch.capture import home as module
from gradwatch.capture.home import PAUSE, Home


class Time:
    """A clock that stands until it is moved."""

    now = 100.0

    def perf_counter(self) -> float:
        """Seconds."""
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    """The clock that `Home` reads."""
    clock = Time()
    monkeypatch.setattr(module, "time", clock)
    return clock


def never() -> bool:
    raise AssertionError("asked where it is known")


def elsewhere(do: Callable[[], object]) -> object:
    """What `do` returns in another thread, a new one each time."""
    result: list[object] = []
    thread = threading.Thread(target=lambda: result.append(do()))
    thread.start()
    thread.join(60)
    return result[0]


def settled() -> Home:
    home = Home()
    assert home.takes(lambda: True)
    return home


def test_it_is_at_home_where_it_was_made(time: Time) -> None:
    home = Home()
    assert home.here()
    assert elsewhere(home.here) is False


def test_it_settles_with_the_first_backward_that_reaches_the_model(time: Time) -> None:
    home = Home()
    for _ in range(100):
        assert not home.takes(lambda: False), "one of another model"
    assert home.takes(lambda: True)
    for _ in range(3):
        time.now += 10 * PAUSE
        assert home.takes(never), "from then on all of them are its own"


def test_a_model_that_is_trained_in_another_thread_than_the_watch_was_made_in_is_followed_there(time: Time) -> None:
    home = Home()

    def train() -> tuple[bool, bool, bool]:
        return home.takes(lambda: False), home.takes(lambda: True), home.here()

    assert elsewhere(train) == (False, True, True)
    assert not home.here()
    assert not home.takes(never), "here nobody trains it"


def test_another_thread_is_not_even_looked_at_while_its_own_is_busy(time: Time) -> None:
    home = settled()
    for _ in range(5):
        time.now += PAUSE / 2
        assert elsewhere(lambda: home.takes(never)) is False
        assert home.takes(never)
    assert home.here()


def test_it_moves_when_its_own_thread_has_fallen_silent(time: Time) -> None:
    home = settled()
    time.now += PAUSE
    assert elsewhere(lambda: (home.takes(lambda: False), home.here())) == (False, False), "a stranger's model is none of its"
    assert home.here()
    assert elsewhere(lambda: (home.takes(lambda: True), home.here(), home.takes(never))) == (True, True, True)
    assert not home.here()
    assert not home.takes(never)
    time.now += PAUSE
    assert home.takes(lambda: True), "and back"


def test_a_strange_thread_is_looked_at_ever_more_seldom(time: Time) -> None:
    home = settled()
    time.now += 10 * PAUSE
    asked: list[int] = []

    def strange() -> None:
        for i in range(1000):
            assert not home.takes(lambda i=i: bool(asked.append(i)))  # type: ignore[func-returns-value, misc]

    elsewhere(strange)
    assert asked[:5] == [0, 1, 2, 3, 4]
    assert 5 < len(asked) < 60
    assert asked[-1] > 900, "but it is not forgotten"
