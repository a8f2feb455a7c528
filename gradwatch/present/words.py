"""Rules, layers and numbers in words: what every surface that speaks to a person shares. Plain strings, no rich, no torch."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from typing import Final

from gradwatch.records import Alert, Origin, Severity

RULE_WORDS: Final = {
    "non_finite_gradient": "NaN or Inf in the gradient",
    "non_finite_activation": "NaN or Inf in the activations",
    "non_finite_loss": "NaN or Inf in the loss",
    "non_finite_weight": "NaN or Inf in the weights",
    "non_finite_input": "NaN or Inf in the input",
    "zero_gradient": "gradient exactly zero",
    "gradients_not_zeroed": "gradients not zeroed between updates",
    "not_in_optimizer": "parameters without an optimizer",
    "never_stepped": "the optimizer never steps",
    "frozen_weights": "weights do not move",
    "update_ratio_too_large": "updates too large for the weights",
    "update_ratio_too_small": "updates too small for the weights",
    "loss_diverging": "the loss diverges",
    "loss_plateau": "the loss stands still",
    "loss_scale_collapse": "the loss scale collapses",
    "poor_init": "poor initialisation",
    "unnormalized_input": "input not normalised",
    "double_softmax": "softmax applied twice",
}
"""Rules whose name does not read as words; the others are spoken as they are written, "vanishing gradient"."""

ERROR: Final = "✗"
WARNING: Final = "▲"
GOOD: Final = "✓"
"""Marks. In ASCII they become "X", "!" and "+"."""

_ASCII: Final = str.maketrans(
    {
        ERROR: "X",
        WARNING: "!",
        GOOD: "+",
        "×": "x",
        "·": "-",
        "–": "-",
        "—": "-",
        "−": "-",
        "…": "...",
        "‖": "||",
        "≥": ">=",
        "≤": "<=",
        "≈": "~",
        "→": "->",
        "←": "<-",
        "∞": "inf",
        "µ": "u",
        "“": '"',
        "”": '"',
        "‘": "'",
        "’": "'",
        "\N{NO-BREAK SPACE}": " ",
    }
)


def rule_words(rule: str) -> str:
    """The symptom in plain words: "vanishing gradient" for `vanishing_gradient`."""
    return RULE_WORDS.get(rule, rule.replace("_", " "))


def number(value: float) -> str:
    """Two or three figures, the way people write them: "0.12", "3.1e-9", "812"."""
    value = float(value)
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Inf" if value > 0 else "-Inf"
    if value.is_integer() and abs(value) < 1e6:
        return str(int(value))
    if 100 <= abs(value) < 1e5:
        return f"{value:.0f}"
    if 1e-3 <= abs(value) < 100:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def times(ratio: float) -> str:
    """A factor: "×7.3", "×3.1e8"."""
    if ratio < 10_000:
        return f"×{ratio:.1f}" if ratio < 100 else f"×{ratio:.0f}"
    mantissa, exponent = f"{ratio:.1e}".split("e")
    return f"×{mantissa}e{int(exponent)}"


def factor(value: float) -> str:
    """What a norm is multiplied by, in two figures: "×0.21", "×2.4", "×1.0e-5"; "NaN/Inf" and "-" as in `measured`."""
    if not math.isfinite(value):
        return measured(value)
    if not 1e-3 <= value < 100:
        return f"×{number(value)}"
    return f"×{value:#.2g}".rstrip(".")  # "#" keeps the second figure: ×0.10 above ×0.11


def measured(value: float) -> str:
    """A measured number in a table: "-" for NaN, which is "not observed", and "NaN/Inf" for Inf, which stands for both."""
    return "-" if math.isnan(value) else "NaN/Inf" if math.isinf(value) else number(value)


def hundredths(share: float) -> str:
    """A share in a column of percents: "0", "52", "100"; "<1" and ">99" for what is rounded to none and to all and is not."""
    whole = round(100 * share)
    return "<1" if whole == 0 and share > 0 else ">99" if whole == 100 and share < 1 else str(whole)


def duration(seconds: float) -> str:
    """ "35 µs", "0.4 ms", "1.2 s"."""
    for unit, size in (("µs", 1e-6), ("ms", 1e-3)):
        if seconds < (100 * size if unit == "µs" else 1):
            return f"{seconds / size:.2g} {unit}" if seconds < 100 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds:.3g} s"


def percent(share: float) -> str:
    """ "0.6 %", and "under 0.1 %" for less than can be measured."""
    return (
        "under 0.1 %" if share < 0.0005 else f"{share:.1%}".replace("%", " %") if share < 0.1 else f"{share:.0%}".replace("%", " %")
    )


def plural(count: int, noun: str) -> str:
    """ "1 update", "3 updates", "3 backward passes"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}{'es' if noun.endswith('s') else 's'}"


