"""Runs that make or solve something: generators, denoisers, fields, solvers, quantised and pruned nets, optimisers of every kind."""

# The types of torch.nn say little of what a Module holds.
# mypy: disable-error-code="no-any-return,no-untyped-call,union-attr,operator,index,assignment,arg-type,override,misc,return-value,attr-defined"

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Case, Event, Pictures, Proof, Setup, Text, fit, healthy, initialise, sick
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

NON_FINITE = ("non_finite_gradient", "non_finite_activation", "non_finite_loss", "non_finite_weight")


class Waves:
    """Sums of two sine waves on a grid of `points`, as `[batch, points]` of about unit variance."""

    def __init__(self, seed: int, points: int = 32, batch: int = 32) -> None:
        self.generator = torch.Generator().manual_seed(4000 + seed)
        self.grid = torch.linspace(0, 1, points)
        self.batch = batch

    def __call__(self) -> Tensor:
        a, b, phase = torch.rand(3, self.batch, 1, generator=self.generator)
        return (0.7 + a) * torch.sin(2 * math.pi * (self.grid + phase)) + (2 * b - 1) * torch.cos(4 * math.pi * self.grid)


class Smooth:
    """Waves in the plane, 12 x 12, of about unit variance."""

    def __init__(self, seed: int, batch: int = 16) -> None:
        self.generator = torch.Generator().manual_seed(7000 + seed)
        axis = torch.linspace(-1, 1, 12)
        self.x, self.y = torch.meshgrid(axis, axis, indexing="ij")
        self.batch = batch

    def __call__(self) -> Tensor:
        a, b, c, d = torch.rand(4, self.batch, 1, 1, 1, generator=self.generator)
        return 1.4 * torch.sin((8 * a - 4) * self.x + (8 * b - 4) * self.y + 2 * math.pi * c) * (0.6 + 0.6 * d)


def steady(proof: Callable[[Plain], tuple[bool, str]]) -> Proof:
    """A proof made of a truth and the words for it."""

    def told(plain: Plain) -> str:
        holds, words = proof(plain)
        assert holds, words
        return words

    return told


def finite(first: int = 0, last: int | None = None) -> Proof:
    """Losses and gradients are finite in these updates."""

    def proof(plain: Plain) -> tuple[bool, str]:
        good = all(math.isfinite(x) for x in plain.losses[first:last])
        good = good and not any(any(counts[first:last]) for counts in plain.nonfinite.values())
        return good, "all losses and gradients are finite" if good else "a loss or gradient is not finite"

    return steady(proof)


# Sick


@sick(
    CASES,
    "mk_deep_sigmoid_autoencoder",
    ("vanishing_gradient",),
    tuple(f"net.{i}" for i in range(12)),
    also=("poor_init", "update_ratio_too_small", "loss_plateau"),
    source="https://proceedings.mlr.press/v9/glorot10a.html Glorot and Bengio, deep nets of sigmoids do not learn from random init",
    proof=every(
        gradient_ratio("net.0.weight", "net.14.weight", 1e-3, last=15),
        gradient_ratio("net.6.weight", "net.14.weight", 3e-2, last=15),
        loss_stays(0.3, last=15),
    ),
)
def _(seed: int) -> Setup:
    sizes = [32, 64, 64, 48, 24, 48, 64, 64, 32]
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.Sigmoid()]
    model = nn.Sequential()
    model.net = nn.Sequential(*layers[:-1])
    initialise(model, nn.init.xavier_uniform_)
    data = Waves(seed)

    def loss(i: int) -> Tensor:
        x = data()
        return F.mse_loss(model(x), x)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), 40)


class PatchNorm(nn.Module):
    """Zero mean and unit variance for each patch; the eps is missing."""

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean((1, 2, 3), keepdim=True)
        return centred / centred.square().mean((1, 2, 3), keepdim=True).sqrt()


@sick(
    CASES,
    "mk_patch_norm_without_eps",
    ("non_finite_activation",),
    ("normalise",),
    onset=18,
    also=NON_FINITE,
    source="https://github.com/richzhang/PerceptualSimilarity/issues/69 a normalisation without eps under the root gives NaN",
    proof=every(first_non_finite(18, "normalise"), first_non_finite(18), finite(last=18)),
)
def _(seed: int) -> Setup:
    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.normalise = PatchNorm()
            self.inner = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.GELU(), nn.Conv2d(12, 12, 3, padding=1), nn.GELU())
            self.out = nn.Conv2d(12, 1, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.inner(self.normalise(x)))

    model, data = Denoiser(), Pictures(seed)

    def loss(i: int) -> Tensor:
        x, _ = data()
        if i == 18:
            x[3] = 0.0  # a patch from the black border of a picture
        noisy = x.clone()
        noisy[:, :, ::2, ::3] *= 0.5
        return F.mse_loss(model(noisy), x)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 40)


@sick(
    CASES,
    "mk_inpainting_root_of_zero",
    ("non_finite_gradient",),
    onset=14,
    also=NON_FINITE,
    source="https://github.com/pytorch/pytorch/issues/2421 the gradient of a norm of zero is NaN",
    proof=every(
        first_non_finite(14),
        steady(lambda plain: (math.isfinite(plain.losses[14]), f"the loss at update 14 is {plain.losses[14]:.3g}, finite")),
        finite(last=14),
    ),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(
        nn.Conv2d(2, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 1, 1)
    )
    data = Pictures(seed)
    generator = torch.Generator().manual_seed(seed)

    def loss(i: int) -> Tensor:
        x, _ = data()
        hole = (torch.rand(x.shape, generator=generator) < 0.3).float()
        if i == 14:
            hole[5] = 0.0  # a picture without a hole: what is pasted together is the picture itself
        out = model(torch.cat([x * (1 - hole), hole], 1))
        pasted = x * (1 - hole) + out * hole
        return torch.sqrt((pasted - x).square().sum((1, 2, 3))).mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 30)


class Mixture(nn.Module):
    """A mixture density net: weights, means and widths of four Gaussians."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(1, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh())
        self.head = nn.Linear(48, 12)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight, mean, width = self.head(self.trunk(x)).chunk(3, -1)
        return weight.softmax(-1), mean, F.softplus(width) + 0.1


@sick(
    CASES,
    "mk_mixture_density_log_of_zero",
    ("non_finite_loss",),
    onset=16,
    also=NON_FINITE,
    source="https://publications.aston.ac.uk/id/eprint/373/ Bishop, mixture density networks; the likelihood without log-sum-exp",
    proof=every(
        first_non_finite(16),
        steady(lambda plain: (plain.losses[16] == math.inf, f"the loss at update 16 is {plain.losses[16]}")),
        steady(
            lambda plain: (
                all(o is None or o.nonfinite == 0 for name in plain.outputs for o in plain.outputs[name][:17]),
                "every module's output is finite until then",
            )
        ),
        finite(last=16),
    ),
)
def _(seed: int) -> Setup:
    model = Mixture()
    generator = torch.Generator().manual_seed(seed)

    def loss(i: int) -> Tensor:
        y = 2 * torch.rand(64, 1, generator=generator) - 1
        x = y + 0.3 * torch.sin(2 * math.pi * y) + 0.05 * torch.randn(64, 1, generator=generator)
        if i == 16:
            y[7] = 40.0  # one outlier among the targets
        weight, mean, width = model(x)
        density = (weight * torch.exp(-0.5 * ((y - mean) / width) ** 2) / (width * math.sqrt(2 * math.pi))).sum(-1)
        return -density.log().mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 35)


class BareAdam(torch.optim.Optimizer):
    """Adam written by hand, eps forgotten: 0 / 0 where an element never had a gradient."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                s = self.state[p]
                if not s:
                    s.update(t=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                s["t"] += 1
                s["m"].lerp_(p.grad, 0.1)
                s["v"].lerp_(p.grad.square(), 0.001)
                p.sub_(group["lr"] * (s["m"] / (1 - 0.9 ** s["t"])) / (s["v"] / (1 - 0.999 ** s["t"])).sqrt())


@sick(
    CASES,
    "mk_adam_by_hand_without_eps",
    ("non_finite_weight",),
    ("emb",),
    also=NON_FINITE,
    source="https://arxiv.org/abs/1412.6980 Kingma and Ba, Adam; written by hand with the eps left out",
    proof=every(
        finite(last=1),
        steady(lambda plain: (math.isnan(plain.weights["emb.weight"][1]), "emb.weight holds NaN after the first step")),
        steady(
            lambda plain: (
                all(math.isfinite(w[1]) for n, w in plain.weights.items() if n != "emb.weight"),
                "no other parameter does then",
            )
        ),
    ),
)
def _(seed: int) -> Setup:
    class Bigram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.Embedding(96, 24)
            self.mix = nn.GRU(24, 32, batch_first=True)
            self.head = nn.Linear(32, 96)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.mix(self.emb(x))[0])

    model, data = Bigram(), Text(seed, vocabulary=96, batch=4, length=8)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    return fit(model, loss, BareAdam(model.parameters(), 1e-2), 30)


