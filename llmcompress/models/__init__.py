"""Models as compression sees them: their layout, their files, and running them a block at a time.

``layout.py`` says what a model consists of, ``families/`` and ``registry.py`` compute that from ``config.json``.
``checkpoint.py`` reads weights lazily, ``handle.py`` makes modules of them block by block, ``walker.py`` runs a block
in stages so that a visitor can change its weights in between. ``assemble.py`` puts a compressed model together.
"""
