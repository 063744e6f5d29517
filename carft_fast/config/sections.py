"""The sections of a configuration, each with what its own fields cannot be together; schema.py has the whole.

The text under a field is its documentation: `carft-fast config` prints it beside the resolved value. "paper" means
arXiv 2508.15868, "published code" the repository of its authors; where they differ, the field says which is used.
"""

import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

SYNTHETIC = "synthetic"
ANSWER = "answer"
"""In a list of `reward.fn`: the rule of `reward.answer_type`."""
ANSWER_SLOT = "{answer}"
ANSWER_PHRASE = f"Therefore, the answer is: {ANSWER_SLOT}"
AnswerType = Literal["numeric", "choice", "latex", "program"]
CalculatorMarks = Literal["strip", "keep"]
DataFormat = Literal["auto", "reft", "gsm8k", "jsonl", "csv", "parquet", "arrow", "disk", "hub"]
TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]
Strategy = Literal["ddp", "fsdp2", "zero2", "zero3"]

_TEMPLATE_VARIABLES = frozenset(
    ("messages", "question", "conversations", "chat_template", "add_generation_prompt", "continue_final_message")
) | {"return_assistant_tokens_mask"}


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    def _conflicts(self) -> Iterator[str]:
        """A message for each combination of values that cannot be. Only the first is read."""
        yield from ()

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if message := next(self._conflicts(), None):
            raise ValueError(message)
        return self


class ModelConfig(Section):
    path: str = ""
    """Folder of a Hugging Face causal LM, a Hub id, or "synthetic" (the quickstart's untrained 2-layer Llama)."""
    revision: str | None = None
    """Git revision of a Hub id; the default branch when absent."""
    trust_remote_code: bool = False
    """Run the Python files of a model unknown to transformers. They can do whatever you can: read them first."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; "auto" takes the GPU when there is one."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the matmuls. Weights, optimizer state and the two heads stay float32; "bfloat16" is autocast."""
    attention: Literal["packed", "flash_attention_2", "flex_attention", "sdpa", "eager"] = "packed"
    """"packed": no padding, each sequence attends to itself alone; FlashAttention in half precision on CUDA, SDPA
    elsewhere. The others are transformers' own: "flash_attention_2" (extra `flash`, NVIDIA GPU), and for models that
    "packed" refuses "flex_attention", "sdpa" or "eager" with a block-diagonal mask, quadratic in a micro-batch's
    tokens."""
    impl: Literal["fast", "padded"] = "fast"
    """"fast": packed sequences, fused losses. "padded": every batch padded to its longest prompt and completion,
    all its logits in float32; what the published trainers compute, kept to compare with."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward: less memory, about one third more time."""
    compile: bool = False
    """torch.compile every decoder layer of the trainer; the first steps take minutes more."""
    value_head: Literal["shared", "separate"] = "shared"
    """"shared": v = u.relu(W_e h + b_e) + c (published 8-GPU scripts, "cl2"); "separate": v = u.h + c."""
    embedding_dim: int = Field(64, ge=1, le=4096)
    """Size of the CoT embedding. Source: published code, 64."""


class LoraConfig(Section):
    rank: int = Field(0, ge=0, le=1024)
    """Rank of the low-rank adapters that are trained in place of the weights; 0 trains all weights."""
    alpha: float = Field(32.0, gt=0)
    """The adapters' product is scaled by alpha / rank."""
    target_modules: list[str] = ["all-linear"]
    """Names of the modules that get an adapter; "all-linear" is every linear layer except the LM head."""


