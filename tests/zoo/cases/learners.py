"""Runs that encode or classify: pictures, tables, sets and graphs, metric and self-supervised learning, autoencoders, fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Blobs, Case, Event, Pictures, Proof, Setup, classify, fit, healthy, mlp, sick
from tests.zoo.plain import Plain
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

NOTES: dict[str, list[float]] = {}
"""What a loop measured of itself in its latest run, for its proof: by name of the case, one number an update."""


def noted(name: str, what: str, holds: Callable[[list[float]], bool]) -> Proof:
    """What the loop wrote down is as it should be."""

    def proof(plain: Plain) -> str:
        assert holds(NOTES[name]), f"{what}: not so, {NOTES[name][:12]}"
        return what

    return proof


def output(module: str, what: str, holds: Callable[[Any], bool], first: int = 0, last: int | None = None) -> Proof:
    """The output of a module is so in every one of these updates."""

    def proof(plain: Plain) -> str:
        seen = plain.outputs[module][first:last]
        assert seen, f"{module} is not called"
        assert all(o is not None and holds(o) for o in seen), f"{module}: not {what}: {seen[0]}"
        return f"{module}: {what}"

    return proof


def floor(least: float) -> Proof:
    """The loss never falls below `least`."""

    def proof(plain: Plain) -> str:
        assert min(plain.losses) >= least, f"the loss reaches {min(plain.losses):.4g}, below {least:.4g}"
        return f"the loss never falls below {least:.4g}"

    return proof


def finite_loss(update: int) -> Proof:
    """The loss is finite up to and in this update."""

    def proof(plain: Plain) -> str:
        assert all(math.isfinite(x) for x in plain.losses[: update + 1]), "a loss is not finite"
        return f"the loss is finite up to update {update}"

    return proof


class Scenes:
    """12 x 12 pictures with a bright and a dark square in noise, and the class of every pixel: ground, bright, dark."""

    def __init__(self, seed: int, batch: int = 8) -> None:
        self.generator = torch.Generator().manual_seed(4000 + seed)
        self.batch = batch

    def __call__(self) -> tuple[Tensor, Tensor]:
        x = 0.5 * torch.randn(self.batch, 1, 12, 12, generator=self.generator)
        y = torch.zeros(self.batch, 12, 12, dtype=torch.long)
        for k in range(self.batch):
            for c, sign in ((1, 1.5), (2, -1.5)):
                r, s = torch.randint(0, 8, (2,), generator=self.generator).tolist()
                x[k, 0, r : r + 5, s : s + 5] = sign + 0.5 * torch.randn(5, 5, generator=self.generator)
                y[k, r : r + 5, s : s + 5] = c
        return x, y


def mislabelled(data: Callable[[], tuple[Tensor, Tensor]], classes: int, share: float) -> Callable[[], tuple[Tensor, Tensor]]:
    """A share of the labels is drawn anew, as people's labels are: the loss has a floor above zero."""
    generator = torch.Generator().manual_seed(5400)

    def batch() -> tuple[Tensor, Tensor]:
        x, y = data()
        wrong = torch.rand(y.shape, generator=generator) < share
        return x, torch.where(wrong, torch.randint(classes, y.shape, generator=generator), y)

    return batch


def conv(a: int, b: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    """A convolution that keeps the size, He-initialised."""
    layer = nn.Conv2d(a, b, kernel, padding=kernel // 2, **options)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


# Sick runs.


class Segmenter(nn.Module):
    def __init__(self, softmax: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(1, 12), nn.ReLU(), conv(12, 12), nn.ReLU())
        self.head = nn.Conv2d(12, 3, 1)
        self.softmax = nn.Softmax(dim=1) if softmax else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.softmax(self.head(self.body(x)))
        return out


def sums_to_one(plain: Plain) -> str:
    model = plain.setup.model
    assert isinstance(model, nn.Module)
    with torch.no_grad():
        sums = model(Scenes(99)()[0]).sum(1)
    assert torch.allclose(sums, torch.ones_like(sums), atol=1e-5), "what enters the cross-entropy are no probabilities"
    return "what enters the cross-entropy are probabilities"


@sick(
    CASES,
    "le_segmenter_softmax_then_cross_entropy",
    ("double_softmax",),
    ("softmax",),
    source="https://discuss.pytorch.org/t/cross-entropy-loss-is-not-decreasing/43814 softmax handed to CrossEntropyLoss",
    proof=every(sums_to_one, floor(math.log(1 + 2 / math.e)), output("softmax", "in [0, 1]", lambda o: o.low >= 0 and o.high <= 1)),
)
def _(seed: int) -> Setup:
    model, data = Segmenter(softmax=True), Scenes(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 60)


def houses(seed: int, batch: int = 32, raw: bool = True) -> Callable[[], tuple[Tensor, Tensor]]:
    """Rows of a table in the units of its columns: income, year, area, age, rooms, latitude; and a yes or no."""
    generator = torch.Generator().manual_seed(4100 + seed)
    mean = torch.tensor([50000.0, 2000.0, 1500.0, 40.0, 3.0, 35.0])
    deviation = torch.tensor([15000.0, 10.0, 400.0, 12.0, 1.0, 3.0])
    direction = torch.randn(6, generator=generator)

    def rows() -> tuple[Tensor, Tensor]:
        z = torch.randn(batch, 6, generator=generator)
        y = (z @ direction + 0.5 * z[:, 0] * z[:, 2] > 0).float()
        return (mean + deviation * z if raw else z), y

    return rows


@sick(
    CASES,
    "le_table_in_raw_units",
    ("unnormalized_input",),
    ("",),
    also=("dead_units",),
    source="http://yann.lecun.com/exdb/publis/pdf/lecun-98b.pdf Efficient BackProp, section 4.3: normalise the inputs",
    proof=every(
        output("0", "rms of the first layer's output above 3e3", lambda o: o.rms > 3e3, last=15),
        lambda plain: _first_loss(plain, 20.0),
    ),
)
def _(seed: int) -> Setup:
    model, data = mlp(nn.ReLU, 2, 32, 6, 1), houses(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.binary_cross_entropy_with_logits(model(x)[:, 0], y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-3), 50)


def _first_loss(plain: Plain, above: float) -> str:
    worst = max(plain.losses[:10])
    assert worst > above, f"the loss begins at {worst:.3g}"
    return f"the loss begins at up to {worst:.3g}"


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            conv(1, 8), nn.ReLU(), nn.MaxPool2d(2), conv(8, 16), nn.ReLU(), nn.Flatten(), nn.Linear(256, 8)
        )

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        d: Tensor = (self.encoder(a) - self.encoder(b)).square().sum(1).sqrt()
        return d


@sick(
    CASES,
    "le_siamese_distance_of_a_picture_to_itself",
    ("non_finite_gradient",),
    ("encoder",),
    onset=22,
    also=("non_finite_weight", "non_finite_activation", "non_finite_loss"),
    source="https://github.com/pytorch/pytorch/issues/2421 gradient of the square root of a sum of squares at zero is NaN",
    proof=every(first_non_finite(22), finite_loss(22)),
)
def _(seed: int) -> Setup:
    model, data = Siamese(), Pictures(seed, classes=8, batch=24)

    def loss(i: int) -> Tensor:
        (a, y), (b, z) = data(), data()
        b[:12], z[:12] = a[:12] + 0.3 * b[:12], y[:12]
        if i == 22:  # the second of a pair is drawn with replacement
            b[0] = a[0]
        d, same = model(a, b), (y == z).float()
        out: Tensor = (same * d.square() + (1 - same) * F.relu(2 - d).square()).mean()
        return out

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-3), 40)


