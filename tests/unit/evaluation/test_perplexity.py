from __future__ import annotations

import math

import pytest
import torch

from llmcompress.errors import InputError
from llmcompress.evaluation import perplexity as measured
from llmcompress.evaluation.perplexity import Text, perplexity, token_nll, tokenize, windows


def brute_force(model, tokens, length, stride, keep_tail):
    """Score token by token: for each window that counts, the probability of every new token given its prefix."""
    total, count, done, begin = 0.0, 0, 0, 0
    while True:
        end = min(begin + length, len(tokens))
        short = end - begin < length
        if short and stride == length and begin > 0 and not keep_tail:
            break
        for position in range(begin + 1, end):
            if position >= done:
                logits = model(input_ids=tokens[None, begin:position]).logits[0, -1].double()
                total -= float(logits.log_softmax(-1)[tokens[position]])
                count += 1
        done = end
        if end == len(tokens):
            break
        begin += stride
    return total, count


@pytest.fixture(scope="module")
def model(tiny):
    return tiny.model("mixtral")


@pytest.mark.parametrize("total", [7, 16, 33])
@pytest.mark.parametrize(
    ("length", "stride", "keep_tail"), [(8, 8, False), (8, 8, True), (8, 3, False), (16, 15, False)]
)
@torch.inference_mode()
def test_equals_brute_force(model, total, length, stride, keep_tail):
    tokens = torch.randint(3, 64, (total,), generator=torch.Generator().manual_seed(total))
    nll, count = brute_force(model, tokens, length, stride, keep_tail)
    result = perplexity(model, Text(tokens, None, total), length, stride, keep_tail=keep_tail, batch=2)
    assert result.tokens == count
    assert result.nll == pytest.approx(nll, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nll / count), rel=1e-5)


def test_batch_does_not_matter(model):
    text = Text(torch.randint(3, 64, (100,), generator=torch.Generator().manual_seed(0)), None, 100)
    one, many = (perplexity(model, text, 16, batch=b) for b in (1, 5))
    assert one.perplexity == pytest.approx(many.perplexity, rel=1e-6)
    assert one.windows == many.windows == 6 and one.dropped == 4 and one.tokens == 6 * 15


def test_progress_hears_of_every_batch(model):
    heard = []
    text = Text(torch.randint(3, 64, (50,)), None, 50)
    perplexity(model, text, 8, batch=4, progress=lambda done, total: heard.append((done, total)))
    assert heard == [(4, 6), (6, 6)]


def test_overlapping_windows_score_every_token_but_the_first_once():
    for total in range(2, 60):
        for length in (2, 5, 16):
            for stride in range(1, length):
                scored = [t for w in windows(total, length, stride) for t in range(w.scored, w.end)]
                assert scored == list(range(1, total))


def test_plain_windows_skip_the_first_token_of_each():
    planned = windows(20, 8)
    assert [(w.begin, w.end, w.scored) for w in planned] == [(0, 8, 1), (8, 16, 9)]
    assert windows(20, 8, keep_tail=True)[-1].end == 20
    assert [(w.begin, w.end) for w in windows(5, 8)] == [(0, 5)]
    # a tail of one token has nothing to predict
    assert windows(17, 8, keep_tail=True)[-1].end == 16
    with pytest.raises(ValueError, match="stride"):
        windows(20, 8, 9)


def test_token_nll_is_a_log_softmax():
    logits = torch.randn(1030, 7, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(1030) % 7
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(token_nll(logits, targets), expected)
    assert token_nll(logits.bfloat16(), targets).dtype == torch.float32


def test_bytes_are_counted_exactly_for_multibyte_text(tiny_tokenizer):
    text = "Ünder 東京 — naïve 😀 end"
    found = tokenize(text, tiny_tokenizer)
    assert found.total_bytes == len(text.encode())
    assert int(found.bytes_until[-1]) == len(text.encode())
    assert bool((found.bytes_until.diff() >= 0).all())
    head = found.first(4)
    assert head.total_bytes == len(tiny_tokenizer.decode(found.tokens[:4]).encode())
    assert found.first(None) is found and found.first(10_000) is found


def test_bits_per_byte_uses_the_bytes_of_scored_tokens(model, tiny_tokenizer, tiny):
    model = tiny.model("mixtral", vocab_size=len(tiny_tokenizer))
    text = "The cat sat on the warm stone. " * 8
    found = tokenize(text, tiny_tokenizer)
    result = perplexity(model, found, 1000)
    first = len(tiny_tokenizer.decode(found.tokens[:1]).encode())
    assert result.bytes_exact and result.text_bytes == len(text.encode()) - first
    assert result.bits_per_byte == pytest.approx(result.nll / math.log(2) / result.text_bytes)


def test_stderr_matches_the_spread_of_windows(model):
    text = Text(torch.randint(3, 64, (64,), generator=torch.Generator().manual_seed(1)), None, 64)
    result = perplexity(model, text, 16)
    means = [perplexity(model, Text(text.tokens[i : i + 16], None, 16), 16).nll / 15 for i in range(0, 64, 16)]
    spread = torch.tensor(means, dtype=torch.float64).std().item() / 2
    assert result.stderr == pytest.approx(result.perplexity * spread, rel=1e-4)
    assert result.window_nll == pytest.approx(means)
    assert perplexity(model, text, 64).stderr is None


@torch.inference_mode()
def test_means_by_position_are_those_of_bins_of_the_window(model, monkeypatch):
    monkeypatch.setattr(measured, "POSITION_BIN", 5)
    tokens = torch.randint(3, 64, (3 * 16 + 7,), generator=torch.Generator().manual_seed(1))
    sums, counts = [0.0] * 4, [0] * 4
    for begin in range(0, len(tokens), 16):
        ids = tokens[begin : begin + 16]
        nll = token_nll(model(input_ids=ids[None]).logits[0, :-1], ids[1:])
        for position, value in enumerate(nll.tolist(), 1):
            sums[position // 5] += value
            counts[position // 5] += 1
    assert counts == [16, 17, 15, 3]
    found = perplexity(model, Text(tokens, None, len(tokens)), 16, keep_tail=True)
    assert found.position_nll == pytest.approx([total / count for total, count in zip(sums, counts)], rel=1e-5)
    # the last bin has no token of so short a text
    assert len(perplexity(model, Text(tokens[:15], None, 15), 16).position_nll) == 3


def test_nan_and_short_text_are_refused(tiny, tiny_tokenizer):
    broken = tiny.model("mixtral")
    broken.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        perplexity(broken, Text(torch.arange(3, 20), None, 17), 8)
    with pytest.raises(InputError, match="needs two"):
        tokenize("", tiny_tokenizer)
