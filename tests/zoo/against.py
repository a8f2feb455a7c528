"""Other people's tools over the same runs: each is fed as its documentation says, and its words are held against the same truth.

A tool is an `Ear`: it is opened on a run and hears of every update. The table beside it says which of gradwatch's rules a word of the
tool covers, and is generous: where its meaning can be taken to cover the fault, it does. What a tool says in an update under one name
is one alarm with all the modules it names there; what it repeats later is not counted again. The runs are the same for every tool: what
one of them would do to the gradients is undone.

None of these packages is a dependency of the project: `pip install NAME` beside it.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import math
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from tests.zoo.case import Case, Setup
from tests.zoo.outcome import Alarm, Heard
from tests.zoo.plain import named_parameters

Optimizers = list[torch.optim.Optimizer]

Names = Mapping[str, tuple[str, ...]]
"""Words of a tool -> gradwatch's rules that they cover."""

NON_FINITE = ("non_finite_input", "non_finite_weight", "non_finite_activation", "non_finite_loss", "non_finite_gradient")
EXPLODING = ("exploding_gradient", "gradient_spike", "loss_diverging")
VANISHING = ("vanishing_gradient", "zero_gradient")
DIVERGING = ("loss_diverging", "loss_spike", "exploding_gradient", "update_ratio_too_large")
NOT_LEARNING = ("loss_plateau", "update_ratio_too_small", "frozen_weights", "never_stepped", "poor_init", "vanishing_gradient")

EVERY = 5
"""Updates between two looks where a look is slow: a tenth of the shortest runs."""


@dataclass(frozen=True)
class Said:
    """One line of a tool: what it calls it, the module it names (None: none) and the line."""

    name: str
    layer: str | None = None
    text: str = ""


class Ear(Protocol):
    """A tool at work on one run."""

    def read(self, losses: list[Tensor]) -> Iterable[Said]:
        """The backward passes of an update are over."""

    def step(self, optimizers: Optimizers) -> Iterable[Said]:
        """Its steps are over; no optimizer: the update was skipped."""

    def close(self) -> Iterable[Said]:
        """The run is over, or has raised."""


@dataclass(frozen=True)
class Tool:
    """Another tool.

    Attributes:
        package: its name on PyPI; "" where it needs none.
        module: what it is imported as.
        names: its words -> gradwatch's rules that they cover.
        open: puts it to work on a run.
    """

    package: str
    module: str
    names: Names
    open: Callable[[Setup], Ear]

    def require(self) -> None:
        """Raise where it is not installed."""
        if self.module and importlib.util.find_spec(self.module) is None:
            raise ModuleNotFoundError(f"{self.package} is not installed: pip install {self.package}", name=self.module)

    def listen(self, case: Case, seed: int) -> Heard:
        """Train the run of a seed under the tool."""
        self.require()
        said = _Said(self.names)
        error, owners = "", ()
        torch.manual_seed(seed)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            try:
                setup = case.build(seed)
                owners = tuple(dict.fromkeys(name.rpartition(".")[0] for name in named_parameters(setup.model)))
                ear = self.open(setup)
                try:
                    for kind, what in setup.train():
                        said.updates += kind == "read"
                        said.take(ear.read(what) if kind == "read" else ear.step(what))
                finally:
                    said.take(ear.close())
            except Exception:
                error = traceback.format_exc()
        return Heard(tuple(said.alarms), owners, error=error)


class _Said:
    """Makes alarms of lines."""

    def __init__(self, names: Names) -> None:
        self._names, self._known = names, set[tuple[str, str | None]]()
        self.alarms: list[Alarm] = []
        self.updates = 0

    def take(self, lines: Iterable[Said]) -> None:
        new: dict[str, list[Said]] = {}
        for line in lines:
            if (line.name, line.layer) not in self._known:
                self._known.add((line.name, line.layer))
                new.setdefault(line.name, []).append(line)
        for name, of in new.items():
            layers = tuple(line.layer for line in of if line.layer is not None)
            step = max(0, self.updates - 1)
            self.alarms.append(Alarm(name, self._names[name], layers, step, self.updates, of[0].text))


