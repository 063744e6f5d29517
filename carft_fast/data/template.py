"""The text before a completion: the published template, the tokenizer's chat template, or a Jinja template of the
user's, around the messages of a conversation that ends with a question."""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from carft_fast.core import InputError, first_line
from carft_fast.data.chat import LONGEST, RENDERER, TOGETHER, Chat
from carft_fast.rewards import REASONING_TRIGGER

_PUBLISHED = {"system": "{}\n\n", "user": "Question:\n{}" + REASONING_TRIGGER, "assistant": "{}\n\n"}
_QUESTION, _ANSWER = "Three and four?", "Seven."
_SHOWN = 60


class Template:
    """`template` and `variables` are data.template and data.chat_template_kwargs.

    Raises InputError for a template that cannot be read, fails, drops the question, or leaves a prompt in the middle of
    a turn. Without a tokenizer there are no special tokens, and no chat template.
    """

    def __init__(self, tokenizer: Any | None, template: str, variables: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._variables = {**(tokenizer.special_tokens_map if tokenizer is not None else {}), **variables}
        added = tokenizer.added_tokens_decoder.items() if tokenizer is not None else ()
        self.special = {token_id: str(token) for token_id, token in added if token.special}
        shown = template if len(template) <= _SHOWN else f"{template[:_SHOWN]}..."
        self._name = f"data.template = {json.dumps(shown, ensure_ascii=False)}: the template"
        self._allowed = "it has to show {{ question }}, or the last of `messages`, and to begin the assistant's turn"
        self._source: str | None = None
        self.is_chat = template == "chat"
        self.end_id: int | None = None
        """The special token with which the template ends an assistant's turn; None where it has none."""
        if self.is_chat:
            self._name = 'data.template = "chat": the tokenizer\'s chat template'
            self._allowed = 'allowed: "carft", or a template of your own'
            if tokenizer is None or not tokenizer.chat_template:
                raise InputError('data.template = "chat": the tokenizer has no chat template; allowed here: "carft"')
            self._source = tokenizer.get_chat_template()
        elif template != "carft":
            self._source = _read(template, shown)
        if self._source is not None:
            if unread := [name for name in variables if name not in self._source]:
                raise InputError(f"data.chat_template_kwargs: {self._name} reads no {unread[0]!r}")
            self._check()

    @property
    def published(self) -> bool:
        """Whether it is "carft", which knows no special tokens."""
        return self._source is None

    def prompts(self, chats: Iterable[Chat]) -> Iterator[str]:
        """In their order; those of Jinja are rendered some at a time."""
        if self._source is None:
            for chat in chats:
                yield "".join(_PUBLISHED[message["role"]].format(message["content"]) for message in chat)
            return
        waiting = iter(chats)
        while some := list(itertools.islice(waiting, TOGETHER)):
            yield from self._render(*some, begin_answer=True)

    def _render(self, *chats: Chat, begin_answer: bool = False) -> list[str]:
        assert self._source is not None
        try:  # as tokenizer.apply_chat_template does
            return RENDERER.render(self._source, chats, {**self._variables, "add_generation_prompt": begin_answer})
        except ValueError as error:
            raise InputError(f"{self._name} fails: {first_line(error)}; {self._allowed}") from None

    def refuse(self, what: str) -> InputError:
        return InputError(f"{self._name} {what}; {self._allowed}")

    def _check(self) -> None:
        asked = {"role": "user", "content": _QUESTION}
        closed, answered = self._render([asked], [asked, {"role": "assistant", "content": _ANSWER}])
        [prompt] = self._render([asked], begin_answer=True)
        for text in (prompt, answered):
            if _QUESTION not in text:
                raise self.refuse(f"does not show the question: of {_QUESTION!r} it makes {text[:80]!r}")
        before, _, after = prompt.rpartition(_QUESTION)
        head, answer_shown, end = answered.rpartition(_ANSWER)  # a template may know no assistant
        between = head.rpartition(_QUESTION)[2].rstrip() if answer_shown else ""
        if closed == prompt and len(between) > len(after.rstrip()) and between.startswith(after.rstrip()):
            raise self.refuse(f"begins no answer: a prompt ends with {prompt[-40:]!r}, before an answer is {between!r}")
        if not after:
            raise self.refuse(f"ends with the question, in the middle of a turn: it makes {prompt[-40:]!r}")
        if self._tokenizer is None:
            return
        opened, tail = self._special_ids(before), self._special_ids(after.rstrip())
        ending = self._special_ids(end) if answer_shown else []
        self.end_id = ending[0] if ending else None
        if not tail and set(opened) - {self._tokenizer.bos_token_id}:
            raise self.refuse(f"ends in the middle of the question's turn: a prompt ends with {prompt[-40:]!r}")
        ends = [self.special[i] for i in (self.end_id, self._tokenizer.eos_token_id) if i in self.special]
        if after.rstrip().endswith(tuple(ends)):
            raise self.refuse(f"begins no answer: a prompt ends with {prompt[-40:]!r}")

    def _special_ids(self, text: str) -> list[int]:
        tokenizer: Any = self._tokenizer
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return [token_id for token_id in ids if token_id in self.special and token_id != tokenizer.unk_token_id]


def _read(template: str, shown: str) -> str:
    """The Jinja template: as it is, or from its file."""
    if "{{" in template or "{%" in template:
        return template
    try:
        text = Path(template).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a null byte in the path
        reason = "no such file" if isinstance(error, FileNotFoundError) else first_line(error)
        raise InputError(
            f'data.template = "{shown}": {reason}; allowed: "carft", "chat", a Jinja template such as '
            '"Q: {{ question }} A:", or the file of one'
        ) from None
    if len(text) > LONGEST:
        raise InputError(f'data.template = "{shown}": {len(text):,} characters; allowed: at most {LONGEST:,}')
    return text
