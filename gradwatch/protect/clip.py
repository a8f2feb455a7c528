"""Clipping and raising before the weights change, with the norms that have been read already."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from gradwatch.records import NonFiniteGradientError

Clipper = Callable[[Sequence[Tensor]], Any]
"""Takes the parameters that are about to be stepped and changes their `.grad` in place, as torch's own clipping functions do."""


class Actor:
    """Acts right before an optimizer steps.

    Args:
        clip: `max_norm` of the global 2-norm over the parameters that this optimizer is about to step, or a callable that takes them
            and changes their gradients, or None.
        on_nonfinite: "raise" raises before the weights change; "warn" leaves that to the rules.
    """

    def __init__(self, clip: float | Clipper | None, on_nonfinite: Literal["warn", "raise"]) -> None:
        self._clip = clip
        self._raise = on_nonfinite == "raise"

    @property
    def asked(self) -> str:
        """What it was asked to do, as the keywords that asked for it."""
        asked = [f"clip={self._clip!r}"] if self._clip is not None else []
        return " and ".join([*asked, *(["on_nonfinite='raise'"] if self._raise else [])])

    def refuse(self, optimizer: Optimizer) -> None:
        """Raise where nothing can act before the weights change.

        Raises:
            RuntimeError: the optimizer evaluates a closure several times within one step.
        """
        if isinstance(optimizer, LBFGS):
            raise RuntimeError(self.evaluates_again(optimizer))

    def evaluates_again(self, optimizer: Optimizer) -> str:
        """Why it cannot act on this optimizer, in words."""
        return (
            f"gradwatch was asked to act before the step ({self.asked}), but {type(optimizer).__name__} evaluates its closure several "
            "times within one step and changes the weights in between. Clip inside the closure, or watch without "
            "clip= and with on_nonfinite='warn'."
        )

    def __call__(
        self,
        *,
        optimizer: Optimizer,
        step: int,
        params: Sequence[Tensor],
        names: Sequence[str],
        norms: NDArray[np.float64],
        factor: float,
        found_inf: bool,
    ) -> float | None:
        """Act.

        Args:
            optimizer: the one that is about to step.
            step: number of the record.
            params: what it is about to step, with gradients.
            names: their names.
            norms: float64, 2-norms of their gradients.
            factor: a loss scale that is still on the gradients, 1.0 for none.
            found_inf: a GradScaler decides about this step on the device.

        Returns:
            The factor applied to all gradients, 1.0 for none, or None where a callable applied what it liked.

        Raises:
            NonFiniteGradientError: a gradient is not finite and that was asked for.
        """
        finite = bool(np.isfinite(norms).all())
        if self._raise and not finite and not found_inf:
            raise _error(type(optimizer).__name__, step, names, norms)
        if self._clip is None or not finite:
            return 1.0  # a NaN or an Inf never multiplies anything
        if callable(self._clip):
            if factor != 1.0:
                _unscale(optimizer, params, factor)
            self._clip(params)
            return None
        return _clip_norm(params, math.sqrt(float(norms.dot(norms))), float(self._clip) * factor)


def _clip_norm(params: Sequence[Tensor], total: float, max_norm: float) -> float:
    if not math.isfinite(total) or total <= max_norm:
        return 1.0  # torch multiplies by 1 here: a pass over all gradients that changes nothing
    # In float32 as torch does it, unless the total does not fit there.
    dtype = torch.float32 if total < 1e30 else torch.float64
    torch.nn.utils.clip_grads_with_norm_(params, max_norm, torch.tensor(total, dtype=dtype, device="cpu"))
    return max_norm / (total + 1e-6)


def _unscale(optimizer: Optimizer, params: Sequence[Tensor], factor: float) -> None:
    """Divide out the loss scale that a fused optimizer would have divided out itself, as `GradScaler.unscale_` does it."""
    with torch.no_grad():
        for p in params:
            if p.grad is not None:
                p.grad.mul_(1.0 / factor)
    optimizer.grad_scale = None  # type: ignore[attr-defined]


def _error(optimizer: str, step: int, names: Sequence[str], norms: NDArray[np.float64]) -> NonFiniteGradientError:
    bad = [name for name, norm in zip(names, norms, strict=True) if not np.isfinite(norm)]
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    return NonFiniteGradientError(
        f"step {step}: the gradient is not finite in {', '.join(bad[:3])}{more} ({len(bad)} of {len(names)} parameters of {optimizer}). "
        "The weights have not been changed; call zero_grad() and go on with the next batch to leave this update out.",
        step=step,
        parameters=tuple(bad),
    )
