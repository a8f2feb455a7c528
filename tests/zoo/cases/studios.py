"""Pictures, sound, music and video at small size: classifiers, U-Nets, VAEs, GANs, denoisers, flows, codebooks, self-distillation.

A sick run takes `mended`: True builds the same run without its fault, to see that nothing else ails it.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Case, Event, Proof, Setup, fit, healthy, sick
from tests.zoo.plain import Plain
from tests.zoo.proofs import (
    converges,
    dead_fraction,
    every,
    first_non_finite,
    gradient_grows,
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


class Glyphs:
    """Pictures of a few smooth patterns, one a class, of about unit variance, in noise."""

    def __init__(self, seed: int, classes: int = 6, batch: int = 16, size: int = 8, channels: int = 1, noise: float = 0.4) -> None:
        self.g = torch.Generator().manual_seed(7100 + seed)
        coarse = torch.randn(classes, channels, 4, 4, generator=self.g)
        smooth = F.interpolate(coarse, size=size, mode="bilinear", align_corners=False)
        self.patterns = smooth / smooth.std(dim=(1, 2, 3), keepdim=True)
        self.batch, self.noise = batch, noise

    def __call__(self) -> tuple[Tensor, Tensor]:
        y = torch.randint(len(self.patterns), (self.batch,), generator=self.g)
        x = self.patterns[y]
        return x + self.noise * torch.randn(x.shape, generator=self.g), y

    def view(self, x: Tensor) -> Tensor:
        """The same pictures with other noise, each a little fainter or stronger."""
        gain = 0.7 + 0.6 * torch.rand(len(x), 1, 1, 1, generator=self.g)
        return gain * x + self.noise * torch.randn(x.shape, generator=self.g)


class Tones:
    """Waveforms `[batch, 1, length]` of about unit variance: a tone whose pitch is the class, at any phase, in noise."""

    def __init__(self, seed: int, classes: int = 5, batch: int = 16, length: int = 128) -> None:
        self.g = torch.Generator().manual_seed(7200 + seed)
        self.classes, self.batch, self.length = classes, batch, length

    def __call__(self) -> tuple[Tensor, Tensor]:
        y = torch.randint(self.classes, (self.batch,), generator=self.g)
        return self.tone(y) + 0.3 * torch.randn(self.batch, 1, self.length, generator=self.g), y

    def tone(self, y: Tensor) -> Tensor:
        t = torch.arange(self.length) / self.length
        phase = 2 * math.pi * torch.rand(len(y), 1, generator=self.g)
        return (1.4 * torch.sin(2 * math.pi * (4.0 + 5.0 * y[:, None]) * t + phase))[:, None]


def spectrogram(wave: Tensor, floor: float = 1e-3) -> Tensor:
    """Log power `[batch, 1, 17, frames]`; about zero mean and unit variance for `Tones`."""
    power = torch.stft(wave[:, 0], 32, hop_length=16, window=torch.hann_window(32), return_complex=True).abs().square()
    return ((power + floor).log()[:, None] - 1.0) / 2.0


class Spots:
    """Pictures with a bright square; its mask and the place of its middle in -1 .. 1."""

    def __init__(self, seed: int, batch: int = 16, size: int = 12, noise: float = 0.3) -> None:
        self.g = torch.Generator().manual_seed(7300 + seed)
        self.batch, self.size, self.noise = batch, size, noise

    def __call__(self) -> tuple[Tensor, Tensor, Tensor]:
        at = torch.randint(1, self.size - 3, (self.batch, 2), generator=self.g)
        r = torch.arange(self.size)
        rows = (r >= at[:, :1]) & (r < at[:, :1] + 3)
        columns = (r >= at[:, 1:]) & (r < at[:, 1:] + 3)
        mask = (rows[:, :, None] & columns[:, None, :]).float()[:, None]
        x = 3.0 * mask - 0.2 + self.noise * torch.randn(mask.shape, generator=self.g)
        return x, mask, (at + 1.0) / (self.size - 1.0) * 2 - 1


def conv(a: int, b: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(a, b, 3, stride, 1), nn.BatchNorm2d(b), nn.ReLU())


def small_classifier(classes: int = 6, width: int = 8, pool: tuple[int, int] = (2, 2)) -> nn.Sequential:
    return nn.Sequential(
        conv(1, width),
        conv(width, 2 * width, 2),
        nn.AdaptiveAvgPool2d(pool),
        nn.Flatten(),
        nn.Linear(2 * width * pool[0] * pool[1], classes),
    )


def clip(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def first_bad_loss(update: int) -> Proof:
    """The first loss that is not finite is that of `update`."""

    def proof(plain: Plain) -> str:
        found = next((i for i, x in enumerate(plain.losses) if not math.isfinite(x)), None)
        assert found == update, f"the first bad loss is at {found}, not at {update}"
        return f"the loss is not finite at {update}, and finite before"

    return proof


def finite_gradients(last: int | None = None) -> Proof:
    def proof(plain: Plain) -> str:
        assert all(n == 0 for counts in plain.nonfinite.values() for n in counts[:last]), "a gradient is not finite"
        return "all gradients are finite"

    return proof


# ---- sick ----


class VectorQuantised(nn.Module):
    def __init__(self, codes: int, dim: int, straight_through: bool) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, dim, 3, 2, 1), nn.GroupNorm(1, dim))
        self.codebook = nn.Embedding(codes, dim)
        self.decoder = nn.Sequential(nn.Conv2d(dim, 16, 3, 1, 1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.PixelShuffle(4))
        self.straight_through = straight_through

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encoder(x).movedim(1, -1)
        nearest = torch.cdist(z.detach().flatten(0, -2), self.codebook.weight.detach()).argmin(1).view(z.shape[:-1])
        q = self.codebook(nearest)
        loss = F.mse_loss(q, z.detach())
        if self.straight_through:
            loss = loss + 0.25 * F.mse_loss(z, q.detach())
            q = z + (q - z).detach()
        return self.decoder(q.movedim(-1, 1)), loss


@sick(
    CASES,
    "su_vq_without_straight_through",
    ("missing_gradient",),
    ("encoder",),
    source="https://github.com/zalandoresearch/pytorch-vq-vae/issues/6 how the reconstruction loss reaches the encoder of a VQ-VAE",
    proof=no_gradient("encoder.0.weight", "encoder.0.bias", "encoder.2.weight", "encoder.2.bias"),
)
def _(seed: int, mended: bool = False) -> Setup:
    data, model = Glyphs(seed), VectorQuantised(24, 4, straight_through=mended)

    def loss(i: int) -> Tensor:
        x, _ = data()
        out, extra = model(x)
        value: Tensor = F.mse_loss(out, x) + extra
        return value

    return fit(model, loss, torch.optim.Adam(model.parameters(), 5e-3), 80)


@sick(
    CASES,
    "su_log_spectrogram_of_silence",
    ("non_finite_input",),
    ("",),
    source="https://github.com/KimythAnly/AGAIN-VC/issues/5 the preprocessed mel has -inf elements: the log of a silent frame",
    proof=first_non_finite(14),
    onset=14,
    also=("non_finite_activation", "non_finite_loss", "non_finite_gradient", "non_finite_weight"),
)
def _(seed: int, mended: bool = False) -> Setup:
    data, model = Tones(seed), small_classifier(5, pool=(6, 1))

    def loss(i: int) -> Tensor:
        wave, y = data()
        if i == 14:
            wave[3, :, 40:110] = 0.0  # a clip that ends in digital silence
        return F.cross_entropy(model(spectrogram(wave, 1e-3 if mended else 0.0)), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 3e-3), 30)


@sick(
    CASES,
    "su_triplet_of_the_same_picture",
    ("non_finite_gradient",),
    ("body",),
    source="https://github.com/pytorch/pytorch/issues/2421 the gradient of a norm at zero",
    proof=every(first_non_finite(16), lambda plain: _loss_finite_at(plain, 16)),
    onset=16,
    also=("non_finite_weight", "non_finite_activation", "non_finite_loss"),
)
def _(seed: int, mended: bool = False) -> Setup:
    data = Glyphs(seed, batch=18, noise=0.6)
    body = nn.Sequential(conv(1, 8, 2), conv(8, 16, 2), nn.Flatten(), nn.Linear(64, 8))
    model = nn.ModuleDict({"body": body})

    def distance(a: Tensor, b: Tensor) -> Tensor:
        square = (a - b).square().sum(1)
        return (square + 1e-6).sqrt() if mended else square.sqrt()

    def loss(i: int) -> Tensor:
        x, y = data()
        positive = data.patterns[y] + 0.6 * torch.randn(x.shape, generator=data.g)
        if i == 16:
            positive[0] = x[0]  # the sampler drew the anchor itself
        negative = data.patterns[(y + 1) % 6] + 0.6 * torch.randn(x.shape, generator=data.g)
        a, p, n = body(torch.cat([x, positive, negative])).chunk(3)
        return F.softplus(distance(a, p) - distance(a, n)).mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), 2e-3), 30)


def _loss_finite_at(plain: Plain, update: int) -> str:
    assert all(math.isfinite(x) for x in plain.losses[: update + 1]), "the loss is not finite either"
    return f"the loss at {update} is {plain.losses[update]:.3g}"


class Upscaler(nn.Module):
    """A small generator of 8 x 8 pictures from noise."""

    def __init__(self, latent: int = 8) -> None:
        super().__init__()
        self.project = nn.Linear(latent, 64)
        self.body = nn.Sequential(
            nn.BatchNorm2d(16), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(16, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU()
        )
        self.paint = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(16, 1, 3, 1, 1))

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.paint(self.body(self.project(z).view(-1, 16, 2, 2)))
        return out


def critic() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(16, 16, 3, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(64, 1)
    )


@sick(
    CASES,
    "su_gan_judge_never_cleared",
    ("gradients_not_zeroed",),
    ("judge",),
    source="https://discuss.pytorch.org/t/why-do-we-need-to-set-the-gradients-manually-to-zero-in-pytorch/4903 gradients add up",
    proof=lambda plain: _piles_up(plain, "judge.5.weight"),
)
def _(seed: int, mended: bool = False) -> Setup:
    data, painter, judge = Glyphs(seed, classes=3, noise=0.2), Upscaler(), critic()
    opt_p = torch.optim.Adam(painter.parameters(), 1e-3, betas=(0.5, 0.99))
    opt_j = torch.optim.Adam(judge.parameters(), 1e-3, betas=(0.5, 0.99))

    def train() -> Iterator[Event]:
        for _ in range(40):
            x, _y = data()
            fake = painter(torch.randn(len(x), 8))
            if mended:
                opt_j.zero_grad()
            real_loss = F.softplus(-judge(x)).mean()
            fake_loss = F.softplus(judge(fake.detach())).mean()
            (real_loss + fake_loss).backward()  # type: ignore[no-untyped-call]
            opt_j.step()
            opt_p.zero_grad()  # the only one that is cleared
            loss = F.softplus(-judge(fake)).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            yield "read", [real_loss + fake_loss, loss]
            opt_p.step()
            yield "step", [opt_p, opt_j]

    return Setup({"painter": painter, "judge": judge}, train)


def _piles_up(plain: Plain, name: str) -> str:
    """The gradient that lies in a parameter in the end is far above what one more update can bring."""
    early, late = median(plain.grads[name][:2]), median(plain.grads[name][10:15])
    assert late > 4 * early, f"the gradient of {name} goes from {early:.3g} to {late:.3g}"
    return f"the gradient of {name} piles up from {early:.3g} to {late:.3g}"


@sick(
    CASES,
    "su_sixteen_bit_waveform",
    ("unnormalized_input",),
    ("",),
    source="https://pytorch.org/audio/stable/generated/torchaudio.load.html normalize=False gives int16 samples, here cast to float",
    proof=lambda plain: _input_rms(plain, 1000),
)
def _(seed: int, mended: bool = False) -> Setup:
    data = Tones(seed)
    model = nn.Sequential(
        nn.Conv1d(1, 12, 9, 2, 4),
        nn.ReLU(),
        nn.Conv1d(12, 24, 5, 2, 2),
        nn.ReLU(),
        nn.AdaptiveMaxPool1d(4),
        nn.Flatten(),
        nn.Linear(96, 5),
    )

    def loss(i: int) -> Tensor:
        wave, y = data()
        samples = (wave / 4 * 32767).round().clamp(-32768, 32767)
        return F.cross_entropy(model(samples / 8192 if mended else samples), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 2e-3), 18)


def _input_rms(plain: Plain, above: float) -> str:
    """What the first layer gives tells of what it got: its weights are of the usual size."""
    seen, weight = plain.outputs["0"][0], plain.weights["0.weight"][0]
    assert seen is not None
    assert seen.rms > above, f"the first layer gives {seen.rms:.3g}"
    return f"the first layer gives an rms of {seen.rms:.3g} with weights of norm {weight:.3g}"


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(channels, channels // 2), nn.Linear(channels // 2, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))
        return x * gate[:, :, None, None]


class SqueezeExciteBlock(nn.Module):
    """Depthwise, squeeze-excite, pointwise, with a shortcut."""

    def __init__(self, channels: int, use: bool) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.excite = SqueezeExcite(channels)
        self.pointwise = nn.Conv2d(channels, channels, 1)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.norm(self.depthwise(x)))
        if self.use:
            h = self.excite(h)
        out: Tensor = x + self.pointwise(h)
        return out


@sick(
    CASES,
    "su_never_called_squeeze_excite",
    ("missing_gradient",),
    ("1.excite", "2.excite"),
    source="https://arxiv.org/abs/1709.01507 squeeze-excite blocks, made in __init__ and forgotten in forward",
    proof=every(
        no_gradient("1.excite.down.weight", "1.excite.up.weight", "2.excite.down.weight", "2.excite.up.bias"),
        lambda plain: _never_called(plain, "1.excite", "2.excite"),
    ),
)
def _(seed: int, mended: bool = False) -> Setup:
    data = Glyphs(seed, batch=12, channels=3)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, 2, 1), SqueezeExciteBlock(12, mended), SqueezeExciteBlock(12, mended), nn.Flatten(), nn.Linear(192, 6)
    )

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y, label_smoothing=0.1)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05), 50)


def _never_called(plain: Plain, *modules: str) -> str:
    for name in modules:
        assert all(seen is None for seen in plain.outputs[name]), f"{name} is called"
    return f"{', '.join(modules)}: never called"


class TwoHeads(nn.Module):
    """A mask and the place of the middle, from one body."""

    def __init__(self, rounded: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(1, 8), conv(8, 8))
        self.mask = nn.Conv2d(8, 1, 1)
        self.place = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 24), nn.LeakyReLU(0.1), nn.Linear(24, 2))
        self.rounded = rounded

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        place = self.place(h)
        if self.rounded:  # to whole pixels
            place = ((place + 1) / 2 * 11).round() / 11 * 2 - 1
        return self.mask(h), place


PLACE = ("place.2.weight", "place.2.bias", "place.4.weight", "place.4.bias")


@sick(
    CASES,
    "su_keypoints_rounded_in_forward",
    ("zero_gradient",),
    ("place",),
    source="https://discuss.pytorch.org/t/torch-round-gradient/28628/4 round has the gradient zero everywhere",
    proof=every(zero_gradient(*PLACE), lambda plain: _alive(plain, "mask.weight", "body.0.0.weight")),
)
def _(seed: int, mended: bool = False) -> Setup:
    data, model = Spots(seed), TwoHeads(rounded=not mended)

    def loss(i: int) -> Tensor:
        x, mask, place = data()
        seen, at = model(x)
        return F.binary_cross_entropy_with_logits(seen, mask) + F.smooth_l1_loss(at, place)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 3e-3), 50)


def _alive(plain: Plain, *parameters: str) -> str:
    for name in parameters:
        assert all(n > 0 for n in plain.grads[name]), f"{name} has no gradient"
    return f"{', '.join(parameters)}: has a gradient"


@sick(
    CASES,
    "su_mask_loss_left_out_of_the_sum",
    ("missing_gradient",),
    ("mask",),
    source="https://arxiv.org/abs/1703.06870 Mask R-CNN sums the losses of its heads; here one is computed and only logged",
    proof=every(no_gradient("mask.weight", "mask.bias"), lambda plain: _alive(plain, *PLACE)),
)
def _(seed: int, mended: bool = False) -> Setup:
    data, model = Spots(seed, batch=24), TwoHeads()
    log: list[float] = []

    def loss(i: int) -> Tensor:
        x, mask, place = data()
        seen, at = model(x)
        at_loss, mask_loss = F.mse_loss(at, place), F.binary_cross_entropy_with_logits(seen, mask)
        log.append(float(mask_loss.detach()))
        return at_loss + mask_loss if mended else at_loss

    return fit(model, loss, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), 60)


class Net(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = conv(1, 8)
        self.body = conv(8, 16, 2)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(256, classes))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(self.stem(x)))
        return out


@sick(
    CASES,
    "su_head_swapped_after_the_optimizer",
    ("not_in_optimizer",),
    ("head",),
    source="https://docs.pytorch.org/tutorials/beginner/transfer_learning_tutorial.html a new head; here the optimizer was made before it",
    proof=every(unchanged("head.1.weight", "head.1.bias"), lambda plain: _moves(plain, "stem.0.weight", "body.0.weight")),
)
def _(seed: int, mended: bool = False) -> Setup:
    data, model = Glyphs(seed, classes=4), Net(10)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, nesterov=True)
    model.head = nn.Sequential(nn.Flatten(), nn.Linear(256, 4))
    if mended:
        optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, nesterov=True)

    def train() -> Iterator[Event]:
        for _ in range(40):
            x, y = data()
            model.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()  # type: ignore[no-untyped-call]
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


def _moves(plain: Plain, *parameters: str) -> str:
    for name in parameters:
        assert all(s > 0 for s in plain.steps[name]), f"{name} stays"
    return f"{', '.join(parameters)}: moves"


class MixerBlock(nn.Module):
    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.patch = nn.Sequential(nn.Linear(patches, 2 * patches), nn.GELU(), nn.Linear(2 * patches, patches))
        self.channel = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.patch(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        value: Tensor = x + self.channel(self.norm2(x))
        return value


class Mixer(nn.Module):
    def __init__(self, classes: int, blocks: list[nn.Module] | nn.ModuleList, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, 2, 2)
        self.blocks = blocks
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            h = block(h)
        out: Tensor = self.head(self.norm(h).mean(1))
        return out


@sick(
    CASES,
    "su_mixer_blocks_in_a_plain_list",
    ("not_in_optimizer",),
    source="https://www.engineermaxxing.com/micro/lessons/pytorch-internals.html layers in a Python list are no parameters of the model",
    proof=lambda plain: _hidden_leaves(plain),
)
def _(seed: int, mended: bool = False) -> Setup:
    blocks: list[nn.Module] = [MixerBlock(16, 16) for _ in range(3)]
    data, model = Glyphs(seed), Mixer(6, nn.ModuleList(blocks) if mended else blocks)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 3e-3), 40)


def _hidden_leaves(plain: Plain) -> str:
    """The blocks are in the graph, for they hold gradients of all updates, and no parameter of the model belongs to them."""
    assert isinstance(plain.setup.model, Mixer)
    hidden = [p for b in plain.setup.model.blocks for p in b.parameters()]
    assert not any(name.startswith("blocks") for name in plain.grads), "the blocks are registered"
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in hidden), "the blocks get no gradient"
    return f"{len(hidden)} tensors outside the model get gradients"


class Denoiser(nn.Module):
    """Tells the noise in a picture, given its level."""

    def __init__(self, width: int = 16, zero: bool = True) -> None:
        super().__init__()
        self.level = nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width))
        self.enter = nn.Conv2d(1, width, 3, 1, 1)
        self.down = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, width, 3, 2, 1))
        self.up = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, 1, 1))
        self.leave = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, 1, 3, 1, 1))
        if zero:
            nn.init.zeros_(self.leave[2].weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        emb = self.level(torch.stack([torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2)], 1).to(x.dtype))
        h = self.enter(x)
        out: Tensor = self.leave(h + self.up(self.down(h) + emb[:, :, None, None]))
        return out


def denoising(data: Glyphs, model: nn.Module) -> Tensor:
    """The loss of predicting the noise."""
    x, _ = data()
    t = torch.rand(len(x), generator=data.g)
    noise = torch.randn(x.shape, generator=data.g)
    a, b = torch.cos(t * math.pi / 2)[:, None, None, None], torch.sin(t * math.pi / 2)[:, None, None, None]
    return F.mse_loss(model(a * x + b * noise, t), noise)


@sick(
    CASES,
    "su_denoiser_never_stepped",
    ("never_stepped",),
    source="https://arxiv.org/abs/2006.11239 a denoiser with an averaged copy; here the loop lost its optimizer.step()",
    proof=lambda plain: _nothing_moves(plain),
)
def _(seed: int, mended: bool = False) -> Setup:
    data, model = Glyphs(seed, noise=0.2, batch=32), Denoiser(zero=False)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)

    def train() -> Iterator[Event]:
        for _ in range(40):
            loss = denoising(data, model)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            yield "read", [loss]
            if mended:
                optimizer.step()
            for a, p in zip(average.parameters(), model.parameters(), strict=True):
                a.lerp_(p.detach(), 0.05)
            yield "step", [optimizer] if mended else []

    return Setup(model, train)


def _nothing_moves(plain: Plain) -> str:
    assert all(math.isnan(s) for steps in plain.steps.values() for s in steps), "something stepped"
    ends = {name: float(p.detach().double().norm()) for name, p in plain.setup.model.named_parameters()}  # type: ignore[union-attr]
    assert all(abs(ends[n] - plain.weights[n][0]) < 1e-12 for n in ends), "a weight changed"
    assert all(math.isfinite(g[5]) for g in plain.grads.values()), "a gradient is missing"
    return "gradients come and no weight changes"


class PatchTransformer(nn.Module):
    def __init__(self, classes: int, depth: int = 4, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, 2, 2)
        self.place = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 32, 0.0, "gelu", batch_first=True, norm_first=True) for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).flatten(2).transpose(1, 2) + self.place
        for block in self.blocks:
            h = block(h)
        out: Tensor = self.head(self.norm(h).mean(1))
        return out


@sick(
    CASES,
    "su_layerwise_rates_rounded_to_zero",
    ("frozen_weights",),
    ("blocks.0", "blocks.1", "blocks.2"),
    source="https://arxiv.org/abs/2106.08254 BEiT's layer-wise learning rates; here the factor is an integer division",
    proof=every(
        unchanged(
            "blocks.0.linear1.weight", "blocks.1.self_attn.in_proj_weight", "blocks.2.linear2.weight", "blocks.2.norm1.weight"
        ),
        lambda plain: _moves(plain, "blocks.3.linear1.weight", "embed.weight"),
    ),
)
def _(seed: int, mended: bool = False) -> Setup:
    data, model = Glyphs(seed), PatchTransformer(6)
    rest = [p for n, p in model.named_parameters() if not n.startswith("blocks")]
    groups = [{"params": rest, "lr": 2e-3}]
    for k, block in enumerate(model.blocks):
        factor = (k + 1) / 4 if mended else (k + 1) // 4
        groups.append({"params": list(block.parameters()), "lr": 2e-3 * factor})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y)

    return fit(model, loss, optimizer, 40)


class Vae(nn.Module):
    def __init__(self, latent: int = 6) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, 48), nn.ReLU(), nn.Linear(48, 64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_var = self.encoder(x).chunk(2, 1)
        z = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
        kl = -0.5 * (1 + log_var - mean.square() - log_var.exp()).sum(1).mean()
        return self.decoder(z).view(x.shape), kl


@sick(
    CASES,
    "su_vae_encoder_cleared_before_the_step",
    ("frozen_weights",),
    ("encoder",),
    source="https://arxiv.org/abs/1512.09300 VAE-GAN keeps an optimizer a part; here the encoder's gradient is cleared ahead of its step",
    proof=every(
        unchanged("encoder.1.weight", "encoder.3.weight"), lambda plain: _moves(plain, "decoder.0.weight", "decoder.2.weight")
    ),
)
def _(seed: int, mended: bool = False) -> Setup:
    data, model = Glyphs(seed, batch=32), Vae()
    opt_e, opt_d = torch.optim.Adam(model.encoder.parameters(), 3e-3), torch.optim.Adam(model.decoder.parameters(), 3e-3)

    def train() -> Iterator[Event]:
        for _ in range(60):
            x, _y = data()
            if mended:
                opt_e.zero_grad()
            opt_d.zero_grad()
            out, kl = model(x)
            loss = F.mse_loss(out, x) + 0.01 * kl
            loss.backward()
            yield "read", [loss]
            opt_d.step()
            if not mended:
                opt_e.zero_grad()
            opt_e.step()
            yield "step", [opt_d, opt_e]

    return Setup(model, train)


def coordinates(size: int = 16, bands: int = 4) -> Tensor:
    """Sines and cosines of the places in a picture, `[size * size, 4 * bands]`."""
    r = (torch.arange(size) + 0.5) / size * 2 - 1
    grid = torch.stack(torch.meshgrid(r, r, indexing="ij"), -1).view(-1, 2)
    angles = (grid[:, :, None] * math.pi * 2.0 ** torch.arange(-1, bands - 1)).flatten(1)
    return torch.cat([angles.sin(), angles.cos()], 1)


def portrait(seed: int, size: int = 16) -> Tensor:
    """One smooth picture of unit variance, `[size * size, 1]`."""
    picture = Glyphs(seed, classes=1, size=size).patterns[0].view(-1, 1)
    return picture - picture.mean()


@sick(
    CASES,
    "su_coordinate_net_rate_of_one_half",
    ("update_ratio_too_large", "loss_diverging", "exploding_gradient"),
    source="https://arxiv.org/abs/2006.10739 Fourier features; the learning rate of plain SGD given to Adam",
    proof=every(update_ratio(above=0.5, last=3), loss_grows(30, last=15), gradient_grows("2.weight", 30, to=14)),
    also=("dead_units", "gradient_spike", "loss_spike"),
)
def _(seed: int, mended: bool = False) -> Setup:
    x, y = coordinates(), portrait(seed)
    model = nn.Sequential(nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 48), nn.GELU(), nn.Linear(48, 1))
    return fit(model, lambda i: F.mse_loss(model(x), y), torch.optim.Adam(model.parameters(), 3e-3 if mended else 0.5), 50)


class Separator(nn.Module):
    """Masks the magnitudes of a mixture, one mask a source."""

    def __init__(self, bins: int = 17, width: int = 32) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv1d(bins, width, 3, 1, 1), nn.BatchNorm1d(width), nn.ReLU(), nn.Conv1d(width, width, 3, 1, 1)
        )
        self.masks = nn.Sequential(nn.BatchNorm1d(width), nn.ReLU(), nn.Conv1d(width, 2 * bins, 1))

    def forward(self, magnitude: Tensor) -> Tensor:
        masks = torch.sigmoid(self.masks(self.net(magnitude))).unflatten(1, (2, -1))  # type: ignore[no-untyped-call]
        value: Tensor = masks * magnitude[:, None]
        return value


class Mixtures:
    """A low tone and a high one: the magnitudes of their sum and of each."""

    def __init__(self, seed: int) -> None:
        self.tones = Tones(seed, classes=6)

    def __call__(self) -> tuple[Tensor, Tensor]:
        g = self.tones.g
        low, high = (self.tones.tone(torch.randint(a, a + 3, (16,), generator=g)) for a in (0, 3))
        low, high = low * (0.3 + torch.rand(16, 1, 1, generator=g)), high * (0.3 + torch.rand(16, 1, 1, generator=g))
        spec = [
            torch.stft(w[:, 0], 32, hop_length=16, window=torch.hann_window(32), return_complex=True).abs() / 4
            for w in (low + high, low, high)
        ]
        return spec[0], torch.stack(spec[1:], 1)


@sick(
    CASES,
    "su_separator_rate_typed_with_three_zeros_more",
    ("update_ratio_too_small",),
    source="https://karpathy.github.io/2019/04/25/recipe/ a learning rate of the wrong order; an update should be near 1e-3 of the weights",
    proof=every(update_ratio(below=3e-5, last=15), loss_stays(0.1), lambda plain: _moves(plain, "net.0.weight", "masks.2.weight")),
    also=("loss_plateau",),
)
def _(seed: int, mended: bool = False) -> Setup:
    data, model = Mixtures(seed), Separator()

    def loss(i: int) -> Tensor:
        mixed, parts = data()
        return F.l1_loss(model(mixed), parts)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), 3e-3 if mended else 1e-6), 60)


@sick(
    CASES,
    "su_segmenter_climbs_its_loss",
    ("loss_diverging",),
    source="https://github.com/nothinglo/Deep-Photo-Enhancer/issues/57 'a negative sign to the loss so I am maximizing'",
    proof=loss_grows(3, last=15),
    also=("exploding_gradient", "update_ratio_too_large", "gradient_spike", "loss_spike"),
)
def _(seed: int, mended: bool = False) -> Setup:
    data = Spots(seed)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 1, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, maximize=not mended)

    def loss(i: int) -> Tensor:
        x, mask, _ = data()
        return F.binary_cross_entropy_with_logits(model(x), mask)

    return fit(model, loss, optimizer, 20)


@sick(
    CASES,
    "su_one_batch_of_keypoints_in_pixels",
    ("gradient_spike", "loss_spike"),
    source="https://github.com/ultralytics/yolov3/issues/569 non-normalized coordinate labels: here those of one file are in pixels",
    proof=gradient_spikes(30, 10),
    onset=30,
)
def _(seed: int, mended: bool = False) -> Setup:
    data = Spots(seed, noise=0.6)
    model = nn.Sequential(conv(1, 8), conv(8, 8, 2), nn.Flatten(), nn.Linear(288, 32), nn.LeakyReLU(0.1), nn.Linear(32, 2))
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)

    def loss(i: int) -> Tensor:
        x, _, place = data()
        if i == 30 and not mended:
            place = (place + 1) / 2 * 640
        return F.mse_loss(model(x), place)

    return fit(model, loss, optimizer, 42, between=lambda i: clip(model))


@sick(
    CASES,
    "su_labels_shuffled_apart_from_the_pictures",
    ("loss_plateau",),
    source="https://datarekha.com/interview/deep-learning/debugging-model-not-learning/ a loader that shuffles labels but not inputs",
    proof=loss_stays(0.05, last=150),
)
def _(seed: int, mended: bool = False) -> Setup:
    data, model = Glyphs(seed, batch=32), small_classifier()

    def loss(i: int) -> Tensor:
        x, y = data()
        if not mended:
            y = y[torch.randperm(len(y), generator=data.g)]
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=1e-4), 160)


class Enhancer(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv1d(1, width, 9, 1, 4), nn.PReLU(), nn.Conv1d(width, width, 9, 1, 4), nn.PReLU(), nn.Conv1d(width, 1, 9, 1, 4)
        )

    def forward(self, wave: Tensor) -> Tensor:
        out: Tensor = self.net(wave)
        return out


def magnitude(wave: Tensor, floor: float) -> Tensor:
    spec = torch.view_as_real(torch.stft(wave[:, 0], 32, hop_length=16, window=torch.hann_window(32), return_complex=True))
    return spec.square().sum(-1).clamp(min=floor).sqrt()


@sick(
    CASES,
    "su_magnitude_loss_over_padding_under_a_scaler",
    ("loss_scale_collapse", "non_finite_gradient"),
    source="https://github.com/kan-bayashi/ParallelWaveGAN/blob/master/parallel_wavegan/losses/stft_loss.py the clamp under the root",
    proof=lambda plain: _every_update_skipped(plain),
    also=("never_stepped",),
)
def _(seed: int, mended: bool = False) -> Setup:
    data, model = Tones(seed), Enhancer()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    scaler = torch.amp.GradScaler("cpu")

    def train() -> Iterator[Event]:
        for _ in range(40):
            y = torch.randint(5, (16,), generator=data.g)
            clean = data.tone(y)
            wave = clean + 0.5 * torch.randn(clean.shape, generator=data.g)
            valid = (torch.arange(128) < torch.randint(50, 80, (16, 1, 1), generator=data.g)).float()
            optimizer.zero_grad()
            out, target = model(wave) * valid, clean * valid  # clips of different lengths, padded
            floor = 1e-5 if mended else 0.0
            loss = (magnitude(out, floor) - magnitude(target, floor)).abs().mean()
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            yield "read", [loss]
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            yield "step", [] if scaler.get_scale() < scale else [optimizer]

    return Setup(model, train)


def _every_update_skipped(plain: Plain) -> str:
    assert all(math.isnan(s) for steps in plain.steps.values() for s in steps), "some update was not skipped"
    assert all(math.isfinite(x) for x in plain.losses), "the loss is not finite"
    assert all(any(c[i] > 0 for c in plain.nonfinite.values()) for i in range(len(plain.losses))), "some gradients are finite"
    return f"all {len(plain.losses)} updates are skipped"


@sick(
    CASES,
    "su_patch_transformer_ends_in_softmax",
    ("double_softmax",),
    ("2",),
    source="https://openillumi.com/?p=73112 CrossEntropyLoss wants logits, here it gets probabilities",
    proof=lambda plain: _probabilities(plain, "2", 1.04),
)
def _(seed: int, mended: bool = False) -> Setup:
    data = Glyphs(seed, batch=24)
    body = PatchTransformer(6, depth=2)
    model = nn.Sequential(body, nn.Identity(), nn.Identity() if mended else nn.Softmax(dim=-1))
    criterion = nn.CrossEntropyLoss()

    def loss(i: int) -> Tensor:
        x, y = data()
        value: Tensor = criterion(model(x), y)
        return value

    return fit(model, loss, torch.optim.AdamW(model.parameters(), 3e-3), 60)


def _probabilities(plain: Plain, name: str, at_least: float) -> str:
    """The output of a module lies in 0 .. 1 and the loss cannot fall under ln(1 + 5 / e) = 1.04 of six classes."""
    seen = [o for o in plain.outputs[name] if o is not None]
    assert all(o.low >= 0 and o.high <= 1 for o in seen), "no probabilities"
    assert isinstance(plain.setup.model, nn.Sequential)
    assert isinstance(plain.setup.model[-1], nn.Softmax), "there is no softmax"
    assert min(plain.losses) > at_least, f"the loss falls to {min(plain.losses):.3g}"
    return f"probabilities go into the cross-entropy, which stays above {min(plain.losses):.3g}"


@sick(
    CASES,
    "su_every_weight_from_a_unit_normal",
    ("poor_init",),
    ("",),
    source="https://arxiv.org/abs/1502.01852 He et al.: the variance of the weights must be 2 / fan-in",
    proof=lambda plain: _loud_start(plain, 100.0),
    also=("exploding_gradient",),
)
def _(seed: int, mended: bool = False) -> Setup:
    data = Glyphs(seed, channels=3)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, 1, 1),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 6),
    )
    for m in model.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            fan = m.weight[0].numel()
            nn.init.normal_(m.weight, 0.0, math.sqrt(2 / fan) if mended else 1.0)
            if m.bias is not None:
                nn.init.zeros_(m.bias)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 1e-3), 40)


def _loud_start(plain: Plain, above: float) -> str:
    last = list(plain.outputs)[-1]
    logits = plain.outputs[last][0]
    assert logits is not None
    assert logits.rms > above, f"the first logits are of order {logits.rms:.3g}"
    assert plain.losses[0] > 50 * math.log(6), f"the first loss is {plain.losses[0]:.3g}"
    return f"the first logits are of order {logits.rms:.3g} and the first loss is {plain.losses[0]:.3g} where ln 6 = 1.79 is due"


@sick(
    CASES,
    "su_deep_sigmoid_autoencoder",
    ("vanishing_gradient",),
    ("0", "2", "4", "6", "8"),
    source="https://proceedings.mlr.press/v9/glorot10a.html Glorot and Bengio: deep nets of sigmoids",
    proof=every(
        gradient_ratio("0.weight", "16.weight", 1e-4, last=15),
        gradient_ratio("8.weight", "16.weight", 5e-2, last=15),
        loss_stays(0.2),
    ),
    also=("loss_plateau",),
)
def _(seed: int, mended: bool = False) -> Setup:
    data = Glyphs(seed, batch=32, noise=0.2)
    sizes = [64, 48, 40, 32, 24, 32, 40, 48, 48, 64]
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        linear = nn.Linear(a, b)
        if mended:
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        else:
            nn.init.xavier_normal_(linear.weight)
        layers += [linear, nn.ReLU() if mended else nn.Sigmoid()]
    model = nn.Sequential(*layers[:-1])

    def loss(i: int) -> Tensor:
        x = data()[0].flatten(1)
        return F.mse_loss(model(x), x)

    return fit(model, loss, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), 80)


class _Quantise(torch.autograd.Function):
    """Straight-through rounding to `levels` steps. The faulty backward multiplies by `levels`, and forgets the division behind it."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, levels: int, factor: float) -> Tensor:
        ctx.factor = factor  # type: ignore[attr-defined]
        return (x * levels).round() / levels

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] * ctx.factor, None, None  # type: ignore[attr-defined]


