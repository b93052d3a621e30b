from __future__ import annotations

import re

import pytest

from llmcompress.errors import RecipeError
from llmcompress.models.registry import layout_from_config
from llmcompress.recipe.load import check_chain, load_recipe

TINY_MIXTRAL = {
    "model_type": "mixtral", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2,
    "vocab_size": 64, "tie_word_embeddings": False,
}  # fmt: skip


def test_a_recipe_loads_with_defaults(write):
    loaded = load_recipe("good.yaml")
    assert list(loaded.recipe.stages) == ["load", "calibrate", "quantize", "export"]
    assert loaded.recipe.run.dir == "runs/good"
    assert loaded.data["stages"]["quantize"]["damp"] == 0.01
    assert "damp" not in loaded.composed["stages"]["quantize"]
    assert [stage.name for stage in loaded.stages()] == list(loaded.recipe.stages)
    assert loaded.text.startswith("version: 1")


def test_extends_merges_and_keeps_order(write):
    write("parts/more.yaml", "stages: {quantize: {damp: 0.05, rules: {experts: {group_size: 64}}}}")
    write(
        "child.yaml",
        """
        extends: [good, parts/more.yaml]
        name: child
        stages:
          prune: {type: pesf}
          export: {formats: [native, dense]}
        """,
    )
    loaded = load_recipe("child.yaml")
    assert list(loaded.recipe.stages) == ["load", "calibrate", "quantize", "prune", "export"]
    rules = loaded.composed["stages"]["quantize"]["rules"]
    assert rules["experts"] == {"role": "experts", "bits": 3, "group_size": 64}
    assert loaded.recipe.stages["quantize"].damp == 0.05
    assert loaded.recipe.stages["export"].formats == ("native", "dense")
    assert loaded.place("stages.quantize.damp") == "parts/more.yaml:1"
    assert loaded.place("stages.quantize.type") == "good.yaml:8"
    assert loaded.place("stages.prune") == "child.yaml:4"
    assert [f.name for f in loaded.files] == ["child.yaml", "good.yaml", "more.yaml"]


def test_new_rules_can_go_in_front_because_the_first_match_wins(write):
    write(
        "child.yaml",
        """
        extends: good
        stages:
          quantize:
            rules:
              first: {match: 'layers\\.0\\.', bits: 8}
              attention: {}
              last: {role: mlp, keep: true}
        """,
    )
    assert list(load_recipe("child.yaml").recipe.stages["quantize"].rules) == ["first", "attention", "experts", "last"]


def test_tilde_removes_what_is_inherited(write):
    write("child.yaml", "extends: good\nstages:\n  export~:\n  quantize:\n    type: rtn\n    rules: {experts~: }\n")
    loaded = load_recipe("child.yaml")
    assert list(loaded.recipe.stages) == ["load", "calibrate", "quantize"]
    assert list(loaded.recipe.stages["quantize"].rules) == ["attention"]


def test_removing_what_is_not_there_is_an_error(write, problems):
    write("child.yaml", "extends: good\nstages:\n  exprt~:\n")
    assert problems("child.yaml") == ["child.yaml:3: stages.exprt~: nothing inherited to remove (did you mean export?)"]


def test_interpolation_and_variables(write):
    write(
        "child.yaml",
        """
        extends: good
        vars: {size: 64}
        run: {seed: 3, dir: "out/${name}-${run.seed}"}
        stages: {quantize: {rules: {experts: {group_size: "${vars.size}"}}}}
        """,
    )
    loaded = load_recipe("child.yaml", ["run.seed=4"])
    assert loaded.recipe.run.dir == "out/good-4"
    assert loaded.recipe.stages["quantize"].rules["experts"].group_size == 64


def test_values_from_the_environment_are_known_as_such(write, monkeypatch):
    # what stands on a name alone is the same everywhere
    write(
        "child.yaml",
        """
        extends: good
        model: {path: "${oc.env:WHERE}/m"}
        run: {dir: "${model.path}-run"}
        vars: {other: "${name}"}
        """,
    )
    monkeypatch.setenv("WHERE", "/secret")
    loaded = load_recipe("child.yaml")
    assert loaded.recipe.model.path == "/secret/m"
    assert loaded.environment == {"model.path": "${oc.env:WHERE}/m", "run.dir": "${model.path}-run"}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('run: {dir: "${absent}"}', "child.yaml:2: run.dir: Interpolation key 'absent' not found (only keys that"),
        (
            'vars: {bits: 3}\nrun: {dir: "${vars.bit}"}',
            "child.yaml:3: run.dir: Interpolation key 'vars.bit' not found (did you mean vars.bits?)",
        ),
        (
            'run: {dir: "${env:HOME}"}',
            "child.yaml:2: run.dir: Unsupported interpolation type env (did you mean oc.env?)",
        ),
        (
            'run: {dir: "${PATH}/runs"}',
            "child.yaml:2: run.dir: Interpolation key 'PATH' not found (did you mean oc.env:PATH?)",
        ),
        ('run: {dir: "${"}', "child.yaml:2: run.dir: cannot parse '${'"),
        # the item beside it is as it should be
        ('vars: {a: ["${name}", "${absent}"]}', "child.yaml:2: vars.a.1: Interpolation key 'absent' not found"),
        ('run: {dir: "${oc.env:UNSET_X}"}', "child.yaml:2: run.dir: environment variable UNSET_X is not set"),
        ('vars: {a: "${vars.a}"}', "child.yaml:2: vars.a: Recursive interpolation"),
        # the rule without its bits is no second mistake
        ('stages: {quantize: {rules: {experts: {bits: "${x}"}}}}', "child.yaml:2: stages.quantize.rules.experts.bits"),
    ],
)  # fmt: skip
def test_interpolations_that_fail_are_reported_in_place(write, problems, text, line):
    write("child.yaml", f"extends: good\n{text}\n")
    found = problems("child.yaml")
    assert len(found) == 1 and found[0].startswith(line)


