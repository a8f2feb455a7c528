"""The networks of the overhead benchmark, in the sizes that the README quotes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Workload:
    """One network with one batch.

    Attributes:
        name: as printed.
        build: makes the network, equal at each call.
        batch: makes the batch.
        loss: of the network's output and the target.
        blocks: blocks of 32 updates to measure, so that all workloads take comparable time.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    blocks: int


def mlp(layers: int, width: int) -> nn.Module:
    parts: list[nn.Module] = []
    for _ in range(layers - 1):
        parts += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(width, width))


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.shortcut(x)
        return self.relu(out)


def resnet18() -> nn.Module:
    """ResNet-18 with the stem for 32 × 32 images: a 3 × 3 convolution, no pooling."""
    parts: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
    inputs = 64
    for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        parts += [ResidualBlock(inputs, outputs, stride), ResidualBlock(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


class GptBlock(nn.Module):
    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, d))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Gpt(nn.Module):
    def __init__(self, layers: int = 6, d: int = 384, heads: int = 6, context: int = 128, vocabulary: int = 256) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, d), nn.Embedding(context, d)
        self.blocks = nn.Sequential(*[GptBlock(d, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.token(x) + self.position(torch.arange(x.shape[1]))
        out: Tensor = self.head(self.norm(self.blocks(h)))
        return out


def regression(batch: int, width: int) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (torch.randn(batch, width), torch.randn(batch, width))


def sequence_loss(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


WORKLOADS = {
    "mlp": Workload("MLP 12 × 512, batch 256", lambda: mlp(12, 512), regression(256, 512), F.mse_loss, 6),
    "resnet": Workload(
        "ResNet-18, 32 × 32, batch 32",
        resnet18,
        lambda: (torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,))),
        F.cross_entropy,
        2,
    ),
    "gpt": Workload(
        "GPT 6 × 384, 128 tokens, batch 8",
        Gpt,
        lambda: (torch.randint(0, 256, (8, 128)), torch.randint(0, 256, (8, 128))),
        sequence_loss,
        2,
    ),
    "tiny": Workload("MLP 10 × 64, batch 32", lambda: mlp(10, 64), regression(32, 64), F.mse_loss, 32),
}


class Thin(nn.Module):
    """A residual layer so small that nothing but the number of them counts; scaled so that any number of them is healthy."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.linear, self.tanh, self.scale = nn.Linear(width, width), nn.Tanh(), layers**-0.5

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.scale * self.tanh(self.linear(x))
        return out


def growing(layers: int) -> Workload:
    return Workload(
        f"{layers} layers of 16",
        lambda: nn.Sequential(*[Thin(16, layers) for _ in range(layers)]),
        regression(4, 16),
        F.mse_loss,
        max(2, 640 // layers),
    )