class QuantisedBlock(nn.Module):
    def __init__(self, a: int, b: int, stride: int, factor: float) -> None:
        super().__init__()
        self.conv, self.norm, self.factor = nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), factor

    def forward(self, x: Tensor) -> Tensor:
        h = F.hardtanh(0.5 * self.norm(self.conv(x)) + 0.5, 0.0, 1.0)
        out: Tensor = _Quantise.apply(h, 15, self.factor)  # type: ignore[no-untyped-call]
        return out


@sick(
    CASES,
    "su_quantiser_backward_times_levels",
    ("exploding_gradient",),
    ("0", "1", "2", "3", "4"),
    source="https://github.com/zzzxxxttt/pytorch_DoReFaNet/issues/4 'Backward gradient not scaled properly' in a quantiser",
    proof=gradient_ratio("7.weight", "0.conv.weight", 1e-4, last=15),
)
def _(seed: int, mended: bool = False) -> Setup:
    data, f = Glyphs(seed), 1.0 if mended else 15.0
    shapes = ((1, 8, 1), (8, 12, 1), (12, 12, 2), (12, 16, 1), (16, 16, 2))
    model = nn.Sequential(*(QuantisedBlock(a, b, s, f) for a, b, s in shapes), nn.Identity(), nn.Flatten(), nn.Linear(64, 6))

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 3e-3), 50)


