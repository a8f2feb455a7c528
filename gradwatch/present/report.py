"""What is left to say when asked, and at the end: the verdict, the summary and the table of layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import numpy as np
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.text import Text

from gradwatch.history import History
from gradwatch.present import words
from gradwatch.present.grid import Grid
from gradwatch.present.layers import Layers, Spread, spread
from gradwatch.records import Alert, Severity, SkipReason

_LEAST_UPDATES: Final = 10
"""Rules that need persistence judge nothing earlier (design, "time to a verdict"): with fewer, "healthy" would be a guess."""
_FINDINGS: Final = 3
"""Findings that the verdict spells out."""


_SKIPPED: Final = {
    SkipReason.NON_FINITE: "left out, with gradients that were not finite",
    SkipReason.RULE: "left out by a rule",
    SkipReason.RAISED: "stopped by an error",
    SkipReason.SCALER: "skipped by the GradScaler",
    SkipReason.NO_STEP: "skipped",
}
"""What became of updates that changed no weight, in words."""


def verdict(
    history: History,
    alerts: Sequence[Alert],
    *,
    cost_per_update: float = math.nan,
    share: float | None = None,
    unfinished: int = 0,
    notices: int = 0,
    stopped_by: str = "",
    attached: bool = True,
) -> list[str]:
    """One or two lines for the end of a run: what was found or "healthy", updates, layers, the spread of the gradient, the cost.

    A run that an exception ended is not called healthy: what it would have come to is not known.

    Args:
        history: the record of the run.
        alerts: `watch.alerts`; those at INFO are not spoken of.
        cost_per_update: the watch's own measured cost, seconds an update; NaN where it was not measured.
        share: that cost as a fraction of the run's time, or None.
        unfinished: updates that a backward pass began and no step finished; they are in no record.
        notices: how many notices the watch has about itself.
        stopped_by: what ended the run before its time, as `words.stopper` says it; "" for nothing.
        attached: the watch is attached or has been.

    Returns:
        Lines for `ConsoleSink.print_lines`, which puts "x" for "×" where the encoding lacks it. The second begins with two blanks.
    """
    alarms = [alert for alert in alerts if alert.severity >= Severity.WARNING]
    updates = words.plural(history.recorded, "update")
    facts = _facts(history, unfinished, notices)
    cost = _cost(cost_per_update, share)
    stopped = f"stopped by {stopped_by}" if stopped_by else ""
    if alarms and history.recorded == 0:
        line = f"{words.mark(max(alert.severity for alert in alarms))} gradwatch: {words.plural(len(alarms), 'finding')}"
        rest = _joined([stopped, *facts])
        return [f"{line}, {_no_update(history)}: {_findings(alarms, when=False)}", *[f"  {rest}"] * bool(rest)]
    if alarms:
        open_ = any(alert.state == "open" for alert in alarms)
        mark = words.mark(max(alert.severity for alert in alarms)) if open_ else words.WARNING
        over = "" if open_ else ", over by now"
        return [
            f"{mark} gradwatch: {words.plural(len(alarms), 'finding')} in {updates}{over}: {_findings(alarms)}",
            f"  {_joined([stopped, _spread(spread(history)), *facts, cost])}",
        ]
    if history.recorded == 0:
        told = (
            f"{stopped}{', ' * bool(stopped)}{_no_update(history) if attached else 'it was never attached'}, so nothing was judged"
        )
        return [f"{words.WARNING} gradwatch: {_joined([told, *facts])}"]
    if stopped:
        told = f"{stopped} after {updates}, nothing found before"
        return [f"{words.WARNING} gradwatch: {_joined([told, _spread(spread(history)), *facts, cost])}"]
    if history.recorded < _LEAST_UPDATES:
        told = f"nothing found in {updates}, too few to call it healthy (that takes {_LEAST_UPDATES})"
    else:
        told = f"healthy after {updates}"
    return [f"{words.GOOD} gradwatch: {_joined([told, _spread(spread(history)), *facts, cost])}"]


def _no_update(history: History) -> str:
    passes = history.pending.backward_calls + history.pending.unowned
    return f"no update was completed ({words.plural(passes, 'backward pass')})" if passes else "no update was seen"


def _findings(alarms: Sequence[Alert], when: bool = True) -> str:
    by_rule: dict[str, list[Alert]] = {}
    for alert in sorted(alarms, key=lambda alert: (alert.state != "open", -alert.severity, alert.step)):
        by_rule.setdefault(alert.rule, []).append(alert)
    told = []
    for rule, group in list(by_rule.items())[:_FINDINGS]:
        place = words.where(group[0]) if len(group) == 1 else ""
        ended = " (ended)" if all(alert.state == "ended" for alert in group) else ""
        many = f" {len(group)} times from step {min(alert.step for alert in group)} on"
        began = many if len(group) > 1 else f" {words.began(group[0])}" if when else ""
        told.append(f"{words.rule_words(rule)}{f' in {place}' if place else ''}{began}{ended}")
    if len(by_rule) > _FINDINGS:
        told.append(f"{words.plural(len(by_rule) - _FINDINGS, 'other')} in watch.alerts")
    return "; ".join(told)


def _facts(history: History, unfinished: int, notices: int) -> list[str]:
    facts = []
    reasons = history.stat("skip_reason")[history.stat("skipped")]
    of = f" of the last {len(history)}" if history.recorded > len(history) else ""
    for reason, what in _SKIPPED.items():
        count = int((reasons == reason).sum())
        if count:
            facts.append(f"{words.plural(count, 'update')}{of} {what}")
    if unfinished and history.recorded:  # where there is none at all, that is the headline
        facts.append(f"{words.plural(unfinished, 'update')} left unfinished (backward without a step)")
    if notices:
        facts.append(f"{words.plural(notices, 'notice')} in watch.notices")
    return facts


def _spread(apart: Spread | None) -> str:
    if apart is None:
        return ""
    parts = []
    if apart.layers > 1:
        parts.append(f"gradient norms within {words.times(apart.ratio)} over {apart.layers} layers")
    elif apart.layers == 1:
        parts.append("1 layer")
    if apart.zero:
        parts.append(f"{'' if parts else 'gradient '}exactly zero in {words.plural(apart.zero, 'layer')}")
    if apart.non_finite:
        parts.append(f"{'' if parts else 'gradient '}NaN or Inf in {words.plural(apart.non_finite, 'layer')}")
    return ", ".join(parts)


def _cost(cost_per_update: float, share: float | None) -> str:
    if math.isnan(cost_per_update):
        return ""
    return f"cost {words.duration(cost_per_update)} an update" + ("" if share is None else f", {words.percent(share)}")


def _joined(parts: Sequence[str]) -> str:
    return "; ".join(part for part in parts if part)


def summary(
    history: History,
    alerts: Sequence[Alert],
    *,
    cost_per_update: float = math.nan,
    share: float | None = None,
    unfinished: int = 0,
    notices: Sequence[str] = (),
    stopped_by: str = "",
    attached: bool = True,
) -> str:
    """The whole story in plain ASCII text of at most some hundred lines: for a log, a file or a question to a colleague.

    Args:
        history: the record of the run.
        alerts: `watch.alerts`, those at INFO too.
        cost_per_update: the watch's own cost, seconds an update; NaN where it was not measured.
        share: that cost as a fraction of the run's time, or None.
        unfinished: updates that a backward pass began and no step finished.
        notices: what the watch says about itself.
        stopped_by: what ended the run before its time; "" for nothing.
        attached: the watch is attached or has been.
    """
    lines = verdict(
        history,
        alerts,
        cost_per_update=cost_per_update,
        share=share,
        unfinished=unfinished,
        notices=len(notices),
        stopped_by=stopped_by,
        attached=attached,
    )
    lines += _loss(history) + _input(history)
    clip = history.stat("clip_coef")
    clipped = int((clip < 1).sum())
    if clipped:
        lines.append(
            f"  gradients scaled down in {clipped} of {words.plural(len(history), 'update')}, to x{np.nanmin(clip):.2g} at most"
        )
    for alert in alerts:
        lines += ["", *told_in_full(alert, history.recorded)]
    lines += [""] * bool(notices) + [f"notice: {notice}" for notice in notices]
    text = plain(lines)
    if len(Layers.of(history)):
        text += "\n\n" + "\n".join(words.fit(line, "ascii").rstrip() for line in _text_table(history, alerts))
    return text


_CODE = " " * 9
"""Before a line of the user's code."""


