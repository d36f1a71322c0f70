"""Numbers as people read them: as many digits as their error leaves meaning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from qmprop.errors import UsageError
from qmprop.records import Value
from qmprop.targets import unit_factor

#: Error, in default units, that decides how many digits mean anything where the weights do not tell their own.
_TYPICAL_ERRORS: Final[Mapping[str, float]] = {"mu": 0.03, "alpha": 0.1, "r2": 1.0, "zpve": 0.01, "cv": 0.1}
_TYPICAL_ENERGY_ERROR: Final = 0.03
#: Beyond so many decimals zeros abound, in a number that is small.
_MAX_DECIMALS: Final = 9
_SMALL: Final = 1e-3
#: Levels of intervals that can be asked for.
LOWEST_LEVEL: Final = 0.5
HIGHEST_LEVEL: Final = 0.999


@dataclass(frozen=True, slots=True)
class Figure:
    """A number and its half-width, cut at the same place.

    Attributes:
        number: The number, or the part of it before `power`.
        half_width: What stands behind the ±; empty without an interval.
        power: "e-30" where both are in scientific notation, else empty.
    """

    number: str
    half_width: str = ""
    power: str = ""

    def split(self, sign: str) -> tuple[str, str]:
        """Return "1.27" and " ± 0.21", or "(6.2" and " ± 0.7)e-30": what stands before the sign, and what follows."""
        if not self.half_width:
            return self.number + self.power, ""
        if not self.power:
            return self.number, f" {sign} {self.half_width}"
        return f"({self.number}", f" {sign} {self.half_width}){self.power}"


def decimals(key: str, unit: str, error: float | None = None) -> int:
    """Return how many decimals of property `key` in `unit` carry information: one more than its error's first digit.

    Args:
        key: Property key.
        unit: Unit of the number shown.
        error: Error in the property's default unit; None for a typical one.
    """
    if error is None or not 0.0 < error < math.inf:
        error = _TYPICAL_ERRORS.get(key, _TYPICAL_ENERGY_ERROR)
    return max(0, math.ceil(-math.log10(error / unit_factor(key, unit)) - 1e-9) + 1)


def format_number(value: float, digits: int) -> str:
    """Return the number with so many decimals; in scientific notation, cut at the same place, where zeros abound."""
    if digits > _MAX_DECIMALS:
        exponent = math.floor(math.log10(abs(value))) if value else -digits
        return f"{value:.{max(0, digits + exponent)}e}"
    return f"{value:.{digits}f}"


def half_width(value: Value) -> float:
    """Return the distance of the farther end of the value's interval; NaN without an interval."""
    if value.interval is None:
        return math.nan
    low, high = value.interval
    return max(value.value - low, high - value.value)


def format_value(value: Value, digits: int) -> Figure:
    """Return the value and its half-width with the digits that the half-width leaves meaning.

    Those are the Particle Data Group's: of a half-width's first three digits, 100 to 354 give two and 355 to 949 one;
    from 950 on it is rounded up and two are given.

    Args:
        value: The value.
        digits: Decimals of a value without a half-width, or with one of 0.
    """
    half = half_width(value)
    if not math.isfinite(half):
        return Figure(format_number(value.value, digits))
    if half <= 0.0:
        return Figure(format_number(value.value, digits), "0")
    digits = _half_width_decimals(half)
    larger = max(abs(value.value), half)
    if digits > _MAX_DECIMALS and larger < _SMALL:
        exponent = int(f"{float(f'{larger:.{digits}f}'):e}".partition("e")[2])
        number, width = (
            _cut(float(f"{part:.{digits}f}e{-exponent}"), digits + exponent) for part in (value.value, half)
        )
        return Figure(number, width, f"e{exponent:+03d}")
    return Figure(_cut(value.value, digits), _cut(half, digits))


def format_share(share: float, digits: int = 6) -> str:
    """Return "90 %" for 0.9, with so many digits at most."""
    return f"{100 * share:.{digits}g} %"


def parse_level(text: str) -> float | None:
    """Return the level of the intervals that a user asks for: "0.95", "95" or "95%" is 0.95, "none" is None.

    Raises:
        UsageError: It is no number from 0.5 to 0.999.
    """
    if text.strip().lower() == "none":
        return None
    number, percent, rest = text.partition("%")
    try:
        level = float(number)
    except ValueError:
        level = math.nan
    if percent or level > 1.0:
        level = round(level / 100.0, 12)
    if rest.strip() or not LOWEST_LEVEL <= level <= HIGHEST_LEVEL:
        hint = f"Give a number from {LOWEST_LEVEL} to {HIGHEST_LEVEL}, such as 0.95 or 95%, or none for no intervals."
        raise UsageError(f"the intervals cannot have the level '{text}'", hint)
    return level


def _half_width_decimals(half: float) -> int:
    """Return the place of the last digit that means something: 1 for tenths, -1 for tens."""
    mantissa, _, exponent = f"{half:.2e}".partition("e")
    first_digits = float(mantissa)
    if first_digits >= 9.5:
        return -int(exponent)
    return (1 if first_digits < 3.55 else 0) - int(exponent)


def _cut(number: float, digits: int) -> str:
    """Return the number, rounded at this decimal; a negative one counts places before the point."""
    return f"{number:z.{digits}f}" if digits >= 0 else f"{round(number, digits):z.0f}"
