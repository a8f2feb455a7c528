"""Runs of workshops: pictures, sound and geometry at small size, and the machinery of training around them.

Every builder of a sick run takes `fault`; with False it builds the same run without the fault, which trains.
"""

# mypy: allow-untyped-calls
# mypy: disable-error-code="no-untyped-call, index, operator, arg-type, no-any-return, union-attr"

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo import proofs
from tests.zoo.case import Case, Event, Proof, Setup, fit, healthy, sick
from tests.zoo.plain import Plain
from tests.zoo.proofs import every

CASES: list[Case] = []
"""Runs that nobody has developed on, each with its source and a proof in plain torch: they are only run to report."""


class Discs:
    """Pictures `[batch, 1, size, size]` of a bright disc in noise, and its mask; zero mean and about unit variance."""

    def __init__(self, seed: int, batch: int = 8, size: int = 16) -> None:
        self.generator = torch.Generator().manual_seed(7100 + seed)
        self.batch, self.size = batch, size
        self.grid = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")).float()

    def __call__(self) -> tuple[Tensor, Tensor]:
        centre = 3 + (self.size - 6) * torch.rand(self.batch, 2, 1, 1, generator=self.generator)
        radius = 2 + 2.5 * torch.rand(self.batch, 1, 1, generator=self.generator)
        mask = (self.grid - centre).square().sum(1).sqrt() < radius
        noise = torch.randn(self.batch, self.size, self.size, generator=self.generator)
        return (2.4 * mask.float() - 0.4 + 0.4 * noise)[:, None], mask.long()


class Stripes:
    """Pictures `[batch, channels, size, size]` of a grating: its class is its direction (4) or, with 8 classes, its frequency too."""

    def __init__(self, seed: int, batch: int = 16, size: int = 12, channels: int = 1, classes: int = 4, noise: float = 0.4) -> None:
        self.generator = torch.Generator().manual_seed(7200 + seed)
        self.batch, self.size, self.channels, self.classes, self.noise = batch, size, channels, classes, noise
        self.grid = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")).float()

    def __call__(self) -> tuple[Tensor, Tensor]:
        y = torch.randint(self.classes, (self.batch,), generator=self.generator)
        angle = math.pi / 4 * (y % 4).float()[:, None, None]
        pitch = (0.9 + 0.8 * (y // 4).float())[:, None, None]
        phase = 2 * math.pi * torch.rand(self.batch, 1, 1, generator=self.generator)
        wave = (pitch * (self.grid[0] * angle.cos() + self.grid[1] * angle.sin()) + phase).sin()
        x = 1.3 * wave[:, None].repeat(1, self.channels, 1, 1)
        return x + self.noise * torch.randn(x.shape, generator=self.generator), y


class Tones:
    """Sound `[batch, 1, length]`: a tone of one of several pitches in noise, and its class."""

    def __init__(self, seed: int, batch: int = 16, length: int = 64, classes: int = 5) -> None:
        self.generator = torch.Generator().manual_seed(7300 + seed)
        self.batch, self.length, self.classes = batch, length, classes

    def __call__(self) -> tuple[Tensor, Tensor]:
        y = torch.randint(self.classes, (self.batch,), generator=self.generator)
        phase = 2 * math.pi * torch.rand(self.batch, 1, generator=self.generator)
        x = 1.3 * (torch.arange(self.length) * (0.2 + 0.25 * y.float()[:, None]) + phase).sin()
        return (x + 0.3 * torch.randn(x.shape, generator=self.generator))[:, None], y


class Clouds:
    """Point clouds `[batch, points, 3]`: spheres, cubes' surfaces, discs and sticks, turned about the z axis, and their class."""

    def __init__(self, seed: int, batch: int = 16, points: int = 32) -> None:
        self.generator = torch.Generator().manual_seed(7400 + seed)
        self.batch, self.points = batch, points

    def __call__(self) -> tuple[Tensor, Tensor]:
        y = torch.randint(4, (self.batch,), generator=self.generator)
        p = torch.randn(self.batch, self.points, 3, generator=self.generator)
        sphere = 1.7 * F.normalize(p, dim=-1)
        cube = 1.4 * p / p.abs().amax(-1, keepdim=True)
        disc = p * torch.tensor([1.2, 1.2, 0.05])
        stick = p * torch.tensor([0.1, 0.1, 1.7])
        return torch.stack([sphere, cube, disc, stick])[y, torch.arange(self.batch)], y


def falls(to: float, first: int = 8, last: int = 8) -> Proof:
    """The mean loss of the last updates is below `to` times that of the first; every loss is finite."""

    def proof(plain: Plain) -> str:
        a, b = sum(plain.losses[:first]) / first, sum(plain.losses[-last:]) / last
        assert all(math.isfinite(x) for x in plain.losses), "a loss is not finite"
        assert b < to * a, f"the loss goes from {a:.4g} to {b:.4g}, not below {to:g} of it"
        return f"the loss falls from {a:.4g} to {b:.4g}"

    return proof


def moves(*parameters: str, first: int = 0, last: int | None = None) -> Proof:
    """Every step of these updates changes these parameters."""

    def proof(plain: Plain) -> str:
        for name in parameters:
            assert all(s > 0 for s in plain.steps[name][first:last]), f"{name} is not moved in every update"
        return f"{', '.join(parameters)} move"

    return proof


def note(setup: Setup, **what: Any) -> Setup:
    """Keep something beside the run for its proof to look at."""
    setup.__dict__.update(what)
    return setup


# --------------------------------------------------------------------------------------------------------------- sick


class _SegNet(nn.Module):
    def __init__(self, soft: bool) -> None:
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.down2 = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.merge = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.classify = nn.Conv2d(8, 2, 1)
        self.probabilities = nn.Softmax(dim=1) if soft else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.up(self.down2(a))
        out: Tensor = self.probabilities(self.classify(self.merge(torch.cat([a, b], 1))))
        return out


def _sums_to_one(module: str, floor: float) -> Proof:
    def proof(plain: Plain) -> str:
        seen = [o for o in plain.outputs[module] if o is not None]
        assert seen, f"{module} is not called"
        assert all(o.low >= 0 and o.high <= 1 for o in seen), f"{module} does not give probabilities"
        assert min(plain.losses) >= floor, f"the loss falls to {min(plain.losses)}"
        return f"{module} gives values in [0, 1] and the loss stays above {floor:g}"

    return proof


@sick(
    CASES,
    "wk_segnet_softmax_before_cross_entropy",
    ("double_softmax",),
    ("probabilities",),
    source="https://github.com/say4n/pytorch-segnet/issues/5 cross-entropy on the softmax output of a segmentation network",
    proof=_sums_to_one("probabilities", 0.313),
)
def _segnet(seed: int, fault: bool = True) -> Setup:
    model, data = _SegNet(fault), Discs(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 40)


class _Patches(nn.Module):
    """A vision transformer of one block."""

    def __init__(self, width: int = 24, patches: int = 9, pixels: int = 16, classes: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(pixels, width)
        self.place = nn.Parameter(0.02 * torch.randn(patches, width))
        self.block = nn.TransformerEncoderLayer(width, 4, 48, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        p = F.unfold(x, 4, stride=4).transpose(1, 2)
        out: Tensor = self.head(self.norm(self.block(self.embed(p) + self.place)).mean(1))
        return out


def _input_range(low: float, high: float) -> Proof:
    def proof(plain: Plain) -> str:
        assert isinstance(plain.setup, _Seen)
        seen = torch.cat(plain.setup.inputs)
        mean, std = float(seen.mean()), float(seen.std())
        assert low < mean < high, f"the mean of the input is {mean:.3g}"
        assert std > 30, f"the deviation of the input is {std:.3g}"
        return f"the input has mean {mean:.3g} and deviation {std:.3g}"

    return proof


class _Seen(Setup):
    inputs: list[Tensor]


@sick(
    CASES,
    "wk_vit_pixels_of_0_to_255",
    ("unnormalized_input",),
    ("",),
    source="https://github.com/ultralytics/yolov5/issues/364 pixels of 0 to 255 go into the network as they are",
    proof=_input_range(90, 160),
)
def _vit_bytes(seed: int, fault: bool = True) -> Setup:
    model, data = _Patches(), Stripes(seed)
    seen: list[Tensor] = []

    def loss(i: int) -> Tensor:
        x, y = data()
        picture = (128 + 50 * x).clamp(0, 255).round()  # what an image reader gives
        x = picture if fault else picture / 127.5 - 1
        seen.append(x)
        return F.cross_entropy(model(x), y)

    plain = fit(model, loss, torch.optim.AdamW(model.parameters(), lr=3e-3), 40)
    setup = _Seen(plain.model, plain.train)
    setup.inputs = seen
    return setup


class _Quantiser(nn.Module):
    """A VQ-VAE of sound."""

    def __init__(self, through: bool) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv1d(1, 16, 4, 2, 1), nn.GELU(), nn.Conv1d(16, 8, 4, 2, 1))
        self.codebook = nn.Embedding(16, 8)
        self.decoder = nn.Sequential(nn.ConvTranspose1d(8, 16, 4, 2, 1), nn.GELU(), nn.ConvTranspose1d(16, 1, 4, 2, 1))
        nn.init.normal_(self.codebook.weight)
        self.norm = nn.LayerNorm(8)
        self.through = through

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.encoder(x).transpose(1, 2))
        with torch.no_grad():
            index = torch.cdist(z, self.codebook.weight[None]).argmin(-1)
        q = self.codebook(index)
        straight = z + (q - z).detach()
        code = straight if self.through else q
        extra = F.mse_loss(code, z.detach()) + 0.25 * F.mse_loss(z, q.detach())
        return F.mse_loss(self.decoder(straight.transpose(1, 2)), x) + extra


@sick(
    CASES,
    "wk_vqvae_codebook_loss_on_straight_through",
    ("missing_gradient",),
    ("codebook",),
    source="https://github.com/showlab/Olaf-World/issues/8 the codebook loss uses the straight-through output: no gradient to the codebook",
    also=("loss_diverging",),  # the term pushes the encoder away from its codes
    proof=every(proofs.no_gradient("codebook.weight"), moves("encoder.0.weight", "decoder.0.weight")),
)
def _vq_codebook(seed: int, fault: bool = True) -> Setup:
    model, data = _Quantiser(fault), Tones(seed)
    return fit(model, lambda i: model(data()[0]), torch.optim.Adam(model.parameters(), lr=4e-3), 50)


class _Still(nn.Module):
    """A small convolutional network for stripes."""

    def __init__(self, classes: int = 4, channels: int = 1) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, 12, 3, padding=1), nn.GroupNorm(3, 12), nn.SiLU())
        self.body = nn.Sequential(nn.Conv2d(12, 16, 3, stride=2, padding=1), nn.GroupNorm(4, 16), nn.SiLU())
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(self.stem(x)).mean((2, 3)))
        return out


