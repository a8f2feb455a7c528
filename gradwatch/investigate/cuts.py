"""What cut the way of a gradient: the forward pass run once more, and every call of torch looked at that is given something that needs
a gradient and gives back something that does not.

What depends on some parameters is followed from call to call. A comparison that makes a mask cuts nothing as long as the way goes on
beside it: what counts is whether anything that the model puts out still depends on them, and if not, by which call the last of it went.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Container, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from gradwatch.capture.call import Call, tensors_of
from gradwatch.investigate.again import Again, again, named
from gradwatch.investigate.frames import NOWHERE, Place, here
from gradwatch.investigate.graph import nodes_below

SQUASHES = frozenset({"softmax", "sigmoid", "log_softmax"})
"""Functions whose calls are remembered: a loss may apply them again."""


@dataclass(frozen=True, slots=True)
class Cut:
    """The call in which a gradient's way ends.

    Attributes:
        kind: "detach", ".data", "no_grad", "integer" (an operator whose result is no floating number), "python" (`item`, `numpy`,
            `tolist`), "custom" (a custom function, whose backward gives nothing back), or "other".
        name: of the function, as users write it.
        place: of the line.
    """

    kind: str
    name: str
    place: Place

    @property
    def source(self) -> str:
        """ "file.py:line", "" where it is not known."""
        return f"{Path(self.place.file).name}:{self.place.line}" if self.place.file else ""


@dataclass(slots=True)
class Way:
    """Where the way from some parameters leads in a forward pass.

    Attributes:
        used: something was computed from them.
        outputs: names of the outputs that depend on them and pass a gradient back.
        cut: by which those that the loss uses, or all, do no more; None: nothing is known to.
        squashed: the last call of each softmax and the like, by its name.
    """

    used: bool = False
    outputs: list[str] = field(default_factory=list)
    cut: Cut | None = None
    squashed: dict[str, Cut] = field(default_factory=dict)


class Follower(TorchFunctionMode):
    """Follows what depends on some tensors.

    Args:
        sources: the tensors.
        modules: ids of modules that have a name.
        stop: code of the function from which everything is run.
    """

    def __init__(self, sources: Iterable[Tensor], modules: Container[int] = (), stop: CodeType | None = None) -> None:
        super().__init__()
        self._modules, self._stop = modules, stop
        self._kept: list[Any] = []  # so that no id is given twice
        self._live = {id(tensor) for tensor in sources}
        self._dead: dict[int, Cut] = {}
        self.used = False
        self.ends: list[Cut] = []
        self.squashed: dict[str, Cut] = {}

    def is_live(self, tensor: Tensor) -> bool:
        """It depends on them, and passes a gradient back."""
        return id(tensor) in self._live

    def cut_of(self, thing: Any) -> Cut | None:
        """What depended on them before it became this."""
        return self._dead.get(id(thing))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in SQUASHES and isinstance(out, Tensor):
            self.squashed[name] = Cut("other", name, here(self._modules, self._stop))
        if name.startswith(_SHAPES):
            return out  # it goes by the shape alone
        given = list(_things((args, tuple(kwargs.values()))))
        live = any(id(thing) in self._live for thing in given)
        dead = next((cut for thing in given if (cut := self._dead.get(id(thing))) is not None), None)
        if not live and dead is None:
            return out
        self.used = True
        made: Cut | None = None
        for thing in _things((out,)):
            self._kept.append(thing)
            if isinstance(thing, Tensor) and thing.requires_grad and live:
                self._live.add(id(thing))
            elif live and id(thing) not in self._live:
                made = made or self._cut(func, name, thing)
                self._dead.setdefault(id(thing), made)
            elif dead is not None:
                self._dead.setdefault(id(thing), dead)
        if name in _TO_PYTHON:
            self.ends.append(Cut("python", f"{name.strip('_')}()", here(self._modules, self._stop)))
        elif made is not None and made.kind in ("detach", ".data", "no_grad"):
            self.ends.append(made)
        if live and name == "detach_" and isinstance(args[0], Tensor):
            self._live.discard(id(args[0]))
            self._dead[id(args[0])] = Cut("detach", name, here(self._modules, self._stop))
        return out

    def _cut(self, func: Any, name: str, thing: Any) -> Cut:
        place = here(self._modules, self._stop)
        if name == "detach":
            return Cut("detach", "detach()", place)
        if "data.__get__" in (resolve_name(func) or "") or (name == "__get__" and "data" in repr(func)):
            return Cut(".data", ".data", place)
        if not isinstance(thing, Tensor):
            return Cut("python", f"{name}()", place)
        if not torch.is_grad_enabled():
            function = _custom_function()
            return Cut("custom", function, place) if function else Cut("no_grad", "no_grad()", place)
        if not (thing.is_floating_point() or thing.is_complex()):
            return Cut("integer", name.strip("_"), place)
        return Cut("other", name, place)


_SHAPES = (
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
    "rand_like",
    "randn_like",
    "randint_like",
    "new_",
    "size",
    "dim",
    "stride",
)

_TO_PYTHON = frozenset({"item", "tolist", "numpy", "__float__", "__int__", "__array__"})


def follow(call: Call, parameters: Collection[int], modules: Container[int] = ()) -> Way:
    """Run a call's forward pass again and follow what depends on some parameters of its model.

    Args:
        call: it.
        parameters: ids of the parameters.
        modules: ids of the modules that have a name.

    Raises:
        NotReplayable: it cannot be, and why.
        Exception: whatever it raises this time.
    """
    follower, output, sources = _followed(call, parameters, modules)
    way = Way(follower.used, squashed=follower.squashed)
    tensors = list(tensors_of(output))
    live = {id(tensor) for tensor in tensors if follower.is_live(tensor) or _leads(tensor, sources)}
    way.outputs = [name for name, tensor in named("", output, 6) if id(tensor) in live]
    if not way.outputs and live:
        way.outputs = [""]
    used = [tensor for number, tensor in enumerate(tensors) if number in call.used] or tensors
    if any(id(tensor) in live for tensor in used):
        way.cut = _custom_on_the_way([tensor for tensor in used if id(tensor) in live], sources)
        return way
    cuts = [cut for tensor in used if (cut := follower.cut_of(tensor)) is not None]
    if cuts:
        way.cut = cuts[0]
    elif follower.ends and not way.outputs and _depends(call, parameters, used, tensors):
        way.cut = follower.ends[-1]  # the values have left torch and have come back
    return way


def _followed(
    call: Call, parameters: Collection[int], modules: Container[int], by: float = 1.0
) -> tuple[Follower, Any, list[Tensor]]:
    with again(call) as this:
        sources = [alias for key, alias in this.stand_ins.aliases.items() if key in parameters]
        if by != 1.0:
            for alias in sources:
                alias.data = alias.detach() * by + 0.1
        with Follower(sources, modules, stop=Again.run.__code__) as follower:
            return follower, this.run(), sources


def _depends(call: Call, parameters: Collection[int], used: list[Tensor], tensors: list[Tensor]) -> bool:
    """Whether what is put out has other values where the parameters have."""
    _, output, _ = _followed(call, parameters, (), by=1.5)
    others = list(tensors_of(output))
    numbers = [number for number, tensor in enumerate(tensors) if any(tensor is one for one in used)]
    return len(others) != len(tensors) or any(not torch.equal(tensors[i].detach(), others[i].detach()) for i in numbers)


def _leads(tensor: Tensor, sources: list[Tensor]) -> bool:
    """Whether its graph leads to one of them: a custom function shows in the graph alone."""
    wanted = {id(source) for source in sources}
    return any(id(getattr(node, "variable", None)) in wanted for node in nodes_below([tensor.grad_fn]))


def _custom_on_the_way(tensors: list[Tensor], sources: list[Tensor]) -> Cut | None:
    """A custom function through which each way from these tensors leads; None: some way leads around it."""
    wanted = {id(source) for source in sources}
    for tensor in tensors:
        for node in nodes_below([tensor.grad_fn]):
            if hasattr(node, "_forward_cls"):
                around = any(id(getattr(each, "variable", None)) in wanted for each in nodes_below([tensor.grad_fn], without=node))
                if not around:
                    return Cut("custom", type(node).__name__.removesuffix("Backward"), NOWHERE)
    return None


def _custom_function() -> str:
    """Name of the custom function whose forward pass is running; "" for none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "forward" and frame.f_back is not None and frame.f_back.f_code.co_name == "apply":
            return frame.f_code.co_qualname.rpartition(".forward")[0].rpartition(".")[2]
        frame = frame.f_back
    return ""


def _things(given: Iterable[Any]) -> Iterator[Any]:
    """Tensors and arrays in nested arguments."""
    for thing in given:
        if isinstance(thing, (Tensor, np.ndarray)):
            yield thing
        elif isinstance(thing, (tuple, list)):
            yield from _things(thing)
        elif isinstance(thing, dict):
            yield from _things(thing.values())
