"""Every example runs as a user would run it, in seconds, and says what its docstring promises."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

PROMISES: dict[str, tuple[str, ...]] = {
    "plain_loop.py": (r"loss: 4\.\d+ at the start, [12]\.\d+ at the end", r"alerts: 0"),
    "gan.py": (
        r"generator: 256 of the last 512 updates",
        r"discriminator: 256 of the last 512 updates",
        r"centre: (0\.[89]|1\.[01])",
    ),
    "clip.py": (r"clip=None: loss 12\.\d+ -> nan", r"clip=1\.0: loss 12\.\d+ -> [12]\.\d+, .* 1\d\d of 150 updates clipped"),
    "own_rule.py": (r"sink: clipped_nearly_always since update 0: 100% of the last 20 updates were clipped \(open\)",),
    "training_that_would_have_died.py": (
        r"100 updates, 9 of them on broken batches",
        r"sound batches +│ 2\.\d+ +│ 0 +│ 0 +│",
        r"broken ones too +│ nan +│ 0 +│ \d +│",
        r"protected +│ 2\.\d+ +│ 3 +│ 6 +│",
    ),
}
"""What each prints on its standard output, as patterns."""

ARGUMENTS = {"training_that_would_have_died.py": ("100",)}
"""Of those that take longer than a test may."""


def run(example: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(EXAMPLES / example), *ARGUMENTS.get(example, ())]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize("example", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_the_example_does_what_it_promises(example: str) -> None:
    result = run(example)
    assert result.returncode == 0, result.stderr
    missing = [pattern for pattern in PROMISES.get(example, ()) if not re.search(pattern, result.stdout)]
    assert not missing, result.stdout + result.stderr
    assert "Traceback" not in result.stderr


def test_the_healthy_example_is_silent_but_for_its_verdict() -> None:
    result = run("plain_loop.py")
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert 1 <= len(lines) <= 2, result.stderr
    assert "healthy" in result.stderr
