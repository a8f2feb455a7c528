"""Small networks of many makes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainCNN(nn.Module):
    def __init__(self, depth: int, norm: bool, act: Callable[[], nn.Module] = nn.ReLU, width: int = 16, classes: int = 8) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(depth):
            layers.append(nn.Conv2d(1 if i == 0 else width, width, 3, padding=1))
            if norm:
                layers.append(nn.BatchNorm2d(width))
            layers.append(act())
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(width * 8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean(2).flatten(1))


class Residual(nn.Module):
    def __init__(self, width: int, zero_gamma: bool, drop: float) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.drop = drop
        if zero_gamma:
            nn.init.zeros_(self.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.drop and torch.rand(()) < self.drop:
            return x
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class ResNet(nn.Module):
    def __init__(self, blocks: int, zero_gamma: bool = False, drop: float = 0.0, width: int = 16, classes: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.ModuleList(Residual(width, zero_gamma, drop * i / blocks) for i in range(blocks))
        self.head = nn.Linear(width * 8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(2).flatten(1))


class Encoder(nn.Module):
    def __init__(self, depth: int, norm_first: bool, width: int = 32, vocabulary: int = 24) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(vocabulary, width), nn.Embedding(64, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 64, dropout=0.1, norm_first=norm_first, batch_first=True) for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.position(torch.arange(x.shape[1]))
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        for layer in self.layers:
            h = layer(h, src_mask=mask)
        return self.head(self.norm(h))


class Block(nn.Module):
    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        h = self.norm1(x)
        q, k, v = (m(h).view(b, t, self.heads, -1).transpose(1, 2) for m in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, c)
        x = x + self.out(h)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, tied: bool, blocks: int = 4, width: int = 32, vocabulary: int = 24, init: float | None = 0.02) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(64, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        if init:
            for m in self.modules():
                if isinstance(m, (nn.Linear, nn.Embedding)):
                    nn.init.normal_(m.weight, std=init)
                if isinstance(m, nn.Linear) and m.bias is not None:
                    nn.init.zeros_(m.bias)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.token(x) + self.position(torch.arange(x.shape[1]))
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


class SequenceNet(nn.Module):
    def __init__(
        self,
        cell: Callable[..., nn.Module],
        layers: int = 1,
        last: bool = False,
        width: int = 32,
        vocabulary: int = 24,
        **options: object,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.rnn = cell(width, width, num_layers=layers, batch_first=True, **options)
        self.head = nn.Linear(width, vocabulary)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.rnn(self.embed(x))
        return self.head(h[:, -1] if self.last else h)


class Bottleneck(nn.Module):
    def __init__(self, act: Callable[[], nn.Module], inputs: int = 16) -> None:
        super().__init__()
        sizes = [inputs, 64, 32, 4, 32, 64, inputs]
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Linear(a, b), act()]
        self.net = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class VAE(nn.Module):
    def __init__(self, inputs: int = 16, code: int = 4) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.mean, self.log_var = nn.Linear(64, code), nn.Linear(64, code)
        self.decoder = nn.Sequential(nn.Linear(code, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, inputs))

    def loss(self, x: Tensor, beta: float = 1.0, total: bool = False) -> Tensor:
        h = self.encoder(x)
        mean, log_var = self.mean(h), self.log_var(h)
        out = self.decoder(mean + torch.exp(0.5 * log_var) * torch.randn_like(mean))
        kl = -0.5 * (1 + log_var - mean.square() - log_var.exp()).sum(-1)
        error = (out - x).square().sum(-1)
        each = error + beta * kl
        return each.sum() if total else each.mean()


class LayerScaleNet(nn.Module):
    """A stem, residual blocks scaled by a parameter, a head."""

    def __init__(self, blocks: int, scale: float, scalar: bool = False, width: int = 32, classes: int = 4) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(16, width), nn.Linear(width, classes)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
        self.ups, self.downs = (nn.ModuleList(nn.Linear(width, width) for _ in range(blocks)) for _ in range(2))
        self.scales = nn.ParameterList(torch.full(() if scalar else (width,), scale) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for norm, up, down, scale in zip(self.norms, self.ups, self.downs, self.scales, strict=True):
            h = h + scale * down(F.gelu(up(norm(h))))
        return self.head(h)


class LoraLinear(nn.Module):
    def __init__(self, width: int, out: int, rank: int = 4) -> None:
        super().__init__()
        self.base = nn.Linear(width, out)
        self.base.requires_grad_(False)
        self.a, self.b = nn.Linear(width, rank, bias=False), nn.Linear(rank, out, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.b(self.a(x))


class Lora(nn.Module):
    def __init__(self, depth: int, width: int = 64) -> None:
        super().__init__()
        sizes = [16] + [width] * depth + [4]
        self.layers = nn.ModuleList(LoraLinear(a, b) for a, b in itertools.pairwise(sizes))
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.base.weight)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class MoE(nn.Module):
    """Top-1 routing; `idle` experts are hardly ever chosen."""

    def __init__(self, experts: int, idle: int, width: int = 32) -> None:
        super().__init__()
        self.stem, self.router, self.head = nn.Linear(16, width), nn.Linear(width, experts), nn.Linear(width, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, width)) for _ in range(experts))
        nn.init.zeros_(self.router.bias)
        with torch.no_grad():
            self.router.bias[:idle] = -4.0

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.stem(x))
        gate = torch.softmax(self.router(h), -1)
        weight, choice = gate.max(-1)
        out = torch.zeros_like(h)
        for e, expert in enumerate(self.experts):
            rows = (choice == e).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, weight[rows, None] * expert(h[rows]))
        return self.head(h + out)


class TwoTowers(nn.Module):
    def __init__(self, left: nn.Module, right: nn.Module, width: int, classes: int = 4) -> None:
        super().__init__()
        self.left, self.right, self.head = left, right, nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat((self.left(x), self.right(x)), -1))


class Multiply(nn.Module):
    """Multiplies by a constant, forward and backward."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return self.by * x


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, by: float) -> Tensor:
        ctx.by = by  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.by, None  # type: ignore[attr-defined]


class ScaleBackward(nn.Module):
    """The identity, whose backward multiplies the gradient."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Backward.apply(x, self.by)
        return out


class RecurrentReadout(nn.Module):
    """A hand-written recurrence: reads a first vector, runs `steps` on its own, and answers from the last state."""

    def __init__(self, act: Callable[[Tensor], Tensor], steps: int, gain: float, width: int = 32) -> None:
        super().__init__()
        self.inp, self.cell, self.head = nn.Linear(16, width), nn.Linear(width, width), nn.Linear(width, 4)
        self.act, self.steps = act, steps
        nn.init.orthogonal_(self.cell.weight, gain)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        for _ in range(self.steps):
            h = self.act(self.cell(h))
        return self.head(h)


def rms_scale(width: int) -> float:
    return 1 / math.sqrt(width)
