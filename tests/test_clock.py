"""When an update begins, acts and closes: each sentence of the design as a sequence of events and what each must return.

A script is read from left to right, one token an event:

    b bc bm bcm   the outermost backward begins; c: every gradient read is cleared by now, m: a weight has moved
    e01  e        it returns, having reached slots 0 and 1, or nothing watched
    x             it raises
    A(  A{  A(h01 optimizer A is about to step; {: with a closure; h: slots that hold a gradient nobody has seen
    )  )inf       the innermost step returns; inf: a GradScaler told it to leave the weights alone
    !0            steps beyond the first 0 ended by an exception
    F             an optimizer that owns nothing watched has stepped
    H  H01        the user says that the update is over; slots that hold a gradient
    Q Qm Ql Qml   the block is left; m: a weight has moved, l: a GradScaler left the step out

After a colon stands what a pre-hook must do, after `=` how the record closes: outcome/slots reached/owners stepped/backward calls.
An event without `=` closes nothing. A owns slots 0 and 1, B owns 2 and 3, nobody owns 4 and 5.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwatch.clock import Clock, Open, Outcome, Pre

OWNERS: dict[int, Hashable] = {0: "A", 1: "A", 2: "B", 3: "B"}

TOKEN = re.compile(r"(?P<event>[^:=]+)(:(?P<pre>\w+))?(=(?P<outcome>\w+)/(?P<reached>\d*)/(?P<stepped>\w*)/(?P<calls>\d+))?")


def slots(digits: str) -> set[int]:
    return {int(digit) for digit in digits}


def never() -> bool:
    raise AssertionError("asked where nothing is to be decided")


def answers(value: bool) -> Callable[[], bool]:
    return lambda: value


def happen(clock: Clock, event: str) -> tuple[Pre | None, Outcome | None]:
    """One event: what a pre-hook has to do, and how the record closed."""
    head, rest = event[0], event[1:]
    if head == "b":
        return None, clock.backward_begin(answers("c" in rest), answers("m" in rest))
    if head == "e":
        return None, clock.backward_end(slots(rest))
    if head == "x":
        clock.backward_failed()
        return None, None
    if head == ")":
        # The key is the one that the innermost pre-hook gave; a hook of a wrapped optimizer may come with another.
        return None, clock.post("A" if not clock._steps else clock._steps[-1], rest == "inf")
    if head == "!":
        clock.forget_steps(int(rest))
        return None, None
    if head == "F":
        clock.foreign_post()
        return None, None
    if head == "H":
        return None, clock.by_hand(slots(rest))
    if head == "Q":
        return None, clock.exit(answers("m" in rest), answers("l" in rest))
    return clock.pre(head, rest.startswith("{"), lambda: slots(rest[2:]))


def play(script: str, owners: dict[int, Hashable] | None = None) -> list[Open]:
    """Play a script and hold each event to what it says; gives the records that closed."""
    clock = Clock(dict(OWNERS) if owners is None else owners)
    closed: list[Open] = []
    for at, token in enumerate(script.split()):
        found = TOKEN.fullmatch(token)
        assert found is not None, token
        pre, outcome = happen(clock, found["event"])
        here = f"event {at}, {token!r}, of {script!r}"
        if found["pre"] is not None:
            assert pre is Pre[found["pre"].upper()], here
        if found["outcome"] is None:
            assert outcome is None, f"{here} closed the record: {outcome}"
            continue
        assert outcome is Outcome[found["outcome"].upper()], f"{here} gave {outcome}"
        record = clock.closed
        assert record is not None, here
        assert record.reached == slots(found["reached"]), here
        assert record.stepped == set(found["stepped"]), here
        assert record.backward_calls == int(found["calls"]), here
        closed.append(record)
    return closed


RECORD = {
    "plain": "b e01 A(:act )=stepped/01/A/1 b e01 A(:act )=stepped/01/A/1",
    "a-second-record-has-only-its-own": "b e01 A( )=stepped/01/A/1 b e0 A( )=stepped/0/A/1",
    "several-backwards": "b e01 b e01 b e01 A( )=stepped/01/A/3",
    "a-short-last-group": "b e01 b e01 A( )=stepped/01/A/2 b e01 A( )=stepped/01/A/1",
    "losses-that-reach-different-parts": "b e0 b e1 A( )=stepped/01/A/2",
    "two-optimizers-one-loss": "b e0123 A(:act ) B(:act )=stepped/0123/AB/1",
    "two-optimizers-two-losses": "b e01 b e23 A( ) B( )=stepped/0123/AB/2",
    "two-optimizers-in-the-other-order": "b e0123 B( ) A( )=stepped/0123/AB/1",
    "two-optimizers-taking-turns": "b e01 A( )=stepped/01/A/1 b e23 B( )=stepped/23/B/1",
    "a-parameter-that-nobody-owns-is-waited-for-by-nobody": "b e014 A( )=stepped/014/A/1",
    "a-loss-that-reaches-nothing-watched-is-no-backward-of-the-record": "b e01 b e b e A( )=stepped/01/A/1",
    "only-losses-that-reach-nothing-watched": "b e b e bc e Q",
    "a-step-without-any-gradient": "A(:act ) A(:act ) Q",
}
"""A record is the backward passes since the last update, then the step of every optimizer that owns a parameter they reached."""

CLOSING = {
    "at-the-next-backward-once-an-owner-has-stepped": "b e0123 A( ) b=stepped/0123/A/1 e23 B( )=stepped/23/B/1",
    "gradients-cleared-do-not-matter-once-an-owner-has-stepped": "b e0123 A( ) bcm=stepped/0123/A/1 e01 A( )=stepped/01/A/1",
    "accumulation-stays-open": "b e01 b e01 b e01 b e01 A( )=stepped/01/A/4",
    "a-backward-of-another-model-closes-it-too": "b e0123 A( ) b=stepped/0123/A/1 e b e01 A( )=stepped/01/A/1",
    "accumulation-then-one-owner-then-more": "b e0123 b e0123 A( ) b=stepped/0123/A/2 e0123 A( ) B( )=stepped/0123/AB/1",
    "an-owner-that-steps-twice-is-one-owner": "b e0123 A( ) A( ) B( )=stepped/0123/AB/1",
    "at-exit-when-something-stepped": "b e0123 A( ) Q=stepped/0123/A/1",
    "at-exit-when-something-moved": "b e01 Qm=by_hand/01//1",
    "at-exit-unfinished": "b e01 b e01 Q=unfinished/01//2",
    "at-exit-left-out-by-a-scaler": "b e01 Ql=skipped/01//1",
    "at-exit-moved-weighs-more-than-left-out": "b e01 Qml=by_hand/01//1",
    "at-exit-with-nothing-open": "b e01 A( )=stepped/01/A/1 Q Qm Ql",
    "at-exit-of-an-empty-block": "Q",
    "exit-in-the-middle-of-a-backward": "b e01 b Q=unfinished/01//1 b e01 A(:act )=stepped/01/A/1",
    "exit-in-the-middle-of-the-first-backward": "b Q b e01 A(:act )=stepped/01/A/1",
    "exit-in-the-middle-of-a-step": "b e01 A( Q=unfinished/01//1 b e01 A(:act )=stepped/01/A/1",
    "exit-in-the-middle-of-a-closure": "A{ b Q A{:wait b e01 )=stepped/01/A/1",
}
"""At a post-hook when every owner has stepped; else at the next backward if one has, or all was cleared; else it stays open."""

FOREIGN = {
    "the-other-players-parameters-under-the-first-ones-loss": (
        "b e0123 A( ) b=stepped/0123/A/1 e23 B( )=stepped/23/B/1 b e0123 A( ) b=stepped/0123/A/1 e23 B( )=stepped/23/B/1"
    ),
    "only-a-foreign-step-is-no-record": "b e01 F bc=dropped/01//1 e01 A( )=stepped/01/A/1",
    "only-a-foreign-step-is-no-record-though-nothing-was-cleared": "b e01 F b=dropped/01//1 e01 A( )=stepped/01/A/1",
    "this-comes-before-weights-that-moved": "b e01 F bcm=dropped/01//1 e01",
    "only-a-foreign-step-at-exit": "b e01 F Q=dropped/01//1",
    "only-a-foreign-step-at-exit-though-weights-moved": "b e01 F Qm=dropped/01//1",
    "master-copies-step-and-are-copied-back": "b e45 F bm=by_hand/45//1 e45 F bcm=by_hand/45//1 e45 F Qm=by_hand/45//1",
    "tensors-that-nobody-owns-and-that-stay": "b e45 F b=dropped/45//1 e45 F Q=dropped/45//1",
    "a-foreign-step-beside-an-owners": "b e01 F A( )=stepped/01/A/1 b e01 A( )=stepped/01/A/1 F",
    "a-foreign-step-between-two-owners": "b e0123 A( ) F B( )=stepped/0123/AB/1",
    "a-foreign-step-before-the-first-backward": "F b e01 bc=skipped/01//1 e01",
    "a-foreign-step-for-a-foreign-backward-is-not-about-this-record": "b e01 b e F b e01 A( )=stepped/01/A/2",
    "a-backward-after-the-foreign-step-starts-afresh": "b e01 F b=dropped/01//1 e01 b e01 A( )=stepped/01/A/2",
}
"""Reached, but not stepped by its owner when the record closes; and the steps of optimizers that own nothing watched."""

WITHOUT_A_STEP = {
    "cleared-and-unchanged-is-skipped": "b e01 bc=skipped/01//1 e01 A( )=stepped/01/A/1",
    "cleared-and-moved-is-by-hand": "b e01 bcm=by_hand/01//1 e01 bcm=by_hand/01//1 e01",
    "accumulated-then-cleared": "b e01 b e01 bc=skipped/01//2 e01",
    "moved-with-gradients-kept-and-no-optimizer-in-sight": "b e45 bm=by_hand/45//1 e45 bm=by_hand/45//1 e45",
    "moved-with-gradients-kept-by-somebody-else-than-the-owner": "b e01 bm e01 A( )=stepped/01/A/2",
    "cleared-and-then-stepped-is-one-record": "b e01 A(:act )=stepped/01/A/1",
    "the-users-word": "b e01 H=by_hand/01//1 b e01 b e01 H=by_hand/01//2",
    "the-users-word-after-a-step": "b e0123 A( ) H=stepped/0123/A/1",
    "the-users-word-without-backward": "H01=by_hand/01//0 H H23=by_hand/23//0",
    "the-users-word-about-nothing": "H",
    "the-users-word-closes-what-is-open-not-what-lies-about": "b e01 H23=by_hand/01//1",
    "the-users-word-after-the-closing-step": "b e01 A( )=stepped/01/A/1 H b e01 A( )=stepped/01/A/1",
    "gradients-set-by-hand-are-read-in-the-pre-hook": "A(h01:read )=stepped/01/A/0 A(h01:read )=stepped/01/A/0",
    "gradients-of-two-optimizers-set-by-hand": "A(h0123:read ) B(:act )=stepped/0123/AB/0",
    "gradients-set-by-hand-twice-for-one-of-two-optimizers": "A(h0123:read ) A(h01:read=stepped/0123/A/0 )=stepped/01/A/0",
    "gradients-set-by-hand-one-optimizer-after-the-other": "A(h01:read )=stepped/01/A/0 B(h23:read )=stepped/23/B/0",
    "gradients-set-by-hand-after-a-backward": "b e01 A( )=stepped/01/A/1 A(h01:read )=stepped/01/A/0",
    "gradients-set-by-hand-beside-a-backward-for-another-optimizer": "b e01 B(h23:read ) A(:act )=stepped/0123/AB/1",
}
"""Gradients cleared, moved by hand, closed by the user, or never made by a backward."""

CLOSURES = {
    "one-backward-inside": "A{:wait b e01 )=stepped/01/A/1 A{:wait b e01 )=stepped/01/A/1",
    "three-evaluations": "A{:wait b e01 bc e01 bc e01 )=stepped/01/A/3",
    "moving-weights-between-evaluations-closes-nothing": "A{:wait b e01 bcm e01 bm e01 )=stepped/01/A/3",
    "a-closure-without-any-gradient": "A{:wait ) Q",
    "a-closure-that-only-returns-the-loss": "b e01 A{:wait )=stepped/01/A/1",
    "a-closure-that-adds-to-what-is-there": "b e01 A{:wait b e01 )=stepped/01/A/2",
    "a-closure-that-reaches-another-optimizers-parameters": "A{ b e0123 ) b=stepped/0123/A/1 e23 B( )=stepped/23/B/1",
    "one-loss-in-the-first-closure-and-a-plain-step-of-the-other": "A{ b e0123 ) B( )=stepped/0123/AB/1",
    "two-optimizers-whose-closures-only-return-the-loss": "b e0123 A{:wait ) B{:wait )=stepped/0123/AB/1",
    "a-plain-step-and-one-whose-closure-only-returns-the-loss": "b e0123 A(:act ) B{:wait )=stepped/0123/AB/1",
    "a-nested-step-inside-a-closure": "A{:wait b e01 A(:ignore ) )=stepped/01/A/1",
    "left-out-by-a-scaler": "A{ b e01 )inf=found_inf/01/A/1",
}
"""`pre` with a closure: the gradients are computed inside the step, which is one record however often it evaluates."""

INSIDE_BACKWARD = {
    "read-in-each-pre-and-closed-at-the-end": "b A(h01:read ) B(h23:read ) e0123=stepped/0123/AB/1",
    "gradients-cleared-inside-too": "b A(h01:read ) B(h23:read ) e=stepped/0123/AB/1",
    "one-optimizer-a-parameter": "b A(h0:read ) A(h1:read ) e01=stepped/01/A/1",
    "twice": "b A(h01:read ) e=stepped/01/A/1 b A(h01:read ) e=stepped/01/A/1",
    "one-owner-inside-and-one-after": "b A(h01:read ) e0123 B(:act )=stepped/0123/AB/1",
    "one-owner-inside-and-one-never": "b A(h01:read ) e0123 b=stepped/0123/A/1 A(h01:read ) e0123",
    "after-accumulating": "b e01 b A(h01:read ) e01=stepped/01/A/2",
    "a-parameter-that-nobody-owns": "b A(h0:read ) e04=stepped/04/A/1",
    "interrupted-after-a-step": "b A(h0:read ) x b=stepped/0/A/0 A(h01:read ) e01=stepped/01/A/1",
}
"""An optimizer stepping inside a backward: read in each `pre`, one record, closed when the backward returns."""

FOUND_INF = {
    "one": "b e01 A( )inf=found_inf/01/A/1 b e01 A( )=stepped/01/A/1",
    "both": "b e0123 A( )inf B( )inf=found_inf/0123/AB/1",
    "one-of-two": "b e0123 A( )inf B( )=stepped/0123/AB/1",
    "the-other-of-two": "b e0123 A( ) B( )inf=stepped/0123/AB/1",
    "one-of-two-and-a-new-backward": "b e0123 A( )inf b=found_inf/0123/A/1 e01",
    "inside-a-backward": "b A(h01:read )inf e01=found_inf/01/A/1",
    "at-exit": "b e0123 A( )inf Q=found_inf/0123/A/1",
    "the-users-word": "b e0123 A( )inf H=found_inf/0123/A/1",
}
"""`post` with `found_inf` set is a skip."""

NESTED = {
    "the-same-optimizer": "b e01 A(:act A(:ignore ) )=stepped/01/A/1",
    "three-deep": "b e01 A(:act A(:ignore A(:ignore ) ) )=stepped/01/A/1",
    "a-wrapper-that-steps-two-others": "b e01 A(:act B(:ignore ) B(:ignore ) )=stepped/01/A/1",
    "gradients-seen-in-the-inner-one-are-not-read-again": "A(h01:read A(h01:ignore ) )=stepped/01/A/0",
    "the-outer-ones-found-inf-counts": "b e01 A( A( ) )inf=found_inf/01/A/1",
    "the-inner-ones-does-not": "b e01 A( A( )inf )=stepped/01/A/1",
}
"""Of nested pre/post only the outermost counts."""

FAILURES = {
    "a-backward-that-raises-and-is-tried-again": "b x b e01 A(:act )=stepped/01/A/1",
    "a-micro-batch-that-raises": "b e01 b x b e01 A( )=stepped/01/A/2",
    "a-micro-batch-that-raises-and-is-given-up": "b e01 b x A(:act )=stepped/01/A/1",
    "what-a-failed-backward-left-is-read-in-the-pre-hook": "b x A(h01:read )=stepped/01/A/0",
    "a-failed-backward-and-then-cleared": "b e01 b x bc=skipped/01//1 e01",
    "only-failed-backwards": "b x b x Q",
    "a-closure-that-raises": "A{ b x !0 b e01 A(:act )=stepped/01/A/1",
    "a-closure-that-raises-after-its-backward": "A{ b e01 !0 bc=skipped/01//1 e01 A(:act )=stepped/01/A/1",
    "a-closure-that-raises-and-the-gradients-are-stepped": "A{ b e01 !0 A(:act )=stepped/01/A/1",
    "a-step-that-raises": "b e01 A( !0 A(:act )=stepped/01/A/1",
    "an-inner-step-that-raises": "b e01 A( A( !1 )=stepped/01/A/1",
    "a-post-hook-without-a-pre-hook": ") b e01 )=stepped/01/A/1",
}
"""Exceptions in a backward, a closure or a step, after which the loop goes on."""

SCRIPTS = {
    f"{group}:{name}": script
    for group, table in {
        "record": RECORD,
        "closing": CLOSING,
        "foreign": FOREIGN,
        "without-a-step": WITHOUT_A_STEP,
        "closures": CLOSURES,
        "inside-backward": INSIDE_BACKWARD,
        "found-inf": FOUND_INF,
        "nested": NESTED,
        "failures": FAILURES,
    }.items()
    for name, script in table.items()
}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_each_event_closes_what_it_should(script: str) -> None:
    play(script)


@pytest.mark.parametrize(
    "script",
    ["b e01 A( )=skipped/01/A/1", "b e01 A( )", "b e01 A(:read )=stepped/01/A/1", "b e01 A( )=stepped/01/A/2", "b=stepped///0"],
)
def test_a_script_that_expects_something_else_fails(script: str) -> None:
    with pytest.raises(AssertionError):
        play(script)


def test_an_endless_open_record_stays_open_and_counts() -> None:
    clock = Clock(dict(OWNERS))
    for _ in range(200):
        assert happen(clock, "b") == (None, None)
        assert happen(clock, "e01") == (None, None)
    assert clock.open is not None
    assert clock.open.backward_calls == 200


def test_a_plain_loop_asks_for_no_look_at_gradients_or_weights() -> None:
    clock = Clock(dict(OWNERS))
    for _ in range(3):
        assert clock.backward_begin(never, never) is None
        clock.backward_end([0, 1, 2, 3])
        for owner in ("A", "B"):
            assert clock.pre(owner, False, never) == (Pre.ACT, None)  # type: ignore[arg-type]
            outcome = clock.post(owner)
        assert outcome is Outcome.STEPPED


def test_weights_are_not_looked_at_while_gradients_pile_up_for_an_owner() -> None:
    """Looking at weights copies them: an accumulating loop with an optimizer must not pay for it."""
    clock = Clock(dict(OWNERS))
    clock.backward_begin(never, never)
    clock.backward_end([0, 1])
    assert clock.backward_begin(answers(False), never) is None


def test_a_step_that_has_stepped_is_closed_without_a_look() -> None:
    clock = Clock(dict(OWNERS))
    for event in ("b", "e0123", "A(", ")"):
        happen(clock, event)
    assert clock.backward_begin(never, never) is Outcome.STEPPED
    for event in ("e0123", "A(", ")"):
        happen(clock, event)
    assert clock.exit(never, never) is Outcome.STEPPED


def test_the_evaluations_of_a_closure_are_counted() -> None:
    """A second evaluation makes clip and raise refuse, and its gradients are not the record's; a second loss is no second evaluation."""
    evaluations = {
        "b e01 A( )=stepped/01/A/1": 1,
        "b e01 b e01 A( )=stepped/01/A/2": 1,
        "A{ b e01 )=stepped/01/A/1": 1,
        "A{ b e01 b e01 )=stepped/01/A/2": 1,
        "A{ b e01 bc e01 )=stepped/01/A/2": 2,
        "A{ b e01 bc e01 bc e01 )=stepped/01/A/3": 3,
        "A{ b e b e01 )=stepped/01/A/1": 1,
        "A{ b x bc e01 )=stepped/01/A/1": 1,
    }
    for script, expected in evaluations.items():
        (record,) = play(script)
        assert record.evaluations == expected, script


