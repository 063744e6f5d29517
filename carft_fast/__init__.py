"""Contrastive reinforced fine-tuning (CARFT) of language models that reason: the trainer. Start at `train_rl`."""
