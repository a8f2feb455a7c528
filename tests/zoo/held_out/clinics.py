"""Runs of small pictures, volumes, signals and sound, and of the training loops around them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Case, Event, Pictures, Proof, Setup, fit, healthy, initialise, sick
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


@dataclass
class Noted(Setup):
    """A run that writes down numbers of its own for the proof."""

    notes: dict[str, list[float]] = field(default_factory=dict)


def notes(plain: Plain) -> dict[str, list[float]]:
    """What a run has written down."""
    assert isinstance(plain.setup, Noted)
    return plain.setup.notes


def noted(name: str, above: float = -math.inf, below: float = math.inf, first: int = 0, last: int | None = None) -> Proof:
    """The median of the numbers that the run wrote down under a name lies between two bounds."""

    def proof(plain: Plain) -> str:
        value = median(notes(plain)[name][first:last])
        assert above < value < below, f"{name} is {value:.4g}, not between {above:g} and {below:g}"
        return f"{name} is {value:.4g}"

    return proof


class Discs:
    """Pictures `[batch, 1, size, size]` of a bright disc or two in noise, and the masks of the discs, of the same shape."""

    def __init__(self, seed: int, batch: int = 8, size: int = 16, noise: float = 0.4) -> None:
        self.generator = torch.Generator().manual_seed(4000 + seed)
        self.batch, self.size, self.noise = batch, size, noise
        self.rows, self.columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")

    def __call__(self) -> tuple[Tensor, Tensor]:
        draw = torch.rand(self.batch, 3, 1, 1, generator=self.generator)
        row, column = draw[:, 0] * self.size, draw[:, 1] * self.size
        radius = self.size * (0.15 + 0.2 * draw[:, 2])
        mask = ((self.rows - row) ** 2 + (self.columns - column) ** 2 < radius**2).float()[:, None]
        x = mask + self.noise * torch.randn(mask.shape, generator=self.generator)
        return (x - 0.25) / 0.55, mask


class Tones:
    """Sounds `[batch, 1, length]`: a sine with a frequency that is the class, of any phase and loudness, in noise."""

    def __init__(self, seed: int, classes: int = 4, batch: int = 16, length: int = 64) -> None:
        self.generator = torch.Generator().manual_seed(5000 + seed)
        self.classes, self.batch, self.length = classes, batch, length

    def __call__(self) -> tuple[Tensor, Tensor]:
        y = torch.randint(self.classes, (self.batch,), generator=self.generator)
        phase, loud = torch.rand(2, self.batch, 1, generator=self.generator)
        t = torch.arange(self.length) / self.length
        x = (0.7 + loud) * torch.sin(2 * math.pi * (3.0 * (y[:, None] + 1) * t + phase))
        return (x + 0.3 * torch.randn(x.shape, generator=self.generator))[:, None], y


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """A 3 x 3 convolution that keeps the size, or halves it."""
    return nn.Conv2d(inputs, outputs, 3, stride, 1)


class UNet(nn.Module):
    """Two scales; the skip is joined by concatenation."""

    def __init__(self, width: int = 8, norm: bool = False, outputs: int = 1) -> None:
        super().__init__()

        def block(a: int, b: int, stride: int = 1) -> nn.Sequential:
            layers: list[nn.Module] = [conv(a, b, stride), nn.BatchNorm2d(b) if norm else nn.GroupNorm(2, b), nn.ReLU()]
            return nn.Sequential(*layers)

        self.enc1, self.enc2 = block(1, width), block(width, 2 * width, 2)
        self.middle = block(2 * width, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.dec = block(2 * width, width)
        self.out = nn.Conv2d(width, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.enc1(x)
        b = self.middle(self.enc2(a))
        return self.out(self.dec(torch.cat([self.up(b), a], 1)))


def _fail(what: str) -> str:
    raise AssertionError(f"{what} is not as it should be")


# ---------------------------------------------------------------------------------------------------------------- sick


@sick(
    CASES,
    "cl_unet_encoder_under_no_grad",
    ("missing_gradient",),
    ("enc1", "enc2"),
    source="https://arxiv.org/abs/1505.04597 U-Net; the encoder is run under torch.no_grad() as if it were a frozen backbone",
    proof=every(no_gradient("enc1.0.weight", "enc2.0.weight", "enc2.1.weight"), noted("grad of middle", above=1e-4)),
)
def _(seed: int) -> Setup:
    class Halted(UNet):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                a = self.enc1(x)
                b = self.enc2(a)
            return self.out(self.dec(torch.cat([self.up(self.middle(b)), a], 1)))

    model, data = Halted(), Discs(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    seen: list[float] = []

    def train() -> Iterator[Event]:
        for _ in range(40):
            x, mask = data()
            optimizer.zero_grad()
            loss = F.binary_cross_entropy_with_logits(model(x), mask)
            loss.backward()
            weight = model.middle[0].weight
            assert isinstance(weight, Tensor)
            assert weight.grad is not None
            seen.append(float(weight.grad.norm()))
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]

    return Noted(model, train, {"grad of middle": seen})


@sick(
    CASES,
    "cl_vae_decoder_gradients_kept",
    ("gradients_not_zeroed",),
    ("decoder",),
    source="https://github.com/pytorch/examples/blob/main/vae/main.py VAE; with two optimizers, that of the encoder is cleared twice",
    proof=every(noted("kept of decoder", above=0.999, first=1, last=12), noted("kept of encoder", below=1e-9, first=1)),
)
def _(seed: int) -> Setup:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 12))
    decoder = nn.Sequential(nn.Linear(6, 48), nn.ReLU(), nn.Linear(48, 64))
    model, data = nn.ModuleDict({"encoder": encoder, "decoder": decoder}), Pictures(seed, batch=32)
    first = torch.optim.Adam(encoder.parameters(), lr=2e-3)
    second = torch.optim.Adam(decoder.parameters(), lr=2e-3)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)][::2]
    generator = torch.Generator().manual_seed(seed)
    kept: dict[str, list[float]] = {"kept of encoder": [], "kept of decoder": []}
    used: dict[str, Tensor] = {}

    def train() -> Iterator[Event]:
        for _ in range(40):
            x, _y = data()
            first.zero_grad()
            first.zero_grad()  # meant for the second
            for name, part in (("encoder", layers[0]), ("decoder", layers[1])):
                grad = part.weight.grad
                same = grad is not None and torch.equal(grad, used[name])
                kept["kept of " + name].append(float(same))
            mean, log_variance = encoder(x).chunk(2, 1)
            z = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=generator)
            rebuilt = F.mse_loss(decoder(z), x.flatten(1), reduction="none").sum(1).mean()
            kl = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum(1).mean()
            loss = rebuilt + kl
            loss.backward()
            yield "read", [loss]
            first.step()
            second.step()
            for name, part in (("encoder", layers[0]), ("decoder", layers[1])):
                assert part.weight.grad is not None
                used[name] = part.weight.grad.clone()
            yield "step", [first, second]

    return Noted(model, train, kept)


@sick(
    CASES,
    "cl_retina_prior_bias_on_every_conv",
    ("dead_units", "poor_init"),
    ("tower",),
    also=("zero_gradient", "vanishing_gradient"),
    source="https://arxiv.org/abs/1708.02002 RetinaNet; the bias -log((1-pi)/pi) of its last layer is given to every convolution",
    proof=every(
        dead_fraction("tower.1", 0.5, last=15),
        dead_fraction("tower.3", 0.9, last=15),
        dead_fraction("tower.5", 0.9, last=15),
    ),
)
def _(seed: int) -> Setup:
    tower = nn.Sequential(conv(1, 12), nn.ReLU(), conv(12, 12), nn.ReLU(), conv(12, 12), nn.ReLU())
    model, data = nn.Sequential(), Discs(seed, noise=0.3)
    model.add_module("tower", tower)
    model.add_module("score", conv(12, 1))
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.xavier_uniform_(m.weight)
            if m.bias is not None:
                nn.init.constant_(m.bias, -math.log(99.0))

    def loss(_: int) -> Tensor:
        x, mask = data()
        p = model(x)
        right = torch.sigmoid(p) * mask + torch.sigmoid(-p) * (1 - mask)
        return ((1 - right) ** 2 * F.binary_cross_entropy_with_logits(p, mask, reduction="none")).sum() / mask.sum()

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-3), 40)


@sick(
    CASES,
    "cl_distance_of_twins_is_not_differentiable",
    ("non_finite_gradient",),
    (),
    onset=14,
    also=("non_finite_weight", "non_finite_activation", "non_finite_loss"),
    source="https://github.com/adambielski/siamese-triplet/issues/18 the same picture twice: sqrt of a distance of zero",
    proof=every(
        first_non_finite(14),
        lambda plain: f"the loss of that update is {plain.losses[14]:.3g}" if math.isfinite(plain.losses[14]) else _fail("loss"),
    ),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(conv(1, 8, 2), nn.ReLU(), conv(8, 16, 2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8))
    data = Pictures(seed, classes=4, batch=24)

    def loss(i: int) -> Tensor:
        x, y = data()
        if i == 14:
            x, y = torch.cat([x[:-1], x[:1]]), torch.cat([y[:-1], y[:1]])
        e = model(x)
        a, b = torch.triu_indices(len(y), len(y), 1)
        distance = (e[a] - e[b]).square().sum(1).sqrt()
        same = (y[a] == y[b]).float()
        return (same * distance**2 + (1 - same) * F.relu(1 - distance) ** 2).mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-3), 30)


@sick(
    CASES,
    "cl_segmenter_with_softmax_before_cross_entropy",
    ("double_softmax",),
    ("softmax",),
    also=("loss_plateau",),
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html it wants logits, and gets probabilities",
    proof=every(
        noted("least probability", above=-1e-9),
        noted("sum of a pixel", above=0.999, below=1.001),
        noted("largest of the loss's own softmax", below=0.48),
    ),
)
def _(seed: int) -> Setup:
    class Segmenter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.softmax = UNet(norm=True, outputs=3), nn.Softmax(dim=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.softmax(self.net(x))

    model, data = Segmenter(), Discs(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    written: dict[str, list[float]] = {"least probability": [], "sum of a pixel": [], "largest of the loss's own softmax": []}

    def train() -> Iterator[Event]:
        for _ in range(50):
            x, mask = data()
            # background, disc, and the rim of the disc
            rim = F.max_pool2d(mask, 3, 1, 1) - mask
            optimizer.zero_grad()
            out = model(x)
            loss = F.cross_entropy(out, (mask + 2 * rim)[:, 0].long())
            loss.backward()
            written["least probability"].append(float(out.min()))
            written["sum of a pixel"].append(float(out.sum(1).mean()))
            written["largest of the loss's own softmax"].append(float(out.softmax(1).mean((0, 2, 3)).max()))
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]

    return Noted(model, train, written)


@sick(
    CASES,
    "cl_auxiliary_head_never_called",
    ("missing_gradient",),
    ("aux",),
    within=30,  # a module that is never called
    source="https://arxiv.org/abs/1409.4842 GoogLeNet; the auxiliary classifier is built and optimised, but forward leaves it out",
    proof=every(
        no_gradient("aux.0.weight", "aux.3.weight", "aux.3.bias"),
        lambda plain: "aux is never called" if all(o is None for o in plain.outputs["aux"]) else _fail("aux"),
    ),
)
def _(seed: int) -> Setup:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low = nn.Sequential(conv(1, 8), nn.BatchNorm2d(8), nn.ReLU())
            self.aux = nn.Sequential(conv(8, 8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 8))
            self.high = nn.Sequential(conv(8, 16, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten())
            self.fc = nn.Linear(256, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.high(self.low(x)))

    model, data = Small(), Pictures(seed)

    def loss(_: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), 45)


@sick(
    CASES,
    "cl_deep_sigmoid_sound_classifier",
    ("vanishing_gradient",),
    tuple(f"net.{i}" for i in range(12)),
    source="https://proceedings.mlr.press/v9/glorot10a.html deep networks of sigmoids; here one-dimensional convolutions",
    proof=every(
        gradient_ratio("net.0.weight", "fc.weight", 1e-4, last=15),
        gradient_ratio("net.6.weight", "fc.weight", 1e-2, last=15),
        gradient_ratio("net.0.bias", "net.12.bias", 3e-3, last=15),
    ),
)
def _(seed: int) -> Setup:
    layers: list[nn.Module] = []
    for k in range(8):
        layers += [nn.Conv1d(1 if k == 0 else 12, 12, 5, padding=2), nn.Sigmoid()]

    class Sound(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.fc = nn.Sequential(*layers), nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.net(x).amax(-1))

    model, data = Sound(), Tones(seed)
    initialise(model, nn.init.kaiming_normal_, (nn.Conv1d,))

    def loss(_: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), 50)


class _Levels(torch.autograd.Function):
    """Rounds to levels; the straight-through gradient is multiplied by the number of levels, which the forward divides by."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        return torch.round(x * 15) / 15

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        return 15 * grad


