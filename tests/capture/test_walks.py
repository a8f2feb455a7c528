"""The facts of a whole run: what its loss is and what is normalised twice, which rows stay equal, which weights stay bit for bit."""

from __future__ import annotations

import gc
import math
import pickle
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, Optimizer
from torch.utils.checkpoint import checkpoint

from gradwatch import GradState, GradWatch, History, Sampling
from gradwatch.capture import parameters, private
from gradwatch.capture.parameters import ParameterTable
from gradwatch.capture.walks import CRITERIA, LOOKS, Walks
from gradwatch.facts import SYMMETRY_AFTER, Meta
from tests.test_counts import DURING, Operators

LN4 = math.log(4)


def network(*more: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), *more)


def batch(i: int, n: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, classes, and targets of a regression."""
    generator = torch.Generator().manual_seed(i)
    x = torch.randn(n, 6, generator=generator)
    return x, torch.randint(4, (n,), generator=generator), torch.randn(n, 4, generator=generator).exp()


Loss = Callable[[nn.Module, int], Tensor]


def cross_entropy(model: nn.Module, i: int) -> Tensor:
    x, classes, _ = batch(i)
    return F.cross_entropy(model(x), classes)


def squared(model: nn.Module, i: int) -> Tensor:
    x, _, y = batch(i)
    return F.mse_loss(model(x), y)


def train(model: nn.Module, loss: Loss, updates: int = CRITERIA, optimizer: Optimizer | None = None, **options: Any) -> GradWatch:
    optimizer = SGD(model.parameters(), lr=0.01) if optimizer is None else optimizer
    with GradWatch(model, console=False, rules=(), **options) as watch:
        for i in range(updates):
            optimizer.zero_grad()
            loss(model, i).backward()
            optimizer.step()
    assert watch.notices == ()
    return watch


def facts(watch: GradWatch) -> tuple[str, float, bool]:
    meta = watch.history.meta
    return meta.criterion, meta.guess, meta.broadcast


# -- the criterion -----------------------------------------------------------------------------------------------------------------


def test_the_criterion_is_settled_by_the_first_backward_passes() -> None:
    assert facts(train(network(), squared, CRITERIA - 1)) == ("", 0.0, False)
    guesses = [float(batch(i)[2].double().var(0, correction=0).mean()) for i in range(CRITERIA)]
    expected = pytest.approx(sum(guesses) / CRITERIA)
    assert facts(train(network(), squared, CRITERIA)) == ("mse_loss", expected, False)
    assert facts(train(network(), squared, CRITERIA + 12)) == ("mse_loss", expected, False)


@pytest.mark.parametrize("at", [0, CRITERIA - 1])
@pytest.mark.parametrize(
    "other",
    [
        cross_entropy,
        lambda model, i: squared(model, i) + 1e-3 * model[0].weight.square().sum(),
        lambda model, i: F.mse_loss(model(batch(i)[0])[:, :1], batch(i)[2][:, :2].mean(1)),
        lambda model, i: squared(model, i) * -1.0,
    ],
    ids=["another-criterion", "a-penalty", "broadcast", "negative"],
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_a_loss_that_is_not_the_same_in_all_is_not_known(other: Loss, at: int) -> None:
    def loss(model: nn.Module, i: int) -> Tensor:
        return other(model, i) if i == at else squared(model, i)

    assert facts(train(network(), loss, CRITERIA + 4)) == ("", 0.0, False)
    assert facts(train(network(), lambda model, i: other(model, i) if i == CRITERIA else squared(model, i), CRITERIA + 4))[0] != ""


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_a_broadcast_is_known_without_a_guess() -> None:
    watch = train(network(nn.Linear(4, 1)), lambda model, i: F.mse_loss(model(batch(i)[0]), batch(i)[2][:, 0]))
    assert facts(watch) == ("mse_loss", 0.0, True)


def test_of_a_mean_without_finite_targets_no_guess_is_known() -> None:
    def loss(model: nn.Module, i: int) -> Tensor:
        x, _, y = batch(i)
        return F.mse_loss(model(x), y * math.nan if i == 3 else y)

    assert facts(train(network(), loss)) == ("mse_loss", 0.0, False)


@pytest.mark.parametrize("terms", [1, 2, 4])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaler"])
def test_the_guess_of_each_backward_times_their_number_is_the_record_s(terms: int, scaled: bool) -> None:
    model, scaler = network(), torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
    optimizer = SGD(model.parameters(), lr=0.01)
    with GradWatch(model, console=False, rules=()) as watch:
        for i in range(CRITERIA):
            optimizer.zero_grad()
            for k in range(terms):
                scaler.scale(cross_entropy(model, terms * i + k) / terms).backward()
            scaler.step(optimizer)
            scaler.update()
    assert facts(watch) == ("cross_entropy", pytest.approx(LN4 / terms), False)
    (count,) = set(watch.history.stat("loss_terms").tolist())
    assert watch.history.meta.guess * count == pytest.approx(LN4)
    assert np.isfinite(watch.history.stat("loss")).all()
    assert watch.history.stat("loss").mean() == pytest.approx(LN4, rel=0.3)


def test_losses_that_are_scaled_in_one_call_are_those_of_one_scale() -> None:
    model, scaler = network(), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = SGD(model.parameters(), lr=0.01)
    with GradWatch(model, console=False, rules=()) as watch:
        for i in range(CRITERIA):
            optimizer.zero_grad()
            for loss in scaler.scale([cross_entropy(model, i), cross_entropy(model, i + 100)]):  # type: ignore[attr-defined]
                loss.backward()
            scaler.step(optimizer)
            scaler.update()
    assert facts(watch) == ("cross_entropy", pytest.approx(LN4), False)


def test_a_scale_by_hand_is_taken_off_once_it_is_known() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    with GradWatch(model, console=False, rules=()) as watch:
        for i in range(CRITERIA + 3):
            optimizer.zero_grad()
            (cross_entropy(model, i) * 256.0).backward()
            for p in model.parameters():
                p.grad /= 256.0
            optimizer.step()
    assert watch.history.stat("loss_scale")[-1] == 256.0
    recorder = watch._recorder
    assert recorder is None
    seen = watch.history.meta.guess
    assert seen == pytest.approx(LN4 * (3 * 256 + 5) / 8), "three updates tell that there is one, and their rows stay as they are"


def closure_loop(model: nn.Module, watch: GradWatch) -> None:
    optimizer = LBFGS(model.parameters(), max_iter=4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model, 0)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)  # type: ignore[arg-type]


def autocast_loop(model: nn.Module, watch: GradWatch) -> None:
    def loss(model: nn.Module, i: int) -> Tensor:
        x, classes, _ = batch(i)
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(x), classes)

    loop(model, loss)


def loop(model: nn.Module, loss: Loss, backward: Callable[[Tensor], None] = Tensor.backward) -> None:
    optimizer = SGD(model.parameters(), lr=0.01)
    for i in range(CRITERIA):
        optimizer.zero_grad()
        backward(loss(model, i))
        optimizer.step()


def twice(loss: Tensor) -> None:
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    loss.backward()  # type: ignore[no-untyped-call]


def second_order(loss: Tensor) -> None:
    loss.backward(create_graph=True)  # type: ignore[no-untyped-call]


LOOPS: dict[str, Callable[[nn.Module, GradWatch], None]] = {
    "closures": closure_loop,
    "autocast": autocast_loop,
    "retain-graph": lambda model, watch: loop(model, cross_entropy, twice),
    "adam": lambda model, watch: loop(model, lambda m, i: nn.CrossEntropyLoss()(m(batch(i)[0]), batch(i)[1])),
    "checkpointed-model": lambda model, watch: loop(
        model,
        lambda m, i: F.cross_entropy(checkpoint(m, batch(i)[0], use_reentrant=False), batch(i)[1]),  # type: ignore[arg-type]
    ),
    "several-records-in-one-graph": lambda model, watch: loop(
        model, lambda m, i: F.cross_entropy(torch.cat([m(batch(i)[0]), m(batch(-i)[0])]), torch.cat([batch(i)[1], batch(-i)[1]]))
    ),
}


@pytest.mark.parametrize("run", LOOPS.values(), ids=LOOPS)
def test_any_loop_s_criterion_is_known(run: Callable[[nn.Module, GradWatch], None]) -> None:
    model = network()
    with GradWatch(model, console=False, rules=()) as watch:
        run(model, watch)
    assert facts(watch) == ("cross_entropy", pytest.approx(LN4), False)
    assert watch.notices == ()


@pytest.mark.filterwarnings("ignore:Using backward")
def test_a_graph_of_the_gradients_is_looked_at_like_any_other() -> None:
    model = network()
    with GradWatch(model, console=False, rules=()) as watch:
        loop(model, cross_entropy, second_order)
    assert facts(watch) == ("cross_entropy", pytest.approx(LN4), False)
    model.zero_grad()


def test_a_backward_through_a_graph_that_was_freed_fails_by_itself_and_the_watch_goes_on() -> None:
    model = network()
    with GradWatch(model, console=False, rules=()) as watch:
        for make in (squared, cross_entropy, lambda m, i: ((m(batch(i)[0]) - batch(i)[2]) ** torch.tensor(2.0)).mean()):
            loss = make(model, 0)
            loss.backward()
            with pytest.raises(RuntimeError, match="second time"):
                loss.backward()
    assert watch.notices == ()


def test_a_loss_in_a_checkpoint_is_computed_as_often_as_without_the_watch() -> None:
    calls = []
    for watched in (False, True):
        count: list[int] = []

        def loss(model: nn.Module, i: int, count: list[int] = count) -> Tensor:
            def run(x: Tensor) -> Tensor:
                count.append(i)
                return F.mse_loss(model(x), batch(i)[2]) * torch.tensor(0.5)

            result = checkpoint(run, batch(i)[0].requires_grad_(), use_reentrant=False)
            assert isinstance(result, Tensor)
            return result

        model = network()
        if watched:
            assert facts(train(model, loss, CRITERIA + 2)) == ("", 0.0, False), "its factor is not known"
        else:
            loop(model, loss)
            loop(model, lambda m, i: loss(m, i) if i < 2 else cross_entropy(m, i))
        calls.append(count)
    assert len(calls[0]) == len(calls[1])


def test_nothing_is_read_where_saved_tensors_are_packed() -> None:
    unpacked: list[int] = []

    def unpack(tensor: Tensor) -> Tensor:
        unpacked.append(1)
        return tensor

    counts = []
    for watched in (False, True):
        unpacked.clear()
        model = network()
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
            if watched:
                assert facts(train(model, squared)) == ("", 0.0, False)
            else:
                loop(model, squared)
        counts.append(len(unpacked))
    assert counts[0] == counts[1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("inside", [False, True], ids=["loss-outside", "loss-inside"])
def test_a_compiled_model_s_loss_is_known_where_it_is_not_compiled(inside: bool) -> None:
    torch._dynamo.reset()
    model = network()
    run: Callable[..., Tensor] = torch.compile(
        (lambda x, c: F.cross_entropy(model(x), c)) if inside else model, backend="aot_eager"
    )
    with GradWatch(model, console=False, rules=()) as watch:
        loop(model, lambda _, i: run(*batch(i)[:2]) if inside else F.cross_entropy(run(batch(i)[0]), batch(i)[1]))
    assert facts(watch) == (("", 0.0, False) if inside else ("cross_entropy", pytest.approx(LN4), False))
    assert not [notice for notice in watch.notices if "failed" in notice]


@dataclass
class Output:
    """What a model returns."""

    logits: Tensor
    more: dict[str, Tensor]


class Nested(nn.Module):
    """A model whose output is no tensor."""

    def __init__(self, soft: bool) -> None:
        super().__init__()
        self.body = network()
        self.soft = soft

    def forward(self, x: Tensor) -> Output:
        y = self.body(x)
        return Output(y.softmax(-1) if self.soft else y, {"hidden": y * 2})


@pytest.mark.parametrize("soft", [False, True])
def test_outputs_of_a_nested_type(soft: bool) -> None:
    watch = train(Nested(soft), lambda model, i: nn.CrossEntropyLoss()(model(batch(i)[0]).logits, batch(i)[1]))
    assert facts(watch) == ("cross_entropy", pytest.approx(LN4), False)
    assert (watch.history.meta.squashed, watch.history.meta.squashed_by) == (("softmax", "") if soft else ("", ""))


def test_two_models_are_one_run() -> None:
    models = nn.ModuleDict({"a": network(), "b": network()})
    optimizers = [SGD(model.parameters(), lr=0.01) for model in models.values()]
    with GradWatch(dict(models.items()), console=False, rules=()) as watch:
        for i in range(CRITERIA):
            for k, (model, optimizer) in enumerate(zip(models.values(), optimizers, strict=True)):
                optimizer.zero_grad()
                (cross_entropy(model, i) * (1 + k)).backward()
                optimizer.step()
    assert facts(watch) == ("cross_entropy", pytest.approx(LN4 * 1.5), False)


def test_a_model_that_is_not_watched_has_no_part_in_it() -> None:
    model, other = network(), network()
    optimizers = [SGD(m.parameters(), lr=0.01) for m in (model, other)]
    with GradWatch(model, console=False, rules=()) as watch:
        for i in range(CRITERIA):
            for m, optimizer, loss in zip((other, model), optimizers[::-1], (squared, cross_entropy), strict=True):
                optimizer.zero_grad()
                loss(m, i).backward()
                optimizer.step()
    assert facts(watch) == ("cross_entropy", pytest.approx(LN4), False)


def test_losses_of_other_models_are_not_looked_at_for_ever() -> None:
    walks = Walks(ParameterTable({"": network()}))
    loss, looks = cross_entropy(network(), 0), 0
    while walks.looks_at_loss:
        walks.see_loss([loss], 1.0)
        looks += 1
    assert looks == LOOKS
    assert walks.criterion is None


def test_a_step_inside_the_backward_leaves_nothing_reached_and_counts_all_the_same() -> None:
    model = network()
    optimizers = {p: SGD([p], lr=0.01) for p in model.parameters()}

    def step(p: Tensor) -> None:
        optimizers[p].step()  # type: ignore[index]
        optimizers[p].zero_grad()  # type: ignore[index]

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    with GradWatch(model, console=False, rules=()) as watch:
        for i in range(CRITERIA + 1):
            cross_entropy(model, i).backward()
    assert facts(watch) == ("cross_entropy", pytest.approx(LN4), False)


def test_on_a_device_forward_and_backward_ask_for_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    losses: dict[str, Loss] = {
        "cross": cross_entropy,
        "squared": squared,
        "by-hand": lambda m, i: ((m(batch(i)[0]) - batch(i)[2]) ** 2).mean(),
        "huber": lambda m, i: F.huber_loss(m(batch(i)[0]), batch(i)[2]),
        "binary": lambda m, i: F.binary_cross_entropy_with_logits(m(batch(i)[0]), (batch(i)[2] > 1).float()),
        "twice": lambda m, i: F.cross_entropy(m(batch(i)[0]).softmax(-1), batch(i)[1]),
    }
    monkeypatch.setattr(parameters, "HOST", "nowhere")
    for name, loss in losses.items():
        counts = []
        for watched in (False, True):
            model = network()
            nn.init.constant_(model[0].weight, 0.1)
            optimizer = SGD(model.parameters(), lr=0.0)
            watch = GradWatch(model, console=False, rules=())
            if watched:
                watch.attach()
            with Operators() as operators:
                for i in range(CRITERIA + 4):
                    optimizer.zero_grad()
                    operators.phase = "forward"
                    value = loss(model, i)
                    operators.phase = "backward"
                    value.backward()
                    operators.phase = "step"
                    optimizer.step()
                    operators.phase = ""
            watch.detach()
            counts.append(operators)
        for phase in ("forward", DURING, "backward, returned"):
            assert counts[1].synchronisations(phase) == counts[0].synchronisations(phase), (name, phase)
        assert facts(watch)[0] != ""
        assert facts(watch)[1] == (pytest.approx(LN4) if name in ("cross", "twice") else 0.0)


# -- what is normalised twice ------------------------------------------------------------------------------------------------------


class Soft(nn.Module):
    """A head that ends in a softmax of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(self.linear(x), -1)


class Steps(nn.Module):
    """A softmax at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = network(), nn.Softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.head(self.body(x * k)) for k in range(3)], 1).transpose(1, 2)


class Root(nn.Module):
    """The root applies it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(self.body(x), -1)


def of_steps(model: nn.Module, i: int) -> Tensor:
    x, classes, _ = batch(i)
    return F.cross_entropy(model(x), classes[:, None].expand(-1, 3))


def in_the_loss(model: nn.Module, i: int) -> Tensor:
    x, classes, _ = batch(i)
    return F.cross_entropy(model(x).softmax(-1), classes)


def logistic(model: nn.Module, i: int) -> Tensor:
    x, _, y = batch(i)
    return F.binary_cross_entropy_with_logits(model(x), (y > 1).float())


PLACES: dict[str, tuple[Callable[[], nn.Module], Loss, tuple[str, str]]] = {
    "module": (lambda: network(nn.Softmax(-1)), cross_entropy, ("softmax", "3")),
    "followed-by-views": (lambda: network(nn.Softmax(-1), nn.Flatten()), cross_entropy, ("softmax", "3")),
    "function-in-a-submodule": (lambda: network(Soft()), cross_entropy, ("softmax", "3")),
    "function-in-the-root": (Root, cross_entropy, ("softmax", "")),
    "in-the-loss": (network, in_the_loss, ("softmax", "")),
    "of-steps": (Steps, of_steps, ("softmax", "head")),
    "nested": (lambda: nn.Sequential(nn.Sequential(network(nn.Sequential(nn.Softmax(-1))))), cross_entropy, ("softmax", "0.0.3.0")),
    "sigmoid": (lambda: network(nn.Sigmoid()), logistic, ("sigmoid", "3")),
    "none": (network, cross_entropy, ("", "")),
    "log-softmax": (lambda: network(nn.LogSoftmax(-1)), cross_entropy, ("", "")),
}


@pytest.mark.parametrize(("make", "loss", "expected"), PLACES.values(), ids=PLACES)
def test_the_innermost_module_that_normalises_first_is_named(
    make: Callable[[], nn.Module], loss: Loss, expected: tuple[str, str]
) -> None:
    for updates in (1, 3):
        meta = train(make(), loss, updates).history.meta
        assert (meta.squashed, meta.squashed_by) == expected


def test_with_a_mapping_names_begin_with_the_key() -> None:
    for make, name in ((lambda: network(nn.Softmax(-1)), "b.3"), (Root, "b")):
        models: Mapping[str, nn.Module] = {"a": network(), "b": make()}  # type: ignore[operator]
        optimizer = SGD([p for model in models.values() for p in model.parameters()], lr=0.1)
        with GradWatch(models, console=False, rules=()) as watch:
            for i in range(2):
                optimizer.zero_grad()
                x, classes, _ = batch(i)
                (F.cross_entropy(models["a"](x), classes) + F.cross_entropy(models["b"](x), classes)).backward()
                optimizer.step()
        assert (watch.history.meta.squashed, watch.history.meta.squashed_by) == ("softmax", name)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"include": ("3",)}, "3"),
        ({"include": ("0",)}, ""),
        ({"exclude": ("3",)}, ""),
        ({"exclude": ("0",)}, "3"),
        ({"dense": 0, "every": 1000}, "3"),
    ],
    ids=str,
)
def test_it_is_seen_whatever_is_sampled_and_named_where_it_is_looked_at(options: dict[str, Any], name: str) -> None:
    meta = train(network(nn.Softmax(-1)), cross_entropy, 2, sampling=Sampling(**options)).history.meta
    assert (meta.squashed, meta.squashed_by) == ("softmax", name)