@sick(
    CASES,
    "mk_operator_missing_sensor",
    ("non_finite_input",),
    ("",),
    onset=12,
    also=NON_FINITE,
    source="https://arxiv.org/abs/1910.03193 Lu et al., DeepONet; a sensor that was off is NaN in the table",
    proof=every(
        first_non_finite(12, "branch"),
        first_non_finite(12),
        finite(last=12),
        steady(lambda plain: (plain.outputs["trunk"][12].nonfinite == 0, "the trunk, fed with places, is finite")),
    ),
)
def _(seed: int) -> Setup:
    model, data = DeepONet(), Waves(seed)

    def loss(i: int) -> Tensor:
        u = data()
        target = antiderivative(u)
        if i == 12:
            u[4, 9] = math.nan
        return F.mse_loss(model(u, data.grid[:, None]), target)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-3), 30)


class DeepONet(nn.Module):
    """The antiderivative of a function, from its values at 32 sensors."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(32, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 24))
        self.trunk = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 24))

    def forward(self, u: Tensor, at: Tensor) -> Tensor:
        return self.branch(u) @ self.trunk(at).T


def antiderivative(u: Tensor) -> Tensor:
    """By sums, scaled to about unit variance."""
    return 5 * u.cumsum(-1) / u.shape[-1]


class Quantised(torch.autograd.Function):
    """Rounds to multiples of a step; the backward divides by the step, which a straight-through estimator must not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: float) -> Tensor:
        ctx.step = step
        return (x / step).round() * step

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] / ctx.step, None


class Quantiser(nn.Module):
    def __init__(self, step: float) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return Quantised.apply(torch.tanh(x), self.step)


@sick(
    CASES,
    "mk_quantiser_backward_divides_by_step",
    ("exploding_gradient",),
    tuple(str(i) for i in range(8)),
    also=("loss_plateau",),
    source="https://arxiv.org/abs/1308.3432 Bengio et al., straight-through estimators; the scale of the backward is wrong here",
    proof=every(
        gradient_ratio("8.weight", "0.weight", 1e-3, last=15),
        gradient_ratio("4.weight", "0.weight", 0.1, last=15),
        gradient_ratio("8.weight", "4.weight", 0.1, last=15),
    ),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(
        *(m for a in (32, 48, 48, 48) for m in (nn.Linear(a, 48), Quantiser(1 / 16))),
        nn.Linear(48, 32),
    )
    initialise(model, nn.init.xavier_uniform_)
    data = Waves(seed)
    generator = torch.Generator().manual_seed(seed)

    def loss(i: int) -> Tensor:
        x = data()
        return F.mse_loss(model(x + 0.3 * torch.randn(x.shape, generator=generator)), x)

    def clip(i: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), 60, between=clip)


@sick(
    CASES,
    "mk_deconvolution_step_beyond_stability",
    ("loss_diverging", "exploding_gradient"),
    also=("update_ratio_too_large", "loss_spike", "gradient_spike"),
    source="https://distill.pub/2017/momentum/ Goh: on a quadratic, gradient descent diverges beyond 2 / largest eigenvalue",
    proof=every(loss_grows(100, last=15), finite()),
)
def _(seed: int) -> Setup:
    model, data = nn.Linear(32, 32), Waves(seed)
    kernel = torch.tensor([[[0.1, 0.2, 0.4, 0.2, 0.1]]])

    def loss(i: int) -> Tensor:
        x = data()
        return F.mse_loss(model(F.conv1d(x[:, None], kernel, padding=2)[:, 0]), x, reduction="none").sum(1).mean()

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.14), 40)


class Upscaler(nn.Module):
    """Twice the size: a residual on what interpolation gives."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
        self.up = nn.Sequential(nn.Conv2d(width, 4, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        rough = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return rough + self.up(self.body(x))


@sick(
    CASES,
    "mk_upscaler_one_file_not_scaled",
    ("gradient_spike", "loss_spike"),
    onset=25,
    also=("unnormalized_input",),
    source="https://docs.pytorch.org/vision/stable/generated/torchvision.transforms.functional.convert_image_dtype.html 0..255 or 0..1",
    proof=every(
        gradient_spikes(25, 100),
        steady(lambda plain: (plain.losses[25] > 100 * median(plain.losses[:25]), "the loss jumps there too")),
        steady(lambda plain: (median(plain.losses[30:]) < 2 * median(plain.losses[:25]), "it recovers")),
    ),
)
def _(seed: int) -> Setup:
    model, data = Upscaler(), Smooth(seed)

    def loss(i: int) -> Tensor:
        x = data()
        if i == 25:
            x = 60 * x
        return F.mse_loss(model(F.avg_pool2d(x, 2)), x)

    def clip(i: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.8), 45, between=clip)


class Sparse(nn.Module):
    """A sparse autoencoder of activations."""

    def __init__(self, inputs: int, latents: int) -> None:
        super().__init__()
        self.encode = nn.Linear(inputs, latents)
        self.act = nn.ReLU()
        self.decode = nn.Linear(latents, inputs)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.act(self.encode(x))
        return self.decode(z), z


@sick(
    CASES,
    "mk_prior_bias_on_every_conv",
    ("dead_units", "poor_init"),
    ("mask.0", "mask.1", "mask.2", "mask.3"),
    also=("zero_gradient", "vanishing_gradient", "loss_plateau"),
    source="https://arxiv.org/abs/1708.02002 Lin et al., focal loss: the prior's bias belongs to the last convolution only",
    proof=every(dead_fraction("mask.1", 0.95, last=15), dead_fraction("mask.3", 0.95, last=15)),
)
def _(seed: int) -> Setup:
    model = nn.Sequential()
    model.mask = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 1, 3, padding=1)
    )
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.constant_(m.bias, -math.log(0.99 / 0.01))
    data = Pictures(seed)

    def loss(i: int) -> Tensor:
        x, _ = data()
        x = x / 0.8
        return F.binary_cross_entropy_with_logits(model(x), (x.abs() > 1.5).float())

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-3), 40)


@sick(
    CASES,
    "mk_autoencoder_weights_from_torch_rand",
    ("saturated_activation", "poor_init"),
    ("0", "1", "2", "3", "4"),
    also=("vanishing_gradient", "zero_gradient", "update_ratio_too_small", "loss_plateau"),
    source="https://proceedings.mlr.press/v9/glorot10a.html Glorot and Bengio: saturated sigmoids; weights here by torch.rand",
    proof=every(
        steady(
            lambda plain: (
                all(o is not None and o.low > 0.999 for name in ("1", "3") for o in plain.outputs[name][:15]),
                "every sigmoid is above 0.999 on every input",
            )
        ),
        gradient_ratio("2.weight", "4.weight", 1e-3, last=15),
    ),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(nn.Linear(64, 40), nn.Sigmoid(), nn.Linear(40, 24), nn.Sigmoid(), nn.Linear(24, 64))
    for p in model.parameters():
        p.data = torch.rand(p.shape)
    data = Pictures(seed)

    def loss(i: int) -> Tensor:
        x = data()[0].flatten(1).mul(0.2).add(0.5).clamp(0, 1)
        return F.mse_loss(model(x), x)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.5), 50)


class Denoiser(nn.Module):
    """Predicts the noise in points of the plane, for the class and the time."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, width), nn.SiLU())
        self.label_emb = nn.Embedding(4, width)
        self.inp = nn.Linear(2, width)
        self.body = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.out = nn.Linear(width, 2)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        angles = t[:, None] * torch.tensor([1.0, 2.0, 4.0, 8.0]) * math.pi
        h = self.inp(x) + self.time(torch.cat([angles.sin(), angles.cos()], -1))
        if label is not None:
            h = h + self.label_emb(label)
        return self.out(self.body(h))


