"""Runs of computer vision at small size: pictures of discs and gratings, 8 to 16 pixels wide."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.zoo.case import Case, Event, Setup, fit, healthy, sick
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


class Gratings:
    """Stripes of an orientation that is the class, at a random phase, in noise: mean 0, deviation about 1."""

    def __init__(self, seed: int, classes: int = 6, batch: int = 24, size: int = 16, channels: int = 3, noise: float = 0.5) -> None:
        self.generator = torch.Generator().manual_seed(4000 + seed)
        self.classes, self.batch, self.size, self.channels, self.noise = classes, batch, size, channels, noise

    def __call__(self) -> tuple[Tensor, Tensor]:
        g, n = self.generator, self.batch
        y = torch.randint(self.classes, (n,), generator=g)
        return self.draw(y), y

    def draw(self, y: Tensor) -> Tensor:
        """Pictures of these classes, each with a phase and a noise of its own."""
        g, n, s = self.generator, len(y), self.size
        angle = math.pi * y / self.classes
        line = torch.linspace(-1, 1, s)
        phase = 2 * math.pi * torch.rand(n, 1, 1, generator=g)
        wave = 6 * (angle.cos()[:, None, None] * line[None, None, :] + angle.sin()[:, None, None] * line[None, :, None])
        clean = 1.2 * torch.sin(wave + phase)[:, None].expand(n, self.channels, s, s)
        return clean + self.noise * torch.randn(n, self.channels, s, s, generator=g)


class Discs:
    """A bright disc in noise: (pictures, masks, box), the box being the centre (x, y) and the radius, all within -1 to 1."""

    def __init__(self, seed: int, batch: int = 16, size: int = 16, channels: int = 1, noise: float = 0.3) -> None:
        self.generator = torch.Generator().manual_seed(5000 + seed)
        self.batch, self.size, self.channels, self.noise = batch, size, channels, noise

    def __call__(self) -> tuple[Tensor, Tensor, Tensor]:
        g, n, s = self.generator, self.batch, self.size
        centre = 1.2 * torch.rand(n, 2, generator=g) - 0.6
        radius = 0.25 + 0.3 * torch.rand(n, 1, generator=g)
        line = torch.linspace(-1, 1, s)
        far = (line[None, None, :] - centre[:, :1, None]) ** 2 + (line[None, :, None] - centre[:, 1:, None]) ** 2
        mask = (far < radius[:, :, None] ** 2).float()[:, None]
        noise = torch.randn(n, self.channels, s, s, generator=g)
        return 2 * mask - 0.3 + self.noise * noise, mask, torch.cat([centre, radius], 1)


def unit(inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, batch normalisation, ReLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, groups=groups, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def pooled() -> nn.Sequential:
    """Global average of every channel."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Net(nn.Module):
    """Three units, a global average and a linear head."""

    def __init__(self, channels: int = 3, classes: int = 6, width: int = 12) -> None:
        super().__init__()
        self.stage1, self.stage2 = unit(channels, width), unit(width, 2 * width, 2)
        self.stage3 = unit(2 * width, 2 * width, 2)
        self.pool = pooled()
        self.fc = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.pool(self.stage3(self.stage2(self.stage1(x)))))
        return out


class UNet(nn.Module):
    """Two levels down, two up, with skips."""

    def __init__(self, channels: int = 1, outputs: int = 1, width: int = 8) -> None:
        super().__init__()
        self.enter = unit(channels, width)
        self.down1, self.down2 = unit(width, 2 * width, 2), unit(2 * width, 2 * width, 2)
        self.up = nn.Upsample(scale_factor=2)
        self.merge1, self.merge2 = unit(4 * width, width), unit(2 * width, width)
        self.head = nn.Conv2d(width, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.enter(x)
        b = self.down1(a)
        c = self.down2(b)
        d = self.merge1(torch.cat([self.up(c), b], 1))
        out: Tensor = self.head(self.merge2(torch.cat([self.up(d), a], 1)))
        return out


class Block(nn.Module):
    """A pre-norm transformer block; `scale` is the first value of its LayerScale, None for none."""

    def __init__(self, dim: int, scale: float | None = None) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.scale1 = nn.Parameter(torch.full((dim,), scale)) if scale is not None else None
        self.scale2 = nn.Parameter(torch.full((dim,), scale)) if scale is not None else None

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm1(x)
        a = self.attention(n, n, n, need_weights=False)[0]
        x = x + (a if self.scale1 is None else self.scale1 * a)
        m = self.mlp(self.norm2(x))
        out: Tensor = x + (m if self.scale2 is None else self.scale2 * m)
        return out


class Embed(nn.Module):
    """Patches of 4 x 4 and learned positions."""

    def __init__(self, channels: int, dim: int, tokens: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(channels, dim, 4, 4)
        self.position = nn.Parameter(0.02 * torch.randn(1, tokens, dim))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.patch(x).flatten(2).transpose(1, 2) + self.position
        return out


class ViT(nn.Module):
    """A vision transformer that averages its tokens."""

    def __init__(self, dim: int = 32, depth: int = 4, classes: int = 6, scale: float | None = None) -> None:
        super().__init__()
        self.embed = Embed(3, dim, 16)
        self.blocks = nn.Sequential(*(Block(dim, scale) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.blocks(self.embed(x))).mean(1))
        return out


def dice(probability: Tensor, mask: Tensor) -> Tensor:
    """Soft Dice loss of a batch."""
    both = (probability * mask).sum()
    return 1 - (2 * both + 1) / (probability.sum() + mask.sum() + 1)


def labelled(model: nn.Module, data: Callable[[], tuple[Tensor, Tensor]], **options: Any) -> Callable[[int], Tensor]:
    """Cross-entropy on a fresh batch."""

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y, **options)

    return loss


def recorded(name: str, what: Callable[[list[Any]], str]) -> Callable[[Plain], str]:
    """A proof from what the loop wrote down in a list that is the attribute `name` of the model (of its "student", of a mapping)."""

    def proof(plain: Plain) -> str:
        model = plain.setup.model
        module = model if isinstance(model, nn.Module) else model["student"]
        return what(vars(module)[name])

    return proof


# Sick runs: what the optimizer does not know, and what no backward pass reaches.


class ListDecoder(nn.Module):
    """An encoder and a decoder whose layers are in a plain list: parameters() misses them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(unit(1, 8), unit(8, 16, 2))
        self.decoder = [nn.ConvTranspose2d(16, 8, 2, 2), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)]
        self.head = nn.Conv2d(8, 1, 1)
        self.first = [layer.weight.detach().clone() for layer in self.decoder]

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        for layer in self.decoder:
            x = F.relu(layer(x))
        out: Tensor = self.head(x)
        return out


def _list_is_unknown(plain: Plain) -> str:
    model: Any = plain.setup.model
    registered = {id(p) for p in model.parameters()}
    for layer, first in zip(model.decoder, model.first, strict=True):
        assert id(layer.weight) not in registered, "it is registered"
        assert layer.weight.grad is not None, "no gradient"
        assert float(layer.weight.grad.norm()) > 0, "no gradient"
        assert torch.equal(layer.weight, first), "it moved"
    return "the layers of decoder have gradients, stay as they were, and parameters() doesn't give them"


@sick(
    CASES,
    "sc_decoder_in_a_plain_list",
    ("not_in_optimizer",),
    source="https://www.engineermaxxing.com/micro/lessons/pytorch-internals.html layers in a plain list instead of a ModuleList",
    proof=every(_list_is_unknown, update_ratio(above=1e-3)),
)
def _(seed: int) -> Setup:
    data, model = Discs(seed), ListDecoder()

    def loss(i: int) -> Tensor:
        x, mask, _ = data()
        for layer in model.decoder:
            layer.zero_grad()  # nobody clears them else, and they'd only pile up
        return F.binary_cross_entropy_with_logits(model(x), mask)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), 3e-3), 40)


@sick(
    CASES,
    "sc_new_head_after_the_optimizer",
    ("not_in_optimizer",),
    ("fc",),
    source="https://github.com/zjunlp/HVPNeT/issues/5 crf and fc are never appended to the optimizer's parameters",
    proof=every(unchanged("fc.weight", "fc.bias"), update_ratio(above=1e-3)),
)
def _(seed: int) -> Setup:
    data, model = Gratings(seed), Net(classes=10)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    model.fc = nn.Linear(24, 6)  # the head for the new classes comes too late
    return fit(model, labelled(model, data), optimizer, 40, before=lambda i: model.zero_grad())


class AuxNet(Net):
    """With a second classifier in the middle, as in GoogLeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.aux: nn.Module | None = nn.Sequential(nn.Conv2d(24, 16, 1), nn.ReLU(), pooled(), nn.Linear(16, 6))

    def both(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        h = self.stage2(self.stage1(x))
        return self.fc(self.pool(self.stage3(h))), None if self.aux is None else self.aux(h)

    def forward(self, x: Tensor) -> Any:
        return self.both(x)


@sick(
    CASES,
    "sc_auxiliary_loss_left_out",
    ("missing_gradient",),
    ("aux",),
    source="https://github.com/open-mmlab/mmcv/issues/877 the auxiliary head is configured and its loss is not used",
    proof=every(no_gradient("aux.0.weight", "aux.0.bias", "aux.3.weight", "aux.3.bias"), converges(0.8)),
)
def _(seed: int) -> Setup:
    data, model = Gratings(seed, batch=32), AuxNet()

    def loss(i: int) -> Tensor:
        x, y = data()
        out, _aux = model(x)
        return F.cross_entropy(out, y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 2e-3), 50)


class Keypoint(nn.Module):
    """Centre and radius of the disc, from features."""

    def __init__(self, cut: bool) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.GELU(), nn.Conv2d(8, 16, 3, 2, 1), nn.GELU(), nn.Flatten())
        self.regressor = nn.Sequential(nn.Linear(256, 32), nn.GELU(), nn.Linear(32, 3))
        self.cut = cut

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(not self.cut):
            features = self.encoder(x)
        out: Tensor = self.regressor(features)
        return out


