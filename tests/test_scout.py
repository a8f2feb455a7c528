"""The scout of `gradwatch run`: what it attaches to, and that the first record is as true as every later one."""

from __future__ import annotations

import gc
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from gradwatch import GradWatch, History
from gradwatch.capture.tape import TAPE
from gradwatch.present.console import ConsoleSink
from gradwatch.scout import Scout

SAME = ("loss", "loss_terms", "total_norm", "grad_norm", "weight_norm", "update_ratio", "lr", "grad_state", "clip_coef", "skipped")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.head = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


@contextmanager
def scouted() -> Iterator[tuple[Scout, io.StringIO]]:
    """A scout, and what it prints."""
    out = io.StringIO()
    scout = Scout(ConsoleSink(Console(file=out, width=200)))
    try:
        yield scout, out
    finally:
        scout.finish()
        assert not any(listener is scout or listener in scout.watches for listener in TAPE.listeners())


def losses(model: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    while True:
        x = torch.randn(8, 4, generator=generator)
        yield nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long())


# -- the first record --------------------------------------------------------------------------------------------------------------


def plain(model: Net) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    for _, loss in zip(range(4), losses(model), strict=False):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def accumulation(model: Net) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for i, loss in zip(range(12), losses(model), strict=False):
        (loss / 3).backward()
        if i % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()


def two_losses(model: Net) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _, loss in zip(range(4), losses(model), strict=False):
        optimizer.zero_grad()
        loss.backward()
        (0.1 * model.head.weight.square().sum()).backward()
        optimizer.step()


def scale_search(model: Net) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    for _, loss in zip(range(20), losses(model), strict=False):
        optimizer.zero_grad()
        # The gradient overflows at first, the loss never does.
        scaler.scale(64 * (loss - loss.detach()) + 0.5).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() < 2.0**127


def fused_under_a_scaler(model: Net) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for _, loss in zip(range(4), losses(model), strict=False):
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


def first_updates_left_out(model: Net) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for i, loss in zip(range(6), losses(model), strict=False):
        optimizer.zero_grad()
        loss.backward()
        if i > 1:
            optimizer.step()


def closure(model: Net) -> None:
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    loss = next(losses(model))

    def evaluate() -> torch.Tensor:
        optimizer.zero_grad()
        loss = next(losses(model))
        loss.backward()
        return loss

    for _ in range(4):
        loss = optimizer.step(evaluate)
    assert loss.isfinite()


