"""Stage ``rqt``: a family of fine-tunes as one residual tree.

``stage.py`` has the recipe section, ``engine.py`` the order of work: ``survey.py`` compares the members, ``plan.py``
chooses trees and bits (``importance.py``: what an error in a weight costs), ``build.py`` quantizes. ``estimate.py`` is
for ``plan``, ``preview.py`` for ``family survey``.
"""