def test_it_is_seen_in_a_graph_that_comes_later() -> None:
    models = {"a": network(), "b": network(nn.Softmax(-1))}
    optimizers = {key: SGD(model.parameters(), lr=0.1) for key, model in models.items()}
    with GradWatch(models, console=False, rules=()) as watch:
        for i in range(4):
            key = "ab"[i % 2]
            assert watch.history.meta.squashed == ("softmax" if i > 1 else "")
            optimizers[key].zero_grad()
            cross_entropy(models[key], i).backward()
            optimizers[key].step()
    assert watch.history.meta.squashed_by == "b.3"


def test_the_first_that_is_seen_stays() -> None:
    models = {"a": network(nn.Softmax(-1)), "b": network(nn.Sigmoid())}
    optimizers = {key: SGD(model.parameters(), lr=0.1) for key, model in models.items()}
    with GradWatch(models, console=False, rules=()) as watch:
        for i in range(4):
            for key, loss in (("a", cross_entropy), ("b", logistic)):
                optimizers[key].zero_grad()
                loss(models[key], i).backward()
                optimizers[key].step()
    assert (watch.history.meta.squashed, watch.history.meta.squashed_by) == ("softmax", "a.3")


def test_without_sequence_numbers_no_module_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "sequence_number", lambda node: -1)
    model = network(nn.Softmax(-1))
    with GradWatch(model, console=False, rules=()) as watch:
        cross_entropy(model, 0).backward()
        SGD(model.parameters(), lr=0.1).step()
    assert (watch.history.meta.squashed, watch.history.meta.squashed_by) == ("softmax", "")


