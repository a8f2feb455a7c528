"""Runs that read, hear or forecast: recurrent nets, transformers, convolutions over time, adapters, experts and sequence policies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.zoo.case import Blobs, Case, Event, Proof, Setup, Text, classify, fit, healthy, sick
from tests.zoo.plain import Plain
from tests.zoo.proofs import (
    converges,
    dead_fraction,
    every,
    first_non_finite,
    gradient_grows,
    gradient_ratio,
    gradient_spikes,
    loss_grows,
    loss_stays,
    no_gradient,
    unchanged,
    update_ratio,
    zero_gradient,
)

CASES: list[Case] = []

NON_FINITE = ("non_finite_gradient", "non_finite_activation", "non_finite_loss", "non_finite_weight")


def other(*names: str) -> tuple[str, ...]:
    """The non-finite rules but these: what follows once one of them is there."""
    return tuple(rule for rule in NON_FINITE if rule not in names)


def loss_spikes(update: int, factor: float) -> Proof:
    """The loss of one update is more than `factor` times the median before it."""

    def proof(plain: Plain) -> str:
        ratio = plain.losses[update] / median(plain.losses[:update])
        assert ratio > factor, f"at update {update} the loss is {ratio:.3g} times the median, not {factor:g}"
        return f"at update {update} the loss is {ratio:.3g} times the median before it"

    return proof


def weights_break_after(update: int) -> Proof:
    """The gradients of an update are finite, and weights are NaN or Inf after its step."""

    def proof(plain: Plain) -> str:
        assert all(counts[update] == 0 for counts in plain.nonfinite.values()), "a gradient is not finite"
        assert all(math.isfinite(norms[update]) for norms in plain.weights.values()), "a weight is not finite before the step"
        bad = [name for name, norms in plain.weights.items() if not math.isfinite(norms[update + 1])]
        assert bad, "all weights are finite"
        return f"finite gradients at update {update}, and after its step NaN or Inf in {', '.join(bad)}"

    return proof


def saturates(module: str, above: float, updates: int) -> Proof:
    """The outputs of a tanh have an rms above `above` in each of the first updates: most lie in the flat part."""

    def proof(plain: Plain) -> str:
        least = min(o.rms for o in plain.outputs[module][:updates] if o is not None)
        assert least > above, f"the rms of {module} is {least:.3g}, not above {above}"
        return f"the outputs of {module} have an rms of {least:.3g} or more"

    return proof


def log_of(plain: Plain) -> list[float]:
    """What the loop of a run has noted."""
    model = plain.setup.model
    assert isinstance(model, (Recurrent, Forecast))
    return model.log


def carried_over(updates: int) -> Proof:
    """Before the backward of each of the updates, but the first, the gradients of the steps before are still there."""

    def proof(plain: Plain) -> str:
        kept = log_of(plain)[1:updates]
        assert all(k > 0 for k in kept), "a gradient was cleared"
        return f"the gradients of steps taken are still there before the next backward: {kept[0]:.3g} to {kept[-1]:.3g}"

    return proof


def idle(parameter: str, first: int) -> Proof:
    """From an update on a parameter has a gradient in every update and is moved by no step; before, it has none."""

    def proof(plain: Plain) -> str:
        assert all(n > 0 for n in plain.grads[parameter][first:]), f"{parameter} has no gradient"
        assert all(math.isnan(n) for n in plain.grads[parameter][:first]), f"{parameter} has a gradient before"
        assert all(n == 0 for n in plain.steps[parameter][first:]), f"{parameter} moves"
        return f"{parameter} has a gradient from update {first} on and never moves"

    return proof


def offset(module: str, above: float) -> Proof:
    """The outputs of the first layer have an rms above `above` in every update."""

    def proof(plain: Plain) -> str:
        least = min(o.rms for o in plain.outputs[module] if o is not None)
        assert least > above, f"the rms of {module} is {least:.3g}, not above {above}"
        return f"the outputs of {module} have an rms of {least:.3g} or more"

    return proof


def starts_at(loss: float) -> Proof:
    """The first loss is this."""

    def proof(plain: Plain) -> str:
        assert abs(plain.losses[0] - loss) < 1e-3, f"the first loss is {plain.losses[0]:.4g}"
        return f"the first loss is {loss:.4g}"

    return proof


# --- data ---------------------------------------------------------------------------------------------------------------------


class Waves:
    """Clips `[batch, 1, length]` of a tone in noise; the class is the pitch."""

    def __init__(self, seed: int, classes: int = 4, batch: int = 16, length: int = 64, noise: float = 0.3) -> None:
        self.generator = torch.Generator().manual_seed(4000 + seed)
        self.classes, self.batch, self.length, self.noise = classes, batch, length, noise

    def __call__(self) -> tuple[Tensor, Tensor]:
        y = torch.randint(self.classes, (self.batch,), generator=self.generator)
        phase = 2 * math.pi * torch.rand(self.batch, 1, generator=self.generator)
        pitch = 0.25 * (y + 1)[:, None]
        x = 1.4 * torch.sin(pitch * torch.arange(self.length) + phase)
        x = x + self.noise * torch.randn(self.batch, self.length, generator=self.generator)
        return x[:, None], y


class Series:
    """Windows of noisy oscillations: `[batch, length]` and the values that follow, `[batch, horizon]`."""

    def __init__(self, seed: int, batch: int = 16, length: int = 24, horizon: int = 4, noise: float = 0.05) -> None:
        self.generator = torch.Generator().manual_seed(5000 + seed)
        self.batch, self.length, self.horizon, self.noise = batch, length, horizon, noise

    def __call__(self) -> tuple[Tensor, Tensor]:
        speed = 0.3 + 0.3 * torch.rand(self.batch, 1, generator=self.generator)
        phase = 2 * math.pi * torch.rand(self.batch, 1, generator=self.generator)
        x = 1.4 * torch.sin(speed * torch.arange(self.length + self.horizon) + phase)
        x = x + self.noise * torch.randn(x.shape, generator=self.generator)
        return x[:, : self.length], x[:, self.length :]


class Utterances:
    """Spoken tokens: `frames [batch, time, features]`, their number, `tokens [batch, most]` (0 is the blank and the padding)."""

    def __init__(self, seed: int, tokens: int = 6, batch: int = 8, features: int = 12, most: int = 5) -> None:
        self.generator = torch.Generator().manual_seed(6000 + seed)
        self.sounds = 1.5 * torch.randn(tokens + 1, features, generator=self.generator)
        self.batch, self.most = batch, most

    def __call__(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        frames = torch.zeros(self.batch, 4 * self.most, self.sounds.shape[1])
        text = torch.zeros(self.batch, self.most, dtype=torch.long)
        spoken, written = torch.zeros(self.batch, dtype=torch.long), torch.zeros(self.batch, dtype=torch.long)
        for k in range(self.batch):
            n = int(torch.randint(2, self.most + 1, (1,), generator=self.generator))
            said = torch.randint(1, len(self.sounds), (n,), generator=self.generator)
            lasts = torch.randint(3, 5, (n,), generator=self.generator)
            sound = self.sounds[said.repeat_interleave(lasts)]
            frames[k, : len(sound)] = sound + 0.3 * torch.randn(sound.shape, generator=self.generator)
            text[k, :n], spoken[k], written[k] = said, len(sound), n
        return frames, spoken, text, written


# --- models -------------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A transformer block, pre-norm or post-norm, causal by a mask of -inf if wanted."""

    def __init__(self, width: int = 32, heads: int = 4, causal: bool = True, post: bool = False) -> None:
        super().__init__()
        self.heads, self.causal, self.post = heads, causal, post
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.act, self.down = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)

    def attend(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(width // self.heads)
        if self.causal:
            scores = scores + torch.full((length, length), -math.inf).triu(1)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)
        out: Tensor = self.proj(mixed)
        return out

    def forward(self, x: Tensor) -> Tensor:
        if self.post:
            x = self.norm1(x + self.attend(x))
            out: Tensor = self.norm2(x + self.down(self.act(self.up(x))))
            return out
        x = x + self.attend(self.norm1(x))
        inner: Tensor = self.down(self.act(self.up(self.norm2(x))))
        return x + inner


class Gpt(nn.Module):
    """A small language model; `tied`: the head is the embedding."""

    def __init__(self, vocabulary: int = 24, width: int = 32, depth: int = 2, tied: bool = False, post: bool = False) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(64, width)
        nn.init.normal_(self.tokens.weight, std=0.02 if tied else 0.5)
        nn.init.normal_(self.places.weight, std=0.02 if tied else 0.1)
        self.blocks = nn.ModuleList(Block(width, post=post) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.places(torch.arange(x.shape[1]))
        for block in self.blocks:
            h = block(h)
        out: Tensor = self.head(self.norm(h))
        return out


class Recurrent(nn.Module):
    """Embedding, a recurrent net, and a head at every step or at the last one."""

    def __init__(self, vocabulary: int = 24, width: int = 32, kind: Callable[..., nn.RNNBase] = nn.GRU, out: int = 24) -> None:
        super().__init__()
        self.log: list[float] = []  # what a proof wants to know of a run
        self.tokens, self.rnn, self.head = (
            nn.Embedding(vocabulary, width),
            kind(width, width, batch_first=True),
            nn.Linear(width, out),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.rnn(self.tokens(x))[0])
        return out


# --- sick: gradients along depth ----------------------------------------------------------------------------------------------


@sick(
    CASES,
    "sp_sigmoid_convolutions",
    ("vanishing_gradient",),
    tuple(str(i) for i in range(11)),
    source="https://proceedings.mlr.press/v9/glorot10a.html sigmoid layers, the deeper the less gradient",
    proof=every(gradient_ratio("0.weight", "14.weight", 1e-3, 0, 12), loss_stays(0.05)),
    also=("loss_plateau",),
)
def _(seed: int) -> Setup:
    channels = [1] + [16] * 8
    layers = [m for a, b in itertools.pairwise(channels) for m in (nn.Conv1d(a, b, 5, padding=2), nn.Sigmoid())]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    return fit(model, classify(model, Waves(seed, batch=32)), optimizer, 45)


class Caption(nn.Module):
    """What is seen sets the first state of a recurrent net; the answer is asked for after the last word."""

    def __init__(self, kind: Callable[..., nn.RNNBase]) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.Tanh())
        self.words = nn.Embedding(20, 16)
        self.rnn = kind(16, 32, batch_first=True)
        self.head = nn.Linear(32, 4)

    def forward(self, seen: Tensor, words: Tensor) -> Tensor:
        state = self.encoder(seen)[None]
        out: Tensor = self.head(self.rnn(self.words(words), state)[0][:, -1])
        return out


@sick(
    CASES,
    "sp_context_lost_in_long_rnn",
    ("vanishing_gradient",),
    ("encoder",),
    source="https://arxiv.org/abs/1211.5063 the difficulty of training recurrent neural networks over many steps",
    proof=every(
        gradient_ratio("encoder.0.weight", "head.weight", 1e-5, 0, 12),
        gradient_ratio("encoder.2.weight", "rnn.weight_hh_l0", 1e-4, 0, 12),
        loss_stays(0.1),
    ),
    also=("loss_plateau",),
)
def _(seed: int) -> Setup:
    model, data = Caption(nn.RNN), Blobs(seed)
    words = torch.Generator().manual_seed(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x, torch.randint(20, (len(x), 40), generator=words)), y)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), 40)