class Detector(nn.Module):
    """A small dense detector, whose prior goes into the bias of `cls`, and of the whole head by mistake."""

    def __init__(self, everywhere: bool) -> None:
        super().__init__()
        self.backbone = nn.Sequential(conv(1, 16), nn.ReLU())
        self.tower = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        self.cls = nn.Conv2d(16, 1, 1)
        for layer in [*self.tower, self.cls] if everywhere else [self.cls]:
            if isinstance(layer, nn.Conv2d) and layer.bias is not None:
                nn.init.constant_(layer.bias, -math.log(99))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.cls(self.tower(self.backbone(x)))
        return out


def focal(logit: Tensor, y: Tensor) -> Tensor:
    """The focal loss, over the number of positives."""
    p = torch.where(y > 0, logit, -logit).sigmoid()
    bce = F.binary_cross_entropy_with_logits(logit, y, reduction="none")
    return ((1 - p) ** 2 * bce).sum() / y.sum().clamp(min=1)


@sick(
    CASES,
    "le_detector_prior_bias_in_the_tower",
    ("dead_units", "poor_init"),
    ("tower",),
    also=("zero_gradient", "vanishing_gradient", "loss_plateau", "update_ratio_too_small"),
    source="https://arxiv.org/abs/1708.02002 RetinaNet, section 4.1: the prior belongs into the last layer's bias only",
    proof=every(dead_fraction("tower.1", 0.7, last=15), dead_fraction("tower.3", 0.9, last=15)),
)
def _(seed: int) -> Setup:
    model, data = Detector(everywhere=True), Scenes(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        return focal(model(x)[:, 0], (y == 1).float())

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=2e-3), 50)


class Proxies(nn.Module):
    """Proxy-NCA: a learned point for every class."""

    def __init__(self, classes: int, features: int) -> None:
        super().__init__()
        self.proxies = nn.Parameter(torch.randn(classes, features))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(10 * F.normalize(z, dim=1) @ F.normalize(self.proxies, dim=1).T, y)


@sick(
    CASES,
    "le_proxies_forgotten_by_the_optimizer",
    ("not_in_optimizer",),
    ("criterion",),
    source="https://github.com/ronghuaiyang/arcface-pytorch/issues/20 the metric's own weights must be given to the optimizer",
    proof=every(unchanged("criterion.proxies"), noted("le_proxies", "no optimizer owns the proxies", lambda n: n == [0.0])),
)
def _(seed: int) -> Setup:
    net, criterion, data = mlp(nn.ReLU, 1, 64, 16, 12), Proxies(8, 12), Blobs(seed, classes=8)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    NOTES["le_proxies"] = [float(sum(p is criterion.proxies for g in optimizer.param_groups for p in g["params"]))]

    def train() -> Iterator[Event]:
        for _ in range(60):
            x, y = data()
            loss = criterion(net(x), y)
            net.zero_grad()
            criterion.zero_grad()
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]

    return Setup({"net": net, "criterion": criterion}, train)


class TwoTasks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(conv(1, 12), nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d((1, 8)), nn.Flatten())
        self.category = nn.Linear(96, 8)
        self.brightness = nn.Sequential(nn.Linear(96, 24), nn.GELU(), nn.Linear(24, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x)
        return self.category(h), self.brightness(h)[:, 0]


@sick(
    CASES,
    "le_second_task_added_as_a_number",
    ("missing_gradient",),
    ("brightness",),
    source="https://github.com/lorenmt/auto-lambda/issues/10 the losses of two heads, of which one only is passed back",
    proof=every(
        no_gradient("brightness.0.weight", "brightness.0.bias", "brightness.2.weight", "brightness.2.bias"),
        output("brightness.2", "called in every update", lambda o: o.rms > 0),
    ),
)
def _(seed: int) -> Setup:
    model, data = TwoTasks(), Pictures(seed, batch=32)

    def loss(i: int) -> Tensor:
        x, y = data()
        category, brightness = model(x)
        second = F.mse_loss(brightness, 3 * x.mean((1, 2, 3)))
        return F.cross_entropy(category, y) + second.item()

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), 50)


class Hashing(nn.Module):
    """Binary codes, and a classifier that reads them."""

    def __init__(self, code: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 24))
        self.head = nn.Linear(24, 6)
        self.code = code

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.code(self.encoder(x)))
        return out


