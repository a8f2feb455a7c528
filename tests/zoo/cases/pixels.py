"""Runs of what sees, hears or measures: pictures, sound, sensors, point clouds.

Each sick build takes `fault=False` as well: the same run without its mistake, which trains.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Case, Event, Proof, Setup, fit, healthy, sick
from tests.zoo.plain import Plain, named_parameters
from tests.zoo.proofs import (
    converges,
    dead_fraction,
    every,
    first_non_finite,
    gradient_ratio,
    gradient_spikes,
    loss_stays,
    no_gradient,
    unchanged,
    update_ratio,
    zero_gradient,
)

CASES: list[Case] = []


class Gratings:
    """Colour pictures of stripes in noise, the class is their direction; about zero mean and unit variance."""

    def __init__(self, seed: int, classes: int = 4, batch: int = 16, size: int = 16, noise: float = 0.4, channels: int = 3) -> None:
        self.generator = torch.Generator().manual_seed(5000 + seed)
        self.classes, self.batch, self.size, self.noise, self.channels = classes, batch, size, noise, channels

    def __call__(self) -> tuple[Tensor, Tensor]:
        g, n = self.generator, self.batch
        y = torch.randint(self.classes, (n,), generator=g)
        angle = (math.pi / self.classes * y).view(n, 1, 1, 1)
        phase = 2 * math.pi * torch.rand(n, 1, 1, 1, generator=g)
        tint = 0.5 + torch.rand(n, self.channels, 1, 1, generator=g)
        at = torch.arange(self.size).float()
        wave = torch.sin(1.2 * (at.view(-1, 1) * angle.sin() + at * angle.cos()) + phase)
        return 1.2 * tint * wave + self.noise * torch.randn(n, self.channels, self.size, self.size, generator=g), y


class Scenes:
    """Grey pictures with a bright disc, and the mask of the disc, both `[batch, 1, size, size]`."""

    def __init__(self, seed: int, batch: int = 8, size: int = 16, radius: tuple[float, float] = (3.0, 5.0)) -> None:
        self.generator = torch.Generator().manual_seed(6000 + seed)
        self.batch, self.size, self.radius = batch, size, radius

    def __call__(self) -> tuple[Tensor, Tensor]:
        g, n = self.generator, self.batch
        centre = (0.25 + 0.5 * torch.rand(n, 2, 1, 1, 1, generator=g)) * self.size
        radius = self.radius[0] + (self.radius[1] - self.radius[0]) * torch.rand(n, 1, 1, 1, generator=g)
        at = torch.arange(self.size).float()
        inside = ((at.view(-1, 1) - centre[:, 0]) ** 2 + (at - centre[:, 1]) ** 2 < radius**2).float()
        return 2 * inside - 0.6 + 0.4 * torch.randn(n, 1, self.size, self.size, generator=g), inside


class Waves:
    """Windows of a signal, `[batch, channels, length]`: the class is the frequency, or with `classes=0` the target is it."""

    def __init__(self, seed: int, classes: int = 4, batch: int = 16, length: int = 64, channels: int = 1) -> None:
        self.generator = torch.Generator().manual_seed(7000 + seed)
        self.classes, self.batch, self.length, self.channels = classes, batch, length, channels

    def __call__(self) -> tuple[Tensor, Tensor]:
        g, n = self.generator, self.batch
        y = torch.randint(self.classes, (n,), generator=g) if self.classes else torch.rand(n, generator=g)
        speed = 0.2 + 0.25 * y if self.classes else 0.2 + 0.8 * y
        phase = 2 * math.pi * torch.rand(n, self.channels, 1, generator=g)
        wave = torch.sin(speed.view(n, 1, 1) * torch.arange(self.length) + phase)
        return 1.3 * wave + 0.3 * torch.randn(n, self.channels, self.length, generator=g), y


class Clouds:
    """Points on a sphere, a cube's surface, a disc or a line, turned at random, `[batch, points, 3]`; the class is the shape."""

    def __init__(self, seed: int, batch: int = 16, points: int = 48) -> None:
        self.generator = torch.Generator().manual_seed(8000 + seed)
        self.batch, self.points = batch, points

    def __call__(self) -> tuple[Tensor, Tensor]:
        g, n = self.generator, self.batch
        y = torch.randint(4, (n,), generator=g)
        p = torch.randn(n, self.points, 3, generator=g)
        flat = p * torch.tensor([1.0, 1.0, 0.0])
        shapes = torch.stack(
            [1.7 * F.normalize(p, dim=-1), 1.2 * p / p.abs().amax(-1, keepdim=True), flat, p * torch.tensor([1.7, 0.0, 0.0])]
        )
        turn = torch.linalg.qr(torch.randn(n, 3, 3, generator=g))[0]
        return shapes[y, torch.arange(n)] @ turn + 0.03 * torch.randn(n, self.points, 3, generator=g), y


