"""Showing what was found: console and tables. No torch."""
