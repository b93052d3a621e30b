"""What every exporter shares: the interface, shards, and folders that appear only when complete."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.durable import write_durably
from llmcompress.errors import ExportError, LLMCompressError, ResourceError
from llmcompress.models import sizes
from llmcompress.quant.packed import PackedWeight

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from llmcompress.models.handle import ModelHandle
    from llmcompress.models.layout import Block, ModelLayout
    from llmcompress.models.quantization_config import Policies
    from llmcompress.quant.spec import QuantPlan
    from llmcompress.quant.store import PackedStore

# lines that load a folder of weights, for model cards
FROM_PRETRAINED = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```"""
SHARD_BYTES = 2_000_000_000
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
# beside them: SentencePiece models and rank files of any name, and templates for other uses than chats
TOKENIZER_PATTERNS = ("*.model", "*.tiktoken", "additional_chat_templates/*.jinja")


class Exporter(ABC):
    """One file format.

    Everything but :meth:`write` and :meth:`read_back` is decided from the layout and the plan
    alone, without torch, so that ``plan`` can say before any work what will be possible.
    """

    name: str
    loading = ""
    """How an artifact is loaded: a fenced block for its model card, ``PATH`` is its folder. Empty to say nothing."""

    def __init__(self, dense_dtype: str = "auto") -> None:
        """``dense_dtype`` is for a format that leaves weights dense and has a choice of their type."""
        self.dense_dtype = dense_dtype

    @abstractmethod
    def refusals(self, layout: ModelLayout, plan: QuantPlan, policies: Policies) -> list[str]:
        """Return every reason for which this format cannot hold the model; empty means it can."""

    def losses(self, policies: Policies) -> list[str]:
        """Return what the artifact will lack although its weights are exact; the user is warned."""
        return [f"the {name} policy acts at run time and is not carried by this format" for name in policies]

    def remarks(self, layout: ModelLayout, plan: QuantPlan) -> list[str]:
        """Return what readers of this format do that is worth knowing."""
        return []

    def source_refusals(self, folder: Path, config: Mapping[str, Any], tokenizer: Path | None = None) -> list[str]:
        """Return reasons that lie in the source's config or tokenizer, or in missing packages.

        Args:
            folder: The source model.
            config: Its ``config.json``.
            tokenizer: Folder of the tokenizer, if it is another one.
        """
        return []

    @abstractmethod
    def output_bytes(
        self, layout: ModelLayout, plan: QuantPlan, weight_bytes: int, policies: Policies | None = None
    ) -> int:
        """Predict the size of the artifact.

        Args:
            layout: The model's layout.
            plan: How each weight is quantized.
            weight_bytes: Bytes of a parameter that stays dense.
            policies: Run-time policies by name; those that change sizes are enough.
        """

    def working_bytes(
        self, layout: ModelLayout, plan: QuantPlan, weight_bytes: int, policies: Policies | None = None
    ) -> int:
        """Predict the memory needed while writing: one block decoded, beside one shard on its way out."""
        largest = max((sizes.block_parameters(block) for block in layout.blocks), default=0)
        outside = max((prod(view.shape) for view in layout.outside), default=0)
        shard = min(SHARD_BYTES, self.output_bytes(layout, plan, weight_bytes, policies))
        return 4 * max(largest, outside) + shard

    @abstractmethod
    def write(
        self, handle: ModelHandle, store: PackedStore, policies: Policies, out: Path, provenance: dict[str, Any]
    ) -> None:
        """Write the artifact so that ``out`` exists only when complete."""

    @abstractmethod
    def read_back(self, out: Path, handle: ModelHandle, store: PackedStore, policies: Policies | None = None) -> None:
        """Read ``out`` with a reader that is not this writer and compare every value.

        Args:
            out: The artifact.
            handle: The source.
            store: What the quantizing stages made of it.
            policies: Run-time policies by name, as they were given to :meth:`write`.

        Raises:
            ExportError: A value differs or is missing; nothing should then use the artifact.
        """


def expert_rows(packed: PackedWeight, rows: slice, expert: int | None = None) -> PackedWeight:
    """Cut rows out of stacked experts; rows are packed independently, so no bit moves.

    Args:
        packed: ``[E, N, K]``.
        rows: Rows of N.
        expert: Of which expert, ``[n, K]``; None for all, ``[E, n, K]``.
    """
    experts = slice(None) if expert is None else expert
    tensors = {key: tensor[experts, rows].contiguous() for key, tensor in packed.tensors.items()}
    count = len(range(*rows.indices(packed.shape[1])))
    leading = packed.shape[:1] if expert is None else ()
    return PackedWeight((*leading, count, packed.shape[2]), packed.spec, tensors)


def some(names: Iterable[str]) -> str:
    """``first name and 5 more``."""
    listed = list(names)
    return listed[0] if len(listed) == 1 else f"{listed[0]} and {len(listed) - 1} more"


