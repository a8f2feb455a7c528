"""What is wrong from the first update: initialisation, inputs, and a loss that normalises twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from gradwatch.baselines import WINDOW, ZERO
from gradwatch.diagnose.arrays import DECADE, median
from gradwatch.diagnose.execution import execution_of
from gradwatch.diagnose.naming import named
from gradwatch.diagnose.rules.activations import dead_units, saturated_activation
from gradwatch.diagnose.rules.loss import Progress, guess_of, has_learnt, progress, recovers_soon
from gradwatch.diagnose.rules.rule import patient, persistent
from gradwatch.facts import BINARY, LayerFact
from gradwatch.history import History
from gradwatch.records import Finding, Severity

AGAIN = 10
"""Records between two looks at the end of the graph, at most, in which what is found there may have begun."""

FAR_FROM_A_GUESS = 6.0
"""Times the loss of the best constant output that the first loss is, from which the last layer was made far too large. The usual
initialisations begin at 1 to 1.5 (Karpathy, "A recipe for training neural networks": verify the loss at init), logits of a standard
deviation of 5 over 10 classes at 3.5 (computed)."""

SURELY_FAR = 12.0
"""The same from which it needs no look at how the loss goes on: what is nearer often recovers within some tens of updates (thirty ReLU layers
under Adam: 8). An embedding of PyTorch's default size, tied to a head of width d, begins near d: 14 times that over 64 classes."""

STILL_FAR = 3.0
"""The same of the median of the last losses, at update 10: what training has put right by then is no fault any more."""

LARGE_GAIN = 1.5
"""Factor by which a matrix enlarges what passes it from which its size is at fault; He's initialisation has 1.4, for ReLU."""

FEW = 3
"""Such matrices at most: a head, an embedding tied to it, a stem."""

EXPLAINED = 30.0
"""Times the product of their gains that the first loss may be: a cross-entropy of logits of a standard deviation s is 1.5 s over 8 classes,
2 s over 24 (computed), and what comes to the head may be a few times as large as usual."""

LARGE = 20.0
"""Root mean square of the inputs from which they are not normalised: normalised data have 1, pictures in 0 to 1 have 0.6, pictures in 0
to 255 have 100 to 150, and calendar years 2,000."""

BEGAN_OFF, LEARNS = 1.5, 0.75
"""Times the loss of the best constant output that the first loss is, and the last are, at update `PATIENCE`, from which inputs of such a size
are told though the loss falls: outputs of raw pixels begin at 1.3 to 10 times that, where a normalisation reads them at 1.0 (measured)."""

ARRIVES = 0.1
"""Part of what independent inputs of that size would give from which the layer was given them as they are. Pixels, which go together,
give 0.3 to 3 times that; divided by 255 they give 0.004."""

WORSE = 2.0
"""Times the loss of the best constant output from which a loss that still falls has learnt nothing. A choice, not a measured gap: MLPs on raw
pixels under Adam lie at 1.8 to 8 times that at update 14, and learn by update 60 (measured); those that fall slower are told."""

SOON = 20
"""Updates within which a loss that goes on falling at its present pace has to be below that of a guess, to be left alone."""

PATIENCE = 14
"""Updates before that is judged: a network that copes with such inputs may need a few."""

STARVED = 5.0
"""Decades that the gradient of the layer that reads such inputs lies below the largest, from which it has been shut by them."""

LAST = 3
"""Looks, the last ones, whose median counts."""


