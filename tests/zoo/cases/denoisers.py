"""Held-out runs on pictures and tables: denoisers, autoencoders, U-Nets, detectors, flows, a GAN, small vision transformers.

Every `build` of a sick run takes `fault`: with False it is the same run without the mistake, to see that nothing else is wrong with it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim import SGD, Adam, AdamW, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, CosineAnnealingWarmRestarts, LambdaLR, PolynomialLR, StepLR

from tests.zoo.case import Case, Event, Proof, Setup, fit, healthy, initialise, sick
from tests.zoo.plain import Plain, named_parameters
from tests.zoo.proofs import (
    converges,
    dead_fraction,
    every,
    first_non_finite,
    gradient_ratio,
    gradient_spikes,
    loss_grows,
    loss_stays,
    no_gradient,
    unchanged,
    update_ratio,
    zero_gradient,
)

CASES: list[Case] = []


# Data. All pictures and columns have a mean near 0 and a spread near 1 unless a run says otherwise.


class Scene(NamedTuple):
    """A batch of pictures `[batch, 1, 12, 12]` with one figure each, and what there is to know of them."""

    noisy: Tensor
    clean: Tensor
    mask: Tensor
    """1 where the figure is."""
    box: Tensor
    """Centre and size, as shares of the side."""
    kind: Tensor
    """0: disc, 1: lying bar, 2: standing bar, 3: ring."""


class Scenes:
    """Figures on a sloping ground, in noise."""

    def __init__(self, seed: int, batch: int = 16, size: int = 12, noise: float = 0.5) -> None:
        self.generator = torch.Generator().manual_seed(7000 + seed)
        self.batch, self.size, self.noise = batch, size, noise

    def __call__(self) -> Scene:
        g, n, s = self.generator, self.batch, self.size
        axis = torch.arange(s) + 0.5
        centre = 3.5 + (s - 7) * torch.rand(n, 2, generator=g)
        radius = 2.2 + 1.2 * torch.rand(n, 1, 1, generator=g)
        kind = torch.randint(4, (n,), generator=g)
        dx = (axis[None, None, :] - centre[:, 0, None, None]).abs()
        dy = (axis[None, :, None] - centre[:, 1, None, None]).abs()
        far = (dx.square() + dy.square()).sqrt()
        shapes = torch.stack(
            [
                far < radius,
                (dx < 1.3 * radius) & (dy < 0.45 * radius),
                (dy < 1.3 * radius) & (dx < 0.45 * radius),
                (far < 1.2 * radius) & (far > 0.6 * radius),
            ]
        )
        mask = shapes[kind, torch.arange(n)].float()[:, None]
        slope = torch.randn(n, 2, generator=g) * 0.5
        ground = slope[:, 0, None, None] * (axis / s - 0.5) + slope[:, 1, None, None] * (axis[:, None] / s - 0.5)
        clean = ground[:, None] + 2.4 * mask - 0.5
        noisy = clean + self.noise * torch.randn(n, 1, s, s, generator=g)
        size = (2 * radius / s).flatten(1).expand(n, 2)
        return Scene(noisy, clean, mask, torch.cat([centre / s, size], 1), kind)


class Table:
    """Twelve columns and a smooth function of them, once as a number and once as one of four classes."""

    def __init__(self, seed: int, batch: int = 32, columns: int = 12) -> None:
        self.generator = torch.Generator().manual_seed(8000 + seed)
        self.first, self.second, self.third = torch.randn(3, columns, generator=self.generator) / math.sqrt(columns)
        self.batch, self.columns = batch, columns

    def __call__(self) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.randn(self.batch, self.columns, generator=self.generator)
        a, b, c = x @ self.first, x @ self.second, x @ self.third
        y = torch.tanh(2 * a) + 0.5 * b + 0.4 * c * c.sign()
        kind = 2 * (a > 0).long() + (b > 0).long()
        return x, (y + 0.05 * torch.randn(self.batch, generator=self.generator))[:, None], kind


class Moons:
    """Points `[batch, 2]` on two half circles, with a spread near 1."""

    def __init__(self, seed: int, batch: int = 128) -> None:
        self.generator = torch.Generator().manual_seed(9000 + seed)
        self.batch = batch

    def __call__(self) -> Tensor:
        t = math.pi * torch.rand(self.batch, generator=self.generator)
        up = torch.randint(2, (self.batch,), generator=self.generator).float()
        x = torch.stack([t.cos() + up - 0.5, (1 - 2 * up) * t.sin() + 0.5 * up - 0.25], 1)
        return 1.3 * (x + 0.08 * torch.randn(self.batch, 2, generator=self.generator))


# Models.


class UNet(nn.Module):
    """Two levels, transposed convolutions on the way up."""

    def __init__(self, out: int = 1, width: int = 8, inputs: int = 1) -> None:
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(inputs, width, 3, padding=1), nn.GroupNorm(2, width), nn.SiLU())
        self.down2 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, padding=1), nn.GroupNorm(2, 2 * width), nn.SiLU())
        self.middle = nn.Sequential(nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.GroupNorm(2, 2 * width), nn.SiLU())
        self.up2 = nn.ConvTranspose2d(2 * width, 2 * width, 2, stride=2)
        self.join2 = nn.Sequential(nn.Conv2d(4 * width, width, 3, padding=1), nn.GroupNorm(2, width), nn.SiLU())
        self.up1 = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.join1 = nn.Sequential(nn.Conv2d(2 * width, width, 3, padding=1), nn.GroupNorm(2, width), nn.SiLU())
        self.out = nn.Conv2d(width, out, 1)

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.middle(F.max_pool2d(b, 2))
        d = self.join2(torch.cat([self.up2(c), b], 1))
        return self.join1(torch.cat([self.up1(d), a], 1)), d

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.features(x)[0])
        return out


def stack(sizes: list[int], act: Callable[[], nn.Module]) -> nn.Sequential:
    """Linear layers with `act()` between them: at 0, 2, 4, ..."""
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), act())]
    return nn.Sequential(*layers[:-1])


def convs(widths: list[int], act: Callable[[], nn.Module]) -> nn.Sequential:
    """Convolutions of 3 x 3 with `act()` between them: at 0, 2, 4, ..."""
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Conv2d(a, b, 3, padding=1), act())]
    return nn.Sequential(*layers[:-1])


def he(p: nn.Parameter) -> object:
    return nn.init.kaiming_normal_(p, nonlinearity="relu")


def settled(to: float, over: int = 10) -> Proof:
    """Without a fault the same run learns; so this says, of a sick run, that its loss is still above `to`."""

    def proof(plain: Plain) -> str:
        late = median(plain.losses[-over:])
        assert late > to, f"the loss is {late:.3g}, not above {to:g}"
        return f"the loss ends at {late:.3g}"

    return proof


def finite_before(update: int) -> Proof:
    """Every loss and gradient before `update` is finite."""

    def proof(plain: Plain) -> str:
        assert all(math.isfinite(x) for x in plain.losses[:update]), "a loss is not finite"
        assert not any(any(n[:update]) for n in plain.nonfinite.values()), "a gradient is not finite"
        return f"all is finite before update {update}"

    return proof


# Sick runs.


@sick(
    CASES,
    "hn_denoiser_with_sigmoids_between",
    ("vanishing_gradient",),
    tuple(str(i) for i in range(15)),
    source="https://proceedings.mlr.press/v9/glorot10a.html Glorot and Bengio: logistic units in deep networks",
    proof=every(
        gradient_ratio("0.weight", "20.weight", 1e-4, last=15),
        gradient_ratio("14.weight", "20.weight", 0.1, last=15),
        gradient_ratio("0.bias", "20.bias", 1e-4, last=15),
        settled(0.45),
    ),
)
def _(seed: int, fault: bool = True) -> Setup:
    data = Scenes(seed)
    model = initialise(convs([1] + [12] * 10 + [1], nn.Sigmoid if fault else nn.ReLU), he)

    def loss(i: int) -> Tensor:
        s = data()
        return F.mse_loss(model(s.noisy), s.clean)

    return fit(model, loss, Adam(model.parameters(), 2e-3), 60)


class Fused(nn.Module):
    """A picture and a row of a table, joined before the head."""

    def __init__(self, act: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.picture = nn.Sequential(
            nn.Conv2d(1, 12, 3, stride=2), nn.ReLU(), nn.Conv2d(12, 16, 3, stride=2), nn.ReLU(), nn.Flatten()
        )
        self.table = stack([12] + [24] * 8, act)
        self.head = nn.Linear(16 * 4 + 24, 8)

    def forward(self, picture: Tensor, row: Tensor) -> Tensor:
        out: Tensor = self.head(torch.cat([self.picture(picture), self.table(row)], 1))
        return out


@sick(
    CASES,
    "hn_deep_sigmoid_branch_for_the_table",
    ("vanishing_gradient",),
    tuple(f"table.{i}" for i in range(11)),
    source="http://neuralnetworksanddeeplearning.com/chap5.html why are deep networks hard to train",
    proof=every(
        gradient_ratio("table.0.weight", "table.14.weight", 1e-4, last=15),
        gradient_ratio("table.8.weight", "table.14.weight", 0.03, last=15),
        gradient_ratio("table.0.weight", "picture.0.weight", 1e-4, last=15),
        settled(1.7),
    ),
)
def _(seed: int, fault: bool = True) -> Setup:
    scenes, table = Scenes(seed, batch=32), Table(seed, batch=32)
    model = Fused(nn.Sigmoid if fault else nn.ReLU)
    if not fault:
        initialise(model.table, he)

    def loss(i: int) -> Tensor:
        s, (x, _, kind) = scenes(), table()
        out = model(s.noisy, x)
        return F.cross_entropy(out[:, :4], s.kind) + F.cross_entropy(out[:, 4:], kind)

    return fit(model, loss, SGD(model.parameters(), 0.05, 0.9), 60)


class Sine(nn.Module):
    def __init__(self, inputs: int, width: int, omega: float = 30.0) -> None:
        super().__init__()
        self.linear, self.omega = nn.Linear(inputs, width), omega

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.omega * self.linear(x))


@sick(
    CASES,
    "hn_siren_with_the_init_of_linear",
    ("exploding_gradient", "poor_init"),
    tuple(f"{i}" for i in range(5)),
    source="https://arxiv.org/abs/2006.09661 Sitzmann et al., section 3.2: without their initialisation such a network does not train",
    proof=every(
        gradient_ratio("4.linear.weight", "1.linear.weight", 0.01, last=15),
        gradient_ratio("3.linear.weight", "1.linear.weight", 0.1, last=15),
        gradient_ratio("5.weight", "4.linear.weight", 0.3, last=15),
        settled(0.3),
    ),
)
def _(seed: int, fault: bool = True) -> Setup:
    picture = Scenes(seed, batch=1, size=24, noise=0.0)().clean[0, 0]
    axis = torch.linspace(-1, 1, 24)
    places = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    model = nn.Sequential(Sine(2, 48), *[Sine(48, 48) for _ in range(4)], nn.Linear(48, 1))
    for layer in itertools.islice(model, 1, 5):
        if not fault:
            nn.init.uniform_(layer.linear.weight, -math.sqrt(6 / 48) / 30, math.sqrt(6 / 48) / 30)  # type: ignore[arg-type, union-attr]

    def loss(i: int) -> Tensor:
        return F.mse_loss(model(places)[:, 0], picture.flatten())

    return fit(model, loss, Adam(model.parameters(), 5e-4), 40)


@sick(
    CASES,
    "hn_diffusion_weight_without_a_ceiling",
    ("gradient_spike", "loss_spike"),
    onset=45,
    source="https://arxiv.org/abs/2303.09556 Min-SNR weighting: the weight of nearly clean samples has to be clipped",
    proof=every(gradient_spikes(45, 100), finite_before(58)),
)
def _(seed: int, fault: bool = True) -> Setup:
    data = Scenes(seed, batch=24)
    model = convs([2, 16, 16, 16, 1], nn.SiLU)

    def loss(i: int) -> Tensor:
        clean = data().clean
        level = torch.empty(len(clean)).uniform_(math.log(0.25), 0, generator=data.generator).exp()
        if i == 45:
            level[0] = 1e-3  # the sampler draws a time next to 0
        sigma = level[:, None, None, None]
        noisy = clean + sigma * torch.randn(clean.shape, generator=data.generator)
        guess = model(torch.cat([noisy, sigma.expand_as(noisy)], 1))
        weight = level**-2 if fault else (level**-2).clamp(max=20)
        value: Tensor = (weight * (guess - clean).square().flatten(1).mean(1)).mean()
        return value

    return fit(model, loss, AdamW(model.parameters(), 2e-3, (0.9, 0.95)), 58)


class Detector(nn.Module):
    """One figure a picture: its kind and its box."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(12, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.neck = nn.Sequential(nn.Flatten(), nn.Linear(24 * 9, 48), nn.GELU())
        self.kind = nn.Linear(48, 4)
        self.box = nn.Linear(48, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.neck(self.backbone(x))
        return self.kind(h), self.box(h)


def spikes(update: int, factor: float) -> Proof:
    """The loss of one update is more than `factor` times the largest of the ten before it, and the next one is not."""

    def proof(plain: Plain) -> str:
        ratio = plain.losses[update] / max(plain.losses[update - 10 : update])
        after = plain.losses[update + 1] / max(plain.losses[update - 10 : update])
        assert ratio > factor, f"at update {update} the loss is {ratio:.3g} times those before, not {factor:g}"
        assert after < factor / 5, f"the loss stays at {after:.3g} times those before"
        return f"at update {update} the loss is {ratio:.3g} times those before, then {after:.2g}"

    return proof


@sick(
    CASES,
    "hn_one_shard_with_boxes_in_pixels",
    ("loss_spike",),
    onset=50,
    also=("gradient_spike",),
    source="https://github.com/tensorflow/models/issues/3420 single spikes of the box loss, and the inputs to be verified",
    proof=every(spikes(50, 50), finite_before(64)),
)
def _(seed: int, fault: bool = True) -> Setup:
    data, model = Scenes(seed, noise=0.3), Detector()

    def loss(i: int) -> Tensor:
        s = data()
        kind, box = model(s.noisy)
        target = 640 * s.box if fault and i == 50 else s.box
        return F.cross_entropy(kind, s.kind) + 2 * F.smooth_l1_loss(box, target, beta=0.1)

    return fit(model, loss, Adam(model.parameters(), 2e-3), 64)


@sick(
    CASES,
    "hn_step_decay_by_ten_instead_of_a_tenth",
    ("loss_diverging",),
    onset=40,
    also=(
        "exploding_gradient",
        "update_ratio_too_large",
        "gradient_spike",
        "loss_spike",
        "non_finite_loss",
        "non_finite_gradient",
        "non_finite_activation",
    ),
    source="https://docs.pytorch.org/docs/stable/generated/torch.optim.lr_scheduler.StepLR.html gamma is a factor",
    proof=every(loss_grows(20, first=39, last=51), finite_before(44)),
)
def _(seed: int, fault: bool = True) -> Setup:
    # A linear model of columns and their squares: it was set up to be retrained every night in seconds.
    data = Table(seed, batch=64)
    model = nn.Linear(24, 1)
    optimizer = SGD(model.parameters(), 0.055, 0.9)
    schedule = StepLR(optimizer, 40, gamma=10 if fault else 0.1)

    def loss(i: int) -> Tensor:
        x, y, _ = data()
        if i:
            schedule.step()
        return F.mse_loss(model(torch.cat([x, (x.square() - 1) / math.sqrt(2)], 1)), y)

    return fit(model, loss, optimizer, 52)


class Residual(nn.Module):
    def __init__(self, width: int, norm: Callable[[int], nn.Module], bias: bool = True) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=bias), norm(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=bias), norm(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


def resnet(width: int, blocks: int, norm: Callable[[int], nn.Module], out: int = 4) -> nn.Sequential:
    """A stem (0, 1, 2), residual blocks (3, ...), pooling to 3 x 3, a head (the last)."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride=2, padding=1),
        norm(width),
        nn.ReLU(),
        *[Residual(width, norm) for _ in range(blocks)],
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Linear(9 * width, out),
    )


@sick(
    CASES,
    "hn_blank_picture_standardised",
    ("non_finite_input",),
    ("",),
    onset=28,
    also=("non_finite_activation", "non_finite_loss", "non_finite_gradient", "non_finite_weight"),
    source="https://www.tensorflow.org/api_docs/python/tf/image/per_image_standardization its guard for uniform images, here left out",
    proof=every(first_non_finite(28), first_non_finite(28, "0"), finite_before(28)),
)
def _(seed: int, fault: bool = True) -> Setup:
    data = Scenes(seed)
    model = resnet(12, 2, lambda n: nn.GroupNorm(3, n))

    def loss(i: int) -> Tensor:
        s = data()
        x = s.noisy.clone()
        if i == 28:
            x[3] = 0  # the lens cap was on
        spread = x.std((1, 2, 3), keepdim=True)
        x = (x - x.mean((1, 2, 3), keepdim=True)) / (spread if fault else spread.clamp(min=0.1))
        return F.cross_entropy(model(x), s.kind)

    return fit(model, loss, AdamW(model.parameters(), 3e-3), 36)


class Logit(nn.Module):
    def __init__(self, squeeze: float) -> None:
        super().__init__()
        self.squeeze = squeeze

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze + (1 - 2 * self.squeeze) * x
        return x.log() - (1 - x).log()


class Coupling(nn.Module):
    """Affine; `flip` says which half is changed."""

    def __init__(self, size: int, width: int, flip: bool, bound: float = 2.0) -> None:
        super().__init__()
        self.net = stack(
            [size - size // 2 if flip else size // 2, width, width, 2 * (size // 2 if flip else size - size // 2)], nn.SiLU
        )
        self.left, self.flip, self.bound = size // 2, flip, bound
        nn.init.zeros_(self.net[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.net[-1].bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x[:, : self.left], x[:, self.left :]
        if self.flip:
            a, b = b, a
        scale, shift = self.net(a).chunk(2, 1)
        scale = self.bound * torch.tanh(scale / self.bound)
        b = b * scale.exp() + shift
        return torch.cat([b, a] if self.flip else [a, b], 1), scale.sum(1)


class PictureFlow(nn.Module):
    def __init__(self, squeeze: float) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(3)
        self.logit = Logit(squeeze)
        self.couplings = nn.ModuleList(Coupling(16, 32, flip=i % 2 == 1) for i in range(4))

    def forward(self, x: Tensor) -> Tensor:
        z, volume = self.logit(self.pool(x)).flatten(1), torch.zeros(len(x))
        for coupling in self.couplings:
            z, more = coupling(z)
            volume = volume + more
        value: Tensor = (0.5 * z.square().sum(1) + 0.5 * z.shape[1] * math.log(2 * math.pi) - volume).mean()
        return value


@sick(
    CASES,
    "hn_flow_takes_the_logit_of_black",
    ("non_finite_activation",),
    ("logit",),
    also=("non_finite_loss", "non_finite_gradient", "non_finite_weight"),
    source="https://arxiv.org/abs/1605.08803 RealNVP, section 4.1: logit(alpha + (1 - alpha) x), to stay off the ends",
    proof=every(first_non_finite(0, "logit"), lambda p: _all_finite(p, "pool")),
)
def _(seed: int, fault: bool = True) -> Setup:
    data = Scenes(seed, batch=32)
    model = PictureFlow(0.0 if fault else 0.05)

    def loss(i: int) -> Tensor:
        # Pictures of eight bits, as shares of 255: the ground is black, as in photographs of the night sky.
        x = ((data().clean + 0.3).clamp(0, 2) / 2.1 * 255).round() / 255
        out: Tensor = model(x)
        return out

    return fit(model, loss, Adam(model.parameters(), 2e-3), 40 if not fault else 20)


def _all_finite(plain: Plain, module: str) -> str:
    assert all(o is not None and o.nonfinite == 0 for o in plain.outputs[module]), f"{module} gives NaN or Inf"
    return f"{module} is finite in every update"


class Dense(nn.Module):
    """A detector that says of every place whether a figure is centred there, and its box."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(1, width, 5, padding=2), nn.SiLU(), nn.Conv2d(width, width, 5, padding=2), nn.SiLU())
        self.score = nn.Conv2d(width, 1, 1)
        self.box = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x)
        return self.score(h), self.box(h)


