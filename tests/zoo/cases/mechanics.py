"""Runs whose fault, or trap, lies in the mechanics of the loop or in an unusual net."""

# mypy: disable-error-code="no-untyped-call,no-any-return,func-returns-value"
from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from tests.zoo.case import Blobs, Case, Event, Pictures, Setup, Text, classify, evens, fit, healthy, initialise, mlp, sick
from tests.zoo.plain import Plain, named_modules
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
"""What follows from one another."""


def others(rule: str) -> tuple[str, ...]:
    """The consequences of one of them."""
    return tuple(r for r in NON_FINITE if r != rule)


def said(name: str) -> Any:
    """A proof reads what the loop noted down: an attribute of the model, or of the first of several."""

    def read(plain: Plain) -> Any:
        model = plain.setup.model
        return getattr(model if isinstance(model, nn.Module) else next(iter(model.values())), name)

    return read


def noted(name: str, value: Any, model: nn.Module) -> Any:
    """Keep something on the model for the proof; not as a submodule or parameter."""
    object.__setattr__(model, name, value)
    return value


# ------------------------------------------------------------------------------------------------ sick


def poisson(net: nn.Module, seed: int, points: int = 64) -> Callable[[int], Tensor]:
    """u'' = -pi^2 sin(pi x) in (-1, 1), u(-1) = u(1) = 0, as the loss of a physics-informed net."""
    generator = torch.Generator().manual_seed(4000 + seed)
    ends = torch.tensor([[-1.0], [1.0]])

    def loss(i: int) -> Tensor:
        x = (2 * torch.rand(points, 1, generator=generator) - 1).requires_grad_()
        u = net(x)
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (ddu,) = torch.autograd.grad(du.sum(), x, create_graph=True)
        residual = ddu / math.pi**2 + torch.sin(math.pi * x)
        return residual.square().mean() + net(ends).square().mean()

    return loss


@sick(
    CASES,
    "me_pinn_of_sigmoids",
    ("vanishing_gradient",),
    evens(0, 10),
    also=("loss_plateau",),
    source="https://arxiv.org/abs/2001.04536 gradient pathologies of physics-informed nets; here a deep stack of logistic sigmoids",
    proof=every(
        gradient_ratio("0.weight", "14.bias", 1e-4, last=15),
        gradient_ratio("6.weight", "14.bias", 1e-2, last=15),
        loss_stays(0.1),
    ),
)
def _(seed: int) -> Setup:
    net = mlp(nn.Sigmoid, depth=7, width=32, inputs=1, outputs=1)
    return fit(net, poisson(net, seed), torch.optim.Adam(net.parameters(), lr=2e-3), updates=90)


class _Scale(torch.autograd.Function):
    """y = c x; the backward divides by c where it should multiply."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, c: float) -> Tensor:
        ctx.c = c
        return x * c

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad / ctx.c, None


class EqualLinear(nn.Module):
    """Equalised learning rate: weights of unit variance, scaled by 1/sqrt(fan in) when used."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.c = math.sqrt(2 / inputs)

    def forward(self, x: Tensor) -> Tensor:
        return _Scale.apply(F.linear(x, self.weight), self.c) + self.bias


@sick(
    CASES,
    "me_custom_scale_divides",
    ("exploding_gradient",),
    evens(0, 8),
    source="https://arxiv.org/abs/1710.10196 equalised learning rate, its scaling as a custom Function whose backward is upside down",
    proof=every(gradient_ratio("8.weight", "0.weight", 1e-2, last=15), gradient_ratio("4.weight", "0.weight", 0.1, last=15)),
)
def _(seed: int) -> Setup:
    hidden = [m for _ in range(5) for m in (EqualLinear(16, 16), nn.LeakyReLU(0.1))]
    model = nn.Sequential(*hidden, nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return fit(
        model,
        classify(model, Blobs(seed)),
        optimizer,
        updates=40,
        between=lambda i: void(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)),
    )


def void(value: object) -> None:
    """For lambdas."""


@sick(
    CASES,
    "me_importance_weight",
    ("gradient_spike",),
    source="https://arxiv.org/abs/1511.03722 off-policy gradients: one logged propensity of 1e-5 makes the importance weight huge",
    onset=25,
    also=("loss_spike",),
    proof=gradient_spikes(25, 100),
)
def _(seed: int) -> Setup:
    policy = mlp(nn.Tanh, depth=2)
    data = Blobs(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        action = torch.randint(4, y.shape, generator=data.generator)
        propensity = torch.full(y.shape, 0.25)
        if i == 25:  # one row of the log: a rare action that happened to be right
            action[0], propensity[0] = y[0], 1e-5
        reward = (action == y).float()
        ratio = F.log_softmax(policy(x), -1).gather(1, action[:, None])[:, 0].exp() / propensity
        return -(ratio * (reward - 0.25)).mean()

    return fit(policy, loss, torch.optim.Adam(policy.parameters(), lr=3e-3), updates=45)


class Siamese(nn.Module):
    """Two inputs, one encoder; gives their distance."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (self.encoder(a) - self.encoder(b)).square().sum(-1).sqrt()


@sick(
    CASES,
    "me_siamese_same_picture",
    ("non_finite_gradient",),
    ("encoder",),
    source="https://github.com/adambielski/siamese-triplet/issues/18 a pair of identical samples: the slope of sqrt at 0",
    onset=20,
    also=others("non_finite_gradient"),
    proof=first_non_finite(20),
)
def _(seed: int) -> Setup:
    model = Siamese()
    data = Blobs(seed, spread=0.7)

    def loss(i: int) -> Tensor:
        (a, ya), (b, yb) = data(), data()
        b, yb = torch.cat([a[:8].roll(1, 0), b[8:]]), torch.cat([ya[:8].roll(1), yb[8:]])
        if i == 20:
            b[3], yb[3] = a[3], ya[3]
        d = model(a, b)
        return torch.where(ya == yb, d.square(), F.relu(2 - d).square()).mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-3), updates=35)


class ActorCritic(nn.Module):
    """A shared trunk with a policy and a value, in a dict."""

    def __init__(self, actions: int = 4) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
        self.policy = nn.Linear(32, actions)
        self.value = nn.Linear(32, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.trunk(x)
        return {"logits": self.policy(h), "value": self.value(h)[:, 0]}


def bandit(x: Tensor, y: Tensor, out: dict[str, Tensor], logits: Tensor, generator: torch.Generator) -> Tensor:
    """Advantage actor-critic on a contextual bandit that pays where the action is the class."""
    logp = F.log_softmax(logits, -1)
    noise = torch.rand(logp.shape, generator=generator).clamp_min(1e-9)
    action = (logp.detach() - (-noise.log()).log()).argmax(-1)  # Gumbel: a draw from the policy
    reward = (action == y).float()
    advantage = reward - out["value"].detach()
    return -(advantage * logp.gather(1, action[:, None])[:, 0]).mean() + 0.5 * F.mse_loss(out["value"], reward)


@sick(
    CASES,
    "me_entropy_of_masked_actions",
    ("non_finite_loss",),
    source="https://github.com/tensorforce/tensorforce/issues/586 entropy of a policy with masked actions: 0 times -inf",
    onset=12,
    also=others("non_finite_loss"),
    proof=every(first_non_finite(12), first_non_finite(13, "policy")),
)
def _(seed: int) -> Setup:
    model = ActorCritic()
    data = Blobs(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        out = model(x)
        logits = out["logits"]
        if i >= 12:  # a stage of the game with moves that are not allowed
            allowed = torch.ones(len(x), 4, dtype=torch.bool)
            allowed[0, (y[0] + 1) % 4] = False
            logits = logits.masked_fill(~allowed, -torch.inf)
        p = logits.softmax(-1)
        entropy = -(p * p.log()).sum(-1).mean()
        return bandit(x, y, out, logits, data.generator) - 0.01 * entropy

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), updates=30)


class Gem(nn.Module):
    """Generalised mean over the height of a picture with a learnt power, without the clamp to positive values."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        return x.pow(self.p).mean(2).pow(1 / self.p).flatten(1)


@sick(
    CASES,
    "me_power_of_negative",
    ("non_finite_activation",),
    ("2",),
    source="https://arxiv.org/abs/1711.02512 generalised-mean pooling after an activation with negative values, clamp left out",
    also=others("non_finite_activation"),
    proof=every(first_non_finite(0, "2"), first_non_finite(1, "1")),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.SiLU(), Gem(), nn.Linear(16 * 8, 8))
    return fit(model, classify(model, Pictures(seed)), torch.optim.Adam(model.parameters(), lr=5e-3), updates=40)


@sick(
    CASES,
    "me_adam_in_half",
    ("non_finite_weight",),
    evens(0, 4),
    source="https://discuss.pytorch.org/t/adam-half-precision-nans/1765 Adam on weights in half: its eps of 1e-8 is 0 there",
    also=others("non_finite_weight"),
    proof=lambda plain: half_weights(plain),
)
def _(seed: int) -> Setup:
    model = mlp(nn.Tanh, depth=2).half()
    data = Blobs(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x.half()).float(), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-3), updates=25)


