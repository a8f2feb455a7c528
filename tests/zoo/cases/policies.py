"""Runs of policies, critics and generative models: reinforcement learning, imitation, GANs, VAEs, flows, denoisers, meta-learning.

Every sick run can be built without its fault (`sound=True`): that one trains.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from tests.zoo import proofs
from tests.zoo.case import Case, Event, Proof, Setup, fit, healthy, initialise, mlp, sick
from tests.zoo.plain import Plain
from tests.zoo.proofs import every

CASES: list[Case] = []

Models = nn.Module | Mapping[str, nn.Module]


@dataclass
class Noted(Setup):
    """A run that notes a number an update for its proof."""

    notes: list[float] = field(default_factory=list)


def part(models: Models, name: str) -> nn.Module:
    """A model of a mapping."""
    assert not isinstance(models, nn.Module)
    return models[name]


def reaches(what: str, measure: Callable[[Models], float], above: float = -math.inf, below: float = math.inf) -> Proof:
    """A quality of the trained model lies within bounds, the untrained one's (of a fresh build) does not, and no loss is NaN or Inf."""

    def proof(plain: Plain) -> str:
        assert all(math.isfinite(x) for x in plain.losses), "a loss is not finite"
        torch.manual_seed(77)
        start = measure(plain.case.build(77).model)
        end = measure(plain.setup.model)
        assert above < end < below, f"{what} ends at {end:.4g}, not in {above:g}..{below:g}"
        assert not above < start < below, f"{what} is {start:.4g} before any training"
        return f"{what}: {start:.4g} untrained, {end:.4g} trained"

    return proof


def loss_stays_high(above: float, first: int = 0, last: int | None = None) -> Proof:
    """The median of the losses of these updates is above `above` times the first."""

    def proof(plain: Plain) -> str:
        ratio = median(plain.losses[first:last]) / plain.losses[0]
        assert ratio > above, f"the loss is at {ratio:.3g} of its first value"
        return f"the loss is at {ratio:.3g} of its first value"

    return proof


class Demonstrations:
    """States and what an expert does in them: the best of some actions by a fixed random linear rule."""

    def __init__(self, seed: int, features: int = 12, actions: int = 5, batch: int = 32) -> None:
        self.generator = torch.Generator().manual_seed(4000 + seed)
        self.rule = torch.randn(features, actions, generator=self.generator)
        self.features, self.actions, self.batch = features, actions, batch

    def __call__(self) -> tuple[Tensor, Tensor]:
        s = torch.randn(self.batch, self.features, generator=self.generator)
        return s, (s @ self.rule).argmax(-1)


class Ring:
    """Points on a noisy ring of two dimensions, of radius 1."""

    def __init__(self, seed: int, batch: int = 64) -> None:
        self.generator = torch.Generator().manual_seed(5000 + seed)
        self.batch = batch

    def __call__(self) -> Tensor:
        angle = 2 * math.pi * torch.rand(self.batch, generator=self.generator)
        points = torch.stack([angle.cos(), angle.sin()], -1)
        return points + 0.1 * torch.randn(self.batch, 2, generator=self.generator)

    def noise(self, width: int) -> Tensor:
        return torch.randn(self.batch, width, generator=self.generator)


class Values:
    """States and noisy returns, a smooth function of the state of unit scale."""

    def __init__(self, seed: int, features: int = 8, batch: int = 32, noise: float = 0.1) -> None:
        self.generator = torch.Generator().manual_seed(6000 + seed)
        self.a = torch.randn(features, 4, generator=self.generator) / math.sqrt(features)
        self.features, self.batch, self.noise = features, batch, noise

    def __call__(self) -> tuple[Tensor, Tensor]:
        s = torch.randn(self.batch, self.features, generator=self.generator)
        value = torch.tanh(s @ self.a).sum(-1, keepdim=True) / 1.3
        return s, value + self.noise * torch.randn(self.batch, 1, generator=self.generator)


class VAE(nn.Module):
    """A small VAE of vectors."""

    def __init__(self, data: int = 16, hidden: int = 32, latent: int = 3) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(data, hidden), nn.ELU())
        self.to_mean, self.to_logvar = nn.Linear(hidden, latent), nn.Linear(hidden, latent)
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.ELU(), nn.Linear(hidden, data))

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.encoder(x)
        mean, logvar = self.to_mean(h), self.to_logvar(h)
        return self.decoder(mean + noise * (0.5 * logvar).exp()), mean, logvar


def kl(mean: Tensor, logvar: Tensor) -> Tensor:
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(-1).mean()


class Latent:
    """Vectors that are a linear map of a few latent numbers, with a little noise."""

    def __init__(self, seed: int, data: int = 16, latent: int = 3, batch: int = 32) -> None:
        self.generator = torch.Generator().manual_seed(7000 + seed)
        self.a = torch.randn(latent, data, generator=self.generator) / math.sqrt(latent)
        self.batch, self.latent = batch, latent

    def __call__(self) -> Tensor:
        z = torch.randn(self.batch, self.latent, generator=self.generator)
        return z @ self.a + 0.1 * torch.randn(self.batch, self.a.shape[1], generator=self.generator)

    def noise(self) -> Tensor:
        return torch.randn(self.batch, self.latent, generator=self.generator)


# ---------------------------------------------------------------------------------------------------------------- sick


@sick(
    CASES,
    "po_imitation_softmax_head_and_cross_entropy",
    ("double_softmax",),
    ("5",),
    source="https://github.com/keras-team/keras-io/issues/550 whether the actor needs a softmax of its own; here it gets a second one",
    proof=lambda plain: _sums_to_one(plain, "5"),
)
def _(seed: int, sound: bool = False) -> Setup:
    layers = [nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 5)]
    model = nn.Sequential(*layers, *([] if sound else [nn.Softmax(-1)]))
    data = Demonstrations(seed)

    def loss(i: int) -> Tensor:
        s, a = data()
        return F.cross_entropy(model(s), a)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 60)


def _sums_to_one(plain: Plain, module: str) -> str:
    """The outputs that go into the cross-entropy are probabilities, so the loss has a floor that it cannot pass."""
    outs = [o for o in plain.outputs[module] if o is not None]
    assert all(o.low >= 0 and o.high <= 1 for o in outs), "not probabilities"
    floor = math.log(1 + 4 * math.exp(-1.0))
    assert min(plain.losses) >= floor - 1e-5, "the loss passes the floor of a double softmax"
    return f"{module} gives numbers in [0, 1], and the loss stays at {min(plain.losses):.3g} or more, above the floor {floor:.3g}"


@sick(
    CASES,
    "po_ddpg_critic_never_zeroed",
    ("gradients_not_zeroed",),
    ("critic",),
    source="https://github.com/vy007vikas/PyTorch-ActorCriticRL/issues/7 where the critic's zero_grad belongs in DDPG",
    proof=lambda plain: _piles_up(plain),
)
def _(seed: int, sound: bool = False) -> Setup:
    actor = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 2), nn.Tanh())
    critic = nn.Sequential(nn.Linear(8, 64), nn.SiLU(), nn.Linear(64, 1))
    gen = torch.Generator().manual_seed(100 + seed)
    best = torch.randn(6, 2, generator=gen) / 6
    opt_a, opt_c = torch.optim.Adam(actor.parameters(), lr=1e-3), torch.optim.Adam(critic.parameters(), lr=1e-2)
    notes: list[float] = []

    def train() -> Iterator[Event]:
        for _ in range(40 if not sound else 150):
            s = torch.randn(64, 6, generator=gen)
            a = (actor(s).detach() + 0.5 * torch.randn(64, 2, generator=gen)).clamp(-1, 1)
            reward = 1 - (a - s @ best).square().sum(-1, keepdim=True)
            if sound:
                opt_c.zero_grad()
            left = critic[2].bias.grad
            notes.append(0.0 if left is None else float(left.abs().sum()))  # type: ignore[operator]
            value = F.mse_loss(critic(torch.cat([s, a], -1)), reward)
            value.backward()
            yield "read", [value]
            opt_c.step()
            yield "step", [opt_c]
            opt_a.zero_grad()
            gain = -critic(torch.cat([s, actor(s)], -1)).mean()
            gain.backward()
            yield "read", [gain]
            opt_a.step()
            yield "step", [opt_a]

    return Noted({"actor": actor, "critic": critic}, train, notes)


def _piles_up(plain: Plain) -> str:
    """What lies in the critic's last bias's gradient before the critic's backward; the actor's loss adds -1 to it each time."""
    assert isinstance(plain.setup, Noted)
    assert all(n > 0.1 for n in plain.setup.notes[1:15]), f"{plain.setup.notes[:15]}"
    grads = plain.grads["critic.2.bias"]
    jumps = [abs(b - a) for a, b in zip(grads[2:14:2], grads[3:15:2], strict=True)]
    assert all(abs(j - 1) < 1e-3 for j in jumps[1:]), f"{jumps}"
    return f"the gradient of critic.2.bias goes from {grads[0]:.3g} to {grads[14]:.3g}, and none of it is cleared before a backward pass"