class GradMultiply(torch.autograd.Function):
    """The identity, whose gradient is multiplied."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, by: float) -> Tensor:
        ctx.by = by  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.by, None  # type: ignore[attr-defined]


class Wav(nn.Module):
    """Strided convolutions and a GRU, as for raw audio; `by` multiplies the gradient between convolutions."""

    def __init__(self, by: float = 1.0) -> None:
        super().__init__()
        self.by = by
        self.encoder = nn.ModuleList(
            nn.Sequential(nn.Conv1d(a, 24, 4, stride=2, padding=1), nn.GroupNorm(4, 24), nn.GELU()) for a in (1, 24, 24, 24)
        )
        self.rnn, self.head = nn.GRU(24, 24, batch_first=True), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.encoder:
            x = layer(x)
            if self.by != 1:
                x = GradMultiply.apply(x, self.by)  # type: ignore[no-untyped-call]
        out: Tensor = self.head(self.rnn(x.transpose(1, 2))[0][:, -1])
        return out


@sick(
    CASES,
    "sp_grad_multiplier_wrong_way",
    ("exploding_gradient",),
    ("encoder",),
    source="https://github.com/facebookresearch/fairseq/blob/main/fairseq/modules/grad_multiply.py feature_grad_mult, here 10 for 0.1",
    proof=every(
        gradient_ratio("head.weight", "encoder.0.0.weight", 1e-2, 0, 12),
        gradient_ratio("encoder.3.0.weight", "encoder.0.0.weight", 1e-2, 0, 12),
    ),
)
def _(seed: int) -> Setup:
    model = Wav(by=10.0)
    return fit(model, classify(model, Waves(seed)), torch.optim.Adam(model.parameters(), lr=2e-3), 45)


# --- sick: spikes, NaN and Inf ------------------------------------------------------------------------------------------------


def policy(seed: int, stale: int | None = None, updates: int = 60, noise: float = 0.0) -> Setup:
    """Off-policy gradient: a GRU reads tokens and picks one of six actions; the last token says which is right.

    In update `stale` the log-probabilities that came with the rollouts are those of another policy.
    """
    model = Recurrent(12, 32, out=6)
    data = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    def loss(i: int) -> Tensor:
        x = torch.randint(12, (48, 6), generator=data)
        logp = model(x)[:, -1].log_softmax(-1)
        action = torch.multinomial(logp.detach().exp(), 1, generator=data)
        new = logp.gather(1, action)[:, 0]
        reward = (action[:, 0] == x[:, -1] % 6).float()
        model.log.append(float(reward.mean()))
        reward = reward + noise * torch.randn(48, generator=data)
        old = new.detach() - (9.0 if i == stale else 0.0)
        gain: Tensor = (new - old).exp() * (reward - reward.mean())
        return -gain.mean()

    def clip(i: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    return fit(model, loss, optimizer, updates, between=clip)


@sick(
    CASES,
    "sp_stale_importance_weights",
    ("gradient_spike",),
    onset=35,
    source="https://github.com/huggingface/trl/issues/454 PPO ratio explosion and logprob of the behavior policy",
    proof=gradient_spikes(35, 300),
)
def _(seed: int) -> Setup:
    return policy(seed, stale=35, updates=50)


class Forecast(nn.Module):
    """Dilated causal convolutions with residuals; the last step says the values to come."""

    def __init__(self, width: int = 16, horizon: int = 4, depth: int = 3) -> None:
        super().__init__()
        self.log: list[float] = []  # what a proof wants to know of a run
        self.into = nn.Conv1d(1, width, 1)
        self.convs = nn.ModuleList(nn.Conv1d(width, width, 3, dilation=2**k) for k in range(depth))
        self.act, self.head = nn.ReLU(), nn.Linear(width, horizon)

    def forward(self, x: Tensor) -> Tensor:
        h = self.into(x[:, None])
        for k, conv in enumerate(self.convs):
            h = h + self.act(conv(F.pad(h, (2 * 2**k, 0))))
        out: Tensor = self.head(h[..., -1])
        return out


@sick(
    CASES,
    "sp_sensor_code_in_the_targets",
    ("gradient_spike", "loss_spike"),
    onset=30,
    source="https://www.ncei.noaa.gov/data/global-hourly/doc/isd-format-document.pdf 9999 stands for a missing value",
    proof=every(gradient_spikes(30, 50), loss_spikes(30, 1e4)),
)
def _(seed: int) -> Setup:
    model, data = Forecast(), Series(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        if i == 30:
            y[3, 1] = 9999.0
        return F.mse_loss(model(x), y)

    def clip(i: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9), 45, between=clip)


class LogMel(nn.Module):
    """Log energies of overlapping windows in bands."""

    bands: Tensor
    window: Tensor

    def __init__(self, bands: int = 8, size: int = 16, floor: float = 0.0) -> None:
        super().__init__()
        self.size, self.floor = size, floor
        centres, lines = torch.linspace(0, size / 2, bands), torch.arange(size // 2 + 1.0)
        self.register_buffer("bands", (1 - (lines[:, None] - centres).abs() / 1.5).clamp(min=0))
        self.register_buffer("window", torch.hann_window(size))

    def forward(self, x: Tensor) -> Tensor:
        frames = x[:, 0].unfold(-1, self.size, self.size // 2) * self.window
        return torch.log(torch.fft.rfft(frames).abs().square() @ self.bands + self.floor)


class Heard(nn.Module):
    """Log energies, normalised, and a bidirectional GRU."""

    def __init__(self, floor: float = 0.0) -> None:
        super().__init__()
        self.frontend, self.norm = LogMel(floor=floor), nn.LayerNorm(8)
        self.rnn, self.head = nn.GRU(8, 16, batch_first=True, bidirectional=True), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.rnn(self.norm(self.frontend(x)))[0].mean(1))
        return out


@sick(
    CASES,
    "sp_log_of_a_silent_clip",
    ("non_finite_activation",),
    ("frontend",),
    onset=25,
    source="https://github.com/SeanNaren/deepspeech.pytorch/issues/272 audio that is all zero gives NaN",
    proof=every(first_non_finite(25, "frontend"), first_non_finite(25)),
    also=other("non_finite_activation"),
)
def _(seed: int) -> Setup:
    model, data = Heard(), Waves(seed, noise=0.1)

    def loss(i: int) -> Tensor:
        x, y = data()
        if i == 25:
            x[5] = 0.0  # a muted microphone
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 40)


class Acoustic(nn.Module):
    """A recogniser for CTC."""

    def __init__(self, features: int = 12, tokens: int = 6, width: int = 24) -> None:
        super().__init__()
        self.into = nn.Conv1d(features, width, 3, padding=1)
        self.rnn = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, tokens + 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.into(x.transpose(1, 2))).transpose(1, 2)
        out: Tensor = self.head(self.rnn(h)[0])
        return out


def recognise(seed: int, updates: int, short: Callable[[int], bool], zero_infinity: bool) -> Setup:
    """CTC; `short(i)`: in update i a clip was cut to fewer frames than its transcript has tokens."""
    model, data = Acoustic(), Utterances(seed)

    def loss(i: int) -> Tensor:
        x, spoken, text, written = data()
        if short(i):
            spoken[2], text[2], written[2] = 3, torch.tensor([1, 2, 3, 4, 5]), 5
        logp = model(x).log_softmax(-1).transpose(0, 1)
        return F.ctc_loss(logp, text, spoken, written, zero_infinity=zero_infinity)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), updates)


@sick(
    CASES,
    "sp_ctc_clip_shorter_than_transcript",
    ("non_finite_loss",),
    onset=20,
    source="https://github.com/wenet-e2e/wenet/pull/2299 infinite CTC losses when the input is too short for the target",
    proof=first_non_finite(20),
    also=other("non_finite_loss"),
)
def _(seed: int) -> Setup:
    return recognise(seed, 35, lambda i: i == 20, zero_infinity=False)


@sick(
    CASES,
    "sp_entropy_of_forbidden_actions",
    ("non_finite_gradient",),
    onset=18,
    source="https://github.com/pytorch/pytorch/issues/68425 torch.where: NaN gradients from the branch not taken",
    proof=first_non_finite(18),
    also=other("non_finite_gradient"),
)
def _(seed: int) -> Setup:
    model = Recurrent(12, 32, kind=nn.LSTM, out=6)
    data = torch.Generator().manual_seed(seed)

    def loss(i: int) -> Tensor:
        x = torch.randint(12, (32, 6), generator=data)
        logits = model(x)[:, -1]
        if i >= 18:  # from here on a game has moves that are not allowed
            logits = logits.masked_fill((torch.arange(6) == 5) & (x[:, -1:] % 6 != 5), -math.inf)
        p = logits.softmax(-1)
        entropy = -torch.where(p > 0, p * p.log(), 0.0).sum(-1).mean()  # finite, but its gradient is 0 * inf
        return F.cross_entropy(logits, x[:, -1] % 6) - 0.01 * entropy

    return fit(model, loss, torch.optim.RMSprop(model.parameters(), lr=1e-3), 32)


@sick(
    CASES,
    "sp_missing_values_in_the_series",
    ("non_finite_input",),
    ("",),
    onset=22,
    source="https://pandas.pydata.org/docs/user_guide/missing_data.html gaps are read as NaN",
    proof=every(first_non_finite(22, "into"), first_non_finite(22)),
    also=NON_FINITE,
)
def _(seed: int) -> Setup:
    model, data = Forecast(), Series(seed, batch=24)

    def loss(i: int) -> Tensor:
        x, y = data()
        if i == 22:
            x[7, 10:13] = math.nan
        return F.smooth_l1_loss(model(x), y)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=3e-3), 36)


@sick(
    CASES,
    "sp_half_precision_adam",
    ("non_finite_weight",),
    source="https://discuss.pytorch.org/t/adam-half-precision-nans/1765 an eps of 1e-8 is zero in half precision",
    proof=every(weights_break_after(0), first_non_finite(1)),
    also=other("non_finite_weight"),
)
def _(seed: int) -> Setup:
    model = Recurrent(24, 24).half()
    return fit(model, classify(model, Text(seed)), torch.optim.Adam(model.parameters(), lr=2e-3), 16)


# --- sick: units, graph and optimizer -----------------------------------------------------------------------------------------


class Sparse(nn.Module):
    """A sparse autoencoder for the states of a language model."""

    def __init__(self, width: int = 32, latents: int = 128, threshold: float = 0.0) -> None:
        super().__init__()
        self.encoder, self.act, self.decoder = nn.Linear(width, latents), nn.ReLU(), nn.Linear(latents, width)
        nn.init.normal_(self.decoder.weight, std=latents**-0.5)
        with torch.no_grad():
            self.encoder.weight.copy_(F.normalize(self.decoder.weight.T, dim=1))
            self.encoder.bias.fill_(-threshold)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.act(self.encoder(x))
        return self.decoder(z), z


def explain(seed: int, threshold: float) -> Setup:
    states = torch.Generator().manual_seed(seed)
    words = torch.randn(24, 32, generator=states)
    model = Sparse(threshold=threshold)

    def loss(i: int) -> Tensor:
        x = words[torch.randint(24, (64,), generator=states)] + 0.3 * torch.randn(64, 32, generator=states)
        back, z = model(x)
        sparsity: Tensor = z.abs().sum(-1).mean()
        return F.mse_loss(back, x) + 1e-3 * sparsity

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-3), 60)


@sick(
    CASES,
    "sp_latents_of_a_sparse_autoencoder",
    ("dead_units",),
    ("act", "encoder"),
    source="https://arxiv.org/abs/2406.04093 dead latents in sparse autoencoders of language models",
    proof=every(dead_fraction("act", 0.6, 0, 15), dead_fraction("act", 0.5)),
    also=("poor_init",),
)
def _(seed: int) -> Setup:
    return explain(seed, threshold=3.2)  # "to make them sparse"


class Context(nn.Module):
    """The words before, side by side, and a hidden layer of tanh."""

    def __init__(self, wide: bool, vocabulary: int = 24, width: int = 16, words: int = 6) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.hidden, self.act, self.head = nn.Linear(words * width, 64), nn.Tanh(), nn.Linear(64, vocabulary)
        nn.init.normal_(self.hidden.weight, std=1.0 if wide else (words * width) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        windows = self.tokens(x).unfold(1, 6, 1).flatten(2)
        out: Tensor = self.head(self.act(self.hidden(windows)))
        return out


def look_back(seed: int, wide: bool) -> Setup:
    model, data = Context(wide), Text(seed, length=18)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x).flatten(0, 1), y[:, 5:].flatten())

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.2), 60)


@sick(
    CASES,
    "sp_tanh_of_wide_context",
    ("saturated_activation", "poor_init"),
    ("act", "hidden"),
    source="https://github.com/karpathy/nn-zero-to-hero makemore, part 3: a hidden layer of tanh that is saturated at init",
    proof=saturates("act", 0.9, 15),
)
def _(seed: int) -> Setup:
    return look_back(seed, wide=True)


class Lora(nn.Module):
    """A frozen Linear with an adapter of low rank beside it."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + 2 * self.b(self.a(x))
        return out


