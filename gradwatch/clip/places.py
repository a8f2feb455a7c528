"""Where the parameters of a model stand, for a clipper that is called without a watch: their names and layers."""

from __future__ import annotations

import fnmatch
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from gradwatch.capture.parameters import named_modules
from gradwatch.clip.arguments import short


@dataclass(frozen=True, slots=True)
class Place:
    """Name of a parameter, the layer that holds it, and the groups of a transposed convolution; 0 for any other layer."""

    name: str
    layer: str
    groups: int


NOWHERE = Place("", "", 0)
"""Of a clipper that was given no model."""
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Places:
    """Where the parameters of a model stand, known by identity. Holds neither the model nor its parameters alive."""

    def __init__(self, owner: str, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"{owner}(model={short(model)}): got {type(model).__name__}; it needs the nn.Module that is trained")
        self._owner = owner
        self._model = weakref.ref(model)
        self._known: dict[int, tuple[weakref.ref[Tensor], Place]] = {}
        self.kind = type(model).__name__
        self._scan()

    def _scan(self) -> None:
        model = self._model()
        self._known.clear()
        for layer, module in named_modules({"": model}) if model is not None else ():
            for name, p in module.named_parameters(recurse=False):
                groups = module.groups if isinstance(module, _TRANSPOSED) and name == "weight" else 0
                place = Place(f"{layer}.{name}" if layer else name, layer, groups)
                self._known.setdefault(id(p), (weakref.ref(p), place))

    def of(self, params: Sequence[Tensor]) -> list[Place]:
        """The place of each; one that the model does not hold is a layer by itself, without a name."""
        for again in (True, False):
            found = [self._known.get(id(p)) for p in params]
            lost = [p for p, entry in zip(params, found, strict=True) if entry is None or entry[0]() is not p]
            if lost and again:
                self._scan()  # the model has changed since
        strangers = {id(p): Place("", f"?{i}", 0) for i, p in enumerate(lost)}
        return [strangers.get(id(p)) or self._known[id(p)][1] for p in params]

    def check(self, patterns: Sequence[str]) -> None:
        """Raise where a pattern matches no parameter: it would be left without an effect, and without a word."""
        names = [place.name for _, place in self._known.values()]
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                some = ", ".join(map(repr, names))[:160] or "none"
                raise ValueError(
                    f"{self._owner}(exclude=...): the pattern {pattern!r} does not match any parameter; there are {some}"
                )
