"""Steps of a run on fake tensors, in a process of its own: a request a line on stdin, an answer a line on stdout.

Weights are never read: a model is made from its config, with as many layers as the request says.
"""

import contextlib
import json
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from carft_fast import training
from carft_fast.config import Config, load_config
from carft_fast.core import Example, InputError, own_turns, world_size
from carft_fast.data import EncodedExample
from carft_fast.models import CarftModel, load
from carft_fast.objective import Rows, build_passes
from carft_fast.plan.fake import GRADIENTS, HOST, WEIGHTS, Recorder, cuda_path, watch_resizes
from carft_fast.rewards import Grade
from carft_fast.rollout import Rollout
from carft_fast.training import Needs, reference, strategy

DEVICE = HOST_DEVICE = torch.device("cpu")
"""Where a plan's tensors are, by name; tests put DEVICE on a fake GPU."""


class _ModelsOfConfigs:
    """What `load` reads models with, without a file or the Hub."""

    def __init__(self) -> None:
        self.layers = 0
        self._real, self._lm_config = load.AutoModelForCausalLM, load.load_lm_config
        self.from_config = self._real.from_config

    def lm_config(self, config: Any) -> Any:
        lm_config = self._lm_config(config)
        text = lm_config.get_text_config()
        text.num_hidden_layers = self.layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[: self.layers]
        return lm_config

    def from_pretrained(self, path: str, *, config: Any, **options: Any) -> Any:
        kept = {name: options[name] for name in ("dtype", "attn_implementation", "trust_remote_code")}
        return self.from_config(config, **kept), {"missing_keys": []}


def install_models() -> _ModelsOfConfigs:
    models = _ModelsOfConfigs()
    stand_ins = {"AutoModelForCausalLM": models, "load_lm_config": models.lm_config, "check_hub": lambda *_: None}
    stand_ins["on_main"] = lambda work: work()  # this process is the main one, and there are no others to tell
    for name, stand_in in stand_ins.items():
        setattr(load, name, stand_in)
    return models


def join(processes: int) -> None:
    """A group whose other processes do not exist; what they would send has the right shape."""
    import torch.distributed as dist
    from torch.distributed import device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    make_mesh = device_mesh.init_device_mesh

    def init_device_mesh(*args: Any, **options: Any) -> Any:
        with _disable_current_modes():  # ranks are numbers that the host reads
            return make_mesh(*args, **options)

    device_mesh.init_device_mesh = init_device_mesh


