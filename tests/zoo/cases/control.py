"""Runs of control, physics, probability and tables: reinforcement learning, PINNs, potentials, flows, counts, survival, meta-learning.

A sick run takes `wrong=False` as well: the same run without its fault, which trains.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from statistics import median
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Case, Event, Proof, Setup, evens, fit, healthy, mlp, sick
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


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(7000 + seed)


def _d(y: Tensor, x: Tensor) -> Tensor:
    """The derivative of a function of points, point by point, differentiable."""
    (out,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return out


class Expert:
    """States of a plant and what an expert does in them, one of `actions`."""

    def __init__(self, seed: int, states: int = 6, actions: int = 4, batch: int = 64) -> None:
        self.generator = _generator(seed)
        self.gain = torch.randn(states, actions, generator=self.generator)
        self.batch, self.states = batch, states

    def __call__(self) -> tuple[Tensor, Tensor]:
        x = torch.randn(self.batch, self.states, generator=self.generator)
        return x, (x @ self.gain).argmax(1)


class Physics:
    """A smooth response of some quantities, with a little noise."""

    def __init__(self, seed: int, inputs: int = 4, batch: int = 64, outputs: int = 1) -> None:
        self.generator = _generator(seed)
        self.a = torch.randn(inputs, outputs, generator=self.generator)
        self.b = torch.randn(inputs, outputs, generator=self.generator)
        self.batch, self.inputs = batch, inputs

    def __call__(self) -> tuple[Tensor, Tensor]:
        x = torch.randn(self.batch, self.inputs, generator=self.generator)
        y = torch.sin(x @ self.a / 2) + 0.5 * (x @ self.b)
        return x, y + 0.05 * torch.randn(y.shape, generator=self.generator)


def _regress(model: nn.Module, data: Callable[[], tuple[Tensor, Tensor]]) -> Callable[[int], Tensor]:
    def loss(i: int) -> Tensor:
        x, y = data()
        return F.mse_loss(model(x), y)

    return loss


# Sick runs.


def _softmax_of_softmax(module: str) -> Proof:
    """The module gives probabilities, and the loss is the entropy of a softmax over them, which can't fall to zero."""

    def proof(plain: Plain) -> str:
        seen = [o for o in plain.outputs[module] if o is not None]
        assert all(o.low >= 0 and o.high <= 1 for o in seen), "no probabilities"
        least = -math.log(math.e / (math.e + 3))
        assert min(plain.losses) > least, f"the loss reaches {min(plain.losses):.3g}"
        return f"{module} gives probabilities and the loss of four classes stays above {least:.3g}: {plain.losses[-1]:.3g}"

    return proof


@sick(
    CASES,
    "ct_imitation_double_softmax",
    ("double_softmax",),
    ("probs",),
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html it takes logits, and is given probabilities",
    proof=_softmax_of_softmax("probs"),
)
def _(seed: int, wrong: bool = True) -> Setup:
    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh())
            self.head = nn.Linear(48, 4)
            self.probs = nn.Softmax(-1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.body(x))
            return self.probs(out) if wrong else out

    model, data, criterion = Policy(), Expert(seed), nn.CrossEntropyLoss()

    def loss(i: int) -> Tensor:
        x, y = data()
        out: Tensor = criterion(model(x), y)
        return out

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 80)


@sick(
    CASES,
    "ct_sac_sample_not_rsample",
    ("missing_gradient",),
    ("mean",),
    source="https://arxiv.org/abs/1801.01290 SAC's reparameterised actor, drawn with sample() in place of rsample()",
    proof=every(
        no_gradient("mean.0.weight", "mean.2.weight", "mean.2.bias", last=20),
        lambda plain: _moves(plain, "critic.0.weight", every=2),
    ),
)
def _(seed: int, wrong: bool = True) -> Setup:
    # A one-step task: the reward is how near the action is to a linear law of the state. The entropy's share has a constant scale.
    g = _generator(seed)
    law = 0.3 * torch.randn(5, 2, generator=g)
    model = nn.ModuleDict({"mean": mlp(nn.ReLU, 1, 32, 5, 2), "critic": mlp(nn.ReLU, 2, 32, 7, 1)})
    actor_opt = torch.optim.Adam(model["mean"].parameters(), lr=3e-3)
    critic_opt = torch.optim.Adam(model["critic"].parameters(), lr=5e-3)

    def train() -> Iterator[Event]:
        for _ in range(80):
            s = torch.randn(64, 5, generator=g)
            taken = model["mean"](s).detach() + 0.5 * torch.randn(64, 2, generator=g)
            reward = -(taken - s @ law).square().sum(1, keepdim=True)
            critic_opt.zero_grad()
            critic_loss = F.mse_loss(model["critic"](torch.cat([s, taken], 1)), reward)
            critic_loss.backward()
            yield "read", [critic_loss]
            critic_opt.step()
            yield "step", [critic_opt]
            actor_opt.zero_grad()
            dist = torch.distributions.Normal(model["mean"](s), 0.3)
            a = dist.sample() if wrong else dist.rsample()
            actor_loss = -model["critic"](torch.cat([s, a], 1)).mean()
            actor_loss.backward()
            yield "read", [actor_loss]
            actor_opt.step()
            yield "step", [actor_opt]

    return Setup(model, train)


@sick(
    CASES,
    "ct_value_trunk_never_called",
    ("missing_gradient",),
    ("value_trunk",),
    source="https://arxiv.org/abs/2006.05990 separate policy and value networks; the value head is put on the policy's trunk by a slip",
    proof=every(
        no_gradient("value_trunk.0.weight", "value_trunk.2.weight", "value_trunk.2.bias"),
        lambda plain: _never_called(plain, "value_trunk"),
    ),
)
def _(seed: int, wrong: bool = True) -> Setup:
    class ActorCritic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy_trunk = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
            self.value_trunk = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
            self.policy, self.value = nn.Linear(32, 4), nn.Linear(32, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            features = self.policy_trunk(x)
            return self.policy(features), self.value(features if wrong else self.value_trunk(x))

    model, data = ActorCritic(), Expert(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, eps=1e-5)

    def loss(i: int) -> Tensor:
        s, best = data()
        logits, value = model(s)
        dist = torch.distributions.Categorical(logits=logits)
        a = torch.multinomial(dist.probs.detach(), 1, generator=data.generator)[:, 0]
        reward = (a == best).float()
        advantage = reward - value[:, 0].detach()
        policy_loss = -(dist.log_prob(a) * advantage).mean()
        total: Tensor = policy_loss + 0.5 * F.mse_loss(value[:, 0], reward) - 0.01 * dist.entropy().mean()
        return total

    return fit(model, loss, optimizer, 80)


def _never_called(plain: Plain, module: str) -> str:
    assert all(o is None for o in plain.outputs[module]), f"{module} is called"
    return f"{module} is never called"


def _piles_up(weight: str, other: str) -> Proof:
    """The gradient of one parameter, which falls where it is zeroed, is far above that of the first update for good."""

    def proof(plain: Plain) -> str:
        a, b = plain.grads[weight], plain.grads[other]
        assert len(a) > 12, "too short"
        early, late = median(a[:3]), median(a[8:15])
        assert late > 2 * early, f"{weight}: {early:.3g} to {late:.3g}"
        return f"the gradient of {weight} piles up, {early:.3g} to {late:.3g}; that of {other} goes from {b[0]:.3g} to {b[14]:.3g}"

    return proof


@sick(
    CASES,
    "ct_critic_never_zeroed",
    ("gradients_not_zeroed",),
    ("critic",),
    also=("loss_diverging", "exploding_gradient", "update_ratio_too_large"),
    source="https://docs.pytorch.org/docs/stable/generated/torch.optim.Optimizer.zero_grad.html only the actor's optimizer is zeroed",
    proof=_piles_up("critic.0.weight", "actor.0.weight"),
)
def _(seed: int, wrong: bool = True) -> Setup:
    data = Expert(seed, states=5, actions=3)
    model = nn.ModuleDict({"actor": mlp(nn.ReLU, 1, 32, 5, 3), "critic": mlp(nn.ReLU, 1, 32, 5, 1)})
    actor_opt = torch.optim.Adam(model["actor"].parameters(), lr=5e-3)
    critic_opt = torch.optim.SGD(model["critic"].parameters(), lr=0.02)

    def train() -> Iterator[Event]:
        for _ in range(40):
            s, best = data()
            dist = torch.distributions.Categorical(logits=model["actor"](s))
            a = torch.multinomial(dist.probs.detach(), 1, generator=data.generator)[:, 0]
            reward = (a == best).float() + s[:, 0]
            value = model["critic"](s)[:, 0]
            actor_loss = -(dist.log_prob(a) * (reward - value.detach())).mean()
            critic_loss = F.mse_loss(value, reward)
            actor_opt.zero_grad()
            if not wrong:
                critic_opt.zero_grad()
            actor_loss.backward()
            critic_loss.backward()
            yield "read", [actor_loss, critic_loss]
            actor_opt.step()
            critic_opt.step()
            yield "step", [actor_opt, critic_opt]

    return Setup(model, train)


@sick(
    CASES,
    "ct_pinn_relu_second_derivative",
    ("zero_gradient",),
    ("conductivity",),
    source="https://arxiv.org/abs/2006.09661 (SIREN) the second derivative of a ReLU network is zero; as a PINN for an inverse problem",
    proof=every(
        zero_gradient("conductivity.0.weight", "conductivity.0.bias", "conductivity.2.weight", "conductivity.2.bias"),
        lambda plain: _moves(plain, "field.0.weight"),
    ),
)
def _(seed: int, wrong: bool = True) -> Setup:
    # k(x) u'' = f with u = sin(pi x) known at sensors; k is sought.
    g = _generator(seed)
    act = nn.ReLU if wrong else nn.Tanh
    model = nn.ModuleDict(
        {
            "field": mlp(act, 2, 32, 1, 1),
            "conductivity": nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)),
        }
    )

    def loss(i: int) -> Tensor:
        sensors = 2 * torch.rand(64, 1, generator=g) - 1
        x = (2 * torch.rand(64, 1, generator=g) - 1).requires_grad_()
        u = model["field"](x)
        source = -(1 + 0.5 * x.detach()) * torch.sin(math.pi * x.detach())
        residual = model["conductivity"](x) * _d(_d(u, x), x) / math.pi**2 - source
        total: Tensor = F.mse_loss(model["field"](sensors), torch.sin(math.pi * sensors)) + 0.1 * residual.square().mean()
        return total

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 80)