def centres(s: Scene) -> Tensor:
    """`[batch, 1, 12, 12]`, 1 at the centre of the figure."""
    n, _, h, w = s.noisy.shape
    at = torch.zeros(n, 1, h, w)
    cell = (s.box[:, :2] * w).long().clamp(0, w - 1)
    at[torch.arange(n), 0, cell[:, 1], cell[:, 0]] = 1
    return at


@sick(
    CASES,
    "hn_batch_without_an_object",
    ("non_finite_loss",),
    onset=33,
    also=("non_finite_gradient", "non_finite_weight", "non_finite_activation"),
    source="https://github.com/kuangliu/torchcv/issues/35 the loss is divided by the number of positives, which may be 0",
    proof=every(first_non_finite(33), finite_before(33), lambda p: _finite_at(p, 33, ("trunk", "score", "box"))),
)
def _(seed: int, fault: bool = True) -> Setup:
    data, model = Scenes(seed, batch=8), Dense()

    def loss(i: int) -> Tensor:
        s = data()
        x, there = s.noisy, centres(s)
        if i == 33:  # eight pictures of nothing but ground
            x, there = s.noisy - 2.4 * s.mask, torch.zeros_like(there)
        score, box = model(x)
        positives = there.sum()
        if not fault:
            positives = positives.clamp(min=1)
        far = (box - s.box[:, 2:, None, None]).abs() * there
        value: Tensor = (F.binary_cross_entropy_with_logits(score, there, reduction="sum") + far.sum()) / positives
        return value

    return fit(model, loss, Adam(model.parameters(), 3e-3), 42)