@sick(
    CASES,
    "po_vae_variance_head_without_optimizer",
    ("not_in_optimizer",),
    ("to_logvar",),
    source="https://arxiv.org/abs/1312.6114 a VAE whose optimizer is given its parts one by one, and one of them is forgotten",
    proof=lambda plain: _left_out(plain, ("to_logvar.weight", "to_logvar.bias"), ("to_mean.weight", "decoder.0.weight")),
)
def _(seed: int, sound: bool = False) -> Setup:
    model, data = VAE(), Latent(seed)
    parts = [model.encoder, model.to_mean, model.decoder, *([model.to_logvar] if sound else [])]
    optimizer = torch.optim.Adam([p for m in parts for p in m.parameters()], lr=5e-3)

    def loss(i: int) -> Tensor:
        x = data()
        out, mean, logvar = model(x, data.noise())
        total: Tensor = (out - x).square().sum(-1).mean() + 0.1 * kl(mean, logvar)
        return total

    # zero_grad of the model, so that nothing piles up in what the optimizer does not know
    return fit(model, loss, optimizer, 60, before=lambda i: model.zero_grad())


def _left_out(plain: Plain, forgotten: tuple[str, ...], others: tuple[str, ...], every_nth: int = 1) -> str:
    """The forgotten parameters have gradients and never move; others move."""
    for name in forgotten:
        assert all(s == 0 for s in plain.steps[name] if not math.isnan(s)), f"{name} moves"
        assert all(g > 0 for g in plain.grads[name][every_nth - 1 :: every_nth]), f"{name} has no gradient"
    for name in others:
        assert sum(s > 0 for s in plain.steps[name]) > 5, f"{name} does not move"
    return f"{', '.join(forgotten)}: gradients, but no step moves them, though {', '.join(others)} move"


def _gan(seed: int, width: int = 32) -> tuple[nn.Sequential, nn.Sequential, Ring]:
    g = nn.Sequential(nn.Linear(4, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2), nn.Linear(width, 2))
    d = nn.Sequential(nn.Linear(2, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2), nn.Linear(width, 1))
    return g, d, Ring(seed)


def _play(
    g: nn.Module,
    d: nn.Module,
    ring: Ring,
    opt_g: torch.optim.Optimizer,
    opt_d: torch.optim.Optimizer,
    rounds: int,
    detach: bool = False,
) -> Iterator[Event]:
    """The usual alternation with the non-saturating loss. `detach`: the generator's loss gets detached samples."""
    for _ in range(rounds):
        real, fake = ring(), g(ring.noise(4))
        d.zero_grad()
        loss_d = F.softplus(-d(real)).mean() + F.softplus(d(fake.detach())).mean()
        loss_d.backward()
        yield "read", [loss_d]
        opt_d.step()
        yield "step", [opt_d]
        g.zero_grad()
        d.zero_grad()
        loss_g = F.softplus(-d(fake.detach() if detach else fake)).mean()
        loss_g.backward()
        yield "read", [loss_g]
        opt_g.step()
        yield "step", [opt_g]


@sick(
    CASES,
    "po_gan_both_optimizers_of_the_discriminator",
    ("not_in_optimizer",),
    ("generator",),
    source="https://arxiv.org/abs/1406.2661 a GAN whose second optimizer line is a copy of the first",
    proof=lambda plain: _left_out(plain, ("generator.0.weight", "generator.4.weight"), ("discriminator.0.weight",), 2),
)
def _(seed: int, sound: bool = False) -> Setup:
    g, d, ring = _gan(seed)
    opt_d = torch.optim.Adam(d.parameters(), lr=1e-3, betas=(0.5, 0.99))
    opt_g = torch.optim.Adam(g.parameters() if sound else d.parameters(), lr=1e-3, betas=(0.5, 0.99))
    return Setup({"generator": g, "discriminator": d}, lambda: _play(g, d, ring, opt_g, opt_d, 30 if not sound else 300))


@sick(
    CASES,
    "po_gan_generator_loss_of_detached_samples",
    ("missing_gradient",),
    ("g",),
    source="https://jishuzhan.net/article/1706211350813872129 when a GAN needs detach, and when it must not have it",
    proof=proofs.no_gradient("g.0.weight", "g.2.weight", "g.4.weight", "g.4.bias"),
)
def _(seed: int, sound: bool = False) -> Setup:
    g, d, ring = _gan(seed, 24)
    opt_d, opt_g = torch.optim.RMSprop(d.parameters(), lr=5e-4), torch.optim.RMSprop(g.parameters(), lr=5e-4)
    return Setup({"g": g, "d": d}, lambda: _play(g, d, ring, opt_g, opt_d, 30 if not sound else 300, detach=not sound))


class World(nn.Module):
    """A world model: the next state and the reward, from state and action. `heads`: those that the forward pass uses."""

    def __init__(self, reward: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU())
        self.dynamics = nn.Linear(48, 6)
        self.reward_head = nn.Sequential(nn.Linear(48, 16), nn.SiLU(), nn.Linear(16, 1))
        self.reward = reward

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        h = self.body(x)
        return self.dynamics(h), self.reward_head(h) if self.reward else None


@sick(
    CASES,
    "po_world_model_reward_head_never_called",
    ("missing_gradient",),
    ("reward_head",),
    source="https://arxiv.org/abs/1803.10122 a world model; its reward head is built, but the forward pass ends before it",
    proof=proofs.no_gradient("reward_head.0.weight", "reward_head.2.weight", "reward_head.2.bias"),
)
def _(seed: int, sound: bool = False) -> Setup:
    model = World(reward=sound)
    gen = torch.Generator().manual_seed(200 + seed)
    a = torch.randn(8, 6, generator=gen) / math.sqrt(8)

    def loss(i: int) -> Tensor:
        x = torch.randn(48, 8, generator=gen)
        after, reward = model(x)
        total = F.mse_loss(after, torch.tanh(x @ a))
        return total if reward is None else total + F.mse_loss(reward, x[:, :1].abs())

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01), 60)


@sick(
    CASES,
    "po_gail_discriminator_prior_bias_in_every_layer",
    ("dead_units",),
    ("0", "1", "2", "3"),
    also=("poor_init", "zero_gradient", "vanishing_gradient"),
    source="https://arxiv.org/abs/1708.02002 the rare-class prior as a bias of -2.9, meant for the last layer, set in all of them",
    proof=every(proofs.dead_fraction("1", 0.8, last=12), proofs.dead_fraction("3", 0.8, last=12)),
)
def _(seed: int, sound: bool = False) -> Setup:
    model = mlp(nn.ReLU, 2, 48, inputs=10, outputs=1)
    data = Values(seed, features=10, batch=64)
    for m in model:
        if isinstance(m, nn.Linear) and (not sound or m.out_features == 1):
            nn.init.constant_(m.bias, -math.log((1 - 0.05) / 0.05))

    def loss(i: int) -> Tensor:
        s, v = data()
        return F.binary_cross_entropy_with_logits(model(s), (v > 1.2).float())

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-3), 40)


@sick(
    CASES,
    "po_value_net_saturated_by_standard_normal_weights",
    ("saturated_activation", "poor_init"),
    ("0", "1", "2", "3"),
    source="https://proceedings.mlr.press/v9/glorot10a.html tanh units saturate where weights are drawn too large",
    proof=lambda plain: _flat(plain, ("1", "3")),
)
def _(seed: int, sound: bool = False) -> Setup:
    model = mlp(nn.Tanh, 2, 96, inputs=48, outputs=1)
    if not sound:
        nn.init.normal_(model[0].weight)  # type: ignore[arg-type]
        nn.init.normal_(model[2].weight)  # type: ignore[arg-type]
    data = Values(seed, features=48, batch=64)

    def loss(i: int) -> Tensor:
        s, v = data()
        return F.mse_loss(model(s), v)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-3), 60 if not sound else 150)


def _flat(plain: Plain, modules: tuple[str, ...], above: float = 0.93) -> str:
    """RMS of tanh outputs near 1 means that almost all of them are in the flat part."""
    for name in modules:
        for o in plain.outputs[name][:12]:
            assert o is not None
            assert o.rms > above, f"{name}: {o.rms:.3g}"
    first = plain.outputs[modules[0]][0]
    assert first is not None
    return f"the outputs of {', '.join(modules)} have an RMS of {first.rms:.3g} and the like, so their local derivative is mostly near 0"


