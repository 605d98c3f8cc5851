"""The vectors of a solve, in memory or in memory-mapped files, and the state from which a restart continues."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lsconv.tiled.field import Field

__all__ = ["Storage"]


class Storage:
    """Vectors of one problem, made when they are first asked for.

    Args:
        folder: the folder of the files; None: memory.
        key: a hash of the problem; a state saved for another is not restored.
        shape: the shape of the part of a vector that this process stores.
        dtype: the type of a vector for which :meth:`vector` is given none.
        options: the keyword arguments of :class:`~lsconv.tiled.field.Field`.
    """

    def __init__(self, folder: Path | None, key: str, shape: Sequence[int], dtype: torch.dtype, **options: Any) -> None:
        self.folder, self.key, self.shape, self.dtype, self.options = folder, key, tuple(shape), dtype, options
        self._vectors: dict[str, Field] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def vector(self, name: str, dtype: torch.dtype | None = None) -> Field:
        """Get a vector by its name: zeros in memory, or what its file has."""
        if name not in self._vectors:
            dtype = self.dtype if dtype is None else dtype
            if self.folder is None:
                array: Any = torch.zeros(self.shape, dtype=dtype, device=self.options.get("device"))
            else:
                file = self._file(name)
                like = np.dtype(str(dtype).removeprefix("torch."))
                fits = file.exists() and file.stat().st_size == like.itemsize * int(np.prod(self.shape))
                array = np.memmap(file, like, mode="r+" if fits else "w+", shape=self.shape)
            self._vectors[name] = Field(array, **self.options)
        return self._vectors[name]

    def save(self, state: dict[str, Any]) -> None:
        """Save the state for a restart, atomically; vectors named in it must not change afterwards."""
        if self.folder is None:
            return
        text = json.dumps({"problem": self.key, **state})
        draft = self._file("state.new")
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, self._file("state.json"))

    def saved(self) -> dict[str, Any] | None:
        """The state that was saved for the same problem; None where there is none."""
        if self.folder is None:
            return None
        with contextlib.suppress(OSError, ValueError):
            state: dict[str, Any] = json.loads(self._file("state.json").read_text(encoding="utf-8"))
            if state.get("problem") == self.key and self._file(state["x"]).exists():
                return state
        return None

    def remove(self) -> None:
        """Remove the files, once the answer has been written."""
        self._vectors.clear()
        if self.folder is not None:
            for file in self.folder.glob(f"{self.options.get('first', 0)}-*"):
                if file.name.split("-", 1)[1].startswith(("x", "g", "direction", "image", "state")):
                    file.unlink()

    def _file(self, name: str) -> Path:
        assert self.folder is not None
        # The first row of this rank tells its files from those of other ranks in the same folder.
        return self.folder / f"{self.options.get('first', 0)}-{name}"
