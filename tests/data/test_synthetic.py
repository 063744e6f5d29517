"""The quickstart's task, recomputed from its own text."""

import re
from pathlib import Path

import pytest
import transformers

from carft_fast.data.prompts import PromptFormat
from carft_fast.data.synthetic import GAINS, LOSSES, build_model_config, build_tokenizer, is_step_by_step, make_task
from carft_fast.rewards.answers import extract_answer


@pytest.mark.parametrize("seed", [0, 1])
def test_every_problem_is_right_and_within_its_bounds(seed: int) -> None:
    train, held_out = make_task(seed)
    assert (len(train), len(held_out)) == (3000, 400)
    questions = [example.question for example in train + held_out]
    assert len(set(questions)) == len(questions), "a question twice, or in both halves"
    for example in train + held_out:
        sentences = re.findall(r"(\w+) (\w+) (\d+) \w+\.", example.question)
        value = int(sentences[0][2])
        seen = [value]
        for _, verb, number in sentences[1:]:
            assert 2 <= int(number) <= 9
            assert verb in GAINS + LOSSES
            value += int(number) if verb in GAINS else -int(number)
            seen.append(value)
        assert len(seen) == 4
        assert all(0 <= value <= 20 for value in seen)
        assert example.answer == str(value)
        for left, right in re.findall(r"([\d +-]+) = (\d+)", example.cots[0]):
            assert eval(left) == int(right)
        assert is_step_by_step(example.cots[0]) == (example.cots[0].count("=") == 3)
        assert example.cots[0].count("=") in (1, 3)
    terse = sum(not is_step_by_step(example.cots[0]) for example in train) / len(train)
    assert 0.57 < terse < 0.63


def test_a_seed_fixes_the_task() -> None:
    assert make_task(3) == make_task(3)
    assert make_task(3)[0] != make_task(4)[0]


def test_problems_of_several_lengths() -> None:
    train, held_out = make_task(0, (2, 5))
    lengths = [example.question.count(".") - 1 for example in train]
    share = {steps: lengths.count(steps) / len(lengths) for steps in set(lengths)}
    assert share.keys() == {2, 3, 4, 5}
    assert all(0.2 < found < 0.3 for found in share.values()), share
    for example in train + held_out:
        signs = re.findall(r"[+-]", example.cots[0])
        assert len(signs) == example.question.count(".") - 1
        assert example.answer == re.findall(r"= (\d+)\.", example.cots[0])[-1]


def test_tokenizer_round_trip_after_save_and_load(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert 85 <= len(tokenizer) <= 100
    prompt_format = PromptFormat(tokenizer)
    for example in make_task(5)[1]:
        for text, ids in (
            (prompt_format.prompt_text(example.question), prompt_format.prompt_ids(example.question)),
            (
                prompt_format.completion_text(example.cots[0], example.answer),
                prompt_format.completion_ids(example.cots[0], example.answer),
            ),
        ):
            assert tokenizer.unk_token_id not in ids
            assert prompt_format.decode(ids) == text
        assert extract_answer(prompt_format.decode(ids), answer_type="numeric") == int(example.answer)


def test_the_model_is_the_one_described() -> None:
    config = build_model_config(97)
    model = transformers.LlamaForCausalLM(config)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (64, 2, 4)
    assert model.lm_head.weight is model.model.embed_tokens.weight