# -- isnan -------------------------------------------------------------------------------------------------------------------------


class _NanChecks:
    """What many loops do by hand: is the loss finite, and is every gradient, after the backward."""

    names: ClassVar[Names] = {"loss is not finite": NON_FINITE, "gradient is not finite": NON_FINITE}

    def __init__(self, setup: Setup) -> None:
        self._model = setup.model

    def read(self, losses: list[Tensor]) -> Iterator[Said]:
        if not all(bool(torch.isfinite(loss.detach()).all()) for loss in losses):
            yield Said("loss is not finite")
        for name, p in named_parameters(self._model).items():
            if p.grad is not None and not bool(torch.isfinite(_values(p.grad)).all()):
                yield Said("gradient is not finite", name.rpartition(".")[0], name)

    def step(self, optimizers: Optimizers) -> Iterable[Said]:
        return ()

    def close(self) -> Iterable[Said]:
        return ()


# -- torchdiag ---------------------------------------------------------------------------------------------------------------------


class _Torchdiag:
    """`check_gradients(model)` after every backward, `check_dead_neurons(model, inputs)` now and then.

    The latter wants many samples: the inputs of the last batches together, `SAMPLES` or more. It runs the model: a copy of it, with a
    random generator of its own, so that the run is not disturbed. `verify_step` makes a training step of its own from a model, a loss
    function and a batch, and cannot be fed from a loop.
    """

    SAMPLES = 100  # as in its README

    names: ClassVar[Names] = {
        "NO GRAD": ("missing_gradient", "not_in_optimizer"),
        "EXPLODE": EXPLODING,
        "VANISH": VANISHING,
        "dead neurons": ("dead_units", "zero_gradient"),
    }

    def __init__(self, setup: Setup) -> None:
        import torchdiag

        self._diag = torchdiag
        self._models = _models(setup)
        self._updates = 0
        self._inputs: dict[str, list[Tensor]] = {key: [] for key, _ in self._models}
        self._handles = [m.register_forward_pre_hook(self._keep(key, m)) for key, m in self._models]

    def _keep(self, key: str, model: nn.Module) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            # A copy of the model, made for the check, has this hook too.
            if module is model and len(args) == 1 and isinstance(args[0], Tensor) and args[0].ndim > 1:
                kept = [x for x in self._inputs[key] if x.shape[1:] == args[0].shape[1:]] + [args[0].detach()]
                while sum(len(x) for x in kept[1:]) >= self.SAMPLES:
                    del kept[0]
                self._inputs[key] = kept

        return hook

    def read(self, losses: list[Tensor]) -> Iterator[Said]:
        self._updates += 1
        for key, model in self._models:
            for name, stats in self._diag.check_gradients(model).items():
                word = stats["status"].replace("no_grad", "NO GRAD")  # it prints the one and returns the other
                if word in self.names:
                    yield Said(word, _join(key, name.rpartition(".")[0]), name)
            if self._updates % EVERY == 0 and sum(len(x) for x in self._inputs[key]) >= self.SAMPLES:
                for name, report in self._dead(model, torch.cat(self._inputs[key])).items():
                    if report["dead_pct"] > 20:  # it warns above 20 %, and calls 50 % critical
                        yield Said("dead neurons", _join(key, name), f"{name}: {report['dead_pct']:.0f}% neurons dead")

    def _dead(self, model: nn.Module, inputs: Tensor) -> dict[str, Any]:
        with torch.random.fork_rng():
            try:
                return self._diag.check_dead_neurons(copy.deepcopy(model), inputs)
            except Exception:  # a model that cannot be copied, or takes more than the one tensor
                return {}

    def step(self, optimizers: Optimizers) -> Iterable[Said]:
        return ()

    def close(self) -> Iterable[Said]:
        for handle in self._handles:
            handle.remove()
        return ()


# -- trainpulse --------------------------------------------------------------------------------------------------------------------


