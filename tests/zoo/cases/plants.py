"""Runs of plants: control, decision and industry at small size.

Every builder of a sick run takes `fault`: without it the same run is healthy, so that nothing but the planted mistake is wrong with it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Blobs, Case, Event, Proof, Setup, fit, healthy, mlp, sick
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
    no_gradient,
    unchanged,
    update_ratio,
    zero_gradient,
)

CASES: list[Case] = []
"""Runs that nobody has developed on, each with its source and a proof in plain torch: they are only run to report."""


@dataclass
class Noted(Setup):
    """A run whose loop writes down what only the loop can see."""

    notes: dict[str, Any] = field(default_factory=dict)


def notes(plain: Plain) -> dict[str, Any]:
    """What the loop wrote down."""
    assert isinstance(plain.setup, Noted)
    return plain.setup.notes


class Rows:
    """Rows of a table, standardised, and a number that depends on them: a new batch at each call."""

    def __init__(self, seed: int, features: int = 12, batch: int = 64, noise: float = 0.1, outputs: int = 1) -> None:
        self.generator = torch.Generator().manual_seed(7000 + seed)
        self.a = torch.randn(features, outputs, generator=self.generator) / math.sqrt(features)
        self.b = torch.randn(features, outputs, generator=self.generator) / math.sqrt(features)
        self.features, self.batch, self.noise = features, batch, noise

    def __call__(self) -> tuple[Tensor, Tensor]:
        x = torch.randn(self.batch, self.features, generator=self.generator)
        y = x @ self.a + 0.5 * torch.sin(2 * x @ self.b)
        return x, y + self.noise * torch.randn(y.shape, generator=self.generator)


class Demand:
    """Daily sales of several shops: a weekly wave, a slow one and noise, of unit variance; windows `[batch, length, 1]` and what follows."""

    def __init__(self, seed: int, length: int = 21, ahead: int = 7, batch: int = 32) -> None:
        self.generator = torch.Generator().manual_seed(7100 + seed)
        self.length, self.ahead, self.batch = length, ahead, batch

    def __call__(self) -> tuple[Tensor, Tensor]:
        start = torch.rand(self.batch, 1, generator=self.generator) * 70
        t = start + torch.arange(self.length + self.ahead)
        y = torch.sin(2 * math.pi * t / 7) + 0.8 * torch.cos(2 * math.pi * t / 35)
        y = y + 0.15 * torch.randn(y.shape, generator=self.generator)
        return y[:, : self.length, None], y[:, self.length :]


def moves(*parameters: str, first: int = 0, last: int | None = None) -> Proof:
    """Every step of these updates changes these parameters: the fault is not theirs."""

    def proof(plain: Plain) -> str:
        for name in parameters:
            assert all(s > 0 for s in plain.steps[name][first:last]), f"{name} stays"
        return f"{', '.join(parameters)}: moved by every step"

    return proof


def quality(what: str, measure: Callable[[Plain], float], above: float) -> Proof:
    """A measure of the trained model is above a bound, and every loss is finite."""

    def proof(plain: Plain) -> str:
        assert all(math.isfinite(x) for x in plain.losses), "a loss is not finite"
        found = measure(plain)
        assert found > above, f"{what} is {found:.3g}, not above {above:g}"
        return f"{what} is {found:.3g}"

    return proof


# --- Control and decision, sick


class Reach:
    """A point is pushed to the origin for one step: state in two dimensions, the reward is the negative square of what remains."""

    def __init__(self, seed: int, batch: int = 64) -> None:
        self.generator = torch.Generator().manual_seed(7200 + seed)
        self.batch = batch

    def states(self) -> Tensor:
        return torch.randn(self.batch, 4, generator=self.generator)

    def noise(self) -> Tensor:
        return torch.randn(self.batch, 2, generator=self.generator)

    @staticmethod
    def reward(state: Tensor, action: Tensor) -> Tensor:
        return -(state[:, :2] + 0.5 * state[:, 2:] + action).square().sum(1)


def normal(mean: Tensor, action: Tensor, std: float = 0.5) -> Tensor:
    """Log-density of the actions, without torch's check of the arguments, as the large libraries switch it off."""
    return torch.distributions.Normal(mean, std, validate_args=False).log_prob(action).sum(1)  # type: ignore[no-any-return, no-untyped-call]


def actor_critic(seed: int, detach: bool = False, forget: bool = False, updates: int = 40) -> Noted:
    """One-step actor-critic with a Gaussian policy of fixed width.

    Args:
        detach: the mean is taken out of the graph before the distribution is made.
        forget: the actor's gradients are never cleared.
    """
    env = Reach(seed)
    model = {"actor": mlp(nn.Tanh, 2, 32, 4, 2), "critic": mlp(nn.Tanh, 2, 32, 4, 1)}
    actor = torch.optim.Adam(model["actor"].parameters(), lr=3e-3)
    critic = torch.optim.Adam(model["critic"].parameters(), lr=3e-3)
    told: dict[str, Any] = {"left": [], "reward": []}

    def train() -> Iterator[Event]:
        for _ in range(updates):
            if not forget:
                actor.zero_grad()
            critic.zero_grad()
            told["left"].append(sum(float(p.grad.norm()) for p in model["actor"].parameters() if p.grad is not None))
            s = env.states()
            mean = model["actor"](s)
            if detach:
                mean = mean.detach()
            action = (mean + 0.5 * env.noise()).detach()
            reward = env.reward(s, action)
            told["reward"].append(float(reward.mean()))
            advantage = reward - model["critic"](s)[:, 0]
            scaled = (advantage - advantage.mean()) / (advantage.std() + 1e-6)
            loss = 0.1 * advantage.square().mean() - (scaled.detach() * normal(mean, action)).mean()
            loss.backward()
            yield "read", [loss]
            actor.step()
            critic.step()
            yield "step", [actor, critic]

    return Noted(model, train, told)


@sick(
    CASES,
    "pl_actor_mean_detached",
    ("missing_gradient",),
    ("actor",),
    source="https://discuss.pytorch.org/t/actor-critic-with-multivariate-normal-network-weights-fail-to-update/74548 mean detached",
    proof=every(
        no_gradient("actor.0.weight", "actor.0.bias", "actor.2.weight", "actor.4.weight", "actor.4.bias"),
        moves("critic.0.weight", "critic.4.weight"),
    ),
)
def _(seed: int, fault: bool = True) -> Setup:
    return actor_critic(seed, detach=fault)


def left_over(plain: Plain) -> str:
    """The gradient found before each backward but the first is not zero, and the step before it used it."""
    left = notes(plain)["left"]
    assert left[0] == 0
    assert all(x > 0 for x in left[1:15]), f"the gradients were cleared: {left[:15]}"
    return f"before backward the gradient still has the norm {left[1]:.3g}, {left[2]:.3g}, ..."


@sick(
    CASES,
    "pl_actor_gradients_pile_up",
    ("gradients_not_zeroed",),
    ("actor",),
    source="https://pytorch.org/docs/stable/generated/torch.optim.Optimizer.zero_grad.html only the critic's optimizer is cleared",
    proof=every(left_over, moves("actor.0.weight", "actor.4.weight", "critic.0.weight")),
)
def _(seed: int, fault: bool = True) -> Setup:
    return actor_critic(seed, forget=fault)


@sick(
    CASES,
    "pl_two_towers_items_not_trained",
    ("not_in_optimizer",),
    ("item_tower",),
    source="https://pytorch.org/docs/stable/optim.html#constructing-it only one tower's parameters are handed over",
    proof=every(
        unchanged("item_tower.0.weight", "item_tower.0.bias", "item_tower.2.weight", "item_tower.2.bias", last=15),
        moves("user_tower.0.weight", "user_tower.2.weight"),
    ),
)
def _(seed: int, fault: bool = True) -> Setup:
    g = torch.Generator().manual_seed(7300 + seed)
    mix = torch.randn(10, 14, generator=g) / 4
    model = nn.ModuleDict({"user_tower": mlp(nn.ReLU, 1, 32, 10, 8), "item_tower": mlp(nn.ReLU, 1, 32, 14, 8)})
    given = model["user_tower"].parameters() if fault else model.parameters()

    def loss(i: int) -> Tensor:
        u = torch.randn(32, 10, generator=g)
        v = u @ mix + 0.5 * torch.randn(32, 14, generator=g)
        scores = model["user_tower"](u) @ model["item_tower"](v).T
        return F.cross_entropy(scores, torch.arange(32))

    return fit(model, loss, torch.optim.Adam(given, lr=3e-3), updates=50)


@sick(
    CASES,
    "pl_churn_nan_rows",
    ("non_finite_input",),
    ("",),
    source="https://github.com/kdgutier/esrnn_torch/issues/5 loss nan with one's own table",
    onset=20,
    also=("non_finite_activation", "non_finite_loss", "non_finite_gradient", "non_finite_weight"),
    proof=every(first_non_finite(20), first_non_finite(20, "0"), lambda p: f"{notes(p)['bad']} NaN in batch 20"),
)
def _(seed: int, fault: bool = True) -> Setup:
    data = Rows(seed, features=12)
    model = mlp(nn.ReLU, 2, 32, 12, 1)
    told: dict[str, Any] = {}

    def loss(i: int) -> Tensor:
        x, y = data()
        if fault and i >= 20:  # From here on the table has customers without a tenure.
            x[::17, 3] = math.nan
            told.setdefault("bad", int(x.isnan().sum()))
        return F.binary_cross_entropy_with_logits(model(x), (y > 0).float())

    plain = fit(model, loss, torch.optim.AdamW(model.parameters(), lr=3e-3), updates=40)
    return Noted(model, plain.train, told)


class Imitator(nn.Module):
    def __init__(self, softmax: bool) -> None:
        super().__init__()
        self.body = mlp(nn.ReLU, 2, 48, 8, 5)
        self.probabilities: nn.Module = nn.Softmax(-1) if softmax else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.probabilities(self.body(x))
        return out