class Detector(nn.Module):
    """Is the middle of a square here? One stage, a body and a tower; `biases`: which layers begin with the bias of rare positives."""

    def __init__(self, biases: str, width: int = 12) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(1, width), conv(width, width))
        self.tower = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1), nn.ReLU())
        self.score = nn.Conv2d(width, 1, 3, 1, 1)
        for m in [self.score, *(self.tower if biases == "all" else ())]:
            if isinstance(m, nn.Conv2d):
                nn.init.constant_(m.bias, -math.log(0.99 / 0.01))  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.score(self.tower(self.body(x)))
        return out


def focal(score: Tensor, target: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    p = torch.sigmoid(score)
    wrong = p * (1 - target) + (1 - p) * target
    weight = alpha * target + (1 - alpha) * (1 - target)
    loss = weight * wrong**gamma * F.binary_cross_entropy_with_logits(score, target, reduction="none")
    return loss.sum() / target.sum().clamp(min=1.0)


def middles(mask: Tensor, place: Tensor) -> Tensor:
    """A map of zeros with a one at the middle of each square."""
    size = mask.shape[-1]
    at = ((place + 1) / 2 * (size - 1)).round().long()
    target = torch.zeros_like(mask)
    target[torch.arange(len(mask)), 0, at[:, 0], at[:, 1]] = 1.0
    return target


@sick(
    CASES,
    "su_prior_bias_in_every_layer_of_the_tower",
    ("dead_units", "poor_init"),
    ("tower",),
    source="https://arxiv.org/abs/1708.02002 the prior bias of RetinaNet belongs to the last layer only",
    proof=every(dead_fraction("tower.3", 0.99, last=15), dead_fraction("tower.1", 0.6, last=15)),
    also=("zero_gradient", "vanishing_gradient", "update_ratio_too_small", "loss_plateau"),
)
def _(seed: int, mended: bool = False) -> Setup:
    data, model = Spots(seed), Detector("last" if mended else "all")

    def loss(i: int) -> Tensor:
        x, mask, place = data()
        return focal(model(x), middles(mask, place))

    return fit(model, loss, torch.optim.Adam(model.parameters(), 3e-3), 80)


class Listener(nn.Module):
    """A spectrogram, its frames pooled, and a squashed embedding."""

    def __init__(self, total: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(1, 12), conv(12, 24))
        self.project, self.squash, self.head = nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 5)
        self.total = total

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        pooled = h.sum((2, 3)) if self.total else h.amax((2, 3))
        out: Tensor = self.head(self.squash(self.project(pooled)))
        return out


