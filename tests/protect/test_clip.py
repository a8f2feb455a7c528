"""Clipping and raising before the weights change, against torch's own clipping in an unwatched copy of the same training."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer

from gradwatch import Finding, GradState, GradWatch, NonFiniteGradientError
from gradwatch.capture.acting import Due
from gradwatch.clip import MedianScaled
from gradwatch.protect.actor import Actor, Policy
from tests.capture.tensors import DTYPES, made

NAN, INF = float("nan"), float("inf")


class NoRules:
    """Whom an actor asks that is bound to none."""

    def foresee(self, rules: Collection[str]) -> Sequence[Finding]:
        return ()

    def is_open(self, rule: str) -> bool:
        return False

    def inquiry(self, since: int) -> None:
        return None

    def story(self) -> str:
        return ""

    def tell(self, text: str) -> None: ...


def asked(clip: Any, on_nonfinite: Any) -> Actor:
    return Actor(Policy(clip, on_nonfinite), NoRules())


def act(actor: Actor, params: Sequence[Tensor], **given: Any) -> float | None:
    """Let an actor act on parameters with gradients, as the watch does."""
    norms = np.array([float(torch.linalg.vector_norm(p.grad.detach().to(torch.complex128))) for p in params])  # type: ignore[union-attr]
    known: dict[str, Any] = {
        "optimizer": SGD(list(params), lr=0.1),
        "step": 7,
        "params": list(params),
        "names": [f"p{i}" for i in range(len(params))],
        "layers": [""] * len(params),
        "heads": frozenset(),
        "norms": norms,
        "factor": 1.0,
        "found_inf": False,
        "write_provisional": lambda: None,
    }
    return actor(Due(**(known | given))).coef


def with_gradients(*gradients: Tensor) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for p, g in zip(params, gradients, strict=True):
        p.grad = g.clone()
    return params


def grads(params: Sequence[Tensor]) -> list[Tensor]:
    return [p.grad.detach().clone() for p in params if p.grad is not None]


# -- the actor alone ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [1e-3, 0.1, 1.0, 7.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_for_the_same_norm_it_is_bit_equal_to_torchs(dtype: torch.dtype, max_norm: float) -> None:
    values = [made(shape, dtype, "contiguous", i) for i, shape in enumerate([(3, 4), (100,), ()])]
    mine, theirs = with_gradients(*values), with_gradients(*values)
    total = float(np.sqrt(sum(float(torch.linalg.vector_norm(v.to(torch.complex128))) ** 2 for v in values)))
    assert total > max_norm
    precise = dtype in (torch.float64, torch.complex128)
    clip_grads_with_norm_(theirs, max_norm, torch.tensor(total, dtype=torch.float64 if precise else torch.float32))
    coef = act(asked(max_norm, "warn"), mine)
    for one, other in zip(grads(mine), grads(theirs), strict=True):
        assert torch.equal(one, other)
    assert coef == pytest.approx(max_norm / (total + 1e-6), rel=1e-6)


@pytest.mark.parametrize("max_norm", [5.0, 5.0000001, 1e30], ids=["exactly", "just", "far"])
def test_below_the_bound_no_bit_is_touched(max_norm: float) -> None:
    params = with_gradients(torch.tensor([3.0, 4.0]))
    assert params[0].grad is not None
    before = params[0].grad._version
    assert act(asked(max_norm, "warn"), params) == 1.0
    assert params[0].grad.tolist() == [3.0, 4.0]
    assert params[0].grad._version == before, "no pass over the gradients either"


@pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("clip", [1e-3, functools.partial(clip_grad_norm_, max_norm=1e-3)], ids=["float", "callable"])
def test_a_norm_that_is_not_finite_never_multiplies_anything(bad: float, clip: Any) -> None:
    params = with_gradients(torch.tensor([3.0, 4.0]), torch.tensor([1.0, bad]))
    assert act(asked(clip, "warn"), params) == 1.0
    assert params[0].grad is not None
    assert params[0].grad.tolist() == [3.0, 4.0]
    np.testing.assert_equal(params[1].grad.tolist(), [1.0, bad])  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_finite_gradients_whose_norm_overflows_are_clipped_to_the_bound_not_to_zero(dtype: torch.dtype) -> None:
    params = with_gradients(torch.full((100,), 3e38, dtype=dtype))
    act(asked(2.0, "warn"), params)
    assert float(torch.linalg.vector_norm(params[0].grad.double())) == pytest.approx(2.0, rel=1e-4)  # type: ignore[union-attr]


def test_a_loss_scale_that_is_still_on_the_gradients_counts() -> None:
    params = with_gradients(torch.tensor([3.0, 4.0]) * 1024)
    assert act(asked(1.0, "warn"), params, factor=1024.0) == pytest.approx(0.2, rel=1e-5)
    assert params[0].grad is not None
    np.testing.assert_allclose(params[0].grad.tolist(), [0.6 * 1024, 0.8 * 1024], rtol=1e-5)


def test_a_callable_gets_the_parameters_and_its_factor_is_not_known() -> None:
    params = with_gradients(torch.tensor([3.0]), torch.tensor([4.0]))
    got: list[Any] = []
    assert act(asked(lambda given: got.append(list(given)), "warn"), params) is None
    assert [p is q for p, q in zip(got[0], params, strict=True)] == [True, True]


@pytest.mark.parametrize(
    ("clip", "on_nonfinite", "said"),
    [
        pytest.param(None, "warn", "", id="nothing"),
        pytest.param(1.5, "warn", "clip=1.5", id="clip"),
        pytest.param(None, "raise", "on_nonfinite='raise'", id="raise"),
        pytest.param(1.5, "raise", "clip=1.5 and on_nonfinite='raise'", id="both"),
    ],
)
def test_what_it_was_asked_is_said_by_keyword(clip: Any, on_nonfinite: Any, said: str) -> None:
    assert Actor(Policy(clip, on_nonfinite), NoRules()).asked == said


def test_an_error_names_a_few_parameters_and_counts_the_rest() -> None:
    params = with_gradients(*[torch.tensor([NAN if i % 2 else 1.0]) for i in range(12)])
    with pytest.raises(NonFiniteGradientError) as caught:
        act(asked(None, "raise"), params)
    assert caught.value.parameters == ("p1", "p3", "p5", "p7", "p9", "p11")
    assert caught.value.step == 7
    for part in ("step 7", "p1, p3, p5 and 3 more", "6 of 12", "SGD", "not been changed"):
        assert part in str(caught.value)


# -- a watch that clips, against a loop that clips ---------------------------------------------------------------------------------


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 30), nn.Tanh(), nn.Linear(30, 700), nn.Tanh(), nn.Linear(700, 1))


def batch(i: int) -> Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(i)) * (1 + i % 3)


Clip = Callable[[Optimizer, list[nn.Parameter]], object]


def plain(model: nn.Module, optimizer: Optimizer, clip: Clip | None, updates: int = 12) -> None:
    """The simplest loop; `clip` right before the step."""
    for i in range(updates):
        optimizer.zero_grad()
        model(batch(i)).square().sum().backward()
        if clip is not None:
            clip(optimizer, list(model.parameters()))
        optimizer.step()


def accumulating(model: nn.Module, optimizer: Optimizer, clip: Clip | None, updates: int = 12) -> None:
    """Three backward calls a step."""
    for i in range(updates):
        for k in range(3):
            model(batch(3 * i + k)).square().sum().backward()
        if clip is not None:
            clip(optimizer, list(model.parameters()))
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


def with_closure(model: nn.Module, optimizer: Optimizer, clip: Clip | None, updates: int = 12) -> None:
    """A closure passed to `step`, by position and by keyword."""
    for i in range(updates):

        def closure(i: int = i) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(batch(i)).square().sum()
            loss.backward()
            if clip is not None:
                clip(optimizer, list(model.parameters()))
            return loss

        loss = optimizer.step(closure) if i % 2 else optimizer.step(closure=closure)  # type: ignore[arg-type, func-returns-value]
        assert isinstance(loss, Tensor)


def set_by_hand(model: nn.Module, optimizer: Optimizer, clip: Clip | None, updates: int = 12) -> None:
    """Gradients from `autograd.grad`."""
    params = list(model.parameters())
    for i in range(updates):
        for p, g in zip(params, torch.autograd.grad(model(batch(i)).square().sum(), params), strict=True):
            p.grad = g
        if clip is not None:
            clip(optimizer, params)
        optimizer.step()


def scaled(model: nn.Module, optimizer: Optimizer, clip: Clip | None, updates: int = 12) -> None:
    """Under a GradScaler."""
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=4)
    for i in range(updates):
        optimizer.zero_grad()
        scaler.scale(model(batch(i)).square().sum()).backward()
        if clip is not None:
            scaler.unscale_(optimizer)
            clip(optimizer, list(model.parameters()))
        scaler.step(optimizer)
        scaler.update()


def scaled_and_unscaled(model: nn.Module, optimizer: Optimizer, clip: Clip | None, updates: int = 12) -> None:
    """Under a GradScaler whose `unscale_` the user calls."""
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=4)
    for i in range(updates):
        optimizer.zero_grad()
        scaler.scale(model(batch(i)).square().sum()).backward()
        scaler.unscale_(optimizer)
        if clip is not None:
            clip(optimizer, list(model.parameters()))
        scaler.step(optimizer)
        scaler.update()


def scaled_by_hand(model: nn.Module, optimizer: Optimizer, clip: Clip | None, updates: int = 12) -> None:
    """A loss scale without a scaler."""
    for i in range(updates):
        optimizer.zero_grad()
        (model(batch(i)).square().sum() * 512).backward()
        for p in model.parameters():
            assert p.grad is not None
            p.grad.div_(512)
        if clip is not None:
            clip(optimizer, list(model.parameters()))
        optimizer.step()


Loop = Callable[[nn.Module, Optimizer, Clip | None], None]
LOOPS: list[Loop] = [plain, accumulating, with_closure, set_by_hand, scaled, scaled_and_unscaled, scaled_by_hand]
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=1e-4, momentum=0.9),
    "sgd-fused": lambda p: SGD(p, lr=1e-4, momentum=0.9, fused=True),
    "adamw": lambda p: AdamW(p, lr=1e-3),
    "adamw-fused": lambda p: AdamW(p, lr=1e-3, fused=True),
}
CLIPS: dict[str, tuple[Any, Clip]] = {
    "norm": (1.5, lambda _, params: clip_grad_norm_(params, 1.5)),
    "norm-callable": (functools.partial(clip_grad_norm_, max_norm=1.5), lambda _, params: clip_grad_norm_(params, 1.5)),
    "value-callable": (functools.partial(clip_grad_value_, clip_value=0.05), lambda _, params: clip_grad_value_(params, 0.05)),
}


def assert_weights(model: nn.Module, expected: nn.Module, rtol: float) -> None:
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        np.testing.assert_allclose(one.detach().numpy(), other.detach().numpy(), rtol=rtol, atol=rtol / 10)


@pytest.mark.parametrize("loop", LOOPS, ids=[loop.__name__.replace("_", "-") for loop in LOOPS])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize(("clip", "theirs"), CLIPS.values(), ids=CLIPS)
def test_a_watch_that_clips_trains_as_a_loop_that_clips(
    loop: Loop, make: Callable[[Any], Optimizer], clip: Any, theirs: Clip
) -> None:
    expected, model = network(), network()
    loop(expected, make(expected.parameters()), theirs)
    optimizer = make(model.parameters())
    with GradWatch(model, clip=clip, console=False, rules=()) as watch:
        loop(model, optimizer, None)
    assert watch.notices == ()
    assert_weights(model, expected, 1e-5)
    history = watch.history
    assert history.recorded == 12
    coef, total = history.stat("clip_coef"), history.stat("total_norm")
    if clip == 1.5:
        np.testing.assert_allclose(coef, np.minimum(1.0, 1.5 / total), rtol=1e-4)
    assert (coef < 1).any()
    clipped = (history.stat("grad_state") & GradState.CLIPPED) != 0
    np.testing.assert_array_equal(clipped.any(axis=1), coef < 1)


@pytest.mark.parametrize("loop", LOOPS, ids=[loop.__name__.replace("_", "-") for loop in LOOPS])
def test_what_is_recorded_is_what_was_there_before_clipping(loop: Loop) -> None:
    model, bare = network(), network()
    with GradWatch(bare, console=False, rules=()) as spectator:
        loop(bare, SGD(bare.parameters(), lr=0.0), None)
    with GradWatch(model, clip=0.5, console=False, rules=()) as watch:
        loop(model, SGD(model.parameters(), lr=0.0), None)
    for name in ("grad_norm", "total_norm", "loss", "loss_scale", "backward_calls"):
        np.testing.assert_allclose(watch.history.stat(name), spectator.history.stat(name), rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("loop", LOOPS, ids=[loop.__name__.replace("_", "-") for loop in LOOPS])
def test_a_bound_that_is_never_met_changes_no_bit(loop: Loop) -> None:
    expected, model = network(), network()
    loop(expected, SGD(expected.parameters(), lr=1e-4), None)
    with GradWatch(model, clip=1e9, on_nonfinite="raise", console=False, rules=()) as watch:
        loop(model, SGD(model.parameters(), lr=1e-4), None)
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)
    known = 2 if loop is scaled_by_hand else 0  # a scale by hand is known from the third update on
    assert watch.history.stat("clip_coef")[known:].tolist() == [1.0] * (12 - known)
    assert not (watch.history.stat("grad_state")[known:] & GradState.CLIPPED).any()


@pytest.mark.parametrize("mine", [0.2, 5.0], ids=["tighter", "looser"])
def test_what_the_user_clipped_is_clipped_further_only_where_it_is_above_the_bound(mine: float) -> None:
    expected, model = network(), network()

    def users(_: Optimizer, params: list[nn.Parameter]) -> None:
        clip_grad_norm_(params, 1.0)

    def both(_: Optimizer, params: list[nn.Parameter]) -> None:
        clip_grad_norm_(params, 1.0)
        clip_grad_norm_(params, mine)

    plain(expected, SGD(expected.parameters(), lr=1e-3), both)
    with GradWatch(model, clip=mine, console=False, rules=()) as watch:
        plain(model, SGD(model.parameters(), lr=1e-3), users)
    assert_weights(model, expected, 1e-5)
    total = watch.history.stat("total_norm")
    assert (total > 1).all()
    np.testing.assert_allclose(watch.history.stat("clip_coef"), min(mine, 1.0) / total, rtol=1e-4)


def test_each_optimizer_clips_by_the_norm_of_what_it_steps() -> None:
    generator, discriminator = nn.Linear(4, 4), nn.Linear(4, 1)
    models = {"g": generator, "d": discriminator}
    optimizers = {key: SGD(model.parameters(), lr=0.01) for key, model in models.items()}
    again = {key: copy.deepcopy(model) for key, model in models.items()}
    others = {key: SGD(model.parameters(), lr=0.01) for key, model in again.items()}

    def update(pair: dict[str, Any], steppers: dict[str, SGD], i: int, clip: bool) -> None:
        for who in ("d", "g"):
            steppers[who].zero_grad()
            fake = pair["g"](batch(i)) * 5
            pair["d"](fake.detach() if who == "d" else fake).square().sum().backward()
            if clip:
                clip_grad_norm_(pair[who].parameters(), 0.7)
            steppers[who].step()

    with GradWatch(models, clip=0.7, console=False, rules=()) as watch:
        for i in range(6):
            update(models, optimizers, i, False)
    for i in range(6):
        update(again, others, i, True)
    for key, model in models.items():
        assert_weights(model, again[key], 1e-5)
    history = watch.history
    assert history.recorded == 12
    np.testing.assert_allclose(history.stat("clip_coef"), np.minimum(1, 0.7 / history.stat("total_norm")), rtol=1e-4)


def test_two_optimizers_in_one_record_give_the_smaller_coefficient() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    first, second = (SGD(part.parameters(), lr=0.0) for part in model)
    with GradWatch(model, clip=0.5, console=False, rules=()) as watch:
        model(batch(0)).square().sum().backward()
        first.step()
        second.step()
    norm = watch.history.stat("grad_norm")[0].astype(float)
    totals = [math.hypot(*norm[:2]), math.hypot(*norm[2:])]
    assert watch.history.recorded == 1
    assert watch.history.stat("clip_coef")[0] == pytest.approx(min(0.5 / t for t in totals), rel=1e-4)
    assert watch.history.stat("total_norm")[0] == pytest.approx(math.hypot(*totals), rel=1e-5)


def test_a_gradient_that_no_backward_of_this_update_reached_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = SGD(model.parameters(), lr=0.0)
    with GradWatch(model, clip=0.01, console=False, rules=()):
        model(batch(0)).square().sum().backward()
        optimizer.step()
        model[0].requires_grad_(False)
        model[1].zero_grad()
        kept = [p.grad.clone() for p in model[0].parameters()]  # type: ignore[union-attr]
        model(batch(1)).square().sum().backward()
        optimizer.step()
    for p, before in zip(model[0].parameters(), kept, strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, before)
    assert float(torch.nn.utils.get_total_norm([p.grad for p in model[1].parameters()])) == pytest.approx(0.01, rel=1e-3)  # type: ignore[misc]


def test_sparse_gradients_are_clipped() -> None:
    model = nn.Sequential(nn.Embedding(50, 8, sparse=True), nn.Flatten(), nn.Linear(16, 1))
    optimizer = SGD(model.parameters(), lr=0.1)
    with GradWatch(model, clip=0.25, console=False, rules=()) as watch:
        for i in range(3):
            optimizer.zero_grad()
            (model(torch.tensor([[i, 3], [4, i]])).square().sum() * 10).backward()
            optimizer.step()
            now = math.sqrt(sum(float(p.grad.to_dense().double().square().sum()) for p in model.parameters()))  # type: ignore[union-attr]
            assert now == pytest.approx(0.25, rel=1e-4)
    assert watch.notices == ()
    np.testing.assert_allclose(watch.history.stat("clip_coef"), 0.25 / watch.history.stat("total_norm"), rtol=1e-4)


@pytest.mark.parametrize("factor", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("kind", ["sparse", "several-precisions", "complex", "value-clipped"])
def test_gradients_that_the_user_changed_are_clipped_by_their_norm_of_now(kind: str, factor: float) -> None:
    model: nn.Module = {
        "sparse": lambda: nn.Sequential(nn.Embedding(50, 8, sparse=True), nn.Flatten(), nn.Linear(16, 1)),
        "several-precisions": lambda: nn.ParameterList(
            [torch.ones(700, dtype=d) for d in (torch.float64, torch.bfloat16, torch.float32)]
        ),
        "complex": lambda: nn.ParameterList([torch.ones(700, dtype=torch.complex64), torch.ones(3)]),
        "value-clipped": network,
    }[kind]()
    params = list(model.parameters())
    optimizer = SGD(params, lr=0.0)
    with GradWatch(model, clip=0.25, console=False, rules=()) as watch:
        if kind == "sparse":
            model(torch.tensor([[1, 3], [3, 1]])).square().sum().backward()
        elif kind == "value-clipped":
            model(batch(0)).square().sum().backward()
        else:
            sum((p.abs().double() ** 2).sum() for p in params).backward()  # type: ignore[union-attr]
        if kind == "value-clipped":
            clip_grad_value_(params, 0.01)
        for p in params:
            assert p.grad is not None
            p.grad.mul_(factor)

        def now() -> float:
            dense = [p.grad.to_dense() if p.grad.is_sparse else p.grad for p in params]  # type: ignore[union-attr]
            return math.hypot(*(float(torch.linalg.vector_norm(g.to(torch.complex128))) for g in dense))

        before = now()
        optimizer.step()
        assert now() == pytest.approx(min(before, 0.25), rel=1e-2 if kind == "several-precisions" else 1e-4)
    assert watch.notices == ()


def test_gradients_cleared_before_the_step_are_not_clipped() -> None:
    model, calls = nn.Linear(4, 1), []
    optimizer = SGD(model.parameters(), lr=0.1)
    with GradWatch(model, clip=lambda params: calls.append(len(params)), console=False, rules=()) as watch:
        model(batch(0)).square().sum().backward()
        optimizer.zero_grad()
        optimizer.step()
        model(batch(0)).square().sum().backward()
        model.bias.grad = None
        optimizer.step()
    assert calls == [1]
    assert watch.notices == ()


def test_a_gradient_with_a_graph_is_clipped_without_growing_it() -> None:
    p = nn.Parameter(torch.tensor([3.0]))
    model = nn.ParameterList([p])
    optimizer = SGD(model.parameters(), lr=0.0)
    with GradWatch(model, clip=1.0, console=False, rules=()) as watch:
        p.grad = torch.autograd.grad((p**3).sum(), p, create_graph=True)[0]
        optimizer.step()
    assert watch.history.stat("total_norm").tolist() == [27.0]
    assert p.grad.detach().item() == pytest.approx(1.0, rel=1e-5)


# -- a callable --------------------------------------------------------------------------------------------------------------------


def test_a_callable_that_does_nothing_is_no_clipping() -> None:
    model = network()
    with GradWatch(model, clip=lambda params: None, console=False, rules=()) as watch:
        plain(model, SGD(model.parameters(), lr=1e-4), None)
    assert watch.history.stat("clip_coef").tolist() == [1.0] * 12


def test_a_callable_that_raises_leaves_the_weights_and_goes_to_the_user() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)

    def no(params: Sequence[Tensor]) -> None:
        raise LookupError("no")

    before = copy.deepcopy(model.state_dict())
    with GradWatch(model, clip=no, console=False, rules=()) as watch:
        model(batch(0)).square().sum().backward()
        with pytest.raises(LookupError, match="no") as caught:
            optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not optimizer.state
    assert caught.value.__cause__ is None
    assert watch.notices == ()


def test_a_callable_is_not_called_where_a_gradient_is_not_finite() -> None:
    model, calls = nn.Linear(4, 1), []
    optimizer = SGD(model.parameters(), lr=0.1)
    with GradWatch(model, clip=lambda params: calls.append(1), console=False, rules=()):
        (model(batch(0)).sum() * NAN).backward()
        optimizer.step()
    assert calls == []


# -- where nobody can act ----------------------------------------------------------------------------------------------------------


class Sharpness(SGD):
    """Evaluates its closure twice and moves the weights in between, as SAM does."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float]) -> float:  # type: ignore[override]
        """Two evaluations."""
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad, alpha=0.01)
        with torch.enable_grad():
            closure()
        super().step()
        return loss


