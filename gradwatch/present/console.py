"""Two lines an alert, on the console: what is wrong, where and since when; then why, and what to try."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from typing import IO, Any, Final, NoReturn, TypeAlias, cast

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from gradwatch.present import words
from gradwatch.records import Alert, Severity

_STYLES: Final = {words.ERROR: "bold red", words.WARNING: "bold yellow", words.GOOD: "bold green"}
_INDENT: Final = "  "
_Line: TypeAlias = tuple[Text, ...]
"""What stands in one row if the terminal is wide enough; each part begins with the indent."""
_REPEATS: Final = 4
"""Incidents of one rule that are told one by one; after that the 8th, 16th, 32nd. A rule that fires for ever must not bury the
output of the training: a peer printed 2,383 alerts for one fault (measured)."""
_MOMENTS: Final = frozenset({"gradient_spike", "loss_spike"})
"""Over as soon as they are told: that one of them ended is no news."""


class ConsoleSink:
    """Prints alerts at WARNING or above: two lines when one opens, one when it grows worse, one when it ends. INFO never.

    ```
    ▲ gradwatch since step 0: vanishing gradient in layers 0, 2 and 6 more: gradient norm 3.1e-9 at 0 against 0.12 at 18
      Why: each sigmoid passes on at most a quarter of the gradient. Try: ReLU or GELU in its place.
    ```

    On a terminal, lines are wrapped at its width with a hanging indent, between words, so that no name is cut. Into a file or pipe
    they go unwrapped, one line each, for grep and log collectors. Colour repeats what the marks and the words say. Processes of a
    distributed run other than rank 0 print nothing.

    A console that cannot print (a closed stderr, a reader that went away) raises an `Exception` out of the call, not `SystemExit`:
    the caller reports it once and goes on without this sink, so that the training does not end for want of a console.

    Args:
        console: where to print, at its own width and in its own colours. Hand over the console of a `rich` progress bar to print
            above it. None: `sys.stderr`, looked up at every print, because rich's bars, pytest and notebooks replace it.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console
        self._going_on: list[tuple[Alert, bool]] = []  # open incidents, and whether the user was told of them
        self._opened: dict[str, int] = {}
        self._over: deque[tuple[str, int, tuple[str, ...]]] = deque(maxlen=64)
        self._explained: set[tuple[str, str, str]] = set()

    def __call__(self, alert: Alert) -> None:
        """Print what is new about an incident, if anything is."""
        if alert.severity >= Severity.WARNING and _first_rank():
            lines = self._news(alert)
            if lines:
                self._print(lines)

    def print_lines(self, lines: Sequence[str]) -> None:
        """Print finished sentences, as those of the verdict, wrapped like an alert; a mark that begins one gets its colour."""
        if lines and _first_rank():
            self._print([(_sentence(line),) for line in lines])

    # -- what is new ---------------------------------------------------------------------------------------------------------------

    def _news(self, alert: Alert) -> list[_Line]:
        known = _same(self._going_on, alert)
        if known is None:
            # What ends a second time was open when the state was kept that the watch went back to.
            return [] if (alert.rule, alert.step, alert.layers) in self._over and alert.state == "ended" else self._opening(alert)
        before, told = self._going_on[known]
        if alert.state == "ended":
            del self._going_on[known]
            self._over.append((alert.rule, alert.step, alert.layers))
            return [(_ending(alert),)] if told and alert.rule not in _MOMENTS else []
        risen = alert.severity > before.severity
        self._going_on[known] = (alert, told or risen)
        if risen:
            return [(_rise(before, alert),)]
        if told and (alert.origin != before.origin or (words.why(alert) and not words.why(before))):
            return [(_cause_found(alert),), *_mend(alert)]
        return []

    def _opening(self, alert: Alert) -> list[_Line]:
        times = self._opened[alert.rule] = self._opened.get(alert.rule, 0) + 1
        told = times <= _REPEATS or times & (times - 1) == 0
        if alert.state == "open":
            self._going_on.append((alert, told))
        if not told:
            return []
        headline = _headline(alert)
        lines: list[_Line] = [(headline,)]
        explanation = (alert.rule, words.why(alert), words.remedy(alert))
        asides = []
        if explanation in self._explained:
            asides.append("why and what to try: as before")
        elif any(explanation[1:]):
            self._explained.add(explanation)
            lines.append(_explanation(alert))
            lines += _mend(alert)
        if times > _REPEATS:
            asides.append(f"{words.ordinal(times)} time, the others are in watch.alerts")
        if asides:
            headline.append(f" ({'; '.join(asides)})")
        return lines

    # -- how it gets on the screen -------------------------------------------------------------------------------------------------

    def _print(self, lines: Sequence[_Line]) -> None:
        console = self._console
        if console is not None:
            width = console.width
        elif sys.stderr is not None:
            console = Console(file=cast(IO[str], _Stderr(sys.stderr)))
            has_width = console.is_terminal or console.is_jupyter or os.environ.get("COLUMNS", "").isdigit()
            width = console.width if has_width else 0
        else:
            return
        finished = [row for line in lines for row in _finished(line, console.encoding, width)]
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stdout.flush()  # so that what the user printed earlier stands above, also in a log that takes both streams
        with _bars_aside(sys.stderr if self._console is None else console.file), _broken_pipe_raises(console):
            if isinstance(console.file, _Stderr):
                console.file.begin_line(console)
            # Rich would wrap without a hanging indent and cut long names: it gets finished lines.
            console.print(Text("\n").join(finished), soft_wrap=True, highlight=False)


