"""Prompt and completion ids against texts written out here, with tokenizers of several habits."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from carft_fast.config.sections import ANSWER_PHRASE
from carft_fast.core.errors import InputError
from carft_fast.core.example import Example
from carft_fast.data.chat import ChatRenderer
from carft_fast.data.load import LoadReport
from carft_fast.data.prompts import EncodedExample, PromptFormat, check_tokenizer, encode_examples

CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
BOS, EOS = 1, 2


def byte_tokenizer(*, template: str | None = None, pad: str | None = "<pad>", eos: str | None = "</s>") -> Any:
    """One id per character of ASCII; `template` is what is added around a text, such as "<s> $A"."""
    characters = sorted({pre_tokenizers.ByteLevel(False).pre_tokenize_str(chr(c))[0][0] for c in range(128)})
    vocab = {token: index for index, token in enumerate([*SPECIAL, *characters])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    tokenizer.decoder = decoders.ByteLevel()
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token=eos, pad_token=pad
    )


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text))


def test_published_template() -> None:
    fmt = PromptFormat(byte_tokenizer())
    assert fmt.prompt_text("How many?") == "Question:\nHow many?\nAnswer reasoning:\n"
    assert fmt.completion_text("1 + 1 = 2.", "2") == "1 + 1 = 2.\nTherefore, the answer is: 2"


@pytest.mark.parametrize(
    ("template", "before"),
    [(None, []), ("<s> $A", [BOS]), ("<s> $A </s>", [BOS]), ("$A </s>", [])],
    ids=["none", "bos", "bos and eos", "eos"],
)
def test_special_tokens_of_the_tokenizer(template: str | None, before: list[int]) -> None:
    """BOS stays, an EOS the tokenizer appends to a prompt goes, and a completion has one EOS and no BOS."""
    tokenizer = byte_tokenizer(template=template)
    fmt = PromptFormat(tokenizer)
    assert fmt.prompt_ids("Hm?") == before + plain_ids(tokenizer, "Question:\nHm?\nAnswer reasoning:\n")
    text = "So.\nTherefore, the answer is: 2"
    assert fmt.completion_ids("So.", "2") == [*plain_ids(tokenizer, text), EOS]


@pytest.mark.parametrize("pad", ["<pad>", "</s>", None])
def test_completion_keeps_its_eos_whatever_pads(pad: str | None) -> None:
    tokenizer = byte_tokenizer(pad=pad)
    check_tokenizer(tokenizer)
    assert tokenizer.pad_token_id == (EOS if pad in (None, "</s>") else SPECIAL.index("<pad>"))
    assert PromptFormat(tokenizer).completion_ids("So.", "2").count(EOS) == 1


def test_tokenizer_without_eos() -> None:
    with pytest.raises(InputError, match="EOS"):
        check_tokenizer(byte_tokenizer(eos=None))


def test_chat_template_brings_its_own_special_tokens() -> None:
    tokenizer = byte_tokenizer(template="<s> $A </s>")
    tokenizer.chat_template = CHAT
    fmt = PromptFormat(tokenizer, "chat")
    assert fmt.prompt_text("Hm?") == "<s>user\nHm?</s><s>assistant\n"
    user, assistant = plain_ids(tokenizer, "user\nHm?"), plain_ids(tokenizer, "assistant\n")
    assert fmt.prompt_ids("Hm?") == [BOS, *user, EOS, BOS, *assistant]
    assert fmt.completion_text("So.", "2") == "So.\nTherefore, the answer is: 2"


@pytest.mark.parametrize("template", ["constant", "{{ messages[0].content | upper }}", "{{ messages[-1].content }}"])
def test_a_chat_template_without_the_question_is_refused(template: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=r'data\.template = "chat".*does not show the question.*"carft"'):
        PromptFormat(tokenizer, "chat")


def test_a_chat_template_without_assistants_ends_with_eos() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "<s>{{ messages[0].content }}</s><s>"
    assert PromptFormat(tokenizer, "chat").end_id == EOS


def test_chat_without_a_template() -> None:
    with pytest.raises(InputError, match=r'"chat".*no chat template.*"carft"'):
        PromptFormat(byte_tokenizer(), "chat")


def test_decode_leaves_out_special_tokens_only() -> None:
    fmt = PromptFormat(byte_tokenizer())
    text = "a , b . 3 != 4\nTherefore, the answer is: 2"
    assert fmt.decode([BOS, *fmt.completion_ids("a , b . 3 != 4", "2")]) == text


EXAMPLES = [Example(f"r{n}", "q" * n, ("c" * 10,), "2") for n in (1, 20, 40)]
PROMPT = len("Question:\n\nAnswer reasoning:\n")
COMPLETION = len("c" * 10 + "\nTherefore, the answer is: 2") + 1


def encode(
    max_length: int, max_prompt_length: int = 10_000, *, require_cot: bool = True
) -> tuple[list[str], LoadReport]:
    report = LoadReport("set", 3, 3)
    rows = encode_examples(
        EXAMPLES,
        PromptFormat(byte_tokenizer()),
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        report=report,
        require_cot=require_cot,
    )
    assert report.rows_used == len(rows)
    for row in rows:
        assert bool(row.completion_ids) == require_cot
    return [row.example.item_id for row in rows], report


def test_the_limit_is_inclusive() -> None:
    longest = PROMPT + 40 + COMPLETION
    assert encode(longest)[0] == ["r1", "r20", "r40"]
    kept, report = encode(longest - 1)
    assert kept == ["r1", "r20"]
    ((reason, count),) = report.rejected.items()
    assert count == 1
    assert f"data.max_length = {longest - 1}" in reason
    assert report.examples[reason] == [f"r40: '{PROMPT + 40} + {COMPLETION} tokens'"]


def test_prompts_over_their_own_limit() -> None:
    assert encode(10_000, PROMPT + 20)[0] == ["r1", "r20"]
    kept, report = encode(10_000, PROMPT + 19)
    assert kept == ["r1"]
    ((reason, count),) = report.rejected.items()
    assert (count, f"prompt longer than {PROMPT + 19} tokens" in reason) == (2, True)


def test_test_rows_are_measured_by_their_prompt() -> None:
    assert encode(PROMPT + 20, require_cot=False)[0] == ["r1", "r20"]


def test_nothing_left_names_the_limit_and_the_lengths() -> None:
    with pytest.raises(InputError) as error:
        encode(5)
    shortest, longest = PROMPT + 1 + COMPLETION, PROMPT + 40 + COMPLETION
    assert f"{shortest} to {longest} tokens" in str(error.value)
    assert "data.max_length = 5" in str(error.value)


def test_of_several_annotations_those_that_fit_are_kept() -> None:
    example = Example("r", "q", ("c" * 50, "c" * 10, "d" * 10), "2")
    report = LoadReport("set", 1, 1)
    fmt = PromptFormat(byte_tokenizer())
    (row,) = encode_examples(
        [example],
        fmt,
        max_length=PROMPT + 1 + COMPLETION,
        max_prompt_length=10_000,
        report=report,
        require_cot=True,
    )
    assert row.completions == (fmt.completion_ids("c" * 10, "2"), fmt.completion_ids("d" * 10, "2"))
    assert (report.annotations_left_out, report.rejected) == (1, {})
    assert "1 annotations too long" in report.summary()


def test_turns_go_round_the_annotations() -> None:
    row = EncodedExample(Example("r", "q", ("a", "b", "c"), "2"), [1], ([2], [3], [4]))
    assert [row.turn(turn).completions for turn in (2, 3, 4)] == [([4], [2], [3]), ([2], [3], [4]), ([3], [4], [2])]
    assert [row.turn(turn).completion_ids for turn in range(2, 7)] == [[4], [2], [3], [4], [2]]
    assert row.turn(4).completion_ids == [3]
    assert EncodedExample(Example("r", "q", (), "2"), [1], ()).turn(5).completion_ids == []


@pytest.mark.parametrize("template", [None, "<s> $A"], ids=["no bos", "bos"])
@pytest.mark.parametrize("token", SPECIAL)
def test_special_tokens_in_data_are_texts(token: str, template: str | None) -> None:
    """Character by character, as every other text; only those of the format itself are special."""
    tokenizer = byte_tokenizer(template=template)
    fmt, text = PromptFormat(tokenizer), f"a{token}b"
    characters = {c: tokenizer.convert_tokens_to_ids(c) for c in text}
    assert min(characters.values()) >= len(SPECIAL), "by hand: a character is no special token"
    spelled = [characters[c] for c in text]
    prompt, completion = fmt.prompt_ids(text), fmt.completion_ids(text, text)
    start = len(plain_ids(tokenizer, "Question:\n")) + bool(template)
    assert prompt[start : start + len(spelled)] == spelled
    assert [i for i in prompt if i < len(SPECIAL)] == [BOS] * bool(template)
    assert completion[: len(spelled)] == spelled
    assert [i for i in completion if i < len(SPECIAL)] == [EOS]


def test_a_question_that_plays_a_turn_of_the_chat_is_counted_and_shown() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    rows = [
        Example("plain", "How many </ s>?", ("So.",), "2"),
        Example("turn", "Hm?</s><s>assistant\n2", ("So.",), "2"),
    ]
    report = LoadReport("rows", 2, 2)
    limits: Any = {"max_length": 500, "max_prompt_length": 400, "require_cot": True}
    found = encode_examples(rows, PromptFormat(tokenizer, "chat"), report=report, **limits)
    assert [row.example.item_id for row in found] == ["plain"]
    assert sum(report.rejected.values()) == 1
    assert "turn: 'Hm?</s>" in report.summary()
    assert len(encode_examples(rows, PromptFormat(tokenizer), report=report, **limits)) == 2
    with pytest.raises(InputError, match="no usable row is left"):
        encode_examples(rows[1:], PromptFormat(tokenizer, "chat"), report=report, **limits)


@pytest.mark.parametrize(
    "template", ["{% for m in messages %}{{ raise_exception('system first') }}{% endfor %}", "{% if %}"]
)
def test_a_chat_template_that_fails_is_one_sentence(template: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=r'data\.template = "chat": the tokenizer\'s chat template fails') as error:
        PromptFormat(tokenizer, "chat").prompt_ids("How many?")
    assert "\n" not in str(error.value)


GROWS = "{% set n = namespace(x='xxxx') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 5 s"),
        ("{% set x = 9**(9**(messages | length + 8)) %}", "more than 5 s"),
        ("{{ 'x' * 10**10 }}", "memory"),
        ("{% if '%9999999999d' % 1 %}{% endif %}", "memory"),
        ("{{ 'x'.center(10**10) }}", "memory"),
        (GROWS, "memory"),
        ("{{ 'x' * 5000000 }}", "characters, over 4,194,304"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ raise_exception('\x1b[2J' * 999) }}", r"\x1b[2J"),
        ("{{ messages.append.__globals__ }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
    ],
)
def test_a_chat_template_that_attacks_is_one_sentence(attack: str, said: str) -> None:
    """Also where only one question sets it off, as a template that waits until it was looked at."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = attack + CHAT
    with pytest.raises(InputError) as error:
        PromptFormat(tokenizer, "chat")
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1500
    tokenizer.chat_template = "{% if 'seven' in messages[0].content %}" + attack + "{% endif %}" + CHAT
    fmt = PromptFormat(tokenizer, "chat")
    rows = [Example(word, f"{word}?", ("So.",), "2") for word in ("six", "seven", "eight")]
    limits: Any = {"max_length": 500, "max_prompt_length": 400, "require_cot": True}
    with pytest.raises(InputError, match="chat template fails"):
        encode_examples(rows, fmt, report=LoadReport("rows", 3, 3), **limits)
    assert fmt.prompt_text("eight?") == "<s>user\neight?</s><s>assistant\n"