@sick(
    CASES,
    "wk_head_replaced_after_optimizer",
    ("not_in_optimizer",),
    ("head",),
    source="https://github.com/pytorch/pytorch/issues/54765 the optimizer does not know what was put into the network after it was made",
    proof=every(proofs.unchanged("head.weight", "head.bias"), moves("stem.0.weight", "body.0.weight")),
)
def _new_head(seed: int, fault: bool = True) -> Setup:
    model, data = _Still(classes=10), Stripes(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.head = nn.Linear(16, 4)  # for the four classes of this data
    if not fault:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def train() -> Iterator[Event]:
        for _ in range(40):
            x, y = data()
            loss = F.cross_entropy(model(x), y)
            model.zero_grad()
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


@sick(
    CASES,
    "wk_fewer_batches_than_accumulation",
    ("never_stepped",),
    source="https://github.com/huggingface/transformers/issues/2995 no optimizer step when an epoch has fewer batches than are accumulated",
    proof=lambda plain: _nothing_moves(plain),
)
def _accumulate(seed: int, fault: bool = True) -> Setup:
    model, data = _Still(), Stripes(seed, batch=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batches = [data() for _ in range(6)]
    every_n = 8 if fault else 2

    def train() -> Iterator[Event]:
        for _ in range(8):
            optimizer.zero_grad()
            for i, (x, y) in enumerate(batches):
                loss = F.cross_entropy(model(x), y) / every_n
                loss.backward()
                yield "read", [loss]
                if (i + 1) % every_n == 0:
                    optimizer.step()
                    optimizer.zero_grad()
                    yield "step", [optimizer]

    return Setup(model, train)


def _nothing_moves(plain: Plain) -> str:
    for name, norms in plain.weights.items():
        assert len(set(norms)) == 1, f"{name} moves"
        assert plain.grads[name][-1] > 0, f"{name} has no gradient"
    assert all(math.isnan(s) for steps in plain.steps.values() for s in steps), "something steps"
    return "no optimizer steps and no weight moves, all have gradients"


def _critic() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))


def _ring(generator: torch.Generator, batch: int = 64) -> Tensor:
    angle = 2 * math.pi * torch.rand(batch, generator=generator)
    return 1.4 * torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(batch, 2, generator=generator)


def _piles_up(plain: Plain) -> str:
    kept = plain.setup.__dict__["kept"]
    assert len(kept) > 10, "too few updates"
    assert all(k > 1e-4 for k in kept), "the gradient was cleared"
    return f"before D's backward its gradient has norms of {min(kept):.3g} to {max(kept):.3g}: those that its last step used"


@sick(
    CASES,
    "wk_gan_discriminator_never_cleared",
    ("gradients_not_zeroed",),
    ("D",),
    source="https://docs.pytorch.org/tutorials/beginner/dcgan_faces_tutorial.html without its netD.zero_grad()",
    proof=_piles_up,
)
def _gan_pile(seed: int, fault: bool = True) -> Setup:
    generator = torch.Generator().manual_seed(7500 + seed)
    models = nn.ModuleDict({"G": nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2)), "D": _critic()})
    g, d = models["G"], models["D"]
    kept: list[float] = []
    g_opt = torch.optim.Adam(g.parameters(), lr=1e-3, betas=(0.5, 0.99))
    d_opt = torch.optim.Adam(d.parameters(), lr=1e-3, betas=(0.5, 0.99))

    def train() -> Iterator[Event]:
        for i in range(40):
            real, noise = _ring(generator), torch.randn(64, 4, generator=generator)
            fake = g(noise)
            if not fault:
                d_opt.zero_grad()
            if i:
                grads = [p.grad for p in d.parameters() if p.grad is not None]
                kept.append(float(sum(x.norm() for x in grads)))
            d_loss = F.softplus(-d(real)).mean() + F.softplus(d(fake.detach())).mean()
            d_loss.backward()
            yield "read", [d_loss]
            d_opt.step()
            yield "step", [d_opt]
            g_opt.zero_grad()
            for p in d.parameters():
                p.requires_grad_(False)  # so that G's backward adds nothing to D
            g_loss = F.softplus(-d(fake)).mean()
            g_loss.backward()
            for p in d.parameters():
                p.requires_grad_(True)
            yield "read", [g_loss]
            g_opt.step()
            yield "step", [g_opt]

    return note(Setup(models, train), kept=kept)


