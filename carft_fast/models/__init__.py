"""The causal LM with its two heads: loading, packed batches, attention, FLOPs, weights for a sampler."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