def adapt(model: Gpt) -> Gpt:
    """Freeze it and put adapters at the attention of every block; head and last norm stay trainable."""
    model.requires_grad_(False)
    for block in model.blocks:
        assert isinstance(block, Block)
        block.qkv, block.proj = Lora(block.qkv), Lora(block.proj)  # type: ignore[assignment]
    model.norm.requires_grad_(True)
    model.head.requires_grad_(True)
    return model


def pretrained(seed: int, updates: int = 120) -> Gpt:
    """A language model that knows the chain of another seed."""
    model, data = Gpt(), Text(seed + 50)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(updates):
        optimizer.zero_grad()
        x, y = data()
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    model.zero_grad()
    return model


class Checkpointed(Gpt):
    """Its blocks are run again in the backward pass, by the reentrant kind of checkpointing."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.places(torch.arange(x.shape[1]))
        for block in self.blocks:
            h = checkpoint(block, h, use_reentrant=True)
        out: Tensor = self.head(self.norm(h))
        return out


ADAPTERS = tuple(f"blocks.{k}.{where}.{which}" for k in range(2) for where in ("qkv", "proj") for which in ("a", "b"))


@sick(
    CASES,
    "sp_lora_behind_reentrant_checkpoint",
    ("missing_gradient",),
    ADAPTERS,
    source="https://github.com/cloneofsimo/lora/issues/26 gradient checkpointing blocks LoRA weight updates",
    proof=no_gradient(*(f"{name}.weight" for name in ADAPTERS)),
)
def _(seed: int) -> Setup:
    base = pretrained(seed)
    model = Checkpointed()
    model.load_state_dict(base.state_dict())
    adapt(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    return fit(model, classify(model, Text(seed)), optimizer, 45)


class Experts(nn.Module):
    """Feed-forward experts; the best `k` of a token are weighted by a softmax over them, or over all (`over_all`)."""

    def __init__(self, width: int = 32, experts: int = 4, k: int = 1, over_all: bool = False) -> None:
        super().__init__()
        self.router, self.k, self.over_all = nn.Linear(width, experts, bias=False), k, over_all
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)) for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x)
        best = scores.topk(self.k, -1).indices
        chosen = torch.zeros_like(scores).scatter(-1, best, 1.0)
        if self.over_all:
            gates = scores.softmax(-1) * chosen
        else:
            gates = scores.gather(-1, best).softmax(-1)
            gates = torch.zeros_like(scores).scatter(-1, best, gates)
        out = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            rows = chosen[..., k] > 0
            if rows.any():
                update = torch.zeros_like(x)
                update[rows] = gates[..., k][rows][:, None] * expert(x[rows])
                out = out + update
        return out


class Mixture(nn.Module):
    """A recurrent language model with a layer of experts."""

    def __init__(self, experts: int = 4, k: int = 1, over_all: bool = False) -> None:
        super().__init__()
        self.tokens, self.rnn = nn.Embedding(24, 32), nn.GRU(32, 32, batch_first=True)
        self.moe, self.norm, self.head = Experts(32, experts, k, over_all), nn.LayerNorm(32), nn.Linear(32, 24)

    def forward(self, x: Tensor) -> Tensor:
        h = self.rnn(self.tokens(x))[0]
        out: Tensor = self.head(self.norm(h + self.moe(h)))
        return out


@sick(
    CASES,
    "sp_router_of_one_expert",
    ("zero_gradient",),
    ("moe.router",),
    source="https://github.com/davidmrau/mixture-of-experts/issues/27 softmax over the one expert chosen: no gradient for the gate",
    proof=zero_gradient("moe.router.weight"),
    also=("frozen_weights",),
)
def _(seed: int) -> Setup:
    model = Mixture()
    return fit(model, classify(model, Text(seed)), torch.optim.Adam(model.parameters(), lr=4e-3), 50)


@sick(
    CASES,
    "sp_lora_of_two_zeros",
    ("zero_gradient",),
    ADAPTERS,
    source="https://github.com/nvidia-cosmos/cosmos-predict2.5/pull/15 A of LoRA ends up all zeros as B is: no training",
    proof=zero_gradient(*(f"{name}.weight" for name in ADAPTERS)),
    also=("frozen_weights",),
)
def _(seed: int) -> Setup:
    model = adapt(pretrained(seed))
    for name in ADAPTERS:
        nn.init.zeros_(model.get_submodule(name).weight)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    return fit(model, classify(model, Text(seed)), optimizer, 45)


@sick(
    CASES,
    "sp_zero_grad_once_an_epoch",
    ("gradients_not_zeroed",),
    source="https://stackoverflow.com/questions/48001598 why do we need to call zero_grad in PyTorch: gradients pile up",
    proof=every(carried_over(14), gradient_grows("head.bias", 4.0, 14)),
    also=("exploding_gradient",),
)
def _(seed: int) -> Setup:
    model, data = Recurrent(), Text(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train() -> Iterator[Event]:
        for _ in range(2):
            optimizer.zero_grad()
            for _ in range(25):
                x, y = data()
                value = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
                model.log.append(sum(float(p.grad.norm()) for p in model.parameters() if p.grad is not None))
                value.backward()  # type: ignore[no-untyped-call]
                yield "read", [value]
                optimizer.step()
                yield "step", [optimizer]

    return Setup(model, train)


class Tagger(nn.Module):
    """A bidirectional LSTM that marks every token."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"tokens": nn.Embedding(24, 24), "rnn": nn.LSTM(24, 24, batch_first=True, bidirectional=True)})
        self.hidden, self.act, self.head = nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.act(self.hidden(self.encoder["rnn"](self.encoder["tokens"](x))[0])))
        return out


