"""Sampling completions: one interface, engines behind it."""

from carft_fast.rollout.base import Rollout, RolloutEngine, SamplingParams, build_engine

__all__ = ["Rollout", "RolloutEngine", "SamplingParams", "build_engine"]
