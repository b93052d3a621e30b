#!/usr/bin/env python3
"""Split the texts of the reference family into training, calibration and held-out parts.

    python scripts/make_family_texts.py --data shared/data --out runs/family

``--data`` holds the public sets that the recipes' README names: ``lm/books``,
``lm/tinyshakespeare.jsonl.gz``, ``ft`` and ``tasks/gsm8k``. The Python standard library is
read from the interpreter that runs the script (PSF licence). A document belongs to one part
only: whole stories, files, questions and dialogues are held out, never slices of a document
that is trained on, except for Shakespeare, whose last tenth is held out.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sysconfig
from pathlib import Path

from training.data import read_rows

HELD_OUT_EVERY = 12
CALIBRATION_CHARS = 160_000
HELDOUT_CHARS = 120_000
AUTHORS = {"doyle": "Arthur Conan Doyle"}

Rows = list[str]


def every_twelfth(texts: Rows) -> tuple[Rows, Rows]:
    """Split documents: every twelfth is held out."""
    held = texts[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    return [t for i, t in enumerate(texts) if i % HELD_OUT_EVERY != HELD_OUT_EVERY - 1], held


def heldout_title(books: list[dict], author: str) -> str:
    """The author's book whose length is closest to 400,000 characters: the one that is held out."""
    rows = [r for r in books if r["author"] == author]
    return min(rows, key=lambda r: (abs(len(r["text"]) - 400_000), r["title"]))["title"]


def books_by(books: list[dict], author: str) -> tuple[Rows, Rows]:
    """One author's books, with one whole title held out."""
    title = heldout_title(books, author)
    rows = [r for r in books if r["author"] == author]
    return [r["text"] for r in rows if r["title"] != title], [r["text"] for r in rows if r["title"] == title]


def shakespeare(data: Path) -> tuple[Rows, Rows]:
    """Shakespeare's plays as one text; the last tenth is held out."""
    text = "\n".join(r["text"] for r in read_rows(data / "lm/tinyshakespeare.jsonl.gz"))
    cut = text.rindex("\n\n", 0, int(len(text) * 0.9))
    return [text[:cut]], [text[cut:].lstrip()]


def maths(data: Path) -> tuple[Rows, Rows]:
    """GSM8K: its own training and test splits."""

    def rows(split: str) -> Rows:
        source = read_rows(data / f"tasks/gsm8k/{split}.jsonl.gz")
        return [f"{r['question']}\n{r['answer']}" for r in source]

    return rows("train"), rows("test")


def chat(data: Path) -> tuple[Rows, Rows]:
    """Instruction dialogues (Dolly and HH-RLHF)."""
    return every_twelfth([r["prompt"] + r["response"] for r in read_rows(data / "ft/chat_dolly_hhrlhf_1k.jsonl.gz")])


def spanish(data: Path) -> tuple[Rows, Rows]:
    """The Spanish Python documentation."""
    return every_twelfth([r["text"] for r in read_rows(data / "ft/spanish_python_docs.jsonl.gz")])


def code() -> tuple[Rows, Rows]:
    """Modules of the running interpreter's standard library, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}
    files = sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))
    return every_twelfth([p.read_text(encoding="utf-8", errors="ignore") for p in files])


def excerpts(texts: Rows, budget: int) -> Rows:
    """About ``budget`` characters, spread over the documents, each cut at a line or sentence end."""
    share = max(1500, budget // max(1, len(texts)))
    step = max(1, len(texts) * min(share, 6000) // budget)
    picked: Rows = []
    for text in texts[::step]:
        room = min(share, budget - sum(map(len, picked)))
        if room < 200:
            break
        piece = text[: int(room)]
        if len(piece) < len(text):
            cut = max(piece.rfind("\n"), piece.rfind(". "))
            piece = piece[: cut + 1] if cut > 200 else piece
        picked.append(piece)
    return picked


def write_rows(path: Path, domain: str, texts: Rows) -> None:
    """Write JSON lines with a fixed gzip header, so that the bytes depend on the texts only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    body = "".join(json.dumps({"domain": domain, "text": t}, ensure_ascii=False) + "\n" for t in texts)
    path.write_bytes(gzip.compress(body.encode(), mtime=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    books = list(read_rows(args.data / "lm/books/train_simple.jsonl.xz"))
    domains = {
        **{name: books_by(books, author) for name, author in AUTHORS.items()},
        "shakespeare": shakespeare(args.data),
        "maths": maths(args.data),
        "chat": chat(args.data),
        "spanish": spanish(args.data),
        "code": code(),
    }
    held_titles = {heldout_title(books, author) for author in AUTHORS.values()}
    general = [r["text"] for r in books if r["title"] not in held_titles]
    write_rows(args.out / "train" / "books.jsonl.gz", "books", general)
    for name, (train, held) in domains.items():
        write_rows(args.out / "train" / f"{name}.jsonl.gz", name, train)
        write_rows(args.out / "calibration" / f"{name}.jsonl.gz", name, excerpts(train, CALIBRATION_CHARS))
        write_rows(args.out / "heldout" / f"{name}.jsonl.gz", name, excerpts(held, HELDOUT_CHARS))
        print(f"{name}: {len(train)} documents, {sum(map(len, train)) / 1e6:.2f} M characters; {len(held)} held out")


if __name__ == "__main__":
    main()
