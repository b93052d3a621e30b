"""Executes a recipe in a run folder.

``runner.py`` runs stages, resumes and stops; ``fingerprint.py`` says whether what is there still holds, ``run_dir.py``
what is recorded. Before that ``estimate.py`` predicts memory, disk and bits from ``config.json``, and ``preflight.py``
holds this against the machine. ``sweep.py`` makes many runs of one recipe.
"""
