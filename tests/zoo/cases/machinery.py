"""Faults and features of the training loop and of autograd plumbing, over many kinds of small networks.

Mixed precision, accumulation, checkpointing, custom functions, several optimizers, schedules, freezing, hand-made updates.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.zoo.case import Blobs, Case, Event, Pictures, Proof, Setup, Text, classify, fit, healthy, initialise, mlp, sick
from tests.zoo.plain import Plain
from tests.zoo.proofs import (
    converges,
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

NOTES: WeakKeyDictionary[nn.Module, dict[str, list[float]]] = WeakKeyDictionary()
"""What a loop measures of itself for its proof, by model: for example what was left in the gradients before a backward pass."""

NON_FINITE = ("non_finite_input", "non_finite_activation", "non_finite_gradient", "non_finite_loss", "non_finite_weight")


def note(model: nn.Module, name: str, value: float) -> None:
    """Keep a number of this update for the proof."""
    NOTES.setdefault(model, {}).setdefault(name, []).append(value)


def notes(plain: Plain, name: str) -> list[float]:
    """What the loop noted under a name."""
    model = plain.setup.model
    assert isinstance(model, nn.Module)
    return NOTES[model][name]


def norm_of(module: nn.Module) -> float:
    """2-norm of what lies in the gradients of a module; 0 where there is nothing."""
    return math.sqrt(sum(float(p.grad.double().square().sum()) for p in module.parameters() if p.grad is not None))


def falls(to: float, first: int = 0, last: int | None = None) -> Proof:
    """The mean loss of the last five updates of a stretch is below `to` times that of its first five: the rest of the run learns."""

    def proof(plain: Plain) -> str:
        losses = plain.losses[first:last]
        a, b = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
        assert b < to * a, f"the loss goes from {a:.4g} to {b:.4g}, not below {to:g} of it"
        return f"the loss falls from {a:.4g} to {b:.4g}"

    return proof


# Sick runs


class Checkpointed(nn.Module):
    """A convolutional network whose stem is checkpointed in the old, reentrant way, straight on the pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.GELU())
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.GroupNorm(4, 16), nn.GELU())
        self.head = nn.Linear(16 * 4 * 4, 8)

    def forward(self, x: Tensor) -> Tensor:
        # The pictures need no gradient, so neither does what the reentrant checkpoint returns.
        x = checkpoint(self.stem, x, use_reentrant=True)
        x = checkpoint(self.body, x, use_reentrant=False)
        out: Tensor = self.head(x.flatten(1))
        return out


@sick(
    CASES,
    "hm_reentrant_checkpoint_of_the_stem",
    ("missing_gradient",),
    ("stem",),
    source="https://docs.pytorch.org/docs/stable/checkpoint.html reentrant: an input must require grad, else the gradients are None",
    proof=every(no_gradient("stem.0.weight", "stem.0.bias", "stem.1.weight"), falls(0.7)),
)
def _(seed: int) -> Setup:
    model = Checkpointed()
    return fit(model, classify(model, Pictures(seed)), torch.optim.AdamW(model.parameters(), lr=2e-3), updates=50)


class Rounded(nn.Module):
    """Fake quantisation to steps of 1/4, without a straight-through gradient."""

    on = False

    def forward(self, x: Tensor) -> Tensor:
        return torch.round(x * 4) / 4 if self.on else x


@sick(
    CASES,
    "hm_quantised_from_update_25_without_straight_through",
    ("zero_gradient",),
    ("encoder",),
    onset=25,
    also=("vanishing_gradient",),
    source="https://arxiv.org/abs/1308.3432 Bengio et al., the derivative of rounding is 0: straight-through estimators",
    proof=every(
        zero_gradient("encoder.0.weight", "encoder.0.bias", "encoder.2.weight", "encoder.2.bias", first=25),
        lambda plain: _positive(plain, "encoder.0.weight", 0, 25),
        lambda plain: _positive(plain, "head.weight", 0, 60),
        falls(0.8, last=25),
    ),
)
def _(seed: int) -> Setup:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(16, 48), nn.SiLU(), nn.Linear(48, 24))
            self.quant = Rounded()
            self.head = nn.Linear(24, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.quant(self.encoder(x)))
            return out

    model = Model()

    def before(i: int) -> None:
        model.quant.on = i >= 25

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.8)
    return fit(model, classify(model, Blobs(seed, batch=48, spread=2.0)), optimizer, updates=60, before=before)


def _positive(plain: Plain, name: str, first: int, last: int) -> str:
    low = min(plain.grads[name][first:last])
    assert low > 0, f"{name} has the gradient {low}"
    return f"{name} has a gradient other than zero in updates {first} to {last - 1}"


class Recurrent(nn.Module):
    """A GRU over tokens and a head for the next one."""

    def __init__(self, vocabulary: int = 24, width: int = 32) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"embed": nn.Embedding(vocabulary, width), "rnn": nn.GRU(width, width, batch_first=True)})
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder["rnn"](self.encoder["embed"](x))[0])
        return out


def _leftovers(plain: Plain) -> str:
    left = notes(plain, "left")
    assert all(x == 0 for x in left[:21]), "something is left before update 21"
    assert all(x > 0 for x in left[21:]), "nothing is left after update 20"
    growth = plain.grads["head.weight"][34] / plain.grads["head.weight"][20]
    grown = plain.grads["encoder.rnn.weight_hh_l0"][34] / plain.grads["encoder.rnn.weight_hh_l0"][20]
    assert grown > 4, f"the gradient of the GRU grows to {grown:.3g} only"
    return f"gradients of 20 on are left in the encoder; its gradient grows to {grown:.3g} times by update 34, the head's to {growth:.3g}"


