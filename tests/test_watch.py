"""`GradWatch` itself: what it keeps, saves and says, and what happens when it is called from inside itself."""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import logging
import math
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rich
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from gradwatch import Finding, GradWatch, History, NonFiniteGradientError, Sampling, Severity, SkipReason, StepRecord
from gradwatch.checkpoint import decode
from gradwatch.records import STATISTICS
from gradwatch.watch import MAX_NOTICES


def network(width: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))


def train(model: nn.Module, optimizer: Optimizer, updates: int, start: int = 0) -> None:
    for i in range(start, start + updates):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def early(history: History) -> Iterator[Finding]:
    """Sees something from record 3 to 7."""
    if 3 <= history.recorded - 1 <= 7:
        yield Finding("early", Severity.WARNING, 3, layers=("0",), message="something", evidence={"n": float(history.recorded)})


def quiet(model: Any, **options: Any) -> GradWatch:
    return GradWatch(model, console=False, **options)


# -- saving and loading ------------------------------------------------------------------------------------------------------------


def through_a_file(state: Any) -> Any:
    """`torch.save` and `torch.load`."""
    buffer = io.BytesIO()
    torch.save({"watch": state}, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)["watch"]


@pytest.mark.parametrize("cut", [0, 1, 5, 12], ids="after-{}".format)
@pytest.mark.parametrize("window", [512, 4], ids="window-{}".format)
def test_a_run_that_is_resumed_has_the_history_of_one_that_was_not_interrupted(cut: int, window: int) -> None:
    sampling = Sampling(window=window, dense=1000)
    whole = network()
    with quiet(whole, rules=[early], sampling=sampling) as expected:
        train(whole, Adam(whole.parameters()), 15)

    model = network()
    optimizer = Adam(model.parameters())
    with quiet(model, rules=[early], sampling=sampling) as first:
        train(model, optimizer, cut)
        state = through_a_file(first.state_dict())
    resumed = quiet(model, rules=[early], sampling=sampling)
    resumed.load_state_dict(state)
    assert resumed.history.recorded == cut
    with resumed:
        train(model, optimizer, 15 - cut, start=cut)
    assert resumed.history.recorded == 15
    assert resumed.history.steps.tolist() == expected.history.steps.tolist()
    for name in STATISTICS:
        if name != "time":
            np.testing.assert_array_equal(resumed.history.stat(name), expected.history.stat(name), err_msg=name)
    assert (np.diff(resumed.history.stat("time")) > 0).all(), "time goes on, it does not start again"
    assert resumed.alerts == expected.alerts


def test_an_incident_that_was_open_goes_on_and_ends_once() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    sent: list[tuple[str, int]] = []
    with quiet(model, rules=[early], on_alert=lambda alert: sent.append((alert.state, alert.step))) as first:
        train(model, optimizer, 6)
        state = through_a_file(first.state_dict())
    assert sent[0] == ("open", 3)
    sent.clear()
    with quiet(model, rules=[early], on_alert=lambda alert: sent.append((alert.state, alert.step))) as second:
        second.load_state_dict(state)
        train(model, optimizer, 60)
    assert [state for state, _ in sent] == ["ended"]
    (alert,) = second.alerts
    assert (alert.step, alert.last_step, alert.count, alert.state) == (3, 7, 5, "ended")


def test_asking_for_the_state_changes_nothing_and_what_comes_later_does_not_change_it() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    with quiet(model, rules=[early]) as watch:
        train(model, optimizer, 6)
        state, again = watch.state_dict(), watch.state_dict()
        np.testing.assert_equal(decode(state), decode(again))
        kept = copy.deepcopy(state)
        train(model, optimizer, 6)
    np.testing.assert_equal(decode(state), decode(kept))


def test_a_state_is_loaded_by_name_into_a_model_that_has_changed() -> None:
    model = network()
    with quiet(model, rules=()) as first:
        train(model, SGD(model.parameters(), lr=0.01), 3)
    larger = nn.Sequential(*network(), nn.Linear(1, 1))
    second = quiet(larger, rules=())
    second.load_state_dict(first.state_dict())
    history = second.history
    assert history.parameters == ("0.weight", "0.bias", "2.weight", "2.bias", "3.weight", "3.bias")
    np.testing.assert_array_equal(history.stat("grad_norm")[:, :4], first.history.stat("grad_norm"))
    assert np.isnan(history.stat("grad_norm")[:, 4:]).all()
    with second:
        train(larger, SGD(larger.parameters(), lr=0.01), 2)
    assert history.recorded == 5


