"""The picture of the gradient's way, over histories made by hand."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from gradwatch.history import History, Meta
from gradwatch.present.picture import fall
from tests.present.runs import chain, history_of, seen

NAN = math.nan


def bars(picture: str, mark: str = "#") -> list[tuple[str, int]]:
    return [(match[1], len(match[2])) for match in re.finditer(rf"(layers\.\d+)\s+({mark}+)", picture)]


def test_the_fall_runs_from_the_loss_to_the_input_with_bars_by_powers_of_ten() -> None:
    picture = fall(chain(8, factor=10.0), ascii_only=True).plain
    lines = picture.splitlines()
    assert lines[1].split()[:2] == ["loss", "layers.7"]
    assert lines[8].split()[:2] == ["input", "layers.0"]
    assert [name for name, _ in bars(picture)] == [f"layers.{i}" for i in range(7, -1, -1)]
    lengths = [length for _, length in bars(picture)]
    steps = -np.diff(lengths)
    assert (steps > 0).all()
    assert np.ptp(steps) <= 2, "a bar's length is its logarithm"
    assert re.fullmatch(r"falls x(9\.\de6|1\.\de7) \(x(9\.\d|10\.\d) a layer\) from layers\.7 to layers\.0", lines[-1])
    assert picture.isascii()
    assert max(map(len, lines)) <= 78


def test_the_fall_of_a_healthy_network_looks_level() -> None:
    lengths = [length for _, length in bars(fall(chain(8), ascii_only=True).plain)]
    assert min(lengths) > 0.9 * max(lengths)
    assert "about level" in fall(chain(8)).plain


def test_the_fall_follows_the_order_of_execution_not_of_registration() -> None:
    history = history_of({"layers.0": ("weight",), "layers.1": ("weight",)}, np.ones((9, 2)), order={"layers.0": 1, "layers.1": 0})
    assert [name for name, _ in bars(fall(history, ascii_only=True).plain)] == ["layers.0", "layers.1"]


def test_the_fall_is_bounded_and_survives_zeros_nans_and_nothing() -> None:
    big = fall(chain(500)).plain
    assert len(big.splitlines()) < 50
    assert "40 of 500 layers" in big
    names = {f"layers.{i}": ("weight",) for i in range(4)}
    history = history_of(names, np.tile([0.0, 1.0, NAN, 2.0], (9, 1)), grad_nonfinite=np.tile([0, 0, NAN, 3], (9, 1)))
    picture = fall(history).plain
    assert re.search(r"layers\.3 .*NaN/Inf", picture)
    assert re.search(r"layers\.0 .* 0$", picture, re.MULTILINE)
    assert "layers.2" not in picture
    assert fall(History(Meta())).plain == "no gradient was observed"


# -- what stands beside the bars ---------------------------------------------------------------------------------------------------


def test_the_gain_of_a_layer_and_of_the_activation_behind_it_stand_beside_its_bar() -> None:
    gain = np.where(np.arange(7) % 2 == 0, 0.214, 0.41)
    picture = fall(seen(3, kind="Sigmoid", gain=gain)).plain.splitlines()
    assert picture[1].split() == ["norm", "gain", "behind", "it"]
    assert [line.split()[-3:] for line in picture[2:5]] == [["×0.41", "Sigmoid", "×0.21"]] * 3
    assert picture[-1] == "gain: norm of the gradient below it over that above it"
    assert max(map(len, picture)) <= 78


@pytest.mark.parametrize(
    ("kind", "shares", "said"),
    [
        pytest.param("Sigmoid", {"saturated_fraction": 0.12}, "Sigmoid ×0.70, 12 % saturated", id="saturated"),
        pytest.param("Sigmoid", {"saturated_fraction": 0.001}, "Sigmoid ×0.70", id="hardly-saturated"),
        pytest.param("Sigmoid", {"saturated_fraction": 0.12, "gain": NAN}, "Sigmoid 12 % saturated", id="no-gain"),
        pytest.param("ReLU", {"saturated_fraction": 0.6}, "ReLU ×0.70", id="zeros-of-a-relu"),
        pytest.param("ReLU", {"dead_fraction": 0.25}, "ReLU ×0.70, 25 % dead", id="dead"),
        pytest.param("ReLU", {"dead_fraction": NAN, "saturated_fraction": NAN}, "ReLU ×0.70", id="gain-alone"),
        pytest.param("ReLU", {"dead_fraction": NAN, "saturated_fraction": NAN, "gain": NAN}, "", id="nothing"),
        pytest.param("ReLU", {"delta_nonfinite": 1.0}, "ReLU NaN/Inf", id="not-finite"),
    ],
)
def test_saturated_and_dead_shares_stand_there_where_there_are_any(kind: str, shares: dict[str, float], said: str) -> None:
    lines = fall(seen(2, kind=kind, **shares)).plain.splitlines()
    (row,) = [line for line in lines if line.startswith(" loss")]
    assert row.endswith(said)
    assert ("ReLU" in row or "Sigmoid" in row) == bool(said)


@pytest.mark.parametrize(
    ("kind", "looks", "said"),
    [
        pytest.param("Sigmoid", 3, "Sigmoid 60 % saturated", id="known-by-its-class"),
        pytest.param("ReLU", 3, "", id="a-rectifier-before-its-units-are-counted"),
        pytest.param("Softmax", 20, "", id="a-probability"),
        pytest.param("", 3, "", id="a-function-that-may-be-a-relu"),
        pytest.param("", 20, "60 % saturated", id="a-function-that-is-none"),
    ],
)
def test_only_what_is_stuck_where_it_is_flat_is_called_saturated(kind: str, looks: int, said: str) -> None:
    share = np.full((looks, 3), NAN)
    share[:, 2 if kind else 1] = 0.6
    history = history_of(
        {"fc": ("weight",), "act": ()},
        np.ones((looks, 1)),
        flat={"act": ""} if kind else {},
        types={"act": kind or "Dropout"},
        calls=np.ones((looks, 3)),
        saturated_fraction=share,
    )
    (row,) = [line for line in fall(history).plain.splitlines() if line.startswith(" loss")]
    assert row.partition("█")[2].lstrip("█▏▎▍▌▋▊▉ ").removeprefix("1").strip() == said


def test_without_activations_there_is_nothing_beside_the_bars() -> None:
    assert "gain" not in fall(chain(3)).plain


def test_it_can_show_the_first_updates_and_what_passes_through_the_outputs() -> None:
    delta = np.where(np.arange(9) % 2 == 1, 3.0 ** -np.arange(9), NAN)
    history = seen(4, updates=30, delta_norm=delta)
    picture = fall(history, last=64, until=10, outputs=True).plain.splitlines()
    assert picture[0] == "gradient of each layer's output, median of updates 0 to 9, log scale"
    assert "grows ×729 (×9.0 a layer) from fc3 to fc0" in picture
    assert fall(history, until=0).plain == "no gradient was observed"
    assert "median of updates 20 to 29" in fall(history, last=10, until=99).plain


def test_the_bars_of_a_model_follow_the_updates_that_were_asked_for() -> None:
    norms = np.repeat([[1.0, 1.0], [1.0, 1e-6]], 10, axis=0)
    history = history_of({"a": ("weight",), "b": ("weight",)}, norms)
    assert "about level" in fall(history, until=10).plain
    assert "grows ×1.0e6" in fall(history, last=10).plain


@pytest.mark.parametrize("width", [40, 60, 78, 120])
@pytest.mark.parametrize("depth", [1, 12, 300])
def test_it_fits(width: int, depth: int) -> None:
    for ascii_only in (False, True):
        picture = fall(seen(depth, dead_fraction=0.5), width=width, ascii_only=ascii_only).plain
        assert max(map(len, picture.splitlines())) <= width
        assert len(picture.splitlines()) < 50
    assert picture.isascii()
