#!/usr/bin/env python3
"""Train the reference models that the repository ships (recipes/assets/reference_*).

Small language models, trained from scratch on public-domain English books with a little Spanish
documentation and arithmetic word problems: ``moe`` (Mixtral-style), ``mamba2``, and ``hybrid``
(attention, Mamba-2 and experts in one model). The script is resumable: a killed run continues
from its last checkpoint and sees the same batches.

    python scripts/train_reference.py --model moe --out runs/reference_moe --tokens 24e6 \
        --data books=train_simple.jsonl.xz:0.84 --data spanish=docs.jsonl.gz:0.08 \
        --data maths=gsm8k_train.jsonl.gz:0.08 --heldout val.jsonl.xz

    python scripts/train_reference.py --model mamba2 --out runs/reference_mamba2 --tokens 8e6 \
        --tokenizer recipes/assets/reference_moe --recall 0.3 --rows 2 --length 1024 --muon ... (data as above)

Each data file holds JSON lines; a row's text is its ``text`` field, or ``question`` and
``answer`` joined. The learning rate is constant after warm-up and falls to zero over the
last quarter. To end a run early, write the number of steps of the fall into a file named
``fall`` in the output folder: the fall begins at the next step.
"""

from __future__ import annotations

import os

from training.allocator import keep_arenas
from training.loop import parser, train


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--threads", type=int, default=os.cpu_count())
    args = options.parse_args()
    keep_arenas()
    train(args)


if __name__ == "__main__":
    main()
