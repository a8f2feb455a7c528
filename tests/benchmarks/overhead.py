"""What the watch costs: `python tests/benchmarks/overhead.py [--quick] [--markdown] [mlp resnet gpt tiny growth compiled rules ...]`.

One process, one thread, CPU time (`time.process_time`): wall time on shared cores scatters by 20 % for a watch that does
nothing. Every contender trains a copy of the network on the same batch. They take turns update by update, in a new order
each round (in a fixed one, whoever follows the slowest pays 2 % for its cold caches: measured), and are compared by sums over
blocks of 32 updates, since a median would hide the rare expensive update. A second bare loop among them is the control: what
stands there is the error of the measurement. While others take their turn, everything that a live watch hangs into the process
(the wrapped `torch.autograd.backward`, global optimizer hooks) is put aside: they run as if there were no watch.
"""

from __future__ import annotations

import argparse
import gc
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.optim.optimizer as torch_optimizer
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from gradwatch import GradWatch, Sampling
from tests.benchmarks import rules
from tests.benchmarks.models import WORKLOADS, Workload, growing

BLOCK = 32
FULL = Sampling().dense
"""At the start every update is a full-statistics one; afterwards one in `Sampling.every`."""


class ProcessHooks:
    """Where a live watch hangs code into the process: taken down and put up again as one."""

    PLACES = ((torch.autograd, "backward"), (torch.amp.GradScaler, "scale"))
    HOOKS = (torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks)

    def __init__(self) -> None:
        self.functions = [getattr(owner, name) for owner, name in self.PLACES]
        self.hooks = [dict(hooks) for hooks in self.HOOKS]

    def put(self) -> None:
        for (owner, name), function in zip(self.PLACES, self.functions, strict=True):
            setattr(owner, name, function)
        for hooks, content in zip(self.HOOKS, self.hooks, strict=True):
            hooks.clear()
            hooks.update(content)


@dataclass
class Contender:
    """One training of the workload, with the CPU time of each of its updates.

    Attributes:
        name: as printed.
        before_step: what this user does between `backward` and `step`.
        anomaly: under `set_detect_anomaly(True)`.
        watch: options of the watch, or None for none.
        compiled: by inductor.
    """

    name: str
    workload: Workload
    before_step: Callable[[list[nn.Parameter]], object] | None = None
    anomaly: bool = False
    watch: dict[str, Any] | None = None
    compiled: bool = False
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = self.workload.build()
        self.forward = torch.compile(self.model) if self.compiled else self.model
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)
        self.x, self.y = self.workload.batch()
        self.hooks = ProcessHooks()

    def update(self) -> None:
        with torch.autograd.set_detect_anomaly(self.anomaly):
            self.optimizer.zero_grad()
            self.workload.loss(self.forward(self.x), self.y).backward()
            if self.before_step is not None:
                self.before_step(self.parameters)
            self.optimizer.step()

    def turn(self) -> None:
        self.hooks.put()
        begin = time.process_time()
        self.update()
        self.seconds.append(time.process_time() - begin)

    def block_sums(self) -> list[float]:
        return [sum(self.seconds[i : i + BLOCK]) for i in range(0, len(self.seconds), BLOCK)]


@contextmanager
def attached(contender: Contender) -> Iterator[None]:
    """A contender's watch, live. One at a time: of two, each would pay for the other."""
    bare = ProcessHooks()
    watch = GradWatch(contender.model, console=False, **(contender.watch or {}))
    watch.attach()
    contender.hooks = ProcessHooks()
    try:
        yield
    finally:
        contender.hooks.put()
        watch.detach()
        bare.put()


def take_turns(contenders: list[Contender], rounds: int) -> None:
    """`rounds` updates of each."""
    for contender in contenders:
        contender.seconds.clear()
    gc.collect()
    order = contenders[:]
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for contender in order:
            contender.turn()


def forward_to(contenders: list[Contender], updates: int) -> None:
    """Past the dense start, on the batch that is measured: of two examples alone most units are dead, and that is an alert."""
    for contender in contenders:
        contender.hooks.put()
        for _ in range(updates if contender.watch is not None else 2):
            contender.update()


@dataclass(frozen=True)
class Cost:
    """One contender against a base.

    Attributes:
        ratio: sum of its CPU time over the base's (the control's: one twin over the other).
        low: smallest such ratio of a block.
        high: largest.
        extra: seconds an update above the base.
    """

    ratio: float
    low: float
    high: float
    extra: float

    def __str__(self) -> str:
        return f"{self.ratio:.3f} ({self.low:.3f}-{self.high:.3f})"


