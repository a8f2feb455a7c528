"""`gradwatch demo`: networks that learn Python's own source code, or do not, and what the watch says about it.

Nothing in here is arranged beyond the networks themselves: the watch has its default rules, and every number is measured as it runs.
"""

from __future__ import annotations

import math
import sysconfig
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor, nn
from torch.nn import functional as F

from gradwatch.present import words
from gradwatch.present.picture import fall
from gradwatch.records import Alert, Severity
from gradwatch.watch import GradWatch

MODULES = ("argparse", "ast", "dataclasses", "inspect", "subprocess", "tarfile", "typing")
"""Modules of the standard library that are read: well-known ones of some size, 0.6 million characters in all."""

CONTEXT = 16
"""Characters that a network sees before the one it guesses."""

ALPHABET = 128
"""ASCII; anything else counts as one more character."""

WIDTH, DEPTH = 128, 10
BATCH, LR, UPDATES = 128, 2e-3, 500
TOO_LARGE = 0.28
"""Standard deviation of the weights that are too large. He initialisation has 0.125 at this width: each layer enlarges 2.2 times. At 0.3
one clipped run in six fell into a hole, which one depending on the processor; at 0.28 none of five did (measured)."""


def demo(case: str | None = None, *, seed: int = 0, console: Console | None = None) -> int:
    """Show it.

    Args:
        case: a key of `CASES`; None: all of them.
        seed: of the initial weights and the order of the batches.
        console: where; None: stdout.

    Returns:
        The exit code: 1 where this Python came without the source text of its standard library.
    """
    page = _Page(console or Console())
    text = source_text()
    if not text:
        page.say(f"gradwatch demo: there is no source text of the standard library in {_library()}; this Python came without it.")
        return 1
    began = time.perf_counter()
    with _one_thread():
        lesson = Lesson(text, seed)
        page.say(
            f"Small networks learn to guess the next character of Python's own source code: {len(text):,} characters of the standard "
            f"library, from this machine. Their loss is in nats a character. To guess by how often each character occurs, blind to the "
            f"text before it, costs {lesson.blind:.2f}: this is the number to beat."
        )
        page.say(
            "Each training stands in `with GradWatch(model):` and is a plain loop otherwise. What begins with a mark "
            f"({words.WARNING} {words.ERROR} {words.GOOD}) is the watch speaking."
        )
        for name in CASES if case is None else (case,):
            CASES[name](page, lesson)
    page.head("In your own loop")
    page.code("from gradwatch import GradWatch\n\nwith GradWatch(model):\n    ...  # the loop, as it is")
    page.say(
        f"This took {time.perf_counter() - began:.0f} s, and every number above was measured in it. The cost of the watch is a large share "
        f"here because one update of networks this small takes only {words.duration(lesson.update_time)}."
    )
    return 0


# -- what is learnt ----------------------------------------------------------------------------------------------------------------


def source_text() -> str:
    """The text of `MODULES`, or of whatever else is there; "" if nothing is."""
    files = [path for name in MODULES if (path := _library() / f"{name}.py").is_file()] or sorted(_library().glob("*.py"))[:20]
    return "".join(path.read_text(encoding="utf-8") for path in files)


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


class Lesson:
    """The text as batches of contexts and the character that follows each.

    Args:
        text: what is read.
        seed: of the order of the batches.

    Attributes:
        blind: loss of guessing by the frequency of the characters, nats a character.
        update_time: seconds that an update of the last training took, the watch included; median.
    """

    def __init__(self, text: str, seed: int) -> None:
        self.seed = seed
        self.update_time = math.nan
        self._codes = torch.tensor([min(ord(char), ALPHABET - 1) for char in text])
        share = torch.bincount(self._codes).double() / len(self._codes)
        share = share[share > 0]
        self.blind = float(-(share * share.log()).sum())

    def batches(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """`count` batches of contexts `[BATCH, CONTEXT]` and next characters `[BATCH]`, the same ones at every call."""
        generator = torch.Generator().manual_seed(self.seed)
        reach = torch.arange(CONTEXT + 1)
        for _ in range(count):
            start = torch.randint(len(self._codes) - CONTEXT, (BATCH, 1), generator=generator)
            window = self._codes[start + reach]
            yield window[:, :-1], window[:, -1]


def network(activation: Callable[[], nn.Module], seed: int, std: float | None = None) -> nn.Sequential:
    """Ten layers between an embedding and a head, initialised as PyTorch does.

    Args:
        activation: makes what follows each layer.
        seed: of the weights.
        std: standard deviation of the ten layers' weights, in place of PyTorch's initialisation.
    """
    torch.manual_seed(seed)
    layers: OrderedDict[str, nn.Module] = OrderedDict(embed=nn.Embedding(ALPHABET, 16), flatten=nn.Flatten())
    for i in range(1, DEPTH + 1):
        linear = nn.Linear(16 * CONTEXT if i == 1 else WIDTH, WIDTH)
        if std is not None:
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)
        layers[f"linear{i}"] = linear
        layers[f"act{i}"] = activation()
    layers["head"] = nn.Linear(WIDTH, ALPHABET)
    return nn.Sequential(layers)


