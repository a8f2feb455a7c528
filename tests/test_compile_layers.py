"""Statistics of modules inside compiled code: the graph stays what it is without the watch, and the numbers are the eager ones."""

from __future__ import annotations

import copy
import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradwatch import GradWatch, Sampling

pytestmark = pytest.mark.filterwarnings("ignore")  # dynamo warns of its own

FORWARD = ("calls", "activation_rms", "activation_absmax", "activation_nonfinite", "saturated_fraction")
SHORT = Sampling(dense=4, every=3)

Update = Callable[[Tensor, Tensor], None]


class Compiler:
    """`torch.compile` with a backend that counts; or nothing at all, for the eager twin."""

    def __init__(self, on: bool, backend: str = "aot_eager") -> None:
        self.on = on
        self.runs = 0
        self._backend = backend

    def __call__(self, thing: Any, **options: Any) -> Any:
        return torch.compile(thing, backend=self.backend, **options) if self.on else thing

    def in_place(self, module: nn.Module) -> None:
        if self.on:
            module.compile(backend=self.backend)

    def backend(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        compiled = torch._dynamo.lookup_backend(self._backend)(graph, inputs)

        def run(*args: Any) -> Any:
            self.runs += 1
            return compiled(*args)

        return run

    def counts(self) -> dict[str, Any]:
        counters = torch._dynamo.utils.counters
        return {
            "graphs": counters["stats"]["unique_graphs"],
            "breaks": sum(counters["graph_break"].values()),
            "frames": dict(counters["frames"]),
            "runs": self.runs,
        }


@contextmanager
def fresh() -> Iterator[None]:
    """Nothing is compiled yet, nor afterwards."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def batches(updates: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    found = [torch.randn(64, 16, generator=generator) for _ in range(updates)]
    return [(x, (x[:, 0] > 0).long()) for x in found]


# -- networks ----------------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 24)
        self.act = nn.Tanh()
        self.back = nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.back(self.act(self.linear(x)))


class Net(nn.Module):
    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Broken(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        torch._dynamo.graph_break()
        return self.head(self.blocks[1](x))


class Checkpointed(Net):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


class Reentrant(Checkpointed):
    reentrant = True


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Activations(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.acts = nn.ModuleList(
            [
                nn.ReLU(inplace=True),
                nn.ReLU6(),
                nn.Hardtanh(-0.7, 0.7),
                nn.Sigmoid(),
                nn.Softmax(-1),
                nn.LogSigmoid(),
                nn.ELU(0.7),
                nn.SELU(),
                nn.LeakyReLU(),
                nn.Threshold(0.1, 0.7),
                nn.GELU(),
                nn.SiLU(inplace=True),
                nn.Mish(),
                nn.Softplus(),
                nn.PReLU(),
                QuickGELU(),
            ]
        )
        self.before = nn.ModuleList(nn.Linear(16, 16) for _ in self.acts)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        for linear, act in zip(self.before, self.acts, strict=True):
            x = x + act(2 * linear(x))
        return self.head(x)


@dataclass
class Answer:
    first: Tensor
    rest: tuple[Tensor, dict[str, Tensor]]


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 40), nn.Linear(16, 16)

    def forward(self, x: Tensor, *, scale: float) -> Answer:
        return Answer(self.a(x) * scale, (x.argmax(-1), {"b": self.b(x), "loss": x.sum()}))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nested = Nested()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(56, 3)

    def forward(self, x: Tensor) -> Tensor:
        answer = self.nested(x, scale=0.5)
        b = answer.rest[1]["b"]
        h, _ = self.attention(*[torch.stack([x, b, x + b], 1)] * 3)
        return self.head(torch.cat([answer.first, self.encoder(h).mean(1)], -1))


class Recurrent(nn.Module):
    """Dynamo gives an LSTM up, and what follows in its frame runs eagerly."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.after = Block()
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.lstm(self.block(x)[:, None])
        return self.head(self.after(h[:, 0]))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.again, self.flatten, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(), nn.Linear(128, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(x.view(-1, 1, 4, 4))))
        y = self.again(x)
        y += x
        return self.head(self.flatten(y))


