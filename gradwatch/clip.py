"""Clippers: what `clip=` of a watch takes besides a float, and what clips in a loop without a watch.

```python
clip = AutoClip(percentile=10)
with GradWatch(model, clip=clip):
    ...  # the training loop; without a watch, clip(model.parameters()) right before optimizer.step()
```

Two kinds. `GlobalNorm`, `AutoClip`, `ZClip` and `MedianScaled` multiply all gradients by one factor, so that their direction stays;
they differ in the bound: fixed, or learnt from the norms of earlier updates. `Value`, `PerParameter`, `PerLayer` and `AGC` clip part
by part, so that one part that explodes does not take the others down with it, but the update points elsewhere.

All of them: what lies below the bound keeps every bit. A norm that is not finite multiplies nothing and is not learnt. No factor
waits for a device. Loss scales come off first (`scaler.unscale_(optimizer)`), as for torch's own functions; a watch sees to that. What
learns keeps one history: with several optimizers, each needs a clipper of its own.
"""

from __future__ import annotations

import abc
import fnmatch
import inspect
import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from gradwatch.capture import private
from gradwatch.capture.norms import TINY
from gradwatch.capture.parameters import named_modules

__all__ = [
    "AGC",
    "AutoClip",
    "Clipper",
    "GlobalNorm",
    "Gradients",
    "MedianScaled",
    "NormClipper",
    "PerLayer",
    "PerParameter",
    "Value",
    "ZClip",
]


@dataclass(frozen=True, slots=True)
class Gradients:
    """What is about to be stepped.

    Attributes:
        params: tensors with `.grad`.
        norms: float64 or float32 `[N]` on one device, the CPU or that of the gradients: 2-norm of each gradient as `p.grad` holds it
            now.
        names: qualified names of the parameters; "" each where they are not known.
        layers: qualified name of the module that holds each.
        heads: indices of the parameters of the last layer; empty where it is not known.
    """

    params: Sequence[Tensor]
    norms: Tensor
    names: Sequence[str]
    layers: Sequence[str]
    heads: frozenset[int] = frozenset()


class Clipper(Protocol):
    """Takes the parameters that are about to be stepped and changes their `.grad` in place, as torch's own clipping functions do."""

    def __call__(self, parameters: Iterable[Tensor], /) -> Any: ...


class NormClipper(abc.ABC):
    """A clipper that goes by norms: a watch, which has read them already, hands them over.

    One of your own defines `clip`, and `state_dict` and `load_state_dict` if it learns.
    """

    by_norms_alone = True
    """It multiplies by factors that follow from the norms: gradients that a loss scale is still on are clipped as they are, by true norms."""

    _places: _Places | None = None

    @abc.abstractmethod
    def clip(self, gradients: Gradients) -> Tensor:
        """Scale the gradients in place.

        Args:
            gradients: what is about to be stepped.

        Returns:
            The smallest factor applied, a 0-d tensor on the device of the norms: 1 where nothing was clipped, NaN where it is not known.
        """

    def __call__(self, parameters: Iterable[Tensor], /) -> Tensor:
        """Read the norms and clip: for a loop without a watch, right before `optimizer.step()`.

        A norm of half precision is read in float32. On a device, float32 gradients whose norm is beyond 1.8e19 count as not finite:
        their squares overflow, and reading them again would wait.

        Args:
            parameters: what is about to be stepped; those without a gradient are passed over.

        Returns:
            What `clip` returns.

        Raises:
            TypeError: something among them is no tensor.
            ValueError: the clipper needs to know names or layers, and was given no model.
        """
        params = _with_gradients(type(self).__name__, parameters)
        if not params:
            return torch.ones((), device="cpu")
        with torch.no_grad():
            norms = norms_of(params)
            if self._places is None:
                unknown = [""] * len(params)
                return self.clip(Gradients(params, norms, unknown, unknown))
            places = self._places.of(params)
            return self.clip(Gradients(params, norms, [place.name for place in places], [place.layer for place in places]))

    def state_dict(self) -> dict[str, Any]:
        """What it has learnt, as numbers and tensors that training on does not change; empty for those that learn nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken.

        Args:
            state: what `state_dict` of the same class returned.

        Raises:
            ValueError: it is something else.
        """
        if not isinstance(state, Mapping) or len(state):
            raise ValueError(
                f"{type(self).__name__}.load_state_dict: got {_what_state(state)}; a {type(self).__name__} learns nothing and needs {{}}. "
                "Was another clipper in use when this was saved?"
            )

    def __repr__(self) -> str:
        names = [name for name in inspect.signature(type(self)).parameters if name != "model" and hasattr(self, name)]
        shown = [f"{name}={getattr(self, name)!r}" for name in names]
        if self._places is not None:
            shown.append(f"model={self._places.kind}")
        return f"{type(self).__name__}({', '.join(shown)})"


# -- one factor for all, a fixed bound ---------------------------------------------------------------------------------------------


