"""What does not change about a model, read once: the static facts that stand beside the history."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn.modules import activation as activations

from gradwatch.capture import private, saturation
from gradwatch.capture.criterion import Criterion
from gradwatch.capture.parameters import ParameterTable, as_real, materialised
from gradwatch.facts import SYMMETRY_AFTER, LayerFact, Meta, ParameterFact

_KINDS: tuple[tuple[str, tuple[type, ...]], ...] = (
    ("list", (nn.ModuleList, nn.ModuleDict)),
    ("attention", (nn.MultiheadAttention,)),
    ("linear", (nn.Linear, nn.Bilinear, nn.LazyLinear)),
    (
        "convolution",
        (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    ),
    (
        "normalization",
        (
            nn.BatchNorm1d,
            nn.BatchNorm2d,
            nn.BatchNorm3d,
            nn.SyncBatchNorm,
            nn.InstanceNorm1d,
            nn.InstanceNorm2d,
            nn.InstanceNorm3d,
            nn.LayerNorm,
            nn.GroupNorm,
            nn.LocalResponseNorm,
            nn.RMSNorm,
        ),
    ),
    ("recurrent", (nn.RNNBase, nn.RNNCellBase)),
    ("embedding", (nn.Embedding, nn.EmbeddingBag)),
    ("dropout", (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)),
)

_ACTIVATIONS = tuple(
    thing
    for name in activations.__all__
    if isinstance(thing := getattr(activations, name), type) and thing is not nn.MultiheadAttention
)


_WHOLE = 2**20
"""Elements up to which a parameter is looked at whole when it is first seen."""


def kind_of(module: nn.Module) -> str:
    """What a module is, for the words of a verdict."""
    if isinstance(module, _ACTIVATIONS):
        return "activation"
    for kind, types in _KINDS:
        if isinstance(module, types):
            return kind
    name = type(module).__name__
    if name.endswith("Norm") or "RMSNorm" in name:
        return "normalization"
    if private.children(module):
        return "container"
    # transformers wraps torch's functions in classes of its own: GELUActivation, SiLUActivation.
    return "activation" if name.endswith("Activation") else "other"


def in_scope(name: str, include: Iterable[str], exclude: Iterable[str]) -> bool:
    """Whether a module's name passes `Sampling.include` and `exclude`."""
    include, exclude = tuple(include), tuple(exclude)
    if include and not any(fnmatch.fnmatchcase(name, pattern) for pattern in include):
        return False
    return not any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude)


