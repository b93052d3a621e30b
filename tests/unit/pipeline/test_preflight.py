"""What a machine lacks is known before a run begins; the machine is replaced by numbers here."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmcompress.data import hub
from llmcompress.errors import EnvironmentProblem, InputError, RecipeError, ResourceError
from llmcompress.models import memory_limits
from llmcompress.pipeline import preflight as module
from llmcompress.pipeline.device import baseline_ram
from llmcompress.pipeline.estimate import Plan, on_machine, plan
from llmcompress.pipeline.fingerprint import inputs_of
from llmcompress.pipeline.preflight import Extent, hub_sources, require_companions, shortfalls
from llmcompress.pipeline.run_dir import RunDir, StageRecord
from llmcompress.recipe.load import LoadedRecipe, load_recipe
from llmcompress.units import bytes_text

GB = 10**9


@pytest.fixture
def known(tmp_path: Path) -> tuple[LoadedRecipe, Plan]:
    """The quickstart with its run folder in ``tmp_path``, and what is predicted for it."""
    loaded = load_recipe("quickstart", [f"run.dir={tmp_path / 'run'}", "run.device=cpu"])
    return loaded, plan(loaded, config_of(loaded))


def config_of(loaded: LoadedRecipe) -> dict[str, Any]:
    from llmcompress.models.checkpoint import read_config
    from llmcompress.models.paths import resolve_path

    return read_config(resolve_path(loaded.recipe.model.path))


def preflight(loaded: LoadedRecipe, predicted: Plan, extent: Extent | None = None) -> list[str]:
    return module.preflight(loaded, predicted, config_of(loaded), extent)


def machine(monkeypatch: pytest.MonkeyPatch, ram: int = 64 * GB, free: int = 64 * GB, disk: int = 64 * GB) -> None:
    monkeypatch.setattr(memory_limits, "total_ram", lambda: ram)
    monkeypatch.setattr(memory_limits, "available_ram", lambda: free)
    monkeypatch.setattr("psutil.swap_memory", lambda: SimpleNamespace(total=0))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=disk, total=64 * GB))


def test_a_machine_that_suffices_is_passed_over_in_silence(
    known: tuple[LoadedRecipe, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch)
    assert preflight(*known) == []


def test_a_disk_too_small_is_refused_and_what_is_written_already_counts(
    known: tuple[LoadedRecipe, Plan], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loaded, predicted = known
    machine(monkeypatch, disk=predicted.disk - 1)
    with pytest.raises(ResourceError, match=r"free on this disk, .* are still to be written") as caught:
        preflight(loaded, predicted)
    assert "--no-preflight" in str(caught.value.hint) and "run.dir=FOLDER" in str(caught.value.hint)
    # a run that was interrupted behind its first block needs less than a new one
    (tmp_path / "run" / "stages" / "quantize").mkdir(parents=True)
    (tmp_path / "run" / "stages" / "quantize" / "block").write_bytes(b"x")
    assert preflight(loaded, predicted) == []


@pytest.mark.parametrize("stage", ["quantize", "export"])
def test_what_other_stages_have_written_is_no_room_for_this_one(
    known: tuple[LoadedRecipe, Plan], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stage: str
) -> None:
    loaded, predicted = known
    needed = next(row.disk for row in predicted.stages if row.name == stage)
    own, other = tmp_path / "run" / "stages" / stage, tmp_path / "run" / "stages" / "load"
    for folder in (own, other):
        folder.mkdir(parents=True)
    (other / "large").write_bytes(bytes(needed))
    machine(monkeypatch, disk=needed - 1)
    with pytest.raises(ResourceError, match=f"{bytes_text(needed)} are still to be written"):
        preflight(loaded, predicted, Extent(only=stage))
    # nor does one that has written more than was predicted make room for the others
    machine(monkeypatch, disk=predicted.disk - 1)
    with pytest.raises(ResourceError, match="are still to be written"):
        preflight(loaded, predicted)
    machine(monkeypatch, disk=needed - 1)
    # all of it goes before anything is written
    assert preflight(loaded, predicted, Extent(only=stage, force=True)) == []
    own = tmp_path / "run" / "artifact" if stage == "export" else own
    own.mkdir(exist_ok=True)
    (own / "part").write_bytes(b"x")
    assert preflight(loaded, predicted, Extent(only=stage)) == []


def test_an_export_that_is_there_already_needs_no_more_room_on_its_disk(
    known: tuple[LoadedRecipe, Plan], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loaded = load_recipe("quickstart", [*known[0].overrides, f"stages.export.dir={tmp_path / 'far' / 'out'}"])
    needed = next(row.disk for row in known[1].stages if row.name == "export")
    machine(monkeypatch, disk=needed - 1)
    # neighbours whose names begin alike are not of this export
    for name in ("out", "outside", "out-of-last-year", "out.old"):
        (tmp_path / "far" / name).mkdir(parents=True)
        (tmp_path / "far" / name / "other").write_bytes(b"" if name == "out" else bytes(needed))
    with pytest.raises(ResourceError, match="far"):
        preflight(loaded, known[1], Extent(only="export"))
    (tmp_path / "far" / "out" / "model").write_bytes(b"x")
    assert preflight(loaded, known[1], Extent(only="export")) == []
    (tmp_path / "far" / "out" / "model").unlink()
    # half of another format
    (tmp_path / "far" / "out-dense.partial").mkdir()
    (tmp_path / "far" / "out-dense.partial" / "model").write_bytes(b"x")
    with pytest.raises(ResourceError, match="far"):
        preflight(loaded, known[1], Extent(only="export"))
    both = load_recipe("quickstart", [*loaded.overrides, "stages.export.formats=[native, dense]"])
    assert preflight(both, known[1], Extent(only="export")) == []


def test_an_export_to_another_disk_needs_its_room_there(
    known: tuple[LoadedRecipe, Plan], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loaded = load_recipe("quickstart", [*known[0].overrides, f"stages.export.dir={tmp_path / 'far' / 'artifact'}"])
    (tmp_path / "far").mkdir()
    export = next(stage for stage in known[1].stages if stage.type == "export")
    real = Path.stat
    monkeypatch.setattr(
        Path, "stat",
        lambda path, **how: (
            SimpleNamespace(st_dev=7, st_mode=real(path).st_mode) if path.name == "far" else real(path, **how)
        ),
    )  # fmt: skip
    machine(monkeypatch)
    monkeypatch.setattr(
        shutil, "disk_usage",
        lambda path: SimpleNamespace(free=export.disk - 1 if path.name == "far" else 64 * GB, total=64 * GB),
    )  # fmt: skip
    with pytest.raises(ResourceError, match="far: "):
        preflight(loaded, known[1])
    # what is deleted from the run folder makes no room there
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "large").write_bytes(bytes(export.disk))
    with pytest.raises(ResourceError, match="far: "):
        preflight(loaded, known[1], Extent(force=True))


def test_a_file_system_without_room_is_left_to_what_writes_there(
    known: tuple[LoadedRecipe, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0, total=0))
    assert preflight(*known) == []


def test_memory_too_small_is_refused_and_memory_in_use_is_named(
    known: tuple[LoadedRecipe, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, predicted = known
    machine(monkeypatch, free=predicted.ram - 1)
    (remark,) = preflight(loaded, predicted)
    assert "of memory are free" in remark and predicted.worst("ram") in remark
    machine(monkeypatch, ram=predicted.ram - 1)
    with pytest.raises(ResourceError, match=r"of memory are needed in stage .*, this machine has") as caught:
        preflight(loaded, predicted)
    assert "--no-preflight" in str(caught.value.hint)
    # who sets a budget says himself what may be taken
    budget = load_recipe("quickstart", [*loaded.overrides, "+host.ram=64GB"])
    assert all("are needed" in line for line in preflight(budget, plan(budget, config_of(budget))))


def test_runs_at_the_same_time_need_the_memory_of_all_of_them(
    known: tuple[LoadedRecipe, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, predicted = known
    runs = [(loaded, predicted, config_of(loaded))] * 3
    machine(monkeypatch, ram=3 * predicted.ram, free=3 * predicted.ram)
    assert module.require_memory_together(runs, 8) == []
    machine(monkeypatch, ram=3 * predicted.ram, free=3 * predicted.ram - 1)
    (remark,) = module.require_memory_together(runs, 8)
    assert "--jobs 8: 3 runs at the same time" in remark and "are free" in remark
    machine(monkeypatch, ram=3 * predicted.ram - 1)
    assert module.require_memory_together(runs, 2) == module.require_memory_together(runs[:2], 8) == []
    with pytest.raises(ResourceError, match=r"3 runs at the same time .* this machine has") as caught:
        module.require_memory_together(runs, 8)
    assert caught.value.hint == "--jobs 2"
    # one after the other is asked for by each of them
    machine(monkeypatch, ram=1)
    assert module.require_memory_together(runs, 1) == module.require_memory_together(runs[:1], 8) == []


def test_only_stages_that_will_run_need_room(known: tuple[LoadedRecipe, Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, predicted = known
    ram, worst = {stage.name: stage.ram for stage in predicted.stages}, predicted.worst("ram")
    first = next(iter(ram))
    assert worst != first
    machine(monkeypatch, ram=ram[first], free=ram[first])
    assert preflight(loaded, predicted, Extent(until=first)) == []
    with pytest.raises(ResourceError, match=f"in stage {worst}"):
        preflight(loaded, predicted, Extent(only=worst))
    # `plan` says the same of the whole, and refuses nothing
    (line,) = shortfalls(loaded, predicted)
    assert f"in stage {worst}, this machine has" in line
    written = {stage.name: stage.disk for stage in predicted.stages}
    machine(monkeypatch, disk=written["quantize"] - 1)
    assert preflight(loaded, predicted, Extent(only="prune")) == []
    with pytest.raises(ResourceError, match="still to be written"):
        preflight(loaded, predicted, Extent(only="quantize"))


def test_what_is_finished_is_not_asked_for_again(
    known: tuple[LoadedRecipe, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text read where there is a network, then a resume where there is none."""
    machine(monkeypatch)
    monkeypatch.setattr(hub, "out_of_reach", lambda names: dict.fromkeys(names, "the line is cut"))
    words = [*known[0].overrides, "stages.calibrate.source={kind: hub, id: nobody/nothing}"]
    loaded = load_recipe("quickstart", words)
    with pytest.raises(InputError, match="nobody/nothing"):
        preflight(loaded, known[1])
    with monkeypatch.context() as untouched:
        # where nothing has begun no text is read
        untouched.setattr(module, "inputs_of", lambda _: pytest.fail("a text was read"))
        assert Extent().pending(loaded) == list(loaded.recipe.stages)
    folder = RunDir(Path(loaded.recipe.run.dir))
    for stage in loaded.stages()[:2]:
        folder.write_stage(StageRecord(stage.name, stage.config.type, "finished", "", inputs_of(stage), []))
    assert Extent().pending(loaded) == ["quantize", "prune", "evaluate", "export"]
    assert Extent(until="quantize").pending(loaded) == ["quantize"]
    assert preflight(loaded, known[1]) == []
    for extent in (Extent(redo="calibrate"), Extent(force=True)):
        with pytest.raises(InputError, match="nobody/nothing"):
            preflight(loaded, known[1], extent)
    # other settings are another stage
    changed = load_recipe("quickstart", [*words, "stages.calibrate.samples=64"])
    with pytest.raises(InputError, match="nobody/nothing"):
        preflight(changed, known[1])


