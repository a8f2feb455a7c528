"""Networks without a sequence: MLPs, CNNs, ResNets, autoencoders, VAEs, flows, U-Nets, tabular, implicit and siamese nets."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.zoo.case import Blobs, Case, Event, Pictures, Proof, Setup, classify, evens, fit, healthy, initialise, mlp, sick
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
    unchanged,
    update_ratio,
    zero_gradient,
)

CASES: list[Case] = []

NON_FINITE = ("non_finite_input", "non_finite_activation", "non_finite_loss", "non_finite_gradient", "non_finite_weight")


# ---------------------------------------------------------------------------------------------------------------- proofs


def loss_ends_above(level: float, last: int = 20) -> Proof:
    """The median of the last losses is above a level (a NaN or Inf counts)."""

    def proof(plain: Plain) -> str:
        end = median(x if math.isfinite(x) else math.inf for x in plain.losses[-last:])
        assert end > level, f"the loss ends at {end:.4g}, not above {level:g}"
        return f"the loss ends at {end:.4g}, above {level:g}"

    return proof


def loss_ends_below(level: float, last: int = 20) -> Proof:
    """The median of the last losses is below a level, and every loss is finite."""

    def proof(plain: Plain) -> str:
        end = median(plain.losses[-last:])
        assert all(math.isfinite(x) for x in plain.losses), "a loss is not finite"
        assert end < level, f"the loss ends at {end:.4g}, not below {level:g}"
        return f"the loss ends at {end:.4g}, below {level:g}"

    return proof


def falls_by(nats: float) -> Proof:
    """The median of the last tenth of the losses is at least this much (a difference) below that of the first tenth."""

    def proof(plain: Plain) -> str:
        tenth = max(1, len(plain.losses) // 10)
        a, b = median(plain.losses[:tenth]), median(plain.losses[-tenth:])
        assert all(math.isfinite(x) for x in plain.losses), "a loss is not finite"
        assert b < a - nats, f"the loss goes from {a:.4g} to {b:.4g}, not down by {nats:g}"
        return f"the loss falls from {a:.4g} to {b:.4g}"

    return proof


def moving_gradient(parameter: str, first: int, last: int) -> Proof:
    """A parameter has a gradient other than zero in each of these updates."""

    def proof(plain: Plain) -> str:
        norms = plain.grads[parameter][first:last]
        assert all(n > 0 for n in norms), f"{parameter} has no gradient in update {first} to {last}"
        return f"{parameter} has a gradient of {min(norms):.2g} or more in updates {first} to {last - 1}"

    return proof


def first_loss_above(level: float) -> Proof:
    """The loss of the very first update is above a level."""

    def proof(plain: Plain) -> str:
        assert plain.losses[0] > level, f"the first loss is {plain.losses[0]:.4g}, not above {level:g}"
        return f"the first loss is {plain.losses[0]:.4g}, above {level:g}"

    return proof


def loss_spikes(update: int, factor: float) -> Proof:
    """The loss of one update is more than `factor` times the median of the 20 before it."""

    def proof(plain: Plain) -> str:
        ratio = plain.losses[update] / median(plain.losses[update - 20 : update])
        assert ratio > factor, f"at update {update} the loss is {ratio:.3g} times the median, not {factor:g}"
        return f"at update {update} the loss is {ratio:.3g} times the median of the 20 before it"

    return proof


def flat_tanh(module: str, below: float, first: int = 0, last: int | None = None) -> Proof:
    """The mean derivative of a tanh, 1 - mean(output^2), is below a level in the median of the updates."""

    def proof(plain: Plain) -> str:
        slope = median(1 - o.rms**2 for o in plain.outputs[module][first:last] if o is not None)
        assert slope < below, f"the mean derivative of {module} is {slope:.3g}, not below {below:g}"
        return f"the mean derivative of {module} is {slope:.3g}"

    return proof


def flat_on(module: str, slope: Callable[[Tensor], Tensor], inputs: Callable[[], Tensor], share: float) -> Proof:
    """More than `share` of what a module of the trained model gives to fresh inputs lies where its derivative is below 1 % of its largest."""

    def proof(plain: Plain) -> str:
        seen: list[Tensor] = []
        model = plain.setup.model
        assert isinstance(model, nn.Module)
        handle = model.get_submodule(module).register_forward_hook(lambda m, a, output: seen.append(slope(output.detach())))
        with torch.no_grad():
            model(inputs())
        handle.remove()
        flat = float((torch.cat(seen) < 0.01).double().mean())
        assert flat > share, f"{flat:.3g} of the outputs of {module} are flat, not more than {share:g}"
        return f"{flat:.3g} of the outputs of {module} lie in the flat part"

    return proof


def equal_units(*parameters: str) -> Proof:
    """After the run the weights of all units of a layer are still the same, up to rounding."""

    def proof(plain: Plain) -> str:
        model = plain.setup.model
        assert isinstance(model, nn.Module)
        for name in parameters:
            w = model.get_parameter(name).detach().flatten(1).double()
            spread = float((w - w[:1]).norm() / (w.norm() + 1e-30))
            assert spread < 1e-4, f"the units of {name} differ by {spread:.2g}"
        return f"all units of {', '.join(parameters)} are still the same at the end"

    return proof


def outputs_within(module: str, low: float, high: float) -> Proof:
    """Every output of a module lies in [low, high]."""

    def proof(plain: Plain) -> str:
        seen = [o for o in plain.outputs[module] if o is not None]
        assert seen, f"{module} never ran"
        a, b = min(o.low for o in seen), max(o.high for o in seen)
        assert a >= low - 1e-6, f"{module} gives {a}"
        assert b <= high + 1e-6, f"{module} gives {b}"
        return f"{module} gives {a:.3g} to {b:.3g}"

    return proof


def input_scale(above: float, inputs: Callable[[], Tensor]) -> Proof:
    """The root mean square of a fresh batch of inputs is above a level."""

    def proof(plain: Plain) -> str:
        rms = float(inputs().double().square().mean().sqrt())
        assert rms > above, f"the inputs have an rms of {rms:.3g}, not above {above:g}"
        return f"the inputs have an rms of {rms:.3g}"

    return proof


def sparsity(module: str, above: float) -> Proof:
    """In the median of the updates more than this share of what a module gives is exactly zero."""

    def proof(plain: Plain) -> str:
        share = median(o.zeros for o in plain.outputs[module] if o is not None)
        assert share > above, f"{share:.3g} of the outputs of {module} are zero, not more than {above:g}"
        return f"{share:.3g} of the outputs of {module} are zero"

    return proof


def gradient_is_bad(parameter: str, update: int) -> Proof:
    """The gradient of a parameter has its first NaN or Inf at this update."""

    def proof(plain: Plain) -> str:
        bad = [n > 0 for n in plain.nonfinite[parameter]]
        assert True in bad, f"{parameter} never has a NaN"
        assert bad.index(True) == update, f"{parameter} has its first NaN at {bad.index(True)}, not {update}"
        return f"the gradient of {parameter} is not finite at update {update}"

    return proof


def loss_is_finite(update: int) -> Proof:
    """The loss is finite up to this update, inclusive, and so are the outputs of every module."""

    def proof(plain: Plain) -> str:
        assert all(math.isfinite(x) for x in plain.losses[: update + 1]), "the loss is not finite"
        for name, seen in plain.outputs.items():
            assert not any(o is not None and o.nonfinite for o in seen[: update + 1]), f"the output of {name} is not finite"
        return f"loss and outputs are finite up to update {update}"

    return proof


def outputs_finite(module: str, updates: int) -> Proof:
    """What a module gives is finite in the first updates."""

    def proof(plain: Plain) -> str:
        assert not any(o is not None and o.nonfinite for o in plain.outputs[module][:updates]), f"{module} gives NaN or Inf"
        return f"the output of {module or 'the model'} is finite in the first {updates} updates"

    return proof


def some_output_bad_at_first(*modules: str) -> Proof:
    """One of these modules gives NaN or Inf in the first update."""

    def proof(plain: Plain) -> str:
        bad = [m for m in modules if (o := plain.outputs[m][0]) is not None and o.nonfinite]
        assert bad, f"{', '.join(modules)} are finite"
        return f"{bad[0]} gives NaN or Inf in the first update"

    return proof


# ---------------------------------------------------------------------------------------------------------------- pieces


class Table:
    """Rows of a table: features and a smooth target of some of them, standardised unless scaled."""

    def __init__(self, seed: int, features: int = 12, batch: int = 32, noise: float = 0.1) -> None:
        self.generator = torch.Generator().manual_seed(4000 + seed)
        self.direction = torch.randn(features, 2, generator=self.generator) / math.sqrt(features)
        self.features, self.batch, self.noise = features, batch, noise

    def __call__(self) -> tuple[Tensor, Tensor]:
        x = torch.randn(self.batch, self.features, generator=self.generator)
        a, b = (x @ self.direction).unbind(1)
        y = torch.sin(2 * a) + 0.5 * b**2 + self.noise * torch.randn(self.batch, generator=self.generator)
        return x, y[:, None]


class Smooth:
    """Pictures `[batch, 1, 8, 8]` of one soft spot each, values in [0, 1]."""

    def __init__(self, seed: int, batch: int = 16) -> None:
        self.generator = torch.Generator().manual_seed(5000 + seed)
        self.batch = batch
        self.grid = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij"))

    def __call__(self) -> Tensor:
        centre = 7 * torch.rand(self.batch, 2, 1, 1, generator=self.generator)
        return torch.exp(-(self.grid - centre).square().sum(1, keepdim=True) / 6)


def tower(act: Callable[[], nn.Module], depth: int, channels: int = 8, inputs: int = 1) -> list[nn.Module]:
    """`depth` 3 x 3 convolutions, each followed by `act()`."""
    layers: list[nn.Module] = []
    for k in range(depth):
        layers += [nn.Conv2d(inputs if k == 0 else channels, channels, 3, padding=1), act()]
    return layers


def head(channels: int = 8, size: int = 8, classes: int = 8) -> list[nn.Module]:
    """Flatten and classify."""
    return [nn.Flatten(), nn.Linear(channels * size * size, classes)]


def raw_pixels(data: Pictures) -> Callable[[], tuple[Tensor, Tensor]]:
    """The same pictures as bytes: 0 to 255, with a mean near 110."""

    def batch() -> tuple[Tensor, Tensor]:
        x, y = data()
        return (110 + 45 * x).clamp(0, 255).round(), y

    return batch


# ---------------------------------------------------------------------------------------------------- vanishing gradients


@sick(
    CASES,
    "v_sigmoid_mlp_nine_hidden",
    ("vanishing_gradient",),
    evens(0, 12),
    source="http://neuralnetworksanddeeplearning.com/chap5.html (Nielsen: why deep sigmoid networks are hard to train)",
    also=("loss_plateau",),
    proof=every(gradient_ratio("0.weight", "18.weight", 1e-4), gradient_ratio("12.weight", "18.weight", 0.05), loss_stays(0.1)),
)
def _(seed: int) -> Setup:
    model = mlp(nn.Sigmoid, 9, 32)
    return fit(model, classify(model, Blobs(seed)), torch.optim.SGD(model.parameters(), lr=0.1), 50)


@sick(
    CASES,
    "v_conv_autoencoder_tiny_weights",
    ("vanishing_gradient", "poor_init"),
    ("0", "2", "4", "6", "8", "10"),
    source="arXiv:1704.08863 (Kumar: weights of a deep net drawn with a standard deviation of 0.01, nothing trains)",
    also=("loss_plateau", "update_ratio_too_small"),
    proof=every(gradient_ratio("0.weight", "10.bias", 1e-3), gradient_ratio("8.weight", "10.bias", 1e-3), loss_stays(0.1)),
)
def _(seed: int) -> Setup:
    data = Smooth(seed)
    model = nn.Sequential(*tower(nn.Tanh, 5), nn.Conv2d(8, 1, 3, padding=1))
    initialise(model, lambda w: nn.init.normal_(w, std=0.01))

    def loss(i: int) -> Tensor:
        x = data() - 0.15
        return F.mse_loss(model(x), x)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.05), 60)


class Damp(torch.autograd.Function):
    """Identity whose derivative is taken for 0.01: a constant of the backward left in by mistake."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 0.01 * grad


class DampedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(16, 3)
        self.blocks = nn.ModuleList(nn.Linear(3 if k == 0 else 24, 24) for k in range(4))
        self.out = nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = F.leaky_relu(block(Damp.apply(x)))
        return self.out(x)


@sick(
    CASES,
    "v_custom_backward_damps",
    ("vanishing_gradient",),
    ("stem", "blocks.0", "blocks.1", "blocks.2"),
    source="https://github.com/jiecaoyu/XNOR-Net-PyTorch/issues/1 (a hand-written derivative whose scale is not that of the function)",
    proof=every(
        gradient_ratio("stem.weight", "out.weight", 1e-5), gradient_ratio("blocks.1.weight", "out.weight", 1e-3), loss_stays(0.1)
    ),
)
def _(seed: int) -> Setup:
    model = DampedNet()
    return fit(model, classify(model, Blobs(seed, classes=6, spread=0.7)), torch.optim.SGD(model.parameters(), lr=0.05), 60)


@sick(
    CASES,
    "v_twenty_plain_silu_layers",
    ("vanishing_gradient",),
    evens(0, 30),
    source="arXiv:1502.01852 (He et al.: a thirty-layer plain network with the common initialisation stalls)",
    also=("loss_plateau",),
    proof=every(gradient_ratio("0.weight", "40.weight", 1e-5), loss_stays(0.1)),
)
def _(seed: int) -> Setup:
    model = mlp(nn.SiLU, 20, 24)
    return fit(model, classify(model, Blobs(seed)), torch.optim.SGD(model.parameters(), lr=0.1), 50)


class Averaged(nn.Module):
    """Blocks whose skip path is scaled down together with the branch."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Linear(12, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth))
        self.out = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.stem(x))
        for block in self.blocks:
            h = 0.1 * (h + block(h))
        return self.out(h)


@sick(
    CASES,
    "v_residual_scale_on_the_skip",
    ("vanishing_gradient",),
    ("stem", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "blocks.4"),
    source="arXiv:1603.05027 (He et al., section 3: a constant below one on the shortcut, the signal decays exponentially)",
    also=("loss_plateau",),
    proof=every(
        gradient_ratio("stem.weight", "out.bias", 1e-6), gradient_ratio("blocks.4.0.weight", "out.bias", 1e-2), loss_ends_above(0.3)
    ),
)
def _(seed: int) -> Setup:
    data = Table(seed)
    model = Averaged(8, 24)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.mse_loss(model(x), y)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5), 60)


class Pair(nn.Module):
    """One tower for both inputs; gives the two codes in a dict."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.scale = nn.Linear(1, 1)
        nn.init.constant_(self.scale.bias, -1.1)  # the prior of a pair of the same class

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        left, right = self.encoder(a), self.encoder(b)
        distance = (left - right).square().sum(1, keepdim=True)
        return {"left": left, "right": right, "distance": distance, "logit": self.scale(distance)[:, 0]}


@sick(
    CASES,
    "v_siamese_sigmoid_encoder",
    ("vanishing_gradient",),
    ("encoder",),
    source="https://github.com/omoindrot/tensorflow-triplet-loss/issues/6 (all embeddings in one point, the loss at the margin)",
    also=("loss_plateau", "update_ratio_too_small"),
    proof=every(gradient_ratio("encoder.0.weight", "scale.bias", 1e-4), loss_stays(0.1)),
)
def _(seed: int) -> Setup:
    data = Blobs(seed, classes=4)
    model = Pair(nn.Sequential(*mlp(nn.Sigmoid, 6, 24, outputs=8)))

    def loss(i: int) -> Tensor:
        (a, ya), (b, yb) = data(), data()
        return F.binary_cross_entropy_with_logits(model(a, b)["logit"], (ya == yb).float())

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.1), 60)


# ---------------------------------------------------------------------------------------------------- exploding gradients


class NormedStack(nn.Module):
    """Linear, BatchNorm, ReLU, many times, without a skip."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        sizes = [16] + [width] * depth
        self.linears = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(sizes))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(depth))
        self.out = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = F.relu(norm(linear(x)))
        return self.out(x)


@sick(
    CASES,
    "v_batchnorm_stack_without_skips",
    ("exploding_gradient",),
    ("linears", "norms"),
    source="arXiv:1902.08129 (Yang et al.: batch normalisation makes gradients of deep networks without skips explode)",
    also=("update_ratio_too_large", "loss_plateau"),
    proof=every(gradient_ratio("linears.39.weight", "linears.0.weight", 0.02, 0, 1), loss_stays(0.15)),
)
def _(seed: int) -> Setup:
    model = NormedStack(40, 24)
    return fit(model, classify(model, Blobs(seed)), torch.optim.SGD(model.parameters(), lr=0.02), 40)


class Unnormed(nn.Module):
    """A pre-activation ResNet with its normalisation taken out."""

    def __init__(self, depth: int, channels: int = 8, gain: float = 1.0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"a": nn.Conv2d(channels, channels, 3, padding=1), "b": nn.Conv2d(channels, channels, 3, padding=1)})
            for _ in range(depth)
        )
        self.out = nn.Linear(channels * 64, 8)
        for m in self.blocks.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight)
                m.weight.data.mul_(gain)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block["b"](F.relu(block["a"](F.relu(x))))
        return self.out(x.flatten(1))


@sick(
    CASES,
    "v_resnet_without_norm_grows",
    ("exploding_gradient", "poor_init", "loss_diverging"),
    ("stem", "blocks", "out"),
    source="arXiv:1901.09321 (Zhang et al., Fixup: the gradient of a ResNet without normalisation explodes)",
    also=("update_ratio_too_large", "dead_units", "gradient_spike", "loss_spike", *NON_FINITE[1:]),
    proof=every(first_loss_above(100), gradient_ratio("out.bias", "stem.weight", 1e-3, 0, 1), loss_ends_above(2.0)),
)
def _(seed: int) -> Setup:
    model = Unnormed(10, gain=2.0)
    return fit(model, classify(model, Pictures(seed)), torch.optim.SGD(model.parameters(), lr=0.001), 30)


@sick(
    CASES,
    "v_table_regression_rate_too_high",
    ("exploding_gradient", "loss_diverging", "update_ratio_too_large", *NON_FINITE[1:]),
    ("0", "2", "4"),
    source="https://github.com/keras-team/autokeras/pull/571 (a rate of 0.025 with a squared error: the gradient explodes)",
    also=("gradient_spike", "loss_spike"),
    proof=every(gradient_grows("4.weight", 1e3, 15), loss_grows(1e3, 0, 16)),
)
def _(seed: int) -> Setup:
    data = Table(seed)
    model = mlp(lambda: nn.LeakyReLU(0.2), 2, 48, inputs=12, outputs=1)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.mse_loss(model(x), 5 * y)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.6), 30)


@sick(
    CASES,
    "v_autoencoder_schedule_multiplies_rate",
    ("exploding_gradient", "loss_diverging", "update_ratio_too_large", *NON_FINITE[1:]),
    ("0", "2", "4", "6"),
    onset=40,
    source="https://github.com/jmiller656/EDSR-Tensorflow/issues/50 (the loss rises from 1.2 to 16,000 in mid training: the rate)",
    also=("gradient_spike", "loss_spike"),
    proof=every(gradient_grows("6.weight", 1e3, 52, 38), loss_grows(1e3, 38, 54)),
)
def _(seed: int) -> Setup:
    data = Smooth(seed)
    model = nn.Sequential(*tower(nn.SiLU, 3), nn.Conv2d(8, 1, 3, padding=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(i: int) -> Tensor:
        x = data()
        return F.mse_loss(model(x + 0.1 * torch.randn(x.shape, generator=data.generator)), 4 * x)

    def before(i: int) -> None:
        optimizer.param_groups[0]["lr"] = 0.05 if i < 40 else 5.0

    return fit(model, loss, optimizer, 60, before)


class Equilibrium(nn.Module):
    """A weight-tied layer iterated towards a fixed point that does not exist."""

    def __init__(self, radius: float, times: int) -> None:
        super().__init__()
        self.inject = nn.Linear(16, 24)
        self.cell = nn.Linear(24, 24, bias=False)
        self.out = nn.Linear(24, 4)
        nn.init.orthogonal_(self.cell.weight, gain=radius)
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        u = self.inject(x)
        z = torch.zeros_like(u)
        for _ in range(self.times):
            z = F.leaky_relu(self.cell(z) + u, 0.3)
        return self.out(z)


@sick(
    CASES,
    "v_equilibrium_layer_expands",
    ("exploding_gradient", "poor_init", "loss_diverging"),
    ("inject", "cell", "out"),
    source="arXiv:1909.01377 (Bai et al., deep equilibrium models) with a cell that expands; arXiv:1211.5063 on the growth",
    also=("update_ratio_too_large", "gradient_spike", "loss_spike", *NON_FINITE[1:]),
    proof=every(gradient_ratio("out.bias", "cell.weight", 1e-4, 0, 3), first_loss_above(30)),
)
def _(seed: int) -> Setup:
    model = Equilibrium(1.9, 25)
    return fit(model, classify(model, Blobs(seed)), torch.optim.SGD(model.parameters(), lr=0.01), 30)


# -------------------------------------------------------------------------------------------------------- zero gradients


class Coder(nn.Module):
    """Encoder and decoder with something between them; dict output, the reconstruction under "picture"."""

    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 6))
        self.decoder = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 64), nn.Unflatten(1, (1, 8, 8)))
        self.middle = middle

    def forward(self, x: Tensor) -> dict[str, Any]:
        code = self.middle(self.encoder(x))
        return {"code": code, "picture": self.decoder(code)}


@sick(
    CASES,
    "v_rounded_latent_code",
    ("zero_gradient",),
    ("encoder",),
    source="https://discuss.pytorch.org/t/torch-round-gradient/28628 (the derivative of round is zero, nothing before it learns)",
    proof=every(zero_gradient("encoder.1.weight", "encoder.1.bias", "encoder.3.weight"), loss_ends_above(0.02)),
)
def _(seed: int) -> Setup:
    data = Smooth(seed)
    model = Coder(lambda z: torch.round(4 * z) / 4)

    def loss(i: int) -> Tensor:
        x = data()
        return F.mse_loss(model(x)["picture"], x)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 80)


class SignNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, stride=2, padding=1)
        )
        self.classifier = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.sign(self.features(x)).flatten(1))


@sick(
    CASES,
    "v_binarised_features_no_estimator",
    ("zero_gradient",),
    ("features",),
    source="https://github.com/layog/Accurate-Binary-Convolution-Network/issues/6 (no weight update due to the sign function)",
    proof=every(zero_gradient("features.0.weight", "features.1.weight", "features.2.weight"), loss_ends_above(0.5)),
)
def _(seed: int) -> Setup:
    model = SignNet()
    return fit(model, classify(model, Pictures(seed)), torch.optim.Adam(model.parameters(), lr=5e-3), 70)


class Clamped(nn.Module):
    """A regressor that clips its prediction to the valid range inside forward."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        self.body = mlp(nn.Tanh, 2, 24, inputs=12, outputs=1)
        nn.init.constant_(self.body[-1].bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).clamp(0, 1)


