"""Runs of agents, adversaries, contrastive pairs, graphs, physics and densities: losses that are more than a fit to labels.

Every sick run takes `fault`: with `fault=False` it is the same run without the mistake, and trains well.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Iterator
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Blobs, Case, Event, Proof, Setup, evens, fit, healthy, initialise, mlp, sick
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

NON_FINITE = ("non_finite_loss", "non_finite_gradient", "non_finite_activation", "non_finite_weight")


def others(*rules: str) -> tuple[str, ...]:
    """What follows from one non-finite value, but for the rules that name it."""
    return tuple(r for r in NON_FINITE if r not in rules)


class Arms:
    """A contextual bandit: in a context one of the arms pays 1, the others nothing."""

    def __init__(self, seed: int, features: int = 8, arms: int = 4, batch: int = 32) -> None:
        self.generator = torch.Generator().manual_seed(5000 + seed)
        self.truth = torch.randn(features, arms, generator=self.generator)
        self.features, self.batch = features, batch

    def contexts(self) -> Tensor:
        return torch.randn(self.batch, self.features, generator=self.generator)

    def draw(self, logits: Tensor) -> Tensor:
        """Arms by their probability (by the Gumbel trick, which goes on with logits that are NaN)."""
        uniform = torch.rand(logits.shape, generator=self.generator).clamp(1e-9, 1 - 1e-7)
        return (logits.detach() - (-uniform.log()).log()).argmax(-1)

    def pay(self, x: Tensor, arm: Tensor) -> Tensor:
        return ((x @ self.truth).argmax(1) == arm).float()


class ActorCritic(nn.Module):
    """A policy over arms and a value of the context, with no layer in common."""

    def __init__(self, features: int = 8, arms: int = 4, width: int = 32) -> None:
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(features, width), nn.Tanh(), nn.Linear(width, arms))
        self.critic = nn.Sequential(nn.Linear(features, width), nn.Tanh(), nn.Linear(width, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.actor(x), self.critic(x)[:, 0]


class Waves:
    """Windows of sums of sines with some noise, and the value that follows each."""

    def __init__(self, seed: int, length: int = 24, batch: int = 32, noise: float = 0.05) -> None:
        self.generator = torch.Generator().manual_seed(6000 + seed)
        self.length, self.batch, self.noise = length, batch, noise

    def __call__(self) -> tuple[Tensor, Tensor]:
        t = torch.arange(self.length + 1.0)
        phase = 6.28 * torch.rand(self.batch, 2, 1, generator=self.generator)
        series = torch.sin(0.4 * t + phase[:, 0]) + 0.7 * torch.sin(0.9 * t + phase[:, 1])
        series = series + self.noise * torch.randn(series.shape, generator=self.generator)
        return series[:, :-1], series[:, -1:]


def weights_turn_non_finite(parameter: str, update: int) -> Proof:
    """A parameter holds a NaN or Inf from the beginning of `update` on, and no parameter before."""

    def proof(plain: Plain) -> str:
        bad = [i for i, n in enumerate(plain.weights[parameter]) if not math.isfinite(n)]
        assert bad[:1] == [update], f"{parameter} is not finite first at {bad[:1]}, not {update}"
        early = [n for n, norms in plain.weights.items() if not all(map(math.isfinite, norms[:update]))]
        assert not early, f"{early} are not finite earlier"
        same = [n for n, norms in plain.weights.items() if n != parameter and not math.isfinite(norms[update])]
        assert not same, f"{same} are not finite at the same update"
        return f"{parameter} alone holds NaN at update {update}, and not before"

    return proof


def losses_finite(first: int = 0, last: int | None = None) -> Proof:
    """Every loss of these updates is finite."""

    def proof(plain: Plain) -> str:
        assert all(map(math.isfinite, plain.losses[first:last])), "a loss is not finite"
        return "these losses are finite"

    return proof


def first_bad_loss(update: int) -> Proof:
    """The loss is NaN at `update` and everything is finite before it; so is every weight and activation at `update` itself."""

    def proof(plain: Plain) -> str:
        assert not math.isfinite(plain.losses[update]), f"the loss at {update} is finite"
        assert all(map(math.isfinite, plain.losses[:update])), "the loss is not finite before"
        assert all(math.isfinite(norms[update]) for norms in plain.weights.values()), "a weight is not finite yet"
        assert all(o is None or o.nonfinite == 0 for seen in plain.outputs.values() for o in seen[: update + 1]), "an output"
        return f"the loss is NaN at update {update}, computed from finite outputs"

    return proof


def noted(name: str, above: float, what: str, first: int = 0, last: int | None = None) -> Proof:
    """A number that the loop wrote down in every update (`model.notes[name]`), in the median above `above`."""

    def proof(plain: Plain) -> str:
        model = plain.setup.model
        notes = (model if isinstance(model, nn.Module) else next(iter(model.values()))).notes
        assert isinstance(notes, dict)
        value = median(notes[name][first:last])
        assert value > above, f"{what}: {value:.4g}, not above {above:g}"
        return f"{what}: {value:.4g}"

    return proof


def noted_gain(name: str, low: float, high: float, what: str) -> Proof:
    """A quality that the loop wrote down begins below `low` and ends above `high` (medians of tenths); all losses are finite."""

    def proof(plain: Plain) -> str:
        model = plain.setup.model
        notes = (model if isinstance(model, nn.Module) else next(iter(model.values()))).notes
        assert isinstance(notes, dict)
        values = notes[name]
        tenth = max(1, len(values) // 10)
        a, b = median(values[:tenth]), median(values[-tenth:])
        assert all(map(math.isfinite, plain.losses)), "a loss is not finite"
        assert a < low, f"{what} begins at {a:.4g}, not below {low:g}"
        assert b > high, f"{what} ends at {b:.4g}, not above {high:g}"
        return f"{what} goes from {a:.4g} to {b:.4g}"

    return proof


def keep_notes(model: nn.Module, *names: str) -> dict[str, list[float]]:
    """Lists that a loop fills and a proof reads."""
    notes: dict[str, list[float]] = {n: [] for n in names}
    object.__setattr__(model, "notes", notes)
    return notes


def leftover(module: nn.Module) -> float:
    """The norm of what lies in the gradients of a module."""
    return math.sqrt(sum(float(p.grad.square().sum()) for p in module.parameters() if p.grad is not None))


# Faults that begin in mid-training.


class Forecaster(nn.Module):
    """A GRU over a window and a head on its last state."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.rnn = nn.GRU(1, width, batch_first=True)
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.rnn(x[..., None])
        out: Tensor = self.head(states[:, -1])
        return out