@sick(
    CASES,
    "po_critic_of_eight_sigmoid_layers",
    ("vanishing_gradient",),
    tuple(str(i) for i in range(10)),
    source="https://proceedings.mlr.press/v9/glorot10a.html deep sigmoid networks; here as the critic of a policy",
    proof=every(
        proofs.gradient_ratio("0.weight", "16.bias", 1e-4, last=12),
        proofs.loss_stays(0.2, last=12),
        lambda plain: _moves(plain, "0.weight", "2.weight"),
    ),
)
def _(seed: int, sound: bool = False) -> Setup:
    model = mlp(nn.Tanh if sound else nn.Sigmoid, 8, 32, inputs=8, outputs=1)
    initialise(model, nn.init.xavier_uniform_)
    data = Values(seed)

    def loss(i: int) -> Tensor:
        s, v = data()
        return F.smooth_l1_loss(model(s), v)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9), 60 if not sound else 200)


class Equilibrium(nn.Module):
    """Iterates z to a fixed point. `inject`: the input enters every iteration, as it should, and not only as the first z."""

    def __init__(self, inject: bool, width: int = 24, iterations: int = 18) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, width))
        self.cell = nn.Linear(width, width)
        nn.init.orthogonal_(self.cell.weight, gain=0.5)
        self.head = nn.Linear(width, 1)
        self.inject, self.iterations = inject, iterations

    def forward(self, s: Tensor) -> Tensor:
        x = self.encoder(s)
        z = torch.zeros_like(x) if self.inject else x
        for _ in range(self.iterations):
            z = torch.tanh(self.cell(z) + (x if self.inject else 0))
        out: Tensor = self.head(z)
        return out


@sick(
    CASES,
    "po_implicit_layer_forgets_its_input",
    ("vanishing_gradient",),
    ("encoder",),
    source="https://arxiv.org/abs/1909.01377 deep equilibrium models inject the input into every iteration; here it only starts them",
    proof=every(
        proofs.gradient_ratio("encoder.2.weight", "head.bias", 1e-3, last=12),
        proofs.gradient_ratio("encoder.0.weight", "cell.bias", 1e-3, last=12),
        lambda plain: _moves(plain, "encoder.2.weight"),
        proofs.loss_stays(0.25, last=30),
    ),
)
def _(seed: int, sound: bool = False) -> Setup:
    model, data = Equilibrium(sound), Values(seed, batch=64)

    def loss(i: int) -> Tensor:
        s, v = data()
        return F.mse_loss(model(s), v)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.1), 50 if not sound else 150)


class Levels(torch.autograd.Function):
    """Rounds to levels of 1/8. The backward of the mistaken one multiplies by 8 (it undoes the scaling twice)."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor  # type: ignore[attr-defined]
        return (x * 8).round() / 8

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None  # type: ignore[attr-defined]


class Rounded(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Levels.apply(x, self.factor)  # type: ignore[no-untyped-call]
        return out


@sick(
    CASES,
    "po_quantised_policy_straight_through_times_eight",
    ("exploding_gradient",),
    ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11"),
    source="https://arxiv.org/abs/1308.3432 straight-through estimators; here the backward multiplies by the number of levels",
    proof=every(
        proofs.gradient_ratio("15.weight", "0.weight", 1e-3, last=12),
        proofs.gradient_ratio("15.weight", "3.weight", 1e-2, last=12),
        proofs.gradient_ratio("3.weight", "0.weight", 0.3, last=12),
    ),
)
def _(seed: int, sound: bool = False) -> Setup:
    layers: list[nn.Module] = []
    for a in (12, 40, 40, 40, 40):
        layers += [nn.Linear(a, 40), nn.ReLU(), Rounded(1.0 if sound else 8.0)]
    model = nn.Sequential(*layers, nn.Linear(40, 5))
    for m in model:
        if isinstance(m, nn.Linear):
            nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
            nn.init.zeros_(m.bias)
    data = Demonstrations(seed)

    def loss(i: int) -> Tensor:
        s, a = data()
        return F.cross_entropy(model(s), a)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 50)


@sick(
    CASES,
    "po_q_learning_bootstraps_off_policy",
    ("loss_diverging", "exploding_gradient"),
    also=("update_ratio_too_large",),
    source="http://incompleteideas.net/book/the-book-2nd.html section 11.2, Baird's counterexample: off-policy TD diverges",
    proof=every(proofs.loss_grows(20, last=15), proofs.gradient_grows("weight", 5, 14)),
)
def _(seed: int, sound: bool = False) -> Setup:
    # Baird's star: seven states of eight features; the target policy always goes to the seventh, updates fall on all alike.
    features = torch.cat([2 * torch.eye(7), torch.ones(7, 1)], 1)
    features[6, 6], features[6, 7] = 1.0, 2.0
    gen = torch.Generator().manual_seed(300 + seed)
    model = nn.Linear(8, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(1 + 0.1 * torch.randn(1, 8, generator=gen))
        model.weight[0, 6] = 10.0
    own = torch.cat([features[:6], features[6:]])

    def loss(i: int) -> Tensor:
        after = features[6:] if not sound else features  # sound: values of the states' own policy, which stays where it is
        with torch.no_grad():
            target = 0.99 * model(after)
        total: Tensor = (model(own) - target).square().sum() / 2
        return total

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.1), 40)


class Denoiser(nn.Module):
    """Predicts the noise in points of two dimensions, given the time in [0, 1]."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.inp, self.mid, self.out = nn.Linear(2 + 8, width), nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t * torch.tensor([1.0, 2.0, 4.0, 8.0]) * math.pi
        h = F.silu(self.inp(torch.cat([x, angles.sin(), angles.cos()], -1)))
        h = h + F.silu(self.mid(h))
        out: Tensor = self.out(h)
        return out


def denoise(model: nn.Module, ring: Ring) -> Tensor:
    x = 1.4 * ring()
    t = torch.rand(len(x), 1, generator=ring.generator)
    noise = ring.noise(2)
    noisy = (math.pi / 2 * t).cos() * x + (math.pi / 2 * t).sin() * noise
    return F.mse_loss(model(noisy, t), noise)


@sick(
    CASES,
    "po_denoiser_adam_rate_of_sgd",
    ("update_ratio_too_large", "loss_diverging", "exploding_gradient"),
    source="https://arxiv.org/abs/2006.11239 denoising diffusion; Adam is given 0.3, a rate that would do for SGD, in place of 3e-4",
    proof=every(
        proofs.update_ratio(above=0.5, last=4), proofs.loss_grows(20, last=12), proofs.gradient_grows("out.weight", 50, 12)
    ),
)
def _(seed: int, sound: bool = False) -> Setup:
    model, ring = Denoiser(), Ring(seed)
    lr = 3e-3 if sound else 0.3
    return fit(model, lambda i: denoise(model, ring), torch.optim.Adam(model.parameters(), lr=lr), 60)


@sick(
    CASES,
    "po_entropy_bonus_of_masked_actions",
    ("non_finite_loss",),
    onset=14,
    also=("non_finite_gradient", "non_finite_weight", "non_finite_activation"),
    source="https://github.com/Stable-Baselines-Team/stable-baselines3-contrib/pull/302 entropy of actions masked by -inf is NaN",
    proof=every(proofs.first_non_finite(14), lambda plain: _finite_output(plain, "", 14)),
)
def _(seed: int, sound: bool = False) -> Setup:
    model = nn.Sequential(nn.Linear(12, 40), nn.Tanh(), nn.Linear(40, 5))
    data = Demonstrations(seed)
    best = torch.eye(5)

    def loss(i: int) -> Tensor:
        s, a = data()
        logits = model(s)
        if i >= 14:  # from here on some states forbid an action
            forbidden = torch.zeros(32, 5, dtype=torch.bool)
            forbidden[::4, 2] = True
            forbidden &= best[a] == 0
            logits = logits.masked_fill(forbidden, -1e9 if sound else -math.inf)
        logp = F.log_softmax(logits, -1)
        with torch.no_grad():
            uniform = torch.rand(32, 5, generator=data.generator)
            action = (logp - (-uniform.log()).log()).argmax(-1)
            reward = (action == a).float()
            advantage = reward - reward.mean()
        entropy = -(logp.exp() * logp).sum(-1).mean()
        return -(advantage * logp[torch.arange(32), action]).mean() - 0.01 * entropy

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 30)


def _finite_output(plain: Plain, module: str, update: int) -> str:
    out = plain.outputs[module][update]
    assert out is not None
    assert out.nonfinite == 0
    assert not math.isfinite(plain.losses[update])
    return "the network's output is finite there, the loss made of it is not"


