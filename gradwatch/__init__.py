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

if TYPE_CHECKING:
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


def __getattr__(name: str) -> Any:
    # `import torch` takes two seconds; who only opens a record does not pay for it.
    if name == "GradWatch":
        from gradwatch.watch import GradWatch

        return GradWatch
    if name == "clip":
        return import_module("gradwatch.clip")
    raise AttributeError(f"module 'gradwatch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
