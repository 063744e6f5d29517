"""TRL's GRPOTrainer with carft_kernels' policy loss: the head in three matmuls where TRL's takes four. Needs TRL.
For loss_type "dapo", "grpo", "bnpo" and "dr_grpo", token-level ratios, beta 0 or above, PEFT, gradient accumulation."""

from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from carft_kernels import linear_policy_loss


class FusedGRPOTrainer(GRPOTrainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        other = [self.importance_sampling_level != "token", self.top_entropy_quantile < 1, self._entropy_bonus_enabled]
        other += [self.args.delta is not None, self.beta and self.args.use_bias_correction_kl]
        other += [self.use_vllm and self.vllm_importance_sampling_correction]
        if self.loss_type not in ("dapo", "grpo", "bnpo", "dr_grpo") or any(other):
            raise ValueError("FusedGRPOTrainer: token-level dapo, grpo, bnpo, dr_grpo, no corrections or entropy terms")

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
        ids, attended = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask"))
        mask = inputs["completion_mask"].bool()
        rows, length = mask.shape
        # the states before the head, and one position's logits, which nobody reads
        output = model(input_ids=ids, attention_mask=attended, output_hidden_states=True, logits_to_keep=1)
        hidden_TD = output.hidden_states[-1][:, -length - 1 : -1][mask]
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        share = self.accelerator.num_processes * (self.args.steps_per_generation if model.training else 1)
        divisor = {
            "dapo": inputs["num_items_in_batch"].clamp(min=1) / share,
            "grpo": rows * mask.sum(1, keepdim=True).clamp(min=1),
            "bnpo": mask.sum().clamp(min=1),
            "dr_grpo": rows * self.max_completion_length,
        }[self.loss_type]
        accumulation = self.current_gradient_accumulation_steps if model.training else 1
        old, ref = inputs.get("old_per_token_logps"), inputs.get("ref_per_token_logps")
        loss, _, metrics = linear_policy_loss(
            hidden_TD,
            head.weight.to(hidden_TD.dtype),
            inputs["completion_ids"][mask],
            advantage_T=inputs["advantages"][:, None].expand_as(mask)[mask],
            old_logprob_T=None if old is None else old[mask],
            weight_T=(mask / divisor)[mask] / accumulation,
            clip_low=self.epsilon_low,
            clip_high=self.epsilon_high,
            ref_logprob_T=None if ref is None else ref[mask],
            kl_coef=self.beta,
            temperature=self.temperature,
        )
        for name, value in metrics.items():
            self._metrics["train" if model.training else "eval"][name].append(value.item())
        return loss


if __name__ == "__main__":
    rows = [{"prompt": f"Count to {n}."} for n in range(2, 34)]
    FusedGRPOTrainer("Qwen/Qwen2.5-0.5B", lambda completions, **_: [*map(len, completions)], train_dataset=rows).train()