@sick(
    CASES,
    "sc_keypoint_encoder_under_no_grad",
    ("missing_gradient",),
    ("encoder",),
    source="https://pytorch.org/docs/stable/notes/autograd.html no-grad mode: nothing inside is recorded for backward",
    proof=every(no_gradient("encoder.0.weight", "encoder.2.weight", "encoder.2.bias"), converges(0.5)),
)
def _(seed: int) -> Setup:
    data, model = Discs(seed, batch=24), Keypoint(cut=True)

    def loss(i: int) -> Tensor:
        x, _, box = data()
        return F.smooth_l1_loss(model(x), box)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), 2e-3), 60)


class Squeeze(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(pooled(), nn.Linear(width, width // 4), nn.ReLU(), nn.Linear(width // 4, width), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x * self.gate(x)[:, :, None, None]
        return out


class Forgetful(Net):
    """Its attention is made, and forward() never calls it."""

    def __init__(self) -> None:
        super().__init__(channels=1)
        self.attention = Squeeze(24)


@sick(
    CASES,
    "sc_attention_never_called",
    ("missing_gradient",),
    ("attention",),
    source="https://github.com/MIC-DKFZ/nnUNet/issues/2571 the module has parameters that were not used in producing loss",
    proof=every(no_gradient("attention.gate.1.weight", "attention.gate.3.weight"), converges(0.8)),
)
def _(seed: int) -> Setup:
    data, model = Gratings(seed, channels=1, classes=4), Forgetful()
    model.fc = nn.Linear(24, 4)
    return fit(model, labelled(model, data), torch.optim.RMSprop(model.parameters(), 1e-3), 60)


# Sick runs: gradients that are exactly zero.


@sick(
    CASES,
    "sc_softmax_over_one_channel",
    ("zero_gradient",),
    ("",),
    source="https://pytorch.org/docs/stable/generated/torch.nn.Softmax.html over dim=1 of one channel every output is 1",
    proof=every(zero_gradient("enter.0.weight", "merge2.0.weight", "head.weight", "head.bias"), loss_stays(0.1)),
    also=("loss_plateau", "update_ratio_too_small", "vanishing_gradient"),
)
def _(seed: int) -> Setup:
    data, model = Discs(seed), UNet()

    def loss(i: int) -> Tensor:
        x, mask, _ = data()
        return dice(torch.softmax(model(x), 1), mask)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 5e-3), 40)


class Hash(nn.Module):
    """Binary codes of pictures, and a classifier on the codes."""

    def __init__(self, straight: bool) -> None:
        super().__init__()
        self.encoder = nn.Sequential(unit(3, 12, 2), unit(12, 24, 2), pooled(), nn.Linear(24, 32))
        self.classifier = nn.Linear(32, 6)
        self.straight = straight

    def forward(self, x: Tensor) -> Tensor:
        z = self.encoder(x)
        code = torch.sign(z)
        if self.straight:
            code = z.clamp(-1, 1) + (code - z.clamp(-1, 1)).detach()
        out: Tensor = self.classifier(code)
        return out


@sick(
    CASES,
    "sc_hash_code_by_sign",
    ("zero_gradient",),
    ("encoder",),
    source="https://arxiv.org/abs/1308.3432 a hard threshold has the derivative 0; the straight-through estimator was left out",
    proof=every(
        zero_gradient("encoder.0.0.weight", "encoder.1.0.weight", "encoder.3.weight"),
        gradient_ratio("encoder.3.weight", "classifier.weight", 1e-9),
    ),
    also=("vanishing_gradient",),
)
def _(seed: int) -> Setup:
    data, model = Gratings(seed, batch=32), Hash(straight=False)
    return fit(model, labelled(model, data), torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), 40)


