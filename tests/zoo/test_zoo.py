"""The zoo is what the README says of it, its score counts what it says it counts, and its second half is not looked at by accident."""

from __future__ import annotations

import importlib
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

from gradwatch import default_rules
from tests.zoo import __main__ as zoo
from tests.zoo import against, suite
from tests.zoo.case import Blobs, Case, Setup, classify, fit, mlp
from tests.zoo.outcome import Alarm, Heard, Outcome
from tests.zoo.plain import Plain
from tests.zoo.run import run
from tests.zoo.score import Score, score, table, wrong

KNOWN = {rule.__name__ for rule in default_rules()}  # type: ignore[attr-defined]
SICK, HEALTHY = 60, 30
"""The least numbers of cases in each half."""

# -- the cases ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [file for files in suite.FILES.values() for file in files])
def test_the_cases_of_a_file_have_each_a_name_an_address_and_a_proof(file: str) -> None:
    for case in importlib.import_module(file).CASES:
        assert case.name
        assert "http" in case.source or "arXiv" in case.source, f"{case.name}: source={case.source!r} has no address"
        assert callable(case.proof), f"{case.name} has no proof"


def test_no_two_cases_share_a_name() -> None:
    twice = [name for name, n in Counter(case.name for case in suite.cases()).items() if n > 1]
    assert not twice


def test_there_are_enough_cases_of_both_kinds_in_both_halves() -> None:
    for kind, least in ((True, SICK), (False, HEALTHY)):
        halves = {half: sum(bool(case.rules) is kind for case in suite.group(half)) for half in suite.FILES}
        # The first half has grown since: whoever develops needs many, whoever reports needs untouched ones.
        assert min(halves["first"], halves["second"]) >= least, halves


def test_a_rule_with_several_cases_has_them_in_both_halves() -> None:
    halves: dict[str, list[str]] = {}
    for half in suite.FILES:
        for case in suite.group(half):
            for family in {"non_finite" if rule.startswith("non_finite") else rule for rule in case.rules}:
                halves.setdefault(family, []).append(half)
    lopsided = {rule: found for rule, found in halves.items() if len(found) >= 2 and len(set(found)) == 1}
    assert set(lopsided) <= {"loss_plateau"}  # nobody who wrote the held-out half chose one


def test_cases_name_rules_that_exist() -> None:
    named = {rule for case in suite.cases() for rule in case.rules + case.also}
    assert named <= KNOWN


# -- the score ---------------------------------------------------------------------------------------------------------------------

CASE = Case("vanishing_in_the_first_layers", lambda seed: None, ("vanishing_gradient",), ("0", "2"), also=("loss_plateau",))  # type: ignore[arg-type]
ALARM = Alarm("vanishing_gradient", ("vanishing_gradient",), ("0", "2"), step=0, sent=10)
OWNERS = ("0", "2", "4")


def outcome(*alarms: Alarm, case: Case = CASE, error: str = "") -> Outcome:
    return Outcome(case, 0, Heard(alarms, OWNERS, error=error))


def test_a_fault_named_in_time_at_its_place_is_counted_as_such() -> None:
    total = score([outcome(ALARM)])
    assert total == Score(sick=1, named=1, in_time=1, placed=1, localised=1, alerts=1, delays=[10])
    assert total.reached
    assert wrong(outcome(ALARM)) == []


def test_a_false_alarm_counts() -> None:
    healthy = replace(CASE, rules=(), region=(), also=())
    total = score([outcome(case=healthy), outcome(ALARM, ALARM, case=healthy)])
    assert (total.healthy, total.alarmed, total.alerts) == (2, 1, 0)
    assert not total.reached
    assert wrong(outcome(ALARM, case=healthy)) == ["ALARMED"]


