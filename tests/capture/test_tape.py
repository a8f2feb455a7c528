"""`backward`, `Optimizer.step` and `GradScaler.scale` are heard once each, and nothing of it is left behind."""

from __future__ import annotations

import copy
import gc
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.optim import SGD, Optimizer

from gradwatch import GradWatch
from gradwatch.capture.tape import TAPE
from tests.networks import NETWORKS


class Ear:
    """Writes down what it hears."""

    def __init__(self) -> None:
        self.home: int | None = None  # the thread it follows; None: all
        self.heard: list[str] = []
        self.roots: list[tuple[Any, ...]] = []
        self.scalar: list[bool] = []

    def concerns(self, roots: Any) -> bool:
        """Whether it follows this thread."""
        return self.lives_here()

    def lives_here(self) -> bool:
        """Whether it follows this thread."""
        return self.home in (None, threading.get_ident())

    def on_backward_begin(self, roots: Sequence[Any]) -> None:
        """A backward starts."""
        self.heard.append("begin")

    def on_backward_end(self, roots: Any, scalar: bool) -> None:
        """A backward has returned."""
        self.heard.append("end")
        self.roots.append(tuple(roots))
        self.scalar.append(scalar)

    def on_backward_failed(self) -> None:
        """A backward raised."""
        self.heard.append("failed")

    def on_scale(self, scaler: Any) -> None:
        """A loss was scaled."""
        self.heard.append("scale")

    def on_pre_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An optimizer is about to step."""
        self.heard.append("pre")

    def on_post_step(self, optimizer: Optimizer) -> None:
        """It has."""
        self.heard.append("post")

    def on_fork(self) -> None:
        """The process was forked."""


ORIGINAL = torch.autograd.backward
SCALE = torch.amp.GradScaler.scale


@pytest.fixture
def ear() -> Iterator[Ear]:
    """A listener, and whatever happens the tape is as it was afterwards."""
    listener = Ear()
    TAPE.add(listener)
    yield listener
    TAPE.remove(listener)
    torch.autograd.backward = ORIGINAL
    torch.amp.GradScaler.scale = SCALE  # type: ignore[method-assign]
    assert list(TAPE.listeners()) == []


def loss(size: int = 3) -> Tensor:
    return (torch.ones(size, requires_grad=True) * 2).sum()


# -- in and out --------------------------------------------------------------------------------------------------------------------


def test_it_comes_with_the_first_listener_and_goes_with_the_last() -> None:
    one, other = Ear(), Ear()
    TAPE.add(one)
    wrapper = torch.autograd.backward
    assert wrapper is not ORIGINAL
    TAPE.add(other)
    assert torch.autograd.backward is wrapper
    TAPE.remove(one)
    assert torch.autograd.backward is wrapper
    loss().backward()
    TAPE.remove(other)
    assert torch.autograd.backward is ORIGINAL
    assert torch.amp.GradScaler.scale is SCALE
    loss().backward()
    assert (one.heard, other.heard) == ([], ["begin", "end"])


def test_a_listener_that_is_added_twice_hears_once_and_leaves_at_once() -> None:
    listener = Ear()
    TAPE.add(listener)
    TAPE.add(listener)
    loss().backward()
    assert listener.heard == ["begin", "end"]
    TAPE.remove(listener)
    assert torch.autograd.backward is ORIGINAL
    TAPE.remove(listener)
    assert torch.autograd.backward is ORIGINAL


def test_a_listener_that_nobody_holds_is_not_kept_alive() -> None:
    listener = Ear()
    TAPE.add(listener)
    del listener
    gc.collect()
    assert torch.autograd.backward is ORIGINAL
    assert list(TAPE.listeners()) == []
    loss().backward()


def test_the_wrapped_functions_look_like_the_original_ones(ear: Ear) -> None:
    assert inspect.signature(torch.autograd.backward) == inspect.signature(ORIGINAL)
    assert torch.autograd.backward.__doc__ == ORIGINAL.__doc__
    assert torch.autograd.backward.__name__ == "backward"
    assert inspect.signature(torch.amp.GradScaler.scale) == inspect.signature(SCALE)


def theirs(inner: Callable[..., None], calls: list[str]) -> Callable[..., None]:
    """Somebody else's wrapper of `backward`."""

    def backward(*args: Any, **kwargs: Any) -> None:
        calls.append("theirs")
        inner(*args, **kwargs)

    return backward