def decoded(packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Decode through the weight's codec, in fp32 and then cast to ``dtype``."""
    from llmcompress.quant.codecs import codec

    return codec(packed.spec.codec).decode(packed, dtype)


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a tensor to another floating type; integers stay as they are.

    Args:
        name: For the error.
        tensor: Finite values of any shape.
        dtype: Wanted floating type.

    Raises:
        ExportError: A value is beyond ``dtype``: fp16 ends at 65504 and would make it infinite.
    """
    import torch

    from llmcompress.models.tensor_file import all_finite

    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    found = tensor.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max and not all_finite(found) and all_finite(tensor):
        kind, largest = str(dtype).removeprefix("torch."), float(tensor.abs().max())
        raise ExportError(
            f"{name}: holds {largest:.6g}, and {kind} ends at {torch.finfo(dtype).max:.6g}",
            "write bfloat16 or float32: dense_dtype of the stage, or the type of the model",
        )
    return found


def block_tensors(handle: ModelHandle, store: PackedStore, block: Block) -> dict[str, Tensor | PackedWeight]:
    """All weights of one block after compression, by run-time name.

    Linears appear as ``<module>.weight``; experts under their plan names, canonical ``[E, N, K]``
    whether quantized or not. Tensors a stage replaced (calibrated routers) take the place of the
    checkpoint's. Calibrated scales of states are left out: they belong to a policy, which only the native format
    carries.
    """
    from llmcompress.models.orientation import canonical
    from llmcompress.quant.states import SCALE

    patch = store.read_block(block.index)
    found: dict[str, Tensor | PackedWeight] = {}
    for view in block.kept:
        found[view.name] = handle.checkpoint.tensor(view.name)
    for linear in block.linears():
        name = f"{linear.name}.weight"
        found[name] = patch.packed[linear.name] if linear.name in patch.packed else handle.checkpoint.tensor(name)
        bias = f"{linear.name}.bias"
        if linear.bias and bias not in found:
            found[bias] = handle.checkpoint.tensor(bias)
    bank = block.bank
    if bank is not None:
        for name in bank.names:
            packed = patch.packed.get(name)
            found[name] = packed if packed is not None else canonical(bank, name, handle.checkpoint.tensor(name))
    for name, tensor in patch.replaced.items():
        if name.endswith(f".{SCALE}"):
            continue
        if name not in found:
            raise ExportError(f"{name}: a stage replaced a tensor that block {block.index} does not have")
        found[name] = tensor
    return found


def outside_tensors(handle: ModelHandle) -> Iterator[tuple[str, Tensor]]:
    """Embedding, final norm and (untied) head, by run-time name."""
    for view in handle.layout.outside:
        yield view.name, handle.checkpoint.tensor(view.name)


def hub_weights(
    layout: ModelLayout, block: Block, tensors: Iterable[tuple[str, Tensor | PackedWeight]]
) -> Iterator[tuple[str, Tensor | PackedWeight]]:
    """Yield a block's tensors under hub names; stacked experts are cut apart where hub checkpoints hold them so.

    Args:
        layout: The model's layout.
        block: The block they belong to.
        tensors: Run-time names and values, as those of :func:`block_tensors`.

    Yields:
        Packed weights by module, without ``.weight``; dense tensors by their full name.
    """
    from llmcompress.models.orientation import family_orientation

    disk, bank = layout.disk, block.bank
    for name, value in tensors:
        if bank is None or name not in bank.names:
            if isinstance(value, PackedWeight):
                yield disk.name(name).removesuffix(".weight"), value
            else:
                for piece, rows in disk.pieces(name).items():
                    yield piece, value[rows] if value.ndim else value
        elif disk.experts is None:
            assert not isinstance(value, PackedWeight), "a packed stack was refused earlier"
            yield disk.name(name), family_orientation(bank, name, value)
        else:
            for expert in range(bank.num_experts):
                names = disk.expert(bank, name, expert)
                for key, rows in bank.parts(name).items():
                    if isinstance(value, PackedWeight):
                        yield names[key].removesuffix(".weight"), expert_rows(value, rows, expert)
                    else:
                        yield names[key], value[expert, rows]


def artifact_folder(base: Path, name: str) -> Path:
    """Folder of an artifact in the format ``name``: ``base`` of the native one, the others beside it."""
    return base if name == "native" else base.with_name(f"{base.name}-{name}")


class ShardWriter:
    """Writes safetensors shards in the hub's naming, holding at most one shard in memory.

    Args:
        folder: Where shards go; must exist.
        shard_bytes: Size after which a new shard begins.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder = folder
        self._limit = shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._bytes = 0
        self._shards: list[list[str]] = []
        self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor, writing out the current shard first when it is full."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._bytes + size > self._limit:
            self._flush()
        if name in self._pending or any(name in shard for shard in self._shards):
            raise ExportError(f"{name}: written twice; the family's disk names are ambiguous")
        self._pending[name] = tensor.contiguous()
        self._bytes += size
        self._total += size

    def close(self) -> None:
        """Write the last shard and, if there are several, the index."""
        if self._pending or not self._shards:
            self._flush()
        count = len(self._shards)
        if count == 1:
            self._part(1).rename(self._folder / "model.safetensors")
            return
        where = {}
        for number, names in enumerate(self._shards, start=1):
            final = f"model-{number:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self._folder / final)
            where.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(where.items()))}
        write_json(self._folder / "model.safetensors.index.json", index)

    def _part(self, number: int) -> Path:
        return self._folder / f"model-{number:05d}.safetensors.part"

    def _flush(self) -> None:
        from llmcompress.quant.tensor_writer import write_tensors

        self._shards.append(sorted(self._pending))
        path = self._part(len(self._shards))
        with path.open("wb") as handle:
            write_tensors(handle, self._pending, {"format": "pt"})
        self._pending, self._bytes = {}, 0


