"""Which module an optimizer trains: the outermost one in the process that owns its parameters, and what the script calls it."""

from __future__ import annotations

import gc
import sys
from collections.abc import Collection, Iterable, Sequence

from torch import Tensor, nn
from torch.nn.modules.loss import _Loss
from torch.optim import Optimizer

from gradwatch.capture import private


def outermost(
    wanted: Sequence[Tensor], *, owned: Collection[int], watched: Collection[int], in_backward: bool
) -> tuple[list[nn.Module], list[Optimizer]]:
    """Find the modules that own some parameters by searching the process. Some 50 ms.

    The module that holds most of them is taken, then the one that holds most of the rest, and so on. Of several that hold the same
    ones, the one with the fewest trainable parameters that are none of this optimizer's business; then the outermost. So a whole model
    goes before its layers, and a model before a list of models of which only this one is trained.

    Args:
        wanted: the parameters.
        owned: `id` of every parameter of their optimizer.
        watched: `id` of every parameter that is watched already.
        in_backward: gradients are still coming in, so that their absence tells nothing.

    Returns:
        The modules, and every optimizer in the process.
    """
    ids = {id(p) for p in wanted}
    modules, optimizers = _living()
    candidates = [_Candidate(module, owned, watched, in_backward) for module in _ancestors(modules, ids)]
    chosen: list[nn.Module] = []
    while ids and candidates:
        best = max(candidates, key=lambda candidate: (len(candidate.params & ids), *candidate.rank))
        if not best.params & ids:
            break
        chosen.append(best.module)
        ids -= best.params
    return chosen, optimizers


class _Candidate:
    """A module that holds at least one of the parameters."""

    def __init__(self, module: nn.Module, owned: Collection[int], watched: Collection[int], in_backward: bool) -> None:
        self.module = module
        params = {id(p): p for p in module.parameters()}
        self.params = params.keys()
        others = [p for key, p in params.items() if key not in owned and p.requires_grad]
        foreign = sum(id(p) in watched or (p.grad is None and not in_backward) for p in others)
        cls = type(module)
        # A loss may hold the model for the sake of a penalty; it does not stand for it.
        loss = issubclass(cls, _Loss) or cls.__name__.lower().endswith(("loss", "criterion"))
        self.rank = (-foreign, not loss, sum(1 for _ in module.modules()))


def _living() -> tuple[list[nn.Module], list[Optimizer]]:
    modules: list[nn.Module] = []
    optimizers: list[Optimizer] = []
    for thing in gc.get_objects():
        # `type(thing)`, not `isinstance`: lazy proxies run their owner's code when asked for `__class__`.
        cls = type(thing)
        if issubclass(cls, nn.Module):
            # One whose __init__ has not run yet has no modules; replicas of DataParallel's live for one forward pass only.
            if "_modules" in vars(thing) and not issubclass(cls, nn.DataParallel):
                modules.append(thing)
        elif issubclass(cls, Optimizer) and "param_groups" in vars(thing):
            optimizers.append(thing)
    return modules, optimizers


def _ancestors(modules: Iterable[nn.Module], ids: Collection[int]) -> list[nn.Module]:
    """The modules that hold one of the parameters, themselves or in a child."""
    modules = list(modules)
    parents: dict[int, list[nn.Module]] = {}
    for module in modules:
        for child in private.children(module).values():
            parents.setdefault(id(child), []).append(module)
    todo = [module for module in modules if any(id(p) in ids for p in private.own_parameters(module).values())]
    found: dict[int, nn.Module] = {}
    while todo:
        module = todo.pop()
        if id(module) not in found:
            found[id(module)] = module
            todo.extend(parents.get(id(module), ()))
    return list(found.values())


# -- its name ----------------------------------------------------------------------------------------------------------------------


def name_of(model: nn.Module) -> str:
    """What the script calls a model: the global variable of `__main__` that holds it, else the name of its class.

    Variables of functions are not looked at: up to Python 3.12 whoever asks a frame for them makes it hold them beyond their `del`.
    """
    main = sys.modules.get("__main__")
    for name, value in tuple(vars(main).items()) if main is not None else ():
        if value is model and not name.startswith("_"):
            return name
    return type(model).__name__