def test_walks_keep_no_graph() -> None:
    model = network(nn.Softmax(-1))
    walks = Walks(ParameterTable({"": model}))
    loss = cross_entropy(model, 0)
    kept = weakref.ref(loss)
    for i in range(CRITERIA):
        walks.see_loss([loss], 1.0)
        assert walks.count_loss() is (i in (0, CRITERIA - 1))
    walks.take(range(len(list(model.parameters()))), [loss], lambda nodes: "somewhere")
    assert walks.squashed == ("softmax", "somewhere", 0)
    assert walks.criterion is not None
    assert not walks.looks_at_loss
    del loss
    gc.collect()
    assert kept() is None


# -- rows that stay equal ----------------------------------------------------------------------------------------------------------


def still(watch: GradWatch) -> set[str]:
    return {fact.name for fact in watch.history.meta.parameters if fact.still_equal}


def constant(model: nn.Module, value: float = 0.1, *names: str) -> nn.Module:
    for name, p in model.named_parameters():
        if not names or name in names:
            nn.init.constant_(p, value)
    return model


def test_rows_that_were_equal_are_looked_at_again_after_a_few_records() -> None:
    for updates, expected in ((SYMMETRY_AFTER - 1, set()), (SYMMETRY_AFTER, {"0.weight"}), (SYMMETRY_AFTER + 5, {"0.weight"})):
        # All rows of the last are equal too, but their classes differ.
        assert still(train(constant(network()), cross_entropy, updates)) == expected
    assert still(train(network(), cross_entropy, 12)) == set()