class DataConfig(Section):
    train: str = ""
    """File or Hub id with question, annotated CoT and answer, or "synthetic"."""
    eval: str = ""
    """File or Hub id with question and answer, or "synthetic"."""
    format: DataFormat = "auto"
    """"reft": JSON list; "gsm8k": JSONL with `#### answer`; "jsonl": own fields; "csv", "parquet", "arrow": one file;
    "disk": a folder of `save_to_disk`; "hub": through `datasets`. "auto" finds the format by content and name."""
    fields: dict[str, str] = {}
    """The file's column for each of question, cot, answer, item_id, such as {cot = "solution"}; or for messages, a
    conversation whose last assistant turn is the annotation. A cot may be a list of texts: each epoch uses one."""
    eval_fields: dict[str, str] = {}
    """The same for evaluation data; `fields` when empty."""
    mix: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Several training files in place of `train`, each with its share of the rows (shares are divided by their
    sum): as many rows as the shares allow without using one twice, from the top of each file."""
    calculator_marks: CalculatorMarks = "strip"
    """GSM8K's `<<48/2=24>>`, written for a calculator that fills in the result while sampling (Cobbe et al. 2021):
    there is none here, so they are taken out of its annotations; "keep" trains on them."""
    merge_questions: bool = False
    """Make one training row of those with the same question and answer, with all their annotations: a question then
    counts once an epoch. Off, as in ReFT, whose data has every annotation in a row of its own."""
    train_split: str = "train"
    """Split of a Hub dataset used for training."""
    eval_split: str = "test"
    """Split of a Hub dataset used for evaluation."""
    train_rows: int | None = Field(None, ge=1)
    """Use at most this many usable training rows, from the top of the file; all when absent."""
    eval_rows: int | None = Field(None, ge=1)
    """Use at most this many usable evaluation rows, from the top of the file; all when absent."""
    synthetic_steps: list[Annotated[int, Field(ge=1, le=8)]] = Field([3, 3], min_length=2, max_length=2)
    """Sums in a question of the "synthetic" task, [fewest, most]; each number of sums is equally frequent."""
    template: str = Field("carft", min_length=1)
    """"carft": `Question:\\n...\\nAnswer reasoning:\\n` (published code); "chat": the tokenizer's chat template; else a
    Jinja template, as text or in a file, which reads `question`, or `messages` as chat templates do."""
    system_prompt: str = ""
    """System message of rows that have none of their own; with "carft" a paragraph before everything else."""
    few_shot: str = ""
    """File of solved questions, read with `fields`: all of them go before every question, as earlier turns."""
    chat_template_kwargs: dict[str, Any] = {}
    """Further variables of "chat" or of a Jinja template, such as {enable_thinking=false}: booleans, numbers, texts or
    lists of these."""
    answer_phrase: str = ANSWER_PHRASE
    """Line that follows an annotation, with `{answer}` once, such as '\\boxed{{answer}}'; answers are read by it. "":
    annotations state their answers, which are read as with the default. Programs need none."""
    max_length: int = Field(1024, ge=2)
    """Longest prompt + completion, in tokens; longer annotated rows are reported and left out. Source: paper, 1024."""

    @property
    def trained_on(self) -> str:
        """Name of the training data, for people."""
        total = sum(self.mix.values())
        return ", ".join(f"{path} ({share / total:.3g})" for path, share in self.mix.items()) or self.train

    def _conflicts(self) -> Iterator[str]:
        phrase, variables = self.answer_phrase, self.chat_template_kwargs
        if phrase and phrase.count(ANSWER_SLOT) != 1:
            yield f"answer_phrase = {phrase!r}: expected {ANSWER_SLOT} in it once, or an empty text"
        after_command = re.search(r"\\[A-Za-z]+\{+answer\}", phrase) is not None
        if "\b" in phrase or "\f" in phrase:
            yield f"answer_phrase = {phrase!r}: \\b and \\f in double quotes are control characters: use single ones"
        elif ("{" + ANSWER_SLOT + "}" in phrase) != after_command:
            yield (
                f"answer_phrase = {phrase!r}: {ANSWER_SLOT} stands for the answer, and braces around it are a LaTeX "
                "command's: '#### {answer}' or '\\boxed{{answer}}'"
            )
        if self.mix and self.train:
            yield f"mix and train = {self.train!r}: give one of the two"
        fewest, most = self.synthetic_steps
        if fewest > most:
            yield f"synthetic_steps = {self.synthetic_steps}: the fewest first, then the most"
        if self.synthetic_steps != [3, 3] and self.train != SYNTHETIC:
            yield f'synthetic_steps = {self.synthetic_steps}: of the "synthetic" task, and train is {self.train!r}'
        if SYNTHETIC in self.mix:
            yield 'mix: "synthetic" cannot be mixed'
        if "\\n" in re.sub(r"\{\{.*?\}\}|\{%.*?%\}", "", self.template, flags=re.DOTALL):
            yield (
                f"template = {self.template!r}: \\n is two characters there; with double quotes around the text, in "
                "TOML and after --set data.template=, it is the end of a line"
            )
        if variables and self.template == "carft":
            yield 'chat_template_kwargs need template = "chat" or a Jinja template, this is "carft"'
        for name, value in variables.items():
            parts = value if isinstance(value, list) else [value]
            if not all(isinstance(part, bool | int | float | str) for part in parts):
                yield f"chat_template_kwargs.{name} = {value!r}: expected a boolean, number, text or list of these"
        if given := sorted(_TEMPLATE_VARIABLES & set(variables)):
            yield f"chat_template_kwargs: {given[0]!r} is given by the trainer, and cannot be set"


class StageConfig(Section):
    """What both stages share: length, optimizer, evaluation and checkpoints."""

    epochs: int = Field(1, ge=1)
    """Passes over the training rows; ignored when max_steps is set."""
    max_steps: int | None = Field(None, ge=1)
    """Steps of this stage (SFT: optimizer steps; RL: rollout batches); from `epochs` when absent."""
    micro_batch_tokens: int = Field(16384, ge=2)
    """Most tokens per forward and backward, prompts included; changes memory and speed, not the result."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """"adamw_8bit" keeps AdamW's two moments in 8 bits, with a scale for every 256 values (torchao, extra `torchao`;
    Dettmers et al. 2022). For one process, or several with distributed.strategy "ddp"."""
    lr: float = Field(1e-5, gt=0)
    """Peak learning rate of AdamW."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after warm-up, from lr to lr * lr_final_ratio at the last step."""
    lr_final_ratio: float = Field(0.0, ge=0, le=1)
    """Learning rate at the last step, as a share of lr (linear and cosine)."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps of linear warm-up from 0 (RL: rollout batches)."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW first-moment decay."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """AdamW second-moment decay."""
    eps: float = Field(1e-8, gt=0)
    """AdamW epsilon, added to the root of the second moment."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW decoupled weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Global gradient norm is clipped to this."""
    max_skipped_steps: int = Field(3, ge=1)
    """An update with a loss or gradient that is not finite is skipped; so many such steps in a row end the run."""
    eval_every: int | None = Field(None, ge=1)
    """Steps between evaluations; the stage's end is always evaluated."""
    save_every: int | None = Field(None, ge=1)
    """Steps between checkpoints; the best evaluated step is always kept. The stage's end is always saved."""