def half_weights(plain: Plain) -> str:
    """Gradients, outputs and the loss of update 0 are finite, the weights after its step are not."""
    assert math.isfinite(plain.losses[0])
    assert not any(n[0] for n in plain.nonfinite.values())
    bad = [name for name, norms in plain.weights.items() if math.isfinite(norms[0]) and not math.isfinite(norms[1])]
    assert len(bad) >= 2, bad
    return f"all gradients of update 0 are finite, and after its step these weights are not: {', '.join(bad)}"


@sick(
    CASES,
    "me_rare_class_prior_everywhere",
    ("dead_units", "poor_init"),
    ("0", "1", "2", "3"),
    source="https://arxiv.org/abs/1708.02002 the bias that makes rare classes improbable belongs to the last layer; here all layers have it",
    also=("zero_gradient", "vanishing_gradient"),
    proof=every(dead_fraction("1", 0.95, last=15), dead_fraction("3", 0.95, last=15)),
)
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, depth=2, outputs=6)
    for m in model.modules():
        if isinstance(m, nn.Linear):
            nn.init.constant_(m.bias, -math.log(0.99 / 0.01))
    data = Blobs(seed, classes=6, spread=0.7)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.binary_cross_entropy_with_logits(model(x), F.one_hot(y, 6).float())

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), updates=50)


class Hypernet(nn.Module):
    """The weights of a tanh net for the task at hand are the output of another net."""

    def __init__(self, tasks: int = 3, width: int = 48) -> None:
        super().__init__()
        self.width = width
        self.task = nn.Embedding(tasks, 16)
        self.hyper = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 16 * width + width * width))
        self.act1, self.act2 = nn.Tanh(), nn.Tanh()
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        flat = self.hyper(self.task(task))
        first, second = flat.split([16 * self.width, self.width**2])
        h = self.act1(x @ first.view(16, self.width))
        return self.head(self.act2(h @ second.view(self.width, self.width)))


@sick(
    CASES,
    "me_hypernet_variance",
    ("saturated_activation", "poor_init"),
    ("act1", "act2", "hyper"),
    source="https://arxiv.org/abs/2312.08399 principled weight initialisation for hypernetworks: usual init gives weights far too large",
    also=("vanishing_gradient",),
    proof=lambda plain: saturated(plain, ("act1", "act2")),
)
def _(seed: int) -> Setup:
    model = Hypernet()
    initialise(model.hyper, nn.init.kaiming_normal_)
    return fit(model, tasks(model, seed), torch.optim.Adam(model.parameters(), lr=1e-3), updates=50)


def tasks(model: Hypernet, seed: int) -> Callable[[int], Tensor]:
    """Another set of classes each update, in turn."""
    data = [Blobs(10 * seed + k) for k in range(3)]

    def loss(i: int) -> Tensor:
        x, y = data[i % 3]()
        return F.cross_entropy(model(x, torch.tensor(i % 3)), y)

    return loss


def saturated(plain: Plain, modules: tuple[str, ...]) -> str:
    """Root mean square of the outputs of tanh in the first updates."""
    level = {m: median(o.rms for o in plain.outputs[m][:15] if o is not None) for m in modules}
    assert all(x > 0.9 for x in level.values()), level
    return f"rms of tanh: {level}"


@sick(
    CASES,
    "me_sample_not_rsample",
    ("missing_gradient",),
    ("encoder",),
    source="https://docs.pytorch.org/docs/stable/distributions.html pathwise derivative: sample() has none, rsample() has",
    proof=no_gradient("encoder.0.weight", "encoder.0.bias", "encoder.2.weight", "encoder.2.bias"),
)
def _(seed: int) -> Setup:
    model = nn.ModuleDict(
        {
            "encoder": nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 6)),
            "decoder": nn.Sequential(nn.Linear(6, 32), nn.SiLU(), nn.Linear(32, 16)),
        }
    )
    data = Blobs(seed, classes=6, spread=0.3)

    def loss(i: int) -> Tensor:
        x, _ = data()
        z = torch.distributions.Normal(model["encoder"](x), 0.1).sample()
        return F.mse_loss(model["decoder"](z), x)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), updates=50)


class Checkpointed(nn.Module):
    """Residual blocks, each recomputed in the backward pass."""

    def __init__(self, reentrant: bool, blocks: int = 3, width: int = 16) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width)) for _ in range(blocks)
        )
        self.head = nn.Linear(width, 4)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


@sick(
    CASES,
    "me_checkpoint_input_without_grad",
    ("missing_gradient",),
    ("blocks",),
    source="https://docs.pytorch.org/docs/stable/checkpoint.html reentrant: at least one input must require a gradient, else none at all",
    proof=no_gradient(*(f"blocks.{k}.{m}.{p}" for k in range(3) for m in (0, 1, 3) for p in ("weight", "bias"))),
)
def _(seed: int) -> Setup:
    model = Checkpointed(reentrant=True)
    return fit(model, classify(model, Blobs(seed)), torch.optim.AdamW(model.parameters(), lr=3e-3), updates=40)


