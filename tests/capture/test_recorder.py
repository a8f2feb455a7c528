"""From what a loop does to rows: any sequence of it, and the corners that no loop of the books has."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from gradwatch import GradState, GradWatch, History, Sampling

NAN = float("nan")


def total(model: nn.Module, x: Tensor | None = None) -> Tensor:
    """A loss of a model of two inputs."""
    loss: Tensor = model(torch.ones(3, 2) if x is None else x).square().mean()
    return loss


def flags(history: History, name: str) -> list[GradState]:
    """The flags of one parameter, record by record."""
    return [GradState(int(state)) for state in history.stat("grad_state")[:, history.parameters.index(name)]]


# -- any loop at all ---------------------------------------------------------------------------------------------------------------


class Loop:
    """Two watched models, one that is not, an optimizer for each, and everything that a user may do with them."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
        self.discriminator = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        self.other = nn.Linear(2, 2)
        self.models = {"g": self.generator, "d": self.discriminator}
        self.optimizers: dict[str, Optimizer] = {
            "g": SGD(self.generator.parameters(), lr=0.01, momentum=0.9),
            "d": torch.optim.Adam(self.discriminator.parameters(), lr=0.01),
            "o": SGD(self.other.parameters(), lr=0.01),
        }
        self.watch: GradWatch | None = None

    def parameters(self, key: str) -> list[nn.Parameter]:
        """Of one of the three models."""
        return list({"g": self.generator, "d": self.discriminator, "o": self.other}[key].parameters())

    def loss(self, what: str) -> Tensor:
        """Of G, of D, of D after G, or of the other model."""
        x = torch.ones(3, 2)
        y: Tensor = {
            "g": lambda: self.generator(x),
            "d": lambda: self.discriminator(x),
            "gd": lambda: self.discriminator(self.generator(x)),
            "o": lambda: self.other(x),
        }[what]()
        return y.square().mean()

    def backward(self, what: str) -> None:
        """A backward."""
        self.loss(what).backward()

    def interrupted(self, what: str) -> None:
        """A backward that raises halfway."""
        loss = self.loss(what)

        def stop(_: Tensor) -> None:
            raise KeyboardInterrupt

        last = self.parameters(what[-1])[-1]
        handle = last.register_hook(stop)  # type: ignore[no-untyped-call]
        with pytest.raises(KeyboardInterrupt):
            loss.backward()
        handle.remove()

    def step(self, key: str) -> None:
        """A step."""
        self.optimizers[key].step()

    def closure(self, key: str) -> None:
        """A step with a closure."""

        def closure() -> Tensor:
            self.optimizers[key].zero_grad()
            loss = self.loss(key)
            loss.backward()
            return loss

        self.optimizers[key].step(closure)  # type: ignore[arg-type]

    def broken_closure(self, key: str) -> None:
        """A step whose closure raises."""

        def closure() -> Tensor:
            self.loss(key).backward()
            raise ValueError

        with pytest.raises(ValueError):  # noqa: PT011
            self.optimizers[key].step(closure)  # type: ignore[arg-type]

    def clear(self, key: str) -> None:
        """Set to None."""
        self.optimizers[key].zero_grad()

    def zero(self, key: str) -> None:
        """Set to zero."""
        self.optimizers[key].zero_grad(set_to_none=False)

    def move(self, key: str) -> None:
        """Move the weights by hand."""
        for p in self.parameters(key):
            p.data.sub_(0.01)

    def put(self, key: str) -> None:
        """Set the gradients by hand."""
        for p in self.parameters(key):
            p.grad = torch.full_like(p, 0.1)

    def clip(self, key: str) -> None:
        """Clip."""
        nn.utils.clip_grad_norm_(self.parameters(key), 0.05)

    def poison(self, key: str) -> None:
        """A gradient that is not finite, cleared before it does harm."""
        (self.loss(key) * math.nan).backward()
        self.clear(key)

    def freeze(self, key: str) -> None:
        """Freeze the first layer, or thaw it."""
        for p in self.parameters(key)[:2]:
            p.requires_grad_(not p.requires_grad)

    def grow(self, key: str) -> None:
        """One more layer, in the optimizer too."""
        model = {"g": self.generator, "d": self.discriminator}.get(key)
        if model is not None and len(model) < 6:
            new = nn.Linear(2 if key == "g" else 1, 2 if key == "g" else 1)
            nn.init.constant_(new.weight, 0.5)
            nn.init.zeros_(new.bias)
            model.append(new)
            self.optimizers[key].add_param_group({"params": list(new.parameters())})

    def told(self, key: str) -> None:
        """The loss is told."""
        if self.watch is not None:
            self.watch.loss(1.0)

    def by_hand(self, key: str) -> None:
        """The user says that the update is over."""
        if self.watch is not None:
            self.watch.step()

    def again(self, key: str) -> None:
        """Leave and enter again."""
        if self.watch is not None:
            self.watch.detach()
            self.watch.attach()


