"""Credentials stay out of whatever is shown or stored: errors, notes, events, logs, run.yaml."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

_USERINFO = re.compile(r"(?<=://)[^\s/?#]*@")
_QUERY = re.compile(
    r"([?&;][\w.-]{0,64}?(?:key|token|secret|passw(?:or)?d|pwd|auth|signature|credential)[\w.-]{0,64}=)[^&;#\s'\"<>]+",
    re.IGNORECASE,
)
_HEADER = re.compile(r"(\b(?:bearer|basic)\s+)(?=[\w.~+/=-]{0,512}?[\d=])[\w.~+/=-]{8,}", re.IGNORECASE)
_NAME = re.compile(
    r"(?:(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL)S?|_(?:PASS|PWD|PAT|AUTH))(?:_?\d+)?$", re.IGNORECASE
)
_PASSWORD = re.compile(r"://[^\s/?#:@]*:([^\s/?#@]+)@")
_SHORTEST = 8
"""Characters of a value that is looked for: shorter ones are found in ordinary words."""
_REFERENCE = re.compile(r"\$(?:\w+|\{\w+\})")
_HIDDEN = "***"
_named: set[str] = set()


def without_secrets(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """`text` less the user names, passwords and keys of URLs and headers, and less the values of the environment's secrets: variables whose
    names end as those of secrets do (KEY, TOKEN, SECRET, PASSWORD, CREDENTIALS, _PASS, _PWD, _PAT, _AUTH), those that `keep_secret` was
    told of, and passwords in addresses (HTTPS_PROXY)."""
    return _without(text, _secrets(environment))


def less_secrets(value: Any) -> Any:
    """What is going to be JSON, with every string in it `without_secrets`: in JSON, quotes and letters are written otherwise."""
    return _less(value, _secrets(os.environ))


def _less(value: Any, secrets: Sequence[str]) -> Any:
    if isinstance(value, str):
        return _without(value, secrets)
    if isinstance(value, Mapping):
        return {_less(key, secrets): _less(one, secrets) for key, one in value.items()}
    return [_less(one, secrets) for one in value] if isinstance(value, (list, tuple)) else value


def _without(text: str, secrets: Sequence[str]) -> str:
    if "://" in text:
        text = _USERINFO.sub("", text)
        text = _QUERY.sub(rf"\1{_HIDDEN}", text)
    text = _HEADER.sub(rf"\1{_HIDDEN}", text)
    for secret in secrets:
        if secret in text:
            text = text.replace(secret, _HIDDEN)
    return text


def _secrets(environment: Mapping[str, str]) -> list[str]:
    """The values that must not be seen, in the order of the variables. Asked anew every time: the environment changes."""
    return [s for name, value in environment.items() for s in _secrets_in(name, value, name in _named)]


@lru_cache(maxsize=4096)
def _secrets_in(name: str, value: str, named: bool) -> tuple[str, ...]:
    """Of one variable: an event has ten strings, and is written at every commit."""
    found = [value] if named or _NAME.search(name) else _PASSWORD.findall(value)
    return tuple(secret for secret in found if len(secret) >= _SHORTEST)


def variables_in(text: str) -> list[str]:
    """The environment variables that a text names: $NAME or ${NAME}."""
    return [match[0].strip("${}") for match in _REFERENCE.finditer(text)]


def keep_secret(*texts: str) -> None:
    """From now on the values of these environment variables, or of those that a text refers to as $VARIABLE, are secrets in this process,
    whatever the variables are called."""
    for text in texts:
        _named.update(variables_in(text) or [text])


def holds_credentials(text: str) -> bool:
    """Whether an address in the text has a user name, a password or a key in it, other than as $VARIABLE."""
    plain = _REFERENCE.sub("", text)
    return any(match[0] not in ("@", ":@") for match in _USERINFO.finditer(plain)) or (
        "://" in plain and _QUERY.search(plain) is not None
    )