def test_an_owner_that_becomes_known_late_is_waited_for() -> None:
    owners: dict[int, Hashable] = {0: "A"}
    clock = Clock(owners)
    for event in ("b", "e01"):
        happen(clock, event)
    owners[1] = "B"
    clock.owners_changed()
    for event in ("A(", ")", "B("):
        assert happen(clock, event)[1] is None
    assert happen(clock, ")")[1] is Outcome.STEPPED
    assert clock.closed is not None
    assert clock.closed.stepped == {"A", "B"}


def test_an_owner_that_gives_its_parameters_away_is_not_waited_for() -> None:
    owners: dict[int, Hashable] = {0: "A", 1: "B"}
    clock = Clock(owners)
    for event in ("b", "e01"):
        happen(clock, event)
    owners[0] = "B"
    clock.owners_changed()
    happen(clock, "B(")
    assert happen(clock, ")")[1] is Outcome.STEPPED


def test_keys_of_owners_may_be_anything_hashable() -> None:
    first, second = object(), ("a", 1)
    clock = Clock({0: first, 1: second})
    clock.backward_begin(never, never)
    clock.backward_end(iter([0, 1, 0]))
    for owner, expected in ((second, None), (first, Outcome.STEPPED)):
        clock.pre(owner, False, never)  # type: ignore[arg-type]
        assert clock.post(owner) is expected


