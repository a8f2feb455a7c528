"""The table of layers: which rows and columns it has, and how they fit."""

from __future__ import annotations

import io
import math
import re

import numpy as np
import pytest
from rich.console import Console

from gradwatch.history import History, LayerFact, Meta
from gradwatch.present.grid import ROWS, sparkline
from gradwatch.present.layers import Layers
from gradwatch.present.report import summary, table
from gradwatch.records import Severity
from tests.present.runs import alert, chain, history_of, seen

NAN = math.nan
ACTIVATIONS = ("gain", "rms", "sat.", "dead")


def drawn(history: History, *alerts: object, width: int = 120, ascii_only: bool = False) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width).print(table(history, alerts, ascii_only=ascii_only))  # type: ignore[arg-type]
    return [line.rstrip() for line in file.getvalue().splitlines()]


def row_of(lines: list[str], name: str) -> str:
    (row,) = [line for line in lines if line.split(" ")[0] == name]
    return row


# -- rows and their states ---------------------------------------------------------------------------------------------------------


def test_the_table_has_a_row_for_each_layer_with_parameters_of_its_own() -> None:
    history = history_of(
        {"conv[q]": ("weight", "bias"), "head": ("weight",)},
        np.tile([3.0, 4.0, 0.5], (12, 1)),
        types={"conv[q]": "Conv2d"},
        weight_norm=[[6.0, 8.0, 2.0]] + [[NAN] * 3] * 11,
        update_ratio=[[0.01, 0.5, 0.002]] + [[NAN] * 3] * 11,
    )
    lines = drawn(history, alert("vanishing_gradient", layers=("head",)))
    assert row_of(lines, "conv[q]").split() == ["conv[q]", "Conv2d", "5", "▅" * 10, "10", "0.01", "ok"]
    assert row_of(lines, "head").split() == ["head", "Linear", "0.5", "▅" * 10, "2", "0.002", "vanishing_gradient"]


def test_the_state_of_a_layer_comes_from_open_alarms_on_it_or_above_it() -> None:
    layers = {"block.a": ("weight",), "block.b": ("weight",), "other": ("weight",), "cold": ("weight",), "lost": ("weight",)}
    norms = np.tile([1.0, 1.0, 1.0, NAN, NAN], (12, 1))
    history = history_of(layers, norms, frozen=("cold",))

    def states(*alerts: object) -> list[str]:
        return Layers.of(history).states(history, alerts)  # type: ignore[arg-type]

    assert states() == ["ok", "ok", "ok", "frozen", "no gradient"]
    assert states(alert("x", layers=("block",)))[:3] == ["x", "x", "ok"]
    assert states(alert("x", layers=("block",), parameters=("block.b.weight",)))[:3] == ["ok", "x", "ok"]
    assert states(alert("x", layers=("other",), state="ended"))[2] == "ok"
    assert states(alert("x", layers=("other",), severity=Severity.INFO))[2] == "ok"
    assert states(alert("x", layers=("",)))[:3] == ["x", "x", "x"]
    assert states(alert("unnormalized_input", layers=("",)))[:3] == ["ok", "ok", "ok"]
    assert states(alert("x", layers=("other",)), alert("y", layers=("other",), severity=Severity.ERROR))[2] == "y +1"


def test_a_layer_whose_last_gradient_was_not_finite_is_not_called_ok() -> None:
    bad = [[0.0, 0.0]] * 11 + [[5.0, 0.0]]
    history = history_of({"a": ("weight",), "b": ("weight",)}, np.ones((12, 2)), grad_nonfinite=bad)
    assert Layers.of(history).states(history, []) == ["NaN/Inf", "ok"]
    assert row_of(drawn(history), "a").split()[2:4] == ["NaN/Inf", "▅" * 9 + "!"]


def test_the_table_of_a_thousand_layers_is_a_screenful_and_shows_the_sick_ones() -> None:
    layers = {f"layers.{i}": ("weight",) for i in range(1000)}
    history = history_of(layers, np.ones((12, 1000)))
    lines = drawn(history, alert(layers=("layers.500",)))
    assert len(lines) < 20
    assert row_of(lines, "layers.500").endswith("vanishing_gradient")
    assert sum("more" in line for line in lines) == 2
    everything = drawn(history, alert(layers=("",)))
    assert len(everything) < 60
    assert any("of them not ok" in line for line in everything)
    assert len(summary(history, [alert(layers=("",))]).splitlines()) < 80


def test_the_table_leaves_out_what_is_out_of_scope_and_says_so() -> None:
    history = history_of({"a": ("weight",), "b": ("weight",)}, np.ones((12, 2)), hidden=("b",))
    lines = drawn(history)
    assert not any(line.startswith("b ") for line in lines)
    assert lines[-1] == "1 layer left out by include and exclude"


def test_without_a_record_no_layer_is_said_to_lack_a_gradient() -> None:
    history = history_of({"a": ("weight",), "b": ("weight",)}, np.zeros((0, 2)), frozen=("b",))
    assert Layers.of(history).states(history, []) == ["not seen", "frozen"]


