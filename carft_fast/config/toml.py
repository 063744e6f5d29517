"""The configuration in and out: TOML files, `--set section.key=value`, what differs, where a value comes from."""

import difflib
import hashlib
import json
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from carft_fast.config.schema import Config
from carft_fast.config.sections import Section
from carft_fast.core import InputError, first_line, visible_json

Overrides = Sequence[str] | Mapping[str, Any]
"""Texts `section.key=value`, or dotted key -> value."""
_LONGEST_SHOWN = 200
"""Characters of a wrong value in its error."""


def load_config(path: str | None, overrides: Overrides = (), preset: Mapping[str, Any] | None = None) -> Config:
    """The config of a TOML file (none: the defaults), then the fields of `preset` (dotted key -> value), then
    overrides. Raises InputError naming the key, the value seen and what is allowed.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        tree = _read(path)
    _put_all(tree, preset or {})
    if isinstance(overrides, Mapping):
        _put_all(tree, overrides)
    else:
        for override in overrides:
            key, value = _parse_override(override)
            _put(tree, key, value, said=f"--set {override}")
    return _validated(tree)


def _read(path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"--config {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path}: cannot be read: {error}") from None
    except ValueError as error:  # also for an integer of thousands of digits
        raise InputError(f"--config {path}: not valid TOML: {error}") from None
    except RecursionError:
        raise InputError(f"--config {path}: not valid here: its tables or arrays are nested too deep") from None


def read_value(text: str) -> Any:
    """A value as TOML writes it. Raises tomllib.TOMLDecodeError for what is none, and ValueError or RecursionError for
    one that cannot be held."""
    found = tomllib.loads(f"value = {text}")
    if found.keys() != {"value"}:
        raise ValueError("one value is expected, and this is several lines of TOML")
    return found["value"]


def replaced(config: Config, values: Mapping[str, Any]) -> Config:
    """The config with other values (dotted key -> value), checked as a whole. Raises InputError like `load_config`."""
    tree = config.model_dump()
    _put_all(tree, values)
    return _validated(tree)


def _validated(tree: dict[str, Any]) -> Config:
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise InputError("\n".join(_explain(item) for item in error.errors())) from None
    for key, _, value in iter_fields(config):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # a command line holds bytes that are no UTF-8 as halves of surrogate pairs
            raise InputError(f"{key} = {json.dumps(value)}: it is not text in UTF-8") from None
    return config


def _put_all(tree: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        _put(tree, str(key), os.fspath(value) if isinstance(value, os.PathLike) else value, said=str(key))


def _put(tree: dict[str, Any], key: str, value: Any, *, said: str) -> None:
    """Set the value of a dotted key. `said` is what the user wrote, for the error."""
    *sections, name = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise InputError(f"{said}: {section} is a value, not a section")
    tree[name] = value


def _parse_override(override: str) -> tuple[str, Any]:
    key, separator, text = override.partition("=")
    key = key.strip()
    if not separator or not all(key.split(".")):
        raise InputError(f"--set {override}: expected section.key=value, for instance rl.lr=3e-7")
    try:
        return key, read_value(text)
    except tomllib.TOMLDecodeError:
        return key, text.strip()  # a bare word is a string: --set model.path=my/folder
    except (ValueError, RecursionError) as error:
        raise InputError(f"--set {_shortened(override)}: {first_line(error)}") from None


def _explain(error: Any) -> str:
    location = [str(part) for part in error["loc"]]
    key = ".".join(location) or "config"
    if error["type"] == "extra_forbidden":
        section: Any = Config
        for part in location[:-1]:
            section = section.model_fields[part].annotation
        known = list(section.model_fields)
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*location[:-1], near[0]])}?" if near else f"known: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    if not location:
        return message
    if error["type"] == "value_error":  # a section's own rule, whose message starts with the field
        return f"{key}.{message}"
    try:
        value = _shortened(json.dumps(error["input"], default=str))
    except (ValueError, RecursionError):
        value = f"a {type(error['input']).__name__} that is nested too deep or too long"
    return f"{key} = {value}: {message[0].lower()}{message[1:]}"


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}... ({len(text):,} characters)"


def value_origins(
    path: str | None, overrides: Sequence[str] = (), preset: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Where each value that is not a default comes from: dotted key -> file name, "--method" or "--set"."""

    def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
        for name, value in tree.items():
            yield prefix + name
            if isinstance(value, dict):
                yield from leaves(value, f"{prefix}{name}.")

    origins = dict.fromkeys(leaves(_read(path)), str(path)) if path else {}
    origins |= dict.fromkeys(preset or {}, "--method")
    return origins | {override.partition("=")[0].strip(): "--set" for override in overrides}


def iter_fields(config: Section, prefix: str = "") -> Iterator[tuple[str, FieldInfo, Any]]:
    """Every leaf field as (dotted key, field, resolved value), top-level scalars first."""
    fields = type(config).model_fields
    for name in sorted(fields, key=lambda name: isinstance(getattr(config, name), Section)):
        value = getattr(config, name)
        if isinstance(value, Section):
            yield from iter_fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, fields[name], value


def to_toml(config: Config, *, origins: dict[str, str] | None = None) -> str:
    """The resolved config as TOML that loads back to the same config; fields that are not set are comments.

    With `origins` (see `value_origins`) every field has its documentation before it and the origin of its value behind.
    """
    lines, section = list[str](), ""
    for key, field, value in iter_fields(config):
        head, _, name = key.rpartition(".")
        if head != section:
            lines += ["", f"[{head}]"]
            section = head
        line = f"# {name} is not set" if value is None else f"{name} = {_toml_value(value)}"
        if origins is not None:
            lines += [f"# {text.strip()}" for text in (field.description or "").splitlines()]
            line += f"  # {origins.get(key, 'default')}"
        lines.append(line)
    return "\n".join(lines).strip() + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_value(k)} = {_toml_value(v)}" for k, v in value.items()) + "}"
    return visible_json(value)


CHANGEABLE = frozenset(
    f"{stage}.{name}" for stage in ("sft", "rl") for name in ("max_steps", "epochs", "eval_every", "save_every")
) | {"output.trackers"}
"""What may change when a run goes on, besides [distributed]: how long it is, and what is written of it."""


def fingerprint(config: Config) -> str:
    """SHA-256 of what `differences` compares; a field at its default has no part in it."""
    chosen = config.model_dump(exclude_defaults=True, exclude={"distributed"})
    for key in CHANGEABLE:
        section, _, name = key.partition(".")
        chosen.get(section, {}).pop(name, None)
    chosen = {name: value for name, value in chosen.items() if value != {}}  # a section that has nothing else
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def differences(ours: Config, theirs: Config) -> list[str]:
    """Keys whose values differ, as `key: theirs -> ours`; [distributed] and `CHANGEABLE` are not compared."""
    old, new = ({key: value for key, _, value in iter_fields(config)} for config in (theirs, ours))
    return [
        f"{key}: {old[key]!r} -> {value!r}"
        for key, value in new.items()
        if old[key] != value and key not in CHANGEABLE and not key.startswith("distributed.")
    ]
