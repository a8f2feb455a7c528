"""The data that travels: frozen, complete, and under the names that are promised."""

from __future__ import annotations

import copy
import dataclasses
import logging
import pickle
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

import gradwatch
from gradwatch import Alert, Finding, GradState, NonFiniteGradientError, Origin, Sampling, Severity, SkipReason, StepRecord
from gradwatch.facts import LayerFact, Meta, ParameterFact, Pending
from gradwatch.records import SCHEMA, STATISTICS, Statistic

PUBLIC = [
    "Alert",
    "Finding",
    "GradState",
    "GradWatch",
    "History",
    "NonFiniteGradientError",
    "Origin",
    "RuleError",
    "Sampling",
    "Severity",
    "SkipReason",
    "StepRecord",
    "default_rules",
]
"""What a user may import. A change here is a change of the contract."""

TABLE = {
    "grad_norm": ("parameter", "f4"),
    "grad_nonfinite": ("parameter", "f4"),
    "weight_norm": ("parameter", "f4"),
    "update_ratio": ("parameter", "f4"),
    "grad_state": ("parameter", "u1"),
    "lr": ("parameter", "f4"),
    "calls": ("layer", "f4"),
    "activation_rms": ("layer", "f4"),
    "activation_absmax": ("layer", "f4"),
    "activation_nonfinite": ("layer", "f4"),
    "saturated_fraction": ("layer", "f4"),
    "dead_fraction": ("layer", "f4"),
    "delta_norm": ("layer", "f4"),
    "delta_nonfinite": ("layer", "f4"),
    "gain": ("layer", "f4"),
    "loss": ("update", "f4"),
    "loss_terms": ("update", "f4"),
    "total_norm": ("update", "f4"),
    "clip_coef": ("update", "f4"),
    "skipped": ("update", "?"),
    "skip_reason": ("update", "u1"),
    "loss_scale": ("update", "f4"),
    "backward_calls": ("update", "f4"),
    "input_mean": ("update", "f4"),
    "input_std": ("update", "f4"),
    "input_nonfinite": ("update", "f4"),
    "time": ("update", "f8"),
}
"""The design's table, with `loss_terms` added to it. Readers of files find columns by these names and types."""

ORIGIN = Origin("encoder.0", "aten::sqrt", "backward", "train.py:7")
FINDING = Finding("vanishing_gradient", Severity.WARNING, 3)
ALERT = Alert("vanishing_gradient", Severity.WARNING, 3, ("a",), ("a.w",), "m", {"x": 1.0}, "c", "r", ORIGIN, 9, 7, "open")
RECORD = StepRecord(3, ("a.w",), ("", "a"), {"loss": 1.0})
FROZEN = [
    pytest.param(ORIGIN, id="origin"),
    pytest.param(FINDING, id="finding"),
    pytest.param(ALERT, id="alert"),
    pytest.param(RECORD, id="step-record"),
    pytest.param(Sampling(), id="sampling"),
    pytest.param(STATISTICS["loss"], id="statistic"),
    pytest.param(ParameterFact("a.w", "a"), id="parameter-fact"),
    pytest.param(LayerFact("a"), id="layer-fact"),
    pytest.param(Meta(), id="meta"),
    pytest.param(Pending(), id="pending"),
]


@pytest.mark.parametrize("thing", FROZEN)
def test_data_is_frozen(thing: Any) -> None:
    for field in dataclasses.fields(thing):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, field.name, None)
        with pytest.raises(dataclasses.FrozenInstanceError):
            delattr(thing, field.name)


@pytest.mark.parametrize("thing", FROZEN)
def test_data_survives_copying_and_pickling(thing: Any) -> None:
    # Facts hold a NaN for what is not known, and a NaN equals nothing: their text is compared.
    for again in (copy.copy(thing), copy.deepcopy(thing), pickle.loads(pickle.dumps(thing))):
        assert type(again) is type(thing)
        assert repr(again) == repr(thing)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        pytest.param(
            Alert,
            "rule severity step layers parameters message evidence cause remedy origin last_step count state",
            id="alert",
        ),
        pytest.param(Finding, "rule severity step layers parameters message evidence", id="finding"),
        pytest.param(StepRecord, "step parameters layers stats", id="step-record"),
        pytest.param(Origin, "module op phase source", id="origin"),
        pytest.param(Sampling, "window dense every include exclude", id="sampling"),
    ],
)
def test_fields_stand_in_the_order_of_the_contract(kind: Any, fields: str) -> None:
    assert " ".join(field.name for field in dataclasses.fields(kind)) == fields


def test_a_finding_needs_only_what_it_cannot_do_without() -> None:
    assert (FINDING.layers, FINDING.parameters, FINDING.message, dict(FINDING.evidence)) == ((), (), "", {})
    other = Finding("x", Severity.INFO, 0)
    assert other.evidence is not FINDING.evidence


# -- statistics --------------------------------------------------------------------------------------------------------------------


def test_the_table_of_statistics_is_the_designs() -> None:
    assert {name: (statistic.axis, statistic.dtype) for name, statistic in STATISTICS.items()} == TABLE
    assert list(STATISTICS) == list(TABLE), "the order is the order of columns in a file"


@pytest.mark.parametrize("name", TABLE)
def test_every_statistic_says_what_it_is(name: str) -> None:
    statistic = STATISTICS[name]
    assert statistic.meaning
    assert "\n" not in statistic.meaning
    np.dtype(statistic.dtype)


def test_the_table_of_statistics_cannot_be_changed() -> None:
    assert isinstance(STATISTICS, MappingProxyType)
    with pytest.raises(TypeError):
        STATISTICS["mine"] = Statistic("update", "f4", "", "")  # type: ignore[index]


