"""Runs of whatever encodes or classifies: pictures, tables, sets, graphs, embeddings, autoencoders, segmentation, fine-tuning."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Blobs, Case, Event, Pictures, Proof, Setup, classify, fit, healthy, initialise, mlp, sick
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


# ---------------------------------------------------------------------------------------------------------------------- data


class Table:
    """Rows of standardised columns and a smooth target of unit variance."""

    def __init__(self, seed: int, columns: int = 8, batch: int = 32, noise: float = 0.1) -> None:
        self.generator = torch.Generator().manual_seed(4000 + seed)
        self.a, self.b = torch.randn(2, columns, generator=self.generator) / math.sqrt(columns)
        self.columns, self.batch, self.noise = columns, batch, noise

    def __call__(self) -> tuple[Tensor, Tensor]:
        x = torch.randn(self.batch, self.columns, generator=self.generator)
        y = torch.sin(1.5 * (x @ self.a)) + 0.7 * (x @ self.b)
        return x, y[:, None] + self.noise * torch.randn(self.batch, 1, generator=self.generator)


class Shapes:
    """Pictures of 12 x 12 with a bright rectangle, and its mask, `[batch, 1, 12, 12]` and `[batch, 12, 12]`."""

    def __init__(self, seed: int, batch: int = 8, largest: int = 7) -> None:
        self.generator = torch.Generator().manual_seed(5000 + seed)
        self.batch, self.largest = batch, largest

    def __call__(self) -> tuple[Tensor, Tensor]:
        x = 0.5 * torch.randn(self.batch, 1, 12, 12, generator=self.generator) - 0.5
        y = torch.zeros(self.batch, 12, 12)
        for k in range(self.batch):
            top, left, high, wide = (int(v) for v in torch.randint(2, self.largest, (4,), generator=self.generator))
            y[k, top : top + high, left : left + wide] = 1
        return x + 2 * y[:, None], y


class Blurred(Pictures):
    """Pictures with so much noise, at unit variance, that some are mistaken."""

    def __call__(self) -> tuple[Tensor, Tensor]:
        x, y = super().__call__()
        return (x + 1.1 * torch.randn(x.shape, generator=self.generator)) / 1.3, y


class Sets:
    """Clouds of up to 12 points on a ring, on a line or in a blob: points `[batch, 12, 2]`, which of them exist, and the kind."""

    def __init__(self, seed: int, batch: int = 24) -> None:
        self.generator = torch.Generator().manual_seed(6000 + seed)
        self.batch = batch

    def __call__(self) -> tuple[Tensor, Tensor, Tensor]:
        kind = torch.randint(3, (self.batch,), generator=self.generator)
        t = 2 * math.pi * torch.rand(self.batch, 12, generator=self.generator)
        ring = torch.stack([t.cos(), t.sin()], -1)
        line = torch.stack([t / math.pi - 1, 0.5 * (t / math.pi - 1)], -1)
        x = torch.stack([1.4 * ring, 1.4 * line, torch.zeros_like(ring)])[kind, torch.arange(self.batch)]
        x = x + 0.3 * torch.randn(x.shape, generator=self.generator)
        sizes = torch.randint(5, 13, (self.batch,), generator=self.generator)
        return x, torch.arange(12) < sizes[:, None], kind


class Views:
    """Two noisy views each of a batch of things that are points of a low-dimensional space."""

    def __init__(self, seed: int, batch: int = 32, features: int = 16, noise: float = 0.3) -> None:
        self.generator = torch.Generator().manual_seed(7000 + seed)
        self.mix = torch.randn(5, features, generator=self.generator) / math.sqrt(5)
        self.batch, self.noise = batch, noise

    def __call__(self) -> tuple[Tensor, Tensor]:
        x = torch.randn(self.batch, 5, generator=self.generator) @ self.mix
        a, b = (x + self.noise * torch.randn(x.shape, generator=self.generator) for _ in range(2))
        return a, b


class Communities:
    """A graph of three communities: the normalised adjacency matrix, noisy features of the nodes, and their community."""

    def __init__(self, seed: int, nodes: int = 90, features: int = 12) -> None:
        generator = torch.Generator().manual_seed(8000 + seed)
        self.y = torch.arange(nodes) % 3
        same = self.y[:, None] == self.y
        edges = torch.rand(nodes, nodes, generator=generator) < torch.where(same, 0.2, 0.02)
        a = (edges.triu(1) | edges.triu(1).T).float() + torch.eye(nodes)
        self.adjacency = a / (a.sum(0)[:, None] * a.sum(0)).sqrt()
        centres = torch.randn(3, features, generator=generator)
        self.x = centres[self.y] + 1.5 * torch.randn(nodes, features, generator=generator)


class GraphConv(nn.Module):
    """A layer of a graph convolutional network."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        """Mix the neighbours' features."""
        out: Tensor = adjacency @ self.linear(x)
        return out


