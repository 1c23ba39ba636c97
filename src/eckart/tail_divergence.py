"""KL divergence of a model's predictions from the dense model's, a chunk of tokens at a time.

The reference is the dense model's hidden states after its last block. Its log-probabilities,
`[tokens, vocabulary]`, are kept up to a gibibyte; what is beyond is computed again, chunk by chunk, once
for all candidates that are compared with it at a time.
"""

from collections.abc import Sequence

import torch
from torch import nn

from eckart.blocks import Stream, run_tail
from eckart.errors import NumericalError

Tensor = torch.Tensor

CHUNK_ELEMENTS = 2**25  # of one chunk's log-probabilities: 128 MiB in float32
KEPT_ELEMENTS = 2**28  # of all that are kept: 1 GiB
Kept = dict[tuple[int, int], Tensor]  # (batch, first position) to log-probabilities


@torch.no_grad()
def divergences(
    model: nn.Module,
    blocks: nn.ModuleList,
    stream: Stream,
    index: int,
    reference: Tensor,
    candidates: Sequence[Tensor],
    kept: Kept,
) -> list[float]:
    """`KL(reference || candidate)` in nats, summed over the tokens of one batch, for each candidate.

    The batch is number `index` of `stream`; `reference` and the candidates are its hidden states after
    the last block, `[batch, seq, width]`. `kept` belongs to the reference and is filled here. The tail of
    the model (final norm, head) treats each position on its own, so it may be run on a few positions at
    a time. Float32, summed in float64.
    """
    ids = stream.batches[index]
    vocabulary = model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    length = max(1, CHUNK_ELEMENTS // (vocabulary * ids.shape[0]))

    def log_probabilities(hidden: Tensor) -> Tensor:  # [batch, part of seq, vocabulary], float32
        piece = Stream((ids[:, part],), [hidden[:, part]], [], stream.returns_tuple, position=len(blocks))
        logits: Tensor = run_tail(model, blocks, piece, 0).logits
        return logits.float().log_softmax(-1)

    totals = torch.zeros(len(candidates), dtype=torch.float64)
    for start in range(0, ids.shape[1], length):
        part = slice(start, start + length)
        expected = kept[index, start] if (index, start) in kept else log_probabilities(reference)
        if sum(chunk.numel() for chunk in kept.values()) + expected.numel() <= KEPT_ELEMENTS:
            kept[index, start] = expected
        weights = expected.exp()
        for number, candidate in enumerate(candidates):
            # The difference first, so that nothing cancels; in place, since these tensors are the largest here.
            found = log_probabilities(candidate).sub_(expected).mul_(weights)
            totals[number] -= found.sum(-1).double().sum().cpu()
    if not torch.isfinite(totals).all():
        raise NumericalError("the KL divergence from the dense model is NaN or infinite; compute in float32.")
    return [float(total) for total in totals]
