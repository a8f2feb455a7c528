"""The 2-norms that clippers go by: read with few calls, again where float32 has lost something, and joined to the norm of them all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from gradwatch.capture import private
from gradwatch.capture.norms import TINY
from gradwatch.capture.parameters import on_host

HUGE = 1e18
"""A float32 norm above this may have lost squares beyond 1e38 to overflow, as one below `TINY` may to underflow."""


def norms_of(params: Sequence[Tensor]) -> Tensor:
    """2-norms of the gradients of parameters that have one, `[N]` on the device of the first."""
    with torch.no_grad():
        return read_norms(grads_of(params))


def read_norms(tensors: Sequence[Tensor]) -> Tensor:
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
    norms = gathered(stacked)
    if not on_host(norms) or norms is not stacked:
        return norms
    for i, norm in enumerate(norms.tolist()):
        if not TINY < norm < HUGE and dense[i].numel():
            exact = torch.linalg.vector_norm(dense[i], dtype=torch.complex128 if dense[i].is_complex() else torch.float64)
            if norms.dtype is torch.float32 and torch.finfo(torch.float32).max < float(exact) < math.inf:
                norms = norms.double()
            norms[i] = exact
    return norms


def joint_norm(norms: Tensor, dim: int | None = None) -> Tensor:
    """2-norm of all that `norms` are norms of, in their dtype as torch computes it; in float64 where the squares leave float32."""
    joint: Tensor = torch.linalg.vector_norm(norms, dim=dim)
    if norms.dtype is torch.float64 or norms.device.type == "mps":  # which has no float64
        return joint
    host = on_host(joint)
    if host and dim is None and TINY < float(joint) < HUGE:
        return joint
    wide = torch.linalg.vector_norm(norms, dim=dim, dtype=torch.float64)
    return torch.where((joint > TINY) & (joint < HUGE), joint, wide if host else wide.to(norms.dtype))


def precise(norms: Tensor) -> Tensor:
    """In float64 on the host: products and quotients of large and small norms neither overflow nor vanish there."""
    return norms.double() if on_host(norms) else norms


def gathered(tensor: Tensor) -> Tensor:
    """A plain tensor: of a DTensor, what all ranks hold together."""
    gather: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def grads_of(params: Iterable[Tensor]) -> list[Tensor]:
    """The gradients of parameters that have one."""
    return [g for p in params if (g := p.grad) is not None]
