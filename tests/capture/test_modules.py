"""Statistics of layers: each loop runs twice, under a watch and under a reference that computes them in another way."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradwatch import GradWatch, Sampling
from tests.reference_layers import PER_INPUT, PER_LAYER, LayerReference

Model = nn.Module | dict[str, nn.Module]


@pytest.fixture(autouse=True)
def nothing_is_compiled() -> None:
    """In a process that has compiled something, a module that was not seen may have run all the same."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].utils.counters.clear()


class Bare:
    """What a loop tells the reference, told to nobody."""

    @contextlib.contextmanager
    def unseen(self) -> Iterator[None]:
        yield

    def backward(self, loss: Tensor, *, scale: float = 1.0, **options: Any) -> None:
        loss.backward(**options)

    def forget(self) -> None:
        pass

    def close(self, *names: str, keep: Collection[str] = ()) -> None:
        pass

    def add(self, name: str, module: nn.Module) -> None:
        pass


Loop = Callable[[Any, Any], None]

EVERYTHING = ("calls", "activation_rms", "activation_absmax", "activation_nonfinite", "delta_norm", "delta_nonfinite", "gain")


def compare(
    build: Callable[[], Model],
    loop: Loop,
    *,
    sees: Collection[str] = EVERYTHING,
    sampling: Sampling | None = None,
    rtol: float = 1e-4,
    loose: Mapping[str, float] | None = None,
    but: Collection[str] = (),
    **options: Any,
) -> GradWatch:
    """Run the loop under a watch and under the reference: every number is the same, and every NaN.

    Args:
        build: makes the model.
        loop: trains it, and tells the second argument what it does.
        sees: statistics of which there must be a number somewhere, lest NaN be compared with NaN.
        sampling: of the watch.
        rtol: relative tolerance.
        loose: another one for some statistics.
        but: statistics that are not compared.
        **options: of the reference.
    """
    torch.manual_seed(0)
    model = build()
    with GradWatch(model, console=False, sampling=sampling or Sampling()) as watch:
        torch.manual_seed(1)
        loop(model, Bare())
    torch.manual_seed(0)
    twin = build()
    reference = LayerReference(twin, **options)
    torch.manual_seed(1)
    loop(twin, reference)
    assert watch.notices == ()
    assert watch.history.layers == reference.layers
    assert watch.history.recorded == len(reference.rows) > 0
    for name in (*PER_LAYER, *PER_INPUT):
        if name in but:
            continue
        got, expected = watch.history.stat(name), reference.stat(name)
        tolerance = (loose or {}).get(name, rtol)
        np.testing.assert_allclose(
            got, expected, rtol=tolerance, atol=1e-6 if name in PER_INPUT else 1e-12, equal_nan=True, err_msg=name
        )
        assert name not in sees or np.isfinite(got).any(), f"{name}: nothing was seen"
    return watch


def steps(build_loss: Callable[[Any, int], Tensor], updates: int = 4, lr: float = 0.05) -> Loop:
    """The plain loop, with the loss of an update given its number."""

    def loop(model: Any, reference: Any) -> None:
        models = model.values() if isinstance(model, dict) else [model]
        optimizer = torch.optim.SGD([p for one in models for p in one.parameters()], lr=lr)
        for i in range(updates):
            optimizer.zero_grad()
            reference.backward(build_loss(model, i))
            optimizer.step()
            reference.close()

    return loop


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape)


def squares(output: Tensor) -> Tensor:
    return output.square().mean()


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 40), nn.Tanh(), nn.Linear(40, 8), nn.Sigmoid(), nn.Linear(8, 2)
    )


# -- architectures -----------------------------------------------------------------------------------------------------------------


def test_a_plain_mlp() -> None:
    sees = (*PER_LAYER, *PER_INPUT)
    compare(mlp, steps(lambda model, i: squares(model(rand(64, 12))), updates=14), sees=sees)


def test_smooth_activations_and_softmax() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(12, 48), nn.GELU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, 9), nn.Softmax(-1))

    compare(build, steps(lambda model, i: squares(model(3 * rand(64, 12))), updates=14), sees=PER_LAYER)