def test_an_alert_of_another_rule_is_not_true_unless_it_is_true_as_well() -> None:
    dead, plateau = replace(ALARM, rules=("dead_units",)), replace(ALARM, rules=("loss_plateau",), layers=())
    assert outcome(ALARM, dead, plateau).untrue == (dead,)
    total = score([outcome(ALARM, dead, plateau)])
    assert (total.alerts, total.untrue) == (3, 1)
    assert not total.reached


def test_a_wrong_layer_counts_as_not_localised_and_not_true() -> None:
    elsewhere = replace(ALARM, layers=("4", "0"))
    found = outcome(elsewhere)
    assert (found.named, found.in_time, found.localised, found.untrue) == (True, True, False, (elsewhere,))
    assert wrong(found) == ["not localised", "1 untrue"]
    assert outcome(elsewhere, ALARM).localised


@pytest.mark.parametrize(
    ("layer", "region", "inside"),
    [
        pytest.param("0", ("0",), True, id="the module itself"),
        pytest.param("block.0", ("block",), True, id="a module below the region"),
        pytest.param("blocks", ("block",), False, id="a name that only begins like it"),
        pytest.param("", ("0", "2", "4"), True, id="the model, of which all is sick"),
        pytest.param("", ("0", "2"), False, id="the model, of which something is well"),
    ],
)
def test_a_parent_is_in_the_region_if_all_below_it_is(layer: str, region: tuple[str, ...], inside: bool) -> None:
    assert outcome(replace(ALARM, layers=(layer,)), case=replace(CASE, region=region)).localised is inside


@pytest.mark.parametrize(
    ("case", "latest"),
    [
        pytest.param(CASE, 15, id="present from the start"),
        pytest.param(replace(CASE, onset=20), 31, id="begins later"),
        pytest.param(replace(CASE, name="decoder_never_called"), 30, id="never called"),
        pytest.param(replace(CASE, rules=("loss_plateau",)), 100, id="a plateau"),
        pytest.param(replace(CASE, rules=("loss_plateau",), onset=20), 121, id="a plateau that begins later"),
        pytest.param(replace(CASE, rules=("loss_plateau", "vanishing_gradient")), 15, id="not only a plateau"),
        pytest.param(replace(CASE, within=100), 100, id="the case says so"),
        pytest.param(replace(CASE, within=40, onset=20), 61, id="the case says so and it begins later"),
    ],
)
def test_a_late_alert_counts_as_not_in_time(case: Case, latest: int) -> None:
    alarm = replace(ALARM, step=case.onset, rules=case.rules)
    assert outcome(replace(alarm, sent=latest), case=case).in_time
    late = outcome(replace(alarm, sent=latest + 1), case=case)
    assert (late.named, late.in_time) == (True, False)
    assert score([late]).in_time == 0
    assert wrong(late) == ["late"]


def test_an_alert_before_the_fault_neither_names_it_nor_is_true() -> None:
    case = replace(CASE, onset=20)
    early = replace(ALARM, step=18, sent=19)
    assert (outcome(early, case=case).named, outcome(early, case=case).untrue) == (False, (early,))
    assert outcome(replace(early, step=19), case=case).named


def test_a_fault_without_a_place_is_not_counted_among_the_localised() -> None:
    total = score([outcome(replace(ALARM, layers=("4",)), case=replace(CASE, region=()))])
    assert (total.named, total.placed, total.localised, total.untrue) == (1, 0, 0, 0)


def test_a_run_that_raises_misses_the_reach() -> None:
    assert not score([outcome(ALARM, error="Traceback")]).reached


def test_the_table_has_shares_and_quantiles() -> None:
    text = table({"gradwatch": score([outcome(ALARM), outcome()])})
    assert "1 = 50.0 %" in text
    assert "updates to the verdict, median" in text


# -- runs --------------------------------------------------------------------------------------------------------------------------


def stuck(seed: int) -> Setup:
    """Twelve Sigmoids: the gradient does not reach the first layers."""
    model = mlp(nn.Sigmoid, 12)
    return fit(model, classify(model, Blobs(seed)), updates=20)


