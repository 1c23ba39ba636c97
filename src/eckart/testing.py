"""For tests, this package's and yours: tiny random models, a tiny tokenizer, and the contract checks."""

from eckart.checks import check_allocator, check_factorizer, check_refiner, check_storage
from eckart.tiny import tiny_model, tiny_models, tiny_tokenizer

__all__ = [
    "check_allocator",
    "check_factorizer",
    "check_refiner",
    "check_storage",
    "tiny_model",
    "tiny_models",
    "tiny_tokenizer",
]
