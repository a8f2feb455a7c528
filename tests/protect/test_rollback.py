"""Going back to a kept state: a training that was rolled back against the same training that never went on."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import LBFGS, NAdam, Optimizer, RMSprop, SparseAdam
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau
from torch.utils._python_dispatch import TorchDispatchMode

from gradwatch.protect.rollback import GoodStates
from tests.capture.tensors import DTYPES, LAYOUTS, made
from tests.networks import NETWORKS, Training, fingerprint, random_states
from tests.traces import changed


@dataclass
class Loop:
    """A training that rolls back: what is kept of it beside the model."""

    model: nn.Module
    optimizer: Optimizer
    scaler: Any = None
    scheduler: Any = None

    def __post_init__(self) -> None:
        self.states = GoodStates({"": self.model}, () if self.scheduler is None else [self.scheduler])

    def keep(self, step: int) -> None:
        self.states.keep(step, [self.optimizer], [] if self.scaler is None else [self.scaler], {})

    def update(self, i: int) -> None:
        """One turn, over the batch of that number; LBFGS evaluates its closure several times."""
        generator = torch.Generator().manual_seed(i)
        x, y = torch.randn(6, 4, generator=generator), torch.randn(6, 1, generator=generator)

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = (self.model(x) - y).square().mean()
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            return loss

        if isinstance(self.optimizer, LBFGS):
            self.optimizer.step(closure)  # type: ignore[arg-type]
        else:
            loss = closure()
            if self.scaler is None:
                self.optimizer.step()
            else:
                self.scaler.step(self.optimizer)
                self.scaler.update()
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(float(loss.detach()))
        elif self.scheduler is not None:
            self.scheduler.step()

    def run(self, first: int, last: int) -> None:
        for i in range(first, last):
            self.update(i)

    def bits(self) -> dict[str, object]:
        bits = fingerprint(Training(self.model, (self.optimizer,), self.update))
        bits |= {f"buffer.{name}": buffer.tolist() for name, buffer in self.model.named_buffers()}
        for what in (self.scaler, self.scheduler):
            bits |= {} if what is None else {f"{type(what).__name__}.{key}": value for key, value in what.state_dict().items()}
        return bits


def network() -> nn.Module:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1))


def loop(make: Callable[[Any], Optimizer] = torch.optim.AdamW) -> Loop:
    model = network()
    return Loop(model, make(model.parameters()))


def same(expected: dict[str, object], got: dict[str, object]) -> None:
    """Equal to the bit, but for gradients, which a rollback takes away."""
    differing = [name for name in changed(expected, got) if not name.startswith("grad.")]
    assert not differing, sorted(differing)


class Drifting(Optimizer):
    """Third party: wide moments of narrow weights, a string, a counter that its first step adds to the group, state under no parameter."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.05, "anchor": torch.tensor(0.5)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.state["all"]["mode"] = "late" if self.state["all"].get("mode") else "early"
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            group["anchor"].mul_(0.9)
            for p in group["params"]:
                state = self.state[p]
                state["m"] = state.get("m", torch.zeros_like(p, dtype=torch.float64)) * 0.9 + p.grad  # another tensor each time
                state.setdefault("history", []).append((group["k"], state["m"]))
                p.sub_(state["m"].to(p.dtype), alpha=group["lr"] * float(group["anchor"]))


