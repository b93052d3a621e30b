"""What is read besides models: calibration and evaluation texts, tasks, problems.

``sources.py`` says where text comes from, ``documents.py`` reads it (chats through a template), ``calibration.py`` cuts
it into windows of tokens. ``problems/``, ``actions.py``, ``trajectories.py`` and ``verifiers.py`` are S2R's.
"""
