"""`gradwatch run` on scripts of different make, each as a process of its own beside the same script under bare `python`."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent

import pytest

HEAD = """\
import torch
from torch import nn
torch.set_num_threads(1)
torch.manual_seed(0)

class Net(nn.Module):
    def __init__(self, inputs=8, outputs=2):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(inputs, 16), nn.Tanh())
        self.head = nn.Linear(16, outputs)

    def forward(self, x):
        return self.head(self.body(x))

def batch():
    x = torch.randn(32, 8)
    return x, (x[:, 0] > 0).long()

def train(model, optimizer, updates=20):
    for _ in range(updates):
        x, y = batch()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    return float(loss.detach())

def digest(*models):
    return [float(p.detach().double().sum()) for model in models for p in model.parameters()]
"""

HEALTHY = r"\A✓ gradwatch: healthy after {} updates; [^\n]* over {} layers; cost [^\n]*\n\Z"

ENV = {
    key: value
    for key, value in os.environ.items()
    if not key.startswith(("OMP_", "COV_", "PYTEST_", "PYTHON")) and key not in ("COLUMNS", "RANK")
} | {"PYTHONIOENCODING": "utf-8"}


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


def start(command: Sequence[str], folder: Path, stdin: str = "") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=ENV,
        text=True,
        encoding="utf-8",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    process.stdin.write(stdin)
    process.stdin.flush()
    return process


def end(process: subprocess.Popen[str]) -> Result:
    out, err = process.communicate(timeout=180)
    return Result(process.returncode, out, err)


def watch(folder: Path, source: str, *args: str, options: Sequence[str] = ()) -> Result:
    """Run a script under `gradwatch run`."""
    (folder / "train.py").write_text(HEAD + dedent(source), encoding="utf-8")
    return end(start(["-m", "gradwatch", "run", *options, "train.py", *args], folder))


# -- the same as under python ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Make:
    """A script of some make.

    Attributes:
        source: what stands below `HEAD`.
        verdict: pattern of the watched run's stderr, after what the bare run prints there.
        args: what stands behind `python` to run it.
        code: its exit code.
        stdin: what it can read.
        files: further files.
        beside: run it under bare `python` too, and compare exit code, stdout and its own stderr.
    """

    source: str
    verdict: str
    args: tuple[str, ...] = ("train.py",)
    code: int = 0
    stdin: str = ""
    files: dict[str, str] = field(default_factory=dict)
    beside: bool = True


MAKES = {
    "function_main": Make(
        """
        def main():
            model = Net()
            print(train(model, torch.optim.AdamW(model.parameters())), digest(model), __name__, __file__)

        if __name__ == "__main__":
            main()
        """,
        HEALTHY.format(20, 2),
    ),
    "top_level": Make(
        """
        import pickle, sys

        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(20):
            x, y = batch()
            optimizer.zero_grad(set_to_none=False)
            nn.functional.cross_entropy(model(x), y).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        copy = pickle.loads(pickle.dumps(model))
        assert type(copy) is Net and sys.modules["__main__"].Net is Net
        print(digest(copy), Net.__module__, __file__, __spec__, __package__, __builtins__, __cached__, type(__loader__))
        """,
        HEALTHY.format(20, 2),
    ),
    "arguments_and_stdin": Make(
        """
        import argparse, os, sys

        parser = argparse.ArgumentParser()
        parser.add_argument("--clip", type=float)
        parser.add_argument("-m", dest="message")
        parser.add_argument("rest", nargs="*")
        print(parser.parse_args(), sys.argv, sys.path[0], os.getcwd(), input(), sys.stdin.read())
        model = Net()
        print(train(model, torch.optim.Adam(model.parameters())))
        """,
        HEALTHY.format(20, 2),
        args=("train.py", "--clip", "3", "-m", "hello", "--", "--help", "last"),
        stdin="first line\nthe rest",
    ),
    "lbfgs": Make(
        """
        model = Net()
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)
        x, y = batch()

        def closure():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y) + 0.01 * sum((p**2).sum() for p in model.parameters())
            loss.backward()
            return loss

        for _ in range(12):
            loss = optimizer.step(closure)
        print(float(loss.detach()), digest(model))
        """,
        HEALTHY.format(12, 2),
    ),
    "two_models": Make(
        """
        generator, discriminator = Net(4, 8), Net(8, 1)
        of_g = torch.optim.Adam(generator.parameters(), lr=1e-3)
        of_d = torch.optim.Adam(discriminator.parameters(), lr=1e-3)
        bce = nn.BCEWithLogitsLoss()
        for _ in range(20):
            of_d.zero_grad()
            fake = generator(torch.randn(32, 4))
            bce(discriminator(batch()[0]), torch.ones(32, 1)).backward()
            bce(discriminator(fake.detach()), torch.zeros(32, 1)).backward()
            of_d.step()
            of_g.zero_grad()
            bce(discriminator(fake), torch.ones(32, 1)).backward()
            of_g.step()
        print(digest(generator, discriminator))
        """,
        r"\A✓ gradwatch, discriminator: healthy after 20 updates; .*\n✓ gradwatch, generator: healthy after 20 updates; .*\n\Z",
    ),
    "module": Make(
        """
        import sys
        from .data import SCALE

        model = Net()
        print(train(model, torch.optim.SGD(model.parameters(), lr=SCALE)))
        print(__name__, __package__, __spec__.name, __file__, sys.argv, sys.path[0])
        """,
        HEALTHY.format(20, 2),
        args=("-m", "package.train", "--lr", "3"),
        files={"package/__init__.py": "", "package/data.py": "SCALE = 0.1\n"},
    ),
    "package": Make(
        "print('never run')",
        r"\A▲ gradwatch: stopped by sys\.exit\(3\) after 20 updates, nothing found before; ",
        args=("-m", "package"),
        files={
            "package/__init__.py": "",
            "package/__main__.py": HEAD
            + "model = Net()\nprint(train(model, torch.optim.SGD(model.parameters(), lr=0.1)), __spec__.name)\n"
            "import sys\nsys.exit(3)\n",
        },
        code=3,
        beside=False,
    ),
    "crash": Make(
        """
        model = Net()

        def explode(grad):
            try:
                {}["missing"]
            except KeyError as error:
                raise ValueError("the batch was spoilt") from error

        train(model, torch.optim.SGD(model.parameters(), lr=0.1), updates=12)
        model.head.weight.register_hook(explode)
        train(model, torch.optim.SGD(model.parameters(), lr=0.1))
        """,
        r"\A▲ gradwatch: stopped by ValueError after 12 updates, nothing found before; [^\n]* over 2 layers; cost [^\n]*\n\Z",
        code=1,
    ),
    "exit_message": Make(
        """
        import sys

        model = Net()
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), updates=3)
        sys.exit("no data left")
        """,
        r"\A▲ gradwatch: stopped by sys\.exit after 3 updates, nothing found before;",
        code=1,
    ),
    "syntax_error": Make(
        "def broken(:",
        r"\A▲ gradwatch: stopped by SyntaxError before torch was imported, so there was nothing to watch\n\Z",
        code=1,
    ),
    "never_trains": Make(
        "print(Net()(batch()[0]).shape)",
        r"\A▲ gradwatch: this script trained nothing: no backward pass and no optimizer step was seen \(.*\)\n\Z",
        beside=False,
    ),
    "by_hand": Make(
        """
        model = Net()
        for _ in range(12):
            x, y = batch()
            nn.functional.cross_entropy(model(x), y).backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
                    p.grad = None
        print(digest(model))
        """,
        r"\A▲ gradwatch: saw 12 backward passes and no optimizer step, so nothing was judged; [^\n]*GradWatch\(model\)[^\n]*\n\Z",
        beside=False,
    ),
    "bare_tensors": Make(
        """
        w = torch.randn(8, requires_grad=True)
        optimizer = torch.optim.SGD([w], lr=0.1)
        for _ in range(12):
            optimizer.zero_grad()
            ((batch()[0] @ w) ** 2).mean().backward()
            optimizer.step()
        print(w.tolist())
        """,
        r"\A▲ gradwatch: saw 12 backward passes and 12 steps of SGD, whose parameters belong to no nn.Module, so nothing was judged\n\Z",
        beside=False,
    ),
    "workers": Make(
        """
        from torch.utils.data import DataLoader, Dataset

        class Points(Dataset):
            def __len__(self):
                return 160

            def __getitem__(self, i):
                x = torch.linspace(-1, 1, 8).roll(i) + i % 7
                return x, int(x[0] > 3)

        if __name__ == "__main__":
            model = Net()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for context in ("fork", "spawn"):
                for x, y in DataLoader(Points(), batch_size=16, num_workers=2, multiprocessing_context=context):
                    optimizer.zero_grad()
                    loss = nn.functional.cross_entropy(model(x), y)
                    loss.backward()
                    optimizer.step()
            print(float(loss.detach()), digest(model))
        """,
        HEALTHY.format(20, 2),
    ),
    "threads_and_exit_handlers": Make(
        """
        import atexit, sys, threading

        # Both go on after the last line.
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        threading.Thread(target=train, args=(model, optimizer)).start()
        atexit.register(lambda: print("good bye", file=sys.stderr))
        """,
        HEALTHY.format(20, 2).replace(r"\A", r"\Agood bye\n"),
        beside=False,
    ),
    "forks": Make(
        """
        import os, sys

        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train(model, optimizer, updates=12)
        child = os.fork()
        if not child:
            train(model, optimizer, updates=5)
            sys.exit(0)
        os.waitpid(child, 0)
        """,
        HEALTHY.format(12, 2),
        beside=False,
    ),
    "lightning_like": Make(
        """
        class Trainer:
            def __init__(self):
                self.model = Net()
                self.optimizer = torch.optim.AdamW(self.model.parameters())

            def fit(self):
                for _ in range(20):
                    self.optimizer.step(self.closure)

            def closure(self):
                x, y = batch()
                self.optimizer.zero_grad()
                loss = nn.functional.cross_entropy(self.model(x), y)
                loss.backward()
                return loss

        trainer = Trainer()
        trainer.fit()
        print(digest(trainer.model))
        """,
        HEALTHY.format(20, 2),
    ),
    "asks_for_torch_before_it_imports_it": Make(
        """
        """,
        HEALTHY.format(20, 2),
        args=("early.py",),
        files={
            "early.py": "import importlib.util, os\n"
            "assert importlib.util.find_spec('torch') is not None\n"
            "os.environ['OMP_NUM_THREADS'] = '3'\n"  # read when torch is loaded, not later
            "import torch\n"
            "print(torch.get_num_threads(), torch.__spec__.loader, torch.__loader__)\n"
            "from train import Net, train\n"
            "model = Net()\n"
            "print(train(model, torch.optim.SGD(model.parameters(), lr=0.1)))\n"
        },
    ),
}


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in MAKES.items()])
def test_a_script_runs_as_under_python_and_ends_with_the_verdict(make: Make, tmp_path: Path) -> None:
    source = HEAD + dedent(make.source) if make.source != "def broken(:" else make.source
    for name, text in {"train.py": source, "package/train.py": source, **make.files}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    commands = [("-m", "gradwatch", "run", *make.args), *([make.args] if make.beside else [])]
    processes = [start(command, tmp_path, make.stdin) for command in commands]
    watched, *bare = [end(process) for process in processes]
    assert watched.code == make.code, watched.err
    own_stderr = ""
    for result in bare:
        own_stderr = tracker_free(result.err)
        assert result.code == make.code
        assert address_free(watched.out) == address_free(result.out)
        assert tracker_free(watched.err).startswith(own_stderr), f"{own_stderr}\n-- watched --\n{watched.err}"
    assert re.search(make.verdict, tracker_free(watched.err)[len(own_stderr) :]), watched.err


def address_free(text: str) -> str:
    return re.sub(r"0x[0-9a-f]+", "0x", text)


def tracker_free(text: str) -> str:
    """Without what multiprocessing's tracker, a process of its own, warns of at some exits.

    A semaphore that is collected while the interpreter ends can be unlinked and not yet reported: a race of the standard
    library's, seen in some runs without the watch.
    """
    return re.sub(r"(?m)^\S+resource_tracker\.py:\d+: UserWarning: .*\n(?:  warnings\.warn\(.*\n)?", "", text)


# -- what it says ------------------------------------------------------------------------------------------------------------------


def test_a_nan_is_told_on_stderr_while_the_script_runs_and_in_the_verdict(tmp_path: Path) -> None:
    result = watch(
        tmp_path,
        """
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train(model, optimizer, updates=12)
        with torch.no_grad():
            model.head.bias[0] = float("nan")
        train(model, optimizer, updates=12)
        print("done")
        """,
    )
    assert (result.code, result.out) == (0, "done\n")
    first, *_, last = result.err.splitlines()
    assert re.match(r"✗ gradwatch (?:at|since) step 12: NaN or Inf in the \w+", first), result.err
    assert "✗ gradwatch: 1 finding in 24 updates" in result.err
    assert last.startswith("  "), result.err


def test_raise_stops_the_script_before_the_weights_change(tmp_path: Path) -> None:
    result = watch(
        tmp_path,
        """
        import atexit

        model = Net()
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), updates=12)
        before = digest(model)
        model.head.weight.register_hook(lambda grad: grad * float("nan"))
        atexit.register(lambda: print(digest(model) == before))
        train(model, torch.optim.SGD(model.parameters(), lr=0.1))
        """,
        options=["--on-nonfinite", "raise"],
    )
    assert (result.code, result.out) == (1, "True\n")
    trace, _, verdict = result.err.partition("NonFiniteGradientError: step 12: the gradient is not finite in head.weight")
    assert trace.startswith(("✗ gradwatch", "Traceback"))
    assert os.sep + os.path.join("gradwatch", "") not in trace, "gradwatch's own frames stand in the traceback"
    assert "gradwatch: " in verdict


def test_clip_reaches_the_optimizer_from_the_first_update_on(tmp_path: Path) -> None:
    result = watch(
        tmp_path,
        """
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        norms = []
        optimizer.register_step_post_hook(lambda *_: norms.append(float(nn.utils.get_total_norm([p.grad for p in model.parameters()]))))
        train(model, optimizer)
        print(len(norms), max(norms) < 1.001e-3)
        """,
        options=["--clip", "1e-3", "--summary"],
    )
    assert (result.code, result.out) == (0, "20 True\n")
    assert "gradients scaled down in 20 of 20 updates" in result.err


def test_quiet_keeps_the_alerts_for_the_end(tmp_path: Path) -> None:
    source = """
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(30):
            x, y = batch()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        """
    loud, quiet = watch(tmp_path, source), watch(tmp_path, source, options=["--quiet"])
    assert "Try: " in loud.err
    lines = quiet.err.splitlines()
    assert len(lines) == 2, quiet.err
    assert lines[0].startswith("✗ gradwatch: 1 finding in 30 updates: gradients not zeroed between updates")


def test_a_script_that_watches_itself_is_not_watched_twice(tmp_path: Path) -> None:
    result = watch(
        tmp_path,
        """
        from gradwatch import GradWatch

        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with GradWatch(model) as watch:
            train(model, optimizer)
        print(watch.history.recorded)
        """,
    )
    assert (result.code, result.out) == (0, "20\n")
    assert re.search(HEALTHY.format(20, 2), result.err), result.err


def test_ctrl_c_leaves_130_a_traceback_and_the_verdict(tmp_path: Path) -> None:
    result = watch(
        tmp_path,
        """
        import os, signal

        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs tests in the background has it ignored
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train(model, optimizer, updates=12)
        model.head.weight.register_hook(lambda grad: os.kill(os.getpid(), signal.SIGINT))
        train(model, optimizer)
        """,
    )
    assert result.code == 128 + signal.SIGINT
    assert result.err.startswith("Traceback")
    assert re.search(
        r"\nKeyboardInterrupt\n▲ gradwatch: stopped by KeyboardInterrupt after 12 updates, nothing found before", result.err
    ), result.err


CRASH = "\\nValueError: no\\n▲ gradwatch: stopped by ValueError after 12 updates, nothing found before"


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        pytest.param("raise ValueError('no')", 1, CRASH, id="exception"),
        pytest.param("sys.exit(3)", 3, r"\A▲ gradwatch: stopped by sys.exit\(3\) after 12 updates", id="exit-with-an-error"),
        pytest.param("sys.exit('no')", 1, r"\Ano\n▲ gradwatch: stopped by sys.exit after 12 updates", id="exit-with-a-message"),
        pytest.param("sys.exit(0)", 0, HEALTHY.format(12, 2), id="exit"),
        pytest.param("sys.exit()", 0, HEALTHY.format(12, 2), id="bare-exit"),
    ],
)
@pytest.mark.parametrize("place", ["module", "function"])
def test_a_script_that_ends_by_an_error_is_not_called_healthy(end: str, code: int, said: str, place: str, tmp_path: Path) -> None:
    """In a function too, whose model is gone before the verdict is given."""
    body = f"""\
