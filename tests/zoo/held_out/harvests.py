"""Decisions and science at small size: policies, Q-functions, bandits, simulations, graphs, physics-informed and meta-learned networks.

The sick builders take `well`: the same run without its fault, with which it was checked that nothing else is wrong with it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Case, Event, Setup, evens, fit, healthy, initialise, mlp, sick
from tests.zoo.plain import Plain
from tests.zoo.proofs import (
    converges,
    every,
    gradient_ratio,
    gradient_spikes,
    loss_grows,
    no_gradient,
    unchanged,
    update_ratio,
    zero_gradient,
)

CASES: list[Case] = []


class Draw:
    """Regression data: standard normal features and a smooth response of them, from a generator of their own."""

    def __init__(self, seed: int, features: int = 8, batch: int = 32) -> None:
        self.generator = torch.Generator().manual_seed(7000 + seed)
        self.a = torch.randn(features, generator=self.generator) / math.sqrt(features)
        self.b = torch.randn(features, generator=self.generator) / math.sqrt(features)
        self.features, self.batch = features, batch

    def x(self) -> Tensor:
        return torch.randn(self.batch, self.features, generator=self.generator)

    def noise(self) -> Tensor:
        return torch.randn(self.batch, generator=self.generator)

    def level(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.a) + 0.5 * (x @ self.b)

    def __call__(self) -> tuple[Tensor, Tensor]:
        x = self.x()
        return x, self.level(x) + 0.1 * self.noise()


class Bandit:
    """A contextual bandit: every arm pays a linear function of the context, and some noise."""

    def __init__(self, seed: int, features: int = 6, arms: int = 4, batch: int = 64) -> None:
        self.generator = torch.Generator().manual_seed(8000 + seed)
        self.arms = torch.randn(features, arms, generator=self.generator) / math.sqrt(features)
        self.features, self.batch = features, batch

    def context(self) -> Tensor:
        return torch.randn(self.batch, self.features, generator=self.generator)

    def pull(self, x: Tensor, arm: Tensor) -> Tensor:
        paid = (x @ self.arms).gather(1, arm[:, None])[:, 0]
        return paid + 0.1 * torch.randn(len(x), generator=self.generator)


class Corridor:
    """A corridor of `cells`: left or right, 1 at the right end, which ends the episode; states are one-hot. Transitions at random."""

    def __init__(self, seed: int, cells: int = 8, batch: int = 64) -> None:
        self.generator = torch.Generator().manual_seed(9000 + seed)
        self.cells, self.batch = cells, batch

    def __call__(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        s = torch.randint(self.cells - 1, (self.batch,), generator=self.generator)
        a = torch.randint(2, (self.batch,), generator=self.generator)
        t = (s + 2 * a - 1).clamp(0, self.cells - 1)
        done = (t == self.cells - 1).float()
        return F.one_hot(s, self.cells).float(), a, done, F.one_hot(t, self.cells).float(), done


class ActorCritic(nn.Module):
    def __init__(self, features: int = 6, arms: int = 4, width: int = 32) -> None:
        super().__init__()
        self.actor = mlp(nn.Tanh, 1, width, features, arms)
        self.critic = mlp(nn.Tanh, 1, width, features, 1)


def advantage(model: ActorCritic, bandit: Bandit) -> Callable[[int], Tensor]:
    """The loss of an actor and its critic on a fresh batch of contexts."""

    def loss(i: int) -> Tensor:
        x = bandit.context()
        policy = torch.distributions.Categorical(logits=model.actor(x))
        arm = torch.multinomial(policy.probs, 1, generator=bandit.generator)[:, 0]
        paid, value = bandit.pull(x, arm), model.critic(x)[:, 0]
        gain = (paid - value).detach()
        total: Tensor = F.mse_loss(value, paid) - (gain * policy.log_prob(arm)).mean() - 0.01 * policy.entropy().mean()
        return total

    return loss


# ------------------------------------------------------------------------------------------------------------------ sick


@sick(
    CASES,
    "hv_critic_left_out_of_adam",
    ("not_in_optimizer",),
    ("critic",),
    source="https://arxiv.org/abs/1602.01783 advantage actor-critic; only actor.parameters() are given to the optimizer",
    proof=lambda p: _moves_only(p, "actor", "critic"),
)
def _(seed: int, well: bool = False) -> Setup:
    model, bandit = ActorCritic(), Bandit(seed)
    given = model.parameters() if well else model.actor.parameters()
    return fit(model, advantage(model, bandit), torch.optim.Adam(given, 1e-2), 60, before=lambda i: model.zero_grad())


def _moves_only(p: Plain, mover: str, still: str) -> str:
    for name, steps in p.steps.items():
        if name.startswith(mover):
            assert all(s > 0 for s in steps[:15]), f"{name} stays"
        if name.startswith(still):
            assert all(s == 0 for s in steps[:15]), f"{name} moves"
            assert all(g > 0 for g in p.grads[name][:15]), f"{name} has no gradient"
    return f"{still} has gradients and never moves, {mover} moves at every step"


@sick(
    CASES,
    "hv_dqn_forgets_zero_grad",
    ("gradients_not_zeroed",),
    source="https://discuss.pytorch.org/t/why-do-we-need-to-set-the-gradients-manually-to-zero-in-pytorch/4903 they pile up",
    proof=lambda p: _piles_up(p),
)
def _(seed: int, well: bool = False) -> Setup:
    corridor = Corridor(seed)
    online, target = mlp(nn.ReLU, 1, 32, 8, 2), mlp(nn.ReLU, 1, 32, 8, 2)
    target.load_state_dict(online.state_dict())
    target.requires_grad_(False)
    optimizer = torch.optim.Adam(online.parameters(), 3e-3)

    def train() -> Iterator[Event]:
        for i in range(60):
            s, a, r, t, done = corridor()
            goal = r + 0.9 * (1 - done) * target(t).max(1).values
            loss = F.smooth_l1_loss(online(s).gather(1, a[:, None])[:, 0], goal)
            if well:
                optimizer.zero_grad()
            else:
                SEEN.setdefault(online, []).append(_copy(online))
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]
            if i % 10 == 9:
                target.load_state_dict(online.state_dict())

    return Setup({"online": online, "target": target}, train)


SEEN: WeakKeyDictionary[nn.Module, list[list[float]]] = WeakKeyDictionary()
"""Norms of the gradients that lay in a model when the backward pass of an update began: what a proof looks at."""


def _copy(model: nn.Module) -> list[float]:
    return [0.0 if q.grad is None else float(q.grad.norm()) for q in model.parameters()]


def _piles_up(p: Plain) -> str:
    models = [p.setup.model] if isinstance(p.setup.model, nn.Module) else list(p.setup.model.values())
    before = SEEN[models[0]]
    assert all(n > 0 for norms in before[1:] for n in norms), "the gradients were cleared"
    return "the gradients of the step before still lie there when a backward pass begins"


@sick(
    CASES,
    "hv_pinn_of_ten_sigmoids",
    ("vanishing_gradient",),
    evens(0, 16),
    source="https://arxiv.org/abs/2001.04536 gradient pathologies in physics-informed networks; here ten sigmoid layers",
    proof=every(
        gradient_ratio("0.weight", "20.weight", 1e-5, 0, 15),
        gradient_ratio("8.weight", "20.weight", 1e-3, 0, 15),
    ),
)
def _(seed: int, well: bool = False) -> Setup:
    net = mlp(nn.Tanh if well else nn.Sigmoid, 4 if well else 10, 24, 1, 1)
    g = torch.Generator().manual_seed(seed)

    def loss(i: int) -> Tensor:  # u'' = -pi^2 sin(pi x), u(-1) = u(1) = 0
        x = (2 * torch.rand(64, 1, generator=g) - 1).requires_grad_()
        u = net(x)
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (ddu,) = torch.autograd.grad(du.sum(), x, create_graph=True)
        edge = net(torch.tensor([[-1.0], [1.0]]))
        total: Tensor = (ddu + math.pi**2 * torch.sin(math.pi * x)).square().mean() / 50 + edge.square().mean()
        return total

    return fit(net, loss, torch.optim.Adam(net.parameters(), 3e-3), 60 if not well else 300)


class Clone(nn.Module):
    """A cloned policy."""

    def __init__(self, softmax: bool) -> None:
        super().__init__()
        self.body = mlp(nn.ReLU, 2, 48, 6, 5)
        self.probabilities = nn.Softmax(-1) if softmax else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.probabilities(self.body(x))
        return out


@sick(
    CASES,
    "hv_clone_of_probabilities",
    ("double_softmax",),
    ("probabilities",),
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html wants logits; a cloned policy gives probabilities",
    proof=lambda p: _sums_to_one(p),
)
def _(seed: int, well: bool = False) -> Setup:
    model, expert = Clone(not well), Bandit(seed, 6, 5)

    def loss(i: int) -> Tensor:
        x = expert.context()
        return F.cross_entropy(model(x), (x @ expert.arms).argmax(1))

    return fit(model, loss, torch.optim.Adam(model.parameters(), 3e-3), 60)


def _sums_to_one(p: Plain) -> str:
    out = p.outputs["probabilities"]
    assert all(o is not None and o.low >= 0 and o.high <= 1 for o in out), "no probabilities"
    model = p.setup.model
    assert isinstance(model, nn.Module)
    total = model(torch.randn(64, 6)).sum(-1)
    assert torch.allclose(total, torch.ones(64), atol=1e-5)
    assert min(p.losses) > 0.9, "below what cross-entropy of probabilities of 5 classes can reach"
    return f"cross-entropy gets probabilities that add up to 1, and its loss can't go below 0.905 (it is {p.losses[-1]:.3g})"


@sick(
    CASES,
    "hv_quantile_raw_columns",
    ("unnormalized_input",),
    ("",),
    source="https://scikit-learn.org/stable/modules/preprocessing.html columns of age, platelets and income as they come",
    proof=lambda p: _raw(p),
    also=(
        "poor_init",
        "exploding_gradient",
        "loss_diverging",
        "update_ratio_too_large",
        "loss_plateau",
        "loss_spike",
        "dead_units",
        "zero_gradient",
    ),
)
def _(seed: int, well: bool = False) -> Setup:
    model, draw = Raw(), Draw(seed, 6, 64)
    scale = torch.tensor([15.0, 9e4, 2.0, 3e4, 40.0, 800.0])
    shift = torch.tensor([60.0, 2.5e5, 7.0, 5e4, 120.0, 2000.0])

    def loss(i: int) -> Tensor:
        x, y = draw()
        off = y - model(x if well else shift + scale * x)[:, 0]
        return torch.maximum(0.7 * off, -0.3 * off).mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), 1e-3), 60 if not well else 200)


class Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(nn.ReLU, 2, 32, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = max(getattr(self, "seen", 0.0), float(x.abs().max()))
        out: Tensor = self.net(x)
        return out


def _raw(p: Plain) -> str:
    model = p.setup.model
    assert isinstance(model, Raw)
    assert model.seen > 1e5, "the inputs are normal"
    first = p.outputs["net.0"][0]
    assert first is not None
    assert first.rms > 1e4
    return f"inputs up to {model.seen:.3g}, and the first layer gives {first.rms:.3g}"


class Graph(nn.Module):
    """Message passing on a fixed random graph in which every node hears `near` others: h <- tanh(A h + B mean of neighbours)."""

    def __init__(self, blocks: int, sums: bool, nodes: int = 24, near: int = 16, width: int = 16, inputs: int = 3) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(5)
        near_to = torch.stack([torch.randperm(nodes, generator=g)[:near] for _ in range(nodes)])
        self.register_buffer("mean", torch.zeros(nodes, nodes).scatter(1, near_to, 1.0 / near))
        self.sums, self.near = sums, near
        self.embed = nn.Linear(inputs, width)
        self.own = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.heard = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(blocks))
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.embed(x))
        for own, heard in zip(self.own, self.heard, strict=True):
            m = Mean.apply(self.mean, h, self.near if self.sums else 1)
            h = h + 0.5 * torch.tanh(own(h) + heard(m))
        out: Tensor = self.head(h)[..., 0]
        return out


class Mean(torch.autograd.Function):
    """The mean over neighbours; its backward is `times` too large (the division forgotten) unless that is 1."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, h: Tensor, times: int) -> Tensor:
        ctx.save_for_backward(mean)
        ctx.times = times
        return mean @ h

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        (mean,) = ctx.saved_tensors
        return None, ctx.times * (mean.t() @ grad), None


