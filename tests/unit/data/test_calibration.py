from __future__ import annotations

import copy

import pytest
import torch

from llmcompress.data.calibration import CalibrationSet, build, overlap
from llmcompress.data.sources import InlineSource, SyntheticSource
from llmcompress.errors import InputError

TEXTS = tuple(f"The cat number {i} sat on the warm stone and looked at the sea." for i in range(40))


def inline(texts=TEXTS):
    return InlineSource(kind="inline", texts=tuple(texts))


def stream(tokenizer, texts):
    ids = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return ids


def test_windows_are_cut_from_documents_joined_by_eos(tiny_tokenizer):
    ids = stream(tiny_tokenizer, TEXTS)
    found = build(inline(), tiny_tokenizer, samples=5, length=16, seed=0)
    windows = {tuple(ids[i : i + 16]) for i in range(0, len(ids) - 15, 16)}
    rows = [tuple(row.tolist()) for row in found.tokens]
    assert found.tokens.shape == (5, 16) and found.tokens.dtype == torch.int64
    assert set(rows) <= windows
    assert found.provenance["windows_available"] == len(ids) // 16


def test_all_windows_taken_means_each_once(tiny_tokenizer):
    # more documents than are tokenized at a time
    texts = [f"{number} {TEXTS[0]}" for number in range(600)]
    ids = stream(tiny_tokenizer, texts)
    count = len(ids) // 16
    found = build(inline(texts), tiny_tokenizer, samples=count, length=16, seed=3)
    expected = sorted(tuple(ids[i * 16 : i * 16 + 16]) for i in range(count))
    assert sorted(tuple(row.tolist()) for row in found.tokens) == expected


def test_seed_decides_and_repeats(tiny_tokenizer):
    first, again = (build(inline(), tiny_tokenizer, 8, 16, seed=1) for _ in range(2))
    other = build(inline(), tiny_tokenizer, 8, 16, seed=2)
    assert first.hash == again.hash and torch.equal(first.tokens, again.tokens)
    assert first.hash != other.hash


def test_windows_come_from_all_of_the_text(tiny_tokenizer):
    found = [build(inline(), tiny_tokenizer, 4, 16, seed).tokens for seed in range(10)]
    # of the first four alone there would be four
    assert len({tuple(row.tolist()) for tokens in found for row in tokens}) > 10


def test_the_largest_token_of_a_model_is_one_that_it_knows(tiny_tokenizer):
    largest = max(stream(tiny_tokenizer, TEXTS))
    assert len(build(inline(), tiny_tokenizer, 1, 8, seed=0, vocabulary=largest + 1).tokens) == 1
    with pytest.raises(InputError, match=f"gives token {largest}, but"):
        build(inline(), tiny_tokenizer, 1, 8, seed=0, vocabulary=largest)


def test_tokens_that_a_tokenizer_sets_around_a_text_are_left_out(tiny_tokenizer):
    from tokenizers.processors import TemplateProcessing

    framing = copy.deepcopy(tiny_tokenizer)
    begin = framing.convert_ids_to_tokens(5)
    framing.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A {begin}", special_tokens=[(begin, 5)]
    )
    assert framing("cat")["input_ids"] == [5, *tiny_tokenizer("cat")["input_ids"], 5]
    assert build(inline(), framing, 4, 16, seed=0).hash == build(inline(), tiny_tokenizer, 4, 16, seed=0).hash


def test_sets_of_equal_tokens_in_other_windows_differ():
    tokens = torch.arange(16)
    assert CalibrationSet.of(tokens.view(2, 8), {}).hash != CalibrationSet.of(tokens.view(4, 4), {}).hash


def test_too_short_text_gives_the_numbers(tiny_tokenizer):
    ids = stream(tiny_tokenizer, TEXTS[:2])
    count = len(ids) // 8
    with pytest.raises(InputError, match=f"{len(ids)} tokens make {count} windows of 8, but samples is 1000"):
        build(inline(TEXTS[:2]), tiny_tokenizer, 1000, 8, seed=0)
    fewer = build(inline(TEXTS[:2]), tiny_tokenizer, 1000, 8, seed=0, allow_fewer=True)
    assert len(fewer.tokens) == count
    with pytest.raises(InputError, match="0 windows"):
        build(inline(TEXTS[:2]), tiny_tokenizer, 1, 10_000, seed=0, allow_fewer=True)


