"""Sampling completions: one interface, an engine a file, weights in, completions out."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
