"""Of a line that holds more than one operator the one that ran is told and mended; a diff is applied, and the network trains."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from textwrap import dedent, indent
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradwatch import GradWatch
from gradwatch.records import Alert

HEAD = """
import math
import torch
import torch as th
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc, self.out, self.tau = nn.Linear(6, 8), nn.Linear(8, 3), 0.5

    def log(self, name, value):
        return value

    def forward(self, x):
        h = self.enc(x)
        m = (x[:, :1] > 0).float()
        n, h0 = torch.relu(h), h * m
"""

NORMAL = "torch.distributions.Normal(h, n, validate_args=False)"

MENDED = [
    pytest.param("d = h0**2\nr = th.sqrt(d)", "aten::sqrt", "r = th.sqrt(d + 1e-8)", id="a package by another name"),
    pytest.param("r = th.log(n)", "aten::log", "r = th.log(n.clamp_min(1e-8))", id="a function of it"),
    pytest.param(
        "a, d = h.abs() + 0.1, h0**2\nr = torch.where(h > 0, a.sqrt(), 0.0) * d.sqrt()",
        "aten::sqrt",
        "r = torch.where(h > 0, a.sqrt(), 0.0) * (d + 1e-8).sqrt()",
        id="beside a where",
    ),
    pytest.param(
        "r = h * (h0**2).sum(-1, keepdim=True).sqrt(); s = h.detach().abs().sqrt()",
        "aten::sqrt",
        "r = h * ((h0**2).sum(-1, keepdim=True) + 1e-8).sqrt(); s = h.detach().abs().sqrt()",
        id="two statements",
    ),
    pytest.param(
        "h = torch.sigmoid(h) * m\nr = torch.where(h >= 0, torch.sqrt(h), torch.zeros_like(h))",
        "aten::sqrt",
        "r = torch.where(h >= 0, torch.sqrt(h + 1e-8), torch.zeros_like(h))",
        id="a where that discards nothing",
    ),
    pytest.param(
        "has, b = x[:, 0] > 0, torch.sigmoid(h) * m\nr = h * torch.where(has, torch.sqrt(b).sum(1), torch.zeros(()))[:, None]",
        "aten::sqrt",
        "r = h * torch.where(has, torch.sqrt(b + 1e-8).sum(1), torch.zeros(()))[:, None]",
        id="a where of another shape",
    ),
    pytest.param(
        "r = torch.where(m > 0, h / m, 0.0) / 2.0",
        "aten::div",
        "r = torch.where(m > 0, h / torch.where(m > 0, m, 1.0), 0.0) / 2.0",
        id="the inner one of two divisions",
    ),
    pytest.param(
        "r = h0 / (2 * torch.sqrt((h0**2).sum(-1)))[:, None]",
        "aten::div by 0",
        "r = h0 / (2 * torch.sqrt((h0**2).sum(-1) + 1e-8))[:, None]",
        id="a multiple of a root",
    ),
    pytest.param(
        "r = torch.nan_to_num(h.sqrt())", "aten::sqrt", "r = torch.nan_to_num(h.clamp_min(1e-8).sqrt())", id="a root of less than 0"
    ),
    pytest.param(
        "r = torch.where(torch.rand_like(h) > 2.0, h0.abs().log(), h)",
        "aten::log",
        "r = torch.where(torch.rand_like(h) > 2.0, h0.abs().clamp_min(1e-8).log(), h)",
        id="a where that draws",
    ),
    pytest.param(
        "a, d = h.abs() + 0.1, h0**2\nr = torch.where(h > 0, a.sqrt(), 0.0) + torch.where(m > 0, d.sqrt(), 0.0)",
        "aten::sqrt",
        "r = torch.where(h > 0, a.sqrt(), 0.0) + torch.where(m > 0, torch.where(m > 0, d, 1.0).sqrt(), 0.0)",
        id="the second of two where",
    ),
    pytest.param("r = n / (x > 1).sum(1)[:, None]", "aten::div by 0", "r = n / (x > 1).sum(1)[:, None].clamp(min=1)", id="a count"),
    pytest.param(
        "h0 /= h0.sum(-1, keepdim=True).abs()\nr = h0",
        "aten::div_ by 0",
        "h0 /= h0.sum(-1, keepdim=True).abs().clamp_min(1e-8)",
        id="in place",
    ),
    pytest.param(
        "w = h0.abs()\nr = torch.divide(w, w.sum(-1, keepdim=True))",
        "aten::div by 0",
        "r = torch.divide(w, w.sum(-1, keepdim=True).clamp_min(1e-8))",
        id="divide",
    ),
    pytest.param(
        "r = torch.cosh(-n * 300).log()", "aten::cosh of -", "r = torch.cosh((-n * 300).clamp(-20, 20)).log()", id="both sides"
    ),
    pytest.param(
        "r = (\n    h0.abs()\n    .log()\n    .exp()\n)",
        "The derivative of aten::log",
        "h0.abs().clamp_min(1e-8)",
        id="a chain over several lines",
    ),
]

NOT_MENDED = [
    pytest.param("r = h / torch.sin(h0) ** -1", "aten::", id="a power below -1"),
    pytest.param(
        "u = h0 * 1e-6\nr = h + (u**2).sum(-1, keepdim=True).sqrt() * 1e5", "aten::sqrt", id="numbers as small as the eps"
    ),
    pytest.param("r = h0.abs().sqrt().sqrt()", "aten::sqrt", id="a root of a root"),
    pytest.param("r = torch.exp(n * 1e4) / torch.exp(n * 1e4).sum()", "aten::exp of", id="the same twice"),
    pytest.param(
        f"r = -{NORMAL}.log_prob(x[:, :1]) / math.log(2)", "aten::div by 0", id="inside a distribution, beside a division"
    ),
    pytest.param(f"r = {NORMAL}.entropy() * math.log(2)", "aten::log of 0", id="inside a distribution, beside math.log"),
    pytest.param("r = F.normalize(h0, dim=-1, eps=0.0) / self.tau", "aten::div by 0", id="inside a function, beside a division"),
    pytest.param(f"r = self.log('nll', {NORMAL}.log_prob(h))", "aten::", id="beside a method of that name"),
    pytest.param("s = (h0**2).sum(-1).pow(0.5)\nr = h0 / s[:, None]", "aten::div by 0", id="a root by its name, as a view"),
    pytest.param("s = torch.sqrt(h0**2)\nr = torch.where(s > 0, h / s, 0.0)", "aten::div", id="a root by its name, in a where"),
    pytest.param("r = n / (h0**2)", "aten::div by 0 gives", id="by a number that is 0 where the other is not"),
    pytest.param("r = h - h[x[:, 0] > 1e9].std()", "aten::std over nothing", id="the spread of nothing"),
]

TOLD = [
    pytest.param(
        "r = 1e20 * n / (n * 1e-30 + 1e-30)", "aten::div of numbers up to ", "Make what it is given smaller", id="an overflow"
    ),
    pytest.param(
        "s = (h0**2).sum(-1, keepdim=True)\ns **= 0.5\nr = h / (s + 1.0)",
        "of aten::pow_ at sick.py:22 is",
        "Keep its base",
        id="in place",
    ),
    pytest.param("r = h0.reciprocal_()", "aten::reciprocal_ by 0 gives Inf", "Keep the divisor away from 0", id="written over"),
    pytest.param("r = n / (x > 9).sum(1)[:, None]", "aten::div by 0 gives", "Keep the divisor away from 0", id="a count of 0"),
    pytest.param(
        "r = torch.softmax(h.masked_fill(m > 0, float('inf')), -1)",
        "aten::softmax over a row that holds Inf gives NaN",
        "Mask with -Inf",
        id="masked with Inf",
    ),
    pytest.param("r = torch.acos(torch.ones_like(h) * 1.000001 + 0 * h)", "to 1.00000", "open interval", id="beyond 1 by rounding"),
    pytest.param("r = torch.xlogy(torch.full_like(n, 2.0), n)", "aten::xlogy with the logarithm of 0", "above 0", id="xlogy"),
]


def load(folder: Path, name: str, source: str) -> ModuleType:
    path = folder / f"{name}.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def source_of(body: str) -> str:
    return HEAD + indent(f"{dedent(body)}\nreturn self.out(r)\n", 8 * " ")


def trained(folder: Path, name: str, source: str) -> tuple[list[float], list[Alert]]:
    torch.manual_seed(0)
    model = load(folder, name, source).Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y, losses = torch.randn(16, 6), torch.randint(0, 3, (16,)), []
    with GradWatch(model, console=False) as watch:
        for _ in range(4):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert watch.notices == ()
    return losses, [alert for alert in watch.alerts if alert.rule.startswith("non_finite")]


@pytest.mark.parametrize(("body", "says", "expected"), MENDED)
def test_the_operator_that_ran_is_mended(body: str, says: str, expected: str, tmp_path: Path) -> None:
    source = source_of(body)
    alert = trained(tmp_path, "sick", source)[1][0]
    assert says in alert.cause
    rows = alert.remedy.splitlines()[1:]
    removed = [row[2:] for row in rows if row.startswith("- ")]
    added = [row[2:] for row in rows if row.startswith("+ ")]
    lines = source.splitlines()
    (at,) = [
        i for i in range(len(lines)) if [line.strip() for line in lines[i : i + len(removed)]] == [row.strip() for row in removed]
    ]
    lines[at : at + len(removed)] = [" " * (len(lines[at]) - len(lines[at].lstrip())) + row for row in added]
    mended = "\n".join(lines)
    assert f" {expected}\n" in mended
    losses, alerts = trained(tmp_path, "well", mended)
    assert not alerts
    assert max(losses) < 30


@pytest.mark.filterwarnings("ignore:std")
@pytest.mark.parametrize(("body", "says"), NOT_MENDED)
def test_an_innocent_operator_of_the_line_is_left_alone(body: str, says: str, tmp_path: Path) -> None:
    alert = trained(tmp_path, "sick", source_of(body))[1][0]
    assert says in alert.cause
    assert alert.origin is not None
    assert alert.origin.source.startswith("sick.py:")
    assert not any(row.startswith(("- ", "+ ")) for row in alert.remedy.splitlines())


@pytest.mark.parametrize(("body", "says", "remedy"), TOLD)
def test_what_is_said_is_true_of_the_numbers(body: str, says: str, remedy: str, tmp_path: Path) -> None:
    alert = trained(tmp_path, "sick", source_of(body))[1][0]
    assert says in alert.cause
    assert remedy in alert.remedy


def test_a_line_that_only_calls_the_model_is_not_mended() -> None:
    layer = nn.Linear(6, 8)
    nn.init.zeros_(layer.weight)
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(layer), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    accumulated = torch.tensor(2.0)
    with GradWatch(model, console=False) as watch:
        loss = F.cross_entropy(model(torch.randn(16, 6)), torch.arange(16) % 3) / accumulated
        loss.backward()
        optimizer.step()
    (alert,) = watch.alerts
    assert alert.cause.startswith("aten::div by 0 gives NaN in 0.parametrizations.weight.0 at test_lines.py:")
    assert alert.remedy.splitlines()[1].strip().startswith("loss = F.cross_entropy(")