class GlobalNorm(NormClipper):
    """One bound for the 2-norm of all gradients together: `torch.nn.utils.clip_grad_norm_`, and bit-equal to it.

    `g *= min(1, max_norm / (total + 1e-6))` (Pascanu, Mikolov and Bengio 2013, arXiv 1211.5063). It differs where torch's result is of
    no use: a total that is not finite changes nothing, instead of making NaNs or zeros of all gradients. Below the bound nothing changes
    either, where torch multiplies by 0.9999995 from `max_norm - 1e-6` on. A norm of half precision is read in float32: in bfloat16 it
    is off by up to 0.4 %. For a bound below 1e-4 the 1e-6 is taken relative to it.

    Good for: recurrent networks and transformers, whose gradients explode as a whole now and then; 1.0 is the custom. Not for: finding
    the bound (`AutoClip`, `ZClip` and `MedianScaled` do), or one layer that explodes among healthy ones (`PerLayer`, `AGC`).

    ```python
    with GradWatch(model, clip=GlobalNorm(1.0)):  # clip=1.0 is short for it
        ...  # the training loop
    ```

    Args:
        max_norm: the bound, above 0.
    """

    def __init__(self, max_norm: float) -> None:
        self.max_norm = _above_zero("GlobalNorm", "max_norm", max_norm)

    def clip(self, gradients: Gradients) -> Tensor:
        """Scale all gradients by one factor, and return it."""
        total = _joint(gradients.norms)
        if total.dtype is torch.float64 and _on_host(total) and TINY < float(total) < 1e30 and not _any_double(gradients.params):
            # Norms that a watch has read in float64: torch divides in the precision of the gradients.
            total = total.float()
        return _clip_jointly(gradients.params, total, self.max_norm)


class Value(NormClipper):
    """Clamps each element to `[-clip_value, clip_value]`: `torch.nn.utils.clip_grad_value_` does the work.

    `g = clamp(g, -clip_value, clip_value)` (Mikolov 2012, PhD thesis, section 3.2.2). On the host, gradients whose norm is not finite are
    left out; on a device an Inf becomes `clip_value`, and a NaN stays, as in torch. Sparse gradients are summed and clamped. Complex ones
    are refused, as in torch.

    Good for: single elements far larger than all others, as rare tokens and long recurrences give. Not for: keeping the direction of the
    update, which leans to the sign of the gradient as more is clamped.

    ```python
    with GradWatch(model, clip=Value(0.5)):
        ...  # the training loop
    ```

    Args:
        clip_value: the largest absolute value, above 0.
    """

    by_norms_alone = False

    def __init__(self, clip_value: float) -> None:
        self.clip_value = _above_zero("Value", "clip_value", clip_value)

    def clip(self, gradients: Gradients) -> Tensor:
        """Clamp, and return NaN: which factor that was for a norm is not known without reading it again."""
        params = gradients.params
        if _on_host(gradients.norms):
            params = [p for p, norm in zip(params, gradients.norms.tolist(), strict=True) if math.isfinite(norm)]
        dense = [p for p, g in zip(params, _grads(params), strict=True) if not g.is_sparse]
        if dense:
            torch.nn.utils.clip_grad_value_(dense, self.clip_value)
        with torch.no_grad():
            for g in _grads(params):
                if g.is_sparse:
                    summed = g.coalesce()
                    summed.values().clamp_(-self.clip_value, self.clip_value)
                    g.copy_(summed)
        return gradients.norms.new_full((), math.nan)


# -- part by part ------------------------------------------------------------------------------------------------------------------


class PerParameter(NormClipper):
    """One bound for the 2-norm of each parameter's gradient: `torch.nn.utils.clip_grad_norm_` called for each parameter alone.

    `g_i *= min(1, max_norm / (|g_i| + 1e-6 max_norm))`. On the host only what exceeds the bound is multiplied.

    Good for: single parameters that explode (an embedding, a gain), when the rest shall go on learning at full size. Not for: parameters
    of very different sizes under one bound: `AGC` takes each relative to its weights.

    ```python
    with GradWatch(model, clip=PerParameter(0.1)):
        ...  # the training loop
    ```

    Args:
        max_norm: the bound of each, above 0.
    """

    def __init__(self, max_norm: float) -> None:
        self.max_norm = _above_zero("PerParameter", "max_norm", max_norm)

    def clip(self, gradients: Gradients) -> Tensor:
        """Scale each gradient that exceeds the bound, and return the smallest factor."""
        return _clip_each(gradients.params, _factors(_precise(gradients.norms), self.max_norm))


