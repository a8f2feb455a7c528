"""The pytest plugin, seen from outside: pytest runs over files of its own in processes of their own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

import gradwatch.integrations.pytest as plugin

ROOT = Path(__file__).parent.parent.parent

INNER = """
import gc
import weakref

import pytest
import torch
from torch import nn

from gradwatch import Finding, NonFiniteGradientError, Severity
from gradwatch.capture.tape import TAPE

kept = []


def sigmoids():
    return nn.Sequential(*[layer for _ in range(10) for layer in (nn.Linear(16, 16), nn.Sigmoid())], nn.Linear(16, 1))


class Small(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))


def train(model, updates=30, factor=1.0):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(updates):
        x = torch.randn(32, 16)
        optimizer.zero_grad()
        (factor * nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))).backward()
        optimizer.step()


def finds(rule, severity):
    def found(history):
        yield Finding(rule, severity, 0, message=f"{rule} of 3", evidence={"number": 3.0})

    found.__name__ = rule
    return found


def at_the_end(history):  # once it is detached, not before
    if history.ended:
        yield Finding("at_the_end", Severity.WARNING, 0, message="3")


error, warning, info = finds("an_error", Severity.ERROR), finds("a_warning", Severity.WARNING), finds("an_info", Severity.INFO)


@pytest.fixture(autouse=True)
def seeded():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def test_healthy(gradwatch):
    model = Small()
    with gradwatch(model) as watch:
        train(model)
    kept.append(weakref.ref(watch))


def test_a_watch_dies_with_its_test():
    gc.collect()
    assert [ref() for ref in kept] == [None]


def test_sick(gradwatch):
    model = sigmoids()
    with gradwatch(model):
        train(model)


def test_allowed(gradwatch):
    model = sigmoids()
    with gradwatch(model, allow="vanishing_gradient"):
        train(model)


def test_one_of_two_allowed(gradwatch):
    model = Small()
    with gradwatch(model, rules=(error, warning), allow=["an_error", "dead_units"]):
        train(model, 2)


def test_unknown_rule(gradwatch):
    gradwatch(Small(), rules=[error], allow=("dead_unit",))


@pytest.mark.parametrize("allow", [3, [3], None], ids=["number", "numbers", "none"])
def test_no_rule(gradwatch, allow):
    with pytest.raises(TypeError, match="needs names of rules"):
        gradwatch(Small(), allow=allow)


def test_arguments_are_those_of_the_class(gradwatch):
    with pytest.raises(TypeError, match="nn.Module"):
        gradwatch(3)
    with pytest.raises(ValueError, match="on_nonfinite"):
        gradwatch(Small(), on_nonfinite="no")


def test_info(gradwatch):
    model = Small()
    with gradwatch(model, rules=[info]) as watch:
        train(model, 2)
    assert [alert.rule for alert in watch.alerts] == ["an_info"]


def test_exception(gradwatch):
    model = sigmoids()
    with gradwatch(model):
        train(model)
        raise LookupError("the test's own")


def test_alerts_and_assertion(gradwatch):
    model = Small()
    with gradwatch(model, rules=[warning]) as watch:
        train(model, 2)
    assert not watch.alerts, "the assertion's own"


def test_raised_before_the_step(gradwatch):
    model = Small()
    with gradwatch(model, on_nonfinite="raise", allow=("non_finite_loss", "non_finite_gradient")):
        with pytest.raises(NonFiniteGradientError):
            train(model, factor=float("nan"))


def test_two_watches(gradwatch):
    healthy, sick = Small(), nn.Sequential(nn.Linear(16, 1))
    with gradwatch(healthy, rules=()), gradwatch(sick, rules=[error]):
        train(healthy, 2)
        train(sick, 2)


def test_two_models(gradwatch):
    models = {"a": Small(), "b": nn.Linear(16, 1)}
    with gradwatch(models, rules=[error]):
        train(models["a"], 2)


