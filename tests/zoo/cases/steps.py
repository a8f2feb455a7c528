"""Runs about the training loop and its mechanics: optimizers, schedules, scalers, hooks, hand-written backwards and updates."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, prune
from torch.utils.checkpoint import checkpoint

from tests.zoo.case import Blobs, Case, Event, Pictures, Proof, Setup, Text, classify, evens, fit, healthy, initialise, mlp, sick
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


class Regression:
    """A smooth function of standard normal features, `[batch, 1]` targets of mean 0 and variance 1."""

    def __init__(self, seed: int, features: int = 8, batch: int = 32) -> None:
        self.generator = torch.Generator().manual_seed(4000 + seed)
        self.direction = F.normalize(torch.randn(features, 2, generator=self.generator), dim=0)
        self.batch = batch

    def __call__(self) -> tuple[Tensor, Tensor]:
        x = torch.randn(self.batch, len(self.direction), generator=self.generator)
        a, b = (x @ self.direction).unbind(1)
        y = 0.9 * a + 0.6 * torch.sin(1.5 * b) + 0.1 * torch.randn(self.batch, generator=self.generator)
        return x, y[:, None]


class Block(nn.Module):
    """A pre-norm transformer block of one head."""

    def __init__(self, width: int, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(width), norm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True)[:, 0])
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Gpt(nn.Module):
    """A small causal transformer on the tokens of `Text`."""

    def __init__(
        self, width: int = 32, depth: int = 2, vocabulary: int = 24, length: int = 16, norm: type[nn.Module] = nn.LayerNorm
    ) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        for table in (self.tokens, self.places):
            nn.init.normal_(table.weight, std=0.1)
        self.blocks = nn.ModuleList(Block(width, norm) for _ in range(depth))
        self.norm, self.head = norm(width), nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.places.weight[: x.shape[1]]
        for block in self.blocks:
            h = block(h)
        out: Tensor = self.head(self.norm(h))
        return out


class Reader(nn.Module):
    """A GRU over tokens that says the next one."""

    def __init__(self, vocabulary: int = 24, width: int = 32) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.gru(self.tokens(x))[0])
        return out


def convnet(channels: int = 8, classes: int = 8) -> nn.Sequential:
    """Two convolutions with normalisation and a head: convolutions are at 0 and 4, ReLUs at 2 and 6, the head at 8."""
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.BatchNorm2d(2 * channels), nn.ReLU(), nn.Flatten(),
        nn.Linear(2 * channels * 16, classes),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- owners


class Transfer(nn.Module):
    """A body that some pre-training left good, and a head for another number of classes."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32))
        self.head = nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


@sick(
    CASES,
    "st_head_replaced_after_optimizer",
    ("not_in_optimizer",),
    ("head",),
    source="https://github.com/microsoft/nni/issues/4521 layers replaced after the optimizer was made are not updated",
    # Nobody owns the head, so nobody clears its gradient either: it grows, but no step uses it.
    proof=every(unchanged("head.weight", "head.bias", last=15), lambda p: _moves(p, "body.0.weight")),
)
def _(seed: int) -> Setup:
    data, model = Blobs(seed, classes=6), Transfer(classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.head = nn.Linear(32, 6)
    return fit(model, classify(model, data), optimizer, updates=50)


def _moves(plain: Plain, parameter: str) -> str:
    moved = [s for s in plain.steps[parameter] if s > 0]
    assert len(moved) > 0.9 * len(plain.steps[parameter]), f"{parameter} moves in {len(moved)} updates only"
    return f"{parameter} moves"


class ListedStack(nn.Module):
    """Residual layers that `parameters()` doesn't know, for they are in a list of Python."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = [nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()) for _ in range(depth)]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class ListedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stack, self.head = nn.Linear(16, 32), ListedStack(32, 3), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.stack(self.stem(x)))
        return out


def _listed(plain: Plain) -> str:
    model = plain.setup.model
    assert isinstance(model, ListedNet)
    owned = {id(p) for p in model.parameters()}
    for k, layer in enumerate(model.stack.layers):
        weight = layer[1].weight
        assert isinstance(weight, nn.Parameter)
        assert id(weight) not in owned, f"layer {k} is registered"
        assert weight.grad is not None, f"layer {k} has no gradient"
        assert float(weight.grad.norm()) > 0, f"the gradient of layer {k} is zero"
    return "three layers have gradients and are no parameters of the model"


@sick(
    CASES,
    "st_residual_layers_in_python_list",
    ("not_in_optimizer",),
    ("stack",),
    source="https://pytorch.org/docs/stable/generated/torch.nn.ModuleList.html modules in a plain list are not registered",
    proof=_listed,
)
def _(seed: int) -> Setup:
    data, model = Blobs(seed), ListedNet()
    return fit(model, classify(model, data), torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), updates=40)


# ------------------------------------------------------------------------------------------------------------- stale grads


def _sums(parameter: str) -> Proof:
    """The gradient that a step uses is the sum of all so far: by update 15 it is many times the first."""

    def proof(plain: Plain) -> str:
        norms = plain.grads[parameter]
        grown = max(norms[5:15]) / norms[0]
        assert grown > 3, f"the gradient of {parameter} is {grown:.3g} times the first"
        return f"the gradient of {parameter} piles up to {grown:.3g} times the first"

    return proof


@sick(
    CASES,
    "st_second_optimizer_never_zeroed",
    ("gradients_not_zeroed",),
    ("head",),
    also=("loss_diverging", "loss_spike"),
    source="https://discuss.pytorch.org/t/why-do-we-need-to-set-the-gradients-manually-to-zero-in-pytorch/4903 zero_grad forgotten",
    proof=every(_sums("head.weight"), lambda p: _kept(p)),
)
def _(seed: int) -> Setup:
    data, model = Text(seed), Reader()
    of_body = torch.optim.Adam([*model.tokens.parameters(), *model.gru.parameters()], lr=3e-3)
    of_head = torch.optim.SGD(model.head.parameters(), lr=1.0)
    loss = classify(model, data)

    def train() -> Iterator[Event]:
        for i in range(60):
            of_body.zero_grad()
            value = loss(i)
            value.backward()
            yield "read", [value]
            of_body.step()
            of_head.step()
            yield "step", [of_body, of_head]

    return Setup(model, train)


def _kept(plain: Plain) -> str:
    """SGD's steps of the head are lr times its gradient as it was read, so the sum is what was used."""
    first, later = plain.steps["head.weight"][0], max(plain.steps["head.weight"][5:15])
    assert later > 3 * first, f"the step of the head is {later / first:.3g} times the first"
    return f"and its step to {later / first:.3g} times the first"


@sick(
    CASES,
    "st_step_every_batch_zero_every_fourth",
    ("gradients_not_zeroed",),
    ("",),
    source="https://github.com/ThilinaRajapakse/BERT_binary_text_classification/issues/15 accumulation, the step outside of the if",
    proof=lambda p: _sawtooth(p),
)
def _(seed: int) -> Setup:
    data, model = Pictures(seed), convnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.5)
    loss = classify(model, data)

    def train() -> Iterator[Event]:
        for i in range(40):
            value = loss(i)
            (value / 4).backward()
            yield "read", [value]
            optimizer.step()
            if (i + 1) % 4 == 0:
                optimizer.zero_grad()
            yield "step", [optimizer]

    return Setup(model, train)