ACTIONS = [
    *((Loop.backward, what) for what in ("g", "d", "gd", "o")),
    *((Loop.interrupted, what) for what in ("g", "gd")),
    *((Loop.closure, what) for what in ("g", "d")),
    *((Loop.broken_closure, what) for what in ("g", "d")),
    *((action, key) for action in (Loop.step, Loop.clear, Loop.zero, Loop.put) for key in ("g", "d", "o")),
    *((action, key) for action in (Loop.move, Loop.clip, Loop.poison, Loop.freeze, Loop.grow) for key in ("g", "d")),
    *((action, "g") for action in (Loop.told, Loop.by_hand, Loop.again)),
]
STEPS = [
    (Loop.backward, "g"),
    (Loop.backward, "d"),
    (Loop.backward, "gd"),
    (Loop.step, "g"),
    (Loop.step, "d"),
    (Loop.clear, "g"),
    (Loop.clear, "d"),
]
"""What happens often in a loop."""


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(STEPS), st.sampled_from(ACTIONS)), max_size=30), st.integers(1, 4))
def test_any_loop_is_recorded_without_gaps_and_without_harm(
    actions: list[tuple[Callable[[Loop, str], None], str]], window: int
) -> None:
    bare, watched = Loop(), Loop()
    told: list[int] = []
    watched.watch = watch = GradWatch(
        watched.models,
        console=False,
        rules=(),
        on_step=lambda record: told.append(record.step),
        sampling=Sampling(window=window, dense=3, every=2),
    )
    watch.attach()
    for action, key in actions:
        for loop in (bare, watched):
            if any(p.requires_grad for p in loop.parameters(key[-1])):
                action(loop, key)
    watch.detach()
    assert watch.notices == ()
    history = watch.history
    assert told == list(range(history.recorded)), "numbered from 0, without gaps, each told once"
    assert history.steps.tolist() == told[-len(history) :] if told else not len(history)
    state = history.stat("grad_state")
    assert (state & GradState.REACHED).any(axis=1).all(), "every record has something reached"
    norm = history.stat("grad_norm")
    assert not np.isnan(norm[(state & GradState.REACHED) != 0]).any() or np.isnan(history.stat("total_norm")).any()
    assert (np.diff(history.stat("time")) > 0).all()
    assert ((history.stat("skip_reason") == 0) == ~history.stat("skipped")).all()
    assert not ((state & GradState.STEPPED) != 0)[history.stat("skipped")].any()
    for key in ("g", "d", "o"):
        for one, other in zip(bare.parameters(key), watched.parameters(key), strict=True):
            assert torch.equal(one, other), "bit-identical to training without it"


# -- who counts --------------------------------------------------------------------------------------------------------------------


def two_parts() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


def norms(history: History, step: int = -1) -> dict[str, float]:
    return dict(zip(history.parameters, history.stat("grad_norm")[step].tolist(), strict=True))


def test_a_parameter_that_nobody_owns_keeps_its_columns_and_is_not_in_the_total() -> None:
    model = two_parts()
    optimizer = SGD(model[1].parameters(), lr=0.1)
    with GradWatch(model, console=False, rules=()) as watch:
        total(model).backward()
        optimizer.step()
    found = norms(watch.history)
    assert not np.isnan(list(found.values())).any()
    assert watch.history.stat("total_norm")[0] == pytest.approx(math.hypot(found["1.weight"], found["1.bias"]))
    assert flags(watch.history, "0.weight") == [GradState.REACHED]
    assert np.isnan(watch.history.stat("lr")[0, :2]).all()


