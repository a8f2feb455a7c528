"""Exact counts of what the watch adds to an update: no synchronisation in forward or backward, one copy to the host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradwatch import GradWatch, Sampling
from tests.networks import NETWORKS

SYNCHRONISES = ("_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero", "masked_select", "_unique2")
"""Operators that make the host wait for a device."""

READS = ("item", "tolist", "numpy", "cpu", "__array__", "__float__", "__int__", "__bool__", "__index__", "__complex__")
"""Ways from a tensor to a value on the host. On a CPU most of them never reach a dispatch mode: they are counted as calls."""


class Operators(TorchDispatchMode):
    """Counts operators, and copies between devices under the name "to_host"."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.seen[name] += 1
        if name in ("_to_copy", "copy_") and str((kwargs or {}).get("device", "")) == "cpu":
            self.seen["to_host"] += 1
        return func(*args, **(kwargs or {}))

    def synchronisations(self) -> Counter[str]:
        return Counter({name: count for name, count in self.seen.items() if name in (*SYNCHRONISES, "to_host")})


class HostReads:
    """Counts calls of `Tensor.item`, `.tolist()`, `.numpy()`, `float(tensor)` and the like.

    By replaced methods, not by a function mode: a mode is off inside the `Tensor.backward` that it has seen.
    """

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()

    def __enter__(self) -> HostReads:
        self._own = {name: vars(torch.Tensor).get(name) for name in READS}
        for name in READS:
            setattr(torch.Tensor, name, self._counting(name, getattr(torch.Tensor, name)))
        return self

    def _counting(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.seen[name] += 1
            return original(tensor, *args, **kwargs)

        return counting

    def __exit__(self, *_: object) -> None:
        for name, own in self._own.items():
            if own is None:
                delattr(torch.Tensor, name)
            else:
                setattr(torch.Tensor, name, own)


class Phases:
    """One loop, its phases apart: counts of operators and host reads for each."""

    def __init__(self, make: Callable[[], nn.Module], optimizer: str = "SGD") -> None:
        torch.manual_seed(0)
        self.model = make()
        self.optimizer = getattr(torch.optim, optimizer)(self.model.parameters(), lr=1e-3)
        self.x, self.y = torch.randn(4, 3, 8, 8), torch.randint(0, 2, (4,))
        self.operators: dict[str, Counter[str]] = {}
        self.reads: dict[str, Counter[str]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with HostReads() as reads, Operators() as operators:
            yield
        self.operators[name] = self.operators.get(name, Counter()) + operators.synchronisations()
        self.reads[name] = self.reads.get(name, Counter()) + reads.seen

    def update(self) -> None:
        with self.phase("clear"):
            self.optimizer.zero_grad()
        with self.phase("forward"):
            loss = F.cross_entropy(self.model(self.x), self.y)
        with self.phase("backward"):
            loss.backward()
        with self.phase("step"):
            self.optimizer.step()

    def bare(self) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.x), self.y).backward()
        self.optimizer.step()


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 8), nn.Tanh(), nn.Linear(8, 2)
    )


def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.GELU(), nn.Linear(8, 2))


def mixed() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.GELU(), nn.Linear(8, 2))
    model[3].double()
    model[1].register_forward_hook(lambda *_: None)
    model.insert(3, Double())
    return model


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double()


MODELS = [convolutional, linear, mixed]
CADENCES = {"full": Sampling(), "between": Sampling(dense=0, every=1000)}
"""Every update a full-statistics one; and none but the first."""


def counted(make: Callable[[], nn.Module], updates: int, *, watch: bool, warm: int = 3, **options: Any) -> Phases:
    phases = Phases(make)
    if not watch:
        for _ in range(warm):
            phases.bare()
        for _ in range(updates):
            phases.update()
        return phases
    with GradWatch(phases.model, console=False, **options) as watching:
        for _ in range(warm):
            phases.bare()
        for _ in range(updates):
            phases.update()
    assert watching.history.recorded == warm + updates
    return phases