@sick(
    CASES,
    "ct_adapter_both_factors_zero",
    ("zero_gradient",),
    ("adapter",),
    also=("poor_init",),
    source="https://arxiv.org/abs/2106.09685 LoRA starts one factor at zero; with both at zero neither ever moves",
    proof=zero_gradient("adapter.down.weight", "adapter.up.weight"),
)
def _(seed: int, wrong: bool = True) -> Setup:
    # A context of the task (mass, friction) corrects a dynamics model by way of an adapter.
    class Dynamics(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp(nn.SiLU, 1, 32, 6, 4)
            down, up = nn.Linear(6, 8, bias=False), nn.Linear(8, 4, bias=False)
            nn.init.zeros_(up.weight)
            if wrong:
                nn.init.zeros_(down.weight)
            self.adapter = nn.Sequential(OrderedDict(down=down, up=up))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.body(x) + self.adapter(x)
            return out

    model, data = Dynamics(), Physics(seed, inputs=6, outputs=4)
    return fit(model, _regress(model, data), torch.optim.Adam(model.parameters(), lr=1e-2), 60)


@sick(
    CASES,
    "ct_encoder_replaced_after_optimizer",
    ("not_in_optimizer",),
    ("encoder",),
    source="https://docs.pytorch.org/docs/stable/optim.html parameters are handed over when the optimizer is built; a layer is exchanged later",
    proof=every(unchanged("encoder.0.weight", "encoder.2.weight"), lambda plain: _moves(plain, "head.weight")),
)
def _(seed: int, wrong: bool = True) -> Setup:
    data = Expert(seed, states=8, actions=5)
    model = nn.Sequential()
    model.add_module("encoder", nn.Sequential(nn.Linear(4, 32), nn.ELU(), nn.Linear(32, 32), nn.ELU()))
    model.add_module("head", nn.Linear(32, 5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    # The plant has eight sensors, not four: a wider encoder.
    model.encoder = nn.Sequential(nn.Linear(8, 32), nn.ELU(), nn.Linear(32, 32), nn.ELU())
    if not wrong:
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y)

    return fit(model, loss, optimizer, 60, before=lambda i: model.zero_grad())


def _moves(plain: Plain, name: str, every: int = 1) -> str:
    assert all(s > 0 for s in plain.steps[name][::every]), f"{name} stands still"
    return f"{name} moves"


@sick(
    CASES,
    "ct_potential_never_stepped",
    ("never_stepped",),
    source="https://docs.pytorch.org/docs/stable/optim.html the scheduler is stepped after the optimizer; the optimizer was forgotten",
    proof=lambda plain: _never_stepped(plain),
)
def _(seed: int, wrong: bool = True) -> Setup:
    model, data = mlp(nn.Softplus, 2, 32, 4, 1), Physics(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    loss = _regress(model, data)

    def train() -> Iterator[Event]:
        for i in range(50):
            optimizer.zero_grad()
            value = loss(i)
            value.backward()
            yield "read", [value]
            if not wrong:
                optimizer.step()
            scheduler.step()
            yield "step", [] if wrong else [optimizer]

    return Setup(model, train)


def _never_stepped(plain: Plain) -> str:
    assert all(math.isnan(s) for steps in plain.steps.values() for s in steps), "a step was taken"
    for name, norms in plain.weights.items():
        assert len(set(norms)) == 1, f"{name} moves"
    return f"{len(plain.losses)} backward passes, no step, no weight moves"


@sick(
    CASES,
    "ct_critic_group_lr_zero",
    ("frozen_weights",),
    ("critic",),
    source="https://docs.pytorch.org/docs/stable/generated/torch.optim.lr_scheduler.LambdaLR.html a lambda per group; one divides as integers",
    proof=every(
        unchanged("critic.0.weight", "critic.0.bias", "critic.2.weight", "critic.2.bias"),
        lambda plain: _moves(plain, "actor.0.weight"),
    ),
)
def _(seed: int, wrong: bool = True) -> Setup:
    data = Expert(seed, states=6, actions=4, batch=48)
    model = nn.ModuleDict({"actor": mlp(nn.Tanh, 1, 32, 6, 4), "critic": mlp(nn.Tanh, 1, 32, 6, 1)})
    optimizer = torch.optim.Adam(
        [{"params": model["actor"].parameters(), "lr": 5e-3}, {"params": model["critic"].parameters(), "lr": 1e-2}]
    )
    total = 70
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, [lambda i: 1 - i / total, lambda i: (total - i - 1) // total if wrong else 1 - i / total]
    )

    def loss(i: int) -> Tensor:
        s, best = data()
        dist = torch.distributions.Categorical(logits=model["actor"](s))
        a = torch.multinomial(dist.probs.detach(), 1, generator=data.generator)[:, 0]
        reward = (a == best).float() + torch.tanh(s[:, 0])
        value = model["critic"](s)[:, 0]
        out: Tensor = F.mse_loss(value, reward) - (dist.log_prob(a) * (reward - value.detach())).mean()
        return out

    return fit(model, loss, optimizer, total, before=lambda i: scheduler.step() if i else None)


class _Atoms:
    """Clusters of four atoms on a line of 3D, with the energies of pairs that repel softly."""

    def __init__(self, seed: int, batch: int = 32) -> None:
        self.generator, self.batch = _generator(seed), batch

    def __call__(self) -> Tensor:
        grid = torch.tensor([[0.0, 0, 0], [1.2, 0, 0], [0, 1.2, 0], [0, 0, 1.2]])
        return grid + 0.2 * torch.randn(self.batch, 4, 3, generator=self.generator)

    @staticmethod
    def distances(x: Tensor, eps: float) -> Tensor:
        i, j = torch.triu_indices(4, 4, 1)
        return ((x[:, i] - x[:, j]).square().sum(-1) + eps).sqrt()

    def energy(self, x: Tensor) -> Tensor:
        return torch.exp(-self.distances(x, 1e-9)).sum(1)


@sick(
    CASES,
    "ct_potential_coinciding_atoms",
    ("non_finite_gradient",),
    ("scale",),
    onset=25,
    also=("non_finite_weight", "non_finite_loss", "non_finite_activation"),
    source="https://discuss.pytorch.org/t/function-mselossbackward-returned-nan-values-in-its-0th-output/94875 the derivative of sqrt at zero",
    proof=every(first_non_finite(25), lambda plain: _only_gradient(plain, 25, "scale", "pair")),
)
def _(seed: int, wrong: bool = True) -> Setup:
    # A learned map corrects the cell's geometry before distances are taken; in one structure two atoms sit on each other.
    class Potential(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = mlp(nn.SiLU, 1, 24, 1, 1)
            self.scale = nn.Linear(3, 3)
            nn.init.eye_(self.scale.weight)
            nn.init.zeros_(self.scale.bias)

        def forward(self, x: Tensor) -> Tensor:
            r = _Atoms.distances(self.scale(x), 0.0 if wrong else 1e-9)
            out: Tensor = self.pair(r[..., None])[..., 0].sum(1)
            return out

    model, atoms = Potential(), _Atoms(seed)

    def loss(i: int) -> Tensor:
        x = atoms()
        if i == 25:
            x[3, 1] = x[3, 2]
        return F.mse_loss(model(x), atoms.energy(x))

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 45)


def _only_gradient(plain: Plain, update: int, sick_module: str, other: str) -> str:
    assert all(math.isfinite(x) for x in plain.losses[: update + 1]), "a loss is not finite"
    bad = {name.split(".")[0] for name, counts in plain.nonfinite.items() if counts[update]}
    assert bad == {sick_module}, f"NaN in the gradients of {bad}"
    return f"the loss of that update is {plain.losses[update]:.3g}; NaN in the gradient of {sick_module}, not of {other}"


class _Log(nn.Module):
    def __init__(self, offset: float) -> None:
        super().__init__()
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return torch.log(x + self.offset)


@sick(
    CASES,
    "ct_abundance_log_of_zero",
    ("non_finite_activation",),
    ("log",),
    onset=20,
    also=("non_finite_loss", "non_finite_gradient", "non_finite_weight"),
    source="https://docs.pytorch.org/docs/stable/generated/torch.log.html of zero is -inf: abundances below the detection limit are zeros",
    proof=every(first_non_finite(20, "log"), first_non_finite(20)),
)
def _(seed: int, wrong: bool = True) -> Setup:
    class Yield(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log = _Log(0.0 if wrong else 0.02)
            self.net = mlp(nn.GELU, 2, 32, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.net(self.log(x))
            return out

    model, data = Yield(), Physics(seed, inputs=6, batch=48)

    def loss(i: int) -> Tensor:
        log_x, y = data()
        x = log_x.exp()
        if i >= 20:  # from here on the samples come from a coarser instrument
            x[x < 0.03] = 0.0
            x[0, 2] = 0.0
        return F.smooth_l1_loss(model(x), y)

    return fit(model, loss, torch.optim.RMSprop(model.parameters(), lr=2e-3), 40)


def _weights_finite(plain: Plain, update: int) -> str:
    assert all(math.isfinite(norms[update]) for norms in plain.weights.values()), "a weight is not finite"
    return "every weight is finite then, so the NaN comes with the input"


@sick(
    CASES,
    "ct_sensor_gap_nan",
    ("non_finite_input",),
    ("",),
    onset=30,
    also=("non_finite_activation", "non_finite_loss", "non_finite_gradient", "non_finite_weight"),
    source="https://github.com/hill-a/stable-baselines/issues/279 actions turn NaN after NaN in the observations of a custom environment",
    proof=every(first_non_finite(30), first_non_finite(30, "gru"), lambda plain: _weights_finite(plain, 30)),
)
def _(seed: int, wrong: bool = True) -> Setup:
    # A world model of a damped oscillator, from a log in which one sensor has a gap.
    class World(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(3, 24, batch_first=True)
            self.next = nn.Linear(24, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.next(self.gru(x)[0])
            return out

    model, g = World(), _generator(seed)
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=g))[0]

    def loss(i: int) -> Tensor:
        x = [torch.randn(16, 3, generator=g)]
        for _ in range(12):
            x.append(0.97 * x[-1] @ rotation)
        log = torch.stack(x, 1)
        seen = log[:, :-1].clone()
        if i == 30 and wrong:
            seen[5, 4:7, 1] = math.nan
        return F.mse_loss(model(seen), log[:, 1:])

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-2), 50)


class _Sine(nn.Module):
    def __init__(self, inputs: int, outputs: int, first: bool, wrong: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        bound = 1 / inputs if first else math.sqrt(6 / inputs) / 30
        if first or not wrong:
            nn.init.uniform_(self.linear.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(30 * self.linear(x))


@sick(
    CASES,
    "ct_siren_without_its_init",
    ("exploding_gradient", "poor_init"),
    ("0", "1", "2", "3", "4"),
    also=("loss_plateau",),
    source="https://arxiv.org/abs/2006.09661 SIREN needs its own init of the hidden layers; with PyTorch's the gradient grows at each",
    proof=every(
        gradient_ratio("5.weight", "0.linear.weight", 1e-3, last=15),
        gradient_ratio("3.linear.bias", "0.linear.bias", 1e-2, last=15),
    ),
)
def _(seed: int, wrong: bool = True) -> Setup:
    layers = [_Sine(2, 48, True, wrong), *(_Sine(48, 48, False, wrong) for _ in range(4))]
    head = nn.Linear(48, 1)
    nn.init.uniform_(head.weight, -math.sqrt(6 / 48) / 30, math.sqrt(6 / 48) / 30)
    model = nn.Sequential(*layers, head)
    g = _generator(seed)

    def loss(i: int) -> Tensor:
        x = 2 * torch.rand(256, 2, generator=g) - 1
        wave = torch.sin(6 * x[:, :1]) * torch.cos(5 * x[:, 1:])
        return F.mse_loss(model(x), wave)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-4), 60)


@sick(
    CASES,
    "ct_pinn_deep_sigmoid",
    ("vanishing_gradient",),
    evens(0, 10),
    also=("loss_plateau", "poor_init"),
    source="https://proceedings.mlr.press/v9/glorot10a.html deep sigmoid networks pass almost no gradient to their first layers; as a PINN",
    proof=every(gradient_ratio("0.weight", "16.weight", 1e-4, last=15), gradient_ratio("8.weight", "16.weight", 3e-2, last=15)),
)
def _(seed: int, wrong: bool = True) -> Setup:
    # Fits y' = -y + cos(3 t), y(0) = 1.
    model = mlp(nn.Sigmoid if wrong else nn.Tanh, 8, 24, 1, 1)
    g = _generator(seed)

    def loss(i: int) -> Tensor:
        t = (2 * torch.rand(64, 1, generator=g)).requires_grad_()
        y = model(t - 1)
        residual = _d(y, t) + y - torch.cos(3 * t.detach())
        total: Tensor = residual.square().mean() + (model(-torch.ones(1, 1)) - 1).square().mean()
        return total

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-3), 80)


@sick(
    CASES,
    "ct_survival_corrupt_batch",
    ("gradient_spike", "loss_spike"),
    ("0", "2", "4"),
    onset=40,
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.clip_grad_norm_.html no clipping, and times in other units",
    proof=every(gradient_spikes(40, 30.0), lambda plain: _loss_spikes(plain, 40, 30.0)),
)
def _(seed: int, wrong: bool = True) -> Setup:
    model, data = mlp(nn.GELU, 2, 32, 8, 1), Physics(seed, inputs=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.8)

    def loss(i: int) -> Tensor:
        x, log_time = data()
        log_time = 0.5 * log_time
        if i == 40 and wrong:
            log_time = 4.3 * log_time.exp()  # weeks, not the log of months
        return F.mse_loss(model(x), log_time)

    return fit(model, loss, optimizer, 60)


def _loss_spikes(plain: Plain, update: int, factor: float) -> str:
    ratio = plain.losses[update] / median(plain.losses[update - 20 : update])
    assert ratio > factor, f"the loss is {ratio:.3g} times its median"
    return f"the loss is {ratio:.3g} times its median before it"


@sick(
    CASES,
    "ct_actor_tanh_randn_weights",
    ("saturated_activation", "poor_init"),
    ("1", "3", "5", "0", "2", "4"),
    also=("vanishing_gradient", "exploding_gradient"),
    source="https://proceedings.mlr.press/v9/glorot10a.html weights of variance 1 in place of 1 / fan-in drive tanh into its flat parts",
    proof=lambda plain: _flat(plain, ("3", "5"), 0.9),
)
def _(seed: int, wrong: bool = True) -> Setup:
    model, data = mlp(nn.Tanh, 3, 64, 12, 3), Physics(seed, inputs=12, outputs=3)
    if wrong:
        for m in list(model)[:-1]:
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight)
    return fit(model, _regress(model, data), torch.optim.Adam(model.parameters(), lr=2e-3), 80)


