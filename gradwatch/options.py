"""What a user may hand to `GradWatch`, checked: an error says what was given, what is needed and what to do."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.optim import Optimizer

from gradwatch.capture.description import in_scope
from gradwatch.capture.parameters import named_modules, unwrap
from gradwatch.clip.arguments import short
from gradwatch.records import Sampling


def models(given: object) -> dict[str, nn.Module]:
    """The watched models under "" or their keys."""
    if isinstance(given, Mapping):
        if not given:
            raise ValueError("GradWatch({}): the mapping is empty; give it at least one model, as {'generator': nn.Module, ...}")
        for key, model in given.items():
            _check_model(model, f"the model {key!r}")
            if not isinstance(key, str) or not key or "." in key:
                raise TypeError(f"GradWatch: the key {key!r} names a model and must be a non-empty str without a dot")
        found = dict(given)
        _check_each_has_its_own(found)
    else:
        _check_model(given, "model")
        found = {"": given}
    if not any(p.requires_grad for model in found.values() for p in model.parameters()):
        count = sum(1 for model in found.values() for _ in model.parameters())
        what = f"all {count} parameters are frozen" if count else "the model has no parameter"
        raise ValueError(
            f"GradWatch: {what}, so there is no gradient to watch; it needs at least one trainable parameter. Set requires_grad to True "
            "on what is trained before attaching."
        )
    return found


def _check_each_has_its_own(given: Mapping[str, nn.Module]) -> None:
    """A parameter stands under the first key that holds it; a key that were left with none would be gone without a word."""
    first: dict[int, str] = {}  # whose a parameter is, by its id
    for key, model in given.items():
        params = {id(p): p for p in model.parameters()}
        for other, before in given.items():
            if other == key:
                break
            if unwrap(before) is unwrap(model):
                raise ValueError(
                    f"GradWatch: the models {other!r} and {key!r} are the same {type(unwrap(model)).__name__}; each model needs to stand "
                    "once. Leave one of the two keys out."
                )
        if params and params.keys() <= first.keys():
            owners = list(dict.fromkeys(first[one] for one in params))
            others = " and ".join(repr(owner) for owner in owners)
            swap = any(one not in params for one, owner in first.items() if owner in owners)
            raise ValueError(
                f"GradWatch: every parameter of the model {key!r} is one of {others} too and would be told of there; each key needs a "
                f"parameter of its own. Leave {key!r} out{f', or put it before {others}' if swap else ''}."
            )
        for one in params:
            first.setdefault(one, key)


def _check_model(model: object, name: str) -> None:
    if not isinstance(model, nn.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else f"{type(model).__name__} {short(model)}"
        raise TypeError(f"GradWatch: {name} is {given}; it needs an nn.Module, or a mapping of names to nn.Module")
    for module in (model, *model.modules()):
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"GradWatch: {name} is or holds a {type(module).__name__} (TorchScript), which runs outside Python's sight. Watch the eager "
                "module before scripting it."
            )
        if isinstance(module, nn.DataParallel):
            raise TypeError(
                f"GradWatch: {name} is or holds an nn.DataParallel, which trains copies that nobody can watch. Watch its .module without "
                "it, or use DistributedDataParallel."
            )


def optimizers(given: object) -> tuple[Optimizer, ...] | None:
    """The optimizers that were named, None for all."""
    if given is None:
        return None
    several = given if isinstance(given, (list, tuple)) else (given,)
    for one in several:
        if not isinstance(one, Optimizer):
            what = f"the class {one.__name__}" if isinstance(one, type) else f"{short(one)} ({type(one).__name__})"
            raise TypeError(
                f"GradWatch(optimizer=...): got {what}; it needs a torch.optim.Optimizer or several of them, or None to find them itself"
            )
    return tuple(several)


def scaler(given: object) -> Any:
    """A GradScaler or None."""
    if given is not None and not isinstance(given, torch.amp.GradScaler):
        raise TypeError(
            f"GradWatch(scaler={short(given)}): got {type(given).__name__}; it needs a torch.amp.GradScaler, or None to find it itself"
        )
    return given


def clip(given: object, keyword: str = "clip") -> Any:
    """A positive float, a clipper (any callable of parameters), or None."""
    if given is None or (callable(given) and not isinstance(given, (type, nn.Module))):
        return given
    if isinstance(given, bool) or not isinstance(given, (int, float)):
        what = f"the class {given.__name__}" if isinstance(given, type) else f"{short(given)} ({type(given).__name__})"
        raise TypeError(
            f"GradWatch({keyword}=...): got {what}; it needs a float (the max_norm of the global norm), a clipper such as "
            "gradwatch.clip.AutoClip(), or a callable of parameters such as "
            "functools.partial(torch.nn.utils.clip_grad_value_, clip_value=1.0)"
        )
    if not math.isfinite(given) or given <= 0:
        raise ValueError(f"GradWatch({keyword}={given}): max_norm needs to be finite and above 0; leave it out to clip nothing")
    return float(given)


def on_nonfinite(given: object) -> Any:
    """A policy."""
    if given not in ("warn", "raise", "skip"):
        raise ValueError(
            f"GradWatch(on_nonfinite={short(given)}): unknown policy; it needs 'warn' (say it), 'raise' (before the weights change) or "
            "'skip' (leave the step out)"
        )
    return given


def on_rule(given: object, rules: Iterable[str]) -> dict[str, Any]:
    """What to do when a rule of these names finds something."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise TypeError(
            f"GradWatch(on_rule={short(given)}): got {type(given).__name__}; it needs a mapping of rules to what is done, such as "
            "{'exploding_gradient': 1.0, 'gradient_spike': 'skip'}"
        )
    known = list(rules)
    reactions: dict[str, Any] = {}
    for rule, reaction in given.items():
        if rule not in known:
            raise ValueError(f"GradWatch(on_rule=...): no rule {rule!r} is in use; there are {', '.join(known) or 'none'}")
        if isinstance(reaction, str) or reaction is None:
            if reaction not in ("skip", "raise"):
                raise ValueError(
                    f"GradWatch(on_rule={{{rule!r}: {reaction!r}}}): unknown reaction; it needs 'skip' (leave the step out), 'raise', a "
                    "float (max_norm) or a clipper"
                )
            reactions[rule] = reaction
        else:
            reactions[rule] = clip(reaction, "on_rule")
    return reactions