class Net(nn.Module):
    """Named parts, called by the loop one by one or in order."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        """One after another."""
        for part in self.children():
            x = part(x)
        return x


def convolutions(channels: tuple[int, ...], norm: bool = False) -> nn.Sequential:
    """3 x 3 convolutions with ReLU."""
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(channels):
        layers += [nn.Conv2d(a, b, 3, padding=1), *([nn.BatchNorm2d(b)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers)


def info_nce(a: Tensor, b: Tensor, temperature: float | Tensor = 0.2) -> Tensor:
    """The symmetric contrastive loss of two batches of views."""
    logits = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / temperature
    y = torch.arange(len(a))
    return (F.cross_entropy(logits, y) + F.cross_entropy(logits.T, y)) / 2


def clip(model: nn.Module, limit: float) -> Callable[[int], None]:
    """Clips the norm of all gradients, for `fit`."""

    def between(i: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), limit)

    return between


# -------------------------------------------------------------------------------------------------------------------- proofs


def _again(plain: Plain) -> Setup:
    """The run once more, for a measurement that `Plain` does not hold; its seed is the one last set."""
    seed = torch.initial_seed()
    torch.manual_seed(seed)
    return plain.case.build(seed)


def piles_up(parameter: str, until: int = 12) -> Proof:
    """`.grad` of the parameter at update `until` is the sum of the gradients of all backward passes so far."""

    def proof(plain: Plain) -> str:
        setup = _again(plain)
        p = named_parameters(setup.model)[parameter]
        fresh: list[Tensor] = []
        p.register_hook(lambda g: fresh.append(g.detach().clone()))
        reads = 0
        for kind, _ in setup.train():
            reads += kind == "read"
            if reads == until:
                break
        assert p.grad is not None
        total = torch.stack(fresh).sum(0)
        assert torch.allclose(p.grad, total, rtol=1e-3, atol=1e-6 * float(total.abs().max())), "the gradient is not the sum"
        others = float((p.grad - fresh[-1]).norm() / fresh[-1].norm())
        assert others > 0.5, f"older gradients make up {others:.3g} of the last one"
        return f"{parameter}: .grad is the sum of {len(fresh)} gradients, {others:.3g} times the last one is old"

    return proof


def unowned(*parameters: str) -> Proof:
    """No optimizer that steps holds these parameters; it holds all others."""

    def proof(plain: Plain) -> str:
        setup = _again(plain)
        named = named_parameters(setup.model)
        optimizers = next(what for kind, what in setup.train() if kind == "step")
        held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
        out = {name for name, p in named.items() if id(p) not in held}
        assert out == set(parameters), f"outside of the optimizer are {sorted(out)}"
        return f"in no optimizer: {', '.join(parameters)}"

    return proof


def moves(*parameters: str, last: int | None = None) -> Proof:
    """These parameters change with every step."""

    def proof(plain: Plain) -> str:
        for name in parameters:
            assert all(s > 0 for s in plain.steps[name][:last]), f"{name} stands still"
        return f"{', '.join(parameters)}: change"

    return proof


def finite_loss(update: int) -> Proof:
    """The loss of an update is an ordinary number."""

    def proof(plain: Plain) -> str:
        assert math.isfinite(plain.losses[update]), f"the loss of update {update} is {plain.losses[update]}"
        return f"the loss of update {update} is {plain.losses[update]:.3g}"

    return proof


def first_loss(above: float) -> Proof:
    """The loss of the untrained net."""

    def proof(plain: Plain) -> str:
        assert plain.losses[0] > above, f"the first loss is {plain.losses[0]:.3g}"
        return f"the first loss is {plain.losses[0]:.3g}"

    return proof


# ---------------------------------------------------------------------------------------------------------------------- sick


@sick(
    CASES,
    "en_sigmoid_autoencoder",
    ("vanishing_gradient",),
    tuple(str(i) for i in range(12)),
    source="https://proceedings.mlr.press/v9/glorot10a.html deep sigmoid nets; https://www.cs.toronto.edu/~hinton/science.pdf",
    proof=every(
        gradient_ratio("0.weight", "16.weight", 1e-4, last=15),
        gradient_ratio("6.weight", "16.weight", 1e-2, last=15),
        loss_stays(0.5, first=5),
    ),
    also=("loss_plateau",),
)
def _(seed: int) -> Setup:
    data = Blobs(seed, spread=0.3)
    model = mlp(nn.Sigmoid, 8, width=24, outputs=16)
    initialise(model, nn.init.xavier_normal_)

    def loss(i: int) -> Tensor:
        x, _ = data()
        return F.mse_loss(model(x), x)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), 60)


class _Round(torch.autograd.Function):
    """Rounding to a grid whose backward divides by the step of the grid: the straight-through gradient is that of x, not of x / step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: float) -> Tensor:
        ctx.step = step
        return (x / step).round() * step

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] / ctx.step, None


class Quantise(nn.Module):
    """Quantises activations."""

    def __init__(self, step: float) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        """To the grid."""
        out: Tensor = _Round.apply(x, self.step)  # type: ignore[no-untyped-call]
        return out


@sick(
    CASES,
    "en_quantised_classifier",
    ("exploding_gradient",),
    tuple(str(i) for i in range(18)),
    source="https://arxiv.org/abs/1308.3432 straight-through estimators, and https://arxiv.org/abs/1902.08153 step sizes",
    proof=every(gradient_ratio("18.weight", "0.weight", 1e-3, last=15), gradient_ratio("18.weight", "9.weight", 0.05, last=15)),
)
def _(seed: int) -> Setup:
    sizes = itertools.pairwise([16] + [32] * 6)
    layers = [m for a, b in sizes for m in (nn.Linear(a, b), nn.LeakyReLU(0.1), Quantise(0.125))]
    model = initialise(nn.Sequential(*layers, nn.Linear(32, 4)), lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu"))
    return fit(
        model,
        classify(model, Blobs(seed)),
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        60,
        between=clip(model, 1.0),
    )


@sick(
    CASES,
    "en_maximised_cross_entropy",
    ("loss_diverging",),
    source="https://docs.pytorch.org/docs/stable/generated/torch.optim.Adam.html the option maximize",
    proof=loss_grows(5, last=15),
    also=("exploding_gradient",),
)
def _(seed: int) -> Setup:
    model = mlp(nn.ELU, 2, width=48)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3, maximize=True)  # left over from a policy-gradient script
    return fit(model, classify(model, Blobs(seed, batch=48)), optimizer, 50)


@sick(
    CASES,
    "en_missing_value_code_in_target",
    ("gradient_spike", "loss_spike"),
    source="https://stats.stackexchange.com/questions/352036 what to do when a network doesn't learn: look at the data",
    proof=every(gradient_spikes(30, 100), lambda plain: _jump(plain, 30, 100)),
    onset=30,
)
def _(seed: int) -> Setup:
    data = Table(seed)
    model = mlp(nn.SiLU, 2, inputs=8, outputs=1)

    def loss(i: int) -> Tensor:
        x, y = data()
        if i == 30:
            y[5] = -9999.0  # the file's code for "not measured"
        return F.mse_loss(model(x), y)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=3e-3), 60)


def _jump(plain: Plain, update: int, factor: float) -> str:
    ratio = plain.losses[update] / median(plain.losses[update - 10 : update])
    assert ratio > factor, f"the loss of update {update} is {ratio:.3g} times the median of the ten before"
    return f"the loss of update {update} is {ratio:.3g} times the median of the ten before"


@sick(
    CASES,
    "en_pair_distance_of_duplicates",
    ("non_finite_gradient",),
    source="https://omoindrot.github.io/triplet-loss the gradient of the square root at a distance of 0",
    proof=every(first_non_finite(20), finite_loss(20)),
    onset=20,
    also=NON_FINITE,
)
def _(seed: int) -> Setup:
    data = Views(seed)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))

    def loss(i: int) -> Tensor:
        a, b = data()
        if i == 20:
            b[3] = a[3]  # the same picture twice in the data set, as a positive pair
        u, v = model(a), model(b)
        near = (u - v).pow(2).sum(1).sqrt()
        far = (u - v.roll(1, 0)).pow(2).sum(1).sqrt()
        out: Tensor = (near.pow(2) + F.relu(1.5 - far).pow(2)).mean()
        return out

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 40)