def cost(contender: Contender, bases: list[Contender]) -> Cost:
    """Against the mean of the bases: where a copy of a network happens to lie in memory makes it up to 4 % slower than its twin."""
    base = [sum(sums) / len(bases) for sums in zip(*(one.block_sums() for one in bases), strict=True)]
    mine = contender.block_sums()
    blocks = [a / b for a, b in zip(mine, base, strict=True)]
    return Cost(sum(mine) / sum(base), min(blocks), max(blocks), (sum(mine) - sum(base)) / len(contender.seconds))


def costs(contenders: list[Contender]) -> dict[str, Cost]:
    """Each against the first two, which are twins; the second against the first: the control."""
    twin, again, *others = contenders
    return {again.name: cost(again, [twin])} | {other.name: cost(other, [twin, again]) for other in others}


def leaf_modules(model: nn.Module) -> int:
    return sum(1 for module in model.modules() if not list(module.children()))


def clip_grad_norm(parameters: list[nn.Parameter]) -> object:
    return torch.nn.utils.clip_grad_norm_(parameters, 1.0)


def norm_loop(parameters: list[nn.Parameter]) -> object:
    return [p.grad.norm().item() for p in parameters if p.grad is not None]


@dataclass(frozen=True)
class Row:
    """One workload's line of the table."""

    workload: Workload
    leaves: int
    milliseconds: float
    first: Cost
    costs: dict[str, Cost]


def measure(workload: Workload, blocks: int, alternatives: bool = True, compiled: bool = False) -> Row:
    """In sessions of few: the watch against the bare loop, clipping against the bare loop that clips, and the alternatives."""
    bare, watched = Contender("bare", workload, compiled=compiled), Contender("watched", workload, watch={}, compiled=compiled)
    contenders = [bare, Contender("bare again", workload, compiled=compiled), watched]
    with attached(watched):
        forward_to(contenders, 2)
        take_turns(contenders, BLOCK)
        first = cost(watched, contenders[:2])
        forward_to(contenders, max(0, FULL - BLOCK))
        take_turns(contenders, blocks * BLOCK)
    row = Row(workload, leaf_modules(bare.model), 1e3 * sum(bare.seconds) / len(bare.seconds), first, costs(contenders))
    if not alternatives:
        return row
    watched = Contender("watched, clip=1.0", workload, watch={"clip": 1.0})
    contenders = [Contender(name, workload, before_step=clip_grad_norm) for name in ("clips", "clips again")] + [watched]
    with attached(watched):
        forward_to(contenders, FULL + 2)
        take_turns(contenders, blocks * BLOCK)
    row.costs.update(costs(contenders))
    contenders = [
        Contender("bare", workload),
        Contender("bare once more", workload),
        Contender("p.grad.norm().item()", workload, before_step=norm_loop),
        Contender("clip_grad_norm_", workload, before_step=clip_grad_norm),
        Contender("set_detect_anomaly", workload, anomaly=True),
    ]
    forward_to(contenders, 2)
    take_turns(contenders, blocks * BLOCK)
    row.costs.update(costs(contenders))
    return row


COLUMNS = (
    ("bare again", "bare again"),
    ("watched", "watched"),
    ("p.grad.norm().item()", "norm().item() loop"),
    ("clip_grad_norm_", "clip_grad_norm_"),
    ("set_detect_anomaly", "anomaly mode"),
    ("clips again", "clipping again"),
    ("watched, clip=1.0", "watched, clip=1.0"),
)


def workload_table(rows: list[Row]) -> list[list[str]]:
    head = ["network", "bare, ms", "watched, first 32", *(title for _, title in COLUMNS), "µs a leaf module", "µs, first 32"]
    table = [head]
    for row in rows:
        cells = [str(row.costs[name]) for name, _ in COLUMNS]
        microseconds = [f"{1e6 * one.extra / row.leaves:.1f}" for one in (row.costs["watched"], row.first)]
        table.append([row.workload.name, f"{row.milliseconds:.2f}", str(row.first), *cells, *microseconds])
    return table