class UNet(nn.Module):
    """Two levels, no normalisation."""

    def __init__(self, width: int = 8, inputs: int = 1, outputs: int = 1) -> None:
        super().__init__()
        self.down1 = nn.Sequential(
            nn.Conv2d(inputs, width, 3, padding=1), nn.LeakyReLU(0.1), nn.Conv2d(width, width, 3, padding=1), nn.LeakyReLU(0.1)
        )
        self.down2 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, padding=1), nn.LeakyReLU(0.1))
        self.up = nn.Sequential(nn.Conv2d(3 * width, width, 3, padding=1), nn.LeakyReLU(0.1))
        self.out = nn.Conv2d(width, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = F.interpolate(self.down2(F.max_pool2d(a, 2)), scale_factor=2)
        return self.out(self.up(torch.cat([a, b], 1)))  # type: ignore[no-any-return]


def conv_bn(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def small_cnn(classes: int = 4, inputs: int = 3, width: int = 12) -> nn.Sequential:
    """Three blocks with BatchNorm, mean pooling and a linear head, which is "5"."""
    return nn.Sequential(
        conv_bn(inputs, width),
        conv_bn(width, width, 2),
        conv_bn(width, width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, classes),
    )


def input_level(rms: float) -> Proof:
    """What the first convolution is given: its output's root mean square in the first update is far from one."""

    def proof(plain: Plain) -> str:
        seen = next(o[0] for n, o in plain.outputs.items() if n and o[0] is not None and plain.grads.get(f"{n}.weight"))
        assert seen.rms > rms, f"the first layer gives {seen.rms:.3g} at the start, not above {rms:g}"
        return f"the first layer gives {seen.rms:.3g} at the start"

    return proof


def loss_ends_below(level: float) -> Proof:
    """The median of the last tenth of the losses is below `level`."""

    def proof(plain: Plain) -> str:
        last = median(plain.losses[-max(1, len(plain.losses) // 10) :])
        assert last < level, f"the loss ends at {last:.4g}, not below {level:g}"
        return f"the loss ends at {last:.4g}"

    return proof


def never_clears(owner: str) -> Proof:
    """Every step of the optimizer that owns the parameters of `owner` uses, beside what came since, what the step before it used."""

    def proof(plain: Plain) -> str:
        mine = {n: p for n, p in named_parameters(plain.setup.model).items() if n.startswith(owner)}
        came = {n: torch.zeros_like(p) for n, p in mine.items()}

        def note(name: str) -> Callable[[Tensor], None]:
            def add(g: Tensor) -> None:
                came[name].add_(g)

            return add

        handles = [p.register_hook(note(n)) for n, p in mine.items()]  # type: ignore[no-untyped-call]
        used: dict[str, Tensor] = {}
        worst, checked = 0.0, 0
        for kind, what in plain.setup.train():
            if kind != "step" or not any(p is next(iter(mine.values())) for o in what for g in o.param_groups for p in g["params"]):
                continue
            now = {n: p.grad.clone() for n, p in mine.items() if p.grad is not None}
            if used:
                left = sum(float((now[n] - came[n] - used[n]).square().sum()) for n in now) ** 0.5
                worst = max(worst, left / sum(float(used[n].square().sum()) for n in now) ** 0.5)
                checked += 1
            used = now
            for t in came.values():
                t.zero_()
            if checked == 8:
                break
        for handle in handles:
            handle.remove()
        assert checked == 8, f"only {checked} steps in the run"
        assert worst < 1e-2, f"a step uses the gradient before it but for {worst:.2g} of it ({checked} steps)"
        return f"eight steps in a row use the gradient of the step before as well, to {worst:.2g} of it"

    return proof


def flat_share(module: str, flat: float, first: int, last: int) -> Proof:
    """The output of a tanh is, by its root mean square, so near to +-1 that its mean derivative is below 1 - `flat` ** 2."""

    def proof(plain: Plain) -> str:
        level = median(o.rms for o in plain.outputs[module][first:last] if o is not None)
        assert level > flat, f"the outputs of {module} have the root mean square {level:.3g}, not above {flat:g}"
        return f"the outputs of {module} have the root mean square {level:.3g}: the mean derivative is {1 - level**2:.2g}"

    return proof


def loss_ends_above(level: float) -> Proof:
    """The median of the last tenth of the losses is above `level`."""

    def proof(plain: Plain) -> str:
        last = median(plain.losses[-max(1, len(plain.losses) // 10) :])
        assert last > level, f"the loss ends at {last:.4g}, not above {level:g}"
        return f"the loss ends at {last:.4g}"

    return proof


# ---------------------------------------------------------------------------------------------------------------- sick


@sick(
    CASES,
    "px_unet_sees_raw_bytes",
    ("unnormalized_input",),
    ("",),
    source="https://cs231n.github.io/neural-networks-2/ without its data preprocessing: pictures as bytes from 0 to 255",
    proof=input_level(15.0),
    also=("update_ratio_too_large", "loss_spike"),
)
def _(seed: int, fault: bool = True) -> Setup:
    data, model = Scenes(seed), UNet()

    def loss(i: int) -> Tensor:
        x, mask = data()
        picture = ((x + 2) * 60).clamp(0, 255).round()  # the file's bytes
        return F.binary_cross_entropy_with_logits(model(picture if fault else (picture - 100) / 60), mask)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 2e-3), 60)


@sick(
    CASES,
    "px_barometer_in_hectopascal",
    ("unnormalized_input",),
    ("",),
    source="https://scikit-learn.org/stable/modules/preprocessing.html a feature of another order of magnitude",
    proof=input_level(50.0),
    also=("saturated_activation", "zero_gradient", "update_ratio_too_large"),
)
def _(seed: int, fault: bool = True) -> Setup:
    data = Waves(seed, classes=0, channels=4)
    model = nn.Sequential(
        nn.Conv1d(4, 16, 5, 2), nn.ELU(), nn.Conv1d(16, 16, 5, 2), nn.ELU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, 1)
    )  # fmt: skip

    def loss(i: int) -> Tensor:
        x, y = data()
        if fault:  # three accelerations in g, and the air pressure
            x = torch.cat([x[:, :3], 1013 + 5 * x[:, 3:]], 1)
        return F.mse_loss(model(x)[:, 0], 3 * y)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), 3e-3), 60)


class LogMel(nn.Module):
    """Log power of a filter bank; `eps` keeps a silent frame finite."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps
        k, t = torch.arange(1, 13).view(-1, 1), torch.arange(16)
        self.register_buffer("bank", torch.cat([torch.cos(k * t * math.pi / 16), torch.sin(k * t * math.pi / 16)]))

    def forward(self, x: Tensor) -> Tensor:
        frames = x.unfold(-1, 16, 8) @ self.bank.T  # type: ignore[operator]
        return (frames[..., :12].square() + frames[..., 12:].square() + self.eps).log().transpose(1, 2)


class Listener(nn.Module):
    def __init__(self, eps: float) -> None:
        super().__init__()
        self.front = LogMel(eps)
        self.norm = nn.BatchNorm1d(12)
        self.body = nn.Sequential(nn.Conv1d(12, 24, 3, padding=1), nn.ReLU(), nn.Conv1d(24, 24, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.norm(self.front(x))).mean(-1))  # type: ignore[no-any-return]


@sick(
    CASES,
    "px_log_of_a_silent_clip",
    ("non_finite_activation",),
    ("front",),
    source="https://github.com/JuliaDSP/MFCC.jl/pull/14 a waveform of zeros has the log power -inf",
    onset=18,
    proof=every(first_non_finite(18, "front"), first_non_finite(18, "norm"), first_non_finite(18)),
    also=("non_finite_loss", "non_finite_gradient", "non_finite_weight"),
)
def _(seed: int, fault: bool = True) -> Setup:
    data, model = Waves(seed), Listener(0.0 if fault else 1e-6)

    def loss(i: int) -> Tensor:
        x, y = data()
        if i == 18:
            x[3] = 0.0  # the microphone was muted
        return F.cross_entropy(model(x[:, 0]), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 2e-3), 40)


@sick(
    CASES,
    "px_distance_of_the_same_picture",
    ("non_finite_gradient",),
    source="https://github.com/nicola-decao/s-vae-pytorch/pull/8 the gradient of sqrt(0) is not a number",
    onset=14,
    proof=every(first_non_finite(14), lambda p: f"the loss is {_finite(p.losses[14])}, every gradient is not: {_all_bad(p, 14)}"),
    also=("non_finite_weight", "non_finite_activation", "non_finite_loss"),
)
def _(seed: int, fault: bool = True) -> Setup:
    data = Gratings(seed, batch=12, channels=1)
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, 2),
        nn.ReLU(),
        nn.Conv2d(12, 24, 3, 2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 8, bias=False),
    )

    def loss(i: int) -> Tensor:
        x, y = data()
        other, z = data()
        if i == 14:
            other[0], z[0] = x[0], y[0]  # the sampler drew one picture twice
        square = (model(x) - model(other)).square().sum(1)
        distance = (square if fault else square + 1e-8).sqrt()
        same = (y == z).float()
        return (same * distance + (1 - same) * F.relu(1 - distance)).mean()  # type: ignore[no-any-return]

    return fit(model, loss, torch.optim.Adam(model.parameters(), 2e-3), 35)


def _finite(value: float) -> float:
    assert math.isfinite(value), "the loss is not finite"
    return value


def _all_bad(plain: Plain, update: int) -> int:
    bad = [counts[update] > 0 for counts in plain.nonfinite.values()]
    assert all(bad), f"only {sum(bad)} of {len(bad)} gradients are bad"
    return len(bad)


@sick(
    CASES,
    "px_depth_without_a_valid_pixel",
    ("non_finite_loss",),
    source="https://github.com/clks-wzz/FAS-SGTD/issues/22 the mean over a mask that is zero everywhere is 0 / 0",
    onset=16,
    proof=every(first_non_finite(16), lambda p: f"the prediction is finite: {_all_finite(p, 'out', 16)}"),
    also=("non_finite_gradient", "non_finite_weight", "non_finite_activation"),
)
def _(seed: int, fault: bool = True) -> Setup:
    data, model = Scenes(seed, batch=4), UNet()

    def loss(i: int) -> Tensor:
        x, inside = data()
        depth, valid = 1.5 - inside, torch.rand(x.shape, generator=data.generator) < 0.3
        valid &= i != 16  # the sensor was out of range in this batch
        error = ((model(x) - depth).abs() * valid).sum()
        return error / (valid.sum() if fault else valid.sum().clamp(min=1))  # type: ignore[no-any-return]

    return fit(model, loss, torch.optim.AdamW(model.parameters(), 3e-3), 40)


def _all_finite(plain: Plain, module: str, update: int) -> bool:
    seen = plain.outputs[module][update]
    assert seen is not None, f"{module} is not called"
    assert seen.nonfinite == 0, f"{module} has {seen.nonfinite} bad elements"
    return True


@sick(
    CASES,
    "px_gap_in_the_recording",
    ("non_finite_input",),
    ("",),
    source="https://github.com/Nixtla/neuralforecast/issues/186 missing readings are NaN in the table",
    onset=12,
    proof=every(first_non_finite(12, "conv1"), first_non_finite(12)),
    also=("non_finite_loss", "non_finite_gradient", "non_finite_weight", "non_finite_activation"),
)
def _(seed: int, fault: bool = True) -> Setup:
    data = Waves(seed, classes=5, channels=3)
    model = nn.Sequential()
    for k, (a, b) in enumerate(((3, 16), (16, 16)), 1):
        model.add_module(f"conv{k}", nn.Conv1d(a, b, 5, 2))
        model.add_module(f"norm{k}", nn.GroupNorm(4, b))
        model.add_module(f"act{k}", nn.SiLU())
    model.add_module("pool", nn.AdaptiveMaxPool1d(1))
    model.add_module("flat", nn.Flatten())
    model.add_module("head", nn.Linear(16, 5))

    def loss(i: int) -> Tensor:
        x, y = data()
        if i == 12 and fault:
            x[5, 1, 20:31] = math.nan  # the strap came loose
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), 32)


class Detector(nn.Module):
    """A backbone and a tower of convolutions before a map of class scores."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(conv_bn(1, 12), conv_bn(12, 16))
        self.tower = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        self.score = nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.score(self.tower(self.backbone(x)))  # type: ignore[no-any-return]


@sick(
    CASES,
    "px_focal_prior_in_every_layer",
    ("dead_units", "poor_init"),
    ("tower",),
    source="https://arxiv.org/abs/1708.02002 the bias of -log(99) is for the last layer of RetinaNet's subnet only",
    proof=every(dead_fraction("tower.1", 0.3, 0, 15), dead_fraction("tower.3", 0.9, 0, 15)),
    also=("zero_gradient", "vanishing_gradient", "loss_plateau", "update_ratio_too_small"),
)
def _(seed: int, fault: bool = True) -> Setup:
    data, model = Scenes(seed, radius=(1.5, 2.5)), Detector()
    for m in [*model.tower, model.score]:
        if isinstance(m, nn.Conv2d):
            nn.init.normal_(m.weight, std=0.01 if m is model.score else math.sqrt(2 / (9 * 16)))
            nn.init.constant_(m.bias, -math.log(99) if fault or m is model.score else 0.0)  # type: ignore[arg-type]

    def loss(i: int) -> Tensor:
        x, mask = data()
        return F.binary_cross_entropy_with_logits(model(x), mask)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 2e-3), 60)