class MaskedMean(nn.Module):
    """Mean of the elements of a set that exist."""

    def forward(self, x: Tensor, exists: Tensor) -> Tensor:
        """`[batch, elements, features]` to `[batch, features]`."""
        return (x * exists[..., None]).sum(1) / exists.sum(1, keepdim=True)


@sick(
    CASES,
    "en_empty_set",
    ("non_finite_activation",),
    ("pool",),
    source="https://arxiv.org/abs/1703.06114 Deep Sets, with mean pooling of padded sets",
    proof=every(first_non_finite(25, "pool"), first_non_finite(25), lambda plain: _sound_before(plain, "encoder", 25)),
    onset=25,
    also=NON_FINITE,
)
def _(seed: int) -> Setup:
    data = Sets(seed)
    model = Net(
        encoder=nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU()), pool=MaskedMean(), head=nn.Linear(32, 3)
    )

    def loss(i: int) -> Tensor:
        x, exists, kind = data()
        if i == 25:
            exists[7] = False  # every point of this one was filtered out
        features = model.get_submodule("pool")(model.get_submodule("encoder")(x), exists)
        return F.cross_entropy(model.get_submodule("head")(features), kind)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 45)


def _sound_before(plain: Plain, module: str, update: int) -> str:
    seen = plain.outputs[module][update]
    assert seen is not None, f"{module} is not called"
    assert seen.nonfinite == 0, f"{module} gives NaN or Inf in update {update}"
    return f"{module} gives finite values in update {update}"


@sick(
    CASES,
    "en_crop_without_labels",
    ("non_finite_loss",),
    source="https://github.com/pytorch/pytorch/issues/70348 cross-entropy is NaN when all targets are ignored",
    proof=every(
        first_non_finite(18),
        lambda plain: _sound_before(plain, "", 18),
        lambda plain: f"{_nan(plain.losses[18])} is the loss of 18",
    ),
    onset=18,
)
def _(seed: int) -> Setup:
    data = Shapes(seed)
    model = nn.Sequential(*convolutions((1, 12, 12), norm=True), nn.Conv2d(12, 2, 1))

    def loss(i: int) -> Tensor:
        x, y = data()
        target = y.long()
        target[:, :, 0] = 255  # the border is nobody's
        if i in (18, 29):
            target[:] = 255  # a tile that nobody has labelled
        return F.cross_entropy(model(x), target, ignore_index=255)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), 40)


def _nan(value: float) -> float:
    assert math.isnan(value), f"{value} is a number"
    return value


@sick(
    CASES,
    "en_table_with_gaps",
    ("non_finite_input",),
    ("",),
    source="https://www.baeldung.com/cs/ml-training-nan-errors-fix NaN from missing values of the data",
    proof=every(first_non_finite(22), first_non_finite(22, "0")),
    onset=22,
    also=NON_FINITE,
)
def _(seed: int) -> Setup:
    data = Blobs(seed, features=10, classes=3)
    model = mlp(nn.GELU, 2, inputs=10, outputs=3)

    def loss(i: int) -> Tensor:
        x, y = data()
        if i >= 22:
            x[::9, 4] = math.nan  # from the second file on, a column has empty cells
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.RMSprop(model.parameters(), lr=1e-3), 40)


@sick(
    CASES,
    "en_prior_bias_everywhere",
    ("dead_units", "poor_init"),
    tuple(str(i) for i in range(6)),
    source="https://arxiv.org/abs/1708.02002 focal loss, 4.1: the bias of the last layer, not of all, starts at -log((1 - p) / p)",
    proof=every(dead_fraction("1", 0.8, last=15), dead_fraction("3", 0.9, last=15)),
    also=("zero_gradient", "vanishing_gradient", "loss_plateau"),
)
def _(seed: int) -> Setup:
    data = Shapes(seed, largest=5)
    model = nn.Sequential(*convolutions((1, 16, 16, 16)), nn.Conv2d(16, 1, 1))
    initialise(model, lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu"))
    for m in model:
        if isinstance(m, nn.Conv2d) and m.bias is not None:
            nn.init.constant_(m.bias, -math.log(0.999 / 0.001))

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.binary_cross_entropy_with_logits(model(x)[:, 0], y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-3), 50)


class Dense(nn.Module):
    """A hand-written linear layer."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Affine."""
        return F.linear(x, self.weight, self.bias)


@sick(
    CASES,
    "en_handwritten_tanh_layers",
    ("saturated_activation", "poor_init"),
    tuple(str(i) for i in range(6)),
    source="https://cs231n.github.io/neural-networks-2/ calibrating the variances of the weights",
    proof=lambda plain: _flat(plain, ("3", "5"), 0.7),
)
def _(seed: int) -> Setup:
    data = Table(seed, columns=12)
    model = nn.Sequential(Dense(12, 64), nn.Tanh(), Dense(64, 64), nn.Tanh(), Dense(64, 64), nn.Tanh(), nn.Linear(64, 1))

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.smooth_l1_loss(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-3), 60)


def _flat(plain: Plain, modules: tuple[str, ...], above: float) -> str:
    """Share of the outputs beyond 0.97 in absolute value, of fresh inputs through the net as it starts and as it is after 15 updates."""
    setup = _again(plain)
    shares: dict[str, list[float]] = {m: [] for m in modules}
    assert isinstance(setup.model, nn.Module)
    for name in modules:
        setup.model.get_submodule(name).register_forward_hook(
            lambda m, a, out, name=name: shares[name].append(float((out.abs() > 0.97).float().mean()))
        )
    for _ in itertools.islice(setup.train(), 30):
        pass
    least = min(median(v) for v in shares.values())
    assert least > above, f"{least:.3g} of the outputs lie in the flat part"
    return f"{least:.3g} of the outputs of {', '.join(modules)} are beyond 0.97"


@sick(
    CASES,
    "en_cached_node_features",
    ("missing_gradient",),
    ("encoder",),
    source="https://arxiv.org/abs/1609.02907 graph convolutions, with features that went through .data",
    proof=every(
        no_gradient("encoder.first.linear.weight", "encoder.second.linear.weight", last=30),
        moves("decoder.0.weight", "decoder.2.weight", last=30),
    ),
)
def _(seed: int) -> Setup:
    graph = Communities(seed)
    encoder = Net(first=GraphConv(12, 24), second=GraphConv(24, 16))
    model = Net(encoder=encoder, decoder=nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 3)))

    def loss(i: int) -> Tensor:
        h = F.relu(encoder.get_submodule("first")(graph.x, graph.adjacency))
        h = encoder.get_submodule("second")(h, graph.adjacency)
        features = torch.as_tensor(h.data.numpy())  # "to be safe", as in the script that only evaluates
        return F.cross_entropy(model.get_submodule("decoder")(features), graph.y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=5e-4), 60)