def tag(seed: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """Tokens, and whether the token after and the token before are large."""
    data = torch.Generator().manual_seed(seed)

    def draw() -> tuple[Tensor, Tensor]:
        x = torch.randint(24, (16, 12), generator=data)
        return x, 2 * (x.roll(1, 1) >= 12).long() + (x.roll(-1, 1) >= 12).long()

    return draw


def thaw(seed: int, updates: int, joins: bool) -> Setup:
    """The head is trained first; from update 20 on the encoder, too, if it joins the optimizer."""
    model = Tagger()
    model.encoder.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def before(i: int) -> None:
        if i == 20:
            model.requires_grad_(True)
            if joins:
                optimizer.add_param_group({"params": list(model.encoder.parameters()), "lr": 7e-3})

    loss = classify(model, tag(seed))

    def train() -> Iterator[Event]:
        for i in range(updates):
            before(i)
            model.zero_grad()  # all of it, so that nothing piles up
            value = loss(i)
            value.backward()  # type: ignore[no-untyped-call]
            yield "read", [value]
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


@sick(
    CASES,
    "sp_thawed_but_never_given_to_the_optimizer",
    ("not_in_optimizer",),
    ("encoder",),
    onset=20,
    source="https://arxiv.org/abs/1801.06146 ULMFiT: gradual unfreezing; here the optimizer was made of what was thawed at the start",
    proof=every(*(idle(f"encoder.{name}", 20) for name in ("tokens.weight", "rnn.weight_ih_l0", "rnn.weight_hh_l0_reverse"))),
)
def _(seed: int) -> Setup:
    return thaw(seed, updates=50, joins=False)


class Listed(nn.Module):
    """Its convolutions are kept in a plain list, which registers nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.head = nn.Conv1d(1, 16, 1), nn.Linear(16, 4)
        self.convs = [nn.Conv1d(16, 16, 3, dilation=2**k) for k in range(4)]
        self.start = [conv.weight.detach().clone() for conv in self.convs]

    def forward(self, x: Tensor) -> Tensor:
        h = self.into(x[:, None])
        for k, conv in enumerate(self.convs):
            h = h + F.gelu(conv(F.pad(h, (2 * 2**k, 0))))
        out: Tensor = self.head(h[..., -1])
        return out


def outside(plain: Plain) -> str:
    """The layers of the list have gradients and are as they were made."""
    model = plain.setup.model
    assert isinstance(model, Listed)
    assert not any(name.startswith("convs") for name, _ in model.named_parameters()), "they are registered"
    for conv, start in zip(model.convs, model.start, strict=True):
        assert conv.weight.grad is not None, "no gradient"
        assert conv.weight.grad.norm() > 0, "no gradient"
        assert torch.equal(conv.weight, start), "moved"
    return "four convolutions of a list have gradients and never move"


@sick(
    CASES,
    "sp_convolutions_in_a_plain_list",
    ("not_in_optimizer",),
    source="https://shihaizhou.com/2020/05/17/Pytorch-nn-ModuleList-and-nn-Sequential/ parameters() does not look into lists",
    proof=outside,
    also=("gradients_not_zeroed",),  # nobody clears them either
)
def _(seed: int) -> Setup:
    model, data = Listed(), Series(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.mse_loss(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 45)


def never_moved(plain: Plain) -> str:
    """No update changes anything, and every parameter has gradients."""
    for name, steps in plain.steps.items():
        assert all(math.isnan(s) for s in steps), f"{name} is stepped"
        assert len(set(plain.weights[name])) == 1, f"{name} moves"
        assert all(n > 0 for n in plain.grads[name]), f"{name} has no gradient"
    return "gradients everywhere, and not one step"


@sick(
    CASES,
    "sp_accumulates_more_than_an_epoch",
    ("never_stepped",),
    source="https://github.com/huggingface/transformers/issues/2995 no optimizer steps: fewer batches in an epoch than accumulation steps",
    proof=never_moved,
    also=("loss_plateau",),
)
def _(seed: int) -> Setup:
    model, data = Gpt(depth=1), Text(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    nn.init.normal_(model.head.weight, std=0.1)

    def train() -> Iterator[Event]:
        for _ in range(5):
            optimizer.zero_grad()
            for batch in range(9):
                x, y = data()
                value = F.cross_entropy(model(x).flatten(0, 1), y.flatten()) / 16
                value.backward()  # type: ignore[no-untyped-call]
                yield "read", [value]
                stepped = (batch + 1) % 16 == 0
                if stepped:
                    optimizer.step()
                    optimizer.zero_grad()
                yield "step", [optimizer] if stepped else []

    return Setup(model, train)


class Light(nn.Module):
    """A recurrent language model with RMS norms around its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(24, 32)
        nn.init.normal_(self.tokens.weight, std=0.1)
        self.norms = nn.ModuleList(nn.RMSNorm(32, eps=1e-5) for _ in range(3))
        self.mix = nn.ModuleList(nn.Conv1d(32, 32, 3) for _ in range(2))
        self.head = nn.Linear(32, 24)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x)
        for norm, mix in zip(self.norms, self.mix, strict=False):
            h = h + F.silu(mix(F.pad(norm(h).transpose(1, 2), (2, 0)))).transpose(1, 2)
        out: Tensor = self.head(self.norms[-1](h))
        return out


