"""Pure tensor functions: the WKV recurrences of RWKV v5, v6 and v7, on whichever backend can run them.

Letters: B batch, T tokens, H heads, N head size.
"""

from __future__ import annotations

from torch import Tensor

# before the functions of these names: a package imported later would take their place
import rwkvpeft.ops.wkv5
import rwkvpeft.ops.wkv6
import rwkvpeft.ops.wkv7  # noqa: F401
from rwkvpeft.ops.choose import choose_backend
from rwkvpeft.ops.contract import Needs, Wkv, wants_grad
from rwkvpeft.ops.sequences import Sequences

__all__ = ["Sequences", "wkv5", "wkv6", "wkv7"]


def wkv5(
    *, r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None = None,
    sequences: Sequences | None = None, op: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Read and update a per-head memory that decays at a fixed rate per key channel.

    Per head, with S (N value rows, N key columns): y_t = (S + v_t (u k_t)ᵀ) r_t, then S <- S diag(d) + v_t k_tᵀ.

    Args:
        r, k, v: receptance, key, value, (B, T, H, N) in any floating dtype and layout.
        w: (H, N), any value; the decay is d = exp(-exp(w)).
        u: (H, N), the bonus of the token being read.
        state: S before the first token, (B, H, N, N), may be expanded; None means zeros.
        sequences: those that lie one behind another in the one row (B = 1) of a call; each starts from a state of its
            own, so that states are (S, H, N, N), before and after.
        op: the backend, see ``registry.BACKENDS``.
    Returns:
        y, (B, T, H, N) in the dtype of ``v``, and S after the last token, float32 (float64 if an input is).
        Both are differentiable in every input and in ``state``.
    Raises:
        UserError: ``op`` cannot run. ContractError: shapes or devices disagree.
    Source: "Eagle and Finch" (arXiv 2404.05892), Eagle time mixing.
    """
    return _backend("wkv5", op, v, r, w, k, u, state)(r=r, w=w, k=k, v=v, u=u, state=state, sequences=sequences)


def wkv6(
    *, r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None = None,
    sequences: Sequences | None = None, op: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Read and update a per-head memory whose decay depends on the token.

    As ``wkv5``, except that ``w`` is (B, T, H, N) and d_t = exp(-exp(w_t)) decays S after token t was read.

    Source: "Eagle and Finch" (arXiv 2404.05892), Finch time mixing.
    """
    return _backend("wkv6", op, v, r, w, k, u, state)(r=r, w=w, k=k, v=v, u=u, state=state, sequences=sequences)


def wkv7(
    *,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    sequences: Sequences | None = None,
    op: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Read and update a per-head memory that decays, forgets along ``a`` and writes back along ``b``.

    Per head, with S (N value rows, N key columns): S <- S diag(d_t) + (S a_t) b_tᵀ + v_t k_tᵀ, then y_t = S r_t.

    Args:
        r, k, v, a, b: (B, T, H, N) in any floating dtype and layout; in the model a = -κ and b = κ ⊙ gate, |κ| = 1.
        w: (B, T, H, N), the raw decay logit, unbounded: d = exp(-exp(-softplus(-w) - 0.5)), in (0.545, 1).
        state, sequences, op: as for ``wkv5``.
    Returns: y and the state after the last token, as ``wkv5``.
    Raises: as ``wkv5``.
    Source: "RWKV-7 Goose" (arXiv 2503.14456), time mixing.
    """
    return _backend("wkv7", op, v, r, w, k, a, b, state)(r=r, w=w, k=k, v=v, a=a, b=b, state=state, sequences=sequences)


def _backend(operator: str, op: str, value: Tensor, *others: Tensor | None) -> Wkv:
    needs = Needs(value.device.type, value.dtype, value.shape[-1], wants_grad(value, *others))
    return choose_backend(operator, op, needs).run
