"""Models and tokenizers that are missing, damaged, not supported or not safe."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from malformed.bench import CONFIG, EXPERTS, Bench, Case, Run, base_tensors, write_json, write_tensors

ENVIRONMENT = (4,)
WEIGHTS = "model.safetensors"
GATE = "model.layers.1.block_sparse_moe.gate.weight"
EXPERT = "model.layers.0.block_sparse_moe.experts.2.w2.weight"

Change = Callable[[Path], None]


def _loaded(change: Change) -> Callable[[Bench], Run]:
    """Run the working recipe on a copy of the model that ``change`` has damaged."""

    def build(bench: Bench) -> Run:
        folder = bench.model()
        change(folder)
        return bench.run(bench.recipe(model=folder))

    return build


def _config(**changes: Any) -> Callable[[Bench], Run]:
    """Run with a changed config.json."""
    return lambda bench: bench.run(bench.recipe(model=bench.model(**changes)))


def _tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Bench], Run]:
    """Run with changed weights."""

    def apply(tensors: dict[str, np.ndarray]) -> None:
        change(tensors)

    return lambda bench: bench.run(bench.recipe(model=bench.with_tensors(apply)))


def _write(name: str, text: str) -> Change:
    return lambda folder: _void((folder / name).write_text(text, encoding="utf-8"))


def _void(_: object) -> None:
    """Drop a result."""


def _remove(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def _cut(keep: float) -> Change:
    """Shorten the weights to a share of their bytes."""

    def change(folder: Path) -> None:
        raw = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(raw[: int(len(raw) * keep)])

    return change


def _bytes(data: bytes) -> Change:
    return lambda folder: _void((folder / WEIGHTS).write_bytes(data))


def _header(**entry: Any) -> Change:
    """Falsify the header entry of one tensor."""

    def change(folder: Path) -> None:
        raw = (folder / WEIGHTS).read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + length])
        header["lm_head.weight"] |= entry
        text = json.dumps(header).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

    return change


def _value(value: float) -> Callable[[dict[str, np.ndarray]], None]:
    """Put one value where it cannot be."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[EXPERT][3, 5] = value

    return change


def _sharded(folder: Path) -> dict[str, str]:
    """Split the weights into two shards with an index; returns its weight map."""
    tensors = base_tensors()
    names = sorted(tensors)
    halves = (names[::2], names[1::2])
    files = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for file, half in zip(files, halves, strict=True):
        write_tensors(folder / file, {name: tensors[name] for name in half})
    (folder / WEIGHTS).unlink()
    weight_map = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return weight_map


def _missing_shard(folder: Path) -> None:
    _sharded(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def _broken_index(folder: Path) -> None:
    _sharded(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [', encoding="utf-8")


def _escaping_index(folder: Path) -> None:
    weight_map = _sharded(folder)
    weight_map["lm_head.weight"] = "../elsewhere.safetensors"
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})


class _Payload:
    """What an attacker would put into a pickle: loading it creates a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def _pickle_only(bench: Bench) -> Run:
    folder = bench.model()
    (folder / WEIGHTS).unlink()
    mark = bench.folder / "ran"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": _Payload(mark)}))
    return bench.run(bench.recipe(model=folder), outputs=[mark])


def _custom_code(bench: Bench, **config: Any) -> Run:
    """A model that brings its own Python file; importing it would create a file."""
    mark = bench.folder / "ran"
    auto = {"AutoConfig": "modeling_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.EvilModel"}
    folder = bench.model(**{"model_type": "evil", "auto_map": auto, **config})
    (folder / "modeling_evil.py").write_text(f"open({str(mark)!r}, 'w').close()\n", encoding="utf-8")
    return bench.run(bench.recipe(model=folder), outputs=[mark])


def _custom_tokenizer(bench: Bench) -> Run:
    """A tokenizer that exists only as Python code in the model's folder."""
    mark = bench.folder / "ran"
    folder = bench.model()
    (folder / "tokenizer.json").unlink()
    auto = {"AutoTokenizer": ["tokenization_evil.EvilTokenizer", None]}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "EvilTokenizer", "auto_map": auto})
    (folder / "tokenization_evil.py").write_text(f"open({str(mark)!r}, 'w').close()\n", encoding="utf-8")
    return bench.run(bench.recipe(model=folder), outputs=[mark])