class _Trainpulse:
    """Its full training loop: `monitor.log` of "loss", "grad_norm" and "learning_rate" each update.

    Of several losses the sum is logged. Step times are left out: on a shared machine they would only add false alarms.
    """

    names: ClassVar[Names] = {
        "loss is NaN or Inf": NON_FINITE,
        "grad_norm is NaN or Inf": (*NON_FINITE, "exploding_gradient"),
        "Loss spike": DIVERGING,
        "Gradient explosion": EXPLODING,
        "Vanishing gradient": VANISHING,
        "LR changed": ("update_ratio_too_large", "update_ratio_too_small", "frozen_weights", "gradient_spike"),
        "Loss plateau": NOT_LEARNING,
    }

    def __init__(self, setup: Setup) -> None:
        from trainpulse import Monitor

        self._model, self._monitor, self._step = setup.model, Monitor(), -1

    def read(self, losses: list[Tensor]) -> Iterator[Said]:
        self._step += 1
        yield from self._log("loss", _total(losses))
        yield from self._log("grad_norm", _grad_norm(self._model))

    def step(self, optimizers: Optimizers) -> Iterator[Said]:
        if optimizers:
            yield from self._log("learning_rate", float(optimizers[0].param_groups[0]["lr"]))

    def _log(self, metric: str, value: float) -> Iterator[Said]:
        for alert in self._monitor.log(metric, self._step, value):
            if alert.severity.value == "info":
                continue
            if alert.detector == "nan_detector":
                if f"{metric} is NaN or Inf" in self.names:
                    yield Said(f"{metric} is NaN or Inf", None, alert.message)
            else:
                yield Said(next(name for name in self.names if alert.message.startswith(name)), None, alert.message)

    def close(self) -> Iterable[Said]:
        return ()


# -- zclip -------------------------------------------------------------------------------------------------------------------------


class _ZClip:
    """A clipper, taken as an alarm: `zclip.step(model)` between backward and step, and it alarms where its z-score makes it clip.

    Without the constant `max_norm` beside it, which would clip in every other update; the gradients are put back afterwards.
    """

    names: ClassVar[Names] = {"clipped": (*EXPLODING, "loss_spike")}

    def __init__(self, setup: Setup) -> None:
        from zclip import ZClip

        self._clipper = ZClip(alpha=0.97, z_thresh=2.5, max_grad_norm=None)
        self._model = _one(setup)

    def read(self, losses: list[Tensor]) -> Iterator[Said]:
        kept = [(p, p.grad.clone()) for p in self._model.parameters() if p.grad is not None]
        if not kept:
            return
        before = _grad_norm(self._model)
        self._clipper.step(self._model)
        after = _grad_norm(self._model)
        for p, grad in kept:
            p.grad = grad
        if after < 0.999 * before:  # less than rounding explains
            yield Said("clipped", None, f"gradient norm {before:.4g} clipped to {after:.4g}")

    def step(self, optimizers: Optimizers) -> Iterable[Said]:
        return ()

    def close(self) -> Iterable[Said]:
        return ()


# -- torch-surgeon -----------------------------------------------------------------------------------------------------------------


class _Surgeon:
    """`Surgeon(model).attach()` before the loop: full backward hooks on every leaf module, which speak by themselves."""

    names: ClassVar[Names] = {
        "vanishing": VANISHING,
        "exploding": EXPLODING,
        "stagnant": (*VANISHING, "frozen_weights", "dead_units"),
    }

    def __init__(self, setup: Setup) -> None:
        from torch_surgeon import Surgeon

        self._surgeons = [(key, Surgeon(model, rules={"verbose": False}).attach()) for key, model in _models(setup)]

    def read(self, losses: list[Tensor]) -> Iterator[Said]:
        for key, surgeon in self._surgeons:
            for alert in surgeon.reporter.get_alerts():
                yield Said(alert["status"], _join(key, alert["layer"]), f"norm={alert['norm']:.4e}")
            surgeon.reporter.clear_alerts()

    def step(self, optimizers: Optimizers) -> Iterable[Said]:
        return ()

    def close(self) -> Iterable[Said]:
        for _, surgeon in self._surgeons:
            surgeon.detach()
        return ()


