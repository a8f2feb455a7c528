"""The smallest mend of a line, as a diff; and none where it would be invented."""

from __future__ import annotations

import ast
import linecache
import math
from pathlib import Path
from typing import Any

import pytest

from gradwatch.investigate.mend import Culprit, line_of, mend, removal


def file_of(text: str) -> str:
    """A file that holds a function whose second line is the text."""
    name = f"<ipython-input-{abs(hash(text))}>"
    body = "\n".join("    " + line for line in text.splitlines())
    source = f"def f(x, p, mask, scores, n):\n{body}\n"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    return name


def mended(text: str, culprit: Culprit, line: int = 2) -> str:
    """What the line becomes; "" for nothing."""
    found = mend(file_of(text), line, culprit).diff
    if not found:
        return ""
    added = "\n".join(row[2:] for row in found.splitlines() if row.startswith("+ "))
    ast.parse(added.strip())
    return added


CASES = [
    ("return torch.log(p)", Culprit("log", low=0.0), "return torch.log(p.clamp_min(1e-8))"),
    ("return p.log()", Culprit("log", low=0.0), "return p.clamp_min(1e-8).log()"),
    ("return (p + 1).log().mean()", Culprit("log", low=0.0), "return (p + 1).clamp_min(1e-8).log().mean()"),
    ("loss = -torch.log(p - x).mean()", Culprit("log", low=0.0), "loss = -torch.log((p - x).clamp_min(1e-8)).mean()"),
    ("return x.sqrt()", Culprit("sqrt", backward=True), "return (x + 1e-8).sqrt()"),
    ("return torch.sqrt(x.sum(-1))", Culprit("sqrt", backward=True), "return torch.sqrt(x.sum(-1) + 1e-8)"),
    ("return torch.sqrt(x)", Culprit("sqrt", low=-0.5), "return torch.sqrt(x.clamp_min(1e-8))"),
    ("return x ** 0.5", Culprit("pow", backward=True), "return (x + 1e-8) ** 0.5"),
    ("return (x if n else p) ** 0.5", Culprit("pow", backward=True), "return ((x if n else p) + 1e-8) ** 0.5"),
    ("return x ** 0.5", Culprit("pow", low=-1.0), "return x.clamp_min(1e-8) ** 0.5"),
    ("return x.pow(0.5)", Culprit("pow", backward=True), "return (x + 1e-8).pow(0.5)"),
    ("return 1 / x", Culprit("reciprocal", low=0.0), "return 1 / x.clamp_min(1e-8)"),
    ("return (x * x) ** 0.5", Culprit("pow", backward=True), "return (x * x + 1e-8) ** 0.5"),
    ("return x / x.norm()", Culprit("div", low=0.0, tensors=2), "return x / x.norm().clamp_min(1e-8)"),
    ("return x / torch.sqrt(x.sum())", Culprit("div", low=0.0, tensors=2), "return x / torch.sqrt(x.sum() + 1e-8)"),
    ("return x / x.sum().sqrt()", Culprit("div", low=0.0, tensors=2), "return x / (x.sum() + 1e-8).sqrt()"),
    ("return x / (x.sum() ** 0.5)", Culprit("div", low=0.0, tensors=2), "return x / ((x.sum() + 1e-8) ** 0.5)"),
    ("return x / (p * p)", Culprit("div", low=0.0, tensors=2), "return x / (p * p).clamp_min(1e-8)"),
    ("return x.sum() / n", Culprit("div", low=-1.0, tensors=1), "return x.sum() / max(n, 1e-8)"),
    ("x.div_(p.sum())", Culprit("div_", low=0.0, tensors=2), "x.div_(p.sum().clamp_min(1e-8))"),
    ("return torch.exp(x * 2)", Culprit("exp", low=1e3), "return torch.exp((x * 2).clamp(max=20))"),
    ("return torch.acos(x)", Culprit("acos", backward=True), "return torch.acos(x.clamp(-1 + 1e-6, 1 - 1e-6))"),
    ("return torch.arccos(x)", Culprit("acos", backward=True), "return torch.arccos(x.clamp(-1 + 1e-6, 1 - 1e-6))"),
    ("return x.var(0)", Culprit("var"), "return x.var(0, correction=0)"),
    ("return x.std()", Culprit("std"), "return x.std(correction=0)"),
    ("return x.half()", Culprit("_to_copy"), "return x.bfloat16()"),
    ("return x.to(torch.float16)", Culprit("_to_copy"), "return x.to(torch.bfloat16)"),
    (
        "return scores.masked_fill(mask, float('-inf')).softmax(-1)",
        Culprit("_softmax"),
        "return scores.masked_fill(mask, torch.finfo(scores.dtype).min).softmax(-1)",
    ),
    (
        "return torch.where(x > 0, torch.log(x), 0.0)",
        Culprit("log", backward=True),
        "return torch.where(x > 0, torch.log(torch.where(x > 0, x, 1.0)), 0.0)",
    ),
    (
        "return torch.where(x < 1, 0.0, x.sqrt() * 2)",
        Culprit("sqrt", backward=True),
        "return torch.where(x < 1, 0.0, torch.where(x < 1, 1.0, x).sqrt() * 2)",
    ),
    (
        "return torch.where(p > 0, x / p, x)",
        Culprit("div", backward=True, tensors=2),
        "return torch.where(p > 0, x / torch.where(p > 0, p, 1.0), x)",
    ),
    ("return F.ctc_loss(x, p, n, n)", Culprit("ctc_loss"), "return F.ctc_loss(x, p, n, n, zero_infinity=True)"),
    ("return 'ä', torch.log(p)", Culprit("log", low=0.0), "return 'ä', torch.log(p.clamp_min(1e-8))"),
]