@sick(
    CASES,
    "hv_graph_mean_backward_forgets_degree",
    ("exploding_gradient",),
    ("embed", "own", "heard"),
    source="https://arxiv.org/abs/1704.01212 message passing; the hand-written backward of the mean doesn't divide by the degree",
    proof=every(
        gradient_ratio("own.9.weight", "own.0.weight", 1e-3, 0, 15),
        gradient_ratio("own.9.weight", "own.5.weight", 0.1, 0, 15),
        gradient_ratio("own.5.weight", "own.0.weight", 0.1, 0, 15),
    ),
)
def _(seed: int, well: bool = False) -> Setup:
    model = Graph(10, not well)
    draw = Draw(seed, 3, 8 * 24)

    def loss(i: int) -> Tensor:
        x = draw.x().view(8, 24, 3)
        return F.mse_loss(model(x), draw.level(x))

    return fit(model, loss, torch.optim.Adam(model.parameters(), 2e-3), 50)


class Beam(nn.Module):
    """A dynamics model of two residual blocks with RMSNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(8, 32)
        self.norm1, self.norm2 = nn.RMSNorm(32), nn.RMSNorm(32)
        self.mix1, self.mix2 = nn.Linear(32, 32), nn.Linear(32, 32)
        self.leave = nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        h = h + F.silu(self.mix1(self.norm1(h)))
        h = h + F.silu(self.mix2(self.norm2(h)))
        out: Tensor = self.leave(h)[:, 0]
        return out


@sick(
    CASES,
    "hv_dynamics_norms_in_bfloat16",
    ("frozen_weights",),
    ("norm1", "norm2"),
    source="https://arxiv.org/abs/2010.06192 bfloat16 weights without a float32 copy lose updates: 1 - 0.001 rounds to 1",
    proof=every(unchanged("norm1.weight", "norm2.weight", first=1, last=20), lambda p: _others_move(p)),
)
def _(seed: int, well: bool = False) -> Setup:
    dtype = torch.float32 if well else torch.bfloat16
    model, draw = Beam().to(dtype), Draw(seed, 8, 64)

    def loss(i: int) -> Tensor:
        x, y = draw()
        return F.mse_loss(model(x.to(dtype)).float(), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 1e-3), 80)


def _others_move(p: Plain) -> str:
    assert all(min(steps) > 0 for name, steps in p.steps.items() if "norm" not in name and "weight" in name), "others stay too"
    return "all other matrices move at every step"


@sick(
    CASES,
    "hv_quantiles_lr_and_decay_exchanged",
    ("update_ratio_too_small",),
    source="https://docs.pytorch.org/docs/stable/generated/torch.optim.Adam.html lr gets 1e-7, which was meant for weight_decay",
    proof=update_ratio(below=1e-5, last=15),
    also=("loss_plateau",),
)
def _(seed: int, well: bool = False) -> Setup:
    model, draw = mlp(nn.GELU, 2, 32, 8, 3), Draw(seed, 8, 64)
    levels = torch.tensor([0.1, 0.5, 0.9])
    lr, decay = (3e-3, 1e-7) if well else (1e-7, 3e-3)

    def loss(i: int) -> Tensor:
        x, y = draw()
        off = y[:, None] - model(x)
        return torch.maximum(levels * off, (levels - 1) * off).mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr, weight_decay=decay), 120)


@sick(
    CASES,
    "hv_lbfgs_closure_without_step",
    ("never_stepped",),
    source="https://docs.pytorch.org/docs/stable/optim.html#optimizer-step-closure the closure is called, step(closure) is not",
    proof=lambda p: _stands(p),
    also=("loss_plateau",),
)
def _(seed: int, well: bool = False) -> Setup:
    model, draw = mlp(nn.Tanh, 2, 24, 8, 1), Draw(seed, 8, 256)
    x, y = draw()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1, max_iter=4, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x)[:, 0], y)
        loss.backward()
        return loss

    def train() -> Iterator[Event]:
        for _ in range(40):
            if well:
                loss = torch.as_tensor(optimizer.step(closure))
                yield "read", [loss]
                yield "step", [optimizer]
            else:
                yield "read", [closure()]

    return Setup(model, train)


def _stands(p: Plain) -> str:
    assert all(len(set(norms)) == 1 for norms in p.weights.values()), "a weight moves"
    assert all(n > 0 for norms in p.grads.values() for n in norms)
    assert len(set(p.losses)) == 1
    return f"gradients at every update, but weights and loss ({p.losses[0]:.4g}) stay as they are"


@sick(
    CASES,
    "hv_event_prior_bias_everywhere",
    ("dead_units",),
    ("1", "3"),
    source="https://arxiv.org/abs/1708.02002 sec. 3.3, the bias -log((1 - p)/p) is meant for the head alone",
    proof=lambda p: _dead(p, ("1", "3"), 0.99),
    also=("zero_gradient", "vanishing_gradient", "poor_init", "loss_plateau", "update_ratio_too_small"),
)
def _(seed: int, well: bool = False) -> Setup:
    model, draw = mlp(nn.ReLU, 2, 32, 8, 1), Draw(seed, 8, 128)
    for name, q in model.named_parameters():
        if name.endswith("bias") and (not well or name == "4.bias"):
            nn.init.constant_(q, -math.log((1 - 0.01) / 0.01))

    def loss(i: int) -> Tensor:
        x, y = draw()
        return F.binary_cross_entropy_with_logits(model(x)[:, 0], (y > 0.7).float())

    return fit(model, loss, torch.optim.Adam(model.parameters(), 3e-3), 60 if not well else 150)


def _dead(p: Plain, names: tuple[str, ...], above: float) -> str:
    for name in names:
        fired = torch.stack([o.fired for o in p.outputs[name][:15] if o is not None]).any(0)
        dead = 1 - float(fired.double().mean())
        assert dead > above, f"{dead:.3g} of {name} are dead"
    return f"more than {above} of the units of {' and '.join(names)} never fire"


@sick(
    CASES,
    "hv_clone_tanh_of_unit_normals",
    ("saturated_activation", "poor_init"),
    ("0", "1", "2", "3"),
    source="https://proceedings.mlr.press/v9/glorot10a.html saturated tanh; nn.init.normal_ with its default std of 1 on a cloned policy",
    proof=lambda p: _flat(p, ("1", "3")),
)
def _(seed: int, well: bool = False) -> Setup:
    model, expert = mlp(nn.Tanh, 2, 96, 16, 4), Bandit(seed, 16, 4)
    if not well:
        for k in (0, 2):
            initialise(model[k], nn.init.normal_)

    def loss(i: int) -> Tensor:
        x = expert.context()
        return F.cross_entropy(model(x), (x @ expert.arms).argmax(1))

    return fit(model, loss, torch.optim.SGD(model.parameters(), 0.02, momentum=0.9), 60)


def _flat(p: Plain, names: tuple[str, ...]) -> str:
    for name in names:
        rms = median(o.rms for o in p.outputs[name][:15] if o is not None)
        assert rms > 0.87, f"{name} has the rms {rms:.3g}"
    return f"the outputs of {' and '.join(names)} are nearly all -1 or 1"


class Tasks(nn.Module):
    """Two tasks on one encoder."""

    def __init__(self, detached: bool) -> None:
        super().__init__()
        self.encoder = mlp(nn.ReLU, 1, 32, 8, 32)
        self.count, self.level = nn.Linear(32, 1), nn.Linear(32, 1)
        self.detached = detached

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(self.encoder(x))
        h = h.detach() if self.detached else h
        return self.count(h)[:, 0], self.level(h)[:, 0]


@sick(
    CASES,
    "hv_tasks_on_detached_encoder",
    ("missing_gradient",),
    ("encoder",),
    source="https://discuss.pytorch.org/t/clone-and-detach-in-v0-4-0/16861 detach() where clone() was meant, before both heads",
    proof=no_gradient("encoder.0.weight", "encoder.0.bias", "encoder.2.weight", "encoder.2.bias"),
)
def _(seed: int, well: bool = False) -> Setup:
    model, draw = Tasks(not well), Draw(seed, 8, 64)

    def loss(i: int) -> Tensor:
        x, y = draw()
        count, level = model(x)
        return F.poisson_nll_loss(count, torch.poisson((y / 2).exp(), generator=draw.generator)) + F.mse_loss(level, y)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), 3e-3), 80)


class Gaussian(nn.Module):
    """Mean and standard deviation, whose logarithm is clamped to [-5, 0.5]."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.body = mlp(nn.Tanh, 1, 32, 8, 32)
        self.mean, self.log_std = nn.Linear(32, 1), nn.Linear(32, 1)
        nn.init.constant_(self.log_std.bias, start)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.body(x))
        return self.mean(h)[:, 0], self.log_std(h)[:, 0].clamp(-5, 0.5)


