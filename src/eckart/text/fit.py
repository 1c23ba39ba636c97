"""Whether windows of text suit a model: no more positions than it knows, no tokens that it does not."""

from typing import Any

from eckart.errors import DataError
from eckart.text.data import Windows, check_length


def check_fit(windows: Windows, model: Any) -> None:
    """Raise `DataError` for windows that are too long for the model, or hold tokens beyond its embedding."""
    check_length(windows, model)
    known = len(model.get_input_embeddings().weight)
    largest = int(windows.ids.max())
    if largest >= known:
        raise DataError(
            f"{windows.recipe.spec}: holds token {largest}, but the model has an embedding of {known} tokens: its "
            "tokenizer has more; call model.resize_token_embeddings(len(tokenizer)) and train, or give the model's "
            "own --tokenizer."
        )
