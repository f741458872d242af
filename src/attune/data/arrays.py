"""Arrays larger than memory: written row by row, read through a memory map. Plain .npy files, never pickled."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor


class ArrayFile:
    """A .npy file that grows: a context manager whose `append` takes rows of any shape and dtype, all of one kind."""

    def __init__(self, path: Path):
        self._file = path.open("wb")
        self._kind: tuple[np.dtype, tuple[int, ...]] | None = None
        self.rows = 0

    def append(self, rows: Tensor) -> None:
        """Writes rows (n, ...). bfloat16, which .npy does not know, becomes float32.

        Raises:
            ValueError: they are of another shape or dtype than the rows before.
        """
        rows = rows.float() if rows.dtype == torch.bfloat16 else rows
        values = np.ascontiguousarray(rows.cpu().numpy())
        kind = (values.dtype, values.shape[1:])
        if self._kind is None:
            self._kind = kind
            self._write_header(kind)
        if kind != self._kind:
            raise ValueError(f"{self._file.name}: rows of {kind} among rows of {self._kind}")
        self._file.write(values.data)
        self.rows += len(values)

    def _write_header(self, kind: tuple[np.dtype, tuple[int, ...]]) -> None:
        """numpy pads the header so that it can be written again, with more rows."""
        dtype, shape = kind
        header = {"descr": dtype.str, "fortran_order": False, "shape": (self.rows, *shape)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def __enter__(self) -> ArrayFile:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._kind is not None:
            self._file.seek(0)
            self._write_header(self._kind)
        self._file.close()


def read_array(path: Path) -> Tensor:
    """The array as a tensor over the file: rows come into memory when they are indexed.

    Mapped copy-on-write, because torch has no read-only tensors; the file itself never changes.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged; run the prepare stage again: {error}") from error
