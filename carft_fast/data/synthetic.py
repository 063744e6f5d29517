"""The quickstart's task: word problems of three steps, a tokenizer and a tiny model, all from a seed.

Some annotations show only the result of a sum, some go step by step. A small model is poor at the first and good at
the second; supervised training imitates the mixture, reinforcement finds the mode that gets answers right. The lift
is built into the task: it shows that the machinery works, not that RL beats more SFT or CARFT beats ReFT.
"""

import random
import re
from collections.abc import Sequence
from typing import Any

from carft_fast.core import Example

TRAIN_ROWS = 3000
EVAL_ROWS = 400
TERSE_SHARE = 0.6
STEPS = (3, 3)
"""Fewest and most in a problem; each number between is as likely."""
LARGEST = 20
OPERANDS = range(2, 10)

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gwen", "Hugo", "Iris", "Jack", "Kira", "Leo")
ITEMS = ("apples", "books", "coins", "cards", "pens", "shells", "stamps", "stones")
GAINS = ("buys", "finds", "gets", "makes", "picks", "wins")
LOSSES = ("breaks", "drops", "eats", "gives", "loses", "sells")
_SPECIAL = ("<unk>", "<pad>", "<eos>")
_SPACE = "▁"
_TOKEN = rf"{_SPACE}?[A-Za-z]+|{_SPACE}?[0-9]+|\n|{_SPACE}?[^A-Za-z0-9\n{_SPACE}]"
_FIXED_TEXT = (
    "Question:\nAnswer reasoning:\n\nTherefore, the answer is: ",
    "\n".join(NAMES),
    ". How many does has have now? " + " ".join((*NAMES, *ITEMS, *GAINS, *LOSSES)),
    "\n".join(map(str, OPERANDS)) + " " + " ".join(map(str, range(LARGEST + 1))) + " + - =",
)


def make_task(
    seed: int, steps: Sequence[int] = STEPS, train_rows: int = TRAIN_ROWS, eval_rows: int = EVAL_ROWS
) -> tuple[list[Example], list[Example]]:
    """Training rows with annotations and held-out rows, no question in both or twice."""
    rng = random.Random(seed)
    rows: dict[str, Example] = {}
    while len(rows) < train_rows + eval_rows:
        example = _make_problem(rng, f"problem_{len(rows)}", *steps)
        rows.setdefault(example.question, example)
    examples = list(rows.values())
    return examples[:train_rows], examples[train_rows:]


def _make_problem(rng: random.Random, item_id: str, fewest: int, most: int) -> Example:
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    start = value = rng.choice(OPERANDS)
    sentences, terms, equations = [f"{name} has {start} {item}."], str(start), []
    for _ in range(rng.randint(fewest, most) if fewest < most else fewest):
        gains = [n for n in OPERANDS if value + n <= LARGEST]
        losses = [n for n in OPERANDS if value - n >= 0]
        gain = rng.random() < 0.5 if gains and losses else bool(gains)
        operand = rng.choice(gains if gain else losses)
        sign, after = ("+", value + operand) if gain else ("-", value - operand)
        sentences.append(f"{name} {rng.choice(GAINS if gain else LOSSES)} {operand} {item}.")
        equations.append(f"{value} {sign} {operand} = {after}.")
        terms += f" {sign} {operand}"
        value = after
    terse = rng.random() < TERSE_SHARE
    return Example(
        item_id=item_id,
        question=" ".join([*sentences, f"How many {item} does {name} have now?"]),
        cots=(f"{terms} = {value}." if terse else " ".join(equations),),
        answer=str(value),
    )


def is_step_by_step(completion: str) -> bool:
    """More than one equation."""
    return completion.count("=") > 1


def build_tokenizer() -> Any:
    """Words, numbers and signs, each with or without the space before it; decoding gives the text back."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words: dict[str, None] = dict.fromkeys(_SPECIAL)
    for text in _FIXED_TEXT:
        words.update(dict.fromkeys(re.findall(_TOKEN, text.replace(" ", _SPACE))))
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_TOKEN), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.Fuse()])
    unk, pad, eos = _SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unk, pad_token=pad, eos_token=eos, clean_up_tokenization_spaces=False
    )


def build_model_config(vocab_size: int) -> Any:
    """Llama with 2 layers of width 64, embeddings tied; heads of 32, the smallest that vLLM's attention takes."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        intermediate_size=256,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        initializer_range=0.1,  # about 1 / sqrt(width); at the usual 0.02 it learns its sums on some seeds only
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=_SPECIAL.index("<eos>"),
        pad_token_id=_SPECIAL.index("<pad>"),
    )