def _finite_at(plain: Plain, update: int, modules: tuple[str, ...]) -> str:
    for name in modules:
        seen = plain.outputs[name][update]
        assert seen is not None, f"{name} is not called"
        assert seen.nonfinite == 0, f"{name} gives {seen.nonfinite} NaN or Inf at update {update}"
    return f"{', '.join(modules)}: finite at update {update}"


@sick(
    CASES,
    "hn_total_variation_of_a_flat_picture",
    ("non_finite_gradient",),
    ("out", ""),
    also=("non_finite_weight", "non_finite_activation", "non_finite_loss"),
    source="https://openillumi.com/en/en-fix-pytorch-cpu-nan-powbackward0 torch.sqrt(grad_x2 + grad_y2) at zero",
    proof=every(first_non_finite(0), lambda p: _finite_loss(p, 0), lambda p: _finite_at(p, 0, ("body", "out"))),
)
def _(seed: int, fault: bool = True) -> Setup:
    data = Scenes(seed)
    model = nn.Sequential()
    model.add_module("body", convs([1, 16, 16, 16], nn.ReLU))
    model.add_module("out", nn.Conv2d(16, 1, 3, padding=1))
    nn.init.zeros_(model.get_parameter("out.weight"))
    nn.init.zeros_(model.get_parameter("out.bias"))

    def loss(i: int) -> Tensor:
        s = data()
        out = model(s.noisy)
        dx, dy = out[:, :, 1:, 1:] - out[:, :, 1:, :-1], out[:, :, 1:, 1:] - out[:, :, :-1, 1:]
        value: Tensor = F.mse_loss(out, s.clean) + 0.01 * (dx.square() + dy.square() + (0 if fault else 1e-4)).sqrt().mean()
        return value

    return fit(model, loss, Adam(model.parameters(), 3e-3), 20 if fault else 60)


