"""What a model writes: greedy continuations, for people to read side by side."""

from collections.abc import Sequence
from pathlib import Path

import torch

from eckart.checkpoints import checkpoint
from eckart.support import dtypes

PROMPTS = ("The lifetime of a variable in Python", "The capital of France is", "Once upon a time, in a village")
NEW_TOKENS = 40


@torch.inference_mode()
def write(
    model: str | Path,
    prompts: Sequence[str] = PROMPTS,
    *,
    new_tokens: int = NEW_TOKENS,
    device: str = "cpu",
    dtype: str = "auto",
) -> list[str]:
    """The greedy continuation of each prompt, at most `new_tokens` tokens long, by the model of a name or folder."""
    loaded, tokenizer = checkpoint.load_model(str(model), device=device), checkpoint.load_tokenizer(model)
    dtypes.compute_in_(loaded, dtype)
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(loaded.device)
        output = loaded.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, use_cache=True
        )
        texts.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    return texts
