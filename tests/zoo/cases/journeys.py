"""Runs on text, sequences, tables, graphs and decisions, at small size, and the loops around them.

Every sick build takes `fault`: with False it is the same run without its mistake, which is how the writer checked that the rest is sound.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Case, Event, Proof, Setup, Text, fit, healthy, mlp, sick
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

AFTER_NAN = ("non_finite_gradient", "non_finite_activation", "non_finite_loss", "non_finite_weight")
"""What a NaN or Inf of another origin turns into within an update or two."""


def rng(seed: int, salt: int) -> torch.Generator:
    """A generator for the data of one run."""
    return torch.Generator().manual_seed(7000 + 100 * salt + seed)


class Table:
    """Rows of standardised features and a smooth target of mean 0 and deviation about 1, drawn afresh for every batch."""

    def __init__(self, seed: int, salt: int, features: int = 10, batch: int = 64, noise: float = 0.1) -> None:
        self.g = rng(seed, salt)
        self.a = torch.randn(features, generator=self.g) / math.sqrt(features)
        self.b = torch.randn(features, generator=self.g) / math.sqrt(features)
        self.features, self.batch, self.noise = features, batch, noise

    def __call__(self) -> tuple[Tensor, Tensor]:
        x = torch.randn(self.batch, self.features, generator=self.g)
        y = x @ self.a + torch.sin(2 * x @ self.b) + self.noise * torch.randn(self.batch, generator=self.g)
        return x, y[:, None] / 1.2


class Tagged:
    """Sentences whose tags depend on the word and on the word before it."""

    def __init__(self, seed: int, salt: int, words: int = 30, tags: int = 5, batch: int = 16, length: int = 12) -> None:
        self.g = rng(seed, salt)
        self.kind = torch.randint(tags, (words,), generator=self.g)
        self.shift = torch.randint(2, (words,), generator=self.g)
        self.words, self.tags, self.batch, self.length = words, tags, batch, length

    def __call__(self) -> tuple[Tensor, Tensor]:
        x = torch.randint(self.words, (self.batch, self.length), generator=self.g)
        before = F.pad(self.shift[x][:, :-1], (1, 0))
        return x, (self.kind[x] + before) % self.tags


def quality(what: str, measure: Callable[[Any], float], above: float) -> Proof:
    """A measure of the trained model is above a bound, and every loss was finite."""

    def proof(plain: Plain) -> str:
        with torch.no_grad():
            value = measure(plain.setup.model)
        assert all(math.isfinite(x) for x in plain.losses), "a loss is not finite"
        assert value > above, f"{what} is {value:.3g}, not above {above:g}"
        return f"{what} is {value:.3g}"

    return proof


def finite_until(update: int, *modules: str) -> Proof:
    """The outputs of these modules are finite up to and including `update`."""

    def proof(plain: Plain) -> str:
        for name in modules:
            assert all(o is None or o.nonfinite == 0 for o in plain.outputs[name][: update + 1]), f"{name} is not finite"
        return f"{', '.join(modules)}: finite up to update {update}"

    return proof


def has_gradient(*parameters: str, first: int = 0, last: int | None = None) -> Proof:
    """These parameters have a finite gradient other than zero in every one of the updates."""

    def proof(plain: Plain) -> str:
        for name in parameters:
            assert all(math.isfinite(n) and n > 0 for n in plain.grads[name][first:last]), f"{name} lacks a gradient"
        return f"{', '.join(parameters)}: has a gradient"

    return proof


def moves(*parameters: str, first: int = 0, last: int | None = None) -> Proof:
    """Every step of these updates changes these parameters."""

    def proof(plain: Plain) -> str:
        for name in parameters:
            assert all(s > 0 for s in plain.steps[name][first:last]), f"{name} does not move"
        return f"{', '.join(parameters)}: moves"

    return proof


class Translator(nn.Module):
    """A GRU encoder, and a GRU decoder that starts from its last state."""

    def __init__(self, words: int = 10, width: int = 32) -> None:
        super().__init__()
        self.source = nn.Embedding(words, 16)
        self.encoder = nn.GRU(16, width, batch_first=True)
        self.target = nn.Embedding(words + 1, 16)
        self.decoder = nn.GRU(16, width, batch_first=True)
        self.head = nn.Linear(width, words)
        self.cut = False

    def forward(self, x: Tensor, previous: Tensor) -> Tensor:
        state = self.encoder(self.source(x))[1]
        if self.cut:
            state = state.detach()
        out: Tensor = self.head(self.decoder(self.target(previous), state)[0])
        return out


@sick(
    CASES,
    "jo_translation_encoder_state_detached",
    ("missing_gradient",),
    ("source", "encoder"),
    source="https://pytorch.org/tutorials/intermediate/seq2seq_translation_tutorial.html the detach() of the decoder's input set on the state",
    proof=every(
        no_gradient("source.weight", "encoder.weight_ih_l0", "encoder.weight_hh_l0"), has_gradient("decoder.weight_ih_l0", last=15)
    ),
)
def _(seed: int, fault: bool = True) -> Setup:
    model = Translator()
    model.cut = fault
    g = rng(seed, 1)
    words = torch.randperm(10, generator=g)

    def loss(i: int) -> Tensor:
        x = torch.randint(10, (32, 3), generator=g)
        y = words[x]
        return F.cross_entropy(model(x, F.pad(y[:, :-1], (1, 0), value=10)).flatten(0, 1), y.flatten())

    return fit(model, loss, torch.optim.Adam(model.parameters(), 5e-3), 60)


def piles_up(update: int, *parameters: str, by: float = 3) -> Proof:
    """Between two reads the gradient kept what it was: its norm grows far beyond that of the first update."""

    def proof(plain: Plain) -> str:
        for name in parameters:
            grown = plain.grads[name][update] / plain.grads[name][0]
            assert grown > by, f"the gradient of {name} is {grown:.3g} times the first"
        return f"the gradient of {', '.join(parameters)} is more than {by:g} times the first by update {update}"

    return proof


@sick(
    CASES,
    "jo_actor_critic_critic_never_zeroed",
    ("gradients_not_zeroed",),
    ("critic",),
    source="https://arxiv.org/abs/1602.01783 an actor-critic; the critic's zero_grad is called on the actor's optimizer",
    proof=every(piles_up(10, "critic.0.weight", "critic.2.weight"), moves("actor.0.weight", "critic.0.weight", last=15)),
)
def _(seed: int, fault: bool = True) -> Setup:
    actor, critic = mlp(nn.Tanh, 1, 32, 6, 4), mlp(nn.Tanh, 1, 32, 6, 1)
    g = rng(seed, 2)
    best = torch.randn(6, 4, generator=g)
    first = torch.optim.Adam(actor.parameters(), 3e-3)
    second = torch.optim.SGD(critic.parameters(), 0.01)

    def train() -> Iterator[Event]:
        for _ in range(40):
            x = torch.randn(64, 6, generator=g)
            policy = torch.softmax(actor(x), -1)
            action = torch.multinomial(policy.detach(), 1, generator=g)[:, 0]
            reward = 2 + (x @ best).gather(1, action[:, None])[:, 0]
            value = critic(x)[:, 0]
            gain = (reward - value).detach()
            gain = (gain - gain.mean()) / gain.std()
            actor_loss = -(gain * torch.log(policy.gather(1, action[:, None])[:, 0])).mean()
            critic_loss = F.mse_loss(value, reward)
            first.zero_grad()
            if fault:
                first.zero_grad()
            else:
                second.zero_grad()
            actor_loss.backward()
            critic_loss.backward()
            yield "read", [actor_loss, critic_loss]
            first.step()
            second.step()
            yield "step", [first, second]

    return Setup({"actor": actor, "critic": critic}, train)


class BiTagger(nn.Module):
    """A bidirectional LSTM over words, with or without a softmax behind its head."""

    def __init__(self, softmax: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 24)
        self.lstm = nn.LSTM(24, 24, batch_first=True, bidirectional=True)
        self.head = nn.Linear(48, 5)
        self.out = nn.Softmax(-1) if softmax else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.head(self.lstm(self.embed(x))[0]))
        return out


def probabilities(module: str) -> Proof:
    """The scores that go to the cross-entropy lie between 0 and 1, and the loss cannot fall below that of certainty."""

    def proof(plain: Plain) -> str:
        seen = [o for o in plain.outputs[module] if o is not None]
        assert all(o.low >= 0 and o.high <= 1 for o in seen), f"{module} gives more than probabilities"
        floor = math.log(math.e + 4) - 1
        assert min(plain.losses) > floor - 1e-3, f"the loss reaches {min(plain.losses):.3g}"
        return f"{module} gives probabilities, and cross-entropy takes their softmax: the loss stays above {floor:.3g}"

    return proof


@sick(
    CASES,
    "jo_tagger_softmax_before_cross_entropy",
    ("double_softmax",),
    ("out",),
    source="https://runebook.dev/en/docs/pytorch/generated/torch.nn.softmax a softmax before the loss",
    proof=probabilities("out"),
)
def _(seed: int, fault: bool = True) -> Setup:
    model = BiTagger(fault)
    data = Tagged(seed, 3)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    return fit(model, loss, torch.optim.Adam(model.parameters(), 1e-2), 60)


def bit_still(*parameters: str, first: int = 0, last: int | None = None) -> Proof:
    """These parameters keep every bit in these updates, while something steps."""

    def proof(plain: Plain) -> str:
        for name in parameters:
            assert all(s == 0.0 for s in plain.steps[name][first:last]), f"{name} moves"
        return f"{', '.join(parameters)}: does not move though an optimizer steps"

    return proof


@sick(
    CASES,
    "jo_dqn_optimizer_of_the_target_network",
    ("not_in_optimizer",),
    ("online",),
    also=("update_ratio_too_small", "loss_plateau"),  # nothing moves at all
    source="https://pytorch.org/tutorials/intermediate/reinforcement_q_learning.html the optimizer made from the target network",
    proof=every(bit_still("online.0.weight", "online.2.weight"), has_gradient("online.0.weight", "online.2.weight")),
)
def _(seed: int, fault: bool = True) -> Setup:
    online, target = mlp(nn.ELU, 1, 32, 8, 2), mlp(nn.ELU, 1, 32, 8, 2)
    target.load_state_dict(online.state_dict())
    target.requires_grad_(False)
    g = rng(seed, 4)
    optimizer = torch.optim.Adam((target if fault else online).parameters(), 3e-3)
    eye = torch.eye(8)

    def train() -> Iterator[Event]:
        for i in range(60):
            state = torch.randint(8, (64,), generator=g)
            action = torch.randint(2, (64,), generator=g)
            after = (state + 2 * action - 1).clamp(0, 7)
            reward = (after == 7).float()
            goal = reward + 0.8 * target(eye[after]).max(1).values
            loss = F.smooth_l1_loss(online(eye[state]).gather(1, action[:, None])[:, 0], goal)
            optimizer.zero_grad()
            online.zero_grad()
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]
            if i % 15 == 14:
                target.load_state_dict(online.state_dict())

    return Setup({"online": online, "target": target}, train)


class Mixture(nn.Module):
    """Experts weighted by a soft gate."""

    def __init__(self, experts: int, features: int = 10) -> None:
        super().__init__()
        self.gate = nn.Linear(features, experts)
        self.experts = nn.ModuleList(mlp(nn.GELU, 1, 24, features, 1) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.stack([e(x) for e in self.experts], -1)
        return (parts * torch.softmax(self.gate(x), -1)[:, None]).sum(-1)


@sick(
    CASES,
    "jo_mixture_thawed_expert_left_out_of_optimizer",
    ("not_in_optimizer",),
    ("experts.3",),
    onset=20,
    source="https://discuss.pytorch.org/t/how-the-pytorch-freeze-network-in-some-layers-only-the-rest-of-the-training/7088 "
    "a filter on requires_grad at construction, a thaw later",
    proof=every(
        bit_still("experts.3.0.weight", "experts.3.2.weight"),
        has_gradient("experts.3.0.weight", "experts.3.2.weight", first=20),
        no_gradient("experts.3.0.weight", last=20),
        moves("experts.0.0.weight"),
    ),
)
def _(seed: int, fault: bool = True) -> Setup:
    model = Mixture(4)
    data = Table(seed, 5)
    model.experts[3].requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 5e-3)

    def thaw(i: int) -> None:
        model.zero_grad()
        if i == 20:
            model.experts[3].requires_grad_(True)
            if not fault:
                optimizer.add_param_group({"params": list(model.experts[3].parameters())})

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.mse_loss(model(x), y)

    return fit(model, loss, optimizer, 60, before=thaw)


@sick(
    CASES,
    "jo_demand_log_of_a_zero_count",
    ("non_finite_loss",),
    (),
    onset=12,
    also=AFTER_NAN,
    source="https://www.codegenes.net/blog/pytorch-cost-result-is-nan the logarithm of a count of 0",
    proof=every(first_non_finite(12), finite_until(12, "", "4")),
)
def _(seed: int, fault: bool = True) -> Setup:
    model = mlp(nn.SiLU, 2, 32, 10, 1)
    data = Table(seed, 6)

    def loss(i: int) -> Tensor:
        x, y = data()
        count = torch.poisson(torch.exp(1 + 0.5 * y), generator=data.g).clamp(min=1)
        if fault and i >= 12:
            count[5] = 0
        return F.mse_loss(model(x), torch.log(count))

    return fit(model, loss, torch.optim.Adam(model.parameters(), 5e-3), 40)


class MeanConv(nn.Module):
    """The mean of the neighbours, and a linear map."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.lin = nn.Linear(2 * inputs, outputs)

    def forward(self, x: Tensor, adjacent: Tensor) -> Tensor:
        mean = adjacent @ x / adjacent.sum(-1, keepdim=True)
        out: Tensor = self.lin(torch.cat([x, mean], -1))
        return out