def sums_to_one(module: str) -> Proof:
    """What goes into the cross-entropy lies in [0, 1], and the loss can't fall below log(1 + (K - 1) / e)."""

    def proof(plain: Plain) -> str:
        seen = [o for o in plain.outputs[module][:15] if o is not None]
        assert seen, f"{module} is not called"
        assert all(o.low >= 0 and o.high <= 1 for o in seen), "not probabilities"
        floor = math.log(1 + 4 / math.e)
        assert min(plain.losses) > floor - 1e-3, f"the loss falls to {min(plain.losses):.3g}"
        return f"cross-entropy of probabilities in [{seen[-1].low:.2g}, {seen[-1].high:.2g}], never below {floor:.3g}"

    return proof


@sick(
    CASES,
    "pl_imitation_double_softmax",
    ("double_softmax",),
    ("probabilities",),
    source="https://discuss.pytorch.org/t/cross-entropy-loss-is-not-decreasing/43814/16 a policy that ends in Softmax",
    proof=sums_to_one("probabilities"),
)
def _(seed: int, fault: bool = True) -> Setup:
    g = torch.Generator().manual_seed(7400 + seed)
    expert = torch.randn(8, 5, generator=g)
    model = Imitator(fault)

    def loss(i: int) -> Tensor:
        x = torch.randn(64, 8, generator=g)
        return F.cross_entropy(model(x), (x @ expert).argmax(1))

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), updates=60)


def finite_outputs(plain: Plain, update: int) -> str:
    """Every module's output of an update is finite."""
    bad = [name for name, seen in plain.outputs.items() if (o := seen[update]) is not None and o.nonfinite]
    assert not bad, f"{bad} give NaN or Inf"
    return f"at update {update} every output is finite"


@sick(
    CASES,
    "pl_ppo_last_minibatch_of_one",
    ("non_finite_loss",),
    source="https://github.com/DLR-RM/stable-baselines3/issues/325 advantages.std() of one observation",
    onset=16,
    also=("non_finite_gradient", "non_finite_weight", "non_finite_activation"),
    proof=every(
        first_non_finite(16),
        lambda p: finite_outputs(p, 16),
    ),
)
def _(seed: int, fault: bool = True) -> Setup:
    """Clipped PPO, two epochs of minibatches of 16 a rollout; the third rollout has one step more than a multiple of 16."""
    env = Reach(seed, 64)
    model = nn.ModuleDict({"actor": mlp(nn.Tanh, 2, 32, 4, 2), "critic": mlp(nn.Tanh, 2, 32, 4, 1)})
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def train() -> Iterator[Event]:
        for rollout in range(4):
            env.batch = 65 if fault and rollout == 2 else 64
            s = env.states()
            with torch.no_grad():
                mean = model["actor"](s)
                action = mean + 0.5 * env.noise()
                old = normal(mean, action)
                reward = env.reward(s, action)
                gain = reward - model["critic"](s)[:, 0]
            for epoch in range(2):
                # The odd step out comes first in the third rollout's first epoch.
                order = torch.arange(len(s)).flip(0) if epoch == 0 else torch.randperm(len(s), generator=env.generator)
                parts = list(order.split(16))  # type: ignore[no-untyped-call]
                for part in parts[::-1] if epoch == 0 else parts:
                    a = gain[part]
                    a = (a - a.mean()) / (a.std() + 1e-8)
                    ratio = (normal(model["actor"](s[part]), action[part]) - old[part]).exp()
                    value = model["critic"](s[part])[:, 0]
                    loss = 0.1 * F.mse_loss(value, reward[part]) - torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).mean()
                    optimizer.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    yield "read", [loss]
                    optimizer.step()
                    yield "step", [optimizer]

    return Setup(model, train)


class Block(nn.Module):
    """A block of N-BEATS: what it explains of the past is taken from it, what it says of the future is added up."""

    def __init__(self, length: int, ahead: int, last: bool, width: int = 48) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(length, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.forth = nn.Linear(width, ahead)
        self.back = None if last else nn.Linear(width, length)  # What the last block leaves is used by nobody.

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        return (x if self.back is None else x - self.back(h)), self.forth(h)


class NBeats(nn.Module):
    def __init__(self, plain_list: bool, length: int = 21, ahead: int = 7) -> None:
        super().__init__()
        blocks = [Block(length, ahead, last=k == 2) for k in range(3)]
        self.blocks: Any = blocks if plain_list else nn.ModuleList(blocks)
        self.level = nn.Linear(length, ahead)

    def forward(self, x: Tensor) -> Tensor:
        x = x[..., 0]
        out: Tensor = self.level(x)
        for block in self.blocks:
            x, forth = block(x)
            out = out + forth
        return out


def unregistered(plain: Plain) -> str:
    """The blocks' weights get gradients, are as they were made, and are no parameters of the model."""
    told = notes(plain)
    known = {id(p) for p in plain.setup.model.parameters()}  # type: ignore[union-attr]
    for now, then in zip(told["leaves"], told["start"], strict=True):
        assert id(now) not in known, "registered"
        assert now.grad is not None, "no gradient"
        assert float(now.grad.norm()) > 0, "the gradient is zero"
        assert torch.equal(now, then), "it moves"
    return f"{len(told['leaves'])} leaves get gradients, are not registered and never move"


@sick(
    CASES,
    "pl_nbeats_blocks_in_a_list",
    ("not_in_optimizer",),
    ("",),
    source="https://pytorch.org/docs/stable/generated/torch.nn.ModuleList.html the blocks are kept in a plain list",
    proof=every(unregistered, moves("level.weight")),
)
def _(seed: int, fault: bool = True) -> Setup:
    data = Demand(seed)
    model = NBeats(fault)
    leaves = [p for b in model.blocks for p in b.parameters()]
    told = {"leaves": leaves, "start": [p.detach().clone() for p in leaves]}

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.mse_loss(model(x), y)

    plain = fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), updates=50)
    return Noted(model, plain.train, told)


def stands_still(plain: Plain) -> str:
    """Every parameter has a gradient and none ever moves, for no optimizer steps."""
    for name, norms in plain.grads.items():
        assert all(n > 0 for n in norms[:15]), f"{name} has no gradient"
        assert all(math.isnan(s) for s in plain.steps[name]), f"{name}: an optimizer steps"
        assert len(set(plain.weights[name])) == 1, f"{name} moves"
    return f"{len(plain.grads)} parameters with gradients, none of them moves in {len(plain.losses)} updates"


@sick(
    CASES,
    "pl_world_model_scheduler_only",
    ("never_stepped",),
    also=("loss_plateau",),
    source="https://pytorch.org/docs/stable/optim.html#how-to-adjust-learning-rate scheduler.step() in the place of optimizer.step()",
    proof=every(stands_still, loss_stays(0.2)),
)
def _(seed: int, fault: bool = True) -> Setup:
    """A recurrent model of a damped pendulum's next states, unrolled over ten steps."""
    g = torch.Generator().manual_seed(7500 + seed)
    model = nn.ModuleDict({"cell": nn.GRUCell(3, 32), "out": nn.Linear(32, 2)})
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)

    def train() -> Iterator[Event]:
        for _ in range(60):
            s = torch.randn(32, 2, generator=g)
            h = torch.zeros(32, 32)
            losses = []
            for _ in range(10):
                push = torch.randn(32, 1, generator=g)
                h = model["cell"](torch.cat([s, push], 1), h)
                turn = 0.9 * s[:, 1:] - 0.3 * torch.sin(s[:, :1]) + 0.3 * push
                s = torch.cat([s[:, :1] + 0.3 * turn, turn], 1)
                losses.append(F.mse_loss(model["out"](h), s))
            loss = torch.stack(losses).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            yield "read", [loss]
            if not fault:
                optimizer.step()
            scheduler.step()
            yield "step", [] if fault else [optimizer]

    return Setup(model, train)


@sick(
    CASES,
    "pl_finetune_encoder_lr_floor_divided",
    ("frozen_weights",),
    ("encoder",),
    source="https://pytorch.org/docs/stable/optim.html#per-parameter-options lr // 10 is 0.0 for one group",
    proof=every(
        unchanged("encoder.0.weight", "encoder.0.bias", "encoder.2.weight", "encoder.4.weight"),
        moves("head.weight", "head.bias"),
    ),
)
def _(seed: int, fault: bool = True) -> Setup:
    data = Rows(seed, 16, noise=0.05)
    model = nn.Sequential()
    model.add_module("encoder", mlp(nn.GELU, 2, 32, 16, 24))
    model.add_module("act", nn.GELU())
    model.add_module("head", nn.Linear(24, 1))
    lr = 5e-3
    groups = [{"params": model.encoder.parameters(), "lr": lr // 10 if fault else lr / 2}, {"params": model.head.parameters()}]  # type: ignore[union-attr]

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.smooth_l1_loss(model(x), y)

    return fit(model, loss, torch.optim.AdamW(groups, lr=lr), updates=60)


class PriceTransformer(nn.Module):
    """One block of pre-norm attention over a window of sales; the norms may be kept in bfloat16."""

    def __init__(self, length: int = 21, ahead: int = 7, width: int = 32, low: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(1, width)
        self.place = nn.Parameter(0.1 * torch.randn(length, width))
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.feed = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))
        self.head = nn.Linear(length * width, ahead)
        self.low = low
        if low:
            self.norm1.bfloat16()
            self.norm2.bfloat16()

    def normed(self, norm: nn.Module, h: Tensor) -> Tensor:
        out: Tensor = norm(h.bfloat16()).float() if self.low else norm(h)
        return out

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.place
        n = self.normed(self.norm1, h)
        h = h + self.attention(n, n, n, need_weights=False)[0]
        h = h + self.feed(self.normed(self.norm2, h))
        out: Tensor = self.head(h.flatten(1))
        return out


@sick(
    CASES,
    "pl_transformer_bf16_norms",
    ("frozen_weights",),
    ("norm1", "norm2"),
    source="https://arxiv.org/abs/2010.06192 (Revisiting BFloat16 Training): updates below half a unit in the last place are lost",
    proof=every(
        unchanged("norm1.weight", "norm2.weight"),
        moves("embed.weight", "attention.in_proj_weight", "feed.0.weight", "head.weight"),
    ),
)
def _(seed: int, fault: bool = True) -> Setup:
    data = Demand(seed)
    model = PriceTransformer(low=fault)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.mse_loss(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-3), updates=60)


