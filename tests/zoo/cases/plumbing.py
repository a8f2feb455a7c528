"""Runs about the training loop and the plumbing of autograd: scalers, accumulation, checkpoints, optimizers, numerics."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

from tests.zoo.case import (
    Blobs,
    Case,
    Event,
    Pictures,
    Proof,
    Setup,
    Text,
    classify,
    evens,
    fit,
    healthy,
    initialise,
    mlp,
    sick,
)
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
"""Runs that nobody has developed on, each with its source and a proof in plain torch: they are only run to report."""

FROM_A_NAN = ("non_finite_activation", "non_finite_loss", "non_finite_gradient", "non_finite_weight")
"""What a NaN spreads to."""


@dataclass
class Noted(Setup):
    """A run that writes down what its proof needs and `Plain` does not see.

    Attributes:
        notes: name -> one number an update.
    """

    notes: dict[str, list[float]] = field(default_factory=dict)


def noted(name: str, first: int = 0, last: int | None = None, low: float = -math.inf, high: float = math.inf) -> Proof:
    """Every note of the updates lies between two bounds."""

    def proof(plain: Plain) -> str:
        assert isinstance(plain.setup, Noted)
        values = plain.setup.notes[name][first:last]
        assert values, f"no {name}"
        assert all(low <= v <= high for v in values), f"{name}: {min(values):.4g} to {max(values):.4g}, not {low:g} to {high:g}"
        return f"{name}: {min(values):.3g} to {max(values):.3g}"

    return proof


def moves(*parameters: str, first: int = 0, last: int | None = None) -> Proof:
    """Every step of these updates changes these parameters, and they have gradients."""

    def proof(plain: Plain) -> str:
        for name in parameters:
            assert all(s > 0 for s in plain.steps[name][first:last]), f"{name} stays"
            assert all(n > 0 for n in plain.grads[name][first:last]), f"{name} has no gradient"
        return f"{', '.join(parameters)} learn"

    return proof


def falls(to: float, first: int, last: int) -> Proof:
    """The median of the last five losses before `last` is below `to` times that of the five from `first` on."""

    def proof(plain: Plain) -> str:
        a, b = median(plain.losses[first : first + 5]), median(plain.losses[last - 5 : last])
        assert b < to * a, f"the loss goes from {a:.4g} to {b:.4g}, not below {to:g} of it"
        return f"the loss falls from {a:.4g} to {b:.4g} until update {last}"

    return proof


def finite(first: int = 0, last: int | None = None) -> Proof:
    """No gradient of these updates holds a NaN or Inf."""

    def proof(plain: Plain) -> str:
        bad = [name for name, counts in plain.nonfinite.items() if any(counts[first:last])]
        assert not bad, f"NaN or Inf in the gradients of {bad}"
        return "every gradient is finite"

    return proof


class Curve:
    """Regression: smooth functions of standard normal features, with noise."""

    def __init__(self, seed: int, features: int = 8, outputs: int = 1, batch: int = 32, noise: float = 0.1) -> None:
        self.generator = torch.Generator().manual_seed(4000 + seed)
        self.a = torch.randn(features, 12, generator=self.generator) / math.sqrt(features)
        self.b = torch.randn(12, outputs, generator=self.generator) / math.sqrt(4)
        self.batch, self.noise = batch, noise

    def __call__(self, batch: int | None = None) -> tuple[Tensor, Tensor]:
        x = torch.randn(batch or self.batch, len(self.a), generator=self.generator)
        y = torch.tanh(1.5 * x @ self.a) @ self.b
        return x, y + self.noise * torch.randn(y.shape, generator=self.generator)


class Tones:
    """Sequences `[batch, length, 2]` of one of four frequencies, with a random phase and noise."""

    def __init__(self, seed: int, batch: int = 24, length: int = 20, noise: float = 0.3) -> None:
        self.generator = torch.Generator().manual_seed(5000 + seed)
        self.batch, self.length, self.noise = batch, length, noise

    def __call__(self) -> tuple[Tensor, Tensor]:
        y = torch.randint(4, (self.batch,), generator=self.generator)
        phase = 6.28 * torch.rand(self.batch, 1, generator=self.generator)
        angle = phase + (0.25 + 0.35 * y[:, None]) * torch.arange(self.length)
        x = torch.stack([angle.sin(), angle.cos()], -1)
        return x + self.noise * torch.randn(x.shape, generator=self.generator), y


def norm_of(tensors: list[Tensor | None]) -> float:
    """2-norm of some gradients together; None counts as nothing."""
    return math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors if t is not None))


def grads_of(model: nn.Module) -> list[Tensor | None]:
    """Gradients of the parameters."""
    return [p.grad for p in model.parameters()]


# ---------------------------------------------------------------------------------------------------------------- sick


class CheckpointedConv(nn.Module):
    """A convolutional network whose first stage is checkpointed to save memory."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.GELU(), nn.Conv2d(12, 12, 3, padding=1), nn.GELU())
        self.body = nn.Sequential(nn.Conv2d(12, 16, 3, stride=2, padding=1), nn.GELU(), nn.Flatten())
        self.head = nn.Linear(16 * 16, 8)

    def forward(self, x: Tensor) -> Tensor:
        # The input has no requires_grad, so the reentrant kind gives the stage no gradients.
        hidden = cast(Tensor, checkpoint(self.stem, x, use_reentrant=True))
        return cast(Tensor, self.head(self.body(hidden)))


@sick(
    CASES,
    "hd_reentrant_checkpoint_of_the_first_stage",
    ("missing_gradient",),
    ("stem",),
    source="https://github.com/mlfoundations/open_clip/issues/573 None of the inputs have requires_grad=True, with use_reentrant",
    proof=every(no_gradient("stem.0.weight", "stem.0.bias", "stem.2.weight", "stem.2.bias"), moves("body.0.weight", "head.weight")),
)
def _(seed: int) -> Setup:
    model = CheckpointedConv()
    return fit(model, classify(model, Pictures(seed)), torch.optim.AdamW(model.parameters(), lr=3e-3), updates=40)


class TwoTowers(nn.Module):
    """A recommender: the product of what a tower makes of the user and one of the item."""

    def __init__(self, users: int = 40, items: int = 60) -> None:
        super().__init__()
        self.user = nn.Sequential(nn.Embedding(users, 16), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 12))
        self.item = nn.Sequential(nn.Embedding(items, 16), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 12))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        # Meant for the index that serves it: the vector is detached in training as well.
        vector = self.user(users).detach()
        return cast(Tensor, (vector * self.item(items)).sum(-1) + self.bias)


@sick(
    CASES,
    "hd_user_tower_detached",
    ("missing_gradient",),
    ("user",),
    source="https://github.com/lucidrains/CoCa-pytorch/issues/6 a detached tensor: no gradient goes back to the encoder",
    proof=every(
        no_gradient("user.0.weight", "user.1.weight", "user.3.weight", "user.3.bias"),
        moves("item.0.weight", "item.1.weight", "item.3.weight"),
    ),
)
def _(seed: int) -> Setup:
    g = torch.Generator().manual_seed(seed)
    taste, kind = torch.randn(40, 3, generator=g), torch.randn(60, 3, generator=g)
    model = TwoTowers()

    def loss(i: int) -> Tensor:
        u, v = torch.randint(40, (128,), generator=g), torch.randint(60, (128,), generator=g)
        liked = ((taste[u] * kind[v]).sum(-1) > 0).float()
        return F.binary_cross_entropy_with_logits(model(u, v), liked)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-2), updates=60)


