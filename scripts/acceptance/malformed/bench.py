"""The workbench of the malformed-input check: a tiny random Mixtral, a recipe that works, and what to break.

The model is written tensor by tensor without torch, in the layout that hub checkpoints have, so that
building a case costs milliseconds.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

HIDDEN, INNER, EXPERTS, TOP_K, BLOCKS, VOCABULARY = 32, 32, 4, 2, 2, 320
CONFIG: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": BLOCKS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
}  # fmt: skip
MARK = "\u0120"  # how byte-level tokenizers write a space
SUBJECTS = ("the old man", "a grey cat", "her sister", "the baker", "nobody", "my friend", "the river", "a letter")
VERBS = ("saw", "found", "forgot", "carried", "painted", "followed", "loved", "lost")
OBJECTS = ("a red door", "three apples", "the way home", "an empty house", "the last train", "a small key", "the sea")
PLACES = ("by the lake", "at night", "in spring", "before breakfast", "near the mill", "without a word", "again")


def sentences(seed: int, count: int) -> list[str]:
    """Plain English lines, the same for the same seed."""
    rng = np.random.default_rng(seed)
    parts = (SUBJECTS, VERBS, OBJECTS, PLACES)
    return [" ".join(str(rng.choice(part)) for part in parts) + f", {rng.integers(10**9)}." for _ in range(count)]


def base_tensors() -> dict[str, np.ndarray]:
    """Every weight of the tiny model under its name on disk, float32."""
    rng = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return rng.normal(0, columns**-0.5, (rows, columns)).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN) * 5,
        "model.norm.weight": np.ones(HIDDEN, np.float32),
        "lm_head.weight": matrix(VOCABULARY, HIDDEN),
    }
    for layer in range(BLOCKS):
        prefix = f"model.layers.{layer}"
        for name, rows in (("q_proj", 32), ("k_proj", 16), ("v_proj", 16), ("o_proj", 32)):
            tensors[f"{prefix}.self_attn.{name}.weight"] = matrix(rows, HIDDEN)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{name}.weight"] = np.ones(HIDDEN, np.float32)
        tensors[f"{prefix}.block_sparse_moe.gate.weight"] = matrix(EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            for name in ("w1", "w2", "w3"):
                tensors[f"{prefix}.block_sparse_moe.experts.{expert}.{name}.weight"] = matrix(INNER, HIDDEN)
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """A safetensors file as transformers writes it."""
    from safetensors.numpy import save_file

    save_file(dict(tensors), path, metadata={"format": "pt"})


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of 259 to 320 tokens; 1 begins and 2 ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(sentences(0, 64), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>",
    }  # fmt: skip
    write_json(folder / "tokenizer_config.json", settings)


def write_json(path: Path, data: Any) -> None:
    """Write JSON."""
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")


def write_texts(path: Path, texts: list[str], field_name: str = "text") -> None:
    """Write JSON lines, one text a row."""
    path.write_text("".join(json.dumps({field_name: text}) + "\n" for text in texts), encoding="utf-8")


def make_base(folder: Path) -> Path:
    """Write the model every case starts from."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", CONFIG)
    write_tensors(folder / "model.safetensors", base_tensors())
    write_tokenizer(folder)
    return folder


def merged(base: Any, changes: Any) -> Any:
    """``changes`` over ``base``, mapping by mapping; a value of ``...`` removes the key."""
    if not (isinstance(base, dict) and isinstance(changes, dict)):
        return copy.deepcopy(changes)
    found = dict(base)
    for key, value in changes.items():
        if value is ...:
            del found[key]
        else:
            found[key] = merged(found.get(key), value)
    return found


@dataclass
class Run:
    """One command line and its surroundings.

    Attributes:
        arguments: Words after ``llmcompress``.
        run_dir: Folder that must not look finished afterwards, None if the command makes none.
        outputs: Further folders that must not exist afterwards.
        damaged: Names of files that the case itself has cut short.
        environment: Variables to set.
        before: Called in the child before the command line, for resource limits.
        inspect: Called afterwards with the exit code and stderr; returns what it finds wrong.
        cleanup: Called at the end, whatever happened.
    """

    arguments: list[str]
    run_dir: Path | None = None
    outputs: list[Path] = field(default_factory=list)
    damaged: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    before: Callable[[], None] | None = None
    inspect: Callable[[int, str], list[str]] | None = None
    cleanup: Callable[[], None] | None = None


