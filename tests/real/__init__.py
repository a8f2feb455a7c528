"""Architectures of `transformers`, trained healthy and with a fault planted: modules that nobody here wrote."""
