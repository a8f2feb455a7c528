"""The path over a device's slab, driven with CPU tensors: the numbers are those of the path on the host."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gradwatch import GradWatch, Sampling
from gradwatch.capture import parameters
from gradwatch.capture.slab import GRADIENTS, LOSS, SCALARS, Slab
from gradwatch.records import STATISTICS
from tests.loops import (
    test_accumulation,
    test_by_hand,
    test_clipping,
    test_gan,
    test_models,
    test_optimizers,
    test_scaling,
    test_zeroing,
)

LOOPS: dict[str, Callable[..., Any]] = {
    "plain": lambda: test_zeroing.test_plain_loop_and_a_nan_loss_in_it(False),
    "accumulation": lambda: test_accumulation.test_accumulation_with_a_short_last_group_and_no_clearing(False),
    "clipped by norm": lambda: test_clipping.test_norm_clipped_by_the_user_and_a_spike_that_it_hides(False),
    "scaled by hand": lambda: test_scaling.test_a_loss_scaled_by_hand_is_found_at_the_third_update(False),
    "scaler": lambda: test_scaling.test_grad_scaler_and_its_collapse(False, 0.5, False),
    "fused under a scaler": lambda: test_scaling.test_grad_scaler_and_its_collapse(True, 0.5, False),
    "by hand": lambda: test_by_hand.test_weights_moved_by_hand(test_by_hand.modern, False),
    "lbfgs": lambda: test_optimizers.test_lbfgs_is_one_record_a_step(None, False),
    "two optimizers": lambda: test_optimizers.test_a_dense_and_a_sparse_optimizer_on_one_model(False),
    "inside backward": lambda: test_optimizers.test_optimizers_that_step_inside_the_backward(False),
    "gan": lambda: test_gan.test_gan_as_one_mapping(True, False, False),
    "tied": lambda: test_models.test_tied_embeddings_have_one_column(False),
}


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_a_loop_gives_the_same_record_over_the_slab(loop: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parameters, "HOST", "nowhere")
    loop()


def test_the_path_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above would prove nothing if it took the path on the host."""
    sent = []
    monkeypatch.setattr(parameters, "HOST", "nowhere")
    monkeypatch.setattr(Slab, "send", lambda self, send=Slab.send: (sent.append(1), send(self))[1])
    LOOPS["plain"]()
    assert len(sent) == 30


def test_a_copy_holds_the_cells_and_clears_the_sums() -> None:
    slab = Slab(torch.device("cpu"), 2)
    slab.cells[GRADIENTS][1].fill_(3.0)
    slab.add_loss(torch.tensor(1.5, dtype=torch.float64))
    slab.add_loss(torch.tensor([0.25]))
    slab.send()
    assert slab.arrived()
    values = slab.values()
    assert values.shape == (4, 2)
    assert np.isnan(values[GRADIENTS, 0])
    assert values[GRADIENTS, 1] == 3.0
    assert values[SCALARS, LOSS] == 1.75
    slab.send()
    assert slab.values()[SCALARS, LOSS] == 0.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_on_a_gpu_gives_the_numbers_of_one_on_the_cpu() -> None:
    from gradwatch import GradWatch
    from tests.loops.harness import batches, mlp, mse

    stats = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = mlp().to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        with GradWatch(model, console=False) as watch:
            for _, x, y in batches(20):
                optimizer.zero_grad()
                mse(model(x.to(device)), y.to(device)).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
                optimizer.step()
        assert not watch.notices
        stats.append({name: watch.history.stat(name) for name in ("grad_norm", "weight_norm", "update_ratio", "loss", "clip_coef")})
    for name in stats[0]:
        np.testing.assert_allclose(stats[0][name], stats[1][name], rtol=1e-3, err_msg=name)


def test_the_loops_still_have_these_signatures() -> None:
    """They are called by position above."""
    assert list(inspect.signature(test_by_hand.test_weights_moved_by_hand).parameters) == ["update", "fault"]


@pytest.mark.parametrize("clip", [None, 1e-2], ids=["watching", "acting"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_statistics_of_layers_are_the_same_over_the_copy(
    micro_batches: int, clip: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    histories = []
    for host in ("cpu", "nowhere"):
        monkeypatch.setattr(parameters, "HOST", host)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 128), nn.GELU(), nn.Linear(128, 64), nn.Tanh(), nn.ReLU(), nn.Linear(64, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with GradWatch(model, console=False, clip=clip, sampling=Sampling(dense=12, every=5)) as watch:
            for _ in range(25):
                optimizer.zero_grad()
                for _ in range(micro_batches):
                    model(torch.randn(32, 16)).square().mean().backward()
                optimizer.step()
        histories.append(watch.history)
    for name, statistic in STATISTICS.items():
        if statistic.axis == "layer" or name.startswith("input_"):
            here, sent = (history.stat(name) for history in histories)
            if clip is None:
                np.testing.assert_array_equal(here, sent, err_msg=name)
            else:  # a norm that another kernel read clips by another coefficient, in the last digit
                np.testing.assert_allclose(here, sent, rtol=1e-4, err_msg=name)
    assert np.isfinite(histories[1].stat("gain")).sum() == 5 * 14