@sick(
    CASES,
    "v_prediction_clamped_to_range",
    ("zero_gradient",),
    ("body",),
    source="https://github.com/guevara/read-it-later/issues/5625 (copy of 'My neural network isn't working': clipped output, no gradient)",
    also=("loss_plateau",),
    proof=every(zero_gradient("body.0.weight", "body.2.weight", "body.4.weight", "body.4.bias"), loss_stays(0.2)),
)
def _(seed: int) -> Setup:
    data = Table(seed)
    model = Clamped(-6.0)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.mse_loss(model(x), torch.sigmoid(y))

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.05), 40)


class FakeQuant(nn.Module):
    """Quantisation of activations that is switched on later; its backward is that of round."""

    def __init__(self) -> None:
        super().__init__()
        self.on = False

    def forward(self, x: Tensor) -> Tensor:
        return torch.round(x * 8) / 8 if self.on else x


@sick(
    CASES,
    "v_quantisation_on_without_estimator",
    ("zero_gradient",),
    ("0", "2"),
    onset=30,
    source="https://github.com/pytorch/ao/pull/4806 (fake quantisation that lost its straight-through estimator)",
    proof=every(zero_gradient("0.weight", "2.weight", first=30), moving_gradient("2.weight", 0, 30), loss_ends_above(0.3)),
)
def _(seed: int) -> Setup:
    quant = FakeQuant()
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), quant, nn.ReLU(), nn.Linear(16, 6))

    def before(i: int) -> None:
        quant.on = i >= 30

    data = Blobs(seed, classes=6, spread=2.0)
    return fit(model, classify(model, data), torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), 60, before)


class TwoTask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.GELU())
        self.classifier = nn.Linear(32, 8)
        self.rebuild = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 64))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.trunk(x)
        return {"logits": self.classifier(h), "rebuilt": self.rebuild(h)}


@sick(
    CASES,
    "v_annealed_weight_integer_division",
    ("zero_gradient",),
    ("rebuild",),
    source="arXiv:1511.06349 (the annealed weight of a second loss term) computed as step // total, which stays 0",
    proof=zero_gradient("rebuild.0.weight", "rebuild.0.bias", "rebuild.2.weight", "rebuild.2.bias"),
)
def _(seed: int) -> Setup:
    data = Pictures(seed)
    model = TwoTask()
    updates = 60

    def loss(i: int) -> Tensor:
        x, y = data()
        out = model(x)
        return F.cross_entropy(out["logits"], y) + (i // updates) * F.mse_loss(out["rebuilt"], x.flatten(1))

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.05), updates)


# ------------------------------------------------------------------------------------------------------------ dead units


@sick(
    CASES,
    "v_relu_bias_far_below_zero",
    ("dead_units",),
    ("1", "3", "5"),
    source="https://github.com/keras-team/keras/issues/7057 (detect dead ReLUs: never active, gradient zero, not trained)",
    also=("zero_gradient", "loss_plateau", "poor_init"),
    proof=every(dead_fraction("3", 0.95), dead_fraction("1", 0.95), loss_stays(0.1)),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(*tower(nn.ReLU, 3), *head())
    for k in (0, 2, 4):
        nn.init.constant_(model[k].bias, -8.0)
    return fit(model, classify(model, Pictures(seed)), torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), 40)


@sick(
    CASES,
    "v_rate_jump_kills_relus",
    ("dead_units",),
    ("1", "3"),
    onset=40,
    source="https://cs231n.github.io/neural-networks-1/ (a rate too high: a large part of the ReLUs is dead)",
    also=("update_ratio_too_large", "zero_gradient", "loss_diverging", "loss_spike", "gradient_spike"),
    proof=every(dead_fraction("1", 0.85, 46), moving_gradient("0.weight", 0, 40), loss_ends_above(0.1)),
)
def _(seed: int) -> Setup:
    data = Smooth(seed)
    model = mlp(nn.ReLU, 2, 32, inputs=64, outputs=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def before(i: int) -> None:
        optimizer.param_groups[0]["lr"] = 3e-3 if i < 40 else 1.0

    def loss(i: int) -> Tensor:
        x = data().flatten(1)
        return F.mse_loss(model(x), 4 * x[:, :32].mean(1, keepdim=True))

    return fit(model, loss, optimizer, 75, before)


@sick(
    CASES,
    "v_relu_after_the_regression_layer",
    ("dead_units",),
    ("out",),
    source="https://github.com/ProteomicsML/ProteomicsML/pull/203 (a ReLU on the last layer: the network gives 0 for everything)",
    also=("zero_gradient", "loss_plateau"),
    proof=every(dead_fraction("out", 0.9), zero_gradient("body.0.weight", "body.4.weight"), loss_stays(0.3)),
)
def _(seed: int) -> Setup:
    data = Table(seed)
    model = nn.Sequential()
    model.add_module("body", mlp(nn.GELU, 2, 24, inputs=12, outputs=1))
    model.add_module("out", nn.ReLU())
    model.body[-1].bias.data.fill_(-1.0)
    model.body[-1].weight.data.mul_(0.3)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.mse_loss(model(x), y + 2)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.02), 40)


class NormReLU(nn.Module):
    """A normalised CNN; the ReLUs are modules, the pooling is functional."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.conv1, self.norm1, self.act1 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.conv2, self.norm2, self.act2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.fc = nn.Linear(128, 8)
        nn.init.constant_(self.norm2.bias, shift)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.act1(self.norm1(self.conv1(x))), 2)
        return self.fc(self.act2(self.norm2(self.conv2(x))).flatten(1))


@sick(
    CASES,
    "v_norm_shift_starts_at_minus_nine",
    ("dead_units",),
    ("act2",),
    source="arXiv:1903.06733 (Lu et al., dying ReLU and initialisation)",
    also=("zero_gradient", "loss_plateau", "poor_init"),
    proof=every(dead_fraction("act2", 0.95), loss_stays(0.1)),
)
def _(seed: int) -> Setup:
    model = NormReLU(-9.0)
    return fit(model, classify(model, Pictures(seed)), torch.optim.SGD(model.parameters(), lr=0.1), 40)


@sick(
    CASES,
    "v_sparse_code_penalty_kills_latents",
    ("dead_units",),
    ("1",),
    onset=30,
    source="https://transformer-circuits.pub/2023/monosemantic-features (latents of a sparse autoencoder that never fire again)",
    also=("zero_gradient", "loss_spike", "gradient_spike"),
    proof=every(dead_fraction("1", 0.9, 36), moving_gradient("0.weight", 0, 30), loss_ends_above(0.05)),
)
def _(seed: int) -> Setup:
    data = Smooth(seed)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 64))

    def loss(i: int) -> Tensor:
        x = data().flatten(1)
        code = model[:2](x)
        return F.mse_loss(model[2](code), x) + (1e-4 if i < 30 else 5.0) * code.sum(1).mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=0.02), 70)


# ----------------------------------------------------------------------------------------------------------- saturation


def tanh_slope(output: Tensor) -> Tensor:
    return 1 - output**2


def sigmoid_slope(output: Tensor) -> Tensor:
    return 4 * output * (1 - output)


@sick(
    CASES,
    "v_tanh_weights_not_scaled_by_fan_in",
    ("saturated_activation",),
    ("1", "3", "5", "7"),
    source="https://github.com/karpathy/nn-zero-to-hero/issues/66 (saturation of tanh from the initialisation, makemore part 3)",
    also=("vanishing_gradient", "exploding_gradient", "poor_init", "loss_plateau"),
    proof=every(flat_tanh("1", 0.1), flat_tanh("3", 0.1), flat_tanh("7", 0.1), loss_ends_above(1.0)),
)
def _(seed: int) -> Setup:
    model = initialise(mlp(nn.Tanh, 4, 32, outputs=6), lambda w: nn.init.normal_(w, std=4.0 if len(w) > 6 else 0.1))
    return fit(model, classify(model, Blobs(seed, classes=6, spread=1.0)), torch.optim.SGD(model.parameters(), lr=0.05), 60)


@sick(
    CASES,
    "v_sigmoid_net_on_heart_rates",
    ("saturated_activation", "unnormalized_input"),
    ("", "first", "act1"),
    source="https://openillumi.com/en/en-pytorch-performance-fix-standardization (two sigmoid layers, features with a high mean)",
    also=("vanishing_gradient", "loss_plateau", "zero_gradient"),
    proof=every(
        flat_on("act1", sigmoid_slope, lambda: heart_rates(7)[0], 0.85), input_scale(50, lambda: heart_rates(7)[0]), loss_stays(0.1)
    ),
)
def _(seed: int) -> Setup:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential()
    for name, module in (("first", nn.Linear(4, 24)), ("act1", nn.Sigmoid()), ("second", nn.Linear(24, 1))):
        model.add_module(name, module)

    def loss(i: int) -> Tensor:
        x, y = heart_rates(0, generator)
        return F.binary_cross_entropy_with_logits(model(x), y)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.3), 60)


def heart_rates(seed: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Four measures of a patient, in their own units, and whether the first is the higher one, for its kind."""
    generator = generator or torch.Generator().manual_seed(seed)
    z = torch.randn(32, 4, generator=generator)
    y = (z[:, :1] > z[:, 1:2]).float()
    return torch.tensor([75.0, 120.0, 170.0, 80.0]) + torch.tensor([12.0, 15.0, 10.0, 10.0]) * z, y


@sick(
    CASES,
    "v_table_units_change_in_mid_run",
    ("saturated_activation", "unnormalized_input"),
    ("", "1"),
    onset=40,
    source="https://openillumi.com/en/en-pytorch-performance-fix-standardization (fine until the data change to a large scale) in mid run",
    also=("loss_spike", "gradient_spike", "loss_diverging", "vanishing_gradient", "exploding_gradient"),
    proof=every(flat_tanh("1", 0.08, 40), loss_ends_above(0.25)),
)
def _(seed: int) -> Setup:
    data = Table(seed)
    model = mlp(nn.Tanh, 2, 32, inputs=12, outputs=1)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.mse_loss(model(x if i < 40 else 1000 * x), y)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.1), 75)


