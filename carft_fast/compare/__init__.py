"""Methods side by side: runs from one SFT checkpoint per seed, statistics, a report."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