def _sawtooth(plain: Plain) -> str:
    norms = plain.grads["8.weight"][:12]
    ratio = median(norms[k + 3] / norms[k] for k in (0, 4, 8))
    assert ratio > 1.5, f"the fourth gradient is {ratio:.3g} times the first of its four"
    assert all(s > 0 for s in plain.steps["8.weight"][:12]), "some batch has no step"
    return f"the fourth gradient is {ratio:.3g} times the first of its four, with a step after each"


# ----------------------------------------------------------------------------------------------------------- without a step


def _never(plain: Plain) -> str:
    assert all(math.isnan(s) for steps in plain.steps.values() for s in steps), "something stepped"
    assert all(w[0] == w[-1] for w in plain.weights.values()), "a weight changed"
    return f"no step in {len(plain.losses)} batches"


@sick(
    CASES,
    "st_accumulation_longer_than_epoch",
    ("never_stepped",),
    also=("loss_plateau",),
    source="https://github.com/huggingface/transformers/issues/2995 fewer batches in an epoch than accumulation steps",
    proof=_never,
)
def _(seed: int) -> Setup:
    data, model = Text(seed), Gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    loss = classify(model, data)
    accumulate, batches = 8, 6

    def train() -> Iterator[Event]:
        for _epoch in range(7):
            for step in range(batches):
                value = loss(step)
                (value / accumulate).backward()
                yield "read", [value]
                if (step + 1) % accumulate == 0:
                    optimizer.step()
                    optimizer.zero_grad()
                    yield "step", [optimizer]

    return Setup(model, train)


