"""Exact counts of what the watch adds to an update: no synchronisation in forward or backward, one copy to the host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradwatch import GradWatch, Sampling
from tests.networks import NETWORKS

SYNCHRONISES = ("_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero", "masked_select", "_unique2")
"""Operators that make the host wait for a device. `float(tensor)` and `bool(tensor)` reach the first of them."""

DURING = "backward, running"
"""The phase in which the autograd engine runs; what comes after, within `loss.backward()`, is "backward, returned"."""


class Operators(TorchDispatchMode):
    """Counts operators by phase, and copies to the host under the name "to_host"."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        self.seen: dict[str, Counter[str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        phase = self.phase
        if phase == "backward":
            phase = DURING if torch._C._current_graph_task_id() != -1 else "backward, returned"
        counts = self.seen.setdefault(phase, Counter())
        counts[name] += 1
        if name == "_to_copy" and str((kwargs or {}).get("device", "")) == "cpu":
            counts["to_host"] += 1
        return func(*args, **(kwargs or {}))

    def synchronisations(self, *phases: str) -> Counter[str]:
        chosen = phases or tuple(self.seen)
        return Counter(
            {name: n for phase in chosen for name, n in self.seen.get(phase, {}).items() if name in (*SYNCHRONISES, "to_host")}
        )


class Loop:
    """One training loop whose phases are told apart."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        torch.manual_seed(0)
        self.model = make()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        self.x, self.y = torch.randn(4, 3, 8, 8), torch.randint(0, 2, (4,))

    def update(self, operators: Operators | None = None) -> None:
        operators = operators or Operators()
        operators.phase = "clear"
        self.optimizer.zero_grad()
        operators.phase = "forward"
        loss = F.cross_entropy(self.model(self.x), self.y)
        operators.phase = "backward"
        loss.backward()
        operators.phase = "step"
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


def counted(make: Callable[[], nn.Module], updates: int, *, watch: bool, warm: int = 3, **options: Any) -> Operators:
    """Operators of `updates` updates, after some that are not counted."""
    loop = Loop(make)
    watching = GradWatch(loop.model, console=False, **options)
    if watch:
        watching.attach()
    for _ in range(warm):
        loop.update()
    with Operators() as operators:
        for _ in range(updates):
            loop.update(operators)
    watching.detach()
    assert not watch or watching.history.recorded == warm + updates
    return operators


@pytest.mark.parametrize("warm", [0, 3], ids=["from-the-first", "later"])
@pytest.mark.parametrize("cadence", CADENCES)
@pytest.mark.parametrize("make", MODELS)
def test_no_synchronisation_in_forward_or_backward(make: Callable[[], nn.Module], cadence: str, warm: int) -> None:
    bare = counted(make, 4, watch=False, warm=warm)
    watched = counted(make, 4, watch=True, warm=warm, sampling=CADENCES[cadence])
    for phase in ("clear", "forward", DURING):
        assert watched.synchronisations(phase) == bare.synchronisations(phase), phase


@pytest.mark.parametrize("make", MODELS)
def test_forward_and_backward_run_the_same_operators_between_samples(make: Callable[[], nn.Module]) -> None:
    """Between sampled updates the model runs without a hook: operator for operator what runs unwatched."""
    bare = counted(make, 4, watch=False)
    watched = counted(make, 4, watch=True, sampling=CADENCES["between"])
    for phase in ("clear", "forward", DURING):
        assert watched.seen.get(phase) == bare.seen.get(phase), phase


@pytest.mark.parametrize("options", [{}, {"clip": 1e-3}, {"on_nonfinite": "raise"}], ids=["warn", "clip", "raise"])
@pytest.mark.parametrize("cadence", CADENCES)
@pytest.mark.parametrize("make", MODELS)
def test_at_most_one_value_an_update_is_copied_to_the_host(
    make: Callable[[], nn.Module], cadence: str, options: dict[str, Any]
) -> None:
    updates = 5
    bare = counted(make, updates, watch=False).synchronisations()
    watched = counted(make, updates, watch=True, sampling=CADENCES[cadence], **options).synchronisations()
    # A clipper asks three times for what is on the host already: the norms are. On a device it asks for none (`tests/protect`).
    allowed = 3 if "clip" in options else 1
    assert sum((watched - bare).values()) <= allowed * updates, watched - bare


@pytest.mark.parametrize("name", ["mlp", "lstm", "embedding_sparse", "checkpointing", "gan", "bf16_autocast"])
def test_the_networks_update_with_at_most_one_copy_to_the_host(name: str) -> None:
    counts = []
    for watch in (False, True):
        training = NETWORKS[name]()
        watching = GradWatch(training.model, console=False)
        if watch:
            watching.attach()
        training.run(3)
        with Operators() as operators:
            training.run(4, start=3)
        watching.detach()
        counts.append(operators.synchronisations())
    assert sum((counts[1] - counts[0]).values()) <= 4 * training.records, counts[1] - counts[0]


SLIPS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda gradient: gradient.norm().item(),
    "float": lambda gradient: float(gradient.norm()),
    "bool": lambda gradient: bool((gradient != gradient).any()),
    "equal": lambda gradient: torch.equal(gradient, gradient),
    "mask": lambda gradient: gradient.masked_select(gradient > 0),
    "nonzero": lambda gradient: gradient.nonzero(),
    "to": lambda gradient: gradient.double().to("cpu", torch.float32),
}


@pytest.mark.parametrize("slip", SLIPS.values(), ids=SLIPS)
def test_the_counter_sees_a_slip(slip: Callable[[Tensor], object]) -> None:
    """What people write in their hooks is seen, in the phase in which it happened."""
    loop = Loop(linear)

    def hook(gradient: Tensor) -> None:
        slip(gradient)

    with Operators() as operators:
        loop.update(operators)
    assert not operators.synchronisations()
    next(loop.model.parameters()).register_hook(hook)
    with Operators() as operators:
        loop.update(operators)
    assert operators.synchronisations(DURING)
    assert not operators.synchronisations("clear", "forward", "backward, returned", "step")