class Field(nn.Module):
    """A radiance field: density through ReLU, colour through sigmoid, of encoded places on a ray."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.density, self.density_act = nn.Linear(32, 1), nn.ReLU()
        self.colour = nn.Sequential(nn.Linear(32, 3), nn.Sigmoid())
        nn.init.constant_(self.density.bias, bias)

    def forward(self, places: Tensor) -> Tensor:
        code = torch.cat([f(2.0**k * places) for k in range(2) for f in (torch.sin, torch.cos)], -1)
        h = self.trunk(code)
        alpha = 1 - torch.exp(-0.5 * self.density_act(self.density(h)))
        through = torch.cumprod(torch.cat([torch.ones_like(alpha[:, :1]), 1 - alpha[:, :-1]], 1), 1)
        out: Tensor = (alpha * through * self.colour(h)).sum(1)
        return out


def rays(seed: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """Places on rays along z through a ball of radius 1, and the colours seen."""
    generator = torch.Generator().manual_seed(6000 + seed)

    def draw() -> tuple[Tensor, Tensor]:
        start = 3 * torch.rand(64, 2, generator=generator) - 1.5
        z = torch.linspace(-1.5, 1.5, 12)
        places = torch.cat([start[:, None].expand(64, 12, 2), z[None, :, None].expand(64, 12, 1)], -1)
        inside = (start.square().sum(1, keepdim=True) < 1).float()
        return places, inside * torch.cat([0.5 + 0.4 * start[:, :1], 0.5 + 0.3 * start[:, 1:], torch.full((64, 1), 0.8)], 1)

    return draw


@sick(
    CASES,
    "sc_nerf_density_negative_everywhere",
    ("dead_units", "zero_gradient"),
    ("density", "density_act", "trunk", "colour"),
    source="https://github.com/munshisanowarraihan/nerf-meta/issues/3 ReLU only emits zeros for sigma and optimization fails",
    proof=every(
        dead_fraction("density_act", 0.99), zero_gradient("density.weight", "trunk.0.weight", "colour.0.weight"), loss_stays(0.3)
    ),
    also=("loss_plateau", "vanishing_gradient", "poor_init", "update_ratio_too_small"),
)
def _(seed: int) -> Setup:
    data, model = rays(seed), Field(bias=-1.5)

    def loss(i: int) -> Tensor:
        places, colour = data()
        return F.mse_loss(model(places), colour)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 2e-3), 40)


# Sick runs: weights that don't move, steps that aren't made, gradients that are used twice.


@sick(
    CASES,
    "sc_layer_decay_by_integer_division",
    ("frozen_weights",),
    ("embed", "blocks.0", "blocks.1", "blocks.2"),
    source="https://arxiv.org/abs/2106.08254 layer-wise learning rate decay of BEiT; here the scale is made by // and is 0 but at the top",
    proof=every(
        unchanged("embed.patch.weight", "blocks.0.mlp.0.weight", "blocks.2.attention.in_proj_weight", "blocks.2.norm1.weight"),
        update_ratio(above=1e-3),
    ),
)
def _(seed: int) -> Setup:
    data, model, depth = Gratings(seed), ViT(), 4
    layers: list[nn.Module] = [model.embed, *model.blocks]
    groups = [{"params": list(layer.parameters()), "lr": 2e-3 * (k // depth)} for k, layer in enumerate(layers)]
    groups.append({"params": [*model.norm.parameters(), *model.head.parameters()], "lr": 2e-3})
    return fit(model, labelled(model, data), torch.optim.AdamW(groups, 2e-3), 40)


@sick(
    CASES,
    "sc_gradients_cleared_before_the_step",
    ("frozen_weights",),
    ("",),
    source="https://github.com/rll/deepul/issues/12 where zero_grad goes in the loop; here it comes after backward",
    proof=unchanged("enter.0.weight", "down2.0.weight", "merge2.1.weight", "head.weight", "head.bias"),
    also=("update_ratio_too_small", "loss_plateau"),
)
def _(seed: int) -> Setup:
    data, model = Discs(seed), UNet()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)

    def loss(i: int) -> Tensor:
        x, mask, _ = data()
        return F.l1_loss(model(x), 2 * mask - 0.3)  # the picture without its noise

    return fit(model, loss, optimizer, 40, between=lambda i: optimizer.zero_grad())


def _piles_up(norms: list[Any]) -> str:
    assert all(n > 0 for n in norms[1:]), "the gradient was cleared"
    return f"before each backward the gradient used by the last step is still there ({norms[1]:.3g}, ..., {norms[-1]:.3g})"


@sick(
    CASES,
    "sc_distillation_clears_the_teacher",
    ("gradients_not_zeroed",),
    ("student",),
    source="https://github.com/IDEA-Research/DN-DETR/issues/19 forgot optimizer.zero_grad(); here it's called on the teacher",
    proof=recorded("left", _piles_up),
)
def _(seed: int) -> Setup:
    data = Gratings(seed)
    teacher, student = Net(width=12), Net(width=6)
    warm = torch.optim.Adam(teacher.parameters(), 5e-3)
    for _ in range(40):
        warm.zero_grad(set_to_none=True)
        x, y = data()
        F.cross_entropy(teacher(x), y).backward()
        warm.step()
    teacher.zero_grad()
    teacher.eval().requires_grad_(False)
    left: list[float] = []
    student.__dict__["left"] = left
    optimizer = torch.optim.Adam(student.parameters(), 3e-3)

    def train() -> Iterator[Event]:
        for _ in range(40):
            teacher.zero_grad()
            x, y = data()
            with torch.no_grad():
                soft = F.softmax(teacher(x) / 2, 1)
            out = student(x)
            loss = 0.5 * F.cross_entropy(out, y) + 2 * F.kl_div(F.log_softmax(out / 2, 1), soft, reduction="batchmean")
            left.append(0.0 if student.fc.weight.grad is None else float(student.fc.weight.grad.norm()))
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]

    return Setup({"student": student, "teacher": teacher}, train)


@sick(
    CASES,
    "sc_two_optimizers_one_cleared",
    ("gradients_not_zeroed",),
    ("fc",),
    source="https://github.com/pytorch/pytorch/issues/47175 zero_grad() that is not called before step(); here the head's optimizer's",
    proof=recorded("left", _piles_up),
)
def _(seed: int) -> Setup:
    data, model = Gratings(seed, batch=32), Net()
    left: list[float] = []
    model.__dict__["left"] = left
    body = torch.optim.SGD([p for n, p in model.named_parameters() if not n.startswith("fc")], 0.05, momentum=0.9)
    head = torch.optim.AdamW(model.fc.parameters(), 1e-3)

    def train() -> Iterator[Event]:
        for _ in range(50):
            body.zero_grad()
            x, y = data()
            loss = F.cross_entropy(model(x), y)
            left.append(0.0 if model.fc.weight.grad is None else float(model.fc.weight.grad.norm()))
            loss.backward()
            yield "read", [loss]
            body.step()
            head.step()
            yield "step", [body, head]

    return Setup(model, train)


def _stays_whole(plain: Plain) -> str:
    for name, norms in plain.weights.items():
        assert all(n == norms[0] for n in norms), f"{name} moves"
        assert all(math.isnan(s) for s in plain.steps[name]), "something stepped"
        assert all(g > 0 for g in plain.grads[name]), f"{name} has no gradient"
    return "every parameter has gradients and is as it was, and no optimizer stepped"


@sick(
    CASES,
    "sc_accumulation_never_due",
    ("never_stepped",),
    source="https://github.com/huggingface/accelerate/issues/1299 accumulation and the place of zero_grad; here `%` never gives its modulus",
    proof=_stays_whole,
    also=("loss_plateau",),
)
def _(seed: int) -> Setup:
    data, model, accumulate = Discs(seed, batch=8), Keypoint(cut=False), 4
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)

    def train() -> Iterator[Event]:
        for i in range(40):
            x, _, box = data()
            loss = F.mse_loss(model(x), box) / accumulate
            loss.backward()
            yield "read", [loss]
            if (i + 1) % accumulate == accumulate:
                optimizer.step()
                optimizer.zero_grad()
                yield "step", [optimizer]

    return Setup(model, train)


# Sick runs: NaN and Inf.


def plain_encoder(channels: int, outputs: int, bias: bool = True) -> nn.Sequential:
    """Two strided convolutions with GELU and a linear layer, for pictures of 16 x 16; no normalisation."""
    return nn.Sequential(
        nn.Conv2d(channels, 12, 3, 2, 1, bias=bias),
        nn.GELU(),
        nn.Conv2d(12, 16, 3, 2, 1, bias=bias),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(256, outputs, bias=bias),
    )


def _only_gradients_are_bad(update: int) -> Callable[[Plain], str]:
    def proof(plain: Plain) -> str:
        assert math.isfinite(plain.losses[update]), "the loss is not finite"
        assert all(o is None or o.nonfinite == 0 for seen in plain.outputs.values() for o in seen[: update + 1]), "an output is not"
        assert all(counts[update] > 0 for counts in plain.nonfinite.values()), "not every gradient has NaN"
        return f"at update {update} loss and outputs are finite, and every gradient has NaN"

    return proof


@sick(
    CASES,
    "sc_triplet_of_a_picture_and_itself",
    ("non_finite_gradient",),
    ("",),
    source="https://omoindrot.github.io/triplet-loss the gradient of the square root is infinite where a distance is 0",
    proof=every(first_non_finite(14), _only_gradients_are_bad(14)),
    onset=14,
    also=("non_finite_weight", "non_finite_activation", "non_finite_loss"),
)
def _(seed: int) -> Setup:
    data, model = Gratings(seed, channels=1, batch=16), plain_encoder(1, 8)

    def loss(i: int) -> Tensor:
        anchor, y = data()
        positive = data.draw(y)
        if i == 14:
            positive[3] = anchor[3]  # a class with a single picture: it is its own positive
        negative = data.draw((y + 2) % 6)
        a, p, n = model(torch.cat([anchor, positive, negative])).chunk(3)
        near, far = (a - p).square().sum(1).sqrt(), (a - n).square().sum(1).sqrt()
        return F.relu(near - far + 0.5).mean()

    return fit(model, loss, torch.optim.AdamW(model.parameters(), 3e-3), 24)


@sick(
    CASES,
    "sc_log_iou_of_an_empty_box",
    ("non_finite_loss",),
    source="https://github.com/open-mmlab/mmdetection/pull/733 avoid log(0) in iou_loss, which will lead to NaN",
    proof=first_non_finite(12),
    onset=12,
    also=("non_finite_gradient", "non_finite_weight", "non_finite_activation"),
)
def _(seed: int) -> Setup:
    data, model = Discs(seed), plain_encoder(1, 3)

    def loss(i: int) -> Tensor:
        x, _, box = data()
        if i == 12:
            box[5, 2] = 0  # an annotation without area
        out = model(x)
        centre, half = out[:, :2].tanh(), F.softplus(out[:, 2:])
        other, wide = box[:, :2], box[:, 2:]
        sides = torch.minimum(centre + half, other + wide) - torch.maximum(centre - half, other - wide)
        both = sides.clamp(min=0).prod(1)
        iou = both / ((2 * half[:, 0]) ** 2 + (2 * wide[:, 0]) ** 2 - both)
        return -iou.log().mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), 2e-3), 22)


class Unit(nn.Module):
    """Vectors to length 1, without an epsilon."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x / x.square().sum(1, keepdim=True).sqrt()
        return out


