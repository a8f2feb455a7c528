"""Every private name of torch that gradwatch uses: one function each, with a fallback instead of a failure.

`self_test` tells which of them this torch does not have; the watch says so once, in a notice.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def in_backward() -> bool:
    """Whether the autograd engine is running a node in this thread: a nested `backward` (reentrant checkpoint), or user code in a hook.

    Without the private name: False, so that a nested call counts as a second backward of the same record.
    """
    try:
        return bool(torch._C._current_graph_task_id() != -1)
    except AttributeError:
        return False


def sequence_number(node: Any) -> int:
    """Rank of an autograd node in the order in which the forward pass made them; -1 where it has none (AccumulateGrad)."""
    try:
        number = int(node._sequence_nr())
    except AttributeError:
        return -1
    return number if number < 2**63 else -1


def next_sequence_number() -> int:
    """The rank that the next node to be made will get; -1 where this torch does not tell."""
    try:
        return int(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]
    except AttributeError:
        return -1


def current_node() -> Any:
    """The autograd node that the engine is running in this thread; None outside a backward, or where this torch does not tell."""
    try:
        return torch._C._current_autograd_node()
    except AttributeError:
        return None


@functools.cache
def operator_names() -> dict[str, str]:
    """Names of torch's operators by the same without underscores, in small letters: what an autograd node is called after."""
    try:
        names = {
            name.partition("::")[2].partition(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::")
        }
    except AttributeError:
        return {}
    # The shorter one last: `softmax` rather than `_softmax`.
    return {name.replace("_", "").lower(): name for name in sorted(names, key=len, reverse=True)}


def watched_operators() -> int:
    """How many dispatch modes are watching operators in this thread; 1 where this torch does not tell."""
    try:
        return int(torch._C._len_torch_dispatch_stack())
    except AttributeError:
        return 1


def take_out_mode(mode: Any) -> None:
    """Take a dispatch mode off this thread's stack, also from below others, which stay as they are; does nothing if it is not there."""
    try:
        count = torch._C._len_torch_dispatch_stack()
        stack = [torch._C._get_dispatch_stack_at(i) for i in range(count)]
        if mode not in stack:
            return
        above = stack[stack.index(mode) + 1 :]
        for _ in above:
            torch._C._pop_torch_dispatch_stack(None)
        mode.__exit__(None, None, None)
        for each in above:
            torch._C._push_on_torch_dispatch_stack(each)
    except AttributeError:
        mode.__exit__(None, None, None)


def saved_number(node: Any, name: str) -> float | None:
    """A number that an autograd node keeps, for example the `reduction` of a loss; None where it has none of this name."""
    if hasattr(node, f"_raw_saved_{name}"):
        return None  # it is a tensor, which may not be there to be read
    value = getattr(node, f"_saved_{name}", None)
    return float(value) if isinstance(value, (int, float)) else None


def saved_integer(node: Any, name: str) -> int | None:
    """A signed integer that an autograd node keeps, which torch gives as an unsigned one of 64 bits: -1 is the largest of them."""
    value = getattr(node, f"_saved_{name}", None)
    if not isinstance(value, int):
        return None
    return value - 2**64 if value >= 2**63 else value


def saved_tensor(node: Any, name: str) -> Tensor | None:
    """A tensor that an autograd node keeps; None where it has none of this name, where it has been freed, and where it was packed by
    somebody's hooks: to read what lies in a checkpoint would start a recomputation.

    Without the private name: None.
    """
    try:
        raw = getattr(node, f"_raw_saved_{name}", None)
        value = getattr(node, f"_saved_{name}", None) if raw is not None and raw.unpack_hook is None else None
    except (AttributeError, RuntimeError):
        return None
    return value if isinstance(value, Tensor) else None


def has_value(tensor: Tensor) -> bool:
    """Whether a tensor that an autograd node keeps can be computed with: a number that was given in place of one is kept as a tensor, but
    while a dispatch mode watches operators none takes it for one (measured)."""
    return tensor.dim() > 0 or not watched_operators()


def output_shape(node: Any, number: int = 0) -> tuple[int, ...] | None:
    """Shape of one of the tensors that an autograd node made, the first by default; None where this torch does not tell."""
    try:
        return tuple(int(size) for size in node._input_metadata[number].shape)
    except (AttributeError, IndexError, TypeError):
        return None


def scale_of(scaler: Any) -> Tensor | None:
    """The scale of a GradScaler as a 0-d tensor on its device, without a synchronisation; None before its first use."""
    scale = getattr(scaler, "_scale", None)
    return scale if isinstance(scale, Tensor) else None


def foreach_norm(tensors: list[Tensor]) -> list[Tensor]:
    """2-norms of dense floating tensors of one device and dtype, as 0-d tensors: one multi-tensor call where torch has it."""
    wide = tensors[0].dtype in (torch.float64, torch.float32)
    try:
        return list(torch._foreach_norm(tensors, 2, dtype=None if wide else torch.float32))
    except (AttributeError, TypeError, RuntimeError, NotImplementedError):
        dtype = None if wide else torch.float32
        return [torch.linalg.vector_norm(tensor, dtype=dtype) for tensor in tensors]


def foreach_copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    """`target.copy_(source)` for each pair, in one call where torch has it."""
    try:
        torch._foreach_copy_(targets, sources)
    except AttributeError:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)


