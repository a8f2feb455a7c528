"""What a watch could leave behind in a process: a snapshot of every place where code can be hung into a training."""

from __future__ import annotations

import copyreg
import gc
import logging
import signal
import sys
import threading
import warnings
from collections.abc import Iterable

import torch
import torch.nn.modules.module as torch_module
import torch.optim.optimizer as torch_optimizer
from torch import nn

WRAPPABLE = (
    (torch.autograd, ("backward", "grad")),
    (torch.Tensor, ("backward", "register_hook", "__setattr__")),
    (torch.amp.GradScaler, ("scale", "step", "update", "unscale_")),
    (torch.optim.Optimizer, ("step", "zero_grad", "add_param_group", "__init__")),
    (torch.nn.utils, ("clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_")),
    (nn.Module, ("__call__", "__init__", "__setattr__", "__reduce_ex__", "__getstate__", "__deepcopy__", "register_parameter")),
    (torch, ("save", "load", "compile")),
)
"""Functions that somebody who watches a training may replace."""


def traces(modules: Iterable[nn.Module], optimizers: Iterable[torch.optim.Optimizer] = ()) -> dict[str, object]:
    """Where code hangs now, by place. Equal snapshots: nothing was left behind."""
    seen: dict[str, object] = {}
    for root, module in enumerate(modules):
        for name, part in module.named_modules():
            here = f"module {root}.{name}"
            seen[here] = {
                key: identities(value) for key, value in vars(part).items() if key.endswith(("hooks", "hooks_with_kwargs"))
            }
            # A wrapped forward or a new attribute stands in the instance's dictionary.
            seen[f"{here} attributes"] = sorted(vars(part))
            seen[f"{here} class"] = (type(part), sorted(vars(type(part))))
        for name, parameter in module.named_parameters():
            seen[f"parameter {root}.{name}"] = [identities(getattr(parameter, key, None)) for key in PARAMETER_HOOKS]
            seen[f"parameter {root}.{name} attributes"] = sorted(vars(parameter))
    for i, optimizer in enumerate(optimizers):
        seen[f"optimizer {i}"] = {key: identities(value) for key, value in vars(optimizer).items() if key.endswith("hooks")}
        seen[f"optimizer {i} attributes"] = sorted(vars(optimizer))
        seen[f"optimizer {i} step"] = type(optimizer).step
    for place in (torch_module, torch_optimizer):
        for key, value in vars(place).items():
            if key.startswith("_global") and key.endswith("hooks"):
                seen[f"{place.__name__}.{key}"] = identities(value)
    for owner, names in WRAPPABLE:
        for name in names:
            if hasattr(owner, name):
                seen[f"{owner.__name__}.{name}"] = id(getattr(owner, name))
    seen["copyreg"] = dict(copyreg.dispatch_table)
    seen["excepthook"] = (sys.excepthook, threading.excepthook, sys.unraisablehook)
    seen["tracing"] = (sys.gettrace(), sys.getprofile(), gc.callbacks[:], gc.isenabled())
    seen["signals"] = [signal.getsignal(s) for s in signal.valid_signals()]
    seen["warnings"] = warnings.filters[:]
    seen["logging"] = (logging.getLogger().handlers[:], logging.getLogger().level)
    seen["streams"] = (id(sys.stdout), id(sys.stderr))
    seen["modes"] = (
        torch.is_grad_enabled(),
        torch.is_anomaly_enabled(),
        torch._C._len_torch_dispatch_stack(),
        torch._C._len_torch_function_stack(),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
    )
    return seen


PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def identities(hooks: object) -> object:
    """A dictionary of hooks by the identity of each, so that the snapshot keeps nothing alive."""
    if isinstance(hooks, dict):
        return [(key, id(hook)) for key, hook in hooks.items()]
    return None if not hooks else repr(hooks)


def changed(before: dict[str, object], after: dict[str, object]) -> dict[str, tuple[object, object]]:
    """Places whose content differs: what a failing test should print."""
    return {
        place: (before.get(place), after.get(place))
        for place in before.keys() | after.keys()
        if before.get(place) != after.get(place)
    }
