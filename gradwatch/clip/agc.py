"""The clipper whose bound is a fraction of the weights: each unit of a layer is clipped by a factor of its own."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from gradwatch.capture.norms import TINY
from gradwatch.capture.parameters import on_host
from gradwatch.clip.arguments import above_zero, short
from gradwatch.clip.clipper import Gradients, NormClipper
from gradwatch.clip.factors import clip_each, factors_of
from gradwatch.clip.norms import HUGE, gathered, grads_of, precise, read_norms
from gradwatch.clip.places import NOWHERE, Places


class AGC(NormClipper):
    """Adaptive gradient clipping: each unit's gradient is bounded by a fraction of that unit's weights.

    `g_i *= clip_factor * max(|w_i|, eps) / |g_i|` where `|g_i|` exceeds it (Brock, De, Smith and Simonyan 2021, arXiv 2102.06171, equation
    3, with its defaults). A unit is a row of a matrix, an output filter of a convolution, a token of an embedding; a bias,
    a gain or a scalar is one as a whole, as in the paper's code, and so is every tensor with at most one dimension longer than 1. The last
    layer is left out, as in the paper: the watch tells which one that is, and `exclude` names what else shall be. Weights and gradients
    are read once more for it. A sparse gradient is summed first, which waits where it lies on a device.

    Good for: networks without normalisation layers, large batches, large learning rates; 0.01 is the paper's for batches of 4096, and
    smaller ones do with more. Not for: weights that start at zero and shall grow fast (a zero-initialised gate moves by `clip_factor * eps`).

    ```python
    with GradWatch(model, clip=AGC(exclude=("*.gate",))):
        ...  # the training loop; without a watch: AGC(exclude=("head.*",), model=model)
    ```

    Args:
        clip_factor: largest ratio of a unit's gradient to its weights, above 0.
        eps: weights below this count as this: what is initialised with zeros must be able to move. Above 0.
        exclude: patterns (fnmatch) of names of parameters that are not clipped.
        model: knows the names where it is called without a watch, and which weights belong to a transposed convolution, whose units lie
            along dimension 1; held weakly.
    """

    by_norms_alone = False

    def __init__(
        self, clip_factor: float = 0.01, eps: float = 1e-3, exclude: Sequence[str] = (), *, model: nn.Module | None = None
    ) -> None:
        self.clip_factor = above_zero("AGC", "clip_factor", clip_factor)
        self.eps = above_zero("AGC", "eps", eps)
        if isinstance(exclude, str) or not all(isinstance(pattern, str) for pattern in exclude):
            raise TypeError(
                f"AGC(exclude={short(exclude)}): got {type(exclude).__name__}; it needs patterns of parameter names, such as ('head.*',)"
            )
        self.exclude = tuple(exclude)
        self._excluded: dict[str, bool] = {}
        self._places = None if model is None else Places("AGC", model)
        if self._places is not None:
            self._places.check(self.exclude)

    def __call__(self, parameters: Iterable[Tensor], /) -> Tensor:
        """Read the norms and clip, as every clipper does; with `exclude` it needs `model`."""
        if self._places is None and self.exclude:
            raise ValueError(
                f"{self!r} was called without a watch and does not know the names of parameters, which exclude= goes by; it needs the "
                "model. Give it one, as AGC(exclude=..., model=model), or pass it to GradWatch(model, clip=...)."
            )
        return super().__call__(parameters)

    def clip(self, gradients: Gradients) -> Tensor:
        """Scale the gradient of each unit that exceeds its bound, and return the smallest factor."""
        norms, host = gradients.norms.unbind(), on_host(gradients.norms)
        places = [NOWHERE] * len(norms) if self._places is None else self._places.of(gradients.params)
        whole: tuple[list[Tensor], list[Tensor]] = ([], [])
        parts: dict[torch.device, list[tuple[Tensor, Tensor, int, bool]]] = {}
        for i, (p, g, name, place) in enumerate(
            zip(gradients.params, grads_of(gradients.params), gradients.names, places, strict=True)
        ):
            if i in gradients.heads or self._is_excluded(name or place.name):
                continue
            if sum(size > 1 for size in p.shape) <= 1 or (g.is_sparse and g.sparse_dim() > 1):
                whole[0].append(p)
                whole[1].append(norms[i])
            elif p.numel():
                # Squares in float64 where those in float32 may overflow, or vanish above the bound; on a device nobody knows.
                wide = host and not (float(norms[i]) < HUGE and self.clip_factor * self.eps > TINY)
                parts.setdefault(g.device, []).append((p, g, place.groups, wide))
        smallest = [gradients.norms.new_ones(())]
        with torch.no_grad():
            if whole[0]:
                of_gradients = precise(torch.stack(whole[1]))
                of_weights = read_norms([p.detach() for p in whole[0]]).to(of_gradients)
                smallest.append(clip_each(whole[0], factors_of(of_gradients, self._bounds(of_weights))))
            smallest += [gathered(self._clip_parts(units)).to(gradients.norms) for units in parts.values()]
        return torch.stack(smallest).min()

    def _bounds(self, of_weights: Tensor) -> Tensor:
        return of_weights.clamp(min=self.eps) * self.clip_factor

    def _is_excluded(self, name: str) -> bool:
        if name not in self._excluded:
            self._excluded[name] = any(fnmatch.fnmatchcase(name, pattern) for pattern in self.exclude)
        return self._excluded[name]

    def _clip_parts(self, parts: Sequence[tuple[Tensor, Tensor, int, bool]]) -> Tensor:
        """Clip unit by unit what lies on one device.

        Args:
            parts: weight, gradient, groups of a transposed convolution (0: another layer), and whether to square in float64.

        Returns:
            The smallest factor.
        """
        targets, of_gradients, of_weights = [], [], []
        for p, g, groups, wide in parts:
            weight = p.detach()
            if g.is_sparse:
                summed = g.coalesce()
                target, weight = summed.values(), weight[summed.indices()[0]]
            else:
                summed, target, weight = g, _by_unit(g, groups), _by_unit(weight, groups)
            of_gradients.append(_unit_norms(target, groups, wide))
            of_weights.append(_unit_norms(weight, groups, wide))
            targets.append((g, summed, target))
        # All units of all parameters at once: a few calls, however many they are.
        flat = torch.cat([norm.flatten() for norm in of_gradients])
        factors = factors_of(flat, self._bounds(torch.cat([norm.flatten() for norm in of_weights])))
        host = on_host(factors)
        pieces = factors.split([norm.numel() for norm in of_gradients])  # type: ignore[no-untyped-call]
        for piece, norm, (g, summed, target) in zip(pieces, of_gradients, targets, strict=True):
            if not host or bool((piece < 1).any()):
                target.mul_(piece.view(norm.shape))
                if summed is not g:
                    g.copy_(summed)
        return factors.min() if factors.numel() else factors.new_ones(())


def _by_unit(tensor: Tensor, groups: int) -> Tensor:
    """A view in which units lie along dimension 0, or, of a transposed convolution `[in, out / groups, ...]`, along 0 and 2."""
    return tensor.unflatten(0, (groups, -1)) if groups else tensor  # type: ignore[no-untyped-call]


def _unit_norms(tensor: Tensor, groups: int, wide: bool) -> Tensor:
    """2-norm of each unit of what `_by_unit` gave, with the other dimensions kept as 1; half precision in float32."""
    dims = [dim for dim in range(1, tensor.dim()) if not (groups and dim == 2)]
    if not dims:
        return tensor.abs()
    dtype = torch.float64 if wide else torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else None
    if wide and tensor.is_complex():
        dtype = torch.complex128
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=dims, keepdim=True, dtype=dtype)
    return norms