class FakeQuantLinear(nn.Linear):
    """A layer that computes with weights of 4 bits once `quantize` is set."""

    quantize = False

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.quantize:
            scale = weight.detach().abs().max() / 7
            weight = torch.round(weight / scale) * scale  # the straight-through estimator is forgotten
        return F.linear(x, weight, self.bias)


@sick(
    CASES,
    "hd_quantized_after_a_float_warm_up",
    ("zero_gradient",),
    ("0", "2"),
    onset=30,
    # Nothing but what the momentum still holds moves them, and soon not even that.
    also=("frozen_weights", "vanishing_gradient"),
    source="https://discuss.pytorch.org/t/torch-round-gradient/28628/4 the derivative of round is zero almost everywhere",
    proof=every(
        moves("0.weight", "2.weight", "4.weight", last=30),
        zero_gradient("0.weight", "2.weight", first=30),
        moves("0.bias", "2.bias", "4.weight", first=30, last=40),
        falls(0.85, 0, 30),
    ),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(FakeQuantLinear(20, 32), nn.ReLU(), FakeQuantLinear(32, 32), nn.ReLU(), nn.Linear(32, 6))

    def before(i: int) -> None:
        if i == 30:
            for m in model:
                if isinstance(m, FakeQuantLinear):
                    m.quantize = True

    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
    return fit(model, classify(model, Blobs(seed, 20, 6, spread=2.5)), optimizer, updates=60, before=before)


class GruClassifier(nn.Module):
    """The mean of the states of a GRU, and a head."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.gru = nn.GRU(2, width, batch_first=True)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.gru(x)[0].mean(1)))


@sick(
    CASES,
    "hd_zero_grad_once_an_epoch",
    ("gradients_not_zeroed",),
    source="https://github.com/pytorch/pytorch/issues/47175 zero_grad at the beginning of each epoch instead of each iteration",
    proof=every(noted("left over", 1, 15, low=1e-3), noted("left over over fresh", 5, 15, low=1.0)),
)
def _(seed: int) -> Setup:
    model, data = GruClassifier(), Tones(seed, noise=0.15)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    notes: dict[str, list[float]] = {"left over": [], "left over over fresh": []}

    def train() -> Iterator[Event]:
        optimizer.zero_grad()  # belongs into the loop over the batches
        for _ in range(50):
            x, y = data()
            old = [None if g is None else g.clone() for g in grads_of(model)]
            value = F.cross_entropy(model(x), y)
            value.backward()
            fresh = [g if o is None else cast(Tensor, g) - o for g, o in zip(grads_of(model), old, strict=True)]
            notes["left over"].append(norm_of(old))
            notes["left over over fresh"].append(norm_of(old) / norm_of(fresh))
            yield "read", [value]
            optimizer.step()
            yield "step", [optimizer]

    return Noted(model, train, notes)


class BodyAndHead(nn.Module):
    """Two convolutions with normalisation, and a head."""

    def __init__(self, classes: int = 8) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.SiLU()
        )
        self.head = nn.Linear(256, classes)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.body(x).flatten(1)))


def pretrain(model: nn.Module, loss: Callable[[int], Tensor], updates: int = 30, lr: float = 3e-3) -> None:
    """A few updates before anything is watched."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for i in range(updates):
        optimizer.zero_grad()
        loss(i).backward()
        optimizer.step()
    model.zero_grad()


@sick(
    CASES,
    "hd_zero_grad_of_the_old_optimizer_after_unfreezing",
    ("gradients_not_zeroed",),
    ("body",),
    onset=26,
    also=("exploding_gradient", "update_ratio_too_large", "loss_diverging", "loss_spike"),
    source="https://github.com/allenai/rslearn/issues/217 unfrozen layers whose gradients pile up in spite of zero_grad",
    proof=every(
        noted("left over in the body", 0, 26, high=0.0),
        noted("left over in the body", 26, 36, low=1e-3),
        noted("left over in the head", high=0.0),
    ),
)
def _(seed: int) -> Setup:
    model = BodyAndHead()
    noise = torch.Generator().manual_seed(seed)

    def noisy(pictures: Pictures) -> Callable[[], tuple[Tensor, Tensor]]:
        def data() -> tuple[Tensor, Tensor]:
            x, y = pictures()
            return (x + 2 * torch.randn(x.shape, generator=noise)) / 2, y

        return data

    pretrain(model, classify(model, noisy(Pictures(seed + 50, batch=32))))
    nn.init.zeros_(model.head.bias)
    nn.init.kaiming_uniform_(model.head.weight, a=math.sqrt(5))
    data = noisy(Pictures(seed, batch=32))
    model.body.requires_grad_(False)
    head_optimizer = torch.optim.SGD(model.head.parameters(), lr=0.02, momentum=0.9)
    notes: dict[str, list[float]] = {"left over in the body": [], "left over in the head": []}

    def train() -> Iterator[Event]:
        optimizer: torch.optim.Optimizer = head_optimizer
        for i in range(60):
            if i == 25:
                model.body.requires_grad_(True)
                optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
            head_optimizer.zero_grad()  # of the old one, which knows the head only
            notes["left over in the body"].append(norm_of(grads_of(model.body)))
            notes["left over in the head"].append(norm_of(grads_of(model.head)))
            x, y = data()
            value = F.cross_entropy(model(x), y)
            value.backward()
            yield "read", [value]
            optimizer.step()
            yield "step", [optimizer]

    return Noted(model, train, notes)


class TinyTransformer(nn.Module):
    """A causal language model of one or two layers."""

    def __init__(self, vocabulary: int = 24, width: int = 24, layers: int = 2, length: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        hidden = self.layers(self.embed(tokens) + self.position[:length], mask=mask, is_causal=True)
        return cast(Tensor, self.head(self.norm(hidden)))


@sick(
    CASES,
    "hd_head_replaced_after_the_optimizer_was_made",
    ("not_in_optimizer",),
    ("head",),
    source="https://github.com/huggingface/pytorch-openai-transformer-lm/pull/6 the optimizer does not have the new head",
    proof=every(unchanged("head.weight", "head.bias"), moves("embed.weight", "layers.layers.0.linear1.weight")),
)
def _(seed: int) -> Setup:
    model = TinyTransformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.head = nn.Linear(24, 24)
    loss = classify(model, Text(seed))

    def train() -> Iterator[Event]:
        for i in range(40):
            model.zero_grad()
            value = loss(i)
            value.backward()
            yield "read", [value]
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


@sick(
    CASES,
    "hd_best_checkpoint_assigned_under_the_optimizer",
    ("not_in_optimizer",),
    onset=20,
    also=("never_stepped", "frozen_weights", "loss_plateau"),
    source="https://github.com/pytorch/tutorials/pull/2522 the optimizer must be made after load_state_dict(assign=True)",
    proof=every(
        noted("share of parameters owned", 0, 20, low=1.0),
        noted("share of parameters owned", 20, high=0.0),
        noted("gradient", low=1e-4),
        noted("moved", 0, 20, low=1e-6),
        noted("moved", 20, high=0.0),
    ),
)
def _(seed: int) -> Setup:
    model, data = mlp(nn.SiLU, 3, 32, inputs=8, outputs=1), Curve(seed)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=2e-3)
    notes: dict[str, list[float]] = {"share of parameters owned": [], "gradient": [], "moved": []}

    def train() -> Iterator[Event]:
        best = copy.deepcopy(model.state_dict())
        for i in range(50):
            if i == 16:
                best = copy.deepcopy(model.state_dict())
            if i == 20:  # an evaluation has found the checkpoint of four updates ago to be better
                model.load_state_dict(best, assign=True)
            model.zero_grad()
            x, y = data()
            value = F.mse_loss(model(x), y)
            value.backward()
            owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
            was = [p.detach().clone() for p in model.parameters()]
            notes["share of parameters owned"].append(sum(id(p) in owned for p in model.parameters()) / len(was))
            notes["gradient"].append(norm_of(grads_of(model)))
            yield "read", [value]
            optimizer.step()
            notes["moved"].append(norm_of([p.detach() - w for p, w in zip(model.parameters(), was, strict=True)]))
            yield "step", [optimizer]

    return Noted(model, train, notes)


@sick(
    CASES,
    "hd_norm_guard_skips_every_update",
    ("never_stepped",),
    onset=30,
    # The sum in place of the mean is a jump of the loss and of the gradient too, by a factor of about six.
    also=("loss_plateau", "frozen_weights", "loss_spike", "gradient_spike"),
    source="https://github.com/openai/vdvae/issues/25 the skip threshold is met by every batch, and the model stops updating forever",
    proof=every(noted("skipped", 0, 30, high=0.0), noted("skipped", 30, low=1.0), falls(0.8, 0, 30), finite()),
)
def _(seed: int) -> Setup:
    model, data = mlp(nn.Tanh, 2, 32, inputs=8, outputs=6), Curve(seed, outputs=6, noise=0.7)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    notes: dict[str, list[float]] = {"skipped": [], "norm": []}

    def train() -> Iterator[Event]:
        for i in range(60):
            optimizer.zero_grad()
            x, y = data()
            error = (model(x) - y).square()
            # The second stage sums over the horizon of six instead of taking the mean; the limit is that of the first.
            value = error.mean() if i < 30 else error.sum(1).mean()
            value.backward()
            yield "read", [value]
            norm = norm_of(grads_of(model))
            notes["norm"].append(norm)
            notes["skipped"].append(float(norm > 2.0))
            if norm > 2.0:
                yield "step", []
                continue
            optimizer.step()
            yield "step", [optimizer]

    return Noted(model, train, notes)


class LstmLanguage(nn.Module):
    """Embedding, LSTM and a head."""

    def __init__(self, vocabulary: int = 24, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.lstm(self.embed(tokens))[0]))


