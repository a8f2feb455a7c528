"""Further runs of both kinds, made after the thresholds stood: none of them was tuned on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Blobs, Case, Event, Pictures, Setup, Text, classify, evens, fit, initialise, mlp
from tests.zoo.earlier.models import GPT, Encoder, LayerScaleNet, Multiply, PlainCNN, ResNet, ScaleBackward, SequenceNet
from tests.zoo.earlier.sick import DIVERGING, VANISHING

MORE: list[Case] = []


def more(
    name: str, rules: tuple[str, ...] = (), region: tuple[str, ...] = (), onset: int = 0
) -> Callable[[Callable[[int], Setup]], Callable[[int], Setup]]:
    def add(build: Callable[[int], Setup]) -> Callable[[int], Setup]:
        MORE.append(Case(name, build, rules, region, onset))
        return build

    return add


# -- healthy -----------------------------------------------------------------------------------------------------------------------


@more("siren")
def _(seed: int) -> Setup:
    class Sine(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(30 * x)

    model = mlp(Sine, 4, 64, inputs=2, outputs=1)
    for i, m in enumerate(m for m in model if isinstance(m, nn.Linear)):
        bound = 1 / 2 if i == 0 else math.sqrt(6 / m.in_features) / 30
        nn.init.uniform_(m.weight, -bound, bound)

    def loss(i: int) -> Tensor:
        x = 2 * torch.rand(128, 2) - 1
        return F.mse_loss(model(x), torch.sin(5 * x[:, :1]) * torch.cos(3 * x[:, 1:]))

    return fit(model, loss, torch.optim.Adam(model.parameters(), 1e-4))


@more("ppo_small_policy_head")
def _(seed: int) -> Setup:
    model = nn.ModuleDict({"trunk": mlp(nn.Tanh, 2, 64, outputs=64), "policy": nn.Linear(64, 4), "value": nn.Linear(64, 1)})
    for m in model.modules():
        if isinstance(m, nn.Linear):
            nn.init.orthogonal_(m.weight, math.sqrt(2))
            nn.init.zeros_(m.bias)
    nn.init.orthogonal_(model["policy"].weight, 0.01)
    nn.init.orthogonal_(model["value"].weight, 1.0)
    data = Blobs(seed, batch=64)

    def loss(i: int) -> Tensor:
        x, y = data()
        h = torch.tanh(model["trunk"](x))
        d = torch.distributions.Categorical(logits=model["policy"](h))
        a = d.sample()
        reward = (a == y).float() + 0.3 * torch.randn(64)
        v = model["value"](h)[:, 0]
        adv = (reward - v).detach()
        adv = (adv - adv.mean()) / adv.std()
        ratio = (d.log_prob(a) - d.log_prob(a).detach()).exp()
        policy = -torch.min(ratio * adv, ratio.clamp(0.8, 1.2) * adv).mean()
        return policy + 0.5 * F.mse_loss(v, reward) - 0.01 * d.entropy().mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), 3e-4), 60)


@more("dqn_separate_target")
def _(seed: int) -> Setup:
    q, target = mlp(nn.ReLU, 2, 64), mlp(nn.ReLU, 2, 64)
    model = nn.ModuleDict({"q": q, "target": target})
    target.load_state_dict(q.state_dict())
    data = Blobs(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        with torch.no_grad():
            goal = (torch.arange(4) == y[:, None]).float().mul(10).max(-1).values + 0.9 * target(data()[0]).max(-1).values
        return F.smooth_l1_loss(q(x).gather(1, y[:, None])[:, 0], goal)

    return fit(model, loss, torch.optim.Adam(q.parameters(), 1e-3), 60)


@more("sac_three_optimizers")
def _(seed: int) -> Setup:
    model = nn.ModuleDict({"actor": mlp(nn.ReLU, 2, 64), "critic": mlp(nn.ReLU, 2, 64, inputs=20, outputs=1)})
    model.log_alpha = nn.Parameter(torch.zeros(()))
    data = Blobs(seed)
    oa, oc, ol = (
        torch.optim.Adam(model["actor"].parameters(), 3e-4),
        torch.optim.Adam(model["critic"].parameters(), 3e-4),
        torch.optim.Adam([model.log_alpha], 3e-4),
    )

    def train() -> Iterator[Event]:
        for _ in range(40):
            x, y = data()
            a = torch.tanh(model["actor"](x))
            value = model["critic"](torch.cat((x, a.detach()), -1))[:, 0]
            oc.zero_grad()
            loss = F.mse_loss(value, 100 * (a.argmax(-1) == y).float())
            loss.backward()
            yield "read", [loss]
            oc.step()
            yield "step", [oc]
            oa.zero_grad()
            loss = -model["critic"](torch.cat((x, torch.tanh(model["actor"](x))), -1)).mean()
            loss.backward()
            yield "read", [loss]
            oa.step()
            yield "step", [oa]
            ol.zero_grad()
            loss = -(model.log_alpha * (torch.rand(()) - 0.3))
            loss.backward()
            yield "read", [loss]
            ol.step()
            yield "step", [ol]

    return Setup(model, train)


@more("seq2seq_attention")
def _(seed: int) -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(24, 32)
            self.encoder, self.decoder = nn.GRU(32, 32, batch_first=True), nn.GRU(32, 32, batch_first=True)
            self.query, self.head = nn.Linear(32, 32), nn.Linear(64, 24)

        def forward(self, x: Tensor) -> Tensor:
            keys, h = self.encoder(self.embed(x))
            out, _ = self.decoder(self.embed(x.flip(1)), h)
            weights = torch.softmax(self.query(out) @ keys.transpose(1, 2), -1)
            return self.head(torch.cat((out, weights @ keys), -1))

    model = Net()
    return fit(model, classify(model, Text(seed, length=30)), torch.optim.Adam(model.parameters(), 1e-3), 40)


@more("lstm_stack_4_adam")
def _(seed: int) -> Setup:
    model = SequenceNet(nn.LSTM, layers=4)
    return fit(model, classify(model, Text(seed, length=20)), torch.optim.Adam(model.parameters(), 3e-3), 40)


@more("bidirectional_lstm_char")
def _(seed: int) -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.rnn = nn.Embedding(24, 16), nn.LSTM(16, 32, num_layers=2, bidirectional=True, batch_first=True)
            self.head = nn.Linear(64, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(self.embed(x))[0].mean(1))

    model, data = Net(), Text(seed, length=25)

    def loss(i: int) -> Tensor:
        x, _ = data()
        return F.cross_entropy(model(x), x[:, 0] % 3)

    return fit(model, loss, torch.optim.RMSprop(model.parameters(), 1e-3))


@more("transformer_encoder_decoder")
def _(seed: int) -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(24, 32), nn.Linear(32, 24)
            self.core = nn.Transformer(32, 4, 3, 3, 64, 0.1, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.core(self.embed(x), self.embed(x.flip(1))))

    model = Net()
    return fit(model, classify(model, Text(seed, length=12)), torch.optim.Adam(model.parameters(), 5e-4), 40)


@more("vit_cls_token")
def _(seed: int) -> Setup:
    class ViT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(1, 32, 2, 2)
            self.cls, self.pos = nn.Parameter(torch.zeros(1, 1, 32)), nn.Parameter(0.02 * torch.randn(1, 17, 32))
            self.blocks = nn.ModuleList(
                nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, norm_first=True, batch_first=True, activation="gelu")
                for _ in range(6)
            )
            self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 8)
            nn.init.zeros_(self.head.weight)

        def forward(self, x: Tensor) -> Tensor:
            h = self.patch(x).flatten(2).transpose(1, 2)
            h = torch.cat((self.cls.expand(len(h), -1, -1), h), 1) + self.pos
            for block in self.blocks:
                h = block(h)
            return self.head(self.norm(h)[:, 0])

    model = ViT()
    return fit(model, classify(model, Pictures(seed)), torch.optim.AdamW(model.parameters(), 1e-3), 40)


@more("mixer_no_norm_scaled_init")
def _(seed: int) -> Setup:
    model = LayerScaleNet(blocks=12, scale=0.1)
    return fit(model, classify(model, Blobs(seed)), torch.optim.SGD(model.parameters(), 0.05, momentum=0.9))


@more("diffusion_time_film_zero_out")
def _(seed: int) -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.out = nn.Linear(16, 64), nn.Linear(64, 16)
            self.time = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 32))
            self.film = nn.ModuleList(nn.Linear(32, 128) for _ in range(5))
            self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(5))
            for m in (*self.film, self.out):
                nn.init.zeros_(m.weight)
                nn.init.zeros_(m.bias)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            e = self.time(torch.cat([torch.sin(t * 2.0**k) for k in range(8)], -1))
            h = self.inp(x)
            for film, block in zip(self.film, self.blocks, strict=True):
                scale, shift = film(F.silu(e)).chunk(2, -1)
                h = h + block(F.silu(h * (1 + scale) + shift))
            return self.out(h)

    model, data = Net(), Blobs(seed)

    def loss(i: int) -> Tensor:
        x, _ = data()
        t, noise = torch.rand(len(x), 1), torch.randn_like(x)
        return F.mse_loss(model((1 - t) * x + t * noise, t), noise)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), 2e-4), 50)


@more("vq_vae_straight_through")
def _(seed: int) -> Setup:
    model = nn.ModuleDict({"enc": mlp(nn.ReLU, 2, 64, outputs=8), "dec": mlp(nn.ReLU, 2, 64, inputs=8, outputs=16)})
    model["book"] = nn.Embedding(32, 8)
    nn.init.uniform_(model["book"].weight, -1 / 32, 1 / 32)
    data = Blobs(seed)

    def loss(i: int) -> Tensor:
        x, _ = data()
        z = model["enc"](x)
        code = model["book"](torch.cdist(z, model["book"].weight).argmin(-1))
        q = z + (code - z).detach()
        return F.mse_loss(model["dec"](q), x) + F.mse_loss(code, z.detach()) + 0.25 * F.mse_loss(z, code.detach())

    return fit(model, loss, torch.optim.Adam(model.parameters(), 1e-3))


@more("normalizing_flow_zero_init")
def _(seed: int) -> Setup:
    nets = nn.ModuleList(mlp(nn.ReLU, 2, 32, inputs=8, outputs=16) for _ in range(6))
    for net in nets:
        nn.init.zeros_(net[-1].weight)
        nn.init.zeros_(net[-1].bias)
    data = Blobs(seed)

    def loss(i: int) -> Tensor:
        x, _ = data()
        total = torch.zeros(len(x))
        for net in nets:
            a, b = x.chunk(2, -1)
            s, t = net(a).chunk(2, -1)
            s = torch.tanh(s)
            x = torch.cat((b * s.exp() + t, a), -1)
            total = total + s.sum(-1)
        return (0.5 * x.square().sum(-1) - total).mean()

    return fit(nets, loss, torch.optim.Adam(nets.parameters(), 1e-3))


@more("pinn_two_losses")
def _(seed: int) -> Setup:
    model = mlp(nn.Tanh, 4, 32, inputs=1, outputs=1)

    def loss(i: int) -> Tensor:
        x = torch.rand(64, 1, requires_grad=True)
        u = model(x)
        du = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
        ddu = torch.autograd.grad(du.sum(), x, create_graph=True)[0]
        edge = torch.tensor([[0.0], [1.0]])
        return (ddu + math.pi**2 * torch.sin(math.pi * x)).square().mean() + 100 * model(edge).square().mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), 1e-3))


@more("graph_network")
def _(seed: int) -> Setup:
    layers = nn.ModuleList(nn.Linear(16 if i == 0 else 32, 32) for i in range(4))
    model = nn.ModuleDict({"layers": layers, "head": nn.Linear(32, 3)})
    g = torch.Generator().manual_seed(seed)
    x, edge = torch.randn(60, 16, generator=g), (torch.rand(60, 60, generator=g) < 0.1).float()
    edge = (edge + edge.T + torch.eye(60)).clamp(max=1)
    edge = edge / edge.sum(-1, keepdim=True)
    y = (edge @ x)[:, :3].argmax(-1)

    def loss(i: int) -> Tensor:
        h = x
        for layer in layers:
            h = F.relu(edge @ layer(h))
        return F.cross_entropy(model["head"](h), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 1e-2), 60)


@more("wide_and_deep_sparse_features")
def _(seed: int) -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tables = nn.ModuleList(nn.Embedding(n, 8) for n in (10, 1000, 50_000))
            self.wide, self.deep = nn.Linear(10, 1), mlp(nn.ReLU, 3, 64, inputs=34, outputs=1)

        def forward(self, dense: Tensor, ids: Tensor) -> Tensor:
            e = torch.cat([t(ids[:, i] % t.num_embeddings) for i, t in enumerate(self.tables)], -1)
            return self.wide(dense) + self.deep(torch.cat((e, dense), -1))

    model, g = Net(), torch.Generator().manual_seed(seed)

    def loss(i: int) -> Tensor:
        dense, ids = torch.randn(64, 10, generator=g), torch.randint(0, 50_000, (64, 3), generator=g)
        y = (dense[:, :1] + (ids[:, :1] % 10 > 5) > 0.5).float()
        return F.binary_cross_entropy_with_logits(model(dense, ids), y)

    return fit(model, loss, torch.optim.Adagrad(model.parameters(), 0.01), 60)


@more("one_cycle_lr_and_clipping")
def _(seed: int) -> Setup:
    model = ResNet(blocks=5)
    o = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(o, 0.3, total_steps=61)

    def between(i: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if i:
            schedule.step()

    return fit(model, classify(model, Pictures(seed)), o, 50, between=between)


@more("accumulation_of_four")
def _(seed: int) -> Setup:
    model = GPT(tied=True, blocks=3)
    o, part = torch.optim.AdamW(model.parameters(), 1e-3), classify(model, Text(seed, batch=2))

    def train() -> Iterator[Event]:
        for i in range(40):
            o.zero_grad()
            for _ in range(4):
                (part(i) / 4).backward()
            yield "read", []
            o.step()
            yield "step", [o]

    return Setup(model, train)


@more("knowledge_distillation")
def _(seed: int) -> Setup:
    teacher, student = mlp(nn.ReLU, 3, 128), mlp(nn.ReLU, 2, 16)
    data = Blobs(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        with torch.no_grad():
            t = teacher(x)
        s = student(x)
        return F.cross_entropy(s, y) + 16 * F.kl_div(F.log_softmax(s / 4, -1), F.softmax(t / 4, -1), reduction="batchmean")

    return fit(student, loss, torch.optim.AdamW(student.parameters(), 3e-3))


@more("perplexing_class_imbalance")
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, 3, 64)
    data = Blobs(seed, batch=64)

    def batch() -> tuple[Tensor, Tensor]:
        x, y = data()
        keep = (y == 0) | (torch.rand(len(y), generator=data.generator) < 0.03)
        return x[keep], y[keep]

    return fit(model, classify(model, batch), torch.optim.SGD(model.parameters(), 0.2, momentum=0.9), 100)


@more("two_optimizers_backbone_slow")
def _(seed: int) -> Setup:
    model = ResNet(blocks=4)
    rest = [p for n, p in model.named_parameters() if not n.startswith("head")]
    a, b = torch.optim.SGD(rest, 1e-4), torch.optim.Adam(model.head.parameters(), 1e-2)
    loss = classify(model, Pictures(seed))

    def train() -> Iterator[Event]:
        for i in range(40):
            model.zero_grad()
            value = loss(i)
            value.backward()
            yield "read", [value]
            a.step()
            b.step()
            yield "step", [a, b]

    return Setup(model, train)


@more("deep_plain_relu_fixup_40")
def _(seed: int) -> Setup:
    model = initialise(mlp(nn.ReLU, 40, 64), lambda w: nn.init.orthogonal_(w, math.sqrt(2)))
    return fit(model, classify(model, Blobs(seed)), torch.optim.SGD(model.parameters(), 2e-3))


@more("batch_norm_plain_25")
def _(seed: int) -> Setup:
    layers: list[nn.Module] = []
    for a, b in zip([16] + [64] * 25, [64] * 25, strict=False):
        layers += [nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(64, 4))
    return fit(model, classify(model, Blobs(seed)), torch.optim.SGD(model.parameters(), 0.01), 40)


@more("tanh_autoencoder_unit_scaled_large_targets")
def _(seed: int) -> Setup:
    model, data = mlp(nn.Tanh, 4, 32, outputs=16), Blobs(seed)

    def loss(i: int) -> Tensor:
        x, _ = data()
        return F.mse_loss(model(x), 50 * x)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 1e-2), 60)


# -- sick --------------------------------------------------------------------------------------------------------------------------


@more("residual_stream_scaled_1e-4_midway", VANISHING, ("token", "position", "blocks.0", "blocks.1"))
def _(seed: int) -> Setup:
    class Cut(GPT):
        def forward(self, x: Tensor) -> Tensor:
            h = self.token(x) + self.position(torch.arange(x.shape[1]))
            for i, block in enumerate(self.blocks):
                h = block(h)
                if i == 1:
                    h = h.detach() + 1e-5 * (h - h.detach())
            return self.head(self.norm(h))

    model = Cut(tied=False)
    return fit(model, classify(model, Text(seed)), torch.optim.AdamW(model.parameters(), 1e-3), 40)


@more("resnet_backward_cut_1e-5", VANISHING, ("stem", "blocks.0", "blocks.1", "blocks.2"))
def _(seed: int) -> Setup:
    class Cut(ResNet):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for i, block in enumerate(self.blocks):
                x = block(x)
                if i == 2:
                    x = self.cut(x)
            return self.head(x.mean(2).flatten(1))

    model = Cut(blocks=6)
    model.cut = ScaleBackward(1e-5)
    return fit(model, classify(model, Pictures(seed)), torch.optim.SGD(model.parameters(), 0.1), 40)


@more("encoder_decoder_sigmoid_bottleneck", VANISHING, ("encoder",))
def _(seed: int) -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(*mlp(nn.Sigmoid, 6, 32, outputs=32), nn.Sigmoid())
            self.decoder = mlp(nn.ReLU, 2, 32, inputs=32, outputs=16)

        def forward(self, x: Tensor) -> Tensor:
            return self.decoder(self.encoder(x))

    model, data = Net(), Blobs(seed)

    def loss(i: int) -> Tensor:
        x, _ = data()
        return F.mse_loss(model(x), x)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 1e-3))


@more("sigmoid_12_named_layers", VANISHING, ("inp", *(f"l{i}" for i in range(8))))
def _(seed: int) -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.out = nn.Linear(16, 48), nn.Linear(48, 4)
            for i in range(12):
                setattr(self, f"l{i}", nn.Linear(48, 48))

        def forward(self, x: Tensor) -> Tensor:
            h = torch.sigmoid(self.inp(x))
            for i in range(12):
                h = torch.sigmoid(getattr(self, f"l{i}")(h))
            return self.out(h)

    model = Net()
    return fit(model, classify(model, Blobs(seed, batch=64)), torch.optim.SGD(model.parameters(), 0.05, momentum=0.9))


@more("tanh_25_std_half", VANISHING, evens(0, 36))
def _(seed: int) -> Setup:
    model = initialise(mlp(nn.Tanh, 25, 64), lambda w: nn.init.normal_(w, std=0.5 / 8))
    return fit(model, classify(model, Blobs(seed)), torch.optim.RMSprop(model.parameters(), 1e-4))


@more("uniform_tiny_1e-2_adam_10", VANISHING, evens(0, 20))
def _(seed: int) -> Setup:
    model = initialise(mlp(nn.ReLU, 10, 32), lambda w: nn.init.uniform_(w, -0.01, 0.01))
    return fit(model, classify(model, Blobs(seed)), torch.optim.Adam(model.parameters(), 1e-4))


@more("softmax_gate_below_1e-6", VANISHING, ("lower",))
def _(seed: int) -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lower, self.scale, self.upper = mlp(nn.ReLU, 3, 64, outputs=64), Multiply(1e-3), mlp(nn.ReLU, 3, 64, 64)

        def forward(self, x: Tensor) -> Tensor:
            h = self.scale(self.lower(x))
            return self.upper(self.scale(torch.tanh(h)))

    model = Net()
    return fit(model, classify(model, Blobs(seed)), torch.optim.SGD(model.parameters(), 0.1))


@more("cnn_bn_sigmoid_gate_closed_at_20", VANISHING, ("stem", "blocks.0", "blocks.1"), onset=20)
def _(seed: int) -> Setup:
    class Gated(ResNet):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for i, block in enumerate(self.blocks):
                x = block(x)
                if i == 1:
                    x = self.gate(x)
            return self.head(x.mean(2).flatten(1))

    model = Gated(blocks=4)
    model.gate = ScaleBackward(1.0)

    def before(i: int) -> None:
        model.gate.by = 1.0 if i < 20 else 1e-6

    return fit(model, classify(model, Pictures(seed)), torch.optim.SGD(model.parameters(), 0.003), 50, before)


@more("gain_3_relu_25_clipped", DIVERGING, evens(0, 50))
def _(seed: int) -> Setup:
    model = initialise(mlp(nn.ReLU, 25, 64), lambda w: nn.init.normal_(w, std=3 / 8))

    def clip(i: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    return fit(model, classify(model, Blobs(seed)), torch.optim.SGD(model.parameters(), 1e-3), between=clip)


@more("gain_2_leaky_30", DIVERGING, evens(0, 60))
def _(seed: int) -> Setup:
    model = initialise(mlp(nn.LeakyReLU, 30, 64), lambda w: nn.init.normal_(w, std=2.8 / 8))
    return fit(model, classify(model, Blobs(seed)), torch.optim.Adam(model.parameters(), 1e-3))


@more("xavier_gain_5_tanh_15", DIVERGING, evens(0, 28))
def _(seed: int) -> Setup:
    model = initialise(mlp(nn.Tanh, 15, 64), lambda w: nn.init.xavier_normal_(w, 5.0))
    return fit(model, classify(model, Blobs(seed)), torch.optim.SGD(model.parameters(), 0.01))


@more("cnn_gain_3_deep", DIVERGING, ("features",))
def _(seed: int) -> Setup:
    model = initialise(PlainCNN(depth=12, norm=False), lambda w: nn.init.normal_(w, std=3 / w[0].numel() ** 0.5), (nn.Conv2d,))
    return fit(model, classify(model, Pictures(seed)), torch.optim.SGD(model.parameters(), 1e-8))


@more("gru_like_recurrence_radius_1.3_long", DIVERGING, ("inp", "cell"))
def _(seed: int) -> Setup:
    from tests.zoo.earlier.models import RecurrentReadout

    model = RecurrentReadout(lambda x: x, 60, 1.3)
    return fit(model, classify(model, Blobs(seed)), torch.optim.SGD(model.parameters(), 1e-10))


@more("hook_times_50_on_three_layers", DIVERGING, ("0", "2", "4"))
def _(seed: int) -> Setup:
    layers = list(mlp(nn.ReLU, 6, 64))
    for i in (8, 7, 6):
        layers.insert(i, ScaleBackward(50.0))
    model = nn.Sequential(*layers)
    return fit(model, classify(model, Blobs(seed)), torch.optim.Adam(model.parameters(), 1e-4))


@more("momentum_lr_too_high_cross_entropy", DIVERGING)
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, 3, 64, outputs=1)
    data = Blobs(seed)

    def loss(i: int) -> Tensor:
        x, _ = data()
        return (model(x) - x[:, :1]).square().sum()

    return fit(model, loss, torch.optim.SGD(model.parameters(), 0.02, momentum=0.9))


def _spike_at(name: str, at: int, factor: float, loss_too: bool) -> None:
    def build(seed: int) -> Setup:
        model = Encoder(depth=3, norm_first=True) if loss_too else ResNet(4)
        plain = classify(model, Text(seed) if loss_too else Pictures(seed))
        now = [0]

        def loss(i: int) -> Tensor:
            now[0] = i
            return plain(i) * (factor if loss_too and i == at else 1.0)

        if not loss_too:
            for p in model.blocks.parameters():
                p.register_hook(lambda g: g * (factor if now[0] == at else 1.0))
        return fit(model, loss, torch.optim.Adam(model.parameters(), 1e-3), 40)

    MORE.append(Case(name, build, ("gradient_spike",), () if loss_too else ("blocks",), at))


_spike_at("spike_adam_x60", 21, 60.0, True)
_spike_at("spike_adam_x1e4", 33, 1e4, True)
_spike_at("spike_in_the_blocks_x300", 17, 300.0, False)
_spike_at("spike_x25_at_12", 12, 25.0, True)


@more("inf_gradient_in_the_embedding", ("non_finite_gradient",), ("embed",), onset=8)
def _(seed: int) -> Setup:
    model, now = SequenceNet(nn.GRU), [0]
    plain = classify(model, Text(seed))

    def loss(i: int) -> Tensor:
        now[0] = i
        return plain(i)

    model.embed.weight.register_hook(lambda g: g / (0.0 if now[0] == 8 else 1.0))
    return fit(model, loss, torch.optim.Adam(model.parameters(), 1e-3), 25)


@more("nan_input_batch", ("non_finite_input",), ("",), onset=10)
def _(seed: int) -> Setup:
    model, data, now = mlp(nn.ReLU, 2, 32), Blobs(seed), [0]

    def batch() -> tuple[Tensor, Tensor]:
        x, y = data()
        now[0] += 1
        if now[0] == 11:
            x[3, 2] = float("nan")
        return x, y

    return fit(model, classify(model, batch), updates=25)


@more("frozen_by_detach_lower_half", ("missing_gradient",), ("lower",))
def _(seed: int) -> Setup:
    model = nn.ModuleDict({"lower": mlp(nn.GELU, 2, 64, outputs=64), "upper": mlp(nn.GELU, 2, 64, inputs=64)})
    data = Blobs(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        with torch.no_grad():
            h = model["lower"](x)
        return F.cross_entropy(model["upper"](h), y)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), 1e-3), 25)


@more("layers_in_a_list", ("not_in_optimizer",))
def _(seed: int) -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.out = nn.Linear(16, 32), nn.Linear(32, 4)
            self.hidden = [nn.Linear(32, 32) for _ in range(3)]

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.inp(x))
            for layer in self.hidden:
                h = F.relu(layer(h))
            return self.out(h)

    model = Net()
    return fit(model, classify(model, Blobs(seed)), torch.optim.Adam(model.parameters(), 1e-3), 25)


@more("never_zeroed", ("gradients_not_zeroed",))
def _(seed: int) -> Setup:
    model = ResNet(3)
    o, loss = torch.optim.SGD(model.parameters(), 1e-3), classify(model, Pictures(seed))

    def train() -> Iterator[Event]:
        for i in range(30):
            value = loss(i)
            value.backward()
            yield "read", [value]
            o.step()
            yield "step", [o]

    return Setup(model, train)


@more("optimizer_of_an_older_model", ("never_stepped",))
def _(seed: int) -> Setup:
    old, model = mlp(nn.ReLU, 2, 32), mlp(nn.ReLU, 2, 32)
    o, loss = torch.optim.Adam(old.parameters(), 1e-3), classify(model, Blobs(seed))

    def train() -> Iterator[Event]:
        for i in range(30):
            o.zero_grad()
            value = loss(i)
            value.backward()
            yield "read", [value]
            o.step()
            yield "step", [o]

    return Setup(model, train)


@more("step_forgotten", ("never_stepped",))
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, 2, 32)
    o, loss = torch.optim.Adam(model.parameters(), 1e-3), classify(model, Blobs(seed))

    def train() -> Iterator[Event]:
        for i in range(30):
            o.zero_grad()
            value = loss(i)
            value.backward()
            yield "read", [value]

    return Setup(model, train)


@more("new_head_after_the_optimizer", ("not_in_optimizer",), ("head",))
def _(seed: int) -> Setup:
    model = ResNet(3)
    o = torch.optim.SGD(model.parameters(), 0.05)
    model.head = nn.Linear(128, 8)
    return fit(model, classify(model, Pictures(seed)), o, 30)