class SftConfig(StageConfig):
    batch_size: int = Field(64, ge=1)
    """Sequences per optimizer step. Source: paper, global batch 64."""
    first_step: int = Field(0, ge=0)
    """Steps that an earlier SFT of this model has done; the order of the rows continues after them."""
    eval_loss: bool = False
    """At every evaluation also the cross-entropy of data.eval's annotations: the sum over their completion tokens, over
    the number of these tokens (nats per token). Of a row with several annotations the first counts."""
    best_by: Literal["accuracy", "eval_loss"] = "accuracy"
    """What makes an evaluated checkpoint the best one: the highest accuracy or the lowest validation loss."""

    def _conflicts(self) -> Iterator[str]:
        if self.best_by == "eval_loss" and not self.eval_loss:
            yield 'best_by = "eval_loss" needs eval_loss = true, this is false'


class RlConfig(StageConfig):
    lr: float = Field(3e-7, gt=0)
    """Peak learning rate of AdamW. Source: paper, 3e-7."""
    batch_size: int = Field(64, ge=1)
    """Rollouts per step, over `rollout.samples_per_prompt` completions per question. Source: paper, 64."""
    mini_batch_size: int = Field(64, ge=1)
    """Rollouts per optimizer step."""
    ppo_epochs: int = Field(2, ge=1)
    """Passes over the rollouts of a step (U). Source: paper, 2."""
    gamma: float = Field(1.0, ge=0, le=1)
    """Discount. The published config has 1.0 (used); the paper prints 0.95, which starves early tokens."""
    lam: float = Field(0.95, ge=0, le=1)
    """GAE lambda. The published config has 0.95 (used); the paper prints 1."""
    estimator: Literal["gae", "dr_grpo", "grpo", "rloo"] = "gae"
    """Advantages: "gae" from the value head (PPO, ReFT, CARFT); without one, from the scores of a question's samples,
    "dr_grpo" score - mean, "grpo" (score - mean) / (standard deviation + group_std_eps), "rloo" score - mean of the
    other samples (Ahmadian et al. 2024)."""
    loss_mean: Literal["sequence", "token", "constant"] = "sequence"
    """What the token losses of a mini-batch are divided by: "sequence" each completion's length, then their number
    (PPO, GRPO); "token" all its completion tokens; "constant" number of completions times max_new_tokens (Dr.GRPO)."""
    kl_coef: float = Field(0.05, ge=0)
    """Weight of log-prob minus reference log-prob in the token reward; 0 needs no reference. Source: paper, 0.05."""
    kl_loss_coef: float = Field(0.0, ge=0)
    """Weight of the estimate of KL(policy || reference) in the loss, GRPO's term; 0 is off."""
    kl_estimate: Literal["k3", "k2"] = "k3"
    """A token's KL estimate, with d = reference log-prob - log-prob: "k3" exp(d) - d - 1, "k2" d^2 / 2. Source: GRPO,
    "k3"."""
    kl_clamp: float | None = Field(None, gt=0)
    """Upper bound of a token's KL estimate (nats), no gradient above it; no bound when absent. Source: verl, 10."""
    mask_truncated: bool = False
    """Leave completions cut at max_new_tokens out of every term of the loss, and out of what it is divided by. Their
    scores still count in advantages and whitening. Source: overlong filtering, DAPO (Yu et al. 2025)."""
    old_logprobs: Literal["recompute", "sampled"] = "recompute"
    """Log-probs the ratio is taken against: "recompute" the trainer's own, by a forward before the update (left out
    where there is one update per batch, and the ratio is 1); "sampled" those the sampler reports."""
    reference_offload: bool = False
    """Keep the reference's weights in host memory, on the GPU only while used, once a step. LoRA needs no copy."""
    share_prompts: Literal["auto"] | bool = "auto"
    """Forward a prompt once for all its completions in a micro-batch: true needs model.attention = "packed" and
    model.impl = "fast"; "auto" does where these are set and rollout.samples_per_prompt is at least 2."""
    loss: Literal["clip", "cispo"] = "clip"
    """A token's policy loss: "clip" PPO's; "cispo" minus the clipped ratio, a constant, times advantage and log-prob:
    every token keeps its gradient (MiniMax-M1, 2025)."""
    ratio: Literal["token", "sequence"] = "token"
    """What is clipped: each token's ratio, or one for a completion, exp of the mean of its tokens' log-ratios (GSPO,
    Zheng et al. 2025, with clip_low 3e-4 and clip_high 4e-4). "sequence" computes all logits once more."""
    dual_clip: float | None = Field(None, gt=1)
    """c: the policy loss of a token with a negative advantage A is at most -A c, without gradient above that; no bound
    when absent. Source: Ye et al. 2020, 3."""
    clip_low: float = Field(0.2, gt=0, le=1)
    """Policy ratio is clipped below at 1 - clip_low; with 1 there is no lower bound. Source: published code, 0.2."""
    clip_high: float = Field(0.2, gt=0)
    """Policy ratio is clipped above at 1 + clip_high. Source: published code, 0.2."""
    value_clip: float = Field(0.2, gt=0)
    """New values are clipped to within this of the old ones in the value loss. Source: published code, 0.2."""
    value_coef: float = Field(5.0, ge=0)
    """Weight of the value loss (alpha). Source: paper, 5."""
    group_std_eps: float = Field(1e-4, gt=0)
    """Added to a group's standard deviation where "grpo" divides by it. Source: TRL, 1e-4."""
    whiten_advantages: bool = True
    """Advantages to mean 0, variance 1 over all completion tokens of the step. Source: published code."""
    whiten_eps: float = Field(1e-8, ge=1e-30, le=1)
    """Added to the variance of the advantages before its root is taken. Source: published code, 1e-8."""
    gradient_terms: bool = False
    """Record the norm of the language model's gradient from each term of the loss (policy, value, KL, contrastive) in a
    step's first mini-batch, and its cosine with the policy's. Costs one more forward and backward of that mini-batch
    for each term; the training is the same."""

    def _conflicts(self) -> Iterator[str]:
        for name, value in (("dual_clip", self.dual_clip), ("ratio", None if self.ratio == "token" else self.ratio)):
            if value is not None and self.loss == "cispo":
                shown = f'"{value}"' if isinstance(value, str) else f"{value:g}"
                yield f'{name} = {shown} needs loss = "clip", this is "cispo"'
        if not self.kl_loss_coef and self.kl_estimate != "k3":
            yield f'kl_estimate = "{self.kl_estimate}" needs kl_loss_coef above 0, this is 0'
        if not self.kl_loss_coef and self.kl_clamp is not None:
            yield f"kl_clamp = {self.kl_clamp:g} needs kl_loss_coef above 0, this is 0"


