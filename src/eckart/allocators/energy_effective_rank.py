"""D-Rank: ranks by the square root of each group's energy effective rank, then rebalanced attention."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Literal, final

from eckart import ledger
from eckart.allocators.base import Allocator, checked, entry_at
from eckart.allocators.uniform import Uniform
from eckart.errors import BudgetError, OptionError
from eckart.maths.density import MEASURES
from eckart.maths.lagrange import Bidder, integer_ranks, total
from eckart.maths.rebalance import rebalance_
from eckart.plans.grouping import FUSED_ATTENTION, KEY, QUERY, VALUE, is_multi_head, matches
from eckart.types import Budget, Entry, Group, Spectrum, Target

logger = logging.getLogger(__name__)


@final
@dataclass(frozen=True)
class EnergyEffectiveRank(Allocator):
    """Minimises `sum R_g / k_g` for each kind at the cost of uniform ranks (arXiv 2509.25622, sec. 3.2-3.3).

    `guard` is what the authors' released code does and their text does not say: a kind falls back to uniform ranks
    where these discard less energy. "multi_head", the branch of their LLaMA rows, has `gate` fall back always and
    queries, keys and values never; "grouped", the branch of their LLaMA-3 and Mistral rows, has queries, keys and
    `gate` fall back always. "code" takes the branch that the shapes call for, "every" judges all kinds, "paper" has no
    guard. `beta` is the share of the ranks of queries and keys that goes to the values (`auto_beta`). With `dense_cap`
    (ours) a group whose factors would cost as much as its matrices stays dense. `scope` "model" lets kinds trade with
    each other. `measure` is the density R. The last four name the roles that rebalancing and guard tell apart.
    """

    beta: float | str = "auto"
    guard: Literal["code", "multi_head", "grouped", "every", "paper"] = "code"
    dense_cap: bool = False
    measure: Literal["energy_effective_rank", "effective_rank", "stable_rank", "rank_at_95"] = "energy_effective_rank"
    scope: Literal["kind", "model"] = "kind"
    query: str = QUERY
    key: str = KEY
    value: str = VALUE
    gate: str = "*gate_proj"

    def __post_init__(self) -> None:
        if self.beta != "auto" and (isinstance(self.beta, str) or not 0 <= self.beta < 1):
            raise OptionError(f'energy_effective_rank.beta is {self.beta!r}, but must be a number in [0, 1) or "auto".')
        if self.scope == "model" and self.guard != "paper":
            raise OptionError(
                f"energy_effective_rank.guard is {self.guard!r} with scope 'model', but the guard compares kind by "
                "kind; set scope to 'kind' or guard to 'paper'."
            )

    def allocate(self, spectra: Sequence[Spectrum], budget: Budget) -> list[Entry]:
        checked(spectra, budget)
        if budget.keep == 1:
            return [Entry(s.group.names, None) for s in spectra]
        uniform = self._uniform_ranks(spectra, budget)
        bidders = [self._bidder(spectrum, budget) for spectrum in spectra]
        ranks = [0] * len(spectra)
        for members in _by_kind(spectra).values() if self.scope == "kind" else [list(range(len(spectra)))]:
            own = [bidders[i] for i in members]
            own_ranks = integer_ranks(own, total(own, [uniform[i] for i in members]))
            for i, rank in zip(members, own_ranks, strict=True):
                ranks[i] = rank
        guarded = self._apply_guard(spectra, ranks, uniform)
        details: list[dict[str, object]] = [
            {self.measure: round(b.density, 3)} | ({"guard": "uniform"} if i in guarded else {})
            for i, b in enumerate(bidders)
        ]
        self._rebalance(spectra, bidders, ranks, details, budget)
        chosen = [None if b.ceiling is not None and r == b.cap else r for b, r in zip(bidders, ranks, strict=True)]
        return [
            replace(entry_at(s.group, rank, budget), details=detail)
            for s, rank, detail in zip(spectra, chosen, details, strict=True)
        ]

    def _uniform_ranks(self, spectra: Sequence[Spectrum], budget: Budget) -> list[int]:
        """What each kind may spend is what uniform ranks of that kind would cost."""
        for spectrum in spectra:
            group = spectrum.group
            storage = ledger.admitted(group, budget.storage)
            if ledger.largest_rank(group, ledger.share(budget.keep) * group.parameters, storage) < 1:
                lowest = ledger.parameters(group, 1, storage) / group.parameters
                raise BudgetError(
                    f"keep is {budget.keep:g}, but {group.name} needs {lowest:.4f} for rank 1, and here each kind "
                    f"has a budget of its own; ask for {lowest:.4f} or more, or leave it out with --exclude."
                )
        entries = Uniform().allocate(spectra, budget)
        return [entry.rank for entry in entries if entry.rank is not None]

    def _bidder(self, spectrum: Spectrum, budget: Budget) -> Bidder:
        group, density, multiple = spectrum.group, MEASURES[self.measure](spectrum.values), budget.rank_multiple
        cost, storage = ledger.parameters(group, 1), ledger.admitted(group, budget.storage)
        if storage != "pair":  # at full rank it costs what the dense matrix does
            price = partial(_price, group, storage)
            return Bidder(density, cost, group.full_rank, group.parameters, multiple, price)
        if not self.dense_cap:
            return Bidder(density, cost, group.full_rank, None, multiple)
        return Bidder(density, cost, -(-group.parameters // cost), group.parameters, multiple)

    def _apply_guard(self, spectra: Sequence[Spectrum], ranks: list[int], uniform: Sequence[int]) -> set[int]:
        """Put uniform ranks where the guard demands it, in place; the indices of the groups that fell back."""
        never, always_kinds = self._exempt(spectra)
        guarded: set[int] = set()
        for kind, members in _by_kind(spectra).items():
            if matches(kind, never):
                continue
            always = matches(kind, always_kinds)
            lost = [sum(spectra[i].error(chosen[i]) ** 2 for i in members) for chosen in (ranks, uniform)]
            if always or lost[0] >= lost[1]:
                guarded.update(members)
                for i in members:
                    ranks[i] = uniform[i]
        return guarded

    def _exempt(self, spectra: Sequence[Spectrum]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Patterns of the kinds that never fall back to uniform ranks, and of those that always do."""
        guard: str = self.guard
        if guard == "code":
            guard = "multi_head" if is_multi_head(_targets(spectra)) else "grouped"
        return {
            "paper": (("*",), ()),
            "every": ((), ()),
            "multi_head": ((self.query, self.key, self.value, *FUSED_ATTENTION), (self.gate,)),
            "grouped": ((), (self.query, self.key, self.gate)),
        }[guard]

    def _rebalance(
        self,
        spectra: Sequence[Spectrum],
        bidders: Sequence[Bidder],
        ranks: list[int],
        details: list[dict[str, object]],
        budget: Budget,
    ) -> None:
        """Rebalance every attention module that has all three roles, in place; say so if there is none."""
        beta = auto_beta(budget.keep, _targets(spectra)) if isinstance(self.beta, str) else ledger.share(self.beta)
        if beta == 0:
            return
        kinds, rebalanced = _by_kind(spectra), False
        for parent in dict.fromkeys(kind.rpartition(".")[0] for kind in kinds):
            here = [kind for kind in kinds if kind.rpartition(".")[0] == parent]
            roles = [[kind for kind in here if matches(kind, (role,))] for role in (self.query, self.key, self.value)]
            if not all(roles):
                continue
            givers = [i for role in roles[:2] for kind in role for i in kinds[kind]]
            takers = [i for kind in roles[2] for i in kinds[kind]]
            for i in givers + takers:
                details[i]["rank_before_rebalancing"] = ranks[i]
            capped = [_as_taker(b, spectra[i]) if i in takers else b for i, b in enumerate(bidders)]
            rebalance_(capped, ranks, givers, takers, beta)
            rebalanced = True
        if not rebalanced:
            logger.warning(
                "no attention with separate %s, %s and %s among the targets: nothing is rebalanced.",
                self.query, self.key, self.value,
            )  # fmt: skip


