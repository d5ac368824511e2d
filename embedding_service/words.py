"""Words for messages: what a type allows, and which name a misspelt one probably means."""

import difflib
import functools
from collections.abc import Callable, Iterable
from typing import Any

from msgspec import inspect

# Names at least this similar (0 to 1) count as misspellings: `normalise` and `normalize` score 0.89.
MIN_SIMILARITY = 0.85


def allowed(kind: inspect.Type, quoted: Callable[[Any], str] = str) -> str:
    """What a value of the type may be: "a whole number from 1 to 8". `quoted` writes a literal value."""
    match kind:
        case inspect.Metadata(type=inner):
            words = allowed(inner, quoted)
        case inspect.UnionType(types=types):
            words = either(allowed(one, quoted) for one in types if not isinstance(one, inspect.NoneType))
        case inspect.LiteralType(values=values):
            words = either(map(quoted, values))
        case inspect.BoolType():
            words = "true or false"
        case inspect.IntType(ge=least, le=most):
            words = f"a whole number{_bounds('from', least, most)}"
        case inspect.FloatType(gt=above, ge=least, le=most):
            words = (
                f"a number{_bounds('from', least, most) if above is None else _bounds('above', above, most)}"
            )
        case inspect.ListType(item_type=inspect.IntType() | inspect.UnionType(types=(inspect.IntType(), *_))):
            words = "an array of whole numbers"
        case inspect.ListType():
            words = "an array of strings"
        case inspect.StructType() | inspect.DictType():
            words = "an object"
        case inspect.StrType(max_length=int(most)):
            words = f"a string of at most {most} characters"
        case _:
            words = "a string"
    return words


def either(words: Iterable[str]) -> str:
    """The words as a sentence has them: "a, b or c"."""
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


# Cached, since a client that sends an unknown field sends it with every request.
@functools.lru_cache(maxsize=1024)
def nearest(name: str, known: tuple[str, ...]) -> str | None:
    """The known name that this one probably misspells."""
    by_spelling = {_spelling(each): each for each in known}
    alike = difflib.get_close_matches(_spelling(name), by_spelling, 1, MIN_SIMILARITY)
    return by_spelling[alike[0]] if alike else None


def _spelling(name: str) -> str:
    """The name in a form that is the same for snake_case, kebab-case, camelCase and CAPITALS."""
    return name.lower().replace("_", "").replace("-", "")


def _bounds(relation: str, least: float | None, most: float | None) -> str:
    low = f" {relation} {least}" if least is not None else ""
    return f"{low} to {most}" if most is not None else low