def _finite_loss(plain: Plain, update: int) -> str:
    assert math.isfinite(plain.losses[update]), "the loss is not finite"
    return f"the loss of update {update} is {plain.losses[update]:.3g}"


class Heatmap(nn.Module):
    """A backbone, and a tower that scores every place."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(1, width, 5, padding=2), nn.GroupNorm(4, width), nn.ReLU())
        self.tower = convs([width, width, width, 1], nn.ReLU)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.tower(self.backbone(x))
        return out


@sick(
    CASES,
    "hn_prior_of_the_focal_loss_on_every_bias",
    ("dead_units",),
    ("tower",),
    also=("zero_gradient", "poor_init", "vanishing_gradient"),
    source="https://arxiv.org/abs/1708.02002 RetinaNet, section 4.1: b = -log((1 - pi) / pi), for the last layer only",
    proof=every(dead_fraction("tower.1", 0.9, last=15), dead_fraction("tower.3", 0.9, last=15), settled(0.02)),
)
def _(seed: int, fault: bool = True) -> Setup:
    data = Scenes(seed)
    model = Heatmap()
    for name, p in model.named_parameters():
        if name == "tower.4.bias" or (fault and name.startswith("tower") and name.endswith("bias")):
            nn.init.constant_(p, -math.log(0.99 / 0.01))

    def loss(i: int) -> Tensor:
        s = data()
        score, there = model(s.noisy), centres(s)
        p = torch.sigmoid(score)
        sure = torch.where(there > 0, p, 1 - p)
        each = (1 - sure).square() * F.binary_cross_entropy_with_logits(score, there, reduction="none")
        return each.sum() / len(there)

    return fit(model, loss, Adam(model.parameters(), 2e-3), 60)


@sick(
    CASES,
    "hn_normal_init_with_its_default_spread",
    ("saturated_activation", "poor_init"),
    ("0", "1", "2", "3", "4"),
    source="https://docs.pytorch.org/docs/stable/nn.init.html nn.init.normal_: std is 1 unless said",
    proof=every(lambda p: _flat(p, "1"), lambda p: _flat(p, "3"), settled(0.8)),
)
def _(seed: int, fault: bool = True) -> Setup:
    data = Scenes(seed, batch=32, noise=0.3)
    model = stack([144, 96, 64, 4], nn.Tanh)
    initialise(model, nn.init.normal_ if fault else nn.init.xavier_normal_)
    if fault:  # the last layer was left alone, so the loss begins where it should
        nn.init.xavier_normal_(model[4].weight)  # type: ignore[arg-type]

    def loss(i: int) -> Tensor:
        s = data()
        return F.cross_entropy(model(s.noisy.flatten(1)), s.kind)

    return fit(model, loss, Adam(model.parameters(), 1e-3), 60)


def _flat(plain: Plain, module: str) -> str:
    seen = [o for o in plain.outputs[module][:15] if o is not None]
    rms = min(o.rms for o in seen)
    assert rms > 0.9, f"{module} has a root mean square of {rms:.3g}"
    return f"the tanh of {module} has a root mean square of {rms:.3g}: mostly at -1 or 1"


class Supervised(UNet):
    """A U-Net with an auxiliary output at half size, for deep supervision."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        full, half = self.features(x)
        return self.out(full), self.aux(half)


@sick(
    CASES,
    "hn_auxiliary_loss_not_added",
    ("missing_gradient",),
    ("aux",),
    source="https://arxiv.org/abs/1409.5185 Deeply-supervised nets: the companion objectives belong to the loss",
    proof=every(
        no_gradient("aux.0.weight", "aux.0.bias", "aux.2.weight", "aux.2.bias"),
        converges(0.8),
        lambda p: _finite_at(p, 5, ("aux.0", "aux.2")),
    ),
)
def _(seed: int, fault: bool = True) -> Setup:
    data, model = Scenes(seed), Supervised()

    def loss(i: int) -> Tensor:
        s = data()
        full, half = model(s.noisy)
        main = F.binary_cross_entropy_with_logits(full, s.mask)
        companion = F.binary_cross_entropy_with_logits(half, F.max_pool2d(s.mask, 2))
        return main if fault else main + 0.4 * companion

    return fit(model, loss, Adam(model.parameters(), 2e-3), 40)


@sick(
    CASES,
    "hn_features_cached_after_the_first_epoch",
    ("missing_gradient",),
    ("backbone",),
    onset=24,
    source="https://docs.pytorch.org/docs/stable/notes/autograd.html no-grad mode: what is computed in it takes no part in backward",
    proof=every(
        no_gradient("backbone.0.weight", "backbone.0.bias", "backbone.3.weight", "backbone.3.bias", first=24),
        lambda p: _had_gradients(p, ("backbone.0.weight", "backbone.3.weight"), 24),
    ),
)
def _(seed: int, fault: bool = True) -> Setup:
    data = Scenes(seed, batch=24, noise=0.3)
    batches = [data() for _ in range(12)]
    model = Detector()
    optimizer = Adam(model.parameters(), 2e-3)
    cache: dict[int, Tensor] = {}

    def loss(i: int) -> Tensor:
        epoch, k = divmod(i, 12)
        s = batches[k]
        if fault and epoch >= 2:  # meant for the frozen stage of another recipe; here the backbone should learn
            if k not in cache:
                with torch.no_grad():
                    cache[k] = F.max_pool2d(F.relu(_conv(model, 3, F.max_pool2d(F.relu(_conv(model, 0, s.noisy)), 2))), 2)
            features = cache[k]
        else:
            features = model.backbone(s.noisy)
        h = model.neck(features)
        return F.cross_entropy(model.kind(h), s.kind) + F.l1_loss(model.box(h), s.box)

    return fit(model, loss, optimizer, 48)


def _conv(model: Detector, k: int, x: Tensor) -> Tensor:
    out: Tensor = model.backbone[k](x)
    return out


def _had_gradients(plain: Plain, parameters: tuple[str, ...], before: int) -> str:
    for name in parameters:
        assert all(n > 0 for n in plain.grads[name][:before]), f"{name} had none before {before} either"
    return f"{', '.join(parameters)}: had gradients until {before}"


class Codec(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(16, 16, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(16, 8, 1),
        )
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(8, 16, 2, stride=2),
            nn.GELU(),
            nn.ConvTranspose2d(16, 16, 2, stride=2),
            nn.GELU(),
            nn.Conv2d(16, 1, 3, padding=1),
        )


@sick(
    CASES,
    "hn_codec_rounds_in_earnest",
    ("zero_gradient",),
    ("encoder",),
    onset=30,
    also=("vanishing_gradient",),
    source="https://arxiv.org/abs/1611.01704 Balle et al.: rounding has derivative zero, so noise stands in for it in training",
    proof=every(
        zero_gradient("encoder.0.weight", "encoder.2.weight", "encoder.4.weight", "encoder.4.bias", first=30),
        lambda p: _had_gradients(p, ("encoder.0.weight", "encoder.4.weight"), 30),
    ),
)
def _(seed: int, fault: bool = True) -> Setup:
    data, model = Scenes(seed), Codec()

    def loss(i: int) -> Tensor:
        s = data()
        code = 4 * model.encoder(s.clean)
        if i >= 30:
            code = torch.round(code) if fault else code + (torch.round(code) - code).detach()
        else:
            code = code + torch.rand(code.shape, generator=data.generator) - 0.5
        return F.mse_loss(model.decoder(code / 4), s.clean)

    return fit(model, loss, Adam(model.parameters(), 3e-3), 50)


UNET = tuple(name for name, _ in UNet().named_parameters())