@sick(
    CASES,
    "hp_forecast_batch_in_other_units",
    ("gradient_spike",),
    source="https://arxiv.org/abs/1211.5063 outliers and clipping in recurrent networks; one export of a sensor in milli-units",
    proof=every(gradient_spikes(45, 100.0), losses_finite()),
    onset=45,
    also=("loss_spike",),
)
def _(seed: int, fault: bool = True) -> Setup:
    model, data = Forecaster(), Waves(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)

    def loss(i: int) -> Tensor:
        x, y = data()
        if fault and i == 45:
            y = 1000.0 * y
        return F.mse_loss(model(x), y)

    def clip(i: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    return fit(model, loss, optimizer, 75, between=clip)


@sick(
    CASES,
    "hp_reinforce_batch_of_equal_rewards",
    ("non_finite_loss",),
    source="https://github.com/ray-project/ray/issues/846 policy gradient gives NaNs when rewards are all 0: std() of them",
    proof=first_bad_loss(36),
    onset=36,
    also=others("non_finite_loss"),
)
def _(seed: int, fault: bool = True) -> Setup:
    policy = mlp(nn.Tanh, 1, 32, 8, 4)
    arms = Arms(seed, batch=24)
    optimizer = torch.optim.RMSprop(policy.parameters(), lr=1.5e-3)

    def loss(i: int) -> Tensor:
        x = arms.contexts()
        logits = policy(x)
        arm = arms.draw(logits)
        reward = arms.pay(x, arm)
        if i == 36:  # a level in which nobody finds anything
            reward = torch.zeros_like(reward)
        advantage = (reward - reward.mean()) / (reward.std() + (0.0 if fault else 1e-8))
        return -(advantage * F.log_softmax(logits, -1).gather(1, arm[:, None])[:, 0]).mean()

    return fit(policy, loss, optimizer, 60)


@sick(
    CASES,
    "hp_siamese_identical_pair",
    ("non_finite_gradient",),
    ("0", "2", "4"),
    source="https://github.com/adambielski/siamese-triplet/issues/18 the derivative of sqrt at a distance of 0",
    proof=every(first_non_finite(28), losses_finite(0, 29)),
    onset=28,
    also=others("non_finite_gradient"),
)
def _(seed: int, fault: bool = True) -> Setup:
    model = nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 8, bias=False))
    data = Blobs(seed, 16, 4, 64, 0.5)

    def loss(i: int) -> Tensor:
        x, y = data()
        a, b, same = x[:32], x[32:].clone(), (y[:32] == y[32:]).float()
        if i == 28:  # the same picture twice in the folder
            b[3], same[3] = a[3], 1.0
        square = (model(a) - model(b)).square().sum(1)
        distance = (square + (0.0 if fault else 1e-9)).sqrt()
        out: Tensor = (same * distance.square() + (1 - same) * F.relu(2 - distance).square()).mean()
        return out

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-3), 45)


class Prototypes(nn.Module):
    """An encoder and one prototype a class, compared by their cosine."""

    def __init__(self, classes: int = 6) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 12))
        self.prototypes = nn.Linear(12, classes, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = F.normalize(self.encoder(x), dim=1)
        return z, 8 * self.prototypes(z)


@sick(
    CASES,
    "hp_class_means_of_an_absent_class",
    ("non_finite_weight",),
    ("prototypes",),
    source="https://arxiv.org/abs/1611.07725 class means as a classifier, here recomputed from a buffer that lacks one class",
    proof=weights_turn_non_finite("prototypes.weight", 40),
    onset=40,
    also=others("non_finite_weight"),
)
def _(seed: int, fault: bool = True) -> Setup:
    model = Prototypes()
    data = Blobs(seed, 16, 6, 48, 0.8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    buffer: deque[tuple[Tensor, Tensor]] = deque(maxlen=15)

    def train() -> Iterator[Event]:
        for i in range(55):
            x, y = data()
            if 20 <= i < 40:  # a season without the last class
                x, y = x[y != 5], y[y != 5]
            z, logits = model(x)
            loss = F.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            buffer.append((z.detach(), y))
            if i == 39:  # the first consolidation
                features, labels = torch.cat([b[0] for b in buffer]), torch.cat([b[1] for b in buffer])
                with torch.no_grad():
                    for c in range(6):
                        if fault or (labels == c).any():
                            model.prototypes.weight[c] = features[labels == c].mean(0)
            yield "step", [optimizer]

    return Setup(model, train)


class Attend(nn.Module):
    """One head of graph attention over the neighbours in a dense adjacency."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.project = nn.Linear(inputs, outputs, bias=False)
        self.source, self.target = nn.Linear(outputs, 1, bias=False), nn.Linear(outputs, 1, bias=False)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        h = self.project(x)
        score = F.leaky_relu(self.source(h) + self.target(h).T, 0.2)
        out: Tensor = torch.softmax(score.masked_fill(~adjacency, -math.inf), -1) @ h
        return out


class GraphAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = Attend(12, 32), nn.ELU(), Attend(32, 3)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        out: Tensor = self.second(self.act(self.first(x, adjacency)), adjacency)
        return out


class Communities:
    """Random graphs whose nodes belong to classes; most edges are within a class."""

    def __init__(self, seed: int, nodes: int = 40, features: int = 12, classes: int = 3, spread: float = 1.0) -> None:
        self.generator = torch.Generator().manual_seed(7000 + seed)
        self.centres = torch.randn(classes, features, generator=self.generator)
        self.nodes, self.spread = nodes, spread

    def __call__(self) -> tuple[Tensor, Tensor, Tensor]:
        y = torch.randint(len(self.centres), (self.nodes,), generator=self.generator)
        noise = torch.randn(self.nodes, self.centres.shape[1], generator=self.generator)
        x = self.centres[y] + self.spread * noise
        chance = torch.where(y[:, None] == y[None], 0.3, 0.03)
        edges = torch.rand(self.nodes, self.nodes, generator=self.generator).triu(1)
        joined = (edges > 0) & (edges < chance)
        return x, joined | joined.T | torch.eye(self.nodes, dtype=torch.bool), y


@sick(
    CASES,
    "hp_graph_attention_isolated_node",
    ("non_finite_activation",),
    ("first",),
    source="https://arxiv.org/abs/1710.10903 graph attention; a softmax over no neighbours where the self-loop was lost",
    proof=every(first_non_finite(30, "first"), losses_finite(0, 30)),
    onset=30,
    also=others("non_finite_activation"),
)
def _(seed: int, fault: bool = True) -> Setup:
    model, data = GraphAttention(), Communities(seed)

    def loss(i: int) -> Tensor:
        x, adjacency, y = data()
        if fault and i == 30:
            adjacency[7], adjacency[:, 7] = False, False
        return F.cross_entropy(model(x, adjacency), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 50)


@sick(
    CASES,
    "hp_rare_reward_prior_in_every_bias",
    ("dead_units",),
    ("0", "1"),
    source="https://arxiv.org/abs/1708.02002 the bias of the last layer set to the log odds of a rare class, here of every layer",
    proof=every(dead_fraction("1", 0.8, 40, 50), losses_finite()),
    onset=40,
    also=("zero_gradient", "vanishing_gradient"),
)
def _(seed: int, fault: bool = True) -> Setup:
    model = mlp(nn.ReLU, 1, 128, 12, 1)
    generator = torch.Generator().manual_seed(seed)
    direction = F.normalize(torch.randn(12, generator=generator), dim=0)

    def recalibrate(i: int) -> None:
        """The share of rewarded states is known by now (2 in 100): meant for the bias of the head alone."""
        if i == 40 and fault:
            for m in model:
                if isinstance(m, nn.Linear):
                    nn.init.constant_(m.bias, math.log(0.02 / 0.98))

    def loss(i: int) -> Tensor:
        x = torch.randn(256, 12, generator=generator)
        rewarded = (x @ direction > 2.05).float()
        return F.binary_cross_entropy_with_logits(model(x)[:, 0], rewarded)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=6e-3), 70, before=recalibrate)


class Hashing(nn.Module):
    """Pictures to codes of 24 bits, and a classifier on the codes."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(20, 48), nn.GELU(), nn.Linear(48, 24))
        self.classifier = nn.Linear(24, 6)

    def forward(self, x: Tensor, hard: bool) -> Tensor:
        h = self.encoder(x)
        out: Tensor = self.classifier(torch.sign(h) if hard else torch.tanh(h))
        return out


@sick(
    CASES,
    "hp_hash_codes_without_straight_through",
    ("zero_gradient",),
    ("encoder",),
    source="https://arxiv.org/abs/1308.3432 gradients through stochastic or hard units: sign() passes none",
    proof=every(zero_gradient("encoder.0.weight", "encoder.2.weight", "encoder.2.bias", first=35, last=45), losses_finite()),
    onset=35,
    also=("vanishing_gradient",),
)
def _(seed: int, fault: bool = True) -> Setup:
    model, data = Hashing(), Blobs(seed, 20, 6, 48, 2.0)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x, hard=fault and i >= 35), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 65)


