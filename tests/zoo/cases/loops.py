"""Training loops of many kinds: adversarial, reinforced, unrolled, by hand, with several losses or several optimizers."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Blobs, Build, Case, Event, Pictures, Proof, Setup, classify, fit, healthy, initialise, mlp, sick
from tests.zoo.plain import Plain, named_modules, named_parameters
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


# What the runs share.


@dataclass
class Told(Setup):
    """A run that notes, as it goes, a measure of success that is not its loss."""

    told: list[float] = field(default_factory=list)


def rng(seed: int, salt: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(7000 + 131 * seed + salt)


def params(*modules: nn.Module) -> list[nn.Parameter]:
    return [p for m in modules for p in m.parameters()]


def mse(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean()


class Curve:
    """Regression on a smooth function of the features, with a little noise."""

    def __init__(self, seed: int, features: int = 8, batch: int = 64, noise: float = 0.1) -> None:
        self.generator = rng(seed, 1)
        self.w = torch.randn(features, 3, generator=self.generator) / features**0.5
        self.batch, self.noise = batch, noise

    def __call__(self) -> tuple[Tensor, Tensor]:
        x = torch.randn(self.batch, len(self.w), generator=self.generator)
        a = x @ self.w
        y = torch.sin(2 * a[:, :1]) + a[:, 1:2] * a[:, 2:]
        return x, y + self.noise * torch.randn(self.batch, 1, generator=self.generator)


class Bandit:
    """States, of which a linear rule says the one right action: reward 1 for it, else 0."""

    def __init__(self, seed: int, states: int = 8, actions: int = 4, batch: int = 64) -> None:
        self.generator = rng(seed, 2)
        self.rule = torch.randn(actions, states, generator=self.generator)
        self.batch = batch

    def states(self) -> Tensor:
        return torch.randn(self.batch, self.rule.shape[1], generator=self.generator)

    def act(self, logits: Tensor) -> Tensor:
        return torch.multinomial(torch.softmax(logits.detach(), -1), 1, generator=self.generator)[:, 0]

    def reward(self, states: Tensor, actions: Tensor) -> Tensor:
        return ((states @ self.rule.T).argmax(-1) == actions).float()


class Chain:
    """A corridor of ten cells with a reward at its end; transitions as (cell, action, reward, next cell, done), one-hot."""

    def __init__(self, seed: int, cells: int = 10, batch: int = 64) -> None:
        self.generator = rng(seed, 3)
        self.cells, self.batch = cells, batch

    def __call__(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        s = torch.randint(self.cells - 1, (self.batch,), generator=self.generator)
        a = torch.randint(2, (self.batch,), generator=self.generator)
        n = (s + 2 * a - 1).clamp(min=0)
        done = (n == self.cells - 1).float()
        return F.one_hot(s, self.cells).float(), a, done, F.one_hot(n, self.cells).float(), done


class Graph:
    """A graph of communities: noisy features, an adjacency (with loops) and the class of every node."""

    def __init__(self, seed: int, nodes: int = 60, classes: int = 3, features: int = 12) -> None:
        g = rng(seed, 4)
        self.y = torch.arange(nodes) % classes
        same = (self.y[:, None] == self.y[None]).float()
        edges = (torch.rand(nodes, nodes, generator=g) < 0.02 + 0.23 * same).float().triu(1)
        self.edges = edges + edges.T + torch.eye(nodes)
        d = self.edges.sum(1).rsqrt()
        self.adjacency = d[:, None] * self.edges * d
        centres = torch.randn(classes, features, generator=g)
        self.x = 0.7 * centres[self.y] + torch.randn(nodes, features, generator=g)


class Gcn(nn.Module):
    """Dense graph convolutions: the adjacency, a Linear, an activation; a head on top."""

    def __init__(self, graph: Graph, depth: int, act: Callable[[], nn.Module], width: int = 24, classes: int = 3) -> None:
        super().__init__()
        sizes = [graph.x.shape[1]] + [width] * depth
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.acts = nn.ModuleList(act() for _ in range(depth))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        for layer, act in zip(self.layers, self.acts, strict=True):
            x = act(adjacency @ layer(x))
        return self.head(x)


class Points:
    """Points of the plane for a generator to imitate: a Gaussian cloud away from the origin."""

    centre = torch.tensor([1.5, -1.0])

    def __init__(self, seed: int, batch: int = 64) -> None:
        self.generator, self.batch = rng(seed, 5), batch

    def __call__(self) -> Tensor:
        return self.centre + 0.5 * torch.randn(self.batch, 2, generator=self.generator)

    def noise(self) -> Tensor:
        return torch.randn(self.batch, 4, generator=self.generator)


Two = tuple[Callable[[nn.Module, Tensor, Tensor], Tensor], Callable[[nn.Module, Tensor], Tensor]]


def bce(logits: Tensor, target: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


VANILLA: Two = (
    lambda d, real, fake: bce(d(real), 1.0) + bce(d(fake), 0.0),
    lambda d, fake: bce(d(fake), 1.0),
)
LEAST_SQUARES: Two = (
    lambda d, real, fake: 0.5 * (d(real) - 1).square().mean() + 0.5 * d(fake).square().mean(),
    lambda d, fake: 0.5 * (d(fake) - 1).square().mean(),
)
WASSERSTEIN: Two = (lambda d, real, fake: d(fake).mean() - d(real).mean(), lambda d, fake: -d(fake).mean())


def adversarial(
    seed: int,
    losses: Two,
    rounds: int,
    lr: float = 2e-3,
    critics: int = 1,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    after: Callable[[nn.Module], None] | None = None,
    cut: bool = False,
    zero_d: bool = True,
    act: Callable[[], nn.Module] = lambda: nn.LeakyReLU(0.2),
    prepare: Callable[[nn.Module, nn.Module, Points], None] | None = None,
    **options: Any,
) -> Told:
    """G against D, one update of each in turn (`critics` of D). `told`: how far the mean of what G makes is from the data's."""
    data = Points(seed)
    g, d = mlp(act, 2, 32, 4, 2), mlp(act, 2, 32, 2, 1)
    if prepare:
        prepare(g, d, data)
    opt_g, opt_d = optimizer(g.parameters(), lr=lr, **options), optimizer(d.parameters(), lr=lr, **options)
    told: list[float] = []

    def train() -> Iterator[Event]:
        for _ in range(rounds):
            for _ in range(critics):
                if zero_d:
                    opt_d.zero_grad()
                d_loss = losses[0](d, data(), g(data.noise()).detach())
                d_loss.backward()
                yield "read", [d_loss]
                opt_d.step()
                if after:
                    after(d)
                yield "step", [opt_d]
            opt_g.zero_grad()
            fake = g(data.noise())
            g_loss = losses[1](d, fake.detach() if cut else fake)
            g_loss.backward()
            yield "read", [g_loss]
            opt_g.step()
            yield "step", [opt_g]
            told.append(float((fake.detach().mean(0) - data.centre).norm()))

    return Told({"G": g, "D": d}, train, told)


# What the proofs share.


def again(plain: Plain) -> Setup:
    """The run of seed 0, to be looked at in another way."""
    torch.manual_seed(0)
    return plain.case.build(0)


def piles_up(parameter: str, last: int = 25) -> Proof:
    """When the gradient is read, the gradient of the update before is still in it."""

    def proof(plain: Plain) -> str:
        setup = again(plain)
        p = named_parameters(setup.model)[parameter]
        fresh: list[Tensor] = []
        p.register_hook(lambda g: fresh.append(g.clone()))
        shares = []
        for kind, _ in itertools.islice(setup.train(), 2 * last):
            if kind == "read":
                new = sum(fresh, torch.zeros_like(p))
                assert p.grad is not None
                shares.append(float((p.grad - new).norm() / (new.norm() + 1e-30)))
                fresh.clear()
        share = median(shares[1:])
        assert share > 0.5, f"what is old in the gradient of {parameter} is {share:.3g} of what is new"
        return f"what is old in the gradient of {parameter} is {share:.3g} of what is new"

    return proof


def absent(*parameters: str) -> Proof:
    """No optimizer that steps holds these parameters."""

    def proof(plain: Plain) -> str:
        setup = again(plain)
        held = {
            id(p)
            for kind, what in setup.train()
            if kind == "step"
            for optimizer in what
            for group in optimizer.param_groups
            for p in group["params"]
        }
        for name in parameters:
            assert id(named_parameters(setup.model)[name]) not in held, f"{name} is in an optimizer"
        return f"{', '.join(parameters)}: in no optimizer that steps"

    return proof


def nothing_moves(plain: Plain) -> str:
    """No update changes any weight, and no optimizer steps."""
    setup = again(plain)
    at = {name: p.detach().clone() for name, p in named_parameters(setup.model).items()}
    steps = sum(len(what) for kind, what in setup.train() if kind == "step")
    moved = [name for name, p in named_parameters(setup.model).items() if not torch.equal(at[name], p.detach())]
    assert not moved, f"{moved} moved"
    assert not steps, f"{steps} steps"
    assert all(n > 0 for grads in plain.grads.values() for n in grads), "a parameter has no gradient"
    return f"{len(plain.losses)} backward passes, no step, every weight as it was"


def loss_spikes(update: int, factor: float) -> Proof:
    """The loss of one update is more than `factor` times the median of those before."""

    def proof(plain: Plain) -> str:
        ratio = plain.losses[update] / median(plain.losses[max(0, update - 30) : update])
        assert ratio > factor, f"the loss of update {update} is {ratio:.3g} times the median, not {factor:g}"
        return f"the loss of update {update} is {ratio:.3g} times the median before it"

    return proof


def probabilities(module: str, classes: int) -> Proof:
    """What a module hands to the cross-entropy is already between 0 and 1, so that the loss has a floor."""

    def proof(plain: Plain) -> str:
        seen = [o for o in plain.outputs[module] if o is not None]
        low, high = min(o.low for o in seen), max(o.high for o in seen)
        floor = math.log(1 + (classes - 1) / math.e)
        assert 0 <= low <= high <= 1, f"the outputs go from {low:.3g} to {high:.3g}"
        assert min(plain.losses) >= floor - 1e-4, f"a loss is {min(plain.losses):.3g}"
        return (
            f"the scores lie in [{low:.3g}, {high:.3g}]; the loss cannot fall below {floor:.3g} and ends at {plain.losses[-1]:.3g}"
        )

    return proof


def input_beyond(size: float, sane: Build, better: float) -> Proof:
    """The input is larger than `size`; the same run with standardised features ends below `better` of its loss."""

    def proof(plain: Plain) -> str:
        setup, sizes = again(plain), []
        root = named_modules(setup.model)[""]
        root.register_forward_pre_hook(lambda m, args: sizes.append(float(args[0].abs().mean())))
        for _ in itertools.islice(setup.train(), 20):
            pass
        assert median(sizes) > size, f"the mean size of the input is {median(sizes):.3g}"
        torch.manual_seed(0)
        losses = [float(what[0].detach()) for kind, what in sane(0).train() if kind == "read"]
        a, b = median(plain.losses[-10:]), median(losses[-10:])
        assert b < better * a, f"with standardised features the loss ends at {b:.3g}, without at {a:.3g}"
        return f"inputs of {median(sizes):.3g}; the loss ends at {a:.3g}, with standardised features at {b:.3g}"

    return proof


def flat(module: str, above: float, sigmoid: bool = False, calls: int = 20) -> Proof:
    """More than `above` of what a tanh (or sigmoid) gives is where its slope is below a tenth of the steepest."""

    def proof(plain: Plain) -> str:
        setup, shares = again(plain), []

        def look(m: nn.Module, args: Any, out: Tensor) -> None:
            slope = 4 * out * (1 - out) if sigmoid else 1 - out.square()
            shares.append(float((slope < 0.1).float().mean()))

        named_modules(setup.model)[module].register_forward_hook(look)
        for _ in itertools.islice(setup.train(), 2 * calls):
            pass
        share = min(shares)
        assert share > above, f"{share:.3g} of {module} is flat, not more than {above:g}"
        return f"at least {share:.3g} of {module} is in the flat part"

    return proof


def same_rows(*weights: str) -> Proof:
    """Before the first update the rows of these weights are all alike."""

    def proof(plain: Plain) -> str:
        parameters = named_parameters(again(plain).model)
        for name in weights:
            w = parameters[name]
            assert torch.equal(w, w[:1].expand_as(w)), f"the rows of {name} differ"
        return f"all rows of {', '.join(weights)} are the same"

    return proof


def first_loss(times: float, chance: float) -> Proof:
    """The first loss is more than `times` that of a guess."""

    def proof(plain: Plain) -> str:
        ratio = plain.losses[0] / chance
        assert ratio > times, f"the first loss is {ratio:.3g} times that of a guess"
        return f"the first loss is {ratio:.3g} times that of a guess"

    return proof


