"""Secrets in text that is shown or saved: masked by their shape, and by value where the environment holds them.

The shapes are our own: detect-secrets, which is made to scan files, misses most secrets in running text without its
entropy checks, and with them takes most of our ordinary lines for secrets (docs/LOG.md, 2026-11-30).
"""

import os
import re
from urllib.parse import quote

MASK = "***"

_NAME = (
    "".join(f"(?<!{word}[_-])" for word in ("eos", "bos", "pad", "unk", "sep", "cls", "mask", "image", "stop", "next"))
    + r"(?:token|secret|passw(?:or)?d|passphrase|pwd|credentials?"
    + r"|(?:api|access|secret|private|auth|account|signing|encryption)[_-]?key)"
)
"""How the name of a secret ends: `hf_token`, `SECRET_ACCESS_KEY`, but not `token_ids`, `max_tokens`, `pad_token`."""
_QUOTED = r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'"
_IN_QUOTES = r"(?P<quote>[\"'])(?:(?!(?P=quote)|\\).|\\.)*(?=(?P=quote))"
_HARMLESS = r"(?!(?:\d{1,6}|none|null|true|false|<[^<>\s]{0,40}>)(?![^\s&\"',;)}\]]))"
_RANDOM = r"(?=[\w.~+/=-]{0,200}\d)(?=[\w.~+/=-]{0,200}[A-Za-z])[\w.~+/=-]"
"""Has a letter and a digit; a number of repetitions follows."""

_SHAPES = [
    re.compile(shape)
    for shape in (
        r"(?s)()-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
        # user:password of a URL, where the password may have / and @ in it; a port is none
        r"(?<=://)()[^\s/@:\"']{0,100}:(?!\d{1,5}(?:[/?#\s]|$))[^\s\"']{0,200}(?=@)",
        r"(?<=://)()[^\s/@\"']+(?=@)",
        r"(?i)([?&][\w.-]{0,64}?(?:token|key|secret|password|sig|signature|credential)=)[^\s&\"'#]+",
        # headers
        r"(?i)(\b(?:proxy-)?authorization[\"']?\s*[:=]\s*[\"']?(?:digest|aws4-hmac-sha256)\s)[^\n]+",
        r"(?i)(\b(?:proxy-)?authorization[\"']?\s*[:=]\s*[\"']?(?:(?:bearer|basic|token|api-?key|negotiate|ntlm|digest|aws4-hmac-sha256)\s+)?)"
        r"[^\s\"',}]+",
        r"(\bBearer\s+)[^\s\"',}]+",
        r"(?i)(\bbearer\s+)(?=[^\s\"',}]*[\d._~+/=-]\w|[^\s\"',}]{20})[^\s\"',}]+",
        r"(?i)(\bx-[\w-]{0,20}(?:key|token|secret)[\"']?\s*:\s*[\"']?)[^\s\"',}]+",
        r"(?i)(\b(?:set-)?cookie[\"']?\s*:\s*[\"']?)[^\n\"']+",
        # options of a command
        rf"(?i)((?<![\w-])--[\w-]{{0,40}}?{_NAME}(?:=|\s+))(?!(?:is|or|and|option|flag|was|needs|in|to|for|with|of)\b)"
        rf"(?!-)(?:{_QUOTED}|[^\s\"']+)",
        # assignments
        rf"(?i)({_NAME}[\"']?\s*=\s*){_HARMLESS}{_IN_QUOTES}",
        rf"(?i)({_NAME}[\"']?\s*=\s*[\"']?){_HARMLESS}(?:[^\s&\"',;)]|[,;](?=[^\s,;\"')]))+",
        rf"(_KEY\s*=\s*[\"']?){_RANDOM}{{8,}}",
        rf"(?i)((?<![A-Za-z])key[\"']?\s*=\s*[\"']?){_RANDOM}{{16,}}",
        # JSON and YAML
        rf"(?i)({_NAME}[\"']\s*:\s*){_HARMLESS}{_IN_QUOTES}",
        rf"(?im)^([ \t]*(?:-[ ]+)?[\w.-]{{0,64}}?{_NAME}[ ]*:[ ]+){_HARMLESS}(?:{_QUOTED}|\S+(?=[ \t\r]*$))",
        rf"(?i)({_NAME}[\"']?\s*:\s*){_RANDOM}{{8,}}",
        # what providers give out
        r"()\bhf_[A-Za-z0-9]{20,}",
        r"()\bsk-(?=[\w-]*\d)[\w-]{20,}",
        r"()\bgh[pousr]_[A-Za-z0-9]{20,}",
        r"()\bgithub_pat_\w{20,}",
        r"()\bglpat-[\w-]{20,}",
        r"()\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
        r"()\bAIza[\w-]{35}",
        r"()\bxox[a-z]-[\w-]{10,}",
        r"()\bnpm_[A-Za-z0-9]{30,}",
        r"()\bpypi-AgE[\w-]{20,}",
        r"()\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+",  # JSON web tokens
    )
]
_SECRET_VARIABLE = re.compile(
    r"(?i)(?:^|_)(?:token|secret|passw(?:or)?d|passphrase|pwd|credentials?|(?:api|access|secret|private)_?key)$"
)


def masked(text: str) -> str:
    """Without what has the shape of a secret."""
    for shape in _SHAPES:
        quotes = "quote" in shape.groupindex
        text = shape.sub(rf"\g<1>\g<quote>{MASK}" if quotes else rf"\g<1>{MASK}", text)
    return text


def redact(text: str) -> str:
    """For everything that is logged, saved or printed as an error."""
    for name, value in os.environ.items():
        # a shorter one is part of ordinary words; a path is where a secret lies
        if len(value) >= 8 and _SECRET_VARIABLE.search(name) and name != "PWD" and value[0] not in "/~.":
            for form in (value, quote(value, safe="")):
                text = text.replace(form, MASK)
    return masked(text)