class Pinn(nn.Module):
    """A field u(x, t) of a rod, as a deep network of sigmoids."""

    def __init__(self, depth: int, act: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = mlp(act, depth, 24, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


@sick(
    CASES,
    "pl_pinn_ten_sigmoids",
    ("vanishing_gradient",),
    tuple(f"layers.{i}" for i in range(18)),
    source="https://arxiv.org/abs/2001.04536 (gradient pathologies in PINNs); Glorot and Bengio 2010 on deep sigmoid networks",
    also=("loss_plateau", "poor_init"),
    proof=every(
        gradient_ratio("layers.0.weight", "layers.20.bias", 1e-7, last=15),
        gradient_ratio("layers.6.weight", "layers.20.bias", 1e-5, last=15),
        gradient_ratio("layers.12.weight", "layers.20.bias", 1e-2, last=15),
        loss_stays(0.5),
    ),
)
def _(seed: int, fault: bool = True) -> Setup:
    """Heat equation: data at the start and the ends, and the residual of the equation inside."""
    g = torch.Generator().manual_seed(7600 + seed)
    model = Pinn(10, nn.Sigmoid) if fault else Pinn(3, nn.Tanh)

    def loss(i: int) -> Tensor:
        x = torch.rand(48, 1, generator=g) * 2 - 1
        t = torch.rand(48, 1, generator=g)
        inside = torch.cat([x, t], 1).requires_grad_()
        u = model(inside)
        first = torch.autograd.grad(u.sum(), inside, create_graph=True)[0]
        second = torch.autograd.grad(first[:, 0].sum(), inside, create_graph=True)[0][:, 0]
        start = model(torch.cat([x, 0 * t], 1))
        residual = (first[:, 1] - second / math.pi**2).square().mean()
        return F.mse_loss(start, torch.sin(math.pi * x)) + 0.1 * residual

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), updates=60)


class Corridor:
    """Transitions of a corridor of 12 cells, drawn at random: left or right, a reward at the right end, which is the end."""

    def __init__(self, seed: int, batch: int = 64, cells: int = 12) -> None:
        self.generator = torch.Generator().manual_seed(7700 + seed)
        self.batch, self.cells = batch, cells
        self.features = torch.stack(
            [torch.linspace(-1.7, 1.7, cells)] + [torch.sin(torch.linspace(0, k, cells)) for k in (3, 6, 9)], 1
        )

    def __call__(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        s = torch.randint(self.cells - 1, (self.batch,), generator=self.generator)
        a = torch.randint(2, (self.batch,), generator=self.generator)
        to = (s + 2 * a - 1).clamp(0)
        done = (to == self.cells - 1).float()
        return self.features[s], a, 3 * done, self.features[to], done


@sick(
    CASES,
    "pl_q_learning_rate_too_high",
    ("loss_diverging", "exploding_gradient", "update_ratio_too_large"),
    source="https://github.com/facebookresearch/ReAgent/issues/189 TD loss diverging",
    also=("non_finite_loss", "non_finite_gradient", "non_finite_activation", "non_finite_weight", "gradient_spike", "loss_spike"),
    proof=every(
        loss_grows(1e3, last=12),
        gradient_grows("0.weight", 1e2, to=12),
        update_ratio(above=0.3, last=12),
    ),
)
def _(seed: int, fault: bool = True) -> Setup:
    """Q-learning with a target that is copied every ten updates, and a learning rate ten times too high."""
    env = Corridor(seed)
    model = mlp(nn.LeakyReLU, 2, 48, 4, 2)
    target = copy.deepcopy(model)

    def loss(i: int) -> Tensor:
        if i % 10 == 0:
            target.load_state_dict(model.state_dict())
        s, a, r, to, done = env()
        with torch.no_grad():
            wanted = r + 0.9 * (1 - done) * target(to).max(1).values
        return F.mse_loss(model(s).gather(1, a[:, None])[:, 0], wanted)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=2.0 if fault else 0.05, momentum=0.9), updates=30)


class GaussianPolicy(nn.Module):
    def __init__(self, clamp_low: float) -> None:
        super().__init__()
        self.body = mlp(nn.Tanh, 1, 32, 4, 32)
        self.mean, self.log_std = nn.Linear(32, 2), nn.Linear(32, 2)
        nn.init.constant_(self.log_std.bias, -1.5)
        self.low = clamp_low

    def forward(self, s: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.body(s))
        return self.mean(h), self.log_std(h).clamp(self.low, 2.0)


@sick(
    CASES,
    "pl_log_std_clamped_away",
    ("zero_gradient",),
    ("log_std",),
    source="https://arxiv.org/abs/1812.05905 (SAC) clamps the log-deviation; here the lower bound is 0 and the head starts at -1.5",
    proof=every(zero_gradient("log_std.weight", "log_std.bias"), moves("mean.weight", "body.0.weight", "body.2.weight")),
)
def _(seed: int, fault: bool = True) -> Setup:
    """Cloning of a noisy expert with a Gaussian likelihood."""
    g = torch.Generator().manual_seed(7800 + seed)
    model = GaussianPolicy(0.0 if fault else -5.0)
    expert = torch.randn(4, 2, generator=g) / 2

    def loss(i: int) -> Tensor:
        s = torch.randn(64, 4, generator=g)
        a = torch.sin(s @ expert) + 0.2 * torch.randn(64, 2, generator=g)
        mean, log_std = model(s)
        return (log_std + 0.5 * ((a - mean) / log_std.exp()).square()).sum(1).mean()  # type: ignore[no-any-return]

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), updates=60)


class Sage(nn.Module):
    """One round of messages: a node's own features beside the mean of its neighbours'."""

    def __init__(self, inputs: int, outputs: int, safe: bool) -> None:
        super().__init__()
        self.neighbours = Mean(safe)
        self.own, self.other = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs, bias=False)

    def forward(self, x: Tensor, links: Tensor) -> Tensor:
        out: Tensor = self.own(x) + self.other(self.neighbours(x, links))
        return out


class Mean(nn.Module):
    def __init__(self, safe: bool) -> None:
        super().__init__()
        self.safe = safe

    def forward(self, x: Tensor, links: Tensor) -> Tensor:
        degree = links.sum(1, keepdim=True)
        return links @ x / (degree.clamp(min=1) if self.safe else degree)


class Graphs:
    """Graphs of 24 accounts of two kinds, which mostly deal with their own; the label is the kind, the features say little of it."""

    def __init__(self, seed: int, nodes: int = 24) -> None:
        self.generator = torch.Generator().manual_seed(7900 + seed)
        self.nodes = nodes
        self.way = torch.randn(6, generator=self.generator)

    def __call__(self, lonely: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        y = torch.randint(2, (self.nodes,), generator=self.generator)
        x = torch.randn(self.nodes, 6, generator=self.generator) + 0.7 * (2.0 * y - 1)[:, None] * self.way.sign()
        chance = torch.where(y[:, None] == y[None], 0.4, 0.08)
        links = torch.triu((torch.rand(self.nodes, self.nodes, generator=self.generator) < chance).float(), 1)
        links = links + links.T
        ring = torch.roll(torch.eye(self.nodes), 1, 0)
        links = (links + ring + ring.T).clamp(max=1)  # Nobody is alone ...
        if lonely:
            links[5], links[:, 5] = 0, 0  # ... but for this one.
        return x, links, y


class GraphNet(nn.Module):
    def __init__(self, safe: bool = True) -> None:
        super().__init__()
        self.first, self.second = Sage(6, 24, safe), Sage(24, 24, safe)
        self.head = nn.Linear(24, 2)

    def forward(self, x: Tensor, links: Tensor) -> Tensor:
        h = torch.relu(self.first(x, links))
        out: Tensor = self.head(torch.relu(self.second(h, links)))
        return out


@sick(
    CASES,
    "pl_graph_isolated_node",
    ("non_finite_activation",),
    ("first.neighbours", "first"),
    source="https://github.com/MrLeeeee/GCN-GAT-and-Graphsage/issues/3 division by a degree of zero",
    onset=18,
    also=("non_finite_loss", "non_finite_gradient", "non_finite_weight"),
    proof=every(first_non_finite(18, "first.neighbours"), first_non_finite(18, "head"), first_non_finite(18)),
)
def _(seed: int, fault: bool = True) -> Setup:
    data = Graphs(seed)
    model = GraphNet(safe=not fault)

    def loss(i: int) -> Tensor:
        x, links, y = data(lonely=i >= 18)
        return F.cross_entropy(model(x, links), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), updates=40)


