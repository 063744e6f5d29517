"""Templates, system prompts, solved questions and answer phrases: texts by hand, and by transformers' own rendering."""

import json
from pathlib import Path
from typing import Any

import pytest

from carft_fast.config.toml import load_config
from carft_fast.core.errors import InputError
from carft_fast.core.example import Example
from carft_fast.data.load import LoadReport
from carft_fast.data.prompts import PromptFormat, encode_examples
from carft_fast.rewards.answers import extract_answer
from carft_fast.rewards.grader import Grader
from tests.data.test_prompts import BOS, CHAT, EOS, byte_tokenizer, plain_ids

SHOTS = (Example("a", "One and one?", ("Add.",), "2"), Example("b", "Two and two?", ("Add them.",), "4"))
TURNS = Example("r", "And three?", ("So.",), "3", history=(("user", "Hello."), ("assistant", "Hi.")))
OWN_SYSTEM = Example("r", "And three?", ("So.",), "3", history=(("system", "Be long."), *TURNS.history))


def chat_tokenizer(chat: str = CHAT, **options: Any) -> Any:
    tokenizer = byte_tokenizer(**options)
    tokenizer.chat_template = chat
    return tokenizer


def messages(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


SHOWN = (
    ("user", "One and one?"),
    ("assistant", "Add.\nTherefore, the answer is: 2"),
    ("user", "Two and two?"),
    ("assistant", "Add them.\nTherefore, the answer is: 4"),
)


def test_published_template_with_all_that_may_precede_a_question() -> None:
    fmt = PromptFormat(byte_tokenizer(), system_prompt="Be brief.", few_shot=SHOTS)
    assert fmt.prompt_text(TURNS) == (
        "Be brief.\n\n"
        "Question:\nOne and one?\nAnswer reasoning:\nAdd.\nTherefore, the answer is: 2\n\n"
        "Question:\nTwo and two?\nAnswer reasoning:\nAdd them.\nTherefore, the answer is: 4\n\n"
        "Question:\nHello.\nAnswer reasoning:\nHi.\n\n"
        "Question:\nAnd three?\nAnswer reasoning:\n"
    )
    assert fmt.prompt_text(OWN_SYSTEM).startswith("Be long.\n\nQuestion:\nOne and one?")
    assert fmt.prompt_text("{question}\n").endswith("Question:\n{question}\n\nAnswer reasoning:\n")


def test_chat_template_with_all_that_may_precede_a_question() -> None:
    thinking = CHAT.removesuffix("{% endif %}") + "{% if not thinks %}<think/>{% endif %}{% endif %}"
    tokenizer = chat_tokenizer(thinking)
    fmt = PromptFormat(tokenizer, "chat", system_prompt="Be brief.", few_shot=SHOTS, variables={"thinks": False})
    for example, system in ((TURNS, "Be brief."), (OWN_SYSTEM, "Be long.")):
        chat = messages(("system", system), *SHOWN, *TURNS.history, ("user", "And three?"))
        expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True, thinks=False)
        assert fmt.prompt_ids(example) == list(expected["input_ids"])
        assert fmt.prompt_text(example).endswith("And three?</s><s>assistant\n<think/>")
    assert not PromptFormat(tokenizer, "chat", variables={"thinks": True}).prompt_text("Hm?").endswith("<think/>")


@pytest.mark.parametrize("in_file", [False, True])
def test_own_template(tmp_path: Path, in_file: bool) -> None:
    """A final line break is Jinja's to drop; BOS is the tokenizer's where the template has none."""
    text = "Q: {{ question }}\nA:\n"
    if in_file:
        (tmp_path / "own.jinja").write_text(text)
        text = str(tmp_path / "own.jinja")
    for habit, before in ((None, []), ("<s> $A </s>", [BOS])):
        tokenizer = byte_tokenizer(template=habit)
        fmt = PromptFormat(tokenizer, text)
        assert fmt.prompt_text(TURNS) == "Q: And three?\nA:"
        assert fmt.prompt_ids("Hm?") == [*before, *plain_ids(tokenizer, "Q: Hm?\nA:")]
        assert fmt.completion_ids("So.", "2") == [*plain_ids(tokenizer, "So.\nTherefore, the answer is: 2"), EOS]
        published = PromptFormat(tokenizer, "Question:\n{{ question }}\nAnswer reasoning:\n\n")
        assert published.prompt_ids("Hm?") == PromptFormat(tokenizer).prompt_ids("Hm?")
    written = PromptFormat(byte_tokenizer(template="<s> $A"), "{{ bos_token }}Q: {{ question }} A:")
    assert written.prompt_ids("Hm?").count(BOS) == 1