@sick(
    CASES,
    "st_rmsnorm_gains_rounded_away_in_bfloat16",
    ("frozen_weights",),
    ("blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "blocks.1.norm2", "norm"),
    source="https://github.com/fla-org/flame/issues/47 RMSNorm parameters stay at 1 and do not update",
    # 1 - 2**-9 rounds to 1 in bfloat16, and Adam's steps are smaller; the matrices, of 0.1, do move.
    proof=every(
        unchanged(
            "blocks.0.norm1.weight", "blocks.0.norm2.weight", "blocks.1.norm1.weight", "blocks.1.norm2.weight", "norm.weight"
        ),
        lambda p: _moves(p, "blocks.0.qkv.weight"),
    ),
)
def _(seed: int) -> Setup:
    data, model = Text(seed), Gpt(norm=nn.RMSNorm).bfloat16()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    return fit(model, classify(model, data), optimizer, updates=50)


@sick(
    CASES,
    "st_layerwise_decay_by_integer_division",
    ("frozen_weights",),
    ("0", "2", "4"),
    source="https://arxiv.org/abs/1801.06146 discriminative learning rates (ULMFiT), the factor computed by //",
    proof=every(unchanged("0.weight", "2.weight", "4.weight", "0.bias"), lambda p: _moves(p, "6.weight")),
)
def _(seed: int) -> Setup:
    data, model = Blobs(seed), mlp(nn.SiLU, 3)
    layers = [m for m in model if isinstance(m, nn.Linear)]
    groups = [{"params": m.parameters(), "lr": 3e-3 * ((k + 1) // len(layers))} for k, m in enumerate(layers)]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, weight_decay=0.01)
    return fit(model, classify(model, data), optimizer, updates=40)


# --------------------------------------------------------------------------------------------------------- a broken backward


class Quantised(nn.Module):
    """Codes of an autoencoder rounded to levels, without the straight-through estimator."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.round(4 * torch.tanh(x)) / 4


class Codes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
        self.quantise = Quantised()
        self.decoder = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.decoder(self.quantise(self.encoder(x)))
        return out


@sick(
    CASES,
    "st_rounding_without_straight_through",
    ("zero_gradient",),
    ("encoder", "quantise"),
    also=("vanishing_gradient", "frozen_weights"),
    source="https://arxiv.org/abs/1308.3432 why rounding needs a straight-through estimator",
    proof=zero_gradient("encoder.0.weight", "encoder.2.weight", "encoder.2.bias"),
)
def _(seed: int) -> Setup:
    data, model = Blobs(seed, spread=0.3), Codes()

    def loss(i: int) -> Tensor:
        x, _ = data()
        return F.mse_loss(model(x), x)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), updates=40)


class Checkpointed(nn.Module):
    """Its lower part is recomputed in the backward; the reentrant kind needs an input that requires grad, and this has none."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(*list(convnet())[:8])
        self.neck = nn.Sequential(nn.Linear(256, 32), nn.ReLU())
        self.head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says it, and people live with it
            x = checkpoint(self.features, x, use_reentrant=True)
        out: Tensor = self.head(self.neck(x))
        return out


@sick(
    CASES,
    "st_reentrant_checkpoint_of_the_input",
    ("missing_gradient",),
    ("features",),
    source="https://github.com/huggingface/transformers/issues/21381 checkpointing without inputs that require grad",
    proof=no_gradient("features.0.weight", "features.0.bias", "features.1.weight", "features.4.weight", "features.5.bias"),
)
def _(seed: int) -> Setup:
    data, model = Pictures(seed), Checkpointed()
    return fit(model, classify(model, data), torch.optim.Adam(model.parameters(), lr=3e-3), updates=40)


class TypedTwice(nn.Module):
    """The second convolution is made and never used: forward() calls the first one twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.conv1, self.norm1 = nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.head = nn.Linear(8 * 64, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv1(x)))
        out: Tensor = self.head(x.flatten(1))
        return out


@sick(
    CASES,
    "st_conv2_never_called",
    ("missing_gradient",),
    ("conv2",),
    source="http://karpathy.github.io/2019/04/25/recipe/ nets fail silently: a layer made and not used",
    proof=every(no_gradient("conv2.weight", "conv2.bias"), lambda p: _moves(p, "conv1.weight")),
)
def _(seed: int) -> Setup:
    data, model = Pictures(seed), TypedTwice()
    return fit(model, classify(model, data), torch.optim.RMSprop(model.parameters(), lr=1e-3), updates=50)


class Averaged(nn.Module):
    """Blocks of a convnet; the gradient between them is "averaged" once more, over all elements of the map."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(1 if k == 0 else 8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU()) for k in range(3)
        )
        self.head = nn.Linear(8 * 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for k, block in enumerate(self.blocks):
            x = block(x)
            if k < 2 and x.requires_grad:
                x.register_hook(lambda grad: grad / grad.numel())
        out: Tensor = self.head(x.mean(2).flatten(1))
        return out


@sick(
    CASES,
    "st_hook_averages_the_gradient_again",
    ("vanishing_gradient",),
    ("blocks.0", "blocks.1"),
    source="https://pytorch.org/docs/stable/generated/torch.Tensor.register_hook.html a hook whose result replaces the gradient",
    proof=every(
        gradient_ratio("blocks.1.0.weight", "blocks.2.0.weight", below=1e-3, last=15),
        gradient_ratio("blocks.0.0.weight", "blocks.2.0.weight", below=1e-6, last=15),
        lambda p: _barely(p, "blocks.1.0.weight", 1e-4),
    ),
)
def _(seed: int) -> Setup:
    data, model = Pictures(seed), Averaged()
    return fit(model, classify(model, data), torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9), updates=60)


def _barely(plain: Plain, parameter: str, below: float) -> str:
    ratio = median(s / w for s, w in zip(plain.steps[parameter][:15], plain.weights[parameter][:15], strict=True))
    assert ratio < below, f"a step changes {ratio:.2g} of {parameter}"
    return f"a step changes {ratio:.2g} of {parameter}"


class _Equalised(torch.autograd.Function):
    """x w' / sqrt(n), by hand; the gradient of x lacks the factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.t() / math.sqrt(w.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (x, w), (grad,) = ctx.saved_tensors, grads
        return grad @ w, grad.t() @ x / math.sqrt(w.shape[1])


class EqualLinear(nn.Module):
    """A linear layer with an equalised learning rate: weights of variance 1, scaled when they are used."""

    def __init__(self, inputs: int, outputs: int, gain: float = 1.0) -> None:
        super().__init__()
        self.weight, self.bias, self.gain = nn.Parameter(torch.randn(outputs, inputs)), nn.Parameter(torch.zeros(outputs)), gain

    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = _Equalised.apply(x, self.weight)
        return self.gain * scaled + self.bias


@sick(
    CASES,
    "st_equalised_linear_wrong_backward",
    ("exploding_gradient",),
    evens(0, 12),
    source="https://arxiv.org/abs/1710.10196 equalised learning rate (Progressive GAN), its backward written by hand",
    proof=every(gradient_ratio("12.weight", "0.weight", below=1e-3, last=15), lambda p: _steadily_larger(p)),
)
def _(seed: int) -> Setup:
    data = Blobs(seed)
    sizes = [16] + [64] * 6
    hidden = [m for a, b in itertools.pairwise(sizes) for m in (EqualLinear(a, b, math.sqrt(2)), nn.ReLU())]
    model = nn.Sequential(*hidden, EqualLinear(64, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    return fit(model, classify(model, data), optimizer, updates=40, between=lambda i: clip(model, 1.0))


def clip(model: nn.Module, limit: float) -> None:
    """Clip the norm of all gradients."""
    clip_grad_norm_(model.parameters(), limit)


def _steadily_larger(plain: Plain) -> str:
    """By about sqrt(64) a layer, among the hidden ones."""
    norms = [median(plain.grads[f"{i}.weight"][:15]) for i in range(2, 12, 2)]
    least = min(a / b for a, b in itertools.pairwise(norms))
    assert least > 3, f"the gradient grows by {least:.3g} from a layer to the one before it"
    return f"from each layer to the one before it by {least:.3g} at least"


@sick(
    CASES,
    "st_initializer_range_of_bert_in_a_plain_net",
    ("vanishing_gradient", "poor_init"),
    tuple(str(i) for i in range(17)),
    also=("update_ratio_too_small", "loss_plateau"),
    source="http://proceedings.mlr.press/v9/glorot10a.html why the scale of the first weights matters",
    proof=every(
        lambda p: _signal_dies(p, "1", "15", 1e-4),
        gradient_ratio("0.weight", "16.bias", below=1e-3, last=15),
        gradient_ratio("8.weight", "16.bias", below=1e-3, last=15),
        gradient_ratio("14.weight", "16.bias", below=1e-2, last=15),
    ),
)
def _(seed: int) -> Setup:
    data, model = Blobs(seed), mlp(nn.Tanh, 8, width=64)
    initialise(model, lambda w: nn.init.normal_(w, std=0.02))
    return fit(model, classify(model, data), torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), updates=50)


def _signal_dies(plain: Plain, first: str, last: str, below: float) -> str:
    a, b = plain.outputs[first][0], plain.outputs[last][0]
    assert a is not None
    assert b is not None
    assert b.rms < below * a.rms, f"at first the output of {last} is {b.rms / a.rms:.2g} of that of {first}"
    return f"at first the output of {last} is {b.rms / a.rms:.2g} of that of {first}"


# ------------------------------------------------------------------------------------------------------ the step and its size


@sick(
    CASES,
    "st_maximize_left_on",
    ("loss_diverging",),
    also=("exploding_gradient", "update_ratio_too_large", "loss_spike", "gradient_spike"),
    source="https://pytorch.org/docs/stable/generated/torch.optim.Adam.html maximize=True, taken over from policy gradient code",
    proof=loss_grows(5, last=13),
)
def _(seed: int) -> Setup:
    data, model = Regression(seed), mlp(nn.SiLU, 2, inputs=8, outputs=1)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.mse_loss(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=0.01, maximize=True), updates=30)


@sick(
    CASES,
    "st_adamw_rate_of_a_third",
    ("update_ratio_too_large",),
    also=("loss_diverging", "loss_spike", "gradient_spike", "exploding_gradient", "saturated_activation", "dead_units"),
    source="https://pytorch.org/docs/stable/generated/torch.optim.AdamW.html lr=3e-1 typed for 3e-4",
    proof=every(update_ratio(above=1.0, last=2), update_ratio(above=0.12, last=10)),
)
def _(seed: int) -> Setup:
    data, model = Text(seed), Gpt()
    return fit(model, classify(model, data), torch.optim.AdamW(model.parameters(), lr=0.3), updates=40)


@sick(
    CASES,
    "st_clipped_before_unscale",
    ("update_ratio_too_small",),
    also=("loss_plateau",),
    source="https://pytorch.org/docs/stable/notes/amp_examples.html#gradient-clipping unscale_ comes before clip_grad_norm_",
    proof=every(update_ratio(below=1e-5, last=15), loss_stays(0.02)),
)
def _(seed: int) -> Setup:
    data, model = Blobs(seed, batch=64), mlp(nn.ReLU, 2, width=64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu")

    def train() -> Iterator[Event]:
        for _i in range(60):
            x, y = data()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                value = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            scaler.scale(value).backward()
            yield "read", [value]
            clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            yield "step", [optimizer]

    return Setup(model, train)


@sick(
    CASES,
    "st_summed_loss_of_raw_prices_in_float16",
    ("loss_scale_collapse",),
    also=("non_finite_gradient", "never_stepped"),
    source="https://github.com/NVIDIA/apex/issues/318 gradient overflow, the loss scale is reduced again and again",
    proof=lambda p: _collapses(p),
)
def _(seed: int) -> Setup:
    data = Regression(seed, batch=64)
    model = mlp(nn.GELU, 2, inputs=8, outputs=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu")

    def train() -> Iterator[Event]:
        for _i in range(40):
            x, y = data()
            prices = 300_000 + 80_000 * y
            with torch.autocast("cpu", dtype=torch.float16):
                value = F.mse_loss(model(x).float(), prices, reduction="sum")
            optimizer.zero_grad()
            scaler.scale(value).backward()
            yield "read", [value]
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            yield "step", [] if scaler.get_scale() < before else [optimizer]

    return Setup(model, train)


def _collapses(plain: Plain) -> str:
    skipped = [math.isnan(plain.steps["0.weight"][i]) for i in range(len(plain.losses))]
    first = skipped.index(False)
    # Each skip halves 65536.
    assert first > 17, f"the first step comes after {first} skips"
    return f"{first} skips in a row: the scale ends at {65536 / 2**first:.2g} before the first step"


# --------------------------------------------------------------------------------------------------------------- NaN and Inf


@sick(
    CASES,
    "st_unit_rows_by_hand_after_pruning",
    ("non_finite_weight",),
    ("2",),
    onset=20,
    also=("non_finite_activation", "non_finite_gradient", "non_finite_loss"),
    source="https://github.com/pytorch/pytorch/issues/2421 a norm of zero: rows divided by their norm, without eps",
    proof=every(lambda p: _bad_weight(p, "2.weight", ("0.weight", "4.weight"), 20), first_non_finite(20, output="2")),
)
def _(seed: int) -> Setup:
    data, model = Blobs(seed), mlp(nn.ReLU, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    weight = model[2].weight
    assert isinstance(weight, nn.Parameter)

    loss = classify(model, data)

    @torch.no_grad()
    def project(i: int) -> None:
        """Every tenth update the rows get length 1; from update 18 on the shortest eight are pruned."""
        if i == 18:
            mask[weight.norm(dim=1).argsort()[:8]] = 0
        weight.mul_(mask)
        if i % 10 == 9:
            weight.div_(weight.norm(dim=1, keepdim=True))

    mask = torch.ones(32, 1)

    def train() -> Iterator[Event]:
        for i in range(40):
            optimizer.zero_grad()
            value = loss(i)
            value.backward()
            yield "read", [value]
            optimizer.step()
            project(i)
            yield "step", [optimizer]

    return Setup(model, train)


def _bad_weight(plain: Plain, bad: str, good: tuple[str, ...], update: int) -> str:
    first = next((i for i, w in enumerate(plain.weights[bad]) if not math.isfinite(w)), None)
    assert first == update, f"{bad} is bad from update {first}, not {update}"
    assert all(math.isfinite(plain.weights[n][update]) for n in good), f"one of {good} is bad as well"
    return f"{bad} is NaN at update {update}, the others are finite"


@sick(
    CASES,
    "st_sqrt_distance_of_equal_pair",
    ("non_finite_gradient",),
    onset=25,
    also=("non_finite_weight", "non_finite_activation", "non_finite_loss"),
    source="https://github.com/huggingface/sentence-transformers/pull/4033 equal embeddings have a NaN gradient in the distance",
    proof=lambda p: _nan_gradient_of_finite_loss(p, 25),
)
def _(seed: int) -> Setup:
    data, model = Blobs(seed, batch=32), mlp(nn.Tanh, 2, outputs=8)

    def loss(i: int) -> Tensor:
        x, y = data()
        a, b = x[:16], x[16:].clone()
        if i == 25:
            b[3] = a[3]  # an example drawn twice
        same = y[:16] == y[16:]
        if i == 25:
            same[3] = True
        distance = (model(a) - model(b)).square().sum(1).sqrt()
        return torch.where(same, distance.square(), F.relu(2.0 - distance).square()).mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-3), updates=40)


def _nan_gradient_of_finite_loss(plain: Plain, update: int) -> str:
    assert math.isfinite(plain.losses[update]), "the loss is bad as well"
    return f"a finite loss of {plain.losses[update]:.3g}; " + first_non_finite(update)(plain)


@sick(
    CASES,
    "st_batch_without_a_label",
    ("non_finite_loss",),
    onset=25,
    also=("non_finite_gradient", "non_finite_weight", "non_finite_activation"),
    source="https://github.com/pytorch/pytorch/issues/75181 cross entropy is NaN when every label is ignored",
    proof=every(first_non_finite(25), lambda p: _nan_loss_alone(p, 25)),
)
def _(seed: int) -> Setup:
    data, model = Text(seed), Gpt()

    def loss(i: int) -> Tensor:
        x, y = data()
        y = y.clone()
        y[:, : y.shape[1] if i == 25 else 4] = -100  # prompts are not trained on, and this batch is nothing but prompts
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=3e-3), updates=40)


def _nan_loss_alone(plain: Plain, update: int) -> str:
    bad = [o for outputs in plain.outputs.values() if (o := outputs[update]) is not None and o.nonfinite]
    assert math.isnan(plain.losses[update]), "the loss is finite"
    assert not bad, "some output is bad as well"
    return "the loss is NaN, every output finite"


# ------------------------------------------------------------------------------------------------------------------- the rest


@sick(
    CASES,
    "st_missing_value_code_in_a_target",
    ("gradient_spike", "loss_spike"),
    onset=30,
    also=("update_ratio_too_large", "exploding_gradient"),
    source="https://en.wikipedia.org/wiki/Sentinel_value -9999 for a missing value gets into one batch",
    proof=every(gradient_spikes(30, 100), lambda p: _one_step(p, 30)),
)
def _(seed: int) -> Setup:
    data, model = Regression(seed), mlp(nn.SiLU, 2, inputs=8, outputs=1)

    def loss(i: int) -> Tensor:
        x, y = data()
        if i == 30:
            y[5] = -9999.0
        return F.mse_loss(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), updates=60)


def _one_step(plain: Plain, update: int) -> str:
    after = max(plain.losses[update + 1 : update + 20]) / median(plain.losses[:10])
    assert after < 10, f"the loss afterwards is {after:.3g} times that of the start"
    return f"and the loss afterwards is {after:.3g} times that of the start at most"


@sick(
    CASES,
    "st_prior_bias_in_the_whole_tower",
    ("dead_units", "poor_init"),
    ("tower",),
    # Behind the tower of zeros even the weight of the head has a gradient of zero: no matrix moves.
    also=("zero_gradient", "vanishing_gradient", "frozen_weights", "update_ratio_too_small"),
    source="https://arxiv.org/abs/1708.02002 focal loss: the prior bias belongs to the last layer alone",
    proof=every(dead_fraction("tower.1", 0.95, last=15), dead_fraction("tower.3", 0.95, last=15)),
)
def _(seed: int) -> Setup:
    data = Pictures(seed)
    model = nn.Sequential()
    model.add_module("stem", nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()))
    tower = [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    model.add_module("tower", nn.Sequential(*tower))
    model.add_module("head", nn.Sequential(nn.Flatten(), nn.Linear(8 * 64, 8)))
    for m in tower:
        if isinstance(m, nn.Conv2d) and m.bias is not None:
            nn.init.constant_(m.bias, -math.log((1 - 0.01) / 0.01))

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.binary_cross_entropy_with_logits(model(x), F.one_hot(y, 8).float(), reduction="sum") / len(x)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9), updates=40)


@sick(
    CASES,
    "st_target_broadcast_against_output",
    ("loss_plateau",),
    source="https://github.com/pytorch/pytorch/issues/16045 the loss of shapes [n, 1] and [n]",
    proof=every(loss_stays(0.05, last=100), lambda p: _only_the_mean(p)),
)
def _(seed: int) -> Setup:
    data, model = Regression(seed, batch=64), mlp(nn.ReLU, 2, inputs=8, outputs=1)

    def loss(i: int) -> Tensor:
        x, y = data()
        prediction: Tensor = model(x)
        return (prediction - y.squeeze(1)).square().mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), updates=160)


def _only_the_mean(plain: Plain) -> str:
    """The targets have variance 1: who learns nothing but their mean has a loss of 1."""
    late = median(plain.losses[60:100])
    assert 0.8 < late < 1.3, f"the loss is {late:.3g}"
    return f"a loss of {late:.3g}, the variance of the targets being about 1"


# -------------------------------------------------------------------------------------------------------------- healthy runs


@healthy(
    CASES,
    "st_warm_restarts_from_zero",
    source="https://arxiv.org/abs/1608.03983 SGDR: cosine restarts, and a warm-up that begins at a rate of 0",
    proof=converges(0.8),
)
def _(seed: int) -> Setup:
    data, model = Text(seed, batch=12), Gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.1)

    def rate(i: int) -> float:
        return i / 10 if i < 10 else 0.5 * (1 + math.cos(math.pi * ((i - 10) % 50) / 50))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    loss = classify(model, data)

    def train() -> Iterator[Event]:
        for i in range(160):
            optimizer.zero_grad()
            value = loss(i)
            value.backward()
            yield "read", [value]
            optimizer.step()
            schedule.step()
            yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "st_clipping_always_acts",
    source="https://arxiv.org/abs/1905.11881 clipped steps: the rate is chosen for gradients of norm 0.05",
    proof=every(converges(0.75), lambda p: _clipped(p, 0.05)),
)
def _(seed: int) -> Setup:
    clean, model = Pictures(seed), convnet()

    def data() -> tuple[Tensor, Tensor]:
        """One label of ten is wrong, so that the gradient never dies away."""
        x, y = clean()
        wrong = torch.rand(len(y), generator=clean.generator) < 0.1
        return x, torch.where(wrong, torch.randint(8, y.shape, generator=clean.generator), y)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)

    return fit(model, classify(model, data), optimizer, updates=120, between=lambda i: clip(model, 0.05))


def _clipped(plain: Plain, limit: float) -> str:
    """Gradients are read before they are clipped."""
    totals = [math.sqrt(sum(g[i] ** 2 for g in plain.grads.values())) for i in range(len(plain.losses))]
    share = sum(t > limit for t in totals) / len(totals)
    assert share > 0.95, f"clipped in {share:.2g} of the updates"
    return f"clipped in {share:.3g} of the updates"


@healthy(
    CASES,
    "st_accumulated_gru",
    source="https://pytorch.org/docs/stable/notes/amp_examples.html#gradient-accumulation four small batches a step",
    proof=converges(0.8),
)
def _(seed: int) -> Setup:
    data, model = Text(seed, batch=4), Reader()
    optimizer = torch.optim.NAdam(model.parameters(), lr=1e-2)
    loss = classify(model, data, scale=1 / 4)

    def train() -> Iterator[Event]:
        for i in range(100):
            optimizer.zero_grad()
            values = []
            for _k in range(4):
                values.append(loss(i))
                values[-1].backward()
            yield "read", values
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


class TwoTasks(nn.Module):
    """One body; one head says the class, the other the position along a direction."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.heads = nn.ModuleDict({"name": nn.Linear(32, 4), "place": nn.Linear(32, 1)})

    def forward(self, x: Tensor, task: str) -> Tensor:
        out: Tensor = self.heads[task](self.body(x))
        return out


@healthy(
    CASES,
    "st_alternating_tasks",
    source="https://arxiv.org/abs/1706.05098 multi-task learning, a batch of one task at a time",
    proof=converges(0.5),
)
def _(seed: int) -> Setup:
    data, model = Blobs(seed), TwoTasks()

    def loss(i: int) -> Tensor:
        x, y = data()
        if i % 3 < 2:
            return F.cross_entropy(model(x, "name"), y)
        return F.smooth_l1_loss(model(x, "place")[:, 0], x[:, 0] + 0.5 * x[:, 1])

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), updates=180)


@healthy(
    CASES,
    "st_pruned_and_tuned_on",
    source="https://pytorch.org/tutorials/intermediate/pruning_tutorial.html magnitude pruning, then training goes on",
    proof=converges(0.75),
)
def _(seed: int) -> Setup:
    data, model = Blobs(seed, spread=1.2), mlp(nn.ReLU, 2, width=64)
    loss = classify(model, data)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for i in range(25):
        optimizer.zero_grad()
        loss(i).backward()
        optimizer.step()
    for m in (model[0], model[2]):
        prune.l1_unstructured(m, "weight", amount=0.8)
    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), updates=150)


