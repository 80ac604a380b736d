"""The one way to refuse a value: an error that names the field, the value and what is allowed."""

from __future__ import annotations


class FieldError(ValueError):
    """A wrong value: `field`, `value` and `allowed` say which, what and what would be right."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(f"{field} = {value!r}: allowed is {allowed}")
        self.field = field
        self.value = value
        self.allowed = allowed

    def __reduce__(self) -> tuple[type[FieldError], tuple[str, object, str]]:
        return (type(self), (self.field, self.value, self.allowed))


def require(holds: bool, field: str, value: object, allowed: str) -> None:
    """Raise `FieldError` unless `holds`."""
    if not holds:
        raise FieldError(field, value, allowed)
