"""The published ReFT trainer's own step: `train_one_epoch` of train_rl_reft.py from a clone, on one batch.

The clone is lqtrung1998/mwp_ReFT, or WNQzhu/CARFT, which carries the same file. `generate` gives the case's
completions and the grader its rewards; all else is the clone's: rows padded to the longest, logits of every position,
a look with policy and reference, the updates. Its value head is carft_fast's "separate" one, with the same weights.
"""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.peers.carft_side import CPU, side_config
from benchmarks.peers.stand_ins import CausalLMWithValueHead, import_published
from benchmarks.peers.turns import Turns, serve
from benchmarks.peers.work import Done, Work
from carft_fast.errors import InputError
from carft_fast.model import load_model

TRAINER = "train_rl_reft"


def trainer_folder(repo: Path) -> Path:
    for folder in (repo, repo / "code" / "mwp_ReFT"):
        if (folder / f"{TRAINER}.py").is_file():
            return folder
    raise InputError(f"--repo {repo}: neither it nor its code/mwp_ReFT holds {TRAINER}.py")


class PublishedSide:
    def __init__(self, work: Work, repo: Path) -> None:
        self._work = work
        assert work.completions is not None, "the published step is timed on given completions"
        config = side_config(work, ['model.value_head="separate"'])
        rl = config.rl
        tokenizer = AutoTokenizer.from_pretrained(work.model)
        used = {token for ids in [*work.prompts, *work.completions] for token in ids} | {tokenizer.eos_token_id}
        # the trainer tells padding from text by its id
        tokenizer.pad_token_id = next(token for token in range(len(tokenizer)) if token not in used)
        self._tokenizer = tokenizer
        heads = load_model(config, work.model, CPU, heads=True).heads
        assert heads is not None
        self.model = CausalLMWithValueHead(self._language_model(), heads.summary)
        self._reference = CausalLMWithValueHead(self._language_model(), torch.nn.Linear(*heads.summary.weight.T.shape))
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=work.lr, eps=rl.eps, weight_decay=0.0)
        self._optimizer.register_step_pre_hook(lambda *_: self._before_update())
        self.gradient: dict[str, Tensor] | None = None
        self._module = import_published(trainer_folder(repo), TRAINER)
        self._args = {
            "model_dir": "",
            "engine": "nl",
            "max_gen_length": 0,
            "batch_size": work.samples,
            "mini_batch_size": work.samples,
            "ppo_epochs": rl.ppo_epochs,
            "clip_grad_norm": rl.max_grad_norm,
            "vf_coef": rl.value_coef,
            "kl_coef": rl.kl_coef,
            "gamma": rl.gamma,
            "lam": rl.lam,
            "adv_whitening": "global",
            "wandb_log": False,
            "n_epochs": 1,
            "keep_num_ckpt": 0,
        }
        self._connect()

    def weights(self) -> dict[str, Tensor]:
        return dict(self.model.pretrained_model.named_parameters())

    def _language_model(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self._work.model, dtype=torch.float32, attn_implementation="sdpa")

    def _connect(self) -> None:
        """What the trainer takes from its environment: one process, the case's samples and rewards."""
        module, work = self._module, self._work
        accelerator = Accelerator(cpu=True)
        module.accelerator = accelerator
        backward = accelerator.backward

        def noted(loss: Tensor) -> None:
            self._losses.append(float(loss.detach()))
            backward(loss)

        accelerator.backward = noted
        for place in (module, sys.modules["src.utils"]):
            place.allgather = lambda tensor, group=None: tensor[None]
            place.do_gather = lambda numbers: numbers
        module.setup_cot("svamp")
        # an answer of None scores 0
        module.post_process_answer_cot_fn_mapper["nl", "svamp"] = lambda texts: [r or None for r in work.rewards]
        module.compare_answer_fn_mapper["svamp"] = lambda extracted, target: True
        module.post_process_final_answer_fn_mapper["svamp"] = lambda text: text
        rollout = module.rollout

        def counted(*args: Any, **kwargs: Any) -> Any:
            found = rollout(*args, **kwargs)
            ids, real, completion = found[:3]
            self._done.samples = len(ids)
            self._done.completion_tokens = int(completion.sum())
            self._done.prompt_tokens = int(real.sum()) - self._done.completion_tokens
            self._done.positions = ids.numel()
            return found

        module.rollout = counted
        self.model.generate = lambda **_: self._completed

    def _before_update(self) -> None:
        self._done.optimizer_steps += 1
        if self.gradient is None:
            named = self.model.pretrained_model.named_parameters()
            self.gradient = {name: p.grad.clone() for name, p in named if p.grad is not None}

    def _batch(self) -> dict[str, Any]:
        """The collated batch, prompts padded on the left, and what generate will give: padded on the right."""
        work, pad = self._work, self._tokenizer.pad_token_id
        assert work.completions is not None
        k = work.samples_per_prompt
        prompts = [prompt for prompt in work.prompts for _ in range(k)]
        wide, long = max(map(len, prompts)), max(map(len, work.completions))
        query = torch.tensor([[pad] * (wide - len(p)) + p for p in prompts])
        answers = torch.tensor([c + [pad] * (long - len(c)) for c in work.completions])
        self._completed = torch.cat([query, answers], 1)
        forward = {
            "query": [text for text in work.texts for _ in range(k)],
            "query_tensors": query,
            "query_tensors_attention_mask": query != pad,
            "answer_values": [answer for answer in work.answers for _ in range(k)],
        }
        return {"ppo_forward_kwargs": forward}

    def step(self, done: Done) -> None:
        self._done, self._losses = done, []
        self._module.train_one_epoch(
            args=self._args,
            model=self.model,
            ref_model=self._reference,
            train_dataset=[{"item_id": "svamp_0"}],
            train_dataloader=[self._batch()],
            test_dataset=None,
            test_dataloader=None,
            optimizer=self._optimizer,
            scheduler=SimpleNamespace(step=lambda: None),
            global_step=0,
            global_iter_num=0,
            tokenizer=self._tokenizer,
            prefix="",
            epoch=1,
            best_eval_log_dict={},
            summary_log_dict={},
            most_recent_ckpts_paths=[],
        )
        done.loss = sum(self._losses) / len(self._losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--work", "--folder"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--setting", type=json.loads, required=True, help='{"repo": folder of the clone}')
    arguments = parser.parse_args()
    turns, work = Turns(), Work.load(arguments.work)
    side = PublishedSide(work, Path(arguments.setting["repo"]))
    serve(side, work, arguments.folder, turns)


if __name__ == "__main__":
    main()
