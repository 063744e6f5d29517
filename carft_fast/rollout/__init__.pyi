from .base import Rollout as Rollout
from .base import RolloutEngine as RolloutEngine
from .base import SamplingParams as SamplingParams
from .checked import CheckedEngine as CheckedEngine
from .engines import build_engine as build_engine
from .shared import SpreadEngine as SpreadEngine
from .stream import RolloutStream as RolloutStream
from .vllm.adapter import check_engine as check_engine