@sick(
    CASES,
    "hm_second_optimizer_never_cleared",
    ("gradients_not_zeroed",),
    ("encoder",),
    onset=21,
    also=("exploding_gradient",),  # what lies in .grad grows without bound
    source="https://docs.pytorch.org/docs/stable/generated/torch.optim.Optimizer.zero_grad.html gradients add up until they are cleared",
    proof=_leftovers,
)
def _(seed: int) -> Setup:
    # The encoder is unfrozen at update 20 with an optimizer of its own, which is stepped and never cleared.
    model = Recurrent()
    model.encoder.requires_grad_(False)
    loss = classify(model, Text(seed))

    def train() -> Iterator[Event]:
        optimizers: list[torch.optim.Optimizer] = [torch.optim.Adam(model.head.parameters(), lr=5e-3)]
        for i in range(60):
            if i == 20:
                model.encoder.requires_grad_(True)
                optimizers.append(torch.optim.Adam(model.encoder.parameters(), lr=1e-3))
            optimizers[0].zero_grad()
            note(model, "left", norm_of(model.encoder))
            value = loss(i)
            value.backward()
            yield "read", [value]
            for optimizer in optimizers:
                optimizer.step()
            yield "step", optimizers

    return Setup(model, train)


def _embedding_stays(plain: Plain) -> str:
    name = "embed.weight"
    assert all(g > 0 for g in plain.grads[name]), "the embedding has no gradient"
    assert all(s == 0.0 for s in plain.steps[name]), "the embedding moves"
    for other in ("mix.0.weight", "mix.2.weight", "out.weight"):
        assert all(s > 0 for s in plain.steps[other]), f"{other} doesn't move"
    return "the embedding has gradients and no step changes it; all others move"


class Bag(nn.Module):
    """Mean of word vectors, two layers, classes."""

    def __init__(self, words: int = 60, width: int = 24) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.mix = nn.Sequential(nn.Linear(width, 48), nn.GELU(), nn.Linear(48, 48), nn.GELU())
        self.out = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.mix(math.sqrt(12) * self.embed(x).mean(1)))
        return out


class Words:
    """Bags of 12 words; each class favours words of its own."""

    def __init__(self, seed: int, words: int = 60, classes: int = 5, batch: int = 24, length: int = 12) -> None:
        self.generator = torch.Generator().manual_seed(4000 + seed)
        self.table = torch.softmax(1.5 * torch.randn(classes, words, generator=self.generator), -1)
        self.batch, self.length = batch, length

    def __call__(self) -> tuple[Tensor, Tensor]:
        y = torch.randint(len(self.table), (self.batch,), generator=self.generator)
        return torch.multinomial(self.table[y], self.length, replacement=True, generator=self.generator), y


@sick(
    CASES,
    "hm_pretrained_vectors_put_in_after_the_optimizer",
    ("not_in_optimizer",),
    ("embed",),
    source="https://docs.pytorch.org/docs/stable/optim.html an optimizer holds the Parameter objects it was given; replaced ones are new",
    proof=every(_embedding_stays, falls(0.8)),
)
def _(seed: int) -> Setup:
    model = Bag()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    vectors = torch.randn(60, 24, generator=torch.Generator().manual_seed(seed))
    model.embed.weight = nn.Parameter(vectors)  # the optimizer still holds the parameter that this replaces
    return fit(model, classify(model, Words(seed)), optimizer, updates=60)


def _never(plain: Plain) -> str:
    for name, weights in plain.weights.items():
        assert len(set(weights)) == 1, f"{name} changes"
        assert all(g > 0 for g in plain.grads[name]), f"{name} has no gradient"
    return "no weight changes in any update, though all have gradients"


@sick(
    CASES,
    "hm_scaler_step_lost_beside_unscale_and_clip",
    ("never_stepped",),
    also=("loss_plateau",),
    source="https://docs.pytorch.org/docs/stable/notes/amp_examples.html unscale_, clip, scaler.step, scaler.update: the step is missing",
    proof=every(_never, loss_stays(0.05)),
)
def _(seed: int) -> Setup:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 8)
    )
    data, optimizer = Pictures(seed, batch=24), torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def train() -> Iterator[Event]:
        for _ in range(40):
            x, y = data()
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                value = F.cross_entropy(model(x), y)
            scaler.scale(value).backward()
            yield "read", [value]
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.update()
            yield "step", []

    return Setup(model, train)


@sick(
    CASES,
    "hm_schedule_of_epochs_stepped_every_batch",
    ("frozen_weights",),
    ("0", "2", "4", "6"),
    onset=20,
    also=("update_ratio_too_small", "loss_plateau"),
    source="https://docs.pytorch.org/docs/stable/generated/torch.optim.lr_scheduler.PolynomialLR.html the lr is 0 after total_iters steps",
    proof=every(
        unchanged("0.weight", "0.bias", "2.weight", "4.weight", "6.weight", "6.bias", first=20),
        lambda plain: _moves(plain, 0, 20),
        loss_stays(0.1, first=20),
        falls(0.9, last=20),
    ),
)
def _(seed: int) -> Setup:
    model = mlp(nn.GELU, 3, width=40, inputs=20, outputs=6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=20)  # meant: 20 epochs
    loss = classify(model, Blobs(seed, features=20, classes=6, batch=40))

    def train() -> Iterator[Event]:
        for i in range(60):
            optimizer.zero_grad()
            value = loss(i)
            value.backward()
            yield "read", [value]
            optimizer.step()
            scheduler.step()
            yield "step", [optimizer]

    return Setup(model, train)


def _moves(plain: Plain, first: int, last: int) -> str:
    for name, steps in plain.steps.items():
        assert all(s > 0 for s in steps[first:last]), f"{name} doesn't move in updates {first} to {last - 1}"
    return f"every parameter moves in updates {first} to {last - 1}"


