"""What goes through a model block by block: each block is on disk, complete, before the next begins.

A stage derives from a class of ``quantizer.py``; ``engine.py`` does its work, ``estimate.py`` says beforehand what that
takes. ``block_solver.py`` quantizes one block while the walker runs it (``pooled_solver.py``: with several processes)
by the method, a class of ``method.py``, that the stage's config names. ``rules.py`` has the recipe fields,
``bit_measurement.py`` chooses widths, ``shared_statistics.py`` sums over weights that several blocks run.
``reconstruction.py`` is the engine of ``esr``, ``state_measurement.py`` what ``dsq`` measures.
"""