@sick(
    CASES,
    "hd_linear_decay_ends_with_the_first_epoch",
    ("frozen_weights",),
    onset=30,
    also=("loss_plateau", "update_ratio_too_small"),
    source="https://github.com/determined-ai/determined/pull/711 num_training_steps too low: a rate of zero, and learning stops",
    proof=every(
        moves("embed.weight", "lstm.weight_hh_l0", "head.weight", last=30),
        unchanged("embed.weight", "lstm.weight_hh_l0", "lstm.bias_ih_l0", "head.weight", "head.bias", first=30),
    ),
)
def _(seed: int) -> Setup:
    model = LstmLanguage()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    loss = classify(model, Text(seed))
    # 30 batches an epoch, and three epochs to come
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: max(0.0, 1 - i / 30))

    def train() -> Iterator[Event]:
        for i in range(90):
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
    "hd_fp16_squared_error_in_grey_levels",
    ("loss_scale_collapse",),
    also=("non_finite_gradient", "never_stepped"),
    source="https://github.com/NVIDIA/apex/issues/318 the loss scale falls and falls, every step is skipped",
    proof=every(noted("skipped", 0, 15, low=1.0), noted("scale", 13, high=0.5), noted("loss", low=0.0, high=1e9)),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(
        nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 16), nn.GELU(), nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 64)
    )
    data = Pictures(seed, batch=32)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    notes: dict[str, list[float]] = {"scale": [], "skipped": [], "loss": []}

    def train() -> Iterator[Event]:
        for _ in range(40):
            optimizer.zero_grad()
            x = data()[0].flatten(1)
            with torch.autocast("cpu", dtype=torch.float16):
                out = model(x)
                # The sum of squares in grey levels: gradients that float16 cannot hold at a scale of 1.
                value = F.mse_loss(255 * out, 255 * x, reduction="sum")
            scaler.scale(value).backward()
            notes["scale"].append(scaler.get_scale())
            notes["loss"].append(float(value.detach()))
            yield "read", [value]
            scaler.step(optimizer)
            scaler.update()
            skipped = scaler.get_scale() < notes["scale"][-1]
            notes["skipped"].append(float(skipped))
            yield "step", [] if skipped else [optimizer]

    return Noted(model, train, notes)


class WideAndDeep(nn.Module):
    """A linear part beside a deep one."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.wide = nn.Linear(features, 2)
        self.deep = nn.Sequential(nn.Linear(features, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 2))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.wide(x) + self.deep(x))


@sick(
    CASES,
    "hd_constant_column_standardised",
    ("non_finite_input",),
    ("",),
    also=FROM_A_NAN,
    source="https://stats.stackexchange.com/questions/35304/how-to-standardize-an-array-if-standard-deviation-is-zero a column of one value",
    proof=every(
        noted("columns with NaN", low=1.0, high=1.0),
        noted("NaN in the weights before the first update", low=0.0, high=0.0),
        first_non_finite(0, "wide"),
    ),
)
def _(seed: int) -> Setup:
    g = torch.Generator().manual_seed(seed)
    table = torch.randn(640, 10, generator=g) * torch.tensor([1.0, 3, 9, 2, 5, 1, 7, 4, 2, 1]) + 20
    target = (table[:, 0] + table[:, 3] > 40).long()
    table[:, 7] = 3.0  # every patient of this hospital has it
    table = (table - table.mean(0)) / table.std(0)
    model = WideAndDeep(10)
    notes: dict[str, list[float]] = {
        "columns with NaN": [],
        "NaN in the weights before the first update": [float(sum(int(p.isnan().sum()) for p in model.parameters()))],
    }

    def loss(i: int) -> Tensor:
        rows = torch.randint(640, (32,), generator=g)
        notes["columns with NaN"].append(float(table[rows].isnan().any(0).sum()))
        return F.cross_entropy(model(table[rows]), target[rows])

    setup = fit(model, loss, torch.optim.AdamW(model.parameters(), lr=3e-3), updates=25)
    return Noted(model, setup.train, notes)


@sick(
    CASES,
    "hd_half_precision_adam_with_the_default_eps",
    ("non_finite_weight",),
    also=FROM_A_NAN,
    source="https://github.com/afiaka87/glide-finetune/issues/5 float16 and Adam: eps is 0, NaN after the first step",
    proof=every(
        noted("NaN or Inf in the gradients before the first step", low=0.0, high=0.0),
        noted("layers with NaN or Inf after the first step", low=1.0),
        first_non_finite(1),
    ),
)
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, 3, 32, inputs=16, outputs=4).half()
    data = Blobs(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    gradients, weights = "NaN or Inf in the gradients before the first step", "layers with NaN or Inf after the first step"
    notes: dict[str, list[float]] = {gradients: [], weights: []}

    def train() -> Iterator[Event]:
        for i in range(25):
            optimizer.zero_grad()
            x, y = data()
            value = F.cross_entropy(model(x.half()).float(), y)
            value.backward()
            if i == 0:
                notes[gradients].append(sum(int((~torch.isfinite(cast(Tensor, g))).sum()) for g in grads_of(model)))
            yield "read", [value]
            optimizer.step()
            if i == 0:
                notes[weights].append(sum(not bool(torch.isfinite(p).all()) for p in model.parameters()))
            yield "step", [optimizer]

    return Noted(model, train, notes)


class HandBatchNorm(nn.Module):
    """Batch normalisation written by hand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        mean, deviation = x.mean(0), x.std(0)  # of one sample: NaN
        self.mean.mul_(0.9).add_(mean.detach(), alpha=0.1)
        return self.gain * (x - mean) / (deviation + 1e-5) + self.shift


