"""What the end of the graph says of the loss: which criterion, what a constant output would get, and what is normalised twice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradwatch.capture import criterion as criterion_module
from gradwatch.capture import parameters, private
from gradwatch.capture.criterion import Criterion, criterion
from gradwatch.capture.loss_end import squashed
from tests.test_counts import Operators

EXPANDS = pytest.mark.filterwarnings("ignore:Using a target size")
"""Torch warns of what is on trial here."""


def scores(*shape: int, seed: int = 0) -> Tensor:
    """What a model put out."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).requires_grad_() * 1.5


def values(*shape: int, seed: int = 1) -> Tensor:
    """Targets of a regression, skewed, so that mean and median differ."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).exp()


def labels(*shape: int, classes: int = 5) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(2))


def shares(*shape: int) -> Tensor:
    """Targets of a binary cross-entropy."""
    return (torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.3).float()


def of(loss: Tensor, scale: float = 1.0) -> tuple[str, float, bool] | None:
    """Name, guess (0: not known) and broadcast."""
    found = criterion([loss], scale)
    return None if found is None else (found.name, 0.0 if math.isnan(found.guess) else found.guess, found.broadcast)


def best_constant(loss: Callable[[Tensor, Tensor], Tensor], target: Tensor, low: float = -20.0, high: float = 20.0) -> float:
    """The least loss of a constant for each place behind the first dimension, by a search that knows nothing of the loss but that it is
    convex: independent of how the guess is made, and slow.
    """
    columns = target.double().reshape(len(target), -1).unbind(1)
    total = 0.0
    for column in columns:
        a, b = low, high
        for _ in range(120):
            c, d = a + (b - a) / 3, b - (b - a) / 3
            if float(loss(torch.full_like(column, c), column)) < float(loss(torch.full_like(column, d), column)):
                b = d
            else:
                a = c
        total += float(loss(torch.full_like(column, (a + b) / 2), column))
    return total / len(columns)


# -- which criterion ---------------------------------------------------------------------------------------------------------------

LN5 = math.log(5)

KNOWN: dict[str, tuple[Callable[[], Tensor], str, float]] = {
    "cross-entropy": (lambda: F.cross_entropy(scores(8, 5), labels(8)), "cross_entropy", LN5),
    "cross-entropy-module": (lambda: nn.CrossEntropyLoss()(scores(8, 5), labels(8)), "cross_entropy", LN5),
    "cross-entropy-of-one": (lambda: F.cross_entropy(scores(5), labels(1)[0]), "cross_entropy", LN5),
    "cross-entropy-of-sequences": (lambda: F.cross_entropy(scores(8, 5, 7), labels(8, 7)), "cross_entropy", LN5),
    "segmentation": (lambda: F.cross_entropy(scores(2, 5, 4, 4), labels(2, 4, 4)), "cross_entropy", LN5),
    "volumes": (lambda: F.cross_entropy(scores(2, 5, 2, 3, 4), labels(2, 2, 3, 4)), "cross_entropy", LN5),
    "tokens": (lambda: F.cross_entropy(scores(2, 7, 5).view(-1, 5), labels(2, 7).view(-1)), "cross_entropy", LN5),
    "tokens-transposed": (lambda: F.cross_entropy(scores(2, 7, 5).transpose(1, 2), labels(2, 7)), "cross_entropy", LN5),
    "ignore-index": (lambda: F.cross_entropy(scores(8, 5), labels(8), ignore_index=2), "cross_entropy", LN5),
    "nll": (lambda: F.nll_loss(F.log_softmax(scores(8, 5), -1), labels(8)), "cross_entropy", LN5),
    "nll-module": (lambda: nn.NLLLoss()(nn.LogSoftmax(-1)(scores(8, 5)), labels(8)), "cross_entropy", LN5),
    "nll-of-steps": (
        lambda: F.nll_loss(torch.cat([F.log_softmax(scores(4, 5, seed=i), -1) for i in range(3)]), labels(12)),
        "cross_entropy",
        LN5,
    ),
    "log-softmax-twice": (lambda: F.cross_entropy(F.log_softmax(scores(8, 5), -1), labels(8)), "cross_entropy", LN5),
    "classes-with-weights": (lambda: F.cross_entropy(scores(8, 5), labels(8), weight=torch.ones(5)), "cross_entropy", 0.0),
    "mse": (lambda: F.mse_loss(scores(8, 3), values(8, 3)), "mse_loss", best_constant(F.mse_loss, values(8, 3))),
    "mse-module": (lambda: nn.MSELoss()(scores(8), values(8)), "mse_loss", best_constant(F.mse_loss, values(8))),
    "mse-the-other-way-round": (
        lambda: F.mse_loss(values(8, 3), scores(8, 3)),
        "mse_loss",
        best_constant(F.mse_loss, values(8, 3)),
    ),
    "mse-of-integers": (lambda: F.mse_loss(scores(8, 1), labels(8, 1)), "mse_loss", 0.0),
    "mse-of-one": (lambda: F.mse_loss(scores(1, 3), values(1, 3)), "mse_loss", 0.0),
    "bce-of-one": (
        lambda: F.binary_cross_entropy_with_logits(scores(1, 3), values(1, 3).sigmoid()),
        "binary_cross_entropy_with_logits",
        0.0,
    ),
    "mse-of-a-scalar": (lambda: F.mse_loss(scores(1)[0], values(1)[0]), "mse_loss", 0.0),
    "mse-of-a-constant": (lambda: F.mse_loss(scores(8), torch.ones(8)), "mse_loss", 0.0),
    "l1": (lambda: F.l1_loss(scores(9, 2), values(9, 2)), "l1_loss", 0.0),
    "smooth-l1": (
        lambda: F.smooth_l1_loss(scores(8, 3), values(8, 3), beta=0.5),
        "smooth_l1_loss",
        best_constant(lambda a, b: F.smooth_l1_loss(a, b, beta=0.5), values(8, 3)),
    ),
    "smooth-l1-module": (
        lambda: nn.SmoothL1Loss()(scores(8, 3), values(8, 3)),
        "smooth_l1_loss",
        best_constant(F.smooth_l1_loss, values(8, 3)),
    ),
    "huber": (
        lambda: F.huber_loss(scores(8, 3), values(8, 3), delta=2.0),
        "huber_loss",
        best_constant(lambda a, b: F.huber_loss(a, b, delta=2.0), values(8, 3)),
    ),
    "huber-module": (lambda: nn.HuberLoss()(values(8, 3), scores(8, 3)), "huber_loss", best_constant(F.huber_loss, values(8, 3))),
    "bce": (
        lambda: F.binary_cross_entropy(scores(40, 2).sigmoid(), shares(40, 2)),
        "binary_cross_entropy",
        best_constant(F.binary_cross_entropy, shares(40, 2), 1e-9, 1 - 1e-9),
    ),
    "bce-module": (
        lambda: nn.BCELoss()(nn.Sigmoid()(scores(40)), shares(40)),
        "binary_cross_entropy",
        best_constant(F.binary_cross_entropy, shares(40), 1e-9, 1 - 1e-9),
    ),
    "bce-with-logits": (
        lambda: F.binary_cross_entropy_with_logits(scores(40, 2), shares(40, 2)),
        "binary_cross_entropy_with_logits",
        best_constant(F.binary_cross_entropy_with_logits, shares(40, 2)),
    ),
    "bce-with-logits-module": (
        lambda: nn.BCEWithLogitsLoss()(scores(40), shares(40)),
        "binary_cross_entropy_with_logits",
        best_constant(F.binary_cross_entropy_with_logits, shares(40)),
    ),
    "bce-with-logits-of-one-kind": (
        lambda: F.binary_cross_entropy_with_logits(scores(40), torch.zeros(40)),
        "binary_cross_entropy_with_logits",
        0.0,
    ),
    "pos-weight": (
        lambda: F.binary_cross_entropy_with_logits(scores(40), shares(40), pos_weight=torch.tensor(3.0)),
        "binary_cross_entropy_with_logits",
        0.0,
    ),
    "elements-with-weights": (
        lambda: F.binary_cross_entropy(scores(40).sigmoid(), shares(40), weight=torch.ones(40)),
        "binary_cross_entropy",
        0.0,
    ),
    "bf16": (lambda: F.cross_entropy(scores(8, 5).bfloat16(), labels(8)), "cross_entropy", LN5),
    "float64": (
        lambda: F.mse_loss(scores(8).double(), values(8).double()),
        "mse_loss",
        best_constant(F.mse_loss, values(8)),
    ),
}
"""A loss, the criterion that it is, and its guess; 0: not known. Those of a hand-written error are below."""


@pytest.mark.parametrize(("make", "name", "guess"), KNOWN.values(), ids=KNOWN)
def test_a_criterion_is_known(make: Callable[[], Tensor], name: str, guess: float) -> None:
    found = of(make())
    assert found is not None
    assert found[0] == name
    assert not found[2]
    if name == "l1_loss":  # by the difference: below
        assert found[1] > 0
    else:
        # Of losses between the squared and the absolute error the better of mean and median is a little above the best.
        assert (
            guess * (1 - 1e-6) - 1e-12
            <= found[1]
            <= guess * (1.15 if name in ("smooth_l1_loss", "huber_loss") else 1 + 1e-6) + 1e-12
        )


class OwnLoss(torch.autograd.Function):
    """A loss of somebody's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.n = x.numel()
        return x.square().mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.expand(ctx.n)