def others_move(*parameters: str) -> Proof:
    """Each of these is changed by every step."""

    def proof(plain: Plain) -> str:
        for name in parameters:
            assert all(step > 0 for step in plain.steps[name]), f"{name} stands still"
        return f"{', '.join(parameters)} move"

    return proof


@sick(
    CASES,
    "sp_norms_frozen_by_bfloat16",
    ("frozen_weights",),
    ("norms",),
    source="https://github.com/vllm-project/speculators/pull/765 norm weights of exactly 1 after training in bf16",
    proof=every(unchanged("norms.0.weight", "norms.1.weight", "norms.2.weight"), others_move("mix.0.weight", "head.weight")),
)
def _(seed: int) -> Setup:
    model = Light().bfloat16()
    return fit(model, classify(model, Text(seed)), torch.optim.AdamW(model.parameters(), lr=1e-3), 45)


def skips(updates: int) -> Proof:
    """Every one of the first updates is skipped, and the loss scale ends below one."""

    def proof(plain: Plain) -> str:
        assert all(math.isnan(s) for steps in plain.steps.values() for s in steps[:updates]), "an optimizer stepped"
        assert all(math.isfinite(x) for x in plain.losses), "a loss is not finite"
        scale = log_of(plain)[updates - 1]
        assert scale < 1, f"the scale is {scale:g}"
        return f"{updates} skips in a row, then the scale is {scale:g}"

    return proof