@sick(
    CASES,
    "hd_last_batch_of_one_sample",
    ("non_finite_activation",),
    ("1",),
    onset=24,
    also=FROM_A_NAN,
    source="https://github.com/pytorch/pytorch/issues/7716 a batch of one at the end of an epoch, in batch normalisation",
    proof=every(first_non_finite(24, "1"), lambda plain: _finite_output(plain, "0", 24), falls(0.6, 0, 24)),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(nn.Linear(8, 32), HandBatchNorm(32), nn.LeakyReLU(), nn.Linear(32, 16), nn.LeakyReLU(), nn.Linear(16, 1))
    data = Curve(seed)

    def loss(i: int) -> Tensor:
        x, y = data(1 if i % 25 == 24 else 32)  # 769 rows
        return F.smooth_l1_loss(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=8e-3), updates=45)


def _finite_output(plain: Plain, module: str, update: int) -> str:
    seen = plain.outputs[module][update]
    assert seen is not None
    assert seen.nonfinite == 0, f"{module} gives NaN or Inf as well"
    return f"{module} gives finite numbers at update {update}"


@sick(
    CASES,
    "hd_label_smoothing_annealed_to_zero",
    ("non_finite_loss",),
    onset=25,
    source="https://github.com/Lightning-AI/torchmetrics/issues/1029 KL divergence gives NaN where a probability is 0",
    proof=every(first_non_finite(25), finite(), falls(0.7, 0, 25), lambda plain: _nan_from(plain, 25)),
)
def _(seed: int) -> Setup:
    model, data = mlp(nn.GELU, 2, 32), Blobs(seed, spread=1.5)

    def loss(i: int) -> Tensor:
        x, y = data()
        smoothing = max(0.0, 0.2 * (1 - i / 25))
        p = (1 - smoothing) * F.one_hot(y, 4).float() + smoothing / 4
        return (p * (p.log() - F.log_softmax(model(x), -1))).sum(-1).mean()  # 0 * log 0; the gradient does not see it

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), updates=50)


def _nan_from(plain: Plain, update: int) -> str:
    assert all(math.isnan(x) for x in plain.losses[update:])
    return f"every loss is NaN from update {update}"


class SignedRoot(nn.Module):
    """The power normalisation of pooled features."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x.sqrt(), -(-x).sqrt())


class PowerNet(nn.Module):
    """Convolutions, signed root and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv1d(2, 12, 5, padding=2), nn.SiLU(), nn.Conv1d(12, 16, 5, padding=2))
        self.power = SignedRoot()
        self.head = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.encoder(x.transpose(1, 2)).mean(-1)
        return cast(Tensor, self.head(self.power(pooled)))


@sick(
    CASES,
    "hd_where_around_a_square_root",
    ("non_finite_gradient",),
    ("encoder", "power"),
    also=FROM_A_NAN,
    source="https://github.com/pytorch/pytorch/issues/187297 torch.where propagates the NaN gradient of the inactive sqrt branch",
    proof=every(first_non_finite(0), lambda plain: _born_above(plain, "encoder.", "head.")),
)
def _(seed: int) -> Setup:
    model = PowerNet()
    return fit(model, classify(model, Tones(seed, noise=0.15)), torch.optim.Adam(model.parameters(), lr=1e-2), updates=50)


def _born_above(plain: Plain, bad: str, good: str) -> str:
    assert math.isfinite(plain.losses[0]), "the first loss is not finite"
    for name, counts in plain.nonfinite.items():
        assert not (name.startswith(good) and counts[0]), f"{name} has NaN in its first gradient"
        assert not (name.startswith(bad) and not counts[0]), f"{name} has a finite first gradient"
    return f"at update 0 the loss and the gradients of {good}* are finite, those of {bad}* are not"


@sick(
    CASES,
    "hd_one_tiny_propensity",
    ("gradient_spike", "loss_spike"),
    onset=30,
    source="https://arxiv.org/abs/1602.05352 inverse propensity weights: a tiny propensity makes the variance explode",
    proof=every(gradient_spikes(30, 30), lambda plain: _loss_jumps(plain, 30, 30), finite(), falls(0.8, 0, 30)),
)
def _(seed: int) -> Setup:
    model, data = mlp(nn.ReLU, 2, 32, inputs=8, outputs=1), Curve(seed, batch=48)
    g = torch.Generator().manual_seed(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        propensity = 0.3 + 0.6 * torch.rand(48, 1, generator=g)
        if i == 30:  # a row that the logging policy almost never showed
            propensity[5] = 2e-5
            y[5] += 1.0
        return cast(Tensor, ((model(x) - y).square() / propensity).mean())

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), updates=60)


def _loss_jumps(plain: Plain, update: int, factor: float) -> str:
    jump = plain.losses[update] / median(plain.losses[update - 10 : update])
    assert jump > factor, f"the loss is {jump:.3g} times the median before it"
    return f"the loss at update {update} is {jump:.3g} times the median of the ten before it"


@sick(
    CASES,
    "hd_one_shard_with_shifted_labels",
    ("loss_spike", "gradient_spike"),
    onset=60,
    source="https://arxiv.org/abs/2204.02311 PaLM, section 5.1: spikes in the loss at certain batches",
    proof=every(lambda plain: _loss_jumps(plain, 60, 20), gradient_spikes(60, 10), finite(), falls(0.2, 0, 60)),
)
def _(seed: int) -> Setup:
    model, data = mlp(nn.GELU, 2, 48, inputs=24, outputs=6), Blobs(seed, 24, 6, batch=64, spread=1.3)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), (y + 1) % 6 if i == 60 else y)

    return fit(model, loss, torch.optim.NAdam(model.parameters(), lr=4e-3), updates=90)


