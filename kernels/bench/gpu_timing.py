"""How the scripts of this folder time: :mod:`llmcompress_kernels.bench.replay`, which the package needs as well."""

from llmcompress_kernels.bench.replay import Timed, copy_rate, read_rate, replay, rotations

__all__ = ["Timed", "copy_rate", "read_rate", "replay", "rotations"]
