"""Histories made by hand, without a model and without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gradwatch.diagnose.incidents import Incidents
from gradwatch.diagnose.rules import Rule, default_rules
from gradwatch.history import History, LayerFact, Meta, ParameterFact
from gradwatch.records import Alert, GradState, SkipReason

STEPPED = GradState.REACHED | GradState.STEPPED


def chain(layers: int, width: int = 64, activation: str | None = None, prefix: str = "", bias: bool = True) -> Meta:
    """Linear layers "0", "1", ... one after the other, the first reading the data and the last before the loss."""
    parameters, facts = [], [LayerFact("", "Sequential", "container")]
    for i in range(layers):
        name = f"{prefix}{i}"
        role = "head" if i == layers - 1 else "input" if i == 0 else "hidden"
        facts.append(LayerFact(name, "Linear", "linear", 2 * i, role))
        if activation and i < layers - 1:
            facts.append(LayerFact(f"{name}act", activation, "activation", None, "", activation))
        for j, kind in enumerate(("weight", "bias")[: 1 + bias]):
            shape = (width, width) if kind == "weight" else (width,)
            parameters.append(
                ParameterFact(
                    f"{name}.{kind}",
                    name,
                    shape,
                    owner="SGD#0",
                    init_rms=0.1,
                    order=2 * i + j,
                    distance=3 + 2 * (layers - 1 - i) - j,
                )
            )
    return Meta(tuple(parameters), tuple(facts))


def change(meta: Meta, where: Callable[[ParameterFact], bool], **facts: Any) -> Meta:
    """The same with some facts of some parameters replaced."""
    return replace(meta, parameters=tuple(replace(f, **facts) if where(f) else f for f in meta.parameters))


class Run:
    """A history that grows, and what is said of it.

    Args:
        meta: static facts.
        rules: None: the default ones.
    """

    def __init__(self, meta: Meta, rules: Sequence[Rule] | None = None) -> None:
        self.history = History(meta)
        self.notices: list[str] = []
        self.incidents = Incidents(default_rules() if rules is None else rules, notice=self.notices.append)
        self.sent: list[tuple[int, Alert]] = []
        self._noise = np.random.default_rng(0)

    def record(self, norms: Any = 1.0, noise: float = 0.1, **columns: Any) -> tuple[Alert, ...]:
        """Close an update: gradient norms around `norms`, everything else as in a healthy run unless given. NaN: not reached."""
        row = self.history.blank_row()
        p = len(self.history.parameters)
        row["grad_norm"] = np.broadcast_to(norms, p) * np.exp(noise * self._noise.standard_normal(p))
        reached = ~np.isnan(row["grad_norm"])
        row["grad_nonfinite"] = np.where(reached, 0.0, np.nan)
        row["grad_state"] = np.where(reached, np.uint8(STEPPED), np.uint8(0))
        row["weight_norm"] = np.where(reached, 5.0, np.nan)
        row["update_ratio"], row["lr"] = np.where(reached, 1e-3, np.nan), np.where(reached, 0.1, np.nan)
        row["loss"], row["loss_terms"], row["backward_calls"] = 1.0, 1, 1
        row["clip_coef"] = row["loss_scale"] = 1.0
        for name, value in columns.items():
            row[name] = value
        if "total_norm" not in columns:
            norms, bad = row["grad_norm"].astype(np.float64), row["grad_nonfinite"] > 0
            row["total_norm"] = np.sqrt(np.square(norms[bad | ~np.isnan(norms)]).sum())
        self.history.append(row)
        return self.judge()

    def judge(self) -> tuple[Alert, ...]:
        """Run the rules again, as at the end or in the middle of an update."""
        alerts = self.incidents.judge(self.history)
        self.sent += [(self.history.recorded, alert) for alert in alerts]
        return alerts

    def records(self, n: int, norms: Any = 1.0, **columns: Any) -> None:
        for _ in range(n):
            self.record(norms, **columns)

    def alarms(self) -> list[Alert]:
        return [alert for alert in self.incidents.alerts if alert.severity >= 30]

    def rules(self) -> list[str]:
        """Names of the rules that raised an alarm."""
        return [alert.rule for alert in self.alarms()]

    def only(self, rule: str) -> Alert:
        """The one alarm there is."""
        assert self.rules() == [rule], [(a.rule, a.layers) for a in self.alarms()]
        return self.alarms()[0]


def skipped(reason: SkipReason) -> dict[str, Any]:
    """Columns of a record that changed no weight."""
    return {"skipped": True, "skip_reason": reason, "grad_state": np.uint8(GradState.REACHED), "update_ratio": np.nan, "lr": np.nan}


def said_in_replay(history: History) -> tuple[Alert, ...]:
    """What the default rules say of a history that is played again."""
    incidents = Incidents(default_rules(), notice=_fail)
    for again in _replay(history):
        incidents.judge(again)
    return incidents.alerts


def _replay(history: History) -> Iterator[History]:
    yield from history.replay()


def _fail(text: str) -> None:
    raise AssertionError(text)
