"""Runs made by hand, in numpy alone: a history with the columns a test asks for, and alerts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gradwatch.history import History, LayerFact, Meta, ParameterFact
from gradwatch.records import Alert, GradState, Severity


def history_of(
    layers: Mapping[str, Sequence[str]],
    grad_norm: np.ndarray,
    *,
    loss: Sequence[float] = (),
    types: Mapping[str, str] | None = None,
    hidden: Sequence[str] = (),
    frozen: Sequence[str] = (),
    order: Mapping[str, int] | None = None,
    flat: Mapping[str, str] | None = None,
    window: int = 512,
    **columns: Any,
) -> History:
    """A history of the layers (name to the names of its own parameters, under the root "") with these gradient norms `[T, P]`.

    A layer named in `flat` is an activation that is flat so.
    """
    names = [f"{layer}.{own}" if layer else own for layer, owns in layers.items() for own in owns]
    meta = Meta(
        parameters=tuple(
            ParameterFact(
                f"{layer}.{own}" if layer else own,
                layer,
                (4, 4) if own == "weight" else (4,),
                in_scope=layer not in hidden,
                trainable=layer not in frozen,
            )
            for layer, owns in layers.items()
            for own in owns
        ),
        layers=tuple(
            LayerFact(
                name,
                (types or {}).get(name, "Linear"),
                kind="activation" if name in (flat or {}) else "other",
                in_scope=name not in hidden,
                order=(order or {}).get(name),
                flat=(flat or {}).get(name, ""),
            )
            for name in dict.fromkeys(["", *layers])
        ),
    )
    history = History(meta, window)
    for t, norms in enumerate(np.asarray(grad_norm, float)):
        row = history.blank_row()
        assert len(norms) == len(names)
        row["grad_norm"] = norms
        row["grad_nonfinite"] = np.where(np.isnan(norms), np.nan, 0)
        row["grad_state"] = np.where(np.isnan(norms), 0, int(GradState.REACHED | GradState.STEPPED))
        row["total_norm"] = np.sqrt(np.nansum(np.square(norms)))
        row["clip_coef"] = row["loss_scale"] = row["backward_calls"] = 1.0
        row["time"] = 0.01 * (t + 1)
        if t < len(loss):
            row["loss"] = loss[t]
        for name, values in columns.items():
            row[name] = values[t]
        history.append(row)
    return history


def chain(depth: int, updates: int = 20, factor: float = 1.0, seed: int = 0) -> History:
    """A healthy or falling chain of linear layers: each hands down `1 / factor` of the gradient, scattered by a tenth."""
    rng = np.random.default_rng(seed)
    layers = {f"layers.{i}": ("weight", "bias") for i in range(depth)}
    level = np.repeat(factor ** -np.arange(depth - 1, -1, -1.0), 2)
    norms = level * np.exp(0.1 * rng.standard_normal((updates, 2 * depth)))
    return history_of(
        layers,
        norms,
        loss=np.linspace(2.3, 2.2, updates),
        order={name: i for i, name in enumerate(layers)},
        weight_norm=np.full((updates, 2 * depth), 3.0),
        update_ratio=np.full((updates, 2 * depth), 1e-3),
    )


def seen(depth: int, updates: int = 20, kind: str = "ReLU", every: int = 1, **observed: Any) -> History:
    """A chain `fc0, act0, fc1, ...` with its activations observed at each `every`-th update.

    Args:
        depth: pairs of a layer and its activation.
        updates: records.
        kind: class of the activations.
        every: one update in so many is looked at.
        observed: `[L]` (root, fc0, act0, fc1, ...) or a scalar, for a statistic; it replaces what a healthy network has.
    """
    count = 1 + 2 * depth
    one_sided = kind == "ReLU"
    activation = np.arange(count) % 2 == 0
    activation[0] = False
    values = {
        "calls": 1.0,
        "activation_rms": 0.5,
        "activation_absmax": 2.0,
        "activation_nonfinite": 0.0,
        "saturated_fraction": np.where(activation, 0.5 if one_sided else 0.0, np.nan),
        "dead_fraction": np.where(activation & one_sided, 0.0, np.nan),
        "delta_norm": 0.1,
        "delta_nonfinite": 0.0,
        "gain": np.where(activation, 0.7, 1.4),
        **observed,
    }
    looks = np.arange(updates) % every == 0
    columns = {
        name: np.where(looks[:, None], np.broadcast_to(np.asarray(value, float), count), np.nan) for name, value in values.items()
    }
    names = [f"{name}{i}" for i in range(depth) for name in ("fc", "act")]
    return history_of(
        {name: ("weight",) if name.startswith("fc") else () for name in names},
        np.ones((updates, depth)),
        types={name: kind for name in names if name.startswith("act")},
        flat={name: "one-sided" if one_sided else "two-sided" for name in names if name.startswith("act")},
        order={f"fc{i}": i for i in range(depth)},
        weight_norm=np.full((updates, depth), 3.0),
        update_ratio=np.full((updates, depth), 1e-3),
        **columns,
    )


def alert(rule: str = "vanishing_gradient", **changes: Any) -> Alert:
    """An alert with everything filled in; `changes` by attribute."""
    filled: dict[str, Any] = {
        "rule": rule,
        "severity": Severity.WARNING,
        "step": 0,
        "layers": ("layers.0",),
        "parameters": (),
        "message": "gradient norm 3.1e-9 against 0.12 at the output",
        "evidence": {"ratio": 2.6e-8},
        "cause": "each sigmoid passes on at most a quarter of the gradient",
        "remedy": "use ReLU or GELU in its place",
        "origin": None,
        "last_step": 10,
        "count": 11,
        "state": "open",
    }
    return Alert(**(filled | changes))