class Quantise(nn.Module):
    """The activations of a network of few bits."""

    def forward(self, x: Tensor) -> Tensor:
        out = _Levels.apply(x.clamp(-1, 1))
        assert isinstance(out, Tensor)
        return out


@sick(
    CASES,
    "cl_quantiser_backward_times_its_levels",
    ("exploding_gradient",),
    tuple(f"{i}" for i in range(16)),
    source="https://arxiv.org/abs/1606.06160 DoReFa-Net; the custom backward forgets to divide by the number of levels",
    proof=every(
        gradient_ratio("16.weight", "0.weight", 1e-4, last=15),
        gradient_ratio("12.weight", "8.weight", 0.3, last=15),
        gradient_ratio("8.weight", "4.weight", 0.3, last=15),
        gradient_ratio("4.weight", "0.weight", 0.3, last=15),
    ),
)
def _(seed: int) -> Setup:
    layers: list[nn.Module] = []
    for k in range(8):
        layers += [nn.Linear(64 if k == 0 else 32, 32), Quantise()]
    model, data = nn.Sequential(*layers, nn.Linear(32, 8)), Pictures(seed, batch=32)
    initialise(model, lambda w: nn.init.xavier_normal_(w))

    def loss(_: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x.flatten(1)), y)

    # Adam, so that the size of the gradient does not carry the weights away
    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-3), 40)