version: Callable[[Tensor], int] = attrgetter("_version")
"""How often a tensor was changed in place, as far as autograd was told; a getter in C, for it is asked of every gradient."""


def version_or_zero(tensor: Tensor) -> int:
    """The same, of any tensor: those made under `inference_mode` count nothing."""
    return 0 if tensor.is_inference() else tensor._version


def base(tensor: Tensor) -> Tensor | None:
    """What a tensor is a view of; None for one that is no view."""
    return tensor._base


def has_compiled() -> bool:
    """Whether dynamo has compiled a frame in this process; without the private name: whether it is there at all."""
    if "torch._dynamo" not in sys.modules:
        return False
    try:
        return bool(sys.modules["torch._dynamo.utils"].counters["frames"] or sys.modules["torch._dynamo.utils"].counters["stats"])
    except (KeyError, AttributeError, TypeError):
        return True


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether `module.compile()` was called."""
    return getattr(module, "_compiled_call_impl", None) is not None


def compiles_autograd() -> bool:
    """Whether a backward that began now would be compiled (compiled autograd)."""
    return bool(getattr(sys.modules.get("torch._dynamo.compiled_autograd"), "compiled_autograd_enabled", False))


def is_ordinary() -> bool:
    """Whether tensors are what they seem and nobody watches operators: no `torch.func` transform, no dispatch mode, no tracing. 0.3 us.

    Without a private name: yes, as far as is known.
    """
    try:
        return (
            torch._C._functorch.peek_interpreter_stack() is None
            and torch._C._len_torch_dispatch_stack() == _own_modes[0]
            and torch._C._get_tracing_state() is None
            and not _fx._is_fx_tracing_flag
        )
    except AttributeError:
        return True


_own_modes = [0]


def own_mode(on: bool) -> None:
    """A dispatch mode of ours begins to watch operators, or it ends: to our hooks it is nobody."""
    _own_modes[0] = int(on)


_fx: Any = sys.modules.get("torch.fx._symbolic_trace")


def is_observed() -> bool:
    """Whether tensors are what they seem, but a dispatch mode watches operators (selective checkpointing, a counter of flops).

    Then operators of ours would be among them. FakeTensor, `make_fx` and export run under modes of their own kinds. Without a private
    name: no.
    """
    try:
        kinds = torch._C._TorchDispatchModeKey
        return (
            torch._C._functorch.peek_interpreter_stack() is None
            and torch._C._get_tracing_state() is None
            and not _fx._is_fx_tracing_flag
            and all(torch._C._get_dispatch_mode(kind) is None for kind in (kinds.FAKE, kinds.PROXY, kinds.FUNCTIONAL))
        )
    except AttributeError:
        return False


def graph_may_write() -> bool:
    """Asked while dynamo traces: whether the code being traced may change a tensor of ours in place.

    Not under a `torch.func` transform and not in the body of a higher-order operator (`torch.cond`): there the user's call would raise.
    Not in a graph that is exported: it would carry the tensor away. A checkpoint's body may. Without a private name: no.
    """
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        if torch._C._functorch.peek_interpreter_stack() is not None:
            return False
        output = InstructionTranslator.current_tx().output
        tracer: Any = output.current_tracer
        while tracer.parent is not None:
            if getattr(tracer.source_target, "__name__", "") not in _CHECKPOINTS:
                return False
            tracer = tracer.parent
        return not output.export
    except (ImportError, AttributeError):
        return False


# Dynamo does not trace it but calls it, and takes its answer for a constant: `torch.compiler.assume_constant_result` without its import.
graph_may_write._dynamo_marked_constant = True  # type: ignore[attr-defined]

_CHECKPOINTS = ("tag_activation_checkpoint", "wrap_activation_checkpoint")


def statically_known(condition: Any) -> bool:
    """Asked while dynamo traces: whether a comparison of sizes is true, without a guard where they are symbols: unknown is False.

    Without the private name a guard is what it costs: one more graph when the answer changes.
    """
    if not _knows_symbols():
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def _knows_symbols() -> bool:
    """Whether dynamo traces `statically_known_true`."""
    try:
        rules: Any = sys.modules["torch._dynamo.trace_rules"]
        return "torch.fx.experimental.symbolic_shapes.statically_known_true" in rules.manual_torch_name_rule_map
    except (KeyError, AttributeError):
        return False


_knows_symbols._dynamo_marked_constant = True  # type: ignore[attr-defined]


def saved_tensors_are_hooked() -> bool:
    """Whether what autograd saves now is packed by somebody's hooks (a checkpoint): reading it would start a recomputation.

    Without the private name: yes, so that nothing is read.
    """
    try:
        return bool(torch._C._autograd._top_saved_tensors_default_hooks(True))
    except (AttributeError, TypeError, RuntimeError):
        return True


def forward_hooks(module: torch.nn.Module) -> dict[int, Any]:
    """The dictionary of a module's forward hooks, live: to take one out and put it in again costs a fiftieth of registering it."""
    return module._forward_hooks


