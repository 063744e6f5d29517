"""What every room needs: errors, seeds, processes, files that survive a kill, what a run says."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