@sick(
    CASES,
    "cl_denoiser_meets_a_picture_not_scaled",
    ("gradient_spike", "loss_spike"),
    (),
    onset=40,
    source="https://docs.pytorch.org/vision/stable/generated/torchvision.transforms.ToTensor.html targets left at 0..255",
    proof=every(
        gradient_spikes(40, 30.0),
        lambda plain: (
            f"the loss is {plain.losses[40] / median(plain.losses[30:40]):.3g} times the median"
            if plain.losses[40] > 100 * median(plain.losses[30:40])
            else _fail("loss")
        ),
    ),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(conv(1, 12), nn.SiLU(), conv(12, 12), nn.SiLU(), conv(12, 1))
    data = Discs(seed, size=12)

    def loss(i: int) -> Tensor:
        x, mask = data()
        if i == 40:
            mask = torch.cat([255 * mask[:3], mask[3:]])
        return F.mse_loss(model(x), mask)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 60)


@sick(
    CASES,
    "cl_power_spectrum_overflows_in_half",
    ("non_finite_activation",),
    ("power",),
    onset=20,
    also=("non_finite_loss", "non_finite_gradient", "non_finite_weight"),
    source="https://github.com/LIHANG-HONG/birdclef2023-2nd-place-solution/issues/2 spectra in float16 become inf for loud sounds",
    proof=every(first_non_finite(20, "power"), first_non_finite(20)),
)
def _(seed: int) -> Setup:
    class Power(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            wave = torch.fft.rfft(x[:, 0])
            # what the transform gives is kept in half precision, as under autocast
            return wave.real.half() ** 2 + wave.imag.half() ** 2

    class Listener(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.power = Power()
            self.net = nn.Sequential(nn.LayerNorm(33), nn.Linear(33, 32), nn.ReLU(), nn.Linear(32, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(torch.log1p(self.power(x).float()))

    model, data = Listener(), Tones(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        if i == 20:
            x[3] *= 20.0  # somebody shouts
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=3e-3), 35)


@sick(
    CASES,
    "cl_box_loss_of_no_positives",
    ("non_finite_loss",),
    (),
    onset=17,
    also=("non_finite_gradient", "non_finite_weight", "non_finite_activation"),
    source="https://github.com/amdegroot/ssd.pytorch/issues/247 a batch without objects: the mean over no boxes is NaN",
    proof=every(
        first_non_finite(17),
        lambda plain: "the loss is NaN" if math.isnan(plain.losses[17]) else _fail("loss"),
        lambda plain: "outputs finite" if all(o and not o.nonfinite for o in plain.outputs[""][:18]) else _fail("output"),
    ),
)
def _(seed: int) -> Setup:
    model, data = (
        nn.Sequential(conv(1, 12), nn.ReLU(), conv(12, 24, 2), nn.ReLU(), conv(24, 24), nn.ReLU(), conv(24, 3)),
        Discs(seed),
    )

    def loss(i: int) -> Tensor:
        x, mask = data()
        if i == 17:
            x, mask = x - mask / 0.55, torch.zeros_like(mask)
        share = F.avg_pool2d(mask, 2)
        there = share[:, 0] > 0.5
        out = model(x)
        score = F.binary_cross_entropy_with_logits(out[:, 0], there.float())
        # the two numbers of a cell: how much of it is covered, and of its surroundings
        wanted = torch.cat([share, F.avg_pool2d(share, 3, 1, 1)], 1)
        box = F.smooth_l1_loss(out[:, 1:].movedim(1, -1)[there], wanted.movedim(1, -1)[there])
        return score + box

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-3), 30)


@sick(
    CASES,
    "cl_constant_patch_divided_by_its_deviation",
    ("non_finite_input",),
    ("",),
    onset=22,
    also=("non_finite_loss", "non_finite_gradient", "non_finite_weight", "non_finite_activation"),
    source="https://github.com/Project-MONAI/MONAI/issues/1092 NormalizeIntensity divides a constant patch by its deviation of zero",
    proof=every(
        first_non_finite(22), noted("NaN of the input", above=100, first=22, last=23), noted("NaN of the input", below=1, last=22)
    ),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(
        nn.Conv3d(1, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Conv3d(6, 12, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(324, 2),
    )
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    bad: list[float] = []

    def train() -> Iterator[Event]:
        for i in range(35):
            y = torch.randint(2, (12,), generator=generator)
            x = 40 + 10 * torch.randn(12, 1, 6, 6, 6, generator=generator)
            x[:, :, 1:5, 1:5, 1:5] += 12.0 * y.view(-1, 1, 1, 1, 1)  # the lesion
            if i == 22:
                x[5] = -1000.0  # a patch of air only
            x = (x - x.mean((2, 3, 4), keepdim=True)) / x.std((2, 3, 4), keepdim=True)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            bad.append(float(x.isnan().sum()))
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]

    return Noted(model, train, {"NaN of the input": bad})


@sick(
    CASES,
    "cl_sum_pooled_before_tanh",
    ("saturated_activation",),
    ("squash",),
    also=("vanishing_gradient",),
    source="https://proceedings.mlr.press/v9/glorot10a.html saturated tanh; the features of all places are summed, not averaged",
    proof=every(noted("median slope of the tanh", below=1e-4, last=15), noted("gradient that passes the tanh", below=0.3, last=15)),
)
def _(seed: int) -> Setup:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(conv(1, 12), nn.BatchNorm2d(12), nn.ReLU(), conv(12, 24), nn.BatchNorm2d(24), nn.ReLU())
            self.fc, self.squash, self.head = nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.squash(self.fc(self.features(x).sum((2, 3)))))

    model, data = Pooled(), Discs(seed, batch=16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    slopes: list[float] = []
    passed: list[float] = []

    def train() -> Iterator[Event]:
        for _ in range(40):
            x, mask = data()
            y = (mask.mean((1, 2, 3)) * 20).long().clamp(max=3)  # classes of size
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            with torch.no_grad():
                slope = 1 - torch.tanh(model.fc(model.features(x).sum((2, 3)))).double() ** 2
            slopes.append(float(slope.median()))
            passed.append(float(slope.square().mean().sqrt()))
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]

    return Noted(model, train, {"median slope of the tanh": slopes, "gradient that passes the tanh": passed})


@sick(
    CASES,
    "cl_rounded_code_without_straight_through",
    ("zero_gradient",),
    ("encoder",),
    also=("vanishing_gradient",),
    source="https://arxiv.org/abs/1308.3432 straight-through estimator; the code of an autoencoder goes through torch.round as it is",
    proof=zero_gradient("encoder.1.weight", "encoder.3.weight", "encoder.3.bias"),
)
def _(seed: int) -> Setup:
    class Coder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ELU(), nn.Linear(64, 24), nn.BatchNorm1d(24))
            self.decoder = nn.Sequential(nn.Linear(24, 64), nn.ELU(), nn.Linear(64, 64))

        def forward(self, x: Tensor) -> Tensor:
            return self.decoder(torch.round(2 * self.encoder(x)) / 2)

    model, data = Coder(), Pictures(seed, batch=24)

    def loss(_: int) -> Tensor:
        x, _y = data()
        return F.l1_loss(model(x), x.flatten(1))

    return fit(model, loss, torch.optim.RMSprop(model.parameters(), lr=1e-3), 40)


@sick(
    CASES,
    "cl_autoencoder_weights_uniform_from_zero_to_one",
    ("poor_init", "exploding_gradient"),
    ("",),
    also=("unnormalized_input",),
    source="https://docs.pytorch.org/docs/stable/nn.init.html uniform_ without bounds draws from 0 to 1: every layer multiplies by its width",
    proof=every(
        lambda plain: "outputs are 1e4 of the pictures" if (o := plain.outputs[""][0]) and o.rms > 1e4 else _fail("output"),
        lambda plain: f"the first loss is {plain.losses[0]:.3g}" if plain.losses[0] > 1e4 else _fail("loss"),
        gradient_ratio("8.bias", "0.bias", 1e-2, last=1),
    ),
)
def _(seed: int) -> Setup:
    sizes = [64, 32, 16, 16, 32, 64]
    layers: list[nn.Module] = [nn.Flatten()]
    for k in range(5):
        layers += [nn.Linear(sizes[k], sizes[k + 1]), nn.ReLU()]
    model, data = nn.Sequential(*layers[1:-1]), Pictures(seed, batch=32)
    initialise(model, nn.init.uniform_)

    def loss(_: int) -> Tensor:
        x, _y = data()
        return F.l1_loss(model(x.flatten(1)), x.flatten(1))

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-3), 50)


