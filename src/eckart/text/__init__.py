"""Text becomes windows of tokens."""