class _Round(torch.autograd.Function):
    """Rounding whose gradient goes straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class QuantLinear(nn.Linear):
    """A linear layer with weights of 4 bits."""

    def forward(self, input: Tensor) -> Tensor:
        step = self.weight.detach().abs().amax(1, keepdim=True) / 7
        quantised: Tensor = _Round.apply(self.weight / step)
        return F.linear(input, quantised * step, self.bias)


@healthy(
    CASES,
    "st_quantisation_aware_in_bfloat16",
    source="https://arxiv.org/abs/1712.05877 quantisation-aware training, here of 4 bits and under autocast",
    proof=converges(0.4),
)
def _(seed: int) -> Setup:
    data = Blobs(seed)
    model = nn.Sequential(QuantLinear(16, 64), nn.Hardtanh(-2, 2), QuantLinear(64, 64), nn.Hardtanh(-2, 2), QuantLinear(64, 4))

    def loss(i: int) -> Tensor:
        x, y = data()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(x)
        return F.cross_entropy(out.float(), y)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=2e-3), updates=150)


@healthy(
    CASES,
    "st_sharpness_aware",
    source="https://arxiv.org/abs/2010.01412 SAM: two backward passes a step, the second at moved weights",
    proof=converges(0.4),
)
def _(seed: int) -> Setup:
    data, model = Pictures(seed), convnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def train() -> Iterator[Event]:
        for _i in range(80):
            x, y = data()
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            moves: list[tuple[nn.Parameter, Tensor]] = []
            with torch.no_grad():
                grads = [(p, p.grad) for p in model.parameters() if p.grad is not None]
                norm = torch.stack([g.norm() for _, g in grads]).norm()
                for p, g in grads:
                    moves.append((p, g * (0.05 / (norm + 1e-12))))
                    p.add_(moves[-1][1])
            optimizer.zero_grad()
            value = F.cross_entropy(model(x), y)
            value.backward()
            with torch.no_grad():
                for p, move in moves:
                    p.sub_(move)
            yield "read", [value]
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


class Lion(torch.optim.Optimizer):
    """Steps by the sign of an interpolated momentum, with a decoupled weight decay."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(torch.sign(b1 * average + (1 - b1) * p.grad), alpha=-group["lr"])
                average.lerp_(p.grad, 1 - b2)