def double_softmax(history: History) -> Iterator[Finding]:
    """What the loss takes for logits is the output of a softmax or a sigmoid already.

    The autograd graph of the first backward shows it: below `LogSoftmaxBackward0` (`cross_entropy`, `log_softmax`) or
    `BinaryCrossEntropyWithLogitsBackward0` stands `SoftmaxBackward0` or `SigmoidBackward0`, and between the two nothing but views,
    selections, concatenations and clamps. Logits between 0 and 1 let the probability of one class of C rise to e / (e + C - 1) at most:
    0.23 of ten. Names the softmax, or the innermost module in which the function runs; the root where that is the loss's code.

    Ignored: attention and gates, whose softmax is followed by arithmetic; a log-softmax of logarithms, which changes nothing; what runs
    in compiled code.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.Softmax(-1))
        >>> with GradWatch(model):
        ...     nn.CrossEntropyLoss()(model(x), y).backward()
    """
    meta = history.meta
    if not meta.squashed or not len(history):
        return
    classes = _classes(history)
    outer, _, other = meta.squashed.partition(" of ")
    inner = other or outer
    if outer == "softmax" and classes > 1:
        ceiling = f": no class can get more than {np.e / (np.e + classes - 1):.0%}"
        evidence = {"classes": float(classes), "highest_probability": float(np.e / (np.e + classes - 1))}
    else:
        ceiling, evidence = "", {}
    where = meta.squashed_by or "the model's output"
    yield Finding(
        "double_softmax",
        Severity.WARNING,
        max(0, meta.squashed_since - AGAIN + 1) if meta.squashed_since else 0,
        layers=(meta.squashed_by,),
        message=f"the loss applies a {outer} to the {inner} of {where}{ceiling}",
        evidence=evidence,
    )


@patient
@persistent(WINDOW)
def poor_init(history: History) -> Iterator[Finding]:
    """Weights that began so that they cannot learn, or outputs that began far from every sensible one.

    *Symmetry*: all rows of a matrix were equal when the watch began and are equal, bit for bit, after `facts.SYMMETRY_AFTER` updates,
    though its gradient is not zero: its units compute one and the same function and always will. Rows of zeros whose gradient has been
    exactly zero in every update count while the loss does not improve, but for adapters of a frozen base. *Output*: the loss is known to
    be a mean cross-entropy, its first value was `FAR_FROM_A_GUESS` times that of the best constant output, ln C (of equal odds, ln 2, for
    a binary one), the median of the last ten is `STILL_FAR` times it (or all of them were lost) and, where the first was less than
    `SURELY_FAR` times it, does not recover `SOON`; and `FEW` matrices whose gain is `LARGE_GAIN` or more explain it, or most matrices have
    such a gain at update `PATIENCE` (and no gradient has exploded by it: that would be told instead).

    Ignored: matrices of one row; zeros that training fills (heads, LoRA, residual branches that begin at zero); matrices that no
    optimizer steps; sizes that only make a gradient vanish or explode, which is told under that name.

    Example:
        >>> for p in model.parameters():
        ...     nn.init.constant_(p, 0.1)
        >>> with GradWatch(model):
        ...     train(model)
    """
    if not len(history) or history.recorded < WINDOW:
        return
    finding = _symmetric(history) or _far_from_a_guess(history)
    if finding is not None:
        yield finding


