"""How well the rules tell the sick runs of the zoo from the healthy ones: python -m tests.calibration [tuned|held-out|more|all] [name ...]

The thresholds were set on the half of the cases that the hash of their names puts into "tuned"; the other half was looked at when they
stood. A sick run counts as named when an alarm of its rule came in time, as localised when the first layer named lies in the sick
region; a healthy one as a false alarm when anything at WARNING or above was said.
"""

from __future__ import annotations

import sys
import warnings
import zlib
from dataclasses import dataclass, field

import torch

from gradwatch import Alert, GradWatch
from gradwatch.records import Severity
from tests.zoo.case import Case
from tests.zoo.earlier.healthy import HEALTHY
from tests.zoo.earlier.more import MORE
from tests.zoo.earlier.sick import SICK

SEEDS = (0, 1)
IN_TIME, LATER, NEVER_CALLED = 15, 10, 30


@dataclass
class Outcome:
    """What was said of one run.

    Attributes:
        case: the run.
        seed: its seed.
        alarms: alerts at WARNING or above.
        sent: by rule, the number of updates when the first alarm of it was sent.
    """

    case: Case
    seed: int
    alarms: list[Alert] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)

    @property
    def hit(self) -> Alert | None:
        """The alarm that names the fault, the first if there are several."""
        hits = [a for a in self.alarms if a.rule in self.case.rules]
        return min(hits, key=lambda a: self.sent[a.rule], default=None)

    @property
    def in_time(self) -> bool:
        if self.hit is None:
            return False
        allowed = NEVER_CALLED if "never_called" in self.case.name else IN_TIME if self.case.onset == 0 else LATER + 1
        return min(self.sent[r] for r in self.case.rules if r in self.sent) - self.case.onset <= allowed

    @property
    def localised(self) -> bool:
        """The first layer named is one of the region, lies in one, or holds nothing but such."""
        if self.hit is None:
            return False
        hits = [a for a in self.alarms if a.rule in self.case.rules and a.layers]
        return not self.case.region or any(self._inside(a.layers[0]) for a in hits)

    def _inside(self, layer: str) -> bool:
        region = self.case.region
        if any(layer == r or layer.startswith(r + ".") for r in region):
            return True
        below = [p.layer for p in self.facts if p.layer == layer or p.layer.startswith(layer + "." if layer else "")]
        return bool(below) and all(any(b == r or b.startswith(r + ".") for r in region) for b in below)

    facts: tuple[object, ...] = ()


def run(case: Case, seed: int) -> Outcome:
    """Train under the watch."""
    torch.manual_seed(seed)
    setup = case.build(seed)
    outcome = Outcome(case, seed)

    def told(alert: Alert) -> None:
        if alert.severity >= Severity.WARNING and alert.state == "open":
            outcome.sent.setdefault(alert.rule, watch.history.recorded)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        watch = GradWatch(setup.model, console=False, on_alert=told)
        with watch:
            for _ in setup.train():
                pass
    if watch.notices:
        print(f"  notices in {case.name}: {watch.notices}")
    outcome.alarms = [a for a in watch.alerts if a.severity >= Severity.WARNING]
    outcome.facts = watch.history.meta.parameters
    return outcome


def tuned(case: Case) -> bool:
    """The thresholds were set on this case."""
    return zlib.crc32(case.name.encode()) % 2 == 0


def main(arguments: list[str]) -> None:
    """Print what went wrong, then the score of each half."""
    torch.set_num_threads(1)
    which = arguments[0] if arguments and arguments[0] in ("tuned", "held-out", "more", "all") else "all"
    names = [a for a in arguments if a not in ("tuned", "held-out", "more", "all")]
    score: dict[str, dict[str, int]] = {}
    for case in HEALTHY + SICK + MORE:
        half = "more" if case in MORE else "tuned" if tuned(case) else "held-out"
        if which not in (half, "all") or (names and not any(n in case.name for n in names)):
            continue
        mine = score.setdefault(
            half, dict.fromkeys(["healthy", "false", "sick", "named", "in time", "localised", "step", "also"], 0)
        )
        for seed in SEEDS:
            o = run(case, seed)
            wrong = []
            if not case.rules:
                mine["healthy"] += 1
                mine["false"] += bool(o.alarms)
                wrong = ["FALSE"] * bool(o.alarms)
            else:
                hit = o.hit
                step = hit is not None and abs(hit.step - case.onset) <= 1
                also = any(a.rule not in case.rules for a in o.alarms)
                for name, good in (("named", hit is not None), ("in time", o.in_time), ("localised", o.localised), ("step", step)):
                    mine[name] += good
                    if not good:
                        wrong.append(f"not {name}")
                mine["sick"] += 1
                mine["also"] += also
                wrong += ["ALSO"] * also
            if wrong or names:
                print(case.name, seed, *wrong)
                for a in o.alarms:
                    print(
                        f"    {a.rule} since {a.step}, sent {o.sent.get(a.rule)}, {a.count}×, {a.state}: {a.layers[:5]}: {a.message}"
                    )
                    if names:
                        print(f"        {a.cause} {a.remedy}")
    for half, counts in score.items():
        print(half, counts)


if __name__ == "__main__":
    main(sys.argv[1:])