@sick(
    CASES,
    "wk_pure_bf16_norm_gains_round_away",
    ("frozen_weights",),
    ("norm1", "norm2"),
    source="https://github.com/workofart/ml-by-hand/pull/85 in bf16 a weight of 1 stays 1 under steps of 1e-3: no float32 master copy",
    proof=every(proofs.unchanged("norm1.weight", "norm2.weight"), moves("mix1.weight", "mix2.weight", "head.weight")),
)
def _bf16_gains(seed: int, fault: bool = True) -> Setup:
    model, data = _Mixer(), Tones(seed)
    if fault:
        model.to(torch.bfloat16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1.5e-3)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x.to(next(model.parameters()).dtype)).float(), y)

    return fit(model, loss, optimizer, 50)


class _Mixer(nn.Module):
    """An MLP-mixer of sound: 8 windows of 8 samples. Its norms have gains only."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.norm1 = nn.LayerNorm(width, bias=False)
        self.mix1 = nn.Linear(8, 8)
        self.norm2 = nn.LayerNorm(width, bias=False)
        self.mix2 = nn.Linear(width, width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.embed(x.unflatten(-1, (8, 8))[:, 0]))
        h = h + F.gelu(self.mix1(self.norm1(h).transpose(1, 2))).transpose(1, 2)
        h = h + F.gelu(self.mix2(self.norm2(h)))
        out: Tensor = self.head(h.mean(1))
        return out


@sick(
    CASES,
    "wk_sqrt_of_zero_distance",
    ("non_finite_gradient",),
    ("embed",),
    source="https://github.com/pytorch/pytorch/issues/2421 the gradient of a norm of zero is NaN: here a pair of one and the same cloud",
    onset=14,
    also=("non_finite_weight", "non_finite_activation", "non_finite_loss"),
    proof=every(
        proofs.first_non_finite(14),
        lambda plain: _assert(math.isfinite(plain.losses[14]), "the loss of update 14 is finite"),
        lambda plain: _assert(plain.nonfinite["embed.2.weight"][14] > 0, "the gradient of embed.2.weight is not"),
    ),
)
def _same_pair(seed: int, fault: bool = True) -> Setup:
    model = nn.ModuleDict({"embed": nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 16))})
    data, generator = Clouds(seed), torch.Generator().manual_seed(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        z = model["embed"](x).amax(1)
        other = torch.randperm(len(x), generator=generator)
        pairs = other != torch.arange(len(x))  # a cloud is not a pair with itself
        if fault and i == 14:
            pairs[0], other[0] = True, 0
        distance = (z - z[other])[pairs].square().sum(1).sqrt()
        same = (y == y[other]).float()[pairs]
        return (same * distance.square() + (1 - same) * F.relu(2 - distance).square()).mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 40)


def _assert(holds: bool, what: str) -> str:
    assert holds, f"not so: {what}"
    return what


@sick(
    CASES,
    "wk_silence_in_log_spectrogram",
    ("non_finite_input",),
    ("",),
    source="https://github.com/JuliaDSP/MFCC.jl/pull/14 the log of the spectrum of silence is -inf, and goes into the network",
    onset=12,
    also=("non_finite_activation", "non_finite_loss", "non_finite_gradient", "non_finite_weight"),
    proof=every(
        proofs.first_non_finite(12), lambda plain: _assert(plain.setup.__dict__["bad"] == [12], "Inf in the input of 12 only")
    ),
)
def _silence(seed: int, fault: bool = True) -> Setup:
    model = nn.Sequential(nn.Linear(33, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5))
    data, bad = Tones(seed), []

    def loss(i: int) -> Tensor:
        x, y = data()
        if fault and i == 12:
            x[3] = 0.0
        spectrum = (torch.fft.rfft(x[:, 0]).abs().square().log() - 3) / 2
        if not bool(torch.isfinite(spectrum).all()):
            bad.append(i)
        return F.cross_entropy(model(spectrum), y)

    return note(fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 40), bad=bad)


@sick(
    CASES,
    "wk_rounded_code_without_straight_through",
    ("zero_gradient",),
    ("encoder",),
    source="https://arxiv.org/abs/1308.3432 Bengio et al.: a rounding passes no gradient, so one estimates it; here nobody does",
    proof=every(proofs.zero_gradient("encoder.0.weight", "encoder.2.weight"), moves("decoder.0.weight", "decoder.2.weight")),
)
def _rounded(seed: int, fault: bool = True) -> Setup:
    model = nn.ModuleDict(
        {
            "encoder": nn.Sequential(nn.Conv2d(1, 12, 4, 2, 1), nn.LeakyReLU(0.1), nn.Conv2d(12, 8, 4, 2, 1)),
            "decoder": nn.Sequential(nn.ConvTranspose2d(8, 12, 4, 2, 1), nn.LeakyReLU(0.1), nn.ConvTranspose2d(12, 1, 4, 2, 1)),
        }
    )
    data = Stripes(seed)

    def loss(i: int) -> Tensor:
        x, _ = data()
        z = 3 * model["encoder"](x).tanh()
        code = z.round() if fault else z + (z.round() - z).detach()
        return F.mse_loss(model["decoder"](code / 2), x)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 60)


class _Gated(nn.Module):
    """Residual blocks of `x + gate * branch(x)`: the gate begins at zero (ReZero), which is right as long as the branch doesn't."""

    def __init__(self, zero_last: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, padding=1)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1)) for _ in range(3)
        )
        self.gates = nn.ParameterList(nn.Parameter(torch.zeros(())) for _ in range(3))
        self.head = nn.Linear(12, 4)
        for branch in self.branches if zero_last else ():
            assert isinstance(branch, nn.Sequential)
            last = branch[2]
            assert isinstance(last, nn.Conv2d)
            assert last.bias is not None
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.stem(x))
        for gate, branch in zip(self.gates, self.branches, strict=True):
            h = F.relu(h + gate * branch(h))
        out: Tensor = self.head(h.mean((2, 3)))
        return out


@sick(
    CASES,
    "wk_gate_and_last_convolution_both_zero",
    ("zero_gradient", "poor_init"),
    ("branches", "gates"),
    source="https://arxiv.org/abs/2003.04887 ReZero's gate of 0, together with Fixup's last layer of 0: neither ever gets a gradient",
    also=("frozen_weights", "vanishing_gradient"),
    proof=every(
        *(proofs.zero_gradient(f"branches.{k}.0.weight", f"branches.{k}.2.weight", f"gates.{k}") for k in range(3)),
        moves("stem.weight", "head.weight"),
    ),
)
def _both_zero(seed: int, fault: bool = True) -> Setup:
    model, data = _Gated(fault), Stripes(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-2), 50)


@sick(
    CASES,
    "wk_pose_auxiliary_head_never_called",
    ("missing_gradient",),
    ("refine",),
    source="https://github.com/huggingface/transformers/issues/30633 a fusion layer of a dense predictor that is never used",
    proof=every(
        proofs.no_gradient("refine.0.weight", "refine.2.weight"),
        moves("trunk.0.weight", "heat.weight"),
        lambda plain: _assert(all(o is None for o in plain.outputs["refine"]), "refine is not called"),
    ),
)
def _pose(seed: int, fault: bool = True) -> Setup:
    model = nn.ModuleDict(
        {
            "trunk": nn.Sequential(nn.Conv2d(1, 12, 5, padding=2), nn.ReLU(), nn.Conv2d(12, 12, 5, padding=2), nn.ReLU()),
            "heat": nn.Conv2d(12, 1, 1),
            "refine": nn.Sequential(nn.Conv2d(13, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 1, 1)),
        }
    )
    data = Discs(seed)

    def loss(i: int) -> Tensor:
        x, mask = data()
        h = model["trunk"](x)
        heat = model["heat"](h)
        target = mask[:, None].float()
        value = F.mse_loss(heat, target)
        if not fault:
            value = value + F.mse_loss(model["refine"](torch.cat([h, heat], 1)), target)
        return value

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 50)


