"""The nouns that travel between the stages: plain frozen data, importing torch only.

Axis words in shapes: `out`, `in`, `rank`, `tokens`, `batch`, `seq`. A weight is `[out, in]`, as in
`nn.Linear`: `y = W x + b`.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Level = Literal["off", "cheap", "full"]  # how much to spend on measuring by how far predicted losses are off
Part = Collection[str]  # of a plan: names of groups


@dataclass(frozen=True)
class Target:
    """A linear layer chosen for compression.

    `name` is its dotted path in the model, `kind` its path inside its block (`self_attn.q_proj`),
    `block` the index of the decoder block that holds it. The experts of a layer are of one kind
    (`mlp.experts.down_proj`), and `expert` is the number of each, with which its name ends.
    """

    name: str
    block: int
    kind: str
    out_features: int
    in_features: int
    has_bias: bool
    expert: int | None = None

    @property
    def place(self) -> str:
        """Its path inside its block."""
        return self.kind if self.expert is None else f"{self.kind}.{self.expert}"

    @property
    def parameters(self) -> int:
        """Parameters of the weight, `out * in`; a bias is never compressed and never counted."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class Skipped:
    """A parameter that stays as it is, and why, in words."""

    name: str
    parameters: int
    reason: str


@dataclass(frozen=True)
class Group:
    """Targets that are factorised together and share one basis; most groups have one member.

    The weights of a group are stacked along `out`; all members have the same `in`. With `own_bases` nothing is shared
    but the rank: each member, all of one shape, is a matrix of its own, as the experts of a layer are.
    """

    targets: tuple[Target, ...]
    own_bases: bool = False

    @property
    def name(self) -> str:
        """Name of the first member, which owns the basis."""
        return self.targets[0].name

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(target.name for target in self.targets)

    @property
    def kind(self) -> str:
        return self.targets[0].kind

    @property
    def in_features(self) -> int:
        return self.targets[0].in_features

    @property
    def matrices(self) -> int:
        """How many matrices are factorised: one for a shared basis, or one for each member."""
        return len(self.targets) if self.own_bases else 1

    @property
    def of_experts(self) -> bool:
        return self.targets[0].expert is not None

    @property
    def out_features(self) -> int:
        """Rows of one matrix: of the stacked weight, or of each member's own."""
        return self.targets[0].out_features if self.own_bases else sum(t.out_features for t in self.targets)

    @property
    def parameters(self) -> int:
        """Parameters of the dense weights."""
        return self.matrices * self.out_features * self.in_features

    @property
    def full_rank(self) -> int:
        return min(self.out_features, self.in_features)


@dataclass(frozen=True)
class Entry:
    """What a plan says of one group: its members, its rank (`None`: stay dense), its storage.

    `kept` is the number of input columns that stay exact beside the factors (storage "columns").
    `None` leaves it to the factorizer, which may then trade ranks for columns at no more parameters
    than a pair of rank `rank`; 0 means none.

    With `own_bases` each of the targets has a basis of its own, and the rank is that of each; else they share one.
    `bits` and `group` are for storages that pack: bits of a number, and inputs that share a scale. There `rank` is
    `None` for a matrix that is packed as it is.

    `details` is for people: figures behind the choice. It changes nothing and is not compared.
    """

    targets: tuple[str, ...]
    rank: int | None
    storage: str = "pair"
    kept: int | None = None
    details: Mapping[str, Any] = field(default_factory=dict, compare=False)
    own_bases: bool = False
    bits: int | None = None
    group: int | None = None

    @property
    def name(self) -> str:
        return self.targets[0]

    @property
    def is_dense(self) -> bool:
        """Whether the group stays as it is."""
        return self.rank is None and self.bits is None


@dataclass(frozen=True)
class Form:
    """One way to store a group in few bits: what its entry says, `bytes` on disk, and the squared error in the metric.

    The error is predicted (`eckart.planning.forms`), in the unit of `Spectrum.values` squared.
    """

    storage: str
    rank: int | None
    bits: int
    group: int
    bytes: int
    error: float

    def of(self, group: Group) -> Entry:
        """The entry of a plan that chooses it."""
        return Entry(group.names, self.rank, self.storage, bits=self.bits, group=self.group)


@dataclass(frozen=True)
class Packing:
    """What a plan with few bits may use: storages that pack, bits of a number, and inputs that share a scale.

    Without `widths` it is the plan that says what is used.
    """

    storages: tuple[str, ...] = ()
    widths: tuple[int, ...] = ()
    group: int = 64


