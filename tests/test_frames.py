"""Records as a DataFrame."""

from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest
from fakes import FakeModel, water

import qmprop
from qmprop.errors import QmpropError, UsageError
from qmprop.formats import Failure
from qmprop.frames import to_dataframe
from qmprop.records import Domain, Message, Record, Value

FAILURE = Failure("bad.xyz", 2, Message("parse-error", "Line 3 has 2 columns."))


def test_a_row_per_record_with_the_unit_in_the_column() -> None:
    records = qmprop.predict(
        [water(), FAILURE, water(charge=1)], properties="mu,gap", units="gap=meV", weights=FakeModel()
    )
    frame = qmprop.to_dataframe(records)
    assert list(frame.columns) == [
        *("source", "index", "name", "formula", "natoms", "status", "messages", "model"),
        *("mu [D]", "gap [meV]"),
    ]
    assert list(frame["status"]) == ["ok", "error", "warning"]
    assert frame["mu [D]"].dtype == np.float64
    assert np.isnan(frame["mu [D]"][1])
    assert frame["gap [meV]"][0] == pytest.approx(14_000.0)
    assert list(frame["natoms"].isna()) == [False, True, False]
    assert frame["messages"][1] == "parse-error: Line 3 has 2 columns."
    assert frame["name"][0] is None


def test_intervals_have_columns_where_there_are_some() -> None:
    judged = {"domain": Domain("in", 0.2), "seen": ("gdb_4",)}
    value = Value(1.85, "D", (1.8, 1.9))
    records = [Record("a", 0, **judged, interval_level=0.9, properties={"mu": value}), Record("b", 0)]
    frame = to_dataframe(records)
    assert list(frame.columns)[8:] == [
        *("domain", "domain_score", "seen", "interval_level"),
        *("mu [D]", "mu low [D]", "mu high [D]"),
    ]
    assert frame.iloc[0, 8:].tolist() == ["in", 0.2, "gdb_4", 0.9, 1.85, 1.8, 1.9]
    assert frame["domain"][1] is None
    assert frame[["domain_score", "interval_level", "mu low [D]"]].iloc[1].isna().all()
    without = to_dataframe([Record("a", 0, **judged, properties={"mu": Value(1.85, "D")})])
    assert list(without.columns)[8:] == ["domain", "domain_score", "seen", "mu [D]"]


def test_numbers_stay_numbers_when_all_records_failed() -> None:
    frame = to_dataframe(qmprop.predict([FAILURE], weights=FakeModel()))
    assert len(frame) == 1
    assert list(frame.columns)[-1] == "model"
    assert to_dataframe([]).empty


def test_two_units_in_one_column_are_refused() -> None:
    records = [Record("-", index, properties={"mu": Value(1.0, unit)}) for index, unit in enumerate(("D", "ea0"))]
    with pytest.raises(UsageError, match="'mu' comes in D and in ea0"):
        to_dataframe(records)


def test_without_pandas_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def fail(name: str, *args: Any, **options: Any) -> Any:
        if name == "pandas":
            raise ModuleNotFoundError("No module named 'pandas'", name="pandas")
        return original(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(QmpropError) as caught:
        to_dataframe([])
    assert "pip install pandas" in caught.value.hint