# -- torch-audit -------------------------------------------------------------------------------------------------------------------


class _Audit:
    """`autopatch(model, every_n_steps=1)`, and the audit after a step through its `audit_step`, where the optimizer is known first.

    Left out as advice on style and speed, none of it about the training: TA2xx (hardware) and TA400 to TA404.
    """

    names: ClassVar[Names] = {
        "TA000": (),
        "TA100": NON_FINITE,
        "TA102": EXPLODING,
        "TA104": ("missing_gradient", "never_stepped", "frozen_weights"),
        "TA105": ("dead_units", "zero_gradient"),
        "TA300": (),
        "TA301": ("unnormalized_input",),
        "TA302": ("unnormalized_input",),
        "TA303": (),
        "TA304": (),
        "TA305": ("non_finite_input",),
        "TA405": ("poor_init", "zero_gradient", "dead_units"),
        "TA500": ("missing_gradient",),
        "TA501": (),
    }

    def __init__(self, setup: Setup) -> None:
        from torch_audit import audit_step, autopatch

        self._after = audit_step
        self._auditors = [
            (key, autopatch(model, every_n_steps=1, run_init=False, patch_optimizer=False)) for key, model in _models(setup)
        ]

    def read(self, losses: list[Tensor]) -> Iterable[Said]:
        return self._new()

    def step(self, optimizers: Optimizers) -> Iterable[Said]:
        for _, auditor in self._auditors:
            mine = {id(p) for p in auditor.model.parameters()}
            owner = next((o for o in optimizers if any(id(p) in mine for g in o.param_groups for p in g["params"])), None)
            if owner is not None:
                first = auditor.optimizer is None
                auditor.optimizer = owner
                if first:
                    auditor.audit_init()
                self._after(auditor)(lambda: None)()
        return self._new()

    def _new(self) -> list[Said]:
        return [
            Said(f.rule_id, None if f.module_path is None else _join(key, f.module_path.replace("global", "")), f.message)
            for key, auditor in self._auditors
            for f in auditor.pop_new_findings()
            if f.severity.value != "INFO" and f.rule_id in self.names
        ]

    def close(self) -> Iterable[Said]:
        for _, auditor in self._auditors:
            auditor.unpatch()
        return ()


# -- gradsnitch --------------------------------------------------------------------------------------------------------------------


class _Gradsnitch:
    """`mon = watch(model, optimizer)`, `mon.log(step, loss)` after every backward; what `lint` finds in it now and then, and at the end."""

    names: ClassVar[Names] = {
        "GS001": NON_FINITE,
        "GS002": (*NON_FINITE, *EXPLODING),
        "GS003": EXPLODING,
        "GS004": (),
        "GS005": NOT_LEARNING,
        "GS006": DIVERGING,
        "GS007": VANISHING,
        "GS008 too high": ("update_ratio_too_large", "loss_diverging"),
        "GS008 too low": ("update_ratio_too_small", "frozen_weights", "never_stepped"),
        "GS009": DIVERGING,
        "GS010": NOT_LEARNING,
    }

    def __init__(self, setup: Setup) -> None:
        import gradsnitch

        self._lint = gradsnitch.lint
        self._monitor = gradsnitch.watch(_one(setup))
        self._updates = 0

    def read(self, losses: list[Tensor]) -> Iterable[Said]:
        self._monitor.log(self._updates, _total(losses))
        self._updates += 1
        return self.close() if self._updates % EVERY == 0 else ()

    def step(self, optimizers: Optimizers) -> Iterable[Said]:
        if optimizers and self._monitor.optimizer is None:
            self._monitor.optimizer = optimizers[0]
        return ()

    def close(self) -> Iterator[Said]:
        for finding in self._lint(self._monitor.df()):
            side = " too high" if "too high" in finding.name else " too low"
            yield Said(finding.code + side * (finding.code == "GS008"), None, f"{finding.name}: {finding.evidence}")


# -- torchmortem -------------------------------------------------------------------------------------------------------------------


