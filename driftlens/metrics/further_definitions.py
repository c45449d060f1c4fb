"""Definitions beside `MEASURES`: parts and companions of its measures, attribution, others' scores, and nulls."""

from __future__ import annotations

from dataclasses import replace

from driftlens.metrics.definitions import MEASURES, Definition
from driftlens.metrics.stream import FOREIGN_SCORES
from driftlens.metrics.weight_definitions import WEIGHT_MEASURES

__all__ = ["ALL_MEASURES", "COMPUTED_BY", "FURTHER_MEASURES"]

_OWN = "DriftLens; no paper defines it"


def _part(of: str, name: str, title: str, formula: str, range: str = "", undefined: str = "") -> Definition:  # noqa: A002
    whole = MEASURES[of]
    return replace(whole, name=name, title=title, formula=formula, chance="", range=range or whole.range,
                   undefined=undefined or whole.undefined)  # fmt: skip


_COMPANIONS = (
    Definition("load", "Mean gate", "mean_i pi_i,e over sum_f pi_i,f, by expert", "0..1, sums to 1 over experts",
               chance="1/E", caveat="Equal loads can hide tokens that swapped experts; router_js follows each token."),
    Definition("js_divergence", "Jensen-Shannon divergence", "H((p + q)/2) - (H(p) + H(q))/2, base 2, of any two rows",
               "0..1", source="Lin 1991", undefined="a row holds NaN",
               caveat="Rows are normalised; a row of zeros counts as all mass on \"nobody\"."),
    Definition("near_uniform", "Gate that never routed", "gate_entropy > 0.99", "true or false",
               undefined="never: false where gate_entropy is undefined"),
    _part("importance_concentration", "importance_gini", "Gini coefficient of importance",
          "sum_a sum_b |I_a - I_b| / (2 m sum_a I_a) over the m = E r pathways of a site", range="0..1 - 1/(E r)"),
    _part("rank_update", "rank_update_a_correlation", "Do important pathways of A move",
          "Spearman correlation over a site's pathways of rank_update_a with rank_importance at the anchor",
          "-1..1", "either is the same for all pathways, or undefined for one"),
    _part("rank_update", "rank_update_b_correlation", "Do important pathways of B move",
          "Spearman correlation over a site's pathways of rank_update_b with rank_importance at the anchor",
          "-1..1", "either is the same for all pathways, or undefined for one"),
    Definition("biased_cka", "Output similarity (biased CKA)",
               "norm_F(X^T Y)^2 / (norm_F(X^T X) norm_F(Y^T Y)) of an expert's centred outputs at both checkpoints",
               "0..1", chance="about d / (n + d)", source="Kornblith et al. 2019", section="2",
               undefined="no token, or an expert's outputs do not vary between tokens (B = 0)",
               caveat="Only to compare with what others print: 0.34 on independent data at n = 1000, d = 512."),
    _part("impact", "impact_router", "Impact, router part", "mean_i norm(R_i)^2 / mean_i norm(y_i)^2"),
    _part("impact", "impact_experts", "Impact, expert part", "mean_i norm(E_i)^2 / mean_i norm(y_i)^2"),
    _part("impact", "impact_cross", "Impact, cross term",
          "mean_i <R_i, E_i> / mean_i norm(y_i)^2; impact = router + experts + 2 cross", range="any sign"),
    Definition("responsibility", "Share of the update",
               "rho_i,e = pi_i,e norm(o_i,e) / sum_f pi_i,f norm(o_i,f), by token", "0..1, sums to 1 over experts",
               source=_OWN, undefined="the token gets no output from any expert", section="3b"),
    _part("responsibility_router", "responsibility_router_alone", "Responsibility drift with the new gate alone (D_R)",
          "mean_i JS(rho00_i, rho10_i), base 2", range="0..1"),
    _part("responsibility_experts", "responsibility_experts_alone",
          "Responsibility drift with the new experts alone (D_E)", "mean_i JS(rho00_i, rho01_i), base 2", range="0..1"),
    _part("alignment", "alignment_loss", "Alignment lost since the anchor", "alignment(anchor) - alignment(current)",
          range="-1..1", undefined="the experts give no output (B = 0) at one of the checkpoints"),
)  # fmt: skip