class Hashing(nn.Module):
    """Classes from a binary code."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 12), nn.BatchNorm1d(12))
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sign(self.encoder(x)))


@sick(
    CASES,
    "me_sign_without_ste",
    ("zero_gradient",),
    ("encoder",),
    source="https://discuss.pytorch.org/t/torch-round-gradient/28628/4 the slope of a step function is 0: no straight-through estimator",
    also=("vanishing_gradient",),
    proof=zero_gradient("encoder.0.weight", "encoder.3.weight", "encoder.4.weight"),
)
def _(seed: int) -> Setup:
    model = Hashing()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return fit(model, classify(model, Blobs(seed)), optimizer, updates=50)


@sick(
    CASES,
    "me_critic_not_zeroed",
    ("gradients_not_zeroed",),
    ("critic",),
    source="https://docs.pytorch.org/tutorials/recipes/recipes/zeroing_out_gradients.html of two, one zero_grad without brackets",
    proof=lambda plain: piled_up(plain),
)
def _(seed: int) -> Setup:
    critic = mlp(nn.Tanh, depth=2, width=24, outputs=1)
    actor = mlp(nn.Tanh, depth=2, width=24)
    data = Blobs(seed)
    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=3e-3)
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=3e-3)
    left: list[float] = noted("left", [], critic)

    def train() -> Iterator[Event]:
        for _ in range(50):
            x, y = data()
            logp = F.log_softmax(actor(x), -1)
            action = torch.multinomial(logp.detach().exp(), 1, generator=data.generator)[:, 0]
            reward = (action == y).float()
            value = critic(x)[:, 0]
            actor_loss = -((reward - value.detach()) * logp.gather(1, action[:, None])[:, 0]).mean()
            critic_loss = F.mse_loss(value, reward)
            actor_optimizer.zero_grad()
            actor_loss.backward()
            critic_optimizer.zero_grad  # noqa: B018  (the brackets were forgotten: nothing is called)
            left.append(sum(0.0 if p.grad is None else float(p.grad.norm()) for p in critic.parameters()))
            critic_loss.backward()
            yield "read", [actor_loss, critic_loss]
            actor_optimizer.step()
            critic_optimizer.step()
            yield "step", [actor_optimizer, critic_optimizer]

    return Setup({"critic": critic, "actor": actor}, train)


def piled_up(plain: Plain) -> str:
    """Gradients lie in the critic before each backward pass but the first."""
    left = said("left")(plain)
    assert left[0] == 0, left
    assert min(left[1:]) > 0, left
    return f"before its backward the critic still holds gradients of norm {median(left[1:]):.3g}"


class Growing(nn.Module):
    """A body and a head of as many classes as are known by now."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU())
        self.head = nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@sick(
    CASES,
    "me_head_grown",
    ("not_in_optimizer",),
    ("head",),
    source="https://arxiv.org/abs/1606.09282 new classes come: the head is rebuilt, the optimizer still holds the old one",
    onset=20,
    also=("gradients_not_zeroed",),
    proof=every(no_gradient("head.weight", "head.bias", first=20), lambda plain: head_as_built(plain)),
)
def _(seed: int) -> Setup:
    model = Growing()
    few, many = Blobs(seed), Blobs(seed, classes=7)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def before(i: int) -> None:
        if i == 20:
            old, model.head = model.head, nn.Linear(32, 7)
            with torch.no_grad():
                model.head.weight[:4].copy_(old.weight)
                model.head.bias[:4].copy_(old.bias)
            noted("built", model.head.weight.detach().clone(), model)

    def loss(i: int) -> Tensor:
        x, y = few() if i < 20 else many()
        return F.cross_entropy(model(x), y)

    return fit(model, loss, optimizer, updates=60, before=before)


def head_as_built(plain: Plain) -> str:
    """The new head has gradients and is bit for bit what it was when it was built."""
    weight = plain.setup.model.head.weight  # type: ignore[union-attr]
    assert isinstance(weight, nn.Parameter)
    assert weight.grad is not None
    assert float(weight.grad.norm()) > 0
    assert torch.equal(weight, said("built")(plain))
    return f"the new head has a gradient of {float(weight.grad.norm()):.3g} and never moved; the old one has none"


class Language(nn.Module):
    """A recurrent language model."""

    def __init__(self, vocabulary: int = 24, width: int = 24) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.rnn = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(x))[0])


@sick(
    CASES,
    "me_accumulation_longer_than_epoch",
    ("never_stepped",),
    source="https://github.com/huggingface/transformers/issues/2995 more accumulation steps than batches in an epoch: no step at all",
    proof=lambda plain: no_step(plain),
)
def _(seed: int) -> Setup:
    model = Language()
    data = Text(seed)
    batches = [data() for _ in range(6)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    accumulate = 8

    def train() -> Iterator[Event]:
        for _ in range(10):
            optimizer.zero_grad()
            for step, (x, y) in enumerate(batches):
                loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten()) / accumulate
                loss.backward()
                yield "read", [loss]
                if (step + 1) % accumulate == 0:
                    optimizer.step()
                    optimizer.zero_grad()
                    yield "step", [optimizer]

    return Setup(model, train)


def no_step(plain: Plain) -> str:
    """Gradients are there and the weights are the same at every reading."""
    for name, norms in plain.weights.items():
        assert len(set(norms)) == 1, name
        assert all(g > 0 for g in plain.grads[name]), name
    assert all(math.isnan(s) for steps in plain.steps.values() for s in steps)
    return f"{len(plain.losses)} backward passes, and every weight is what it was"


@sick(
    CASES,
    "me_zeroed_between_two_steps",
    ("frozen_weights",),
    ("body",),
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.Module.html model.zero_grad() between the steps of two optimizers",
    proof=every(
        unchanged("body.0.weight", "body.0.bias", "body.2.weight", "body.2.bias"), lambda plain: moves(plain, "head.weight")
    ),
)
def _(seed: int) -> Setup:
    model = Growing()
    data = Blobs(seed)
    head = torch.optim.SGD(model.head.parameters(), lr=0.2)
    body = torch.optim.SGD(model.body.parameters(), lr=0.1, momentum=0.9)

    def train() -> Iterator[Event]:
        for _ in range(50):
            x, y = data()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            yield "read", [loss]
            head.step()
            model.zero_grad()
            body.step()
            yield "step", [head, body]

    return Setup(model, train)


def moves(plain: Plain, parameter: str) -> str:
    """Every step changes it."""
    assert all(s > 0 for s in plain.steps[parameter])
    return f"{parameter} moves"


@sick(
    CASES,
    "me_onecycle_of_another_optimizer",
    ("update_ratio_too_large",),
    ("",),
    source="https://docs.pytorch.org/docs/stable/generated/torch.optim.lr_scheduler.OneCycleLR.html the max_lr of an SGD recipe with Adam",
    also=("loss_diverging", "loss_spike", "gradient_spike", "exploding_gradient"),
    proof=update_ratio(above=0.25, last=15),
)
def _(seed: int) -> Setup:
    model = mlp(lambda: nn.LeakyReLU(0.1), depth=2)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2.0, total_steps=61)
    return fit(model, classify(model, Blobs(seed)), optimizer, updates=60, before=lambda i: void(i and schedule.step()))