def growth_table(quick: bool) -> list[list[str]]:
    table = [["growth", "bare, ms", "bare again", "watched", "µs a leaf module"]]
    for layers in (20, 1_000):
        workload = growing(layers)
        row = measure(workload, max(1, workload.blocks // (4 if quick else 1)), alternatives=False)
        table.append(
            [
                workload.name,
                f"{row.milliseconds:.2f}",
                str(row.costs["bare again"]),
                str(row.costs["watched"]),
                f"{1e6 * row.costs['watched'].extra / row.leaves:.2f}",
            ]
        )
    return table


PROTECTION: dict[str, dict[str, Any]] = {
    "watched": {},
    "raise": {"on_nonfinite": "raise"},
    "skip": {"on_nonfinite": "skip"},
    "on_rule: spike, skip": {"on_rule": {"gradient_spike": "skip"}},
    "keep_good=100": {"keep_good": 100},
}


def protection_table(quick: bool) -> list[list[str]]:
    """What it costs to stand ready while nothing is wrong: each over a bare loop, one after the other, past the dense start."""
    table = [["protection", "bare, ms", "bare again", *PROTECTION]]
    for name in ("mlp", "tiny"):
        workload = WORKLOADS[name]
        blocks = max(4, workload.blocks // (4 if quick else 1))
        cells: list[str] = []
        for options in PROTECTION.values():
            bare, watched = Contender("bare", workload), Contender("watched", workload, watch=options)
            contenders = [bare, Contender("bare again", workload), watched]
            with attached(watched):
                forward_to(contenders, FULL + 2)
                take_turns(contenders, blocks * BLOCK)
            found = costs(contenders)
            if not cells:
                cells = [f"{1e3 * sum(bare.seconds) / len(bare.seconds):.2f}", str(found["bare again"])]
            cells.append(str(found["watched"]))
        table.append([workload.name, *cells])
    return table


def compiled_table(quick: bool) -> list[list[str]]:
    """Dynamo serves a watched network by the graph of a bare one unless it checks for hooks, as it does while a watch is attached."""
    table = [["compiled by inductor", "bare, ms", "watched, first 32", "bare again", "watched"]]
    for name in ("mlp", "tiny"):
        workload = WORKLOADS[name]
        row = measure(workload, max(1, workload.blocks // (4 if quick else 1)), alternatives=False, compiled=True)
        table.append(
            [workload.name, f"{row.milliseconds:.2f}", str(row.first), str(row.costs["bare again"]), str(row.costs["watched"])]
        )
    return table


def rules_table() -> list[list[str]]:
    scenarios = list(rules.scenarios(2))
    table = [["all rules, ms an update", *scenarios]]
    for layers in (100, 10_000):
        cases = rules.scenarios(2 * layers)
        table.append(
            [
                f"{layers} layers",
                *(f"{rules.measure(layers, cases[name], name == 'dead')['all of judge']:.3f}" for name in scenarios),
            ]
        )
    return table


def printed(table: list[list[str]], markdown: bool) -> str:
    if markdown:
        lines = [table[0], ["---"] * len(table[0]), *table[1:]]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    # One line a number, not one a network: narrow enough for a terminal.
    title, *names = table[0]
    width = max(len(name) for name in names)
    paragraphs = []
    for head, *cells in table[1:]:
        lines = [f"  {name:<{width}}  {cell}" for name, cell in zip(names, cells, strict=True)]
        paragraphs.append("\n".join([f"{title}: {head}", *lines]))
    return "\n\n".join(paragraphs)


def machine() -> str:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = f"{names[0]}, {len(names)} cores" if names else model
    return f"{model}; Python {platform.python_version()}, torch {torch.__version__}, one thread"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure what the watch costs, in CPU time against the same loop without it.")
    choices = [*WORKLOADS, "growth", "compiled", "protection", "rules"]
    parser.add_argument("what", nargs="*", metavar="what", help=f"any of: {', '.join(choices)} (all)")
    parser.add_argument("--quick", action="store_true", help="a quarter of the blocks, without the two large networks")
    parser.add_argument("--blocks", type=int, help=f"blocks of {BLOCK} updates to measure")
    parser.add_argument("--markdown", action="store_true", help="tables for a README")
    options = parser.parse_args(arguments)
    what = options.what or (["mlp", "tiny", "growth", "rules"] if options.quick else choices)
    if unknown := set(what) - set(choices):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(choices)}")
    torch.set_num_threads(1)
    print(f"Machine: {machine()}.")
    print(f"Ratios of CPU time, summed over all updates; in brackets the lowest and highest block of {BLOCK} updates.")
    print("But for the first 32 updates the watch is past its dense start. Clipping is compared with the bare loop that clips.\n")
    rows = []
    for name in what:
        if name in WORKLOADS:
            blocks = options.blocks or max(1, WORKLOADS[name].blocks // (4 if options.quick else 1))
            rows.append(measure(WORKLOADS[name], blocks))
            if not options.markdown:
                print(printed(workload_table(rows[-1:]), markdown=False) + "\n", flush=True)
    if options.markdown and rows:
        print(printed(workload_table(rows), markdown=True) + "\n", flush=True)
    if "growth" in what:
        print(printed(growth_table(options.quick), options.markdown) + "\n", flush=True)
    if "compiled" in what:
        print(printed(compiled_table(options.quick), options.markdown) + "\n", flush=True)
    if "protection" in what:
        print(printed(protection_table(options.quick), options.markdown) + "\n", flush=True)
    if "rules" in what:
        print(printed(rules_table(), options.markdown), flush=True)


if __name__ == "__main__":
    main()