@sick(
    CASES,
    "cl_head_replaced_after_the_optimizer",
    ("not_in_optimizer",),
    ("fc",),
    source="https://docs.pytorch.org/tutorials/beginner/transfer_learning_tutorial.html model.fc is replaced, but after the optimizer is built",
    proof=unchanged("fc.weight", "fc.bias"),
)
def _(seed: int) -> Setup:
    body = nn.Sequential(conv(1, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 16, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten())
    model, data = nn.Sequential(), Pictures(seed)
    model.add_module("body", body)
    model.add_module("fc", nn.Linear(256, 1000))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.fc = nn.Linear(256, 8)

    def loss(_: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y)

    return fit(model, loss, optimizer, 40)


@sick(
    CASES,
    "cl_scheduler_steps_but_no_optimizer",
    ("never_stepped",),
    (),
    also=("loss_plateau",),
    source="https://github.com/pytorch/pytorch/issues/3814 scheduler.step() does not perform optimizer.step()",
    proof=every(
        lambda plain: "nothing has stepped" if all(math.isnan(x) for s in plain.steps.values() for x in s) else _fail("a step"),
        lambda plain: "no weight changes" if all(w[0] == w[-1] for w in plain.weights.values()) else _fail("a weight"),
    ),
)
def _(seed: int) -> Setup:
    model, data = UNet(), Discs(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)

    def train() -> Iterator[Event]:
        for _ in range(50):
            x, mask = data()
            optimizer.zero_grad()
            loss = F.binary_cross_entropy_with_logits(model(x), mask)
            loss.backward()
            yield "read", [loss]
            scheduler.step()

    return Setup(model, train)


@sick(
    CASES,
    "cl_head_group_with_lambda_epoch_over_thirty",
    ("frozen_weights",),
    ("head",),
    source="https://docs.pytorch.org/docs/stable/generated/torch.optim.lr_scheduler.LambdaLR.html epoch // 30 is 0 for thirty epochs",
    proof=unchanged("head.weight", "head.bias"),
)
def _(seed: int) -> Setup:
    model, data = nn.Sequential(), Tones(seed)
    model.add_module(
        "body", nn.Sequential(nn.Conv1d(1, 16, 9, 2, 4), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 16, 5, 2, 2), nn.ReLU())
    )
    model.add_module("pool", nn.Sequential(nn.AdaptiveAvgPool1d(2), nn.Flatten()))
    model.add_module("head", nn.Linear(32, 4))
    groups = [{"params": list(part.parameters())} for part in (model[0], model[2])]
    optimizer = torch.optim.Adam(groups, lr=2e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda epoch: 0.95**epoch, lambda epoch: epoch // 30])

    def loss(i: int) -> Tensor:
        if i and i % 5 == 0:
            scheduler.step()
        x, y = data()
        return F.cross_entropy(model(x), y)

    return fit(model, loss, optimizer, 60)


class Coordinates(nn.Module):
    """A picture as a function of the place: Fourier features and an MLP."""

    def __init__(self, width: int = 48, waves: int = 4) -> None:
        super().__init__()
        self.waves = waves
        self.net = nn.Sequential(nn.Linear(4 * waves, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, place: Tensor) -> Tensor:
        angle = (place[..., None] * math.pi * 2.0 ** torch.arange(self.waves)).flatten(1)
        return self.net(torch.cat([angle.sin(), angle.cos()], 1))


def grid(size: int) -> Tensor:
    """All places of a picture, `[size * size, 2]`, from -1 to 1."""
    axis = torch.linspace(-1, 1, size)
    return torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).flatten(0, 1)


@sick(
    CASES,
    "cl_coordinate_network_with_adam_at_one",
    ("update_ratio_too_large", "loss_diverging"),
    (),
    also=("exploding_gradient", "gradient_spike", "loss_spike", "dead_units"),
    source="https://arxiv.org/abs/2006.10739 Fourier features; Adam with a learning rate of 1",
    proof=every(update_ratio(above=2.0, last=1), update_ratio(above=0.5, last=3), loss_grows(100.0, last=10)),
)
def _(seed: int) -> Setup:
    model, places = Coordinates(), grid(24)
    wanted = torch.sin(3 * places[:, :1]) * torch.cos(5 * places[:, 1:] + seed)
    generator = torch.Generator().manual_seed(seed)

    def loss(_: int) -> Tensor:
        some = torch.randint(len(places), (128,), generator=generator)
        return F.mse_loss(model(places[some]), wanted[some])

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1.0), 40)


