"""A script or module run as `python` runs it: as `__main__`, with its own arguments, search path, exit code and traceback."""

from __future__ import annotations

import builtins
import importlib.machinery
import importlib.util
import io
import itertools
import os
import sys
from collections.abc import Callable
from types import CodeType, ModuleType, TracebackType
from typing import Any

_PACKAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "")
_DYNAMO = os.path.join("torch", "_dynamo", "")

INTERRUPTED = 130
"""Exit code after Ctrl-C, 128 + SIGINT, as shells report it."""


class ScriptNotFound(Exception):
    """There is nothing to run; the message says what was looked for and where."""


class Script:
    """A file, or with `module` a name on the search path, that runs once in this process.

    Args:
        target: path of a file, or dotted name of a module or package.
        args: its command-line arguments.
        module: `target` is a name, as after `python -m`.
    """

    def __init__(self, target: str, args: list[str], *, module: bool = False) -> None:
        self._target, self._args, self._module = target, args, module

    def run(self, stopped: Callable[[BaseException], None] = lambda error: None) -> int:
        """Run it to its end. Whatever leaves it is treated as `python` treats it: `sys.exit` ends it, a traceback goes to stderr.

        Args:
            stopped: called with the exception that leaves the script, while what its frames hold is still alive.

        Returns:
            The exit code.

        Raises:
            ScriptNotFound: there is no such file or module.
        """
        try:
            code, main = self._load_module() if self._module else self._load_file()
            # It stays there: what the script leaves behind (threads, exit handlers, spawned workers) looks its classes up in it.
            sys.modules["__main__"] = main
            exec(code, main.__dict__)
        except ScriptNotFound:
            raise
        except SystemExit as end:
            stopped(end)
            return _exit_code(end)
        except BaseException as error:
            stopped(error)
            _show(error)
            return INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1
        return 0

    def _load_file(self) -> tuple[CodeType, ModuleType]:
        path = os.path.abspath(self._target)
        try:
            with io.open_code(path) as file:
                source = file.read()
        except OSError as error:
            raise ScriptNotFound(f"cannot open {self._target!r}: {error.strerror}; it needs the path of a Python file") from None
        sys.argv = [self._target, *self._args]
        _first_on_path(os.path.dirname(os.path.realpath(path)))
        main = _blank_main(path, None, importlib.machinery.SourceFileLoader("__main__", path))
        return compile(source, path, "exec", dont_inherit=True), main

    def _load_module(self) -> tuple[CodeType, ModuleType]:
        sys.argv = ["-m", *self._args]
        _first_on_path(os.getcwd())
        name = self._target
        spec = _find(name)
        if spec is not None and spec.submodule_search_locations is not None:
            name = f"{name}.__main__"
            spec = _find(name)
        loader: Any = spec.loader if spec is not None else None
        code = loader.get_code(name) if hasattr(loader, "get_code") else None
        if spec is None or code is None:
            raise ScriptNotFound(f"there is no Python module named {name!r} in the current directory or elsewhere on sys.path")
        sys.argv[0] = spec.origin or self._target
        return code, _blank_main(spec.origin, spec, loader)


def _find(name: str) -> importlib.machinery.ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            return None
        raise  # a package on the way imports something that is missing


def _first_on_path(folder: str) -> None:
    """Take the place of the folder that python put there for gradwatch itself."""
    if sys.flags.safe_path:
        return  # python -P: it put none, and puts none for a script either
    sys.path[0] = folder


def _blank_main(path: str | None, spec: importlib.machinery.ModuleSpec | None, loader: Any) -> ModuleType:
    """An empty `__main__`. Spawned workers find their way back to the code by its spec, or by its file where it has none."""
    main = ModuleType("__main__")
    main.__spec__, main.__loader__ = spec, loader
    main.__package__ = spec.parent if spec is not None else None
    if path is not None:
        main.__file__ = path
    main.__dict__.update(__cached__=spec.cached if spec is not None else None, __builtins__=builtins)
    return main


# -- how it ended ------------------------------------------------------------------------------------------------------------------


def _exit_code(end: SystemExit) -> int:
    if end.code is None or isinstance(end.code, int):
        return int(end.code or 0)
    print(end.code, file=sys.stderr)
    return 1


def _show(error: BaseException) -> None:
    """As python shows an uncaught exception, by the script's own `sys.excepthook` if it set one, without gradwatch's frames."""
    _clean(error, set())
    sys.last_type, sys.last_value, sys.last_traceback = type(error), error, error.__traceback__
    if sys.version_info >= (3, 12):
        sys.last_exc = error
    sys.stdout.flush()
    sys.excepthook(type(error), error, error.__traceback__)


def _clean(error: BaseException | None, seen: set[int]) -> None:
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        error.__traceback__ = _without_own_frames(error.__traceback__)
        _clean(error.__cause__, seen)
        error = error.__context__


def _without_own_frames(trace: TracebackType | None) -> TracebackType | None:
    kept: list[TracebackType] = []
    while trace is not None:
        if not trace.tb_frame.f_code.co_filename.startswith(_PACKAGE):
            kept.append(trace)
        else:
            # Dynamo's wrapper, by which the hooks keep themselves out of compiled code.
            while kept and _DYNAMO in kept[-1].tb_frame.f_code.co_filename:
                kept.pop()
        trace = trace.tb_next
    for before, after in itertools.pairwise([*kept, None]):
        if before is not None:
            before.tb_next = after
    return kept[0] if kept else None