@sick(
    CASES,
    "en_simclr_projector_never_called",
    ("missing_gradient",),
    ("projector",),
    source="https://arxiv.org/abs/2002.05709 SimCLR, its loss taken of h instead of z",
    proof=every(
        no_gradient("projector.0.weight", "projector.2.weight"),
        lambda plain: _never_called(plain, "projector"),
        moves("encoder.0.weight"),
    ),
)
def _(seed: int) -> Setup:
    data = Views(seed, batch=48)
    model = Net(
        encoder=nn.Sequential(nn.Linear(16, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 24)),
        projector=nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 12)),
    )

    def loss(i: int) -> Tensor:
        a, b = (model.get_submodule("encoder")(v) for v in data())
        return info_nce(a, b, 0.5)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=2e-3), 60)


def _never_called(plain: Plain, module: str) -> str:
    assert all(seen is None for seen in plain.outputs[module]), f"{module} is called"
    return f"{module} is never called"


@sick(
    CASES,
    "en_auxiliary_weight_of_zero",
    ("zero_gradient",),
    ("age",),
    source="https://arxiv.org/abs/1705.07115 weights of the losses of several tasks",
    proof=every(zero_gradient("age.0.weight", "age.2.weight", "age.2.bias", last=15), moves("trunk.0.weight", "kind.weight")),
)
def _(seed: int) -> Setup:
    pictures, tasks = Blurred(seed, classes=6), 4
    model = Net(
        trunk=nn.Sequential(*convolutions((1, 12, 24), norm=True), nn.AdaptiveAvgPool2d((1, 8)), nn.Flatten()),
        kind=nn.Linear(192, 6),
        age=nn.Sequential(nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 1)),
    )
    weight = 1 // tasks  # as Python 2 did it

    def loss(i: int) -> Tensor:
        x, y = pictures()
        h = model.get_submodule("trunk")(x)
        age = (y.float()[:, None] - 2.5) / 1.7
        return F.cross_entropy(model.get_submodule("kind")(h), y) + weight * F.mse_loss(model.get_submodule("age")(h), age)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), 40)