def test_all_missing_values_are_collected(write, problems):
    write("child.yaml", 'extends: good\nmodel: {path: "???"}\nstages: {quantize: {damp: "???"}}\n')
    found = problems("child.yaml")
    assert found == [
        "child.yaml:2: model.path: must be given: model.path=VALUE on the command line",
        "child.yaml:3: stages.quantize.damp: must be given: stages.quantize.damp=VALUE on the command line",
    ]


def test_missing_text_may_be_allowed(write, problems):
    write("child.yaml", 'extends: good\nmodel: {path: "???"}\n')
    assert load_recipe("child.yaml", allow_missing=True).missing == ("model.path",)
    assert load_recipe("child.yaml", ["model.path=x"]).missing == ()
    write("worse.yaml", 'extends: child\nrun: {seed: "???"}\n')
    assert problems("worse.yaml", allow_missing=True) == ["worse.yaml:2: run.seed: expected an integer, not '???'"]


def test_two_bases_may_stand_on_the_same_one(write):
    write("left.yaml", "extends: good\nstages: {quantize: {damp: 0.2}}\n")
    write("right.yaml", "extends: good\nstages: {export: {formats: [native, dense]}}\n")
    write("child.yaml", "extends: [left, right]\nname: child\n")
    loaded = load_recipe("child.yaml")
    assert loaded.recipe.stages["export"].formats == ("native", "dense")
    # the later base says again what it has from its own
    assert loaded.recipe.stages["quantize"].type == "gptq" and [f.name for f in loaded.files].count("good.yaml") == 1


def test_interpolations_in_lists_and_of_defaults_that_are_not_written(write):
    write(
        "child.yaml",
        """
        extends: good
        name: child
        vars: {words: ["${name}", "${run.dir}/x", {deep: ["${name}"]}]}
        """,
    )
    loaded = load_recipe("child.yaml")
    assert loaded.recipe.vars["words"] == ["child", "runs/child/x", {"deep": ["child"]}]
    assert loaded.recipe.run.dir == "runs/child" and "run" not in loaded.composed


def test_a_changed_base_leaves_the_place_of_what_it_replaced(write, problems):
    """A value that is replaced as a whole is blamed where the new one stands, its parts too."""
    write("child.yaml", "extends: good\nstages:\n  quantize:\n    rules: {experts: {bits: {first_half: 99}}}\n")
    assert all(line.startswith("child.yaml:4: ") for line in problems("child.yaml"))
    found = problems("good.yaml", ["stages.quantize.rules.experts={role: experts, bits: 99}"])
    assert all(line.startswith("override #1: ") for line in found) and found


def test_cycles_are_named(write, problems):
    write("a.yaml", "extends: b\n")
    write("b.yaml", "name: x\nextends: [c.yaml]\n")
    write("c.yaml", "extends: a\n")
    assert problems("a.yaml") == ["c.yaml:1: extends: cycle a.yaml → b.yaml → c.yaml → a.yaml"]


def test_missing_bases_and_syntax_errors_of_several_files_come_together(write, problems):
    write("a.yaml", "name: x\nextends: [goof, broken]\n")
    write("broken.yaml", "a: [\n")
    found = problems("a.yaml")
    assert found[0] == "a.yaml:2: extends: no file 'goof' (did you mean good?)"
    assert found[1].startswith("broken.yaml:2: not valid YAML")


@pytest.mark.parametrize("value", ["3", "{a: b}", "[1]"])
def test_extends_must_name_recipes(write, problems, value):
    write("a.yaml", f"extends: {value}\n")
    assert problems("a.yaml") == ["a.yaml:1: extends must be the name of a recipe or a list of names"]


def test_shipped_fragments_can_be_extended_from_anywhere(write):
    write("mine.yaml", "extends: base/eac_moe\nname: mine\nmodel: {path: m}\n")
    assert load_recipe("mine.yaml").recipe.stages["quantize"].type == "qesc"


