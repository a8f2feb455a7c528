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
from gradwatch.investigate.tracer import address

SQUASHES = frozenset({"softmax", "sigmoid", "log_softmax"})
"""Functions whose calls are remembered: a loss may apply them again."""


@dataclass(frozen=True, slots=True)
class Cut:
    """The call in which a gradient's way ends.

    Attributes:
        kind: "detach", ".data", "no_grad", "sample" (of a distribution), "write" (into memory, past the graph), "integer" (an operator
            whose result is no floating number),
            "indices" (what it gives beside its values), "python" (`item`, `numpy`, `tolist`), "custom" (a custom function, whose backward
            gives nothing back), or "other".
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
        depends: what is put out has other values where the parameters have; None: that was not looked at.
        squashed: the call of each softmax and the like that gives what is put out, by its name; of those that have only one in the pass,
            that.
    """

    used: bool = False
    outputs: list[str] = field(default_factory=list)
    cut: Cut | None = None
    depends: bool | None = None
    squashed: dict[str, Cut] = field(default_factory=dict)


class Follower(TorchFunctionMode):
    """Follows what depends on some tensors.

    Args:
        sources: the tensors.
        modules: ids of modules that have a name.
        stop: code of the function from which everything is run.
        disturb: number of the end whose value is another than it is; -1: none.

    Attributes:
        used: something was computed from them.
        ends: calls by which values left torch, or the graph.
        squashed: calls of a softmax and the like, and what they gave.
    """

    def __init__(
        self, sources: Iterable[Tensor], modules: Container[int] = (), stop: CodeType | None = None, disturb: int = -1
    ) -> None:
        super().__init__()
        self._modules, self._stop, self._disturb = modules, stop, disturb
        self._kept: list[Any] = []  # so that no id, and no memory, is given twice
        self._sources = list(sources)
        self._live = {id(tensor) for tensor in self._sources}
        self._dead: dict[int, Cut] = {}
        self._written: dict[int, Cut] = {}
        self.used = False
        self.ends: list[Cut] = []
        self.squashed: list[tuple[Cut, Tensor]] = []

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
            self.squashed.append((Cut("other", name, here(self._modules, self._stop)), out))
        if name.startswith(_SHAPES):
            return out  # it goes by the shape alone
        given = list(_things((args, tuple(kwargs.values()))))
        for thing in given:
            self._read(thing)
        live = any(id(thing) in self._live for thing in given)
        cuts = [cut for thing in given if (cut := self._dead.get(id(thing))) is not None]
        # What is chosen counts before what it is chosen by: a mask beside a value that is detached.
        dead = next((cut for cut in cuts if cut.kind not in _CHOOSE), cuts[0] if cuts else None)
        if not live and dead is None:
            return out
        self.used = True
        made: Cut | None = None
        results = list(_things((out,)))
        for thing in results:
            self._kept.append(thing)
            if isinstance(thing, Tensor) and thing.requires_grad and live:
                self._live.add(id(thing))
            elif live and id(thing) not in self._live:
                made = made or self._cut(func, name, thing, results)
                self._dead.setdefault(id(thing), made)
            elif dead is not None:
                # Where the way would end here, too, it is of no use to take out what cut it before.
                ends_here = not isinstance(thing, Tensor) or not (thing.is_floating_point() or thing.is_complex())
                known = dead.kind in (*_CHOOSE, "python") or not ends_here or name.startswith("__get")
                self._dead.setdefault(id(thing), dead if known else self._cut(func, name, thing, results))
        self._write(name, args, kwargs, live, dead)
        if name in _TO_PYTHON:
            self.ends.append(Cut("python", _TO_PYTHON[name], here(self._modules, self._stop)))
        elif made is not None and made.kind in ("detach", ".data", "no_grad"):
            self.ends.append(made)
        if 0 <= self._disturb == len(self.ends) - 1:
            self._disturb = -1
            out = _other_than(out)
            self._kept.append(out)
        if live and name == "detach_" and isinstance(args[0], Tensor):
            self._live.discard(id(args[0]))
            self._dead[id(args[0])] = Cut("detach", name, here(self._modules, self._stop))
        return out

    def _read(self, thing: Any) -> None:
        """Something is given to a call: what its memory holds may depend on them, though the object does not show it."""
        if not isinstance(thing, Tensor) or id(thing) in self._live or id(thing) in self._dead:
            return
        cut = self._written.get(address(thing))
        if cut is not None:
            self._kept.append(thing)
            if _leads(thing, self._sources):
                self._live.add(id(thing))
            else:
                self._dead[id(thing)] = cut

    def _write(self, name: str, args: Any, kwargs: Any, live: bool, dead: Cut | None) -> None:
        """A call in place has written what depends on them to the memory of its target; so it may be seen by another object than it."""
        in_place = name in ("__setitem__", "copy_") or (name.endswith("_") and not name.startswith("__")) or name.startswith("__i")
        target = args[0] if in_place and args else kwargs.get("out")
        if not isinstance(target, Tensor) or target.layout is not torch.strided:
            return
        self._kept.append(target)
        place = here(self._modules, self._stop)
        shown = "An assignment" if name in ("__setitem__", "__set__") else f"{name.strip('_').removeprefix('i')}_()"
        if live and target.requires_grad:
            self._live.add(id(target))
            self._dead.pop(id(target), None)
        if not live and dead is not None:
            cut = dead
        elif not torch.is_grad_enabled():
            cut = Cut("no_grad", "no_grad()", place)
        else:
            cut = Cut("write", shown, place)
        self._written.setdefault(address(target), cut)
        if not target.requires_grad:
            self._dead.setdefault(id(target), cut)

    def _cut(self, func: Any, name: str, thing: Any, results: list[Any]) -> Cut:
        place = here(self._modules, self._stop)
        if name == "detach":
            return Cut("detach", "detach()", place)
        if "data.__get__" in (resolve_name(func) or "") or (name == "__get__" and "data" in repr(func)):
            return Cut(".data", ".data", place)
        if not isinstance(thing, Tensor):
            return Cut("python", _TO_PYTHON.get(name, f"{name}()"), place)
        if not (thing.is_floating_point() or thing.is_complex()):
            beside = any(isinstance(one, Tensor) and one.is_floating_point() for one in results)
            return Cut("indices" if beside else "integer", name.strip("_"), place)
        if not torch.is_grad_enabled():
            if _in_sample():
                return Cut("sample", "sample()", place)
            function = _custom_function()
            mode = "inference_mode()" if torch.is_inference_mode_enabled() else "no_grad()"
            return Cut("custom", function, place) if function else Cut("no_grad", mode, place)
        return Cut("other", name, place)