class Corners:
    """Points around four corners, and which."""

    def __init__(self, seed: int, batch: int = 64) -> None:
        self.generator = torch.Generator().manual_seed(5000 + seed)
        self.centres = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        self.batch = batch

    def __call__(self) -> tuple[Tensor, Tensor]:
        y = torch.randint(4, (self.batch,), generator=self.generator)
        return self.centres[y] + 0.1 * torch.randn(self.batch, 2, generator=self.generator), y

    def noised(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a denoiser sees and must give: noised points, time, class, noise."""
        x, y = self()
        t = torch.rand(self.batch, generator=self.generator)
        noise = torch.randn(self.batch, 2, generator=self.generator)
        keep = torch.cos(0.5 * math.pi * t)[:, None]
        return keep * x + (1 - keep**2).sqrt() * noise, t, y, noise


@sick(
    CASES,
    "mk_diffusion_label_embedding_never_called",
    ("missing_gradient",),
    ("label_emb",),
    source="https://arxiv.org/abs/2207.12598 Ho and Salimans, classifier-free guidance; the class is not handed to the net",
    proof=every(
        no_gradient("label_emb.weight"),
        steady(lambda plain: (plain.outputs["label_emb"] == [None] * len(plain.losses), "label_emb is never called")),
        converges(0.8),
    ),
)
def _(seed: int) -> Setup:
    model, data = Denoiser(), Corners(seed)

    def loss(i: int) -> Tensor:
        x, t, _label, noise = data.noised()
        return F.mse_loss(model(x, t), noise)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=2e-3), 60)


class VectorQuantised(nn.Module):
    """A VQ-VAE, with the straight-through estimator and the commitment or without."""

    def __init__(self, straight: bool) -> None:
        super().__init__()
        self.straight = straight
        self.encoder = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 4 * 4))
        self.codebook = nn.Embedding(16, 4)
        self.decoder = nn.Sequential(nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encoder(x).view(-1, 4, 4)
        with torch.no_grad():
            nearest = torch.cdist(z, self.codebook.weight.expand(len(z), -1, -1)).argmin(-1)
        q = self.codebook(nearest)
        pull = (q - z.detach()).square().mean()
        if self.straight:
            pull = pull + 0.25 * (z - q.detach()).square().mean()
            q = z + (q - z).detach()
        return self.decoder(q.flatten(1)), pull


@sick(
    CASES,
    "mk_vq_vae_without_straight_through",
    ("missing_gradient",),
    ("encoder",),
    source="https://arxiv.org/abs/1711.00937 van den Oord et al., VQ-VAE: the straight-through estimator is what reaches the encoder",
    proof=every(
        no_gradient("encoder.0.weight", "encoder.0.bias", "encoder.2.weight", "encoder.2.bias"),
        steady(lambda plain: (all(o is not None for o in plain.outputs["encoder"]), "the encoder runs every time")),
        steady(lambda plain: (all(g > 0 for g in plain.grads["decoder.0.weight"]), "the decoder has gradients")),
    ),
)
def _(seed: int) -> Setup:
    model, data = VectorQuantised(straight=False), Waves(seed)

    def loss(i: int) -> Tensor:
        x = data()
        out, pull = model(x)
        return F.mse_loss(out, x) + pull

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 100)


@sick(
    CASES,
    "mk_compression_rounds_without_estimator",
    ("zero_gradient",),
    ("analysis",),
    also=("vanishing_gradient",),
    source="https://arxiv.org/abs/1611.01704 Balle et al., learned compression: rounding has a gradient of zero, hence their noise",
    proof=every(
        zero_gradient("analysis.0.weight", "analysis.2.weight", "analysis.2.bias"),
        steady(lambda plain: (all(g > 0 for g in plain.grads["synthesis.0.weight"]), "the synthesis has gradients")),
    ),
)
def _(seed: int) -> Setup:
    class Codec(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.analysis = nn.Sequential(
                nn.Conv2d(1, 12, 3, stride=2, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(12, 6, 3, padding=1)
            )
            self.synthesis = nn.Sequential(
                nn.ConvTranspose2d(6, 12, 4, stride=2, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(12, 1, 3, padding=1)
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.synthesis(torch.round(8 * self.analysis(x)) / 8)

    model, data = Codec(), Pictures(seed)

    def loss(i: int) -> Tensor:
        x, _ = data()
        return F.mse_loss(model(x), x)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 60)


class Masked(nn.Module):
    """A linear layer with a pruning mask."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        nn.init.xavier_uniform_(self.weight)
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.register_buffer("mask", torch.ones(outputs, inputs))
        self.mask: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


@sick(
    CASES,
    "mk_pruning_takes_a_whole_layer",
    ("zero_gradient",),
    ("first", "second", "third"),
    onset=25,
    also=("dead_units", "loss_spike", "loss_plateau", "vanishing_gradient", "gradient_spike"),
    source="https://arxiv.org/abs/2006.05467 Tanaka et al., SynFlow: layer collapse, when pruning takes all of a layer",
    proof=every(
        zero_gradient("third.weight", "first.weight", "second.weight", first=25),
        steady(lambda plain: (all(g > 0 for g in plain.grads["third.weight"][:25]), "third.weight has gradients before")),
        steady(lambda plain: (all(g > 0 for g in plain.grads["fourth.bias"]), "the last layer still has")),
    ),
)
def _(seed: int) -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third, self.fourth = Masked(32, 64), Masked(64, 64), Masked(64, 64), Masked(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.fourth(torch.tanh(self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))))

    model, data = Net(), Waves(seed)
    nn.init.uniform_(model.third.bias, -0.3, 0.3)
    generator = torch.Generator().manual_seed(seed)

    def loss(i: int) -> Tensor:
        x = data()
        return F.mse_loss(model(x + 0.2 * torch.randn(x.shape, generator=generator)), x)

    def prune(i: int) -> None:
        if i == 25:
            for name, layer in model.named_children():
                # The threshold was tuned on the first layer; of the third nothing is above it.
                limit = 2.0 if name == "third" else 0.05
                layer.mask.copy_((layer.weight.abs() > limit).float())

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-3), 60, before=prune)


def growth(parameter: str, by: float, first: int, last: int) -> Proof:
    """The gradient of a parameter at `last` is more than `by` times that at `first`."""

    def proof(plain: Plain) -> tuple[bool, str]:
        ratio = plain.grads[parameter][last] / plain.grads[parameter][first]
        return ratio > by, f"the gradient of {parameter} is at update {last} {ratio:.3g} times that of update {first}"

    return steady(proof)