@sick(
    CASES,
    "px_tanh_ears_with_unit_normal_weights",
    ("saturated_activation", "poor_init"),
    ("conv1", "act1", "conv2", "act2"),
    source="https://proceedings.mlr.press/v9/glorot10a.html weights of variance one, whatever the fan-in, drive tanh flat",
    proof=every(flat_share("act1", 0.88, 0, 15), flat_share("act2", 0.95, 0, 15)),
    also=("vanishing_gradient", "loss_plateau"),  # little passes a flat tanh
)
def _(seed: int, fault: bool = True) -> Setup:
    data, model = Waves(seed, classes=5, channels=2), nn.Sequential()
    for k, (a, b) in enumerate(((2, 24), (24, 24)), 1):
        model.add_module(f"conv{k}", nn.Conv1d(a, b, 15 if k == 1 else 9, 2))
        model.add_module(f"act{k}", nn.Tanh())
    model.add_module("pool", nn.AdaptiveMaxPool1d(1))
    model.add_module("flat", nn.Flatten())
    model.add_module("head", nn.Linear(24, 5))
    for m in model:
        if isinstance(m, nn.Conv1d):
            nn.init.normal_(m.weight) if fault else nn.init.xavier_normal_(m.weight)
            nn.init.zeros_(m.bias)  # type: ignore[arg-type]

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), 60)


@sick(
    CASES,
    "px_sigmoid_convs_in_depth",
    ("vanishing_gradient",),
    ("body",),
    source="https://proceedings.mlr.press/v9/glorot10a.html a sigmoid passes at most a quarter of the gradient",
    proof=every(
        gradient_ratio("body.0.weight", "head.weight", 1e-4, 0, 15),
        gradient_ratio("body.0.bias", "body.10.bias", 1e-3, 0, 15),
        loss_stays(0.05),
    ),
    also=("poor_init", "loss_plateau", "update_ratio_too_small"),
)
def _(seed: int, fault: bool = True) -> Setup:
    data = Gratings(seed, batch=24)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = [
                m
                for k in range(7)
                for m in (nn.Conv2d(12 if k else 3, 12, 3, 2 if k in (0, 3) else 1, 1), nn.Sigmoid() if fault else nn.ReLU())
            ]
            self.body = nn.Sequential(*layers)
            self.head = nn.Linear(12 * 16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).flatten(1))  # type: ignore[no-any-return]

    model = Net()
    if not fault:
        for m in model.body:
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.SGD(model.parameters(), 0.01, momentum=0.9), 60)


class Scaled(torch.autograd.Function):
    """The identity; its gradient is multiplied."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, by: float) -> Tensor:
        ctx.by = by  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.by, None  # type: ignore[attr-defined]


class Stages(nn.Module):
    """Feature extractor on the raw wave, stage by stage, with a multiplier of the gradient behind each."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv1d(16 if k else 1, 16, 4, 2, 1), nn.GroupNorm(4, 16), nn.GELU()) for k in range(4)
        )
        self.context = nn.Sequential(nn.Conv1d(16, 24, 3, padding=1), nn.GELU())
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = Scaled.apply(stage(x), self.by)  # type: ignore[no-untyped-call]
        return self.head(self.context(x).mean(-1))  # type: ignore[no-any-return]


@sick(
    CASES,
    "px_feature_grad_mult_upside_down",
    ("exploding_gradient",),
    ("stages",),
    source="https://arxiv.org/abs/2006.11477 feature_grad_mult of wav2vec 2.0 is 0.1, here it is 10 and behind every stage",
    proof=every(
        gradient_ratio("head.weight", "stages.0.0.weight", 1e-2, 0, 15),
        gradient_ratio("stages.3.0.weight", "stages.2.0.weight", 0.6, 0, 15),
        gradient_ratio("stages.2.0.weight", "stages.1.0.weight", 0.6, 0, 15),
        gradient_ratio("stages.1.0.weight", "stages.0.0.weight", 0.6, 0, 15),
    ),
)
def _(seed: int, fault: bool = True) -> Setup:
    data, model = Waves(seed), Stages(10.0 if fault else 1.0)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y)

    def clip(i: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    return fit(model, loss, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), 50, between=clip)