@sick(
    CASES,
    "su_frames_summed_into_a_tanh",
    ("saturated_activation",),
    ("squash", "project"),
    source="https://proceedings.mlr.press/v9/glorot10a.html saturated tanh; the pooling sums where it should average",
    proof=every(lambda plain: _flat(plain, "squash", 0.95), gradient_ratio("project.bias", "head.bias", 0.05, last=15)),
)
def _(seed: int, mended: bool = False) -> Setup:
    data, model = Tones(seed, length=256), Listener(total=not mended)

    def loss(i: int) -> Tensor:
        wave, y = data()
        return F.cross_entropy(model(spectrogram(wave)), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 3e-3), 40)


def _flat(plain: Plain, name: str, above: float) -> str:
    rms = median(o.rms for o in plain.outputs[name][:15] if o is not None)
    assert rms > above, f"{name} has an rms of {rms:.3g}"
    return f"{name} has an rms of {rms:.3g}"


class OwnNorm(nn.Module):
    """Each channel of each picture by its own mean and deviation; `eps` 0 is the fault."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean((2, 3), keepdim=True)) / (x.std((2, 3), keepdim=True) + self.eps)


@sick(
    CASES,
    "su_black_frame_through_a_norm_without_eps",
    ("non_finite_activation",),
    ("1",),
    source="https://github.com/vanvalenlab/deepcell-tf/issues/445 whole-image normalization has no epsilon in the denominator",
    proof=every(first_non_finite(12, output="1"), lambda plain: _finite_output(plain, "0", 12)),
    onset=12,
    also=("non_finite_loss", "non_finite_gradient", "non_finite_weight"),
)
def _(seed: int, mended: bool = False) -> Setup:
    data = Glyphs(seed, channels=3)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 2, 2), OwnNorm(1e-3 if mended else 0.0), nn.SiLU(), conv(12, 16, 2), nn.Flatten(), nn.Linear(64, 6)
    )

    def loss(i: int) -> Tensor:
        x, y = data()
        if i == 12:
            x[5] = 0.0  # a frame before the film begins
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.RMSprop(model.parameters(), 5e-4), 30)


def _finite_output(plain: Plain, name: str, update: int) -> str:
    seen = plain.outputs[name][update]
    assert seen is not None
    assert seen.nonfinite == 0, f"{name} is not finite"
    return f"{name} is finite at {update}"


@sick(
    CASES,
    "su_own_divergence_meets_hard_labels",
    ("non_finite_loss",),
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.KLDivLoss.html target * (target.log() - input), which is NaN at 0",
    proof=every(first_bad_loss(20), finite_gradients()),
    onset=20,
)
def _(seed: int, mended: bool = False) -> Setup:
    data, student = Glyphs(seed), Net(6)
    templates = data.patterns.flatten(1) / 8.0

    def loss(i: int) -> Tensor:
        x, y = data()
        soft = torch.softmax(x.flatten(1) @ templates.T / 2.0, 1)  # the teacher: matched filters
        p = soft if i < 20 else F.one_hot(y, 6).float()
        q = torch.log_softmax(student(x), 1)
        each = torch.xlogy(p, p) - p * q if mended else p * (p.log() - q)
        return each.sum(1).mean()

    return fit(student, loss, torch.optim.Adam(student.parameters(), 1e-3), 34)


@sick(
    CASES,
    "su_class_reset_to_zero_then_normalised",
    ("non_finite_weight",),
    ("head",),
    source="https://arxiv.org/abs/1704.06369 NormFace keeps class weights of unit length; here without the small constant",
    proof=lambda plain: _weight_goes_bad(plain, "head.weight", 13),
    onset=13,
    also=("non_finite_activation", "non_finite_loss", "non_finite_gradient"),
)
def _(seed: int, mended: bool = False) -> Setup:
    data = Glyphs(seed)
    body = nn.Sequential(conv(1, 8, 2), conv(8, 16, 2), nn.Flatten(), nn.Linear(64, 24))
    head = nn.Linear(24, 6, bias=False)
    model = nn.ModuleDict({"body": body, "head": head})
    with torch.no_grad():
        head.weight.copy_(F.normalize(head.weight, dim=1))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)

    def train() -> Iterator[Event]:
        for i in range(26):
            x, y = data()
            loss = F.cross_entropy(8.0 * head(F.normalize(body(x), dim=1)), y)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            yield "read", [loss]
            optimizer.step()
            with torch.no_grad():
                w = head.weight
                if i == 12:
                    w[5] = 0.0  # its pictures were found to be mislabelled: begin anew
                w.div_(w.norm(dim=1, keepdim=True) + (1e-6 if mended else 0.0))
            yield "step", [optimizer]

    return Setup(model, train)


def _weight_goes_bad(plain: Plain, name: str, update: int) -> str:
    bad = [not math.isfinite(n) for n in plain.weights[name]]
    assert bad.index(True) == update, f"{name} is bad at {bad.index(True)}"
    assert all(math.isfinite(x) for x in plain.losses[:update]), "the loss was bad before"
    others = [n for n, w in plain.weights.items() if n != name and not math.isfinite(w[update])]
    assert not others, f"{others} are bad as well"
    return f"{name} is not finite at {update}, and nothing else"


# ---- healthy ----


class PlainResidual(nn.Module):
    """No normalisation: the second convolution begins at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(width, width, 3, 1, 1), nn.Conv2d(width, width, 3, 1, 1)
        nn.init.kaiming_normal_(self.one.weight, nonlinearity="relu")
        nn.init.zeros_(self.two.weight)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.scale * self.two(F.relu(self.one(x))))