@sick(
    CASES,
    "me_lambda_lr_returns_the_lr",
    ("update_ratio_too_small",),
    ("",),
    source="https://docs.pytorch.org/docs/stable/generated/torch.optim.lr_scheduler.LambdaLR.html the lambda is a factor, not the rate",
    also=("loss_plateau",),
    proof=every(update_ratio(below=1e-4, last=15), loss_stays(0.1)),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(144, 8)
    )
    base = 2e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=base)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: base * (1 - step / 80))
    return fit(model, classify(model, Pictures(seed)), optimizer, updates=80, before=lambda i: void(i and schedule.step()))


@sick(
    CASES,
    "me_pairs_shuffled_apart",
    ("loss_plateau",),
    within=100,  # the time that the table allows for a plateau
    source="https://docs.pytorch.org/docs/stable/data.html two loaders of the two halves of a pair, each with shuffle=True of its own",
    proof=every(loss_stays(0.03, last=100), lambda plain: at_guess(plain)),
)
def _(seed: int) -> Setup:
    model = nn.ModuleDict({"left": mlp(nn.ReLU, 1, outputs=16), "right": mlp(nn.ReLU, 1, outputs=16)})
    generator = torch.Generator().manual_seed(5000 + seed)
    a = torch.randn(4096, 16, generator=generator)
    b = a @ torch.linalg.qr(torch.randn(16, 16, generator=generator))[0]
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    def order() -> Iterator[Tensor]:
        while True:
            yield from torch.randperm(len(a), generator=generator).split(32)

    one, two = order(), order()

    def loss(i: int) -> Tensor:
        left, right = model["left"](a[next(one)]), model["right"](b[next(two)])
        logits = F.normalize(left, dim=-1) @ F.normalize(right, dim=-1).T / 0.5
        target = torch.arange(len(left))
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    return fit(model, loss, optimizer, updates=200)


def at_guess(plain: Plain) -> str:
    """The loss is that of a guess."""
    level = median(plain.losses[50:])
    assert level > 0.97 * math.log(32), level
    return f"the loss stays at {level:.3f}, a guess has {math.log(32):.3f}"


class Adapted(nn.Module):
    """A net with a correction that starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(nn.ReLU, depth=2)
        self.delta = nn.Linear(16, 4, bias=False)
        nn.init.zeros_(self.delta.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.delta(x)


@sick(
    CASES,
    "me_group_lasso_of_zeros",
    ("loss_scale_collapse", "non_finite_gradient"),
    source="https://github.com/ymcui/Chinese-LLaMA-Alpaca/issues/534 a loss scale at its minimum; here a group lasso's root at 0",
    proof=lambda plain: scale_falls(plain),
)
def _(seed: int) -> Setup:
    model = Adapted()
    data = Blobs(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    scales: list[float] = noted("scales", [], model)

    def train() -> Iterator[Event]:
        for _ in range(40):
            x, y = data()
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                out = model(x)
            loss = F.cross_entropy(out.float(), y) + 1e-3 * model.delta.weight.square().sum(1).sqrt().sum()
            scaler.scale(loss).backward()
            yield "read", [loss]
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            yield "step", []

    return Setup(model, train)


def scale_falls(plain: Plain) -> str:
    """Every update halves the scale, all losses are finite, and only the correction has bad gradients."""
    scales = said("scales")(plain)
    assert all(b == a / 2 for a, b in itertools.pairwise(scales))
    assert scales[19] < 1
    assert all(math.isfinite(x) for x in plain.losses)
    assert all(plain.nonfinite["delta.weight"])
    assert not any(plain.nonfinite["net.0.weight"])
    return f"the scale is {scales[14]:g} after 15 updates and {scales[-1]:g} in the end; delta.weight has NaN in each"


@sick(
    CASES,
    "me_checkpoint_of_integers",
    ("poor_init", "exploding_gradient"),
    evens(0, 6),
    source="https://arxiv.org/abs/1712.05877 int8 weights loaded into a float model without their scales",
    also=("update_ratio_too_small", "loss_plateau"),
    proof=lambda plain: too_large(plain),
)
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, depth=3)
    state = model.state_dict()
    for name, w in state.items():
        if name.endswith("weight"):
            state[name] = (w / (w.abs().max() / 127)).round()
    model.load_state_dict(state)
    return fit(model, classify(model, Blobs(seed)), torch.optim.Adam(model.parameters(), lr=3e-3), updates=40)


def too_large(plain: Plain) -> str:
    """Every layer multiplies, from the first update on."""
    outputs = [plain.outputs[n][0] for n in evens(0, 6)]
    levels = [o.rms for o in outputs if o is not None]
    assert all(b > 50 * a for a, b in itertools.pairwise([1.0, *levels]))
    assert plain.losses[0] > 1e4
    return f"rms of the outputs of the layers in the first update: {[f'{x:.2g}' for x in levels]}, loss {plain.losses[0]:.2g}"


@sick(
    CASES,
    "me_student_ends_in_softmax",
    ("double_softmax",),
    ("5",),
    source="https://docs.pytorch.org/tutorials/beginner/knowledge_distillation_tutorial.html the student's last layer is a softmax already",
    also=("loss_plateau",),
    proof=lambda plain: sums_to_one(plain, "5"),
)
def _(seed: int) -> Setup:
    teacher = mlp(nn.ReLU, depth=2, outputs=6).requires_grad_(False)
    nn.init.normal_(teacher[4].weight, std=1.0)  # type: ignore[arg-type]
    student = nn.Sequential(*mlp(nn.ReLU, depth=2, width=24, outputs=6), nn.Softmax(-1))
    data = Blobs(seed, classes=6)

    def loss(i: int) -> Tensor:
        x, _ = data()
        out = student(x)
        soft = F.kl_div(F.log_softmax(out / 2, -1), F.softmax(teacher(x) / 2, -1), reduction="batchmean")
        return 4 * 0.5 * soft + 0.5 * F.cross_entropy(out, teacher(x).argmax(-1))

    return fit(student, loss, torch.optim.Adam(student.parameters(), lr=3e-3), updates=60)


def sums_to_one(plain: Plain, module: str) -> str:
    """What the loss takes for logits are probabilities."""
    seen = [o for o in plain.outputs[module] if o is not None]
    assert isinstance(named_modules(plain.setup.model)[module], nn.Softmax)
    assert all(0 <= o.low <= o.high <= 1 for o in seen)
    return f"the logits of the loss lie in [{min(o.low for o in seen):.2g}, {max(o.high for o in seen):.2g}]: they are a softmax"


def baird() -> tuple[Tensor, Tensor]:
    """Features of the seven states, and the weights that Baird starts from."""
    features = torch.zeros(7, 8)
    for s in range(6):
        features[s, s], features[s, 7] = 2, 1
    features[6, 6], features[6, 7] = 1, 2
    return features, torch.tensor([[1.0, 1, 1, 1, 1, 1, 10, 1]])


@sick(
    CASES,
    "me_off_policy_bootstrap",
    ("loss_diverging", "exploding_gradient"),
    source="http://incompleteideas.net/book/the-book-2nd.html section 11.2, Baird's counterexample: the deadly triad",
    also=("update_ratio_too_large",),
    proof=every(loss_grows(3, last=15), loss_grows(100)),
)
def _(seed: int) -> Setup:
    value = nn.Linear(8, 1, bias=False)
    features, start = baird()
    with torch.no_grad():
        value.weight.copy_(start)
    generator = torch.Generator().manual_seed(seed)

    def loss(i: int) -> Tensor:
        states = torch.randint(7, (64,), generator=generator)
        target = 0.99 * value(features[6:]).detach()
        return (value(features[states]) - target).square().mean()

    return fit(value, loss, torch.optim.SGD(value.parameters(), lr=0.1), updates=80)


@sick(
    CASES,
    "me_observation_that_never_varies",
    ("non_finite_input",),
    ("",),
    source="https://docs.pytorch.org/docs/stable/generated/torch.std.html observations over their deviation in the batch, which may be 0",
    onset=15,
    also=NON_FINITE,
    proof=every(first_non_finite(15, "trunk.0"), lambda plain: no_bad_weight(plain, 15)),
)
def _(seed: int) -> Setup:
    model = ActorCritic()
    data = Blobs(seed, batch=24)

    def loss(i: int) -> Tensor:
        x, y = data()
        x[:, 5] = (x[:, 5] > 0).float()  # a door: open or shut
        if i >= 15 and i % 3 == 0:
            x[:, 5] = 0  # all 24 places have it shut
        x = (x - x.mean(0)) / x.std(0)
        out = model(x)
        return bandit(x, y, out, out["logits"], data.generator)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), updates=30)


def no_bad_weight(plain: Plain, update: int) -> str:
    """All weights are finite before it."""
    assert all(math.isfinite(norms[update]) for norms in plain.weights.values())
    return "the weights are finite then"


class Station(nn.Module):
    """Two inputs, two outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Embedding(12, 8)
        self.body = nn.Sequential(nn.Linear(16 + 8, 48), nn.SiLU(), nn.Linear(48, 32), nn.SiLU())
        self.heads = nn.ModuleDict({"temperature": nn.Linear(32, 1), "rain": nn.Linear(32, 1)})

    def forward(self, x: Tensor, place: Tensor) -> dict[str, Tensor]:
        h = self.body(torch.cat([x, self.place(place)], -1))
        return {name: head(h)[:, 0] for name, head in self.heads.items()}