_SWAPS = "no score with swapped routers or experts was taken"
_NO_LEDGER = "the task was not attributed"
_ATTRIBUTION = (
    Definition("swap_forgetting", "Forgetting of the adapted sites", "S_aa - S_cc", "score difference",
               source=_OWN, undefined=_SWAPS, section="4a",
               caveat="Without what is not in the sites, a trained projector for instance: see remainder."),
    Definition("phi_router", "Forgetting due to the router", "1/2 [(S_aa - S_ca) + (S_ac - S_cc)]",
               "score difference", source=_OWN + "; generalises SAME's re-routing", undefined=_SWAPS, section="4a",
               caveat="A Shapley value: half of the interaction is in it. phi_router + phi_experts = S_aa - S_cc."),
    Definition("phi_experts", "Forgetting due to the experts", "1/2 [(S_aa - S_ac) + (S_ca - S_cc)]",
               "score difference", source=_OWN + "; generalises SAME's re-routing", undefined=_SWAPS, section="4a",
               caveat="A Shapley value: half of the interaction is in it. phi_router + phi_experts = S_aa - S_cc."),
    Definition("interaction", "Interaction of router and experts", "S_aa - S_ca - S_ac + S_cc", "score difference",
               chance="0", source=_OWN, undefined=_SWAPS, section="4a",
               caveat="0: the two losses add up. Either sign says that one swap alone misleads."),
    Definition("remainder", "Forgetting outside the sites", "score of the anchor itself - S_aa", "score difference",
               source=_OWN, undefined="the anchor could not be run by itself", section="4a"),
    Definition("depth_shapley", "Forgetting by depth",
               "Shapley value of a group of sites: its mean gain on joining the others in sampled orders",
               "score difference", source="Castro et al. 2009; antithetic orders after Mitchell et al. 2022",
               undefined=_SWAPS, section="4a", caveat="An estimate: its standard error over orders stands beside it."),
    Definition("ledger", "Forgetting ledger",
               "integral over alpha of sum_i <dL/dy_i, R_i,e> (router) or <dL/dy_i, E_i,e> (experts) on the straight "
               "path from the anchor's updates to the current ones", "nats, any sign", source=_OWN,
               undefined=_NO_LEDGER, section="4b",
               caveat="Depends on the path, which is the straight line. What is not on it is the remainder."),
    Definition("residual", "Residual of the ledger", "rise of the answer NLL - sum of the ledger", "nats, any sign",
               chance="0", source=_OWN, undefined=_NO_LEDGER, section="4b",
               caveat="Numerical integration, and jumps of top-k gates."),
)  # fmt: skip

_FOREIGN = tuple(
    Definition(name, name, formula, "score difference", source=f"{name.split()[0]}, under its own definition",
               undefined="one task, or a score is missing", section="5")
    for name, formula in FOREIGN_SCORES.items()
)  # fmt: skip

_NULLS = (
    Definition("p_value", "p-value",
               "(1 + number of null draws at least as far out) / (1 + number of draws); null: permuted tokens, "
               "permuted experts, or random subspaces", "above 0, at most 1", chance="uniform",
               source="permutation test", undefined="the value is undefined", section="6",
               caveat="One-sided. With E experts at one site it cannot fall much below 1/E!."),
    Definition("percentile", "Place in the null", "share of null draws below the value, ties counted half", "0..1",
               chance="uniform", undefined="the value is undefined", section="6"),
    Definition("random_overlap", "Overlap of random subspaces",
               "mean max(r0, r1)/d and spread sqrt(2 r0 r1 (d - r0)(d - r1) / (d^2 (d - 1)(d + 2))) / min(r0, r1)",
               "0..1", undefined="never", section="6"),
    Definition("profile_similarity", "Likeness of two experts' profiles",
               "Pearson correlation over tokens or samples of the responsibility of an expert of one run with that of "
               "another", "-1..1", chance="0", source=_OWN, undefined="a profile is constant", section="6"),
    Definition("matching", "Matching of experts", "the one-to-one pairing with the highest sum of profile_similarity",
               "-1..1 (mean over pairs)", chance="its permutation null, always beside it", source="Hungarian method",
               undefined="no expert has a partner", section="6",
               caveat="The best of E! pairings looks good on anything: read it against its null."),
)  # fmt: skip

FURTHER_MEASURES: dict[str, Definition] = {
    entry.name: entry for group in (_COMPANIONS, _ATTRIBUTION, _FOREIGN, _NULLS) for entry in group
}
"""Definitions by name of what is printed beside `MEASURES` and `WEIGHT_MEASURES`."""

ALL_MEASURES: dict[str, Definition] = {**MEASURES, **WEIGHT_MEASURES, **FURTHER_MEASURES}
"""Every definition, by name."""

_PARTS = {
    "codrift": ("codrift_divergence", "codrift_router", "codrift_experts", "codrift_cross", "coupling",
                "codrift_share"),
    "drift_origin": ("codrift_inherited", "codrift_local", "codrift_origin_cross"),
    "CoDriftTokens.impact": ("impact", "impact_router", "impact_experts", "impact_cross"),
    "responsibility_drift": ("responsibility_divergence", "responsibility_router", "responsibility_experts",
                             "responsibility_router_alone", "responsibility_experts_alone", "responsibility_synergy",
                             "retained"),
    "alignment": ("alignment_loss",),
    "importance_concentration": ("importance_gini",),
    "spearman": ("rank_update_a_correlation", "rank_update_b_correlation"),
    "rank_update": ("rank_update_a", "rank_update_b"),
    "SubspacePair.adjusted": ("output_overlap_adjusted",),
    "principal_angles": ("largest_angle",),
    "update_norm": ("update_norm_anchor",),
    "update_change": ("update_difference", "update_change", "update_cosine"),
    "numerical_rank": ("update_rank",),
    "row_drift": ("router_row_cosine", "router_row_change", "router_cosine", "router_change", "router_change_centred",
                  "magnitude_change"),
    "stream_scores": ("AP", "MAA", "MFT", "BWT_T", "BWT_T-1", "forgetting_max", "FWT"),
    "foreign_scores": tuple(FOREIGN_SCORES),
    "forgetting_attribution": ("swap_forgetting", "phi_router", "phi_experts", "interaction"),
    "permutation_shapley": ("depth_shapley",),
    "null_test": ("p_value", "percentile"),
    "best_matching": ("matching",),
}  # fmt: skip

COMPUTED_BY: dict[str, str] = {
    **{name: name for name in ALL_MEASURES if name not in ("remainder", "ledger", "residual")},
    **{name: function for function, names in _PARTS.items() for name in names},
}
"""Function (or method) of this package that computes a measure; three need a model (`driftlens.attribution`)."""