ACTING: dict[str, dict[str, Any]] = {
    "clip": {"clip": 1.0},
    "callable": {"clip": functools.partial(clip_grad_value_, clip_value=1.0)},
    "raise": {"on_nonfinite": "raise"},
}


@pytest.mark.parametrize("options", ACTING.values(), ids=ACTING)
@pytest.mark.parametrize("make", [LBFGS, type("Own", (LBFGS,), {})], ids=["lbfgs", "subclass"])
def test_lbfgs_is_refused_at_the_first_step_before_anything_changed(make: Any, options: dict[str, Any]) -> None:
    model = nn.Linear(4, 1)
    optimizer = make(model.parameters())
    before, calls = copy.deepcopy(model.state_dict()), []

    def closure() -> Tensor:
        calls.append(1)
        optimizer.zero_grad()
        loss: Tensor = model(batch(0)).square().sum()
        loss.backward()
        return loss

    with GradWatch(model, console=False, rules=(), **options), pytest.raises(RuntimeError) as caught:
        optimizer.step(closure)
    assert next(iter(options)) in str(caught.value)
    assert type(optimizer).__name__ in str(caught.value)
    assert "closure" in str(caught.value)
    assert calls == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("options", ACTING.values(), ids=ACTING)
def test_a_second_evaluation_in_one_step_is_refused(options: dict[str, Any]) -> None:
    model = nn.Linear(4, 1)
    optimizer = Sharpness(model.parameters(), lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss: Tensor = model(batch(0)).square().sum()
        loss.backward()
        return loss.item()

    with GradWatch(model, console=False, rules=(), **options), pytest.raises(RuntimeError, match=r"Sharpness.*several") as caught:
        optimizer.step(closure)
    assert next(iter(options)) in str(caught.value)


@pytest.mark.parametrize("options", ACTING.values(), ids=ACTING)
def test_a_step_inside_a_backward_is_refused_and_says_why(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizers = {p: SGD([p], lr=0.1) for p in model.parameters()}

    def step(p: Tensor) -> None:
        optimizers[p].step()  # type: ignore[index]
        optimizers[p].zero_grad()  # type: ignore[index]

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    before = copy.deepcopy(model.state_dict())
    with (
        GradWatch(model, console=False, rules=(), **options),
        pytest.raises(RuntimeError, match=r"(?s)inside backward.*without clip"),
    ):
        model(batch(0)).square().sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_where_it_is_asked_for_nothing_nothing_is_refused() -> None:
    model = nn.Linear(4, 1)
    optimizer = Sharpness(model.parameters(), lr=1e-3)

    def closure() -> float:
        optimizer.zero_grad()
        loss: Tensor = model(batch(0)).square().sum()
        loss.backward()
        return loss.item()

    with GradWatch(model, console=False, rules=()) as watch:
        for _ in range(3):
            optimizer.step(closure)
    assert watch.history.recorded == 3
    assert watch.history.stat("backward_calls").tolist() == [2.0] * 3


# -- raising -----------------------------------------------------------------------------------------------------------------------


def poisoned(model: nn.Module, value: float) -> None:
    (model(batch(0)).square().sum() * value).backward()


@pytest.mark.parametrize("value", [NAN, INF], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda p: SGD(p, lr=0.1, momentum=0.9), id="sgd"),
        pytest.param(lambda p: Adam(p, lr=0.1), id="adam"),
        pytest.param(lambda p: AdamW(p, lr=0.1, fused=True), id="adamw-fused"),
    ],
)
def test_raising_leaves_weights_and_optimizer_and_the_loop_goes_on(make: Callable[[Any], Optimizer], value: float) -> None:
    model = network()
    optimizer = make(model.parameters())
    with GradWatch(model, on_nonfinite="raise", console=False, rules=()) as watch:
        plain(model, optimizer, None, updates=3)
        weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
        optimizer.zero_grad()
        poisoned(model, value)
        with pytest.raises(NonFiniteGradientError) as caught:
            optimizer.step()
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        for name, before in state["state"].items():
            now = optimizer.state_dict()["state"][name]
            assert all(torch.equal(torch.as_tensor(now[key]), torch.as_tensor(before[key])) for key in before)
        assert caught.value.step == 3
        assert caught.value.parameters == tuple(name for name, _ in model.named_parameters())
        plain(model, optimizer, None, updates=2)
    history = watch.history
    assert history.steps.tolist() == list(range(6))
    assert history.stat("skipped").tolist() == [False, False, False, True, False, False]
    assert not np.isfinite(history.stat("grad_norm")[3]).any()
    assert (history.stat("grad_nonfinite")[3] > 0).all()
    assert watch.notices == ()


