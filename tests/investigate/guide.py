"""Write examples/guides/origins.md from the planted bugs, each of which is a test: `python -m tests.investigate.guide` (it prints)."""

from __future__ import annotations

from tests.investigate.planted import PLANTED

TEXT = """\
# Where a NaN or an Inf was born

Written by `python -m tests.investigate.guide` from the bugs of `tests/investigate/planted.py`; each row is a test.

While all is well, the watch holds references to what the update in flight was given, the state of torch's random generators, and the
gradient that comes back to the model's outputs (up to 64 MB), and lets go of them when the update closes. When the loss or a gradient
is not finite, the forward and the backward pass run once more *before the step*, with every operator watched: on aliases of the
parameters and copies of buffers and inputs, with the random numbers of the first time, the backward driven by the gradient that came
back then. Weights, gradients, buffers, random generators (of Python and numpy, too, and those that modules hold) and what modules keep in
their attributes, in lists, dictionaries, arrays and objects there, are as they were; hooks on parameters are not called; hooks on modules
run again, for they may be part of the computation, and what they write to is put back. `Alert.origin` then says where the value was born:

- `module`: the innermost one that was running; "" where that is the model itself, or the loss outside of it.
- `op`: the operator as `aten::name`, in both passes the forward one: `SqrtBackward0` is `aten::sqrt`.
- `phase`: "forward", "backward" (a derivative, while the loss is finite), "input" or "weight" (a buffer, too).
- `source`: the innermost line outside torch, yours rather than a library's.

A value that an operator made of an Inf is traced to that Inf, unless somebody has chosen it (a mask). What is masked on its way, and
reaches no output, is no fault of the forward pass; if its derivative spoils the gradient, that is told.

| bug | module | operator | pass | what is told |
|---|---|---|---|---|
{rows}

*Module, operator and line at once* is the rule for all that is born inside a model. *Operator only*: in the loss, outside the model, the
autograd graph shows operators and no lines. Where the loss itself is lost, the values that the graph still holds tell which operator lost it.
Where the loss is finite and the gradient is not, one is told if it is the only one there that can have such a derivative.
*On recurrence*: the next ten updates are traced as they run (some times slower), and the alert is completed, by the line or by which of several
operators it was, when it happens again; for that the weights have to be good still, so ask for `on_nonfinite="skip"`, or leave bad
updates out yourself.

## The mend

Where the line is one of yours, it is shown, and the smallest mend as a diff, if one is known: a clamp before a `log`, an eps inside a
root, the double `where`, a mask of the lowest number in place of -inf, `zero_infinity=True`. It is a suggestion: whether 1e-8 is small for
your numbers you know better. Where two places of the line could be meant, no mend is proposed, nor in half precision, where 1e-8 is 0.

## What cut a gradient's way

`missing_gradient` runs the forward pass once more, too, and follows what depends on the parameters that get nothing, from call to call:
the alert names the `detach()`, `.data`, `no_grad()`, `item()` or `numpy()`, or the operator whose result is no floating number, with its
line; or the output that depends on them and is not used in the loss.

## What is not told

- A value that does not come back is said not to be reproduced, and why, as far as that is seen: an input that was changed in place after the
  model was given it, state that the model keeps between forward passes, random numbers of Python or numpy, hooks on parameters; else
  "suspect nondeterminism or hardware".
- Of a model that is never called as a whole its parts are run again, as far as they are called (16 at most); what happens between them is
  outside. Name the parts: `GradWatch({"encoder": encoder, "decoder": decoder})`.
- Inside compiled code the module is told (`non_finite_activation`), not the operator. Once something has been compiled in a process, no
  update is traced as it runs there.
- Nothing is run again of TorchScript, of tensor subclasses (DTensor: other processes would have to take part), nor where a SyncBatchNorm
  waits for others.
- On a device the numbers come back an update late unless something waits for them (`clip`, `on_nonfinite="skip"` or `"raise"`): then a
  replay would run on spoilt weights, and none is made. `GradWatch(model, origin=True)` waits once an update.
- While a GradScaler searches its scale nothing is run again; once `loss_scale_collapse` is told, the next bad update is.
- What a forward pass does beside computing (it prints, writes to a file, counts in an object that it finds nowhere near itself) it does once
  more. One that is given an iterator, or what cannot be copied, is not run again.
- Gradients larger than 64 MB at the outputs are not held: then only the forward pass is replayed.
"""


def guide() -> str:
    """The text."""
    rows = []
    for bug in PLANTED:
        told = {
            "at once": "at once, with the line",
            "on recurrence": "on recurrence, with the line",
            "operator only": "operator only, at once",
        }
        what = told[bug.told] if bug.op and bug.phase != "input" else "at once, with its rows"
        elsewhere = "the loss" if bug.told != "at once" or (bug.op and bug.phase == "input") else "the model"
        module = f"`{bug.module}`" if bug.module else elsewhere
        rows.append(f"| {bug.what} | {module} | {f'`{bug.op}`' if bug.op else ''} | {bug.phase} | {what} |")
    return TEXT.replace("{rows}", "\n".join(rows))


if __name__ == "__main__":
    print(guide(), end="")
