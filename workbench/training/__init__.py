"""Data, metrics and the training loop: one or more adapters on one frozen base."""
