"""Tiny random models of the decoders of transformers: width 32, two blocks or as many as it takes to have every kind.

A configuration class says which settings it has; each gets its value from `SMALL`, and `CORRECTIONS` holds what a
family wants beside. `names()` are the model types that have a causal language model, `build(name)` makes one.
"""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

Settings = dict[str, Any]

# A value and the settings that have it, by whatever names families know them.
_BY_VALUE: list[tuple[Any, str]] = [
    (0, "pad_token_id"),
    (0.2, "initializer_range init_std"),  # the usual 0.02 makes logits so flat that a wrong weight hardly shows
    (1, "bos_token_id n_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts n_groups "
        "mamba_n_groups mamba_ngroups first_k_dense_replace"),
    (2, "eos_token_id num_hidden_layers encoder_layers decoder_layers n_layer n_layers num_layers num_encoder_layers "
        "num_decoder_layers depth num_key_value_heads swa_num_key_value_heads linear_num_key_heads expand mamba_expand "
        "type_vocab_size num_experts_per_tok moe_topk moe_k top_k_experts index_n_heads"),
    (3, "num_channels"),
    (4, "num_attention_heads encoder_attention_heads decoder_attention_heads num_encoder_attention_heads "
        "num_decoder_attention_heads n_head n_heads num_heads swa_num_attention_heads linear_num_value_heads "
        "linear_num_heads num_experts num_local_experts n_routed_experts moe_num_experts conv_kernel mamba_d_conv "
        "linear_conv_kernel_dim time_step_rank mamba_dt_rank"),
    (8, "head_dim d_head qk_rope_head_dim qk_nope_head_dim v_head_dim swa_head_dim linear_head_dim linear_key_head_dim "
        "linear_value_head_dim mamba_d_state mamba_d_head mamba_head_dim mamba_n_heads mamba_num_heads state_size "
        "ssm_state_size mamba_chunk_size patch_size"),
    (16, "q_lora_rank kv_lora_rank qk_head_dim index_head_dim sliding_window image_size num_position_embeddings"),
    (32, "hidden_size d_model n_embd emb_dim embed_dim embedding_size out_hidden_size projection_dim "
         "moe_intermediate_size expert_ffn_hidden_size shared_intermediate_size shared_expert_intermediate_size "
         "shared_experts_intermediate_size moe_shared_expert_intermediate_size"),
    (64, "intermediate_size encoder_ffn_dim decoder_ffn_dim n_inner ffn_dim ffn_hidden_size dff d_inner index_topk "
         "prefix_dense_intermediate_size dense_intermediate_size intermediate_size_mlp"),
    (128, "vocab_size max_position_embeddings n_positions max_seq_len"),
    (True, "is_decoder"),
]  # fmt: skip
SMALL: Settings = {name: value for value, names in _BY_VALUE for name in names.split()}

_BOTH = ["sliding_attention", "full_attention"]
_FOUR: Settings = {"num_hidden_layers": 4}
_HYBRID = ["mamba", "mamba", "hybrid"] * 2
_GEMMA4: Settings = {
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128, "global_head_dim": 8, "num_hidden_layers": 4,
    "layer_types": _BOTH * 2,
}  # fmt: skip
_NGRAMS: Settings = {
    "num_hidden_layers": 4, "hc_count": 2, "hc_lowrank": 16, "ngram_vocab_size_base": 200,
    "make_ngram_vocab_size_divisible_by": 8, "heads_per_ngram": 2, "split_ngram_parts": 1, "indexer_n_heads": 2,
    "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16, "indexer_compress_ratio": 4,
}  # fmt: skip
_CHUNKED: Settings = {"layer_types": ["chunked_attention", "full_attention"]}
_LATENT = "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 dots3_note_text glm4_moe_lite glm_moe_dsa minicpm3 "
_LATENT += "sarvam_mla youtu"
_ALTERNATING = "afmoe cohere2 cohere2_moe cohere_compass_text exaone4 exaone_moe gemma3_text kolibri1 ministral olmo3"

