"""Measured curves of loss against share: filled in from few points, and freed of noise that no true curve has.

Filling in: `loss(s) = loss(1) + a (s^-p - 1)`, falling to the dense model's at 1. Between and beyond the measured
shares a scaled power law stands in; measured points stay as measured. The error of this is measured in
`benchmarks/duo_svd.py` (see `docs/methods/duo-svd.md`).
"""

from collections.abc import Iterable, Mapping, Sequence

POWERS = tuple(0.05 * step for step in range(1, 161))  # p in (0, 8]


def filled(curve: Mapping[float, float], shares: Iterable[float]) -> dict[float, float]:
    """The measured losses, and fitted ones at the `wanted` shares that were not measured.

    Needs the loss at 1 (the dense module) and at two other shares to fit; with fewer, or if all are
    there, only what was measured comes back (`KeyError` for the caller who then asks for more).
    """
    missing = [share for share in shares if share not in curve]
    if not missing or 1.0 not in curve or len(curve) < 3:
        return dict(curve)
    scale, power = fit(curve)
    return {**curve, **{share: curve[1.0] + scale * (share**-power - 1) for share in missing}}


def fit(curve: Mapping[float, float]) -> tuple[float, float]:
    """`(a, p)` with `a >= 0`, least squares on relative errors, so that large and small shares count alike."""
    points = [(share, loss - curve[1.0]) for share, loss in curve.items() if share < 1]
    weights = [1 / max(abs(loss), 1e-12) for _, loss in points]

    def at(power: float) -> tuple[float, float]:
        shape = [share**-power - 1 for share, _ in points]
        top = sum(w * w * x * y for w, x, (_, y) in zip(weights, shape, points, strict=True))
        bottom = sum((w * x) ** 2 for w, x in zip(weights, shape, strict=True))
        scale = max(0.0, top / bottom)
        error = sum((w * (scale * x - y)) ** 2 for w, x, (_, y) in zip(weights, shape, points, strict=True))
        return error, scale

    power = min(POWERS, key=lambda p: at(p)[0])
    return at(power)[1], power


def never_rising(losses: Sequence[float]) -> list[float]:
    """The sequence nearest to `losses` in squares that never rises (isotonic regression, by pooling neighbours)."""
    pools: list[tuple[float, int]] = []  # mean and length of runs, each below the one before
    for loss in losses:
        mean, length = loss, 1
        while pools and pools[-1][0] <= mean:
            before, count = pools.pop()
            mean, length = (before * count + mean * length) / (count + length), count + length
        pools.append((mean, length))
    return [mean for mean, length in pools for _ in range(length)]
