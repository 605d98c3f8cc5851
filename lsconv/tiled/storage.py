"""The vectors of a solve, in memory or in memory-mapped files of a folder, and what of it a restart goes on from."""

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
        folder: of their files; None: memory.
        key: of the problem, by which a restart knows it.
        shape: of a vector, of the rows of this process.
        dtype: of the vectors, unless one asks for another.
        options: of the fields.
    """

    def __init__(self, folder: Path | None, key: str, shape: Sequence[int], dtype: torch.dtype, **options: Any) -> None:
        self.folder, self.key, self.shape, self.dtype, self.options = folder, key, tuple(shape), dtype, options
        self._vectors: dict[str, Field] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def vector(self, name: str, dtype: torch.dtype | None = None) -> Field:
        """A vector with the present contents of its file."""
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
        """Write what a restart needs, whole or not at all; the vectors that it names are not written to again."""
        if self.folder is None:
            return
        text = json.dumps({"problem": self.key, **state})
        draft = self._file("state.new")
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, self._file("state.json"))

    def saved(self) -> dict[str, Any] | None:
        """The state that was saved for this very problem, or None."""
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
        # ranks may share the folder
        assert self.folder is not None
        return self.folder / f"{self.options.get('first', 0)}-{name}"