@pytest.mark.parametrize("rule", [error, info], ids=["error", "info"])
def test_parametrised(gradwatch, rule):
    model = Small()
    with gradwatch(model, rules=[rule]):
        train(model, 2)


def test_twice(gradwatch):
    model = Small()
    watch = gradwatch(model)
    for _ in range(2):
        with watch:
            train(model, 10)


def test_never_entered(gradwatch):
    gradwatch(Small())


def test_still_attached(gradwatch):
    model = Small()
    gradwatch(model, rules=[at_the_end]).attach()
    train(model, 2)


@pytest.fixture
def failing(gradwatch):
    gradwatch(Small()).attach()
    raise LookupError("the fixture's own")


def test_never_begun(failing):
    pass


def test_it_is_not_afterwards():
    assert list(TAPE.listeners()) == []


@pytest.fixture
def watched(gradwatch):
    model = Small()
    with gradwatch(model, rules=[warning]):
        yield model


def test_block_around_the_test(watched):
    train(watched, 2)


def test_exception_in_a_block_around_the_test(watched):
    train(watched, 2)
    raise LookupError("the test's own")


@pytest.mark.xfail(strict=True)
def test_expected(gradwatch):
    model = Small()
    with gradwatch(model, rules=[error]):
        train(model, 2)


@pytest.mark.xfail(raises=LookupError, strict=True)
def test_expected_for_another_reason(gradwatch):
    model = Small()
    with gradwatch(model, rules=[error]):
        train(model, 2)


def test_skipped(gradwatch):
    model = Small()
    with gradwatch(model, rules=[error]):
        train(model, 2)
        pytest.skip("the rest")


def test_verdict_fails(gradwatch, monkeypatch):
    monkeypatch.setattr("gradwatch.watch.verdict_of", lambda watch: 1 / 0)
    model = Small()
    with gradwatch(model):
        train(model, 2)


def test_not_asked():
    pass
