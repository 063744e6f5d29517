"""The published trainers' own steps, imported from a clone: ReFT's `train_one_epoch` and CARFT's `MyCLTrainer.train`.

The clone is WNQzhu/CARFT, or for ReFT alone lqtrung1998/mwp_ReFT. `generate` gives the case's completions and the
grader its rewards; all else is the clone's: rows padded to the longest, logits of every position, a look with policy
and reference (CARFT's with the annotated CoTs too), the updates. Heads are carft_fast's, with the same weights.
"""

import argparse
import json
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.peers.carft_side import CPU, side_config
from benchmarks.peers.stand_ins import CausalLMWithHeads, CausalLMWithValueHead, import_published, nothing
from benchmarks.peers.turns import Turns, serve
from benchmarks.peers.work import Done, Work
from carft_fast.core import InputError
from carft_fast.models import CarftHeads, load_model

REFT, CARFT = "mwp_ReFT/train_rl_reft.py", "vae/scripts/my_cl_trainer_v4.py"
"""In a clone's `code`. v4 is the trainer of the paper's figures, its readme says."""


def trainer_file(repo: Path, name: str) -> Path:
    for file in (repo / "code" / name, repo / Path(name).name):
        if file.is_file():
            return file
    raise InputError(f"--repo {repo}: neither it nor its code/{Path(name).parent} holds {Path(name).name}")


class PublishedSide(ABC):
    def __init__(self, work: Work, repo: Path, trainer: str, options: list[str]) -> None:
        self._work = work
        assert work.completions is not None, "the published step is timed on given completions"
        self.config = side_config(work, options)
        rl = self.config.rl
        tokenizer = AutoTokenizer.from_pretrained(work.model)
        rows = [*work.prompts, *work.completions, *(work.annotated or [])]
        used = {token for ids in rows for token in ids} | {tokenizer.eos_token_id}
        # the trainer tells padding from text by its id
        tokenizer.pad_token_id = next(token for token in range(len(tokenizer)) if token not in used)
        self.tokenizer = tokenizer
        heads = load_model(self.config, work.model, CPU, heads=True).heads
        assert heads is not None
        self.model = self.with_heads(heads)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=work.lr, eps=rl.eps, weight_decay=0.0)
        self._optimizer.register_step_pre_hook(lambda *_: self._before_update())
        self.gradient: dict[str, Tensor] | None = None
        file = trainer_file(repo, trainer)
        self.module = import_published(file.parent, file.stem)
        self.accelerator: Any = Accelerator(cpu=True)
        self.accelerator.print = nothing
        backward = self.accelerator.backward

        def noted(loss: Tensor) -> None:
            self._losses.append(float(loss.detach()))
            backward(loss)

        self.accelerator.backward = noted
        self.schedule = SimpleNamespace(step=nothing)
        self.model.generate = lambda **_: self.completed()
        self.connect()

    @abstractmethod
    def with_heads(self, heads: CarftHeads) -> Any: ...

    @abstractmethod
    def connect(self) -> None:
        """What the trainer takes from its environment: one process, the case's samples and rewards."""

    @abstractmethod
    def train(self) -> None: ...

    def one_process(self, *places: ModuleType) -> None:
        for place in places:
            vars(place)["allgather"] = lambda tensor, group=None: tensor.detach()[None]

    def language_model(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self._work.model, dtype=torch.float32, attn_implementation="sdpa")

    def weights(self) -> dict[str, Tensor]:
        return dict(self.model.pretrained_model.named_parameters())

    def _before_update(self) -> None:
        self._done.optimizer_steps += 1
        if self.gradient is None:
            named = self.model.pretrained_model.named_parameters()
            self.gradient = {name: p.grad.clone() for name, p in named if p.grad is not None}

    def repeated(self, items: list[Any]) -> list[Any]:
        """One for every sample."""
        return [item for item in items for _ in range(self._work.samples_per_prompt)]

    def completed(self) -> Tensor:
        """Prompts padded on the left, completions on the right."""
        assert self._work.completions is not None
        pad, prompts = self.tokenizer.pad_token_id, self.repeated(self._work.prompts)
        wide, long = max(map(len, prompts)), max(map(len, self._work.completions))
        rows = zip(prompts, self._work.completions, strict=True)
        return torch.tensor([[pad] * (wide - len(p)) + p + c + [pad] * (long - len(c)) for p, c in rows])

    def counted(self, ids: Tensor, real: Tensor, completion: Tensor) -> None:
        self._done.samples = len(ids)
        self._done.completion_tokens = int(completion.sum())
        self._done.prompt_tokens = int(real.sum()) - self._done.completion_tokens
        self._done.positions = ids.numel()

    def step(self, done: Done) -> None:
        self._done, self._losses = done, []
        self.train()
        done.loss = sum(self._losses) / len(self._losses)