class PerLayer(NormClipper):
    """One bound for the 2-norm over all parameters of a module: weight and bias of a layer are clipped together.

    `g_i *= min(1, max_norm / (|g_layer| + 1e-6 max_norm))`, where the norm is taken over the parameters that the same module holds
    directly. Where one of them is not finite, that layer is left as it is and the others are clipped.

    Good for: deep networks in which the gradient of a few layers explodes; weight and bias keep their proportion. Not for: layers of
    very different sizes under one bound: `AGC` takes each relative to its weights.

    ```python
    with GradWatch(model, clip=PerLayer(0.5)):
        ...  # the training loop; without a watch, PerLayer(0.5, model=model) knows the layers
    ```

    Args:
        max_norm: the bound of each, above 0.
        model: where it is called without a watch, the model whose layers they are; held weakly.
    """

    def __init__(self, max_norm: float, *, model: nn.Module | None = None) -> None:
        self.max_norm = _above_zero("PerLayer", "max_norm", max_norm)
        self._places = None if model is None else _Places("PerLayer", model)
        self._plan: tuple[tuple[str, ...], Tensor, Tensor] | None = None

    def __call__(self, parameters: Iterable[Tensor], /) -> Tensor:
        """Read the norms and clip, as every clipper does; needs `model`."""
        if self._places is None:
            raise ValueError(
                f"{self!r} was called without a watch and does not know which parameters share a layer; it needs the model. Give it one, "
                f"as PerLayer({self.max_norm}, model=model), or pass it to GradWatch(model, clip=...)."
            )
        return super().__call__(parameters)

    def clip(self, gradients: Gradients) -> Tensor:
        """Scale the gradients of each layer that exceeds the bound, and return the smallest factor."""
        if not len(gradients.params):
            return gradients.norms.new_ones(())
        members, layer_of = self._members(tuple(gradients.layers), gradients.norms.device)
        norms = _precise(gradients.norms)
        of_layers = _joint(torch.cat((norms, norms.new_zeros(1)))[members], dim=1)
        return _clip_each(gradients.params, _factors(of_layers, self.max_norm)[layer_of])

    def _members(self, layers: tuple[str, ...], device: torch.device) -> tuple[Tensor, Tensor]:
        """The parameters of each layer, int64 `[L, most]`, filled up with N; and the layer of each, int64 `[N]`.

        Kept from update to update: making them copies to the device. (A scatter-add needs one of them only, but its sums change with
        the order in which a GPU's threads arrive.)
        """
        if self._plan is None or self._plan[0] != layers or self._plan[1].device != device:
            index = {layer: i for i, layer in enumerate(dict.fromkeys(layers))}
            rows: list[list[int]] = [[] for _ in index]
            for i, layer in enumerate(layers):
                rows[index[layer]].append(i)
            most = max(map(len, rows))
            padded = [row + [len(layers)] * (most - len(row)) for row in rows]
            layer_of = [index[layer] for layer in layers]
            self._plan = (layers, torch.tensor(padded, device=device), torch.tensor(layer_of, device=device))
        return self._plan[1], self._plan[2]


class AGC(NormClipper):
    """Adaptive gradient clipping: each unit's gradient is bounded by a fraction of that unit's weights.

    `g_i *= clip_factor * max(|w_i|, eps) / |g_i|` where `|g_i|` exceeds it (Brock, De, Smith and Simonyan 2021, arXiv 2102.06171, equation
    3, with its defaults). A unit is a row of a matrix, an output filter of a convolution, a token of an embedding; a bias,
    a gain or a scalar is one as a whole, as in the paper's code, and so is every tensor with at most one dimension longer than 1. The last
    layer is left out, as in the paper: the watch tells which one that is, and `exclude` names what else shall be. Weights and gradients
    are read once more for it. A sparse gradient is summed first, which waits where it lies on a device.

    Good for: networks without normalisation layers, large batches, large learning rates; 0.01 is the paper's for batches of 4096, and
    smaller ones do with more. Not for: weights that start at zero and shall grow fast (a zero-initialised gate moves by `clip_factor * eps`).

    ```python
    with GradWatch(model, clip=AGC(exclude=("*.gate",))):
        ...  # the training loop; without a watch: AGC(exclude=("head.*",), model=model)
    ```

    Args:
        clip_factor: largest ratio of a unit's gradient to its weights, above 0.
        eps: weights below this count as this: what is initialised with zeros must be able to move. Above 0.
        exclude: patterns (fnmatch) of names of parameters that are not clipped.
        model: knows the names where it is called without a watch, and which weights belong to a transposed convolution, whose units lie
            along dimension 1; held weakly.
    """

    by_norms_alone = False

    def __init__(
        self, clip_factor: float = 0.01, eps: float = 1e-3, exclude: Sequence[str] = (), *, model: nn.Module | None = None
    ) -> None:
        self.clip_factor = _above_zero("AGC", "clip_factor", clip_factor)
        self.eps = _above_zero("AGC", "eps", eps)
        if isinstance(exclude, str) or not all(isinstance(pattern, str) for pattern in exclude):
            raise TypeError(
                f"AGC(exclude={_short(exclude)}): got {type(exclude).__name__}; it needs patterns of parameter names, such as ('head.*',)"
            )
        self.exclude = tuple(exclude)
        self._excluded: dict[str, bool] = {}
        self._places = None if model is None else _Places("AGC", model)
        if self._places is not None:
            self._places.check(self.exclude)

    def __call__(self, parameters: Iterable[Tensor], /) -> Tensor:
        """Read the norms and clip, as every clipper does; with `exclude` it needs `model`."""
        if self._places is None and self.exclude:
            raise ValueError(
                f"{self!r} was called without a watch and does not know the names of parameters, which exclude= goes by; it needs the "
                "model. Give it one, as AGC(exclude=..., model=model), or pass it to GradWatch(model, clip=...)."
            )
        return super().__call__(parameters)

    def clip(self, gradients: Gradients) -> Tensor:
        """Scale the gradient of each unit that exceeds its bound, and return the smallest factor."""
        norms, host = gradients.norms.unbind(), _on_host(gradients.norms)
        places = [_NOWHERE] * len(norms) if self._places is None else self._places.of(gradients.params)
        whole: tuple[list[Tensor], list[Tensor]] = ([], [])
        parts: dict[torch.device, list[tuple[Tensor, Tensor, int, bool]]] = {}
        for i, (p, g, name, place) in enumerate(
            zip(gradients.params, _grads(gradients.params), gradients.names, places, strict=True)
        ):
            if i in gradients.heads or self._is_excluded(name or place.name):
                continue
            if sum(size > 1 for size in p.shape) <= 1 or (g.is_sparse and g.sparse_dim() > 1):
                whole[0].append(p)
                whole[1].append(norms[i])
            elif p.numel():
                # Squares in float64 where those in float32 may overflow, or vanish above the bound; on a device nobody knows.
                wide = host and not (float(norms[i]) < _HUGE and self.clip_factor * self.eps > TINY)
                parts.setdefault(g.device, []).append((p, g, place.groups, wide))
        smallest = [gradients.norms.new_ones(())]
        with torch.no_grad():
            if whole[0]:
                of_gradients = _precise(torch.stack(whole[1]))
                of_weights = _read([p.detach() for p in whole[0]]).to(of_gradients)
                smallest.append(_clip_each(whole[0], _factors(of_gradients, self._bounds(of_weights))))
            smallest += [_gathered(self._clip_parts(units)).to(gradients.norms) for units in parts.values()]
        return torch.stack(smallest).min()

    def _bounds(self, of_weights: Tensor) -> Tensor:
        return of_weights.clamp(min=self.eps) * self.clip_factor

    def _is_excluded(self, name: str) -> bool:
        if name not in self._excluded:
            self._excluded[name] = any(fnmatch.fnmatchcase(name, pattern) for pattern in self.exclude)
        return self._excluded[name]

    def _clip_parts(self, parts: Sequence[tuple[Tensor, Tensor, int, bool]]) -> Tensor:
        """Clip unit by unit what lies on one device.

        Args:
            parts: weight, gradient, groups of a transposed convolution (0: another layer), and whether to square in float64.

        Returns:
            The smallest factor.
        """
        targets, of_gradients, of_weights = [], [], []
        for p, g, groups, wide in parts:
            weight = p.detach()
            if g.is_sparse:
                summed = g.coalesce()
                target, weight = summed.values(), weight[summed.indices()[0]]
            else:
                summed, target, weight = g, _by_unit(g, groups), _by_unit(weight, groups)
            of_gradients.append(_unit_norms(target, groups, wide))
            of_weights.append(_unit_norms(weight, groups, wide))
            targets.append((g, summed, target))
        # All units of all parameters at once: a few calls, however many they are.
        flat = torch.cat([norm.flatten() for norm in of_gradients])
        factors = _factors(flat, self._bounds(torch.cat([norm.flatten() for norm in of_weights])))
        host = _on_host(factors)
        pieces = factors.split([norm.numel() for norm in of_gradients])  # type: ignore[no-untyped-call]
        for piece, norm, (g, summed, target) in zip(pieces, of_gradients, targets, strict=True):
            if not host or bool((piece < 1).any()):
                target.mul_(piece.view(norm.shape))
                if summed is not g:
                    g.copy_(summed)
        return factors.min() if factors.numel() else factors.new_ones(())


