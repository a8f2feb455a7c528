"""Factors that bring norms down to their bounds, and the multiplying of gradients by them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gradwatch.capture.parameters import on_host
from gradwatch.clip.norms import grads_of, precise


def factors_of(norms: Tensor, bounds: Tensor | float) -> Tensor:
    """What brings each norm down to its bound: 1 where it is not above, or not finite. As torch does it, but relative to the bound."""
    return torch.where((norms > bounds) & (norms < math.inf), 1 / (norms / bounds + 1e-6), 1.0)


def clip_each(params: Sequence[Tensor], factors: Tensor) -> Tensor:
    """Multiply each gradient by a factor of its own, and return the smallest.

    One call each: torch's multi-tensor kernels take a list of numbers, which would wait for a device, or tensors of equal shapes.
    """
    if not len(params):
        return factors.new_ones(())
    with torch.no_grad():
        if on_host(factors):
            for g, factor in zip(grads_of(params), factors.tolist(), strict=True):
                if factor < 1:
                    g.mul_(factor)
        else:
            there: dict[torch.device, Sequence[Tensor]] = {}
            for i, g in enumerate(grads_of(params)):
                if g.device not in there:
                    there[g.device] = factors.to(g.device).unbind()
                g.mul_(there[g.device][i])
    return factors.min()


def clip_jointly(params: Sequence[Tensor], total: Tensor, max_norm: float) -> Tensor:
    """Multiply all gradients by one factor, as torch does it, and return it."""
    if not on_host(total):
        total = torch.where((total > max_norm) & (total < math.inf), total, 0.0)  # of which torch makes a factor of 1
    elif not max_norm < float(total) < math.inf:
        return total.new_ones(())  # torch multiplies by 1 here: a pass over all gradients that changes nothing
    if max_norm < _SMALL:
        total, max_norm = precise(total) / max_norm, 1.0
    torch.nn.utils.clip_grads_with_norm_(params, max_norm, total)
    return (max_norm / (total + 1e-6)).clamp(max=1.0)


_SMALL = 1e-4
"""Bounds below which torch's 1e-6 would take more than 1 % off."""