UNKNOWN: dict[str, Callable[[], Tensor]] = {
    "nll-of-logarithms": lambda: F.nll_loss(scores(8, 5).softmax(-1).log(), labels(8)),
    "nll-of-anything": lambda: F.nll_loss(scores(8, 5), labels(8)),
    "negated": lambda: -F.mse_loss(scores(8), values(8)),
    "mostly-a-gain": lambda: F.mse_loss(scores(8), values(8)) - 90 * scores(8).square().mean(),
    "less-a-known-one": lambda: F.mse_loss(scores(8), values(8)) - 3 * F.cross_entropy(scores(8, 5), labels(8)),
    "a-penalty-alone": lambda: 1e-4 * scores(3).square().sum() + scores(4).abs().sum(),
    "rows-of-unequal-weight": lambda: (F.cross_entropy(scores(8, 5), labels(8), reduction="none") * values(8)).mean(),
    "a-row-added-to-a-matrix": lambda: (F.mse_loss(scores(8, 3), values(8, 3), reduction="none") + scores(3).square()).mean(),
    "shares-of-the-model-s-own": lambda: -(scores(8, 5).softmax(-1) * F.log_softmax(scores(8, 5), -1)).sum(-1).mean(),
    "a-gain-in-logarithms": lambda: (values(8, 5) * F.log_softmax(scores(8, 5), -1)).mean(),
    "advantages-of-both-signs": lambda: -(values(8).sub(2) * F.log_softmax(scores(8, 5), -1)[:, 0]).mean(),
    "times-minus-one": lambda: F.mse_loss(scores(8), values(8)) * -1.0,
    "over-zero": lambda: F.mse_loss(scores(8), values(8)) / 0.0,
    "over-a-tensor-of-zero": lambda: F.mse_loss(scores(8), values(8)) / torch.zeros(()),
    "times-zero": lambda: F.mse_loss(scores(8), values(8)) * 0.0,
    "a-learnt-factor": lambda: F.mse_loss(scores(8), values(8)) * scores(1)[0],
    "root": lambda: F.mse_loss(scores(8), values(8)).sqrt(),
    "a-loss-of-ones-own": lambda: OwnLoss.apply(scores(8)),  # type: ignore[no-any-return]
    "mean-output": lambda: scores(8).mean(),
    "a-target-that-is-computed": lambda: F.mse_loss(scores(8), scores(8, seed=9)),
    "a-probability-that-is-computed": lambda: F.binary_cross_entropy_with_logits(scores(8), scores(8, seed=9).sigmoid()),
    "only-the-target-is-computed": lambda: F.binary_cross_entropy_with_logits(values(8), scores(8).sigmoid()),
    "both-computed-by-hand": lambda: ((scores(8) - scores(8, seed=9)) ** 2).mean(),
    "cubes": lambda: ((scores(8) - values(8)) ** 3).mean(),
    "infinite-power": lambda: ((scores(8) - values(8)) ** math.inf).mean(),
    "a-power-that-is-a-tensor": lambda: ((scores(8) - values(8)) ** torch.tensor(2.0)).mean(),
    "weighted-squares": lambda: (values(8) * (scores(8) - values(8)) ** 2).mean(),
    "squares-of-outputs": lambda: scores(8).square().mean(),
    "squares-of-sums": lambda: ((scores(8) + values(8)) ** 2).mean(),
    "squares-of-one": lambda: ((scores(1) - values(1)) ** 2).mean(),
    "squares-of-a-scalar": lambda: ((scores(1)[0] - values(1)[0]) ** 2).mean(),
    "minus-the-mean-of-squares": lambda: ((scores(8) - values(8)) ** 2).mean() * -1.0,
}


