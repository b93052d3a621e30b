"""A whole family run on a GPU that is not there: what mixes devices fails; the result is near the CPU's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from llmcompress.errors import ExitCode
from llmcompress.models.family_artifact import FamilyArtifact
from llmcompress.models.member_stream import MemberStream

METHOD = torch._C._disabled_torch_function_impl
TYPES = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "long": torch.int64}


class Pretended(Tensor):
    """A tensor that says it is on ``cuda`` and holds its values on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Pretended:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device="cuda",
        )  # fmt: skip
        made.inner = inner
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            return Pretended(own(args[0])[tree_map(bare, args[1])])
        if func is Tensor.__setitem__:
            own(args[0])[tree_map(bare, args[1])] = bare(args[2])
            return None
        return METHOD(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def bare(value: Any) -> Any:
    return value.inner if isinstance(value, Pretended) else value


def own(place: Tensor) -> Tensor:
    assert isinstance(place, Pretended), "a tensor on the cpu is indexed by, or filled from, one on cuda"
    return place.inner


def on_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operator on the values, once its operands are known to lie together."""
    flat, spec = tree_flatten((args, kwargs))
    there = {id(each.inner): each for each in flat if isinstance(each, Pretended)}
    here = [each for each in flat if isinstance(each, Tensor) and not isinstance(each, Pretended) and each.dim() > 0]
    if there and here and func is not torch.ops.aten.copy_.default:
        shapes = [tuple(each.shape) for each in there.values()], [tuple(each.shape) for each in here]
        raise AssertionError(f"{func}: operands on cuda {shapes[0]} and on the cpu {shapes[1]}")
    target = kwargs.get("device")
    result_there = on_gpu(target) if target is not None else bool(there)
    args, kwargs = tree_unflatten([bare(each) for each in flat], spec)
    if on_gpu(target):
        kwargs["device"] = "cpu"
    # which CPUs lack
    wide = func is torch.ops.aten.mm.dtype
    found = args[0].to(args[2]) @ args[1].to(args[2]) if wide else func(*args, **kwargs)

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return there[id(value)] if id(value) in there else Pretended(value) if result_there else value

    return tree_map(wrapped, found)


def moved(tensor: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
    device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
    was = isinstance(tensor, Pretended)
    will = was if device is None else on_gpu(device)
    if was == will and not copy and dtype in (None, tensor.dtype):
        return tensor
    inner = bare(tensor).detach()
    inner = inner.to(dtype or inner.dtype, copy=copy or was != will)
    return Pretended(inner) if will else inner


def cast(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda tensor: moved(tensor, dtype)


def contiguous(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    found = own(tensor).contiguous(*args, **kwargs)
    return tensor if found is own(tensor) else Pretended(found)


class Methods(TorchFunctionMode):
    """Methods that ask the driver for a device before they dispatch."""

    table: ClassVar[dict[Any, Callable[..., Any]]] = {
        Tensor.contiguous: contiguous, Tensor.cpu: lambda tensor: moved(tensor, "cpu"),
        Tensor.item: lambda tensor: own(tensor).item(), Tensor.tolist: lambda tensor: own(tensor).tolist(),
        Tensor.__float__: lambda tensor: float(own(tensor)), Tensor.__int__: lambda tensor: int(own(tensor)),
        Tensor.__bool__: lambda tensor: bool(own(tensor)),
        **{getattr(Tensor, name): cast(dtype) for name, dtype in TYPES.items()},
    }  # fmt: skip

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and on_gpu(kwargs.get("device")):
            return Pretended(torch.tensor(*args, **{**kwargs, "device": "cpu"}))
        if func is Tensor.copy_ and any(isinstance(each, Pretended) for each in args):
            bare(args[0]).copy_(bare(args[1]))
            return args[0]
        if func is Tensor.to:
            places = [each.device if isinstance(each, Tensor) else each for each in (*args, *kwargs.values())]
            if any(on_gpu(each) for each in places if isinstance(each, str | torch.device)):
                return moved(*args, **kwargs)
        if func in self.table and isinstance(args[0], Pretended):
            return self.table[func](*args, **kwargs)
        return func(*args, **kwargs)


class Operators(TorchDispatchMode):
    """What makes new tensors on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


@contextmanager
def pretended_gpu() -> Iterator[None]:
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with (
            mock.patch("torch.cuda.is_available", lambda: True),
            mock.patch("torch.cuda._lazy_init", lambda: None),
            mock.patch("torch.cuda.manual_seed_all", lambda _: None),
            mock.patch("torch.cuda.mem_get_info", lambda: (1 << 36, 1 << 36)),
            Operators(),
            Methods(),
        ):
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


def test_the_pretended_gpu_refuses_mixed_operands() -> None:
    with pretended_gpu():
        there = torch.ones(3, device="cuda")
        assert there.is_cuda
        assert (there + 1).sum().item() == 6
        assert there.to("cpu").device.type == "cpu"
        with pytest.raises(AssertionError, match="on cuda"):
            there + torch.ones(3)
        with pytest.raises(AssertionError, match="cpu"):
            torch.ones(3)[torch.zeros(1, dtype=torch.int64, device="cuda")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_family_on_a_gpu_ends_near_the_cpus_result(
    family_run: Path, tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmcompress.cli.app import invoke

    monkeypatch.setenv("LLMCOMPRESS_KERNELS", "reference")
    for name in ("base", "ant", "bee", "cat"):
        shutil.copytree(family_run / name, tmp_path / name)
    recipe = (family_run / "recipe.yaml").read_text().replace(str(family_run), str(tmp_path))
    # gradients need the driver itself, since autograd starts a thread for every device
    plain = "stages.rqt.bits.importance=relative"
    (tmp_path / "cpu.yaml").write_text(recipe)
    assert invoke(["run", str(tmp_path / "cpu.yaml"), f"run.dir={tmp_path}/cpu", plain, "--quiet"]) == ExitCode.OK
    (tmp_path / "recipe.yaml").write_text(recipe.replace("device: cpu", f"device: cuda, compute_dtype: {dtype}"))
    homes = []
    taken = MemberStream.load
    monkeypatch.setattr(
        MemberStream, "load", lambda self, block: (homes.append(self.hidden.device), taken(self, block))
    )
    baselines = "stages.evaluate_family.baselines=[gptq-3,bitdelta]"
    with pretended_gpu():
        assert invoke(["run", str(tmp_path / "recipe.yaml"), baselines, plain, "--quiet"]) == ExitCode.OK
    assert {home.type for home in homes} == {"cuda"}
    here, there = (FamilyArtifact(tmp_path / run / "artifact") for run in ("cpu", "run"))
    if dtype == "float32":
        assert there.plan.bits == here.plan.bits
    for member in here.members:
        for linear in here.plan.linears:
            expected, found = here.weight(linear, member), there.weight(linear, member)
            # a weight on a rounding boundary may go either way
            assert (found - expected).square().sum() < 0.1 * expected.square().sum()
    rows = json.loads((tmp_path / "run/stages/evaluate_family/family.json").read_text())
    assert set(rows["methods"]) == {"rqt", "gptq-3", "bitdelta"}
