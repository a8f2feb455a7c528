"""A watch that keeps good states, and one that goes on from a checkpoint."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from gradwatch import GradWatch, Sampling, Severity
from gradwatch.clip import AutoClip, MedianScaled, ZClip
from gradwatch.records import STATISTICS
from tests.protect.test_skip import same


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 1))


def batch(i: int) -> Tensor:
    return torch.randn(32, 8, generator=torch.Generator().manual_seed(i))


def update(model: nn.Module, optimizer: Optimizer, i: int, factor: float = 1.0) -> float:
    x = batch(i)
    optimizer.zero_grad()
    loss = (model(x) - x[:, :1]).square().mean() * factor
    loss.backward()
    optimizer.step()
    return loss.item()


def watched(model: nn.Module, **options: Any) -> GradWatch:
    return GradWatch(model, **{"console": False, **options})


def state_of(model: nn.Module, optimizer: Optimizer, *more: Any) -> list[Any]:
    return [model.state_dict(), optimizer.state_dict(), torch.get_rng_state(), *[one.state_dict() for one in more]]


def frozen(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {key: frozen(value) for key, value in state.items()}
    return [frozen(one) for one in state] if isinstance(state, list) else state


# -- rollback ----------------------------------------------------------------------------------------------------------------------


def test_it_goes_back_to_the_very_state_between_two_updates_scheduler_scaler_and_random_numbers_included() -> None:
    model = network()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)

    def step(i: int) -> None:
        x = batch(i)
        optimizer.zero_grad()
        scaler.scale((model(x) - x[:, :1]).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()

    with watched(model, keep_good=10, keep_also=scheduler) as watch:
        states = []
        for i in range(27):
            states.append(frozen(state_of(model, optimizer, scheduler, scaler)))
            step(i)
        first = [p.detach().clone() for p in model.parameters()]
        assert watch.rollback() == 20
        assert same(state_of(model, optimizer, scheduler, scaler), states[20])
        assert watch.history.recorded == 20
        assert all(p.grad is None for p in model.parameters())
        for i in range(20, 27):
            step(i)
        assert watch.history.recorded == 27
    assert all(map(torch.equal, first, model.parameters()))
    assert watch.history.steps.tolist() == list(range(27))
    assert watch.notices == ("went back from step 27 to step 20.",)


def test_keeping_changes_no_bit() -> None:
    model, bare = network(), network()
    optimizer, other = AdamW(model.parameters()), AdamW(bare.parameters())
    torch.manual_seed(1)
    with watched(model, keep_good=1) as watch:
        for i in range(30):
            update(model, optimizer, i)
    torch.manual_seed(1)
    for i in range(30):
        update(bare, other, i)
    assert same(state_of(model, optimizer), state_of(bare, other))
    assert watch.notices == watch.alerts == ()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_training_that_diverges_goes_back_and_goes_on_with_a_lower_lr() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = SGD(model.parameters(), lr=0.05)
    text = io.StringIO()
    with watched(model, keep_good=5, console=Console(file=text, width=200)) as watch:
        losses = []
        i = backs = 0
        while i < 80:
            if i == 30 and not backs:
                optimizer.param_groups[0]["lr"] = 30.0
            losses.append(update(model, optimizer, i))
            i += 1
            if any(a.severity == Severity.ERROR and a.state == "open" for a in watch.alerts):
                before = min(a.step for a in watch.alerts if a.severity == Severity.ERROR and a.state == "open")
                i = watch.rollback()
                backs += 1
                assert i <= max(before, 1)
                assert all(torch.isfinite(p).all() for p in model.parameters())
                optimizer.param_groups[0]["lr"] = 0.05
    assert backs == 1
    assert max(losses) > 100 or not all(map(math.isfinite, losses))
    assert losses[-1] < 0.3 < losses[0]
    assert "went back from step" in text.getvalue()
    assert [a for a in watch.alerts if a.state == "open" and a.severity >= Severity.WARNING] == []


def test_no_state_is_kept_while_an_error_is_open_nor_of_an_update_that_was_left_out() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    with watched(model, keep_good=1, on_nonfinite="skip", max_skips=50) as watch:
        for i in range(12):
            update(model, optimizer, i)
        for i in range(12, 20):
            update(model, optimizer, i, factor=math.nan)
        assert watch._keeping is not None
        assert watch._keeping.steps == (11, 12)


def test_a_model_that_is_called_by_its_parts_or_compiled_is_kept_when_the_step_returns() -> None:
    model = network()
    optimizer = AdamW(model.parameters())
    with watched(model, keep_good=4) as watch:
        for i in range(10):
            x = batch(i)
            optimizer.zero_grad()
            for part in model:
                x = part(x)
            x.square().mean().backward()
            optimizer.step()
            if i == 7:
                kept = frozen([model.state_dict(), optimizer.state_dict()])
        assert watch.rollback() == 8
        assert same([model.state_dict(), optimizer.state_dict()], kept)


def test_an_update_that_is_under_way_is_given_up() -> None:
    model = network()
    optimizer = AdamW(model.parameters())
    with watched(model, keep_good=4) as watch:
        for i in range(10):
            update(model, optimizer, i)
        model(batch(10)).mean().backward()
        assert watch.rollback() == 8
        for i in range(8, 12):
            update(model, optimizer, i)
        assert watch.history.recorded == 12
        assert (watch.history.stat("backward_calls") == 1).all()
    assert watch.alerts == ()


@pytest.mark.parametrize(
    ("options", "says"),
    [({}, r"no states are kept; say how often by GradWatch\(model, keep_good=100\)"), ({"keep_good": 5}, "none has been kept yet")],
    ids=["not-asked", "too-early"],
)
def test_where_there_is_nothing_to_go_back_to(options: Any, says: str) -> None:
    model = network()
    with watched(model, **options) as watch, pytest.raises(RuntimeError, match=says):
        watch.rollback()
    with pytest.raises(RuntimeError, match="not attached"):
        watch.rollback()


def test_inside_a_step_it_is_refused() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    with watched(model, keep_good=1) as watch:
        update(model, optimizer, 0)
        update(model, optimizer, 1)
        with pytest.raises(RuntimeError, match="a step is under way"):
            optimizer.step(lambda: watch.rollback())
        assert watch.rollback() == 1, "that of the second update would have been kept before the next forward pass"


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"keep_good": 0}, ValueError, r"keep_good=0\): needs at least 1"),
        ({"keep_good": 1.5}, TypeError, r"keep_good=1\.5\): got float"),
        ({"keep_good": True}, TypeError, r"got bool"),
        ({"keep_good": 5, "keep_also": 3}, TypeError, r"keep_also=\.\.\.\): got 3 \(int\)"),
        ({"keep_also": torch.optim.lr_scheduler.StepLR(SGD(network().parameters(), lr=1.0), 1)}, ValueError, "no state is kept"),
    ],
    ids=["zero", "float", "bool", "no-state", "also-without-good"],
)
def test_bad_options(options: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        watched(network(), **options)


def test_what_had_ended_before_is_not_told_again() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    text = io.StringIO()
    with watched(model, keep_good=10, on_nonfinite="skip", console=Console(file=text, width=300)) as watch:
        for i in range(40):
            update(model, optimizer, i, factor=math.nan if i == 15 else 1.0)
        assert watch.rollback() == 40 - 10
        watch.rollback()
        for i in range(30, 45):
            update(model, optimizer, i)
    told = [line for line in text.getvalue().splitlines() if "NaN or Inf in the loss" in line]
    assert len(told) == 3, "when it began, when it ended, and in the verdict"


def gan() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "g": nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)),
        "d": nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)),
    }


def iteration(models: dict[str, nn.Module], steps: dict[str, Optimizer], i: int) -> None:
    """One of a GAN: the step of the discriminator, then that of the generator, whose gradient goes through both."""
    source = torch.Generator().manual_seed(i)
    fake = models["g"](torch.randn(16, 4, generator=source))
    steps["d"].zero_grad()
    (models["d"](torch.randn(16, 2, generator=source)).mean() - models["d"](fake.detach()).mean()).square().backward()
    steps["d"].step()
    steps["g"].zero_grad()
    models["d"](fake).square().mean().backward()
    steps["g"].step()


def test_of_optimizers_that_step_in_turns_it_goes_back_to_where_the_first_is_next() -> None:
    models = gan()
    steps = {key: AdamW(model.parameters(), lr=1e-2) for key, model in models.items()}
    with watched(models, keep_good=10) as watch:  # type: ignore[arg-type]
        states = {}
        for i in range(23):
            states[2 * i] = frozen([*(m.state_dict() for m in models.values()), *(o.state_dict() for o in steps.values())])
            iteration(models, steps, i)
        back = watch.rollback()
        assert back % 2 == 0
        assert back >= 30
        assert same([*(m.state_dict() for m in models.values()), *(o.state_dict() for o in steps.values())], states[back])
        for i in range(back // 2, 25):
            iteration(models, steps, i)
    assert watch.history.recorded == 50


def test_an_optimizer_that_has_stopped_stepping_is_waited_for_no_more() -> None:
    models = gan()
    steps = {key: AdamW(model.parameters(), lr=1e-2) for key, model in models.items()}
    with watched(models, keep_good=10) as watch:  # type: ignore[arg-type]
        for i in range(3):
            iteration(models, steps, i)
        for _ in range(150):
            steps["d"].zero_grad()
            models["d"](torch.randn(8, 2)).square().mean().backward()
            steps["d"].step()
        assert watch.rollback() > 130


def test_a_checkpoint_of_a_gan_holds_the_last_record() -> None:
    def fresh() -> tuple[dict[str, nn.Module], dict[str, Optimizer]]:
        models = gan()
        return models, {key: AdamW(model.parameters(), lr=1e-2) for key, model in models.items()}

    models, steps = fresh()
    with watched(models) as whole:  # type: ignore[arg-type]
        for i in range(60):
            iteration(models, steps, i)
            if i == 39:
                state = frozen(whole.state_dict())
                kept = frozen([*(m.state_dict() for m in models.values()), *(o.state_dict() for o in steps.values())])
    other, others = fresh()
    for one, value in zip((*other.values(), *others.values()), kept, strict=True):
        one.load_state_dict(value)
    again = watched(other)  # type: ignore[arg-type]
    again.load_state_dict(state)
    assert again.history.recorded == 80
    with again:
        for i in range(40, 60):
            iteration(other, others, i)
    for name in STATISTICS:
        if name != "time":
            np.testing.assert_array_equal(whole.history.stat(name), again.history.stat(name), err_msg=name)


def test_buffers_that_were_given_up_do_not_come_back_with_a_step_that_is_left_out() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    with watched(model, keep_good=10, on_nonfinite="skip") as watch:
        for i in range(27):
            update(model, optimizer, i)
        assert watch.rollback() == 20
        kept = frozen(model.state_dict())
        update(model, optimizer, 20, factor=math.nan)
        assert same(model.state_dict(), kept)


# -- going on from a checkpoint ----------------------------------------------------------------------------------------------------


def run(model: nn.Module, optimizer: Optimizer, watch: GradWatch, start: int, stop: int, factor: Callable[[int], float]) -> None:
    with watch:
        for i in range(start, stop):
            torch.manual_seed(i)
            update(model, optimizer, i, factor(i))


@pytest.mark.parametrize("half", [7, 40, 75, 93])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip": AutoClip(50.0, window=20)},
        {"clip": ZClip(warmup=10)},
        {"clip": MedianScaled(1.2, window=20), "on_rule": {"gradient_spike": "skip"}, "on_nonfinite": "skip"},
    ],
    ids=["plain", "autoclip", "zclip", "by-rule"],
)
def test_twice_n_updates_are_n_a_checkpoint_and_n(options: dict[str, Any], half: int) -> None:
    def factor(i: int) -> float:
        return {30: math.nan if "on_nonfinite" in options else 1.0, 85: 1e4}.get(i, 1.0)

    def fresh() -> tuple[nn.Module, Optimizer, GradWatch]:
        import copy

        model = network()
        return (
            model,
            AdamW(model.parameters(), lr=3e-3),
            watched(model, sampling=Sampling(dense=16, every=7), **copy.deepcopy(options)),
        )

    model, optimizer, whole = fresh()
    run(model, optimizer, whole, 0, 100, factor)
    other, stepper, first = fresh()
    run(other, stepper, first, 0, half, factor)
    file = io.BytesIO()
    torch.save({"model": other.state_dict(), "optimizer": stepper.state_dict(), "watch": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    third, again, second = fresh()
    third.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    second.load_state_dict(saved["watch"])
    run(third, again, second, half, 100, factor)
    assert same(model.state_dict(), third.state_dict())
    assert same(optimizer.state_dict()["state"], again.state_dict()["state"])
    for name in STATISTICS:
        if name != "time":
            np.testing.assert_array_equal(whole.history.stat(name), second.history.stat(name), err_msg=name)
    assert whole.alerts == second.alerts
    ours, theirs = whole.history.baselines.state_dict(), second.history.baselines.state_dict()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
