"""Running baselines against a slow second computation."""

from __future__ import annotations

import numpy as np
import pytest

from gradwatch.baselines import KEPT, WINDOW, ZERO, Baselines
from gradwatch.history import History, LayerFact, Meta, ParameterFact
from gradwatch.records import GradState, SkipReason
from tests.diagnose.runs import Run, chain, skipped


def observed(run: Run, column: int) -> np.ndarray:
    norms = run.history.stat("grad_norm")[:, column]
    return norms[np.isfinite(norms)]


def mixed(run: Run, n: int) -> None:
    """Records in which columns come and go, some of them exactly zero."""
    random = np.random.default_rng(3)
    for _ in range(n):
        norms = random.lognormal(0, 1, 8)
        norms[random.random(8) < 0.3] = np.nan
        norms[random.random(8) < 0.1] = 0.0
        run.record(norms)


def test_each_column_counts_its_own_observations() -> None:
    run = Run(chain(4), rules=())
    mixed(run, 60)
    b = run.history.baselines
    with np.errstate(divide="ignore"):
        for p in range(8):
            logs = np.maximum(np.log(observed(run, p)), ZERO)
            assert b.seen[p] == len(logs)
            np.testing.assert_allclose(b.level()[p], logs[-WINDOW:].mean(), rtol=1e-5)
            np.testing.assert_allclose(b.early[p], np.median(logs[:WINDOW]), rtol=1e-5)
            np.testing.assert_allclose(np.sort(b.last[:, p]), np.sort(logs[-WINDOW:]), rtol=1e-6)


def test_the_fast_path_for_complete_records_agrees_with_the_slow_one() -> None:
    whole, spotted = Run(chain(4), rules=()), Run(chain(4), rules=())
    whole.records(25)
    spotted.records(25)
    slow = Baselines(9)
    for row in whole.history._ring._rows[:25]:
        wide = History(chain(4)).blank_row()
        wide[...] = row
        norms = np.append(row["grad_norm"], np.nan).astype(np.float32)
        slow._take_norms(norms)
    fast = whole.history.baselines
    np.testing.assert_array_equal(slow.last[:, :8], fast.last)
    np.testing.assert_array_equal(slow.early[:8], fast.early)
    np.testing.assert_allclose(slow.residuals, fast.residuals, rtol=1e-5, atol=1e-6)


def test_the_residual_is_the_norm_over_what_its_columns_did_before() -> None:
    run = Run(chain(4), rules=())
    run.records(12)
    before = np.log(run.history.stat("grad_norm")[-WINDOW:].astype(float)).mean(axis=0)
    run.record(7.0)
    now = run.history.stat("grad_norm")[-1].astype(float)
    expected = 0.5 * np.log(np.square(now).sum() / np.exp(2 * before).sum())
    assert run.history.baselines.residuals[-1] == pytest.approx(expected, abs=1e-4)


def test_skipped_records_teach_nothing_about_norms() -> None:
    run = Run(chain(4), rules=())
    run.records(12)
    before = run.history.baselines.level().copy()
    run.records(5, 1e6, **skipped(SkipReason.SCALER))
    np.testing.assert_array_equal(run.history.baselines.level(), before)
    assert run.history.baselines.skips == 5
    run.record()
    assert run.history.baselines.skips == 0


def test_steps_that_miss_a_parameter_are_counted_until_it_is_reached() -> None:
    run = Run(chain(2), rules=())
    state = np.array([8, 8, 9, 9], np.uint8)
    run.records(3, grad_state=state)
    assert run.history.baselines.missed.tolist() == [3, 3, 0, 0]
    run.record()
    run.records(2, grad_state=state)
    b = run.history.baselines
    assert (b.missed.tolist(), b.gap.tolist()) == ([2, 2, 0, 0], [3, 3, 0, 0])
    assert b.last_reached.tolist() == [3, 3, 5, 5]


def test_columns_keep_what_is_known_of_them_when_the_model_changes() -> None:
    run = Run(chain(4), rules=())
    run.records(15)
    b = run.history.baselines
    level, seen = b.level()[2:4].copy(), b.seen[2:4].copy()
    b.relayout(6, np.array([2, 3]), np.array([5, 0]))
    np.testing.assert_array_equal(b.level()[[5, 0]], level)
    np.testing.assert_array_equal(b.seen[[5, 0]], seen)
    assert b.seen[[1, 2, 3, 4]].tolist() == [0, 0, 0, 0]
    assert np.isnan(b.early[1])