@sick(
    CASES,
    "me_one_shard_in_raw_units",
    ("loss_spike", "gradient_spike"),
    source="https://arxiv.org/abs/2204.02311 spikes that single batches cause; here the targets of one shard were never standardised",
    onset=40,
    proof=every(gradient_spikes(40, 20), lambda plain: loss_jumps(plain, 40, 50)),
)
def _(seed: int) -> Setup:
    model = Station()
    generator = torch.Generator().manual_seed(5500 + seed)
    truth = torch.randn(16, generator=generator) / 4
    bias = 0.5 * torch.randn(12, generator=generator)

    def loss(i: int) -> Tensor:
        x = torch.randn(32, 16, generator=generator)
        place = torch.randint(12, (32,), generator=generator)
        signal = x @ truth + bias[place]
        temperature = torch.tanh(signal) + 0.1 * torch.randn(32, generator=generator)
        if i == 40:
            temperature = 15 + 8 * temperature
        out = model(x, place)
        return F.mse_loss(out["temperature"], temperature) + F.binary_cross_entropy_with_logits(out["rain"], (signal > 0).float())

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), updates=70)


def loss_jumps(plain: Plain, update: int, factor: float) -> str:
    """One loss is far above those before it."""
    jump = plain.losses[update] / median(plain.losses[update - 15 : update])
    assert jump > factor, jump
    return f"the loss of update {update} is {jump:.3g} times the median before it"


@sick(
    CASES,
    "me_schedule_in_epochs_stepped_by_batch",
    ("frozen_weights",),
    ("",),
    source="https://docs.pytorch.org/docs/stable/generated/torch.optim.lr_scheduler.PolynomialLR.html total_iters in epochs, stepped a batch",
    onset=12,
    also=("loss_plateau",),
    proof=every(unchanged("encoder.0.weight", "encoder.3.weight", "decoder.2.weight", first=12), lambda plain: stuck(plain, 12)),
)
def _(seed: int) -> Setup:
    model = Vae()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=12)
    return fit(model, elbo(model, seed), optimizer, updates=50, before=lambda i: void(i and schedule.step()))


class Vae(nn.Module):
    """A small variational autoencoder."""

    def __init__(self, latent: int = 4) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_var = self.encoder(x).chunk(2, -1)
        return self.decoder(mean + torch.randn_like(mean) * (log_var / 2).exp()), mean, log_var


def elbo(model: Vae, seed: int) -> Callable[[int], Tensor]:
    """Its loss on clouds."""
    data = Blobs(seed, classes=8, spread=0.2)

    def loss(i: int) -> Tensor:
        x, _ = data()
        y, mean, log_var = model(x)
        kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(-1).mean()
        return F.mse_loss(y, x) + 0.02 * kl

    return loss


def stuck(plain: Plain, since: int) -> str:
    """The loss is still high when it stops."""
    before, after = plain.losses[0], median(plain.losses[since:])
    assert after > 0.7 * before, (before, after)
    return f"the loss stops at {after:.3g}, it began at {before:.3g}"


class Dueling(nn.Module):
    """Value and advantages of the actions, summed."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(24, 48), nn.LeakyReLU(0.1), nn.Linear(48, 32), nn.LeakyReLU(0.1))
        self.value, self.advantage = nn.Linear(32, 1), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        a = self.advantage(h)
        return self.value(h) + a - a.mean(-1, keepdim=True)


@sick(
    CASES,
    "me_q_of_raw_bytes",
    ("unnormalized_input",),
    ("",),
    source="https://www.nature.com/articles/nature14236 deep Q-learning; the bytes of the screen are given as they are, 0 to 255",
    proof=every(lambda plain: bytes_in(plain), lambda plain: far_off(plain)),
)
def _(seed: int) -> Setup:
    model = Dueling()
    data = Blobs(seed, features=24, spread=0.7)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    fed: list[float] = noted("fed", [], model)

    def loss(i: int) -> Tensor:
        x, y = data()
        screen = (128 + 45 * x).clamp(0, 255).round()
        action = torch.randint(4, y.shape, generator=data.generator)
        fed.append(float(screen.square().mean().sqrt()))
        q = model(screen).gather(1, action[:, None])[:, 0]
        return F.mse_loss(q, (action == y).float())

    return fit(model, loss, optimizer, updates=60)


def bytes_in(plain: Plain) -> str:
    """The level of the input."""
    level = median(said("fed")(plain))
    assert level > 100, level
    return f"the rms of the input is {level:.0f}"


def far_off(plain: Plain) -> str:
    """Rewards are 0 and 1, the first losses far larger."""
    level = median(plain.losses[:3])
    assert level > 10, level
    return f"the first losses are {level:.3g} for rewards of 0 and 1"


class WithAdapter(nn.Module):
    """A frozen body, an adapter that was built and given to the optimizer, and a forward pass from before it came."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU()).requires_grad_(False)
        self.adapter = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 32))
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@sick(
    CASES,
    "me_adapter_never_called",
    ("missing_gradient",),
    ("adapter",),
    source="https://arxiv.org/abs/1902.00751 adapters: the modules are there and in the optimizer, the forward pass doesn't know of them",
    proof=every(
        no_gradient("adapter.0.weight", "adapter.0.bias", "adapter.2.weight", "adapter.2.bias"), lambda plain: uncalled(plain)
    ),
)
def _(seed: int) -> Setup:
    model = WithAdapter()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    return fit(model, classify(model, Blobs(seed)), optimizer, updates=60)


