"""Architectures of `transformers`, built small from their configs: random weights, no network, and data they can learn.

`ARCHITECTURES` maps a name to an `Architecture`, whose `training()` seeds everything: two calls give two equal trainings. Dropout and the
like stay at the configs' defaults, for people train with them. Models return their own loss, as in the loops that people write.
"""

from __future__ import annotations

import tests.real.senses
import tests.real.text  # noqa: F401  (both imports fill the two mappings)
from tests.real.case import ARCHITECTURES, FLAWED, UPDATES

__all__ = ["ARCHITECTURES", "FLAWED", "UPDATES"]
