"""Which parameters and modules a watch looks at, and under which names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

from gradwatch.capture import private

_WRAPPER_SEGMENTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Names under which torch's own wrapper modules hold the module they wrap (compile, FSDP, activation checkpointing)."""


def unwrap(model: nn.Module) -> nn.Module:
    """The user's model inside `torch.compile` and DistributedDataParallel."""
    while not isinstance(model, torch.jit.ScriptModule):
        inner = private.children(model).get("_orig_mod")
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel"):
            inner = private.children(model).get("module", private.children(model).get("_fsdp_wrapped_module"))
        if inner is None:
            return model
        model = inner
    return model


def plain_name(name: str) -> str:
    """A qualified name without the segments of torch's wrapper modules."""
    if "_" not in name:
        return name
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_SEGMENTS)


def named_modules(models: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, in registration order, under its unwrapped name; a model stands under its key ("" for a single one)."""
    seen: set[int] = set()
    names: set[str] = set()
    for key, model in models.items():
        for name, module in unwrap(model).named_modules():
            if id(module) in seen or _WRAPPER_SEGMENTS & private.children(module).keys():
                continue
            seen.add(id(module))
            full = _join(key, plain_name(name))
            if full not in names:
                names.add(full)
                yield full, module


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key and name else key or name


class ParameterTable:
    """The watched parameters by slot. A slot is an internal number that never changes its parameter; columns are the public order.

    Attributes:
        params: the parameter of each slot.
        names: its first qualified name.
        layers: qualified name of the module that holds it; of a parametrized one that of the module whose weight it makes.
        columns: int64 `[S]`: its column in the history, -1 once the model does not hold it any more.
        slot_of: `id(parameter)` -> slot, for those that the model holds.
        in_order: slots and columns are the same.
        modules: every module, by unwrapped name, in registration order.
        trainable: whether the parameter of each slot required a gradient at the last scan.
    """

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        self._models = models
        self.params: list[Tensor] = []
        self.names: list[str] = []
        self.layers: list[str] = []
        self.columns: NDArray[np.int64] = np.zeros(0, np.int64)
        self.slot_of: dict[int, int] = {}
        self.in_order = True
        self.modules: dict[str, nn.Module] = {}
        self._held: list[dict[str, Any]] = []
        self._empty: list[dict[str, Any]] = []
        self._ids: list[int] = []
        self._lazy: list[Tensor] = []
        self.trainable: list[bool] = []
        self.rescan()

    def __len__(self) -> int:
        return len(self.params)

    @property
    def column_slots(self) -> list[int]:
        """The slot of each column."""
        slots = [-1] * len(self.slot_of)
        for slot, column in enumerate(self.columns):
            if column >= 0:
                slots[column] = slot
        return slots

    def changed(self) -> bool:
        """Whether a module or parameter was added, replaced or removed, or a lazy one materialised, since the last scan.

        Asked at every update, so all loops run inside the interpreter: 0.1 us a module.
        """
        if any(self._empty) or list(map(id, chain.from_iterable(map(dict.values, self._held)))) != self._ids:
            return True
        return bool(self._lazy) and any(not isinstance(p, UninitializedParameter) for p in self._lazy)

    def thawed(self) -> bool:
        """Whether a parameter was frozen or thawed since the last scan."""
        return [p.requires_grad for p in self.params] != self.trainable

    def rescan(self) -> None:
        """Look at the models again: known parameters keep their slots, new ones get new slots."""
        self.modules = dict(named_modules(self._models))
        slot_of: dict[int, int] = {}
        order: list[int] = []
        self._held, self._empty = [], []
        for layer, module in self.modules.items():
            for held in (private.own_parameters(module), private.children(module)):
                (self._held if held else self._empty).append(held)
            for name, parameter in private.own_parameters(module).items():
                if parameter is None or id(parameter) in slot_of:
                    continue
                slot = self.slot_of.get(id(parameter))
                if slot is None or self.params[slot] is not parameter:
                    slot = len(self.params)
                    self.params.append(parameter)
                    self.names.append("")
                    self.layers.append("")
                self.names[slot], self.layers[slot] = _join(layer, name), _home(layer, module)
                slot_of[id(parameter)] = slot
                order.append(slot)
        self.slot_of = slot_of
        self.columns = np.full(len(self.params), -1, np.int64)
        self.columns[order] = np.arange(len(order))
        self._ids = list(map(id, chain.from_iterable(map(dict.values, self._held))))
        self.in_order = bool((self.columns == np.arange(len(self.params))).all())
        self._lazy = [p for p in self.params if isinstance(p, UninitializedParameter)]
        self.trainable = [p.requires_grad for p in self.params]


def _home(layer: str, module: nn.Module) -> str:
    """The module whose parameter it is: a parametrization's (`0.parametrizations.weight`) that of the layer (`0`)."""
    if not isinstance(module, ParametrizationList):
        return layer
    return layer.rpartition("parametrizations.")[0].rstrip(".")


HOST = "cpu"
"""Type of the device whose tensors are read where they are; a test that sets it to something else sends CPU tensors over the slab,
and clippers take them for those of a device."""


def on_host(tensor: Tensor) -> bool:
    """Whether a tensor can be read without waiting for a device."""
    return tensor.device.type == HOST


def materialised(parameter: Tensor) -> bool:
    """Whether it has a shape and values that can be read."""
    return not isinstance(parameter, UninitializedParameter) and parameter.device.type != "meta"


def dense(tensor: Tensor) -> Tensor:
    """The values of a sparse tensor, duplicates summed; this rank's shard of a DTensor; a plain dense tensor as it is."""
    tensor = private.shard(tensor)
    if tensor.layout is not torch.strided:
        tensor = private.sparse_values(tensor)
    # Lazy views, which numpy refuses: they come from gradients set by hand in complex models.
    return tensor.resolve_conj().resolve_neg() if tensor.is_conj() or tensor.is_neg() else tensor


def as_real(tensor: Tensor) -> Tensor:
    """A complex tensor as a real one with a last axis of two; others as they are."""
    return torch.view_as_real(tensor.resolve_conj().resolve_neg()) if tensor.is_complex() else tensor
