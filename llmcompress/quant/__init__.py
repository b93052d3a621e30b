"""What a quantized weight is, and how it is stored.

``rules.py`` decides which weight gets how many bits, ``spec.py`` describes it, ``packed.py`` holds it in memory,
``bitpack.py`` packs its codes, ``store.py`` keeps finished blocks on disk. ``tree.py`` and ``family.py`` are the plan
of a family, ``states.py`` describes recurrent states. How codes are chosen is in :mod:`llmcompress.algorithms`.
"""
