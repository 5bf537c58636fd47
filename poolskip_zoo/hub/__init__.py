"""What is known and published about the registered models."""