def test_without_a_step_the_total_is_over_all_that_was_reached() -> None:
    model = two_parts()
    with GradWatch(model, console=False, rules=()) as watch:
        for _ in range(2):
            total(model).backward()
            model.zero_grad()
    found = norms(watch.history, 0)
    assert watch.history.stat("total_norm")[0] == pytest.approx(math.hypot(*found.values()))
    assert watch.history.stat("skipped").tolist() == [True]


def test_an_optimizer_that_was_not_named_is_not_heeded() -> None:
    model = two_parts()
    head, body = SGD(model[1].parameters(), lr=0.1), SGD(model[0].parameters(), lr=0.1)
    with GradWatch(model, optimizer=head, console=False, rules=()) as watch:
        for _ in range(3):
            total(model).backward()
            body.step()
            head.step()
            model.zero_grad()
    assert watch.history.recorded == 3
    assert flags(watch.history, "1.weight") == [GradState.REACHED | GradState.STEPPED | GradState.CHANGED] * 3
    assert not any(flag & GradState.STEPPED for flag in flags(watch.history, "0.weight"))


def test_an_old_optimizer_that_still_lies_about_takes_nothing_from_the_one_that_steps() -> None:
    """Fine-tuning: the optimizer of the whole model is still there, and only a new one for the head steps."""
    model = two_parts()
    whole = SGD(model.parameters(), lr=0.1)
    head = SGD(model[1].parameters(), lr=0.25)
    closed_at_the_step = []
    with GradWatch(model, console=False, rules=()) as watch:
        for _ in range(3):
            total(model).backward()
            head.step()
            closed_at_the_step.append(watch.history.recorded)
            model.zero_grad()
    assert watch.history.recorded == 3
    assert [bool(flag & GradState.STEPPED) for flag in flags(watch.history, "1.weight")] == [True] * 3
    assert watch.history.stat("lr")[:, 2].tolist() == [0.25] * 3
    assert watch.history.stat("skipped").tolist() == [False] * 3
    mine = [math.hypot(*row) for row in watch.history.stat("grad_norm")[:, 2:].tolist()]
    np.testing.assert_allclose(watch.history.stat("total_norm"), mine, rtol=1e-5)
    # It might step yet, so that a record is closed by the next backward (design, section 3).
    assert closed_at_the_step == [0, 1, 2]
    del whole


def test_two_optimizers_given_a_closure_that_only_returns_the_loss_are_one_record() -> None:
    """Lightning passes a closure to every step, also where the backward is long over (manual optimisation)."""
    model = two_parts()
    optimizers = [SGD(part.parameters(), lr=0.1) for part in model]
    with GradWatch(model, console=False, rules=()) as watch:
        for _ in range(3):
            total(model).backward()
            for optimizer in optimizers:
                optimizer.step(lambda: None)  # type: ignore[arg-type, return-value]
            model.zero_grad()
    assert watch.history.recorded == 3
    for name in watch.history.parameters:
        assert [bool(flag & GradState.STEPPED) for flag in flags(watch.history, name)] == [True] * 3


def test_a_second_step_on_the_same_gradients_is_a_record_of_its_own() -> None:
    """`pre` with gradients and no backward since: read in the pre-hook, loss NaN."""
    model = two_parts()
    optimizer = SGD(model.parameters(), lr=0.1)
    with GradWatch(model, console=False, rules=()) as watch:
        total(model).backward()
        optimizer.step()
        optimizer.step()
    history = watch.history
    assert history.recorded == 2
    assert history.stat("backward_calls").tolist() == [1, 0]
    np.testing.assert_array_equal(history.stat("grad_norm")[0], history.stat("grad_norm")[1])
    assert np.isnan(history.stat("loss")).tolist() == [False, True]