class Cosine(nn.Module):
    """Cosines of embeddings with class centres, scaled."""

    def __init__(self, normalise: nn.Module, bias: bool = False) -> None:
        super().__init__()
        self.encoder = plain_encoder(3, 16, bias=bias)
        self.normalise = normalise
        self.centres = nn.Linear(16, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        z = self.normalise(self.encoder(x))
        return 8 * F.linear(z, F.normalize(self.centres.weight))


@sick(
    CASES,
    "sc_embedding_of_a_black_picture",
    ("non_finite_activation",),
    ("normalise",),
    source="https://arxiv.org/abs/1801.09414 cosine classifiers normalise embeddings; here without an eps, and one picture is all zeros",
    proof=every(first_non_finite(15, "normalise"), first_non_finite(16, "encoder")),
    onset=15,
    also=("non_finite_loss", "non_finite_gradient", "non_finite_weight"),
)
def _(seed: int) -> Setup:
    data, model = Gratings(seed), Cosine(Unit())

    def loss(i: int) -> Tensor:
        x, y = data()
        if i == 15:
            x[7] = 0  # the loader gives zeros for a file it can't read
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 2e-3), 24)


class Entry(nn.Module):
    """Passes pictures on: what a run gives to the network can be measured here."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@sick(
    CASES,
    "sc_standardised_blank_picture",
    ("non_finite_input",),
    ("",),
    source="https://github.com/Project-MONAI/MONAI/issues/1092 divide by std in NormalizeIntensity, but std could be 0",
    proof=every(first_non_finite(13, "entry"), first_non_finite(13)),
    onset=13,
    also=("non_finite_activation", "non_finite_loss", "non_finite_gradient", "non_finite_weight"),
)
def _(seed: int) -> Setup:
    data, model = Discs(seed, batch=12), nn.Sequential()
    model.add_module("entry", Entry())
    model.add_module("net", UNet())

    def loss(i: int) -> Tensor:
        x, mask, _ = data()
        if i == 13:
            x[4], mask[4] = 0.25, 0  # a slice outside the body: one grey everywhere
        x = x - x.mean((1, 2, 3), keepdim=True)
        x = x / x.square().mean((1, 2, 3), keepdim=True).sqrt()
        return F.binary_cross_entropy_with_logits(model(x), mask)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), 2e-3), 22)


# Sick runs: initialisation and depth.


class Detector(nn.Module):
    """Is there a centre of a disc in the cell? A map of logits on a grid of 4 x 4."""

    def __init__(self, prior: float = 0.02) -> None:
        super().__init__()
        self.backbone = nn.Sequential(unit(1, 12, 2), unit(12, 16, 2))
        self.tower = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        self.score = nn.Conv2d(16, 1, 3, padding=1)
        nn.init.constant_(self.score.bias, -math.log((1 - prior) / prior))  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.score(self.tower(self.backbone(x)))
        return out


def cells(box: Tensor, grid: int) -> Tensor:
    """1 in the cell that holds the centre, 0 elsewhere."""
    place = ((box[:, :2] + 1) / 2 * grid).long().clamp(0, grid - 1)
    out = torch.zeros(len(box), 1, grid, grid)
    out[torch.arange(len(box)), 0, place[:, 1], place[:, 0]] = 1
    return out


def focal(logits: Tensor, target: Tensor) -> Tensor:
    """Focal loss per positive."""
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    p = torch.sigmoid(logits)
    off = torch.where(target > 0, 1 - p, p)
    weight = torch.where(target > 0, 0.75, 0.25)
    return (weight * off.square() * entropy).sum() / target.sum().clamp(min=1)


@sick(
    CASES,
    "sc_prior_bias_in_every_convolution",
    ("dead_units", "poor_init"),
    ("tower",),
    source="https://arxiv.org/abs/1708.02002 the bias -log((1 - p) / p) belongs to the last layer of the head; here the whole head has it",
    proof=every(
        dead_fraction("tower.1", 0.9, last=15), dead_fraction("tower.3", 0.9, last=15), zero_gradient("tower.2.weight", last=15)
    ),
    also=("zero_gradient", "vanishing_gradient", "loss_plateau"),
)
def _(seed: int) -> Setup:
    data, model = Discs(seed), Detector(0.01)
    for m in model.tower:
        if isinstance(m, nn.Conv2d):
            nn.init.constant_(m.bias, -math.log(99)) if m.bias is not None else None

    def loss(i: int) -> Tensor:
        x, _, box = data()
        return focal(model(x), cells(box, 4))

    return fit(model, loss, torch.optim.AdamW(model.parameters(), 1e-3), 40)


def _flat(*modules: str) -> Callable[[Plain], str]:
    def proof(plain: Plain) -> str:
        levels = [o.rms for m in modules for o in plain.outputs[m][:15] if o is not None]
        assert min(levels) > 0.9, f"the tanh has rms {min(levels):.3g}"
        return f"the outputs of {', '.join(modules)} have rms {min(levels):.3g} and more of a possible 1"

    return proof


@sick(
    CASES,
    "sc_keypoint_head_of_unit_normals",
    ("saturated_activation", "poor_init"),
    ("head",),
    source="https://proceedings.mlr.press/v9/glorot10a.html saturation of tanh by the scale of the first weights; here N(0, 1)",
    proof=_flat("head.1", "head.3"),
    also=("vanishing_gradient",),
)
def _(seed: int) -> Setup:
    data = Discs(seed, batch=24)
    model = nn.Sequential()
    model.add_module("encoder", plain_encoder(1, 128))
    model.add_module("norm", nn.LayerNorm(128))
    head = nn.Sequential(nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))
    for m in list(head.children())[:4]:
        if isinstance(m, nn.Linear):
            nn.init.normal_(m.weight)
    model.add_module("head", head)

    def loss(i: int) -> Tensor:
        x, _, box = data()
        return F.mse_loss(model(x), box)

    return fit(model, loss, torch.optim.SGD(model.parameters(), 0.02), 40)


def restorer(depth: int, width: int = 12) -> nn.Sequential:
    """Convolutions and leaky ReLUs without a skip: a picture to a picture."""
    layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1), nn.LeakyReLU(0.1)]
    for _ in range(depth - 2):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers, nn.Conv2d(width, 1, 3, padding=1))


@sick(
    CASES,
    "sc_deep_restorer_of_tiny_weights",
    ("vanishing_gradient", "poor_init"),
    ("",),
    source="https://arxiv.org/abs/1501.00092 SRCNN draws its three layers from N(0, 0.001); here nine are drawn from N(0, 0.01)",
    proof=every(gradient_ratio("0.weight", "16.bias", 1e-5, last=15), gradient_ratio("8.weight", "16.bias", 1e-5, last=15)),
    also=("loss_plateau", "zero_gradient"),
)
def _(seed: int) -> Setup:
    data, model = Discs(seed), restorer(9)
    for m in model:
        if isinstance(m, nn.Conv2d):
            nn.init.normal_(m.weight, 0, 0.01)
            nn.init.zeros_(m.bias) if m.bias is not None else None

    def loss(i: int) -> Tensor:
        x, mask, _ = data()
        return F.mse_loss(model(x), 2 * mask - 0.3)

    return fit(model, loss, torch.optim.SGD(model.parameters(), 0.01, momentum=0.9), 40)


def _same_units(plain: Plain) -> str:
    model: Any = plain.setup.model
    for name in ("0", "2", "5"):
        w = model.get_submodule(name).weight.flatten(1)
        assert torch.allclose(w[0], w[1], rtol=1e-4, atol=1e-6), f"{name} is not symmetric"
    return "after training too, all units of a layer are the same"


@sick(
    CASES,
    "sc_every_weight_the_same",
    ("poor_init",),
    ("",),
    source="https://cs231n.github.io/neural-networks-2/ pitfall: no source of asymmetry between units if their weights start the same",
    proof=_same_units,
    also=("loss_plateau",),
)
def _(seed: int) -> Setup:
    data, model = Discs(seed, batch=24), plain_encoder(1, 24)
    model.append(nn.GELU())
    last = nn.Linear(24, 3)
    nn.init.constant_(last.weight, 0.05)
    for m in model:
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            nn.init.constant_(m.weight, 2 / m.weight[0].numel())
            nn.init.zeros_(m.bias) if m.bias is not None else None
    model.append(last)

    def loss(i: int) -> Tensor:
        x, _, box = data()
        return F.mse_loss(model(x), box)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 1e-3), 50)


class Quantise(torch.autograd.Function):
    """To 8 bits. Its backward is that of x / scale: it forgets that the result is multiplied by the scale again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: float) -> Tensor:
        ctx.levels = levels
        return (x * levels).round() / levels

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * ctx.levels, None