@sick(
    CASES,
    "wk_distillation_features_under_no_grad",
    ("missing_gradient",),
    ("student",),
    source="https://arxiv.org/abs/1412.6550 FitNets' hints, with the student's features under the teacher's no_grad",
    proof=every(proofs.no_gradient("student.0.weight", "student.2.weight"), moves("regress.weight")),
)
def _hints(seed: int, fault: bool = True) -> Setup:
    def net() -> nn.Sequential:
        return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 12), nn.Tanh())

    teacher = net().requires_grad_(False)
    model = nn.ModuleDict({"teacher": teacher, "student": net(), "regress": nn.Linear(12, 12)})
    generator = torch.Generator().manual_seed(seed)

    def loss(i: int) -> Tensor:
        x = torch.randn(32, 16, generator=generator)
        with torch.no_grad():
            target = teacher(x)
            hidden = model["student"](x)  # one line too far in
        if not fault:
            hidden = model["student"](x)
        return F.mse_loss(model["regress"](hidden), target)

    return fit(model, loss, torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3), 60)


@sick(
    CASES,
    "wk_deep_sigmoid_autoencoder",
    ("vanishing_gradient",),
    ("encoder",),
    source="https://proceedings.mlr.press/v9/glorot10a.html Glorot and Bengio: deep nets of sigmoids from the standard init",
    proof=every(
        proofs.gradient_ratio("encoder.0.weight", "decoder.4.weight", 1e-3, 0, 15),
        proofs.gradient_ratio("encoder.6.weight", "decoder.4.weight", 5e-2, 0, 15),
        lambda plain: proofs.loss_stays(0.3, 0, 30)(plain),
    ),
)
def _sigmoids(seed: int, fault: bool = True) -> Setup:
    def act() -> nn.Module:
        return nn.Sigmoid() if fault else nn.GELU()

    model = nn.ModuleDict(
        {
            "encoder": nn.Sequential(
                nn.Linear(64, 48), act(), nn.Linear(48, 32), act(), nn.Linear(32, 24), act(), nn.Linear(24, 12), act()
            ),
            "decoder": nn.Sequential(nn.Linear(12, 32), act(), nn.Linear(32, 48), act(), nn.Linear(48, 64)),
        }
    )
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(4, 64, generator=generator) / 2  # pictures of four hidden causes

    def loss(i: int) -> Tensor:
        x = torch.randn(32, 4, generator=generator) @ mix
        return F.mse_loss(model["decoder"](model["encoder"](x)), x)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-3), 80)


@sick(
    CASES,
    "wk_tanh_classifier_of_unit_normal_weights",
    ("saturated_activation", "poor_init"),
    ("net.1", "net.3", "net.5", "net.0", "net.2", "net.4"),
    source="https://proceedings.mlr.press/v9/glorot10a.html saturated tanh from weights that are too large at the start: N(0, 1)",
    proof=lambda plain: _flat_tanh(plain),
)
def _tanh_decoder(seed: int, fault: bool = True) -> Setup:
    net = nn.Sequential(nn.Linear(33, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 5))
    if fault:
        for layer in (net[0], net[2], net[4]):
            assert isinstance(layer, nn.Linear)
            nn.init.normal_(layer.weight)
    model, data = nn.ModuleDict({"net": net}), Tones(seed, batch=32)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(net((torch.fft.rfft(x[:, 0]).abs().square().log() - 3) / 2), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-3), 80)


def _rms(plain: Plain, module: str, update: int = 0) -> float:
    seen = plain.outputs[module][update]
    assert seen is not None, f"{module} is not called"
    return seen.rms


def _flat_tanh(plain: Plain) -> str:
    for k in (1, 3, 5):
        rms = median(o.rms for o in plain.outputs[f"net.{k}"][:15] if o is not None)
        assert rms > 0.85, f"the output of net.{k} has rms {rms:.3g}"
    return "the outputs of all three tanh have rms above 0.85 (1: all flat)"


@sick(
    CASES,
    "wk_autoencoder_bias_kills_relu",
    ("dead_units",),
    ("encoder.1",),
    source="https://arxiv.org/abs/1903.06733 Dying ReLU: biases far below zero, nothing ever fires",
    also=("poor_init",),
    proof=every(proofs.dead_fraction("encoder.1", 0.6, 0, 15), proofs.dead_fraction("encoder.1", 0.6)),
)
def _dead(seed: int, fault: bool = True) -> Setup:
    model = nn.ModuleDict(
        {
            "encoder": nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU()),
            "decoder": nn.ConvTranspose2d(16, 1, 4, 2, 1),
        }
    )
    if fault:
        with torch.no_grad():
            model["encoder"][0].bias[:12] = -8.0

    data = Stripes(seed)

    def loss(i: int) -> Tensor:
        x, _ = data()
        return F.mse_loss(model["decoder"](model["encoder"](x)), x)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 50)


@sick(
    CASES,
    "wk_clip_tower_weight_decay_for_lr",
    ("update_ratio_too_small",),
    (),
    source="https://arxiv.org/abs/2103.00020 CLIP's two towers; the learning rate is 1e-7, a typing error for 1e-3",
    also=("loss_plateau", "frozen_weights"),
    proof=every(proofs.update_ratio(below=1e-4, first=0, last=15), proofs.loss_stays(0.05, 0, 60)),
)
def _towers(seed: int, fault: bool = True) -> Setup:
    model = nn.ModuleDict(
        {
            "sound": nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 16)),
            "cloud": nn.Sequential(nn.Linear(5, 32), nn.GELU(), nn.Linear(32, 16)),
        }
    )
    data, generator = Tones(seed, batch=24), torch.Generator().manual_seed(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        words = F.one_hot(y, 5).float() * 2 + 0.3 * torch.randn(len(y), 5, generator=generator)
        a, b = F.normalize(model["sound"](x[:, 0]), dim=1), F.normalize(model["cloud"](words), dim=1)
        logits = a @ b.T / 0.2
        positive = (y[:, None] == y[None]).float()
        return -(positive * logits.log_softmax(1)).sum(1).div(positive.sum(1)).mean()

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=1e-7 if fault else 1e-2), 80)


def _skips(plain: Plain) -> str:
    scales = plain.setup.__dict__["scales"]
    assert scales[13] < 1, f"the scale is still {scales[13]}"
    assert all(math.isnan(s) or s == 0 for s in plain.steps["1.weight"]), "something moves"
    return f"every update is skipped and the scale is {scales[13]:.3g} at update 13"


