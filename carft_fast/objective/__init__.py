"""The mathematics of a step: advantages, losses, and how sequences go through the model for them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
