"""What a clipper takes more than torch's `clip_grad_norm_`, in per cent of an update: `python -m tests.benchmarks.clippers [mlp gpt ...]`.

One process, one thread, CPU time. After each backward pass of a training all contenders clip the same gradients, in a new order each
time: their time alone is measured, and compared with torch's by medians, as a share of the update's. Under a watch a clipper is handed
norms that have been read already ("handed"); called by itself it reads them ("alone"), as torch's does. Bounds are such that
nearly everything is clipped, which is the dearest case. A whole update scatters by more than what is measured here.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gradwatch.clip import (
    AGC,
    AutoClip,
    GlobalNorm,
    Gradients,
    MedianScaled,
    NormClipper,
    PerLayer,
    PerParameter,
    Value,
    ZClip,
    norms_of,
)
from tests.benchmarks.models import WORKLOADS, Workload
from tests.benchmarks.overhead import machine, printed

MAKE: dict[str, Callable[[nn.Module], NormClipper]] = {
    "GlobalNorm": lambda model: GlobalNorm(1e-3),
    "Value": lambda model: Value(1e-6),
    "PerParameter": lambda model: PerParameter(1e-4),
    "PerLayer": lambda model: PerLayer(1e-4, model=model),
    "AGC": lambda model: AGC(1e-6, model=model),
    "AutoClip": lambda model: AutoClip(1.0, warmup=1),
    "ZClip": lambda model: ZClip(z_thresh=0.01, warmup=2, min_std=0.0, max_norm=1e-3),
    "MedianScaled": lambda model: MedianScaled(0.1, warmup=1),
}


def measure(workload: Workload, updates: int) -> dict[str, tuple[float, float]]:
    """Per cent of an update that each takes more than torch's: alone and handed."""
    torch.manual_seed(0)
    model = workload.build()
    params = list(model.parameters())
    layer_of = {id(p): layer for layer, module in model.named_modules() for p in module.parameters(recurse=False)}
    names, layers = [name for name, _ in model.named_parameters()], [layer_of[id(p)] for p in params]
    optimizer = torch.optim.AdamW(params, lr=1e-5)
    x, y = workload.batch()
    own = {name: make(model) for name, make in MAKE.items()}
    contenders: dict[str, Callable[[Gradients], object]] = {"torch": lambda _: torch.nn.utils.clip_grad_norm_(params, 1e-3)}
    contenders |= {f"{name}, alone": lambda _, clip=clip: clip(params) for name, clip in own.items()}  # type: ignore[misc]
    contenders |= {f"{name}, handed": lambda given, clip=clip: clip.clip(given) for name, clip in own.items()}  # type: ignore[misc]
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    whole: list[float] = []
    shuffle = random.Random(0).shuffle
    for i in range(updates + 3):
        begin = time.process_time()
        optimizer.zero_grad()
        workload.loss(model(x), y).backward()
        between = time.process_time() - begin
        saved = [p.grad.clone() for p in params if p.grad is not None]
        order = list(contenders)
        shuffle(order)
        for name in order:
            took = timed(contenders[name], params, saved, names, layers)
            if i >= 3:
                seconds[name].append(took)
        begin = time.process_time()
        optimizer.step()
        if i >= 3:
            whole.append(between + time.process_time() - begin)
    torchs, update = statistics.median(seconds["torch"]), statistics.median(whole)
    more = {name: 100 * (statistics.median(times) - torchs) / update for name, times in seconds.items()}
    return {name: (more[f"{name}, alone"], more[f"{name}, handed"]) for name in own}


def timed(
    clip: Callable[[Gradients], object],
    params: Sequence[Tensor],
    saved: Sequence[Tensor],
    names: Sequence[str],
    layers: Sequence[str],
) -> float:
    with torch.no_grad():
        for p, g in zip(params, saved, strict=True):
            assert p.grad is not None
            p.grad.copy_(g)
    given = Gradients(params, norms_of(params).double(), names, layers)
    begin = time.process_time()
    clip(given)
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what clippers take more than torch's own, in per cent of an update.")
    parser.add_argument("what", nargs="*", help=f"any of: {', '.join(WORKLOADS)} (mlp, resnet, gpt)")
    parser.add_argument("--updates", type=int, default=24)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"Machine: {machine()}. More than clip_grad_norm_, in per cent of an update: alone / handed.\n")
    found = {name: measure(WORKLOADS[name], options.updates) for name in options.what or ("mlp", "resnet", "gpt")}
    table = [["clipper", *(WORKLOADS[name].name for name in found)]]
    for clipper in MAKE:
        table.append([clipper, *(f"{row[clipper][0]:+.2f} / {row[clipper][1]:+.2f}" for row in found.values())])
    print(printed(table, options.markdown))


if __name__ == "__main__":
    main()
