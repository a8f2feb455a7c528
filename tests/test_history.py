"""The ring buffer against a plain list, and the history through relayout, saving, loading and replay."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gradwatch.baselines import Baselines
from gradwatch.history import MAX_BYTES, History, LayerFact, Meta, ParameterFact, Pending, RingBuffer
from gradwatch.records import SCHEMA, STATISTICS, GradState, SkipReason

PAIR = np.dtype([("a", "f4", (3,)), ("b", "i8")])


def meta_of(*parameters: str, layers: tuple[str, ...] = ("",)) -> Meta:
    return Meta(tuple(ParameterFact(name, "", init_rms=1.0) for name in parameters), tuple(LayerFact(name) for name in layers))


def fill(history: History, records: int, seed: int = 0) -> list[NDArray[Any]]:
    """Append rows of arbitrary but plausible content; gives them back."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(records):
        row = history.blank_row()
        for name, statistic in STATISTICS.items():
            shape = row[name].shape
            if statistic.dtype.startswith("f"):
                values = np.exp(rng.normal(size=shape))
                row[name] = np.where(rng.random(shape) < 0.2, np.nan, values)
            elif statistic.dtype == "?":
                row[name] = rng.random() < 0.2
            else:
                row[name] = rng.integers(0, 64 if name == "grad_state" else len(SkipReason), shape)
        row["time"] = history.recorded + 1.0
        history.append(row)
        rows.append(row)
    return rows


def assert_same(left: History, right: History) -> None:
    """Equal in everything a rule can read."""
    assert left.recorded == right.recorded
    assert left.parameters == right.parameters
    assert left.layers == right.layers
    np.testing.assert_array_equal(left.steps, right.steps)
    for name in STATISTICS:
        np.testing.assert_array_equal(left.stat(name), right.stat(name), err_msg=name)
        assert left.stat(name).dtype == right.stat(name).dtype
    assert_same_baselines(left.baselines, right.baselines)


def assert_same_baselines(left: Baselines, right: Baselines) -> None:
    one, other = left.state_dict(), right.state_dict()
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


# -- the ring ----------------------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(capacity=st.integers(1, 12), rows=st.integers(0, 40), last=st.one_of(st.none(), st.integers(0, 45)))
def test_a_ring_holds_the_tail_of_a_list(capacity: int, rows: int, last: int | None) -> None:
    ring, plain = RingBuffer(PAIR, capacity), []
    for i in range(rows):
        row = np.array(((i, i + 0.5, -i), i), PAIR)
        ring.append(row)
        plain.append(row)
        row["b"] = -1  # what was appended is the ring's own
        plain[-1] = np.array(((i, i + 0.5, -i), i), PAIR)
        assert len(ring) == min(i + 1, capacity)
    kept = plain[-capacity:]
    expected = kept if last is None else kept[max(0, len(kept) - last) :]
    for name in ("a", "b"):
        got = ring.column(name, last)
        assert got.dtype == PAIR[name].base
        assert got.shape == (len(expected), *PAIR[name].shape)
        np.testing.assert_array_equal(got, np.array([row[name] for row in expected]).reshape(got.shape))
    assert ring.total == rows
    assert ring.capacity == capacity


def test_columns_of_a_ring_are_copies_wherever_it_has_wrapped() -> None:
    ring = RingBuffer(PAIR, 4)
    for i in range(11):
        ring.append(np.array(((i, i, i), i), PAIR))
        for last in (None, 1, 2):
            ring.column("a", last)[:] = -7
            ring.column("b", last)[:] = -7
    assert ring.column("b").tolist() == [7, 8, 9, 10]
    assert ring.column("a")[:, 0].tolist() == [7, 8, 9, 10]


@pytest.mark.parametrize(
    ("capacity", "max_bytes", "kept"),
    [
        pytest.param(100, 20 * 100, 100, id="all-fit"),
        pytest.param(100, 20 * 99 + 19, 99, id="one-too-many"),
        pytest.param(100, 20 * 7, 7, id="a-few-fit"),
        pytest.param(100, 19, 1, id="not-even-one-fits"),
        pytest.param(100, 0, 1, id="no-room-at-all"),
        pytest.param(1, MAX_BYTES, 1, id="one-asked-for"),
    ],
)
def test_a_ring_keeps_as_many_rows_as_its_bound_allows_and_at_least_one(capacity: int, max_bytes: int, kept: int) -> None:
    assert PAIR.itemsize == 20
    ring = RingBuffer(PAIR, capacity, max_bytes)
    assert ring.capacity == kept
    assert ring.nbytes == 20 * kept
    for i in range(kept + 2):
        ring.append(np.array(((0, 0, 0), i), PAIR))
    assert ring.column("b").tolist() == list(range(2, kept + 2))


