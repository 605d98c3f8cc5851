r"""The derivative rule without damping, that of Golub and Pereyra, as an autograd function.

Without damping :math:`x = A^+ y`, and for perturbations that keep the rank of A (Golub and Pereyra)

.. math:: dA^+ = -A^+ dA\,A^+ + A^+ A^{+H} dA^H (I - A A^+) + (I - A^+ A) dA^H A^{+H} A^+ ,

so that with :math:`u = A^{+H} g`, :math:`q = A^+ u`, :math:`w = g - A^H u` and :math:`z = A^{+H} x`

.. math:: \bar y = u, \qquad \bar A = -u x^H + r q^H + z w^H .

The second term vanishes with the residual (full row rank), the third with w (full column rank), and the solve for it is
then left out. So is that for z where the forward solve has found it along with x
(:mod:`lsconv.krylov.loop.lagrange_multipliers`): LSQR, LSMR, CGLS and CRAIG do for fewer rows than columns, and one
solve is left, that for u.

Where the rank does change (a zero of the symbol), :math:`A^+` is not even continuous: use damp > 0.

In forward mode dx is this, applied to y.

Golub and Pereyra, "The differentiation of pseudo-inverses and nonlinear least squares problems whose variables
separate", SIAM J. Numer. Anal. 10 (1973), 413-432.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lsconv.krylov.gradients.parameters import parameter_jvp, parameter_vjp, rebuild
from lsconv.krylov.gradients.solve_record import SolveRecord
from lsconv.krylov.gradients.vmap import batch_vmapped_axis, under_old_vmap
from lsconv.operators.transforms import transforming

__all__ = ["PseudoSolve", "add_optional", "pseudo_backward", "pseudo_tangent", "unbroadcast"]


class PseudoSolve(torch.autograd.Function):
    """``A^+ y``, or ``A^{+H} y`` when ``transposed``, for the items without damping.

    As a function of y alone, the parameters and damp held fixed, it is right for the others too.
    """

    @staticmethod
    def forward(record: SolveRecord, transposed: bool, known: Tensor | None, y: Tensor, *params: Tensor) -> Tensor:
        """Solve, unless the answer is known."""
        if known is not None:
            return known.clone()
        given, found = len(record.A.out_shape), len(record.A.in_shape)
        if transposed:
            given, found = found, given
        answer = record.scaled_solve("adjoint" if transposed else "apply", y, given, found)
        assert answer is not None
        return answer

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the tensors that :meth:`backward` and :meth:`jvp` read."""
        ctx.record, ctx.transposed, _, *tensors = inputs
        ctx.save_for_backward(output, *tensors)
        ctx.save_for_forward(output, *tensors)

    @staticmethod
    @under_old_vmap
    def backward(ctx: Any, g: Tensor) -> Any:
        """Return the cotangents of the inputs."""
        x, y, *params = ctx.saved_tensors
        y_bar, bars = pseudo_backward(ctx.record, ctx.transposed, y, x, g, params, ctx.needs_input_grad[4:])
        return (None, None, None, unbroadcast(y_bar, y), *bars)

    @staticmethod
    @under_old_vmap
    def jvp(ctx: Any, _: None, __: None, ___: None, dy: Tensor | None, *dparams: Tensor | None) -> Tensor:
        """The tangent of the result."""
        x, y, *params = ctx.saved_tensors
        dy = torch.zeros_like(y) if dy is None else dy
        dx: Tensor = pseudo_tangent(ctx.record, ctx.transposed, y, x, dy, params, dparams)
        return dx

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], record: SolveRecord, transposed: bool, known: Any, y: Tensor, *params: Any
    ) -> Any:
        """Make the mapped dimension a batch dimension."""
        ndims = [len(record.A.out_shape), len(record.A.in_shape)]
        known = None if in_dims[2] is None else known
        moved, moved_params = batch_vmapped_axis(
            record,
            info.batch_size,
            (y, known),
            ndims[::-1] if transposed else ndims,
            params,
            (in_dims[3], in_dims[2], *in_dims[4:]),
        )
        return PseudoSolve.apply(record, transposed, moved[1], moved[0], *moved_params), 0


# ---------------------------------------------------------------------------------------------- the rule