def stopper(error: BaseException | None) -> str:
    """What ended a run before its time: "ValueError", "sys.exit(3)"; "" where nothing did: no exception, or an exit without an error."""
    if error is None or isinstance(error, GeneratorExit):
        return ""
    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            return f"sys.exit({int(error.code)})" if error.code else ""
        return "sys.exit"  # with a message, which stands on stderr already
    return type(error).__name__


def ordinal(count: int) -> str:
    """ "2nd", "11th", "32nd"."""
    ending = "th" if count % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(count % 10, "th")
    return f"{count}{ending}"


def listed(names: Sequence[str], room: int = 2) -> str:
    """Names in a sentence: "a", "a, b and c", and from `room + 2` on "a, b and 9 more"; the root module is "(model)"."""
    shown = [name or "(model)" for name in names]
    if len(shown) > room + 1:
        return f"{', '.join(shown[:room])} and {len(shown) - room} more"
    if len(shown) > 1:
        return f"{', '.join(shown[:-1])} and {shown[-1]}"
    return shown[0] if shown else ""


def where(alert: Alert, room: int = 2) -> str:
    """The place, as it stands after "in": the layers, else the parameters; "" where the fault has no place."""
    names = alert.layers or alert.parameters
    if not names:
        return ""
    if tuple(names) == ("",):
        return "the model"
    bare = any(name and not _reads_as_name(name) for name in names[: room + 1])
    return f"layer{'s' if len(names) > 1 else ''} {listed(names, room)}" if bare else listed(names, room)


def names_it(sentence: str, name: str) -> bool:
    """The sentence already says this name, as a whole word. A name without letters is never taken as said: it may be a number."""
    return _reads_as_name(name) and re.search(rf"(?<![\w.]){re.escape(name)}(?!\w|\.\w)", sentence) is not None


def layer(name: str) -> str:
    """One layer in a sentence: its name, "layer 3" for a bare number, "(model)" for the root."""
    return (name if _reads_as_name(name) else f"layer {name}") if name else "(model)"


def _reads_as_name(name: str) -> bool:
    """It has a letter: a bare "3", of an nn.Sequential, would read as a count."""
    return re.search(r"[^\W\d]", name) is not None


def two_numbers(alert: Alert) -> str:
    """The first two numbers of the evidence, for a message that holds none: "ratio 3.1e-9, peers 0.12"."""
    pairs = list(alert.evidence.items())[:2]
    return ", ".join(f"{name.replace('_', ' ')} {number(value)}" for name, value in pairs)


def holds_a_number(sentence: str, names: Sequence[str]) -> bool:
    """There is a figure in the sentence that is no part of one of the names."""
    for name in sorted(filter(None, names), key=len, reverse=True):
        sentence = sentence.replace(name, "")
    return re.search(r"\d|\bNaN\b|\bInf\b", sentence) is not None


def birthplace(origin: Origin) -> str:
    """Where a non-finite value was born: "aten::sqrt in the backward pass of encoder.0, train.py:31"."""
    if origin.phase == "input":
        place = "the batch that went into the model"
    elif origin.phase == "weight":
        place = f"a weight of {origin.module or 'the model'}"
    else:
        place = f"the {origin.phase} pass of {origin.module or 'the loss'}"
        if origin.op:
            place = f"{origin.op} in {place}"
    return f"{place}, {origin.source}" if origin.source else place


def why(alert: Alert) -> str:
    """The cause as a sentence, with the birthplace of a non-finite value unless the cause names it; "" if nothing is known."""
    said = _sentence(alert.cause)
    if alert.origin is not None and not _said(alert.origin, alert.cause):
        said = f"{said} Born in {birthplace(alert.origin)}.".strip()
    return said


