"""Bugs planted where people plant them, each with what has to be said of it: module, operator, pass and line.

The guilty line of a bug carries the comment `# guilty`; in the loss, outside the model, the line is known only once it happens again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

WIDTH, BATCH, AT = 8, 16, 3
"""The bug bites at update `AT`."""


@dataclass
class Training:
    """A model and what one update does with it.

    Attributes:
        model: it.
        loss: number of the update -> the loss.
    """

    model: nn.Module
    loss: Callable[[int], Tensor]


@dataclass(frozen=True)
class Planted:
    """A planted bug.

    Attributes:
        make: makes the training.
        module, op, phase: of the origin.
        told: "at once", "on recurrence" (the line), or "operator only".
        what: what it is, for the docs.
        rule: of the alert.
        line: the source is known at once.
        says: parts of the cause.
        options: of the watch.
    """

    make: Callable[[], Training]
    module: str
    op: str
    phase: str
    what: str
    told: str = "at once"
    rule: str = ""
    says: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.make.__name__

    @property
    def guilty(self) -> str:
        """ "planted.py:31", "" where no line is."""
        lines, first = inspect.getsourcelines(self.make)
        marked = [first + i for i, line in enumerate(lines) if line.rstrip().endswith("# guilty")]
        return f"planted.py:{marked[0]}" if marked else ""


PLANTED: list[Planted] = []


def planted(module: str, op: str, phase: str, what: str, **more: Any) -> Callable[[Callable[[], Training]], Callable[[], Training]]:
    def add(make: Callable[[], Training]) -> Callable[[], Training]:
        PLANTED.append(Planted(make, module, op, phase, what, **more))
        return make

    return add


class Body(nn.Module):
    """A layer, something in the middle, another layer."""

    def __init__(self, middle: nn.Module, out: int = 2) -> None:
        super().__init__()
        self.below, self.middle, self.above = nn.Linear(WIDTH, WIDTH), middle, nn.Linear(WIDTH, out)

    def forward(self, x: Tensor) -> Any:
        return self.above(self.middle(torch.tanh(self.below(x))))


def batch(i: int) -> Tensor:
    return torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(100 + i))


def squares(model: nn.Module) -> Training:
    """Its outputs are to become small."""
    return Training(model, lambda i: model(batch(i)).square().mean())


class Turn(nn.Module):
    """Counts the training's forward passes by what it is told: hidden state would not replay."""

    now = 0

    def bad(self) -> bool:
        return Turn.now == AT


def turning(training: Training) -> Training:
    """Tell the modules which update it is."""
    inner = training.loss

    def loss(i: int) -> Tensor:
        Turn.now = i
        return inner(i)

    return Training(training.model, loss)


# -- in the forward pass -----------------------------------------------------------------------------------------------------------


@planted("middle", "aten::log", "forward", "log(0)", rule="non_finite_activation", says=("log of 0",))
def log_of_zero() -> Training:
    class Middle(Turn):
        def forward(self, x: Tensor) -> Tensor:
            p = torch.relu(x) if self.bad() else torch.relu(x) + 0.1
            return torch.log(p)  # guilty

    return turning(squares(Body(Middle())))


@planted("middle", "aten::mul", "forward", "0 times Inf", says=("mul",))
def zero_times_inf() -> Training:
    class Middle(Turn):
        def forward(self, x: Tensor) -> Tensor:
            scale = float("inf") if self.bad() else 1.0
            return torch.relu(x) * scale  # guilty

    return turning(squares(Body(Middle())))


@planted("middle", "aten::div", "forward", "a mean over an empty selection", says=("div by 0",))
def empty_mean() -> Training:
    class Middle(Turn):
        def forward(self, x: Tensor) -> Tensor:
            chosen = (x > (2.0 if self.bad() else -2.0)).float()
            return x + (x * chosen).sum() / chosen.sum()  # guilty

    return turning(squares(Body(Middle())))


@planted("middle", "aten::softmax", "forward", "a softmax over a row that is masked throughout", says=("softmax", "-Inf"))
def masked_softmax() -> Training:
    class Middle(Turn):
        def forward(self, x: Tensor) -> Tensor:
            scores = x @ x.T
            mask = torch.zeros(len(x), len(x), dtype=torch.bool)
            mask[0] = self.bad()
            mask[1:, 3] = True
            return torch.softmax(scores.masked_fill(mask, -torch.inf), dim=-1) @ x  # guilty

    return turning(squares(Body(Middle())))


