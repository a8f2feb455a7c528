"""Nets for pictures and tables: MLPs, CNNs, ResNets, U-Nets, autoencoders, VAEs, GANs, denoisers, flows, vision transformers.

Every sick run can be built without its fault, `build(seed, fault=False)`: then it trains well, so nothing else is wrong with it.
"""

# torch types the call of a module as Any, and `backward` not at all.
# mypy: disable-error-code="no-any-return, no-untyped-call"
from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from tests.zoo.case import Blobs, Case, Event, Setup, classify, evens, fit, healthy, initialise, mlp, sick
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
"""Runs that nobody has developed on, each with its source and a proof in plain torch: they are only run to report."""

NON_FINITE = ("non_finite_activation", "non_finite_loss", "non_finite_gradient", "non_finite_weight")


class Shapes:
    """Pictures of a disc, ring, cross or square somewhere, in noise, about zero mean and unit variance, with class and mask."""

    def __init__(self, seed: int, batch: int = 16, size: int = 12, channels: int = 1, noise: float = 0.4) -> None:
        self.generator = torch.Generator().manual_seed(7000 + seed)
        self.batch, self.size, self.channels, self.noise = batch, size, channels, noise

    def __call__(self) -> tuple[Tensor, Tensor, Tensor]:
        """(pictures `[batch, channels, size, size]`, classes `[batch]`, masks `[batch, size, size]` of 0 and 1)."""
        n, s = self.batch, self.size
        y = torch.randint(4, (n,), generator=self.generator)
        shift = (torch.rand(n, 2, 1, 1, generator=self.generator) - 0.5) * s / 3
        grid = torch.arange(s) - (s - 1) / 2
        dy, dx = grid[None, :, None] - shift[:, 0], grid[None, None, :] - shift[:, 1]
        r, radius = (dx**2 + dy**2).sqrt(), s / 3
        near = torch.minimum(dx.abs(), dy.abs()) < 1
        far = torch.maximum(dx.abs(), dy.abs())
        forms = torch.stack([r < radius, (r < radius) & (r > radius / 2), near & (far < radius), far < 0.7 * radius])
        mask = forms[y, torch.arange(n)].float()
        noise = torch.randn(n, self.channels, s, s, generator=self.generator)
        return (mask[:, None] - 0.2) * 2 + self.noise * noise, y, mask

    def labelled(self) -> tuple[Tensor, Tensor]:
        """Pictures and classes alone."""
        x, y, _ = self()
        return x, y


class Table:
    """Rows of standard normal features and a smooth target of about unit variance."""

    def __init__(self, seed: int, features: int = 12, batch: int = 32, noise: float = 0.1) -> None:
        self.generator = torch.Generator().manual_seed(8000 + seed)
        self.a, self.b = torch.randn(2, features, generator=self.generator) / math.sqrt(features)
        self.features, self.batch, self.noise = features, batch, noise

    def __call__(self) -> tuple[Tensor, Tensor]:
        x = torch.randn(self.batch, self.features, generator=self.generator)
        y = torch.sin(2 * x @ self.a) + x @ self.b
        return x, y + self.noise * torch.randn(self.batch, generator=self.generator)


class LowRank:
    """Standardised rows that lie near a plane of few dimensions: what an autoencoder can compress."""

    def __init__(self, seed: int, features: int = 24, rank: int = 5, batch: int = 32) -> None:
        self.generator = torch.Generator().manual_seed(9000 + seed)
        self.map = torch.randn(rank, features, generator=self.generator)
        self.map /= self.map.norm(dim=0)
        self.batch = batch

    def __call__(self) -> Tensor:
        z = torch.randn(self.batch, len(self.map), generator=self.generator)
        return z @ self.map + 0.05 * torch.randn(self.batch, self.map.shape[1], generator=self.generator)


class Skip(nn.Module):
    """x + branch(x), or branch(x) alone."""

    def __init__(self, branch: nn.Module, skip: bool = True) -> None:
        super().__init__()
        self.branch, self.skip = branch, skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x) if self.skip else self.branch(x)