@pytest.mark.parametrize(
    ("outcome", "is_record"),
    [
        pytest.param(Outcome.STEPPED, True, id="stepped"),
        pytest.param(Outcome.FOUND_INF, True, id="found-inf"),
        pytest.param(Outcome.BY_HAND, True, id="by-hand"),
        pytest.param(Outcome.SKIPPED, True, id="skipped"),
        pytest.param(Outcome.DROPPED, False, id="dropped"),
        pytest.param(Outcome.UNFINISHED, False, id="unfinished"),
    ],
)
def test_skipped_updates_are_records_and_dropped_ones_are_not(outcome: Outcome, is_record: bool) -> None:
    assert outcome.is_record is is_record


# -- any sequence at all -----------------------------------------------------------------------------------------------------------

digits = st.sets(st.sampled_from("012345")).map(lambda chosen: "".join(sorted(chosen)))
events = st.one_of(
    st.sampled_from(["b", "bc", "bm", "bcm", "x", ")", ")inf", "F", "!0", "!1", "H", "Q", "Qm", "Ql", "A{", "B{"]),
    digits.map("e{}".format),
    digits.map("A(h{}".format),
    digits.map("B(h{}".format),
    digits.map("H{}".format),
    st.sampled_from(["own", "disown"]),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(events, max_size=40))