class Enclosed(Optimizer):
    """Third party: keeps its state in a place of its own, and says so."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.05})
        self.mean = [torch.zeros_like(p) for p in self.param_groups[0]["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p, mean in zip(self.param_groups[0]["params"], self.mean, strict=True):
            mean.mul_(0.9).add_(p.grad)
            p.sub_(mean, alpha=self.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "mean": self.mean}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "mean"})
        self.mean = list(state_dict["mean"])


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adam-lr-tensor": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01)),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "rmsprop": lambda p: RMSprop(p, lr=0.01, centered=True, momentum=0.5),
    "nadam": lambda p: NAdam(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "lbfgs": lambda p: LBFGS(p, lr=0.1, max_iter=3, history_size=4),
    "drifting": Drifting,
    "enclosed": Enclosed,
}

EVERY_OPTIMIZER = pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in OPTIMIZERS.items()])


# -- exactly -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [0, 1, 4], ids=["fresh", "one-update", "four-updates"])
@EVERY_OPTIMIZER
def test_what_comes_after_a_rollback_comes_out_as_the_first_time(make: Callable[[Any], Optimizer], before: int) -> None:
    training = loop(make)
    training.run(0, before)
    training.keep(before)
    kept = training.bits()
    training.run(before, before + 5)
    first = training.bits()
    assert changed(kept, first)
    for _ in range(2):  # a state can be put back again
        assert training.states.restore().step == before
        same(kept, training.bits())
        assert all(p.grad is None for p in training.model.parameters())
        training.run(before, before + 5)
        assert not changed(first, training.bits())


@pytest.mark.parametrize("name", NETWORKS)
def test_every_make_of_network_goes_back(name: str) -> None:
    training = NETWORKS[name]()
    states = GoodStates(training.modules())
    training.run(2)
    states.keep(2, training.optimizers, [], {})
    kept = fingerprint(training)
    training.run(3, start=2)
    first = fingerprint(training)
    states.restore()
    same(kept, fingerprint(training))
    training.run(3, start=2)
    same(first, fingerprint(training))


def test_keeping_changes_nothing() -> None:
    bare = loop()
    bare.run(0, 6)
    expected = bare.bits()
    kept = loop()
    for i in range(6):
        kept.keep(i)
        kept.update(i)
    assert not changed(expected, kept.bits())


def test_a_training_that_diverged_goes_on_with_a_lower_lr_as_if_it_had_not() -> None:
    good = loop(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    good.run(0, 3)
    good.optimizer.param_groups[0]["lr"] = 0.01
    good.run(3, 6)
    expected = good.bits()
    training = loop(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    training.run(0, 3)
    training.keep(3)
    training.optimizer.param_groups[0]["lr"] = 1e4
    training.run(3, 12)
    assert not torch.isfinite(training.model.get_parameter("4.weight")).all()
    training.states.restore()
    training.optimizer.param_groups[0]["lr"] = 0.01
    training.run(3, 6)
    assert not changed(expected, training.bits())


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda o: CosineAnnealingLR(o, 20), id="cosine"),
        pytest.param(lambda o: OneCycleLR(o, max_lr=0.1, total_steps=30), id="one-cycle"),
        pytest.param(lambda o: ReduceLROnPlateau(o, patience=1), id="plateau"),
    ],
)
def test_a_scheduler_goes_back(make: Callable[[Optimizer], Any]) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    training = Loop(model, optimizer, scheduler=make(optimizer))
    training.run(0, 3)
    training.keep(3)
    training.run(3, 12)
    first = training.bits()
    training.states.restore()
    training.run(3, 12)
    assert not changed(first, training.bits())


def test_a_scaler_goes_back_with_its_scale_and_its_count() -> None:
    model = network()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
    training = Loop(model, torch.optim.SGD(model.parameters(), lr=0.1), scaler=scaler)
    training.keep(0)
    training.run(0, 4)
    training.keep(4)
    assert scaler.state_dict()["scale"] == 8.0
    assert scaler.state_dict()["_growth_tracker"] == 1
    training.run(4, 9)
    first = training.bits()
    assert scaler.state_dict()["scale"] == 32.0
    training.states.restore()
    assert (scaler.state_dict()["scale"], scaler.state_dict()["_growth_tracker"]) == (8.0, 1)
    training.run(4, 9)
    assert not changed(first, training.bits())
    training.states.restore(before=1)
    assert (scaler.state_dict()["scale"], scaler.state_dict()["_growth_tracker"]) == (4.0, 0)


def test_a_scaler_forgets_the_update_that_an_exception_broke_off() -> None:
    """It would step by gradients that are still multiplied by the scale."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training = Loop(model, optimizer, scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    training.run(0, 2)
    training.keep(2)
    training.update(2)
    first = training.bits()

    def refuse(*_: Any) -> None:
        raise ValueError("not this step")

    handle = optimizer.register_step_pre_hook(refuse)
    with pytest.raises(ValueError, match="not this step"):
        training.update(3)
    handle.remove()
    training.states.restore()
    training.update(2)
    assert not changed(first, training.bits())


def test_a_disabled_scaler_is_no_hindrance() -> None:
    model = network()
    training = Loop(model, torch.optim.SGD(model.parameters(), lr=0.1), scaler=torch.amp.GradScaler("cpu", enabled=False))
    training.keep(0)
    kept = training.bits()
    training.run(0, 2)
    training.states.restore()
    same(kept, training.bits())


def test_an_empty_state_is_not_loaded_into_a_scaler_that_wants_more() -> None:
    class Demanding:
        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            raise RuntimeError("The source state dict is empty")

    model = network()
    states = GoodStates({"": model})
    states.keep(0, [], [Demanding()], {})
    assert states.restore().step == 0


def test_random_numbers_of_all_three_generators_come_again() -> None:
    training = loop()

    def draw() -> tuple[object, ...]:
        return torch.rand(3).tolist(), torch.randn(1).item(), np.random.rand(3).tolist(), np.random.randn(), random.random()

    draw()
    random.gauss(0, 1)  # of the pair, one is left over
    before = random_states()
    training.keep(0)
    assert random_states() == before
    first = draw()
    assert draw() != first
    training.states.restore()
    assert draw() == first