def test_only_the_scaler_that_was_named_is_heard() -> None:
    model = two_parts()
    optimizer = SGD(model.parameters(), lr=0.1)
    mine, other = torch.amp.GradScaler("cpu", init_scale=8.0), torch.amp.GradScaler("cpu", init_scale=64.0)
    with GradWatch(model, scaler=mine, console=False, rules=()) as watch:
        mine.scale(total(model)).backward()
        other.scale(torch.ones(()))
        mine.step(optimizer)
        mine.update()
    assert watch.history.stat("loss_scale").tolist() == [8.0]


# -- the loss ----------------------------------------------------------------------------------------------------------------------


def losses(tell: Callable[[GradWatch, str, int], None], updates: int = 2) -> tuple[list[float], list[float]]:
    """`tell` is asked before the backward, before the step and after it; gives the losses and how many made each."""
    model = two_parts()
    optimizer = SGD(model.parameters(), lr=0.1)
    with GradWatch(model, console=False, rules=()) as watch:
        for i in range(updates):
            optimizer.zero_grad()
            loss = total(model)
            tell(watch, "before backward", i)
            loss.backward()
            tell(watch, "before step", i)
            optimizer.step()
    return watch.history.stat("loss").tolist(), watch.history.stat("loss_terms").tolist()


@pytest.mark.parametrize("when", ["before backward", "before step"])
def test_a_loss_told_anywhere_in_an_update_is_that_updates(when: str) -> None:
    assert losses(lambda watch, now, i: watch.loss(i + 5.0) if now == when else None) == ([5.0, 6.0], [1, 1])


def test_losses_told_before_and_after_the_backward_have_their_mean() -> None:
    def tell(watch: GradWatch, now: str, i: int) -> None:
        watch.loss(10.0 * i + (1.0 if now == "before backward" else 3.0))

    assert losses(tell) == ([2.0, 12.0], [2, 2])


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(lambda: 2.5, id="float"),
        pytest.param(lambda: torch.tensor(2.5), id="tensor"),
        pytest.param(lambda: torch.tensor(2.5, requires_grad=True) * 1, id="with-a-graph"),
        pytest.param(lambda: torch.tensor([2.5], dtype=torch.float64), id="one-element"),
        pytest.param(lambda: np.float32(2.5), id="numpy"),
    ],
)
def test_a_told_loss_may_be_any_number_and_comes_back(value: Callable[[], Any]) -> None:
    back: list[bool] = []

    def tell(watch: GradWatch, now: str, i: int) -> None:
        given = value()
        back.append(watch.loss(given) is given)

    assert losses(lambda watch, now, i: tell(watch, now, i) if now == "before backward" else None)[0] == [2.5, 2.5]
    assert all(back)


def test_a_told_tensor_keeps_no_graph_alive_and_is_not_changed_later() -> None:
    """`running += loss` in place must not move what was told."""
    running = torch.tensor(1.0)

    def tell(watch: GradWatch, now: str, i: int) -> None:
        if now == "before backward":
            watch.loss(running)
            running.add_(100.0)

    assert losses(tell)[0] == [1.0, 101.0]


# -- what a gradient may be --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_gradient_of_lower_precision_than_its_parameter_is_not_taken_for_a_clipped_one(dtype: torch.dtype) -> None:
    model = nn.Linear(30, 40, bias=False)
    optimizer = SGD(model.parameters(), lr=1e-4)
    expected = []
    with GradWatch(model, console=False, rules=()) as watch:
        for _ in range(4):
            model.weight.grad_dtype = dtype
            model(torch.randn(8, 30)).square().sum().backward()
            assert model.weight.grad is not None
            assert model.weight.grad.dtype is dtype
            expected.append(float(model.weight.grad.double().norm()))
            model.weight.grad_dtype = None
            optimizer.step()
            optimizer.zero_grad()
    np.testing.assert_allclose(watch.history.stat("grad_norm")[:, 0], expected, rtol=1e-5)
    assert watch.history.stat("clip_coef").tolist() == [1.0] * 4
    assert not any(flag & GradState.CLIPPED for flag in flags(watch.history, "weight"))


