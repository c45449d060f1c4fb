"""Sufficient statistics of a group of sites: summed on the device, merged on the host in float64.

``batch_sums`` is what one batch adds (float32, on the device, no synchronisation); `driftlens.metrics.ProbeSums` adds
batches and shards up. Everything is a plain sum over tokens, so the order of batches, shards or machines does not
matter beyond float64 rounding (relative 1e-15).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from driftlens.metrics import ProbeSums
from driftlens.store.schema import REFERENCE_PREFIX

__all__ = ["REFERENCE_STATISTICS", "STATISTICS", "ProbeSums", "batch_sums", "expert_input", "reference_sums"]

STATISTICS = (
    "gate_sum",
    "gate_outer",
    "gated_energy",
    "second_moment",
    "entropy",
    "energy",
    "expert_sq",
    "base_sq",
)
"""Names of the per-site statistics (``count`` beside them is per probe, not per site)."""

REFERENCE_STATISTICS = tuple(REFERENCE_PREFIX + name for name in (*STATISTICS, "drift_sq") if name != "base_sq")
"""Names of the sums of a reference: the same without the base module's, and what separates the two checkpoints."""


def batch_sums(
    gate: Float[Tensor, "S n E"],
    pathway: Float[Tensor, "S n E r"] | None,
    base_norm: Float[Tensor, "S n"],
    output_root: Float[Tensor, "S E r r"] | None,
    middle: Float[Tensor, "S n E r"] | None = None,
) -> dict[str, Tensor]:
    """Sum one batch of tokens over the token axis, in float32 on the device of the inputs.

    Args:
        gate: the weights really used; rows sum to 1 (or are used as they are).
        pathway: z = A h before the scaling; None where there are no low-rank pathways.
        base_norm: L2 norm of the base module's output.
        output_root: R_e with ||R_e z|| = ||o_e||, that is R^T R = scaling^2 B_e^T B_e (see ``output_roots``); None
            likewise.
        middle: what enters B_e, see `expert_input`; None for the pathways themselves.

    Returns:
        ``gate_sum`` [S, E]; ``gate_outer`` [S, E, E] = sum pi pi^T; ``gated_energy`` [S, E, r] = sum pi z^2
        (PASs-MoE Eq. 9 before the mean); ``second_moment`` [S, E, r, r] = sum z z^T; ``entropy`` [S] = sum of
        H(pi / sum pi) in nats; ``energy`` [S, E] = sum ||z||^2; ``expert_sq`` [S, E] = sum ||o_e||^2; ``base_sq`` [S].
        Those that need z are absent without pathways.
    """
    pi = gate.float()
    gate_t = pi.transpose(1, 2)  # [S, E, n]
    sums = {
        "gate_sum": pi.sum(1),
        "gate_outer": gate_t @ pi,
        # entr(0) = 0, so experts that top-k left out add nothing; log(0) never appears.
        "entropy": torch.special.entr(pi / pi.sum(-1, keepdim=True)).nan_to_num().sum((1, 2)),
        "base_sq": base_norm.float().square().sum(1),
    }
    if pathway is None or output_root is None:
        return sums
    z = pathway.float()
    by_expert = z.permute(0, 2, 3, 1)  # [S, E, r, n]
    moment = _moment(z)
    # ||o_e||^2 summed over tokens is <R^T R, sum z z^T>: no expert output is ever formed for it.
    gram = output_root.transpose(-1, -2) @ output_root
    given = moment if middle is None else _moment(middle.float())
    return sums | {
        "gated_energy": (by_expert.square() @ gate_t.unsqueeze(-1)).squeeze(-1),
        "second_moment": moment,
        "energy": moment.diagonal(dim1=-2, dim2=-1).sum(-1),
        "expert_sq": (gram * given).sum((-1, -2)),
    }


def reference_sums(
    gate: Float[Tensor, "S n E"],
    pathway: Float[Tensor, "S n E r"] | None,
    middle: Float[Tensor, "S n E r"] | None,
    output_root: Float[Tensor, "S E r r"] | None,
    current_middle: Float[Tensor, "S n E r"] | None,
    change_root: Float[Tensor, "S E two_r two_r"] | None,
) -> dict[str, Tensor]:
    """Sum what the anchor's parameters answer to the inputs of one batch, in float32 on their device.

    Args:
        gate: the anchor's gates; rows of zeros where it has no such site.
        pathway: its pathways; None where there are none (then the rest is None too).
        middle: what enters its B where that is not ``pathway``, see `expert_input`.
        output_root: its R_e, see `batch_sums`.
        current_middle: what enters B of the recorded checkpoint on the same input.
        change_root: D_e with ||D_e [m1 - m0; m0]|| = ||o1_e - o0_e||, see `driftlens.recording.reference.drift_roots`.

    Returns:
        The sums of `batch_sums` without ``base_sq``, and ``drift_sq`` [S, E] = sum ||o1_e - o0_e||^2 on the same input;
        every name begins with ``reference/``.
    """
    own = batch_sums(gate, pathway, gate.new_zeros(gate.shape[:-1]), output_root, middle)
    del own["base_sq"]
    entering = pathway if middle is None else middle
    if entering is not None and output_root is not None and current_middle is not None and change_root is not None:
        # Summed token by token: from second moments, small drifts would drown in rounding, and so would the anchor's
        # outputs where A and B are ill-conditioned.
        own["expert_sq"] = torch.einsum("seij,snej->snei", output_root, entering).square().sum((1, 3))
        both = torch.cat([current_middle - entering, entering], dim=-1)
        drift = torch.einsum("seij,snej->snei", change_root, both)
        own["drift_sq"] = drift.square().sum((1, 3))
    return {REFERENCE_PREFIX + name: value for name, value in own.items()}


def _moment(z: Float[Tensor, "S n E r"]) -> Float[Tensor, "S E r r"]:
    by_expert = z.permute(0, 2, 3, 1)
    return by_expert @ by_expert.transpose(-1, -2)


def expert_input(
    gate: Float[Tensor, "S n E"], pathway: Float[Tensor, "S n E r"], product: Bool[Tensor, " S"]
) -> Float[Tensor, "S n E r"]:
    """Return what enters B_e: z_e, or at sites that multiply sums (``product``) the same sum_i g_i z_i for all e.

    With it the output of a site is s sum_e g_e B_e (.)_e for either kind.
    """
    mixed = torch.einsum("sne,sner->snr", gate, pathway).unsqueeze(2)
    return torch.where(product[:, None, None, None], mixed, pathway)