def test_a_sparse_embedding_goes_back() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(20, 3, sparse=True)
    optimizer = SparseAdam(table.parameters(), lr=0.1)

    def update(i: int) -> None:
        optimizer.zero_grad()
        table(torch.tensor([i, i + 1, i])).square().sum().backward()
        optimizer.step()

    training = Training(table, (optimizer,), update)
    states = GoodStates({"": table})
    for before in (0, 3):
        states.keep(before, [optimizer], [], {})
        kept = fingerprint(training)
        training.run(4, start=before)
        first = fingerprint(training)
        states.restore()
        same(kept, fingerprint(training))
        training.run(4, start=before)
        assert not changed(first, fingerprint(training))
        states.restore()
        training.run(3 - before, start=before)


def test_several_models_and_optimizers_go_back_together() -> None:
    models = {"one": network(), "two": network()}
    optimizers = [torch.optim.AdamW(models["one"].parameters()), torch.optim.SGD(models["two"].parameters(), lr=0.1, momentum=0.9)]
    loops = [Loop(model, optimizer) for model, optimizer in zip(models.values(), optimizers, strict=True)]
    states = GoodStates(models)
    states.keep(0, optimizers, [], {})
    kept = [one.bits() for one in loops]
    for one in loops:
        one.run(0, 3)
    states.restore()
    for expected, one in zip(kept, loops, strict=True):
        same(expected, one.bits())


def test_a_parameter_that_only_an_optimizer_owns_goes_back() -> None:
    model = nn.Linear(4, 1)
    log_sigma = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.AdamW([*model.parameters(), log_sigma], lr=0.1)
    states = GoodStates({"": model})
    states.keep(0, [optimizer], [], {})
    (model(torch.ones(2, 4)).square().mean() * log_sigma.exp()).backward()
    optimizer.step()
    assert log_sigma.item() != 0
    states.restore()
    assert log_sigma.item() == 0
    assert log_sigma.grad is None


def test_moments_that_load_state_dict_would_narrow_come_back_whole() -> None:
    model = network().to(torch.bfloat16)
    optimizer = Drifting(model.parameters())
    for p in model.parameters():
        p.grad = torch.full_like(p, 1 / 3)
    states = GoodStates({"": model})
    optimizer.step()
    optimizer.step()
    first = optimizer.param_groups[0]["params"][0]
    moment = optimizer.state[first]["m"].clone()
    assert not torch.equal(moment, moment.to(torch.bfloat16))
    states.keep(2, [optimizer], [], {})
    optimizer.step()
    states.restore()
    state = optimizer.state[first]
    assert torch.equal(state["m"], moment)
    assert [k for k, _ in state["history"]] == [1, 2]
    assert state["history"][-1][1] is state["m"], "one tensor in two places is one tensor again"
    assert optimizer.state["all"] == {"mode": "late"}  # type: ignore[index]


class Linked(Enclosed):
    """Third party: its steps work on what its `load_state_dict` has set up."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.linked = self.state["linked"] = self.mean


def test_what_an_optimizer_sets_up_when_it_loads_is_left_alone() -> None:
    training = loop(Linked)
    training.run(0, 2)
    training.keep(2)
    training.run(2, 3)
    training.states.restore()
    optimizer = training.optimizer
    assert isinstance(optimizer, Linked)
    assert optimizer.state["linked"] is optimizer.linked  # type: ignore[index]


def test_what_hooks_add_to_the_state_of_an_optimizer_goes_back_as_well() -> None:
    training = loop()
    counted = {"n": 0}
    training.optimizer.register_state_dict_post_hook(lambda _, state: {**state, "n": counted["n"]})
    training.optimizer.register_load_state_dict_pre_hook(lambda _, state: counted.update(n=state["n"]))
    training.run(0, 2)
    counted["n"] = 2
    training.keep(2)
    moments = {id(v) for state in training.optimizer.state.values() for v in state.values()}
    kept = training.bits()
    training.run(2, 4)
    counted["n"] = 4
    training.states.restore()
    assert counted["n"] == 2
    same(kept, training.bits())
    assert {id(v) for state in training.optimizer.state.values() for v in state.values()} == moments


class Scaled(nn.Module):
    """A module with state of its own kind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.amax: list[float] = []
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.amax.append(float(x.abs().max()))
        self.calls += 1
        out: Tensor = self.linear(x)
        return out

    def get_extra_state(self) -> Any:
        return {"amax": self.amax}

    def set_extra_state(self, state: Any) -> None:
        self.amax = state["amax"]


def test_extra_state_goes_back_and_other_attributes_do_not() -> None:
    model = Scaled()
    training = Loop(model, torch.optim.SGD(model.parameters(), lr=0.1))
    training.run(0, 2)
    training.keep(2)
    amax = list(model.amax)
    training.run(2, 4)
    model.eval()
    model.linear.bias.requires_grad_(False)
    for _ in range(2):
        training.states.restore()
        assert model.amax == amax
        model.amax.append(0.0)
    assert model.calls == 4
    assert not model.training
    assert not model.linear.bias.requires_grad