class Siamese(nn.Module):
    """A net that embeds vectors; its distances are compared."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 48), nn.LayerNorm(48), nn.ReLU(), nn.Linear(48, 16))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        d = self.net(a) - self.net(b)
        out: Tensor = d.float().square().sum(-1).sqrt()  # no eps: the derivative at 0 is infinite
        return out


def _collapses(plain: Plain) -> str:
    scales = notes(plain, "scale")
    assert all(b == a / 2 for a, b in itertools.pairwise(scales[:16])), "a step was taken"
    assert scales[-1] < 1, f"the scale ends at {scales[-1]}"
    assert all(math.isfinite(x) for x in plain.losses), "a loss is not finite"
    assert all(n > 0 for n in plain.nonfinite["net.0.weight"][:15]), "a gradient is finite"
    return f"every one of the first 15 updates is skipped for non-finite gradients; the scale falls from {scales[0]:g} to {scales[-1]:g}"


@sick(
    CASES,
    "hm_scale_halved_by_distances_of_equal_pairs",
    ("loss_scale_collapse",),
    also=("non_finite_gradient", "never_stepped", "loss_plateau"),
    source="https://github.com/kornia/kornia/issues/3275 SqrtBackward gives NaN at 0 without a floor; a GradScaler skips each such step",
    proof=_collapses,
)
def _(seed: int) -> Setup:
    model, data = Siamese(), Blobs(seed, batch=64)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)

    def train() -> Iterator[Event]:
        for _ in range(40):
            x, y = data()
            order = torch.randperm(len(x), generator=data.generator)
            order[0] = 0  # pairs are drawn with replacement: some are of an item with itself
            same = (y == y[order]).float()
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                d = model(x, x[order])
            value = (same * d**2 + (1 - same) * F.relu(2 - d) ** 2).mean()
            scaler.scale(value).backward()
            note(model, "scale", scaler.get_scale())
            yield "read", [value]
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            yield "step", [optimizer] if scaler.get_scale() >= before else []

    return Setup(model, train)


class Sensors:
    """Windows of four channels; the class is the frequency. From `broken` on one window holds a channel that is constant."""

    def __init__(self, seed: int, broken: int, batch: int = 24, length: int = 32) -> None:
        self.generator = torch.Generator().manual_seed(5000 + seed)
        self.broken, self.batch, self.length = broken, batch, length

    def __call__(self, i: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(4, (self.batch,), generator=self.generator)
        t = torch.arange(self.length)
        phase = 6.28 * torch.rand(self.batch, 4, 1, generator=self.generator)
        x = torch.sin(0.35 * (y[:, None, None] + 1) * t + phase)
        x = 20 + 3 * (x + 0.3 * torch.randn(x.shape, generator=self.generator))
        if i >= self.broken:
            x[i % self.batch, 2] = 20.0
        # Every channel of a window is standardised, without an eps: 0 / 0 for a dead sensor.
        return (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True), y


@sick(
    CASES,
    "hm_window_of_a_dead_sensor_standardised",
    ("non_finite_input",),
    ("",),
    onset=20,
    also=NON_FINITE,
    source="https://github.com/yxlu-0102/MP-SENet/issues/33 a silent recording is divided by its own size: 0 / 0 in the input",
    proof=every(first_non_finite(20), first_non_finite(20, "0"), lambda plain: _bad_inputs(plain, 20), falls(0.85, last=20)),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(
        nn.Conv1d(4, 24, 7, padding=3),
        nn.ReLU(),
        nn.Conv1d(24, 24, 5, padding=2),
        nn.ReLU(),
        nn.AdaptiveMaxPool1d(4),
        nn.Flatten(),
        nn.Linear(96, 4),
    )
    data = Sensors(seed, broken=20)

    def loss(i: int) -> Tensor:
        x, y = data(i)
        note(model, "bad", float((~torch.isfinite(x)).sum()))
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=5e-3), updates=50)


def _bad_inputs(plain: Plain, update: int) -> str:
    bad = notes(plain, "bad")
    assert bad.index(next(b for b in bad if b)) == update, "the first bad input is at another update"
    return f"the input of update {update} holds {bad[update]:g} NaN, none before"


def _weights_go_bad(plain: Plain) -> str:
    assert math.isfinite(plain.losses[0]), "the first loss is not finite"
    for name, weights in plain.weights.items():
        assert math.isfinite(weights[0]), f"{name} is bad before the first step"
        assert plain.nonfinite[name][0] == 0, f"{name} has a bad gradient in the first update"
        assert not math.isfinite(weights[1]) or name.endswith("bias"), f"{name} is finite after the first step"
    return "the first loss and all its gradients are finite, after the first step every matrix holds NaN or Inf"


@sick(
    CASES,
    "hm_adam_on_half_weights_with_its_usual_eps",
    ("non_finite_weight",),
    ("0", "2", "4"),
    also=NON_FINITE,
    source="https://discuss.pytorch.org/t/adam-half-precision-nans/1765 eps=1e-8 is 0 in float16, and the squares underflow",
    proof=_weights_go_bad,
)
def _(seed: int) -> Setup:
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 8)).half()
    data = Pictures(seed, batch=32)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x.flatten(1).half()).float(), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-3), updates=30)


class Log(nn.Module):
    """The logarithm, as it is: no floor."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.log(x)