@planted("middle", "aten::div", "forward", "x / ‖x‖ at 0")
def normalised_zero() -> Training:
    class Middle(Turn):
        def forward(self, x: Tensor) -> Tensor:
            x = x * 0 if self.bad() else x
            return x / x.norm(dim=-1, keepdim=True)  # guilty

    return turning(squares(Body(Middle())))


@planted("middle", "aten::exp", "forward", "exp of a large number", says=("exp of",))
def exp_overflows() -> Training:
    class Middle(Turn):
        def forward(self, x: Tensor) -> Tensor:
            x = x * (1e4 if self.bad() else 1.0)
            return torch.exp(x)  # guilty

    return turning(squares(Body(Middle())))


@planted("middle", "aten::to", "forward", "a value beyond float16", says=("dtype",))
def half_overflows() -> Training:
    class Middle(Turn):
        def forward(self, x: Tensor) -> Tensor:
            x = x * (1e6 if self.bad() else 1.0)
            return x.half().float()  # guilty

    return turning(squares(Body(Middle())))


@planted("middle", "aten::div", "forward", "standardising a constant")
def standardised_constant() -> Training:
    class Middle(Turn):
        def forward(self, x: Tensor) -> Tensor:
            x = x * 0 + 1 if self.bad() else x
            return (x - x.mean(0)) / x.std(0)  # guilty

    return turning(squares(Body(Middle())))


@planted("middle", "aten::var", "forward", "the variance of one sample")
def variance_of_one() -> Training:
    class Middle(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / (x.var(0) + 1.0)  # guilty

    model = Body(Middle())
    return Training(model, lambda i: model(batch(i)[: 1 if i == AT else BATCH]).square().mean())


@planted("middle", "aten::div_", "forward", "a division in place")
def division_in_place() -> Training:
    class Middle(Turn):
        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            x[0].div_(0.0 if self.bad() else 2.0)  # guilty
            return x

    return turning(squares(Body(Middle())))


@planted("middle", "aten::log", "forward", "a bug that only some dropout masks show")
def dropout_dependent() -> Training:
    class Middle(Turn):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            p = self.drop(torch.exp(x))
            return torch.log(p if self.bad() else p + 1)  # guilty

    return turning(squares(Body(Middle())))


@planted("middle.inner", "aten::log", "forward", "a module that is used many times")
def used_many_times() -> Training:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.log(x)  # guilty

    class Middle(Turn):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            for k in range(4):
                x = self.inner(x.abs() * (0 if self.bad() and k == 2 else 1) + (0 if self.bad() and k == 2 else 1))
            return x

    return turning(squares(Body(Middle())))


@planted("middle", "aten::log", "forward", "inside a checkpoint")
def in_a_checkpoint() -> Training:
    class Middle(Turn):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

        def inner(self, x: Tensor) -> Tensor:
            return torch.log(torch.relu(x) if self.bad() else x.exp())  # guilty

    return turning(squares(Body(Middle())))


@planted("middle", "aten::log", "forward", "inside a reentrant checkpoint")
def in_a_reentrant_checkpoint() -> Training:
    class Middle(Turn):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=True)

        def inner(self, x: Tensor) -> Tensor:
            return torch.log(torch.relu(x) if self.bad() else x.exp())  # guilty

    return turning(squares(Body(Middle())))


