"""The reference itself, against numbers computed by hand."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests import reference as reference_module
from tests.reference import (
    CHANGED,
    CLEARED,
    CLIPPED,
    NO_STEP,
    REACHED,
    SCALER,
    STALE,
    STEPPED,
    Reference,
    nonfinite,
    norm,
    rms,
    sample,
)


class Dot(nn.Module):
    """`w·x + b` with w = (3, 4) and b = 0."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([3.0, 4.0]))
        self.b = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.w * x).sum() + self.b.sum()


X = torch.tensor([6.0, 8.0])


def run(reference: Reference, loss: torch.Tensor, scale: float = 1.0) -> None:
    reference.before_backward()
    (loss * scale).backward()
    reference.after_backward(loss * scale, scale=scale)


def step(reference: Reference, optimizer: torch.optim.Optimizer, **options: bool) -> None:
    reference.before_step(optimizer, **options)
    optimizer.step()
    reference.after_step(optimizer)


def test_a_plain_update_by_hand() -> None:
    model = Dot()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reference = Reference(model, optimizer)
    run(reference, model(X))
    step(reference, optimizer)
    reference.close()

    assert reference.parameters == ("w", "b")
    # The gradient of w·x + b is (6, 8) and 1; the step is 0.1 of it: RMS ratio 1/5 for w, undefined for b, which was zero.
    np.testing.assert_allclose(reference.stat("grad_norm"), [[10, 1]])
    np.testing.assert_allclose(reference.stat("weight_norm"), [[5, 0]])
    np.testing.assert_allclose(reference.stat("update_ratio"), [[0.2, math.nan]], rtol=1e-6)
    np.testing.assert_allclose(reference.stat("lr"), [[0.1, 0.1]])
    np.testing.assert_allclose(reference.stat("grad_nonfinite"), [[0, 0]])
    assert reference.stat("grad_state").tolist() == [[REACHED | STEPPED | CHANGED] * 2]
    assert reference.stat("loss").tolist() == [50]
    np.testing.assert_allclose(reference.stat("total_norm"), [math.sqrt(101)])
    assert [reference.stat(n).tolist() for n in ("clip_coef", "skipped", "skip_reason", "loss_scale", "backward_calls")] == [
        [1],
        [0],
        [0],
        [1],
        [1],
    ]


def test_accumulation_sums_the_roots_and_reads_the_accumulated_gradient() -> None:
    model = Dot()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reference = Reference(model, optimizer)
    run(reference, model(X) / 2)
    run(reference, model(X) / 2)
    step(reference, optimizer)
    reference.close()
    assert reference.stat("loss").tolist() == [50]
    assert reference.stat("backward_calls").tolist() == [2]
    np.testing.assert_allclose(reference.stat("grad_norm"), [[10, 1]])
    assert not (reference.stat("grad_state")[0].astype(int) & STALE).any()


def test_clipping_between_the_read_and_the_step_is_a_coefficient() -> None:
    model = Dot()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reference = Reference(model, optimizer)
    run(reference, model(X))
    for p in model.parameters():
        p.grad.mul_(0.25)
    step(reference, optimizer)
    reference.close()
    np.testing.assert_allclose(reference.stat("clip_coef"), [0.25])
    np.testing.assert_allclose(reference.stat("grad_norm"), [[10, 1]])
    assert reference.stat("grad_state").tolist() == [[REACHED | STEPPED | CHANGED | CLIPPED] * 2]


@pytest.mark.parametrize("scaled", [True, False], ids=["left to the optimizer", "divided before the step"])
def test_the_loss_scale_is_divided_out_and_is_no_clipping(scaled: bool) -> None:
    model = Dot()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reference = Reference(model, optimizer)
    run(reference, model(X), scale=64.0)
    if not scaled:
        for p in model.parameters():
            p.grad.div_(64)
    step(reference, optimizer, scaled=scaled)
    reference.close()
    assert reference.stat("loss").tolist() == [50]
    np.testing.assert_allclose(reference.stat("grad_norm"), [[10, 1]])
    assert reference.stat("clip_coef").tolist() == [1]
    assert reference.stat("loss_scale").tolist() == [64]


def test_a_gradient_used_before_and_never_cleared_is_stale_and_accumulation_is_not() -> None:
    model = Dot()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reference = Reference(model, optimizer)
    for update in range(4):
        if update == 2:
            optimizer.zero_grad(set_to_none=False)
        for _ in range(2):
            run(reference, model(X))
        step(reference, optimizer)
        reference.close()
    stale = (reference.stat("grad_state").astype(int) & STALE) != 0
    assert stale.tolist() == [[False] * 2, [True] * 2, [False] * 2, [True] * 2]


def test_a_gradient_cleared_between_its_read_and_the_step_is_flagged() -> None:
    model = Dot()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reference = Reference(model, optimizer)
    run(reference, model(X))
    optimizer.zero_grad()
    step(reference, optimizer)
    reference.close()
    assert reference.stat("grad_state").tolist() == [[REACHED | STEPPED | CLEARED] * 2]
    np.testing.assert_allclose(reference.stat("grad_norm"), [[10, 1]])
    np.testing.assert_allclose(reference.stat("update_ratio"), [[0, math.nan]])