class Frontend(nn.Module):
    """Frames of a waveform, their power spectrum, its logarithm, standardised by clip."""

    basis: Tensor

    def __init__(self, frame: int = 16) -> None:
        super().__init__()
        k = torch.arange(1, frame // 2 + 1)[:, None] * torch.arange(frame) * (2 * math.pi / frame)
        self.register_buffer("basis", torch.cat([torch.cos(k), torch.sin(k)]).T / frame**0.5)
        self.log = Log()

    def forward(self, x: Tensor) -> Tensor:
        f = x.unflatten(-1, (-1, 16)) @ self.basis
        real, imaginary = f.chunk(2, -1)
        s = self.log(real**2 + imaginary**2).transpose(1, 2)
        out: Tensor = (s - s.mean((1, 2), keepdim=True)) / s.std((1, 2), keepdim=True)
        return out


@sick(
    CASES,
    "hm_logarithm_of_digital_silence",
    ("non_finite_activation",),
    ("frontend",),
    onset=30,
    also=NON_FINITE,
    source="https://github.com/kitzeslab/opensoundscape/issues/794 the spectrogram in decibels is -inf where the power is 0",
    proof=every(
        first_non_finite(30, "frontend.log"),
        first_non_finite(30),
        lambda plain: _good_inputs(plain),
        falls(0.7, last=30),
    ),
)
def _(seed: int) -> Setup:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frontend = Frontend()
            self.conv = nn.Sequential(nn.Conv1d(8, 24, 3, padding=1), nn.ReLU(), nn.Conv1d(24, 24, 3, padding=1), nn.ReLU())
            self.head = nn.Linear(24, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.conv(self.frontend(x)).mean(-1))
            return out

    model, g = Model(), torch.Generator().manual_seed(6000 + seed)

    def loss(i: int) -> Tensor:
        y = torch.randint(4, (24,), generator=g)
        t = torch.arange(128)
        x = torch.sin((0.4 + 0.5 * y[:, None]) * t + 6.28 * torch.rand(24, 1, generator=g)) + 1.2 * torch.randn(
            24, 128, generator=g
        )
        if i >= 30:
            x[i % 24, 64:] = 0.0  # a clip that is padded with zeros
        note(model, "bad", float((~torch.isfinite(x)).sum()))
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.RMSprop(model.parameters(), lr=2e-3), updates=55)


def _good_inputs(plain: Plain) -> str:
    assert not any(notes(plain, "bad")), "an input is not finite"
    return "every input is finite"


@sick(
    CASES,
    "hm_where_over_root_of_the_diagonal",
    ("non_finite_gradient",),
    ("encoder",),
    onset=15,
    also=NON_FINITE,
    source="https://github.com/pytorch/pytorch/issues/187297 torch.where: NaN from the branch that isn't taken, a square root",
    proof=every(first_non_finite(15), lambda plain: _only_encoder_bad(plain, 15), falls(0.9, last=15)),
)
def _(seed: int) -> Setup:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(16, 40), nn.Tanh(), nn.Linear(40, 12))
            self.head = nn.Sequential(nn.Tanh(), nn.Linear(12, 4))

    model, data = Model(), Blobs(seed, batch=20)

    def loss(i: int) -> Tensor:
        x, y = data()
        z = model.encoder(x)
        total = F.cross_entropy(model.head(z), y)
        if i >= 15:  # the metric loss begins after a warm-up
            squares = (z[:, None] - z[None]).square().sum(-1)
            distances = torch.where(squares > 0, squares.sqrt(), torch.zeros_like(squares))
            same = y[:, None] == y[None]
            total = total + 0.1 * torch.where(same, distances, F.relu(2 - distances)).mean()
        return total

    optimizer = torch.optim.SGD(
        [{"params": model.encoder.parameters(), "lr": 0.05}, {"params": model.head.parameters(), "lr": 0.1}], momentum=0.9
    )
    return fit(model, loss, optimizer, updates=40)


def _only_encoder_bad(plain: Plain, update: int) -> str:
    assert math.isfinite(plain.losses[update]), "the loss is not finite"
    for name, counts in plain.nonfinite.items():
        assert (counts[update] > 0) == name.startswith("encoder"), f"{name} has {counts[update]} bad elements"
    for name in ("encoder.0", "encoder.2", "head.1"):
        seen = plain.outputs[name][update]
        assert seen is not None, f"{name} isn't called"
        assert seen.nonfinite == 0, f"{name} gives NaN"
    return f"at update {update} loss and activations are finite, the gradients of the encoder are not, those of the head are"


class Residual(nn.Module):
    """Two residual blocks over tabular data, a number and a class as outputs."""

    def __init__(self, inputs: int = 12, width: int = 40) -> None:
        super().__init__()
        self.embed = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)) for _ in range(2)
        )
        self.number, self.kind = nn.Linear(width, 1), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.number(x)[:, 0], self.kind(x)


