"""A watched training ends in the same bits as an unwatched one, and draws the same random numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from gradwatch import GradWatch, Sampling
from tests.networks import NETWORKS, UPDATES, Training, fingerprint, random_states
from tests.traces import changed

SPARSE_LOOKS = Sampling(dense=2, every=3)


def watched(training: Training, **options: object) -> GradWatch:
    with GradWatch(training.model, console=False, **options) as watch:
        training.run()
    return watch


def bare_bits(name: str) -> dict[str, object]:
    """What the unwatched training leaves behind."""
    training = NETWORKS[name]()
    training.run()
    return fingerprint(training)


def assert_same_bits(expected: dict[str, object], training: Training) -> None:
    differing = changed(expected, fingerprint(training))
    assert not differing, sorted(differing)


@pytest.mark.parametrize("sampling", [Sampling(), SPARSE_LOOKS], ids=["default", "sparse-looks"])
@pytest.mark.parametrize("name", NETWORKS)
def test_training_is_bit_identical_under_the_watch(name: str, sampling: Sampling) -> None:
    expected = bare_bits(name)
    training = NETWORKS[name]()
    watch = watched(training, sampling=sampling)
    assert_same_bits(expected, training)
    # A watch that saw nothing is harmless too, and proves nothing.
    assert watch.history.recorded == UPDATES * training.records
    assert np.isfinite(watch.history.stat("total_norm")).all()


@pytest.mark.parametrize("name", ["mlp", "cnn_in_place", "gan", "transformer_encoder", "checkpointing", "bf16_autocast", "lstm"])
def test_training_is_bit_identical_beyond_the_updates_that_are_all_looked_at(name: str) -> None:
    updates = Sampling().dense + 12
    bare = NETWORKS[name]()
    bare.run(updates)
    expected = fingerprint(bare)
    training = NETWORKS[name]()
    with GradWatch(training.model, console=False) as watch:
        training.run(updates)
    assert_same_bits(expected, training)
    looked_at = np.isfinite(watch.history.stat("activation_rms")).any(axis=1).tolist()
    assert all(looked_at[: Sampling().dense])
    assert 0 < sum(looked_at[-24:]) < 24


@pytest.mark.parametrize("name", ["mlp", "gan", "embedding_sparse", "bf16_autocast"])
def test_training_is_bit_identical_with_raise_asked_and_everything_finite(name: str) -> None:
    expected = bare_bits(name)
    training = NETWORKS[name]()
    watched(training, on_nonfinite="raise")
    assert_same_bits(expected, training)


@pytest.mark.parametrize("name", ["mlp", "lstm", "cnn_in_place"])
def test_clipping_gives_the_weights_of_clip_grad_norm(name: str) -> None:
    max_norm = 1e-2
    bare = NETWORKS[name]()
    parameters = [p for module in bare.modules().values() for p in module.parameters()]
    (optimizer,) = bare.optimizers
    clipper = optimizer.register_step_pre_hook(lambda *_: torch.nn.utils.clip_grad_norm_(parameters, max_norm) and None)
    bare.run()
    clipper.remove()
    training = NETWORKS[name]()
    watch = watched(training, clip=max_norm)
    assert (watch.history.stat("clip_coef") < 1).all(), "a test of clipping in which nothing was clipped"
    # The watch's norm comes from another summation order, so the coefficient may differ in its last bits.
    for module, other in zip(bare.modules().values(), training.modules().values(), strict=True):
        for (key, expected), got in zip(module.state_dict().items(), other.state_dict().values(), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", ["mlp", "dropout", "gan"])
def test_attaching_and_detaching_draw_no_random_number(name: str) -> None:
    training = NETWORKS[name]()
    before = random_states()
    watch = GradWatch(training.model, console=False)
    watch.attach()
    watch.summary()
    watch.detach()
    assert random_states() == before


def test_reading_the_watch_mid_run_changes_no_bit() -> None:
    expected = bare_bits("dropout")
    training = NETWORKS["dropout"]()
    with GradWatch(training.model, console=False) as watch:
        for i in range(UPDATES):
            training.update(i)
            watch.summary()
            watch.history.stat("grad_norm")
            watch.state_dict()
    assert_same_bits(expected, training)


def test_a_run_in_two_blocks_is_bit_identical() -> None:
    expected = bare_bits("lstm")
    training = NETWORKS["lstm"]()
    watch = GradWatch(training.model, console=False)
    with watch:
        training.run(5)
    with watch:
        training.run(UPDATES - 5, start=5)
    assert_same_bits(expected, training)
    assert watch.history.steps.tolist() == list(range(UPDATES))


def nudge_one_weight(training: Training) -> None:
    weight = next(next(iter(training.modules().values())).parameters())
    with torch.no_grad():
        weight.view(-1)[0] = torch.nextafter(weight.view(-1)[0], torch.tensor(10.0))


def draw_one_number(_: Training) -> None:
    torch.rand(())


def bump_a_counter(training: Training) -> None:
    next(iter(training.optimizers[0].state.values()))["step"].add_(1)


def touch_a_gradient(training: Training) -> None:
    gradient = next(next(iter(training.modules().values())).parameters()).grad
    assert gradient is not None
    gradient.view(-1)[0] += 1e-3


@pytest.mark.parametrize("harm", [nudge_one_weight, draw_one_number, bump_a_counter, touch_a_gradient])
def test_the_comparison_sees_the_least_harm(harm: object) -> None:
    """The tests above are worth something only if one bit is enough to fail them."""
    training = NETWORKS["mlp"]()
    training.run(2)
    before = fingerprint(training)
    assert callable(harm)
    harm(training)
    assert len(changed(before, fingerprint(training))) == 1


def test_the_networks_are_of_the_promised_makes() -> None:
    kinds = {type(part) for build in NETWORKS.values() for module in build().modules().values() for part in module.modules()}
    assert {
        nn.LSTM,
        nn.GRU,
        nn.BatchNorm2d,
        nn.Dropout,
        nn.TransformerEncoderLayer,
        nn.TransformerDecoderLayer,
        nn.Embedding,
    } <= kinds
    assert len(NETWORKS) >= 15