class _LeakyByHand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x > 0, x, 0.2 * x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.where(x > 0, grad, grad / 0.2)  # the inverse of the function, not its derivative


class LeakyByHand(nn.Module):
    """A leaky ReLU with a backward pass of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, _LeakyByHand.apply(x))  # type: ignore[no-untyped-call]


@sick(
    CASES,
    "hd_backward_divides_by_the_slope",
    ("exploding_gradient",),
    tuple(str(i) for i in range(16)),  # all but the head
    source="https://docs.pytorch.org/docs/stable/notes/extending.html a Function whose backward gradcheck would refuse",
    proof=every(
        gradient_ratio("16.weight", "0.weight", 3e-3, last=15), gradient_ratio("14.weight", "4.weight", 2e-2, last=15), finite()
    ),
)
def _(seed: int) -> Setup:
    model = initialise(mlp(LeakyByHand, 8, 32), lambda w: nn.init.kaiming_normal_(w, a=0.2))
    return fit(model, classify(model, Blobs(seed)), torch.optim.Adam(model.parameters(), lr=1e-3), updates=40)


@sick(
    CASES,
    "hd_spectral_norm_on_every_layer",
    ("vanishing_gradient",),
    evens(0, 22),
    also=("loss_plateau", "poor_init", "update_ratio_too_small", "dead_units"),
    source="https://arxiv.org/abs/1802.05957 spectral normalisation; here in a deep plain network, whose layers then all shrink",
    proof=every(
        gradient_ratio("0.parametrizations.weight.original", "24.parametrizations.weight.original", 5e-2, last=15),
        # Where activations shrink as well, all matrices have little, and only the bias of the head shows what there was.
        gradient_ratio("0.parametrizations.weight.original", "24.bias", 1e-4, last=15),
        gradient_ratio("12.parametrizations.weight.original", "24.bias", 1e-3, last=15),
        loss_stays(0.1),
    ),
)
def _(seed: int) -> Setup:
    model = initialise(mlp(nn.ReLU, 12, 32), lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu"))
    for m in list(model.modules()):
        if isinstance(m, nn.Linear):
            spectral_norm(m)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    return fit(model, classify(model, Blobs(seed)), optimizer, updates=60)


class RowTransformer(nn.Module):
    """Attention over the rows of a picture."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.enter = nn.Linear(8, width)
        self.position = nn.Parameter(0.1 * torch.randn(8, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.norm(self.layers(self.enter(x.squeeze(1)) + self.position)).mean(1)))


@sick(
    CASES,
    "hd_lr_and_weight_decay_swapped",
    ("update_ratio_too_large",),
    also=("loss_spike", "loss_diverging", "loss_plateau", "dead_units", "gradient_spike", "exploding_gradient"),
    source="https://arxiv.org/abs/1711.05101 AdamW, with lr and weight_decay in each other's place",
    proof=every(update_ratio(above=0.5, last=1), update_ratio(above=0.1, last=10), loss_stays(0.25, last=9)),
)
def _(seed: int) -> Setup:
    model = RowTransformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=3e-3)
    return fit(model, classify(model, Pictures(seed)), optimizer, updates=40)


@sick(
    CASES,
    "hd_warm_up_counted_in_epochs",
    ("update_ratio_too_small",),
    also=("loss_plateau",),
    source="https://github.com/CUNY-CL/yoyodyne/issues/243 a warm-up in steps under a scheduler that is stepped once an epoch",
    proof=every(update_ratio(below=3e-5, last=15), loss_stays(0.02)),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 8),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1e-4, total_iters=500)
    loss = classify(model, Pictures(seed))

    def train() -> Iterator[Event]:
        for i in range(80):
            optimizer.zero_grad()
            value = loss(i)
            value.backward()
            yield "read", [value]
            optimizer.step()
            if i % 200 == 199:  # the end of an epoch
                warm_up.step()
            yield "step", [optimizer]

    return Setup(model, train)


class HandMomentum(torch.optim.Optimizer):
    """Momentum written by hand. `sign` is -1 in a right one."""

    def __init__(self, params: Any, lr: float, momentum: float = 0.9, sign: float = -1.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "sign": sign})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                v = self.state[p].setdefault("v", torch.zeros_like(p))
                v.mul_(group["momentum"]).add_(p.grad)
                p.add_(v, alpha=group["sign"] * group["lr"])


@sick(
    CASES,
    "hd_hand_made_momentum_climbs",
    ("loss_diverging",),
    also=("exploding_gradient", "update_ratio_too_large", "loss_spike", "gradient_spike", "dead_units", *FROM_A_NAN),
    source="https://docs.pytorch.org/docs/stable/optim.html an optimizer of one's own, which adds the velocity instead of taking it off",
    proof=every(loss_grows(4, last=15)),
)
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, 2, 32)
    optimizer = HandMomentum(model.parameters(), lr=0.08, sign=1.0)
    return fit(model, classify(model, Blobs(seed)), optimizer, updates=40)


@sick(
    CASES,
    "hd_raw_units_of_houses",
    ("unnormalized_input",),
    ("",),
    also=("loss_plateau", "loss_spike", "dead_units", "exploding_gradient", "gradient_spike"),
    source="https://discuss.pytorch.org/t/neural-network-could-not-learn-on-this-type-of-data-why/96648/5 normalise the input",
    proof=every(noted("rms of the input", low=1e3), noted("largest over least column", low=1e3), noted("loss", 0, 15, low=3.0)),
)
def _(seed: int) -> Setup:
    g = torch.Generator().manual_seed(seed)
    scale = torch.tensor([60.0, 30.0, 1.5, 18000.0, 0.4, 900.0])
    centre = torch.tensor([140.0, 1975.0, 3.0, 62000.0, 1.2, 2500.0])
    model = mlp(nn.ReLU, 2, 32, inputs=6, outputs=1)
    notes: dict[str, list[float]] = {"rms of the input": [], "largest over least column": [], "loss": []}
    weights = torch.tensor([0.6, 0.3, 0.2, 0.7, -0.3, -0.2])

    def loss(i: int) -> Tensor:
        z = torch.randn(32, 6, generator=g)
        x = centre + scale * z
        y = (z @ weights + 0.1 * torch.randn(32, generator=g))[:, None]
        columns = x.square().mean(0).sqrt()
        notes["rms of the input"].append(float(x.square().mean().sqrt()))
        notes["largest over least column"].append(float(columns.max() / columns.min()))
        value = F.mse_loss(model(x), y)
        notes["loss"].append(float(value.detach()))
        return value

    setup = fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-3), updates=60)
    return Noted(model, setup.train, notes)


