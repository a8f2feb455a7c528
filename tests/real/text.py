"""Architectures that read text."""

from __future__ import annotations

from torch import nn

from tests.real.case import architecture, transformers
from tests.real.data import answered, continued, marked, masked, replaced, tagged, translated

IDS = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

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


@architecture(continued, batches=4)
def olmo2() -> nn.Module:
    return transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**LLAMA))


@architecture(continued, batches=4)
def gemma3() -> nn.Module:
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**LLAMA, head_dim=8, sliding_window=8))


@architecture(continued, batches=4)
def gpt_oss() -> nn.Module:
    config = transformers.GptOssConfig(**LLAMA, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=8)
    return transformers.GptOssForCausalLM(config)


@architecture(continued, batches=4)
def deepseek_v3() -> nn.Module:
    config = transformers.DeepseekV3Config(
        **LLAMA | {"num_key_value_heads": 4},
        first_k_dense_replace=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=32,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    )
    return transformers.DeepseekV3ForCausalLM(config)


@architecture(continued, batches=4)
def qwen3_moe() -> nn.Module:
    config = transformers.Qwen3MoeConfig(
        **LLAMA, head_dim=8, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, output_router_logits=True
    )
    return transformers.Qwen3MoeForCausalLM(config)


@architecture(continued, batches=4)
def jamba() -> nn.Module:
    config = transformers.JambaConfig(
        **LLAMA,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=4,
        num_experts_per_tok=2,
        mamba_d_state=8,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    )
    return transformers.JambaForCausalLM(config)


@architecture(continued, batches=4)
def mamba2() -> nn.Module:
    config = transformers.Mamba2Config(
        **IDS, hidden_size=32, state_size=8, num_hidden_layers=2, num_heads=8, head_dim=8, n_groups=2, chunk_size=8
    )
    return transformers.Mamba2ForCausalLM(config)


@architecture(continued, batches=4)
def rwkv() -> nn.Module:
    config = transformers.RwkvConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        attention_hidden_size=32,
        intermediate_size=64,
        context_length=32,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.RwkvForCausalLM(config)


@architecture(continued, batches=4)
def recurrent_gemma() -> nn.Module:
    config = transformers.RecurrentGemmaConfig(
        **IDS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        lru_width=32,
        attention_window_size=8,
        head_dim=8,
    )
    return transformers.RecurrentGemmaForCausalLM(config)


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


@architecture(masked, lr=1e-2)
def modernbert() -> nn.Module:
    config = transformers.ModernBertConfig(
        **IDS,
        cls_token_id=1,
        sep_token_id=2,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=32,
        local_attention=8,
    )
    return transformers.ModernBertForMaskedLM(config)


@architecture(marked)
def fnet() -> nn.Module:
    return transformers.FNetForSequenceClassification(
        transformers.FNetConfig(
            **IDS, num_labels=4, hidden_size=32, intermediate_size=64, num_hidden_layers=2, max_position_embeddings=32
        )
    )


@architecture(tagged)
def funnel() -> nn.Module:
    config = transformers.FunnelConfig(
        vocab_size=32, block_sizes=[1, 1], num_decoder_layers=1, d_model=32, n_head=4, d_head=8, d_inner=64, num_labels=4
    )
    return transformers.FunnelForTokenClassification(config)


@architecture(tagged, flawed=True)
def canine() -> nn.Module:
    """Its model has a pooler, which tags of tokens do not pass."""
    config = transformers.CanineConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        num_hash_buckets=64,
        local_transformer_stride=8,
        downsampling_rate=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        num_labels=4,
    )
    return transformers.CanineForTokenClassification(config)


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