def ppo(model: ActorCritic, arms: Arms, updates: int, epochs: int, learning_rate: Callable[[int], float]) -> Setup:
    """PPO on a bandit: `epochs` updates on each batch, an entropy bonus, one Adam, a rate for each update."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0, eps=1e-5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate)
    notes = keep_notes(model, "reward")

    def train() -> Iterator[Event]:
        for i in range(updates):
            if i % epochs == 0:
                x = arms.contexts()
                with torch.no_grad():
                    logits, value = model(x)
                arm = arms.draw(logits)
                reward = arms.pay(x, arm)
                old = torch.distributions.Categorical(logits=logits).log_prob(arm)
                advantage = reward - value
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
            logits, value = model(x)
            policy = torch.distributions.Categorical(logits=logits)
            ratio = (policy.log_prob(arm) - old).exp()
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
            loss = -surrogate + 0.5 * F.mse_loss(value, reward) - 0.01 * policy.entropy().mean()
            optimizer.zero_grad()
            loss.backward()
            yield "read", [loss]
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            schedule.step()
            notes["reward"].append(float(reward.mean()))
            yield "step", [optimizer]

    return Setup(model, train)


@sick(
    CASES,
    "hp_ppo_rate_annealed_to_nothing",
    ("frozen_weights",),
    ("actor", "critic"),
    source="https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details/ linear annealing, here over too few updates",
    proof=unchanged("actor.0.weight", "actor.2.weight", "critic.0.weight", "critic.2.weight", first=44, last=54),
    onset=44,
    also=("update_ratio_too_small",),
)
def _(seed: int, fault: bool = True) -> Setup:
    total = 44 if fault else 400  # counted in batches by one, in updates by the other
    return ppo(ActorCritic(), Arms(seed, batch=64), 76, 4, lambda i: 5e-3 * max(0.0, 1 - i / total))


# Faults that are there from the first update.


@sick(
    CASES,
    "hp_actor_critic_value_detached",
    ("missing_gradient",),
    ("critic",),
    source="https://github.com/nikhilbarhate99/PPO-PyTorch/issues/35 the critic never changes because of detach()",
    proof=every(
        no_gradient("critic.0.weight", "critic.0.bias", "critic.2.weight", "critic.2.bias"),
        noted("actor", 1e-3, "the gradient of the actor"),
    ),
)
def _(seed: int, fault: bool = True) -> Setup:
    model, arms = ActorCritic(), Arms(seed, batch=48)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    notes = keep_notes(model, "actor", "reward")

    def train() -> Iterator[Event]:
        for _ in range(60):
            x = arms.contexts()
            logits, value = model(x)
            if fault:
                value = value.detach()  # meant for the advantage alone
            arm = arms.draw(logits)
            reward = arms.pay(x, arm)
            policy = torch.distributions.Categorical(logits=logits)
            advantage = reward - value.detach()
            loss = -(advantage * policy.log_prob(arm)).mean() + 0.5 * F.mse_loss(value, reward) - 0.01 * policy.entropy().mean()
            optimizer.zero_grad()
            loss.backward()
            yield "read", [loss]
            notes["actor"].append(leftover(model.actor))
            notes["reward"].append(float(reward.mean()))
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


class LearnedGraph(nn.Module):
    """A graph convolution over an adjacency that two projections of the nodes make."""

    def __init__(self, fault: bool) -> None:
        super().__init__()
        self.phi, self.theta = nn.Linear(12, 16), nn.Linear(12, 16)
        self.first, self.act, self.second = nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 3)
        self.fault = fault

    def forward(self, x: Tensor) -> Tensor:
        adjacency = torch.softmax(self.phi(x) @ self.theta(x).T / 4, -1)
        if self.fault:
            adjacency = adjacency.detach()
        mixed = 0.5 * (x + adjacency @ x)
        h = self.act(self.first(mixed))
        out: Tensor = self.second(0.5 * (h + adjacency @ h))
        return out


@sick(
    CASES,
    "hp_learned_adjacency_detached",
    ("missing_gradient",),
    ("phi", "theta"),
    source="https://github.com/queenie88/A-GCN/issues/4 if adj is detached, how are W_phi and W_theta updated?",
    proof=every(
        no_gradient("phi.weight", "phi.bias", "theta.weight", "theta.bias"),
        lambda plain: f"first has a gradient of {min(plain.grads['first.weight']):.2g} or more",
    ),
)
def _(seed: int, fault: bool = True) -> Setup:
    model, data = LearnedGraph(fault), Communities(seed)

    def loss(i: int) -> Tensor:
        x, _, y = data()
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), 60)


class Replay:
    """Transitions of a walk on a ring: observations of the place, three actions, a reward near one place, drawn at random."""

    def __init__(self, seed: int, batch: int = 64) -> None:
        self.generator = torch.Generator().manual_seed(8000 + seed)
        self.batch = batch

    @staticmethod
    def see(angle: Tensor) -> Tensor:
        return torch.stack([torch.sin(angle), torch.cos(angle), torch.sin(2 * angle), torch.cos(2 * angle)], 1)

    def __call__(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        angle = 6.2832 * torch.rand(self.batch, generator=self.generator)
        action = torch.randint(3, (self.batch,), generator=self.generator)
        reward = (torch.cos(angle) > 0.8).float()
        after = angle + 0.4 * (action - 1) + 0.05 * torch.randn(self.batch, generator=self.generator)
        return self.see(angle), action, reward, self.see(after)


def q_loss(q: nn.Module, target: nn.Module, replay: Replay, discount: float = 0.8) -> Tensor:
    """Huber loss of the temporal difference; the target network gives no gradient."""
    s, a, r, after = replay()
    with torch.no_grad():
        aim = r + discount * target(after).max(1).values
    return F.smooth_l1_loss(q(s).gather(1, a[:, None])[:, 0], aim)


@sick(
    CASES,
    "hp_q_network_of_many_sigmoids",
    ("vanishing_gradient",),
    evens(0, 8),
    source="https://proceedings.mlr.press/v9/glorot10a.html deep sigmoid networks; here as a value function",
    proof=every(
        gradient_ratio("0.weight", "14.weight", 1e-4, 0, 15),
        gradient_ratio("8.weight", "14.weight", 3e-2, 0, 15),
        gradient_ratio("0.bias", "14.bias", 1e-4, 0, 15),
    ),
    also=("loss_plateau",),
)
def _(seed: int, fault: bool = True) -> Setup:
    q = mlp(nn.Sigmoid if fault else nn.ReLU, 7, 32, 4, 3)
    if not fault:
        initialise(q, lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu"))
    target = copy.deepcopy(q).requires_grad_(False)
    replay = Replay(seed)

    def before(i: int) -> None:
        if i % 20 == 0:
            target.load_state_dict(q.state_dict())

    optimizer = torch.optim.SGD(q.parameters(), lr=0.05, momentum=0.9)
    return fit(q, lambda i: q_loss(q, target, replay, 0.5), optimizer, 60, before=before)


@sick(
    CASES,
    "hp_cloned_policy_of_chaotic_tanh",
    ("exploding_gradient",),
    evens(0, 36),
    source="https://arxiv.org/abs/1611.01232 deep information propagation: the chaotic phase of tanh networks",
    proof=every(
        gradient_ratio("34.weight", "2.weight", 2e-3, 0, 15),
        gradient_ratio("18.weight", "2.weight", 0.1, 0, 15),
        losses_finite(),
    ),
    also=("poor_init", "saturated_activation"),
)
def _(seed: int, fault: bool = True) -> Setup:
    policy = mlp(nn.Tanh, 18, 64, 6, 2)
    for m in list(policy)[:-1]:
        if isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, std=(4.0 if fault else 1.2) / math.sqrt(m.in_features))
            nn.init.zeros_(m.bias)
    generator = torch.Generator().manual_seed(seed)
    expert = torch.randn(6, 2, generator=generator) / 3

    def loss(i: int) -> Tensor:
        x = torch.randn(64, 6, generator=generator)
        return F.mse_loss(policy(x), x @ expert)

    return fit(policy, loss, torch.optim.Adam(policy.parameters(), lr=1e-3), 60)


def flat(module: str, above: float, last: int = 15) -> Proof:
    """The outputs of a tanh are nearly all 1 or -1: their root mean square is above a number in every early update."""

    def proof(plain: Plain) -> str:
        seen = [o.rms for o in plain.outputs[module][:last] if o is not None]
        assert min(seen) > above, f"the root mean square of {module} is {min(seen):.3g}"
        return f"the root mean square of {module} is {min(seen):.3g} or more"

    return proof


@sick(
    CASES,
    "hp_forecaster_of_flat_tanh",
    ("saturated_activation",),
    ("0", "1", "2", "3"),
    source="https://proceedings.mlr.press/v9/glorot10a.html saturation of tanh; nn.init.normal_ with its default std of 1",
    proof=every(flat("1", 0.92), flat("3", 0.92)),
    also=("poor_init",),
)
def _(seed: int, fault: bool = True) -> Setup:
    model, data = mlp(nn.Tanh, 2, 96, 96, 1), Waves(seed, 96, 32)
    for k in (0, 2):
        layer = model[k]
        assert isinstance(layer, nn.Linear)
        nn.init.normal_(layer.weight, std=1.0 if fault else 0.1)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.mse_loss(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-3), 60)


class MeanAndVariance(nn.Module):
    def __init__(self, fault: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU())
        self.mean, self.variance = nn.Linear(48, 1), nn.Linear(48, 1)
        nn.init.normal_(self.variance.weight, std=0.01)  # at first the same variance everywhere
        self.fault = fault

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        return self.mean(h), F.softplus(self.variance(h)).clamp(min=1.0 if self.fault else 1e-3)


def noisy_cubic(generator: torch.Generator, batch: int = 64) -> tuple[Tensor, Tensor]:
    """A standardised regression whose noise depends on the input."""
    x = torch.randn(batch, 4, generator=generator)
    noise = (0.05 + 0.25 * (x[:, :1] > 0)) * torch.randn(batch, 1, generator=generator)
    return x, 0.8 * torch.sin(1.5 * x[:, 1:2]) + 0.4 * x[:, 2:3] + noise


@sick(
    CASES,
    "hp_gaussian_nll_variance_clamped",
    ("zero_gradient",),
    ("variance",),
    source="https://github.com/pytorch/pytorch/pull/49807 review of GaussianNLLLoss: what clamping the variance does to its gradient",
    proof=every(
        zero_gradient("variance.weight", "variance.bias"),
        lambda plain: f"the mean head has a gradient of {median(plain.grads['mean.weight']):.2g}",
    ),
)
def _(seed: int, fault: bool = True) -> Setup:
    model, generator = MeanAndVariance(fault), torch.Generator().manual_seed(seed)

    def loss(i: int) -> Tensor:
        x, y = noisy_cubic(generator)
        mean, variance = model(x)
        return F.gaussian_nll_loss(mean, y, variance)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=3e-3), 60)


class SimCLR(nn.Module):
    """An encoder and a projector, compared by cosine."""

    def __init__(self, inputs: int = 24) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 32))
        self.projector = nn.Sequential(nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.projector(self.encoder(x)), dim=1)


class Views:
    """Two noisy views of each of a batch of things: some features are dropped, noise is added."""

    def __init__(self, seed: int, features: int = 24, batch: int = 64, dropped: float = 0.3) -> None:
        self.generator = torch.Generator().manual_seed(9000 + seed)
        self.features, self.batch, self.dropped = features, batch, dropped

    def _look(self, x: Tensor) -> Tensor:
        kept = (torch.rand(x.shape, generator=self.generator) > self.dropped).float()
        return kept * (x + 0.3 * torch.randn(x.shape, generator=self.generator))

    def __call__(self) -> tuple[Tensor, Tensor]:
        x = torch.randn(self.batch, self.features, generator=self.generator)
        return self._look(x), self._look(x)


def info_nce(a: Tensor, b: Tensor, temperature: float = 0.2) -> Tensor:
    labels = torch.arange(len(a))
    return 0.5 * (F.cross_entropy(a @ b.T / temperature, labels) + F.cross_entropy(b @ a.T / temperature, labels))


@sick(
    CASES,
    "hp_simclr_projector_left_out",
    ("not_in_optimizer",),
    ("projector",),
    source="https://arxiv.org/abs/2002.05709 an encoder and a projection head; Adam was given those of the encoder only",
    proof=lambda plain: _moves_not(plain, "projector", "encoder"),
)
def _(seed: int, fault: bool = True) -> Setup:
    model, views = SimCLR(), Views(seed)
    optimizer = torch.optim.Adam((model.encoder if fault else model).parameters(), lr=2e-3)

    def train() -> Iterator[Event]:
        for _ in range(60):
            a, b = views()
            loss = info_nce(model(a), model(b))
            model.zero_grad()
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


def _moves_not(plain: Plain, still: str, moving: str) -> str:
    """Every parameter below one module has a gradient and stays bit for bit; every one below the other moves."""
    for name, steps in plain.steps.items():
        if name.startswith(still + "."):
            assert all(s == 0 for s in steps), f"{name} moves"
            assert min(plain.grads[name]) > 0, f"{name} has no gradient"
        if name.startswith(moving + "."):
            assert min(steps) > 0, f"{name} does not move"
    return f"{still} has gradients and stays bit for bit, {moving} moves"


class Ring:
    """Points on a noisy ring, and the distance of points from it."""

    def __init__(self, seed: int, batch: int = 64, width: float = 0.2) -> None:
        self.generator = torch.Generator().manual_seed(400 + seed)
        self.batch, self.width = batch, width

    def __call__(self) -> Tensor:
        angle = 6.2832 * torch.rand(self.batch, generator=self.generator)
        points = torch.stack([torch.cos(angle), torch.sin(angle)], 1)
        return 1.2 * points + self.width * torch.randn(self.batch, 2, generator=self.generator)


class Cloud:
    """Points of a Gaussian in the plane, and how far from its mean and widths a batch of points is."""

    def __init__(self, seed: int, batch: int = 128) -> None:
        self.generator = torch.Generator().manual_seed(400 + seed)
        self.batch = batch
        self.mean, self.width = torch.tensor([1.0, -0.5]), torch.tensor([0.6, 0.3])

    def __call__(self) -> Tensor:
        return self.mean + self.width * torch.randn(self.batch, 2, generator=self.generator)

    def noise(self) -> Tensor:
        return torch.randn(self.batch, 4, generator=self.generator)

    def off(self, x: Tensor) -> float:
        x = x.detach()
        return float((x.mean(0) - self.mean).norm() + (x.std(0) - self.width).norm())


@sick(
    CASES,
    "hp_gan_discriminator_never_zeroed",
    ("gradients_not_zeroed",),
    ("discriminator",),
    source="https://arxiv.org/abs/1406.2661 two players, two optimizers; the zero_grad() of one was copied twice",
    proof=every(noted("left", 0.3, "what lies in the gradients of the discriminator before its backward", 1, 8), losses_finite()),
    also=("exploding_gradient",),
)
def _(seed: int, fault: bool = True) -> Setup:
    generator = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    discriminator = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
    first = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
    second = torch.optim.Adam(discriminator.parameters(), lr=3e-3, betas=(0.5, 0.999))
    cloud = Cloud(seed)
    notes = keep_notes(generator, "left", "off")

    def train() -> Iterator[Event]:
        for _ in range(60):
            (first if fault else second).zero_grad()
            notes["left"].append(leftover(discriminator))
            fake = generator(cloud.noise())
            loss = F.softplus(-discriminator(cloud())).mean() + F.softplus(discriminator(fake.detach())).mean()
            loss.backward()
            yield "read", [loss]
            second.step()
            yield "step", [second]
            first.zero_grad()
            loss = F.softplus(-discriminator(fake)).mean()
            loss.backward()
            yield "read", [loss]
            first.step()
            notes["off"].append(cloud.off(fake))
            yield "step", [first]

    return Setup({"generator": generator, "discriminator": discriminator}, train)


def never_moves(plain: Plain) -> str:
    """Every parameter has a gradient in every update, and nothing steps."""
    for name, steps in plain.steps.items():
        assert all(map(math.isnan, steps)), f"{name} was stepped"
        assert min(plain.grads[name]) > 0, f"{name} has no gradient"
        assert len(set(plain.weights[name])) == 1, f"{name} changes"
    return "every parameter has gradients and none ever changes"


@sick(
    CASES,
    "hp_dqn_step_waits_for_a_full_buffer",
    ("never_stepped",),
    source="https://arxiv.org/abs/1312.5602 replay memory; step() waits until it holds a million transitions, backward() does not",
    proof=never_moves,
)
def _(seed: int, fault: bool = True) -> Setup:
    q = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    target = copy.deepcopy(q).requires_grad_(False)
    replay, optimizer = Replay(seed), torch.optim.RMSprop(q.parameters(), lr=1e-3)

    def train() -> Iterator[Event]:
        seen = 0
        for i in range(60):
            if i % 15 == 0:
                target.load_state_dict(q.state_dict())
            optimizer.zero_grad()
            loss = q_loss(q, target, replay, 0.5)
            loss.backward()
            yield "read", [loss]
            seen += replay.batch
            if seen > (1_000_000 if fault else 0):
                optimizer.step()
                yield "step", [optimizer]
            else:
                yield "step", []

    return Setup(q, train)


class Convolve(nn.Module):
    """A graph convolution with symmetric normalisation."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        scale = adjacency.float().sum(1).rsqrt()
        out: Tensor = self.linear((scale[:, None] * adjacency * scale) @ x)
        return out


