from __future__ import annotations

import re

import pytest

from llmcompress.recipe.diagnose import SourceMap, allowed_keys, did_you_mean, show_path
from llmcompress.recipe.load import load_recipe
from llmcompress.recipe.schema import strict_schema

# a line that goes into a recipe, and the message it must give
MISTAKES = r"""
stages: {quantize: {dmp: 0.1}}
    stages.quantize.dmp: unknown key (did you mean damp?)
stages: {quantize: {ignore: [lm_head]}}
    stages.quantize.ignore: unknown key (did you mean rules, the first with keep: true for what stays dense?)
stages: {quantize: {sym: true}}
    stages.quantize.sym: unknown key (did you mean rules.NAME.symmetric?)
stages: {quantize: {desc_act: true}}
    stages.quantize.desc_act: unknown key (did you mean act_order?)
stages: {calibrate: {num_calibration_samples: 512}}
    stages.calibrate.num_calibration_samples: unknown key (did you mean samples?)
stages: {quantize: {type: gptqq}}
    stages.quantize.type: unknown type 'gptqq' (did you mean gptq?)
stages: {quantize: {group_sise: 64}}
    stages.quantize.group_sise: unknown key (did you mean rules.NAME.group_size?)
stages: {quantize: {min_token: 64}}
    stages.quantize.min_token: unknown key (did you mean rare_experts.min_tokens?)
stages: {quantize: {damp: much}}
    stages.quantize.damp: expected a number, not 'much'
stages: {quantize: {diagnose_experts: maybe}}
    stages.quantize.diagnose_experts: expected true or false, not 'maybe'
stages: {quantize: {grid: mss}}
    stages.quantize.grid: expected minmax or mse, not 'mss' (did you mean mse?)
stages: {quantize: {rules: {experts: {bits: 5}}}}
    stages.quantize.rules.experts.bits: expected 2, 3, 4 or 8, not 5
stages: {quantize: {rules: {experts: {bits: {first_half: 3}}}}}
    stages.quantize.rules.experts.bits.second_half: required key is missing
stages: {quantize: {rules: {experts: {role: linears}}}}
    stages.quantize.rules.experts.role: expected attention, mlp, experts, shared_experts, ssm or a list, not 'linears'
stages: {quantize: {rules: {experts: {group_size: 0}}}}
    stages.quantize.rules.experts.group_size: group_size must be positive, or -1 for one group per row
stages: {quantize: {rules: {experts: {match: '('}}}}
    stages.quantize.rules.experts.match: not a regular expression: missing ), unterminated subpattern at position 0
stages: {calibrate: {source: {kind: jsn}}}
    stages.calibrate.source.kind: unknown kind 'jsn' (did you mean jsonl?)
stages: {calibrate: {samples: 0}}
    stages.calibrate.samples: expected a number at least 1, not 0
stages: {calibrate: 3}
    stages.calibrate: expected a mapping, not 3
stages: {export: {formats: [nativ]}}
    stages.export.formats.0: expected native, compressed-tensors, gguf or dense, not 'nativ' (did you mean native?)
stages: {export: {formats: gguf}}
    stages.export.formats: expected a list, not 'gguf' (write [gguf])
model: some/folder
    model: expected a mapping, not 'some/folder' (its keys: path, dtype, tokenizer)
stages: {export: {formats: []}}
    stages.export.formats: must not be empty
stages: {tree: {type: rqt, members: {one: folder}}}
    stages.tree.members: needs 2 entries or more, has 1
stages: {quantize: {rare_experts: {min_tokens: few}}}
    stages.quantize.rare_experts.min_tokens: expected auto or an integer, not 'few'
model: {path: [1]}
    model.path: expected text, not a list
model: {dtype: bf16}
    model.dtype: expected auto, float32, bfloat16 or float16, not 'bf16' (did you mean bfloat16?)
host: {ram: plenty}
    host.ram: expected a size such as 24GB, 16GiB or a number of bytes
host: {ram: 8}
    host.ram: 8 bytes hold nothing: write 8GB for gigabytes
device: cuda
    device: expected a mapping, not 'cuda' (its keys: vram; did you mean run.device?)
stages: {'a b': {type: load}}
    stages.a b: 'a b' is not a name: use letters, digits, ., _ and -
naem: x
    naem: unknown key (did you mean name?)
version: 2
    version: expected 1, not 2
"""