@patient
@persistent(WINDOW)
def unnormalized_input(history: History) -> Iterator[Finding]:
    """The inputs are far from mean 0 and standard deviation 1, nothing in the model normalises them, and it learns badly.

    With `m` and `s` the `input_mean` and `input_std` of the updates that were looked at: the median of `sqrt(m^2 + s^2)` is `LARGE`;
    the output of a layer is as large for its weights; and the last losses are not below what the run began with, or not below that of
    the best constant output, do not fall to that within `SOON` updates, and stand still or are `WORSE` times that; or the first loss
    was `BEGAN_OFF` times, and the last five are `LEARNS` times that of the best constant output; or activations have been saturated or
    dead since the first updates; or the layer that reads them gets a gradient `STARVED` decades below the largest; or the inputs were a
    `LARGE`th of that before. Names the root.

    Ignored: integers (tokens, indices); inputs that a normalisation takes, or that the model divides by their scale; runs that learn well
    all the same.

    Example:
        >>> images = torch.randint(0, 256, (64, 784)).float()
        >>> with GradWatch(mlp):
        ...     train(mlp, images, labels)
    """
    if not len(history) or history.recorded < WINDOW:
        return
    mean, std = history.recent("input_mean", WINDOW), history.recent("input_std", WINDOW)
    looked = np.isfinite(mean) & np.isfinite(std)
    if not looked.any():
        return
    size = float(np.median(np.hypot(mean[looked].astype(float), std[looked].astype(float))[-LAST:]))
    if not size >= LARGE:
        return
    since, before = _since(history, size)
    jumped = before > 0 and size >= LARGE * before
    early = history.recorded < PATIENCE and not history.ended
    far = _began_far(history) or (not early and not recovers_soon(history, SOON) and _stands(history))
    off = not early and _began(history, BEGAN_OFF, LEARNS, WINDOW // 2)
    reader = _reader(history, size)
    if reader is None:
        return
    harmed = jumped or off or (far and not has_learnt(history)) or _is_starved(history, reader) or _blocks(history)
    if not harmed:
        return
    m, s = float(np.median(mean[looked][-LAST:])), float(np.median(std[looked][-LAST:]))
    then = f", {size / before:.2g} times the size they had before" if since and before > 0 else _and_the_loss(history)
    yield Finding(
        "unnormalized_input",
        Severity.WARNING,
        since,
        layers=(history.layers[execution_of(history.meta).root[reader]],),
        message=f"the inputs have a mean of {m:.3g} and a standard deviation of {s:.3g}{then}",
        evidence={"input_mean": m, "input_std": s, "input_rms": size, "input_rms_before": before},
    )


def _is_starved(history: History, reader: int) -> bool:
    """The layer that reads them has got next to nothing in all of the last updates, beside what others get: gates that they have shut."""
    columns = np.flatnonzero(history.meta.layer_index == reader)
    last = history.baselines.last
    if not columns.size or not np.isfinite(last[:, columns]).all():
        return False
    return bool((last[:, columns].max(axis=1) < np.nanmax(last, axis=1) - STARVED * DECADE).all())


def _blocks(history: History) -> bool:
    """Some activation has passed nothing since the first updates, and that will be told: by this name, for it is the cause."""
    return any(
        f.step < WINDOW // 2 and f.severity >= Severity.WARNING
        for rule in (saturated_activation, dead_units)
        for f in rule(history)
    )


def _began_far(history: History) -> bool:
    """The first loss was `FAR_FROM_A_GUESS` times that of a guess, and those since are `STILL_FAR` times it."""
    return _began(history, FAR_FROM_A_GUESS, STILL_FAR)


def _began(history: History, far: float, still: float, last: int = WINDOW) -> bool:
    """The first loss was so many times that of a guess, and the last ones are so many times it."""
    losses, guess = history.baselines.losses[-last:], guess_of(history)
    losses = losses[np.isfinite(losses)]
    if not guess > 0 or not losses.size or not history.baselines.first_losses.size:
        return False
    rare = history.meta.criterion in BINARY and history.meta.guess < np.log(2.0)  # of rare classes a network begins with equal odds
    first = far * guess * (float(np.log(2.0)) / history.meta.guess if rare else 1.0)
    return float(history.baselines.first_losses[0]) >= first and median(losses) >= still * guess


def _stands(history: History) -> bool:
    """The loss has been lost, does not improve, or is still far worse than that of a guess."""
    losses = history.baselines.losses[-WINDOW:]
    recent = losses[-WINDOW // 2 :]
    recent = recent[np.isfinite(recent)]
    guess = guess_of(history)
    if not recent.size or progress(history) is Progress.STUCK:
        return True
    return guess > 0 and median(recent) >= WORSE * guess


def _and_the_loss(history: History) -> str:
    losses = history.baselines.losses[-WINDOW // 2 :]
    losses = losses[np.isfinite(losses)]
    if not losses.size:
        return ", and the loss is lost"
    guess = guess_of(history)
    if guess > 0:
        return f", and the loss is {median(losses):.3g}, where a constant output would give {guess:.2g}"
    return f", and the loss is {median(losses):.3g}, {float(history.baselines.first_losses[0]):.3g} at the start"


def _since(history: History, size: float) -> tuple[int, float]:
    """The first kept update since when the inputs have been that large, and the median of their size before; 0 and NaN from the start."""
    sizes = np.hypot(history.stat("input_mean").astype(float), history.stat("input_std").astype(float))
    steps = history.steps[np.isfinite(sizes)]
    sizes = sizes[np.isfinite(sizes)]
    # Up to the last that was so large: small ones after it are not before it.
    sizes = sizes[: int(np.flatnonzero(sizes >= size / LARGE)[-1]) + 1]
    small = np.flatnonzero(sizes < size / LARGE)
    if not small.size:
        return 0, float("nan")
    before = float(np.median(sizes[: small[-1] + 1]))
    # A small batch among large ones is none of their beginning.
    return (int(steps[small[-1] + 1]), before) if size >= LARGE * before else (0, float("nan"))


def _classes(history: History) -> int:
    heads = [fact for fact in history.meta.layers if fact.role == "head"]
    names = {fact.name for fact in heads}
    rows = {fact.shape[0] for fact in history.meta.parameters if fact.layer in names and len(fact.shape) >= 2}
    return rows.pop() if len(rows) == 1 else 0


def _symmetric(history: History) -> Finding | None:
    meta, b = history.meta, history.baselines
    if not meta.still_equal.any():
        return None
    sick = meta.still_equal & meta.trainable & (b.stepped >= WINDOW // 2) & (b.seen >= WINDOW // 2)
    if not sick.any():
        return None
    # Of a matrix that was seen less than `WINDOW` times some of these are NaN, which is not above anything.
    nothing = ~((b.first > ZERO).any(axis=0) | (b.last > ZERO).any(axis=0))
    # What is added to a base that is frozen (LoRA) is told by what it gets: nothing.
    base = any(not fact.trainable and len(fact.shape) >= 2 and fact.init_rms > 0.0 for fact in meta.parameters)
    waited = history.ended or history.recorded >= PATIENCE
    sick &= ~nothing | (meta.blank & (waited and not base and progress(history) is Progress.STUCK))
    columns = np.flatnonzero(sick)
    if not columns.size:
        return None
    columns = columns[np.argsort(np.where(np.isfinite(meta.order[columns]), meta.order[columns], np.inf), kind="stable")]
    facts = [meta.parameters[i] for i in columns]
    units = max(fact.shape[0] for fact in facts)
    of = f"{len(facts)} matrices" if len(facts) > 1 else facts[0].name
    zero = bool(meta.blank[columns].all())
    return Finding(
        "poor_init",
        Severity.WARNING,
        0,
        parameters=named(meta, columns),
        message=f"all {units} rows of {of} began {'at zero' if zero else 'equal'} and are equal still: they act as one unit"
        if len(facts) == 1
        else f"the rows of {of} began {'at zero' if zero else 'equal'} and are equal still: each acts as one unit",
        evidence={"matrices": len(facts), "rows": units, "zero": float(zero)},
    )


def _far_from_a_guess(history: History) -> Finding | None:
    meta, b = history.meta, history.baselines
    if meta.criterion not in ("cross_entropy", "cross_entropies", *BINARY) or not meta.guess > 0 or not b.first_losses.size:
        return None
    guess = guess_of(history) or meta.guess  # every loss may have been lost
    if meta.criterion in BINARY:  # of rare classes a network cannot know how rare they are
        if meta.guess > np.log(2.0):
            return None  # a sum, of which that cannot be told
        guess *= max(1.0, float(np.log(2.0)) / meta.guess)
    first = float(b.first_losses[0])
    if not first >= FAR_FROM_A_GUESS * guess:
        return None
    recent = b.losses[-WINDOW:]
    recent = recent[np.isfinite(recent)]
    if recent.size and not median(recent) >= STILL_FAR * guess:
        return None
    if first < SURELY_FAR * guess and (history.recorded < PATIENCE or recovers_soon(history, SOON)):
        return None
    large, most = _large(history, first / guess), 0.0
    if not large.size and first >= SURELY_FAR * guess and history.recorded >= PATIENCE:
        large, most = _most(history), 1.0
    if not large.size:
        return None
    return Finding(
        "poor_init",
        Severity.WARNING,
        0,
        parameters=named(meta, large),
        message=f"the first loss was {first:.3g}, {first / guess:.2g} times that of a guess ({guess:.2g})",
        evidence={"first_loss": first, "guess": guess} | ({"most": most} if most else {}),
    )


def _large(history: History, times: float) -> NDArray[np.int64]:
    """The few matrices that began so large that they explain outputs `times` as large as sensible ones, the largest first; else none."""
    meta = history.meta
    gains = np.array([fact.init_gain if fact.trainable else np.nan for fact in meta.parameters], float)
    large = np.flatnonzero(gains >= LARGE_GAIN)
    # Many that multiply, or one that is passed many times, make gradients explode, and that is told by its name.
    if not 0 < large.size <= FEW or times > EXPLAINED * float(np.prod(gains[large])):
        return large[:0]
    return large[np.argsort(-gains[large], kind="stable")]


def _most(history: History) -> NDArray[np.int64]:
    """The trainable matrices that began too large, the largest first, where most did; else none."""
    meta = history.meta
    gains = np.array([fact.init_gain if fact.trainable else np.nan for fact in meta.parameters], float)
    known, large = np.isfinite(gains), np.flatnonzero(gains >= LARGE_GAIN)
    if 2 * large.size <= int(known.sum()):
        return large[:0]
    return large[np.argsort(-gains[large], kind="stable")]


def _reader(history: History, size: float) -> int | None:
    """The first layer that is no normalisation and gives an output as large as inputs of that size make it."""
    meta = history.meta
    rms = history.recent("activation_rms", WINDOW)
    looked = np.flatnonzero(np.isfinite(rms).any(axis=1))
    if not looked.size:
        return None
    first = rms[looked[-1]].astype(float)
    for column, fact in enumerate(meta.layers):
        # What reads the data beside an embedding is no input by its role.
        if not fact.role or fact.kind in ("normalization", "embedding"):
            continue
        if _is_normalised_next(history, column) and not _passes_on(meta.layers, column, first):
            continue
        if fact.kind == "recurrent" and fact.role == "input":  # its output is bounded, whatever it is given
            return column
        scales = [_scale(history, i) for i, p in enumerate(meta.parameters) if p.layer == fact.name and len(p.shape) >= 2]
        scale = max((each for each in scales if np.isfinite(each)), default=0.0)
        if scale > 0 and first[column] >= ARRIVES * scale * size:
            return column
    return None


def _passes_on(layers: Sequence[LayerFact], column: int, rms: NDArray[np.float64]) -> bool:
    """What it gives goes past that normalisation, too, for the output of some module that does not hold it is as large: a residual stream."""
    name = layers[column].name
    others = [i for i, fact in enumerate(layers) if i != column and fact.name and not f"{name}.".startswith(f"{fact.name}.")]
    return bool((rms[others] >= 0.5 * rms[column]).any())


def _is_normalised_next(history: History, column: int) -> bool:
    """Whether the module that runs right behind one is a normalisation, to which the scale of what it is given is all the same."""
    meta, execution = history.meta, execution_of(history.meta)
    inner = execution.sorted(np.flatnonzero(execution.inner))
    at = np.flatnonzero(inner == column)
    return bool(at.size and at[0] + 1 < len(inner) and meta.layers[inner[at[0] + 1]].kind == "normalization")


def _scale(history: History, column: int) -> float:
    """What a matrix does to the scale of independent inputs of mean 0."""
    rows = max(1, history.meta.parameters[column].shape[0])
    return float(history.baselines.weight_norm[column]) / float(np.sqrt(rows))