def test_zero_samples_no_tokenizer_and_foreign_tokenizer(tiny_tokenizer):
    with pytest.raises(InputError, match="zero samples"):
        build(inline(), tiny_tokenizer, 0, 8, seed=0)
    with pytest.raises(InputError, match="no tokenizer"):
        build(inline(), None, 1, 8, seed=0)
    with pytest.raises(InputError, match="model knows only 10"):
        build(inline(), tiny_tokenizer, 1, 8, seed=0, vocabulary=10)


def test_synthetic_is_seeded_and_in_range():
    source = SyntheticSource(kind="synthetic")
    first, again = (build(source, None, 4, 8, seed=5, vocabulary=11) for _ in range(2))
    assert torch.equal(first.tokens, again.tokens)
    assert int(first.tokens.min()) >= 0 and int(first.tokens.max()) < 11
    assert not torch.equal(first.tokens, build(source, None, 4, 8, seed=6, vocabulary=11).tokens)
    other = build(SyntheticSource(kind="synthetic", seed=1), None, 4, 8, seed=5, vocabulary=11)
    assert not torch.equal(first.tokens, other.tokens) and other.provenance["seed"] == 6
    with pytest.raises(InputError, match="vocabulary"):
        build(source, None, 4, 8, seed=5)


def test_saving_is_deterministic_and_reads_back(tmp_path, tiny_tokenizer):
    found = build(inline(), tiny_tokenizer, 4, 16, seed=0)
    found.save(tmp_path / "a")
    found.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    back = CalibrationSet.load(tmp_path / "a")
    assert torch.equal(back.tokens, found.tokens)
    assert (back.hash, back.provenance) == (found.hash, found.provenance)


def test_damaged_file_is_refused(tmp_path, tiny_tokenizer):
    build(inline(), tiny_tokenizer, 4, 16, seed=0).save(tmp_path / "a")
    data = bytearray((tmp_path / "a").read_bytes())
    (tmp_path / "cut").write_bytes(data[:-8])
    with pytest.raises(InputError, match="cannot read the calibration set"):
        CalibrationSet.load(tmp_path / "cut")
    data[-8] ^= 1
    (tmp_path / "flipped").write_bytes(data)
    with pytest.raises(InputError, match="do not match their hash"):
        CalibrationSet.load(tmp_path / "flipped")


def brute_overlap(calibration, evaluation, span=32):
    known = {tuple(row[i : i + span].tolist()) for row in calibration for i in range(0, len(row) - span + 1, span)}
    covered = set()
    for r, row in enumerate(evaluation):
        for i in range(len(row) - span + 1):
            if tuple(row[i : i + span].tolist()) in known:
                covered |= {(r, j) for j in range(i, i + span)}
    return len(covered) / evaluation.numel()


@pytest.mark.parametrize("offset", [0, 1, 17, 31])
def test_overlap_equals_brute_force_at_every_alignment(offset):
    generator = torch.Generator().manual_seed(0)
    calibration = torch.randint(0, 50, (3, 96), generator=generator)
    text = torch.randint(0, 50, (200,), generator=generator)
    text[70 + offset : 140 + offset] = calibration[1, 20:90]
    share = overlap(calibration, text)
    assert share == brute_overlap(calibration, text[None])
    assert share > 0.1


def test_no_overlap_and_full_overlap():
    generator = torch.Generator().manual_seed(1)
    calibration = torch.randint(0, 50, (3, 64), generator=generator)
    other = torch.randint(0, 50, (2, 64), generator=generator)
    assert overlap(calibration, other) == 0
    assert overlap(calibration, calibration) == 1
    assert overlap(calibration, other[:, :20]) == 0
    # a single span is enough
    assert overlap(calibration[:, :32], calibration[:, 32:]) == 0
    assert overlap(calibration[:, :32], calibration[:1, :32]) == 1