class TwoHeads(nn.Module):
    """One trunk, two questions; the head of the second ends with a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.shape = nn.Linear(32, 4)
        self.colour = nn.Sequential(nn.Linear(32, 4), nn.Softmax(dim=-1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.trunk(x)
        return self.shape(hidden), self.colour(hidden)


@sick(
    CASES,
    "hd_softmax_in_one_of_two_heads",
    ("double_softmax",),
    ("colour.1",),
    also=("loss_plateau",),
    source="https://github.com/gitabcworld/MatchingNetworks/issues/5 double softmax: cross_entropy wants logits",
    proof=lambda plain: _probabilities(plain, "colour"),
)
def _(seed: int) -> Setup:
    model, shapes, colours = TwoHeads(), Blobs(seed, 8), Blobs(seed + 7, 8)

    def loss(i: int) -> Tensor:
        (a, y), (b, z) = shapes(), colours()
        shape, colour = model(torch.cat([a, b], -1))
        return F.cross_entropy(shape, y) + F.cross_entropy(colour, z)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.1), updates=60)


def _probabilities(plain: Plain, head: str) -> str:
    seen = [o for o in plain.outputs[head] if o is not None]
    assert all(o.low >= 0 and o.high <= 1 for o in seen), "not probabilities"
    # With four classes no loss below log(1 + 3 / e) can be had of that head.
    assert plain.losses[-1] > 0.74
    return f"what {head} gives to cross_entropy lies between {min(o.low for o in seen):.2g} and {max(o.high for o in seen):.2g}"


class RmsBlocks(nn.Module):
    """Residual blocks with RMS normalisation, whose gains start at 1."""

    def __init__(self, blocks: int = 3, width: int = 32) -> None:
        super().__init__()
        self.enter = nn.Linear(16, width)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(blocks))
        self.feeds = nn.ModuleList(nn.Sequential(nn.Linear(width, 48), nn.SiLU(), nn.Linear(48, width)) for _ in range(blocks))
        self.leave = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.enter(x)
        for norm, feed in zip(self.norms, self.feeds, strict=True):
            hidden = hidden + feed(norm(hidden))
        return cast(Tensor, self.leave(hidden))


@sick(
    CASES,
    "hd_bfloat16_gains_of_one",
    ("frozen_weights",),
    ("norms",),
    source="https://github.com/vllm-project/speculators/pull/765 training fully in bfloat16: norm weights stay exactly 1.0",
    # Below 1 bfloat16 has steps of 0.004: half of one is more than Adam can do at this rate, whatever the gradient.
    proof=every(
        unchanged("norms.0.weight", "norms.1.weight", "norms.2.weight"), moves("enter.weight", "leave.weight", "enter.bias")
    ),
)
def _(seed: int) -> Setup:
    model, data = RmsBlocks().bfloat16(), Blobs(seed, batch=64, spread=1.5)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x.bfloat16()).float(), y)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=5e-4), updates=80)


@sick(
    CASES,
    "hd_clipped_before_unscaling",
    ("update_ratio_too_small",),
    also=("loss_plateau",),
    source="https://docs.pytorch.org/docs/stable/notes/amp_examples.html clipping: without unscale_ the limit is one of scaled gradients",
    proof=every(
        update_ratio(below=3e-5, last=15),
        noted("norm that was clipped", low=1e3),
        noted("norm that is left", high=1e-3),
        loss_stays(0.05),
    ),
)
def _(seed: int) -> Setup:
    model, data = BodyAndHead(), Pictures(seed, batch=24)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    notes: dict[str, list[float]] = {"norm that was clipped": [], "norm that is left": []}

    def train() -> Iterator[Event]:
        for _ in range(60):
            optimizer.zero_grad()
            x, y = data()
            with torch.autocast("cpu", dtype=torch.float16):
                value = F.cross_entropy(model(x), y)
            scaler.scale(value).backward()
            yield "read", [value]
            notes["norm that was clipped"].append(float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
            scaler.step(optimizer)
            notes["norm that is left"].append(norm_of(grads_of(model)))
            scaler.update()
            yield "step", [optimizer]

    return Noted(model, train, notes)


# ------------------------------------------------------------------------------------------------------------- healthy


def total(name: str, low: float = -math.inf, high: float = math.inf) -> Proof:
    """The sum of the notes lies between two bounds."""

    def proof(plain: Plain) -> str:
        assert isinstance(plain.setup, Noted)
        value = sum(plain.setup.notes[name])
        assert low <= value <= high, f"{name}: {value:.4g} in all, not {low:g} to {high:g}"
        return f"{name}: {value:.3g} in all"

    return proof


@healthy(
    CASES,
    "hd_scale_search_skips_some_updates",
    source="https://docs.pytorch.org/docs/stable/notes/amp_examples.html a GradScaler that starts high and tries to grow now and then",
    proof=every(converges(0.2), total("skipped", low=4, high=25)),
)
def _(seed: int) -> Setup:
    model, data = BodyAndHead(), Pictures(seed, batch=24)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=15)
    notes: dict[str, list[float]] = {"skipped": []}

    def train() -> Iterator[Event]:
        for _ in range(120):
            optimizer.zero_grad()
            x, y = data()
            with torch.autocast("cpu", dtype=torch.float16):
                value = F.cross_entropy(model(x), y)
            scaler.scale(value).backward()
            yield "read", [value]
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            skipped = scaler.get_scale() < before
            notes["skipped"].append(float(skipped))
            yield "step", [] if skipped else [optimizer]

    return Noted(model, train, notes)


@healthy(
    CASES,
    "hd_uneven_micro_batches",
    source="https://huggingface.co/blog/gradient_accumulation the sum over the tokens of all micro-batches, over their number",
    proof=converges(0.75),
)
def _(seed: int) -> Setup:
    model = TinyTransformer(layers=1)
    text = Text(seed, batch=24)
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)

    def train() -> Iterator[Event]:
        for i in range(120):
            x, y = text()
            sizes = [1, 4, 19] if i % 3 else [10, 14]
            lengths = torch.randint(3, 17, (24,), generator=g)
            y = torch.where(torch.arange(16) < lengths[:, None], y, -100)
            tokens = (y != -100).sum()
            optimizer.zero_grad()
            parts = []
            for a, b in zip(x.split(sizes), y.split(sizes), strict=True):
                part = F.cross_entropy(model(a).flatten(0, 1), b.flatten(), ignore_index=-100, reduction="sum") / tokens
                part.backward()
                parts.append(part)
            yield "read", parts
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "hd_gradual_unfreezing_with_new_groups",
    source="https://arxiv.org/abs/1801.06146 ULMFiT: gradual unfreezing and discriminative rates; the stem stays frozen",
    proof=every(
        converges(0.5),
        no_gradient("0.weight", "0.bias"),
        no_gradient("4.weight", last=60),
        no_gradient("2.weight", last=120),
        moves("6.weight", "6.bias"),
        moves("2.weight", first=120),
    ),
)
def _(seed: int) -> Setup:
    # Blobs of one seed have the same centres: the first task knows but two classes of the four.
    source, data = Blobs(seed, spread=1.5), Blobs(seed, spread=1.5)
    model = mlp(nn.SiLU, 3, 32)

    def coarse(i: int) -> Tensor:
        x, y = source()
        return F.cross_entropy(model(x), y // 2)

    pretrain(model, coarse, updates=60)
    model[6] = nn.Linear(32, 4)
    for layer in (0, 2, 4):
        model[layer].requires_grad_(False)
    optimizer = torch.optim.SGD(model[6].parameters(), lr=0.05, momentum=0.9)

    def before(i: int) -> None:
        for update, layer, lr in ((60, 4, 0.02), (120, 2, 0.01)):
            if i == update:
                model[layer].requires_grad_(True)
                optimizer.add_param_group({"params": list(model[layer].parameters()), "lr": lr})

    return fit(model, classify(model, data), optimizer, updates=180, before=before)


class StudentWithTeacher(nn.Module):
    """A student and its running mean, which no optimizer knows."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student
        self.teacher = copy.deepcopy(student).requires_grad_(False)

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Move the teacher."""
        for t, s in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            t.lerp_(s, 1 - decay)


@healthy(
    CASES,
    "hd_mean_teacher_on_few_labels",
    source="https://arxiv.org/abs/1703.01780 mean teachers: weights averaged over time are the targets of a consistency loss",
    proof=every(converges(0.5), no_gradient("teacher.0.weight", "teacher.4.weight"), total("accuracy at the end", low=0.85)),
)
def _(seed: int) -> Setup:
    model = StudentWithTeacher(nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 4)))
    data = Blobs(seed, batch=64, spread=1.2)
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.student.parameters(), lr=3e-3)
    notes: dict[str, list[float]] = {"accuracy at the end": []}

    def train() -> Iterator[Event]:
        for i in range(150):
            x, y = data()
            near, far = (x + 0.3 * torch.randn(x.shape, generator=g) for _ in range(2))
            optimizer.zero_grad()
            with torch.no_grad():
                wanted = model.teacher(far).softmax(-1)
            out = model.student(near)
            value = F.cross_entropy(out[:8], y[:8]) + min(1.0, i / 50) * F.mse_loss(out.softmax(-1), wanted)
            value.backward()
            yield "read", [value]
            optimizer.step()
            model.follow(min(0.97, 1 - 1 / (i + 1)))
            yield "step", [optimizer]
        x, y = data()
        with torch.no_grad():
            notes["accuracy at the end"].append(float((model.teacher(x).argmax(-1) == y).float().mean()))

    return Noted(model, train, notes)


@healthy(
    CASES,
    "hd_lbfgs_with_line_search",
    source="https://docs.pytorch.org/docs/stable/generated/torch.optim.LBFGS.html many closures a step, strong Wolfe conditions",
    proof=converges(0.2),
)
def _(seed: int) -> Setup:
    model = mlp(nn.Tanh, 2, 24, inputs=8, outputs=1)
    x, y = Curve(seed)(256)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1.0, max_iter=6, history_size=10, line_search_fn="strong_wolfe")

    def train() -> Iterator[Event]:
        for _ in range(40):
            values: list[Tensor] = []

            def closure(values: list[Tensor] = values) -> Tensor:
                optimizer.zero_grad()
                value = F.mse_loss(model(x), y) + 1e-4 * sum(p.square().sum() for p in model.parameters())
                value.backward()
                values.append(value)
                return value

            optimizer.step(closure)
            yield "read", values[:1]  # the gradients are those of the last closure
            yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "hd_sgd_by_hand_without_an_optimizer",
    source="https://docs.pytorch.org/tutorials/beginner/nn_tutorial.html weights -= weights.grad * lr, and grad.zero_()",
    proof=converges(0.35),
)
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, 2, 32, inputs=16, outputs=4)
    loss = classify(model, Blobs(seed, batch=64))

    def train() -> Iterator[Event]:
        lr = 0.2
        for i in range(200):
            value = loss(i)
            value.backward()
            yield "read", [value]
            with torch.no_grad():
                for p in model.parameters():
                    assert p.grad is not None
                    p.sub_(p.grad + 1e-4 * p, alpha=lr)
                    p.grad.zero_()
            lr *= 0.995
            yield "step", ["by hand"]

    return Setup(model, train)


@healthy(
    CASES,
    "hd_clipped_to_a_tiny_norm",
    source="https://arxiv.org/abs/1211.5063 clipping the norm; under Adam the level of the clip hardly matters",
    proof=every(converges(0.75), total("clipped", low=148)),
)
def _(seed: int) -> Setup:
    model = LstmLanguage()
    loss = classify(model, Text(seed, batch=12))
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    notes: dict[str, list[float]] = {"clipped": []}

    def between(i: int) -> None:
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        notes["clipped"].append(float(norm > 0.01))

    return Noted(model, fit(model, loss, optimizer, updates=150, between=between).train, notes)


class EncoderWithTwoUses(nn.Module):
    """An encoder whose code is decoded and classified."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 48), nn.ELU(), nn.Linear(48, 16))
        self.decoder = nn.Sequential(nn.ELU(), nn.Linear(16, 48), nn.ELU(), nn.Linear(48, 64))
        self.head = nn.Linear(16, 8)