@sick(
    CASES,
    "v_hardtanh_cnn_huge_filters",
    ("saturated_activation",),
    ("1", "3", "5"),
    source="arXiv:1603.00391 (Gulcehre et al., noisy activations: saturated hard-tanh units pass no gradient)",
    also=("zero_gradient", "vanishing_gradient", "exploding_gradient", "poor_init", "loss_plateau", "loss_diverging"),
    proof=every(flat_tanh("1", 0.06), flat_tanh("3", 0.06), flat_tanh("5", 0.06), loss_ends_above(1.6)),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(*tower(nn.Hardtanh, 3), nn.AdaptiveAvgPool2d(2), *head(size=2))
    initialise(model, lambda w: nn.init.normal_(w, std=20.0), (nn.Conv2d,))
    return fit(model, classify(model, Pictures(seed)), torch.optim.SGD(model.parameters(), lr=0.02), 50)


@sick(
    CASES,
    "v_adam_rate_jump_saturates_tanh",
    ("saturated_activation",),
    ("encoder.2",),
    onset=40,
    source="arXiv:1206.5533 (Bengio, practical recommendations for gradient-based training: the rate, above a threshold, diverges)",
    also=(
        "update_ratio_too_large",
        "loss_spike",
        "gradient_spike",
        "loss_diverging",
        "vanishing_gradient",
        "dead_units",
        "zero_gradient",
    ),
    proof=every(flat_tanh("encoder.2", 0.08, 46), loss_ends_above(0.05)),
)
def _(seed: int) -> Setup:
    data = Smooth(seed)
    model = Coder(lambda z: z)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def before(i: int) -> None:
        optimizer.param_groups[0]["lr"] = 3e-3 if i < 40 else 3.0

    def loss(i: int) -> Tensor:
        x = data()
        return F.mse_loss(model(x)["picture"], x)

    return fit(model, loss, optimizer, 75, before)


# -------------------------------------------------------------------------------------------------------- initialisation


@sick(
    CASES,
    "v_all_weights_one_constant",
    ("poor_init",),
    ("0", "2", "4"),
    source="https://d2l.ai/chapter_multilayer-perceptrons/numerical-stability-and-init.html (all weights one constant c: symmetry)",
    also=("loss_plateau",),
    proof=every(equal_units("0.weight", "2.weight"), loss_ends_above(0.7)),
)
def _(seed: int) -> Setup:
    model = initialise(mlp(nn.Tanh, 2, 24, outputs=6), lambda w: nn.init.constant_(w, 0.05))
    return fit(model, classify(model, Blobs(seed, classes=6)), torch.optim.Adam(model.parameters(), lr=5e-3), 80)


@sick(
    CASES,
    "v_filters_all_the_same",
    ("poor_init",),
    ("0", "2"),
    source="https://github.com/HomericIntelligence/Mnemosyne/pull/1987 (uniform-fill weights: symmetric units, a plateau at ln(classes))",
    also=("loss_plateau",),
    proof=every(equal_units("0.weight", "2.weight"), loss_ends_above(1.0)),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(*tower(nn.SiLU, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8))
    initialise(model, lambda w: nn.init.constant_(w, 0.02))
    return fit(model, classify(model, Pictures(seed)), torch.optim.SGD(model.parameters(), lr=0.1), 60)


@sick(
    CASES,
    "v_every_weight_zero",
    ("poor_init",),
    ("0", "2", "4"),
    source="https://github.com/wagonhelm/NaNmnist/issues/2 (highly improper way of weight initialisation: zeros)",
    also=("zero_gradient", "loss_plateau", "dead_units"),
    proof=every(zero_gradient("0.weight", "2.weight", "4.weight"), loss_stays(0.1)),
)
def _(seed: int) -> Setup:
    model = initialise(mlp(nn.ReLU, 2, 24), nn.init.zeros_)
    return fit(model, classify(model, Blobs(seed)), torch.optim.SGD(model.parameters(), lr=0.1), 40)


@sick(
    CASES,
    "v_head_a_hundred_times_too_large",
    ("poor_init",),
    ("fc",),
    source="http://karpathy.github.io/2019/04/25/recipe/ (verify the loss at initialisation)",
    also=("gradient_spike", "exploding_gradient", "loss_diverging"),
    proof=first_loss_above(60),
)
def _(seed: int) -> Setup:
    model = NormReLU(0.0)
    nn.init.normal_(model.fc.weight, std=10.0)
    return fit(model, classify(model, Pictures(seed)), torch.optim.SGD(model.parameters(), lr=0.002), 40)


class UNet(nn.Module):
    """Two levels with a skip; GroupNorm and SiLU."""

    def __init__(self, channels: int = 8, inputs: int = 1, outputs: int = 1) -> None:
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(inputs, channels, 3, padding=1), nn.GroupNorm(2, channels), nn.SiLU())
        self.down2 = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1), nn.GroupNorm(2, 2 * channels), nn.SiLU()
        )
        self.middle = nn.Sequential(nn.Conv2d(2 * channels, 2 * channels, 3, padding=1), nn.SiLU())
        self.up = nn.ConvTranspose2d(2 * channels, channels, 2, stride=2)
        self.merge = nn.Sequential(nn.Conv2d(2 * channels, channels, 3, padding=1), nn.SiLU())
        self.out = nn.Conv2d(channels, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.middle(self.down2(a))
        return self.out(self.merge(torch.cat([a, self.up(b)], 1)))


@sick(
    CASES,
    "v_segmentation_logits_huge_at_start",
    ("poor_init",),
    ("out",),
    source="arXiv:1708.02002 (Lin et al., section 4.1: how the last layer starts decides the first losses)",
    also=("gradient_spike", "exploding_gradient"),
    proof=first_loss_above(14),
)
def _(seed: int) -> Setup:
    data = Smooth(seed)
    model = UNet()
    nn.init.normal_(model.out.weight, std=300.0)

    def loss(i: int) -> Tensor:
        x = data()
        return F.binary_cross_entropy_with_logits(
            model(x + 0.2 * torch.randn(x.shape, generator=data.generator)), (x > 0.5).float()
        )

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-3), 40)


# ------------------------------------------------------------------------------------------------------------------ input


@sick(
    CASES,
    "v_byte_pixels_into_plain_cnn",
    ("unnormalized_input",),
    ("",),
    source="https://github.com/mlmed/torchxrayvision/issues/9 (pixels in the hundreds, default initialisation: inf and nan; normalised: fine)",
    also=(
        "dead_units",
        "zero_gradient",
        "exploding_gradient",
        "loss_diverging",
        "gradient_spike",
        "loss_spike",
        "poor_init",
        "update_ratio_too_large",
        "loss_plateau",
    ),
    proof=every(input_scale(80, lambda: raw_pixels(Pictures(7))()[0]), loss_ends_above(1.8)),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(*tower(nn.ReLU, 3), *head())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return fit(model, classify(model, raw_pixels(Pictures(seed))), optimizer, 60)


@sick(
    CASES,
    "v_house_prices_features_as_they_are",
    ("unnormalized_input",),
    ("",),
    source="https://discuss.pytorch.org/t/neural-network-could-not-learn-on-this-type-of-data-why/96648 (normalise the inputs)",
    also=("loss_plateau", "gradient_spike", "loss_spike", "exploding_gradient", "poor_init", "dead_units"),
    proof=every(input_scale(1e3, lambda: houses(torch.Generator().manual_seed(7))[0]), loss_ends_above(0.7)),
)
def _(seed: int) -> Setup:
    generator = torch.Generator().manual_seed(seed)
    model = mlp(nn.ReLU, 2, 32, inputs=6, outputs=1)

    def loss(i: int) -> Tensor:
        x, y = houses(generator)
        return F.smooth_l1_loss(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-3), 80)


