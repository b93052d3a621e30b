"""Benchmarks of the operators: candidates in turn, medians, cold weights, bandwidth probed in the same run."""

from __future__ import annotations

from llmcompress_kernels.bench.linear import bench_linear
from llmcompress_kernels.bench.moe import bench_moe
from llmcompress_kernels.bench.timing import (
    Timing,
    bandwidth_probes,
    byte_product_rate,
    environment,
    interleave,
    read_bandwidth,
)

__all__ = [
    "Timing",
    "bandwidth_probes",
    "bench_linear",
    "bench_moe",
    "byte_product_rate",
    "environment",
    "interleave",
    "read_bandwidth",
]