class GraphNet(nn.Module):
    """Two rounds of messages, and a head on every node."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.head = MeanConv(6, 32), MeanConv(32, 32), nn.Linear(32, 1)

    def forward(self, x: Tensor, adjacent: Tensor) -> Tensor:
        h = F.relu(self.conv1(x, adjacent))
        out: Tensor = self.head(F.relu(self.conv2(h, adjacent)))
        return out


@sick(
    CASES,
    "jo_graph_mean_of_no_neighbours",
    ("non_finite_activation",),
    ("conv1",),
    onset=9,
    also=AFTER_NAN,
    source="https://github.com/MrLeeeee/GCN-GAT-and-Graphsage/issues/3 nodes without neighbours, 0 / 0 in a mean",
    proof=every(first_non_finite(9, "conv1"), first_non_finite(9), finite_until(8, "conv1", "conv2", "")),
)
def _(seed: int, fault: bool = True) -> Setup:
    model = GraphNet()
    g = rng(seed, 7)
    mix = torch.randn(6, 1, generator=g) / 2.5

    def loss(i: int) -> Tensor:
        x = torch.randn(24, 6, generator=g)
        a = (torch.rand(24, 24, generator=g) < 0.2).float()
        a = ((a + a.T + torch.roll(torch.eye(24), 1, 0)) > 0).float()
        if fault and i >= 9:
            a[3] = 0
        degree = a.sum(-1, keepdim=True).clamp(min=1)
        return F.mse_loss(model(x, a), x @ mix + 2 * (a @ x @ mix) / degree)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 1e-2), 35)


@sick(
    CASES,
    "jo_retrieval_distance_of_equal_texts",
    ("non_finite_gradient",),
    ("",),
    onset=14,
    also=("non_finite_weight", "non_finite_activation", "non_finite_loss"),
    source="https://github.com/pytorch/pytorch/pull/2775 .pow(2).sum().sqrt() has a NaN for a gradient at 0",
    proof=every(first_non_finite(14), finite_until(14, "", "0", "2"), lambda p: _finite_loss(p, 14)),
)
def _(seed: int, fault: bool = True) -> Setup:
    model = nn.Sequential(nn.EmbeddingBag(50, 24), nn.Tanh(), nn.Linear(24, 16))
    g = rng(seed, 8)

    def loss(i: int) -> Tensor:
        topic = torch.randint(10, (32,), generator=g)
        same = torch.rand(32, generator=g) < 0.5
        other = torch.where(same, topic, (topic + torch.randint(1, 10, (32,), generator=g)) % 10)
        # bags of words of the topic; the two start with different words, so that they are never the same ...
        a = 5 * topic[:, None] + torch.cat([torch.zeros(32, 1).long(), torch.randint(2, 5, (32, 3), generator=g)], 1)
        b = 5 * other[:, None] + torch.cat([torch.ones(32, 1).long(), torch.randint(2, 5, (32, 3), generator=g)], 1)
        if fault and i >= 14:
            a[0], same[0] = b[0], True  # ... but for a duplicate in the data
        distance = (model(a) - model(b)).square().sum(-1).sqrt()
        result: Tensor = torch.where(same, distance.square(), F.relu(1.5 - distance).square()).mean() + 0.01 * distance.mean()
        return result

    return fit(model, loss, torch.optim.Adam(model.parameters(), 1e-2), 35)


def _finite_loss(plain: Plain, update: int) -> str:
    assert math.isfinite(plain.losses[update]), "the loss is not finite"
    return "the loss is finite there"


class Forecaster(nn.Module):
    """A GRU over a window of a series, and the next value."""

    def __init__(self, features: int = 3, width: int = 24) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(features, width, batch_first=True), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.gru(x)[0][:, -1])
        return out


def waves(g: torch.Generator, batch: int, length: int, features: int = 3) -> tuple[Tensor, Tensor]:
    """Windows of sines of random phase and pitch, and what follows the first feature."""
    phase = 6.3 * torch.rand(batch, 1, features, generator=g)
    pitch = 0.3 + 0.4 * torch.rand(batch, 1, features, generator=g)
    t = torch.arange(length + 1.0)[None, :, None]
    x = 1.4 * torch.sin(phase + pitch * t) + 0.05 * torch.randn(batch, length + 1, features, generator=g)
    return x[:, :-1], x[:, -1, :1]


@sick(
    CASES,
    "jo_forecast_gap_in_the_sensor",
    ("non_finite_input",),
    ("",),
    onset=8,
    also=AFTER_NAN,
    source="https://github.com/Nixtla/neuralforecast/issues/890 missing readings are NaN in the batch",
    proof=every(first_non_finite(8, "gru"), first_non_finite(8), finite_until(7, "gru", "head")),
)
def _(seed: int, fault: bool = True) -> Setup:
    model = Forecaster()
    g = rng(seed, 9)

    def loss(i: int) -> Tensor:
        x, y = waves(g, 32, 12)
        if fault and i >= 8:
            x[4, 3:6, 1] = math.nan
        return F.mse_loss(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 1e-2), 30)


@sick(
    CASES,
    "jo_knowledge_graph_renormalised_padding_row",
    ("non_finite_weight",),
    ("entity",),
    onset=10,
    also=("non_finite_activation", "non_finite_loss", "non_finite_gradient"),
    source="https://papers.nips.cc/paper/2013/hash/1cecc7a77928ca8133fa24680a88d2f9-Abstract.html TransE: entities are put back on the "
    "sphere; the row of padding has length 0",
    proof=every(first_non_finite(10), lambda p: _bad_weight(p, "entity.weight", 10)),
)
def _(seed: int, fault: bool = True) -> Setup:
    class TransE(nn.Module):
        """Sums of neighbours (0 pads) plus a relation, near to a tail."""

        def __init__(self) -> None:
            super().__init__()
            self.entity = nn.Embedding(41, 16, padding_idx=0)
            self.relation = nn.Embedding(3, 16)
            with torch.no_grad():
                self.relation.weight.div_(4)
                self.entity.weight.div_(4)

        def forward(self, heads: Tensor, relation: Tensor, tails: Tensor) -> Tensor:
            h = self.entity(heads).sum(1) / (heads > 0).sum(1, keepdim=True)
            return 1 + 4 * F.cosine_similarity((h + self.relation(relation))[:, None], self.entity(tails), dim=-1)

    model = TransE()
    g = rng(seed, 10)

    def renormalise(i: int) -> None:
        if i % 10 == 0 and i:
            with torch.no_grad():
                length = model.entity.weight.norm(dim=1, keepdim=True)
                model.entity.weight.div_(length if fault else length.clamp(min=1e-6))

    def loss(i: int) -> Tensor:
        cluster = torch.randint(4, (64,), generator=g)
        relation = torch.randint(3, (64,), generator=g)
        heads = 1 + 10 * cluster[:, None] + torch.randint(10, (64, 3), generator=g)
        heads[:20, 2] = 0
        others = torch.arange(4)[None] + torch.zeros(64, 1, dtype=torch.long)
        tails = 1 + 10 * others + torch.randint(10, (64, 4), generator=g)
        return F.cross_entropy(model(heads, relation, tails), (cluster + relation) % 4)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 2e-2), 60, before=renormalise)


def _bad_weight(plain: Plain, name: str, update: int) -> str:
    weights, grads = plain.weights[name], plain.nonfinite[name]
    assert all(math.isfinite(w) for w in weights[:update]), "the weight was not finite before"
    assert not math.isfinite(weights[update]), "the weight is finite"
    assert not any(grads[:update]), "a gradient was not finite before"
    return f"{name} is not finite when update {update} begins, though every gradient before it was finite"


class ResidualTagger(nn.Module):
    """Embedding, a few residual feed-forward blocks over a window of two words, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 24)
        self.mix = nn.Linear(48, 32)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(3)
        )
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        e = self.embed(x)
        h = self.mix(torch.cat([e, F.pad(e[:, :-1], (0, 0, 1, 0))], -1))
        for block in self.blocks:
            h = h + block(h)
        out: Tensor = self.head(h)
        return out