def test_the_state_of_the_watch_is_copied_both_ways() -> None:
    training = loop()
    watch: dict[str, Any] = {"history": {"loss": torch.tensor([1.0, 2.0])}, "incidents": [{"step": 3}], "count": 7}
    training.states.keep(3, [], [], watch)
    expected = copy.deepcopy(watch)
    watch["history"]["loss"].zero_()
    watch["incidents"].clear()
    for _ in range(2):
        kept = training.states.restore()
        assert kept.step == 3
        assert kept.watch["history"]["loss"].tolist() == [1.0, 2.0]
        assert {key: kept.watch[key] for key in ("incidents", "count")} == {key: expected[key] for key in ("incidents", "count")}
        kept.watch["history"]["loss"].zero_()
        kept.watch["incidents"].clear()


# -- in place ----------------------------------------------------------------------------------------------------------------------


@EVERY_OPTIMIZER
def test_tensors_are_the_same_objects_in_the_same_memory(make: Callable[[Any], Optimizer]) -> None:
    training = loop(make)
    training.run(0, 2)

    def objects() -> dict[str, tuple[int, int]]:
        found: dict[str, Any] = dict(training.model.named_parameters()) | dict(training.model.named_buffers())
        found |= {f"group.{key}": value for key, value in training.optimizer.param_groups[0].items() if isinstance(value, Tensor)}
        if not isinstance(training.optimizer, (LBFGS, Drifting, Enclosed)):  # these make new ones as they go
            for i, state in enumerate(training.optimizer.state.values()):
                found |= {f"state.{i}.{key}": value for key, value in state.items() if isinstance(value, Tensor)}
        return {name: (id(tensor), tensor.data_ptr()) for name, tensor in found.items()}

    before = objects()
    state, group = training.optimizer.state, training.optimizer.param_groups[0]
    training.keep(2)
    training.run(2, 5)
    training.states.restore()
    assert objects() == before
    if not isinstance(training.optimizer, Enclosed):
        assert training.optimizer.state is state
        assert training.optimizer.param_groups[0] is group


def test_views_ties_and_foreign_references_see_the_old_values() -> None:
    torch.manual_seed(0)
    first, last = nn.Linear(4, 4), nn.Linear(4, 4)
    last.weight = first.weight
    model = nn.Sequential(first, nn.Tanh(), last, nn.LSTM(4, 2))
    row, weight = first.weight.detach()[0], first.weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    states = GoodStates({"": model})
    states.keep(0, [optimizer], [], {})
    kept = row.clone()
    model(torch.ones(2, 4))[0].sum().backward()
    optimizer.step()
    assert not torch.equal(row, kept)
    states.restore()
    assert torch.equal(row, kept)
    assert last.weight is first.weight is weight
    assert weight.requires_grad
    assert weight.is_leaf


def test_a_graph_from_before_the_restore_raises_in_its_backward() -> None:
    training = loop(lambda p: torch.optim.SGD(p, lr=0.1))
    training.model.eval()
    training.keep(0)
    loss = training.model(torch.ones(2, 4, requires_grad=True)).sum()
    training.states.restore()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Buffers(nn.Module):
    """Every kind of buffer, and one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("in_place", torch.zeros(3))
        self.register_buffer("hidden", torch.zeros(3), persistent=False)
        self.register_buffer("anew", torch.zeros(2))
        self.register_buffer("batch", torch.zeros(2))
        self.register_buffer("later", None)
        self.register_buffer("gone", torch.full((2,), 7.0))
        self.register_buffer("wide", torch.zeros(1).expand(5))
        self.register_buffer("sparse", torch.eye(3).to_sparse())
        self.register_buffer("grown", torch.zeros(2))
        self.register_buffer("counter", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        self.in_place.add_(1)
        self.hidden.add_(1)
        self.anew = self.anew * self.weight + 1  # with a graph
        self.batch = x
        self.later = x.clone()
        self.gone = None
        self.wide[:1].add_(1)
        self.sparse = (self.sparse * 2).coalesce()
        self.grown = torch.cat((self.grown, x))
        self.counter += 1
        return (self.weight * x).sum()


def test_buffers_go_back_however_they_change() -> None:
    model = Buffers()
    data = torch.arange(8.0).view(4, 2)
    model(data[0])
    model.gone = torch.full((2,), 7.0)
    states = GoodStates({"": model})
    states.keep(1, [], [], {})
    kept = {name: None if buffer is None else buffer.to_dense().detach().clone() for name, buffer in model._buffers.items()}
    stayed = {name: model._buffers[name] for name in ("in_place", "hidden", "wide", "counter")}
    model(data[1])
    model(data[2])
    for _ in range(2):
        states.restore()
        for name, buffer in model._buffers.items():
            expected = kept[name]
            assert (buffer is None) == (expected is None)
            if buffer is not None and expected is not None:
                assert torch.equal(buffer.to_dense(), expected), name
                assert buffer.grad_fn is None, name
        assert all(model._buffers[name] is tensor for name, tensor in stayed.items())
        assert torch.equal(data, torch.arange(8.0).view(4, 2)), "a batch that stands in a buffer is the user's"
        assert set(model.state_dict()) == {"weight", *(name for name in model._buffers if name != "hidden")}
        model(data[3])


def memory(tensor: Tensor) -> bytes:
    """Its elements as they are in memory, in order."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.bool, torch.float8_e4m3fn], ids=str)