class Complex(nn.Module):
    """A model in which gradients are conjugated or negated in name only."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.real = nn.Parameter(torch.ones(size))
        self.phase = nn.Parameter(torch.ones(size, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        """Real."""
        y = torch.complex(torch.zeros_like(self.real), self.real).conj()
        z: Tensor = (y * self.phase.conj() * x).real.sum()
        return z


@pytest.mark.parametrize("size", [3, 600, 9000])
def test_gradients_of_a_complex_model_set_by_hand_are_read(size: int) -> None:
    model = Complex(size)
    optimizer = SGD(model.parameters(), lr=0.1)
    expected = []
    with GradWatch(model, console=False, rules=()) as watch:
        for _ in range(3):
            loss = model(torch.randn(size, dtype=torch.complex64))
            for p, gradient in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
                p.grad = gradient
            assert model.real.grad is not None
            assert model.real.grad.is_neg()
            expected.append([float(p.grad.resolve_neg().norm()) for p in model.parameters()])  # type: ignore[union-attr]
            optimizer.step()
    assert watch.notices == ()
    np.testing.assert_allclose(watch.history.stat("grad_norm"), expected, rtol=1e-4)


def test_a_sparse_parameter_does_not_end_the_watch() -> None:
    class Pruned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.mask = nn.Parameter(torch.eye(2).to_sparse(), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.sparse.mm(self.mask, self.linear(x).t())

    model = Pruned()
    optimizer = SGD(model.linear.parameters(), lr=0.1)
    with GradWatch(model, console=False, rules=()) as watch:
        for _ in range(2):
            optimizer.zero_grad()
            total(model).backward()
            optimizer.step()
    assert watch.notices == ()
    assert watch.history.recorded == 2


# -- what a process may be set to --------------------------------------------------------------------------------------------------


def default_dtype() -> Any:
    class Double:
        def __enter__(self) -> None:
            torch.set_default_dtype(torch.float64)

        def __exit__(self, *_: object) -> None:
            torch.set_default_dtype(torch.float32)

    return Double()


AROUND: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "nothing": nullcontext,
    "default-dtype-float64": default_dtype,
    "default-device-meta": lambda: torch.device("meta"),
    "anomaly-mode": lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
    "numpy-raises": lambda: np.errstate(all="raise"),
    "saved-on-cpu": torch.autograd.graph.save_on_cpu,
    "multithreading-off": lambda: torch.autograd.set_multithreading_enabled(False),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
@pytest.mark.parametrize("clip", [None, 0.01], ids=["watched", "clipping"])
def test_the_numbers_do_not_depend_on_what_the_process_is_set_to(around: Callable[[], Any], clip: float | None) -> None:
    model, x = nn.Sequential(nn.Linear(2, 40), nn.Tanh(), nn.Linear(40, 40), nn.Linear(40, 1)), torch.randn(3, 2)

    def run(around: Callable[[], Any]) -> tuple[dict[str, Any], list[Tensor]]:
        copied = copy.deepcopy(model)
        optimizer = SGD(copied.parameters(), lr=0.1)
        with around(), GradWatch(copied, console=False, rules=(), clip=clip) as watch:
            for i in range(12):
                optimizer.zero_grad()
                loss = copied(x).square().mean()
                (loss * {8: NAN, 9: 1e38, 10: 1e-38}.get(i, 1.0)).backward()
                if i == 8:
                    optimizer.zero_grad()
                optimizer.step()
        assert watch.notices == ()
        stats = ("grad_norm", "grad_nonfinite", "weight_norm", "update_ratio", "total_norm", "clip_coef", "loss")
        return {name: watch.history.stat(name) for name in stats}, list(copied.parameters())

    (expected, weights), (got, again) = run(nullcontext), run(around)
    for name, values in expected.items():
        np.testing.assert_array_equal(got[name], values, err_msg=name)
    for one, other in zip(weights, again, strict=True):
        assert torch.equal(one, other) or (one.isnan() == other.isnan()).all()


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad], ids=["inference-mode", "no-grad"])
def test_a_watch_attached_where_nothing_is_recorded_sees_what_comes_after(mode: Callable[[], Any]) -> None:
    model = two_parts()
    optimizer = SGD(model.parameters(), lr=0.1)
    watch = GradWatch(model, console=False, rules=())
    with mode():
        watch.attach()
    for _ in range(2):
        optimizer.zero_grad()
        total(model).backward()
        optimizer.step()
    with mode():
        watch.detach()
    assert watch.notices == ()
    assert watch.history.recorded == 2
    assert np.isfinite(watch.history.stat("update_ratio")).all()


@pytest.mark.parametrize("to", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_model_that_changes_its_precision_in_the_middle_goes_on(to: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 600), nn.Linear(600, 1))
    optimizer = SGD(model.parameters(), lr=1e-3)
    expected = []
    with GradWatch(model, console=False, rules=()) as watch:
        for i in range(6):
            optimizer.zero_grad()
            if i == 3:
                model.to(to)
            dtype = next(model.parameters()).dtype
            total(model, torch.ones(3, 2, dtype=dtype)).backward()
            expected.append([float(p.grad.double().norm()) for p in model.parameters()])  # type: ignore[union-attr]
            optimizer.step()
    assert watch.notices == ()
    assert watch.history.recorded == 6
    np.testing.assert_allclose(watch.history.stat("grad_norm"), expected, rtol=1e-4)
    assert watch.history.stat("clip_coef").tolist() == [1.0] * 6
    assert np.isfinite(watch.history.stat("update_ratio")[[0, 1, 2, 4, 5]]).all()


def test_a_learning_rate_that_is_learned_is_recorded_without_a_warning() -> None:
    model = two_parts()
    optimizer = SGD(model.parameters(), lr=0.1)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.25, requires_grad=True)

    def step_by_hand() -> None:
        """A differentiable optimizer would; torch's own want a number."""

    with GradWatch(model, console=False, rules=()) as watch:
        total(model).backward()
        optimizer.step = torch.optim.Optimizer.profile_hook_step(lambda self, closure=None: step_by_hand()).__get__(optimizer)  # type: ignore[method-assign, attr-defined, misc]
        optimizer.step()
    assert watch.notices == ()
    assert watch.history.stat("lr").tolist() == [[0.25] * 4]


