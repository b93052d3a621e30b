"""Decoding over keys and values of fixed size, one CUDA graph a token.

A small model decoded operation by operation waits for the host: thirty layers are more than a thousand launches a
token, 25 ms whatever the batch. With keys and values at fixed places the launches are recorded once and replayed. What
it computes is what :func:`~llmcompress.evaluation.sampling.sample` computes without it; on a CPU the same code runs
unrecorded, which is how the tests hold the two together.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional

from llmcompress.nn import lora

# models whose attention is a plain one over all earlier tokens
PLAIN = frozenset({"llama", "mistral", "qwen2", "qwen3"})
# the fused attention kernels want rows of masks in multiples of this
_MULTIPLE = 16
_NAME = "llmcompress_grouped"


def supports(model: Any) -> bool:
    """Whether a model can be decoded here: plain attention in every layer, weights in the type of the products, and no
    adapters, whose factors are numbers that a recorded graph would keep.
    """
    config = model.config
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    plain = config.model_type in PLAIN and set(kinds) == {"full_attention"}
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return plain and not windowed and not torch.is_autocast_enabled(model.device.type) and not lora.adapters(model)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def grouped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention of one new token: the queries that share a key head are its rows, so that no key is copied.

    Args:
        module: Unused; the signature is that of transformers.
        query: ``[B, H, 1, D]``.
        key: ``[B, G, L, D]``, H a multiple of G.
        value: The same shape.
        attention_mask: ``[B, 1, 1, L]``, added to the scores.
        scaling: Factor on the scores.
        **rest: Unused as well.

    Returns:
        ``[B, 1, H, D]``.
    """
    batch, heads, _, width = query.shape
    packed = query.reshape(batch, key.shape[1], -1, width)
    found = functional.scaled_dot_product_attention(packed, key, value, attn_mask=attention_mask, scale=scaling)
    return found.reshape(batch, 1, heads, width), None


@contextmanager
def _attending(model: Any) -> Iterator[None]:
    """Let the model use :func:`grouped_attention` inside the ``with`` block, with kernels that take any mask and are
    not built anew for each shape.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(_NAME, grouped_attention)
    config = model.config
    before: str = config._attn_implementation
    config._attn_implementation = _NAME
    try:
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            yield
    finally:
        config._attn_implementation = before


@contextmanager
def _undemanding() -> Iterator[None]:
    """Without the demand for deterministic algorithms: each place of the cache is written once, so the plain kernels
    are deterministic here, and those that the demand selects sort their indices, which cannot be recorded.
    """
    wanted = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("default")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(wanted)


class _Places:
    """Keys and values ``[B, G, L, D]`` of one layer; a new token goes where ``place`` says."""

    def __init__(self, keys: Tensor, values: Tensor, place: Tensor) -> None:
        self.keys, self.values, self.place = keys, values, place


class _Cache:
    """The part of transformers' cache that a forward pass with its own mask and positions asks for."""

    is_compileable = False

    def __init__(self, layers: list[_Places]) -> None:
        self.layers = layers

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Put a token's key and value to their place; returns all of them."""
        layer = self.layers[layer_idx]
        layer.keys.index_copy_(2, layer.place, key)
        layer.values.index_copy_(2, layer.place, value)
        return layer.keys, layer.values

    @property
    def is_sliding(self) -> list[bool]:
        """False for every layer: none forgets."""
        return [False] * len(self.layers)

    @property
    def is_linear(self) -> list[bool]:
        """False for every layer: each has keys and values."""
        return [False] * len(self.layers)