_CHOOSE = ("integer", "indices")

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

_TO_PYTHON = {
    "item": "item()",
    "tolist": "tolist()",
    "numpy": "numpy()",
    "__array__": "numpy",
    "__float__": "float()",
    "__int__": "int()",
}


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
    tensors = list(tensors_of(output))
    way = Way(follower.used, squashed=_last_squash(follower.squashed, tensors))
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
    elif way.used and not way.outputs:
        numbers = [number for number, tensor in enumerate(tensors) if any(tensor is one for one in used)]
        way.depends = _changes(call, parameters, tensors, numbers, by=1.5)
        if way.depends:  # the values have left torch and have come back: where one is another than it is, what is put out is
            last = len(follower.ends) - 1
            tried = range(last, max(-1, last - _TRIED), -1)
            way.cut = next((follower.ends[i] for i in tried if _changes(call, parameters, tensors, numbers, disturb=i)), None)
    return way


_TRIED = 8
"""Ends, the last ones, for each of which the forward pass is run again."""


def _last_squash(squashed: list[tuple[Cut, Tensor]], outputs: list[Tensor]) -> dict[str, Cut]:
    """Of each softmax and the like the call that is meant: the one that gives an output, else the only one."""
    found = {}
    for name in SQUASHES:
        calls = [(cut, tensor) for cut, tensor in squashed if cut.name == name]
        last = [(cut, tensor) for cut, tensor in calls if any(tensor is output for output in outputs)] or calls
        if len({cut.source for cut, _ in last}) == 1:
            found[name] = last[0][0]
    return found


def _other_than(thing: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(thing, (Tensor, np.ndarray)):
        if thing.dtype in (torch.bool, np.bool_):
            return ~thing
        return (
            (thing * 1.5 + 0.1).astype(thing.dtype)
            if isinstance(thing, np.ndarray)
            else (thing.detach() * 1.5 + 0.1).to(thing.dtype)
        )
    if isinstance(thing, bool):
        return not thing
    if isinstance(thing, int):
        return thing + 1
    if isinstance(thing, float):
        return thing * 1.5 + 0.1
    return [_other_than(one) for one in thing] if isinstance(thing, list) else thing


def _followed(
    call: Call, parameters: Collection[int], modules: Container[int], by: float = 1.0, disturb: int = -1
) -> tuple[Follower, Any, list[Tensor]]:
    with again(call) as this:
        sources = [alias for key, alias in this.stand_ins.aliases.items() if key in parameters]
        if by != 1.0:
            for alias in sources:
                alias.data = alias.detach() * by + 0.1
        with Follower(sources, modules, stop=Again.run.__code__, disturb=disturb) as follower:
            return follower, this.run(), sources


def _changes(
    call: Call, parameters: Collection[int], tensors: list[Tensor], numbers: list[int], by: float = 1.0, disturb: int = -1
) -> bool:
    """Whether what is put out has other values where the parameters have (`by`), or where the value at an end is another (`disturb`)."""
    try:
        _, output, _ = _followed(call, parameters, (), by, disturb)
    except Exception:
        if disturb < 0:
            raise
        return True  # an index that is out of range, say: it is used
    others = list(tensors_of(output))
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


def _in_sample() -> bool:
    """Whether a distribution of torch's draws."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "sample" and frame.f_code.co_filename.startswith(_DISTRIBUTIONS):
            return True
        frame = frame.f_back
    return False


_DISTRIBUTIONS = str(Path(torch.distributions.__file__).parent)


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
