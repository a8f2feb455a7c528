"""Architectures of `transformers`, built small from their configs: random weights, no network, and data they can learn.

`ARCHITECTURES` maps a name to an `Architecture`, whose `training()` seeds everything: two calls give two equal trainings. Dropout and the
like stay at the configs' defaults, for people train with them. Models return their own loss, as in the loops that people write.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.networks import Training

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[real]'")

UPDATES = 40
FIRST, LAST, MASK = 4, 27, 3
"""Tokens of the text: FIRST to LAST - 1. Those below are the pad, start, end and mask tokens."""
IDS = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

Batch = dict[str, Tensor]
Draw = Callable[[torch.Generator], Batch]


@dataclass(frozen=True)
class Architecture:
    """A model of `transformers` and what it is trained on.

    Attributes:
        build: a new model.
        draw: one batch of the model's keyword arguments.
        lr: learning rate of AdamW.
        batches: how many fixed batches the training goes through in turn.
    """

    build: Callable[[], nn.Module]
    draw: Draw
    lr: float
    batches: int

    def training(
        self,
        plant: Callable[[nn.Module], object] = lambda model: None,
        stepped: Callable[[nn.Module], Iterator[nn.Parameter]] = nn.Module.parameters,
        before: Callable[[nn.Module, int], object] = lambda model, i: None,
        zeroed: bool = True,
    ) -> Training:
        """A plain training loop; `update(i)` returns the loss as a number.

        Args:
            plant: changes the new model.
            stepped: the parameters that the optimizer gets.
            before: called with the model before each update.
            zeroed: clear the gradients in each update.
        """
        torch.manual_seed(0)
        np.random.seed(0)  # SpecAugment draws its masks from it
        model = self.build()
        model.train()  # built from a config, some start in evaluation mode
        plant(model)
        optimizer = torch.optim.AdamW(stepped(model), lr=self.lr)
        generator = torch.Generator().manual_seed(1)
        batches = [self.draw(generator) for _ in range(self.batches)]

        def update(i: int) -> float:
            before(model, i)
            if zeroed:
                optimizer.zero_grad()
            loss: Tensor = model(**batches[i % len(batches)]).loss
            loss.backward()
            optimizer.step()
            return float(loss.detach())

        return Training(model, (optimizer,), update)


ARCHITECTURES: dict[str, Architecture] = {}


def architecture(draw: Draw, lr: float = 3e-3, batches: int = 1) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    def add(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        ARCHITECTURES[build.__name__] = Architecture(build, draw, lr, batches)
        return build

    return add


# Data


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


# Decoders of text

LLAMA = {
    **IDS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


@architecture(continued, batches=4)
def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**IDS, n_embd=32, n_layer=2, n_head=4, n_positions=32))


@architecture(continued, batches=4)
def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))


@architecture(continued, batches=4)
def mistral() -> nn.Module:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**LLAMA, sliding_window=8))


@architecture(continued, batches=4)
def qwen2() -> nn.Module:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**LLAMA))


@architecture(continued, batches=4)
def gemma() -> nn.Module:
    return transformers.GemmaForCausalLM(transformers.GemmaConfig(**LLAMA, head_dim=8))


@architecture(continued, batches=4)
def phi() -> nn.Module:
    return transformers.PhiForCausalLM(transformers.PhiConfig(**LLAMA))


@architecture(continued, batches=4)
def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


@architecture(continued, batches=4)
def opt() -> nn.Module:
    config = transformers.OPTConfig(
        **IDS, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4
    )
    return transformers.OPTForCausalLM(config)


@architecture(continued, batches=4)
def gpt_neox() -> nn.Module:
    config = transformers.GPTNeoXConfig(
        **IDS, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=32
    )
    return transformers.GPTNeoXForCausalLM(config)


@architecture(continued, batches=4)
def falcon() -> nn.Module:
    config = transformers.FalconConfig(**IDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    return transformers.FalconForCausalLM(config)


@architecture(continued, batches=4)
def bloom() -> nn.Module:
    return transformers.BloomForCausalLM(transformers.BloomConfig(**IDS, hidden_size=32, n_layer=2, n_head=4))


@architecture(continued, batches=4)
def mamba() -> nn.Module:
    config = transformers.MambaConfig(**IDS, hidden_size=32, state_size=8, num_hidden_layers=2)
    return transformers.MambaForCausalLM(config)


@architecture(translated, batches=4)
def xlnet() -> nn.Module:
    config = transformers.XLNetConfig(**IDS, d_model=32, n_layer=2, n_head=4, d_inner=64)
    return transformers.XLNetLMHeadModel(config)


# Encoders of text

BERT = {
    **IDS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "num_labels": 4,
}


@architecture(masked)
def bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**BERT))


@architecture(marked)
def bert_classifier() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**BERT))


@architecture(marked)
def roberta() -> nn.Module:
    return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**BERT))


@architecture(answered)
def distilbert() -> nn.Module:
    config = transformers.DistilBertConfig(**IDS, dim=32, hidden_dim=64, n_layers=2, n_heads=4, max_position_embeddings=32)
    return transformers.DistilBertForQuestionAnswering(config)


@architecture(masked, lr=1e-2)
def albert() -> nn.Module:
    return transformers.AlbertForMaskedLM(transformers.AlbertConfig(**BERT, embedding_size=16))


@architecture(replaced)
def electra() -> nn.Module:
    return transformers.ElectraForPreTraining(transformers.ElectraConfig(**BERT, embedding_size=16))


@architecture(tagged)
def deberta_v2() -> nn.Module:
    config = transformers.DebertaV2Config(
        **BERT, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, norm_rel_ebd="layer_norm"
    )
    return transformers.DebertaV2ForTokenClassification(config)


# From one sequence to another


@architecture(translated, batches=4)
def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=32, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=0, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


BART = {
    "vocab_size": 32,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}


@architecture(translated, batches=4)
def bart() -> nn.Module:
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**BART, max_position_embeddings=32))


@architecture(dictated)
def whisper() -> nn.Module:
    config = transformers.WhisperConfig(**BART, num_mel_bins=8, max_source_positions=16, max_target_positions=32)
    return transformers.WhisperForConditionalGeneration(config)


# Sound


def _wav2vec2(**more: object) -> dict[str, object]:
    return {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "conv_dim": (16, 16, 16),
        "conv_stride": (5, 4, 2),
        "conv_kernel": (10, 4, 2),
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 4,
        "num_labels": 4,
        "classifier_proj_size": 16,
        **more,
    }


@architecture(sounds)
def wav2vec2() -> nn.Module:
    return transformers.Wav2Vec2ForSequenceClassification(transformers.Wav2Vec2Config(**_wav2vec2()))


@architecture(sounds)
def hubert() -> nn.Module:
    config = transformers.HubertConfig(**_wav2vec2(feat_extract_norm="layer", do_stable_layer_norm=True))
    return transformers.HubertForSequenceClassification(config)


# Pictures

VIT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 4,
}


@architecture(pictures)
def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VIT))


@architecture(pictures)
def deit() -> nn.Module:
    return transformers.DeiTForImageClassification(transformers.DeiTConfig(**VIT))


@architecture(pictures)
def beit() -> nn.Module:
    return transformers.BeitForImageClassification(transformers.BeitConfig(**VIT))


@architecture(pictures)
def dinov2() -> nn.Module:
    return transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**VIT))


@architecture(large_pictures)
def swin() -> nn.Module:
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4, num_labels=4
    )
    return transformers.SwinForImageClassification(config)


@architecture(large_pictures)
def convnext() -> nn.Module:
    config = transformers.ConvNextConfig(hidden_sizes=[16, 32, 32, 32], depths=[1, 1, 1, 1], num_labels=4)
    return transformers.ConvNextForImageClassification(config)


@architecture(large_pictures)
def resnet() -> nn.Module:
    config = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic", num_labels=4)
    return transformers.ResNetForImageClassification(config)


@architecture(large_pictures)
def mobilenet_v2() -> nn.Module:
    config = transformers.MobileNetV2Config(image_size=32, depth_multiplier=0.25, num_labels=4)
    return transformers.MobileNetV2ForImageClassification(config)


@architecture(outlined)
def segformer() -> nn.Module:
    config = transformers.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=32,
        num_labels=2,
    )
    return transformers.SegformerForSemanticSegmentation(config)


# Pictures with text


@architecture(captioned)
def clip() -> nn.Module:
    text = {**BERT, "projection_dim": 32}
    text.pop("num_labels")
    vision = {**VIT, "projection_dim": 32}
    vision.pop("num_labels")
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))
