"""From questions to token ids: the prompt, and the completion a model is taught."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from carft_fast.core import Example, InputError, first_line
from carft_fast.data.chat import RENDERER, TOGETHER, Chat
from carft_fast.data.load import LoadReport
from carft_fast.rewards import ANSWER_TRIGGER, REASONING_TRIGGER


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """An example with its token ids: the prompt's, and a completion for each annotated CoT, ending with EOS."""

    example: Example
    prompt_ids: list[int]
    completions: tuple[list[int], ...]

    @property
    def completion_ids(self) -> list[int]:
        """The completion to learn from, the first of several; empty when there is no annotated CoT."""
        return self.completions[0] if self.completions else []

    def turn(self, turn: int) -> "EncodedExample":
        """The same with one completion alone; successive turns go round all of them."""
        if len(self.completions) <= 1:
            return self
        return replace(self, completions=(self.completions[turn % len(self.completions)],))


def check_tokenizer(tokenizer: Any) -> None:
    """A tokenizer needs an EOS. One without padding pads with EOS: masks here come from lengths, never from ids."""
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no EOS token: completions could not end (set eos_token in its config)")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token


class PromptFormat:
    """Text around questions and answers.

    "carft": `Question:\\n{question}\\nAnswer reasoning:\\n`, the published template; "chat": the tokenizer's chat
    template with the question as the user's message. The completion is `{CoT}\\nTherefore, the answer is: {answer}`
    and what ends it: EOS, or the token with which the chat template ends an assistant's turn. Where the CoT is a
    `program`, it is all of the completion, for its answer is what it returns. Prompt and completion are tokenised
    apart, so that training sees the boundary sampling sees. A special token that data spells out ("</s>") is a text
    like any other; in a question for a chat template, which is one text with it, it cannot be (`control`).
    """

    def __init__(self, tokenizer: Any, template: str = "carft", *, program: bool = False) -> None:
        if template == "chat" and not tokenizer.chat_template:
            raise InputError('data.template = "chat": the tokenizer has no chat template; allowed here: "carft"')
        self._tokenizer = tokenizer
        self._template = template
        self._program = program
        added = tokenizer.added_tokens_decoder.items() if tokenizer is not None else ()
        self._special = {token_id: str(token) for token_id, token in added if token.special}
        if tokenizer is not None:
            self.end_id: int = self._turn_end() if template == "chat" else tokenizer.eos_token_id

    def end_ids(self, model_eos: Sequence[int]) -> tuple[int, ...]:
        """Ids that end a completion, the one that is taught first. `model_eos`: those of the model's generation config,
        which count where the tokenizer has them as special tokens."""
        others = (i for i in model_eos if i in self._special)
        return tuple(dict.fromkeys([self.end_id, self._tokenizer.eos_token_id, *others]))

    def _turn_end(self) -> int:
        question, answer = "Three and four?", "Seven."
        [text] = self._render([[{"role": "user", "content": question}, {"role": "assistant", "content": answer}]])
        if question not in text:
            raise InputError(
                f'data.template = "chat": the tokenizer\'s chat template does not show the question: of {question!r} '
                f'it makes {text[:80]!r}; allowed: "carft"'
            )
        _, shown, after_answer = text.rpartition(answer)  # a template may know no assistant
        after = self._tokenizer(after_answer if shown else "", add_special_tokens=False)["input_ids"]
        return next((i for i in after if i in self._special), self._tokenizer.eos_token_id)

    def prompt_text(self, question: str) -> str:
        [text] = self.prompt_texts([question])
        return text

    def prompt_texts(self, questions: Iterable[str]) -> Iterator[str]:
        """In their order; a chat template renders them some at a time."""
        if self._template == "carft":
            yield from (f"Question:\n{question}{REASONING_TRIGGER}" for question in questions)
            return
        waiting = iter(questions)
        while some := list(itertools.islice(waiting, TOGETHER)):
            yield from self._render([[{"role": "user", "content": q}] for q in some], add_generation_prompt=True)

    def _render(self, chats: Sequence[Chat], *, add_generation_prompt: bool = False) -> list[str]:
        tokenizer = self._tokenizer
        variables = {**tokenizer.special_tokens_map, "add_generation_prompt": add_generation_prompt}
        try:  # as tokenizer.apply_chat_template does
            return RENDERER.render(tokenizer.get_chat_template(), chats, variables)
        except ValueError as error:
            raise InputError(
                f'data.template = "chat": the tokenizer\'s chat template fails: {first_line(error)}; allowed: "carft"'
            ) from None

    def control(self, question: str) -> str | None:
        """Why a question cannot be asked: it spells out a token that would end its turn, or begin another."""
        if self._template == "carft":
            return None
        spelled = next((token for token in self._special.values() if token in question), None)
        return spelled and f"question with {spelled}, which the chat template would take for its own"

    def prompt_ids(self, question: str) -> list[int]:
        """Ids with the tokenizer's own special tokens (BOS), without an EOS it may append."""
        return self.text_ids(self.prompt_text(question))

    def text_ids(self, prompt_text: str) -> list[int]:
        """The same of one of `prompt_texts`."""
        # a chat template writes its special tokens itself
        special = self._template == "carft"
        ids = self._tokenizer(prompt_text, add_special_tokens=special, split_special_tokens=special)
        ids = list(ids["input_ids"])
        return ids[:-1] if special and ids[-1:] == [self._tokenizer.eos_token_id] else ids

    def completion_text(self, cot: str, answer: str) -> str:
        return cot if self._program else f"{cot}{ANSWER_TRIGGER}{answer}"

    def completion_ids(self, cot: str, answer: str) -> list[int]:
        text = self.completion_text(cot, answer)
        ids = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [*ids, self.end_id]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def encode_examples(
    examples: Sequence[Example],
    prompt_format: PromptFormat,
    *,
    max_length: int,
    max_prompt_length: int,
    report: LoadReport,
    require_cot: bool,
    on_row: Callable[[], None] | None = None,
) -> list[EncodedExample]:
    """Tokenise; rows with a prompt over `max_prompt_length`, or prompt + annotated completion over `max_length`, are
    counted in `report` and left out; of several annotations those that fit are kept. Raises InputError when no row is
    left."""
    encoded: list[EncodedExample] = []
    totals: list[int] = []
    prompts = prompt_format.prompt_texts(example.question for example in examples)
    for example, prompt in zip(examples, prompts, strict=True):
        prompt_ids = prompt_format.text_ids(prompt)
        cots = example.cots if require_cot else ()
        completions = [prompt_format.completion_ids(cot, example.answer) for cot in cots]
        if on_row is not None:
            on_row()
        limits = {"max_length": max_length, "max_prompt_length": max_prompt_length}
        shortest = min(map(len, completions), default=0)
        totals.append(len(prompt_ids) + shortest)
        if reason := prompt_format.control(example.question):
            report.reject(reason, example.item_id, example.question)
            continue
        if reason := too_long(len(prompt_ids), shortest, **limits):
            report.reject(reason, example.item_id, f"{len(prompt_ids)} + {shortest} tokens")
            continue
        fitting = tuple(ids for ids in completions if not too_long(len(prompt_ids), len(ids), **limits))
        report.annotations_left_out += len(completions) - len(fitting)
        encoded.append(EncodedExample(example, prompt_ids, fitting))
    report.rows_used = len(encoded)
    if not encoded:
        tokens = f"rows have {min(totals)} to {max(totals)} tokens"
        raise InputError(f"no usable row is left: {tokens}\n{report.summary()}")
    return encoded


def too_long(prompt_tokens: int, completion_tokens: int, *, max_length: int, max_prompt_length: int) -> str | None:
    """Why a prompt with this completion is left out; None when it fits."""
    if prompt_tokens > max_prompt_length:
        return f"prompt longer than {max_prompt_length} tokens (data.max_length less the longest completion)"
    if prompt_tokens + completion_tokens > max_length:
        return f"prompt and annotated completion longer than data.max_length = {max_length} tokens"
    return None
