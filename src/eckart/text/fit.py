"""Whether windows of text suit a model: no more positions than it knows, no tokens that it does not."""

from typing import Any

from eckart.errors import DataError
from eckart.text.data import Windows


def check_fit(windows: Windows, model: Any) -> None:
    """Raise `DataError` for windows that are too long for the model, or hold tokens beyond its embedding."""
    check_positions(windows.recipe.length, model)
    table = getattr(model.get_input_embeddings(), "weight", None)
    if table is None:  # several embeddings; what it does on token ids alone is seen when it runs
        return
    known = len(table)
    largest = int(windows.ids.max())
    if largest >= known:
        raise DataError(
            f"{windows.recipe.spec}: holds token {largest}, but the model has an embedding of {known} tokens: its "
            "tokenizer has more; call model.resize_token_embeddings(len(tokenizer)) and train, or give the model's "
            "own --tokenizer."
        )


def check_positions(length: int, model: Any) -> None:
    """Raise `DataError` when windows of `length` tokens are longer than the positions that the model knows."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and 0 < limit < length:
        raise DataError(
            f"windows have {length} tokens, but the model knows {limit} positions; give --length {limit} or less."
        )
