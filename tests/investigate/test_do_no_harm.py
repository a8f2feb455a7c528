"""To find out where a value was born changes nothing: weights, gradients, buffers, random numbers, and what modules keep."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gradwatch import GradWatch
from gradwatch.capture import private
from tests.investigate.planted import PLANTED, Planted


class Stateful(nn.Module):
    """Dropout, running statistics, a counter, a cache in a list and a tensor that is changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.drop, self.b = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 2)
        self.count, self.cache, self.memory = 0, [], torch.zeros(6)
        self.table: dict[str, Any] = {"last": None}

    def forward(self, x: Tensor, bad: bool) -> Tensor:
        self.count += 1
        self.memory.add_(1.0)
        h = self.drop(self.norm(self.a(x)))
        self.cache.append(h.detach())
        self.table["last"] = h.shape
        noise = torch.rand(len(x), 1) + float(np.random.rand()) + random.random()
        h = h * noise
        return self.b(torch.log(torch.relu(h)) if bad else h)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters())]
    tensors += [value for state in optimizer.state.values() for value in state.values()]
    return [tensor.clone() if isinstance(tensor, Tensor) else tensor for tensor in tensors]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())
    return bool(one == other)


def train(watched: bool) -> tuple[list[Any], Stateful]:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    model = Stateful()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    watch = GradWatch(model, console=False) if watched else None
    if watch is not None:
        watch.attach()
    states = []
    for i in range(8):
        optimizer.zero_grad()
        model(torch.randn(8, 6), i == 4).square().mean().backward()
        states += state_of(model, optimizer)
        if i == 4:  # else nothing but NaN is left to be compared
            optimizer.zero_grad()
        optimizer.step()
    states += [torch.rand(3), float(np.random.rand()), random.random()]
    if watch is not None:
        assert watch.notices == ()
        assert watch.alerts[0].origin is not None or watch.alerts[0].cause.startswith("Not reproduced"), watch.alerts
        watch.detach()
    return states, model


def test_a_replay_changes_nothing() -> None:
    plain, one = train(watched=False)
    watched, other = train(watched=True)
    assert len(plain) == len(watched)
    assert all(same(a, b) for a, b in zip(plain, watched, strict=True))
    assert other.count == one.count
    assert len(other.cache) == len(one.cache)
    assert all(same(a, b) for a, b in zip(one.cache, other.cache, strict=True))
    assert same(one.memory, other.memory)
    assert other.table == one.table


@pytest.mark.filterwarnings("ignore:var")
@pytest.mark.parametrize("bug", [pytest.param(bug, id=bug.name) for bug in PLANTED if bug.name != "equal_eigenvalues"])
def test_training_with_a_planted_bug_is_bit_identical(bug: Planted) -> None:
    def run(watched: bool) -> list[Any]:
        torch.manual_seed(0)
        training = bug.make()
        optimizer = torch.optim.SGD(training.model.parameters(), lr=1e-3, momentum=0.9)
        watch = GradWatch(training.model, console=False) if watched else None
        states = []
        if watch is not None:
            watch.attach()
        for i in range(6):
            optimizer.zero_grad()
            loss = training.loss(i)
            loss.backward()
            if not all(p.grad is None or bool(p.grad.isfinite().all()) for p in training.model.parameters()):
                states += [p.grad for p in training.model.parameters()]
                optimizer.zero_grad()  # the user leaves the update out, so that there is something to be compared later
            optimizer.step()
            states += [loss.detach(), *(p.detach().clone() for p in training.model.parameters()), torch.rand(1)]
        if watch is not None:
            watch.detach()
            assert watch.notices == ()
        return states

    plain, watched = run(watched=False), run(watched=True)
    assert all(same(a, b) for a, b in zip(plain, watched, strict=True))
    assert private.watched_operators() == 0