Execute = Callable[[Run, Path], tuple[int, str, str]]


class Bench:
    """What a case builds its input from.

    Args:
        folder: Empty folder of this case.
        base: The sound model.
        execute: Runs a command line in a process of its own and returns exit code, stdout and stderr.
    """

    def __init__(self, folder: Path, base: Path, execute: Execute | None = None) -> None:
        self.folder = folder
        self.base = base
        self._execute = execute
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def run_dir(self) -> Path:
        """Run folder that :meth:`recipe` names."""
        return self.folder / "run"

    def model(self, **config: Any) -> Path:
        """A copy of the sound model; keyword arguments change its config (``...`` removes a key)."""
        folder = self.folder / "model"
        shutil.copytree(self.base, folder)
        if config:
            write_json(folder / "config.json", merged(CONFIG, config))
        return folder

    def with_tensors(self, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
        """A copy of the model whose tensors ``change`` has altered in place."""
        folder = self.model()
        tensors = base_tensors()
        change(tensors)
        write_tensors(folder / "model.safetensors", tensors)
        return folder

    def texts(self, name: str = "calibration.jsonl", seed: int = 1, count: int = 40) -> Path:
        """A JSON lines file of plain sentences."""
        path = self.folder / name
        write_texts(path, sentences(seed, count))
        return path

    def data(self, model: Path | None = None) -> dict[str, Any]:
        """A recipe that works, as data."""
        rule = {"bits": 4, "group_size": 32}
        return {
            "version": 1, "name": "case", "model": {"path": str(model or self.base)},
            "run": {"dir": str(self.run_dir), "device": "cpu", "threads": 1},
            "stages": {
                "load": {"type": "load"},
                "calibrate": {
                    "type": "calibrate", "source": {"kind": "jsonl", "path": str(self.texts())},
                    "samples": 8, "length": 32,
                },
                "quantize": {
                    "type": "gptq",
                    "rules": {"attention": {"role": "attention", **rule}, "experts": {"role": "experts", **rule}},
                },
                "export": {"type": "export", "formats": ["native"]},
            },
        }  # fmt: skip

    def recipe(self, changes: Mapping[str, Any] | None = None, model: Path | None = None) -> str:
        """File of the working recipe with ``changes`` merged in; ``...`` as value removes a key."""
        return self.text(yaml.safe_dump(merged(self.data(model), dict(changes or {})), sort_keys=False))

    def evaluate(self, section: Mapping[str, Any], model: Path | None = None) -> str:
        """File of the working recipe with an evaluate stage in front of the export."""
        data = self.data(model)
        export = data["stages"].pop("export")
        data["stages"] |= {"evaluate": {"type": "evaluate", **section}, "export": export}
        return self.text(yaml.safe_dump(data, sort_keys=False))

    def text(self, text: str, name: str = "recipe.yaml") -> str:
        """A recipe file with this text."""
        path = self.folder / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    def lines(self) -> str:
        """The working recipe as text, to be edited."""
        return yaml.safe_dump(self.data(), sort_keys=False)

    def run(self, recipe: str, *overrides: str, **settings: Any) -> Run:
        """``llmcompress run`` in the run folder of this case."""
        return Run(["run", recipe, *overrides], run_dir=self.run_dir, **settings)

    def prepared(self, recipe: str, *words: str) -> None:
        """Run a sound recipe first, for cases that damage what it left.

        Raises:
            RuntimeError: It failed.
        """
        assert self._execute is not None
        code, _, stderr = self._execute(Run(["run", recipe, *words]), self.folder)
        if code:
            raise RuntimeError(f"the sound run that this case starts from failed:\n{stderr}")


@dataclass(frozen=True)
class Case:
    """One malformed recipe or input.

    Attributes:
        name: What is wrong, in words.
        codes: Exit codes that are right.
        message: Regular expression searched in the ``error:`` lines (for exit code 0 in all of stderr).
        build: Makes the input and says what to run.
        stage: The stage that fails, whose record must not say finished.
        torch: Whether the command gets as far as importing torch; such cases share a preloaded parent.
        finishes: Whether the run is complete in spite of the exit code (a failed gate).
        untouched: Whether it is known before anything is written, so that there must be no run folder.
    """

    name: str
    codes: tuple[int, ...]
    message: str
    build: Callable[[Bench], Run]
    stage: str | None = None
    torch: bool = False
    finishes: bool = False
    untouched: bool = False
