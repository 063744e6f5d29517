"""What a run leaves for people to read: metrics, curves and one HTML page."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