def test_processes_on_one_machine_need_the_memory_of_all_of_them(
    known: tuple[LoadedRecipe, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, predicted = known
    config = config_of(loaded)
    together = {n: on_machine(predicted, loaded, config, ["quantize", "evaluate"], n) for n in (1, 2, 4)}
    for stage in range(2):
        alone, two, four = (together[n].stages[stage].ram for n in (1, 2, 4))
        assert alone == next(s.ram for s in predicted.stages if s.name == together[1].stages[stage].name)
        assert alone < two < four
    assert together[2].disk == sum(s.disk for s in predicted.stages if s.name in ("quantize", "evaluate"))
    # those that wait hold their libraries and nothing else
    waiting = together[2].stages[1].ram - together[1].stages[1].ram
    assert waiting == baseline_ram("cpu")
    # each of those that share a stage takes fewer windows
    assert together[2].stages[0].ram < 2 * together[1].stages[0].ram
    machine(monkeypatch, ram=together[2].ram, free=together[2].ram)
    assert preflight(loaded, predicted, Extent(processes=2)) == []
    with pytest.raises(ResourceError) as caught:
        preflight(loaded, predicted, Extent(processes=4))
    assert "--nproc with fewer processes" in str(caught.value.hint)


def test_a_budget_that_makes_it_fit_is_proposed_and_one_that_does_not_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    config = json.loads((Path(__file__).parents[2] / "data/hub_configs/mixtral_8x7b.json").read_text())
    loaded = load_recipe("eac_moe_mixtral", ["run.device=cpu", "stages.evaluate~"], allow_missing=True)
    for ram, proposed in ((20 * GB, "host.ram=18GB ("), (2 * GB, None)):
        monkeypatch.setattr(memory_limits, "total_ram", lambda ram=ram: ram)
        predicted = plan(loaded, config)
        assert predicted.ram > ram
        found = [line for line in predicted.suggest("host.ram") if line.startswith("host.ram=")]
        assert len(found) == (proposed is not None)
        assert all(line.startswith(str(proposed)) for line in found)


@pytest.mark.parametrize(("free", "total", "outcome"), [(90, 90, "fits"), (10, 90, "remark"), (10, 20, "error")])
def test_a_gpu_is_asked_for_its_memory(
    known: tuple[LoadedRecipe, Plan], monkeypatch: pytest.MonkeyPatch, free: int, total: int, outcome: str
) -> None:
    import torch

    predicted = dataclasses.replace(
        known[1],
        device="cuda",
        vram=50 * GB,
        stages=tuple(dataclasses.replace(s, vram=50 * GB) for s in known[1].stages),
    )
    machine(monkeypatch)
    monkeypatch.setattr(module, "resolve_device", lambda _: "cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free * GB, total * GB))
    if outcome == "error":
        with pytest.raises(ResourceError, match=r"50 GB of GPU memory are needed .* the GPU has 20 GB"):
            preflight(known[0], predicted)
    else:
        assert len(preflight(known[0], predicted)) == (outcome == "remark")


def test_data_of_the_hub_is_missed_at_once_where_nobody_can_fetch_it(
    known: tuple[LoadedRecipe, Plan], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import datasets
    import huggingface_hub.constants as constants

    machine(monkeypatch)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    words = [
        "stages.evaluate.perplexity.heldout.source={kind: hub, id: nobody/nothing}", "stages.evaluate.tasks=[arc_easy]",
        "stages.evaluate.fidelity.source={kind: hub, id: nobody/nothing}",
    ]  # fmt: skip
    loaded = load_recipe("quickstart", [*known[0].overrides, *words])
    monkeypatch.setattr(hub, "hub_silence", lambda: "the line is cut")
    with pytest.raises(InputError) as caught:
        preflight(loaded, known[1])
    assert caught.value.message.splitlines() == [
        "stages.evaluate.perplexity.heldout.source, stages.evaluate.fidelity.source: hub nobody/nothing",
        "stages.evaluate: task arc_easy: data set allenai/ai2_arc",
        "not in the cache of datasets, and the line is cut",
    ]
    for override in ("stages.evaluate.fidelity.source=FILE", "stages.evaluate.tasks_dir=FOLDER"):
        assert override in str(caught.value.hint)
    # in a cache, or with a hub that answers, it may be had
    (tmp_path / "cache" / "nobody___nothing").mkdir(parents=True)
    (tmp_path / "hub" / "datasets--allenai--ai2_arc").mkdir(parents=True)
    assert preflight(loaded, known[1]) == []
    shutil.rmtree(tmp_path / "cache")
    # stages that will not run are asked for nothing
    assert preflight(loaded, known[1], Extent(until="quantize")) == []
    assert preflight(loaded, known[1], Extent(only="export")) == []
    with pytest.raises(InputError, match="nobody/nothing"):
        preflight(loaded, known[1], Extent(only="evaluate"))
    monkeypatch.setattr(hub, "hub_silence", lambda: None)
    assert preflight(loaded, known[1]) == []


def test_every_place_that_names_the_hub_is_found() -> None:
    data: Any = {"a": {"source": [{"kind": "hub", "id": "x/y"}, {"kind": "text", "path": "z"}]}, "b": {"kind": "hub"}}
    assert dict(hub_sources(data, "stages")) == {"stages.a.source.0": "x/y"}


FAMILY = """
version: 1
name: family
model: {{path: {folder}/base}}
run: {{dir: {folder}/run, device: cpu}}
stages:
  load: {{type: load}}
  rqt:
    type: rqt
    members: {{ant: {folder}/ant, bee: {folder}/bee, cat: {folder}/run/cat}}
    calibration: {{samples: 2, length: 16, general: {{kind: inline, texts: [some text]}}}}
    group_size: 16
  export_family: {{type: export_family}}
"""


def save_llama(folder: Path, width: int = 48, context: int = 2048) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=width,
        max_position_embeddings=context,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder / "model.safetensors"


def test_texts_of_no_member_and_windows_too_long_for_one_are_missed_before_any_work(tmp_path: Path) -> None:
    for name, context in (("base", 2048), ("ant", 2048), ("bee", 32)):
        save_llama(tmp_path / name, context=context)
    text = "{source: {kind: inline, texts: [some text]}, length: %d}"

    def require(section: str) -> None:
        stage = f"  evaluate_family: {{type: evaluate_family, {section}}}\n"
        (tmp_path / "recipe.yaml").write_text(FAMILY.format(folder=tmp_path) + stage)
        loaded = load_recipe(tmp_path / "recipe.yaml")
        require_companions(loaded, loaded.recipe.stages)

    long, short = text % 64, text % 32
    require(f"general: {short}, texts: {{ant: {long}, cat: {long}}}")
    with pytest.raises(InputError, match="length of bee's text is 64, but bee was built for 32 positions"):
        require(f"general: {long}")
    with pytest.raises(RecipeError, match=r"stages\.evaluate_family\.texts\.cow: no such member") as caught:
        require(f"texts: {{cow: {short}}}")
    assert caught.value.hint == "members: ant, bee, cat"


def test_a_damaged_member_of_a_family_is_missed_before_any_work(tmp_path: Path) -> None:
    def save(name: str, width: int = 48) -> Path:
        return save_llama(tmp_path / name, width)

    save("base")
    bee = [save(name) for name in ("ant", "bee")][1]
    (tmp_path / "recipe.yaml").write_text(FAMILY.format(folder=tmp_path))
    loaded = load_recipe(tmp_path / "recipe.yaml")
    # the member in the run folder is not there yet
    require_companions(loaded, ["load", "rqt"])
    save("ant", 64)
    bee.write_bytes(bee.read_bytes()[:-8])
    with pytest.raises(InputError) as caught:
        preflight(loaded, plan(loaded, config_of(loaded)))
    assert "ant (" in caught.value.message and "has shape (64, 32)" in caught.value.message
    assert "bee: " in caught.value.message and str(bee) in caught.value.message
    for stage in loaded.stages()[:2]:
        folder = RunDir(Path(loaded.recipe.run.dir))
        folder.write_stage(StageRecord(stage.name, stage.config.type, "finished", "", inputs_of(stage), []))
    assert Extent().pending(loaded) == ["export_family"]
    with pytest.raises(InputError, match="bee: "):
        preflight(loaded, plan(loaded, config_of(loaded)))
    # stages that are not reached are asked for nothing, those that are finished read their members again
    require_companions(loaded, Extent(until="load").reached(loaded))
    assert Extent(only="export_family").reached(loaded) == ["load", "rqt", "export_family"]
    shutil.rmtree(tmp_path / "ant")
    with pytest.raises(InputError, match="bee: "):
        require_companions(loaded, ["rqt"])


@pytest.mark.parametrize(
    ("task", "said"), [({"checker": "nobody"}, "no checker 'nobody'"), ({"math": True}, "math-verify is not installed")]
)
def test_what_compares_answers_is_missed_before_any_work(
    task: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from llmcompress.data.problems import mathematics
    from llmcompress.data.problems.config import FileTask
    from llmcompress.stages.s2r.init import S2RInit

    monkeypatch.setattr(mathematics, "find_spec", lambda _: None)

    def loaded(**words: Any) -> Any:
        config = SimpleNamespace(task=FileTask(kind="file", path="problems.jsonl", **words))
        run = SimpleNamespace(dir=str(tmp_path))
        return SimpleNamespace(recipe=SimpleNamespace(run=run), stages=lambda: [S2RInit("warm_up", config)])

    require_companions(loaded(), ["warm_up"])
    require_companions(loaded(**task), ["load"])
    with pytest.raises(EnvironmentProblem, match=said):
        require_companions(loaded(**task), ["warm_up"])


def test_an_engine_that_is_not_installed_is_missed_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_recipe("smoke/s2r_trl")
    monkeypatch.setattr(module, "find_spec", lambda _name: object())
    module.require_packages(loaded, list(loaded.recipe.stages))
    monkeypatch.setattr(module, "find_spec", lambda _name: None)
    with pytest.raises(EnvironmentProblem, match=r"stages\.\w+\.engine: trl is not installed"):
        module.require_packages(loaded, list(loaded.recipe.stages))
    # what is finished does not need it, and this project's own loops need nothing
    module.require_packages(loaded, [])
    own = load_recipe("smoke/s2r_tiny")
    module.require_packages(own, list(own.recipe.stages))


@pytest.mark.parametrize("stage", ["calibrate", "evaluate"])
def test_a_row_without_the_field_is_missed_before_any_work(tmp_path: Path, stage: str) -> None:
    path = tmp_path / "rows.jsonl"
    named = {"calibrate": "stages.calibrate.source", "evaluate": "stages.evaluate.perplexity.heldout.source"}[stage]
    words = [f"{named}={{kind: jsonl, path: {path}, skip: 1}}", f"run.dir={tmp_path / 'run'}"]
    loaded = load_recipe("smoke/rtn_tiny", words)
    # one that a stage of the run may still write
    module.require_rows(loaded, [stage])
    path.write_text('{"text": "a first row"}\n{"body": "a second"}\n')
    with pytest.raises(InputError, match=r"rows\.jsonl:2: field 'text' is missing"):
        module.require_rows(loaded, [stage])
    module.require_rows(loaded, ["quantize"])
    # a chat is left to the tokenizer, unless no template is asked for
    path.write_text('{"text": "a first row"}\n{"prompt": "who?", "response": "me"}\n')
    module.require_rows(loaded, [stage])
    section = named.removesuffix(".source")
    with pytest.raises(InputError, match="field 'text' is missing, but the row is a chat"):
        module.require_rows(load_recipe("smoke/rtn_tiny", [*words, f"{section}.template=none"]), [stage])
    # fewer rows than are left out are the reader's to judge
    path.write_text('{"text": "a first row"}\n')
    module.require_rows(loaded, [stage])


def test_rows_of_members_are_looked_at_too(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"body": "text"}\n')
    words = ["vars.models=none", f"stages.rqt.members.doyle.calibration={{kind: jsonl, path: {path}}}"]
    loaded = load_recipe("rqt_tiny", words, allow_missing=True)
    with pytest.raises(InputError, match="field 'text' is missing"):
        module.require_rows(loaded, ["rqt"])