def conv(a: int, b: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(a, b, 3, stride=stride, padding=1, bias=bias)


class Classifier(nn.Module):
    """A small CNN: stem, some features, mean over the places, fc."""

    def __init__(self, features: nn.Module, width: int, classes: int = 4) -> None:
        super().__init__()
        self.features = features
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


class Flat(Classifier):
    """The same without the mean."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).flatten(1))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))


class Block(nn.Module):
    """A pre-norm transformer block; `gamma` is a LayerScale (None: none)."""

    def __init__(self, width: int, gamma: float | None = None) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, 2)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.gamma1 = nn.Parameter(torch.full((width,), gamma)) if gamma is not None else None
        self.gamma2 = nn.Parameter(torch.full((width,), gamma)) if gamma is not None else None

    def forward(self, x: Tensor) -> Tensor:
        a = self.attn(self.norm1(x))
        x = x + (a if self.gamma1 is None else self.gamma1 * a)
        m = self.mlp(self.norm2(x))
        return x + (m if self.gamma2 is None else self.gamma2 * m)


class ViT(nn.Module):
    """A vision transformer on 12 x 12 pictures, patches of 3 x 3."""

    def __init__(self, width: int = 24, depth: int = 3, gamma: float | None = None, classes: int = 4) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, 3, stride=3)
        self.position = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.blocks = nn.ModuleList(Block(width, gamma) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        t = self.embed(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            t = block(t)
        return self.head(self.norm(t).mean(1))


# ---------------------------------------------------------------------------------------------------------------- sick


@sick(
    CASES,
    "ha_sigmoid_autoencoder_of_eight_layers",
    ("vanishing_gradient",),
    tuple(str(i) for i in range(11)),
    source="https://proceedings.mlr.press/v9/glorot10a.html deep sigmoid nets: the gradient shrinks layer by layer towards the input",
    proof=every(gradient_ratio("0.weight", "14.weight", 1e-4, last=15), loss_stays(0.3, last=40)),
    also=("loss_plateau",),
)
def _(seed: int, fault: bool = True) -> Setup:
    data = LowRank(seed)
    act = nn.Sigmoid if fault else nn.Tanh
    sizes = (24, 24, 20, 16, 8, 16, 20, 24)
    hidden = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), act())]
    model = nn.Sequential(*hidden, nn.Linear(24, 24))

    def loss(i: int) -> Tensor:
        x = data()
        return F.mse_loss(model(x), x)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), updates=60)


@sick(
    CASES,
    "ha_plain_batchnorm_net_of_forty_layers",
    ("exploding_gradient",),
    tuple(f"blocks.{i}" for i in range(40)),
    source="https://arxiv.org/abs/1902.08129 batch normalisation without skips: gradients grow exponentially with depth",
    proof=gradient_ratio("blocks.39.branch.0.weight", "blocks.0.branch.0.weight", 0.02, last=12),
    also=("loss_plateau",),
)
def _(seed: int, fault: bool = True) -> Setup:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(
                *(
                    Skip(nn.Sequential(nn.Linear(32, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU()), skip=not fault)
                    for _ in range(40)
                )
            )
            self.head = nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks(x))

    model = Deep()
    loss = classify(model, Blobs(seed, features=32, batch=64))
    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-3), updates=30)


@sick(
    CASES,
    "ha_heat_maps_drawn_between_backward_and_step",
    ("gradient_spike",),
    source="https://github.com/jacobgil/pytorch-grad-cam/issues/488 class activation maps in the training loop disturb its gradients",
    proof=every(gradient_spikes(40, 20), converges(0.9)),
    onset=40,
    also=("loss_spike", "gradients_not_zeroed", "dead_units"),  # the wild step kills some units
)
def _(seed: int, fault: bool = True) -> Setup:
    data = Shapes(seed, batch=24)
    gallery, _, _ = Shapes(seed + 50, batch=48)()
    features = nn.Sequential(conv(1, 12, bias=False), nn.GroupNorm(3, 12), nn.ReLU(), conv(12, 16, 2), nn.ReLU())
    model = Classifier(features, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def train() -> Iterator[Event]:
        for i in range(70):
            optimizer.zero_grad()
            x, y = data.labelled()
            value = F.cross_entropy(model(x), y)
            value.backward()
            if i == 40 and fault:
                # Heat maps of a gallery want the gradient of the best scores; it stays in the parameters, on top of the loss's.
                model(gallery).max(1).values.sum().backward()
            yield "read", [value]
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


@sick(
    CASES,
    "ha_table_shard_with_target_in_cents",
    ("loss_spike",),
    source="https://arxiv.org/abs/2204.02311 PaLM: loss spikes come with particular batches of data",
    proof=lambda plain: _spike(plain, 45, 30),
    onset=45,
    also=("gradient_spike",),
)
def _(seed: int, fault: bool = True) -> Setup:
    data = Table(seed, batch=48)
    model = nn.Sequential(
        nn.Linear(12, 32),
        *(Skip(nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 32))) for _ in range(3)),
        nn.Linear(32, 1),
    )

    def loss(i: int) -> Tensor:
        x, y = data()
        if i == 45 and fault:
            y = 100 * y
        return F.huber_loss(model(x)[:, 0], y)

    def clip(i: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-3), updates=70, between=clip)


def _spike(plain: Plain, update: int, factor: float) -> str:
    ratio = plain.losses[update] / median(plain.losses[update - 15 : update])
    assert ratio > factor, f"the loss at {update} is {ratio:.3g} times its median before"
    after = median(plain.losses[update + 1 : update + 15]) / median(plain.losses[update - 15 : update])
    assert after < 2, f"the loss stays at {after:.3g} times what it was"
    return f"the loss at update {update} is {ratio:.3g} times the median before it, and {after:.3g} times after it"


@sick(
    CASES,
    "ha_blank_frame_standardised_by_its_own_deviation",
    ("non_finite_input",),
    ("",),
    source="https://github.com/Project-MONAI/MONAI/issues/1092 (x - mean) / std of a picture that is all zeros gives NaN",
    proof=lambda plain: _nan_input(plain, 25),
    onset=25,
    also=NON_FINITE,
)
def _(seed: int, fault: bool = True) -> Setup:
    data = Shapes(seed, batch=16, channels=3)
    features = nn.Sequential(conv(3, 16, bias=False), nn.GroupNorm(4, 16), nn.ReLU(), conv(16, 24, 2), nn.ReLU())
    model = Classifier(features, 24)

    def loss(i: int) -> Tensor:
        x, y = data.labelled()
        if i == 25:
            x[3] = 0
        mean, std = x.mean((1, 2, 3), keepdim=True), x.std((1, 2, 3), keepdim=True)
        return F.cross_entropy(model((x - mean) / (std if fault else std + 1e-6)), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), updates=40 if fault else 100)


def _nan_input(plain: Plain, update: int) -> str:
    first = plain.outputs["features.0"]
    bad = [o is not None and o.nonfinite > 0 for o in plain.outputs["features.0"]]
    assert bad.index(True) == update, f"the first convolution gives NaN from {bad.index(True)}"
    seen = first[update]
    assert seen is not None
    # One picture of 16 is NaN, and the weights are still finite, so the input is at fault.
    weights = plain.weights["features.0.weight"][update]
    assert math.isfinite(weights), "the weights are not finite"
    assert seen.nonfinite == 16 * 12 * 12, f"{seen.nonfinite} elements are NaN, not those of one picture"
    return f"with finite weights the first convolution gives NaN for one picture of update {update}"


class PerPicture(nn.Module):
    """An instance normalisation written by hand, `eps` forgotten or not."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean((2, 3), keepdim=True)
        return centred / (centred.square().mean((2, 3), keepdim=True) + self.eps).sqrt()


class UNet(nn.Module):
    """Two scales, skips by concatenation."""

    def __init__(self, norm: nn.Module, width: int = 8, outputs: int = 1) -> None:
        super().__init__()
        self.enc1 = nn.Sequential()
        self.enc1.add_module("conv", conv(1, width, bias=False))
        self.enc1.add_module("norm", norm)
        self.enc1.add_module("act", nn.ReLU())
        self.enc2 = nn.Sequential(conv(width, 2 * width, 2), nn.ReLU(), conv(2 * width, 2 * width), nn.ReLU())
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.dec = nn.Sequential(conv(2 * width, width), nn.ReLU(), nn.Conv2d(width, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        a = self.enc1(x)
        return self.dec(torch.cat([a, self.up(self.enc2(a))], 1))


@sick(
    CASES,
    "ha_unet_with_handwritten_instance_norm",
    ("non_finite_activation",),
    ("enc1.norm",),
    source="https://arxiv.org/abs/1607.08022 instance normalisation (its epsilon forgotten, and a black slice has no variance)",
    proof=lambda plain: _nan_born(plain, "enc1.norm", "enc1.conv", 22),
    onset=22,
    also=("non_finite_loss", "non_finite_gradient", "non_finite_weight"),
)
def _(seed: int, fault: bool = True) -> Setup:
    data = Shapes(seed, batch=8)
    model = UNet(PerPicture(0.0 if fault else 1e-5))

    def loss(i: int) -> Tensor:
        x, _, mask = data()
        if i == 22:
            x[5], mask[5] = 0, 0
        return F.binary_cross_entropy_with_logits(model(x)[:, 0], mask)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=4e-3), updates=36)


def _nan_born(plain: Plain, module: str, before: str, update: int) -> str:
    source = plain.outputs[before][update]
    assert source is not None
    assert source.nonfinite == 0, f"{before} is not finite either"
    return first_non_finite(update, module)(plain) + f"; {before}, which feeds it, is finite there"


@sick(
    CASES,
    "ha_segmentation_batch_of_ignored_pixels",
    ("non_finite_loss",),
    source="https://github.com/pytorch/pytorch/issues/70348 cross_entropy is NaN where every target is ignore_index",
    proof=lambda plain: _nan_loss(plain, 30),
    onset=30,
    also=("non_finite_gradient", "non_finite_weight", "non_finite_activation"),
)
def _(seed: int, fault: bool = True) -> Setup:
    data = Shapes(seed, batch=2, size=16)
    model = nn.Sequential(
        conv(1, 12), nn.BatchNorm2d(12), nn.LeakyReLU(0.1), conv(12, 12), nn.BatchNorm2d(12), nn.LeakyReLU(0.1), conv(12, 5)
    )

    def loss(i: int) -> Tensor:
        x, y, mask = data()
        target = (mask * (1 + y[:, None, None])).long()
        target[:, :2] = 255  # a border that nobody labelled
        if i == 30:
            target[:] = 255  # two pictures without any labels in one small batch
        out = model(x)
        if fault:
            return F.cross_entropy(out, target, ignore_index=255)
        return F.cross_entropy(out, target, ignore_index=255, reduction="sum") / max(1, int((target != 255).sum()))

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), updates=45)


