"""Tensors of every kind that a gradient may be: dtype, layout, size and value."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    # Each gives a tensor of the same shape (and nearly the same values) whose memory lies otherwise.
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() > 1 else t,
    "channels-last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "every-second": lambda t: torch.stack((t, t + 1), -1)[..., 0],
    "offset": lambda t: torch.cat((t.reshape(-1)[:1], t.reshape(-1)))[1:].view(t.shape) if t.numel() else t,
    "expanded": lambda t: t.reshape(-1)[:1].expand(t.numel()).view(t.shape) if t.dim() == 1 and t.numel() else t,
    "part-of-a-larger-one": lambda t: torch.cat((t, t), -1)[..., : t.shape[-1]] if t.dim() else t,
    "negated": lambda t: torch._neg_view(t),
    "conjugated": lambda t: t.conj() if t.is_complex() else t,
    "requires-grad": lambda t: t.clone().requires_grad_() * 1,
}

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)

SHAPES = (
    (),
    (1,),
    (0,),
    (3, 0),
    (5,),
    (4, 3),
    (512,),  # the last size that is packed, and the first that is not
    (513,),
    (27, 19),
    (8192,),
    (8193,),
    (3, 4, 5, 6),
    (16, 8, 9, 8),
    (2, 3, 4, 5, 7),
    (130, 65),
    (1, 9000),
)


def norm(tensor: Tensor) -> float:
    """The 2-norm by a way of its own: everything in float64, at once."""
    tensor = tensor.detach()
    if tensor.is_sparse:
        tensor = tensor.to_dense()
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    return float(torch.linalg.vector_norm(tensor.resolve_conj().resolve_neg().to(wide)))


def nonfinite(tensor: Tensor) -> int:
    """Elements that are NaN or Inf."""
    tensor = tensor.detach()
    if tensor.is_sparse:
        tensor = tensor.to_dense()
    return int((~torch.isfinite(tensor)).sum())


def made(shape: tuple[int, ...], dtype: torch.dtype, layout: str, seed: int = 0, scale: float = 1.0) -> Tensor:
    """A tensor of normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return LAYOUTS[layout]((torch.randn(shape, generator=generator, dtype=wide) * scale).to(dtype))


tensors = st.builds(
    made,
    st.one_of(st.sampled_from(SHAPES), st.lists(st.integers(0, 6), max_size=4).map(tuple)),
    st.sampled_from(DTYPES),
    st.sampled_from([layout for layout in LAYOUTS if layout != "negated"]),
    st.integers(0, 1000),
    st.sampled_from([1e-3, 1.0, 1e3]),
)
"""Any shape, dtype and layout, of ordinary size."""