@pytest.mark.parametrize("capacity", [0, -1])
def test_a_ring_of_nothing_is_refused(capacity: int) -> None:
    with pytest.raises(ValueError, match=rf"capacity={capacity}.*at least 1"):
        RingBuffer(PAIR, capacity)


# -- reading -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("records", [0, 1, 5, 8, 13], ids="{}-records".format)
@pytest.mark.parametrize("name", STATISTICS)
def test_every_statistic_has_its_shape_and_dtype(name: str, records: int) -> None:
    history = History(meta_of("a", "b", "c", layers=("", "x")), window=8)
    fill(history, records)
    kept = min(records, 8)
    shape = {"parameter": (kept, 3), "layer": (kept, 2), "update": (kept,)}[STATISTICS[name].axis]
    dtype = {"grad_state": np.uint8, "skip_reason": np.uint8, "skipped": np.bool_, "time": np.float64}.get(name, np.float32)
    assert history.stat(name).shape == shape
    assert history.stat(name).dtype == dtype


def test_nothing_observed_is_nan_and_no_flag() -> None:
    history = History(meta_of("a", "b", layers=("", "x", "y")))
    history.append(history.blank_row())
    for name, statistic in STATISTICS.items():
        values = history.stat(name)
        if statistic.dtype.startswith("f"):
            assert np.isnan(values).all(), name
        else:
            assert not values.any(), name


def test_a_blank_row_stays_blank_whatever_was_written_into_the_last_one() -> None:
    history = History(meta_of("a", "b"))
    row = history.blank_row()
    row["loss"], row["grad_norm"], row["grad_state"] = 1.0, 2.0, 3
    again = history.blank_row()
    assert np.isnan(again["loss"])
    assert np.isnan(again["grad_norm"]).all()
    assert not again["grad_state"].any()
    assert again.shape == ()


def test_steps_count_from_zero_without_gaps_and_keep_the_window() -> None:
    history = History(meta_of("a"), window=4)
    seen: list[list[int]] = []
    for _ in range(7):
        fill(history, 1)
        seen.append(history.steps.tolist())
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6]]
    assert history.steps.dtype == np.int64
    assert history.recorded == 7
    assert len(history) == history.capacity == 4


@pytest.mark.parametrize("records", [3, 7, 12])
def test_what_is_read_is_a_copy(records: int) -> None:
    history = History(meta_of("a", "b"), window=5)
    fill(history, records)
    before = {name: history.stat(name) for name in STATISTICS}
    history.steps[:] = 99
    for name in STATISTICS:
        history.stat(name)[:] = 1
        history.recent(name, 2)[:] = 1
    record = history.record()
    for value in record.stats.values():
        if isinstance(value, np.ndarray):
            value[:] = 1
    for name in STATISTICS:
        np.testing.assert_array_equal(history.stat(name), before[name], err_msg=name)
    assert history.steps[-1] == records - 1


def test_what_was_read_stays_as_it_was_when_the_run_goes_on() -> None:
    history = History(meta_of("a"), window=3)
    fill(history, 3, seed=1)
    stat, record = history.stat("grad_norm"), history.record(3)
    kept_stat, kept_record = stat.copy(), record.stats["grad_norm"].copy()
    fill(history, 5, seed=2)
    np.testing.assert_array_equal(stat, kept_stat)
    np.testing.assert_array_equal(record.stats["grad_norm"], kept_record)


@pytest.mark.parametrize("last", [0, 1, 4, 5, 100], ids="last-{}".format)
def test_recent_is_the_tail_of_stat(last: int) -> None:
    history = History(meta_of("a", "b"), window=5)
    fill(history, 8)
    for name in STATISTICS:
        tail = history.stat(name)[max(0, 5 - last) :]
        np.testing.assert_array_equal(history.recent(name, last), tail, err_msg=name)