@sick(
    CASES,
    "px_one_depth_map_in_millimetres",
    ("gradient_spike", "loss_spike"),
    source="https://github.com/ialhashim/DenseDepth/issues/114 depth maps whose unit is not that of the others",
    onset=30,
    proof=every(gradient_spikes(30, 100.0), lambda p: f"the loss is {_times(p, 30, 100.0):.3g} times the median before it"),
    also=("update_ratio_too_small", "loss_plateau"),  # Adam remembers it for hundreds of updates
)
def _(seed: int, fault: bool = True) -> Setup:
    data, model = Scenes(seed, batch=8), UNet(width=6)

    def loss(i: int) -> Tensor:
        x, inside = data()
        depth = 1.5 - inside + 0.05 * torch.randn(x.shape, generator=data.generator)
        if i == 30 and fault:
            depth[2] *= 1000
        return F.mse_loss(model(x), depth)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 2e-3), 60)


def _times(plain: Plain, update: int, above: float) -> float:
    ratio = plain.losses[update] / median(plain.losses[:update])
    assert ratio > above, f"the loss is {ratio:.3g} times the median before it, not {above:g}"
    return ratio


class Ring:
    """Points on a circle: what a small GAN is to imitate."""

    def __init__(self, seed: int, batch: int = 64) -> None:
        self.generator = torch.Generator().manual_seed(9000 + seed)
        self.batch = batch

    def __call__(self) -> Tensor:
        angle = 2 * math.pi * torch.rand(self.batch, generator=self.generator)
        return torch.stack([angle.cos(), angle.sin()], 1) + 0.1 * torch.randn(self.batch, 2, generator=self.generator)

    def noise(self) -> Tensor:
        return torch.randn(self.batch, 4, generator=self.generator)


@sick(
    CASES,
    "px_critic_is_never_cleared",
    ("gradients_not_zeroed",),
    ("discriminator",),
    source="https://docs.pytorch.org/tutorials/beginner/dcgan_faces_tutorial.html without its netD.zero_grad()",
    proof=never_clears("discriminator"),
    also=("exploding_gradient",),
)
def _(seed: int, fault: bool = True) -> Setup:
    data = Ring(seed, 128)
    g = nn.Sequential(nn.Linear(4, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 2))
    d = nn.Sequential(nn.Linear(2, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))
    for_g, for_d = (torch.optim.Adam(m.parameters(), lr, betas=(0.5, 0.9)) for m, lr in ((g, 1e-3), (d, 3e-3)))

    def train() -> Iterator[Event]:
        for _ in range(40):
            if not fault:
                for_d.zero_grad()
            fake = g(data.noise())
            of_d = F.softplus(-d(data())).mean() + F.softplus(d(fake.detach())).mean()
            of_d.backward()  # type: ignore[no-untyped-call]
            yield "read", [of_d]
            for_d.step()
            yield "step", [for_d]
            for_g.zero_grad()
            of_g = F.softplus(-d(fake)).mean()
            of_g.backward()  # type: ignore[no-untyped-call]
            yield "read", [of_g]
            for_g.step()
            yield "step", [for_g]

    return Setup({"generator": g, "discriminator": d}, train)


class Backboned(nn.Module):
    def __init__(self, classes: int, width: int = 12) -> None:
        super().__init__()
        self.backbone = nn.Sequential(conv_bn(3, width), conv_bn(width, width, 2), conv_bn(width, width, 2))
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.backbone(x).mean((2, 3)))  # type: ignore[no-any-return]


def pretrained(seed: int, classes: int = 6) -> Backboned:
    """Trained for a while on other pictures."""
    data, model = Gratings(100 + seed, classes=classes), Backboned(classes)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y)

    for _ in fit(model, loss, torch.optim.Adam(model.parameters(), 3e-3), 40).train():
        pass
    return model


@sick(
    CASES,
    "px_head_replaced_after_the_optimizer",
    ("not_in_optimizer",),
    ("fc",),
    source="https://docs.pytorch.org/tutorials/beginner/transfer_learning_tutorial.html with the two lines exchanged",
    proof=every(unchanged("fc.weight", "fc.bias"), lambda p: f"the backbone moves: {_moves(p, 'backbone.0.0.weight')}"),
)
def _(seed: int, fault: bool = True) -> Setup:
    data, model = Gratings(seed), pretrained(seed)
    early = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    model.fc = nn.Linear(12, 4)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y)

    return fit(model, loss, early if fault else torch.optim.SGD(model.parameters(), 0.01, momentum=0.9), 50)


def _moves(plain: Plain, parameter: str) -> bool:
    assert all(s > 0 for s in plain.steps[parameter]), f"{parameter} does not move"
    return True


class AutoEncoder(nn.Module):
    def __init__(self, cut: bool) -> None:
        super().__init__()
        self.cut = cut
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(192, 16)
        )
        self.decoder = nn.Sequential(
            nn.Linear(16, 192),
            nn.ELU(),
            nn.Unflatten(1, (12, 4, 4)),
            nn.ConvTranspose2d(12, 8, 4, 2, 1),
            nn.ELU(),
            nn.ConvTranspose2d(8, 1, 4, 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        code = self.encoder(x)
        return self.decoder(code.detach() if self.cut else code)  # type: ignore[no-any-return]


@sick(
    CASES,
    "px_code_is_detached",
    ("missing_gradient",),
    ("encoder",),
    source="https://docs.pytorch.org/docs/stable/generated/torch.Tensor.detach.html the result never requires gradient",
    proof=no_gradient("encoder.0.weight", "encoder.2.weight", "encoder.5.weight", "encoder.5.bias"),
)
def _(seed: int, fault: bool = True) -> Setup:
    data, model = Scenes(seed, batch=16), AutoEncoder(cut=fault)

    def loss(i: int) -> Tensor:
        x, _ = data()
        return F.mse_loss(model(x), x)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 3e-3), 60)


class TwoEars(nn.Module):
    """Says from two microphones on which side the sound is."""

    def __init__(self, fault: bool) -> None:
        super().__init__()
        self.fault = fault
        self.left, self.right = (
            nn.Sequential(nn.Conv1d(1, 12, 7, 2), nn.ReLU(), nn.Conv1d(12, 12, 5, 2), nn.ReLU()) for _ in range(2)
        )
        self.join = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 3))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        other = self.left if self.fault else self.right  # copied from the line above
        return self.join(torch.cat([self.left(left).mean(2), other(right).mean(2)], 1))  # type: ignore[no-any-return]


@sick(
    CASES,
    "px_right_ear_never_called",
    ("missing_gradient",),
    ("right",),
    source="https://docs.pytorch.org/docs/stable/notes/ddp.html find_unused_parameters: modules that forward does not reach",
    proof=every(no_gradient("right.0.weight", "right.2.weight"), lambda p: f"right.0 is not called: {_never_called(p, 'right.0')}"),
)
def _(seed: int, fault: bool = True) -> Setup:
    data, model = Waves(seed, classes=1, batch=24, length=70), TwoEars(fault)

    def loss(i: int) -> Tensor:
        x, _ = data()
        side = torch.randint(3, (len(x),), generator=data.generator)
        louder = 2.0 ** (side - 1.0).view(-1, 1, 1)
        return F.cross_entropy(model(x / louder, x * louder), side)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), 3e-3), 80)


def _never_called(plain: Plain, module: str) -> bool:
    assert all(o is None for o in plain.outputs[module]), f"{module} is called"
    return True