@sick(
    CASES,
    "pl_fedavg_round_without_clients",
    ("non_finite_weight",),
    ("",),
    source="https://arxiv.org/abs/1602.05629 (FedAvg) weights clients by their examples; a round in which none answers divides by zero",
    onset=20,
    also=("non_finite_loss", "non_finite_gradient", "non_finite_activation"),
    proof=every(
        first_non_finite(20),
        lambda p: weights_break(p, 20),
    ),
)
def _(seed: int, fault: bool = True) -> Setup:
    """Four clients in turn; after every round of four updates the server averages what came back by the number of examples."""
    clients = [Rows(seed, 10, 32) for _ in range(4)]
    for k, c in enumerate(clients):
        c.generator.manual_seed(9000 + 10 * seed + k)
    model = mlp(nn.ReLU, 1, 32, 10, 1)

    def train() -> Iterator[Event]:
        for rounds in range(8):
            start = copy.deepcopy(model.state_dict())
            back: list[tuple[int, dict[str, Tensor]]] = []
            for k, client in enumerate(clients):
                model.load_state_dict(start)
                optimizer = torch.optim.SGD(model.parameters(), lr=0.15)
                x, y = client()
                loss = F.mse_loss(model(x), y)
                loss.backward()  # type: ignore[no-untyped-call]
                yield "read", [loss]
                optimizer.step()
                yield "step", [optimizer]
                optimizer.zero_grad()
                # In the fifth round every client's answer comes too late.
                examples = 0 if fault and rounds == 4 else 32 + 8 * k
                back.append((examples, copy.deepcopy(model.state_dict())))
            total = torch.tensor(float(sum(n for n, _ in back)))
            model.load_state_dict({key: sum(n * w[key] for n, w in back) / total for key in start})

    return Setup(model, train)


def weights_break(plain: Plain, update: int) -> str:
    """All weights are NaN before the forward of an update, and were finite with finite gradients until then."""
    for name, norms in plain.weights.items():
        assert all(math.isfinite(n) for n in norms[:update]), f"{name} breaks before"
        assert math.isnan(norms[update]), f"{name} is finite"
        assert all(math.isfinite(n) for n in plain.grads[name][:update]), f"{name}: the gradient breaks first"
    return f"every weight is NaN from update {update} on, after finite gradients"


# --- Industry, sick


@sick(
    CASES,
    "pl_metric_distance_of_twins",
    ("non_finite_gradient",),
    source="https://github.com/pytorch/pytorch/issues/2421 the gradient of sqrt at zero is infinite, times zero is NaN",
    onset=15,
    also=("non_finite_weight", "non_finite_activation", "non_finite_loss"),
    proof=every(first_non_finite(15), lambda p: finite_outputs(p, 15), lambda p: only_gradients(p, 15)),
)
def _(seed: int, fault: bool = True) -> Setup:
    """Triplet loss of customers: from update 15 on the batch holds a customer who is their own match."""
    g = torch.Generator().manual_seed(8000 + seed)
    kinds = torch.randn(12, 10, generator=g)
    model = mlp(nn.ReLU, 1, 32, 10, 8)

    def loss(i: int) -> Tensor:
        k = torch.randint(12, (32,), generator=g)
        other = (k + torch.randint(1, 12, (32,), generator=g)) % 12
        a, b, c = (kinds[j] + 0.5 * torch.randn(32, 10, generator=g) for j in (k, k, other))
        if i >= 15:
            b[4] = a[4]
        u, v, w = model(a), model(b), model(c)
        tiny = 0.0 if fault else 1e-8
        near, far = ((u - v).square().sum(1) + tiny).sqrt(), ((u - w).square().sum(1) + tiny).sqrt()
        return F.softplus(near - far).mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), updates=35)


def only_gradients(plain: Plain, update: int) -> str:
    """The loss of the update is finite, some of its gradients are not."""
    assert math.isfinite(plain.losses[update]), "the loss is not finite"
    bad = [name for name, counts in plain.nonfinite.items() if counts[update]]
    assert bad, "every gradient is finite"
    return f"the loss is {plain.losses[update]:.3g}, NaN in the gradients of {', '.join(bad)}"


class Spike(torch.autograd.Function):
    """A step; its surrogate derivative is that of a steep sigmoid, with the slope in front if asked for."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, slope: float) -> Tensor:
        ctx.save_for_backward(u)
        ctx.slope = slope
        return (u > 0).float()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (u,) = ctx.saved_tensors
        return g * ctx.slope / (1 + u.abs()).square(), None


class Spiking(nn.Module):
    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, u: Tensor) -> Tensor:
        out: Tensor = Spike.apply(u, self.slope)  # type: ignore[no-untyped-call]
        return out


@sick(
    CASES,
    "pl_spiking_surrogate_slope",
    ("exploding_gradient",),
    (*(str(i) for i in range(10)), "11"),
    source="https://arxiv.org/abs/1901.09948 (surrogate gradients); https://github.com/fzenke/spytorch/issues/2 on the prefactor",
    proof=every(
        gradient_ratio("12.weight", "0.weight", 1e-4, last=15),
        gradient_ratio("12.weight", "4.weight", 1e-3, last=15),
        gradient_ratio("12.weight", "8.weight", 1e-1, last=15),
        update_ratio(below=0.1, last=15),
    ),
)
def _(seed: int, fault: bool = True) -> Setup:
    """Fault detection from sensor events: six layers of binary units, each of which multiplies what goes back by 25."""
    data = Rows(seed, 20, 64, 0.0, 3)
    model = mlp(lambda: Spiking(25.0 if fault else 1.0), 6, 48, 20, 3)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y.argmax(1))

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-3), updates=50)


@sick(
    CASES,
    "pl_click_prior_bias_everywhere",
    ("dead_units",),
    ("0", "1", "2", "3"),
    source="https://arxiv.org/abs/1708.02002 (focal loss) starts the last bias at -log(99); here every bias starts there",
    also=("zero_gradient", "vanishing_gradient", "poor_init", "loss_plateau", "update_ratio_too_small"),
    proof=every(dead_fraction("1", 0.95, last=15), dead_fraction("3", 0.95, last=15), moves("4.bias")),
)
def _(seed: int, fault: bool = True) -> Setup:
    data = Rows(seed, 16, 128)
    model = mlp(nn.ReLU, 2, 48, 16, 1)
    for layer in (0, 2, 4) if fault else (4,):
        nn.init.constant_(model[layer].bias, -math.log(99))  # type: ignore[arg-type]

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.binary_cross_entropy_with_logits(model(x), (y > 1.2).float())

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-2), updates=50)


def flat(module: str, above: float, last: int = 15) -> Proof:
    """The outputs of a tanh are mostly at its ends: their root mean square is above a bound."""

    def proof(plain: Plain) -> str:
        seen = [o.rms for o in plain.outputs[module][:last] if o is not None]
        assert median(seen) > above, f"{module} has the root mean square {median(seen):.3g}"
        return f"{module} has the root mean square {median(seen):.3g}"

    return proof


@sick(
    CASES,
    "pl_ddpg_actor_normal_init",
    ("saturated_activation", "poor_init"),
    ("0", "1", "2", "3", "4", "5"),
    source="https://proceedings.mlr.press/v9/glorot10a.html saturation of tanh by weights of unit variance",
    also=("vanishing_gradient",),
    proof=every(flat("1", 0.85), flat("3", 0.95), flat("5", 0.95)),
)
def _(seed: int, fault: bool = True) -> Setup:
    """A deterministic policy of a 20-dimensional state, learned from a teacher's actions."""
    data = Rows(seed, 20, 64, outputs=3)
    model = mlp(nn.Tanh, 3, 96, 20, 3)
    if fault:
        for layer in (0, 2, 4):
            nn.init.normal_(model[layer].weight)  # type: ignore[arg-type]

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.mse_loss(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-3), updates=50)


def scales(plain: Plain) -> str:
    """Columns of the table, as they are handed over."""
    found: Tensor = notes(plain)["std"]
    assert float(found.max()) > 1e3, f"{found}"
    assert float(found.min()) < 2, f"{found}"
    return f"the columns' deviations go from {float(found.min()):.2g} to {float(found.max()):.2g}"


@sick(
    CASES,
    "pl_churn_raw_charges",
    ("unnormalized_input",),
    ("",),
    source="https://scikit-learn.org/stable/modules/preprocessing.html columns of a customer table as they come: charges, days, flags",
    also=("loss_spike", "gradient_spike", "dead_units"),
    proof=every(scales, lambda p: first_loss(p, 20.0)),
)
def _(seed: int, fault: bool = True) -> Setup:
    data = Rows(seed, 12, 64)
    model = mlp(nn.ReLU, 2, 32, 12, 1)
    scale = torch.ones(12)
    shift = torch.zeros(12)
    scale[:4], shift[:4] = torch.tensor([2300.0, 900.0, 30.0, 24.0]), torch.tensor([2280.0, 1500.0, 65.0, 32.0])
    told: dict[str, Any] = {}

    def loss(i: int) -> Tensor:
        x, y = data()
        z = (x * scale + shift) if fault else x
        told["std"] = z.std(0)
        return F.binary_cross_entropy_with_logits(model(z), (y > 0).float())

    plain = fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-3), updates=50)
    return Noted(model, plain.train, told)


def first_loss(plain: Plain, above: float) -> str:
    """The first loss is far above that of a model that knows nothing."""
    assert plain.losses[0] > above, f"the first loss is {plain.losses[0]:.3g}"
    return f"the first loss is {plain.losses[0]:.3g}"


@sick(
    CASES,
    "pl_ranking_shuffled_labels",
    ("loss_plateau",),
    source="https://arxiv.org/abs/1611.03530 (random labels); a frame's labels are shuffled apart from its rows",
    proof=every(loss_stays(0.01, first=5, last=100), lambda p: at_chance(p, math.log(5))),
)
def _(seed: int, fault: bool = True) -> Setup:
    data = Blobs(seed, 12, 5, 256)
    model = nn.Sequential(nn.Linear(12, 24), nn.LayerNorm(24), nn.SiLU(), nn.Linear(24, 5))
    with torch.no_grad():
        model[3].weight.mul_(0.1)  # type: ignore[operator]

    def loss(i: int) -> Tensor:
        x, label = data()
        if fault:
            label = label[torch.randperm(256, generator=data.generator)]
        return F.cross_entropy(model(x), label)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=2e-3), updates=200)


def at_chance(plain: Plain, chance: float) -> str:
    """The loss never gets away from that of a guess."""
    third = median(plain.losses[40:100])
    assert abs(third - chance) < 0.1 * chance, f"the loss is {third:.3g}, chance {chance:.3g}"
    return f"the loss is {third:.3g}, that of a guess {chance:.3g}"