@planted("middle", "aten::log", "forward", "what goes into an LSTM", says=("log of -",))
def into_an_lstm() -> Training:
    class Middle(Turn):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(1, WIDTH, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            steps = torch.log(x if self.bad() else x.exp())  # guilty
            return self.lstm(steps[..., None])[0][:, -1]

    return turning(squares(Body(Middle())))


@planted("middle.cell", "aten::mul", "forward", "inside an LSTM: a closed forget gate times a state that is Inf")
def in_an_lstm() -> Training:
    class Middle(Turn):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTMCell(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            state = x, torch.full_like(x, torch.inf if self.bad() else 0.0)
            for _ in range(3):
                state = self.cell(x, state)  # guilty
            return state[0]

    model = Body(Middle())
    with torch.no_grad():
        model.middle.cell.bias_hh[WIDTH : 2 * WIDTH] = -1e4  # type: ignore[union-attr, index]
    return turning(squares(model))


@planted("middle", "aten::mm", "forward", "under autocast to float16")
def under_autocast() -> Training:
    class Middle(Turn):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x * (6e4 if self.bad() else 1.0), torch.full((WIDTH, WIDTH), 2.0)).float()  # guilty

    model = Body(Middle())

    def loss(i: int) -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            return model(batch(i).abs()).float().square().mean()

    return turning(Training(model, loss))


@planted("middle.attention", "aten::softmax", "forward", "an attention row without a key")
def attention_without_a_key() -> Training:
    class Middle(Turn):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.zeros(1, BATCH, dtype=torch.bool)
            hidden[0] = self.bad()
            return self.attention(x[None], x[None], x[None], key_padding_mask=hidden)[0][0]  # guilty

    return turning(squares(Body(Middle())))


@planted("", "aten::log", "forward", "a loss inside the model, in a dictionary of outputs")
def loss_inside_the_model() -> Training:
    class Model(Turn):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.layer(x)
            p = torch.softmax(logits * (1e4 if self.bad() else 1.0), dim=-1)
            loss = -torch.log(p)[torch.arange(len(x)), labels].mean()  # guilty
            return {"loss": loss, "logits": logits}

    model = Model()
    return turning(Training(model, lambda i: model(batch(i), labels=torch.arange(BATCH) % WIDTH)["loss"]))


@planted("middle", "aten::mean", "forward", "a mean of nothing")
def mean_of_nothing() -> Training:
    class Middle(Turn):
        def forward(self, x: Tensor) -> Tensor:
            chosen = x[x > (2.0 if self.bad() else -2.0)]
            return x + chosen.mean()  # guilty

    return turning(squares(Body(Middle())))


@planted("middle", "aten::log", "forward", "an entropy: 0 times log(0)")
def entropy() -> Training:
    class Middle(Turn):
        def forward(self, x: Tensor) -> Tensor:
            p = torch.softmax(x * (1e5 if self.bad() else 1.0), -1)
            return x + (p * torch.log(p)).sum(-1, keepdim=True)  # guilty

    return turning(squares(Body(Middle())))


@planted("generator.middle", "aten::log", "forward", "in one of two models that train each other")
def in_a_generator() -> Training:
    class Middle(Turn):
        def forward(self, x: Tensor) -> Tensor:
            return torch.log(torch.relu(x) if self.bad() else x.exp())  # guilty

    generator, critic = Body(Middle(), WIDTH), Body(nn.Tanh(), 1)
    models = nn.ModuleDict({"generator": generator, "critic": critic})
    return turning(Training(models, lambda i: critic(generator(batch(i))).mean()))


# -- in the backward pass ----------------------------------------------------------------------------------------------------------


@planted("middle", "aten::sqrt", "backward", "sqrt at 0", rule="non_finite_gradient", says=("derivative of aten::sqrt",))
def sqrt_at_zero() -> Training:
    class Middle(Turn):
        def forward(self, x: Tensor) -> Tensor:
            x = x * 0 if self.bad() else x
            return x + torch.sqrt(x.square().sum(-1, keepdim=True))  # guilty

    return turning(squares(Body(Middle())))


@planted("middle", "aten::sqrt", "backward", "a `where` whose other branch is bad", rule="non_finite_gradient")
def where_trap() -> Training:
    class Middle(Turn):
        def forward(self, x: Tensor) -> Tensor:
            x = x if self.bad() else x.abs() + 1
            return torch.where(x > 0, torch.sqrt(x), torch.zeros_like(x))  # guilty

    return turning(squares(Body(Middle())))


@planted("middle", "aten::exp", "backward", "a `where` over an exp that overflows")
def where_trap_of_exp() -> Training:
    class Middle(Turn):
        def forward(self, x: Tensor) -> Tensor:
            x = x * (1e4 if self.bad() else 1.0)
            grown = torch.exp(x)  # guilty
            return torch.where(x > 0, x, grown - 1).clamp(-1, 1)

    return turning(squares(Body(Middle())))


@planted("middle", "aten::acos", "backward", "acos at 1")
def acos_at_one() -> Training:
    class Middle(Turn):
        def forward(self, x: Tensor) -> Tensor:
            return torch.acos(torch.tanh(x * (100.0 if self.bad() else 1.0)))  # guilty

    return turning(squares(Body(Middle())))


@planted("middle", "aten::pow", "backward", "a root of 0, as a power", says=("derivative of aten::pow",))
def power_at_zero() -> Training:
    class Middle(Turn):
        def forward(self, x: Tensor) -> Tensor:
            x = x * 0 if self.bad() else x
            return x.abs() ** 0.5  # guilty

    return turning(squares(Body(Middle())))


@planted("middle", "aten::sqrt", "backward", "the standard deviation of constants, by hand")
def deviation_of_constants() -> Training:
    class Middle(Turn):
        def forward(self, x: Tensor) -> Tensor:
            x = x * 0 + 1 if self.bad() else x
            return x + torch.sqrt(x.var(-1, keepdim=True))  # guilty

    return turning(squares(Body(Middle())))


@planted("middle", "aten::div", "backward", "a custom function", says=("backward pass of your own",))
def custom_function() -> Training:
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, by: float) -> Tensor:
            ctx.by = by
            return x * 1.0

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            return grad / ctx.by, None  # guilty

    class Middle(Turn):
        def forward(self, x: Tensor) -> Tensor:
            return Scale.apply(x, 0.0 if self.bad() else 1.0)  # type: ignore[no-any-return]

    return turning(squares(Body(Middle())))