@sick(
    CASES,
    "le_hash_codes_by_sign",
    ("zero_gradient",),
    ("encoder",),
    also=("vanishing_gradient",),
    source="https://arxiv.org/abs/1702.00758 HashNet: the gradient of sign is zero",
    proof=every(
        zero_gradient("encoder.0.weight", "encoder.0.bias", "encoder.3.weight", "encoder.3.bias"),
        lambda plain: f"that of the head is {_positive(min(plain.grads['head.weight'])):.2g} at least",
    ),
)
def _(seed: int) -> Setup:
    model = Hashing(torch.sign)
    return fit(model, classify(model, Blobs(seed, classes=6)), torch.optim.AdamW(model.parameters(), lr=5e-3), 60)


def _positive(x: float) -> float:
    assert x > 0, f"{x} is not above zero"
    return x


class PointSets:
    """Sets of 12 points in the plane, from the cloud of a class."""

    def __init__(self, seed: int, batch: int = 32, classes: int = 4) -> None:
        self.generator = torch.Generator().manual_seed(4200 + seed)
        angle = 2 * math.pi * torch.arange(classes) / classes
        self.centres = torch.stack([angle.cos(), angle.sin()], 1)
        self.batch = batch

    def __call__(self) -> tuple[Tensor, Tensor]:
        y = torch.randint(len(self.centres), (self.batch,), generator=self.generator)
        return self.centres[y][:, None] + torch.randn(self.batch, 12, 2, generator=self.generator), y


class DeepSets(nn.Module):
    def __init__(self, act: Callable[[], nn.Module], depth: int) -> None:
        super().__init__()
        self.phi = mlp(act, depth, 32, 2, 32)
        self.rho = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.rho(self.phi(x).mean(1))
        return out


@sick(
    CASES,
    "le_set_encoder_of_sigmoids",
    ("vanishing_gradient",),
    tuple(f"phi.{i}" for i in range(12)),
    also=("loss_plateau", "update_ratio_too_small", "poor_init"),
    source="https://arxiv.org/abs/1703.06114 Deep Sets, with a deep phi of sigmoids",
    proof=every(
        gradient_ratio("phi.0.weight", "rho.weight", 1e-5, last=15),
        gradient_ratio("phi.10.weight", "rho.weight", 1e-2, last=15),
        loss_stays(0.03),
    ),
)
def _(seed: int) -> Setup:
    model = DeepSets(nn.Sigmoid, 8)
    return fit(model, classify(model, PointSets(seed)), torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), 60)


