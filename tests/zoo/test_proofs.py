"""The fault of a sick case is there, and a healthy one converges: without a watch, by numbers of plain torch.

Here of every fifth case of the first half, and of all of the second; `python -m tests.zoo --proofs` proves them all, and CI does.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator

import pytest

from tests.zoo import suite
from tests.zoo.plain import measure

EVERY = 5


def names() -> Iterator[tuple[str, str]]:
    """(file, case); a file that does not import is one failing test, and hides no other."""
    for half, files in suite.FILES.items():
        for file in files:
            try:
                cases = importlib.import_module(file).CASES
            except Exception:
                yield file, "does not import"
            else:
                yield from ((file, case.name) for case in cases[:: EVERY if half == "first" else 1])


@pytest.fixture(scope="module", autouse=True)
def total() -> Iterator[None]:
    """Says how long the proofs took altogether: `pytest -s`."""
    began = time.perf_counter()
    yield
    print(f"\nthe proofs of {len(list(names()))} cases took {time.perf_counter() - began:.0f} s")


@pytest.mark.parametrize(("file", "name"), list(names()), ids=lambda value: value)
def test_the_proof_holds(file: str, name: str) -> None:
    case = next(c for c in importlib.import_module(file).CASES if c.name == name)
    assert case.proof is not None
    assert case.proof(measure(case, 0))
