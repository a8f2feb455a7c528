"""`GradWatch`: wires capture, diagnosis, protection and presentation to a training loop, and decides nothing itself."""

from __future__ import annotations

import atexit
import logging
import sys
import time
import traceback
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, ConsoleOptions, RenderResult
from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch import options
from gradwatch.capture import private
from gradwatch.capture.acting import Deliberate
from gradwatch.capture.home import Home
from gradwatch.capture.recorder import Recorder
from gradwatch.capture.tape import TAPE
from gradwatch.checkpoint import decode, encode
from gradwatch.clip import Clipper
from gradwatch.diagnose.incidents import Incidents
from gradwatch.diagnose.rules import Rule, default_rules, name_of
from gradwatch.facts import EMPTY, Meta
from gradwatch.foresight import Foresight
from gradwatch.history import History
from gradwatch.investigate.inquest import Inquest
from gradwatch.keeping import Keeping
from gradwatch.present import words
from gradwatch.present.console import ConsoleSink
from gradwatch.present.report import summary, table, verdict
from gradwatch.protect.actor import MAX_SKIPS, Actor, Policy, Reaction
from gradwatch.records import Alert, Inquiry, Sampling, StepRecord

logger = logging.getLogger("gradwatch")
logger.addHandler(logging.NullHandler())

MAX_NOTICES = 100
"""Notices that are kept; what comes after goes to the logger alone."""

T = TypeVar("T")
_SAMPLING = Sampling()
_ORPHANS: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