def test_a_state_may_be_loaded_inside_the_block() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    with quiet(model, rules=()) as first:
        train(model, optimizer, 3)
    told: list[int] = []
    with quiet(model, rules=(), on_step=lambda record: told.append(record.step)) as second:
        second.load_state_dict(first.state_dict())
        train(model, optimizer, 2)
    assert told == [3, 4]
    assert second.history.steps.tolist() == [0, 1, 2, 3, 4]
    assert second.notices == ()


def test_a_state_of_another_layout_is_refused_and_leaves_what_is_there() -> None:
    model = network()
    with quiet(model, rules=[early]) as watch:
        train(model, SGD(model.parameters(), lr=0.01), 4)
        state = watch.state_dict()
        state["history"] = {**state["history"], "schema": 99}
        with pytest.raises(ValueError, match="schema 99"):
            watch.load_state_dict(state)
        train(model, SGD(model.parameters(), lr=0.01), 1)
    assert watch.history.recorded == 5
    assert [alert.rule for alert in watch.alerts] == ["early"]


def test_a_rule_that_was_off_in_the_saved_run_silences_no_other_rule() -> None:
    def broken(history: History) -> Iterator[Finding]:
        raise LookupError("no")

    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    with quiet(model, rules=[broken]) as first:
        train(model, optimizer, 2)
    with quiet(model, rules=[early]) as second:
        second.load_state_dict(first.state_dict())
        train(model, optimizer, 4)
    assert [alert.rule for alert in second.alerts] == ["early"]


# -- what it holds -----------------------------------------------------------------------------------------------------------------


def test_before_it_is_attached_it_keeps_its_model_and_afterwards_not() -> None:
    watch = quiet(network())
    gc.collect()
    with watch:
        pass
    gc.collect()
    with pytest.raises(RuntimeError, match="no longer exists"):
        watch.attach()


def test_after_the_block_it_holds_neither_model_nor_optimizer_nor_gradient() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9)
    with quiet(model) as watch:
        train(model, optimizer, 3)
    refs = [weakref.ref(thing) for thing in (model, optimizer, model[0].weight, model[0].weight.grad)]
    del model, optimizer
    gc.collect()
    assert [ref() for ref in refs] == [None] * 4
    assert watch.history.recorded == 3


def test_what_was_found_can_be_read_when_the_model_is_gone() -> None:
    model = network()
    with quiet(model, rules=[early]) as watch:
        train(model, SGD(model.parameters(), lr=0.01), 5)
    del model
    gc.collect()
    assert watch.history.layers == ("", "0", "1", "2")
    assert len(watch.alerts) == 1
    assert "0" in watch.summary()
    assert "2.weight" in watch.history.parameters
    assert isinstance(watch.state_dict(), dict)
    assert "5 updates" in repr(watch)
    Console(file=io.StringIO()).print(watch)


def test_nobody_holds_the_watch() -> None:
    model = network()
    watch = quiet(model, on_step=lambda record: None)
    with watch:
        train(model, SGD(model.parameters(), lr=0.01), 2)
    ref = weakref.ref(watch)
    del watch
    assert ref() is None, "no cycle either: it does not wait for the collector"


def test_a_mapping_is_taken_as_it_was() -> None:
    models: dict[str, nn.Module] = {"a": network(), "b": network()}
    watch = quiet(models)
    models["c"] = network()
    del models["a"]
    with watch:
        assert watch.history.layers[0] == "a"
        assert not any(name.startswith("c") for name in watch.history.layers)


def test_making_one_attaches_nothing_and_the_layout_is_there() -> None:
    original = torch.autograd.backward
    watch = quiet(network())
    assert torch.autograd.backward is original
    assert watch.history.parameters == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert len(watch.history) == 0
    assert watch.alerts == ()
    assert torch.autograd.backward is original


# -- the block ---------------------------------------------------------------------------------------------------------------------


def test_the_block_swallows_no_exception() -> None:
    with pytest.raises(ZeroDivisionError), quiet(network()):
        1 / 0  # noqa: B018


def test_a_block_inside_itself_is_an_error_that_leaves_the_outer_one() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    with quiet(model, rules=()) as watch:
        train(model, optimizer, 1)
        with pytest.raises(RuntimeError, match="attached already"), watch:
            pytest.fail("entered")
        train(model, optimizer, 2)
    assert watch.history.recorded == 3
    watch.detach()
    watch.detach()
    assert watch.history.recorded == 3