def test_a_state_restored_is_the_state_saved() -> None:
    run = Run(chain(4), rules=())
    mixed(run, 30)
    saved = run.history.baselines.state_dict()
    other = Baselines(8)
    other.load_state_dict(saved)
    for name, value in vars(run.history.baselines).items():
        np.testing.assert_array_equal(value, getattr(other, name))
    run.record()
    assert other.records == 30


def test_memory_does_not_grow_with_the_run() -> None:
    run = Run(chain(2), rules=())
    run.records(KEPT + 40)
    b = run.history.baselines
    assert len(b.residuals) == len(b.losses) == KEPT
    assert len(b.first_losses) == len(b.first_totals) == WINDOW


def test_flags_decide_who_is_stale_and_who_is_an_orphan() -> None:
    run = Run(chain(2), rules=())
    reached, stepped, stale = (np.uint8(f) for f in (GradState.REACHED, GradState.REACHED | GradState.STEPPED, 11))
    run.record(grad_state=np.array([reached, stepped, stale, 0], np.uint8))
    run.record(grad_state=np.array([reached, stepped, stepped, reached], np.uint8))
    b = run.history.baselines
    assert b.orphan.tolist() == [2, 0, 0, 1]
    assert b.stale.tolist() == [0, 0, 2, 0]


# -- looks that found nothing changed -----------------------------------------------------------------------------------------------

LOOKED = GradState.REACHED | GradState.STEPPED
SAME, CHANGED = np.uint8(LOOKED | GradState.SAME), np.uint8(LOOKED | GradState.CHANGED)


def counts(*states: int | list[int], **columns: float) -> list[int]:
    """`same` after records in which the flags of three vectors were these."""
    run = Run(chain(3, bias=False), rules=())
    for state in states:
        run.record(grad_state=np.array(state, np.uint8), **columns)
    return run.history.baselines.same.tolist()


def test_looks_that_find_not_a_bit_changed_are_counted_column_by_column() -> None:
    assert counts(SAME, [SAME, LOOKED, CHANGED], [SAME, SAME, CHANGED]) == [3, 2, 0]


def test_a_change_makes_the_count_begin_again() -> None:
    assert counts(SAME, SAME, [SAME, CHANGED, LOOKED | GradState.CHANGED]) == [3, 0, 0]
    assert counts(SAME, SAME, CHANGED, SAME) == [1, 1, 1]


def test_records_in_which_nobody_looked_whole_leave_the_count_as_it_is() -> None:
    assert counts(SAME, LOOKED, int(GradState.REACHED), 0, LOOKED | GradState.STALE, SAME) == [2, 2, 2]


def test_what_no_backward_reached_does_not_count() -> None:
    assert counts(SAME, int(GradState.STEPPED | GradState.SAME), SAME) == [2, 2, 2]


def test_what_else_happened_to_the_gradient_does_not_matter() -> None:
    extra = GradState.CLEARED | GradState.CLIPPED | GradState.STALE
    assert counts(int(SAME | extra), SAME) == [2, 2, 2]


def test_records_without_full_statistics_do_not_count() -> None:
    assert counts(SAME, SAME, weight_norm=np.nan, update_ratio=np.nan) == [0, 0, 0]


def test_the_count_of_a_column_goes_with_it_when_the_model_changes() -> None:
    run = Run(chain(3, bias=False), rules=())
    run.record(grad_state=np.array([SAME, CHANGED, SAME]))
    run.record(grad_state=np.array([SAME, CHANGED, CHANGED]))
    b = run.history.baselines
    b.relayout(4, np.array([0, 1]), np.array([3, 0]))
    assert b.same.tolist() == [0, 0, 0, 2]
    b = b.copy()
    assert b.same.tolist() == [0, 0, 0, 2]


def test_steps_while_a_parameter_required_no_gradient_are_none_that_it_missed() -> None:
    baselines = Baselines(2)
    history = History(Meta((ParameterFact("a", ""), ParameterFact("b", "")), (LayerFact(""),)))
    for step in range(6):
        row = history.blank_row()
        row["grad_state"] = np.array([GradState.REACHED | GradState.STEPPED, GradState.STEPPED], np.uint8)
        baselines.update(row, step, trainable=np.array([True, step >= 4]))
    assert baselines.missed.tolist() == [0, 2]
    assert baselines.frozen.tolist() == [-1, 3]
    baselines.thaw(np.array([True, True]), 3)
    assert baselines.missed.tolist() == [0, 5]
    assert baselines.frozen.tolist() == [-1, 0]
    baselines.thaw(np.array([True, True]), 3)
    assert baselines.missed.tolist() == [0, 6]
    assert baselines.frozen.tolist() == [-1, -1]
