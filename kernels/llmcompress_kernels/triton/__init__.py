"""Triton implementations; importing a module here needs triton, importing this package does not.

Every kernel reads the stored format as it is: the LSB-first int32 stream of :mod:`llmcompress_kernels.schemas`.
A second, derived layout would either double the memory of the weights or make the module and its state dict
disagree; what a shuffled layout buys on the GPU, the kernels get by widening words in registers instead
(:mod:`llmcompress_kernels.triton.decode`). Loading a model therefore costs no repacking.

``TRITON_INTERPRET=1``, set before triton is imported, runs the kernels on CPU tensors. The interpreter holds
bfloat16 as raw 16-bit integers, so arithmetic on it is silently wrong there: kernels widen bfloat16 to fp32
directly after a load and narrow it directly before a store, and where a dot needs bfloat16 operands the launchers
choose fp32 ones when interpreted (:func:`llmcompress_kernels.triton.group_gemm.store_type`).
"""