def test_what_happens_outside_of_the_block_is_not_recorded() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    watch = quiet(model, rules=())
    for _ in range(3):
        train(model, optimizer, 2)
        with watch:
            train(model, optimizer, 1)
    assert watch.history.recorded == 3
    assert (np.diff(watch.history.stat("time")) > 0).all()


def test_saying_that_an_update_is_over_is_no_second_record_where_it_was_seen() -> None:
    """`watch.step()` in a loop whose `optimizer.step()` is seen after all: there is no update at hand to close."""
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    with quiet(model, rules=()) as watch:
        for _ in range(4):
            train(model, optimizer, 1)
            watch.step()
    assert watch.history.recorded == 4
    assert watch.history.stat("backward_calls").tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ("updates", "text"),
    [
        pytest.param(0, r"<GradWatch {}, 0 updates, 0 incidents>", id="nothing"),
        pytest.param(1, r"<GradWatch {}, 1 updates?, 0 incidents>", id="one"),
        pytest.param(4, r"<GradWatch {}, 4 updates, 1 incidents?>", id="one-incident"),
    ],
)
def test_its_repr_says_how_it_stands(updates: int, text: str) -> None:
    model = network()
    watch = quiet(model, rules=[early])
    assert repr(watch) == "<GradWatch detached, 0 updates, 0 incidents>"
    with watch:
        train(model, SGD(model.parameters(), lr=0.01), updates)
        assert re.fullmatch(text.format("attached"), repr(watch))
    assert re.fullmatch(text.format("detached"), repr(watch))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        pytest.param(ValueError("no"), "▲ gradwatch: stopped by ValueError after 12 updates, nothing found before;", id="error"),
        pytest.param(KeyboardInterrupt(), "▲ gradwatch: stopped by KeyboardInterrupt after 12 updates", id="ctrl-c"),
        pytest.param(SystemExit(2), r"▲ gradwatch: stopped by sys\.exit\(2\) after 12 updates", id="exit-with-an-error"),
        pytest.param(SystemExit(0), "✓ gradwatch: healthy after 12 updates", id="exit"),
        pytest.param(SystemExit(None), "✓ gradwatch: healthy after 12 updates", id="bare-exit"),
        pytest.param(GeneratorExit(), "✓ gradwatch: healthy after 12 updates", id="generator-closed"),
    ],
)
def test_a_block_left_by_an_exception_is_not_called_healthy(
    error: BaseException, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    model = network()
    watch = GradWatch(model)

    def run() -> None:
        with watch:
            train(model, SGD(model.parameters(), lr=0.01), 12)
            raise error

    with pytest.raises(type(error)):
        run()
    assert re.match(said, capfd.readouterr().err)
    assert ("stopped by" in watch.summary()) == ("stopped by" in said)


def test_a_block_entered_again_after_an_exception_forgets_it(capfd: pytest.CaptureFixture[str]) -> None:
    model = network()
    watch = GradWatch(model)
    with pytest.raises(ValueError, match="no"), watch:
        raise ValueError("no")
    assert capfd.readouterr().err == "▲ gradwatch: stopped by ValueError, no update was seen, so nothing was judged\n"
    with watch:
        assert "stopped" not in watch.summary()
        train(model, SGD(model.parameters(), lr=0.01), 12)
    assert capfd.readouterr().err.startswith("✓ gradwatch: healthy after 12 updates")


def test_a_process_that_ends_by_an_exception_under_an_attached_watch_is_not_called_healthy(tmp_path: Path) -> None:
    script = """
import torch
from gradwatch import GradWatch

def main():
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    GradWatch.attach(watch := GradWatch(model))
    for i in range(12):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
    1 / 0

main()
"""
    (tmp_path / "train.py").write_text(script, encoding="utf-8")
    env = os.environ | {"PYTHONIOENCODING": "utf-8"}
    ended = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, env=env, capture_output=True, encoding="utf-8")
    assert "\n▲ gradwatch: stopped by ZeroDivisionError after 12 updates" in ended.stderr, ended.stderr


