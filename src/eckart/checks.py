"""Contract checks that every factorizer, allocator, refiner and storage must pass; yours too.

    from eckart.checks import check_factorizer
    check_factorizer(MyFactorizer())

Each check raises `AssertionError` with the property that failed. All in float64, on matrices from a fixed seed,
against oracles that do not use the method's own code.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from eckart import ledger
from eckart.allocators.base import Allocator
from eckart.errors import BudgetError
from eckart.factorizers.base import Factorizer
from eckart.model.discovery import discover
from eckart.model.factorise import factorize_
from eckart.plans.plan import Plan
from eckart.portable.linear import share_basis_, weight_view
from eckart.refiners.base import Refinement, Refiner
from eckart.statistics.sums import Gram, GroupStatistics, Statistics
from eckart.storages import FactorizedLayer, Pair, Size, Storage
from eckart.types import Budget, Entry, Factors, Group, Spectrum, Target

SHAPES = ((12, 20), (20, 12), (16, 16), (1, 9))
TOKENS = (64, 5)  # more and fewer than features


def check_factorizer(factorizer: Factorizer) -> None:
    """Full rank gives the weight back, errors fall with rank and equal the tail of the spectrum."""
    for out_features, in_features in SHAPES:
        for tokens in TOKENS:
            group, weight, statistics = problem(out_features, in_features, tokens)
            decomposition = factorizer.decompose(group, [weight], statistics)
            _check_spectrum(decomposition.spectrum)
            full = decomposition.truncate(group.full_rank)
            assert full.basis.shape == (group.full_rank, in_features), "basis is not [rank, in]"
            assert full.coefficients[0].shape == (out_features, group.full_rank), "coefficients are not [out, rank]"
            assert _close(full.product(), weight, 1e-7), f"full rank of {out_features}x{in_features} loses the weight"
            ranks = [torch.linalg.matrix_rank(decomposition.truncate(r).product()) for r in range(1, group.full_rank)]
            assert ranks == list(range(1, group.full_rank)), "a cut at rank r does not have rank r"


def check_allocator(allocator: Allocator) -> None:
    """Never over budget, every rank possible, one entry for each spectrum, impossible budgets refused."""
    spectra = problems_spectra()
    groups = [spectrum.group for spectrum in spectra]
    for keep in (0.4, 0.5, 0.77, 0.8, 0.95, 1.0):
        for multiple in (1, 4):
            entries = allocator.allocate(spectra, Budget(keep, multiple))
            check_entries(groups, entries, keep, multiple)
    same = allocator.allocate(spectra, Budget(0.6))
    assert same == allocator.allocate(spectra, Budget(0.6)), "the same question has two answers"
    for impossible in (0.0, -0.5, 1.2, 1e-6):
        try:
            allocator.allocate(spectra, Budget(impossible))
        except BudgetError:
            continue
        raise AssertionError(f"keep {impossible} was not refused with BudgetError")


def check_entries(groups: Sequence[Group], entries: Sequence[Entry], keep: float, multiple: int) -> None:
    """What holds for the entries of every plan."""
    assert [e.targets for e in entries] == [g.names for g in groups], "entries do not match the spectra"
    spent = sum(ledger.parameters(g, e.rank, e.storage, e.kept) for g, e in zip(groups, entries, strict=True))
    allowed = ledger.allowed_parameters(groups, keep)
    assert spent <= allowed, f"{spent} parameters spent of {allowed}"
    for group, entry in zip(groups, entries, strict=True):
        if entry.rank is not None:
            assert 1 <= entry.rank <= group.full_rank, f"rank {entry.rank} of {group.full_rank}"
            assert entry.rank % multiple == 0 or entry.rank < multiple or entry.rank == group.full_rank, "rank multiple"


def problem(out_features: int, in_features: int, tokens: int, seed: int = 0) -> tuple[Group, Tensor, GroupStatistics]:
    """A random float64 weight with strongly uneven inputs, and every statistic the sweep can collect."""
    generator = torch.Generator().manual_seed(seed + 1000 * out_features + in_features)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight = normal(out_features, in_features)
    x = normal(tokens, in_features) @ normal(in_features, in_features) * torch.logspace(0, -2, in_features).double()
    gradient = normal(tokens, out_features) * torch.logspace(-1, 0, out_features).double()
    fisher = (gradient.T @ x).square()
    statistics = Statistics(
        tokens=tokens,
        input_gram=gram_of(x),
        output_gram=gram_of(x @ weight.T),
        input_energy=float(x.square().sum() / in_features),
        input_absmean=x.abs().mean(0),
        fisher_rows=fisher.sum(1),
        fisher_columns=fisher.sum(0),
        gradient_gram=gram_of(gradient),
        pulled_gradient_gram=gram_of(gradient @ weight),
        gradient_energy=float(gradient.square().sum() / out_features),
        predictions=tokens,
    )
    group = Group((Target("blocks.0.linear", 0, "linear", out_features, in_features, False),))
    return group, weight, GroupStatistics((statistics,))


def gram_of(x: Tensor) -> Gram:
    """The Gram of `x` `[tokens, k]`."""
    gram = Gram(x.shape[-1])
    gram.add_(x)
    return gram


def problems_spectra() -> list[Spectrum]:
    """Spectra of a small model: four blocks of three kinds, with unlike shapes and decays, all fields filled."""
    spectra = []
    generator = torch.Generator().manual_seed(0)
    for block in range(4):
        for kind, rows, columns in (("attn.q", 24, 24), ("attn.k", 8, 24), ("mlp.up", 48, 24)):
            group = Group((Target(f"blocks.{block}.{kind}", block, kind, rows, columns, False),))
            steps = torch.rand(group.full_rank, generator=generator, dtype=torch.float64) * (0.1 + 0.2 * block)
            values = torch.exp(-steps.cumsum(0)) * (1 + block)
            measured = {share / 10: (block + 1) * ((10 / share) ** (1 + rows / 24) - 1) for share in range(1, 11)}
            observed = {"sensitivity": measured, "sensitivity_alone": measured, "similarity": 0.9 - 0.1 * block}
            spectra.append(Spectrum(group, values, observed=observed))
    return spectra


def _check_spectrum(spectrum: Spectrum) -> None:
    values, full = spectrum.values, spectrum.group.full_rank
    assert (spectrum.loss(1) is None) == (spectrum.nats is None), "a loss without its unit"
    assert spectrum.nats is None or spectrum.nats > 0, "a unit of loss that is not positive"
    assert float(spectrum.tails[full]) == 0, "the squared error at full rank is not zero"
    assert values.shape == (spectrum.group.full_rank,), "one singular value for each rank"
    assert values.dtype == torch.float64, "spectra are float64"
    assert values.device.type == "cpu", "spectra are on the CPU"
    assert bool((values >= 0).all()), "singular values are not negative"
    assert bool((values[:-1] >= values[1:]).all()), "singular values fall"


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return float((a - b).detach().norm()) <= tolerance * float(b.detach().norm())


def check_refiner(refiner: Refiner) -> None:
    """Changes factors only: structure, dense layers and dense weights stay; the same answer twice; all finite."""
    results = [_refined(refiner) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), "the same question has two answers"
    assert all(bool(torch.isfinite(t).all()) for t in results[0]), "NaN or infinity in the refined model"


def _refined(refiner: Refiner) -> list[Tensor]:
    """Refine a tiny model with a shared basis, a private one and a dense layer; its parameters."""
    from eckart.portable.hf import specs_of
    from eckart.tiny import tiny_models, tiny_tokenizer

    model = next(iter(tiny_models().values()))()  # any with q_proj and k_proj in two blocks
    layout = discover(model)
    names = [target.name for target in layout.targets]
    shared = tuple(name for name in names if name.endswith("q_proj"))
    entries = (Entry(shared, 9), *(Entry((n,), 7) for n in names if n not in shared and not n.endswith("k_proj")))
    dense = {name: weight_view(model.get_submodule(name)) for entry in entries for name in entry.targets}
    for entry in entries:
        u, s, vt = torch.linalg.svd(torch.cat([dense[name] for name in entry.targets]), full_matrices=False)
        parts = torch.split(u[:, : entry.rank] * s[: entry.rank], [len(dense[name]) for name in entry.targets])
        layers = [factorize_(model, n, vt[: entry.rank], c) for n, c in zip(entry.targets, parts, strict=True)]
        for other in layers[1:]:
            share_basis_(layers[0], other)
    specs, before = specs_of(model), {name: weight.clone() for name, weight in dense.items()}
    factors = {f"{n}.{part}.weight" for n in dense for part in ("basis", "coefficients")}
    kept = {name: p.detach().clone() for name, p in model.named_parameters() if name not in factors}
    windows = torch.randint(3, 128, (6, 16), generator=torch.Generator().manual_seed(0))
    refiner.refine_(Refinement(model, layout, Plan(entries), dense, windows, tokenizer=tiny_tokenizer()))
    assert specs_of(model) == specs, "ranks, storage or sharing have changed"
    assert all(torch.equal(dense[name], weight) for name, weight in before.items()), "a dense weight has changed"
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in kept.items()), "more than factors has changed"
    return [p.detach() for p in after.values()]


def check_storage(storage: Storage) -> None:
    """The layer is the matrix, in as many numbers as the ledger says; parts make the whole; gradients flow."""
    if storage.packs:
        check_packed(storage)
        return
    for out_features, in_features in ((9, 14), (14, 9), (8, 8)):
        for rank in (1, 3, min(out_features, in_features)):
            for bias in (False, True):
                size = Size(out_features, in_features, rank, kept=0 if storage.from_plain_pairs else 2)
                if storage.refusal(size) is None:
                    _check_layer(storage, size, bias)
        _check_ranks(storage, out_features, in_features)


def check_packed(storage: Storage) -> None:
    """Of few bits: the layer is its own weight, near the matrix; bytes as told; it comes back bit for bit; parts."""
    for out_features, in_features in ((9, 70), (70, 9), (33, 64), (40, 96)):
        for bits in (2, 3, 4, 5, 6, 8):
            size = Size(out_features, in_features, 3 * storage.low_rank, bits=bits, group=32)
            assert storage.refusal(size) is None, "a size of few bits is refused"
            _check_packed_layer(storage, size, bias=bits % 2 == 0)
    for change in ({"bits": 0}, {"rank": 3 - size.rank}):
        wrong = Size(40, 96, change.get("rank", size.rank), bits=change.get("bits", 4), group=32)
        assert storage.refusal(wrong), "a size without bits, or with a rank that means nothing, is not refused"
    good = {"storage": storage.name, "bits": 4, "group": 32, **({"rank": 3} if storage.low_rank else {})}
    for key, wrong_value in (("bits", 7), ("bits", None), ("bits", True), ("group", 48), ("rank", 0), ("rank", "3")):
        if key in good:
            _refuses(storage, {**good, key: wrong_value})


def _refuses(storage: Storage, spec: Mapping[str, object]) -> None:
    try:
        storage.empty(40, 96, spec, bias=False, dtype=torch.float64)
    except ValueError:
        return
    raise AssertionError(f"an entry {dict(spec)} was not refused")


def _check_packed_layer(storage: Storage, size: Size, bias: bool) -> None:
    from safetensors.torch import load, save

    pair, product = _pair(replace(size, rank=max(size.rank, 3)), bias)
    spec, tensors = storage.of_pair(pair, bits=size.bits, group=size.group)  # type: ignore[call-arg]
    sizes = size.out_features, size.in_features
    layer = _filled(storage, sizes, spec, tensors, bias)
    assert layer.spec() == spec, "a layer does not say how it was made"
    assert {spec[key] for key in ("bits", "group")} == {size.bits, size.group}, "an entry does not say its bits"
    tolerance = {2: 1.0, 3: 0.5, 4: 0.2, 5: 0.1, 6: 0.05, 8: 0.015}[size.bits]
    assert _close(layer.weight, product, tolerance), "the layer's weight is far from the matrix"
    x = torch.randn(2, 3, size.in_features, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.nn.functional.linear(x, layer.weight, pair.bias)
    assert _close(layer(x), expected, 1e-12), "the layer computes something else than its weight"
    again = storage.to_pair(layer)
    assert _close(again.coefficients @ again.basis, layer.weight, 1e-12), "to a pair it is another matrix"
    stored = load(save({name: t.contiguous() for name, t in layer.state_dict().items()}))
    other = _filled(storage, sizes, spec, stored, bias)
    assert torch.equal(other(x), layer(x)), "saved and loaded, it computes something else"
    weights = {name: t for name, t in stored.items() if name != "bias"}
    assert set(weights) == set(storage.tensors), "the names of its tensors are not those it tells"
    assert sum(t.nbytes for t in weights.values()) == storage.bytes(size, 8), "bytes are not those it tells"
    assert not [n for n, _ in layer.named_parameters() if n != "bias"], "packed numbers are parameters"
    narrow = copy.deepcopy(layer).to(torch.float32)
    assert all(torch.equal(t, stored[n]) for n, t in narrow.state_dict().items() if n != "bias"), "a cast changes it"
    assert narrow.weight.dtype == torch.float32, "after a cast its weight has another dtype"
    (gradient,) = torch.autograd.grad(layer(free := x.clone().requires_grad_()).square().sum(), free)
    assert _close(gradient, 2 * layer(x) @ layer.weight, 1e-9), "gradients of inputs are not its weight's"
    if not bias:
        _check_packed_parts(storage, layer, x)


def _check_packed_parts(storage: Storage, layer: FactorizedLayer, x: Tensor) -> None:
    outputs, inputs = layer.out_features, layer.in_features
    whole, middle = layer(x), outputs // 2
    halves = [slice(0, middle), slice(middle, outputs)]
    side_by_side = torch.cat([storage.part(layer, half, slice(0, inputs))(x) for half in halves], -1)
    assert _close(side_by_side, whole, 1e-12), "parts by outputs do not make the layer"
    if inputs > 32:  # parts by inputs end where groups do
        halves = [slice(0, 32), slice(32, inputs)]
        added = torch.stack([storage.part(layer, slice(0, outputs), half)(x[..., half]) for half in halves]).sum(0)
        assert _close(added, whole, 1e-12), "parts by inputs do not add up to the layer"
        try:
            storage.part(layer, slice(0, outputs), slice(0, 20))
        except ValueError:
            return
        raise AssertionError("a part that cuts a group is not refused")


def _check_layer(storage: Storage, size: Size, bias: bool) -> None:
    from safetensors.torch import load, save

    pair, product = _pair(size, bias)
    spec, tensors = storage.of_pair(pair)
    assert spec["storage"] == storage.name, "an entry names another storage"
    sizes = size.out_features, size.in_features
    layer = _filled(storage, sizes, spec, tensors, bias)
    assert layer.spec() == spec, "a layer does not say how it was made"
    assert _close(layer.weight, product, 1e-12), "the layer's weight is not the pair's product"
    x = torch.randn(2, 3, size.in_features, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.nn.functional.linear(x, product, pair.bias)
    assert _close(layer(x), expected, 1e-12), "the layer computes something else than its weight"
    back = storage.to_pair(layer)
    _, again = storage.of_pair(back)
    assert _close(_filled(storage, sizes, spec, again, bias).weight, product, 1e-10), "to a pair and back loses it"
    stored = load(save({name: t.contiguous() for name, t in layer.state_dict().items()}))
    other = _filled(storage, sizes, spec, stored, bias)
    assert torch.equal(other(x), layer(x)), "saved and loaded, it computes something else"
    weights = {name: t for name, t in stored.items() if not name.endswith("bias")}
    assert set(weights) == set(storage.tensors), "the names of its tensors are not those it tells"
    folded = bias and not any(name.endswith("bias") for name in stored)  # into another tensor; a bias is not counted
    numbers = sum(t.numel() for t in weights.values() if t.is_floating_point()) - folded * size.out_features
    indices = sum(t.nbytes for t in weights.values() if not t.is_floating_point())
    assert numbers == storage.parameters(size), f"{numbers} numbers stored, but {storage.parameters(size)} told"
    assert indices == storage.index_bytes(size), "bytes of indices are not those it tells"
    assert numbers * 8 + indices == storage.bytes(size, 8), "bytes are not those it tells"
    _check_gradients(layer, x)
    if not bias:
        _check_parts(storage, layer, x)
    if size.rank == 3 and bias:
        torch.compiler.reset()
        compiled = torch.compile(layer.requires_grad_(False), backend="eager", fullgraph=True)
        assert _close(compiled(x), expected, 1e-12), "compiled, it computes something else"


def _check_gradients(layer: FactorizedLayer, x: Tensor) -> None:
    """The gradients of the factors are those taken through their product."""
    layer.requires_grad_(True)
    factors = [p for name, p in layer.named_parameters() if not name.endswith("bias")]
    gradients = torch.autograd.grad(layer(x).square().sum(), factors)
    bias = None if layer.bias is None else layer.bias
    expected = torch.autograd.grad(torch.nn.functional.linear(x, layer.weight, bias).square().sum(), factors)
    assert all(_close(a, b, 1e-9) for a, b in zip(gradients, expected, strict=True)), "gradients are not its weight's"


def _check_parts(storage: Storage, layer: FactorizedLayer, x: Tensor) -> None:
    outputs, inputs = layer.out_features, layer.in_features
    whole = layer(x)
    halves = [slice(0, outputs // 2), slice(outputs // 2, outputs)]
    side_by_side = torch.cat([storage.part(layer, half, slice(0, inputs))(x) for half in halves], -1)
    assert _close(side_by_side, whole, 1e-12), "parts by outputs do not make the layer"
    halves = [slice(0, inputs // 2), slice(inputs // 2, inputs)]
    added = torch.stack([storage.part(layer, slice(0, outputs), half)(x[..., half]) for half in halves]).sum(0)
    assert _close(added, whole, 1e-12), "parts by inputs do not add up to the layer"


def _check_ranks(storage: Storage, out_features: int, in_features: int) -> None:
    full = min(out_features, in_features)
    costs = [storage.parameters(Size(out_features, in_features, rank)) for rank in range(1, full + 1)]
    assert all(a < b for a, b in pairwise(costs)), "a higher rank does not cost more"
    for allowance in (costs[0] - 1, costs[0], costs[2] + 1, costs[-2]):
        rank = storage.largest_rank(out_features, in_features, allowance)
        below = storage.parameters(Size(out_features, in_features, rank)) if rank else 0
        above = storage.parameters(Size(out_features, in_features, rank + 1))
        assert below <= allowance < above, f"{rank} is not the largest rank in {allowance} parameters"
    for wrong in (0, -1, True, "3", None, in_features + 1):
        spec = {"storage": storage.name, "rank": wrong, "kept": 1, "pivots": "rows"}
        try:
            storage.empty(out_features, in_features, spec, bias=False, dtype=torch.float64)
        except ValueError:
            continue
        raise AssertionError(f"an entry of rank {wrong!r} was not refused")


def _pair(size: Size, bias: bool) -> tuple[Pair, Tensor]:
    """A random pair, float64, and the matrix that it is."""
    generator = torch.Generator().manual_seed(7 * size.rank + size.out_features)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    basis, coefficients = normal(size.rank, size.in_features - size.kept), normal(size.out_features, size.rank)
    offset = normal(size.out_features) if bias else None
    if not size.kept:
        return Pair(basis, coefficients, offset), coefficients @ basis
    index, strip = torch.arange(1, 1 + size.kept), normal(size.out_features, size.kept)
    factors = Factors(basis, (coefficients,), index, (strip,))
    return Pair(basis, coefficients, offset, index, strip), factors.product()


def _filled(
    storage: Storage, sizes: tuple[int, int], spec: Mapping[str, object], tensors: Mapping[str, Tensor], bias: bool
) -> FactorizedLayer:
    layer = storage.empty(*sizes, spec, bias=bias, dtype=torch.float64).to_empty(device="cpu")
    layer.load_state_dict(dict(tensors))
    return layer.requires_grad_(False)
