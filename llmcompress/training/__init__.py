"""Teaches a model to verify and correct itself (S2R): supervised, then by reinforcement; deterministic and resumable.

``sft.py`` and ``rl.py`` are the loops, ``policy.py`` is the model in training (all weights, or adapters on packed
ones), ``trl_*.py`` and ``vllm_writer.py`` lend it to other libraries.
"""