CASES: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "zeros": (lambda: constant(network(), 0.0), {"0.weight", "2.weight"}),  # through zeros comes no gradient
    "one-layer": (lambda: constant(network(), 0.3, "0.weight"), set()),
    "broken-by-dropout": (lambda: constant(nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 4))), set()),
    "frozen": (lambda: _frozen(constant(network())), set()),
    "one-unit": (lambda: constant(nn.Sequential(nn.Linear(6, 1), nn.Linear(1, 4))), set()),
    "convolution": (
        lambda: constant(nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))),
        {"1.weight"},
    ),
    "bf16": (
        lambda: constant(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4, dtype=torch.bfloat16)).to(torch.float32)),
        {"0.weight"},
    ),
}


def _frozen(model: nn.Module) -> nn.Module:
    next(model.parameters()).requires_grad_(False)
    return model


@pytest.mark.parametrize(("make", "expected"), CASES.values(), ids=CASES)
def test_which_rows_stay_equal(make: Callable[[], nn.Module], expected: set[str]) -> None:
    assert still(train(make(), cross_entropy, SYMMETRY_AFTER + 1)) == expected


def test_rows_of_a_table_that_are_used_differ() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 6), nn.Linear(6, 4))
    nn.init.constant_(model[0].weight, 0.5)
    watch = train(model, lambda m, i: F.cross_entropy(m(torch.arange(i, i + 8)), batch(i)[1]), SYMMETRY_AFTER)
    assert watch.history.meta.parameters[0].equal_rows
    assert still(watch) == set()


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_layers_are_looked_at_once_they_have_values() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(4))
    with GradWatch(model, console=False, rules=()) as watch:
        model(batch(0)[0])
        constant(model)
        optimizer = SGD(model.parameters(), lr=0.01)
        for i in range(SYMMETRY_AFTER + 1):
            optimizer.zero_grad()
            cross_entropy(model, i).backward()
            optimizer.step()
    assert still(watch) == {"0.weight"}
    assert watch.notices == ()