def _wide_tokenizer(folder: Path) -> None:
    """Make the model's vocabulary smaller than the tokenizer's."""
    tensors = base_tensors()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = np.ascontiguousarray(tensors[name][:40])
    write_tensors(folder / WEIGHTS, tensors)
    write_json(folder / "config.json", {**CONFIG, "vocab_size": 40})


def _no_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def _no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def _missing_model(bench: Bench) -> Run:
    return bench.run(bench.recipe(model=bench.folder / "not_here"))


def _model_is_file(bench: Bench) -> Run:
    return bench.run(bench.recipe(model=bench.base / WEIGHTS))


def _unknown_asset(bench: Bench) -> Run:
    return bench.run(bench.recipe({"model": {"path": "asset:no_such_model"}}))


def _other_tokenizer(bench: Bench) -> Run:
    return bench.run(bench.recipe({"model": {"tokenizer": str(bench.folder / "nowhere")}}))


def _listed(*words: str, name: str = "model") -> Callable[[Bench], Run]:
    """A command on a folder that holds no model."""

    def build(bench: Bench) -> Run:
        folder = bench.folder / name
        folder.mkdir()
        (folder / "notes.txt").write_text("nothing here", encoding="utf-8")
        return Run([word.format(folder=folder, base=bench.base) for word in words])

    return build


def _damaged(change: Change, *words: str) -> Callable[[Bench], Run]:
    """A command on a damaged copy of the model."""

    def build(bench: Bench) -> Run:
        folder = bench.model()
        change(folder)
        return Run([word.format(folder=folder, base=bench.base) for word in words])

    return build


def _shorter_vocabulary(bench: Bench) -> Run:
    folder = bench.model()
    _wide_tokenizer(folder)
    text = bench.folder / "x.txt"
    text.write_text("some words", encoding="utf-8")
    return Run(["compare", str(bench.base), str(folder), "--text", str(text), "--length", "8"])


def _swapped(tensors: dict[str, np.ndarray]) -> None:
    tensors[GATE] = np.ascontiguousarray(tensors[GATE].T)


def _integers(tensors: dict[str, np.ndarray]) -> None:
    tensors[GATE] = np.zeros((EXPERTS, 32), np.int64)


def _renamed(folder: Path) -> None:
    shutil.move(folder / WEIGHTS, folder / "weights.safetensors")


# headers are read before anything is written, values by the load stage
_case = partial(Case, stage="load", torch=True, untouched=True)
_values = partial(Case, stage="load", torch=True)

CONFIGS = [
    _case("model folder missing", ENVIRONMENT, r"not_here.*no such", _missing_model),
    _case("model path is a file", ENVIRONMENT, r"model\.safetensors.*(folder|no such)", _model_is_file),
    _case("unknown asset", ENVIRONMENT, r"asset:no_such_model: no such asset", _unknown_asset),
    _case("config.json missing", ENVIRONMENT, r"config\.json: missing", _loaded(_remove("config.json"))),
    _case("config.json is not JSON", ENVIRONMENT, r"config\.json: ", _loaded(_write("config.json", "{model_type: mixtral"))),
    _case("config.json is a list", ENVIRONMENT, r"config\.json: .*not a JSON object", _loaded(_write("config.json", "[1, 2]"))),
    _case("config.json without model_type", ENVIRONMENT, r"model_type is missing", _config(model_type=...)),
    _case("invented mixture of experts", ENVIRONMENT, r"'supermoe' is a mixture of experts", _config(model_type="supermoe")),
    _case("invented state-space model", ENVIRONMENT, r"'rivermamba' is a state-space model", _config(model_type="rivermamba", state_size=16, conv_kernel=4, num_local_experts=..., num_experts_per_tok=...)),
    _case("hybrid of both", ENVIRONMENT, r"'jambalaya' is a (mixture|state)", _config(model_type="jambalaya", mamba_d_state=16)),
    _case("encoder model", ENVIRONMENT, r"'bert' is not supported", _config(model_type="bert", num_local_experts=..., num_experts_per_tok=...)),
    _case("model of several modalities", ENVIRONMENT, r"several modalities", _config(model_type="llavamoe", text_config={"model_type": "mixtral"})),
    _case("number of layers as text", ENVIRONMENT, r"num_hidden_layers must be a whole number.*'two'", _config(num_hidden_layers="two")),
    _case("more experts chosen than there are", ENVIRONMENT, r"num_experts_per_tok|num_local_experts", _config(num_experts_per_tok=9)),
    _case("no layers", ENVIRONMENT, r"num_hidden_layers", _config(num_hidden_layers=0)),
    _case("unknown activation", ENVIRONMENT, r"hidden_act 'relu6' is not supported", _config(hidden_act="relu6")),
    _case("model quantized already", ENVIRONMENT, r"already quantized \(gptq\)", _config(quantization_config={"quant_method": "gptq", "bits": 4})),
    _case("artifact of ours as the source", ENVIRONMENT, r"already quantized \(llmcompress\)", _config(quantization_config={"quant_method": "llmcompress", "version": 1})),
    _case("model with code of its own", ENVIRONMENT, r"model type 'evil'", _custom_code),
]  # fmt: skip

