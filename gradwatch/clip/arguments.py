"""What clippers are given, checked: arguments, parameters and saved states, with errors that say what is needed."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from gradwatch.capture.parameters import on_host


def number(owner: str, name: str, given: object, needs: str) -> float:
    """An argument that is a float; in what range, the caller checks."""
    if isinstance(given, bool) or not isinstance(given, (int, float)):
        raise TypeError(f"{owner}({name}={short(given)}): got {type(given).__name__}; it needs a float, {needs}")
    try:
        return float(given)
    except OverflowError:
        return math.inf


def above_zero(owner: str, name: str, given: object) -> float:
    """An argument that is a finite float above 0."""
    value = number(owner, name, given, "finite and above 0")
    if not 0 < value < math.inf:
        raise ValueError(f"{owner}({name}={given}): {name} needs to be finite and above 0; leave clip out to clip nothing")
    return value


def count(owner: str, name: str, given: object, least: int, why: str) -> int:
    """An argument that is an int of `least` or more."""
    if isinstance(given, bool) or not isinstance(given, int):
        raise TypeError(f"{owner}({name}={short(given)}): got {type(given).__name__}; it needs an int of {least} or more: {why}")
    if given < least:
        raise ValueError(f"{owner}({name}={given}): {name} needs to be {least} or more: {why}")
    return given


def sizes(owner: str, window: object, warmup: object) -> tuple[int, int]:
    """Window and warm-up of a clipper that learns: the window holds more than the warm-up takes."""
    first = count(owner, "warmup", warmup, 0, "norms that are learnt before anything is clipped")
    size = count(owner, "window", window, 1, "updates it looks back on")
    if size <= first:
        raise ValueError(
            f"{owner}(window={window}, warmup={warmup}): a window of {size} never holds more than {first} norms, so that nothing would ever "
            f"be clipped; it needs more than the warm-up. Give it window={first + 1} or more, or a shorter warmup."
        )
    return size, first


def with_gradients(owner: str, parameters: object) -> list[Tensor]:
    """Those of the parameters handed over that have a gradient."""
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    if isinstance(parameters, nn.Module) or not isinstance(parameters, Iterable):
        raise TypeError(f"{owner}: got {type(parameters).__name__}; it needs parameters, as model.parameters() gives them")
    given = list(parameters)
    for p in given:
        if not isinstance(p, Tensor):
            raise TypeError(f"{owner}: got {short(p)} ({type(p).__name__}) among the parameters; it needs tensors with .grad")
    if not given and inspect.isgenerator(parameters):
        warnings.warn(
            f"{owner}: the generator of parameters is empty, so nothing is clipped; one that has been used up stays empty. Hand over "
            "model.parameters() anew each time, or a list.",
            stacklevel=3,
        )
    return [p for p in given if p.grad is not None]


def check_state(owner: str, state: object, keys: set[str]) -> None:
    """Raise where a state is not one of this clipper, with these keys."""
    if not isinstance(state, Mapping) or state.get("clipper") != owner or set(state) != {"clipper", *keys}:
        raise ValueError(
            f"{owner}.load_state_dict: got {what_state(state)}; it needs what state_dict() of a {owner} gave. Was another clipper in use "
            "when this was saved?"
        )


def saved(owner: str, key: str, given: object, size: int, hint: str) -> Tensor:
    """A saved vector as a tensor of one's own; a watch keeps it as an array."""
    values = torch.from_numpy(given) if isinstance(given, np.ndarray) else given
    if not isinstance(values, Tensor) or not values.is_floating_point() or values.shape != (size,):
        what = f"a {values.dtype} tensor of shape {tuple(values.shape)}" if isinstance(values, Tensor) else short(given)
        raise ValueError(f"{owner}.load_state_dict: {key!r} is {what}; it needs a floating tensor of shape ({size},), {hint}")
    if on_host(values) and bool(values.isnan().any() or (values < 0).any()):
        raise ValueError(f"{owner}.load_state_dict: {key!r} holds NaN or negative norms; it needs norms, {hint}")
    return values.detach().clone()


def what_state(state: object) -> str:
    """What was handed over as a state, in words."""
    if not isinstance(state, Mapping):
        return f"{short(state)} ({type(state).__name__})"
    return f"the state of {state['clipper']}" if isinstance(state.get("clipper"), str) else f"a dict with {sorted(map(str, state))}"


def short(value: object) -> str:
    """A value as an error shows it, in 40 characters at most."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
