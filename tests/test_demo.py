"""`gradwatch demo`, run as a newcomer runs it, and read as one reads it."""

from __future__ import annotations

import inspect
import io
import os
import re
import subprocess
import sys
import sysconfig
from collections import Counter
from dataclasses import dataclass
from math import log
from pathlib import Path

import pytest
import torch
from rich.console import Console

from gradwatch import demo
from gradwatch.__main__ import DEMO_CASES, main

SECONDS = 60.0
"""CPU time that all of it may take."""


@dataclass(frozen=True)
class Shown:
    """What a run of the demo printed.

    Attributes:
        text: its standard output.
        parts: the same, cut at its numbered headings; the introduction first.
        seconds: CPU time it took.
    """

    text: str
    parts: tuple[str, ...]
    seconds: float


def show(*args: str, encoding: str = "utf-8") -> Shown:
    env = {key: value for key, value in os.environ.items() if key not in ("FORCE_COLOR", "RANK")}
    env |= {"PYTHONIOENCODING": encoding, "COLUMNS": "80"}
    before = os.times()
    command = [sys.executable, "-W", "error", "-m", "gradwatch", "demo", *args]
    result = subprocess.run(command, capture_output=True, text=True, encoding=encoding, env=env, check=False, timeout=400)
    after = os.times()
    assert (result.returncode, result.stderr) == (0, "")
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    return Shown(result.stdout, tuple(re.split(r"(?m)^\d\. ", result.stdout)), seconds)


@pytest.fixture(scope="module")
def shown() -> Shown:
    return show()


def flat(text: str) -> str:
    return " ".join(text.split())


def losses(part: str) -> tuple[float, float]:
    match = re.search(r"Loss (\S+) at the start, (\S+) after \d+ updates", flat(part))
    assert match is not None, part
    return float(match[1]), float(match[2])


def blind() -> float:
    """The entropy of the characters of the text, in plain Python."""
    library = Path(sysconfig.get_path("stdlib"))
    text = "".join((library / f"{name}.py").read_text(encoding="utf-8") for name in demo.MODULES)
    counts = Counter(char if char.isascii() else "\x7f" for char in text)
    return -sum(count / len(text) * log(count / len(text)) for count in counts.values())


def test_the_number_to_beat_is_that_of_guessing_by_frequency(shown: Shown) -> None:
    assert f"costs {blind():.2f}: this is the number to beat" in flat(shown.parts[0])


def test_the_sigmoid_network_learns_nothing_and_the_watch_says_why_within_the_first_updates(shown: Shown) -> None:
    part = flat(shown.parts[1])
    _, last = losses(part)
    assert last == pytest.approx(blind(), rel=0.02)
    assert "so it has learnt nothing from its input" in part
    assert part.count("▲ gradwatch since step 0: vanishing gradient in embed, linear1") == 1
    assert re.search(r"Why: 10 Sigmoids pass on ×0\.2\d each, 11 Linears ×0\.\d+: \S+ → \S+e-\d+\.", part)
    assert re.search(r"Try: .*ReLU", part)
    told = re.search(r"told of it at update (\d+) of 500", part)
    assert told is not None
    assert int(told[1]) <= 15


LAYERS = ["head", *(f"linear{i}" for i in range(10, 0, -1)), "embed"]


def picture(part: str) -> list[tuple[str, int, float, str, str]]:
    """The rows of the picture: name, length of the bar, number, gain of the layer, what is behind it."""
    rows = re.findall(r"(?m)^(?: loss| *|input) +(head|linear\d+|embed) +(█*[▏▎▍▌▋▊▉█]) +(\S+)(?: +(×\S+))?(?: +(\w+ ×.*))?$", part)
    return [(name, len(bar), float(number), gain, behind) for name, bar, number, gain, behind in rows]


def test_the_fall_is_drawn_layer_by_layer(shown: Shown) -> None:
    names, bars, norms, gains, behind = zip(*picture(shown.parts[1]), strict=True)
    assert list(names) == LAYERS
    assert list(norms) == sorted(norms, reverse=True)
    assert norms[0] > 1e6 * norms[-1]
    assert list(bars) == sorted(bars, reverse=True)
    assert all(re.fullmatch(r"×0\.[4-9]\d", gain) for gain in gains[:-1])
    assert all(re.fullmatch(r"Sigmoid ×0\.2[1-5]", told) for told in behind[1:-1]), "a sigmoid hands down a quarter at most"
    assert (gains[-1], behind[0], behind[-1]) == ("", "", ""), "nothing is known below the embedding, and no activation is there"


def test_the_rise_is_drawn_layer_by_layer(shown: Shown) -> None:
    names, bars, norms, gains, behind = zip(*picture(shown.parts[3]), strict=True)
    assert list(names) == LAYERS
    assert list(norms[1:]) == sorted(norms[1:])
    assert list(bars[1:]) == sorted(bars[1:])
    assert norms[-1] > 1000 * norms[0]
    for i in range(1, 10):
        passed = float(gains[i][1:]) * float(re.match(r"ReLU ×(0\.\d+)", behind[i + 1])[1])  # type: ignore[index]
        assert norms[i + 1] / norms[i] == pytest.approx(passed, rel=0.1), "the numbers explain the bars"