@healthy(
    CASES,
    "hd_two_backward_passes_two_optimizers",
    source="https://docs.pytorch.org/docs/stable/notes/amp_examples.html multiple losses and optimizers, retain_graph; here in float32",
    proof=converges(0.5),
)
def _(seed: int) -> Setup:
    model, data = EncoderWithTwoUses(), Pictures(seed, batch=32)
    body = torch.optim.Adam([*model.encoder.parameters(), *model.decoder.parameters()], lr=2e-3, foreach=False)
    groups: list[dict[str, Any]] = [{"params": [model.head.weight], "weight_decay": 1e-3}, {"params": [model.head.bias]}]
    head = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)

    def train() -> Iterator[Event]:
        for _ in range(150):
            body.zero_grad(set_to_none=False)
            head.zero_grad(set_to_none=False)
            x, y = data()
            x = x.flatten(1)
            code = model.encoder(x)
            rebuilt = F.mse_loss(model.decoder(code), x)
            rebuilt.backward(retain_graph=True)
            named = F.cross_entropy(model.head(code), y)
            named.backward()
            yield "read", [rebuilt, named]
            head.step()
            body.step()
            yield "step", [head, body]

    return Setup(model, train)


@healthy(
    CASES,
    "hd_penalty_on_the_input_gradient",
    source="https://arxiv.org/abs/1711.09404 input-gradient regularisation: a backward pass through a backward pass",
    proof=every(converges(0.5), total("accuracy at the end", low=0.9)),
)
def _(seed: int) -> Setup:
    model, data = mlp(nn.Softplus, 2, 32), Blobs(seed, batch=48)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    notes: dict[str, list[float]] = {"accuracy at the end": []}

    def loss(i: int) -> Tensor:
        x, y = data()
        x.requires_grad_(True)
        # The weights are handed in from outside, as for an ensemble.
        out = functional_call(model, dict(model.named_parameters()), (x,))
        value = F.cross_entropy(out, y)
        (slope,) = torch.autograd.grad(value, x, create_graph=True)
        if i == 149:
            notes["accuracy at the end"].append(float((out.argmax(-1) == y).float().mean()))
        return value + 0.1 * (48 * slope).square().sum(1).mean()

    return Noted(model, fit(model, loss, optimizer, updates=150).train, notes)