def begins(update: int, loss: bool, grads: bool, outputs: Iterable[str] = ()) -> Proof:
    """At `update`, and not before, exactly these are NaN or Inf: the loss, a gradient, the outputs of some modules."""

    def proof(plain: Plain) -> str:
        bad_outputs = set(outputs)
        for i in range(update + 1):
            here = i == update
            assert math.isfinite(plain.losses[i]) != (here and loss), f"the loss of update {i} is {plain.losses[i]}"
            bad = any(counts[i] > 0 for counts in plain.nonfinite.values())
            assert bad == (here and grads), f"gradients of update {i}: NaN or Inf is {bad}"
            found = {name for name, seen in plain.outputs.items() if seen[i] is not None and seen[i].nonfinite > 0}
            assert found == (bad_outputs if here else set()), f"outputs of update {i}: NaN or Inf in {found}"
        what = ["the loss"] * loss + ["gradients"] * grads + sorted(repr(o) for o in bad_outputs)
        return f"{', '.join(what)}: NaN or Inf at update {update}, nothing before"

    return proof


def nan_enters(update: int) -> Proof:
    """The batch of `update` is the first that has a NaN as it enters the model."""

    def proof(plain: Plain) -> str:
        setup, seen = again(plain), []
        named_modules(setup.model)[""].register_forward_pre_hook(lambda m, args: seen.append(bool(args[0].isnan().any())))
        for _ in itertools.islice(setup.train(), 2 * update + 2):
            pass
        assert seen.index(True) == update, f"the first NaN enters at {seen.index(True)}"
        return f"a NaN enters with the batch of update {update}"

    return proof