@sick(
    CASES,
    "sp_half_precision_and_sixteen_bit_samples",
    ("loss_scale_collapse",),
    source="https://github.com/facebookresearch/fairseq/issues/512 overflow detected, the loss scale falls below 1",
    proof=skips(14),
    also=("non_finite_gradient", "never_stepped"),
)
def _(seed: int) -> Setup:
    model, data = Forecast(), Series(seed, batch=24)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)

    def train() -> Iterator[Event]:
        for _ in range(45):
            x, y = data()
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                out = model(x)
            # Squared errors in units of 16-bit samples, summed: fine for float32, but not for the gradients of float16.
            value = F.mse_loss(10000 * out.float(), 10000 * y, reduction="sum")
            scaled = scaler.scale(value)
            scaled.backward()  # type: ignore[no-untyped-call]
            yield "read", [value]
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            model.log.append(scaler.get_scale())
            yield "step", [optimizer] if scaler.get_scale() >= before else []

    return Setup(model, train)


# --- sick: step size, loss and data -------------------------------------------------------------------------------------------


@sick(
    CASES,
    "sp_learning_rate_lost_its_exponent",
    ("update_ratio_too_large",),
    source="https://karpathy.github.io/2019/04/25/recipe/ Adam wants about 3e-4; here 0.5 was typed for 5e-4",
    proof=update_ratio(above=0.5, first=0, last=4),
    also=("loss_diverging", "loss_spike", "gradient_spike", "exploding_gradient", "saturated_activation"),
)
def _(seed: int) -> Setup:
    model = Gpt()
    return fit(model, classify(model, Text(seed)), torch.optim.AdamW(model.parameters(), lr=0.5), 40)


@sick(
    CASES,
    "sp_from_scratch_at_the_rate_of_a_tuning",
    ("update_ratio_too_small",),
    source="https://arxiv.org/abs/2305.18290 DPO's 1e-6 is for a trained model; here one starts from scratch with a fifth of it",
    proof=every(update_ratio(below=1e-5), loss_stays(0.05)),
    also=("loss_plateau",),
)
def _(seed: int) -> Setup:
    model = Recurrent(kind=nn.LSTM)
    return fit(model, classify(model, Text(seed)), torch.optim.Adam(model.parameters(), lr=2e-7), 50)


@sick(
    CASES,
    "sp_linear_forecast_diverges",
    ("loss_diverging", "exploding_gradient", "update_ratio_too_large"),
    source="https://arxiv.org/abs/2205.13504 linear forecasters; gradient descent above 2 / curvature diverges",
    proof=every(loss_grows(100, 0, 13), loss_grows(1e4), gradient_grows("weight", 10, 13)),
)
def _(seed: int) -> Setup:
    data, model = Series(seed, batch=32, length=24), nn.Linear(24, 4)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.mse_loss(model(x), y)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.6), 30)


@sick(
    CASES,
    "sp_transcripts_of_other_clips",
    ("loss_plateau",),
    source="https://github.com/phlippe/uvadlc_notebooks/issues/34 loss does not change: the data was in a different order than its labels",
    proof=every(loss_stays(0.03, 0, 90), loss_stays(0.03)),
    within=100,  # of a plateau the design allows that many
)
def _(seed: int) -> Setup:
    model, clips, labels = Wav(), Waves(seed), Waves(seed + 7)

    def loss(i: int) -> Tensor:
        return F.cross_entropy(model(clips()[0]), labels()[1])  # two lists, sorted differently

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-3), 150)


class Sentences(nn.Module):
    """Convolutions of several widths over words, the largest value of each, and classes."""

    def __init__(self, soft: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(30, 24)
        self.convs = nn.ModuleList(nn.Conv1d(24, 16, k) for k in (2, 3, 4))
        self.head, self.softmax = nn.Linear(48, 5), nn.Softmax(-1) if soft else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x).transpose(1, 2)
        h = torch.cat([F.relu(conv(h)).amax(-1) for conv in self.convs], -1)
        out: Tensor = self.softmax(self.head(h))
        return out