def test_any_sequence_of_events_closes_only_records_that_reached_something(sequence: list[str]) -> None:
    owners = dict(OWNERS)
    clock = Clock(owners)
    reached_so_far: set[int] = set()
    for event in sequence:
        if event in ("own", "disown"):
            owners.update(dict.fromkeys((4, 5), "B")) if event == "own" else owners.pop(0, None)
            clock.owners_changed()
            continue
        before = clock.open
        _, outcome = happen(clock, event)
        if event[0] in "eH":
            reached_so_far |= slots(event[1:])
        if event[0] in "AB" and event[1] == "(":
            reached_so_far |= slots(event[3:])
        if outcome is not None:
            record = clock.closed
            assert record is not None
            assert record.reached
            assert record.reached <= reached_so_far
            assert before is None or record is before, "what closes is what was open"
            assert clock.open is not record
            assert record.found_inf <= record.stepped
            if outcome in (Outcome.STEPPED, Outcome.FOUND_INF):
                assert record.stepped
            else:
                assert not record.stepped
            assert (outcome is Outcome.FOUND_INF) == (bool(record.stepped) and record.found_inf == record.stepped)
        elif before is not None:
            assert clock.open is before, "an open record goes only by closing"
        if clock.open is not None:
            assert clock.open.reached
            assert clock.open.owners == {owners[slot] for slot in clock.open.reached if slot in owners}
    clock.exit(answers(False))
    assert clock.open is None
    assert clock.steps_running() == 0
    assert not clock.in_backward


@settings(max_examples=100, deadline=None)
@given(st.lists(events.filter(lambda event: event not in ("own", "disown")), max_size=30))
def test_after_any_sequence_a_left_block_starts_afresh(sequence: list[str]) -> None:
    clock = Clock(dict(OWNERS))
    for event in sequence:
        happen(clock, event)
    happen(clock, "Q")
    assert [happen(clock, event) for event in ("b", "e01", "A(", ")")] == [
        (None, None),
        (None, None),
        (Pre.ACT, None),
        (None, Outcome.STEPPED),
    ]
