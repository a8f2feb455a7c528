"""What stands beside the records: the static facts of a model, and what has happened since the last record. Frozen, without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradwatch.records import SCHEMA

SYMMETRY_AFTER = 8
"""Records after which rows that were equal are compared again: before the earliest verdict, at update 10."""

BINARY = frozenset({"binary_cross_entropy", "binary_cross_entropy_with_logits"})
"""Criteria of two classes."""

FROZEN_AFTER = 5
"""Records running that have to find a parameter frozen, or thawed, for that to be meant so: a GAN freezes its other half for a step."""


@dataclass(frozen=True, slots=True)
class ParameterFact:
    """What does not change about one parameter.

    Attributes:
        name: qualified name, of the unwrapped model; a tied parameter stands once, under its first name.
        layer: qualified name of the module that holds it.
        shape: its shape; () for a scalar and for a parameter that is not materialised yet.
        dtype: for example "float32".
        trainable: requires a gradient.
        owner: the optimizer that steps it, as "AdamW#0", or None while none is known.
        init_rms: root mean square when attached (NaN: not known).
        equal_rows: all rows were equal when attached (a constant or zero initialisation); False for vectors.
        order: rank in the order of execution found in the autograd graph, from 0 at the input; None: never seen in a graph.
        distance: least number of autograd nodes between the loss and this parameter; None: never seen in a graph.
        in_scope: not left out by `Sampling.include` and `exclude`.
        still_equal: `equal_rows`, and all rows were equal again after the first `SYMMETRY_AFTER` records.
        clamped: every path from the loss to it that was seen goes through a `clamp`.
        connected: one of the first graphs led to it on a path on which nothing is multiplied by constants that are all zero, nothing
            has no elements, and no softmax is over a single one. False also where that could not be looked at.
    """

    name: str
    layer: str
    shape: tuple[int, ...] = ()
    dtype: str = "float32"
    trainable: bool = True
    owner: str | None = None
    init_rms: float = float("nan")
    equal_rows: bool = False
    order: int | None = None
    distance: int | None = None
    in_scope: bool = True
    still_equal: bool = False
    clamped: bool = False
    connected: bool = False

    @property
    def init_gain(self) -> float:
        """Factor by which a matrix changed the scale of independent inputs when the watch was attached: `init_rms` times the root of the
        number of inputs of a unit. NaN for a vector."""
        return self.init_rms * math.prod(self.shape[1:]) ** 0.5 if len(self.shape) >= 2 else math.nan


@dataclass(frozen=True, slots=True)
class LayerFact:
    """What does not change about one module.

    Attributes:
        name: qualified name; the root is "" (or the key of a mapping of models).
        type: class name, for example "Linear".
        kind: what it is: "activation", "normalization", "linear", "convolution", "recurrent", "embedding", "attention", "dropout",
            "list" (a ModuleList or ModuleDict), "container" or "other".
        order: rank of its first parameter in the order of execution, or None.
        role: "input", "hidden", "head" or "" while unknown.
        activation: for an activation its torch class name, else None.
        flat: how the activation is flat that the module is, or that of the function behind it (`F.relu`, `torch.tanh`), or of a module
            that stands behind others too: "two-sided", "one-sided" or "probability"; "" where it has no flat part and where it is not
            known.
        follower: class in torch of that activation which is no module, or stands behind others too; "" where there is none.
        places: of an activation that stands in several places (one `nn.ReLU` used again and again), the modules whose output it is
            given there, or that run before it. Its statistics are those of all places; those of each are told of the module before it.
        in_scope: not left out by `Sampling.include` and `exclude`.
        run: rank of its first call, in the order in which modules returned: a container comes after what it holds. None: it was not seen
            to run.
    """

    name: str
    type: str = "Module"
    kind: str = "other"
    order: int | None = None
    role: str = ""
    activation: str | None = None
    in_scope: bool = True
    flat: str = ""
    follower: str = ""
    places: tuple[str, ...] = ()
    run: int | None = None


@dataclass(frozen=True)
class Meta:
    """The static facts of a run; rewritten when the model or what is known of it changes.

    Attributes:
        parameters: one fact a column of the per-parameter statistics.
        layers: one fact a column of the per-layer statistics.
        outside: shapes of trainable leaves of the autograd graph that belong to no registered parameter and to no optimizer.
        outside_in_model: those of them that were found in the attributes of a watched module (a layer in a plain list), by path.
        opaque: the graph holds nodes that hide what is below them (reentrant checkpoint, compiled region, custom function).
        unreached: trainable parameters that no path of any graph walked so far reaches; () where a graph was opaque.
        squashed: "softmax" or "sigmoid" where the loss takes for logits what is that of something already ("softmax of sigmoid": what
            is the other); "" where it does not.
        squashed_by: the innermost module in which that runs; "" where it runs outside all modules, or in the root.
        squashed_since: the record at which that was found; 0: in the first graph.
        criterion: name in `torch.nn.functional` of the loss of the first backward passes, "cross_entropies" or "sum" where
            several losses, or elements, were added up; "" where it is another one.
        guess: loss of the best constant output under it, by the targets of these passes; 0 where it is not known.
        broadcast: under it the prediction was expanded to the shape of the target.
        schema: number of the layout.
    """

    parameters: tuple[ParameterFact, ...] = ()
    layers: tuple[LayerFact, ...] = ()
    outside: tuple[tuple[int, ...], ...] = ()
    outside_in_model: tuple[str, ...] = ()
    opaque: bool = False
    unreached: tuple[str, ...] = ()
    squashed: str = ""
    squashed_by: str = ""
    squashed_since: int = 0
    criterion: str = ""
    guess: float = 0.0
    broadcast: bool = False
    schema: int = SCHEMA

    @cached_property
    def trainable(self) -> NDArray[np.bool_]:
        """`[P]`."""
        return np.array([f.trainable for f in self.parameters], bool)

    @cached_property
    def owned(self) -> NDArray[np.bool_]:
        """`[P]`: an optimizer is known that owns it."""
        return np.array([f.owner is not None for f in self.parameters], bool)

    @cached_property
    def in_scope(self) -> NDArray[np.bool_]:
        """`[P]`."""
        return np.array([f.in_scope for f in self.parameters], bool)

    @cached_property
    def hidden(self) -> frozenset[str]:
        """Names of the parameters and layers that are not in scope."""
        parameters = {f.name for f in self.parameters if not f.in_scope}
        return frozenset(parameters.union(f.name for f in self.layers if not f.in_scope))

    @cached_property
    def derived(self) -> dict[type, Any]:
        """What those who read the facts have worked out from them, by its class: it is kept with them and dies with them."""
        return {}

    @cached_property
    def ndim(self) -> NDArray[np.int64]:
        """`[P]`."""
        return np.array([len(f.shape) for f in self.parameters], np.int64)

    @cached_property
    def owners(self) -> frozenset[str]:
        """The optimizers that own a trainable parameter."""
        return frozenset(f.owner for f in self.parameters if f.trainable and f.owner is not None)

    @cached_property
    def blank(self) -> NDArray[np.bool_]:
        """`[P]`: was exactly zero when the watch began."""
        return np.array([f.init_rms == 0.0 for f in self.parameters], bool)

    @cached_property
    def still_equal(self) -> NDArray[np.bool_]:
        """`[P]`: all rows were equal when the watch began, and after its first records."""
        return np.array([f.still_equal for f in self.parameters], bool)

    @cached_property
    def numel(self) -> NDArray[np.int64]:
        """`[P]`."""
        return np.array([int(np.prod(f.shape)) for f in self.parameters], np.int64)

    @cached_property
    def order(self) -> NDArray[np.float64]:
        """`[P]`: rank in the order of execution, NaN where unknown."""
        return np.array([np.nan if f.order is None else f.order for f in self.parameters], float)

    @cached_property
    def distance(self) -> NDArray[np.float64]:
        """`[P]`: autograd nodes between the loss and the parameter, NaN where unknown."""
        return np.array([np.nan if f.distance is None else f.distance for f in self.parameters], float)

    @cached_property
    def clamped(self) -> NDArray[np.bool_]:
        """`[P]`: a clamp stands before it."""
        return np.array([f.clamped for f in self.parameters], bool)

    @cached_property
    def connected(self) -> NDArray[np.bool_]:
        """`[P]`: nothing switches it off."""
        return np.array([f.connected for f in self.parameters], bool)

    @cached_property
    def layer_index(self) -> NDArray[np.int64]:
        """`[P]`: column of each parameter's module among the layers."""
        at = {f.name: i for i, f in enumerate(self.layers)}
        return np.array([at.get(f.layer, -1) for f in self.parameters], np.int64)


EMPTY = 4
"""Steps without a single gradient after which they are judged, and the weights looked at, again."""


@dataclass(frozen=True, slots=True)
class Pending:
    """What has happened since the last closed record and is not in it.

    Attributes:
        backward_calls: backward passes in the open record.
        unowned: backward passes dropped since the last record because only optimizers of other models stepped.
        foreign_steps: steps of optimizers that own nothing watched, or nothing that the open record reached, since the last record.
        ever_stepped: an owner of a watched parameter has stepped, or a watched weight has been changed by hand, at least once.
        empty_steps: steps of optimizers that own watched parameters, none of which has had a gradient or moved yet.
    """

    backward_calls: int = 0
    unowned: int = 0
    foreign_steps: int = 0
    ever_stepped: bool = False
    empty_steps: int = 0
