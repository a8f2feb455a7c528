"""Two models, two optimizers, and gradients that one loss leaves on the other's model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradwatch import GradWatch
from tests.loops.harness import HEALTHY_AND_FAULTY, NAN, agree, backward, healthy, said, step
from tests.reference import Reference


class Gan:
    """A generator of points on a line in the plane, and its critic."""

    def __init__(self, *, detached: bool = True, zero_d: bool = True) -> None:
        self.g = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2))
        self.d = nn.Sequential(nn.Linear(2, 40), nn.LeakyReLU(0.2), nn.Linear(40, 1))
        self.opt_g = torch.optim.Adam(self.g.parameters(), lr=2e-3, betas=(0.5, 0.9))
        self.opt_d = torch.optim.Adam(self.d.parameters(), lr=2e-3, betas=(0.5, 0.9))
        self.detached, self.zero_d = detached, zero_d
        self.generator = torch.Generator().manual_seed(3)

    def noise(self) -> Tensor:
        return torch.randn(32, 4, generator=self.generator)

    def loss_d(self) -> Tensor:
        if self.zero_d:
            self.opt_d.zero_grad()
        t = torch.randn(32, 1, generator=self.generator)
        fake = self.g(self.noise())
        if self.detached:
            fake = fake.detach()
        return F.softplus(-self.d(torch.cat((t, 2 * t + 1), 1))).mean() + F.softplus(self.d(fake)).mean()

    def loss_g(self) -> Tensor:
        self.opt_g.zero_grad()
        return F.softplus(-self.d(self.g(self.noise()))).mean()


@HEALTHY_AND_FAULTY
@pytest.mark.parametrize("told", [False, True], ids=["optimizers recognised", "optimizers told"])
@pytest.mark.parametrize("detached", [True, False], ids=["detached", "fakes not detached"])
def test_gan_as_one_mapping(detached: bool, told: bool, fault: bool) -> None:
    gan = Gan(detached=detached, zero_d=not fault)
    models = {"generator": gan.g, "discriminator": gan.d}
    reference = Reference(models, gan.opt_g, gan.opt_d)
    with GradWatch(models, optimizer=(gan.opt_g, gan.opt_d) if told else None, console=False) as watch:
        for _ in range(25):
            backward(reference, gan.loss_d(), reached=("discriminator.*",) if detached else None)
            step(reference, gan.opt_d)
            backward(reference, gan.loss_g())
            step(reference, gan.opt_g)
    agree(watch, reference, records=50)
    if fault:
        said(watch, "gradients_not_zeroed", step=range(4), layers=("discriminator",))
    else:
        healthy(watch, reference, learns=False)


@HEALTHY_AND_FAULTY
@pytest.mark.parametrize("detached", [True, False], ids=["detached", "fakes not detached"])
def test_gan_with_only_the_generator_watched(detached: bool, fault: bool) -> None:
    gan = Gan(detached=detached)
    reference = Reference(gan.g, gan.opt_g)
    with GradWatch(gan.g, console=False) as watch:
        for i in range(25):
            loss_d = gan.loss_d()
            if detached:
                loss_d.backward()
            else:
                backward(reference, loss_d)
            gan.opt_d.step()
            reference.drop()
            loss_g = gan.loss_g()
            backward(reference, loss_g * NAN if fault and i == 15 else loss_g)
            step(reference, gan.opt_g)
    agree(watch, reference, records=25)
    if fault:
        said(watch, "non_finite_loss", step=15, layers=())
    else:
        healthy(watch, reference, learns=False)


@HEALTHY_AND_FAULTY
@pytest.mark.parametrize("detached", [True, False], ids=["detached", "fakes not detached"])
def test_gan_with_only_the_discriminator_watched(detached: bool, fault: bool) -> None:
    gan = Gan(detached=detached, zero_d=not fault)
    reference = Reference(gan.d, gan.opt_d)
    with GradWatch(gan.d, console=False) as watch:
        for _ in range(25):
            backward(reference, gan.loss_d())
            step(reference, gan.opt_d)
            # It reaches the discriminator too, but the step that follows belongs to nothing watched: no record.
            backward(reference, gan.loss_g())
            gan.opt_g.step()
            reference.drop()
    agree(watch, reference, records=25)
    if fault:
        said(watch, "gradients_not_zeroed", step=range(2))
    else:
        healthy(watch, reference, learns=False)


@HEALTHY_AND_FAULTY
def test_several_critic_updates_for_one_of_the_generator(fault: bool) -> None:
    gan = Gan()
    models = {"generator": gan.g, "discriminator": gan.d}
    reference = Reference(models, gan.opt_g, gan.opt_d)
    with GradWatch(models, console=False) as watch:
        for i in range(15):
            for _ in range(3):
                backward(reference, gan.loss_d(), reached=("discriminator.*",))
                step(reference, gan.opt_d)
            loss = gan.loss_g()
            backward(reference, loss * NAN if fault and i == 10 else loss)
            step(reference, gan.opt_g)
    agree(watch, reference, records=60)
    if fault:
        said(watch, "non_finite_loss", step=43, layers=())
    else:
        healthy(watch, reference, learns=False)


def test_one_loss_for_both_models_is_one_record() -> None:
    encoder, decoder = nn.Linear(8, 3), nn.Linear(3, 8)
    first, second = torch.optim.SGD(encoder.parameters(), lr=0.1), torch.optim.SGD(decoder.parameters(), lr=0.1)
    models = {"encoder": encoder, "decoder": decoder}
    reference = Reference(models, first, second)
    generator = torch.Generator().manual_seed(4)
    with GradWatch(models, console=False) as watch:
        for _ in range(20):
            x = torch.randn(32, 8, generator=generator)
            first.zero_grad()
            second.zero_grad()
            backward(reference, F.mse_loss(decoder(encoder(x)), x))
            step(reference, first, second)
    agree(watch, reference, records=20)
    healthy(watch, reference, learns=False)


@pytest.mark.parametrize("seed", range(3))
def test_a_bias_that_the_critics_normalisation_takes_out_again_is_no_gradient_that_explodes(seed: int) -> None:
    """The generator's last bias before a critic that begins Linear, BatchNorm: what is left of its gradient comes from `eps`."""
    torch.manual_seed(seed)
    generator = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8))
    for p in generator.parameters():
        nn.init.normal_(p, 0.0, 0.3)
    critic = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    steps = {model: torch.optim.Adam(model.parameters(), lr=1e-3) for model in (generator, critic)}
    with GradWatch({"g": generator, "d": critic}, console=False) as watch:
        for _ in range(60):
            fake = generator(torch.randn(32, 8))
            real = torch.randn(32, 8)
            steps[critic].zero_grad()
            (F.softplus(-critic(real)).mean() + F.softplus(critic(fake.detach())).mean()).backward()
            steps[critic].step()
            steps[generator].zero_grad()
            F.softplus(-critic(fake)).mean().backward()
            steps[generator].step()
    norms = dict(zip(watch.history.parameters, watch.history.stat("grad_norm")[-1], strict=True))
    assert 0 < norms["g.3.bias"] < 1e-3 * norms["g.3.weight"], "else there is nothing to be misled by"
    assert [alert.rule for alert in watch.alerts if alert.rule == "exploding_gradient"] == []


def test_a_half_that_is_frozen_while_the_other_trains_counts_as_trainable() -> None:
    """The facts are written whenever something new is known, at the other half's turn too."""
    g, d = nn.Linear(4, 2), nn.Linear(2, 1)
    of_g, of_d = torch.optim.SGD(g.parameters(), 0.01), torch.optim.SGD(d.parameters(), 0.01)
    with GradWatch({"g": g, "d": d}, console=False) as watch:
        for i in range(24):
            of_g.zero_grad()  # and nobody clears d's
            d.requires_grad_(i % 2 == 0)
            z = g(torch.randn(8, 4))
            score = d(z) if i % 2 else d(torch.randn(8, 2)) - d(z.detach())
            score.square().mean().backward()
            (of_g if i % 2 else of_d).step()
            d.requires_grad_(True)
    assert all(fact.trainable for fact in watch.history.meta.parameters)
    assert [(alert.rule, alert.layers) for alert in watch.alerts] == [("gradients_not_zeroed", ("d",))]