class GradWatch:
    """Watches the gradients of a training loop and says what is wrong, where, why, and what to do.

    ```python
    with GradWatch(model) as watch:
        for x, y in loader:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
    watch.alerts
    ```

    Training is bit-identical to training without it, unless it is asked to clip, to leave steps out or to raise.

    Args:
        model: an `nn.Module`, or a mapping of names to modules that are trained together (`{"generator": G, "discriminator": D}`).
        optimizer: the optimizer or optimizers to heed; None: every `torch.optim.Optimizer` that owns a watched parameter.
        scaler: the GradScaler to heed; None: any that scales a loss.
        clip: `max_norm` of the global 2-norm over what each optimizer steps, a clipper of `gradwatch.clip`, or any callable that takes
            those parameters and changes their gradients in place. A clipper that learns is copied for each further optimizer. None:
            nothing is clipped. A norm that is not finite clips nothing.
        on_nonfinite: "warn" tells of gradients that are not finite; "raise" raises `NonFiniteGradientError` before the weights change;
            "skip" leaves the step out: weights, moments and counters stay as they are, buffers go back (`restore_buffers`).
        on_rule: what is done when a rule finds something, by the rule's name: "skip" leaves out the step of each update in which it does,
            "raise" raises `RuleError` before it; a float (`max_norm`) or a clipper clips from the update in which it does until its
            incident is over, and both ends are told. Such rules are asked before each step, too. (Of its first ten updates a run has
            nothing to compare a spike with.)
        max_skips: steps of one optimizer in a row that are left out before it raises, with the whole story.
        keep_good: updates between two states of the training that are kept in host memory for `rollback()`: models, optimizers, GradScalers,
            random numbers, and the watch itself. The last two are kept, the first after the first update; none while an ERROR is open.
        keep_also: further objects with `state_dict()` and `load_state_dict()` that are kept and go back with them, such as a scheduler.
        restore_buffers: whether a step that is left out takes back what its forward pass did to the models' buffers (a BatchNorm's
            running mean is NaN for ever after one NaN). None: those of at most 262,144 elements, for a copy an update.
        origin: whether a loss or a gradient that is not finite is traced to the operator and the line where the value was born. For that
            references to the inputs of the update in flight are held, the state of the random generators and the gradient at the model's
            outputs (up to 64 MB); when something goes wrong, the forward and the backward pass run once more before the step, on
            stand-ins. None: where nobody has to wait for a device for it; True: there, too, once an update; False: nothing is held and
            nothing is run.
        rules: functions `History -> Iterable[Finding]`; None: `default_rules()`; (): none.
        on_alert: called with each `Alert` that opens, is traced to its origin, grows worse or ends; one callable or several.
        on_step: called with the `StepRecord` of each closed update; one callable or several.
        console: True prints alerts and the verdict to stderr, a rich `Console` to itself, False nothing.
        sampling: how much is looked at, and how often.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument of the right kind with a bad value; no trainable parameter.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, nn.Module],
        *,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        scaler: Any = None,
        clip: float | Clipper | None = None,
        on_nonfinite: Literal["warn", "raise", "skip"] = "warn",
        rules: Iterable[Rule] | None = None,
        on_alert: Callable[[Alert], Any] | Iterable[Callable[[Alert], Any]] = (),
        on_step: Callable[[StepRecord], Any] | Iterable[Callable[[StepRecord], Any]] = (),
        console: bool | Console = True,
        sampling: Sampling = _SAMPLING,
        on_rule: Mapping[str, Reaction] | None = None,
        max_skips: int = MAX_SKIPS,
        restore_buffers: bool | None = None,
        keep_good: int | None = None,
        keep_also: Any = (),
        origin: bool | None = None,
    ) -> None:
        self._attached = self._failed = False
        models = options.models(model)
        self._sampling = options.sampling(sampling, models)
        self._optimizers = options.optimizers(optimizer)
        self._scaler = options.scaler(scaler)
        self._rules = default_rules() if rules is None else options.callables("rules", rules)
        policy = Policy(
            options.clip(clip),
            options.on_nonfinite(on_nonfinite),
            options.on_rule(on_rule, map(name_of, self._rules)),
            options.max_skips(max_skips),
            options.restore_buffers(restore_buffers),
        )
        self._sinks: list[Callable[[Alert], Any]] = list(options.callables("on_alert", on_alert))
        self._step_sinks: list[Callable[[StepRecord], Any]] = list(options.callables("on_step", on_step))
        console = options.console(console)
        self._console = None if console is False else ConsoleSink(None if console is True else console)
        if self._console is not None:
            self._sinks.insert(0, self._console)
        # Until it is attached for the first time a watch keeps its model, afterwards only while it is attached.
        self._models: dict[str, nn.Module] | None = models
        self._model_refs = {key: weakref.ref(one) for key, one in models.items()}
        self._notices: list[str] = []
        self._incidents = Incidents(self._rules, notice=_weakly(self._notice))
        self._foresight = Foresight(
            self._rules,
            self._incidents,
            history=_weakly(self._own_history),
            last_inquiry=_weakly(self._last_inquiry),
            is_full=_weakly(self._is_full),
            tell=_weakly(self._tell),
            notice=_weakly(self._notice),
        )
        self._actor = Actor(policy, self._foresight) if policy.asked else None
        self._traces = options.origin(origin)
        self._inquest = None if self._traces is False else Inquest(_weakly(self._own_alerts), _weakly(self._notice))
        every = options.keep_good(keep_good)
        also = options.keep_also(keep_also, every)
        self._keeping: Keeping | None = None
        if every is not None:
            self._keeping = Keeping(every, models, also, state=_weakly(self.state_dict), safely=_weakly(self._safely))
        self._carried: Mapping[str, Any] | None = None
        self._resumes = False
        self._history: History | None = None
        self._recorder: Recorder | None = None
        self._started: float | None = None
        self._spent = self._elapsed = 0.0
        self._entered = 0.0
        self._unfinished = 0
        self._updates_watched = 0
        self._stopped_by = ""
        self._home = Home()

    # -- the block -----------------------------------------------------------------------------------------------------------------

    def __enter__(self) -> GradWatch:
        self.attach()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._attached:
            self._stopped_by = words.stopper(error)
        self.detach()

    def attach(self) -> None:
        """Start watching; what was recorded before goes on.

        Raises:
            RuntimeError: it is attached already, another watch on this model acts and this one is asked to act too, or the model is gone.
            ValueError: a named optimizer owns nothing watched.
        """
        if self._attached:
            raise RuntimeError("this GradWatch is attached already; leave its block or call detach() first")
        models = self._models or {key: model for key, ref in self._model_refs.items() if (model := ref()) is not None}
        if len(models) != len(self._model_refs):
            raise RuntimeError("the model of this GradWatch no longer exists; make a new GradWatch for the new model")
        self._check_actors(models)
        if self._started is None:
            self._started = time.perf_counter()
        recorder = self._new_recorder(models)
        for optimizer in self._optimizers or ():
            if recorder.know(optimizer) is None:
                raise ValueError(
                    f"GradWatch(optimizer=...): this {type(optimizer).__name__} does not own a parameter of the watched model; name the one "
                    "that steps it, or leave optimizer out"
                )
        self._home, self._failed, self._stopped_by = Home(), False, ""
        self._entered = time.perf_counter()
        try:
            self._models, self._recorder, self._attached = models, recorder, True
            TAPE.add(self)
            recorder.start()
            if self._carried is not None:
                # Who enters the block again begins anew to look closely; a run that goes on from a checkpoint does not.
                recorder.load_state_dict(self._carried, cadence=self._resumes)
                self._carried, self._resumes = None, False
            if any(_ORPHANS.pop(model, False) for model in models.values()):
                self._notice("an earlier watch on this model was still attached and no longer referenced; it has been detached")
            for lack in private.self_test():
                self._notice(lack)
        except BaseException:  # Ctrl-C halfway: nothing may be left behind
            self._stop()
            raise

    def detach(self) -> None:
        """Stop watching: close what is open, take out every hook, print the verdict. Does nothing if it is not attached."""
        if not self._attached:
            if self._failed and self._console is not None:
                self._failed = False
                updates = words.plural(self._recorded(), "update")
                lines = [f"{words.WARNING} gradwatch: the watch failed after {updates} and switched itself off; see watch.notices"]
                self._safely(partial(self._console.print_lines, lines), "the console")
            return
        self._stop(self._finish)
        if self._console is not None:
            self._safely(self._print_verdict, "the console")

    def _print_verdict(self) -> None:
        if self._console is not None:
            self._console.print_lines(verdict_of(self))

    def _finish(self) -> None:
        recorder = self._recorder
        if recorder is None:
            return
        # Rules meet any number, here too: the last record may close only now.
        with np.errstate(all="ignore"):
            recorder.exit()
            self._unfinished += recorder.unfinished
            history = self.history
            history.pending, history.ended = recorder.pending, True
            try:
                self._judge(history)
            finally:
                history.ended = False

    def _stop(self, last: Callable[[], None] | None = None) -> None:
        """Take everything out, after a last act that may fail."""
        self._attached = False
        TAPE.remove(self)
        if last is not None:
            self._safely(last, "closing the watch")
        self._elapsed += time.perf_counter() - self._entered
        if self._recorder is not None:
            if last is not None:
                self._safely(self._carry, "closing the watch")
            self._recorder.stop()
            self._spent += self._recorder.inside.hooks.spent
        self._recorder = None
        self._models = None

    def _carry(self) -> None:
        """What is counted goes on when it is attached again, and into a checkpoint that is written in between."""
        self._carried = self._recorder.state_dict() if self._recorder is not None else None

    def __del__(self) -> None:
        # Attached and forgotten, as a notebook does when a cell runs again.
        if getattr(self, "_attached", False):
            for ref in self._model_refs.values():
                model = ref()
                if model is not None:
                    _ORPHANS[model] = True
            self.detach()

    # -- what the user says and asks -----------------------------------------------------------------------------------------------

    def loss(self, value: T) -> T:
        """Tell the loss of the update at hand, where `backward()` cannot be seen or is not of the loss; returns it.

        Args:
            value: a number or a 0-d tensor. Told several times in one update, their mean is recorded.

        Raises:
            TypeError: no real number.
            RuntimeError: the watch is not attached.
        """
        recorder = self._attached_recorder("loss")
        told = value.detach() if isinstance(value, Tensor) else value
        if not (
            told.numel() == 1 and not told.is_complex() if isinstance(told, Tensor) else isinstance(told, (int, float, np.number))
        ):
            what = f"a tensor of shape {tuple(told.shape)}" if isinstance(told, Tensor) else f"{told!r} ({type(told).__name__})"
            raise TypeError(
                f"GradWatch.loss(...): got {what}; it needs a real number or a tensor with one element, such as loss.mean()"
            )
        if recorder is not None:
            recorder.told(told)
        return value

    def step(self) -> None:
        """Close the update at hand, in a loop whose steps cannot be seen.

        Raises:
            RuntimeError: the watch is not attached.
        """
        self._attached_recorder("step")
        self._guard(lambda recorder: recorder.by_hand())

    def rollback(self) -> int:
        """Go back to the last good state that was kept (`keep_good`): models, optimizers, GradScalers, random numbers and the watch.

        Of the two states that are kept, the newest from before the first open ERROR began is taken. Call it between two updates and go
        on with a new forward pass, mostly with something changed: a lower lr, another batch. Gradients are None afterwards. What cannot be
        seen does not go back: schedulers and the like (`keep_also`), the position of a DataLoader.

        Returns:
            The number of the update that comes next.

        Raises:
            RuntimeError: the watch is not attached, keeps no states or has not kept any yet; an update is under way; or the model has
                changed since.
        """
        recorder = self._attached_recorder("rollback")
        if self._keeping is None:
            raise RuntimeError("GradWatch.rollback(): no states are kept; say how often by GradWatch(model, keep_good=100)")
        if recorder is None:
            raise RuntimeError("GradWatch.rollback(): the watch has switched itself off; see watch.notices, and load a checkpoint")
        if recorder.under_way():
            raise RuntimeError("GradWatch.rollback(): a backward pass or a step is under way; call it between two updates")
        recorder.drain()
        now, why = recorder.recorded(), self._foresight.story(still=True)
        kept = self._keeping.go_back(self._incidents.alerts)
        recorder.abandon()
        self.load_state_dict(kept.watch)
        self._tell(f"went back from step {now} to step {kept.step}. {why}".rstrip())
        return kept.step

    @property
    def alerts(self) -> tuple[Alert, ...]:
        """What was found in the training: one entry an incident, in the order of opening, each in its present state."""
        if self._recorder is not None:
            self._guard(lambda recorder: recorder.drain())
        return self._incidents.alerts

    @property
    def notices(self) -> tuple[str, ...]:
        """What the watch has to say about itself."""
        return tuple(self._notices)

    @property
    def history(self) -> History:
        """The record so far."""
        if self._recorder is not None:
            self._guard(lambda recorder: recorder.drain())
        if self._history is None:
            self._history = History(Meta(), self._sampling.window)
            models = self._models or {key: model for key, ref in self._model_refs.items() if (model := ref()) is not None}
            self._new_recorder(models)  # it tells the layout
        return self._history

    def summary(self) -> str:
        """What was found and how the layers stand, as text of several lines."""
        cost, share = self._cost()
        return summary(
            self.history,
            self.alerts,
            cost_per_update=cost,
            share=share,
            unfinished=self._unfinished,
            notices=self._notices,
            stopped_by=self._stopped_by,
            attached=self._started is not None,
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield table(self.history, self.alerts, ascii_only=options.ascii_only)

    def __repr__(self) -> str:
        state = "attached" if self._attached else "switched off" if self._failed else "detached"
        updates = words.plural(self._recorded(), "update")
        return f"<GradWatch {state}, {updates}, {words.plural(len(self._incidents.alerts), 'incident')}>"

    def state_dict(self) -> dict[str, Any]:
        """History, incidents, clippers and what the watch has counted, as tensors and plain containers: for `torch.save` beside the
        model's state. Training that goes on from there is watched, judged and clipped as if it had not been interrupted.
        """
        self._guard(lambda recorder: recorder.settle())
        history = self.history
        recorder = self._recorder
        return {
            "history": encode(history.state_dict()),
            "incidents": encode(self._incidents.state_dict()),
            "actor": self._actor.state_dict() if self._actor is not None else None,
            "recorder": encode(recorder.state_dict() if recorder is not None else self._carried),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`: steps, history, incidents, the cadence and what clippers have learnt continue.

        Raises:
            ValueError: this is no state of a watch, or it was written with another layout or for another model.
        """
        if not isinstance(state, Mapping) or not isinstance(state.get("history"), Mapping) or "incidents" not in state:
            raise ValueError(
                f"GradWatch.load_state_dict(...): got {type(state).__name__}; it needs what GradWatch.state_dict() returned"
            )
        present = self.history.meta
        history = History.from_state_dict(decode(state["history"]))
        if not set(history.parameters) & set(self.history.parameters):
            raise ValueError(
                f"GradWatch.load_state_dict(...): the state is of another model: it knows {', '.join(history.parameters[:3])}, ..., and none "
                f"of {', '.join(self.history.parameters[:3])}, ..."
            )
        if (history.parameters, history.layers) != (self.history.parameters, self.history.layers):
            history.set_meta(present)
        self._history = history
        self._incidents.load_state_dict(decode(state["incidents"]))
        if self._actor is not None and state.get("actor") is not None:
            self._actor.load_state_dict(state["actor"])
        carried = decode(state["recorder"]) if state.get("recorder") is not None else None
        if self._recorder is None:
            self._carried, self._resumes = carried, True
        elif carried is not None:
            self._recorder.load_state_dict(carried)
        if len(history):
            self._started = time.perf_counter() - float(history.recent("time", 1)[0])  # seconds go on

    # -- what the loop does (called by the tape) -----------------------------------------------------------------------------------

    def concerns(self, roots: Sequence[Any]) -> bool:
        takes = self._home.takes(lambda: bool(self._guard(lambda recorder: recorder.reaches(roots, self._home.here()))))
        if not takes and self._home.here():
            self._guard(lambda recorder: recorder.scale.forget())
        return takes

    def lives_here(self) -> bool:
        recorder = self._recorder
        return self._home.here() or (recorder is not None and recorder.clock.in_backward)

    def _lives_in_this_thread(self) -> bool:
        return self._home.here()

    def on_backward_begin(self, roots: Sequence[Any]) -> None:
        self._guard(lambda recorder: recorder.backward_begin(roots))
        self._judge_pending()

    def on_backward_end(self, roots: Sequence[Any], scalar: bool) -> None:
        self._guard(lambda recorder: recorder.backward_end(roots, scalar))
        self._judge_pending()

    def on_backward_failed(self) -> None:
        self._guard(lambda recorder: recorder.backward_failed())

    def on_scale(self, scaler: Any) -> None:
        self._guard(lambda recorder: recorder.scale.scaled(scaler))

    def on_pre_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._heeds(optimizer) or not self.lives_here():
            return None
        closure = kwargs.get("closure") if "closure" in kwargs else next((one for one in args[1:] if callable(one)), None)
        told = self._guard(lambda recorder: recorder.pre_step(optimizer, closure is not None))
        if told is None or self._actor is None or told[0] is None:
            return None
        self._actor.refuse(optimizer)
        if told[1] and closure is not None:
            return self._with_acting_closure(optimizer, told[0], closure, args, kwargs)
        return None

    def on_post_step(self, optimizer: Optimizer) -> None:
        if self._heeds(optimizer) and self.lives_here():
            self._guard(lambda recorder: self._stepped(recorder, recorder.post_step(optimizer)))
            if self._recorder is not None and self._recorder.pending.empty_steps:
                self._judge_pending()

    def _stepped(self, recorder: Recorder, key: int | None) -> None:
        if self._keeping is not None and self._history is not None and key is not None:
            self._keeping.stepped(self._history, self._incidents.alerts, recorder, key)

    def on_fork(self) -> None:
        self._attached, self._failed = False, True
        self._console = None
        if self._recorder is not None:
            self._recorder.stop()
        self._recorder = None

    def _heeds(self, optimizer: Optimizer) -> bool:
        return self._optimizers is None or any(optimizer is one for one in self._optimizers)

    def _with_acting_closure(
        self, optimizer: Optimizer, key: int, closure: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Act at the end of a closure's first evaluation: there the gradients are complete and the weights still as they were."""
        calls = 0

        def acting() -> Any:
            nonlocal calls
            calls += 1
            if calls > 1 and self._actor is not None:
                raise RuntimeError(self._actor.evaluates_again(optimizer))
            result = closure()
            self._guard(lambda recorder: recorder.before_step(key))
            return result

        if "closure" in kwargs:
            return args, {**kwargs, "closure": acting}
        return tuple(acting if one is closure else one for one in args), kwargs

    # -- inside --------------------------------------------------------------------------------------------------------------------

    def _new_recorder(self, models: Mapping[str, nn.Module]) -> Recorder:
        return Recorder(
            models,
            self._sampling,
            next_row=_weakly(self._next_row),
            recorded=_weakly(self._recorded),
            on_row=_weakly(self._on_row),
            on_meta=_weakly(self._on_meta),
            here=_weakly(self._lives_in_this_thread),
            notice=_weakly(self._notice),
            act=self._actor,
            scaler=self._scaler,
            ask=self._inquest,
            waits=self._traces is True,
            started=time.perf_counter() if self._started is None else self._started,
        )

    def _check_actors(self, models: Mapping[str, nn.Module]) -> None:
        if self._actor is None:
            return
        mine = {id(p) for model in models.values() for p in model.parameters()}
        for other in TAPE.listeners():
            if not isinstance(other, GradWatch) or other is self or other._actor is None:
                continue
            if mine & watched_parameters(other):
                raise RuntimeError(
                    f"another GradWatch on this model already acts ({other._actor.asked}); two would act on each other's work. "
                    f"Leave {self._actor.asked} out of this one, or detach the other first."
                )

    def _next_row(self) -> NDArray[Any]:
        assert self._history is not None
        return self._history.next_row()

    def _last_inquiry(self) -> Inquiry | None:
        return self._inquest.last if self._inquest is not None else None

    def _own_alerts(self) -> tuple[Alert, ...]:
        return self._incidents.alerts

    def _own_history(self) -> History:
        assert self._history is not None
        return self._history

    def _is_full(self) -> bool:
        return self._recorder is not None and self._recorder.is_full

    def _recorded(self) -> int:
        return 0 if self._history is None else self._history.recorded

    def _on_meta(self, meta: Meta) -> None:
        if self._history is None:
            self._history = History(meta, self._sampling.window)
        else:
            self._history.set_meta(meta)

    def _on_row(self, full: bool) -> None:
        history = self._history
        assert history is not None
        history.commit(full)
        self._updates_watched += 1
        if self._recorder is not None:
            history.pending = self._recorder.pending
        self._judge(history)
        if self._keeping is not None:
            self._keeping.record_closed(history, self._incidents.alerts, self._recorder)
        if self._step_sinks:
            for sink in tuple(self._step_sinks):
                if not self._safely(partial(sink, history.record()), f"the on_step callable {_name(sink)}"):
                    self._step_sinks.remove(sink)

    def _judge_pending(self) -> None:
        """Backward passes that pile up or serve nobody have no record, and still tell something."""
        recorder, history = self._recorder, self._history
        if recorder is None or history is None:
            return
        pending = recorder.pending
        piled = pending.unowned or (pending.backward_calls and pending.backward_calls % 16 == 0)
        empty = pending.empty_steps and pending.empty_steps % EMPTY == 0
        if pending is not history.pending and (piled or empty):
            history.pending = pending
            self._guard(lambda _: self._judge(history))

    def _judge(self, history: History) -> None:
        also = self._actor.take_findings() if self._actor is not None else ()
        inquest = self._inquest
        for alert in self._incidents.judge(history, also, self._last_inquiry()):
            if inquest is not None and self._recorder is not None:
                alert = self._incidents.trace(alert, self._recorder.explain(alert))
            if alert.state == "open" and self._recorder is not None:
                self._recorder.suspect()
            for sink in tuple(self._sinks):
                if not self._safely(partial(sink, alert), f"the on_alert callable {_name(sink)}"):
                    self._sinks.remove(sink)

    def _tell(self, text: str) -> None:
        """Say what is done to the gradients: it was asked for, so it is not left to `notices` alone."""
        self._notice(text)
        console = self._console
        if console is not None:
            self._safely(lambda: console.print_lines([f"gradwatch: {text}"]), "the console")

    def _guard(self, do: Callable[[Recorder], T]) -> T | None:
        """Run a part of the watch inside the user's loop: what fails there ends the watch, not the training."""
        recorder = self._recorder
        if recorder is None:
            return None
        start = time.perf_counter()
        try:
            with np.errstate(all="ignore"):  # whatever the user has numpy do
                return do(recorder)
        except Deliberate as asked:
            raise asked.error from None
        except Exception:
            self._failed = True
            self._notice(f"the watch failed and has switched itself off; please report this:\n{traceback.format_exc()}")
            self._stop()
            return None
        finally:
            self._spent += time.perf_counter() - start

    def _safely(self, do: Callable[[], Any], what: str) -> bool:
        """Call what belongs to somebody else; whether it returned."""
        try:
            do()
        except Exception:
            self._notice(f"{what} raised and is switched off:\n{traceback.format_exc()}")
            return False
        return True

    def _notice(self, text: str) -> None:
        if text in self._notices:
            return
        if len(self._notices) < MAX_NOTICES:
            self._notices.append(text)
        logger.warning("%s", text)

    def _attached_recorder(self, name: str) -> Recorder | None:
        """The recorder; None once the watch has switched itself off, which is no reason to end the training."""
        if self._recorder is None and not self._failed:
            raise RuntimeError(
                f"GradWatch.{name}() was called on a watch that is not attached; call it inside `with GradWatch(...)`"
            )
        return self._recorder

    def _cost(self) -> tuple[float, float | None]:
        """Seconds an update that the watch took, and as a share of the time it was attached."""
        updates = self._updates_watched
        if not updates:
            return float("nan"), None
        elapsed = self._elapsed + (time.perf_counter() - self._entered if self._attached else 0.0)
        return self._spent / updates, self._spent / elapsed if elapsed > 0 else None


# -- for the scout and the pytest fixture, which look after watches; no part of the public interface -----------------------------------


def is_attached(watch: GradWatch) -> bool:
    """The watch is watching now."""
    return watch._attached


def rules_of(watch: GradWatch) -> tuple[str, ...]:
    """Names of the rules that a watch goes by."""
    return tuple(map(name_of, watch._rules))


def watched_parameters(watch: GradWatch) -> set[int]:
    """Ids of the parameters that a watch is on now; none once it is detached."""
    return {id(p) for model in (watch._models or {}).values() for p in model.parameters()}


def introduce(watch: GradWatch, optimizer: Optimizer) -> None:
    """Tell a watch of an optimizer that it has not seen step: an update may be waiting for it."""
    watch._guard(lambda recorder: recorder.know(optimizer))


def verdict_of(watch: GradWatch) -> list[str]:
    """The lines that a watch prints when it is detached."""
    cost, share = watch._cost()
    return verdict(
        watch.history,
        watch.alerts,
        cost_per_update=cost,
        share=share,
        unfinished=watch._unfinished,
        notices=len(watch._notices),
        stopped_by=watch._stopped_by,
        attached=watch._started is not None,
    )


def leave(watch: GradWatch, stopped_by: str = "") -> None:
    """Detach, and say in the verdict and the summary what stopped the run, as `words.stopper` says it; "" for nothing."""
    watch._stopped_by = stopped_by
    watch.detach()


# -- inside ------------------------------------------------------------------------------------------------------------------------


def _weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """A bound method that does not keep its object alive: the parts of a watch must not make it immortal."""
    ref = weakref.WeakMethod(method)

    def call(*args: Any) -> Any:
        target = ref()
        return None if target is None else target(*args)

    return call


def _name(sink: Any) -> str:
    return str(getattr(sink, "__qualname__", None) or type(sink).__name__)


def _detach_all() -> None:
    """At the end of the process: a watch that was attached without a block still gives its verdict."""
    # Where python showed an uncaught exception it left it there; an interactive session goes on after one.
    stopped_by = "" if hasattr(sys, "ps1") else words.stopper(getattr(sys, "last_value", None))
    for listener in list(TAPE.listeners()):
        if isinstance(listener, GradWatch):
            leave(listener, stopped_by)


atexit.register(_detach_all)
