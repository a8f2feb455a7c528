"""The verdict and the summary, over histories made by hand."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gradwatch.history import History, Meta, Pending
from gradwatch.present.layers import Layers, latest, median, spread
from gradwatch.present.report import summary, verdict
from gradwatch.records import Severity, SkipReason
from tests.present.runs import alert, chain, history_of, seen

NAN = math.nan
ROOT = Path(__file__).parents[2]


# -- the verdict -------------------------------------------------------------------------------------------------------------------


def test_a_healthy_run_gets_one_line_with_updates_layers_spread_and_cost() -> None:
    history = history_of({"a": ("weight",), "b": ("weight",)}, np.tile([1.0, 7.3], (12, 1)))
    assert verdict(history, [], cost_per_update=4e-4, share=0.006) == [
        "✓ gradwatch: healthy after 12 updates; gradient norms within ×7.3 over 2 layers; cost 0.4 ms an update, 0.6 %"
    ]


def test_info_alone_is_healthy() -> None:
    assert "healthy after" in verdict(chain(3), [alert(severity=Severity.INFO)])[0]


def test_few_updates_are_not_called_healthy() -> None:
    assert "too few to call it healthy" in verdict(chain(3, updates=9), [])[0]
    assert "healthy after 10 updates" in verdict(chain(3, updates=10), [])[0]


def test_findings_are_told_with_place_and_time_the_open_and_severe_ones_first() -> None:
    alerts = [
        alert("gradient_spike", step=3, last_step=3, state="ended", layers=("",)),
        alert("vanishing_gradient", layers=("a", "b", "c", "d", "e")),
        alert("exploding_gradient", severity=Severity.ERROR, step=7, last_step=19, layers=("out",)),
    ]
    first, second = verdict(chain(3), alerts)
    assert first == (
        "✗ gradwatch: 3 findings in 20 updates: exploding gradient in out since step 7; "
        "vanishing gradient in a, b and 3 more since step 0; gradient spike in the model at step 3 (ended)"
    )
    assert second.startswith("  gradient norms within ")


def test_a_run_whose_findings_are_over_says_so() -> None:
    (first, _) = verdict(chain(3), [alert(severity=Severity.ERROR, state="ended")])
    assert first.startswith("▲ gradwatch: 1 finding in 20 updates, over by now: ")


def test_many_findings_do_not_make_a_long_verdict() -> None:
    alerts = [alert("gradient_spike", step=step, last_step=step) for step in range(100)] + [alert(f"rule_{i}") for i in range(50)]
    lines = verdict(chain(3), alerts)
    assert len(lines) == 2
    assert len(lines[0]) < 400
    assert "gradient spike 100 times from step 0 on" in lines[0]
    assert "48 others in watch.alerts" in lines[0]


def test_skipped_and_unfinished_updates_and_notices_are_told() -> None:
    skipped = [t < 3 for t in range(12)]
    reasons = [SkipReason.SCALER if s else SkipReason.NONE for s in skipped]
    history = history_of({"a": ("weight",)}, np.ones((12, 1)), skipped=skipped, skip_reason=reasons)
    (line,) = verdict(history, [], unfinished=1, notices=2)
    assert (
        "; 3 updates skipped by the GradScaler; 1 update left unfinished (backward without a step); 2 notices in watch.notices"
        in line
    )
    assert "cost" not in line


def test_a_block_without_an_update_is_not_called_healthy() -> None:
    (line,) = verdict(History(Meta()), [], unfinished=1)
    assert "no update was seen" in line
    assert "healthy" not in line


def test_findings_without_an_update_are_told_with_the_backward_passes() -> None:
    history = chain(2, updates=0)
    history.pending = Pending(backward_calls=64)
    never = alert("never_stepped", layers=(), parameters=(), step=0, last_step=0)
    assert verdict(history, [never], unfinished=1) == [
        "▲ gradwatch: 1 finding, no update was completed (64 backward passes): the optimizer never steps"
    ]
    assert verdict(history, [never], notices=1, stopped_by="KeyboardInterrupt")[1:] == [
        "  stopped by KeyboardInterrupt; 1 notice in watch.notices"
    ]
    assert "seen before the first update" in summary(history, [never])


def test_backward_passes_that_completed_no_update_are_told() -> None:
    history = chain(2, updates=0)
    history.pending = Pending(backward_calls=1)
    assert verdict(history, [], unfinished=1) == [
        "▲ gradwatch: no update was completed (1 backward pass), so nothing was judged",
    ]


@pytest.mark.parametrize(
    ("updates", "said"),
    [
        pytest.param(0, "stopped by ValueError, no update was seen, so nothing was judged", id="before-the-first"),
        pytest.param(1, "stopped by ValueError after 1 update, nothing found before; ", id="after-one"),
        pytest.param(12, "stopped by ValueError after 12 updates, nothing found before; ", id="after-enough-for-health"),
    ],
)
def test_a_run_that_an_exception_ended_is_not_called_healthy(updates: int, said: str) -> None:
    (line,) = verdict(chain(3, updates=updates), [], stopped_by="ValueError")
    assert line.startswith(f"▲ gradwatch: {said}")
    assert "healthy" not in line
    assert "stopped by ValueError" in " ".join(summary(chain(3, updates=updates), [], stopped_by="ValueError").split())


def test_findings_of_a_run_that_an_exception_ended_come_first() -> None:
    first, second = verdict(chain(3), [alert()], stopped_by="ValueError")
    assert "1 finding in 20 updates" in first
    assert second.startswith("  stopped by ValueError; gradient norms within")


# -- the spread --------------------------------------------------------------------------------------------------------------------


def test_the_spread_takes_layers_not_parameters_and_medians_not_the_last_record() -> None:
    norms = np.tile([3.0, 4.0, 1.0], (9, 1))
    norms[-1] = [1e6, 1e6, 1e-6]
    apart = spread(history_of({"a": ("weight", "bias"), "b": ("weight",)}, norms))
    assert apart is not None
    assert apart.ratio == pytest.approx(5.0)
    assert apart.layers == 2


def test_the_spread_leaves_out_what_was_not_observed_and_counts_zeros_and_nans() -> None:
    norms = np.tile([2.0, 1.0, 0.0, NAN, 50.0], (9, 1))
    names = ("a", "b", "zero", "unseen", "bad")
    history = history_of(dict.fromkeys(names, ("weight",)), norms, grad_nonfinite=np.tile([0, 0, 0, NAN, 7], (9, 1)))
    apart = spread(history)
    assert apart is not None
    assert (apart.ratio, apart.layers, apart.zero, apart.non_finite) == (2.0, 2, 1, 1)
    assert "gradient norms within ×2.0 over 2 layers, exactly zero in 1 layer, NaN or Inf in 1 layer" in verdict(history, [])[0]


def test_a_layer_whose_gradient_has_gone_bad_counts_as_bad_however_good_it_was_before() -> None:
    history = history_of({"a": ("weight",), "b": ("weight",)}, np.ones((30, 2)), grad_nonfinite=[[0, 0]] * 28 + [[3, 0]] * 2)
    assert "1 layer, NaN or Inf in 1 layer" in verdict(history, [])[0]
    history = history_of({"a": ("weight",)}, np.ones((30, 1)), grad_nonfinite=[[0]] * 28 + [[3]] * 2)
    assert "; gradient NaN or Inf in 1 layer" in verdict(history, [])[0]


def test_an_overflow_that_the_scaler_skipped_at_the_end_is_no_bad_gradient() -> None:
    nonfinite, reasons = [[0]] * 28 + [[3]] * 2, [SkipReason.NONE] * 28 + [SkipReason.SCALER] * 2
    history = history_of({"a": ("weight",)}, np.ones((30, 1)), grad_nonfinite=nonfinite, skip_reason=reasons)
    assert "NaN" not in verdict(history, [])[0]
    assert Layers.of(history).states(history, []) == ["ok"]


def test_the_spread_honours_the_scope() -> None:
    history = history_of({"a": ("weight",), "b": ("weight",), "c": ("weight",)}, np.tile([1.0, 2.0, 1e9], (9, 1)), hidden=("c",))
    apart = spread(history)
    assert apart is not None
    assert apart.ratio == 2.0


def test_without_gradients_there_is_no_spread() -> None:
    assert spread(history_of({"a": ("weight",)}, np.full((3, 1), NAN))) is None
    assert spread(History(Meta())) is None


def test_median_and_latest_agree_with_numpy_over_what_was_observed() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((9, 40))
    values[rng.random(values.shape) < 0.4] = NAN
    values[:, 7] = NAN
    values[:, 8] = np.inf
    for column, (middle, last) in enumerate(zip(median(values), latest(values), strict=True)):
        seen = values[~np.isnan(values[:, column]), column]
        assert middle == np.median(seen) if len(seen) else math.isnan(middle)
        assert last == seen[-1] if len(seen) else math.isnan(last)


# -- the summary -------------------------------------------------------------------------------------------------------------------


def test_the_summary_tells_everything_in_ascii() -> None:
    alerts = [
        alert(layers=tuple(f"layers.{i}" for i in range(5))),
        alert("missing_gradient", severity=Severity.INFO, message="×7 – слой"),
    ]
    text = summary(chain(6, factor=5.0), alerts, cost_per_update=4e-5, share=0.0001, notices=["attached after compiling"])
    assert text.isascii()
    assert "WARNING vanishing_gradient (open), seen in 11 updates from step 0 to 10" in text
    assert "  where: layers.0, layers.1, layers.2, layers.3 and layers.4" in text
    assert max(map(len, text.splitlines())) <= 80
    assert "  why:   each sigmoid passes on at most a quarter of the gradient." in text
    assert "  try:   use ReLU or GELU in its place." in text
    assert "INFO missing_gradient" in text
    assert "loss 2.3 -> 2.2" in text
    assert "cost 40 us an update, under 0.1 %" in " ".join(text.split())
    assert "notice: attached after compiling" in text
    assert len(re.findall(r"^layers\.\d ", text, re.MULTILINE)) == 6


@pytest.mark.parametrize(
    ("loss", "terms", "said"),
    [
        pytest.param([2.0, 1.5, 1.0], [1, 1, 1], "loss 2 -> 1", id="finite"),
        pytest.param([2.0, 1.5, NAN], [1, 1, 1], "loss 2 -> NaN, last finite: 1.5 at step 1", id="nan-now"),
        pytest.param([2.0, math.inf, NAN], [1, 1, 1], "loss 2 -> NaN, last finite: 2 at step 0", id="inf-then-nan"),
        pytest.param([NAN, NAN, NAN], [1, 1, 1], "loss NaN -> NaN, never finite", id="never-finite"),
        pytest.param([2.0, NAN, 1.0], [1, 1, 1], "loss 2 -> 1, NaN or Inf in 1 update", id="nan-between"),
        pytest.param([2.0, 1.5, NAN], [1, 1, 0], "loss 2 -> 1.5", id="not-seen-at-last"),
        pytest.param([NAN, NAN, NAN], [0, 0, 0], None, id="never-seen"),
    ],
)
def test_the_summary_hides_no_loss_that_is_not_finite_now(loss: list[float], terms: list[int], said: str | None) -> None:
    text = summary(history_of({"a": ("weight",)}, np.ones((3, 1)), loss=loss, loss_terms=terms), [])
    assert [line.strip() for line in text.splitlines() if line.startswith("  loss")] == ([] if said is None else [said])


def test_the_last_finite_loss_has_its_step_where_not_all_updates_are_kept() -> None:
    loss = [2.0] * 6 + [1.5, NAN]
    history = history_of({"a": ("weight",)}, np.ones((8, 1)), loss=loss, loss_terms=[1] * 8, window=4)
    assert "  loss 2 -> NaN, last finite: 1.5 at step 6 (updates 4 to 7, the ones kept)" in summary(history, [])


def test_the_summary_has_the_activations_and_every_name_in_one_piece() -> None:
    lines = summary(seen(3), []).splitlines()
    (row,) = [line for line in lines if line.startswith("fc1 ")]
    assert row.split() == ["fc1", "Linear", "1", "----------", "x1.4", "0.5", "3", "0.001", "ok"]
    (row,) = [line for line in lines if line.startswith("act1 ")]
    assert row.split() == ["act1", "ReLU", "x0.70", "0.5", "50", "0"]
    assert max(map(len, lines)) <= 82
    long = "encoder.layer.11.attention.output.with_a_long_name.and_more_of_it"
    history = history_of({long: ("weight",)}, np.ones((12, 1)), gain=np.full((12, 2), 2.0), weight_norm=np.full((12, 1), 3.0))
    (row,) = [line for line in summary(history, []).splitlines() if line.startswith(long)]
    assert row.split()[1:] == ["Linear", "1", "x2.0", "3", "-", "ok"], "every number is there, the trend is not"


@pytest.mark.parametrize(
    ("mean", "std", "bad", "said"),
    [
        pytest.param([0.5, NAN, NAN], [1.0, NAN, NAN], [0.0, NAN, NAN], "mean 0.5, standard deviation 1", id="seen-at-first"),
        pytest.param([0.5, 121.0, NAN], [1.0, 70.0, NAN], [0, 0, NAN], "mean 121, standard deviation 70", id="the-last-look"),
        pytest.param(
            [0.5, NAN, NAN], [1.0, NAN, NAN], [0, 3, NAN], "not finite: 3 elements NaN or Inf in the sample of update 1", id="nan"
        ),
        pytest.param([NAN] * 3, [NAN] * 3, [NAN] * 3, None, id="never-seen"),
    ],
)
def test_the_summary_tells_of_the_input_where_it_is_known(
    mean: list[float], std: list[float], bad: list[float], said: str | None
) -> None:
    history = history_of({"a": ("weight",)}, np.ones((3, 1)), input_mean=mean, input_std=std, input_nonfinite=bad)
    told = [line.removeprefix("  input ") for line in summary(history, []).splitlines() if line.startswith("  input")]
    assert told == ([] if said is None else [said])


def test_the_summary_of_a_watch_that_was_never_attached_says_so() -> None:
    assert summary(chain(1, updates=0), [], attached=False).startswith(
        "! gradwatch: it was never attached, so nothing was judged\n"
    )


def test_the_summary_of_nothing_at_all_has_no_table() -> None:
    assert summary(History(Meta()), []) == "! gradwatch: no update was seen, so nothing was judged"


def test_reports_are_made_without_torch() -> None:
    script = """
import sys
import numpy as np
from gradwatch.present.console import ConsoleSink
from gradwatch.present.picture import fall
from gradwatch.present.report import summary, table, verdict
from tests.present.runs import alert, chain
ConsoleSink()(alert())
ConsoleSink().print_lines(verdict(chain(3), [alert()]))
summary(chain(3), [alert()]), table(chain(3), [alert()]), fall(chain(3))
assert "torch" not in sys.modules and "tqdm" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, cwd=ROOT)