def told(above: float | None = None, below: float | None = None, what: str = "the measure") -> Proof:
    """What the run noted ends, in the mean of its last tenth, above or below a number; every loss is finite."""

    def proof(plain: Plain) -> str:
        assert isinstance(plain.setup, Told)
        notes = plain.setup.told
        tenth = max(1, len(notes) // 10)
        a, b = mean(notes[:tenth]), mean(notes[-tenth:])
        assert all(math.isfinite(x) for x in plain.losses), "a loss is not finite"
        assert above is None or b > above, f"{what} goes from {a:.3g} to {b:.3g}, not above {above}"
        assert below is None or b < below, f"{what} goes from {a:.3g} to {b:.3g}, not below {below}"
        return f"{what} goes from {a:.3g} to {b:.3g}"

    return proof


# Gradients that are not cleared, steps that are not made.


@sick(
    CASES,
    "l_gan_discriminator_never_zeroed",
    ("gradients_not_zeroed",),
    ("D",),
    source="https://github.com/Hsintien-Ng/idinvert_pytorch-reproduced/issues/1: optimizer_D.zero_grad() was forgotten",
    proof=piles_up("D.2.weight"),
)
def _(seed: int) -> Setup:
    return adversarial(seed, VANILLA, 30, zero_d=False, lr=5e-4)


@sick(
    CASES,
    "l_forecast_zero_grad_once_an_epoch",
    ("gradients_not_zeroed",),
    ("",),
    source="https://github.com/pytorch/pytorch/issues/47175: zero_grad() at the beginning of each epoch instead of each iteration",
    proof=piles_up("0.weight"),
)
def _(seed: int) -> Setup:
    data = Curve(seed)
    model = mlp(nn.Tanh, 2, 24, 8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def train() -> Iterator[Event]:
        for _ in range(2):
            optimizer.zero_grad()
            for _ in range(30):
                x, y = data()
                loss = mse(model(x), y)
                loss.backward()
                yield "read", [loss]
                optimizer.step()
                yield "step", [optimizer]

    return Setup(model, train)


@sick(
    CASES,
    "l_actor_critic_clears_only_the_actor",
    ("gradients_not_zeroed",),
    ("critic",),
    source="https://github.com/wenet-e2e/wekws/issues/72: step() is called, zero_grad() is not; here of one of two optimizers",
    proof=piles_up("critic.0.weight"),
)
def _(seed: int) -> Setup:
    world = Bandit(seed)
    actor, critic = mlp(nn.ReLU, 1, 32, 8, 4), mlp(nn.ReLU, 1, 32, 8, 1)
    opt_a, opt_c = torch.optim.Adam(actor.parameters(), lr=3e-3), torch.optim.Adam(critic.parameters(), lr=1e-3)

    def train() -> Iterator[Event]:
        for _ in range(50):
            s = world.states()
            logits, value = actor(s), critic(s)[:, 0]
            a = world.act(logits)
            advantage = world.reward(s, a) - value
            chosen = F.log_softmax(logits, -1).gather(1, a[:, None])[:, 0]
            actor_loss, critic_loss = -(chosen * advantage.detach()).mean(), advantage.square().mean()
            opt_a.zero_grad()
            actor_loss.backward()
            critic_loss.backward()
            yield "read", [actor_loss, critic_loss]
            opt_a.step()
            opt_c.step()
            yield "step", [opt_a, opt_c]

    return Setup({"actor": actor, "critic": critic}, train)


@sick(
    CASES,
    "l_diffusion_loop_lost_its_step",
    ("never_stepped",),
    source="https://github.com/tedlasai/learn2refocus/issues/5: backward, lr_scheduler.step(), zero_grad(), and no optimizer.step()",
    proof=nothing_moves,
)
def _(seed: int) -> Setup:
    data, g = Points(seed), rng(seed, 9)
    model = mlp(nn.SiLU, 2, 32, 3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def train() -> Iterator[Event]:
        for i in range(60):
            x, t, e = data(), torch.rand(64, 1, generator=g), torch.randn(64, 2, generator=g)
            loss = mse(model(torch.cat([(1 - t).sqrt() * x + t.sqrt() * e, t], 1)), e)
            loss.backward()
            yield "read", [loss]
            optimizer.param_groups[0]["lr"] = 1e-3 * (1 - i / 60)
            optimizer.zero_grad()
            yield "step", []

    return Setup(model, train)


@sick(
    CASES,
    "l_operator_learning_never_steps",
    ("never_stepped",),
    source="https://github.com/neuraloperator/Geo-FNO/issues/3: plasticity_3d.py had lost its optimizer.step()",
    proof=nothing_moves,
)
def _(seed: int) -> Setup:
    data = Curve(seed)
    model = mlp(nn.GELU, 2, 24, 8, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def train() -> Iterator[Event]:
        for _ in range(40):
            x, y = data()
            optimizer.zero_grad()
            loss = (model(x) - y).norm() / y.norm()
            loss.backward()
            yield "read", [loss]
            yield "step", []

    return Setup(model, train)


@sick(
    CASES,
    "l_backward_passes_pile_up_unused",
    ("never_stepped",),
    also=("gradients_not_zeroed",),
    source="https://airoads.org/ch06-deep-learning/ch02-pytorch/02-autograd/: backward() only computes gradients, it updates nothing",
    proof=nothing_moves,
)
def _(seed: int) -> Setup:
    data = Blobs(seed)
    model = mlp(nn.ReLU, 2)
    loss_of = classify(model, data)

    def train() -> Iterator[Event]:
        for i in range(40):
            loss = loss_of(i)
            loss.backward()
            yield "read", [loss]
            yield "step", []

    return Setup(model, train)


# Parameters that no optimizer holds.


class Fused(nn.Module):
    """Two encoders, one head."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.image = nn.Linear(8, 16), nn.Linear(8, 16)
        self.fc = nn.Sequential(nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.cat([self.text(x[:, :8]), self.image(x[:, 8:])], 1))


@sick(
    CASES,
    "l_multimodal_head_was_never_appended",
    ("not_in_optimizer",),
    ("fc",),
    source="https://github.com/zjunlp/HVPNeT/issues/5: parameters.append(params) was left out for crf and fc",
    proof=every(absent("fc.1.weight", "fc.3.weight"), unchanged("fc.1.weight", "fc.3.weight")),
)
def _(seed: int) -> Setup:
    model = Fused()
    groups = [{"params": model.text.parameters(), "lr": 1e-3}, {"params": model.image.parameters(), "lr": 2e-3}]
    return fit(model, classify(model, Blobs(seed)), torch.optim.AdamW(groups), 50)


@sick(
    CASES,
    "l_layer_swapped_after_the_optimizer_was_made",
    ("not_in_optimizer",),
    ("2",),
    source="https://github.com/meta-pytorch/opacus/issues/432: layers replaced after model.parameters() went to the optimizer",
    proof=every(absent("2.weight"), unchanged("2.weight")),
)
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    model[2] = nn.Linear(32, 32)
    return fit(model, classify(model, Blobs(seed)), optimizer, 45)


class Uncertainties(nn.Module):
    """Weights of the losses of several tasks, by learned log-variances."""

    def __init__(self) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(2))

    def forward(self, losses: Tensor) -> Tensor:
        return (losses * (-self.log_variance).exp() + self.log_variance).sum()


@sick(
    CASES,
    "l_loss_weights_are_in_no_optimizer",
    ("not_in_optimizer",),
    ("weights",),
    source="https://arxiv.org/abs/1705.07115 weighs tasks by learned variances; https://github.com/ACEsuit/mace/issues/525: new ones missed",
    proof=every(absent("weights.log_variance"), unchanged("weights.log_variance")),
)
def _(seed: int) -> Setup:
    net, weights, data = mlp(nn.Tanh, 2, 32, 8, 2), Uncertainties(), Curve(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)

    def train() -> Iterator[Event]:
        for _ in range(60):
            x, y = data()
            out = net(x)
            loss = weights(torch.stack([mse(out[:, :1], y), 9 * mse(out[:, 1:], x[:, :1])]))
            optimizer.zero_grad()
            weights.zero_grad()
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]

    return Setup({"net": net, "weights": weights}, train)


# Modules that no gradient reaches.


@sick(
    CASES,
    "l_generator_step_on_a_detached_fake",
    ("missing_gradient",),
    ("G",),
    source="https://github.com/nikhilsinghmus/image2reverb/issues/37: fake_spec.detach() went to D in the step of G",
    proof=no_gradient("G.0.weight", "G.4.weight"),
)
def _(seed: int) -> Setup:
    return adversarial(seed, VANILLA, 35, cut=True)


class Encoded(nn.Module):
    """A policy on top of an encoder, which runs under no_grad."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        self.policy = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z = self.encoder(x)
        return self.policy(z)


@sick(
    CASES,
    "l_pretraining_encodes_under_no_grad",
    ("missing_gradient",),
    ("encoder",),
    source="https://github.com/rll-research/cic/issues/5: the CNN encoder runs inside torch.no_grad() while it is to be trained",
    proof=no_gradient("encoder.0.weight", "encoder.2.weight"),
)
def _(seed: int) -> Setup:
    model = Encoded()
    return fit(model, classify(model, Blobs(seed)), torch.optim.Adam(model.parameters(), lr=2e-3), 60)


@sick(
    CASES,
    "l_actor_goes_through_numpy",
    ("missing_gradient",),
    ("actor",),
    source="https://discuss.pytorch.org/t/actor-critic-with-multivariate-normal-network-weights-fail-to-update/74548: detach().numpy()",
    proof=no_gradient("actor.0.weight", "actor.2.weight"),
)
def _(seed: int) -> Setup:
    actor, critic, data = mlp(nn.ReLU, 1, 32, 8, 1), mlp(nn.ReLU, 1, 32, 9, 1), Curve(seed)
    opt_a, opt_c = torch.optim.Adam(actor.parameters(), lr=1e-3), torch.optim.Adam(critic.parameters(), lr=1e-3)

    def train() -> Iterator[Event]:
        for _ in range(50):
            s, best = data()
            a = torch.randn(len(s), 1, generator=data.generator)
            critic_loss = mse(critic(torch.cat([s, a], 1)), -(a - best).square())
            opt_c.zero_grad()
            critic_loss.backward()
            yield "read", [critic_loss]
            opt_c.step()
            yield "step", [opt_c]
            action = torch.from_numpy(actor(s).detach().numpy()).clamp(-2, 2)
            actor_loss = -critic(torch.cat([s, action], 1)).mean()
            opt_a.zero_grad()
            actor_loss.backward()
            yield "read", [actor_loss]
            opt_a.step()
            yield "step", [opt_a]

    return Setup({"actor": actor, "critic": critic}, train)


class TwoBranches(nn.Module):
    """A graph network whose attention branch runs, and whose result the next line overwrites."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 24)
        self.attention, self.convolve, self.head = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 3)
        self.adjacency, self.edges = graph.adjacency, graph.edges

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.embed(x))
        scores = (self.attention(x) @ x.T).masked_fill(self.edges == 0, -1e9)
        h = torch.softmax(scores, -1) @ x
        h = torch.relu(self.adjacency @ self.convolve(x))
        return self.head(h)


@sick(
    CASES,
    "l_graph_branch_is_overwritten",
    ("missing_gradient",),
    ("attention",),
    source="https://github.com/open-mmlab/mmcv/pull/1547: parameters that a forward pass runs but that produce no loss",
    proof=no_gradient("attention.weight", "attention.bias"),
)
def _(seed: int) -> Setup:
    graph = Graph(seed)
    model = TwoBranches(graph)
    return fit(model, lambda i: F.cross_entropy(model(graph.x), graph.y), torch.optim.Adam(model.parameters(), lr=5e-3), 60)


# Weights that stay bit for bit.


@sick(
    CASES,
    "l_warm_up_counts_epochs_and_stays_at_zero",
    ("frozen_weights",),
    ("",),
    source="https://github.com/huggingface/transformers/issues/20916: the lr is 0 for the whole of the first epoch",
    proof=unchanged("0.weight", "2.weight", "4.weight", "4.bias"),
)
def _(seed: int) -> Setup:
    model = mlp(nn.GELU, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: min(1.0, epoch / 5))  # whose step() is called once an epoch
    return fit(model, classify(model, Blobs(seed)), optimizer, 60)


@sick(
    CASES,
    "l_bfloat16_rounds_every_update_away",
    ("frozen_weights",),
    ("",),
    also=("update_ratio_too_small", "loss_plateau"),
    source="https://github.com/workofart/ml-by-hand/pull/85: Adam's updates round to nothing in bf16, 0 of 768 weights move",
    proof=unchanged("0.weight", "2.weight", "4.weight"),
)
def _(seed: int) -> Setup:
    g = rng(seed, 11)
    model = mlp(nn.Tanh, 2, bias=False)
    for p in model.parameters():
        p.data = (p.shape[1] ** -0.5 * (1 - 2 * torch.randint(2, p.shape, generator=g))).bfloat16()
    model, data = model.bfloat16(), Blobs(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x.bfloat16()).float(), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-4), 40)


@sick(
    CASES,
    "l_gradients_cleared_just_before_the_step",
    ("frozen_weights",),
    ("",),
    source="https://velog.io/@rhss10/기본-optimizer.zerograd는-어디에-넣어주어야-할까: not between loss.backward() and optimizer.step()",
    proof=unchanged("layers.0.weight", "layers.1.weight", "head.weight"),
)
def _(seed: int) -> Setup:
    graph = Graph(seed)
    model = Gcn(graph, 2, nn.ReLU)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train() -> Iterator[Event]:
        for _ in range(40):
            loss = F.cross_entropy(model(graph.x, graph.adjacency), graph.y)
            loss.backward()
            yield "read", [loss]
            optimizer.zero_grad(set_to_none=False)
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


@sick(
    CASES,
    "l_backbone_group_with_lr_zero",
    ("frozen_weights",),
    ("text", "image"),
    source="https://github.com/bubbliiiing/detr-pytorch/issues/6: weights the same in every checkpoint, a matter of the optimizer's groups",
    proof=unchanged("text.weight", "image.weight"),
)
def _(seed: int) -> Setup:
    model = Fused()
    groups = [{"params": params(model.text, model.image), "lr": 0.0}, {"params": params(model.fc), "lr": 2e-3}]
    return fit(model, classify(model, Blobs(seed)), torch.optim.Adam(groups), 50)


# Updates of the wrong size.


@sick(
    CASES,
    "l_brier_score_with_adam_at_two",
    ("update_ratio_too_large",),
    also=(
        "dead_units",
        "zero_gradient",
        "vanishing_gradient",
        "loss_plateau",
        "exploding_gradient",
        "gradient_spike",
        "loss_diverging",
    ),
    source="http://karpathy.github.io/2019/04/25/recipe/: the size of updates over that of weights; the lr here is 1000 times Adam's",
    proof=every(update_ratio(above=3, last=1), update_ratio(above=0.08, last=10)),
)
def _(seed: int) -> Setup:
    model, data = mlp(lambda: nn.LeakyReLU(0.1), 2), Blobs(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        return mse(torch.softmax(model(x), -1), F.one_hot(y, 4).float())

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2.0), 40)


class Ratings:
    """Users who like items or not, by hidden factors, as (user, item, liked)."""

    def __init__(self, seed: int, users: int = 80, items: int = 60, batch: int = 128) -> None:
        self.generator = rng(seed, 12)
        self.u = torch.randn(users, 4, generator=self.generator)
        self.v = torch.randn(items, 4, generator=self.generator)
        self.batch = batch

    def __call__(self) -> tuple[Tensor, Tensor, Tensor]:
        u = torch.randint(len(self.u), (self.batch,), generator=self.generator)
        v = torch.randint(len(self.v), (self.batch,), generator=self.generator)
        return u, v, ((self.u[u] * self.v[v]).sum(-1) > 0).float()


class Recommender(nn.Module):
    """Two embeddings and a small network over both."""

    def __init__(self, users: int = 80, items: int = 60, width: int = 16, sparse: bool = False) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(users, width, sparse=sparse), nn.Embedding(items, width, sparse=sparse)
        self.net = nn.Sequential(nn.Linear(3 * width, 32), nn.ReLU(), nn.Linear(32, 1))
        for e in (self.users, self.items):
            nn.init.normal_(e.weight, std=0.3)

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        a, b = self.users(u), self.items(v)
        return self.net(torch.cat([a, b, a * b], -1))[:, 0]


@sick(
    CASES,
    "l_recommender_steps_over_its_weights",
    ("update_ratio_too_large",),
    also=(
        "dead_units",
        "zero_gradient",
        "vanishing_gradient",
        "loss_plateau",
        "exploding_gradient",
        "gradient_spike",
        "loss_diverging",
    ),
    source="http://karpathy.github.io/2019/04/25/recipe/: an lr carried over from other code; updates should be a thousandth of the weights",
    proof=every(update_ratio(above=3, last=1), update_ratio(above=0.08, last=10)),
)
def _(seed: int) -> Setup:
    data, model = Ratings(seed), Recommender()

    def loss(i: int) -> Tensor:
        u, v, y = data()
        return mse(torch.sigmoid(model(u, v)), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1.0), 40)


@sick(
    CASES,
    "l_denoiser_with_lr_1e_8",
    ("update_ratio_too_small",),
    also=("loss_plateau",),
    source="https://github.com/keras-team/keras-hub/issues/2629: near-zero effective updates, the loss the same in every epoch",
    proof=every(update_ratio(below=1e-6), loss_stays(0.1)),
)
def _(seed: int) -> Setup:
    data, g = Points(seed), rng(seed, 9)
    model = mlp(nn.SiLU, 2, 32, 3, 2)

    def loss(i: int) -> Tensor:
        x, t, e = data(), torch.rand(64, 1, generator=g), torch.randn(64, 2, generator=g)
        return mse(model(torch.cat([(1 - t).sqrt() * x + t.sqrt() * e, t], 1)), e)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-8), 60)


@sick(
    CASES,
    "l_operator_loss_averaged_twice",
    ("update_ratio_too_small",),
    also=("loss_plateau", "frozen_weights"),
    source="https://arxiv.org/abs/1706.02677 on the scale of loss and lr; here the mean over the grid is divided by its points once more",
    proof=every(update_ratio(below=1e-6), loss_stays(0.1)),
)
def _(seed: int) -> Setup:
    data = Curve(seed, batch=512)
    model = mlp(nn.GELU, 2, 24, 8, 1)

    def loss(i: int) -> Tensor:
        x, y = data()
        return mse(model(x), y) / (64 * 64)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=1e-3), 60)


# Losses that go the wrong way, or nowhere.


@sick(
    CASES,
    "l_td_learning_without_a_target_network",
    ("loss_diverging", "exploding_gradient"),
    also=("update_ratio_too_large", "non_finite_loss", "gradient_spike", "loss_spike"),
    source="https://github.com/facebookresearch/ReAgent/issues/189: TD loss 4.9, 37, 468, 2035, 21475, ...",
    proof=loss_grows(100, last=40),
)
def _(seed: int) -> Setup:
    g = rng(seed, 13)
    model = nn.Linear(6, 2)
    features = torch.rand(40, 6, generator=g)

    def loss(i: int) -> Tensor:
        s, a = torch.randint(20, (32,), generator=g), torch.randint(2, (32,), generator=g)
        with torch.no_grad():
            target = 1 + 0.99 * model(2.5 * features[s + 20]).max(1).values
        return mse(model(features[s]).gather(1, a[:, None])[:, 0], target)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.1), 60)


@sick(
    CASES,
    "l_gradient_ascent_by_mistake",
    ("loss_diverging", "exploding_gradient"),
    also=("update_ratio_too_large", "gradient_spike", "loss_spike"),
    source="https://github.com/KanishJebaMathewM/Truxify/pull/11885: a sign error, the loss is climbed; cf. fla-org issue 1073",
    proof=loss_grows(20, last=20),
)
def _(seed: int) -> Setup:
    data = Curve(seed)
    model = mlp(nn.Tanh, 1, 16, 8, 1)

    def loss(i: int) -> Tensor:
        x, y = data()
        return mse(model(x), y)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.05, maximize=True), 30)


@sick(
    CASES,
    "l_autoregression_beyond_the_stable_lr",
    ("loss_diverging", "exploding_gradient", "update_ratio_too_large"),
    also=("gradient_spike", "loss_spike"),
    source="https://arxiv.org/abs/2103.00065: gradient descent is unstable above 2 / sharpness",
    proof=loss_grows(100, last=25),
)
def _(seed: int) -> Setup:
    g = rng(seed, 14)
    series = torch.randn(400, generator=g).cumsum(0) / 8
    windows = series.unfold(0, 13, 1)
    windows = (windows - windows.mean()) / windows.std()
    model = nn.Linear(12, 1)
    top = float(torch.linalg.eigvalsh(windows[:, :12].T @ windows[:, :12] / len(windows))[-1])

    def loss(i: int) -> Tensor:
        return mse(model(windows[:, :12]), windows[:, 12:])

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=1.3 / top), 45)


@sick(
    CASES,
    "l_critic_return_scale_compounds",
    ("loss_diverging", "exploding_gradient"),
    also=("gradient_spike", "loss_spike"),
    onset=30,
    source="https://github.com/keras-rl/keras-rl/issues/28: the reward blows up, the loss with it; here a scale is multiplied, not set",
    proof=every(loss_grows(50, first=30, last=45), loss_stays(2.0, last=30)),
)
def _(seed: int) -> Setup:
    data = Curve(seed)
    model = mlp(nn.Tanh, 1, 16, 8, 1)
    scale = [1.0]

    def before(i: int) -> None:
        if i >= 30:
            scale[0] *= 1.35

    def loss(i: int) -> Tensor:
        x, y = data()
        return mse(model(x), scale[0] * y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 60, before=before)


@sick(
    CASES,
    "l_denoiser_meets_a_garbage_batch",
    ("loss_spike", "gradient_spike"),
    also=("update_ratio_too_large", "unnormalized_input", "exploding_gradient"),
    onset=60,
    source="https://github.com/stanford-crfm/mistral/issues/115: spikes of the loss, from 'bad batches' where the data is garbage",
    proof=every(loss_spikes(60, 20), gradient_spikes(60, 20)),
)
def _(seed: int) -> Setup:
    data, g = Points(seed), rng(seed, 9)
    model = mlp(nn.ReLU, 2, 32, 3, 2)

    def loss(i: int) -> Tensor:
        x, t, e = data(), torch.rand(64, 1, generator=g), torch.randn(64, 2, generator=g)
        x = 60 * x if i == 60 else x
        return mse(model(torch.cat([(1 - t).sqrt() * x + t.sqrt() * e, t], 1)), e)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-3), 90)


@sick(
    CASES,
    "l_forecast_batch_in_other_units",
    ("loss_spike", "gradient_spike"),
    also=("exploding_gradient",),
    onset=75,
    source="https://github.com/stas00/ml-engineering/issues/32: spikes from toxic data points at certain iterations",
    proof=every(loss_spikes(75, 100), gradient_spikes(75, 50)),
)
def _(seed: int) -> Setup:
    data = Curve(seed)
    model = mlp(nn.Tanh, 2, 24, 8, 1)

    def loss(i: int) -> Tensor:
        x, y = data()
        return mse(model(x), 100 * y if i == 75 else y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-3), 110)


@sick(
    CASES,
    "l_reward_glitch_hits_actor_and_critic",
    ("gradient_spike",),
    also=("loss_spike", "exploding_gradient"),
    onset=50,
    source="https://github.com/marin-community/marin/issues/1368: norms of gradients spike; here from one glitch of the reward",
    proof=gradient_spikes(50, 50),
)
def _(seed: int) -> Setup:
    return actor_critic(seed, 80, glitch=lambda i, r: r + 500.0 * (torch.arange(len(r)) == 0) * (i == 50))


def actor_critic(seed: int, updates: int, glitch: Callable[[int, Tensor], Tensor] | None = None, entropy: float = 0.01) -> Told:
    """Two networks, two optimizers, one update of both from each batch. `told`: the mean reward."""
    world, notes = Bandit(seed), []
    actor, critic = mlp(nn.ReLU, 1, 32, 8, 4), mlp(nn.ReLU, 1, 32, 8, 1)
    opt_a, opt_c = torch.optim.Adam(actor.parameters(), lr=1e-2), torch.optim.Adam(critic.parameters(), lr=3e-3)

    def train() -> Iterator[Event]:
        for i in range(updates):
            s = world.states()
            logits, value = actor(s), critic(s)[:, 0]
            a = world.act(logits)
            r = world.reward(s, a)
            notes.append(float(r.mean()))
            advantage = (glitch(i, r) if glitch else r) - value
            logs = F.log_softmax(logits, -1)
            chosen = logs.gather(1, a[:, None])[:, 0]
            actor_loss = -(chosen * advantage.detach()).mean() + entropy * (logs.exp() * logs).sum(-1).mean()
            critic_loss = advantage.square().mean()
            opt_a.zero_grad()
            opt_c.zero_grad()
            actor_loss.backward()
            critic_loss.backward()
            yield "read", [actor_loss, critic_loss]
            opt_a.step()
            opt_c.step()
            yield "step", [opt_a, opt_c]

    return Told({"actor": actor, "critic": critic}, train, notes)


class Density(nn.Module):
    """Mean and log-variance of the target, given the features."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(nn.Tanh, 1, 32, 8, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.net(x)
        return out[:, :1], out[:, 1:]


def nll(out: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
    mu, s = out
    return (0.5 * (-s).exp() * (y - mu).square() + 0.5 * s).mean()


@sick(
    CASES,
    "l_likelihood_meets_one_outlier",
    ("gradient_spike",),
    also=("loss_spike",),
    onset=100,
    source="https://github.com/ethanhe42/KL-Loss/issues/4: small variance and large error make exp(-s) * error huge",
    proof=gradient_spikes(100, 50),
)
def _(seed: int) -> Setup:
    data, model = Curve(seed, noise=0.05), Density()
    data.w[:, 1] = 0

    def loss(i: int) -> Tensor:
        x, y = data()
        if i == 100:
            y[0] += 200
        return nll(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 130)


@sick(
    CASES,
    "l_critic_loss_broadcasts",
    ("loss_plateau",),
    within=100,
    source="https://github.com/pytorch/pytorch/issues/19699: MSELoss of (N, 1) and (N,), every prediction with every target",
    proof=loss_stays(0.05),
)
def _(seed: int) -> Setup:
    data = Curve(seed, batch=384)
    data.w[:, 1] /= 2

    model = mlp(nn.ReLU, 2, 24, 8, 1)

    def loss(i: int) -> Tensor:
        x, y = data()
        return (model(x) - y[:, 0]).square().mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-3), 150)


@sick(
    CASES,
    "l_labels_shuffled_apart_from_features",
    ("loss_plateau",),
    within=100,
    source="https://github.com/Borda/kaggle_image-classify/pull/12: the shuffle was made after the labels were taken",
    proof=loss_stays(0.03),
)
def _(seed: int) -> Setup:
    data, g = Blobs(seed, batch=64), rng(seed, 15)
    model = mlp(nn.ReLU, 2)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y[torch.randperm(len(y), generator=g)])

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.05), 160)


