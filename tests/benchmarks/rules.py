"""What the rules cost: python -m tests.benchmarks.rules [layers ...] [scenario ...]

Time of one update of the baselines and all default rules, mean over 64 updates after the first 16, for networks of Linear layers: a
healthy run, and runs in which there is something to tell about half of the network or all of it at every update.
"""

from __future__ import annotations

import sys
import time

import numpy as np
from numpy.typing import NDArray

from gradwatch.diagnose.incidents import Incidents
from gradwatch.diagnose.rules import default_rules
from gradwatch.history import History, LayerFact, Meta, ParameterFact
from gradwatch.records import GradState

WARM, UPDATES = 16, 64


def history(layers: int) -> History:
    """An empty history of `layers` Linear layers in blocks of four."""
    parameters, facts = [], [LayerFact("", "Sequential", "container")]
    for i in range(layers):
        name = f"blocks.{i // 4}.{i % 4}"
        if i % 4 == 0:
            facts.append(LayerFact(f"blocks.{i // 4}", "Sequential", "container"))
        role = "input" if i == 0 else "head" if i == layers - 1 else "hidden"
        facts.append(LayerFact(name, "Linear", "linear", 2 * i, role))
        for j, (kind, shape) in enumerate((("weight", (64, 64)), ("bias", (64,)))):
            parameters.append(
                ParameterFact(
                    f"{name}.{kind}", name, shape, owner="SGD#0", init_rms=0.1, order=2 * i + j, distance=2 * (layers - i)
                )
            )
    return History(Meta(tuple(parameters), tuple(facts)), window=512)


def scenarios(columns: int) -> dict[str, NDArray[np.float64]]:
    """Gradient norms `[P]` by what is wrong, the input first; NaN: no backward reaches the parameter."""
    lower = np.arange(columns) < columns // 2
    return {
        "healthy": np.ones(columns),
        "starved": np.where(lower, 1e-6, 1.0),
        "fading": np.logspace(-6, 0, columns),
        "growing": np.logspace(6, 0, columns),
        "zero": np.where(lower, 0.0, 1.0),
        "missing": np.where(lower, np.nan, 1.0),
        "dead": np.where(lower, 0.0, 1.0),
    }


def measure(layers: int, norms: NDArray[np.float64], dead: bool = False) -> dict[str, float]:
    """Milliseconds an update, by part; `dead`: so are the activations behind the lower half."""
    h = history(layers)
    incidents = Incidents(default_rules(), notice=print)
    random = np.random.default_rng(0)
    reached = ~np.isnan(norms)
    spent = dict.fromkeys(["baselines", *(rule.__name__ for rule in default_rules()), "all of judge"], 0.0)
    for step in range(WARM + UPDATES):
        row = h.blank_row()
        row["grad_norm"] = norms * random.lognormal(0.0, 0.3, len(norms))
        row["grad_nonfinite"] = np.where(reached, 0.0, np.nan)
        row["weight_norm"], row["update_ratio"], row["lr"] = 6.4, 1e-3, 0.1
        row["grad_state"] = np.where(reached, GradState.REACHED | GradState.STEPPED, GradState.STEPPED)
        row["loss"], row["backward_calls"], row["loss_terms"] = 1.0, 1, 1
        row["calls"], row["activation_nonfinite"], row["dead_fraction"] = 1, 0, 0.0
        row["saturated_fraction"], row["gain"], row["delta_norm"] = 0.5, 0.9, 1.0
        if dead:
            row["saturated_fraction"][1 : layers // 2] = row["dead_fraction"][1 : layers // 2] = 1.0
        row["total_norm"] = np.sqrt(np.nansum(np.square(row["grad_norm"])))
        h._ring.append(row)
        parts = [("baselines", lambda row=row: h.baselines.update(row, h.recorded - 1))]
        parts += [(rule.__name__, lambda rule=rule: list(rule(h))) for rule in default_rules()]
        parts += [("all of judge", lambda: incidents.judge(h))]
        for name, part in parts:
            start = time.process_time()
            part()
            if step >= WARM:
                spent[name] += (time.process_time() - start) * 1e3 / UPDATES
    return spent


def main() -> None:
    """Print the table."""
    arguments = sys.argv[1:]
    chosen = [a for a in arguments if not a.isdigit()]
    for layers in [int(a) for a in arguments if a.isdigit()] or [20, 100, 1000, 10_000]:
        for name, norms in scenarios(2 * layers).items():
            if chosen and name not in chosen:
                continue
            spent = measure(layers, norms, name == "dead")
            whole = spent["baselines"] + spent["all of judge"]
            print(f"{layers:6d} layers, {name:7s}: {whole:7.3f} ms an update", end="  (")
            print(", ".join(f"{part} {ms:.3f}" for part, ms in sorted(spent.items(), key=lambda kv: -kv[1])[:5]) + ")")


if __name__ == "__main__":
    main()
