from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from llmcompress.report.build import (
    build_report,
    kind_of,
    page_context,
    result_row,
)
from llmcompress.report.data import MetricRow, collect
from llmcompress.report.number_text import bytes_text, metric_text, seconds_text

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Balanced(HTMLParser):
    """Fails on tags that are not closed, and notes what the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.loads: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.stack.append(tag)
        self.loads += [str(v) for k, v in attrs if k in ("src", "href") and v and not v.startswith("#")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.stack, f"</{tag}> without a start"
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def page(run_dir: Path) -> tuple[str, Balanced]:
    source = build_report(run_dir).read_text(encoding="utf-8")
    parser = Balanced()
    parser.feed(source)
    assert parser.stack == []
    return source, parser


def test_the_page_is_complete_and_self_contained(run_dir: Path) -> None:
    source, parser = page(run_dir)
    assert parser.loads == []
    assert "http" not in re.sub(r"<pre.*?</pre>", "", source, flags=re.DOTALL)
    for heading in (
        "Results", "Quality gates", "Bits and bytes", "Error per layer", "Expert selection", "Tokens per expert",
        "Expert shift", "Expert shift on held-out text",
        "Cost of the shift", "Expert skipping", "Samples", "Time and memory", "Recipe and versions",
    ):  # fmt: skip
        assert heading in parser.text, heading
    assert "4.45\u00a0MB instead of 29.9\u00a0MB, 6.7 times smaller" in " ".join(parser.text)
    assert "1 expert saw no token at all (outlined)." in source
    assert "lower in 11 of 12 layers" in source
    assert "Written by the native engine: samples (compressed), gsm8k (compressed)." in parser.text
    assert "Written by transformers: the model is on <cuda>: samples (dense)." in parser.text


def test_text_from_models_cannot_break_out(run_dir: Path) -> None:
    source, parser = page(run_dir)
    assert "<script>alert(1)" not in source
    assert "Tags <b>stay</b> text & <script>alert(1)</script>" in parser.text


@pytest.mark.parametrize(
    "missing",
    [
        "recipe.lock.json",
        "events.jsonl",
        "stages",
        "stages/quantize",
        "stages/evaluate",
        "stages/evaluate/metrics.json",
    ],
)
def test_any_part_may_be_missing(run_dir: Path, missing: str) -> None:
    path = run_dir / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page(run_dir)


def test_an_empty_folder_gives_a_page_that_says_so(tmp_path: Path) -> None:
    source, _ = page(tmp_path)
    assert "no finished stage yet" in source


def test_the_same_run_gives_the_same_page(run_dir: Path) -> None:
    first = build_report(run_dir).read_bytes()
    assert build_report(run_dir).read_bytes() == first


def test_forced_routing_is_a_square_with_its_costs(run_dir: Path) -> None:
    (table,) = page_context(collect(run_dir))["forced"]
    assert table["cells"] == [["24.118", "24.900"], ["25.300", "25.961"]]
    assert "changed choices alone +3.24\u00a0%" in table["costs"]


def test_skipping_figures_stand_on_their_own(run_dir: Path) -> None:
    (section,) = page_context(collect(run_dir))["pesf"]
    assert [(bar["label"], bar["value"]) for bar in section["bars"]] == [
        ("Experts skipped", "34\u00a0%"), ("Routing slots dropped", "6.2\u00a0%"), ("Prefill time saved", "8.1\u00a0%"),
    ]  # fmt: skip
    assert ("heldout perplexity", "25.961 with, 25.700 without") in section["rest"]


def test_time_lost_is_not_called_saved(run_dir: Path) -> None:
    path = run_dir / "stages" / "evaluate" / "pesf.json"
    path.write_text(path.read_text().replace('"seconds_with": 7.9', '"seconds_with": 9.46'))
    bar = page_context(collect(run_dir))["pesf"][0]["bars"][2]
    assert (bar["value"], bar["width"]) == ("−10\u00a0%", 0.0)


def test_a_failed_gate_is_named(run_dir: Path) -> None:
    path = run_dir / "stages" / "evaluate" / "gates.json"
    path.write_text(path.read_text().replace("true", "false"))
    source, _ = page(run_dir)
    assert '<span class="failed">failed</span>' in source


def test_shift_figures_are_means_over_layers(run_dir: Path) -> None:
    data = collect(run_dir)
    section = page_context(data)["layers"][0]["shift"]
    blocks = data.stages[2].blocks
    mean = sum(b.router["before"]["cr_any"] for b in blocks) / len(blocks)
    assert f"{100 * mean:.0f}\u00a0% of tokens chose a different expert before" in section["summary"]
    assert [row["cells"][-1] for row in section["rows"]].count("no") == 1


def test_differences_have_a_sign_a_unit_and_a_direction() -> None:
    worse = result_row(MetricRow("e", "t", "perplexity", 20.0, 21.0, higher_is_better=False))
    assert (worse["difference"], worse["tone"]) == ("+1 (+5.0\u00a0%)", "worse")
    better = result_row(MetricRow("e", "t", "acc", 0.5, 0.52, higher_is_better=True))
    assert (better["difference"], better["tone"]) == ("+2.0\u00a0pt", "better")
    lost = result_row(MetricRow("e", "t", "acc", 0.5, 0.4, higher_is_better=True))
    assert lost["difference"] == "−10.0\u00a0pt"
    assert result_row(MetricRow("e", "t", "kl", None, 0.1))["difference"] == "–"


def test_a_difference_within_noise_is_called_so_and_has_no_direction() -> None:
    far = result_row(MetricRow("e", "t", "perplexity", 20.0, 21.0, higher_is_better=False, difference_stderr=0.5))
    assert (far["difference_spread"], far["tone"]) == ("± 0.5", "worse")
    near = result_row(MetricRow("e", "t", "perplexity", 20.0, 21.0, higher_is_better=False, difference_stderr=0.6))
    assert (near["difference_spread"], near["tone"]) == ("± 0.6, within noise", "")
    share = result_row(MetricRow("e", "t", "acc", 0.5, 0.52, higher_is_better=True, difference_stderr=0.03))
    assert share["difference_spread"] == "± 3.0\u00a0pt, within noise"
    assert result_row(MetricRow("e", "t", "perplexity", 20.0, 21.0))["difference_spread"] == ""


def test_numbers_are_written_for_people() -> None:
    assert bytes_text(18_970_000_000) == "19\u00a0GB"
    assert bytes_text(950) == "950\u00a0B"
    assert [seconds_text(v) for v in (0.0123, 12.34, 75, 3700)] == ["12 ms", "12.3 s", "1 min 15 s", "1 h 01 min"]
    assert metric_text("perplexity", 24.1184) == "24.118"
    assert metric_text("acc_norm", 0.3711) == "37.1\u00a0%"
    assert metric_text("kl", None) == "–"


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("model.layers.0.self_attn.kv_a_proj_with_mqa", "attention input"),
        ("model.layers.0.self_attn.o_proj", "attention output"),
        ("model.layers.0.mlp.experts.gate_up_proj", "experts gate and up"),
        ("model.layers.0.mlp.shared_experts.down_proj", "shared experts"),
        ("model.layers.0.mlp.down_proj", "MLP down"),
        ("model.layers.0.mlp.up_proj", "MLP gate and up"),
    ],
)
def test_weights_are_grouped_by_what_they_do(name: str, label: str) -> None:
    assert kind_of(name)[0] == label
