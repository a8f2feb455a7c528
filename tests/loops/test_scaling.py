"""Losses that are multiplied before the backward, and half precision on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from gradwatch import GradWatch
from tests.loops.harness import HEALTHY_AND_FAULTY, NAN, agree, backward, batches, healthy, mlp, mse, said, step
from tests.reference import CLIPPED, SCALER, Reference


def poison(model: nn.Module) -> Tensor:
    """Zero, with a NaN as the derivative of the first weight: a square root at zero."""
    weight = next(model.parameters())
    return (weight * 0).pow(2).sum().sqrt()


def scaled_update(
    reference: Reference, optimizer: Optimizer, scaler: GradScaler, loss: Tensor, *, unscale: float | None = None
) -> None:
    """One update under a GradScaler, told to the reference; `unscale`: the user unscales and clips to this norm."""
    scale = scaler.get_scale()
    scaled = scaler.scale(loss)
    reference.before_backward()
    scaled.backward()
    reference.after_backward(scaled, scale=scale)
    if unscale is not None:
        scaler.unscale_(optimizer)
        clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], unscale)
    reference.before_step(optimizer, scaled=unscale is None)
    scaler.step(optimizer)
    scaler.update()
    if scaler.get_scale() < scale:
        reference.close(skip=SCALER)
    else:
        reference.after_step(optimizer)
        reference.close()


@HEALTHY_AND_FAULTY
@pytest.mark.parametrize("unscale", [None, 0.5], ids=["left scaled", "unscaled and clipped"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_grad_scaler_and_its_collapse(fused: bool, unscale: float | None, fault: bool) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, fused=fused)
    scaler = GradScaler("cpu", init_scale=2.0**16)
    reference = Reference(model, optimizer)
    with GradWatch(model, console=False) as watch:
        for i, x, y in batches(40):
            optimizer.zero_grad()
            loss = mse(model(x), y)
            if fault and i >= 10:
                loss = loss + poison(model)
            scaled_update(reference, optimizer, scaler, loss, unscale=unscale)
    agree(watch, reference, records=40, but=("clip_coef", "grad_state") if fault else ())
    if fault:
        assert watch.history.stat("skipped").nonzero()[0].tolist() == list(range(10, 40))
        said(watch, "loss_scale_collapse", step=range(10, 21), layers=())
    else:
        healthy(watch, reference)
        assert (watch.history.stat("loss_scale") == 2.0**16).all()
        assert (watch.history.stat("clip_coef") < 1).any() == (unscale is not None)


def half() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))


@HEALTHY_AND_FAULTY
@pytest.mark.parametrize("unscale", [None, 0.5], ids=["left scaled", "unscaled and clipped"])
def test_the_search_for_a_scale_is_silent_and_one_that_never_ends_is_not(unscale: float | None, fault: bool) -> None:
    model = half()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = GradScaler("cpu", init_scale=2.0**26)
    reference = Reference(model, optimizer)
    with GradWatch(model, console=False) as watch:
        for _, x, y in batches(50):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                out = model(x)
            loss = mse(out.float(), y)
            if fault:
                loss = loss + poison(model)
            scaled_update(reference, optimizer, scaler, loss, unscale=unscale)
    agree(watch, reference, records=50, but=("clip_coef", "grad_state") if fault else ())
    skipped = watch.history.stat("skipped")
    if fault:
        assert skipped.all()
        said(watch, "loss_scale_collapse", step=range(16), layers=())
    else:
        assert skipped[0]
        assert not skipped[15:].any()
        assert (watch.history.stat("grad_nonfinite")[skipped] > 0).any(axis=1).all()
        healthy(watch, reference)


def test_a_scale_that_grows_until_it_overflows_now_and_then_is_healthy() -> None:
    model = half()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = GradScaler("cpu", init_scale=2.0**14, growth_interval=3)
    reference = Reference(model, optimizer)
    with GradWatch(model, console=False) as watch:
        for _, x, y in batches(60):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                out = model(x)
            scaled_update(reference, optimizer, scaler, mse(out.float(), y))
    agree(watch, reference, records=60)
    assert 2 <= watch.history.stat("skipped").sum() <= 20
    healthy(watch, reference)


@HEALTHY_AND_FAULTY
def test_a_scaler_over_accumulated_gradients(fault: bool) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    scaler = GradScaler("cpu", init_scale=2.0**10)
    reference = Reference(model, optimizer)
    with GradWatch(model, console=False) as watch:
        for i, x, y in batches(60, size=16):
            scale = scaler.get_scale()
            scaled = scaler.scale(mse(model(x), y) / 2) * (NAN if fault and i == 41 else 1)
            reference.before_backward()
            scaled.backward()
            reference.after_backward(scaled, scale=scale)
            if i % 2:
                reference.before_step(optimizer, scaled=True)
                scaler.step(optimizer)
                scaler.update()
                if scaler.get_scale() < scale:
                    reference.close(skip=SCALER)
                else:
                    reference.after_step(optimizer)
                    reference.close()
                optimizer.zero_grad()
    agree(watch, reference, records=30)
    if fault:
        # A NaN in the loss is no overflow, and one skip is no collapse.
        said(watch, "non_finite_loss", step=20, layers=())
    else:
        healthy(watch, reference)


@HEALTHY_AND_FAULTY
def test_a_loss_scaled_by_hand_is_found_at_the_third_update(fault: bool) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    reference = Reference(model, optimizer)
    scale, known_from = 1024.0, 2
    with GradWatch(model, console=False) as watch:
        for i, x, y in batches(40):
            optimizer.zero_grad()
            loss = mse(model(x), y) * scale
            if fault and i == 25:
                loss = loss * NAN
            reference.before_backward()
            loss.backward()
            reference.after_backward(loss, scale=scale if i >= known_from else 1.0)
            for p in model.parameters():
                p.grad.div_(scale)
            step(reference, optimizer)
    agree(watch, reference, records=40)
    assert (watch.history.stat("loss_scale") == np.where(np.arange(40) < known_from, 1, scale)).all()
    if fault:
        said(watch, "non_finite_loss", step=25, layers=())
    else:
        healthy(watch, reference)
        clipped = (watch.history.stat("grad_state") & CLIPPED) != 0
        assert clipped[:known_from].all()
        assert not clipped[known_from:].any()


@HEALTHY_AND_FAULTY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_on_the_cpu(dtype: torch.dtype, fault: bool) -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    reference = Reference(model, optimizer)
    with GradWatch(model, console=False) as watch:
        for i, x, y in batches(40):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                loss = mse(model(x).float(), y)
            # fp16 backward overflows from here on: without a scaler, and with a loss that is multiplied where it should not be.
            backward(reference, loss * (1e9 if dtype is torch.float16 else NAN) if fault and i == 20 else loss)
            step(reference, optimizer)
    agree(watch, reference, records=40)
    if not fault:
        healthy(watch, reference)
    elif dtype is torch.float16:
        said(watch, "non_finite_gradient", step=20)
    else:
        said(watch, "non_finite_loss", step=20, layers=())
