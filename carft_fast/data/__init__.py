"""Questions with annotated reasoning: reading, checking, and turning them into prompts and token ids."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
