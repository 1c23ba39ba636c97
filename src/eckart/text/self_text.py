"""Windows that a model writes itself: calibration without any text."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from eckart.errors import DataError, NumericalError
from eckart.model import kv_cache
from eckart.progress import Progress, silent

BATCH = 16  # windows written side by side


def write_windows(
    model: Any,
    tokenizer: Any,
    lead: list[int],
    count: int | None,
    length: int,
    generator: torch.Generator | None,
    progress: Progress = silent,
) -> Tensor:
    """Ids `[count, length]`, written at temperature 1 in the model's own dtype and on its own device.

    Each window starts with `lead`, or with any ordinary token if that is empty; no special ones follow.
    Raises `DataError` without a model or a count, `NumericalError` for logits that are not finite.
    """
    if model is None:
        raise DataError("self: needs the model that writes the text, and none was given; name a text instead.")
    if count is None:
        raise DataError("self: a model writes without end; say how many windows with --windows or self:N.")
    generator = generator or torch.Generator().manual_seed(0)
    ordinary = _ordinary_ids(tokenizer, model.get_input_embeddings().weight.shape[0])
    was_training = model.training
    model.eval()
    try:
        sizes = [min(BATCH, count - start) for start in range(0, count, BATCH)]
        batches = []
        for number, size in enumerate(sizes, 1):
            stage = f"write text {number}/{len(sizes)}"
            starts = _starts(ordinary, lead, size, generator)
            batches.append(_write(model, ordinary, starts, length, generator, partial(progress, stage)))
    finally:
        model.train(was_training)
    return torch.cat(batches)


def _starts(ordinary: Tensor, lead: list[int], rows: int, generator: torch.Generator) -> Tensor:
    """What the windows begin with, `[rows, 1 or more]`."""
    if lead:
        return torch.tensor(lead, dtype=torch.int64).repeat(rows, 1)
    return ordinary[torch.randint(len(ordinary), (rows, 1), generator=generator)]


@torch.no_grad()
def _write(
    model: Any,
    ordinary: Tensor,
    ids: Tensor,
    length: int,
    generator: torch.Generator,
    progress: Callable[[int, int], None],
) -> Tensor:
    """Ids `[rows, length]` that go on from `ids`."""
    name, cache, new_ids = kv_cache.keyword(model), None, ids
    while ids.shape[1] < length:
        out = model(input_ids=new_ids.to(model.device), use_cache=True, **{name: cache})
        logits = out.logits[:, -1].float().cpu()[:, ordinary]
        if not logits.isfinite().all():
            raise NumericalError("self: the model's logits hold NaN or infinity; calibrate on a text instead.")
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, ordinary[drawn]], dim=1)
        progress(ids.shape[1], length)
        cache = kv_cache.of(out)
        new_ids = ids if cache is None else ids[:, -1:]  # a model without such a cache reads from the start again
    return ids[:, :length]


def _ordinary_ids(tokenizer: Any, rows: int) -> Tensor:
    """Ids `[ordinary]` below `rows` (the embedding's) that are tokens of text, not special ones."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.update(tokenizer.all_special_ids)
    return torch.tensor([index for index in range(min(rows, len(tokenizer))) if index not in special])