def max_skips(given: object) -> int:
    """A number of steps."""
    return _whole("max_skips", given, "steps in a row", "on_nonfinite='raise' leaves none out")


def keep_good(given: object) -> int | None:
    """Updates between two states that are kept, or None."""
    return None if given is None else _whole("keep_good", given, "updates between two states", "leave it out to keep none")


def _whole(keyword: str, given: object, what: str, instead: str) -> int:
    if isinstance(given, bool) or not isinstance(given, int):
        raise TypeError(f"GradWatch({keyword}={short(given)}): got {type(given).__name__}; it needs a whole number of {what}")
    if given < 1:
        raise ValueError(f"GradWatch({keyword}={given}): needs at least 1; {instead}")
    return given


def keep_also(given: object, keep: int | None) -> tuple[Any, ...]:
    """Objects with a state."""
    several = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    for one in several:
        if isinstance(one, type) or not (hasattr(one, "state_dict") and hasattr(one, "load_state_dict")):
            raise TypeError(
                f"GradWatch(keep_also=...): got {short(one)} ({type(one).__name__}); it needs objects with state_dict() and "
                "load_state_dict(), such as a learning-rate scheduler"
            )
    if several and keep is None:
        raise ValueError("GradWatch(keep_also=...): no state is kept; say how often with keep_good=, or leave keep_also out")
    return several


def restore_buffers(given: object) -> bool | None:
    """True, False or None."""
    if given is not None and not isinstance(given, bool):
        raise TypeError(
            f"GradWatch(restore_buffers={short(given)}): got {type(given).__name__}; it needs True, False, or None (where it is cheap)"
        )
    return given


def origin(given: object) -> bool | None:
    """True, False or None."""
    if given is not None and not isinstance(given, bool):
        raise TypeError(
            f"GradWatch(origin={short(given)}): got {type(given).__name__}; it needs True, False, or None (where it costs no waiting)"
        )
    return given


def callables(name: str, given: object) -> tuple[Callable[[Any], Any], ...]:
    """One callable or several."""
    if callable(given):
        return (given,)
    if isinstance(given, Iterable) and not isinstance(given, str):
        several = tuple(given)
        wrong = [one for one in several if not callable(one)]
        if not wrong:
            return several
        given = wrong[0]
    raise TypeError(f"GradWatch({name}=...): got {short(given)} ({type(given).__name__}); it needs a callable or several of them")


def console(given: object) -> bool | Console:
    """True, False or a Console."""
    if not isinstance(given, (bool, Console)):
        raise TypeError(
            f"GradWatch(console={short(given)}): got {type(given).__name__}; it needs True (stderr), False (print nothing) or a "
            "rich.console.Console"
        )
    return given


def sampling(given: object, watched: Mapping[str, nn.Module]) -> Sampling:
    """A `Sampling` whose patterns match something."""
    if not isinstance(given, Sampling):
        raise TypeError(
            f"GradWatch(sampling={short(given)}): got {type(given).__name__}; it needs a gradwatch.Sampling, such as Sampling(every=20)"
        )
    names = [name for name, _ in named_modules(watched)]
    for keyword, patterns in (("include", given.include), ("exclude", given.exclude)):
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                some = ", ".join(repr(name) for name in names if name)[:160] or "none but the model itself, ''"
                raise ValueError(f"Sampling({keyword}=...): the pattern {pattern!r} does not match any module; there are {some}")
    if not any(in_scope(name, given.include, given.exclude) for name in names):
        raise ValueError(
            f"Sampling(include={given.include!r}, exclude={given.exclude!r}): nothing is left to watch; leave at least one module in scope"
        )
    return given
