"""Rows of tensors that lie in many files and are larger than memory: read through memory maps, a row at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import overload

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


class MappedFile:
    """One tensor (n, ...) of a safetensors file, opened when it is first asked for."""

    def __init__(self, path: Path, name: str, rows: int):
        self.path, self.name, self.rows = path, name, rows

    @cached_property
    def tensor(self) -> Tensor:
        """Mapped: rows come into memory when they are indexed.

        Raises:
            ValueError: the file is damaged, or not there.
        """
        try:
            with safe_open(self.path, "pt") as file:
                tensor = file.get_tensor(self.name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path} is damaged; run the prepare stage again: {error}") from error
        if len(tensor) != self.rows:
            raise ValueError(f"{self.path} has {len(tensor)} rows, not {self.rows}; run the prepare stage again")
        return tensor


class MappedRows:
    """The rows of several files one after the other: `rows[index]` for an index tensor or list, `rows[a:b]` for a part.

    A part is again of this kind, so that nothing is read; `tensor()` reads all.
    """

    def __init__(self, files: Sequence[MappedFile], start: int = 0, stop: int | None = None):
        self._files = files
        self._ends = torch.tensor([file.rows for file in files], dtype=torch.int64).cumsum(0)
        self._start, self._stop = start, int(self._ends[-1]) if stop is None else stop

    def __len__(self) -> int:
        return self._stop - self._start

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), *self._files[0].tensor.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        return self._files[0].tensor.dtype

    @overload
    def __getitem__(self, rows: slice) -> MappedRows: ...

    @overload
    def __getitem__(self, rows: Tensor | Sequence[int]) -> Tensor: ...

    def __getitem__(self, rows: Tensor | slice | Sequence[int]) -> Tensor | MappedRows:
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step != 1:
                raise IndexError(f"rows are read by index or as one part, not in steps of {step}")
            return MappedRows(self._files, self._start + start, self._start + max(start, stop))
        index = torch.as_tensor(rows, dtype=torch.int64)
        if len(index) and (index.min() < 0 or index.max() >= len(self)):
            raise IndexError(f"rows {int(index.min())} to {int(index.max())} of {len(self)}")
        index = index + self._start
        which = torch.searchsorted(self._ends, index, right=True)
        found = torch.empty((len(index), *self.shape[1:]), dtype=self.dtype)
        for number in which.unique().tolist():
            file, here = self._files[number], which == number
            found[here] = file.tensor[index[here] - (int(self._ends[number]) - file.rows)]
        return found

    def tensor(self) -> Tensor:
        """All rows, read."""
        return self[torch.arange(len(self))]
