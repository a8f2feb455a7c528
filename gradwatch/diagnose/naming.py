"""From sick parameters to the modules that are named for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from gradwatch.facts import Meta


def layers_of(meta: Meta, parameters: Sequence[str]) -> tuple[str, ...]:
    """The modules to name for some parameters, in the order of the parameters.

    A parameter's name is its module's. A parent stands for all modules below it if and only if all trainable parameters under it
    are among `parameters` and there are at least two of them.

    Args:
        meta: static facts of the run; only modules that it lists are named.
        parameters: qualified parameter names, most responsible first; names that are not in `meta` are ignored.
    """
    known = {fact.name for fact in meta.layers}
    layer = {fact.name: fact.layer for fact in meta.parameters}
    sick = [layer[name] for name in dict.fromkeys(parameters) if name in layer]
    trainable = Counter(a for fact in meta.parameters if fact.trainable for a in ancestors(fact.layer))
    found = Counter(a for name in sick for a in ancestors(name))
    whole = {a for a, n in found.items() if n >= 2 and n == trainable[a] and a in known}
    # The outermost wins: from the root down to the module itself.
    named = (next((a for a in reversed(list(ancestors(name))) if a in whole), name) for name in sick)
    return tuple(dict.fromkeys(named))


def ancestors(layer: str) -> Iterator[str]:
    """A module's name and those of the modules around it, the root "" last.

    Example:
        >>> list(ancestors("a.b"))
        ['a.b', 'a', '']
    """
    while layer:
        yield layer
        layer = layer.rpartition(".")[0]
    yield ""


def overlap(one: Iterable[str], other: Iterable[str]) -> bool:
    """Some module of the one is, holds or lies in one of the other; what names no module overlaps with everything."""
    a, b = set(one), set(other)
    if not a or not b:
        return True
    return any(x in b for name in a for x in ancestors(name)) or any(x in a for name in b for x in ancestors(name))