@healthy(
    CASES,
    "st_lion_with_huge_weight_decay",
    source="https://arxiv.org/abs/2302.06675 Lion: a small rate with a weight decay of 3",
    proof=converges(0.8),
)
def _(seed: int) -> Setup:
    data, model = Text(seed, batch=12), Gpt()
    optimizer = Lion(model.parameters(), lr=1e-3, weight_decay=3.0)
    return fit(model, classify(model, data), optimizer, updates=160)


@healthy(
    CASES,
    "st_lbfgs_on_one_batch",
    source="https://pytorch.org/docs/stable/generated/torch.optim.LBFGS.html with a line search, on all the data",
    proof=converges(0.5),
)
def _(seed: int) -> Setup:
    (x, y), model = Regression(seed, batch=200)(), mlp(nn.Tanh, 1, width=20, inputs=8, outputs=1)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1.0, max_iter=4, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = F.mse_loss(model(x), y)
        value.backward()
        return value

    def train() -> Iterator[Event]:
        for _i in range(30):
            value = optimizer.step(closure)  # type: ignore[no-untyped-call]
            yield "read", [value]
            yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "st_weight_averaging_of_cycles",
    source="https://arxiv.org/abs/1803.05407 SWA: the weights at the end of each cycle of the rate are averaged",
    proof=converges(0.3),
)
def _(seed: int) -> Setup:
    data, model = Pictures(seed), convnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True, weight_decay=5e-4)
    average = torch.optim.swa_utils.AveragedModel(model)
    loss = classify(model, data)

    def train() -> Iterator[Event]:
        for i in range(120):
            optimizer.param_groups[0]["lr"] = 0.02 - 0.019 * (i % 15) / 14
            optimizer.zero_grad()
            value = loss(i)
            value.backward()
            yield "read", [value]
            optimizer.step()
            if i % 15 == 14 and i > 40:
                average.update_parameters(model)
            yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "st_layers_trained_in_turns",
    source="https://arxiv.org/abs/1801.06146 gradual unfreezing (ULMFiT), here in turns of seven updates",
    proof=converges(0.5),
)
def _(seed: int) -> Setup:
    data, model = Blobs(seed), mlp(nn.GELU, 3)
    layers = [m for m in model if isinstance(m, nn.Linear)]

    def turn(i: int) -> None:
        for k, layer in enumerate(reversed(layers)):
            layer.requires_grad_(k == i // 7 % len(layers))

    return fit(model, classify(model, data), torch.optim.Adam(model.parameters(), lr=5e-3), updates=170, before=turn)


@healthy(
    CASES,
    "st_loss_scale_search_in_float16",
    source="https://pytorch.org/docs/stable/amp.html#gradient-scaling the scale grows until it overflows, and a step is skipped",
    proof=every(converges(0.4), lambda p: _few_skips(p)),
)
def _(seed: int) -> Setup:
    data, model = Blobs(seed), mlp(nn.ReLU, 2, width=64)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=12)

    def train() -> Iterator[Event]:
        for _i in range(150):
            x, y = data()
            with torch.autocast("cpu", dtype=torch.float16):
                value = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            scaler.scale(value).backward()
            yield "read", [value]
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            yield "step", [] if scaler.get_scale() < before else [optimizer]

    return Setup(model, train)