class GraphNetwork(nn.Module):
    def __init__(self, inputs: int = 12, width: int = 32, outputs: int = 3) -> None:
        super().__init__()
        self.first, self.second, self.third = Convolve(inputs, width), Convolve(width, width), Convolve(width, outputs)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        h = F.relu(self.first(x, adjacency))
        h = F.relu(self.second(h, adjacency))
        out: Tensor = self.third(h, adjacency)
        return out


@sick(
    CASES,
    "hp_graph_convolutions_at_a_rate_of_one",
    ("update_ratio_too_large",),
    ("first", "second", "third"),
    source="https://arxiv.org/abs/1609.02907 graph convolutions, trained there with Adam at 0.01, here at 1",
    proof=every(update_ratio(above=1.0, last=1), update_ratio(above=0.2, last=6)),
    also=("loss_diverging", "loss_spike", "gradient_spike", "exploding_gradient", "dead_units"),
)
def _(seed: int, fault: bool = True) -> Setup:
    model, data = GraphNetwork(), Communities(seed, spread=2.0)

    def loss(i: int) -> Tensor:
        x, adjacency, y = data()
        return F.cross_entropy(model(x, adjacency), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1.0 if fault else 1e-2), 50)


def maml(seed: int, rate: float, updates: int, tasks: int = 6) -> Setup:
    """Meta-learning of sines of unknown phase and amplitude: two inner steps each, differentiated through."""
    model = mlp(nn.Tanh, 2, 32, 1, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(300 + seed)

    def task() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        phase, size = 3.1416 * torch.rand(1, generator=generator), 0.5 + torch.rand(1, generator=generator)
        x = 4 * torch.rand(2, 16, 1, generator=generator) - 2
        y = size * torch.sin(2 * x + phase)
        return x[0], y[0], x[1], y[1]

    def loss(i: int) -> Tensor:
        total = torch.zeros(())
        for _ in range(tasks):
            x, y, query, answer = task()
            fast: dict[str, Tensor] = dict(model.named_parameters())
            for _ in range(2):
                inner = F.mse_loss(torch.func.functional_call(model, fast, (x,)), y)
                grads = torch.autograd.grad(inner, list(fast.values()), create_graph=True)
                fast = {n: p - 0.1 * g for (n, p), g in zip(fast.items(), grads, strict=True)}
            total = total + F.mse_loss(torch.func.functional_call(model, fast, (query,)), answer) / tasks
        return total

    return fit(model, loss, optimizer, updates)


@sick(
    CASES,
    "hp_maml_outer_rate_of_a_millionth",
    ("update_ratio_too_small",),
    ("0", "2", "4"),
    source="https://arxiv.org/abs/1703.03400 the outer loop of meta-learning, there at 1e-3",
    proof=every(update_ratio(below=3e-5, last=15), loss_stays(0.25)),
)
def _(seed: int, fault: bool = True) -> Setup:
    return maml(seed, 1e-6 if fault else 5e-3, 60)


@sick(
    CASES,
    "hp_off_policy_values_diverge",
    ("loss_diverging",),
    source="https://arxiv.org/abs/1812.02648 the deadly triad; the state after has larger features than the state before",
    proof=every(loss_grows(10.0, last=15), losses_finite()),
    also=("exploding_gradient", "update_ratio_too_large", "loss_spike", "gradient_spike"),
)
def _(seed: int, fault: bool = True) -> Setup:
    model = nn.Linear(6, 1)
    generator = torch.Generator().manual_seed(seed)

    def loss(i: int) -> Tensor:
        s = torch.randn(64, 6, generator=generator)
        after = 1.6 * s  # only the first half of each trajectory was logged
        reward = 0.5 + 0.3 * s[:, :1]
        with torch.no_grad():
            aim = reward + (0.95 if fault else 0.2) * model(after)
        return F.mse_loss(model(s), aim)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.2), 30)


