"""How good a model is, and how near to another one.

``measure.py`` measures what a recipe asks for, ``results.py`` makes figures of it. The measures: ``perplexity.py``,
``fidelity.py`` (token by token against the dense model), ``harness.py`` (lm-eval's tasks; which ones in
``task_specs.py``, their figures in ``scores.py``), ``recall.py``, ``expert_shift.py``, ``generation.py``; of families
``family.py``, of S2R ``self_correction.py``. ``significance.py`` tells a difference from noise, ``gates.py`` decides
whether a run has failed.
"""
