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
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
) -> list[str]:
    """The greedy continuation of each prompt, at most `new_tokens` tokens long, by the model of a name or folder."""
    loaded = checkpoint.load_model(str(model), device=device, trust_remote_code=trust_remote_code)
    reader = checkpoint.load_tokenizer(tokenizer or model, trust_remote_code)
    dtypes.compute_in_(loaded, dtype)
    texts = []
    for prompt in prompts:
        ids = reader(prompt, return_tensors="pt")["input_ids"].to(loaded.device)
        output = loaded.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, use_cache=True
        )
        texts.append(reader.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    return texts