def test_somebody_elses_wrapper_around_ours_stays_and_works(ear: Ear) -> None:
    calls: list[str] = []
    wrapper = torch.autograd.backward = theirs(torch.autograd.backward, calls)
    loss().backward()
    assert (ear.heard, calls) == (["begin", "end"], ["theirs"])
    TAPE.remove(ear)
    assert torch.autograd.backward is wrapper
    loss().backward()
    assert (ear.heard, calls) == (["begin", "end"], ["theirs"] * 2)


def test_somebody_elses_wrapper_below_ours_comes_back() -> None:
    calls: list[str] = []
    below = torch.autograd.backward = theirs(ORIGINAL, calls)
    try:
        listener = Ear()
        TAPE.add(listener)
        loss().backward()
        TAPE.remove(listener)
        assert torch.autograd.backward is below
        assert (listener.heard, calls) == (["begin", "end"], ["theirs"])
    finally:
        torch.autograd.backward = ORIGINAL


def test_entering_again_around_somebody_elses_wrapper_hears_once(ear: Ear) -> None:
    """Ours is still inside theirs: two of ours must not tell of every backward twice."""
    calls: list[str] = []
    torch.autograd.backward = theirs(torch.autograd.backward, calls)
    TAPE.remove(ear)
    TAPE.add(ear)
    loss().backward()
    assert (ear.heard, calls) == (["begin", "end"], ["theirs"])


def test_a_patch_that_is_undone_after_we_left_brings_back_nothing_that_hears_twice(ear: Ear) -> None:
    ours = torch.autograd.backward
    torch.autograd.backward = theirs(ours, [])
    TAPE.remove(ear)
    torch.autograd.backward = ours  # as `mock.patch` does at its end
    loss().backward()
    assert ear.heard == []
    TAPE.add(ear)
    loss().backward()
    assert ear.heard == ["begin", "end"]


def test_somebody_who_puts_the_original_back_makes_us_deaf_and_nothing_else(ear: Ear) -> None:
    torch.autograd.backward = ORIGINAL
    loss().backward()
    assert ear.heard == []
    TAPE.remove(ear)
    assert torch.autograd.backward is ORIGINAL
    TAPE.add(ear)
    loss().backward()
    assert ear.heard == ["begin", "end"]


def test_a_scale_wrapped_by_somebody_else_stays(ear: Ear) -> None:
    inner = torch.amp.GradScaler.scale

    def scale(self: Any, outputs: Any) -> Any:
        return inner(self, outputs)

    torch.amp.GradScaler.scale = scale  # type: ignore[method-assign, assignment]
    TAPE.remove(ear)
    assert torch.amp.GradScaler.scale is scale
    torch.amp.GradScaler("cpu").scale(loss())
    assert ear.heard == []


# -- roots -------------------------------------------------------------------------------------------------------------------------


def vector() -> Tensor:
    return torch.ones(3, requires_grad=True) * 2


ROOTS: dict[str, tuple[Callable[[], tuple[list[Any], Callable[[], Any]]], bool]] = {}


def root(scalar: bool) -> Callable[[Callable[[], Any]], None]:
    """A way of calling backward, by name; `scalar`: its roots are losses."""

    def add(call: Callable[[], Any]) -> None:
        ROOTS[call.__name__.replace("_", "-")] = (call, scalar)

    return add


@root(True)
def method() -> Any:
    one = loss()
    return [one], one.backward


@root(True)
def function() -> Any:
    one = loss()
    return [one], lambda: torch.autograd.backward(one)


@root(True)
def keyword() -> Any:
    one = loss()
    return [one], lambda: torch.autograd.backward(tensors=one, retain_graph=True)