"""

OUTCOMES = {
    "healthy": "PASSED",
    "a_watch_dies_with_its_test": "PASSED",
    "sick": "FAILED",
    "allowed": "PASSED",
    "one_of_two_allowed": "FAILED",
    "unknown_rule": "FAILED",
    "no_rule[number]": "PASSED",
    "no_rule[numbers]": "PASSED",
    "no_rule[none]": "PASSED",
    "arguments_are_those_of_the_class": "PASSED",
    "info": "PASSED",
    "exception": "FAILED",
    "alerts_and_assertion": "FAILED",
    "raised_before_the_step": "PASSED",
    "two_watches": "FAILED",
    "two_models": "FAILED",
    "parametrised[error]": "FAILED",
    "parametrised[info]": "PASSED",
    "twice": "PASSED",
    "never_entered": "FAILED",
    "still_attached": "FAILED",
    "never_begun": "ERROR",
    "it_is_not_afterwards": "PASSED",
    "block_around_the_test": "FAILED",
    "exception_in_a_block_around_the_test": "FAILED",
    "expected": "XFAIL",
    "expected_for_another_reason": "FAILED",
    "verdict_fails": "PASSED",
    "not_asked": "PASSED",
    "trains": "PASSED",
}


@dataclass(frozen=True)
class Session:
    """What a run of pytest printed with `-rA`.

    Attributes:
        output: all of it.
        outcomes: "PASSED", "FAILED" and so on, by the test's name without "test_".
        reports: what stands under the test's headline, failure and captured output.
    """

    output: str
    outcomes: dict[str, str]
    reports: dict[str, str]


def run_pytest(folder: Path, *arguments: str, path: Path | None = None) -> Session:
    """Runs pytest in a folder, with none of the plugins that are installed here; `path`: where the package lies, and what is beside it."""
    paths = [str(one) for one in (path, ROOT) if one is not None]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "COLUMNS": "200"}
    for name in ("PYTEST_ADDOPTS", "PYTEST_PLUGINS", "CI"):
        env.pop(name, None)
    command = [sys.executable, "-m", "pytest", "-W", "error", "-p", "no:cacheprovider", "--rootdir", str(folder), *arguments]
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert not result.stderr, result.stderr
    assert result.returncode in (0, 1), result.stdout
    outcomes = {m[2]: m[1] for m in re.finditer(r"^([A-Z]+) test_\w+\.py::test_(\S+)", result.stdout, re.MULTILINE)}
    parts = re.split(r"^_+ test_(\S+) _+$", result.stdout.partition("short test summary info")[0], flags=re.MULTILINE)
    return Session(result.stdout, outcomes, dict(zip(parts[1::2], parts[2::2], strict=True)))


def example() -> str:
    """The test in the plugin's own documentation."""
    found = re.search(r"```python\n(.*?)```", plugin.__doc__ or "", re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """All of `INNER`, run once."""
    folder = tmp_path_factory.mktemp("inner")
    (folder / "test_inner.py").write_text(INNER, encoding="utf-8")
    (folder / "test_example.py").write_text(example(), encoding="utf-8")
    return run_pytest(folder, "-rA", "-p", "gradwatch.integrations.pytest")


def test_a_test_fails_for_alerts_that_are_not_allowed_and_for_nothing_else(session: Session) -> None:
    """And none is an error at teardown."""
    assert session.outcomes == OUTCOMES, session.output
    assert "1 skipped" in session.output
    assert "1 error in " in session.output.splitlines()[-1], "the fixture of the test's own"


def test_a_failure_names_model_rule_layer_cause_and_remedy(session: Session) -> None:
    report = session.reports["sick"]
    assert "gradwatch, Sequential: 1 finding in 30 updates: vanishing gradient" in report
    assert "WARNING vanishing_gradient (open), seen in " in report
    assert re.search(r"where: layers 0, 2, ", report)
    assert re.search(r"why: +10 Sigmoids pass on ", report)
    assert re.search(r"try: +Use ReLU or GELU instead", report)
    assert "Traceback" not in report
    assert "integrations" not in report
    assert "Captured" not in report, "nothing is told twice"
    assert report.isascii()


def test_a_watch_that_judged_nothing_fails_the_test(session: Session) -> None:
    """Else a forgotten `with` would pass whatever the training does."""
    assert "! gradwatch, Small: it was never attached, so nothing was judged" in session.reports["never_entered"]


def test_a_failure_of_the_test_itself_is_shown_beside_the_verdict(session: Session) -> None:
    failure, _, captured = session.reports["exception"].partition("Captured gradwatch call")
    assert "LookupError: the test's own" in failure
    assert "vanishing" not in failure
    assert "1 finding in 30 updates" in captured
    assert "stopped by LookupError" in captured
    assert "Use ReLU or GELU instead" in captured
    assert re.search(r"FAILED \S+::test_exception - LookupError: the test's own", session.output)
    failure, _, captured = session.reports["alerts_and_assertion"].partition("Captured gradwatch call")
    assert "the assertion's own" in failure
    assert "WARNING a_warning (open)" in captured
    assert "stopped by LookupError" in session.reports["exception_in_a_block_around_the_test"]


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("healthy", "+ gradwatch, Small: healthy after 30 updates"),
        ("trains", "+ gradwatch, Sequential: healthy after 30 updates"),
        ("allowed", "! gradwatch, Sequential: 1 finding in 30 updates"),
        ("info", "+ gradwatch, Small: nothing found in 2 updates"),
        ("twice", "+ gradwatch, Small: healthy after 20 updates"),
        ("verdict_fails", "gradwatch failed to give its verdict; please report this:"),
    ],
)
def test_a_passing_test_has_the_verdict_in_its_report(name: str, verdict: str, session: Session) -> None:
    _, _, captured = session.reports[name].partition("Captured gradwatch call")
    assert verdict in captured
    assert "what:" not in captured


def test_a_test_without_the_fixture_has_nothing_in_its_report(session: Session) -> None:
    assert "not_asked" not in session.reports
    assert "it_is_not_afterwards" not in session.reports


