"""Sick runs: one planted fault each, with its name and its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Blobs, Case, Event, Pictures, Setup, Text, classify, evens, fit, initialise, mlp
from tests.zoo.earlier.models import (
    GPT,
    Bottleneck,
    Encoder,
    Multiply,
    PlainCNN,
    RecurrentReadout,
    ResNet,
    ScaleBackward,
    SequenceNet,
    TwoTowers,
)

SICK: list[Case] = []
VANISHING = ("vanishing_gradient",)
EXPLODING = ("exploding_gradient",)
SATURATED = ("saturated_activation", "vanishing_gradient")
ANY_NON_FINITE = ("non_finite_activation", "non_finite_gradient", "non_finite_loss", "non_finite_weight")
# Growth that ends in NaN may be told as either.
DIVERGING = (*EXPLODING, *ANY_NON_FINITE)


def sick(
    name: str, rules: tuple[str, ...], region: tuple[str, ...] = (), onset: int = 0
) -> Callable[[Callable[[int], Setup]], Callable[[int], Setup]]:
    def add(build: Callable[[int], Setup]) -> Callable[[int], Setup]:
        SICK.append(Case(name, build, rules, region, onset))
        return build

    return add


def _stack(name: str, act: type[nn.Module], depth: int, sick_up_to: int, optimizer: str, lr: float, **more: object) -> None:
    width, init, batch = int(more.get("width", 32)), more.get("init"), int(more.get("batch", 32))  # type: ignore[call-overload]

    def build(seed: int) -> Setup:
        model = mlp(act, depth, width, bias=bool(more.get("bias", True)))
        if init:
            initialise(model, init)  # type: ignore[arg-type]
        o = getattr(torch.optim, optimizer)(model.parameters(), lr)
        return fit(model, classify(model, Blobs(seed, batch=batch)), o)

    SICK.append(Case(name, build, VANISHING, evens(0, 2 * sick_up_to)))


_normal = nn.init.normal_
_stack("sigmoid_8_sgd", nn.Sigmoid, 8, 4, "SGD", 0.1)
_stack("sigmoid_10_sgd", nn.Sigmoid, 10, 6, "SGD", 0.1)
_stack("sigmoid_10_adam", nn.Sigmoid, 10, 6, "Adam", 1e-3)
_stack("sigmoid_10_wide_batch_8", nn.Sigmoid, 10, 6, "SGD", 0.5, width=128, batch=8)
_stack("sigmoid_15_adamw", nn.Sigmoid, 15, 11, "AdamW", 3e-4)
_stack("sigmoid_20_xavier_sgd", nn.Sigmoid, 20, 15, "SGD", 0.1, init=nn.init.xavier_normal_)
_stack("sigmoid_30_rmsprop", nn.Sigmoid, 30, 25, "RMSprop", 1e-3)
_stack("sigmoid_50_sgd", nn.Sigmoid, 50, 45, "SGD", 0.1)
_stack("sigmoid_12_no_bias", nn.Sigmoid, 12, 8, "SGD", 0.1, bias=False)
_stack("hardsigmoid_12_sgd", nn.Hardsigmoid, 12, 8, "SGD", 0.1)
_stack("tanh_30_default_sgd", nn.Tanh, 30, 20, "SGD", 0.05)
_stack("tanh_40_default_adam", nn.Tanh, 40, 25, "Adam", 1e-4)
_stack("tanh_20_small_normal", nn.Tanh, 20, 14, "SGD", 0.1, init=lambda w: _normal(w, std=0.05))
_stack("softsign_30_sgd", nn.Softsign, 30, 20, "SGD", 0.05)
_stack("tiny_init_relu_8_1e-3", nn.ReLU, 8, 8, "SGD", 0.1, init=lambda w: _normal(w, std=1e-3))
_stack("tiny_init_relu_6_1e-2", nn.ReLU, 6, 6, "SGD", 0.05, init=lambda w: _normal(w, std=1e-2))
_stack("tiny_init_tanh_10_1e-2", nn.Tanh, 10, 10, "SGD", 0.1, init=lambda w: _normal(w, std=1e-2))
_stack("tiny_init_gelu_8_5e-3", nn.GELU, 8, 8, "SGD", 0.1, init=lambda w: _normal(w, std=5e-3))
_stack("relu_30_default_sgd", nn.ReLU, 30, 22, "SGD", 0.05)
_stack("sigmoid_9_sgd_momentum_like", nn.Sigmoid, 9, 5, "SGD", 1.0, width=64)


@sick("tiny_init_middle_two_of_8", VANISHING, evens(0, 8))
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, 8, 64)
    for i in (6, 8):
        nn.init.normal_(model[i].weight, std=1e-4)
    return fit(model, classify(model, Blobs(seed)), torch.optim.SGD(model.parameters(), 0.05))


@sick("tiny_init_conv_1e-3", VANISHING, ("features",))
def _(seed: int) -> Setup:
    model = initialise(PlainCNN(depth=6, norm=False), lambda w: nn.init.normal_(w, std=1e-3), (nn.Conv2d,))
    return fit(model, classify(model, Pictures(seed)), torch.optim.SGD(model.parameters(), 0.05))


@sick("cnn_sigmoid_8", VANISHING, ("features.0", "features.2", "features.4", "features.6", "features.8"))
def _(seed: int) -> Setup:
    model = PlainCNN(depth=8, norm=False, act=nn.Sigmoid)
    return fit(model, classify(model, Pictures(seed)), torch.optim.SGD(model.parameters(), 0.1))


@sick("saturated_bottleneck_tanh", SATURATED, (*evens(0, 4), "5"))
def _(seed: int) -> Setup:
    model = mlp(nn.Tanh, 6, 32)
    with torch.no_grad():
        model[4].bias.add_(torch.where(torch.rand(32) < 0.5, 12.0, -12.0))
    return fit(model, classify(model, Blobs(seed)), torch.optim.SGD(model.parameters(), 0.1))


@sick("saturated_sigmoid_gate_relu_net", SATURATED, ("body", "gate"))
def _(seed: int) -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp(nn.ReLU, 3, 64, outputs=64)
            self.gate, self.head = nn.Linear(64, 64), mlp(nn.ReLU, 1, 64, 64)
            nn.init.constant_(self.gate.bias, -16.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.sigmoid(self.gate(F.relu(self.body(x)))))

    model = Net()
    return fit(model, classify(model, Blobs(seed)), torch.optim.SGD(model.parameters(), 0.1))


@sick("scaled_1e-4_between_blocks", VANISHING, ("0", "2", "4"))
def _(seed: int) -> Setup:
    layers = list(mlp(nn.ReLU, 6, 64))
    layers.insert(6, Multiply(1e-4))
    model = nn.Sequential(*layers)
    return fit(model, classify(model, Blobs(seed)), torch.optim.SGD(model.parameters(), 0.1))


@sick("scaled_1e-2_after_each_of_4", VANISHING, ("0", "3"))
def _(seed: int) -> Setup:
    layers: list[nn.Module] = []
    for a, b in ((16, 64), (64, 64), (64, 64), (64, 64)):
        layers += [nn.Linear(a, b), nn.ReLU(), Multiply(1e-2)]
    model = nn.Sequential(*layers, nn.Linear(64, 4))
    return fit(model, classify(model, Blobs(seed)), torch.optim.SGD(model.parameters(), 0.1))


@sick("scaled_1e-5_below_head", VANISHING, evens(0, 6))
def _(seed: int) -> Setup:
    layers = list(mlp(nn.ReLU, 4, 64))
    layers.insert(8, Multiply(1e-5))
    model = nn.Sequential(*layers)
    return fit(model, classify(model, Blobs(seed)), torch.optim.SGD(model.parameters(), 0.1))


@sick("backward_scaled_1e-5_gpt_embedding_and_below", VANISHING, ("lower",))
def _(seed: int) -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lower, self.cut, self.upper = mlp(nn.GELU, 4, 32, 16, 32), ScaleBackward(1e-5), mlp(nn.GELU, 3, 32, 32, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.upper(self.cut(self.lower(x)))

    model = Net()
    return fit(model, classify(model, Blobs(seed)), torch.optim.AdamW(model.parameters(), 1e-3))


@sick("left_tower_sigmoid", VANISHING, ("left.0", "left.2", "left.4", "left.6", "left.8", "left.10", "left.12"))
def _(seed: int) -> Setup:
    model = TwoTowers(mlp(nn.Sigmoid, 10, 32, outputs=32), mlp(nn.ReLU, 3, 32, outputs=32), 32)
    return fit(model, classify(model, Blobs(seed)), torch.optim.SGD(model.parameters(), 0.1))


@sick("right_tower_sigmoid", VANISHING, ("right.0", "right.2", "right.4", "right.6", "right.8", "right.10", "right.12"))
def _(seed: int) -> Setup:
    model = TwoTowers(mlp(nn.ReLU, 3, 32, outputs=32), mlp(nn.Sigmoid, 10, 32, outputs=32), 32)
    return fit(model, classify(model, Blobs(seed)), torch.optim.SGD(model.parameters(), 0.1))


@sick("right_tower_cut_by_1e-5", VANISHING, ("right",))
def _(seed: int) -> Setup:
    right = nn.Sequential(*mlp(nn.ReLU, 3, 32, outputs=32), Multiply(1e-5), nn.Linear(32, 32))
    model = TwoTowers(mlp(nn.ReLU, 3, 32, outputs=32), right, 32)
    return fit(model, classify(model, Blobs(seed)), torch.optim.Adam(model.parameters(), 1e-3))


@sick("recurrence_forgets_its_input", VANISHING, ("inp",))
def _(seed: int) -> Setup:
    model = RecurrentReadout(torch.tanh, 40, 0.7)
    return fit(model, classify(model, Blobs(seed)), torch.optim.SGD(model.parameters(), 0.1))


@sick("recurrence_sigmoid_20", VANISHING, ("inp",))
def _(seed: int) -> Setup:
    model = RecurrentReadout(torch.sigmoid, 20, 1.0)
    return fit(model, classify(model, Blobs(seed)), torch.optim.Adam(model.parameters(), 1e-3))


@sick("deep_rnn_stack_sigmoid_between", VANISHING, ("embed", "cells.0", "cells.1", "cells.2"))
def _(seed: int) -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(24, 32), nn.Linear(32, 24)
            self.cells = nn.ModuleList(nn.RNN(32, 32, batch_first=True) for _ in range(6))

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            for cell in self.cells:
                h = torch.sigmoid(cell(h)[0])
            return self.head(h)

    model = Net()
    return fit(model, classify(model, Text(seed, length=10)), torch.optim.SGD(model.parameters(), 0.1), 30)


@sick("transformer_without_residuals", VANISHING, ("embed", "position", "blocks"))
def _(seed: int) -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(24, 32), nn.Linear(32, 24)
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(32, 32), nn.Sigmoid(), nn.Linear(32, 32), nn.Sigmoid()) for _ in range(6)
            )

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            for block in self.blocks:
                h = block(h)
            return self.head(h)

    model = Net()
    return fit(model, classify(model, Text(seed)), torch.optim.AdamW(model.parameters(), 1e-3), 40)


@sick("autoencoder_deep_sigmoid", VANISHING, ("net.0", "net.2", "net.4", "net.6", "net.8"))
def _(seed: int) -> Setup:
    model = Bottleneck(nn.Sigmoid)
    model.net = mlp(nn.Sigmoid, 10, 32, 16, 16)
    data = Blobs(seed)

    def loss(i: int) -> Tensor:
        x, _ = data()
        return F.mse_loss(model(x), x)

    return fit(model, loss, torch.optim.SGD(model.parameters(), 0.05))


@sick("saturates_at_20", SATURATED, (*evens(0, 4), "5"), onset=20)
def _(seed: int) -> Setup:
    model = mlp(nn.Tanh, 5, 32)

    def before(i: int) -> None:
        if i == 20:
            with torch.no_grad():
                model[4].bias.add_(torch.where(torch.rand(32) < 0.5, 15.0, -15.0))

    return fit(model, classify(model, Blobs(seed, spread=3.0)), torch.optim.SGD(model.parameters(), 0.1), 50, before)


@sick("dies_at_15_by_a_factor", VANISHING, evens(0, 4), onset=15)
def _(seed: int) -> Setup:
    cut = Multiply(1.0)
    layers = list(mlp(nn.ReLU, 5, 64))
    layers.insert(6, cut)
    model = nn.Sequential(*layers)

    def before(i: int) -> None:
        cut.by = 1e-6 if i >= 15 else 1.0

    return fit(model, classify(model, Blobs(seed, spread=3.0)), torch.optim.SGD(model.parameters(), 0.05), 50, before)


# -- exploding ---------------------------------------------------------------------------------------------------------------------


def _explode(name: str, act: type[nn.Module], depth: int, gain: float, lr: float, optimizer: str = "SGD", **more: object) -> None:
    def build(seed: int) -> Setup:
        width = int(more.get("width", 32))  # type: ignore[call-overload]
        model = mlp(act, depth, width, bias=bool(more.get("bias", True)))
        initialise(model, lambda w: nn.init.normal_(w, std=gain / w.shape[1] ** 0.5))
        return fit(model, classify(model, Blobs(seed)), getattr(torch.optim, optimizer)(model.parameters(), lr))

    SICK.append(Case(name, build, DIVERGING, evens(0, depth)))


_explode("explode_relu_12_gain_4", nn.ReLU, 12, 4.0, 1e-6)
_explode("explode_relu_20_gain_3", nn.ReLU, 20, 3.0, 1e-12)
_explode("explode_relu_20_gain_3_adam", nn.ReLU, 20, 3.0, 1e-4, "Adam")
_explode("explode_tanh_20_gain_3", nn.Tanh, 20, 3.0, 1e-4)
_explode("explode_tanh_40_gain_2", nn.Tanh, 40, 2.0, 1e-4, width=64)
_explode("explode_leaky_15_gain_3_no_bias", nn.LeakyReLU, 15, 3.0, 1e-9, bias=False)
_explode("explode_relu_12_gain_5_lr_normal", nn.ReLU, 12, 5.0, 0.05)
_explode("explode_linear_16_gain_2", nn.Identity, 16, 2.0, 1e-9)


@sick("recurrence_radius_1.5", DIVERGING, ("inp", "cell"))
def _(seed: int) -> Setup:
    model = RecurrentReadout(lambda x: x, 40, 1.5)
    return fit(model, classify(model, Blobs(seed)), torch.optim.SGD(model.parameters(), 1e-9))


@sick("recurrence_relu_radius_2", DIVERGING, ("inp", "cell"))
def _(seed: int) -> Setup:
    model = RecurrentReadout(F.relu, 30, 2.0)
    return fit(model, classify(model, Blobs(seed)), torch.optim.Adam(model.parameters(), 1e-4))


@sick("rnn_large_recurrent_weights", DIVERGING, ("embed", "rnn"))
def _(seed: int) -> Setup:
    model = SequenceNet(nn.RNN, last=True, nonlinearity="relu")
    nn.init.orthogonal_(model.rnn.weight_hh_l0, 2.5)
    data = Text(seed, length=40)

    def batch() -> tuple[Tensor, Tensor]:
        x, y = data()
        return x, y[:, -1]

    return fit(model, classify(model, batch), torch.optim.SGD(model.parameters(), 1e-4))


@sick("backward_times_10_each_layer", DIVERGING, ("0", "3", "6", "9"))
def _(seed: int) -> Setup:
    layers: list[nn.Module] = []
    for a, b in ((16, 64), (64, 64), (64, 64), (64, 64), (64, 64)):
        layers += [nn.Linear(a, b), nn.ReLU(), ScaleBackward(10.0)]
    model = nn.Sequential(*layers, nn.Linear(64, 4))
    return fit(model, classify(model, Blobs(seed)), torch.optim.Adam(model.parameters(), 1e-3))


@sick("backward_times_1000_once", DIVERGING, ("lower",))
def _(seed: int) -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lower, self.up, self.upper = mlp(nn.ReLU, 3, 64, 16, 64), ScaleBackward(1e3), mlp(nn.ReLU, 2, 64, 64, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.upper(self.up(self.lower(x)))

    model = Net()
    return fit(model, classify(model, Blobs(seed)), torch.optim.Adam(model.parameters(), 1e-3))


@sick("backward_times_300_in_cnn", DIVERGING, ("features.0", "features.1", "features.3", "features.4", "features"))
def _(seed: int) -> Setup:
    model = PlainCNN(depth=5, norm=True)
    layers = list(model.features)
    layers.insert(6, ScaleBackward(300.0))
    model.features = nn.Sequential(*layers)
    return fit(model, classify(model, Pictures(seed)), torch.optim.Adam(model.parameters(), 1e-3))


def _diverge(name: str, build: Callable[[int], Setup], onset: int = 0) -> None:
    SICK.append(Case(name, build, DIVERGING, (), onset))


def _linear(seed: int, lr: float, onset: int = 0) -> Setup:
    model = mlp(nn.ReLU, 2, 64, outputs=1)
    data = Blobs(seed)
    o = torch.optim.SGD(model.parameters(), lr if not onset else 0.01)

    def before(i: int) -> None:
        if i == onset:
            o.param_groups[0]["lr"] = lr

    def loss(i: int) -> Tensor:
        x, _ = data()
        return F.mse_loss(model(x), x[:, :1])

    return fit(model, loss, o, 50, before)


_diverge("lr_too_high_mse", lambda seed: _linear(seed, 1.0))
_diverge("lr_too_high_mse_from_20", lambda seed: _linear(seed, 1.0, 20), 20)


@sick("lr_too_high_least_squares_slowly", DIVERGING)
def _(seed: int) -> Setup:
    model = nn.Linear(16, 1)
    data = Blobs(seed, batch=256)
    x, _ = data()
    top = float(torch.linalg.matrix_norm(x, 2) ** 2 / len(x)) * 2
    return fit(model, lambda i: F.mse_loss(model(x), x[:, :1]), torch.optim.SGD(model.parameters(), 2.8 / top))


@sick("weights_grow_each_step", DIVERGING, onset=10)
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, 4, 64, outputs=1)
    data = Blobs(seed)

    def before(i: int) -> None:
        if i >= 10:
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1.25)

    def loss(i: int) -> Tensor:
        x, _ = data()
        return F.mse_loss(model(x), x[:, :1])

    return fit(model, loss, torch.optim.Adam(model.parameters(), 1e-4), 50, before)


# -- spikes ------------------------------------------------------------------------------------------------------------------------


def _spike(
    name: str, factor: float, at: int, seed_model: Callable[[], nn.Module], data: Callable[[int], Callable[[], object]]
) -> None:
    def build(seed: int) -> Setup:
        model = seed_model()
        plain = classify(model, data(seed))  # type: ignore[arg-type]
        return fit(model, lambda i: plain(i) * (factor if i == at else 1.0), torch.optim.SGD(model.parameters(), 0.02), 45)

    SICK.append(Case(name, build, ("gradient_spike",), (), at))


_spike("spike_x30_mlp", 30, 25, lambda: mlp(nn.ReLU, 3, 64), Blobs)
_spike("spike_x100_cnn", 100, 30, lambda: PlainCNN(4, True), Pictures)
_spike("spike_x1e3_gpt", 1e3, 20, lambda: GPT(True), Text)
_spike("spike_x1e5_resnet", 1e5, 18, lambda: ResNet(4), Pictures)
_spike("spike_x50_lstm", 50, 22, lambda: SequenceNet(nn.LSTM), Text)
_spike("spike_x40_early_encoder", 40, 13, lambda: Encoder(3, True), Text)


@sick("spike_in_one_layer", ("gradient_spike",), ("4",), onset=24)
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, 4, 64)

    plain = classify(model, Blobs(seed))
    now = [0]

    def loss(i: int) -> Tensor:
        now[0] = i
        return plain(i)

    model[4].weight.register_hook(lambda g: g * (1e4 if now[0] == 24 else 1.0))
    return fit(model, loss, torch.optim.SGD(model.parameters(), 1e-3), 45)


@sick("spike_from_an_outlier_batch", ("gradient_spike",), (), onset=27)
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, 3, 64, outputs=1)
    data = Blobs(seed)

    def loss(i: int) -> Tensor:
        x, _ = data()
        return F.mse_loss(model(x), x[:, :1] * (200 if i == 27 else 1))

    return fit(model, loss, torch.optim.SGD(model.parameters(), 1e-4), 45)


# -- non-finite --------------------------------------------------------------------------------------------------------------------


@sick("nan_in_the_loss", ("non_finite_loss",), (), onset=12)
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, 3, 64)
    plain = classify(model, Blobs(seed))
    return fit(model, lambda i: plain(i) * (float("nan") if i == 12 else 1.0), updates=30)


@sick("inf_in_the_loss", ("non_finite_loss",), (), onset=9)
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, 3, 64)
    plain = classify(model, Blobs(seed))
    return fit(model, lambda i: plain(i) * (float("inf") if i == 9 else 1.0), updates=30)


@sick("nan_loss_from_the_start", ("non_finite_loss",))
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, 3, 64)
    data = Blobs(seed)

    def loss(i: int) -> Tensor:
        x, _ = data()
        return torch.log(model(x)[:, 0]).mean()

    return fit(model, loss, updates=20)


@sick("nan_in_one_gradient", ("non_finite_gradient",), ("2",), onset=14)
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, 3, 64)
    plain = classify(model, Blobs(seed))
    now = [0]

    def loss(i: int) -> Tensor:
        now[0] = i
        return plain(i)

    model[2].weight.register_hook(lambda g: g.index_fill(0, torch.tensor([3]), float("nan")) if now[0] == 14 else g)
    return fit(model, loss, updates=30)


@sick("sqrt_of_a_dropped_unit", ("non_finite_gradient",), evens(0, 4), onset=0)
def _(seed: int) -> Setup:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sqrt(F.dropout(F.relu(x) + 1.0, 0.1))

    layers = list(mlp(nn.ReLU, 4, 64))
    layers[5] = Root()
    model = nn.Sequential(*layers)
    return fit(model, classify(model, Blobs(seed)), updates=20)


@sick("nan_in_a_weight", ("non_finite_weight",), ("4",), onset=16)
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, 3, 64)

    def before(i: int) -> None:
        if i == 16:
            with torch.no_grad():
                model[4].weight[0, 0] = float("nan")

    return fit(model, classify(model, Blobs(seed)), updates=30, before=before)


@sick("inf_in_a_weight", ("non_finite_weight",), ("2",), onset=11)
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, 3, 64)

    def before(i: int) -> None:
        if i == 11:
            with torch.no_grad():
                model[2].weight[5, 5] = float("inf")

    return fit(model, classify(model, Blobs(seed)), updates=30, before=before)


# -- the loop ----------------------------------------------------------------------------------------------------------------------


@sick("detached_encoder", ("missing_gradient",), ("encoder",))
def _(seed: int) -> Setup:
    model = nn.ModuleDict({"encoder": mlp(nn.ReLU, 2, 64, outputs=64), "head": nn.Linear(64, 4)})
    data = Blobs(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model["head"](model["encoder"](x).detach()), y)

    return fit(model, loss, updates=30)


@sick("never_called_layer", ("missing_gradient",), ("unused",))
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, 3, 64)
    whole = nn.Module()
    whole.body, whole.unused = model, nn.Linear(64, 64)
    return fit(whole, classify(model, Blobs(seed)), torch.optim.Adam(whole.parameters(), 1e-3), 40)


@sick("detached_from_18", ("missing_gradient",), ("encoder",), onset=18)
def _(seed: int) -> Setup:
    model = nn.ModuleDict({"encoder": mlp(nn.ReLU, 2, 64, outputs=64), "head": nn.Linear(64, 4)})
    data = Blobs(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        h = model["encoder"](x)
        return F.cross_entropy(model["head"](h.detach() if i >= 18 else h), y)

    return fit(model, loss, updates=40)


@sick("head_missing_from_optimizer", ("not_in_optimizer",), ("6",))
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, 3, 64)
    return fit(model, classify(model, Blobs(seed)), torch.optim.Adam(model[:6].parameters(), 1e-3), 30)


@sick("scaler_collapses", ("loss_scale_collapse", "non_finite_loss"))
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, 2, 32)
    plain = classify(model, Blobs(seed))
    o = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu")
    model[0].weight.register_hook(lambda g: g * float("nan"))

    def train() -> Iterator[Event]:
        for i in range(30):
            o.zero_grad()
            loss = plain(i)
            scaler.scale(loss).backward()
            yield "read", [loss]
            scaler.step(o)
            scaler.update()
            yield "step", []

    return Setup(model, train)


@sick("lr_too_small_for_anything", ("update_ratio_too_small",))
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, 3, 64)
    return fit(model, classify(model, Blobs(seed)), torch.optim.SGD(model.parameters(), 1e-7))