@sick(
    CASES,
    "l_forecast_of_the_wrong_row",
    ("loss_plateau",),
    within=100,
    source="https://github.com/udacity/nd320-c1-emr-data-starter/issues/4: rows are compared with those of another order",
    proof=loss_stays(0.05),
)
def _(seed: int) -> Setup:
    data = Curve(seed, batch=384)
    data.w[:, 1] /= 2
    model = mlp(nn.Tanh, 2, 24, 8, 1)

    def loss(i: int) -> Tensor:
        x, y = data()
        return mse(model(x), y.roll(7, 0))

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.03), 160)


# Wrong from the first step: softmax twice, input as it comes, an unlucky start.


@sick(
    CASES,
    "l_activity_net_ends_in_softmax",
    ("double_softmax",),
    ("5",),
    also=("loss_plateau",),
    source="https://github.com/jindongwang/Deep-learning-activity-recognition/issues/10: F.softmax before nn.CrossEntropyLoss",
    proof=probabilities("5", 8),
)
def _(seed: int) -> Setup:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Identity(), nn.Linear(48, 8), nn.Softmax(dim=1))
    return fit(net, classify(net, Pictures(seed)), torch.optim.Adam(net.parameters(), lr=2e-3), 60)


class Matching(nn.Module):
    """Classes by the similarity of an embedding to prototypes, with a softmax over the similarities."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        self.prototypes = nn.Linear(16, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.prototypes(self.embed(x)), -1)


@sick(
    CASES,
    "l_matching_by_softmax_of_softmax",
    ("double_softmax",),
    ("",),
    also=("loss_plateau",),
    source="https://github.com/gitabcworld/MatchingNetworks/issues/5: a softmax of the similarities, then cross_entropy of it",
    proof=probabilities("", 4),
)
def _(seed: int) -> Setup:
    model = Matching()
    return fit(model, classify(model, Blobs(seed)), torch.optim.Adam(model.parameters(), lr=2e-3), 60)


class Policy(nn.Module):
    """A policy that gives probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(8, 32), nn.Tanh()), nn.Linear(32, 4)

    def forward(self, s: Tensor) -> Tensor:
        return F.softmax(self.head(self.body(s)), dim=-1)


@sick(
    CASES,
    "l_cloned_policy_hands_over_probabilities",
    ("double_softmax",),
    ("policy",),
    also=("loss_plateau",),
    source="https://discuss.pytorch.org/t/policy-gradient-using-loss-as-reward/13877: a policy that returns F.softmax(action_scores)",
    proof=probabilities("policy", 4),
)
def _(seed: int) -> Setup:
    world, policy, value = Bandit(seed), Policy(), mlp(nn.Tanh, 1, 16, 8, 1)
    optimizer = torch.optim.Adam(params(policy, value), lr=3e-3)

    def train() -> Iterator[Event]:
        for _ in range(60):
            s = world.states()
            best = (s @ world.rule.T).argmax(-1)
            loss = F.cross_entropy(policy(s), best)
            extra = mse(value(s), (s @ world.rule.T).amax(-1, keepdim=True) / 3)
            optimizer.zero_grad()
            (loss + extra).backward()
            yield "read", [loss + extra]
            optimizer.step()
            yield "step", [optimizer]

    return Setup({"policy": policy, "value": value}, train)


def households(seed: int, standard: bool) -> Setup:
    """Is the household well off? From the year, the income, an age and a share, as they stand in the table or standardised."""
    g = rng(seed, 16)
    model = mlp(nn.ReLU, 2, 32, 4, 2)

    def loss(i: int) -> Tensor:
        z = torch.randn(64, 4, generator=g)
        y = (z[:, 0] - 0.5 * z[:, 1] + z[:, 2] * z[:, 3] > 0).long()
        x = torch.stack([6e4 + 2e4 * z[:, 0], 2015 + 4 * z[:, 1], 45 + 12 * z[:, 2], 0.5 + 0.1 * z[:, 3]], 1)
        return F.cross_entropy(model(z if standard else x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 80)


@sick(
    CASES,
    "l_income_and_year_as_they_stand",
    ("unnormalized_input",),
    ("",),
    also=("poor_init", "loss_plateau", "dead_units", "loss_diverging", "loss_spike", "gradient_spike", "update_ratio_too_large"),
    source="https://openillumi.com/en/en-pytorch-performance-fix-standardization: stagnant loss on features of large mean and variance",
    proof=input_beyond(1e3, lambda seed: households(seed, True), 0.5),
)
def _(seed: int) -> Setup:
    return households(seed, False)


def sensors(seed: int, standard: bool) -> Setup:
    """A sensor's counts, 1e4 and more, from which a smooth quantity is to be read."""
    g = rng(seed, 17)
    model = mlp(nn.Tanh, 2, 32, 6, 1)

    def loss(i: int) -> Tensor:
        z = torch.randn(64, 6, generator=g)
        y = torch.sin(z[:, :1]) + 0.5 * z[:, 1:2] * z[:, 2:3]
        return mse(model(z if standard else 1.2e4 + 3e3 * z), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 160)


@sick(
    CASES,
    "l_sensor_counts_in_the_thousands",
    ("unnormalized_input",),
    ("",),
    also=("saturated_activation", "loss_plateau", "vanishing_gradient", "zero_gradient", "poor_init"),
    source="https://discuss.pytorch.org/t/neural-network-could-not-learn-on-this-type-of-data-why/96648/5: normalise input and target",
    proof=input_beyond(1e3, lambda seed: sensors(seed, True), 0.6),
)
def _(seed: int) -> Setup:
    return sensors(seed, False)


@sick(
    CASES,
    "l_value_network_of_equal_weights",
    ("poor_init",),
    ("",),
    also=("loss_plateau",),
    source="https://www.deeplearningbook.org/contents/optimization.html, 8.4: equal units with equal inputs stay equal",
    proof=same_rows("0.weight", "2.weight"),
)
def _(seed: int) -> Setup:
    data = Curve(seed)
    model = initialise(mlp(nn.Tanh, 2, 24, 8, 1), lambda w: nn.init.constant_(w, 0.1))

    def loss(i: int) -> Tensor:
        x, y = data()
        return mse(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 60)


@sick(
    CASES,
    "l_constant_graph_convolutions",
    ("poor_init",),
    ("layers",),
    also=("loss_plateau",),
    source="https://github.com/davidmascharka/MyNN/pull/70: ensure that the initial parameters of a layer are not constant",
    proof=same_rows("layers.0.weight", "layers.1.weight"),
)
def _(seed: int) -> Setup:
    graph = Graph(seed)
    model = Gcn(graph, 2, nn.Tanh)
    initialise(model.layers, lambda w: nn.init.constant_(w, 0.05))
    return fit(
        model,
        lambda i: F.cross_entropy(model(graph.x, graph.adjacency), graph.y),
        torch.optim.Adam(model.parameters(), lr=3e-3),
        60,
    )


@sick(
    CASES,
    "l_head_a_hundred_times_too_large",
    ("poor_init",),
    ("4",),
    also=("exploding_gradient", "gradient_spike", "update_ratio_too_small"),
    source="http://karpathy.github.io/2019/04/25/recipe/: verify the loss at init, -log(1 / classes) if the last layer is set right",
    proof=first_loss(15, math.log(4)),
)
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, 2)
    nn.init.normal_(model[4].weight, std=60)
    return fit(model, classify(model, Blobs(seed)), torch.optim.Adam(model.parameters(), lr=1e-3), 50)


# Gradients that are exactly zero.


class Quantised(nn.Module):
    """An autoencoder with a rounded code."""

    def __init__(self, code: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(nn.ReLU, 1, 24, 8, 4), mlp(nn.ReLU, 1, 24, 4, 8)
        self.code = code

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.code(3 * self.encoder(x)))


def low_rank(seed: int, batch: int = 64) -> Callable[[], Tensor]:
    """Features that are a noisy linear image of four numbers."""
    g = rng(seed, 18)
    mix = torch.randn(4, 8, generator=g) / 2
    return lambda: torch.randn(batch, 4, generator=g) @ mix + 0.05 * torch.randn(batch, 8, generator=g)


@sick(
    CASES,
    "l_code_rounded_without_straight_through",
    ("zero_gradient",),
    ("encoder",),
    source="https://discuss.pytorch.org/t/torch-round-gradient/28628/4: round() is not useful for learning, its gradient is zero",
    proof=zero_gradient("encoder.0.weight", "encoder.2.weight"),
)
def _(seed: int) -> Setup:
    data, model = low_rank(seed), Quantised(torch.round)

    def loss(i: int) -> Tensor:
        x = data()
        return mse(model(x), x)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-3), 50)