class Quantise(torch.autograd.Function):
    """Rounds to multiples of 1 / scale; the gradient should pass straight through, but the forward's scaling is left in it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return (x * scale).round() / scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.scale, None


class QuantisedReLU(nn.Module):
    def __init__(self, scale: float = 16) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Quantise.apply(F.relu(x), self.scale)  # type: ignore[no-untyped-call]
        return out


def quantised(act: Callable[[], nn.Module]) -> nn.Sequential:
    """Six layers of 48, He-initialised, with a head."""
    net = mlp(act, 6, 48, 16, 5)
    for layer in list(net)[:-1]:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return net


@sick(
    CASES,
    "le_quantiser_scales_its_gradient",
    ("exploding_gradient",),
    tuple(str(i) for i in (*range(8), 9, 11)),
    source="https://arxiv.org/abs/1308.3432 the straight-through estimator, with the scale of the grid left in the backward",
    proof=every(
        gradient_ratio("12.weight", "0.weight", 1e-5, last=15),
        gradient_ratio("8.weight", "4.weight", 1e-2, last=15),
        gradient_ratio("4.weight", "0.weight", 1e-2, last=15),
    ),
)
def _(seed: int) -> Setup:
    model = quantised(QuantisedReLU)
    return fit(model, classify(model, Blobs(seed, classes=5, batch=48)), torch.optim.Adam(model.parameters(), lr=1e-3), 60)


@sick(
    CASES,
    "le_zero_grad_of_one_optimizer_of_two",
    ("gradients_not_zeroed",),
    ("head",),
    source="https://pytorch.org/docs/stable/generated/torch.optim.Optimizer.zero_grad.html gradients add up unless they are cleared",
    proof=noted("le_two_optimizers", "what the head kept is in its next gradient", lambda n: min(n[1:15]) > 0.2 and n[14] > 3),
)
def _(seed: int) -> Setup:
    model = nn.Sequential()
    model.add_module("backbone", nn.Sequential(conv(1, 12), nn.ReLU(), nn.MaxPool2d(2), conv(12, 16), nn.ReLU(), nn.Flatten()))
    model.add_module("head", nn.Linear(256, 8))
    backbone, head = model.get_submodule("backbone"), model.head
    assert isinstance(head, nn.Linear)
    data = Pictures(seed, batch=32)
    slow = torch.optim.SGD(backbone.parameters(), lr=0.01, momentum=0.9)
    fast = torch.optim.Adam(head.parameters(), lr=2e-3)
    kept: list[float] = []
    NOTES["le_two_optimizers"] = kept

    def train() -> Iterator[Event]:
        for _ in range(60):
            x, y = data()
            slow.zero_grad()
            before = None if head.weight.grad is None else head.weight.grad.clone()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            yield "read", [loss]
            if before is not None and head.weight.grad is not None:
                fresh = head.weight.grad - before
                kept.append(float(before.norm() / fresh.norm()))
            slow.step()
            fast.step()
            yield "step", [slow, fast]

    return Setup(model, train)


class Stages(nn.Module):
    """A convolutional net in stages, for fine-tuning."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(1, 12, bias=False), nn.GroupNorm(3, 12), nn.ReLU())
        self.stage1 = nn.Sequential(conv(12, 12, bias=False), nn.GroupNorm(3, 12), nn.ReLU(), nn.MaxPool2d(2))
        self.stage2 = nn.Sequential(conv(12, 16, bias=False), nn.GroupNorm(4, 16), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(256, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.stage2(self.stage1(self.stem(x))))
        return out


@sick(
    CASES,
    "le_layerwise_rate_by_whole_division",
    ("frozen_weights",),
    ("stem", "stage1", "stage2"),
    also=("update_ratio_too_small",),
    source="https://arxiv.org/abs/1801.06146 ULMFiT: a smaller rate for every earlier layer; // makes it 0",
    proof=unchanged(*(f"{part}.{i}.weight" for part in ("stem", "stage1", "stage2") for i in (0, 1))),
)
def _(seed: int) -> Setup:
    model, rate = Stages(), 2e-3
    parts = [model.head, model.stage2, model.stage1, model.stem]
    groups = [{"params": list(p.parameters()), "lr": rate * (1 // (1 + depth))} for depth, p in enumerate(parts)]
    optimizer = torch.optim.AdamW(groups, lr=rate)
    return fit(model, classify(model, Pictures(seed, batch=24)), optimizer, 60)


@sick(
    CASES,
    "le_adam_with_the_rate_of_adadelta",
    ("update_ratio_too_large",),
    also=("loss_diverging", "loss_spike", "gradient_spike"),
    source="https://github.com/pytorch/examples/blob/main/mnist/main.py Adadelta with lr=1.0, exchanged for Adam",
    proof=every(update_ratio(above=0.3, last=5), loss_grows(5, last=15)),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(conv(1, 8), nn.LeakyReLU(0.1), conv(8, 16), nn.LeakyReLU(0.1), nn.MaxPool2d(2), nn.Flatten())
    model.append(nn.Linear(256, 8))
    return fit(
        model, classify(model, mislabelled(Pictures(seed, batch=32), 8, 0.1)), torch.optim.Adam(model.parameters(), lr=1.0), 40
    )


class UnitLength(nn.Module):
    """Embeddings of length one, without an epsilon."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.square().sum(1, keepdim=True).sqrt()


class Embedder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv(1, 16, bias=False), nn.ReLU(), nn.MaxPool2d(2), conv(16, 16, bias=False), nn.ReLU(), nn.Flatten()
        )
        self.project = nn.Linear(256, 16, bias=False)
        self.unit = UnitLength()
        self.classes = nn.Linear(16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classes(self.unit(self.project(self.features(x))))
        return 8 * out


@sick(
    CASES,
    "le_unit_length_of_a_blank_picture",
    ("non_finite_activation",),
    ("unit",),
    onset=17,
    also=("non_finite_loss", "non_finite_gradient", "non_finite_weight"),
    source="https://pytorch.org/docs/stable/generated/torch.nn.functional.normalize.html has an eps, for a vector of zeros has no direction",
    proof=every(
        first_non_finite(17, "unit"), output("project", "finite before", lambda o: o.nonfinite == 0, last=18), finite_loss(16)
    ),
)
def _(seed: int) -> Setup:
    model, data = Embedder(), Pictures(seed, batch=24)

    def loss(i: int) -> Tensor:
        x, y = data()
        if i >= 17 and i % 5 == 2:  # a black picture, as damaged files give
            x[3] = 0
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9), 40)


@sick(
    CASES,
    "le_step_schedule_by_batch",
    ("loss_plateau",),
    onset=15,
    also=("update_ratio_too_small",),
    within=100,  # what the table gives a plateau
    source="https://github.com/Lornatang/SRGAN-PyTorch/issues/1 a scheduler meant for epochs is stepped with every batch",
    proof=every(
        loss_stays(0.05, first=15),
        update_ratio(below=1e-3, first=15, last=25),
        update_ratio(below=1e-4, first=30),
        lambda plain: _apart(median(plain.losses[15:]), 0.35, median(plain.losses[:5])),
    ),
)
def _(seed: int) -> Setup:
    model, data = mlp(nn.ReLU, 2, 48, 16, 10), Blobs(seed, classes=10, batch=128)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [15, 25], gamma=0.03)

    def train() -> Iterator[Event]:
        for _ in range(200):
            x, y = data()
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            schedule.step()
            yield "step", [optimizer]

    return Setup(model, train)


def _apart(last: float, share: float, first: float) -> str:
    assert last > share * first, f"the loss is {last:.3g} of {first:.3g}"
    return f"the loss stands at {last:.3g}, from {first:.3g}"


@sick(
    CASES,
    "le_one_target_in_other_units",
    ("gradient_spike", "loss_spike"),
    onset=34,
    source="https://karpathy.github.io/2019/04/25/recipe/ become one with the data: outliers, and what is wrong in them",
    proof=every(
        gradient_spikes(34, 50),
        lambda plain: _spikes(plain.losses, 34, 1000),
    ),
)
def _(seed: int) -> Setup:
    generator = torch.Generator().manual_seed(4300 + seed)
    model = mlp(nn.SiLU, 2, 48, 10, 3)
    teacher = torch.randn(10, 3, generator=generator)

    def loss(i: int) -> Tensor:
        x = torch.randn(64, 10, generator=generator)
        y = torch.tanh(x @ teacher / 3) + 0.2 * torch.randn(64, 3, generator=generator)
        if i == 34:  # one row in thousandths of the unit of the others
            y[5] *= 1000
        return F.mse_loss(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 60)


def _spikes(losses: list[float], update: int, factor: float) -> str:
    ratio = losses[update] / median(losses[:update])
    assert ratio > factor, f"the loss is {ratio:.3g} times the median before"
    return f"the loss is {ratio:.3g} times the median before"


@sick(
    CASES,
    "le_crops_without_a_labelled_pixel",
    ("non_finite_loss",),
    onset=19,
    also=("non_finite_gradient", "non_finite_weight", "non_finite_activation"),
    source="https://github.com/pytorch/pytorch/issues/116349 the mean over pixels that are all ignored is NaN",
    proof=every(
        first_non_finite(19),
        lambda plain: _nan(plain.losses[19]),
        output("head", "finite still", lambda o: o.nonfinite == 0, last=20),
    ),
)
def _(seed: int) -> Setup:
    model, data = Segmenter(softmax=False), Scenes(seed, batch=4)

    def loss(i: int) -> Tensor:
        x, y = data()
        y[:, :2] = 255
        if i >= 19 and i % 4 == 3:  # a batch of crops from the unlabelled margin
            y[:] = 255
        return F.cross_entropy(model(x), y, ignore_index=255)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), 50)


def _nan(loss: float) -> str:
    assert math.isnan(loss), f"the loss is {loss}"
    return "the loss is NaN"


@sick(
    CASES,
    "le_tanh_codes_of_unit_weights",
    ("saturated_activation", "poor_init"),
    ("encoder",),
    source="https://proceedings.mlr.press/v9/glorot10a.html Understanding the difficulty of training deep networks: saturation",
    proof=lambda plain: _flat(plain, ("encoder.1", "encoder.3")),
)
def _(seed: int) -> Setup:
    model = TanhCodes()
    for layer in model.encoder:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight)  # std=1 is the default
            nn.init.zeros_(layer.bias)
    return fit(model, classify(model, Blobs(seed, features=32, classes=6)), torch.optim.SGD(model.parameters(), lr=0.05), 50)


class TanhCodes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(32, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh())
        self.head = nn.Linear(128, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(x))
        return out


def _flat(plain: Plain, acts: tuple[str, ...]) -> str:
    """The mean square of a tanh's output is above 0.85, so that the mean derivative, 1 - tanh^2, is below 0.15."""
    for act in acts:
        for o in plain.outputs[act][:15]:
            assert o is not None
            assert o.rms**2 > 0.85, f"mean derivative {1 - o.rms**2:.3g} of {act}"
    o = plain.outputs[acts[0]][0]
    assert o is not None
    return f"mean derivative {1 - o.rms**2:.3g} of {acts[0]}"


# Healthy runs.


def quality(name: str, what: str, above: float) -> Proof:
    """The last number that the loop wrote down is above this."""

    def proof(plain: Plain) -> str:
        assert NOTES[name][-1] > above, f"{what}: {NOTES[name][-1]:.3g}, not above {above}"
        return f"{what}: {NOTES[name][-1]:.3g}"

    return proof


@healthy(
    CASES,
    "le_linear_probe_from_zero",
    source="https://arxiv.org/abs/1603.08511 a linear classifier on frozen features, as self-supervised encoders are judged",
    proof=every(converges(0.45), no_gradient("stem.0.weight", "stage2.0.weight"), output("stem", "called", lambda o: o.rms > 0)),
)
def _(seed: int) -> Setup:
    model, data = Stages(), Pictures(seed, batch=32)
    learn = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(25):  # where the features come from
        learn.zero_grad()
        x, y = data()
        F.cross_entropy(model(x)[:, :4], y % 4).backward()
        learn.step()
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)
    model.head = nn.Linear(256, 8)
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.01, momentum=0.9)
    return fit(model, classify(model, mislabelled(data, 8, 0.1)), optimizer, 120)


class ScaledBlock(nn.Module):
    """A residual block with LayerScale and stochastic depth."""

    def __init__(self, width: int, drop: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 1e-4))
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        if self.training and float(torch.rand(())) < self.drop:
            return x
        out: Tensor = x + self.gamma * self.down(F.gelu(self.up(self.norm(x)))) / (1 - self.drop)
        return out


@healthy(
    CASES,
    "le_layerscale_and_stochastic_depth",
    source="https://arxiv.org/abs/2103.17239 CaiT: LayerScale from 1e-4, with stochastic depth (https://arxiv.org/abs/1603.09382)",
    proof=every(converges(0.45), gradient_ratio("2.up.weight", "0.weight", 1e-2, last=5)),
)
def _(seed: int) -> Setup:
    blocks = [ScaledBlock(32, 0.05 * i) for i in range(1, 7)]
    model = nn.Sequential(nn.Linear(16, 32), *blocks, nn.LayerNorm(32), nn.Linear(32, 6))
    data = mislabelled(Blobs(seed, classes=6), 6, 0.1)
    return fit(model, classify(model, data), torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05), 200)


@healthy(
    CASES,
    "le_rare_findings_of_many_kinds",
    source="https://arxiv.org/abs/1705.02315 ChestX-ray8: many labels for a picture, each of them rare",
    proof=every(converges(0.4), output("3", "logits far below zero nearly everywhere", lambda o: o.rms > 2.5)),
)
def _(seed: int) -> Setup:
    generator = torch.Generator().manual_seed(4400 + seed)
    directions = F.normalize(torch.randn(20, 12, generator=generator), dim=0)
    model = nn.Sequential(nn.Linear(20, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 12))
    head = model[3]
    assert isinstance(head, nn.Linear)
    nn.init.constant_(head.bias, -4.0)

    def loss(i: int) -> Tensor:
        x = torch.randn(96, 20, generator=generator)
        return F.binary_cross_entropy_with_logits(model(x), (x @ directions > 2.05).float())  # 2 of 100

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01), 300)