@pytest.mark.parametrize("make", UNKNOWN.values(), ids=UNKNOWN)
def test_another_loss_is_not_taken_for_one(make: Callable[[], Tensor]) -> None:
    assert of(make()) is None


def test_several_roots_and_roots_that_are_no_number_are_no_criterion() -> None:
    loss = F.mse_loss(scores(8, 3), values(8, 3))
    leaf = torch.ones((), requires_grad=True)
    edge = torch.autograd.graph.get_gradient_edge(loss)
    assert criterion([loss]) is not None
    assert criterion(iter([loss])) is not None
    assert criterion([loss, loss * 2]) is None
    assert criterion([loss, leaf]) is None, "what goes backward is a sum"
    assert criterion([leaf]) is None
    assert criterion([]) is None
    assert criterion([edge]) is None
    rows = ((scores(8, 3) - values(8, 3)) ** 2).mean(1)
    assert criterion([rows]) is None, "of several numbers the loss is not known"


FACTORS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "none": (lambda loss: loss, 1.0),
    "doubled": (lambda loss: 2 * loss, 2.0),
    "quartered": (lambda loss: loss / 4, 0.25),
    "by-a-tensor": (lambda loss: loss * torch.tensor(0.5), 0.5),
    "tensor-first": (lambda loss: torch.tensor([3.0]) * loss, 3.0),
    "over-a-tensor": (lambda loss: loss / torch.tensor(8.0), 0.125),
    "chain": (lambda loss: 0.1 * (loss * 3 / 2).view(1).squeeze(), 0.15),
    "negated-twice": (lambda loss: loss * -2 * -0.5, 1.0),
    "float": (lambda loss: loss.double(), 1.0),
    "clone": (lambda loss: loss.clone().reshape(()), 1.0),
    "integer": (lambda loss: loss * torch.tensor(7), 7.0),
}
BASES: dict[str, Callable[[], Tensor]] = {
    "cross-entropy": lambda: F.cross_entropy(scores(8, 5), labels(8)),
    "mse": lambda: F.mse_loss(scores(8, 3), values(8, 3)),
    "squares": lambda: ((scores(8, 3) - values(8, 3)) ** 2).mean(),
    "absolutes": lambda: (scores(8, 3) - values(8, 3)).abs().mean(),
}


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
@pytest.mark.parametrize(("change", "factor"), FACTORS.values(), ids=FACTORS)
def test_factors_are_the_guess_s_too(base: Callable[[], Tensor], change: Callable[[Tensor], Tensor], factor: float) -> None:
    plain, scaled = of(base()), of(change(base()))
    assert plain is not None
    assert plain[1] > 0
    assert scaled == (plain[0], pytest.approx(plain[1] * factor, rel=1e-6), False)
    assert of(change(base()) * 1024.0, 1024.0) == (plain[0], pytest.approx(plain[1] * factor, rel=1e-6), False)


def test_more_factors_than_anybody_writes_are_given_up() -> None:
    loss = F.cross_entropy(scores(8, 5), labels(8))
    for _ in range(200):
        loss = loss * 1.0
    assert of(loss) is None


# -- reductions, and sums of several terms -------------------------------------------------------------------------------------------

Y = values(8, 3)
MSE = best_constant(F.mse_loss, Y)
BCE = best_constant(F.binary_cross_entropy_with_logits, shares(40, 2))
P = values(8, 5).softmax(-1)
KL = LN5 + float((P * P.log()).sum(-1).mean())
PENALTY = 1e-1 * float(scores(3).detach().square().sum())


def of_none(loss: Callable[..., Tensor], *given: Tensor) -> Tensor:
    return loss(*given, reduction="none")