def test_alerts_without_a_layer_stand_below_the_table() -> None:
    lines = drawn(chain(2), alert("never_stepped", layers=(), message="12 backward passes"))
    assert lines[-1] == "▲ the optimizer never steps since step 0: 12 backward passes"


def test_the_table_fits_80_columns_and_ascii() -> None:
    history = chain(12, factor=5.0)
    for ascii_only in (False, True):
        lines = drawn(history, alert(layers=("layers.0",)), width=80, ascii_only=ascii_only)
        assert row_of(lines, "layers.0").endswith("vanishing_gradient")
        assert max(map(len, lines)) <= 80
    assert "".join(lines).isascii()


def test_a_history_without_a_record_has_a_table_too() -> None:
    assert row_of(drawn(chain(2, updates=0)), "layers.0").split() == ["layers.0", "Linear", "-", "-", "-", "not", "seen"]
    assert drawn(History(Meta()))


# -- activations -------------------------------------------------------------------------------------------------------------------


def heads(lines: list[str]) -> list[str]:
    """The two lines of heads as words: those before the first row."""
    (at,) = [i for i, line in enumerate(lines) if line.startswith("layer ")]
    return " ".join(lines[at - 1 : at + 1]).split()


def test_gain_output_saturation_and_dead_units_stand_beside_the_gradient() -> None:
    lines = drawn(seen(2))
    assert row_of(lines, "fc1").split() == ["fc1", "Linear", "1", "▅" * 10, "×1.4", "0.5", "3", "0.001", "ok"]
    assert row_of(lines, "act1").split() == ["act1", "ReLU", "×0.70", "0.5", "50", "0"]
    assert " ".join(lines[-2:]).startswith(
        "sat.: share of outputs where the activation is flat (ReLU: zeros, usually 50-70 %); dead: "
    )


def test_a_column_of_which_nothing_was_observed_is_not_there() -> None:
    assert not set(ACTIVATIONS) & set(heads(drawn(chain(3))))
    assert row_of(drawn(chain(3)), "layers.2") == drawn(chain(3))[-1], "there is no legend either"
    assert set(heads(drawn(seen(2)))) >= set(ACTIVATIONS)
    without = heads(drawn(seen(2, gain=NAN)))
    assert "gain" not in without
    assert {"rms", "sat.", "dead"} <= set(without)
    assert "dead" not in heads(drawn(seen(2, kind="Sigmoid")))


def test_what_was_seen_last_is_shown_though_most_updates_are_not_looked_at() -> None:
    assert row_of(drawn(seen(2, updates=20, every=10)), "act1").split()[2:] == ["×0.70", "0.5", "50", "0"]


def test_a_number_that_is_missing_in_the_last_look_does_not_come_from_an_earlier_one() -> None:
    gain = np.ones((12, 3))
    gain[-1] = NAN
    history = history_of(
        {"fc": ("weight",), "act": ()},
        np.ones((12, 1)),
        flat={"act": "two-sided"},
        types={"act": "Tanh"},
        gain=gain,
        activation_rms=np.full((12, 3), 0.5),
        saturated_fraction=np.tile([NAN, NAN, 0.2], (12, 1)),
    )
    lines = drawn(history)
    assert row_of(lines, "act").split() == ["act", "Tanh", "0.5", "20"]
    assert "gain" not in heads(lines)


def test_values_that_are_not_finite_are_said_to_be_so() -> None:
    bad = np.array([0.0, 0.0, 3.0, 0.0, 0.0])
    lines = drawn(seen(2, activation_nonfinite=bad, activation_rms=np.where(bad > 0, NAN, 0.5), delta_nonfinite=bad, gain=NAN))
    assert row_of(lines, "act0").split()[2:4] == ["NaN/Inf", "NaN/Inf"]
    assert "NaN/Inf" not in row_of(lines, "act1")


@pytest.mark.parametrize(
    ("share", "said"), [(0.0, "0"), (0.001, "<1"), (0.5, "50"), (0.996, ">99"), (1.0, "100"), (0.006, "1"), (0.994, "99")]
)
def test_a_share_is_rounded_but_some_is_not_none_and_most_not_all(share: float, said: str) -> None:
    assert row_of(drawn(seen(1, kind="Tanh", saturated_fraction=[NAN, NAN, share])), "act0").split()[-1] == said


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("depth", [0, 1, 12, 300])
@pytest.mark.parametrize("ascii_only", [False, True], ids=["unicode", "ascii"])
def test_it_fits_and_is_a_screenful(width: int, depth: int, ascii_only: bool) -> None:
    sick = [alert(layers=("fc0",))] if depth else []
    lines = drawn(seen(depth), *sick, width=width, ascii_only=ascii_only)
    assert max(map(len, lines)) <= width
    assert len(lines) < ROWS + 12
    if depth:
        assert "vanishing_gradient" in row_of(lines, "fc0")
    if ascii_only:
        assert "".join(lines).isascii()