@sick(
    CASES,
    "cl_segmentation_loss_averaged_twice",
    ("update_ratio_too_small",),
    (),
    also=("loss_plateau",),
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.BCEWithLogitsLoss.html the mean is divided by all pixels once more",
    proof=every(update_ratio(below=1e-5, last=15), loss_stays(0.05)),
)
def _(seed: int) -> Setup:
    model, data = (
        nn.Sequential(conv(1, 8), nn.GroupNorm(4, 8), nn.GELU(), conv(8, 8), nn.GroupNorm(4, 8), nn.GELU(), conv(8, 1)),
        Discs(seed),
    )

    def loss(_: int) -> Tensor:
        x, mask = data()
        return F.binary_cross_entropy_with_logits(model(x), mask) / mask.numel()

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.02), 50)


@sick(
    CASES,
    "cl_distillation_that_maximises",
    ("loss_diverging",),
    (),
    also=("exploding_gradient", "update_ratio_too_large", "loss_spike"),
    source="https://docs.pytorch.org/docs/stable/generated/torch.optim.SGD.html maximize=True, left from another loss; https://arxiv.org/abs/1503.02531",
    proof=every(loss_grows(3.0, last=12), loss_grows(30.0)),
)
def _(seed: int) -> Setup:
    data = Pictures(seed, batch=32)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)).requires_grad_(False)
    list(teacher.parameters())[2].mul_(6)  # it is sure of itself
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 8))

    def loss(_: int) -> Tensor:
        x, _y = data()
        return 4 * F.kl_div(F.log_softmax(student(x) / 2, 1), F.softmax(teacher(x) / 2, 1), reduction="batchmean")

    return fit(student, loss, torch.optim.SGD(student.parameters(), lr=0.2, momentum=0.9, maximize=True), 30)


@sick(
    CASES,
    "cl_pitch_regression_broadcast",
    ("loss_plateau",),
    (),
    source="https://github.com/pytorch/pytorch/pull/18349 mse_loss of (n, 1) and (n,) broadcasts, and the mean is learned",
    proof=every(loss_stays(0.1, last=100), loss_stays(0.1)),
)
def _(seed: int) -> Setup:
    net = nn.Sequential(
        nn.Conv1d(1, 16, 9, 2, 4),
        nn.ReLU(),
        nn.Conv1d(16, 16, 5, 2, 2),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(4),
        nn.Flatten(),
        nn.Linear(64, 1),
    )
    data = Tones(seed, batch=32)

    def loss(_: int) -> Tensor:
        x, y = data()
        return F.mse_loss(net(x), (y - 1.5) / 1.12)

    return fit(net, loss, torch.optim.Adam(net.parameters(), lr=1e-3), 150)


