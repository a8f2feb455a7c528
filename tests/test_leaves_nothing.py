"""After the block, however it ends, nothing of the watch is left: no hook, no wrapped function, no reference."""

from __future__ import annotations

import gc
import inspect
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch import Tensor, nn

import gradwatch
from gradwatch import GradWatch
from tests.networks import NETWORKS, Training
from tests.traces import changed, traces

PACKAGE = str(Path(gradwatch.__file__).parent)


def snapshot(training: Training) -> dict[str, object]:
    return traces(training.modules().values(), training.optimizers)


@pytest.fixture(autouse=True)
def imported_beforehand() -> None:
    """What torch sets up at a first use (checkpoint, autocast, lazy imports) is not the watch's."""
    for build in NETWORKS.values():
        build().run(1)


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_is_left_after_the_block(name: str) -> None:
    training = NETWORKS[name]()
    training.run(1)
    before = snapshot(training)
    with GradWatch(training.model, console=False):
        training.run(3)
        assert changed(before, snapshot(training)), "the snapshot must see the watch while it is attached"
    assert not changed(before, snapshot(training))


def test_nothing_is_left_after_attach_and_detach() -> None:
    training = NETWORKS["cnn_in_place"]()
    before = snapshot(training)
    watch = GradWatch(training.model, console=False)
    assert not changed(before, snapshot(training)), "the constructor attaches nothing"
    watch.attach()
    watch.detach()
    assert not changed(before, snapshot(training))
    watch.detach()
    assert not changed(before, snapshot(training)), "leaving twice is leaving"


def test_the_original_functions_are_back() -> None:
    originals = (torch.autograd.backward, torch.amp.GradScaler.scale, torch.Tensor.backward)
    training = NETWORKS["mlp"]()
    with GradWatch(training.model, console=False):
        training.run(2)
    assert (torch.autograd.backward, torch.amp.GradScaler.scale, torch.Tensor.backward) == originals
    assert torch.autograd.backward is originals[0]
    assert torch.amp.GradScaler.scale is originals[1]


def test_a_function_wrapped_by_somebody_else_meanwhile_is_not_unwrapped() -> None:
    original = torch.autograd.backward
    training = NETWORKS["mlp"]()
    try:
        with GradWatch(training.model, console=False):
            inner = torch.autograd.backward

            def theirs(*args: object, **kwargs: object) -> None:
                inner(*args, **kwargs)

            torch.autograd.backward = theirs
            training.run(2)
        assert torch.autograd.backward is theirs
        training.run(2)
    finally:
        torch.autograd.backward = original


class Stop(nn.Module):
    """Passes its input on, until told to stop: then it interrupts where it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.where = ""
        self.error: type[BaseException] = KeyboardInterrupt

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "forward":
            raise self.error
        if self.where == "backward":
            x.register_hook(self.interrupt)
        return x

    def interrupt(self, _: Tensor) -> None:
        raise self.error


class StoppingSGD(torch.optim.SGD):
    """Stops in its step, if told to."""

    error: type[BaseException] | None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        if self.error is not None:
            raise self.error
        return super().step(closure)


def stoppable() -> tuple[Training, Stop, StoppingSGD]:
    torch.manual_seed(0)
    stop = Stop()
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), stop, nn.Linear(8, 2))
    optimizer = StoppingSGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.error = None
    x = torch.randn(8, 6)

    def update(_: int) -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return Training(model, (optimizer,), update), stop, optimizer


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["forward", "backward", "step", "between"])
def test_nothing_is_left_when_the_loop_is_interrupted(where: str, error: type[BaseException]) -> None:
    training, stop, optimizer = stoppable()
    training.run(1)
    before = snapshot(training)

    def interrupted() -> None:
        with GradWatch(training.model, console=False):
            training.run(2)
            stop.error = error
            if where == "step":
                optimizer.error = error
            elif where == "between":
                raise error
            else:
                stop.where = where
            training.run(1)

    with pytest.raises(error):
        interrupted()
    stop.where, stop.error, optimizer.error = "", KeyboardInterrupt, None
    assert not changed(before, snapshot(training))
    training.run(2)


@pytest.mark.parametrize("where", ["forward", "backward", "step"])
def test_the_loop_goes_on_inside_the_block_after_an_interruption(where: str) -> None:
    training, stop, optimizer = stoppable()
    with GradWatch(training.model, console=False) as watch:
        training.run(2)
        stop.where = where
        optimizer.error = KeyboardInterrupt if where == "step" else None
        with pytest.raises(KeyboardInterrupt):
            training.run(1)
        stop.where, optimizer.error = "", None
        training.run(3)
    assert watch.history.recorded in (5, 6), "an update cut short may stand as a skipped record, the five whole ones do stand"
    assert watch.history.stat("skipped").sum() == watch.history.recorded - 5
    assert not any("Traceback" in str(notice) for notice in watch.notices)


class InterruptInPackage:
    """Raises KeyboardInterrupt as the `at`-th call of a function of the package begins: Ctrl-C can fall anywhere."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        # A generator is also "called" when it is thrown away; what is raised there, nobody catches.
        if event != "call" or not code.co_filename.startswith(PACKAGE) or code.co_flags & inspect.CO_GENERATOR:
            return
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt

    def __enter__(self) -> InterruptInPackage:
        self.before = sys.gettrace()
        sys.settrace(self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)


