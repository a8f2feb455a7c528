"""The layers as rows of cells: which of them are shown, and which columns fit."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from gradwatch.history import History
from gradwatch.present import words
from gradwatch.present.layers import Layers, Outputs, behind, between, latest, median
from gradwatch.records import Alert

ROWS: Final = 40
"""Layers shown at once in a table or a picture: a screenful."""
_BLOCKS: Final = "▁▂▃▄▅▆▇█"
_STEPS: Final = "_.-'\""
_TREND: Final = 10
_TREND_DECADES: Final = 2.0
"""A trend's least height. Norms scatter by a factor of two or three in health; scaled to that, noise would look like a collapse."""
_GAP: Final = 2

_HEADS: Final[Mapping[str, str]] = {
    "layer": "layer",
    "type": "type",
    "norm": "grad norm",
    "trend": "trend",
    "gain": "gain",
    "rms": "out rms",
    "saturated": "sat. %",
    "dead": "dead %",
    "weight": "weight norm",
    "update": "update ratio",
    "state": "state",
}
"""The columns in their order. That of an observed quantity is there only if something was observed."""
_LEFT: Final = frozenset({"layer", "type", "trend", "state"})
_OBSERVED: Final = frozenset({"gain", "rms", "saturated", "dead"})
_LEGEND: Final[Mapping[str, str]] = {
    "saturated": "sat.: share of outputs where the activation is flat (ReLU: zeros, usually 50-70 %)",
    "dead": "dead: units that never fire",
    "gain": "gain: gradient norm below over above",
}
_NARROWER: Final = (
    ("type", 12),
    ("weight", 0),
    ("trend", 6),
    ("update", 0),
    ("type", 0),
    ("trend", 0),
    ("rms", 0),
    ("gain", 0),
    ("dead", 0),
    ("saturated", 0),
)
"""What gives way where there is no room, to how many characters (0: it goes), the least useful first."""
_WELL: Final = ("ok", "frozen", "")
_SHORTER: Final = (("trend", 0), ("type", 12))
"""The same in a text that is kept: no number goes."""


