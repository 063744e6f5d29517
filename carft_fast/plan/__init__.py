"""Before a GPU is rented: does a run fit, and how long does a step take. Nothing here was ever run on a GPU."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
