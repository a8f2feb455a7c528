"""The rules: functions of the history that yield findings, one file per family of symptoms."""

from __future__ import annotations

from gradwatch.diagnose.rules.activations import dead_units, saturated_activation
from gradwatch.diagnose.rules.exploding import exploding_gradient
from gradwatch.diagnose.rules.forward import non_finite_activation, non_finite_input
from gradwatch.diagnose.rules.loop import gradients_not_zeroed, missing_gradient, never_stepped, not_in_optimizer
from gradwatch.diagnose.rules.losses import loss_diverging, loss_plateau, loss_spike
from gradwatch.diagnose.rules.non_finite import non_finite_gradient, non_finite_loss, non_finite_weight
from gradwatch.diagnose.rules.rule import PERSISTENCE, Rule, name_of, persistence_of, persistent
from gradwatch.diagnose.rules.scale import loss_scale_collapse
from gradwatch.diagnose.rules.spike import gradient_spike
from gradwatch.diagnose.rules.start import double_softmax, poor_init, unnormalized_input
from gradwatch.diagnose.rules.vanishing import vanishing_gradient
from gradwatch.diagnose.rules.weights import frozen_weights, update_ratio_too_large, update_ratio_too_small
from gradwatch.diagnose.rules.zero import zero_gradient

__all__ = [
    "PERSISTENCE",
    "Rule",
    "dead_units",
    "default_rules",
    "double_softmax",
    "exploding_gradient",
    "frozen_weights",
    "gradient_spike",
    "gradients_not_zeroed",
    "loss_diverging",
    "loss_plateau",
    "loss_scale_collapse",
    "loss_spike",
    "missing_gradient",
    "name_of",
    "never_stepped",
    "non_finite_activation",
    "non_finite_gradient",
    "non_finite_input",
    "non_finite_loss",
    "non_finite_weight",
    "not_in_optimizer",
    "persistence_of",
    "persistent",
    "poor_init",
    "saturated_activation",
    "unnormalized_input",
    "update_ratio_too_large",
    "update_ratio_too_small",
    "vanishing_gradient",
    "zero_gradient",
]


def default_rules() -> tuple[Rule, ...]:
    """The rules of a watch that is not told otherwise."""
    return (
        non_finite_input,
        non_finite_weight,
        non_finite_activation,
        non_finite_loss,
        non_finite_gradient,
        gradients_not_zeroed,
        never_stepped,
        missing_gradient,
        not_in_optimizer,
        loss_scale_collapse,
        double_softmax,
        unnormalized_input,
        poor_init,
        dead_units,
        saturated_activation,
        exploding_gradient,
        vanishing_gradient,
        zero_gradient,
        gradient_spike,
        frozen_weights,
        update_ratio_too_large,
        update_ratio_too_small,
        loss_diverging,
        loss_spike,
        loss_plateau,
    )
