"""What in the numbers of a run stands behind a finding: one step that did it, the scale of weights, biases and inputs, the step size."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gradwatch.diagnose.execution import execution_of
from gradwatch.history import History
from gradwatch.records import Finding

BACK = 64
"""Records before the finding among which the step that did it is looked for; it is seen only in the next look, ten records later at most
in the default cadence, and no rule looks back further."""

JUMP = 5.0
"""Times the median of those before it from which one gradient norm stands out. Norms of healthy runs stay within 3 times their median
for all but one update in a thousand (`gradient_spike` needs 10 to call it an event by itself)."""

FASTER = 2.0
"""Times the learning rate before from which a step was made with another one."""

OWN = 0.7
"""Share of a layer's output that its bias alone makes up from which the bias is the reason: half of its square."""

LARGE = 3.0
"""Factor by which weights enlarge what they are given from which they are: PyTorch's default gives 0.58, kaiming_normal_ 1.4."""


class Step(NamedTuple):
    """One update.

    Attributes:
        number: of the record.
        norm: its total norm.
        usual: the median of those before.
        lr: its largest learning rate; NaN: not known.
        lr_before: that of the update before it.
    """

    number: int
    norm: float
    usual: float
    lr: float
    lr_before: float


class Scale(NamedTuple):
    """Of the layer that feeds another.

    Attributes:
        layer: its name.
        weights: factor by which its weights change the scale of independent inputs.
        bias: root mean square of its bias.
        output: that of what it puts out; NaN: not known.
    """

    layer: str
    weights: float
    bias: float
    output: float


def step_before(finding: Finding, history: History) -> Step | None:
    """The one step after which it began: the last whose gradient stands out, or whose learning rate does; None where none does."""
    first = int(history.steps[0]) if len(history) else 0
    last = finding.step - 1  # what a step does is seen in the next record
    if last <= first:
        return None
    start = max(first, last - BACK)
    rows = slice(start - first, last - first + 1)
    norms = history.stat("total_norm")[rows].astype(np.float64)
    rates = history.stat("lr")[rows]
    with np.errstate(invalid="ignore"):
        rate = np.nanmax(np.where(np.isfinite(rates), rates, -np.inf), axis=1) if rates.size else np.full(len(norms), np.nan)
    for i in range(len(norms) - 1, 0, -1):
        if last - (start + i) >= 10:  # a look that far away would have shown it before
            break
        before = norms[:i][np.isfinite(norms[:i])]
        usual = float(np.median(before)) if before.size else np.nan
        faster = rate[i] > FASTER * rate[i - 1] > 0
        if norms[i] > JUMP * usual or faster:
            return Step(start + i, float(norms[i]), usual, float(rate[i]), float(rate[i - 1]))
    return None


def feeding(layer: str, history: History) -> Scale | None:
    """The layer with parameters that ran last before an activation (itself, where a function follows it); None where none is known."""
    meta = history.meta
    names = [fact.name for fact in meta.layers]
    if layer not in names:
        return None
    rank = execution_of(meta).rank
    column = names.index(layer)
    holders = np.unique(meta.layer_index[meta.layer_index >= 0])
    earlier = holders[rank[holders] <= rank[column]]
    if not earlier.size:
        return None
    feeder = int(earlier[rank[earlier].argmax()])
    mine = [fact for fact, at in zip(meta.parameters, meta.layer_index, strict=True) if at == feeder]
    matrix = next((fact for fact in mine if len(fact.shape) >= 2), None)
    bias = next((fact for fact in mine if len(fact.shape) == 1), None)
    if matrix is None:
        return None
    outputs = history.stat("activation_rms")[:, feeder]
    seen = outputs[np.isfinite(outputs)]
    rms = float(bias.init_rms) if bias is not None and np.isfinite(bias.init_rms) else 0.0
    return Scale(names[feeder], float(matrix.init_gain), rms, float(seen[0]) if seen.size else np.nan)


def usual_ratio(history: History) -> float:
    """Median over the matrices of how much of itself an update changes; NaN where it is not known."""
    meta, ratios = history.meta, history.baselines.update_ratio
    known = [float(r) for r, fact in zip(ratios, meta.parameters, strict=True) if len(fact.shape) >= 2 and np.isfinite(r)]
    return float(np.median(known)) if known else float("nan")


def usual_rate(history: History) -> float:
    """The largest learning rate of the last record that had one; NaN where none is known."""
    rates = history.baselines.lr
    known = rates[np.isfinite(rates)]
    return float(known.max()) if known.size else float("nan")