@pytest.mark.parametrize("warm", [0, 3], ids=["from-the-first", "later"])
@pytest.mark.parametrize("cadence", CADENCES)
@pytest.mark.parametrize("make", MODELS)
def test_no_synchronisation_in_forward_or_backward(make: Callable[[], nn.Module], cadence: str, warm: int) -> None:
    bare = counted(make, 4, watch=False, warm=warm)
    watched = counted(make, 4, watch=True, warm=warm, sampling=CADENCES[cadence])
    for phase in ("clear", "forward", "backward"):
        assert watched.operators[phase] == bare.operators[phase], phase
        assert watched.reads[phase] == bare.reads[phase], phase


@pytest.mark.parametrize("options", [{}, {"clip": 1e-3}, {"on_nonfinite": "raise"}], ids=["warn", "clip", "raise"])
@pytest.mark.parametrize("cadence", CADENCES)
@pytest.mark.parametrize("make", MODELS)
def test_at_most_one_copy_to_the_host_an_update(make: Callable[[], nn.Module], cadence: str, options: dict[str, Any]) -> None:
    updates = 5
    bare = counted(make, updates, watch=False)
    watched = counted(make, updates, watch=True, sampling=CADENCES[cadence], **options)
    extra_reads = sum((sum(watched.reads[p].values()) - sum(bare.reads[p].values())) for p in bare.reads)
    extra_operators = sum((sum(watched.operators[p].values()) - sum(bare.operators[p].values())) for p in bare.operators)
    assert extra_reads <= updates, {p: watched.reads[p] - bare.reads[p] for p in bare.reads}
    assert extra_operators <= updates, {p: watched.operators[p] - bare.operators[p] for p in bare.operators}


def test_the_forward_runs_the_same_operators_between_samples() -> None:
    """Between sampled updates the model runs without a hook: operator for operator the unwatched forward."""
    seen: list[Counter[str]] = []
    for watch in (False, True):
        phases = Phases(convolutional)
        watching = GradWatch(phases.model, console=False, sampling=CADENCES["between"])
        if watch:
            watching.attach()
        for _ in range(3):
            phases.bare()
        with Operators() as operators:
            phases.model(phases.x)
        seen.append(operators.seen)
        watching.detach()
    assert seen[0] == seen[1]


@pytest.mark.parametrize("name", ["mlp", "lstm", "embedding_sparse", "checkpointing", "gan", "bf16_autocast"])
def test_the_networks_update_with_at_most_one_read_of_the_host(name: str) -> None:
    counts = []
    for watch in (False, True):
        training = NETWORKS[name]()
        watching = GradWatch(training.model, console=False)
        if watch:
            watching.attach()
        training.run(3)
        with HostReads() as reads:
            training.run(4, start=3)
        watching.detach()
        counts.append(sum(reads.seen.values()))
    assert counts[1] - counts[0] <= 4 * training.records


SLIPS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda gradient: gradient.norm().item(),
    "float": lambda gradient: float(gradient.norm()),
    "bool": lambda gradient: bool((gradient != gradient).any()),
    "numpy": lambda gradient: gradient.numpy(),
    "tolist": lambda gradient: gradient.tolist(),
    "cpu": lambda gradient: gradient.cpu(),
    "isnan": lambda gradient: torch.equal(gradient, gradient),
}


@pytest.mark.parametrize("slip", SLIPS.values(), ids=SLIPS)
def test_the_counters_see_a_slip(slip: Callable[[Tensor], object]) -> None:
    """What people write in their hooks is seen by one counter or the other, in the phase in which it happened."""
    phases = Phases(linear)
    phases.update()
    assert not phases.operators["backward"]
    assert not phases.reads["backward"]

    def hook(gradient: Tensor) -> None:
        slip(gradient)

    next(phases.model.parameters()).register_hook(hook)
    phases.update()
    assert sum(phases.operators["backward"].values()) + sum(phases.reads["backward"].values()) > 0
    assert not phases.reads["forward"]