def inputs_are_large(module: str, above: float) -> Proof:
    """What the first layer gives has a root mean square above a number in every one of the first 15 updates."""

    def proof(plain: Plain) -> str:
        seen = min(o.rms for o in plain.outputs[module][:15] if o is not None)
        assert seen > above, f"{module} gives {seen:.3g}"
        return f"{module} gives {seen:.3g} or more (root mean square)"

    return proof


@sick(
    CASES,
    "hp_value_of_raw_observations",
    ("unnormalized_input",),
    ("",),
    source="https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details/ normalisation of observations, here forgotten",
    proof=every(noted("input", 1000.0, "root mean square of the inputs"), inputs_are_large("0", 100.0)),
    also=("saturated_activation", "zero_gradient", "vanishing_gradient"),
)
def _(seed: int, fault: bool = True) -> Setup:
    model = mlp(nn.Tanh, 2, 48, 6, 1)
    notes = keep_notes(model, "input")
    generator = torch.Generator().manual_seed(seed)
    # Places in millimetres, speeds in millimetres a second, an angle, a temperature in kelvin.
    offset, scale = torch.tensor([2500.0, 1200, 0, 0, 0, 300]), torch.tensor([1500.0, 900, 400, 300, 1, 10])

    def loss(i: int) -> Tensor:
        x = torch.randn(64, 6, generator=generator)
        returns = torch.sin(x[:, :1]) + 0.5 * x[:, 1:2] * x[:, 2:3].tanh() - 0.3 * x[:, 4:5]
        if fault:
            x = offset + scale * x
        notes["input"].append(float(x.square().mean().sqrt()))
        return F.mse_loss(model(x), returns)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 60)