class Controlled(nn.Module):
    """A denoiser with a side branch for a condition, joined by a gate: the branch's last convolution starts at zero."""

    def __init__(self, gate: float) -> None:
        super().__init__()
        self.enter = nn.Conv2d(1, 12, 3, padding=1)
        self.control = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.SiLU(), nn.Conv2d(12, 12, 1))
        nn.init.zeros_(self.control[2].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.control[2].bias)  # type: ignore[arg-type]
        self.control.register_parameter("gate", nn.Parameter(torch.full((12, 1, 1), gate)))
        self.middle = nn.Sequential(nn.SiLU(), nn.Conv2d(12, 12, 3, padding=1), nn.SiLU(), nn.Conv2d(12, 1, 3, padding=1))

    def forward(self, x: Tensor, hint: Tensor) -> Tensor:
        gate = self.control.get_parameter("gate")
        return self.middle(self.enter(x) + gate * self.control(hint))  # type: ignore[no-any-return]


@sick(
    CASES,
    "px_zero_gate_on_a_zero_convolution",
    ("zero_gradient",),
    ("control",),
    source="https://arxiv.org/abs/2302.05543 a zero convolution learns only if what follows it is not zero as well",
    proof=every(
        zero_gradient("control.0.weight", "control.2.weight", "control.2.bias", "control.gate"),
        lambda p: f"the rest moves: {_moves(p, 'enter.weight')}",
    ),
    also=("poor_init", "frozen_weights", "vanishing_gradient"),
)
def _(seed: int, fault: bool = True) -> Setup:
    data, model = Scenes(seed), Controlled(0.0 if fault else 1.0)

    def loss(i: int) -> Tensor:
        x, hint = data()
        noise = torch.randn(x.shape, generator=data.generator)
        return F.mse_loss(model(x + noise, 2 * hint - 0.6), x)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 3e-3), 60)


@sick(
    CASES,
    "px_floor_division_of_the_backbone_rate",
    ("frozen_weights",),
    ("backbone",),
    source="https://docs.pytorch.org/docs/stable/optim.html#per-parameter-options with lr // 10, which is 0.0",
    proof=every(unchanged("backbone.0.0.weight", "backbone.1.0.weight", "backbone.2.0.weight", "backbone.2.1.weight", first=0)),
)
def _(seed: int, fault: bool = True) -> Setup:
    data, model, lr = Gratings(seed, classes=5), Backboned(5), 5e-3
    groups: list[dict[str, Any]] = [
        {"params": model.backbone.parameters(), "lr": lr // 10 if fault else lr},
        {"params": model.fc.parameters()},
    ]

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.AdamW(groups, lr=lr), 50)


@sick(
    CASES,
    "px_scheduler_steps_instead",
    ("never_stepped",),
    source="https://github.com/pytorch/pytorch/issues/3814 scheduler.step() does not perform optimizer.step()",
    proof=every(lambda p: f"no weight moves in {_still(p)} updates, every one has a gradient", loss_stays(0.1)),
    also=("loss_plateau", "frozen_weights"),
)
def _(seed: int, fault: bool = True) -> Setup:
    data, model = Gratings(seed, channels=1, classes=3), small_cnn(3, inputs=1, width=8)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)

    def train() -> Iterator[Event]:
        for _ in range(60):
            x, y = data()
            value = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            yield "read", [value]
            if not fault:
                optimizer.step()
                yield "step", [optimizer]
            scheduler.step()

    return Setup(model, train)


def _still(plain: Plain) -> int:
    for name in plain.steps:
        assert all(math.isnan(s) for s in plain.steps[name]), f"{name} is stepped"
        assert len(set(plain.weights[name])) == 1, f"{name} changes"
        assert all(n > 0 for n in plain.grads[name]), f"{name} has no gradient"
    return len(plain.losses)


class PointNet(nn.Module):
    def __init__(self, softmax: bool = False) -> None:
        super().__init__()
        self.points = nn.Sequential(nn.Linear(3, 32), nn.GELU(), nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 64))
        self.head = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 4))
        self.softmax = nn.Softmax(-1) if softmax else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.head(self.points(x).amax(1))
        return self.softmax(out) if self.softmax is not None else out  # type: ignore[no-any-return]


@sick(
    CASES,
    "px_pointnet_with_the_rate_of_sgd",
    ("update_ratio_too_large",),
    source="https://karpathy.github.io/2019/04/25/recipe/ Adam's rate is about 3e-4; here the 0.1 of an SGD recipe",
    proof=every(update_ratio(above=0.2, last=8), lambda p: f"in the first update {_first_ratio(p):.3g}"),
    also=("loss_spike", "loss_diverging", "loss_plateau", "dead_units", "gradient_spike", "exploding_gradient", "zero_gradient"),
)
def _(seed: int, fault: bool = True) -> Setup:
    data, model = Clouds(seed), PointNet()

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 0.1 if fault else 2e-3), 60)


def _first_ratio(plain: Plain) -> float:
    ratio = plain.update_ratio(0)
    assert ratio > 0.5, f"the first update changes {ratio:.3g} of the weights"
    return ratio


@sick(
    CASES,
    "px_softmax_before_the_cross_entropy",
    ("double_softmax",),
    ("softmax",),
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html wants logits",
    proof=every(lambda p: f"the loss is given probabilities: {_sums_to_one(p, 'softmax')}", loss_ends_above(0.7)),
)
def _(seed: int, fault: bool = True) -> Setup:
    data, model = Clouds(seed, batch=24), PointNet(softmax=fault)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 2e-3), 80)


def _sums_to_one(plain: Plain, module: str) -> bool:
    seen = [o for o in plain.outputs[module] if o is not None]
    assert len(seen) == len(plain.losses), f"{module} is not called in every update"
    assert all(o.low >= 0 and o.high <= 1 for o in seen), f"{module} gives something else"
    # Of four probabilities, cross-entropy makes at least 1 - (1 - 1) + log(e + 3) - 1 = 0.744.
    assert min(plain.losses) > 0.743, f"the loss falls to {min(plain.losses):.3g}"
    return True


@sick(
    CASES,
    "px_vgg_with_gaussian_001",
    ("poor_init", "vanishing_gradient"),
    ("features",),
    source="https://arxiv.org/abs/1502.01852 section 2.2: deep plain nets from a Gaussian of fixed 0.01 do not converge",
    proof=every(
        lambda p: f"the signal shrinks to {_shrinks(p, 'features.12', 'features.0'):.2g}",
        gradient_ratio("features.0.weight", "head.bias", 1e-4, 0, 15),
        gradient_ratio("features.0.bias", "head.bias", 1e-4, 0, 15),
        loss_stays(0.05),
    ),
    also=("loss_plateau", "update_ratio_too_small"),
)
def _(seed: int, fault: bool = True) -> Setup:
    data = Gratings(seed, batch=24)

    class Vgg(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = [
                m for k in range(7) for m in (nn.Conv2d(16 if k else 3, 16, 3, 2 if k in (2, 5) else 1, 1), nn.LeakyReLU(0.1))
            ]
            self.features = nn.Sequential(*layers)
            self.head = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.features(x).mean((2, 3)))  # type: ignore[no-any-return]

    model = Vgg()
    for m in model.features:
        if isinstance(m, nn.Conv2d):
            nn.init.normal_(m.weight, std=0.01) if fault else nn.init.kaiming_normal_(m.weight, 0.1)
            nn.init.zeros_(m.bias)  # type: ignore[arg-type]

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.SGD(model.parameters(), 0.01, momentum=0.9), 60)


def _shrinks(plain: Plain, late: str, early: str) -> float:
    a, b = plain.outputs[early][0], plain.outputs[late][0]
    assert a is not None
    assert b is not None
    assert b.rms < 1e-4 * a.rms, f"from {a.rms} to {b.rms}"
    return b.rms / a.rms


