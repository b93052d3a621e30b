"""From a YAML file to a validated recipe.

``load.py`` has the order: extends, overrides, interpolation, validation, the chain of stages. ``documents.py`` keeps
line numbers, ``diagnose.py`` turns what is wrong into lines that a person can act on, ``schema.py`` is the grammar,
``lock.py`` what is needed to run it again.
"""