@root(True)
def positional_options() -> Any:
    one = loss()
    return [one], lambda: torch.autograd.backward(one, None, True, False)


@root(True)
def tuple_of_two() -> Any:
    one, two = loss(), loss()
    return [one, two], lambda: torch.autograd.backward((one, two))


@root(True)
def list_of_two() -> Any:
    one, two = loss(), loss()
    return [one, two], lambda: torch.autograd.backward([one, two])


@root(True)
def iterator() -> Any:
    one, two = loss(), loss()
    return [one, two], lambda: torch.autograd.backward(x for x in (one, two))  # type: ignore[arg-type]


@root(True)
def one_element() -> Any:
    one = loss().reshape(1, 1)
    return [one], one.backward


@root(False)
def with_gradient() -> Any:
    one = vector()
    return [one], lambda: one.backward(torch.ones(3))


@root(False)
def scalar_with_gradient() -> Any:
    one = loss()
    return [one], lambda: one.backward(torch.tensor(3.0))


@root(False)
def several_with_gradients() -> Any:
    one, two = vector(), loss()
    return [one, two], lambda: torch.autograd.backward([one, two], [torch.ones(3), torch.tensor(1.0)])


@root(False)
def gradient_edge() -> Any:
    edge = get_gradient_edge(loss())
    return [edge], lambda: torch.autograd.backward(edge, torch.tensor(1.0))


@root(False)
def tuple_of_edges() -> Any:
    one, two = get_gradient_edge(loss()), get_gradient_edge(vector())
    return [one, two], lambda: torch.autograd.backward((one, two), (torch.tensor(1.0), torch.ones(3)))


@pytest.mark.parametrize(("make", "scalar"), ROOTS.values(), ids=ROOTS)
def test_every_kind_of_root_is_heard_and_does_what_it_always_did(ear: Ear, make: Callable[[], Any], scalar: bool) -> None:
    roots, call = make()
    call()
    assert ear.heard == ["begin", "end"]
    assert len(ear.roots[0]) == len(roots)
    assert all(mine is theirs for mine, theirs in zip(ear.roots[0], roots, strict=True))
    assert ear.scalar == [scalar]


def test_gradients_are_those_of_an_unwrapped_backward(ear: Ear) -> None:
    x, y = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    torch.autograd.backward(((x * y).sum(), (x * 3).sum()), inputs=[x])
    assert x.grad is not None
    assert x.grad.tolist() == [4.0] * 3
    assert y.grad is None


def test_autograd_grad_is_no_backward(ear: Ear) -> None:
    x = torch.ones(3, requires_grad=True)
    torch.autograd.grad((x * 2).sum(), x)
    assert ear.heard == []


# -- errors ------------------------------------------------------------------------------------------------------------------------


def interrupting() -> Tensor:
    one = torch.ones(3, requires_grad=True) * 2

    def stop(_: Tensor) -> None:
        raise KeyboardInterrupt

    one.register_hook(stop)
    return one.sum()


WRONG: dict[str, tuple[Callable[[], Any], type[BaseException]]] = {
    "not-scalar": (lambda: vector().backward(), RuntimeError),
    "no-graph": (lambda: torch.ones(()).backward(), RuntimeError),
    "no-tensor": (lambda: torch.autograd.backward(3), TypeError),  # type: ignore[arg-type]
    "shapes-differ": (lambda: vector().backward(torch.ones(2)), RuntimeError),
    "interrupted": (lambda: interrupting().backward(), KeyboardInterrupt),
    "unknown-keyword": (lambda: torch.autograd.backward(loss(), nonsense=1), TypeError),  # type: ignore[call-arg]
    "iterator-that-raises": (lambda: torch.autograd.backward(1 / 0 for _ in "a"), ZeroDivisionError),  # type: ignore[arg-type]
}