def pseudo_backward(
    record: SolveRecord,
    transposed: bool,
    y: Tensor,
    x: Tensor,
    g: Tensor,
    params: Sequence[Tensor],
    needed: Sequence[bool],
    z: Tensor | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """Cotangents of y and of A's parameters in ``x = A^+ y`` (of ``A^H`` when ``transposed``); z where it is known."""
    A_params, needed = params[: record.A_param_count], needed[: record.A_param_count]
    if not any(needed):
        return PseudoSolve.apply(record, not transposed, None, g, *A_params), [None] * record.A_param_count
    record.check_unweighted()
    A = rebuild(record.A, A_params)
    B = A.H if transposed else A
    outputs, inputs = len(B.out_shape), len(B.in_shape)
    values_hidden = transforming()
    r = None if record.square else y - B.apply(x)
    consistent = r is None or (not values_hidden and record.negligible(r, y, outputs))
    # a square A with a nonzero residual is singular
    if not (consistent or values_hidden or transposed or torch.is_grad_enabled()) and B.out_numel > B.in_numel:
        # u = A q with q = (A^H A)^-1 g takes one solve instead of two
        q = record.scaled_solve("gram_solve", g, inputs, inputs)
        u = None if q is None else A.apply(q)
        if u is not None and q is not None and record.negligible(g - A.adjoint(u), g, inputs):
            return u, parameter_vjp(record.A, False, A_params, needed, [x, q], torch.broadcast_tensors(-u, r))
    u = PseudoSolve.apply(record, not transposed, None, g, *A_params)
    directions, cotangents = [x], [-u]
    if r is not None:
        if not consistent:
            directions.append(PseudoSolve.apply(record, transposed, None, u, *A_params))
            cotangents.append(r)
        w = g - B.adjoint(u)
        if values_hidden or not record.negligible(w, g, inputs):
            directions.append(w)
            cotangents.append(PseudoSolve.apply(record, not transposed, z, x, *A_params))
    return u, parameter_vjp(record.A, transposed, A_params, needed, directions, cotangents)


def pseudo_tangent(
    record: SolveRecord,
    transposed: bool,
    y: Tensor,
    x: Tensor,
    dy: Tensor,
    params: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    z: Tensor | None = None,
) -> Tensor:
    """Tangent of ``x = A^+ y`` (of ``A^H`` when ``transposed``); z where it is known."""
    A_params, tangents = params[: record.A_param_count], tangents[: record.A_param_count]

    def inverse(right: Tensor, adjoint: bool = False, known: Tensor | None = None) -> Tensor:
        answer: Tensor = PseudoSolve.apply(record, transposed != adjoint, known, right, *A_params)
        return answer

    if all(tangent is None for tangent in tangents):
        return inverse(dy)
    record.check_unweighted()

    def image(v: Tensor, adjoint: bool = False) -> Tensor:
        def of(*A_params: Tensor) -> Tensor:
            A = rebuild(record.A, A_params)
            return A.adjoint(v) if transposed != adjoint else A.apply(v)

        moved = parameter_jvp(of, A_params, tangents)
        assert moved is not None
        return moved

    dy = dy - image(x)
    if record.square:
        return inverse(dy)
    A = rebuild(record.A, A_params)
    B = A.H if transposed else A
    r = y - B.apply(x)
    if transforming() or not record.negligible(r, y, len(B.out_shape)):
        dy = dy + inverse(image(r, adjoint=True), adjoint=True)
    null_part = image(inverse(x, adjoint=True, known=z), adjoint=True)
    return inverse(dy - B.apply(null_part)) + null_part


# ------------------------------------------------------------------------------------------------- pieces


def unbroadcast(bar: Any, tensor: Tensor | None) -> Tensor | None:
    """Sum a cotangent over the dimensions that broadcasting made, in the dtype of its tensor."""
    if bar is None or tensor is None:
        return None
    return bar.sum_to_size(tensor.shape).to(tensor.dtype)


def add_optional(left: list[Tensor | None], right: list[Tensor | None]) -> list[Tensor | None]:
    """Add the lists entry by entry; None stands for zero."""
    return [b if a is None else a if b is None else a + b for a, b in zip(left, right, strict=True)]