class Contrast(nn.Module):
    """Brings what is embedded of each context to mean 0 and standard deviation 1 over its characters; what does not vary stays as it is."""

    def forward(self, x: Tensor) -> Tensor:
        """`[BATCH, CONTEXT, features]` to the same shape."""
        x = x - x.mean(1, keepdim=True)
        var = x.square().mean(1, keepdim=True)
        std = torch.where(var > 0, var.sqrt(), 1.0)
        return x / std


class MendedContrast(nn.Module):
    """The same, with the line mended as the watch proposes."""

    def forward(self, x: Tensor) -> Tensor:
        """`[BATCH, CONTEXT, features]` to the same shape."""
        x = x - x.mean(1, keepdim=True)
        var = x.square().mean(1, keepdim=True)
        std = torch.where(var > 0, torch.where(var > 0, var, 1.0).sqrt(), 1.0)
        return x / std


def normalised(contrast: nn.Module, seed: int) -> nn.Sequential:
    """A network of two layers behind an embedding that is normalised by `contrast`."""
    torch.manual_seed(seed)
    return nn.Sequential(
        OrderedDict(
            embed=nn.Embedding(ALPHABET, 16),
            contrast=contrast,
            flatten=nn.Flatten(),
            linear1=nn.Linear(16 * CONTEXT, WIDTH),
            act1=nn.ReLU(),
            linear2=nn.Linear(WIDTH, WIDTH),
            act2=nn.ReLU(),
            head=nn.Linear(WIDTH, ALPHABET),
        )
    )


@dataclass
class Run:
    """A training and what came of it.

    Attributes:
        watch: the watch that was on it.
        alarms: what it found, with the number of updates that were done when it said so.
    """

    watch: GradWatch
    alarms: list[tuple[Alert, int]] = field(default_factory=list)

    @property
    def first_loss(self) -> float:
        return float(self.watch.history.stat("loss")[0])

    @property
    def last_loss(self) -> float:
        """Mean over the last 20 updates."""
        return float(self.watch.history.stat("loss")[-20:].mean())

    @property
    def first_norm(self) -> float:
        return float(self.watch.history.stat("total_norm")[0])


def train(model: nn.Module, lesson: Lesson, console: Console, *, clip: float | None = None) -> Run:
    """The usual loop, watched with default options."""
    alarms: list[tuple[Alert, int]] = []

    def note(alert: Alert) -> None:
        if alert.severity >= Severity.WARNING and alert.state == "open":
            alarms.append((alert, watch.history.recorded))

    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    with GradWatch(model, clip=clip, on_alert=note, console=console) as watch:
        for context, following in lesson.batches(UPDATES):
            optimizer.zero_grad()
            F.cross_entropy(model(context), following).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    lesson.update_time = float(np.median(np.diff(watch.history.stat("time"))))
    return Run(watch, alarms)


# -- what is shown -----------------------------------------------------------------------------------------------------------------


def vanishing(page: _Page, lesson: Lesson) -> None:
    """A network that does not learn, and the same one with the remedy."""
    page.head("Ten layers with a sigmoid after each")
    sick = train(network(nn.Sigmoid, lesson.seed), lesson, page.console)
    page.say(f"{_course(sick, lesson)} {_told(sick)}")
    page.say("The way of its gradient until the watch spoke, from the loss above to the input below:")
    page.picture(sick)
    page.head("The remedy it named: ReLU in place of the sigmoids, all else the same")
    well = train(network(nn.ReLU, lesson.seed), lesson, page.console)
    page.say(f"{_course(well, lesson)} {_told(well)}")


