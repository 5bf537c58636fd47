"""Cards, configurations and weights of the trained checkpoints: one folder for each, as it is on the Hub."""