@sick(
    CASES,
    "po_state_metric_square_root_of_zero",
    ("non_finite_gradient",),
    onset=18,
    also=("non_finite_weight", "non_finite_activation", "non_finite_loss"),
    source="https://github.com/pytorch/pytorch/issues/2421 the gradient of a norm at zero is NaN",
    proof=every(proofs.first_non_finite(18), lambda plain: _finite_loss(plain, 18)),
)
def _(seed: int, sound: bool = False) -> Setup:
    # An embedding whose distances are those of the states (bisimulation-like); from update 18 on a pair is a state with itself.
    model = nn.Sequential(nn.Linear(10, 32), nn.GELU(), nn.Linear(32, 6))
    gen = torch.Generator().manual_seed(400 + seed)

    def loss(i: int) -> Tensor:
        a, b = torch.randn(32, 10, generator=gen), torch.randn(32, 10, generator=gen)
        if i >= 18:
            b[5] = a[5]
        true = (a[:, :4] - b[:, :4]).square().sum(-1).sqrt()
        square = (model(a) - model(b)).square().sum(-1)
        total: Tensor = (((square + 1e-8) if sound else square).sqrt() - true).square().mean()
        return total

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=5e-3), 30 if not sound else 150)


def _finite_loss(plain: Plain, update: int) -> str:
    assert math.isfinite(plain.losses[update])
    assert all(n > 0 for n in [plain.nonfinite["0.weight"][update], plain.nonfinite["2.weight"][update]])
    return f"the loss of update {update} is finite, the gradients of all weights are not"


class Whiten(nn.Module):
    """Brings every observation to mean 0 and deviation 1 over the batch of environments. `eps`: as it should have."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)) / (x.std(0) + self.eps)


@sick(
    CASES,
    "po_observation_filter_divides_by_no_deviation",
    ("non_finite_activation",),
    ("0",),
    onset=16,
    also=("non_finite_loss", "non_finite_gradient", "non_finite_weight"),
    source="https://github.com/huggingface/lerobot/pull/239 normalisation divides by zero where a state has a fixed value",
    proof=every(proofs.first_non_finite(16, "0"), lambda plain: _first_bad(plain, "0", 16)),
)
def _(seed: int, sound: bool = False) -> Setup:
    model = nn.Sequential(Whiten(1e-5 if sound else 0.0), nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    data = Values(seed)

    def loss(i: int) -> Tensor:
        s, v = data()
        if i >= 16 and i % 4 == 0:  # all environments have just been reset to the same position
            s = torch.cat([torch.full((32, 1), 0.5), s[:, 1:]], 1)
        return F.mse_loss(model(s), v)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-2), 32 if not sound else 100)


def _first_bad(plain: Plain, module: str, update: int) -> str:
    """Loss and gradients are finite before the update."""
    assert all(math.isfinite(x) for x in plain.losses[:update])
    assert not any(c for counts in plain.nonfinite.values() for c in counts[:update])
    return f"all is finite before update {update}, when {module}, of finite inputs, gives NaN"


@sick(
    CASES,
    "po_replay_with_unwritten_slots",
    ("non_finite_input",),
    ("",),
    onset=12,
    also=("non_finite_activation", "non_finite_loss", "non_finite_gradient", "non_finite_weight"),
    source="https://arxiv.org/abs/1312.5602 a replay memory, filled with NaN when made; an index runs past what has been written",
    proof=lambda plain: _bad_slots(plain, 12),
)
def _(seed: int, sound: bool = False) -> Setup:
    model = nn.Sequential(nn.Linear(6, 48), nn.ReLU(), nn.Linear(48, 3))
    target = copy.deepcopy(model)
    gen = torch.Generator().manual_seed(500 + seed)
    memory = torch.full((400, 6), math.nan)
    a = torch.randn(6, 3, generator=gen) / 2
    notes: list[float] = []

    def loss(i: int) -> Tensor:
        written = 80 + 8 * i
        memory[:written] = torch.where(memory[:written].isnan(), torch.randn(written, 6, generator=gen), memory[:written])
        rows = torch.randint(written, (32,), generator=gen)
        if i >= 12 and not sound:
            rows[i % 32] = written + 3  # the transition's successor, one episode past the end
        s = memory[rows]
        notes.append(float(s.isnan().sum()))
        action = torch.randint(3, (32, 1), generator=gen)
        with torch.no_grad():
            goal = torch.tanh(s @ a).gather(1, action) + 0.5 * target(s.roll(1, 0)).amax(-1, keepdim=True)
        if i % 10 == 9:
            target.load_state_dict(model.state_dict())
        return F.smooth_l1_loss(model(s).gather(1, action), goal)

    whole = fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 30)
    return Noted(whole.model, whole.train, notes)


def _bad_slots(plain: Plain, update: int) -> str:
    assert isinstance(plain.setup, Noted)
    notes = plain.setup.notes
    assert all(n == 0 for n in notes[:update]), "NaN before"
    assert notes[update] > 0, "no NaN in the batch"
    assert all(math.isfinite(x) for x in plain.losses[:update])
    assert not math.isfinite(plain.losses[update])
    return f"the batch of update {update} is the first with NaN in it ({notes[update]:.0f} numbers)"


def sines(generator: torch.Generator, shots: int = 10) -> tuple[Tensor, Tensor]:
    """A task of MAML: points of a sine of its own amplitude and phase."""
    amplitude = 0.5 + 1.5 * torch.rand(1, generator=generator)
    phase = math.pi * torch.rand(1, generator=generator)
    x = 4 * torch.rand(shots, 1, generator=generator) - 2
    return x, amplitude * torch.sin(x + phase)


def adapted_loss(model: nn.Module, generator: torch.Generator, rate: float, create_graph: bool = True) -> Tensor:
    """Loss of a task's query set after one inner step on its support set."""
    x, y = sines(generator, 20)
    params: dict[str, Tensor] = dict(model.named_parameters())
    inner = F.mse_loss(functional_call(model, params, (x[:10],)), y[:10])
    grads = torch.autograd.grad(inner, list(params.values()), create_graph=create_graph)
    fast = {name: p - rate * g for (name, p), g in zip(params.items(), grads, strict=True)}
    return F.mse_loss(functional_call(model, fast, (x[10:],)), y[10:])


@sick(
    CASES,
    "po_maml_without_the_outer_step",
    ("never_stepped",),
    source="https://arxiv.org/abs/1703.03400 MAML; the outer loop clears the meta-gradients and forgets to step",
    proof=lambda plain: _still(plain),
)
def _(seed: int, sound: bool = False) -> Setup:
    model = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    gen = torch.Generator().manual_seed(600 + seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def train() -> Iterator[Event]:
        for _ in range(40 if not sound else 150):
            optimizer.zero_grad()
            loss = torch.stack([adapted_loss(model, gen, 0.05) for _ in range(4)]).mean()
            loss.backward()
            yield "read", [loss]
            if sound:
                optimizer.step()
            yield "step", [optimizer] if sound else []

    return Setup(model, train)


def _still(plain: Plain) -> str:
    """Gradients in every update, and weights that are the same at the end."""
    for name, norms in plain.weights.items():
        assert len(set(norms)) == 1, f"{name} changes"
        assert all(g > 0 for g in plain.grads[name])
    return "every parameter has gradients in all updates, and none changes"


@sick(
    CASES,
    "po_ppo_clears_gradients_before_the_step",
    ("frozen_weights",),
    source="https://arxiv.org/abs/1707.06347 PPO, its loop in the order backward, zero_grad, step",
    proof=proofs.unchanged("body.0.weight", "actor.weight", "critic.weight"),
)
def _(seed: int, sound: bool = False) -> Setup:
    model, data = ActorCritic(), Demonstrations(seed)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=2e-3)

    def train() -> Iterator[Event]:
        for _ in range(10 if not sound else 60):
            batch = model.collect(*data(), data.generator)
            for _ in range(3):
                if sound:
                    optimizer.zero_grad()
                loss = model.clipped(*batch)
                loss.backward()
                yield "read", [loss]
                if not sound:
                    optimizer.zero_grad(set_to_none=False)
                optimizer.step()
                yield "step", [optimizer]

    return Setup(model, train)


