"""The cases in their groups, and how many runs of them are made at once."""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import multiprocessing.pool
from collections.abc import Iterator

import torch

from tests.zoo import against
from tests.zoo.case import Case
from tests.zoo.outcome import Heard, Outcome
from tests.zoo.plain import measure
from tests.zoo.run import listen

FILES = {
    "first": tuple(
        f"tests.zoo.cases.{m}"
        for m in (
            "vision",
            "language",
            "loops",
            "further_a",
            "further_b",
            "pictures",
            "agents",
            "sequences",
            "plumbing",
            "reviewed",
            "denoisers",
            "texts",
            "players",
            "machinery",
            "speech",
            "mechanics",
            "encoders",
            "learners",
            "makers",
            "deciders",
            "pixels",
            "words",
            "control",
            "steps",
            "scenes",
            "systems",
            "policies",
            "signals",
            "studios",
            "plants",
            "readers",
            "workshops",
            "journeys",
        )
    ),
    "second": tuple(f"tests.zoo.held_out.{m}" for m in ("clinics", "markets", "harvests")),
}
"""The modules of each half; each has a list CASES. Rules are developed on the first, the second is only run to report."""

GRADWATCH = "gradwatch"


def cases() -> list[Case]:
    """The cases that the score is made of: those of both halves."""
    return [case for half in FILES for case in group(half)]


def earlier() -> list[Case]:
    """The cases that the first rules were calibrated on, without sources and proofs."""
    healthy, sick, more = (importlib.import_module(f"tests.zoo.earlier.{m}") for m in ("healthy", "sick", "more"))
    return [*healthy.HEALTHY, *sick.SICK, *more.MORE]


def group(name: str) -> list[Case]:
    """The cases of "first", "second" or "earlier"."""
    return earlier() if name == "earlier" else [case for file in FILES[name] for case in importlib.import_module(file).CASES]


def run_all(tools: tuple[str, ...], groups: dict[str, list[Case]], seeds: int, jobs: int = 1) -> Iterator[tuple[str, str, Outcome]]:
    """Train every case of every group for every seed under every tool.

    Args:
        tools: names, `GRADWATCH` or those of `against.TOOLS`.
        groups: by name of the group, the cases wanted of it.
        seeds: the number of seeds, from 0.
        jobs: processes, of one torch thread each.

    Yields:
        (tool, group, outcome), in the order of the groups.
    """
    tasks = [(t, g, case, seed) for g, wanted in groups.items() for t in tools for case in wanted for seed in range(seeds)]
    for (tool, of, case, seed), heard in zip(tasks, _heard(tasks, jobs), strict=True):
        yield tool, of, Outcome(case, seed, heard)


def prove_all(groups: dict[str, list[Case]], seeds: int, jobs: int = 1) -> Iterator[tuple[str, str, int, bool, str]]:
    """Train every case that has a proof without a watch, and let the proof measure.

    Args:
        groups: by name of the group, the cases wanted of it.
        seeds: the number of seeds, from 0.
        jobs: processes, of one torch thread each.

    Yields:
        (group, name of the case, seed, whether the proof holds, what it says).
    """
    tasks = [(g, case, seed) for g, wanted in groups.items() for case in wanted if case.proof is not None for seed in range(seeds)]
    for (of, case, seed), (holds, told) in zip(tasks, _told(tasks, jobs), strict=True):
        yield of, case.name, seed, holds, told


def _told(tasks: list[tuple[str, Case, int]], jobs: int) -> Iterator[tuple[bool, str]]:
    if jobs <= 1:
        yield from (prove(case, seed) for _, case, seed in tasks)
        return
    with _pool(jobs) as pool:
        yield from pool.imap(_prove, [(of, case.name, seed) for of, case, seed in tasks], chunksize=4)


def prove(case: Case, seed: int) -> tuple[bool, str]:
    """Whether the proof of a case holds, and what it says."""
    assert case.proof is not None
    try:
        return True, case.proof(measure(case, seed))
    except Exception as error:
        return False, f"FAILED, {type(error).__name__}: {error}"


def _prove(task: tuple[str, str, int]) -> tuple[bool, str]:
    of, name, seed = task
    return prove(_by_name(of)[name], seed)


def _pool(jobs: int) -> multiprocessing.pool.Pool:
    # Spawned, for a forked torch may hang in its thread pool. A case is a closure and does not travel: its name does.
    return multiprocessing.get_context("spawn").Pool(jobs, torch.set_num_threads, (1,))


Task = tuple[str, str, Case, int]
"""(tool, group, case, seed)."""


def _heard(tasks: list[Task], jobs: int) -> Iterator[Heard]:
    if jobs <= 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield from (_hear(tool, case, seed) for tool, _, case, seed in tasks)
        finally:
            torch.set_num_threads(threads)
        return
    with _pool(jobs) as pool:
        yield from pool.imap(_work, [(tool, of, case.name, seed) for tool, of, case, seed in tasks], chunksize=4)


def _work(task: tuple[str, str, str, int]) -> Heard:
    tool, of, name, seed = task
    return _hear(tool, _by_name(of)[name], seed)


@functools.cache
def _by_name(of: str) -> dict[str, Case]:
    return {case.name: case for case in group(of)}


def _hear(tool: str, case: Case, seed: int) -> Heard:
    return listen(case, seed) if tool == GRADWATCH else against.TOOLS[tool].listen(case, seed)