@sick(
    CASES,
    "hv_log_std_starts_beyond_its_clamp",
    ("zero_gradient",),
    ("log_std",),
    source="https://arxiv.org/abs/1801.01290 policies with a clamped log std; its bias starts at 2, where the clamp passes nothing",
    proof=every(zero_gradient("log_std.weight", "log_std.bias"), lambda p: _positive(p, "mean.weight", "body.0.weight")),
)
def _(seed: int, well: bool = False) -> Setup:
    model, draw = Gaussian(0.0 if well else 2.0), Draw(seed, 8, 64)

    def loss(i: int) -> Tensor:
        x, y = draw()
        mean, log_std = model(x)
        total: Tensor = (log_std + 0.5 * ((y - mean) / log_std.exp()).square()).mean()
        return total

    return fit(model, loss, torch.optim.Adam(model.parameters(), 3e-3), 80)


def _positive(p: Plain, *names: str) -> str:
    assert all(n > 0 for name in names for n in p.grads[name]), "no gradient"
    return f"{' and '.join(names)} have gradients"


@sick(
    CASES,
    "hv_linear_operator_lr_too_high",
    ("loss_diverging", "exploding_gradient", "update_ratio_too_large"),
    source="https://arxiv.org/abs/1206.5533 a learning rate above its largest stable value; a linear operator found by plain SGD",
    proof=every(loss_grows(1e3, last=10), lambda p: _grows(p, 100, 10), update_ratio(above=0.5, first=4, last=15)),
)
def _(seed: int, well: bool = False) -> Setup:
    model = nn.Conv1d(1, 4, 9, padding=4, padding_mode="circular")
    g = torch.Generator().manual_seed(seed)
    shifts = (-2, -1, 1, 3)

    def loss(i: int) -> Tensor:  # forces on a ring, and the displacements that they cause
        f = torch.fft.irfft(torch.fft.rfft(torch.randn(16, 1, 32, generator=g)) * (torch.arange(17) < 8), n=32)
        f = f / f.std()
        return F.mse_loss(model(f), torch.cat([f.roll(k, -1) for k in shifts], 1))

    return fit(model, loss, torch.optim.SGD(model.parameters(), 0.3 if well else 3.2), 30 if not well else 150)