def plain(lines: Iterable[str]) -> str:
    """Lines of the verdict and of `told_in_full` as they stand in the summary: ASCII, wrapped at 80 columns."""
    return "\n".join(words.fit(row, "ascii").rstrip() for line in lines for row in _wrapped(line))


def _loss(history: History) -> list[str]:
    """From where to where the loss went: one that is not finite now is not hidden behind the last one that was."""
    loss = history.stat("loss")
    seen = ~np.isnan(loss) | (history.stat("loss_terms") > 0)  # NaN alone says that it was not seen
    if not seen.any():
        return []
    steps, loss = history.steps[seen], loss[seen]
    told = f"  loss {words.number(loss[0])} -> {words.number(loss[-1])}"
    finite = np.flatnonzero(np.isfinite(loss))
    if not len(finite):
        told += ", never finite"
    elif finite[-1] < len(loss) - 1:
        told += f", last finite: {words.number(loss[finite[-1]])} at step {steps[finite[-1]]}"
    elif len(finite) < len(loss):
        told += f", NaN or Inf in {words.plural(len(loss) - len(finite), 'update')}"
    kept = "" if history.recorded == len(history) else f" (updates {history.steps[0]} to {history.steps[-1]}, the ones kept)"
    return [told + kept]


def _input(history: History) -> list[str]:
    """What the model was given when that was last looked at, if it is known: indices have no mean."""
    mean, std, bad = (history.stat(name) for name in ("input_mean", "input_std", "input_nonfinite"))
    looked = np.flatnonzero(~np.isnan(mean) | (bad > 0))
    if not len(looked):
        return []
    at = looked[-1]
    if bad[at] > 0:
        return [
            f"  input not finite: {words.plural(int(bad[at]), 'element')} NaN or Inf in the sample of update {history.steps[at]}"
        ]
    return [f"  input mean {words.number(mean[at])}, standard deviation {words.number(std[at])}"]