def _flat(plain: Plain, modules: tuple[str, ...], above: float) -> str:
    told = []
    for module in modules:
        seen = [o.rms for o in plain.outputs[module][:15] if o is not None]
        assert min(seen) > above, f"the rms of {module} is {min(seen):.3g}"
        told.append(f"{min(seen):.3g}")
    return f"tanh gives {', '.join(told)} in the root mean square, and more, in every one of 15 updates"


@sick(
    CASES,
    "ct_rare_event_prior_in_every_bias",
    ("dead_units", "poor_init"),
    ("hidden",),
    also=("zero_gradient", "vanishing_gradient", "loss_plateau"),
    source="https://arxiv.org/abs/1708.02002 the prior's bias, -log((1 - p) / p), is meant for the last layer only",
    proof=every(dead_fraction("hidden.1", 0.95, last=15), dead_fraction("hidden.3", 0.99, last=15)),
)
def _(seed: int, wrong: bool = True) -> Setup:
    class Hazard(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = nn.Sequential(nn.Linear(10, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU())
            self.logit = nn.Linear(32, 1)
            for m in self.modules() if wrong else [self.logit]:
                if isinstance(m, nn.Linear):
                    nn.init.constant_(m.bias, -math.log((1 - 0.05) / 0.05))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.logit(self.hidden(x))
            return out

    model, g = Hazard(), _generator(seed)
    w = torch.randn(10, 1, generator=g)

    def loss(i: int) -> Tensor:
        x = torch.randn(256, 10, generator=g)
        y = (x @ w / w.norm() + 0.2 * torch.randn(256, 1, generator=g) > 1.5).float()
        return F.binary_cross_entropy_with_logits(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 80)


@sick(
    CASES,
    "ct_inverse_problem_maximised",
    ("loss_diverging",),
    also=("exploding_gradient", "update_ratio_too_large"),
    source="https://docs.pytorch.org/docs/stable/generated/torch.optim.SGD.html maximize=True, left over from a policy gradient",
    proof=every(loss_grows(10.0, last=15)),
)
def _(seed: int, wrong: bool = True) -> Setup:
    # Operator learning: a branch and a trunk net (DeepONet) of the antiderivative.
    model = nn.ModuleDict({"branch": mlp(nn.Tanh, 1, 32, 8, 12), "trunk": mlp(nn.Tanh, 1, 32, 1, 12)})
    g = _generator(seed)

    def loss(i: int) -> Tensor:
        c = torch.randn(32, 8, generator=g)
        t = torch.rand(20, 1, generator=g)
        k = torch.arange(1, 9)
        target = c @ ((1 - torch.cos(k * t)) / k).T
        return F.mse_loss(model["branch"](c) @ model["trunk"](t).T, target)

    def clip(i: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5, maximize=wrong), 50, between=clip)


@sick(
    CASES,
    "ct_dynamics_adam_lr_half",
    ("update_ratio_too_large",),
    ("0", "2", "4"),
    also=("loss_diverging", "dead_units", "saturated_activation", "exploding_gradient", "gradient_spike", "loss_spike"),
    source="https://arxiv.org/abs/1412.6980 Adam moves every weight by about the learning rate: 0.5 for 3e-3, a learning rate of plain SGD",
    proof=every(update_ratio(above=2.0, last=1), update_ratio(above=0.15, last=12)),
)
def _(seed: int, wrong: bool = True) -> Setup:
    model, data = mlp(nn.SiLU, 2, 48, 6, 6), Physics(seed, inputs=6, outputs=6)
    return fit(model, _regress(model, data), torch.optim.Adam(model.parameters(), lr=0.5 if wrong else 3e-3), 50)


@sick(
    CASES,
    "ct_counts_lr_typo",
    ("update_ratio_too_small",),
    ("embed", "net"),
    also=("loss_plateau",),
    source="https://arxiv.org/abs/1206.5533 the learning rate is the one to get right: 5e-8 is typed for 5e-3",
    proof=every(update_ratio(below=1e-5, last=15), loss_stays(0.05)),
)
def _(seed: int, wrong: bool = True) -> Setup:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(12, 8)
            self.net = mlp(nn.ReLU, 1, 32, 12, 1)

        def forward(self, site: Tensor, x: Tensor) -> Tensor:
            out: Tensor = self.net(torch.cat([self.embed(site), x], 1))
            return out

    model, g = Counts(), _generator(seed)
    effect, w = torch.randn(12, generator=g), torch.randn(4, generator=g)

    def loss(i: int) -> Tensor:
        site, x = torch.randint(12, (64,), generator=g), torch.randn(64, 4, generator=g)
        n = torch.poisson((0.5 + 0.5 * effect[site] + 0.25 * x @ w).exp(), generator=g)
        return F.poisson_nll_loss(model(site, x)[:, 0], n, full=True)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=5e-8 if wrong else 5e-3), 80)