def _few_skips(plain: Plain) -> str:
    skipped = [math.isnan(s) for s in plain.steps["0.weight"]]
    row = max(len(run) for run in "".join("x" if s else " " for s in skipped).split(" "))
    assert 2 < sum(skipped) < 0.2 * len(skipped), f"{sum(skipped)} skips"
    assert row < 6, f"{row} skips in a row"
    return f"{sum(skipped)} skips of {len(skipped)}, {row} in a row at most"


@healthy(
    CASES,
    "st_loss_of_a_billionth",
    source="https://arxiv.org/abs/2201.05989 Adam with eps 1e-15, as for instant neural graphics primitives, and a tiny loss",
    proof=converges(0.3),
)
def _(seed: int) -> Setup:
    data, model = Regression(seed), mlp(nn.ReLU, 3, width=48, inputs=8, outputs=1)

    def loss(i: int) -> Tensor:
        x, y = data()
        return 1e-9 * F.huber_loss(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3, eps=1e-15), updates=150)


@healthy(
    CASES,
    "st_deep_plain_tanh_orthogonal",
    source="https://arxiv.org/abs/1312.6120 orthogonal first weights carry signals through a deep net without shortcuts",
    proof=converges(0.5),
)
def _(seed: int) -> Setup:
    data, model = Blobs(seed), mlp(nn.Tanh, 20, width=32)
    initialise(model, lambda w: nn.init.orthogonal_(w, gain=1.1))
    return fit(model, classify(model, data), torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), updates=150)


@healthy(
    CASES,
    "st_rate_range_test",
    source="https://arxiv.org/abs/1506.01186 the rate grows from 1e-5 to 0.01 within one run, and the test ends before it is too large",
    proof=converges(0.7),
)
def _(seed: int) -> Setup:
    data, model = Blobs(seed), mlp(nn.LeakyReLU, 2, width=48)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)

    def rate(i: int) -> None:
        optimizer.param_groups[0]["lr"] = 1e-5 * 1e3 ** (i / 119)

    return fit(model, classify(model, data), optimizer, updates=120, before=rate)