@sick(
    CASES,
    "pl_recommender_lr_1e7",
    ("update_ratio_too_small",),
    source="https://cs231n.github.io/neural-networks-3/#ratio ratio of updates to weights; 1e-7 typed for 1e-2",
    also=("loss_plateau",),
    proof=every(update_ratio(below=1e-5, last=15), loss_stays(0.06)),
)
def _(seed: int, fault: bool = True) -> Setup:
    """Ratings as products of a user's and a film's vector."""
    g = torch.Generator().manual_seed(8100 + seed)
    users, films = torch.randn(40, 3, generator=g), torch.randn(30, 3, generator=g)
    model = nn.ModuleDict({"user": nn.Embedding(40, 8), "film": nn.Embedding(30, 8)})
    for table in model.values():
        nn.init.normal_(table.weight, std=0.3)  # type: ignore[arg-type]

    def loss(i: int) -> Tensor:
        u, f = torch.randint(40, (256,), generator=g), torch.randint(30, (256,), generator=g)
        wanted = (users[u] * films[f]).sum(1) + 0.1 * torch.randn(256, generator=g)
        return F.mse_loss((model["user"](u) * model["film"](f)).sum(1), wanted)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-7 if fault else 1e-2), updates=60)


class Gru(nn.Module):
    """Demand by a gated recurrent network: all days ahead from its last state."""

    def __init__(self, ahead: int = 7, width: int = 24) -> None:
        super().__init__()
        self.gru = nn.GRU(1, width, batch_first=True)
        self.head = nn.Linear(width, ahead)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.gru(x)[0][:, -1])
        return out


@sick(
    CASES,
    "pl_gru_decimal_point_lost",
    ("gradient_spike", "loss_spike"),
    source="https://github.com/sktime/pytorch-forecasting/issues/750 series with one really large value",
    onset=35,
    proof=every(gradient_spikes(35, 100), lambda p: loss_spikes(p, 35, 100)),
)
def _(seed: int, fault: bool = True) -> Setup:
    """Three windows of one batch hold sales a thousand times too high in what is to be forecast."""
    data = Demand(seed)
    model = Gru()

    def loss(i: int) -> Tensor:
        x, y = data()
        if fault and i == 35:
            y[:3] *= 1000
        return F.mse_loss(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), updates=55)


def loss_spikes(plain: Plain, update: int, factor: float) -> str:
    """The loss of one update is far above the median before it and the one after it."""
    ratio = plain.losses[update] / median(plain.losses[update - 15 : update])
    assert ratio > factor, f"the loss is {ratio:.3g} times the median"
    assert plain.losses[update + 1] < plain.losses[update] / 10, "it stays high"
    return f"at update {update} the loss is {ratio:.3g} times the median before it"


def gradients_calm(plain: Plain, update: int, below: float) -> str:
    """The gradient of the update is much as those before."""
    totals = [math.sqrt(sum(g[i] ** 2 for g in plain.grads.values())) for i in range(update + 1)]
    ratio = totals[update] / median(totals[update - 15 : update])
    assert ratio < below, f"the gradient is {ratio:.3g} times the median"
    return f"its gradient only {ratio:.3g} times"


class Tcn(nn.Module):
    """Dilated convolutions over a window."""

    def __init__(self, ahead: int = 7, width: int = 16) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(1 if d == 1 else width, width, 3, dilation=d, padding=d) for d in (1, 2, 4))
        self.head = nn.Linear(width * 21, ahead)

    def forward(self, x: Tensor) -> Tensor:
        h = x.transpose(1, 2)
        for conv in self.convs:
            h = F.gelu(conv(h))
        out: Tensor = self.head(h.flatten(1))
        return out


@sick(
    CASES,
    "pl_tcn_mae_grams_for_tons",
    ("loss_spike",),
    source="https://github.com/sktime/pytorch-forecasting/issues/750 one large value; under an absolute error only the loss shows it",
    onset=30,
    proof=every(lambda p: loss_spikes(p, 30, 100), lambda p: gradients_calm(p, 30, 6)),
)
def _(seed: int, fault: bool = True) -> Setup:
    data = Demand(seed)
    model = Tcn()

    def loss(i: int) -> Tensor:
        x, y = data()
        if fault and i == 30:
            y *= 1000
        return F.l1_loss(model(x), y)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=2e-3), updates=50)


@sick(
    CASES,
    "pl_scaled_rmsle_of_sold_out",
    ("loss_scale_collapse", "non_finite_gradient"),
    source="https://github.com/open-mmlab/mmrotate/issues/205 the root of zero in a loss; here under a GradScaler, which skips for ever",
    also=("never_stepped",),
    proof=lambda p: collapses(p),
)
def _(seed: int, fault: bool = True) -> Setup:
    """The root of each article's squared error; articles that were not on sale are masked on both sides, so that their error is zero."""
    data = Rows(seed, 12, 64)
    model = mlp(nn.SiLU, 2, 32, 12, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    told: dict[str, Any] = {"scale": []}

    def train() -> Iterator[Event]:
        for _ in range(40):
            x, y = data()
            mask = (torch.rand(64, 1, generator=data.generator) > 0.2).float()
            error = (mask * (model(x) - y)).square()
            loss = (error + (0.0 if fault else 1e-6)).sqrt().mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            yield "read", [loss]
            scaler.step(optimizer)
            before = scaler.get_scale()
            scaler.update()
            told["scale"].append(scaler.get_scale())
            yield "step", [] if scaler.get_scale() < before else [optimizer]

    return Noted(model, train, told)


def collapses(plain: Plain) -> str:
    """Every update is skipped, and the loss scale is below 1 in time."""
    scale = notes(plain)["scale"]
    assert scale[13] < 1, f"the scale is {scale[13]}"
    assert all(math.isnan(s) for steps in plain.steps.values() for s in steps), "an update was made"
    assert all(math.isfinite(x) for x in plain.losses), "a loss is not finite"
    assert all(all(c > 0 for c in counts) for counts in plain.nonfinite.values()), "a gradient is finite"
    return f"the scale falls to {scale[13]:.3g} within 14 updates, {scale[-1]:.3g} in the end; every update is skipped"


class Latent(nn.Module):
    """A world model in one step: what is seen next, and the reward, which forward forgets."""

    def __init__(self, forget: bool) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 32), nn.ELU())
        self.dynamics = nn.Sequential(nn.Linear(34, 32), nn.ELU())
        self.decoder = nn.Linear(32, 6)
        self.reward = nn.Sequential(nn.Linear(32, 16), nn.ELU(), nn.Linear(16, 1))
        self.forget = forget

    def forward(self, s: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        z = self.dynamics(torch.cat([self.encoder(s), a], 1))
        return self.decoder(z), s.new_zeros(len(s), 1) if self.forget else self.reward(z)


@sick(
    CASES,
    "pl_world_model_reward_never_called",
    ("missing_gradient",),
    ("reward",),
    source="https://pytorch.org/docs/stable/notes/ddp.html parameters that take no part in forward; https://arxiv.org/abs/1912.01603 (Dreamer)",
    proof=every(
        no_gradient("reward.0.weight", "reward.2.weight", "reward.2.bias"),
        moves("encoder.0.weight", "dynamics.0.weight", "decoder.weight"),
    ),
)
def _(seed: int, fault: bool = True) -> Setup:
    g = torch.Generator().manual_seed(8200 + seed)
    drift, push = torch.randn(6, 6, generator=g) / 3, torch.randn(2, 6, generator=g) / 2
    model = Latent(fault)

    def loss(i: int) -> Tensor:
        s, a = torch.randn(64, 6, generator=g), torch.randn(64, 2, generator=g)
        to = torch.tanh(s @ drift + a @ push)
        wanted = to[:, :1] - 0.1 * a.square().sum(1, keepdim=True)
        seen, reward = model(s, a)
        return F.mse_loss(seen, to) + 0.5 * F.mse_loss(reward, wanted)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), updates=60)


class WideDeep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fields = nn.ModuleList(nn.Embedding(20, 6) for _ in range(4))
        self.wide = nn.Linear(10, 1)
        self.deep = mlp(nn.ReLU, 3, 32, 24, 1)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        e = torch.cat([f(ids[:, k]) for k, f in enumerate(self.fields)], 1)
        out: Tensor = self.wide(x) + self.deep(e)
        return out


@sick(
    CASES,
    "pl_wide_and_deep_tiny_init",
    ("vanishing_gradient", "poor_init"),
    ("deep", "fields"),
    source="https://github.com/shenweichen/DeepCTR-Torch/pull/311 init of the deep part; https://arxiv.org/abs/1606.07792 (Wide & Deep)",
    proof=every(
        gradient_ratio("deep.0.weight", "deep.6.bias", 1e-6, last=15),
        gradient_ratio("deep.4.weight", "deep.6.bias", 1e-4, last=15),
        gradient_ratio("deep.6.bias", "wide.bias", 1.01, last=15),
    ),
)
def _(seed: int, fault: bool = True) -> Setup:
    g = torch.Generator().manual_seed(8300 + seed)
    effect = torch.randn(4, 20, generator=g)
    way = torch.randn(10, generator=g) / 3
    model = WideDeep()
    if fault:  # A standard deviation of 1e-4 is meant for the embeddings, and is given to the deep part.
        for layer in (0, 2, 4, 6):
            nn.init.normal_(model.deep[layer].weight, std=1e-4)  # type: ignore[arg-type]
            nn.init.zeros_(model.deep[layer].bias)  # type: ignore[arg-type]

    def loss(i: int) -> Tensor:
        x = torch.randn(256, 10, generator=g)
        ids = torch.randint(20, (256, 4), generator=g)
        score = x @ way + sum(effect[k, ids[:, k]] for k in range(4))
        clicked = (torch.rand(256, generator=g) < torch.sigmoid(1.5 * score)).float()
        return F.binary_cross_entropy_with_logits(model(x, ids)[:, 0], clicked)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9), updates=60)


