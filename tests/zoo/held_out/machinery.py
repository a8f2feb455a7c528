"""Not written yet."""

from tests.zoo.case import Case

CASES: list[Case] = []