@healthy(
    CASES,
    "su_ok_residuals_and_head_from_zero",
    source="https://arxiv.org/abs/1901.09321 Fixup: the last layer of each branch and the classifier begin at zero",
    proof=converges(0.2),
)
def _(seed: int) -> Setup:
    data = Glyphs(seed, channels=3, noise=2.5)
    head = nn.Linear(192, 6)
    nn.init.zeros_(head.weight)
    blocks = [PlainResidual(12) for _ in range(4)]
    model = nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1), nn.ReLU(), *blocks, nn.Flatten(), head)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x / 2.7), y)

    return fit(model, loss, torch.optim.SGD(model.parameters(), 0.03, momentum=0.9, weight_decay=1e-4), 150)


class ScaledMixerBlock(nn.Module):
    """LayerScale on both branches; in training each branch is left out now and then."""

    def __init__(self, patches: int, width: int, drop: float) -> None:
        super().__init__()
        self.inner = MixerBlock(patches, width)
        self.gamma1, self.gamma2 = nn.Parameter(1e-4 * torch.ones(width)), nn.Parameter(1e-4 * torch.ones(width))
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        if torch.rand(()) >= self.drop:
            x = x + self.gamma1 * self.inner.patch(self.inner.norm1(x).transpose(1, 2)).transpose(1, 2)
        if torch.rand(()) >= self.drop:
            x = x + self.gamma2 * self.inner.channel(self.inner.norm2(x))
        return x