@pytest.mark.parametrize(("start", "stop"), [(0, 8), (0, 3), (2, 5), (4, 6), (7, 20), (6, 6), (9, 12), (5, 2)])
def test_between_is_what_is_kept_of_some_records(start: int, stop: int) -> None:
    history = History(meta_of("a", "b"), window=5)
    fill(history, 8)
    for name in STATISTICS:
        kept = history.stat(name)[[i for i, step in enumerate(history.steps) if start <= step < stop]]
        np.testing.assert_array_equal(history.between(name, start, stop), kept, err_msg=name)


@pytest.mark.parametrize("name", ["grad_nrom", "", "GRAD_NORM", "steps"])
def test_an_unknown_statistic_is_a_key_error_that_lists_the_names(name: str) -> None:
    history = History(meta_of("a"))
    for ask in (lambda: history.stat(name), lambda: history.recent(name, 3), lambda: history.between(name, 0, 3)):
        with pytest.raises(KeyError) as caught:
            ask()
        message = str(caught.value)
        assert repr(name) in message
        assert all(known in message for known in STATISTICS)


def test_a_record_is_one_row_with_plain_scalars() -> None:
    history = History(meta_of("a", "b", layers=("", "x")), window=5)
    rows = fill(history, 8)
    for last in range(1, 6):
        record, row = history.record(last), rows[-last]
        assert record.step == 8 - last
        assert record.parameters == ("a", "b")
        assert record.layers == ("", "x")
        assert list(record.stats) == list(STATISTICS)
        for name, statistic in STATISTICS.items():
            np.testing.assert_array_equal(record.stats[name], row[name], err_msg=name)
            if statistic.axis == "update":
                assert type(record.stats[name]) in (float, int, bool), name


@pytest.mark.parametrize("last", [0, 6, -1])
def test_a_record_that_is_not_kept_is_an_index_error(last: int) -> None:
    history = History(meta_of("a"), window=5)
    fill(history, 8)
    with pytest.raises(IndexError, match="5 records"):
        history.record(last)


# -- the bound ---------------------------------------------------------------------------------------------------------------------


def test_a_large_model_keeps_fewer_records_and_says_how_many() -> None:
    history = History(meta_of(*map(str, range(40_000))), window=512)
    assert history.capacity < 512
    assert history.nbytes <= MAX_BYTES
    assert history.nbytes > MAX_BYTES * 0.9, "the bound is used"
    small = History(meta_of("a"), window=512)
    assert small.capacity == 512


def test_a_model_that_grows_stays_below_the_bound_and_keeps_the_newest() -> None:
    history = History(meta_of("a", "b"), window=64, max_bytes=8_000)
    fill(history, 100)
    before, capacity = history.stat("grad_norm"), history.capacity
    history.set_meta(meta_of("a", "b", *map(str, range(20))))
    assert history.nbytes <= 8_000
    assert len(history) == history.capacity < capacity
    np.testing.assert_array_equal(history.stat("grad_norm")[:, :2], before[-history.capacity :])
    assert history.steps.tolist() == list(range(100 - history.capacity, 100))
    assert history.recorded == 100


def test_a_model_that_shrinks_has_room_for_more_records_and_invents_none() -> None:
    history = History(meta_of(*map(str, range(20))), window=64, max_bytes=8_000)
    rows = fill(history, 100)
    kept = len(history)
    assert kept < 64
    history.set_meta(meta_of("0", "1"))
    assert history.steps.tolist() == list(range(100 - kept, 100))
    np.testing.assert_array_equal(history.stat("time"), np.arange(100 - kept, 100) + 1.0)
    rows += fill(history, 2)
    assert history.steps.tolist() == list(range(100 - kept, 102))
    np.testing.assert_array_equal(history.stat("loss"), [row["loss"] for row in rows[100 - kept :]])


def test_a_row_larger_than_the_bound_is_kept_alone() -> None:
    history = History(meta_of("a", "b"), window=64, max_bytes=10)
    fill(history, 3)
    assert history.capacity == len(history) == 1
    assert history.steps.tolist() == [2]


# -- relayout ----------------------------------------------------------------------------------------------------------------------

names = st.lists(st.sampled_from("abcdefg"), unique=True, max_size=6)


