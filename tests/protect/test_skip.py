"""Steps left out: a run with bad batches ends bit for bit where the same run without those batches ends."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, AdamW, NAdam, Optimizer, RMSprop

from gradwatch import GradState, GradWatch, NonFiniteGradientError, Severity, SkipReason
from gradwatch.capture.buffers import FREE, Buffers

NAN = float("nan")
Make = Callable[[Iterable[nn.Parameter]], Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda params: SGD(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "sgd-fused": lambda params: SGD(params, lr=0.1, momentum=0.9, fused=True),
    "adamw": lambda params: AdamW(params, lr=1e-2),
    "adamw-amsgrad": lambda params: AdamW(params, lr=1e-2, amsgrad=True, foreach=False),
    "adamw-foreach": lambda params: AdamW(params, lr=1e-2, foreach=True),
    "adamw-fused": lambda params: AdamW(params, lr=1e-2, fused=True),
    "adagrad": lambda params: Adagrad(params, lr=0.05, lr_decay=1e-3),
    "rmsprop": lambda params: RMSprop(params, lr=1e-2, momentum=0.9, centered=True),
    "nadam": lambda params: NAdam(params, lr=1e-2),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))


def batches(count: int, bad: Collection[int] = ()) -> Iterator[tuple[int, Tensor, Tensor]]:
    source = torch.Generator().manual_seed(1)
    for i in range(count):
        x = torch.randn(16, 8, generator=source)
        y = (x[:, 0] > 0).long()
        if i in bad:
            x[3, 2] = NAN
        yield i, x, y


def train(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    bad: Collection[int] = (),
    without: Collection[int] = (),
    updates: int = 30,
    group: int = 1,
) -> None:
    """The plain loop; `group` batches make an update. `without`: batches that are not there."""
    optimizer.zero_grad()
    for i, x, y in batches(updates * group, bad):
        if i in without:
            continue
        (F.cross_entropy(model(x), y) / group).backward()
        if (i + 1) % group == 0:
            optimizer.step()
            optimizer.zero_grad()


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def watched(model: nn.Module, **options: Any) -> GradWatch:
    return GradWatch(model, console=False, **{"on_nonfinite": "skip", **options})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bad_batches_leave_no_trace_in_weights_moments_counters_and_buffers(name: str) -> None:
    bad = (0, 5, 6, 20)
    model, bare = network(), network()
    optimizer, other = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](bare.parameters())
    with watched(model) as watch:
        train(model, optimizer, bad=bad)
    train(bare, other, without=bad)
    assert same(model.state_dict(), bare.state_dict())
    assert same(optimizer.state_dict(), other.state_dict())
    reasons = watch.history.stat("skip_reason")
    assert np.flatnonzero(reasons == SkipReason.NON_FINITE).tolist() == list(bad)
    assert watch.history.stat("skipped").tolist() == [i in bad for i in range(30)]
    assert watch.notices == ()


@settings(max_examples=15, deadline=None)
@given(bad=st.sets(st.integers(0, 24), max_size=9))
def test_at_whatever_updates_the_bad_batches_come(bad: set[int]) -> None:
    model, bare = network(), network()
    optimizer, other = OPTIMIZERS["adamw"](model.parameters()), OPTIMIZERS["adamw"](bare.parameters())
    with watched(model):
        train(model, optimizer, bad=bad, updates=25)
    train(bare, other, without=bad, updates=25)
    assert same(model.state_dict(), bare.state_dict())
    assert same(optimizer.state_dict(), other.state_dict())


def test_of_an_accumulation_the_whole_group_goes() -> None:
    model, bare = network(), network()
    optimizer, other = OPTIMIZERS["adamw"](model.parameters()), OPTIMIZERS["adamw"](bare.parameters())
    with watched(model) as watch:
        train(model, optimizer, bad=(9, 50), group=4)
    train(bare, other, without=(8, 9, 10, 11, 48, 49, 50, 51), group=4)
    assert same(model.state_dict(), bare.state_dict())
    assert same(optimizer.state_dict(), other.state_dict())
    assert np.flatnonzero(watch.history.stat("skipped")).tolist() == [2, 12]


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_grad_scaler_and_a_scheduler_stay_in_step(fused: bool) -> None:
    bad = (5, 6, 20)

    def run(model: nn.Module, bad: Collection[int], without: Collection[int]) -> tuple[Optimizer, Any, Any]:
        optimizer = AdamW(model.parameters(), lr=1e-2, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1000)
        for i, x, y in batches(30, bad):
            if i in without:
                continue
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
        return optimizer, scaler, scheduler

    model, bare = network(), network()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with watched(model) as watch:
            optimizer, scaler, scheduler = run(model, bad, ())
    other, _, _ = run(bare, (), bad)
    assert same(model.state_dict(), bare.state_dict())  # a scale of two to whatever power changes no bit
    assert same(optimizer.state_dict()["state"], other.state_dict()["state"])
    assert scaler.get_scale() == 2.0**7, "it has halved its scale three times, as it does by itself"
    assert scheduler.last_epoch == 30
    assert set(watch.history.stat("skip_reason")[list(bad)].tolist()) == {SkipReason.SCALER}


def test_a_scheduler_goes_on_without_a_warning() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    with watched(model):
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
        for _, x, y in batches(12, bad=(0, 1)):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            scheduler.step()
    assert scheduler.last_epoch == 12


class Counting(SGD):
    """Counts its steps outside of what it knows of parameters, as some optimizers do."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.param_groups[0]["k"] = self.param_groups[0].get("k", 0) + 1
        self.state["total"] = self.state.get("total", 0) + 1  # type: ignore[index, call-overload]
        super().step(closure)


