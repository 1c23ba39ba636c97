"""What transformers changes in tensors as it saves them, and what of that factors must be spared.

Some families are read from files with fused matrices, q, k and v in one, and split on the way; when such a model is
saved, transformers fuses them again. Factors of three matrices are no factors of the fused one. So where one of the
three is factorised all are saved under the names that they have in the model, which transformers reads as well.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def spare_factors_(model: "PreTrainedModel", layers: Iterable[str]) -> None:
    """Take from a model's conversions those that would fuse one of these factorised layers when it is saved."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange, WeightConverter
    except ImportError:  # earlier ones, which fuse nothing
        return
    conversions: list[Any] | None = getattr(model, "_weight_conversions", None)
    if conversions is None:  # not read from files: what the family has; prefixes are for files that had none
        found = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [one for one in found if not isinstance(one, PrefixChange)]
    keys = [f"{layer}.{tensor}" for layer in layers for tensor in ("weight", "bias")]

    def fuses(conversion: Any) -> bool:
        if not isinstance(conversion, WeightConverter):
            return False
        pattern = conversion.reverse_transform().compiled_sources
        return any(pattern.search(key) for key in keys)

    kept = [one for one in conversions if not fuses(one)]
    if len(kept) < len(conversions):
        model._weight_conversions = kept