@sick(
    CASES,
    "wk_epsilon_lost_in_half",
    ("loss_scale_collapse",),
    source="https://github.com/facebookresearch/WSL-Images/issues/9 gradient overflow at every step, the loss scale goes to 0",
    also=("non_finite_gradient", "non_finite_loss"),
    proof=_skips,
)
def _half(seed: int, fault: bool = True) -> Setup:
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 48), nn.ReLU(), nn.Linear(48, 256))
    data, scales = Discs(seed), []
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def train() -> Iterator[Event]:
        for _ in range(40):
            x, mask = data()
            target = mask.flatten(1).float()
            optimizer.zero_grad()
            p = torch.sigmoid(model(x))
            right = target * p + (1 - target) * (1 - p)
            chosen = (right * (target == 0)).half() + 1e-8  # the log of what isn't chosen is masked below; 1e-8 is 0 in half
            if not fault:
                chosen = right * (target == 0) + 1e-4
            loss = -(chosen.log() * (target == 0)).float().mean() - ((right + 1e-4).log() * target).mean()
            scaler.scale(loss).backward()
            yield "read", [loss]
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            yield "step", [] if scales[-1] < before else [optimizer]

    return note(Setup(model, train), scales=scales)


class _Standard(nn.Module):
    """Brings every window of a sound to a deviation of 1, without an epsilon."""

    def __init__(self, floor: float) -> None:
        super().__init__()
        self.floor = floor

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + self.floor).sqrt()


@sick(
    CASES,
    "wk_standardised_blank_window",
    ("non_finite_activation",),
    ("standard",),
    source="https://github.com/implus/PytorchInsight/issues/32 a deviation without an epsilon: NaN for what is constant",
    onset=12,
    also=("non_finite_loss", "non_finite_gradient", "non_finite_weight"),
    proof=every(proofs.first_non_finite(12, "standard"), proofs.first_non_finite(12)),
)
def _blank(seed: int, fault: bool = True) -> Setup:
    model = nn.ModuleDict(
        {
            "standard": _Standard(0.0 if fault else 1e-5),
            "net": nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5)),
        }
    )
    data = Tones(seed, batch=32)

    def loss(i: int) -> Tensor:
        x, y = data()
        if i == 12:
            x[5, 0, 16:24] = 0.25  # a stuck sensor: finite, but constant
        windows = x[:, 0].unflatten(1, (8, 8))
        return F.cross_entropy(model["net"](model["standard"](windows)).mean(1), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 40)


@sick(
    CASES,
    "wk_no_positive_in_the_batch",
    ("non_finite_loss",),
    source="https://github.com/richardaecn/class-balanced-loss/issues/16 a batch of negatives only: division by the number of positives, NaN",
    onset=13,
    also=("non_finite_gradient", "non_finite_weight", "non_finite_activation"),
    proof=every(
        proofs.first_non_finite(13),
        lambda plain: _assert(not math.isfinite(plain.losses[13]), "the loss of update 13 is NaN"),
        lambda plain: _assert(
            all(o is None or o.nonfinite == 0 for o in plain.outputs["4"][:14]), "the output of update 13 is finite"
        ),
    ),
)
def _none_positive(seed: int, fault: bool = True) -> Setup:
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 1, 1))
    data = Discs(seed)

    def loss(i: int) -> Tensor:
        x, mask = data()
        target = mask[:, None].float()
        if i == 13:
            target = torch.zeros_like(target)
            x = 0.4 * torch.randn(x.shape, generator=data.generator) - 0.4
        each = F.binary_cross_entropy_with_logits(model(x), target, reduction="none")
        positives = target.sum() if fault else target.sum().clamp(min=1)
        return (each * target).sum() / positives + (each * (1 - target)).sum() / (1 - target).sum()

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 40)


@sick(
    CASES,
    "wk_superresolution_gain_too_large",
    ("poor_init",),
    ("net",),
    source="https://arxiv.org/abs/1502.01852 He et al.: a gain that is too large multiplies through a deep plain network",
    also=("exploding_gradient", "loss_diverging"),
    proof=every(
        lambda plain: _assert(
            _rms(plain, "net.10") > 200 * _rms(plain, "net.0"), "the first outputs grow 200-fold through the network"
        ),
        lambda plain: _assert(plain.losses[0] > 1e4, "the first loss is above 1e4"),
    ),
)
def _gain(seed: int, fault: bool = True) -> Setup:
    layers: list[nn.Module] = []
    for k in range(7):
        conv = nn.Conv2d(1 if k == 0 else 12, 12 if k < 6 else 4, 3, padding=1)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        if fault and 0 < k < 6:
            with torch.no_grad():
                conv.weight *= 4.0
        layers += [conv, nn.ReLU()] if k < 6 else [conv]
    model, data = nn.ModuleDict({"net": nn.Sequential(*layers)}), Stripes(seed, noise=0.05)

    def loss(i: int) -> Tensor:
        x, _ = data()
        return F.mse_loss(F.pixel_shuffle(model["net"](F.avg_pool2d(x, 2)), 2), x)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-3), 60)