class RewardConfig(Section):
    answer_type: AnswerType = "numeric"
    """"numeric": equal within tolerance; "choice": the same letter, case ignored; "latex": the same mathematics, by
    math-verify; "program": the completion is Python, and what its solution() returns is compared as "numeric"."""
    fn: str | list[str] = ""
    """Own reward "package.module:function": (completions, examples) -> scores, in place of the answer type's, or a list
    whose scores are added up; in it "answer" is the answer type's rule. See docs/rewards.md. Needs partial =
    "constant"."""
    fn_weights: list[float] = []
    """Weight of each score of a list in `fn`; empty: 1 each."""
    correct_score: float = Field(1.0, gt=0)
    """Score of a right answer; a score of `fn` that is at least this counts as one. Source: paper, 1."""
    tolerance: float = Field(1e-2, ge=0)
    """Largest |answer - target| that counts as correct. Source: published code, 1e-2."""
    partial: Literal["embedding", "constant"] = "embedding"
    """Score of a wrong but extractable answer: "embedding" partial_base + partial_scale * cos(z_1, z_2) (CARFT),
    "constant" partial_constant (ReFT)."""
    partial_constant: float = Field(0.1, ge=0)
    """Score of "constant", at most correct_score. Source: ReFT, 0.1."""
    partial_base: float = Field(0.2, ge=0)
    """Score of "embedding" at cosine 0; its scores stay within 0 to correct_score. Source: published code, 0.2."""
    partial_scale: float = Field(0.1, ge=0)
    """How far the score of "embedding" is from partial_base at cosine 1 and -1. Source: published code, 0.1."""
    ignore_think: bool = False
    """Read the answer from what is outside <think>...</think>; a <think> without an end leaves no answer. After a
    prompt that ends with <think>, the completion begins inside it. A function of `fn` gets the whole completion."""
    latex_cpu_s: float = Field(2.0, ge=0.1, le=60)
    """Processor time a LaTeX comparison may take (seconds); one that takes longer counts as no answer."""
    program_workers: int = Field(2, ge=1, le=256)
    """Processes that run programs at once."""
    program_cpu_s: float = Field(2.0, ge=0.1, le=600)
    """Processor time a program may take (seconds)."""
    program_memory_mb: int = Field(256, ge=64, le=65536)
    """Memory a program may take (MiB)."""

    @property
    def functions(self) -> list[str]:
        """What `fn` names."""
        return [self.fn] if isinstance(self.fn, str) and self.fn else list(self.fn)

    @property
    def function_labels(self) -> list[str]:
        """Short names for the functions of a list: what follows the colon, where that names one of them alone."""
        short = [name.rpartition(":")[2] for name in self.functions]
        return [part if short.count(part) == 1 else name for part, name in zip(short, self.functions, strict=True)]

    @property
    def reads_answers(self) -> bool:
        """Whether the rule of `answer_type` grades, alone or beside functions."""
        return not self.fn or (isinstance(self.fn, list) and ANSWER in self.fn)

    def _conflicts(self) -> Iterator[str]:
        shown = json.dumps(self.fn)
        if self.fn and self.partial != "constant":
            yield f'fn = {shown} needs partial = "constant": its scores are taken as they are, no cosine is added'
        if len(set(self.functions)) < len(self.functions):
            yield f"fn = {shown}: a function appears twice"
        if self.fn and self.fn_weights and (isinstance(self.fn, str) or len(self.fn_weights) != len(self.fn)):
            yield (
                f"fn_weights = {self.fn_weights}: {len(self.fn_weights)} weights; expected one for each function of a "
                f"list in fn, this is {shown}"
            )
        if self.fn_weights and not any(self.fn_weights):
            yield f"fn_weights = {self.fn_weights}: every score would be 0"
        if self.ignore_think and not self.reads_answers:
            yield f'ignore_think = true needs fn = "" or a list with "answer", this is {shown}: it reads no answer'
        base, scale, most = self.partial_base, self.partial_scale, self.correct_score
        if self.partial == "embedding" and not scale <= base <= most - scale:
            yield (
                f"partial_base = {base:g} and partial_scale = {scale:g} let a wrong answer score below 0 or above a "
                f"right one: partial_base +- partial_scale must be within 0 to correct_score = {most:g}"
            )
        if self.partial == "constant" and self.reads_answers and self.partial_constant > most:
            yield (
                f"partial_constant = {self.partial_constant:g} lets a wrong answer score above a right one: at most "
                f"correct_score = {most:g}"
            )