def test_a_watch_that_was_never_attached_can_be_asked_anything() -> None:
    watch = quiet(network())
    gc.collect()
    assert repr(watch) == "<GradWatch detached, 0 updates, 0 incidents>"
    assert watch.summary().startswith("! gradwatch: it was never attached, so nothing was judged\n")
    assert watch.summary().count("not seen") == 2
    assert (watch.alerts, watch.notices, len(watch.history)) == ((), (), 0)
    watch.detach()


def test_asking_before_attaching_starts_no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    watch = quiet(model, rules=())
    now = iter(range(100))
    monkeypatch.setattr("gradwatch.watch.time.perf_counter", lambda: float(next(now)))
    assert len(watch.history) == 0
    for _ in range(50):
        next(now)
    with watch:
        train(model, SGD(model.parameters(), lr=0.01), 1)
    assert watch.history.stat("time")[0] < 50


def test_the_layout_can_be_asked_where_the_optimizer_is_the_wrong_one() -> None:
    watch = quiet(network(), optimizer=SGD(network().parameters(), lr=0.1))
    for _ in range(2):
        assert len(watch.history.parameters) == 4
        assert "nothing was judged" in watch.summary()
        with pytest.raises(ValueError, match="does not own"):
            watch.attach()
        assert repr(watch) == "<GradWatch detached, 0 updates, 0 incidents>"


# -- what it shows -----------------------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Layers whose names look like markup."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("[red]q[/red]", nn.Linear(4, 4))
        self.add_module("[/]", nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        """One after the other."""
        for module in self.children():
            x = module(x)
        return x


@pytest.mark.parametrize("updates", [0, 1, 30])
@pytest.mark.parametrize("make", [network, Odd], ids=["plain", "odd-names"])
def test_rich_prints_a_table_of_the_layers(make: Callable[[], nn.Module], updates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = make(), io.StringIO()
    monkeypatch.setattr(rich, "_console", Console(file=out, width=100))
    with quiet(model) as watch:
        train(model, SGD(model.parameters(), lr=0.01), updates)
        rich.print(watch)
    rich.print(watch)
    shown = out.getvalue()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and updates:
            assert shown.count(name) >= 2, shown
    assert max(map(len, shown.splitlines())) <= 100
    assert watch.notices == ()


# -- what it says about itself -----------------------------------------------------------------------------------------------------


def test_a_notice_is_given_once_to_the_logger_and_kept(caplog: pytest.LogCaptureFixture) -> None:
    watch = quiet(network())
    with caplog.at_level(logging.INFO, "gradwatch"):
        for text in ("one", "two", "one", "one 100% {x} %s", "two"):
            watch._notice(text)
    assert watch.notices == ("one", "two", "one 100% {x} %s")
    assert [record.getMessage() for record in caplog.records] == list(watch.notices)
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
    assert isinstance(watch.notices, tuple)


def test_notices_are_bounded() -> None:
    watch = quiet(network())
    for i in range(3 * MAX_NOTICES):
        watch._notice(f"notice {i}")
    assert watch.notices == tuple(f"notice {i}" for i in range(MAX_NOTICES))


def test_notices_do_not_reach_standard_error_by_themselves(capfd: pytest.CaptureFixture[str]) -> None:
    """The logger has a NullHandler: Python's handler of last resort would print to stderr."""
    handlers = logging.getLogger().handlers[:]
    logging.getLogger().handlers.clear()
    try:
        quiet(network())._notice("a word about myself")
    finally:
        logging.getLogger().handlers[:] = handlers
    assert capfd.readouterr().err == ""


# -- called from inside itself -----------------------------------------------------------------------------------------------------


def other_training(_: object) -> None:
    """A training of another model, as a sink that evaluates something may do."""
    torch_state = torch.get_rng_state()
    other = nn.Linear(2, 1)
    optimizer = SGD(other.parameters(), lr=0.1)
    other(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.set_rng_state(torch_state)


def raised(_: object) -> None:
    """A sink of the user's that fails."""
    raise LookupError("the user's own mistake")


INSIDE: dict[str, Callable[[GradWatch], Callable[[Any], object]]] = {
    "history": lambda watch: lambda _: watch.history.stat("grad_norm"),
    "alerts": lambda watch: lambda _: watch.alerts,
    "summary": lambda watch: lambda _: watch.summary(),
    "state": lambda watch: lambda _: watch.state_dict(),
    "repr": lambda watch: lambda _: repr(watch),
    "loss": lambda watch: lambda _: watch.loss(1.0),
    "other-training": lambda watch: other_training,
    "raises": lambda watch: raised,
    "another-watch": lambda watch: lambda _: train_watched(),
}


def train_watched() -> None:
    """Another watch, from beginning to end."""
    model = network()
    with quiet(model, rules=()) as watch:
        train(model, SGD(model.parameters(), lr=0.01), 2)
    assert watch.history.recorded == 2


@pytest.mark.parametrize("inside", INSIDE.values(), ids=INSIDE)
@pytest.mark.parametrize("sink", ["on_step", "on_alert", "rules"])
def test_a_sink_may_ask_the_watch_anything(sink: str, inside: Callable[[GradWatch], Callable[[Any], object]]) -> None:
    bare = network()
    train(bare, SGD(bare.parameters(), lr=0.01), 10)
    model, watches, calls = network(), [], []

    def call(thing: Any) -> Iterator[Finding]:
        calls.append(1)
        inside(watches[0])(thing)
        return iter(())

    options: dict[str, Any] = {"rules": [early]}
    options[sink] = [early, call] if sink == "rules" else [call]
    with quiet(model, **options) as watch:
        watches.append(watch)
        train(model, SGD(model.parameters(), lr=0.01), 10)
    watches.clear()
    assert calls
    history = watch.history
    assert history.steps.tolist() == list(range(10))
    assert [alert.rule for alert in watch.alerts] == ["early"]
    assert len(watch.notices) == (1 if inside is INSIDE["raises"] else 0), watch.notices
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), bare.parameters(), strict=True))


