"""Tiny mixtures of experts, for tests: four experts in a layer, of which each token takes two."""

from collections.abc import Callable

from transformers import PreTrainedModel

from eckart.tiny import tiny_model

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_routed_experts": 4, "n_shared_experts": 1,
}  # fmt: skip

MIXTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "mixtral": lambda: tiny_model(
        "Mixtral", **HEADS, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2
    ),
    "qwen3-moe": lambda: tiny_model(
        "Qwen3Moe", **HEADS, head_dim=8, intermediate_size=48, moe_intermediate_size=16, num_experts=4,
        num_experts_per_tok=2, tie_word_embeddings=False,
    ),
    "olmoe": lambda: tiny_model("Olmoe", **HEADS, intermediate_size=16, num_experts=4, num_experts_per_tok=2),
    "gpt-oss": lambda: tiny_model(
        "GptOss", **HEADS, head_dim=8, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2,
        sliding_window=16, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        layer_types=["sliding_attention", "full_attention"],
    ),
    "deepseek-v3": lambda: tiny_model(
        "DeepseekV3", **HEADS | {"num_key_value_heads": 4}, **LATENT, intermediate_size=48, moe_intermediate_size=16,
        num_experts_per_tok=2,
    ),
}  # fmt: skip
