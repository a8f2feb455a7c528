"""Gradients that the user clips between the backward and the step: the norms before, and by how much."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from gradwatch import GradWatch
from tests.loops.harness import HEALTHY_AND_FAULTY, agree, backward, batches, healthy, mlp, mse, said, step
from tests.reference import CLIPPED, Reference


@HEALTHY_AND_FAULTY
def test_norm_clipped_by_the_user_and_a_spike_that_it_hides(fault: bool) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    reference = Reference(model, optimizer)
    with GradWatch(model, console=False) as watch:
        for i, x, y in batches(40):
            optimizer.zero_grad()
            loss = mse(model(x), y)
            if fault and i == 30:
                loss = loss * 1e4
            backward(reference, loss)
            clip_grad_norm_(model.parameters(), 0.5)
            step(reference, optimizer)
    agree(watch, reference, records=40)
    coef, total = watch.history.stat("clip_coef"), watch.history.stat("total_norm")
    assert (coef < 1).any()
    assert (coef == 1).any()
    np.testing.assert_allclose(coef, np.minimum(1, 0.5 / total), rtol=1e-4)
    if fault:
        said(watch, "gradient_spike", step=30)
    else:
        healthy(watch, reference)


@HEALTHY_AND_FAULTY
def test_values_clipped_by_the_user_and_nan_that_no_clipping_stops(fault: bool) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    reference = Reference(model, optimizer)
    with GradWatch(model, console=False) as watch:
        for i, x, y in batches(30):
            optimizer.zero_grad()
            loss = mse(model(x), y)
            if fault and i == 9:
                # The derivative of a square root at zero: Inf times zero.
                loss = loss + (model[2].weight * 0).pow(2).sum().sqrt()
            backward(reference, loss)
            clip_grad_value_(model.parameters(), 0.01)
            step(reference, optimizer)
    # A value clip has no one factor, and the watch sees it in a few probed elements only.
    agree(watch, reference, records=30, but=("clip_coef", "grad_state"))
    coef, state = watch.history.stat("clip_coef"), watch.history.stat("grad_state")
    assert (coef > 0).all()
    assert (coef[:9] < 1).all()
    assert ((state[:9] & CLIPPED) != 0).any(axis=1).all()
    if fault:
        said(watch, "non_finite_gradient", step=9, layers=("2",))
    else:
        healthy(watch, reference)
