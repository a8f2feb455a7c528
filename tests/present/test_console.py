"""What the console says about an alert, and when it says nothing."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from gradwatch.present.console import ConsoleSink
from gradwatch.records import Origin, Severity
from tests.present.runs import alert

LAYERS = ("encoder.layers.0", "encoder.layers.1", "encoder.layers.2", "encoder.layers.3")


def sink_at(width: int = 80, encoding: str = "utf-8") -> tuple[ConsoleSink, io.TextIOWrapper]:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    return ConsoleSink(Console(file=file, width=width)), file


def printed(file: io.TextIOWrapper) -> list[str]:
    file.flush()
    buffer = file.buffer
    assert isinstance(buffer, io.BytesIO)
    lines = buffer.getvalue().decode(file.encoding).splitlines()
    buffer.seek(0)
    buffer.truncate()
    return lines


@pytest.fixture(autouse=True)
def single_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)


# -- the two lines -----------------------------------------------------------------------------------------------------------------


def test_an_alert_is_two_lines_what_where_when_and_numbers_then_why_and_what_to_try() -> None:
    sink, file = sink_at(200)
    sink(alert(layers=LAYERS, step=0))
    assert printed(file) == [
        "▲ gradwatch since step 0: vanishing gradient in encoder.layers.0, encoder.layers.1 and 2 more: "
        "gradient norm 3.1e-9 against 0.12 at the output",
        "  Why: each sigmoid passes on at most a quarter of the gradient. Try: use ReLU or GELU in its place.",
    ]


def test_at_80_columns_lines_break_between_words_with_a_hanging_indent() -> None:
    sink, file = sink_at(80)
    long = "encoder.layers.11.attention.self.query_key_value_projection.in_proj.with.a.name.longer.than.the.terminal"
    sink(alert(layers=(*LAYERS, "z"), message="word " * 40 + "7", cause="because " * 30, remedy="try this " * 20))
    sink(alert("exploding_gradient", layers=(long,), message="norm 3", step=7))
    lines = printed(file)
    assert [line for line in lines if len(line) > 80] == [f"  {long}:"], "only a name longer than the line may stick out"
    assert sum(not line.startswith("  ") for line in lines) == 2
    assert all(line == line.rstrip() for line in lines)
    assert sum(line.startswith("  Try: ") for line in lines) == 2


@pytest.mark.parametrize(
    ("rule", "last_step", "when"),
    [("gradient_spike", 7, "at step 7"), ("dead_units", 12, "since step 7"), ("never_stepped", 7, "since step 7")],
)
def test_a_single_update_is_at_a_step_and_what_lasts_is_since_one(rule: str, last_step: int, when: str) -> None:
    sink, file = sink_at(200)
    sink(alert(rule, step=7, last_step=last_step))
    assert printed(file)[0].startswith(f"▲ gradwatch {when}: ")


@pytest.mark.parametrize("name", ["attention[q]", "[bold]head[/bold]", "[/b]", "block:smile:", "w\\[0]"])
def test_names_with_brackets_or_markup_are_printed_as_they_are(name: str) -> None:
    sink, file = sink_at(200)
    sink(alert(layers=(name,), cause=f"{name} is to blame"))
    first, second = printed(file)
    assert f"in {name}:" in first
    assert f"{name} is to blame" in second


def test_control_characters_in_a_name_do_not_reach_the_terminal() -> None:
    sink, file = sink_at(200)
    sink(alert(layers=("a\x1b[2Jb\nc",)))
    lines = printed(file)
    assert len(lines) == 2
    assert "a\\x1b[2Jb c" in lines[0]


def test_a_place_that_the_message_names_is_not_said_twice() -> None:
    sink, file = sink_at(200)
    sink(alert(layers=("fc1",), message="fc1 gets 3e-9 of the gradient"))
    assert printed(file)[0].endswith("vanishing gradient: fc1 gets 3.0e-9 of the gradient")
    sink(alert(layers=("fc1",), message="fc12 gets 3e-9 of the gradient", step=3, rule="poor_init"))
    assert " in fc1: " in printed(file)[0]


def test_bare_numbers_of_a_sequential_are_called_layers_and_the_root_the_model() -> None:
    sink, file = sink_at(200)
    sink(alert(layers=("0", "2"), message="norm 3.1e-9 in 0"))
    assert " in layers 0 and 2: " in printed(file)[0]
    sink(alert("poor_init", layers=("",)))
    assert " in the model: " in printed(file)[0]


def test_a_message_without_numbers_gets_the_first_two_of_the_evidence() -> None:
    sink, file = sink_at(200)
    sink(
        alert(
            "my_rule", layers=("conv1",), message="conv1 looks odd", evidence={"grad_norm": 3.14159e-9, "peers": 812.3, "third": 1}
        )
    )
    assert printed(file)[0] == "▲ gradwatch since step 0: my rule: conv1 looks odd (grad norm 3.1e-9, peers 812)"
    sink(alert("bare", layers=(), message="", evidence={}, cause="", remedy=""))
    assert printed(file) == ["▲ gradwatch since step 0: bare"]


def test_the_birthplace_of_a_nan_is_told_unless_the_cause_names_it() -> None:
    sink, file = sink_at(300)
    origin = Origin("encoder.0", "aten::sqrt", "backward", "train.py:31")
    sink(alert("non_finite_gradient", severity=Severity.ERROR, step=57, last_step=57, cause="the root of 0", origin=origin))
    first, second = printed(file)
    assert first.startswith("✗ gradwatch at step 57: NaN or Inf in the gradient")
    assert "Born in aten::sqrt in the backward pass of encoder.0, train.py:31." in second
    sink(alert("non_finite_loss", cause="sqrt at train.py:31 has an infinite derivative at 0", origin=origin))
    assert "Born" not in printed(file)[1]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_number_and_its_unit_are_not_parted_by_the_end_of_a_line(encoding: str) -> None:
    for width in range(30, 60):
        sink, file = sink_at(width, encoding)
        sink.print_lines(["✓ gradwatch: healthy after 500 updates; cost 1.5 ms an update, 0.6 %"])
        lines = printed(file)
        assert any("1.5 ms" in line for line in lines)
        assert any("0.6 %" in line for line in lines)
        assert max(map(len, lines)) <= width


# -- when it speaks ----------------------------------------------------------------------------------------------------------------


def test_info_is_never_printed() -> None:
    sink, file = sink_at()
    sink(alert(severity=Severity.INFO))
    sink(alert(severity=Severity.INFO, state="ended"))
    assert printed(file) == []


def test_an_incident_is_told_once_and_then_only_if_it_grows_worse_or_ends() -> None:
    sink, file = sink_at(200)
    opened = alert(layers=("a", "b"))
    sink(opened)
    assert len(printed(file)) == 2
    sink(replace(opened, layers=("b", "c"), count=20, last_step=20))
    assert printed(file) == []
    sink(replace(opened, layers=("c",), severity=Severity.ERROR, last_step=30))
    (line,) = printed(file)
    assert line.startswith("✗ gradwatch at step 30: vanishing gradient in c is now an error, a warning since step 0: ")
    sink(replace(opened, layers=("c",), severity=Severity.ERROR, count=25, last_step=40, state="ended"))
    assert printed(file) == ["✓ gradwatch ended: vanishing gradient in c, seen in 25 updates from step 0 to 40"]


def test_an_incident_that_rises_from_info_is_told_in_full() -> None:
    sink, file = sink_at(200)
    sink(alert(severity=Severity.INFO))
    sink(alert(severity=Severity.WARNING))
    assert len(printed(file)) == 2


def test_two_incidents_of_one_rule_are_both_told_and_ended_under_their_own_names() -> None:
    sink, file = sink_at(200)
    sink(alert(layers=("encoder",)))
    sink(alert(layers=("decoder",), cause="another"))
    assert len(printed(file)) == 4
    sink(alert(layers=("encoder",), state="ended"))
    assert " in encoder, " in printed(file)[0]
    sink(alert(layers=("decoder",), state="ended"))
    assert " in decoder, " in printed(file)[0]


def test_a_parent_that_takes_the_place_of_its_children_is_the_same_incident() -> None:
    sink, file = sink_at(200)
    sink(alert(layers=("block.a", "block.b")))
    printed(file)
    sink(alert(layers=("block",)))
    assert printed(file) == []


def test_the_end_of_a_single_spike_is_no_news() -> None:
    sink, file = sink_at()
    spike = alert("gradient_spike", step=57, last_step=57, count=1)
    sink(spike)
    assert printed(file)
    sink(replace(spike, state="ended"))
    assert printed(file) == []


def test_a_cause_found_later_is_told() -> None:
    sink, file = sink_at(200)
    unknown = alert("non_finite_gradient", cause="", remedy="")
    sink(unknown)
    assert len(printed(file)) == 1
    sink(replace(unknown, cause="a log of zero"))
    assert printed(file) == ["▲ gradwatch since step 0: NaN or Inf in the gradient, cause found: a log of zero."]


def test_the_same_explanation_is_not_given_twice() -> None:
    sink, file = sink_at(200)
    sink(alert("gradient_spike", step=5, last_step=5, state="ended"))
    sink(alert("gradient_spike", step=90, last_step=90, state="ended"))
    lines = printed(file)
    assert len(lines) == 3
    assert lines[2].endswith("(why and what to try: as before)")


def test_a_rule_that_fires_for_ever_does_not_bury_the_output() -> None:
    sink, file = sink_at(200)
    for step in range(2000):
        sink(alert("gradient_spike", step=step, last_step=step))
        sink(alert("gradient_spike", step=step, last_step=step, state="ended"))
    lines = printed(file)
    assert 4 < len(lines) < 20
    assert "1024th time, the others are in watch.alerts" in lines[-1]
    assert not sink._going_on


def test_an_incident_that_was_over_before_it_was_told_is_told() -> None:
    sink, file = sink_at(200)
    sink(alert(state="ended"))
    assert len(printed(file)) == 2


# -- encodings, pipes, colours -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "cp437", "utf-8"])
def test_only_what_the_encoding_has_is_printed(encoding: str) -> None:
    sink, file = sink_at(200, encoding)
    sink(alert(layers=("слой",), message="‖g‖ ×3.1 ≥ 2 … é"))
    sink.print_lines(["✓ gradwatch: healthy, gradient norms within ×7.3"])
    first, _, last = printed(file)
    if encoding == "ascii":
        assert first.startswith("! gradwatch since step 0: ")
        assert first.endswith("||g|| x3.1 >= 2 ... \\xe9")
        assert "\\u0441" in first
        assert last == "+ gradwatch: healthy, gradient norms within x7.3"
    if encoding in ("latin-1", "utf-8"):
        assert "×7.3" in last
    if encoding == "utf-8":
        assert first.startswith("▲ ")
        assert "in слой: ‖g‖ ×3.1 ≥ 2 … é" in first


def test_marks_differ_by_severity_without_colour_and_in_ascii() -> None:
    sink, file = sink_at(200, "ascii")
    warning, error = alert(layers=("a",)), alert(layers=("b",), severity=Severity.ERROR)
    sink(warning)
    sink(error)
    sink(replace(warning, state="ended"))
    marks = [line[0] for line in printed(file) if not line.startswith(" ")]
    assert marks == ["!", "X", "+"]


def test_into_a_pipe_each_line_goes_whole_without_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    ConsoleSink()(alert(layers=LAYERS, message="word " * 60 + "7"))
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 2
    assert "\x1b" not in err


def test_into_a_pipe_lines_are_wrapped_if_columns_asks_for_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    ConsoleSink()(alert(layers=LAYERS))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 2
    assert max(map(len, lines)) <= 60


def test_stderr_is_looked_up_at_every_print(monkeypatch: pytest.MonkeyPatch) -> None:
    sink = ConsoleSink()
    for name in ("a", "b"):
        file = io.StringIO()
        monkeypatch.setattr(sys, "stderr", file)
        sink(alert(layers=(name,), cause=name))
        assert f"in {name}:" in file.getvalue()


def test_a_stderr_that_can_only_write_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=written.append))
    ConsoleSink()(alert())
    assert "".join(written).startswith("▲ gradwatch since step 0: vanishing gradient")


def test_without_a_stderr_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    ConsoleSink()(alert())


@pytest.mark.parametrize("no_color", [False, True], ids=["colour", "NO_COLOR"])
def test_colour_goes_where_it_is_unwanted(no_color: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    file = io.StringIO()
    ConsoleSink(Console(file=file, force_terminal=True, width=100))(alert())
    coloured = re.search(r"\x1b\[[0-9;]*3[0-7]", file.getvalue()) is not None
    assert coloured is not no_color
    assert re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue()).startswith("▲ gradwatch since step 0: vanishing gradient")


# -- ranks and failures ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "speaks"), [("0", True), ("", True), ("1", False), ("17", False)])
def test_only_rank_zero_speaks(rank: str, speaks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", rank)
    sink, file = sink_at()
    sink(alert())
    sink.print_lines(["verdict"])
    assert bool(printed(file)) is speaks


@pytest.mark.parametrize(("rank", "speaks"), [(0, True), (3, False)])
def test_an_initialised_process_group_tells_the_rank(rank: int, speaks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    group = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: True, get_rank=lambda: rank)
    monkeypatch.setitem(sys.modules, "torch.distributed", group)
    sink, file = sink_at()
    sink(alert())
    assert bool(printed(file)) is speaks


class _Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError("reader has gone")


def test_a_broken_pipe_is_an_exception_not_an_exit_and_leaves_stdout_alone() -> None:
    console = Console(file=_Broken())
    before = os.fstat(1)
    with pytest.raises(BrokenPipeError):
        ConsoleSink(console)(alert())
    assert os.fstat(1)[:3] == before[:3]
    assert "on_broken_pipe" not in vars(console)


def test_a_training_goes_on_when_the_reader_of_stderr_has_gone() -> None:
    script = """
        import os, sys
        reader, writer = os.pipe()
        os.dup2(writer, 2)
        os.close(reader)
        from gradwatch.present.console import ConsoleSink
        from tests.present.runs import alert
        try:
            ConsoleSink()(alert())
        except Exception as error:
            print(type(error).__name__)
        print("trained on", flush=True)
        os._exit(0)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "80"},
        cwd=Path(__file__).parents[2],
    )
    assert run.stdout.split("\n")[:2] == ["BrokenPipeError", "trained on"]
    assert run.returncode == 0


def test_a_closed_stderr_is_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    file.close()
    monkeypatch.setattr(sys, "stderr", file)
    with pytest.raises(ValueError, match="closed"):
        ConsoleSink()(alert())