class Rounded(nn.Module):
    """Quantises what it gets."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Quantise.apply(x, 31.0)  # type: ignore[no-untyped-call]
        return out


@sick(
    CASES,
    "sc_quantiser_multiplies_the_gradient",
    ("exploding_gradient",),
    ("0", "1", "2", "3", "4", "5", "6", "7", "8"),
    source="https://github.com/huggingface/optimum-quanto/issues/146 the gradient of quantising, with and without 1 / scale",
    proof=every(gradient_ratio("12.weight", "0.weight", 5e-4, last=15), gradient_ratio("12.weight", "3.weight", 1e-2, last=15)),
)
def _(seed: int) -> Setup:
    data = Gratings(seed)
    layers: list[nn.Module] = []
    for a, b, s in ((3, 12, 1), (12, 16, 2), (16, 16, 2)):
        layers += [nn.Conv2d(a, b, 3, s, 1), nn.ReLU(), Rounded()]
    model = nn.Sequential(*layers, nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 6))
    return fit(model, labelled(model, data), torch.optim.Adam(model.parameters(), 2e-3), 40)


# Sick runs: data, loss and learning rate.


@sick(
    CASES,
    "sc_labels_shuffled_apart",
    ("loss_plateau",),
    source="https://github.com/xudonmao/VMT/issues/1 two separate shuffles return different combinations of images and labels",
    proof=loss_stays(0.05),
    within=100,  # a plateau may take so long
)
def _(seed: int) -> Setup:
    data, model = Gratings(seed, batch=32), Net()
    order = torch.Generator().manual_seed(7000 + seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y[torch.randperm(len(y), generator=order)])

    return fit(model, loss, torch.optim.SGD(model.parameters(), 0.02, momentum=0.9), 140)


def _input_level(low: float, high: float) -> Callable[[Plain], str]:
    def proof(plain: Plain) -> str:
        seen = [o for o in plain.outputs["entry"][:15] if o is not None]
        least, most = min(o.low for o in seen), max(o.high for o in seen)
        assert least >= low, f"{least:.3g}"
        assert most > high, f"{most:.3g}"
        return f"the input goes from {least:.3g} to {most:.3g}"

    return proof


@sick(
    CASES,
    "sc_pixels_up_to_255",
    ("unnormalized_input",),
    ("",),
    source="https://github.com/tomeramit/SegDiff/issues/7 the trouble that comes when the data wasn't normalized",
    proof=_input_level(0, 200),
)
def _(seed: int) -> Setup:
    data = Gratings(seed)
    model = nn.Sequential()
    model.add_module("entry", Entry())
    model.add_module("encoder", plain_encoder(3, 32))
    model.add_module("classifier", nn.Sequential(nn.GELU(), nn.Linear(32, 6)))

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model((128 + 50 * x).round().clamp(0, 255)), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 3e-3), 40)


def _probabilities_as_logits(plain: Plain) -> str:
    seen = [o for o in plain.outputs["softmax"] if o is not None]
    assert all(o.low >= 0 and o.high <= 1 for o in seen), "the outputs are no probabilities"
    floor = math.log(1 + 5 / math.e)  # the cross-entropy of six logits within 0 and 1 can't be less
    assert min(plain.losses) >= floor, f"the loss falls to {min(plain.losses):.3g}"
    return f"the loss gets probabilities for logits and can't fall below {floor:.3g}; it ends at {plain.losses[-1]:.3g}"


@sick(
    CASES,
    "sc_softmax_at_the_end_of_the_classifier",
    ("double_softmax",),
    ("softmax",),
    source="https://github.com/vinhkhuc/PyTorch-Mini-Tutorials/issues/1 CrossEntropyLoss computes softmax internally",
    proof=_probabilities_as_logits,
    also=("loss_plateau",),
)
def _(seed: int) -> Setup:
    data = Gratings(seed, batch=32)
    model = nn.Sequential()
    model.add_module("features", nn.Sequential(unit(3, 12), unit(12, 24, 2), Squeeze(24), unit(24, 24, 2), pooled()))
    model.add_module("classifier", nn.Linear(24, 6))
    model.add_module("softmax", nn.Softmax(1))
    return fit(model, labelled(model, data), torch.optim.Adam(model.parameters(), 2e-3), 50)


@sick(
    CASES,
    "sc_depth_in_millimetres_for_a_batch",
    ("gradient_spike", "loss_spike"),
    source="https://arxiv.org/abs/1406.2283 depth of single pictures, in metres; one batch is of a sensor that gives millimetres",
    proof=every(gradient_spikes(35, 100), loss_grows(1e3)),
    onset=35,
    also=("loss_diverging",),  # the steps that follow are made of the one gradient, and the loss rises
)
def _(seed: int) -> Setup:
    data, model = Discs(seed), UNet()

    def loss(i: int) -> Tensor:
        x, mask, _ = data()
        depth = 2 - 1.2 * mask  # the disc is nearer
        return F.mse_loss(model(x), depth * (1000 if i == 35 else 1))

    return fit(model, loss, torch.optim.Adam(model.parameters(), 5e-3), 50)


@sick(
    CASES,
    "sc_adam_at_0_3",
    ("update_ratio_too_large",),
    source="https://github.com/Cysu/open-reid/issues/24 the learning rate of Adam is too large: 0.0003 was meant, here it's 0.3",
    proof=every(update_ratio(above=1.0, last=1), update_ratio(above=0.15, last=10)),
    also=("loss_diverging", "exploding_gradient", "dead_units", "loss_spike", "gradient_spike"),
)
def _(seed: int) -> Setup:
    data, model = Gratings(seed), Cosine(nn.Identity(), bias=True)
    return fit(model, labelled(model, data), torch.optim.Adam(model.parameters(), 0.3), 40)


@sick(
    CASES,
    "sc_model_steps_uphill",
    ("loss_diverging",),
    source="https://pytorch.org/docs/stable/generated/torch.optim.SGD.html maximize=True, left over from making adversarial pictures",
    proof=loss_grows(5, last=15),
    also=("exploding_gradient", "update_ratio_too_large"),
)
def _(seed: int) -> Setup:
    data, model = Gratings(seed), Net()
    return fit(model, labelled(model, data), torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, maximize=True), 40)


@sick(
    CASES,
    "sc_learning_rate_of_1e_7",
    ("update_ratio_too_small",),
    source="https://arxiv.org/abs/1506.01186 the range test: below some learning rate the loss doesn't move",
    proof=every(update_ratio(below=1e-5), loss_stays(0.1)),
    also=("loss_plateau",),
)
def _(seed: int) -> Setup:
    data, model = Discs(seed), Keypoint(cut=False)

    def loss(i: int) -> Tensor:
        x, _, box = data()
        return F.mse_loss(model(x), box)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), 1e-7), 50)


def _scale_falls(scales: list[Any]) -> str:
    assert scales[14] <= scales[0] / 2**13, f"the scale goes from {scales[0]} to {scales[14]}"
    return f"the scale goes from {scales[0]:g} to {scales[-1]:g}, every update is skipped"


@sick(
    CASES,
    "sc_scaler_hides_the_nan_of_the_smoothness_term",
    ("loss_scale_collapse", "non_finite_gradient"),
    source="https://github.com/lpiccinelli-eth/UniK3D/issues/16 Scale went less than 1: the scaler has met too many non-finite values",
    proof=every(recorded("scales", _scale_falls), _only_gradients_are_bad(0)),
    also=("never_stepped", "frozen_weights", "loss_plateau"),
)
def _(seed: int) -> Setup:
    data, model = Discs(seed), UNet()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scales: list[float] = []
    model.__dict__["scales"] = scales

    def train() -> Iterator[Event]:
        for _ in range(40):
            optimizer.zero_grad()
            x, mask, _ = data()
            depth = F.softplus(model(x))
            seen = depth * mask
            down, right = seen[:, :, 1:, :-1] - seen[:, :, :-1, :-1], seen[:, :, :-1, 1:] - seen[:, :, :-1, :-1]
            # No epsilon under the root, and outside the mask both differences are 0.
            loss = F.l1_loss(depth, mask) + 0.05 * (down.square() + right.square()).sqrt().mean()
            scaler.scale(loss).backward()
            yield "read", [loss]
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            scales.append(before)
            yield "step", [] if scaler.get_scale() < before else [optimizer]

    return Setup(model, train)


# Healthy runs.


class Residual(nn.Module):
    """A residual block that a batch may skip altogether."""

    def __init__(self, width: int, drop: float, generator: torch.Generator) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.drop, self.generator = drop, generator

    def forward(self, x: Tensor) -> Tensor:
        if float(torch.rand((), generator=self.generator)) < self.drop:
            return F.relu(x)
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


@healthy(
    CASES,
    "sc_ok_stochastic_depth",
    source="https://arxiv.org/abs/1603.09382 blocks are skipped by a batch, the later the more often",
    proof=converges(0.5),
)
def _(seed: int) -> Setup:
    data, skip = Gratings(seed, batch=32, noise=1.6), torch.Generator().manual_seed(8000 + seed)
    model = nn.Sequential(unit(3, 12, 2), *(Residual(12, 0.1 * k, skip) for k in range(1, 6)), pooled(), nn.Linear(12, 6))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 160)

    def before(i: int) -> None:
        if i:
            schedule.step()

    return fit(model, labelled(model, data), optimizer, 160, before=before)


@healthy(
    CASES,
    "sc_ok_focal_loss_of_rare_positives",
    source="https://arxiv.org/abs/1708.02002 focal loss and a prior of 0.01; one cell in 128 holds something",
    proof=converges(0.4),
)
def _(seed: int) -> Setup:
    data, model = Discs(seed, batch=32), Detector(0.01)
    nn.init.normal_(model.score.weight, 0, 0.01)

    def loss(i: int) -> Tensor:
        x, mask, box = data()
        x[:28] -= 2 * mask[:28]  # most pictures are of noise alone
        target = cells(box, 4)
        target[:28] = 0
        return focal(model(x), target)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), 2e-3), 200)


@healthy(
    CASES,
    "sc_ok_frozen_stages_thawed_later",
    source="https://arxiv.org/abs/1801.06146 gradual unfreezing; the frozen stages keep their batch statistics in eval mode",
    proof=converges(0.4),
)
def _(seed: int) -> Setup:
    data, early, model = Gratings(seed), Gratings(100 + seed, classes=4), Net(classes=4)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(40):
        optimizer.zero_grad()
        x, y = early()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.zero_grad()
    model.fc = nn.Linear(24, 6)
    stages = [model.stage1, model.stage2, model.stage3]
    for stage in stages:
        stage.eval().requires_grad_(False)
    tuner = torch.optim.AdamW(model.fc.parameters(), 1e-2)

    def before(i: int) -> None:
        if i == 60:
            model.stage3.requires_grad_(True)
            tuner.add_param_group({"params": list(model.stage3.parameters()), "lr": 1e-3})

    return fit(model, labelled(model, data), tuner, 160, before=before)


@healthy(
    CASES,
    "sc_ok_mean_teacher",
    source="https://arxiv.org/abs/1703.01780 the teacher is the average of the student's weights and gets no gradient",
    proof=converges(0.4),
)
def _(seed: int) -> Setup:
    data, student = Gratings(seed, noise=1.0), Net()
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), 0.03, momentum=0.9)

    def train() -> Iterator[Event]:
        for i in range(140):
            x, y = data()
            out = student(x)
            with torch.no_grad():
                goal = teacher(x + 0.2 * torch.randn(x.shape, generator=data.generator)).softmax(1)
            agree = (out.softmax(1) - goal).square().sum(1).mean()
            loss = F.cross_entropy(out[:8], y[:8]) + min(1.0, i / 60) * agree  # eight pictures have labels
            optimizer.zero_grad()
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]
            with torch.no_grad():
                for a, b in zip(teacher.parameters(), student.parameters(), strict=True):
                    a.lerp_(b, 0.05)

    return Setup({"student": student, "teacher": teacher}, train)


@healthy(
    CASES,
    "sc_ok_layer_scale",
    source="https://arxiv.org/abs/2103.17239 branches start scaled by 1e-5, so that their weights get tiny gradients at first",
    proof=converges(0.5),
)
def _(seed: int) -> Setup:
    data, model = Gratings(seed, batch=32, noise=1.1), ViT(depth=3, scale=1e-5)
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / 10))

    def between(i: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if i:
            schedule.step()

    return fit(model, labelled(model, data), optimizer, 130, between=between)


@healthy(
    CASES,
    "sc_ok_progressive_resizing",
    source="https://arxiv.org/abs/2104.00298 progressive learning: the pictures grow from 8 to 16 pixels while it trains",
    proof=converges(0.2),
)
def _(seed: int) -> Setup:
    data, model = Gratings(seed, noise=0.4), Net()

    def loss(i: int) -> Tensor:
        x, y = data()
        side = 8 if i < 50 else 12 if i < 100 else 16
        return F.cross_entropy(model(F.interpolate(x, (side, side), mode="bilinear", antialias=True)), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 3e-3), 150)


def _right(share: float) -> Callable[[Plain], str]:
    def proof(plain: Plain) -> str:
        model: Any = plain.setup.model
        x, y = Gratings(999, batch=200)()
        with torch.no_grad():
            found = float((model.eval()(x).argmax(1) == y).float().mean())
        model.train()
        assert found > share, f"{found:.3g} of new pictures are right"
        return f"{found:.3g} of new pictures are right"

    return proof


@healthy(
    CASES,
    "sc_ok_mixup_and_smooth_labels",
    source="https://arxiv.org/abs/1710.09412 mixup: the loss can't come near 0, and goes up and down with the share that is mixed in",
    proof=every(_right(0.9), converges(0.85)),
)
def _(seed: int) -> Setup:
    data, model = Gratings(seed, batch=32), Net()

    def loss(i: int) -> Tensor:
        x, y = data()
        other = torch.randperm(len(y), generator=data.generator)
        share = 0.5 + 0.5 * float(torch.rand((), generator=data.generator))
        out = model(share * x + (1 - share) * x[other])
        a, b = F.cross_entropy(out, y, label_smoothing=0.1), F.cross_entropy(out, y[other], label_smoothing=0.1)
        return share * a + (1 - share) * b

    return fit(model, loss, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4), 160)


@healthy(
    CASES,
    "sc_ok_auxiliary_head_dropped",
    source="https://arxiv.org/abs/1409.4842 auxiliary classifiers help at the beginning; here they leave the model after 70 updates",
    proof=converges(0.2),
)
def _(seed: int) -> Setup:
    data, model = Gratings(seed), AuxNet()
    assert model.aux is not None
    aux = {id(p) for p in model.aux.parameters()}
    groups = [{"params": [p for p in model.parameters() if id(p) not in aux]}, {"params": list(model.aux.parameters())}]
    optimizer = torch.optim.AdamW(groups, 3e-3)

    def before(i: int) -> None:
        if i == 70:
            model.aux = None
            del optimizer.param_groups[1]

    def loss(i: int) -> Tensor:
        x, y = data()
        out, side = model(x)
        return F.cross_entropy(out, y) + (0.0 if side is None else 0.3 * F.cross_entropy(side, y))

    return fit(model, loss, optimizer, 160, before=before)


@healthy(
    CASES,
    "sc_ok_bf16_and_checkpoints",
    source="https://pytorch.org/docs/stable/checkpoint.html modules run twice, the second time in the backward pass; under bf16 autocast",
    proof=converges(0.4),
)
def _(seed: int) -> Setup:
    data, blocks = Discs(seed, noise=0.5), nn.Sequential(*(Smooth(12) for _ in range(3)))
    model = nn.Sequential(nn.Conv2d(1, 12, 3, 2, 1), nn.GELU(), blocks, nn.ConvTranspose2d(12, 1, 2, 2))

    def loss(i: int) -> Tensor:
        x, mask, _ = data()
        with torch.autocast("cpu", torch.bfloat16):
            h = model[1](model[0](x))
            for block in blocks:
                h = checkpoint(block, h, use_reentrant=False)
            out = model[3](h)
        return F.binary_cross_entropy_with_logits(out.float(), mask) + dice(torch.sigmoid(out.float()), mask)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), 3e-3), 120)


class Sine(nn.Module):
    """sin(w0 * x)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(30 * x)


