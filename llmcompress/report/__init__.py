"""The pages of a run and of a sweep: one HTML file each, without scripts from elsewhere.

``data.py`` collects what a run folder says, ``build.py`` writes the page, ``plots.py`` draws. Sections of their own are
``experts.py``, ``states.py``, ``self_correction.py`` and ``family.py``.
"""