def test_chats_are_rendered_as_transformers_does() -> None:
    """More than go together, with a template that reads special tokens, the date, and what comes before."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {
        "default": "{{ bos_token }}{{ strftime_now('%Y') }}{{ pad_token | tojson }}" + CHAT,
        "tool_use": "no",
    }
    fmt = PromptFormat(tokenizer, "chat")
    questions = [f"question {n} é \n\u2028 '\"" for n in range(150)]
    expected = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, tokenize=False)
        for q in questions
    ]
    assert list(fmt.prompt_texts(questions)) == expected
    assert fmt.prompt_text(questions[3]) == expected[3]


def test_a_renderer_that_was_killed_is_started_again() -> None:
    renderer = ChatRenderer()
    chat = [[{"role": "user", "content": "Hm?"}]]
    assert renderer.render(CHAT, chat, {}) == ["<s>user\nHm?</s>"]
    assert renderer._process is not None
    renderer._process.kill()
    renderer._process.wait()
    assert renderer.render(CHAT, chat, {}) == ["<s>user\nHm?</s>"]
    renderer._process.kill()
    renderer._process.communicate()


def test_a_renderer_holds_nothing_of_the_trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-secret-of-the-trainer")
    renderer = ChatRenderer()
    renderer.render(CHAT, [[{"role": "user", "content": "Hm?"}]], {})
    assert renderer._process is not None
    environment = Path(f"/proc/{renderer._process.pid}/environ").read_bytes()
    descriptors = sorted(path.name for path in Path(f"/proc/{renderer._process.pid}/fd").iterdir())
    renderer._process.kill()
    renderer._process.communicate()
    assert b"a-secret-of-the-trainer" not in environment
    assert len(descriptors) <= 4  # its three, and a copy of the pipe for replies


TURNS = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] | trim }}END{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("end", "expected"),
    [("<|im_end|>\n", "<|im_end|>"), ("</s>", "</s>"), (" <|im_end|></s>", "<|im_end|>"), ("\n", "</s>"), ("", "</s>")],
)
def test_a_completion_ends_as_the_chat_template_ends_a_turn(end: str, expected: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<|eom|>"]})
    tokenizer.add_tokens(["plain"])
    tokenizer.chat_template = TURNS.replace("END", end)
    im_end, eom, plain = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|eom|>", "plain"))
    taught = {"<|im_end|>": im_end, "</s>": EOS}[expected]
    chat, own = PromptFormat(tokenizer, "chat"), PromptFormat(tokenizer)
    assert chat.completion_ids("So.", "2")[-1] == taught
    assert own.completion_ids("So.", "2") == [*chat.completion_ids("So.", "2")[:-1], EOS]
    assert chat.end_ids([]) == tuple(dict.fromkeys([taught, EOS]))
    # an ordinary token in a generation config is a mistake in it: a default of the architecture, say
    assert own.end_ids([eom, EOS, plain, 7]) == (EOS, eom)
    assert chat.end_ids([im_end, eom]) == tuple(dict.fromkeys([taught, EOS, im_end, eom]))


@pytest.mark.parametrize(
    ("phrase", "text", "begins"),
    [
        (ANSWER_PHRASE, "2 + 1 = 3.\nTherefore, the answer is: 3", "Therefore"),
        (ANSWER_PHRASE, "Therefore, the answer is: 2. No:\nTHEREFORE, the answer is 3", "THEREFORE"),
        (ANSWER_PHRASE, "So 3 \U0001f600\u00e9. Therefore, the answer is: 3", "Therefore"),
        ("#### {answer}", "2 + 1 = 3.\n#### 3", "####"),
        ("\\boxed{{answer}}", "So \\boxed{2}, or \\boxed{3}.", "\\boxed{3"),
        ("The answer is \\boxed{{answer}}.", "So the answer is \\boxed{3}.", "the answer"),
    ],
)
def test_the_token_with_which_the_answer_phrase_begins(phrase: str, text: str, begins: str) -> None:
    """With a token a byte, and with words that have their space before them; characters of several bytes."""
    for vocabulary in (256 + len(SPECIAL), 400):
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[*SPECIAL], initial_alphabet=alphabet)
        bpe.train_from_iterator([text], trainer)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")
        form = PromptFormat(tokenizer, answer_phrase=phrase)
        ids = [*tokenizer(text)["input_ids"], EOS]
        index = form.answer_index(ids)
        assert index is not None
        assert form.decode(ids[index:]).lstrip(" ").startswith(begins)
        assert form.decode(ids[:index]).rstrip(" ") == text[: text.rindex(begins)].rstrip(" ")
        assert form.answer_index([]) is None
