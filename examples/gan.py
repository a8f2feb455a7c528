"""Two models, two optimizers, one watch: a GAN learns eight points on a circle.

Run: `python examples/gan.py` (seconds). A mapping gives each model a name; layers and parameters stand under it. Each `step()` is
one update of the history. The gradient that the generator's loss leaves in the discriminator is nobody's update and is not counted.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradwatch import GradWatch

NOISE = 8


def real_points(n: int) -> Tensor:
    """Eight small clouds on the unit circle."""
    angle = torch.randint(0, 8, (n,)) * (2 * math.pi / 8)
    return torch.stack([angle.cos(), angle.sin()], dim=1) + 0.05 * torch.randn(n, 2)


def network(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, outputs))


def main(turns: int = 400) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    generator, discriminator = network(NOISE, 2), network(2, 1)
    step_g = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.99))
    step_d = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.99))

    with GradWatch({"generator": generator, "discriminator": discriminator}) as watch:
        for _ in range(turns):
            fake = generator(torch.randn(64, NOISE))
            step_d.zero_grad()
            (F.softplus(-discriminator(real_points(64))).mean() + F.softplus(discriminator(fake.detach())).mean()).backward()
            step_d.step()
            step_g.zero_grad()
            F.softplus(-discriminator(fake)).mean().backward()
            step_g.step()

    history = watch.history
    for name in ("generator", "discriminator"):
        columns = [i for i, parameter in enumerate(history.parameters) if parameter.startswith(name)]
        norms = history.stat("grad_norm")[:, columns]
        mine = norms[~np.isnan(norms).all(axis=1)]
        print(f"{name}: {len(mine)} of the last {len(norms)} updates, largest gradient norm of a parameter {mine.max():.3g}")
    radius = generator(torch.randn(1000, NOISE)).norm(dim=1)
    print(f"distance of generated points from the centre: {radius.mean():.2f} (the real ones: 1.00)")


if __name__ == "__main__":
    main()
