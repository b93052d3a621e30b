"""A whole Mixtral-8x7B with random 3-bit weights generates tokens; its bytes over the copy rate are the floor.

Random weights say nothing of quality: this measures that the model fits and how fast it decodes.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from gpu_matrix import EXPERTS, HIDDEN, INTERMEDIATE, SLOTS, nbytes, packed
from llmcompress_kernels import ops
from torch import Tensor
from torch.nn import functional

LAYERS, HEADS, KEY_HEADS, HEAD, VOCABULARY = 32, 32, 8, 128, 32000
LENGTH = 256
# rows and columns of the linears around attention


class Layer:
    """One decoder layer; every matrix packed, norms dense."""

    def __init__(self, bits: int) -> None:
        self.qkv = packed((HEADS + 2 * KEY_HEADS) * HEAD, HIDDEN, bits=bits)
        self.out = packed(HIDDEN, HEADS * HEAD, bits=bits)
        self.up = packed(EXPERTS, 2 * INTERMEDIATE, HIDDEN, bits=bits)
        self.down = packed(EXPERTS, HIDDEN, INTERMEDIATE, bits=bits)
        self.router = torch.randn(EXPERTS, HIDDEN, dtype=torch.bfloat16, device="cuda")
        self.norms = torch.ones(2, HIDDEN, dtype=torch.bfloat16, device="cuda")
        self.keys = torch.zeros(KEY_HEADS, LENGTH, HEAD, dtype=torch.bfloat16, device="cuda")
        self.values = torch.zeros_like(self.keys)

    def nbytes(self) -> int:
        """Bytes of the packed weights."""
        return sum(nbytes(s) for s in (self.qkv, self.out, self.up, self.down))

    def __call__(self, x: Tensor, position: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """``[1, H]`` to ``[1, H]``; writes the caches at ``position``."""
        inner = functional.rms_norm(x, (HIDDEN,), self.norms[0])
        qkv = _linear(inner, self.qkv).view(HEADS + 2 * KEY_HEADS, HEAD)
        turned = _rotate(qkv[: HEADS + KEY_HEADS], rotation)
        self.keys.index_copy_(1, position, turned[HEADS:, None])
        self.values.index_copy_(1, position, qkv[HEADS + KEY_HEADS :, None])
        # the heads that share a key are the rows of a product
        q = turned[:HEADS].view(KEY_HEADS, HEADS // KEY_HEADS, HEAD)
        scores = torch.baddbmm(mask, q, self.keys.transpose(1, 2), alpha=HEAD**-0.5)
        attended = torch.bmm(torch.softmax(scores, -1), self.values)
        x = x + _linear(attended.view(1, HEADS * HEAD), self.out)
        inner = functional.rms_norm(x, (HIDDEN,), self.norms[1])
        # shares of the chosen experts: a softmax over all, normalized over these, is one over these
        logits, index = functional.linear(inner, self.router).topk(SLOTS, -1)
        weights = torch.softmax(logits, -1, dtype=torch.float32)
        return x + ops.moe_group_gemm(inner, index, weights, self.up, self.down, INTERMEDIATE)


def _linear(x: Tensor, w: ops.Stack) -> Tensor:
    assert w.scale is not None
    return ops.group_gemm(x, w.weight, w.scale, w.zero, w.bits, w.group_size, x.shape[-1])


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cosine, sine = rotation
    low, high = x.chunk(2, -1)
    return x * cosine + torch.cat((-high, low), -1) * sine


def generate(bits: int, rate: float, tokens: int = 64) -> dict[str, Any]:
    """Decode greedily through one captured step; returns tokens per second, bytes and the floor."""
    torch.cuda.reset_peak_memory_stats()
    layers = [Layer(bits) for _ in range(LAYERS)]
    embedding = torch.randn(VOCABULARY, HIDDEN, dtype=torch.bfloat16, device="cuda")
    head = torch.randn(VOCABULARY, HIDDEN, dtype=torch.bfloat16, device="cuda") * 0.02
    resident = torch.cuda.memory_allocated()
    angle = torch.arange(LENGTH, device="cuda")[:, None] / 1e6 ** (torch.arange(0, HEAD, 2, device="cuda") / HEAD)
    angle = torch.cat((angle, angle), -1)
    cosine, sine = angle.cos().to(torch.bfloat16), angle.sin().to(torch.bfloat16)
    token, position = torch.zeros(1, dtype=torch.long, device="cuda"), torch.zeros(1, dtype=torch.long, device="cuda")
    places = torch.arange(LENGTH, device="cuda")

    def step() -> None:
        x = embedding[token]
        mask = torch.where(places <= position, 0.0, float("-inf")).to(torch.bfloat16)[None, None, :]
        rotation = (cosine[position], sine[position])
        for layer in layers:
            x = layer(x, position, rotation, mask)
        token.copy_(functional.linear(functional.rms_norm(x, (HIDDEN,)), head).argmax(-1))
        position.add_(1)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()  # the first one also brings the graph to the GPU
    torch.cuda.synchronize()
    produced, began = [], time.perf_counter()
    for _ in range(tokens):
        graph.replay()
        produced.append(token.clone())
    torch.cuda.synchronize()
    took = time.perf_counter() - began
    per_layer = layers[0]
    touched = LAYERS * (nbytes(per_layer.qkv) + nbytes(per_layer.out)) + head.nbytes
    touched += LAYERS * SLOTS * (nbytes(per_layer.up) + nbytes(per_layer.down)) // EXPERTS
    return {
        "op": "mixtral-8x7b", "bits": bits, "resident_gb": round(resident / 1e9, 2),
        "tokens_per_second": round(tokens / took, 2), "floor_tokens_per_second": round(rate / touched, 2),
        "tokens": torch.cat(produced).tolist()[:8],
    }  # fmt: skip