class Residual(nn.Module):
    """Everything in place that can be."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1)
        self.relu1 = nn.ReLU(inplace=True)
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        x = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        x += shortcut
        return self.relu2(x)


RELUS = ("0.relu1", "0.relu2", "1.relu1", "1.relu2")


def test_a_cnn_that_changes_everything_in_place() -> None:
    def build() -> nn.Module:
        return nn.Sequential(Residual(3, 8), Residual(8, 6), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 2))

    compare(
        build,
        steps(lambda model, i: squares(model(rand(10, 3, 12, 12))), updates=12),
        sees=PER_LAYER,
        channels=RELUS,
    )


def test_a_container_whose_first_modules_change_what_it_is_given() -> None:
    def build() -> nn.Module:
        def block(*more: nn.Module) -> nn.Module:
            return nn.Sequential(*more, nn.ReLU(inplace=True), nn.Linear(16, 16))

        drop = nn.Dropout(0.2, inplace=True)
        return nn.Sequential(nn.Linear(12, 16), block(), block(drop), nn.Sequential(block()), nn.Linear(16, 2))

    compare(build, steps(lambda model, i: squares(model(rand(10, 12)))), sees=("gain",))


def test_channels_last_memory() -> None:
    def build() -> nn.Module:
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(256, 2)
        )
        return model.to(memory_format=torch.channels_last)

    def loss(model: nn.Module, _: int) -> Tensor:
        return squares(model(rand(6, 3, 12, 12).contiguous(memory_format=torch.channels_last)))

    compare(build, steps(loss, updates=11), channels=("2",))


class Changed(nn.Module):
    """The output of a module is changed in place afterwards; of a 3-D Linear it is a view."""

    def __init__(self, change: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.first = nn.Linear(12, 40)
        self.last = nn.Linear(40, 3)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        self.change(h)
        return self.last(h)


CHANGES = [
    pytest.param(lambda h: h.add_(1), id="add"),
    pytest.param(lambda h: h.mul_(2), id="mul"),
    pytest.param(lambda h: h.relu_(), id="relu"),
    pytest.param(lambda h: h[..., :5].mul_(3), id="part"),
    pytest.param(lambda h: h.add_(1).mul_(2).tanh_(), id="several"),
]


@pytest.mark.parametrize("shape", [(30, 12), (5, 30, 12)], ids=["2d", "3d"])
@pytest.mark.parametrize("change", CHANGES)
def test_an_output_that_is_changed_in_place(change: Callable[[Tensor], object], shape: tuple[int, ...]) -> None:
    compare(
        lambda: Changed(change), steps(lambda model, i: squares(model(rand(*shape)))), but=("saturated_fraction", "dead_fraction")
    )


class UsedAndChanged(nn.Module):
    """An output that is used, and then changed in place and used again."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 40)
        self.last = nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        k = h * 2
        h.add_(1)
        return self.last(h + k)


@pytest.mark.parametrize("shape", [(30, 12), (5, 30, 12)], ids=["2d", "3d"])
def test_an_output_that_is_used_before_it_is_changed_in_place(shape: tuple[int, ...]) -> None:
    compare(UsedAndChanged, steps(lambda model, i: squares(model(rand(*shape)))))


