"""gradwatch: a gradient-health monitor for PyTorch training loops."""
