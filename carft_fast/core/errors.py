"""What a run raises for its user. The command line prints the message alone.

After InputError, which comes before the first step, it exits with 2. After the others it exits with 1; --resume goes
on from the last checkpoint.
"""

from carft_fast.core.text import visible


class _VisibleError(Exception):
    def __str__(self) -> str:
        return visible(super().__str__())  # messages quote data and models, and tracebacks show them


class InputError(_VisibleError, ValueError):
    """Bad config, data, model folder or command line. The message names the thing, the value and what is allowed."""


class RewardError(_VisibleError, RuntimeError):
    """Rewards cannot be computed: a user's function returned something that is not a score, or a grader died."""


class EngineError(_VisibleError, RuntimeError):
    """The sampler is not started, out of memory, dead, or has other weights than the trainer. It says what to do."""


class TrainingError(_VisibleError, RuntimeError):
    """Training cannot go on: its gradients stopped being finite, or a disk is full."""


def first_line(error: Exception) -> str:
    """A library's error in one line, with its type where that is not a usual one."""
    text = str(error).strip().partition("\n")[0]
    plain = isinstance(error, (OSError, ValueError, ImportError))
    return text if text and plain else f"{type(error).__name__}: {text}".removesuffix(": ")