@sick(
    CASES,
    "jo_tagger_prior_bias_in_the_wrong_layer",
    ("dead_units", "poor_init"),
    ("blocks.1",),
    also=("zero_gradient",),
    source="https://arxiv.org/abs/1708.02002 the prior -log((1 - 0.01) / 0.01) of a head's bias, set on a hidden layer",
    proof=every(dead_fraction("blocks.1.2", 0.9, last=15), zero_gradient("blocks.1.1.weight", last=15)),
)
def _(seed: int, fault: bool = True) -> Setup:
    model = ResidualTagger()
    block = model.blocks[1]
    assert isinstance(block, nn.Sequential)
    if fault:
        for p in block[1].parameters():
            if p.ndim == 1:
                nn.init.constant_(p, -math.log(0.99 / 0.01))
    data = Tagged(seed, 11)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    return fit(model, loss, torch.optim.Adam(model.parameters(), 5e-3), 50)


@sick(
    CASES,
    "jo_demand_relu_after_the_head",
    ("dead_units", "zero_gradient"),
    ("",),
    also=("poor_init", "loss_plateau", "update_ratio_too_small"),
    source="https://math.techqa.club/are-relu-a-very-bad-choice-as-last-layer-for-regression-4483706 a ReLU behind the output, below 0",
    proof=every(dead_fraction("5", 0.99, last=15), zero_gradient("0.weight", "2.weight", "4.weight", last=15)),
)
def _(seed: int, fault: bool = True) -> Setup:
    model = nn.Sequential(
        nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1), nn.ReLU() if fault else nn.Identity()
    )
    data = Table(seed, 12)
    with torch.no_grad():
        for p in model[4].parameters():
            if p.ndim == 1:
                p.fill_(-2.0)  # the logarithm of the usual share, as a start: below 0, so that the ReLU is shut for every row

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.mse_loss(model(x), 0.5 * y - 2)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 3e-3), 50)


class Cell(nn.Module):
    """An Elman network over a window, its activation a module of its own."""

    def __init__(self, inputs: int, width: int, outputs: int, act: nn.Module) -> None:
        super().__init__()
        self.inp, self.rec, self.act, self.head = (
            nn.Linear(inputs, width),
            nn.Linear(width, width, bias=False),
            act,
            nn.Linear(width, outputs),
        )
        nn.init.orthogonal_(self.rec.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), self.rec.in_features)
        for t in range(x.shape[1]):
            h = self.act(self.inp(x[:, t]) + self.rec(h))
        out: Tensor = self.head(h)
        return out


def saturated(module: str, above: float, last: int = 15) -> Proof:
    """The root mean square of a tanh's output is so near to 1 that hardly any derivative is left."""

    def proof(plain: Plain) -> str:
        value = median(o.rms for o in plain.outputs[module][:last] if o is not None)
        assert value > above, f"{module} gives {value:.4g}, not above {above:g}"
        return f"{module}: root mean square {value:.4g}, so its mean derivative is {1 - value**2:.2g}"

    return proof


@sick(
    CASES,
    "jo_forecast_recurrent_weights_of_deviation_one",
    ("saturated_activation", "poor_init"),
    ("act", "rec", "inp"),
    also=("exploding_gradient", "vanishing_gradient"),
    source="https://proceedings.mlr.press/v9/glorot10a.html saturated tanh units; torch.randn for the weights of a cell",
    proof=saturated("act", 0.95),
)
def _(seed: int, fault: bool = True) -> Setup:
    model = Cell(3, 128, 1, nn.Tanh())
    if fault:
        nn.init.normal_(model.rec.weight)
        nn.init.normal_(model.inp.weight)
    g = rng(seed, 13)

    def loss(i: int) -> Tensor:
        x, y = waves(g, 32, 10)
        return F.mse_loss(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 2e-3), 50)


@sick(
    CASES,
    "jo_forecast_year_and_kelvin_as_they_are",
    ("unnormalized_input", "saturated_activation"),
    ("", "0", "1"),
    also=("vanishing_gradient",),
    source="https://chrisalbon.com/code/deep_learning/keras/preprocessing_data_for_neural_networks/ features should have mean 0 and "
    "deviation 1; here year, day and temperature in kelvin",
    proof=every(saturated("1", 0.97), lambda p: _large_input(p, 100)),
)
def _(seed: int, fault: bool = True) -> Setup:
    model = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    g = rng(seed, 14)

    def loss(i: int) -> Tensor:
        z = torch.rand(64, 3, generator=g)
        raw = torch.stack([1990 + 30 * z[:, 0], 1 + 364 * z[:, 1], 260 + 45 * z[:, 2]], 1)
        y = torch.sin(3.1 * z[:, 1]) + z[:, 2] - z[:, 0]
        return F.mse_loss(model(raw if fault else 3.4 * (z - 0.5)), y[:, None])

    return fit(model, loss, torch.optim.Adam(model.parameters(), 3e-3), 60)


def _large_input(plain: Plain, above: float) -> str:
    first = plain.outputs["0"][0]
    assert first is not None
    assert first.rms > above, f"the first layer gives {first.rms:.3g}"
    return f"the first layer gives a root mean square of {first.rms:.3g} on raw inputs"


@sick(
    CASES,
    "jo_imitation_deep_sigmoid_actor",
    ("vanishing_gradient",),
    ("0", "2", "4", "6", "8"),
    also=("loss_plateau", "poor_init"),
    source="https://proceedings.mlr.press/v9/glorot10a.html sigmoid hidden layers, eight of them",
    proof=every(gradient_ratio("0.weight", "16.weight", 1e-4, last=15), gradient_ratio("4.weight", "16.weight", 1e-2, last=15)),
)
def _(seed: int, fault: bool = True) -> Setup:
    model = mlp(nn.Sigmoid if fault else nn.ReLU, 8, 40, 6, 4)
    g = rng(seed, 15)
    expert = torch.randn(6, 4, generator=g)

    def loss(i: int) -> Tensor:
        x = torch.randn(64, 6, generator=g)
        return F.cross_entropy(model(x), (x @ expert).argmax(1))

    return fit(model, loss, torch.optim.Adam(model.parameters(), 2e-3), 60)