def write_json(path: Path, data: Any) -> None:
    """Write deterministic, readable JSON."""
    path.write_text(json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Yield a scratch folder beside ``out`` that becomes ``out`` when the block ends without an error.

    Raises:
        ExportError: ``out`` exists, or its parent cannot be written.
        ResourceError: The disk is full; nothing is left behind.
    """
    if out.exists():
        raise ExportError(f"{out}: already exists", "remove it or choose another folder")
    part = out.with_name(out.name + ".partial")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        for path in sorted(part.rglob("*")):
            if path.is_file():
                _sync(path)
        part.rename(out)
        _sync(out.parent)
    except LLMCompressError:
        # what was refused half-way is no use, and may be large
        shutil.rmtree(part, ignore_errors=True)
        raise
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        # the safetensors writer reports errors of the system as text, without their number, and numpy, which writes
        # gguf, says only how much it got rid of
        full = "no space left" in str(error).lower() or re.search(r"\d+ requested and \d+ written", str(error))
        if error.errno in (errno.ENOSPC, errno.EDQUOT) or full:
            raise ResourceError(
                f"{out}: the disk is full", "free some space and resume, or export fewer formats"
            ) from error
        if error.errno == errno.EFBIG or "file too large" in str(error).lower():
            raise ResourceError(
                f"{out}: file too large for this file system or for the limit on file sizes (ulimit -f)",
                "raise the limit, or set run.dir to another file system, then resume",
            ) from error
        raise ExportError(
            f"{out}: cannot be written: {error.strerror or error}", "choose a folder you can write to"
        ) from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def copy_side_files(handle: ModelHandle, out: Path) -> None:
    """Copy tokenizer and generation settings, so that the artifact is usable on its own."""
    source = Path(handle.path)
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", out / "generation_config.json")
    folder = tokenizer_folder(source, handle.tokenizer_path)
    if folder is None:
        return
    named = [folder / name for name in TOKENIZER_FILES]
    for path in {*named, *(path for pattern in TOKENIZER_PATTERNS for path in folder.glob(pattern))}:
        if path.is_file():
            target = out / path.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)


def tokenizer_folder(source: Path, tokenizer: Path | None = None) -> Path | None:
    """The folder that holds the tokenizer's files: ``tokenizer``, else ``source``, else None."""
    for candidate in (tokenizer, source):
        if candidate is not None and any((candidate / name).is_file() for name in TOKENIZER_FILES):
            return candidate
    return None


def require_equal(out: Path, name: str, found: Tensor, expected: Tensor, what: str) -> None:
    """Refuse a tensor that was read back with another value, shape or type.

    Raises:
        ExportError: ``name`` reads back different ``what``.
    """
    import torch

    if found.shape != expected.shape or found.dtype != expected.dtype or not torch.equal(found, expected):
        raise ExportError(f"{out}: {name} reads back different {what}")


def require_no_other(out: Path, left: Iterable[str]) -> None:
    """Refuse tensors that were not asked for when everything else was read back.

    Raises:
        ExportError: There are some; the first is named.
    """
    if names := sorted(left):
        raise ExportError(f"{out}: unexpected tensors: {some(names)}")


def write_model_folder(
    out: Path,
    handle: ModelHandle,
    tensors: Iterable[tuple[str, Tensor]],
    config: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> None:
    """Write a Hugging Face folder that appears only when complete.

    Args:
        out: Folder to create.
        handle: The source, whose tokenizer and generation settings are copied.
        tensors: Name and tensor, in the order in which they go into shards; asked for one by one.
        config: ``config.json``.
        provenance: Written beside the weights.

    Raises:
        ExportError: ``out`` exists or cannot be written.
    """
    with atomic_folder(out) as part:
        shards = ShardWriter(part)
        for name, tensor in tensors:
            shards.add(name, tensor)
        shards.close()
        write_json(part / "config.json", config)
        copy_side_files(handle, part)
        write_provenance(part, provenance)


def dense_config(handle: ModelHandle, dtype: torch.dtype | str | None = None) -> dict[str, Any]:
    """The source's config without any quantization, announcing ``dtype``, the checkpoint's by default.

    The code that ``auto_map`` names is not copied: readers have the family of their own, as this project does.
    """
    left = ("quantization_config", "torch_dtype", "_name_or_path", "auto_map")
    config = {key: value for key, value in handle.config.items() if key not in left}
    return {**config, "dtype": str(dtype or handle.checkpoint.dtype).removeprefix("torch.")}


def write_provenance(out: Path, provenance: Mapping[str, Any]) -> None:
    """Put the provenance beside the weights, durably."""
    data = json.dumps(provenance, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    write_durably(out / "provenance.json", data.encode())
