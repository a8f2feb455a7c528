"""The runs that the first rules were calibrated on. They are spent: thresholds were looked at beside all of them."""