class ScaleGradient(torch.autograd.Function):
    """The identity, with a factor on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


class TwoTasks(nn.Module):
    """A shared trunk and two heads, with a factor on the gradient that the heads send to the trunk."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(10, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU())
        self.price, self.churn = mlp(nn.GELU, 1, 24, 32, 1), mlp(nn.GELU, 1, 24, 32, 1)
        self.factor = factor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x)
        scaled: Tensor = ScaleGradient.apply(h, self.factor)  # type: ignore[no-untyped-call]
        return self.price(scaled), self.churn(scaled)


@sick(
    CASES,
    "jo_multitask_trunk_gradient_scaled_away",
    ("vanishing_gradient",),
    ("trunk",),
    source="https://arxiv.org/abs/1505.07818 a factor on the gradient between heads and trunk, of 1e-6 by a wrong schedule",
    proof=every(
        gradient_ratio("trunk.0.weight", "price.0.weight", 1e-4, last=15),
        gradient_ratio("trunk.2.weight", "churn.0.weight", 1e-4, last=15),
        update_ratio(above=1e-4, last=15),
        lambda p: _still(p, "trunk.0.weight", 1e-5),
    ),
)
def _(seed: int, fault: bool = True) -> Setup:
    model = TwoTasks(1e-6 if fault else 1.0)
    data = Table(seed, 16)

    def loss(i: int) -> Tensor:
        x, y = data()
        price, churn = model(x)
        return F.mse_loss(price, y) + F.binary_cross_entropy_with_logits(churn, (y > 0).float())

    return fit(model, loss, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), 60)


def _still(plain: Plain, name: str, below: float, last: int = 15) -> str:
    ratio = median(s / w for s, w in zip(plain.steps[name][:last], plain.weights[name][:last], strict=True))
    assert ratio < below, f"{name} moves by {ratio:.3g} of itself"
    return f"{name} moves by {ratio:.2g} of itself in an update"


class Highway(nn.Module):
    """Layers whose gradient is enlarged on the way back."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(10 if k == 0 else 32, 32) for k in range(7))
        self.head = nn.Linear(32, 4)
        self.factor = factor
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.get_parameter("weight"), nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.relu(layer(x))
            x = ScaleGradient.apply(x, self.factor)  # type: ignore[no-untyped-call]
        out: Tensor = self.head(x)
        return out


@sick(
    CASES,
    "jo_ranker_gradient_boost_in_every_layer",
    ("exploding_gradient",),
    ("layers",),
    source="https://pytorch.org/docs/stable/notes/extending.html a backward of one's own that multiplies by 6 instead of passing on",
    proof=gradient_ratio("head.weight", "layers.0.weight", 1e-3, last=15),
)
def _(seed: int, fault: bool = True) -> Setup:
    model = Highway(6.0 if fault else 1.0)
    g = rng(seed, 17)
    teacher = torch.randn(10, 4, generator=g)

    def loss(i: int) -> Tensor:
        x = torch.randn(64, 10, generator=g)
        return F.cross_entropy(model(x), (x @ teacher).argmax(1))

    def clip(i: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    return fit(model, loss, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), 50, between=clip)


@sick(
    CASES,
    "jo_series_linear_recurrence_above_one",
    ("exploding_gradient", "poor_init"),
    ("inp", "rec"),
    source="https://arxiv.org/abs/1211.5063 the largest eigenvalue of the recurrent weights is well above 1 (state-space-like, no squashing)",
    proof=every(gradient_ratio("head.bias", "rec.weight", 1e-3, last=1), lambda p: _large_loss(p, 1e3)),
)
def _(seed: int, fault: bool = True) -> Setup:
    model = Cell(3, 32, 1, nn.Identity())
    if fault:
        with torch.no_grad():
            model.rec.weight.mul_(1.6)
    g = rng(seed, 18)
    a = torch.randn(3, generator=g)

    def loss(i: int) -> Tensor:
        x = torch.randn(32, 24, 3, generator=g)
        y = torch.zeros(32)
        for t in range(24):
            y = 0.8 * y + 0.4 * x[:, t] @ a
        return F.mse_loss(model(x), y[:, None])

    return fit(model, loss, torch.optim.Adam(model.parameters(), 5e-3), 40)


def _large_loss(plain: Plain, above: float) -> str:
    assert plain.losses[0] > above, f"the first loss is {plain.losses[0]:.3g}"
    return f"the first loss is {plain.losses[0]:.3g}"


class Chars(nn.Module):
    """A GRU language model."""

    def __init__(self, words: int = 24, width: int = 48) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, 32)
        self.gru = nn.GRU(32, width, batch_first=True)
        self.head = nn.Linear(width, words)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.gru(self.embed(x))[0])
        return out


def next_token(model: nn.Module, data: Callable[[], tuple[Tensor, Tensor]], **options: Any) -> Callable[[int], Tensor]:
    """Cross-entropy of the next token on a fresh batch."""

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten(), **options)

    return loss


@sick(
    CASES,
    "jo_language_model_adam_rate_of_one",
    ("update_ratio_too_large", "loss_diverging"),
    (),
    also=("saturated_activation", "exploding_gradient", "vanishing_gradient", "gradient_spike", "loss_spike"),
    source="https://karpathy.github.io/2019/04/25/recipe/ Adam is safe at 3e-4; here its rate is 1",
    proof=every(lambda p: _ratio_somewhere(p, 1.0, 3), update_ratio(above=0.1, last=10), loss_grows(3, last=15)),
)
def _(seed: int, fault: bool = True) -> Setup:
    model = Chars()
    return fit(model, next_token(model, Text(seed)), torch.optim.Adam(model.parameters(), 1.0 if fault else 5e-3), 40)


@sick(
    CASES,
    "jo_language_model_lambda_returns_a_rate",
    ("update_ratio_too_small",),
    (),
    also=("loss_plateau",),
    source="https://runebook.dev/en/docs/pytorch/generated/torch.optim.lr_scheduler.lambdalr/torch.optim.lr_scheduler.LambdaLR "
    "the lambda returns the rate and not a factor: 1e-3 times 1e-3",
    proof=every(update_ratio(below=1e-5, last=15), loss_stays(0.02, last=60)),
)
def _(seed: int, fault: bool = True) -> Setup:
    model = Chars(24, 64)
    rate = 1e-3 if fault else 3e-3
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: (rate if fault else 1.0) * 0.99**i)
    read = next_token(model, Text(seed, batch=16))

    def train() -> Iterator[Event]:
        for _ in range(60):
            optimizer.zero_grad()
            loss = read(0)
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            schedule.step()
            yield "step", [optimizer]

    return Setup(model, train)


@sick(
    CASES,
    "jo_table_clipped_to_nothing",
    ("update_ratio_too_small",),
    (),
    also=("loss_plateau",),
    source="https://pytorch.org/docs/stable/generated/torch.nn.utils.clip_grad_norm_.html a max_norm of 1e-4 under SGD",
    proof=every(update_ratio(below=1e-5, last=15), loss_stays(0.1)),
)
def _(seed: int, fault: bool = True) -> Setup:
    model = mlp(nn.ReLU, 2, 48, 10, 1)
    data = Table(seed, 19, batch=128)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.mse_loss(model(x), y)

    def clip(i: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1e-4 if fault else 1.0)

    return fit(model, loss, torch.optim.SGD(model.parameters(), 0.1), 60, between=clip)


class Encoded(nn.Module):
    """An encoder, frozen or not, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(10, 48), nn.LayerNorm(48), nn.GELU(), nn.Linear(48, 32), nn.GELU())
        self.head = nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(x))
        return out


@sick(
    CASES,
    "jo_thawed_encoder_keeps_its_rate_of_zero",
    ("frozen_weights",),
    ("encoder",),
    onset=12,
    source="https://arxiv.org/abs/1801.06146 gradual unfreezing; the group of the encoder keeps lr = 0",
    proof=every(
        unchanged("encoder.0.weight", "encoder.3.weight", "encoder.1.weight", first=12),
        no_gradient("encoder.0.weight", last=12),
        moves("head.weight"),
    ),
)
def _(seed: int, fault: bool = True) -> Setup:
    model = Encoded()
    model.encoder.requires_grad_(False)
    data = Table(seed, 20)
    optimizer = torch.optim.AdamW(
        [{"params": model.encoder.parameters(), "lr": 0.0}, {"params": model.head.parameters(), "lr": 1e-2}], weight_decay=0.01
    )

    def thaw(i: int) -> None:
        if i == 12:
            model.encoder.requires_grad_(True)
            if not fault:
                optimizer.param_groups[0]["lr"] = 3e-3

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.mse_loss(model(x), y)

    return fit(model, loss, optimizer, 60, before=thaw)


