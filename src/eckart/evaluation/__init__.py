"""How good a model is: perplexity, tasks, samples, stored results."""
