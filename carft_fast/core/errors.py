"""What a user can get wrong."""


class InputError(ValueError):
    """Bad input: config, data, model folder, command line. The message names the thing, the value and what is allowed.

    The command line prints the message alone and exits with 2.
    """


class RewardError(RuntimeError):
    """Rewards cannot be computed: a user's function returned something else than scores, or a grader died.

    The command line prints the message alone and exits with 1; --resume goes on from the last checkpoint.
    """


class EngineError(RuntimeError):
    """The sampler cannot go on: not started, out of memory, dead, or with other weights than the trainer's.

    The message says what to do. The command line prints it alone and exits with 1; --resume goes on from the last
    checkpoint.
    """


class TrainingError(RuntimeError):
    """Training cannot go on: its gradients stopped being finite, or a disk takes no more.

    The command line prints the message alone and exits with 1; --resume goes on from the last checkpoint.
    """


def first_line(error: Exception) -> str:
    """A library's error in one line, with its type where that is not a usual one."""
    text = str(error).strip().partition("\n")[0]
    plain = isinstance(error, (OSError, ValueError, ImportError))
    return text if text and plain else f"{type(error).__name__}: {text}".removesuffix(": ")