class Gains(nn.Module):
    """A language model over the last three words, with RMSNorm before every block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, 32)
        nn.init.normal_(self.embed.weight, std=0.1)
        self.mix = nn.Linear(96, 64)
        self.norms = nn.ModuleList(nn.RMSNorm(64) for _ in range(3))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 64)) for _ in range(2))
        self.head = nn.Linear(64, 24)

    def forward(self, x: Tensor) -> Tensor:
        e = self.embed(x)
        h = self.mix(torch.cat([F.pad(e, (0, 0, k, 0))[:, : e.shape[1]] for k in range(3)], -1))
        for norm, block in zip(self.norms, self.blocks, strict=False):
            h = h + block(norm(h))
        out: Tensor = self.head(self.norms[2](h))
        return out.float()


@sick(
    CASES,
    "jo_language_model_gains_in_bfloat16",
    ("frozen_weights",),
    ("norms",),
    source="https://github.com/fla-org/flame/issues/47 pure bf16: the weights of RMSNorm stay 1",
    proof=every(unchanged("norms.0.weight", "norms.1.weight", "norms.2.weight", last=30), moves("head.weight", "mix.weight")),
)
def _(seed: int, fault: bool = True) -> Setup:
    model = Gains()
    if fault:
        model.bfloat16()
    return fit(model, next_token(model, Text(seed, batch=16)), torch.optim.Adam(model.parameters(), 8e-4), 60)


def no_step() -> Proof:
    """No optimizer steps, there are gradients, and every parameter keeps its norm."""

    def proof(plain: Plain) -> str:
        assert all(math.isnan(s) for steps in plain.steps.values() for s in steps), "something steps"
        assert all(len(set(w)) == 1 for w in plain.weights.values()), "a weight changes"
        assert all(g > 0 for grads in plain.grads.values() for g in grads), "a gradient is missing"
        return f"no step in {len(plain.losses)} backward passes, and no weight changes"

    return proof


@sick(
    CASES,
    "jo_accumulation_longer_than_the_epoch",
    ("never_stepped",),
    (),
    also=("loss_plateau",),
    source="https://github.com/huggingface/transformers/issues/2995 more accumulation steps than batches in an epoch",
    proof=no_step(),
)
def _(seed: int, fault: bool = True) -> Setup:
    model = BiTagger(False)
    data = Tagged(seed, 21)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    accumulate = 16 if fault else 2

    def train() -> Iterator[Event]:
        for _ in range(6):
            optimizer.zero_grad()
            for batch in range(10):
                x, y = data()
                loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten()) / accumulate
                loss.backward()
                yield "read", [loss]
                if (batch + 1) % accumulate == 0:
                    optimizer.step()
                    yield "step", [optimizer]
                    optimizer.zero_grad()

    return Setup(model, train)


@sick(
    CASES,
    "jo_graph_step_without_parentheses",
    ("never_stepped",),
    (),
    also=("loss_plateau",),
    source="https://pytorch.org/docs/stable/optim.html taking an optimization step; the call lacks its parentheses",
    proof=no_step(),
)
def _(seed: int, fault: bool = True) -> Setup:
    model = GraphNet()
    g = rng(seed, 22)
    mix = torch.randn(6, 1, generator=g) / 2.5
    optimizer = torch.optim.RMSprop(model.parameters(), 3e-3)

    def train() -> Iterator[Event]:
        for _ in range(40):
            x = torch.randn(24, 6, generator=g)
            a = (torch.rand(24, 24, generator=g) < 0.2).float()
            a = ((a + a.T + torch.roll(torch.eye(24), 1, 0)) > 0).float()
            loss = F.mse_loss(model(x, a), x @ mix + 2 * (a @ x @ mix) / a.sum(-1, keepdim=True))
            optimizer.zero_grad()
            loss.backward()
            yield "read", [loss]
            if fault:
                optimizer.step  # noqa: B018
            else:
                optimizer.step()
                yield "step", [optimizer]

    return Setup(model, train)


@sick(
    CASES,
    "jo_multitask_weight_of_zero",
    ("zero_gradient",),
    ("churn",),
    source="https://arxiv.org/abs/1705.07115 weights of the losses set by hand; one was left at 0.0",
    proof=every(
        zero_gradient("churn.0.weight", "churn.0.bias", "churn.2.weight", "churn.2.bias"),
        has_gradient("price.0.weight", "trunk.0.weight"),
    ),
)
def _(seed: int, fault: bool = True) -> Setup:
    model = TwoTasks(1.0)
    data = Table(seed, 23)
    weight = 0.0 if fault else 0.5

    def loss(i: int) -> Tensor:
        x, y = data()
        price, churn = model(x)
        return F.mse_loss(price, y) + weight * F.binary_cross_entropy_with_logits(churn, (y > 0).float())

    return fit(model, loss, torch.optim.Adam(model.parameters(), 5e-3), 50)


class Codes(nn.Module):
    """Numbers to whole-numbered codes and back."""

    def __init__(self, straight: bool) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 12))
        self.decoder = nn.Sequential(nn.Linear(12, 32), nn.GELU(), nn.Linear(32, 10))
        self.straight = straight

    def forward(self, x: Tensor) -> Tensor:
        z = 4 * self.encoder(x)
        code = torch.round(z)
        if self.straight:
            code = z + (code - z).detach()
        out: Tensor = self.decoder(code / 2)
        return out


@sick(
    CASES,
    "jo_retrieval_rounded_codes",
    ("zero_gradient",),
    ("encoder",),
    source="https://discuss.pytorch.org/t/torch-round-gradient/28628/4 the derivative of round is 0",
    proof=every(zero_gradient("encoder.0.weight", "encoder.2.weight"), has_gradient("decoder.0.weight", "decoder.2.weight")),
)
def _(seed: int, fault: bool = True) -> Setup:
    model = Codes(not fault)
    g = rng(seed, 24)
    basis = torch.randn(3, 10, generator=g) / math.sqrt(3)

    def loss(i: int) -> Tensor:
        x = torch.randn(64, 3, generator=g) @ basis
        return F.mse_loss(model(x), x)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 5e-3), 60)


class ContextTagger(nn.Module):
    """A tagger with a layer over the word before, which a refactoring may have left out of the forward."""

    def __init__(self, used: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 24)
        self.context = nn.Sequential(nn.Linear(24, 24), nn.Tanh())
        self.body = nn.Sequential(nn.Linear(24, 48), nn.GELU())
        self.head = nn.Linear(48, 5)
        self.used = used

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        if self.used:
            h = h + self.context(F.pad(h[:, :-1], (0, 0, 1, 0)))
        out: Tensor = self.head(self.body(h))
        return out


@sick(
    CASES,
    "jo_tagger_context_layer_never_called",
    ("missing_gradient",),
    ("context",),
    within=30,  # a module that is never called
    source="https://pytorch.org/docs/stable/notes/ddp.html find_unused_parameters: a layer that forward does not use",
    proof=every(
        no_gradient("context.0.weight", "context.0.bias"), lambda p: _never_called(p, "context.0"), has_gradient("embed.weight")
    ),
)
def _(seed: int, fault: bool = True) -> Setup:
    model = ContextTagger(not fault)
    return fit(model, next_token(model, Tagged(seed, 25)), torch.optim.AdamW(model.parameters(), 1e-2), 60)


def _never_called(plain: Plain, name: str) -> str:
    assert all(o is None for o in plain.outputs[name]), f"{name} is called"
    return f"{name} is never called"


@sick(
    CASES,
    "jo_demand_target_in_other_units",
    ("gradient_spike", "loss_spike"),
    (),
    onset=30,
    source="https://arxiv.org/abs/1211.5063 a sudden large gradient; here a batch with rows in grams and not kilograms",
    proof=every(gradient_spikes(30, 100), lambda p: _loss_at(p, 30, 1000)),
)
def _(seed: int, fault: bool = True) -> Setup:
    model = mlp(nn.SiLU, 2, 32, 10, 1)
    data = Table(seed, 26)

    def loss(i: int) -> Tensor:
        x, y = data()
        if fault and i == 30:
            y[:3] *= 1000
        return F.mse_loss(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 5e-3), 60)


def _loss_at(plain: Plain, update: int, factor: float) -> str:
    ratio = plain.losses[update] / median(plain.losses[:update])
    assert ratio > factor, f"the loss is {ratio:.3g} times the median"
    return f"the loss is {ratio:.3g} times the median before it"


@sick(
    CASES,
    "jo_language_model_one_batch_summed",
    ("gradient_spike", "loss_spike"),
    (),
    onset=40,
    source="https://pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html reduction='sum' in the branch for the last batch",
    proof=every(gradient_spikes(40, 50), lambda p: _loss_at(p, 40, 50)),
)
def _(seed: int, fault: bool = True) -> Setup:
    model = Chars()
    data = Text(seed, batch=12)
    mean, total = next_token(model, data), next_token(model, data, reduction="sum")

    def clip(i: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)

    return fit(
        model, lambda i: (total if fault and i == 40 else mean)(i), torch.optim.AdamW(model.parameters(), 5e-3), 70, between=clip
    )


@sick(
    CASES,
    "jo_tagger_tags_of_other_sentences",
    ("loss_plateau",),
    (),
    source="https://blog.slavv.com/37-reasons-why-your-neural-network-is-not-working-4020854bd607 inputs shuffled without their labels",
    proof=every(loss_stays(0.03, last=100), update_ratio(above=5e-4, last=100)),
)
def _(seed: int, fault: bool = True) -> Setup:
    model = BiTagger(False)
    data = Tagged(seed, 27)

    def loss(i: int) -> Tensor:
        x, y = data()
        if fault:
            y = y.flatten()[torch.randperm(y.numel(), generator=data.g)].view_as(y)
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    return fit(model, loss, torch.optim.Adam(model.parameters(), 3e-3), 140)


class HalfHead(nn.Module):
    """A body in float32 and a head that computes in float16."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
        self.head = nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.body(x).half(), self.head.weight.half(), self.head.bias.half()).float()