# -- how much is looked at ---------------------------------------------------------------------------------------------------------


def full(history: History, name: str = "weight_norm") -> list[bool]:
    """Which records are full-statistics ones."""
    return (~np.isnan(history.stat(name)).all(axis=1)).tolist()


@pytest.mark.parametrize(
    ("dense", "every", "expected"),
    [
        pytest.param(2, 3, [1, 1, 0, 1, 0, 0, 1, 0, 0, 1], id="dense-2-every-3"),
        pytest.param(0, 4, [1, 0, 0, 0, 1, 0, 0, 0, 1, 0], id="never-dense"),
        pytest.param(0, 1, [1] * 10, id="always"),
        pytest.param(4, 1000, [1, 1, 1, 1, 0, 0, 0, 0, 0, 0], id="only-at-the-start"),
    ],
)
def test_the_rest_is_looked_at_densely_first_and_then_now_and_then(dense: int, every: int, expected: list[int]) -> None:
    model = two_parts()
    optimizer = SGD(model.parameters(), lr=0.01)
    with GradWatch(model, console=False, rules=(), sampling=Sampling(dense=dense, every=every)) as watch:
        for _ in range(10):
            optimizer.zero_grad()
            total(model).backward()
            optimizer.step()
    assert full(watch.history) == [bool(x) for x in expected]
    assert full(watch.history, "update_ratio") == full(watch.history)
    assert not np.isnan(watch.history.stat("grad_norm")).any(), "gradients are read every time"


def test_the_cadence_counts_records_by_their_owners() -> None:
    model = two_parts()
    first, second = (SGD(part.parameters(), lr=0.01) for part in model)
    with GradWatch(model, console=False, rules=(), sampling=Sampling(dense=1, every=3)) as watch:
        for _ in range(7):
            model[0](torch.ones(1, 2)).sum().backward()
            first.step()
            first.zero_grad()
            model[1](torch.ones(1, 3)).sum().backward()
            second.step()
            second.zero_grad()
    turns = full(watch.history)
    assert turns[0::2] == turns[1::2] == [True, False, False, True, False, False, True]