class Chunks(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.how == "unbind":
            return x.unflatten(-1, (3, -1)).unbind(-2)
        return tuple(x.chunk(3, -1) if self.how == "chunk" else x.split(16, -1))


class Gated(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.cut, self.last = nn.Linear(12, 48), Chunks(how), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.cut(self.first(x))
        return self.last(a * torch.sigmoid(b) + 2 * c)


@pytest.mark.parametrize("shape", [(30, 12), (5, 30, 12)], ids=["2d", "3d"])
@pytest.mark.parametrize("how", ["chunk", "split", "unbind"])
def test_views_of_a_part(how: str, shape: tuple[int, ...]) -> None:
    compare(lambda: Gated(how), steps(lambda model, i: squares(model(rand(*shape)))), but=("saturated_fraction",))


@dataclass
class Record:
    hidden: Tensor
    states: list[Tensor]
    count: int = 3


class ModelOutput(OrderedDict[str, Any]):
    """As transformers has it: a dictionary with attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Nested(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.second, self.third, self.how = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 20), how

    def forward(self, x: Tensor) -> Any:
        a = torch.tanh(self.first(x))
        b = torch.tanh(self.second(a))
        c = self.third(b)
        match self.how:
            case "tuple":
                return a * 2, (b * 3, [c * 4, None]), 7
            case "dict":
                return {"loss": c.mean(), "a": a * 2, "b": b * 3, "c": c, "d": a * b, "e": a - b}
            case "dataclass":
                return Record(c, [a * 2, b * 3])
            case "model output":
                return ModelOutput(last=c, states=(a * 2, b * 3), index=torch.arange(3))
            case "loss and logits":
                return squares(c * 2), c


class Over(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.body = Nested(how)

    def forward(self, x: Tensor) -> Tensor:
        output = self.body(x)
        found = {"tuple": lambda: [output[0], *output[1][0:1], output[1][1][0]], "dict": lambda: list(output.values())}
        found |= {"dataclass": lambda: [output.hidden, *output.states], "model output": lambda: [output.last, *output.states]}
        found |= {"loss and logits": lambda: list(output)}
        return torch.stack([squares(t) for t in found[self.body.how]()]).sum()


@pytest.mark.parametrize("how", ["tuple", "dict", "dataclass", "model output", "loss and logits"])
def test_nested_outputs(how: str) -> None:
    compare(lambda: Over(how), steps(lambda model, i: model(rand(30, 12))), but=("saturated_fraction", "dead_fraction"))


class Sequence(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(23, 16), body, nn.Linear(16, 23)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens)
        if isinstance(self.body, nn.MultiheadAttention):
            return self.head(self.body(h, h, h)[0])
        h = self.body(h)
        return self.head(h[0] if isinstance(h, tuple) else h)


BODIES = {
    "lstm": lambda: nn.LSTM(16, 16, num_layers=2, batch_first=True),
    "gru": lambda: nn.GRU(16, 16, bidirectional=False),
    "attention": lambda: nn.MultiheadAttention(16, 2, batch_first=True),
    "encoder layer": lambda: nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True),
    "pre-norm encoder": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True, norm_first=True, activation=nn.GELU()),
        2,
        enable_nested_tensor=False,
    ),
}


@pytest.mark.parametrize("body", BODIES)
def test_recurrent_and_attention(body: str) -> None:
    loss = steps(lambda model, i: F.cross_entropy(model(torch.randint(0, 23, (8, 11))).flatten(0, 1), torch.randint(0, 23, (88,))))
    # A dropout of nothing gives back what it was given, which is no module's output.
    compare(lambda: Sequence(BODIES[body]()), loss, but=("saturated_fraction", "dead_fraction"), blind=("body.dropout",))


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first = nn.Linear(12, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)) for _ in range(2))
        self.last = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=self.reentrant)
        return self.last(x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_is_not_counted(reentrant: bool) -> None:
    watch = compare(lambda: Checkpointed(reentrant=reentrant), steps(lambda model, i: squares(model(rand(30, 12))), updates=12))
    assert (watch.history.stat("calls")[:, watch.history.layers.index("blocks.0.0")] == 1).all()


class Shared(nn.Module):
    def __init__(self, times: int) -> None:
        super().__init__()
        self.first, self.shared, self.last, self.times = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 2), times

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(self.times):
            x = x + torch.tanh(self.shared(x))
        return self.last(x)


@pytest.mark.parametrize("times", [3, 11])
def test_a_module_used_several_times(times: int) -> None:
    watch = compare(lambda: Shared(times), steps(lambda model, i: squares(model(rand(30, 12)))), but=("saturated_fraction",))
    assert watch.history.stat("calls")[:, 2].tolist() == [times] * 4


class OneActivation(nn.Module):
    """One activation behind every layer, whatever its width, and twice behind the first."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act, self.drop = act, nn.Dropout(0.1)
        self.fc1, self.fc2, self.fc3, self.head = nn.Linear(12, 48), nn.Linear(48, 40), nn.Linear(40, 24), nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.drop(self.act(self.fc1(x))))
        x = self.act(self.drop(self.fc2(x)))
        return self.head(self.act(self.fc3(x)))


@pytest.mark.parametrize("act", [nn.ReLU, nn.Tanh, nn.Sigmoid])
def test_one_activation_in_several_places_is_told_of_each(act: type[nn.Module]) -> None:
    def loop(model: nn.Module, reference: Any) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(14):
            optimizer.zero_grad()
            for _ in range(2):
                reference.backward(squares(model(rand(30, 12))))
            optimizer.step()
            reference.close()

    watch = compare(lambda: OneActivation(act()), loop)
    told = watch.history.stat("dead_fraction" if act is nn.ReLU else "saturated_fraction")[-1]
    assert np.isfinite(told).tolist() == [name in ("act", "fc1", "fc2", "fc3") for name in watch.history.layers]
    facts = {fact.name: fact for fact in watch.history.meta.layers}
    assert facts["act"].places == ("fc1", "fc2", "fc3")
    assert facts["fc2"].flat == facts["act"].flat != "" == facts["head"].flat


class Basic(nn.Module):
    """As torchvision writes its residual blocks: one ReLU in place, behind either sum."""

    def __init__(self, channels: int, down: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.down = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels)) if down else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.down is None else self.down(x)
        return self.relu(out)


def test_an_activation_behind_more_layers_than_calls_are_sampled_of_a_module() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fcs, self.act = nn.ModuleList(nn.Linear(12, 12) for _ in range(12)), nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            for fc in self.fcs:
                x = self.act(fc(x))
            return x

    watch = compare(Deep, steps(lambda model, i: squares(model(rand(30, 12)))))
    assert len(next(fact for fact in watch.history.meta.layers if fact.name == "act").places) == 12