def houses(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Year, square feet, lot, rooms, tax and distance, in their own units; the target is standardised."""
    z = torch.randn(32, 6, generator=generator)
    y = torch.sin(2 * z[:, :1]) + z[:, 3:4] - z[:, 1:2] * z[:, 5:6]
    spread, mean = torch.tensor([15.0, 600.0, 4000.0, 1.5, 900.0, 6.0]), torch.tensor([1975.0, 1800.0, 9000.0, 6.0, 3000.0, 12.0])
    return mean + spread * z, y


class Sine(nn.Module):
    def __init__(self, omega: float) -> None:
        super().__init__()
        self.omega = omega

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.omega * x)


def siren(inputs: int, width: int, omega: float = 30.0) -> nn.Sequential:
    """Sitzmann et al.: weights so that every sine sees a spread of about one."""
    layers: list[nn.Module] = []
    for k in range(3):
        linear = nn.Linear(inputs if k == 0 else width, width)
        bound = 1 / inputs if k == 0 else math.sqrt(6 / width) / omega
        nn.init.uniform_(linear.weight, -bound, bound)
        layers += [linear, Sine(omega)]
    return nn.Sequential(*layers, nn.Linear(width, 1))


@sick(
    CASES,
    "v_siren_on_pixel_coordinates",
    ("unnormalized_input",),
    ("",),
    source="https://github.com/vsitzmann/siren/issues/19 (SIREN not converge: the inputs must be normalised to (-1, 1))",
    also=("loss_plateau", "loss_diverging"),
    proof=every(
        input_scale(100, lambda: torch.randint(0, 512, (64, 2), generator=torch.Generator().manual_seed(7)).float()),
        loss_ends_above(0.3),
    ),
)
def _(seed: int) -> Setup:
    generator = torch.Generator().manual_seed(seed)
    model = siren(2, 48)

    def loss(i: int) -> Tensor:
        x = torch.randint(0, 512, (64, 2), generator=generator).float()
        y = torch.sin(x[:, :1] / 60) * torch.cos(x[:, 1:] / 80)
        return F.mse_loss(model(x), y) * 4

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-3), 80)


# ----------------------------------------------------------------------------------------------------------------- spikes


@sick(
    CASES,
    "v_one_batch_still_in_bytes",
    ("gradient_spike", "loss_spike"),
    onset=45,
    source="https://github.com/lucidrains/imagen-pytorch/issues/24 (bytes of 0 to 255 where [0, 1] was expected)",
    also=("unnormalized_input",),
    proof=every(gradient_spikes(45, 30), loss_spikes(45, 10)),
)
def _(seed: int) -> Setup:
    data = Smooth(seed)
    model = nn.Sequential(*tower(nn.ReLU, 2), nn.Conv2d(8, 1, 3, padding=1))

    def loss(i: int) -> Tensor:
        clean = data() * (255 if i == 45 else 1)
        return F.mse_loss(model(clean + 0.1 * torch.randn(clean.shape, generator=data.generator)), clean)

    def between(i: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.1), 80, between=between)


@sick(
    CASES,
    "v_denoiser_weight_near_time_zero",
    ("gradient_spike", "loss_spike"),
    onset=50,
    source="arXiv:2303.09556 (Hang et al., Min-SNR: the weight of a diffusion loss is unbounded as the noise goes to 0)",
    proof=gradient_spikes(50, 100),
)
def _(seed: int) -> Setup:
    data = Smooth(seed)
    model = UNet(inputs=2)

    def loss(i: int) -> Tensor:
        x = data()
        t = 0.3 + 0.7 * torch.rand(len(x), 1, 1, 1, generator=data.generator)
        if i == 50:
            t = 0.002 + 0 * t
        noise = torch.randn(x.shape, generator=data.generator)
        out = model(torch.cat([(1 - t) * x + t * noise, t.expand_as(x)], 1))
        return ((out - noise).square() * (1 - t).clamp(min=0.1) ** 2 / t**2).mean()

    def between(i: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-3), 85, between=between)


@sick(
    CASES,
    "v_table_row_with_misplaced_point",
    ("gradient_spike", "loss_spike"),
    onset=40,
    source="https://discuss.pytorch.org/t/clip-limit-the-loss-for-outlier-samples-in-a-batch/125825 (dirty samples, clipped)",
    also=("unnormalized_input",),
    proof=gradient_spikes(40, 50),
)
def _(seed: int) -> Setup:
    data = Table(seed)
    model = mlp(nn.SiLU, 2, 32, inputs=12, outputs=1)

    def loss(i: int) -> Tensor:
        x, y = data()
        if i == 40:
            x = torch.cat([x[:-2], 1e4 * x[-2:]])
        return F.mse_loss(model(x), y)

    def between(i: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.05), 75, between=between)


@sick(
    CASES,
    "v_targets_in_another_unit_once",
    ("loss_spike", "gradient_spike"),
    onset=50,
    source="https://www.reddit.com/r/MachineLearning/comments/1odfuwe/r_why_loss_spikes/ (wrongly labelled examples and loss spikes)",
    proof=loss_spikes(50, 100),
)
def _(seed: int) -> Setup:
    data = Table(seed)
    model = mlp(nn.Tanh, 2, 32, inputs=12, outputs=1)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.huber_loss(model(x), y if i != 50 else 1000 * y)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.1), 85)


@sick(
    CASES,
    "v_one_batch_with_labels_shifted",
    ("loss_spike", "gradient_spike"),
    onset=60,
    source="https://github.com/archinetai/audio-diffusion-pytorch/issues/84 (weird spikes in the loss)",
    proof=every(loss_spikes(60, 20), gradient_spikes(60, 8)),
)
def _(seed: int) -> Setup:
    data = Blobs(seed, spread=0.5)
    model = mlp(nn.ReLU, 2, 32)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), (y + 1) % 4 if i == 60 else y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 95)


# --------------------------------------------------------------------------------------------------------- double softmax


@sick(
    CASES,
    "v_softmax_module_ends_the_cnn",
    ("double_softmax",),
    ("7",),
    source="https://github.com/vinhkhuc/PyTorch-Mini-Tutorials/issues/1 (a Softmax module before CrossEntropyLoss)",
    also=("loss_plateau",),
    proof=every(outputs_within("7", 0, 1), loss_ends_above(1.6)),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(*tower(nn.ReLU, 2), nn.MaxPool2d(2), *head(size=4), nn.Softmax(1))
    return fit(model, classify(model, Pictures(seed)), torch.optim.SGD(model.parameters(), lr=0.1), 80)


class SoftHead(nn.Module):
    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = self.fc(x)
        return {"probabilities": F.softmax(logits, dim=-1), "logits": logits}


class TableNet(nn.Module):
    """Embeddings of two categories beside the numbers."""

    def __init__(self, classes: int, last: nn.Module) -> None:
        super().__init__()
        self.embed = nn.ModuleList(nn.Embedding(6, 4) for _ in range(2))
        self.body = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.last = last

    def forward(self, numbers: Tensor, categories: Tensor) -> Any:
        parts = [numbers, *(e(c) for e, c in zip(self.embed, categories.unbind(1), strict=True))]
        return self.last(self.body(torch.cat(parts, 1)))


def categories_of(y: Tensor, generator: torch.Generator) -> Tensor:
    return torch.stack([(y + torch.randint(0, 3, y.shape, generator=generator)) % 6 for _ in range(2)], 1)


@sick(
    CASES,
    "v_softmax_function_in_table_head",
    ("double_softmax",),
    ("last",),
    source="https://github.com/bowang-lab/Transformer-GCN-QA/pull/32 (removes an erroneous extra softmax: a lesser gradient signal)",
    also=("loss_plateau",),
    proof=loss_ends_above(1.0),
)
def _(seed: int) -> Setup:
    data = Blobs(seed)
    model = TableNet(4, SoftHead(32, 4))

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x, categories_of(y, data.generator))["probabilities"], y)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.05), 60)


class Probabilities(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, 48)
        self.fc2 = nn.Linear(48, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.fc2(F.elu(self.fc1(x.flatten(1)))), dim=1)


@sick(
    CASES,
    "v_forward_returns_probabilities",
    ("double_softmax",),
    ("",),
    source="https://github.com/IBM/dstc-noesis/issues/18 (no need of a softmax layer with CrossEntropyLoss)",
    also=("loss_plateau",),
    proof=every(outputs_within("", 0, 1), loss_ends_above(1.6)),
)
def _(seed: int) -> Setup:
    model = Probabilities()
    return fit(model, classify(model, Pictures(seed)), torch.optim.SGD(model.parameters(), lr=0.05), 60)


# --------------------------------------------------------------------------------------------------------------- plateaus


@sick(
    CASES,
    "v_labels_shuffled_apart_from_pictures",
    ("loss_plateau",),
    source="https://github.com/mlcommons/GaNDLF/pull/870 (data and ground truth are shuffled separately)",
    within=100,
    proof=every(loss_stays(0.05), loss_ends_above(2.0)),
)
def _(seed: int) -> Setup:
    data = Pictures(seed)
    model = nn.Sequential(*tower(nn.ReLU, 2, 6), nn.MaxPool2d(2), *head(6, 4))

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y[torch.randperm(len(y), generator=data.generator)])

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.02), 150)


@sick(
    CASES,
    "v_linear_model_on_exclusive_or",
    ("loss_plateau",),
    source="https://discuss.pytorch.org/t/bce-loss-stuck-at-0-693-in-the-beginnng-of-training-and-then-started-to-decrease-why/183958",
    within=100,
    proof=every(loss_stays(0.05), loss_ends_above(0.66)),
)
def _(seed: int) -> Setup:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 16), nn.Linear(16, 1))

    def loss(i: int) -> Tensor:
        x = torch.randn(64, 2, generator=generator)
        y = (x[:, :1] * x[:, 1:] > 0).float()
        return F.binary_cross_entropy_with_logits(model(x), y)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.05), 160)


@sick(
    CASES,
    "v_triplets_of_random_positives",
    ("loss_plateau",),
    source="https://github.com/xiaolonw/caffe-video_triplet/issues/8 (the triplet loss stays at the margin all the time)",
    within=100,
    proof=every(loss_stays(0.1), loss_ends_above(0.4)),
)
def _(seed: int) -> Setup:
    data = Blobs(seed, features=24, classes=8)
    model = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 8))

    def loss(i: int) -> Tensor:
        (a, _), (p, _), (n, _) = data(), data(), data()
        return F.triplet_margin_loss(*(F.normalize(model(x), dim=1) for x in (a, p, n)), margin=0.5)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.05), 150)


@sick(
    CASES,
    "v_loader_returns_one_picture",
    ("loss_plateau",),
    source="https://datarekha.com/interview/deep-learning/debugging-model-not-learning/ (a flat loss: look at a batch of the loader)",
    within=100,
    proof=every(loss_stays(0.06), loss_ends_above(1.95)),
)
def _(seed: int) -> Setup:
    data = Pictures(seed, batch=32)
    first = data()[0][:1].clone()
    model = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.GELU(), nn.AvgPool2d(2), *head(6, 4))

    def loss(i: int) -> Tensor:
        _, y = data()
        return F.cross_entropy(model(first.expand(len(y), -1, -1, -1)), y)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.01), 150)


# ------------------------------------------------------------------------------------------------------------------- rate


@sick(
    CASES,
    "v_rate_of_a_millionth_cnn",
    ("update_ratio_too_small",),
    source="https://taourl.com/read-2391810.html (loss remains constant: a rate far too small)",
    also=("loss_plateau",),
    proof=every(update_ratio(below=1e-6), loss_stays(0.1), loss_ends_above(1.9)),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(*tower(nn.ReLU, 2), *head())
    return fit(model, classify(model, Pictures(seed)), torch.optim.SGD(model.parameters(), lr=1e-6), 50)


@sick(
    CASES,
    "v_adam_rate_lost_its_exponent_vae",
    ("update_ratio_too_small",),
    source="https://github.com/jaehyunnn/ViTPose_pytorch/issues/20 (the rate decays to almost nothing by a wrong factor each step)",
    also=("loss_plateau",),
    proof=every(update_ratio(below=2e-5), loss_stays(0.1)),
)
def _(seed: int) -> Setup:
    data = Smooth(seed, batch=32)
    model = Variational()
    return fit(model, elbo(model, data), torch.optim.Adam(model.parameters(), lr=1e-6), 50)


class Sample(nn.Module):
    """The reparameterisation, a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(11)

    def forward(self, mean: Tensor, logvar: Tensor) -> Tensor:
        return mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=self.generator)


class Variational(nn.Module):
    def __init__(self, latent: int = 4) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU())
        self.mean, self.logvar = nn.Linear(32, latent), nn.Linear(32, latent)
        self.sample = Sample()
        self.decoder = nn.Sequential(nn.Linear(latent, 32), nn.ReLU(), nn.Linear(32, 64))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.encoder(x)
        mean, logvar = self.mean(h), self.logvar(h)
        return {"picture": self.decoder(self.sample(mean, logvar)), "mean": mean, "logvar": logvar}


def elbo(model: nn.Module, data: Callable[[], Tensor], beta: float = 1.0, noise: float = 0.2) -> Callable[[int], Tensor]:
    """The negative evidence bound of a Gaussian decoder, summed over pixels: it has no sign."""

    def loss(i: int) -> Tensor:
        x = data()
        out = model(x)
        fit = 0.5 * ((out["picture"] - x.flatten(1)) / noise).square().sum(1) + 64 * math.log(noise)
        prior = 0.5 * (out["mean"] ** 2 + out["logvar"].exp() - 1 - out["logvar"]).sum(1)
        return (fit + beta * prior).mean()

    return loss


@sick(
    CASES,
    "v_adam_rate_three_with_batchnorm",
    ("update_ratio_too_large",),
    ("",),
    source="https://github.com/keras-team/keras/issues/21 (training diverges: the rate)",
    also=("loss_diverging", "loss_spike", "gradient_spike", "dead_units", "loss_plateau", "zero_gradient"),
    proof=every(update_ratio(above=3, first=0, last=1), update_ratio(above=0.1, first=0, last=10), loss_ends_above(1.0)),
)
def _(seed: int) -> Setup:
    model = NormReLU(0.0)
    return fit(model, classify(model, Pictures(seed)), torch.optim.Adam(model.parameters(), lr=3.0), 40)


@sick(
    CASES,
    "v_layernorm_mlp_rate_of_five",
    ("update_ratio_too_large",),
    ("",),
    source="https://github.com/tensorflow/tensorflow/issues/38796 (a rate too high) with a normalisation that keeps it finite",
    also=("loss_diverging", "loss_spike", "gradient_spike", "dead_units", "loss_plateau", "saturated_activation"),
    proof=every(update_ratio(above=0.3, first=0, last=10), loss_ends_above(1.0)),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(
        nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 4)
    )
    return fit(model, classify(model, Blobs(seed, spread=1.5)), torch.optim.SGD(model.parameters(), lr=5.0), 40)


# ----------------------------------------------------------------------------------------------------------------- frozen


@sick(
    CASES,
    "v_bfloat16_weights_small_rate",
    ("frozen_weights",),
    ("0", "2", "4"),
    source="https://github.com/pytorch/ao/pull/1124 (a bfloat16 weight does not change by an update below 1e-3 of it)",
    also=("update_ratio_too_small", "loss_plateau"),
    proof=every(unchanged("0.weight", "2.weight", "4.weight"), loss_stays(0.1)),
)
def _(seed: int) -> Setup:
    data = Blobs(seed)
    model = initialise(mlp(nn.GELU, 2, 32), lambda w: w.data.copy_(0.05 * w.sign() + w)).to(torch.bfloat16)
    for p in model.parameters():
        if p.ndim == 1:
            nn.init.constant_(p, 0.01)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x.bfloat16()).float(), y)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=1e-5), 40)


@sick(
    CASES,
    "v_step_schedule_with_gamma_zero",
    ("frozen_weights",),
    ("",),
    onset=40,
    source="https://github.com/LINCellularNeuroscience/VAME/issues/26 (StepLR with gamma=0: the rate is 0 from the first step on)",
    also=("update_ratio_too_small", "loss_plateau"),
    proof=every(unchanged("0.weight", "2.weight", "5.weight", first=40), loss_ends_above(0.3), moving_gradient("0.weight", 0, 80)),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(*tower(nn.SiLU, 2), *head())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=40, gamma=0.0)
    loss = classify(model, Pictures(seed))

    def train() -> Iterator[Event]:
        for i in range(80):
            optimizer.zero_grad()
            value = loss(i)
            value.backward()
            yield "read", [value]
            optimizer.step()
            schedule.step()
            yield "step", [optimizer]

    return Setup(model, train)


