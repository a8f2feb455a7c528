"""Clippers: what `clip=` of a watch takes besides a float, and what clips in a loop without a watch.

```python
clip = AutoClip(percentile=10)
with GradWatch(model, clip=clip):
    ...  # the training loop; without a watch, clip(model.parameters()) right before optimizer.step()
```

Two kinds. `GlobalNorm`, `AutoClip`, `ZClip` and `MedianScaled` multiply all gradients by one factor, so that their direction stays;
they differ in the bound: fixed, or learnt from the norms of earlier updates. `Value`, `PerParameter`, `PerLayer` and `AGC` clip part
by part, so that one part that explodes does not take the others down with it, but the update points elsewhere.

All of them: what lies below the bound keeps every bit. A norm that is not finite multiplies nothing and is not learnt. No factor
waits for a device. Loss scales come off first (`scaler.unscale_(optimizer)`), as for torch's own functions; a watch sees to that. What
learns keeps one history: with several optimizers, each needs a clipper of its own.
"""

from gradwatch.clip.agc import AGC
from gradwatch.clip.clipper import Clipper, Gradients, NormClipper
from gradwatch.clip.fixed import GlobalNorm, PerLayer, PerParameter, Value
from gradwatch.clip.learnt import AutoClip, MedianScaled, ZClip
from gradwatch.clip.norms import norms_of as norms_of  # no clipper, and so not listed: a watch reads norms by it

__all__ = [
    "AGC",
    "AutoClip",
    "Clipper",
    "GlobalNorm",
    "Gradients",
    "MedianScaled",
    "NormClipper",
    "PerLayer",
    "PerParameter",
    "Value",
    "ZClip",
]
