"""Planted bugs are traced to module, operator, pass and line."""

from __future__ import annotations

import pytest
import torch

from gradwatch import GradWatch, Sampling
from gradwatch.records import Alert
from tests.investigate.planted import PLANTED, Planted

UPDATES = 8
SELDOM = Sampling(dense=0, every=1000)


def run(bug: Planted, sampling: Sampling) -> tuple[GradWatch, list[Alert]]:
    torch.manual_seed(0)
    training = bug.make()
    model = training.model
    models = dict(model.items()) if isinstance(model, torch.nn.ModuleDict) else model
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    sent: list[Alert] = []
    with GradWatch(models, console=False, sampling=sampling, on_alert=sent.append, **bug.options) as watch:
        for i in range(UPDATES):
            optimizer.zero_grad()
            training.loss(i).backward()
            optimizer.step()
    return watch, sent


@pytest.mark.filterwarnings("ignore:var")  # of one sample
@pytest.mark.parametrize("sampling", [pytest.param(Sampling(), id="looked at"), pytest.param(SELDOM, id="not looked at")])
@pytest.mark.parametrize("bug", [pytest.param(bug, id=bug.name) for bug in PLANTED])
def test_a_planted_bug_is_traced(bug: Planted, sampling: Sampling) -> None:
    watch, sent = run(bug, sampling)
    assert watch.notices == ()
    assert len(watch.alerts) == 1, [(alert.rule, alert.message) for alert in watch.alerts]
    alert = watch.alerts[0]
    if bug.rule:
        assert alert.rule == bug.rule
    origin = alert.origin
    assert origin is not None, (alert.rule, alert.cause)
    told = (origin.module, origin.op, origin.phase)
    assert told == (bug.module, bug.op, bug.phase), (told, alert.cause, origin.source)
    assert origin.source == (bug.guilty if bug.told != "operator only" else ""), alert.cause
    for part in bug.says:
        assert part in alert.cause
    first = sent[0].origin
    assert first == (origin if bug.told != "on recurrence" else None) or (first is not None and first.source == "")
    assert sum(one.state == "open" for one in sent) == 1 + (bug.told == "on recurrence")


def test_there_are_thirty_bugs_and_more() -> None:
    assert len({bug.name for bug in PLANTED}) >= 30