@settings(max_examples=100, deadline=None)
@given(
    old=names,
    new=names,
    old_layers=names,
    new_layers=names,
    records=st.integers(0, 9),
    more=st.integers(0, 6),
)
def test_columns_are_matched_by_name(
    old: list[str], new: list[str], old_layers: list[str], new_layers: list[str], records: int, more: int
) -> None:
    history = History(meta_of(*old, layers=tuple(old_layers)), window=5)
    rows = fill(history, records, seed=records)
    later = meta_of(*new, layers=tuple(new_layers))
    history.set_meta(later)
    assert history.meta is later
    assert history.parameters == tuple(new)
    assert history.layers == tuple(new_layers)
    assert history.recorded == records
    rows += fill(history, more, seed=99)
    kept = list(range(max(0, records + more - 5), records + more))
    assert history.steps.tolist() == kept
    for name, statistic in STATISTICS.items():
        got = history.stat(name)
        for t, step in enumerate(kept):
            if statistic.axis == "update":
                np.testing.assert_array_equal(got[t], rows[step][name])
                continue
            before, now = (old, new) if statistic.axis == "parameter" else (old_layers, new_layers)
            there = dict(zip(before if step < records else now, rows[step][name].tolist(), strict=True))
            nothing = float("nan") if statistic.dtype.startswith("f") else 0
            np.testing.assert_array_equal(got[t], [there.get(column, nothing) for column in now])


def test_baselines_follow_their_columns() -> None:
    history = History(meta_of("a", "b", "c"))
    fill(history, 30)
    before = history.baselines.state_dict()
    history.set_meta(meta_of("c", "new", "a"))
    after = history.baselines
    for name in ("seen", "reached", "stepped", "early", "weight_norm", "last", "first"):
        moved = getattr(after, name)
        np.testing.assert_array_equal(moved[..., 0], before[name][..., 2], err_msg=name)
        np.testing.assert_array_equal(moved[..., 2], before[name][..., 0], err_msg=name)
    assert after.seen[1] == after.reached[1] == after.stepped[1] == 0
    assert np.isnan(after.early[1])
    assert after.records == 30
    fill(history, 30)
    assert after.seen[1] > 0


def test_facts_that_change_no_name_move_no_number() -> None:
    history = History(meta_of("a", "b"), window=5)
    fill(history, 8)
    before = copy.deepcopy(history.state_dict())
    thawed = Meta((ParameterFact("a", "", trainable=False), ParameterFact("b", "", owner="SGD#0")), (LayerFact(""),))
    history.set_meta(thawed)
    assert history.meta is thawed
    for name in STATISTICS:
        np.testing.assert_array_equal(history.stat(name), before["columns"][name])


def test_a_blank_row_has_the_present_layout() -> None:
    history = History(meta_of("a"))
    history.blank_row()
    history.set_meta(meta_of("a", "b", layers=("", "x")))
    row = history.blank_row()
    assert row["grad_norm"].shape == (2,)
    assert row["gain"].shape == (2,)
    history.append(row)


# -- saving and loading ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "through", [lambda state: state, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["as-is", "copy", "pickle"]
)
@pytest.mark.parametrize("records", [0, 3, 5, 17], ids="{}-records".format)
def test_a_loaded_history_is_the_saved_one(records: int, through: Any) -> None:
    history = History(meta_of("a", "b", layers=("", "x")), window=5)
    fill(history, records)
    history.pending = Pending(backward_calls=3, unowned=1, foreign_steps=2, ever_stepped=True)
    again = History.from_state_dict(through(history.state_dict()))
    assert_same(history, again)
    assert again.pending == history.pending
    assert again.meta == history.meta
    assert (again.window, again.capacity, again.ended) == (5, 5, False)
    fill(history, 4, seed=7)
    fill(again, 4, seed=7)
    assert_same(history, again)


def test_a_history_loaded_with_more_room_invents_no_record() -> None:
    history = History(meta_of("a", "b"), window=64, max_bytes=2_000)
    fill(history, 100)
    assert len(history) < 64
    again = History.from_state_dict(history.state_dict())
    assert again.capacity == 64
    assert_same(history, again)


def test_a_saved_state_is_a_snapshot() -> None:
    history = History(meta_of("a"), window=5)
    fill(history, 3)
    state = history.state_dict()
    kept = copy.deepcopy(state)
    fill(history, 20, seed=5)
    one, other = History.from_state_dict(state), History.from_state_dict(state)
    fill(one, 9, seed=6)
    assert_same(other, History.from_state_dict(kept))