def test_with_the_remedy_it_learns_and_the_watch_is_silent(shown: Shown) -> None:
    part = flat(shown.parts[2])
    first, last = losses(part)
    assert last < 0.9 * blind() < first
    assert "✓ gradwatch: healthy after 500 updates" in part
    assert "nothing to say but its verdict" in part
    assert not re.search("[▲✗]", part)


def test_large_weights_explode_and_clipping_helps(shown: Shown) -> None:
    bare, clipped = flat(shown.parts[3]), flat(shown.parts[4])
    for part in (bare, clipped):
        assert part.count("✗ gradwatch since step 0: exploding gradient in embed, linear1") == 1
        assert re.search(r"Why: 11 Linears multiply it by ×\d(\.\d)? each, 10 ReLUs ×0\.\d+: \S+ → \d+\.", part)
        assert "vanishing" not in part
    assert losses(bare)[0] == losses(clipped)[0] > 1000
    assert losses(bare)[1] > blind() > losses(clipped)[1]
    assert f"Unclipped it was {losses(bare)[1]}." in clipped
    scaled = re.search(r"scaled down in (\d+) of 500 updates, the first one to (\S+) of itself", clipped)
    norm = re.search(r"first gradient had a norm of (\d+)\.", bare)
    assert scaled is not None
    assert norm is not None
    assert int(scaled[1]) >= 10
    assert float(scaled[2]) == pytest.approx(1 / float(norm[1]), rel=0.05)


def test_a_silent_nan_is_named_and_its_mend_mends(shown: Shown) -> None:
    sick, well = shown.parts[5], flat(shown.parts[6])
    line = next(number for number, text in enumerate(inspect.getsource(demo).splitlines(), 1) if "var.sqrt(), 1.0)" in text)
    assert f"The derivative of aten::sqrt in contrast at demo.py:{line}" in flat(sick)
    assert "NaN in embed.weight: the step made NaN of these weights, and every loss from update 1 on is NaN." in flat(sick)
    removed, added = (re.search(rf"^    {re.escape(mark)} (.+)$", sick, re.M) for mark in "-+")
    assert removed is not None
    assert added is not None
    assert removed[1] in inspect.getsource(demo.Contrast)
    assert added[1] in inspect.getsource(demo.MendedContrast), "what is shown next is what was proposed"
    assert inspect.getsource(demo.Contrast.forward).replace(removed[1], added[1]) == inspect.getsource(demo.MendedContrast.forward)
    first, last = losses(well)
    assert last < 0.9 * blind() < first
    assert "✓ gradwatch: healthy after 500 updates" in well


def test_it_fits_the_screen_and_the_minute(shown: Shown) -> None:
    lines = shown.text.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) < 180
    assert not any(line.endswith(" ") for line in lines)
    assert shown.seconds < SECONDS
    assert not re.search(r"\x1b|Traceback|\bnan\b|\binf\b", shown.text)
    assert not re.search(r"NaN|Inf\b", "".join(shown.parts[:5] + shown.parts[6:])), "but where it is about them"
    assert len(shown.parts) == 8


def test_one_case_alone_with_another_seed_in_ascii() -> None:
    part = show("--case", "exploding", "--seed", "1", encoding="ascii")
    assert len(part.parts) == 4
    assert "sigmoid" not in part.text
    assert "X gradwatch since step 0: exploding gradient" in part.text
    assert losses(part.parts[1])[1] > losses(part.parts[2])[1]


def test_the_help_names_the_cases(capsys: pytest.CaptureFixture[str]) -> None:
    assert tuple(demo.CASES) == DEMO_CASES
    with pytest.raises(SystemExit) as end:
        main(["demo", "--help"])
    assert end.value.code == 0
    assert "{vanishing,exploding,silent-nan}" in capsys.readouterr().out


def test_a_lesson_asks_for_the_character_that_follows() -> None:
    text = "".join(chr(32 + i % 90) for i in range(500))
    lesson = demo.Lesson(text, seed=3)
    batches = list(lesson.batches(2))
    again = list(lesson.batches(2))
    for (context, following), (same, _) in zip(batches, again, strict=True):
        assert torch.equal(context, same)
        for row, char in zip(context.tolist(), following.tolist(), strict=True):
            assert "".join(map(chr, [*row, char])) in text
    assert not torch.equal(batches[0][0], batches[1][0])
    assert lesson.blind == pytest.approx(log(90), abs=0.01)


def test_without_the_source_of_the_library_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    out = io.StringIO()
    assert demo.demo(console=Console(file=out, width=400)) == 1
    assert f"no source text of the standard library in {tmp_path}" in out.getvalue()


def test_it_leaves_threads_and_random_state_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "UPDATES", 2)
    torch.set_num_threads(2)
    try:
        state = torch.get_rng_state()
        assert demo.demo("vanishing", console=Console(file=io.StringIO())) == 0
        assert torch.get_num_threads() == 2
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        torch.set_num_threads(1)
