"""What a clipper is: the gradients that it is given, and what it has to define."""

from __future__ import annotations

import abc
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from gradwatch.clip.arguments import what_state, with_gradients
from gradwatch.clip.norms import norms_of
from gradwatch.clip.places import Places


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

    _places: Places | None = None

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
        params = with_gradients(type(self).__name__, parameters)
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
                f"{type(self).__name__}.load_state_dict: got {what_state(state)}; a {type(self).__name__} learns nothing and needs {{}}. "
                "Was another clipper in use when this was saved?"
            )

    def __repr__(self) -> str:
        names = [name for name in inspect.signature(type(self)).parameters if name != "model" and hasattr(self, name)]
        shown = [f"{name}={getattr(self, name)!r}" for name in names]
        if self._places is not None:
            shown.append(f"model={self._places.kind}")
        return f"{type(self).__name__}({', '.join(shown)})"