def test_memory_of_every_layout_and_dtype_goes_back(dtype: torch.dtype, layout: str) -> None:
    shape = {"expanded": (12,), "channels-last": (2, 3, 4, 5)}.get(layout, (3, 4))
    tensor = made(shape, dtype if dtype in DTYPES else torch.float32, "contiguous", 0)
    tensor = LAYOUTS[layout](tensor).detach()
    if dtype not in DTYPES:
        tensor = tensor.to(dtype)
    model = nn.Module()
    model.register_buffer("buffer", tensor)
    states = GoodStates({"": model})
    expected, stride = memory(tensor), tensor.stride()
    states.keep(0, [], [], {})
    (tensor[:1] if layout == "expanded" else tensor).zero_()
    assert memory(tensor) != expected
    states.restore()
    assert model.buffer is tensor
    assert tensor.stride() == stride
    assert memory(tensor) == expected
    del tensor
    model.buffer = None
    states.restore()
    assert model.buffer.dtype is dtype
    assert memory(model.buffer) == expected
    if layout in ("contiguous", "transposed", "channels-last"):
        assert model.buffer.stride() == stride


@pytest.mark.parametrize("kind", ["coo", "csr"])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")
def test_sparse_tensors_go_back(kind: str) -> None:
    def sparse(values: Tensor) -> Tensor:
        return values.to_sparse() if kind == "coo" else values.to_sparse_csr()

    values = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    model = nn.Module()
    model.weight = nn.Parameter(sparse(values))
    model.register_buffer("changed", sparse(values))
    model.register_buffer("another", sparse(values))
    weight = model.weight
    states = GoodStates({"": model})
    states.keep(0, [], [], {})
    for _ in range(2):
        with torch.no_grad():
            weight.mul_(3) if kind == "csr" else weight.copy_(torch.ones(2, 2).to_sparse())
        model.changed.resize_as_sparse_(sparse(torch.ones(2, 2)))  # as many values as another has
        model.another = sparse(torch.ones(2, 2))
        states.restore()
        assert model.weight is weight
        assert all(torch.equal(t.to_dense(), values) for t in (weight.detach(), model.changed, model.another))
        assert weight.layout is model.changed.layout is model.another.layout is sparse(values).layout


def test_parameters_of_inference_mode_go_back() -> None:
    with torch.inference_mode():
        model = nn.Linear(2, 2)
        states = GoodStates({"": model})
        states.keep(0, [], [], {})
    before = model.weight.tolist()
    for step in (1, 2):
        states.keep(step, [], [], {})
    with torch.inference_mode():
        model.weight.zero_()
    states.restore()
    assert model.weight.tolist() == before
    with torch.inference_mode():
        model.weight.zero_()
        states.restore()
    assert model.weight.tolist() == before


def test_under_inference_mode_autocast_and_a_default_device_the_copies_are_ordinary() -> None:
    training = loop()
    training.run(0, 1)
    with torch.inference_mode(), torch.autocast("cpu"), torch.device("meta"):
        training.keep(-1)
        training.keep(0)
    training.keep(1)  # written over what was got under inference mode
    kept = training.bits()
    training.run(1, 3)
    first = training.bits()
    with torch.inference_mode(), torch.autocast("cpu"), torch.device("meta"):
        training.states.restore()
    same(kept, training.bits())
    training.run(1, 3)
    assert not changed(first, training.bits())


def test_inside_autocast_the_weights_that_were_given_up_are_not_in_its_cache() -> None:
    model = nn.Linear(4, 4)
    states = GoodStates({"": model})
    x = torch.ones(1, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states.keep(0, [], [], {})
        with torch.no_grad():
            model.weight.zero_()
        assert torch.equal(model(x), model.bias.bfloat16()[None])
        states.restore()
        assert not torch.equal(model(x), model.bias.bfloat16()[None])


def test_memory_that_was_moved_is_written_to_where_it_is_now() -> None:
    training = loop()
    weight = training.model.get_parameter("0.weight")
    before = weight.detach().clone()
    training.keep(0)
    weight.data = torch.zeros_like(weight)
    training.states.restore()
    assert torch.equal(weight, before)


# -- two states --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "step"),
    [
        pytest.param(None, 20, id="newest"),
        pytest.param(100, 20, id="all"),
        pytest.param(20, 10, id="not-the-same-step"),
        pytest.param(11, 10, id="older"),
        pytest.param(10, 10, id="oldest-there-is"),
        pytest.param(0, 10, id="before-all"),
    ],
)
def test_the_newest_state_before_a_step_is_put_back(before: int | None, step: int) -> None:
    training = loop()
    kept = {}
    for i in (0, 10, 20):
        training.keep(i)
        kept[i] = training.bits()
        training.update(i)
    assert training.states.steps == (10, 20)
    assert training.states.restore(before).step == step
    same(kept[step], training.bits())
    assert training.states.steps == tuple(i for i in (10, 20) if i <= step), "what came later belongs to what was given up"


