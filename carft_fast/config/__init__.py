"""Settings: their bounds and documentation, TOML in and out, and methods as presets of them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
