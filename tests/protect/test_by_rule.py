"""Acting because a rule says so: before the step of the very update in which it finds something, and until that is over."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from torch.optim import SGD, AdamW

from gradwatch import Finding, GradWatch, History, RuleError, Severity, SkipReason, default_rules
from gradwatch.clip import GlobalNorm
from tests.protect.test_skip import same


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, updates: int = 60, spikes: dict[int, float] | None = None
) -> list[float]:
    """A regression; `spikes`: update -> factor on its loss. Returns the norms of the gradients as they were used."""
    source = torch.Generator().manual_seed(1)
    used = []
    hook = optimizer.register_step_pre_hook(lambda *_: used.append(total(model)))
    for i in range(updates):
        x = torch.randn(32, 8, generator=source)
        optimizer.zero_grad()
        ((model(x) - x[:, :1] + 0.3 * torch.randn(32, 1, generator=source)).square().mean() * (spikes or {}).get(i, 1.0)).backward()
        optimizer.step()
    hook.remove()
    return used


def total(model: nn.Module) -> float:
    return math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))


def watched(model: nn.Module, **options: Any) -> GradWatch:
    return GradWatch(model, **{"console": False, **options})


# -- leaving out -------------------------------------------------------------------------------------------------------------------


def test_a_spike_is_left_out_before_it_moves_a_weight() -> None:
    model = network()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    with watched(model, on_rule={"gradient_spike": "skip"}) as watch:
        train(model, optimizer, spikes={40: 1e4})
    (alert,) = watch.alerts
    assert (alert.rule, alert.step, alert.severity) == ("gradient_spike", 40, Severity.WARNING)
    assert "left out" in alert.message
    assert np.flatnonzero(watch.history.stat("skip_reason") == SkipReason.RULE).tolist() == [40]
    assert all(int(state["step"]) == 59 for state in optimizer.state.values())
    assert "1 update left out by a rule" in watch.summary()


def test_it_goes_on_as_if_the_spike_had_not_been() -> None:
    """The twin is stopped by hand at the same update."""
    model, twin = network(), network()
    with watched(model, on_rule={"gradient_spike": "skip"}):
        train(model, SGD(model.parameters(), lr=0.05, momentum=0.9), spikes={40: 1e4})

    class Skips(SGD):
        steps = 0

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            self.steps += 1
            if self.steps != 41:
                super().step(closure)

    train(twin, Skips(twin.parameters(), lr=0.05, momentum=0.9), spikes={40: 1e4})
    assert same(model.state_dict(), twin.state_dict())


def test_a_run_without_a_spike_keeps_every_bit() -> None:
    model, bare = network(), network()
    with watched(model, on_rule={"gradient_spike": "skip", "exploding_gradient": 1.0}) as watch:
        train(model, AdamW(model.parameters(), lr=1e-2))
    train(bare, AdamW(bare.parameters(), lr=1e-2))
    assert same(model.state_dict(), bare.state_dict())
    assert watch.alerts == watch.notices == ()


def test_what_is_asked_before_a_step_changes_nothing_in_the_record() -> None:
    model, other = network(), network()
    with watched(model, on_rule={"gradient_spike": "skip"}) as watch:
        train(model, AdamW(model.parameters(), lr=1e-2), updates=100)
    with watched(other) as plain:
        train(other, AdamW(other.parameters(), lr=1e-2), updates=100)
    for name in (
        "grad_norm",
        "total_norm",
        "loss",
        "weight_norm",
        "update_ratio",
        "dead_fraction",
        "gain",
        "saturated_fraction",
        "grad_state",
    ):
        np.testing.assert_array_equal(watch.history.stat(name), plain.history.stat(name), err_msg=name)
    one, two = watch.history.baselines.state_dict(), plain.history.baselines.state_dict()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


def test_a_ring_that_is_full_keeps_its_records() -> None:
    from gradwatch import Sampling

    model = network()
    with watched(model, on_rule={"gradient_spike": "skip"}, sampling=Sampling(window=16)) as watch:
        train(model, AdamW(model.parameters(), lr=1e-2), updates=50)
    assert watch.history.steps.tolist() == list(range(34, 50))
    assert (np.diff(watch.history.stat("time")) > 0).all()


def test_too_many_in_a_row_raise_with_the_story() -> None:
    model = network()
    spikes = dict.fromkeys(range(40, 60), 1e4)
    with pytest.raises(RuleError) as caught, watched(model, on_rule={"gradient_spike": "skip"}, max_skips=3) as watch:
        train(model, SGD(model.parameters(), lr=0.01), spikes=spikes)
    for part in ("step 43", "gradient spike", "3 updates before it", "from step 40", "max_skips=3", "not been changed"):
        assert part in str(caught.value)
    assert watch.history.recorded == 44


def test_raise() -> None:
    model = network()
    with (
        pytest.raises(RuleError, match=r"step 40: gradient spike: the gradient norm is"),
        watched(model, on_rule={"gradient_spike": "raise"}),
    ):
        train(model, SGD(model.parameters(), lr=0.01), spikes={40: 1e4})


# -- clipping ----------------------------------------------------------------------------------------------------------------------


def high(history: History) -> Iterator[Finding]:
    """The gradient norm is above 5."""
    norm = float(history.recent("total_norm", 1)[0])
    if norm > 5.0:
        yield Finding("high", Severity.WARNING, history.recorded - 1, message=f"the norm is {norm:.3g}")


high.persistence = 3  # type: ignore[attr-defined]


def test_clipping_begins_with_the_finding_ends_with_the_incident_and_both_are_told() -> None:
    model = network()
    text = io.StringIO()
    console = Console(file=text, width=200)
    spikes = dict.fromkeys((20, 21, 22, 23), 100.0)
    with watched(model, on_rule={"high": 0.5}, rules=[*default_rules(), high], console=console) as watch:
        used = train(model, SGD(model.parameters(), lr=0.01), spikes=spikes)
    (alert,) = (a for a in watch.alerts if a.rule == "high")
    assert (alert.step, alert.last_step, alert.state) == (20, 23, "ended")
    norms, coefs = watch.history.stat("total_norm"), watch.history.stat("clip_coef")
    on = np.array(used) < norms * 0.999
    assert on[20:24].all()
    assert not on[:20].any()
    over = 24 + 2 * high.persistence  # type: ignore[attr-defined]
    assert not on[over:].any()
    assert (coefs[~on] == 1).all()
    np.testing.assert_allclose(used[20:24], 0.5, rtol=1e-4)
    begin, end = watch.notices
    assert "clips from step 20 on, for high: max_norm=0.5" in begin
    assert f"clips no more from step {over} on" in end
    assert "high is over" in end
    shown = text.getvalue()
    assert "gradwatch: clips from step 20 on" in shown
    assert "gradwatch: clips no more" in shown


def test_a_rule_that_is_silent_for_a_while_does_not_switch_it_off_and_on() -> None:
    """Hysteresis: between 20 and 30 the rule finds something in every third update only."""
    model = network()
    with watched(model, on_rule={"high": 0.5}, rules=[high]) as watch:
        train(model, SGD(model.parameters(), lr=0.01), spikes=dict.fromkeys(range(20, 30, 3), 100.0))
    assert len(watch.notices) == 2


def test_beside_a_clipper_that_always_clips() -> None:
    model = network()
    with watched(model, clip=GlobalNorm(2.0), on_rule={"high": 0.1}, rules=[high]) as watch:
        used = train(model, SGD(model.parameters(), lr=0.01), updates=30, spikes={20: 100.0})
    assert max(used[:20]) <= 2.0001
    assert used[20] == pytest.approx(0.1, rel=1e-4)
    assert watch.history.stat("clip_coef")[20] == pytest.approx(0.1 / watch.history.stat("total_norm")[20], rel=1e-3)


def test_a_growth_across_depth_is_clipped_from_the_update_that_shows_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[layer for _ in range(10) for layer in (nn.Linear(24, 24), nn.ReLU())], nn.Linear(24, 1))
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(6.0)
    optimizer = SGD(model.parameters(), lr=1e-12)
    with watched(model, on_rule={"exploding_gradient": 1.0}) as watch:
        for _ in range(20):
            optimizer.zero_grad()
            model(torch.randn(16, 24)).mean().backward()
            optimizer.step()
    coefs = watch.history.stat("clip_coef")
    first = int(np.flatnonzero(coefs < 1)[0])
    assert (coefs[first:] < 1).all()
    (alert,) = (a for a in watch.alerts if a.rule == "exploding_gradient")
    assert first <= 10 + 1
    assert alert.state == "open"


def test_each_spike_is_clipped_though_one_has_been_before() -> None:
    """One that was clipped is no news afterwards only if it is learnt from."""
    model = network()
    with watched(model, on_rule={"gradient_spike": 1.0}) as watch:
        used = train(model, SGD(model.parameters(), lr=0.05), updates=90, spikes={40: 1e4, 60: 1e4, 80: 1e4})
    for i in (40, 60, 80):
        assert used[i] == pytest.approx(1.0, rel=1e-3)
    assert [alert.step for alert in watch.alerts if alert.rule == "gradient_spike"] == [40, 60, 80]
    assert used[85] < 5


def test_a_spike_is_told_and_left_out_though_a_nan_was_left_out_right_before() -> None:
    model = network()
    spikes = {40: math.nan, 42: 1e4, 50: 1e4}
    with watched(model, on_nonfinite="skip", on_rule={"gradient_spike": "skip"}) as watch:
        train(model, SGD(model.parameters(), lr=0.05), spikes=spikes)
    assert np.flatnonzero(watch.history.stat("skipped")).tolist() == [40, 42, 50]
    assert [a.step for a in watch.alerts if a.rule == "gradient_spike"] == [42, 50]


def test_what_is_out_of_scope_is_not_acted_on() -> None:
    from gradwatch import Sampling

    def spike(history: History) -> Iterator[Finding]:
        yield Finding("spike", Severity.WARNING, history.recorded - 1, layers=("0",), message="always")

    model, bare = network(), network()
    with watched(model, on_rule={"spike": "skip"}, rules=[spike], sampling=Sampling(exclude=("0",))) as watch:
        train(model, SGD(model.parameters(), lr=0.05), updates=5)
    train(bare, SGD(bare.parameters(), lr=0.05), updates=5)
    assert same(model.state_dict(), bare.state_dict())
    assert watch.alerts == ()


def test_what_one_model_suffers_from_clips_no_other() -> None:
    models = {"a": network(), "b": network()}
    optimizers = {key: SGD(model.parameters(), lr=0.01) for key, model in models.items()}
    source = torch.Generator().manual_seed(1)
    with watched(models, on_rule={"gradient_spike": 1e-3}) as watch:  # type: ignore[arg-type]
        for i in range(80):
            key = "ab"[i % 2]
            x = torch.randn(32, 8, generator=source)
            optimizers[key].zero_grad()
            (models[key](x).square().mean() * (1e5 if i == 60 else 1.0)).backward()
            optimizers[key].step()
    assert np.flatnonzero(watch.history.stat("clip_coef") < 1)[0] == 60
    assert (watch.history.stat("clip_coef")[1::2] == 1).all()


# -- what is refused ---------------------------------------------------------------------------------------------------------------


def broken(history: History) -> Iterator[Finding]:
    raise ValueError("no")
    yield


def test_a_rule_that_raises_is_asked_no_more_and_the_training_goes_on() -> None:
    model = network()
    with watched(model, on_rule={"broken": "skip"}, rules=[broken]) as watch:
        train(model, SGD(model.parameters(), lr=0.01), updates=5)
    assert watch.history.recorded == 5
    assert len(watch.notices) == 3
    assert "raised before a step and is not asked there any more" in watch.notices[0]
    assert "nothing is done for broken any more" in watch.notices[1]


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        pytest.param({"spike": "skip"}, ValueError, r"no rule 'spike' is in use; there are non_finite_input, ", id="no-such-rule"),
        pytest.param({"gradient_spike": "drop"}, ValueError, r"unknown reaction; it needs 'skip'", id="no-such-reaction"),
        pytest.param({"gradient_spike": None}, ValueError, r"unknown reaction", id="none"),
        pytest.param({"gradient_spike": -1.0}, ValueError, r"on_rule=-1\.0.*above 0", id="negative"),
        pytest.param({"gradient_spike": GlobalNorm}, TypeError, r"the class GlobalNorm", id="class"),
        pytest.param(["gradient_spike"], TypeError, r"got list; it needs a mapping", id="list"),
    ],
)
def test_bad_reactions(given: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        GradWatch(network(), on_rule=given)


@pytest.mark.parametrize(
    ("given", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError), ("2", TypeError)], ids=str
)
def test_bad_limits(given: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"GradWatch\(max_skips="):
        GradWatch(network(), max_skips=given)


def test_bad_buffers() -> None:
    with pytest.raises(TypeError, match=r"restore_buffers='yes'.*True, False, or None"):
        GradWatch(network(), restore_buffers="yes")  # type: ignore[arg-type]