@sick(
    CASES,
    "mk_text_zero_grad_once_an_epoch",
    ("gradients_not_zeroed",),
    also=("exploding_gradient",),
    source="https://docs.pytorch.org/tutorials/recipes/recipes/zeroing_out_gradients.html gradients accumulate until they are zeroed",
    proof=every(
        growth("head.weight", 6, 0, 14), steady(lambda plain: (plain.losses[14] < plain.losses[0], "while the loss falls"))
    ),
)
def _(seed: int) -> Setup:
    model = Recurrent(24)
    data = Text(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train() -> Iterator[Event]:
        for _epoch in range(2):
            optimizer.zero_grad()
            for _batch in range(20):
                x, y = data()
                loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
                loss.backward()
                yield "read", [loss]
                optimizer.step()
                yield "step", [optimizer]

    return Setup(model, train)


class Recurrent(nn.Module):
    """A language model of one GRU."""

    def __init__(self, vocabulary: int, width: int = 32) -> None:
        super().__init__()
        self.emb = nn.Embedding(vocabulary, width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(self.emb(x))[0])


class Generator(nn.Module):
    def __init__(self, noise: int = 8, outputs: int = 2, width: int = 48) -> None:
        super().__init__()
        self.noise = noise
        self.net = nn.Sequential(
            nn.Linear(noise, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2), nn.Linear(width, outputs)
        )

    def forward(self, n: int, generator: torch.Generator) -> Tensor:
        return self.net(torch.randn(n, self.noise, generator=generator))


def critic(inputs: int = 2, width: int = 48) -> nn.Sequential:
    """A discriminator that gives a logit."""
    return nn.Sequential(
        nn.Linear(inputs, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2), nn.Linear(width, 1)
    )


@sick(
    CASES,
    "mk_gan_discriminator_never_zeroed",
    ("gradients_not_zeroed",),
    ("D",),
    also=("exploding_gradient",),
    source="https://docs.pytorch.org/tutorials/beginner/dcgan_faces_tutorial.html DCGAN; its netD.zero_grad() is left out",
    proof=every(
        steady(
            lambda plain: (
                all(m > 0.1 for m in plain.setup.model["D"].left[1:]),
                "D's gradients are not zero before each backward of its own",
            )
        ),
        steady(lambda plain: (all(x == 0 for x in plain.setup.model["G"].left), "those of G are")),
    ),
)
def _(seed: int) -> Setup:
    g, d = Generator(), critic()
    data = Corners(seed)
    opt_g = torch.optim.Adam(g.parameters(), lr=1e-3, betas=(0.5, 0.999))
    opt_d = torch.optim.Adam(d.parameters(), lr=1e-3, betas=(0.5, 0.999))
    left: dict[str, list[float]] = {"G": [], "D": []}
    d.left, g.left = left["D"], left["G"]

    def note(name: str, model: nn.Module) -> None:
        left[name].append(sum(float(p.grad.abs().sum()) for p in model.parameters() if p.grad is not None))

    def train() -> Iterator[Event]:
        for _ in range(40):
            real, _label = data()
            fake = g(len(real), data.generator)
            note("D", d)
            d_loss = F.softplus(-d(real)).mean() + F.softplus(d(fake.detach())).mean()
            d_loss.backward()
            yield "read", [d_loss]
            opt_d.step()
            yield "step", [opt_d]
            opt_g.zero_grad()
            note("G", g)
            g_loss = F.softplus(-d(fake)).mean()
            g_loss.backward()
            yield "read", [g_loss]
            opt_g.step()
            yield "step", [opt_g]

    return Setup({"G": g, "D": d}, train)


@sick(
    CASES,
    "mk_residual_blocks_in_a_plain_list",
    ("not_in_optimizer",),
    source="https://discuss.pytorch.org/t/when-should-i-use-nn-modulelist-and-when-should-i-use-nn-sequential/5463 a list hides them",
    proof=every(
        steady(
            lambda plain: (
                not any(n.startswith("blocks") for n in named_parameters(plain.setup.model)),
                "no parameter of the blocks is registered",
            )
        ),
        steady(
            lambda plain: (
                all(
                    p.grad is not None and bool((p.grad != 0).any()) and torch.equal(p, q)
                    for block, first in zip(plain.setup.model.blocks, plain.setup.model.first, strict=True)
                    for p, q in zip(block.parameters(), first, strict=True)
                ),
                "they have gradients and stay bit for bit what they were",
            )
        ),
    ),
)
def _(seed: int) -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp = nn.Linear(32, 48)
            self.blocks = [nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 48), nn.GELU(), nn.Linear(48, 48)) for _ in range(3)]
            self.out = nn.Linear(48, 32)
            self.first = [[p.detach().clone() for p in block.parameters()] for block in self.blocks]

        def forward(self, x: Tensor) -> Tensor:
            x = self.inp(x)
            for block in self.blocks:
                x = x + block(x)
            return self.out(x)

    model, data = Net(), Waves(seed)
    generator = torch.Generator().manual_seed(seed)

    def loss(i: int) -> Tensor:
        x = data()
        return F.l1_loss(model(x + 0.3 * torch.randn(x.shape, generator=generator)), x)

    return fit(model, loss, torch.optim.NAdam(model.parameters(), lr=2e-3), 50)


@sick(
    CASES,
    "mk_upscaler_new_tail_after_the_optimizer",
    ("not_in_optimizer",),
    ("up",),
    source="https://docs.pytorch.org/docs/stable/optim.html an optimizer holds the parameters it was made with, not those of a later layer",
    proof=every(
        unchanged("up.0.weight", "up.0.bias"),
        steady(
            lambda plain: (
                all(s > 0 for name in ("body.0.weight", "body.2.weight") for s in plain.steps[name]),
                "the rest moves",
            )
        ),
    ),
)
def _(seed: int) -> Setup:
    model, data = Upscaler(), Smooth(seed)
    optimizer = torch.optim.Adamax(model.parameters(), lr=3e-3)
    # "From 2 x 2 to the nearest and a convolution": the checkerboard goes, and with it what the optimizer holds.
    model.up = nn.Sequential(
        nn.Conv2d(16, 16, 3, padding=1), nn.Upsample(scale_factor=2), nn.ReLU(), nn.Conv2d(16, 1, 3, padding=1)
    )

    def loss(i: int) -> Tensor:
        x = data()
        return F.l1_loss(model(F.avg_pool2d(x, 2)), x)

    return fit(model, loss, optimizer, 60)


@sick(
    CASES,
    "mk_flow_scheduler_steps_alone",
    ("never_stepped",),
    also=("loss_plateau",),
    source="https://docs.pytorch.org/docs/stable/optim.html the scheduler steps after the optimizer, not in its place",
    proof=every(
        steady(lambda plain: (all(math.isnan(s) for steps in plain.steps.values() for s in steps), "nothing steps")),
        steady(lambda plain: (all(len(set(w)) == 1 for w in plain.weights.values()), "no weight changes")),
        steady(lambda plain: (all(g > 0 for g in plain.grads["layers.0.net.0.weight"]), "there are gradients")),
    ),
)
def _(seed: int) -> Setup:
    model, data = Flow(6), Corners(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)

    def train() -> Iterator[Event]:
        for _ in range(50):
            x, _label = data()
            loss = model(x)
            optimizer.zero_grad()
            loss.backward()
            yield "read", [loss]
            scheduler.step()
            yield "step", []

    return Setup(model, train)


