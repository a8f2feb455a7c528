"""Numbers, places and endings in words."""

from __future__ import annotations

import re

import pytest

from gradwatch.present import words
from tests.present.runs import alert


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


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.2143, "×0.21"),
        (0.1, "×0.10"),
        (1.0, "×1.0"),
        (17.7, "×18"),
        (312.4, "×312"),
        (1e-5, "×1.0e-5"),
        (0.0, "×0"),
        (float("nan"), "-"),
        (float("inf"), "NaN/Inf"),
    ],
)
def test_a_factor_has_two_figures(value: float, said: str) -> None:
    assert words.factor(value) == said


def test_a_number_and_its_unit_stay_in_one_line_and_the_blank_between_is_a_plain_one() -> None:
    for width in range(12, 60):
        lines = words.wrapped("healthy after 500 updates; cost 1.5 ms an update, 0.6 % of it, 35 µs or 2 s in all", width, "  ")
        assert all(re.search(pair, "\n".join(lines)) for pair in ("1.5 ms", "0.6 %", "35 µs", "2 s"))
        assert all(line.isascii() or "µ" in line for line in lines)
        assert max(map(len, lines)) <= width


@pytest.mark.parametrize(
    ("message", "layers", "said"),
    [
        pytest.param(
            "is 8e-08 of that at 18, in 8 of 12 layers", ("0", "2"), "is 8.0e-8 of that at layer 18, in 8 of 12 layers", id="both"
        ),
        pytest.param("grows 1e+03 times, from 2.5e-01 at head", ("fc",), "grows 1000 times, from 0.25 at head", id="numbers"),
        pytest.param("seen at 18, 3 times", ("fc",), "seen at 18, 3 times", id="a-number-is-no-layer-where-layers-have-names"),
        pytest.param("block1e-05 and x.1e-05.y get 3.1e-9", ("x",), "block1e-05 and x.1e-05.y get 3.1e-9", id="names"),
        pytest.param("at 3 of 20 steps", ("1",), "at 3 of 20 steps", id="a-count"),
    ],
)
def test_a_message_is_spoken_with_our_numbers_and_names(message: str, layers: tuple[str, ...], said: str) -> None:
    assert words.spoken(alert(message=message, layers=layers))[2] == said
