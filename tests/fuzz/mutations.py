"""Changes of JSON inputs that stay JSON: a value at a random place becomes another of any kind."""

import copy
import json
import random
from typing import Any

LARGE = 20_000  # bytes
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 31, 32, 48, 127, 128, 255, 256, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63,
    -(2**63) - 1, 10**30, 10**400, 0.5, -0.0, 1e-320, 1e308, -1e308, float("inf"), float("-inf"), float("nan"), "", "a",
    "0", "1e9", "\0", "\n", "\ud800", "é", "\U0001f41d", "a" * 5000, [], {}, [[]], [None], {"": None}, [1, 2], {"a": 1},
    [0] * 100, "LABEL_0", "gelu", "../x", "/etc/passwd", "I8", "F32", "BF16", "F64", "BOOL", [1, 48], [48], [0, 96],
)  # fmt: skip


def _value(draw: random.Random) -> Any:
    return copy.deepcopy(draw.choice(VALUES))  # which is changed further


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value inside."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        one = waiting.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ()
        for key in keys:
            found.append((one, key))
            waiting.append(one[key])
    return found


def changed(value: Any, draw: random.Random) -> Any:
    """``value``, perhaps changed in place: one to three of its values replaced, removed, renamed or doubled."""
    for _ in range(draw.randint(1, 3)):
        there = places(value)
        if not there or draw.random() < 0.02:
            return _value(draw)
        container, key = draw.choice(there)
        how = draw.random()
        if how < 0.65:
            container[key] = _value(draw)
        elif how < 0.8:
            del container[key]
        elif how < 0.9:
            other, place = draw.choice(there)
            if place in other if isinstance(other, dict) else place < len(other):
                container[key] = json.loads(json.dumps(other[place]))
        elif isinstance(container, list):
            container.insert(key, _value(draw))
        else:
            container[str(_value(draw))[:20]] = container.pop(key)
    return value


def mutated(data: bytes, draw: random.Random) -> bytes | None:
    """``data`` with a JSON value in it changed; None where there is none. The first byte and separators are kept.

    Values of LARGE size are not doubled again, so that doubling ends.
    """
    if len(data) > LARGE:
        return None
    lines = data.split(b"\n")
    whole = draw.random() < 0.5
    for index in [None] if whole else draw.sample(range(len(lines)), len(lines)):
        text = data if index is None else lines[index]
        for start in (0, 1, 3):  # a body's path, RAW
            try:
                value = json.loads(text[start:])
            except (ValueError, RecursionError):
                continue
            new = text[:start] + json.dumps(changed(value, draw)).encode()
            return new if index is None else b"\n".join([*lines[:index], new, *lines[index + 1 :]])
    return None
