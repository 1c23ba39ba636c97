"""One block of a backward run, recomputed on one batch: what its linear maps read, gave, and the gradients there."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eckart.model.calls import Call
from eckart.model.carried import Carried
from eckart.model.experts import Routed
from eckart.model.recorder import Recorder
from eckart.model.store import Spilled, Store
from eckart.types import Target


@dataclass(frozen=True)
class Backward:
    """Where a backward run is, batch by batch: what enters `block`, how it is called, the loss gradients.

    `gradients[i]` `[batch, seq, width]` is at the block's output; `backward_block` moves it to the entrance. `carried`
    is what the block finds beside the states, and `at_carried[i]` the gradients at the tensors that it leaves there,
    None where there are none: of keys and values that later blocks read, say. It moves these too.
    """

    index: int
    block: nn.Module
    entrances: Store | Spilled
    calls: list[Call]
    gradients: list[Tensor]
    carried: list[Carried]
    at_carried: list[list[Tensor | None]]


@dataclass(frozen=True)
class Use:
    """One call of a layer: what it read and gave, `[..., in]` and `[..., out]`, and the loss gradients at both.

    `gradient` is at the output, None where no gradient arrives. `at_input` is the layer's own share of the gradient at
    its input, for tall layers, where it was asked for. `routed` says which tokens reached an expert.
    """

    target: Target
    x: Tensor
    y: Tensor
    gradient: Tensor | None
    at_input: Tensor | None = None
    routed: Routed | None = None


@dataclass(frozen=True)
class Recomputed:
    """What a run gave: gradients at the entrance and at what was carried, every use, and inputs with their readers."""

    at_entrance: Tensor
    at_carried: list[Tensor | None]
    uses: list[Use]
    by_input: list[tuple[Tensor, list[tuple[Target, Tensor]]]]


def recompute(
    block: nn.Module,
    targets: Sequence[Target],
    at: Backward,
    index: int,
    *,
    at_tall_inputs: bool = False,
    gated: bool = False,
) -> Recomputed:
    """Run the block on batch `index` and take the gradients back through it; nothing is moved.

    What enters experts is `gated` or not in `by_input` (`eckart.model.recorder`).
    """
    entrance, carried = at.entrances[index].detach().requires_grad_(), at.carried[index].apart()
    with Recorder(block, targets, own_inputs=True) as recorder, torch.enable_grad():
        output, left = at.calls[index].run(block, entrance, carried)
        ends = [(output, at.gradients[index]), *left.reached(at.at_carried[index])]
        # What only chooses, such as an indexer of sparse attention, runs apart from the gradient or ends there.
        reached = [(target, x, y) for target, x, y in recorder.uses if y.requires_grad]
        tall = [x for target, x, _ in reached if at_tall_inputs and target.out_features > target.in_features]
        beside = carried.tensors()
        tensors = [entrance, *beside, *(y for _, _, y in reached), *tall]
        found = torch.autograd.grad(
            [end for end, _ in ends], tensors, [gradient for _, gradient in ends], allow_unused=True
        )
    at_carried: list[Tensor | None] = list(found[1 : 1 + len(beside)])
    inner = found[1 + len(beside) :]
    at_outputs, at_inputs = iter(inner[: len(reached)]), iter(inner[len(reached) :])
    uses = []
    for (target, x, y), routed in zip(recorder.uses, recorder.routed, strict=True):
        gradient = next(at_outputs) if y.requires_grad else None
        wanted = y.requires_grad and at_tall_inputs and target.out_features > target.in_features
        uses.append(Use(target, x.detach(), y.detach(), gradient, next(at_inputs) if wanted else None, routed))
    by_input = recorder.by_input(gated=gated)
    shared = [(x.detach(), [(target, y.detach()) for target, y in members]) for x, members in by_input]
    assert found[0] is not None
    return Recomputed(found[0], at_carried, uses, shared)
