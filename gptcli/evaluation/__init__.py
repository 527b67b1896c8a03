"""Scores of models: perplexity, exact match, and their statistics."""
