"""Steps that change too little or too much of the weights, or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradwatch.baselines import WINDOW, ZERO
from gradwatch.diagnose.arrays import DECADE, median
from gradwatch.diagnose.naming import layers_of, named
from gradwatch.diagnose.rules.loss import IMPROVED, Progress, guess_of, has_learnt, progress
from gradwatch.diagnose.rules.rule import patient, persistent, sampled
from gradwatch.history import History
from gradwatch.records import Finding, GradState, Severity

UNCHANGED = 9
"""Looks in a row, each after a step, that found every bit as it was: the tenth update is the earliest at which a rule speaks, and a
large parameter is looked at whole from its third one on."""

END_OF_SCHEDULE = 1e-2
"""Part of its largest learning rate below which a schedule is over: a cosine is there for the last 6 % of a run, and rounds away at 1e-5 of
it, in the last 0.2 %."""

AT_ONCE = 2.0
"""Update ratio of one update with which the weights are others than before: Adam's first step is the learning rate for each element, 0.1
of weights of 0.01 to 0.1; least squares under SGD peak at 0.6 (design), from tiny weights at 5, and converge (measured)."""

SUSTAINED = 0.3
"""Median update ratio of the last looks. Healthy AdamW runs begin near 0.1 and stay above 0.03 for tens of updates (design)."""

NEGLIGIBLE = 1e-5
"""Median update ratio, from the start, with which nothing is learnt: after 1,000 updates in one direction a weight has changed by 1 %.
The customary ratio is 1e-3 (Karpathy, lecture notes of CS231n); AdamW at 1e-6 on weights of 0.02, to fine-tune, has 5e-5."""

NEGLIGIBLE_TRAINED = 1e-6
"""The same where the loss is not known to be that of a guess: what has been trained before is changed with care (preferences are learnt
at 1e-6 to 9e-6; measured)."""

STARVED = 3.0
"""Decades that a gradient lies below its own first ones from which that it no longer moves anything is no news: it has converged, or
vanished, and that is told elsewhere."""

PEAK = 10.0
"""Times that which no single look may reach: one step that matters is not next to nothing."""

MOVES = 1e-4
"""Update ratio of any single matrix, those that began at zero included, from which the optimizer does change something."""

FAINT = 1e-4
"""Norm of a gradient over that of its parameter below which it is for its own smallness, and not for the learning rate's, that float32
does not move: a model that has converged, or a gradient that has vanished."""

GROWS = 1.5
"""Times the ratios of the five looks before of the last five from which the optimizer is finding its step by itself (D-adaptation begins at
1e-8 and doubles); a momentum of 0.9 has done by then what it does, tenfold."""

PATIENCE = 14
"""Updates before that is judged: Adam's first step on tiny weights replaces them, and the next ones learn."""

WHOLE = 1.0
"""Update ratio of one look with which the weights are replaced, where what a guess costs is known and the loss has not come below what the
run began with: after such steps healthy probes and regressions are at 0.54 of it and less within 14 updates (measured). And that which no
look may reach where the loss has come below what it began with, to be left alone though it is not below that of a guess: weights that began
tiny are replaced on their way (linear prediction under Adam at 0.01: 0.48; measured)."""

TINY = 0.3
"""Factor by which matrices change the scale of independent inputs below which they began tiny, and are replaced on their way: PyTorch's
default is 0.58, embeddings of a factorisation that begin at 0.01 have 0.03 and leave that saddle after some tens of updates (measured)."""

LARGE_ONCE, LARGE_ON = 0.5, 0.1
"""Update ratio of one look, and median one of the last `LOOKS`, from which steps are too large where the losses since lie `WORSE` times
above what the run began with and above that of a guess: healthy AdamW runs begin near 0.1 (design), and in no healthy run of the zoo do
such losses go with such steps."""

JUMP = 10.0
"""Times the median of the looks before from which a ratio of `SUSTAINED` is a jump: a learning rate that is raised too far. What it did
shows in the loss at once."""

WORSE = 1.5
"""Times the losses before that of the `AFTER` since such a jump: a restart of the learning rate comes back to what a run learns with, and
raises a loss for a few updates by less."""