@sick(
    CASES,
    "jo_forecast_scaled_loss_too_large_for_half",
    ("loss_scale_collapse",),
    (),
    also=("non_finite_gradient",),
    source="https://github.com/NVIDIA/apex/issues/715 the loss scale is halved again and again; here a loss weight of 1e7",
    proof=lambda p: _skips(p, 18),
)
def _(seed: int, fault: bool = True) -> Setup:
    model = HalfHead()
    data = Table(seed, 28)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    weight = 1e7 if fault else 1.0

    def train() -> Iterator[Event]:
        for _ in range(60):
            x, y = data()
            loss = weight * F.mse_loss(model(x), y)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            yield "read", [loss]
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            yield "step", [optimizer] if scaler.get_scale() >= before else []

    return Setup(model, train)


def _skips(plain: Plain, least: int) -> str:
    skipped = [math.isnan(s) for s in plain.steps["head.weight"]]
    first = skipped.index(False) if False in skipped else len(skipped)
    assert first >= least, f"{first} skips in a row"
    return f"the first {first} steps are skipped, so that the scale is 2**{16 - first}"


@sick(
    CASES,
    "jo_churn_incomes_as_they_are",
    ("unnormalized_input",),
    ("",),
    also=("loss_spike", "dead_units"),  # incomes and balances are positive, so that many units fire for no row
    source="https://chrisalbon.com/code/deep_learning/keras/preprocessing_data_for_neural_networks/ income and balance in euros",
    proof=every(lambda p: _large_input(p, 1e4), lambda p: _large_loss(p, 50)),
)
def _(seed: int, fault: bool = True) -> Setup:
    model = nn.Sequential(nn.Linear(4, 48), nn.ReLU(), nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 1))
    g = rng(seed, 29)
    scale, centre = torch.tensor([2e4, 15.0, 3.0, 8e4]), torch.tensor([5e4, 45.0, 4.0, 1e5])

    def loss(i: int) -> Tensor:
        z = torch.randn(64, 4, generator=g)
        y = (z[:, 0] + z[:, 1] - z[:, 3] + 0.3 * torch.randn(64, generator=g) > 0).float()
        return F.binary_cross_entropy_with_logits(model(z * scale + centre if fault else z)[:, 0], y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 2e-3), 60)


@sick(
    CASES,
    "jo_imitation_probabilities_as_logits",
    ("double_softmax",),
    ("5",),
    source="https://pytorch.org/docs/stable/distributions.html#categorical a softmax's output given as logits=",
    proof=every(lambda p: _probabilities_only(p, "5", 3), has_gradient("0.weight", "4.weight")),
)
def _(seed: int, fault: bool = True) -> Setup:
    model = nn.Sequential(
        nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 3), nn.Softmax(-1) if fault else nn.Identity()
    )
    g = rng(seed, 30)
    expert = torch.randn(6, 3, generator=g)

    def loss(i: int) -> Tensor:
        x = torch.randn(64, 6, generator=g)
        policy = torch.distributions.Categorical(logits=model(x))
        result: Tensor = -policy.log_prob((x @ expert).argmax(1)).mean()
        return result

    return fit(model, loss, torch.optim.Adam(model.parameters(), 5e-3), 60)


def _probabilities_only(plain: Plain, module: str, classes: int) -> str:
    seen = [o for o in plain.outputs[module] if o is not None]
    assert all(o.low >= 0 and o.high <= 1 for o in seen), f"{module} gives more than probabilities"
    floor = math.log(math.e + classes - 1) - 1
    assert min(plain.losses) > floor - 1e-3, f"the loss reaches {min(plain.losses):.3g}"
    return f"{module} gives probabilities, of which a second softmax is taken: the loss stays above {floor:.3g}"


class Factors(nn.Module):
    """Ratings as the product of factors of a user and an item."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(20, 8), nn.Embedding(20, 8)
        nn.init.normal_(self.user.weight, std=0.5)
        nn.init.normal_(self.item.weight, std=0.5)

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        result: Tensor = (self.user(u) * self.item(v)).sum(-1)
        return result


@sick(
    CASES,
    "jo_recommender_rate_far_too_high",
    ("loss_diverging", "exploding_gradient", "update_ratio_too_large"),
    (),
    also=("non_finite_loss", "non_finite_gradient", "non_finite_weight", "non_finite_activation"),
    source="https://sifter.org/~simon/journal/20061211.html matrix factorisation by gradient descent, the rate set for single ratings "
    "used on sums over a batch",
    proof=every(loss_grows(100, last=12), lambda p: _ratio_somewhere(p, 1.0, 12)),
)
def _(seed: int, fault: bool = True) -> Setup:
    model = Factors()
    g = rng(seed, 31)
    a, b = torch.randn(20, 4, generator=g), torch.randn(20, 4, generator=g)

    def loss(i: int) -> Tensor:
        u, v = torch.randint(20, (256,), generator=g), torch.randint(20, (256,), generator=g)
        result: Tensor = (model(u, v) - (a[u] * b[v]).sum(-1) / 2).square().sum() / (1 if fault else 256)
        return result

    return fit(model, loss, torch.optim.SGD(model.parameters(), 0.5 if fault else 1.0), 40)


def _ratio_somewhere(plain: Plain, above: float, last: int) -> str:
    ratio = max(r for r in (plain.update_ratio(i) for i in range(last)) if not math.isnan(r))
    assert ratio > above, f"the largest update ratio is {ratio:.3g}"
    return f"an update changes {ratio:.3g} of the weights"


@sick(
    CASES,
    "jo_language_model_zeroed_once_an_epoch",
    ("gradients_not_zeroed",),
    (),
    source="https://discuss.pytorch.org/t/why-do-we-need-to-set-the-gradients-manually-to-zero-in-pytorch/4903 zero_grad in the loop "
    "over epochs, step in the loop over batches",
    proof=every(piles_up(14, "head.bias", by=2), lambda p: _drops(p, "head.bias", 15)),
)
def _(seed: int, fault: bool = True) -> Setup:
    model = Chars()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    read = next_token(model, Text(seed, batch=16))

    def train() -> Iterator[Event]:
        for _ in range(4):
            optimizer.zero_grad()
            for _ in range(15):
                if not fault:
                    optimizer.zero_grad()
                loss = read(0)
                loss.backward()
                yield "read", [loss]
                optimizer.step()
                yield "step", [optimizer]

    return Setup(model, train)


def _drops(plain: Plain, name: str, update: int) -> str:
    ratio = plain.grads[name][update] / plain.grads[name][update - 1]
    assert ratio < 0.5, f"the gradient of {name} is {ratio:.3g} times the one before"
    return f"when it is zeroed at last, the gradient of {name} falls to {ratio:.2g} times the one before"


class ListNet(nn.Module):
    """Graph layers in a list of Python's, which registers nothing."""

    def __init__(self, registered: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 32), nn.Linear(32, 1)
        layers = [MeanConv(32, 32) for _ in range(2)]
        self.layers: Any = nn.ModuleList(layers) if registered else layers
        self.start = [layer.lin.weight.detach().clone() for layer in layers]

    def forward(self, x: Tensor, adjacent: Tensor) -> Tensor:
        h = self.embed(x)
        for layer in self.layers:
            h = F.gelu(layer(h, adjacent))
        out: Tensor = self.head(h)
        return out


@sick(
    CASES,
    "jo_graph_layers_in_a_plain_list",
    ("not_in_optimizer",),
    ("",),
    source="https://discuss.pytorch.org/t/when-should-i-use-nn-modulelist-and-when-should-i-use-nn-sequential/5463/18 "
    "modules in a list are not registered",
    proof=lambda p: _unregistered(p),
)
def _(seed: int, fault: bool = True) -> Setup:
    model = ListNet(not fault)
    g = rng(seed, 32)
    mix = torch.randn(6, 1, generator=g) / 2.5

    def loss(i: int) -> Tensor:
        x = torch.randn(24, 6, generator=g)
        a = (torch.rand(24, 24, generator=g) < 0.2).float()
        a = ((a + a.T + torch.roll(torch.eye(24), 1, 0)) > 0).float()
        return F.mse_loss(model(x, a), x @ mix + 2 * (a @ x @ mix) / a.sum(-1, keepdim=True))

    return fit(model, loss, torch.optim.Adam(model.parameters(), 5e-3), 50)


def _unregistered(plain: Plain) -> str:
    model = plain.setup.model
    assert isinstance(model, ListNet)
    assert not any("lin" in name for name in named_parameters(model)), "the layers are registered"
    for layer, start in zip(model.layers, model.start, strict=True):
        assert torch.equal(layer.lin.weight, start), "a layer changes"
        assert float(layer.lin.weight.grad.norm()) > 0, "a layer has no gradient"
    return "the layers get gradients, are no parameters of the model, and never change"


