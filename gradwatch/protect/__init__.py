"""Acting before the weights change."""