@sick(
    CASES,
    "cl_edge_loss_that_the_scaler_skips_for_ever",
    ("loss_scale_collapse", "non_finite_gradient"),
    (),
    also=("never_stepped",),
    source="https://github.com/NVIDIA/apex/issues/834 the scale falls to 0; here sqrt(dx^2 + dy^2) has no gradient in the corner",
    proof=every(
        noted("steps that are skipped", above=0.999, last=15),
        noted("scale", below=1.0, first=17, last=18),
        noted("scale", below=1e-3, first=30),
    ),
)
def _(seed: int) -> Setup:
    model, data = nn.Sequential(conv(1, 12), nn.ReLU(), conv(12, 12), nn.ReLU(), conv(12, 1)), Discs(seed)
    optimizer, scaler = torch.optim.AdamW(model.parameters(), lr=2e-3), torch.amp.GradScaler("cpu")
    written: dict[str, list[float]] = {"scale": [], "steps that are skipped": []}

    def edges(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 1, 0, 1), mode="replicate")
        down, right = x[..., 1:, :-1] - x[..., :-1, :-1], x[..., :-1, 1:] - x[..., :-1, :-1]
        return (down**2 + right**2).sqrt()

    def train() -> Iterator[Event]:
        for _ in range(40):
            x, mask = data()
            optimizer.zero_grad()
            out = model(x)
            loss = F.l1_loss(out, mask) + 0.2 * F.l1_loss(edges(out), edges(mask))
            scaler.scale(loss).backward()
            yield "read", [loss]
            before = scaler.get_scale()
            written["scale"].append(before)
            scaler.step(optimizer)
            scaler.update()
            skipped = scaler.get_scale() < before
            written["steps that are skipped"].append(float(skipped))
            yield "step", [] if skipped else [optimizer]

    return Noted(model, train, written)


@sick(
    CASES,
    "cl_thermal_pictures_in_kelvin",
    ("unnormalized_input",),
    ("",),
    also=("loss_spike", "gradient_spike", "dead_units", "loss_plateau", "exploding_gradient"),
    source="https://cs231n.github.io/neural-networks-2/ mean subtraction and normalisation; thermal pictures are given in kelvin",
    proof=every(noted("mean of the input", above=250), noted("deviation of the input", below=10)),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(conv(1, 8, 2), nn.ReLU(), conv(8, 16, 2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8))
    data = Pictures(seed, batch=24)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    written: dict[str, list[float]] = {"mean of the input": [], "deviation of the input": []}

    def train() -> Iterator[Event]:
        for _ in range(50):
            x, y = data()
            kelvin = 296 + 4 * x
            written["mean of the input"].append(float(kelvin.mean()))
            written["deviation of the input"].append(float(kelvin.std()))
            optimizer.zero_grad()
            loss = F.cross_entropy(model(kelvin), y)
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]

    return Noted(model, train, written)


# ------------------------------------------------------------------------------------------------------------- healthy


@healthy(
    CASES,
    "cl_vit_warmup_from_zero",
    source="https://arxiv.org/abs/2010.11929 ViT; AdamW, warm-up from a rate of 0, clipping at 1; the key bias has no gradient to speak of",
    proof=every(converges(0.25), unchanged("head.weight", last=1)),
)
def _(seed: int) -> Setup:
    class ViT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(1, 32, 2, 2)
            self.token = nn.Parameter(0.02 * torch.randn(1, 1, 32))
            self.position = nn.Parameter(0.2 * torch.randn(1, 17, 32))
            layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, "gelu", batch_first=True, norm_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(32), enable_nested_tensor=False)
            self.head = nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            t = self.patch(x).flatten(2).transpose(1, 2)
            t = torch.cat([self.token.expand(len(t), -1, -1), t], 1) + self.position
            return self.head(self.encoder(t)[:, 0])

    model, data = ViT(), Pictures(seed, batch=24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(i / 10, 1.0) * (0.5 + 0.5 * math.cos(math.pi * i / 200)))

    def train() -> Iterator[Event]:
        for _ in range(200):
            x, y = data()
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            yield "read", [loss]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "cl_unet_with_dice_and_batch_norm",
    source="https://arxiv.org/abs/1606.04797 V-Net's Dice loss; convolutions keep a bias before BatchNorm, whose gradient is rounding noise",
    proof=every(converges(0.35), gradient_ratio("enc1.0.bias", "enc1.0.weight", 1e-5)),
)
def _(seed: int) -> Setup:
    model, data = UNet(norm=True), Discs(seed)

    def loss(_: int) -> Tensor:
        x, mask = data()
        out = model(x)
        p = out.sigmoid()
        dice = 1 - ((2 * (p * mask).sum((1, 2, 3)) + 1) / (p.sum((1, 2, 3)) + mask.sum((1, 2, 3)) + 1)).mean()
        return dice + F.binary_cross_entropy_with_logits(out, mask)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 120)


@healthy(
    CASES,
    "cl_gan_of_bars_with_two_optimizers",
    source="https://arxiv.org/abs/1511.06434 DCGAN's rates and betas; neither loss falls, and the pass of G leaves gradients in D",
    proof=every(
        noted("distance to the mean profile", below=0.3, first=-20), noted("distance to the mean profile", above=0.5, last=10)
    ),
)
def _(seed: int) -> Setup:
    data = Pictures(seed, classes=2, batch=64)
    g = nn.Sequential(
        nn.Linear(8, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 8)
    )
    d = nn.Sequential(nn.Linear(8, 64), nn.LeakyReLU(0.2), nn.Linear(64, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
    of_g = torch.optim.Adam(g.parameters(), lr=1e-3, betas=(0.5, 0.999))
    of_d = torch.optim.Adam(d.parameters(), lr=1e-3, betas=(0.5, 0.999))
    generator = torch.Generator().manual_seed(seed)
    average = torch.zeros(8)
    average[:2] = 0.75
    seen, far = torch.zeros(8), list[float]()

    def train() -> Iterator[Event]:
        one, zero = torch.ones(64, 1), torch.zeros(64, 1)
        for _ in range(400):
            x = data()[0].mean(2)  # the profile of the bars
            fake = g(torch.randn(64, 8, generator=generator))
            of_d.zero_grad()
            a = F.binary_cross_entropy_with_logits(d(x.flatten(1)), 0.9 * one)
            b = F.binary_cross_entropy_with_logits(d(fake.detach()), zero)
            (a + b).backward()
            of_d.step()
            of_g.zero_grad()
            c = F.binary_cross_entropy_with_logits(d(fake), one)
            c.backward()
            seen.lerp_(fake.detach().mean(0), 0.1)
            far.append(float((seen - average).norm() / average.norm()))
            yield "read", [a + b, c]
            of_g.step()
            yield "step", [of_d, of_g]

    return Noted({"g": g, "d": d}, train, {"distance to the mean profile": far})


@healthy(
    CASES,
    "cl_vae_with_annealed_divergence",
    source="https://arxiv.org/abs/1511.06349 the weight of the divergence rises from 0: its term grows while pictures are rebuilt better",
    proof=every(converges(0.75), noted("rebuilding", above=20, last=8), noted("rebuilding", below=18, first=-20)),
)
def _(seed: int) -> Setup:
    class VAE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enc = nn.Sequential(conv(1, 8, 2), nn.SiLU(), conv(8, 16, 2), nn.SiLU(), nn.Flatten())
            self.mean, self.log_variance = nn.Linear(64, 6), nn.Linear(64, 6)
            self.dec = nn.Sequential(nn.Linear(6, 64), nn.SiLU(), nn.Linear(64, 64))

    model, data = VAE(), Pictures(seed, batch=32)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    rebuilt: list[float] = []

    def train() -> Iterator[Event]:
        for i in range(200):
            x, _y = data()
            optimizer.zero_grad()
            h = model.enc(x)
            mean, log_variance = model.mean(h), model.log_variance(h)
            z = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=generator)
            first = F.mse_loss(model.dec(z), x.flatten(1), reduction="none").sum(1).mean()
            second = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum(1).mean()
            loss = first + min(i / 100, 1.0) * 0.5 * second
            loss.backward()
            rebuilt.append(float(first.detach()))
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]

    return Noted(model, train, {"rebuilding": rebuilt})