def _grows(p: Plain, by: float, to: int) -> str:
    totals = [math.sqrt(sum(g[i] ** 2 for g in p.grads.values())) for i in range(to)]
    growth = max(t if math.isfinite(t) else math.inf for t in totals) / totals[0]
    assert growth > by, f"the gradients grow by {growth:.3g}"
    return f"all gradients together grow to {growth:.3g} times what they were"


@sick(
    CASES,
    "hv_reward_model_adam_of_one",
    ("update_ratio_too_large",),
    source="https://arxiv.org/abs/1412.6980 Adam moves every weight by about its learning rate; 1e-0 typed for 1e-3",
    proof=every(update_ratio(above=2.0, last=1), update_ratio(above=0.2, last=6), loss_grows(100, last=10)),
    also=("loss_diverging", "exploding_gradient", "loss_spike", "gradient_spike"),
)
def _(seed: int, well: bool = False) -> Setup:
    model, bandit = mlp(nn.GELU, 2, 32, 6, 4), Bandit(seed)

    def loss(i: int) -> Tensor:
        x = bandit.context()
        arm = torch.randint(4, (64,), generator=bandit.generator)
        return F.mse_loss(model(x).gather(1, arm[:, None])[:, 0], bandit.pull(x, arm))

    return fit(model, loss, torch.optim.Adam(model.parameters(), 3e-3 if well else 1.0), 40 if not well else 100)