@sick(
    CASES,
    "en_segmentation_without_zero_grad",
    ("gradients_not_zeroed",),
    source="https://karpathy.github.io/2019/04/25/recipe/ common mistakes: forgetting zero_grad before backward",
    proof=piles_up("0.weight"),
    also=("exploding_gradient",),
)
def _(seed: int) -> Setup:
    data = Shapes(seed)
    model = nn.Sequential(*convolutions((1, 12, 12), norm=True), nn.Conv2d(12, 1, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def train() -> Iterator[Event]:
        for _ in range(50):
            x, y = data()
            loss = F.binary_cross_entropy_with_logits(model(x)[:, 0], y)
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


@sick(
    CASES,
    "en_head_replaced_after_the_optimizer",
    ("not_in_optimizer",),
    ("fc",),
    source="https://docs.pytorch.org/tutorials/beginner/finetuning_torchvision_models_tutorial.html; "
    "https://github.com/microsoft/nni/issues/4521 replaced layers that the optimizer does not know",
    proof=every(unowned("fc.weight", "fc.bias"), unchanged("fc.weight", "fc.bias"), moves("backbone.0.weight")),
)
def _(seed: int) -> Setup:
    backbone = nn.Sequential(
        nn.Linear(24, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1)
    )
    model = Net(backbone=backbone, fc=nn.Linear(64, 100))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True)
    model.add_module("fc", nn.Linear(64, 7))
    return fit(
        model, classify(model, Blobs(seed, features=24, classes=7, batch=48)), optimizer, 40, before=lambda i: model.zero_grad()
    )


class Margin(nn.Module):
    """Additive angular margin: the cosines to the classes' directions, that of the true class less a margin."""

    def __init__(self, features: int, classes: int, scale: float = 16.0, margin: float = 0.2) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(classes, features)))
        self.scale, self.margin = scale, margin

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss."""
        cosine = F.normalize(x, dim=1) @ F.normalize(self.weight, dim=1).T
        angle = cosine.clamp(-0.999, 0.999).acos()
        hit = F.one_hot(y, len(self.weight)).bool()
        return F.cross_entropy(self.scale * torch.where(hit, (angle + self.margin).cos(), cosine), y)


@sick(
    CASES,
    "en_margin_loss_left_out",
    ("not_in_optimizer",),
    ("margin",),
    source="https://kevinmusgrave.github.io/pytorch-metric-learning/losses/ losses with weights need an optimizer; "
    "https://github.com/ronghuaiyang/arcface-pytorch/issues/20",
    proof=every(unowned("margin.weight"), unchanged("margin.weight"), moves("encoder.0.weight")),
)
def _(seed: int) -> Setup:
    data = Blobs(seed, classes=6, batch=48)
    encoder, margin = nn.Sequential(nn.Linear(16, 48), nn.PReLU(), nn.Linear(48, 12)), Margin(12, 6)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=3e-3)

    def train() -> Iterator[Event]:
        for _ in range(60):
            x, y = data()
            loss = margin(encoder(x), y)
            encoder.zero_grad()
            margin.zero_grad()
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]

    return Setup({"encoder": encoder, "margin": margin}, train)


@sick(
    CASES,
    "en_step_without_parentheses",
    ("never_stepped",),
    source="https://blog.slavv.com/37-reasons-why-your-neural-network-is-not-working-4020854bd607",
    proof=lambda plain: _stands_still(plain),
    also=("loss_plateau",),
)
def _(seed: int) -> Setup:
    data = Blobs(seed, features=20, classes=5)
    model = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def train() -> Iterator[Event]:
        for _ in range(40):
            x, y = data()
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            yield "read", [loss]
            optimizer.step  # noqa: B018
            yield "step", []

    return Setup(model, train)


def _stands_still(plain: Plain) -> str:
    for name, norms in plain.weights.items():
        assert len(set(norms)) == 1, f"{name} changes"
        assert all(math.isnan(s) for s in plain.steps[name]), "an optimizer steps"
        assert min(plain.grads[name]) >= 0, f"{name} has no gradient"
    return "no optimizer steps, and no weight changes"


@sick(
    CASES,
    "en_layerwise_rates_of_zero",
    ("frozen_weights",),
    ("stem", "stages.0", "stages.1"),
    source="https://arxiv.org/abs/1801.06146 discriminative fine-tuning: a rate for every layer",
    proof=every(
        unchanged("stem.0.weight", "stages.0.0.weight", "stages.1.0.weight", last=30),
        moves("stages.2.0.weight", "head.weight", last=30),
    ),
)
def _(seed: int) -> Setup:
    stages = nn.Sequential(*(nn.Sequential(nn.Linear(40, 40), nn.LayerNorm(40), nn.GELU()) for _ in range(3)))
    model = Net(stem=nn.Sequential(nn.Linear(16, 40), nn.GELU()), stages=stages, head=nn.Linear(40, 6))
    layers = [model.get_submodule("stem"), *stages, model.get_submodule("head")]
    # The factor was meant to be k / 3: the whole division leaves the first three layers with nothing.
    groups = [{"params": list(m.parameters()), "lr": 2e-3 * (k // 3)} for k, m in enumerate(layers)]
    return fit(model, classify(model, Blobs(seed, classes=6)), torch.optim.AdamW(groups, weight_decay=0.01), 50)


@sick(
    CASES,
    "en_rate_of_another_optimizer",
    ("update_ratio_too_large",),
    source="https://blog.slavv.com/37-reasons-why-your-neural-network-is-not-working-4020854bd607 the learning rate",
    proof=every(update_ratio(above=1.0, last=1), update_ratio(above=0.1, last=12)),
    also=("loss_diverging", "loss_spike", "gradient_spike"),
)
def _(seed: int) -> Setup:
    data = Views(seed, batch=48)
    model = nn.Sequential(
        nn.Linear(16, 48), nn.LayerNorm(48), nn.GELU(), nn.Linear(48, 48), nn.LayerNorm(48), nn.GELU(), nn.Linear(48, 16)
    )

    def loss(i: int) -> Tensor:
        a, b = data()
        return F.mse_loss(model(a), b)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1.0), 40)  # the 1.0 was tuned for SGD


@sick(
    CASES,
    "en_rate_for_a_transformer",
    ("update_ratio_too_small",),
    source="https://docs.pytorch.org/tutorials/beginner/transfer_learning_tutorial.html with the rate of an AdamW script",
    proof=every(update_ratio(below=1e-5, last=15), loss_stays(0.1)),
    also=("loss_plateau",),
)
def _(seed: int) -> Setup:
    pictures = Pictures(seed, batch=24)
    model = nn.Sequential(*convolutions((1, 12, 16)), nn.AdaptiveAvgPool2d((2, 8)), nn.Flatten(), nn.Linear(256, 8))
    initialise(model, lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu"))
    return fit(model, classify(model, pictures), torch.optim.SGD(model.parameters(), lr=1e-5), 40)


@sick(
    CASES,
    "en_labels_out_of_order",
    ("loss_plateau",),
    source="https://blog.slavv.com/37-reasons-why-your-neural-network-is-not-working-4020854bd607 shuffled inputs, unshuffled labels",
    proof=every(loss_stays(0.05, last=100), lambda plain: _at_chance(plain, 8)),
    within=100,  # a plateau
)
def _(seed: int) -> Setup:
    pictures = Pictures(seed, batch=24)
    model = nn.Sequential(*convolutions((1, 8, 16), norm=True), nn.AdaptiveAvgPool2d((2, 8)), nn.Flatten(), nn.Linear(256, 8))
    order = torch.Generator().manual_seed(9000 + seed)

    def loss(i: int) -> Tensor:
        x, y = pictures()
        x = x[torch.randperm(len(x), generator=order)]
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=5e-4), 160)


def _at_chance(plain: Plain, classes: int) -> str:
    level = median(plain.losses[-60:]) / math.log(classes)
    assert level > 0.97, f"the loss is {level:.3g} of that of guessing"
    return f"the loss is {level:.3g} of that of guessing"


class SignedRoot(nn.Module):
    """Outer product of two encodings, and the root of its elements with their sign."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """`[batch, n]` and `[batch, m]` to `[batch, n * m]`, of length 1."""
        product = (a[:, :, None] * b[:, None]).flatten(1)
        return F.normalize(product.sign() * product.abs().sqrt(), dim=1)


@sick(
    CASES,
    "en_bilinear_signed_root",
    ("loss_scale_collapse", "non_finite_gradient"),
    source="https://arxiv.org/abs/1504.07889 bilinear pooling, with the root of an exact 0; "
    "https://github.com/Junjue-Wang/FactSeg/issues/6 a loss scale that only falls",
    proof=every(first_non_finite(0), finite_loss(0), lambda plain: _all_skipped(plain, 20)),
    also=("never_stepped", "loss_plateau"),
)
def _(seed: int) -> Setup:
    data = Blobs(seed, features=20)
    model = Net(
        left=nn.Sequential(nn.Linear(10, 12), nn.ReLU()),
        right=nn.Sequential(nn.Linear(10, 12), nn.ReLU()),
        fuse=SignedRoot(),
        head=nn.Linear(144, 4),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    scaler = torch.amp.GradScaler("cpu")

    def train() -> Iterator[Event]:
        for _ in range(40):
            x, y = data()
            optimizer.zero_grad()
            a, b = model.get_submodule("left")(x[:, :10]), model.get_submodule("right")(x[:, 10:])
            loss = F.cross_entropy(model.get_submodule("head")(model.get_submodule("fuse")(a, b)), y)
            scaler.scale(loss).backward()
            yield "read", [loss]
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            yield "step", [optimizer] if scaler.get_scale() >= scale else []

    return Setup(model, train)


def _all_skipped(plain: Plain, updates: int) -> str:
    for name, norms in plain.weights.items():
        assert len(set(norms[:updates])) == 1, f"{name} changes"
        assert all(math.isnan(s) for s in plain.steps[name][:updates]), "a step is not skipped"
    return f"the scaler skips {updates} steps in a row"


@sick(
    CASES,
    "en_unit_normal_convolutions",
    ("poor_init", "exploding_gradient"),
    ("0", "2", "4", "6", "9"),
    source="https://arxiv.org/abs/1502.01852 what the deviation of a convolution's weights should be",
    proof=every(first_loss(50 * math.log(8)), gradient_ratio("9.bias", "0.bias", 1e-2, last=15)),
)
def _(seed: int) -> Setup:
    pictures = Pictures(seed, batch=24)
    model = nn.Sequential(*convolutions((1, 16, 16, 16, 16)), nn.Flatten(), nn.Linear(1024, 8))
    initialise(model, nn.init.normal_, (nn.Conv2d, nn.Linear))
    return fit(model, classify(model, pictures), torch.optim.Adam(model.parameters(), lr=1e-3), 50)


@sick(
    CASES,
    "en_raw_columns",
    ("unnormalized_input",),
    ("",),
    also=("dead_units",),
    source="https://forecastegy.com/posts/do-neural-networks-need-feature-scaling-or-normalization/",
    proof=lambda plain: _large_inputs(plain, "0", 1000),
)
def _(seed: int) -> Setup:
    data = Table(seed, columns=8)
    model = mlp(nn.ReLU, 2, inputs=8, outputs=1)
    # age, income, a year, square metres, rooms, latitude, longitude, price of the neighbourhood
    means = torch.tensor([40.0, 52000.0, 1995.0, 95.0, 4.0, 47.0, 8.0, 310000.0])
    deviations = torch.tensor([15.0, 21000.0, 12.0, 40.0, 1.5, 0.8, 0.9, 120000.0])

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.mse_loss(model(means + deviations * x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-3), 60)


def _large_inputs(plain: Plain, layer: str, above: float) -> str:
    """Root mean square of what goes in."""
    setup = _again(plain)
    assert isinstance(setup.model, nn.Module)
    seen: list[float] = []
    setup.model.get_submodule(layer).register_forward_pre_hook(lambda m, a: seen.append(float(a[0].square().mean().sqrt())))
    for _ in itertools.islice(setup.train(), 10):
        pass
    assert median(seen) > above, f"the inputs are {median(seen):.3g} large"
    return f"the inputs have a root mean square of {median(seen):.3g}"


@sick(
    CASES,
    "en_softmax_before_cross_entropy",
    ("double_softmax",),
    ("head.2",),
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html the input is unnormalised logits",
    proof=lambda plain: _probabilities(plain, "head.2", 6),
)
def _(seed: int) -> Setup:
    data = Blobs(seed, features=16, classes=6, batch=48)
    model = Net(
        body=nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU()),
        head=nn.Sequential(nn.Dropout(0.1), nn.Linear(64, 6), nn.Softmax(dim=1)),
    )
    return fit(model, classify(model, data), torch.optim.Adam(model.parameters(), lr=2e-3), 60)


def _probabilities(plain: Plain, module: str, classes: int) -> str:
    """What goes into the cross-entropy sums to 1, so that its value cannot fall below that of certainty."""
    floor = math.log(math.e + classes - 1) - 1
    setup = _again(plain)
    assert isinstance(setup.model, nn.Module)
    out: list[Tensor] = []
    setup.model.get_submodule(module).register_forward_hook(lambda m, a, o: out.append(o.detach()))
    for _ in itertools.islice(setup.train(), 10):
        pass
    assert all(torch.allclose(o.sum(1), torch.ones(len(o))) for o in out), "the outputs do not sum to 1"
    assert min(plain.losses) > floor, f"the loss falls to {min(plain.losses)}"
    return f"{module} gives probabilities, and the loss stays above {floor:.3g}"


# ------------------------------------------------------------------------------------------------------------------- healthy


def pretrained(seed: int, data: Callable[[], tuple[Tensor, Tensor]], body: nn.Module, features: int, classes: int) -> nn.Module:
    """The body after a short training with a head that is thrown away."""
    net = nn.Sequential(body, nn.Linear(features, classes))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(60):
        x, y = data()
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return body


@healthy(
    CASES,
    "en_probe_of_a_frozen_backbone",
    source="https://docs.pytorch.org/tutorials/beginner/transfer_learning_tutorial.html the network as a fixed feature extractor",
    proof=every(converges(0.35), lambda plain: _untouched(plain, "backbone.0.weight")),
)
def _(seed: int) -> Setup:
    pictures = Blurred(seed, batch=32)
    body = nn.Sequential(*convolutions((1, 8, 16), norm=True), nn.AdaptiveAvgPool2d((2, 8)), nn.Flatten())
    pretrained(seed, pictures, body, 256, 8)
    for p in body.parameters():
        p.requires_grad_(False)
    body.eval()
    head = nn.Linear(256, 8)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    model = Net(backbone=body, head=head)
    return fit(model, classify(model, pictures), torch.optim.SGD(head.parameters(), lr=0.02, momentum=0.9), 100)


def _untouched(plain: Plain, *parameters: str) -> str:
    for name in parameters:
        assert all(math.isnan(g) for g in plain.grads[name]), f"{name} has a gradient"
        assert len(set(plain.weights[name])) == 1, f"{name} changes"
    return f"{', '.join(parameters)} frozen"


@healthy(
    CASES,
    "en_gentle_fine_tuning",
    source="https://arxiv.org/abs/1801.06146 small rates for pretrained layers; warm-up from 0, a new head that starts at 0",
    proof=converges(0.5),
)
def _(seed: int) -> Setup:
    data = Blobs(seed, classes=5, batch=32)
    body = nn.Sequential(nn.Linear(16, 48), nn.LayerNorm(48), nn.GELU(), nn.Linear(48, 48), nn.LayerNorm(48), nn.GELU())
    pretrained(seed, lambda: ((b := data())[0], b[1] % 2), body, 48, 2)
    head = nn.Linear(48, 5)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    model = Net(backbone=body, head=head)
    optimizer = torch.optim.AdamW([{"params": body.parameters(), "lr": 2e-5}, {"params": head.parameters(), "lr": 1e-2}])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(i / 20, 1.0))

    def before(i: int) -> None:
        if i:
            schedule.step()

    return fit(model, classify(model, data), optimizer, 150, before=before)


@healthy(
    CASES,
    "en_rare_findings",
    source="https://arxiv.org/abs/1708.02002 4.1, a head whose bias starts at the rate of the positives",
    proof=every(converges(0.6), lambda plain: _finds(plain)),
)
def _(seed: int) -> Setup:
    data = _Findings(seed)
    model = Net(trunk=nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()), findings=nn.Linear(64, 12))
    head = model.get_submodule("findings")
    assert isinstance(head, nn.Linear)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.constant_(head.bias, math.log(0.03 / 0.97))

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.binary_cross_entropy(model(x).sigmoid(), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-3), 250)


class _Findings:
    """Twelve findings, each there in about 3 of 100 rows, where a projection of the row is large."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(10000 + seed)
        self.directions = torch.linalg.qr(torch.randn(24, 12, generator=self.generator))[0]

    def __call__(self) -> tuple[Tensor, Tensor]:
        x = torch.randn(64, 24, generator=self.generator)
        return x, (x @ self.directions > 1.88).float()