class ContrastiveConfig(Section):
    mode: Literal["positive", "negative", "both", "answer", "none"] = "positive"
    """"positive": correct rollouts are pulled towards their annotated CoT (paper eq. 7); "negative": the tokens that a
    wrong rollout has in common with it are pulled towards the same tokens there, away from the rest (eq. 8); "both":
    the two weighted by negative_weight; "answer": as "positive", but with the state before data.answer_phrase instead
    of the whole CoT (after Hidden-Align, Wang et al. 2026); "none": no contrastive loss (ReFT)."""
    negative_weight: float = Field(0.5, ge=0, le=1)
    """Weight w of the negative signal in "both", (1 - w) * positive + w * negative. Source: published code, 0.5."""
    gradient: Literal["full", "local", "published"] = "full"
    """What carries gradient: "full" every candidate, as in the paper; "local" those of the same process, the others are
    constants (no difference with one process); "published" none, and the positive loss is summed over all rollouts."""
    coef: float = Field(1e-3, ge=0)
    """Weight of the contrastive loss (c). Source: paper, 1e-3, flat between 5e-4 and 1.5e-3."""
    temperature: float = Field(0.2, gt=0)
    """InfoNCE temperature (tau). Source: paper, 0.2."""
    positive_clamp: float = Field(0.9, gt=0, le=1)
    """The positive's cosine is clamped here in the numerator, which ends the pull. Source: published code, 0.9."""

    def _conflicts(self) -> Iterator[str]:
        if self.mode == "answer" and self.gradient == "published":
            yield 'mode = "answer" needs gradient = "full" or "local", this is "published": no published code has it'


