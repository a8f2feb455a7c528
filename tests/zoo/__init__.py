"""Training runs, healthy and sick, on which the rules are calibrated and judged."""
