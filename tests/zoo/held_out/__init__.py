"""Runs that nobody has developed on, each with its source and a proof in plain torch: they are only run to report."""
