"""What hooks hold of a record is given back with it: rows, and every reference to a tensor or to the watch."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
from torch import Tensor, nn

from gradwatch import GradWatch, Sampling
from gradwatch.capture.modules import ModuleHooks
from tests.networks import NETWORKS
from tests.test_memory import Tiny, assert_flat, growth

ALWAYS = Sampling(dense=10**9)


def hooks_of(watch: GradWatch) -> ModuleHooks:
    assert watch._recorder is not None
    return watch._recorder.inside.hooks


def taken(hooks: ModuleHooks) -> int:
    """Rows that are in use."""
    return sum(len(samples._rows) - len(samples._free) for samples in hooks._samples.values())


# A GAN's record closes with the next backward.
@pytest.mark.parametrize("name", sorted(NETWORKS.keys() - {"gan"}))
def test_all_rows_are_free_after_each_record(name: str) -> None:
    training = NETWORKS[name]()
    with GradWatch(training.model, console=False, sampling=ALWAYS) as watch:
        hooks = hooks_of(watch)
        for i in range(6):
            training.update(i)
            assert taken(hooks) == 0
    assert all(len(set(samples._free)) == len(samples._free) for samples in hooks._samples.values()), "given back twice"


def test_rows_of_a_gan_do_not_pile_up() -> None:
    training = NETWORKS["gan"]()
    with GradWatch(training.model, console=False, sampling=ALWAYS) as watch:
        hooks = hooks_of(watch)
        training.run(2)
        before = taken(hooks)
        training.run(20)
        assert taken(hooks) == before
    assert taken(hooks) == 0


def test_memory_is_flat_over_2_000_sampled_updates() -> None:
    training = Tiny()
    with GradWatch(training.model, console=False, sampling=ALWAYS) as watch:
        hooks = hooks_of(watch)
        grown = growth(training.run, 700, 2_700, traced=1_000)
        assert taken(hooks) == 0
        assert sum(len(samples._blocks) for samples in hooks._samples.values()) == 1
    assert_flat(grown, 2_000, 1_000)


def test_forward_passes_without_a_backward_do_not_pile_up() -> None:
    training = Tiny()
    with GradWatch(training.model, console=False, sampling=ALWAYS) as watch:
        hooks = hooks_of(watch)
        training.run(3)
        for _ in range(200):
            training.model(training.x)
        # The first calls of each module are held for the backward that may come, and no more.
        assert taken(hooks) < 100
        training.update()
        assert taken(hooks) == 0
        assert watch.history.stat("calls")[-1].tolist() == [201] * 4


def test_graphs_that_the_user_keeps_hold_no_rows() -> None:
    training = Tiny()
    kept, held = [], []
    with GradWatch(training.model, console=False, sampling=ALWAYS) as watch:
        hooks = hooks_of(watch)
        for _ in range(5):
            training.model.zero_grad()
            loss = nn.functional.mse_loss(training.model(training.x), training.y)
            loss.backward(retain_graph=True)
            for p in training.model.parameters():
                assert p.grad is not None
                p.data.sub_(p.grad, alpha=1e-3)  # autograd does not see it, so that old graphs can be gone through again
            kept.append(loss)
            held.append(taken(hooks))
        training.model.zero_grad()
        # Tensors are passed whose record is closed.
        kept[1].backward()
        assert taken(hooks) == 0
    assert len(set(held)) == 1
    assert watch.history.stat("calls")[:5].tolist() == [[1] * 4] * 5
    assert (watch.history.stat("delta_norm")[:5] > 0).all()


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_activations_die_with_the_update_and_need_no_collector(name: str, no_collector: None) -> None:
    training = NETWORKS[name]()
    kept: list[weakref.ref[Tensor]] = []

    def remember(module: nn.Module, args: object, output: object) -> None:
        if isinstance(output, Tensor):
            kept.append(weakref.ref(output))

    def survivors(watched: bool) -> int:
        kept.clear()
        handles = [part.register_forward_hook(remember) for model in training.modules().values() for part in model.modules()]
        if watched:
            with GradWatch(training.model, console=False, sampling=ALWAYS):
                training.run(3)
                found = sum(reference() is not None for reference in kept)
        else:
            training.run(3)
            found = sum(reference() is not None for reference in kept)
        for handle in handles:
            handle.remove()
        assert kept
        return found

    assert survivors(watched=True) == survivors(watched=False) == 0


@pytest.mark.parametrize("kept", ["output", "loss", "grad"])
def test_what_the_user_keeps_keeps_nothing_of_the_watch(kept: str) -> None:
    training = Tiny()
    watch = GradWatch(training.model, console=False)
    watch.attach()
    out = training.model(training.x)
    loss = out.square().mean()
    loss.backward(retain_graph=True)
    training.optimizer.step()
    abandoned = training.model(training.x)  # no backward, no record
    hooks = weakref.ref(hooks_of(watch))
    watch.detach()
    held = {"output": [out, abandoned], "loss": [loss], "grad": [training.model[0].weight.grad]}[kept]
    del watch, out, loss, abandoned
    gc.collect()
    assert held
    assert hooks() is None
