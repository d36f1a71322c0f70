"""Records to parquet: typed columns, units in their names and metadata, a row group at a time."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from qmprop.errors import QmpropError
from qmprop.records import SCHEMA_ID, Record
from qmprop.rows import Layout, whole

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer
    from pyarrow import Schema

#: Records of a row group: what is kept in memory at most.
GROUP_ROWS: Final = 8192
#: Columns that hold something in every row.
_REQUIRED: Final = ("source", "index", "status")


class ParquetWriter:
    """One row a record, as in csv, with types.

    Args:
        layout: The columns.
        metadata: What the file says about itself, for instance the weights' name and hash.

    Raises:
        QmpropError: pyarrow is not installed.
    """

    def __init__(self, layout: Layout, metadata: Mapping[str, str] | None = None) -> None:
        try:
            import pyarrow.parquet as parquet
        except ImportError as error:
            hint = "Install it with: pip install 'qmprop[io]'; or use -f csv."
            raise QmpropError("parquet needs pyarrow", hint) from error
        self._layout = layout
        self._rows: list[list[Any]] = []
        self._schema = _make_schema(layout, {"qmprop_record": SCHEMA_ID, **(metadata or {})})
        self._sink = _Sink()
        self._writer = parquet.ParquetWriter(self._sink, self._schema, compression="zstd")

    def begin(self, written: int = 0) -> bytes:
        """Return the file's magic bytes.

        Raises:
            ValueError: There are records already; a parquet file cannot be continued.
        """
        if written:
            raise ValueError("a parquet file cannot be continued")
        return self._sink.take()

    def write(self, record: Record, molecule: object = None) -> bytes:
        """Keep the record; return a row group when enough have come."""
        self._rows.append([whole(cell) if isinstance(cell, str) else cell for cell in self._layout.row(record)])
        return self._flush() if len(self._rows) >= GROUP_ROWS else b""

    def end(self) -> bytes:
        """Return the records still kept, and the file's footer."""
        rest = self._flush() if self._rows else b""
        self._writer.close()
        return rest + self._sink.take()

    def _flush(self) -> bytes:
        import pyarrow

        cells = zip(*self._rows, strict=True)
        columns = [pyarrow.array(column, field.type) for column, field in zip(cells, self._schema, strict=True)]
        self._writer.write_batch(pyarrow.record_batch(columns, schema=self._schema))
        self._rows = []
        return self._sink.take()


class _Sink(io.RawIOBase):
    """A stream that hands over what was written to it and remembers only how much that was."""

    def __init__(self) -> None:
        self._size = 0
        self._parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def write(self, data: ReadableBuffer) -> int:
        self._parts.append(bytes(data))
        self._size += len(self._parts[-1])
        return len(self._parts[-1])

    def take(self) -> bytes:
        """Return what was written since the last call."""
        parts, self._parts = self._parts, []
        return b"".join(parts)


def _make_schema(layout: Layout, metadata: Mapping[str, str]) -> Schema:
    import pyarrow

    types = {"text": pyarrow.string(), "integer": pyarrow.int64(), "number": pyarrow.float64()}
    fields = []
    for column in layout.columns():
        notes = {"unit": column.unit, "description": column.description}
        known = {key: value for key, value in notes.items() if value is not None}
        fields.append(pyarrow.field(column.name, types[column.kind], column.name not in _REQUIRED, known or None))
    return pyarrow.schema(fields, dict(metadata))