@sick(
    CASES,
    "px_pruned_filters_are_normalised",
    ("non_finite_weight",),
    ("2",),
    source="https://arxiv.org/abs/1602.07868 w / |w| of a filter that pruning has set to zero",
    onset=20,
    proof=every(
        lambda p: f"{_bad_filters(p, '2.weight', 20)}",
        first_non_finite(20, "2"),
        first_non_finite(20),
        lambda p: f"what goes into it is finite: {_all_finite(p, '1', 20)}",
    ),
    also=("non_finite_activation", "non_finite_loss", "non_finite_gradient"),
)
def _(seed: int, fault: bool = True) -> Setup:
    data = Gratings(seed)
    layers = [m for k in range(3) for m in (nn.Conv2d(12 if k else 3, 12, 3, 2 if k else 1, 1), nn.GELU())]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4))
    pruned = model[2].weight
    assert isinstance(pruned, Tensor)

    def prune(i: int) -> None:
        if i == 20:
            with torch.no_grad():
                norms = pruned.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
                pruned.mul_(norms > norms.flatten().sort().values[3])  # the four weakest go
                norms = pruned.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
                pruned.div_(norms if fault else norms.clamp(min=1e-6))

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 3e-3), 40, before=prune)


def _bad_filters(plain: Plain, parameter: str, update: int) -> str:
    norms = plain.weights[parameter]
    assert math.isfinite(norms[update - 1]), f"{parameter} is bad before"
    assert not math.isfinite(norms[update]), f"{parameter} is finite: {norms[update]}"
    others = [n for n, w in plain.weights.items() if not math.isfinite(w[update])]
    assert others == [parameter], f"{others} are bad as well"
    return f"{parameter} alone is NaN before update {update}"


@sick(
    CASES,
    "px_srgan_scheduler_in_the_batch_loop",
    ("loss_plateau", "frozen_weights"),
    source="https://github.com/leftthomas/SRGAN/issues/94 the rate falls at every batch instead of every epoch",
    onset=12,
    within=100,  # a plateau: the design allows 100
    proof=every(
        update_ratio(below=1e-4, first=40),
        loss_stays(0.08, first=12),
        lambda p: f"it had fallen before, to {_fell(p, 12, 0.6):.3g} of what it was, and stays above {_above(p, 0.15):.3g}",
    ),
    also=("update_ratio_too_small",),
)
def _(seed: int, fault: bool = True) -> Setup:
    data = Scenes(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.PReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.PReLU(),
        nn.Conv2d(16, 4, 3, padding=1),
        nn.PixelShuffle(2),
    )
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 12 if fault else 1000, 0.1)

    def loss(i: int) -> Tensor:
        x, inside = data()
        return (model(F.avg_pool2d(x, 2)) - (2 * inside - 0.6)).square().mean()  # type: ignore[no-any-return]

    def before(i: int) -> None:
        if i:
            scheduler.step()

    return fit(model, loss, optimizer, 180, before=before)


def _fell(plain: Plain, update: int, to: float) -> float:
    share = median(plain.losses[update : update + 10]) / plain.losses[0]
    assert share < to, f"it falls to {share:.3g} of what it was only"
    return share


def _above(plain: Plain, level: float) -> float:
    least = median(plain.losses[-30:])
    assert least > level, f"the loss ends at {least:.3g}"
    return least


# ------------------------------------------------------------------------------------------------------------- healthy


def accuracy(data: Callable[[], Callable[[], tuple[Tensor, Tensor]]], above: float) -> Proof:
    """After the run the model, in evaluation, names the class of more than `above` of new examples; all losses were finite."""

    def proof(plain: Plain) -> str:
        model, batches = plain.setup.model, data()
        assert isinstance(model, nn.Module)
        assert all(math.isfinite(x) for x in plain.losses), "a loss is not finite"
        model.eval()
        with torch.no_grad():
            right = [(model(x).argmax(-1) == y).float().mean() for x, y in (batches() for _ in range(20))]
        share = float(torch.stack(right).mean())
        assert share > above, f"{share:.3g} of new examples are right, not more than {above:g}"
        return f"{share:.3g} of new examples are right"

    return proof


class Residual(nn.Module):
    """Two convolutions beside the identity; the last BatchNorm begins at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        nn.init.zeros_(self.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


@healthy(
    CASES,
    "px_resnet_zero_residuals_one_cycle",
    source="https://arxiv.org/abs/1706.02677 the last gamma of a block starts at zero, warm-up; label smoothing",
    proof=every(converges(0.75), accuracy(lambda: Gratings(77, classes=6), 0.9)),
)
def _(seed: int) -> Setup:
    data = Gratings(seed, classes=6)
    model = nn.Sequential(
        conv_bn(3, 12, 2), Residual(12), Residual(12), Residual(12), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 6)
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.15, total_steps=151)

    def loss(i: int) -> Tensor:
        if i:
            cycle.step()
        x, y = data()
        return F.cross_entropy(model(x), y, label_smoothing=0.1)

    return fit(model, loss, optimizer, 150)


class Block(nn.Module):
    """Attention and MLP, each behind LayerScale, each left out for a sample with probability `drop`."""

    def __init__(self, width: int, drop: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.scale1, self.scale2 = (nn.Parameter(torch.full((width,), 1e-2)) for _ in range(2))
        self.drop = drop

    def kept(self, x: Tensor) -> Tensor:
        if not self.training or not self.drop:
            return x
        return x * (torch.rand(len(x), 1, 1) >= self.drop) / (1 - self.drop)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.kept(self.scale1 * self.attention(h, h, h, need_weights=False)[0])
        return x + self.kept(self.scale2 * self.mlp(self.norm2(x)))


class Vit(nn.Module):
    def __init__(self, classes: int, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(0.02 * torch.randn(1, 17, width))
        self.blocks = nn.Sequential(*(Block(width, 0.2 * k / (depth - 1)) for k in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.norm(self.blocks(x))[:, 0])  # type: ignore[no-any-return]


@healthy(
    CASES,
    "px_vit_layerscale_drop_path_zero_head",
    source="https://arxiv.org/abs/2103.17239 CaiT: LayerScale and stochastic depth; the head starts at zero, the rate as well",
    proof=every(converges(0.5), accuracy(lambda: Gratings(77), 0.85)),
)
def _(seed: int) -> Setup:
    data, model = Gratings(seed, batch=16), Vit(4, depth=3)
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: i / 20 if i < 20 else 0.5 + 0.5 * math.cos(math.pi * (i - 20) / 160)
    )

    def loss(i: int) -> Tensor:
        if i:
            rate.step()
        x, y = data()
        return F.cross_entropy(model(x), y)

    return fit(model, loss, optimizer, 150)


@healthy(
    CASES,
    "px_linear_probe_on_a_frozen_backbone",
    source="https://docs.pytorch.org/tutorials/beginner/transfer_learning_tutorial.html ConvNet as fixed feature extractor",
    proof=every(converges(0.4), accuracy(lambda: Gratings(77), 0.85)),
)
def _(seed: int) -> Setup:
    data, model = Gratings(seed), pretrained(seed)
    model.backbone.requires_grad_(False)
    model.fc = nn.Linear(12, 4)
    nn.init.zeros_(model.fc.weight)
    nn.init.zeros_(model.fc.bias)

    def loss(i: int) -> Tensor:
        model.backbone.eval()
        x, y = data()
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.SGD(model.fc.parameters(), 0.2, momentum=0.9), 120)


@healthy(
    CASES,
    "px_mixup_keeps_the_loss_high",
    source="https://arxiv.org/abs/1710.09412 mixup: the targets are mixed, so the loss has a floor far above zero",
    proof=every(converges(0.75), accuracy(lambda: Gratings(77), 0.9)),
)
def _(seed: int) -> Setup:
    data, model = Gratings(seed, batch=24), small_cnn()
    generator = torch.Generator().manual_seed(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        share = torch.rand(len(x), generator=generator)
        other = torch.randperm(len(x), generator=generator)
        target = F.one_hot(y, 4).float()
        target = share.view(-1, 1) * target + (1 - share).view(-1, 1) * target[other]
        share = share.view(-1, 1, 1, 1)
        return F.cross_entropy(model(share * x + (1 - share) * x[other]), target)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 3e-3), 150)


def found(least: float) -> Proof:
    """The detector's mask meets the true one: intersection over union on new pictures."""

    def proof(plain: Plain) -> str:
        model, data = plain.setup.model, Scenes(77, batch=64, radius=(1.2, 2.2))
        assert isinstance(model, nn.Module)
        model.eval()
        with torch.no_grad():
            x, mask = data()
            says = model(x) > 0
        overlap = float((says & (mask > 0)).sum() / (says | (mask > 0)).sum())
        assert overlap > least, f"the overlap is {overlap:.3g}, not above {least:g}"
        return f"the overlap with the true masks is {overlap:.3g}"

    return proof