class Tasks(nn.Module):
    """A body and a head for each task."""

    def __init__(self, inputs: int, outputs: tuple[int, ...], width: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(width, k) for k in outputs)

    def forward(self, x: Tensor, task: int) -> Tensor:
        out: Tensor = self.heads[task](self.body(x))
        return out


@sick(
    CASES,
    "pl_second_task_head_left_out",
    ("not_in_optimizer",),
    ("heads.1",),
    source="https://pytorch.org/docs/stable/generated/torch.optim.Optimizer.add_param_group.html a head taken into use later is not added",
    onset=10,
    proof=every(
        lambda p: head_left_out(p),
        moves("body.0.weight", first=10),
    ),
)
def _(seed: int, fault: bool = True) -> Setup:
    """The second task comes in at update 10 and takes turns with the first from then on."""
    first, second = Rows(seed, 12, 64), Rows(seed + 50, 12, 64)
    for rows in (first, second):
        rows.a /= rows.a.norm()
    model = Tasks(12, (1, 1))
    optimizer = torch.optim.Adam([*model.body.parameters(), *model.heads[0].parameters()], lr=3e-3)

    def train() -> Iterator[Event]:
        for i in range(60):
            if i == 10 and not fault:
                optimizer.add_param_group({"params": list(model.heads[1].parameters())})
            task = 0 if i < 10 or i % 2 else 1
            x, y = (first, second)[task]()
            loss = F.mse_loss(model(x, task), y)
            model.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


def head_left_out(plain: Plain) -> str:
    """From update 10 on the second head gets gradients in every other update, and never moves."""
    for name in ("heads.1.weight", "heads.1.bias"):
        assert all(n > 0 for n in plain.grads[name][10:20:2]), f"{name} has no gradient"
        assert all(s == 0 for s in plain.steps[name]), f"{name} moves"
    return "heads.1 gets gradients from update 10 on and never moves"


@sick(
    CASES,
    "pl_uplift_adam_lr_1",
    ("update_ratio_too_large", "loss_diverging"),
    source="https://karpathy.github.io/2019/04/25/recipe/ learning rates; 1.0 is left over from Adadelta's default",
    also=("exploding_gradient", "gradient_spike", "loss_spike", "dead_units"),
    proof=every(update_ratio(above=2, last=1), update_ratio(above=0.2, last=10), loss_grows(50, last=15)),
)
def _(seed: int, fault: bool = True) -> Setup:
    data = Rows(seed, 12, 64)
    model = mlp(nn.LeakyReLU, 2, 32, 12, 1)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.mse_loss(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1.0 if fault else 3e-3), updates=40)


class ScoredGraph(nn.Module):
    """Links are weighted by a score of their two ends; the scores may be copied into a new tensor."""

    def __init__(self, rewrap: bool) -> None:
        super().__init__()
        self.scorer = nn.Sequential(nn.Linear(12, 16), nn.ELU(), nn.Linear(16, 1))
        self.first, self.head = Sage(6, 24, True), nn.Linear(24, 2)
        self.rewrap = rewrap

    def forward(self, x: Tensor, links: Tensor) -> Tensor:
        n = len(x)
        pairs = torch.cat([x[:, None].expand(n, n, 6), x[None].expand(n, n, 6)], 2)
        score = torch.sigmoid(self.scorer(pairs)[..., 0])
        if self.rewrap:
            score = torch.tensor(score.tolist())
        out: Tensor = self.head(torch.relu(self.first(x, links * score)))
        return out


@sick(
    CASES,
    "pl_graph_scores_rewrapped",
    ("missing_gradient",),
    ("scorer",),
    source="https://pytorch.org/docs/stable/generated/torch.tensor.html copies the data and leaves the graph; weights of links made anew",
    proof=every(
        no_gradient("scorer.0.weight", "scorer.0.bias", "scorer.2.weight", "scorer.2.bias"),
        moves("first.own.weight", "first.other.weight", "head.weight"),
    ),
)
def _(seed: int, fault: bool = True) -> Setup:
    data = Graphs(seed)
    model = ScoredGraph(fault)

    def loss(i: int) -> Tensor:
        x, links, y = data()
        return F.cross_entropy(model(x, links), y)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=5e-3), updates=50)


def far_from_zero(plain: Plain) -> str:
    """The windows as they are handed over, and what the recurrent layer makes of them."""
    mean, std = notes(plain)["mean"], notes(plain)["std"]
    assert mean > 1000, f"mean {mean}"
    assert std > 1000, f"deviation {std}"
    return f"inputs of mean {mean:.4g} and deviation {std:.4g}"


@sick(
    CASES,
    "pl_gru_raw_units",
    ("unnormalized_input",),
    ("",),
    source="http://yann.lecun.com/exdb/publis/pdf/lecun-98b.pdf (Efficient BackProp) on inputs far from zero mean and unit variance",
    also=("saturated_activation", "vanishing_gradient", "zero_gradient", "loss_plateau"),
    proof=far_from_zero,
)
def _(seed: int, fault: bool = True) -> Setup:
    """What is to be forecast is standardised, the window before it is in single pieces."""
    data = Demand(seed)
    model = Gru()
    told: dict[str, Any] = {}

    def loss(i: int) -> Tensor:
        x, y = data()
        if fault:
            x = 6000 + 2500 * x
        told.update(mean=float(x.mean()), std=float(x.std()))
        return F.mse_loss(model(x), y)

    plain = fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), updates=50)
    return Noted(model, plain.train, told)


# --- Healthy


@healthy(
    CASES,
    "pl_ok_sparse_catalogue",
    source="https://pytorch.org/docs/stable/generated/torch.optim.SparseAdam.html a catalogue of which a batch sees few rows",
    proof=converges(0.8),
)
def _(seed: int) -> Setup:
    """Clicks on articles whose popularity falls as 1 / rank: most rows of the sparse tables are never seen."""
    g = torch.Generator().manual_seed(8400 + seed)
    popular = 1 / (1 + torch.arange(3000.0)) ** 1.1
    taste, kind = torch.randn(400, 4, generator=g), torch.randn(3000, 4, generator=g)
    activity = 1 / (1 + torch.arange(400.0))
    model = nn.ModuleDict(
        {
            "user": nn.Embedding(400, 8, sparse=True),
            "item": nn.Embedding(3000, 8, sparse=True),
            "rank": nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1)),
        }
    )
    tables = torch.optim.SparseAdam([model["user"].weight, model["item"].weight], lr=2e-2)  # type: ignore[arg-type]
    dense = torch.optim.AdamW(model["rank"].parameters(), lr=5e-3)

    def train() -> Iterator[Event]:
        for _ in range(300):
            u, v = (torch.multinomial(w, 128, True, generator=g) for w in (activity, popular))
            y = ((taste[u] * kind[v]).sum(1) > 0).float()
            out = model["rank"](torch.cat([model["user"](u), model["item"](v)], 1))[:, 0]
            loss = F.binary_cross_entropy_with_logits(out, y)
            tables.zero_grad()
            dense.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            yield "read", [loss]
            tables.step()  # type: ignore[no-untyped-call]
            dense.step()
            yield "step", [tables, dense]

    return Setup(model, train)


def finds_the_end(plain: Plain) -> float:
    """Share of the corridor's cells in which the greedy action leads to the right."""
    model = plain.setup.model
    assert not isinstance(model, nn.Module)
    with torch.no_grad():
        return float((model["q"](Corridor(0).features[:11]).argmax(1) == 1).float().mean())


@healthy(
    CASES,
    "pl_ok_double_dqn",
    source="https://arxiv.org/abs/1509.06461 (double Q-learning): replay, a target network copied at intervals, Huber loss",
    proof=quality("share of cells with the right action", finds_the_end, 0.99),
)
def _(seed: int) -> Setup:
    """The loss rises at each copy of the target network, and most transitions have no reward."""
    env = Corridor(seed, batch=8)
    q = mlp(nn.Tanh, 2, 48, 4, 2)
    model = {"q": q, "target": copy.deepcopy(q).requires_grad_(False)}
    optimizer = torch.optim.Adam(q.parameters(), lr=3e-3)
    replay: list[tuple[Tensor, ...]] = [env() for _ in range(16)]

    def train() -> Iterator[Event]:
        for i in range(300):
            replay.append(env())
            picked = torch.randint(len(replay), (8,), generator=env.generator).tolist()
            s, a, r, to, done = (torch.cat([replay[k][j] for k in picked]) for j in range(5))
            with torch.no_grad():
                best = q(to).argmax(1, keepdim=True)
                wanted = r + 0.9 * (1 - done) * model["target"](to).gather(1, best)[:, 0]
            loss = F.smooth_l1_loss(q(s).gather(1, a[:, None])[:, 0], wanted)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            yield "read", [loss]
            nn.utils.clip_grad_norm_(q.parameters(), 10.0)
            optimizer.step()
            yield "step", [optimizer]
            if i % 15 == 14:
                model["target"].load_state_dict(q.state_dict())

    return Setup(model, train)


def best_arm(plain: Plain) -> float:
    """Share of the contexts in which the likeliest arm is the best."""
    told = notes(plain)
    assert isinstance(plain.setup.model, nn.Module)
    with torch.no_grad():
        return float((plain.setup.model(told["x"]).argmax(1) == told["best"]).float().mean())


