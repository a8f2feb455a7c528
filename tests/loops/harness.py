"""What the loops share: a small model, data it can learn, and the three judgements on a watched loop."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch import GradWatch
from gradwatch.records import GradState
from tests.reference import CLEARED, PER_PARAMETER, PER_UPDATE, Reference

NAN = float("nan")
WARNING = 30

HEALTHY_AND_FAULTY = pytest.mark.parametrize("fault", [False, True], ids=["healthy", "faulty"])

mse = F.mse_loss


def mlp() -> nn.Sequential:
    """8 to 1, three matrices; the middle one is larger than the sample by which a step is measured."""
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 40), nn.Tanh(), nn.Linear(40, 1))


def batches(updates: int, size: int = 32) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Number, inputs `[size, 8]` and targets `[size, 1]` of a function that `mlp` learns within a few dozen updates."""
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(8, 1, generator=generator)
    for i in range(updates):
        x = torch.randn(size, 8, generator=generator)
        yield i, x, torch.tanh(x @ direction / 2)


def backward(reference: Reference, loss: Tensor, *, reached: Collection[str] | None = None, retain_graph: bool = False) -> None:
    """`loss.backward()`, told to the reference."""
    reference.before_backward()
    loss.backward(retain_graph=retain_graph)
    reference.after_backward(loss, reached=reached)


def step(reference: Reference, *optimizers: Optimizer) -> None:
    """`optimizer.step()` of each, which completes a record, told to the reference."""
    for optimizer in optimizers:
        reference.before_step(optimizer)
        optimizer.step()
        reference.after_step(optimizer)
    reference.close()


def agree(watch: GradWatch, reference: Reference, *, records: int, rtol: float = 1e-4, but: Collection[str] = ()) -> None:
    """The watch has recorded exactly what the reference has computed: as many records, every number, every NaN.

    Args:
        watch: after the loop.
        reference: after the loop.
        records: what the loop must give, said once more by hand.
        rtol: relative tolerance; the columns are float32.
        but: statistics that the loop judges by itself.
    """
    history = watch.history
    assert len(reference) == records
    assert history.steps.tolist() == list(range(records))
    assert history.parameters == reference.parameters
    for name in (*PER_UPDATE, *PER_PARAMETER):
        if name in but:
            continue
        got, expected = history.stat(name), reference.stat(name)
        if name in PER_PARAMETER:
            assert got.shape == (records, len(reference.parameters)), name
            expected = expected.reshape(got.shape)
        if name == "grad_state":
            # Where no owner stepped, whether the gradients were gone before a step is a question without an answer.
            unanswered = np.where(reference.stat("skipped"), CLEARED, 0).astype(int)[:, None]
            # Whether all was compared depends on the size of a parameter; what the reference saw change is never called the same.
            same = (got & int(GradState.SAME)) != 0
            changed = (expected.astype(int) & int(GradState.CHANGED)) != 0
            assert not (same & changed).any()
            assert ((got[same] & int(GradState.STEPPED)) != 0).all()
            unanswered |= int(GradState.SAME)
            got, expected = got & ~unanswered, expected.astype(int) & ~unanswered
        np.testing.assert_allclose(got.astype(np.float64), expected, rtol=rtol, atol=1e-30, equal_nan=True, err_msg=name)
    time = history.stat("time")
    assert (np.diff(time) > 0).all()
    assert (time > 0).all()


def alarms(watch: GradWatch) -> list[tuple[str, int, tuple[str, ...]]]:
    """Rule, step and layers of what was said at WARNING or above."""
    return [(a.rule, a.step, a.layers) for a in watch.alerts if a.severity >= WARNING]


def healthy(watch: GradWatch, reference: Reference, *, learns: bool = True, notices: int = 0) -> None:
    """Nothing was said, about a loop that had learned something when it ended.

    Args:
        watch: after the loop.
        reference: after the loop.
        learns: the loss is known and has fallen.
        notices: at most so many times the watch had something to say about itself.
    """
    assert alarms(watch) == []
    assert len(watch.notices) <= notices, watch.notices
    if learns:
        loss = reference.stat("loss")
        assert loss[-5:].mean() < 0.5 * loss[:5].mean(), loss


def said(
    watch: GradWatch, rule: str, *, step: int | range, layers: Collection[str] | None = None, also: Collection[str] = ()
) -> None:
    """The fault was said under its true name, once, and nothing else was.

    Args:
        watch: after the loop.
        rule: the name.
        step: where it began, or where it may have.
        layers: the layers it must name, in any order; ("",) where all of the model is sick.
        also: rules that may speak beside it.
    """
    found = alarms(watch)
    mine = [alarm for alarm in found if alarm[0] == rule]
    assert len(mine) == 1, found
    assert {alarm[0] for alarm in found} <= {rule, *also}, found
    began = mine[0][1]
    assert began in step if isinstance(step, range) else began == step, found
    if layers is not None:
        assert set(mine[0][2]) == set(layers), found