@pytest.mark.parametrize(("text", "line"), re.findall(r"^(\S.*)\n    (.*)$", MISTAKES, re.MULTILINE))
def test_each_mistake_gives_one_clear_line(write, problems, text, line):
    write("child.yaml", f"extends: good\n{text}\n")
    found = problems("child.yaml")
    assert f"child.yaml:2: {line}" in found
    assert len(found) == 1 or "kind: jsn" in text  # of the other keys some belong to another kind


def test_a_stage_without_type_is_told_the_types(write, problems):
    write("child.yaml", "extends: good\nstages: {x: {a: 1}}\n")
    (line,) = problems("child.yaml")
    assert line.startswith("child.yaml:2: stages.x: required key type is missing (one of load, calibrate, ")


def test_a_missing_key_with_one_value_is_told_it(write, problems):
    write("own.yaml", "name: own\nmodel: {path: folder}\nstages: {load: {type: load}}\n")
    assert problems("own.yaml") == ["own.yaml:1: version: required key is missing (write version: 1)"]


def test_a_type_unlike_all_others_is_told_the_types(write, problems):
    write("child.yaml", "extends: good\nstages: {x: {type: awq}}\n")
    (line,) = problems("child.yaml")
    assert line.startswith("child.yaml:2: stages.x.type: unknown type 'awq' (known: activations, calibrate, ")


def test_words_of_other_tools_are_found_below(problems):
    (line,) = problems("good.yaml", ["stages.quantize.sym=true"])
    assert "did you mean stages.quantize.rules." in line and ".symmetric?" in line


def test_an_empty_section_means_its_defaults(write):
    write("child.yaml", "extends: good\nrun:\n")
    assert load_recipe("child.yaml").recipe.run.seed == 0


def test_all_mistakes_come_at_once_in_file_order(write, problems):
    write(
        "child.yaml",
        "extends: good\nrun: {sed: 1}\nmodel: {path: 3}\nstages:\n  quantize: {damp: x, foo: 1}\n  zz: {type: no}\n",
    )
    found = problems("child.yaml", ["run.device=gpu"])
    assert [line.split(": ")[0] for line in found] == [
        "child.yaml:2", "child.yaml:3", "child.yaml:5", "child.yaml:5", "child.yaml:6", "override #1",
    ]  # fmt: skip


def test_mistakes_in_a_base_are_shown_in_the_base(write, problems):
    write("base.yaml", "extends: good\nstages:\n  quantize:\n    group_sise: 3\n")
    write("child.yaml", "extends: base\nname: child\n")
    assert problems("child.yaml")[0].startswith("base.yaml:4: stages.quantize.group_sise: unknown key")


def test_did_you_mean_offers_the_nearest_or_a_short_list():
    assert did_you_mean("sed", ["seed", "dir"]) == " (did you mean seed?)"
    assert did_you_mean("xyz", ["seed", "dir"]) == " (known: seed, dir)"
    assert did_you_mean("xyz", [f"name{i}" for i in range(30)]) == ""


def test_allowed_keys_follow_the_discriminator():
    data = {"stages": {"q": {"type": "rtn"}, "p": {"type": "pesf"}}}
    assert "alpha" in allowed_keys(data, ("stages", "p"), strict_schema())
    assert "alpha" not in allowed_keys(data, ("stages", "q"), strict_schema())
    assert allowed_keys(data, ("stages",), strict_schema()) is None
    assert "group_size" in allowed_keys(data, ("stages", "q", "rules", "any"), strict_schema())


def test_source_map_falls_back_to_the_nearest_key_above(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sources = SourceMap(tmp_path / "r.yaml", {("a",): (tmp_path / "r.yaml", 3), ("a", "b"): 2})
    assert sources.place(("a", "c")) == "r.yaml:3"
    assert sources.place(("a", "b", "d")) == "override #2"
    assert sources.place(("z",)) == "r.yaml:1"
    sources.forget(("a", "b"))
    assert sources.place(("a", "b")) == "r.yaml:3"
    assert show_path(tmp_path.parent / "x") == str(tmp_path.parent / "x")