class Table:
    """Twelve normalised columns, a number that depends on them and its tercile as a class."""

    def __init__(self, seed: int, batch: int = 32) -> None:
        self.generator = torch.Generator().manual_seed(7000 + seed)
        self.w = torch.randn(12, generator=self.generator) / 12**0.5
        self.v = torch.randn(12, generator=self.generator) / 12**0.5
        self.batch = batch

    def __call__(self, batch: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.randn(batch or self.batch, 12, generator=self.generator)
        y = x @ self.w + torch.tanh(2 * x @ self.v)
        return x, y, (y > -0.6).long() + (y > 0.6).long()


@sick(
    CASES,
    "hm_one_batch_in_millimetres",
    ("gradient_spike",),
    onset=35,
    also=("loss_spike",),
    source="https://karpathy.github.io/2019/04/25/recipe/ look at the data: one batch has its targets in another unit",
    proof=every(gradient_spikes(35, 100), falls(0.6, last=35)),
)
def _(seed: int) -> Setup:
    model, data = Residual(), Table(seed)

    def loss(i: int) -> Tensor:
        x, y, k = data()
        number, kind = model(x)
        return F.mse_loss(number, y * (1000 if i == 35 else 1)) + F.cross_entropy(kind, k)

    return fit(model, loss, torch.optim.RMSprop(model.parameters(), lr=1e-3, alpha=0.95), updates=60)


class Steps(torch.autograd.Function):
    """Rounds to steps of `scale`; the backward divides by the scale and forgets to multiply by it again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return torch.round(x / scale) * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] / ctx.scale, None


class Quantiser(nn.Module):
    """Fake quantisation of activations."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Steps.apply(x, 0.125)
        return out


@sick(
    CASES,
    "hm_fake_quantiser_with_a_wrong_backward",
    ("exploding_gradient",),
    ("blocks",),
    source="https://docs.pytorch.org/docs/stable/notes/extending.html a custom Function is only as right as its backward: gradcheck",
    proof=every(
        gradient_ratio("blocks.5.0.weight", "blocks.0.0.weight", 1e-3, last=15),
        gradient_ratio("blocks.3.0.weight", "blocks.0.0.weight", 3e-2, last=15),
        gradient_ratio("head.weight", "blocks.3.0.weight", 1e-2, last=15),
    ),
)
def _(seed: int) -> Setup:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(
                *(nn.Sequential(nn.Linear(32 if i else 16, 32), nn.LayerNorm(32), nn.GELU(), Quantiser()) for i in range(6))
            )
            self.head = nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.blocks(x))
            return out

    model = Model()
    return fit(model, classify(model, Blobs(seed)), torch.optim.NAdam(model.parameters(), lr=1e-3), updates=40)


@sick(
    CASES,
    "hm_spectral_norm_on_twelve_layers",
    ("vanishing_gradient",),
    tuple(str(i) for i in range(0, 19, 2)),
    also=("loss_plateau", "update_ratio_too_small", "poor_init"),  # the activations shrink as well
    source="https://arxiv.org/abs/1811.05381 Anil et al., layers of spectral norm 1 attenuate the gradient at every layer",
    proof=every(
        gradient_ratio("0.bias", "24.bias", 1e-3, last=15),
        gradient_ratio("18.bias", "24.bias", 0.1, last=15),
        gradient_ratio("0.parametrizations.weight.original", "24.weight", 1e-2, last=15),
        loss_stays(0.05),
    ),
)
def _(seed: int) -> Setup:
    model = initialise(mlp(lambda: nn.LeakyReLU(0.1), 12), partial(nn.init.kaiming_normal_, a=0.1))
    assert isinstance(model, nn.Sequential)
    for i in range(0, 24, 2):
        nn.utils.parametrizations.spectral_norm(model[i])
    return fit(
        model, classify(model, Blobs(seed, batch=48)), torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9), updates=45
    )