def _finds(plain: Plain) -> str:
    model = plain.setup.model
    assert isinstance(model, nn.Module)
    data = _Findings(torch.initial_seed())
    with torch.no_grad():
        batches = [data() for _ in range(300)][-20:]
        p = torch.cat([model(x) for x, _ in batches]).sigmoid()
    y = torch.cat([y for _, y in batches])
    lift = float(p[y > 0].mean() / p[y == 0].mean())
    assert lift > 10, f"positives have {lift:.3g} times the probability of negatives"
    return f"positives have {lift:.3g} times the probability of negatives"


@healthy(
    CASES,
    "en_smoothed_labels",
    source="https://arxiv.org/abs/1906.02629 label smoothing: the loss ends at the entropy of the smoothed labels",
    proof=lambda plain: _near_floor(plain, 8, 0.2),
)
def _(seed: int) -> Setup:
    pictures = Pictures(seed, batch=24)
    model = nn.Sequential(*convolutions((1, 8, 16), norm=True), nn.AdaptiveAvgPool2d((2, 8)), nn.Flatten(), nn.Linear(256, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 250)
    return fit(
        model,
        classify(model, pictures, label_smoothing=0.2),
        optimizer,
        250,
        before=lambda i: schedule.step() if i else None,
    )


def _near_floor(plain: Plain, classes: int, smoothing: float) -> str:
    low, high = smoothing / classes, 1 - smoothing + smoothing / classes
    floor = -high * math.log(high) - (classes - 1) * low * math.log(low)
    last = median(plain.losses[-25:])
    assert last < 1.05 * floor, f"the loss ends at {last:.4g}, the floor is {floor:.4g}"
    return f"the loss falls from {plain.losses[0]:.4g} to {last:.4g}, the floor is {floor:.4g}"


@healthy(
    CASES,
    "en_exact_fit",
    source="https://stats.stackexchange.com/questions/352036 first overfit a small data set: the gradients end near 0",
    proof=every(
        converges(1e-2), lambda plain: f"the gradient falls to {plain.grads['2.weight'][-1] / plain.grads['2.weight'][0]:.2g}"
    ),
)
def _(seed: int) -> Setup:
    x, y = Table(seed, columns=6, batch=24, noise=0.0)()
    model = mlp(nn.SiLU, 2, width=64, inputs=6, outputs=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400, eta_min=1e-5)
    return fit(model, lambda i: F.mse_loss(model(x), y), optimizer, 400, before=lambda i: schedule.step() if i else None)


class _Vae(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(144, 48), nn.GELU(), nn.Linear(48, 8))
        self.decoder = nn.Sequential(nn.Linear(4, 48), nn.ReLU(), nn.Linear(48, 144))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, 1)
        z = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        return self.decoder(z), mean, log_variance