def test_a_state_names_its_layout_and_another_one_is_refused() -> None:
    history = History(meta_of("a"))
    state = history.state_dict()
    assert state["schema"] == SCHEMA == history.meta.schema
    with pytest.raises(ValueError, match=rf"schema {SCHEMA + 1}.*schema {SCHEMA}"):
        History.from_state_dict({**state, "schema": SCHEMA + 1})
    with pytest.raises(ValueError, match="schema None"):
        History.from_state_dict({name: value for name, value in state.items() if name != "schema"})


def test_a_state_is_made_of_plain_objects() -> None:
    """So that it can be read without torch, and by a reader that was not there when it was written."""
    history = History(meta_of("a"), window=5)
    fill(history, 3)

    def look(value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                assert isinstance(key, str)
                look(inner)
        else:
            assert type(value).__module__.split(".")[0] in ("builtins", "numpy", "gradwatch"), type(value)
            assert "torch" not in type(value).__module__

    look(history.state_dict())


# -- replay ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("records", [0, 1, 5, 12], ids="{}-records".format)
def test_replay_grows_as_the_run_did(records: int) -> None:
    history = History(meta_of("a", "b"), window=5)
    fill(history, records)
    history.pending = Pending(backward_calls=2, unowned=4, foreign_steps=1, ever_stepped=True)
    kept = min(records, 5)
    before = copy.deepcopy(history.state_dict())
    lengths, ended = [], []
    for again in history.replay():
        lengths.append(len(again))
        ended.append(again.ended)
        n = len(again)
        for name in STATISTICS:
            np.testing.assert_array_equal(again.stat(name), history.stat(name)[:n], err_msg=name)
        np.testing.assert_array_equal(again.steps, history.steps[:n])
        assert again.meta is history.meta
        if not again.ended:
            assert again.pending == Pending(0, 0, 1, True), "what came after the last record has not happened yet"
        else:
            assert again.pending == history.pending
    assert lengths == [*range(1, kept + 1), kept]
    assert ended == [False] * kept + [True]
    assert not history.ended
    np.testing.assert_equal(history.state_dict(), before)


def test_replay_gives_rules_the_baselines_they_had() -> None:
    history = History(meta_of("a", "b"), window=64)
    live: list[dict[str, Any]] = []
    for step in range(40):
        fill(history, 1, seed=step)
        live.append(history.baselines.state_dict())
    replayed = [again.baselines.state_dict() for again in history.replay()]
    assert len(replayed) == 41
    np.testing.assert_equal(replayed, [*live, live[-1]])


def test_two_replays_do_not_disturb_each_other() -> None:
    history = History(meta_of("a"), window=5)
    fill(history, 5)
    for one, other in zip(history.replay(), history.replay(), strict=True):
        assert one is not other
        assert_same(one, other)


def test_a_record_counts_into_the_baselines_under_its_number() -> None:
    history = History(meta_of("a", "b"), window=2)
    for _ in range(5):
        history.append(history.blank_row())
    row = history.blank_row()
    row["grad_state"][0] = GradState.REACHED
    history.append(row)
    assert history.baselines.last_reached.tolist() == [5, -1]
    assert history.baselines.records == 6


# -- rows written in place ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 3, 64])
def test_a_row_written_in_place_is_the_same_as_one_that_was_appended(window: int) -> None:
    meta = meta_of("a", "b")
    appended, in_place = History(meta, window), History(meta, window)
    for row in fill(appended, 10):
        mine = in_place.next_row()
        for name in STATISTICS:
            mine[name] = row[name]
        in_place.commit(full=True)
    assert_same(appended, in_place)


def test_a_row_that_is_being_written_is_seen_by_nobody() -> None:
    history = History(meta_of("a"), 3)
    fill(history, 3)
    before = history.stat("grad_norm")
    history.next_row()["grad_norm"] = 7.0
    assert history.recorded == 3
    np.testing.assert_array_equal(history.stat("grad_norm"), before[1:])  # the oldest has given way
    history.commit(full=True)
    assert history.stat("grad_norm")[:, 0].tolist() == [*before[1:, 0].tolist(), 7.0]
    assert np.isnan(history.stat("loss")[-1])
