"""How well the faults of the zoo are named: python -m tests.zoo [--half first|second|both|earlier|all] [NAME ...]

Trains sick and healthy runs under the watch and counts: a sick run is named in time if an alert of its rule comes soon enough after the
fault is there, localised if the first layer named lies where the fault is; an alert in it holds if what it says is true of the run. Any
alert at WARNING or above is an alarm in a healthy run. Of the second half only totals are printed, so that nobody develops on it unawares.
"""

from __future__ import annotations

import argparse
import sys

from tests.zoo import against, suite
from tests.zoo.case import Case
from tests.zoo.outcome import Outcome
from tests.zoo.score import IN_TIME, LOCALISED, TRUE, score, table, wrong

HALVES = {
    "first": ("first",),
    "second": ("second",),
    "both": ("first", "second"),
    "earlier": ("earlier",),
    "all": ("earlier", "first", "second"),
}
HELD_OUT = "second"


def main(arguments: list[str]) -> int:
    """Run it; returns the exit status."""
    options = _parser().parse_args(arguments)
    groups = {
        g: [c for c in suite.group(g) if not options.names or any(n in c.name for n in options.names)] for g in HALVES[options.half]
    }
    if not any(groups.values()):
        print(f"no case of --half {options.half} has {' or '.join(map(repr, options.names))} in its name", file=sys.stderr)
        return 2
    if options.proofs:
        return _prove(groups, options)
    tools = tuple(options.against.split(",")) if options.against else (suite.GRADWATCH,)
    for tool in tools:
        if tool != suite.GRADWATCH and tool not in against.TOOLS:
            print(f"--against {tool}: known are {', '.join([suite.GRADWATCH, *against.TOOLS])}", file=sys.stderr)
            return 2
        if tool != suite.GRADWATCH:
            try:
                against.TOOLS[tool].require()
            except ModuleNotFoundError as missing:
                print(f"--against {tool}: {missing}", file=sys.stderr)
                return 2
    return _judge(tools, groups, options)


def _judge(tools: tuple[str, ...], groups: dict[str, list[Case]], options: argparse.Namespace) -> int:
    outcomes: dict[str, dict[str, list[Outcome]]] = {g: {t: [] for t in tools} for g in groups}
    for tool, of, outcome in suite.run_all(tools, groups, options.seeds, options.jobs):
        outcomes[of][tool].append(outcome)
        if not options.quiet and _shown(of, options):
            _tell(tool if len(tools) > 1 else "", outcome, in_full=bool(options.names))
    missed = False
    for of, by_tool in outcomes.items():
        scores = {tool: score(found) for tool, found in by_tool.items()}
        if len(groups[of]) == 0:
            continue
        seeds = f"{options.seeds} {'seed' if options.seeds == 1 else 'seeds'}"
        print(f"\n{of}: {len(groups[of])} cases, {seeds}\n{table(scores)}")
        for tool, total in scores.items():
            if options.check == "silence" and not total.silent:
                missed = True
                print(f"{tool} is not silent in {of}: no healthy run alarmed, no run raising")
            if options.check == "reach" and not total.reached:
                missed = True
                reach = (
                    f"{IN_TIME:.0%} named in time, {LOCALISED:.0%} localised, {TRUE:.0%} of the alerts true, no healthy run alarmed"
                )
                print(f"{tool} misses the reach in {of}: {reach}, no run raising")
    return int(missed)


def _tell(tool: str, outcome: Outcome, in_full: bool) -> None:
    """One line for a run that is not as it should be, and its alerts."""
    words = wrong(outcome)
    if not (words or in_full or outcome.heard.notices):
        return
    print(" ".join(filter(None, [tool, outcome.case.name, f"seed {outcome.seed}:", ", ".join(words) or "as it should be"])))
    for alarm in outcome.heard.alarms:
        untrue = "UNTRUE " if alarm in outcome.untrue else ""
        layers = ", ".join(layer or "(model)" for layer in alarm.layers[:5]) + ", ..." * (len(alarm.layers) > 5)
        print(f"    {untrue}{alarm.name} since {alarm.step}, sent at {alarm.sent}, in {layers or 'no module'}: {alarm.message}")
        if in_full and alarm.advice:
            print(f"        {alarm.advice}")
    for notice in outcome.heard.notices:
        print(f"    notice: {notice}")
    if outcome.heard.error:
        print("    " + outcome.heard.error.strip().replace("\n", "\n    "))


def _prove(groups: dict[str, list[Case]], options: argparse.Namespace) -> int:
    """Train without a watch and let each proof say what it measured."""
    proved = {of: [0, 0] for of in groups}
    for of, name, seed, holds, told in suite.prove_all(groups, options.seeds, options.jobs):
        proved[of][0] += holds
        proved[of][1] += 1
        if _shown(of, options) and not (options.quiet and holds):
            print(f"{name} seed {seed}: {told}", flush=True)
    for of, (holding, total) in proved.items():
        print(f"{of}: {holding} of {total} proofs hold")
    return int(any(holding < total for holding, total in proved.values()))


def _shown(of: str, options: argparse.Namespace) -> bool:
    return of != HELD_OUT or options.show


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.zoo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="only cases with this in their name, with all they say")
    parser.add_argument(
        "--half", choices=HALVES, default="both", help="cases: a half, both (the default), the earlier ones, or all"
    )
    parser.add_argument("--seeds", type=_positive, default=3, metavar="N", help="seeds of each case (3)")
    parser.add_argument("--jobs", type=_positive, default=1, metavar="N", help="processes of one torch thread each (1)")
    parser.add_argument(
        "--against", default="", metavar="TOOL,...", help=f"run these instead: {', '.join([suite.GRADWATCH, *against.TOOLS])}"
    )
    parser.add_argument("--proofs", action="store_true", help="train without a watch and print what each proof measured")
    parser.add_argument(
        "--check",
        nargs="?",
        const="reach",
        choices=("reach", "silence"),
        help="exit with 1 where the reach is missed, or only where a healthy run is alarmed or a run raises",
    )
    parser.add_argument("--quiet", action="store_true", help="only the totals")
    parser.add_argument(
        "--show", action="store_true", help="speak of the runs of the second half too: it is held out, and then spent"
    )
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"needs a whole number from 1, got {text}")
    return number


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