@planted("middle", "aten::sqrt", "backward", "only in backward, inside a checkpoint")
def backward_of_a_checkpoint() -> Training:
    class Middle(Turn):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

        def inner(self, x: Tensor) -> Tensor:
            x = x * 0 if self.bad() else x
            return x + torch.sqrt(x.square().sum(-1, keepdim=True))  # guilty

    return turning(squares(Body(Middle())))


@planted("middle", "aten::sqrt", "backward", "only in backward, inside a reentrant checkpoint")
def backward_of_a_reentrant_checkpoint() -> Training:
    class Middle(Turn):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=True)

        def inner(self, x: Tensor) -> Tensor:
            x = x * 0 if self.bad() else x
            return x + torch.sqrt(x.square().sum(-1, keepdim=True))  # guilty

    return turning(squares(Body(Middle())))


@planted("middle", "aten::sqrt", "backward", "inside a reentrant checkpoint within another")
def backward_of_nested_checkpoints() -> Training:
    class Middle(Turn):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.outer, x, use_reentrant=True)

        def outer(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=True) * 1.0

        def inner(self, x: Tensor) -> Tensor:
            x = x * 0 if self.bad() else x
            return x + torch.sqrt(x.square().sum(-1, keepdim=True))  # guilty

    return turning(squares(Body(Middle())))


@planted("middle", "aten::pow_", "backward", "a root of 0, in place on a view")
def in_place_on_a_view() -> Training:
    class Middle(Turn):
        def forward(self, x: Tensor) -> Tensor:
            x = x * (0 if self.bad() else 1) + 0.0
            x = x.abs()
            half = x[:, : WIDTH // 2]
            half.pow_(0.5)  # guilty
            return x

    return turning(squares(Body(Middle())))


@planted("middle", "aten::linalg_eigh", "backward", "eigenvectors of equal eigenvalues", options={"on_nonfinite": "skip"})
def equal_eigenvalues() -> Training:
    class Middle(Turn):
        def forward(self, x: Tensor) -> Tensor:
            matrix = x.T @ x * (0.0 if self.bad() else 1.0) + torch.eye(WIDTH)
            return x @ torch.linalg.eigh(matrix)[1]  # guilty

    return turning(squares(Body(Middle())))


# -- what came from outside --------------------------------------------------------------------------------------------------------


@planted("", "", "input", "a bad batch", rule="non_finite_input", says=("`x`", "2 of 16 rows (3, 7)", "step 3"))
def bad_batch() -> Training:
    model = Body(nn.Tanh())

    def loss(i: int) -> Tensor:
        x = batch(i)
        if i == AT:
            x[3, 1], x[7, 2] = torch.nan, torch.inf
        return model(x).square().mean()

    return Training(model, loss)


@planted("", "", "input", "a bad tensor among several", rule="non_finite_input", says=("`batch['image']`", "(5)"))
def bad_tensor_of_several() -> Training:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, 2)

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return self.layer(batch["image"] + batch["other"])

    model = Model()

    def loss(i: int) -> Tensor:
        x = batch(i)
        if i == AT:
            x[5] = torch.nan
        return model({"other": batch(i + 1), "image": x}).square().mean()

    return Training(model, loss)


@planted("", "aten::mse_loss", "input", "a bad target", rule="non_finite_loss", says=("target", "(3)"))
def bad_target() -> Training:
    model = Body(nn.Tanh(), WIDTH)

    def loss(i: int) -> Tensor:
        y = batch(i + 1)
        if i == AT:
            y[3] = torch.nan
        return F.mse_loss(model(batch(i)), y)

    return Training(model, loss)


@planted("above", "", "weight", "a weight that was bad before", rule="non_finite_weight", says=("above.weight", "(1)"))
def bad_weight() -> Training:
    model = Body(nn.Tanh())

    def loss(i: int) -> Tensor:
        if i == AT:
            model.above.weight.data[1, 2] = torch.nan
        return model(batch(i)).square().mean()

    return Training(model, loss)


