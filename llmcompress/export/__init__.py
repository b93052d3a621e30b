"""Writes compressed models: native, compressed-tensors, GGUF, dense.

Every exporter says first what it would refuse, writes a folder that appears only when it is complete, and reads it back
(``base.py``). Those of families are ``family.py`` and ``family_edit.py``.
"""