def forward_pre_hooks(module: torch.nn.Module) -> dict[int, Any]:
    """The same of its forward pre-hooks."""
    return module._forward_pre_hooks


HOOK_DICTIONARIES = {
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
}
"""The dictionaries of a module's forward hooks, by their names in its `__dict__`, and those that say more of a hook under its key."""


def take_out_hooks(module: torch.nn.Module, which: Callable[[Any], bool]) -> None:
    """Remove forward hooks and forward pre-hooks, and what is noted of them elsewhere, as their handles would."""
    for name, companions in HOOK_DICTIONARIES.items():
        for number in [number for number, hook in list(getattr(module, name).items()) if which(hook)]:
            for table in (name, *companions):
                getattr(module, table).pop(number, None)


def children(module: torch.nn.Module) -> dict[str, torch.nn.Module | None]:
    """The dictionary of a module's own submodules, live: that a name was added or replaced shows in it."""
    return module._modules


def has_hooks(tensor: Tensor) -> bool:
    """Whether somebody has registered hooks on a tensor's gradient."""
    return bool(getattr(tensor, "_backward_hooks", None))


def own_parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter | None]:
    """The dictionary of a module's own parameters, live."""
    return module._parameters


def own_buffers(module: torch.nn.Module) -> dict[str, Tensor | None]:
    """The dictionary of a module's own buffers, live."""
    return module._buffers


def sparse_values(tensor: Tensor) -> Tensor:
    """The values of a sparse tensor, duplicates summed, without a graph."""
    return tensor.coalesce()._values() if tensor.is_sparse else tensor.values()