class Bodies(nn.Module):
    """Particles that push each other by a learned function of their distance; two steps of a simulation."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.force = mlp(nn.Tanh, 1, 24, 1, 1)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            apart = x[:, :, None] - x[:, None]
            r = torch.sqrt(apart.square().sum(-1, keepdim=True) + self.eps)
            x = x + 0.1 * (self.force(r) * apart).sum(2)
        return x


@sick(
    CASES,
    "hv_bodies_distance_to_themselves",
    ("non_finite_gradient",),
    ("force",),
    source="https://github.com/pytorch/pytorch/issues/37154 the gradient of a distance of zero is NaN: the diagonal of all pairs",
    proof=lambda p: _nan_gradient_first(p),
    also=("non_finite_weight", "non_finite_loss", "non_finite_activation"),
)
def _(seed: int, well: bool = False) -> Setup:
    model = Bodies(1e-6 if well else 0.0)
    g = torch.Generator().manual_seed(seed)

    def loss(i: int) -> Tensor:
        x = torch.randn(16, 5, 2, generator=g)
        y = x
        for _ in range(2):
            apart = y[:, :, None] - y[:, None]
            y = y + 0.1 * ((1.5 / (1 + apart.square().sum(-1, keepdim=True))) * apart).sum(2)
        return F.mse_loss(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 3e-3), 25 if not well else 100)


def _nan_gradient_first(p: Plain) -> str:
    assert math.isfinite(p.losses[0])
    assert not any(o is not None and o.nonfinite for seen in p.outputs.values() for o in seen[:1])
    assert all(counts[0] > 0 for counts in p.nonfinite.values())
    return f"at update 0 the loss is {p.losses[0]:.4g} and every output finite, yet every parameter has NaN in its gradient"


@sick(
    CASES,
    "hv_weibull_time_of_zero",
    ("non_finite_loss",),
    onset=20,
    source="https://github.com/CamDavidsonPilon/lifelines/issues/1400 no durations of zero: log(0) in the likelihood of an event",
    proof=lambda p: _loss_goes_first(p, 20),
    also=("non_finite_gradient", "non_finite_weight", "non_finite_activation"),
)
def _(seed: int, well: bool = False) -> Setup:
    model, draw = mlp(nn.ReLU, 1, 32, 8, 2), Draw(seed, 8, 64)

    def loss(i: int) -> Tensor:
        x = draw.x()
        time = torch.exp(draw.level(x)) * (-torch.log(torch.rand(64, generator=draw.generator))) ** (1 / 1.5)
        event = (torch.rand(64, generator=draw.generator) < 0.8).float()
        if i == 20 and not well:
            time[3], event[3] = 0.0, 1.0
        log_scale, shape = model(x)[:, 0], F.softplus(model(x)[:, 1] + 1)
        told = shape.log() + (shape - 1) * time.log() - shape * log_scale
        total: Tensor = ((time / log_scale.exp()) ** shape - event * told).mean()
        return total

    return fit(model, loss, torch.optim.Adam(model.parameters(), 3e-3), 50 if not well else 150)


def _loss_goes_first(p: Plain, update: int) -> str:
    assert all(math.isfinite(x) for x in p.losses[:update])
    assert not math.isfinite(p.losses[update])
    assert not any(o is not None and o.nonfinite for seen in p.outputs.values() for o in seen[: update + 1])
    return f"at update {update} the loss is {p.losses[update]}, though every output is finite"


@sick(
    CASES,
    "hv_replay_holds_a_broken_observation",
    ("non_finite_input",),
    ("",),
    onset=12,
    source="https://github.com/DLR-RM/stable-baselines3/blob/master/docs/guide/checking_nan.rst observations that are NaN",
    proof=lambda p: _input_goes_first(p, 12),
    also=("non_finite_activation", "non_finite_loss", "non_finite_gradient", "non_finite_weight"),
)
def _(seed: int, well: bool = False) -> Setup:
    model, draw = mlp(nn.SiLU, 2, 32, 8, 1), Draw(seed, 8, 64)
    seen: list[bool] = []
    BROKEN[model] = seen

    def loss(i: int) -> Tensor:
        x, y = draw()
        if i == 12 and not well:
            x[17, 2] = math.nan  # a sensor that gave nothing
        seen.append(not bool(torch.isfinite(x).all()))
        return F.smooth_l1_loss(model(x)[:, 0], y)

    return fit(model, loss, torch.optim.RMSprop(model.parameters(), 1e-3), 40 if not well else 100)


BROKEN: WeakKeyDictionary[nn.Module, list[bool]] = WeakKeyDictionary()
"""Of every update, was the input not finite."""


def _input_goes_first(p: Plain, update: int) -> str:
    assert isinstance(p.setup.model, nn.Module)
    assert BROKEN[p.setup.model].index(True) == update
    bad = [i for i, o in enumerate(p.outputs["0"]) if o is not None and o.nonfinite]
    assert bad[0] == update, f"the first layer goes bad at {bad[0]}"
    return f"the input of update {update} holds a NaN, and everything was finite before"


class Log(nn.Module):
    """Logarithm of counts."""

    def __init__(self, plus: float) -> None:
        super().__init__()
        self.plus = plus

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.log(x + self.plus)
        return out


class Counts(nn.Module):
    def __init__(self, plus: float) -> None:
        super().__init__()
        self.log, self.net = Log(plus), mlp(nn.Tanh, 1, 32, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(self.log(x))[:, 0]
        return out


@sick(
    CASES,
    "hv_counts_log_for_log1p",
    ("non_finite_activation",),
    ("log",),
    source="https://docs.pytorch.org/docs/stable/generated/torch.log1p.html log of counts that can be 0",
    proof=lambda p: _log_goes_first(p),
    also=("non_finite_loss", "non_finite_gradient", "non_finite_weight"),
)
def _(seed: int, well: bool = False) -> Setup:
    model = Counts(1.0 if well else 0.0)
    g = torch.Generator().manual_seed(seed)

    def loss(i: int) -> Tensor:
        x = torch.poisson(torch.full((64, 6), 2.0), generator=g)
        y = torch.poisson(0.5 + x[:, 0] + 0.5 * x[:, 1], generator=g)
        return F.poisson_nll_loss(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 1e-2), 25 if not well else 150)


def _log_goes_first(p: Plain) -> str:
    first = p.outputs["log"][0]
    assert first is not None
    assert first.nonfinite > 0
    assert not math.isfinite(p.losses[0])
    return f"{first.nonfinite} elements of the first output of log are not finite, and the loss is {p.losses[0]}"


@sick(
    CASES,
    "hv_importance_of_a_stale_batch",
    ("gradient_spike",),
    onset=30,
    source="https://arxiv.org/abs/1707.06347 the ratio of policies, not clipped; one batch comes with log-probabilities of an old policy",
    proof=gradient_spikes(30, 50),
    also=("loss_spike",),
)
def _(seed: int, well: bool = False) -> Setup:
    policy, bandit = mlp(nn.Tanh, 1, 32, 6, 4), Bandit(seed, batch=128)

    def loss(i: int) -> Tensor:
        x = bandit.context()
        log_p = F.log_softmax(policy(x), -1)
        arm = torch.multinomial(log_p.exp().detach(), 1, generator=bandit.generator)
        paid = bandit.pull(x, arm[:, 0])
        now = log_p.gather(1, arm)[:, 0]
        old = now.detach() - (6.0 if i == 30 and not well else 0.0)
        gain = (paid - paid.mean()) / paid.std()
        return -((now - old).exp() * gain).mean() - 0.01 * -(log_p.exp() * log_p).sum(-1).mean()

    optimizer = torch.optim.Adam(policy.parameters(), 3e-3)
    return fit(policy, loss, optimizer, 60, between=lambda i: _clip(policy))


def _clip(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)


@sick(
    CASES,
    "hv_yield_in_grams_for_once",
    ("loss_spike", "gradient_spike"),
    onset=35,
    source="https://25621.github.io/ai-learning-guides/guides/llm/projects/loss-spike-recovery-drill/ one batch has other units",
    proof=every(gradient_spikes(35, 50), lambda p: _loss_spikes(p, 35, 100)),
)
def _(seed: int, well: bool = False) -> Setup:
    model, draw = mlp(nn.GELU, 2, 32, 8, 1), Draw(seed, 8, 64)

    def loss(i: int) -> Tensor:
        x, y = draw()
        return F.mse_loss(model(x)[:, 0], y * (300 if i == 35 and not well else 1))

    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    return fit(model, loss, optimizer, 70, between=lambda i: _clip(model))


def _loss_spikes(p: Plain, update: int, by: float) -> str:
    ratio = p.losses[update] / median(p.losses[:update])
    assert ratio > by, f"the loss is {ratio:.3g} times its median"
    assert p.losses[-1] < 2 * p.losses[update - 1] + 0.1, f"the loss does not come back: {p.losses[-1]:.3g}"
    return f"the loss is {ratio:.3g} times its median for one update"


@sick(
    CASES,
    "hv_demonstrations_shuffled_alone",
    ("loss_plateau",),
    source="https://arxiv.org/abs/1611.03530 random labels; here the actions are shuffled and the observations are not",
    proof=lambda p: _stuck(p),
)
def _(seed: int, well: bool = False) -> Setup:
    model, expert = mlp(nn.ReLU, 2, 48, 8, 5), Bandit(seed, 8, 5)

    def loss(i: int) -> Tensor:
        x = expert.context()
        action = (x @ expert.arms).argmax(1)
        return F.cross_entropy(model(x), action if well else action[torch.randperm(64, generator=expert.generator)])

    return fit(model, loss, torch.optim.Adam(model.parameters(), 2e-3), 180)


def _stuck(p: Plain) -> str:
    a, b, c = median(p.losses[10:30]), median(p.losses[70:100]), median(p.losses[150:])
    assert min(b, c) > 0.95 * a, f"the loss falls from {a:.4g} to {b:.4g} and {c:.4g}"
    return f"the loss stays: {a:.4g}, {b:.4g}, {c:.4g}"


class Ensemble(nn.Module):
    """Three models of the dynamics, whose heads start at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.members = nn.ModuleList(mlp(nn.Tanh, 1, 24, 8, 2) for _ in range(3))
        for member in self.members:
            initialise(member[2], nn.init.zeros_)  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([member(x) for member in self.members])


@sick(
    CASES,
    "hv_scaler_on_disagreement_of_zero",
    ("loss_scale_collapse", "non_finite_gradient"),
    source="https://github.com/Junjue-Wang/FactSeg/issues/6 the scale falls and falls: NaN in every backward (sqrt of a variance of 0)",
    proof=lambda p: _collapses(p),
    also=("never_stepped", "frozen_weights", "loss_plateau"),
)
def _(seed: int, well: bool = False) -> Setup:
    model, draw = Ensemble(), Draw(seed, 8, 64)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    scaler = torch.amp.GradScaler("cpu")

    def train() -> Iterator[Event]:
        for _ in range(40 if not well else 100):
            x, y = draw()
            optimizer.zero_grad()
            out = model(x)
            apart = torch.sqrt(out.var(0) + (1e-6 if well else 0.0)).mean()
            loss = F.mse_loss(out, torch.stack([y, x[:, 0]], -1).expand(3, -1, -1)) + 0.01 * apart
            scaler.scale(loss).backward()
            yield "read", [loss]
            scaler.step(optimizer)
            scaler.update()
            SCALES.setdefault(model, []).append(scaler.get_scale())
            yield "step", [optimizer]

    return Setup(model, train)