class EvalConfig(Section):
    samples: int = Field(0, ge=0, le=10_000)
    """Completions that `carft-fast eval` samples per question for maj@k and pass@k; 0 and 1: greedy accuracy alone.
    Evaluation during training is always greedy."""
    k: list[Annotated[int, Field(ge=1)]] = []
    """The k of pass@k: chance that one of k samples is correct, unbiased (Chen et al. 2021); empty: 1 and `samples`."""
    maj_k: list[Annotated[int, Field(ge=1)]] = []
    """The k of maj@k: the answer most of the first k samples give (Wang et al. 2023); empty: `samples`."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature of those samples; 1 is the distribution that RL trains."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling mass of those samples; 1 is off."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Longest completion of every evaluation, in training too (tokens); rollout.max_new_tokens when absent."""

    def _conflicts(self) -> Iterator[str]:
        for name, values in (("k", self.k), ("maj_k", self.maj_k)):
            if values and max(values) > self.samples:
                yield f"{name} = {values}: at most samples = {self.samples}"


class RolloutConfig(Section):
    engine: Literal["hf", "vllm", "vllm-server"] = "hf"
    """What samples: "hf" transformers' generate, "vllm" an engine in this process, "vllm-server" vLLM servers."""
    samples_per_prompt: int = Field(1, ge=1)
    """Completions per question. Source: paper, 1."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature. Source: paper, 1."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling mass; 1 is off. Source: paper, off."""
    top_k: int = Field(0, ge=0)
    """Most likely tokens to sample from; 0 is off. Source: paper, off."""
    max_new_tokens: int = Field(512, ge=1)
    """Longest completion, in tokens, in rollouts and evaluation."""
    prefix: float = Field(0.0, ge=0, lt=1)
    """Share of a question's annotation that is added to its prompt in the first step, in whole tokens; the rest is
    sampled. The share falls linearly to 0. A prefix has only the contrastive loss, and is graded with the completion.
    Near 1 it states the answer. Source: UFT (Liu et al. 2025, arXiv 2505.16984), BREAD (2506.17211), Prefix-RFT
    (2507.01679)."""
    prefix_steps: int | None = Field(None, ge=1)
    """Steps after which `prefix` is 0; all of the stage's when absent."""
    batch_size: int = Field(64, ge=1)
    """Sequences generated at once; with vLLM the most that an engine decodes together (max_num_seqs)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Weights and arithmetic of the vLLM engine; "auto" is model.compute_dtype."""
    drafts: Literal["auto", "off"] = "auto"
    """"auto": the vLLM engines check the last completions of a question and its annotated CoTs as guesses of the next
    completion, several tokens a forward; what is sampled stays the same. "hf" has no drafts; your own engines get the
    annotated CoTs, and may use them."""
    draft_budget: int = Field(64, ge=2)
    """Tokens that a forward may decode for all sequences together, guesses included; above it nothing is guessed.
    Source: what a forward of a 7B computes on an A100 in the time of reading its weights, by the cost model."""
    memory_fraction: float = Field(0.45, gt=0, le=0.98)
    """Share of the GPU's memory for vLLM's weights and KV cache; "vllm-server" with GPUs of its own: 0.9."""
    kv_cache_gib: float | None = Field(None, gt=0)
    """Size of vLLM's KV cache (GiB); when absent what memory_fraction leaves, and 1 GiB on the CPU."""
    enforce_eager: bool | None = None
    """Run vLLM without CUDA graphs and compilation; when absent only on the CPU, and there not with model.compile."""
    tensor_parallel: int = Field(1, ge=1)
    """GPUs a vLLM server shares the model over ("vllm-server" only)."""
    sleep_level: Literal[0, 1, 2] = 0
    """Memory that the "vllm" engine gives back while the trainer works: 0 none, 1 KV cache (weights go to host
    memory), 2 weights as well. CUDA only."""
    servers: list[str] = []
    """URLs of running servers (`carft-fast serve`) for "vllm-server"; when empty the run starts its own. Their token is
    in the environment variable CARFT_SERVER_TOKEN, never here."""
    server_devices: list[str] = []
    """Servers the run starts, one for each entry: its CUDA_VISIBLE_DEVICES, such as ["2", "3"]. Empty: one server."""
    server_timeout_s: float = Field(600.0, gt=0)
    """Seconds a server may take to start, or to take over new weights."""
    request_timeout_s: float = Field(600.0, gt=0)
    """Seconds a server may take over one prompt's completions before another server gets them."""
    weight_transfer: Literal["auto", "nccl", "ipc", "files"] = "auto"
    """How servers get weights: "nccl" from GPU to GPU, "ipc" on one GPU, "files" through transfer_dir. "auto": nccl,
    and files where the trainer is on the CPU."""
    transfer_dir: str = ""
    """Folder for "files" that trainer and servers both see; when empty /dev/shm, else the temporary folder."""
    lora_sync: Literal["auto", "adapter", "merge"] = "auto"
    """How LoRA reaches the vLLM engines: "adapter" alone, unmerged, as the trainer computes it; "merge" added to the
    weights and rounded to the engine's dtype. "auto": adapter on a GPU, merge on the CPU, where vLLM's LoRA is slow."""
    async_depth: Literal[0, 1] = 0
    """1 samples the next batch while the trainer updates, with weights one version old; 0 is strictly on-policy."""
    correction: Literal["none", "truncated", "masked"] = "none"
    """Factor on a token's policy loss that corrects for the mismatch of trainer and sampler: r = exp(old log-prob -
    sampled log-prob) on the sampler's support; "truncated" min(r, cap); "masked" r, and 0 above cap or below floor."""
    correction_cap: float = Field(2.0, ge=1)
    """Largest r of `correction`. Source: truncated importance sampling (Yao et al. 2025), 2."""
    correction_floor: float = Field(0.0, ge=0, le=1)
    """Smallest r that "masked" keeps; 0 is off."""
    sequence_mask: Literal["none", "plain", "weighted"] = "none"
    """Leave completions out of the policy loss by the product R of their tokens' r (see `correction`): those with R
    above cap or below floor. "plain" keeps the others' factors, "weighted" multiplies them by R (sequence-level masked
    importance sampling, MIS). They still count in what the loss is divided by."""
    sequence_mask_cap: float = Field(2.0, ge=1)
    """Largest R that `sequence_mask` keeps."""
    sequence_mask_floor: float = Field(0.0, ge=0, le=1)
    """Smallest R that `sequence_mask` keeps; 0 is off."""
    probe_every: int | None = Field(None, ge=1)
    """Steps between checks that trainer and sampler agree on the log-probs of a probe batch; always before step 1."""
    probe_tolerance: float | None = Field(None, gt=0)
    """Largest mean |log-prob difference| of that check (nats); when absent 1e-3 in float32, 0.05 in bfloat16."""

    @property
    def drafting(self) -> bool:
        """Whether `engine` is one that uses drafts, and may."""
        return self.drafts == "auto" and self.engine != "hf"

    def _conflicts(self) -> Iterator[str]:
        engine, sleep, floor = self.engine, self.sleep_level, self.correction_floor
        with_servers = engine == "vllm-server"
        if self.prefix_steps is not None and not self.prefix:
            yield f"prefix_steps = {self.prefix_steps} needs prefix above 0, this is 0"
        if self.async_depth and engine == "hf":
            yield 'async_depth = 1 needs engine = "vllm" or "vllm-server": "hf" samples from the weights being trained'
        if engine != "hf" and not 0.01 <= self.temperature <= 2:
            yield f'temperature = {self.temperature:g} needs engine = "hf": vLLM takes 0.01 to 2'
        if self.draft_budget != type(self).model_fields["draft_budget"].default and not self.drafting:
            yield (
                f'draft_budget = {self.draft_budget} needs drafts = "auto" and engine = "vllm" or "vllm-server", these '
                f'are "{self.drafts}" and "{engine}"'
            )
        if sleep and engine != "vllm":
            yield f'sleep_level = {sleep} needs engine = "vllm", this is "{engine}"'
        if sleep and self.async_depth:
            yield f"sleep_level = {sleep} needs async_depth = 0: the engine samples while the trainer updates"
        if self.tensor_parallel > 1 and not with_servers:
            yield f'tensor_parallel = {self.tensor_parallel} needs engine = "vllm-server", this is "{engine}"'
        if (self.servers or self.server_devices) and not with_servers:
            yield f'servers and server_devices need engine = "vllm-server", this is "{engine}"'
        if self.servers and self.server_devices:
            yield "servers are running already and server_devices would be started: give one of the two"
        if len(set(self.servers)) < len(self.servers):
            yield f"servers = {self.servers}: an address appears twice"
        for url in self.servers:
            if "@" in url or "?" in url:
                yield (
                    "servers: an address holds credentials or a query, and would be saved with them; expected "
                    "http://host:port, and the servers' token in the environment variable CARFT_SERVER_TOKEN"
                )
            if not url.startswith(("http://", "https://")):
                yield f'servers: "{url}" is no address: expected http://host:port'
        if floor and self.correction != "masked":
            yield f'correction_floor = {floor:g} needs correction = "masked", this is "{self.correction}"'
        if self.sequence_mask_floor and self.sequence_mask == "none":
            yield (
                f'sequence_mask_floor = {self.sequence_mask_floor:g} needs sequence_mask = "plain" or "weighted", this '
                'is "none"'
            )
        if self.sequence_mask == "weighted" and self.correction != "none":
            yield (
                f'sequence_mask = "weighted" needs correction = "none", this is "{self.correction}": both weigh by '
                'the ratios; "plain" goes with either'
            )