# -- one factor for all, a bound that is learnt ------------------------------------------------------------------------------------


class AutoClip(NormClipper):
    """The bound is a percentile of the norms seen so far.

    `g *= min(1, bound / total)`, where the bound is the percentile, interpolated linearly, over the totals of the last `window` updates
    with this one (Seetharaman, Wichern, Pardo and Le Roux 2020, arXiv 2007.14469, whose percentile is 10). The paper takes all norms
    since the start. But gradients shrink or grow in the course of a training: beside the early ones nothing is above the bound any more,
    or everything is. Also, sorting all of them costs more from update to update. 1000 is the `history_length` of the authors' own
    package. Of ten norms or fewer the tenth percentile is hardly more than the smallest: hence the warm-up.

    Good for: losses whose scale is not known beforehand. At 10 nine updates in ten are clipped, on purpose: the size of the update then
    hardly depends on that of the gradient. Not for: a rare spike only (90 or more, or `ZClip`, `MedianScaled`).

    ```python
    with GradWatch(model, clip=AutoClip(percentile=10)):
        ...  # the training loop
    ```

    Args:
        percentile: from 0 to 100, of the norms in the window.
        window: updates it looks back on, more than `warmup`.
        warmup: norms that are learnt before anything is clipped.
    """

    def __init__(self, percentile: float = 10.0, window: int = 1000, warmup: int = 10) -> None:
        self.percentile = _number("AutoClip", "percentile", percentile, "from 0 to 100; 10 is the paper's")
        if not 0 <= self.percentile <= 100:
            raise ValueError(f"AutoClip(percentile={percentile}): percentile needs to be from 0 to 100; 10 is the paper's")
        self.window, self.warmup = _sizes("AutoClip", window, warmup)
        self._recent = _Recent("AutoClip", self.window, self.warmup)

    def clip(self, gradients: Gradients) -> Tensor:
        """Learn the total, scale all gradients by one factor, and return it."""
        return _clip_to(gradients, lambda total: self._recent.percentile(total, self.percentile))

    def state_dict(self) -> dict[str, Any]:
        """The norms in the window: it goes on as if it had not stopped."""
        return self._recent.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; its window needs to be as long."""
        self._recent.load_state_dict(state)


class MedianScaled(NormClipper):
    """The bound is a multiple of the median norm.

    `g *= min(1, scale * median / total)`, with the median over the totals of the last `window` updates with this one. The idea and the
    numbers are those of icefall's ScaledAdam (`clipping_scale=2.0`, `clipping_update_period=100`, first estimate at step 10), which
    weights each gradient by the size of its parameter and finds the median anew every 100 steps; here the norm is the plain one, and the
    median that of every update. Norms are learnt as they were before clipping: a lasting change is followed within half a window.

    Good for: leaving usual updates alone and taking spikes down to twice the usual, at any scale of the loss. Not for: norms that scatter
    by more than `scale` in health (small batches, reinforcement learning): raise it.

    ```python
    with GradWatch(model, clip=MedianScaled(scale=2.0)):
        ...  # the training loop
    ```

    Args:
        scale: multiple of the median that is let through, above 0.
        window: updates it looks back on, more than `warmup`.
        warmup: norms that are learnt before anything is clipped.
    """

    def __init__(self, scale: float = 2.0, window: int = 100, warmup: int = 10) -> None:
        self.scale = _above_zero("MedianScaled", "scale", scale)
        self.window, self.warmup = _sizes("MedianScaled", window, warmup)
        self._recent = _Recent("MedianScaled", self.window, self.warmup)

    def clip(self, gradients: Gradients) -> Tensor:
        """Learn the total, scale all gradients by one factor, and return it."""
        return _clip_to(gradients, lambda total: self._recent.percentile(total, 50.0) * self.scale)

    def state_dict(self) -> dict[str, Any]:
        """The norms in the window: it goes on as if it had not stopped."""
        return self._recent.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; its window needs to be as long."""
        self._recent.load_state_dict(state)