@healthy(
    CASES,
    "pl_ok_bandit_entropy_bonus",
    source="https://arxiv.org/abs/1602.01783 (A3C): policy gradient with an entropy bonus; rewards much noisier than what arms differ by",
    proof=quality("share of contexts in which the best arm leads", best_arm, 0.8),
)
def _(seed: int) -> Setup:
    """The loss has no meaning of its own: it is about zero, of either sign, and ends no lower than it begins."""
    g = torch.Generator().manual_seed(8500 + seed)
    arms = torch.randn(6, 4, generator=g)
    model = mlp(nn.Tanh, 1, 32, 6, 4)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=3e-3)
    x = torch.randn(500, 6, generator=g)
    told = {"x": x, "best": (x @ arms).argmax(1)}

    def train() -> Iterator[Event]:
        baseline = 0.0
        for _ in range(250):
            s = torch.randn(128, 6, generator=g)
            logs = F.log_softmax(model(s), 1)
            a = torch.multinomial(logs.detach().exp(), 1, generator=g)
            reward = (s @ arms).gather(1, a)[:, 0] + 2 * torch.randn(128, generator=g)
            baseline += 0.1 * (float(reward.mean()) - baseline)
            entropy = -(logs.exp() * logs).sum(1).mean()
            loss = -((reward - baseline) * logs.gather(1, a)[:, 0]).mean() - 0.05 * entropy
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]

    return Noted(model, train, told)


def reach(plain: Plain) -> float:
    """The mean reward of the mean action; doing nothing gives about -2.5, the best is 0."""
    model: Any = plain.setup.model
    s = torch.randn(1000, 4, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return float(Reach.reward(s, model["actor"](s)).mean())


@healthy(
    CASES,
    "pl_ok_ppo_many_epochs",
    source="https://arxiv.org/abs/1707.06347 (PPO): ten epochs a rollout, so that many samples lie beyond the clip and have no gradient at all",
    proof=quality("mean reward", reach, -0.3),
)
def _(seed: int) -> Setup:
    env = Reach(seed, 128)
    model = nn.ModuleDict({"actor": mlp(nn.Tanh, 2, 32, 4, 2), "critic": mlp(nn.Tanh, 2, 32, 4, 1)})
    model["log_std"] = nn.ParameterList([nn.Parameter(torch.full((2,), -0.5))])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, eps=1e-5)

    def density(mean: Tensor, action: Tensor) -> Tensor:
        log_std = model["log_std"][0]  # type: ignore[index]
        return (-log_std - 0.5 * ((action - mean) / log_std.exp()).square()).sum(1)  # type: ignore[no-any-return]

    def train() -> Iterator[Event]:
        for _ in range(12):
            s = env.states()
            with torch.no_grad():
                mean = model["actor"](s)
                action = mean + model["log_std"][0].exp() * env.noise()  # type: ignore[index]
                old = density(mean, action)
                reward = env.reward(s, action)
                gain = reward - model["critic"](s)[:, 0]
                gain = (gain - gain.mean()) / (gain.std() + 1e-8)
            for _ in range(10):
                for part in torch.randperm(128, generator=env.generator).split(64):  # type: ignore[no-untyped-call]
                    ratio = (density(model["actor"](s[part]), action[part]) - old[part]).exp()
                    surrogate = torch.minimum(ratio * gain[part], ratio.clamp(0.8, 1.2) * gain[part]).mean()
                    value = F.mse_loss(model["critic"](s[part])[:, 0], reward[part])
                    loss = 0.2 * value - surrogate - 0.001 * model["log_std"][0].sum()  # type: ignore[index]
                    optimizer.zero_grad()
                    loss.backward()
                    yield "read", [loss]
                    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                    optimizer.step()
                    yield "step", [optimizer]

    return Setup(model, train)


def falls(by: float) -> Proof:
    """The median of the last tenth of the losses lies by this much below that of the first tenth; for losses that change sign."""

    def proof(plain: Plain) -> str:
        tenth = max(1, len(plain.losses) // 10)
        a, b = median(plain.losses[:tenth]), median(plain.losses[-tenth:])
        assert all(math.isfinite(x) for x in plain.losses), "a loss is not finite"
        assert b < a - by, f"the loss goes from {a:.4g} to {b:.4g}"
        return f"the loss falls from {a:.4g} to {b:.4g}"

    return proof


class Heteroscedastic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(nn.SiLU, 1, 48, 8, 48)
        self.mean, self.log_var = nn.Linear(48, 1), nn.Linear(48, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.silu(self.body(x))
        return self.mean(h), self.log_var(h)


@healthy(
    CASES,
    "pl_ok_learned_variance",
    source="https://pytorch.org/docs/stable/generated/torch.nn.GaussianNLLLoss.html: a likelihood that passes zero on its way down",
    proof=falls(1.0),
)
def _(seed: int) -> Setup:
    data = Rows(seed, 8, 128, 0.0)
    data.b *= 0.4
    model = Heteroscedastic()

    def loss(i: int) -> Tensor:
        x, y = data()
        y = y + 0.1 * torch.exp(0.5 * x[:, :1]) * torch.randn(y.shape, generator=data.generator)
        mean, log_var = model(x)
        return F.gaussian_nll_loss(mean, y, log_var.exp(), eps=1e-4)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), updates=300)


@healthy(
    CASES,
    "pl_ok_maml_sines",
    source="https://arxiv.org/abs/1703.03400 (MAML): sines of other phases, one inner step that is differentiated through",
    proof=converges(0.6),
)
def _(seed: int) -> Setup:
    g = torch.Generator().manual_seed(8600 + seed)
    model = mlp(nn.Tanh, 2, 32, 1, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)

    def sine(phase: float) -> tuple[Tensor, Tensor]:
        x = torch.rand(16, 1, generator=g) * 6 - 3
        return x / 1.7, torch.sin(x + phase)

    def train() -> Iterator[Event]:
        for _ in range(130):
            losses = []
            for _ in range(4):
                phase = float(torch.rand(1, generator=g)) * math.pi
                x, y = sine(phase)
                weights = dict(model.named_parameters())
                inner = F.mse_loss(torch.func.functional_call(model, weights, (x,)), y)  # type: ignore[arg-type]
                grads = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
                fast = {name: w - 0.1 * d for (name, w), d in zip(weights.items(), grads, strict=True)}
                x, y = sine(phase)
                losses.append(F.mse_loss(torch.func.functional_call(model, fast, (x,)), y))
            loss = torch.stack(losses).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "pl_ok_lbfgs_oscillator",
    source="https://arxiv.org/abs/1711.10561 (PINNs) trained by L-BFGS: several closures a step, the gradient is that of the last",
    proof=converges(0.05),
)
def _(seed: int) -> Setup:
    """A damped oscillator: the equation at fixed points in time, and where it starts."""
    g = torch.Generator().manual_seed(8700 + seed)
    model = mlp(nn.Tanh, 2, 24, 1, 1)
    t = (torch.rand(48, 1, generator=g) * 2).requires_grad_()
    zero = torch.zeros(1, 1, requires_grad=True)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1.0, max_iter=4, history_size=20, line_search_fn="strong_wolfe")
    last: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        x = model(t)
        v = torch.autograd.grad(x.sum(), t, create_graph=True)[0]
        a = torch.autograd.grad(v.sum(), t, create_graph=True)[0]
        x0 = model(zero)
        v0 = torch.autograd.grad(x0.sum(), zero, create_graph=True)[0]
        loss = (a + 0.4 * v + 4 * x).square().mean() + 4 * (x0 - 1).square().sum() + v0.square().sum()
        loss.backward()
        last[:] = [loss]
        return loss  # type: ignore[no-any-return]

    def train() -> Iterator[Event]:
        for _ in range(60):
            optimizer.step(closure)  # type: ignore[no-untyped-call]
            yield "read", list(last)
            yield "step", [optimizer]

    return Setup(model, train)


def concordance(plain: Plain) -> float:
    """Share of pairs of patients whose order of death is that of the predicted risks."""
    told = notes(plain)
    assert isinstance(plain.setup.model, nn.Module)
    with torch.no_grad():
        risk = plain.setup.model(told["x"])[:, 0]
    sooner = told["time"][:, None] < told["time"][None]
    return float(((risk[:, None] > risk[None]) & sooner).sum() / sooner.sum())