SCALES: WeakKeyDictionary[nn.Module, list[float]] = WeakKeyDictionary()
"""The scales after every update."""


def _collapses(p: Plain) -> str:
    assert isinstance(p.setup.model, nn.Module)
    scales = SCALES[p.setup.model]
    assert scales[14] < 4, f"the scales are {scales}"
    assert scales[20] < 1, f"the scales are {scales}"
    assert all(math.isfinite(x) for x in p.losses)
    assert all(s == 0 for steps in p.steps.values() for s in steps)
    return f"every step is skipped, the scale falls to {scales[14]:.3g} at update 14 and {scales[-1]:.3g} at the end"


@sick(
    CASES,
    "hv_totalnet_of_unit_normals",
    ("poor_init",),
    source="https://arxiv.org/abs/1502.01852 the scale of weights before ReLU; here a standard deviation of 1 in every layer",
    proof=lambda p: _grows_forward(p),
    also=("exploding_gradient", "update_ratio_too_small"),
)
def _(seed: int, well: bool = False) -> Setup:
    model, draw = mlp(nn.ReLU, 3, 64, 8, 1), Draw(seed, 8, 64)
    initialise(model, nn.init.kaiming_normal_ if well else nn.init.normal_)

    def loss(i: int) -> Tensor:
        x, y = draw()
        return F.mse_loss(model(x)[:, 0], y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 1e-3), 80 if not well else 200)


def _grows_forward(p: Plain) -> str:
    rms = [o.rms for name in ("0", "2", "4", "6") if (o := p.outputs[name][0]) is not None]
    assert rms[-1] > 100 * rms[0], f"rms {rms}"
    assert p.losses[0] > 1e4, f"the loss starts at {p.losses[0]}"
    return f"from the first layer to the last the rms grows from {rms[0]:.3g} to {rms[-1]:.3g}, and the loss starts at {p.losses[0]:.3g}"


# --------------------------------------------------------------------------------------------------------------- healthy


def _one(p: Plain, key: str = "") -> nn.Module:
    """The model of a run, or one of its models."""
    return p.setup.model if isinstance(p.setup.model, nn.Module) else p.setup.model[key]


def _finite(p: Plain) -> None:
    assert all(math.isfinite(x) for x in p.losses), "a loss is not finite"
    assert not any(n for counts in p.nonfinite.values() for n in counts), "a gradient is not finite"


def _walks_right(p: Plain) -> str:
    _finite(p)
    with torch.no_grad():
        q = _one(p, "online")(torch.eye(8))[:7]
    assert (q[:, 1] > q[:, 0]).all(), "a cell of the corridor goes left"
    assert abs(float(q[6, 1]) - 1) < 0.1, f"{q}"
    assert abs(float(q[2, 1]) - 0.9**4) < 0.12, f"{q}"
    return f"the greedy policy walks to the right everywhere; the value of the last cell is {float(q[6, 1]):.3g}"


@healthy(
    CASES,
    "hv_double_dqn_clipped_target_copies",
    source="https://arxiv.org/abs/1509.06461 double Q-learning; the loss jumps at every copy to the target, whose weights stand still between",
    proof=_walks_right,
)
def _(seed: int) -> Setup:
    corridor = Corridor(seed)
    online, target = mlp(nn.ReLU, 1, 48, 8, 2), mlp(nn.ReLU, 1, 48, 8, 2)
    target.load_state_dict(online.state_dict())
    target.requires_grad_(False)
    optimizer = torch.optim.Adam(online.parameters(), 5e-3)

    def train() -> Iterator[Event]:
        for i in range(300):
            s, a, r, t, done = corridor()
            with torch.no_grad():
                best = online(t).argmax(1, keepdim=True)
                goal = r + 0.9 * (1 - done) * target(t).gather(1, best)[:, 0]
            loss = F.smooth_l1_loss(online(s).gather(1, a[:, None])[:, 0], goal)
            optimizer.zero_grad()
            loss.backward()
            yield "read", [loss]
            nn.utils.clip_grad_value_(online.parameters(), 1.0)
            optimizer.step()
            yield "step", [optimizer]
            if i % 15 == 14:
                target.load_state_dict(online.state_dict())

    return Setup({"online": online, "target": target}, train)


def _pays(p: Plain) -> str:
    _finite(p)
    bandit = Bandit(12345)
    bandit.arms = ARMS[_one(p, "actor")]
    x = torch.randn(2000, 6, generator=bandit.generator)
    with torch.no_grad():
        got = (x @ bandit.arms).gather(1, _one(p, "actor")(x).argmax(1, keepdim=True)).mean()
    best = (x @ bandit.arms).max(1).values.mean()
    assert got > 0.9 * best, f"{got:.3g} of {best:.3g}"
    return f"the policy earns {got:.3g} of {best:.3g} that can be had"


ARMS: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()
"""What the bandit of a policy pays."""


@healthy(
    CASES,
    "hv_actor_with_two_optimizers_policy_head_at_zero",
    source="https://arxiv.org/abs/2006.05990 what matters in on-policy learning: last layer of the policy near zero, separate critic",
    proof=_pays,
)
def _(seed: int) -> Setup:
    bandit = Bandit(seed, batch=128)
    actor, critic = mlp(nn.Tanh, 1, 32, 6, 4), mlp(nn.Tanh, 1, 32, 6, 1)
    initialise(actor[2], nn.init.zeros_)
    ARMS[actor] = bandit.arms
    for_actor = torch.optim.Adam(actor.parameters(), 1e-2)
    for_critic = torch.optim.SGD(critic.parameters(), 0.05, momentum=0.9)

    def train() -> Iterator[Event]:
        for _ in range(250):
            x = bandit.context()
            policy = torch.distributions.Categorical(logits=actor(x))
            arm = torch.multinomial(policy.probs, 1, generator=bandit.generator)[:, 0]
            paid = bandit.pull(x, arm)
            value = critic(x)[:, 0]
            error = F.mse_loss(value, paid)
            for_critic.zero_grad()
            error.backward()
            gain = -((paid - value).detach() * policy.log_prob(arm)).mean()  # close to 0, of either sign
            for_actor.zero_grad()
            gain.backward()
            yield "read", [error, gain]
            for_critic.step()
            for_actor.step()
            yield "step", [for_critic, for_actor]

    return Setup({"actor": actor, "critic": critic}, train)