def test_states_of_a_training_that_was_given_up_are_forgotten() -> None:
    training = loop()
    for i in (10, 20):
        training.keep(i)
    training.keep(15)
    assert training.states.steps == (10, 15)
    training.keep(10)
    assert training.states.steps == (10,)


def test_nothing_kept_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r"none has been kept yet.*load a checkpoint"):
        loop().states.restore()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.one_of(st.just("keep"), st.just("train"), st.integers(0, 12)), min_size=1, max_size=14))
def test_any_order_of_keeping_training_and_going_back(acts: list[str | int]) -> None:
    """Against deep copies and a list of at most two."""
    training = loop()
    kept: list[tuple[int, dict[str, object]]] = []
    step = 0
    for act in acts:
        if act == "keep":
            training.keep(step)
            kept = [*(one for one in kept if one[0] < step), (step, training.bits())][-2:]
        elif act == "train":
            training.update(step)
            step += 1
        elif kept:
            chosen = ([one for one in kept if one[0] < act] or kept[:1])[-1]
            kept = [one for one in kept if one[0] <= chosen[0]]
            step = training.states.restore(act).step  # type: ignore[arg-type]
            assert step == chosen[0]
            same(chosen[1], training.bits())
        assert training.states.steps == tuple(one[0] for one in kept)


# -- what cannot go back -----------------------------------------------------------------------------------------------------------


def replaced(training: Loop) -> None:
    training.model[0].weight = nn.Parameter(torch.zeros(8, 4))  # type: ignore[index]


def untied(training: Loop) -> None:
    training.model[2] = nn.Linear(8, 8)  # type: ignore[operator]


def reshaped(training: Loop) -> None:
    training.model.get_parameter("0.weight").data = torch.zeros(9, 4)


def narrowed(training: Loop) -> None:
    training.model.half()


def removed(training: Loop) -> None:
    training.model[0].bias = None  # type: ignore[index]


def buffer_added(training: Loop) -> None:
    training.model.register_buffer("mask", torch.zeros(1))


def buffer_removed(training: Loop) -> None:
    del training.model[1].running_mean  # type: ignore[index]


def group_added(training: Loop) -> None:
    training.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


def optimizer_gone(training: Loop) -> None:
    training.optimizer = torch.optim.SGD(training.model.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(replaced, "0.weight was replaced by another parameter", id="replaced"),
        pytest.param(untied, "the parameter 2.weight was added; the parameter 2.bias was added", id="added"),
        pytest.param(reshaped, "0.weight was float32[8, 4] on cpu and has become float32[9, 4] on cpu", id="reshaped"),
        pytest.param(narrowed, "0.weight was float32[8, 4] on cpu and has become float16[8, 4] on cpu", id="narrowed"),
        pytest.param(removed, "the parameter 0.bias was removed", id="removed"),
        pytest.param(buffer_added, "the buffer mask was added", id="buffer-added"),
        pytest.param(buffer_removed, "the buffer 1.running_mean was removed", id="buffer-removed"),
        pytest.param(group_added, "the parameter groups of AdamW have changed", id="group-added"),
        pytest.param(optimizer_gone, "the AdamW that was kept is gone", id="optimizer-gone"),
    ],
)
def test_what_was_changed_by_hand_is_said_and_nothing_is_written(change: Callable[[Loop], None], words: str) -> None:
    training = loop()
    training.run(0, 2)
    training.keep(2)
    training.run(2, 4)
    change(training)
    gc.collect()
    before, states = training.bits(), training.states.steps
    with pytest.raises(RuntimeError, match="nothing has been changed") as caught:
        training.states.restore()
    assert f"nothing has been changed: since then {words}" in str(caught.value)
    assert "state of step 2" in str(caught.value)
    assert not changed(before, training.bits()), "gradients and random numbers included"
    assert training.states.steps == states
    training.keep(4)  # the model as it is now
    training.states.restore()
    same(before, training.bits())


def test_of_many_changes_a_few_are_named_and_the_rest_counted() -> None:
    training = loop()
    training.keep(0)
    training.model.double()
    with pytest.raises(RuntimeError, match=r"0\.weight was .*; and 3 more\."):
        training.states.restore()


