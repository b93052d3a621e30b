"""Perplexity, fidelity, tasks and gates."""