@healthy(
    CASES,
    "hd_loss_scaled_by_hand_in_bfloat16",
    source="https://arxiv.org/abs/1710.03740 mixed precision training with a constant loss scale, divided out before the step",
    proof=converges(0.3),
)
def _(seed: int) -> Setup:
    model, data = GruClassifier(), Tones(seed, noise=0.15)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def train() -> Iterator[Event]:
        for _ in range(120):
            optimizer.zero_grad()
            x, y = data()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                value = F.cross_entropy(model(x).float(), y)
            (value * 4096).backward()
            yield "read", [value]
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.div_(4096)
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "hd_warm_up_from_zero_and_restarts",
    source="https://arxiv.org/abs/1608.03983 SGDR: warm restarts, after a linear warm-up from a rate of 0",
    proof=every(converges(0.3), noted("rate", 0, 1, high=0.0), total("restarts", low=3, high=3)),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 8),
    )
    noise = torch.Generator().manual_seed(seed)
    pictures = Pictures(seed, batch=32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.04, momentum=0.9, nesterov=True, weight_decay=5e-4)
    notes: dict[str, list[float]] = {"rate": [], "restarts": []}

    def rate(i: int) -> float:
        return i / 20 if i < 20 else 0.5 * (1 + math.cos(math.pi * ((i - 20) % 50) / 50))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    def train() -> Iterator[Event]:
        for i in range(200):
            notes["rate"].append(float(schedule.get_last_lr()[0]))
            notes["restarts"].append(float(i > 21 and notes["rate"][-1] > 2 * notes["rate"][-2]))
            optimizer.zero_grad()
            x, y = pictures()
            value = F.cross_entropy(model(x + torch.randn(x.shape, generator=noise)), y)
            value.backward()
            yield "read", [value]
            optimizer.step()
            schedule.step()
            yield "step", [optimizer]

    return Noted(model, train, notes)


class Loop(nn.Module):
    """One checkpointed block, used five times, and a buffer that is updated in place."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 32)
        self.block = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.leave = nn.Linear(32, 1)
        self.centre: Tensor
        self.register_buffer("centre", torch.zeros(32))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.enter(x)
        with torch.no_grad():
            self.centre.lerp_(hidden.mean(0), 0.05)
        hidden = hidden - self.centre.clone()
        for _ in range(5):
            hidden = hidden + 0.3 * cast(Tensor, checkpoint(self.block, hidden, use_reentrant=False))
        return cast(Tensor, self.leave(hidden))


@healthy(
    CASES,
    "hd_one_checkpointed_block_five_times",
    source="https://docs.pytorch.org/docs/stable/checkpoint.html use_reentrant=False; weights shared over depth as in arXiv 1807.03819",
    proof=every(converges(0.4), moves("block.1.weight", "block.3.weight", "enter.weight")),
)
def _(seed: int) -> Setup:
    model, data = Loop(), Curve(seed, features=4, batch=48)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.smooth_l1_loss(model(x), y)

    return fit(model, loss, optimizer, updates=200)


@healthy(
    CASES,
    "hd_dropout_gradient_noise_and_averaging",
    source="https://arxiv.org/abs/1511.06807 noise on the gradients; https://arxiv.org/abs/1803.05407 SWA over the last third",
    proof=every(converges(0.6), total("accuracy of the mean", low=0.9)),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(
        nn.Linear(16, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.6), nn.Linear(64, 4)
    )
    data = Blobs(seed, batch=48)
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    mean = torch.optim.swa_utils.AveragedModel(model)
    notes: dict[str, list[float]] = {"accuracy of the mean": []}

    def train() -> Iterator[Event]:
        for i in range(210):
            optimizer.zero_grad()
            x, y = data()
            value = F.cross_entropy(model(x), y)
            value.backward()
            yield "read", [value]
            for p in model.parameters():
                assert p.grad is not None
                p.grad.add_(torch.randn(p.shape, generator=g), alpha=0.01 / (1 + i) ** 0.55)
            optimizer.step()
            if i >= 140:
                optimizer.param_groups[0]["lr"] = 0.02
                mean.update_parameters(model)
            yield "step", [optimizer]
        x, y = data()
        mean.eval()
        with torch.no_grad():
            notes["accuracy of the mean"].append(float((mean(x).argmax(-1) == y).float().mean()))

    return Noted(model, train, notes)


class Reader(nn.Module):
    """Sees both sides of every place of a text."""

    def __init__(self, vocabulary: int = 25, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.mix = nn.Conv1d(width, width, 3, padding=1)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary - 1)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.mix(self.embed(tokens).transpose(1, 2)).transpose(1, 2)
        return cast(Tensor, self.head(self.norm(F.gelu(hidden))))


@healthy(
    CASES,
    "hd_few_masked_tokens_in_batches_of_2_to_48",
    source="https://arxiv.org/abs/1810.04805 masked tokens: the loss is the mean over those few that were hidden",
    proof=every(converges(0.75), noted("valid", low=2.0), noted("share valid", high=0.13)),
)
def _(seed: int) -> Setup:
    model, text = Reader(), Text(seed, batch=48)
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    notes: dict[str, list[float]] = {"valid": [], "share valid": []}

    def loss(i: int) -> Tensor:
        x = text()[0][: (48, 6, 24, 2, 36, 12)[i % 6]]
        hidden = torch.zeros_like(x, dtype=torch.bool)
        hidden.scatter_(1, torch.randint(1, x.shape[1] - 1, (len(x), 2), generator=g), True)
        notes["valid"].append(float(hidden.sum()))
        notes["share valid"].append(float(hidden.float().mean()))
        out = model(x.masked_fill(hidden, 24))
        return F.cross_entropy(out.flatten(0, 1), torch.where(hidden, x, -100).flatten(), ignore_index=-100)

    return Noted(model, fit(model, loss, optimizer, updates=240).train, notes)


@healthy(
    CASES,
    "hd_bfloat16_model_with_float32_masters",
    source="https://arxiv.org/abs/1710.03740 a master copy of the weights: the optimizer steps it, and it is copied into the model",
    proof=every(converges(0.3), moves("enter.weight", "leave.weight", last=100), lambda plain: _often(plain, "norms.1.weight")),
)
def _(seed: int) -> Setup:
    model, data = RmsBlocks(), Blobs(seed, batch=64, spread=1.2)
    masters = [p.detach().clone().requires_grad_(True) for p in model.parameters()]
    model.bfloat16()
    # The optimizer knows none of the model's parameters.
    optimizer = torch.optim.AdamW(masters, lr=2e-3, foreach=True)

    def train() -> Iterator[Event]:
        for _ in range(150):
            model.zero_grad()
            x, y = data()
            value = F.cross_entropy(model(x.bfloat16()).float(), y)
            value.backward()
            yield "read", [value]
            with torch.no_grad():
                for master, p in zip(masters, model.parameters(), strict=True):
                    assert p.grad is not None
                    master.grad = p.grad.float()
            optimizer.step()
            with torch.no_grad():
                for master, p in zip(masters, model.parameters(), strict=True):
                    p.copy_(master)
            yield "step", [optimizer]

    return Setup(model, train)


def _often(plain: Plain, name: str) -> str:
    moved = [s > 0 for s in plain.steps[name]]
    # Some steps of the masters are lost in the copy of 8 bits, but they add up in the master.
    assert all(any(moved[i : i + 5]) for i in range(95)), f"{name} stays for five updates"
    return f"{name} changes in {sum(moved)} of {len(moved)} updates"