class ZClip(NormClipper):
    """The bound follows from the mean and the standard deviation of the norms: what is no outlier is let through.

    With `z = (total - mean) / std`, a total with `z > z_thresh` is clipped to `mean + (z_thresh² / z) * std`: the farther out, the closer
    to the mean (Kumar, Owen, Chowdhury and Güra 2025, arXiv 2504.02507, with its defaults; there it is called reciprocal clipping, in its
    code adaptive scaling). Mean and variance are those of the first `warmup` norms and then moving averages with `alpha`, fed with the
    clipped value, so that a spike does not raise the bound for the next one. `max_norm` bounds what they let through, in the warm-up too,
    but is not fed to them: norms that are all above it would have no deviation.

    Good for: pre-training of language models, where a rare spike spoils the loss for hundreds of updates. Not for: a lasting jump of the
    norms (another stage of a curriculum, a thawed layer), which it takes for one spike after another: ten times the norm is still clipped
    to the old mean a thousand updates later (measured); make a new one then, or take `MedianScaled`.

    ```python
    with GradWatch(model, clip=ZClip()):
        ...  # the training loop
    ```

    Args:
        alpha: weight of the past in the moving averages, above 0 and below 1; 0.97 looks back on some 33 updates.
        z_thresh: deviations from which on a norm is an outlier, above 0.
        warmup: norms that are learnt before anything but `max_norm` clips, 2 or more.
        max_norm: a bound besides, above 0, or None.
        min_std: the smallest standard deviation that counts, as a fraction of the mean, 0 or more: what is within 2.5 % of the mean is
            never clipped. Where batches are all alike, norms scatter by rounding alone, and feeding clipped values makes them scatter
            less. (The paper's code adds 1e-6, whatever the size of the norms.)
    """

    def __init__(
        self,
        alpha: float = 0.97,
        z_thresh: float = 2.5,
        warmup: int = 25,
        max_norm: float | None = None,
        min_std: float = 0.01,
    ) -> None:
        self.alpha = _above_zero("ZClip", "alpha", alpha)
        if self.alpha >= 1:
            raise ValueError(f"ZClip(alpha={alpha}): alpha needs to be above 0 and below 1; 0.97 is the paper's")
        self.z_thresh = _above_zero("ZClip", "z_thresh", z_thresh)
        self.warmup = _count("ZClip", "warmup", warmup, 2, "a deviation takes two norms; 25 is the paper's")
        self.max_norm = None if max_norm is None else _above_zero("ZClip", "max_norm", max_norm)
        self.min_std = _number("ZClip", "min_std", min_std, "0 or more, as a fraction of the mean")
        if not 0 <= self.min_std < math.inf:
            raise ValueError(f"ZClip(min_std={min_std}): min_std needs to be finite and 0 or more, as a fraction of the mean")
        self._moments: Tensor | None = None
        """Mean, standard deviation and number of the norms learnt: `[3]`, on the device of the norms."""

    def clip(self, gradients: Gradients) -> Tensor:
        """Learn the total, scale all gradients by one factor, and return it."""
        return _clip_to(gradients, self._bound)

    def _bound(self, total: Tensor) -> Tensor:
        self._moments = torch.zeros_like(total).expand(3) if self._moments is None else self._moments.to(total)
        mean, std, learnt = self._moments.unbind()
        warm = learnt < self.warmup
        spread = torch.maximum(std, mean * self.min_std)
        z = (total - mean) / spread
        bound = torch.where((z > self.z_thresh) & ~warm, mean + self.z_thresh / z * self.z_thresh * spread, math.inf)

        fed = torch.minimum(total, bound)
        weight = torch.where(warm, 1 / (learnt + 1), 1 - self.alpha)
        before = fed - mean
        after = before * (1 - weight)  # from the new mean
        # While warming up, the deviation of all norms so far (Welford); afterwards that of the paper, from the new mean. Roots instead
        # of squares: those of large norms overflow.
        new = torch.where(warm, before.abs().sqrt() * after.abs().sqrt(), after.abs())
        moved = torch.stack((mean + weight * before, torch.hypot(std * (1 - weight).sqrt(), new * weight.sqrt()), learnt + 1))
        self._moments = torch.where(_may_be_learnt(total), moved, self._moments)
        return bound if self.max_norm is None else bound.clamp(max=self.max_norm)

    def state_dict(self) -> dict[str, Any]:
        """Mean, standard deviation and number of the norms learnt: it goes on as if it had not stopped."""
        moments = torch.zeros(3, dtype=torch.float64, device="cpu") if self._moments is None else self._moments.clone()
        return {"clipper": "ZClip", "moments": moments}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        _check_state("ZClip", state, {"moments"})
        self._moments = _saved("ZClip", "moments", state["moments"], 3, "as state_dict() of a ZClip gives it.")