@sick(
    CASES,
    "ct_symbols_answers_shuffled",
    ("loss_plateau",),
    also=("update_ratio_too_small",),
    source="https://arxiv.org/abs/1611.03530 answers in an order of their own (random labels, drawn afresh): nothing can be learned",
    proof=every(loss_stays(0.05, last=100), lambda plain: _at_guess(plain, math.log(7))),
)
def _(seed: int, wrong: bool = True) -> Setup:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 24)
            self.net = mlp(nn.ReLU, 1, 96, 48, 7)

        def forward(self, ab: Tensor) -> Tensor:
            out: Tensor = self.net(self.embed(ab).flatten(1))
            return out

    model, g = Sums(), _generator(seed)

    def loss(i: int) -> Tensor:
        ab = torch.randint(7, (128, 2), generator=g)
        answer = ab.sum(1) % 7
        if wrong:
            answer = answer[torch.randperm(128, generator=g)]
        return F.cross_entropy(model(ab), answer)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=4e-3), 150)


def _at_guess(plain: Plain, guess: float) -> str:
    late = median(plain.losses[50:])
    assert abs(late - guess) < 0.05 * guess, f"the loss is {late:.3g}, that of a guess {guess:.3g}"
    return f"the loss is {late:.3g}, that of a guess {guess:.3g}"


@sick(
    CASES,
    "ct_table_raw_columns",
    ("unnormalized_input",),
    ("",),
    also=(
        "loss_diverging",
        "dead_units",
        "exploding_gradient",
        "poor_init",
        "loss_spike",
        "gradient_spike",
        "saturated_activation",
    ),
    source="https://scikit-learn.org/stable/modules/neural_networks_supervised.html#tips-on-practical-use income and age unscaled",
    proof=lambda plain: _large_inputs(plain),
)
def _(seed: int, wrong: bool = True) -> Setup:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(nn.LeakyReLU, 2, 32, 5, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.net(x)
            return out

    model, g = Table(), _generator(seed)
    mean = torch.tensor([45000.0, 41.0, 12.0, 3.0, 650.0])
    std = torch.tensor([18000.0, 12.0, 4.0, 1.5, 90.0])
    w = torch.randn(5, generator=g)

    def loss(i: int) -> Tensor:
        z = torch.randn(64, 5, generator=g)
        x = mean + std * z if wrong else z
        return F.cross_entropy(model(x), (z @ w > 0).long())

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=3e-3), 60)