@sick(
    CASES,
    "hp_student_with_weights_of_one",
    ("poor_init",),
    ("0", "2", "4"),
    source="https://arxiv.org/abs/1502.01852 what the variance of the first weights must be; nn.init.normal_(w) gives 1",
    proof=every(
        lambda plain: f"the first loss is {_above(plain.losses[0], 50.0):.3g}, of a student that knows nothing 2 at most",
        losses_finite(),
    ),
    also=("exploding_gradient",),
)
def _(seed: int, fault: bool = True) -> Setup:
    teacher = mlp(nn.ReLU, 1, 64, 16, 10).requires_grad_(False)
    student = mlp(nn.ReLU, 2, 48, 16, 10)
    if fault:
        initialise(student, nn.init.normal_)
    generator = torch.Generator().manual_seed(seed)

    def loss(i: int) -> Tensor:
        x = torch.randn(64, 16, generator=generator)
        aim = F.softmax(8 * teacher(x) / 2, -1)
        return 4 * F.kl_div(F.log_softmax(student(x) / 2, -1), aim, reduction="batchmean")

    return fit(student, loss, torch.optim.Adam(student.parameters(), lr=3e-3), 60)


def _above(value: float, limit: float) -> float:
    assert value > limit, f"{value:.4g} is not above {limit:g}"
    return value


# Healthy runs.


