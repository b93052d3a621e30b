"""A checkpoint on disk, read lazily under transformers' run-time names.

Hub checkpoints name some tensors differently from the run-time model and hold experts one by
one; :class:`Checkpoint` hides both. Files written under run-time names work as well. Only
safetensors is read: pickle can run code.
"""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.errors import InputError, command_line
from llmcompress.models.layout import ExpertBank, ModelLayout, TensorView
from llmcompress.models.lora_checkpoint import is_adapter, not_a_model
from llmcompress.models.memory_limits import total_ram
from llmcompress.models.paths import checkpoint_hint, no_model_folder
from llmcompress.models.tensor_file import Entry, TensorFile, all_finite
from llmcompress.quant.tensor_writer import DTYPES

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "pytorch_model.pt")
_FLOATS = ("F64", "F32", "F16", "BF16")
# constants that older versions of transformers saved although they are computed
_HARMLESS = (r"rotary_emb\.inv_freq$", r"\.attn\.(masked_)?bias$")
_SHOWN = 5


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json`` of a model folder.

    Raises:
        InputError: The folder or the file is missing, or it is not a JSON object.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise no_model_folder(str(folder))
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if is_adapter(folder):
            raise not_a_model(folder) from error
        hint = checkpoint_hint(folder) or "point model.path at a transformers model folder"
        raise InputError(f"{path}: missing", hint) from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read: {error}", "download the file again") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: is not a JSON object", "download the file again")
    return config


