"""scripts/smollm2_to_hf.py: the tokenizer it saves cuts numbers as the GGUF says."""

from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts"
BLANK, LINE = "Ġ", "Ċ"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import smollm2_to_hf

    return smollm2_to_hf


@pytest.fixture
def tokenizer():
    """Bytes, and runs of two and three blanks and of two line feeds."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), BLANK * 2, BLANK * 3, LINE * 2]
    merges = [(BLANK, BLANK), (BLANK * 2, BLANK), (LINE, LINE)]
    core = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(tokens)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def test_white_space_in_front_of_a_number_is_not_cut_for_its_sake(script, tokenizer) -> None:
    # llama.cpp gives the same pieces for the GGUF of SmolLM2, whose merges have these
    assert tokenizer.tokenize("   12") == [BLANK * 2, BLANK, "1", "2"]
    script.split_digits(tokenizer)
    assert tokenizer.tokenize("   12") == [BLANK * 3, "1", "2"]
    assert tokenizer.tokenize("a\n\n12") == ["a", LINE * 2, "1", "2"]
    assert tokenizer.tokenize("   a") == [BLANK * 2, BLANK, "a"]
    assert tokenizer.decode(tokenizer("a\n\n12  3")["input_ids"]) == "a\n\n12  3"


@pytest.mark.parametrize("rule", ["smollm", None])
def test_the_rule_is_read_from_the_file(script, tmp_path, rule) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    if rule is not None:
        writer.add_tokenizer_pre(rule)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert script.gguf_pre_tokenizer(tmp_path / "m.gguf") == rule