TAKEN_APART: dict[str, tuple[Callable[[], Tensor], str, float]] = {
    "sum": (lambda: F.cross_entropy(scores(8, 5), labels(8), reduction="sum"), "sum", 8 * LN5),
    "none-then-mean": (lambda: of_none(F.cross_entropy, scores(8, 5), labels(8)).mean(), "cross_entropy", LN5),
    "none-then-sum": (lambda: of_none(F.cross_entropy, scores(8, 5), labels(8)).sum() / 4, "cross_entropy", 2 * LN5),
    "tokens-summed-and-averaged": (
        lambda: of_none(F.cross_entropy, scores(6, 5, 7), labels(6, 7)).sum(1).mean(),
        "sum",
        7 * LN5,
    ),
    "mse-sum": (lambda: F.mse_loss(scores(8, 3), Y, reduction="sum"), "sum", 24 * MSE),
    "mse-sum-over-rows": (lambda: nn.MSELoss(reduction="sum")(scores(8, 3), Y) / len(Y), "mse_loss", 3 * MSE),
    "mse-none-then-mean": (lambda: of_none(F.mse_loss, scores(8, 3), Y).mean(1).mean(), "mse_loss", MSE),
    "bce-of-an-autoencoder": (
        lambda: of_none(F.binary_cross_entropy_with_logits, scores(40, 2), shares(40, 2)).sum(1).mean(),
        "sum",
        2 * BCE,
    ),
    "two-losses": (lambda: F.mse_loss(scores(8, 3), Y) + 2 * F.mse_loss(scores(8, 3, seed=5), Y), "mse_loss", 3 * MSE),
    "sum-of-a-list": (
        lambda: sum([F.mse_loss(scores(8, 3), Y), F.mse_loss(scores(8, 3, seed=5), Y)], start=torch.zeros(())) / 2,
        "mse_loss",
        MSE,
    ),
    "stacked-and-averaged": (
        lambda: torch.stack([F.mse_loss(scores(8, 3, seed=i), Y) for i in range(3)]).mean(),
        "mse_loss",
        MSE,
    ),
    "stacked-and-added": (
        lambda: torch.stack([F.mse_loss(scores(8, 3, seed=i), Y) for i in range(3)]).sum(),
        "mse_loss",
        3 * MSE,
    ),
    "elements-added": (
        lambda: (of_none(F.mse_loss, scores(8, 3), Y) + of_none(F.mse_loss, scores(8, 3, seed=4), Y)).mean(),
        "mse_loss",
        2 * MSE,
    ),
    "two-kinds": (lambda: F.mse_loss(scores(8, 3), Y) + F.cross_entropy(scores(8, 5), labels(8)), "sum", MSE + LN5),
    "classes-and-marks": (
        lambda: F.cross_entropy(scores(8, 5), labels(8)) + 0.5 * F.binary_cross_entropy_with_logits(scores(40, 2), shares(40, 2)),
        "cross_entropies",
        LN5 + 0.5 * BCE,
    ),
    "a-constant": (lambda: F.mse_loss(scores(8, 3), Y) + 5.0, "mse_loss", MSE + 5.0),
    "less-a-constant": (lambda: 2.0 - (1.0 - F.cross_entropy(scores(8, 5), labels(8))), "cross_entropy", LN5 + 1.0),
    "a-penalty": (lambda: F.mse_loss(scores(8, 3), Y) + 1e-1 * scores(3).square().sum(), "sum", MSE + PENALTY),
    "a-penalty-of-classes": (
        lambda: F.cross_entropy(scores(8, 5), labels(8)) + 1e-1 * scores(3).square().sum(),
        "cross_entropies",
        LN5 + PENALTY,
    ),
    "an-entropy-bonus": (
        lambda: F.mse_loss(scores(8, 3), Y) - 1e-2 * scores(3).square().sum(),
        "sum",
        MSE - PENALTY / 10,
    ),
    "by-hand-and-by-name": (
        lambda: F.mse_loss(scores(8, 3), Y) + 0 * ((scores(8, 3) - Y) ** 2).mean() + F.mse_loss(scores(8, 3), Y),
        "sum",
        2 * MSE,
    ),
    "squares-added": (lambda: ((torch.zeros(8, 3, requires_grad=True) * 1 - Y) ** 2).sum(), "sum", 24 * MSE),
    "a-gaussian-of-known-deviation": (
        lambda: 0.5 * (((torch.zeros(8, 3, requires_grad=True) * 1 - Y) / 0.2) ** 2).sum(1).mean(),
        "sum",
        0.5 * 3 * 25 * MSE,
    ),
    "class-probabilities": (lambda: F.cross_entropy(scores(8, 5), P), "cross_entropy", LN5),
    "class-probabilities-by-hand": (lambda: -(P * scores(8, 5).log_softmax(-1)).sum(-1).mean(), "cross_entropy", LN5),
    "masked-rows-of-probabilities": (
        lambda: -(P * (torch.arange(8) < 4)[:, None] * scores(8, 5).log_softmax(-1)).sum() / 4,
        "cross_entropy",
        LN5,
    ),
    "kl": (lambda: F.kl_div(F.log_softmax(scores(8, 5), -1), P, reduction="batchmean"), "cross_entropy", KL),
    "distillation": (
        lambda: 4 * F.kl_div(F.log_softmax(scores(8, 5) / 2, 1), P, reduction="batchmean"),
        "cross_entropy",
        4 * KL,
    ),
    "kl-of-logarithms": (
        lambda: (
            F.cross_entropy(scores(8, 5), labels(8))
            + F.kl_div(F.log_softmax(scores(8, 5), -1), P.log(), log_target=True, reduction="batchmean")
        ),
        "cross_entropies",
        LN5 + float(F.kl_div(F.log_softmax(scores(8, 5).detach(), -1), P, reduction="batchmean")),
    ),
    "ignored-labels-and-a-penalty": (
        lambda: F.cross_entropy(scores(8, 5), labels(8), ignore_index=2) + 1e-1 * scores(3).square().sum(),
        "cross_entropies",
        LN5 + PENALTY,
    ),
}
"""A loss that is taken apart, the name of what is found, and its guess."""


@pytest.mark.parametrize(("make", "name", "guess"), TAKEN_APART.values(), ids=TAKEN_APART)
def test_reductions_and_sums_are_taken_apart(make: Callable[[], Tensor], name: str, guess: float) -> None:
    assert of(make()) == (name, pytest.approx(guess, rel=1e-5), False)
    assert of(make() * 64.0, 64.0) == (name, pytest.approx(guess, rel=1e-4), False)


def test_smoothed_labels_cost_at_a_guess_about_what_equal_logits_do() -> None:
    found = of(F.cross_entropy(torch.zeros(8, 5, requires_grad=True) * 1, labels(8), label_smoothing=0.2))
    assert found == ("cross_entropies", pytest.approx(LN5, rel=1e-5), False)


def test_a_sum_whose_loss_scale_is_on_a_device_has_no_unknown_terms() -> None:
    loss = F.cross_entropy(scores(8, 5), labels(8))
    assert of(loss + 0.1 * scores(3).square().sum(), math.nan) is None


def test_more_terms_than_anybody_adds_are_given_up() -> None:
    many = torch.stack([F.mse_loss(scores(8, 3), Y) for _ in range(200)]).sum()
    assert of(many) is None


# -- the guess ---------------------------------------------------------------------------------------------------------------------