def test_what_is_most_useful_stays_where_there_is_little_room() -> None:
    few = set(heads(drawn(seen(2), alert(layers=("fc0",)), width=60)))
    assert few >= {"layer", "norm", "sat.", "dead", "gain", "state"}
    assert not few & {"weight", "update"}
    assert {"weight", "update", "type", "trend"} <= set(heads(drawn(seen(2), width=120)))


@pytest.mark.parametrize("width", [60, 80])
def test_a_long_name_is_broken_at_its_dots_and_names_may_hold_brackets(width: int) -> None:
    name = "bert.encoder.layer.11.attention[q].output.LayerNorm[/b]"
    history = history_of({name: ("weight",)}, np.ones((12, 1)), gain=np.full((12, 2), 2.0))
    lines = drawn(history, width=width)
    at = next(i for i, line in enumerate(lines) if line.startswith("bert."))
    parts = [line.split(" ")[0] for line in lines[at : at + 4] if re.match(r"bert|[\w\[\]/.]+( |$)", line) and "sat" not in line]
    assert "".join(part for part in parts if part in name) == name
    assert all(part.endswith(".") for part in parts[: parts.index(parts[-1]) - 1])
    assert max(map(len, lines)) <= width


def test_activations_have_rows_only_while_all_fit_or_where_they_have_something_to_say() -> None:
    assert sum(line.startswith("act") for line in drawn(seen(20))) == 20
    big = seen(30)
    lines = drawn(big)
    assert not any(line.startswith("act") for line in lines)
    assert row_of(lines, "fc7").split() == ["fc7", "Linear", "1", "▅" * 10, "×1.4", "0.5", "50", "0", "3", "0.001", "ok"], (
        "what is known of the activation stands in the row before it"
    )
    assert row_of(drawn(big, alert("dead_units", layers=("act7",))), "act7").endswith("dead_units")
    dead = np.where(np.arange(61) == 16, 0.9, 0.0)
    assert row_of(drawn(seen(30, dead_fraction=dead)), "act7").split()[-1] == "90"
    flat = np.where(np.arange(61) == 16, 0.9, 0.0)
    assert row_of(drawn(seen(30, kind="Tanh", saturated_fraction=flat)), "act7").split()[-1] == "90"
    assert not any(line.startswith("act7") for line in drawn(seen(30, saturated_fraction=flat))), "zeros of a ReLU are no news"


def test_all_activations_sick_do_not_crowd_out_the_ends() -> None:
    lines = drawn(seen(300, saturated_fraction=1.0, dead_fraction=1.0))
    assert {"fc0", "fc299"} <= {line.split(" ")[0] for line in lines}
    assert sum("more" in line for line in lines) >= 1
    assert len(lines) < ROWS + 12


def test_an_alert_on_a_container_gives_it_no_row_and_one_on_a_pool_gives_it_one() -> None:
    history = history_of({"block": (), "block.fc": ("weight",), "pool": ()}, np.ones((12, 1)), types={"pool": "MaxPool2d"})
    lines = drawn(history, alert("non_finite_activation", severity=Severity.ERROR, layers=("block", "pool")))
    assert not any(line.startswith("block ") for line in lines)
    assert row_of(lines, "block.fc").endswith("non_finite_activation")
    assert row_of(lines, "pool").split() == ["pool", "MaxPool2d", "non_finite_activation"]


def test_an_activation_that_runs_in_many_places_lends_its_numbers_to_no_layer() -> None:
    calls = np.where(np.arange(61) % 2 == 0, 2.0, 1.0)
    assert "50" not in row_of(drawn(seen(30, calls=calls)), "fc7").split()


def test_a_model_of_activations_alone_has_a_table_too() -> None:
    meta = Meta(layers=(LayerFact(""), LayerFact("act", "Tanh", kind="activation", flat="two-sided")))
    history = History(meta)
    row = history.blank_row()
    row["activation_rms"], row["saturated_fraction"] = 0.5, [NAN, 0.25]
    history.append(row)
    assert row_of(drawn(history), "act").split() == ["act", "Tanh", "0.5", "25"]


# -- trends ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "line"),
    [
        pytest.param([1.0, 1.1, 0.9, 1.0], "▅▅▄▅", id="noise stays level"),
        pytest.param([1.0, 1e-1, 1e-2, 1e-3], "█▆▃▁", id="a collapse is seen"),
        pytest.param([1.0, NAN, 1.0], "▅ ▅", id="not observed"),
        pytest.param([1.0, np.inf, 1.0], "▅!▅", id="not finite"),
        pytest.param([1.0, 0.0, 1.0], "▅▁▅", id="zero"),
        pytest.param([], "", id="empty"),
        pytest.param([NAN, NAN], "  ", id="never observed"),
    ],
)
def test_a_sparkline(values: list[float], line: str) -> None:
    assert sparkline(np.array(values, float)) == line


def test_a_sparkline_is_bounded_and_ascii_has_heights_too() -> None:
    values = np.logspace(0, -6, 512)
    assert len(sparkline(values, width=12)) == 12
    in_ascii = sparkline(values, width=12, ascii_only=True)
    assert in_ascii.isascii()
    assert [len(set(in_ascii)), in_ascii[0], in_ascii[-1]] == [5, '"', "_"]