def test_records_that_sinks_get_are_their_own() -> None:
    records: list[StepRecord] = []

    def spoil(record: StepRecord) -> None:
        for value in record.stats.values():
            if isinstance(value, np.ndarray):
                value[:] = 0

    model = network()
    with quiet(model, on_step=[spoil, records.append], rules=()) as watch:
        train(model, SGD(model.parameters(), lr=0.01), 3)
    assert (watch.history.stat("grad_norm") > 0).all()
    assert (records[0].stats["grad_norm"] > 0).all(), "what one sink does to its record is not the next one's"
    assert [record.step for record in records] == [0, 1, 2]
    with pytest.raises(dataclasses.FrozenInstanceError):
        records[0].step = 5  # type: ignore[misc]


# -- default rules under extreme numbers -------------------------------------------------------------------------------------------

factors = st.one_of(st.floats(1e-3, 1e3), st.sampled_from([0.0, 1e-44, 1e-30, 1e-20, 1e15, 1e30, 1e38, math.inf, math.nan, -1.0]))


@pytest.mark.parametrize("numpy", [{}, {"all": "raise"}], ids=["as-ever", "numpy-raises"])
@settings(max_examples=30, deadline=None)
@given(st.sampled_from([1, 5]), st.lists(factors, min_size=12, max_size=25))
@example(5, [1.0] * 9 + [1e38] + [1.0] * 5)
def test_no_number_upsets_the_rules_or_warns(numpy: dict[str, Any], depth: int, scales: list[float]) -> None:
    """People run with warnings as errors, and some let numpy raise what it says nothing about."""
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(4, 4), nn.Tanh())), nn.Linear(4, 1))
    optimizer = SGD(model.parameters(), lr=1e-4)
    x = torch.randn(8, 4)
    with np.errstate(**numpy), quiet(model) as watch:
        for scale in scales:
            optimizer.zero_grad()
            (model(x).square().mean() * scale).backward()
            if math.isfinite(scale):
                optimizer.step()
        watch.summary()
    assert watch.notices == ()