@healthy(
    CASES,
    "pl_ok_cox_cyclic_rate",
    source="https://arxiv.org/abs/1506.01186 (cyclical learning rates); https://arxiv.org/abs/1606.00931 (DeepSurv): partial likelihood",
    proof=quality("concordance", concordance, 0.75),
)
def _(seed: int) -> Setup:
    """Half of the lives are censored; the likelihood falls only from log(n) by a fraction; the rate goes up and down fifty-fold."""
    data = Rows(seed, 10, 96, 0.0)
    model = nn.Sequential(nn.Linear(10, 32), nn.SELU(), nn.AlphaDropout(0.1), nn.Linear(32, 1, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CyclicLR(optimizer, 0.002, 0.1, step_size_up=20, cycle_momentum=False)
    x, y = data()
    told = {"x": x, "time": -y[:, 0]}

    def train() -> Iterator[Event]:
        model.train()
        for _ in range(200):
            x, y = data()
            time = torch.empty(96).exponential_(generator=data.generator) * torch.exp(-2 * y[:, 0])
            stop = torch.empty(96).exponential_(generator=data.generator)
            event, time = (time < stop).float(), torch.minimum(time, stop)
            order = time.argsort(descending=True)
            risk = model(x[order])[:, 0]
            loss = -((risk - torch.logcumsumexp(risk, 0)) * event[order]).sum() / event.sum()
            optimizer.zero_grad()
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]
            scheduler.step()
        model.eval()

    return Noted(model, train, told)


@healthy(
    CASES,
    "pl_ok_actor_through_frozen_critic",
    source="https://arxiv.org/abs/1510.09142 (stochastic value gradients): a policy trained through a model of the reward that stays as it is",
    proof=quality("mean reward", reach, -0.4),
)
def _(seed: int) -> Setup:
    """The critic is fitted beforehand and requires no gradients; what it says of far-off actions is wrong, so the actor's are bounded."""
    env = Reach(seed, 256)
    critic = mlp(nn.SiLU, 2, 48, 6, 1)
    before = torch.optim.Adam(critic.parameters(), lr=1e-2)
    for _ in range(250):
        s, a = env.states(), 1.5 * env.noise()
        before.zero_grad()
        F.smooth_l1_loss(critic(torch.cat([s, a], 1))[:, 0], env.reward(s, a) / 3).backward()  # type: ignore[no-untyped-call]
        before.step()
    before.zero_grad()
    model = nn.ModuleDict({"actor": mlp(nn.ELU, 2, 32, 4, 2), "critic": critic.requires_grad_(False)})

    def loss(i: int) -> Tensor:
        s = env.states()
        a = 2.5 * torch.tanh(model["actor"](s) / 2.5)
        return -model["critic"](torch.cat([s, a], 1)).mean()  # type: ignore[no-any-return]

    return fit(model, loss, torch.optim.Adam(model["actor"].parameters(), lr=3e-3), updates=150)


def policy_value(plain: Plain) -> float:
    """Mean reward of the learned ranking's first choice over that of a choice at random."""
    told = notes(plain)
    assert isinstance(plain.setup.model, nn.Module)
    with torch.no_grad():
        chosen = plain.setup.model(told["x"]).argmax(1, keepdim=True)
    return float(told["worth"].gather(1, chosen).mean() - told["worth"].mean())


@healthy(
    CASES,
    "pl_ok_off_policy_weights",
    source="https://arxiv.org/abs/1812.02353 (top-K off-policy correction): logged clicks, importance weights capped at 30",
    proof=quality("gain in clicks over chance", policy_value, 0.2),
)
def _(seed: int) -> Setup:
    """The logging policy prefers the wrong articles: weights are heavy-tailed, the loss is negative and jumps, most rows add nothing."""
    g = torch.Generator().manual_seed(8800 + seed)
    goods = torch.randn(8, 6, generator=g)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 6))
    x = torch.randn(500, 8, generator=g)
    told = {"x": x, "worth": torch.sigmoid(x @ goods)}

    def loss(i: int) -> Tensor:
        s = torch.randn(256, 8, generator=g)
        score = s @ goods
        logged = torch.softmax(-0.5 * score, 1)
        a = torch.multinomial(logged, 1, generator=g)
        clicked = (torch.rand(256, 1, generator=g) < torch.sigmoid(score.gather(1, a))).float()
        weight = (torch.softmax(model(s), 1).gather(1, a) / logged.gather(1, a)).clamp(max=30)
        return -(weight * clicked).mean()

    plain = fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), updates=200)
    return Noted(model, plain.train, told)


@healthy(
    CASES,
    "pl_ok_quantiles_accumulated",
    source="https://arxiv.org/abs/1711.11053 (multi-horizon quantile forecasts); four backward passes a step, the rate warms up from zero",
    proof=converges(0.5),
)
def _(seed: int) -> Setup:
    data = Demand(seed, batch=16)
    model = Gru(ahead=21)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, i / 15))
    levels = torch.tensor([0.1, 0.5, 0.9])

    def train() -> Iterator[Event]:
        for _ in range(90):
            optimizer.zero_grad()
            losses = []
            for _ in range(4):
                x, y = data()
                miss = y[..., None] - model(x).view(-1, 7, 3)
                loss = torch.maximum(levels * miss, (levels - 1) * miss).mean() / 4
                loss.backward()  # type: ignore[no-untyped-call]
                losses.append(loss)
            yield "read", losses
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            yield "step", [optimizer]
            scheduler.step()

    return Setup(model, train)


def each_task(plain: Plain) -> str:
    """Every task is learned: the mean of its last losses is below half that of its first."""
    said = []
    for task, losses in notes(plain)["losses"].items():
        few = max(2, len(losses) // 5)
        a, b = sum(losses[:few]) / few, sum(losses[-few:]) / few
        assert math.isfinite(b), f"task {task}: {b}"
        assert b < 0.5 * a, f"task {task}: {a:.3g} to {b:.3g}"
        said.append(f"task {task} from {a:.3g} to {b:.3g}")
    return ", ".join(said)


@healthy(
    CASES,
    "pl_ok_tasks_take_turns",
    source="https://arxiv.org/abs/1706.05098 (multi-task learning with a shared body): three tasks in turn, one of them every fifth update",
    proof=each_task,
)
def _(seed: int) -> Setup:
    """Two regressions and a classification; each has its own scale of the loss, and heads without a gradient in most updates."""
    tasks = [Rows(seed + 100 * k, 12, 64, 0.3) for k in range(3)]
    for rows in tasks:
        rows.a *= 1.5 / rows.a.norm()
        rows.b *= 0.3
    model = Tasks(12, (1, 1, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    told: dict[str, Any] = {"losses": {0: [], 1: [], 2: []}}

    def train() -> Iterator[Event]:
        for i in range(400):
            task = 2 if i % 5 == 4 else i % 2
            x, y = tasks[task]()
            out = model(x, task)
            if task == 0:
                loss = F.mse_loss(out, y)
            elif task == 1:
                loss = F.binary_cross_entropy_with_logits(out, (y > 0).float())
            else:
                loss = F.smooth_l1_loss(out, y)
            told["losses"][task].append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]

    return Noted(model, train, told)


class GatedFlow(nn.Module):
    """Six layers of a flow, x + gate * change; the gates start nearly shut."""

    def __init__(self, width: int = 16, steps: int = 6) -> None:
        super().__init__()
        self.start = nn.Linear(10, width)
        self.change = nn.ModuleList(nn.Sequential(nn.Linear(width, 32), nn.Tanh(), nn.Linear(32, width)) for _ in range(steps))
        self.gate = nn.ModuleList(nn.Linear(width, width) for _ in range(steps))
        for layer in self.gate:
            nn.init.constant_(layer.bias, -4.0)  # type: ignore[arg-type]
        self.sigmoids = nn.ModuleList(nn.Sigmoid() for _ in range(steps))
        self.end = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.start(x)
        for change, gate, sigmoid in zip(self.change, self.gate, self.sigmoids, strict=True):
            h = h + sigmoid(gate(h)) * change(h)
        out: Tensor = self.end(h)
        return out


@healthy(
    CASES,
    "pl_ok_flow_gates_shut",
    source="https://arxiv.org/abs/1505.00387 (highway networks): gates with a bias of -4, so that depth begins as the identity",
    proof=converges(0.2),
)
def _(seed: int) -> Setup:
    data = Rows(seed, 10, 64, 0.05)
    data.b *= 0.7
    model = GatedFlow()

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.mse_loss(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), updates=160)


@healthy(
    CASES,
    "pl_ok_td3_rare_actor",
    source="https://arxiv.org/abs/1802.09477 (TD3): two critics, noisy rewards, an averaged target, an actor that is updated every third time",
    proof=quality("mean reward", reach, -0.4),
)
def _(seed: int) -> Setup:
    """The critics get gradients from the actor's loss too, which are cleared unused; the actor has none in two updates of three."""
    env = Reach(seed, 128)
    model = {
        "actor": mlp(nn.ELU, 2, 32, 4, 2),
        "one": mlp(nn.SiLU, 2, 48, 6, 1),
        "two": mlp(nn.SiLU, 2, 48, 6, 1),
    }
    model["target"] = copy.deepcopy(model["actor"]).requires_grad_(False)
    critics = torch.optim.Adam([*model["one"].parameters(), *model["two"].parameters()], lr=5e-3)
    actor = torch.optim.Adam(model["actor"].parameters(), lr=5e-3)

    def train() -> Iterator[Event]:
        for i in range(240):
            s = env.states()
            with torch.no_grad():
                a = 2 * torch.tanh(model["target"](s) / 2) + 0.7 * env.noise()
                reward = env.reward(s, a) + 0.3 * torch.randn(128, generator=env.generator)
            sa = torch.cat([s, a], 1)
            loss = sum(F.smooth_l1_loss(model[k](sa)[:, 0], reward) for k in ("one", "two"))
            assert isinstance(loss, Tensor)
            critics.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            if i % 3 != 2:
                yield "read", [loss]
                critics.step()
                yield "step", [critics]
                continue
            critics.step()
            actor.zero_grad()
            aim = -model["one"](torch.cat([s, 2 * torch.tanh(model["actor"](s) / 2)], 1)).mean()
            aim.backward()
            yield "read", [loss, aim]
            actor.step()
            yield "step", [critics, actor]
            with torch.no_grad():
                for p, q in zip(model["target"].parameters(), model["actor"].parameters(), strict=True):
                    p.lerp_(q, 0.2)

    return Setup(model, train)


class StudentT(nn.Module):
    """Location, scale and degrees of freedom of a heavy-tailed target."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(nn.GELU, 2, 32, 8, 1)
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.log_df = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        t = torch.distributions.StudentT(self.log_df.exp() + 0.5, self.body(x), self.log_scale.exp())
        return -t.log_prob(y).mean()  # type: ignore[no-any-return, no-untyped-call]


def median_error(plain: Plain) -> float:
    """The negative median error on fresh rows without noise."""
    told = notes(plain)
    model: Any = plain.setup.model
    with torch.no_grad():
        return -float((model.body(told["x"]) - told["y"]).abs().median())


@healthy(
    CASES,
    "pl_ok_heavy_tails",
    source="https://pytorch.org/docs/stable/distributions.html#studentt returns with tails so heavy that they have no variance",
    proof=every(falls(0.3), quality("negative median error", median_error, -0.15)),
)
def _(seed: int) -> Setup:
    data = Rows(seed, 8, 128, 0.0)
    data.b *= 0.5
    model = StudentT()
    x, y = data()
    told = {"x": x, "y": y}

    def loss(i: int) -> Tensor:
        x, y = data()
        out: Tensor = model(x, y + 0.1 * torch.empty_like(y).cauchy_(generator=data.generator))
        return out

    plain = fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), updates=250)
    return Noted(model, plain.train, told)
