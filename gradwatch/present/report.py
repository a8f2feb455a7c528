"""What is left to say when asked, and at the end: the verdict, the summary, the table of layers, and the fall of the gradient."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gradwatch.history import History
from gradwatch.present import words
from gradwatch.present.layers import RECENT, Layers, Spread, latest, median, spread
from gradwatch.records import Alert, Severity, SkipReason

_LEAST_UPDATES: Final = 10
"""Rules that need persistence judge nothing earlier (design, "time to a verdict"): with fewer, "healthy" would be a guess."""
_FINDINGS: Final = 3
"""Findings that the verdict spells out."""
_ROWS: Final = 40
"""Layers shown at once in a table or a picture: a screenful."""
_BLOCKS: Final = "▁▂▃▄▅▆▇█"
_STEPS: Final = "_.-'\""
_TREND: Final = 10
_TREND_DECADES: Final = 2.0
"""A trend's least height. Norms scatter by a factor of two or three in health; scaled to that, noise would look like a collapse."""
_FALL_DECADES: Final = 4.0
"""A picture's least height: layers that lie within a factor of ten then look alike, as they should."""


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
    skipped = int(history.stat("skipped").sum())
    if skipped:
        reasons = history.stat("skip_reason")
        by = " by the GradScaler" if (reasons == SkipReason.SCALER).sum() == skipped else ""
        of = f" of the last {len(history)}" if history.recorded > len(history) else ""
        facts.append(f"{words.plural(skipped, 'update')}{of} skipped{by}")
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
    lines += _loss(history)
    clip = history.stat("clip_coef")
    clipped = int((clip < 1).sum())
    if clipped:
        lines.append(
            f"  gradients scaled down in {clipped} of {words.plural(len(history), 'update')}, to x{np.nanmin(clip):.2g} at most"
        )
    for alert in alerts:
        lines += ["", *_told_in_full(alert, history.recorded)]
    lines += [""] * bool(notices) + [f"notice: {notice}" for notice in notices]
    lines = [row for line in lines for row in _wrapped(line)]
    if len(Layers.of(history)):
        lines += ["", *_text_table(history, alerts)]
    return "\n".join(words.fit(line, "ascii").rstrip() for line in lines)


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


def _wrapped(line: str) -> list[str]:
    indent = " " * 9 if line[:8].rstrip().endswith(":") else "    " if line.startswith("  ") else "  "
    return textwrap.wrap(line, 80, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False) or [""]


def _told_in_full(alert: Alert, updates: int) -> list[str]:
    symptom, _, detail = words.spoken(alert)
    seen = f"seen in {words.plural(alert.count, 'update')} from step {alert.step} to {max(alert.step, alert.last_step)}"
    if not updates:
        seen = "seen before the first update"
    told = [f"{alert.severity.name} {alert.rule} ({alert.state}), {seen}", f"  what:  {symptom}{f': {detail}' if detail else ''}"]
    place = words.where(alert, room=12)
    rows = (("where", place), ("why", words.why(alert)), ("try", words.remedy(alert)))
    return told + [f"  {label + ':':<6} {text}" for label, text in rows if text]


# -- the layers, one by one --------------------------------------------------------------------------------------------------------

_HEAD: Final = ("layer", "type", "grad norm", "trend", "weight norm", "update ratio", "state")
_RIGHT: Final = (2, 4, 5)


def table(history: History, alerts: Sequence[Alert], *, ascii_only: bool = False) -> RenderableType:
    """The layers that hold parameters: last gradient norm, its trend over the kept records, weight norm, update ratio, state.

    Of more than a screenful only the first, the last and the sick ones are shown. A trend has a log scale of its own, at least two
    decades high; "!" stands for NaN or Inf. Alerts that belong to no layer stand below.

    Args:
        history: the record of the run.
        alerts: `watch.alerts`.
        ascii_only: draw with ASCII alone; `options.ascii_only` of `__rich_console__` tells.
    """
    encoding = "ascii" if ascii_only else "utf-8"
    rows, left_out = _rows(history, alerts, ascii_only)
    grid = Table(
        box=None if ascii_only else box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold"
    )
    for i, head in enumerate(_HEAD):
        grid.add_column(
            head.replace(" ", "\n"),  # so that the table fits into 80 columns
            justify="right" if i in _RIGHT else "left",
            vertical="top",
            overflow="fold",
            no_wrap=i > 1,
            style="cyan" if i == 0 else "",
        )
    for row in rows:
        cells = [Text(words.fit(cell, encoding)) for cell in row]
        cells[-1].stylize("green" if row[-1] == "ok" else "dim" if row[-1] == "frozen" else "bold red")
        grid.add_row(*cells)
    below = [alert for alert in alerts if alert.severity >= Severity.WARNING and (alert.state == "ended" or not alert.layers)]
    notes = [f"{words.mark(alert.severity)} {_in_short(alert)}" for alert in below[-_FINDINGS:]]
    if left_out:
        notes.append(f"{words.plural(left_out, 'layer')} left out by include and exclude")
    head_line = f"gradwatch: {words.plural(history.recorded, 'update')}, {words.plural(len(alerts), 'alert')}"
    apart = _spread(spread(history))
    texts = [_joined([head_line, apart]), *notes]
    first, *rest = [Text(words.fit(text, encoding)) for text in texts]
    return Group(first, grid, *rest)