@sick(
    CASES,
    "hn_polynomial_decay_ends_after_one_epoch",
    ("frozen_weights",),
    onset=20,
    also=("update_ratio_too_small", "loss_plateau"),
    source="https://docs.pytorch.org/docs/stable/generated/torch.optim.lr_scheduler.PolynomialLR.html the rate is 0 after total_iters",
    proof=every(unchanged(*UNET, first=20), lambda p: _moved(p, UNET, 0, 20), settled(0.2)),
)
def _(seed: int, fault: bool = True) -> Setup:
    data, model = Scenes(seed, noise=1.0), UNet()
    optimizer = SGD(model.parameters(), 0.02, 0.9)
    schedule = PolynomialLR(optimizer, 20 if fault else 100, power=0.9)

    def loss(i: int) -> Tensor:
        if i:
            schedule.step()
        s = data()
        return F.binary_cross_entropy_with_logits(model(s.noisy), s.mask)

    return fit(model, loss, optimizer, 40 if fault else 100)


def _moved(plain: Plain, parameters: tuple[str, ...], first: int, last: int) -> str:
    for name in parameters:
        assert all(s > 0 for s in plain.steps[name][first:last]), f"{name} does not move"
    return f"{len(parameters)} parameters move in updates {first} to {last}"


LEFT_OUT = ("up1.weight", "up1.bias", "up2.weight", "up2.bias")


@sick(
    CASES,
    "hn_groups_forget_transposed_convolutions",
    ("not_in_optimizer",),
    ("up1", "up2"),
    source="https://github.com/karpathy/minGPT/blob/master/mingpt/model.py parameter groups by the type of the module",
    proof=every(
        unchanged(*LEFT_OUT, last=15), lambda p: _moved(p, tuple(n for n in UNET if n not in LEFT_OUT), 0, 15), converges(0.9)
    ),
)
def _(seed: int, fault: bool = True) -> Setup:
    data, model = Scenes(seed), UNet()
    decay: list[Tensor] = []
    rest: list[Tensor] = []
    for m in model.modules():
        if isinstance(m, nn.Conv2d if fault else (nn.Conv2d, nn.ConvTranspose2d)):
            decay.append(m.weight)
            rest.extend([] if m.bias is None else [m.bias])
        elif isinstance(m, nn.GroupNorm):
            rest.extend(m.parameters())
    optimizer = AdamW([{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}], 2e-3)

    def loss(i: int) -> Tensor:
        s = data()
        return F.mse_loss(model(s.noisy), s.clean)

    return fit(model, loss, optimizer, 40)


class VAE(nn.Module):
    def __init__(self, width: int = 64, latent: int = 6) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(144, width), nn.ReLU())
        self.mean, self.logvar = nn.Linear(width, latent), nn.Linear(width, latent)
        self.decoder = nn.Sequential(nn.Linear(latent, width), nn.ReLU(), nn.Linear(width, 144))

    def forward(self, x: Tensor, noise: torch.Generator) -> tuple[Tensor, Tensor]:
        h = self.encoder(x)
        mean, logvar = self.mean(h), self.logvar(h)
        z = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=noise)
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(1)
        return self.decoder(z).view_as(x), divergence


@sick(
    CASES,
    "hn_adam_with_the_rate_of_sgd",
    ("update_ratio_too_large",),
    also=("loss_diverging", "loss_spike", "gradient_spike", "dead_units", "exploding_gradient"),
    source="https://cs231n.github.io/neural-networks-3/#ratio updates should be about a thousandth of the weights",
    proof=every(update_ratio(above=0.8, last=2), update_ratio(above=0.15, last=12)),
)
def _(seed: int, fault: bool = True) -> Setup:
    data = Scenes(seed, batch=32)
    model = stack([144, 64, 16, 64, 144], nn.ELU)

    def loss(i: int) -> Tensor:
        x = data().clean.flatten(1)
        return F.mse_loss(model(x), x)

    return fit(model, loss, Adam(model.parameters(), 0.1 if fault else 2e-3), 40)


@sick(
    CASES,
    "hn_schedule_returns_the_rate_itself",
    ("update_ratio_too_small",),
    source="https://docs.pytorch.org/docs/stable/generated/torch.optim.lr_scheduler.LambdaLR.html lr_lambda gives a factor, not a rate",
    proof=every(update_ratio(below=1e-5, last=15), loss_stays(0.05)),
)
def _(seed: int, fault: bool = True) -> Setup:
    data = Moons(seed)
    model = stack([3, 64, 64, 2], nn.SiLU)
    optimizer = AdamW(model.parameters(), 5e-4, weight_decay=0.0)

    def rate(i: int) -> float:
        return 5e-4 * 0.5 * (1 + math.cos(math.pi * i / 200))

    schedule = LambdaLR(optimizer, rate if fault else lambda i: rate(i) / 5e-4)

    def loss(i: int) -> Tensor:
        if i:
            schedule.step()
        x = data()
        sigma = 0.1 + 0.9 * torch.rand(len(x), 1, generator=data.generator)
        noise = torch.randn(x.shape, generator=data.generator)
        return F.mse_loss(model(torch.cat([x + sigma * noise, sigma], 1)), noise)

    return fit(model, loss, optimizer, 60)


@sick(
    CASES,
    "hn_dcgan_init_in_a_narrow_network",
    ("poor_init", "vanishing_gradient"),
    tuple(str(i) for i in range(14)),
    also=("dead_units",),
    source="https://docs.pytorch.org/tutorials/beginner/dcgan_faces_tutorial.html N(0, 0.02), for layers hundreds of channels wide",
    proof=every(lambda p: _fades(p, "12", 1e-4), gradient_ratio("0.weight", "14.bias", 1e-4, last=15), loss_stays(0.05)),
)
def _(seed: int, fault: bool = True) -> Setup:
    data = Table(seed)
    model = initialise(stack([12] + [32] * 7 + [4], nn.ReLU), (lambda p: nn.init.normal_(p, 0, 0.02)) if fault else he)

    def loss(i: int) -> Tensor:
        x, _, kind = data()
        return F.cross_entropy(model(x), kind)

    return fit(model, loss, SGD(model.parameters(), 0.05, 0.9), 40)


def _fades(plain: Plain, module: str, below: float) -> str:
    seen = plain.outputs[module][0]
    assert seen is not None
    assert seen.rms < below, f"{module} gives {seen.rms:.3g} at the first update"
    return f"the output of {module} begins at {seen.rms:.2g}"


@sick(
    CASES,
    "hn_scanner_pictures_of_twelve_bits",
    ("unnormalized_input",),
    ("",),
    also=("dead_units",),
    source="https://github.com/bonlime/keras-deeplab-v3-plus/issues/24 training on raw integers instead of [-1...1]",
    proof=every(lambda p: _loud(p, "0", 300), lambda p: _begins(p, 3.0)),
)
def _(seed: int, fault: bool = True) -> Setup:
    data = Scenes(seed)
    model = convs([1, 12, 12, 12, 1], nn.ReLU)

    def loss(i: int) -> Tensor:
        s = data()
        x = (2047 + 800 * s.noisy).clamp(0, 4095).round()
        return F.binary_cross_entropy_with_logits(model(x if fault else (x - 2047) / 800), s.mask)

    return fit(model, loss, Adam(model.parameters(), 2e-3), 40)


def _begins(plain: Plain, above: float) -> str:
    first = median(plain.losses[:3])
    assert first > above, f"the loss begins at {first:.3g}"
    return f"the loss begins at {first:.3g}, where log 2 is to be expected"


def _loud(plain: Plain, module: str, above: float) -> str:
    seen = plain.outputs[module][0]
    assert seen is not None
    assert seen.rms > above, f"{module} gives {seen.rms:.3g} at the first update"
    return f"the output of {module} begins at {seen.rms:.3g}"


class Segmenter(nn.Module):
    def __init__(self, softmax: bool) -> None:
        super().__init__()
        self.body = UNet(5)
        self.softmax = nn.Softmax2d() if softmax else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.softmax(self.body(x))
        return out