def test_counters_of_groups_and_of_the_optimizer_go_back() -> None:
    model = network()
    optimizer = Counting(model.parameters(), lr=0.1)
    with watched(model):
        train(model, optimizer, bad=(3, 4), updates=10)
    assert optimizer.param_groups[0]["k"] == 8
    assert optimizer.state["total"] == 8  # type: ignore[index]


def test_a_step_with_a_closure_is_left_out_too() -> None:
    model, bare = network(), network()

    def run(model: nn.Module, bad: Collection[int], without: Collection[int]) -> Optimizer:
        optimizer = AdamW(model.parameters(), lr=1e-2)
        for i, x, y in batches(20, bad):

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                return loss

            if i not in without:
                optimizer.step(closure)
        return optimizer

    with watched(model) as watch:
        mine = run(model, (4, 9), ())
    other = run(bare, (), (4, 9))
    assert same(model.state_dict(), bare.state_dict())
    assert same(mine.state_dict(), other.state_dict())
    assert np.flatnonzero(watch.history.stat("skipped")).tolist() == [4, 9]


def test_each_optimizer_leaves_out_its_own_steps() -> None:
    """A NaN that is born in the backward pass, between encoder and decoder: what lies behind it has a good gradient."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(4, 1)

        def forward(self, x: Tensor, trap: bool) -> Tensor:
            h = self.encoder(x)
            return self.decoder(h + (h * 0).abs().sqrt() if trap else h)

    torch.manual_seed(0)
    model = Halves()
    optimizers = [SGD(half.parameters(), lr=0.1) for half in (model.encoder, model.decoder)]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with watched(model) as watch:
        for trap in (True, False):
            for optimizer in optimizers:
                optimizer.zero_grad()
            model(torch.randn(8, 4), trap).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
            if trap:
                moved = {name: not torch.equal(p, before[name]) for name, p in model.named_parameters()}
    assert moved == {"encoder.weight": False, "encoder.bias": False, "decoder.weight": True, "decoder.bias": True}
    history = watch.history
    assert history.stat("skipped").tolist() == [False, False]
    stepped = history.stat("grad_state") & np.uint8(GradState.STEPPED) > 0
    assert stepped.tolist() == [[False, False, True, True], [True] * 4]


# -- what is told, and when it ends ------------------------------------------------------------------------------------------------


def test_baselines_learn_nothing_of_a_step_that_was_left_out() -> None:
    model, bare = network(), network()
    with watched(model) as watch:
        train(model, SGD(model.parameters(), lr=0.1), bad=(5, 6, 20))
    with GradWatch(bare, console=False) as clean:
        train(bare, SGD(bare.parameters(), lr=0.1), without=(5, 6, 20))
    for name in ("first", "last", "early", "seen", "residuals", "first_losses"):
        np.testing.assert_array_equal(getattr(watch.history.baselines, name), getattr(clean.history.baselines, name), err_msg=name)


def test_it_is_told_once_as_a_warning_and_counted_in_the_verdict() -> None:
    model = network()
    with watched(model) as watch:
        train(model, SGD(model.parameters(), lr=0.1), bad=(5, 6))
    (alert,) = watch.alerts
    assert (alert.rule, alert.severity, alert.step, alert.count) == ("non_finite_input", Severity.WARNING, 5, 2)
    assert "left out" in alert.message
    assert "2 updates left out" in watch.summary()


def test_ten_in_a_row_are_enough() -> None:
    model = network()
    train(model, SGD(model.parameters(), lr=0.1), updates=12)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = SGD(model.parameters(), lr=0.1)
    with pytest.raises(NonFiniteGradientError) as caught, watched(model) as watch:
        train(model, optimizer, bad=range(100), updates=100)
    assert same(model.state_dict(), before)
    assert (caught.value.step, caught.value.rule, caught.value.layers) == (10, "non_finite_input", ("",))
    for part in ("10 updates before it", "from step 0", "max_skips=10", "the input holds NaN or Inf", "Found so far"):
        assert part in str(caught.value)
    assert watch.history.stat("skip_reason").tolist() == [SkipReason.NON_FINITE] * 10 + [SkipReason.RAISED]
    assert watch.notices == ()


def test_a_good_update_begins_the_count_anew() -> None:
    model = network()
    with watched(model, max_skips=2) as watch:
        train(model, SGD(model.parameters(), lr=0.1), bad=(3, 4, 6, 7, 9))
    assert int(watch.history.stat("skipped").sum()) == 5
    model = network()
    with pytest.raises(NonFiniteGradientError, match="max_skips=2"), watched(model, max_skips=2):
        train(model, SGD(model.parameters(), lr=0.1), bad=(3, 4, 5))


def test_nothing_is_left_out_of_a_healthy_run() -> None:
    model, bare = network(), network()
    optimizer, other = AdamW(model.parameters()), AdamW(bare.parameters())
    with watched(model) as watch:
        train(model, optimizer)
    train(bare, other)
    assert same(model.state_dict(), bare.state_dict())
    assert same(optimizer.state_dict(), other.state_dict())
    assert watch.alerts == ()


def test_an_optimizer_that_evaluates_its_closure_again_is_refused() -> None:
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters())
    with pytest.raises(RuntimeError, match=r"on_nonfinite='skip'.*LBFGS evaluates its closure several times"), watched(model):
        optimizer.step(lambda: model(torch.randn(4, 8)).sum())


# -- buffers -----------------------------------------------------------------------------------------------------------------------


def test_buffers_are_left_as_they_are_where_that_was_asked() -> None:
    model = network()
    with watched(model, restore_buffers=False):
        train(model, SGD(model.parameters(), lr=0.1), bad=(5,))
    assert model[1].running_mean.isnan().any(), "one NaN stays in a running mean for ever"


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.small: Tensor
        self.large: Tensor
        self.none: Tensor | None
        self.register_buffer("small", torch.zeros(3))
        self.register_buffer("large", torch.zeros(FREE + 1))
        self.register_buffer("none", None)


@pytest.mark.parametrize(("wanted", "kept"), [(None, (True, False)), (True, (True, True)), (False, (False, False))], ids=str)
def test_which_buffers_are_kept(wanted: bool | None, kept: tuple[bool, bool]) -> None:
    model = Wide()
    buffers = Buffers([model], wanted)
    assert buffers.nbytes == 4 * (3 * kept[0] + (FREE + 1) * kept[1])
    small = model.small
    model.small.add_(1)
    model.large.add_(1)
    buffers.restore()
    assert (model.small.sum() == 0, model.large.sum() == 0) == kept
    buffers.keep()
    model.small = torch.ones(3)  # assigned, not changed in place
    buffers.restore()
    assert (model.small is small) is kept[0]
    model.none = torch.ones(2)
    buffers.keep()
    model.none += 1
    buffers.restore()
    assert model.none.tolist() == [2.0 - kept[0]] * 2


def test_an_evaluation_between_updates_is_no_part_of_what_is_taken_back() -> None:
    """Running statistics that were worked out anew after the last update are lost with a step that is left out; the last step's are not."""
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    with watched(model):
        train(model, optimizer, updates=3)
        mean = model[1].running_mean.clone()
        model.eval()
        with torch.no_grad():
            model(torch.full((4, 8), 5.0))
        model.train()
        train(model, optimizer, bad=(0,), updates=1)
    assert torch.equal(model[1].running_mean, mean)