def topics(seed: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """Sentences of common words and three of their topic."""
    data = torch.Generator().manual_seed(seed)

    def draw() -> tuple[Tensor, Tensor]:
        y = torch.randint(5, (24,), generator=data)
        x = torch.randint(15, (24, 12), generator=data)
        x[:, 4:7] = 15 + 3 * y[:, None] + torch.randint(3, (24, 3), generator=data)
        return x, y

    return draw


def probabilities(plain: Plain) -> str:
    """What goes into the cross-entropy are probabilities, and the loss cannot get below that of a sure and right answer."""
    seen = [o for o in plain.outputs["softmax"] if o is not None]
    assert min(o.low for o in seen) >= 0, "negative"
    assert max(o.high for o in seen) <= 1, "above one"
    floor = math.log(math.e + 4) - 1
    assert min(plain.losses) > floor - 1e-4, f"{min(plain.losses):.3g} is below the floor"
    return f"the logits are probabilities, no loss is below {floor:.3f}"


@sick(
    CASES,
    "sp_softmax_before_cross_entropy",
    ("double_softmax",),
    ("softmax",),
    source="https://discuss.pytorch.org/t/cross-entropy-loss-is-not-decreasing/43814 a softmax goes into the cross-entropy",
    proof=probabilities,
)
def _(seed: int) -> Setup:
    model = Sentences(soft=True)
    return fit(model, classify(model, topics(seed)), torch.optim.Adam(model.parameters(), lr=3e-3), 60)


def starts_above(loss: float) -> Proof:
    """The first loss is above a value that an answer by chance does not reach."""

    def proof(plain: Plain) -> str:
        assert plain.losses[0] > loss, f"the first loss is {plain.losses[0]:.3g}, not above {loss:.3g}"
        return f"the first loss is {plain.losses[0]:.3g}, above {loss:.3g}"

    return proof


@sick(
    CASES,
    "sp_pressure_in_hectopascal",
    ("unnormalized_input",),
    ("",),
    source="https://machinelearningmastery.com/how-to-scale-data-for-long-short-term-memory-networks-in-python/ raw series as input",
    proof=every(starts_above(1e3), offset("into", 100)),
    also=("poor_init",),
)
def _(seed: int) -> Setup:
    model, data = Forecast(), Series(seed, batch=24)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.mse_loss(model(1013 + 8 * x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-3), 45)


@sick(
    CASES,
    "sp_tied_embedding_of_unit_variance",
    ("poor_init",),
    ("tokens", "head"),
    source="https://github.com/karpathy/nanoGPT/blob/master/model.py tied embeddings start at 0.02; the default of nn.Embedding is 1",
    proof=starts_above(6 * math.log(24)),
)
def _(seed: int) -> Setup:
    model = Gpt(width=64, depth=1, tied=True)
    nn.init.normal_(model.tokens.weight)
    return fit(model, classify(model, Text(seed)), torch.optim.AdamW(model.parameters(), lr=1e-3), 45)


# --- healthy ------------------------------------------------------------------------------------------------------------------


def warm(optimizer: torch.optim.Optimizer, rate: float, over: int) -> Callable[[int], None]:
    """Sets the learning rate before an update: a warm-up that starts at 0."""

    def before(i: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, i / over)

    return before


@healthy(
    CASES,
    "sp_tied_language_model",
    source="https://arxiv.org/abs/1608.05859 tied embeddings; the rate warms up from 0, half of the vocabulary is never seen",
    proof=converges(0.65),
)
def _(seed: int) -> Setup:
    model = Gpt(vocabulary=48, tied=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.01)
    return fit(model, classify(model, Text(seed)), optimizer, 200, before=warm(optimizer, 6e-3, 20))


@healthy(
    CASES,
    "sp_ctc_of_padded_clips",
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.CTCLoss.html zero_infinity for clips that are too short",
    proof=converges(0.2),
)
def _(seed: int) -> Setup:
    return recognise(seed, 180, lambda i: i % 9 == 4, zero_infinity=True)


class Translate(nn.Module):
    """Reads tokens and says them backwards; the token before is the true one with probability `forced`, else its own."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(8, 16), nn.Embedding(9, 16)
        self.encoder, self.decoder, self.head = nn.GRU(16, 48, batch_first=True), nn.GRUCell(16, 48), nn.Linear(48, 8)

    def forward(self, x: Tensor, y: Tensor, forced: float) -> Tensor:
        state = self.encoder(self.source(x))[1][0]
        token, outs = torch.full((len(x),), 8), []
        for k in range(y.shape[1]):
            state = self.decoder(self.target(token), state)
            outs.append(self.head(state))
            token = torch.where(torch.rand(len(x)) < forced, y[:, k], outs[-1].argmax(-1))
        return torch.stack(outs, 1)


@healthy(
    CASES,
    "sp_teacher_forcing_ends",
    source="https://docs.pytorch.org/tutorials/intermediate/seq2seq_translation_tutorial.html every other token is forced, later none",
    proof=converges(0.15),
)
def _(seed: int) -> Setup:
    model = Translate()
    data = torch.Generator().manual_seed(seed)

    def loss(i: int) -> Tensor:
        x = torch.randint(8, (48, 4), generator=data)
        return F.cross_entropy(model(x, x.flip(1), 0.5 if i < 120 else 0.0).flatten(0, 1), x.flip(1).flatten())

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 250)


class Languages(nn.Module):
    """A language model with a feed-forward layer for each language; a batch is of one language, so the others idle."""

    def __init__(self, languages: int = 4) -> None:
        super().__init__()
        self.tokens, self.rnn = nn.Embedding(24, 32), nn.GRU(32, 32, batch_first=True)
        self.adapters = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)) for _ in range(languages))
        self.head = nn.Linear(32, 24)

    def forward(self, x: Tensor, language: int) -> Tensor:
        h = self.rnn(self.tokens(x))[0]
        out: Tensor = self.head(h + self.adapters[language](h))
        return out


def takes_turns(*parameters: str) -> Proof:
    """Each of these has a gradient in some updates and none in others."""

    def proof(plain: Plain) -> str:
        for name in parameters:
            share = sum(not math.isnan(n) for n in plain.grads[name]) / len(plain.losses)
            assert 0.1 < share < 0.5, f"{name} has a gradient in {share:.2g} of the updates"
        return f"{', '.join(parameters)} idle in more than half of the updates"

    return proof


@healthy(
    CASES,
    "sp_idle_language_experts",
    source="https://arxiv.org/abs/1909.08478 an adapter for each language of a translator",
    proof=every(converges(0.7), takes_turns(*(f"adapters.{k}.0.weight" for k in range(4)))),
)
def _(seed: int) -> Setup:
    model, texts = Languages(), [Text(seed + 10 * k) for k in range(4)]
    order = torch.Generator().manual_seed(seed)
    turns = torch.cat([torch.randperm(4, generator=order) for _ in range(60)]).tolist()

    def loss(i: int) -> Tensor:
        x, y = texts[turns[i]]()
        return F.cross_entropy(model(x, turns[i]).flatten(0, 1), y.flatten())

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=5e-3), 240)


@healthy(
    CASES,
    "sp_lora_on_a_frozen_base",
    source="https://arxiv.org/abs/2106.09685 LoRA: the base is frozen, B starts at zero",
    proof=every(converges(0.6), others_move("blocks.0.qkv.b.weight", "blocks.1.proj.b.weight")),
)
def _(seed: int) -> Setup:
    model = adapt(pretrained(seed))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3)
    return fit(model, classify(model, Text(seed)), optimizer, 150)


def earns(first: float, last: float) -> Proof:
    """The mean reward of the first ten updates is below `first`, that of the last ten above `last`."""

    def proof(plain: Plain) -> str:
        rewards = log_of(plain)
        a, b = sum(rewards[:10]) / 10, sum(rewards[-10:]) / 10
        assert a < first, f"it starts with {a:.3g}"
        assert b > last, f"it ends with {b:.3g}"
        return f"the reward rises from {a:.2g} to {b:.2g}"

    return proof


@healthy(
    CASES,
    "sp_reinforce_with_noisy_rewards",
    source="https://link.springer.com/article/10.1007/BF00992696 REINFORCE; the loss hovers around zero and says nothing",
    proof=earns(0.35, 0.85),
)
def _(seed: int) -> Setup:
    return policy(seed, updates=200, noise=0.3)


class Stateful(nn.Module):
    """A language model that carries its state from one piece of a text to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.rnn, self.head = nn.Embedding(24, 32), nn.LSTM(32, 48, batch_first=True), nn.Linear(48, 24)
        nn.init.uniform_(self.tokens.weight, -0.1, 0.1)
        self.state: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        h, (a, b) = self.rnn(self.tokens(x), self.state)
        self.state = a.detach(), b.detach()
        out: Tensor = self.head(h)
        return out


def always_above(norm: float) -> Proof:
    """The norm of all gradients is above this in every update, so that clipping at it always acts."""

    def proof(plain: Plain) -> str:
        least = min(math.sqrt(sum(g[i] ** 2 for g in plain.grads.values())) for i in range(len(plain.losses)))
        assert least > norm, f"the norm of all gradients falls to {least:.3g}"
        return f"the norm of all gradients is {least:.3g} or more"

    return proof


@healthy(
    CASES,
    "sp_truncated_backprop_always_clipped",
    source="https://github.com/pytorch/examples/tree/main/word_language_model SGD with a large rate, clipped, the state carried over",
    proof=every(converges(0.7), always_above(0.08)),
)
def _(seed: int) -> Setup:
    model, data = Stateful(), Text(seed, length=12)
    tail = torch.randint(24, (8,), generator=data.generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=6.0)

    def loss(i: int) -> Tensor:
        nonlocal tail
        out, t = [tail], tail
        for _ in range(12):  # the text goes on where the last piece ended
            t = torch.multinomial(data.table[t], 1, generator=data.generator)[:, 0]
            out.append(t)
        tail, x = t, torch.stack(out, 1)
        return F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())

    def clip(i: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 0.08)

    return fit(model, loss, optimizer, 220, between=clip)


@healthy(
    CASES,
    "sp_sequences_grow_longer",
    source="https://arxiv.org/abs/2108.06084 a curriculum of sequence lengths",
    proof=converges(0.7),
)
def _(seed: int) -> Setup:
    model, data = Gpt(depth=1), Text(seed, length=32)

    def loss(i: int) -> Tensor:
        length = min(32, 4 * 2 ** (i // 50))
        x, y = data()
        return F.cross_entropy(model(x[:, :length]).flatten(0, 1), y[:, :length].flatten())

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=4e-3), 200)