@healthy(
    CASES,
    "le_smoothed_labels_at_their_floor",
    source="https://arxiv.org/abs/1906.02629 When does label smoothing help: the loss has a floor above zero",
    proof=every(
        converges(0.93),
        loss_stays(0.06, first=130),
        floor(0.8),
        lambda plain: _near_floor(plain, 0.2, 8),
    ),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(
        conv(1, 16, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        conv(16, 16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 8),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    return fit(model, classify(model, Pictures(seed, batch=24), label_smoothing=0.2), optimizer, 240)


def _near_floor(plain: Plain, smoothing: float, classes: int) -> str:
    """The least that the loss can be is the entropy of the smoothed label."""
    rest = smoothing / classes
    top = 1 - smoothing + rest
    least = -top * math.log(top) - (classes - 1) * rest * math.log(rest)
    last = median(plain.losses[-20:])
    assert last < 1.1 * least, f"the loss ends at {last:.4g}, the floor is {least:.4g}"
    return f"the loss ends at {last:.4g}, its floor is {least:.4g}"


class SimSiam(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(24, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32), nn.BatchNorm1d(32, affine=False)
        )
        self.predictor = nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encoder(x)
        return z, self.predictor(z)


def spread_of(z: Tensor) -> float:
    """Of embeddings on the sphere: 1 where they are spread evenly, 0 where they have collapsed."""
    return float(F.normalize(z.detach(), dim=1).std(0).mean()) * math.sqrt(z.shape[1])


@healthy(
    CASES,
    "le_simsiam_with_stopped_gradient",
    source="https://arxiv.org/abs/2011.10566 SimSiam: the loss is a negative cosine, and one side gets no gradient",
    proof=every(
        quality("le_simsiam", "spread of the embeddings at the end", 0.6),
        lambda plain: _falls_below(plain, -0.75),
    ),
)
def _(seed: int) -> Setup:
    model, data = SimSiam(), Blobs(seed, features=24, classes=12, batch=64, spread=0.4)
    spread: list[float] = []
    NOTES["le_simsiam"] = spread

    def loss(i: int) -> Tensor:
        x, _ = data()
        (z1, p1), (z2, p2) = (model(x + 0.3 * torch.randn(x.shape, generator=data.generator)) for _ in range(2))
        spread.append(spread_of(z1))
        return -(F.cosine_similarity(p1, z2.detach()).mean() + F.cosine_similarity(p2, z1.detach()).mean()) / 2

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4), 200)


def _falls_below(plain: Plain, to: float) -> str:
    first, last = plain.losses[0], median(plain.losses[-20:])
    assert last < to < first, f"the loss goes from {first:.3g} to {last:.3g}, not below {to}"
    return f"the loss falls from {first:.3g} to {last:.3g}"


class MomentumContrast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = mlp(nn.ReLU, 1, 64, 24, 16)
        self.key = mlp(nn.ReLU, 1, 64, 24, 16)
        self.key.load_state_dict(self.query.state_dict())
        self.key.requires_grad_(False)
        self.queue: Tensor
        self.register_buffer("queue", F.normalize(torch.randn(256, 16), dim=1))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        q = F.normalize(self.query(a), dim=1)
        with torch.no_grad():
            for k, p in zip(self.key.parameters(), self.query.parameters(), strict=True):
                k.lerp_(p, 0.02)
            key = F.normalize(self.key(b), dim=1)
        logits = torch.cat([(q * key).sum(1, keepdim=True), q @ self.queue.T], 1) / 0.1
        self.queue = torch.cat([key, self.queue])[:256]
        return F.cross_entropy(logits, torch.zeros(len(a), dtype=torch.long))


@healthy(
    CASES,
    "le_momentum_contrast",
    source="https://arxiv.org/abs/1911.05722 MoCo: a key encoder that follows by momentum, and a queue",
    proof=every(converges(0.7), no_gradient("key.0.weight", "key.2.weight")),
)
def _(seed: int) -> Setup:
    model = MomentumContrast()
    generator = torch.Generator().manual_seed(4500 + seed)
    mix = torch.randn(8, 24, generator=generator) / math.sqrt(8)
    with torch.no_grad():  # the queue begins with keys of true samples
        model.queue = F.normalize(model.key(torch.randn(256, 8, generator=generator) @ mix), dim=1)

    def loss(i: int) -> Tensor:
        x = torch.randn(32, 8, generator=generator) @ mix
        a, b = (x + 0.3 * torch.randn(x.shape, generator=generator) for _ in range(2))
        out: Tensor = model(a, b)
        return out

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9, weight_decay=1e-4)
    return fit(model, loss, optimizer, 250)