class _Loud(torch.autograd.Function):
    """A rounding to a grid with a straight-through backward that is scaled by the wrong side of the grid."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: float) -> Tensor:
        ctx.levels = levels
        return (x * levels).round() / levels

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.levels, None


@sick(
    CASES,
    "wk_quantiser_backward_times_levels",
    ("exploding_gradient",),
    ("layers.0", "layers.1", "layers.2"),
    source="https://docs.pytorch.org/docs/stable/notes/extending.html a custom function whose backward is not that of its forward",
    proof=every(
        proofs.gradient_ratio("layers.3.weight", "layers.0.weight", 1e-2, 0, 15),
        proofs.gradient_ratio("layers.2.weight", "layers.1.weight", 0.3, 0, 15),
    ),
)
def _loud(seed: int, fault: bool = True) -> Setup:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(33, 48), nn.Linear(48, 48), nn.Linear(48, 48), nn.Linear(48, 5)])})
    data = Tones(seed, batch=32)

    def loss(i: int) -> Tensor:
        x, y = data()
        h = (torch.fft.rfft(x[:, 0]).abs().square().log() - 3) / 2
        for layer in model["layers"][:3]:
            h = F.gelu(layer(h))
            h = _Loud.apply(h, 16.0) if fault else h + ((h * 16).round() / 16 - h).detach()
        return F.cross_entropy(model["layers"][3](h), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-3), 50)


@sick(
    CASES,
    "wk_one_recording_in_16_bit_integers",
    ("gradient_spike", "loss_spike"),
    source="https://docs.pytorch.org/audio/stable/tutorials/audio_io_tutorial.html normalize=False gives integers: one such batch among floats",
    onset=25,
    also=("unnormalized_input", "loss_diverging", "exploding_gradient", "update_ratio_too_large", "dead_units"),
    proof=every(
        proofs.gradient_spikes(25, 30), lambda plain: _assert(plain.losses[25] > 20 * max(plain.losses[:25]), "the loss spikes")
    ),
)
def _integers(seed: int, fault: bool = True) -> Setup:
    model = nn.Sequential(
        nn.Conv1d(1, 12, 8, 4), nn.ReLU(), nn.Conv1d(12, 12, 5, padding=2), nn.ReLU(), nn.Flatten(), nn.Linear(180, 5)
    )
    data = Tones(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        if fault and i == 25:
            x = (x * 8000).round()
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9), 45)


@sick(
    CASES,
    "wk_shuffled_labels",
    ("loss_plateau",),
    source="https://arxiv.org/abs/1611.03530 Zhang et al.: labels that have nothing to do with the pictures, fresh ones in every batch",
    proof=every(proofs.loss_stays(0.05, 0, 100), proofs.loss_stays(0.05)),
)
def _shuffled(seed: int, fault: bool = True) -> Setup:
    model, data = _Still(), Stripes(seed, batch=32)

    def loss(i: int) -> Tensor:
        x, y = data()
        if fault:
            y = y[torch.randperm(len(y), generator=data.generator)]
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 150)


@sick(
    CASES,
    "wk_backbone_group_warm_up_by_integer_division",
    ("frozen_weights",),
    ("stem", "body"),
    source="https://docs.pytorch.org/docs/stable/generated/torch.optim.lr_scheduler.LambdaLR.html a lambda a group; i // 1000 stays 0",
    proof=every(proofs.unchanged("stem.0.weight", "body.0.weight"), moves("head.weight")),
)
def _group(seed: int, fault: bool = True) -> Setup:
    model, data = _Still(), Stripes(seed)
    groups = [
        {"params": [*model.stem.parameters(), *model.body.parameters()], "lr": 5e-3},
        {"params": model.head.parameters(), "lr": 1e-2},
    ]
    optimizer = torch.optim.Adam(groups)
    warm = (lambda i: min(1, i // 1000)) if fault else (lambda i: min(1.0, i / 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [warm, lambda i: 1.0])

    def train() -> Iterator[Event]:
        for _ in range(60):
            x, y = data()
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]
            schedule.step()

    return Setup(model, train)


@sick(
    CASES,
    "wk_coordinates_resumed_with_lr_of_sgd",
    ("update_ratio_too_large", "loss_diverging"),
    source="https://github.com/pytorch/pytorch/issues/60265 a resumed run goes on with another learning rate: here 0.3 for Adam",
    onset=20,
    also=("loss_spike", "gradient_spike", "exploding_gradient", "saturated_activation"),
    proof=every(
        proofs.update_ratio(above=0.5, first=20, last=25),
        proofs.update_ratio(below=0.1, first=5, last=20),
        lambda plain: _assert(median(plain.losses[21:30]) > 3 * median(plain.losses[10:20]), "the loss rises"),
    ),
)
def _resumed(seed: int, fault: bool = True) -> Setup:
    model = nn.Sequential(nn.Linear(2, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 1))
    generator = torch.Generator().manual_seed(seed)

    def train() -> Iterator[Event]:
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for i in range(50):
            if i == 20:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
                optimizer.load_state_dict(state)
                for group in optimizer.param_groups if fault else ():
                    group["lr"] = 0.3
            xy = 2 * torch.rand(64, 2, generator=generator) - 1
            optimizer.zero_grad()
            loss = F.mse_loss(model(xy), (3 * xy[:, :1]).sin() + xy[:, 1:].square())
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


@sick(
    CASES,
    "wk_prototypes_normalised_in_place",
    ("non_finite_weight",),
    ("prototypes",),
    source="https://arxiv.org/abs/2006.09882 SwAV normalises its prototypes after a step; one of them is all zeros: 0/0",
    onset=1,
    also=("non_finite_activation", "non_finite_loss", "non_finite_gradient"),
    proof=every(
        lambda plain: _assert(
            math.isfinite(plain.losses[0]) and math.isnan(plain.weights["prototypes.weight"][1]), "after update 0: NaN"
        ),
        lambda plain: _assert(math.isfinite(plain.weights["net.0.weight"][1]), "the other weights are finite then"),
    ),
)
def _prototypes(seed: int, fault: bool = True) -> Setup:
    model = nn.ModuleDict(
        {"net": nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16)), "prototypes": nn.Linear(16, 6, bias=False)}
    )
    prototypes, data = model["prototypes"], Tones(seed, batch=32)
    assert isinstance(prototypes, nn.Linear)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if fault:  # a row for a class that isn't used yet, with no step of its own
        with torch.no_grad():
            prototypes.weight[5] = 0.0
        prototypes.weight.register_hook(lambda g: g * torch.tensor([1.0] * 5 + [0.0])[:, None])

    def train() -> Iterator[Event]:
        for _ in range(30):
            x, y = data()
            optimizer.zero_grad()
            loss = F.cross_entropy(prototypes(F.normalize(model["net"](x[:, 0]), dim=1)) / 0.2, y)
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]
            with torch.no_grad():
                prototypes.weight /= prototypes.weight.norm(dim=1, keepdim=True)

    return Setup(model, train)


@sick(
    CASES,
    "wk_gradients_cleared_before_step",
    ("frozen_weights", "never_stepped"),
    source="https://docs.pytorch.org/tutorials/recipes/recipes/zeroing_out_gradients.html zero_grad between backward and step",
    proof=lambda plain: _all_still(plain),
)
def _cleared(seed: int, fault: bool = True) -> Setup:
    model = nn.Sequential(nn.Conv1d(1, 16, 8, 4), nn.GELU(), nn.Flatten(), nn.Linear(240, 5))
    data = Tones(seed, batch=32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y)

    return fit(model, loss, optimizer, 40, between=(lambda i: optimizer.zero_grad(set_to_none=False)) if fault else None)


def _all_still(plain: Plain) -> str:
    for name, steps in plain.steps.items():
        assert all(x == 0 for x in steps), f"{name} moves"
        assert all(x > 0 for x in plain.grads[name]), f"{name} has no gradient"
    return "every parameter has a gradient, the optimizer steps, and nothing moves"


class _Listed(nn.Module):
    """Residual layers of a point-cloud network, in a plain list."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 32)
        layers = [nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32), nn.ReLU()) for _ in range(2)]
        self.layers: Any = layers if plain else nn.ModuleList(layers)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for layer in self.layers:
            h = h + layer(h)
        out: Tensor = self.head(h.amax(1))
        return out


def _unlisted(plain: Plain) -> str:
    assert isinstance(plain.setup.model, _Listed)
    known = {id(p) for p in plain.setup.model.parameters()}
    lost = [p for layer in plain.setup.model.layers for p in layer.parameters()]
    assert all(id(p) not in known and p.grad is not None and float(p.grad.norm()) > 0 for p in lost), "they are registered"
    return f"{len(lost)} tensors have gradients and belong to no registered module"


@sick(
    CASES,
    "wk_layers_in_a_plain_list",
    ("not_in_optimizer",),
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.ModuleList.html modules of a plain list are not registered",
    also=("gradients_not_zeroed",),  # their gradients pile up, though no step uses them
    proof=_unlisted,
)
def _listed(seed: int, fault: bool = True) -> Setup:
    model, data = _Listed(fault), Clouds(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 50)


# ------------------------------------------------------------------------------------------------------------ healthy


@healthy(
    CASES,
    "wk_ok_rezero_gates_and_zero_head",
    source="https://arxiv.org/abs/2003.04887 ReZero: gates of residual branches begin at zero; the head's weights do as well",
    proof=falls(0.2),
)
def _(seed: int) -> Setup:
    model, data = _Gated(zero_last=False), Stripes(seed)
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 150)


@healthy(
    CASES,
    "wk_ok_frozen_batch_norm_backbone",
    source="https://arxiv.org/abs/1512.03385 fine-tuning of a network with its batch norms fixed, as detectors do",
    proof=falls(0.35),
)
def _(seed: int) -> Setup:
    backbone = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3, 2, 1), nn.BatchNorm2d(16)
    )
    head, first = nn.Linear(16, 4), nn.Linear(16, 4)
    data = Stripes(seed)
    before = torch.optim.Adam([*backbone.parameters(), *first.parameters()], lr=1e-2)
    for _ in range(30):  # the earlier training, of the even and odd directions alone
        x, y = data()
        before.zero_grad()
        F.cross_entropy(first(backbone(x).relu().mean((2, 3))), y % 2).backward()
        before.step()
    backbone.zero_grad()
    for m in backbone:
        if isinstance(m, nn.BatchNorm2d):
            m.eval().requires_grad_(False)
    model = nn.ModuleDict({"backbone": backbone, "head": head})
    groups = [{"params": [p for p in backbone.parameters() if p.requires_grad], "lr": 1e-3}, {"params": head.parameters()}]

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(head(backbone(x).relu().mean((2, 3))), y)

    return fit(model, loss, torch.optim.AdamW(groups, lr=2e-2), 200)


