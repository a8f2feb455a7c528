"""Which line of whose code is running, and in which module: read off Python's stack, so that nothing need be hooked."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Container
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import CodeType, FrameType

import torch

from gradwatch.capture import private

TORCH, LIBRARY, USER = range(3)

_HERE = str(Path(__file__).parent.parent) + os.sep
_TORCH = str(Path(torch.__file__).parent) + os.sep
_DEMO = _HERE + "demo"
_STDLIB = sysconfig.get_paths()["stdlib"]
_CALL = private.call_code()
_ENGINE = str(Path(torch.autograd.__file__).parent)

_kinds: dict[str, int] = {}


@dataclass(frozen=True, slots=True)
class Place:
    """A line that runs.

    Attributes:
        code: of the function; None where no code but torch's is running.
        line: in its file.
        module: id of the innermost module that is running, 0 for none.
        instruction: of the code, the one that runs; -1: not known.
    """

    code: CodeType | None
    line: int
    module: int
    instruction: int = -1

    @property
    def file(self) -> str:
        """The path of the file, "" where there is none."""
        return self.code.co_filename if self.code is not None else ""

    @property
    def source(self) -> str:
        """ "file.py:line", "" where it is not known."""
        return f"{Path(self.file).name}:{self.line}" if self.code is not None else ""

    @property
    def span(self) -> tuple[int, int, int, int] | None:
        """What of the source runs: first line, column, last line, column, these in bytes; None where the code does not say (`-X
        no_debug_ranges`)."""
        if self.code is None or self.instruction < 0:
            return None
        found = next(islice(self.code.co_positions(), self.instruction // 2, None), None)
        if found is None:
            return None
        line, last, start, end = found
        return None if line is None or last is None or start is None or end is None else (line, start, last, end)


NOWHERE = Place(None, 0, 0)


def here(known: Container[int], stop: CodeType | None = None) -> Place:
    """The innermost line outside torch, the user's rather than a library's, and the innermost module.

    Of the frames inside one call of a module, one that lies outside site-packages is preferred: the line that calls a library says
    more than the one inside it.

    Args:
        known: ids of the modules that have a name.
        stop: code at which the way outwards ends.
    """
    frame: FrameType | None = sys._getframe(1)
    best: FrameType | None = None
    module = 0
    while frame is not None and frame.f_code is not stop:
        code = frame.f_code
        if code is _CALL:
            module = module or _named(frame, known)
            if best is not None and module:
                break
        else:
            kind = _kinds.get(code.co_filename)
            if kind is None:
                kind = _kinds[code.co_filename] = kind_of(code.co_filename)
            if kind == USER:
                return Place(code, frame.f_lineno, module or _module_around(frame, known, stop), frame.f_lasti)
            if kind == LIBRARY and best is None:
                best = frame
        frame = frame.f_back
    return Place(best.f_code, best.f_lineno, module, best.f_lasti) if best is not None else Place(None, 0, module)


def in_engine() -> Place | None:
    """The line of a user's that the autograd engine is running (a custom function's backward, a hook); None: the engine alone runs."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_ENGINE) and frame.f_code.co_name in ("_engine_run_backward", "backward", "grad"):
            return None
        kind = _kinds.get(name)
        if kind is None:
            kind = _kinds[name] = kind_of(name)
        if kind != TORCH:
            return Place(frame.f_code, frame.f_lineno, 0, frame.f_lasti)
        frame = frame.f_back
    return None


def _module_around(frame: FrameType | None, known: Container[int], stop: CodeType | None) -> int:
    while frame is not None and frame.f_code is not stop:
        if frame.f_code is _CALL and (module := _named(frame, known)):
            return module
        frame = frame.f_back
    return 0


def _named(frame: FrameType, known: Container[int]) -> int:
    """Id of the module whose call a frame is; 0 for one without a name."""
    module = id(frame.f_locals["self"])
    return module if module in known else 0


def kind_of(file: str) -> int:
    """Whose code a file holds: torch's or ours or Python's (`TORCH`), another package's (`LIBRARY`), or the user's (`USER`), for whom the
    demo stands."""
    if file.startswith(_DEMO):
        return USER
    if file.startswith((_TORCH, _HERE)) or (file.startswith("<") and not file.startswith("<ipython")):
        return TORCH
    if "site-packages" in file or "dist-packages" in file:
        return LIBRARY
    return TORCH if file.startswith(_STDLIB) else USER
