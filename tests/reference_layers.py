"""A second, independent, slow way to compute what a watch records of each layer: plain torch in float64, nothing of the package.

It runs on a twin of the watched network, in the same loop. Each module's output is replaced by `output + probe`, where the probe is a
leaf of zeros: the gradient that reaches the probe is the one with respect to the output, by the definition of a derivative and not by a
hook on the output, so that views, in-place operations and nested outputs cannot fool it.

The author of the loop states by hand what belongs to which record:

    reference.backward(loss)                # instead of loss.backward()
    optimizer.step()
    reference.close()                       # one record
    with reference.unseen(): ...            # forward passes that must leave no trace
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

PER_LAYER = (
    "calls",
    "activation_rms",
    "activation_absmax",
    "activation_nonfinite",
    "saturated_fraction",
    "dead_fraction",
    "delta_norm",
    "delta_nonfinite",
    "gain",
)
PER_INPUT = ("input_mean", "input_std", "input_nonfinite")

CALLS, TENSORS, WHOLE = 8, 4, 1024
DEAD_FROM, DEAD_WINDOW = 10, 32

SILENT: Mapping[type[nn.Module], float] = {nn.ReLU: 0.0, nn.ReLU6: 0.0, nn.GELU: 0.00843, nn.SiLU: 0.02734}
"""How far below 0 the output of a silent unit may lie."""

JUDGED = (nn.ReLU, nn.ReLU6, nn.Tanh, nn.Sigmoid, nn.Softmax, nn.GELU, nn.SiLU)
"""Activations whose flat part this file knows: where their slope, by autograd in float64, is below 1/50 of the steepest there is."""

STEEPEST: Mapping[type[nn.Module], float] = {nn.Sigmoid: 0.25, nn.GELU: 1.1289, nn.SiLU: 1.0998}


def in_storage_order(tensor: Tensor) -> Tensor:
    """The elements as they lie in memory, `[n]`; of a tensor with gaps or overlaps the middle of its leading dimensions, at most 4,096."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    packed = tensor.permute(sorted(range(tensor.dim()), key=lambda d: (-tensor.stride(d), d)))
    strides = torch.empty(packed.shape).stride()
    if all(size == 1 or a == b for size, a, b in zip(packed.shape, packed.stride(), strides, strict=True)):
        return packed.reshape(-1)
    while tensor.numel() > 4 * WHOLE and tensor.dim() > 1:
        tensor = tensor[tensor.shape[0] // 2]
    if tensor.numel() > 4 * WHOLE:
        start = (tensor.numel() - 4 * WHOLE) // 2
        tensor = tensor[start : start + 4 * WHOLE]
    return tensor.reshape(-1)


@dataclass
class Sample:
    """The sampled elements of a tensor, float64; what it is a sample of has `numel` elements."""

    values: Tensor
    numel: int
    bad: int

    @classmethod
    def of(cls, tensor: Tensor, whole: bool = False) -> Sample | None:
        """`whole`: count at least 1 as bad where there is anything outside the sample that is not finite."""
        flat = in_storage_order(tensor)
        if flat.numel() == 0:
            return None
        numel = tensor.numel() * (2 if tensor.is_complex() else 1)
        n = flat.numel()
        if n > WHOLE:
            step = (n - 64) // 15
            step = max(64, step if step % 2 else step - 1)
            flat = torch.cat([flat[i * step : i * step + 64] for i in range(16)])
        bad = int((~torch.isfinite(flat)).sum())
        if whole and bad == 0 and not bool(torch.isfinite(tensor.detach()).all()):
            bad = 1
        return cls(flat.to(torch.float64, copy=True), numel, bad)

    @property
    def squares(self) -> float:
        return float((self.values * self.values).sum())

    @property
    def whole_squares(self) -> float:
        return self.squares * self.numel / len(self.values)


@dataclass
class Output:
    """One tensor that a call put out, and the gradients with respect to it, one for each backward."""

    sample: Sample
    above: list[Sample] = field(default_factory=list)


@dataclass
class Call:
    """One call of a module; `below`: gradients with respect to its first input; `place`: of an activation, what it is behind."""

    outputs: list[Output] = field(default_factory=list)
    below: list[Sample] = field(default_factory=list)
    flat: int = 0
    judged: int = 0
    fired: NDArray[np.bool_] | None = None
    place: tuple[str, str] | None = None


class LayerReference:
    """The per-layer record of one loop.

    Args:
        model: a module, or a mapping of names to modules, as the watch is given it.
        scope: whether a module, by its name, is looked at.
        channels: names of activations whose units are the second dimension.
        blind: names of modules whose input the watch cannot tell, so that their gain is not known.
        dense: updates with full statistics at the start.
        every: afterwards one record in `every` is a full one.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, nn.Module],
        *,
        scope: Callable[[str], bool] = lambda name: True,
        channels: Collection[str] = (),
        blind: Collection[str] = (),
        dense: int = 64,
        every: int = 10,
    ) -> None:
        models = {"": model} if isinstance(model, nn.Module) else dict(model)
        self.modules: dict[str, nn.Module] = {}
        self.rows: list[dict[str, Any]] = []
        self._scope, self._channels, self._blind = scope, channels, blind
        self._dense, self._every = dense, every
        self._calls: dict[str, list[Call]] = {}
        self._inputs: list[Sample] = []
        self._looks: dict[str, int] = {}
        self._fired: dict[tuple[str, Any], NDArray[np.int64]] = {}
        self._looked: dict[tuple[str, Any], int] = {}
        self._places: dict[str, set[tuple[str, str] | None]] = {}
        self._by: dict[int, tuple[Tensor, str]] = {}
        self._last: str | None = None
        self._scale = 1.0
        self._off, self._takes = 0, False
        self._stand_ins: dict[int, tuple[Tensor, int, Output]] = {}
        self._pending: list[tuple[nn.Module, list[Sample]]] = []
        seen: set[int] = set()
        for key, root in models.items():
            root.register_forward_pre_hook(self._enter, with_kwargs=True)
            for name, module in root.named_modules():
                if id(module) not in seen:
                    seen.add(id(module))
                    self.add(".".join(part for part in (key, name) if part), module)

    def add(self, name: str, module: nn.Module) -> None:
        """Look at one more module, that has come to the model."""
        self.modules[name] = module
        if self._scope(name):
            module.register_forward_pre_hook(self._before)
            module.register_forward_hook(lambda m, args, output, name=name: self._after(name, m, args, output))

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(self.modules)

    # -- called by the loop --------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def unseen(self) -> Iterator[None]:
        """Forward and backward passes in here belong to no record."""
        self._off += 1
        try:
            yield
        finally:
            self._off -= 1

    def backward(self, loss: Tensor, *, scale: float = 1.0, **options: Any) -> None:
        """`loss.backward()`; forward passes inside it are recomputations. `scale`: the factor in `loss`."""
        self._scale = scale
        self._off += 1
        self._stand_ins = {}
        self._takes = True  # a gradient that passes outside (a penalty's) is not of the loss
        try:
            loss.backward(**options)
        finally:
            self._off -= 1
            self._takes = False

    def forget(self) -> None:
        """What was seen since the last record belongs to none."""
        self._calls, self._inputs = {}, []

    def close(self, *names: str, keep: Collection[str] = ()) -> None:
        """The record is complete.

        Args:
            *names: of the models (keys of the mapping) that it is of; none: all.
            keep: prefixes of modules whose forward passes belong to a later record.
        """
        number = len(self.rows)
        calls = self._calls
        mine = {name for name in self.modules if not names or name.split(".")[0] in names}
        mine -= {name for name in mine if any(name.split(".")[0] == prefix for prefix in keep)}
        row: dict[str, Any] = {name: {} for name in PER_LAYER}
        if number < self._dense or number % self._every == 0:
            for name in mine:
                if self._scope(name):
                    self._summarise(row, name, calls.get(name, []))
            if self._inputs:
                values = torch.cat([sample.values for sample in self._inputs])
                row["input_mean"] = float(values.mean())
                row["input_std"] = float(values.std(correction=0))
                row["input_nonfinite"] = float(sum(sample.bad for sample in self._inputs))
        self.rows.append(row)
        self._calls = {name: found for name, found in calls.items() if any(name.split(".")[0] == prefix for prefix in keep)}
        self._inputs = []

    def stat(self, name: str) -> NDArray[np.float64]:
        """`[T, L]`, or `[T]` for the input."""
        if name in PER_INPUT:
            return np.array([row.get(name, math.nan) for row in self.rows], np.float64)
        return np.array([[row[name].get(layer, math.nan) for layer in self.layers] for row in self.rows], np.float64)

    # -- inside --------------------------------------------------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._last = None
        if not self._off and len(self._inputs) < CALLS:
            given = tensors_in([*args, *kwargs.values()])
            sample = Sample.of(given[0], whole=True) if given else None
            if sample is not None:
                self._inputs.append(sample)

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        below: list[Sample] = []
        self._pending.append((module, below))
        given = tensors_in(args[0]) if args else []
        if not self._off and given and given[0].requires_grad and not given[0].is_leaf:
            given[0].register_hook(lambda grad: self._take(below, grad))

    def _take(self, into: list[Sample], grad: Tensor) -> None:
        if self._takes:
            sample = Sample.of(grad)
            if sample is not None:
                into.append(sample)

    def _after(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        while self._pending and self._pending[-1][0] is not module:
            self._pending.pop()  # broken off by an exception
        _, below = self._pending.pop()
        if self._off:
            return None
        calls = self._calls.setdefault(name, [])
        by = self._whose(args[0]) if args else None
        call = Call(below=below, place=("given", by) if by else ("behind", self._last) if self._last else None)
        if list(module.parameters()) and (not list(module.children()) or isinstance(module, nn.MultiheadAttention)):
            self._last = by = name
        if type(module) in JUDGED:
            by = name
        calls.append(call)
        # Of an activation those of each place.
        here = [one for one in calls if type(module) not in JUDGED or one.place == call.place]
        if len(here) > CALLS:
            self._note_whose(output, by)
            return None
        new: dict[int, Tensor] = {}
        for i, tensor in enumerate(tensors_in(output)):
            known = self._stand_ins.get(id(tensor))
            if known is not None and known[0] is tensor and known[1] == tensor._version:
                call.outputs.append(known[2])  # a child's output, unchanged
                continue
            sample = Sample.of(tensor, whole=True)
            if sample is None:
                continue
            one = Output(sample)
            call.outputs.append(one)
            if tensor.requires_grad and not tensor.is_leaf:
                probe = torch.zeros_like(tensor.detach()).requires_grad_()
                probe.register_hook(lambda grad, one=one: self._take(one.above, grad))
                new[id(tensor)] = stand_in = tensor + probe
                self._stand_ins[id(stand_in)] = stand_in, stand_in._version, one
            if i == 0 and type(module) in JUDGED:
                self._judge(name, module, call, args, tensor.detach())
        result = rebuilt(output, new)
        self._note_whose(result, by)
        return result

    def _note_whose(self, output: Any, by: str | None) -> None:
        for tensor in tensors_in(output):
            by = self._whose(tensor) or by  # a container puts out what its last module did
            if by:
                self._by[id(tensor)] = tensor, by

    def _whose(self, given: Any) -> str | None:
        """The module whose work the first tensor is, though it was changed in place since."""
        for tensor in tensors_in(given)[:1]:
            known = self._by.get(id(tensor))
            if known is not None and known[0] is tensor:
                return known[1]
        return None

    def _judge(self, name: str, module: nn.Module, call: Call, args: tuple[Any, ...], y: Tensor) -> None:
        values = Sample.of(y).values  # type: ignore[union-attr]
        if isinstance(module, (nn.ReLU, nn.ReLU6)):
            flat = (values <= 0) | ((values >= 6) if isinstance(module, nn.ReLU6) else False)
        elif isinstance(module, nn.Tanh):
            flat = 1 - values * values < 0.02
        elif isinstance(module, (nn.Sigmoid, nn.Softmax)):
            flat = 4 * values * (1 - values) < 0.02
        else:
            x = Sample.of(args[0]).values.requires_grad_()  # type: ignore[union-attr]
            (slope,) = torch.autograd.grad(module.forward(x).sum(), x)
            flat = slope.abs() / STEEPEST[type(module)] < 0.02
        call.flat, call.judged = int(flat.sum()), len(values)
        if type(module) in SILENT and y.dim() > 1:
            call.fired = self._which_fire(name, y, SILENT[type(module)])

    def _which_fire(self, name: str, y: Tensor, silent: float) -> NDArray[np.bool_]:
        """`[U]`: which units fired, for the part of the batch that is looked at this time."""
        turn = self._looks.get(name, 0)

        def some(size: int, wanted: int) -> list[int]:
            step = max(1, math.ceil(size / wanted))
            return list(range(turn % step, size, step))

        if name in self._channels:
            y = y[some(len(y), 8)].flatten(2)
            y = y[:, :, some(y.shape[2], 64)].transpose(1, 2).reshape(-1, y.shape[1])
        else:
            y = y.reshape(-1, y.shape[-1])
            y = y[some(len(y), 32)]
        fires: NDArray[np.bool_] = ((y > 0) | (y < -silent) | y.isnan()).any(0).numpy()
        return fires

    def _summarise(self, row: dict[str, Any], name: str, calls: list[Call]) -> None:
        row["calls"][name] = float(len(calls))
        outputs = [output for call in calls for output in call.outputs]
        if outputs:
            values = torch.cat([output.sample.values for output in outputs])
            row["activation_rms"][name] = math.sqrt(float((values * values).mean()))
            row["activation_absmax"][name] = float(values.abs().max())
            row["activation_nonfinite"][name] = float(sum(output.sample.bad for output in outputs))
        above = [sample for output in outputs for sample in output.above]
        if above:
            row["delta_norm"][name] = math.sqrt(sum(sample.whole_squares for sample in above)) / self._scale
            row["delta_nonfinite"][name] = float(sum(sample.bad for sample in above))
        both = [call for call in calls if call.below and call.outputs and call.outputs[0].above]
        if both and name not in self._blind:
            below_squares = sum(sample.whole_squares for call in both for sample in call.below)
            above_squares = sum(sample.whole_squares for call in both for sample in call.outputs[0].above)
            ratio = below_squares / above_squares if above_squares else math.nan
            if math.isfinite(ratio):
                row["gain"][name] = math.sqrt(ratio)
        self._summarise_activation(row, name, calls)

    def _summarise_activation(self, row: dict[str, Any], name: str, calls: list[Call]) -> None:
        """What stands behind one module and behind another is told of the two, besides what is told of the activation as a whole."""
        places = self._places.setdefault(name, set())
        places |= {call.place for call in calls if call.judged or call.fired is not None}
        if judged := sum(call.judged for call in calls):
            row["saturated_fraction"][name] = sum(call.flat for call in calls) / judged
        dead, units = 0, 0
        for place in {call.place for call in calls}:
            group = [call for call in calls if call.place == place]
            told = place[1] if place and len(places) > 1 and type(self.modules[place[1]]) not in JUDGED else None
            judged = sum(call.judged for call in group)
            if judged and told:
                row["saturated_fraction"][told] = sum(call.flat for call in group) / judged
            fired = [call.fired for call in group if call.fired is not None]
            if not fired:
                continue
            key = name, place
            look = self._looked[key] = self._looked.get(key, 0) + 1
            last = self._fired.setdefault(key, np.zeros(len(fired[0]), np.int64))
            last[np.logical_or.reduce(fired)] = look
            if look >= DEAD_FROM:
                here = int((look - last >= min(look, DEAD_WINDOW)).sum())
                dead, units = dead + here, units + len(last)
                if told:
                    row["dead_fraction"][told] = here / len(last)
        if units:
            row["dead_fraction"][name] = dead / units
        if any(call.judged or call.fired is not None for call in calls):
            self._looks[name] = self._looks.get(name, 0) + 1


def tensors_in(output: Any) -> list[Tensor]:
    """The first four tensors of an output; scalars only where there is nothing else."""
    found = [t for t in _leaves(output) if t.is_floating_point() or t.is_complex()]
    return ([t for t in found if t.dim()] or found)[:TENSORS]


def _leaves(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    elif dataclasses.is_dataclass(output):
        output = list(vars(output).values())
    return [t for part in output for t in _leaves(part)] if isinstance(output, (list, tuple)) else []


def rebuilt(output: Any, new: Mapping[int, Tensor]) -> Any:
    """The same output with some of its tensors replaced."""
    if isinstance(output, Tensor):
        return new.get(id(output), output)
    if isinstance(output, tuple):
        parts = [rebuilt(part, new) for part in output]
        return type(output)(*parts) if hasattr(output, "_fields") else tuple(parts)
    if isinstance(output, list):
        return [rebuilt(part, new) for part in output]
    if isinstance(output, dict):
        return type(output)((key, rebuilt(value, new)) for key, value in output.items())
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return dataclasses.replace(output, **{key: rebuilt(value, new) for key, value in vars(output).items()})
    return output
