"""A second, independent, slow way to compute what a watch records: plain torch in float64, no hooks, nothing of the package.

The author of a loop calls it at the places where something happens, and so states by hand which records the loop must give:

    reference.before_backward()
    loss.backward()
    reference.after_backward(loss)          # reads the gradients
    clip_grad_norm_(...)                    # whatever the user does
    reference.before_step(optimizer)        # what the optimizer will use
    optimizer.step()
    reference.after_step(optimizer)         # what it did
    reference.close()                       # one record
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

# The flags and reasons, by their published numbers: this file imports nothing of what it checks.
REACHED, STALE, CLEARED, STEPPED, CHANGED, CLIPPED = 1, 2, 4, 8, 16, 32
STEP_DONE, NO_STEP, SCALER = 0, 1, 2

PER_PARAMETER = ("grad_norm", "grad_nonfinite", "weight_norm", "update_ratio", "grad_state", "lr")
PER_UPDATE = ("loss", "total_norm", "clip_coef", "skipped", "skip_reason", "loss_scale", "backward_calls")


def dense(tensor: Tensor) -> Tensor:
    """A float64 copy of the values: sparse ones coalesced, complex ones as pairs of reals."""
    tensor = tensor.detach()
    if tensor.is_sparse:
        tensor = tensor.coalesce().to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.to(torch.float64, copy=True)


def norm(tensor: Tensor) -> float:
    """The 2-norm, in float64."""
    values = dense(tensor)
    return math.sqrt(float((values * values).sum()))


def nonfinite(tensor: Tensor) -> int:
    """The number of elements that are NaN or Inf."""
    values = tensor.detach()
    if values.is_sparse:
        values = values.coalesce().values()
    return int((~torch.isfinite(values)).sum())


def sample(tensor: Tensor) -> Tensor:
    """The elements by which a step is measured: all up to 1024, else 16 chunks of 64, an odd number of elements apart. A copy."""
    flat = tensor.detach().reshape(-1)
    n = flat.numel()
    if n <= 1024:
        return flat.clone()
    step = max(64, (n - 64) // 15 // 2 * 2 + (1 if (n - 64) // 15 % 2 else -1))
    return torch.cat([flat[i * step :][:64] for i in range(16)])


def rms(values: Tensor) -> float:
    """The root mean square, in float64; NaN for no values."""
    return norm(values) / math.sqrt(values.numel()) if values.numel() else math.nan


def is_blank(grad: Tensor | None) -> bool:
    """There is no gradient, or it is all zeros."""
    return grad is None or not bool((dense(grad) != 0).any())


@dataclass
class Update:
    """What has happened since the last record."""

    before: dict[str, Tensor]
    norms: dict[str, float] = field(default_factory=dict)
    bad: dict[str, int] = field(default_factory=dict)
    zero: set[str] = field(default_factory=set)
    ratio: dict[str, float] = field(default_factory=dict)
    lr: dict[str, float] = field(default_factory=dict)
    flags: dict[str, int] = field(default_factory=dict)
    owners: list[int] = field(default_factory=list)
    roots: list[float] = field(default_factory=list)
    scale: float = 1.0
    coef: float = 1.0
    calls: int = 0

    def flag(self, name: str, bit: int) -> None:
        self.flags[name] = self.flags.get(name, 0) | bit


class Reference:
    """The record of one loop, written by the loop's author.

    Args:
        model: a module, or a mapping of names to modules, as the watch is given it.
        optimizers: those that own a watched parameter and are known from the start.
        dense: full-statistics updates at the start, for each set of owners.
        every: afterwards one record in `every` is a full one.
    """

    def __init__(
        self, model: nn.Module | Mapping[str, nn.Module], *optimizers: Optimizer, dense: int = 64, every: int = 10
    ) -> None:
        self.models = {"": model} if isinstance(model, nn.Module) else dict(model)
        self.optimizers = list(optimizers)
        self.full_at_first, self.every = dense, every
        self.rows: list[dict[str, dict[str, float] | float]] = []
        self._open: Update | None = None
        self._used: dict[str, Tensor] = {}  # the gradient an owner used, until the first backward after
        self._stale: set[str] = set()
        self._seen: dict[frozenset[int], int] = {}

    # -- called by the loop --------------------------------------------------------------------------------------------------------

    def before_backward(self) -> None:
        """Just before `backward()`: is a gradient that was used already still there?"""
        self._update()
        parameters = self.named()
        self._forget_cleared()
        for name in list(self._used):
            grad, used = parameters[name].grad, self._used.pop(name)
            if not is_blank(grad) and torch.equal(dense(grad), dense(used)):  # type: ignore[arg-type]
                self._stale.add(name)

    def after_backward(self, *roots: Tensor, scale: float = 1.0, reached: Iterable[str] | None = None) -> None:
        """Just after `backward()`.

        Args:
            *roots: the scalars it was called on.
            scale: the factor that the loss was multiplied with.
            reached: fnmatch patterns of the parameters it accumulated into; None: all that require a gradient.
        """
        update = self._update()
        update.calls += 1
        update.scale = scale
        update.roots += [float(root.detach()) for root in roots]
        self.read(reached)

    def count_backward(self) -> None:
        """A backward whose gradients and loss are not recorded: a later evaluation inside one step (LBFGS)."""
        self._update().calls += 1

    def read(self, reached: Iterable[str] | None = None) -> None:
        """Read the gradients as they are now, without a backward."""
        update = self._update()
        for name, _ in self._matching(reached):
            update.flag(name, REACHED)
        for name, p in self.named().items():
            if p.grad is not None and update.flags.get(name, 0) & REACHED:
                update.norms[name] = norm(p.grad) / update.scale
                update.bad[name] = nonfinite(p.grad)
                (update.zero.add if is_blank(p.grad) else update.zero.discard)(name)

    def before_step(self, optimizer: Optimizer, *, scaled: bool = False) -> None:
        """Just before `optimizer.step()`; `scaled`: the gradients still carry the loss scale."""
        update = self._update()
        self._forget_cleared()
        unit = update.scale if scaled else 1.0
        factors: dict[str, float] = {}
        for name, p in self._owned(optimizer):
            if name not in update.norms:
                continue
            if is_blank(p.grad):
                if name not in update.zero:
                    update.flag(name, CLEARED)
                continue
            assert p.grad is not None
            now = norm(p.grad) / unit
            if math.isfinite(now) and update.norms[name] > 0:
                factors[name] = now / update.norms[name]
            if name in self._stale:
                update.flag(name, STALE)
        coef = min(factors.values(), default=1.0)
        if coef < 1 - 1e-5:
            update.coef = min(update.coef, coef)
            for name, factor in factors.items():
                if factor < 1 - 1e-5:
                    update.flag(name, CLIPPED)

    def after_step(self, optimizer: Optimizer) -> None:
        """Just after `optimizer.step()`."""
        update = self._update()
        if optimizer not in self.optimizers:
            self.optimizers.append(optimizer)
        update.owners.append(id(optimizer))
        for name, p in self._owned(optimizer):
            update.flag(name, STEPPED)
            update.lr[name] = next(float(g["lr"]) for g in optimizer.param_groups if any(p is q for q in g["params"]))
            self._measure(name, p, update)
            self._stale.discard(name)
            if p.grad is not None and name in update.norms:
                self._used[name] = p.grad.detach().clone()

    def after_moving(self, names: Iterable[str] | None = None) -> None:
        """Just after the user has changed the weights by hand."""
        update = self._update()
        for name, p in self._matching(names):
            if not torch.equal(sample(p), sample(update.before[name])):
                self._measure(name, p, update)

    def close(self, *, skip: int = STEP_DONE, loss: float | None = None) -> None:
        """The record is complete.

        Args:
            skip: `NO_STEP` or `SCALER` where the weights were left unchanged.
            loss: replaces the sum of the roots (`watch.loss`).
        """
        update, self._open = self._update(), None
        owners = frozenset(update.owners or [id(o) for o in self._owners_of(update.norms)])
        n = self._seen.get(owners, 0)
        self._seen[owners] = n + 1
        full = n < self.full_at_first or n % self.every == 0
        foreign = self._foreign(update)
        for name in foreign:
            for column in (update.norms, update.bad, update.ratio, update.lr, update.flags):
                column.pop(name, None)
        total = [v for name, v in update.norms.items() if not update.owners or update.flags[name] & STEPPED]
        flags = {name: bits if full else bits & ~CHANGED for name, bits in update.flags.items()}
        self.rows.append(
            {
                "grad_norm": update.norms,
                "grad_nonfinite": {k: v if not math.isfinite(update.norms[k]) else 0 for k, v in update.bad.items()},
                "weight_norm": {name: norm(update.before[name]) for name in update.norms} if full else {},
                "update_ratio": update.ratio if full and skip == STEP_DONE else {},
                "grad_state": {name: float(bits) for name, bits in flags.items()},
                "lr": update.lr,
                "loss": loss if loss is not None else sum(update.roots) / update.scale if update.roots else math.nan,
                "total_norm": math.sqrt(sum(v * v for v in total)),
                "clip_coef": update.coef,
                "skipped": float(skip != STEP_DONE),
                "skip_reason": float(skip),
                "loss_scale": update.scale,
                "backward_calls": float(update.calls),
            }
        )

    def drop(self) -> None:
        """What was seen since the last record gives none."""
        self._open = None

    # -- what a watch must have recorded -------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(self.named())

    def stat(self, name: str) -> NDArray[np.float64]:
        """`[T, P]` or `[T]`, float64; NaN where nothing was observed, but 0 in `grad_state`."""
        if name in PER_UPDATE:
            return np.array([row[name] for row in self.rows], np.float64)
        empty = 0.0 if name == "grad_state" else math.nan
        table = [row[name] for row in self.rows]
        columns = self.parameters
        return np.array([[row.get(p, empty) for p in columns] for row in table], np.float64)  # type: ignore[union-attr]

    # -- inside --------------------------------------------------------------------------------------------------------------------

    def named(self) -> dict[str, nn.Parameter]:
        """All parameters that have a value, each once, under its first name."""
        found: dict[str, nn.Parameter] = {}
        seen: set[int] = set()
        for key, model in self.models.items():
            for name, p in model.named_parameters():
                if id(p) not in seen and not is_lazy(p):
                    seen.add(id(p))
                    found[f"{key}.{name}" if key else name] = p
        return found

    def _update(self) -> Update:
        if self._open is None:
            self._open = Update({name: p.detach().clone() for name, p in self.named().items()})
        return self._open

    def _matching(self, patterns: Iterable[str] | None) -> list[tuple[str, nn.Parameter]]:
        named = self.named().items()
        if patterns is None:
            return [(name, p) for name, p in named if p.requires_grad]
        patterns = [patterns] if isinstance(patterns, str) else list(patterns)
        found = [(name, p) for name, p in named if any(fnmatchcase(name, pattern) for pattern in patterns)]
        assert found or not patterns, f"the loop names {patterns}, the model has {list(self.named())}"
        return found

    def _owned(self, optimizer: Optimizer) -> list[tuple[str, nn.Parameter]]:
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [(name, p) for name, p in self.named().items() if id(p) in mine]

    def _owners_of(self, names: Iterable[str]) -> list[Optimizer]:
        names = set(names)
        return [o for o in self.optimizers if any(name in names for name, _ in self._owned(o))]

    def _foreign(self, update: Update) -> list[str]:
        """Reached, and owned by an optimizer that has not stepped while another one has."""
        if not update.owners:
            return []
        owned = {name for o in self.optimizers for name, _ in self._owned(o)}
        return [name for name, bits in update.flags.items() if name in owned and not bits & STEPPED]

    def _measure(self, name: str, p: nn.Parameter, update: Update) -> None:
        old, new = sample(update.before[name]), sample(p)
        size = rms(old)
        if size != 0 and not math.isnan(size):
            update.ratio[name] = rms(dense(new) - dense(old)) / rms(dense(old))
        if not np.array_equal(dense(new).numpy(), dense(old).numpy(), equal_nan=True):
            update.flag(name, CHANGED)

    def _forget_cleared(self) -> None:
        parameters = self.named()
        for held in (self._used, self._stale):
            for name in [name for name in held if is_blank(parameters[name].grad)]:
                held.pop(name) if isinstance(held, dict) else held.discard(name)