@dataclass(frozen=True)
class Spectrum:
    """What an allocator sees of a group: its singular values in the metric of its factorizer.

    `values` is `[full_rank]`, float64 on the CPU, falling. Cutting at rank r makes the error `sqrt(sum_{i>r}
    values_i^2)` in that metric (Eckart and Young 1936). Of a group whose members have a basis each, they are roots of
    sums over the members, so that the same holds for all of them cut at rank r. `nats` turns a squared error into a
    predicted loss in nats per token; it is `None` for a metric that does not measure the model's loss (every one
    without gradients), and then `loss` is `None` as well. `unseen` `[full_rank + 1]` are the squared errors at every
    rank on text that did not make the cuts, where somebody has measured them: what a text says of its own cuts is too
    low. `observed` holds
    what an allocator asked to be measured, by name (`eckart.measuring.scene`): "sensitivity" is `{share: KL of the
    model's output}` when this group alone is moved to a share, "similarity" the cosine between what enters and what
    leaves the group's block. `forms` are the ways to store the group in few bits, where a plan may use them.
    """

    group: Group
    values: Tensor
    nats: float | None = None
    observed: Mapping[str, Any] = field(default_factory=dict)
    unseen: Tensor | None = None
    forms: tuple[Form, ...] = ()

    def error(self, rank: int) -> float:
        """Truncation error at `rank`, in the unit of the metric."""
        return float(self.values[rank:].square().sum().sqrt())

    @property
    def tails(self) -> Tensor:
        """Squared error at every rank from 0 to full, `[full_rank + 1]`, in the unit of the metric."""
        squares = self.values.square()
        return torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])

    @property
    def expected(self) -> Tensor:
        """Squared error to expect at every rank from 0 to full, `[full_rank + 1]`: `unseen` where it is known."""
        return self.tails if self.unseen is None else self.unseen

    def loss(self, rank: int | None) -> float | None:
        """Predicted loss at `rank` in nats per token (0 for `None`, dense), or `None` if the metric cannot say.

        To second order this is the KL divergence of the model's predictions from the dense model's.
        """
        if self.nats is None:
            return None
        return 0.0 if rank is None else self.nats * float(self.expected[rank])

    def predicted(self, entry: Entry) -> float | None:
        """Predicted loss of an entry of a plan, nats per token; None if the metric cannot say, or the entry is new."""
        if entry.bits is None:
            return self.loss(entry.rank)
        found = (form.error for form in self.forms if form.of(self.group) == entry)
        error = next(found, None)
        return None if error is None or self.nats is None else self.nats * error

    @property
    def energy(self) -> float:
        """Sum of all squared singular values."""
        return float(self.values.square().sum())


@dataclass(frozen=True)
class Factors:
    """A cut decomposition: `coefficients[i] @ basis` approximates the weight of member i.

    `basis` is `[rank, in]`; `coefficients[i]` is `[out_i, rank]`. With preserved columns,
    `kept_index` `[kept]` holds their positions, rising, `kept[i]` `[out_i, kept]` their strip of the
    weight, and `basis` is `[rank, in - kept]`, over the other columns in their order.
    """

    basis: Tensor
    coefficients: tuple[Tensor, ...]
    kept_index: Tensor | None = None
    kept: tuple[Tensor, ...] = ()

    @property
    def rank(self) -> int:
        return self.basis.shape[0]

    def product(self) -> Tensor:
        """The stacked approximation, `[sum of out_i, in]`."""
        low_rank = torch.cat(self.coefficients) @ self.basis
        if self.kept_index is None:
            return low_rank
        product = low_rank.new_empty(low_rank.shape[0], low_rank.shape[1] + len(self.kept_index))
        remaining = torch.ones(product.shape[1], dtype=torch.bool, device=product.device)
        remaining[self.kept_index] = False
        product[:, remaining], product[:, self.kept_index] = low_rank, torch.cat(self.kept)
        return product


@dataclass(frozen=True)
class Budget:
    """How much may be kept: the share `keep` of the parameters of the targets.

    `rank_multiple` is the step of ranks that the hardware likes; 1 means any rank. `storage` is how factors are
    stored where a group can have it (`eckart.ledger.admitted`), and so what a rank costs.

    With `bytes`, the most that the targets may take, groups may have any of their `Spectrum.forms`, and `keep` is 1;
    `itemsize` is what a number takes that is not packed.
    """

    keep: float
    rank_multiple: int = 1
    storage: str = "pair"
    of: str = field(default="targets", init=False)
    bytes: int | None = None
    itemsize: int = 4
