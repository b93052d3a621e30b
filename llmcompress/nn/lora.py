"""Low-rank adapters on dense or packed linears: ``y = base(x) + (α/r) x Aᵀ Bᵀ`` (Hu et al., arXiv 2106.09685).

The weight below stays what it is, packed codes included; gradients pass through it to earlier layers but never into
it. Files are in PEFT's format, so that PEFT can read them too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.errors import InputError
from llmcompress.models.lora_checkpoint import CONFIG, DOWN, PREFIX, UP, WEIGHTS
from llmcompress.nn.linear import PackedLinear
from llmcompress.quant.codecs import codec


class _FrozenProduct(torch.autograd.Function):
    """Product with a packed weight; the backward pass decodes the weight, so that nothing dense is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: PackedLinear) -> Tensor:
        ctx.base = base
        return base(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        packed = ctx.base.packed_weight()
        weight = codec(packed.spec.codec).decode(packed)
        return grads[0] @ weight.to(grads[0].dtype), None


class LoraLinear(nn.Module):
    """A linear with an adapter.

    Args:
        base: ``nn.Linear`` or :class:`PackedLinear`; frozen.
        rank: r.
        alpha: α.
        generator: For ``A``; ``B`` begins at zero, so that a new adapter changes nothing.
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.in_features: int = base.in_features  # type: ignore[assignment]
        self.out_features: int = base.out_features  # type: ignore[assignment]
        self.scale = alpha / rank
        bound = 1 / math.sqrt(self.in_features)
        start = (torch.rand(rank, self.in_features, generator=generator) * 2 - 1) * bound
        self.lora_A = nn.Parameter(start)
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank))

    @property
    def weight(self) -> Tensor:
        """The base's: code that inspects ``.weight`` finds one."""
        found: Tensor = self.base.weight  # type: ignore[assignment]
        return found

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` → ``[..., out_features]``, in the type of ``x``."""
        if isinstance(self.base, PackedLinear) and torch.is_grad_enabled() and x.requires_grad:
            y: Tensor = _FrozenProduct.apply(x, self.base)
        else:
            y = self.base(x)
        low = nn.functional.linear(x.to(self.lora_A.dtype), self.lora_A)
        return y + (self.scale * nn.functional.linear(low, self.lora_B)).to(y.dtype)


def attach(model: nn.Module, names: list[str], rank: int, alpha: float, seed: int) -> dict[str, nn.Parameter]:
    """Wrap linears in place.

    Args:
        model: Any model.
        names: Full names of dense or packed linears.
        rank: Rank of every adapter.
        alpha: Scale of every adapter, times its rank.
        seed: Seed of the start values; each adapter's depend on its place in ``names``, not on the others.

    Returns:
        Parameter name → parameter, ``<linear>.lora_A`` and ``<linear>.lora_B``.

    Raises:
        InputError: A name is not a linear.
    """
    found: dict[str, nn.Parameter] = {}
    for place, name in enumerate(names):
        base = model.get_submodule(name)
        if not isinstance(base, nn.Linear | PackedLinear):
            raise InputError(f"{name} is a {type(base).__name__}: only linears take an adapter")
        generator = torch.Generator().manual_seed((seed * 1_000_003 + place) % 2**63)
        wrapped = LoraLinear(base, rank, alpha, generator).to(_device(base))
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, wrapped)
        found[f"{name}.lora_A"], found[f"{name}.lora_B"] = wrapped.lora_A, wrapped.lora_B
    return found


def _device(module: nn.Module) -> torch.device:
    tensors = [*module.parameters(), *module.buffers()]
    return tensors[0].device


def adapters(model: nn.Module) -> dict[str, LoraLinear]:
    """Adapted linears by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Values of all adapters, by the names that :func:`attach` gives them."""
    found = adapters(model).items()
    return {f"{name}.{key}": getattr(module, key) for name, module in found for key in ("lora_A", "lora_B")}


@contextmanager
def switched(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Run with other adapter values inside the ``with`` block.

    Args:
        model: With adapters.
        values: Parameter name → value, as :func:`attach` names them.
    """
    places = parameters(model)
    own = {name: place.data for name, place in places.items()}
    try:
        for name, place in places.items():
            place.data = values[name]
        yield
    finally:
        for name, place in places.items():
            place.data = own[name]


def added(adapter: LoraLinear) -> Tensor:
    """What an adapter adds to the weight below it, fp32 ``[N, K]`` on the CPU."""
    low, high = adapter.lora_A.detach().cpu().float(), adapter.lora_B.detach().cpu().float()
    return adapter.scale * high @ low


def save(model: nn.Module, folder: Path) -> None:
    """Write adapters in PEFT's format; equal adapters give equal bytes.

    Args:
        model: With adapters of one rank and α.
        folder: Exists.
    """
    from safetensors.torch import save as to_bytes

    from llmcompress.durable import write_durably

    found = adapters(model)
    tensors = {}
    for name, module in sorted(found.items()):
        tensors[f"{PREFIX}{name}{DOWN}"] = module.lora_A.detach().cpu().contiguous()
        tensors[f"{PREFIX}{name}{UP}"] = module.lora_B.detach().cpu().contiguous()
    first = next(iter(found.values()))
    rank = first.lora_A.shape[0]
    config = {
        "base_model_name_or_path": None, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "lora_alpha": first.scale * rank, "lora_dropout": 0.0, "peft_type": "LORA", "r": rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in found}), "task_type": "CAUSAL_LM",
    }  # fmt: skip
    write_durably(folder / CONFIG, json.dumps(config, indent=1, sort_keys=True).encode() + b"\n")
    write_durably(folder / WEIGHTS, to_bytes(tensors))


def load(model: nn.Module, folder: Path) -> dict[str, nn.Parameter]:
    """Attach adapters that :func:`save` wrote.

    Returns:
        Parameter name → parameter.

    Raises:
        InputError: A file is missing or damaged, or belongs to another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"{folder}: cannot read the adapter: {error}", "export or train it again") from error
    names = sorted(name.removeprefix(PREFIX).removesuffix(DOWN) for name in tensors if name.endswith(DOWN))
    try:
        found = attach(model, names, rank, alpha, 0)
        for name in names:
            for key in ("lora_A", "lora_B"):
                own, stored = found[f"{name}.{key}"], tensors[f"{PREFIX}{name}.{key}.weight"]
                # copying alone would spread a factor of rank 1 over all ranks
                if own.shape != stored.shape:
                    raise RuntimeError(f"{name}.{key} is {list(stored.shape)}, not {list(own.shape)}")
                own.data.copy_(stored)
    except (AttributeError, KeyError, RuntimeError) as error:
        raise InputError(f"{folder}: the adapter does not fit this model: {error}") from error
    return found