def calls_of_one_update(start: int) -> int:
    training, _, _ = stoppable()
    with GradWatch(training.model, console=False):
        training.run(start)
        with InterruptInPackage(10**9) as counter:
            training.run(1)
    return 10**9 - counter.left


@pytest.mark.parametrize("start", [0, 4], ids=["first-update", "later-update"])
def test_ctrl_c_inside_the_watch_is_the_users(start: int) -> None:
    """Wherever in the watch's code Ctrl-C falls, it reaches the user, nothing is left after the block, and training can go on."""
    calls = calls_of_one_update(start)
    assert calls > 3
    for at in sorted({*range(1, min(calls, 40) + 1), *range(40, calls + 1, max(1, calls // 60))}):
        training, _, _ = stoppable()
        before = snapshot(training)

        def interrupted(training: Training = training, at: int = at) -> None:
            with GradWatch(training.model, console=False):
                training.run(start)
                with InterruptInPackage(at):
                    training.run(1)

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert not changed(before, snapshot(training)), f"call {at} of {calls}"
        training.run(1)


def test_ctrl_c_while_attaching_leaves_nothing() -> None:
    training, _, _ = stoppable()
    with InterruptInPackage(10**9) as counter:
        watch = GradWatch(training.model, console=False)
        built = counter.left
        watch.attach()
    calls = built - counter.left
    watch.detach()
    for at in range(1, calls + 1, max(1, calls // 60)):
        before = snapshot(training)
        watch = GradWatch(training.model, console=False)

        def interrupted(watch: GradWatch = watch, at: int = at) -> None:
            with InterruptInPackage(at), watch:
                raise AssertionError("not interrupted")

        with pytest.raises((KeyboardInterrupt, AssertionError)):
            interrupted()
        assert not changed(before, snapshot(training)), f"call {at} of {calls}"


def test_an_interrupting_sink_reaches_the_user() -> None:
    training, _, _ = stoppable()
    before = snapshot(training)

    def ctrl_c(_: object) -> None:
        raise KeyboardInterrupt

    def interrupted() -> None:
        with GradWatch(training.model, console=False, on_step=ctrl_c):
            training.run(2)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not changed(before, snapshot(training))


def dead(references: dict[str, weakref.ref[object]]) -> Iterator[str]:
    gc.collect()
    for name, reference in references.items():
        if (alive := reference()) is not None:
            yield f"{name}, held by {[type(holder).__name__ for holder in gc.get_referrers(alive)][:6]}"


@pytest.mark.parametrize("ending", ["block", "exception", "interrupt"])
@pytest.mark.parametrize("name", ["mlp", "gan", "embedding_sparse", "checkpointing_reentrant", "bf16_autocast"])
def test_no_reference_is_left(name: str, ending: str) -> None:
    errors = {"block": None, "exception": ZeroDivisionError, "interrupt": KeyboardInterrupt}
    references: dict[str, weakref.ref[object]] = {}

    def lifetime() -> None:
        training = NETWORKS[name]()
        try:
            with GradWatch(training.model, console=False) as watch:
                references["watch"] = weakref.ref(watch)
                references["history"] = weakref.ref(watch.history)
                training.run(3)
                if (error := errors[ending]) is not None:
                    raise error
        except (ZeroDivisionError, KeyboardInterrupt):
            pass
        for key, module in training.modules().items():
            references[f"model {key}"] = weakref.ref(module)
            for parameter_name, parameter in module.named_parameters():
                references[f"parameter {key}.{parameter_name}"] = weakref.ref(parameter)
                references[f"gradient {key}.{parameter_name}"] = weakref.ref(parameter.grad)
        for i, optimizer in enumerate(training.optimizers):
            references[f"optimizer {i}"] = weakref.ref(optimizer)

    lifetime()
    assert not list(dead(references))


@pytest.mark.parametrize("attached", [True, False], ids=["while-attached", "after-the-block"])
def test_gradients_die_when_the_user_clears_them(attached: bool) -> None:
    training, _, optimizer = stoppable()
    model = training.model
    assert isinstance(model, nn.Module)
    watch = GradWatch(model, console=False)
    watch.attach()
    training.run(3)
    references: dict[str, weakref.ref[object]] = {n: weakref.ref(p.grad) for n, p in model.named_parameters()}
    loss = model(torch.randn(8, 6)).square().mean()
    loss.backward()
    references["loss"] = weakref.ref(loss)
    del loss
    if not attached:
        watch.detach()
    optimizer.zero_grad()
    assert not list(dead(references))
    watch.detach()


def test_an_optimizer_the_user_drops_mid_run_dies() -> None:
    training, _, _ = stoppable()
    model = training.model
    assert isinstance(model, nn.Module)
    with GradWatch(model, console=False) as watch:
        for _ in range(3):
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
            for _ in range(2):
                optimizer.zero_grad()
                model(torch.randn(8, 6)).square().mean().backward()
                optimizer.step()
            reference = weakref.ref(optimizer)
            del optimizer
        gc.collect()
        assert reference() is None
    assert watch.history.recorded == 6
