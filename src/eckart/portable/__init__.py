"""What travels with a checkpoint: torch and transformers are all that it needs."""