@healthy(
    CASES,
    "su_ok_mixer_with_layerscale_and_dropped_branches",
    source="https://arxiv.org/abs/2103.17239 LayerScale and stochastic depth of CaiT",
    proof=converges(0.2),
)
def _(seed: int) -> Setup:
    data = Glyphs(seed)
    model = Mixer(6, nn.ModuleList(ScaledMixerBlock(16, 16, 0.1 + 0.1 * k) for k in range(4)))
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}], 4e-3)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y)

    return fit(model, loss, optimizer, 200)


@healthy(
    CASES,
    "su_ok_fine_tuning_with_frozen_batch_norm",
    source="https://docs.pytorch.org/vision/stable/generated/torchvision.ops.FrozenBatchNorm2d.html as detectors are fine-tuned",
    proof=converges(0.3),
)
def _(seed: int) -> Setup:
    old, data, model = Glyphs(seed + 50), Glyphs(seed, classes=4, batch=6), Net(6)
    first = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(40):
        x, y = old()
        first.zero_grad()
        F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        first.step()
    first.zero_grad()
    model.head = nn.Sequential(nn.Flatten(), nn.Linear(256, 4))
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval().requires_grad_(False)
    body = [p for p in (*model.stem.parameters(), *model.body.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": body, "lr": 2e-4}, {"params": model.head.parameters(), "lr": 2e-3}])

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y)

    return fit(model, loss, optimizer, 100)


@healthy(
    CASES,
    "su_ok_focal_detector_with_rare_positives",
    source="https://arxiv.org/abs/1708.02002 focal loss with a prior bias; two batches of three hold no object at all",
    proof=lambda plain: _finds_the_squares(plain, 0.8),
)
def _(seed: int) -> Setup:
    data, model = Spots(seed), Detector("last")

    def loss(i: int) -> Tensor:
        x, mask, place = data()
        target = middles(mask, place)
        if torch.rand((), generator=data.g) < 0.67:
            x, target = x - 3.0 * mask, torch.zeros_like(target)
        return focal(model(x), target)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 2e-3), 200)


def _finds_the_squares(plain: Plain, share: float) -> str:
    x, mask, place = Spots(99, batch=64)()
    assert isinstance(plain.setup.model, Detector)
    with torch.no_grad():
        score = plain.setup.model.eval()(x).flatten(1)
    right = float((score.argmax(1) == middles(mask, place).flatten(1).argmax(1)).double().mean())
    sure = float((score.max(1).values > 0).double().mean())
    assert min(right, sure) > share, f"finds {right:.3g} of the squares, sure of {sure:.3g}"
    return f"finds {right:.3g} of the squares, and is sure of {sure:.3g}"


