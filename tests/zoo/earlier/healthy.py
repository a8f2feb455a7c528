"""Healthy runs: everything that looks like a fault and is none."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Blobs, Case, Event, Pictures, Setup, Text, classify, fit, initialise, mlp
from tests.zoo.earlier.models import GPT, VAE, Bottleneck, Encoder, LayerScaleNet, Lora, MoE, PlainCNN, ResNet, SequenceNet

HEALTHY: list[Case] = []


def healthy(name: str) -> Callable[[Callable[[int], Setup]], Callable[[int], Setup]]:
    def add(build: Callable[[int], Setup]) -> Callable[[int], Setup]:
        HEALTHY.append(Case(name, build))
        return build

    return add


def _optimizer(name: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return {
        "sgd": lambda p: torch.optim.SGD(p, lr),
        "momentum": lambda p: torch.optim.SGD(p, lr, momentum=0.9),
        "adam": lambda p: torch.optim.Adam(p, lr),
        "adamw": lambda p: torch.optim.AdamW(p, lr),
        "rmsprop": lambda p: torch.optim.RMSprop(p, lr),
    }[name](model.parameters())


def _mlps() -> None:
    acts = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "sigmoid": nn.Sigmoid, "silu": nn.SiLU, "elu": nn.ELU}
    rows = [
        ("relu", 2, 64, "sgd", 0.1),
        ("relu", 4, 64, "adam", 1e-3),
        ("relu", 6, 64, "momentum", 0.03),
        ("relu", 8, 64, "adamw", 1e-3),
        ("relu", 10, 64, "adamw", 1e-3),
        ("relu", 12, 128, "adamw", 1e-3),
        ("tanh", 3, 32, "sgd", 0.1),
        ("tanh", 6, 32, "adam", 3e-3),
        ("tanh", 10, 64, "adamw", 1e-3),
        ("gelu", 4, 64, "adamw", 1e-3),
        ("gelu", 8, 64, "adam", 1e-3),
        ("sigmoid", 1, 32, "sgd", 0.5),
        ("sigmoid", 2, 32, "sgd", 0.5),
        ("sigmoid", 3, 32, "adam", 3e-3),
        ("silu", 6, 64, "adam", 1e-3),
        ("elu", 8, 64, "rmsprop", 1e-3),
    ]
    for act, depth, width, name, lr in rows:

        def build(seed: int, act: str = act, depth: int = depth, width: int = width, name: str = name, lr: float = lr) -> Setup:
            model = mlp(acts[act], depth, width)
            return fit(model, classify(model, Blobs(seed)), _optimizer(name, model, lr))

        HEALTHY.append(Case(f"mlp_{act}_{depth}x{width}_{name}", build))


_mlps()


@healthy("he_relu_20_sgd")
def _(seed: int) -> Setup:
    model = initialise(mlp(nn.ReLU, 20, 64), lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu"))
    return fit(model, classify(model, Blobs(seed)), torch.optim.SGD(model.parameters(), 0.01))


@healthy("he_relu_30_adam")
def _(seed: int) -> Setup:
    model = initialise(mlp(nn.ReLU, 30, 96), lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu"))
    return fit(model, classify(model, Blobs(seed)), torch.optim.Adam(model.parameters(), 1e-4))


@healthy("xavier_tanh_15_sgd")
def _(seed: int) -> Setup:
    model = initialise(mlp(nn.Tanh, 15, 64), nn.init.xavier_normal_)
    return fit(model, classify(model, Blobs(seed)), torch.optim.SGD(model.parameters(), 0.05))


@healthy("orthogonal_tanh_30")
def _(seed: int) -> Setup:
    model = initialise(mlp(nn.Tanh, 30, 64), nn.init.orthogonal_)
    return fit(model, classify(model, Blobs(seed)), torch.optim.SGD(model.parameters(), 0.02))


@healthy("selu_16_lecun")
def _(seed: int) -> Setup:
    model = initialise(mlp(nn.SELU, 16, 64), lambda w: nn.init.kaiming_normal_(w, nonlinearity="linear"))
    return fit(model, classify(model, Blobs(seed)), torch.optim.SGD(model.parameters(), 0.02))


@healthy("mlp_no_bias_bn_deep")
def _(seed: int) -> Setup:
    layers: list[nn.Module] = [nn.Flatten()]
    for a, b in zip([16] + [64] * 12, [64] * 12, strict=False):
        layers += [nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(64, 4))
    return fit(model, classify(model, Blobs(seed)), torch.optim.SGD(model.parameters(), 0.05))


@healthy("sigmoid_bn_8")
def _(seed: int) -> Setup:
    layers: list[nn.Module] = []
    for a, b in zip([16] + [64] * 8, [64] * 8, strict=False):
        layers += [nn.Linear(a, b), nn.BatchNorm1d(b), nn.Sigmoid()]
    model = nn.Sequential(*layers, nn.Linear(64, 4))
    return fit(model, classify(model, Blobs(seed)), torch.optim.Adam(model.parameters(), 3e-3))


@healthy("cnn_bn_conv_bias")
def _(seed: int) -> Setup:
    model = PlainCNN(depth=5, norm=True)
    return fit(model, classify(model, Pictures(seed)), torch.optim.SGD(model.parameters(), 0.05, momentum=0.9))


@healthy("cnn_plain_5_adam")
def _(seed: int) -> Setup:
    model = PlainCNN(depth=5, norm=False)
    return fit(model, classify(model, Pictures(seed)), torch.optim.Adam(model.parameters(), 1e-3))


@healthy("lenet_tanh")
def _(seed: int) -> Setup:
    model = PlainCNN(depth=2, norm=False, act=nn.Tanh)
    return fit(model, classify(model, Pictures(seed)), torch.optim.SGD(model.parameters(), 0.1))


@healthy("vgg_like_10_he")
def _(seed: int) -> Setup:
    model = initialise(PlainCNN(depth=10, norm=False), lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu"))
    return fit(model, classify(model, Pictures(seed)), torch.optim.SGD(model.parameters(), 0.01, momentum=0.9))


@healthy("resnet_sgd")
def _(seed: int) -> Setup:
    model = ResNet(blocks=6)
    return fit(model, classify(model, Pictures(seed)), torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), 40)


@healthy("resnet_zero_gamma_adam")
def _(seed: int) -> Setup:
    model = ResNet(blocks=8, zero_gamma=True)
    return fit(model, classify(model, Pictures(seed)), torch.optim.Adam(model.parameters(), 1e-3), 40)


@healthy("stochastic_depth")
def _(seed: int) -> Setup:
    model = ResNet(blocks=8, drop=0.4)
    return fit(model, classify(model, Pictures(seed)), torch.optim.SGD(model.parameters(), 0.05, momentum=0.9))


@healthy("transformer_pre_norm_12")
def _(seed: int) -> Setup:
    model = Encoder(depth=12, norm_first=True)
    return fit(model, classify(model, Text(seed, length=12)), torch.optim.AdamW(model.parameters(), 3e-4), 40)


@healthy("transformer_pre_norm_6_sgd")
def _(seed: int) -> Setup:
    model = Encoder(depth=6, norm_first=True)
    return fit(model, classify(model, Text(seed, length=12)), torch.optim.SGD(model.parameters(), 0.05), 40)


@healthy("transformer_post_norm_8")
def _(seed: int) -> Setup:
    model = Encoder(depth=8, norm_first=False)
    return fit(model, classify(model, Text(seed, length=12)), torch.optim.AdamW(model.parameters(), 1e-4), 40)


@healthy("transformer_post_norm_12_sgd")
def _(seed: int) -> Setup:
    model = Encoder(depth=12, norm_first=False)
    return fit(model, classify(model, Text(seed, length=12)), torch.optim.SGD(model.parameters(), 0.05), 40)


@healthy("gpt_tied")
def _(seed: int) -> Setup:
    model = GPT(tied=True)
    return fit(model, classify(model, Text(seed)), torch.optim.AdamW(model.parameters(), 1e-3))


@healthy("gpt_untied_sgd")
def _(seed: int) -> Setup:
    model = GPT(tied=False)
    return fit(model, classify(model, Text(seed)), torch.optim.SGD(model.parameters(), 0.1))


@healthy("gpt_warmup_from_zero")
def _(seed: int) -> Setup:
    model = GPT(tied=True)
    o = torch.optim.AdamW(model.parameters(), 0.0)

    def before(i: int) -> None:
        o.param_groups[0]["lr"] = 1e-3 * i / 100

    return fit(model, classify(model, Text(seed)), o, 60, before)


@healthy("zero_head_warmup")
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, 3, 64)
    nn.init.zeros_(model[-1].weight)
    nn.init.zeros_(model[-1].bias)
    o = torch.optim.Adam(model.parameters(), 0.0)

    def before(i: int) -> None:
        o.param_groups[0]["lr"] = 1e-3 * i / 500

    return fit(model, classify(model, Blobs(seed)), o, 60, before)


@healthy("zero_head_sgd")
def _(seed: int) -> Setup:
    model = mlp(nn.GELU, 4, 64)
    nn.init.zeros_(model[-1].weight)
    nn.init.zeros_(model[-1].bias)
    return fit(model, classify(model, Blobs(seed)), torch.optim.SGD(model.parameters(), 0.01))


@healthy("zero_head_tiny_lr_adamw")
def _(seed: int) -> Setup:
    model = Encoder(depth=4, norm_first=True)
    nn.init.zeros_(model.head.weight)
    return fit(model, classify(model, Text(seed)), torch.optim.AdamW(model.parameters(), 1e-5), 40)


@healthy("layer_scale_1e-6")
def _(seed: int) -> Setup:
    model = LayerScaleNet(blocks=8, scale=1e-6)
    return fit(model, classify(model, Blobs(seed)), torch.optim.AdamW(model.parameters(), 1e-3))


@healthy("layer_scale_1e-6_sgd")
def _(seed: int) -> Setup:
    model = LayerScaleNet(blocks=8, scale=1e-6)
    return fit(model, classify(model, Blobs(seed)), torch.optim.SGD(model.parameters(), 0.05))


@healthy("rezero_16")
def _(seed: int) -> Setup:
    model = LayerScaleNet(blocks=16, scale=0.0, scalar=True)
    return fit(model, classify(model, Blobs(seed)), torch.optim.Adam(model.parameters(), 1e-3))


@healthy("lora_adamw")
def _(seed: int) -> Setup:
    model = Lora(depth=6)
    return fit(model, classify(model, Blobs(seed)), torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3))


@healthy("lora_sgd_small_lr")
def _(seed: int) -> Setup:
    model = Lora(depth=4)
    return fit(model, classify(model, Blobs(seed)), torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3))


@healthy("lstm_long")
def _(seed: int) -> Setup:
    model = SequenceNet(nn.LSTM)
    return fit(model, classify(model, Text(seed, length=80)), torch.optim.Adam(model.parameters(), 3e-3), 30)


@healthy("gru_two_layers_last_only")
def _(seed: int) -> Setup:
    model = SequenceNet(nn.GRU, layers=2, last=True)
    data = Text(seed, length=60)

    def batch() -> tuple[Tensor, Tensor]:
        x, y = data()
        return x, y[:, -1]

    return fit(model, classify(model, batch), torch.optim.Adam(model.parameters(), 3e-3), 30)


@healthy("lstm_three_layers_sgd_clip")
def _(seed: int) -> Setup:
    model = SequenceNet(nn.LSTM, layers=3)

    def clip(i: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)

    return fit(model, classify(model, Text(seed, length=40)), torch.optim.SGD(model.parameters(), 1.0), 40, between=clip)


@healthy("rnn_tanh_short")
def _(seed: int) -> Setup:
    model = SequenceNet(nn.RNN)
    return fit(model, classify(model, Text(seed, length=20)), torch.optim.SGD(model.parameters(), 0.1), 40)


@healthy("autoencoder")
def _(seed: int) -> Setup:
    model = Bottleneck(nn.ReLU)
    data = Blobs(seed)

    def loss(i: int) -> Tensor:
        x, _ = data()
        return F.mse_loss(model(x), x)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 1e-3))


@healthy("autoencoder_sigmoid_head_bce_sum")
def _(seed: int) -> Setup:
    model = nn.Sequential(*Bottleneck(nn.Tanh).net, nn.Sigmoid())
    data = Blobs(seed)

    def loss(i: int) -> Tensor:
        x, _ = data()
        return F.binary_cross_entropy(model(x), torch.sigmoid(x), reduction="sum")

    return fit(model, loss, torch.optim.Adam(model.parameters(), 1e-3))


@healthy("vae")
def _(seed: int) -> Setup:
    model = VAE()
    data = Blobs(seed)
    return fit(model, lambda i: model.loss(data()[0]), torch.optim.Adam(model.parameters(), 1e-3))


@healthy("vae_sum_collapsing")
def _(seed: int) -> Setup:
    model = VAE()
    data = Blobs(seed)
    return fit(model, lambda i: model.loss(data()[0], beta=4.0, total=True), torch.optim.Adam(model.parameters(), 3e-3))


def _gan(seed: int, critics: int, wasserstein: bool) -> Setup:
    g = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
    d = nn.Sequential(nn.Linear(16, 32), nn.LeakyReLU(0.2), nn.Linear(32, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
    data = Blobs(seed)
    og, od = torch.optim.Adam(g.parameters(), 1e-3, (0.5, 0.9)), torch.optim.Adam(d.parameters(), 1e-3, (0.5, 0.9))

    def train() -> Iterator[Event]:
        one, zero = torch.ones(32, 1), torch.zeros(32, 1)
        for i in range(40 * (critics + 1)):
            z = torch.randn(32, 8)
            if i % (critics + 1) < critics:
                od.zero_grad()
                real, fake = d(data()[0]), d(g(z).detach())
                if wasserstein:
                    loss = fake.mean() - real.mean() + 0.01 * (real.square().mean() + fake.square().mean())
                else:
                    loss = F.binary_cross_entropy_with_logits(real, one) + F.binary_cross_entropy_with_logits(fake, zero)
                loss.backward()
                yield "read", [loss]
                od.step()
                yield "step", [od]
            else:
                og.zero_grad()
                fake = d(g(z))
                loss = -fake.mean() if wasserstein else F.binary_cross_entropy_with_logits(fake, one)
                loss.backward()
                yield "read", [loss]
                og.step()
                yield "step", [og]

    return Setup({"g": g, "d": d}, train)


HEALTHY.append(Case("gan", lambda seed: _gan(seed, 1, False)))
HEALTHY.append(Case("wgan_five_critics", lambda seed: _gan(seed, 5, True)))


@healthy("gan_strong_discriminator_only_g_watched")
def _(seed: int) -> Setup:
    g = mlp(nn.ReLU, 3, 64, inputs=8, outputs=16)
    d = mlp(nn.ReLU, 3, 64, inputs=16, outputs=1)
    data = Blobs(seed)
    og, od = torch.optim.Adam(g.parameters(), 2e-4), torch.optim.Adam(d.parameters(), 2e-3)

    def train() -> Iterator[Event]:
        for _ in range(60):
            z = torch.randn(32, 8)
            od.zero_grad()
            loss = F.softplus(-d(data()[0])).mean() + F.softplus(d(g(z).detach())).mean()
            loss.backward()
            od.step()
            og.zero_grad()
            loss = F.softplus(-d(g(z))).mean()
            loss.backward()
            yield "read", [loss]
            og.step()
            yield "step", [og]

    return Setup(g, train)


@healthy("actor_critic_two_networks")
def _(seed: int) -> Setup:
    model = nn.ModuleDict({"actor": mlp(nn.Tanh, 2, 64, 16, 4), "critic": mlp(nn.Tanh, 2, 64, 16, 1)})
    data = Blobs(seed, batch=64)

    def loss(i: int) -> Tensor:
        x, y = data()
        logits, value = model["actor"](x), model["critic"](x)[:, 0]
        action = torch.distributions.Categorical(logits=logits).sample()
        returns = 300.0 * (action == y).float() + 100 * torch.randn(64)
        advantage = returns - value.detach()
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        policy = F.log_softmax(logits, -1).gather(1, action[:, None])[:, 0]
        return 1e-2 * -(policy * advantage).mean() + 0.5 * F.mse_loss(value, returns)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 3e-4), 60)


@healthy("reinforce_noisy")
def _(seed: int) -> Setup:
    model = mlp(nn.Tanh, 2, 32)
    data = Blobs(seed, batch=8)

    def loss(i: int) -> Tensor:
        x, y = data()
        policy = torch.distributions.Categorical(logits=model(x))
        action = policy.sample()
        reward = (action == y).float() * torch.empty(8).exponential_() * 5
        return -(policy.log_prob(action) * reward).sum()

    return fit(model, loss, torch.optim.Adam(model.parameters(), 3e-3), 80)


@healthy("hand_scaled_loss_1024")
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, 4, 64)

    def unscale(i: int) -> None:
        for p in model.parameters():
            assert p.grad is not None
            p.grad.div_(1024)

    return fit(model, classify(model, Blobs(seed), scale=1024.0), torch.optim.SGD(model.parameters(), 0.1), between=unscale)


@healthy("sum_loss_sgd")
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, 3, 64)
    return fit(model, classify(model, Blobs(seed), reduction="sum"), torch.optim.SGD(model.parameters(), 2e-3))


@healthy("tiny_loss_scale_adam")
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, 3, 64)
    return fit(model, classify(model, Blobs(seed), scale=1e-4), torch.optim.Adam(model.parameters(), 1e-3))


@healthy("finetune_tiny_lr")
def _(seed: int) -> Setup:
    model = ResNet(blocks=4)
    data = Pictures(seed)
    o = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        x, y = data()
        o.zero_grad()
        F.cross_entropy(model(x), y).backward()
        o.step()
    model.head = nn.Linear(model.head.in_features, model.head.out_features)
    return fit(model, classify(model, data), torch.optim.SGD(model.parameters(), 1e-5, momentum=0.9))


@healthy("frozen_backbone_new_head")
def _(seed: int) -> Setup:
    model = ResNet(blocks=4)
    for p in model.parameters():
        p.requires_grad_(False)
    model.head = nn.Linear(model.head.in_features, model.head.out_features)
    return fit(model, classify(model, Pictures(seed)), torch.optim.Adam(model.head.parameters(), 1e-3))


@healthy("converges_to_tiny_gradients")
def _(seed: int) -> Setup:
    torch.manual_seed(seed)
    model = nn.Linear(8, 1)
    x = torch.randn(64, 8)
    y = x @ torch.randn(8, 1)
    return fit(model, lambda i: F.mse_loss(model(x), y), torch.optim.SGD(model.parameters(), 0.3), 120)


@healthy("memorises_one_batch")
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, 3, 128)
    x, y = Blobs(seed, batch=16)()
    return fit(model, lambda i: F.cross_entropy(model(x), y), torch.optim.Adam(model.parameters(), 3e-3), 120)


@healthy("separable_long_sgd")
def _(seed: int) -> Setup:
    model = mlp(nn.Tanh, 2, 32)
    return fit(model, classify(model, Blobs(seed, spread=0.2)), torch.optim.SGD(model.parameters(), 0.5), 150)


@healthy("moe_idle_experts")
def _(seed: int) -> Setup:
    model = MoE(experts=8, idle=3)
    return fit(model, classify(model, Blobs(seed, batch=16)), torch.optim.Adam(model.parameters(), 1e-3), 60)


@healthy("heavy_tailed_batches")
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, 2, 32, outputs=1)
    data = Blobs(seed)

    def loss(i: int) -> Tensor:
        x, _ = data()
        noise = torch.distributions.StudentT(2.0).sample((len(x), 1))
        return F.mse_loss(model(x), x[:, :1] + noise)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 1e-3), 80)


@healthy("rare_positives")
def _(seed: int) -> Setup:
    model = nn.Sequential(*mlp(nn.ReLU, 2, 32, outputs=1), nn.Sigmoid())
    nn.init.constant_(model[4].bias, -4.0)
    data = Blobs(seed, batch=32)

    def loss(i: int) -> Tensor:
        x, _ = data()
        y = (torch.rand(len(x), 1, generator=data.generator) < 0.01).float()
        return F.binary_cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 1e-3), 100)


@healthy("embedding_bag_sparse")
def _(seed: int) -> Setup:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.EmbeddingBag(2000, 16, sparse=True)
            self.head = nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x))

    model = Bag()
    g = torch.Generator().manual_seed(seed)

    def loss(i: int) -> Tensor:
        x = torch.randint(0, 2000, (32, 5), generator=g)
        return F.cross_entropy(model(x), (x[:, 0] % 2))

    return fit(model, loss, torch.optim.SGD(model.parameters(), 1.0), 60)


@healthy("lr_restarts")
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, 3, 64)
    o = torch.optim.SGD(model.parameters(), 0.3)

    def before(i: int) -> None:
        o.param_groups[0]["lr"] = 0.15 * (1 + math.cos(math.pi * (i % 20) / 20)) + 1e-4

    return fit(model, classify(model, Blobs(seed)), o, 100, before)


@healthy("label_noise_floor")
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, 3, 64)
    data = Blobs(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        y = torch.where(torch.rand(len(y), generator=data.generator) < 0.5, torch.randint(4, y.shape, generator=data.generator), y)
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 1e-3), 80)


@healthy("pure_noise_labels")
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, 4, 64)
    g = torch.Generator().manual_seed(seed)

    def loss(i: int) -> Tensor:
        return F.cross_entropy(model(torch.randn(32, 16, generator=g)), torch.randint(4, (32,), generator=g))

    return fit(model, loss, torch.optim.Adam(model.parameters(), 1e-3), 60)


@healthy("unnormalised_targets_regression")
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, 3, 64, outputs=1)
    data = Blobs(seed)

    def loss(i: int) -> Tensor:
        x, _ = data()
        return F.mse_loss(model(x), 1000 + 100 * x[:, :1])

    return fit(model, loss, torch.optim.Adam(model.parameters(), 1e-3), 60)


@healthy("large_inputs_0_255")
def _(seed: int) -> Setup:
    model = PlainCNN(depth=3, norm=True)
    data = Pictures(seed)

    def batch() -> tuple[Tensor, Tensor]:
        x, y = data()
        return 64 * x + 128, y

    return fit(model, classify(model, batch), torch.optim.Adam(model.parameters(), 1e-3))


@healthy("multi_task_small_weight")
def _(seed: int) -> Setup:
    model = nn.ModuleDict({"trunk": mlp(nn.ReLU, 2, 64, outputs=64), "a": nn.Linear(64, 4), "b": nn.Linear(64, 4)})
    data = Blobs(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        h = model["trunk"](x).relu()
        return F.cross_entropy(model["a"](h), y) + 1e-4 * F.cross_entropy(model["b"](h), y.flip(0))

    return fit(model, loss, torch.optim.AdamW(model.parameters(), 1e-3))


@healthy("two_towers_contrastive")
def _(seed: int) -> Setup:
    model = nn.ModuleDict({"left": mlp(nn.ReLU, 3, 64, outputs=16), "right": mlp(nn.GELU, 3, 64, outputs=16)})
    data = Blobs(seed)

    def loss(i: int) -> Tensor:
        x, _ = data()
        a, b = F.normalize(model["left"](x), dim=-1), F.normalize(model["right"](x + 0.1 * torch.randn_like(x)), dim=-1)
        return F.cross_entropy(a @ b.T / 0.07, torch.arange(len(x)))

    return fit(model, loss, torch.optim.AdamW(model.parameters(), 1e-3))


@healthy("alternating_heads")
def _(seed: int) -> Setup:
    model = nn.ModuleDict({"trunk": mlp(nn.ReLU, 2, 64, outputs=64), "a": nn.Linear(64, 4), "b": nn.Linear(64, 4)})
    data = Blobs(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        h = model["trunk"](x).relu()
        return F.cross_entropy(model["ab"[i % 2]](h), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 1e-3))


@healthy("mask_token_unused")
def _(seed: int) -> Setup:
    model = Encoder(depth=2, norm_first=True)
    model.mask_token = nn.Parameter(torch.zeros(32))
    return fit(model, classify(model, Text(seed)), torch.optim.AdamW(model.parameters(), 1e-3), 40)


@healthy("gradual_unfreezing")
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, 4, 64)
    for p in model[:4].parameters():
        p.requires_grad_(False)
    o = torch.optim.Adam(model.parameters(), 1e-3)

    def before(i: int) -> None:
        if i == 20:
            for p in model.parameters():
                p.requires_grad_(True)

    return fit(model, classify(model, Blobs(seed)), o, 60, before)


@healthy("spectral_and_weight_norm")
def _(seed: int) -> Setup:
    p = nn.utils.parametrizations
    model = nn.Sequential(
        p.weight_norm(nn.Linear(16, 64)), nn.ReLU(), p.spectral_norm(nn.Linear(64, 64)), nn.ReLU(), p.weight_norm(nn.Linear(64, 4))
    )
    return fit(model, classify(model, Blobs(seed)), torch.optim.Adam(model.parameters(), 1e-3))


@healthy("small_embedding_before_norm")
def _(seed: int) -> Setup:
    model = Encoder(depth=4, norm_first=True)
    nn.init.normal_(model.embed.weight, std=2e-3)
    nn.init.normal_(model.position.weight, std=2e-3)
    return fit(model, classify(model, Text(seed)), torch.optim.AdamW(model.parameters(), 1e-3), 40)


@healthy("double_descent_batch_of_one")
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, 2, 32)
    return fit(model, classify(model, Blobs(seed, batch=1, spread=0.5)), torch.optim.SGD(model.parameters(), 0.05), 120)


@healthy("unet_like_skips")
def _(seed: int) -> Setup:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.ModuleList(nn.Linear(32, 32) for _ in range(5))
            self.up = nn.ModuleList(nn.Linear(64, 32) for _ in range(5))
            self.inp, self.out = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            h, kept = self.inp(x), []
            for m in self.down:
                h = F.relu(m(h))
                kept.append(h)
            for m in self.up:
                h = F.relu(m(torch.cat((h, kept.pop()), -1)))
            return self.out(h)

    model = Skip()
    data = Blobs(seed)

    def loss(i: int) -> Tensor:
        x, _ = data()
        return F.mse_loss(model(x + 0.5 * torch.randn_like(x)), x)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 1e-3))


@healthy("siamese_shared_tower")
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, 3, 64, outputs=8)
    data = Blobs(seed)

    def loss(i: int) -> Tensor:
        (x, y), (u, v) = data(), data()
        d = (model(x) - model(u)).square().mean(-1)
        same = (y == v).float()
        return (same * d + (1 - same) * F.relu(1 - d)).mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), 1e-3))


@healthy("attention_separate_qkv_sgd")
def _(seed: int) -> Setup:
    model = GPT(tied=False, blocks=6, init=0.02)
    return fit(model, classify(model, Text(seed)), torch.optim.SGD(model.parameters(), 0.05), 40)
