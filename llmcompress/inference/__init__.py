"""Writing text with a loaded model: the native engines where they can run it, transformers' own loop elsewhere.

``native.py`` chooses: ``engine.py`` for attention, ``recurrent.py`` for states, ``hybrid.py`` for both; ``coverage.py``
says from ``config.json`` which models they take. ``generate.py`` continues prompts for people, ``greedy.py`` for
evaluation.
"""