@healthy(
    CASES,
    "sp_linear_prediction_to_the_last_digit",
    source="https://en.wikipedia.org/wiki/Linear_predictive_coding two tones are predicted without error: loss and gradients go to zero",
    proof=converges(1e-6),
)
def _(seed: int) -> Setup:
    model, data = nn.Linear(4, 1), torch.Generator().manual_seed(seed)
    tones = torch.tensor([0.7, 2.1])

    def loss(i: int) -> Tensor:
        phase = 2 * math.pi * torch.rand(64, 2, 1, generator=data)
        x = torch.sin(tones[:, None] * torch.arange(5.0) + phase).sum(1)
        return F.mse_loss(model(x[:, :4]), x[:, 4:])

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-2), 400)


class Post(nn.Module):
    """A post-norm encoder for padded sentences."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(24, 32, padding_idx=0), nn.Embedding(16, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) * 5 + self.places(torch.arange(x.shape[1]))
        out: Tensor = self.head(self.encoder(h, src_key_padding_mask=x == 0))
        return out


@healthy(
    CASES,
    "sp_post_norm_warms_up",
    source="https://arxiv.org/abs/2002.04745 post-norm transformers need a warm-up",
    proof=converges(0.4),
)
def _(seed: int) -> Setup:
    model, data = Post(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.9, 0.98))

    def loss(i: int) -> Tensor:
        x = torch.randint(1, 24, (24, 10), generator=data)
        lengths = torch.randint(5, 11, (24, 1), generator=data)
        real = torch.arange(10) < lengths
        y = ((x >= x[:, :1]) & real).long()  # is it at least the first word?
        return F.cross_entropy(model(x * real)[real], y[real])

    return fit(model, loss, optimizer, 180, before=warm(optimizer, 2e-3, 40))


@healthy(
    CASES,
    "sp_restarts_and_accumulation",
    source="https://arxiv.org/abs/1608.03983 warm restarts; four small batches make one update",
    proof=converges(0.15),
)
def _(seed: int) -> Setup:
    model, data = Forecast(), Series(seed, batch=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.015, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 30)

    def train() -> Iterator[Event]:
        for _ in range(120):
            optimizer.zero_grad()
            losses = []
            for _ in range(4):
                x, y = data()
                losses.append(F.mse_loss(model(x), y) / 4)
                losses[-1].backward()  # type: ignore[no-untyped-call]
            yield "read", losses
            optimizer.step()
            schedule.step()
            yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "sp_thawed_and_given_to_the_optimizer",
    source="https://arxiv.org/abs/1801.06146 gradual unfreezing: what is thawed joins the optimizer, with a smaller rate",
    proof=converges(0.4),
)
def _(seed: int) -> Setup:
    return thaw(seed, updates=160, joins=True)


@healthy(
    CASES,
    "sp_preferences_against_a_reference",
    source="https://arxiv.org/abs/2305.18290 direct preference optimisation: a frozen reference, a loss that starts at log 2",
    proof=every(converges(0.4), starts_at(math.log(2))),
)
def _(seed: int) -> Setup:
    actor, reference = pretrained(seed, 60), Gpt()
    reference.load_state_dict(actor.state_dict())
    reference.requires_grad_(False)
    data, optimizer = Text(seed), torch.optim.AdamW(actor.parameters(), lr=3e-4)

    def likely(model: Gpt, x: Tensor, y: Tensor) -> Tensor:
        of: Tensor = model(x).log_softmax(-1).gather(-1, y[..., None]).sum((1, 2))
        return of

    def train() -> Iterator[Event]:
        for _ in range(80):
            x, y = data()
            worse = torch.randint(24, (len(x), 17), generator=data.generator)
            worse[:, 0] = x[:, 0]
            a, b = worse[:, :-1], worse[:, 1:]
            margin = likely(actor, x, y) - likely(reference, x, y) - likely(actor, a, b) + likely(reference, a, b)
            value = -F.logsigmoid(0.1 * margin).mean()
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            yield "read", [value]
            optimizer.step()
            yield "step", [optimizer]

    return Setup({"actor": actor, "reference": reference}, train)


class Highway(nn.Module):
    """Highway layers over a window of characters; the gates start almost closed."""

    def __init__(self, depth: int = 4, width: int = 48) -> None:
        super().__init__()
        self.tokens, self.into = nn.Embedding(24, 12), nn.Linear(48, width)
        self.layers, self.gates = (nn.ModuleList(nn.Linear(width, width) for _ in range(depth)) for _ in range(2))
        self.act, self.gate, self.head = nn.ReLU(), nn.Sigmoid(), nn.Linear(width, 24)
        for gate in self.gates:
            nn.init.constant_(gate.bias, -4.0)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        h = self.into(self.tokens(x).unfold(1, 4, 1).flatten(2))
        for layer, gate in zip(self.layers, self.gates, strict=True):
            t = self.gate(gate(h))
            h = t * self.act(layer(h)) + (1 - t) * h
        out: Tensor = self.head(h)
        return out


@healthy(
    CASES,
    "sp_highway_gates_almost_closed",
    source="https://arxiv.org/abs/1505.00387 highway networks: the gates' biases start at -4",
    proof=converges(0.65),
)
def _(seed: int) -> Setup:
    model, data = Highway(), Text(seed, length=19)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x).flatten(0, 1), y[:, 3:].flatten())

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 160)


class Bags(nn.Module):
    """Means of word vectors, whose gradients are sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(400, 24, sparse=True), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.bag(x))
        return out


@healthy(
    CASES,
    "sp_sparse_bag_of_rare_words",
    source="https://docs.pytorch.org/docs/stable/generated/torch.optim.SparseAdam.html two optimizers; most words are never seen",
    proof=converges(0.2),
)
def _(seed: int) -> Setup:
    model, data = Bags(), topics(seed)
    sparse = torch.optim.SparseAdam(list(model.bag.parameters()), lr=2e-2)
    dense = torch.optim.Adam(model.head.parameters(), lr=1e-2)

    def train() -> Iterator[Event]:
        for _ in range(120):
            x, y = data()
            sparse.zero_grad()
            dense.zero_grad()
            value = 100 * F.cross_entropy(model(x), y)  # in percent of a nat
            value.backward()  # type: ignore[no-untyped-call]
            yield "read", [value]
            sparse.step()  # type: ignore[no-untyped-call]
            dense.step()
            yield "step", [sparse, dense]

    return Setup(model, train)


class Both(nn.Module):
    """A bidirectional GRU with an auxiliary head on its first layer; the residual and both heads start at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.low = nn.Embedding(24, 24), nn.GRU(24, 24, batch_first=True, bidirectional=True)
        self.high, self.out = nn.GRU(48, 24, batch_first=True, bidirectional=True), nn.Linear(48, 48)
        self.auxiliary, self.head = nn.Linear(48, 4), nn.Linear(48, 4)
        for layer in (self.out, self.auxiliary, self.head):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low = self.low(self.tokens(x))[0]
        return self.head(low + self.out(self.high(low)[0])), self.auxiliary(low)


@healthy(
    CASES,
    "sp_zero_heads_and_auxiliary_loss",
    source="https://arxiv.org/abs/1901.09321 Fixup: last layers of residual branches and heads start at zero",
    proof=converges(0.3),
)
def _(seed: int) -> Setup:
    model, data = Both(), tag(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        main, auxiliary = model(x)
        return F.cross_entropy(main.flatten(0, 1), y.flatten()) + 0.3 * F.cross_entropy(auxiliary.flatten(0, 1), y.flatten())

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 130)