@sick(
    CASES,
    "hn_segmenter_gives_probabilities_to_cross_entropy",
    ("double_softmax",),
    ("softmax",),
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html the input holds unnormalised logits",
    proof=every(lambda p: _probabilities(p, "softmax"), settled(0.9)),
)
def _(seed: int, fault: bool = True) -> Setup:
    data, model = Scenes(seed), Segmenter(fault)

    def loss(i: int) -> Tensor:
        s = data()
        target = (s.mask[:, 0] * (1 + s.kind[:, None, None])).long()
        return F.cross_entropy(model(s.noisy), target)

    return fit(model, loss, RMSprop(model.parameters(), 1e-3, alpha=0.9), 60)


def _probabilities(plain: Plain, module: str) -> str:
    seen = [o for o in plain.outputs[module] if o is not None]
    assert all(o.low >= 0 and o.high <= 1 for o in seen), "not between 0 and 1"
    assert min(plain.losses) > math.log(math.e + 4) - 1, "below what cross-entropy of probabilities can reach"
    return f"{module} gives numbers from {min(o.low for o in seen):.2g} to {max(o.high for o in seen):.2g}"


# Healthy runs.


def falls(to: float) -> Proof:
    """The median of the last ten losses is below `to` times the first; every loss is finite."""

    def proof(plain: Plain) -> str:
        late = median(plain.losses[-10:])
        assert all(math.isfinite(x) for x in plain.losses), "a loss is not finite"
        assert late < to * plain.losses[0], f"the loss goes from {plain.losses[0]:.3g} to {late:.3g}"
        return f"the loss falls from {plain.losses[0]:.3g} to {late:.3g}"

    return proof


def silent(module: str, above: float, dead_below: float = 0.02) -> Proof:
    """More than `above` of what a ReLU gives is zero, and yet its units do fire."""

    def proof(plain: Plain) -> str:
        seen = [o for o in plain.outputs[module] if o is not None]
        zeros = median(o.zeros for o in seen)
        dead = max(
            float((~torch.stack([o.fired for o in seen[k : k + 10]]).any(0)).double().mean()) for k in range(0, len(seen) - 10, 10)
        )
        assert zeros > above, f"{zeros:.3g} of the output of {module} is zero, not more than {above:g}"
        assert dead <= dead_below, f"{dead:.3g} of the units of {module} do not fire in ten updates"
        return f"{zeros:.3g} of the output of {module} is zero; {dead:.2g} of its units rest for ten updates"

    return proof


class Block(nn.Module):
    """Of a vision transformer, with LayerScale and stochastic depth of whole batches."""

    def __init__(self, width: int, heads: int, drop: float, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.scale1, self.scale2 = nn.Parameter(scale * torch.ones(width)), nn.Parameter(scale * torch.ones(width))
        self.heads, self.drop, self.generator = heads, drop, generator

    def kept(self) -> bool:
        return not self.training or float(torch.rand(1, generator=self.generator)) >= self.drop

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        if self.kept():
            q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
            x = x + self.scale1 * self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d))
        if self.kept():
            x = x + self.scale2 * self.mlp(self.norm2(x))
        return x


class ViT(nn.Module):
    def __init__(self, seed: int, width: int = 48, blocks: int = 2) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(9500 + seed)
        self.patches = nn.Conv2d(1, width, 3, stride=3)
        self.position = nn.Parameter(0.3 * torch.randn(1, 16, width))
        self.blocks = nn.ModuleList(Block(width, 4, 0.15 * (i + 1), 1e-4, generator) for i in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 4)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.1)
                nn.init.zeros_(m.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x.mean(1)))
        return out


@healthy(
    CASES,
    "hn_vit_with_layerscale_and_stochastic_depth",
    source="https://arxiv.org/abs/2103.17239 CaiT: LayerScale from 1e-4 and stochastic depth",
    proof=converges(0.6),
)
def _(seed: int) -> Setup:
    # Until the scales have grown, the blocks have 1e-4 of the gradient of the head; and some batches skip a block.
    data, model = Scenes(seed, batch=24, noise=0.3), ViT(seed)
    optimizer = AdamW(model.parameters(), 4e-3, weight_decay=0.05)
    schedule = LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / 20) * 0.5 * (1 + math.cos(math.pi * i / 200)))

    def loss(i: int) -> Tensor:
        if i:
            schedule.step()
        s = data()
        return F.cross_entropy(model(s.noisy), s.kind)

    return fit(model, loss, optimizer, 200)


@healthy(
    CASES,
    "hn_sparse_rectifiers_on_a_table",
    source="https://proceedings.mlr.press/v15/glorot11a.html Glorot et al.: deep sparse rectifier networks, 50 to 80 % zeros",
    proof=every(converges(0.3), silent("1", 0.7)),
)
def _(seed: int) -> Setup:
    data = Table(seed, batch=128)
    model = stack([12, 160, 1], nn.ReLU)
    nn.init.constant_(model[0].bias, -0.4)  # type: ignore[arg-type]

    def loss(i: int) -> Tensor:
        x, y, _ = data()
        hidden = model[:2](x)
        out: Tensor = F.mse_loss(model[2](hidden), y) + 2e-4 * hidden.sum(1).mean()
        return out

    return fit(model, loss, Adam(model.parameters(), 3e-3), 200)


