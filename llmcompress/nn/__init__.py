"""Modules of a loaded model whose weights and states stay packed.

``linear.py``, ``experts.py`` and ``embedding.py`` take the place of dense modules (``swap.py``); ``states.py`` and
``mixers.py`` keep recurrent states in low bits, ``skipping.py`` leaves experts out, ``tree_linear.py`` serves several
models of a tree, ``lora.py`` trains on packed weights.
"""