@healthy(
    CASES,
    "su_ok_hinge_gan_in_balance",
    source="https://arxiv.org/abs/1802.05957 the hinge loss of adversarial nets, with spectral norms; its losses do not fall",
    proof=lambda plain: _paints_the_patterns(plain, 0.5),
)
def _(seed: int) -> Setup:
    data, painter, judge = Glyphs(seed, classes=2, batch=16, noise=0.15), Upscaler(), critic()
    for m in judge:
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            nn.utils.parametrizations.spectral_norm(m)
    painter.patterns = data.patterns  # for the proof alone
    opt_p = torch.optim.Adam(painter.parameters(), 2e-3, betas=(0.5, 0.99))
    opt_j = torch.optim.Adam(judge.parameters(), 4e-3, betas=(0.5, 0.99))

    def train() -> Iterator[Event]:
        for _ in range(180):
            x, _y = data()
            opt_j.zero_grad()
            with torch.no_grad():
                fake = painter(torch.randn(16, 8))
            judged = F.relu(1 - judge(x)).mean() + F.relu(1 + judge(fake)).mean()
            judged.backward()  # type: ignore[no-untyped-call]
            opt_j.step()
            opt_p.zero_grad()
            judge.requires_grad_(False)
            loss = -judge(painter(torch.randn(16, 8))).mean()
            loss.backward()
            judge.requires_grad_(True)
            yield "read", [judged, loss]
            opt_p.step()
            yield "step", [opt_j, opt_p]

    return Setup({"painter": painter, "judge": judge}, train)


def _paints_the_patterns(plain: Plain, below: float) -> str:
    """How far a painted picture is from the nearest pattern, where an empty one is at a distance near 1."""
    assert isinstance(plain.setup.model, dict)
    painter = plain.setup.model["painter"]
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        fake = painter(torch.randn(64, 8, generator=generator))
    patterns = painter.patterns
    far = (fake[:, None] - patterns[None]).square().mean((2, 3, 4)).min(1).values.mean()
    assert float(far) < below, f"the pictures are {float(far):.3g} from the nearest pattern"
    return f"the pictures are {float(far):.3g} from the nearest pattern"


@healthy(
    CASES,
    "su_ok_codebook_with_codes_never_chosen",
    source="https://arxiv.org/abs/1711.00937 VQ-VAE: the straight-through estimator; most of the 96 codes are never used",
    proof=every(converges(0.4), lambda plain: _codes_unused(plain, 20)),
)
def _(seed: int) -> Setup:
    data, model = Glyphs(seed, noise=0.15, batch=24), VectorQuantised(96, 4, straight_through=True)

    def loss(i: int) -> Tensor:
        x, _ = data()
        out, extra = model(x)
        value: Tensor = F.mse_loss(out, x) + extra
        return value

    return fit(model, loss, torch.optim.Adam(model.parameters(), 4e-3), 200)


def _codes_unused(plain: Plain, at_least: int) -> str:
    assert isinstance(plain.setup.model, VectorQuantised)
    grad = plain.setup.model.codebook.weight.grad
    assert grad is not None
    unused = int((grad == 0).all(1).sum())
    assert unused >= at_least, f"only {unused} codes get no gradient"
    return f"{unused} codes of {len(grad)} get no gradient in the last update"


@healthy(
    CASES,
    "su_ok_vae_with_kl_from_zero",
    source="https://arxiv.org/abs/1511.06349 KL annealing: the weight of the KL term grows from 0",
    proof=converges(0.6),
)
def _(seed: int) -> Setup:
    data, model = Glyphs(seed, batch=32, noise=0.2), Vae()

    def loss(i: int) -> Tensor:
        x, _ = data()
        out, kl = model(x)
        value: Tensor = F.mse_loss(out, x) + 0.02 * min(1.0, i / 120) * kl
        return value

    return fit(model, loss, torch.optim.Adam(model.parameters(), 3e-3), 250)


class Coupling(nn.Module):
    """Half of the pixels scale and shift the other half; it begins as the identity."""

    def __init__(self, flip: bool, dim: int = 16) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim // 2, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, dim))
        nn.init.zeros_(self.net[4].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.net[4].bias)  # type: ignore[arg-type]
        self.flip = flip

    def forward(self, x: Tensor, log_det: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, 1)
        if self.flip:
            a, b = b, a
        scale, shift = self.net(a).chunk(2, 1)
        scale = torch.tanh(scale)
        b = b * scale.exp() + shift
        return torch.cat([b, a] if self.flip else [a, b], 1), log_det + scale.sum(1)


class Flow(nn.Module):
    def __init__(self, dim: int = 16, depth: int = 6) -> None:
        super().__init__()
        self.steps = nn.ModuleList(Coupling(bool(k % 2), dim) for k in range(depth))
        self.log_scale = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        log_det = self.log_scale.sum().expand(len(x))
        x = x * self.log_scale.exp()
        for step in self.steps:
            x, log_det = step(x, log_det)
        return (0.5 * x.square() + 0.5 * math.log(2 * math.pi)).sum(1) - log_det


@healthy(
    CASES,
    "su_ok_flow_whose_loss_passes_zero",
    source="https://arxiv.org/abs/1605.08803 Real NVP: couplings that begin as the identity; a density may be above 1",
    proof=lambda plain: _passes_zero(plain, -0.1),
)
def _(seed: int) -> Setup:
    data, model = Glyphs(seed, classes=3, batch=64, size=4, noise=0.1), Flow()
    optimizer = torch.optim.Adam(model.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 220)

    def train() -> Iterator[Event]:
        for _ in range(220):
            optimizer.zero_grad()
            loss = model(data()[0].flatten(1)).mean() / 16
            loss.backward()
            yield "read", [loss]
            nn.utils.clip_grad_norm_(model.parameters(), 2.0)
            optimizer.step()
            schedule.step()
            yield "step", [optimizer]

    return Setup(model, train)


def _passes_zero(plain: Plain, below: float) -> str:
    a, b = median(plain.losses[:10]), median(plain.losses[-20:])
    assert all(math.isfinite(x) for x in plain.losses), "a loss is not finite"
    assert a > 0.5, f"the loss begins at {a:.3g}"
    assert b < below, f"the loss ends at {b:.3g}"
    return f"the loss falls from {a:.3g} to {b:.3g}"


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.eye = nn.Sequential(conv(1, 8), conv(8, 12, 2), nn.Flatten(), nn.Linear(192, 16, bias=False))
        self.ear = nn.Sequential(
            nn.Conv1d(17, 24, 3, 1, 1),
            nn.GroupNorm(4, 24),
            nn.GELU(),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
            nn.Linear(24, 16, bias=False),
        )
        self.log_scale = nn.Parameter(torch.tensor(math.log(2.0)))


@healthy(
    CASES,
    "su_ok_pictures_and_sounds_with_learned_temperature",
    source="https://arxiv.org/abs/2103.00020 CLIP: a learned scale of the logits, held below 100",
    proof=every(converges(0.4), lambda plain: _scale_grows(plain)),
)
def _(seed: int) -> Setup:
    data, tones = Glyphs(seed, classes=12), Tones(seed)
    model = TwoTowers()
    towers = [*model.eye.parameters(), *model.ear.parameters()]
    groups: list[dict[str, Any]] = [{"params": towers, "lr": 3e-3}, {"params": [model.log_scale], "lr": 2e-2, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, 3e-3, weight_decay=0.01)

    def loss(i: int) -> Tensor:
        y = torch.randperm(12, generator=data.g)
        x = data.view(data.patterns[y])
        wave = tones.tone(y) + 0.3 * torch.randn(12, 1, tones.length, generator=tones.g)
        a, b = F.normalize(model.eye(x), dim=1), F.normalize(model.ear(spectrogram(wave)[:, 0]), dim=1)
        scores = model.log_scale.exp() * a @ b.T
        return (F.cross_entropy(scores, torch.arange(12)) + F.cross_entropy(scores.T, torch.arange(12))) / 2

    def hold(i: int) -> None:
        with torch.no_grad():
            model.log_scale.clamp_(0.0, math.log(100.0))

    return fit(model, loss, optimizer, 150, before=hold)


def _scale_grows(plain: Plain) -> str:
    w = plain.weights["log_scale"]
    assert all(math.isfinite(x) and x <= math.log(100) + 1e-6 for x in w), "the scale runs away"
    assert w[-1] > w[0] + 0.5, f"the log of the scale ends at {w[-1]:.3g}"
    return f"the log of the scale goes from {w[0]:.3g} to {w[-1]:.3g}"


@healthy(
    CASES,
    "su_ok_own_latent_with_averaged_teacher",
    source="https://arxiv.org/abs/2006.07733 BYOL: a predictor, and a target that is an average and gets no gradient",
    proof=lambda plain: _learns_without_labels(plain),
)
def _(seed: int) -> Setup:
    data = Glyphs(seed, batch=32, classes=8)
    student = nn.Sequential(
        conv(1, 8, 2), conv(8, 16, 2), nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16)
    )
    predictor = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16))
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.SGD([*student.parameters(), *predictor.parameters()], 0.1, momentum=0.9, weight_decay=1e-4)

    def train() -> Iterator[Event]:
        for i in range(200):
            x = data.patterns[torch.randint(8, (32,), generator=data.g)]
            a, b = data.view(x), data.view(x)
            with torch.no_grad():
                ta, tb = teacher(a), teacher(b)
            pa, pb = predictor(student(a)), predictor(student(b))
            loss = -(F.cosine_similarity(pa, tb).mean() + F.cosine_similarity(pb, ta).mean()) / 2
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            yield "read", [loss]
            optimizer.step()
            tau = 1 - 0.05 * (math.cos(math.pi * i / 200) + 1) / 2
            with torch.no_grad():
                for t, p in zip(teacher.parameters(), student.parameters(), strict=True):
                    t.lerp_(p, 1 - tau)
            yield "step", [optimizer]

    return Setup({"student": student, "predictor": predictor, "teacher": teacher}, train)