@healthy(
    CASES,
    "sc_ok_siren",
    source="https://arxiv.org/abs/2006.09661 sines of 30 times the layer, with weights that are drawn 30 times smaller",
    proof=converges(0.05),
)
def _(seed: int) -> Setup:
    picture = Gratings(seed, batch=1, size=24, noise=0.0)()[0][0, 0].clamp(-1, 1)
    line = torch.linspace(-1, 1, 24)
    places = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).flatten(0, 1)
    model = nn.Sequential(nn.Linear(2, 48), Sine(), nn.Linear(48, 48), Sine(), nn.Linear(48, 48), Sine(), nn.Linear(48, 1))
    for k, m in enumerate(model):
        if isinstance(m, nn.Linear):
            bound = 1 / 2 if k == 0 else math.sqrt(6 / 48) / 30
            nn.init.uniform_(m.weight, -bound, bound)

    def loss(i: int) -> Tensor:
        return F.mse_loss(model(places)[:, 0], picture.flatten())

    return fit(model, loss, torch.optim.Adam(model.parameters(), 3e-4), 200)


class Inverted(nn.Module):
    """An inverted residual: wide, depthwise, gated, narrow."""

    def __init__(self, width: int) -> None:
        super().__init__()
        wide = 3 * width
        self.body = nn.Sequential(
            nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.Hardswish(),
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.Hardswish(),
        )  # fmt: skip
        self.squeeze = nn.Sequential(pooled(), nn.Linear(wide, 8), nn.SiLU(), nn.Linear(8, wide), nn.Hardsigmoid())
        self.out = nn.Sequential(nn.Conv2d(wide, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        out: Tensor = self.out(h * self.squeeze(h)[:, :, None, None])
        return x + out


@healthy(
    CASES,
    "sc_ok_depthwise_with_hard_gates",
    source="https://arxiv.org/abs/1905.02244 MobileNetV3: depthwise convolutions, hard swish, hard sigmoid gates, RMSprop; clipped",
    proof=converges(0.5),
)
def _(seed: int) -> Setup:
    data = Gratings(seed, batch=32, noise=1.4)
    model = nn.Sequential(unit(3, 12, 2), Inverted(12), unit(12, 16, 2), Inverted(16), pooled(), nn.Linear(16, 6))

    def between(i: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)

    return fit(model, labelled(model, data), torch.optim.RMSprop(model.parameters(), 1e-3), 140, between=between)


@healthy(
    CASES,
    "sc_ok_heatmap_head_from_zero",
    source="https://arxiv.org/abs/1706.02677 the last layer of a branch starts at 0, so that nothing before it has a gradient at first",
    proof=converges(0.3),
)
def _(seed: int) -> Setup:
    data, model = Discs(seed), UNet()
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: i / 5 if i < 5 else 1.0)  # the first step is one of 0
    line = torch.linspace(-1, 1, 16)

    def loss(i: int) -> Tensor:
        x, _, box = data()
        far = (line[None, None, :] - box[:, :1, None]) ** 2 + (line[None, :, None] - box[:, 1:2, None]) ** 2
        return F.mse_loss(model(x)[:, 0], 3 * torch.exp(-far / 0.08))

    return fit(model, loss, optimizer, 160, between=lambda i: schedule.step() if i else None)


class Smooth(nn.Module):
    """A residual block with group normalisation and SiLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.body(x)
        return out


class Contrast(nn.Module):
    """Embeddings of unit length, and a temperature that is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(unit(3, 12, 2), unit(12, 24, 2), pooled())
        self.projector = nn.Sequential(nn.Linear(24, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16, bias=False))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.2)))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.projector(self.encoder(x)), dim=1)


@healthy(
    CASES,
    "sc_ok_contrastive_pairs",
    source="https://arxiv.org/abs/2002.05709 two noisy views of a picture against the rest of the batch; temperature as in arXiv 2103.00020",
    proof=converges(0.6),
)
def _(seed: int) -> Setup:
    data, model = Gratings(seed, batch=24, noise=0.0), Contrast()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)

    def loss(i: int) -> Tensor:
        x, _ = data()
        tint = torch.randn(24, 3, 1, 1, generator=data.generator)
        views = [x + 0.7 * tint + 0.3 * torch.randn(x.shape, generator=data.generator) for _ in range(2)]
        a, b = model(torch.cat(views)).chunk(2)
        logits = model.log_scale.exp().clamp(max=100) * a @ b.T
        goal = torch.arange(24)
        return 0.5 * (F.cross_entropy(logits, goal) + F.cross_entropy(logits.T, goal))

    return fit(model, loss, optimizer, 120)
