"""Architectures that hear and see, and one that reads series of numbers."""

from __future__ import annotations

from torch import nn

from tests.real.case import architecture, transformers
from tests.real.data import captioned, dictated, large_pictures, outlined, pictures, series, sounds, spoken, translated
from tests.real.text import BART, BERT

# Sound


@architecture(dictated)
def whisper() -> nn.Module:
    config = transformers.WhisperConfig(**BART, num_mel_bins=8, max_source_positions=16, max_target_positions=32)
    return transformers.WhisperForConditionalGeneration(config)


@architecture(translated, batches=4)
def switch_transformers() -> nn.Module:
    config = transformers.SwitchTransformersConfig(
        vocab_size=32,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_decoder_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_heads=4,
        num_experts=4,
        expert_capacity=64,
        pad_token_id=0,
        decoder_start_token_id=0,
    )
    return transformers.SwitchTransformersForConditionalGeneration(config)


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


@architecture(sounds)
def wavlm() -> nn.Module:
    return transformers.WavLMForSequenceClassification(
        transformers.WavLMConfig(**_wav2vec2(num_buckets=16, max_bucket_distance=32))
    )


@architecture(spoken)
def wav2vec2_ctc() -> nn.Module:
    return transformers.Wav2Vec2ForCTC(
        transformers.Wav2Vec2Config(**_wav2vec2(vocab_size=32, pad_token_id=0, ctc_loss_reduction="mean"))
    )


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


@architecture(large_pictures)
def regnet() -> nn.Module:
    return transformers.RegNetForImageClassification(
        transformers.RegNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], groups_width=8, num_labels=4)
    )


@architecture(large_pictures)
def levit() -> nn.Module:
    config = transformers.LevitConfig(
        image_size=32,
        hidden_sizes=[16, 32, 32],
        num_attention_heads=[2, 4, 4],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
        mlp_ratio=[2, 2, 2],
        attention_ratio=[2, 2, 2],
        num_labels=4,
    )
    return transformers.LevitForImageClassification(config)


@architecture(large_pictures)
def poolformer() -> nn.Module:
    config = transformers.PoolFormerConfig(
        hidden_sizes=[16, 32], depths=[1, 1], patch_sizes=[7, 3], strides=[4, 2], padding=[2, 1], num_encoder_blocks=2, num_labels=4
    )
    return transformers.PoolFormerForImageClassification(config)


@architecture(large_pictures, flawed=True)
def efficientnet() -> nn.Module:
    """Its weights begin at a standard deviation of 0.02, which its narrow convolutions and unlearned statistics do not make up for."""
    config = transformers.EfficientNetConfig(
        image_size=32, width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320, num_labels=4
    )
    return transformers.EfficientNetForImageClassification(config)


# Pictures with text


@architecture(captioned)
def clip() -> nn.Module:
    text = {**BERT, "projection_dim": 32}
    text.pop("num_labels")
    vision = {**VIT, "projection_dim": 32}
    vision.pop("num_labels")
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))


# Series


@architecture(series)
def patchtst() -> nn.Module:
    config = transformers.PatchTSTConfig(
        num_input_channels=1,
        context_length=32,
        prediction_length=8,
        patch_length=4,
        patch_stride=4,
        d_model=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        loss="mse",
    )
    return transformers.PatchTSTForPrediction(config)