class Coupling(nn.Module):
    """An affine coupling of a flow in the plane. The last layer starts at zero, which makes it the identity, unless told."""

    def __init__(self, flip: bool, width: int = 32, zero: bool = True) -> None:
        super().__init__()
        self.flip = flip
        self.net = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2))
        if zero:
            nn.init.zeros_(self.net[4].weight)
            nn.init.zeros_(self.net[4].bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, moved = (x[:, 1:], x[:, :1]) if self.flip else (x[:, :1], x[:, 1:])
        log_scale, shift = self.net(kept).chunk(2, -1)
        log_scale = 2 * torch.tanh(log_scale / 2)
        moved = moved * log_scale.exp() + shift
        return torch.cat([moved, kept] if self.flip else [kept, moved], -1), log_scale.squeeze(-1)


class Flow(nn.Module):
    """Gives the mean negative log-likelihood of points of the plane."""

    def __init__(self, depth: int, zero: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Coupling(bool(i % 2), zero=zero) for i in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        volume = torch.zeros(len(x))
        for layer in self.layers:
            x, change = layer(x)
            volume = volume + change
        return (0.5 * x.square().sum(-1) + math.log(2 * math.pi) - volume).mean()


@sick(
    CASES,
    "mk_field_zero_grad_before_the_step",
    ("frozen_weights",),
    also=("loss_plateau", "never_stepped"),
    source="https://docs.pytorch.org/tutorials/recipes/recipes/zeroing_out_gradients.html zeroed between backward and step",
    proof=every(
        unchanged("net.0.weight", "net.2.weight", "net.4.weight", "net.4.bias"),
        loss_stays(0.05),
    ),
)
def _(seed: int) -> Setup:
    model = Field()
    picture = field_picture(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(i: int) -> Tensor:
        return F.mse_loss(model(model.grid), picture)

    def between(i: int) -> None:
        optimizer.zero_grad(set_to_none=False)

    return fit(model, loss, optimizer, 40, between=between)


class Field(nn.Module):
    """The brightness of a 16 x 16 picture at a place, by Fourier features."""

    grid: Tensor
    frequencies: Tensor

    def __init__(self, features: int = 32, width: int = 64) -> None:
        super().__init__()
        axis = torch.linspace(-1, 1, 16)
        self.register_buffer("grid", torch.cartesian_prod(axis, axis))
        self.register_buffer("frequencies", 1.5 * torch.randn(2, features))
        self.net = nn.Sequential(nn.Linear(2 * features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, x: Tensor) -> Tensor:
        angles = math.pi * x @ self.frequencies
        return self.net(torch.cat([angles.sin(), angles.cos()], -1)).squeeze(-1)


def field_picture(seed: int) -> Tensor:
    """Some smooth picture of about unit variance."""
    generator = torch.Generator().manual_seed(6000 + seed)
    axis = torch.linspace(-1, 1, 16)
    x, y = torch.cartesian_prod(axis, axis).T
    a, b, c, d = 2 * math.pi * torch.rand(4, generator=generator)
    return torch.sin(3 * x + a) * torch.cos(4 * y + b) + torch.sin(5 * x * y + c) + 0.5 * torch.cos(6 * (x + y) + d)


@sick(
    CASES,
    "mk_bf16_gains_round_away",
    ("frozen_weights",),
    ("norms.0", "norms.1", "norms.2"),
    source="https://arxiv.org/abs/2010.06192 Zamirai et al., pure 16-bit training: nearest rounding cancels small updates",
    proof=every(
        unchanged("norms.0.weight", "norms.1.weight", "norms.2.weight"),
        steady(lambda plain: (all(s > 0 for s in plain.steps["maps.1.weight"]), "the other matrices move")),
        converges(0.8),
    ),
)
def _(seed: int) -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.RMSNorm(n) for n in (32, 64, 64))
            self.maps = nn.ModuleList([nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 32)])

        def forward(self, x: Tensor) -> Tensor:
            for k, (norm, linear) in enumerate(zip(self.norms, self.maps, strict=True)):
                x = linear(F.silu(norm(x)) if k else norm(x))
            return x

    model, data = Net().to(torch.bfloat16), Waves(seed)

    def loss(i: int) -> Tensor:
        u = data()
        return F.mse_loss(model(u.to(torch.bfloat16)).float(), antiderivative(u))

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0), 80)


@sick(
    CASES,
    "mk_text_rmsprop_rate_far_too_large",
    ("update_ratio_too_large",),
    also=("loss_spike", "loss_diverging", "saturated_activation", "gradient_spike", "exploding_gradient", "loss_plateau"),
    source="https://docs.pytorch.org/docs/stable/generated/torch.optim.RMSprop.html each early step is about 10 lr, whatever the gradient",
    proof=every(update_ratio(above=5.0, last=1), update_ratio(above=0.5, last=3), update_ratio(above=0.1, last=15)),
)
def _(seed: int) -> Setup:
    model, data = Recurrent(24), Text(seed)
    nn.init.normal_(model.emb.weight, std=0.1)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    return fit(model, loss, torch.optim.RMSprop(model.parameters(), lr=0.3), 40)


@sick(
    CASES,
    "mk_vae_loss_over_the_size_of_the_set",
    ("update_ratio_too_small",),
    also=("loss_plateau", "vanishing_gradient"),
    source="https://arxiv.org/abs/1312.6114 Kingma and Welling, VAE; the estimate is N / M times the sum of a batch, here over N as well",
    proof=every(update_ratio(below=1e-6, last=15), loss_stays(0.1)),
)
def _(seed: int) -> Setup:
    model, data = Variational(), Waves(seed)

    def loss(i: int) -> Tensor:
        x = data()
        rec, kl = model(x, data.generator)
        return (rec + kl).sum() / 32 / 60000  # of the batch, and then of the whole set

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), 60)


class Variational(nn.Module):
    """A VAE: gives, of each picture of the batch, the squared error and the divergence."""

    def __init__(self, latents: int = 4) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(32, 48), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(48, latents), nn.Linear(48, latents)
        self.decoder = nn.Sequential(nn.Linear(latents, 48), nn.ReLU(), nn.Linear(48, 32))

    def forward(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        h = self.encoder(x)
        mean, log_variance = self.mean(h), self.log_variance(h)
        z = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=generator)
        divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(-1)
        return 0.5 * (self.decoder(z) - x).square().sum(-1), divergence


@sick(
    CASES,
    "mk_denoising_pairs_shuffled_apart",
    ("loss_plateau",),
    within=100,  # a plateau takes 100 updates to be told from a slow start
    source="https://karpathy.github.io/2019/04/25/recipe/ Karpathy: the wrong label for a picture, unknowingly shuffled",
    proof=every(
        loss_stays(0.05, first=5, last=100), loss_stays(0.05, first=5), steady(lambda p: (median(p.losses[-20:]) > 0.2, "and high"))
    ),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 1, 3, padding=1)
    )
    data = Pictures(seed)
    generator = torch.Generator().manual_seed(seed)

    def loss(i: int) -> Tensor:
        clean, _ = data()
        noisy = clean + 0.3 * torch.randn(clean.shape, generator=generator)
        return F.mse_loss(model(noisy[torch.randperm(len(noisy), generator=generator)]), clean)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 160)


@sick(
    CASES,
    "mk_pinn_sum_loss_in_half",
    ("loss_scale_collapse",),
    also=("non_finite_gradient", "never_stepped", "loss_plateau"),
    source="https://github.com/Junjue-Wang/FactSeg/issues/6 the scale is halved again and again, every step is skipped",
    proof=every(
        steady(lambda plain: (all(math.isnan(s) for steps in plain.steps.values() for s in steps), "every step is skipped")),
        steady(lambda plain: (all(math.isfinite(x) for x in plain.losses), "every loss is finite")),
        steady(lambda plain: (plain.setup.model.scales[-1] < 1, f"the scale ends at {plain.setup.model.scales[-1]}")),
    ),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    model.scales = []
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(seed)

    def train() -> Iterator[Event]:
        for _ in range(30):
            x = 2 * torch.rand(512, 2, generator=generator) - 1
            target = 1 + torch.sin(3 * x[:, :1]) * torch.cos(2 * x[:, 1:])
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                out = model(x)
            loss = 1e4 * (out.float() - target).square().sum()  # the data's weight of 1e4 was meant for the mean
            scaler.scale(loss).backward()
            yield "read", [loss]
            scaler.step(optimizer)
            scaler.update()
            model.scales.append(scaler.get_scale())
            yield "step", []

    return Setup(model, train)


@sick(
    CASES,
    "mk_deep_plain_net_small_init",
    ("vanishing_gradient", "poor_init"),
    tuple(f"{i}" for i in range(18)),
    also=("loss_plateau", "update_ratio_too_small", "dead_units"),
    source="https://arxiv.org/abs/1502.01852 He et al., a plain net of standard deviation 0.01 stalls",
    proof=every(
        gradient_ratio("0.weight", "18.bias", 1e-5, last=15),
        gradient_ratio("8.weight", "18.bias", 1e-5, last=15),
        loss_stays(0.2, first=2, last=15),
        steady(lambda plain: (plain.outputs["16"][0].rms < 1e-6, "the signal is gone at the last hidden layer")),
    ),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(*(m for a in [32] + 8 * [40] for m in (nn.Linear(a, 40), nn.ReLU())), nn.Linear(40, 32))
    initialise(model, lambda w: nn.init.normal_(w, std=0.01))
    data = Waves(seed)

    def loss(i: int) -> Tensor:
        u = data()
        return F.smooth_l1_loss(model(u), antiderivative(u) + 0.5)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9), 40)