def falls_by(amount: float) -> Proof:
    """The median of the last tenth of the losses is lower by an amount than that of the first, whatever their signs; all are finite."""

    def proof(plain: Plain) -> str:
        tenth = max(1, len(plain.losses) // 10)
        a, b = median(plain.losses[:tenth]), median(plain.losses[-tenth:])
        assert all(map(math.isfinite, plain.losses)), "a loss is not finite"
        assert a - b > amount, f"the loss goes from {a:.4g} to {b:.4g}, not down by {amount:g}"
        return f"the loss falls from {a:.4g} to {b:.4g}"

    return proof


@healthy(
    CASES,
    "hp_reinforce_with_moving_baseline",
    source="https://doi.org/10.1007/BF00992696 Williams 1992: REINFORCE with a baseline; pay is noisy, the loss changes sign",
    proof=noted_gain("reward", 0.45, 0.62, "the mean pay"),
)
def _(seed: int) -> Setup:
    policy, arms = mlp(nn.ReLU, 1, 48, 8, 4), Arms(seed, batch=16)
    notes = keep_notes(policy, "reward")
    baseline = 0.0

    def loss(i: int) -> Tensor:
        nonlocal baseline
        x = arms.contexts()
        logits = policy(x)
        arm = arms.draw(logits)
        paid = arms.pay(x, arm)
        notes["reward"].append(float(paid.mean()))
        reward = paid + 0.3 * torch.randn(len(paid), generator=arms.generator)
        baseline = 0.9 * baseline + 0.1 * float(reward.mean())
        return -((reward - baseline) * F.log_softmax(logits, -1).gather(1, arm[:, None])[:, 0]).mean()

    return fit(policy, loss, torch.optim.Adam(policy.parameters(), lr=5e-3), 350)


@healthy(
    CASES,
    "hp_ppo_with_entropy_bonus",
    source="https://arxiv.org/abs/1707.06347 PPO: several updates on a batch, many of its terms clipped, an entropy bonus",
    proof=noted_gain("reward", 0.55, 0.75, "the mean pay"),
)
def _(seed: int) -> Setup:
    return ppo(ActorCritic(width=48), Arms(seed, batch=64), 360, 4, lambda i: 6e-3 * (1 - 0.9 * i / 360))


@healthy(
    CASES,
    "hp_dqn_rare_rewards_and_target_network",
    source="https://docs.pytorch.org/tutorials/intermediate/reinforcement_q_learning.html replay of what the agent does itself",
    proof=noted_gain("reward", 0.3, 0.6, "the share of walkers that are paid"),
)
def _(seed: int) -> Setup:
    q = nn.Sequential(nn.Linear(4, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 3))
    target = copy.deepcopy(q)  # as in the tutorial: only no_grad() keeps it from gradients
    optimizer = torch.optim.AdamW(q.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    notes = keep_notes(q, "reward")

    def train() -> Iterator[Event]:
        memory: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        angle = 3.1416 + 0.5 * torch.randn(24, generator=generator)  # all begin on the far side
        for i in range(350):
            s = Replay.see(angle)
            with torch.no_grad():
                action = q(s).argmax(1)
            stray = torch.rand(24, generator=generator) < max(0.1, 1 - i / 120)
            action = torch.where(stray, torch.randint(3, (24,), generator=generator), action)
            angle = angle + 0.4 * (action - 1) + 0.05 * torch.randn(24, generator=generator)
            reward = (torch.cos(angle) > 0.85).float()
            notes["reward"].append(float(reward.mean()))
            memory.append((s, action, reward, Replay.see(angle)))
            lost = torch.rand(24, generator=generator) < 0.03
            angle = torch.where(lost, 3.1416 + 0.5 * torch.randn(24, generator=generator), angle)
            some = torch.randint(len(memory), (6,), generator=generator).tolist()
            s, a, r, after = (torch.cat([memory[k][part] for k in some]) for part in range(4))
            with torch.no_grad():
                aim = r + 0.8 * target(after).max(1).values
            loss = F.smooth_l1_loss(q(s).gather(1, a[:, None])[:, 0], aim)
            optimizer.zero_grad()
            loss.backward()
            yield "read", [loss]
            nn.utils.clip_grad_value_(q.parameters(), 100)
            optimizer.step()
            if i % 10 == 9:
                target.load_state_dict(q.state_dict())
            yield "step", [optimizer]

    return Setup({"q": q, "target": target}, train)


@healthy(
    CASES,
    "hp_deterministic_policy_gradient",
    source="https://arxiv.org/abs/1509.02971 an actor that climbs its critic: two optimizers, soft target networks",
    proof=noted_gain("reward", -0.25, -0.12, "the mean reward"),
)
def _(seed: int) -> Setup:
    actor = nn.Sequential(nn.Linear(4, 48), nn.ReLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, 1), nn.Tanh())
    critic = nn.Sequential(nn.Linear(5, 48), nn.ReLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, 1))
    slow_actor, slow_critic = copy.deepcopy(actor).requires_grad_(False), copy.deepcopy(critic).requires_grad_(False)
    first, second = torch.optim.Adam(actor.parameters(), lr=2e-3), torch.optim.Adam(critic.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(seed)
    way = 1.5 * F.normalize(torch.randn(4, generator=generator), dim=0)
    notes = keep_notes(actor, "reward")

    def pay(s: Tensor, a: Tensor) -> Tensor:
        return -((a - 0.8 * torch.sin(s @ way)[:, None]) ** 2)

    def train() -> Iterator[Event]:
        for _ in range(180):
            s, after = torch.randn(2, 64, 4, generator=generator)
            with torch.no_grad():
                tried = (actor(s) + 0.4 * torch.randn(64, 1, generator=generator)).clamp(-1, 1)
                aim = pay(s, tried) + 0.3 * slow_critic(torch.cat([after, slow_actor(after)], 1))
                notes["reward"].append(float(pay(s, actor(s)).mean()))
            loss = F.mse_loss(critic(torch.cat([s, tried], 1)), aim)
            second.zero_grad()
            loss.backward()
            yield "read", [loss]
            second.step()
            yield "step", [second]
            loss = -critic(torch.cat([s, actor(s)], 1)).mean()
            first.zero_grad()
            loss.backward()  # leaves gradients in the critic, which it clears before its own
            yield "read", [loss]
            first.step()
            for slow, fast in ((slow_actor, actor), (slow_critic, critic)):
                for p, now in zip(slow.parameters(), fast.parameters(), strict=True):
                    p.data.lerp_(now.data, 0.05)
            yield "step", [first]

    return Setup({"actor": actor, "critic": critic, "slow_actor": slow_actor, "slow_critic": slow_critic}, train)


@healthy(
    CASES,
    "hp_gan_at_its_equilibrium",
    source="https://arxiv.org/abs/1801.04406 a GAN with the R1 penalty: its losses stay at log 4 and log 2 while the samples get better",
    proof=noted_gain("near", -0.7, -0.35, "minus the distance of samples from the cloud"),
)
def _(seed: int) -> Setup:
    generator = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    discriminator = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
    first = torch.optim.Adam(generator.parameters(), lr=2e-3, betas=(0.5, 0.999))
    second = torch.optim.Adam(discriminator.parameters(), lr=4e-3, betas=(0.5, 0.999))
    cloud = Cloud(seed)
    notes = keep_notes(generator, "near")

    def train() -> Iterator[Event]:
        for _ in range(190):
            fake = generator(cloud.noise())
            real = cloud().requires_grad_()
            said = discriminator(real)
            (slope,) = torch.autograd.grad(said.sum(), real, create_graph=True)
            loss = F.softplus(-said).mean() + F.softplus(discriminator(fake.detach())).mean()
            loss = loss + 0.5 * slope.square().sum(1).mean()
            second.zero_grad()
            loss.backward()
            yield "read", [loss]
            second.step()
            yield "step", [second]
            first.zero_grad()
            loss = F.softplus(-discriminator(fake)).mean()
            loss.backward()
            yield "read", [loss]
            first.step()
            notes["near"].append(-cloud.off(fake))
            yield "step", [first]

    return Setup({"generator": generator, "discriminator": discriminator}, train)


@healthy(
    CASES,
    "hp_wasserstein_gan_with_penalty",
    source="https://arxiv.org/abs/1704.00028 WGAN-GP: three updates of the critic for one of the generator, second derivatives",
    proof=noted_gain("near", -0.7, -0.35, "minus the distance of samples from the cloud"),
)
def _(seed: int) -> Setup:
    generator = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    critic = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 1))
    first = torch.optim.Adam(generator.parameters(), lr=2e-3, betas=(0.0, 0.9))
    schedule = torch.optim.lr_scheduler.LinearLR(first, 1.0, 0.1, 95)
    second = torch.optim.Adam(critic.parameters(), lr=6e-3, betas=(0.0, 0.9))
    cloud = Cloud(seed)
    notes = keep_notes(generator, "near")

    def train() -> Iterator[Event]:
        for i in range(380):
            if i % 4 < 3:
                real = cloud()
                with torch.no_grad():
                    fake = generator(cloud.noise())
                share = torch.rand(cloud.batch, 1, generator=cloud.generator)
                between = (share * real + (1 - share) * fake).requires_grad_()
                (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
                loss = critic(fake).mean() - critic(real).mean() + 0.5 * (slope.norm(dim=1) - 1).square().mean()
                second.zero_grad()
                loss.backward()
                yield "read", [loss]
                second.step()
                yield "step", [second]
            else:
                fake = generator(cloud.noise())
                loss = -critic(fake).mean()
                first.zero_grad()
                loss.backward()
                yield "read", [loss]
                first.step()
                schedule.step()
                notes["near"].append(-cloud.off(fake))
                yield "step", [first]

    return Setup({"generator": generator, "critic": critic}, train)


class BYOL(nn.Module):
    """A student, its predictor, and a teacher that follows the student and never sees a gradient."""

    def __init__(self, inputs: int = 24) -> None:
        super().__init__()
        self.student = nn.Sequential(
            nn.Linear(inputs, 64),
            nn.BatchNorm1d(64),
            nn.ReLU(),
            nn.Linear(64, 32),
            nn.BatchNorm1d(32),
            nn.ReLU(),
            nn.Linear(32, 16),
        )
        self.predictor = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16))
        self.teacher = copy.deepcopy(self.student)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        with torch.no_grad():
            aim_a, aim_b = self.teacher(a), self.teacher(b)
        said_a, said_b = self.predictor(self.student(a)), self.predictor(self.student(b))
        return 2 - F.cosine_similarity(said_a, aim_b).mean() - F.cosine_similarity(said_b, aim_a).mean()

    @torch.no_grad()
    def follow(self, share: float) -> None:
        for p, now in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            p.lerp_(now, share)


def found(a: Tensor, b: Tensor) -> float:
    """Share of things whose other view is the nearest."""
    a, b = F.normalize(a.detach(), dim=1), F.normalize(b.detach(), dim=1)
    return float(((a @ b.T).argmax(1) == torch.arange(len(a))).float().mean())