# -- the lines ---------------------------------------------------------------------------------------------------------------------


def _headline(alert: Alert) -> Text:
    symptom, place, detail = words.spoken(alert)
    line = _start(words.mark(alert.severity), words.began(alert)).append(symptom, "bold")
    if place:
        line.append(" in ").append(place, "cyan")
    return line.append(f": {detail}" if detail else "")


def _explanation(alert: Alert) -> _Line:
    said = (("Why:", words.why(alert)), ("Try:", words.remedy(alert)))
    return tuple(Text(_INDENT).append(label, "bold").append(f" {sentence}") for label, sentence in said if sentence)


def _mend(alert: Alert) -> list[_Line]:
    styles = {"-": "red", "+": "green"}
    return [(Text(_INDENT * 2).append(line, styles.get(line[:1], "dim")),) for line in words.mend(alert)]


def _rise(before: Alert, alert: Alert) -> Text:
    symptom, place, detail = words.spoken(alert)
    line = _start(words.mark(alert.severity), f"at step {alert.last_step}").append(symptom, "bold")
    if place:
        line.append(" in ").append(place, "cyan")
    line.append(f" is now {_article(alert)}, {_article(before)} since step {alert.step}")
    return line.append(f": {detail}" if detail else "")


def _cause_found(alert: Alert) -> Text:
    symptom, _, _ = words.spoken(alert)
    line = _start(words.mark(alert.severity), words.began(alert)).append(symptom, "bold")
    line.append(", cause found: ").append(words.why(alert))
    remedy = words.remedy(alert)
    return line.append(" Try:", "bold").append(f" {remedy}") if remedy else line


def _ending(alert: Alert) -> Text:
    line = _start(words.GOOD, "ended").append(words.rule_words(alert.rule), "bold")
    place = words.where(alert)
    if place:
        line.append(" in ").append(place, "cyan")
    span = f"from step {alert.step} to {alert.last_step}" if alert.last_step > alert.step else f"at step {alert.step}"
    return line.append(f", seen in {words.plural(alert.count, 'update')} {span}")


def _article(alert: Alert) -> str:
    return "an error" if alert.severity >= Severity.ERROR else "a warning"


def _start(mark: str, when: str) -> Text:
    return Text().append(mark, _STYLES[mark]).append(" ").append("gradwatch", "bold").append(f" {when}: ")


def _sentence(line: str) -> Text:
    text = Text(line)
    if line[:1] in _STYLES:
        text.stylize(_STYLES[line[0]], 0, 1)
    return text


def _fitted(line: Text, encoding: str) -> Text:
    fitted, at = Text(), 0
    for span in line.spans:
        fitted.append(words.fit(line.plain[at : span.start], encoding))
        fitted.append(words.fit(line.plain[span.start : span.end], encoding), span.style)
        at = span.end
    return fitted.append(words.fit(line.plain[at:], encoding))


def _finished(line: _Line, encoding: str, width: int) -> Iterator[Text]:
    """The parts in one row if there is room, else each in rows of its own."""
    parts = [_fitted(part, encoding) for part in line]
    row = parts[0].copy()
    for part in parts[1:]:
        row.append_text(part[len(_INDENT) - 1 :])
    if not width or row.cell_len <= width:
        yield row
    else:
        for part in parts:
            if part.plain.startswith(_INDENT * 2):
                yield part  # a line of code: the terminal breaks it, and it is whole when it is copied
            else:
                yield from _wrapped(part, width)


