"""Transforms over a watched model: they work as without the watch, and leave nothing in the record."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from gradwatch import GradWatch
from tests.reference_layers import PER_INPUT, PER_LAYER

pytestmark = pytest.mark.filterwarnings("ignore")  # export, trace and dynamo warn of their own


@pytest.fixture(autouse=True)
def nothing_is_compiled() -> None:
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].utils.counters.clear()


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))


def batch() -> Tensor:
    return torch.randn(9, 6, generator=torch.Generator().manual_seed(5))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def loss_of(model: nn.Module, params: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.func.functional_call(model, params, (x,)).square().mean()


def vmap(model: nn.Module) -> Any:
    return torch.func.vmap(model)(batch())


def ensemble(model: nn.Module) -> Any:
    stacked = {name: torch.stack([p, 2 * p]) for name, p in weights(model).items()}
    return torch.func.vmap(partial(torch.func.functional_call, model), in_dims=(0, None))(stacked, (batch(),))


def grad(model: nn.Module) -> Any:
    return list(torch.func.grad(partial(loss_of, model))(weights(model), batch()).values())


def per_sample_gradients(model: nn.Module) -> Any:
    found = torch.func.vmap(torch.func.grad(partial(loss_of, model)), in_dims=(None, 0))(weights(model), batch())
    return list(found.values())


def jacrev(model: nn.Module) -> Any:
    return torch.func.jacrev(model)(batch()[0])


def jacfwd(model: nn.Module) -> Any:
    return torch.func.jacfwd(model)(batch()[0])


def hessian(model: nn.Module) -> Any:
    return torch.func.hessian(lambda x: model(x).sum())(batch()[0])


def functional_call(model: nn.Module) -> Any:
    with torch.no_grad():
        return torch.func.functional_call(model, weights(model), (batch(),))


def export(model: nn.Module) -> Any:
    program = torch.export.export(model, (batch(),), strict=False)
    return [str(program.graph), program.module()(batch())]


def jit_trace(model: nn.Module) -> Any:
    traced = torch.jit.trace(model, batch(), check_trace=False)
    return [[node.kind() for node in traced.inlined_graph.nodes()], traced(batch())]


def fake(model: nn.Module) -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return list(model(mode.from_tensor(batch())).shape)


def symbolic_trace(model: nn.Module) -> Any:
    graph = torch.fx.symbolic_trace(model)
    with torch.no_grad():  # it holds the modules themselves: those would be calls like any other
        return [str(graph.graph), graph(batch())]


class AllModules(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return False


def trace_into_all(model: nn.Module) -> Any:
    return str(AllModules().trace(model))


def make_graph(model: nn.Module) -> Any:
    return str(make_fx(model)(batch()).graph)


def count_flops(model: nn.Module) -> Any:
    with FlopCounterMode(display=False) as counter:
        model(batch()).sum().backward()
    model.zero_grad()
    return counter.get_total_flops()


def on_meta(model: nn.Module) -> Any:
    return list(
        torch.func.functional_call(model, {k: v.to("meta") for k, v in weights(model).items()}, (batch().to("meta"),)).shape
    )


TRANSFORMS: list[Callable[[nn.Module], Any]] = [
    vmap,
    ensemble,
    grad,
    per_sample_gradients,
    jacrev,
    jacfwd,
    hessian,
    functional_call,
    export,
    jit_trace,
    fake,
    symbolic_trace,
    trace_into_all,
    make_graph,
    on_meta,
]


def flat(thing: Any) -> list[Any]:
    return [part for one in thing for part in flat(one)] if isinstance(thing, (list, tuple)) else [thing]


def assert_same(got: Any, expected: Any) -> None:
    assert len(flat(got)) == len(flat(expected))
    for one, other in zip(flat(got), flat(expected), strict=True):
        assert torch.equal(one, other) if isinstance(other, Tensor) else one == other


def train(between: Callable[[nn.Module], Any] | None) -> tuple[GradWatch, nn.Module, list[Any]]:
    """Four watched updates, with something between forward and backward of the second and third, and before them."""
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    results = []
    with GradWatch(model, console=False) as watch:
        for i in range(4):
            optimizer.zero_grad()
            if between is not None and i:
                results.append(between(model))
            loss = model(batch() * i).square().mean()
            if between is not None and i:
                results.append(between(model))
            loss.backward()
            optimizer.step()
    return watch, model, results


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_works_as_without_the_watch_and_leaves_no_trace(transform: Callable[[nn.Module], Any]) -> None:
    plain, unmoved, _ = train(None)
    watch, model, results = train(transform)
    assert watch.notices == ()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), unmoved.parameters(), strict=True))
    for name in (*PER_LAYER, *PER_INPUT, "grad_norm", "loss"):
        np.testing.assert_array_equal(watch.history.stat(name), plain.history.stat(name), err_msg=name)
    assert len(results) == 6
    # And its result: that of an unwatched model with the same weights.
    torch.manual_seed(0)
    bare = network()
    bare.load_state_dict(model.state_dict())
    with GradWatch(model, console=False):
        assert_same(transform(model), transform(bare))


def test_strict_export_needs_the_watch_left_and_works_afterwards() -> None:
    model = network()
    with GradWatch(model, console=False):
        model(batch()).sum().backward()
    program = torch.export.export(model, (batch(),), strict=True)
    assert torch.equal(program.module()(batch()), model(batch()))


def test_counted_flops_are_those_of_the_model() -> None:
    model = network()
    expected = count_flops(model)
    with GradWatch(model, console=False) as watch:
        assert count_flops(model) == expected
    assert watch.notices == ()


class Blocks(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.how = nn.Linear(6, 16), how
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)) for _ in range(2))

    @contextmanager
    def saving(self) -> Iterator[None]:
        if self.how == "save_on_cpu":
            with torch.autograd.graph.save_on_cpu():
                yield
        elif self.how == "saved tensor hooks":
            with torch.autograd.graph.saved_tensors_hooks(lambda t: (t.dtype, t.double()), lambda t: t[1].to(t[0])):
                yield
        else:
            yield

    def forward(self, x: Tensor) -> Tensor:
        with self.saving():
            x = self.first(x)
            for block in self.blocks:
                if self.how == "selective":
                    x = x + checkpoint(block, x, use_reentrant=False, context_fn=self.context)
                else:
                    x = x + block(x)
        return x

    def context(self) -> Any:
        def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            return CheckpointPolicy.MUST_SAVE if op is torch.ops.aten.addmm.default else CheckpointPolicy.PREFER_RECOMPUTE

        return create_selective_checkpoint_contexts(policy)


@pytest.mark.parametrize("how", ["save_on_cpu", "saved tensor hooks", "selective", "nothing"])
def test_what_decides_what_is_saved(how: str) -> None:
    def run(watched: bool) -> tuple[nn.Module, GradWatch]:
        torch.manual_seed(0)
        model = Blocks(how)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        watch = GradWatch(model, console=False)
        if watched:
            watch.attach()
        for _ in range(4):
            optimizer.zero_grad()
            model(batch()).square().mean().backward()
            optimizer.step()
        watch.detach()
        return model, watch

    model, watch = run(watched=True)
    bare, _ = run(watched=False)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), bare.parameters(), strict=True))
    assert watch.notices == ()
    calls = dict(zip(watch.history.layers, watch.history.stat("calls").T, strict=True))
    assert all((calls[layer] == 1).all() for layer in ("first", "blocks.0", "blocks.0.0"))
    # What runs under a dispatch mode is left alone: the mode counts operators, and ours would be among them.
    inside = watch.history.stat("activation_rms")[:, watch.history.layers.index("blocks.0.0")]
    assert np.isnan(inside).all() if how == "selective" else np.isfinite(inside).all()
