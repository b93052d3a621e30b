"""What the stages of S2R ask of a model before they sample from it."""

import pytest

from llmcompress.data.problems.config import CountdownTask
from llmcompress.errors import InputError
from llmcompress.models.handle import ModelHandle
from llmcompress.stages.s2r.config import reader_of
from llmcompress.stages.s2r.rl import S2RRlConfig
from llmcompress.stages.state import RunState


@pytest.mark.parametrize("kind", ["eos_token", "pad_token"])
def test_special_tokens_that_the_model_does_not_have_are_refused(monkeypatch, kind):
    handle = ModelHandle.open("asset:reference_reasoner")
    tokenizer = handle.tokenizer()
    monkeypatch.setattr(ModelHandle, "tokenizer", lambda self: tokenizer)
    task = CountdownTask(kind="countdown", high=15, limit=60, compact=True)
    config = S2RRlConfig(type="s2r_rl", level="outcome", task=task)
    assert reader_of(config, RunState(model=handle), task.build()).end < handle.layout.vocab
    tokenizer.add_tokens([f"<extra {n}>" for n in range(handle.layout.vocab - len(tokenizer))])
    tokenizer.add_special_tokens({kind: "<beyond>"})
    with pytest.raises(InputError, match=rf"with token \d+, but the model knows only {handle.layout.vocab}"):
        reader_of(config, RunState(model=handle), task.build())
