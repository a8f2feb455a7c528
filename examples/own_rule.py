"""A rule of your own: a function of the history, five lines.

Run: `python examples/own_rule.py` (seconds). This one objects to clipping that has become the rule: whoever clips nearly every
update trains with a learning rate that nobody chose.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from gradwatch import Alert, Finding, GradWatch, History, Severity, default_rules


def clipped_nearly_always(history: History) -> Iterator[Finding]:
    share = float((history.recent("clip_coef", 20) < 1).mean())
    if len(history) >= 20 and share > 0.9:
        message = f"{share:.0%} of the last 20 updates were clipped"
        yield Finding("clipped_nearly_always", Severity.WARNING, history.recorded - 20, message=message)


def tell(alert: Alert) -> None:
    """A sink is a function of one alert: here, the place where a message to a chat or an experiment tracker would be sent."""
    print(f"sink: {alert.rule} since update {alert.step}: {alert.message} ({alert.state})")


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    direction = torch.randn(20)

    with GradWatch(model, clip=0.01, rules=[*default_rules(), clipped_nearly_always], on_alert=tell):
        for _ in range(60):
            x = torch.randn(32, 20)
            optimizer.zero_grad()
            F.mse_loss(model(x).squeeze(1), torch.sin(x @ direction)).backward()
            optimizer.step()


if __name__ == "__main__":
    main()
