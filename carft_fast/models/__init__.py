"""The causal LM with its two heads: loading, packed batches, attention, FLOPs, weights for a sampler."""