def test_own_template_reads_messages_and_variables() -> None:
    text = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[{{ name }}]"
    fmt = PromptFormat(byte_tokenizer(), text, system_prompt="Be brief.", variables={"name": "me"})
    assert fmt.prompt_text("Hm?") == "[system] Be brief.\n[user] Hm?\n[me]"


def test_own_template_ends_a_completion_as_its_assistants_end() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    text = CHAT.replace("</s>", "<|im_end|>")
    assert PromptFormat(tokenizer, text).end_ids([]) == (tokenizer.convert_tokens_to_ids("<|im_end|>"), EOS)
    assert PromptFormat(tokenizer, "Q: {{ question }} A:").end_ids([]) == (EOS,)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "typo": ("chta", {}, r'data\.template = "chta": no such file; allowed: "carft", "chat", a Jinja template'),
    "no question": ("Q: {{ messages | length }} A:", {}, "does not show the question"),
    "question alone": ("{{ question }}", {}, "ends with the question, in the middle of a turn"),
    "open turn": ("<|user|>{{ question }} ", {}, "in the middle of the question's turn"),
    "closed turn": ("{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}", {}, "begins no answer"),
    "closed by EOS": ("{{ question }}{{ eos_token }}", {}, "begins no answer"),
    "no header": ("{% for m in messages %}# {{ m.role }}\n{{ m.content }}\n{% endfor %}", {}, "begins no answer"),
    "system": ("Q: {{ question }} A:", {"system_prompt": "Be brief."}, r"does not show data\.system_prompt: 'Be brief"),
    "few shot": ("Q: {{ question }} A:", {"few_shot": SHOTS}, r"does not show data\.few_shot: 'One and one\?'"),
    "variable": ("Q: {{ question }} A:", {"variables": {"thinkin": 1}}, r"chat_template_kwargs.*reads no 'thinkin'"),
    "token": (CHAT, {"system_prompt": "a</s>"}, r"data\.system_prompt has </s>"),
    "fails": ("{{ question }}{{ raise_exception('no') }}", {}, "fails: .*no"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_templates_that_are_refused(case: str) -> None:
    template, options, said = REFUSED[case]
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|end|>"]})
    with pytest.raises(InputError, match=said) as error:
        PromptFormat(tokenizer, template, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "chat",
    [
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        "{% for m in messages %}{% if m.role == 'assistant' %}<s>assistant\n<think>\n\n</think>\n\n{% else %}<s>user\n"
        "{% endif %}{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}",
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content | trim }}\n{% else %}"
        "ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    ],
    ids=["Mistral's way", "Qwen3's way", "Vicuna's way"],
)
def test_templates_that_are_taken(chat: str) -> None:
    assert PromptFormat(chat_tokenizer(chat), "chat").end_id == EOS


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own").write_bytes(b"\xff{{ question }}")
    for path in (tmp_path / "own", tmp_path):
        with pytest.raises(InputError, match=r'data\.template = ".*allowed: "carft", "chat"'):
            PromptFormat(byte_tokenizer(), str(path))


def test_rows_are_left_out_that_a_solved_question_answers_or_that_play_a_turn() -> None:
    rows = [
        SHOTS[0],
        TURNS,
        Example("turn", "Hm?", ("So.",), "3", history=(("user", "a</s>"), ("assistant", "b"))),
    ]
    report = LoadReport("rows", 3, 3)
    fmt = PromptFormat(chat_tokenizer(), "chat", few_shot=SHOTS)
    limits: Any = {"max_length": 900, "max_prompt_length": 800, "require_cot": True}
    [row] = encode_examples(rows, fmt, report=report, **limits)
    assert (row.example, row.prompt) == (TURNS, fmt.prompt_text(TURNS))
    assert report.rejected == {
        "question that data.few_shot answers": 1,
        "question with </s>, which the chat template would take for its own": 1,
    }