@healthy(
    CASES,
    "cl_mean_teacher_of_sounds",
    source="https://arxiv.org/abs/1703.01780 Mean Teacher; the teacher has no gradient and no optimizer, and moves all the same",
    proof=converges(0.3),
)
def _(seed: int) -> Setup:
    def net() -> nn.Sequential:
        return nn.Sequential(
            nn.Conv1d(1, 16, 9, 2, 4), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 24, 5, 2, 2), nn.BatchNorm1d(24), nn.ReLU(),
            nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(48, 4),
        )  # fmt: skip

    student, data = net(), Tones(seed, batch=24)
    teacher = copy.deepcopy(student).requires_grad_(False)
    model = nn.ModuleDict({"student": student, "teacher": teacher})
    optimizer = torch.optim.SGD(student.parameters(), lr=0.03, momentum=0.9, nesterov=True, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(seed)

    def train() -> Iterator[Event]:
        for i in range(150):
            x, y = data()
            a, b = (x + 0.15 * torch.randn(x.shape, generator=generator) for _ in range(2))
            out = student(a)
            with torch.no_grad():
                wanted = teacher(b).softmax(1)
            few = slice(0, 12)  # only these are labelled
            loss = F.cross_entropy(out[few], y[few]) + min(i / 80, 1.0) * F.mse_loss(out.softmax(1), wanted)
            optimizer.zero_grad()
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            with torch.no_grad():
                for p, q in zip(teacher.parameters(), student.parameters(), strict=True):
                    p.lerp_(q, 0.05)
            yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "cl_half_precision_with_accumulation",
    source="https://docs.pytorch.org/docs/stable/notes/amp_examples.html autocast, GradScaler, four backward passes to a step",
    proof=every(
        converges(0.4), noted("steps that are skipped", above=0.5, last=2), noted("steps that are skipped", below=0.5, first=10)
    ),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8))
    data = Pictures(seed, batch=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    skips: list[float] = []

    def train() -> Iterator[Event]:
        for _ in range(80):
            losses = []
            optimizer.zero_grad()
            for _part in range(4):
                x, y = data()
                with torch.autocast("cpu", torch.float16):
                    loss = F.cross_entropy(model(x), y) / 4
                scaler.scale(loss).backward()
                losses.append(loss)
            yield "read", losses
            before = scaler.get_scale()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            skipped = scaler.get_scale() < before
            skips.append(float(skipped))
            yield "step", [] if skipped else [optimizer]

    return Noted(model, train, {"steps that are skipped": skips})


class Sine(nn.Module):
    """A layer of SIREN: a sine at a frequency of 30."""

    def __init__(self, inputs: int, outputs: int, first: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        bound = 1 / inputs if first else math.sqrt(6 / inputs) / 30
        nn.init.uniform_(self.linear.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(30 * self.linear(x))


@healthy(
    CASES,
    "cl_siren_fits_a_picture",
    source="https://arxiv.org/abs/2006.09661 SIREN; frequency 30, weights far below the usual size, gradients far above",
    proof=converges(0.1),
)
def _(seed: int) -> Setup:
    model, places = nn.Sequential(Sine(2, 48, True), Sine(48, 48), Sine(48, 48), nn.Linear(48, 1)), grid(16)
    wanted = torch.sin(6 * places[:, :1] + seed) * torch.cos(8 * places[:, 1:])

    def loss(_: int) -> Tensor:
        return F.mse_loss(model(places), wanted)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-4), 150)


class Coupling(nn.Module):
    """Moves and scales one half of the numbers by what the other says; at first it does nothing."""

    def __init__(self, size: int, width: int = 32) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(size // 2, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, size))
        last = self.net[4]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, 1)
        scale, move = self.net(a).chunk(2, 1)
        scale = torch.tanh(scale)
        return torch.cat([b * scale.exp() + move, a], 1), scale.sum(1)


@healthy(
    CASES,
    "cl_flow_whose_loss_becomes_negative",
    source="https://arxiv.org/abs/1605.08803 RealNVP; the last layers start at zero: nothing below them has a gradient at first",
    proof=every(
        zero_gradient("0.net.0.weight", last=1),
        lambda plain: (
            f"the loss goes from {plain.losses[0]:.3g} to {median(plain.losses[-20:]):.3g}"
            if median(plain.losses[:5]) > 0 > median(plain.losses[-20:])
            else _fail(f"the loss {plain.losses[0]:.3g}, {median(plain.losses[-20:]):.3g}")
        ),
    ),
)
def _(seed: int) -> Setup:
    model = nn.ModuleList(Coupling(8) for _ in range(4))
    generator = torch.Generator().manual_seed(seed)
    mix = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(9)))[0]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def train() -> Iterator[Event]:
        for _ in range(200):
            z = torch.randn(64, 8, generator=generator) * torch.tensor([1.0, 0.8, 0.1, 0.1, 0.05, 0.1, 0.1, 0.05])
            z[:, 2] += 0.5 * z[:, 0] ** 2
            x = z @ mix
            total = torch.zeros(64)
            for layer in model:
                x, log_determinant = layer(x)
                total = total + log_determinant
            loss = (0.5 * (x**2).sum(1) + 4 * math.log(2 * math.pi) - total).mean()
            optimizer.zero_grad()
            loss.backward()
            yield "read", [loss]
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "cl_warm_restarts_of_a_residual_net",
    source="https://arxiv.org/abs/1608.03983 SGDR; the rate falls to nearly 0 and jumps back twice, and the loss jumps a little with it",
    proof=converges(0.2),
)
def _(seed: int) -> Setup:
    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
            self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
            nn.init.zeros_(self.norm2.weight)  # the block starts as the identity

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))

    model = nn.Sequential(conv(1, 12, 2), Block(12), Block(12), Block(12), nn.Flatten(), nn.Linear(192, 8))
    data = Pictures(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 40, eta_min=1e-4)

    def loss(i: int) -> Tensor:
        if i:
            scheduler.step()
        x, y = data()
        return F.cross_entropy(model(x), y)

    return fit(model, loss, optimizer, 120)