def name_memory_of_fsdp(recorder: Recorder) -> None:
    """What it gathers and adds up; and DTensor's whole tensors, of which it wants the shape, are nowhere."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as fsdp
    from torch.distributed.tensor._sharding_prop import ShardingPropagator

    def name_memory(holder: Any, function: str, part: str) -> None:
        real = getattr(holder, function)

        def within(*args: Any, **options: Any) -> Any:
            if part == GRADIENTS:
                recorder.mark("whole gradients", [x for x in args if isinstance(x, list)])
            with recorder.making(part):
                return real(*args, **options)

        setattr(holder, function, within)

    watch_resizes(recorder)
    name_memory(fsdp, "foreach_all_gather", "gathered weights")
    name_memory(fsdp, "foreach_all_gather_copy_out", "gathered weights")
    name_memory(fsdp, "foreach_reduce", GRADIENTS)
    name_memory(ShardingPropagator, "_propagate_tensor_meta_non_cached", HOST)


class Stage:
    """Model and optimizer of a stage that is under way: with moments.

    A backward pass and an optimizer step are phases of their own, "<phase>: <part>": what is alive changes within them
    by other amounts a layer, so that the peak of all of them together would not be linear in the layers.
    """

    def __init__(self, recorder: Recorder, config: Config, stage: Any) -> None:
        self._recorder, self._divided = recorder, strategy(config) == "fsdp2"
        with recorder.at("load"):
            model = self.load_model(config, config.model.path, HOST_DEVICE if self._divided else DEVICE, heads=True)
            self.learner = training.build_learner(config, model, stage, DEVICE)
            self.model = self.learner.model
            recorder.mark(WEIGHTS, list(self.model.parameters()))

    def start(self) -> None:
        """The moments, and the phases of a step."""
        recorder, learner = self._recorder, self.learner
        trained = [p for p in self.model.parameters() if p.requires_grad]
        for p in trained:
            p.grad = torch.zeros_like(p)
        learner.optimizer.step()
        learner.optimizer.zero_grad()
        recorder.mark("moments", [list(state.values()) for state in learner.optimizer.state.values()])
        learner.optimizer.register_step_pre_hook(lambda *_: recorder.mark(GRADIENTS, [p.grad for p in trained]))
        learner.backward = self._phase("backward", learner.backward)  # type: ignore[method-assign]
        learner.step = self._phase("optimizer", learner.step)  # type: ignore[method-assign]
        self.model.layers()[0].register_forward_pre_hook(self._recomputed)

    def load_model(self, *args: Any, **options: Any) -> CarftModel:
        """With FSDP2 it is whole in host memory alone."""
        with self._recorder.making(HOST) if self._divided else contextlib.nullcontext():
            return load.load_model(*args, **options)

    def _phase(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def within(*args: Any, **options: Any) -> Any:
            with self._recorder.at(f"{self._recorder.name.partition(':')[0]}: {name}"):
                return function(*args, **options)

        return within

    def _recomputed(self, *_: Any) -> None:
        """The first layer, in a backward pass: all others have their gradients."""
        name = self._recorder.name
        if name.endswith(": backward"):
            self._recorder.enter(f"{name}, end")


def sequences(vocabulary: int, count: int, length: int) -> list[list[int]]:
    return [[(i + j) % vocabulary for j in range(length)] for i in range(count)]


def run_sft(recorder: Recorder, config: Config, vocabulary: int, prompt: int, completion: int) -> None:
    """A step of `train_sft`."""
    settings = config.sft
    stage = Stage(recorder, config, settings)
    stage.start()
    model, learner = stage.model, stage.learner
    n = settings.batch_size
    batch = Rows(sequences(vocabulary, n, prompt), sequences(vocabulary, n, completion))
    with recorder.at("evaluation"):
        pass
    with recorder.at("sft"):
        passes = build_passes(config, model, settings.micro_batch_tokens)
        loss_sum = torch.zeros((), device=DEVICE)
        own = own_turns(passes.micro_batches(batch, world_size()))
        for number, micro in enumerate(own):
            loss = model(passes.cross_entropy, batch.pick_or_shortest(micro), sum(batch.lengths))
            learner.backward(loss, last=number == len(own) - 1)
            loss_sum += loss.detach()
        norm, skipped = learner.step(settings.lr, settings.max_grad_norm, loss_sum)
        read(loss_sum, norm, skipped)


def run_rl(recorder: Recorder, config: Config, vocabulary: int, prompt: int, completion: int) -> None:
    """A step of `train_rl` behind its rollouts."""
    stage = Stage(recorder, config, config.rl)
    reference.load_model = stage.load_model
    setattr(training.Reference, "_to_device", lambda _, weight: weight.clone())  # noqa: B010
    frozen = None
    if Needs.of(config).reference:
        with recorder.at("load"), recorder.making("reference"):
            frozen = training.Reference(config, config.model.path, stage.model)
            if config.rl.reference_offload and frozen._copy is not None:
                recorder.mark(HOST, list(frozen._copy.parameters()))
    stage.start()
    with recorder.at("rollout"):
        step = training.Step(config, stage.learner, frozen)
    n, per_prompt = config.rl.batch_size, config.rollout.samples_per_prompt
    prompts, cots = (sequences(vocabulary, n // per_prompt, length) for length in (prompt, completion))
    rows = [
        EncodedExample(Example(str(i), "", (), "1"), prompts[i], (cots[i],))
        for i in range(n // per_prompt)
        for _ in range(per_prompt)
    ]
    rollouts = [Rollout(ids, [-1.0] * completion, "stop", 0) for ids in sequences(vocabulary, n, completion)]
    grades = [Grade(i % 2 > 0, 1.0) for i in range(n)]
    with recorder.at("forward"):
        samples = training.as_samples(rows, rollouts, DEVICE)
        experience = step.make_experience(samples, 1)
        score_N = training.score_rollouts(grades, experience.cosine_N, config, DEVICE)
        advantages = training.estimate_advantages(score_N, experience, config)
    with recorder.at("update"):
        step.update(experience, advantages, [grade.correct for grade in grades], config.rl.lr)


def read(*numbers: Tensor) -> None:
    for x in numbers:
        float(x)


def run(request: dict[str, Any], recorder: Recorder, models: _ModelsOfConfigs) -> dict[str, Any]:
    models.layers = request["layers"]
    config = parse_config(request["config"])
    vocabulary = models.lm_config(config.model).get_text_config().vocab_size
    stage = {"sft": run_sft, "rl": run_rl}[request["stage"]]
    recorder.restart()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), recorder:
            stage(recorder, config, vocabulary, request["prompt"], request["completion"])
    except InputError as error:
        return {"input_error": str(error)}
    except Exception:
        return {"error": traceback.format_exc()}
    return {name: phase.report() for name, phase in recorder.phases.items()}


def parse_config(text: str) -> Config:
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(text)
        file.flush()
        return load_config(file.name)


def main() -> None:
    processes, *capability = map(int, sys.argv[1:])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    warnings.filterwarnings("ignore")  # of fake tensors, which a user of the command does not know of
    recorder = Recorder()
    cuda_path(recorder, (capability[0], capability[1]))
    if processes > 1:
        join(processes)
        name_memory_of_fsdp(recorder)
    models = install_models()
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line), recorder, models)), file=answers, flush=True)


if __name__ == "__main__":
    main()
