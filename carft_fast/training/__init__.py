"""The stages: SFT and RL, one loop around their steps, checkpoints, evaluation, several processes."""
