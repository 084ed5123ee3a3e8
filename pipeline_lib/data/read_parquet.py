"""Read Parquet rows as `RawRow`s, a small batch at a time."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline_lib.data.read import RawRow, ReadLimits, check_values
from pipeline_lib.data.refusal import BadRowError, reject_raw
from pipeline_lib.schema import Origin, Rejection

_BATCH_ROWS = 64


def read_parquet(stream: BinaryIO, *, origin: Origin, limits: ReadLimits | None = None) -> Iterator[RawRow | Rejection]:
    """Read the rows of a Parquet file; the row number from 1 stands for the line.

    Parquet is read from its end, so a stream that cannot seek is first spooled to a temporary file.

    Args:
        stream: The file, open for reading bytes.
        origin: Source, licence and place of the file, for the rejections.
        limits: What the file may demand.
    """
    limits = limits or ReadLimits()
    row_number = 0
    with ExitStack() as stack:
        try:
            file = pq.ParquetFile(_seekable(stream, stack, limits), pre_buffer=False)
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for values in _rows(batch):
                    row_number += 1
                    yield _judge(values, row_number, origin=origin, limits=limits)
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            yield reject_raw(
                BadRowError("E_PARQUET", f"no Parquet from here on: {reason}"),
                origin=origin,
                line=row_number + 1,
            )
        except BadRowError as error:
            yield reject_raw(error, origin=origin, line=row_number + 1)


def _rows(batch: Any) -> Iterator[dict[str, Any] | BadRowError]:
    """Yield a batch's rows; a text that is no UTF-8 spoils its own row alone."""
    for index in range(batch.num_rows):
        try:
            yield batch.slice(index, 1).to_pylist()[0]
        except (UnicodeDecodeError, ValueError, OverflowError) as error:
            yield BadRowError("E_ENCODING", f"a value cannot be read: {error}")


def _judge(
    values: dict[str, Any] | BadRowError, row_number: int, *, origin: Origin, limits: ReadLimits
) -> RawRow | Rejection:
    try:
        if isinstance(values, BadRowError):
            raise values
        check_values(values, max_depth=limits.max_depth)
    except BadRowError as error:
        raw = "" if isinstance(values, BadRowError) else str(values)[:800]
        return reject_raw(error, origin=origin, line=row_number, raw=raw)
    return RawRow(values, row_number)


def _seekable(stream: BinaryIO, stack: ExitStack, limits: ReadLimits) -> BinaryIO:
    if stream.seekable():
        return stream
    spool = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - the stack closes it
    shutil.copyfileobj(stream, spool)
    if spool.tell() > limits.max_file_bytes:
        raise BadRowError("E_OVERSIZE_FILE", f"the file is longer than {limits.max_file_bytes} bytes")
    spool.seek(0)
    return cast("BinaryIO", spool)