class ActorCritic(nn.Module):
    """A body with two heads, and PPO's loss for a bandit with states."""

    def __init__(self, features: int = 12, actions: int = 5) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(features, 48), nn.Tanh())
        self.actor, self.critic = nn.Linear(48, actions), nn.Linear(48, 1)
        nn.init.orthogonal_(self.actor.weight, gain=0.01)

    def forward(self, s: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(s)
        return F.log_softmax(self.actor(h), -1), self.critic(h)[:, 0]

    @torch.no_grad()
    def collect(self, s: Tensor, best: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        logp, value = self(s)
        action = torch.multinomial(logp.exp(), 1, generator=generator)
        reward = (action[:, 0] == best).float() + 0.1 * torch.randn(len(s), generator=generator)
        advantage = reward - value
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        return s, action, logp.gather(1, action)[:, 0], advantage, reward

    def clipped(self, s: Tensor, action: Tensor, old: Tensor, advantage: Tensor, reward: Tensor, bonus: float = 0.01) -> Tensor:
        logp, value = self(s)
        ratio = (logp.gather(1, action)[:, 0] - old).exp()
        gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
        entropy = -(logp.exp() * logp).sum(-1).mean()
        total: Tensor = -gain + 0.5 * F.mse_loss(value, reward) - bonus * entropy
        return total

    def skill(self, data: Demonstrations) -> float:
        """Share of states in which the likeliest action is the best."""
        with torch.no_grad():
            hits = [(self(s)[0].argmax(-1) == best).float().mean() for s, best in (data() for _ in range(20))]
        return float(torch.stack(hits).mean())


@sick(
    CASES,
    "po_world_model_encoder_group_at_rate_zero",
    ("frozen_weights",),
    ("encoder",),
    source="https://arxiv.org/abs/1803.10122 a world model in stages; the encoder's group keeps the rate 0 of the stage before",
    proof=every(
        proofs.unchanged("encoder.0.weight", "encoder.0.bias", "encoder.2.weight"), lambda plain: _moves(plain, "rollout.weight_hh")
    ),
)
def _(seed: int, sound: bool = False) -> Setup:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(6, 24), nn.ELU(), nn.Linear(24, 24))
            self.rollout, self.decoder = nn.GRUCell(24, 32), nn.Linear(32, 6)

        def forward(self, s: Tensor) -> Tensor:
            h = torch.zeros(s.shape[0], 32)
            outs = []
            for x in self.encoder(s).unbind(1):
                h = self.rollout(x, h)
                outs.append(self.decoder(h))
            return torch.stack(outs, 1)

    model = Recurrent()
    gen = torch.Generator().manual_seed(700 + seed)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=gen))[0]
    later = [*model.rollout.parameters(), *model.decoder.parameters()]
    groups: list[dict[str, Any]] = [{"params": model.encoder.parameters(), "lr": 5e-3 if sound else 0.0}, {"params": later}]

    def loss(i: int) -> Tensor:
        states = [torch.randn(24, 6, generator=gen)]
        for _ in range(6):
            states.append(states[-1] @ turn)
        path = torch.stack(states, 1)
        return F.mse_loss(model(path[:, :-1]), path[:, 1:])

    return fit(model, loss, torch.optim.Adam(groups, lr=5e-3), 40)


def _moves(plain: Plain, *names: str) -> str:
    for name in names:
        assert all(s > 0 for s in plain.steps[name]), f"{name} stays"
    return f"{', '.join(names)} moves"


@sick(
    CASES,
    "po_energy_model_rate_of_1e_minus_5",
    ("update_ratio_too_small",),
    source="https://arxiv.org/abs/1903.08689 an energy model told from noise; the rate is 1e-5, as for Adam, where SGD needs 1e-1",
    proof=every(
        proofs.update_ratio(below=1e-5), proofs.loss_stays(0.02), lambda plain: _moves(plain, "0.weight", "2.weight", "4.weight")
    ),
)
def _(seed: int, sound: bool = False) -> Setup:
    model, ring = mlp(nn.SiLU, 2, 48, inputs=2, outputs=1), Ring(seed)

    def loss(i: int) -> Tensor:
        return F.softplus(model(ring())).mean() + F.softplus(-model(1.2 * ring.noise(2))).mean()

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=1e-1 if sound else 1e-5, momentum=0.9), 50 if not sound else 200)


@sick(
    CASES,
    "po_imitation_pairs_shuffled_apart",
    ("loss_plateau",),
    within=100,  # the brief's time for a plateau
    source="https://arxiv.org/abs/1611.03530 labels that have nothing to do with the inputs; states and actions are shuffled apart",
    proof=every(proofs.loss_stays(0.02, last=100), proofs.loss_stays(0.02)),
)
def _(seed: int, sound: bool = False) -> Setup:
    model = nn.Sequential(nn.Linear(12, 48), nn.LayerNorm(48), nn.GELU(), nn.Linear(48, 48), nn.GELU(), nn.Linear(48, 5))
    data = Demonstrations(seed, batch=64)

    def loss(i: int) -> Tensor:
        s, a = data()
        if not sound:
            a = a[torch.randperm(64, generator=data.generator)]
        return F.cross_entropy(model(s), a)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=1e-3), 150)


class Codes(nn.Module):
    """An autoencoder with binary codes. `through`: the gradient goes straight through the rounding."""

    def __init__(self, through: bool) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 12))
        self.decoder = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 16))
        self.through = through

    def forward(self, x: Tensor) -> Tensor:
        p = torch.sigmoid(self.encoder(x))
        code = p.round()
        if self.through:
            code = p + (code - p).detach()
        out: Tensor = self.decoder(code - 0.5)
        return out


@sick(
    CASES,
    "po_binary_codes_rounded_without_straight_through",
    ("zero_gradient",),
    ("encoder",),
    also=("vanishing_gradient",),
    source="https://arxiv.org/abs/1711.00937 discrete latents; round() has the derivative 0 and nothing is passed around it",
    proof=every(
        proofs.zero_gradient("encoder.0.weight", "encoder.2.weight", "encoder.2.bias"),
        lambda plain: _moves(plain, "decoder.0.weight"),
    ),
)
def _(seed: int, sound: bool = False) -> Setup:
    model, data = Codes(sound), Latent(seed)

    def loss(i: int) -> Tensor:
        x = data()
        return F.mse_loss(model(x), x)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 50 if not sound else 150)


class Adapted(nn.Module):
    """A frozen linear layer with a low-rank adapter of its own."""

    def __init__(self, base: nn.Linear, rank: int, both_zero: bool) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)
        if both_zero:
            nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


@sick(
    CASES,
    "po_policy_adapters_with_both_factors_zero",
    ("zero_gradient", "poor_init"),
    ("0", "2"),
    source="https://arxiv.org/abs/2106.09685 LoRA sets one factor to zero; here both are, so neither ever gets a gradient",
    proof=proofs.zero_gradient("0.down.weight", "0.up.weight", "2.down.weight", "2.up.weight"),
)
def _(seed: int, sound: bool = False) -> Setup:
    first, second = (Adapted(nn.Linear(a, 48), 6, not sound) for a in (12, 48))
    model = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(48, 5))
    data = Demonstrations(seed)

    def loss(i: int) -> Tensor:
        s, a = data()
        return F.cross_entropy(model(s), a)

    return fit(model, loss, torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2), 50)


@sick(
    CASES,
    "po_value_net_meets_one_unclipped_reward",
    ("gradient_spike", "loss_spike"),
    onset=30,
    source="https://arxiv.org/abs/1312.5602 DQN clips rewards, for their scale varies; here one return of 1000 stands among those of size 1",
    proof=every(proofs.gradient_spikes(30, 50), lambda plain: _loss_spikes(plain, 30, 100)),
)
def _(seed: int, sound: bool = False) -> Setup:
    model, data = mlp(nn.ELU, 2, 48, inputs=8, outputs=1), Values(seed)

    def loss(i: int) -> Tensor:
        s, v = data()
        if i == 30 and not sound:
            v[7] = 1000.0
        return F.mse_loss(model(s), v)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-3), 60)


def _loss_spikes(plain: Plain, update: int, factor: float) -> str:
    ratio = plain.losses[update] / median(plain.losses[:update])
    assert ratio > factor, f"{ratio:.3g}"
    assert plain.losses[update + 1] < plain.losses[update] / 10
    return f"the loss of update {update} is {ratio:.3g} times the median before it, and the next is not"


@sick(
    CASES,
    "po_wgan_penalty_of_a_zeroed_head_under_a_scaler",
    ("loss_scale_collapse", "non_finite_gradient"),
    also=("never_stepped",),
    source="https://github.com/NVIDIA/apex/issues/654 WGAN-GP in mixed precision: gradients overflow until the scale is zero",
    proof=lambda plain: _skips_all(plain),
)
def _(seed: int, sound: bool = False) -> Setup:
    # The critic's head starts at zero, so the penalised norm is the square root of zero; no step is ever taken, and so it stays.
    critic = mlp(nn.SiLU, 2, 32, inputs=2, outputs=1)
    nn.init.zeros_(critic[4].weight)  # type: ignore[arg-type]
    ring = Ring(seed)
    optimizer = torch.optim.Adam(critic.parameters(), lr=2e-3, betas=(0.5, 0.9))
    scaler = torch.amp.GradScaler("cpu")

    def train() -> Iterator[Event]:
        for _ in range(30 if not sound else 120):
            optimizer.zero_grad()
            real, fake = ring(), 0.3 * ring.noise(2)
            loss = critic(fake).mean() - critic(real).mean() + 10 * penalty(critic, real, fake, ring, 1e-12 if sound else 0.0)
            scaler.scale(loss).backward()
            yield "read", [loss]
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            yield "step", [optimizer] if scaler.get_scale() >= before else []

    return Setup(critic, train)


