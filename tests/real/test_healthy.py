"""On architectures of `transformers` that train well, the watch changes nothing, measures everything and says nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from gradwatch import GradWatch
from gradwatch.records import STATISTICS, GradState, Severity
from tests.networks import fingerprint
from tests.real.architectures import ARCHITECTURES, UPDATES
from tests.traces import changed


@dataclass(frozen=True)
class Run:
    """One architecture trained twice, bare and under a watch.

    Attributes:
        name: of the architecture.
        bare, watched: what each training left behind, as bits.
        losses: of the bare training's updates.
        batches: how many batches take turns.
        watch: after the training.
        parameters, layers: the model's own names.
    """

    name: str
    bare: dict[str, object]
    watched: dict[str, object]
    losses: list[float]
    batches: int
    watch: GradWatch
    parameters: list[str]
    layers: list[str]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def run(request: pytest.FixtureRequest) -> Run:
    architecture = ARCHITECTURES[request.param]
    bare = architecture.training()
    losses = [bare.update(i) for i in range(UPDATES)]
    expected = fingerprint(bare)
    training = architecture.training()
    with GradWatch(training.model, console=False) as watch:
        training.run(UPDATES)
    model = training.modules()[""]
    return Run(
        name=request.param,
        bare=expected,
        watched=fingerprint(training),
        losses=losses,
        batches=architecture.batches,
        watch=watch,
        parameters=[name for name, _ in model.named_parameters()],
        layers=[name for name, _ in model.named_modules()],
    )


def test_it_learns(run: Run) -> None:
    """Silence of a watch is worth something only over a training that works."""
    first, last = np.mean(run.losses[: run.batches]), np.mean(run.losses[-run.batches :])
    assert last <= 0.5 * first


def test_training_is_bit_identical_under_the_watch(run: Run) -> None:
    assert sorted(changed(run.bare, run.watched)) == []


def test_every_statistic_is_finite_where_it_was_observed(run: Run) -> None:
    history = run.watch.history
    assert history.steps.tolist() == list(range(UPDATES))
    for name in STATISTICS:
        values = history.stat(name)
        assert np.isfinite(values[~np.isnan(values)]).all(), name
    # NaN means "not observed", so where there was something to observe it is a fault of the watch's.
    assert np.isfinite(history.stat("total_norm")).all()
    reached = (history.stat("grad_state") & GradState.REACHED) != 0
    for name in ("grad_norm", "weight_norm", "lr"):
        assert np.isfinite(history.stat(name)[reached]).all(), name
    np.testing.assert_allclose(history.stat("loss"), run.losses, rtol=1e-6)


def test_the_history_bears_the_names_of_the_model(run: Run) -> None:
    assert list(run.watch.history.parameters) == run.parameters
    assert list(run.watch.history.layers) == run.layers


def test_nothing_is_said(run: Run) -> None:
    assert [alert for alert in run.watch.alerts if alert.severity >= Severity.WARNING] == []
    assert list(run.watch.notices) == []


def test_there_are_as_many_as_promised() -> None:
    """An empty mapping would skip all of the above."""
    assert len(ARCHITECTURES) >= 50
