from __future__ import annotations

import pytest
import torch

from llmcompress.errors import InputError
from llmcompress.evaluation.fidelity import compare_logits, fidelity


@pytest.fixture(scope="module")
def models(tiny):
    return tiny.model("mixtral", seed=0), tiny.model("mixtral", seed=1)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, 64, (5, 12), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def test_equals_the_definition(models, tokens):
    dense, other = models
    z_d, z_c = (m(input_ids=tokens).logits.double() for m in models)
    p, q = z_d.log_softmax(-1), z_c.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    centred_d, centred_c = z_d - z_d.mean(-1, keepdim=True), z_c - z_c.mean(-1, keepdim=True)
    result = fidelity(dense, other, tokens, batch=2)
    assert result.tokens == 60
    assert result.kl == pytest.approx(kl.mean().item(), rel=1e-5)
    assert result.kl_p99 == pytest.approx(kl.flatten().sort().values[59].item(), rel=1e-5)
    assert result.top1 == pytest.approx((z_d.argmax(-1) == z_c.argmax(-1)).double().mean().item())
    assert result.logit_error == pytest.approx(((centred_c - centred_d).norm() / centred_d.norm()).item(), rel=1e-5)
    assert result.kl_stderr == pytest.approx((kl.mean(-1).std() / 5**0.5).item(), rel=1e-5)


def test_a_model_agrees_with_itself(models, tokens):
    result = fidelity(models[0], models[0], tokens)
    assert (result.kl, result.top1, result.logit_error) == (0.0, 1.0, 0.0)


def test_batching_changes_nothing(models, tokens):
    one, all_ = (fidelity(*models, tokens, batch=b) for b in (1, 5))
    assert one.kl == pytest.approx(all_.kl, rel=1e-5) and one.top1 == all_.top1


def test_two_windows_have_an_error_and_one_has_none(models, tokens):
    each = [fidelity(*models, tokens[i : i + 1]).kl for i in range(2)]
    assert fidelity(*models, tokens[:2]).kl_stderr == pytest.approx(abs(each[0] - each[1]) / 2, rel=1e-5)
    assert fidelity(*models, tokens[:1]).kl_stderr is None


def test_progress_hears_of_every_batch(models, tokens):
    heard = []
    fidelity(*models, tokens, batch=2, progress=lambda done, total: heard.append((done, total)))
    assert heard[0] == (2, len(tokens)) and heard[-1] == (len(tokens), len(tokens))


def test_a_shift_of_all_logits_is_no_error():
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    row = compare_logits(logits, logits + 3)
    assert row.error_squared < 1e-9 and float(row.kl.max()) < 1e-6 and bool(row.same_top1.all())


def test_nan_is_refused(models, tokens, tiny):
    broken = tiny.model("mixtral")
    broken.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        fidelity(models[0], broken, tokens)
