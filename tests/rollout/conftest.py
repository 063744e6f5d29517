"""A real vLLM on the CPU for tests that ask for one: an engine in this process, two servers, shared by the session."""

import copy
import os
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from carft_fast.models.causal_lm import CarftModel
from carft_fast.models.load import load_model
from carft_fast.rollout.base import RolloutEngine
from carft_fast.rollout.vllm.engine import VLLMEngine
from carft_fast.rollout.vllm.servers import VLLMServerEngine

from .checks import CPU, EOS, make_config, perturb

# The servers' token, known here and in the processes that tests start.
os.environ.setdefault("CARFT_SERVER_TOKEN", "a-token-for-tests")


@pytest.fixture(scope="session")
def base_model() -> CarftModel:
    model = load_model(make_config(), "synthetic", CPU, heads=True)
    perturb(model, 0)
    return model


@pytest.fixture
def model(base_model: CarftModel) -> CarftModel:
    return copy.deepcopy(base_model)


@pytest.fixture(scope="session")
def local_engine(base_model: CarftModel) -> Iterator[VLLMEngine]:
    engine = VLLMEngine(make_config("rollout.engine=vllm"), base_model, [EOS])
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def at_the_end(local_engine: VLLMEngine) -> Iterator[ExitStack]:
    """Closes further engines: the first that closes takes with it what vLLM's engines of a process share."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="session")
def compiled_engine(base_model: CarftModel, at_the_end: ExitStack) -> VLLMEngine:
    engine = VLLMEngine(make_config("rollout.engine=vllm", "model.compile=true"), base_model, [EOS])
    at_the_end.callback(engine.close)
    return engine


@pytest.fixture(scope="session")
def wide_engine(base_model: CarftModel, at_the_end: ExitStack) -> VLLMEngine:
    """For many short completions at once."""
    options = ["rollout.engine=vllm", "rollout.batch_size=512", "rollout.draft_budget=100000"]
    engine = VLLMEngine(make_config(*options), base_model, [EOS])
    at_the_end.callback(engine.close)
    return engine


@pytest.fixture(scope="session")
def server_lines() -> list[str]:
    """What the servers' engine has said."""
    return []


@pytest.fixture(scope="session")
def server_engine(
    base_model: CarftModel, server_lines: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VLLMServerEngine]:
    """Two servers; the entries of server_devices mean nothing on a CPU but their number."""
    config = make_config("rollout.engine=vllm-server", 'rollout.server_devices=["0", "1"]')
    engine = VLLMServerEngine(
        config, base_model, [EOS], folder=tmp_path_factory.mktemp("servers"), log=server_lines.append
    )
    yield engine
    engine.close()


@pytest.fixture(params=["vllm", "vllm-server"])
def engine(request: pytest.FixtureRequest) -> RolloutEngine:
    """Each engine in turn."""
    return request.getfixturevalue("local_engine" if request.param == "vllm" else "server_engine")