def _learns_without_labels(plain: Plain) -> str:
    a, b = median(plain.losses[:10]), median(plain.losses[-20:])
    spread = plain.outputs["student"][-1]
    assert spread is not None
    assert b < -0.8, f"the loss ends at {b:.3g}"
    assert isinstance(plain.setup.model, dict)
    with torch.no_grad():
        out = F.normalize(plain.setup.model["student"](torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(3))), dim=1)
    alike = float((out @ out.T).mean())
    assert alike < 0.6, f"all pictures are alike: {alike:.3g}"
    return f"the loss falls from {a:.3g} to {b:.3g}, and pictures are alike by {alike:.3g} only"


class Deep(nn.Module):
    """A classifier with a second head halfway, which is dropped when it has done its work."""

    def __init__(self, classes: int = 6) -> None:
        super().__init__()
        self.low, self.high = nn.Sequential(conv(1, 8), conv(8, 12, 2)), nn.Sequential(conv(12, 12), conv(12, 16, 2))
        self.side = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, classes))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))

    def forward(self, x: Tensor, side: bool) -> tuple[Tensor, Tensor | None]:
        h = self.low(x)
        return self.head(self.high(h)), self.side(h) if side else None


@healthy(
    CASES,
    "su_ok_side_head_dropped_later",
    source="https://arxiv.org/abs/1409.5185 deeply-supervised nets: the companion losses vanish in the course of training",
    proof=converges(0.2),
)
def _(seed: int) -> Setup:
    data, model = Glyphs(seed, noise=0.8), Deep()
    optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9)

    def train() -> Iterator[Event]:
        for i in range(160):
            x, y = data()
            out, side = model(x, i < 60)
            loss = F.cross_entropy(out, y)
            if side is not None:
                loss = loss + 0.3 * (1 - i / 60) * F.cross_entropy(side, y)
            elif i == 60:
                model.side.requires_grad_(False)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


class Growing(nn.Module):
    """Paints 4 x 4 pictures, later 8 x 8, with the new layer faded in."""

    def __init__(self) -> None:
        super().__init__()
        self.small = nn.Sequential(
            nn.Linear(6, 64), nn.LeakyReLU(0.1), nn.Unflatten(1, (4, 4, 4)), nn.Conv2d(4, 16, 3, 1, 1), nn.LeakyReLU(0.1)
        )
        self.to_small = nn.Conv2d(16, 1, 1)
        self.large = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(16, 16, 3, 1, 1), nn.LeakyReLU(0.1))
        self.to_large = nn.Conv2d(16, 1, 3, 1, 1)

    def forward(self, z: Tensor, fade: float) -> Tensor:
        h = self.small(z)
        if fade == 0.0:
            small: Tensor = self.to_small(h)
            return small
        out: Tensor = fade * self.to_large(self.large(h))
        if fade < 1.0:
            out = out + (1 - fade) * F.interpolate(self.to_small(h), scale_factor=2)
        return out


@healthy(
    CASES,
    "su_ok_painter_that_grows",
    source="https://arxiv.org/abs/1710.10196 progressive growing, the new layers faded in",
    proof=converges(0.3),
)
def _(seed: int) -> Setup:
    data, model = Glyphs(seed, batch=24, noise=0.1), Growing()
    model.large.requires_grad_(False)
    model.to_large.requires_grad_(False)
    optimizer = torch.optim.Adam([*model.small.parameters(), *model.to_small.parameters()], 3e-3)

    def train() -> Iterator[Event]:
        for i in range(240):
            if i == 80:
                fresh = [*model.large.requires_grad_(True).parameters(), *model.to_large.requires_grad_(True).parameters()]
                optimizer.add_param_group({"params": fresh})
            if i == 160:
                model.to_small.requires_grad_(False)
            fade = min(1.0, max(0.0, (i - 79) / 80)) if i >= 80 else 0.0
            x, y = data()
            target = x if fade else F.avg_pool2d(x, 2)
            loss = F.mse_loss(model(F.one_hot(y, 6).float(), fade), target)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "su_ok_half_precision_finds_its_scale",
    source="https://docs.pytorch.org/docs/stable/notes/amp_examples.html float16 with a scaler that begins too high and skips",
    proof=lambda plain: _skips_then_learns(plain, 0.3),
)
def _(seed: int) -> Setup:
    data = Glyphs(seed)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 48), nn.LayerNorm(48), nn.GELU(), nn.Linear(48, 48), nn.GELU(), nn.Linear(48, 6)
    )
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=50)

    def train() -> Iterator[Event]:
        for _ in range(120):
            x, y = data()
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = F.cross_entropy(model(x).float(), y)
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            scale = scaler.get_scale()
            scaler.unscale_(optimizer)
            yield "read", [loss]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            yield "step", [] if scaler.get_scale() < scale else [optimizer]

    return Setup(model, train)


def _skips_then_learns(plain: Plain, to: float) -> str:
    skipped = [i for i, s in enumerate(plain.steps["1.weight"]) if math.isnan(s)]
    a, b = median(plain.losses[:10]), median(plain.losses[-20:])
    assert 0 < len(skipped) < 12, f"{len(skipped)} updates are skipped"
    assert b < to * a, f"the loss goes from {a:.3g} to {b:.3g}"
    return f"updates {skipped} are skipped, and the loss falls from {a:.3g} to {b:.3g}"


@healthy(
    CASES,
    "su_ok_denoiser_warmed_up_from_zero",
    source="https://arxiv.org/abs/2006.11239 DDPM: a last layer of zeros, an average of the weights, a warm-up from rate 0",
    proof=converges(0.5),
)
def _(seed: int) -> Setup:
    data, model = Glyphs(seed, noise=0.1, batch=32), Denoiser()
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.98))  # type: ignore[no-untyped-call]
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: i / 25 if i < 25 else 0.5 + 0.5 * math.cos(math.pi * (i - 25) / 175)
    )

    def train() -> Iterator[Event]:
        for _ in range(200):
            loss = denoising(data, model)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            yield "read", [loss]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
            yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "su_ok_style_through_a_frozen_net",
    source="https://arxiv.org/abs/1603.08155 perceptual losses: the loss network is fixed, and the gradient passes through it",
    proof=converges(0.45),
)
def _(seed: int) -> Setup:
    data = Glyphs(seed, noise=0.2)
    eye = nn.Sequential(nn.Conv2d(1, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU()).requires_grad_(False)
    painter = nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1), nn.InstanceNorm2d(16, affine=True), nn.ReLU(), nn.Conv2d(16, 1, 3, 1, 1))
    for k in (0, 2):
        nn.init.kaiming_normal_(eye[k].weight, nonlinearity="relu")  # type: ignore[arg-type]
    nn.init.zeros_(painter[3].weight)  # type: ignore[arg-type]

    def gram(h: Tensor) -> Tensor:
        f = h.flatten(2)
        return f @ f.transpose(1, 2) / f.shape[2]

    with torch.no_grad():
        stripes = torch.sin(torch.arange(8) * 1.6).expand(1, 1, 8, 8) * 2.0
        style = [gram(eye[:k](stripes)) for k in (2, 4)]

    def loss(i: int) -> Tensor:
        x, _ = data()
        out = x + painter(x)
        content = F.mse_loss(eye(out), eye(x))
        return sum(
            (F.mse_loss(gram(eye[:k](out)), s.expand(len(x), -1, -1)) for k, s in zip((2, 4), style, strict=True)), 0.02 * content
        )

    return fit(nn.ModuleDict({"painter": painter, "eye": eye}), loss, torch.optim.Adam(painter.parameters(), 4e-3), 180)