@pytest.mark.parametrize(("call", "error"), WRONG.values(), ids=WRONG)
def test_an_error_is_the_users_and_the_next_backward_is_heard(
    ear: Ear, call: Callable[[], Any], error: type[BaseException]
) -> None:
    with pytest.raises(error):
        call()
    assert ear.heard in ([], ["begin", "failed"])
    ear.heard.clear()
    loss().backward()
    assert ear.heard == ["begin", "end"]


def test_a_graph_that_was_freed_is_a_failed_backward(ear: Ear) -> None:
    x = torch.ones(3, requires_grad=True)
    one = (x * x).sum()
    one.backward()
    with pytest.raises(RuntimeError, match="second time"):
        one.backward()
    assert ear.heard == ["begin", "end", "begin", "failed"]


@pytest.mark.parametrize("empty", [(), []], ids=["tuple", "list"])
def test_no_root_at_all_does_what_it_always_did(ear: Ear, empty: Any) -> None:
    def attempt(backward: Callable[..., None]) -> str:
        try:
            backward(empty)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    assert attempt(torch.autograd.backward) == attempt(ORIGINAL)


# -- what is inside another one ----------------------------------------------------------------------------------------------------


def test_a_backward_inside_a_backward_is_part_of_it(ear: Ear) -> None:
    x = torch.ones(3, requires_grad=True)

    def inner(_: Tensor) -> None:
        with torch.enable_grad():
            (torch.ones(3, requires_grad=True) * 2).sum().backward()

    one = (x * 2).sum()
    one.register_hook(inner)
    one.backward()
    assert ear.heard == ["begin", "end"]


def test_steps_are_heard_around_their_closure(ear: Ear) -> None:
    x = nn.Parameter(torch.ones(3))
    optimizer = SGD([x], lr=0.1)

    def closure() -> Tensor:
        one = (x * 2).sum()
        one.backward()
        return one

    optimizer.step()
    optimizer.step(closure)  # type: ignore[arg-type]
    assert ear.heard == ["pre", "post", "pre", "begin", "end", "post"]


def test_scales_are_heard() -> None:
    class Own(torch.amp.GradScaler):
        """Overrides `scale`, as hosts do."""

        def scale(self, outputs: Any) -> Any:
            """Scale."""
            return super().scale(outputs)

    listener = Ear()
    TAPE.add(listener)
    torch.amp.GradScaler("cpu").scale(loss())
    assert listener.heard == ["scale"]
    Own("cpu").scale(loss())
    assert set(listener.heard[1:]) == {"scale"}
    count = len(listener.heard)
    TAPE.remove(listener)
    torch.amp.GradScaler("cpu").scale(loss())
    Own("cpu").scale(loss())
    assert len(listener.heard) == count
    assert "scale" in vars(Own)


# -- threads -----------------------------------------------------------------------------------------------------------------------


def in_a_thread(work: Callable[[], Any]) -> Any:
    """What `work` returns, run in a thread of its own."""
    result: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    if errors:
        raise errors[0]
    return result[0]


def test_a_listener_hears_what_concerns_it_and_no_other(ear: Ear) -> None:
    ear.home = threading.get_ident()

    def work() -> list[str]:
        other = Ear()
        other.home = threading.get_ident()
        TAPE.add(other)
        loss().backward()
        torch.amp.GradScaler("cpu").scale(loss())
        TAPE.remove(other)
        return other.heard

    assert in_a_thread(work) == ["begin", "end", "scale"]
    assert ear.heard == []
    loss().backward()
    assert ear.heard == ["begin", "end"]


@pytest.mark.parametrize("moved", [False, True], ids=["all-in-one-thread", "attached-elsewhere"])
def test_a_training_is_followed_wherever_it_runs(moved: bool) -> None:
    model = nn.Linear(2, 1)
    optimizer = SGD(model.parameters(), lr=0.1)

    def run() -> None:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()

    watch = GradWatch(model, console=False, rules=())
    watch.attach()
    in_a_thread(run) if moved else run()
    watch.detach()
    assert watch.history.recorded == 3
    assert watch.notices == ()


