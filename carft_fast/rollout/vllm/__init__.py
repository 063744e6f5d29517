"""vLLM as a sampler: in the trainer's process, or as servers."""