class InitialFacts:
    """How parameters were initialised; each is looked at once, when it is first seen, and those with equal rows once again."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[float, bool]] = {}
        self._due = SYMMETRY_AFTER
        self.still_equal: set[int] = set()

    def look_again(self, parameters: Sequence[Tensor]) -> bool:
        """Called when a record closes: after `SYMMETRY_AFTER` of them, find out whose rows are equal still; whether that was now."""
        if self._due <= 0:
            return False
        self._due -= 1
        equal = [slot for slot, (_, equal) in self._known.items() if equal and parameters[slot].requires_grad]
        if self._due or not equal:
            return False
        self.still_equal = {slot for slot in equal if _initial(parameters[slot])[1]}
        return bool(self.still_equal)

    def of(self, slot: int, parameter: Tensor) -> tuple[float, bool]:
        """Root mean square, and whether all rows are equal (never for vectors)."""
        if not materialised(parameter):
            return float("nan"), False
        if slot not in self._known:
            self._known[slot] = _initial(parameter)
        return self._known[slot]


def _initial(parameter: Tensor) -> tuple[float, bool]:
    tensor = parameter.detach()
    tensor = as_real(private.shard(tensor))
    if tensor.numel() == 0 or not tensor.dtype.is_floating_point or tensor.layout is not torch.strided:
        return float("nan"), False
    part = tensor
    if tensor.numel() > _WHOLE and tensor.is_contiguous():
        # A million elements say how large a matrix was made as well as all of them, and attaching stays quick.
        part = tensor.view(-1)[:_WHOLE]
    with torch.no_grad():
        rms = float(torch.linalg.vector_norm(part, dtype=torch.float64)) / part.numel() ** 0.5
        rows = tensor.shape[0] if tensor.dim() > 1 else 1
        equal = rows > 1 and bool((tensor[1:64] == tensor[:1]).all()) and bool((tensor[1:] == tensor[:1]).all())
    return rms, equal


def describe(
    table: ParameterTable,
    initial: InitialFacts,
    *,
    owners: Mapping[int, str],
    order: Mapping[int, int],
    distance: Mapping[int, int],
    clamped: Collection[int] = (),
    connected: Collection[int] = (),
    inputs: Iterable[int] = (),
    heads: Iterable[int] = (),
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    outside: tuple[tuple[int, ...], ...] = (),
    outside_in_model: tuple[str, ...] = (),
    opaque: bool = False,
    unreached: Iterable[int] = (),
    functions: Mapping[str, tuple[str, str]] = MappingProxyType({}),
    places: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
    run: Mapping[str, int] = MappingProxyType({}),
    squashed: tuple[str, str, int] = ("", "", 0),
    criterion: Criterion | None = None,
) -> Meta:
    """The static facts of a run.

    Args:
        table: the parameters.
        initial: how they were initialised.
        owners: slot -> name of the optimizer that owns it.
        order: slot -> sequence number in the graph; turned into ranks.
        distance: slot -> nodes between the loss and it.
        clamped: slots that the gradient reaches through a clamp only.
        connected: slots that it reaches on a path on which nothing is multiplied by zeros.
        inputs: slots that begin a branch of the graph; where none is known, the first in order.
        heads: slots that end one; where none is known, the last in order.
        include: patterns of module names that are spoken of; empty: all.
        exclude: patterns of module names that are not.
        outside: shapes of the graph's leaves that no model and no optimizer holds.
        outside_in_model: paths of those found in a module's attributes.
        opaque: the graph hides something.
        unreached: slots that no graph reaches.
        functions: layer -> how the activation is flat that follows it as a function, or as a module that stands in other places too, and
            its class in torch.
        places: activation that stands in several places -> the layers that it follows there.
        run: layer -> rank of its first call.
        squashed: what is applied to the output before the criterion does it again, and the layer in which.
        criterion: what the loss is, where that is known.
    """
    ranks = {slot: rank for rank, slot in enumerate(sorted(order, key=lambda slot: order[slot]))}
    parameters = []
    layer_order: dict[str, int] = {}
    for slot in table.column_slots:
        p, layer = table.params[slot], table.layers[slot]
        rms, equal = initial.of(slot, p)
        if slot in ranks:
            layer_order[layer] = min(ranks[slot], layer_order.get(layer, ranks[slot]))
        parameters.append(
            ParameterFact(
                name=table.names[slot],
                layer=layer,
                shape=tuple(p.shape) if materialised(p) or p.device.type == "meta" else (),
                dtype=str(p.dtype).removeprefix("torch."),
                # As of the last scan: a GAN freezes its other half for a step.
                trainable=table.trainable[slot],
                owner=owners.get(slot),
                init_rms=rms,
                equal_rows=equal,
                order=ranks.get(slot),
                distance=distance.get(slot),
                clamped=slot in clamped,
                connected=slot in connected,
                in_scope=in_scope(layer, include, exclude),
                still_equal=slot in initial.still_equal,
            )
        )
    in_order = sorted(layer_order, key=lambda name: layer_order[name])
    begin = {table.layers[slot] for slot in inputs} or set(in_order[:1])
    end = {table.layers[slot] for slot in heads} or set(in_order[-1:])
    layers = []
    for name, module in table.modules.items():
        kind = kind_of(module)
        role = "" if name not in layer_order else "head" if name in end else "input" if name in begin else "hidden"
        layers.append(
            LayerFact(
                name=name,
                type=type(module).__name__,
                kind=kind,
                order=layer_order.get(name),
                role=role,
                activation=type(module).__name__ if kind == "activation" else None,
                flat=saturation.shape(module) or functions.get(name, ("", ""))[0],
                follower=functions.get(name, ("", ""))[1],
                places=places.get(name, ()),
                run=run.get(name),
                in_scope=in_scope(name, include, exclude),
            )
        )
    return Meta(
        parameters=tuple(parameters),
        layers=tuple(layers),
        outside=outside,
        outside_in_model=outside_in_model,
        opaque=opaque,
        unreached=tuple(table.names[slot] for slot in unreached if table.columns[slot] >= 0),
        squashed=squashed[0],
        squashed_by=squashed[1],
        squashed_since=squashed[2],
        criterion=criterion.name if criterion is not None else "",
        guess=criterion.guess if criterion is not None and criterion.guess > 0 else 0.0,
        broadcast=criterion is not None and criterion.broadcast,
    )
