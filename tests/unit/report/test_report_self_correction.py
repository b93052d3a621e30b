"""The section on self-correction: losses beside each other, and retries that repeat what was rejected."""

from llmcompress.report.self_correction import COLUMNS, self_correction_section


def entry(curve=(), **figures):
    return {"stage": "init", "states": {"after": figures} if figures else {}, "curve": list(curve), "texts": [],
            "majority": None}  # fmt: skip


def steps(count, every):
    for step in range(1, count + 1):
        record = {"step": step, "phase": "training", "cross_entropy": float(step), "verdict": 2.0 * step}
        yield {**record, **({"validation": 40.0, "validation_verdict": 60.0} if step % every == 0 else {})}


def test_trained_losses_are_means_between_two_held_out_ones():
    warm = {"step": 1, "phase": "warm-up", "cross_entropy": 1000.0, "verdict": 1000.0}
    (chart,) = self_correction_section([entry([warm, *steps(6, 2)])])["curves"]
    drawn = str(chart["chart"])
    assert chart["what"] == "Cross-entropy of rows in nats a token"
    # steps 3 and 4 of the rows
    assert "trained rows, step 4: 3.5" in drawn and "held-out rows, step 4: 40" in drawn
    assert "their verdicts, step 4: 7" in drawn and "1000" not in drawn and "%" not in drawn


def test_one_measurement_or_none_makes_no_chart():
    for curve in (steps(6, 6), steps(6, 7)):
        assert self_correction_section([entry(curve)])["curves"] == []


def test_long_curves_are_thinned():
    (chart,) = self_correction_section([entry(steps(400, 2))])["curves"]
    assert str(chart["chart"]).count("<polyline") == 8
    assert "step 400" not in str(chart["chart"]), "no more points than a screen can show"


def test_retries_that_repeat_have_a_column():
    row = self_correction_section([entry(accuracy=0.5, repeated_retries=0.484)])["rows"][0]["cells"]
    assert dict(zip([name for name, _ in COLUMNS], row))["repeated_retries"] == "48.4\u00a0%"
