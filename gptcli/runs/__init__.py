"""Run directories, checkpoints and metrics, and the one loader of models."""