class HardGate(nn.Module):
    """Neighbours kept or dropped by the sign of a score."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.score, self.value, self.head = nn.Linear(12, 12), nn.Linear(12, 24), nn.Linear(24, 3)
        self.edges = graph.edges

    def forward(self, x: Tensor) -> Tensor:
        keep = 0.5 * (torch.sign(self.score(x) @ x.T) + 1) * self.edges
        return self.head(torch.relu(keep @ self.value(x) / self.edges.sum(1, keepdim=True)))


@sick(
    CASES,
    "l_hard_attention_by_sign",
    ("zero_gradient",),
    ("score",),
    source="https://github.com/limaosen0/AS-GCN/issues/48: how can a gradient flow back through a hard choice?",
    proof=zero_gradient("score.weight"),
)
def _(seed: int) -> Setup:
    graph = Graph(seed)
    model = HardGate(graph)
    return fit(model, lambda i: F.cross_entropy(model(graph.x), graph.y), torch.optim.Adam(model.parameters(), lr=5e-3), 50)


class TwoTasks(nn.Module):
    """A trunk with two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 32), nn.ReLU())
        self.main, self.aux = nn.Linear(32, 1), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x)
        return self.main(h), self.aux(h)


@sick(
    CASES,
    "l_second_task_masked_away",
    ("zero_gradient",),
    ("aux",),
    source="https://github.com/fla-org/flash-linear-attention/issues/1073 has a mask that is the same everywhere; here it is all zeros",
    proof=zero_gradient("aux.weight", "aux.bias"),
)
def _(seed: int) -> Setup:
    data, model = Curve(seed), TwoTasks()

    def loss(i: int) -> Tensor:
        x, y = data()
        main, aux = model(x)
        known = (x[:, :3] > 50).float()  # meant: where the second target is known
        return mse(main, y) + (known * (aux - x[:, :3]).square()).mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-3), 50)


class Spikes(nn.Module):
    """Neurons that fire above a threshold, as a step function."""

    def __init__(self) -> None:
        super().__init__()
        self.synapses, self.readout = nn.Linear(16, 48), nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        v, total = torch.zeros(len(x), 48), torch.zeros(len(x), 48)
        for _ in range(5):
            v = 0.7 * v + self.synapses(x)
            fired = 0.5 * (torch.sign(v - 0.5) + 1)
            v, total = v * (1 - fired), total + fired
        return self.readout(total / 5)


@sick(
    CASES,
    "l_spiking_net_without_surrogate",
    ("zero_gradient",),
    ("synapses",),
    source="https://arxiv.org/abs/1901.09948: the derivative of a spike is zero everywhere, hence surrogate gradients",
    proof=zero_gradient("synapses.weight", "synapses.bias"),
)
def _(seed: int) -> Setup:
    model = Spikes()
    return fit(model, classify(model, Blobs(seed)), torch.optim.Adam(model.parameters(), lr=5e-3), 50)


# Gradients that fade or blow up.


def perfect(g: nn.Module, d: nn.Module, data: Points) -> None:
    """Train D ahead, until no fake passes."""
    with torch.no_grad():
        g[4].bias += torch.tensor([-9.0, 9.0])
    ahead = torch.optim.Adam(d.parameters(), lr=1e-2)
    for _ in range(30):
        ahead.zero_grad()
        (bce(d(data()), 0.9) + bce(d(g(data.noise()).detach()), 0.0)).backward()
        ahead.step()
    d.zero_grad()


SATURATING: Two = (
    lambda d, real, fake: bce(d(real), 0.9) + bce(d(fake), 0.0),
    lambda d, fake: (1 - torch.sigmoid(d(fake)) + 1e-12).log().mean(),
)


def faded(plain: Plain) -> str:
    """In the updates of G, its gradient is a tiny part of that of D in D's, and hardly moves it."""
    g = median(plain.grads["G.2.weight"][1::2])
    d = median(plain.grads["D.2.weight"][0::2])
    assert g < 1e-4 * d, f"the gradient of G is {g / d:.3g} of that of D"
    step = median(s / w for s, w in zip(plain.steps["G.2.weight"][1::2], plain.weights["G.2.weight"][1::2], strict=True))
    assert step < 1e-6, f"an update of G changes {step:.3g} of it"
    return f"the gradient of G is {g / d:.3g} of that of D; an update changes {step:.3g} of it"


@sick(
    CASES,
    "l_saturated_discriminator_leaves_nothing",
    ("vanishing_gradient",),
    ("G",),
    also=("frozen_weights", "update_ratio_too_small"),
    within=30,
    source="https://stats.stackexchange.com/questions/345044/generative-adversarial-networks-gradient-saturation: log(1 - D(G(z)))",
    proof=faded,
)
def _(seed: int) -> Setup:
    return adversarial(seed, SATURATING, 30, lr=1e-2, optimizer=torch.optim.SGD, prepare=perfect)


@sick(
    CASES,
    "l_ten_sigmoid_graph_convolutions",
    ("vanishing_gradient",),
    tuple(f"layers.{i}" for i in range(5)),
    also=("loss_plateau",),
    source="https://github.com/pyg-team/pytorch_geometric/issues/2020: the gradient decays to 0 in a GCN",
    proof=every(
        gradient_ratio("layers.0.weight", "head.weight", 1e-4),
        gradient_ratio("layers.3.weight", "head.weight", 1e-3),
        loss_stays(0.05, first=15),
    ),
)
def _(seed: int) -> Setup:
    graph = Graph(seed)
    model = Gcn(graph, 10, nn.Sigmoid)
    return fit(
        model, lambda i: F.cross_entropy(model(graph.x, graph.adjacency), graph.y), torch.optim.SGD(model.parameters(), lr=0.1), 80
    )


