"""How many nulls a column of a parquet file holds, by the file's footer.

pyarrow knows these numbers as well, but ends the process where it is asked for those of some
damaged files (pyarrow 26: an exception of C++ that nothing catches). The footer is a struct in
Thrift's compact protocol, with the fields of parquet.thrift:
https://parquet.apache.org/docs/file-format.
"""

import os
from typing import Any, BinaryIO

# Numbers of the fields in parquet.thrift.
_ROW_GROUPS, _COLUMNS, _META_DATA, _PATH, _STATISTICS, _NULL_COUNT = 4, 1, 3, 3, 12, 3


def null_counts(file: BinaryIO, column: str) -> list[int | None]:
    """Return the nulls of a column in each row group, None where the footer does not say.

    A footer that cannot be understood gives an empty list.
    """
    try:
        end = file.seek(-8, os.SEEK_END)
        file.seek(end - int.from_bytes(file.read(4), "little"))
        footer = _Compact(file.read(end - file.tell())).struct()
        return [_nulls(group, column) for group in footer[_ROW_GROUPS]]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return []


def _nulls(group: dict[int, Any], column: str) -> int | None:
    counts = [
        chunk[_META_DATA].get(_STATISTICS, {}).get(_NULL_COUNT)
        for chunk in group[_COLUMNS]
        if chunk[_META_DATA][_PATH] == [column.encode()]
    ]
    return counts[0] if len(counts) == 1 else None


class _Compact:
    """Values of Thrift's compact protocol; a struct is {number of a field: value}."""

    def __init__(self, content: bytes) -> None:
        self._content, self._at = content, 0

    def struct(self) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._integer()
            # The type of a field says whether it is true (1) or false (2).
            kind = head & 15
            fields[number] = kind == 1 if kind in (1, 2) else self._value(kind)
        return fields

    def _value(self, kind: int) -> Any:
        if kind in (1, 2, 3):  # an element of a list, or a byte
            return self._byte()
        if kind in (4, 5, 6):
            return self._integer()
        if kind in (7, 8):  # a double, bytes
            size = 8 if kind == 7 else self._varint()
            self._at += size
            return self._content[self._at - size : self._at]
        if kind in (9, 10):  # a list, a set
            head = self._byte()
            size = head >> 4 if head >> 4 < 15 else self._varint()
            return [self._value(head & 15) for _ in range(size)]
        if kind == 12:
            return self.struct()
        raise ValueError(f"unknown type {kind}")  # a map has no place in a footer

    def _byte(self) -> int:
        self._at += 1
        return self._content[self._at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