def test_raising_from_a_closure_leaves_the_weights() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(model.state_dict())

    def closure() -> Tensor:
        optimizer.zero_grad()
        poisoned(model, NAN)
        return torch.zeros(())

    with GradWatch(model, on_nonfinite="raise", console=False, rules=()) as watch:
        with pytest.raises(NonFiniteGradientError):
            optimizer.step(closure)  # type: ignore[arg-type]
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        plain(model, optimizer, None, updates=2)
    assert watch.history.stat("skipped").tolist() == [True, False, False]


def test_a_finite_overflow_is_no_reason_to_raise() -> None:
    model = nn.Linear(4, 1, bias=False)
    optimizer = SGD(model.parameters(), lr=1e-38)
    with GradWatch(model, on_nonfinite="raise", console=False, rules=()) as watch:
        (model(torch.ones(1, 4)).sum() * 3e38).backward()
        optimizer.step()
    assert watch.history.stat("grad_nonfinite").tolist() == [[0.0]]


def test_what_another_optimizer_owns_is_no_reason_to_raise() -> None:
    """The discriminator's gradient under the generator's loss is bad; the generator's own is fine."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    first, second = (SGD(part.parameters(), lr=0.1) for part in model)
    with GradWatch(model, on_nonfinite="raise", console=False, rules=()):
        model(batch(0)).square().sum().backward()
        first.step()
        second.step()
        model.zero_grad()
        model(batch(0)).square().sum().backward()
        model[1].weight.grad.fill_(NAN)  # type: ignore[union-attr]
        first.step()
        model.zero_grad()
        bad = model(batch(0)).square().sum()
        model[1].weight.register_hook(lambda g: g * NAN)
        bad.backward()
        first.step()
        with pytest.raises(NonFiniteGradientError) as caught:
            second.step()
    assert caught.value.parameters == ("1.weight",)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("options", [{"on_nonfinite": "raise"}, {"clip": 1.0}, {"on_nonfinite": "raise", "clip": 1.0}], ids=str)
def test_what_a_scaler_leaves_out_is_no_reason_to_act(options: dict[str, Any], fused: bool) -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=1e-4, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with GradWatch(model, console=False, rules=(), **options) as watch:
        for i in range(4):
            optimizer.zero_grad()
            before = copy.deepcopy(model.state_dict())
            scaler.scale(model(batch(i)).square().sum() * (INF if i == 1 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            same = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
            assert same is (i == 1)
    assert watch.history.stat("skipped").tolist() == [False, True, False, False]
    assert watch.history.stat("loss_scale").tolist() == [1024.0, 1024.0, 512.0, 512.0]


def test_a_clipper_that_learns_has_a_history_for_each_optimizer() -> None:
    """Gradients of the second model are a thousand times those of the first: one history of both would clip it to nothing."""
    torch.manual_seed(0)
    models = {"small": nn.Linear(4, 1), "large": nn.Linear(4, 1)}
    optimizers = {name: SGD(model.parameters(), lr=0.0) for name, model in models.items()}
    clip = MedianScaled(2.0, window=20, warmup=3)
    with GradWatch(models, console=False, clip=clip) as watch:
        for i in range(20):
            for name, model in models.items():
                optimizers[name].zero_grad()
                ((model(batch(i)) - 5.0).square().mean() * (1.0 if name == "small" else 1e3)).backward()
                optimizers[name].step()
    assert (watch.history.stat("clip_coef") > 0.3).all()
    known = clip.state_dict()["norms"]
    assert float(known[known < INF].max()) < 1e3, "the user's own is the first one's"
