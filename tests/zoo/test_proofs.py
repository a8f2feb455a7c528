"""The fault of every sick case is there, and every healthy one converges: without a watch, by numbers of plain torch."""

from __future__ import annotations

import importlib
import itertools
import time
from collections.abc import Iterator

import pytest

from tests.zoo import suite
from tests.zoo.plain import measure


def names() -> Iterator[tuple[str, str]]:
    """(file, case); a file that does not import is one failing test, and hides no other."""
    for file in itertools.chain(*suite.FILES.values()):
        try:
            cases = importlib.import_module(file).CASES
        except Exception:
            yield file, "does not import"
        else:
            yield from ((file, case.name) for case in cases)


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