@pytest.mark.parametrize("how", ["in place", "replaced", "one element"])
def test_a_gradient_that_goes_bad_between_the_backward_and_the_step(how: str) -> None:
    """As hand-made normalisation does it, `g /= g.norm()`, with a gradient of zero."""
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items() if "running" not in name}
    with watched(model) as watch:
        for _, x, y in batches(1):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            weight = model[3].weight
            assert weight.grad is not None
            if how == "replaced":
                weight.grad = torch.full_like(weight.grad, NAN)
            elif how == "in place":
                weight.grad /= 0 * weight.grad.norm()
            else:
                weight.grad[1, 7] = NAN
            optimizer.step()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items() if "num_batches" not in name)
    assert watch.history.stat("skip_reason").tolist() == [SkipReason.NON_FINITE]


def test_the_gradients_are_there_after_a_step_that_was_left_out() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    with watched(model):
        for _, x, y in batches(1, bad=(0,)):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert all(p.grad is not None and p.grad.isnan().any() for p in model.parameters())


@pytest.mark.parametrize("when", ["loaded", "after the step"])
def test_what_was_done_to_buffers_between_updates_is_not_undone(when: str) -> None:
    model, bare = network(), network()

    def between(module: nn.Module) -> None:
        with torch.no_grad():
            module[1].running_mean.mul_(0.5)  # type: ignore[index, union-attr, operator]

    for one, bad, without in ((model, (3,), ()), (bare, (), (3,))):
        optimizer = SGD(one.parameters(), lr=0.1)
        with watched(one):
            for i, x, y in batches(6, bad):
                if i not in without:
                    optimizer.zero_grad()
                    F.cross_entropy(one(x), y).backward()
                    optimizer.step()
                if (when == "after the step" and i != 3) or (when == "loaded" and i == 2):
                    between(one)
    assert same(model.state_dict(), bare.state_dict())


