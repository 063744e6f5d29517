"""Contrastive reinforced fine-tuning (CARFT) of language models that reason: the trainer. Start at `train_rl`."""

import os

QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DISABLE_SAFETENSORS_CONVERSION": "1",  # else transformers asks a service to convert pickled weights of the Hub
}
"""No library reports what is run here. Read when they are imported, so set first; what the user has set stays."""

for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)