def _in_short(alert: Alert) -> str:
    symptom, place, detail = words.spoken(alert)
    when = words.began(alert) + (" (ended)" if alert.state == "ended" else "")
    return f"{symptom}{f' in {place}' if place else ''} {when}{f': {detail}' if detail else ''}"


def _text_table(history: History, alerts: Sequence[Alert]) -> list[str]:
    rows, left_out = _rows(history, alerts, ascii_only=True)
    cells = [("layer", "type", "grad norm", "trend", "weights", "update", "state"), *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(_HEAD))]
    lines = [
        "  ".join(
            cell.rjust(width) if i in _RIGHT else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    return lines + [f"{words.plural(left_out, 'layer')} left out by include and exclude"] * bool(left_out)


def _rows(history: History, alerts: Sequence[Alert], ascii_only: bool) -> tuple[list[tuple[str, ...]], int]:
    """A row of cells for each layer that is shown, one for each run of layers that is not; and how many are out of scope."""
    layers = Layers.of(history)
    states = layers.states(history, alerts)
    sick = [state not in ("ok", "frozen") for state in states]
    chosen = _chosen(sick)
    shown = layers.only(chosen)
    every = median(layers.grad_norms(history))
    norms, weights, ratios = shown.grad_norms(history, None), shown.weight_norms(history), shown.update_ratios(history)
    now = latest(norms)
    rows: list[tuple[str, ...]] = []
    before = -1
    for k, i in enumerate([*chosen, len(layers)]):
        hidden = range(before + 1, i)
        if hidden:
            rest = sum(sick[j] for j in hidden)
            middle = _cell(float(median(every[list(hidden), None])[0]))
            rows.append((f"... {len(hidden)} more", "", middle, "", "", "", f"{rest} of them not ok" if rest else "ok"))
        if k < len(chosen):
            kind = history.meta.layers[shown.index[k]].type
            trend = sparkline(norms[:, k], ascii_only=ascii_only)
            rows.append((shown.names[k] or "(model)", kind, _cell(now[k]), trend, _cell(weights[k]), _cell(ratios[k]), states[i]))
        before = i
    return rows, layers.left_out


def _chosen(sick: Sequence[bool]) -> list[int]:
    """Which layers to show: all if they fit, else the first and last few and as many sick ones as fit."""
    count, edge = len(sick), 4
    if count <= _ROWS:
        return list(range(count))
    middle = [i for i in range(edge, count - edge) if sick[i]][: _ROWS - 2 * edge]
    return [*range(edge), *middle, *range(count - edge, count)]


def _cell(value: float) -> str:
    return "-" if math.isnan(value) else "NaN/Inf" if math.isinf(value) else words.number(value)


def sparkline(values: NDArray[np.float64], *, width: int = _TREND, ascii_only: bool = False) -> str:
    """Positive values over time in `width` characters, on a log scale of their own, at least two decades high.

    Args:
        values: `[T]`; NaN where nothing was observed (a blank), Inf where the value was NaN or Inf ("!"), 0 stands at the bottom.
        width: characters at most.
        ascii_only: five heights in ASCII in place of eight blocks.
    """
    blocks = _STEPS if ascii_only else _BLOCKS
    parts = np.array_split(values, min(width, len(values))) if len(values) else []
    points = np.array([np.inf if np.isinf(part).any() else median(part[:, None])[0] for part in parts])
    logs = np.full(len(points), np.nan)
    drawn = np.isfinite(points) & (points > 0)
    logs[drawn] = np.log10(points[drawn])
    if drawn.any():
        low, high = float(logs[drawn].min()), float(logs[drawn].max())
        room = max(0.0, _TREND_DECADES - (high - low)) / 2
        low, high = low - room, high + room
        heights = np.clip((logs - low) / (high - low) * len(blocks), 0, len(blocks) - 1)
    line = ""
    for i, point in enumerate(points):
        line += " " if math.isnan(point) else "!" if math.isinf(point) else blocks[0] if not drawn[i] else blocks[int(heights[i])]
    return line


# -- the fall ----------------------------------------------------------------------------------------------------------------------


def fall(history: History, *, last: int = RECENT, width: int = 78, ascii_only: bool = False) -> Text:
    """The gradient norm of each layer as a bar on a log scale: the way of the gradient, from the loss above to the input below.

    Args:
        history: the record of the run.
        last: the bars are medians over this many last records.
        width: columns of the picture, at least 40.
        ascii_only: draw with "#" alone.

    Returns:
        Lines of at most `width` columns (longer where a layer's name is longer than a third of it).
    """
    layers = Layers.of(history)
    norms = median(layers.grad_norms(history, last))
    order = [history.meta.layers[i].order for i in layers.index]
    ranked = sorted(range(len(layers)), key=lambda i: -i if None in order else -(order[i] or 0))
    path = [i for i in ranked if not math.isnan(norms[i])]
    drawn = [i for i in path if np.isfinite(norms[i]) and norms[i] > 0]
    if not drawn:
        return Text("no gradient was observed")
    of = f", {_ROWS} of {len(path)} layers" if len(path) > _ROWS else ""
    if of:
        path = [path[round(k * (len(path) - 1) / (_ROWS - 1))] for k in range(_ROWS)]
    high = math.log10(max(norms[i] for i in drawn))
    low = min(math.floor(math.log10(min(norms[i] for i in drawn))), high - _FALL_DECADES)
    encoding = "ascii" if ascii_only else "utf-8"
    names = [words.fit(layers.names[i] or "(model)", encoding) for i in path]
    column = max(map(len, names))
    room = max(16, width - column - 8 - 12)
    mean = f"median of {words.plural(min(last, len(history)), 'update')}"
    picture = Text().append(f"gradient norm by layer, {mean}, log scale{of}\n", "bold")
    for k, (i, name) in enumerate(zip(path, names, strict=True)):
        end = "loss" if k == 0 else "input" if k == len(path) - 1 else ""
        depth = high - math.log10(norms[i]) if i in set(drawn) else math.inf
        style = "green" if depth < 2 else "yellow" if depth < 4 else "red"
        picture.append(f"{end:>5}  ", "dim").append(name.ljust(column), "cyan").append("  ")
        bar = "" if i not in drawn else _bar((math.log10(norms[i]) - low) / (high - low) * room, ascii_only)
        picture.append(bar.ljust(room), style).append(f"  {_cell(norms[i])}\n")
    picture.append(" " * (7 + column + 2)).append(_ruler(low, high, room), "dim")
    ratio = norms[drawn[0]] / norms[drawn[-1]]
    if len(drawn) > 1:
        total = float(max(ratio, 1 / ratio))
        each = total ** (1 / (len(drawn) - 1))
        said = (
            "about level"
            if total < 2
            else f"{'falls' if ratio > 1 else 'grows'} {words.times(total)} ({words.times(each)} a layer)"
        )
        said += f" from {words.layer(layers.names[drawn[0]])} to {words.layer(layers.names[drawn[-1]])}"
        picture.append("\n" + words.fit(said, encoding))
    return picture


def _bar(cells: float, ascii_only: bool) -> str:
    if ascii_only:
        return "#" * max(1, round(cells))
    eighths = max(1, round(cells * 8))
    return "█" * (eighths // 8) + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8]


def _ruler(low: float, high: float, room: int) -> str:
    """A tick at each power of ten, as many of them labelled as there is room for."""
    line = [" "] * (room + 8)
    free = 0
    for power in range(math.ceil(low), math.floor(high) + 1):
        at = round((power - low) / (high - low) * room)
        label = f"1e{power}"
        if at >= free and at + len(label) <= len(line):
            line[at : at + len(label)] = label
            free = at + len(label) + 2
    return "".join(line).rstrip()