AFTER = 5

HARM = 3.0
"""Times the losses before that of those since such a step, from which it did harm."""

LOOKS = 10
"""Looks that a sustained ratio rests on."""


@patient
@persistent(WINDOW)
def frozen_weights(history: History) -> Iterator[Finding]:
    """A parameter has a gradient, its optimizer steps, and not one bit of it changes.

    Yields when its last `UNCHANGED` looks after a step of its owner found all elements, compared one by one, bit for bit what they were
    before (`GradState.SAME`), and its gradient was other than zero in all of the last ten, not `STARVED`, and not `FAINT` beside the
    weights (or the learning rate is 0); or was cleared before the step. WARNING where a matrix is among them, or all are vectors of half
    precision beside matrices that move (gains of norms that are 1.0 for ever in bfloat16); INFO where only other vectors are.

    Ignored: parameters that do not require a gradient or have none; the end of a schedule (a learning rate that is not 0 but below
    `END_OF_SCHEDULE` of the largest that it has had); a warm-up that begins at 0, which is over after an update or two; everything while
    the loss is low.

    Example:
        >>> optimizer = torch.optim.AdamW(model.bfloat16().parameters(), lr=1e-6)
        >>> with GradWatch(model):
        ...     train(model, optimizer)
    """
    b, meta = history.baselines, history.meta
    if not (b.same >= UNCHANGED).any():
        return
    cleared = (history.recent("grad_state", 1)[0] & np.uint8(GradState.CLEARED)) != 0
    sick = (b.same >= UNCHANGED) & meta.trainable
    if not sick.any() or progress(history) is Progress.LOW:
        return
    strong = np.exp(b.level()) >= FAINT * b.weight_norm
    sick &= ((b.last > ZERO).all(axis=0) & (b.level() > b.early - STARVED * DECADE) & (strong | (b.lr == 0.0))) | cleared
    columns = np.flatnonzero(sick)
    if not columns.size:
        return
    lr = history.recent("lr", None)[:, columns]
    with np.errstate(invalid="ignore"):
        over = (b.lr[columns] < END_OF_SCHEDULE * np.fmax.reduce(lr, axis=0)) & (b.lr[columns] > 0.0)
    columns = columns[~over]
    if not columns.size:
        return
    matrices = int((meta.ndim[columns] >= 2).sum())
    solid = columns[meta.ndim[columns] >= 2] if matrices else columns
    rate = _rate(history, columns)
    gone = int(cleared[columns].sum())
    half = sum(meta.parameters[i].dtype in ("float16", "bfloat16") for i in columns)
    rounds = half == len(columns) and _moves(history)
    why = ": the gradients were cleared before it" if gone == len(columns) else ""
    if not why and np.isfinite(rate):
        why = f": the learning rate is {rate:.2g}"
    what = f"{len(columns)} parameters" if len(columns) > 1 else meta.parameters[columns[0]].name
    yield Finding(
        "frozen_weights",
        Severity.WARNING if matrices or rounds else Severity.INFO,
        _since_the_same(history, solid),
        parameters=named(meta, columns),
        message=f"no step changes a bit of {what}, though gradients reach {'them' if len(columns) > 1 else 'it'}{why}",
        evidence={
            "parameters": len(columns),
            "matrices": matrices,
            "lr": rate,
            "cleared": gone,
            "half_precision": half,
        },
    )