def _wrapped(line: str) -> list[str]:
    if line.startswith(_CODE):  # a line of code is whole when it is copied
        return [line]
    indent = " " * 9 if line[:8].rstrip().endswith(":") else "    " if line.startswith("  ") else "  "
    return words.wrapped(line, 80, indent) or [""]


def told_in_full(alert: Alert, updates: int) -> list[str]:
    """One alert as the summary tells it: rule, state and steps; what, where, why, and what to try, a line each.

    Args:
        alert: one of `watch.alerts`.
        updates: how many the run had, `history.recorded`.
    """
    symptom, _, detail = words.spoken(alert)
    seen = f"seen in {words.plural(alert.count, 'update')} from step {alert.step} to {max(alert.step, alert.last_step)}"
    if not updates:
        seen = "seen before the first update"
    told = [f"{alert.severity.name} {alert.rule} ({alert.state}), {seen}", f"  what:  {symptom}{f': {detail}' if detail else ''}"]
    place = words.where(alert, room=12)
    rows = (("where", place), ("why", words.why(alert)), ("try", words.remedy(alert)))
    told += [f"  {label + ':':<6} {text}" for label, text in rows if text]
    return told + [f"{_CODE}{line}" for line in words.mend(alert)]


# -- the layers, one by one --------------------------------------------------------------------------------------------------------


def table(history: History, alerts: Sequence[Alert], *, ascii_only: bool = False) -> RenderableType:
    """The layers as a table: their gradient, what they put out and pass on, their weights and their state (`Grid`).

    It has the columns that fit. Alerts that belong to no layer stand below.

    Args:
        history: the record of the run.
        alerts: `watch.alerts`.
        ascii_only: draw with ASCII alone; `options.ascii_only` of `__rich_console__` tells.
    """
    return _Table(history, alerts, ascii_only)


class _Table:
    """Made when it is drawn: only then its width is known."""

    def __init__(self, history: History, alerts: Sequence[Alert], ascii_only: bool) -> None:
        self._history, self._alerts, self._ascii_only = history, alerts, ascii_only

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        grid = Grid.of(self._history, self._alerts, ascii_only=self._ascii_only)
        encoding = "ascii" if self._ascii_only else "utf-8"
        alerts = words.plural(len(self._alerts), "alert")
        title = _joined([f"gradwatch: {words.plural(self._history.recorded, 'update')}, {alerts}", _spread(spread(self._history))])
        yield from self._text(title, encoding, options.max_width)
        columns = grid.columns(options.max_width)
        yield grid.table(columns)
        yield from self._text(grid.legend(columns), encoding, options.max_width, "dim")
        for alert in [a for a in self._alerts if a.severity >= Severity.WARNING and (a.state == "ended" or not a.layers)][
            -_FINDINGS:
        ]:
            yield from self._text(f"{words.mark(alert.severity)} {_in_short(alert)}", encoding, options.max_width)
        if grid.left_out:
            yield from self._text(_left_out(grid), encoding, options.max_width)

    @staticmethod
    def _text(line: str, encoding: str, width: int, style: str = "") -> Iterator[Text]:
        for row in words.wrapped(words.fit(line, encoding), width, "  "):
            yield Text(row, style)


def _left_out(grid: Grid) -> str:
    return f"{words.plural(grid.left_out, 'layer')} left out by include and exclude"


def _in_short(alert: Alert) -> str:
    symptom, place, detail = words.spoken(alert)
    when = words.began(alert) + (" (ended)" if alert.state == "ended" else "")
    return f"{symptom}{f' in {place}' if place else ''} {when}{f': {detail}' if detail else ''}"


def _text_table(history: History, alerts: Sequence[Alert]) -> list[str]:
    grid = Grid.of(history, alerts, ascii_only=True)
    columns = grid.text_columns(80)
    return [*grid.lines(columns), *words.wrapped(grid.legend(columns), 80, "  "), *[_left_out(grid)] * bool(grid.left_out)]
