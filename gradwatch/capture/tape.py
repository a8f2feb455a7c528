"""`backward()` seen: its beginning, its end, its roots and their scale. And `Optimizer.step` and `GradScaler.scale`, the same way.

`Tensor.backward` looks `torch.autograd.backward` up at call time, so that wrapping this one function while any watch is live sees
every root: plain loops, Lightning, compiled models. One wrapper serves all watches; it is removed with the last of them, and only if
it is still ours. Nothing here keeps a watch alive.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from gradwatch.capture import private


class Listener(Protocol):
    """What a watch hears. Only what it raises on purpose may leave these methods.

    Gradients of a model that another thread trains must not be looked at: the engine writes them without Python's lock. So each watch
    says which thread is its own, and hears of no other.
    """

    def concerns(self, roots: Sequence[Any]) -> bool: ...
    def lives_here(self) -> bool: ...
    def on_backward_begin(self, roots: Sequence[Any]) -> None: ...
    def on_backward_end(self, roots: Sequence[Any], scalar: bool) -> None: ...
    def on_backward_failed(self) -> None: ...
    def on_scale(self, scaler: Any) -> None: ...
    def on_pre_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...
    def on_post_step(self, optimizer: Optimizer) -> None: ...
    def on_fork(self) -> None: ...


class Tape:
    """The wrappers and global hooks, in place while at least one listener is live."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._listeners: list[weakref.ref[Listener]] = []
        self._backward: Callable[..., None] | None = None
        self._wrapper: Callable[..., None] | None = None
        self._token: object = None
        self._scales: list[tuple[type, Any, Any]] = []
        self._handles: list[RemovableHandle] = []
        self._deaf = 0

    @contextlib.contextmanager
    def deaf(self) -> Iterator[None]:
        """While it is entered, nobody hears of backward passes in this thread: they are the watch's own."""
        before, self._deaf = self._deaf, threading.get_ident()
        try:
            yield
        finally:
            self._deaf = before

    def add(self, listener: Listener) -> None:
        """Let `listener` hear from now on; it is held weakly."""
        with self._lock:
            self._listeners = [ref for ref in self._listeners if ref() is not None and ref() is not listener]
            self._listeners.append(weakref.ref(listener, self._gone))
            if self._wrapper is None:
                self._install()

    def remove(self, listener: Listener) -> None:
        """Let `listener` hear no more; with the last one everything is taken out."""
        with self._lock:
            self._listeners = [ref for ref in self._listeners if ref() is not None and ref() is not listener]
            if not self._listeners and self._wrapper is not None:
                self._uninstall()

    def listeners(self) -> Iterator[Listener]:
        """Those that are live, in the order of attaching."""
        for ref in tuple(self._listeners):
            listener = ref()
            if listener is not None:
                yield listener

    def _gone(self, ref: weakref.ref[Listener]) -> None:
        with self._lock:
            self._listeners = [other for other in self._listeners if other is not ref and other() is not None]
            if not self._listeners and self._wrapper is not None:
                self._uninstall()

    # -- in and out ----------------------------------------------------------------------------------------------------------------

    def _install(self) -> None:
        original = torch.autograd.backward
        tape, token = self, object()

        @private.uncompiled
        @functools.wraps(original)
        def backward(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
            # Somebody may have wrapped or kept this wrapper before it was taken out: it stays in their chain and is deaf there.
            if tape._token is not token or private.in_backward() or not tape._listeners or tape._is_deaf():
                return original(tensors, grad_tensors, *args, **kwargs)
            return tape._run(original, tensors, grad_tensors, args, kwargs)

        self._backward, self._wrapper, self._token = original, backward, token
        torch.autograd.backward = backward
        for scaler in _scaler_classes():
            self._wrap_scale(scaler)
        self._handles = [register_optimizer_step_pre_hook(_pre_step), register_optimizer_step_post_hook(_post_step)]

    def _uninstall(self) -> None:
        if torch.autograd.backward is self._wrapper and self._backward is not None:
            torch.autograd.backward = self._backward
        self._backward = self._wrapper = self._token = None
        for scaler, original, wrapper in self._scales:
            if scaler.__dict__.get("scale") is wrapper:
                scaler.scale = original  # type: ignore[attr-defined]
        self._scales.clear()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _wrap_scale(self, scaler: type) -> None:
        original = scaler.__dict__["scale"]
        tape, token = self, self._token

        @private.uncompiled
        @functools.wraps(original)
        def scale(self: Any, outputs: Any, *args: Any, **kwargs: Any) -> Any:
            scaled = original(self, outputs, *args, **kwargs)
            for listener in tape.listeners() if tape._token is token else ():
                if listener.lives_here():
                    listener.on_scale(self)
            return scaled

        scaler.scale = scale  # type: ignore[attr-defined]
        self._scales.append((scaler, original, scale))

    def _is_deaf(self) -> bool:
        return self._deaf != 0 and self._deaf == threading.get_ident()

    # -- one backward --------------------------------------------------------------------------------------------------------------

    def _run(self, original: Callable[..., None], tensors: Any, grad_tensors: Any, args: tuple[Any, ...], kwargs: Any) -> None:
        if not isinstance(tensors, Tensor) and not hasattr(tensors, "node"):
            roots = tensors = tuple(tensors)  # it may be an iterator, and two of us read it
        else:
            roots = (tensors,)
        concerned = [listener for listener in self.listeners() if listener.concerns(roots)]
        for listener in concerned:
            listener.on_backward_begin(roots)
        try:
            original(tensors, grad_tensors, *args, **kwargs)
        except BaseException:
            for listener in concerned:
                listener.on_backward_failed()
            raise
        scalar = grad_tensors is None and all(isinstance(root, Tensor) and root.numel() == 1 for root in roots)
        for listener in concerned:
            listener.on_backward_end(roots, scalar)


TAPE = Tape()
"""The one tape of the process."""


@private.uncompiled
def _pre_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    changed = None
    for listener in TAPE.listeners():
        new = listener.on_pre_step(optimizer, args, kwargs)
        if new is not None:
            args, kwargs = changed = new
    return changed


@private.uncompiled
def _post_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for listener in TAPE.listeners():
        listener.on_post_step(optimizer)


def _scaler_classes() -> list[type]:
    """GradScaler and the subclasses that override `scale`, as known now."""
    found: list[type] = []
    todo: list[type] = [torch.amp.GradScaler]
    while todo:
        cls = todo.pop()
        todo.extend(cls.__subclasses__())
        if "scale" in cls.__dict__ and cls not in found:
            found.append(cls)
    return found


def _after_fork() -> None:
    """The child's watches are off: its copy of the loop is not the one that is watched."""
    listeners = list(TAPE.listeners())
    TAPE._lock = threading.RLock()
    for listener in listeners:
        listener.on_fork()
        TAPE.remove(listener)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