shapes = st.tuples(st.integers(2, 9), st.integers(1, 3)).map(lambda pair: (pair[0], pair[1]))


@settings(max_examples=40, deadline=None)
@given(shape=shapes, seed=st.integers(0, 999), scale=st.sampled_from([1e-2, 1.0, 5.0]), centre=st.sampled_from([0.0, 3.0]))
def test_the_guess_is_what_a_search_finds(shape: tuple[int, int], seed: int, scale: float, centre: float) -> None:
    y = values(*shape, seed=seed).clamp(max=3.0) * scale + centre
    x = scores(*shape, seed=seed)
    mse = of(F.mse_loss(x, y))
    assert mse is not None
    assert mse[1] == pytest.approx(best_constant(F.mse_loss, y), rel=1e-5, abs=1e-9)
    for loss in (F.smooth_l1_loss, F.huber_loss):
        found = of(loss(x, y))  # type: ignore[operator]
        best = best_constant(loss, y)  # type: ignore[arg-type]
        assert found is not None
        assert best * (1 - 1e-5) - 1e-9 <= found[1] <= 1.15 * best + 1e-9
    # By hand the difference is all there is: the same, where the prediction is a constant.
    constant = torch.zeros(shape, requires_grad=True) * 1
    squares, absolutes = of(((constant - y) ** 2).mean()), of((constant - y).abs().mean())
    assert squares is not None
    assert absolutes is not None
    assert squares[1] == pytest.approx(best_constant(F.mse_loss, y), rel=1e-4, abs=1e-9)
    assert absolutes[1] == pytest.approx(best_constant(F.l1_loss, y), rel=1e-4, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(shape=shapes, seed=st.integers(0, 999), soft=st.booleans())
def test_the_guess_of_a_binary_cross_entropy_is_what_a_search_finds(shape: tuple[int, int], seed: int, soft: bool) -> None:
    y = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    y = y if soft else y.round()
    expected = best_constant(F.binary_cross_entropy, y, 1e-9, 1 - 1e-9)
    for loss in (
        F.binary_cross_entropy(scores(*shape).sigmoid(), y),
        F.binary_cross_entropy_with_logits(scores(*shape), y),
    ):
        found = of(loss)
        assert found is not None
        assert found[1] == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_of_targets_that_are_not_finite_no_guess_is_known(bad: float) -> None:
    y = values(8)
    y[3] = bad
    for loss in (F.mse_loss(scores(8), y), F.huber_loss(scores(8), y), ((scores(8) - y) ** 2).mean()):
        found = criterion([loss])
        assert found is not None
        assert not math.isfinite(found.guess)


def test_targets_that_are_no_probabilities_give_no_guess() -> None:
    found = criterion([F.binary_cross_entropy_with_logits(scores(8), values(8) + 1)])
    assert found is not None
    assert not found.guess > 0


class Own(Tensor):
    """A tensor that runs somebody's code."""

    asked: ClassVar[list[Any]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.asked.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("loss", [F.mse_loss, lambda x, y: ((x - y) ** 2).mean()], ids=["function", "by-hand"])
def test_targets_of_a_type_of_their_own_are_not_computed_with(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    y = values(8).as_subclass(Own)
    value = loss(scores(8), y)
    factor = scores(1)[0].detach().abs().as_subclass(Own)
    scaled = F.mse_loss(scores(8), values(8)) * factor
    Own.asked.clear()
    found = criterion([value])
    assert found is None or math.isnan(found.guess)
    assert criterion([scaled]) is None
    assert not {"double", "var", "mean", "__float__"} & {getattr(func, "__name__", "") for func in Own.asked}


def test_losses_of_nothing_have_no_guess() -> None:
    for logits in (torch.zeros(0, 5), torch.zeros(0, 0)):
        found = criterion([F.cross_entropy(logits.requires_grad_() * 1, labels(0))])
        assert found is not None
        assert math.isnan(found.guess)
    for error in (F.mse_loss, F.huber_loss, F.l1_loss):
        found = criterion([error(scores(0, 3), values(0, 3))])  # type: ignore[operator]
        assert found is None or math.isnan(found.guess)


def test_many_targets_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(criterion_module, "_TARGETS", 100)
    assert of(F.mse_loss(scores(100), values(100))) == ("mse_loss", pytest.approx(best_constant(F.mse_loss, values(100))), False)
    assert of(F.mse_loss(scores(101), values(101))) == ("mse_loss", 0.0, False)
    assert of(((scores(101) - values(101)) ** 2).mean()) is None


# -- broadcast ---------------------------------------------------------------------------------------------------------------------

PAIRS: dict[str, tuple[tuple[int, ...], tuple[int, ...], bool]] = {
    "same": ((8,), (8,), False),
    "columns": ((8, 1), (8, 1), False),
    "column-against-flat": ((8, 1), (8,), True),
    "flat-against-column": ((8,), (8, 1), True),
    "column-against-row": ((8, 1), (1, 8), True),
    "row-against-column": ((1, 8), (8, 1), True),
    "scalar-target": ((8, 1), (), False),
    "one-target": ((8, 3), (1,), False),
    "target-of-a-row": ((8, 3), (3,), False),
    "target-of-a-column": ((8, 3), (8, 1), False),
    "prediction-of-a-column": ((8, 1), (8, 3), False),  # one value for a row of targets may be meant
    "one-more-dimension": ((8,), (1, 8), False),
    "two-more-dimensions": ((8, 1), (1, 8, 1), False),
}
ERRORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse_loss": F.mse_loss,
    "MSELoss": nn.MSELoss(),
    "l1_loss": F.l1_loss,
    "L1Loss": nn.L1Loss(),
    "smooth_l1_loss": F.smooth_l1_loss,
    "huber_loss": F.huber_loss,
    "squares": lambda x, y: ((x - y) ** 2).mean(),
    "pow": lambda x, y: (x - y).pow(2).mean(),
    "square": lambda x, y: torch.square(x - y).mean(),
    "other-way-round": lambda x, y: ((y - x) ** 2).mean(),
    "absolutes": lambda x, y: (x - y).abs().mean(),
    "abs": lambda x, y: torch.abs(y - x).mean(),
    "over-all-dimensions": lambda x, y: (x - y).square().mean(dim=tuple(range((x - y).dim()))),
    "subtracted": lambda x, y: torch.sub(x, y).square().mean(),
}


@EXPANDS
@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize(("given_", "target", "broadcast"), PAIRS.values(), ids=PAIRS)
def test_a_prediction_that_is_broadcast_is_seen(
    given_: tuple[int, ...], target: tuple[int, ...], broadcast: bool, error: Callable[[Tensor, Tensor], Tensor]
) -> None:
    found = of(error(scores(*given_), values(*target)))
    if found is None:  # the difference has one row
        assert math.prod(given_) == 8
        assert given_ != (8,) or target[0] == 1
        return
    assert found[0] in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")
    # F.mse_loss expands for one more dimension of one element, too, and nothing is broadcast by that.
    assert found[2] is broadcast


@EXPANDS
def test_the_target_that_is_given_first_may_be_what_broadcasts() -> None:
    assert of(F.mse_loss(values(8), scores(8, 1))) == ("mse_loss", pytest.approx(0, abs=9), True)
    assert of(F.l1_loss(values(8), scores(8, 1))) == ("l1_loss", pytest.approx(0, abs=9), True)


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_one_of_several_outputs_of_an_operator_has_its_own_shape(error: Callable[[Tensor, Tensor], Tensor]) -> None:
    wide, narrow = scores(8, 4).split([3, 1], -1)
    for x in (wide, narrow):
        found = of(error(x, values(*x.shape)))
        assert found is not None
        assert not found[2]


@EXPANDS
@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_without_shapes_nothing_is_said_of_broadcasts(
    error: Callable[[Tensor, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private, "output_shape", lambda node, number=0: None)
    found = of(error(scores(8, 1), values(8)))
    assert found is not None
    assert not found[2]


def test_by_hand_the_guess_is_the_variance_of_the_difference() -> None:
    x, y = scores(8, 3), values(8, 3)
    gap = (x - y).detach()
    assert of(((x - y) ** 2).mean()) == ("mse_loss", pytest.approx(float(gap.var(0, correction=0).mean()), rel=1e-5), False)
    middle = gap.median(0).values
    assert of((x - y).abs().mean()) == ("l1_loss", pytest.approx(float((gap - middle).abs().mean()), rel=1e-5), False)
    assert of(F.l1_loss(x, y)) == of((x - y).abs().mean())


@pytest.mark.filterwarnings("error")
def test_complex_differences_have_no_guess_and_give_no_warning() -> None:
    x = torch.randn(8, dtype=torch.complex64, requires_grad=True) * 2
    assert of((x - torch.ones(8)).abs().mean()) == ("l1_loss", 0.0, False)
    assert of(F.l1_loss(x, torch.ones(8, dtype=torch.complex64))) == ("l1_loss", 0.0, False)
    with pytest.warns(UserWarning, match="imaginary"):
        real = (F.mse_loss(scores(8), values(8)) * (1 + 0j)).float()
    assert of(real) is None
    assert of(((x - torch.ones(8)).abs().mean() * (1 + 0j)).real) is None


# -- what may not be read ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [*KNOWN, *UNKNOWN])
def test_a_graph_that_was_freed_raises_nothing(base: str) -> None:
    loss = KNOWN[base][0]() if base in KNOWN else UNKNOWN[base]()
    if "infinite" in base:
        return  # its gradient is one of zeros; it runs backward all the same
    loss.backward()
    criterion([loss])
    squashed([loss])


@pytest.mark.parametrize("base", [*BASES, "pos-weight", "bce", "a-power-that-is-a-tensor"])
def test_what_lies_in_a_checkpoint_is_not_read(base: str) -> None:
    calls: list[int] = []
    make = BASES.get(base) or (KNOWN[base][0] if base in KNOWN else UNKNOWN[base])

    def run(_: Tensor) -> Tensor:
        calls.append(1)
        return make() * 2.0

    loss = checkpoint(run, torch.ones(1, requires_grad=True), use_reentrant=False)
    assert isinstance(loss, Tensor)
    found = of(loss)
    assert found is None or found[1] == 0.0
    assert len(calls) == 1, "reading a saved tensor starts a recomputation"


@pytest.mark.parametrize("base", BASES)
def test_what_somebody_s_hooks_packed_is_not_unpacked(base: str) -> None:
    unpacked: list[int] = []

    def unpack(tensor: Tensor) -> Tensor:
        unpacked.append(1)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        loss = BASES[base]()
    found = of(loss)
    assert found is None or found[1] == 0.0
    assert not unpacked


@pytest.mark.parametrize("make", [*(KNOWN[name][0] for name in KNOWN)], ids=KNOWN)
def test_on_a_device_no_value_is_asked_for(make: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    loss = make()
    here = of(loss)
    monkeypatch.setattr(parameters, "HOST", "nowhere")
    with Operators() as operators:
        there = of(loss)
        squashed([loss])
    assert not operators.seen
    assert here is not None
    assert there is not None
    assert (there[0], there[2]) == (here[0], here[2])
    assert there[1] == (here[1] if here[0] == "cross_entropy" else 0.0)


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_on_a_device_a_loss_scale_is_known_to_cancel(base: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    loss = base()
    here = of(loss)
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    once = scaler.scale(loss)
    two_factors = (scaler.scale(loss * torch.tensor(0.25)), scaler.scale(loss / torch.tensor(4.0)), once / torch.tensor(4.0))
    quarter = loss * torch.tensor(0.25)
    monkeypatch.setattr(parameters, "HOST", "nowhere")
    with Operators() as operators:
        there = of(once, math.nan)
        # A number of Python's is a CPU tensor in the graph, wherever the loss is: only here it cannot be told from one of a device.
        twice = [of(each, math.nan) for each in two_factors]
        unscaled = of(quarter)
    assert not operators.seen
    assert here is not None
    assert there is not None
    assert there[0] == here[0]
    assert there[1] == (pytest.approx(here[1]) if here[0] == "cross_entropy" else 0.0)
    assert twice == [None] * 3, "one factor is the scale, and another is on the device too"
    assert unscaled is None
    assert of(loss, math.nan) is None, "a scale that is not in the graph"


def test_reading_leaves_the_graph_as_it_was() -> None:
    torch.manual_seed(0)
    for make in (F.mse_loss, F.l1_loss, F.huber_loss, lambda x, y: ((x - y) ** 2).mean()):
        gradients = []
        for look in (False, True):
            x = torch.linspace(-1, 1, 8, requires_grad=True)
            y = values(8)
            before = y.clone()
            loss = make(x * 2, y)  # type: ignore[operator]
            if look:
                criterion([loss])
                squashed([loss])
            loss.backward()
            assert torch.equal(y, before)
            assert y._version == 0
            gradients.append(x.grad)
        assert torch.equal(*gradients)


def test_targets_changed_in_place_are_not_known_and_raise_nothing_here() -> None:
    y = values(8)
    loss = F.mse_loss(scores(8), y)
    y.add_(1)
    assert of(loss) == ("mse_loss", 0.0, False)


# -- what is normalised twice ------------------------------------------------------------------------------------------------------


def two(logits: Tensor, classes: int = 5) -> Tensor:
    """Cross-entropy."""
    return F.cross_entropy(logits, labels(len(logits), classes=classes))


def bce(logits: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, shares(*logits.shape))


def steps(join: Callable[..., Tensor], **how: Any) -> Tensor:
    """Softmaxes of three steps, joined."""
    return join([scores(4, 5, seed=i).softmax(-1) for i in range(3)], **how)


TWICE: dict[str, tuple[Callable[[], Tensor], str]] = {
    "softmax": (lambda: two(scores(8, 5).softmax(-1)), "softmax"),
    "module": (lambda: two(nn.Softmax(-1)(scores(8, 5))), "softmax"),
    "log-softmax-then-nll": (lambda: F.nll_loss(F.log_softmax(scores(8, 5).softmax(-1), -1), labels(8)), "softmax"),
    "label-smoothing": (lambda: F.cross_entropy(scores(8, 5).softmax(-1), labels(8), label_smoothing=0.1), "softmax"),
    "a-categorical-given-probabilities-as-logits": (
        lambda: -torch.distributions.Categorical(logits=scores(8, 5).softmax(-1)).log_prob(labels(8)).mean(),
        "softmax",
    ),
    "sum": (lambda: F.cross_entropy(scores(8, 5).softmax(-1), labels(8), reduction="sum"), "softmax"),
    "stacked": (lambda: two(steps(torch.stack).flatten(0, 1)), "softmax"),
    "joined": (lambda: two(steps(torch.cat)), "softmax"),
    "transposed": (lambda: F.cross_entropy(steps(torch.stack, dim=1).transpose(1, 2), labels(4, 3)), "softmax"),
    "permuted": (lambda: F.cross_entropy(scores(2, 4, 4, 5).softmax(-1).permute(0, 3, 1, 2), labels(2, 4, 4)), "softmax"),
    "joined-to-a-constant": (lambda: two(torch.cat([scores(4, 5).softmax(-1), torch.zeros(4, 5)])), "softmax"),
    "clamped": (lambda: two(scores(8, 5).softmax(-1).clamp(1e-7, 1 - 1e-7)), "softmax"),
    "clamped-below": (lambda: two(scores(8, 5).softmax(-1).clamp_min(1e-7)), "softmax"),
    "selected": (lambda: two(scores(8, 3, 5).softmax(-1)[:, -1]), "softmax"),
    "sliced": (lambda: two(scores(8, 5).softmax(-1)[:6]), "softmax"),
    "indexed": (lambda: two(scores(8, 5).softmax(-1)[torch.tensor([0, 2])]), "softmax"),
    "masked": (lambda: two(scores(8, 5).softmax(-1)[torch.arange(8) > 2]), "softmax"),
    "split": (lambda: two(scores(8, 10).softmax(-1).chunk(2, -1)[0]), "softmax"),
    "unbound": (lambda: two(scores(2, 8, 5).softmax(-1).unbind(0)[1]), "softmax"),
    "copied": (lambda: two(scores(8, 5).softmax(-1).clone().contiguous()), "softmax"),
    "other-precision": (lambda: two(scores(8, 5).bfloat16().softmax(-1).float()), "softmax"),
    "same-joined-twice": (lambda: two(torch.cat([probabilities := scores(4, 5).softmax(-1), probabilities])), "softmax"),
    "with-a-penalty": (lambda: two(scores(8, 5).softmax(-1)) + scores(3).square().sum(), "softmax"),
    "second-of-two": (lambda: two(scores(8, 5)) + two(scores(8, 5, seed=4).softmax(-1)), "softmax"),
    "sigmoid": (lambda: bce(scores(8).sigmoid()), "sigmoid"),
    "sigmoid-module": (lambda: bce(nn.Sigmoid()(scores(8, 1)).squeeze(1)), "sigmoid"),
    "sigmoid-with-weights": (
        lambda: F.binary_cross_entropy_with_logits(
            scores(8).sigmoid(), shares(8), weight=torch.ones(8), pos_weight=torch.tensor(2.0)
        ),
        "sigmoid",
    ),
    "sigmoid-for-classes": (lambda: two(scores(8, 5).sigmoid()), "softmax of sigmoid"),
    "softmax-for-labels": (lambda: bce(scores(8, 5).softmax(-1)), "sigmoid of softmax"),
    "sigmoid-and-a-target-that-is-computed": (
        lambda: F.binary_cross_entropy_with_logits(scores(8).sigmoid(), scores(8, seed=4).tanh()),
        "sigmoid",
    ),
}


@pytest.mark.parametrize(("make", "function"), TWICE.values(), ids=TWICE)
def test_what_is_normalised_twice_is_seen(make: Callable[[], Tensor], function: str) -> None:
    loss = make()
    found = squashed([loss])
    assert found is not None
    assert found.function == function
    assert found.numbers
    assert all(number >= 0 for number in found.numbers)
    loss.backward()
    assert squashed([loss]) == found, "the graph is walked after the backward"


def attention(x: Tensor) -> Tensor:
    return ((x @ x.transpose(-1, -2)).softmax(-1) @ x).mean(1)


ONCE: dict[str, Callable[[], Tensor]] = {
    "rounded": lambda: two(scores(8, 5).softmax(-1) + 1e-8),
    "beside-the-logits-of-another": lambda: two(scores(8, 5).sigmoid() + 5 * torch.eye(8, 5)),
    "sum-of-two": lambda: two(scores(8, 5).softmax(-1) + scores(8, 5, seed=4).softmax(-1)),
    "a-softmax-and-a-sigmoid": lambda: two(torch.cat([scores(4, 5).softmax(-1), scores(4, 5, seed=4).sigmoid()])),
    "scaled-and-shifted": lambda: two(scores(8, 5).sigmoid() * 8 - 4),
    "logits": lambda: two(scores(8, 5)),
    "attention": lambda: two(attention(scores(8, 3, 5))),
    "temperature": lambda: two(scores(8, 5).softmax(-1) * 30.0),
    "logarithm": lambda: F.nll_loss(scores(8, 5).softmax(-1).log(), labels(8)),
    "logarithm-then-cross-entropy": lambda: two(scores(8, 5).softmax(-1).log()),
    "clamped-logarithm": lambda: two(scores(8, 5).softmax(-1).clamp_min(1e-7).log()),
    "log-softmax-twice": lambda: two(F.log_softmax(scores(8, 5), -1)),
    "mixture": lambda: F.nll_loss((scores(8, 3, 1, seed=4).softmax(1) * scores(8, 3, 5).softmax(-1)).sum(1).log(), labels(8)),
    "mean-of-an-ensemble": lambda: two(torch.stack([scores(8, 5, seed=i).softmax(-1) for i in range(3)]).mean(0)),
    "distillation": lambda: F.kl_div(
        F.log_softmax(scores(8, 5) / 2, -1), (scores(8, 5, seed=4) / 2).softmax(-1), reduction="batchmean"
    ),
    "distillation-by-probabilities": lambda: F.cross_entropy(scores(8, 5), scores(8, 5, seed=4).softmax(-1)),
    "gumbel-softmax": lambda: two(F.gumbel_softmax(scores(8, 4), hard=True) @ scores(4, 5, seed=4)),
    "joined-to-logits": lambda: two(torch.cat([scores(4, 5).softmax(-1), scores(4, 5, seed=4)])),
    "joined-to-a-leaf": lambda: two(torch.cat([scores(4, 5).softmax(-1), torch.zeros(4, 5, requires_grad=True)])),
    "sigmoid-gate": lambda: bce(scores(8) * scores(8, seed=4).sigmoid()),
    "sigmoid-then-bce": lambda: F.binary_cross_entropy(scores(8).sigmoid(), shares(8)),
    "only-the-target-is-one": lambda: F.binary_cross_entropy_with_logits(values(8), scores(8).sigmoid()),
    "only-the-target-is-one-and-logits-are-too": lambda: F.binary_cross_entropy_with_logits(scores(8), scores(8, seed=4).sigmoid()),
    "a-leaf": lambda: two(torch.zeros(8, 5, requires_grad=True)),
    "softmax-elsewhere": lambda: two(scores(8, 5)) + scores(8, 5, seed=4).softmax(-1).square().sum(),
}


@pytest.mark.parametrize("make", ONCE.values(), ids=ONCE)
def test_what_is_normalised_once_is_not(make: Callable[[], Tensor]) -> None:
    assert squashed([make()]) is None


def test_several_roots_are_walked_and_what_is_no_graph_is_not() -> None:
    sick = two(scores(8, 5).softmax(-1))
    assert squashed([two(scores(8, 5)), sick]) is not None
    assert squashed(iter([torch.ones(()), torch.ones((), requires_grad=True), sick])) is not None
    assert squashed([torch.autograd.graph.get_gradient_edge(sick)]) is not None
    assert squashed([]) is None


def deep(x: Tensor, nodes: int) -> Tensor:
    for _ in range(nodes):
        x = x + 1.0
    return x


def test_the_walk_is_bounded_and_begins_at_the_loss() -> None:
    sick = two(deep(scores(8, 5), 3).softmax(-1))
    assert squashed([sick + deep(scores(1), 500).sum()], limit=50) is not None
    assert squashed([deep(scores(1), 500).sum() + sick], limit=50) is not None
    assert squashed([deep(sick, 100)], limit=50) is None
    assert squashed([deep(sick, 100)], limit=200) is not None


def test_steps_beyond_the_bound_are_not_taken_for_softmaxes() -> None:
    many = [scores(1, 5).softmax(-1)] * 3
    probabilities = torch.cat([scores(1, 5)[:0], *many])
    for _ in range(40):  # 2^40 ways down, and 41 nodes
        probabilities = torch.cat([probabilities[:1], probabilities[:1]])
    assert squashed([two(probabilities)]) is None, "there are logits among them"
    probabilities = scores(2, 5).softmax(-1)
    for _ in range(40):
        probabilities = torch.cat([probabilities[:1], probabilities[1:]])
    assert squashed([two(probabilities)]) is not None
    x = scores(1, 5)
    long = torch.cat([x[:1], *(x[:1].softmax(-1) for _ in range(10_050))])
    assert squashed([two(long)]) is None, "the last that would be looked at is none"


def test_without_sequence_numbers_no_node_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "sequence_number", lambda node: -1)
    found = squashed([two(scores(8, 5).softmax(-1))])
    assert found is not None
    assert found.numbers == frozenset()


def test_criteria_compare_by_value() -> None:
    losses: Iterable[Tensor] = (F.cross_entropy(scores(8, 5), labels(8)) for _ in range(2))
    one, other = (criterion([loss]) for loss in losses)
    assert one == other == Criterion("cross_entropy", LN5, False)
