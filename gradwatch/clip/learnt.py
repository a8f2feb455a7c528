"""Clippers whose bound is learnt: it follows from the norms of the updates before, and one factor brings all gradients down to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gradwatch.clip.arguments import above_zero, check_state, count, number, saved, short, sizes
from gradwatch.clip.clipper import Gradients, NormClipper
from gradwatch.clip.factors import clip_jointly
from gradwatch.clip.norms import joint_norm, precise


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
        self.percentile = number("AutoClip", "percentile", percentile, "from 0 to 100; 10 is the paper's")
        if not 0 <= self.percentile <= 100:
            raise ValueError(f"AutoClip(percentile={percentile}): percentile needs to be from 0 to 100; 10 is the paper's")
        self.window, self.warmup = sizes("AutoClip", window, warmup)
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
        self.scale = above_zero("MedianScaled", "scale", scale)
        self.window, self.warmup = sizes("MedianScaled", window, warmup)
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
        self.alpha = above_zero("ZClip", "alpha", alpha)
        if self.alpha >= 1:
            raise ValueError(f"ZClip(alpha={alpha}): alpha needs to be above 0 and below 1; 0.97 is the paper's")
        self.z_thresh = above_zero("ZClip", "z_thresh", z_thresh)
        self.warmup = count("ZClip", "warmup", warmup, 2, "a deviation takes two norms; 25 is the paper's")
        self.max_norm = None if max_norm is None else above_zero("ZClip", "max_norm", max_norm)
        self.min_std = number("ZClip", "min_std", min_std, "0 or more, as a fraction of the mean")
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
        check_state("ZClip", state, {"moments"})
        self._moments = saved("ZClip", "moments", state["moments"], 3, "as state_dict() of a ZClip gives it.")


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
        check_state(self._owner, state, {"updates", "norms"})
        updates = state["updates"]
        if isinstance(updates, bool) or not isinstance(updates, int) or updates < 0:
            raise ValueError(f"{self._owner}.load_state_dict: 'updates' is {short(updates)}; it needs an int of 0 or more")
        hint = f"for window={self._window}. Make it with the window that was saved."
        self._norms, self._updates = saved(self._owner, "norms", state["norms"], self._window, hint), updates


def _clip_to(gradients: Gradients, bound: Callable[[Tensor], Tensor]) -> Tensor:
    """Clip all gradients to a bound that is made of their total, both 0-d tensors (Inf: none), and return the factor."""
    if not len(gradients.params):
        return gradients.norms.new_ones(())
    total = precise(joint_norm(gradients.norms))
    # The bound is 1 in units of itself: so torch does the multiplying, which takes a float for it.
    return clip_jointly(gradients.params, total / bound(total), 1.0)


def _may_be_learnt(total: Tensor) -> Tensor:
    """A norm of 0 says nothing about the size of gradients; a bound of 0, once learnt, would let none through."""
    return (total > 0) & (total < math.inf)