class StaticDecoder:
    """Decodes batches of one shape.

    Args:
        model: See :func:`supports`. It is not kept; the same is to be given to :meth:`decode`. Its weights may change
            between batches, in place.
        rows: Rows of a batch.
        width: Longest prompt.
        longest: Most new tokens.

    The key-value cache takes ``rows · (width + longest)`` tokens for as long as the object lives.
    """

    def __init__(self, model: Any, rows: int, width: int, longest: int) -> None:
        self.rows, self.width, self.longest = rows, width, longest
        self._addresses = _addresses(model)
        self.length = _round_up(width + longest, _MULTIPLE)
        config, device, dtype = model.config, model.device, model.dtype
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (rows, config.num_key_value_heads, self.length, head)
        self.place = torch.full((1,), width, dtype=torch.int64, device=device)
        self.ids = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.position = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.bias = torch.full((rows, 1, 1, self.length), torch.finfo(dtype).min, dtype=dtype, device=device)
        # zeros, not empty: what is masked is multiplied by 0, and 0 · NaN is not 0
        self.layers = [
            _Places(
                torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device),
                self.place,
            )
            for _ in range(config.num_hidden_layers)
        ]  # fmt: skip
        self.logits = torch.zeros(0)
        self._graph: Any = None
        if device.type == "cuda":
            self._record(model)

    def fits(self, model: Any, rows: int, width: int, longest: int) -> bool:
        """Whether this is the decoder of a shape, and the model's weights lie where they lay when it was recorded."""
        same = (self.rows, self.width, self.longest) == (rows, width, longest)
        return same and self._addresses == _addresses(model)

    def _forward(self, model: Any) -> Tensor:
        self.bias.index_fill_(3, self.place, 0.0)
        found: Tensor = model(
            self.ids, attention_mask=self.bias, position_ids=self.position, past_key_values=_Cache(self.layers),
            use_cache=True, logits_to_keep=1,
        ).logits  # fmt: skip
        return found[:, -1]

    def _record(self, model: Any) -> None:
        device = model.device
        try:
            with _attending(model), _undemanding():
                aside = torch.cuda.Stream(device)
                aside.wait_stream(torch.cuda.current_stream(device))
                with torch.cuda.stream(aside):
                    for _ in range(2):
                        self._forward(model)
                torch.cuda.current_stream(device).wait_stream(aside)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    self.logits = self._forward(model)
            self._graph = graph
        except RuntimeError as error:
            torch.cuda.synchronize(device)
            warnings.warn(f"decoding is not recorded as a CUDA graph and will be slow: {error}", stacklevel=2)

    def _fill(self, model: Any, prompts: Sequence[Sequence[int]], pad: int) -> Tensor:
        """Keys and values of left-padded prompts; returns the logits ``[B, V]`` of the first new token."""
        from transformers import DynamicCache

        ids = torch.full((self.rows, self.width), pad)
        mask = torch.zeros((self.rows, self.width), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, self.width - len(prompt) :] = torch.tensor(list(prompt))
            mask[row, self.width - len(prompt) :] = 1
        # a row of nothing has no distribution
        mask[len(prompts) :, -1] = 1
        position = (mask.cumsum(1) - 1).clamp_min(0)
        device = model.device
        ids, mask, position = ids.to(device), mask.to(device), position.to(device)
        cache: Any = DynamicCache(config=model.config)
        logits: Tensor = model(
            ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1]
        for own, filled in zip(self.layers, cache.layers, strict=True):
            own.keys[:, :, : self.width].copy_(filled.keys)
            own.values[:, :, : self.width].copy_(filled.values)
        self.place.fill_(self.width)
        self.position.copy_(position[:, -1:] + 1)
        self.bias.fill_(torch.finfo(self.bias.dtype).min)
        self.bias[:, 0, 0, : self.width].masked_fill_(mask.bool(), 0.0)
        return logits

    def decode(
        self, model: Any, prompts: Sequence[Sequence[int]], end: int, pad: int, choose: Callable[[Tensor], Tensor]
    ) -> list[list[int]]:
        """Continue prompts, at most ``rows`` of them.

        Args:
            model: The one this was made for.
            prompts: Token ids of each.
            end: Id of the end token.
            pad: Id for padding.
            choose: Logits ``[B, V]`` → ids ``[B]`` on the device.

        Returns:
            New ids of each prompt, the end token included.
        """
        device = model.device
        written = torch.full((self.rows, self.longest), -1, dtype=torch.int64, device=device)
        ended = torch.zeros(self.rows, dtype=torch.bool, device=device)
        ended[len(prompts) :].fill_(True)
        logits = self._fill(model, prompts, pad)
        with _attending(model), _undemanding():
            for step in range(self.longest):
                chosen = choose(logits)
                written[:, step] = chosen.masked_fill(ended, -1)
                ended |= chosen == end
                # asking waits for the device
                if step + 1 == self.longest or (step % 8 == 7 and bool(ended.all())):
                    break
                self.ids.copy_(chosen[:, None])
                if self._graph is not None:
                    self._graph.replay()
                    logits = self.logits
                else:
                    logits = self._forward(model)
                self.place.add_(1)
                self.position.add_(1)
        return [[token for token in row if token >= 0] for row in written[: len(prompts)].tolist()]


def _addresses(model: Any) -> list[int]:
    """Where the weights lie: a recorded graph reads them there, whatever the model has become."""
    return [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]


_DECODERS: WeakKeyDictionary[Any, StaticDecoder] = WeakKeyDictionary()


def decoder_of(model: Any, rows: int, width: int, longest: int) -> StaticDecoder:
    """The decoder of a model for this shape: recorded once, used for every batch like it; another shape replaces it."""
    rows, width = _round_up(rows, 64), _round_up(width, _MULTIPLE)
    found = _DECODERS.get(model)
    if found is None or not found.fits(model, rows, width, longest):
        _DECODERS.pop(model, None)
        found = StaticDecoder(model, rows, width, longest)
        _DECODERS[model] = found
    return found