class _Recent:
    """The norms of the last updates, on their device.

    Args:
        owner: name of the clipper, for errors.
        window: how many there are.
        warmup: norms that must be known before there is a percentile.
    """

    def __init__(self, owner: str, window: int, warmup: int) -> None:
        self._owner, self._window, self._warmup = owner, window, warmup
        self._norms: Tensor | None = None
        """`[window]`; Inf where none is known yet. A total that may not be learnt leaves its place to the one before."""
        self._updates = 0

    def percentile(self, total: Tensor, percentile: float) -> Tensor:
        """Learn a total; the percentile of those in the window, or Inf in the warm-up: 0-d, of the dtype of the total."""
        norms = total.new_full((self._window,), math.inf) if self._norms is None else self._norms.to(total)
        self._norms = norms
        place = self._updates % self._window
        self._updates += 1
        norms[place] = torch.where(_may_be_learnt(total), total, norms[place])
        ordered = norms.sort().values
        known = (ordered < math.inf).sum().to(total)
        position = (known - 1).clamp(min=0) * (percentile / 100)
        low, high = ordered.gather(0, torch.stack((position.floor(), position.ceil())).long()).unbind()
        return torch.where(known > self._warmup, low + (high - low) * (position - position.floor()), math.inf)

    def state_dict(self) -> dict[str, Any]:
        norms = torch.full((self._window,), math.inf, dtype=torch.float64, device="cpu") if self._norms is None else self._norms
        return {"clipper": self._owner, "updates": self._updates, "norms": norms.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        _check_state(self._owner, state, {"updates", "norms"})
        updates = state["updates"]
        if isinstance(updates, bool) or not isinstance(updates, int) or updates < 0:
            raise ValueError(f"{self._owner}.load_state_dict: 'updates' is {_short(updates)}; it needs an int of 0 or more")
        hint = f"for window={self._window}. Make it with the window that was saved."
        self._norms, self._updates = _saved(self._owner, "norms", state["norms"], self._window, hint), updates


# -- norms and factors -------------------------------------------------------------------------------------------------------------

_HUGE = 1e18
"""A float32 norm above this may have lost squares beyond 1e38 to overflow, as one below `TINY` may to underflow."""

_SMALL = 1e-4
"""Bounds below which torch's 1e-6 would take more than 1 % off."""


def _on_host(tensor: Tensor) -> bool:
    """Whether a tensor's values can be asked for without waiting for a device."""
    return tensor.device.type == "cpu"


def _grads(params: Iterable[Tensor]) -> list[Tensor]:
    return [g for p in params if (g := p.grad) is not None]


def _any_double(params: Iterable[Tensor]) -> bool:
    return not {g.dtype for g in _grads(params)}.isdisjoint((torch.float64, torch.complex128))


def _with_gradients(owner: str, parameters: object) -> list[Tensor]:
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    if isinstance(parameters, nn.Module) or not isinstance(parameters, Iterable):
        raise TypeError(f"{owner}: got {type(parameters).__name__}; it needs parameters, as model.parameters() gives them")
    given = list(parameters)
    for p in given:
        if not isinstance(p, Tensor):
            raise TypeError(f"{owner}: got {_short(p)} ({type(p).__name__}) among the parameters; it needs tensors with .grad")
    if not given and inspect.isgenerator(parameters):
        warnings.warn(
            f"{owner}: the generator of parameters is empty, so nothing is clipped; one that has been used up stays empty. Hand over "
            "model.parameters() anew each time, or a list.",
            stacklevel=3,
        )
    return [p for p in given if p.grad is not None]


def norms_of(params: Sequence[Tensor]) -> Tensor:
    """2-norms of the gradients of parameters that have one, `[N]` on the device of the first."""
    with torch.no_grad():
        return _read(_grads(params))


def _read(tensors: Sequence[Tensor]) -> Tensor:
    """2-norms, `[N]` on the device of the first; float64 where one of them is, else float32."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    dense = [private.sparse_values(tensor) if tensor.is_sparse else tensor for tensor in tensors]
    for i, tensor in enumerate(dense):
        groups.setdefault((tensor.device, tensor.dtype), []).append(i)
    found: dict[int, Tensor] = {}
    for (_, dtype), indices in groups.items():
        chosen = [dense[i] for i in indices]
        several = [torch.linalg.vector_norm(t) for t in chosen] if dtype.is_complex else private.foreach_norm(chosen)
        found.update(zip(indices, several, strict=True))
    stacked = torch.stack([found[i].to(dense[0].device) for i in range(len(dense))])
    norms = _gathered(stacked)
    if not _on_host(norms) or norms is not stacked:
        return norms
    for i, norm in enumerate(norms.tolist()):
        if not TINY < norm < _HUGE and dense[i].numel():
            exact = torch.linalg.vector_norm(dense[i], dtype=torch.complex128 if dense[i].is_complex() else torch.float64)
            if norms.dtype is torch.float32 and torch.finfo(torch.float32).max < float(exact) < math.inf:
                norms = norms.double()
            norms[i] = exact
    return norms


def _gathered(tensor: Tensor) -> Tensor:
    """A plain tensor: of a DTensor, what all ranks hold together."""
    gather: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def _precise(norms: Tensor) -> Tensor:
    """In float64 on the host: products and quotients of large and small norms neither overflow nor vanish there."""
    return norms.double() if _on_host(norms) else norms


def _joint(norms: Tensor, dim: int | None = None) -> Tensor:
    """2-norm of all that `norms` are norms of, in their dtype as torch computes it; in float64 where the squares leave float32."""
    joint: Tensor = torch.linalg.vector_norm(norms, dim=dim)
    if norms.dtype is torch.float64 or norms.device.type == "mps":  # which has no float64
        return joint
    host = _on_host(joint)
    if host and dim is None and TINY < float(joint) < _HUGE:
        return joint
    wide = torch.linalg.vector_norm(norms, dim=dim, dtype=torch.float64)
    return torch.where((joint > TINY) & (joint < _HUGE), joint, wide if host else wide.to(norms.dtype))


def _may_be_learnt(total: Tensor) -> Tensor:
    """A norm of 0 says nothing about the size of gradients; a bound of 0, once learnt, would let none through."""
    return (total > 0) & (total < math.inf)


def _factors(norms: Tensor, bounds: Tensor | float) -> Tensor:
    """What brings each norm down to its bound: 1 where it is not above, or not finite. As torch does it, but relative to the bound."""
    return torch.where((norms > bounds) & (norms < math.inf), 1 / (norms / bounds + 1e-6), 1.0)


def _clip_each(params: Sequence[Tensor], factors: Tensor) -> Tensor:
    """Multiply each gradient by a factor of its own, and return the smallest.

    One call each: torch's multi-tensor kernels take a list of numbers, which would wait for a device, or tensors of equal shapes.
    """
    if not len(params):
        return factors.new_ones(())
    with torch.no_grad():
        if _on_host(factors):
            for g, factor in zip(_grads(params), factors.tolist(), strict=True):
                if factor < 1:
                    g.mul_(factor)
        else:
            there: dict[torch.device, Sequence[Tensor]] = {}
            for i, g in enumerate(_grads(params)):
                if g.device not in there:
                    there[g.device] = factors.to(g.device).unbind()
                g.mul_(there[g.device][i])
    return factors.min()


def _clip_jointly(params: Sequence[Tensor], total: Tensor, max_norm: float) -> Tensor:
    """Multiply all gradients by one factor, as torch does it, and return it."""
    if not _on_host(total):
        total = torch.where((total > max_norm) & (total < math.inf), total, 0.0)  # of which torch makes a factor of 1
    elif not max_norm < float(total) < math.inf:
        return total.new_ones(())  # torch multiplies by 1 here: a pass over all gradients that changes nothing
    if max_norm < _SMALL:
        total, max_norm = _precise(total) / max_norm, 1.0
    torch.nn.utils.clip_grads_with_norm_(params, max_norm, total)
    return (max_norm / (total + 1e-6)).clamp(max=1.0)


def _clip_to(gradients: Gradients, bound: Callable[[Tensor], Tensor]) -> Tensor:
    """Clip all gradients to a bound that is made of their total, both 0-d tensors (Inf: none), and return the factor."""
    if not len(gradients.params):
        return gradients.norms.new_ones(())
    total = _precise(_joint(gradients.norms))
    # The bound is 1 in units of itself: so torch does the multiplying, which takes a float for it.
    return _clip_jointly(gradients.params, total / bound(total), 1.0)


def _by_unit(tensor: Tensor, groups: int) -> Tensor:
    """A view in which units lie along dimension 0, or, of a transposed convolution `[in, out / groups, ...]`, along 0 and 2."""
    return tensor.unflatten(0, (groups, -1)) if groups else tensor  # type: ignore[no-untyped-call]


def _unit_norms(tensor: Tensor, groups: int, wide: bool) -> Tensor:
    """2-norm of each unit of what `_by_unit` gave, with the other dimensions kept as 1; half precision in float32."""
    dims = [dim for dim in range(1, tensor.dim()) if not (groups and dim == 2)]
    if not dims:
        return tensor.abs()
    dtype = torch.float64 if wide else torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else None
    if wide and tensor.is_complex():
        dtype = torch.complex128
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=dims, keepdim=True, dtype=dtype)
    return norms


# -- where parameters stand --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Place:
    """Name of a parameter, the layer that holds it, and the groups of a transposed convolution; 0 for any other layer."""

    name: str
    layer: str
    groups: int


_NOWHERE = _Place("", "", 0)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class _Places:
    """Where the parameters of a model stand, known by identity. Holds neither the model nor its parameters alive."""

    def __init__(self, owner: str, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"{owner}(model={_short(model)}): got {type(model).__name__}; it needs the nn.Module that is trained")
        self._owner = owner
        self._model = weakref.ref(model)
        self._known: dict[int, tuple[weakref.ref[Tensor], _Place]] = {}
        self.kind = type(model).__name__
        self._scan()

    def _scan(self) -> None:
        model = self._model()
        self._known.clear()
        for layer, module in named_modules({"": model}) if model is not None else ():
            for name, p in module.named_parameters(recurse=False):
                groups = module.groups if isinstance(module, _TRANSPOSED) and name == "weight" else 0
                place = _Place(f"{layer}.{name}" if layer else name, layer, groups)
                self._known.setdefault(id(p), (weakref.ref(p), place))

    def of(self, params: Sequence[Tensor]) -> list[_Place]:
        """The place of each; one that the model does not hold stands nowhere: under "", by itself."""
        for again in (True, False):
            found = [self._known.get(id(p)) for p in params]
            lost = [p for p, entry in zip(params, found, strict=True) if entry is None or entry[0]() is not p]
            if lost and again:
                self._scan()  # the model has changed since
        self._known.update((id(p), (weakref.ref(p), _NOWHERE)) for p in lost)
        return [self._known[id(p)][1] for p in params]

    def check(self, patterns: Sequence[str]) -> None:
        """Raise where a pattern matches no parameter: it would be left without an effect, and without a word."""
        names = [place.name for _, place in self._known.values()]
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                some = ", ".join(map(repr, names))[:160] or "none"
                raise ValueError(
                    f"{self._owner}(exclude=...): the pattern {pattern!r} does not match any parameter; there are {some}"
                )


# -- arguments and states, checked -------------------------------------------------------------------------------------------------


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _number(owner: str, name: str, given: object, needs: str) -> float:
    if isinstance(given, bool) or not isinstance(given, (int, float)):
        raise TypeError(f"{owner}({name}={_short(given)}): got {type(given).__name__}; it needs a float, {needs}")
    return float(given)


def _above_zero(owner: str, name: str, given: object) -> float:
    number = _number(owner, name, given, "finite and above 0")
    if not 0 < number < math.inf:
        raise ValueError(f"{owner}({name}={given}): {name} needs to be finite and above 0; leave clip out to clip nothing")
    return number


def _count(owner: str, name: str, given: object, least: int, why: str) -> int:
    if isinstance(given, bool) or not isinstance(given, int):
        raise TypeError(f"{owner}({name}={_short(given)}): got {type(given).__name__}; it needs an int of {least} or more: {why}")
    if given < least:
        raise ValueError(f"{owner}({name}={given}): {name} needs to be {least} or more: {why}")
    return given


def _sizes(owner: str, window: object, warmup: object) -> tuple[int, int]:
    first = _count(owner, "warmup", warmup, 0, "norms that are learnt before anything is clipped")
    size = _count(owner, "window", window, 1, "updates it looks back on")
    if size <= first:
        raise ValueError(
            f"{owner}(window={window}, warmup={warmup}): a window of {size} never holds more than {first} norms, so that nothing would ever "
            f"be clipped; it needs more than the warm-up. Give it window={first + 1} or more, or a shorter warmup."
        )
    return size, first


def _what_state(state: object) -> str:
    if not isinstance(state, Mapping):
        return f"{_short(state)} ({type(state).__name__})"
    return f"the state of {state['clipper']}" if isinstance(state.get("clipper"), str) else f"a dict with {sorted(map(str, state))}"


def _saved(owner: str, key: str, given: object, size: int, hint: str) -> Tensor:
    """A saved vector as a tensor of one's own; a watch keeps it as an array."""
    values = torch.from_numpy(given) if isinstance(given, np.ndarray) else given
    if not isinstance(values, Tensor) or not values.is_floating_point() or values.shape != (size,):
        what = f"a {values.dtype} tensor of shape {tuple(values.shape)}" if isinstance(values, Tensor) else _short(given)
        raise ValueError(f"{owner}.load_state_dict: {key!r} is {what}; it needs a floating tensor of shape ({size},), {hint}")
    return values.detach().clone()


def _check_state(owner: str, state: object, keys: set[str]) -> None:
    if not isinstance(state, Mapping) or state.get("clipper") != owner or set(state) != {"clipper", *keys}:
        raise ValueError(
            f"{owner}.load_state_dict: got {_what_state(state)}; it needs what state_dict() of a {owner} gave. Was another clipper in use "
            "when this was saved?"
        )
