"""Make Hugging Face language models smaller by low-rank factorisation."""

__version__ = "0.1.0"
