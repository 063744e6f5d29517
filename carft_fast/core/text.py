"""Texts of data, models, servers and libraries, made fit to be shown: nothing in them acts on a terminal."""

import json
import logging
import re
import warnings
from typing import Any

from carft_fast.core.redact import redact

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """A text whose control characters are written out (`\\x1b`): on a terminal those of data and models would act.

    So are halves of surrogate pairs, which no file takes. Tabs and ends of lines stay.
    """
    return _CONTROLS.sub(lambda match: ascii(match[0])[1:-1], text)


def visible_json(value: Any, *, indent: int | None = None) -> str:
    """JSON in the letters of its texts, with escapes for their control characters only. TOML has the same escapes."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


_plain_warning = warnings.formatwarning


class _Record(logging.LogRecord):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.exc_info and self.exc_info[0]:
            self.exc_text = visible(redact(logging.Formatter().formatException(self.exc_info)))

    def getMessage(self) -> str:
        return visible(redact(super().getMessage()))


def guard_library_output() -> None:
    """From now on this process's log records and warnings are redacted and visible: they quote models and data."""
    logging.setLogRecordFactory(_Record)
    for name in ("torchao", "torch.utils._pytree"):  # at its import torchao tells of devices that are not there
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.formatwarning = _format_warning


def _format_warning(*args: Any, **options: Any) -> str:
    return visible(redact(_plain_warning(*args, **options)))