@sampled
@persistent(WINDOW)
def update_ratio_too_large(history: History) -> Iterator[Finding]:
    """A step replaces the weights instead of changing them.

    With `r` the root mean square of the change over that of the weights before it, all matrices of an optimizer together, over the
    sample of their elements: `r >= AT_ONCE` in one look, or a median of `SUSTAINED` over the last `LOOKS` looks; and the last losses
    are not below what the run began with, or not below that of the best constant output, or are `HARM` times those before. Or `r >=
    WHOLE` in one look, and the loss, of which it is known what a guess costs, has not come below what it began with, and they did not
    begin `TINY`. Or `r >= LARGE_ONCE` in one look and a median of `LARGE_ON`, and the last losses are `WORSE` times what the run began
    with. Or `r >= SUSTAINED` in one look, `JUMP` times the median of the `LOOKS` looks before it, and the first `AFTER` losses since,
    and most of the last, are `WORSE` than those before. Matrices that began at zero are left out.

    Ignored: vectors; single matrices, which may be small (a bottleneck, a LayerScale); runs that learn all the same.

    Example:
        >>> optimizer = torch.optim.Adam(model.parameters(), lr=1.0)
        >>> with GradWatch(model):
        ...     train(model, optimizer)
    """
    if history.recorded < (LOOKS if history.ended else PATIENCE) or not len(history):
        return
    ratio = history.recent("update_ratio", KEPT)
    if not (ratio[:, history.meta.ndim >= 2] >= SUSTAINED).any():
        return
    learnt = has_learnt(history)
    for columns in _matrices_by_owner(history):
        ratios, steps = _ratios(history, columns, KEPT)
        if not ratios.size:
            continue
        recent = ratios[-LOOKS:]
        usual = median(recent) if len(recent) == LOOKS else 0.0
        at_once = float(ratios.max())
        jump = _jump(history, ratios, steps)
        if jump is not None:
            ratios, steps, since = ratios[jump:], steps[jump:], 0
            at_once = float(ratios.max())
        elif usual >= SUSTAINED:
            since = _since_large(ratios)
        elif at_once >= AT_ONCE:
            since = int(np.argmax(ratios >= AT_ONCE))
        elif at_once >= WHOLE and guess_of(history) > 0 and _began_of_a_size(history, columns) and not (learnt or _fell(history)):
            since = int(np.argmax(ratios >= WHOLE))
        elif at_once >= LARGE_ONCE and usual >= LARGE_ON and _got_worse(history):
            since = int(ratios.argmax())
        else:
            continue
        step = int(steps[since])
        if jump is None and not _did_harm(history, step) and (learnt or (at_once < WHOLE and _fell(history))):
            continue
        yield Finding(
            "update_ratio_too_large",
            Severity.WARNING,
            step,
            layers=_layers(history, columns),
            message=f"an update changes the weights by {at_once:.2g} of their size",
            evidence={"update_ratio": at_once, "usual_update_ratio": usual, "lr": _rate(history, columns)},
        )