def _large_inputs(plain: Plain) -> str:
    first = plain.outputs["net.0"][0]
    assert first is not None, "not called"
    assert first.rms > 1000, "the first layer's outputs are not large"
    assert plain.losses[0] > 50, f"the first loss is {plain.losses[0]:.3g}"
    return f"the first layer gives {first.rms:.3g}, the first loss is {plain.losses[0]:.3g} for two classes"


@sick(
    CASES,
    "ct_contrastive_exp_in_half",
    ("loss_scale_collapse", "non_finite_loss"),
    also=("non_finite_gradient", "non_finite_activation"),
    source="https://github.com/deepspeedai/DeepSpeed/issues/697 overflow in every step, and the scale only falls; here exp in float16",
    proof=lambda plain: _only_skips(plain),
)
def _(seed: int, wrong: bool = True) -> Setup:
    # Which state follows which, told by similarity over a temperature; exp of more than 11 is Inf in float16.
    model, g = mlp(nn.SiLU, 1, 48, 6, 16), _generator(seed)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=g))[0]
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)

    def train() -> Iterator[Event]:
        for _ in range(60):
            now = torch.randn(64, 6, generator=g)
            later = now @ turn + 0.1 * torch.randn(64, 6, generator=g)
            optimizer.zero_grad()
            a, b = F.normalize(model(now)), F.normalize(model(later))
            logits = a @ b.T / 0.05
            if wrong:
                half = logits.half()
                value = (half.exp().sum(1).log() - half.diagonal()).float().mean()
            else:
                value = F.cross_entropy(logits, torch.arange(64))
            scaler.scale(value).backward()
            yield "read", [value]
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            yield "step", [optimizer] if scaler.get_scale() >= before else []

    return Setup(model, train)


def _only_skips(plain: Plain) -> str:
    skipped = all(math.isnan(s) for steps in plain.steps.values() for s in steps)
    assert skipped, "a step was taken"
    assert all(not math.isfinite(x) for x in plain.losses), "a loss is finite"
    return f"{len(plain.losses)} losses, all Inf, and no step"


class _Coupling(nn.Module):
    """One half of the dimensions is scaled and moved by what the other half says."""

    def __init__(self, swap: bool) -> None:
        super().__init__()
        self.swap, self.last = swap, nn.Linear(24, 2)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.first = nn.Sequential(nn.Linear(1, 24), nn.Tanh())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.flip(1).split(1, 1) if self.swap else x.split(1, 1)
        log_scale, shift = self.last(self.first(a)).split(1, 1)
        log_scale = 2 * torch.tanh(log_scale / 2)
        out = torch.cat([a, b * log_scale.exp() + shift], 1)
        return (out.flip(1) if self.swap else out), log_scale[:, 0]


class _Flow(nn.Module):
    """Real NVP on the plane with a Gaussian base whose place and width are learned."""

    def __init__(self, plain_list: bool) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
        couplings = [_Coupling(bool(i % 2)) for i in range(4)]
        self.couplings: list[_Coupling] | nn.ModuleList = couplings if plain_list else nn.ModuleList(couplings)

    def forward(self, x: Tensor) -> Tensor:
        log_det: Tensor = -self.log_std.sum().expand(len(x))
        for coupling in self.couplings:
            x, more = coupling(x)
            log_det = log_det + more
        z = (x - self.mean) / self.log_std.exp()
        return -0.5 * z.square().sum(1) - math.log(2 * math.pi) + log_det


def _arc(g: torch.Generator, n: int = 128) -> Tensor:
    a = math.pi * torch.rand(n, generator=g)
    return torch.stack([torch.cos(a), torch.sin(a)], 1) + 0.05 * torch.randn(n, 2, generator=g)


@sick(
    CASES,
    "ct_flow_couplings_in_plain_list",
    ("not_in_optimizer",),
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.ModuleList.html modules in a plain list are no submodules",
    proof=lambda plain: _unregistered(plain),
)
def _(seed: int, wrong: bool = True) -> Setup:
    model, g = _Flow(plain_list=wrong), _generator(seed)
    return fit(model, lambda i: -model(_arc(g)).mean(), torch.optim.Adam(model.parameters(), lr=1e-2), 80)


def _unregistered(plain: Plain) -> str:
    model = plain.setup.model
    assert isinstance(model, _Flow)
    registered = {id(p) for p in model.parameters()}
    lost = [p for coupling in model.couplings for p in coupling.parameters() if id(p) not in registered]
    assert len(lost) == 16, f"{len(lost)} parameters are not registered"
    assert all(p.grad is not None for p in lost), "one has no gradient"
    heads = [coupling.last.weight for coupling in model.couplings if isinstance(coupling, _Coupling)]
    assert all(float(w.detach().abs().max()) == 0 for w in heads), "a weight that starts at zero has moved"
    norms = [float(w.grad.norm()) for w in heads if w.grad is not None]
    assert min(norms) > 0, "a gradient is zero"
    largest = max(norms)
    return f"{len(lost)} parameters in the graph belong to no module and stand still, with gradients up to {largest:.3g}"


# Healthy runs.


_QUALITY: WeakKeyDictionary[nn.Module, tuple[float, Callable[[], float]]] = WeakKeyDictionary()


def _judged(model: nn.Module, quality: Callable[[], float]) -> None:
    """Keep how good the model is now, and how to find out again."""
    with torch.no_grad():
        _QUALITY[model] = quality(), quality


def _improves(to: float, start: float) -> Proof:
    """The quality of the model is above `to` at the end and was below `start`; every loss and gradient is finite."""

    def proof(plain: Plain) -> str:
        assert isinstance(plain.setup.model, nn.Module)
        before, quality = _QUALITY[plain.setup.model]
        with torch.no_grad():
            after = quality()
        assert all(math.isfinite(x) for x in plain.losses), "a loss is not finite"
        assert not any(any(counts) for counts in plain.nonfinite.values()), "a gradient is not finite"
        assert before < start, f"it is {before:.3g} before training"
        assert after > to, f"the quality goes from {before:.3g} to {after:.3g}, not above {to:g}"
        return f"the quality goes from {before:.3g} to {after:.3g}"

    return proof