def _price(group: Group, storage: str, rank: int) -> int:
    return ledger.parameters(group, rank, storage)


def auto_beta(keep: float, targets: Sequence[Target]) -> Fraction:
    """.10 for grouped queries; else the paper's best at each share removed: .30, .35 from 40 %, .40 from 50 %.

    The released calls have .10 for LLaMA-3 and Mistral. For LLaMA they have .20, but the paper's rows are those above.
    """
    if any(matches(target.kind, (KEY,)) for target in targets) and not is_multi_head(targets):
        return Fraction(1, 10)
    removed = 1 - ledger.share(keep)
    percent = 40 if removed >= Fraction(1, 2) else 35 if removed >= Fraction(2, 5) else 30
    return Fraction(percent, 100)


def _as_taker(bidder: Bidder, spectrum: Spectrum) -> Bidder:
    """A group of values may be given ranks up to the width of one layer, as in the release.

    The full rank of several narrow matrices side by side would cost more than they do.
    """
    if bidder.ceiling is not None:  # its cap is the dense matrix already
        return bidder
    return replace(bidder, cap=min(bidder.cap, spectrum.group.targets[0].out_features))


def _targets(spectra: Sequence[Spectrum]) -> list[Target]:
    return [target for spectrum in spectra for target in spectrum.group.targets]


def _by_kind(spectra: Sequence[Spectrum]) -> dict[str, list[int]]:
    """Indices of the spectra of each kind."""
    kinds: dict[str, list[int]] = {}
    for index, spectrum in enumerate(spectra):
        kinds.setdefault(spectrum.group.kind, []).append(index)
    return kinds