class TinyTransformer(nn.Module):
    """A causal transformer whose head is its embedding."""

    def __init__(self, words: int = 24, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.place = nn.Parameter(0.02 * torch.randn(16, width))
        nn.init.normal_(self.embed.weight, std=0.1)
        self.norm1, self.norm2, self.last = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend = nn.MultiheadAttention(width, 2, batch_first=True)
        self.feed = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.place
        n = self.norm1(h)
        mask = torch.full((16, 16), -math.inf).triu(1)
        h = h + self.attend(n, n, n, attn_mask=mask, need_weights=False)[0]
        out: Tensor = self.head(self.last(h + self.feed(self.norm2(h))))
        return out


@healthy(
    CASES,
    "jo_ok_tied_transformer_smoothed_labels",
    source="https://arxiv.org/abs/1706.03762 tied embeddings, causal -inf mask, label smoothing (the loss has a floor), warm-up from 0",
    proof=every(converges(0.75), lambda p: _tied(p.setup.model)),
)
def _(seed: int) -> Setup:
    model = TinyTransformer()
    optimizer = torch.optim.AdamW(model.parameters(), 6e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(i / 20, 1.0) * (0.5 + 0.5 * math.cos(math.pi * i / 160)))
    read = next_token(model, Text(seed), label_smoothing=0.1)

    def train() -> Iterator[Event]:
        for i in range(150):
            optimizer.zero_grad()
            loss = read(i)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            yield "read", [loss]
            optimizer.step()
            schedule.step()
            yield "step", [optimizer]

    return Setup(model, train)


def _tied(model: Any) -> str:
    weight = model.embed.weight
    assert model.head.weight is weight, "not tied"
    return f"embedding and head share a weight of norm {float(weight.detach().norm()):.3g}"


@healthy(
    CASES,
    "jo_ok_padded_tagger_with_idle_rows",
    source="https://pytorch.org/docs/stable/generated/torch.nn.MultiheadAttention.html key_padding_mask; ignore_index; words never seen",
    proof=converges(0.35),
)
def _(seed: int) -> Setup:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(200, 32, padding_idx=0)  # only 31 rows are ever used
            self.shift = nn.Linear(64, 32)
            self.layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.1, batch_first=True, norm_first=True)
            self.head = nn.Linear(32, 5)

        def forward(self, x: Tensor) -> Tensor:
            e = self.embed(x)
            h = self.shift(torch.cat([e, F.pad(e[:, :-1], (0, 0, 1, 0))], -1))
            out: Tensor = self.head(self.layer(h, src_key_padding_mask=x == 0))
            return out

    model = Padded()
    data = Tagged(seed, 41)

    def loss(i: int) -> Tensor:
        x, y = data()
        length = torch.randint(3, 13, (len(x), 1), generator=data.g)
        pad = torch.arange(12) >= length
        x, y = (x + 1).masked_fill(pad, 0), y.masked_fill(pad, -100)
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-100)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), 5e-3), 150)


@healthy(
    CASES,
    "jo_ok_recommender_sparse_rows",
    source="https://pytorch.org/docs/stable/generated/torch.optim.SparseAdam.html sparse gradients; most rows are rarely or never seen",
    proof=converges(0.4),
)
def _(seed: int) -> Setup:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.user, self.item = nn.Embedding(400, 8, sparse=True), nn.Embedding(300, 8, sparse=True)
            for e in (self.user, self.item):
                nn.init.normal_(e.weight, std=0.3)

        def forward(self, u: Tensor, v: Tensor) -> Tensor:
            result: Tensor = (self.user(u) * self.item(v)).sum(-1)
            return result

    model = Sparse()
    g = rng(seed, 42)
    a, b = torch.randn(400, 2, generator=g), torch.randn(300, 2, generator=g)

    def loss(i: int) -> Tensor:
        # popular ones come often, others never
        u = (60 * torch.rand(128, generator=g) ** 2).long()
        v = (50 * torch.rand(128, generator=g) ** 2).long()
        return F.mse_loss(model(u, v), (a[u] * b[v]).sum(-1) / 1.4)

    return fit(model, loss, torch.optim.SparseAdam(list(model.parameters()), 0.02), 200)


class TopOne(nn.Module):
    """A mixture that sends every row to one expert; few rows go to the last at first."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 4)
        self.experts = nn.ModuleList(mlp(nn.GELU, 1, 24, 6, 1) for _ in range(4))
        with torch.no_grad():
            self.gate.weight.mul_(0.3)
            self.gate.bias.copy_(torch.tensor([0.0, 0.0, 0.0, -0.1]))
        self.balance = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        shares = torch.softmax(self.gate(x), -1)
        weight, chosen = shares.max(-1)
        self.balance = 4 * (F.one_hot(chosen, 4).float().mean(0) * shares.mean(0)).sum()
        out = x.new_zeros(len(x), 1)
        for k, expert in enumerate(self.experts):
            rows = (chosen == k).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]) * 2 * weight[rows, None])
        return out


@healthy(
    CASES,
    "jo_ok_experts_that_miss_batches",
    source="https://arxiv.org/abs/2101.03961 top-1 routing: an expert without tokens has no gradient in that step",
    proof=every(converges(0.6), lambda p: _misses(p, "experts.3.0.weight")),
)
def _(seed: int) -> Setup:
    model = TopOne()
    data = Table(seed, 43, features=6, batch=16)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.mse_loss(model(x), y) + 0.2 * model.balance

    return fit(model, loss, torch.optim.Adam(model.parameters(), 5e-3), 250)


def _misses(plain: Plain, name: str) -> str:
    missed = sum(math.isnan(g) for g in plain.grads[name])
    assert 0 < missed < 0.7 * len(plain.losses), f"{name} lacks a gradient {missed} times"
    return f"{name} lacks a gradient in {missed} of {len(plain.losses)} updates"


@healthy(
    CASES,
    "jo_ok_reinforce_with_entropy_bonus",
    source="https://arxiv.org/abs/1602.01783 policy gradient with noisy returns and an entropy bonus: the loss is negative or around 0",
    proof=quality("the mean probability of the best action", lambda m: m.score(), 0.6),
)
def _(seed: int) -> Setup:
    g = rng(seed, 44)
    best = torch.randn(5, 3, generator=g)
    probe = torch.randn(500, 5, generator=g)

    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(nn.Tanh, 1, 32, 5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.log_softmax(self.net(x), -1)

        def score(self) -> float:
            return float(self.net(probe).softmax(-1).gather(1, (probe @ best).argmax(1)[:, None]).mean())

    model = Policy()

    def loss(i: int) -> Tensor:
        x = torch.randn(128, 5, generator=g)
        log = model(x)
        action = torch.multinomial(log.detach().exp(), 1, generator=g)
        reward = (x @ best).gather(1, action)[:, 0] + torch.randn(128, generator=g)
        gain = (reward - reward.mean()) / reward.std()
        entropy = -(log.exp() * log).sum(-1).mean()
        result: Tensor = -(gain * log.gather(1, action)[:, 0]).mean() - 0.02 * entropy
        return result

    return fit(model, loss, torch.optim.Adam(model.parameters(), 1e-2), 200)


@healthy(
    CASES,
    "jo_ok_dqn_with_target_network",
    source="https://www.nature.com/articles/nature14236 DQN: a target network that is copied now and then, the loss rises after a copy",
    proof=quality("the share of states in which the right move is preferred", lambda m: m["online"].score(), 0.99),
)
def _(seed: int) -> Setup:
    class Values(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(nn.ELU, 1, 32, 8, 2)

        def forward(self, s: Tensor) -> Tensor:
            out: Tensor = self.net(s)
            return out

        def score(self) -> float:
            return float((self.net(torch.eye(8)).argmax(1) == 1).float().mean())

    online, target = Values(), Values()
    target.load_state_dict(online.state_dict())
    target.requires_grad_(False)
    g = rng(seed, 45)
    optimizer = torch.optim.Adam(online.parameters(), 5e-3)
    eye = torch.eye(8)

    def train() -> Iterator[Event]:
        for i in range(300):
            state = torch.randint(8, (64,), generator=g)
            action = torch.randint(2, (64,), generator=g)
            after = (state + 2 * action - 1).clamp(0, 7)
            goal = (after == 7).float() + 0.8 * target(eye[after]).max(1).values
            loss = F.smooth_l1_loss(online(eye[state]).gather(1, action[:, None])[:, 0], goal)
            optimizer.zero_grad()
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]
            if i % 20 == 19:
                target.load_state_dict(online.state_dict())

    return Setup({"online": online, "target": target}, train)


@healthy(
    CASES,
    "jo_ok_claims_with_heavy_tails",
    source="https://pytorch.org/docs/stable/generated/torch.nn.HuberLoss.html targets with a noise of Student's t (2 degrees), Huber loss",
    proof=converges(0.6),
)
def _(seed: int) -> Setup:
    model = mlp(nn.SiLU, 2, 32, 4, 1)
    data = Table(seed, 46, features=4, batch=64)

    def loss(i: int) -> Tensor:
        x, y = data()
        z = torch.randn(64, 3, generator=data.g)
        noise = z[:, :1] / (z[:, 1:].square().sum(1, keepdim=True) / 2).sqrt()
        return F.huber_loss(model(x), 3 * y + 0.3 * noise)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), 6e-3), 300)


class Gated(nn.Module):
    """Highway layers whose gates let little through at first."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(10, 32)
        self.new = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
        self.gate = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.Sigmoid()) for _ in range(4))
        self.head = nn.Linear(32, 1)
        for gate in self.gate.modules():
            if isinstance(gate, nn.Linear):
                nn.init.constant_(gate.bias, -3.0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        for new, gate in zip(self.new, self.gate, strict=True):
            t = gate(h)
            h = t * F.relu(new(h)) + (1 - t) * h
        out: Tensor = self.head(h)
        return out


@healthy(
    CASES,
    "jo_ok_highway_gates_nearly_shut",
    source="https://arxiv.org/abs/1505.00387 highway networks: the bias of the gates starts at -3",
    proof=converges(0.3),
)
def _(seed: int) -> Setup:
    model = Gated()
    data = Table(seed, 47)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.mse_loss(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 8e-3), 200)