@healthy(
    CASES,
    "wk_ok_rare_positives_focal",
    source="https://arxiv.org/abs/1708.02002 focal loss and a head whose bias begins at the prior of one in a hundred",
    proof=falls(0.4),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(
        nn.Conv2d(1, 12, 5, padding=2), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 1, 1)
    )
    head = model[4]
    assert isinstance(head, nn.Conv2d)
    assert head.bias is not None
    nn.init.normal_(head.weight, std=0.01)
    nn.init.constant_(head.bias, -math.log(99))
    generator = torch.Generator().manual_seed(7600 + seed)

    def loss(i: int) -> Tensor:
        target = (torch.rand(8, 1, 16, 16, generator=generator) < 0.008).float()
        spot = F.avg_pool2d(target, 3, 1, 1) * 9
        x = 1.5 * spot - 0.1 + 0.3 * torch.randn(spot.shape, generator=generator)
        logits = model(x)
        p = torch.sigmoid(logits)
        right = target * p + (1 - target) * (1 - p)
        weight = target * 0.25 + (1 - target) * 0.75
        entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return (weight * (1 - right).square() * entropy).sum() / target.sum().clamp(min=1)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 200)


def _on_the_ring(plain: Plain) -> str:
    before, after = plain.setup.__dict__["quality"][0], plain.setup.__dict__["quality"][-1]
    assert after < 0.6 * before, f"the distance to the ring goes from {before:.3g} to {after:.3g}"
    return f"the mean distance of the generated points from the ring falls from {before:.3g} to {after:.3g}"


@healthy(
    CASES,
    "wk_ok_gan_on_a_ring",
    source="https://arxiv.org/abs/1705.02894 Lim and Ye: a GAN with the hinge loss; both losses hover at an equilibrium",
    proof=_on_the_ring,
)
def _(seed: int) -> Setup:
    generator = torch.Generator().manual_seed(7700 + seed)
    models = {"G": nn.Sequential(nn.Linear(4, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 2)), "D": _critic()}
    g, d = models["G"], models["D"]
    quality: list[float] = []
    g_opt = torch.optim.Adam(g.parameters(), lr=2e-3, betas=(0.0, 0.9))
    d_opt = torch.optim.Adam(d.parameters(), lr=4e-3, betas=(0.0, 0.9))
    fixed = torch.randn(256, 4, generator=generator)

    def train() -> Iterator[Event]:
        for i in range(200):
            if i in (0, 199):
                with torch.no_grad():
                    quality.append(float((g.forward(fixed).norm(dim=1) - 1.4).abs().mean()))
            d_opt.zero_grad()
            d_loss = (
                F.relu(1 - d(_ring(generator))).mean() + F.relu(1 + d(g(torch.randn(64, 4, generator=generator)).detach())).mean()
            )
            d_loss.backward()
            yield "read", [d_loss]
            d_opt.step()
            yield "step", [d_opt]
            g_opt.zero_grad()
            g_loss = -d(g(torch.randn(64, 4, generator=generator))).mean()
            g_loss.backward()
            yield "read", [g_loss]
            g_opt.step()
            yield "step", [g_opt]

    return note(Setup(models, train), quality=quality)


@healthy(
    CASES,
    "wk_ok_vqvae_with_idle_codes",
    source="https://arxiv.org/abs/1711.00937 van den Oord et al.: VQ-VAE; some entries of the codebook are never chosen",
    proof=falls(0.5),
)
def _(seed: int) -> Setup:
    model, data = _Quantiser(through=False), Tones(seed)
    with torch.no_grad():
        model.codebook.weight[12:] *= 3  # far from every code
    return fit(model, lambda i: model(data()[0]), torch.optim.Adam(model.parameters(), lr=4e-3), 250)


@healthy(
    CASES,
    "wk_ok_vae_annealed_kl",
    source="https://arxiv.org/abs/1511.06349 Bowman et al.: the weight of the KL term is annealed from 0",
    proof=falls(0.6),
)
def _(seed: int) -> Setup:
    model = nn.ModuleDict(
        {
            "encoder": nn.Sequential(nn.Linear(64, 48), nn.SiLU()),
            "mean": nn.Linear(48, 6),
            "log_variance": nn.Linear(48, 6),
            "decoder": nn.Sequential(nn.Linear(6, 48), nn.SiLU(), nn.Linear(48, 64)),
        }
    )
    generator = torch.Generator().manual_seed(7800 + seed)
    mix = torch.randn(4, 64, generator=generator) / 2

    def loss(i: int) -> Tensor:
        x = torch.randn(32, 4, generator=generator) @ mix
        h = model["encoder"](x)
        mean, log_variance = model["mean"](h), model["log_variance"](h)
        z = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=generator)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
        return F.mse_loss(model["decoder"](z), x) + min(1.0, i / 100) * 0.01 * kl

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 250)


