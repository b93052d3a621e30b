"""An OpenAI-compatible HTTP server over one artifact: a family's members, or a single model.

A request goes from ``app.py`` (routes, checks) as a job to ``scheduler.py``, whose one thread owns the models;
``rows.py`` is what decodes together. docs/serving.md is for users.
"""
