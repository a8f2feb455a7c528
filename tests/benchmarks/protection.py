"""What protection is worth, and what it costs: `python -m tests.benchmarks.protection [--seeds 5] [--updates 200] [--quick] [--markdown]`.

**Worth.** The training of `examples/training_that_would_have_died.py`, a small transformer on the standard library's source, over
several seeds (of the init, the batches, and which of them are broken), three ways: on sound batches alone (*clean*), with six batches
whose gradient is some 400 to 3,000 times the usual (*spikes*), and with three more whose loss is 0/0 (*all*). Told are the median and
the worst held-out loss of the seeds, "NaN" where the weights are lost; what a table of the frequencies of bytes reaches is printed above.
With `on_nonfinite="skip"` *spikes* is left out: it is *all* with three more good batches. Spikes told are `gradient_spike` alerts, and
updates left out are records that are skipped, both in *all*, as medians of the seeds.

The clippers have the settings of their docstrings' examples. A second row of `Value` and of `PerLayer` has a bound that keeps all parts
together near a norm of 1: it is divided by the root of how many there are, 137,216 elements and 16 layers.

**Cost.** CPU time of an update, by the machinery of `overhead.py`: one process, one thread, contenders that take turns update by update
in a new order each round, past the dense start of the watch, on sound batches. "Alone" is a clipper in a loop without a watch, against one
that calls torch's `clip_grad_norm_`; "under the watch" is the watch that has it against an unprotected loop without a watch. A second
bare and a second clipping loop are the control: what stands there is the error of the measurement. In brackets, milliseconds an update:
the network is small, and most of a price is a fixed part that disappears in larger ones (see the README).
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from examples.training_that_would_have_died import BAD, LR, LanguageModel, batches, corpus, held_out_loss, loss_of, windows
from gradwatch import GradWatch
from gradwatch.clip import AGC, AutoClip, GlobalNorm, MedianScaled, NormClipper, PerLayer, PerParameter, Value, ZClip
from tests.benchmarks.models import Workload
from tests.benchmarks.overhead import (
    BLOCK,
    FULL,
    Contender,
    Cost,
    attached,
    clip_grad_norm,
    cost,
    forward_to,
    machine,
    printed,
    take_turns,
)

CLIPPERS: dict[str, Callable[[], NormClipper]] = {
    "GlobalNorm(1.0)": lambda: GlobalNorm(1.0),
    "Value(0.5)": lambda: Value(0.5),
    "Value(0.003)": lambda: Value(0.003),
    "PerParameter(0.1)": lambda: PerParameter(0.1),
    "PerLayer(0.5)": lambda: PerLayer(0.5),
    "PerLayer(0.25)": lambda: PerLayer(0.25),
    "AGC()": lambda: AGC(),
    "AutoClip()": lambda: AutoClip(),
    "ZClip()": lambda: ZClip(),
    "MedianScaled()": lambda: MedianScaled(),
}
SPIKES = {kind: count for kind, count in BAD.items() if kind != "no token"}
BATCHES = {"clean": {}, "spikes": SPIKES, "all": BAD}


@dataclass(frozen=True)
class Protection:
    """A way to train.

    Attributes:
        name: as printed.
        options: of the watch, made anew for each training; None: no watch.
        torch_clips: calls `clip_grad_norm_` before each step.
        on: the kinds of batches that it is trained on.
        clipper: key of `CLIPPERS`, which is measured alone too.
    """

    name: str
    options: Callable[[], dict[str, Any]] | None = None
    torch_clips: bool = False
    on: tuple[str, ...] = ("clean", "all")
    clipper: str = ""


def skipping(clipper: str) -> Protection:
    make = CLIPPERS[clipper]
    return Protection(f"skip, {clipper}", lambda: {"on_nonfinite": "skip", "clip": make()}, clipper=clipper)


def by_rule(reaction: Any) -> Protection:
    return Protection(
        f'skip, on_rule={{"gradient_spike": {reaction!r}}}'.replace("'", '"'),
        lambda: {"on_nonfinite": "skip", "on_rule": {"gradient_spike": reaction}},
    )


PROTECTIONS = (
    Protection("unprotected, no watch", on=tuple(BATCHES)),
    Protection("watched only", dict, on=tuple(BATCHES)),
    Protection("torch's clip_grad_norm_(1.0)", torch_clips=True, on=tuple(BATCHES)),
    Protection("clip=1.0", lambda: {"clip": 1.0}, on=tuple(BATCHES)),
    Protection("skip", lambda: {"on_nonfinite": "skip"}),
    *map(skipping, CLIPPERS),
    by_rule("skip"),
    by_rule(1.0),
)
"""`clip=1.0, on_nonfinite="skip"` is "skip, GlobalNorm(1.0)"."""


@dataclass(frozen=True)
class Outcome:
    """What became of one training.

    Attributes:
        loss: held out; NaN where the weights are lost.
        spikes: alerts of `gradient_spike`; None without a watch.
        left_out: records that are skipped.
        norm: the sum of the absolute values of all weights: of two trainings alike in every bit, the same.
    """

    loss: float
    spikes: int | None
    left_out: int | None
    norm: float


def train(protection: Protection, bad: dict[str, int], seed: int, updates: int, data: tuple[Tensor, Tensor]) -> Outcome:
    torch.manual_seed(seed)
    model = LanguageModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    watch = None if protection.options is None else GradWatch(model, console=False, **protection.options())
    with watch or nullcontext():
        for x, y, weight in batches(data[0], updates, seed, bad):
            optimizer.zero_grad()
            loss_of(model, x, y, weight).backward()
            if protection.torch_clips:
                clip_grad_norm(list(model.parameters()))
            optimizer.step()
    norm = sum(float(p.detach().double().abs().sum()) for p in model.parameters())
    loss = held_out_loss(model, data[1])
    if watch is None:
        return Outcome(loss, None, None, norm)
    if faults := [notice for notice in watch.notices if not notice.startswith("clips ")]:
        raise RuntimeError(f"{protection.name}: {faults}")
    spikes = sum(alert.rule == "gradient_spike" for alert in watch.alerts)
    return Outcome(loss, spikes, int(watch.history.stat("skipped").sum()), norm)


@dataclass
class Row:
    """A line of the table.

    Attributes:
        outcomes: by the kind of batches, one a seed.
        alone: cost of its clipper in a loop without a watch, over torch's clipping.
        watched: cost of its watch, over an unprotected loop.
    """

    protection: Protection
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)
    alone: str = ""
    watched: str = ""

    def cells(self) -> list[str]:
        cells = [self.protection.name]
        for kind in BATCHES:
            losses = [outcome.loss for outcome in self.outcomes.get(kind, ())]
            cells.append(f"{shown(statistics.median(map(worse, losses)))} / {shown(max(map(worse, losses)))}" if losses else "")
        told = self.outcomes["all"]
        for values in ([outcome.spikes for outcome in told], [outcome.left_out for outcome in told]):
            known = [value for value in values if value is not None]
            cells.append(f"{statistics.median(known):g}" if known else "")
        return [*cells, self.alone, self.watched]


def worse(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss


def shown(loss: float) -> str:
    return "NaN" if math.isinf(loss) else f"{loss:.2f}"


def worth(seeds: int, updates: int, data: tuple[Tensor, Tensor]) -> list[Row]:
    rows = [Row(protection, {kind: [] for kind in protection.on}) for protection in PROTECTIONS]
    for seed in range(seeds):
        for row in rows:
            for kind, outcomes in row.outcomes.items():
                outcomes.append(train(row.protection, BATCHES[kind], seed, updates, data))
                print(f"seed {seed}, {kind}: {row.protection.name}: {outcomes[-1].loss:.3f}", file=sys.stderr, flush=True)
    return rows


def same(rows: list[Row]) -> bool:
    """Whether the watch that only watches left every bit of every training as it is without one."""
    bare, watched = ([repr((o.loss, o.norm)) for kind in BATCHES for o in row.outcomes[kind]] for row in rows[:2])
    return bare == watched


def measure(rows: list[Row], blocks: int, data: tuple[Tensor, Tensor]) -> None:
    """Fill in the costs."""

    def batch() -> tuple[Tensor, Tensor]:
        return windows(data[0], 8, torch.Generator().manual_seed(0))

    workload = Workload("language model", LanguageModel, batch, lambda out, y: F.cross_entropy(out.flatten(0, 1), y.flatten()), 0)
    bare = [Contender(name, workload) for name in ("bare", "bare again")]
    clips = [Contender(name, workload, before_step=clip_grad_norm) for name in ("clips", "clips again")]
    alone = {}
    for name, make in CLIPPERS.items():
        alone[name] = Contender(name, workload)
        clipper = make()
        if isinstance(clipper, PerLayer):
            clipper = PerLayer(clipper.max_norm, model=alone[name].model)
        alone[name].before_step = clipper
    contenders = [*bare, *clips, *alone.values()]
    forward_to(contenders, 2)
    take_turns(contenders, blocks * BLOCK)
    for row in rows:
        if row.protection.torch_clips:
            row.alone = f"control: {priced(cost(clips[1], clips[:1]))}"
            row.watched = f"no watch: {priced(cost(clips[0], bare))}"
        elif row.protection.clipper:
            row.alone = priced(cost(alone[row.protection.clipper], clips))
        elif row.protection.options is None:
            row.watched = f"control: {priced(cost(bare[1], bare[:1]))}"
    for row in rows:
        if row.protection.options is None:
            continue
        watched = Contender(row.protection.name, workload, watch=row.protection.options())
        with attached(watched):
            forward_to([*bare, watched], FULL + 2)
            take_turns([*bare, watched], blocks * BLOCK)
        row.watched = priced(cost(watched, bare))


def priced(cost: Cost) -> str:
    return f"{cost.ratio:.3f} ({1e3 * cost.extra:+.2f} ms)"


def table(rows: list[Row]) -> list[list[str]]:
    head = ["training", *(f"{kind}: median / worst" for kind in BATCHES), "spikes told", "left out", "alone", "under the watch"]
    return [head, *(row.cells() for row in rows)]


def by_frequency(data: tuple[Tensor, Tensor]) -> float:
    """Held-out loss of who knows how frequent each byte is and nothing else."""
    counts = Counter(data[0].tolist())
    frequency = torch.tensor([counts[byte] + 1 for byte in range(256)], dtype=torch.float64)
    return float(-(frequency / frequency.sum()).log()[data[1]].mean())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure what protection is worth and what it costs.")
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each contender")
    parser.add_argument("--updates", type=int, default=200, help="updates of a training")
    parser.add_argument("--blocks", type=int, default=4, help=f"blocks of {BLOCK} updates for the costs")
    parser.add_argument("--quick", action="store_true", help="one seed, 120 updates, one block")
    parser.add_argument("--markdown", action="store_true", help="a table for a guide")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds, options.updates, options.blocks = 1, 120, 1
    torch.set_num_threads(1)
    data = corpus()
    print(f"Machine: {machine()}.")
    print(f"{options.seeds} seeds, {options.updates} updates; by frequencies of bytes alone the loss is {by_frequency(data):.2f}.")
    rows = worth(options.seeds, options.updates, data)
    measure(rows, options.blocks, data)
    print(f"Watched only, every training ends as without a watch: {'yes, bit for bit' if same(rows) else 'NO'}.\n")
    print(printed(table(rows), options.markdown))


if __name__ == "__main__":
    main()