@healthy(
    CASES,
    "px_rare_defects_with_focal_loss",
    source="https://arxiv.org/abs/1708.02002 RetinaNet: rare positives, a prior in the last bias, a sum over the number of positives",
    proof=every(converges(0.5), found(0.6)),
)
def _(seed: int) -> Setup:
    data, model = Scenes(seed, batch=16, radius=(1.2, 2.2)), Detector()
    for m in [*model.tower, model.score]:
        if isinstance(m, nn.Conv2d):
            nn.init.normal_(m.weight, std=0.01 if m is model.score else math.sqrt(2 / (9 * 16)))
            nn.init.constant_(m.bias, -math.log(99) if m is model.score else 0.0)  # type: ignore[arg-type]

    def loss(i: int) -> Tensor:
        x, mask = data()
        good = torch.rand(len(x), 1, 1, 1, generator=data.generator) < 0.6  # no defect in most pictures
        x, mask = torch.where(good, x - 2 * mask, x), torch.where(good, torch.zeros(()), mask)
        out = model(x)
        p = torch.sigmoid(out)
        hard = torch.where(mask > 0, 1 - p, p) ** 2 * torch.where(mask > 0, 0.25, 0.75)
        return (hard * F.binary_cross_entropy_with_logits(out, mask, reduction="none")).sum() / mask.sum().clamp(min=1)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 2e-3), 250)


def _ring(plain: Plain) -> str:
    """Generated points lie near the circle and all around it."""
    assert isinstance(plain.setup.model, dict)
    with torch.no_grad():
        made = plain.setup.model["generator"](torch.randn(1000, 4, generator=torch.Generator().manual_seed(0)))
    radius = made.norm(dim=1)
    quarters = torch.stack([(made[:, 0] * a > 0) & (made[:, 1] * b > 0) for a in (1, -1) for b in (1, -1)]).float().mean(1)
    off = float((radius - 1).abs().mean())
    assert off < 0.2, f"points are {off:.3g} off the circle"
    assert float(quarters.min()) > 0.08, f"points are not all around: {quarters.tolist()}"
    return f"points are {off:.3g} off the circle, the emptiest quarter has {float(quarters.min()):.2g}"


@healthy(
    CASES,
    "px_gan_in_equilibrium",
    source="https://arxiv.org/abs/1406.2661 at the optimum the discriminator cannot tell: its loss stays at log 4",
    proof=_ring,
)
def _(seed: int) -> Setup:
    data = Ring(seed, 128)
    g = nn.Sequential(nn.Linear(4, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 2))
    d = nn.Sequential(nn.Linear(2, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))
    for_g, for_d = (torch.optim.Adam(m.parameters(), lr, betas=(0.5, 0.9)) for m, lr in ((g, 1e-3), (d, 3e-3)))

    def train() -> Iterator[Event]:
        for _ in range(350):
            fake = g(data.noise())
            for_d.zero_grad()
            of_d = F.softplus(-d(data())).mean() + F.softplus(d(fake.detach())).mean()
            of_d.backward()  # type: ignore[no-untyped-call]
            yield "read", [of_d]
            for_d.step()
            yield "step", [for_d]
            for_g.zero_grad()
            of_g = F.softplus(-d(fake)).mean()  # adds to the gradients of d, which are cleared above
            of_g.backward()  # type: ignore[no-untyped-call]
            yield "read", [of_g]
            for_g.step()
            yield "step", [for_g]

    return Setup({"generator": g, "discriminator": d}, train)


class Vae(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 12, 3, 2, 1), nn.SiLU(), nn.Conv2d(12, 16, 3, 2, 1), nn.SiLU(), nn.Flatten())
        self.mean, self.logvar = nn.Linear(256, 8), nn.Linear(256, 8)
        self.decoder = nn.Sequential(
            nn.Linear(8, 256),
            nn.SiLU(),
            nn.Unflatten(1, (16, 4, 4)),
            nn.ConvTranspose2d(16, 12, 4, 2, 1),
            nn.SiLU(),
            nn.ConvTranspose2d(12, 1, 4, 2, 1),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.encoder(x)
        mean, logvar = self.mean(h), self.logvar(h)
        return self.decoder(mean + torch.randn_like(mean) * (0.5 * logvar).exp()), mean, logvar


@healthy(
    CASES,
    "px_vae_sums_and_anneals",
    source="https://arxiv.org/abs/1511.06349 the weight of the KL term rises from zero; the errors of the pixels are summed",
    proof=converges(0.5),
)
def _(seed: int) -> Setup:
    data, model = Scenes(seed, batch=16), Vae()

    def loss(i: int) -> Tensor:
        _, x = data()
        made, mean, logvar = model(x)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(1)
        miss = F.binary_cross_entropy_with_logits(made, x, reduction="none").sum((1, 2, 3))
        return (miss + min(1.0, i / 100) * kl).mean()  # type: ignore[no-any-return]

    return fit(model, loss, torch.optim.Adam(model.parameters(), 3e-3), 250)


class MeanTeacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.student = small_cnn()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.student(x)  # type: ignore[no-any-return]


@healthy(
    CASES,
    "px_mean_teacher",
    source="https://arxiv.org/abs/1703.01780 the teacher is the moving average of the student; consistency is ramped up",
    proof=every(converges(0.5), accuracy(lambda: Gratings(77), 0.9)),
)
def _(seed: int) -> Setup:
    data, model = Gratings(seed, batch=24), MeanTeacher()
    optimizer = torch.optim.AdamW(model.student.parameters(), 3e-3)

    def train() -> Iterator[Event]:
        for i in range(150):
            x, y = data()
            says = model(x + 0.2 * torch.randn(x.shape, generator=data.generator))
            with torch.no_grad():
                wanted = model.teacher(x).softmax(-1)
            value = F.cross_entropy(says[:12], y[:12]) + min(1.0, i / 60) * F.mse_loss(says.softmax(-1), wanted)
            optimizer.zero_grad(set_to_none=False)
            value.backward()  # type: ignore[no-untyped-call]
            yield "read", [value]
            optimizer.step()
            with torch.no_grad():
                for slow, fast in zip(model.teacher.parameters(), model.student.parameters(), strict=True):
                    slow.lerp_(fast, 0.05)
            yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "px_diffusion_always_clipped_with_restarts",
    source="https://arxiv.org/abs/1608.03983 warm restarts, of a noise predictor whose summed loss makes clipping act in every update",
    proof=converges(0.4),
)
def _(seed: int) -> Setup:
    data = Scenes(seed, batch=12)
    model = nn.Sequential(
        nn.Conv2d(2, 20, 3, padding=1), nn.GroupNorm(4, 20), nn.SiLU(), nn.Conv2d(20, 20, 3, padding=1), nn.GroupNorm(4, 20), nn.SiLU(),
        nn.Conv2d(20, 1, 3, padding=1),
    )  # fmt: skip
    nn.init.zeros_(model[6].weight)  # type: ignore[arg-type]
    nn.init.zeros_(model[6].bias)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(model.parameters(), 4e-3)
    restarts = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 40, 2)

    def loss(i: int) -> Tensor:
        if i:
            restarts.step()
        _, mask = data()
        x, g = 2 * mask - 1, data.generator
        t = torch.rand(len(x), 1, 1, 1, generator=g) * 0.9 + 0.05
        noise = torch.randn(x.shape, generator=g)
        noisy = (1 - t).sqrt() * x + t.sqrt() * noise
        return (model(torch.cat([noisy, t.expand_as(x)], 1)) - noise).square().sum() / len(x)  # type: ignore[no-any-return]

    def clip(i: int) -> None:
        assert float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)) > 1.0, "the clipping does not act"

    return fit(model, loss, optimizer, 240, between=clip)


