"""TRL's side: its GRPOTrainer with loss_type "dr_grpo", through hooks that it offers.

Fixed completions and vLLM's come through `rollout_func`, its own sampling is transformers' generate with EOS
suppressed. What was chosen, and why: docs/peers.md.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import trl.trainer.utils
from datasets import Dataset
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.peers.carft_side import CPU, fixed_length_engine, side_config
from benchmarks.peers.turns import Turns
from benchmarks.peers.work import Done, Work
from carft_fast.config import Config
from carft_fast.models import CarftModel, SamplerWeights
from carft_fast.rollout import RolloutEngine, SamplingParams
from carft_fast.rollout.vllm import adapter as vllm_adapter


class Setting(NamedTuple):
    micro_batch: int
    """per_device_train_batch_size; the rest of a step's samples is gradient accumulation."""
    valid_positions: bool
    """Only completion positions through the LM head. TRL does so where it runs Triton; on the CPU it projects all."""
    sampler: str = "generate"
    """"generate"; "vllm": carft_fast's vLLM engine, through rollout_func; "use_vllm": its own, see `its_own_vllm`."""


def its_own_vllm(config: Config) -> None:
    """TRL's colocated vLLM as it runs on a CPU: with our engine's options for one, and the weights put in as our engine
    does it, by vLLM's own reload. What TRL calls fails there: packed layers keep no loaders."""
    import trl.generation.vllm_generation as module

    vllm_adapter.prepare_environment()
    options = vllm_adapter.engine_options(config, "cpu", dedicated=False)
    wanted = ("dtype", "enforce_eager", "kv_cache_memory_bytes", "enable_chunked_prefill")
    start = module.LLM
    module.LLM = lambda **given: start(**given, **{name: options[name] for name in wanted})

    def sync_weights(self: Any) -> None:
        weights = SamplerWeights(self.model, torch.float32)  # with the tied head, which named_parameters() lacks
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        self.llm.reset_prefix_cache()

    module.VLLMGeneration.sync_weights = sync_weights


class CountingTrainer(GRPOTrainer):
    """Notes what goes through the model for the gradient."""

    done: Done

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        prompts, completions = inputs["prompt_mask"], inputs["completion_mask"]
        self.done.samples += len(completions)
        self.done.prompt_tokens += int(prompts.sum())
        self.done.completion_tokens += int(completions.sum())
        self.done.positions += prompts.numel() + completions.numel()
        self.done.loss += float(loss.detach())
        return loss


class TrlSide(TrainerCallback):
    """The trainer runs its own loop; this callback lets it start a step when it is this side's turn."""

    def __init__(self, work: Work, setting: Setting, folder: Path, turns: Turns) -> None:
        self._work, self._turns, self._folder = work, turns, folder
        if setting.valid_positions:
            trl.trainer.utils._use_triton = lambda device: True  # asked in one place: which positions to score
        model = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32, attn_implementation="sdpa")
        tokenizer = AutoTokenizer.from_pretrained(work.model)
        if tokenizer(text=work.texts)["input_ids"] != work.prompts:
            raise ValueError("the tokenizer gives TRL other prompt ids than the case's")
        if setting.sampler == "use_vllm":
            its_own_vllm(side_config(work, ["rollout.engine=vllm"]))
        self._engine = self._vllm(model, tokenizer) if setting.sampler == "vllm" else None
        given = work.completions is not None or self._engine is not None
        self.trainer = CountingTrainer(
            model=model,
            reward_funcs=lambda completions, **_: work.rewards,
            args=self._config(setting),
            train_dataset=Dataset.from_list([{"prompt": text} for text in work.texts]),
            processing_class=tokenizer,
            callbacks=[self],
            rollout_func=self._rollouts if given else None,
        )

    def _config(self, setting: Setting) -> GRPOConfig:
        work, own_vllm = self._work, setting.sampler == "use_vllm"
        return GRPOConfig(
            output_dir=str(self._folder / "trl"),
            loss_type="dr_grpo",
            scale_rewards="none",
            beta=0.0,
            num_iterations=1,
            num_generations=work.samples_per_prompt,
            per_device_train_batch_size=setting.micro_batch,
            gradient_accumulation_steps=work.samples // setting.micro_batch,
            max_completion_length=work.max_new_tokens,
            temperature=1.0,
            generation_kwargs={"min_tokens" if own_vllm else "min_new_tokens": work.max_new_tokens},
            use_vllm=own_vllm,
            vllm_mode="colocate",
            vllm_max_model_length=max(map(len, work.prompts)) + work.max_new_tokens,
            vllm_importance_sampling_correction=False,  # which would cost it a look
            max_steps=work.steps,
            learning_rate=work.lr,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1e6,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            shuffle_dataset=False,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )

    def _vllm(self, model: Any, tokenizer: Any) -> RolloutEngine:
        self._sampled_from = CarftModel(model, None, torch.float32)
        config = side_config(self._work, ["rollout.engine=vllm"])
        return fixed_length_engine(config, self._sampled_from, tokenizer)

    def _rollouts(self, texts: list[str], trainer: GRPOTrainer) -> dict[str, list[Any]]:
        """`texts` has every prompt samples_per_prompt times."""
        work = self._work
        completions = work.completions
        if self._engine is not None:
            if trainer.state.global_step:
                self._engine.sync(self._sampled_from)
            seed = trainer.state.global_step
            sampling = SamplingParams(work.max_new_tokens, samples_per_prompt=work.samples_per_prompt, seed=seed)
            completions = [r.completion_ids for r in self._engine.generate(work.prompts, sampling)]
        assert completions is not None
        if texts != [text for text in work.texts for _ in range(work.samples_per_prompt)]:
            raise ValueError("the trainer asks for other prompts than the case's")
        prompts = [prompt for prompt in work.prompts for _ in range(work.samples_per_prompt)]
        return {"prompt_ids": prompts, "completion_ids": completions, "logprobs": [[0.0] * len(c) for c in completions]}

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._turns.wait()
        self.trainer.done = Done()
        self._timed = self._turns.timed(self.trainer.done)
        self._timed.__enter__()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        self.trainer.done.optimizer_steps += 1
        if state.global_step == 0:
            gradient = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            save_file(gradient, self._folder / "gradient.safetensors")

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._timed.__exit__(None, None, None)
        self._turns.answer(self.trainer.done)

    def run(self) -> None:
        assert self.trainer.accelerator.device == CPU
        self.trainer.train()
        weights = {name: p.detach().clone() for name, p in self.trainer.model.named_parameters()}
        save_file(weights, self._folder / "weights.safetensors")
        if self._engine is not None:
            self._engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--work", "--folder"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--setting", type=json.loads, required=True, help="fields of Setting")
    arguments = parser.parse_args()
    turns = Turns()
    TrlSide(Work.load(arguments.work), Setting(**arguments.setting), arguments.folder, turns).run()


if __name__ == "__main__":
    main()