def test_a_layer_that_is_put_in_later_is_not_looked_at_again() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    with GradWatch(model, console=False, rules=()) as watch:
        for i in range(2 * SYMMETRY_AFTER):
            if i == SYMMETRY_AFTER:
                new = constant(nn.Linear(4, 4))
                model.append(new)
                optimizer.add_param_group({"params": list(new.parameters())})
            optimizer.zero_grad()
            cross_entropy(model, i).backward()
            optimizer.step()
    assert still(watch) == set()


# -- weights that stay bit for bit -------------------------------------------------------------------------------------------------


def wide() -> nn.Sequential:
    """One parameter that is sampled whole, and one that is not: 4,000 elements."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 500), nn.ReLU(), nn.Linear(500, 8), nn.ReLU(), nn.Linear(8, 4))


def same_in(watch: GradWatch, name: str) -> list[bool]:
    history = watch.history
    states = history.stat("grad_state")[:, history.parameters.index(name)]
    both = GradState.SAME | GradState.CHANGED
    assert not any(GradState(int(state)) & both == both for state in states), "it cannot be both"
    return [bool(int(state) & GradState.SAME) for state in states]


LARGE, SMALL = "2.weight", "4.weight"


@pytest.mark.parametrize("kind", [SGD, Adam], ids=["sgd", "adam"])
def test_a_learning_rate_of_zero_changes_nothing(kind: type[Optimizer]) -> None:
    model = wide()
    watch = train(model, cross_entropy, 6, kind(model.parameters(), lr=0.0))  # type: ignore[call-arg]
    assert same_in(watch, SMALL) == [True] * 6
    assert same_in(watch, LARGE) == [False, False, True, True, True, True]
    assert watch.history.baselines.same[watch.history.parameters.index(LARGE)] == 4
    assert watch.history.baselines.same[watch.history.parameters.index(SMALL)] == 6


def test_a_training_that_goes_well_has_none() -> None:
    watch = train(wide(), cross_entropy, 6)
    assert same_in(watch, SMALL) == same_in(watch, LARGE) == [False] * 6
    assert not watch.history.baselines.same.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("lr", "same"), [(1e-6, True), (0.5, False)])
def test_what_is_rounded_away_is_the_same(dtype: torch.dtype, lr: float, same: bool) -> None:
    model = wide().to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.where(p >= 0, p + 0.5, p - 0.5))  # nothing near zero, where every step shows

    def loss(m: nn.Module, i: int) -> Tensor:
        x, classes, _ = batch(i)
        return F.cross_entropy(m(x.to(dtype)).float() / 100, classes)

    watch = train(model, loss, 6, SGD(model.parameters(), lr=lr))
    assert any(same_in(watch, LARGE)) is same
    assert same_in(watch, SMALL)[-1] is same


@pytest.mark.parametrize("value", [0.0, math.nan], ids=["zeros", "nan"])
def test_zeros_can_be_the_same_and_what_is_not_a_number_cannot(value: float) -> None:
    model = constant(wide(), value)
    watch = train(model, cross_entropy, 6, SGD(model.parameters(), lr=0.0))
    for name in (SMALL, LARGE):
        assert same_in(watch, name)[-1] is (value == 0.0)


def test_what_is_not_reached_is_not_counted() -> None:
    model = wide()

    def loss(m: nn.Module, i: int) -> Tensor:
        return F.cross_entropy(m[0](batch(i)[0])[:, :4], batch(i)[1])  # type: ignore[index]

    watch = train(model, loss, 6)
    assert not any(same_in(watch, LARGE)), "nobody copies it"
    assert not watch.history.baselines.same.any()


def test_accumulation_compares_once_an_update() -> None:
    model = wide()
    optimizer = SGD(model.parameters(), lr=0.0)
    with GradWatch(model, console=False, rules=()) as watch:
        for i in range(5):
            optimizer.zero_grad()
            for k in range(3):
                (cross_entropy(model, 3 * i + k) / 3).backward()
            optimizer.step()
    assert same_in(watch, LARGE) == [False, False, True, True, True]


def test_steps_that_a_scaler_leaves_out_are_no_steps() -> None:
    model, scaler = wide(), torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    optimizer = SGD(model.parameters(), lr=0.0)
    with GradWatch(model, console=False, rules=()) as watch:
        for i in range(6):
            optimizer.zero_grad()
            (scaler.scale(cross_entropy(model, i)) * (math.inf if i == 3 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
    assert same_in(watch, SMALL) == [True, True, True, False, True, True]
    assert same_in(watch, LARGE) == [False, False, True, False, True, True]


def test_steps_that_the_watch_leaves_out_are_no_steps() -> None:
    model = wide()

    def loss(m: nn.Module, i: int) -> Tensor:
        return cross_entropy(m, i) * (math.nan if i == 3 else 1.0)

    watch = train(model, loss, 6, SGD(model.parameters(), lr=0.0), on_nonfinite="skip")
    assert same_in(watch, SMALL) == [True, True, True, False, True, True]
    assert same_in(watch, LARGE) == [False, False, True, False, True, True]


def test_updates_by_hand_are_compared_too() -> None:
    model = wide()
    with GradWatch(model, console=False, rules=()) as watch:
        for i in range(6):
            model.zero_grad()
            cross_entropy(model, i).backward()
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if name != LARGE:
                        p -= 0.1 * p.grad  # type: ignore[operator]
    assert watch.history.recorded == 6
    assert not any(same_in(watch, SMALL))
    assert same_in(watch, LARGE)[2:] == [True] * 4


def test_of_one_optimizer_s_two_steps_in_an_update_only_both_together_count() -> None:
    """An update closes when all owners have stepped; one of them may do so twice before."""
    model = wide()
    first = SGD([*model[0].parameters(), *model[2].parameters()], lr=0.0)
    second = SGD(model[4].parameters(), lr=0.0)
    with GradWatch(model, console=False, rules=()) as watch:
        for i in range(6):
            model.zero_grad()
            cross_entropy(model, i).backward()
            first.param_groups[0]["lr"] = 0.0
            first.step()
            first.param_groups[0]["lr"] = 0.1 if i == 4 else 0.0
            first.step()
            second.step()
    states = [GradState(int(s)) for s in watch.history.stat("grad_state")[:, watch.history.parameters.index("0.weight")]]
    changed = [i for i, state in enumerate(states) if GradState.CHANGED in state]
    assert all(GradState.SAME not in states[i] for i in changed)


def test_a_parameter_that_is_replaced_begins_anew() -> None:
    model = wide()
    optimizer = SGD(model.parameters(), lr=0.0)
    with GradWatch(model, console=False, rules=()) as watch:
        for i in range(8):
            if i == 4:
                model[2].weight = nn.Parameter(model[2].weight.detach().clone())
                optimizer.param_groups[0]["params"] = list(model.parameters())
            optimizer.zero_grad()
            cross_entropy(model, i).backward()
            optimizer.step()
    assert same_in(watch, LARGE) == [False, False, True, True, False, False, True, True]


def test_a_parameter_that_is_moved_between_updates_goes_on() -> None:
    model = wide()
    optimizer = SGD(model.parameters(), lr=0.0)
    with GradWatch(model, console=False, rules=()) as watch:
        for i in range(6):
            model[2].weight.data = model[2].weight.data.clone()
            optimizer.zero_grad()
            cross_entropy(model, i).backward()
            optimizer.step()
    assert same_in(watch, LARGE) == [False, False, True, True, True, True]


def test_a_table_whose_other_rows_move_is_never_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(3000, 6, sparse=True), nn.Linear(6, 4))
    rows = [i for i in range(3000) if not _is_sampled(18_000, range(6 * i, 6 * i + 6))]
    watch = train(model, lambda m, i: F.cross_entropy(m(torch.tensor(rows[8 * i : 8 * i + 8])), batch(i)[1]), 12)
    assert not any(same_in(watch, "0.weight"))
    changed = [bool(int(s) & GradState.CHANGED) for s in watch.history.stat("grad_state")[:, 0]]
    assert changed == [False, False, True] * 4, "found by comparing all of it, every time that it was suspicious"
    assert not watch.history.baselines.same.any()


def _is_sampled(n: int, elements: range) -> bool:
    apart = (n - 64) // 15
    apart = apart - 1 + apart % 2
    return any(k // apart < 16 and k % apart < 64 for k in elements)


@pytest.mark.parametrize("lr", [0.0, 0.05])
def test_training_stays_bit_for_bit_what_it_is(lr: float) -> None:
    found = []
    for watched in (False, True):
        model = wide()
        optimizer = Adam(model.parameters(), lr=lr)
        watch = GradWatch(model, console=False, rules=(), sampling=Sampling(dense=10**9))
        if watched:
            watch.attach()
        for i in range(12):
            optimizer.zero_grad()
            (cross_entropy(model, i) if i % 2 else squared(model, i)).backward()
            optimizer.step()
        watch.detach()
        found.append([p.detach().clone() for p in model.parameters()] + [torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_no_copy_is_kept_after_an_update_nor_after_one_that_is_given_up() -> None:
    model = wide()
    optimizer = SGD(model.parameters(), lr=0.0)
    with GradWatch(model, console=False, rules=()) as watch:
        for i in range(6):
            optimizer.zero_grad()
            cross_entropy(model, i).backward()
            assert watch._recorder is not None
            copies = [weakref.ref(copy) for copy in watch._recorder.weights._copies.values()]
            assert len(copies) == (2 if i > 1 else 0), "of the two that are not sampled whole"
            if i == 4:
                optimizer.zero_grad()
                cross_entropy(model, i).backward()
            optimizer.step()
            gc.collect()
            assert all(copy() is None for copy in copies)


# -- kept facts --------------------------------------------------------------------------------------------------------------------


def test_the_facts_outlive_saving_loading_and_replaying() -> None:
    model = constant(network(nn.Softmax(-1)), 0.1)
    optimizer = SGD(model.parameters(), lr=0.0)
    with GradWatch(model, console=False) as watch:
        for i in range(12):
            optimizer.zero_grad()
            cross_entropy(model, i).backward()
            optimizer.step()
        state = watch.state_dict()
    meta = watch.history.meta
    assert (meta.squashed, meta.squashed_by, meta.criterion) == ("softmax", "3", "cross_entropy")
    assert meta.guess == pytest.approx(LN4)
    assert meta.still_equal.tolist() == [True, False, True, False]
    assert meta.blank.tolist() == [False] * 4
    assert meta.owners == {"SGD#0"}
    for again in (
        pickle.loads(pickle.dumps(meta)),
        History.from_state_dict(watch.history.state_dict()).meta,
        History.from_state_dict(pickle.loads(pickle.dumps(watch.history.state_dict()))).meta,
        next(watch.history.replay()).meta,
    ):
        assert again == meta
        assert hash(again) == hash(meta)
    for change in ({"squashed": "sigmoid"}, {"squashed_by": ""}, {"criterion": "mse_loss"}, {"guess": 1.0}, {"broadcast": True}):
        assert replace(meta, **change) != meta  # type: ignore[arg-type]
    other = GradWatch(model, console=False)
    other.load_state_dict(state)
    assert other.history.meta == meta
    assert (other.history.stat("grad_state") == watch.history.stat("grad_state")).all()
    np.testing.assert_array_equal(other.history.baselines.same, watch.history.baselines.same)
    (same,) = {tuple(again.baselines.same.tolist()) for again in watch.history.replay() if again.ended}
    assert same == tuple(watch.history.baselines.same.tolist())
    assert max(same) >= 10


def test_a_run_that_goes_on_finds_its_facts_again() -> None:
    model = network(nn.Softmax(-1))
    watch = train(model, cross_entropy, CRITERIA)
    optimizer = SGD(model.parameters(), lr=0.01)
    with watch:
        for i in range(CRITERIA):
            optimizer.zero_grad()
            cross_entropy(model, i).backward()
            assert (watch.history.meta.squashed, watch.history.meta.squashed_by) == ("softmax", "3")
            optimizer.step()
    assert facts(watch) == ("cross_entropy", pytest.approx(LN4), False)


def test_facts_that_nobody_knows_are_empty() -> None:
    meta = Meta()
    assert (meta.squashed, meta.squashed_by, meta.criterion, meta.guess, meta.broadcast) == ("", "", "", 0.0, False)
    assert meta.owners == frozenset()
    assert meta.blank.tolist() == meta.still_equal.tolist() == []


def test_a_softmax_that_comes_later_is_found_in_one_of_the_next_looks() -> None:
    """Nobody walks the graph again by itself: its end is looked at now and then."""
    model, soft = network(), nn.Softmax(-1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with GradWatch(model, console=False) as watch:
        for i in range(30):
            optimizer.zero_grad()
            out = model(torch.randn(6, 6, generator=torch.Generator().manual_seed(i)))
            F.cross_entropy(soft(out) if i >= 11 else out, torch.arange(6) % 4).backward()
            optimizer.step()
    meta = watch.history.meta
    assert (meta.squashed, meta.squashed_since) == ("softmax", 16)
    alert = next(alert for alert in watch.alerts if alert.rule == "double_softmax")
    assert 5 <= alert.step <= 11


def test_what_another_graph_reaches_freely_is_not_behind_a_clamp() -> None:
    def run(*freely: bool) -> dict[str, bool]:
        model = nn.ModuleDict({"body": nn.Linear(6, 4), "bound": nn.Linear(4, 4), "late": nn.Linear(4, 4)})

        def loss(model: nn.Module, i: int) -> Tensor:
            assert isinstance(model, nn.ModuleDict)
            h = model["body"](batch(i)[0])
            bound = model["bound"](h)
            more = model["late"](h).sum() if i >= 2 else 0.0
            return h.sum() + (bound if freely[min(i, len(freely) - 1)] else bound.clamp(-9, 9)).sum() + more

        watch = train(model, loss, 4)
        return {fact.name: fact.clamped for fact in watch.history.meta.parameters if fact.name.endswith("weight")}

    assert run(False) == {"body.weight": False, "bound.weight": True, "late.weight": False}
    assert not any(run(True, False).values())
    # The graph is walked again when something new is reached, at the third update.
    assert not any(run(False, False, True).values())


@pytest.mark.parametrize(("late", "connected"), [(1, True), (2, True), (3, False)])
def test_what_is_switched_off_in_the_first_three_passes_counts_as_switched_off(late: int, connected: bool) -> None:
    def loss(model: nn.Module, i: int) -> Tensor:
        assert isinstance(model, nn.ModuleDict)
        h = model["body"](batch(i)[0])
        return h.square().sum() + (1.0 if i >= late else 0.0) * model["side"](h).square().sum()

    model = nn.ModuleDict({"body": nn.Linear(6, 4), "side": nn.Linear(4, 4)})
    watch = train(model, loss, 6)
    facts = {fact.name: fact.connected for fact in watch.history.meta.parameters}
    assert facts == {"body.weight": True, "body.bias": True, "side.weight": connected, "side.bias": connected}


def test_behind_hooks_on_saved_tensors_nothing_is_known_to_be_connected() -> None:
    def loss(model: nn.Module, i: int) -> Tensor:
        return cross_entropy(model, i)

    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        watch = train(network(), loss, 4)
    assert not any(fact.connected for fact in watch.history.meta.parameters)
