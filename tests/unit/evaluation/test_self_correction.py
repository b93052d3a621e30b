"""Reading responses of real tokenizers, the vote at equal tokens, the paired test."""

import math
import random
from itertools import product

import pytest
from transformers import AutoTokenizer

from llmcompress.data.actions import CHECK, CORRECT, INCORRECT, RETRY
from llmcompress.data.problems.base import Problem
from llmcompress.data.problems.countdown import Countdown
from llmcompress.errors import InputError
from llmcompress.evaluation import self_correction
from llmcompress.evaluation.sampling import Sampling
from llmcompress.evaluation.self_correction import Reader, choose, majority, paired_test, verify_given
from llmcompress.models.paths import resolve_path

TASK = Countdown()
PROBLEM = Problem("2,3,4:20", "q", data={"numbers": [2, 3, 4], "target": 20})


@pytest.fixture(scope="module", params=["reference_moe", "reference_reasoner"])
def reader(request):
    return Reader(AutoTokenizer.from_pretrained(resolve_path(f"asset:{request.param}")), TASK)


TEXTS = [
    f"\\boxed{{2+3*4}}{CHECK}no. {INCORRECT}{RETRY}\\boxed{{(2+3)*4}}{CHECK}yes {CORRECT}",
    "x = 1. Wait",
    f"{CHECK}{CORRECT}",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_text_and_actions_cover_the_ids(reader, text):
    ids = reader.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(reader.pieces(ids)) == text
    response = reader.read([*ids, reader.end])
    joined = [i for action in response.actions for i in range(action.start, action.stop)]
    assert joined == list(range(len(ids) + 1))
    assert response.ended


def test_characters_of_several_tokens_stay_whole():
    reader = Reader(AutoTokenizer.from_pretrained(resolve_path("asset:reference_moe")), TASK)
    text = f"∫🙂 ü{CHECK}≠ 🙂 {CORRECT}"
    ids = reader.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert any("\ufffd" in reader.tokenizer.decode([i]) for i in ids), "the case is not worth its name"
    assert "".join(reader.pieces(ids)) == text
    assert reader.read(ids).actions[0].text == "∫🙂 ü"


def test_attempts_are_judged_by_their_own_box_alone(reader):
    ids = reader.tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]
    episode = reader.judge(PROBLEM, [*ids, reader.end])
    assert (episode.right, episode.verdicts, episode.final) == ((False, True), (False, True), True)
    assert not reader.judge(PROBLEM, ids).final, "a response without its end is no answer"


def test_chat_needs_a_template(reader):
    with pytest.raises(InputError, match="no chat template"):
        Reader(reader.tokenizer, TASK, chat=True).prompt("q")
    assert reader.text(reader.prompt("1+1")) == "1+1\n"


def test_choice_of_problems_is_seeded_and_ordered():
    problems = TASK.problems("test")
    one, two = choose(problems, 20, 1), choose(problems, 20, 1)
    assert one == two != choose(problems, 20, 2)
    assert [p.key for p in one] == [p.key for p in problems if p in one]
    assert choose(problems, None, 0) == list(problems)


def test_paired_test_by_hand():
    # 6 won, 1 lost: 2 * (C(7,0) + C(7,1)) / 2**7
    before, after = [False] * 6 + [True] + [True] * 5, [True] * 6 + [False] + [True] * 5
    assert paired_test(before, after) == pytest.approx(2 * (1 + 7) / 2**7)
    assert paired_test(after, after) == 1
    assert paired_test([False] * 10, [True] * 10) == pytest.approx(2 / 2**10)
    assert not math.isnan(paired_test([], []))


def test_answers_to_one_problem_change_places_together():
    rng = random.Random(3)
    for _ in range(20):
        problems = [rng.randrange(5) for _ in range(14)]
        before, after = ([rng.random() < 0.5 for _ in problems] for _ in range(2))
        nets = [sum(a - b for k, b, a in zip(problems, before, after) if k == key) for key in set(problems)]
        totals = [abs(sum(s * n for s, n in zip(signs, nets))) for signs in product((1, -1), repeat=len(nets))]
        expected = sum(total >= abs(sum(nets)) for total in totals) / len(totals)
        assert paired_test(before, after, problems) == pytest.approx(expected)
    # three seeds that agree on every problem say no more than one of them
    once = ([False] * 7 + [True] * 2, [True] * 6 + [False] + [True] * 2)
    thrice = [row * 3 for row in once]
    assert paired_test(*thrice, [*range(9)] * 3) == paired_test(*once)
    assert paired_test(*thrice) < paired_test(*once) / 10
    with pytest.raises(ValueError):
        paired_test(*once, [1, 2])