def exploding(page: _Page, lesson: Lesson) -> None:
    """Weights that are too large, without and with clipping."""
    he = math.sqrt(2 / WIDTH)
    page.head(f"With ReLU again, but with weights that start {TOO_LARGE / he:.1f} times too large")
    bare = train(network(nn.ReLU, lesson.seed, TOO_LARGE), lesson, page.console)
    page.say(f"{_course(bare, lesson)} The first gradient had a norm of {words.number(bare.first_norm)}. {_told(bare)}")
    page.say("The way of its gradient until the watch spoke:")
    page.picture(bare, outputs=True)
    page.head("The same, with GradWatch(model, clip=1.0)")
    clipped = train(network(nn.ReLU, lesson.seed, TOO_LARGE), lesson, page.console, clip=1.0)
    coef = clipped.watch.history.stat("clip_coef")
    page.say(
        f"{_course(clipped, lesson)} Unclipped it was {words.number(bare.last_loss)}. The gradient was scaled down in "
        f"{int((coef < 1).sum())} of {UPDATES} updates, the first one to {words.number(float(coef[0]))} of itself: clipping makes the "
        f"steps usable, not the weights good. {_told(clipped)}"
    )


def silent_nan(page: _Page, lesson: Lesson) -> None:
    """A derivative that is NaN though every value and the loss are finite, and the same network with the line mended."""
    page.head("A network whose embedding is normalised, where it varies")
    page.say(
        "Contexts of sixteen spaces do not vary. For them `torch.where` takes 1 in place of the root of 0, so that every value is finite, "
        "and so is the loss. The derivative of the root is not:",
        gap=False,
    )
    page.gap()
    sick = train(normalised(Contrast(), lesson.seed), lesson, page.console)
    losses = sick.watch.history.stat("loss")
    lost = int(np.append(~np.isfinite(losses), True).argmax())
    step, bad = (sick.alarms[0][0].step, list(sick.alarms[0][0].parameters)) if sick.alarms else (0, [])
    page.say(
        f"In update {step} the loss was {words.number(float(losses[step]))}, and the gradient NaN in "
        f"{words.listed(bad) or 'no weight'}: the step made NaN of these weights, and every loss from update {lost} on is NaN. {_told(sick)}"
    )
    page.head("The line mended as it proposed, all else the same")
    well = train(normalised(MendedContrast(), lesson.seed), lesson, page.console)
    page.say(f"{_course(well, lesson)} {_told(well)}")


CASES: dict[str, Callable[[_Page, Lesson], None]] = {"vanishing": vanishing, "exploding": exploding, "silent-nan": silent_nan}


def _course(run: Run, lesson: Lesson) -> str:
    last, blind = run.last_loss, lesson.blind
    if not math.isfinite(last):
        verdict = "it was lost to overflow"
    elif last > 1.02 * blind:
        verdict = f"worse than guessing blindly, which costs {blind:.2f}"
    elif last > 0.98 * blind:
        verdict = f"what guessing blindly costs ({blind:.2f}), so it has learnt nothing from its input"
    else:
        verdict = f"below the {blind:.2f} of guessing blindly, so it learns"
    return f"Loss {words.number(run.first_loss)} at the start, {words.number(last)} after {UPDATES} updates: {verdict}."


def _told(run: Run) -> str:
    if not run.alarms:
        return "The watch had nothing to say but its verdict."
    over = all(alert.state == "ended" for alert in run.watch.alerts if alert.severity >= Severity.WARNING)
    return f"The watch told of it at update {run.alarms[0][1]} of {UPDATES}{', and when it was over' if over else ''}."


class _Page:
    """Paragraphs, headings and pictures on a console, in what its encoding can show."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._parts = 0

    def head(self, title: str) -> None:
        self._parts += 1
        self._print(Text(f"\n{self._parts}. {title}\n", "bold"))

    def say(self, paragraph: str, *, gap: bool = True) -> None:
        lines = words.wrapped(paragraph, self.console.width)
        self._print(Text("\n".join(["", *lines] if gap else lines)))

    def gap(self) -> None:
        self._print(Text(""))

    def code(self, source: str) -> None:
        self._print(Text("\n".join(f"    {line}".rstrip() for line in source.splitlines())))

    def picture(self, run: Run, outputs: bool = False) -> None:
        """The gradient in the updates after which the watch spoke first; where it never did, in the last ones."""
        plain = not words.can("█▏", self.console.encoding)
        until = run.alarms[0][1] if run.alarms else None
        width = min(78, self.console.width)
        self.console.print()
        self.console.print(fall(run.watch.history, until=until, outputs=outputs, width=width, ascii_only=plain), highlight=False)

    def _print(self, text: Text) -> None:
        fitted = "\n".join(words.fit(line, self.console.encoding) for line in text.plain.split("\n"))
        self.console.print(Text(fitted, text.style), highlight=False, soft_wrap=True)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Networks this small are trained fastest by one thread. The random state is given back as it was."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)