def uncalled(plain: Plain) -> str:
    """The module never runs."""
    assert all(o is None for name in ("adapter", "adapter.0", "adapter.2") for o in plain.outputs[name])
    return "adapter is never called"


# ------------------------------------------------------------------------------------------------ healthy


@healthy(
    CASES,
    "me_gan_in_equilibrium",
    source="https://arxiv.org/abs/1406.2661 two optimizers in turns; at the equilibrium the losses stay where they are",
    proof=lambda plain: matches(plain),
)
def _(seed: int) -> Setup:
    generator = mlp(nn.Tanh, depth=1, width=24, inputs=4, outputs=2)
    critic = mlp(lambda: nn.LeakyReLU(0.2), depth=2, width=32, inputs=2, outputs=1)
    noise = torch.Generator().manual_seed(6000 + seed)
    optimizer_g = torch.optim.Adam(generator.parameters(), lr=2e-3, betas=(0.5, 0.99))
    optimizer_d = torch.optim.Adam(critic.parameters(), lr=4e-3, betas=(0.5, 0.99))
    centre = torch.tensor([1.5, -1.0])
    off: list[float] = noted("off", [], generator)

    def train() -> Iterator[Event]:
        for _ in range(200):
            real = centre + 0.5 * torch.randn(64, 2, generator=noise)
            fake = generator(torch.randn(64, 4, generator=noise))
            off.append(float((fake.detach().mean(0) - centre).norm()))
            optimizer_d.zero_grad()
            loss_d = F.softplus(-critic(real)).mean() + F.softplus(critic(fake.detach())).mean()
            loss_d.backward()
            yield "read", [loss_d]
            optimizer_d.step()
            yield "step", [optimizer_d]
            optimizer_g.zero_grad()
            loss_g = F.softplus(-critic(fake)).mean()
            loss_g.backward()
            yield "read", [loss_g]
            optimizer_g.step()
            yield "step", [optimizer_g]

    return Setup({"generator": generator, "critic": critic}, train)


def matches(plain: Plain) -> str:
    """The mean of what is made comes to that of the data."""
    off = said("off")(plain)
    assert all(math.isfinite(x) for x in plain.losses)
    assert median(off[:10]) > 1, off[0]
    assert median(off[-40:]) < 0.35, median(off[-40:])
    return f"the mean of what is made is off by {median(off[:10]):.2f} in the beginning, {median(off[-40:]):.2f} in the end"


class MeanTeacher(nn.Module):
    """A student and the moving average of it."""

    def __init__(self) -> None:
        super().__init__()
        self.student = mlp(nn.ReLU, depth=2)
        self.teacher = mlp(nn.ReLU, depth=2).requires_grad_(False)
        self.teacher.load_state_dict(self.student.state_dict())

    @torch.no_grad()
    def average(self, decay: float) -> None:
        for t, s in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            t.lerp_(s, 1 - decay)


