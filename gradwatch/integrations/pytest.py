"""The pytest plugin: a fixture `gradwatch` that fails a test whose training goes wrong, by what the watch finds in it.

```python
import torch
from torch import nn


def test_trains(gradwatch):
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with gradwatch(model):
        for _ in range(30):
            x = torch.randn(32, 4)
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), x.sum(1, keepdim=True)).backward()
            optimizer.step()
```

It is there wherever pytest (7 or later) and gradwatch are installed; `-p no:gradwatch` turns it off.
"""

# Pytest imports this in every session, of projects too that never ask for the fixture: no torch, numpy or rich at import. The hooks
# are plain ones for their sake as well: under a pluggy older than 1.2 to define a wrapper of the new style would end the session.

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import nn

    from gradwatch.records import Alert
    from gradwatch.watch import GradWatch

__all__ = ["GradWatchFixture", "gradwatch"]


@dataclass(slots=True)
class _Watched:
    """A watch of one test.

    Attributes:
        watch: the watch.
        name: class of its model, or of its models.
        allowed: rules that may find something.
        told: the test has failed with what it found.
    """

    watch: GradWatch
    name: str
    allowed: frozenset[str]
    told: bool = False

    def alarms(self) -> list[Alert]:
        """What the test fails for."""
        from gradwatch.records import Severity

        return [one for one in self.watch.alerts if one.severity >= Severity.WARNING and one.rule not in self.allowed]

    def fails(self) -> bool:
        """There is an alarm, or nothing was judged: a check that saw no update would pass whatever the training does."""
        return bool(self.alarms()) or (not self.watch.history.recorded and not self.watch.alerts)

    def story(self) -> str:
        """The verdict, and each alarm in full."""
        from gradwatch.present.report import plain, told_in_full
        from gradwatch.watch import verdict_of

        first, *rest = verdict_of(self.watch)
        lines = [first.replace("gradwatch:", f"gradwatch, {self.name}:", 1), *rest]
        lines += [f"  notice: {line}" for notice in self.watch.notices for line in notice.splitlines()]
        for alert in self.alarms():
            lines += ["", *told_in_full(alert, self.watch.history.recorded)]
        return plain(lines)


class GradWatchFixture:
    """What the fixture `gradwatch` is: called like `GradWatch`, it returns a watch that the test answers for."""

    def __init__(self) -> None:
        self._watched: list[_Watched] = []

    def __call__(self, model: nn.Module | Mapping[str, nn.Module], *, allow: str | Iterable[str] = (), **options: Any) -> GradWatch:
        """Make a watch; when the test's body has ended, any alert of it at WARNING or above fails the test, and so does a watch that has
        seen no update: a forgotten `with`.

        Args:
            model: as of `GradWatch`.
            allow: names of rules that may find something, one or several: `allow="dead_units"`.
            options: as of `GradWatch`, but that `console` is False where it is not given.

        Returns:
            The watch, to be entered, or attached; it is detached when the test's body has ended, if it still is attached then.

        Raises:
            TypeError: an argument of the wrong kind.
            ValueError: no rule has a name that is allowed; a bad value of an argument of `GradWatch`.
        """
        from gradwatch.capture.parameters import unwrap
        from gradwatch.diagnose.rules import default_rules, name_of
        from gradwatch.present.words import listed
        from gradwatch.watch import GradWatch, rules_of

        __tracebackhide__ = True  # what is wrong with a call is shown at the call
        watch = GradWatch(model, **{"console": False, **options})
        allowed = _allowed(allow, dict.fromkeys((*rules_of(watch), *map(name_of, default_rules()))))
        models = tuple(model.values()) if isinstance(model, Mapping) else (model,)
        self._watched.append(_Watched(watch, listed([type(unwrap(one)).__name__ for one in models]), allowed))
        return watch

    def close(self, error: BaseException | None = None) -> None:
        """Detach what is still attached.

        Args:
            error: what ended the test before its time.
        """
        from gradwatch.present.words import stopper
        from gradwatch.watch import is_attached, leave

        for one in self._watched:
            if is_attached(one.watch):
                leave(one.watch, stopper(error))

    def failures(self) -> str:
        """What the test fails for, in full; "" for nothing. It is told once."""
        sick = [one for one in self._watched if one.fails()]
        for one in sick:
            one.told = True
        return "\n\n".join(one.story() for one in sick)

    def verdicts(self) -> str:
        """The verdict on each watch that has not been told, and its alarms in full where the test has failed for something else."""
        return "\n".join(one.story() for one in self._watched if not one.told)


_FIXTURE = pytest.StashKey[GradWatchFixture]()


@pytest.fixture
def gradwatch(request: pytest.FixtureRequest) -> Iterator[GradWatchFixture]:
    """Call it as `GradWatch`: the test fails if the watch finds something. `with gradwatch(model): loop()`"""
    fixture = request.node.stash[_FIXTURE] = GradWatchFixture()
    yield fixture
    fixture.close()
    del request.node.stash[_FIXTURE]  # items live as long as the session, and a watch holds a history


@pytest.hookimpl(trylast=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Fail the test after its body, where that is a failure and no error; it does not come here if the body has raised."""
    fixture = item.stash.get(_FIXTURE, None)
    if fixture is not None:
        fixture.close()
        failures = fixture.failures()
        if failures:
            pytest.fail(failures, pytrace=False)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Put what has not been told into the report, before that is made."""
    fixture = item.stash.get(_FIXTURE, None)
    if fixture is None or call.when != "call":
        return
    try:
        fixture.close(call.excinfo.value if call.excinfo is not None else None)
        verdicts = fixture.verdicts()
    except Exception:  # it would end the whole session
        verdicts = f"gradwatch failed to give its verdict; please report this:\n{traceback.format_exc()}"
    if verdicts:
        item.add_report_section("call", "gradwatch", verdicts)
        if item.config.getoption("capture", "no") in ("no", "tee-sys"):  # whoever wants to see output as it comes
            print(verdicts)


def _allowed(given: object, known: Iterable[str]) -> frozenset[str]:
    __tracebackhide__ = True
    several = (given,) if isinstance(given, str) else given
    names = tuple(several) if isinstance(several, Iterable) else (given,)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(
                f"gradwatch(allow=...): got {name!r} ({type(name).__name__}); it needs names of rules, such as 'dead_units'"
            )
        if name not in known:
            raise ValueError(f"gradwatch(allow=...): there is no rule {name!r}; there are {', '.join(known)}")
    return frozenset(names)