def test_a_checkpoint_with_a_watch_in_it_loads_as_safely_as_one_without(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with GradWatch(model, console=False) as watch:
        for _ in range(3):
            optimizer.zero_grad()
            (model(torch.ones(4, 2)).mean() * float("nan")).backward()
            optimizer.step()
    assert watch.alerts
    torch.save({"model": model.state_dict(), "watch": watch.state_dict()}, tmp_path / "checkpoint.pt")
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    again = GradWatch(model, console=False)
    again.load_state_dict(saved["watch"])
    assert again.alerts == watch.alerts
    assert repr(again.history.meta) == repr(watch.history.meta)
    np.testing.assert_array_equal(again.history.stat("grad_norm"), watch.history.stat("grad_norm"))


def test_a_step_that_was_stopped_is_no_healthy_run(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.weight.detach().clone()
    watch = GradWatch(model, on_nonfinite="raise")

    def train() -> None:
        with watch:
            for i in range(30):
                optimizer.zero_grad()
                (model(torch.ones(4, 2)).mean() * (float("nan") if i == 15 else 0.0)).backward()
                optimizer.step()

    with pytest.raises(NonFiniteGradientError, match="step 15"):
        train()
    assert torch.equal(model.weight, before)
    assert watch.history.recorded == 16
    assert watch.history.stat("skip_reason")[-1] == SkipReason.RAISED
    assert [alert.rule for alert in watch.alerts if alert.severity >= 40]
    assert "healthy" not in capsys.readouterr().err


def test_another_models_scaler_scales_nothing_here() -> None:
    watched, other = network(), network()
    mine, theirs = SGD(watched.parameters(), lr=0.01), SGD(other.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu")
    x = torch.randn(8, 4) if watched[0].in_features == 4 else torch.randn(8, watched[0].in_features)
    with quiet(watched, rules=()) as watch:
        for _ in range(5):
            theirs.zero_grad()
            scaler.scale(other(x).square().mean()).backward()
            scaler.step(theirs)
            scaler.update()
            mine.zero_grad()
            loss = watched(x).square().mean()
            loss.backward()
            mine.step()
    assert watch.history.stat("loss_scale").tolist() == [1.0] * 5
    assert watch.history.stat("loss")[-1] == pytest.approx(float(loss.detach()), rel=1e-5)


def test_a_watch_that_failed_neither_ends_the_loop_nor_keeps_silent(capsys: pytest.CaptureFixture[str]) -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    x = torch.randn(8, model[0].in_features)
    with GradWatch(model, rules=()) as watch:
        watch._recorder.gradients.read = None  # type: ignore[union-attr, method-assign, assignment]
        for _ in range(4):
            optimizer.zero_grad()
            watch.loss(model(x).square().mean()).backward()
            optimizer.step()
            watch.step()
        assert repr(watch) == "<GradWatch switched off, 0 updates, 0 incidents>"
    assert len(watch.notices) == 1
    assert "▲ gradwatch: the watch failed after 0 updates and switched itself off" in capsys.readouterr().err
    assert "notice: the watch failed" in watch.summary()


@pytest.mark.parametrize(
    "value", [None, "1.0", [1.0], torch.ones(2), torch.tensor(1j)], ids=["none", "str", "list", "two", "complex"]
)
def test_a_loss_that_is_no_number_is_the_callers_error(value: Any) -> None:
    with quiet(network()) as watch:
        with pytest.raises(TypeError, match="real number"):
            watch.loss(value)
        assert watch.notices == ()


def test_acting_is_refused_where_no_optimizer_steps() -> None:
    model = network()
    x = torch.randn(8, model[0].in_features)

    def train() -> None:
        with quiet(model, clip=1.0):
            for _ in range(3):
                model(x).square().mean().backward()
                with torch.no_grad():
                    for p in model.parameters():
                        assert p.grad is not None
                        p -= 0.01 * p.grad
                        p.grad = None

    with pytest.raises(RuntimeError, match="without a step of a torch optimizer"):
        train()


@pytest.mark.parametrize("state", [{}, {"history": 1, "incidents": {}}, None], ids=["empty", "number", "none"])
def test_what_is_no_state_is_refused_with_a_reason(state: Any) -> None:
    with pytest.raises(ValueError, match="state_dict"):
        quiet(network()).load_state_dict(state)


def test_a_state_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="another model"):
        quiet(nn.Sequential(nn.ReLU(), nn.Bilinear(2, 2, 2), nn.PReLU())).load_state_dict(quiet(nn.LSTM(2, 2)).state_dict())


def test_weights_replaced_under_the_optimizer_are_told() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    x = torch.randn(8, model[0].in_features)
    told: list[int] = []
    with quiet(model, on_alert=lambda alert: told.append(i)) as watch:
        for i in range(90):
            if i == 10:
                model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    assert [(alert.rule, alert.step) for alert in watch.alerts if alert.severity >= 30] == [("not_in_optimizer", 10)]
    assert told[0] <= 20


def test_a_new_optimizer_at_every_update_leaves_nothing_behind() -> None:
    model = network()
    x = torch.randn(8, model[0].in_features)
    with quiet(model, rules=()) as watch:
        for _ in range(20):
            optimizer = SGD(model.parameters(), lr=0.01)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        assert watch._recorder is not None
        assert len(watch._recorder.owners._known) <= 2
