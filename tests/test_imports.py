"""Imports go one way, and the rooms that need no torch do not load it."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "gradwatch"

ROOMS = {
    "records": set(),
    "baselines": {"records"},
    "facts": {"records"},
    "clock": {"records"},
    "history": {"records", "facts", "baselines"},
    "diagnose": {"history", "facts", "baselines", "records"},
    "present": {"history", "facts", "baselines", "records"},
    "capture": {"records", "facts", "clock"},
    "clip": {"capture"},
    "protect": {"records", "clip", "capture"},
    "investigate": {"records", "capture"},
}
"""Which rooms a room may import, besides itself. What is not listed (watch, __init__, __main__, integrations) may import all."""

TORCH_FREE = ("records", "facts", "baselines", "clock", "history", "diagnose", "present")
FORBIDDEN = ("torch", "torchvision", "lightning", "transformers")


def modules(package: Path) -> Iterator[tuple[str, Path]]:
    """Dotted names of a package's modules, without the package's own name; "" is its `__init__`."""
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(source: str) -> Iterator[str]:
    """Absolute names that a module imports anywhere, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they lead"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(module: str, source: str) -> list[str]:
    """Imports of a module that lead the wrong way."""
    room = module.partition(".")[0]
    wrong = []
    for name in imports(source):
        top, _, inner = name.partition(".")
        target = inner.partition(".")[0]
        if room in ROOMS and top == "gradwatch" and target != room and target not in ROOMS[room]:
            wrong.append(f"{module} imports {name}")
        if room in TORCH_FREE and top in FORBIDDEN:
            wrong.append(f"{module} imports {name}")
    return wrong


@pytest.mark.parametrize(
    ("module", "path"), [pytest.param(module, path, id=module or "__init__") for module, path in modules(PACKAGE)]
)
def test_imports_go_one_way(module: str, path: Path) -> None:
    assert not violations(module, path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("diagnose.rules.vanishing", "import torch"),
        ("diagnose.rules.vanishing", "def rule(history):\n    import torch.nn as nn"),
        ("present.console", "from gradwatch.watch import GradWatch"),
        ("present.console", "from gradwatch.diagnose.advice import advice"),
        ("diagnose.incidents", "from gradwatch import capture"),
        ("history", "from gradwatch.present import console"),
        ("records", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from gradwatch.history import History"),
        ("capture.tape", "from gradwatch.watch import GradWatch"),
        ("protect.actor", "from gradwatch.diagnose import incidents"),
        ("clip.learnt", "from gradwatch.protect import actor"),
        ("clock", "from torch import Tensor"),
        ("present.report", "from gradwatch.integrations.pytest import GradWatchFixture"),
    ],
)
def test_an_import_the_wrong_way_is_found(module: str, source: str) -> None:
    """The test above can fail."""
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("watch", "from gradwatch.capture import tape\nimport torch"),
        ("diagnose.rules.vanishing", "import numpy as np\nfrom gradwatch.history import History"),
        ("capture.tape", "import torch\nfrom gradwatch.records import StepRecord"),
        ("clip.learnt", "from gradwatch.capture import parameters\nfrom gradwatch.clip.norms import joint_norm"),
        ("history", "from gradwatch.baselines import Baselines"),
        ("integrations.pytest", "import pytest\nfrom gradwatch.watch import GradWatch\nfrom gradwatch.present.report import plain"),
    ],
)
def test_an_import_the_right_way_is_not(module: str, source: str) -> None:
    assert not violations(module, source)


def load_torch_free(root: Path) -> subprocess.CompletedProcess[str]:
    """Imports every module of the torch-free rooms of the package under `root` in a process of its own."""
    names = [module for module, _ in modules(root / "gradwatch") if module.partition(".")[0] in TORCH_FREE]
    assert len(names) >= 4
    code = "\n".join(
        [
            "import sys",
            "import gradwatch",
            "assert 'torch' not in sys.modules, 'gradwatch itself loads torch'",
            *(f"import gradwatch.{name}\nassert 'torch' not in sys.modules, 'gradwatch.{name} loads torch'" for name in names),
            "assert gradwatch.__file__.startswith(sys.argv[1]), gradwatch.__file__",
            # A lazy import would come with the first use.
            "import numpy as np",
            "from gradwatch.history import History, Meta, ParameterFact",
            "history = History(Meta(parameters=(ParameterFact('weight', ''),)))",
            "history.append(history.blank_row())",
            "history.record()",
            "from gradwatch import Alert, Finding, Severity, StepRecord",
            "assert 'torch' not in sys.modules, 'using it loads torch'",
        ]
    )
    command = [sys.executable, "-W", "error", "-c", code, str(root)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(root), "PATH": ""})


def test_records_rules_and_console_load_without_torch() -> None:
    result = load_torch_free(PACKAGE.parent)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("room", ["records", "diagnose/__init__", "present/__init__", "__init__"])
def test_the_check_for_torch_can_fail(room: str, tmp_path: Path) -> None:
    """The same check, over a copy of the package in which one module imports torch."""
    shutil.copytree(PACKAGE, tmp_path / "gradwatch", ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "gradwatch" / f"{room}.py"
    source = path.read_text(encoding="utf-8")
    path.write_text(source + "\nimport torch\n", encoding="utf-8")
    result = load_torch_free(tmp_path)
    assert result.returncode != 0
    assert "loads torch" in result.stderr, result.stderr