def unstable(seed: int) -> Setup:
    """A plain network whose input holds a NaN in update 5."""
    model, data = mlp(nn.ReLU, 1), Blobs(seed)

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        x, y = data()
        batch.calls += 1  # type: ignore[attr-defined]
        return (x * torch.nan if batch.calls == 6 else x), y  # type: ignore[attr-defined]

    batch.calls = 0  # type: ignore[attr-defined]
    return fit(model, classify(model, batch), updates=10)


def test_a_run_under_the_watch_is_named_in_time_and_localised() -> None:
    found = run(Case("stuck", stuck, ("vanishing_gradient",), tuple(str(i) for i in range(0, 24, 2))), 0)
    assert found.in_time
    assert found.localised
    assert not found.untrue
    assert found.heard.alarms[0].advice


def test_a_run_that_raises_is_an_outcome() -> None:
    def build(seed: int) -> Setup:
        raise ZeroDivisionError("as a typo in a case would")

    assert "as a typo in a case would" in run(Case("broken", build), 0).heard.error


# -- the command -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hidden(monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes a zoo of one case, of the second half, that is called healthy and is not, and whose proof fails; gives its name."""

    def proof(plain: Plain) -> str:
        raise AssertionError("the secret is out")

    case = Case("secret", stuck, source="https://", proof=proof)
    monkeypatch.setattr(suite, "group", lambda name: [case])
    return case.name


@pytest.mark.parametrize("options", [[], ["--proofs"], ["secret"]], ids=["runs", "proofs", "named"])
def test_the_second_half_prints_only_totals_unless_told_to(
    options: list[str], hidden: str, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo.main(["--half", "second", "--seeds", "1", *options])
    printed = "".join(capsys.readouterr())
    assert "second: " in printed
    assert "secret" not in printed
    zoo.main(["--half", "second", "--seeds", "1", "--show", *options])
    assert hidden in capsys.readouterr().out


def test_check_fails_where_the_reach_is_missed(hidden: str) -> None:
    assert zoo.main(["--half", "second", "--seeds", "1"]) == 0
    assert zoo.main(["--half", "second", "--seeds", "1", "--check"]) == 1


def test_silence_is_that_no_healthy_run_is_alarmed_and_none_raises() -> None:
    assert Score(sick=1).silent
    assert not Score(sick=1).reached
    assert not Score(healthy=1, alarmed=1).silent
    assert not Score(healthy=1, broken=1).silent


def test_a_failed_proof_fails_the_command(hidden: str) -> None:
    assert zoo.main(["--half", "second", "--seeds", "1", "--proofs"]) == 1


def test_a_name_that_no_case_has_is_said(hidden: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert zoo.main(["--half", "second", "no_such_case"]) == 2
    assert "no_such_case" in capsys.readouterr().err


# -- other tools -------------------------------------------------------------------------------------------------------------------


def test_the_words_of_other_tools_cover_rules_that_exist() -> None:
    covered = {rule for tool in against.TOOLS.values() for rules in tool.names.values() for rule in rules}
    assert covered <= KNOWN


def test_a_tool_is_held_against_the_same_truth_and_repeats_are_not_counted() -> None:
    case = Case("unstable", unstable, ("non_finite_input",), onset=5)
    found = Outcome(case, 0, against.TOOLS["nan_checks"].listen(case, 0))
    assert found.in_time
    assert [(a.name, a.sent) for a in found.heard.alarms] == [("loss is not finite", 6), ("gradient is not finite", 6)]
    assert found.heard.alarms[1].layers == ("0", "2")


def test_a_tool_that_is_not_installed_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], hidden: str
) -> None:
    absent = replace(against.TOOLS["nan_checks"], package="no-such-tool", module="no_such_tool")
    monkeypatch.setitem(against.TOOLS, "absent", absent)
    assert zoo.main(["--half", "second", "--against", "absent"]) == 2
    assert "pip install no-such-tool" in capsys.readouterr().err