class Odd(Net):
    """A module called twice, a complex output, an output without gaps in another order, an expanded one, an empty one."""

    def __init__(self) -> None:
        super().__init__()
        self.spectrum, self.turned, self.wide, self.empty = Spectrum(), Turned(), Wide(), Empty()

    def forward(self, x: Tensor) -> Tensor:
        self.empty(x)
        x = self.turned(self.blocks[0](self.blocks[0](x)))
        x = x + self.wide(x).mean(0)
        return self.head(x + self.spectrum(x).abs().sum(-1, keepdim=True))


class Spectrum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft(x)


class Turned(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x.t().contiguous() * 2).t()


class Wide(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.expand(6, *x.shape)


class Empty(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:0]


class Picked(Net):
    """How many rows are picked, nobody knows before."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        picked = (x[:, 0] > 0).nonzero()[:, 0]
        return self.head(x.index_add(0, picked, self.blocks[1](x[picked])))


# -- loops -------------------------------------------------------------------------------------------------------------------------


Made = tuple[nn.Module, Update]


def plain(model: nn.Module, forward: Callable[[Tensor], Tensor]) -> Made:
    return model, lambda x, y: F.cross_entropy(forward(x), y).backward()


def whole(network: Callable[[], nn.Module], **options: Any) -> Callable[[Compiler], Made]:
    def make(compiler: Compiler) -> Made:
        model = network()
        return plain(model, compiler(model, **options))

    return make


def by_compile_method(compiler: Compiler) -> Made:
    model = Net()
    compiler.in_place(model)
    return plain(model, model)


def blocks_in_place(compiler: Compiler) -> Made:
    model = Net(12)
    for block in model.blocks:
        compiler.in_place(block)
    return plain(model, model)


def blocks_wrapped(network: Callable[[], nn.Module]) -> Callable[[Compiler], Made]:
    def make(compiler: Compiler) -> Made:
        model: Any = network()
        for i, block in enumerate(model.blocks):
            model.blocks[i] = compiler(block)
        return model, lambda x, y: F.cross_entropy(model(x.clone().requires_grad_()), y).backward()

    return make


def varying_batches(**options: Any) -> Callable[[Compiler], Made]:
    def make(compiler: Compiler) -> Made:
        model = Net()
        forward = compiler(model, **options)
        sizes = iter((70, 69, 40, 128, 64, 65, 3, 43, 42, 127, 9, 66))  # 64 × 16 is where tensors begin to be sampled

        def update(x: Tensor, y: Tensor) -> None:
            n = next(sizes)
            F.cross_entropy(forward(torch.cat([x, -x])[:n]), torch.cat([y, 1 - y])[:n]).backward()

        return model, update

    return make


def several_forwards(compiler: Compiler) -> Made:
    model = Net()
    forward = compiler(model)

    @torch._functorch.config.patch(donated_buffer=False)  # else torch refuses a second backward through compiled code
    def update(x: Tensor, y: Tensor) -> None:
        loss = F.cross_entropy(forward(x), y) + F.cross_entropy(forward(2 * x), y)
        loss.backward(retain_graph=True)
        (0.5 * loss).backward()
        for part, target in zip(x.split(32), y.split(32), strict=True):
            F.cross_entropy(forward(part), target).backward()

    return model, update


def evaluations(compiler: Compiler) -> Made:
    """The forward pass behind the backward belongs to the next record, where that is looked at."""
    model = Net()
    forward = compiler(model)

    def update(x: Tensor, y: Tensor) -> None:
        with torch.no_grad():
            forward(5 * x)
        model.eval()
        forward(3 * x)
        with torch.inference_mode():
            forward(5 * x)
        model.train()
        loss = F.cross_entropy(forward(x), y)
        with torch.no_grad():
            forward(5 * x)
        loss.backward()
        forward(2 * x)

    return model, update


def in_half_precision(compiler: Compiler) -> Made:
    model = Net()
    forward = compiler(model)

    def update(x: Tensor, y: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(forward(x), y)
        loss.backward()

    return model, update


def of_a_function(compiler: Compiler) -> Made:
    model = Net()

    @compiler
    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    return model, lambda x, y: loss(x, y).backward()


def compiled_backward(forward_too: bool) -> Callable[[Compiler], Made]:
    def make(compiler: Compiler) -> Made:
        model = Net()
        forward = compiler(model) if forward_too else model

        def update(x: Tensor, y: Tensor) -> None:
            loss = F.cross_entropy(forward(x), y)
            if compiler.on:
                with torch._dynamo.compiled_autograd._enable(compiler):
                    loss.backward()
            else:
                loss.backward()

        return model, update

    return make


def transformed(compiler: Compiler) -> Made:
    """Inside `torch.func` transforms nothing is written; the forward pass beside them is seen."""
    model = Net()
    forward = compiler(model)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().mean()

    slopes = compiler(lambda parameters, x: torch.func.grad(loss)(parameters, x), fullgraph=True)

    def update(x: Tensor, y: Tensor) -> None:
        slope = slopes(dict(model.named_parameters()), x)["head.bias"].detach().sum()
        (F.cross_entropy(forward(x), y) * (1 + slope)).backward()

    return model, update


def picked(compiler: Compiler) -> Made:
    model = Picked()
    forward = compiler(model, fullgraph=True)

    def update(x: Tensor, y: Tensor) -> None:
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            F.cross_entropy(forward(x), y).backward()

    return model, update


CASES: dict[str, Callable[[Compiler], Made]] = {
    "model": whole(Net),
    "compile-method": by_compile_method,
    "blocks-in-place": blocks_in_place,
    "blocks-wrapped": blocks_wrapped(lambda: Net(12)),
    "fullgraph-activations": whole(Activations, fullgraph=True),
    "graph-break": whole(Broken),
    "dynamic": varying_batches(dynamic=True),
    "batch-sizes": varying_batches(),
    "several-forwards": several_forwards,
    "evaluations": evaluations,
    "checkpoint": whole(Checkpointed, fullgraph=True),
    "checkpoint-around": blocks_wrapped(Checkpointed),
    "reentrant-around": blocks_wrapped(Reentrant),
    "autocast": in_half_precision,
    "attention": whole(Attention, fullgraph=True),
    "lstm": whole(Recurrent),
    "channels-last": whole(lambda: Convolutions().to(memory_format=torch.channels_last), fullgraph=True),
    "odd-outputs": whole(Odd),
    "of-a-function": of_a_function,
    "compiled-backward": compiled_backward(forward_too=True),
    "compiled-backward-only": compiled_backward(forward_too=False),
    "torch-func": transformed,
    "unknown-sizes": picked,
    "sequential-compiles-nothing": lambda compiler: sequential(compiler),
}

UNSEEN = {
    "unknown-sizes": ("blocks.1", "blocks.1.linear", "blocks.1.act", "blocks.1.back"),
    "autocast": tuple(name for name, _ in Net().named_modules() if name),
}
"""Only the calls of these are seen."""


def sequential(compiler: Compiler) -> Made:
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    compiler.in_place(model)
    return plain(model, model)


@dataclass
class Run:
    model: nn.Module
    watch: GradWatch
    counts: dict[str, Any]


def train(
    make: Callable[[Compiler], Made], compiler: Compiler, *, watched: bool, updates: int = 12, sampling: Sampling = SHORT
) -> Run:
    with fresh():
        model, update = make(compiler)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        watch = GradWatch(model, console=False, sampling=sampling)
        if watched:
            watch.attach()
        for x, y in batches(updates):
            optimizer.zero_grad()
            update(x, y)
            optimizer.step()
        watch.detach()
        return Run(model, watch, compiler.counts())


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def assert_same_statistics(watch: GradWatch, eager: GradWatch, unseen: tuple[str, ...] = (), rtol: float = 1e-5) -> None:
    ran = eager.history.stat("calls") > 0  # of one that never ran nobody can say whether it was compiled without the hooks
    assert ran.any()
    # In a compiled region activations that are functions cannot be told.
    activations = np.array([fact.kind == "activation" for fact in eager.history.meta.layers])
    for name in FORWARD:
        told = ran & activations if name == "saturated_fraction" else ran
        expected = np.where(told, eager.history.stat(name), np.nan)
        got = np.where(told, watch.history.stat(name), np.nan)
        for layer in unseen if name != "calls" else ():
            expected[:, watch.history.layers.index(layer)] = np.nan
        np.testing.assert_allclose(got, expected, rtol=rtol, err_msg=f"{name} of {watch.history.layers}")


@pytest.mark.parametrize("name", CASES)
def test_the_graph_stays_what_it_is_and_the_numbers_are_the_eager_ones(name: str) -> None:
    make = CASES[name]
    bare = train(make, Compiler(True), watched=False)
    run = train(make, Compiler(True), watched=True)
    eager = train(make, Compiler(False), watched=True)
    assert run.counts == bare.counts
    assert (bare.counts["graphs"] > 0) is (name != "sequential-compiles-nothing")
    assert_same_weights(run.model, bare.model)
    assert_same_statistics(run.watch, eager.watch, UNSEEN.get(name, ()))
    np.testing.assert_allclose(run.watch.history.stat("grad_norm"), eager.watch.history.stat("grad_norm"), rtol=1e-3, atol=1e-7)
    assert not run.watch.notices


def test_twelve_blocks_stay_compiled_from_the_dense_to_the_sparse_phase() -> None:
    bare = train(blocks_in_place, Compiler(True), watched=False, updates=100)
    run = train(blocks_in_place, Compiler(True), watched=True, updates=100, sampling=Sampling())
    assert run.counts == bare.counts
    assert run.counts["runs"] == 12 * 100
    assert run.counts["graphs"] <= 2  # with and without a gradient with respect to the input
    assert_same_weights(run.model, bare.model)
    calls = run.watch.history.stat("calls")[:, run.watch.history.layers.index("blocks.7.linear")]
    assert np.flatnonzero(calls == 1).tolist() == [*range(64), 70, 80, 90]


def test_without_an_optimizer_the_forward_pass_of_the_next_update_is_not_counted_in_this_one() -> None:
    watches = []
    for on in (True, False):
        with fresh():
            model = Net()
            forward = Compiler(on)(model)
            with GradWatch(model, console=False, sampling=SHORT) as watch:
                for x, y in batches(12):
                    F.cross_entropy(forward(x), y).backward()
                    for p in model.parameters():
                        p.data -= 0.1 * p.grad
                        p.grad = None
            watches.append(watch)
    assert watches[0].history.recorded == 12
    assert_same_statistics(*watches)


def test_two_models_in_turn_keep_their_own() -> None:
    watches = []
    for on in (True, False):
        with fresh():
            models = nn.ModuleDict({"g": Net(1), "d": Net(1)})
            forward = {name: Compiler(on)(model) for name, model in models.items()}
            optimizers = {name: torch.optim.SGD(model.parameters(), lr=0.1) for name, model in models.items()}
            with GradWatch(dict(models.items()), console=False, sampling=Sampling(dense=6, every=3)) as watch:
                for i, (x, y) in enumerate(batches(16)):
                    name = "gd"[i % 2]
                    optimizers[name].zero_grad()
                    forward["dg"[i % 2]](3 * x)  # of which no gradient is taken in this record
                    F.cross_entropy(forward[name](x), y).backward()
                    optimizers[name].step()
            watches.append(watch)
    assert_same_statistics(*watches)


def test_a_control_flow_operator_works_and_hides_what_is_in_it() -> None:
    class Either(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cond(x.sum() > 0, self.blocks[0], self.blocks[1], (x,)))

    bare = train(whole(Either, fullgraph=True), Compiler(True), watched=False)
    run = train(whole(Either, fullgraph=True), Compiler(True), watched=True)
    assert run.counts == bare.counts
    assert_same_weights(run.model, bare.model)
    calls = dict(zip(run.watch.history.layers, run.watch.history.stat("calls")[0], strict=True))
    assert calls["head"] == 1
    assert np.isnan(calls["blocks.0"])
    assert len(run.watch.notices) == 1
    assert "torch.cond" in run.watch.notices[0]


def test_what_is_exported_inside_the_block_is_what_it_is_outside() -> None:
    x = torch.randn(4, 16)
    codes = []
    for watched in (False, True):
        with fresh():
            model = Net()
            watch = GradWatch(model, console=False)
            if watched:
                watch.attach()
            exported = torch.export.export(model, (x,), strict=True)
            watch.detach()
            codes.append((exported.graph_module.code, sorted(exported.state_dict), sorted(exported.constants)))
    assert codes[0] == codes[1]


def test_a_compiled_train_step_is_watched_with_its_backward() -> None:
    def make(compiler: Compiler) -> Made:
        model = Net()

        @compiler
        def update(x: Tensor, y: Tensor) -> None:
            F.cross_entropy(model(x), y).backward()

        return model, update

    bare = train(make, Compiler(True), watched=False)
    run = train(make, Compiler(True), watched=True)
    eager = train(make, Compiler(False), watched=True)
    assert (run.counts["graphs"], run.counts["runs"]) == (bare.counts["graphs"], bare.counts["runs"])
    assert_same_weights(run.model, bare.model)
    assert_same_statistics(run.watch, eager.watch)


# -- compiled before, inside and behind the block ----------------------------------------------------------------------------------


def go_on(model: nn.Module, forward: Callable[[Tensor], Tensor], updates: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for x, y in batches(updates):
        optimizer.zero_grad()
        F.cross_entropy(forward(x), y).backward()
        optimizer.step()


def compiled(how: str, model: Net, compiler: Compiler) -> Callable[[Tensor], Tensor]:
    if how == "model":
        return compiler(model)  # type: ignore[no-any-return]
    for block in model.blocks:
        compiler.in_place(block)
    return model


def last_calls(watch: GradWatch, layer: str) -> float:
    calls = watch.history.stat("calls")[:, watch.history.layers.index(layer)]
    seen = watch.history.stat("calls")[:, 0] > 0  # the model itself is seen on each update that is looked at
    return float(calls[np.flatnonzero(seen)[-1]])


HOW = pytest.mark.parametrize("how", ["model", "blocks"])


@HOW
def test_compiled_before_attaching_is_said_once_and_mended_by_a_reset(how: str) -> None:
    with fresh():
        model = Net(10 if how == "blocks" else 2)
        compiler = Compiler(True)
        forward = compiled(how, model, compiler)
        twin = copy.deepcopy(model)
        go_on(model, forward, 2)
        graphs = compiler.counts()["graphs"]
        with GradWatch(model, console=False) as watch:
            go_on(model, forward, 6)
            assert compiler.counts()["graphs"] == graphs
            assert np.isnan(last_calls(watch, "blocks.0.linear"))
            torch.compiler.reset()
            go_on(model, forward, 6)
            assert last_calls(watch, "blocks.0.linear") == 1
    assert len(watch.notices) == 1
    assert "torch.compiler.reset()" in watch.notices[0]
    go_on(twin, twin, 2)
    with GradWatch(twin, console=False) as eager:
        go_on(twin, twin, 6)
        go_on(twin, twin, 6)
    np.testing.assert_allclose(watch.history.stat("grad_norm"), eager.history.stat("grad_norm"), rtol=1e-3)


@HOW
def test_compiled_inside_the_block_in_the_dense_phase_is_seen(how: str) -> None:
    with fresh():
        model = Net(10 if how == "blocks" else 2)
        compiler = Compiler(True)
        with GradWatch(model, console=False, sampling=Sampling(dense=6, every=3)) as watch:
            go_on(model, model, 3)
            go_on(model, compiled(how, model, compiler), 9)
            assert last_calls(watch, "blocks.1.linear") == 1
    assert compiler.counts()["graphs"] <= 2
    assert not watch.notices


@HOW
def test_compiled_inside_the_block_while_the_hooks_are_out_is_compiled_again_with_them(how: str) -> None:
    with fresh():
        model = Net(10 if how == "blocks" else 2)
        compiler = Compiler(True)
        with GradWatch(model, console=False, sampling=Sampling(dense=4, every=3)) as watch:
            go_on(model, model, 7)
            forward = compiled(how, model, compiler)
            go_on(model, forward, 15)
            assert last_calls(watch, "blocks.1.linear") == 1
    assert compiler.counts()["graphs"] <= 4
    assert not watch.notices


@HOW
def test_behind_the_block_nothing_is_written_and_each_graph_is_compiled_once_more_at_most(how: str) -> None:
    with fresh():
        model = Net(12 if how == "blocks" else 2)
        compiler = Compiler(True)
        forward = compiled(how, model, compiler)
        watch = GradWatch(model, console=False, sampling=SHORT)
        watch.attach()
        go_on(model, forward, 10)
        graphs, runs = compiler.counts()["graphs"], compiler.runs
        totals = [cell.traced.totals for cell in watch._recorder.inside.hooks.cells if cell.traced is not None]  # type: ignore[union-attr]
        watch.detach()
        before = torch.stack(totals)
        go_on(model, forward, 10)
        assert torch.equal(torch.stack(totals), before)
        assert compiler.runs == 2 * runs
        assert compiler.counts()["graphs"] <= 2 * graphs
        graphs = compiler.counts()["graphs"]
        with watch:  # again: what is compiled no longer knows it
            go_on(model, forward, 6)
        assert compiler.counts()["graphs"] == graphs
        assert compiler.runs == 2 * runs + runs * 6 // 10
    assert len(watch.notices) == 1
    assert watch.history.recorded == 16


@HOW
def test_two_watches_see_the_same_and_one_stays(how: str) -> None:
    with fresh():
        model = Net(10 if how == "blocks" else 2)
        compiler = Compiler(True)
        forward = compiled(how, model, compiler)
        with GradWatch(model, console=False) as watch:
            with GradWatch(model, console=False) as other:
                go_on(model, forward, 5)
            for name in FORWARD:
                np.testing.assert_array_equal(watch.history.stat(name), other.history.stat(name))
            go_on(model, forward, 5)
            assert last_calls(watch, "blocks.1.linear") == 1
    assert not watch.notices


@HOW
def test_copies_and_files_of_a_compiled_model_are_those_of_an_unwatched_one(how: str) -> None:
    def files(model: nn.Module, forward: Any) -> list[bytes]:
        found = []
        for thing in (forward, model, copy.deepcopy(forward), model.state_dict()):
            file = io.BytesIO()
            torch.save(thing, file)
            found.append(file.getvalue())
        return found

    found = []
    for watched in (False, True):
        with fresh():
            model = Net(2)
            compiler = Compiler(True)
            forward: Any = torch.compile(model, backend="aot_eager") if how == "model" else compiled(how, model, compiler)
            watch = GradWatch(model, console=False)
            if watched:
                watch.attach()
            go_on(model, forward, 3)
            found.append(files(model, forward))
            twin = copy.deepcopy(forward)
            assert not any(module._forward_hooks for module in twin.modules())
            go_on(twin, twin, 2)
            assert watch.history.recorded == (3 if watched else 0)
            go_on(model, forward, 1)
            if watched:
                assert last_calls(watch, "blocks.0.linear") == 1
            watch.detach()
    assert found[0] == found[1]


# -- inductor ----------------------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.act, self.norm, self.head = nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.act(self.linear(x))))


class SmallCheckpointed(Small):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(lambda x: self.norm(self.act(self.linear(x))), x, use_reentrant=False))


def small_blocks(compiler: Compiler) -> Made:
    model = Net(10)
    for block in model.blocks:
        compiler.in_place(block)
    return plain(model, model)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(whole(Small), id="model"),
        pytest.param(whole(SmallCheckpointed, fullgraph=True), id="checkpoint"),
        pytest.param(small_blocks, id="blocks"),
    ],
)
def test_inductor_fuses_the_statistics_and_changes_no_bit(make: Callable[[Compiler], Made]) -> None:
    bare = train(make, Compiler(True, "inductor"), watched=False, updates=8)
    run = train(make, Compiler(True, "inductor"), watched=True, updates=8)
    eager = train(make, Compiler(False), watched=True, updates=8)
    assert run.counts == bare.counts
    assert_same_weights(run.model, bare.model)
    assert_same_statistics(run.watch, eager.watch, rtol=1e-3)  # fused arithmetic, over a few updates


class Rounded(nn.Module):
    """Much that inductor fuses, and a kernel more or less decides where it rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 32)
        self.block = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Sigmoid(), nn.Linear(64, 32), nn.Dropout(0.1))
        self.layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)[None]
        return self.head(self.layer(x + self.block(x)))[0]


def rounded(compiler: Compiler) -> Made:
    model = Rounded()
    forward = compiler(model)

    def update(x: Tensor, y: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(forward(x).float(), y)
        loss.backward()

    return model, update


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_of_half_precision_compiled_code_counts_calls_only_for_who_reads_it_changes_where_it_rounds() -> None:
    bare = train(rounded, Compiler(True, "inductor"), watched=False, updates=12)
    run = train(rounded, Compiler(True, "inductor"), watched=True, updates=12)
    assert_same_weights(run.model, bare.model)
    layers = run.watch.history.layers
    assert (run.watch.history.stat("calls")[0, layers.index("block.1")]) == 1
    assert np.isnan(run.watch.history.stat("activation_rms")[:, layers.index("block.1")]).all()
