"""One configuration for every command: frozen pydantic models. `toml.py` reads and writes them."""

from collections.abc import Iterator

from pydantic import Field

from carft_fast.config.sections import (
    ANSWER_PHRASE,
    SYNTHETIC,
    ContrastiveConfig,
    DataConfig,
    DistributedConfig,
    EvalConfig,
    GuardConfig,
    LoraConfig,
    ModelConfig,
    OutputConfig,
    RewardConfig,
    RlConfig,
    RolloutConfig,
    Section,
    SftConfig,
)
from carft_fast.core import masked


class Config(Section):
    seed: int = Field(0, ge=0, lt=2**31)
    """Every random draw of a run is a function of this seed, the stage and the step."""
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    data: DataConfig = DataConfig()
    sft: SftConfig = SftConfig()
    rl: RlConfig = RlConfig()
    reward: RewardConfig = RewardConfig()
    contrastive: ContrastiveConfig = ContrastiveConfig()
    rollout: RolloutConfig = RolloutConfig()
    guard: GuardConfig = GuardConfig()
    eval: EvalConfig = EvalConfig()
    distributed: DistributedConfig = DistributedConfig()
    output: OutputConfig = OutputConfig()

    @property
    def eval_max_new_tokens(self) -> int:
        return self.eval.max_new_tokens or self.rollout.max_new_tokens

    @property
    def shares_prompts(self) -> bool:
        """`rl.share_prompts`, "auto" decided."""
        if self.rl.share_prompts == "auto":
            return self._can_share_prompts and self.rollout.samples_per_prompt > 1
        return self.rl.share_prompts

    @property
    def _can_share_prompts(self) -> bool:
        return (self.model.attention, self.model.impl) == ("packed", "fast")

    def _secrets(self) -> Iterator[str]:
        """A run saves its config, and reads it back on --resume: neither with a secret nor with a masked one."""
        for section, values in self.model_dump().items():
            for name, value in values.items() if isinstance(values, dict) else [("", values)]:
                if masked(str(value)) != str(value):
                    key = f"{section}.{name}".rstrip(".")
                    yield f"{key} holds what looks like a password or token, and would be saved with it"

    def _conflicts(self) -> Iterator[str]:
        yield from self._secrets()
        model, data, rl, rollout, guard = self.model, self.data, self.rl, self.rollout, self.guard
        per_prompt, longest = rollout.samples_per_prompt, data.max_length
        if rl.batch_size % per_prompt:
            yield f"rl.batch_size = {rl.batch_size} must be a multiple of rollout.samples_per_prompt = {per_prompt}"
        if rl.mini_batch_size > rl.batch_size:
            yield f"rl.mini_batch_size = {rl.mini_batch_size} must be at most rl.batch_size = {rl.batch_size}"
        if model.attention == "flash_attention_2" and model.compute_dtype == "float32":
            yield 'model.attention = "flash_attention_2" needs model.compute_dtype = "bfloat16"'
        for stage, tokens in (("sft", self.sft.micro_batch_tokens), ("rl", rl.micro_batch_tokens)):
            if tokens < longest:
                yield f"{stage}.micro_batch_tokens = {tokens} must be at least data.max_length = {longest}"
        if rl.share_prompts is True and not self._can_share_prompts:
            yield (
                'rl.share_prompts = true needs model.attention = "packed" and model.impl = "fast", these are '
                f'"{model.attention}" and "{model.impl}"'
            )
        if rl.estimator != "gae" and per_prompt == 1:
            yield (
                f'rl.estimator = "{rl.estimator}" compares the samples of a question: rollout.samples_per_prompt '
                "must be at least 2, this is 1"
            )
        if rl.estimator != "gae" and rl.kl_coef:
            yield (
                f'rl.kl_coef = {rl.kl_coef:g} is a per-token reward, which rl.estimator = "{rl.estimator}" does '
                "not have: set it to 0, and rl.kl_loss_coef for a KL term in the loss"
            )
        if rollout.top_p < 1 or rollout.top_k:
            whole = f"needs rollout.top_p = 1 and top_k = 0, these are {rollout.top_p:g} and {rollout.top_k}"
            if model.impl == "padded":
                yield f'model.impl = "padded" {whole}: the plain path does not cut its distribution to the sampler\'s'
            if rl.old_logprobs == "sampled":
                yield (
                    f'rl.old_logprobs = "sampled" {whole}: the sampler\'s log-probs are of the tokens it kept, the '
                    "policy's of all"
                )
        for name, value in (("correction", rollout.correction), ("sequence_mask", rollout.sequence_mask)):
            if rl.old_logprobs == "sampled" and value != "none":
                yield (
                    f'rollout.{name} = "{value}" needs rl.old_logprobs = "recompute": with "sampled" '
                    "the policy's ratio is against the sampler already"
                )
        for section, new_tokens in (("rollout", rollout.max_new_tokens), ("eval", self.eval_max_new_tokens)):
            if new_tokens >= longest:
                yield (
                    f"{section}.max_new_tokens = {new_tokens} must be below data.max_length = {longest}: the prompt "
                    "needs room"
                )
        if guard.action != "off" and guard.kl_max and not (rl.kl_coef or rl.kl_loss_coef):
            yield (
                f"guard.kl_max = {guard.kl_max:g} needs a reference: rl.kl_coef or rl.kl_loss_coef above 0, both are 0"
            )
        if guard.action == "rollback" and rollout.async_depth:
            yield 'guard.action = "rollback" needs rollout.async_depth = 0: samples in flight are collapsed ones'
        if rollout.engine != "hf" and not 0.01 <= self.eval.temperature <= 2:
            yield f'eval.temperature = {self.eval.temperature:g} needs rollout.engine = "hf": vLLM takes 0.01 to 2'
        if self.reward.answer_type == "program" and data.answer_phrase not in ("", ANSWER_PHRASE):
            yield (
                f'data.answer_phrase = {data.answer_phrase!r} needs another reward.answer_type than "program", whose '
                "answer is what it returns"
            )
        if self.contrastive.mode == "answer" and (not data.answer_phrase or self.reward.answer_type == "program"):
            yield (
                'contrastive.mode = "answer" needs annotations that end with data.answer_phrase, this is '
                f'{data.answer_phrase!r} with reward.answer_type = "{self.reward.answer_type}"'
            )
        if (SYNTHETIC in (data.train, data.eval)) != (data.train == data.eval == SYNTHETIC):
            yield 'data.train and data.eval must both be "synthetic" or neither'