class _Scaled(nn.Module):
    """CaiT: a transformer of patches whose branches are scaled by 1e-4 at the beginning."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.embed = nn.Linear(16, width)
        self.place = nn.Parameter(0.02 * torch.randn(9, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.attention = nn.ModuleList(nn.MultiheadAttention(width, 4, batch_first=True) for _ in range(2))
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width)) for _ in range(2))
        self.scales = nn.ParameterList(nn.Parameter(torch.full((width,), 1e-4)) for _ in range(4))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(F.unfold(x, 4, stride=4).transpose(1, 2)) + self.place
        for k in range(2):
            n = self.norms[2 * k](h)
            h = h + self.scales[2 * k] * self.attention[k](n, n, n, need_weights=False)[0]
            h = h + self.scales[2 * k + 1] * self.mlps[k](self.norms[2 * k + 1](h))
        out: Tensor = self.head(h.mean(1))
        return out


@healthy(
    CASES,
    "wk_ok_layer_scale_and_warm_up_from_zero",
    source="https://arxiv.org/abs/2103.17239 CaiT's LayerScale of 1e-4, AdamW warmed up from a learning rate of 0",
    proof=falls(0.3),
)
def _(seed: int) -> Setup:
    model, data = _Scaled(), Stripes(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, i / 15))

    def train() -> Iterator[Event]:
        for _ in range(250):
            x, y = data()
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            yield "read", [loss]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            yield "step", [optimizer]
            schedule.step()

    return Setup(model, train)


@healthy(
    CASES,
    "wk_ok_pointnet_warm_restarts",
    source="https://arxiv.org/abs/1608.03983 SGDR: the learning rate jumps back up at every restart",
    proof=falls(0.4),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(nn.Linear(3, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 48), nn.ReLU())
    nets = nn.ModuleDict({"points": model, "head": nn.Linear(48, 4)})
    data = Clouds(seed)
    optimizer = torch.optim.SGD(nets.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=40)

    def train() -> Iterator[Event]:
        for _ in range(200):
            x, y = data()
            optimizer.zero_grad()
            loss = F.cross_entropy(nets["head"](model(x).amax(1)), y)
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]
            schedule.step()

    return Setup(nets, train)


class _Flow(nn.Module):
    """RealNVP in two dimensions; the last layer of every coupling begins at zero."""

    def __init__(self, bounded: bool = True) -> None:
        super().__init__()
        self.couplings = nn.ModuleList(nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, 2)) for _ in range(4))
        for net in self.couplings if bounded else ():
            assert isinstance(net, nn.Sequential)
            assert isinstance(net[2], nn.Linear)
            nn.init.zeros_(net[2].weight)
            nn.init.zeros_(net[2].bias)

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(len(x))
        for net in self.couplings:
            a, b = x[:, :1], x[:, 1:]
            s, t = net(a).chunk(2, 1)
            s = 2 * torch.tanh(s / 2)
            x = torch.cat([b * s.exp() + t, a], 1)
            total = total + s[:, 0]
        return 0.5 * x.square().sum(1) + math.log(2 * math.pi) - total


def _below(first: float, last: float) -> Proof:
    def proof(plain: Plain) -> str:
        a, b = sum(plain.losses[:8]) / 8, sum(plain.losses[-8:]) / 8
        assert a > first, f"the loss begins at {a:.3g}"
        assert b < last, f"the loss goes from {a:.3g} to {b:.3g}"
        return f"the loss falls from {a:.3g} to {b:.3g}"

    return proof


@healthy(
    CASES,
    "wk_ok_flow_below_zero",
    source="https://arxiv.org/abs/1605.08803 RealNVP: the negative log-likelihood crosses zero on its way down",
    proof=_below(0.5, -0.05),
)
def _(seed: int) -> Setup:
    model, generator = _Flow(), torch.Generator().manual_seed(7900 + seed)

    def loss(i: int) -> Tensor:
        a = torch.randn(96, 1, generator=generator)
        x = torch.cat([a, 0.6 * a.square() - 0.6 + 0.03 * torch.randn(96, 1, generator=generator)], 1)
        value: Tensor = model(x).mean()
        return value

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 300)


@healthy(
    CASES,
    "wk_ok_learned_temperature",
    source="https://arxiv.org/abs/2103.00020 CLIP: the temperature is learned, as the logarithm of its inverse",
    proof=falls(0.5),
)
def _(seed: int) -> Setup:
    model = nn.ModuleDict(
        {
            "left": nn.Sequential(nn.Linear(20, 48), nn.GELU(), nn.Linear(48, 16)),
            "right": nn.Sequential(nn.Linear(12, 48), nn.GELU(), nn.Linear(48, 16)),
            "scale": nn.ParameterList([nn.Parameter(torch.tensor(math.log(1 / 0.07)))]),
        }
    )
    generator = torch.Generator().manual_seed(8000 + seed)
    one, two = torch.randn(6, 20, generator=generator) / 2.4, torch.randn(6, 12, generator=generator) / 2.4

    def loss(i: int) -> Tensor:
        z = torch.randn(24, 6, generator=generator)
        a, b = F.normalize(model["left"](z @ one), dim=1), F.normalize(model["right"](z @ two), dim=1)
        logits = model["scale"][0].exp().clamp(max=100) * a @ b.T
        y = torch.arange(24)
        return (F.cross_entropy(logits, y) + F.cross_entropy(logits.T, y)) / 2

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=3e-3), 250)


@healthy(
    CASES,
    "wk_ok_auxiliary_head_dropped_later",
    source="https://arxiv.org/abs/1409.4842 GoogLeNet's auxiliary classifier; its weight goes to 0 over 60 updates, then it is frozen",
    proof=falls(0.2),
)
def _(seed: int) -> Setup:
    model, data = _Still(), Stripes(seed)
    model.auxiliary = nn.Linear(12, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)

    def loss(i: int) -> Tensor:
        x, y = data()
        a = model.stem(x)
        value = F.cross_entropy(model.head(model.body(a).mean((2, 3))), y)
        if i == 60:
            model.auxiliary.requires_grad_(False)
        return value + 0.3 * (1 - i / 60) * F.cross_entropy(model.auxiliary(a.mean((2, 3))), y) if i < 60 else value

    return fit(model, loss, optimizer, 150)


class _Sign(torch.autograd.Function):
    """The sign, with the gradient of a clipped line."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x >= 0, 1.0, -1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] * (x.abs() <= 1)


class _Binary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.norm1 = nn.BatchNorm1d(64)
        self.second = nn.Linear(64, 64)
        self.norm2 = nn.BatchNorm1d(64)
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = _Sign.apply(self.norm1(self.first(x)))
        h = _Sign.apply(self.norm2(self.second(h)))
        out: Tensor = self.head(h)
        return out


@healthy(
    CASES,
    "wk_ok_binary_activations",
    source="https://arxiv.org/abs/1602.02830 Courbariaux et al.: activations of -1 and 1 with a straight-through estimator",
    proof=falls(0.5),
)
def _(seed: int) -> Setup:
    model, data = _Binary(), Tones(seed, batch=32)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(torch.fft.rfft(x[:, 0]).abs().repeat_interleave(2, 1)[:, :64] / 5 - 0.7), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=4e-3), 200)


@healthy(
    CASES,
    "wk_ok_simsiam_stop_gradient",
    source="https://arxiv.org/abs/2011.10566 SimSiam: the negative cosine goes from 0 towards -1, one side is detached",
    proof=_below(-0.6, -0.8),
)
def _(seed: int) -> Setup:
    model = nn.ModuleDict(
        {
            "encoder": nn.Sequential(
                nn.Linear(24, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 24), nn.BatchNorm1d(24, affine=False)
            ),
            "predictor": nn.Sequential(nn.Linear(24, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 24)),
        }
    )
    generator = torch.Generator().manual_seed(8100 + seed)
    mix = torch.randn(5, 24, generator=generator) / 2

    def loss(i: int) -> Tensor:
        x = torch.randn(48, 5, generator=generator) @ mix
        a, b = (model["encoder"](x + 0.3 * torch.randn(x.shape, generator=generator)) for _ in range(2))
        p, q = model["predictor"](a), model["predictor"](b)
        return -(F.cosine_similarity(p, b.detach()).mean() + F.cosine_similarity(q, a.detach()).mean()) / 2

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4), 200)


@healthy(
    CASES,
    "wk_ok_denoiser_ema_accumulation_resumed",
    source="https://arxiv.org/abs/2006.11239 DDPM with an EMA copy; three batches an update, clipping, and a checkpoint reloaded half way",
    proof=falls(0.5),
)
def _(seed: int) -> Setup:
    net = nn.Sequential(nn.Linear(66, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64))
    nn.init.zeros_(net[4].weight)
    model = nn.ModuleDict({"net": net, "ema": copy.deepcopy(net).requires_grad_(False)})
    generator = torch.Generator().manual_seed(8200 + seed)
    mix = torch.randn(3, 64, generator=generator) / 1.7

    def batch() -> Tensor:
        x = torch.randn(24, 3, generator=generator) @ mix
        t = torch.rand(24, 1, generator=generator)
        noise = torch.randn(x.shape, generator=generator)
        seen = (1 - t).sqrt() * x + t.sqrt() * noise
        return F.mse_loss(net(torch.cat([seen, t, 1 - t], 1)), noise)

    def train() -> Iterator[Event]:
        optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3)
        for i in range(150):
            if i == 75:
                saved = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
                net.load_state_dict(saved[0])
                optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3)
                optimizer.load_state_dict(saved[1])
            optimizer.zero_grad()
            losses = []
            for _ in range(3):
                losses.append(batch() / 3)
                losses[-1].backward()
            yield "read", losses
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            yield "step", [optimizer]
            with torch.no_grad():
                for p, q in zip(model["ema"].parameters(), net.parameters(), strict=True):
                    p.lerp_(q, 0.02)

    return Setup(model, train)