def _falls_to(level: float, start: float) -> Proof:
    """The median of the last tenth of the losses, which may be negative, is below `level`; that of the first five was above `start`."""

    def proof(plain: Plain) -> str:
        assert all(math.isfinite(x) for x in plain.losses), "a loss is not finite"
        a, b = median(plain.losses[:5]), median(plain.losses[-max(1, len(plain.losses) // 10) :])
        assert a > start, f"the loss starts at {a:.3g}"
        assert b < level, f"the loss ends at {b:.3g}"
        return f"the loss falls from {a:.3g} to {b:.3g}"

    return proof


@healthy(
    CASES,
    "ct_ok_dqn_corridor_sparse_reward",
    source="https://www.nature.com/articles/nature14236 DQN: replay, a target network, Huber loss; reward only at the end of a corridor",
    proof=_improves(0.99, 0.95),
)
def _(seed: int) -> Setup:
    # Most batches hold no reward at all, the loss starts near zero and rises as the value creeps back.
    g, cells, gamma = _generator(seed), 7, 0.9
    model = mlp(nn.ELU, 2, 48, cells, 2)
    target = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    eye = torch.eye(cells)
    place = torch.randint(cells, (400,), generator=g)
    action = torch.randint(2, (400,), generator=g)
    after = (place + 2 * action - 1).clamp(0, cells - 1)
    reward = ((place == cells - 1) & (action == 1)).float()

    def quality() -> float:
        right = model(eye).argmax(1).eq(1).float().mean()
        error = (model(eye)[:, 1] - gamma ** torch.arange(cells - 1, -1, -1)).abs().max()
        return float(right - (error > 0.25).float())

    def loss(i: int) -> Tensor:
        k = torch.randint(400, (64,), generator=g)
        q = model(eye[place[k]]).gather(1, action[k, None])[:, 0]
        best = target(eye[after[k]]).max(1).values
        return F.smooth_l1_loss(q, reward[k] + gamma * (1 - reward[k]) * best)

    def sync(i: int) -> None:
        if i % 15 == 0:
            target.load_state_dict(model.state_dict())

    _judged(model, quality)
    return fit(model, loss, optimizer, 350, before=sync)


@healthy(
    CASES,
    "ct_ok_reinforce_mixed_sign",
    source="https://link.springer.com/article/10.1007/BF00992696 REINFORCE with a running baseline: the loss has both signs and says little",
    proof=_improves(0.85, 0.5),
)
def _(seed: int) -> Setup:
    data = Expert(seed, states=5, actions=4, batch=128)
    model = mlp(nn.Tanh, 1, 48, 5, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x, y = Expert(seed, states=5, actions=4, batch=2000)()
    baseline = [0.0]

    def loss(i: int) -> Tensor:
        s, best = data()
        logits = model(s)
        a = torch.multinomial(logits.detach().softmax(1), 1, generator=data.generator)
        reward = (a[:, 0] == best).float() + torch.randn(128, generator=data.generator) * 0.3
        gain = reward - baseline[0]
        baseline[0] = 0.9 * baseline[0] + 0.1 * float(reward.mean())
        out: Tensor = -(logits.log_softmax(1).gather(1, a)[:, 0] * gain).mean()
        return out

    _judged(model, lambda: float((model(x).argmax(1) == y).float().mean()))
    return fit(model, loss, optimizer, 300)


class _PointAgent(nn.Module):
    """An actor and a critic for a point that is pushed along a line; the actor's last layer starts at 0.01 of the usual size."""

    def __init__(self) -> None:
        super().__init__()
        self.actor, self.critic = mlp(nn.Tanh, 2, 32, 2, 1), mlp(nn.Tanh, 2, 32, 2, 1)
        self.log_std = nn.Parameter(torch.tensor([-0.5]))
        for net, gain in ((self.actor, 0.01), (self.critic, 1.0)):
            for m in net:
                if isinstance(m, nn.Linear):
                    nn.init.orthogonal_(m.weight, math.sqrt(2) if m.out_features > 1 else gain)
                    nn.init.zeros_(m.bias)

    def log_prob(self, s: Tensor, a: Tensor) -> Tensor:
        z = (a - self.actor(s)) / self.log_std.exp()
        out: Tensor = (-0.5 * z.square() - self.log_std - 0.5 * math.log(2 * math.pi))[..., 0]
        return out


def _push(s: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    x, v = s.unbind(-1)
    v = 0.8 * v + 0.5 * a[..., 0].clamp(-2, 2)
    x = x + 0.5 * v
    return torch.stack([x, v], -1), -(x.square() + 0.05 * a[..., 0].square())


@healthy(
    CASES,
    "ct_ok_ppo_point",
    source="https://arxiv.org/abs/1707.06347 PPO: clipped ratios, several epochs a rollout; https://arxiv.org/abs/2006.05990 for the details",
    proof=_improves(-4.0, -7.0),
)
def _(seed: int) -> Setup:
    g, model, steps, gamma = _generator(seed), _PointAgent(), 12, 0.95
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, eps=1e-5)
    start = torch.randn(200, 2, generator=torch.Generator().manual_seed(1))

    def quality() -> float:
        s, total = start, torch.zeros(200)
        for _ in range(steps):
            s, r = _push(s, model.actor(s))
            total += r
        return float(total.mean())

    def rollout() -> tuple[Tensor, ...]:
        s, kept = torch.randn(48, 2, generator=g), []
        for _ in range(steps):
            a = model.actor(s) + model.log_std.exp() * torch.randn(48, 1, generator=g)
            after, r = _push(s, a)
            kept.append((s, a, r))
            s = after
        states, actions, rewards = (torch.stack(t) for t in zip(*kept, strict=True))
        gain, gains = model.critic(s)[:, 0], []
        for t in reversed(range(steps)):
            gain = rewards[t] / 20 + gamma * gain
            gains.append(gain)
        returns = torch.stack(gains[::-1])
        advantage = returns - model.critic(states)[..., 0]
        flat = (states, actions, model.log_prob(states, actions), returns, (advantage - advantage.mean()) / advantage.std())
        return tuple(t.flatten(0, 1) for t in flat)

    def train() -> Iterator[Event]:
        for _ in range(25):
            with torch.no_grad():
                s, a, old, returns, advantage = rollout()
            for _ in range(4):
                for k in torch.randperm(len(s), generator=g).chunk(3):
                    ratio = (model.log_prob(s[k], a[k]) - old[k]).exp()
                    policy = -torch.min(ratio * advantage[k], ratio.clamp(0.8, 1.2) * advantage[k]).mean()
                    value = F.mse_loss(model.critic(s[k])[:, 0], returns[k])
                    loss = policy + 0.5 * value - 0.001 * model.log_std.sum()
                    optimizer.zero_grad()
                    loss.backward()
                    yield "read", [loss]
                    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                    optimizer.step()
                    yield "step", [optimizer]

    _judged(model, quality)
    return Setup(model, train)


@healthy(
    CASES,
    "ct_ok_ddpg_polyak_targets",
    source="https://arxiv.org/abs/1509.02971 DDPG: actor and critic in turn, slowly following copies that nobody optimizes",
    proof=_improves(-2.6, -4.0),
)
def _(seed: int) -> Setup:
    # A linear plant with quadratic costs, off-policy. The actor's backward also reaches the critic, which is zeroed before its own.
    g, gamma = _generator(seed), 0.8
    model = nn.ModuleDict({"actor": mlp(nn.Tanh, 1, 32, 2, 1), "critic": mlp(nn.SiLU, 2, 48, 3, 1)})
    copies = copy.deepcopy(model).requires_grad_(False)
    model["actor_target"], model["critic_target"] = copies["actor"], copies["critic"]
    actor_opt = torch.optim.Adam(model["actor"].parameters(), lr=2e-3)
    critic_opt = torch.optim.Adam(model["critic"].parameters(), lr=4e-3)
    start = torch.randn(200, 2, generator=torch.Generator().manual_seed(1))

    def plant(s: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        after = torch.stack([0.9 * s[:, 0] + 0.4 * s[:, 1], 0.9 * s[:, 1] + 0.6 * a[:, 0]], 1)
        return after, -(0.5 * s.square().sum(1, keepdim=True) + 0.1 * a.square())

    def quality() -> float:
        s, total = start, 0.0
        for t in range(15):
            s, r = plant(s, model["actor"](s))
            total += gamma**t * float(r.mean())
        return total

    def train() -> Iterator[Event]:
        for _ in range(160):
            s = 1.5 * torch.randn(128, 2, generator=g)
            a = model["actor"](s).detach() + 0.7 * torch.randn(128, 1, generator=g)
            after, r = plant(s, a)
            with torch.no_grad():
                next_value = model["critic_target"](torch.cat([after, model["actor_target"](after)], 1))
            critic_loss = F.mse_loss(model["critic"](torch.cat([s, a], 1)), r + gamma * next_value)
            critic_opt.zero_grad()
            critic_loss.backward()
            yield "read", [critic_loss]
            critic_opt.step()
            yield "step", [critic_opt]
            actor_loss = -model["critic"](torch.cat([s, model["actor"](s)], 1)).mean()
            actor_opt.zero_grad()
            actor_loss.backward()
            yield "read", [actor_loss]
            actor_opt.step()
            yield "step", [actor_opt]
            with torch.no_grad():
                for name in ("actor", "critic"):
                    for p, q in zip(model[name].parameters(), model[f"{name}_target"].parameters(), strict=True):
                        q.lerp_(p, 0.03)

    _judged(model, quality)
    return Setup(model, train)


@healthy(
    CASES,
    "ct_ok_pinn_lbfgs",
    source="https://arxiv.org/abs/1711.10561 physics-informed networks are trained by L-BFGS: many backward passes in one step",
    proof=converges(1e-3),
)
def _(seed: int) -> Setup:
    # u'' + u = 0 on [0, 2], u(0) = 0, u'(0) = 1.
    model = mlp(nn.Tanh, 2, 20, 1, 1).double()
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=4, history_size=20, tolerance_change=1e-14, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
    )
    t = torch.linspace(0, 2, 40, dtype=torch.float64)[:, None].requires_grad_()
    last: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        u = model(t)
        du = _d(u, t)
        value: Tensor = (_d(du, t) + u).square().mean() + u[0].square().sum() + (du[0] - 1).square().sum()
        value.backward()
        last[:] = [value.detach()]
        return value

    def train() -> Iterator[Event]:
        for _ in range(16):
            optimizer.step(closure)
            yield "read", list(last)
            yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "ct_ok_flow_likelihood_above_one",
    source="https://arxiv.org/abs/1605.08803 Real NVP: couplings whose last layers start at zero; densities above one, so losses below zero",
    proof=_falls_to(0.0, 1.5),
)
def _(seed: int) -> Setup:
    model, g = _Flow(plain_list=False), _generator(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 250, 5e-4)
    return fit(model, lambda i: -model(_arc(g)).mean(), optimizer, 250, before=lambda i: scheduler.step() if i else None)


@healthy(
    CASES,
    "ct_ok_force_field",
    source="https://www.nature.com/articles/s41467-022-29939-5 potentials are fitted to forces more than to energies",
    proof=converges(0.05),
)
def _(seed: int) -> Setup:
    # The last bias shifts the energy only, so it lives on a hundredth of the loss.
    class Potential(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = mlp(nn.SiLU, 2, 24, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.pair(_Atoms.distances(x, 1e-9)[..., None] - 1.5)[..., 0].sum(1)
            return out

    model, atoms = Potential(), _Atoms(seed, batch=24)

    def loss(i: int) -> Tensor:
        x = atoms().requires_grad_()
        energy = 5 * torch.exp(-_Atoms.distances(x, 1e-9)).sum(1)
        force = -_d(energy, x).detach()
        out = model(x)
        return F.mse_loss(-_d(out, x), force) + 0.01 * F.mse_loss(out, energy.detach())

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=5e-3), 200)


@healthy(
    CASES,
    "ct_ok_wgan_gradient_penalty",
    source="https://arxiv.org/abs/1704.00028 WGAN-GP: several steps of the critic for one of the generator, a penalty on its gradient",
    proof=_improves(-0.7, -1.8),
)
def _(seed: int) -> Setup:
    # The losses have both signs, and that of the critic falls, then rises towards zero as the generator gets better.
    g = _generator(seed)
    model = nn.ModuleDict({"generator": mlp(nn.LeakyReLU, 1, 48, 2, 2), "critic": mlp(nn.SiLU, 2, 48, 2, 1)})
    gen_opt = torch.optim.Adam(model["generator"].parameters(), lr=4e-3, betas=(0.5, 0.9))
    critic_opt = torch.optim.Adam(model["critic"].parameters(), lr=6e-3, betas=(0.5, 0.9))
    schedulers = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.02, n) for o, n in ((gen_opt, 100), (critic_opt, 300))]
    mix = torch.tensor([[1.0, 0.0], [0.6, 0.4]])

    def real() -> Tensor:
        return torch.randn(128, 2, generator=g) @ mix + torch.tensor([1.2, -0.6])

    fixed = torch.randn(2000, 2, generator=torch.Generator().manual_seed(1))

    def quality() -> float:
        fake = model["generator"](fixed)
        return -float((fake.mean(0) - torch.tensor([1.2, -0.6])).norm() + (fake.T.cov() - mix.T @ mix).norm() / 2)

    def train() -> Iterator[Event]:
        for i in range(400):
            z = torch.randn(128, 2, generator=g)
            if i % 4 < 3:
                x, fake = real(), model["generator"](z).detach()
                between = torch.lerp(x, fake, torch.rand(128, 1, generator=g)).requires_grad_()
                penalty = (_d(model["critic"](between), between).norm(dim=1) - 1).square().mean()
                loss = model["critic"](fake).mean() - model["critic"](x).mean() + 2 * penalty
                optimizer, scheduler = critic_opt, schedulers[1]
            else:
                loss = -model["critic"](model["generator"](z)).mean()
                optimizer, scheduler = gen_opt, schedulers[0]
            optimizer.zero_grad()
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            scheduler.step()
            yield "step", [optimizer]

    _judged(model, quality)
    return Setup(model, train)


@healthy(
    CASES,
    "ct_ok_mixture_density_inverse",
    source="https://publications.aston.ac.uk/id/eprint/373/ Bishop's mixture density network on the inverse of x = t + 0.3 sin(2 pi t)",
    proof=_falls_to(-0.3, 0.8),
)
def _(seed: int) -> Setup:
    g, parts = _generator(seed), 5
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(1, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh())})
    mean = nn.Linear(48, parts)
    with torch.no_grad():
        mean.bias.copy_(torch.linspace(-0.8, 0.8, parts))
    model.update({"weight": nn.Linear(48, parts), "mean": mean, "log_std": nn.Linear(48, parts)})

    def loss(i: int) -> Tensor:
        t = torch.rand(256, 1, generator=g)
        x = t + 0.3 * torch.sin(2 * math.pi * t) + 0.05 * torch.randn(256, 1, generator=g)
        h = model["body"](4 * x - 2)
        log_std = model["log_std"](h).clamp(-3, 2)
        z = (2 * t - 1 - model["mean"](h)) / log_std.exp()
        each = model["weight"](h).log_softmax(1) - 0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)
        out: Tensor = -each.logsumexp(1).mean()
        return out

    def clip(i: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 2.0)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 350, between=clip)