class SignMomentum(torch.optim.Optimizer):
    """Lion: the sign of an interpolated momentum."""

    def __init__(self, parameters: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(torch.sign(first * m + (1 - first) * p.grad), alpha=-group["lr"])
                m.mul_(second).add_(p.grad, alpha=1 - second)


@sick(
    CASES,
    "hm_lion_at_the_rate_of_sgd",
    ("update_ratio_too_large",),
    also=(
        "loss_diverging",
        "loss_spike",
        "gradient_spike",
        "exploding_gradient",
        "loss_plateau",
        "saturated_activation",
        "dead_units",
    ),
    source="https://arxiv.org/abs/2302.06675 Chen et al., Lion needs a rate 3 to 10 times smaller than AdamW",
    proof=every(update_ratio(above=0.25, last=10), update_ratio(above=0.5, last=2), loss_grows(3.0, last=15)),
)
def _(seed: int) -> Setup:
    model = mlp(nn.SiLU, 3, width=48, inputs=16, outputs=4)
    optimizer = SignMomentum(model.parameters(), lr=0.1)
    return fit(model, classify(model, Blobs(seed, batch=64)), optimizer, updates=40)


@sick(
    CASES,
    "hm_gradients_unscaled_twice",
    ("update_ratio_too_small",),
    also=("loss_plateau",),
    source="https://docs.pytorch.org/docs/stable/notes/amp_examples.html unscale_ tells scaler.step not to unscale again; by hand it doesn't",
    proof=every(update_ratio(below=1e-5, last=15), lambda plain: _moves(plain, 0, 15), loss_stays(0.05)),
)
def _(seed: int) -> Setup:
    model, data = Recurrent(), Text(seed, batch=12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)

    def train() -> Iterator[Event]:
        for _ in range(60):
            x, y = data()
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = model(x)
            value = F.cross_entropy(out.float().flatten(0, 1), y.flatten())
            scaler.scale(value).backward()
            yield "read", [value]
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.div_(scaler.get_scale())
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            scaler.step(optimizer)  # divides by the scale once more
            scaler.update()
            yield "step", [optimizer]

    return Setup(model, train)


class SmoothedLoss(torch.autograd.Function):
    """Cross-entropy with smoothed labels; its hand-written backward has the wrong sign."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        logp = torch.log_softmax(logits, -1)
        soft = F.one_hot(target, logits.shape[-1]) * 0.9 + 0.1 / logits.shape[-1]
        ctx.save_for_backward(logp, soft)
        return -(soft * logp).sum(-1).mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logp, soft = ctx.saved_tensors
        return grads[0] * (soft - logp.exp()) / len(soft), None


@sick(
    CASES,
    "hm_handwritten_loss_with_the_sign_turned",
    ("loss_diverging",),
    also=("exploding_gradient", "update_ratio_too_large", "gradient_spike", *NON_FINITE),
    source="https://docs.pytorch.org/docs/stable/generated/torch.autograd.gradcheck.gradcheck.html the check that this backward would fail",
    proof=every(loss_grows(2.5, last=15), lambda plain: _rises(plain)),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(192, 8),
    )
    data = Pictures(seed, batch=24)

    def loss(i: int) -> Tensor:
        x, y = data()
        out: Tensor = SmoothedLoss.apply(model(x), y)
        return out

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), updates=30)


def _rises(plain: Plain) -> str:
    losses = plain.losses[:15]
    rising = sum(b > a for a, b in itertools.pairwise(losses))
    assert rising >= 11, f"the loss rises in {rising} of 14 updates only"
    return f"the loss rises in {rising} of the first 14 updates"


@sick(
    CASES,
    "hm_columns_as_they_lie_in_the_table",
    ("unnormalized_input",),
    ("",),
    also=(
        "loss_spike",
        "gradient_spike",
        "dead_units",
        "saturated_activation",
        "poor_init",
        "loss_diverging",
        "exploding_gradient",
    ),
    source="https://karpathy.github.io/2019/04/25/recipe/ verify the loss at init; year, income and area are fed as they are",
    proof=lambda plain: _raw(plain),
)
def _(seed: int) -> Setup:
    model, data = Residual(), Table(seed)
    mean = torch.tensor([1990, 50, 400, 12, 900, 80, 6, 300, 2000, 40, 150, 700.0])
    std = torch.tensor([15, 20, 150, 4, 300, 30, 2, 100, 10, 12, 60, 200.0])

    def loss(i: int) -> Tensor:
        x, y, k = data()
        x = mean + std * x
        note(model, "x", float(x.square().mean().sqrt()))
        number, kind = model(x)
        return F.smooth_l1_loss(number, y) + F.cross_entropy(kind, k)

    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}], lr=1e-3)
    return fit(model, loss, optimizer, updates=60)


def _raw(plain: Plain) -> str:
    rms = notes(plain, "x")[0]
    assert rms > 300, f"the input has the size {rms:.3g}"
    chance = math.log(3) + 0.7
    assert min(plain.losses[:3]) > 5 * chance, f"the first losses are {plain.losses[:3]}"
    return f"the input has the size {rms:.3g} and the first loss is {plain.losses[0]:.3g}, where chance is {chance:.2g}"


# Healthy runs


class NoisyPictures(Pictures):
    """Pictures in so much noise that the loss doesn't go to zero."""

    def __call__(self) -> tuple[Tensor, Tensor]:
        x, y = super().__call__()
        return x + 1.2 * torch.randn(x.shape, generator=self.generator), y


def _skips(plain: Plain) -> str:
    skipped = notes(plain, "skipped")
    early, late = sum(skipped[:20]), sum(skipped[20:])
    assert early >= 4, f"{early:g} of the first 20 steps are skipped"
    assert late >= 2, f"{late:g} later steps are skipped"
    return f"{early:g} of the first 20 steps are skipped and {late:g} later ones"


@healthy(
    CASES,
    "hm_ok_half_precision_searching_its_scale",
    source="https://arxiv.org/abs/1710.03740 Micikevicius et al., dynamic loss scaling skips steps whose gradients overflow",
    proof=every(converges(0.5), _skips),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 8),
    )
    data, optimizer = NoisyPictures(seed, batch=32), torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**25, growth_interval=12)

    def train() -> Iterator[Event]:
        for _ in range(120):
            x, y = data()
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                value = F.cross_entropy(model(x), y)
            scaler.scale(value).backward()
            yield "read", [value]
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            skipped = scaler.get_scale() < before
            note(model, "skipped", skipped)
            yield "step", [] if skipped else [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "hm_ok_uneven_micro_batches_with_few_labelled_tokens",
    source="https://huggingface.co/blog/gradient_accumulation divide the summed loss by the labelled tokens of all micro-batches",
    proof=converges(0.3),
)
def _(seed: int) -> Setup:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, 24)
            self.rnn = nn.GRU(24, 24, batch_first=True, bidirectional=True)
            self.head = nn.Linear(48, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.rnn(self.embed(x))[0])
            return out

    model, g = Tagger(), torch.Generator().manual_seed(8000 + seed)
    table = torch.randint(4, (20,), generator=g)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)

    def train() -> Iterator[Event]:
        for _ in range(100):
            optimizer.zero_grad(set_to_none=False)  # zeros stay in the gradients
            batches = []
            for size in (6, 1, 3):
                x = torch.randint(20, (size, 10), generator=g)
                mask = torch.rand(size, 10, generator=g) < 0.15
                mask[0, 0] = True
                batches.append((x, table[x], mask))
            labelled = sum(int(m.sum()) for _, _, m in batches)
            losses = []
            for x, y, mask in batches:
                loss = F.cross_entropy(model(x)[mask], y[mask], reduction="sum") / labelled
                loss.backward()
                losses.append(loss)
            yield "read", losses
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "hm_ok_gradual_unfreezing",
    source="https://arxiv.org/abs/1801.06146 Howard & Ruder, ULMFiT: unfreeze from the top, lower rates further down",
    proof=every(converges(0.3), lambda plain: _unfrozen(plain)),
)
def _(seed: int) -> Setup:
    # A bag of words, pretrained on one task; the other has its classes joined in another way. The word vectors stay frozen.
    model, data = Bag(), Words(seed, batch=32)
    pretrained = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(60):
        x, y = data()
        pretrained.zero_grad()
        F.cross_entropy(model(x), y).backward()
        pretrained.step()
    model.zero_grad()
    model.out = nn.Linear(48, 5)
    model.requires_grad_(False)
    model.out.requires_grad_(True)
    order = torch.randperm(5, generator=data.generator)
    optimizer = torch.optim.AdamW(model.out.parameters(), lr=2e-3)

    def unfreeze(i: int) -> None:
        part = {40: model.mix[2], 80: model.mix[0]}.get(i)
        if part is not None:
            part.requires_grad_(True)
            optimizer.add_param_group({"params": list(part.parameters()), "lr": 1e-3 if i == 40 else 4e-4})

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), order[y])

    return fit(model, loss, optimizer, updates=140, before=unfreeze)


