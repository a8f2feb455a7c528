"""What the architectures learn: one batch of a model's keyword arguments from each function, drawn from a generator of its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Batch = dict[str, Tensor]

FIRST, LAST, MASK = 4, 27, 3
"""Tokens of the text: FIRST to LAST - 1. Those below are the pad, start, end and mask tokens."""


def walks(generator: torch.Generator, length: int = 16) -> Tensor:
    """`[8, length]`: walks around the tokens, three at a time, from a random one."""
    start = torch.randint(0, LAST - FIRST, (8, 1), generator=generator)
    return FIRST + (start + 3 * torch.arange(length)) % (LAST - FIRST)


def continued(generator: torch.Generator) -> Batch:
    """The next token is to be told; the models shift the labels themselves."""
    tokens = walks(generator)
    return {"input_ids": tokens, "labels": tokens}


def masked(generator: torch.Generator) -> Batch:
    """A quarter of the tokens is to be filled in."""
    tokens = walks(generator)
    hidden = torch.rand(tokens.shape, generator=generator) < 0.25
    return {"input_ids": tokens.masked_fill(hidden, MASK), "labels": tokens.masked_fill(~hidden, -100)}


def marked(generator: torch.Generator) -> Batch:
    """The class of a text is the residue of its first token."""
    tokens = walks(generator)
    return {"input_ids": tokens, "labels": tokens[:, 0] % 4}


def tagged(generator: torch.Generator) -> Batch:
    """A class for each token."""
    tokens = walks(generator)
    return {"input_ids": tokens, "labels": tokens % 4}


def answered(generator: torch.Generator) -> Batch:
    """The answer stands between the token 5 and the next: its two ends are to be told."""
    tokens = walks(generator)
    start = torch.randint(0, 14, (8,), generator=generator)
    tokens[torch.arange(8), start] = LAST + 1
    return {"input_ids": tokens, "start_positions": start, "end_positions": start + 1}


def replaced(generator: torch.Generator) -> Batch:
    """Some tokens were replaced by others: which?"""
    tokens = walks(generator)
    wrong = torch.rand(tokens.shape, generator=generator) < 0.25
    return {"input_ids": torch.where(wrong, LAST + tokens % 4, tokens), "labels": wrong.long()}


def translated(generator: torch.Generator) -> Batch:
    """The same walk a token on."""
    tokens = walks(generator)
    return {"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


def bars(generator: torch.Generator, size: int = 16, classes: int = 4) -> tuple[Tensor, Tensor]:
    """`[8, 3, size, size]` pictures of noise with a bright bar, whose place is the class."""
    labels = torch.arange(8) % classes
    pictures = 0.5 * torch.randn(8, 3, size, size, generator=generator)
    width = size // classes
    for picture, label in zip(pictures, labels.tolist(), strict=True):
        picture[:, :, label * width : (label + 1) * width] += 1.5
    return pictures, labels


def pictures(generator: torch.Generator) -> Batch:
    values, labels = bars(generator)
    return {"pixel_values": values, "labels": labels}


def large_pictures(generator: torch.Generator) -> Batch:
    """For those that halve the size again and again."""
    values, labels = bars(generator, size=32)
    return {"pixel_values": values, "labels": labels}


def outlined(generator: torch.Generator) -> Batch:
    """Where is it bright?"""
    values, labels = bars(generator, size=32)
    columns = torch.arange(32)[None, None, :] // 8 == labels[:, None, None]
    return {"pixel_values": values, "labels": columns.expand(-1, 32, -1).long()}


def captioned(generator: torch.Generator) -> Batch:
    """Pictures and the texts that belong to them, all different."""
    values, _ = bars(generator, classes=8)
    tokens = FIRST + torch.arange(8)[:, None].expand(8, 6).clone()
    tokens[:, -1] = 2
    return {"input_ids": tokens, "pixel_values": values, "return_loss": torch.tensor(True)}


def tones(generator: torch.Generator, length: int = 800) -> Tensor:
    """`[8, length]`: sines of four pitches, in noise."""
    pitch = 2.0 ** (1 + torch.arange(8) % 4)[:, None]
    time = torch.linspace(0, 2 * math.pi, length)[None, :]
    phase = torch.rand(8, 1, generator=generator)
    return torch.sin(8 * pitch * time + phase) + 0.1 * torch.randn(8, length, generator=generator)


def sounds(generator: torch.Generator) -> Batch:
    return {"input_values": tones(generator), "labels": torch.arange(8) % 4}


def dictated(generator: torch.Generator) -> Batch:
    """Spectra of a sound, and its text."""
    tokens = walks(generator, 8)
    spectra = torch.randn(8, 8, 32, generator=generator)
    spectra[torch.arange(8), torch.arange(8)] += 3.0
    return {"input_features": spectra, "labels": tokens}


def spoken(generator: torch.Generator) -> Batch:
    """A sound and four tokens, in an order that nobody aligned."""
    return {"input_values": tones(generator), "labels": FIRST + torch.randint(0, 8, (8, 4), generator=generator)}


def series(generator: torch.Generator) -> Batch:
    """Sines and how they go on."""
    phase = 6 * torch.rand(8, 1, 1, generator=generator)
    values = torch.sin(phase + 0.5 * torch.arange(40)[None, :, None])
    return {"past_values": values[:, :32], "future_values": values[:, 32:]}
