"""The factor on the loss: a GradScaler's, or one that the user puts on and takes off by hand."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gradwatch.capture import private
from gradwatch.capture.draft import Draft
from gradwatch.capture.gradients import UNCHANGED
from gradwatch.capture.parameters import on_host

HAND_SCALE_AFTER = 3
"""Updates running with the same exact power of two on all probes after which it is taken for a loss scale by hand."""


class LossScale:
    """What the loss of the record at hand was multiplied by.

    Args:
        scaler: the only GradScaler that is heard; None: any.
    """

    def __init__(self, scaler: Any = None) -> None:
        self._scaler = scaler
        self._pending: float | Tensor | None = None
        self._by_hand = 1.0
        self._seen: list[float] = []
        self._heard: weakref.WeakSet[Any] = weakref.WeakSet()

    @property
    def heard(self) -> list[Any]:
        """The scalers that have scaled a loss."""
        return list(self._heard)

    def ahead(self, draft: Draft | None) -> float:
        """What the loss was multiplied by whose backward comes next; NaN where that is on a device.

        Args:
            draft: of the record at hand; None: it has none yet.
        """
        if isinstance(self._pending, Tensor):
            return math.nan
        if self._pending is not None:
            return self._pending
        # Several losses are scaled in one call, or one goes backward twice.
        return draft.scale if draft is not None and draft.by_scaler else self._by_hand

    def scaled(self, scaler: Any) -> None:
        """A GradScaler has scaled a loss."""
        if self._scaler is not None and scaler is not self._scaler:
            return
        self._heard.add(scaler)
        scale = private.scale_of(scaler)
        if scale is not None:
            self._pending = float(scale) if on_host(scale) else scale

    def forget(self) -> None:
        """What was scaled was another model's loss."""
        self._pending = None

    def give_to(self, draft: Draft) -> None:
        """Write it into the draft of the record whose loss it was."""
        if self._pending is not None:
            draft.scale, draft.by_scaler = float(self._pending), True
            self._pending = None
        elif not draft.by_scaler:
            draft.scale = self._by_hand

    def see(self, draft: Draft, ratios: list[float]) -> None:
        """The same exact power of two on all probes, three updates running, is a loss scale by hand.

        Args:
            draft: of the record at hand.
            ratios: the norms of the probes right before the step over those that were read.
        """
        if draft.by_scaler:
            return
        if all(ratio == 1.0 for ratio in ratios):
            self._seen.clear()
            if ratios and self._by_hand != 1.0:
                self._by_hand = draft.scale = 1.0  # nobody divides any more
            return
        one = (
            ratios[0] if all(math.isfinite(ratio) and abs(ratio - ratios[0]) <= UNCHANGED * ratios[0] for ratio in ratios) else 1.0
        )
        power = 2.0 ** round(math.log2(one)) if one > 0 else 1.0
        if power == 1.0 or abs(one / power - 1) > UNCHANGED:
            self._seen.clear()
            return
        self._seen = [*self._seen, power] if set(self._seen) <= {power} else [power]
        if len(self._seen) >= HAND_SCALE_AFTER:
            self._seen = self._seen[-HAND_SCALE_AFTER:]
            self._by_hand = draft.scale = 1.0 / power

    def state_dict(self) -> dict[str, Any]:
        """A scale by hand, and what is known of one that may be."""
        return {"by_hand": self._by_hand, "seen": list(self._seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        self._by_hand, self._seen = float(state["by_hand"]), [float(power) for power in state["seen"]]