def refuse_quantized(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a model that is quantized already.

    Raises:
        InputError: The config announces a quantization.
    """
    quantization = config.get("quantization_config")
    if not quantization:
        return
    method = quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else "unknown"
    hint = "start from the full-precision weights, or decode it with transformers and save it first"
    if method == "llmcompress":
        hint = "it is an artifact of this tool: evaluate it with `llmcompress eval`, compress its source instead"
    raise InputError(f"{folder}: the weights are already quantized ({method})", hint)


class Checkpoint:
    """Weights of one model folder.

    Args:
        path: Folder with ``config.json`` and ``model.safetensors`` or its shard index.
        layout: The model's layout, which knows names and shapes.

    Raises:
        InputError: No safetensors weights, a shard is missing or damaged.
    """

    def __init__(self, path: Path, layout: ModelLayout) -> None:
        self.path = Path(path)
        self.layout = layout
        self._files = [TensorFile(file) for file in self._find_files()]
        if self.total_bytes > total_ram():
            self.read_once()
        self._where = {name: file for file in self._files for name in file.entries}
        self._banks = layout.banks
        self._scales: Mapping[str, Sequence[tuple[int, Tensor]]] = {}
        self._edits: Mapping[str, Callable[[Tensor], Tensor]] = {}

    def rescaled(self, scales: Mapping[str, Sequence[tuple[int, Tensor]]]) -> Checkpoint:
        """The same weights, some of them multiplied as they are read.

        Args:
            scales: Run-time name → pairs of an axis and a factor for each of its places, powers of two, so that
                nothing is rounded. They come on top of those that this one has.
        """
        found = copy.copy(self)
        found._scales = {
            name: [*self._scales.get(name, ()), *scales.get(name, ())] for name in {**self._scales, **scales}
        }
        return found

    def edited(self, edits: Mapping[str, Callable[[Tensor], Tensor]]) -> Checkpoint:
        """The same weights, some of them changed as they are read.

        Args:
            edits: Run-time name of a tensor → its new value of the same shape and type from the one in the files.
        """
        found = copy.copy(self)
        found._edits = {**self._edits, **edits}
        return found

    def files(self) -> list[Path]:
        """The safetensors files, in shard order."""
        return [file.path for file in self._files]

    def read_once(self, once: bool = True) -> None:
        """Whether the kernel need not keep what is read; by itself so for a checkpoint that is larger than memory."""
        for file in self._files:
            file.once = once

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(file.nbytes for file in self._files)

    @property
    def dtype(self) -> torch.dtype:
        """The floating type that holds most of the bytes.

        Raises:
            InputError: The file holds no floating-point tensor that can be compressed.
        """
        import torch

        sizes: Counter[str] = Counter()
        for file in self._files:
            for entry in file.entries.values():
                sizes[entry.code] += entry.nbytes
        floats = [code for code, _ in sizes.most_common() if code in _FLOATS]
        if not floats:
            raise InputError(f"{self.path}: no 16- or 32-bit weights; is it quantized already?")
        found: torch.dtype = getattr(torch, DTYPES[floats[0]][0])
        return found

    def dtype_of(self, name: str) -> torch.dtype:
        """The type in which :meth:`tensor` gives a run-time tensor.

        Raises:
            InputError: It is missing.
        """
        found = next((piece for piece in (self._disk_name(name), *self._pieces(name)) if piece in self._where), None)
        if found is None:
            raise self._lacks(name)
        return self._where[found].dtype(found)

    def has(self, name: str) -> bool:
        """Whether a run-time tensor can be read (stacked experts: whether every piece is there)."""
        return self._disk_name(name) is not None or all(piece in self._where for piece in self._pieces(name) or [""])

    def tensor(self, name: str) -> Tensor:
        """Read one tensor under its run-time name, in the file's data type.

        Stacked experts come in the family's own in-memory orientation and are gathered from
        per-expert tensors where the file holds those.

        Raises:
            InputError: It is missing or has the wrong shape.
        """
        disk = self._disk_name(name)
        if disk is not None:
            stored = self._where[disk].read(disk)
        else:
            pieces = self._pieces(name)
            if not pieces or any(piece not in self._where for piece in pieces):
                raise self._lacks(name)
            stored = self._stack(self._banks[name], name, pieces) if name in self._banks else self._joined(pieces)
        return self._changed(name, stored)

    def _changed(self, name: str, tensor: Tensor) -> Tensor:
        if name in self._edits:
            tensor = self._edits[name](tensor)
        for axis, factor in self._scales.get(name, ()):
            shape = [-1 if i == axis else 1 for i in range(tensor.ndim)]
            tensor = tensor * factor.to(tensor.dtype).view(shape)
        return tensor

    def _lacks(self, name: str) -> InputError:
        return InputError(f"{self.path}: {name} is missing", f"look with `{command_line('inspect', self.path)}`")

    def verify(self, check_values: bool = False) -> None:
        """Compare what the files hold with what the model needs.

        Args:
            check_values: Also read every tensor and look for NaN and infinity.

        Raises:
            InputError: Tensors are missing, superfluous, of the wrong shape or not finite; all are named at once.
        """
        problems = self._missing() + self._misshapen() + self._superfluous()
        if not problems and check_values:
            problems = self._not_finite()
        if problems:
            raise InputError(
                "\n".join(f"{self.path}: {problem}" for problem in problems),
                "check that config.json belongs to these weights, then download them again",
            )

    def _find_files(self) -> list[Path]:
        index = self.path / INDEX
        if (self.path / SINGLE).is_file():
            return [self.path / SINGLE]
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise InputError(f"{index}: is not a shard index: {error}", "download the file again") from error
            if any(not isinstance(name, str) or Path(name).name != name for name in names):
                raise InputError(f"{index}: names a shard outside its folder", "download the file again")
            absent = [name for name in names if not (self.path / name).is_file()]
            if absent:
                raise InputError(f"{self.path}: shards are missing: {', '.join(absent)}", "download them again")
            return [self.path / name for name in names]
        pickles = [name for name in _PICKLES if (self.path / name).exists()]
        if pickles:
            raise InputError(
                f"{self.path}: only {pickles[0]}; pickle files can run code and are refused",
                "convert it in a place you trust: AutoModelForCausalLM.from_pretrained(PATH).save_pretrained(NEW)",
            )
        raise InputError(f"{self.path}: no {SINGLE} and no {INDEX}", "point model.path at a complete model folder")

    def _disk_name(self, name: str) -> str | None:
        """The name under which the files hold a tensor whole, None when they do not."""
        candidates = [name, self.layout.disk.name(name)]
        candidates += [name.replace(ours, theirs, 1) for ours, theirs in self.layout.disk.older if ours in name]
        # models saved without their head lack the prefix
        candidates += [candidate.removeprefix("model.") for candidate in candidates]
        return next((candidate for candidate in candidates if candidate in self._where), None)

    def _pieces(self, name: str) -> list[str]:
        """Names of the per-expert tensors that make up a stacked one, gates and ups, or downs; or of other pieces."""
        bank, disk = self._banks.get(name), self.layout.disk
        if bank is None:
            pieces = list(disk.pieces(name))
            return pieces if len(pieces) > 1 else []
        if disk.experts is None:
            return []
        folders = [bank.module.replace(*disk.experts, 1), bank.module]
        folders += [folder.replace(*older, 1) for older in disk.older for folder in folders if older[0] in folder]
        parts = [getattr(disk, key) for key in bank.parts(name)]
        for folder in folders:
            names = [f"{folder}.{expert}.{part}" for expert in range(bank.num_experts) for part in parts]
            if any(piece in self._where for piece in names):
                return names
        return [f"{folders[0]}.{expert}.{part}" for expert in range(bank.num_experts) for part in parts]

    def _joined(self, pieces: list[str]) -> Tensor:
        import torch

        return torch.cat([self._where[piece].read(piece) for piece in pieces])

    def _stack(self, bank: ExpertBank, name: str, pieces: list[str]) -> Tensor:
        import torch

        experts, rows, columns = bank.shape(name)
        stacked = torch.empty(experts, rows, columns, dtype=self._where[pieces[0]].dtype(pieces[0]))
        per_expert = len(pieces) // experts
        height = rows // per_expert
        for number, piece in enumerate(pieces):
            expert, part = divmod(number, per_expert)
            file, place = self._where[piece], stacked[expert, part * height : (part + 1) * height]
            shape = file.entries[piece].shape
            if shape != (height, columns):
                raise InputError(f"{self.path}: {piece} has shape {list(shape)}, not {[height, columns]}")
            if file.dtype(piece) == stacked.dtype:
                file.read(piece, place)
            else:
                place.copy_(file.read(piece))
        return stacked

    def _entry(self, name: str) -> Entry:
        return self._where[name].entries[name]

    def _missing(self) -> list[str]:
        absent = []
        for view in self.layout.tensors():
            if self._disk_name(view.name) is None:
                pieces = self._pieces(view.name)
                absent += [piece for piece in pieces if piece not in self._where] if pieces else [view.name]
        return [_listed("missing", absent)] if absent else []

    def _misshapen(self) -> list[str]:
        found = []
        for name, expected in self._expected():
            entry = self._entry(name)
            if entry.shape != expected:
                found.append(f"{name} has shape {list(entry.shape)}, config.json says {list(expected)}")
            elif entry.code not in _FLOATS:
                found.append(f"{name} holds {entry.code} values, not 16- or 32-bit floats")
        return found[:_SHOWN] + ([f"and {len(found) - _SHOWN} more wrong shapes"] if len(found) > _SHOWN else [])

    def _superfluous(self) -> list[str]:
        needed = {name for name, _ in self._expected()}
        patterns = [re.compile(pattern) for pattern in (*_HARMLESS, *self.layout.ignored)]
        if self.layout.tied:
            patterns.append(re.compile(r"^lm_head\.weight$"))
        extra = [n for n in sorted(self._where) if n not in needed and not any(p.search(n) for p in patterns)]
        return [_listed("not part of this model", extra)] if extra else []

    def _not_finite(self) -> list[str]:
        bad = [n for n, _ in self._expected() if not all_finite(self._where[n].read(n))]
        return [_listed("NaN or infinity in", bad)] if bad else []

    def _expected(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield name on disk and expected shape of everything the model reads and the files hold."""
        for view in self.layout.tensors():
            disk = self._disk_name(view.name)
            if disk is not None:
                yield disk, view.shape
            else:
                yield from self._expected_pieces(view)

    def _expected_pieces(self, view: TensorView) -> Iterator[tuple[str, tuple[int, ...]]]:
        pieces = self._pieces(view.name)
        if not pieces:
            return
        if view.name not in self._banks:
            told = [rows.stop - rows.start for rows in self.layout.disk.pieces(view.name).values()]
            found = [next(iter(self._entry(piece).shape), 0) for piece in pieces if piece in self._where]
            # transformers cuts into equal pieces what the hub has in unequal ones; put together they are the same
            lengths = found if sum(found) == sum(told) else told
            yield from ((p, (rows, *view.shape[1:])) for p, rows in zip(pieces, lengths) if p in self._where)
            return
        experts, rows, columns = self._banks[view.name].shape(view.name)
        height = rows * experts // len(pieces)
        for piece in pieces:
            if piece in self._where:
                yield piece, (height, columns)


def _listed(what: str, names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{what}: {', '.join(names[:_SHOWN])}{more}"