def test_an_activation_is_sampled_for_ever_where_a_forward_pass_is_left_over_in_each_update() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with GradWatch(model, console=False) as watch:
        for _ in range(12):
            optimizer.zero_grad()
            squares(model(rand(30, 12))).backward()
            model(rand(30, 12))
            optimizer.step()
    assert np.isfinite(watch.history.stat("saturated_fraction")[:, [2, 4, 6]]).all()


def test_residual_blocks_with_one_activation_each() -> None:
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), Basic(8, False), Basic(8, True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
        )

    watch = compare(build, steps(lambda model, i: squares(model(rand(12, 3, 14, 14))), updates=12), channels=("1.relu", "2.relu"))
    facts = {fact.name: fact for fact in watch.history.meta.layers}
    assert facts["1.relu"].places == ("1.bn1", "1.bn2")
    assert facts["2.relu"].places == ("2.bn1", "2.bn2")


def test_an_activation_behind_one_layer_stands_in_one_place_however_often_it_runs() -> None:
    class Unrolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.mix, self.act, self.head = nn.Linear(6, 16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.zeros(len(x), 16)
            for t in range(5):
                h = self.act(self.read(x[:, t]) + self.mix(h))
            return self.head(h)

    watch = compare(Unrolled, steps(lambda model, i: squares(model(rand(20, 5, 6))), updates=12))
    assert next(fact for fact in watch.history.meta.layers if fact.name == "act").places == ()


class Wide(nn.Module):
    """Layouts of all kinds, each larger than a sample."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first = nn.Linear(12, 64)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        match self.how:
            case "transposed":
                return h.transpose(1, 2)
            case "expanded":
                return h[:, :1].expand(-1, 50, -1)
            case "sliced":
                return h[:, ::2]
            case "flat":
                return h.flatten()
        return h


@pytest.mark.parametrize("how", ["transposed", "expanded", "sliced", "flat", "as it is"])
def test_layouts(how: str) -> None:
    def loss(model: Any, i: int) -> Tensor:
        return (model[1](model[0](rand(8, 40, 12))) * torch.linspace(0, 1, 5)[i]).sum()

    compare(lambda: nn.Sequential(Wide(how), nn.Identity()), steps(loss, lr=1e-5))


class Odd(nn.Module):
    """Outputs that are no ordinary floating tensor."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Any:
        match self.how:
            case "parameter":
                return self.weight
            case "integers":
                return (x > 0).long()
            case "boolean":
                return x > 0
            case "empty":
                return x[:0] * self.weight
            case "scalar":
                return (x * self.weight).mean()
            case "complex":
                return torch.complex(x * self.weight, x)
            case "nothing":
                return None
            case "text":
                return {"name": "text", 3: [None]}


@pytest.mark.parametrize("how", ["parameter", "integers", "boolean", "empty", "scalar", "complex", "nothing", "text"])
def test_odd_outputs(how: str) -> None:
    def loss(model: Any, i: int) -> Tensor:
        h = model[0](rand(30, 6))
        out = model[1](h)
        odd = out.to(torch.complex64).abs().sum() if isinstance(out, Tensor) else torch.zeros(())
        return squares(model[2](h)) + odd + model[1].weight.sum()

    compare(lambda: nn.Sequential(nn.Linear(6, 6), Odd(how), nn.Linear(6, 2)), steps(loss), sees=("delta_norm",))


def test_float64() -> None:
    compare(lambda: mlp().double(), steps(lambda model, i: squares(model(1e3 * rand(64, 12).double())), updates=11), sees=PER_LAYER)


def test_what_is_not_finite_is_counted() -> None:
    def loss(model: Any, i: int) -> Tensor:
        x = rand(64, 12)
        if i == 1:
            x[3, 2] = torch.nan
        if i == 2:
            x[60, 5] = torch.inf
        return squares(model(x)) * (torch.nan if i == 3 else 1)

    watch = compare(mlp, steps(loss, updates=4, lr=0.0))
    assert (watch.history.stat("activation_nonfinite") > 0).any()
    assert (watch.history.stat("delta_nonfinite") > 0).any()
    assert watch.history.stat("input_nonfinite").tolist() == [0, 1, 1, 0]


def test_one_element_between_the_chunks() -> None:
    class Poison(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            x.view(-1)[70] = torch.nan
            return x

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(12, 90), Poison(), nn.Linear(90, 1))

    watch = compare(build, steps(lambda model, i: squares(model(rand(90, 12)))), sees=("activation_nonfinite",))
    assert watch.history.stat("activation_nonfinite")[0].tolist()[2] == 1


def test_an_input_far_from_zero() -> None:
    compare(mlp, steps(lambda model, i: squares(model(1e5 + rand(64, 12))), lr=0.0), but=("saturated_fraction",), rtol=1e-3)


def test_the_gradient_of_an_output_is_that_of_all_its_uses() -> None:
    """An output that is also used inside the module: the total, as of any tensor."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(12, 12)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.tanh(x)
            return h, self.linear(h)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), Both())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with GradWatch(model, console=False) as watch:
        h, out = model(rand(32, 12))
        h.retain_grad()
        out.retain_grad()
        (squares(h) + squares(out)).backward()
        optimizer.step()
    assert h.grad is not None
    assert out.grad is not None
    expected = torch.stack([h.grad.norm(), out.grad.norm()]).norm().item()
    assert watch.history.stat("delta_norm")[0, 2] == pytest.approx(expected, rel=1e-5)


# -- loops -------------------------------------------------------------------------------------------------------------------------


def test_micro_batches_with_a_short_last_group() -> None:
    def loop(model: nn.Module, reference: Any) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for i in range(14):
            reference.backward(squares(model(rand(16, 12))) / 4)
            if i % 4 == 3 or i == 13:
                optimizer.step()
                optimizer.zero_grad()
                reference.close()

    watch = compare(mlp, loop)
    assert watch.history.stat("calls")[:, 1].tolist() == [4, 4, 4, 2]


def test_more_micro_batches_than_are_sampled() -> None:
    def loop(model: nn.Module, reference: Any) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(2):
            for _ in range(11):
                reference.backward(squares(model(rand(16, 12))) / 11)
            optimizer.step()
            optimizer.zero_grad()
            reference.close()

    watch = compare(mlp, loop)
    assert watch.history.stat("calls")[:, 1].tolist() == [11, 11]


def test_several_backward_calls_through_a_retained_graph() -> None:
    def loop(model: nn.Module, reference: Any) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            out = model(rand(16, 12))
            reference.backward(squares(out), retain_graph=True)
            reference.backward(out.mean(), retain_graph=True)
            reference.backward(squares(out))
            optimizer.step()
            reference.close()

    compare(mlp, loop)


def test_two_forward_passes_before_one_backward() -> None:
    compare(mlp, steps(lambda model, i: (model(rand(16, 12)) * model(rand(16, 12))).mean()))


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_loss_scale_is_divided_out_of_deltas(by_hand: bool) -> None:
    def loop(model: nn.Module, reference: Any) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for i in range(6):
            optimizer.zero_grad()
            loss = squares(model(rand(16, 12)))
            if by_hand:
                reference.backward(loss * 1024, scale=1024 if i > 2 else 1)  # that it is one shows in the third update
                for p in model.parameters():
                    p.grad /= 1024  # type: ignore[operator]
                optimizer.step()
            else:
                reference.backward(scaler.scale(loss), scale=1024)
                scaler.step(optimizer)
                scaler.update()
            reference.close()

    watch = compare(mlp, loop, but=("delta_norm",) if by_hand else ())
    if by_hand:
        norms = watch.history.stat("delta_norm")[:, 1]
        scale = watch.history.stat("loss_scale")
        assert scale[-1] == 1024
        assert norms[scale == 1024].max() < 0.01 * norms[scale == 1].max()


def test_autocast_to_bfloat16() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(12, 48), nn.LayerNorm(48), nn.GELU(), nn.Linear(48, 40), nn.Tanh(), nn.Linear(40, 2))

    def loss(model: nn.Module, _: int) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return squares(model(rand(64, 12)).float())

    compare(build, steps(loss, updates=11), sees=PER_LAYER, loose={"saturated_fraction": 5e-3})


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_between_updates_leaves_no_trace(mode: Callable[[], Any]) -> None:
    def loop(model: Any, reference: Any) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(12):
            with reference.unseen(), mode():
                model.eval()
                model(10 * rand(7, 12))
                model[2](rand(7, 48))
                model.train()
            optimizer.zero_grad()
            loss = squares(model(rand(64, 12)))
            with reference.unseen(), mode():
                model(100 * rand(7, 12))
                model[0](rand(7, 12))
            reference.backward(loss)
            with reference.unseen(), mode():
                model(100 * rand(7, 12))
            optimizer.step()
            reference.close()
            with reference.unseen(), mode():
                model[:3](100 * rand(7, 12))

    compare(mlp, loop, sees=(*PER_LAYER, *PER_INPUT))


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, 16), nn.Tanh())
        self.decoder = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 12))

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def training_step(self, x: Tensor) -> Tensor:
        return F.mse_loss(self.decoder(self.encode(x)), x)


def test_a_root_that_is_never_called() -> None:
    watch = compare(Autoencoder, steps(lambda model, i: model.training_step(rand(32, 12)), updates=11), sees=PER_LAYER)
    assert (watch.history.stat("calls")[:, 0] == 0).all()


class OnFrozen(nn.Module):
    def __init__(self, mode: Callable[[], Any]) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(12, 16), nn.ReLU()).requires_grad_(False)
        self.head, self.mode = nn.Linear(16, 2), mode

    def forward(self, x: Tensor) -> Tensor:
        with self.mode():
            h = self.backbone(x)
        return self.head(h.clone())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_frozen_backbone_inside_the_model(mode: Callable[[], Any]) -> None:
    compare(lambda: OnFrozen(mode), steps(lambda model, i: squares(model(rand(32, 12)))), sees=("activation_rms", "delta_norm"))


def gan_loop(model: Any, reference: Any) -> None:
    generator, discriminator = model["generator"], model["discriminator"]
    step_g = torch.optim.SGD(generator.parameters(), lr=0.05)
    step_d = torch.optim.SGD(discriminator.parameters(), lr=0.05)
    for _ in range(4):
        fake = generator(rand(16, 4))
        step_d.zero_grad()
        reference.backward(F.softplus(-discriminator(rand(16, 2))).mean() + F.softplus(discriminator(fake.detach())).mean())
        step_d.step()
        reference.close("discriminator", keep=("generator",))
        step_g.zero_grad()
        reference.backward(F.softplus(-discriminator(fake)).mean())
        step_g.step()
        reference.close("generator")


def gan() -> dict[str, nn.Module]:
    return {
        "generator": nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2)),
        "discriminator": nn.Sequential(nn.Linear(2, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1)),
    }


def test_a_gan_as_a_mapping() -> None:
    compare(gan, gan_loop, but=(*PER_INPUT, "saturated_fraction"))


@pytest.mark.parametrize("which", ["generator", "discriminator"])
def test_one_half_of_a_gan(which: str) -> None:
    torch.manual_seed(0)
    both = gan()
    with GradWatch(both, console=False) as together:
        torch.manual_seed(1)
        gan_loop(both, Bare())
    torch.manual_seed(0)
    halves = gan()
    with GradWatch(halves[which], console=False) as alone:
        torch.manual_seed(1)
        gan_loop(halves, Bare())
    mine = [layer.split(".")[0] == which for layer in together.history.layers]
    rows = slice(which == "generator", None, 2)
    for name in PER_LAYER:
        np.testing.assert_array_equal(alone.history.stat(name), together.history.stat(name)[rows][:, mine], err_msg=name)


def test_lbfgs_records_its_first_evaluation() -> None:
    def loop(model: nn.Module, reference: Any) -> None:
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
        for _ in range(3):
            x = rand(32, 12)
            evaluations = 0

            def closure(x: Tensor = x) -> Tensor:
                nonlocal evaluations
                evaluations += 1
                optimizer.zero_grad()
                if evaluations > 1:
                    with reference.unseen():
                        loss = squares(model(x))
                        loss.backward()
                else:
                    loss = squares(model(x))
                    reference.backward(loss)
                return loss

            optimizer.step(closure)
            reference.close()

    compare(mlp, loop)


def test_weights_moved_by_hand_in_the_sparse_phase() -> None:
    def loop(model: nn.Module, reference: Any) -> None:
        for _ in range(14):
            model.zero_grad()
            loss = squares(model(rand(32, 12)))
            reference.backward(loss)
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.05 * p.grad  # type: ignore[operator]
            reference.close()

    compare(mlp, loop, sampling=Sampling(dense=3, every=4), dense=3, every=4)


def test_an_optimizer_that_steps_inside_backward() -> None:
    def loop(model: nn.Module, reference: Any) -> None:
        optimizers = {p: torch.optim.SGD([p], lr=0.05) for p in model.parameters()}

        def hook(p: Tensor) -> None:
            optimizers[p].step()  # type: ignore[index]
            p.grad = None

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(hook)
        for _ in range(12):
            reference.backward(squares(model(rand(32, 12))))
            reference.close()

    compare(mlp, loop, sampling=Sampling(dense=3, every=4), dense=3, every=4)


@pytest.mark.parametrize("every", [1, 4])
def test_the_cadence(every: int) -> None:
    watch = compare(
        mlp,
        steps(lambda model, i: squares(model(rand(32, 12))), updates=15),
        sampling=Sampling(dense=3, every=every),
        dense=3,
        every=every,
    )
    seen = np.isfinite(watch.history.stat("activation_rms")).all(1)
    assert seen.tolist() == [i < 3 or i % every == 0 for i in range(15)]


def test_the_cadence_is_counted_for_each_owner() -> None:
    torch.manual_seed(0)
    model = gan()
    with GradWatch(model, console=False, sampling=Sampling(dense=2, every=4)) as watch:
        step_g = torch.optim.SGD(model["generator"].parameters(), lr=0.05)
        step_d = torch.optim.SGD(model["discriminator"].parameters(), lr=0.05)
        for i in range(40):
            for optimizer in [step_d] if i % 4 else [step_d, step_g]:
                step_d.zero_grad()
                step_g.zero_grad()
                fake = model["generator"](rand(16, 4))
                squares(model["discriminator"](fake if optimizer is step_g else fake.detach())).backward()
                optimizer.step()
    seen = np.isfinite(watch.history.stat("activation_rms"))
    of_g = np.isfinite(watch.history.stat("lr")[:, 0])
    generator = [layer.startswith("generator") for layer in watch.history.layers]
    expected = [i < 2 or i % 4 == 0 for i in range(40)]
    assert seen[of_g][:, generator].all(1).tolist() == expected[: of_g.sum()]
    assert seen[~of_g][:, ~np.array(generator)].all(1).tolist() == expected[: (~of_g).sum()]
    assert not seen[of_g][:, ~np.array(generator)].any()


def looked_at(module: nn.Module) -> int:
    """Hooks that sample what it puts out. (In the first update each part of a model also has one that sees it called.)"""
    return sum(type(getattr(hook, "__self__", None)).__name__ == "Cell" for hook in module._forward_hooks.values())


def test_a_module_out_of_scope_costs_no_hook() -> None:
    def loop(model: Any, reference: Any) -> None:
        if isinstance(reference, Bare):
            assert [looked_at(module) for module in model.children()] == [1, 1, 0, 1, 1, 1, 1]
        steps(lambda model, i: squares(model(rand(32, 12))))(model, reference)

    compare(mlp, loop, sampling=Sampling(exclude=("2",)), scope=lambda name: name != "2")


def test_only_what_is_included_is_looked_at() -> None:
    def loop(model: Any, reference: Any) -> None:
        if isinstance(reference, Bare):
            assert [looked_at(module) for module in model.children()] == [0, 0, 1, 0, 1, 0, 0]
        steps(lambda model, i: squares(model(rand(32, 12))))(model, reference)

    compare(mlp, loop, sampling=Sampling(include=("2", "4")), scope=lambda name: name in ("2", "4"), but=("saturated_fraction",))


def test_lazy_modules() -> None:
    def loop(model: nn.Module, reference: Any) -> None:
        optimizer: torch.optim.Optimizer | None = None
        for _ in range(4):
            model.zero_grad()
            reference.backward(squares(model(rand(32, 12))))
            optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05)
            optimizer.step()
            reference.close()

    compare(lambda: nn.Sequential(nn.LazyLinear(20), nn.ReLU(), nn.LazyLinear(2)), loop)


class Growing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(12, 12)])
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x)


def test_a_module_that_comes_during_the_run() -> None:
    torch.manual_seed(0)
    model = Growing()
    with GradWatch(model, console=False) as watch:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for i in range(8):
            if i == 4:
                model.blocks.append(nn.Linear(12, 12))
                optimizer.add_param_group({"params": model.blocks[1].parameters()})
            optimizer.zero_grad()
            squares(model(rand(32, 12))).backward()
            optimizer.step()
    calls = dict(zip(watch.history.layers, watch.history.stat("calls").T.tolist(), strict=True))
    assert calls["head"] == calls["blocks.0"] == calls[""] == [1] * 8
    # It came while no hook was there for it: the update in which it first ran tells nothing of it.
    assert np.isnan(calls["blocks.1"][:5]).all()
    assert calls["blocks.1"][5:] == [1] * 3
    rms = dict(zip(watch.history.layers, watch.history.stat("activation_rms").T, strict=True))
    assert np.isfinite(rms["head"]).all()
    assert np.isfinite(rms["blocks.0"]).all()
    assert np.isfinite(rms["blocks.1"][5:]).all()


class Stop(nn.Module):
    """Raises where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.error: type[BaseException] | None = None
        self.in_backward = False

    def forward(self, x: Tensor) -> Tensor:
        if self.error is not None and not self.in_backward:
            raise self.error
        x = x * 1.0
        if self.error is not None:
            x.register_hook(self.stop)
        return x

    def stop(self, _: Tensor) -> None:
        assert self.error is not None
        raise self.error


def stopping() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), Stop(), nn.Linear(16, 2))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("where", ["forward", "evaluation", "backward"])
def test_an_update_that_was_broken_off_leaves_no_trace(where: str, error: type[BaseException]) -> None:
    def loop(model: Any, reference: Any) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for i in range(8):
            optimizer.zero_grad()
            if i in (2, 5):
                model[1].error, model[1].in_backward = error, where == "backward"
                with (
                    contextlib.suppress(error),
                    reference.unseen(),
                    torch.no_grad() if where == "evaluation" else contextlib.nullcontext(),
                ):
                    squares(model(rand(32, 12))).backward()
                model[1].error = None
                with reference.unseen(), torch.no_grad():
                    model(rand(32, 12))
                optimizer.zero_grad()
            reference.backward(squares(model(rand(32, 12))))
            optimizer.step()
            reference.close()

    compare(stopping, loop)


