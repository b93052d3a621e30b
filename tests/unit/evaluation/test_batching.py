from __future__ import annotations

from llmcompress.evaluation.batching import LOGIT_BYTES, automatic_batch


def test_logits_stay_within_the_bound_but_one_window_always_goes():
    for length, vocabulary in [(128, 1000), (2048, 32000), (512, 50000)]:
        batch = automatic_batch(length, vocabulary)
        assert batch == 32 or batch * length * vocabulary * 4 <= LOGIT_BYTES < (batch + 1) * length * vocabulary * 4
    assert automatic_batch(8192, 250_000) == 1