@dataclass(frozen=True, slots=True)
class Row:
    """A layer, or a run of layers that are not shown.

    Attributes:
        cells: by the keys of the columns, "" where a quantity does not apply; all but the trend.
        trend: `[T]`, the gradient norm over the kept records.
    """

    cells: Mapping[str, str]
    trend: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Grid:
    """The layers that hold parameters, and the activations: gradient norm when last seen and its trend over the kept records; when they
    were last looked at, gain, root mean square of the output, saturated and dead share of it; weight norm, update ratio, state.

    Activations have a row each where all fit into a screenful. Else those have one that an alert names, or of which most is dead or
    saturated; what is known of the others stands in the row of the layer before them, as it does for activations that are functions
    (`F.relu`). Of more than a screenful of rows only the first, the last and those with something to say are shown. A trend has a log
    scale of its own, at least two decades high; "!" stands for NaN or Inf.

    Attributes:
        rows: as they are shown.
        ascii_only: draw with ASCII alone.
        left_out: layers that are out of scope.
    """

    rows: tuple[Row, ...]
    ascii_only: bool
    left_out: int

    @classmethod
    def of(cls, history: History, alerts: Sequence[Alert], *, ascii_only: bool = False) -> Grid:
        """That of this history; `alerts` give the states."""
        outputs = Outputs.last(history)
        besides, wanted = between(history, outputs, alerts)
        saturated, dead = outputs.saturated.copy(), outputs.dead.copy()
        if len(Layers.of(history, besides)) > ROWS:
            besides = [i for i, seen in zip(besides, wanted, strict=True) if seen]
            for layer, activation in behind(history, outputs).items():
                if activation not in besides and np.isnan(saturated[layer]) and np.isnan(dead[layer]):
                    saturated[layer], dead[layer] = outputs.saturated[activation], outputs.dead[activation]
        layers = Layers.of(history, besides)
        states = layers.states(history, alerts)
        index = np.array(layers.index, np.int64)
        much = outputs.much()[index]
        chosen = _chosen([state not in _WELL or bool(much[i]) for i, state in enumerate(states)])
        shown = layers.only(chosen)
        norms, weights, ratios = shown.grad_norms(history, None), shown.weight_norms(history), shown.update_ratios(history)
        quantities = {"gain": outputs.gain, "rms": outputs.rms, "saturated": saturated, "dead": dead}
        now = {
            "norm": latest(norms),
            **{name: values[index[chosen]] for name, values in quantities.items()},
            "weight": weights,
            "update": ratios,
        }
        every = {"norm": median(layers.grad_norms(history)), **{name: values[index] for name, values in quantities.items()}}
        rows = []
        for k, (before, i) in enumerate(pairwise([-1, *chosen, len(layers)])):
            if i - before > 1:
                rows.append(_rest(range(before + 1, i), every, states))
            if k < len(chosen):
                own = bool(len(shown.columns[k]))
                cells = {name: _quantity(name, float(values[k]), own) for name, values in now.items()}
                kind = history.meta.layers[shown.index[k]].type
                rows.append(Row({"layer": shown.names[k] or "(model)", "type": kind, **cells, "state": states[i]}, norms[:, k]))
        encoding = "ascii" if ascii_only else "utf-8"
        fitted = [Row({name: words.fit(cell, encoding) for name, cell in row.cells.items()}, row.trend) for row in rows]
        return cls(tuple(fitted), ascii_only, layers.left_out)

    # -- how it is drawn -----------------------------------------------------------------------------------------------------------

    def columns(self, width: int) -> dict[str, int]:
        """The columns of the table that fit into so many characters, and theirs. A name longer than two fifths is broken at a dot."""
        return self._fitted(width, (("layer", max(16, 2 * width // 5)), *_NARROWER))

    def text_columns(self, width: int) -> dict[str, int]:
        """Those of a text that is kept: every number, every name in one piece, in more than `width` characters where they need more."""
        return self._fitted(width, _SHORTER)

    def _fitted(self, width: int, narrower: Sequence[tuple[str, int]]) -> dict[str, int]:
        room = {}
        for name, head in _HEADS.items():
            cells = [self._cell(row, name) for row in self.rows]
            if name not in _OBSERVED or any(cell not in ("", "-") for cell in cells):
                room[name] = max(map(cell_len, [*head.split(" "), *cells]))
        wanted = dict(room)
        for name, size in narrower:
            if sum(room.values()) + _GAP * (len(room) - 1) <= width:
                break
            if name in room:
                room[name] = min(room[name], size)
                if name == "layer":
                    lines = [line for row in self.rows for line in self._cell(row, name, size).split("\n")]
                    room[name] = max(map(cell_len, [_HEADS[name], *lines]))
                if not size:
                    del room[name]
        for name, _ in reversed(narrower):  # a wide column that went may have made room for a narrow one that went before it
            if name in wanted and name not in room and sum(room.values()) + _GAP * len(room) + wanted[name] <= width:
                room[name] = wanted[name]
        return {name: room[name] for name in _HEADS if name in room}

    def table(self, columns: Mapping[str, int]) -> Table:
        """For rich."""
        grid = Table(
            box=None if self.ascii_only else box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            padding=(0, _GAP if self.ascii_only else _GAP - 1, 0, 0),
            header_style="bold",
        )
        for name in columns:
            grid.add_column(
                _HEADS[name].replace(" ", "\n"),
                justify="left" if name in _LEFT else "right",
                vertical="top",
                overflow="fold",
                no_wrap=name not in ("layer", "state"),
                style="cyan" if name == "layer" else "",
            )
        for row in self.rows:
            texts = [Text(self._cell(row, name, size)) for name, size in columns.items()]
            state = row.cells["state"]
            texts[-1].stylize("green" if state == "ok" else "dim" if state == "frozen" else "bold red")
            grid.add_row(*texts)
        return grid

    def lines(self, columns: Mapping[str, int]) -> list[str]:
        """As plain text: the heads in two lines, each row in one."""
        heads = [{name: _HEADS[name].rpartition(" ")[at] for name in columns} for at in (0, 2)]
        rows = [{name: self._cell(row, name, size) for name, size in columns.items()} for row in self.rows]
        padded = [
            [row[name].ljust(size) if name in _LEFT else row[name].rjust(size) for name, size in columns.items()]
            for row in [*heads, *rows]
        ]
        return [(" " * _GAP).join(row).rstrip() for row in padded]

    def legend(self, columns: Mapping[str, int]) -> str:
        """What the columns mean whose heads do not say it; "" where none of them is shown."""
        return "; ".join(text for name, text in _LEGEND.items() if name in columns)

    def _cell(self, row: Row, name: str, size: int | None = None) -> str:
        if name == "trend":
            return sparkline(row.trend, width=_TREND if size is None else size, ascii_only=self.ascii_only)
        cell = row.cells.get(name, "")
        if size is None or cell_len(cell) <= size:
            return cell
        if name == "type":
            return f"{cell[: size - 2]}.." if self.ascii_only else f"{cell[: size - 1]}…"
        return _folded(cell, size) if name == "layer" else cell


def _quantity(name: str, value: float, own: bool) -> str:
    """A cell; "" where the quantity does not apply to the layer, and "-" where it does and was not observed."""
    if name in ("saturated", "dead"):
        return "" if np.isnan(value) else words.hundredths(value)
    if name in _OBSERVED or own:
        return "" if name in _OBSERVED and np.isnan(value) else words.factor(value) if name == "gain" else words.measured(value)
    return ""


def _rest(hidden: Sequence[int], every: Mapping[str, NDArray[np.float64]], states: Sequence[str]) -> Row:
    """A row for layers that have none: medians over them."""
    middle = {name: float(median(values[list(hidden), None])[0]) for name, values in every.items()}
    sick = sum(states[i] not in _WELL for i in hidden)
    cells = {name: _quantity(name, value, own=True) for name, value in middle.items()}
    state = f"{sick} of them not ok" if sick else "ok"
    return Row({"layer": f"... {len(hidden)} more", **cells, "state": state}, np.empty(0))


def _chosen(wanted: Sequence[bool]) -> list[int]:
    """Which layers to show: all if they fit, else the first and last few and as many of those that should be seen as fit."""
    count, edge = len(wanted), 4
    if count <= ROWS:
        return list(range(count))
    middle = [i for i in range(edge, count - edge) if wanted[i]][: ROWS - 2 * edge]
    return [*range(edge), *middle, *range(count - edge, count)]


def _folded(name: str, width: int) -> str:
    """A name in lines of at most `width` characters, broken behind dots as long as that is possible."""
    lines = [""]
    for part in re.findall(r"[^.]*\.?", name):
        if lines[-1] and cell_len(lines[-1] + part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


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
