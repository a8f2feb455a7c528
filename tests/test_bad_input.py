"""What a user can hand over wrongly, and the error: what was given, what is needed, what to do."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from gradwatch import GradWatch, Sampling
from tests.networks import NETWORKS
from tests.traces import changed, traces


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))


def frozen() -> nn.Module:
    return model().requires_grad_(False)


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        # Deprecated on newer torch and Python, and still what people bring along.
        warnings.simplefilter("ignore")
        return torch.jit.script(model())


def traced() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(model(), torch.zeros(2, 3))


def parallel() -> nn.Module:
    return nn.DataParallel(model())


def twice() -> dict[str, nn.Module]:
    one = model()
    return {"a": one, "b": one}


def twice_wrapped() -> dict[str, nn.Module]:
    one = model()
    return {"a": one, "b": torch.compile(one, backend="eager")}  # type: ignore[dict-item]


def net_and_head() -> dict[str, nn.Module]:
    net = model()
    return {"net": net, "head": net[2]}


def all_inside() -> dict[str, nn.Module]:
    inner = model()
    return {"inner": inner, "outer": nn.Sequential(inner)}


def holding_parallel() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.DataParallel(model()))


@dataclass(frozen=True)
class Wrong:
    """One wrong call.

    Attributes:
        error: what it must raise.
        says: patterns the message must hold, in any order: what was given, what is needed, what to do.
        model: builds the model.
        options: the wrong keyword.
    """

    error: type[Exception]
    says: tuple[str, ...]
    model: Callable[[], Any] = model
    options: Callable[[], dict[str, Any]] = field(default=dict)


WRONG = {
    # -- the model
    "a-function": Wrong(TypeError, ("function|print", r"nn\.Module"), lambda: print),
    "a-class": Wrong(TypeError, ("Linear", r"nn\.Module"), lambda: nn.Linear),
    "a-string": Wrong(TypeError, ("str", r"nn\.Module"), lambda: "resnet18"),
    "a-state-dict": Wrong(TypeError, ("Tensor", r"nn\.Module"), lambda: dict(model().state_dict())),
    "parameters": Wrong(TypeError, ("generator|list", r"nn\.Module"), lambda: list(model().parameters())),
    "none": Wrong(TypeError, ("None", r"nn\.Module"), lambda: None),
    "empty-mapping": Wrong(ValueError, ("empty|no model", r"nn\.Module|model"), dict),
    "same-model-twice": Wrong(ValueError, ("'a' and 'b'", "same Sequential", "needs to stand once", "Leave one"), twice),
    "same-model-compiled": Wrong(ValueError, ("'a' and 'b'", "same Sequential", "Leave one"), twice_wrapped),
    "model-in-a-model": Wrong(
        ValueError, ("'head'", "'net'", "needs a parameter of its own", "Leave 'head' out, or put it before"), net_and_head
    ),
    "nothing-but-a-model": Wrong(ValueError, ("'outer'", "'inner'", r"Leave 'outer' out\."), all_inside),
    "mapping-of-strings": Wrong(TypeError, ("str", r"nn\.Module"), lambda: {"generator": "model"}),
    "mapping-with-number": Wrong(TypeError, ("3", "str|name"), lambda: {3: model()}),
    "no-parameter-at-all": Wrong(ValueError, ("parameter",), nn.ReLU),
    "nothing-trainable": Wrong(ValueError, ("trainable|requires_grad", r"requires_grad|unfreeze|thaw"), frozen),
    "script-module": Wrong(TypeError, ("Script", r"script|before|original|eager"), scripted),
    "trace-module": Wrong(TypeError, ("Script|TopLevelTracedModule|Traced", r"script|trace|before|original|eager"), traced),
    "data-parallel": Wrong(TypeError, ("DataParallel", r"\.module|DistributedDataParallel"), parallel),
    "data-parallel-inside": Wrong(TypeError, ("DataParallel", r"\.module|DistributedDataParallel"), holding_parallel),
    # -- what it may do
    "policy": Wrong(ValueError, ("explode", "warn", "raise"), options=lambda: {"on_nonfinite": "explode"}),
    "policy-none": Wrong((TypeError, ValueError), ("None", "warn", "raise"), options=lambda: {"on_nonfinite": None}),  # type: ignore[arg-type]
    "clip-zero": Wrong(ValueError, ("clip", "0", "positive|above 0|> ?0|greater"), options=lambda: {"clip": 0}),
    "clip-negative": Wrong(ValueError, ("clip", "-1", "positive|above 0|> ?0|greater"), options=lambda: {"clip": -1}),
    "clip-nan": Wrong(ValueError, ("clip", "nan", "positive|above 0|> ?0|greater|finite"), options=lambda: {"clip": float("nan")}),
    "clip-string": Wrong(TypeError, ("clip", "'x'|str", "float|number|callable"), options=lambda: {"clip": "x"}),
    "clip-true": Wrong(TypeError, ("clip", "True|bool", "float|number|callable"), options=lambda: {"clip": True}),
    # -- whom it tells
    "console-string": Wrong(TypeError, ("console", "'yes'|str", "Console"), options=lambda: {"console": "yes"}),
    "console-none": Wrong(TypeError, ("console", "None", "Console"), options=lambda: {"console": None}),
    "on-alert-number": Wrong(TypeError, ("on_alert", "3|int", "callable|function"), options=lambda: {"on_alert": 3}),
    "on-alert-list": Wrong(TypeError, ("on_alert", "3|int", "callable|function"), options=lambda: {"on_alert": [print, 3]}),
    "on-step-string": Wrong(TypeError, ("on_step", "'print'|str", "callable|function"), options=lambda: {"on_step": "print"}),
    # -- what it asks
    "rules-number": Wrong(TypeError, ("rules", "3|int", "callable|function"), options=lambda: {"rules": [3]}),
    "rules-names": Wrong(
        TypeError, ("rules", "vanishing_gradient|str", "callable|function"), options=lambda: {"rules": ["vanishing_gradient"]}
    ),
    "rules-string": Wrong(
        TypeError, ("rules", "vanishing|str", "callable|function"), options=lambda: {"rules": "vanishing_gradient"}
    ),
    # -- whom it listens to
    "optimizer-number": Wrong(TypeError, ("optimizer", "3|int", r"torch\.optim|Optimizer"), options=lambda: {"optimizer": 3}),
    "optimizer-list": Wrong(TypeError, ("optimizer", "3|int", r"torch\.optim|Optimizer"), options=lambda: {"optimizer": [3]}),
    "optimizer-class": Wrong(
        TypeError, ("optimizer", "SGD", r"torch\.optim|Optimizer"), options=lambda: {"optimizer": torch.optim.SGD}
    ),
    "scaler-number": Wrong(TypeError, ("scaler", "3|int", "GradScaler"), options=lambda: {"scaler": 3}),
    "scaler-true": Wrong(TypeError, ("scaler", "True|bool", "GradScaler"), options=lambda: {"scaler": True}),
    # -- how much it looks at
    "sampling-number": Wrong(TypeError, ("sampling", "10|int", "Sampling"), options=lambda: {"sampling": 10}),
    "include-nothing": Wrong(
        ValueError, (r"encoder\.\*", "include", "match", "0|Linear"), options=lambda: {"sampling": Sampling(include=("encoder.*",))}
    ),
    "one-pattern-of-two": Wrong(
        ValueError, (r"encoder\.\*", "include", "match"), options=lambda: {"sampling": Sampling(include=("0", "encoder.*"))}
    ),
    "exclude-nothing": Wrong(
        ValueError, (r"head\?", "exclude", "match"), options=lambda: {"sampling": Sampling(exclude=("head?",))}
    ),
    "nothing-left": Wrong(
        ValueError, ("exclude", "nothing|no module|every"), options=lambda: {"sampling": Sampling(exclude=("*",))}
    ),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_call_is_an_error_that_helps(wrong: Wrong) -> None:
    watched, options = wrong.model(), wrong.options()
    with pytest.raises(wrong.error) as caught:
        GradWatch(watched, **options)
    message = str(caught.value)
    silent = [pattern for pattern in wrong.says if not re.search(pattern, message, re.IGNORECASE)]
    assert not silent, f"{message!r} does not say {silent}"
    assert type(caught.value) in (TypeError, ValueError), "a plain error, not a subclass that came from deep inside"


def test_no_error_message_is_a_novel_or_a_grunt() -> None:
    for name, wrong in WRONG.items():
        with pytest.raises((TypeError, ValueError)) as caught:
            GradWatch(wrong.model(), **wrong.options())
        assert 30 <= len(str(caught.value)) <= 400, f"{name}: {caught.value}"


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        pytest.param({"window": 0}, ValueError, ("window", "0", "1"), id="window-zero"),
        pytest.param({"window": -3}, ValueError, ("window", "-3", "1"), id="window-negative"),
        pytest.param({"window": 1.5}, TypeError, ("window", "1.5", "whole"), id="window-fraction"),
        pytest.param({"window": True}, TypeError, ("window", "True", "whole"), id="window-bool"),
        pytest.param({"every": 0}, ValueError, ("every", "0", "1"), id="every-zero"),
        pytest.param({"dense": -1}, ValueError, ("dense", "-1", "0"), id="dense-negative"),
        pytest.param({"include": 3}, TypeError, ("include", "3", "pattern"), id="include-number"),
        pytest.param({"exclude": ("a", 3)}, TypeError, ("exclude", "3", "pattern"), id="exclude-number"),
    ],
)
def test_a_wrong_sampling_is_an_error_that_helps(options: dict[str, Any], error: type[Exception], says: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        Sampling(**options)
    assert all(text in str(caught.value) for text in says), str(caught.value)


def test_an_unknown_keyword_and_a_positional_option_are_type_errors() -> None:
    with pytest.raises(TypeError, match="max_norm"):
        GradWatch(model(), max_norm=1.0)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="positional"):
        GradWatch(model(), None)  # type: ignore[misc]


def test_an_error_in_the_constructor_leaves_nothing_behind() -> None:
    parts = [model()]
    before = traces(parts)
    for wrong in WRONG.values():
        with pytest.raises((TypeError, ValueError)):
            GradWatch(wrong.model() if wrong.model is not model else parts[0], **wrong.options())
    assert not changed(before, traces(parts))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="defaults"),
        pytest.param({"clip": 1}, id="clip-int"),
        pytest.param({"clip": 0.5}, id="clip-float"),
        pytest.param({"clip": torch.nn.utils.clip_grad_norm_}, id="clip-callable"),
        pytest.param({"rules": ()}, id="no-rules"),
        pytest.param({"rules": iter([lambda history: ()])}, id="rules-iterator"),
        pytest.param({"on_alert": print}, id="one-sink"),
        pytest.param({"on_alert": [print, print], "on_step": (len,)}, id="several-sinks"),
        pytest.param({"on_nonfinite": "raise"}, id="raise"),
        pytest.param({"sampling": Sampling(window=1, dense=0, every=1)}, id="least-sampling"),
        pytest.param({"sampling": Sampling(include="0")}, id="one-pattern"),
        pytest.param({"scaler": torch.amp.GradScaler("cpu")}, id="scaler"),
    ],
)
def test_a_right_call_is_none(options: dict[str, Any]) -> None:
    watch = GradWatch(model(), **({"console": False} | options))
    watch.attach()
    watch.detach()


def test_one_optimizer_and_several_are_taken() -> None:
    for name in ("mlp", "gan"):
        training = NETWORKS[name]()
        for optimizer in (training.optimizers, list(training.optimizers), training.optimizers[0]):
            with GradWatch(training.model, optimizer=optimizer, console=False) as watch:
                training.run(2)
            assert watch.history.recorded == 2 * training.records or optimizer is training.optimizers[0]


def attach(watched: nn.Module, **options: Any) -> None:
    GradWatch(watched, console=False, **options).attach()


def test_a_model_in_another_is_taken_where_each_key_has_a_parameter() -> None:
    net = model()
    watch = GradWatch({"head": net[2], "net": net, "criterion": nn.MSELoss()}, console=False)
    assert watch.history.parameters == ("head.weight", "head.bias", "net.0.weight", "net.0.bias")
    shared = GradWatch({"a": nn.Sequential(net[0], nn.Linear(4, 4)), "b": nn.Sequential(net[0], net[2])}, console=False)
    assert shared.history.parameters[-2:] == ("b.1.weight", "b.1.bias")


def test_an_optimizer_that_owns_nothing_watched_is_said() -> None:
    stranger = torch.optim.SGD(model().parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"(?i)SGD.*(own|parameter)"):
        attach(model(), optimizer=stranger)


def test_attaching_twice_says_what_to_do() -> None:
    part = model()
    watch = GradWatch(part, console=False)
    watch.attach()
    attached = traces([part])
    with pytest.raises(RuntimeError, match=r"(?i)attached.*(detach|leave)"):
        watch.attach()
    assert not changed(attached, traces([part]))
    watch.detach()


def test_a_compiled_model_gets_a_notice_not_an_error(caplog: pytest.LogCaptureFixture) -> None:
    compiled = torch.compile(model(), backend="eager")
    with caplog.at_level(logging.INFO, "gradwatch"), GradWatch(compiled, console=False) as watch:
        assert all("_orig_mod" not in name for name in (*watch.history.parameters, *watch.history.layers))


@pytest.mark.parametrize("call", ["step", "loss"])
def test_using_a_watch_that_is_not_attached_says_so(call: str) -> None:
    watch = GradWatch(model(), console=False)
    with pytest.raises(RuntimeError, match=r"(?i)attach|with"):
        watch.step() if call == "step" else watch.loss(torch.tensor(1.0))


def test_reading_a_watch_that_has_seen_nothing_is_no_error() -> None:
    watch = GradWatch(model(), console=False)
    assert watch.alerts == ()
    assert len(watch.history.steps) == 0
    assert isinstance(watch.summary(), str)
    with watch:
        pass
    assert watch.alerts == ()
    assert len(watch.history.steps) == 0


def test_a_statistic_that_does_not_exist_lists_those_that_do() -> None:
    watch = GradWatch(model(), console=False)
    with pytest.raises(KeyError, match=r"grad_nrom.*grad_norm"):
        watch.history.stat("grad_nrom")