def penalty(critic: nn.Module, real: Tensor, fake: Tensor, ring: Ring, eps: float) -> Tensor:
    """The penalty of WGAN-GP: the norm of the critic's gradient between real and fake points is to be 1."""
    share = torch.rand(len(real), 1, generator=ring.generator)
    x = (share * real + (1 - share) * fake).detach().requires_grad_()
    (slope,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return ((slope.square().sum(-1) + eps).sqrt() - 1).square().mean()


def _skips_all(plain: Plain) -> str:
    """Fifteen halvings bring the scale from 65536 to 2, sixteen and more below 1."""
    bad = [any(counts[i] for counts in plain.nonfinite.values()) for i in range(len(plain.losses))]
    assert all(bad), "some update is finite"
    assert all(math.isfinite(x) for x in plain.losses)
    assert all(len(set(norms)) == 1 for norms in plain.weights.values()), "a weight moves"
    return f"all {len(bad)} updates have NaN gradients of a finite loss and are skipped: the scale falls to 65536 / 2^{len(bad)}"


@sick(
    CASES,
    "po_policy_of_constant_weights",
    ("poor_init",),
    ("0", "1", "2", "3", "4"),
    also=("vanishing_gradient",),
    source="https://www.deeplearningbook.org/contents/optimization.html section 8.4: initial weights must break the symmetry of units",
    proof=lambda plain: _twins(plain),
)
def _(seed: int, sound: bool = False) -> Setup:
    model, data = mlp(nn.Tanh, 2, 32, inputs=12, outputs=5), Demonstrations(seed)
    if not sound:
        for m in model:
            if isinstance(m, nn.Linear):
                nn.init.constant_(m.weight, 0.05)
                nn.init.zeros_(m.bias)

    def loss(i: int) -> Tensor:
        s, a = data()
        return F.cross_entropy(model(s), a)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), 60)


def _twins(plain: Plain) -> str:
    """After training the units of a hidden layer are still alike."""
    model = plain.setup.model
    assert isinstance(model, nn.Sequential)
    for k in (0, 2):
        weight = model[k].weight
        assert isinstance(weight, Tensor)
        spread = float(weight.detach().std(0).max() / weight.detach().abs().max())
        assert spread < 1e-4, f"{spread:.3g}"
    tenth = len(plain.losses) // 10
    a, b = median(plain.losses[:tenth]), median(plain.losses[-tenth:])
    return f"after training all units of a hidden layer have the same weights, the loss went from {a:.3g} to {b:.3g}"


@sick(
    CASES,
    "po_imitation_from_raw_memory_bytes",
    ("unnormalized_input",),
    ("",),
    also=("poor_init",),
    source="https://arxiv.org/abs/1207.4708 Atari's RAM as the observation, bytes of 0 to 255; here without the division by 255",
    proof=lambda plain: _large_inputs(plain),
)
def _(seed: int, sound: bool = False) -> Setup:
    model = mlp(nn.LeakyReLU, 2, 48, inputs=32, outputs=5)
    gen = torch.Generator().manual_seed(800 + seed)
    rule = torch.randn(32, 5, generator=gen)
    notes: list[float] = []

    def loss(i: int) -> Tensor:
        memory = torch.randint(256, (48, 32), generator=gen)
        a = ((memory / 255 - 0.5) @ rule).argmax(-1)
        s = memory / 128 - 1 if sound else memory.float()
        notes.append(float(s.square().mean().sqrt()))
        return F.cross_entropy(model(s), a)

    whole = fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 60)
    return Noted(whole.model, whole.train, notes)


def _large_inputs(plain: Plain) -> str:
    assert isinstance(plain.setup, Noted)
    assert min(plain.setup.notes) > 100, f"{min(plain.setup.notes):.3g}"
    first = plain.outputs["0"][0]
    assert first is not None
    assert first.rms > 20, f"{first.rms:.3g}"
    return f"the inputs have an RMS of {plain.setup.notes[0]:.3g}, the first layer gives {first.rms:.3g}, the first loss {plain.losses[0]:.3g}"


class Flow(nn.Module):
    """RealNVP for two dimensions: affine couplings that start as the identity. `registered`: they stand in a ModuleList."""

    def __init__(self, registered: bool, layers: int = 6) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 2)) for _ in range(layers)]
        for b in blocks:
            nn.init.normal_(b[2].weight, std=0.01)  # type: ignore[arg-type]
            nn.init.zeros_(b[2].bias)  # type: ignore[arg-type]
        self.mean, self.logstd = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
        self.blocks = nn.ModuleList(blocks) if registered else blocks

    def forward(self, x: Tensor) -> Tensor:
        """Negative log-likelihood of each row."""
        logdet = torch.zeros(len(x))
        for k, block in enumerate(self.blocks):
            a, b = x[:, k % 2 : k % 2 + 1], x[:, 1 - k % 2 : 2 - k % 2]
            scale, shift = block(a).chunk(2, -1)
            scale = 2 * torch.tanh(scale / 2)
            b = b * scale.exp() + shift
            logdet = logdet + scale[:, 0]
            x = torch.cat([a, b] if k % 2 == 0 else [b, a], -1)
        z = (x - self.mean) * (-self.logstd).exp()
        return 0.5 * z.square().sum(-1) + math.log(2 * math.pi) + self.logstd.sum() - logdet


def crescents(ring: Ring) -> Tensor:
    """A thin crescent: density that a Gaussian cannot follow."""
    x = ring.noise(1)
    return torch.cat([x, 0.6 * x.square() - 0.6 + 0.1 * ring.noise(1)], -1)


@sick(
    CASES,
    "po_flow_couplings_in_a_plain_list",
    ("not_in_optimizer",),
    source="https://github.com/pytorch/pytorch/issues/38639 modules in a Python list are no submodules, so no optimizer sees them",
    proof=lambda plain: _unseen(plain),
)
def _(seed: int, sound: bool = False) -> Setup:
    model, ring = Flow(registered=sound), Ring(seed)
    return fit(
        model, lambda i: model(crescents(ring)).mean(), torch.optim.Adam(model.parameters(), lr=5e-3), 60 if not sound else 200
    )


def _unseen(plain: Plain) -> str:
    model = plain.setup.model
    assert isinstance(model, Flow)
    names = [n for n, _ in model.named_parameters()]
    assert names == ["mean", "logstd"], f"{names}"
    for block in model.blocks:
        assert isinstance(block, nn.Sequential)
        assert all(p.grad is not None and bool((p.grad != 0).any()) for p in block.parameters())
        assert isinstance(block[2].bias, Tensor)
        assert not block[2].bias.detach().any(), "a coupling has moved"
    return "the couplings' weights have gradients, are no parameters of the model, and their biases are still the zeros they began with"


