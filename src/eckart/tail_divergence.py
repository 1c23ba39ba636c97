"""KL divergence of a model's predictions from the dense model's, a chunk of tokens at a time.

Nothing of size `[tokens, vocabulary]` is kept: the reference is the dense model's hidden states after
its last block, and its log-probabilities are computed again, chunk by chunk, once for all candidates
that are compared with it at a time.
"""

from collections.abc import Sequence

import torch
from torch import nn

from eckart.blocks import Stream, run_tail
from eckart.errors import NumericalError

Tensor = torch.Tensor

CHUNK_ELEMENTS = 2**25  # of one chunk's log-probabilities: 128 MiB in float32


@torch.no_grad()
def divergences(
    model: nn.Module, blocks: nn.ModuleList, stream: Stream, index: int, reference: Tensor, candidates: Sequence[Tensor]
) -> list[float]:
    """`KL(reference || candidate)` in nats, summed over the tokens of one batch, for each candidate.

    The batch is number `index` of `stream`; `reference` and the candidates are its hidden states after
    the last block, `[batch, seq, width]`. The tail of the model (final norm, head) treats each position on its own,
    so it may be run on a few positions at a time. Float32, summed in float64.
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
        expected = log_probabilities(reference)
        weights = expected.exp()
        for number, candidate in enumerate(candidates):
            found = log_probabilities(candidate)
            # The difference first, so that nothing cancels; then one dot product for each token.
            found.sub_(expected)
            totals[number] -= torch.linalg.vecdot(weights, found).double().sum().cpu()
    if not torch.isfinite(totals).all():
        raise NumericalError("the KL divergence from the dense model is NaN or infinite; compute in float32.")
    return [float(total) for total in totals]