@pytest.mark.parametrize(("text", "culprit", "expected"), [pytest.param(*case, id=case[0]) for case in CASES])
def test_a_line_is_mended(text: str, culprit: Culprit, expected: str) -> None:
    assert mended(text, culprit) == expected


NONE = [
    ("return torch.log(p) + torch.log(x)", Culprit("log", low=0.0)),  # which of the two?
    ("return self.helper(p)", Culprit("log", low=0.0)),
    ("return x / p", Culprit("div", low=-1.0, tensors=2)),  # below 0 as well: no clamp would be right
    ("return x / 0.0", Culprit("div", tensors=1)),
    ("return x.var(0, unbiased=False)", Culprit("var")),
    ("return (scores + p).masked_fill(mask, -torch.inf).softmax(-1)", Culprit("_softmax")),  # the dtype has no name
    ("return scores.masked_fill(mask, -1e4).softmax(-1)", Culprit("_softmax")),
    ("return x @ p", Culprit("mm")),
    ("x[:, 0].sqrt_()", Culprit("sqrt_", backward=True)),
    ("return 1 / x", Culprit("reciprocal", low=-1.0)),
    ("rms = x.sum().sqrt(); return x / rms", Culprit("div", low=0.0, tensors=2)),  # the root is to be mended, and stands elsewhere
    ("return x / counts[:, None]", Culprit("div", tensors=2)),  # integers: what is smallest is not known
    ("return x.var(\n    0,\n)", Culprit("var")),
    ("return x.var(0, True)", Culprit("var")),
    ("return torch.pow(10.0, x)", Culprit("pow")),
    ("return 2.0 ** x", Culprit("pow")),
    ("return x ** 3", Culprit("pow", low=1.0)),
    ("return x.pow(2)", Culprit("pow", backward=True)),
    ("return torch.log(p)", Culprit("log", low=0.0, half=True)),
    ("return torch.log(p", Culprit("log")),  # no Python
]


@pytest.mark.parametrize(("text", "culprit"), [pytest.param(*case, id=case[0]) for case in NONE])
def test_nothing_is_invented(text: str, culprit: Culprit) -> None:
    assert mended(text, culprit) == ""


def test_a_statement_of_several_lines() -> None:
    text = "return torch.log(\n    p\n)"
    diff = mend(file_of(text), 2, Culprit("log", low=0.0)).diff
    assert diff == "-     p\n+     p.clamp_min(1e-8)".replace("-     p", "- p").replace("+     p", "+ p")


def test_a_file_that_is_not_there() -> None:
    assert mend("/no/such/file.py", 3, Culprit("log")).diff == ""


@pytest.mark.parametrize(
    ("text", "names", "expected"),
    [
        ("return F.softmax(self.fc(x), dim=1)", ("softmax",), "return self.fc(x)"),
        ("return x.softmax(-1)", ("softmax",), "return x"),
        ("return self.softmax(self.fc(x))", ("softmax",), "return self.fc(x)"),
        ("h = p(x.detach())", ("detach",), "h = p(x)"),
        ("h = p(x.data)", ("data",), "h = p(x)"),
        ("h = x.detach() + p.detach()", ("detach",), ""),
        ("h = x + p", ("detach",), ""),
    ],
)
def test_a_call_is_taken_out(text: str, names: tuple[str, ...], expected: str) -> None:
    diff = removal(file_of(text), 2, names)
    assert (diff or "") == (f"- {text}\n+ {expected}" if expected else "")


def test_what_is_not_known_of_the_divisor_is_no_number() -> None:
    assert math.isnan(Culprit("div").low)


def test_a_file_that_was_edited_while_it_ran(tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    path.write_text("def f(p):\n    return p.log()\n", encoding="utf-8")
    names: dict[str, Any] = {}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), names)
    culprit = Culprit("log", low=0.0, code=names["f"].__code__)
    assert mend(str(path), 2, culprit).diff == "- return p.log()\n+ return p.clamp_min(1e-8).log()"
    assert line_of(str(path), 2, culprit.code) == "return p.log()"
    path.write_text("def g(p):\n    return (p + 1).log()\n\n\ndef f(p):\n    return p.log()\n", encoding="utf-8")
    assert mend(str(path), 2, culprit).diff == ""
    assert line_of(str(path), 2, culprit.code) == ""