@healthy(
    CASES,
    "hp_byol_teacher_follows",
    source="https://arxiv.org/abs/2006.07733 BYOL: an exponential average as a teacher, a stop-gradient and a predictor",
    proof=every(converges(0.75), noted("found", 0.5, "share of things whose other view is the nearest", -20)),
)
def _(seed: int) -> Setup:
    model, views = BYOL(), Views(seed, dropped=0.1)
    optimizer = torch.optim.AdamW([*model.student.parameters(), *model.predictor.parameters()], lr=3e-3, weight_decay=1e-3)
    notes = keep_notes(model, "found")

    def train() -> Iterator[Event]:
        for _ in range(200):
            a, b = views()
            loss = model(a, b)
            optimizer.zero_grad()
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            model.follow(0.04)
            with torch.no_grad():
                notes["found"].append(found(model.student(a), model.student(b)))
            yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "hp_simclr_with_warm_restarts",
    source="https://arxiv.org/abs/1608.03983 SGDR: the rate starts again every 40 updates; the loss of SimCLR",
    proof=converges(0.7),
)
def _(seed: int) -> Setup:
    model, views = SimCLR(), Views(seed, dropped=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 40)

    def train() -> Iterator[Event]:
        for _ in range(200):
            a, b = views()
            loss = info_nce(model(a), model(b))
            optimizer.zero_grad()
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            schedule.step()
            yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "hp_distillation_to_tiny_gradients",
    source="https://arxiv.org/abs/1503.02531 a student matches the logits of a frozen teacher; the loss is scaled by 1000",
    proof=converges(2e-3),
)
def _(seed: int) -> Setup:
    teacher = nn.Linear(12, 5).requires_grad_(False)
    student = nn.Sequential(nn.Linear(12, 24), nn.Linear(24, 5))  # a linear teacher: nothing is left over
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400, eta_min=1e-5)

    def train() -> Iterator[Event]:
        for _ in range(400):
            x = torch.randn(128, 12, generator=generator)
            loss = 1000 * F.mse_loss(student(x), teacher(x))
            optimizer.zero_grad()
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            schedule.step()
            yield "step", [optimizer]

    return Setup({"teacher": teacher, "student": student}, train)


@healthy(
    CASES,
    "hp_maml_through_the_inner_steps",
    source="https://arxiv.org/abs/1703.03400 MAML: two inner steps, second-order terms, other tasks in every update",
    proof=converges(0.65),
)
def _(seed: int) -> Setup:
    return maml(seed, 5e-3, 150)


class MixtureDensity(nn.Module):
    def __init__(self, parts: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(1, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh())
        self.share, self.mean, self.scale = nn.Linear(48, parts), nn.Linear(48, parts), nn.Linear(48, parts)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.body(x)
        scale = F.softplus(self.scale(h)) + 0.03  # never narrower than that
        density = torch.distributions.Normal(self.mean(h), scale).log_prob(y)
        return -torch.logsumexp(F.log_softmax(self.share(h), -1) + density, -1).mean()


@healthy(
    CASES,
    "hp_mixture_density_below_zero",
    source="https://discuss.pytorch.org/t/mixture-density-network/108250 a mixture density network; its loss becomes negative",
    proof=falls_by(0.4),
)
def _(seed: int) -> Setup:
    model, generator = MixtureDensity(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def loss(i: int) -> Tensor:
        x = 2 * torch.rand(256, 1, generator=generator) - 1
        branch = torch.randint(2, (256, 1), generator=generator) * 2.0 - 1
        y = 0.5 * (branch * (0.4 + 0.5 * x.square()) + 0.15 * torch.randn(256, 1, generator=generator))
        out: Tensor = model(x, y)
        return out

    return fit(model, loss, optimizer, 300)


class Coupling(nn.Module):
    """An affine coupling that begins as the identity."""

    def __init__(self, first: bool, width: int = 32) -> None:
        super().__init__()
        self.first = first
        self.net = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))
        last = self.net[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, 1) if self.first else x.flip(1).chunk(2, 1)
        log_scale, shift = self.net(a).chunk(2, 1)
        log_scale = 2 * torch.tanh(log_scale / 2)
        b = b * log_scale.exp() + shift
        return torch.cat([a, b] if self.first else [b, a], 1), log_scale[:, 0]


class Flow(nn.Module):
    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Coupling(k % 2 == 0) for k in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(len(x))
        for layer in self.layers:
            x, log_scale = layer(x)
            total = total + log_scale
        return (0.5 * x.square().sum(1) + math.log(2 * math.pi) - total).mean()


@healthy(
    CASES,
    "hp_flow_from_the_identity",
    source="https://arxiv.org/abs/1605.08803 RealNVP; last layers begin at zero, the loss goes from above zero to below",
    proof=falls_by(0.5),
)
def _(seed: int) -> Setup:
    model, ring = Flow(), Ring(seed, 256)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    def loss(i: int) -> Tensor:
        out: Tensor = model(0.25 * ring())
        return out

    return fit(model, loss, optimizer, 250)


@healthy(
    CASES,
    "hp_physics_informed_oscillation",
    source="https://arxiv.org/abs/1711.10561 a physics-informed network; second derivatives, the whole loss scaled by 0.001",
    proof=converges(0.05),
)
def _(seed: int) -> Setup:
    model = mlp(nn.Tanh, 2, 32, 1, 1)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)

    def loss(i: int) -> Tensor:
        t = (2 * torch.rand(64, 1, generator=generator) - 1).requires_grad_()
        u = model(t)
        (slope,) = torch.autograd.grad(u.sum(), t, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), t, create_graph=True)
        residual = bend + 4 * u  # u'' = -4 u, u(-1) = -sin 2, u(1) = sin 2
        ends = model(torch.tensor([[-1.0], [1.0]])) - torch.tensor([[-math.sin(2.0)], [math.sin(2.0)]])
        total: Tensor = 1e-3 * (residual.square().mean() + 10 * ends.square().mean())
        return total

    return fit(model, loss, optimizer, 350)


class TwoTasks(nn.Module):
    """A graph network with a head for each of two tasks, and a probe that must not disturb it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Convolve(12, 32), Convolve(32, 32)
        self.community, self.around, self.probe = nn.Linear(32, 3), nn.Linear(32, 1), nn.Linear(32, 2)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        h = F.relu(self.first(x, adjacency))
        return F.relu(self.second(h, adjacency))


@healthy(
    CASES,
    "hp_graph_heads_used_in_turn",
    source="https://arxiv.org/abs/1610.01644 a probe on detached features; two tasks in turn, the second in every fourth update",
    proof=every(
        noted_gain("community", 0.8, 0.86, "the accuracy of the communities"),
        noted_gain("probe", 0.85, 0.87, "the accuracy of the probe"),
        noted_gain("around", -0.9, -0.7, "minus the share of the second task that is left"),
    ),
)
def _(seed: int) -> Setup:
    model, data = TwoTasks(), Communities(seed, spread=2.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    notes = keep_notes(model, "community", "probe", "around")

    def train() -> Iterator[Event]:
        for i in range(240):
            x, adjacency, y = data()
            h = model(x, adjacency)
            probed = F.cross_entropy(model.probe(h.detach()), (y > 0).long())
            if i % 4 == 3:
                size = adjacency.float().sum(1, keepdim=True)
                around = adjacency.float() @ x.sum(1, keepdim=True) / size / 4  # of the features near a node
                loss = 0.5 * F.mse_loss(model.around(h), around)
                notes["around"].append(-2 * float(loss / around.var()))
            else:
                logits = model.community(h)
                loss = F.cross_entropy(logits, y)
                notes["community"].append(float((logits.argmax(1) == y).float().mean()))
            notes["probe"].append(float((model.probe(h).argmax(1) == (y > 0)).float().mean()))
            optimizer.zero_grad()
            (loss + probed).backward()
            yield "read", [loss + probed]
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)
