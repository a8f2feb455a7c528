"""The guides say what the code says."""

from __future__ import annotations

import re
from pathlib import Path

from examples.guides.make_rules import guide
from gradwatch import default_rules

ROOT = Path(__file__).parent.parent


def test_the_guide_of_the_rules_is_what_their_docstrings_say() -> None:
    assert (ROOT / "examples/guides/rules.md").read_text(encoding="utf-8") == guide(), "run examples/guides/make_rules.py again"


def test_the_readme_names_every_rule_and_no_other() -> None:
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("## What it says")[2].partition("## What you can ask")[0]
    named = {name for row in re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert named == {rule.__name__ for rule in default_rules()}  # type: ignore[attr-defined]