@healthy(
    CASES,
    "en_vae_with_summed_loss",
    source="https://github.com/pytorch/examples/tree/main/vae: binary cross-entropy and divergence, summed over pixels and batch",
    proof=converges(0.6),
)
def _(seed: int) -> Setup:
    data = Shapes(seed, batch=64)
    model = _Vae()

    def loss(i: int) -> Tensor:
        _, y = data()
        logits, mean, log_variance = model(y)
        divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum()
        out: Tensor = F.binary_cross_entropy_with_logits(logits, y.flatten(1), reduction="sum") + divergence
        return out

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-3), 250)


@healthy(
    CASES,
    "en_warm_restarts",
    source="https://arxiv.org/abs/1608.03983 SGDR",
    proof=converges(0.65),
)
def _(seed: int) -> Setup:
    pictures = Blurred(seed, classes=12, batch=24)
    model = nn.Sequential(*convolutions((1, 12, 24), norm=True), nn.AdaptiveAvgPool2d((2, 8)), nn.Flatten(), nn.Linear(384, 12))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=40, T_mult=2, eta_min=1e-5)
    return fit(model, classify(model, pictures), optimizer, 280, before=lambda i: schedule.step() if i else None)


@healthy(
    CASES,
    "en_momentum_teacher",
    source="https://arxiv.org/abs/2006.07733 BYOL",
    proof=every(converges(0.6), lambda plain: _retrieves(plain)),
)
def _(seed: int) -> Setup:
    data = Views(seed, batch=64)

    def encoder() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 16))

    model = Net(
        student=encoder(),
        teacher=encoder(),
        predictor=nn.Sequential(nn.Linear(16, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 16)),
    )
    student, teacher, predictor = (model.get_submodule(m) for m in ("student", "teacher", "predictor"))
    teacher.load_state_dict(student.state_dict())
    for p in teacher.parameters():
        p.requires_grad_(False)
    optimizer = torch.optim.AdamW([*student.parameters(), *predictor.parameters()], lr=3e-3, weight_decay=1e-3)

    def train() -> Iterator[Event]:
        for _ in range(250):
            a, b = data()
            optimizer.zero_grad()
            with torch.no_grad():
                targets = teacher(b), teacher(a)
            loss = sum(
                (2 - 2 * F.cosine_similarity(predictor(student(v)), t).mean() for v, t in zip((a, b), targets, strict=True)),
                torch.zeros(()),
            )
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            with torch.no_grad():
                for p, q in zip(teacher.parameters(), student.parameters(), strict=True):
                    p.lerp_(q, 0.02)
            yield "step", [optimizer]

    return Setup(model, train)


def _retrieves(plain: Plain) -> str:
    """How often the nearest of 64 other views is the one of the same thing."""
    model = plain.setup.model
    assert isinstance(model, nn.Module)
    student = model.get_submodule("student")
    data = Views(torch.initial_seed(), batch=64)
    hits = []
    with torch.no_grad():
        for a, b in (data() for _ in range(10)):
            u, v = (F.normalize(student(x), dim=1) for x in (a, b))
            hits.append(float(((u @ v.T).argmax(1) == torch.arange(64)).float().mean()))
    rate = sum(hits) / len(hits)
    assert rate > 0.5, f"the right view is found in {rate:.3g} of the cases"
    return f"the right one of 64 views is found in {rate:.3g} of the cases"


class _TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.picture = nn.Sequential(nn.Linear(16, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 24))
        self.words = nn.Sequential(nn.Linear(10, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 24))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.2)))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        scale = self.logit_scale.clamp(max=math.log(100)).exp()
        return info_nce(self.picture(a), self.words(b), 1 / scale)


@healthy(
    CASES,
    "en_two_towers_with_temperature",
    source="https://arxiv.org/abs/2103.00020 CLIP",
    proof=converges(0.45),
)
def _(seed: int) -> Setup:
    data = Views(seed, batch=48)
    words = torch.randn(16, 10, generator=torch.Generator().manual_seed(11000 + seed)) / 4
    model = _TwoTowers()
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.2}, {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}],
        lr=2e-3,
        betas=(0.9, 0.98),
    )

    def loss(i: int) -> Tensor:
        a, b = data()
        out: Tensor = model(a, torch.tanh(b @ words))
        return out

    return fit(model, loss, optimizer, 250)


class _Block(nn.Module):
    """Pre-norm residual block with LayerScale and stochastic depth."""

    def __init__(self, width: int, drop: float) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.gamma = nn.Parameter(1e-4 * torch.ones(width))
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        if self.training and float(torch.rand(())) < self.drop:
            return x
        branch: Tensor = self.gamma * self.down(F.gelu(self.up(self.norm(x)))) / (1 - self.drop)
        return x + branch


