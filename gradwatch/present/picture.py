"""The gradient on its way from the loss to the input, as a picture."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from rich.text import Text

from gradwatch.history import History
from gradwatch.present import words
from gradwatch.present.grid import ROWS
from gradwatch.present.layers import RECENT, Layers, Outputs, behind, median

_DECADES: Final = 4.0
"""A picture's least height: layers that lie within a factor of ten then look alike, as they should."""
_LEGEND: Final = "gain: norm of the gradient below it over that above it"
_SOME: Final = 0.005
"""Dead and saturated shares that are told: what rounds to a hundredth."""
_ROOM: Final = 12
"""Characters of the longest bar, at least; what stands beside the bars gives way."""


def fall(
    history: History,
    *,
    last: int = RECENT,
    until: int | None = None,
    outputs: bool = False,
    width: int = 78,
    ascii_only: bool = False,
) -> Text:
    """The gradient norm of each layer as a bar on a log scale: the way of the gradient, from the loss above to the input below.

    Beside the bars, where it was observed: what the layer and the activation behind it make of the norm of the gradient that passes
    them, and how much of the activation is saturated or dead.

    Args:
        history: the record of the run.
        last: numbers are medians over this many last records.
        until: the number of the record before which these end; None: they are the latest.
        outputs: bars of the gradient with respect to each layer's output, which is what passes through the network, in place of that
            of its parameters, in which the size of the layer's input is a factor.
        width: columns of the picture, at least 40.
        ascii_only: draw with "#" alone.

    Returns:
        Lines of at most `width` columns (longer where a layer's name is longer than a third of it).
    """
    layers = Layers.of(history)
    first = history.recorded - len(history)
    end = len(history) if until is None else min(max(until - first, 0), len(history))
    records = slice(max(0, end - last), end)
    usual = Outputs.usual(history, records)
    index = np.array(layers.index, np.int64)
    norms = usual.delta[index] if outputs else median(layers.grad_norms(history, None)[records])
    order = [history.meta.layers[i].order for i in layers.index]
    ranked = sorted(range(len(layers)), key=lambda i: -i if None in order else -(order[i] or 0))
    path = [i for i in ranked if not math.isnan(norms[i])]
    drawn = [i for i in path if np.isfinite(norms[i]) and norms[i] > 0]
    if not drawn:
        return Text("no gradient was observed")
    of = f", {ROWS} of {len(path)} layers" if len(path) > ROWS else ""
    if of:
        path = [path[round(k * (len(path) - 1) / (ROWS - 1))] for k in range(ROWS)]
    high = math.log10(max(norms[i] for i in drawn))
    low = min(math.floor(math.log10(min(norms[i] for i in drawn))), high - _DECADES)
    encoding = "ascii" if ascii_only else "utf-8"
    names = [words.fit(layers.names[i] or "(model)", encoding) for i in path]
    column = max(map(len, names))
    values = [words.measured(norms[i]) for i in path]
    value = max(map(len, ["norm", *values]))
    for beside in _beside(history, usual, [layers.index[i] for i in path], encoding):
        room = width - column - value - 12 - max(map(len, beside))
        if room >= _ROOM:
            break
    room = max(_ROOM, room)
    what = "gradient of each layer's output" if outputs else "gradient norm by layer"
    count = records.stop - records.start
    when = (
        f"median of {words.plural(count, 'update')}"
        if until is None
        else f"median of updates {first + records.start} to {first + end - 1}"
    )
    title = words.wrapped(f"{what}, {when}, log scale{of}", width, "  ")
    picture = Text().append("\n".join(title) + "\n", "bold")
    if beside[0]:
        picture.append(" " * (7 + column + 2 + room + 2) + "norm".ljust(value) + beside[0] + "\n", "dim")
    for k, (i, name) in enumerate(zip(path, names, strict=True)):
        place = "loss" if k == 0 else "input" if k == len(path) - 1 else ""
        apart = abs(math.log10(norms[drawn[0]]) - math.log10(norms[i])) if i in set(drawn) else math.inf
        style = "green" if apart < 2 else "yellow" if apart < 4 else "red"
        picture.append(f"{place:>5}  ", "dim").append(name.ljust(column), "cyan").append("  ")
        bar = "" if i not in drawn else _bar((math.log10(norms[i]) - low) / (high - low) * room, ascii_only)
        picture.append(bar.ljust(room), style)
        picture.append(f"  {values[k]:<{value}}{beside[k + 1]}".rstrip() + "\n")
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
        picture.append("\n" + "\n".join(words.wrapped(words.fit(said, encoding), width, "  ")))
    if "gain" in beside[0]:
        picture.append("\n" + "\n".join(words.wrapped(_LEGEND, width, "  ")), "dim")
    return picture


def _beside(history: History, usual: Outputs, path: list[int], encoding: str) -> list[list[str]]:
    """What stands right of the bars: a head, then a line for each of these columns of the history. First with all that is known, then
    without the activations, then nothing."""
    follower = behind(history, usual)
    gains = ["" if math.isnan(usual.gain[i]) else words.factor(usual.gain[i]) for i in path]
    after = [_behind_it(history, usual, follower.get(i), i) for i in path]
    columns = [[head, *cells] for head, cells in (("gain", gains), ("behind it", after)) if any(cells)]
    fitted = [[words.fit(cell, encoding) for cell in column] for column in columns]
    padded = [[f"  {cell.ljust(max(map(len, column)))}" for cell in column] for column in fitted]
    kept = [padded, padded[: int(any(gains))], []]
    return [["".join(column[k] for column in some).rstrip() for k in range(len(path) + 1)] for some in kept]


def _behind_it(history: History, usual: Outputs, activation: int | None, layer: int) -> str:
    """The activation behind a layer, in words: a module, or a function, which is observed under the layer itself."""
    at = layer if activation is None else activation
    told = []
    if activation is not None and not math.isnan(usual.gain[at]):
        told.append(words.factor(usual.gain[at]))
    shares = ((usual.dead[at], "dead"), (math.nan if usual.often_flat[at] else usual.saturated[at], "saturated"))
    told += [f"{words.hundredths(share)} % {what}" for share, what in shares if share >= _SOME]
    kind = "" if activation is None else f"{history.meta.layers[at].type} "
    return f"{kind}{', '.join(told)}" if told else ""


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
