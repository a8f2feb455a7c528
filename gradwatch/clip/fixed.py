"""Clippers whose bound is given: one for all gradients together, for each element, each parameter or each layer."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from gradwatch.capture.norms import TINY
from gradwatch.capture.parameters import on_host
from gradwatch.clip.arguments import above_zero
from gradwatch.clip.clipper import Gradients, NormClipper
from gradwatch.clip.factors import clip_each, clip_jointly, factors_of
from gradwatch.clip.norms import grads_of, joint_norm, precise
from gradwatch.clip.places import Places

_FITS = 1e30
"""A total that float32 holds with room for what it is divided by."""


class GlobalNorm(NormClipper):
    """One bound for the 2-norm of all gradients together: `torch.nn.utils.clip_grad_norm_`, and bit-equal to it where it
    is called; under a watch, whose norms have been read otherwise, the last bit may differ.

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
        self.max_norm = above_zero("GlobalNorm", "max_norm", max_norm)

    def clip(self, gradients: Gradients) -> Tensor:
        """Scale all gradients by one factor, and return it."""
        norms = gradients.norms
        if norms.dtype is torch.float64 and on_host(norms):
            # Norms that a watch has read: numpy takes a fifth of the time for so few.
            values = norms.numpy()
            total = math.sqrt(float(values.dot(values)))
            if not self.max_norm < total < math.inf:
                return norms.new_ones(())
            # torch divides in the precision of the gradients.
            wide = not TINY < total < _FITS or _any_double(gradients.params)
            return clip_jointly(
                gradients.params, norms.new_full((), total, dtype=torch.float64 if wide else torch.float32), self.max_norm
            )
        return clip_jointly(gradients.params, joint_norm(norms), self.max_norm)


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
        self.clip_value = above_zero("Value", "clip_value", clip_value)

    def clip(self, gradients: Gradients) -> Tensor:
        """Clamp, and return NaN: which factor that was for a norm is not known without reading it again."""
        params = gradients.params
        if on_host(gradients.norms):
            params = [p for p, norm in zip(params, gradients.norms.tolist(), strict=True) if math.isfinite(norm)]
        dense = [p for p, g in zip(params, grads_of(params), strict=True) if not g.is_sparse]
        if dense:
            torch.nn.utils.clip_grad_value_(dense, self.clip_value)
        with torch.no_grad():
            for g in grads_of(params):
                if g.is_sparse:
                    summed = g.coalesce()
                    summed.values().clamp_(-self.clip_value, self.clip_value)
                    g.copy_(summed)
        return gradients.norms.new_full((), math.nan)


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
        self.max_norm = above_zero("PerParameter", "max_norm", max_norm)

    def clip(self, gradients: Gradients) -> Tensor:
        """Scale each gradient that exceeds the bound, and return the smallest factor."""
        return clip_each(gradients.params, factors_of(precise(gradients.norms), self.max_norm))


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
        self.max_norm = above_zero("PerLayer", "max_norm", max_norm)
        self._places = None if model is None else Places("PerLayer", model)
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
        norms = precise(gradients.norms)
        of_layers = joint_norm(torch.cat((norms, norms.new_zeros(1)))[members], dim=1)
        return clip_each(gradients.params, factors_of(of_layers, self.max_norm)[layer_of])

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


def _any_double(params: Iterable[Tensor]) -> bool:
    return not {g.dtype for g in grads_of(params)}.isdisjoint((torch.float64, torch.complex128))
