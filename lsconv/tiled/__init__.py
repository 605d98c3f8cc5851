"""One problem in overlapping tiles: ``Plan`` for images larger than a device, and a preconditioner for varying kernels.

``plan`` is what a user calls: ``strategy`` chooses tiles from the ``decay`` of the inverse, ``passes`` go over the
``regions`` of a ``field``, ``iteration`` makes the answer exact, ``certificate`` says so. ``storage`` keeps vectors in
files, ``ranks`` shares the rows. What reaches too far for tiles is solved whole: by ``pencil``, on ``pencil_grid`` and
``pencil_border``, on all ranks, or by ``untiled`` on one. ``schwarz`` serves convolutions that vary.
"""

from lsconv.tiled.plan import Plan

__all__ = ["Plan"]
