from __future__ import annotations

from pathlib import Path

from llmcompress.export.provenance import _scalars, portable, portable_recipe, source_license


def test_licence_comes_from_the_source_card(tmp_path: Path) -> None:
    assert source_license(tmp_path) is None
    (tmp_path / "README.md").write_text("---\nlicense: [mit, cc-by-4.0]\n---\ntext")
    assert source_license(tmp_path) == "mit, cc-by-4.0"
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: gemma\n---\n")
    assert source_license(tmp_path) == "gemma"
    (tmp_path / "README.md").write_text("no front matter")
    assert source_license(tmp_path) is None
    (tmp_path / "README.md").write_text("---\n: [broken\n---\n")
    assert source_license(tmp_path) is None


def test_recipes_lose_what_belongs_to_one_machine() -> None:
    recipe = {
        "model": {"path": "/home/me/models/mixtral"},
        "run": {"dir": "runs/x", "threads": 8, "device": "cpu", "seed": 3},
        "stages": {
            "c": {"type": "calibrate", "source": {"kind": "text", "path": "../data/books.txt"}},
            "e": {"type": "export", "formats": ["native"], "dir": "/somewhere"},
        },
    }
    cleaned = portable_recipe(recipe)
    assert cleaned == {
        "model": {"path": "mixtral"},
        "run": {"seed": 3},
        "stages": {
            "c": {"type": "calibrate", "source": {"kind": "text", "path": "books.txt"}},
            "e": {"type": "export", "formats": ["native"]},
        },
    }
    assert recipe["run"]["dir"] == "runs/x"
    # nothing is left of a section that holds nothing else
    assert portable_recipe({"run": {"dir": "runs/x"}, "host": {"ram": 1}, "stages": {}}) == {}


def test_records_keep_scalars_alone_and_nothing_that_differs_between_runs() -> None:
    record = {"samples": 8, "path": "/home/me/books.txt", "seconds": 1.5, "hash": "ab", "cached": True, "rows": [1, 2]}
    assert _scalars(record) == {"path": "books.txt", "samples": 8}


def test_hub_names_and_assets_stay_whole() -> None:
    assert portable("mistralai/Mixtral-8x7B-v0.1") == "mistralai/Mixtral-8x7B-v0.1"
    assert portable("asset:reference-moe") == "asset:reference-moe"