@healthy(
    CASES,
    "hv_pinn_lbfgs_many_backwards_a_step",
    source="https://arxiv.org/abs/1711.10561 physics-informed networks by L-BFGS; a step is many backward passes of one closure",
    proof=converges(0.01),
)
def _(seed: int) -> Setup:
    net = mlp(nn.Tanh, 2, 20, 1, 1)
    optimizer = torch.optim.LBFGS(net.parameters(), lr=1, max_iter=5, line_search_fn="strong_wolfe")
    x = torch.linspace(0, 1, 40)[:, None].requires_grad_()

    def closure() -> Tensor:  # u' = -3 u + cos(6 x), u(0) = 1
        optimizer.zero_grad()
        u = net(x)
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        loss = (du + 3 * u - torch.cos(6 * x)).square().mean() + 10 * (u[0] - 1).square().mean()
        loss.backward()
        total: Tensor = loss
        return total

    def train() -> Iterator[Event]:
        for _ in range(50):
            loss = torch.as_tensor(optimizer.step(closure))
            yield "read", [loss]
            yield "step", [optimizer]

    return Setup(net, train)


class Several(nn.Module):
    """An encoder with one head a task."""

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 48), nn.LayerNorm(48), nn.GELU())
        self.heads = nn.ModuleList(nn.Linear(48, 1) for _ in range(tasks))

    def forward(self, x: Tensor, task: int) -> Tensor:
        out: Tensor = self.heads[task](self.encoder(x))[:, 0]
        return out


@healthy(
    CASES,
    "hv_five_tasks_take_turns",
    source="https://arxiv.org/abs/1706.05098 multi-task learning, a task a batch: a head has a gradient in one update of five",
    proof=converges(0.3),
)
def _(seed: int) -> Setup:
    model, draws = Several(5), [Draw(10 * seed + k, 8, 64) for k in range(5)]

    def loss(i: int) -> Tensor:
        x, y = draws[i % 5]()
        return F.smooth_l1_loss(model(x, i % 5), y)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), 5e-3, weight_decay=0.01), 300)


@healthy(
    CASES,
    "hv_sobolev_of_a_potential",
    source="https://arxiv.org/abs/1706.04859 forces are matched by the gradient of the net: the last bias has no gradient, ever",
    proof=converges(0.15),
)
def _(seed: int) -> Setup:
    net = mlp(nn.SiLU, 2, 40, 3, 1)
    g = torch.Generator().manual_seed(seed)

    def loss(i: int) -> Tensor:  # the force of sum(x^2) / 2 + sin(x0 x1)
        x = torch.randn(128, 3, generator=g).requires_grad_()
        (force,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        with torch.no_grad():
            c = torch.cos(x[:, 0] * x[:, 1])
            true = x + torch.stack([c * x[:, 1], c * x[:, 0], torch.zeros(128)], 1)
        return F.mse_loss(force, true)

    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=300)
    return fit(net, loss, optimizer, 300, before=lambda i: schedule.step() if i > 0 else None)


class Weighted(nn.Module):
    """Two regressions and the logarithms of their noise."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(nn.ReLU, 2, 48, 8, 2)
        self.log_var = nn.Parameter(torch.zeros(2))


def _weighs(p: Plain) -> str:
    _finite(p)
    model = _one(p)
    assert isinstance(model, Weighted)
    assert p.losses[0] > 0.2, f"the loss begins at {p.losses[0]}"
    assert median(p.losses[-20:]) < -0.8, f"the loss ends at {median(p.losses[-20:])}"
    assert float(model.log_var.detach().max()) < -0.8
    return f"the loss goes from {p.losses[0]:.3g} through 0 to {median(p.losses[-20:]):.3g}, and the weights of both tasks grow"


@healthy(
    CASES,
    "hv_learned_task_weights_below_zero",
    source="https://arxiv.org/abs/1705.07115 learned uncertainty weights two losses; their sum falls through 0",
    proof=_weighs,
)
def _(seed: int) -> Setup:
    model, one, two = Weighted(), Draw(seed, 8, 64), Draw(seed + 50, 8, 64)

    def loss(i: int) -> Tensor:
        x = one.x()
        y = torch.stack([one.level(x), two.level(x)], 1) + 0.1 * torch.randn(64, 2, generator=one.generator)
        error = (model.net(x) - y).square().mean(0)
        total: Tensor = (torch.exp(-model.log_var) * error + model.log_var).mean() / 2
        return total

    groups: list[dict[str, Any]] = [
        {"params": model.net.parameters()},
        {"params": [model.log_var], "lr": 3e-2, "weight_decay": 0.0},
    ]
    return fit(model, loss, torch.optim.AdamW(groups, 5e-3, weight_decay=0.02), 300)


def _from_to(p: Plain, above: float, below: float) -> str:
    _finite(p)
    a, b = sum(p.losses[:3]) / 3, median(p.losses[-20:])
    assert a > above, f"the loss begins at {a:.3g}"
    assert b < below, f"the loss ends at {b:.3g}"
    return f"the loss falls from {a:.3g} to {b:.3g}"


class Root(torch.autograd.Function):
    """The root of z = tanh(W z + b), and its gradient by the implicit function theorem."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, b: Tensor) -> Tensor:
        z = torch.zeros_like(b)
        for _ in range(30):
            z = torch.tanh(z @ w.t() + b)
        ctx.save_for_backward(w, z)
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        w, z = ctx.saved_tensors
        d = 1 - z * z
        v = grad
        for _ in range(30):
            v = grad + (v * d) @ w
        return (v * d).t() @ z, v * d


class Implicit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(8, 24), nn.Linear(24, 1)
        self.w = nn.Parameter(0.4 * nn.init.orthogonal_(torch.empty(24, 24)))

    def forward(self, x: Tensor) -> Tensor:
        w = self.w / self.w.norm(2, dim=(0, 1)).clamp(min=1.0) * 0.9
        out: Tensor = self.leave(Root.apply(w, self.enter(x)))[:, 0]
        return out


@healthy(
    CASES,
    "hv_implicit_root_by_hand",
    source="https://arxiv.org/abs/1909.01377 deep equilibrium models: forward and backward are fixed points of one layer",
    proof=lambda p: _from_to(p, 0.15, 0.016),
)
def _(seed: int) -> Setup:
    model, draw = Implicit(), Draw(seed, 8, 64)

    def loss(i: int) -> Tensor:
        x, y = draw()
        return F.mse_loss(model(x), y)

    return fit(model, loss, torch.optim.RMSprop(model.parameters(), 2e-3), 200)