model = Net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
train(model, optimizer, updates=12)
{end}
"""
    if place == "function":
        body = "def main():\n" + "".join(f"    {line}\n" for line in body.splitlines()) + "main()\n"
    result = watch(tmp_path, "import sys\n" + body)
    assert result.code == code
    assert re.search(said, result.err), result.err


def test_what_was_trained_and_dropped_before_the_crash_is_healthy(tmp_path: Path) -> None:
    body = """
        def main():
            model = Net()
            train(model, torch.optim.SGD(model.parameters(), lr=0.1))

        main()
        raise ValueError("no")
        """
    assert "\n✓ gradwatch: healthy after 20 updates" in watch(tmp_path, body).err


def test_a_script_that_crashes_before_it_trains_is_not_told_that_it_trains_nothing(tmp_path: Path) -> None:
    err = watch(tmp_path, "1 / 0").err
    assert err.endswith("\n▲ gradwatch: stopped by ZeroDivisionError before anything was trained, so nothing was judged\n"), err


def test_exit_handlers_find_the_exception_where_python_leaves_it(tmp_path: Path) -> None:
    result = watch(tmp_path, "import atexit, sys\natexit.register(lambda: print(repr(sys.last_value)))\n1 / 0")
    assert result.out == "ZeroDivisionError('division by zero')\n"


def test_a_sweep_gives_every_model_back_and_sums_the_healthy_ones_up(tmp_path: Path) -> None:
    result = watch(
        tmp_path,
        """
        import gc, weakref

        models = []
        for _ in range(8):
            model = Net()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            train(model, optimizer, updates=10)
            models.append(weakref.ref(model))
            del model, optimizer
            gc.collect()
            print(models[-1]() is None, end=" ")
        """,
    )
    assert result.out == "True " * 8
    lines = result.err.splitlines()
    assert len(lines) == 5, result.err
    assert lines[0].startswith("✓ gradwatch, model: healthy after 10 updates")
    assert lines[4] == "✓ gradwatch: nothing found in 4 more models"


# -- the command line --------------------------------------------------------------------------------------------------------------


def test_what_makes_no_sense_is_answered_with_what_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gradwatch.__main__ import main

    script = tmp_path / "train.py"
    for args, said in (
        (["runn"], "Did you mean `gradwatch run`?"),
        ([str(script)], f"`gradwatch run {script}`"),
        (["fly"], "there are demo, run"),
        (["run"], "it needs a script, as in `gradwatch run train.py`"),
        (["run", "--quiet", "-m"], "a module, as in `gradwatch run -m package.train`"),
        (["run", "--clip", "0", "x.py"], "'0' is no max_norm; it needs a finite number above 0"),
        (["run", "--clip"], "expected one argument"),
        (["demo", "--case", "none"], "choose from"),
    ):
        with pytest.raises(SystemExit) as end:
            main(args)
        assert end.value.code == 2
        assert said in capsys.readouterr().err, args
    assert main([]) == 2
    assert "gradwatch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        pytest.param(("nowhere.py",), "cannot open 'nowhere.py': No such file", id="file"),
        pytest.param(("-m", "nowhere.at.all"), "no Python module named 'nowhere.at.all'", id="module"),
        pytest.param(("-mjson.nowhere",), "no Python module named 'json.nowhere'", id="submodule"),
    ],
)
def test_a_script_that_is_not_there_is_named(args: tuple[str, ...], said: str, tmp_path: Path) -> None:
    result = end(start(["-m", "gradwatch", "run", *args], tmp_path))
    assert (result.code, result.out) == (2, "")
    assert said in result.err
    assert "Traceback" not in result.err


def test_version(tmp_path: Path) -> None:
    result = end(start(["-m", "gradwatch", "--version"], tmp_path))
    assert re.fullmatch(r"gradwatch \d+\.\d+\S*\n", result.out)
