"""The progress of a tiled solve: a bar by tiles, with the outer step."""

from __future__ import annotations

from types import TracebackType
from typing import Any

__all__ = ["Progress"]


class Progress:
    """A progress bar of tqdm that counts tiles, shown by the first rank.

    Args:
        plan: the plan; its passes call :meth:`tick` after every tile.
        shown: show the bar.
    """

    def __init__(self, plan: Any, shown: bool) -> None:
        self.bar: Any = None
        self.plan = plan
        if shown and plan.ranks.rank == 0:
            from tqdm.auto import tqdm

            self.bar = tqdm(unit=" tiles")

    def __enter__(self) -> Progress:
        return self

    def tick(self, stage: str) -> None:
        """Count a tile of a pass."""
        if self.bar is not None:
            self.bar.set_description(f"step {self.plan.passes.step}, {stage}", refresh=False)
            self.bar.update(1)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.plan.passes.tick = lambda stage: None
        if self.bar is not None:
            self.bar.close()
