"""From questions to token ids: the prompt, and the completion a model is taught."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from carft_fast.config import ANSWER_PHRASE, ANSWER_SLOT, Config
from carft_fast.core import Example, InputError
from carft_fast.data.chat import Chat
from carft_fast.data.load import LoadReport, load_few_shot
from carft_fast.data.template import Template
from carft_fast.rewards import phrase_start


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """An example with its token ids: the prompt's, and a completion for each annotated CoT, ending with EOS.

    `prompt` is the prompt's text, for people to read.
    """

    example: Example
    prompt_ids: list[int]
    completions: tuple[list[int], ...]
    prompt: str = ""
    prefix_tokens: int = 0
    """First tokens of `completion_ids` that a sampler is given with the prompt (`rollout.prefix`)."""

    @property
    def completion_ids(self) -> list[int]:
        """The completion to learn from, the first of several; empty when there is no annotated CoT."""
        return self.completions[0] if self.completions else []

    def turn(self, turn: int) -> "EncodedExample":
        """The same with another completion first; successive turns go round all of them."""
        if len(self.completions) <= 1:
            return self
        first = turn % len(self.completions)
        return replace(self, completions=self.completions[first:] + self.completions[:first])

    def with_prefix(self, share: float, max_tokens: int) -> "EncodedExample":
        """The same with this share of `completion_ids` as prefix, in whole tokens and at most `max_tokens`."""
        return replace(self, prefix_tokens=min(int(share * len(self.completion_ids)), max_tokens))

    @property
    def prefix_ids(self) -> list[int]:
        return self.completion_ids[: self.prefix_tokens]

    @property
    def sampling_ids(self) -> list[int]:
        """What a sampler goes on from: the prompt, then the prefix."""
        return self.prompt_ids + self.prefix_ids


def check_tokenizer(tokenizer: Any) -> None:
    """A tokenizer needs an EOS. One without padding pads with EOS: masks here come from lengths, never from ids."""
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no EOS token: completions could not end (set eos_token in its config)")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token


class PromptFormat:
    """Text around questions and answers.

    A prompt is the conversation that ends with the question, by the template: a system message, the solved questions of
    `few_shot`, the row's own earlier turns. "carft": `Question:\\n{question}\\nAnswer reasoning:\\n`, the published
    template; "chat": the tokenizer's chat template; else a Jinja template or its file. The completion is
    `{CoT}\\n{answer_phrase}` and what ends it: EOS, or the token with which the template ends an assistant's turn.
    Where the CoT is a `program`, it is all of the completion, for its answer is what it returns. Prompt and completion
    are tokenised apart, so that training sees the boundary sampling sees. A special token that data spells out ("</s>")
    is a text like any other; in a question for a Jinja template, which is one text with it, it cannot be (`refused`).

    Raises InputError for a template that cannot be used (`Template`), or does not show all that is said above.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str = "carft",
        *,
        program: bool = False,
        system_prompt: str = "",
        few_shot: Sequence[Example] = (),
        variables: Mapping[str, Any] | None = None,
        answer_phrase: str = ANSWER_PHRASE,
    ) -> None:
        self._tokenizer = tokenizer
        self._phrase = "" if program else answer_phrase
        self._system = [("system", system_prompt)] if system_prompt else []
        self._shots: list[tuple[str, str]] = []
        for shot in few_shot:
            self._shots += [message for message in shot.history if message[0] != "system"]
            self._shots += [("user", shot.question), ("assistant", self.completion_text(shot.cots[0], shot.answer))]
        self._few_shot = frozenset((shot.history, shot.question) for shot in few_shot)
        self._template = Template(tokenizer, template, variables or {})
        self._check_settings()
        if tokenizer is not None:
            end_id = self._template.end_id
            self.end_id: int = tokenizer.eos_token_id if end_id is None else end_id

    @classmethod
    def of(cls, config: Config, tokenizer: Any | None, template: str | None = None) -> "PromptFormat":
        """As the config says; `template` in place of its own. Reads data.few_shot."""
        data = config.data
        return cls(
            tokenizer,
            template or data.template,
            program=config.reward.answer_type == "program",
            system_prompt=data.system_prompt,
            few_shot=load_few_shot(config),
            variables=data.chat_template_kwargs,
            answer_phrase=data.answer_phrase,
        )

    def _check_settings(self) -> None:
        """The template shows what every prompt is to have, and takes none of it for its own tokens."""
        if self._template.published:
            return
        settings = [("data.system_prompt", text) for _, text in self._system]
        settings += [("data.few_shot", text) for _, text in self._shots]
        prompt = self.prompt_text("Three and four?") if settings else ""
        for name, text in settings:
            if (text.strip().splitlines() or [""])[-1] not in prompt:  # a template may trim, or leave out reasoning
                raise self._template.refuse(f"does not show {name}: {text[:80]!r}")
            if token := self._spelled(text):
                raise InputError(f"{name} has {token} in {text[:80]!r}, which the template would take for its own")

    def end_ids(self, model_eos: Sequence[int]) -> tuple[int, ...]:
        """Ids that end a completion, the one that is taught first. `model_eos`: those of the model's generation config,
        which count where the tokenizer has them as special tokens."""
        others = (i for i in model_eos if i in self._template.special)
        return tuple(dict.fromkeys([self.end_id, self._tokenizer.eos_token_id, *others]))

    def prompt_text(self, asked: Example | str) -> str:
        """The text of an example's prompt; a text is a question without history."""
        [text] = self.prompt_texts([asked])
        return text

    def prompt_texts(self, asked: Iterable[Example | str]) -> Iterator[str]:
        """In their order; a Jinja template renders them some at a time."""
        return self._template.prompts(map(self._chat, asked))

    def _chat(self, asked: Example | str) -> Chat:
        question, history = (asked, ()) if isinstance(asked, str) else (asked.question, asked.history)
        own_system = [message for message in history[:1] if message[0] == "system"]
        messages = [*(own_system or self._system), *self._shots, *history[len(own_system) :], ("user", question)]
        return [{"role": role, "content": content} for role, content in messages]

    def refused(self, example: Example) -> str | None:
        """Why a row cannot be asked: it spells out a token that would end its turn, or begin another; or it is one of
        data.few_shot, which shows its answer."""
        if (example.history, example.question) in self._few_shot:
            return "question that data.few_shot answers"
        if self._template.published:
            return None
        texts = [example.question, *(content for _, content in example.history)]
        token = next(filter(None, map(self._spelled, texts)), None)
        return token and f"question with {token}, which the chat template would take for its own"

    def _spelled(self, text: str) -> str | None:
        return next((token for token in self._template.special.values() if token in text), None)

    def prompt_ids(self, asked: Example | str) -> list[int]:
        """Ids with the tokenizer's own special tokens (BOS), without an EOS it may append."""
        return self.text_ids(self.prompt_text(asked))

    def text_ids(self, prompt_text: str) -> list[int]:
        """The same of one of `prompt_texts`."""
        tokenizer = self._tokenizer
        published, chat = self._template.published, self._template.is_chat
        written = bool(tokenizer.bos_token) and prompt_text.startswith(tokenizer.bos_token)
        special = published or not (chat or written)  # a chat template writes its special tokens itself
        ids = list(tokenizer(prompt_text, add_special_tokens=special, split_special_tokens=published)["input_ids"])
        return ids[:-1] if special and ids[-1:] == [tokenizer.eos_token_id] else ids

    def completion_text(self, cot: str, answer: str) -> str:
        return f"{cot}\n{self._phrase.replace(ANSWER_SLOT, answer)}" if self._phrase else cot

    def completion_ids(self, cot: str, answer: str) -> list[int]:
        text = self.completion_text(cot, answer)
        ids = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [*ids, self.end_id]

    def answer_index(self, ids: Sequence[int]) -> int | None:
        """Of a completion, the token with which its last answer phrase begins; None without one."""
        start = phrase_start(self.decode(ids), self._phrase)
        if start is None:
            return None
        # the most tokens whose text ends where the phrase begins, or before
        return bisect_right(range(len(ids)), start, key=lambda count: len(self.decode(ids[:count]))) - 1

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def shown(self, ids: Sequence[int]) -> str:
        """The text that a model sees, with its special tokens."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)


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
    prompts = prompt_format.prompt_texts(examples)
    for example, prompt in zip(examples, prompts, strict=True):
        prompt_ids = prompt_format.text_ids(prompt)
        cots = example.cots if require_cot else ()
        completions = [prompt_format.completion_ids(cot, example.answer) for cot in cots]
        if on_row is not None:
            on_row()
        limits = {"max_length": max_length, "max_prompt_length": max_prompt_length}
        shortest = min(map(len, completions), default=0)
        totals.append(len(prompt_ids) + shortest)
        if reason := prompt_format.refused(example):
            report.reject(reason, example.item_id, example.question)
            continue
        if reason := too_long(len(prompt_ids), shortest, **limits):
            report.reject(reason, example.item_id, f"{len(prompt_ids)} + {shortest} tokens")
            continue
        fitting = tuple(ids for ids in completions if not too_long(len(prompt_ids), len(ids), **limits))
        report.annotations_left_out += len(completions) - len(fitting)
        encoded.append(EncodedExample(example, prompt_ids, fitting, prompt))
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