def test_what_is_allowed_is_left_out_of_the_failure(session: Session) -> None:
    assert "WARNING a_warning (open)" in session.reports["one_of_two_allowed"]
    assert "ERROR an_error" not in session.reports["one_of_two_allowed"]


def test_an_unknown_rule_is_an_error_at_the_call_that_lists_the_rules(session: Session) -> None:
    report = session.reports["unknown_rule"]
    assert "ValueError: gradwatch(allow=...): there is no rule 'dead_unit'; there are an_error, " in report
    assert "dead_units" in report
    assert "def _allowed" not in report
    assert "rules_of(watch)" not in report


def test_each_watch_is_told_by_its_model(session: Session) -> None:
    failure, _, captured = session.reports["two_watches"].partition("Captured gradwatch call")
    assert "X gradwatch, Sequential: 1 finding in " in failure
    assert "Small" not in failure
    assert "+ gradwatch, Small: nothing found in " in captured
    assert "Sequential" not in captured
    assert "X gradwatch, Small and Linear: 1 finding in " in session.reports["two_models"]


def test_the_verdict_is_printed_where_nothing_is_captured(tmp_path: Path) -> None:
    (tmp_path / "test_example.py").write_text(example(), encoding="utf-8")
    session = run_pytest(tmp_path, "-s", "-p", "gradwatch.integrations.pytest")
    assert session.output.count("+ gradwatch, Sequential: healthy after 30 updates") == 1


@pytest.mark.parametrize(("option", "there"), [("gradwatch", True), ("no:gradwatch", False)])
def test_the_entry_point_is_the_plugin(option: str, there: bool, tmp_path: Path) -> None:
    """As pytest finds it in an environment that gradwatch is installed in, and turned off."""
    name, _, module = entry_point().partition(" = ")
    assert (name, module) == ("gradwatch", plugin.__name__)
    installed = tmp_path / "gradwatch-0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: gradwatch\nVersion: 0\n", encoding="utf-8")
    (installed / "entry_points.txt").write_text(f"[pytest11]\n{entry_point()}\n", encoding="utf-8")
    session = run_pytest(tmp_path, "--fixtures", "-p", option, path=tmp_path)
    assert (f"fixtures defined from {plugin.__name__}" in session.output) == there, session.output


def entry_point() -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ((name, module),) = project["entry-points"]["pytest11"].items()
    return f"{name} = {module}"


def load_plugin(root: Path) -> subprocess.CompletedProcess[str]:
    """Imports the plugin of the package under `root` as pytest does in every session, in a process of its own."""
    code = """
        import sys
        import gradwatch.integrations.pytest as plugin
        assert plugin.__file__.startswith(sys.argv[1]), plugin.__file__
        for name in ("torch", "numpy", "rich"):
            assert name not in sys.modules, f"the plugin loads {name}"
    """
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), str(root)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(root), "PATH": ""})


def test_the_plugin_loads_neither_torch_nor_numpy_nor_rich() -> None:
    result = load_plugin(ROOT)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("module", ["__init__", "integrations/__init__", "integrations/pytest"])
@pytest.mark.parametrize("name", ["torch", "numpy", "rich"])
def test_the_check_of_what_it_loads_can_fail(name: str, module: str, tmp_path: Path) -> None:
    """The same check, over a copy of the package in which one module imports one of them."""
    shutil.copytree(ROOT / "gradwatch", tmp_path / "gradwatch", ignore=shutil.ignore_patterns("__pycache__"))
    # A stand-in is as good: only its name is asked for.
    (tmp_path / f"{name}.py").write_text("", encoding="utf-8")
    path = tmp_path / "gradwatch" / f"{module}.py"
    path.write_text(path.read_text(encoding="utf-8") + f"\nimport {name}\n", encoding="utf-8")
    result = load_plugin(tmp_path)
    assert result.returncode != 0
    assert f"the plugin loads {name}" in result.stderr, result.stderr