@sick(
    CASES,
    "v_gradients_cleared_before_the_step",
    ("frozen_weights",),
    ("",),
    source="https://github.com/sacmehta/EdgeNets/issues/14 (the gradient is zeroed out before optimizer.step())",
    also=("never_stepped", "update_ratio_too_small", "loss_plateau"),
    proof=every(unchanged("down1.0.weight", "up.weight", "out.weight"), loss_stays(0.1)),
)
def _(seed: int) -> Setup:
    data = Smooth(seed)
    model = UNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(i: int) -> Tensor:
        x = data()
        return F.mse_loss(model(x + 0.2 * torch.randn(x.shape, generator=data.generator)), x)

    return fit(model, loss, optimizer, 40, between=lambda i: optimizer.zero_grad())


# ------------------------------------------------------------------------------------------------------------- non-finite


@sick(
    CASES,
    "v_vae_log_variance_overflows",
    ("non_finite_activation",),
    ("sample",),
    onset=40,
    source="https://github.com/vanderschaarlab/synthcity/issues/331 (unbounded log-variances of the VAE explode when exponentiated)",
    also=(*NON_FINITE[2:], "loss_spike"),
    proof=every(first_non_finite(40, "sample"), first_non_finite(40)),
)
def _(seed: int) -> Setup:
    data = Smooth(seed)
    model = Variational()
    count = iter(range(1000))

    def batch() -> Tensor:
        x = data()
        return x if next(count) != 40 else torch.cat([x[:-6], 1e5 * torch.randn(6, 1, 8, 8, generator=data.generator)])

    return fit(model, elbo(model, batch), torch.optim.Adam(model.parameters(), lr=1e-3), 65)


@sick(
    CASES,
    "v_siamese_root_of_twin_pair",
    ("non_finite_gradient",),
    ("encoder",),
    onset=30,
    source="https://github.com/pytorch/pytorch/issues/6394 (sqrt at 0: the derivative is inf, times 0 is NaN)",
    also=NON_FINITE,
    proof=every(first_non_finite(30), gradient_is_bad("encoder.0.weight", 30), loss_is_finite(30)),
)
def _(seed: int) -> Setup:
    data = Blobs(seed)
    model = Pair(mlp(nn.ReLU, 1, 24, outputs=6))
    model.scale.requires_grad_(False)

    def loss(i: int) -> Tensor:
        (a, ya), (b, yb) = data(), data()
        if i == 30:
            b, yb = torch.cat([a[:1], b[1:]]), torch.cat([ya[:1], yb[1:]])
        d = model(a, b)["distance"].sum(1).sqrt()
        return torch.where(ya == yb, d**2, F.relu(2 - d) ** 2).mean()

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.02), 55)


@sick(
    CASES,
    "v_cross_entropy_by_hand_log_of_zero",
    ("non_finite_loss",),
    onset=40,
    source="https://github.com/NVIDIA/apex/issues/358 (a binary cross-entropy by hand: log(1 - p) with p exactly 1)",
    also=NON_FINITE[3:],
    proof=every(first_non_finite(40), outputs_finite("", 41)),
)
def _(seed: int) -> Setup:
    data = Blobs(seed, classes=2)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 1), nn.Sigmoid())

    def loss(i: int) -> Tensor:
        x, y = data()
        if i == 40:
            x = torch.cat([x[:-4], 1000 * x[-4:]])  # so sure that the probability rounds to 0 or 1
        p = model(x)[:, 0]
        return -(y * torch.log(p) + (1 - y) * torch.log(1 - p)).mean()

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.05), 65)


class Standardise(nn.Module):
    """The mean and standard deviation of the batch, without an epsilon."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)) / x.std(0)


@sick(
    CASES,
    "v_constant_column_divided_by_its_std",
    ("non_finite_activation",),
    ("norm",),
    onset=35,
    source="https://github.com/autogluon/autogluon/issues/4508 (NaN loss: a continuous feature has zero variance)",
    also=(*NON_FINITE[2:],),
    proof=every(first_non_finite(35, "norm"), first_non_finite(35)),
)
def _(seed: int) -> Setup:
    data = Table(seed)
    model = nn.Sequential()
    model.add_module("norm", Standardise())
    model.add_module("body", mlp(nn.ReLU, 2, 24, inputs=12, outputs=1))

    def loss(i: int) -> Tensor:
        x, y = data()
        if i == 35:
            x = torch.cat([x[:, :5], torch.zeros(len(x), 1), x[:, 6:]], 1)
        return F.mse_loss(model(x), y)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.05), 60)


@sick(
    CASES,
    "v_missing_value_left_in_the_table",
    ("non_finite_input",),
    ("",),
    onset=25,
    source="https://github.com/pytorch-tabular/pytorch_tabular/issues/173 (continuous features with missing values: NaN in training)",
    also=NON_FINITE[1:],
    proof=every(first_non_finite(25, "body.0"), first_non_finite(25)),
)
def _(seed: int) -> Setup:
    data = Blobs(seed)
    model = TableNet(4, nn.Linear(32, 4))

    def loss(i: int) -> Tensor:
        x, y = data()
        if i == 25:
            x[3, 7] = math.nan
        return F.cross_entropy(model(x, categories_of(y, data.generator)), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 50)


class Coupling(nn.Module):
    """Affine coupling; `bound` keeps the log-scale within it by a tanh."""

    def __init__(self, features: int, flip: bool, bound: float | None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(features // 2, 24), nn.Tanh(), nn.Linear(24, features))
        self.flip, self.bound = flip, bound

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, 1)
        if self.flip:
            a, b = b, a
        s, t = self.net(a).chunk(2, 1)
        if self.bound is not None:
            s = self.bound * torch.tanh(s)
        b = b * torch.exp(s) + t
        return torch.cat([b, a] if self.flip else [a, b], 1), s.sum(1)


class Flow(nn.Module):
    def __init__(self, features: int, depth: int, bound: float | None) -> None:
        super().__init__()
        self.couplings = nn.ModuleList(Coupling(features, bool(k % 2), bound) for k in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """The log-likelihood of every row."""
        volume = torch.zeros(len(x))
        for coupling in self.couplings:
            x, logs = coupling(x)
            volume = volume + logs
        return volume - 0.5 * x.square().sum(1) - 0.5 * x.shape[1] * math.log(2 * math.pi)


@sick(
    CASES,
    "v_flow_scale_without_a_bound",
    ("non_finite_activation",),
    ("couplings",),
    source="https://github.com/ELIFE-ASU/INNLab/issues/7 (exp in the coupling of a RealNVP; the initialisation leads to nan)",
    also=(*NON_FINITE[2:], "poor_init"),
    proof=every(some_output_bad_at_first("couplings.0", "couplings.1", "couplings.2", "couplings.3"), first_non_finite(0)),
)
def _(seed: int) -> Setup:
    data = Blobs(seed, features=8, classes=3)
    model = Flow(8, 4, None)
    for c in model.couplings:
        nn.init.normal_(c.net[2].weight, std=25.0)
    return fit(model, lambda i: -model(data()[0]).mean(), torch.optim.Adam(model.parameters(), lr=1e-3), 25)


class SafeRoot(nn.Module):
    """Meant to be safe: the root only where there is something."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, torch.sqrt(x), torch.zeros_like(x))


@sick(
    CASES,
    "v_masked_root_still_differentiated",
    ("non_finite_gradient",),
    ("0", "2", "1", "3"),
    source="https://github.com/pytorch/pytorch/issues/68425 (torch.where gives NaN in the backward pass of the branch not taken)",
    also=NON_FINITE,
    proof=every(first_non_finite(0), gradient_is_bad("0.weight", 0), loss_is_finite(0)),
)
def _(seed: int) -> Setup:
    model = mlp(SafeRoot, 2, 24)
    return fit(model, classify(model, Blobs(seed)), torch.optim.SGD(model.parameters(), lr=0.05), 25)


# ---------------------------------------------------------------------------------------------------------------- healthy


class Residual(nn.Module):
    """conv, norm, ReLU, conv, norm, scaled by `gain`, dropped with probability `drop` in training."""

    def __init__(self, channels: int, norm: Callable[[int], nn.Module], gain: Tensor | None = None, drop: float = 0.0) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), norm(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), norm(channels)
        self.gain = None if gain is None else nn.Parameter(gain)
        self.drop, self.generator = drop, torch.Generator().manual_seed(5)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.drop and float(torch.rand(1, generator=self.generator)) < self.drop:
            return F.relu_(x.clone())
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        if self.gain is not None:
            out = out * self.gain
        return F.relu(x + out)


class ResNet(nn.Module):
    def __init__(self, blocks: Callable[[int], nn.Module], depth: int = 3, channels: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1)
        self.blocks = nn.ModuleList(blocks(k) for k in range(depth))
        self.fc = nn.Linear(channels * 16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.fc(F.avg_pool2d(x, 2).flatten(1))


@healthy(
    CASES,
    "v_resnet_residual_gammas_start_at_zero",
    source="arXiv:1706.02677 (Goyal et al., section 5.1: gamma of the last BatchNorm of a block starts at 0)",
    proof=loss_ends_below(0.3),
)
def _(seed: int) -> Setup:
    model = ResNet(lambda k: Residual(8, nn.BatchNorm2d))
    for block in model.blocks:
        nn.init.zeros_(block.norm2.weight)
    return fit(model, classify(model, Pictures(seed)), torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), 90)


@healthy(
    CASES,
    "v_resnet_layer_scale_tiny_groupnorm",
    source="arXiv:2103.17239 (Touvron et al., LayerScale: branches start at 1e-5)",
    proof=loss_ends_below(0.3),
)
def _(seed: int) -> Setup:
    model = ResNet(lambda k: Residual(8, lambda c: nn.GroupNorm(2, c), torch.full((8, 1, 1), 1e-5)), 4)
    return fit(model, classify(model, Pictures(seed)), torch.optim.AdamW(model.parameters(), lr=5e-3), 90)


