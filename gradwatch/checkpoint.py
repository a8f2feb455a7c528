"""The state of a watch as tensors and plain containers, so that a checkpoint that holds it loads with `weights_only=True`."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradwatch.facts import LayerFact, Meta, ParameterFact, Pending
from gradwatch.records import Alert, Origin, Severity

_KIND = "__kind__"
_CLASSES: dict[str, type] = {cls.__name__: cls for cls in (Alert, LayerFact, Meta, Origin, ParameterFact, Pending)}


def encode(value: Any) -> Any:
    """Arrays as tensors, dataclasses as dicts that name their class; containers likewise, the rest as it is."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.array(value, copy=True))
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {_KIND: type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        kind = tuple if isinstance(value, tuple) else list
        return kind(encode(item) for item in value)
    return value


def decode(value: Any) -> Any:
    """What `encode` was given, as far as rules and histories can tell.

    Raises:
        ValueError: a class that this gradwatch does not know.
    """
    if isinstance(value, Tensor):
        return value.cpu().numpy().copy()
    if isinstance(value, Mapping):
        if _KIND not in value:
            return {key: decode(item) for key, item in value.items()}
        cls = _CLASSES.get(value[_KIND])
        if cls is None:
            raise ValueError(
                f"a saved watch holds a {value[_KIND]!r}, which this gradwatch does not know; load it with the one that saved it"
            )
        fields = {key: decode(item) for key, item in value.items() if key != _KIND}
        if cls is Alert:
            fields["severity"] = Severity(fields["severity"])
        return cls(**fields)
    if isinstance(value, (list, tuple)):
        return type(value)(decode(item) for item in value)
    return value