def shard(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; another tensor as it is."""
    local = getattr(tensor, "_local_tensor", tensor)
    return local if isinstance(local, Tensor) else tensor


def uncompiled(function: Callable[..., T]) -> Callable[..., T]:
    """`function`, which dynamo neither traces nor enters: a compiled step or train step breaks its graph there and goes on behind it.

    `torch.compiler.disable` does that, but imports dynamo, which takes seconds: so it is asked for only once somebody else has.
    """
    disabled: Callable[..., T] | None = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> T:
        nonlocal disabled
        if disabled is None:
            if "torch._dynamo" not in sys.modules:
                return function(*args, **kwargs)
            disabled = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
        return disabled(*args, **kwargs)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return call


def never_a_frame(function: Callable[..., T]) -> Callable[..., T]:
    """`function`, which dynamo traces where it is part of something compiled, and else leaves alone, with all that it calls.

    A hook on the outermost compiled module runs beside its graph, and dynamo would compile it as another one (measured).
    Without the private name: it does.
    """
    frames: Any = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
    code: Any = getattr(function, "__code__", None)
    try:
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(code, frames._FrameExecStrategy(skip, skip))
    except (AttributeError, TypeError):
        skip_code = getattr(frames, "skip_code", None)  # as earlier versions have it
        if skip_code is not None:
            skip_code(code)
    return function


def leave_alone(classes: Iterable[type[torch.nn.Module]], on: bool) -> None:
    """Have dynamo not compile the `forward` of torch's own modules by itself for the sake of our hooks; `on=False` takes that back.

    Where one of them is called outside a graph it runs eagerly, but from torch 2.13 on (measured) only if it has no hook: else its
    `forward` becomes a graph of its own, whose gradients are not bit-identical. What is inlined into a graph is no different.
    """
    frames: Any = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
    codes = {getattr(cls.forward, "__code__", None) for cls in classes if cls.__module__.startswith(("torch.nn.", "torch.ao."))}
    for code in codes - {None}:
        before = _left_alone[code]
        _left_alone[code] += 1 if on else -1
        if before and _left_alone[code]:
            continue
        try:
            action = frames._FrameAction.SKIP if on else frames._FrameAction.DEFAULT
            frames.set_code_exec_strategy(code, frames._FrameExecStrategy(action, frames._FrameAction.DEFAULT))
        except (AttributeError, TypeError):
            return


_left_alone: Counter[Any] = Counter()


def guard_hooks(owner: object, on: bool) -> None:
    """Have dynamo check what it compiles from now on against the hooks of modules, while any owner asks for it.

    By default it takes hooks for fixed: what was compiled for a module without hooks then serves a watched one of the same kind as
    well, an unwatched twin of the model for example, and the watched one falls silent (measured).
    """
    config: Any = sys.modules.get("torch._dynamo.config")
    if not hasattr(config, "skip_nnmodule_hook_guards"):
        return
    if on and not _guarding:
        _skipped.append(config.skip_nnmodule_hook_guards)
        config.skip_nnmodule_hook_guards = False
    if on:
        _guarding.add(id(owner))
    else:
        _guarding.discard(id(owner))
    if not _guarding and _skipped:
        config.skip_nnmodule_hook_guards = _skipped.pop() or config.skip_nnmodule_hook_guards


_guarding: set[int] = set()
_skipped: list[bool] = []


def call_code() -> Any:
    """The code of a module's call, on Python's stack while it runs; None where this torch calls it otherwise."""
    return getattr(getattr(torch.nn.Module, "_call_impl", None), "__code__", None)


def running_calls(module: torch.nn.Module, limit: int = 400) -> int:
    """How often a module is being called on this thread's Python stack, up to `limit` frames deep.

    Without the private name: never, so that a model that is called inside itself is taken for one whose call was broken off.
    """
    code = call_code()
    walk: Any = sys._getframe(1)
    count = 0
    while walk is not None and limit:
        count += walk.f_code is code and walk.f_locals.get("self") is module
        walk, limit = walk.f_back, limit - 1
    return count


def running_steps(limit: int = 400) -> int:
    """How many `Optimizer.step` wrappers are on this thread's Python stack, up to `limit` frames deep."""
    import torch.optim.optimizer as module

    code = getattr(module.Optimizer.profile_hook_step(_no_step), "__code__", None)
    frame, count = sys._getframe(1), 0
    walk: Any = frame
    while walk is not None and limit:
        count += walk.f_code is code
        walk, limit = walk.f_back, limit - 1
    return count


def _no_step(optimizer: Any) -> None:
    """Stands in for a step, to learn the code object of torch's wrapper."""


def self_test() -> list[str]:
    """What this torch lacks, in words; empty where everything is there."""
    lacking = []
    if not hasattr(torch._C, "_current_graph_task_id"):
        lacking.append("_current_graph_task_id (nested backward calls count as separate ones)")
    if not hasattr(torch, "_foreach_norm") or not hasattr(torch, "_foreach_copy_"):
        lacking.append("_foreach_norm/_foreach_copy_ (reading costs more)")
    with torch.inference_mode(False), torch.enable_grad():
        node = (torch.ones((), device="cpu", requires_grad=True) * 2).grad_fn
    if sequence_number(node) < 0:
        lacking.append("_sequence_nr (the order of execution is not known)")
    if not hasattr(getattr(torch._C._autograd, "SavedTensor", None), "unpack_hook"):
        lacking.append("SavedTensor.unpack_hook (what the loss is, is not known)")
    if next_sequence_number() < 0 or not hasattr(torch._C, "_current_autograd_node"):
        lacking.append(
            "_get_sequence_nr or _current_autograd_node (a NaN that is born in a backward pass is told without its line)"
        )
    if not hasattr(torch._C, "_len_torch_dispatch_stack") or not hasattr(torch._C, "_push_on_torch_dispatch_stack"):
        lacking.append("the stack of dispatch modes (updates are not traced as they run)")
    return [f"torch {torch.__version__} lacks {name}" for name in lacking]