# What a family wants beside `SMALL`; what is named by a sub-configuration goes to that.
CORRECTIONS: dict[str, Settings] = {
    **{name: {"num_key_value_heads": 4} for name in _LATENT.split()},
    **{name: {"layer_types": _BOTH} for name in _ALTERNATING.split()},
    **{name: _FOUR for name in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid")},
    **{name: {"text_config": _FOUR} for name in ("qwen3_5", "qwen3_5_moe")},
    "afmoe": {"num_dense_layers": 1, "layer_types": _BOTH},
    "bailing_hybrid": {"num_key_value_heads": 4, "layer_types": ["linear_attention", "full_attention"]},
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 8},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "deepseek_v4": {
        "o_lora_rank": 16, "o_groups": 2, "num_hidden_layers": 3, "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "layer_types": ["sliding_attention", "heavily_compressed_attention", "compressed_sparse_attention"],
    },
    "dots3_note": {"text_config": {"num_key_value_heads": 4}},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3": {"text_config": {"layer_types": _BOTH}},
    "gemma3n_text": {
        "num_hidden_layers": 4, "layer_types": _BOTH * 2, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 128, "laurel_rank": 8, "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
    },
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gpt_oss": {"sliding_window": 8},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "inkling2_loop_text": {"unpadded_vocab_size": 128},
    "inkling2_text": {"unpadded_vocab_size": 128},
    "inkling_text": {"unpadded_vocab_size": 128},
    "jamba": {
        "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 3,
        "expert_layer_offset": 1, "use_mamba_kernels": False,
    },
    "kimi_linear": {"num_key_value_heads": 4, "layer_types": ["linear_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3, "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "llama4": {"text_config": _CHUNKED},
    "llama4_text": _CHUNKED,
    "longcat_flash": {"num_key_value_heads": 4, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "minimax_m3_vl_text": {"rotary_dim": 8},
    "nemotron_h": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "attention", "mlp", "moe"]},
    "qwen4_exp": {"text_config": _NGRAMS},
    "qwen4_exp_text": _NGRAMS,
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16},
    "reformer": {
        "axial_pos_embds": False, "attn_layers": ["local", "lsh"], "feed_forward_size": 64, "attention_head_size": 8,
        "lsh_attn_chunk_length": 8, "local_attn_chunk_length": 8, "num_buckets": 4, "hash_seed": 0,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 32, "shape_vocab_size": 32, "pronunciation_embed_dim": 8, "shape_embed_dim": 8,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 6, "layers_block_type": _HYBRID, "attn_layer_period": 3, "attn_layer_offset": 2,
        "attention_head_dim": 16, "attention_hidden_size": 64, "n_mamba_heads": 2,
    },
    "zamba2": {
        "num_hidden_layers": 6, "layers_block_type": _HYBRID, "num_mem_blocks": 1, "n_mamba_heads": 8,
        "mamba_headdim": 8, "use_mem_eff_path": False, "adapter_rank": 4, "attention_head_dim": 16,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}  # fmt: skip


def names() -> list[str]:
    """Every model type that transformers has a causal language model for."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def build(name: str, seed: int = 0) -> Any:
    """The tiny model of a model type, float32, in evaluation mode; the same weights every time.

    Raises whatever the classes raise that cannot be made so small.
    """
    kind = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])
    config = small_config(CONFIG_MAPPING[name], CORRECTIONS.get(name, {}))
    wanted = kind.config_class
    if wanted is not None and not isinstance(config, wanted):
        config = config.get_text_config(decoder=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config)
        fill_(model)
    return model.eval()


def small_config(kind: Any, corrections: Mapping[str, Any] = {}) -> Any:
    """A configuration of a class with every setting that `SMALL` knows; its sub-configurations likewise."""
    settings = _settings(kind)
    chosen = {name: SMALL[name] for name in settings if name in SMALL}
    for alias, name in (getattr(kind, "attribute_map", None) or {}).items():
        if alias in SMALL and name in settings:
            chosen.setdefault(name, SMALL[alias])
    parts = getattr(kind, "sub_configs", None) or {}
    usual = kind() if any(part.__name__ == "AutoConfig" for part in parts.values()) else None
    for name, part in parts.items():
        part = type(getattr(usual, name, None)) if part.__name__ == "AutoConfig" else part
        if name in settings and hasattr(part, "model_type"):
            chosen[name] = small_config(part, corrections.get(name, {}))
    whole = {name: value for name, value in corrections.items() if name not in parts or name not in settings}
    return kind(**{**chosen, **whole})


def _settings(kind: Any) -> set[str]:
    if dataclasses.is_dataclass(kind):
        return {field.name for field in dataclasses.fields(kind)}
    return set(inspect.signature(kind.__init__).parameters)


@torch.no_grad()
def fill_(model: Any) -> None:
    """Numbers where a family leaves zeros, or memory as it was: a bias that is lost must show."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        elif not torch.isfinite(parameter).all() or parameter.abs().max() > 1e4:
            torch.nn.init.normal_(parameter, std=0.2)
    for buffer in model.buffers():
        if buffer.is_floating_point() and not torch.isfinite(buffer).all() and buffer.abs().max() != float("inf"):
            buffer.zero_()
