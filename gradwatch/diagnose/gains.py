"""What the modules between two places of a network do to the gradient that passes them, kind by kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradwatch.diagnose.execution import execution_of
from gradwatch.facts import Meta
from gradwatch.history import History

EXPLAINED = 0.25
"""Decades, for each decade that the gradient falls or grows, by which the product of the gains may miss it and still be told as the
reason: a factor of 1.8 a decade. What a weight gets depends on the size of its input too; and where branches meet, a product along
one way says nothing."""

FUNCTION = "function"
"""What an activation is called that is no module (`torch.tanh`)."""

SAME = 1e-4
"""Decades between two readings of the same gradient, from samples: what lies nearer is one."""

MANY = 2000
"""Modules between the two places beyond which nobody reads a product."""

BACK = 11
"""Records among which the last look is taken: one of them at least is looked at in the rarest cadence by default."""


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


def circumstances(history: History, lower: int, upper: int) -> dict[str, float]:
    """What stands beside the gains as evidence of why a gradient falls or grows between two modules.

    Args:
        history: with a few looks at both.
        lower: column of the module executed first.
        upper: column of the other.

    Returns:
        `depth`: layers with a matrix on the way, the two included; `normalizations`: how many stand on it; `saturated_fraction`: the
        median of its activations in the last look; `weight_gain`: the median of what its matrices do to the scale of independent inputs,
        2-norm over the root of the number of outputs (1 keeps it). What is not known is left out.
    """
    meta, rank = history.meta, execution_of(history.meta).rank
    first, last = sorted((int(rank[lower]), int(rank[upper])))
    way = np.flatnonzero((rank >= first) & (rank <= last))
    on_it = np.isin(meta.layer_index, way)
    gains = [
        (i, float(norm) / fact.shape[0] ** 0.5)
        for i, (fact, norm) in enumerate(zip(meta.parameters, history.baselines.weight_norm, strict=True))
        if on_it[i] and len(fact.shape) >= 2 and fact.shape[0] and np.isfinite(norm)
    ]
    found: dict[str, float] = {
        "depth": float(len({int(meta.layer_index[i]) for i, _ in gains})),
        "normalizations": float(sum(meta.layers[i].kind == "normalization" for i in way)),
    }
    flat = history.recent("saturated_fraction", BACK)[:, way]
    looked = flat[np.isfinite(flat).any(axis=1)]
    if looked.size:
        found["saturated_fraction"] = float(np.nanmedian(looked[-1]))
    if gains:
        found["weight_gain"] = float(np.median([gain for _, gain in gains]))
    return found


def kinds_in(evidence: Mapping[str, float]) -> list[Kind]:
    """What `gains_between` gave, out of the evidence of a finding."""
    names = [name.removesuffix("_gain") for name in evidence if name.endswith("_gain")]
    return [
        Kind(name, int(evidence[f"{name}_count"]), float(np.log10(evidence[f"{name}_gain"]) * evidence[f"{name}_count"]))
        for name in names
        if evidence.get(f"{name}_count", 0.0) >= 1 and evidence[f"{name}_gain"] > 0
    ]


@dataclass(frozen=True)
class _Inner:
    """The modules that hold no others, N of them, in the order of execution.

    An activation that stands in several places is not one of them: what it does in each is told as that of a function.

    Attributes:
        layers: `[N]`, columns.
        rank: `[N]`, ranks of the execution, rising.
        names: of the K classes.
        kind: `[N]`, number of its class.
        plain: `[N]`, is no activation itself.
        follower: `[N]`, what the activation is called that stands behind it.
        holds: `[N]`, has parameters.
    """

    layers: NDArray[np.int64]
    rank: NDArray[np.int64]
    names: tuple[str, ...]
    kind: NDArray[np.int64]
    plain: NDArray[np.bool_]
    follower: tuple[str, ...]
    holds: NDArray[np.bool_]


def _inner(meta: Meta) -> _Inner:
    kept = meta.derived.get(_Inner)
    if kept is None:
        execution = execution_of(meta)
        once = np.array([not fact.places for fact in meta.layers], bool)
        layers = execution.sorted(np.flatnonzero(execution.inner & once))
        number: dict[str, int] = {}
        kind = np.array([number.setdefault(meta.layers[i].type, len(number)) for i in layers], np.int64)
        plain = np.array([meta.layers[i].activation is None for i in layers], bool)
        follower = tuple(meta.layers[i].follower or FUNCTION for i in layers)
        holds = np.isin(layers, meta.layer_index)
        kept = meta.derived[_Inner] = _Inner(layers, execution.rank[layers], tuple(number), kind, plain, follower, holds)
    inner: _Inner = kept
    return inner


def _kinds_between(history: History, lower: int, upper: int) -> list[Kind]:
    gains = history.recent("gain", BACK)
    looked = np.flatnonzero(gains[:, upper] > 0)
    if not looked.size:
        return []
    last, inner, rank = int(looked[-1]), _inner(history.meta), execution_of(history.meta).rank
    start, stop = int(inner.rank.searchsorted(rank[lower])), int(inner.rank.searchsorted(rank[upper])) + 1
    if not 2 <= stop - start <= MANY:
        return []
    way, kind = inner.layers[start:stop], inner.kind[start:stop]
    with np.errstate(divide="ignore"):
        gain, delta = np.log10(gains[last, way]), np.log10(history.recent("delta_norm", BACK)[last, way])
    # A dropout that stands in several places mixes them: what it does is told with the activation behind it.
    calls = history.recent("calls", BACK)[last]
    once = inner.holds[start:stop] | ~(calls[way] > max(calls[lower], calls[upper]))
    gain[~once] = np.nan
    told = ~np.isnan(gain)
    told[0] = False  # the gain of the lower one lies below its output, and is none of its business
    count = np.bincount(kind[told], minlength=len(inner.names))
    decades = np.bincount(kind[told], gain[told], len(inner.names))
    kinds = {inner.names[i]: Kind(inner.names[i], int(count[i]), float(decades[i])) for i in np.flatnonzero(count)}
    # Between a module that a function follows and the next one lies what that does.
    flat, holds = history.recent("saturated_fraction", BACK)[last, way], inner.holds[start:stop]
    function = np.flatnonzero(inner.plain[start:stop] & np.isfinite(flat + delta))
    if function.size:
        known = np.flatnonzero(np.isfinite(gain + delta))
        behind = np.searchsorted(known, function, side="right")
        for i, first in zip(function.tolist(), behind.tolist(), strict=True):
            at, last = i, first
            # A dropout between the two passes on what it gets: the activation is behind it.
            while last < len(known) and abs(delta[at] - delta[known[last]] - gain[known[last]]) < SAME and not holds[known[last]]:
                at, last = int(known[last]), last + 1
            if last == len(known):
                continue
            decades_there = float(delta[at] - delta[known[last]] - gain[known[last]])
            name = inner.follower[start + i]
            other = kinds.get(name, Kind(name, 0, 0.0))
            kinds[name] = Kind(name, other.count + 1, other.decades + decades_there)
    return list(kinds.values()) if all(np.isfinite(kind.decades) for kind in kinds.values()) else []
