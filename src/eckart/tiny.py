"""Tiny random models and a tiny tokenizer, for tests and contract checks."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 128
_LLAMA: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}


def tiny_models() -> "dict[str, Callable[[], PreTrainedModel]]":
    """Makers of tiny models by family: width 32, two blocks, float32, evaluation mode.

    Every call makes the same weights and leaves the global generator as it was.
    """
    return {
        "llama": lambda: tiny_model("Llama", **_LLAMA, tie_word_embeddings=False),
        "llama-tied": lambda: tiny_model("Llama", **_LLAMA, tie_word_embeddings=True),
        "llama-bias": lambda: tiny_model("Llama", **_LLAMA, attention_bias=True),
        "qwen3": lambda: tiny_model("Qwen3", **_LLAMA, head_dim=8),
        "mistral": lambda: tiny_model("Mistral", **_LLAMA, sliding_window=16),
        "gemma3": lambda: tiny_model("Gemma3", **_LLAMA, config="Gemma3TextConfig", head_dim=8),
        "phi3": lambda: tiny_model("Phi3", **_LLAMA, pad_token_id=0),
        "opt": lambda: tiny_model("OPT", num_attention_heads=4, ffn_dim=64, word_embed_proj_dim=32),
        "gpt-neox": lambda: tiny_model("GPTNeoX", num_attention_heads=4, intermediate_size=64),
        "gpt2": lambda: tiny_model("GPT2", lm_head="GPT2LMHeadModel", num_attention_heads=4),
    }


def tiny_model(
    family: str, *, config: str | None = None, lm_head: str | None = None, seed: int = 0, **options: Any
) -> "PreTrainedModel":
    """A tiny causal language model of a transformers family (`Llama`, `OPT`, ...).

    `options` go to the configuration class, whose name is `<family>Config` unless `config` says
    otherwise; `lm_head` is the model class if it is not `<family>ForCausalLM`.
    """
    import transformers

    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        # The usual 0.02 makes logits of a tiny model so flat that a wrong weight hardly shows.
        "initializer_range": 0.2,
        **options,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        configuration = getattr(transformers, config or f"{family}Config")(**settings)
        model: PreTrainedModel = getattr(transformers, lm_head or f"{family}ForCausalLM")(configuration)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)  # families start at zero, which hides a lost bias
    return model.eval()


def tiny_tokenizer() -> "PreTrainedTokenizerFast":
    """A tokenizer of single characters with `<s>` first, `</s>`, `<pad>` and a chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    characters = [chr(code) for code in range(32, 127)]
    vocabulary = {token: index for index, token in enumerate([*special, *characters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template="{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}",
    )
