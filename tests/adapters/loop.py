"""The equation of the layer, written as a loop over experts: the independent reference of these tests."""

import torch
from torch import Tensor


def reference_gate(gate: str, h: Tensor, A: Tensor, router: Tensor | None, r: int, tau: float, top_k: int) -> Tensor:
    """Weights [n, E] of flat inputs h [n, d_in]; A [E*r, d_in]."""
    num_experts = A.shape[0] // r
    if gate == "energy":
        energies = [(h @ A[e * r : (e + 1) * r].T).pow(2).sum(-1) / r for e in range(num_experts)]
        return torch.softmax(torch.stack(energies, -1) / tau, -1)
    exps = torch.exp(h @ router.T / tau)
    if gate == "topk":
        keep = torch.zeros_like(exps)
        for row in range(len(exps)):
            order = sorted(range(num_experts), key=lambda e: (-exps[row, e].item(), e))
            keep[row, order[:top_k]] = 1.0
        exps = exps * keep
    return exps / exps.sum(-1, keepdim=True)


def reference_layer(
    h: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, pi: Tensor, r: int, scaling: float
) -> Tensor:
    """y = W h + b + scaling * sum_e pi_e B_e A_e h for flat inputs h [n, d_in]."""
    y = h @ weight.T if bias is None else h @ weight.T + bias
    for e in range(A.shape[0] // r):
        A_e, B_e = A[e * r : (e + 1) * r], B[:, e * r : (e + 1) * r]
        y = y + scaling * pi[:, e : e + 1] * ((h @ A_e.T) @ B_e.T)
    return y
