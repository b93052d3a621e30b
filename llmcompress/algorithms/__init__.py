"""The mathematics: pure functions on tensors; every file names its paper and the equations.

Nothing here knows files, recipes or transformers. ``gptq.py`` rounds weights, with ``hessian.py``, ``grids.py`` and
``scale_refit.py``; ``router_calibration.py`` and ``expert_skipping.py`` are EAC-MoE's, ``decoupled_scales.py`` and
``state_reconstruction.py`` Q-Mamba's, ``tree_topology.py``, ``tree_allocation.py`` and ``residual_tree.py`` RQT's,
``self_verify.py`` and ``rl_objectives.py`` S2R's. The tests in ``tests/paper`` write the same equations once more,
slowly.
"""