class Prototypes(nn.Module):
    """Imitation by the likeness of an embedded state to one unit vector an action."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 16))
        self.prototypes = nn.Linear(16, 6, bias=False)
        with torch.no_grad():
            self.prototypes.weight.div_(self.prototypes.weight.norm(dim=-1, keepdim=True))

    def forward(self, s: Tensor) -> Tensor:
        out: Tensor = 6 * self.prototypes(F.normalize(self.embed(s), dim=-1))
        return out


@sick(
    CASES,
    "po_prototypes_brought_to_unit_length",
    ("non_finite_weight",),
    ("prototypes",),
    onset=21,  # the weights go bad after the step of update 20
    also=("non_finite_activation", "non_finite_loss", "non_finite_gradient"),
    source="https://github.com/pytorch/pytorch/issues/3264 dividing a vector by its norm; here that of a prototype which was cleared",
    proof=lambda plain: _bad_weights(plain, 21),
)
def _(seed: int, sound: bool = False) -> Setup:
    model, data = Prototypes(), Demonstrations(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)

    def train() -> Iterator[Event]:
        for i in range(40 if not sound else 100):
            s, a = data()
            optimizer.zero_grad()
            loss = F.cross_entropy(model(s), a)
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            with torch.no_grad():
                weight = model.prototypes.weight
                if i == 20:
                    weight[5] = 0  # the sixth action has never been taken: its prototype is cleared
                weight.div_(weight.norm(dim=-1, keepdim=True) + (1e-8 if sound else 0.0))
            yield "step", [optimizer]

    return Setup(model, train)


def _bad_weights(plain: Plain, update: int) -> str:
    assert all(math.isfinite(x) for x in plain.losses[:update])
    assert not any(c for counts in plain.nonfinite.values() for c in counts[:update])
    weights = plain.weights["prototypes.weight"]
    assert all(math.isfinite(w) for w in weights[:update])
    assert not math.isfinite(weights[update])
    embedded = plain.outputs["embed"][update]
    assert embedded is not None
    assert embedded.nonfinite == 0
    return (
        f"the weights of prototypes are NaN from update {update} on; the gradients and losses before are finite, what enters is too"
    )


# ------------------------------------------------------------------------------------------------------------- healthy


def _radius_error(models: Models, name: str = "generator") -> float:
    """Mean distance of generated points from the ring, plus that of their mean from its centre."""
    with torch.no_grad():
        points = part(models, name)(torch.randn(2000, 4, generator=torch.Generator().manual_seed(1)))
        return float((points.norm(dim=-1) - 1).abs().mean() + points.mean(0).norm())


@healthy(
    CASES,
    "po_ok_gan_at_its_equilibrium",
    source="https://arxiv.org/abs/1406.2661 a GAN: both losses hover about a level and neither falls",
    proof=reaches("distance from the ring", _radius_error, below=0.5),
)
def _(seed: int) -> Setup:
    g, d, ring = _gan(seed)
    opt_d = torch.optim.Adam(d.parameters(), lr=4e-3, betas=(0.0, 0.99))
    opt_g = torch.optim.Adam(g.parameters(), lr=1.5e-3, betas=(0.0, 0.99))
    return Setup({"generator": g, "discriminator": d}, lambda: _play(g, d, ring, opt_g, opt_d, 200))


CENTRE, SPREAD = torch.tensor([1.0, -0.5]), torch.tensor([0.5, 0.2])


def _cloud_error(models: Models) -> float:
    """Distance of mean and deviation of the generated points from those of the cloud."""
    with torch.no_grad():
        points = part(models, "generator")(torch.randn(2000, 4, generator=torch.Generator().manual_seed(1)))
        return float((points.mean(0) - CENTRE).norm() + (points.std(0) - SPREAD).norm())


@healthy(
    CASES,
    "po_ok_wgan_with_gradient_penalty",
    source="https://arxiv.org/abs/1704.00028 WGAN-GP: three critic updates to one of the generator, second derivatives, negative losses",
    proof=reaches("distance from the cloud", _cloud_error, below=0.7),
)
def _(seed: int) -> Setup:
    g, ring = mlp(nn.ReLU, 2, 32, inputs=4, outputs=2), Ring(seed)
    d = mlp(nn.SiLU, 2, 32, inputs=2, outputs=1)
    opt_d = torch.optim.Adam(d.parameters(), lr=1e-2, betas=(0.5, 0.9))
    opt_g = torch.optim.Adam(g.parameters(), lr=3e-3, betas=(0.5, 0.9))

    def train() -> Iterator[Event]:
        for k in range(95):
            opt_d.param_groups[0]["lr"], opt_g.param_groups[0]["lr"] = 1e-2 * (1 - k / 95), 3e-3 * (1 - k / 95)
            for _ in range(3):
                opt_d.zero_grad()
                real, fake = CENTRE + SPREAD * ring.noise(2), g(ring.noise(4)).detach()
                loss = d(fake).mean() - d(real).mean() + penalty(d, real, fake, ring, 1e-12)
                loss.backward()
                yield "read", [loss]
                opt_d.step()
                yield "step", [opt_d]
            opt_g.zero_grad()
            loss = -d(g(ring.noise(4))).mean()
            loss.backward()
            yield "read", [loss]
            opt_g.step()
            yield "step", [opt_g]

    return Setup({"generator": g, "critic": d}, train)


def _corridor(models: Models) -> float:
    """Share of the corridor's cells in which the greedy action is to the right."""
    with torch.no_grad():
        return float((part(models, "q")(torch.eye(8))[:7].argmax(-1) == 1).float().mean())


@healthy(
    CASES,
    "po_ok_q_learning_with_rare_updates",
    source="https://www.nature.com/articles/nature14236 DQN: four environment steps to an update, a target network copied now and then",
    proof=reaches("share of right decisions", _corridor, above=0.9),
)
def _(seed: int) -> Setup:
    # A corridor of eight cells with the reward at its right end: at first the targets are the network's own noise.
    q = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 2))
    target = copy.deepcopy(q).requires_grad_(False)
    gen = torch.Generator().manual_seed(900 + seed)
    memory: list[tuple[int, int, float, int]] = []
    optimizer = torch.optim.Adam(q.parameters(), lr=5e-3)
    cells = torch.eye(8)

    def train() -> Iterator[Event]:
        cell = 0
        for step in range(1600):
            with torch.no_grad():
                greedy = int(q(cells[cell]).argmax())
            explore = float(torch.rand(1, generator=gen)) < max(0.2, 1 - step / 800)
            action = int(torch.randint(2, (1,), generator=gen)) if explore else greedy
            after = min(7, cell + 1) if action == 1 else max(0, cell - 1)
            memory.append((cell, action, float(after == 7), after))
            cell = 0 if after == 7 or step % 40 == 39 else after
            if step < 100 or step % 5:
                continue
            rows = [memory[int(k)] for k in torch.randint(len(memory), (32,), generator=gen)]
            s, a, r, n = (torch.tensor(column) for column in zip(*rows, strict=True))
            with torch.no_grad():
                goal = r + 0.9 * (1 - r) * target(cells[n]).amax(-1)
            optimizer.zero_grad()
            loss = F.smooth_l1_loss(q(cells[s]).gather(1, a[:, None])[:, 0], goal)
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]
            if step % 100 == 0:
                target.load_state_dict(q.state_dict())

    return Setup({"q": q, "target": target}, train)


def _skill(models: Models) -> float:
    """Share of expert decisions; all seeds of the proof's data have the rule of the model's own run, kept in the model."""
    assert isinstance(models, ActorCritic)
    assert isinstance(models.rule, Tensor)
    data = Demonstrations(0)
    data.rule = models.rule
    return models.skill(data)


@healthy(
    CASES,
    "po_ok_reinforce_of_noisy_returns",
    source="https://link.springer.com/article/10.1007/BF00992696 REINFORCE; the loss hovers about zero and says nothing of success",
    proof=reaches("share of best actions", _skill, above=0.6),
)
def _(seed: int) -> Setup:
    model, data = ActorCritic(), Demonstrations(seed, batch=128)
    model.register_buffer("rule", data.rule)
    model.critic.requires_grad_(False)  # plain REINFORCE with a batch baseline: the value head is not in use
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def loss(i: int) -> Tensor:
        s, best = data()
        logp, _ = model(s)
        action = torch.multinomial(logp.detach().exp(), 1, generator=data.generator)
        returns = (action[:, 0] == best).float() + 0.5 * torch.randn(128, generator=data.generator)
        entropy = -(logp.exp() * logp).sum(-1).mean()
        total: Tensor = -((returns - returns.mean()) * logp.gather(1, action)[:, 0]).mean() - 0.02 * entropy
        return total

    return fit(model, loss, optimizer, 200)


@healthy(
    CASES,
    "po_ok_ppo_with_clipped_ratios",
    source="https://arxiv.org/abs/1707.06347 PPO: normalised advantages, four epochs a batch, clipped samples without any gradient",
    proof=reaches("share of best actions", _skill, above=0.6),
)
def _(seed: int) -> Setup:
    model, data = ActorCritic(), Demonstrations(seed, batch=128)
    model.register_buffer("rule", data.rule)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3, eps=1e-5)

    def train() -> Iterator[Event]:
        for _ in range(50):
            batch = model.collect(*data(), data.generator)
            for _ in range(4):
                optimizer.zero_grad()
                loss = model.clipped(*batch)
                loss.backward()
                yield "read", [loss]
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                yield "step", [optimizer]

    return Setup(model, train)


class Aim(nn.Module):
    """An actor and what it aims at, kept for the proof."""

    def __init__(self, best: Tensor) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 2), nn.Tanh())
        self.register_buffer("best", best)

    def forward(self, s: Tensor) -> Tensor:
        out: Tensor = self.net(s)
        return out


def _miss(models: Models) -> float:
    actor = part(models, "actor")
    assert isinstance(actor.best, Tensor)
    with torch.no_grad():
        s = torch.randn(1000, 6, generator=torch.Generator().manual_seed(1))
        return float((actor(s) - s @ actor.best).square().sum(-1).mean())


