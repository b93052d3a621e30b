#!/usr/bin/env python3
"""Cut the small calibration and held-out texts that the repository ships (recipes/assets/text).

Calibration text comes from books the reference model was trained on; held-out text from books
it never saw. Excerpts start at fixed positions, so the files are the same every time.

    python scripts/make_text_assets.py --train train_simple.jsonl.xz --heldout val.jsonl.xz \
        --spanish docs.jsonl.gz --maths gsm8k_train.jsonl.gz --maths-heldout gsm8k_test.jsonl.gz \
        --out recipes/assets/text
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

from training.data import read_rows

Row = dict[str, Any]


def excerpt(text: str, start: int, size: int) -> str:
    """Return ``size`` characters from the first paragraph break after ``start``, ending at a break."""
    begin = text.find("\n\n", start) + 2
    end = text.find("\n\n", begin + size)
    return text[begin : end if end > 0 else None]


def books(rows: list[Row], every: int, start: int, size: int) -> list[Row]:
    """One excerpt of every ``every``-th book."""
    return [
        {"domain": "books", "title": r["title"], "author": r["author"], "year": r["year"],
         "text": excerpt(r["text"], start, size)}
        for r in rows[::every]
        if len(r["text"]) > start + 2 * size
    ]  # fmt: skip


def maths(rows: list[Row], count: int) -> list[Row]:
    """Word problems with their solutions, forty to a row."""
    texts = [f"{r['question']}\n{r['answer']}" for r in rows[:count]]
    return [{"domain": "maths", "text": "\n\n".join(texts[i : i + 40])} for i in range(0, len(texts), 40)]


def write(rows: list[Row], path: Path) -> None:
    """Write gzip JSON lines whose bytes depend on the rows alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)
    with path.open("wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as handle:
        handle.write(lines.encode())
    print(f"{path}: {len(rows)} rows, {len(lines) / 1e3:.0f} kB of text, {path.stat().st_size / 1e3:.0f} kB on disk")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("train", "heldout", "spanish", "maths", "maths-heldout", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    spanish = [
        {"domain": "spanish", "title": r["file"], "text": excerpt(r["text"], 200, 6000)}
        for r in list(read_rows(args.spanish))[::60]
        if len(r["text"]) > 12_000
    ]
    write(
        books(list(read_rows(args.train)), 4, 30_000, 26_000) + spanish + maths(list(read_rows(args.maths)), 120),
        args.out / "calibration.jsonl.gz",
    )
    write(books(list(read_rows(args.heldout)), 1, 15_000, 60_000), args.out / "heldout.jsonl.gz")
    write(maths(list(read_rows(args.maths_heldout)), 160), args.out / "heldout_maths.jsonl.gz")


if __name__ == "__main__":
    main()
