"""A user's type checker understands the public face: right uses pass a strict mypy, wrong ones are found."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import gradwatch

pytestmark = pytest.mark.skipif(find_spec("mypy") is None, reason="mypy is not installed")

RIGHT = '''
from collections.abc import Iterator
from functools import partial
from typing import assert_type

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import nn

from gradwatch import (
    Alert,
    Finding,
    GradState,
    GradWatch,
    History,
    NonFiniteGradientError,
    Origin,
    Sampling,
    Severity,
    SkipReason,
    StepRecord,
    default_rules,
)
from gradwatch.clip import AGC, AutoClip

model = nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)


def large(history: History) -> Iterator[Finding]:
    """A rule of the user's, in five lines."""
    norm = history.stat("grad_norm")[-1]
    if np.nanmax(norm) > 100:
        yield Finding("large", Severity.WARNING, int(history.steps[-1]), message="large", evidence={"norm": float(norm.max())})


def sink(alert: Alert) -> None:
    origin: Origin | None = alert.origin
    print(alert.rule, alert.severity >= Severity.WARNING, alert.layers[0], origin.op if origin else "", alert.evidence["norm"])


class Sink:
    def __call__(self, alert: Alert) -> int:
        return alert.step


def step(record: StepRecord) -> None:
    print(record.step, record.stats["loss"], record.parameters)


with GradWatch(model) as watch:
    loss = model(torch.ones(1, 2)).sum()
    assert_type(watch.loss(1.5), float)
    assert_type(watch.loss(torch.ones(())), torch.Tensor)
    loss.backward()
    optimizer.step()
    watch.step()

assert_type(watch, GradWatch)
assert_type(watch.alerts, tuple[Alert, ...])
assert_type(watch.notices, tuple[str, ...])
assert_type(watch.history, History)
assert_type(watch.history.steps, NDArray[np.int64])
assert_type(watch.history.layers, tuple[str, ...])
assert_type(watch.summary(), str)
GradWatch(model).load_state_dict(watch.state_dict())

full = GradWatch(
    {"generator": model, "discriminator": nn.Linear(1, 1)},
    optimizer=[optimizer],
    scaler=torch.amp.GradScaler("cpu"),
    clip=1.0,
    on_nonfinite="raise",
    rules=[*default_rules(), large],
    on_alert=[sink, Sink(), print],
    on_step=step,
    console=Console(),
    sampling=Sampling(window=100, dense=10, every=5, include=("generator*",)),
)
full.attach()
full.detach()
GradWatch(model, optimizer=optimizer, clip=1, rules=(), on_alert=sink, console=False)
GradWatch(model, clip=partial(torch.nn.utils.clip_grad_value_, clip_value=1.0))
GradWatch(model, clip=partial(torch.nn.utils.clip_grad_norm_, max_norm=1.0))
GradWatch(model, clip=AGC(exclude=("head.*",)), on_nonfinite="skip", max_skips=3, restore_buffers=True)
GradWatch(model, on_rule={"gradient_spike": "skip", "exploding_gradient": 1.0, "large": AutoClip()}, rules=[large])
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
with GradWatch(model, keep_good=100, keep_also=scheduler) as keeping:
    assert_type(keeping.rollback(), int)

try:
    optimizer.step()
except NonFiniteGradientError as error:
    assert_type(error.parameters, tuple[str, ...])
    assert_type(error.step, int)
    assert_type(error.layers, tuple[str, ...])

state = GradState(int(watch.history.stat("grad_state")[0, 0]))
print(bool(state & GradState.CLIPPED), SkipReason(int(watch.history.stat("skip_reason")[0])) is SkipReason.SCALER)
'''

WRONG = """
import torch
from torch import nn

from gradwatch import Alert, Finding, GradWatch, History, Sampling, Severity, StepRecord

model = nn.Linear(2, 1)


def rule(record: StepRecord) -> list[Finding]:
    return []


def change(alert: Alert, record: StepRecord, sampling: Sampling) -> None:
    alert.step = 3  # error: misc
    record.step = 3  # error: misc
    sampling.every = 3  # error: misc


GradWatch(3)  # error: arg-type
GradWatch(model, None)  # error: call-arg|misc
GradWatch(model, on_nonfinite="skp")  # error: arg-type
GradWatch(model, clip="1.0")  # error: arg-type
GradWatch(model, max_norm=1.0)  # error: call-arg
GradWatch(model, rules=[rule])  # error: list-item
GradWatch(model, on_alert=lambda: None)  # error: arg-type|misc
GradWatch(model, console="yes")  # error: arg-type
GradWatch(model, sampling=10)  # error: arg-type
GradWatch(model).alerts = ()  # error: misc
Finding("x", "warning", 3)  # error: arg-type
Finding("x", Severity.WARNING)  # error: call-arg
Sampling(windw=3)  # error: call-arg
History(model)  # error: arg-type
"""


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> dict[str, list[str]]:
    """What a strict mypy says about both files, by file."""
    folder = tmp_path_factory.mktemp("typing")
    # Reading torch takes most of the time: it is read once, as long as pytest keeps a cache.
    kept = getattr(pytestconfig, "cache", None)
    cache = kept.mkdir("mypy") if kept is not None else folder / "cache"
    (folder / "right.py").write_text(RIGHT, encoding="utf-8")
    (folder / "wrong.py").write_text(WRONG, encoding="utf-8")
    root = Path(gradwatch.__file__).parent.parent
    command = [sys.executable, "-m", "mypy", "--strict", "--python-version", "3.11", "--no-error-summary", "--show-error-codes"]
    # What torch's own files say is not asked; they need not be read whole for that.
    command += ["--cache-dir", str(cache), "--config-file", "", "--follow-imports", "silent", "right.py", "wrong.py"]
    result = subprocess.run(
        command, cwd=folder, env={"MYPYPATH": str(root), "PATH": ""}, capture_output=True, text=True, check=False
    )
    assert result.returncode in (0, 1), result.stderr + result.stdout
    found: dict[str, list[str]] = {"right.py": [], "wrong.py": []}
    for line in result.stdout.splitlines():
        found.setdefault(line.partition(":")[0], []).append(line)
    return found


def test_right_uses_pass(checked: dict[str, list[str]]) -> None:
    assert checked["right.py"] == []


def test_each_wrong_use_is_found_and_nothing_else(checked: dict[str, list[str]]) -> None:
    expected = {i: m[1] for i, line in enumerate(WRONG.splitlines(), 1) if (m := re.search(r"# error: (\S+)", line))}
    got: dict[int, set[str]] = {}
    for line in checked["wrong.py"]:
        if (m := re.match(r"wrong\.py:(\d+): error: .*\[([\w-]+)\]$", line)) is not None:
            got.setdefault(int(m[1]), set()).add(m[2])
    assert got.keys() == expected.keys(), checked["wrong.py"]
    for number, codes in got.items():
        assert codes & set(expected[number].split("|")), (number, codes)


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(gradwatch.__file__).parent / "py.typed").exists()
