"""Write rules.md from the rules themselves: definitions from their docstrings, thresholds from the constants beside them.

Run: `python examples/guides/make_rules.py` (it prints); a test compares what it prints with rules.md.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from types import ModuleType

from gradwatch import default_rules

INTRO = """\
# The rules, their thresholds and where they come from

Written by `make_rules.py` from the rules' own docstrings and constants. *Decades* are powers of ten; *measured* means on the runs of
`tests/zoo` or on models from `transformers`, where it is said. Every rule is a function of the history; `watch.alerts` tells what they found,
one alert an incident, and the causes come before their consequences: a NaN in a weight makes everything else NaN and is one alert.
"""


def constants(source: str) -> Iterator[tuple[str, str]]:
    """Assignments at module level that a docstring follows, and that docstring."""
    before: ast.stmt | None = None
    for node in ast.parse(source).body:
        documented = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        if documented and isinstance(before, ast.Assign):
            yield ast.unparse(before), " ".join(node.value.value.split())  # type: ignore[attr-defined]
        before = node


def helpers(module: ModuleType) -> Iterator[ModuleType]:
    """Modules beside it that it imports from."""
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith("gradwatch.diagnose.rules."):
            yield importlib.import_module(node.module)


def guide() -> str:
    """The text of rules.md."""
    parts = [INTRO]
    modules = dict.fromkeys(inspect.getmodule(rule) for rule in default_rules())
    done = set(modules)
    for module in modules:
        assert module is not None
        for rule in default_rules():
            if inspect.getmodule(rule) is module:
                parts.append(f"## `{rule.__name__}`\n\n{inspect.getdoc(rule)}\n")  # type: ignore[attr-defined]
        used = [module, *(helper for helper in dict.fromkeys(helpers(module)) if helper not in done)]
        done.update(used)
        rows = [f"- `{assignment}`: {meaning}" for each in used for assignment, meaning in constants(inspect.getsource(each))]
        if rows:
            parts.append("Thresholds:\n\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(guide(), end="")
