"""The last good states of a training: copied to host memory now and then, and put back bit for bit."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gradwatch.protect.host import Host
from gradwatch.protect.state import Layers, State, changes_since, describe, put_back

STATES = 2
"""States that are held. The newest may have been taken while a fault was already there and not yet seen; the one before it was not."""


@dataclass(frozen=True)
class Kept:
    """A state that has been put back.

    Attributes:
        step: the number that it was kept under.
        watch: a copy of what was kept as the watch's own state, tensors on the devices they were on.
    """

    step: int
    watch: Mapping[str, Any]


class GoodStates:
    """The last good states of a training, in host memory: at most two.

    Keep and restore between updates: after the scheduler and `GradScaler.update()` of the one before, and before the forward pass of the
    next, which draws random numbers. Kept inside `optimizer.step()`, a state would have the weights of an update and not yet its lr and
    loss scale. After a restore the loop goes on with a new forward pass. Where several processes train together, each keeps its own part
    and all restore at once.

    What a state holds, and how it goes back:

    * Parameters and buffers, non-persistent ones too, and what an optimizer owns outside the models: written into the very tensors that
      stood there, so that optimizers, tied weights, views, flattened RNN weights and compiled code need not know. `requires_grad`,
      `.train()` and other attributes of modules stay as they are. `_version` counts on: a graph from before the restore raises in its
      backward, as it must. A buffer that was assigned anew since goes back to the tensor that it was, or where that is gone to a new one;
      what stands there now may be somebody's batch and is not written to.
    * `get_extra_state()` of modules that define it.
    * Optimizers: the tensors in `.state` and `.param_groups`, in place as well, and all else in them deep-copied. Not by
      `load_state_dict`, which casts moments to their parameter's dtype, makes new tensors, and spoils strings. State and keys that came
      later are taken out: kept before the first step, there are no moments afterwards. An optimizer whose class has a `state_dict` or
      `load_state_dict` of its own keeps its state where it likes and goes back by these two, as exactly as they do it; one with hooks on
      torch's goes back both ways.
    * GradScalers, by their `state_dict`, which waits for the device. What one had noted of an unfinished update is dropped: after an
      exception within `scaler.step` it would take the next gradients for unscaled already, and step by them as they are.
    * Random numbers: Python's, numpy's and torch's global generators, CUDA's where CUDA is in use. Other generators are the user's.
    * What was handed in as `also`, by its `state_dict`.

    `p.grad` becomes None: gradients of weights that have been given up mean nothing, and those of a half-accumulated update would be
    added to. (An optimizer steps no parameter without a gradient: in a loop with `zero_grad(set_to_none=False)`, one that no longer takes
    part is left out from then on, where before it decayed.)

    Keeping changes nothing in the training: no random number is drawn, no graph is made or held. Of CPU tensors it is one pass of memory,
    and so is restoring: 7 ms for the 120 MB of 10 M float32 parameters under AdamW in 60 tensors, where a bare copy takes 6; 26 ms the
    first two times, when the memory is got; and 7 us a tensor, which is what counts in a model of many small ones (torch 2.13, two idle
    cores of an AMD EPYC; 22 ms with neighbours that keep the memory busy). CUDA tensors are copied to pinned memory on the current stream,
    which a later update in place cannot overtake; only what is about to read or overwrite that memory waits. (torch's pinned allocator
    may round a tensor's memory up to a power of two.) Memory is got once and written over as long as the layout stays. Sparse tensors are
    copied anew each time; tensors inside objects that are no plain container are deep-copied where they are.

    Args:
        models: the models under "" or their keys; referred to weakly.
        also: further objects with `state_dict()` and `load_state_dict()` that go back too: schedulers, an EMA, a data sampler. Referred to
            strongly, for they may be made for the purpose.
    """

    def __init__(self, models: Mapping[str, nn.Module], also: Iterable[Any] = ()) -> None:
        self._models = {key: weakref.ref(model) for key, model in models.items()}
        self._also = tuple(also)
        self._states: list[State] = []
        self._free: list[Host] = []

    @property
    def steps(self) -> tuple[int, ...]:
        """Numbers of the states that are kept, oldest first."""
        return tuple(state.step for state in self._states)

    @property
    def nbytes(self) -> int:
        """Host memory of the copies of tensors, in bytes, with that which waits to be written over."""
        return sum(host.nbytes for host in (*self._free, *(state.host for state in self._states)))

    def keep(self, step: int, optimizers: Sequence[Optimizer], scalers: Sequence[Any], watch: Mapping[str, Any]) -> None:
        """Keep the present state; where two are kept already, over the older of them.

        States of this step and later ones are forgotten: they are of a training that was given up. Where something raises before the
        copying begins, which is to say in what the user handed in, all that was kept is still there.

        Args:
            step: number of the state, by which `restore` chooses.
            optimizers: referred to weakly.
            scalers: GradScalers.
            watch: the watch's own state, as containers of tensors and numbers.

        Raises:
            RuntimeError: a model is gone, or a parameter or buffer has no values yet.
            Exception: what a `state_dict()` raises, or `copy.deepcopy` of what it returned.
        """
        with torch.inference_mode(False), torch.no_grad():
            state, tensors = describe(step, Layers(self._living()), optimizers, scalers, self._also, watch)
            self._forget(lambda one: one.step >= step)
            if self._free:
                state.host = self._free.pop()
            elif len(self._states) == STATES:
                state.host = self._states.pop(0).host
            try:
                state.host.write(tensors, state.layouts + state.told_layouts)
            except BaseException:  # Ctrl-C halfway: this memory holds no state
                self._free.append(state.host)
                raise
            self._states.append(state)

    def restore(self, before: int | None = None) -> Kept:
        """Put a state back. Those kept after it are forgotten; it stays, to be put back again.

        Everything is checked before anything is written, and what belongs to others is loaded first: where a `load_state_dict()` raises,
        models and torch's optimizers are as they were.

        Args:
            before: the newest state with a step below this is chosen, or the oldest where there is none; None: the newest.

        Raises:
            RuntimeError: nothing was kept; or since the state was kept a model or optimizer is gone, a parameter, buffer or parameter
                group was added or removed, or a parameter was replaced or has another shape, dtype or device.
            Exception: what a `load_state_dict()` raises.
        """
        if not self._states:
            raise RuntimeError(
                "there is no good state to go back to: none has been kept yet. Let a few updates pass before rolling back, keep states "
                "more often, or load a checkpoint."
            )
        earlier = [state for state in self._states if before is None or state.step < before]
        state = earlier[-1] if earlier else self._states[0]
        layers = Layers(self._living())
        changes = changes_since(state, layers)
        if changes:
            more = f"; and {len(changes) - 3} more" if len(changes) > 3 else ""
            raise RuntimeError(
                f"cannot go back to the state of step {state.step}, and nothing has been changed: since then {'; '.join(changes[:3])}{more}. "
                "Put back what was changed by hand, or go back to a checkpoint; the next state is kept of the model as it is."
            )
        with torch.inference_mode(False), torch.no_grad():
            watch = put_back(state, layers, self._also)
        self._forget(lambda one: one.step > state.step)
        return Kept(state.step, watch)

    def _living(self) -> dict[str, nn.Module]:
        models = {key: model for key, ref in self._models.items() if (model := ref()) is not None}
        for key in self._models.keys() - models.keys():
            raise RuntimeError(
                f"the model{f' {key!r}' if key else ''} whose states were to be kept no longer exists; hold on to it while it is trained, "
                "or make a new GradWatch for the new model"
            )
        return models

    def _forget(self, which: Callable[[State], bool]) -> None:
        self._free += [state.host for state in self._states if which(state)]
        self._states = [state for state in self._states if not which(state)]
