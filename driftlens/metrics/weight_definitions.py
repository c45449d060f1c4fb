"""What the numbers of weights-only mode mean, beside `MEASURES`; they need factors and routers, and no tokens."""

from __future__ import annotations

from dataclasses import replace

from driftlens.metrics.definitions import MEASURES, Definition

__all__ = ["WEIGHT_MEASURES"]

_OWN = "DriftLens; no paper defines it"
_NO_UPDATE = "the update is 0 (B = 0)"
_NO_ANCHOR = "the update at the anchor is 0 (B = 0 before the first task)"
_NO_ROUTER = "the site has no router weights, or the anchor's row is 0"
_SHIFT = "A softmax ignores a vector added to all rows, this does not: see router_change_centred."
_SECTION = "2"

_NEW = (
    Definition(
        "output_overlap_adjusted",
        "Output overlap above chance",
        "(output_overlap - r/d_out) / (1 - r/d_out)",
        "<= 1",
        chance="0",
        undefined="a factor of zeros (B before the first task), or rank = d_out",
        section=_SECTION,
    ),
    Definition("largest_angle", "Largest principal angle", "the last of principal_angles", "0..pi/2",
               undefined="a factor of zeros", section=_SECTION),
    Definition("update_norm", "Update norm", "norm_F(s B_e A_e) at the current checkpoint", "0..",
               undefined="the factors hold NaN or infinity", section=_SECTION,
               caveat="Size, not effect: a small update on what the model sees often may matter more."),
    Definition("update_norm_anchor", "Update norm at the anchor", "norm_F(s B_e A_e) at the anchor", "0..",
               undefined="the factors hold NaN or infinity", section=_SECTION),
    Definition("update_difference", "Change of the update",
               "norm_F(s B_e A_e current - s B_e A_e anchor)", "0..",
               undefined="the factors hold NaN or infinity", section=_SECTION),
    Definition("update_change", "Relative change of the update",
               "norm_F(s B_e A_e current - s B_e A_e anchor) / norm_F(s B_e A_e anchor)", "0..",
               undefined=_NO_ANCHOR, section=_SECTION,
               caveat="All inputs count alike, whether a task uses them or not; expert_drift weighs by real inputs."),
    Definition("update_cosine", "Direction of the update",
               "<s B_e A_e anchor, s B_e A_e current> / (norm_F anchor * norm_F current)", "-1..1", chance="0",
               undefined="the update is 0 at either checkpoint", section=_SECTION),
    Definition("update_rank", "Rank of the update",
               "number of singular values of s B_e A_e above 1e-6 of the largest", "0..r",
               undefined="the factors hold NaN or infinity", section=_SECTION),
    Definition("effective_rank", "Effective rank of the update",
               "exp(entropy of sigma / sum sigma) over the singular values sigma of s B_e A_e", "1..r",
               source="Roy and Vetterli 2007", undefined=_NO_UPDATE, section=_SECTION),
    Definition("silent_experts", "Silent experts", "number of experts with B_e A_e = 0, at the current checkpoint",
               "0..E", source=_OWN, undefined="the factors hold NaN or infinity", section=_SECTION,
               caveat="Not dead_experts: that counts experts to which the gate gives no load on a probe."),
    Definition("router_row_cosine", "Direction of a router row", "cos(w_e anchor, w_e current)", "-1..1",
               invariance="none", within_run=True, undefined=_NO_ROUTER, section=_SECTION, caveat=_SHIFT),
    Definition("router_row_change", "Change of a router row", "norm(w_e current - w_e anchor) / norm(w_e anchor)",
               "0..", invariance="none", within_run=True, undefined=_NO_ROUTER, section=_SECTION, caveat=_SHIFT),
    Definition("router_cosine", "Direction of the router", "cos(W anchor, W current), W [E, d_in] as one vector",
               "-1..1", invariance="none", within_run=True, undefined=_NO_ROUTER, section=_SECTION, caveat=_SHIFT),
    Definition("router_change", "Change of the router", "norm_F(W current - W anchor) / norm_F(W anchor)", "0..",
               source="SAME measures router drift by gates instead", invariance="none", within_run=True,
               undefined=_NO_ROUTER, section=_SECTION, caveat=_SHIFT),
    Definition("router_change_centred", "Change of the router as gates see it",
               "router_change after subtracting the mean row of each router", "0..", source=_OWN,
               undefined="the site has no router weights, or one expert", section=_SECTION,
               caveat="Weights, not gates: router_js says how far the gates moved on real tokens."),
    Definition("magnitude_change", "Change of the DoRA magnitude", "norm(m current - m anchor) / norm(m anchor)",
               "0..", undefined="the site has no magnitude vector, or it is 0", section=_SECTION),
)  # fmt: skip

_SHARED = (
    "subspace_overlap", "subspace_overlap_adjusted", "principal_angles", "grassmann_distance", "output_overlap",
)  # fmt: skip
_PATHWAYS = {"rank_update_a": "a", "rank_update_b": "b"}

WEIGHT_MEASURES: dict[str, Definition] = {
    **{name: MEASURES[name] for name in _SHARED},
    **{entry.name: entry for entry in _NEW},
    **{
        name: replace(MEASURES["rank_update"], name=name, title=f"Pathway update of {letter.upper()}",
                      formula=f"norm({letter}_k current - {letter}_k anchor) / norm({letter}_k anchor)")
        for name, letter in _PATHWAYS.items()
    },
}  # fmt: skip
"""Measures of weights-only tables by column name; those of `MEASURES` keep their definition."""