@healthy(
    CASES,
    "me_mean_teacher",
    source="https://arxiv.org/abs/1703.01780 mean teacher: the teacher runs in training, has no gradient and moves by averaging",
    proof=converges(0.6),
)
def _(seed: int) -> Setup:
    model = MeanTeacher()
    data = Blobs(seed)
    optimizer = torch.optim.Adam(model.student.parameters(), lr=2e-3)

    def train() -> Iterator[Event]:
        for i in range(150):
            x, y = data()
            u, _ = data()
            with torch.no_grad():
                soft = model.teacher(u + 0.1 * torch.randn(u.shape, generator=data.generator)).softmax(-1)
            agree = F.mse_loss(model.student(u + 0.1 * torch.randn(u.shape, generator=data.generator)).softmax(-1), soft)
            loss = F.cross_entropy(model.student(x), y) + min(1.0, i / 50) * agree
            optimizer.zero_grad()
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            model.average(0.95)
            yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "me_frozen_in_turns",
    source="https://arxiv.org/abs/1801.06146 layers are frozen and thawed in the course of training: here head and body in turns",
    proof=converges(0.5),
)
def _(seed: int) -> Setup:
    model = Growing()

    def before(i: int) -> None:
        model.body.requires_grad_(i // 8 % 2 == 1)
        model.head.requires_grad_(i // 8 % 2 == 0)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return fit(model, classify(model, Blobs(seed)), optimizer, updates=160, before=before)


class Dqn(nn.Module):
    """Q values of seven places in a corridor, and a copy of them that lags behind."""

    def __init__(self) -> None:
        super().__init__()
        self.online = nn.Sequential(nn.Linear(7, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 2))
        self.target = nn.Sequential(nn.Linear(7, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 2))
        self.target.requires_grad_(False)
        self.sync()

    def sync(self) -> None:
        self.target.load_state_dict(self.online.state_dict())


@healthy(
    CASES,
    "me_dqn_sparse_reward",
    source="https://docs.pytorch.org/tutorials/intermediate/reinforcement_q_learning.html a target network; reward only at the goal",
    proof=lambda plain: knows_the_way(plain),
)
def _(seed: int) -> Setup:
    model = Dqn()
    generator = torch.Generator().manual_seed(7000 + seed)
    places = torch.eye(7)
    optimizer = torch.optim.Adam(model.online.parameters(), lr=3e-3)

    def train() -> Iterator[Event]:
        for i in range(300):
            if i % 20 == 0:
                model.sync()
            s = torch.randint(7, (32,), generator=generator)
            a = torch.randint(2, (32,), generator=generator)
            after = (s + 2 * a - 1).clamp_min(0)
            end = after == 7
            with torch.no_grad():
                later = model.target(places[after.clamp_max(6)]).max(-1).values
                goal = end.float() + 0.8 * later * (~end).float()
            loss = F.smooth_l1_loss(model.online(places[s]).gather(1, a[:, None])[:, 0], goal)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_value_(model.online.parameters(), 100)
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


def knows_the_way(plain: Plain) -> str:
    """The Q values are the true ones."""
    model = plain.setup.model
    assert isinstance(model, Dqn)
    q = model.online(torch.eye(7)).detach()
    true = 0.8 ** torch.arange(6, -1, -1.0)
    worst = float((q[:, 1] - true).abs().max())
    assert worst < 0.15, q
    assert bool((q[1:, 1] > q[1:, 0]).all()), q
    return f"every place leads to the goal, and no Q value is off by more than {worst:.3f}"


@healthy(
    CASES,
    "me_closures_of_lbfgs",
    source="https://docs.pytorch.org/docs/stable/generated/torch.optim.LBFGS.html a closure is called many times in a step",
    proof=converges(0.2),
)
def _(seed: int) -> Setup:
    net = mlp(nn.Tanh, depth=2, width=20, inputs=3, outputs=1)
    generator = torch.Generator().manual_seed(4500 + seed)
    x = torch.randn(200, 3, generator=generator)
    y = torch.sin(x[:, :1]) + 0.5 * x[:, 1:2] * x[:, 2:] + 0.1 * torch.randn(200, 1, generator=generator)
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=4, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(net(x), y) + 1e-4 * sum_of_squares(net)
        loss.backward()
        return loss

    def train() -> Iterator[Event]:
        for _ in range(40):
            yield "read", [closure()]
            optimizer.step(closure)
            yield "step", [optimizer]

    return Setup(net, train)


def sum_of_squares(net: nn.Module) -> Tensor:
    """Of the weights."""
    return torch.stack([p.square().sum() for p in net.parameters() if p.ndim > 1]).sum()


@healthy(
    CASES,
    "me_pinn_of_tanh",
    source="https://arxiv.org/abs/1711.10561 physics-informed nets: the loss is made of second derivatives, one backward goes through another",
    proof=converges(0.1),
)
def _(seed: int) -> Setup:
    net = mlp(nn.Tanh, depth=3, width=24, inputs=1, outputs=1)
    return fit(net, poisson(net, seed), torch.optim.Adam(net.parameters(), lr=2e-3), updates=250)


@healthy(
    CASES,
    "me_loss_scale_search",
    source="https://docs.pytorch.org/docs/stable/amp.html a GradScaler starts too high, skips some steps and settles",
    proof=every(converges(0.5), lambda plain: settles(plain)),
)
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, depth=2)
    data = Blobs(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    scales: list[float] = noted("scales", [], model)

    def train() -> Iterator[Event]:
        for _ in range(150):
            x, y = data()
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            yield "read", [loss]
            scaler.step(optimizer)
            scales.append(scaler.get_scale())
            scaler.update()
            yield "step", [optimizer] if scaler.get_scale() >= scales[-1] else []

    return Setup(model, train)


def settles(plain: Plain) -> str:
    """The scale falls at first and stays."""
    scales = said("scales")(plain)
    skipped = sum(b < a for a, b in itertools.pairwise(scales))
    assert 2 <= skipped <= 9, scales
    assert scales[-1] == scales[12], scales
    return f"{skipped} steps skipped, then a scale of {scales[-1]:g}"


@healthy(
    CASES,
    "me_sharpness_aware",
    source="https://arxiv.org/abs/2010.01412 SAM: two passes an update, the weights are moved and moved back between them",
    proof=converges(0.5),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8)
    )
    data = Pictures(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def train() -> Iterator[Event]:
        for _ in range(120):
            x, y = data()
            F.cross_entropy(model(x), y, label_smoothing=0.1).backward()
            weights = list(model.parameters())
            slopes = [p.grad for p in weights if p.grad is not None]
            norm = torch.stack([g.norm() for g in slopes]).norm()
            moves = [0.05 * g / (norm + 1e-12) for g in slopes]
            with torch.no_grad():
                for p, m in zip(weights, moves, strict=True):
                    p.add_(m)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y, label_smoothing=0.1)
            loss.backward()
            with torch.no_grad():
                for p, m in zip(weights, moves, strict=True):
                    p.sub_(m)
            yield "read", [loss]
            optimizer.step()
            optimizer.zero_grad()
            yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "me_accumulated_on_purpose",
    source="https://docs.pytorch.org/docs/stable/notes/amp_examples.html four backward passes an update, clipping, warm-up from 0, bfloat16",
    proof=converges(0.5),
)
def _(seed: int) -> Setup:
    model = mlp(nn.GELU, depth=3)
    data = Blobs(seed, batch=8, spread=1.4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(i / 10, 1.0))

    def train() -> Iterator[Event]:
        for _ in range(100):
            losses = []
            for _ in range(4):
                x, y = data()
                with torch.autocast("cpu", torch.bfloat16):
                    out = model(x)
                losses.append(F.cross_entropy(out.float(), y) / 4)
                losses[-1].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            yield "read", losses
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "me_warm_restarts",
    source="https://arxiv.org/abs/1608.03983 SGDR: the rate falls to almost nothing and jumps back up",
    proof=converges(0.7),
)
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, depth=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=30, T_mult=2)
    return fit(
        model, classify(model, Blobs(seed, spread=1.6)), optimizer, updates=210, before=lambda i: void(i and schedule.step())
    )


@healthy(
    CASES,
    "me_pruned_and_tuned",
    source="https://docs.pytorch.org/tutorials/intermediate/pruning_tutorial.html 85 % of the weights are exact zeros and stay so",
    proof=every(converges(0.7), lambda plain: stays_sparse(plain)),
)
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, depth=2, width=48)
    data = Blobs(seed, spread=1.0)
    loss = classify(model, data, label_smoothing=0.1)
    dense = torch.optim.Adam(model.parameters(), lr=2e-3)
    for i in range(40):  # before the run: the dense net is trained and pruned
        dense.zero_grad()
        loss(i).backward()
        dense.step()
    for k in (0, 2):
        prune.l1_unstructured(model[k], "weight", amount=0.85)
    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), updates=100)


def stays_sparse(plain: Plain) -> str:
    """Zeros stay."""
    model = plain.setup.model
    assert isinstance(model, nn.Sequential)
    weight = model[2].weight
    assert isinstance(weight, Tensor)
    share = float(torch.eq(weight, 0).float().mean())
    assert 0.84 < share < 0.86, share
    return f"{share:.2f} of 2.weight is zero"


class FakeQuantLinear(nn.Linear):
    """Linear with weights of few bits in the forward pass; their rounding is invisible to the gradient."""

    def forward(self, input: Tensor) -> Tensor:
        step = self.weight.detach().abs().max() / 7
        rounded = self.weight + ((self.weight / step).round() * step - self.weight).detach()
        return F.linear(input, rounded, self.bias)