def _nan_loss(plain: Plain, update: int) -> str:
    bad = [name for name, seen in plain.outputs.items() if (o := seen[update]) is not None and o.nonfinite]
    assert not bad, f"{bad} are not finite"
    bad_loss = [not math.isfinite(x) for x in plain.losses]
    assert bad_loss.index(True) == update, f"the first NaN is at {bad_loss.index(True)}"
    return f"the loss is NaN at update {update}, all outputs are finite there"


class PowerNorm(nn.Module):
    """A square root of what is positive, 0 elsewhere: the backward pass of the branch not taken is 0 / 0."""

    def __init__(self, safe: bool) -> None:
        super().__init__()
        self.safe = safe

    def forward(self, x: Tensor) -> Tensor:
        inside = torch.where(x > 0, x, 1.0) if self.safe else x
        return torch.where(x > 0, inside.sqrt(), 0.0)


@sick(
    CASES,
    "ha_square_root_behind_torch_where",
    ("non_finite_gradient",),
    ("stem", "power"),
    source="https://github.com/pytorch/pytorch/issues/4132 torch.where: the branch not taken gives NaN gradients",
    proof=lambda plain: _nan_gradient(plain, "stem.weight", "head.weight"),
    also=("non_finite_weight", "non_finite_activation", "non_finite_loss"),
)
def _(seed: int, fault: bool = True) -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = conv(1, 12, 2)
            self.power = PowerNorm(safe=not fault)
            self.body = nn.Sequential(conv(12, 16, 2), nn.GELU())
            self.head = nn.Linear(16 * 9, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(self.power(self.stem(x))).flatten(1))

    data = Shapes(seed)
    model = Net()
    loss = classify(model, data.labelled)
    # PyTorch's SGD moves by NaN as well: what follows the first update is NaN everywhere.
    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9), updates=20 if fault else 80)


def _nan_gradient(plain: Plain, bad: str, good: str) -> str:
    assert math.isfinite(plain.losses[0]), "the loss is not finite"
    assert plain.nonfinite[bad][0] > 0, f"{bad} has a finite gradient"
    assert plain.nonfinite[good][0] == 0, f"the gradient of {good} is not finite either"
    outputs = [name for name, seen in plain.outputs.items() if (o := seen[0]) is not None and o.nonfinite]
    assert not outputs, f"{outputs} are not finite"
    return f"at update 0 the loss and all outputs are finite, the gradient of {bad} is not, that of {good} is"


def _prior(m: nn.Module) -> None:
    if isinstance(m, nn.Conv2d) and m.bias is not None:
        nn.init.constant_(m.bias, -math.log(99))


@sick(
    CASES,
    "ha_detector_with_the_prior_bias_in_every_layer",
    ("dead_units", "poor_init"),
    ("0", "1", "2", "3", "4", "5"),
    source="https://arxiv.org/abs/1708.02002 RetinaNet's bias -log((1 - p) / p) is for the last layer only",
    proof=every(dead_fraction("3", 0.9, last=12), dead_fraction("5", 0.9, last=12)),
    also=("zero_gradient", "vanishing_gradient", "update_ratio_too_small", "loss_plateau"),
)
def _(seed: int, fault: bool = True) -> Setup:
    data = Shapes(seed, batch=8)
    model = nn.Sequential(conv(1, 12), nn.ReLU(), conv(12, 12), nn.ReLU(), conv(12, 12), nn.ReLU(), conv(12, 1))
    initialise(model, lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu"))
    model.apply(_prior) if fault else _prior(model[6])

    def loss(i: int) -> Tensor:
        x, _, mask = data()
        return F.binary_cross_entropy_with_logits(model(x)[:, 0], mask)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), updates=40)