class Hyper(nn.Module):
    """A network that writes the weights of another; what it writes at first is almost the same for all tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Embedding(12, 6)
        last = nn.Linear(32, 16 + 16 + 16 + 1)
        nn.init.normal_(last.weight, std=0.02)
        nn.init.normal_(last.bias, std=0.7)
        self.write = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), last)

    def forward(self, task: Tensor, x: Tensor) -> Tensor:
        w, b, v, c = self.write(self.code(task)).split([16, 16, 16, 1], -1)
        h = torch.tanh(w[:, None] * x[..., None] + b[:, None])
        out: Tensor = (h * v[:, None]).sum(-1) / 4 + c
        return out


@healthy(
    CASES,
    "hv_hypernetwork_of_waves",
    source="https://arxiv.org/abs/1609.09106 hypernetworks; few of the embedded tasks are drawn in a batch, the other rows have no gradient",
    proof=converges(0.3),
)
def _(seed: int) -> Setup:
    model = Hyper()
    g = torch.Generator().manual_seed(seed)
    phase, height = 3 * torch.rand(12, generator=g), 0.5 + torch.rand(12, generator=g)

    def loss(i: int) -> Tensor:
        task = torch.randint(12, (6,), generator=g)
        x = 4 * torch.rand(6, 20, generator=g) - 2
        return F.mse_loss(model(task, x), height[task, None] * torch.sin(x + phase[task, None]))

    return fit(model, loss, torch.optim.Adam(model.parameters(), 1e-2), 400)


@healthy(
    CASES,
    "hv_maml_of_lines",
    source="https://arxiv.org/abs/1703.03400 MAML: an inner step by hand with create_graph, the loss of a meta-batch of six tasks",
    proof=lambda p: _adapts(p),
)
def _(seed: int) -> Setup:
    model = mlp(nn.Tanh, 1, 40, 1, 1)
    START[model] = copy.deepcopy(model)
    g = torch.Generator().manual_seed(seed)
    names = [name for name, _ in model.named_parameters()]

    def loss(i: int) -> Tensor:
        total = torch.zeros(())
        for _ in range(6):
            slope, level = (4 * torch.rand(2, generator=g) - 2).tolist()
            x, z = torch.randn(10, 1, generator=g), torch.randn(10, 1, generator=g)
            mine: dict[str, Tensor] = dict(model.named_parameters())
            for _ in range(2):
                inner = F.mse_loss(torch.func.functional_call(model, mine, (x,)), slope * x + level)
                grads = torch.autograd.grad(inner, list(mine.values()), create_graph=True)
                mine = {n: q - 0.1 * d for n, q, d in zip(names, mine.values(), grads, strict=True)}
            total = total + F.mse_loss(torch.func.functional_call(model, mine, (z,)), slope * z + level)
        return total / 6

    return fit(model, loss, torch.optim.Adam(model.parameters(), 1e-2), 150)


START: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()
"""A meta-learned model as it was at first."""


def _adapts(p: Plain) -> str:
    _finite(p)

    def after(model: nn.Module) -> float:
        g, found = torch.Generator().manual_seed(77), []
        for _ in range(100):
            slope, level = (4 * torch.rand(2, generator=g) - 2).tolist()
            x, z = torch.randn(10, 1, generator=g), torch.randn(50, 1, generator=g)
            mine = copy.deepcopy(model)
            for _ in range(2):
                grads = torch.autograd.grad(F.mse_loss(mine(x), slope * x + level), list(mine.parameters()))
                with torch.no_grad():
                    for q, d in zip(mine.parameters(), grads, strict=True):
                        q.sub_(0.1 * d)
            found.append(float(F.mse_loss(mine(z), slope * z + level).detach()))
        return sum(found) / len(found)

    a, b = after(START[_one(p)]), after(_one(p))
    assert b < 0.3 * a, f"after two steps on a new task the loss was {a:.3g} and is {b:.3g}"
    return f"after two steps on a new task the loss was {a:.3g} and is {b:.3g}"


@healthy(
    CASES,
    "hv_cox_batches_without_events",
    source="https://arxiv.org/abs/1606.00931 DeepSurv: Cox partial likelihood with -inf masks; small batches, skipped where all are censored",
    proof=lambda p: _ranks(p),
)
def _(seed: int) -> Setup:
    model, draw = mlp(nn.SELU, 2, 24, 8, 1), Draw(seed, 8, 16)
    draw.a, draw.b = 1.5 * draw.a, 1.5 * draw.b
    RISKS[model] = draw
    optimizer = torch.optim.Adam(model.parameters(), 4e-3)

    def train() -> Iterator[Event]:
        for _ in range(350):
            x = draw.x()
            time = -torch.log(torch.rand(16, generator=draw.generator)) / torch.exp(draw.level(x))
            event = torch.rand(16, generator=draw.generator) < 0.25
            if not event.any():
                continue
            risk = model(x)[:, 0]
            among = risk[None].expand(16, 16).masked_fill(time[None] < time[:, None], -math.inf)
            loss = (torch.logsumexp(among, 1) - risk)[event].mean()
            optimizer.zero_grad()
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


RISKS: WeakKeyDictionary[nn.Module, Draw] = WeakKeyDictionary()


def _ranks(p: Plain) -> str:
    _finite(p)
    model = _one(p)
    draw = RISKS[model]
    x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        both = torch.stack([model(x)[:, 0], draw.level(x)])
    corr = float(torch.corrcoef(both)[0, 1])
    assert corr > 0.85, f"the correlation is {corr:.3g}"
    return f"the learned risk has the correlation {corr:.3g} with the true one"


@healthy(
    CASES,
    "hv_log_gaussian_falls_far_below_zero",
    source="https://arxiv.org/abs/1612.01474 Gaussian likelihood with a learned variance: loss of either sign, growing gradients",
    proof=lambda p: _sharp(p),
)
def _(seed: int) -> Setup:
    model, draw = Gaussian(0.0), Draw(seed, 8, 128)

    def loss(i: int) -> Tensor:
        x = draw.x()
        y = draw.level(x) + 0.05 * draw.noise()
        mean, log_std = model(x)
        total: Tensor = (log_std + 0.5 * ((y - mean) / log_std.exp()).square()).mean()
        return total

    optimizer = torch.optim.NAdam(model.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 350)
    return fit(model, loss, optimizer, 350, before=lambda i: schedule.step() if i > 0 else None)


def _sharp(p: Plain) -> str:
    _finite(p)
    a, b = p.losses[0], median(p.losses[-20:])
    assert a > 0, f"the loss begins at {a:.3g}"
    assert b < -1.5, f"the loss ends at {b:.3g}"
    return f"the loss falls from {a:.3g} to {b:.3g}"


class Counter(nn.Module):
    """Zero-inflated counts of visits, with a log of exposure that is added, not learned."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 64), nn.ReLU())
        self.head = nn.Linear(64, 1)
        initialise(self.head, nn.init.zeros_)

    def forward(self, x: Tensor, log_exposure: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))[:, 0] + log_exposure
        return out


@healthy(
    CASES,
    "hv_poisson_visits_head_at_zero",
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.PoissonNLLLoss.html rare, heavy counts with exposure; noisy loss",
    proof=lambda p: _counts(p),
)
def _(seed: int) -> Setup:
    model, draw = Counter(), Draw(seed, 8, 32)
    RISKS[model] = draw

    def loss(i: int) -> Tensor:
        x = draw.x()
        exposure = 0.2 + 3 * torch.rand(32, generator=draw.generator) ** 3
        y = torch.poisson(exposure * torch.exp(1.5 * draw.level(x) - 0.5), generator=draw.generator)
        return F.poisson_nll_loss(model(x, exposure.log()), y, full=False)

    return fit(model, loss, torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, nesterov=True), 300)


def _counts(p: Plain) -> str:
    _finite(p)
    model = _one(p)
    assert isinstance(model, Counter)
    model.eval()
    x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        both = torch.stack([model(x, torch.zeros(2000)), RISKS[model].level(x)])
    corr = float(torch.corrcoef(both)[0, 1])
    assert corr > 0.85, f"the correlation is {corr:.3g}"
    return f"the log of the learned rate has the correlation {corr:.3g} with the true one"