class Rare(nn.Module):
    """Scores every place; the last convolution begins tiny, its bias at the rate of the positives, and a sigmoid comes after it."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(1, width, 5, padding=2), nn.SiLU(), nn.Conv2d(width, width, 5, padding=2), nn.SiLU())
        self.score = nn.Conv2d(width, 1, 1)
        self.sigmoid = nn.Sigmoid()
        nn.init.normal_(self.score.weight, 0, 0.01)
        nn.init.constant_(self.score.bias, -math.log(143))  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.sigmoid(self.score(self.trunk(x)))
        return out


@healthy(
    CASES,
    "hn_centres_are_one_place_in_144",
    source="https://arxiv.org/abs/1708.02002 RetinaNet, section 4.1: last layer from N(0, 0.01), bias at the prior",
    proof=every(
        converges(0.45), lambda p: _mostly_near_zero(p, "sigmoid"), gradient_ratio("trunk.0.weight", "score.weight", 0.2, last=2)
    ),
)
def _(seed: int) -> Setup:
    data, model = Scenes(seed, batch=24, noise=0.3), Rare()

    def loss(i: int) -> Tensor:
        s = data()
        p, there = model(s.noisy), centres(s)
        return F.binary_cross_entropy(p, there, reduction="sum") / len(there)

    return fit(model, loss, Adam(model.parameters(), 3e-3), 200)


def _mostly_near_zero(plain: Plain, module: str) -> str:
    rms = median(o.rms for o in plain.outputs[module] if o is not None)
    assert rms < 0.1, f"{module} has a root mean square of {rms:.3g}"
    return f"the sigmoid has a root mean square of {rms:.3g}"


class ZeroBlock(nn.Module):
    def __init__(self, width: int, noise: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, width)
        self.conv1, self.time = nn.Conv2d(width, width, 3, padding=1), nn.Linear(noise, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm(x))) + self.time(t)[:, :, None, None]
        return x + F.silu(self.conv2(F.silu(h)))


class Noiser(nn.Module):
    """Predicts the noise; every block and the whole begin as nothing, as in the U-Nets of diffusion models."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, 24), nn.SiLU(), nn.Linear(24, 24), nn.SiLU())
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.ModuleList(ZeroBlock(width, 24) for _ in range(3))
        self.out = nn.Conv2d(width, 1, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        angles = sigma[:, None].log() * 2.0 ** torch.arange(4)
        t = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        h = self.stem(x / (1 + sigma.square()).sqrt()[:, None, None, None])
        for block in self.blocks:
            h = block(h, t)
        out: Tensor = self.out(h)
        return out


@healthy(
    CASES,
    "hn_diffusion_from_nothing",
    source="https://github.com/openai/guided-diffusion/blob/main/guided_diffusion/unet.py zero_module() on last convolutions",
    proof=every(converges(0.45), zero_gradient("stem.weight", "blocks.0.conv1.weight", "time.0.weight", last=1)),
)
def _(seed: int) -> Setup:
    data, model = Scenes(seed, batch=16), Noiser()

    def loss(i: int) -> Tensor:
        x = data().clean
        sigma = torch.empty(len(x)).uniform_(math.log(0.2), math.log(3), generator=data.generator).exp()
        noise = torch.randn(x.shape, generator=data.generator)
        return F.mse_loss(model(x + sigma[:, None, None, None] * noise, sigma), noise)

    return fit(model, loss, AdamW(model.parameters(), 2e-3), 120)


def distance(a: Tensor, b: Tensor) -> float:
    """Energy distance of two clouds of points."""
    return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


def _imitates(plain: Plain) -> str:
    assert isinstance(plain.setup.model, dict)
    generator = plain.setup.model["generator"]
    g = torch.Generator().manual_seed(77)
    data = Moons(0, 1000)
    z, real, again = torch.randn(1000, 4, generator=g), data(), data()
    with torch.no_grad():
        fake = generator(z)
    torch.manual_seed(5)
    raw = stack([4, 48, 48, 2], nn.GELU)(z).detach()
    now, before, floor = distance(fake, real), distance(raw, real), distance(again, real)
    assert now < 0.06 * before, f"the energy distance is {now:.3g}, of an untrained generator {before:.3g}"
    return f"the energy distance falls from {before:.3g} to {now:.3g} (real to real: {floor:.2g})"


@healthy(
    CASES,
    "hn_spectral_gan_in_balance",
    source="https://arxiv.org/abs/1802.05957 Miyato et al.: spectral normalisation for GANs",
    proof=every(_imitates, lambda p: _balanced(p)),
)
def _(seed: int) -> Setup:
    # At the balance both losses stand still at the value of a critic that cannot tell, and that is the goal.
    data = Moons(seed)
    generator = stack([4, 48, 48, 2], nn.GELU)
    critic = nn.Sequential(
        spectral_norm(nn.Linear(2, 64)), nn.LeakyReLU(0.1), spectral_norm(nn.Linear(64, 64)), nn.LeakyReLU(0.1), nn.Linear(64, 1)
    )
    by_generator, by_critic = Adam(generator.parameters(), 1e-3, (0.5, 0.9)), Adam(critic.parameters(), 4e-3, (0.5, 0.9))

    def judge(x: Tensor) -> Tensor:
        out: Tensor = 2 * critic(x)
        return out

    def train() -> Iterator[Event]:
        for i in range(200):
            for optimizer, rate in ((by_generator, 1e-3), (by_critic, 4e-3)):
                optimizer.param_groups[0]["lr"] = rate * min(1.0, 2 * (1 - i / 200))
            real, z = data(), torch.randn(2, 128, 4, generator=data.generator)
            by_critic.zero_grad()
            told = F.softplus(-judge(real)).mean() + F.softplus(judge(generator(z[0]).detach())).mean()
            told.backward()  # type: ignore[no-untyped-call]
            by_critic.step()
            by_generator.zero_grad()
            fooled = F.softplus(-judge(generator(z[1]))).mean()
            fooled.backward()  # type: ignore[no-untyped-call]
            yield "read", [told, fooled]
            by_generator.step()
            yield "step", [by_critic, by_generator]

    return Setup({"generator": generator, "critic": critic}, train)


def _balanced(plain: Plain) -> str:
    late = median(plain.losses[-60:])
    assert abs(late - 3 * math.log(2)) < 0.15, f"the two losses are at {late:.3g}"
    return f"the two losses end at {late:.3g}, near 3 log 2"


@healthy(
    CASES,
    "hn_autoencoder_of_a_plane",
    source="https://doi.org/10.1016/0893-6080(89)90014-2 Baldi and Hornik: linear autoencoders have no bad minima",
    proof=every(converges(1e-3), lambda p: _gradients_end(p, 0.02)),
)
def _(seed: int) -> Setup:
    # The data lie in a plane of three dimensions, so loss and gradients go to nothing, as they should.
    g = torch.Generator().manual_seed(9700 + seed)
    x = torch.randn(96, 3, generator=g) @ torch.linalg.qr(torch.randn(12, 3, generator=g))[0].T * 2
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 4), nn.Linear(4, 8), nn.Linear(8, 12))
    optimizer = Adam(model.parameters(), 1e-2)
    schedule = CosineAnnealingLR(optimizer, 350)

    def loss(i: int) -> Tensor:
        if i:
            schedule.step()
        return F.mse_loss(model(x), x)

    return fit(model, loss, optimizer, 350)


def _gradients_end(plain: Plain, below: float) -> str:
    totals = [math.sqrt(sum(g[i] ** 2 for g in plain.grads.values())) for i in range(len(plain.losses))]
    ratio = median(totals[-20:]) / median(totals[:20])
    assert ratio < below, f"the gradients end at {ratio:.3g} of what they were"
    return f"the gradients end at {ratio:.2g} of what they were"


@healthy(
    CASES,
    "hn_vae_with_sums_over_pixels_and_batch",
    source="https://github.com/pytorch/examples/blob/main/vae/main.py reduction='sum' for both terms",
    proof=every(converges(0.6), lambda p: _large(p, 1e3)),
)
def _(seed: int) -> Setup:
    data, model = Scenes(seed, batch=64), VAE()

    def loss(i: int) -> Tensor:
        x = data().clean
        out, divergence = model(x, data.generator)
        value: Tensor = F.mse_loss(out, x, reduction="sum") + divergence.sum()
        return value

    return fit(model, loss, Adam(model.parameters(), 2e-3), 200)


def _large(plain: Plain, above: float) -> str:
    assert plain.losses[0] > above, f"the loss begins at {plain.losses[0]:.3g}"
    largest = max(g[0] for g in plain.grads.values())
    return f"a loss of {plain.losses[0]:.4g}, a gradient of {largest:.4g}"


@healthy(
    CASES,
    "hn_smoothed_labels_have_a_floor",
    source="https://arxiv.org/abs/1906.02629 Mueller et al.: when does label smoothing help",
    proof=every(falls(0.5), lambda p: _floor(p)),
)
def _(seed: int) -> Setup:
    # 0.2 of smoothing on four classes: cross-entropy cannot go below 0.59.
    data = Scenes(seed, batch=32, noise=0.25)
    model = resnet(12, 2, nn.BatchNorm2d)
    optimizer = SGD(model.parameters(), 0.02, 0.9, nesterov=True, weight_decay=1e-4)
    schedule = CosineAnnealingLR(optimizer, 250)

    def loss(i: int) -> Tensor:
        if i:
            schedule.step()
        s = data()
        return F.cross_entropy(model(s.noisy), s.kind, label_smoothing=0.2)

    return fit(model, loss, optimizer, 250)


def _floor(plain: Plain) -> str:
    p = [0.85, 0.05, 0.05, 0.05]
    least = -sum(x * math.log(x) for x in p)
    late = median(plain.losses[-25:])
    assert least <= late < least + 0.15, f"the loss ends at {late:.3g}, the floor is {least:.3g}"
    return f"the loss ends at {late:.3g}, the floor is {least:.3g}"


@healthy(
    CASES,
    "hn_segmentation_with_warm_restarts",
    source="https://arxiv.org/abs/1608.03983 SGDR: warm restarts",
    proof=every(falls(0.2), lambda p: _restarts(p)),
)
def _(seed: int) -> Setup:
    data, model = Scenes(seed), UNet(5)
    optimizer = SGD(model.parameters(), 0.1, 0.9)
    schedule = CosineAnnealingWarmRestarts(optimizer, 30, 2)

    def loss(i: int) -> Tensor:
        if i:
            schedule.step()
        s = data()
        target = (s.mask[:, 0] * (1 + s.kind[:, None, None])).long()
        return F.cross_entropy(model(s.noisy), target)

    return fit(model, loss, optimizer, 210)


def _restarts(plain: Plain) -> str:
    before, after = plain.update_ratio(89), plain.update_ratio(92)
    assert after > 10 * before, f"updates of {before:.3g} and then {after:.3g}"
    return f"at the restart of update 90 the updates go from {before:.2g} to {after:.2g} of the weights"