@sick(
    CASES,
    "mk_surrogate_fed_physical_units",
    ("unnormalized_input",),
    ("",),
    also=(
        "update_ratio_too_small",
        "update_ratio_too_large",
        "exploding_gradient",
        "dead_units",
        "poor_init",
        "loss_spike",
        "loss_plateau",
        "vanishing_gradient",
    ),
    source="https://github.com/vsitzmann/siren/issues/19 diverges until the inputs are normalised",
    proof=every(
        steady(lambda plain: (plain.outputs["0"][0].rms > 1e3, f"the first layer gives {plain.outputs['0'][0].rms:.3g} rms")),
        steady(lambda plain: (plain.losses[0] > 1e4, f"the loss starts at {plain.losses[0]:.3g} for targets of unit variance")),
    ),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(nn.Linear(4, 48), nn.GELU(), nn.Linear(48, 48), nn.GELU(), nn.Linear(48, 1))
    generator = torch.Generator().manual_seed(seed)

    def loss(i: int) -> Tensor:
        s = torch.randn(64, 4, generator=generator)
        y = (s[:, :1] * s[:, 1:2] + torch.tanh(s[:, 2:3]) - s[:, 3:]) / 1.7
        # Pressure in pascal, temperature in kelvin, velocity in metres a second, humidity as a share.
        x = torch.tensor([101325.0, 290.0, 8.0, 0.5]) + s * torch.tensor([900.0, 12.0, 3.0, 0.2])
        return F.mse_loss(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-3), 50)


@sick(
    CASES,
    "mk_modular_sums_softmax_twice",
    ("double_softmax",),
    ("softmax",),
    also=("loss_plateau", "vanishing_gradient"),
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html the input is expected to be logits",
    proof=every(
        steady(
            lambda plain: (
                all(o is not None and o.low >= 0 and o.high <= 1 for o in plain.outputs["softmax"]),
                "cross_entropy is given probabilities",
            )
        ),
        steady(lambda plain: (plain.losses[14] > 0.9 * plain.losses[0], f"the loss at update 14 is {plain.losses[14]:.3g}")),
    ),
)
def _(seed: int) -> Setup:
    class Adder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.Embedding(12, 32)
            self.net = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 12))
            self.softmax = nn.Softmax(-1)

        def forward(self, x: Tensor) -> Tensor:
            return self.softmax(self.net(self.emb(x).flatten(1)))

    model = Adder()
    generator = torch.Generator().manual_seed(seed)

    def loss(i: int) -> Tensor:
        x = torch.randint(12, (64, 2), generator=generator)
        return F.cross_entropy(model(x), x.sum(1) % 12)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=1e-2), 60)


# Healthy


def kept(name: str, better: Callable[[list[float]], bool]) -> Proof:
    """A quality that the run has written down in `model.quality` (of a mapping: of its first model) is as it should be."""

    def proof(plain: Plain) -> tuple[bool, str]:
        model = plain.setup.model
        module = model if isinstance(model, nn.Module) else next(iter(model.values()))
        seen: list[float] = module.quality
        return better(seen), f"{name} goes from {seen[0]:.3g} to {seen[-1]:.3g}"

    return every(steady(proof), finite())


def distance(a: Tensor, b: Tensor) -> float:
    """Energy distance between two sets of points."""
    with torch.no_grad():
        return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


@healthy(
    CASES,
    "mk_gan_at_its_equilibrium",
    source="https://arxiv.org/abs/1406.2661 Goodfellow et al.: at the optimum D gives 1/2, both losses stand still",
    proof=kept("the distance of made from real", lambda q: min(q[-3:]) < 0.25 * q[0]),
)
def _(seed: int) -> Setup:
    g, d = Generator(), critic()
    data = Corners(seed, batch=128)
    g.quality = []
    opt_g = torch.optim.Adam(g.parameters(), lr=1e-3, betas=(0.5, 0.999))
    opt_d = torch.optim.Adam(d.parameters(), lr=2e-3, betas=(0.5, 0.999))
    shape = torch.tensor([[1.0, 0.4], [0.0, 0.6]])

    def train() -> Iterator[Event]:
        for i in range(150):
            real = torch.randn(128, 2, generator=data.generator) @ shape + torch.tensor([1.0, -0.5])
            fake = g(128, data.generator)
            if i % 10 == 0 or i > 145:
                g.quality.append(distance(fake, real))
            opt_d.zero_grad()
            d_loss = F.softplus(-d(real)).mean() + F.softplus(d(fake.detach())).mean()
            d_loss.backward()
            yield "read", [d_loss]
            opt_d.step()
            yield "step", [opt_d]
            opt_g.zero_grad()
            g_loss = F.softplus(-d(fake)).mean()
            g_loss.backward()
            yield "read", [g_loss]
            opt_g.step()
            yield "step", [opt_g]

    return Setup({"G": g, "D": d}, train)


@healthy(
    CASES,
    "mk_wgan_with_gradient_penalty",
    source="https://arxiv.org/abs/1704.00028 Gulrajani et al., WGAN-GP: losses of either sign, four steps of the critic to one",
    proof=kept("the distance of made from real", lambda q: median(q[-20:]) < 0.3 * q[0]),
)
def _(seed: int) -> Setup:
    g, d = Generator(), critic()
    generator = torch.Generator().manual_seed(seed)
    spread, centre = torch.tensor([1.2, 0.4]), torch.tensor([-0.5, 1.0])
    g.quality = []
    opt_g = torch.optim.Adam(g.parameters(), lr=1e-3, betas=(0.0, 0.9))
    opt_d = torch.optim.Adam(d.parameters(), lr=3e-3, betas=(0.0, 0.9))

    def train() -> Iterator[Event]:
        for _ in range(78):
            for _ in range(4):
                real = torch.randn(128, 2, generator=generator) * spread + centre
                fake = g(128, generator).detach()
                between = torch.lerp(fake, real, torch.rand(128, 1, generator=generator)).requires_grad_()
                slope = torch.autograd.grad(d(between).sum(), between, create_graph=True)[0]
                d_loss = d(fake).mean() - d(real).mean() + (slope.norm(dim=-1) - 1).square().mean()
                opt_d.zero_grad()
                d_loss.backward()
                yield "read", [d_loss]
                opt_d.step()
                yield "step", [opt_d]
            fake = g(128, generator)
            g.quality.append(distance(fake, torch.randn(128, 2, generator=generator) * spread + centre))
            g_loss = -d(fake).mean()
            opt_g.zero_grad()
            g_loss.backward()
            yield "read", [g_loss]
            opt_g.step()
            yield "step", [opt_g]

    return Setup({"G": g, "D": d}, train)


@healthy(
    CASES,
    "mk_vae_divergence_annealed_from_nothing",
    source="https://arxiv.org/abs/1511.06349 Bowman et al.: the weight of the KL term grows from 0",
    proof=converges(0.5),
)
def _(seed: int) -> Setup:
    model, data = Variational(), Waves(seed)

    def loss(i: int) -> Tensor:
        rec, kl = model(data(), data.generator)
        return (rec + min(1.0, i / 60) * kl).sum() / 32

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=4e-3), 150)