def test_what_is_written_in_two_ways_has_one_vote(reader, monkeypatch):
    # by text the wrong one wins: two votes, and one for each of three writings of the right answer
    attempts = ["2+3*4", "(2+3)*4", "2+3*4", "4*(3+2)", "(3+2)*4"]
    written = iter(attempts)

    def sampled(model, prompts, *_):
        text = f"\\boxed{{{next(written)}}}"
        return [[*reader.tokenizer(text, add_special_tokens=False)["input_ids"], reader.end] for _ in prompts]

    monkeypatch.setattr(self_correction, "sample", sampled)
    cost = sum(len(reader.tokenizer(f"\\boxed{{{a}}}", add_special_tokens=False)["input_ids"]) for a in attempts)
    assert majority(None, reader, [PROBLEM], Sampling(99, 0.7), budget=cost)["accuracy"] == 1


def test_templates_that_know_no_system_line():
    tokenizer = AutoTokenizer.from_pretrained(resolve_path("asset:reference_moe"))
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    )
    with pytest.raises(InputError, match="System role not supported") as refused:
        Reader(tokenizer, TASK, chat=True).prompt("q")
    assert refused.value.hint == 'system: "" leaves the system line out'
    ids = Reader(tokenizer, TASK, chat=True, system="").prompt("q")
    assert tokenizer.decode(ids) == "[user]q"


def test_a_begin_token_opens_the_prompt_where_the_tokenizer_puts_one():
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(resolve_path("asset:reference_moe"))
    plain = Reader(tokenizer, TASK).prompt("1+1")
    assert plain == tokenizer("1+1\n", add_special_tokens=False)["input_ids"]
    begin, end = tokenizer.bos_token, tokenizer.eos_token
    ids = [(begin, tokenizer.bos_token_id), (end, tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{begin} $A {end}", special_tokens=ids)
    assert Reader(tokenizer, TASK).prompt("1+1") == [tokenizer.bos_token_id, *plain]


def test_the_vote_pays_for_attempts_alone(reader, monkeypatch):
    attempts = ["\\boxed{2+3*4}", "\\boxed{(2+3)*4}", "\\boxed{4*(3+2)}", "\\boxed{(2+3)*4}"]
    cost = [len(reader.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in attempts]
    written = iter(attempts)

    def sampled(model, prompts, *_):
        # what a model writes that was taught to verify: the attempt is a small part of it
        text = f"{next(written)}{CHECK}{'so it is, ' * 20}{CORRECT}"
        return [[*reader.tokenizer(text, add_special_tokens=False)["input_ids"], reader.end] for _ in prompts]

    monkeypatch.setattr(self_correction, "sample", sampled)
    found = majority(None, reader, [PROBLEM], Sampling(99, 0.7), budget=sum(cost[:3]) + 1)
    assert found == {"accuracy": 1, "best_of": 1, "samples": 4, "tokens": sum(cost)}


def test_given_attempts_are_verified_where_responses_verify_theirs(reader, monkeypatch):
    attempts = ["\\boxed{2+3*4}", "\\boxed{(2+3)*4}", "\\boxed{2*3*4}", "\\boxed{2*(3+4)}"]
    written = [
        f"14. {INCORRECT}",
        f"20. {CORRECT}{RETRY}\\boxed{{2}}{CHECK}{INCORRECT}",
        "24",
        f"14, no: {INCORRECT} x",
    ]
    shown = []

    def sample(model, prompts, settings, end, pad, seed):
        shown.extend(prompts)
        assert settings == Sampling(30, temperature=0.0)
        return [reader.tokenizer(text, add_special_tokens=False)["input_ids"] for text in written]

    monkeypatch.setattr(self_correction, "sample", sample)
    said = verify_given(None, reader, [PROBLEM] * 4, attempts, Sampling(30, temperature=0.7))
    # a verification without a verdict has none, and what follows a verdict is not asked
    assert said == [False, True, None, False]
    for attempt, ids in zip(attempts, shown, strict=True):
        whole = reader.tokenizer(f"{attempt}{CHECK}{attempt}", add_special_tokens=False)["input_ids"]
        begun = reader.prompt("q")
        assert ids[: len(begun)] == begun
        assert whole[: len(ids) - len(begun)] == ids[len(begun) :], "other tokens than a response has there"
        assert reader.read(ids[len(begun) :]).actions[-1].text == ""