class ReZero(nn.Module):
    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Linear(16, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.alpha = nn.Parameter(torch.zeros(depth))
        self.out = nn.Linear(width, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for alpha, layer in zip(self.alpha, self.layers, strict=True):
            x = x + alpha * F.relu(layer(x))
        return self.out(x)


@healthy(
    CASES,
    "v_twelve_rezero_layers",
    source="arXiv:2003.04887 (Bachlechner et al., ReZero: the weight of every branch starts at 0)",
    proof=loss_ends_below(0.4),
)
def _(seed: int) -> Setup:
    model = ReZero(12, 32)
    return fit(model, classify(model, Blobs(seed, classes=6)), torch.optim.Adam(model.parameters(), lr=3e-3), 100)


@healthy(
    CASES,
    "v_resnet_stochastic_depth",
    source="arXiv:1603.09382 (Huang et al., stochastic depth)",
    proof=loss_ends_below(0.4),
)
def _(seed: int) -> Setup:
    model = ResNet(lambda k: Residual(8, nn.BatchNorm2d, drop=0.15 * (k + 1)))
    return fit(model, classify(model, Pictures(seed)), torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), 110)


@healthy(
    CASES,
    "v_siren_learns_a_picture",
    source="arXiv:2006.09661 (Sitzmann et al., SIREN: sines with omega 30)",
    proof=converges(0.05),
)
def _(seed: int) -> Setup:
    side = torch.linspace(-1, 1, 12)
    x = torch.stack(torch.meshgrid(side, side, indexing="ij"), -1).reshape(-1, 2)
    y = torch.sin(4 * x[:, :1] + seed) * torch.cos(5 * x[:, 1:])
    model = siren(2, 48)
    return fit(model, lambda i: F.mse_loss(model(x), y), torch.optim.Adam(model.parameters(), lr=1e-3), 120)


@healthy(
    CASES,
    "v_raw_pixels_through_batchnorm",
    source="arXiv:1502.03167 (Ioffe, Szegedy: batch normalisation) on bytes, as in https://github.com/kenshohara/3D-ResNets-PyTorch/issues/7",
    proof=loss_ends_below(0.3),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(nn.BatchNorm2d(1), *tower(nn.ReLU, 2), nn.MaxPool2d(2), *head(size=4))
    return fit(model, classify(model, raw_pixels(Pictures(seed))), torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), 90)


class Scaled(nn.Module):
    """Takes bytes, divides them itself."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body((x / 255.0 - 0.43) / 0.2)


@healthy(
    CASES,
    "v_bytes_divided_inside_forward",
    source="https://github.com/ultralytics/yolov5/issues/364 (0-255 in the dataset, normalised in training code)",
    proof=loss_ends_below(0.3),
)
def _(seed: int) -> Setup:
    model = Scaled(nn.Sequential(*tower(nn.ReLU, 2), *head()))
    return fit(model, classify(model, raw_pixels(Pictures(seed))), torch.optim.Adam(model.parameters(), lr=5e-3), 80)


@healthy(
    CASES,
    "v_frozen_backbone_new_head",
    source="https://pytorch.org/tutorials/beginner/transfer_learning_tutorial.html (the network as a fixed feature extractor)",
    proof=loss_ends_below(0.5),
)
def _(seed: int) -> Setup:
    backbone = nn.Sequential(*tower(nn.ReLU, 2), nn.MaxPool2d(2), nn.Flatten())
    first = nn.Sequential(backbone, nn.Linear(128, 8))
    pretrain(first, classify(first, Pictures(seed + 50)), 60)
    backbone.requires_grad_(False)
    model = nn.Sequential(backbone, nn.Linear(128, 8))
    return fit(model, classify(model, Pictures(seed)), torch.optim.SGD(model[1].parameters(), lr=0.05), 80)


def pretrain(model: nn.Module, loss: Callable[[int], Tensor], updates: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for i in range(updates):
        optimizer.zero_grad()
        loss(i).backward()
        optimizer.step()
    optimizer.zero_grad()


@healthy(
    CASES,
    "v_fine_tuning_after_pretraining",
    source="arXiv:1801.06146 (Howard, Ruder: fine-tuning with smaller rates for earlier layers)",
    proof=converges(0.7),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(*tower(nn.SiLU, 2), nn.MaxPool2d(2), *head(size=4))
    pretrain(model, classify(model, Pictures(seed + 50)), 25)
    shift = torch.Generator().manual_seed(seed)
    data = Pictures(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x.flip(2) + 0.3 * torch.randn(x.shape, generator=shift)), (y + 1) % 8)

    groups = [{"params": model[:4].parameters(), "lr": 2e-4}, {"params": model[6].parameters(), "lr": 2e-3}]
    return fit(model, loss, torch.optim.AdamW(groups), 120)


@healthy(
    CASES,
    "v_rare_positives_prior_bias",
    source="arXiv:1708.02002 (Lin et al., section 4.1: the bias of the head starts at the prior of a rare class)",
    proof=converges(0.6),
)
def _(seed: int) -> Setup:
    generator = torch.Generator().manual_seed(seed)
    model = mlp(nn.ReLU, 2, 32, inputs=10, outputs=1)
    nn.init.constant_(model[-1].bias, -math.log(24))

    def loss(i: int) -> Tensor:
        x = torch.randn(256, 10, generator=generator)
        y = (x[:, :1] + 0.5 * x[:, 1:2] > 1.9).float()
        return F.binary_cross_entropy_with_logits(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 120)


def scheduled(
    model: nn.Module, loss: Callable[[int], Tensor], optimizer: torch.optim.Optimizer, rate: Callable[[int], float], updates: int
) -> Setup:
    """`fit` with the rate of update i times `rate(i)`."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    def train() -> Iterator[Event]:
        for i in range(updates):
            optimizer.zero_grad(set_to_none=False)
            value = loss(i)
            value.backward()
            yield "read", [value]
            optimizer.step()
            schedule.step()
            yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "v_warm_up_from_zero_then_cosine",
    source="arXiv:1706.02677 (gradual warm-up) and arXiv:1608.03983 (cosine to 0)",
    proof=loss_ends_below(0.4),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(*tower(nn.GELU, 2), nn.AvgPool2d(2), *head(size=4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def rate(i: int) -> float:
        return i / 20 if i < 20 else 0.5 * (1 + math.cos(math.pi * (i - 20) / 100))

    return scheduled(model, classify(model, Pictures(seed)), optimizer, rate, 120)


@healthy(
    CASES,
    "v_warm_restarts_of_the_rate",
    source="arXiv:1608.03983 (Loshchilov, Hutter: SGDR, warm restarts)",
    proof=loss_ends_below(0.75),
)
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, 2, 48, outputs=6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loss = classify(model, Blobs(seed, classes=6))
    return scheduled(model, loss, optimizer, lambda i: 0.5 * (1 + math.cos(math.pi * (i % 40) / 40)), 160)


@healthy(
    CASES,
    "v_loss_times_thousand_unet",
    source="https://github.com/areiner222/MDLSTM/issues/3 (the loss is multiplied by 1e4)",
    proof=converges(0.3),
)
def _(seed: int) -> Setup:
    data = Smooth(seed)
    model = UNet()

    def loss(i: int) -> Tensor:
        x = data()
        return 1000 * F.mse_loss(model(x + 0.3 * torch.randn(x.shape, generator=data.generator)), x)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=2e-4, momentum=0.9), 100)


@healthy(
    CASES,
    "v_loss_times_ten_thousandth_adam",
    source="arXiv:1412.6980 (Kingma, Ba: the update of Adam does not depend on the scale of the gradient)",
    proof=converges(0.25),
)
def _(seed: int) -> Setup:
    model = mlp(nn.Tanh, 2, 32)
    return fit(model, classify(model, Blobs(seed), scale=1e-4), torch.optim.Adam(model.parameters(), lr=5e-3, eps=1e-12), 90)


@healthy(
    CASES,
    "v_autoencoder_summed_loss",
    source="https://github.com/pytorch/examples/blob/main/vae/main.py (losses summed over pixels and batch)",
    proof=converges(0.4),
)
def _(seed: int) -> Setup:
    data = Smooth(seed, batch=64)
    model = Coder(lambda z: z)

    def loss(i: int) -> Tensor:
        x = data()
        return F.mse_loss(model(x)["picture"], x, reduction="sum")

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 120)


class Averaging(nn.Module):
    """A student and the moving average of it, which is never trained and ends in no optimizer."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student, self.teacher = student, copy.deepcopy(student).requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            target = self.teacher(x)
        return self.student(x), target

    @torch.no_grad()
    def average(self) -> None:
        for t, s in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            t.lerp_(s, 0.05)


@healthy(
    CASES,
    "v_mean_teacher_average_copy",
    source="arXiv:1703.01780 (Tarvainen, Valpola: mean teachers)",
    proof=loss_ends_below(0.6),
)
def _(seed: int) -> Setup:
    data = Blobs(seed)
    model = Averaging(mlp(nn.ReLU, 2, 32))
    optimizer = torch.optim.Adam(model.student.parameters(), lr=5e-3)

    def train() -> Iterator[Event]:
        for _ in range(100):
            optimizer.zero_grad()
            x, y = data()
            out, target = model(x)
            value = F.cross_entropy(out, y) + 0.1 * F.mse_loss(out, target)
            value.backward()
            yield "read", [value]
            optimizer.step()
            model.average()
            yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "v_dropout_half_everywhere",
    source="arXiv:1207.0580 (Hinton et al.: half of the units left out)",
    proof=loss_ends_below(0.6),
)
def _(seed: int) -> Setup:
    layers = [nn.Linear(16, 96), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(96, 96), nn.ReLU(inplace=True), nn.Dropout(0.5)]
    model = nn.Sequential(*layers, nn.Linear(96, 4))
    return fit(model, classify(model, Blobs(seed)), torch.optim.Adam(model.parameters(), lr=3e-3), 120)


@healthy(
    CASES,
    "v_mobile_blocks_relu6_hardswish",
    source="arXiv:1905.02244 (Howard et al., MobileNetV3: depthwise convolutions, ReLU6 and hard swish)",
    proof=loss_ends_below(0.5),
)
def _(seed: int) -> Setup:
    def block(a: int, b: int, act: nn.Module) -> list[nn.Module]:
        return [
            nn.Conv2d(a, a, 3, padding=1, groups=a, bias=False),
            nn.BatchNorm2d(a),
            act,
            nn.Conv2d(a, b, 1, bias=False),
            nn.BatchNorm2d(b),
        ]

    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU6(),
        *block(8, 16, nn.ReLU6()),
        nn.AvgPool2d(2),
        *block(16, 16, nn.Hardswish()),
        *head(16, 4),
    )
    return fit(model, classify(model, Pictures(seed)), torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), 80)


@healthy(
    CASES,
    "v_hardtanh_autoencoder",
    source="arXiv:1602.02830 (Courbariaux et al.: hard tanh as the hidden nonlinearity)",
    proof=converges(0.4),
)
def _(seed: int) -> Setup:
    data = Smooth(seed, batch=32)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.Hardtanh(), nn.Linear(48, 8), nn.Hardtanh(), nn.Linear(8, 64))

    def loss(i: int) -> Tensor:
        x = data()
        return F.mse_loss(model(x), x.flatten(1))

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 150)


@healthy(
    CASES,
    "v_weight_and_spectral_norm",
    source="arXiv:1602.07868 (weight normalisation) and arXiv:1802.05957 (spectral normalisation)",
    proof=loss_ends_below(0.6),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(16, 48)),
        nn.LeakyReLU(0.2),
        parametrizations.spectral_norm(nn.Linear(48, 48)),
        nn.LeakyReLU(0.2),
        nn.Linear(48, 4),
    )
    return fit(model, classify(model, Blobs(seed)), torch.optim.Adam(model.parameters(), lr=5e-3), 100)


@healthy(
    CASES,
    "v_clipping_on_nearly_every_update",
    source="arXiv:1211.5063 (Pascanu et al.: clip the norm of the gradient)",
    proof=converges(0.1),
)
def _(seed: int) -> Setup:
    data = Table(seed, noise=0.02)
    model = mlp(nn.SiLU, 2, 48, inputs=12, outputs=1)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.mse_loss(model(x), 30 + 10 * x[:, :1] + y)

    def between(i: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.02), 200, between=between)


@healthy(
    CASES,
    "v_big_rate_with_momentum_is_fine",
    source="arXiv:1803.09820 (Smith: large rates with cyclical momentum)",
    proof=loss_ends_below(0.5),
)
def _(seed: int) -> Setup:
    model = NormReLU(0.0)
    return fit(
        model, classify(model, Pictures(seed)), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True), 100
    )


@healthy(
    CASES,
    "v_realnvp_likelihood_changes_sign",
    source="arXiv:1605.08803 (Dinh et al., Real NVP)",
    proof=falls_by(3.0),
)
def _(seed: int) -> Setup:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(6, 6, generator=generator) * 0.2
    model = Flow(6, 6, 2.0)
    for c in model.couplings:
        nn.init.zeros_(c.net[2].weight)
        nn.init.zeros_(c.net[2].bias)

    def loss(i: int) -> Tensor:
        z = torch.randn(128, 6, generator=generator)
        return -model(torch.cat([z[:, :3], z[:, 3:] * 0.05 + torch.sin(z[:, :3])], 1) @ (0.3 * torch.eye(6) + 0.1 * mix)).mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 160)


class Planar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.u, self.w, self.b = nn.Parameter(0.01 * torch.randn(2)), nn.Parameter(torch.randn(2)), nn.Parameter(torch.zeros(()))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        wu = self.w @ self.u
        u = self.u + (F.softplus(wu) - 1 - wu) * self.w / (self.w @ self.w)
        h = torch.tanh(z @ self.w + self.b)
        return z + u * h[:, None], torch.log1p((1 - h**2) * (self.w @ u))


class PlanarFlow(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.log_scale, self.shift = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
        self.layers = nn.ModuleList(Planar() for _ in range(depth))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        z, volume = z * self.log_scale.exp() + self.shift, self.log_scale.sum()
        for layer in self.layers:
            z, v = layer(z)
            volume = volume + v
        return z, volume


@healthy(
    CASES,
    "v_planar_flow_free_energy",
    source="arXiv:1505.05770 (Rezende, Mohamed: planar flows, the free energy of a two-dimensional density)",
    proof=falls_by(0.7),
)
def _(seed: int) -> Setup:
    generator = torch.Generator().manual_seed(seed)
    model = PlanarFlow(6)

    def loss(i: int) -> Tensor:
        z, volume = model(torch.randn(128, 2, generator=generator))
        energy = 0.5 * ((z[:, 1] - torch.sin(math.pi * z[:, 0] / 2)) / 0.4) ** 2 + 0.05 * (z[:, 0] - 2) ** 2
        return (energy - volume).mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-2), 150)


@healthy(
    CASES,
    "v_vae_bound_goes_below_zero",
    source="arXiv:1312.6114 (Kingma, Welling: the variational autoencoder)",
    proof=falls_by(30.0),
)
def _(seed: int) -> Setup:
    model = Variational()
    return fit(model, elbo(model, Smooth(seed, batch=32)), torch.optim.Adam(model.parameters(), lr=3e-3), 150)


@healthy(
    CASES,
    "v_regression_on_targets_of_thousands",
    source="https://github.com/rstudio-conf-2020/dl-keras-tf/issues/9 (sale prices as they are, squared error) with a rate that holds",
    proof=converges(1e-3),
)
def _(seed: int) -> Setup:
    data = Table(seed, noise=0.0)
    model = mlp(nn.ReLU, 1, 48, inputs=12, outputs=1)

    def loss(i: int) -> Tensor:
        x, _ = data()
        return F.mse_loss(model(x), 3000 + 100 * x[:, :1])

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=0.3), 300)


@healthy(
    CASES,
    "v_heavy_tails_with_huber",
    source="https://doi.org/10.1214/aoms/1177703732 (Huber 1964: robust estimation) on Student noise with 1.5 degrees of freedom",
    proof=converges(0.6),
)
def _(seed: int) -> Setup:
    data = Table(seed, noise=0.0)
    model = mlp(nn.Tanh, 2, 48, inputs=12, outputs=1)

    def loss(i: int) -> Tensor:
        x, y = data()
        g = data.generator
        tail = torch.randn(y.shape, generator=g) / torch.rand(y.shape, generator=g).clamp(min=1e-3).sqrt()
        return F.huber_loss(model(x), 2 * x[:, :1] + y + 0.2 * tail, delta=0.5)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 150)


class TopK(nn.Module):
    """Keeps the k largest of the units that fire."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        top = torch.relu(x).topk(self.k, dim=-1)
        return torch.zeros_like(x).scatter(-1, top.indices, top.values)


