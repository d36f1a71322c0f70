"""Records as a pandas DataFrame, with the columns that csv has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from qmprop.errors import QmpropError, UsageError
from qmprop.records import Record
from qmprop.rows import Layout

if TYPE_CHECKING:
    from pandas import DataFrame

_DTYPES: Final = {"text": "object", "integer": "Int64", "number": "float64"}


def to_dataframe(records: Iterable[Record]) -> DataFrame:
    """Return one row per record, with the columns of csv: "source", ..., "mu [D]".

    A property that a record does not have is NaN there. Text that is missing is None, a missing number of atoms NA.

    Args:
        records: From `predict`; all with the same units.

    Raises:
        QmpropError: pandas is not installed.
        UsageError: A property comes in two units.
    """
    try:
        from pandas import DataFrame
    except ModuleNotFoundError as error:
        raise QmpropError("a DataFrame needs pandas", "Install it with: pip install pandas.") from error
    kept = list(records)
    layout = Layout(
        _find_units(kept),
        level=next((record.interval_level for record in kept if record.interval_level is not None), None),
        judged=any(record.domain is not None for record in kept),
    )
    columns = layout.columns()
    rows, names = [layout.row(record) for record in kept], [column.name for column in columns]
    frame = DataFrame(rows, columns=names, dtype="object")  # pandas would turn None among text into NaN
    return frame.astype({column.name: _DTYPES[column.kind] for column in columns})


def _find_units(records: Iterable[Record]) -> dict[str, str]:
    """Return the unit of every property in the records, in the order in which they come."""
    units: dict[str, str] = {}
    for record in records:
        for key, value in record.properties.items():
            if units.setdefault(key, value.unit) != value.unit:
                raise UsageError(
                    f"'{key}' comes in {units[key]} and in {value.unit}", "Predict all molecules with the same units."
                )
    return units