def test_an_error_that_was_asked_for_leaves_the_buffers_as_they_were() -> None:
    model, bare = network(), network()
    for one, bad, without in ((model, (3,), ()), (bare, (), (3,))):
        optimizer = AdamW(one.parameters())
        with GradWatch(one, console=False, on_nonfinite="raise"):
            for i, x, y in batches(8, bad):
                if i in without:
                    continue
                optimizer.zero_grad()
                F.cross_entropy(one(x), y).backward()
                try:
                    optimizer.step()
                except NonFiniteGradientError:
                    assert i == 3
    assert same(model.state_dict(), bare.state_dict())


def test_an_expanded_buffer_is_left_alone() -> None:
    model = network()
    model.register_buffer("mask", torch.ones(1).expand(16))
    with watched(model) as watch:
        train(model, SGD(model.parameters(), lr=0.1), bad=(2,), updates=5)
    assert watch.notices == ()
    assert watch.history.recorded == 5


class Counts(SGD):
    """Counts its steps wherever somebody may."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        super().__init__(params, lr=0.1)
        self.steps = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.steps += 1
        for group in self.param_groups:
            group["late"] = group.get("late", 0) + 1
            group.setdefault("tensor", torch.zeros(())).add_(1)
            for p in group["params"]:
                self.state[p]["mine"] = self.state[p].get("mine", 0) + 1
        super().step(closure)


def test_counters_go_back_wherever_they_are() -> None:
    model = network()
    optimizer = Counts(model.parameters())
    with watched(model):
        train(model, optimizer, bad=(0, 3), updates=6)
    group = optimizer.param_groups[0]
    assert (optimizer.steps, group["late"], float(group["tensor"])) == (4, 4, 4.0)
    assert {state["mine"] for state in optimizer.state.values()} == {4}


@pytest.mark.parametrize("policy", [{"on_nonfinite": "skip"}, {"on_nonfinite": "raise"}], ids=["skip", "raise"])
def test_a_graph_from_before_the_step_that_is_left_out_still_has_its_backward(policy: dict[str, Any]) -> None:
    """The usual loop of a GAN: the fakes that the critic was trained on are used again for the generator."""
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    critic = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
    steps = {"g": AdamW(generator.parameters(), lr=1e-3), "d": AdamW(critic.parameters(), lr=1e-3)}
    with GradWatch({"g": generator, "d": critic}, console=False, **policy) as watch:
        for i in range(6):
            real = torch.randn(16, 2) * (NAN if i == 3 else 1.0)
            fake = generator(torch.randn(16, 4))
            steps["d"].zero_grad()
            (critic(real).mean() - critic(fake.detach()).mean()).square().backward()
            try:
                steps["d"].step()
            except NonFiniteGradientError:
                assert policy["on_nonfinite"] == "raise"
            steps["g"].zero_grad()
            critic(fake).square().mean().backward()
            steps["g"].step()
    assert watch.history.recorded == 12 - (
        policy["on_nonfinite"] == "raise"
    )  # a step that raised leaves its record open for the next backward
    assert all(torch.isfinite(value).all() for model in (generator, critic) for value in model.state_dict().values())
