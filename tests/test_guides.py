"""The guides say what the code says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gradwatch
from examples.guides.make_rules import guide
from gradwatch import GradWatch, default_rules
from tests.investigate import guide as origins

ROOT = Path(__file__).parent.parent
SNIPPETS = re.findall(
    r"^```python\n(.*?)^```", (ROOT / "examples/guides/protection.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
)


def test_the_guide_of_the_rules_is_what_their_docstrings_say() -> None:
    assert (ROOT / "examples/guides/rules.md").read_text(encoding="utf-8") == guide(), "run examples/guides/make_rules.py again"


def test_the_guide_of_origins_is_what_the_planted_bugs_say() -> None:
    written = (ROOT / "examples/guides/origins.md").read_text(encoding="utf-8")
    assert written == origins.guide(), "run python -m tests.investigate.guide again"


def test_the_readme_names_every_rule_and_no_other() -> None:
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("## What it says")[2].partition("## What you can ask")[0]
    named = {name for row in re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert named == {rule.__name__ for rule in default_rules()}  # type: ignore[attr-defined]


def test_the_guide_of_protection_has_snippets() -> None:
    assert len(SNIPPETS) == 5


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_a_snippet_of_the_guide_of_protection_trains_on_in_spite_of_a_bad_batch(snippet: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batches = [(torch.randn(16, 4), torch.randn(16, 1)) for _ in range(12)]
    goes_back = "rollback" in snippet
    batches[8][0][3, 2] = torch.nan
    names: dict[str, Any] = {name: getattr(gradwatch, name) for name in gradwatch.__all__}
    names |= {"torch": torch, "model": model, "optimizer": optimizer, "loader": batches, "criterion": nn.MSELoss()}
    names["scheduler"] = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    names |= {"watch": GradWatch(model), "path": tmp_path / "checkpoint.pt"}
    exec(snippet, names)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    if goes_back:
        assert "went back" in " ".join(names["watch"].notices)
    if "skip" in snippet:
        assert all(torch.isfinite(b).all() for b in model.buffers())
