"""`gradwatch run`: an unmodified script, watched from its first update to the verdict at its end."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import traceback
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from gradwatch.present import words
from gradwatch.present.console import ConsoleSink
from gradwatch.script import Script, ScriptNotFound

if TYPE_CHECKING:
    from gradwatch.scout import Scout


def run(
    target: str,
    args: Sequence[str] = (),
    *,
    module: bool = False,
    clip: float | None = None,
    on_nonfinite: Literal["warn", "raise"] = "warn",
    quiet: bool = False,
    summary: bool = False,
) -> int:
    """Run a script as `python` would, and watch what it trains.

    Alerts go to stderr while it runs. The verdict follows at the end of the process, after the script's own exit handlers and threads,
    which may still train.

    Args:
        target: path of a file, or dotted name of a module.
        args: the script's command-line arguments.
        module: `target` is a name, as after `python -m`.
        clip: `max_norm`, as `GradWatch(clip=...)`.
        on_nonfinite: as `GradWatch(on_nonfinite=...)`.
        quiet: no alerts, only the verdict.
        summary: the whole story in place of the verdict.

    Returns:
        The script's exit code; 2 where there is no such script.
    """
    sink = ConsoleSink()
    scouts: list[Scout] = []
    stopped_by = ""

    def send_scout() -> None:
        from gradwatch.scout import Scout

        scouts.append(Scout(sink, clip=clip, on_nonfinite=on_nonfinite, quiet=quiet, summary=summary))

    def stopped(error: BaseException) -> None:
        nonlocal stopped_by
        stopped_by = words.stopper(error)
        for scout in scouts:
            scout.script_stopped(stopped_by)

    when_torch_is_there(send_scout)
    try:
        code = Script(target, list(args), module=module).run(stopped)
    except ScriptNotFound as missing:
        print(f"gradwatch run: {missing}", file=sys.stderr)
        return 2
    if not scouts:
        why = f"stopped by {stopped_by} before torch was imported" if stopped_by else "this script never imported torch"
        sink.print_lines([f"{words.WARNING} gradwatch: {why}, so there was nothing to watch"])
    return code


def when_torch_is_there(then: Callable[[], None]) -> None:
    """Call `then` once, as soon as torch has been imported.

    Not earlier than the script imports it: torch reads `OMP_NUM_THREADS`, `TORCH_LOGS` and their like only when it is loaded, and a
    script may set them in its first lines.
    """
    if "torch" in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _TorchFinder(then))


class _TorchFinder:
    """Finds what the other finders find; only torch is made to say when it has been loaded."""

    def __init__(self, then: Callable[[], None]) -> None:
        self._then = then
        self._asking = False

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        if name != "torch" or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            # Many libraries ask for the spec and load nothing, so the finder stays until somebody does.
            loader: Any = spec.loader
            load = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                del loader.exec_module
                load(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    _without_harm(self._then)

            loader.exec_module = exec_module
        return spec


def _without_harm(do: Callable[[], None]) -> None:
    """The script shall not fail at its `import torch` for want of a watch."""
    try:
        do()
    except Exception:
        print(f"gradwatch: cannot watch this script; please report this:\n{traceback.format_exc()}", file=sys.stderr)