def test_untying_is_a_change() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    states = GoodStates({"net": model})
    states.keep(0, [], [], {})
    model[1].weight = nn.Parameter(model[0].weight.detach().clone())
    with pytest.raises(RuntimeError, match=r"net\.1\.weight was replaced"):
        states.restore()


@pytest.mark.parametrize("make", [lambda: nn.LazyLinear(2), lambda: nn.Linear(2, 2, device="meta")], ids=["lazy", "meta"])
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_parameters_without_values_cannot_be_kept(make: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(make())
    with pytest.raises(RuntimeError, match=r"0\.weight has no values"):
        GoodStates({"": model}).keep(0, [], [], {})


class Foreign:
    """What a user hands in; it raises when told to."""

    def __init__(self) -> None:
        self.value = torch.zeros(2)
        self.saves = self.loads = True

    def state_dict(self) -> dict[str, Any]:
        if not self.saves:
            raise ValueError("cannot save")
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if not self.loads:
            raise ValueError("cannot load")
        self.value = state["value"]


def test_a_state_dict_that_raises_costs_no_state() -> None:
    foreign = Foreign()
    model = network()
    training = Loop(model, torch.optim.AdamW(model.parameters()), scheduler=None)
    training.states = GoodStates({"": model}, [foreign])
    training.run(0, 1)
    training.keep(1)
    training.keep(2)
    kept = training.bits()
    training.run(1, 3)
    foreign.saves = False
    with pytest.raises(ValueError, match="cannot save"):
        training.keep(3)
    assert training.states.steps == (1, 2)
    training.states.restore()
    same(kept, training.bits())


def test_a_load_state_dict_that_raises_leaves_model_and_optimizer() -> None:
    foreign = Foreign()
    training = loop()
    training.states = GoodStates({"": training.model}, [foreign])
    training.keep(0)
    training.run(0, 2)
    before = training.bits()
    foreign.loads = False
    with pytest.raises(ValueError, match="cannot load"):
        training.states.restore()
    assert not changed(before, training.bits())
    foreign.loads = True
    assert training.states.restore().step == 0


def test_what_is_handed_in_gets_copies_of_its_own() -> None:
    foreign = Foreign()
    training = loop()
    states = GoodStates({"": training.model}, [foreign])
    states.keep(0, [], [], {})
    live = foreign.value
    for _ in range(2):
        foreign.value.add_(1)
        states.restore()
        assert foreign.value.tolist() == [0.0, 0.0]
    assert live.tolist() == [1.0, 1.0], "its own tensors are its own to write"


def test_a_copy_that_is_broken_off_is_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    training = loop()
    training.run(0, 1)
    for i in (1, 2):
        training.keep(i)
    kept = training.bits()
    training.run(1, 3)
    with monkeypatch.context() as patch:
        patch.setattr("gradwatch.protect.host._memory", interrupted(after=5))
        with pytest.raises(KeyboardInterrupt):
            training.keep(3)
    assert training.states.steps == (2,)
    with Allocations() as seen:
        training.keep(3)
    assert not seen.made
    assert training.states.steps == (2, 3)
    training.states.restore(before=3)
    same(kept, training.bits())


def interrupted(after: int) -> Callable[[Tensor], Tensor]:
    left = iter(range(after))

    def memory(tensor: Tensor) -> Tensor:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return tensor.detach()

    return memory


# -- memory ------------------------------------------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Tensors with memory of their own that operators returned."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {one.untyped_storage().data_ptr() for one in args if isinstance(one, Tensor)}
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in given:
            self.made.append(str(func))
        return out


@EVERY_OPTIMIZER
def test_memory_is_got_twice_and_then_written_over(make: Callable[[Any], Optimizer]) -> None:
    training = loop(make)
    training.run(0, 6)  # the history of LBFGS is full
    with Allocations() as seen:
        training.keep(0)
    assert seen.made, "it can see one"
    training.keep(1)
    held = training.states.nbytes
    if isinstance(training.optimizer, Drifting):  # its state grows
        return
    for i in range(2, 6):
        training.update(i)
        with Allocations() as seen:
            training.keep(i)
        assert not seen.made
        assert training.states.nbytes == held


def test_the_bytes_are_those_of_two_copies() -> None:
    model = nn.Linear(100, 10)  # 1010 parameters
    training = Loop(model, torch.optim.AdamW(model.parameters()))
    assert training.states.nbytes == 0
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    training.optimizer.step()
    one = 3 * 1010 * 4 + 2 * 4  # weights, two moments, two counters
    for i, states in enumerate((1, 2, 2, 2)):
        training.keep(i)
        assert training.states.nbytes == states * one
    training.states.restore(before=3)
    assert training.states.nbytes == 2 * one, "what was forgotten waits to be written over"
    with Allocations() as seen:
        training.keep(4)
    assert not seen.made


def test_a_layout_that_changes_is_followed() -> None:
    training = loop()
    training.keep(0)
    training.run(0, 1)  # moments appear
    training.keep(1)
    training.optimizer.state.clear()
    training.keep(2)
    training.keep(3)
    weights = sum(t.nbytes for t in (*training.model.parameters(), *training.model.buffers()))
    assert training.states.nbytes == 2 * weights


def test_a_layout_that_shifts_is_followed() -> None:
    """With the state of the first parameter gone, the next one's stands where that was."""
    training = loop()
    training.run(0, 2)
    training.keep(0)
    training.keep(1)
    del training.optimizer.state[training.model.get_parameter("0.weight")]
    training.keep(2)
    kept = training.bits()
    training.run(2, 4)
    training.states.restore()
    same(kept, training.bits())


def test_a_memory_format_that_changes_is_followed() -> None:
    model = nn.Module()
    model.register_buffer("buffer", torch.ones(2, 3, 4, 5))
    states = GoodStates({"": model})
    for i in range(2):
        states.keep(i, [], [], {})
    model.buffer = model.buffer.contiguous(memory_format=torch.channels_last)
    states.keep(2, [], [], {})
    model.buffer = None
    states.restore()
    assert model.buffer.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("sparse", "nbytes"),
    [
        pytest.param(lambda t: t.to_sparse(), 3 * 4 + 2 * 3 * 8, id="coo"),
        pytest.param(lambda t: t.to_sparse_csr(), 3 * 4 + (4 + 3) * 8, id="csr"),
        pytest.param(lambda t: t.to_sparse_csc(), 3 * 4 + (4 + 3) * 8, id="csc"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CS. tensor support is in beta state:UserWarning")
def test_the_bytes_of_sparse_memory_count_indices_too(sparse: Callable[[Tensor], Tensor], nbytes: int) -> None:
    model = nn.Module()
    model.register_buffer("adjacency", sparse(torch.eye(3)))
    states = GoodStates({"": model})
    states.keep(0, [], [], {})
    assert states.nbytes == nbytes


def test_neither_model_nor_optimizer_nor_graph_is_kept_alive() -> None:
    training = loop()
    training.run(0, 2)
    x = torch.ones(2, 4, requires_grad=True)
    training.model.register_buffer("carried", training.model(x) * 2)  # with a graph
    node = weakref.ref(x)
    training.keep(2)
    training.states.restore()
    states = training.states
    model, optimizer = weakref.ref(training.model), weakref.ref(training.optimizer)
    weight = weakref.ref(training.model.get_parameter("0.weight"))
    del training, x
    gc.collect()
    assert [ref() for ref in (model, optimizer, weight, node)] == [None] * 4
    for act in (lambda: states.keep(3, [], [], {}), states.restore):
        with pytest.raises(RuntimeError, match=r"the model whose states were to be kept no longer exists; hold on to it"):
            act()


def test_the_model_that_is_gone_is_named() -> None:
    models = {"generator": nn.Linear(1, 1), "critic": nn.Linear(1, 1)}
    states = GoodStates(models)
    del models["critic"]
    with pytest.raises(RuntimeError, match="the model 'critic' whose"):
        states.keep(0, [], [], {})


# -- on a GPU ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.device("cuda")


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"capturable": True}], ids=str)
def test_a_training_on_a_gpu_goes_back(gpu: torch.device, options: dict[str, bool]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 512), nn.Dropout(), nn.Linear(512, 64)).to(gpu)
    optimizer = torch.optim.AdamW(model.parameters(), **options)  # type: ignore[arg-type]
    scaler = torch.amp.GradScaler("cuda", growth_interval=2)
    states = GoodStates({"": model})
    x = torch.randn(32, 64, device=gpu)

    def run(updates: int) -> list[Tensor]:
        for _ in range(updates):
            optimizer.zero_grad()
            scaler.scale(model(x).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        return [p.detach().clone() for p in model.parameters()]

    for step in (0, 3, 6):
        states.keep(step, [optimizer], [scaler], {})
        first = run(5)
        states.restore()
        assert all(torch.equal(a, b) for a, b in zip(first, run(5), strict=True))
        states.restore()
        run(3)


def test_a_copy_to_pinned_memory_does_not_wait(gpu: torch.device) -> None:
    model = nn.Linear(4096, 4096, device=gpu)
    states = GoodStates({"": model})
    for i in range(2):
        states.keep(i, [], [], {})
    before = model.weight.detach().clone()
    torch.cuda._sleep(100_000_000)
    states.keep(2, [], [], {})
    assert not torch.cuda.current_stream().query()
    with torch.no_grad():
        model.weight.zero_()
    states.restore()
    assert torch.equal(model.weight, before)