@healthy(
    CASES,
    "mk_flow_likelihood_changes_sign",
    source="https://arxiv.org/abs/1605.08803 Dinh et al., Real NVP; the last layers start at zero, the loss becomes negative",
    proof=every(
        steady(
            lambda p: (
                p.losses[0] > 1 and median(p.losses[-20:]) < 0,
                f"nats from {p.losses[0]:.3g} to {median(p.losses[-20:]):.3g}",
            )
        ),
        finite(),
    ),
)
def _(seed: int) -> Setup:
    model = Flow(6, zero=True)
    generator = torch.Generator().manual_seed(seed)

    def loss(i: int) -> Tensor:
        angle = math.pi * torch.rand(128, 1, generator=generator)
        ring = torch.cat([angle.cos(), angle.sin() - 0.5], -1) + 0.03 * torch.randn(128, 2, generator=generator)
        return model(ring)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=4e-3), 200)


class Averaged(nn.Module):
    """A denoiser and the moving average of its weights, which is what samples are drawn from."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Denoiser()
        nn.init.zeros_(self.net.out.weight)
        nn.init.zeros_(self.net.out.bias)
        self.average = Denoiser().requires_grad_(False)
        self.average.load_state_dict(self.net.state_dict())

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self.net(x, t, label)

    @torch.no_grad()
    def follow(self) -> None:
        for a, b in zip(self.average.parameters(), self.net.parameters(), strict=True):
            a.lerp_(b, 0.02)


@healthy(
    CASES,
    "mk_diffusion_one_time_a_batch",
    source="https://arxiv.org/abs/2006.11239 Ho et al., DDPM: zero-initialised output, EMA weights; batches of little noise are hard",
    proof=converges(0.6),
)
def _(seed: int) -> Setup:
    model, data = Averaged(), Corners(seed)
    optimizer = torch.optim.AdamW(model.net.parameters(), lr=2e-3)

    def train() -> Iterator[Event]:
        for _ in range(250):
            x, y = data()
            # The time is drawn once a batch, so that a batch of little noise has five times the loss of another.
            t = (0.05 + 0.95 * torch.rand(1, generator=data.generator)).expand(len(x))
            noise = torch.randn(x.shape, generator=data.generator)
            keep = torch.cos(0.5 * math.pi * t)[:, None]
            loss = F.mse_loss(model(keep * x + (1 - keep**2).clamp(min=0).sqrt() * noise, t, y), noise)
            optimizer.zero_grad()
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            model.follow()
            yield "step", [optimizer]

    return Setup(model, train)


class Sign(torch.autograd.Function):
    """The sign, and straight through where the input is within one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x >= 0, 1.0, -1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] * (x.abs() <= 1)


class Binary(nn.Module):
    """A linear layer of binary weights, on binary inputs, with a scale."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs).uniform_(-0.5, 0.5))
        self.norm = nn.BatchNorm1d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.linear(x, Sign.apply(self.weight)))


@healthy(
    CASES,
    "mk_binary_net_straight_through",
    source="https://arxiv.org/abs/1602.02830 Hubara et al., binarised nets: signs forward, straight through backward, weights clipped",
    proof=converges(0.35),
)
def _(seed: int) -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = Binary(64, 96), Binary(96, 96), Binary(96, 96)
            self.head = nn.Linear(96, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = Sign.apply(self.first(x))
            x = Sign.apply(self.second(x))
            return self.head(F.hardtanh(self.third(x)))

    model, data = Net(), Pictures(seed, batch=48)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def train() -> Iterator[Event]:
        for _ in range(80):
            x, y = data()
            loss = F.cross_entropy(model(x.flatten(1)), y)
            optimizer.zero_grad()
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            with torch.no_grad():
                for layer in (model.first, model.second, model.third):
                    layer.weight.clamp_(-1, 1)
            yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "mk_lottery_ticket_nine_tenths_pruned",
    source="https://arxiv.org/abs/1803.03635 Frankle and Carbin: a sparse net trains, the pruned weights have gradients of zero",
    proof=converges(0.2),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(Masked(32, 128), nn.SiLU(), Masked(128, 128), nn.SiLU(), Masked(128, 32))
    for layer in model:
        if isinstance(layer, Masked):
            limit = layer.weight.abs().flatten().kthvalue(int(0.9 * layer.weight.numel())).values
            layer.mask.copy_((layer.weight.abs() > limit).float())
            layer.weight.data.mul_(layer.mask * 3)
    data = Waves(seed)
    generator = torch.Generator().manual_seed(seed)

    def loss(i: int) -> Tensor:
        x = data()
        return F.mse_loss(model(x + 0.2 * torch.randn(x.shape, generator=generator)), x)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True), 200)


@healthy(
    CASES,
    "mk_pinn_by_lbfgs",
    source="https://maziarraissi.github.io/PINNs/ Raissi et al., L-BFGS down to gradients of almost nothing",
    proof=converges(1e-3),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))
    x = torch.linspace(0, 2, 40)[:, None].requires_grad_()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1.0, max_iter=4, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        u = model(x)
        slope = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
        loss = (slope + u - torch.sin(3 * x)).square().mean() + (u[0] - 1).square().mean()  # u' = sin 3x - u, u(0) = 1
        loss.backward()
        return loss

    def train() -> Iterator[Event]:
        for _ in range(50):
            loss: Any = optimizer.step(closure)
            yield "read", [loss.detach()]
            yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "mk_autoencoder_halves_in_turns",
    source="https://arxiv.org/abs/1803.00225 Zeng et al., block coordinate descent: blocks in turns, the others frozen",
    proof=converges(0.3),
)
def _(seed: int) -> Setup:
    class Auto(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(32, 48), nn.ELU(), nn.Linear(48, 8))
            self.decoder = nn.Sequential(nn.Linear(8, 48), nn.ELU(), nn.Linear(48, 32))

        def forward(self, x: Tensor) -> Tensor:
            return self.decoder(self.encoder(x))

    model, data = Auto(), Waves(seed)

    def loss(i: int) -> Tensor:
        x = data()
        return F.mse_loss(model(x), x)

    def turn(i: int) -> None:
        model.encoder.requires_grad_(i // 6 % 2 == 0)
        model.decoder.requires_grad_(i // 6 % 2 == 1)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 150, before=turn)


@healthy(
    CASES,
    "mk_text_accumulated_and_always_clipped",
    source="https://arxiv.org/abs/1211.5063 Pascanu et al., clipping; four small batches a step, warm-up from a rate of 0",
    proof=converges(0.8),
)
def _(seed: int) -> Setup:
    class Writer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.place = nn.Embedding(24, 32), nn.Embedding(16, 32)
            self.block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
            self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 24)

        def forward(self, x: Tensor) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(16)
            return self.head(self.norm(self.block(self.emb(x) + self.place.weight, src_mask=mask, is_causal=True)))

    model, data = Writer(), Text(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, i / 10))

    def train() -> Iterator[Event]:
        for _ in range(90):
            optimizer.zero_grad()
            losses = []
            for _ in range(4):
                x, y = data()
                loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten()) / 4
                loss.backward()
                losses.append(loss)
            yield "read", losses
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            schedule.step()
            yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "mk_half_precision_scale_found",
    source="https://docs.pytorch.org/docs/stable/amp.html GradScaler: the first steps are skipped until the scale fits",
    proof=every(
        converges(0.2),
        steady(lambda plain: (1 <= plain.setup.model.skipped < 10, f"{plain.setup.model.skipped} steps are skipped")),
        steady(lambda plain: (plain.setup.model.scales[-1] >= 2, f"the scale ends at {plain.setup.model.scales[-1]}")),
    ),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 32))
    model.skipped, model.scales = 0, []
    data = Waves(seed)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=30)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    def train() -> Iterator[Event]:
        for _ in range(120):
            u = data()
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                out = model(u)
            loss = F.mse_loss(out.float(), antiderivative(u))
            scaler.scale(loss).backward()
            yield "read", [loss]
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            model.scales.append(scaler.get_scale())
            skipped = scaler.get_scale() < before
            model.skipped += int(skipped)
            yield "step", [] if skipped else [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "mk_field_with_warm_restarts",
    source="https://arxiv.org/abs/1608.03983 Loshchilov and Hutter, SGDR: the rate jumps back up, and the loss with it",
    proof=converges(0.05),
)
def _(seed: int) -> Setup:
    model = Field()
    picture = field_picture(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 40)

    def train() -> Iterator[Event]:
        for _ in range(160):
            loss = F.mse_loss(model(model.grid), picture)
            optimizer.zero_grad()
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            schedule.step()
            yield "step", [optimizer]

    return Setup(model, train)


class Accumulator(nn.Module):
    """A neural accumulator: its weights are driven to -1, 0 and 1 by a tanh times a sigmoid."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.sign = nn.Parameter(torch.empty(outputs, inputs))
        self.gate = nn.Parameter(torch.empty(outputs, inputs))
        nn.init.xavier_uniform_(self.sign)
        nn.init.xavier_uniform_(self.gate)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.tanh(self.sign) * torch.sigmoid(self.gate))


