"""Where a non-finite value was born, what cut a gradient's way, and the smallest mend: asked only when something is wrong."""