def remedy(alert: Alert) -> str:
    """What to try, as a sentence."""
    return _sentence(alert.remedy.partition("\n")[0])


def mend(alert: Alert) -> list[str]:
    """The lines of the user's code that it is about: a diff ("- old", "+ new"), or as they stand."""
    return alert.remedy.splitlines()[1:]


def _said(origin: Origin, cause: str) -> bool:
    parts = [part for part in (origin.source, origin.op.removeprefix("aten::")) if part]
    return bool(parts) and all(part in cause for part in parts)


def _sentence(text: str) -> str:
    text = _our_numbers(" ".join(text.split()))
    if text and text[-1] not in ".!?":
        text += "."
    return text


_EXPONENT: Final = re.compile(r"(?<![\w.])\d+(?:\.\d+)?e[+-]?\d+(?![\w.]*\w)")
_AT_A_NUMBER: Final = re.compile(
    r"\b(at|in|outputs? of|units of|that of) (\d+(?:\.\d+)*)(?=$|[,;:)]| (?:against|before|holds?|lie|fire)\b)"
)


def _our_numbers(sentence: str) -> str:
    """Numbers with an exponent as `number` writes them: "8e-08" is "8.0e-8" everywhere else on the screen, and "1e+03" is 1000."""
    return _EXPONENT.sub(lambda found: number(float(found[0])), sentence)


def _named_layers(sentence: str, names: Sequence[str]) -> str:
    """ "at 18" reads as a count: "at layer 18", where the names of the alert are such numbers too."""
    if all(_reads_as_name(name) for name in names if name):
        return sentence
    return _AT_A_NUMBER.sub(r"\1 layer \2", sentence)


def spoken(alert: Alert) -> tuple[str, str, str]:
    """The first line of an alert in three parts: symptom, place ("" if the detail names it), detail with its numbers."""
    detail = " ".join(alert.message.split()).rstrip(".")
    place = where(alert)
    if len(alert.layers) == 1 and names_it(detail, alert.layers[0]):
        place = ""
    if not holds_a_number(detail, (*alert.layers, *alert.parameters)):
        numbers = two_numbers(alert)
        detail = f"{detail} ({numbers})" if detail and numbers else detail or numbers
    return rule_words(alert.rule), place, _our_numbers(_named_layers(detail, alert.layers))


def mark(severity: Severity) -> str:
    """The mark of an alert."""
    return ERROR if severity >= Severity.ERROR else WARNING


def began(alert: Alert) -> str:
    """When: "at step 57" for a single update, "since step 0" for what lasts."""
    # An optimizer that never steps closes no update, so its last one is its first.
    single = alert.last_step <= alert.step and alert.rule != "never_stepped"
    return f"{'at' if single else 'since'} step {alert.step}"


def fit(text: str, encoding: str) -> str:
    """The text with nothing that the encoding lacks and no control character: a name may hold anything, a terminal obeys it."""
    text = "".join(char if char.isprintable() else _escaped(char) for char in text)
    if can(text, encoding):
        return text
    text = "".join(char if can(char, encoding) else char.translate(_ASCII) for char in text)
    return text if can(text, encoding) else text.encode("ascii", "backslashreplace").decode("ascii")


_UNIT: Final = re.compile(r"(?<=\d) (?=(?:µs|us|ms|s|%)(?!\w))")


def bound(text: str) -> str:
    """The text with a no-break space between a number and its unit, for what breaks lines; `wrapped` and the console take it out
    again, so that logs hold plain blanks and can be searched. As long as before."""
    return _UNIT.sub("\N{NO-BREAK SPACE}", text)


def wrapped(text: str, width: int, indent: str = "") -> list[str]:
    """Lines of at most `width` characters, broken between words and not between a number and its unit; a longer word stays whole.

    Args:
        text: one paragraph.
        width: characters.
        indent: what lines after the first begin with.
    """
    # Only the blanks that were bound here come back: textwrap breaks at ASCII white space alone.
    lines = textwrap.wrap(bound(text), width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


def can(text: str, encoding: str) -> bool:
    """The encoding has every character of the text."""
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _escaped(char: str) -> str:
    return " " if char.isspace() else char.encode("unicode_escape").decode("ascii")
