"""What a terminal shows in the end, when an alert is printed beside `print`, tqdm and rich: a script under a pseudo-terminal, its
output drawn by a terminal emulator."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import struct
import subprocess
import sys
import termios
import textwrap
from pathlib import Path

import pytest

pyte = pytest.importorskip("pyte", reason="the terminal emulator pyte is not installed")

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")

PREPARE = """
    import sys
    from gradwatch.present.console import ConsoleSink
    from tests.present.runs import alert
    sink = ConsoleSink()
"""


def output_of(script: str, *, columns: int = 80, **environment: str) -> bytes:
    """Everything the script writes to a pseudo-terminal that is its stdin, stdout and stderr."""
    leader, follower = os.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    unwanted = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "RANK", "TTY_COMPATIBLE", "PYTHONWARNINGS")
    kept = {name: value for name, value in os.environ.items() if name not in unwanted}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PREPARE) + textwrap.dedent(script)],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        cwd=Path(__file__).parents[2],
        env={**kept, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8", **environment},
    )
    os.close(follower)
    output = b""
    while True:
        try:
            block = os.read(leader, 65536)
        except OSError as error:
            if error.errno != errno.EIO:  # what Linux says when the last writer has gone
                raise
            break
        if not block:
            break
        output += block
    os.close(leader)
    assert process.wait() == 0, output.decode()
    return output


def screen_of(script: str, **options: object) -> list[str]:
    """The lines on the screen when the script has ended, those below the last text left out."""
    screen = pyte.Screen(int(str(options.get("columns", 80))), 30)
    pyte.ByteStream(screen).feed(output_of(script, **options))  # type: ignore[arg-type]
    lines = [line.rstrip() for line in screen.display]
    while lines and not lines[-1]:
        lines.pop()
    return lines


ALERT = [
    "▲ gradwatch since step 0: vanishing gradient in layers.0: gradient norm 3.1e-9",
    "  against 0.12 at the output",
    "  Why: each sigmoid passes on at most a quarter of the gradient.",
    "  Try: use ReLU or GELU in its place.",
]


def test_beside_plain_prints() -> None:
    assert screen_of('print("step 1"); sink(alert()); print("step 2")') == ["step 1", *ALERT, "step 2"]


def test_a_line_that_was_begun_is_left_whole() -> None:
    assert screen_of('print("step 1 loss", end=" "); sink(alert()); print("0.3")') == ["step 1 loss", *ALERT, "0.3"]


@pytest.mark.parametrize("begun", ["x", "x" * 79, "x" * 80])
def test_a_line_that_was_begun_is_left_whole_at_any_length(begun: str) -> None:
    assert screen_of(f'print({begun!r}, end=""); sink(alert())') == [begun, *ALERT]


def test_a_progress_line_that_is_overwritten_leaves_no_remains() -> None:
    written = "step 1 " + "loss 0.12 " * 7  # longer than the row that comes upon it
    script = f'print({written!r}, end="\\r"); sink(alert(message="7", cause="", remedy="")); print("step 2", end="\\r")'
    assert screen_of(script) == ["▲ gradwatch since step 0: vanishing gradient in layers.0: 7", "step 2"]


def test_a_tqdm_bar_stays_one_line_below() -> None:
    lines = screen_of("""
        from tqdm import tqdm
        for i in tqdm(range(5), ascii=True, ncols=60, mininterval=0):
            if i == 2:
                sink(alert())
    """)
    assert lines[:-1] == ALERT
    assert re.match(r"100%\|#+\| 5/5 ", lines[-1])


def test_nested_tqdm_bars_stay_below() -> None:
    lines = screen_of("""
        from tqdm import tqdm
        for epoch in tqdm(range(2), ascii=True, ncols=60, mininterval=0, desc="epoch"):
            for i in tqdm(range(3), ascii=True, ncols=60, mininterval=0, desc="batch", leave=False):
                if epoch == 1 and i == 1:
                    sink(alert())
    """)
    assert lines[:4] == ALERT
    assert lines[4].startswith("epoch: 100%")
    assert len(lines) == 5


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_rich_progress_bar_stays_one_line_below(stream: str) -> None:
    lines = screen_of(f"""
        from rich.console import Console
        from rich.progress import Progress
        with Progress(console=Console(stderr={stream == "stderr"}), auto_refresh=False) as progress:
            task = progress.add_task("training", total=5)
            for i in range(5):
                if i == 2:
                    sink(alert())
                progress.update(task, advance=1, refresh=True)
    """)
    assert lines[:-1] == ALERT
    assert lines[-1].startswith("training ")
    assert "100%" in lines[-1]


def test_the_console_of_a_rich_progress_bar_may_be_handed_over() -> None:
    lines = screen_of("""
        from rich.progress import Progress
        with Progress(auto_refresh=False) as progress:
            task = progress.add_task("training", total=5)
            sink = ConsoleSink(progress.console)
            for i in range(5):
                if i == 2:
                    sink(alert())
                progress.update(task, advance=1, refresh=True)
    """)
    assert lines[:-1] == ALERT
    assert lines[-1].startswith("training ")


def test_at_40_columns_nothing_runs_over_the_edge() -> None:
    lines = screen_of("sink(alert())", columns=40)
    assert lines[0] == "▲ gradwatch since step 0: vanishing"
    assert all(line.startswith("  ") for line in lines[1:])
    assert " ".join(line.strip() for line in lines) == " ".join(line.strip() for line in ALERT)


def test_no_color_takes_the_colours_and_nothing_else() -> None:
    coloured, plain = output_of("sink(alert())"), output_of("sink(alert())", NO_COLOR="1")
    colour = rb"\x1b\[[0-9;]*3[0-7][0-9;]*m"
    assert re.search(colour, coloured)
    assert not re.search(colour, plain)
    escapes = rb"\x1b\[[0-9;]*m"
    assert re.sub(escapes, b"", coloured) == re.sub(escapes, b"", plain)


def test_a_dumb_terminal_gets_no_escapes() -> None:
    output = output_of('print("step 1"); sink(alert())', TERM="dumb")
    assert b"\x1b" not in output
    assert output.decode().split("\r\n")[:-1] == ["step 1", *ALERT]


def test_in_ascii_the_marks_are_ascii() -> None:
    output = output_of("sink(alert())", PYTHONIOENCODING="ascii")
    assert output.isascii()
    assert (
        re.sub(rb"\x1b\[[0-9;]*m", b"", output)
        .splitlines()[1]
        .endswith(b"! gradwatch since step 0: vanishing gradient in layers.0: gradient norm 3.1e-9")
    )
