"""The stages of S2R: ``init.py`` is ``s2r_init``, ``rl.py`` ``s2r_rl``, ``traces.py`` ``s2r_traces``, ``evaluate.py``
``s2r_evaluate``.

Their common parts: ``config.py`` has recipe fields and opens the model, ``sampling.py`` collects responses,
``training.py`` trains, keeps and measures, ``work.py`` counts for ``plan``. The loops are in ``llmcompress/training/``.
"""