def test_the_layout_carries_a_number() -> None:
    """A change of the table above needs a larger one."""
    assert SCHEMA == 2
    assert Meta().schema == SCHEMA


# -- numbers that are published ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("severity", Severity)
def test_a_severity_is_a_level_of_logging(severity: Severity) -> None:
    assert severity == getattr(logging, severity.name)
    assert logging.getLevelName(severity) == severity.name
    assert isinstance(severity, int)


def test_severities_are_ordered() -> None:
    assert [severity.name for severity in sorted(Severity)] == ["INFO", "WARNING", "ERROR"]


def test_flags_and_reasons_keep_their_numbers_and_fit_their_column() -> None:
    assert {flag.name: flag.value for flag in GradState} == {
        "REACHED": 1,
        "STALE": 2,
        "CLEARED": 4,
        "STEPPED": 8,
        "CHANGED": 16,
        "CLIPPED": 32,
        "ASIDE": 64,
        "SAME": 128,
    }
    assert {reason.name: reason.value for reason in SkipReason} == {
        "NONE": 0,
        "NO_STEP": 1,
        "SCALER": 2,
        "RAISED": 3,
        "NON_FINITE": 4,
        "RULE": 5,
    }
    every = np.array([sum(GradState), max(SkipReason)])
    assert (every.astype(np.uint8) == every).all()


# -- sampling ----------------------------------------------------------------------------------------------------------------------


def test_sampling_has_the_defaults_of_the_contract() -> None:
    assert dataclasses.astuple(Sampling()) == (512, 64, 10, (), ())


@pytest.mark.parametrize(
    "given",
    [
        pytest.param({"window": 1}, id="least-window"),
        pytest.param({"dense": 0}, id="no-dense"),
        pytest.param({"every": 1}, id="every-update"),
        pytest.param({"window": np.int64(7)}, id="numpy-integer"),
        pytest.param({"include": ("a", "b.*")}, id="tuple"),
    ],
)
def test_sampling_takes_whole_numbers_and_patterns(given: dict[str, Any]) -> None:
    sampling = Sampling(**given)
    for name, value in given.items():
        assert getattr(sampling, name) == value


@pytest.mark.parametrize("name", ["include", "exclude"])
@pytest.mark.parametrize(
    ("given", "taken"),
    [
        pytest.param("encoder.*", ("encoder.*",), id="one-string"),
        pytest.param(["a", "b"], ("a", "b"), id="list"),
        pytest.param(dict.fromkeys("ab"), ("a", "b"), id="iterable"),
        pytest.param((), (), id="none"),
    ],
)
def test_patterns_become_a_tuple(name: str, given: Any, taken: tuple[str, ...]) -> None:
    assert getattr(Sampling(**{name: given}), name) == taken
    hash(Sampling(**{name: given}))


@pytest.mark.parametrize(
    ("given", "error"),
    [
        pytest.param({"window": 0}, ValueError, id="window-0"),
        pytest.param({"dense": -1}, ValueError, id="dense-negative"),
        pytest.param({"every": 0}, ValueError, id="every-0"),
        pytest.param({"window": 2.0}, TypeError, id="window-float"),
        pytest.param({"window": float("inf")}, TypeError, id="window-inf"),
        pytest.param({"window": True}, TypeError, id="window-bool"),
        pytest.param({"window": np.True_}, TypeError, id="window-numpy-bool"),
        pytest.param({"every": "10"}, TypeError, id="every-string"),
        pytest.param({"dense": None}, TypeError, id="dense-none"),
        pytest.param({"include": 3}, TypeError, id="include-number"),
        pytest.param({"include": None}, TypeError, id="include-none"),
        pytest.param({"exclude": (b"a",)}, TypeError, id="exclude-bytes"),
        pytest.param({"exclude": b"a"}, TypeError, id="exclude-only-bytes"),
    ],
)
def test_a_wrong_sampling_is_refused_by_name(given: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(given))):
        Sampling(**given)


# -- the error that was asked for --------------------------------------------------------------------------------------------------


def test_the_error_carries_step_parameters_and_origin() -> None:
    error = NonFiniteGradientError("no", step=3, parameters=("a.w",), origin=ORIGIN)
    assert isinstance(error, RuntimeError)
    assert str(error) == "no"
    assert (error.step, error.parameters, error.origin) == (3, ("a.w",), ORIGIN)
    assert NonFiniteGradientError("no", step=0, parameters=()).origin is None


def test_the_error_survives_pickling() -> None:
    """As it must to leave a worker process: multiprocessing and torchrun pickle what a worker raises."""
    error = NonFiniteGradientError("no", step=3, parameters=("a.w",), origin=ORIGIN)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is NonFiniteGradientError
    assert (str(again), again.step, again.parameters, again.origin) == ("no", 3, ("a.w",), ORIGIN)


# -- public names ------------------------------------------------------------------------------------------------------------------


def test_the_public_names_are_these() -> None:
    assert gradwatch.__all__ == PUBLIC
    assert sorted(PUBLIC) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    thing = getattr(gradwatch, name)
    assert thing.__doc__
    assert thing.__module__.startswith("gradwatch.")
    assert name in dir(gradwatch)


def test_a_star_import_gives_the_public_names() -> None:
    space: dict[str, Any] = {}
    exec("from gradwatch import *", space)
    assert set(space) - {"__builtins__"} == set(PUBLIC)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'gradwatch' has no attribute 'GradWach'"):
        gradwatch.GradWach  # noqa: B018
    assert not hasattr(gradwatch, "watch_model")


def test_the_version_is_a_version() -> None:
    assert gradwatch.__version__[0].isdigit()
