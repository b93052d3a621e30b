"""Recipes that are wrong in themselves: found by ``validate`` before anything is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from malformed.bench import Bench, Case, Run

RECIPE = (3,)
USAGE = (2,)


def _edited(old: str, new: str) -> Callable[[Bench], Run]:
    """The working recipe with one piece of its text replaced."""

    def build(bench: Bench) -> Run:
        text = bench.lines()
        assert old in text, old
        return Run(["validate", bench.text(text.replace(old, new, 1))])

    return build


def _changed(changes: Mapping[str, Any]) -> Callable[[Bench], Run]:
    """The working recipe with ``changes`` merged in."""
    return lambda bench: Run(["validate", bench.recipe(changes)])


def _stages(**stages: Any) -> Callable[[Bench], Run]:
    return _changed({"stages": stages})


def _whole(text: str) -> Callable[[Bench], Run]:
    """This text instead of a recipe."""
    return lambda bench: Run(["validate", bench.text(text)])


def _override(*words: str) -> Callable[[Bench], Run]:
    return lambda bench: Run(["validate", bench.recipe(), *words])


def _rule(**rule: Any) -> Callable[[Bench], Run]:
    return _stages(quantize={"rules": {"attention": rule}})


def _cycle(bench: Bench) -> Run:
    bench.text("extends: b\nversion: 1\n", "a.yaml")
    bench.text("extends: c\n", "b.yaml")
    bench.text("extends: a\n", "c.yaml")
    return Run(["validate", str(bench.folder / "a.yaml")])


def _own_base(bench: Bench) -> Run:
    return Run(["validate", bench.text("extends: recipe\nversion: 1\nname: x\n")])


def _order(*names: str) -> Callable[[Bench], Run]:
    """The stages of the working recipe in another order."""

    def build(bench: Bench) -> Run:
        import yaml

        data = bench.data()
        data["stages"] = {name: data["stages"][name] for name in names}
        return Run(["validate", bench.text(yaml.safe_dump(data, sort_keys=False))])

    return build


def _not_text(bench: Bench) -> Run:
    path = bench.folder / "recipe.yaml"
    path.write_bytes(bench.lines().encode() + b"# \xff\xfe\n")
    return Run(["validate", str(path)])


def _code_tag(bench: Bench) -> Run:
    mark = bench.folder / "ran"
    text = bench.lines() + f'description: !!python/object/apply:os.system ["touch {mark}"]\n'
    return Run(["validate", bench.text(text)], outputs=[mark])


def _several(bench: Bench) -> Run:
    changes = {"modle": {}, "stages": {"calibrate": {"samples": "many"}, "quantize": {"damp": 7}}}

    def inspect(code: int, stderr: str) -> list[str]:
        lines = [line for line in stderr.splitlines() if ".yaml:" in line]
        return [] if len(lines) == 3 else [f"{len(lines)} places named, not 3"]

    return Run(["validate", bench.recipe(changes)], inspect=inspect)


def _after_all(bench: Bench) -> Run:
    return Run(["validate", bench.recipe({"stages": {"prune": {"type": "pesf", "alpha": 0.3}}})])


def _gate(**gate: Any) -> Callable[[Bench], Run]:
    def build(bench: Bench) -> Run:
        text = {"source": {"kind": "jsonl", "path": str(bench.texts("heldout.jsonl", 2))}, "length": 32}
        dense = gate.pop("dense", True)
        section = {"perplexity": {"heldout": text}, "gates": {"quality": gate}, "dense": dense}
        return Run(["validate", bench.evaluate(section)])

    return build


def _words(*words: str) -> Callable[[Bench], Run]:
    return lambda bench: Run(list(words))


def _text(kind: str, **source: Any) -> dict[str, Any]:
    return {"calibrate": {"source": {"kind": kind, **source}}}


FILES = [
    Case("no such recipe", RECIPE, r"no such file or shipped recipe", _words("validate", "nowhere.yaml")),
    Case("misspelt shipped recipe", RECIPE, r"did you mean quickstart\?", _words("validate", "quickstrat")),
    Case("recipe is a folder", RECIPE, r"folder without", lambda b: Run(["validate", str(b.folder)])),
    Case("recipe is empty", RECIPE, r"recipe\.yaml:1: .*(empty|missing)", _whole("")),
    Case("recipe is a list", RECIPE, r"mapping", _whole("- version: 1\n- name: x\n")),
    Case("recipe is a sentence", RECIPE, r"mapping", _whole("compress my model please\n")),
    Case("recipe is not UTF-8", RECIPE, r"not UTF-8", _not_text),
    Case("YAML syntax error", RECIPE, r"recipe\.yaml:\d+: .*not valid YAML", _edited("name: case", "name: [case")),
    Case("tab as indentation", RECIPE, r"\btab\b", _edited("  seed: 0" if False else "run:\n  dir", "run:\n\tdir")),
    Case("duplicate key", RECIPE, r"duplicate key, first given in line", _edited("name: case", "name: case\nname: b")),
    Case("YAML tag that would run code", RECIPE, r"not valid YAML|tag", _code_tag),
    Case("alias that holds itself", RECIPE, r"itself|recursive|cycle|alias", _edited("name: case", "name: case\nvars: &v {a: *v}")),
    Case("extends: cycle of three", RECIPE, r"a\.yaml.*→.*b\.yaml.*→.*c\.yaml.*→", _cycle),
    Case("extends: itself", RECIPE, r"cycle", _own_base),
    Case("extends: base missing", RECIPE, r"extends: no file 'base/book'.*did you mean base/books", _whole("extends: base/book\nversion: 1\n")),
    Case("extends: wrong type", RECIPE, r"extends must be", _whole("extends: {a: b}\nversion: 1\n")),
    Case("damaged lock", RECIPE, r"not valid YAML|not a recipe lock", lambda b: Run(["validate", b.text('{"recipe": 3', "x.lock.json")])),
]  # fmt: skip

KEYS = [
    Case("typo in a section", RECIPE, r"modle: unknown key.*did you mean model", _edited("model:", "modle:")),
    Case("typo in a stage key", RECIPE, r"recipe\.yaml:\d+: stages\.calibrate\.smaples: unknown key.*did you mean samples", _edited("samples:", "smaples:")),
    Case("typo in a nested key", RECIPE, r"rules\.attention\.group_sise: unknown key.*group_size", _edited("group_size:", "group_sise:")),
    Case("typo in a stage type", RECIPE, r"unknown type 'gptqq'.*did you mean gptq", _edited("type: gptq", "type: gptqq")),
    Case("stage without a type", RECIPE, r"stages\.load: required key type is missing", _stages(load={"type": ...})),
    Case("version of the future", RECIPE, r"version: expected 1, not 2", _edited("version: 1", "version: 2")),
    Case("no version", RECIPE, r"version: required key is missing", _changed({"version": ...})),
    Case("no model", RECIPE, r"model: required key is missing", _changed({"model": ...})),
    Case("model is a list", RECIPE, r"model: expected a mapping, not a list", _changed({"model": ["a", "b"]})),
    Case("stages is a list", RECIPE, r"stages: expected a mapping, not a list", _changed({"stages": [{"type": "load"}]})),
    Case("no stages at all", RECIPE, r"stages: must not be empty", _whole("version: 1\nname: x\nmodel: {path: m}\nstages: {}\n")),
    Case("stage is null", RECIPE, r"stages\.load: ", _changed({"stages": {"load": None}})),
    Case("stage name that is a path", RECIPE, r"not a name", _stages(**{"../../outside": {"type": "load"}})),
    Case("text for a number", RECIPE, r"samples: expected an integer, not 'many'", _stages(calibrate={"samples": "many"})),
    Case("number for a truth value", RECIPE, r"act_order: expected true or false.*not 3", _stages(quantize={"act_order": 3})),
    Case("zero calibration samples", RECIPE, r"samples: expected a number at least 1, not 0", _stages(calibrate={"samples": 0})),
    Case("windows of one token", RECIPE, r"length: expected a number at least 2", _stages(calibrate={"length": 1})),
    Case("negative seed", RECIPE, r"run\.seed: expected a number at least 0", _changed({"run": {"seed": -1}})),
    Case("damping of NaN", RECIPE, r"damp: ", _edited("type: gptq", "type: gptq\n    damp: .nan")),
    Case("unknown device", RECIPE, r"run\.device: expected .*not 'tpu'", _changed({"run": {"device": "tpu"}})),
    Case("size without a unit", RECIPE, r"host\.ram: 24 bytes hold nothing: write 24GB", _changed({"host": {"ram": 24}})),
    Case("size in bananas", RECIPE, r"host\.ram: expected a size", _changed({"host": {"ram": "24 bananas"}})),
    Case("several mistakes at once", RECIPE, r"modle.*|samples.*damp", _several),
    Case("unknown interpolation", RECIPE, r"model\.path: .*nothing", _changed({"model": {"path": "${vars.nothing}"}})),
    Case("misspelt interpolation", RECIPE, r"model\.path: .*vars\.modle.*did you mean vars\.model\?", _changed({"vars": {"model": "m"}, "model": {"path": "${vars.modle}"}})),
    Case("interpolation of the environment without its prefix", RECIPE, r"model\.path: .*did you mean oc\.env\?", _changed({"model": {"path": "${env:HOME}"}})),
    Case("interpolation cycle", RECIPE, r"vars\.[ab]: ", _changed({"vars": {"a": "${vars.b}", "b": "${vars.a}"}})),
    Case("unset environment variable", RECIPE, r"environment variable LLMCOMPRESS_NOT_SET is not set", _changed({"model": {"path": "${oc.env:LLMCOMPRESS_NOT_SET}"}})),
    Case("value left open", RECIPE, r"model\.path: must be given", lambda b: Run(["run", b.recipe({"model": {"path": "???"}})], run_dir=b.run_dir)),
    Case("removal of nothing", RECIPE, r"nothing inherited to remove", _edited("name: case", "name: case\nhost~:")),
]  # fmt: skip

STAGES = [
    Case("quantize before load", RECIPE, r"stages\.quantize: needs a model.*move load in front", _order("quantize", "load", "calibrate", "export")),
    Case("export before quantize", RECIPE, r"stages\.export: needs quantized weights.*move quantize in front", _order("load", "calibrate", "export", "quantize")),
    Case("no calibration", RECIPE, r"stages\.quantize: needs calibration data.*type calibrate", _order("load", "quantize", "export")),
    Case("policy that nothing uses", RECIPE, r"stages\.prune: comes after every evaluate and export", _after_all),
    Case("alpha above its range", RECIPE, r"prune\.alpha: expected a number at most|prune\.alpha: expected a number less", _stages(prune={"type": "pesf", "alpha": 1.5}, export=...)),
    Case("alpha below its range", RECIPE, r"prune\.alpha: expected a number", _stages(prune={"type": "pesf", "alpha": -0.1}, export=...)),
    Case("five bits", RECIPE, r"rules\.attention\.bits: expected .*2.*3.*4.*8.*not 5", _rule(bits=5)),
    Case("group size zero", RECIPE, r"group_size must be positive", _rule(group_size=0)),
    Case("act_order without static groups", RECIPE, r"act_order needs static_groups", _stages(quantize={"act_order": True})),
    Case("rule that matches nothing", RECIPE, r"rules\.attention.*(match|no weight)", _rule(role=..., match="no_such_projection")),
    Case("rule for a role the model lacks", RECIPE, r"rules\.attention.*shared_experts", _rule(role="shared_experts")),
    Case("broken regular expression", RECIPE, r"not a regular expression", _rule(role=..., match="layers\\.(")),
    Case("rule with match and role", RECIPE, r"give either match or role", _rule(match="q_proj")),
    Case("rule without bits", RECIPE, r"give bits, or keep", _rule(bits=...)),
    Case("unknown role", RECIPE, r"rules\.attention\.role: .*(attention|experts)", _rule(role="heads")),
    Case("no rules", RECIPE, r"rules: (must not be empty|required)", lambda b: Run(["validate", b.text(b.lines().split("    rules:")[0] + "    rules: {}\n")])),
    Case("bit plan for a layer that is not there", RECIPE, r"layer.*7|7.*layer", _rule(bits={"default": 4, "layers": {7: 2}})),
    Case("average bits out of reach", RECIPE, r"average", _rule(bits={"auto": 6, "choices": [2, 3]})),
    Case("unknown export format", RECIPE, r"formats.*: expected .*native.*not 'onnx'", _stages(export={"formats": ["onnx"]})),
    Case("unknown text source", RECIPE, r"unknown kind 'csv'", _stages(**_text("csv", path="x.csv"))),
    Case("hub source without a name", RECIPE, r"source\.id: required key is missing|source: .*id", _changed({"stages": {"calibrate": {"source": {"kind": "hub", "path": ...}}}})),
    Case("gate on an unknown metric", RECIPE, r"gates\.quality: no metric 'heldout\.perplexty'.*did you mean heldout\.perplexity", _gate(metric="heldout.perplexty", max=10)),
    Case("gate with two limits", RECIPE, r"exactly one of", _gate(metric="heldout.perplexity", max=10, min=1)),
    Case("relative gate without the dense model", RECIPE, r"dense must be true", _gate(metric="heldout.perplexity", max_rel_increase=0.1, dense=False)),
]  # fmt: skip

COMMANDS = [
    Case("override of an unknown key", RECIPE, r"override #1: .*no key 'smaples' in stages\.calibrate.*did you mean samples", _override("stages.calibrate.smaples=3")),
    Case("override without a value", RECIPE, r"override #1: .*expected key=value", _override("stages.calibrate.samples")),
    Case("override below a single value", RECIPE, r"override #1: .*single value", _override("name.first=3")),
    Case("override that removes nothing", RECIPE, r"override #1: .*no key", _override("stages.prune~")),
    Case("override with broken YAML", RECIPE, r"override #1: .*not valid YAML", _override("stages.calibrate.source={kind: [")),
    Case("override of the wrong type", RECIPE, r"override #1.*samples: expected an integer", _override("stages.calibrate.samples=lots")),
    Case("override with spaces around its sign", RECIPE, r"'=': write key=value without spaces", _override("stages.calibrate.samples", "=", "3")),
    Case("device as a section", RECIPE, r"device: expected a mapping.*did you mean run\.device", _override("device=cuda")),
    Case("unknown command", USAGE, r"[Nn]o such command", _words("compress")),
    Case("unknown option", USAGE, r"[Nn]o such option", _words("validate", "quickstart", "--fast")),
    Case("missing argument", USAGE, r"[Mm]issing argument", _words("validate")),
    Case("stop at a stage that is not there", USAGE, r"--until finish: no such stage", lambda b: Run(["run", b.recipe(), "--until", "finish"], run_dir=b.run_dir)),
]  # fmt: skip

CASES = [*FILES, *KEYS, *STAGES, *COMMANDS]