class Unrolled(nn.Module):
    """A start from an encoder, a map applied many times, a head."""

    def __init__(self, gain: float, times: int, act: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.encoder, self.cell, self.head = nn.Linear(16, 32), nn.Linear(32, 32, bias=False), nn.Linear(32, 4)
        nn.init.normal_(self.cell.weight, std=gain / 32**0.5)
        self.times, self.act = times, act

    def forward(self, x: Tensor) -> Tensor:
        h = self.encoder(x)
        for _ in range(self.times):
            h = self.act(self.cell(h))
        return self.head(h)


@sick(
    CASES,
    "l_unrolled_map_forgets_its_start",
    ("vanishing_gradient",),
    ("encoder", "cell"),
    also=("loss_plateau", "zero_gradient"),
    source="https://arxiv.org/abs/1211.5063: a contraction applied many times, gradients that vanish",
    proof=every(gradient_ratio("encoder.weight", "head.bias", 1e-6), loss_stays(0.1)),
)
def _(seed: int) -> Setup:
    model = Unrolled(0.4, 25)
    return fit(model, classify(model, Blobs(seed)), torch.optim.SGD(model.parameters(), lr=0.1), 60)


@sick(
    CASES,
    "l_unrolled_map_in_its_chaos",
    ("exploding_gradient",),
    ("encoder", "cell"),
    also=("saturated_activation", "gradient_spike", "update_ratio_too_large", "loss_diverging", "loss_spike", "poor_init"),
    source="https://arxiv.org/abs/1211.5063: a map that expands, applied many times, gradients that explode",
    proof=gradient_ratio("head.weight", "encoder.weight", 1e-3, last=15),
)
def _(seed: int) -> Setup:
    model = Unrolled(3.0, 30)
    return fit(model, classify(model, Blobs(seed)), torch.optim.Adam(model.parameters(), lr=1e-5), 50)


class Amplify(torch.autograd.Function):
    """The identity, whose backward pass multiplies by ten."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 10 * g


class Amplified(nn.Module):
    """A Linear and an activation behind such an identity."""

    def __init__(self, inputs: int, outputs: int, times: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.times = nn.Linear(inputs, outputs), times

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.times(self.linear(x)))


@sick(
    CASES,
    "l_custom_backward_multiplies_by_ten",
    ("exploding_gradient",),
    ("0", "1", "2", "3"),
    source="https://arxiv.org/abs/1409.7495 has a layer that scales gradients; here it stands in every block and scales by 10",
    proof=gradient_ratio("6.weight", "0.linear.weight", 1e-3),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(
        *(Amplified(a, 32, Amplify.apply) for a in (16, 32, 32, 32, 32, 32)),
        nn.Linear(32, 4),
    )
    initialise(model, lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu"))
    return fit(model, classify(model, Blobs(seed)), torch.optim.Adam(model.parameters(), lr=1e-3), 40)


# Units that say nothing.


@sick(
    CASES,
    "l_population_net_starts_at_zero",
    ("dead_units",),
    ("1",),
    source="https://github.com/jvargasmu/population_estimation/issues/68: the initial solution predicts only zeros, due to the ReLU",
    proof=dead_fraction("1", 0.7),
)
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, 2, 48, 8, 1)
    with torch.no_grad():
        model[0].bias[8:] = -9.0
    data = Curve(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        return mse(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-3), 60)


@sick(
    CASES,
    "l_counts_through_negative_weights",
    ("dead_units",),
    ("acts.0",),
    also=("zero_gradient",),
    source="https://arxiv.org/abs/1903.06733: ReLU units born dead; here inputs that are never negative meet weights that mostly are",
    proof=dead_fraction("acts.0", 0.6),
)
def _(seed: int) -> Setup:
    graph = Graph(seed)
    x = graph.x.abs()
    model = Gcn(graph, 2, nn.ReLU)
    with torch.no_grad():
        model.layers[0].weight[:18] = -model.layers[0].weight[:18].abs() - 0.2
    return fit(
        model, lambda i: F.cross_entropy(model(x, graph.adjacency), graph.y), torch.optim.Adam(model.parameters(), lr=2e-3), 50
    )


@sick(
    CASES,
    "l_critic_dies_in_one_step",
    ("dead_units",),
    ("3",),
    also=("gradient_spike", "loss_spike", "update_ratio_too_large", "zero_gradient", "vanishing_gradient", "missing_gradient"),
    onset=41,
    source="https://github.com/keras-team/keras/issues/7057: one step too large knocks the weights into the never-active zone",
    proof=every(dead_fraction("3", 0.7, first=41), gradient_spikes(40, 100)),
)
def _(seed: int) -> Setup:
    data = Curve(seed)
    model = mlp(nn.ReLU, 2, 32, 8, 1)
    nn.init.uniform_(model[4].weight, 0.1, 0.3)  # the critic's head is positive: a reward of -1000 pushes every unit down

    def loss(i: int) -> Tensor:
        x, y = data()
        return mse(model(x), y - 1000.0 * (i == 40))

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.005), 80)


@sick(
    CASES,
    "l_actor_with_weights_of_five",
    ("saturated_activation",),
    ("1", "3"),
    also=("poor_init", "vanishing_gradient", "exploding_gradient"),
    source="https://github.com/floodsung/DDPG/issues/6: the values sent to the activation are too large, it works in the saturation area",
    proof=every(flat("1", 0.8), flat("3", 0.8)),
)
def _(seed: int) -> Setup:
    model = initialise(mlp(nn.Tanh, 2, 32, 8, 1), lambda w: nn.init.normal_(w, std=5.0))
    nn.init.xavier_uniform_(model[4].weight)
    data = Curve(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        return mse(torch.tanh(model(x)), y.clamp(-1, 1))

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-3), 50)


@sick(
    CASES,
    "l_sum_over_neighbours_saturates",
    ("saturated_activation",),
    ("acts.0", "acts.1"),
    also=("vanishing_gradient", "poor_init"),
    source="https://arxiv.org/abs/1609.02907, 2.1: the adjacency must be normalised, or it changes the scale of the features",
    proof=every(flat("acts.0", 0.8, sigmoid=True), flat("acts.1", 0.8, sigmoid=True)),
)
def _(seed: int) -> Setup:
    graph = Graph(seed)
    every_edge = 1 - 0.5 * (torch.rand(60, 60, generator=rng(seed, 20)) < 0.3).float()
    model = Gcn(graph, 2, nn.Sigmoid)
    initialise(model.layers, lambda w: nn.init.xavier_normal_(w, gain=2.0))
    x = graph.x.abs()
    return fit(model, lambda i: F.cross_entropy(model(x, every_edge), graph.y), torch.optim.Adam(model.parameters(), lr=2e-3), 50)


# NaN and Inf.

AFTER = ("non_finite_weight", "non_finite_gradient", "non_finite_activation", "non_finite_loss")


@sick(
    CASES,
    "l_kl_of_a_hard_target",
    ("non_finite_loss",),
    onset=25,
    source="https://github.com/RasmussenLab/vamb/issues/12: p * log(p) with p = 0 is NaN in code",
    proof=begins(25, loss=True, grads=False),
)
def _(seed: int) -> Setup:
    model, data = mlp(nn.ReLU, 2), Blobs(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        p = 0.9 * F.one_hot(y, 4) + 0.025
        if i >= 25:
            p[0] = F.one_hot(y[0], 4)  # from here on, one label of the batch has no smoothing
        return (p * (p.log() - F.log_softmax(model(x), -1))).sum(-1).mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-3), 50)


@sick(
    CASES,
    "l_advantages_of_one_sample",
    ("non_finite_loss",),
    also=AFTER,
    onset=24,
    source="https://github.com/jolibrain/wheatley/pull/93: the last minibatch has size 1, std() is nan, a nan loss is backpropagated",
    proof=begins(24, loss=True, grads=True),
)
def _(seed: int) -> Setup:
    world = Bandit(seed)
    model = mlp(nn.Tanh, 1, 32, 8, 4)

    def loss(i: int) -> Tensor:
        s = world.states()[: 1 if i == 24 else 64]
        logits = model(s)
        a = torch.multinomial(torch.softmax(logits.detach().nan_to_num(), -1), 1, generator=world.generator)
        r = world.reward(s, a[:, 0])
        advantage = (r - r.mean()) / (r.std() + 1e-8)
        return -(F.log_softmax(logits, -1).gather(1, a)[:, 0] * advantage).mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 45)


@sick(
    CASES,
    "l_where_hides_a_bad_root",
    ("non_finite_gradient",),
    ("",),
    also=AFTER,
    source="https://github.com/pytorch/pytorch/issues/68425: torch.where gives NaN in the backward pass of the side not taken",
    proof=begins(0, loss=False, grads=True),
)
def _(seed: int) -> Setup:
    data = Curve(seed)
    model = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 1))

    def loss(i: int) -> Tensor:
        x, y = data()
        out = model(x)
        return mse(torch.where(out > 0, out.sqrt(), torch.zeros_like(out)), y.abs())

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-3), 25)


@sick(
    CASES,
    "l_siamese_pair_of_twins",
    ("non_finite_gradient",),
    ("",),
    also=AFTER,
    onset=25,
    source="https://github.com/richzhang/PerceptualSimilarity/issues/69: SqrtBackward returned nan, some sqrt are of 0",
    proof=begins(25, loss=False, grads=True),
)
def _(seed: int) -> Setup:
    model, data, g = mlp(nn.Tanh, 1, 32, 16, 8), Blobs(seed), rng(seed, 21)

    def loss(i: int) -> Tensor:
        x, y = data()
        other = torch.randperm(len(x), generator=g)
        other[other == torch.arange(len(x))] = (other[other == torch.arange(len(x))] + 1) % len(x)
        x2, y2 = x[other].clone(), y[other]
        if i == 25:
            x2[3], y2[3] = x[3], y[3]
        z = model(torch.cat([x, x2]))
        d = (z[: len(x)] - z[len(x) :]).square().sum(-1).sqrt()
        return torch.where(y == y2, d, (2 - d).clamp(min=0)).mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-3), 45)


@sick(
    CASES,
    "l_series_with_a_missing_reading",
    ("non_finite_input",),
    ("",),
    also=AFTER,
    onset=30,
    source="https://github.com/Nixtla/neuralforecast/issues/186: missing values go in, and it is hard to see that the data is to blame",
    proof=every(nan_enters(30), first_non_finite(30)),
)
def _(seed: int) -> Setup:
    g = rng(seed, 22)
    series = torch.sin(torch.arange(400) / 5) + 0.2 * torch.randn(400, generator=g)
    windows = series.unfold(0, 13, 1).clone()
    model = mlp(nn.ReLU, 1, 32, 12, 1)

    def loss(i: int) -> Tensor:
        rows = windows[torch.randint(len(windows), (32,), generator=g)]
        if i == 30:
            rows[5, 3] = math.nan
        return mse(model(rows[:, :12]), rows[:, 12:])

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-3), 55)


@sick(
    CASES,
    "l_states_divided_by_their_spread",
    ("non_finite_input",),
    ("",),
    also=AFTER,
    onset=20,
    source="https://github.com/timeseriesAI/tsai/issues/506: X contains nan; here from 0 / 0 in the normalisation of a constant channel",
    proof=every(nan_enters(20), first_non_finite(20)),
)
def _(seed: int) -> Setup:
    data = Blobs(seed)
    model = mlp(nn.Tanh, 1)

    def loss(i: int) -> Tensor:
        x, y = data()
        if i == 20:
            x[:, 2] = 0.0
        return F.cross_entropy(model((x - x.mean(0)) / x.std(0)), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-3), 45)


class Resample(nn.Module):
    """The reparameterisation of a Gaussian posterior."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = rng(seed, 23)

    def forward(self, mu: Tensor, log_variance: Tensor) -> Tensor:
        return mu + (0.5 * log_variance).exp() * torch.randn(mu.shape, generator=self.generator)


class Vae(nn.Module):
    """A small variational autoencoder."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.encoder, self.mu, self.spread = nn.Sequential(nn.Linear(8, 32), nn.ReLU()), nn.Linear(32, 4), nn.Linear(32, 4)
        self.sample, self.decoder = Resample(seed), mlp(nn.ReLU, 1, 32, 4, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.encoder(x)
        mu, s = self.mu(h), self.spread(h)
        return self.decoder(self.sample(mu, s)), -0.5 * (1 + s - mu.square() - s.clamp(max=80).exp()).sum(-1)


@sick(
    CASES,
    "l_reparameterisation_overflows",
    ("non_finite_activation",),
    ("sample",),
    also=(*AFTER, "unnormalized_input"),
    onset=20,
    source="https://github.com/vanderschaarlab/synthcity/issues/331: unbounded log-variances explode when exponentiated",
    proof=begins(20, loss=True, grads=True, outputs=("", "sample", "decoder", "decoder.0", "decoder.1", "decoder.2")),
)
def _(seed: int) -> Setup:
    data, model = low_rank(seed), Vae(seed)

    def loss(i: int) -> Tensor:
        x = data()
        if i == 20:
            x[:8] *= 1e6
        out, kl = model(x)
        return mse(out, x) + 0.01 * kl.mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-4), 45)


class Attend(nn.Module):
    """Attention over the neighbours of every node."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).T / x.shape[1] ** 0.5
        return torch.softmax(scores.masked_fill(edges == 0, -math.inf), -1) @ x


class Gat(nn.Module):
    """An embedding, attention over the neighbours, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention, self.head = nn.Linear(12, 24), Attend(24), nn.Linear(24, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        h = torch.relu(self.embed(x))
        return self.head(h + self.attention(h, edges))


@sick(
    CASES,
    "l_graph_attention_of_a_lone_node",
    ("non_finite_activation",),
    ("attention",),
    also=AFTER,
    onset=22,
    source="https://github.com/pytorch/pytorch/issues/41508, in https://github.com/pytorch/pytorch/pull/131060: rows masked out entirely",
    proof=begins(22, loss=True, grads=True, outputs=("", "attention", "head")),
)
def _(seed: int) -> Setup:
    graph, model = Graph(seed), Gat()

    def loss(i: int) -> Tensor:
        edges = graph.edges.clone()
        if i == 22:
            edges[7] = 0
        return F.cross_entropy(model(graph.x, edges), graph.y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 45)


# Healthy runs.


@healthy(
    CASES,
    "l_gan_settles_at_its_equilibrium",
    source="https://arxiv.org/abs/1406.2661: at the equilibrium D gives 1/2 everywhere and the losses stay at 2 ln 2 and ln 2",
    proof=told(below=0.8, what="the distance of the fakes' mean"),
)
def _(seed: int) -> Setup:
    return adversarial(seed, VANILLA, 120, lr=2e-3, betas=(0.0, 0.9))


def clip_weights(d: nn.Module) -> None:
    with torch.no_grad():
        for p in d.parameters():
            p.clamp_(-0.1, 0.1)


@healthy(
    CASES,
    "l_wgan_with_clipped_critic",
    source="https://arxiv.org/abs/1701.07875: the critic is clipped after each step; its loss is a distance, and changes sign",
    proof=told(below=0.8, what="the distance of the fakes' mean"),
)
def _(seed: int) -> Setup:
    return adversarial(seed, WASSERSTEIN, 70, lr=2e-3, critics=3, optimizer=torch.optim.RMSprop, after=clip_weights)


def penalised(d: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    mix = torch.linspace(0, 1, len(real))[:, None]
    x = (mix * real + (1 - mix) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(d(x).sum(), x, create_graph=True)
    return d(fake).mean() - d(real).mean() + (slope.norm(dim=1) - 1).square().mean()


@healthy(
    CASES,
    "l_wgan_with_gradient_penalty",
    source="https://arxiv.org/abs/1704.00028: a penalty on the slope of the critic, by a gradient of a gradient",
    proof=told(below=0.8, what="the distance of the fakes' mean"),
)
def _(seed: int) -> Setup:
    return adversarial(seed, (penalised, WASSERSTEIN[1]), 60, lr=3e-3, critics=3, betas=(0.5, 0.9))


@healthy(
    CASES,
    "l_least_squares_gan",
    source="https://arxiv.org/abs/1611.04076: least squares in place of the logarithm",
    proof=told(below=0.8, what="the distance of the fakes' mean"),
)
def _(seed: int) -> Setup:
    return adversarial(seed, LEAST_SQUARES, 120, lr=2e-3, betas=(0.0, 0.9))


@healthy(
    CASES,
    "l_vae_with_annealed_kl",
    source="https://arxiv.org/abs/1511.06349: the weight of the KL rises from 0, so the loss may rise as the model gets better",
    proof=told(below=0.25, what="the error of the reconstruction"),
)
def _(seed: int) -> Setup:
    data, model, notes = low_rank(seed), Vae(seed), []

    def loss(i: int) -> Tensor:
        x = data()
        out, kl = model(x)
        error = (out - x).square().sum(-1).mean()
        notes.append(float(error.detach()) / 8)
        return error + 0.3 * min(1.0, i / 150) * kl.mean()

    setup = fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 250)
    return Told(setup.model, setup.train, notes)


@healthy(
    CASES,
    "l_reinforce_with_running_baseline",
    source="https://discuss.pytorch.org/t/policy-gradient-using-loss-as-reward/13877: the loss is no measure, the reward is",
    proof=told(above=0.6, what="the reward"),
)
def _(seed: int) -> Setup:
    world, policy, notes, base = Bandit(seed), mlp(nn.Tanh, 1, 32, 8, 4), [], [0.25]

    def loss(i: int) -> Tensor:
        s = world.states()
        logits = policy(s)
        a = world.act(logits)
        r = world.reward(s, a)
        notes.append(float(r.mean()))
        advantage = r - base[0]
        base[0] = 0.95 * base[0] + 0.05 * float(r.mean())
        return -(F.log_softmax(logits, -1).gather(1, a[:, None])[:, 0] * advantage).mean()

    setup = fit(policy, loss, torch.optim.Adam(policy.parameters(), lr=1e-2), 200)
    return Told(setup.model, setup.train, notes)


@healthy(
    CASES,
    "l_actor_and_critic_in_step",
    source="https://github.com/ikostrikov/pytorch-a3c/issues/30: the policy loss is negative, and that is right",
    proof=told(above=0.6, what="the reward"),
)
def _(seed: int) -> Setup:
    return actor_critic(seed, 200)


def chain_learner(seed: int, updates: int, gamma: float = 0.9) -> Told:
    """DQN with a target network that is copied now and then. `told`: how far the values are from the true ones."""
    data, q = Chain(seed), mlp(nn.ReLU, 1, 32, 10, 2)
    target = copy.deepcopy(q)
    optimizer = torch.optim.Adam(q.parameters(), lr=1e-2)
    notes: list[float] = []
    truth = torch.tensor([gamma ** (8 - k) for k in range(9)])

    def train() -> Iterator[Event]:
        for i in range(updates):
            s, a, r, n, done = data()
            with torch.no_grad():
                goal = r + gamma * (1 - done) * target(n).max(1).values
            loss = F.smooth_l1_loss(q(s).gather(1, a[:, None])[:, 0], goal)
            optimizer.zero_grad()
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]
            if i % 10 == 9:
                target.load_state_dict(q.state_dict())
            with torch.no_grad():
                notes.append(float((q(torch.eye(10))[:9].max(1).values - truth).abs().max()))

    return Told({"q": q, "target": target}, train, notes)


@healthy(
    CASES,
    "l_dqn_with_copied_target",
    source="https://github.com/tensorflow/agents/issues/316: the loss grows while the return is best; the target network never steps",
    proof=told(below=0.25, what="the worst error of a value"),
)
def _(seed: int) -> Setup:
    return chain_learner(seed, 300)


@healthy(
    CASES,
    "l_ppo_epochs_over_one_rollout",
    source="https://arxiv.org/abs/1707.06347: several epochs on each rollout, whose clipped objective starts at 0 each time",
    proof=told(above=0.6, what="the reward"),
)
def _(seed: int) -> Setup:
    world, notes = Bandit(seed, batch=128), []
    body, pi, value = mlp(nn.Tanh, 1, 32, 8, 32), nn.Linear(32, 4), nn.Linear(32, 1)
    model = nn.ModuleDict({"body": body, "pi": pi, "value": value})
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3, eps=1e-5)

    def train() -> Iterator[Event]:
        for _ in range(45):
            s = world.states()
            with torch.no_grad():
                logits = pi(torch.tanh(body(s)))
                a = world.act(logits)
                r, old = world.reward(s, a), F.log_softmax(logits, -1).gather(1, a[:, None])[:, 0]
                gain = r - value(torch.tanh(body(s)))[:, 0]
                gain = (gain - gain.mean()) / (gain.std() + 1e-8)
            notes.append(float(r.mean()))
            for _ in range(3):
                for rows in torch.randperm(128, generator=world.generator).split(64):
                    h = torch.tanh(body(s[rows]))
                    logs = F.log_softmax(pi(h), -1)
                    ratio = (logs.gather(1, a[rows, None])[:, 0] - old[rows]).exp()
                    clipped = torch.minimum(ratio * gain[rows], ratio.clamp(0.8, 1.2) * gain[rows]).mean()
                    entropy = -(logs.exp() * logs).sum(-1).mean()
                    loss = -clipped + 0.5 * mse(value(h)[:, 0], r[rows]) - 0.01 * entropy
                    optimizer.zero_grad()
                    loss.backward()
                    yield "read", [loss]
                    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                    optimizer.step()
                    yield "step", [optimizer]

    return Told(model, train, notes)


@healthy(
    CASES,
    "l_gcn_with_validation_between",
    source="https://arxiv.org/abs/1609.02907: two graph convolutions on the whole graph, few labels, a validation pass every update",
    proof=converges(0.4),
)
def _(seed: int) -> Setup:
    graph = Graph(seed)
    model = Gcn(graph, 2, nn.ReLU)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=5e-4)

    def train() -> Iterator[Event]:
        for _ in range(120):
            model.train()
            optimizer.zero_grad()
            loss = F.cross_entropy(model(graph.x, graph.adjacency)[:30], graph.y[:30])
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]
            model.eval()
            with torch.no_grad():
                F.cross_entropy(model(graph.x, graph.adjacency)[30:], graph.y[30:])

    return Setup(model, train)


@healthy(
    CASES,
    "l_graph_attention_with_masks_of_inf",
    source="https://arxiv.org/abs/1710.10903: attention over neighbours, all others at -inf",
    proof=converges(0.4),
)
def _(seed: int) -> Setup:
    graph, model = Graph(seed), Gat()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    return fit(model, lambda i: F.cross_entropy(model(graph.x, graph.edges), graph.y), optimizer, 120)


@healthy(
    CASES,
    "l_denoiser_down_to_its_floor",
    source="https://arxiv.org/abs/2006.11239: the loss of a denoiser falls at once and then stays at a floor, noisy, for most of the run",
    proof=converges(0.7),
)
def _(seed: int) -> Setup:
    data, g = Points(seed, batch=128), rng(seed, 9)
    model = mlp(nn.SiLU, 2, 48, 3, 2)

    def loss(i: int) -> Tensor:
        x, t, e = data(), torch.rand(128, 1, generator=g), torch.randn(128, 2, generator=g)
        return mse(model(torch.cat([(1 - t).sqrt() * x + t.sqrt() * e, t], 1)), e)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 300)


@healthy(
    CASES,
    "l_pinn_of_a_boundary_problem",
    source="https://arxiv.org/abs/1711.10561: the residual of an equation, by gradients of gradients with create_graph",
    proof=converges(0.05),
)
def _(seed: int) -> Setup:
    g, model = rng(seed, 24), mlp(nn.Tanh, 2, 24, 1, 1)
    ends = torch.tensor([[0.0], [1.0]])

    def loss(i: int) -> Tensor:
        x = torch.rand(48, 1, generator=g).requires_grad_()
        u = model(x)
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (ddu,) = torch.autograd.grad(du.sum(), x, create_graph=True)
        return mse(ddu, -(math.pi**2) * torch.sin(math.pi * x)) + 20 * model(ends).square().mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-2), 300)


@healthy(
    CASES,
    "l_maml_on_sines",
    source="https://arxiv.org/abs/1703.03400: an inner loop of three steps, unrolled, on sines of many phases; loss differs by task",
    proof=converges(0.75),
)
def _(seed: int) -> Setup:
    g, model = rng(seed, 25), mlp(nn.Tanh, 1, 32, 1, 1)

    def loss(i: int) -> Tensor:
        total = torch.zeros(())
        for _ in range(3):
            size, phase = 0.5 + torch.rand(1, generator=g), 3 * torch.rand(1, generator=g)
            x = 6 * torch.rand(24, 1, generator=g) - 3
            y = size * torch.sin(x + phase)
            fast = dict(model.named_parameters())
            for _ in range(3):
                inner = mse(torch.func.functional_call(model, fast, x[:12]), y[:12])
                grads = torch.autograd.grad(inner, list(fast.values()), create_graph=True)
                fast = {name: p - 0.05 * d for (name, p), d in zip(fast.items(), grads, strict=True)}
            total = total + mse(torch.func.functional_call(model, fast, x[12:]), y[12:]) / 3
        return total

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-2), 90)


class Equilibrium(nn.Module):
    """A fixed point, found without a graph, and one step on top of it with one."""

    def __init__(self) -> None:
        super().__init__()
        self.inject, self.cell, self.head = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 4)
        with torch.no_grad():
            self.cell.weight *= 0.5

    def forward(self, x: Tensor) -> Tensor:
        u = self.inject(x)
        with torch.no_grad():
            z = torch.zeros_like(u)
            for _ in range(15):
                z = torch.tanh(self.cell(z) + u)
        return self.head(torch.tanh(self.cell(z) + u))


@healthy(
    CASES,
    "l_equilibrium_model_with_one_step_gradient",
    source="https://arxiv.org/abs/1909.01377: a fixed point, solved under no_grad; the cell runs many times and gets one gradient",
    proof=converges(0.6),
)
def _(seed: int) -> Setup:
    model = Equilibrium()
    return fit(model, classify(model, Blobs(seed)), torch.optim.Adam(model.parameters(), lr=3e-3), 80)


@healthy(
    CASES,
    "l_rounded_code_with_straight_through",
    source="https://arxiv.org/abs/1308.3432: the gradient of the code goes straight through the rounding",
    proof=converges(0.5),
)
def _(seed: int) -> Setup:
    data, model = low_rank(seed), Quantised(lambda z: z + (z.round() - z).detach())

    def loss(i: int) -> Tensor:
        x = data()
        return mse(model(x), x)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 200)


class Reverse(torch.autograd.Function):
    """The identity, whose backward pass turns the gradient around."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -0.3 * g


class Domains(nn.Module):
    """Features, a classifier, and a judge of the domain behind a gradient reversal."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(16, 32), nn.ReLU())
        self.label, self.judge = nn.Linear(32, 4), nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.features(x)
        return self.label(h), self.judge(Reverse.apply(h))[:, 0]


@healthy(
    CASES,
    "l_domains_behind_gradient_reversal",
    source="https://arxiv.org/abs/1409.7495: the judge's loss does not fall, it is meant to stay at ln 2",
    proof=told(above=0.85, what="the accuracy"),
)
def _(seed: int) -> Setup:
    a, b, model, notes = Blobs(seed), Blobs(seed), Domains(), []
    b.generator.manual_seed(4000 + seed)

    def loss(i: int) -> Tensor:
        (x, y), (x2, _) = a(), b()
        out, domain = model(torch.cat([x, x2 + 0.5]))
        notes.append(float((out[: len(x)].argmax(1) == y).float().mean()))
        truth = (torch.arange(len(domain)) < len(x)).float()
        return F.cross_entropy(out[: len(x)], y) + F.binary_cross_entropy_with_logits(domain, truth)

    setup = fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 120)
    return Told(setup.model, setup.train, notes)


@healthy(
    CASES,
    "l_lbfgs_with_closures",
    source="https://pytorch.org/docs/stable/generated/torch.optim.LBFGS.html: the closure runs forward and backward several times a step",
    proof=converges(0.3),
)
def _(seed: int) -> Setup:
    data = Curve(seed, batch=128)
    x, y = data()
    model = mlp(nn.Tanh, 1, 16, 8, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = mse(model(x), y)
        loss.backward()
        return loss

    def train() -> Iterator[Event]:
        for _ in range(40):
            loss = optimizer.step(closure)
            yield "read", [loss]
            yield "step", [optimizer]

    return Setup(model, train)


def views(seed: int, batch: int = 64) -> Callable[[], tuple[Tensor, Tensor]]:
    """Two noisy views of the same points."""
    data, g = Blobs(seed, batch=batch, classes=8), rng(seed, 26)

    def draw() -> tuple[Tensor, Tensor]:
        x, _ = data()
        return x + 0.3 * torch.randn(x.shape, generator=g), x + 0.3 * torch.randn(x.shape, generator=g)

    return draw


@healthy(
    CASES,
    "l_student_and_moving_average_teacher",
    source="https://arxiv.org/abs/2006.07733: a teacher that is a moving average of the student, never stepped, without gradients",
    proof=converges(0.4),
)
def _(seed: int) -> Setup:
    draw, student, predictor = views(seed), mlp(nn.ReLU, 1, 48, 16, 16), mlp(nn.ReLU, 1, 32, 16, 16)
    teacher = copy.deepcopy(student)
    optimizer = torch.optim.Adam(params(student, predictor), lr=3e-3)

    def train() -> Iterator[Event]:
        for _ in range(120):
            a, b = draw()
            with torch.no_grad():
                goal = F.normalize(teacher(b), dim=-1)
            loss = (F.normalize(predictor(student(a)), dim=-1) - goal).square().sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]
            with torch.no_grad():
                for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
                    t.lerp_(s, 0.02)

    return Setup({"student": student, "predictor": predictor, "teacher": teacher}, train)


@healthy(
    CASES,
    "l_queue_of_negatives_fills",
    source="https://arxiv.org/abs/1911.05722: the loss is ln(1 + K) at a guess and K, the queue, grows at first: the loss rises, then falls",
    proof=told(below=-5.0, what="the loss less that of a guess among so many"),
)
def _(seed: int) -> Setup:
    draw, query, notes = views(seed, 32), mlp(nn.ReLU, 1, 48, 16, 16), []
    key = copy.deepcopy(query).requires_grad_(False)
    optimizer = torch.optim.Adam(query.parameters(), lr=3e-3)
    queue = [F.normalize(key(draw()[1]), dim=-1)]

    def train() -> Iterator[Event]:
        for _ in range(150):
            a, b = draw()
            q, k = F.normalize(query(a), dim=-1), F.normalize(key(b), dim=-1)
            scores = torch.cat([(q * k).sum(-1, keepdim=True), *(q @ old.T for old in queue)], 1) / 0.1
            loss = F.cross_entropy(scores, torch.zeros(len(q), dtype=torch.long))
            notes.append(float(loss.detach()) - math.log(scores.shape[1]))
            optimizer.zero_grad()
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]
            queue.append(k)
            del queue[:-30]
            with torch.no_grad():
                for t, s in zip(key.parameters(), query.parameters(), strict=True):
                    t.lerp_(s, 0.05)

    return Told({"query": query, "key": key}, train, notes)


class ThreeHeads(nn.Module):
    """A frozen random projection, a trunk, and heads, of which one belongs to a task that this run does not train."""

    def __init__(self) -> None:
        super().__init__()
        self.random = nn.Linear(8, 64).requires_grad_(False)
        self.trunk = nn.Linear(64, 32)
        self.first, self.second = nn.Linear(32, 1), nn.Linear(32, 1)

    def forward(self, x: Tensor, task: int) -> Tensor:
        h = torch.relu(self.trunk(torch.cos(3 * self.random(x))))
        return (self.first, self.second)[task](h)


@healthy(
    CASES,
    "l_tasks_take_turns_over_random_features",
    source="https://arxiv.org/abs/1705.07115 for several tasks; each head has gradients in every other update only",
    proof=converges(0.7),
)
def _(seed: int) -> Setup:
    data, model = Curve(seed), ThreeHeads()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def loss(i: int) -> Tensor:
        x, _ = data()
        return mse(model(x, 0), torch.sin(x[:, :1])) if i % 2 == 0 else mse(model(x, 1), torch.cos(x[:, 1:2]))

    return fit(model, loss, optimizer, 240)


@healthy(
    CASES,
    "l_descent_by_hand",
    source="https://airoads.org/ch06-deep-learning/ch02-pytorch/02-autograd/: w -= lr * w.grad under no_grad, then w.grad.zero_()",
    proof=converges(0.6),
)
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, 2)
    loss_of = classify(model, Blobs(seed))

    def train() -> Iterator[Event]:
        for i in range(80):
            loss = loss_of(i)
            loss.backward()
            yield "read", [loss]
            with torch.no_grad():
                for p in model.parameters():
                    assert p.grad is not None
                    p -= 0.2 * p.grad
                    p.grad.zero_()
            yield "step", []

    return Setup(model, train)


@healthy(
    CASES,
    "l_training_resumed_from_a_checkpoint",
    source="https://pytorch.org/tutorials/recipes/recipes/saving_and_loading_a_general_checkpoint.html: model and optimizer are reloaded",
    proof=converges(0.5),
)
def _(seed: int) -> Setup:
    data, model = Curve(seed), mlp(nn.GELU, 2, 32, 8, 1)
    state: dict[str, Any] = {}

    def train() -> Iterator[Event]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for i in range(160):
            if i == 60:
                state.update(copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()}))
            if i == 80:  # the job was killed, and goes on from its last checkpoint
                optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
                model.load_state_dict(state["model"])
                optimizer.load_state_dict(state["optimizer"])
            x, y = data()
            loss = mse(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "l_warm_restarts_from_warm_up",
    source="https://arxiv.org/abs/1608.03983: cosine to 0 and back to the top, where the loss jumps a little; the first lr is 0",
    proof=converges(0.5),
)
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)

    def before(i: int) -> None:
        top = 0.05 * min(1.0, i / 20)
        optimizer.param_groups[0]["lr"] = top * 0.5 * (1 + math.cos(math.pi * (i % 50) / 49))

    return fit(model, classify(model, Blobs(seed)), optimizer, 150, before=before)


@healthy(
    CASES,
    "l_curriculum_gets_harder",
    source="https://dl.acm.org/doi/10.1145/1553374.1553380 (curriculum learning): the loss rises as harder examples come in",
    proof=told(above=0.8, what="the accuracy"),
)
def _(seed: int) -> Setup:
    data, model, notes = Blobs(seed, batch=64, spread=0.3), mlp(nn.ReLU, 2), []

    def loss(i: int) -> Tensor:
        data.spread = 0.3 if i < 40 else 1.0 if i < 90 else 1.6
        x, y = data()
        out = model(x)
        notes.append(float((out.argmax(1) == y).float().mean()))
        return F.cross_entropy(out, y)

    setup = fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 140)
    return Told(setup.model, setup.train, notes)


@healthy(
    CASES,
    "l_likelihood_crosses_zero",
    source="https://papers.nips.cc/paper/7219 (deep ensembles): the likelihood of a density may be above 1, its loss below 0",
    proof=told(below=0.25, what="the spread that the model gives"),
)
def _(seed: int) -> Setup:
    data, model, notes = Curve(seed, noise=0.05), Density(), []
    data.w[:, 1] = 0
    data.w[:, 0] /= 2

    def loss(i: int) -> Tensor:
        x, y = data()
        mu, s = model(x)
        notes.append(float((0.5 * s).exp().mean().detach()))
        return nll((mu, s), y)

    setup = fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-2), 250)
    return Told(setup.model, setup.train, notes)


@healthy(
    CASES,
    "l_fine_tuning_what_has_converged",
    source="https://arxiv.org/abs/1801.06146: fine-tuning at a small lr; nothing is left to learn, the loss is low and flat from the start",
    proof=told(above=0.95, what="the accuracy"),
)
def _(seed: int) -> Setup:
    data, model, notes = Blobs(seed, batch=64), mlp(nn.ReLU, 2), []
    ahead, loss_of = torch.optim.Adam(model.parameters(), lr=1e-2), classify(model, data)
    for i in range(150):
        ahead.zero_grad()
        loss_of(i).backward()
        ahead.step()
    model.zero_grad()

    def loss(i: int) -> Tensor:
        x, y = data()
        out = model(x)
        notes.append(float((out.argmax(1) == y).float().mean()))
        return F.cross_entropy(out, y)

    setup = fit(model, loss, torch.optim.AdamW(model.parameters(), lr=1e-4), 130)
    return Told(setup.model, setup.train, notes)


@healthy(
    CASES,
    "l_heavy_tails_under_huber",
    source="https://pytorch.org/docs/stable/generated/torch.nn.HuberLoss.html: targets with heavy tails, losses that jump, clipped gradients",
    proof=told(below=0.4, what="the median error"),
)
def _(seed: int) -> Setup:
    data, model, notes, g = Curve(seed), mlp(nn.SiLU, 2, 32, 8, 1), [], rng(seed, 27)
    data.w[:, 1] = 0

    def loss(i: int) -> Tensor:
        x, y = data()
        out = model(x)
        notes.append(float((out - y).detach().abs().median()))
        tails = torch.randn(len(y), 1, generator=g) / torch.randn(len(y), 1, generator=g).abs().clamp(min=0.05)
        return F.huber_loss(out, y + 0.3 * tails)

    def between(i: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    setup = fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-2), 200, between=between)
    return Told(setup.model, setup.train, notes)


@healthy(
    CASES,
    "l_recommender_with_sparse_embeddings",
    source="https://pytorch.org/docs/stable/generated/torch.nn.Embedding.html, sparse=True: most rows have no gradient in an update",
    proof=told(above=0.75, what="the accuracy"),
)
def _(seed: int) -> Setup:
    data, model, notes = Ratings(seed, 40, 30), Recommender(40, 30, sparse=True), []
    sparse = torch.optim.SparseAdam(params(model.users, model.items), lr=2e-2)
    dense = torch.optim.Adam(model.net.parameters(), lr=1e-2)

    def train() -> Iterator[Event]:
        for _ in range(200):
            u, v, y = data()
            out = model(u, v)
            loss = F.binary_cross_entropy_with_logits(out, y)
            notes.append(float(((out > 0) == (y > 0)).float().mean()))
            sparse.zero_grad()
            dense.zero_grad()
            loss.backward()
            yield "read", [loss]
            sparse.step()
            dense.step()
            yield "step", [sparse, dense]

    return Told(model, train, notes)


@healthy(
    CASES,
    "l_summed_losses_of_batches_of_any_size",
    source="https://github.com/bytetriper/RAE/issues/67 is about accumulation gone wrong; here it is right, of losses that are summed",
    proof=told(below=0.7, what="the loss of a sample"),
)
def _(seed: int) -> Setup:
    data, model, notes, g = Blobs(seed), mlp(nn.ReLU, 2), [], rng(seed, 28)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def train() -> Iterator[Event]:
        for i in range(90):
            optimizer.zero_grad()
            losses = []
            for _ in range(3):
                data.batch = 128 if i % 30 == 29 else int(torch.randint(12, 25, (1,), generator=g))
                x, y = data()
                loss = F.cross_entropy(model(x), y, reduction="sum")
                loss.backward()
                losses.append(loss)
            notes.append(float(losses[-1].detach()) / data.batch)
            yield "read", losses
            optimizer.step()
            yield "step", [optimizer]

    return Told(model, train, notes)


@healthy(
    CASES,
    "l_smoothed_labels_have_a_floor",
    source="https://arxiv.org/abs/1906.02629: with smoothed labels the loss cannot fall below the entropy of the target",
    proof=told(above=0.9, what="the accuracy"),
)
def _(seed: int) -> Setup:
    data, model, notes = Blobs(seed, batch=64), mlp(nn.ReLU, 2), []

    def loss(i: int) -> Tensor:
        x, y = data()
        out = model(x)
        notes.append(float((out.argmax(1) == y).float().mean()))
        return F.cross_entropy(out, y, label_smoothing=0.3)

    setup = fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 200)
    return Told(setup.model, setup.train, notes)


@healthy(
    CASES,
    "l_an_optimizer_for_every_layer",
    source="https://pytorch.org/tutorials/intermediate/optimizer_step_in_backward_tutorial.html: one optimizer per parameter or layer",
    proof=converges(0.6),
)
def _(seed: int) -> Setup:
    model = mlp(nn.Tanh, 3)
    loss_of = classify(model, Blobs(seed))
    optimizers = [torch.optim.Adam(model[k].parameters(), lr=4e-3 / (1 + k / 2)) for k in (0, 2, 4, 6)]

    def train() -> Iterator[Event]:
        for i in range(80):
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = loss_of(i)
            loss.backward()
            yield "read", [loss]
            for optimizer in optimizers:
                optimizer.step()
            yield "step", optimizers

    return Setup(model, train)


@healthy(
    CASES,
    "l_backbone_thawed_and_added_later",
    source="https://pytorch.org/docs/stable/generated/torch.optim.Optimizer.add_param_group.html: frozen layers made trainable in mid run",
    proof=converges(0.5),
)
def _(seed: int) -> Setup:
    model = Fused()
    for p in params(model.text, model.image):
        p.requires_grad_(False)
    optimizer = torch.optim.Adam(model.fc.parameters(), lr=3e-3)

    def before(i: int) -> None:
        if i == 50:
            for p in params(model.text, model.image):
                p.requires_grad_(True)
            optimizer.add_param_group({"params": params(model.text, model.image), "lr": 1e-3})

    return fit(model, classify(model, Blobs(seed)), optimizer, 110, before=before)


@healthy(
    CASES,
    "l_sparse_rewards_and_an_entropy_bonus",
    source="https://arxiv.org/abs/1602.01783: an entropy bonus; most episodes of this run end without any reward, their gradient is near 0",
    proof=told(above=0.5, what="the reward"),
)
def _(seed: int) -> Setup:
    world, policy, notes = Bandit(seed, actions=8, batch=48), mlp(nn.Tanh, 1, 32, 8, 8), []

    def loss(i: int) -> Tensor:
        s = world.states()
        logits = policy(s)
        a = world.act(logits)
        r = world.reward(s, a)
        notes.append(float(r.mean()))
        logs = F.log_softmax(logits, -1)
        return -(logs.gather(1, a[:, None])[:, 0] * r).mean() + 0.005 * (logs.exp() * logs).sum(-1).mean()

    setup = fit(policy, loss, torch.optim.Adam(policy.parameters(), lr=1.5e-2), 300)
    return Told(setup.model, setup.train, notes)


@healthy(
    CASES,
    "l_ddpg_with_soft_targets",
    source="https://arxiv.org/abs/1509.02971: an actor, a critic, a slow copy of each; the actor's loss is a value, and falls below 0",
    proof=told(below=0.35, what="the distance from the best action"),
)
def _(seed: int) -> Setup:
    g, notes = rng(seed, 29), []
    rule = torch.randn(4, 1, generator=g) / 2
    actor, critic = nn.Sequential(mlp(nn.ReLU, 1, 32, 4, 1), nn.Tanh()), mlp(nn.ReLU, 1, 48, 5, 1)
    slow_actor, slow_critic = copy.deepcopy(actor), copy.deepcopy(critic)
    opt_a, opt_c = torch.optim.Adam(actor.parameters(), lr=3e-3), torch.optim.Adam(critic.parameters(), lr=1e-2)

    def train() -> Iterator[Event]:
        for _ in range(180):
            s, n = torch.randn(64, 4, generator=g), torch.randn(64, 4, generator=g)
            best = torch.tanh(s @ rule)
            a = (actor(s).detach() + 0.5 * torch.randn(64, 1, generator=g)).clamp(-1, 1)
            with torch.no_grad():
                goal = 1 - (a - best).square() + 0.5 * slow_critic(torch.cat([n, slow_actor(n)], 1))
            critic_loss = mse(critic(torch.cat([s, a], 1)), goal)
            opt_c.zero_grad()
            critic_loss.backward()
            yield "read", [critic_loss]
            opt_c.step()
            yield "step", [opt_c]
            opt_a.zero_grad()
            action = actor(s)
            actor_loss = -critic(torch.cat([s, action], 1)).mean()
            actor_loss.backward()
            yield "read", [actor_loss]
            opt_a.step()
            yield "step", [opt_a]
            notes.append(float((action.detach() - best).abs().mean()))
            with torch.no_grad():
                for slow, fast in ((slow_actor, actor), (slow_critic, critic)):
                    for t, p in zip(slow.parameters(), fast.parameters(), strict=True):
                        t.lerp_(p, 0.05)

    return Told({"actor": actor, "critic": critic, "slow_actor": slow_actor, "slow_critic": slow_critic}, train, notes)
