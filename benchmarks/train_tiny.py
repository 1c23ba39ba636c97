"""Train a small multi-head model in minutes, for methods that behave otherwise where queries are grouped.

    python benchmarks/train_tiny.py TEXT.txt --out MODEL --minutes 6

A decoder of the common kind (rotary positions, gated MLP, RMS norm), 5 blocks of width 160 with 5 heads,
on a byte-pair tokenizer of 2000 tokens that is trained on the same text: WikiText-2 validation and
Python's own documentation. One seed; the minutes are processor time, and the steps they allowed are
written in `training.json`.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eckart.text.data import load_windows

VOCABULARY, LENGTH, BATCH, RATE = 2000, 128, 16, 2e-3


def make_tokenizer(text: str) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(text.splitlines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=6, help="processor time")
    options = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = make_tokenizer(options.text.read_text(encoding="utf-8"))
    parts = [load_windows(s, tokenizer, windows=None, length=LENGTH).ids for s in (str(options.text), "python-docs")]
    windows = torch.cat(parts)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=160, intermediate_size=432, num_hidden_layers=5, num_attention_heads=5,
        num_key_value_heads=5, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    start, steps, loss = time.process_time(), 0, torch.zeros(())
    while (used := (time.process_time() - start) / (60 * options.minutes)) < 1:
        for group in optimizer.param_groups:  # warm-up, then linearly to zero as the time runs out
            group["lr"] = RATE * min(1, (steps + 1) / 50) * (1 - used)
        ids = windows[torch.randint(len(windows), (BATCH,))]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
        if steps % 50 == 0:
            print(f"step {steps}, loss {loss.item():.3f}, {used:.0%} of the time", flush=True)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    story = {"steps": steps, "tokens": steps * BATCH * LENGTH, "windows": len(windows), "last_loss": loss.item()}
    (options.out / "training.json").write_text(json.dumps(story, indent=1) + "\n")
    print(story)


if __name__ == "__main__":
    main()