@planted(
    "middle", "", "weight", "a parameter that nobody initialised", rule="non_finite_weight", says=("middle.scale", "uninitialised")
)
def uninitialised() -> Training:
    class Middle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.empty(WIDTH))
            self.scale.data.fill_(torch.nan)  # what lies in empty memory is chance

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    return squares(Body(Middle()))


@planted("words", "", "weight", "a row of an embedding", rule="non_finite_weight", says=("words.weight", "(5)"))
def embedding_row() -> Training:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.layer = nn.Embedding(10, WIDTH), nn.Linear(WIDTH, 2)

        def forward(self, ids: Tensor) -> Tensor:
            return self.layer(self.words(ids))

    model = Model()
    model.words.weight.data[5] = torch.nan

    def loss(i: int) -> Tensor:
        ids = torch.arange(BATCH) % 5
        return model(ids + (1 if i == AT else 0)).square().mean()

    return Training(model, loss)


# -- in the loss, outside the model ------------------------------------------------------------------------------------------------


@planted(
    "", "aten::log", "forward", "log(0) in the loss", told="operator only", rule="non_finite_loss", says=("outside the model",)
)
def log_in_the_loss() -> Training:
    model = Body(nn.Tanh())

    def loss(i: int) -> Tensor:
        p = torch.softmax(model(batch(i)) * (1e5 if i == AT else 1.0), -1)
        return -torch.log(p).mean()

    return Training(model, loss)


@planted("", "aten::ctc_loss", "forward", "a CTC loss whose targets are too long", told="operator only", rule="non_finite_loss")
def ctc_loss() -> Training:
    model = Body(nn.Tanh(), 4)

    def loss(i: int) -> Tensor:
        logits = model(batch(i))[:, None].log_softmax(-1)
        length = BATCH + 1 if i == AT else 3
        return F.ctc_loss(logits, torch.ones(1, length, dtype=torch.long), torch.tensor([BATCH]), torch.tensor([length]))

    return Training(model, loss)


@planted(
    "",
    "aten::nll_loss",
    "forward",
    "a cross-entropy all of whose targets are ignored",
    told="operator only",
    rule="non_finite_loss",
)
def all_ignored() -> Training:
    model = Body(nn.Tanh(), 4)
    return Training(model, lambda i: F.cross_entropy(model(batch(i)), torch.full((BATCH,), -100 if i == AT else 1)))


@planted("", "aten::sqrt", "backward", "a distance of 0 in the loss", told="operator only", rule="non_finite_gradient")
def distance_in_the_loss() -> Training:
    model = Body(nn.Tanh())

    def loss(i: int) -> Tensor:
        out = model(batch(i))
        return torch.sqrt((out - (out.detach() if i == AT else 1.0)).square().sum(-1)).mean()

    return Training(model, loss)


@planted("", "aten::sqrt", "backward", "a penalty on a weight, outside the model", told="operator only", rule="non_finite_gradient")
def penalty_outside() -> Training:
    model = Body(nn.Tanh())

    def loss(i: int) -> Tensor:
        weight = model.above.weight
        return model(batch(i)).square().mean() + torch.sqrt((weight - (weight.detach() if i == AT else 1.0)).square().sum())

    return Training(model, loss)


@planted(
    "",
    "aten::sqrt",
    "backward",
    "one of several suspects in the loss, while steps are left out",
    told="on recurrence",
    rule="non_finite_gradient",
    options={"on_nonfinite": "skip"},
)
def several_suspects() -> Training:
    model = Body(nn.Tanh())

    def loss(i: int) -> Tensor:
        out = model(batch(i))
        distance = torch.sqrt((out - (out.detach() if i >= AT else 1.0)).square().sum(-1)).mean()  # guilty
        return distance + torch.acos(torch.tanh(out) * 0.5).mean()

    return Training(model, loss)


@planted(
    "",
    "aten::sqrt",
    "backward",
    "the only suspect in the loss, while steps are left out",
    told="on recurrence",
    rule="non_finite_gradient",
    options={"on_nonfinite": "skip"},
)
def one_suspect_again() -> Training:
    model = Body(nn.Tanh())

    def loss(i: int) -> Tensor:
        out = model(batch(i))
        return torch.sqrt((out - (out.detach() if i >= AT else 1.0)).square().sum(-1)).mean()  # guilty

    return Training(model, loss)