@healthy(
    CASES,
    "v_sparse_autoencoder_most_units_off",
    source="arXiv:1312.5663 (Makhzani, Frey: k-sparse autoencoders)",
    proof=every(converges(0.4), sparsity("2", 0.8)),
)
def _(seed: int) -> Setup:
    data = Smooth(seed, batch=64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), TopK(10), nn.Linear(64, 64))

    def loss(i: int) -> Tensor:
        x = data()
        return F.mse_loss(model(x), x.flatten(1))

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 150)


@healthy(
    CASES,
    "v_sparse_rectifiers_learn",
    source="http://proceedings.mlr.press/v15/glorot11a.html (Glorot et al.: sparse rectifiers, 70 to 85 % zeros)",
    proof=every(loss_ends_below(0.5), sparsity("1", 0.65)),
)
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, 2, 96, outputs=6)
    nn.init.constant_(model[0].bias, -1.3)
    return fit(model, classify(model, Blobs(seed, classes=6, spread=0.8)), torch.optim.Adam(model.parameters(), lr=3e-3), 120)


@healthy(
    CASES,
    "v_overfit_one_batch_to_nothing",
    source="http://karpathy.github.io/2019/04/25/recipe/ (overfit one batch)",
    proof=loss_ends_below(2e-3),
)
def _(seed: int) -> Setup:
    x, y = Pictures(seed)()
    model = nn.Sequential(*tower(nn.ReLU, 2), *head())
    return fit(model, lambda i: F.cross_entropy(model(x), y), torch.optim.Adam(model.parameters(), lr=5e-3), 200)


@healthy(
    CASES,
    "v_denoiser_with_zero_last_convolution",
    source="arXiv:2006.11239 (Ho et al., DDPM: the last convolution of the U-Net starts at zero)",
    proof=converges(0.5),
)
def _(seed: int) -> Setup:
    data = Smooth(seed)
    model = UNet(inputs=2)
    nn.init.zeros_(model.out.weight)
    nn.init.zeros_(model.out.bias)

    def loss(i: int) -> Tensor:
        x = data()
        t = torch.rand(len(x), 1, 1, 1, generator=data.generator)
        noise = torch.randn(x.shape, generator=data.generator)
        return F.mse_loss(model(torch.cat([(1 - t) * x + t * noise, t.expand_as(x)], 1)), noise)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 120)


@healthy(
    CASES,
    "v_sigmoid_net_small_early_gradients",
    source="http://neuralnetworksanddeeplearning.com/chap5.html (early layers of a sigmoid network learn slower) trained by Adam",
    proof=every(gradient_ratio("0.weight", "6.weight", 0.3, 0, 20), loss_ends_below(0.5)),
)
def _(seed: int) -> Setup:
    model = mlp(nn.Sigmoid, 3, 32)
    return fit(model, classify(model, Blobs(seed, spread=0.7)), torch.optim.Adam(model.parameters(), lr=1e-2), 150)


@healthy(
    CASES,
    "v_label_smoothing_has_a_floor",
    source="arXiv:1906.02629 (Mueller et al.: when does label smoothing help)",
    proof=every(converges(0.6), loss_ends_below(1.0)),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(*tower(nn.GELU, 2), nn.MaxPool2d(2), *head(size=4))
    return fit(
        model, classify(model, Pictures(seed), label_smoothing=0.1), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), 120
    )


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleDict({k: mlp(nn.ReLU, 1, 48, inputs=24, outputs=12) for k in ("left", "right")})
        self.log_scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = F.normalize(self.towers["left"](a), dim=1), F.normalize(self.towers["right"](b), dim=1)
        return self.log_scale.exp() * (a @ b.T)


@healthy(
    CASES,
    "v_contrastive_temperature_learned",
    source="arXiv:2103.00020 (Radford et al., CLIP: a learned temperature over normalised codes)",
    proof=converges(0.6),
)
def _(seed: int) -> Setup:
    generator = torch.Generator().manual_seed(seed)
    model = TwoTowers()

    def loss(i: int) -> Tensor:
        x = torch.randn(32, 24, generator=generator)
        a, b = (x + 0.2 * torch.randn(x.shape, generator=generator) for _ in range(2))
        logits, y = model(a, b), torch.arange(32)
        return 0.5 * (F.cross_entropy(logits, y) + F.cross_entropy(logits.T, y))

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 120)


@healthy(
    CASES,
    "v_triplets_until_most_are_satisfied",
    source="arXiv:1503.03832 (Schroff et al., FaceNet: most triplets give no loss later on)",
    proof=converges(0.7),
)
def _(seed: int) -> Setup:
    data = Blobs(seed, features=16, classes=6, batch=48, spread=1.2)
    model = nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 8))

    def loss(i: int) -> Tensor:
        (x, y), (p, yp) = data(), data()
        z, zp = F.normalize(model(x), dim=1), F.normalize(model(p), dim=1)
        d = torch.cdist(z, zp).clamp(min=1e-6)
        same = y[:, None] == yp[None]
        positive = d.masked_fill(~same, 0).sum(1) / same.sum(1).clamp(min=1)
        negative = d.masked_fill(same, 0).sum(1) / (~same).sum(1).clamp(min=1)
        return F.relu(positive - negative + 0.5).mean()

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5), 120)


@healthy(
    CASES,
    "v_embeddings_with_rare_categories",
    source="arXiv:1604.06737 (Guo, Berkhahn: entity embeddings of categorical variables)",
    proof=loss_ends_below(0.5),
)
def _(seed: int) -> Setup:
    data = Blobs(seed)
    model = TableNet(4, nn.Linear(32, 4))

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x, categories_of(y, data.generator)), y)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), 100)


@healthy(
    CASES,
    "v_tiny_policy_head_and_noisy_loss",
    source="arXiv:2006.05990 (Andrychowicz et al.: the last layer of a policy starts a hundred times smaller)",
    proof=loss_ends_below(0.9),
)
def _(seed: int) -> Setup:
    model = mlp(nn.Tanh, 2, 48, outputs=4)
    model[-1].weight.data.mul_(0.01)
    return fit(model, classify(model, Blobs(seed, batch=6, spread=1.2)), torch.optim.Adam(model.parameters(), lr=3e-3), 160)


# ------------------------------------------------------------------------------------------------------- non-finite, more


@sick(
    CASES,
    "v_one_pixel_reads_infinite",
    ("non_finite_input",),
    ("",),
    onset=30,
    source="https://github.com/lucidrains/imagen-pytorch/issues/24 (NaN from images that the loader did not normalise) with one Inf pixel",
    also=NON_FINITE[1:],
    proof=every(first_non_finite(30, "0"), first_non_finite(30)),
)
def _(seed: int) -> Setup:
    data = Pictures(seed)
    model = nn.Sequential(*tower(nn.SiLU, 2), nn.AvgPool2d(2), *head(size=4))

    def loss(i: int) -> Tensor:
        x, y = data()
        if i == 30:
            x[5, 0, 2, 3] = math.inf
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 55)


@sick(
    CASES,
    "v_mean_over_an_empty_mask",
    ("non_finite_loss",),
    onset=35,
    source="https://github.com/pytorch/pytorch/issues/51906 (binary_cross_entropy_with_logits gives NaN for an empty input)",
    also=NON_FINITE[3:],
    proof=every(first_non_finite(35), outputs_finite("", 36)),
)
def _(seed: int) -> Setup:
    data = Smooth(seed)
    model = UNet()

    def loss(i: int) -> Tensor:
        x = data()
        inside = x > (0.3 if i != 35 else 2.0)  # a batch in which no pixel was annotated
        out = model(x + 0.2 * torch.randn(x.shape, generator=data.generator))
        return F.binary_cross_entropy_with_logits(out[inside], (x > 0.6).float()[inside])

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-3), 60)