class ReftSide(PublishedSide):
    def __init__(self, work: Work, repo: Path) -> None:
        super().__init__(work, repo, REFT, ['model.value_head="separate"'])

    def with_heads(self, heads: CarftHeads) -> Any:
        self._reference = CausalLMWithValueHead(self.language_model(), torch.nn.Linear(*heads.summary.weight.T.shape))
        return CausalLMWithValueHead(self.language_model(), heads.summary)

    def connect(self) -> None:
        module, work, rl = self.module, self._work, self.config.rl
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
        module.accelerator = self.accelerator
        self.one_process(module, sys.modules["src.utils"])
        module.do_gather = sys.modules["src.utils"].do_gather = lambda numbers: numbers
        module.setup_cot("svamp")
        # an answer of None scores 0
        module.post_process_answer_cot_fn_mapper["nl", "svamp"] = lambda texts: [r or None for r in work.rewards]
        module.compare_answer_fn_mapper["svamp"] = lambda extracted, target: True
        module.post_process_final_answer_fn_mapper["svamp"] = lambda text: text
        rollout = module.rollout

        def counted(*args: Any, **kwargs: Any) -> Any:
            found = rollout(*args, **kwargs)
            self.counted(*found[:3])
            return found

        module.rollout = counted

    def _batch(self) -> dict[str, Any]:
        """As its data loader collates it."""
        query = self.completed()[:, : max(map(len, self._work.prompts))]
        forward = {
            "query": self.repeated(self._work.texts),
            "query_tensors": query,
            "query_tensors_attention_mask": query != self.tokenizer.pad_token_id,
            "answer_values": self.repeated(self._work.answers),
        }
        return {"ppo_forward_kwargs": forward}

    def train(self) -> None:
        self.module.train_one_epoch(
            args=self._args,
            model=self.model,
            ref_model=self._reference,
            train_dataset=[{"item_id": "svamp_0"}],
            train_dataloader=[self._batch()],
            test_dataset=None,
            test_dataloader=None,
            optimizer=self._optimizer,
            scheduler=self.schedule,
            global_step=0,
            global_iter_num=0,
            tokenizer=self.tokenizer,
            prefix="",
            epoch=1,
            best_eval_log_dict={},
            summary_log_dict={},
            most_recent_ckpts_paths=[],
        )


class CarftSide(PublishedSide):
    """`train` of an object that its constructor, which wants data sets and a launcher, has not made."""

    def __init__(self, work: Work, repo: Path, options: list[str]) -> None:
        super().__init__(work, repo, CARFT, options)

    def with_heads(self, heads: CarftHeads) -> Any:
        self._reference = self.language_model()
        return CausalLMWithHeads(self.language_model(), heads.proj, heads.summary)

    def connect(self) -> None:
        module, work, rl, contrastive = self.module, self._work, self.config.rl, self.config.contrastive
        assert work.annotated is not None
        rows = [
            {
                "prefix": prompt,
                "prefix_attention_mask": [1] * len(prompt),
                "input_ids": prompt + annotated,
                "prefix_text": text,
                "answer_value": answer,
            }
            for prompt, annotated, text, answer in zip(
                work.prompts, work.annotated, work.texts, work.answers, strict=True
            )
        ]
        self.one_process(module, sys.modules["utils"])
        module.get_rewards = lambda args, programs, answers: work.rewards
        module.batch_generation = lambda model, *_: (model.generate(), None)
        trainer = self._trainer = object.__new__(module.MyCLTrainer)
        stage = SimpleNamespace(
            num_total_batches=1,
            num_train_epochs=0.5,  # no evaluation after the step
            total_episodes=work.samples,
            batch_size=work.samples,
            local_batch_size=work.samples,
            local_mini_batch_size=work.samples,
            per_device_train_batch_size=work.samples,
            num_mini_batches=1,
            gradient_accumulation_steps=1,
            num_ppo_epochs=rl.ppo_epochs,
            vf_coef=rl.value_coef,
            kl_coef=rl.kl_coef,
            cl_coef=contrastive.coef,
            cl_tau=contrastive.temperature,
            gamma=rl.gamma,
            lam=rl.lam,
            adv_whitening="global",
            max_length=self.config.data.max_length,
            cot={"cot_trigger": "\nAnswer reasoning:\n"},
            ds3_gather_for_generation=True,
            logging_steps=None,
            eval_steps=None,
            save_steps=None,
        )
        vars(trainer).update(
            args=stage,
            accelerator=self.accelerator,
            model=self.model,
            ref_model=self._reference,
            optimizer=self._optimizer,
            lr_scheduler=self.schedule,
            processing_class=self.tokenizer,
            dataloader=[module.train_collate_fn(self.repeated(rows), stage, self.tokenizer)],
            local_dataloader_batch_size=work.samples,
            train_dataset_len=work.samples,
            state=SimpleNamespace(),
            control=SimpleNamespace(should_save=False),
            callback_handler=SimpleNamespace(
                on_train_begin=lambda args, state, control: control, on_train_end=lambda args, state, control: control
            ),
            is_deepspeed_enabled=False,
            log=nothing,
        )
        rollout = trainer.rollout

        def counted(*args: Any) -> Any:
            found = rollout(*args)
            self.counted(*found[:3])
            annotated_rows = found[13]
            self._done.annotated_tokens = int(annotated_rows.sum()) - self._done.prompt_tokens
            return found

        trainer.rollout = counted

    def train(self) -> None:
        self._trainer.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--work", "--folder"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--setting", type=json.loads, required=True, help='{"repo": clone, "options": of CARFT}')
    arguments = parser.parse_args()
    turns, work, setting = Turns(), Work.load(arguments.work), arguments.setting
    repo = Path(setting["repo"])
    side = CarftSide(work, repo, setting["options"]) if work.annotated else ReftSide(work, repo)
    serve(side, work, arguments.folder, turns)


if __name__ == "__main__":
    main()