def trained(model: nn.Module, updates: int, seen: dict[int, dict[str, np.ndarray]]) -> None:
    """Trains a model of the thread's own and writes down what its watch saw."""
    optimizer = SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(updates)
    with GradWatch(model, console=False, rules=()) as watch:
        for _ in range(updates):
            for _ in range(2):
                model(torch.randn(8, 4, generator=generator)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    seen[updates] = {name: watch.history.stat(name) for name in ("backward_calls", "grad_norm", "loss", "total_norm")}


def test_threads_with_a_watch_each_see_what_they_would_see_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    alone: dict[int, dict[str, np.ndarray]] = {}
    together: dict[int, dict[str, np.ndarray]] = {}
    threads = []
    for updates in (40, 41, 42):
        trained(copy.deepcopy(model), updates, alone)
        threads.append(threading.Thread(target=trained, args=(copy.deepcopy(model), updates, together)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for updates, expected in alone.items():
        for name, values in expected.items():
            np.testing.assert_array_equal(together[updates][name], values, err_msg=f"{name}, {updates} updates")
    assert torch.autograd.backward is ORIGINAL


def test_a_step_in_another_thread_is_not_about_what_is_open_in_this_one() -> None:
    mine, other = nn.Linear(2, 1), nn.Linear(2, 1)
    optimizer = SGD(mine.parameters(), lr=0.1)

    def train_other() -> None:
        with GradWatch(other, console=False):
            other(torch.ones(1, 2)).sum().backward()
            SGD(other.parameters(), lr=0.1).step()

    with GradWatch(mine, console=False) as watch:
        mine(torch.ones(1, 2)).sum().backward()
        in_a_thread(train_other)
        mine(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    assert watch.history.stat("backward_calls").tolist() == [2.0]


# -- a watch that fails, or leaves, in the middle ----------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["backward_begin", "backward_end", "pre_step", "post_step", "scale.scaled"])
def test_an_error_inside_the_watch_ends_the_watch_and_not_the_training(
    where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise LookupError("our own mistake")

    training = NETWORKS["mlp"]()
    scaler = torch.amp.GradScaler("cpu")
    with GradWatch(training.model, console=False) as watch:
        training.run(2)
        part, _, method = where.rpartition(".")
        monkeypatch.setattr(getattr(watch._recorder, part) if part else watch._recorder, method, broken)
        scaler.scale(loss())
        training.run(3)
        assert torch.autograd.backward is ORIGINAL
    (notice,) = watch.notices
    assert "our own mistake" in notice
    assert watch.history.recorded == 2
    assert sum("our own mistake" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("where", ["hook", "closure", "sink"])
def test_a_watch_may_be_left_from_inside_what_it_watches(where: str) -> None:
    model = nn.Linear(2, 1)
    optimizer = SGD(model.parameters(), lr=0.1)
    watch = GradWatch(model, console=False, on_step=(lambda record: watch.detach()) if where == "sink" else ())
    watch.attach()

    def closure() -> Tensor:
        if where == "closure":
            watch.detach()
        one = model(torch.ones(1, 2)).sum()
        if where == "hook":
            one.register_hook(lambda _: watch.detach())
        one.backward()
        return one

    for _ in range(2):
        optimizer.step(closure)  # type: ignore[arg-type]
    watch.detach()
    assert watch.notices == ()
    assert watch.history.recorded == (1 if where == "sink" else 0)
    assert torch.autograd.backward is ORIGINAL


def test_a_backward_under_somebody_elses_dispatch_mode_is_watched() -> None:
    """There a number that the graph keeps is no tensor to any operator."""
    from torch.utils.flop_counter import FlopCounterMode

    from gradwatch import GradWatch

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with GradWatch(model, console=False) as watch:
        for _ in range(4):
            with FlopCounterMode(display=False):
                optimizer.zero_grad()
                ((model(torch.randn(3, 4)) * 2.0 - 1).square().mean() * 0.5).backward()
                optimizer.step()
    assert watch.notices == ()
    assert watch.history.recorded == 4
