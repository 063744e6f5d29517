"""The token that servers ask for."""

import os
import re

from carft_fast.core import InputError

TOKEN = "CARFT_SERVER_TOKEN"
"""Environment variable with the token, where servers run and where the trainer does."""


def read_token(name: str = TOKEN) -> str | None:
    """The token in the environment; None where the variable is not set. Raises InputError for one that can be guessed.

    The message never has the token in it.
    """
    value = os.environ.get(name)
    if value is None:
        return None
    if not re.fullmatch(r"[\x21-\x7e]*", value):
        found = "has a space, or a character outside of ASCII"
    elif len(value) < 16:
        found = f"has {len(value)} character{'s' * (len(value) != 1)}"
    elif len(set(value)) < 5:
        found = f"has only {len(set(value))} different characters"
    else:
        return value
    raise InputError(
        f"{name} {found}: at least 16 visible ASCII characters are needed, 5 of them different, and no spaces, as "
        "`openssl rand -hex 32` prints them"
    )


def bearer(token: str | None) -> dict[str, str]:
    """Request headers with the token."""
    return {"Authorization": f"Bearer {token}"} if token else {}