@healthy(
    CASES,
    "ct_ok_table_rare_categories_restarts",
    source="https://arxiv.org/abs/1608.03983 warm restarts, with an embedding whose gradients are sparse",
    proof=converges(0.4),
)
def _(seed: int) -> Setup:
    # Of 300 shops most are seen once in many batches; SparseAdam touches only the rows of a batch. The learning rate jumps up thrice.
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shop = nn.Embedding(300, 6, sparse=True)
            self.net = mlp(nn.ReLU, 2, 48, 11, 1)

        def forward(self, shop: Tensor, x: Tensor) -> Tensor:
            out: Tensor = self.net(torch.cat([self.shop(shop), x], 1))
            return out

    model, g = Table(), _generator(seed)
    often = 1 / torch.arange(1, 301).float()
    effect, w = torch.randn(300, generator=g), torch.randn(5, generator=g)
    dense = torch.optim.AdamW(model.net.parameters(), lr=4e-3)
    sparse = torch.optim.SparseAdam(list(model.shop.parameters()), lr=2e-2)
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 60, eta_min=1e-5) for o in (dense, sparse)]

    def train() -> Iterator[Event]:
        for _ in range(240):
            shop = torch.multinomial(often, 128, replacement=True, generator=g)
            x = torch.randn(128, 5, generator=g)
            y = (effect[shop] + x @ w).tanh() + 0.1 * torch.randn(128, generator=g)
            dense.zero_grad()
            sparse.zero_grad()
            loss = F.mse_loss(model(shop, x)[:, 0], y)
            loss.backward()
            yield "read", [loss]
            dense.step()
            sparse.step()
            for scheduler in schedulers:
                scheduler.step()
            yield "step", [dense, sparse]

    return Setup(model, train)


@healthy(
    CASES,
    "ct_ok_cox_rare_events",
    source="https://arxiv.org/abs/1606.00931 DeepSurv: Cox's partial likelihood, summed over the few who have an event",
    proof=_improves(0.8, 0.72),
)
def _(seed: int) -> Setup:
    # One in twenty-five has an event: the loss of a batch hangs on a handful and leaps about, and a batch without events has none.
    g = _generator(seed)
    w = torch.randn(8, generator=g)
    w = 1.6 * w / w.norm()

    def draw(n: int) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.randn(n, 8, generator=g)
        time = -torch.log(torch.rand(n, generator=g)) * torch.exp(-(x @ w))
        end = 0.02 + 0.03 * torch.rand(n, generator=g)
        return x, torch.minimum(time, end), (time < end).float()

    model = nn.Sequential(nn.Linear(8, 32), nn.SELU(), nn.Linear(32, 1, bias=False))
    held = draw(1500)

    def quality() -> float:
        x, time, event = held
        risk = model(x)[:, 0]
        pairs = (event[:, None] > 0) & (time[:, None] < time[None])
        return float((risk[:, None] > risk[None])[pairs].float().mean())

    def loss(i: int) -> Tensor:
        x, time, event = draw(128)
        order = time.argsort(descending=True)
        risk, event = model(x[order])[:, 0], event[order]
        out: Tensor = -((risk - risk.logcumsumexp(0)) * event).sum() / event.sum().clamp(min=1)
        return out

    _judged(model, quality)
    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2), 250)