FILES = [
    _case("no weights", ENVIRONMENT, r"no model\.safetensors", _loaded(_no_weights)),
    _case("weights under another name", ENVIRONMENT, r"no model\.safetensors", _loaded(_renamed)),
    _case("weights as a pickle", ENVIRONMENT, r"pickle files can run code and are refused", _pickle_only),
    _case("weights of zero bytes", ENVIRONMENT, r"model\.safetensors: damaged", _loaded(_bytes(b""))),
    _case("weights that are text", ENVIRONMENT, r"model\.safetensors: damaged", _loaded(_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"))),
    _case("weights cut in the header", ENVIRONMENT, r"damaged: .*(header|cut short)", _loaded(_cut(0.01))),
    _case("weights cut in the data", ENVIRONMENT, r"damaged: cut short", _loaded(_cut(0.9))),
    _case("weights with one byte too few", ENVIRONMENT, r"damaged: cut short", _loaded(_cut(0.999999))),
    _case("header longer than the file", ENVIRONMENT, r"damaged: the header", _loaded(_bytes(struct.pack("<Q", 1 << 60) + b"{}"))),
    _case("header that lies about a shape", ENVIRONMENT, r"lm_head\.weight of shape .* cannot span", _loaded(_header(shape=[7, 7]))),
    _case("header with negative offsets", ENVIRONMENT, r"damaged: .*lm_head\.weight", _loaded(_header(data_offsets=[-4096, 36864]))),
    _case("unknown data type", ENVIRONMENT, r"data type F4, which is not supported", _loaded(_header(dtype="F4"))),
    _values("NaN in a weight", ENVIRONMENT, r"NaN or infinity in: .*experts\.2\.w2", _tensors(_value(float("nan")))),
    _values("infinity in a weight", ENVIRONMENT, r"NaN or infinity in: .*experts\.2\.w2", _tensors(_value(float("-inf")))),
    _case("wrong shape", ENVIRONMENT, r"gate\.weight has shape \[32, 4\], config\.json says \[4, 32\]", _tensors(_swapped)),
    _case("integers for weights", ENVIRONMENT, r"gate\.weight holds I64 values", _tensors(_integers)),
    _case("tensor missing", ENVIRONMENT, r"missing: .*gate\.weight", _tensors(lambda t: t.pop(GATE))),
    _case("one expert missing", ENVIRONMENT, r"missing: .*experts\.2\.w2\.weight", _tensors(lambda t: t.pop(EXPERT))),
    _case("tensor of another model", ENVIRONMENT, r"not part of this model: model\.layers\.9", _tensors(lambda t: t.update({"model.layers.9.x.weight": np.zeros(3, np.float32)}))),
    _case("fewer layers in the config than in the weights", ENVIRONMENT, r"not part of this model: model\.layers\.1\.", _config(num_hidden_layers=1)),
    _case("shard missing", ENVIRONMENT, r"shards are missing: model-00002", _loaded(_missing_shard)),
    _case("damaged shard index", ENVIRONMENT, r"is not a shard index", _loaded(_broken_index)),
    _case("shard outside the folder", ENVIRONMENT, r"shard outside its folder", _loaded(_escaping_index)),
]  # fmt: skip

_tokens = partial(Case, stage="calibrate", torch=True)

TOKENIZERS = [
    _tokens("tokenizer missing", ENVIRONMENT, r"no usable tokenizer", _loaded(_no_tokenizer)),
    _tokens("tokenizer damaged", ENVIRONMENT, r"no usable tokenizer", _loaded(_write("tokenizer.json", '{"model": '))),
    _tokens("tokenizer in another place that is not there", ENVIRONMENT, r"model\.tokenizer: no such file or folder: .*nowhere", _other_tokenizer),
    _tokens("tokenizer with code of its own", ENVIRONMENT, r"no usable tokenizer", _custom_tokenizer),
    _tokens("tokenizer larger than the embedding", ENVIRONMENT, r"tokenizer gives token \d+, but the model knows only 40", _loaded(_wide_tokenizer)),
]  # fmt: skip

COMMANDS = [
    Case("inspect a folder without a model", ENVIRONMENT, r"no config\.json", _listed("inspect", "{folder}")),
    Case("inspect what is not there", ENVIRONMENT, r"no such model folder", _listed("inspect", "{folder}/deeper")),
    Case("inspect damaged weights", ENVIRONMENT, r"damaged", _damaged(_cut(0.5), "inspect", "{folder}")),
    Case("validate with an unknown family", ENVIRONMENT, r"'supermoe' is a mixture of experts", lambda b: Run(["validate", b.recipe(model=b.model(model_type="supermoe"))])),
    Case("plan with an unknown family", ENVIRONMENT, r"'supermoe' is a mixture of experts", lambda b: Run(["plan", b.recipe(model=b.model(model_type="supermoe"))])),
    Case("plan without a model", ENVIRONMENT, r"not_here", lambda b: Run(["plan", b.recipe(model=b.folder / "not_here")])),
    Case("evaluate a folder without a model", ENVIRONMENT, r"no config\.json", _listed("eval", "{folder}"), torch=True),
    Case("generate from a folder without a model", ENVIRONMENT, r"no config\.json", _listed("generate", "{folder}", "-p", "Hello"), torch=True),
    Case("generate without a tokenizer", ENVIRONMENT, r"no usable tokenizer", _damaged(_no_tokenizer, "generate", "{folder}", "-p", "Hello"), torch=True),
    Case("generate from damaged weights", ENVIRONMENT, r"damaged|cannot be loaded", _damaged(_cut(0.5), "generate", "{folder}", "-p", "Hello"), torch=True),
    Case("generate more than the context holds", ENVIRONMENT, r"exceed the model's 128", _listed("generate", "{base}", "-p", "Hello", "-n", "4000"), torch=True),
    Case("compare models of different vocabularies", (2, 4), r"vocabular", _shorter_vocabulary, torch=True),
    Case("compare with a limit that is no number", (2,), r"not METRIC=NUMBER", _listed("compare", "{base}", "{base}", "--max-rel-increase", "heldout.perplexity=1%")),
    Case("compare with a limit on what is not measured", (2,), r"limit 1: no metric 'heldout\.perplexty'.*did you mean heldout\.perplexity", _listed("compare", "{base}", "{base}", "--max-rel-increase", "heldout.perplexty=0.01"), torch=True),
    Case("a model of the hub that is not in its cache", ENVIRONMENT, r"no model of that name in the hub's cache", lambda b: Run(["inspect", "nobody/no-such-model"])),
    Case("export a folder that is no run", (2, 4), r"(not a run|no recipe\.lock|no stage)", _listed("export", "{folder}", "--format", "native"), torch=True),
    Case("report of a folder that is no run", (2, 4), r"(not a run|no recipe\.lock|run folder)", _listed("report", "{folder}"), torch=True),
    Case("device that is not there", ENVIRONMENT, r"cuda|GPU", lambda b: b.run(b.recipe({"run": {"device": "cuda"}})), torch=True),
]  # fmt: skip

CASES = [*CONFIGS, *FILES, *TOKENIZERS, *COMMANDS]