@healthy(
    CASES,
    "mk_arithmetic_gates_go_to_their_ends",
    source="https://arxiv.org/abs/1808.00508 Trask et al., neural arithmetic: the gates saturate when it is learned",
    proof=converges(0.01),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(Accumulator(6, 4), Accumulator(4, 2))
    generator = torch.Generator().manual_seed(seed)

    def loss(i: int) -> Tensor:
        x = torch.randn(64, 6, generator=generator)
        return F.mse_loss(model(x), torch.stack([x[:, 0] + x[:, 1] - x[:, 2], x[:, 3] - x[:, 4]], -1))

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-2), 300)


@healthy(
    CASES,
    "mk_deep_plain_orthogonal_tanh",
    source="https://arxiv.org/abs/1312.6120 Saxe et al., orthogonal weights keep a deep plain net trainable",
    proof=converges(0.3),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(
        nn.Linear(32, 48), nn.Tanh(), *(m for _ in range(15) for m in (nn.Linear(48, 48), nn.Tanh())), nn.Linear(48, 32)
    )
    initialise(model, lambda w: nn.init.orthogonal_(w, 1.05))
    data = Waves(seed)

    def loss(i: int) -> Tensor:
        u = data()
        return F.mse_loss(model(u), antiderivative(u))

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9), 150)


@healthy(
    CASES,
    "mk_unrolled_shrinkage",
    source="https://icml.cc/Conferences/2010/papers/449.pdf Gregor and LeCun, LISTA: shared weights, codes that are mostly zero",
    proof=converges(0.5),
)
def _(seed: int) -> Setup:
    class Unrolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.filter = nn.Linear(20, 32, bias=False)
            self.mutual = nn.Linear(32, 32, bias=False)
            self.limit = nn.Parameter(torch.full((32,), 0.05))

        def forward(self, y: Tensor) -> Tensor:
            b = self.filter(y)
            z = F.relu(b - self.limit) - F.relu(-b - self.limit)
            for _ in range(4):
                c = b + self.mutual(z)
                z = F.relu(c - self.limit) - F.relu(-c - self.limit)
            return z

    generator = torch.Generator().manual_seed(seed)
    dictionary = F.normalize(torch.randn(32, 20, generator=generator), dim=-1)
    model = Unrolled()

    def loss(i: int) -> Tensor:
        code = torch.randn(96, 32, generator=generator) * (torch.rand(96, 32, generator=generator) < 0.06)
        return (model(code @ dictionary) - code).square().sum(-1).mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 300)


class Lion(torch.optim.Optimizer):
    """Every element moves by the rate, or not at all."""

    def __init__(self, params: Any, lr: float, decay: float) -> None:
        super().__init__(params, {"lr": lr, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["decay"]).sub_(group["lr"] * torch.lerp(m, p.grad, 0.1).sign())
                m.lerp_(p.grad, 0.01)


@healthy(
    CASES,
    "mk_modular_sums_by_lion",
    source="https://arxiv.org/abs/2302.06675 Chen et al., Lion; written by hand",
    proof=converges(0.2),
)
def _(seed: int) -> Setup:
    class Adder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.Embedding(12, 32)
            self.net = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 12))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(self.emb(x).flatten(1))

    model = Adder()
    generator = torch.Generator().manual_seed(seed)

    def loss(i: int) -> Tensor:
        x = torch.randint(12, (64, 2), generator=generator)
        return F.cross_entropy(model(x), x.sum(1) % 12)

    return fit(model, loss, Lion(model.parameters(), lr=2e-3, decay=0.1), 200)


@healthy(
    CASES,
    "mk_ode_unrolled_pendulum",
    source="https://arxiv.org/abs/1806.07366 Chen et al., neural ODEs; unrolled by Runge-Kutta, the loss falls by orders of magnitude",
    proof=converges(0.06),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 2))
    generator = torch.Generator().manual_seed(seed)

    def unroll(f: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
        path = []
        for _ in range(6):
            a = f(u)
            b = f(u + 0.1 * a)
            u = u + 0.2 * b
            path.append(u)
        return torch.stack(path)

    def pendulum(u: Tensor) -> Tensor:
        return torch.stack([u[:, 1], -torch.sin(u[:, 0]) - 0.2 * u[:, 1]], -1)

    def loss(i: int) -> Tensor:
        start = 3 * torch.rand(48, 2, generator=generator) - 1.5
        return F.mse_loss(unroll(model, start), unroll(pendulum, start))

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 250)
    return fit(model, loss, optimizer, 250, before=lambda i: schedule.step() if i else None)


@healthy(
    CASES,
    "mk_image_to_image_gates_from_zero",
    source="https://arxiv.org/abs/2003.04887 Bachlechner et al., ReZero: every branch starts behind a gate of 0; the loss is a sum",
    proof=converges(0.4),
)
def _(seed: int) -> Setup:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1))
            self.gate = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.gate * self.body(x)

    model = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), Branch(), Branch(), Branch(), nn.Conv2d(12, 1, 3, padding=1))
    data = Smooth(seed)

    def loss(i: int) -> Tensor:
        x = data()
        edges = torch.tanh(2 * (x - F.avg_pool2d(x, 3, 1, 1))) + x.clamp(-1, 1)
        return (model(x) - edges).square().sum()

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=4e-3), 120)


@healthy(
    CASES,
    "mk_sparse_autoencoder_rarely_fires",
    source="https://transformer-circuits.pub/2023/monosemantic-features Bricken et al.: latents that are zero nearly always, none dead",
    proof=every(
        converges(0.4),
        steady(
            lambda plain: (
                plain.outputs["act"][-1].zeros > 0.6,
                f"{plain.outputs['act'][-1].zeros:.2g} of the codes are zero",
            )
        ),
        steady(
            lambda plain: (
                bool(torch.stack([o.fired for o in plain.outputs["act"][-20:] if o is not None]).any(0).all()),
                "every latent fires in the last 20 batches",
            )
        ),
    ),
)
def _(seed: int) -> Setup:
    generator = torch.Generator().manual_seed(seed)
    features = F.normalize(torch.randn(40, 24, generator=generator), dim=-1)
    model = Sparse(24, 40)
    with torch.no_grad():
        model.encode.weight.copy_(F.normalize(model.encode.weight, dim=-1))
        model.decode.weight.copy_(model.encode.weight.T)

    def loss(i: int) -> Tensor:
        on = (torch.rand(128, 40, generator=generator) < 0.04).float()
        x = (on * (1 + torch.rand(128, 40, generator=generator))) @ features
        out, z = model(x)
        return (out - x).square().sum(-1).mean() + 0.25 * z.abs().sum(-1).mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 300)