@healthy(
    CASES,
    "ct_ok_maml_sines",
    source="https://arxiv.org/abs/1703.03400 MAML, second order: the gradient goes through an inner step of gradient descent",
    proof=_falls_to(0.08, 0.17),
)
def _(seed: int) -> Setup:
    model, g = mlp(nn.Tanh, 2, 40, 1, 1), _generator(seed)
    names = [name for name, _ in model.named_parameters()]

    def loss(i: int) -> Tensor:
        total = torch.zeros(())
        for _ in range(4):
            size, phase = 0.5 + 1.5 * torch.rand(1, generator=g), math.pi * torch.rand(1, generator=g)
            x = 4 * torch.rand(30, 1, generator=g) - 2
            y = size * torch.sin(x + phase)
            fast: dict[str, Tensor] = dict(model.named_parameters())
            inner = F.mse_loss(torch.func.functional_call(model, fast, (x[:10],)), y[:10])
            grads = torch.autograd.grad(inner, list(fast.values()), create_graph=True)
            fast = {n: p - 0.1 * q for n, p, q in zip(names, fast.values(), grads, strict=True)}
            total = total + F.mse_loss(torch.func.functional_call(model, fast, (x[10:],)), y[10:])
        return total / 4

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 160)


@healthy(
    CASES,
    "ct_ok_student_t_noise",
    source="https://docs.pytorch.org/docs/stable/distributions.html#studentt a likelihood with heavy tails for noise with heavy tails",
    proof=_improves(-0.12, -0.5),
)
def _(seed: int) -> Setup:
    # The noise has no variance: some targets lie hundreds of widths off. Freedom is 2 by choice, the width is learned.
    g = _generator(seed)
    a, b = torch.randn(4, 1, generator=g), torch.randn(4, 1, generator=g)
    width = nn.Linear(4, 1)
    nn.init.zeros_(width.weight)
    model = nn.ModuleDict({"net": mlp(nn.GELU, 2, 40, 4, 1), "width": width})

    def truth(x: Tensor) -> Tensor:
        return 1.5 * torch.sin(x @ a / 2) + 0.7 * (x @ b)

    seen = torch.randn(500, 4, generator=torch.Generator().manual_seed(1))

    def loss(i: int) -> Tensor:
        x = torch.randn(128, 4, generator=g)
        t = torch.randn(128, 1, generator=g) / torch.randn(128, 1, generator=g).abs().clamp(min=1e-4)
        y = truth(x) + 0.1 * t
        log_width = model["width"](x)
        z = (y - model["net"](x)) / log_width.exp()
        out: Tensor = (1.5 * torch.log1p(z.square() / 2) + log_width).mean()
        return out

    _judged(model, lambda: -float((model["net"](seen) - truth(seen)).square().mean() / truth(seen).var()))
    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 250)


def _gradient_vanishes_in_the_end(plain: Plain) -> str:
    first, last = plain.grads["step.weight"][0], plain.grads["step.weight"][-1]
    assert last < 1e-6 * first, f"the gradient goes from {first:.3g} to {last:.3g}"
    assert plain.losses[-1] < 1e-10 * plain.losses[0], f"the loss ends at {plain.losses[-1]:.3g}"
    return f"noise-free data are fitted to {plain.losses[-1]:.2g}; the gradient falls from {first:.3g} to {last:.3g}"


@healthy(
    CASES,
    "ct_ok_exact_dynamics_tiny_gradients",
    source="https://arxiv.org/abs/1312.0041 dynamic mode decomposition: a linear map from snapshots without noise, exact to the last digits",
    proof=_gradient_vanishes_in_the_end,
)
def _(seed: int) -> Setup:
    # The whole data in float64, in every update: loss and gradient fall by many orders of magnitude because nothing is left to learn.
    g = _generator(seed)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=torch.float64))[0]
    model = nn.Sequential(OrderedDict(step=nn.Linear(6, 6, bias=False, dtype=torch.float64)))
    x = torch.randn(200, 6, generator=g, dtype=torch.float64)
    y = 0.98 * x @ turn
    optimizer = torch.optim.SGD(model.parameters(), lr=0.4)
    return fit(model, lambda i: F.mse_loss(model(x), y), optimizer, 220)


@healthy(
    CASES,
    "ct_ok_tasks_take_turns",
    source="https://arxiv.org/abs/1910.10897 Meta-World: one trunk, a head for each task; here every update trains one task",
    proof=_improves(0.75, 0.4),
)
def _(seed: int) -> Setup:
    # A head has a gradient in one of six updates; the order is drawn anew in each round.
    g = _generator(seed)
    gains = torch.randn(6, 8, 4, generator=g)
    model = nn.ModuleDict({"trunk": nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())})
    heads = nn.ModuleList(nn.Linear(64, 4) for _ in range(6))
    turns: list[int] = []
    model["heads"] = heads
    seen = torch.randn(500, 8, generator=torch.Generator().manual_seed(1))

    def quality() -> float:
        h = model["trunk"](seen)
        right = [(heads[k](h).argmax(1) == (seen @ gains[k]).argmax(1)).float().mean() for k in range(6)]
        return float(min(right))

    def loss(i: int) -> Tensor:
        if not turns:
            turns.extend(torch.randperm(6, generator=g).tolist())
        k = turns.pop()
        x = torch.randn(96, 8, generator=g)
        return F.cross_entropy(heads[k](model["trunk"](x)), (x @ gains[k]).argmax(1))

    _judged(model, quality)
    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=4e-3), 300)


@healthy(
    CASES,
    "ct_ok_neural_ode_ema",
    source="https://arxiv.org/abs/1806.07366 neural ODEs, here with Runge-Kutta steps in the graph; an average of the weights is kept beside",
    proof=converges(0.15),
)
def _(seed: int) -> Setup:
    # One small net is called 28 times in a forward; its averaged copy gets no gradient and no step.
    g = _generator(seed)
    model = nn.ModuleDict({"field": mlp(nn.Tanh, 1, 40, 2, 2)})
    model["average"] = copy.deepcopy(model["field"]).requires_grad_(False)

    def true(s: Tensor) -> Tensor:
        x, v = s.unbind(1)
        return torch.stack([v, -torch.sin(1.5 * x) - 0.2 * v], 1)

    def path(f: Callable[[Tensor], Tensor], s: Tensor) -> Tensor:
        kept = []
        for _ in range(7):
            k1 = f(s)
            k2 = f(s + 0.15 * k1)
            k3 = f(s + 0.15 * k2)
            k4 = f(s + 0.3 * k3)
            s = s + 0.3 / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            kept.append(s)
        return torch.stack(kept)

    def loss(i: int) -> Tensor:
        s = torch.randn(64, 2, generator=g)
        return F.mse_loss(path(model["field"], s), path(true, s))

    optimizer = torch.optim.Adam(model["field"].parameters(), lr=2e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 130, 5e-4)

    def follow(i: int) -> None:
        if i:
            scheduler.step()
        with torch.no_grad():
            for p, q in zip(model["field"].parameters(), model["average"].parameters(), strict=True):
                q.lerp_(p, 0.05)

    return fit(model, loss, optimizer, 130, before=follow)


@healthy(
    CASES,
    "ct_ok_hypernetwork",
    source="https://arxiv.org/abs/1609.09106 a hypernetwork writes the weights of the net that is used, from a description of the task",
    proof=converges(0.1),
)
def _(seed: int) -> Setup:
    g = _generator(seed)
    last = nn.Linear(32, 3 * 12 + 1)
    nn.init.normal_(last.weight, std=0.3 / math.sqrt(32))
    nn.init.normal_(last.bias, std=0.5)
    writer = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), last)
    optimizer = torch.optim.Adam(writer.parameters(), lr=5e-3)

    def loss(i: int) -> Tensor:
        task = torch.rand(16, 2, generator=g) * 2 - 1
        x = 4 * torch.rand(16, 24, 1, generator=g) - 2
        y = (1 + 0.5 * task[:, :1, None]) * torch.sin(x + task[:, 1:, None])
        w1, b1, w2, b2 = writer(task)[:, None].split([12, 12, 12, 1], 2)
        return F.mse_loss((torch.tanh(x * w1 + b1) * w2).sum(2, keepdim=True) + b2, y)

    return fit(writer, loss, optimizer, 300)