@healthy(
    CASES,
    "cl_detector_with_empty_batches",
    source="https://arxiv.org/abs/1708.02002 RetinaNet; the prior bias of the score; empty batches give the box head zeros",
    proof=every(converges(0.4), zero_gradient("box.weight", first=10, last=11), noted("box error", below=0.02, first=-20)),
)
def _(seed: int) -> Setup:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(conv(1, 12), nn.ReLU(), conv(12, 24, 2), nn.ReLU(), conv(24, 24), nn.ReLU())
            self.score, self.box = conv(24, 1), conv(24, 2)
            assert self.score.bias is not None
            nn.init.normal_(self.score.weight, std=0.01)
            nn.init.constant_(self.score.bias, -math.log(99.0))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.body(x)
            return self.score(h)[:, 0], self.box(h)

    model, data = Detector(), Discs(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    errors: list[float] = []

    def train() -> Iterator[Event]:
        for i in range(150):
            x, mask = data()
            if i % 10 == 0 and i:
                x, mask = x - mask / 0.55, torch.zeros_like(mask)
            share = F.avg_pool2d(mask, 2)
            there = (share > 0.5).float()
            wanted = torch.cat([share, F.avg_pool2d(share, 3, 1, 1)], 1)
            score, box = model(x)
            p = score.sigmoid()
            right = p * there[:, 0] + (1 - p) * (1 - there[:, 0])
            focal = (1 - right) ** 2 * F.binary_cross_entropy_with_logits(score, there[:, 0], reduction="none")
            error = (there * F.smooth_l1_loss(box, wanted, reduction="none")).sum() / (2 * there.sum()).clamp(min=1)
            loss = 10 * focal.mean() + error
            optimizer.zero_grad()
            loss.backward()
            errors.append(float(error.detach()))
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]

    return Noted(model, train, {"box error": errors})


@healthy(
    CASES,
    "cl_backbone_thawed_half_way",
    source="https://arxiv.org/abs/1801.06146 gradual unfreezing; the body joins the optimizer after 60 updates, at a tenth of the rate",
    proof=every(converges(0.35), no_gradient("body.0.weight", last=60)),
)
def _(seed: int) -> Setup:
    data = Pictures(seed, batch=24)
    body = nn.Sequential(conv(1, 12), nn.ReLU(), conv(12, 24, 2), nn.ReLU(), nn.Flatten())
    # what it has learned elsewhere: to tell sums of bars
    before = nn.Linear(384, 2)
    earlier = torch.optim.Adam([*body.parameters(), *before.parameters()], lr=2e-3)
    for _ in range(30):
        x, y = data()
        earlier.zero_grad()
        F.cross_entropy(before(body(x)), y % 2).backward()
        earlier.step()
    model = nn.Sequential()
    model.add_module("body", body.requires_grad_(False))
    model.add_module("head", nn.Linear(384, 8))
    for p in body.parameters():
        p.grad = None
    optimizer = torch.optim.Adam(model[1].parameters(), lr=2e-3)

    def thaw(i: int) -> None:
        if i == 60:
            optimizer.add_param_group({"params": list(body.requires_grad_(True).parameters()), "lr": 2e-4})

    def loss(_: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y)

    return fit(model, loss, optimizer, 120, before=thaw)


@healthy(
    CASES,
    "cl_diffusion_with_average_of_weights",
    source="https://arxiv.org/abs/2006.11239 DDPM; noise of any strength, so the loss jumps; average of the weights, clipping",
    proof=converges(0.5),
)
def _(seed: int) -> Setup:
    class Teller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.time = nn.Sequential(nn.Linear(8, 64), nn.SiLU())
            self.inner = nn.Linear(64, 64)
            self.middle = nn.Sequential(nn.SiLU(), nn.Linear(64, 64), nn.SiLU())
            self.last = nn.Linear(64, 64)
            nn.init.zeros_(self.last.weight)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            angle = t[:, None] * torch.tensor([1.0, 2.0, 4.0, 8.0])
            h = self.inner(x) + self.time(torch.cat([angle.sin(), angle.cos()], 1))
            return self.last(h + self.middle(h))

    net, data = Teller(), Pictures(seed, classes=4, batch=32)
    model = nn.ModuleDict({"net": net, "average": copy.deepcopy(net).requires_grad_(False)})
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(seed)

    def train() -> Iterator[Event]:
        for _ in range(200):
            x, _y = data()
            t = torch.rand(len(x), generator=generator)
            noise = torch.randn(len(x), 64, generator=generator)
            keep = torch.cos(t * math.pi / 2)[:, None]
            loss = F.mse_loss(net(keep * x.flatten(1) + (1 - keep**2).sqrt() * noise, t), noise)
            optimizer.zero_grad()
            loss.backward()
            yield "read", [loss]
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                for p, q in zip(model["average"].parameters(), net.parameters(), strict=True):
                    p.lerp_(q, 0.02)
            yield "step", [optimizer]

    return Setup(model, train)