class TwoTowers(nn.Module):
    """CLIP, of pictures and rows of words' counts, with a learned temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.picture = nn.Sequential(conv(1, 12), nn.GELU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(192, 24))
        self.words = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 24))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        a, b = F.normalize(self.picture(x), dim=1), F.normalize(self.words(w), dim=1)
        return self.logit_scale.exp().clamp(max=100) * a @ b.T


@healthy(
    CASES,
    "le_two_towers_with_learned_temperature",
    source="https://arxiv.org/abs/2103.00020 CLIP: the temperature is learned, warm-up from 0, weight decay 0.2",
    proof=converges(0.45),
)
def _(seed: int) -> Setup:
    model, data = TwoTowers(), Pictures(seed, batch=8)
    order = torch.Generator().manual_seed(4600 + seed)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.2}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.98), eps=1e-6)

    def before(i: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, i / 15)

    def loss(i: int) -> Tensor:
        y = torch.randperm(8, generator=order)  # one of each kind
        x = 0.9 * torch.randn(8, 1, 8, 8, generator=data.generator)
        x[torch.arange(8), :, :, y] += 1.5
        w = F.one_hot(y, 8) + 0.4 * torch.randn(8, 8, generator=data.generator)
        logits = model(x, w.float())
        target = torch.arange(8)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    return fit(model, loss, optimizer, 200, before)


@healthy(
    CASES,
    "le_autoencoder_of_summed_squares",
    source="https://github.com/pytorch/examples/blob/main/vae/main.py a loss that is summed over pixels and pictures",
    proof=every(converges(0.3), lambda plain: _large(plain, 300.0)),
)
def _(seed: int) -> Setup:
    generator = torch.Generator().manual_seed(4700 + seed)
    mix = torch.randn(6, 40, generator=generator) / math.sqrt(6)
    model = mlp(nn.ELU, 3, 24, 40, 40)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)

    def loss(i: int) -> Tensor:
        x = torch.randn(128, 6, generator=generator) @ mix
        noisy = x + 0.2 * torch.randn(x.shape, generator=generator)
        return F.mse_loss(model(noisy), x, reduction="sum")

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=4e-5, momentum=0.9), 300)


def _large(plain: Plain, above: float) -> str:
    norm = median(math.sqrt(sum(g[i] ** 2 for g in plain.grads.values())) for i in range(20))
    assert norm > above, f"the gradient is {norm:.3g} in the beginning"
    return f"the gradient is {norm:.3g} in the beginning"


@healthy(
    CASES,
    "le_loss_scaled_by_hand",
    source="https://arxiv.org/abs/1710.03740 Mixed precision training: a constant loss scale, taken out again before the step",
    proof=every(converges(0.45), lambda plain: _large(plain, 1000.0)),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(
        conv(1, 12, bias=False), nn.BatchNorm2d(12), nn.ReLU(), conv(12, 12, bias=False), nn.BatchNorm2d(12), nn.ReLU()
    )
    model.extend([nn.AdaptiveAvgPool2d((1, 8)), nn.Flatten(), nn.Linear(96, 8)])

    def unscale(i: int) -> None:
        for p in model.parameters():
            if p.grad is not None:
                p.grad /= 4096

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    return fit(model, classify(model, mislabelled(Pictures(seed, batch=32), 8, 0.1), scale=4096), optimizer, 100, between=unscale)


@healthy(
    CASES,
    "le_loss_of_a_millionth",
    source="https://arxiv.org/abs/1412.6980 Adam, whose steps do not depend on the scale of the loss",
    proof=every(
        converges(0.2),
        lambda plain: _tiny(plain, 3e-6),
    ),
)
def _(seed: int) -> Setup:
    generator = torch.Generator().manual_seed(4800 + seed)
    model = mlp(nn.GELU, 2, 48, 8, 1)
    w = torch.randn(8, generator=generator)

    def loss(i: int) -> Tensor:  # the weight that this term has in a larger objective
        x = torch.randn(64, 8, generator=generator)
        y = torch.sin(x @ w / 2) + 0.5 * x[:, 0] + 0.15 * torch.randn(64, generator=generator)
        return 1e-6 * F.mse_loss(model(x)[:, 0], y)

    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, eps=1e-16)
    return fit(model, loss, optimizer, 300)


def _tiny(plain: Plain, below: float) -> str:
    norm = max(math.sqrt(sum(g[i] ** 2 for g in plain.grads.values())) for i in range(len(plain.losses)))
    assert norm < below, f"the gradient reaches {norm:.3g}"
    return f"the gradient is never above {norm:.3g}"


@healthy(
    CASES,
    "le_plain_net_of_24_layers",
    source="https://arxiv.org/abs/1706.02515 Self-normalizing networks: SELU with LeCun's initialisation, without residuals",
    proof=converges(0.7),
)
def _(seed: int) -> Setup:
    model = mlp(nn.SELU, 24, 32, 16, 4)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)
    data = Blobs(seed, spread=0.8)
    mean, deviation = data.centres.mean(0), math.sqrt(float(data.centres.var()) + 0.64)
    batch = mislabelled(data, 4, 0.1)

    def loss(i: int) -> Tensor:
        x, y = batch()
        return F.cross_entropy(model((x - mean) / deviation), y)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.01), 150)


@healthy(
    CASES,
    "le_warm_restarts_after_warm_up",
    source="https://arxiv.org/abs/1608.03983 SGDR: the rate falls along a cosine and restarts, after a warm-up from 0",
    proof=converges(0.6),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(conv(1, 12), nn.ReLU(), nn.MaxPool2d(2), conv(12, 16), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2))
    model.append(nn.Linear(256, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)

    def before(i: int) -> None:
        rate = i / 12 if i < 12 else 0.5 * (1 + math.cos(math.pi * ((i - 12) % 60) / 60))
        for group in optimizer.param_groups:
            group["lr"] = 0.03 * rate

    return fit(model, classify(model, mislabelled(Pictures(seed, batch=32), 8, 0.1)), optimizer, 250, before)


@healthy(
    CASES,
    "le_mixup_with_heavy_decay",
    source="https://arxiv.org/abs/1710.09412 mixup, with AdamW and a weight decay of 0.3",
    proof=every(quality("le_mixup", "share of right answers on plain pictures", 0.9), converges(0.75)),
)
def _(seed: int) -> Setup:
    model, data = Stages(), Pictures(seed, batch=32)
    mixing = torch.distributions.Beta(torch.tensor(1.0), torch.tensor(1.0))
    right: list[float] = []
    NOTES["le_mixup"] = right

    def loss(i: int) -> Tensor:
        x, y = data()
        share, other = float(mixing.sample()), torch.randperm(len(x), generator=data.generator)
        out = model(share * x + (1 - share) * x[other])
        return share * F.cross_entropy(out, y) + (1 - share) * F.cross_entropy(out, y[other])

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.3)
    run = fit(model, loss, optimizer, 200)

    def train() -> Iterator[Event]:
        yield from run.train()
        model.eval()
        with torch.no_grad():
            x, y = data()
            right.append(float((model(x).argmax(1) == y).float().mean()))

    return Setup(model, train)


@healthy(
    CASES,
    "le_clipped_in_every_update",
    source="https://arxiv.org/abs/1905.11881 Why gradient clipping accelerates training: clipped gradient descent, always at its bound",
    proof=every(converges(0.3), noted("le_clipped", "the gradient is above the bound in every update", lambda n: min(n) > 0.02)),
)
def _(seed: int) -> Setup:
    generator = torch.Generator().manual_seed(4900 + seed)
    model = nn.Sequential(nn.Linear(12, 64), nn.LayerNorm(64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))
    w = torch.randn(12, generator=generator)
    norms: list[float] = []
    NOTES["le_clipped"] = norms

    def loss(i: int) -> Tensor:  # a noise with heavy tails
        x = torch.randn(32, 12, generator=generator)
        noise = 0.1 * torch.randn(32, generator=generator) / torch.rand(32, generator=generator).clamp(min=0.05)
        return F.huber_loss(model(x)[:, 0], x @ w / 2 + noise)

    def clip(i: int) -> None:
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.02)))

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9), 200, between=clip)


@healthy(
    CASES,
    "le_sparse_code_without_dead_units",
    source="https://proceedings.mlr.press/v15/glorot11a.html Deep sparse rectifier networks: 70 to 85 % of the units are at zero",
    proof=every(
        converges(0.5),
        output("encoder.1", "more than 65 % zeros", lambda o: o.zeros > 0.65, first=60),
        lambda plain: _alive(plain, "encoder.1"),
    ),
)
def _(seed: int) -> Setup:
    generator = torch.Generator().manual_seed(5000 + seed)
    atoms = F.normalize(torch.randn(48, 24, generator=generator), dim=1)
    model = nn.Sequential()
    model.add_module("encoder", nn.Sequential(nn.Linear(24, 64), nn.ReLU()))
    model.add_module("decoder", nn.Linear(64, 24))
    with torch.no_grad():
        model.get_parameter("encoder.0.weight").copy_(F.normalize(torch.randn(64, 24), dim=1))
        model.get_parameter("encoder.0.bias").fill_(-0.1)
        model.get_parameter("decoder.weight").copy_(model.get_parameter("encoder.0.weight").T)

    def loss(i: int) -> Tensor:
        on = torch.rand(128, 48, generator=generator) < 0.08
        x = (on * (0.5 + torch.rand(128, 48, generator=generator))) @ atoms
        code: Tensor = model.get_submodule("encoder")(x)
        error: Tensor = (model.get_submodule("decoder")(code) - x).square().sum(1).mean()
        return error + 0.15 * code.abs().sum(1).mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-3), 250)


def _alive(plain: Plain, module: str) -> str:
    """In every ten updates every unit fires."""
    seen = [o.fired for o in plain.outputs[module] if o is not None]
    for i in range(0, len(seen) - 9, 10):
        dead = int((~torch.stack(seen[i : i + 10]).any(0)).sum())
        assert dead == 0, f"{dead} units of {module} are silent from update {i}"
    return f"every unit of {module} fires"


class GraphConvolutions(nn.Module):
    def __init__(self, adjacency: Tensor) -> None:
        super().__init__()
        degree = adjacency.sum(1).rsqrt()
        self.adjacency: Tensor
        self.register_buffer("adjacency", degree[:, None] * adjacency * degree)
        self.first = nn.Linear(32, 16)
        self.second = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.adjacency @ self.first(F.dropout(x, 0.5, self.training)))
        out: Tensor = self.adjacency @ self.second(F.dropout(h, 0.5, self.training))
        return out


@healthy(
    CASES,
    "le_graph_with_five_labels_a_class",
    source="https://arxiv.org/abs/1609.02907 Graph convolutional networks: one graph, few labels, dropout of the input, weight decay",
    proof=every(converges(0.5), quality("le_graph", "share of right answers on the nodes without label", 0.85)),
)
def _(seed: int) -> Setup:
    generator = torch.Generator().manual_seed(5100 + seed)
    y = torch.arange(120) % 4
    link = torch.where(y[:, None] == y, 0.2, 0.01)
    edges = (torch.rand(120, 120, generator=generator) < link).float().triu(1)
    x = torch.randn(4, 32, generator=generator)[y] + 1.5 * torch.randn(120, 32, generator=generator)
    labels = y[:20].clone()
    labels[7] = 0  # one of them is wrong
    model = GraphConvolutions(edges + edges.T + torch.eye(120))
    right: list[float] = []
    NOTES["le_graph"] = right
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=5e-3)
    run = fit(model, lambda i: F.cross_entropy(model(x)[:20], labels), optimizer, 150)

    def train() -> Iterator[Event]:
        yield from run.train()
        model.eval()
        with torch.no_grad():
            right.append(float((model(x)[20:].argmax(1) == y[20:]).float().mean()))

    return Setup(model, train)


@healthy(
    CASES,
    "le_regression_to_the_last_digit",
    source="https://arxiv.org/abs/1312.6120 deep linear networks, which reach their target: loss and gradient end near 0",
    proof=every(converges(1e-4), lambda plain: _ends_small(plain, 1e-2)),
)
def _(seed: int) -> Setup:
    generator = torch.Generator().manual_seed(5200 + seed)
    teacher = torch.randn(12, 5, generator=generator) / math.sqrt(12)
    model = nn.Sequential(nn.Linear(12, 32, bias=False), nn.Linear(32, 32, bias=False), nn.Linear(32, 5, bias=False))
    for layer in model:
        assert isinstance(layer, nn.Linear)
        nn.init.orthogonal_(layer.weight)

    def loss(i: int) -> Tensor:
        x = torch.randn(128, 12, generator=generator)
        return F.mse_loss(model(x), x @ teacher)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.8), 300)


def _ends_small(plain: Plain, share: float) -> str:
    total = [math.sqrt(sum(g[i] ** 2 for g in plain.grads.values())) for i in (0, len(plain.losses) - 1)]
    assert total[1] < share * total[0], f"the gradient goes from {total[0]:.3g} to {total[1]:.3g}"
    return f"the gradient falls from {total[0]:.3g} to {total[1]:.3g}"


@healthy(
    CASES,
    "le_tasks_weighed_by_learned_variances",
    source="https://arxiv.org/abs/1705.07115 Multi-task learning using uncertainty to weigh losses: the loss falls below zero",
    proof=every(
        lambda plain: _falls_below(plain, -0.5),
        quality("le_weighed", "fall of the error of the first task to the last", 3.0),
    ),
)
def _(seed: int) -> Setup:
    model, generator = Weighed(), torch.Generator().manual_seed(5300 + seed)
    w = torch.randn(10, 2, generator=generator) / 2
    fall: list[float] = []
    NOTES["le_weighed"] = fall
    first: list[float] = []

    def loss(i: int) -> Tensor:
        x = torch.randn(64, 10, generator=generator)
        a, b = model(x)
        noise = torch.randn(64, 2, generator=generator)
        one = F.mse_loss(a[:, 0], torch.tanh(x @ w[:, 0]) + 0.1 * noise[:, 0])
        two = F.mse_loss(b[:, 0], x @ w[:, 1] + 0.4 * noise[:, 1])
        first.append(one.item() + two.item())
        fall.append(median(first[:5]) / median(first[-10:]))
        s = model.log_variance
        return ((-s).exp() * torch.stack([one, two]) + s).sum() / 2

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 300)


class Weighed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(10, 48), nn.Mish(), nn.Linear(48, 48), nn.Mish())
        self.one, self.two = nn.Linear(48, 1), nn.Linear(48, 1)
        self.log_variance = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x)
        return self.one(h), self.two(h)
