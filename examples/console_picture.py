"""The console of a run that does not learn, and of the same run with the remedy, as text and as a picture.

The classic case: ten sigmoid layers, plain SGD, predicting the next character of the Python source that is on this machine. But for
the two prompts every line and every number is from the run that this script makes, in some seconds; the bars are
`gradwatch.present.picture.fall`, as `gradwatch demo` shows them.

    python examples/console_picture.py examples/console.svg
"""

from __future__ import annotations

import argparse
import io
import sys
from collections import OrderedDict
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text
from torch import nn

from gradwatch import GradWatch
from gradwatch.present.picture import fall

CONTEXT, CHARACTERS, WIDTH, UPDATES = 8, 128, 256, 201


def network(activation: type[nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    parts: dict[str, nn.Module] = {"embedding": nn.Embedding(CHARACTERS, WIDTH // CONTEXT), "flatten": nn.Flatten()}
    for i in range(1, 11):
        linear = parts[f"linear{i}"] = nn.Linear(WIDTH, WIDTH)
        parts[f"{activation.__name__.lower()}{i}"] = activation()
        if activation is nn.ReLU:
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
    return nn.Sequential(OrderedDict(**parts, output=nn.Linear(WIDTH, CHARACTERS)))


def batches(text: str, size: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.tensor([min(ord(char), CHARACTERS - 1) for char in text])
    at = torch.randint(len(codes) - CONTEXT, (UPDATES, size, 1), generator=torch.Generator().manual_seed(0))
    return codes[at + torch.arange(CONTEXT)], codes[at[..., 0] + CONTEXT]


def train(model: nn.Module, console: Console) -> GradWatch:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    contexts, targets = batches(Path(argparse.__file__).read_text(encoding="utf-8"))
    with GradWatch(model, console=console) as watch:
        for step, (context, target) in enumerate(zip(contexts, targets, strict=True)):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(context), target)
            loss.backward()
            optimizer.step()
            if step % 50 == 0:
                console.print(f"step {step:3}  loss {loss.item():.2f}", highlight=False)
    return watch


def main(target: str | None) -> None:
    torch.set_num_threads(1)
    console = Console(record=True, width=100, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for activation, command in ((nn.Sigmoid, "python train.py"), (nn.ReLU, "python train.py --activation relu --init kaiming")):
        console.print(Text.assemble(("$ ", "bold green"), command))
        watch = train(network(activation), console)
        if activation is nn.Sigmoid:
            console.print(fall(watch.history, width=100))
            console.print()
    if target:
        console.save_svg(target, title="gradwatch", clear=False)
    print(console.export_text())


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