PHRASES: dict[str, tuple[str, str]] = {
    r"\boxed{{answer}}": (r"So.\n\boxed{72}", r"First \boxed{5}. So \boxed{72}."),
    "#### {answer}": (r"So.\n#### 72", "#### 5\n72\n####72"),
    "<answer>{answer}</answer>": (r"So.\n<answer>72</answer>", "<answer>5</answer> no: <ANSWER>\n72\n</answer> or 9"),
    r"The final answer is $\boxed{{answer}}$.": (
        r"So.\nThe final answer is $\boxed{72}$.",
        r"\boxed{5} The final answer is $\boxed{72}$. I hope.",
    ),
    "Answer: {answer}": (r"So.\nAnswer: 72", "Therefore, the answer is: 5\nAnswer: 72 apples"),
    "**Answer:** {answer}": (r"So.\n**Answer:** 72", "**Answer:** 72 (of 80)"),
    "": ("So.", "So.\nTherefore, the answer is <72>."),
}


@pytest.mark.parametrize("phrase", PHRASES)
def test_an_answer_phrase_is_taught_and_read(phrase: str) -> None:
    taught, said = PHRASES[phrase]
    fmt = PromptFormat(byte_tokenizer(), answer_phrase=phrase)
    assert fmt.completion_text("So.", "72") == taught.replace(r"\n", "\n")
    for text in (fmt.completion_text("So.", "72"), said) if phrase else (said,):
        assert extract_answer(text, answer_type="numeric", phrase=phrase) == 72
        grader = Grader(load_config(None).reward, answer_phrase=phrase)
        assert grader.grade_alone([text], [Example("", "", (), "72")])[0].correct
    assert extract_answer("So.\nMy guess: 72", answer_type="numeric", phrase=phrase) is None
    assert PromptFormat(byte_tokenizer(), answer_phrase=phrase, program=True).completion_text("So.", "72") == "So."


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["data.answer_phrase=So it is"], r"data\.answer_phrase = 'So it is': expected \{answer\} in it once"),
        (["data.answer_phrase={answer} or {answer}"], "once"),
        ([r'data.answer_phrase="\boxed{{answer}}"'], r"\\b and \\f in double quotes are control characters"),
        (["data.answer_phrase=A: {answer}", "reward.answer_type=program"], 'another reward.answer_type than "program"'),
        (["data.answer_phrase=#### {{answer}}"], "braces around it are a LaTeX command's"),
        ([r"data.answer_phrase=\boxed{answer}"], "braces around it are a LaTeX command's"),
        ([r"data.template=Q: {{ question }}\nA:"], r"\\n is two characters there"),
        (["data.chat_template_kwargs={a=1}"], 'need template = "chat" or a Jinja template, this is "carft"'),
        (
            ["data.template=chat", "data.chat_template_kwargs={a={b=1}}"],
            r"data\.chat_template_kwargs\.a = \{'b': 1\}: expected a boolean, number, text or list of these$",
        ),
        (["data.template=chat", "data.chat_template_kwargs={messages=[]}"], "'messages' is given by the trainer"),
        (["data.template="], r'data\.template = "": string should have at least 1 character'),
    ],
)
def test_settings_that_are_refused(options: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        load_config(None, options)


@pytest.mark.parametrize("phrase", ["{answer}", "{answer} is the answer", "= {answer}0"])
@pytest.mark.parametrize("answer_type", ["numeric", "choice", "latex"])
def test_a_phrase_whose_answer_cannot_be_read_is_refused(phrase: str, answer_type: str) -> None:
    rule = load_config(None, [f"reward.answer_type={answer_type}"]).reward
    with pytest.raises(InputError, match=r"data\.answer_phrase = .*cannot be read; allowed: words before \{answer\}"):
        Grader(rule, answer_phrase=phrase)


def test_solved_questions_come_from_a_file(tmp_path: Path) -> None:
    rows = [{"q": "One and one?", "why": "Add.", "a": 2}, {"q": "Two and two?", "why": "Add them.", "a": 4}]
    (tmp_path / "shots.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = [f"data.few_shot={tmp_path}/shots.jsonl", 'data.fields={question="q", cot="why", answer="a"}']
    fmt = PromptFormat.of(load_config(None, options), byte_tokenizer())
    assert fmt.prompt_text("Hm?") == PromptFormat(byte_tokenizer(), few_shot=SHOTS).prompt_text("Hm?")
    (tmp_path / "shots.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"q": "Hm?", "a": 4}])))
    with pytest.raises(InputError, match=r"every row has to be usable: data\.few_shot = (?s:.*)no annotated reason"):
        PromptFormat.of(load_config(None, options), byte_tokenizer())
