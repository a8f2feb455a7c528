"""Who is watched by whom: forks, orphans, two watches on one model, and user code that raises inside a watch."""

from __future__ import annotations

import gc
import logging
import os
import warnings
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from gradwatch import Finding, GradWatch, NonFiniteGradientError, Sampling, Severity
from gradwatch.history import History
from gradwatch.records import STATISTICS
from tests.networks import NETWORKS, Training, fingerprint
from tests.traces import changed, traces


def snapshot(training: Training) -> dict[str, object]:
    return traces(training.modules().values(), training.optimizers)


# -- fork --------------------------------------------------------------------------------------------------------------------------


def in_a_fork(child: object) -> str:
    """What `child()` returns in a forked process; its exception as text."""
    assert callable(child)
    read, write = os.pipe()
    with warnings.catch_warnings():
        # Python 3.12 warns of forking a process that has threads; data loaders do it all the same.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            answer = str(child())
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(write, answer.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as stream:
        answer = stream.read()
    assert os.waitpid(pid, 0)[1] == 0
    return answer


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_childs_watch_is_off_and_the_parents_goes_on(capfd: pytest.CaptureFixture[str]) -> None:
    training = NETWORKS["mlp"]()
    called: list[int] = []
    with GradWatch(training.model, on_step=lambda record: called.append(record.step)) as watch:
        training.run(3)
        capfd.readouterr()

        def child() -> str:
            training.run(3)
            return f"{watch.history.recorded} {len(called)}"

        assert in_a_fork(child) == "3 3"
        assert capfd.readouterr().err == ""
        training.run(2)
        assert watch.history.recorded == 5
        assert called == [0, 1, 2, 3, 4]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_leaving_the_block_in_a_forked_child_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    training = NETWORKS["mlp"]()
    watch = GradWatch(training.model)
    watch.attach()
    training.run(3)
    capfd.readouterr()

    def child() -> str:
        watch.detach()
        return "left"

    assert in_a_fork(child) == "left"
    assert capfd.readouterr().err == "", "the verdict is the parent's to give"
    watch.detach()
    assert capfd.readouterr().err != ""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_watch_made_in_a_forked_child_watches() -> None:
    training = NETWORKS["mlp"]()
    with GradWatch(training.model, console=False):
        training.run(2)

        def child() -> int:
            mine = NETWORKS["mlp"]()
            with GradWatch(mine.model, console=False) as watch:
                mine.run(4)
            return watch.history.recorded

        assert in_a_fork(child) == "4"


# -- orphans -----------------------------------------------------------------------------------------------------------------------


def test_a_new_watch_detaches_an_orphan_with_a_notice(caplog: pytest.LogCaptureFixture) -> None:
    """A notebook: a cell attached and was interrupted, its name is bound anew, the model is still the same."""
    training = NETWORKS["mlp"]()
    bare = snapshot(training)
    with caplog.at_level(logging.INFO, "gradwatch"):
        GradWatch(training.model, console=False).attach()
        training.run(2)
        watch = GradWatch(training.model, console=False)
        watch.attach()
        gc.collect()
    alone = snapshot(training)
    assert [record for record in caplog.records if record.name.startswith("gradwatch")], "somebody must be told"
    training.run(3)
    assert watch.history.recorded == 3
    watch.detach()
    assert not changed(bare, snapshot(training))
    watch.attach()
    # Not equal by identity (new hooks), equal in number: the orphan had left nothing when the second was attached.
    assert changed(bare, alone).keys() == changed(bare, snapshot(training)).keys()
    watch.detach()


def test_an_orphan_does_not_stop_a_new_watch_from_acting() -> None:
    training = NETWORKS["mlp"]()
    GradWatch(training.model, clip=1.0, console=False).attach()
    gc.collect()
    with GradWatch(training.model, clip=1e-3, console=False) as watch:
        training.run(2)
    assert (watch.history.stat("clip_coef") < 1).all()


def test_a_watch_left_attached_dies_with_its_model() -> None:
    training = NETWORKS["mlp"]()
    bare = NETWORKS["dropout"]()
    before = snapshot(bare)
    watch = GradWatch(training.model, console=False)
    watch.attach()
    training.run(2)
    references = [weakref.ref(watch), weakref.ref(training.model)]  # type: ignore[arg-type]
    del watch, training
    gc.collect()
    assert [reference() for reference in references] == [None, None]
    assert not changed(before, snapshot(bare))


# -- two watches on one model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "gan", "embedding_tied", "lstm"])
def test_two_watches_see_equal_numbers(name: str) -> None:
    alone = NETWORKS[name]()
    with GradWatch(alone.model, console=False) as lonely:
        alone.run(6)
    training = NETWORKS[name]()
    with GradWatch(training.model, console=False) as first, GradWatch(training.model, console=False) as second:
        training.run(6)
    assert not changed(fingerprint(alone), fingerprint(training))
    for statistic in STATISTICS.keys() - {"time"}:
        for watch in (first, second):
            np.testing.assert_array_equal(watch.history.stat(statistic), lonely.history.stat(statistic), err_msg=statistic)


@pytest.mark.parametrize("inner_first", [True, False])
def test_a_watch_that_leaves_leaves_the_other_one_whole(inner_first: bool) -> None:
    training = NETWORKS["mlp"]()
    before = snapshot(training)
    watches = [GradWatch(training.model, console=False) for _ in range(2)]
    for watch in watches:
        watch.attach()
    training.run(2)
    leaving, staying = watches[::-1] if inner_first else watches
    leaving.detach()
    training.run(3)
    assert (leaving.history.recorded, staying.history.recorded) == (2, 5)
    staying.detach()
    assert not changed(before, snapshot(training))


ACTING = [{"clip": 1.0}, {"on_nonfinite": "raise"}, {"clip": torch.nn.utils.clip_grad_norm_}]


@pytest.mark.parametrize("second", ACTING, ids=["clip", "raise", "callable"])
@pytest.mark.parametrize("first", ACTING, ids=["clip", "raise", "callable"])
def test_only_one_watch_may_act(first: dict[str, object], second: dict[str, object]) -> None:
    training = NETWORKS["mlp"]()
    actor = GradWatch(training.model, console=False, **first)
    actor.attach()
    with_one = snapshot(training)
    rival = GradWatch(training.model, console=False, **second)
    with pytest.raises(RuntimeError, match=r"act|clip|raise"):
        rival.attach()
    assert not changed(with_one, snapshot(training)), "the refused watch has hung nothing up"
    actor.detach()
    rival.attach()
    rival.detach()


def test_a_spectator_may_join_an_actor() -> None:
    training = NETWORKS["mlp"]()
    with GradWatch(training.model, clip=1e-3, console=False) as actor, GradWatch(training.model, console=False) as spectator:
        training.run(3)
    np.testing.assert_array_equal(actor.history.stat("grad_norm"), spectator.history.stat("grad_norm"))
    assert (actor.history.stat("clip_coef") < 1).all()
    np.testing.assert_allclose(spectator.history.stat("clip_coef"), actor.history.stat("clip_coef"), rtol=1e-3)


def test_watches_of_two_models_do_not_see_each_other() -> None:
    one, other = NETWORKS["mlp"](), NETWORKS["lstm"]()
    with GradWatch(one.model, console=False) as first, GradWatch(other.model, console=False) as second:
        one.run(3)
        other.run(5)
    assert (first.history.recorded, second.history.recorded) == (3, 5)


# -- user code that raises ---------------------------------------------------------------------------------------------------------


class Breaks:
    """User code of any kind: a rule, a sink, an `on_step`."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, _: object) -> Iterator[Finding]:
        self.calls += 1
        raise LookupError("the user's own mistake")


def loud(history: History) -> Iterator[Finding]:
    yield Finding("loud", Severity.WARNING, 0, message=f"{history.recorded} records")


def told(watch: GradWatch, caplog: pytest.LogCaptureFixture) -> tuple[int, int]:
    """How often the mistake stands in the notices and in the log."""
    logged = [r for r in caplog.records if r.name.startswith("gradwatch") and "the user's own mistake" in caplog.handler.format(r)]
    return sum("the user's own mistake" in str(notice) for notice in watch.notices), len(logged)


@pytest.mark.parametrize("kind", ["rules", "on_alert", "on_step"])
def test_user_code_that_raises_is_reported_once_and_switched_off(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    bare = NETWORKS["mlp"]()
    bare.run()
    expected = fingerprint(bare)
    broken = Breaks()
    heard: list[object] = []
    options: dict[str, object] = {"rules": [loud]}
    if kind == "rules":
        options["rules"] = [broken, loud]
    else:
        options[kind] = [broken, heard.append]
    training = NETWORKS["mlp"]()
    with caplog.at_level(logging.INFO, "gradwatch"), GradWatch(training.model, console=False, **options) as watch:
        training.run()
    assert not changed(expected, fingerprint(training)), "the training goes on"
    assert broken.calls == 1
    assert told(watch, caplog) == (1, 1)
    assert any("Traceback" in caplog.handler.format(record) for record in caplog.records), "with its traceback"
    assert [alert.rule for alert in watch.alerts] == ["loud"], "the others go on"
    if kind == "on_step":
        assert len(heard) == 12
    if kind == "on_alert":
        assert heard


def test_a_rule_that_raises_halfway_keeps_no_other_rule_from_speaking(caplog: pytest.LogCaptureFixture) -> None:
    def halfway(history: History) -> Iterator[Finding]:
        yield Finding("halfway", Severity.WARNING, 0, message="one")
        raise LookupError("the user's own mistake")

    training = NETWORKS["mlp"]()
    with GradWatch(training.model, console=False, rules=[halfway, loud]) as watch:
        training.run(4)
    assert "loud" in {alert.rule for alert in watch.alerts}
    assert told(watch, caplog)[0] == 1


@pytest.mark.parametrize("answer", [3, ["not a finding"], "text"], ids=["number", "list-of-text", "text"])
def test_a_rule_that_yields_no_findings_is_a_broken_rule(answer: object) -> None:
    training = NETWORKS["mlp"]()
    with GradWatch(training.model, console=False, rules=[lambda history: answer, loud]) as watch:
        training.run(4)
    assert {alert.rule for alert in watch.alerts} == {"loud"}
    assert len(watch.notices) == 1
    assert "rule" in str(watch.notices[0]).lower()


def test_what_a_clipper_raises_reaches_the_user() -> None:
    """Clipping is a part of the training: going on without it would train another network than was asked for."""
    training = NETWORKS["mlp"]()
    before = snapshot(training)

    def refused() -> None:
        with GradWatch(training.model, console=False, clip=Breaks()):
            training.run(4)

    with pytest.raises(LookupError, match="the user's own mistake"):
        refused()
    assert not changed(before, snapshot(training))


def test_raise_ends_the_training_because_it_was_asked_to() -> None:
    training = NETWORKS["mlp"]()
    (optimizer,) = training.optimizers
    before = snapshot(training)

    def poisoned() -> None:
        with GradWatch(training.model, console=False, on_nonfinite="raise"):
            training.run(3)
            weights = [p.clone() for p in optimizer.param_groups[0]["params"]]
            optimizer.zero_grad()
            assert isinstance(training.model, torch.nn.Module)
            (training.model(torch.randn(4, 12)).sum() * float("nan")).backward()
            try:
                optimizer.step()
            finally:
                assert all(torch.equal(a, b) for a, b in zip(weights, optimizer.param_groups[0]["params"], strict=True))

    with pytest.raises(NonFiniteGradientError, match=r"not finite"):
        poisoned()
    assert not changed(before, snapshot(training))


def test_the_window_bounds_what_is_kept() -> None:
    training = NETWORKS["mlp"]()
    with GradWatch(training.model, console=False, sampling=Sampling(window=5)) as watch:
        training.run(12)
    assert watch.history.steps.tolist() == [7, 8, 9, 10, 11]
