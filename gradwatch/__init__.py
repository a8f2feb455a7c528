"""gradwatch: a gradient-health monitor for PyTorch training loops.

```python
from gradwatch import GradWatch

with GradWatch(model):
    ...  # the training loop, unchanged
```
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradwatch.diagnose.rules import default_rules
    from gradwatch.history import History
    from gradwatch.records import (
        Alert,
        Finding,
        GradState,
        NonFiniteGradientError,
        Origin,
        RuleError,
        Sampling,
        Severity,
        SkipReason,
        StepRecord,
    )
    from gradwatch.watch import GradWatch

__all__ = [
    "Alert",
    "Finding",
    "GradState",
    "GradWatch",
    "History",
    "NonFiniteGradientError",
    "Origin",
    "RuleError",
    "Sampling",
    "Severity",
    "SkipReason",
    "StepRecord",
    "default_rules",
]

try:
    __version__ = version("gradwatch")
except PackageNotFoundError:  # pragma: no cover - run from a bare checkout
    __version__ = "0+unknown"


_HOMES = {"History": "history", "default_rules": "diagnose.rules", "GradWatch": "watch"}
"""Where the public names live that do not live in `records`."""


def __getattr__(name: str) -> Any:
    # `import torch` takes two seconds; who only opens a record does not pay for it. `import numpy` takes a tenth of one; test sessions
    # of other projects do not pay for that, though pytest loads `gradwatch.integrations.pytest` in each, wherever gradwatch is installed.
    if name in __all__:
        return getattr(import_module(f"gradwatch.{_HOMES.get(name, 'records')}"), name)
    if name in ("clip", "history", "records"):
        return import_module(f"gradwatch.{name}")
    raise AttributeError(f"module 'gradwatch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