class GuardConfig(Section):
    action: Literal["off", "stop", "rollback"] = "off"
    """What happens at a collapse: "stop" ends the stage, "rollback" continues from the best evaluated checkpoint (the
    stage's start where none was better) with a lower learning rate. Each event is logged with its cause."""
    window: int = Field(5, ge=1)
    """Steps that the watched figures are averaged over."""
    reward_drop: float = Field(0.5, gt=0, le=1)
    """Collapse: the mean reward is this share below its best mean."""
    extractable_drop: float = Field(0.5, gt=0, le=1)
    """Collapse: the share of answers that can be extracted is this share below its best mean."""
    entropy_min: float | None = Field(None, ge=0)
    """Collapse: mean entropy (nats per token) below this; not watched when absent."""
    entropy_max: float | None = Field(None, gt=0)
    """Collapse: mean entropy (nats per token) above this; not watched when absent."""
    kl_max: float | None = Field(None, gt=0)
    """Collapse: mean log-prob difference to the reference (nats per token) above this; not watched when absent."""
    lr_factor: float = Field(0.5, gt=0, lt=1)
    """Each rollback multiplies the learning rate by this."""
    max_rollbacks: int = Field(2, ge=1)
    """After this many rollbacks the next collapse stops the stage."""


class DistributedConfig(Section):
    """For the processes that `torchrun` or `accelerate launch` starts; no effect in a run of one process."""

    strategy: Literal["auto", Strategy] = "auto"
    """How model and optimizer are divided: "ddp" not at all, "fsdp2" weights, gradients and moments, "zero2" gradients
    and moments, "zero3" all (DeepSpeed, extra `deepspeed`). "auto": what accelerate's config says, else "ddp"."""
    timeout_s: float = Field(1800.0, ge=10)
    """Seconds a process waits for the others before the job ends. Longer than any one rollout, grading or save."""


class OutputConfig(Section):
    name: str = Field("run", min_length=1, pattern=r"^\.?[A-Za-z0-9_-][A-Za-z0-9._-]*$")
    """The run is written to runs/<name> unless --output-dir says otherwise."""
    keep_last: int = Field(2, ge=1)
    """Checkpoints kept, newest first; the best one is kept as well."""
    samples_per_step: int = Field(8, ge=0)
    """Sample completions with rewards written per RL step."""
    trackers: list[TrackerName] = ["tensorboard"]
    """Trackers that also get config, metrics, samples and report: any of "tensorboard" (in the run's folder), "wandb",
    "trackio", "mlflow" (extras of these names). Servers and keys are set by their own environment variables."""
    project: str = Field("carft-fast", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Project of Weights & Biases and Trackio, experiment of MLflow, that the run belongs to."""
    async_save: bool = False
    """Checkpoints are written while training goes on, from a copy of weights and optimizer in host memory."""

    def _conflicts(self) -> Iterator[str]:
        if len(set(self.trackers)) < len(self.trackers):
            yield f"trackers = {self.trackers}: one appears twice"