@healthy(
    CASES,
    "me_quantisation_aware",
    source="https://arxiv.org/abs/1308.3432 straight-through estimator: weights of 4 bits and activations of 3 in the forward pass",
    proof=converges(0.5),
)
def _(seed: int) -> Setup:
    class Steps(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x.clamp(0, 4)
            return x + ((x * 2).round() / 2 - x).detach()

    model = nn.Sequential(FakeQuantLinear(16, 48), Steps(), FakeQuantLinear(48, 48), Steps(), FakeQuantLinear(48, 4))
    return fit(model, classify(model, Blobs(seed, spread=1.3)), torch.optim.Adam(model.parameters(), lr=2e-3), updates=150)


@healthy(
    CASES,
    "me_reinforce_rare_pay",
    source="http://incompleteideas.net/book/the-book-2nd.html section 13.3, REINFORCE: no pay in a batch, no gradient in it",
    proof=lambda plain: earns(plain),
)
def _(seed: int) -> Setup:
    policy = mlp(nn.Tanh, depth=1, width=32, outputs=8)
    data = Blobs(seed, classes=8, batch=4, spread=0.5)
    optimizer = torch.optim.Adam(policy.parameters(), lr=5e-3)
    pay: list[float] = noted("pay", [], policy)

    def loss(i: int) -> Tensor:
        x, y = data()
        logp = F.log_softmax(policy(x), -1)
        action = torch.multinomial(logp.detach().exp(), 1, generator=data.generator)[:, 0]
        reward = (action == y).float()
        pay.append(float(reward.mean()))
        return -(reward * logp.gather(1, action[:, None])[:, 0]).mean()

    return fit(policy, loss, optimizer, updates=400)


def earns(plain: Plain) -> str:
    """Some batches pay nothing and have no gradient; in the end almost all pay."""
    pay = said("pay")(plain)
    nothing = sum(g == 0 for g in plain.grads["0.weight"][:50])
    first, last = sum(pay[:30]) / 30, sum(pay[-50:]) / 50
    assert nothing >= 5, nothing
    assert first < 0.35, first
    assert last > 0.75, last
    return f"pay rises from {first:.2f} to {last:.2f}; {nothing} of the first 50 updates have no gradient"


class TwoTasks(nn.Module):
    """One body, two heads of which an update uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.ReLU())
        self.classes = nn.Linear(32, 4)
        self.values = nn.Linear(32, 16)


@healthy(
    CASES,
    "me_tasks_in_turns",
    source="https://arxiv.org/abs/1901.11504 multi-task batches in turns: a head has no gradient in every other update",
    proof=lambda plain: both_fall(plain),
)
def _(seed: int) -> Setup:
    model = TwoTasks()
    data = Blobs(seed, spread=0.5)

    def loss(i: int) -> Tensor:
        x, y = data()
        h = model.body(x)
        return F.cross_entropy(model.classes(h), y) if i % 2 else F.mse_loss(model.values(h), data.centres[y])

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), updates=200)


def both_fall(plain: Plain) -> str:
    """The loss of each task."""
    even, odd = plain.losses[::2], plain.losses[1::2]
    falls = [median(t[-15:]) / median(t[:5]) for t in (even, odd)]
    assert all(f < 0.5 for f in falls), falls
    return f"the losses fall to {falls[0]:.2f} and {falls[1]:.2f} of what they were"


class Equilibrium(nn.Module):
    """z = tanh(W z + U x): solved without a graph; the gradient is that of the fixed point, solved for in a hook."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.inject = nn.Linear(16, width)
        self.mix = nn.Linear(width, width, bias=False)
        with torch.no_grad():
            self.mix.weight.mul_(0.5)
        self.head = nn.Linear(width, 4)

    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(self.mix(z) + u)

    def forward(self, x: Tensor) -> Tensor:
        u = self.inject(x)
        with torch.no_grad():
            z = torch.zeros_like(u)
            for _ in range(12):
                z = self.cell(z, u)
        z = self.cell(z, u)
        if z.requires_grad:
            z0 = z.detach().requires_grad_()
            f0 = self.cell(z0, u.detach())

            def solve(grad: Tensor) -> Tensor:
                g = grad
                for _ in range(12):
                    g = torch.autograd.grad(f0, z0, g, retain_graph=True)[0] + grad
                return g

            z.register_hook(solve)
        return self.head(z)


@healthy(
    CASES,
    "me_deep_equilibrium",
    source="https://arxiv.org/abs/1909.01377 deep equilibrium models: one layer called many times, its gradient replaced in a hook",
    proof=converges(0.5),
)
def _(seed: int) -> Setup:
    model = Equilibrium()
    return fit(model, classify(model, Blobs(seed)), torch.optim.Adam(model.parameters(), lr=3e-3), updates=120)


@healthy(
    CASES,
    "me_maml",
    source="https://arxiv.org/abs/1703.03400 MAML: the inner steps are taken on copies, the outer gradient goes through them",
    proof=converges(0.6),
)
def _(seed: int) -> Setup:
    net = mlp(nn.Tanh, depth=2, width=24, inputs=1, outputs=1)
    generator = torch.Generator().manual_seed(8000 + seed)

    def loss(i: int) -> Tensor:
        total = torch.zeros(())
        for _ in range(4):
            phase, height = math.pi * torch.rand(2, generator=generator)
            x = 4 * torch.rand(20, 1, generator=generator) - 2
            y = (0.5 + height / 2) * torch.sin(2 * x + phase)
            fast: dict[str, Tensor] = dict(net.named_parameters())
            for _ in range(2):
                inner = F.mse_loss(functional_call(net, fast, (x[:10],)), y[:10])
                slopes = torch.autograd.grad(inner, list(fast.values()), create_graph=True)
                fast = {n: p - 0.1 * g for (n, p), g in zip(fast.items(), slopes, strict=True)}
            total = total + F.mse_loss(functional_call(net, fast, (x[10:],)), y[10:]) / 4
        return total

    return fit(net, loss, torch.optim.Adam(net.parameters(), lr=5e-3), updates=150)


class Coupling(nn.Module):
    """Affine coupling of two coordinates; gives the log of the volume as well."""

    def __init__(self, flip: bool) -> None:
        super().__init__()
        self.flip = flip
        self.net = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 2))
        nn.init.zeros_(self.net[2].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.net[2].bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.flip(1).chunk(2, 1) if self.flip else x.chunk(2, 1)
        scale, shift = self.net(a).chunk(2, 1)
        scale = 2 * torch.tanh(scale)
        return torch.cat([a, b * scale.exp() + shift], 1), scale[:, 0]


@healthy(
    CASES,
    "me_flow_crosses_zero",
    source="https://arxiv.org/abs/1605.08803 real NVP: couplings start as the identity, and a log-likelihood may pass through zero",
    proof=lambda plain: likelier(plain),
)
def _(seed: int) -> Setup:
    flow = nn.ModuleList(Coupling(k % 2 == 1) for k in range(6))
    generator = torch.Generator().manual_seed(9000 + seed)

    def loss(i: int) -> Tensor:
        a = torch.randn(64, 1, generator=generator)
        x = 0.3 * torch.cat([a, a.square() - 1 + 0.15 * torch.randn(64, 1, generator=generator)], 1)
        volume = torch.zeros(64)
        for coupling in flow:
            x, log = coupling(x)
            volume = volume + log
        return (0.5 * x.square().sum(1) + math.log(2 * math.pi) - volume).mean()

    return fit(flow, loss, torch.optim.Adam(flow.parameters(), lr=2e-3), updates=250)


def likelier(plain: Plain) -> str:
    """The negative log-likelihood falls through zero."""
    a, b = median(plain.losses[:10]), median(plain.losses[-30:])
    assert all(math.isfinite(x) for x in plain.losses)
    assert a > 0.5, a
    assert b < -0.5, b
    return f"the negative log-likelihood falls from {a:.2f} to {b:.2f}"
