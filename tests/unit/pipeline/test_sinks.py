from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from llmcompress.errors import EnvironmentProblem
from llmcompress.events import Event
from llmcompress.pipeline.sinks import (
    BlockClock,
    Fanout,
    JsonlSink,
    PlainSink,
    QuietSink,
    RichSink,
    RunTrackerSink,
    TensorBoardSink,
    duration,
    tracker,
)


def story() -> list[Event]:
    label = {"position": 1, "count": 2, "type": "gptq"}
    events = [
        Event("run_start", "", {"name": "demo", "dir": "runs/demo"}, 0.0),
        Event("stage_start", "quantize", label, 0.0),
    ]
    for index in range(4):
        events.append(Event("block_start", "quantize", {"index": index, "total": 4}, 10.0 * index))
        events.append(Event("block_end", "quantize", {"index": index, "total": 4, "error": 0.5}, 10.0 * index + 9))
    events += [
        Event("metric", "quantize", {"name": "error", "value": 0.123456789}, 40.0),
        Event("warning", "quantize", {"text": "expert 3 saw [no] tokens"}, 40.0),
        Event("stage_end", "quantize", label, 41.0),
        Event("stage_skip", "export", {"position": 2, "count": 2}, 41.0),
        Event("run_end", "", {"status": "finished"}, 41.0),
    ]
    return events


def test_plain_lines_tell_the_story_and_give_an_eta_after_two_blocks() -> None:
    stream = io.StringIO()
    sink = PlainSink(stream)
    for event in story():
        sink(event)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "run demo in runs/demo"
    assert lines[1] == "[1/2] quantize (gptq)"
    assert lines[2] == "  quantize: block 1/4 9.0 s"
    assert lines[3] == "  quantize: block 2/4 9.0 s, about 18 s left"
    assert "  error = 0.12346" in lines
    assert "warning: quantize: expert 3 saw [no] tokens" in lines
    assert "  quantize took 41 s" in lines
    assert "[2/2] export: already done" in lines


def test_rich_display_survives_markup_in_texts() -> None:
    from rich.console import Console

    stream = io.StringIO()
    sink = RichSink(Console(file=stream, force_terminal=True, width=100))
    for event in story():
        sink(event)
    sink.close()
    shown = stream.getvalue()
    assert "expert 3 saw [no] tokens" in shown
    assert "[2/2]" in shown
    assert "block 4/4" in shown


def test_quiet_sink_prints_warnings_only() -> None:
    stream = io.StringIO()
    sink = QuietSink(stream)
    for event in story():
        sink(event)
    assert stream.getvalue() == "warning: quantize: expert 3 saw [no] tokens\n"


def test_jsonl_appends_whole_lines_and_drops_a_cut_one(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    sink = JsonlSink(path)
    sink(Event("note", "load", {"text": "one"}, 1.0))
    # each line is there before the file is closed
    assert len(path.read_text().splitlines()) == 1
    sink.close()
    with path.open("a") as handle:
        handle.write('{"time": 2.0, "ki')
    again = JsonlSink(path)
    again(Event("note", "load", {"text": "two"}, 3.0))
    again.close()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["data"]["text"] for record in records] == ["one", "two"]
    assert records[0] == {"time": 1.0, "kind": "note", "stage": "load", "data": {"text": "one"}}


def test_clock_waits_for_the_second_block() -> None:
    clock = BlockClock()
    clock.start_block(0.0)
    clock.end_block(100.0)
    assert clock.remaining(3) is None
    clock.start_block(100.0)
    clock.end_block(102.0)
    # the first block compiled kernels and does not count
    assert clock.remaining(3) == pytest.approx(6.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.44, "0.4 s"), (12.2, "12 s"), (200, "3 min 20 s"), (3599.7, "1 h 00 min"), (18120, "5 h 02 min")],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_fanout_keeps_order_and_hides_write_errors_only_on_the_way_out() -> None:
    seen: list[str] = []

    class Full:
        def __call__(self, event: Event) -> None:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            seen.append("closed")

    class Last:
        def __call__(self, event: Event) -> None:
            seen.append(event.kind)

        def close(self) -> None:
            raise OSError(28, "No space left on device")

    fan = Fanout([Full(), Last()])
    with pytest.raises(OSError, match="No space"):
        fan(Event("note"))
    assert seen == []
    fan.quietly(Event("run_end"))
    fan.close()
    assert seen == ["run_end", "closed"]


def test_trackers_that_are_missing_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EnvironmentProblem, match="tensorboard") as caught:
        TensorBoardSink(tmp_path)
    assert "llmcompress[track]" in str(caught.value.hint)
    for package in ("trackio", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(EnvironmentProblem, match=f"{package} is not installed") as caught:
            RunTrackerSink(package, tmp_path, "p", "n", {})
        assert "llmcompress[track]" in str(caught.value.hint)
    with pytest.raises(EnvironmentProblem, match="unknown tracker"):
        tracker("mlflow", tmp_path, "n", {})


@pytest.mark.parametrize("package", ["trackio", "wandb"])
def test_trackers_get_numbers_of_metrics_and_blocks(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import types

    logged: list[object] = []
    begun: dict[str, object] = {}
    fake = types.SimpleNamespace(
        init=lambda **kw: (begun.update(kw), logged.append(kw["project"])), log=logged.append, finish=lambda: None
    )
    monkeypatch.setitem(sys.modules, package, fake)
    sink = tracker(package, tmp_path, "demo", {})
    # trackio has a place of its own
    assert begun.get("dir") == (str(tmp_path) if package == "wandb" else None)
    for event in story():
        sink(event)
    sink.close()
    assert logged[0] == "llmcompress"
    assert {"quantize/error": 0.5, "step": 3} in logged
    assert {"quantize/error": 0.123456789} in logged


def test_a_tracker_that_cannot_log_in_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    def refuse(**_: object) -> None:
        raise RuntimeError("api_key not configured (no-tty)\nmore")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=refuse))
    with pytest.raises(
        EnvironmentProblem, match=r"^wandb does not start: api_key not configured \(no-tty\)$"
    ) as caught:
        tracker("wandb", tmp_path, "demo", {})
    assert "WANDB_MODE=offline" in str(caught.value.hint)