@healthy(
    CASES,
    "px_system_identified_to_rounding",
    source="https://en.wikipedia.org/wiki/Least_mean_squares_filter an impulse response found to rounding: the gradients end at 1e-6",
    proof=converges(1e-8),
)
def _(seed: int) -> Setup:
    data = Waves(seed, batch=16)
    truth = torch.randn(1, 1, 9, generator=data.generator) * torch.exp(-0.4 * torch.arange(9))
    model = nn.Sequential(nn.Conv1d(1, 4, 9), nn.Conv1d(4, 1, 1))

    def loss(i: int) -> Tensor:
        x = torch.randn(16, 1, 64, generator=data.generator)
        return F.mse_loss(model(x), F.conv1d(x, truth))

    return fit(model, loss, torch.optim.SGD(model.parameters(), 0.1), 250)


@healthy(
    CASES,
    "px_batchnorm_first_on_bytes",
    source="https://github.com/NLeSC/mcfly/issues/40 models begin with BatchNorm, in place of a normalisation of the data",
    proof=every(converges(0.3), accuracy(lambda: _Bytes(77), 0.9)),
)
def _(seed: int) -> Setup:
    data = _Bytes(seed)
    model = nn.Sequential(nn.BatchNorm2d(3), *small_cnn())

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), 3e-3), 120)


class _Bytes(Gratings):
    def __call__(self) -> tuple[Tensor, Tensor]:
        x, y = super().__call__()
        return (128 + 50 * x).clamp(0, 255).round(), y


def _neighbours(plain: Plain) -> str:
    """The nearest neighbour of most new pictures, by their embeddings, is of the same class."""
    assert isinstance(plain.setup.model, nn.Module)
    plain.setup.model.eval()
    x, y = Gratings(77, classes=8, batch=200, noise=1.3)()
    with torch.no_grad():
        z = plain.setup.model(x)
    nearest = (torch.cdist(z, z) + 1e9 * torch.eye(len(z))).argmin(1)
    share = float((y[nearest] == y).float().mean())
    assert share > 0.85, f"{share:.3g} of the nearest neighbours are of the same class"
    return f"{share:.3g} of the nearest neighbours are of the same class"


def _some_gradient(plain: Plain) -> str:
    """Few batches are without a triplet to learn from."""
    share = sum(x == 0 for x in plain.losses) / len(plain.losses)
    assert share < 0.1, f"{share:.2g} of the batches have no loss at all"
    return f"{share:.2g} of the batches have no loss at all"


@healthy(
    CASES,
    "px_triplets_become_easy",
    source="https://arxiv.org/abs/1503.03832 FaceNet: triplets that keep the margin give no gradient, in the end most of them",
    proof=every(converges(0.35), _neighbours, _some_gradient),
)
def _(seed: int) -> Setup:
    data = Gratings(seed, classes=8, batch=24, noise=1.3)
    model = small_cnn(8, width=16)

    def loss(i: int) -> Tensor:
        x, y = data()
        z = F.normalize(model(x), dim=-1)
        far = (z.unsqueeze(0) - z.unsqueeze(1)).square().sum(-1)
        same = y.unsqueeze(0) == y.unsqueeze(1)
        hinge = F.relu(far.unsqueeze(2) - far.unsqueeze(1) + 0.2)
        valid = (same & ~torch.eye(len(y), dtype=torch.bool)).unsqueeze(2) & ~same.unsqueeze(1)
        return hinge[valid].mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), 2e-3), 120)


@healthy(
    CASES,
    "px_simclr_on_waves",
    source="https://arxiv.org/abs/2002.05709 two views of a wave; NT-Xent with the temperature 0.1",
    proof=converges(0.6),
)
def _(seed: int) -> Setup:
    data = Waves(seed, classes=0, batch=24, length=128)
    body = nn.Sequential(
        nn.Conv1d(1, 16, 9, 2), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 24, 7, 2), nn.BatchNorm1d(24), nn.ReLU()
    )
    model = nn.Sequential(body, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 16))

    def loss(i: int) -> Tensor:
        x, _ = data()
        views = torch.cat([x[..., :64], x[..., 64:]])
        z = F.normalize(model(views), dim=-1)
        alike = (z @ z.T / 0.1).masked_fill(torch.eye(len(z), dtype=torch.bool), -math.inf)
        return F.cross_entropy(alike, torch.arange(len(z)).roll(len(x)))

    return fit(model, loss, torch.optim.Adam(model.parameters(), 3e-3), 150)


def _knows(plain: Plain) -> str:
    """The frequency of new waves is known to a fraction of its spread."""
    assert isinstance(plain.setup.model, nn.Module)
    x, y = Waves(77, classes=0, batch=200)()
    with torch.no_grad():
        error = float((plain.setup.model(x)[:, 0] - 3 * (y - 0.5)).square().mean().sqrt())
    assert error < 0.4, f"the error is {error:.3g} of a spread of 0.87, loss {plain.losses[-1]:.3g}"
    assert plain.losses[0] > 0 > median(plain.losses[-20:]), "the loss does not pass zero"
    return f"the error is {error:.3g} of a spread of 0.87, and the loss goes from {plain.losses[0]:.3g} to {plain.losses[-1]:.3g}"


@healthy(
    CASES,
    "px_pitch_with_its_uncertainty",
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.GaussianNLLLoss.html a loss that falls through zero",
    proof=_knows,
)
def _(seed: int) -> Setup:
    data = Waves(seed, classes=0, batch=32)
    model = nn.Sequential(
        nn.Conv1d(1, 16, 9, 2), nn.ReLU(), nn.Conv1d(16, 24, 7, 2), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
        nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 2),
    )  # fmt: skip

    def loss(i: int) -> Tensor:
        x, y = data()
        out = model(x)
        return F.gaussian_nll_loss(out[:, 0], 3 * (y - 0.5), F.softplus(out[:, 1]) + 0.1)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 2e-3), 250)
