"""Secrets in text that is shown or saved: masked by their shape, and by value where the environment holds them."""

import os
import re

MASK = "***"
SECRET_VARIABLES = ("CARFT_SERVER_TOKEN", "VLLM_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")

_SHAPES = [
    re.compile(shape)
    for shape in (
        r"(?<=://)()[^\s/@\"']+(?=@)",  # user:password of a URL
        r"(?i)([?&][\w.-]*(?:token|key|secret|password)=)[^\s&\"'#]+",  # its query
        r"(?i)(\b[\w.-]*(?:token|secret|password|api_?key)[\"']?\s*=\s*[\"']?)[^\s&\"',;)]+",  # an assignment
        r"(?i)(\bauthorization[\"']?\s*[:=]\s*[\"']?(?:(?:bearer|basic)\s+)?)[^\s\"',}]+",
        r"(\bBearer\s+)[^\s\"',}]+",
        r"()\bhf_[A-Za-z0-9]{20,}",
        r"()\bsk-(?=[\w-]*\d)[\w-]{20,}",
    )
]


def masked(text: str) -> str:
    """Without what has the shape of a secret."""
    for shape in _SHAPES:
        text = shape.sub(rf"\g<1>{MASK}", text)
    return text


def redact(text: str) -> str:
    """For everything that is logged, saved or printed as an error."""
    for name in SECRET_VARIABLES:
        value = os.environ.get(name, "")
        if len(value) >= 8:  # a shorter one is part of ordinary words
            text = text.replace(value, MASK)
    return masked(text)
