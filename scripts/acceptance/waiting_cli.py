"""The command line in a process that has imported everything and waits for its words.

    python scripts/acceptance/waiting_cli.py cuda

Reads one line of JSON from stdin, ``{"log": FILE, "words": [...]}``, and goes on as ``python -m llmcompress WORDS``
with its output in FILE. On a busy machine the imports and the first use of the GPU take fifteen seconds, which a
process that is started before it is needed has behind it.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path


def main() -> None:
    # what the run would set later, before the first use of the GPU
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    import llmcompress.cli.app
    import llmcompress.pipeline.runner
    import llmcompress.stages.s2r.init
    import llmcompress.stages.s2r.rl
    import llmcompress.training.rl
    import llmcompress.training.sft  # noqa: F401

    if sys.argv[1] == "cuda":
        torch.zeros(1, device="cuda")
    line = sys.stdin.readline()
    if not line:
        return
    told = json.loads(line)
    with Path(told["log"]).open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.argv = ["llmcompress", *told["words"]]
    runpy.run_module("llmcompress", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
