"""What the modules between two places of a network do to the gradient that passes them, kind by kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradwatch.baselines import WINDOW
from gradwatch.diagnose.execution import execution_of
from gradwatch.history import History

EXPLAINED = 0.25
"""Decades, for each decade that the gradient falls or grows, by which the product of the gains may miss it and still be told as the
reason: a factor of 1.8 a decade. What a weight gets depends on the size of its input too; and where branches meet, a product along
one way says nothing."""

FUNCTION = "function"
"""What an activation is called that is no module (`torch.tanh`)."""

MANY = 2000
"""Modules between the two places beyond which nobody reads a product."""


@dataclass(frozen=True)
class Kind:
    """Modules of one class on the way.

    Attributes:
        name: class.
        count: how many.
        decades: what they do to the gradient together; negative where it falls.
    """

    name: str
    count: int
    decades: float

    @property
    def gain(self) -> float:
        """Factor of each, geometric mean."""
        return float(10.0 ** (self.decades / self.count))


def gains_between(history: History, lower: int, upper: int, decades: float) -> dict[str, float]:
    """Gains by kind between the outputs of two modules, as evidence.

    Args:
        history: with a few looks at both.
        lower: column of the module executed first.
        upper: column of the other.
        decades: what the gradient does on its way from the upper to the lower, positive where it grows.

    Returns:
        `{"Sigmoid_gain": 0.21, "Sigmoid_count": 9, ...}`, kinds that do most of it first; {} where the gains are not known or their
        product does not explain it (`EXPLAINED`).
    """
    kinds = _kinds_between(history, lower, upper)
    whole = sum(kind.decades for kind in kinds)
    if not kinds or not abs(whole - decades) <= EXPLAINED * abs(decades):
        return {}
    sign = 1.0 if decades > 0 else -1.0
    evidence: dict[str, float] = {}
    for kind in sorted(kinds, key=lambda kind: -sign * kind.decades):
        evidence |= {f"{kind.name}_gain": kind.gain, f"{kind.name}_count": float(kind.count)}
    return evidence


def kinds_in(evidence: Mapping[str, float]) -> list[Kind]:
    """What `gains_between` gave, out of the evidence of a finding."""
    names = [name.removesuffix("_gain") for name in evidence if name.endswith("_gain")]
    return [
        Kind(name, int(evidence[f"{name}_count"]), float(np.log10(evidence[f"{name}_gain"]) * evidence[f"{name}_count"]))
        for name in names
        if evidence.get(f"{name}_count", 0.0) >= 1 and evidence[f"{name}_gain"] > 0
    ]


def _kinds_between(history: History, lower: int, upper: int) -> list[Kind]:
    gains = history.recent("gain", WINDOW)
    looked = np.isfinite(gains).any(axis=1)
    if not looked.any():
        return []
    execution, facts = execution_of(history.meta), history.meta.layers
    rank = execution.rank
    inside = execution.inner & (rank >= rank[lower]) & (rank <= rank[upper])
    way = execution.sorted(np.flatnonzero(inside))
    if not 2 <= len(way) <= MANY:
        return []
    gain, delta = _usual(gains[looked][:, way]), _usual(history.recent("delta_norm", WINDOW)[looked][:, way])
    function = np.isfinite(history.recent("saturated_fraction", WINDOW)[looked][-1, way]) & np.isfinite(delta)
    sums: dict[str, list[float]] = {}
    # The gain of the lower one lies below its output, and is none of its business.
    for i in np.flatnonzero(~np.isnan(gain[1:])) + 1:
        sums.setdefault(facts[way[i]].type, []).append(float(gain[i]))
    known = np.flatnonzero(np.isfinite(gain) & np.isfinite(delta))
    for i in np.flatnonzero(function):
        behind = int(np.searchsorted(known, i, side="right"))
        if facts[way[i]].activation is None and behind < len(known):
            above = known[behind]
            sums.setdefault(FUNCTION, []).append(float(delta[i] - delta[above] - gain[above]))
    kinds = [Kind(name, len(logs), sum(logs)) for name, logs in sums.items()]
    return kinds if all(np.isfinite(kind.decades) for kind in kinds) else []


def _usual(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """`[C]`: mean of the logarithms (base 10) of `[T, C]` as far as they were observed; NaN where none was."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log10(values.astype(np.float64))
        seen = ~np.isnan(logs)
        usual: NDArray[np.float64] = np.where(seen, logs, 0.0).sum(axis=0) / seen.sum(axis=0)
    return usual