def test_overrides_are_blamed_by_number(write, problems):
    found = problems("good.yaml", ["stages.quantize.damp=2", "run.sed=1", "+stages.quantize.dam=1", "x"])
    assert found == [
        "override #1: stages.quantize.damp: expected a number less than 1.0, not 2",
        "override #2: run.sed: no key 'sed' in run (did you mean seed?)",
        "override #3: stages.quantize.dam: unknown key (did you mean damp?)",
        "override #4: 'x': expected key=value, +key=value or key~",
    ]


def test_files_that_cannot_be_read(write, problems, tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\n")
    assert problems("latin.yaml") == ["latin.yaml:1: cannot be read: is not UTF-8 text"]
    with pytest.raises(RecipeError, match="no such file or shipped recipe"):
        load_recipe("nowhere.yaml")


@pytest.mark.parametrize(
    ("stages", "path", "words"),
    [
        (["qesc", "load"], "qesc", "needs calibration data"),
        (["load", "gptq", "calibrate"], "gptq", "move calibrate in front of it"),
        (
            ["load", "export"],
            "export",
            "needs quantized weights, .* add a stage of type rtn or gptq or qesc .*before it",
        ),
        (["calibrate"], "calibrate", "needs a model, .* add a stage of type load before it"),
        (["load", "evaluate", "pesf"], "pesf", "nothing would use its policy"),
    ],
)
def test_the_chain_of_stages_is_checked(stages, path, words):
    found = check_chain({"stages": {kind: {"type": kind} for kind in stages}})
    mine = [problem for problem in found if problem.path == ("stages", path)]
    assert mine
    assert any(re.search(words, problem.message) for problem in mine)


def test_a_complete_chain_has_no_problems():
    order = ["load", "calibrate", "qesc", "router_calibration", "pesf", "evaluate", "export"]
    assert check_chain({"stages": {kind: {"type": kind} for kind in order}}) == []


def test_the_chain_is_reported_with_its_line(write, problems):
    write("child.yaml", "extends: good\nstages: {load~: }\n")
    assert problems("child.yaml")[0].startswith("good.yaml:6: stages.calibrate: needs a model")


def test_rules_are_checked_against_the_model_with_their_line(write):
    write("child.yaml", "extends: good\nstages:\n  quantize:\n    rules:\n      odd: {match: slf_attn, bits: 4}\n")
    loaded = load_recipe("child.yaml")
    with pytest.raises(RecipeError, match=r"^child.yaml:5: stages.quantize.rules.odd.match: .*self_attn"):
        loaded.check_layout(layout_from_config(TINY_MIXTRAL))
    load_recipe("good.yaml").check_layout(layout_from_config(TINY_MIXTRAL))


def test_nothing_of_omegaconf_leaves_the_loader(write):
    write("child.yaml", 'extends: good\nvars: {a: {b: [1]}, c: "${vars.a}"}\n')
    loaded = load_recipe("child.yaml")

    def kinds(value):
        yield type(value)
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from kinds(item)

    assert set(kinds(loaded.composed)) <= {dict, list, str, int, float, bool, type(None)}
    assert loaded.recipe.vars["c"] == {"b": [1]}


def test_files_that_are_not_here_are_named_with_their_place(write, tmp_path):
    (tmp_path / "some/model").mkdir(parents=True)
    (tmp_path / "here [1].txt").write_text("a name with brackets is no pattern")
    evaluate = "evaluate: {type: evaluate, perplexity: {held: {source: {kind: text, path: %s}}}}"
    for path, expected in (
        ("'here [1].txt'", []),
        ("'*.txt'", []),
        ("runs/good/written_by_a_stage.txt", []),
        ("x.txt", ["child.yaml:3: stages.evaluate.perplexity.held.source.path: no such file or folder: x.txt"]),
        ("asset:x", ["child.yaml:3: stages.evaluate.perplexity.held.source.path: asset:x: no such asset"]),
    ):
        write("child.yaml", f"extends: good\nstages:\n  {evaluate % path}\n")
        assert list(load_recipe("child.yaml").absent().values()) == expected
    gone = load_recipe("good.yaml", ["model.path=gone", "model.tokenizer=gone_too"]).absent()
    assert list(gone.items()) == [
        ("model.path", "override #1: model.path: no such model folder: gone"),
        ("model.tokenizer", "override #2: model.tokenizer: no such file or folder: gone_too"),
    ]


def test_a_stage_that_must_come_first_says_in_front_of_what() -> None:
    order = ("load", "calibrate", "gptq", "smooth")
    (problem,) = check_chain({"stages": {kind: {"type": kind} for kind in order}})
    assert problem.path == ("stages", "smooth")
    assert problem.message == "comes after gptq, which makes quantized weights: move it in front of gptq"
    assert check_chain({"stages": {kind: {"type": kind} for kind in ("load", "calibrate", "smooth", "gptq")}}) == []