@pytest.mark.parametrize("reason", [NO_STEP, SCALER])
def test_a_skipped_record_has_gradients_and_no_step(reason: int) -> None:
    model = Dot()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reference = Reference(model, optimizer)
    run(reference, model(X) * math.inf)
    reference.close(skip=reason)
    assert reference.stat("skipped").tolist() == [1]
    assert reference.stat("skip_reason").tolist() == [reason]
    assert reference.stat("grad_norm").tolist() == [[math.inf] * 2]
    assert reference.stat("grad_nonfinite").tolist() == [[2, 1]]
    assert reference.stat("total_norm").tolist() == [math.inf]
    assert np.isnan(reference.stat("lr")).all()
    assert np.isnan(reference.stat("update_ratio")).all()


def test_a_parameter_whose_owner_did_not_step_is_foreign_and_one_that_nobody_owns_is_kept_out_of_the_total() -> None:
    model = Dot()
    mine, other = torch.optim.SGD([model.w], lr=0.1), torch.optim.SGD([model.b], lr=0.1)
    reference = Reference(model, mine, other)
    run(reference, model(X))
    step(reference, mine)
    reference.close()
    assert reference.stat("total_norm").tolist() == [10]
    np.testing.assert_array_equal(reference.stat("grad_norm"), [[10, math.nan]])
    assert reference.stat("grad_state")[0, 1] == 0

    orphaned = Reference(model, mine)
    model.zero_grad()
    run(orphaned, model(X))
    step(orphaned, mine)
    orphaned.close()
    np.testing.assert_array_equal(orphaned.stat("grad_norm"), [[10, 1]])
    assert orphaned.stat("total_norm").tolist() == [10]


def test_weights_moved_by_hand_have_a_ratio_and_no_rate() -> None:
    model = Dot()
    reference = Reference(model)
    run(reference, model(X))
    with torch.no_grad():
        model.w -= 0.1 * model.w.grad
    reference.after_moving()
    reference.close()
    assert reference.stat("grad_state").tolist() == [[REACHED | CHANGED, REACHED]]
    np.testing.assert_allclose(reference.stat("update_ratio"), [[0.2, math.nan]], rtol=1e-6)
    assert np.isnan(reference.stat("lr")).all()
    np.testing.assert_allclose(reference.stat("total_norm"), [math.sqrt(101)])


def test_full_statistics_are_counted_for_each_set_of_owners() -> None:
    model = Dot()
    first, second = torch.optim.SGD([model.w], lr=0.1), torch.optim.SGD([model.b], lr=0.1)
    reference = Reference(model, first, second, dense=2, every=3)
    for update in range(10):
        model.zero_grad()
        run(reference, model(X))
        step(reference, second if update % 2 else first)
        reference.close()
    full = ~np.isnan(reference.stat("weight_norm"))
    assert full[0::2, 0].tolist() == [True, True, False, True, False]
    assert full[1::2, 1].tolist() == [True, True, False, True, False]


def test_a_parameter_added_later_is_not_observed_before() -> None:
    model = Dot()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reference = Reference(model, optimizer)
    run(reference, model(X))
    step(reference, optimizer)
    reference.close()
    model.register_parameter("c", nn.Parameter(torch.ones(1)))
    assert reference.parameters == ("w", "b", "c")
    np.testing.assert_array_equal(reference.stat("grad_norm"), [[10, 1, math.nan]])
    assert reference.stat("grad_state")[0, 2] == 0


def test_norms_of_every_kind_of_tensor() -> None:
    assert norm(torch.tensor([3 + 4j, 0j])) == 5
    assert norm(torch.full((4,), 3e38)) == pytest.approx(6e38)
    assert norm(torch.tensor([1e-30])) == pytest.approx(1e-30)
    assert norm(torch.empty(0)) == 0
    twice = torch.sparse_coo_tensor(torch.tensor([[1, 1]]), torch.tensor([3.0, 1.0]), (3,), check_invariants=True)
    assert norm(twice) == 4
    assert nonfinite(torch.tensor([1.0, math.nan, math.inf, -math.inf])) == 3
    assert nonfinite(torch.tensor([complex(math.nan, math.inf), 1j])) == 1
    assert math.isnan(rms(torch.empty(0)))


def test_the_sample_is_all_of_a_small_tensor_and_16_chunks_of_a_large_one() -> None:
    assert sample(torch.arange(1024.0)).tolist() == list(range(1024))
    large = sample(torch.arange(1600.0).reshape(40, 40))
    assert large.tolist() == [101 * i + j for i in range(16) for j in range(64)]


def test_the_reference_imports_nothing_of_what_it_checks() -> None:
    code = "import sys, tests.reference; sys.exit(any(name.split('.')[0] == 'gradwatch' for name in sys.modules))"
    root = Path(reference_module.__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
    assert subprocess.run([sys.executable, "-c", f"import gradwatch; {code}"], cwd=root, check=False).returncode == 1