def _unfrozen(plain: Plain) -> str:
    for name, first in {"mix.2.weight": 40, "mix.0.weight": 80}.items():
        assert all(math.isnan(g) for g in plain.grads[name][:first]), f"{name} has a gradient before {first}"
        assert all(s > 0 for s in plain.steps[name][first:]), f"{name} doesn't move"
    return "mix.2 moves from update 40, mix.0 from update 80"


@healthy(
    CASES,
    "hm_ok_mean_teacher",
    source="https://arxiv.org/abs/1703.01780 Tarvainen & Valpola, an average of the weights as a teacher, consistency ramped up",
    proof=converges(0.3),
)
def _(seed: int) -> Setup:
    student = nn.Sequential(
        nn.Linear(16, 96), nn.ReLU(), nn.Dropout(0.5), nn.Linear(96, 48), nn.ReLU(), nn.Dropout(0.5), nn.Linear(48, 4)
    )
    teacher = copy.deepcopy(student).requires_grad_(False)
    data, optimizer = Blobs(seed, batch=48), torch.optim.Adam(student.parameters(), lr=3e-3)

    def train() -> Iterator[Event]:
        for i in range(150):
            x, y = data()
            z = x + 0.3 * torch.randn(x.shape, generator=data.generator)
            optimizer.zero_grad(set_to_none=True)
            out = student(x)
            with torch.no_grad():
                target = torch.softmax(teacher(z), -1)
            consistency = (torch.softmax(out, -1) - target).square().sum(-1).mean()
            # Only the first twelve have labels.
            value = F.cross_entropy(out[:12], y[:12]) + 0.5 * min(1.0, i / 60) * consistency
            value.backward()
            yield "read", [value]
            optimizer.step()
            with torch.no_grad():
                for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
                    slow.lerp_(fast, 1 - min(0.95, (i + 1) / (i + 10)))
            yield "step", [optimizer]

    return Setup({"student": student, "teacher": teacher}, train)


@healthy(
    CASES,
    "hm_ok_lbfgs_with_line_search",
    source="https://docs.pytorch.org/docs/stable/generated/torch.optim.LBFGS.html step takes a closure that it calls several times",
    proof=converges(0.05),
)
def _(seed: int) -> Setup:
    model, g = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1)), torch.Generator()
    g.manual_seed(9000 + seed)
    x = torch.linspace(-1, 1, 80)[:, None]
    y = torch.sin(4 * x) + 0.3 * x + 0.02 * torch.randn(x.shape, generator=g)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1.0, max_iter=4, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    def train() -> Iterator[Event]:
        for _ in range(25):
            value = optimizer.step(closure)
            yield "read", [value]
            yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "hm_ok_steps_by_hand_with_noise",
    source="https://arxiv.org/abs/1511.06807 Neelakantan et al., annealed gradient noise; the update is written out, clipped to a small norm",
    proof=converges(0.4),
)
def _(seed: int) -> Setup:
    model, data = mlp(nn.ELU, 2, width=40), Blobs(seed, batch=32)
    momentum = {name: torch.zeros_like(p) for name, p in model.named_parameters()}

    def train() -> Iterator[Event]:
        for i in range(160):
            x, y = data()
            for p in model.parameters():
                p.grad = None
            value = F.cross_entropy(torch.func.functional_call(model, dict(model.named_parameters()), (x,)), y)
            value.backward()
            yield "read", [value]
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            with torch.no_grad():
                for name, p in model.named_parameters():
                    assert p.grad is not None
                    p.grad.add_(0.003 / (1 + i) ** 0.55 * torch.randn(p.shape, generator=data.generator))
                    momentum[name].mul_(0.9).add_(p.grad)
                    p.sub_(0.2 * momentum[name])
            yield "step", ["by hand"]

    return Setup(model, train)


@healthy(
    CASES,
    "hm_ok_energies_and_forces",
    source="https://arxiv.org/abs/1706.08566 SchNet: a loss on the derivative of the output by the input, hence a backward through a backward",
    proof=converges(0.2),
)
def _(seed: int) -> Setup:
    model, g = nn.Sequential(nn.Linear(4, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, 1)), torch.Generator()
    g.manual_seed(10000 + seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)

    def train() -> Iterator[Event]:
        for _ in range(150):
            x = torch.randn(32, 4, generator=g).requires_grad_(True)
            energy = torch.sin(x[:, 0]) + 0.5 * x[:, 1] * x[:, 2] + 0.3 * x[:, 3] ** 2
            (force,) = torch.autograd.grad(energy.sum(), x, retain_graph=True)
            optimizer.zero_grad()
            out = model(x)[:, 0]
            (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
            by_energy = F.mse_loss(out, energy.detach())
            by_force = F.mse_loss(slope, force)
            by_energy.backward(retain_graph=True)
            by_force.backward()
            yield "read", [by_energy, by_force]
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "hm_ok_warmup_from_zero_restarts_and_a_scale_by_hand",
    source="https://arxiv.org/abs/1608.03983 Loshchilov & Hutter, warm restarts; a linear warm-up from 0 before them",
    proof=converges(0.6),
)
def _(seed: int) -> Setup:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.place = nn.Embedding(24, 32), nn.Parameter(0.02 * torch.randn(16, 32))
            self.block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
            self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 24)

        def forward(self, x: Tensor) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
            out: Tensor = self.head(self.norm(self.block(self.embed(x) + self.place, src_mask=mask, is_causal=True)))
            return out

    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.05)
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: t / 20)
    restarts = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 40, eta_min=1e-5)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, restarts], [20])
    loss = classify(model, Text(seed, batch=12))

    def train() -> Iterator[Event]:
        for i in range(138):
            optimizer.zero_grad()
            value = loss(i)
            (1024 * value).backward()
            yield "read", [value]
            for p in model.parameters():
                assert p.grad is not None
                p.grad.div_(1024)
            nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            optimizer.step()
            scheduler.step()
            yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "hm_ok_one_block_four_times_checkpointed",
    source="https://arxiv.org/abs/1807.03819 Universal Transformers: one block, used again and again; here recomputed in the backward",
    proof=converges(0.3),
)
def _(seed: int) -> Setup:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(1, 16, 3, padding=1)
            self.block = nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 16, 3, padding=1), nn.Dropout(0.1))
            self.head = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, 8))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for _ in range(4):
                x = x + checkpoint(self.block, x, use_reentrant=False)
            out: Tensor = self.head(x)
            return out

    model = Model()
    return fit(
        model, classify(model, Pictures(seed), label_smoothing=0.02), torch.optim.AdamW(model.parameters(), lr=2e-3), updates=60
    )