@healthy(
    CASES,
    "jo_ok_forecast_cyclic_rate_truncated",
    source="https://arxiv.org/abs/1506.01186 cyclic learning rates; truncated backpropagation through time with two losses an update",
    proof=converges(0.35),
)
def _(seed: int) -> Setup:
    model = nn.ModuleDict({"gru": nn.GRU(1, 24, batch_first=True), "head": nn.Linear(24, 1)})
    g = rng(seed, 48)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CyclicLR(optimizer, 0.005, 0.12, step_size_up=15, cycle_momentum=False)

    def train() -> Iterator[Event]:
        for _ in range(40):
            phase, pitch = 6.3 * torch.rand(32, 1, generator=g), 0.3 + 0.3 * torch.rand(32, 1, generator=g)
            series = torch.sin(phase + pitch * torch.arange(61.0))[..., None]
            state = torch.zeros(1, 32, 24)
            for first in range(0, 60, 12):
                out, state = model["gru"](series[:, first : first + 12], state.detach())
                loss = F.mse_loss(model["head"](out), series[:, first + 1 : first + 13])
                optimizer.zero_grad()
                loss.backward()
                yield "read", [loss]
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "jo_ok_counts_summed_poisson",
    source="https://pytorch.org/docs/stable/generated/torch.nn.PoissonNLLLoss.html reduction='sum': gradients of hundreds, a small rate",
    proof=converges(0.8),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))
    data = Table(seed, 49, batch=256)

    def loss(i: int) -> Tensor:
        x, y = data()
        count = torch.poisson(torch.exp(1.5 + 0.8 * y), generator=data.g)
        return F.poisson_nll_loss(model(x), count, full=True, reduction="sum")

    return fit(model, loss, torch.optim.SGD(model.parameters(), 5e-5, momentum=0.9), 300)


@healthy(
    CASES,
    "jo_ok_tasks_take_turns",
    source="https://arxiv.org/abs/1901.11504 MT-DNN: every update trains one task, so a head has no gradient in the others' updates",
    proof=every(
        lambda p: _falls_by_turn(p, 3, 0.7), lambda p: _misses(p, "heads.0.weight"), lambda p: _misses(p, "heads.2.weight")
    ),
)
def _(seed: int) -> Setup:
    class Turns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Sequential(nn.Linear(10, 48), nn.GELU(), nn.Linear(48, 48), nn.GELU())
            self.heads = nn.ModuleList([nn.Linear(48, 1), nn.Linear(48, 1), nn.Linear(48, 3)])

        def forward(self, x: Tensor, task: int) -> Tensor:
            out: Tensor = self.heads[task](self.trunk(x))
            return out

    model = Turns()
    data = Table(seed, 50)

    def loss(i: int) -> Tensor:
        x, y = data()
        if i % 3 == 0:
            return F.mse_loss(model(x, 0), y)
        if i % 3 == 1:
            return F.binary_cross_entropy_with_logits(model(x, 1), (y > 0).float())
        return F.cross_entropy(model(x, 2), (y[:, 0] > 0.5).long() + (y[:, 0] > -0.5).long())

    return fit(model, loss, torch.optim.AdamW(model.parameters(), 5e-3), 240)


def _falls_by_turn(plain: Plain, turns: int, to: float) -> str:
    for k in range(turns):
        losses = plain.losses[k::turns]
        a, b = median(losses[:5]), median(losses[-10:])
        assert b < to * a, f"the loss of task {k} goes from {a:.3g} to {b:.3g}"
    return f"the losses of the {turns} tasks fall below {to:g} of what they were"


@healthy(
    CASES,
    "jo_ok_physics_lbfgs_to_the_bottom",
    source="https://arxiv.org/abs/1711.10561 a physics-informed network trained by L-BFGS with a closure; gradients are tiny in the end",
    proof=every(converges(0.01), lambda p: _keeps_moving(p, "2.weight")),
)
def _(seed: int) -> Setup:
    model = mlp(nn.Tanh, 2, 20, 1, 1)
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        lr=0.5,
        max_iter=3,
        tolerance_change=0.0,
        tolerance_grad=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    t = torch.linspace(0, 2, 40)[:, None].requires_grad_()

    def train() -> Iterator[Event]:
        for _ in range(30):
            found: list[Tensor] = []

            def closure(found: list[Tensor] = found) -> Tensor:
                optimizer.zero_grad()
                u = model(t)
                rate = torch.autograd.grad(u.sum(), t, create_graph=True)[0]
                loss = (rate + u).square().mean() + (u[0] - 1).square().mean()
                loss.backward()
                found.append(loss)
                result: Tensor = loss
                return result

            optimizer.step(closure)
            yield "read", found[:1]
            yield "step", [optimizer]

    return Setup(model, train)


def _keeps_moving(plain: Plain, name: str) -> str:
    # The steps lie within the closure's optimizer call, before the read, so what moves is the norm from read to read.
    same = sum(a == b for a, b in itertools.pairwise(plain.weights[name]))
    assert same == 0, f"{name} stays the same {same} times"
    return f"{name} moves in every update"


class Lora(nn.Module):
    """A frozen linear map and a trained one of low rank, which starts at 0."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Linear(base.in_features, rank, bias=False)
        self.b = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + 2 * self.b(self.a(x))
        return out


@healthy(
    CASES,
    "jo_ok_lora_on_a_frozen_table_net",
    source="https://arxiv.org/abs/2106.09685 LoRA: B starts at 0, so that A has a gradient of exactly 0 in the first update",
    proof=every(converges(0.5), zero_gradient("0.a.weight", "2.a.weight", last=1)),
)
def _(seed: int) -> Setup:
    model = mlp(nn.GELU, 2, 48, 10, 1)
    data = Table(seed, 51)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(150):  # the old task
        x, y = data()
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    for k in (0, 2):
        layer = model[k]
        assert isinstance(layer, nn.Linear)
        model[k] = Lora(layer)
    turn = torch.linalg.qr(torch.eye(10) + 0.25 * torch.randn(10, 10, generator=data.g)).Q

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.mse_loss(model(x @ turn), y)

    return fit(model, loss, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2), 150)


@healthy(
    CASES,
    "jo_ok_graph_few_labels_full_batch",
    source="https://arxiv.org/abs/1609.02907 GCN: one graph, few labelled nodes, dropout, weight decay; the loss goes near 0",
    proof=converges(0.2),
)
def _(seed: int) -> Setup:
    class GCN(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.drop, self.second = nn.Linear(30, 24), nn.Dropout(0.5), nn.Linear(24, 3)

        def forward(self, x: Tensor, a: Tensor) -> Tensor:
            out: Tensor = self.second(a @ self.drop(F.relu(self.first(a @ x))))
            return out

    model = GCN()
    g = rng(seed, 52)
    kind = torch.arange(90) % 3
    same = kind[:, None] == kind[None]
    a = (torch.rand(90, 90, generator=g) < torch.where(same, 0.12, 0.01)).float()
    a = ((a + a.T + torch.eye(90)) > 0).float()
    d = a.sum(1).rsqrt()
    a = d[:, None] * a * d
    x = (torch.rand(90, 30, generator=g) < torch.where((torch.arange(30) % 3)[None] == kind[:, None], 0.4, 0.15)).float()

    def loss(i: int) -> Tensor:
        return F.cross_entropy(model(x, a)[:18], kind[:18])

    return fit(model, loss, torch.optim.Adam(model.parameters(), 2e-2, weight_decay=5e-4), 200)


@healthy(
    CASES,
    "jo_ok_accumulated_freeze_and_thaw",
    source="https://arxiv.org/abs/1801.06146 the encoder is thawed after 20 updates by a group of its own; four backward passes an update",
    proof=every(converges(0.45), no_gradient("encoder.0.weight", last=20), moves("encoder.0.weight", first=20)),
)
def _(seed: int) -> Setup:
    model = Encoded()
    model.encoder.requires_grad_(False)
    data = Table(seed, 53, batch=24)
    optimizer = torch.optim.AdamW(model.head.parameters(), 1e-2)

    def train() -> Iterator[Event]:
        for i in range(120):
            if i == 20:
                model.encoder.requires_grad_(True)
                optimizer.add_param_group({"params": list(model.encoder.parameters()), "lr": 3e-3})
            losses = []
            for _ in range(4):
                x, y = data()
                loss = F.mse_loss(model(x), y) / 4
                loss.backward()
                losses.append(loss)
            yield "read", losses
            optimizer.step()
            optimizer.zero_grad()
            yield "step", [optimizer]

    return Setup(model, train)