def inside_backward(model: Net) -> None:
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def step(p: torch.Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    for _, loss in zip(range(4), losses(model), strict=False):
        loss.backward()


def two_optimizers(model: Net) -> None:
    body = torch.optim.SGD(model.body.parameters(), lr=0.1)
    head = torch.optim.AdamW(model.head.parameters())
    for _, loss in zip(range(4), losses(model), strict=False):
        body.zero_grad()
        head.zero_grad()
        loss.backward()
        body.step()
        head.step()


LOOPS = (
    plain,
    accumulation,
    two_losses,
    scale_search,
    fused_under_a_scaler,
    first_updates_left_out,
    closure,
    inside_backward,
    two_optimizers,
)


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_every_record_is_that_of_a_watch_around_the_loop(loop: Callable[[Net], None]) -> None:
    """From the first step on; updates before it, that nobody stepped, are in no record."""
    models = [Net(), Net()]
    models[1].load_state_dict(models[0].state_dict())
    with GradWatch(models[0], console=False) as around:
        loop(models[0])
    with scouted() as (scout, _):
        loop(models[1])
        (watch,) = scout.watches
    skipped = int(around.history.stat("skipped").sum())
    assert watch.history.recorded == around.history.recorded - skipped > 0
    assert tuple(name.removeprefix("Net.") for name in watch.history.parameters) == around.history.parameters
    assert watch.alerts == around.alerts == ()
    for name in SAME:
        assert_same(watch.history, around.history, name, skipped)


def assert_same(one: History, other: History, name: str, skipped: int) -> None:
    got, want = one.stat(name), other.stat(name)[skipped:]
    np.testing.assert_allclose(got, want, rtol=1e-5, err_msg=name)


# -- what it attaches to -----------------------------------------------------------------------------------------------------------


def step(optimizer: torch.optim.Optimizer, model: Callable[[torch.Tensor], torch.Tensor]) -> None:
    optimizer.zero_grad()
    next(losses(model)).backward()
    optimizer.step()


def test_a_later_model_gets_a_watch_of_its_own_under_its_name() -> None:
    with scouted() as (scout, out):
        first, second = Net(), Net()
        of_first, of_second = (torch.optim.SGD(model.parameters(), lr=0.1) for model in (first, second))
        for _ in range(3):
            step(of_first, first)
        for _ in range(2):
            step(of_second, second)
        watches = scout.watches
    assert [watch.history.recorded for watch in watches] == [3, 2]
    assert [watch.history.parameters[0] for watch in watches] == ["Net.body.0.weight", "Net_2.body.0.weight"]
    told = out.getvalue().splitlines()
    assert [line.split(":")[0] for line in told] == ["✓ gradwatch, Net", "✓ gradwatch, Net_2"]


def test_the_second_half_of_a_container_joins_alone() -> None:
    class Gan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator, self.discriminator = nn.Linear(4, 4), Net()

    with scouted() as (scout, _):
        gan = Gan()
        of_d = torch.optim.SGD(gan.discriminator.parameters(), lr=0.1)
        of_g = torch.optim.SGD(gan.generator.parameters(), lr=0.1)
        for _ in range(3):
            step(of_d, lambda x: gan.discriminator(gan.generator(x).detach()))
            step(of_g, lambda x: gan.discriminator(gan.generator(x)))
        assert [len(watch.history.parameters) for watch in scout.watches] == [4, 2]
        assert [watch.history.recorded for watch in scout.watches] == [3, 3]
        for watch in scout.watches:
            assert watch.history.stat("loss_terms").tolist() == [1, 1, 1]


def test_a_loss_that_cannot_be_added_up_is_not_known_and_does_not_stop_the_training() -> None:
    with scouted() as (scout, _):
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        next(losses(model)).backward()
        here, nowhere = next(losses(model)), torch.zeros((), device="meta", requires_grad=True) * 2
        nowhere.backward()
        here.backward()
        optimizer.step()
        step(optimizer, model)
        (watch,) = scout.watches
        assert np.isfinite(watch.history.stat("total_norm")).all()
        assert np.isfinite(watch.history.stat("loss")[1])


def test_one_optimizer_of_several_models_gives_one_watch() -> None:
    with scouted() as (scout, _):
        encoder, decoder = nn.Linear(4, 4), Net()
        optimizer = torch.optim.SGD([*encoder.parameters(), *decoder.parameters()], lr=0.1)
        step(optimizer, lambda x: decoder(encoder(x)))
        (watch,) = scout.watches
        assert {name.partition(".")[0] for name in watch.history.parameters} == {"Linear", "Net"}
        assert watch.history.recorded == 1


def test_a_second_optimizer_of_a_watched_model_changes_nothing() -> None:
    with scouted() as (scout, _):
        model = Net()
        step(torch.optim.SGD(model.parameters(), lr=0.1), model)
        step(torch.optim.Adam(model.head.parameters()), model)
        (watch,) = scout.watches
        assert watch.history.recorded == 2


def test_a_model_whose_optimizer_went_is_let_go_and_goes_on_with_the_next_one() -> None:
    with scouted() as (scout, _):
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step(optimizer, model)
        (watch,) = scout.watches
        assert watch in list(TAPE.listeners())
        del optimizer
        gc.collect()
        assert watch not in list(TAPE.listeners())
        step(torch.optim.Adam(model.parameters()), model)
        assert scout.watches == (watch,)
        assert watch.history.recorded == 2


def test_parameters_added_to_an_optimizer_are_found() -> None:
    with scouted() as (scout, _):
        body, head = Net(), nn.Linear(2, 2)
        optimizer = torch.optim.SGD(body.parameters(), lr=0.1)
        step(optimizer, lambda x: head(body(x)))
        optimizer.add_param_group({"params": head.parameters()})
        step(optimizer, lambda x: head(body(x)))
        assert [watch.history.parameters[-1] for watch in scout.watches][1:] == ["Linear.bias"]


def test_a_model_that_cannot_be_watched_is_trained_all_the_same() -> None:
    with scouted() as (scout, out):
        model = Net()
        model.body = nn.DataParallel(model.body)
        before = [p.clone() for p in model.parameters()]
        step(torch.optim.SGD(model.parameters(), lr=0.1), model)
        assert scout.watches == ()
        assert not all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    # It has a key where another optimizer is alive in the process, as those of earlier tests may be.
    assert re.search(
        r"gradwatch: this model is not watched\. GradWatch: (the model 'Net'|model) is or holds an nn\.DataParallel", out.getvalue()
    )
    assert "Traceback" not in out.getvalue()


def test_what_the_scout_itself_does_wrong_does_not_reach_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise LookupError("on purpose")

    monkeypatch.setattr("gradwatch.scout.outermost", broken)
    with scouted() as (_, out):
        model = Net()
        step(torch.optim.SGD(model.parameters(), lr=0.1), model)
    assert "please report this" in out.getvalue()
    assert "LookupError: on purpose" in out.getvalue()