@healthy(
    CASES,
    "hm_ok_weight_averaging_at_a_constant_rate",
    source="https://arxiv.org/abs/1803.05407 Izmailov et al., SWA: average weights at a constant rate, then renew the batch statistics",
    proof=converges(0.5),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(256, 8),
    )  # fmt: skip
    data = NoisyPictures(seed, batch=32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    average = torch.optim.swa_utils.AveragedModel(model)
    down = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60, eta_min=0.01)
    constant = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.03, anneal_epochs=5)
    loss = classify(model, data)

    def train() -> Iterator[Event]:
        for i in range(110):
            optimizer.zero_grad()
            value = loss(i)
            value.backward()
            yield "read", [value]
            optimizer.step()
            if i < 60:
                down.step()
            else:
                constant.step()
                if i % 5 == 0:
                    average.update_parameters(model)
            yield "step", [optimizer]
        torch.optim.swa_utils.update_bn([data()[0] for _ in range(5)], average)

    return Setup(model, train)


class Codebook(nn.Module):
    """Nearest of 16 codes, which are running means kept in buffers; the gradient passes straight through."""

    codes: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, codes: int = 16, width: int = 4) -> None:
        super().__init__()
        self.register_buffer("codes", 0.3 * torch.randn(codes, width))
        self.register_buffer("counts", torch.ones(codes))
        self.register_buffer("sums", self.codes.clone())

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        nearest = torch.cdist(z.detach(), self.codes).argmin(-1)
        if self.training:
            with torch.no_grad():
                taken = F.one_hot(nearest, len(self.codes)).float()
                self.counts.lerp_(taken.sum(0), 0.05)
                self.sums.lerp_(taken.T @ z, 0.05)
                # A code that is hardly used is put on a vector of the batch.
                idle = self.counts < 0.1
                self.sums[idle] = z[torch.arange(int(idle.sum())) % len(z)]
                self.counts[idle] = 1.0
                self.codes.copy_(self.sums / self.counts[:, None])
        q = F.embedding(nearest, self.codes)
        return z + (q - z).detach(), F.mse_loss(z, q.detach())


@healthy(
    CASES,
    "hm_ok_codebook_in_buffers_and_batches_of_any_size",
    source="https://arxiv.org/abs/1711.00937 van den Oord et al., VQ-VAE: codes as running means, a straight-through gradient",
    proof=converges(0.4),
)
def _(seed: int) -> Setup:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 4))
            self.codebook = Codebook()
            self.decoder = nn.Sequential(nn.Linear(4, 48), nn.GELU(), nn.Linear(48, 16))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            q, commitment = self.codebook(self.encoder(x))
            return self.decoder(q), commitment

    model, data = Model(), Blobs(seed, classes=8, spread=0.3)

    def before(i: int) -> None:
        data.batch = (64, 8, 128, 24, 96, 12)[i % 6]

    def loss(i: int) -> Tensor:
        x, _ = data()
        again, commitment = model(x)
        out: Tensor = F.mse_loss(again, x) + 0.25 * commitment
        return out

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=3e-3), updates=250, before=before)


@healthy(
    CASES,
    "hm_ok_sparse_vectors_weight_norm_and_much_dropout",
    source="https://docs.pytorch.org/docs/stable/generated/torch.optim.SparseAdam.html beside another optimizer",
    proof=converges(0.4),
)
def _(seed: int) -> Setup:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            norm = nn.utils.parametrizations.weight_norm
            self.embed = nn.EmbeddingBag(60, 24, mode="mean", sparse=True)
            self.deep = nn.Sequential(norm(nn.Linear(24, 96)), nn.ReLU(), nn.Dropout(0.6), norm(nn.Linear(96, 5)))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.deep(self.embed(x) * 12**0.5)
            return out

    model, data = Model(), Words(seed)
    sparse = torch.optim.SparseAdam(model.embed.parameters(), lr=1e-2)
    dense = torch.optim.Adam(model.deep.parameters(), lr=3e-3)

    def train() -> Iterator[Event]:
        for i in range(160):
            data.batch = (16, 48, 32)[i % 3]
            x, y = data()
            sparse.zero_grad()
            dense.zero_grad()
            value = F.cross_entropy(model(x), y)
            value.backward()
            yield "read", [value]
            sparse.step()
            dense.step()
            yield "step", [sparse, dense]

    return Setup(model, train)