class SparseCoder(nn.Module):
    def __init__(self, features: int, latents: int, act: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.Linear(features, latents)
        self.act = act
        self.decoder = nn.Linear(latents, features)
        self.code = torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        self.code = self.act(self.encoder(x))
        return self.decoder(self.code)


class JumpReLU(nn.Module):
    """x where it is above a threshold, 0 elsewhere: a ReLU while the threshold is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.threshold = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return x * (x > self.threshold)


@sick(
    CASES,
    "ha_sparse_autoencoder_with_too_high_a_threshold",
    ("dead_units",),
    ("act", "encoder"),
    source="https://arxiv.org/abs/2407.14435 JumpReLU sparse autoencoders: a latent that stays below its threshold is dead",
    proof=lambda plain: _dies(plain, "act", 25, 0.9),
    onset=25,
    also=("zero_gradient", "vanishing_gradient", "loss_spike", "loss_diverging", "loss_plateau"),
)
def _(seed: int, fault: bool = True) -> Setup:
    data = LowRank(seed, rank=6, batch=48)
    act = JumpReLU()
    model = SparseCoder(24, 48, act)

    def sharpen(i: int) -> None:
        # Sparse from here on; the threshold was chosen for codes of another scale.
        if i == 25:
            act.threshold = 8.0 if fault else 0.2

    def loss(i: int) -> Tensor:
        x = data()
        return (model(x) - x).square().sum(1).mean() + 0.02 * model.code.sum(1).mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=4e-3), updates=60, before=sharpen)


def _dies(plain: Plain, module: str, update: int, above: float) -> str:
    early = [o.fired for o in plain.outputs[module][: update - 15] if o is not None]
    alive = float(torch.stack(early).any(0).double().mean())
    assert alive > 0.9, f"only {alive:.3g} of the units fire at first"
    return dead_fraction(module, above, first=update)(plain) + f" from update {update} on; {alive:.3g} did before"


@sick(
    CASES,
    "ha_sigmoid_table_net_with_weights_from_0_to_1",
    ("saturated_activation", "poor_init"),
    tuple(str(i) for i in range(4)),
    source="https://docs.pytorch.org/docs/stable/nn.init.html uniform_ draws from 0 to 1 unless told otherwise, whatever the fan-in",
    proof=every(lambda plain: _flat(plain, "3", 0.99), gradient_ratio("0.weight", "4.bias", 1e-3, last=15)),
    also=("vanishing_gradient", "loss_plateau"),
)
def _(seed: int, fault: bool = True) -> Setup:
    model = mlp(nn.Sigmoid, 2, width=24, inputs=16)
    for name in evens(0, 2) if fault else ():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        nn.init.uniform_(layer.weight)
    blobs = Blobs(seed, batch=48, spread=0.7)

    def data() -> tuple[Tensor, Tensor]:
        x, y = blobs()
        return x.sigmoid(), y  # columns scaled to 0 .. 1, as is usual before a sigmoid net

    return fit(model, classify(model, data), torch.optim.Adam(model.parameters(), lr=5e-3), updates=40 if fault else 150)


def _flat(plain: Plain, module: str, above: float) -> str:
    low = min(o.low for o in plain.outputs[module][:15] if o is not None)
    assert low > above, f"a sigmoid of {module} gives {low:.4g}, not above {above}"
    return f"no sigmoid of {module} gives less than {low:.7g} in the first 15 updates"


class VQVAE(nn.Module):
    """Vector quantisation of 3 x 3 places."""

    def __init__(self, straight_through: bool) -> None:
        super().__init__()
        self.straight_through = straight_through
        self.encoder = nn.Sequential(conv(1, 16, 2), nn.GELU(), conv(16, 8, 2))
        self.codebook = nn.Embedding(32, 8)
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(8, 16, 2, stride=2), nn.GELU(), nn.ConvTranspose2d(16, 16, 2, stride=2), nn.GELU(), conv(16, 1)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encoder(x).permute(0, 2, 3, 1)
        index = torch.cdist(z.reshape(-1, 8), self.codebook.weight).argmin(1)
        q = self.codebook(index).view_as(z)
        extra = (q - z.detach()).square().mean()
        if self.straight_through:
            extra = extra + 0.25 * (z - q.detach()).square().mean()
            q = z + (q - z).detach()
        return self.decoder(q.permute(0, 3, 1, 2)), extra


@sick(
    CASES,
    "ha_vqvae_without_straight_through",
    ("missing_gradient",),
    ("encoder",),
    source="https://arxiv.org/abs/1711.00937 VQ-VAE: argmin has no gradient, so that of the decoder must be copied to the encoder",
    proof=no_gradient("encoder.0.weight", "encoder.0.bias", "encoder.2.weight", "encoder.2.bias"),
)
def _(seed: int, fault: bool = True) -> Setup:
    data = Shapes(seed)
    model = VQVAE(straight_through=not fault)
    with torch.no_grad():  # the codes begin as outputs of the encoder
        z = model.encoder(data()[0]).permute(0, 2, 3, 1).reshape(-1, 8)
        model.codebook.weight.copy_(z[torch.randperm(len(z), generator=data.generator)[:32]])

    def loss(i: int) -> Tensor:
        x, _, _ = data()
        out, extra = model(x)
        return F.mse_loss(out, x) + extra

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-3), updates=50 if fault else 200)


class Rounding(nn.Module):
    """Fake quantisation of a code to steps of 1/8, once `on`."""

    def __init__(self, straight_through: bool) -> None:
        super().__init__()
        self.on, self.straight_through = False, straight_through

    def forward(self, x: Tensor) -> Tensor:
        if not self.on:
            return x
        rounded = torch.round(8 * x) / 8
        return x + (rounded - x).detach() if self.straight_through else rounded


class Compressor(nn.Module):
    def __init__(self, straight_through: bool) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(24, 32), nn.SiLU(), nn.Linear(32, 6))
        self.quantise = Rounding(straight_through)
        self.decoder = nn.Sequential(nn.Linear(6, 32), nn.SiLU(), nn.Linear(32, 24))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.quantise(self.encoder(x)))


@sick(
    CASES,
    "ha_quantisation_switched_on_without_straight_through",
    ("zero_gradient",),
    ("encoder",),
    source="https://discuss.pytorch.org/t/torch-round-gradient/28628/4 round() is a step function: its gradient is zero",
    proof=every(
        zero_gradient("encoder.0.weight", "encoder.0.bias", "encoder.2.weight", first=30),
        lambda plain: _had_gradient(plain, "encoder.0.weight", 30),
    ),
    onset=30,
    also=("vanishing_gradient",),
)
def _(seed: int, fault: bool = True) -> Setup:
    data = LowRank(seed)
    model = Compressor(straight_through=not fault)

    def switch(i: int) -> None:
        model.quantise.on = i >= 30

    def loss(i: int) -> Tensor:
        x = data()
        return F.mse_loss(model(x), x)

    return fit(model, loss, torch.optim.NAdam(model.parameters(), lr=4e-3), updates=60, before=switch)


def _had_gradient(plain: Plain, name: str, until: int) -> str:
    assert min(plain.grads[name][:until]) > 0, f"{name} has no gradient before {until}"
    return f"{name} has a gradient until update {until}"


@sick(
    CASES,
    "ha_vit_layer_decay_applied_at_every_step",
    ("frozen_weights",),
    ("embed", "blocks", ""),  # "" owns the table of positions
    source="https://github.com/jaehyunnn/ViTPose_pytorch/issues/20 layer decay multiplied in at every step: the rate falls to 0",
    proof=every(unchanged("embed.weight", "embed.bias", first=14), loss_stays(0.2, first=14)),
    onset=14,
    also=("update_ratio_too_small", "loss_plateau"),
)
def _(seed: int, fault: bool = True) -> Setup:
    data = Shapes(seed, batch=24)
    model = ViT()
    stages: list[list[nn.Parameter]] = [
        [model.position, *model.embed.parameters()],
        *(list(block.parameters()) for block in model.blocks),
        [*model.norm.parameters(), *model.head.parameters()],
    ]
    scales = [0.75 ** (len(stages) - 1 - k) for k in range(len(stages))]
    groups = [{"params": p, "lr": 2e-3 * s} for p, s in zip(stages, scales, strict=True)]
    optimizer = torch.optim.Adam(groups)

    def decay(i: int) -> None:
        for group, scale in zip(optimizer.param_groups, scales, strict=True):
            if fault:
                group["lr"] *= scale

    return fit(model, classify(model, data.labelled), optimizer, updates=60, between=decay)


@sick(
    CASES,
    "ha_new_head_put_in_after_the_optimizer",
    ("not_in_optimizer",),
    ("fc",),
    source="https://docs.pytorch.org/tutorials/beginner/transfer_learning_tutorial.html model.fc is replaced (here after the optimizer)",
    proof=unchanged("fc.weight", "fc.bias"),
)
def _(seed: int, fault: bool = True) -> Setup:
    data = Shapes(seed)
    block = nn.Sequential(conv(16, 16, bias=False), nn.BatchNorm2d(16), nn.ReLU(), conv(16, 16, bias=False), nn.BatchNorm2d(16))
    features = nn.Sequential(conv(1, 16, 2, bias=False), nn.BatchNorm2d(16), nn.ReLU(), Skip(block), nn.ReLU())
    model = Classifier(features, 16, classes=10)
    if not fault:
        model.fc = nn.Linear(16, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    if fault:
        model.fc = nn.Linear(16, 4)

    def train() -> Iterator[Event]:
        for _ in range(40):
            x, y = data.labelled()
            value = F.cross_entropy(model(x), y)
            model.zero_grad()
            value.backward()
            yield "read", [value]
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


@sick(
    CASES,
    "ha_backbone_unfrozen_but_not_given_to_the_optimizer",
    ("not_in_optimizer",),
    ("features",),
    source="https://theneuralbase.com/pytorch/learn/intermediate/freezing-base-model-weights/ unfreezing leaves stale parameter groups",
    proof=every(
        unchanged("features.0.weight", "features.3.weight", first=25),
        lambda plain: _no_gradient_before(plain, "features.0.weight", 25),
    ),
    onset=25,
)
def _(seed: int, fault: bool = True) -> Setup:
    data = Shapes(seed, batch=32)
    features = nn.Sequential(
        conv(1, 16, 2), nn.GroupNorm(4, 16), nn.SiLU(), conv(16, 16), nn.GroupNorm(4, 16), nn.SiLU(), conv(16, 24, 2), nn.SiLU()
    )
    model = Flat(features, 24 * 9)
    features.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)

    def train() -> Iterator[Event]:
        for i in range(60):
            if i == 25:
                features.requires_grad_(True)
                if not fault:
                    optimizer.add_param_group({"params": list(features.parameters()), "lr": 2e-3})
            x, y = data.labelled()
            model.zero_grad()
            value = F.cross_entropy(model(x), y)
            value.backward()
            yield "read", [value]
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


def _no_gradient_before(plain: Plain, name: str, update: int) -> str:
    assert all(math.isnan(g) for g in plain.grads[name][:update]), f"{name} has a gradient before {update}"
    return f"{name} gets its first gradient at update {update}"


@sick(
    CASES,
    "ha_denoiser_with_adam_at_a_rate_of_one",
    ("update_ratio_too_large",),
    source="https://github.com/rajveermalviya/language-modeling/issues/3 Adam with a learning rate of 1.0: the loss doesn't fall",
    proof=update_ratio(above=0.3, last=5),
    also=("loss_diverging", "loss_spike", "gradient_spike", "exploding_gradient"),
)
def _(seed: int, fault: bool = True) -> Setup:
    data = Shapes(seed, batch=8)
    model = nn.Sequential(conv(1, 12), nn.GELU(), conv(12, 12), nn.GELU(), conv(12, 12), nn.GELU(), conv(12, 1))

    def loss(i: int) -> Tensor:
        x, _, mask = data()
        return F.mse_loss(model(x)[:, 0], mask)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1.0 if fault else 3e-3), updates=40)


@sick(
    CASES,
    "ha_mixer_at_a_rate_ten_thousand_times_too_small",
    ("update_ratio_too_small",),
    source="https://cs231n.github.io/neural-networks-3/ updates should be about 1e-3 of the weights; lower, and the rate is too low",
    proof=every(update_ratio(below=2e-5, last=15), loss_stays(0.1)),
    also=("loss_plateau",),
)
def _(seed: int, fault: bool = True) -> Setup:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(1, 24, 3, stride=3)
            self.tokens = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
            self.channels = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))
            self.head = nn.Linear(24, 4)

        def forward(self, x: Tensor) -> Tensor:
            t = self.embed(x).flatten(2)
            t = (t + self.tokens(t)).transpose(1, 2)
            return self.head((t + self.channels(t)).mean(1))

    data = Shapes(seed, batch=32)
    model = Mixer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-7 if fault else 3e-3)
    return fit(model, classify(model, data.labelled), optimizer, updates=60)


@sick(
    CASES,
    "ha_classifier_trained_by_gradient_ascent",
    ("loss_diverging",),
    source="https://github.com/pytorch/pytorch/issues/3495 gradient ascent on cross-entropy: the loss grows without bound",
    proof=every(loss_grows(5, last=15), update_ratio(below=0.2, last=15)),
    also=("exploding_gradient", "update_ratio_too_large", "gradient_spike", "loss_spike"),
)
def _(seed: int, fault: bool = True) -> Setup:
    model = mlp(nn.Tanh, 2)
    # `maximize` was copied from the loop of an adversary.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, maximize=fault)
    return fit(model, classify(model, Blobs(seed)), optimizer, updates=20 if fault else 60)


@sick(
    CASES,
    "ha_plain_cnn_with_std_of_a_hundredth",
    ("poor_init", "vanishing_gradient"),
    tuple(str(i) for i in range(14)),
    source="https://arxiv.org/abs/1502.01852 weights of standard deviation 0.01 stall deep rectifier nets",
    proof=every(gradient_ratio("0.weight", "13.bias", 1e-5, last=15), loss_stays(0.05)),
    also=("update_ratio_too_small", "loss_plateau"),
)
def _(seed: int, fault: bool = True) -> Setup:
    layers = [m for k in range(6) for m in (nn.Conv2d(16 if k else 1, 16, 3, 2 if k in (2, 4) else 1, 1), nn.LeakyReLU(0.1))]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 9, 4))
    if fault:
        initialise(model, lambda w: nn.init.normal_(w, std=0.01))
    else:
        initialise(model, lambda w: nn.init.kaiming_normal_(w, a=0.1))
    data = Shapes(seed, batch=24)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    return fit(model, classify(model, data.labelled), optimizer, updates=60)


@sick(
    CASES,
    "ha_table_of_raw_incomes_and_ages",
    ("unnormalized_input",),
    ("",),
    source="http://yann.lecun.com/exdb/publis/pdf/lecun-98b.pdf Efficient BackProp: inputs need zero mean and like scales",
    proof=lambda plain: _scale(plain, "0", 100),
    also=("dead_units", "exploding_gradient"),
)
def _(seed: int, fault: bool = True) -> Setup:
    data = Table(seed, features=8)
    model = mlp(nn.ReLU, 2, width=32, inputs=8, outputs=1)
    location = torch.tensor([52000.0, 41, 3, 1800, 0.4, 720, 12, 250])
    scale = torch.tensor([21000.0, 13, 1.5, 900, 0.2, 60, 8, 110])

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.mse_loss(model(x * scale + location if fault else x)[:, 0], y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-3), updates=60)


def _scale(plain: Plain, module: str, above: float) -> str:
    seen = plain.outputs[module][0]
    assert seen is not None
    assert seen.rms > above, f"the rms of what {module} gives is {seen.rms:.3g}"
    return f"the rms of what {module} gives at update 0 is {seen.rms:.3g}, though its weights are those of the default"


@sick(
    CASES,
    "ha_cnn_that_ends_in_a_softmax",
    ("double_softmax",),
    ("softmax",),
    source="https://github.com/jindongwang/Deep-learning-activity-recognition/issues/10 a softmax layer before CrossEntropyLoss",
    proof=lambda plain: _probabilities(plain, "softmax", 4),
    also=("loss_plateau",),
)
def _(seed: int, fault: bool = True) -> Setup:
    class Net(Classifier):
        def __init__(self) -> None:
            super().__init__(nn.Sequential(conv(1, 16), nn.ReLU(), nn.MaxPool2d(2), conv(16, 16), nn.ReLU(), nn.MaxPool2d(2)), 16)
            self.softmax = nn.Softmax(dim=1) if fault else nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.softmax(super().forward(x))

    model = Net()
    return fit(model, classify(model, Shapes(seed).labelled), torch.optim.Adam(model.parameters(), lr=3e-3), updates=80)


def _probabilities(plain: Plain, module: str, classes: int) -> str:
    seen = [o for o in plain.outputs[module] if o is not None]
    assert len(seen) == len(plain.losses), f"{module} is not always called"
    assert all(0 <= o.low <= o.high <= 1 for o in seen), f"{module} gives no probabilities"
    # With probabilities for logits the loss can't fall below that of 1 against 0.
    floor = math.log(1 + (classes - 1) / math.e)
    assert min(plain.losses) >= floor - 1e-6, f"the loss falls to {min(plain.losses):.4g}"
    return f"the loss takes probabilities; it can't fall below {floor:.3g}, and ends at {plain.losses[-1]:.3g}"


# ------------------------------------------------------------------------------------------------------------- healthy


@healthy(
    CASES,
    "ha_sigmoid_net_whose_first_layer_learns_from_little",
    source="https://www.nature.com/articles/323533a0 Rumelhart et al.: nets of logistic units; here three layers of them under Adam",
    proof=every(converges(0.3), gradient_ratio("0.weight", "6.weight", 0.2, last=10)),
)
def _(seed: int) -> Setup:
    model = mlp(nn.Sigmoid, 3, width=32)
    initialise(model, nn.init.xavier_normal_)
    return fit(model, classify(model, Blobs(seed, batch=48)), torch.optim.Adam(model.parameters(), lr=1e-2), updates=200)


@healthy(
    CASES,
    "ha_vit_with_small_output_projections_and_warm_up",
    source="https://arxiv.org/abs/2010.11929 ViT: AdamW, linear warm-up; output projections small at first, as in GPT-2",
    proof=every(converges(0.5), lambda plain: _below(plain, "blocks.0.attn.qkv.weight", "head.weight", 0.1)),
)
def _(seed: int) -> Setup:
    data = Shapes(seed, batch=32, noise=0.4)
    model = ViT(depth=3)
    for module in model.modules():
        if isinstance(module, Block):
            for layer in (module.attn.proj, module.mlp[2]):
                assert isinstance(layer, nn.Linear)
                nn.init.normal_(layer.weight, std=0.02 / math.sqrt(6))
                nn.init.zeros_(layer.bias)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)

    def warm(i: int) -> None:
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (i + 1) / 30)

    return fit(model, classify(model, data.labelled), optimizer, updates=150, before=warm)


def _below(plain: Plain, small: str, large: str, factor: float) -> str:
    ratio = plain.grads[small][0] / plain.grads[large][0]
    assert ratio < factor, f"{small} has {ratio:.3g} of the gradient of {large} at first"
    return f"{small} has {ratio:.3g} of the gradient of {large} at first"


@healthy(
    CASES,
    "ha_sparse_autoencoder_with_mostly_zero_codes",
    source="https://arxiv.org/abs/2406.04093 sparse autoencoders: most latents are zero for any one input, and all are alive",
    proof=lambda plain: _sparse(plain, "act", 0.68),
)
def _(seed: int) -> Setup:
    data = LowRank(seed, rank=12, batch=96)
    model = SparseCoder(24, 48, nn.ReLU())
    with torch.no_grad():
        model.decoder.weight.copy_(model.encoder.weight.t())
        model.encoder.bias.fill_(-0.5)

    def loss(i: int) -> Tensor:
        x = data()
        return (model(x) - x).square().sum(1).mean() + 0.8 * model.code.sum(1).mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), updates=250)


def _sparse(plain: Plain, module: str, above: float) -> str:
    seen = [o for o in plain.outputs[module] if o is not None]
    zeros = median(o.zeros for o in seen[-50:])
    alive = float(torch.stack([o.fired for o in seen[-50:]]).any(0).double().mean())
    assert zeros > above, f"{zeros:.3g} of the codes are zero"
    assert alive == 1, f"{alive:.3g} of the units fire"
    return converges(0.5)(plain) + f"; {zeros:.3g} of the codes are zero and every unit fires"


@healthy(
    CASES,
    "ha_sigmoid_head_on_rare_positives",
    source="https://arxiv.org/abs/1708.02002 a bias of -log((1 - p) / p) in the last layer where positives are rare",
    proof=every(converges(0.5), lambda plain: _head_is_low(plain, "7", 0.1)),
)
def _(seed: int) -> Setup:
    g = torch.Generator().manual_seed(seed)
    axis = torch.randn(16, generator=g)
    axis /= axis.norm()
    model = nn.Sequential(
        nn.Linear(16, 32),
        nn.LeakyReLU(0.1),
        nn.Linear(32, 32),
        nn.LeakyReLU(0.1),
        nn.Linear(32, 16),
        nn.LeakyReLU(0.1),
        nn.Linear(16, 1),
        nn.Sigmoid(),
    )
    last = model[6]
    assert isinstance(last, nn.Linear)
    nn.init.constant_(last.bias, -math.log(32))

    def loss(i: int) -> Tensor:
        x = torch.randn(256, 16, generator=g)
        y = (x @ axis > 1.9).float()  # 3 in 100
        return F.binary_cross_entropy(model(x)[:, 0], y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), updates=250)


def _head_is_low(plain: Plain, module: str, below: float) -> str:
    seen = plain.outputs[module][5]
    assert seen is not None
    assert seen.rms < below, f"the head gives {seen.rms:.3g}"
    return f"the sigmoid of the head starts near 0: rms {seen.rms:.3g} at update 5"


class Coupling(nn.Module):
    """An affine coupling of RealNVP; its last layer is zero at first, so it starts as the identity."""

    def __init__(self, size: int, flip: bool) -> None:
        super().__init__()
        self.flip = flip
        half = size // 2
        self.net = nn.Sequential(nn.Linear(half, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2 * half))
        last = self.net[4]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, 1)
        if self.flip:
            a, b = b, a
        shift, scale = self.net(a).chunk(2, 1)
        scale = torch.tanh(scale)
        b = (b + shift) * scale.exp()
        return torch.cat([b, a] if self.flip else [a, b], 1), scale.sum(1)


class Flow(nn.Module):
    def __init__(self, size: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Coupling(size, flip=k % 2 == 1) for k in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """The negative log-likelihood of each row, up to a constant."""
        total = x.new_zeros(len(x))
        for layer in self.layers:
            x, log_det = layer(x)
            total = total + log_det
        return 0.5 * x.square().sum(1) - total


@healthy(
    CASES,
    "ha_flow_of_couplings_that_start_as_the_identity",
    source="https://arxiv.org/abs/1807.03039 Glow: the last layer of each coupling is initialised with zeros",
    proof=lambda plain: _falls_by(plain, 1.5),
)
def _(seed: int) -> Setup:
    data = LowRank(seed, features=8, rank=4, batch=64)
    model = Flow(8, 4)
    return fit(model, lambda i: model(data()).mean(), torch.optim.Adam(model.parameters(), lr=3e-3), updates=200)


def _falls_by(plain: Plain, nats: float) -> str:
    """For a loss that may change its sign."""
    assert all(math.isfinite(x) for x in plain.losses), "a loss is not finite"
    a, b = median(plain.losses[:5]), median(plain.losses[-20:])
    assert a - b > nats, f"the loss falls from {a:.4g} to {b:.4g}"
    return f"the loss falls from {a:.4g} to {b:.4g}"


@healthy(
    CASES,
    "ha_vit_with_layer_scale_of_one_in_ten_thousand",
    source="https://arxiv.org/abs/2103.17239 CaiT: LayerScale starts at 1e-4 and smaller in deep vision transformers",
    proof=every(converges(0.5), lambda plain: _below(plain, "blocks.1.attn.proj.weight", "head.weight", 1e-3)),
)
def _(seed: int) -> Setup:
    data = Shapes(seed, batch=24, noise=0.4)
    model = ViT(depth=3, gamma=1e-4)
    return fit(model, classify(model, data.labelled), torch.optim.AdamW(model.parameters(), lr=3e-3), updates=160)


class Depth(nn.Module):
    """A residual branch that a whole batch leaves out with a probability."""

    def __init__(self, branch: nn.Module, drop: float, generator: torch.Generator) -> None:
        super().__init__()
        self.branch, self.drop, self.generator = branch, drop, generator

    def forward(self, x: Tensor) -> Tensor:
        if self.training and float(torch.rand((), generator=self.generator)) < self.drop:
            return x
        return x + self.branch(x) / (1 - self.drop)


@healthy(
    CASES,
    "ha_resnet_with_stochastic_depth",
    source="https://arxiv.org/abs/1603.09382 stochastic depth: a block is left out for a whole batch, the later the oftener",
    proof=every(converges(0.5), lambda plain: _sometimes(plain, "6.branch.2.weight")),
)
def _(seed: int) -> Setup:
    g = torch.Generator().manual_seed(seed)

    def block(drop: float) -> nn.Module:
        return Depth(
            nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), conv(16, 16, bias=False), nn.BatchNorm2d(16), nn.ReLU(), conv(16, 16)),
            drop,
            g,
        )

    blocks = [block(0.1 * k) for k in range(1, 7)]
    model = nn.Sequential(conv(1, 16, 2), *blocks, nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 4))
    data = Shapes(seed, batch=24, noise=0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    return fit(model, classify(model, data.labelled), optimizer, updates=90)


def _sometimes(plain: Plain, name: str) -> str:
    missed = sum(math.isnan(g) for g in plain.grads[name]) / len(plain.losses)
    assert 0.4 < missed < 0.8, f"{name} misses {missed:.3g} of the updates"
    return f"{name} has no gradient in {missed:.3g} of the updates"


class Generator(nn.Module):
    """The generator of a GAN; `wanted` is the mixing matrix of the data, for the proof alone."""

    def __init__(self, wanted: Tensor) -> None:
        super().__init__()
        self.wanted = wanted
        self.net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, z: Tensor) -> Tensor:
        return self.net(z)


@healthy(
    CASES,
    "ha_hinge_gan_with_spectral_norm_at_its_equilibrium",
    source="https://arxiv.org/abs/1802.05957 spectral normalisation for GANs; hinge loss",
    proof=lambda plain: _samples(plain),
)
def _(seed: int) -> Setup:
    g = torch.Generator().manual_seed(6000 + seed)
    # Rows of 4 features, correlated and off the origin: what the generator has to find.
    mix = torch.randn(4, 4, generator=g) / 2
    generator = Generator(mix)
    models = {
        "G": generator,
        "D": nn.Sequential(
            spectral_norm(nn.Linear(4, 64)),
            nn.ReLU(),
            spectral_norm(nn.Linear(64, 64)),
            nn.ReLU(),
            nn.Linear(64, 1),
        ),
    }

    def real() -> Tensor:
        return torch.randn(128, 4, generator=g) @ mix + 1

    def fake() -> Tensor:
        return models["G"](torch.randn(128, 4, generator=g))

    optimizers = {
        "G": torch.optim.Adam(models["G"].parameters(), lr=2e-3, betas=(0.0, 0.9)),
        "D": torch.optim.Adam(models["D"].parameters(), lr=1e-2, betas=(0.0, 0.9)),
    }

    decays = [torch.optim.lr_scheduler.LinearLR(o, 1, 0.05, 200) for o in optimizers.values()]

    def train() -> Iterator[Event]:
        for _ in range(200):
            optimizers["D"].zero_grad()
            d = F.relu(1 - models["D"](real())).mean() + F.relu(1 + models["D"](fake().detach())).mean()
            d.backward()
            yield "read", [d]
            optimizers["D"].step()
            yield "step", [optimizers["D"]]
            optimizers["G"].zero_grad()
            loss = -models["D"](fake()).mean()
            loss.backward()
            yield "read", [loss]
            optimizers["G"].step()
            yield "step", [optimizers["G"]]
            for decay in decays:
                decay.step()

    return Setup(models, train)


def _samples(plain: Plain) -> str:
    """Mean and covariance of what the generator gives, against those of the data."""
    models = plain.setup.model
    assert not isinstance(models, nn.Module)
    generator = models["G"]
    assert isinstance(generator, Generator)
    with torch.no_grad():
        x = generator(torch.randn(4000, 4, generator=torch.Generator().manual_seed(1)))
    want = generator.wanted.t() @ generator.wanted
    mean, spread = float((x.mean(0) - 1).norm() / 2), float((torch.cov(x.t()) - want).norm() / want.norm())
    assert all(math.isfinite(v) for v in plain.losses), "a loss is not finite"
    assert mean < 0.25, f"the mean of the samples is off by {mean:.3g} of the data's"
    assert spread < 0.5, f"the covariance of the samples is off by {spread:.3g} of the data's"
    return f"mean and covariance of the samples are off by {mean:.3g} and {spread:.3g} (a generator of nothing: 1 and 1)"


@healthy(
    CASES,
    "ha_tiny_regression_fitted_until_nothing_is_left",
    source="https://arxiv.org/abs/1611.03530 nets fit small training sets to a loss of zero: gradients become tiny at the end",
    proof=every(converges(1e-3), lambda plain: _shrinks(plain, "0.weight", 0.02)),
)
def _(seed: int) -> Setup:
    x, y = Table(seed, features=8, batch=24, noise=0.0)()
    model = mlp(nn.Tanh, 2, width=48, inputs=8, outputs=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 350)

    def before(i: int) -> None:
        if i:
            schedule.step()

    return fit(model, lambda i: F.mse_loss(model(x)[:, 0], y), optimizer, updates=350, before=before)


def _shrinks(plain: Plain, name: str, below: float) -> str:
    ratio = median(plain.grads[name][-30:]) / median(plain.grads[name][:10])
    assert ratio < below, f"the gradient of {name} ends at {ratio:.3g} of what it was"
    return f"the gradient of {name} ends at {ratio:.3g} of what it was"


class VAE(nn.Module):
    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator
        self.encoder = nn.Sequential(conv(1, 12, 2), nn.ReLU(), conv(12, 16, 2), nn.ReLU(), nn.Flatten())
        self.mu, self.log_var = nn.Linear(144, 6), nn.Linear(144, 6)
        self.decoder = nn.Sequential(nn.Linear(6, 96), nn.ReLU(), nn.Linear(96, 144))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.encoder(x)
        mu, log_var = self.mu(h), self.log_var(h)
        z = mu + (log_var / 2).exp() * torch.randn(mu.shape, generator=self.generator)
        return self.decoder(z), mu, log_var


@healthy(
    CASES,
    "ha_vae_with_sums_over_pixels_and_batch",
    source="https://github.com/pytorch/examples/blob/main/vae/main.py losses with reduction='sum': large numbers, large gradients",
    proof=every(converges(0.6), lambda plain: _large(plain, "decoder.2.weight", 100)),
)
def _(seed: int) -> Setup:
    data = Shapes(seed, batch=48)
    model = VAE(torch.Generator().manual_seed(seed))

    def loss(i: int) -> Tensor:
        x, _, mask = data()
        out, mu, log_var = model(x)
        kl = -0.5 * (1 + log_var - mu.square() - log_var.exp()).sum()
        return F.binary_cross_entropy_with_logits(out, mask.flatten(1), reduction="sum") + kl

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-3), updates=250)


def _large(plain: Plain, name: str, above: float) -> str:
    norm = max(plain.grads[name][:5])
    assert norm > above, f"the gradient of {name} is {norm:.3g}"
    return f"the gradient of {name} starts at {norm:.3g}"


@healthy(
    CASES,
    "ha_smoothed_labels_after_a_warm_up_from_zero",
    source="https://arxiv.org/abs/1512.00567 label smoothing: the loss has a floor; https://arxiv.org/abs/1706.02677 warm-up",
    proof=every(unchanged("0.weight", last=1), lambda plain: _floor(plain, 0.2, 4)),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(
        nn.Linear(16, 48), nn.LayerNorm(48), nn.GELU(), nn.Linear(48, 48), nn.LayerNorm(48), nn.GELU(), nn.Linear(48, 4)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def warm(i: int) -> None:
        optimizer.param_groups[0]["lr"] = 0.1 * min(1, i / 12)  # the first update has a rate of 0

    loss = classify(model, Blobs(seed, batch=64, spread=0.6), label_smoothing=0.2)
    return fit(model, loss, optimizer, updates=180, before=warm)


def _floor(plain: Plain, smoothing: float, classes: int) -> str:
    low = smoothing / classes
    top = 1 - low * (classes - 1)
    floor = -top * math.log(top) - (classes - 1) * low * math.log(low)
    end = median(plain.losses[-30:])
    assert end < 1.1 * floor, f"the loss ends at {end:.4g}, the floor is {floor:.4g}"
    assert plain.losses[0] > 1.8 * floor, f"the loss starts at {plain.losses[0]:.4g} already"
    return f"the loss falls from {plain.losses[0]:.4g} to {end:.4g}; it can't fall below {floor:.4g}"


@healthy(
    CASES,
    "ha_warm_restarts_with_biases_before_batchnorm",
    source="https://arxiv.org/abs/1608.03983 SGDR: the rate jumps up again, and the loss with it; biases before BatchNorm get no gradient",
    proof=every(converges(0.35), lambda plain: _below(plain, "0.bias", "0.weight", 1e-5)),
)
def _(seed: int) -> Setup:
    layers = [m for a, b in ((1, 16), (16, 16), (16, 24)) for m in (conv(a, b, 1 if a == 1 else 2), nn.BatchNorm2d(b), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(24 * 9, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=30, T_mult=2, eta_min=1e-4)

    def before(i: int) -> None:
        if i:
            schedule.step()

    return fit(model, classify(model, Shapes(seed, batch=24).labelled), optimizer, updates=150, before=before)


@healthy(
    CASES,
    "ha_new_head_on_a_frozen_backbone",
    source="https://docs.pytorch.org/tutorials/beginner/transfer_learning_tutorial.html ConvNet as a fixed feature extractor",
    proof=every(
        no_gradient("backbone.0.weight", "backbone.3.weight"), converges(0.6), lambda plain: _still(plain, "backbone.0.weight")
    ),
)
def _(seed: int) -> Setup:
    class Transfer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(
                conv(1, 24, 2), nn.BatchNorm2d(24), nn.ReLU(), conv(24, 32, 2), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten()
            )
            self.head = nn.Sequential(nn.Linear(32 * 9, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 4))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                h = self.backbone(x)
            return self.head(h)

    model = Transfer()
    model.backbone.requires_grad_(False)
    data = Shapes(seed, batch=32)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    return fit(model, classify(model, data.labelled), optimizer, updates=120)


def _still(plain: Plain, name: str) -> str:
    assert all(s == 0 for s in plain.steps[name]), f"{name} moves"
    return f"{name} never moves"


class Gated(nn.Module):
    """Two experts for two regimes of a table, and a gate that must choose one of them."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(features, 1), nn.Sigmoid())
        self.left = nn.Sequential(nn.Linear(features, 24), nn.Tanh(), nn.Linear(24, 1))
        self.right = nn.Sequential(nn.Linear(features, 24), nn.Tanh(), nn.Linear(24, 1))

    def forward(self, x: Tensor) -> Tensor:
        g = self.gate(x)
        return (g * self.left(x) + (1 - g) * self.right(x))[:, 0]


@healthy(
    CASES,
    "ha_gate_that_closes_and_opens_altogether",
    source="https://arxiv.org/abs/1505.00387 highway networks: transform gates that are nearly 0 or 1 for most inputs",
    proof=every(converges(0.25), lambda plain: _decided(plain, "gate.1")),
)
def _(seed: int) -> Setup:
    g = torch.Generator().manual_seed(5000 + seed)
    a, b = torch.randn(2, 10, generator=g) / math.sqrt(10)
    model = Gated(10)

    def loss(i: int) -> Tensor:
        x = torch.randn(64, 10, generator=g)
        x[:, 0] = torch.where(x[:, 0] > 0, 2.0, -2.0)  # the regime, a column of two values
        y = torch.where(x[:, 0] > 0, 2 + torch.sin(2 * x @ a), -2 + x @ b)
        return F.mse_loss(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-2), updates=400)


def _decided(plain: Plain, module: str) -> str:
    seen = plain.outputs[module][-1]
    assert seen is not None
    assert seen.low < 0.05, f"the gate does not close: {seen.low:.3g}"
    assert seen.high > 0.95, f"the gate does not open: {seen.high:.3g}"
    return f"the gate gives {seen.low:.3g} to {seen.high:.3g}"