class _Torchmortem:
    """`with Autopsy(model) as autopsy`, `autopsy.step(loss=...)` after every update; it speaks when the block is left.

    Left out, for they are about the batch size and the representation and no fault of the training: gradient noise, rank collapse and the
    imbalance of weight norms.
    """

    names: ClassVar[Names] = {
        "Vanishing gradients": VANISHING,
        "Exploding gradients": EXPLODING,
        "Gradient stalling": VANISHING,
        "Dead units": ("dead_units", "zero_gradient"),
        "Activation saturation": ("saturated_activation", "vanishing_gradient"),
        "Training divergence": DIVERGING,
        "Loss plateau": NOT_LEARNING,
        "Update ratio too low": ("update_ratio_too_small", "frozen_weights", "never_stepped", "vanishing_gradient"),
        "Update ratio too high": ("update_ratio_too_large", "loss_diverging"),
        "Weight norm explosion": DIVERGING,
        "Stagnant weight norms": (
            "frozen_weights",
            "never_stepped",
            "not_in_optimizer",
            "update_ratio_too_small",
            "missing_gradient",
        ),
    }

    def __init__(self, setup: Setup) -> None:
        from torchmortem import Autopsy

        self._autopsies = [(key, Autopsy(model)) for key, model in _models(setup)]
        for _, autopsy in self._autopsies:
            autopsy.attach()
        self._loss: float | None = None

    def read(self, losses: list[Tensor]) -> Iterable[Said]:
        self._end_update()
        self._loss = _total(losses)
        return ()

    def step(self, optimizers: Optimizers) -> Iterable[Said]:
        self._end_update()
        return ()

    def _end_update(self) -> None:
        if self._loss is not None:
            for _, autopsy in self._autopsies:
                autopsy.step(loss=self._loss)
            self._loss = None

    def close(self) -> Iterator[Said]:
        self._end_update()
        for key, autopsy in self._autopsies:
            autopsy.detach()
            report = autopsy.get_report()
            for finding in report.findings if report is not None else ():
                name = next((name for name in self.names if finding.title.startswith(name)), None)
                if name is not None and finding.severity.name != "INFO":
                    for layer in finding.affected_layers or (None,):
                        yield Said(name, None if layer is None else _join(key, layer), finding.summary)


# -- what several of them need -----------------------------------------------------------------------------------------------------


def _models(setup: Setup) -> list[tuple[str, nn.Module]]:
    return [("", setup.model)] if isinstance(setup.model, nn.Module) else list(setup.model.items())


def _one(setup: Setup) -> nn.Module:
    """All models in one, for tools that take one and name no module."""
    return setup.model if isinstance(setup.model, nn.Module) else nn.ModuleList(setup.model.values())


def _join(key: str, name: str) -> str:
    return ".".join(part for part in (key, name) if part)


def _values(grad: Tensor) -> Tensor:
    return grad.detach().coalesce().values() if grad.is_sparse else grad.detach()


def _total(losses: list[Tensor]) -> float:
    return sum(float(loss.detach().sum()) for loss in losses)


def _grad_norm(model: nn.Module | Mapping[str, nn.Module]) -> float:
    grads = [p.grad for p in named_parameters(model).values() if p.grad is not None]
    return math.sqrt(sum(float(_values(g).double().square().sum()) for g in grads))


TOOLS: dict[str, Tool] = {
    "nan_checks": Tool("", "", _NanChecks.names, _NanChecks),
    "torchdiag": Tool("torchdiag", "torchdiag", _Torchdiag.names, _Torchdiag),
    "trainpulse": Tool("trainpulse", "trainpulse", _Trainpulse.names, _Trainpulse),
    "zclip": Tool("zclip", "zclip", _ZClip.names, _ZClip),
    "torch-surgeon": Tool("torch-surgeon", "torch_surgeon", _Surgeon.names, _Surgeon),
    "torch-audit": Tool("torch-audit", "torch_audit", _Audit.names, _Audit),
    "gradsnitch": Tool("gradsnitch", "gradsnitch", _Gradsnitch.names, _Gradsnitch),
    "torchmortem": Tool("torchmortem", "torchmortem", _Torchmortem.names, _Torchmortem),
}
