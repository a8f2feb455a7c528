"""From the history to a verdict: rules, incidents, cause and remedy in words. No torch."""