def _wrapped(line: Text, width: int) -> Iterator[Text]:
    """The line, broken between words at `width` cells, continuations indented. A longer word stays whole."""
    breaks, used = [], 0
    for word in re.finditer(r"(?:\S|\N{NO-BREAK SPACE})+[^\S\N{NO-BREAK SPACE}]*|^\s+", words.bound(line.plain)):
        if used > len(_INDENT) and used + cell_len(word[0].rstrip()) > width:
            breaks.append(word.start())
            used = len(_INDENT)
        used += cell_len(word[0])
    for i, row in enumerate(line.divide(breaks)):
        row.rstrip()
        yield Text(_INDENT).append_text(row) if i else row


# -- which incident ----------------------------------------------------------------------------------------------------------------


def _same(going_on: Sequence[tuple[Alert, bool]], alert: Alert) -> int | None:
    """Index of the open incident that this alert is a later state of: the same rule and a place in common; the best match wins.

    An alert carries no number. Its layers may have grown since, or have been replaced by their parent, and its step may have been
    corrected, so neither identifies it alone.
    """
    best: tuple[int, int] | None = None
    for i, (before, _) in enumerate(going_on):
        if before.rule != alert.rule:
            continue
        if before.layers == alert.layers and before.parameters == alert.parameters:
            score = 4
        elif set(before.layers) & set(alert.layers) or set(before.parameters) & set(alert.parameters):
            score = 2
        elif _akin(before.layers, alert.layers):
            score = 1
        else:
            continue
        score = 2 * score + (before.step == alert.step)
        if best is None or score > best[0]:
            best = (score, i)
    return None if best is None else best[1]


def _akin(some: Sequence[str], others: Sequence[str]) -> bool:
    """A name of one list is an ancestor of a name of the other."""
    return any(not a or not b or f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.") for a in some for b in others)


# -- the terminal ------------------------------------------------------------------------------------------------------------------


class _Stderr:
    """`sys.stderr` as rich should see it: without the attribute by which rich's consoles reach behind the proxy of another's live
    display, which would print into the middle of that display instead of above it."""

    def __init__(self, file: Any) -> None:
        self._file = file

    @property
    def encoding(self) -> str:
        return getattr(self._file, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        return cast(int, self._file.write(text))

    def flush(self) -> None:
        if hasattr(self._file, "flush"):  # loggers put in the place of stderr have write() and little else
            self._file.flush()

    def isatty(self) -> bool:
        return bool(hasattr(self._file, "isatty") and self._file.isatty())

    def fileno(self) -> int:
        return cast(int, self._file.fileno())

    def begin_line(self, console: Console) -> None:
        """Leave a line that somebody has begun (`print(loss, end="")`), and wipe one that is about to be overwritten (`end="\\r"`).

        Where the cursor is cannot be asked. A line's width of blanks wraps to the next line unless the cursor stands in the first
        column, and the carriage return takes it to the beginning of whichever line it is on; shells do the same before a prompt.
        """
        if (
            not console.is_terminal
            or console.is_dumb_terminal
            or console.legacy_windows
            or hasattr(self._file, "rich_proxied_file")
        ):
            return
        try:
            columns = os.get_terminal_size(self.fileno()).columns
        except (OSError, ValueError, AttributeError):
            return
        self.write(" " * columns + "\r\x1b[K")


@contextlib.contextmanager
def _bars_aside(file: Any) -> Iterator[None]:
    """Takes tqdm's bars off the screen while something is printed. A tqdm that nobody has imported has none."""
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    with contextlib.nullcontext() if tqdm is None else tqdm.external_write_mode(file=file):
        yield


@contextlib.contextmanager
def _broken_pipe_raises(console: Console) -> Iterator[None]:
    """Rich answers a broken pipe by closing stdout and raising SystemExit, which would end the training."""
    own = vars(console)

    def reraise() -> NoReturn:
        raise BrokenPipeError("the reader of the console has gone")

    before = own.get("on_broken_pipe")
    own["on_broken_pipe"] = reraise
    try:
        yield
    finally:
        if before is None:
            del own["on_broken_pipe"]
        else:
            own["on_broken_pipe"] = before


def _first_rank() -> bool:
    """This process is the one of a distributed run that speaks. `torch.distributed` is asked only if somebody has imported it."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return bool(distributed.get_rank() == 0)
    return os.environ.get("RANK", "0").strip() in ("", "0")