@healthy(
    CASES,
    "po_ok_actor_of_a_frozen_critic",
    source="https://arxiv.org/abs/1509.02971 the deterministic policy gradient, through a critic that is trained before and then frozen",
    proof=reaches("squared miss of the actor", _miss, below=0.25),
)
def _(seed: int) -> Setup:
    gen = torch.Generator().manual_seed(1100 + seed)
    actor = Aim(torch.randn(6, 2, generator=gen) / 4)
    critic = mlp(nn.SiLU, 2, 64, inputs=8, outputs=1)
    assert isinstance(actor.best, Tensor)
    fitting = torch.optim.Adam(critic.parameters(), lr=5e-3)
    for _ in range(250):
        s, a = torch.randn(128, 6, generator=gen), 2 * torch.rand(128, 2, generator=gen) - 1
        fitting.zero_grad()
        F.mse_loss(critic(torch.cat([s, a], -1)), -(a - s @ actor.best).square().sum(-1, keepdim=True)).backward()
        fitting.step()
    critic.requires_grad_(False).zero_grad()
    optimizer = torch.optim.Adam(actor.parameters(), lr=3e-3)

    def train() -> Iterator[Event]:
        for _ in range(150):
            s = torch.randn(64, 6, generator=gen)
            optimizer.zero_grad()
            loss = -critic(torch.cat([s, actor(s)], -1)).mean()
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]

    return Setup({"actor": actor, "critic": critic}, train)


@healthy(
    CASES,
    "po_ok_vae_with_annealed_kl",
    source="https://arxiv.org/abs/1511.06349 the weight of the KL term rises from 0, so the loss rises again after its first fall",
    proof=proofs.converges(0.35),
)
def _(seed: int) -> Setup:
    model, data = VAE(), Latent(seed)

    def loss(i: int) -> Tensor:
        x = data()
        out, mean, logvar = model(x, data.noise())
        total: Tensor = (out - x).square().sum(-1).mean() + 0.4 * min(1.0, i / 150) * kl(mean, logvar)
        return total

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=4e-3), 200)


@healthy(
    CASES,
    "po_ok_flow_from_the_identity",
    source="https://arxiv.org/abs/1605.08803 RealNVP, its couplings begun near the identity: first layers get tiny gradients at first",
    proof=proofs.converges(0.45),
)
def _(seed: int) -> Setup:
    model, ring = Flow(registered=True, layers=4), Ring(seed, 128)
    return fit(model, lambda i: model(crescents(ring)).mean(), torch.optim.Adam(model.parameters(), lr=1e-2), 150)


class Choice(nn.Module):
    """An autoencoder whose code is three choices among eight, drawn by straight-through Gumbel-softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 24))
        self.decoder = nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 16))

    def forward(self, x: Tensor, noise: Tensor, temperature: float) -> Tensor:
        logits = self.encoder(x).view(-1, 3, 8)
        soft = torch.softmax((logits - (-noise.log()).log()) / temperature, -1)
        hard = F.one_hot(soft.argmax(-1), 8) - soft.detach() + soft
        out: Tensor = self.decoder(hard.flatten(1))
        return out


@healthy(
    CASES,
    "po_ok_gumbel_codes_with_falling_temperature",
    source="https://arxiv.org/abs/1611.01144 Gumbel-softmax, straight through, the temperature falling from 2 to 0.5",
    proof=proofs.converges(0.5),
)
def _(seed: int) -> Setup:
    model, data = Choice(), Latent(seed, batch=64)

    def loss(i: int) -> Tensor:
        x = data()
        noise = torch.rand(64, 3, 8, generator=data.generator).clamp_min(1e-9)
        return F.mse_loss(model(x, noise, max(0.5, 2 * 0.99**i)), x)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 250)


@healthy(
    CASES,
    "po_ok_maml_of_second_order",
    source="https://arxiv.org/abs/1703.03400 MAML on sines: gradients of gradients, a new set of tasks every update",
    proof=proofs.converges(0.5),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))
    gen = torch.Generator().manual_seed(1200 + seed)

    def loss(i: int) -> Tensor:
        return torch.stack([adapted_loss(model, gen, 0.1) for _ in range(4)]).mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 120)


@healthy(
    CASES,
    "po_ok_denoiser_with_averaged_copy",
    source="https://arxiv.org/abs/2006.11239 denoising with an average of the weights beside it; the loss has a high floor",
    proof=proofs.converges(0.75),
)
def _(seed: int) -> Setup:
    model, ring = Denoiser(), Ring(seed, 128)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def train() -> Iterator[Event]:
        for i in range(150):
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * min(1.0, i / 10)  # warm-up from 0
            optimizer.zero_grad()
            loss = denoise(model, ring)
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]
            with torch.no_grad():
                for a, p in zip(average.parameters(), model.parameters(), strict=True):
                    a.lerp_(p, 0.05)

    return Setup({"model": model, "average": average}, train)


@healthy(
    CASES,
    "po_ok_controller_through_a_simulation",
    source="https://arxiv.org/abs/1910.00935 a controller learned through a differentiable simulation of a mass and its thrust",
    proof=proofs.converges(0.3),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2), nn.Tanh())
    gen = torch.Generator().manual_seed(1300 + seed)

    def loss(i: int) -> Tensor:
        place, speed = torch.randn(32, 2, generator=gen), 0.3 * torch.randn(32, 2, generator=gen)
        costs = []
        for _ in range(20):
            force = 2 * model(torch.cat([place, speed], -1))
            speed = 0.98 * speed + 0.15 * force
            place = place + 0.15 * speed
            costs.append(place.square().sum(-1).mean() + 0.01 * force.square().sum(-1).mean())
        return torch.stack(costs[8:]).mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 120)


class Hyper(nn.Module):
    """Makes the weights of a small network from a task's description."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(2, 32), nn.ReLU())
        self.hidden, self.last = nn.Linear(32, 2 * 16), nn.Linear(32, 16 + 1)
        nn.init.normal_(self.last.weight, std=0.05)
        nn.init.zeros_(self.last.bias)

    def forward(self, task: Tensor, x: Tensor) -> Tensor:
        e = self.embed(task)
        w, b = self.hidden(e).view(-1, 2, 16).unbind(1)
        v = self.last(e)
        h = torch.tanh(2 * x[:, :, None] * w[:, None] + b[:, None])
        total: Tensor = (h * v[:, None, :16]).sum(-1) + v[:, 16:]
        return total


@healthy(
    CASES,
    "po_ok_hypernetwork_of_sines",
    source="https://arxiv.org/abs/1609.09106 a hypernetwork: the weights in use are outputs, no parameters of their own",
    proof=proofs.converges(0.3),
)
def _(seed: int) -> Setup:
    model = Hyper()
    gen = torch.Generator().manual_seed(1400 + seed)

    def loss(i: int) -> Tensor:
        task = torch.randn(32, 2, generator=gen)
        x = 4 * torch.rand(32, 12, generator=gen) - 2
        y = task[:, :1] * torch.sin(x) + 0.5 * task[:, 1:] * torch.cos(x)
        return F.mse_loss(model(task, x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 200)


class Tasks(nn.Module):
    """Three tasks of unlike scale on one body, weighted by learned variances."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU())
        self.heads = nn.ModuleList(nn.Linear(48, 1) for _ in range(3))
        self.logvar = nn.Parameter(torch.zeros(3))

    def forward(self, s: Tensor, goals: list[Tensor]) -> Tensor:
        h = self.body(s)
        errors = torch.stack([F.mse_loss(head(h), goal) for head, goal in zip(self.heads, goals, strict=True)])
        return (errors * (-self.logvar).exp() + self.logvar).sum() / 2


@healthy(
    CASES,
    "po_ok_tasks_weighted_by_learned_variances",
    source="https://arxiv.org/abs/1705.07115 multi-task learning by uncertainty: the loss goes through zero and on below it",
    proof=lambda plain: _through_zero(plain),
)
def _(seed: int) -> Setup:
    model, data = Tasks(), Values(seed, batch=64, noise=0.05)

    def loss(i: int) -> Tensor:
        s, v = data()
        return model(s, [v, 0.2 * s[:, :1].abs(), 2 * torch.sin(s[:, 1:2])])  # type: ignore[no-any-return]

    weights = [*model.body.parameters(), *model.heads.parameters()]
    groups: list[dict[str, Any]] = [{"params": [model.logvar], "lr": 2e-2}, {"params": weights}]
    optimizer = torch.optim.Adam(groups, lr=4e-3)
    return fit(model, loss, optimizer, 200)


def _through_zero(plain: Plain) -> str:
    a, b = median(plain.losses[:20]), median(plain.losses[-20:])
    assert all(math.isfinite(x) for x in plain.losses)
    assert a > 0.5, f"{a:.3g}"
    assert b < -1, f"{b:.3g}"
    return f"the loss goes from {a:.3g} to {b:.3g}"


@healthy(
    CASES,
    "po_ok_implicit_layer_injected",
    source="https://arxiv.org/abs/1909.01377 a deep equilibrium critic that injects its input in every iteration, by plain SGD",
    proof=proofs.converges(0.5),
)
def _(seed: int) -> Setup:
    model, data = Equilibrium(True, iterations=15), Values(seed, batch=64)

    def loss(i: int) -> Tensor:
        s, v = data()
        return F.mse_loss(model(s), v)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5), 200)