@healthy(
    CASES,
    "en_layer_scale_stochastic_depth_mixup",
    source="https://arxiv.org/abs/2103.17239 LayerScale; https://arxiv.org/abs/1603.09382; https://arxiv.org/abs/1710.09412 mixup",
    proof=converges(0.75),
)
def _(seed: int) -> Setup:
    data = Blobs(seed, classes=6, batch=48)
    model = Net(
        stem=nn.Linear(16, 32),
        blocks=nn.Sequential(*(_Block(32, 0.05 * k) for k in range(1, 7))),
        norm=nn.LayerNorm(32),
        head=nn.Linear(32, 6),
    )
    mix = torch.distributions.Beta(0.3, 0.3)

    def loss(i: int) -> Tensor:
        x, y = data()
        share = mix.sample()
        out = model(share * x + (1 - share) * x.flip(0))
        return share * F.cross_entropy(out, y) + (1 - share) * F.cross_entropy(out, y.flip(0))

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05), 200)


@healthy(
    CASES,
    "en_deep_plain_tanh",
    source="https://arxiv.org/abs/1711.04735 deep plain nets with orthogonal weights",
    proof=every(converges(0.4), lambda plain: _level(plain, "0.weight", "40.weight")),
)
def _(seed: int) -> Setup:
    model = mlp(nn.Tanh, 21, width=40)
    initialise(model, lambda w: nn.init.orthogonal_(w, 1.05))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-4)
    return fit(model, classify(model, Blobs(seed, batch=64)), optimizer, 120)


def _level(plain: Plain, first: str, last: str) -> str:
    ratio = median(a / b for a, b in zip(plain.grads[first], plain.grads[last], strict=True))
    assert 0.1 < ratio < 10, f"the gradient of {first} is {ratio:.3g} of that of {last}"
    return f"the gradient of {first} is {ratio:.3g} of that of {last}"


@healthy(
    CASES,
    "en_always_clipped",
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.clip_grad_norm_.html a small limit and a large rate",
    proof=every(converges(0.3), lambda plain: _above(plain, 0.01)),
)
def _(seed: int) -> Setup:
    data = Sets(seed)
    model = Net(
        encoder=nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU()), pool=MaskedMean(), head=nn.Linear(32, 3)
    )
    encoder, pool, head = model.children()

    def loss(i: int) -> Tensor:
        x, exists, kind = data()
        return F.cross_entropy(head(pool(encoder(x), exists)), kind)

    optimizer = torch.optim.SGD(model.parameters(), lr=2.0, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, 200)
    return fit(model, loss, optimizer, 200, before=lambda i: schedule.step() if i else None, between=clip(model, 0.01))


def _above(plain: Plain, limit: float) -> str:
    norms = [math.sqrt(sum(g[i] ** 2 for g in plain.grads.values())) for i in range(len(plain.losses))]
    share = sum(n > limit for n in norms) / len(norms)
    assert share > 0.8, f"{share:.3g} of the gradients are clipped"
    return f"{share:.3g} of the gradients are clipped, the first {norms[0] / limit:.3g} times over the limit"


class _Uncertain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(12, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU())
        self.size, self.weight = nn.Linear(48, 1), nn.Linear(48, 1)
        self.log_variances = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.trunk(x)
        errors = torch.stack([F.mse_loss(self.size(h), y), F.mse_loss(self.weight(h), y.square() - 1.5)])
        return (errors * torch.exp(-self.log_variances) + self.log_variances).sum()


@healthy(
    CASES,
    "en_tasks_weighted_by_uncertainty",
    source="https://arxiv.org/abs/1705.07115: the loss goes through 0 to negative values",
    proof=lambda plain: _through_zero(plain),
)
def _(seed: int) -> Setup:
    data = Table(seed, columns=12, batch=64)
    model = _Uncertain()

    def loss(i: int) -> Tensor:
        out: Tensor = model(*data())
        return out

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 300)


def _through_zero(plain: Plain) -> str:
    first, last = median(plain.losses[:15]), median(plain.losses[-15:])
    assert first > 0.5 > -0.5 > last, f"the loss goes from {first:.3g} to {last:.3g}"
    return f"the loss goes from {first:.3g} through 0 to {last:.3g}"


@healthy(
    CASES,
    "en_heavily_decayed_graph_net",
    source="https://arxiv.org/abs/1711.05101 decoupled weight decay, and https://arxiv.org/abs/1609.02907",
    proof=converges(0.4),
)
def _(seed: int) -> Setup:
    graph = Communities(seed)
    model = Net(first=GraphConv(12, 32), second=GraphConv(32, 3))
    first, second = model.children()
    labelled = torch.arange(90) < 45

    def loss(i: int) -> Tensor:
        h = F.dropout(F.relu(first(graph.x, graph.adjacency)), 0.3)
        return F.cross_entropy(second(h, graph.adjacency)[labelled], graph.y[labelled])

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5), 150)


@healthy(
    CASES,
    "en_denoiser_with_scaled_loss",
    source="https://arxiv.org/abs/1412.6980 Adam, whose steps don't depend on the scale of the loss",
    proof=converges(0.4),
)
def _(seed: int) -> Setup:
    data = Views(seed, batch=48, noise=0.2)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8), nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 16))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, eps=1e-14)

    def loss(i: int) -> Tensor:
        a, b = data()
        return 1e-5 * F.mse_loss(model(a), b)

    return fit(model, loss, optimizer, 250)


@healthy(
    CASES,
    "en_sparse_codes",
    source="https://proceedings.mlr.press/v15/glorot11a.html sparse rectifier nets: 70 to 85 % zeros",
    proof=every(converges(0.4), lambda plain: _sparse_but_alive(plain, "1", 0.65)),
)
def _(seed: int) -> Setup:
    data = Blobs(seed, classes=6, batch=64)
    model = nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 6))
    initialise(model, lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu"))
    nn.init.constant_(model[0].bias, -1.2)  # type: ignore[arg-type]
    return fit(model, classify(model, data), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), 150)


def _sparse_but_alive(plain: Plain, module: str, zeros: float) -> str:
    seen = [o for o in plain.outputs[module] if o is not None]
    share = median(o.zeros for o in seen)
    assert share > zeros, f"{share:.3g} of the outputs are 0"
    for first in range(0, len(seen), 10):
        assert torch.stack([o.fired for o in seen[first : first + 10]]).any(0).all(), f"a unit is silent from {first} on"
    return f"{share:.3g} of the outputs of {module} are 0, and every unit fires within ten batches"
