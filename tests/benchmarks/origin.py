"""What it costs to know where a NaN was born: `python tests/benchmarks/origin.py [--quick] [--markdown] [mlp resnet gpt tiny]`.

**In health**: a watch that holds what an update was computed from, and one that does not (`origin=False`), each against bare loops that
take turns with it update by update (the machinery of `overhead.py`); the control is a second bare loop. And the microseconds that the
hooks count themselves.

**Once an incident**: CPU time of the replay in updates of the bare loop, for a NaN that is born in the forward pass of a layer in the
middle of the network, and for one that is born in its backward pass; and of an update that is traced as it runs. Medians of several.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from gradwatch import GradWatch
from gradwatch.investigate import inquest
from tests.benchmarks.models import WORKLOADS, Workload
from tests.benchmarks.overhead import BLOCK, FULL, Contender, attached, costs, forward_to, machine, printed, take_turns


def held(workload: Workload, blocks: int) -> list[str]:
    """Ratios of the two watches over bare loops, the control, and what the hooks count."""
    cells = []
    for options in ({"origin": None}, {"origin": False}):
        bare, watched = Contender("bare", workload), Contender("watched", workload, watch=options)
        contenders = [bare, Contender("bare again", workload), watched]
        with attached(watched):
            forward_to(contenders, FULL + 2)
            take_turns(contenders, blocks * BLOCK)
        found = costs(contenders)
        cells += [str(found["watched"]), str(found["bare again"])]
    return cells


def counted(workload: Workload, updates: int) -> float:
    """Microseconds an update in the hooks that hold, by their own clock."""
    contender = Contender("watched", workload)
    watch = GradWatch(contender.model, console=False)
    with watch:
        for _ in range(8):
            contender.update()
        assert watch._recorder is not None
        before = watch._recorder.held.spent
        for _ in range(updates):
            contender.update()
        return 1e6 * (watch._recorder.held.spent - before) / updates


def middle_of(model: nn.Module) -> nn.Module:
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    return layers[len(layers) // 2]


def forward_bug(y: Tensor) -> Tensor:
    return y + torch.log(y * 0 - 1)


def backward_bug(y: Tensor) -> Tensor:
    return y + torch.sqrt(y * 0)


def replays(workload: Workload, bug: Callable[[Tensor], Tensor], times: int) -> float:
    """CPU time of a replay, in updates of the bare loop."""
    bare = Contender("bare", workload)
    for _ in range(4):
        bare.update()
    ratios = []
    for _ in range(times):
        contender = Contender("watched", workload)
        layer = middle_of(contender.model)
        seconds: list[float] = []
        real = inquest.investigate

        def timed(*args: Any, real: Any = real, seconds: list[float] = seconds) -> Any:
            begin = time.process_time()
            found = real(*args)
            seconds.append(time.process_time() - begin)
            assert found.origin is not None
            return found

        inquest.investigate = timed
        try:
            with GradWatch(contender.model, console=False):
                contender.update()
                handle = layer.register_forward_hook(lambda module, args, output: bug(output))
                contender.update()
                handle.remove()
        finally:
            inquest.investigate = real
        begin = time.process_time()
        for _ in range(4):
            bare.update()
        ratios.append(4 * seconds[0] / (time.process_time() - begin))
    return statistics.median(ratios)


def traced(workload: Workload, times: int) -> float:
    """CPU time of an update that is traced as it runs, in updates of the bare loop."""
    bare, contender = Contender("bare", workload), Contender("watched", workload)
    ratios = []
    with GradWatch(contender.model, console=False) as watch:
        contender.update()
        assert watch._inquest is not None
        for _ in range(times):
            watch._inquest.armed = 1
            begin = time.process_time()
            contender.update()
            slow = time.process_time() - begin
            begin = time.process_time()
            bare.update()
            ratios.append(slow / (time.process_time() - begin))
    return statistics.median(ratios)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure what it costs to know where a NaN was born.")
    parser.add_argument("what", nargs="*", metavar="what", help=f"any of: {', '.join(WORKLOADS)} (all)")
    parser.add_argument("--quick", action="store_true", help="a quarter of the blocks, without the two large networks")
    parser.add_argument("--markdown", action="store_true", help="a table for a README")
    options = parser.parse_args(arguments)
    what = options.what or (["mlp", "tiny"] if options.quick else list(WORKLOADS))
    if unknown := set(what) - set(WORKLOADS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(WORKLOADS)}")
    torch.set_num_threads(1)
    print(f"Machine: {machine()}.\n")
    table = [
        [
            "network",
            "watched",
            "bare again",
            "watched, origin=False",
            "bare again, then",
            "hooks that hold, µs an update",
            "replay of a forward fault, updates",
            "replay of a backward fault, updates",
            "a traced update, updates",
        ]
    ]
    for name in what:
        workload = WORKLOADS[name]
        blocks = max(1, workload.blocks // (4 if options.quick else 1))
        times = 3 if options.quick else 7
        row = [workload.name, *held(workload, blocks), f"{counted(workload, 4 * BLOCK if name in ('mlp', 'tiny') else BLOCK):.0f}"]
        row += [f"{replays(workload, forward_bug, times):.1f}", f"{replays(workload, backward_bug, times):.1f}"]
        row.append(f"{traced(workload, times):.1f}")
        table.append(row)
        if not options.markdown:
            print(printed([table[0], row], markdown=False) + "\n", flush=True)
    if options.markdown:
        print(printed(table, markdown=True))


if __name__ == "__main__":
    main()