def test_hooks_on_parameters_are_not_called_again() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    seen, accumulated = [], []
    model[0].weight.register_hook(lambda grad: seen.append(1))  # type: ignore[union-attr]
    model[0].weight.register_post_accumulate_grad_hook(lambda p: accumulated.append(1))  # type: ignore[union-attr]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with GradWatch(model, console=False) as watch:
        for i in range(4):
            optimizer.zero_grad()
            (model(torch.randn(3, 4)) * (torch.inf if i == 2 else 1.0)).mean().backward()
            optimizer.step()
    assert watch.alerts
    assert len(seen) == len(accumulated) == 4


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_leaves_gradients_alone(reentrant: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = checkpoint(self.inner, self.a(x), use_reentrant=reentrant)
            return self.b(h)

        def inner(self, h: Tensor) -> Tensor:
            return self.b(h).abs().sqrt() + (h * 0).abs().sqrt()

    torch.manual_seed(0)
    model = Model()
    with GradWatch(model, console=False) as watch:
        loss = model(torch.randn(3, 4)).mean()
        loss.backward()
        grads = [p.grad for p in model.parameters()]
        assert all(g is not None for g in grads)
        twice = Model()
        twice.load_state_dict(model.state_dict())
    torch.manual_seed(0)
    Model()
    twice(torch.randn(3, 4)).mean().backward()
    assert all(same(a, p.grad) for a, p in zip(grads, twice.parameters(), strict=True))
    assert watch.notices == ()


def test_a_retained_graph_can_go_backward_again() -> None:
    """A replay must not change in place what the graph has saved."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).eval()
    with GradWatch(model, console=False) as watch:
        loss = model(torch.randn(3, 4)).mean() * torch.tensor(torch.inf)
        loss.backward(retain_graph=True)
        loss.backward()
    assert watch.notices == ()


def test_the_optimizer_in_backward_does_not_step_again() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    steps = []
    for p in model.parameters():
        own = torch.optim.SGD([p], lr=0.1)

        def step(p: Tensor, own: torch.optim.Optimizer = own) -> None:
            steps.append(1)
            own.step()
            own.zero_grad()

        p.register_post_accumulate_grad_hook(step)
    with GradWatch(model, console=False):
        for i in range(4):
            (model(torch.randn(3, 4)) * (torch.inf if i == 2 else 1.0)).mean().backward()
    assert len(steps) == 16


def test_a_model_that_raises_when_it_runs_again_ends_nothing() -> None:
    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1)
            self.allowed, self.scale = True, 1.0

        def forward(self, x: Tensor) -> Tensor:
            if not self.allowed:
                raise RuntimeError("only once an update")
            self.allowed = False
            return self.layer(x) * x.new_tensor(self.scale)

    model = Once()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with GradWatch(model, console=False) as watch:
        for i in range(4):
            model.allowed, model.scale = True, torch.nan if i == 2 else 1.0
            optimizer.zero_grad()
            model(torch.randn(3, 4)).mean().backward()
            optimizer.step()
    assert watch.notices == ()
    assert "could not be run again (RuntimeError: only once an update)" in watch.alerts[0].cause


@pytest.mark.parametrize("how", ["block", "exception", "detach"])
def test_no_mode_is_left_on_the_stack(how: str) -> None:
    """While the watch is armed, it watches operators from the forward pass on; whatever happens then, it is out at the end."""
    model = nn.Linear(4, 2)
    watch = GradWatch(model, console=False, on_nonfinite="skip")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def bad_update() -> None:
        optimizer.zero_grad()
        out = model(torch.randn(3, 4))
        (torch.sqrt((out - out.detach()).square()).sum() + torch.acos(out * 0).sum() ** 0.5).backward()
        optimizer.step()

    class Stop(Exception):
        pass

    try:
        with watch:
            bad_update()
            model(torch.randn(3, 4))
            assert private.watched_operators() == 1
            if how == "exception":
                raise Stop
            if how == "detach":
                watch.detach()
                assert private.watched_operators() == 0
    except Stop:
        pass
    assert private.watched_operators() == 0
    assert watch.notices == ()


def test_somebody_elses_mode_on_top_is_left_alone() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with GradWatch(model, console=False, on_nonfinite="skip") as watch:

        def update(bad: bool, counter: Any = None) -> None:
            optimizer.zero_grad()
            out = model(torch.randn(3, 4))
            if counter is not None:
                counter.__enter__()
            term = (out - out.detach()).square() if bad else out.square() + 1
            (torch.sqrt(term).sum() + torch.acos(out * 0).sum() ** 0.5).backward()
            if counter is not None:
                counter.__exit__(None, None, None)
            optimizer.step()

        update(bad=True)
        counter = FlopCounterMode(display=False)
        update(bad=False, counter=counter)
        assert counter.get_total_flops() > 0
        update(bad=False)
        update(bad=True)
    assert private.watched_operators() == 0
    assert watch.notices == ()


HEALTHY: dict[str, Callable[[Tensor], Tensor]] = {
    "a mask of -inf": lambda x: torch.softmax((x @ x.T).masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf), -1) @ x,
    "masked constants": lambda x: torch.where(x > 0, x, torch.tensor(torch.inf)).clamp(max=5.0),
    "a float mask": lambda x: torch.softmax(x @ x.T + torch.full((len(x), len(x)), -torch.inf).triu(1), -1) @ x,
    "log of a mask": lambda x: torch.softmax(x @ x.T + torch.ones(len(x), len(x)).tril().log(), -1) @ x,
    "nothing": lambda x: x,
}


@pytest.mark.parametrize("middle", HEALTHY.values(), ids=list(HEALTHY))
def test_nothing_is_run_again_in_health(middle: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("gradwatch.investigate.inquest.investigate", lambda *args: asked.append(args))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(middle(torch.tanh(self.a(x))))

    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with GradWatch(model, console=False) as watch:
        for _ in range(20):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(6, 4)), torch.arange(6) % 3).backward()
            optimizer.step()
    assert not asked
    assert not [alert for alert in watch.alerts if alert.severity >= 30]


def test_a_scaler_that_searches_its_scale_asks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("gradwatch.investigate.inquest.investigate", lambda *args: asked.append(args))
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    with GradWatch(model, console=False) as watch:
        for _ in range(12):
            optimizer.zero_grad()
            scaler.scale(model(torch.randn(8, 4) * 30).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
    assert scaler.get_scale() < 2.0**127
    assert not asked
    assert not [alert for alert in watch.alerts if alert.severity >= 30]


def test_what_is_held_is_let_go_when_the_update_closes() -> None:
    import gc
    import weakref

    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with GradWatch(model, console=False) as watch:
        for _ in range(3):
            x = torch.randn(3, 4)
            ref = weakref.ref(x)
            optimizer.zero_grad()
            model(x).mean().backward()
            optimizer.step()
            del x
            gc.collect()
            assert ref() is None
        # An evaluation that nobody put under no_grad holds no more than the last calls, and no graph.
        for _ in range(200):
            model(torch.randn(3, 4))
        assert watch._recorder is not None
        assert len(watch._recorder.held.calls) <= 64


def test_large_inputs_of_many_forward_passes_are_not_held() -> None:
    model = nn.Linear(1024, 1)
    with GradWatch(model, console=False) as watch:
        for _ in range(10):
            model(torch.zeros(8192, 1024))  # 32 MB
        assert watch._recorder is not None
        assert len(watch._recorder.held.calls) <= 3


class Keeper:
    """Somebody's helper object."""

    def __init__(self) -> None:
        self.count, self.seen = 0, []


class Registry(dict):  # type: ignore[type-arg]
    """As `transformers` has one: what it says of itself is not what it holds."""

    def get(self, key: str) -> None:  # type: ignore[override]
        return None


class Everything(nn.Module):
    """Keeps state wherever a module can."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.counter: Counter[str] = Counter(a=3)
        self.ordered: OrderedDict[str, int] = OrderedDict(x=1, y=2)
        self.many: defaultdict[str, list[int]] = defaultdict(list)
        self.generator = torch.Generator().manual_seed(3)
        self.numpy = np.random.default_rng(4)
        self.old = np.random.RandomState(5)
        self.python = random.Random(6)
        self.array = np.zeros(3)
        self.helper = Keeper()
        self.registry = Registry(a=1)
        self.plain = [nn.BatchNorm1d(4)]
        self.long = list(range(20_000))
        self.user_hooks: list[int] = []
        self.window: deque[int] = deque(maxlen=3)

    def forward(self, batch: Any, bad: bool) -> Tensor:
        self.counter["a"] += 1
        self.ordered.move_to_end("x")
        self.many["new"].append(1)
        noise = torch.rand(1, generator=self.generator) + self.numpy.random() + self.old.rand() + self.python.random()
        self.array += 1
        self.helper.count += 1
        self.registry["a"] += 1
        self.helper.seen.append(1)
        self.long.append(1)
        self.user_hooks.append(1)
        self.window.append(self.counter["a"])
        batch.x.mul_(1.0)
        batch.extra["n"] = batch.extra.get("n", 0) + 1
        h = self.plain[0](self.layer(batch.x * 1.0)) * float(noise)
        return torch.log(torch.relu(h)) if bad else h


class Batch:
    def __init__(self, x: Tensor) -> None:
        self.x, self.extra = x, UserDict()  # type: ignore[var-annotated]


def everything(watched: bool) -> list[Any]:
    torch.manual_seed(0)
    model = Everything()
    outputs: list[int] = []
    model.layer.register_forward_hook(lambda module, args, output: outputs.append(1))
    parameters = [*model.parameters(), *model.plain[0].parameters()]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    watch = GradWatch(model, console=False)
    if watched:
        watch.attach()
    batches = []
    for i in range(5):
        batches.append(Batch(torch.randn(8, 4)))
        optimizer.zero_grad()
        model(batches[-1], i == 3).square().mean().backward()
        if i == 3:
            optimizer.zero_grad()
        optimizer.step()
    if watched:
        assert watch.notices == ()
        assert watch.alerts[0].step == 3
        watch.detach()
    helper = model.helper
    state: list[Any] = [dict(model.counter), list(model.ordered), dict(model.many), helper.count, len(helper.seen), len(model.long)]
    state += [
        dict(model.registry),
        len(model.user_hooks),
        list(model.window),
        len(outputs),
        [dict(batch.extra) for batch in batches],
        list(vars(model)),
    ]
    state += [model.array.tolist(), model.numpy.random(), model.old.rand(), model.python.random()]
    state += [torch.rand(1, generator=model.generator), *model.plain[0].state_dict().values(), *model.state_dict().values()]
    return state


def test_whatever_a_model_keeps_is_put_back() -> None:
    for plain, watched in zip(everything(watched=False), everything(watched=True), strict=True):
        assert same(plain, watched), (plain, watched)


def test_an_iterator_is_not_used_up() -> None:
    class Pulls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, batches: Any) -> Tensor:
            return self.layer(next(batches)).div(0.0)

    model = Pulls()
    batches = iter([torch.randn(3, 4) for _ in range(3)])
    with GradWatch(model, console=False) as watch:
        model(batches).sum().backward()
        assert len(list(batches)) == 2
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert "iterator" in watch.alerts[0].cause


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tracing_cannot_end_a_training() -> None:
    """Operators that nobody here has met run on while they are traced."""
    from torch._subclasses import FakeTensorMode

    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    adjacency = torch.eye(3).to_sparse() * torch.inf
    with GradWatch(model, console=False, on_nonfinite="skip") as watch:
        for i in range(4):
            optimizer.zero_grad()
            out = model(torch.randn(3, 4))
            loss = torch.sqrt((out - (out.detach() if i == 0 else 1.0)).square()).sum() + torch.acos(out * 0).sum() ** 0.5
            if i:
                torch.sparse.mm(adjacency, out)
                torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]).to_padded_tensor(0.0)
                with FakeTensorMode():
                    torch.ones(3).sum()
            loss.backward()
            optimizer.step()
    assert private.watched_operators() == 0
    assert watch.notices == ()


def test_a_graph_is_let_go_when_its_backward_raises() -> None:
    import gc
    import weakref

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1.0

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            raise ValueError("no")

    model = nn.Linear(4, 2)
    with GradWatch(model, console=False):
        x = torch.randn(3, 4)
        ref = weakref.ref(x)
        loss = torch.log(Fails.apply(model(x)).sum() * 0)
        with pytest.raises(ValueError, match="no"):
            loss.backward()
        del loss, x
        for _ in range(3):
            model(torch.randn(3, 4)).sum().backward()
        gc.collect()
        assert ref() is None


def test_of_a_huge_list_next_to_nothing_is_looked_at() -> None:
    class Ids(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: Tensor, ids: list[int]) -> Tensor:
            return self.layer(x)

    visited = []

    class Number(int):
        @property
        def __class__(self) -> type:  # asked by every isinstance
            visited.append(1)
            return int

    model = Ids()
    ids: list[int] = [Number(i) for i in range(50_000)]
    with GradWatch(model, console=False):
        model(torch.randn(3, 4), ids).sum().backward()
    assert len(visited) < 20_000
