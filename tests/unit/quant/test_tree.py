"""Trees over models, and what their nodes take."""

from __future__ import annotations

import pytest

from llmcompress.quant.family import FamilyPlan
from llmcompress.quant.tree import Tree, by_level, drawn, effective_bits, node_id

PAIRS = [(frozenset("a"), frozenset("b")), (frozenset("c"), frozenset("d")), (frozenset("ab"), frozenset("cd"))]


def test_nodes_and_paths() -> None:
    tree = Tree.of(list("dbca"), PAIRS)
    assert tree.leaves == ("a", "b", "c", "d")
    assert tree.ids == ("root", "a+b", "a", "b", "c+d", "c", "d")
    assert [tree.ids[p] for p in tree.path("d")] == ["root", "c+d", "d"]
    assert Tree.from_dict(tree.to_dict()) == tree


def test_merges_must_make_one_tree() -> None:
    with pytest.raises(ValueError, match="cannot merge"):
        Tree.of(list("abc"), [(frozenset("a"), frozenset("a"))])
    with pytest.raises(ValueError, match="do not join"):
        Tree.of(list("abc"), [(frozenset("a"), frozenset("b"))])
    with pytest.raises(ValueError, match="distinct"):
        Tree.of(["a", "a"], [])


def test_damaged_trees_are_refused() -> None:
    data = Tree.of(list("abcd"), PAIRS).to_dict()
    data["nodes"][1]["members"] = ["a", "c"]
    with pytest.raises(ValueError, match="do not make it up"):
        Tree.from_dict(data)
    with pytest.raises(ValueError, match="not a tree"):
        Tree.from_dict({"leaves": []})


def test_long_names_stay_short_and_apart() -> None:
    many = frozenset(f"a-rather-long-name-{i}" for i in range(8))
    assert len(node_id(many, 9)) < 80
    assert node_id(many, 9) != node_id(many | {"x"}, 10)


@pytest.mark.parametrize(
    ("preset", "count", "expected"),
    [("3-1", 4, 1.906), ("4-1", 4, 2.156), ("4-1", 6, 1.812), ("4-1", 8, 1.641), ("4-1", 16, 1.383), ("4-2", 8, 2.641)],
)
def test_effective_bits_of_stars(preset: str, count: int, expected: float) -> None:
    """The figures of the design: ``(1/M) Σ (b + 16/128)``."""
    tree = Tree.star([f"m{i:02d}" for i in range(count)])
    assert effective_bits(tree, by_level(tree, preset), 4096, 128) == pytest.approx(expected, abs=1e-3)


def test_effective_bits_with_groups_below_the_root() -> None:
    tree = Tree.of(list("abcd"), PAIRS)
    assert effective_bits(tree, by_level(tree, "4-1-1"), 4096, 128) == pytest.approx(2.719, abs=1e-3)


@pytest.mark.parametrize("preset", ["4", "4-x", "9-1", "-1"])
def test_wrong_presets(preset: str) -> None:
    with pytest.raises(ValueError, match="preset"):
        by_level(Tree.star(list("ab")), preset)


def test_drawing_names_every_leaf() -> None:
    lines = drawn(Tree.of(list("abcd"), PAIRS), {"a": "1.00 bits"})
    assert lines == [
        "root", "├─ 2 models", "│  ├─ a  1.00 bits", "│  └─ b", "└─ 2 models", "   ├─ c", "   └─ d",
    ]  # fmt: skip


def test_models_come_and_go_and_nodes_keep_their_names() -> None:
    tree = Tree.of(list("abcd"), PAIRS)
    fewer = tree.without("a")
    assert fewer.ids == ("root", "a+b", "b", "c+d", "c", "d")
    assert [fewer.ids[p] for p in fewer.path("b")] == ["root", "a+b", "b"]
    assert Tree.from_dict(fewer.to_dict()) == fewer
    wider = fewer.with_leaf("e", "a+b").with_leaf("f", "root")
    assert wider.leaves == ("b", "e", "c", "d", "f")
    assert [wider.ids[p] for p in wider.path("e")] == ["root", "a+b", "e"]
    assert [wider.ids[p] for p in wider.path("d")] == ["root", "c+d", "d"]
    assert [wider.ids[p] for p in wider.path("f")] == ["root", "f"]
    with pytest.raises(ValueError, match="cannot be put below"):
        wider.with_leaf("g", "e")
    with pytest.raises(ValueError, match="last model"):
        Tree.of(["a"], []).without("a")


def test_a_new_model_has_a_path_of_its_own_in_every_tree() -> None:
    """Where layers have trees of their own, one name may stand above different models once some were added."""
    tree = Tree.of("abc", [(frozenset("a"), frozenset("b")), (frozenset("ab"), frozenset("c"))])
    trees = {"x": tree.with_leaf("d", "a+b"), "y": tree.with_leaf("d", "root")}
    widths = {"root": 4, "a+b": 2, "a": 1, "b": 1, "c": 1, "d": 1}
    for order in (["x", "y"], ["y", "x"]):
        plan = FamilyPlan(
            tuple("abcd"), 32, {key: trees[key] for key in order}, {"one": "x", "two": "y"},
            {"one": (4, 32), "two": (4, 32)}, {"one": widths, "two": widths},
        )  # fmt: skip
        assert (plan.path("one", "d"), plan.path("two", "d")) == (["root", "a+b", "d"], ["root", "d"])
        assert plan.node_names()[:2] == ["root", "a+b"]
        left = plan.without("ab")
        assert (left.path("one", "d"), left.path("two", "d")) == (["root", "a+b", "d"], ["root", "d"])
        assert list(left.problems()) == []