class Mixer(nn.Module):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.across, self.within = stack([tokens, 32, tokens], nn.GELU), stack([width, 64, width], nn.GELU)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.across(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        value: Tensor = x + self.within(self.norm2(x))
        return value


@healthy(
    CASES,
    "hn_mixer_warmed_up_from_nothing",
    source="https://arxiv.org/abs/2105.01601 MLP-Mixer, with linear warm-up",
    proof=every(converges(0.5), lambda p: _still_at_first(p)),
)
def _(seed: int) -> Setup:
    # The first update has a rate of exactly 0, the next ones next to nothing.
    data = Scenes(seed, batch=32, noise=0.3)
    model = nn.Sequential(
        nn.Unfold(3, stride=3),
        _Transpose(),
        nn.Linear(9, 32),
        Mixer(16, 32),
        Mixer(16, 32),
        nn.LayerNorm(32),
        nn.Flatten(),
        nn.Linear(512, 4),
    )
    optimizer = AdamW(model.parameters(), 3e-3, weight_decay=0.01)
    schedule = LambdaLR(optimizer, lambda i: min(i / 40, (180 - i) / 140))

    def loss(i: int) -> Tensor:
        if i:
            schedule.step()
        s = data()
        return F.cross_entropy(model(s.noisy), s.kind)

    return fit(model, loss, optimizer, 160)


class _Transpose(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def _still_at_first(plain: Plain) -> str:
    assert all(s[0] == 0.0 for s in plain.steps.values()), "the first update changes something"
    return "the first update changes nothing"


class Probe(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 24, 3, padding=1),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.head = nn.Sequential(nn.Linear(216, 48), nn.GELU(), nn.Linear(48, 4))

    def train(self, mode: bool = True) -> Probe:
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.backbone(x))
        return out


@healthy(
    CASES,
    "hn_head_on_a_frozen_backbone",
    source="https://docs.pytorch.org/tutorials/beginner/transfer_learning_tutorial.html ConvNet as fixed feature extractor",
    proof=every(converges(0.4), no_gradient("backbone.0.weight", "backbone.4.weight")),
)
def _(seed: int) -> Setup:
    data, model = Scenes(seed, batch=64, noise=0.3), Probe()
    boxes = nn.Linear(216, 8)  # what the backbone was trained for: kind and box
    first = Adam([*model.backbone.parameters(), *boxes.parameters()], 3e-3)
    model.backbone.train()
    for _ in range(60):
        s = data()
        out = boxes(model.backbone(s.noisy))
        first.zero_grad()
        (F.cross_entropy(out[:, :4], s.kind) + F.smooth_l1_loss(out[:, 4:], s.box)).backward()  # type: ignore[no-untyped-call]
        first.step()
    first.zero_grad()
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    model.train()

    def loss(i: int) -> Tensor:
        s = data()
        return F.cross_entropy(model(s.noisy), 3 - s.kind)

    return fit(model, loss, Adam(model.head.parameters(), 2e-3), 120)


@healthy(
    CASES,
    "hn_dncnn_keeps_its_biases",
    source="https://arxiv.org/abs/1608.03981 DnCNN: convolution, batch normalisation, ReLU; learns the noise",
    proof=every(converges(0.4), gradient_ratio("4.bias", "4.weight", 1e-4), gradient_ratio("7.bias", "7.weight", 1e-4)),
)
def _(seed: int) -> Setup:
    # The biases of the convolutions are taken out again by the normalisation: their gradients are rounding noise.
    data = Scenes(seed, noise=0.8)
    layers = [m for k in range(4) for m in (nn.Conv2d(12 if k else 1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())]
    model = nn.Sequential(nn.Identity(), *layers, nn.Conv2d(12, 1, 3, padding=1))

    def loss(i: int) -> Tensor:
        s = data()
        return F.mse_loss(model(s.noisy), (s.noisy - s.clean) / 0.8)

    return fit(model, loss, Adam(model.parameters(), 3e-3), 120)


class HardGates(nn.Module):
    """Hard-concrete gates: most of the time exactly 0 or 1."""

    def __init__(self, columns: int, generator: torch.Generator) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.full((columns,), 1.0))
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        u = torch.rand(x.shape, generator=self.generator).clamp(1e-6, 1 - 1e-6)
        s = torch.sigmoid((u.log() - (1 - u).log() + self.logits) / 0.66)
        return x * (1.2 * s - 0.1).clamp(0, 1)

    def open(self) -> Tensor:
        return torch.sigmoid(self.logits - 0.66 * math.log(0.1 / 1.1))


@healthy(
    CASES,
    "hn_hard_gates_choose_the_columns",
    source="https://arxiv.org/abs/1712.01312 Louizos et al.: L0 regularisation by hard-concrete gates",
    proof=every(converges(0.5), lambda p: _chooses(p)),
)
def _(seed: int) -> Setup:
    table = Table(seed, batch=64, columns=6)
    gates = HardGates(16, torch.Generator().manual_seed(9800 + seed))
    model = nn.Sequential(gates, nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 1))
    optimizer = Adam([{"params": [gates.logits], "lr": 5e-2}, {"params": model[1:].parameters(), "lr": 5e-3}])

    def loss(i: int) -> Tensor:
        x, y, _ = table()
        other = torch.randn(len(x), 10, generator=table.generator)
        return F.mse_loss(model(torch.cat([x, other], 1)), y) + 0.01 * gates.open().sum()

    return fit(model, loss, optimizer, 250)


def _chooses(plain: Plain) -> str:
    logits = named_parameters(plain.setup.model)["0.logits"].detach()
    assert logits[6:].max() < -0.5, f"a column of noise has the gate {float(logits[6:].max()):.3g}"
    assert int((logits[:6] > 1).sum()) >= 3, f"the gates of the six columns: {logits[:6].tolist()}"
    return f"gates of the six columns {[round(x, 1) for x in logits[:6].tolist()]}, of noise at most {float(logits[6:].max()):.2g}"


class Flow(nn.Module):
    def __init__(self, size: int, couplings: int) -> None:
        super().__init__()
        self.couplings = nn.ModuleList(Coupling(size, 48, flip=i % 2 == 1, bound=0.8) for i in range(couplings))

    def forward(self, z: Tensor) -> Tensor:
        volume = torch.zeros(len(z))
        for coupling in self.couplings:
            z, more = coupling(z)
            volume = volume + more
        value: Tensor = (0.5 * z.square().sum(1) + 0.5 * z.shape[1] * math.log(2 * math.pi) - volume).mean()
        return value


@healthy(
    CASES,
    "hn_realnvp_goes_below_zero",
    source="https://arxiv.org/abs/1605.08803 RealNVP: the last layers of the couplings begin at zero here, as in Glow",
    proof=lambda p: _crosses(p),
)
def _(seed: int) -> Setup:
    # A density may exceed 1, so the loss passes through zero on its way. Eight columns, nearly in a plane.
    g = torch.Generator().manual_seed(9900 + seed)
    plane = torch.randn(2, 8, generator=g)
    plane = plane / plane.norm(dim=0)
    model = Flow(8, 8)
    optimizer = Adam(model.parameters(), 1e-3)
    schedule = LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / 25) * 0.5 * (1 + math.cos(math.pi * i / 220)))

    def loss(i: int) -> Tensor:
        if i:
            schedule.step()
        x = torch.randn(128, 2, generator=g) @ plane + 0.1 * torch.randn(128, 8, generator=g)
        out: Tensor = model(0.6 * x)
        return out

    return fit(model, loss, optimizer, 220)


def _crosses(plain: Plain) -> str:
    a, b = median(plain.losses[:10]), median(plain.losses[-10:])
    assert all(math.isfinite(x) for x in plain.losses), "a loss is not finite"
    assert a > 5, f"the loss begins at {a:.3g}"
    assert b < -1, f"the loss ends at {b:.3g}"
    return f"the loss falls from {a:.3g} to {b:.3g}"