@patient
@persistent(WINDOW)
def update_ratio_too_small(history: History) -> Iterator[Finding]:
    """Steps have changed next to nothing since the start, and the loss has not improved.

    With `r` as in `update_ratio_too_large`: the median of the first `LOOKS` kept looks and that of the last are below `NEGLIGIBLE`
    (`NEGLIGIBLE_TRAINED` where the loss is better than a guess, or nobody knows what that costs), and no single matrix of the optimizer
    has a ratio of `MOVES`.

    Ignored: a learning rate, or a ratio, that still rises (warm-up, an optimizer that finds its step); a loss that improves or is low;
    weights of which not a bit changes (`frozen_weights`); a loss that is not known.

    Example:
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
        >>> with GradWatch(model):
        ...     train(model, optimizer)
    """
    b = history.baselines
    if not len(history) or history.recorded < LOOKS or progress(history) is not Progress.STUCK:
        return
    limit = NEGLIGIBLE if _is_untrained(history) else NEGLIGIBLE_TRAINED
    with np.errstate(invalid="ignore"):
        if not (b.update_ratio < limit).any():
            return
    for columns in _matrices_by_owner(history):
        # Of all kept records only once the last look is small: most do not come this far.
        if not _together(b.update_ratio[columns], b.weight_norm[columns]) < limit:
            continue
        ratios, steps = _ratios(history, columns, None)
        if len(ratios) < LOOKS or not ratios.any() or _rises(history, columns):
            continue
        if not max(median(ratios[:LOOKS]), median(ratios[-LOOKS:]), float(ratios.max()) / PEAK) < limit:
            continue
        if median(ratios[-LOOKS // 2 :]) > GROWS * median(ratios[-LOOKS : -LOOKS // 2]):
            continue
        blank = np.flatnonzero(history.meta.blank & (history.meta.ndim >= 2))
        owner = history.meta.parameters[columns[0]].owner
        others = [i for i in blank if history.meta.parameters[i].owner == owner]
        if (b.update_ratio[[*columns, *others]] >= MOVES).any():
            continue
        ratio = median(ratios[-LOOKS:])
        yield Finding(
            "update_ratio_too_small",
            Severity.WARNING,
            int(steps[0]) if steps[0] >= WINDOW else 0,
            layers=_layers(history, columns),
            message=f"an update changes the weights by {ratio:.0e} of their size, and the loss does not improve",
            evidence={"update_ratio": ratio, "lr": _rate(history, columns), "gradient_ratio": _gradient_ratio(history, columns)},
        )


def _moves(history: History) -> bool:
    """The steps are large enough for some matrix."""
    b = history.baselines
    return bool((b.update_ratio[history.meta.ndim >= 2] >= MOVES).any())


def _is_untrained(history: History) -> bool:
    """Whether the last losses are known not to lie below that of the best constant output."""
    losses, guess = history.baselines.losses[-WINDOW:], guess_of(history)
    losses = losses[np.isfinite(losses)]
    return bool(guess > 0 and losses.size and median(losses) >= IMPROVED * guess)


def _gradient_ratio(history: History, columns: NDArray[np.int64]) -> float:
    """Norm of the last gradient of some matrices over that of their weights."""
    norms = history.recent("grad_norm", 1)[0][columns].astype(float)
    weights = history.baselines.weight_norm[columns].astype(float)
    known = np.isfinite(norms) & np.isfinite(weights)
    below = float(np.square(weights[known]).sum())
    return float(np.sqrt(np.square(norms[known]).sum() / below)) if below > 0 else float("nan")


def _since_the_same(history: History, columns: NDArray[np.int64]) -> int:
    state = history.recent("grad_state", None)[:, columns]
    changed = np.flatnonzero(((state & np.uint8(GradState.CHANGED)) != 0).any(axis=1))
    reached, steps = ((state & np.uint8(GradState.REACHED)) != 0).any(axis=1), history.steps
    began = int(np.argmax(reached))  # what was thawed got none before
    if changed.size:
        began = max(began, min(int(changed[-1]) + 1, len(steps) - 1))
    return int(steps[began]) if len(steps) else 0


@dataclass(frozen=True)
class _Owned:
    """Columns of the matrices that each optimizer steps, those that began at zero aside."""

    columns: tuple[NDArray[np.int64], ...]


def _matrices_by_owner(history: History) -> tuple[NDArray[np.int64], ...]:
    meta = history.meta
    kept = meta.derived.get(_Owned)
    if kept is None:
        of: dict[str, list[int]] = {}
        for i, fact in enumerate(meta.parameters):
            if fact.owner is not None and fact.trainable and len(fact.shape) >= 2 and fact.init_rms != 0.0:
                of.setdefault(fact.owner, []).append(i)
        kept = meta.derived[_Owned] = _Owned(tuple(np.array(columns, np.int64) for columns in of.values()))
    owned: _Owned = kept
    return owned.columns


def _ratios(history: History, columns: NDArray[np.int64], last: int | None) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The update ratio of some matrices together, in each of the last kept records that looked at them, oldest first, and their steps."""
    ratio, weight = history.recent("update_ratio", last)[:, columns], history.recent("weight_norm", last)[:, columns]
    together = _together(ratio, weight)
    looked = np.isfinite(together)
    return together[looked], history.steps[-len(together) :][looked]


def _together(ratio: NDArray[np.float32], weight: NDArray[np.float32]) -> NDArray[np.float64]:
    """The update ratio of matrices along the last axis together, by their own and their norms; NaN where none is known."""
    known = np.isfinite(ratio) & np.isfinite(weight)
    ratios, weights = np.where(known, ratio, 0.0).astype(float), np.where(known, weight, 0.0).astype(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        together: NDArray[np.float64] = np.sqrt(np.square(ratios * weights).sum(axis=-1) / np.square(weights).sum(axis=-1))
    return together


KEPT = 128
"""Records among which looks are taken: `LOOKS` of them and more where one in ten is looked at."""


def _since_large(ratios: NDArray[np.float64]) -> int:
    """The first of the last `LOOKS` looks with a ratio of `SUSTAINED`, or of those right before that have it too."""
    large = ratios >= SUSTAINED
    first = len(large) - LOOKS + int(np.argmax(large[-LOOKS:]))
    before = np.flatnonzero(~large[:first])
    return int(before[-1]) + 1 if before.size else 0


def _jump(history: History, ratios: NDArray[np.float64], steps: NDArray[np.int64]) -> int | None:
    """The look at which steps became so much larger that every loss since is worse than those before; None where there is none."""
    for i in np.flatnonzero(ratios >= SUSTAINED):
        if i < LOOKS or ratios[i] < JUMP * median(ratios[i - LOOKS : i]):
            continue
        losses = history.between("loss", int(steps[i]) - LOOKS, history.recorded).astype(float)
        since = history.recorded - int(steps[i]) - 1
        before, after = losses[: len(losses) - since], losses[len(losses) - since :]
        before = before[np.isfinite(before)]
        if len(before) < WINDOW // 2 or len(after) < AFTER or not median(before) > 0:
            return None
        if before[-1] >= WORSE * median(before):
            return None  # the loss of the update itself is that before the step: it was another task, or other weights, already
        worse = ~(after < WORSE * median(before))  # a loss that is lost is worse
        return int(i) if bool(worse[:AFTER].all()) and 2 * int(worse[-AFTER:].sum()) > AFTER else None
    return None


def _began_of_a_size(history: History, columns: NDArray[np.int64]) -> bool:
    """The matrices did not begin tiny, in the median of what they do to the scale of independent inputs."""
    return median(np.array([history.meta.parameters[i].init_gain for i in columns])) >= TINY


def _fell(history: History) -> bool:
    """The last losses lie below what the run began with, whatever a guess costs: weights that began tiny are replaced on their way."""
    b = history.baselines
    recent = b.losses[-WINDOW // 2 :]
    recent = recent[np.isfinite(recent)]
    return bool(b.first_losses.size and recent.size and median(recent) < IMPROVED * float(b.first_losses[0]))


def _got_worse(history: History) -> bool:
    """The last losses lie above what the run began with, and above that of the best constant output where that is known."""
    b = history.baselines
    recent = b.losses[-WINDOW // 2 :]
    recent = recent[np.isfinite(recent)]
    if not b.first_losses.size or len(recent) < WINDOW // 4:
        return False
    guess = guess_of(history)
    # Of a single batch, and a small one, the first loss may be that of an easy one.
    return median(recent) >= (WORSE if guess > 0 else HARM) * max(float(b.first_losses[0]), guess) > 0


def _did_harm(history: History, step: int) -> bool:
    """The losses since a step are several times those before it."""
    losses = history.between("loss", step - LOOKS, history.recorded).astype(float)
    since = history.recorded - step
    before, after = losses[:-since], losses[-since:][-WINDOW // 2 :]
    before, after = before[np.isfinite(before)], after[np.isfinite(after)]
    return len(before) >= WINDOW // 2 and len(after) > 0 and median(after) >= HARM * median(before) > 0


def _rises(history: History, columns: NDArray[np.int64]) -> bool:
    lr = history.recent("lr", KEPT)[:, columns].astype(float)
    seen = np.fmax.reduce(lr, axis=1)
    seen = seen[np.isfinite(seen)]
    return bool(seen.size > 1 and seen[-1] > 1.01 * seen[0])


def _rate(history: History, columns: NDArray[np.int64]) -> float:
    rates = history.baselines.lr[columns]
    return float(np.nanmax(rates)) if np.isfinite(rates).any() else float("nan")


def _layers(history: History, columns: NDArray[np.int64]) -> tuple[str, ...]:
    """The modules of all that the owner of some matrices steps."""
    meta = history.meta
    owner = meta.parameters[columns[0]].owner
    return layers_of(meta, tuple(fact.name for fact in meta.parameters if fact.owner == owner and fact.trainable))