def test_a_penalty_on_gradients_is_not_taken_for_a_delta() -> None:
    def loss(model: nn.Module, _: int) -> Tensor:
        x = rand(32, 12).requires_grad_()
        out = model(x)
        (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return squares(out) + squares(grad)

    def build() -> nn.Module:
        # No tanh, which saves its output: a second derivative passes the tensor itself, and not the reference's stand-in.
        return nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 2))

    # The first layer's input is a leaf: nothing is hung on what is the user's.
    compare(build, steps(loss))


def test_gradients_taken_between_forward_and_backward() -> None:
    def loss(model: nn.Module, _: int) -> Tensor:
        out = model(rand(4, 8, 12))
        torch.autograd.grad(out.mean(), list(model.parameters()), retain_graph=True)
        return squares(out)

    compare(lambda: nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 2)), steps(loss))


class Doubled(nn.Module):
    """A user's hook replaces its output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)
        self.linear.register_forward_hook(lambda module, args, output: output * 2)
        self.last = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.linear(x))


def test_a_hook_of_the_users_that_replaces_the_output() -> None:
    compare(Doubled, steps(lambda model, i: squares(model(rand(32, 12)))))


# -- others that run the model -----------------------------------------------------------------------------------------------------


def test_two_watches_see_the_same() -> None:
    torch.manual_seed(0)
    model = mlp()
    with GradWatch(model, console=False) as first, GradWatch(model, console=False) as second:
        steps(lambda model, i: squares(model(rand(32, 12))), updates=12)(model, Bare())
    for name in (*PER_LAYER, *PER_INPUT):
        np.testing.assert_array_equal(first.history.stat(name), second.history.stat(name), err_msg=name)
        assert np.isfinite(first.history.stat(name)).any()


def test_a_copy_is_not_watched() -> None:
    def loop(model: nn.Module, reference: Any) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(4):
            with reference.unseen():
                if isinstance(reference, Bare):
                    clone = deepcopy(model)
                    squares(clone(torch.ones(32, 12))).backward()
                    assert not any(module._forward_hooks or module._forward_pre_hooks for module in clone.modules())
            optimizer.zero_grad()
            reference.backward(squares(model(rand(32, 12))))
            optimizer.step()
            reference.close()

    compare(mlp, loop)


def test_another_thread_that_runs_the_model_leaves_no_trace() -> None:
    class Meeting(nn.Module):
        """Waits in the middle of the forward pass while another thread runs the model."""

        def __init__(self) -> None:
            super().__init__()
            self.other: Callable[[], object] | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.other is not None:
                run, self.other = self.other, None
                thread = threading.Thread(target=run)
                thread.start()
                thread.join()
            return x * 1.0

    def loop(model: Any, reference: Any) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

        def other() -> None:
            with reference.unseen():
                model(rand(5, 12))
                model[0](rand(5, 12))

        for _ in range(4):
            optimizer.zero_grad()
            reference.backward(squares(model(rand(32, 12))))
            optimizer.step()
            reference.close()
            model[1].other = other

    compare(lambda: nn.Sequential(nn.Linear(12, 16), Meeting(), nn.Linear(16, 2)), loop)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_leaves_no_trace() -> None:
    def loop(model: Any, reference: Any) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for i in range(4):
            if i == 2 and isinstance(reference, Bare):
                pid = os.fork()
                if pid == 0:
                    try:
                        model(torch.zeros(5, 12))
                        bad = any(module._forward_hooks for module in model.modules())
                    except BaseException:
                        bad = True
                    os._exit(int(bad))
                assert os.waitpid(pid, 0)[1] == 0
            optimizer.zero_grad()
            reference.backward(squares(model(rand(32, 12))))
            optimizer.step()
            reference.close()

    compare(mlp, loop)
