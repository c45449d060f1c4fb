"""What every printed number means: one table for the command line, the app and the documentation.

Adding a measure is one entry here beside its function; `MEASURES` is keyed by the name that tables use.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MEASURES", "Definition"]

_GAUGE = "gauge"
_NONE = "none"
_OWN = "DriftLens; no paper defines it"


@dataclass(frozen=True)
class Definition:
    """Definition of one measure.

    Attributes:
        name: column name in tables.
        title: short label for charts.
        formula: the definition in plain text, symbols of docs/metrics.md.
        range: values it can take.
        chance: its value under chance, "" if there is none.
        invariance: "gauge" if (A, B) -> (GA, BG^-1) leaves it, "gauge, gate" if it does not look inside the experts,
            "none" otherwise.
        within_run: meaningful only along one training run.
        source: who defined it.
        caveat: what it does not say.
        undefined: when it is NaN.
        section: section of docs/metrics.md.
    """

    name: str
    title: str
    formula: str
    range: str
    chance: str = ""
    invariance: str = _GAUGE
    within_run: bool = False
    source: str = "standard"
    caveat: str = ""
    undefined: str = "no token was recorded"
    section: str = "1"


_UNIFORM = "A gate that never routed (gate_entropy above 0.99) cannot drift: its 0 says nothing."
_ONE_EXPERT = "one expert, or no token"

_ROUTING = (
    Definition(
        "router_js",
        "Routing drift",
        "mean_i JS(pi_i anchor, pi_i current), base 2",
        "0..1",
        caveat=_UNIFORM,
    ),
    Definition(
        "router_js_distance",
        "Routing distance",
        "mean_i sqrt(JS(pi_i anchor, pi_i current)), base 2",
        "0..1",
        caveat=_UNIFORM,
    ),
    Definition(
        "marginal_js",
        "Load drift",
        "JS(mean_i pi_i anchor, mean_i pi_i current), base 2",
        "0..1",
        source="SAME (histogram view)",
        caveat="Averaging before the divergence hides tokens that swap experts; never above router_js.",
    ),
    Definition(
        "sample_js",
        "Routing drift by sample",
        "mean over samples of JS(mean over the sample's tokens of pi anchor, the same current), nats",
        "0..ln 2",
        source="PASs-MoE Fig. 3",
        caveat="Averages gates before the divergence; kept to reproduce the figure.",
    ),
    Definition(
        "mass_moved", "Gate mass moved", "mean_i 1/2 sum_e |pi_i,e anchor - pi_i,e current|", "0..1", caveat=_UNIFORM
    ),
    Definition(
        "top1_switch",
        "Top-1 switches",
        "share of tokens whose arg-max expert changed; ties by index",
        "0..1",
        chance="1 - sum_e p_e q_e",
        caveat="Blind to weights; near ties switch on rounding.",
    ),
    Definition(
        "topk_overlap",
        "Top-k overlap",
        "mean_i |top-k anchor and top-k current| / k",
        "0..1",
        chance="k/E",
        source="OLMoE (router saturation)",
        caveat="Blind to weights: 1 still allows the gate to change.",
    ),
    Definition(
        "relative_js",
        "Relative routing drift",
        "router_js / mean JS between different tokens of the probe at the anchor (seeded pairing)",
        "0..",
        chance="1",
        source=_OWN,
        undefined="different tokens are routed alike to within the noise floor, or fewer than two tokens",
    ),
    Definition(
        "gate_entropy",
        "Gate entropy",
        "mean_i H(pi_i) / ln E",
        "0..1",
        undefined=_ONE_EXPERT,
        caveat="Per token: 0 one-hot, 1 never routed. Opposite in meaning to load_entropy.",
    ),
    Definition(
        "load_entropy",
        "Load entropy",
        "H(mean_i pi_i) / ln E",
        "0..1",
        undefined=_ONE_EXPERT,
        caveat="Over the probe: 1 balanced. Opposite in meaning to gate_entropy.",
    ),
    Definition(
        "specialisation",
        "Specialisation",
        "I(expert; task) over the probes, equal task weight, Miller-Madow corrected, / ln min(E, tasks)",
        "0..1",
        chance="0",
        undefined="one expert, one task, or an empty probe",
    ),
    Definition(
        "coactivation",
        "Co-activation",
        "P(f in top-k set | e in top-k set), all pairs",
        "0..1",
        chance="(k-1)/(E-1)",
        source="OLMoE, counted over all pairs",
        undefined="e was never active",
    ),
    Definition("dead_experts", "Dead experts", "number of experts with mean gate below 1/(10 E)", "0..E"),
)

_SUBSPACES = (
    Definition(
        "subspace_overlap",
        "PAS overlap",
        "norm_F(Q anchor Q current^T)^2 / min(rank)",
        "0..1",
        chance="r/d_in",
        source="LoRA (Hu et al.), phi",
        undefined="a factor of zeros",
        caveat="Counts directions that the probe never uses; see active_overlap.",
        section="2",
    ),
    Definition(
        "subspace_overlap_adjusted",
        "PAS overlap above chance",
        "(overlap - r/d_in) / (1 - r/d_in)",
        "<= 1",
        chance="0",
        undefined="a factor of zeros, or rank = d_in",
        section="2",
    ),
    Definition(
        "principal_angles",
        "Principal angles",
        "arccos of the singular values of Q anchor Q current^T, ascending",
        "0..pi/2",
        undefined="beyond the smaller numerical rank",
        section="2",
    ),
    Definition(
        "grassmann_distance",
        "Grassmann distance",
        "norm_2(principal angles) / sqrt(rank)",
        "0..pi/2",
        undefined="a factor of zeros",
        section="2",
    ),
    Definition(
        "active_overlap",
        "Used PAS overlap",
        "sum_k lambda_k norm(Q current v_k)^2 / sum_k lambda_k over the eigenpairs of mean q q^T at the anchor",
        "0..1",
        source=_OWN,
        undefined="a factor of zeros, or a probe that does not reach the subspace",
        section="2",
    ),
    Definition(
        "active_rank",
        "Used rank",
        "exp(entropy of lambda / sum lambda)",
        "1..r",
        undefined="a factor of zeros, or a probe that does not reach the subspace",
        section="2",
    ),
    Definition(
        "output_overlap",
        "Output overlap",
        "subspace_overlap on the column spaces of B",
        "0..1",
        chance="r/d_out",
        undefined="a factor of zeros (B before the first task)",
        section="2",
    ),
    Definition(
        "rank_importance",
        "Pathway importance",
        "mean_i pi_i,e z_i,e,k^2",
        "0..",
        invariance=_NONE,
        within_run=True,
        source="PASs-MoE Eq. 9",
        section="2",
    ),
    Definition(
        "importance_concentration",
        "Importance concentration",
        "share of the total importance in the top 40 % of pathways; Gini coefficient beside it",
        "0.4..1",
        chance="0.4",
        invariance=_NONE,
        within_run=True,
        undefined="no pathway has importance",
        section="2",
    ),
    Definition(
        "rank_update",
        "Pathway update",
        "norm(a current - a anchor) / norm(a anchor) per pathway, the same for b",
        "0..",
        invariance=_NONE,
        within_run=True,
        undefined="the anchor's vector is 0",
        section="2",
    ),
    Definition(
        "expert_drift",
        "Expert drift",
        "sqrt(mean_i norm(o_i,e current - o_i,e anchor)^2 / mean_i norm(o_i,e anchor)^2), both on the current input",
        "0..",
        source=_OWN,
        undefined="the expert gives no output at the anchor (B = 0), or was not there yet",
        caveat="Needs a recording with a reference. Exact over all tokens, which weigh alike; says nothing about use.",
        section="2",
    ),
    Definition(
        "cka",
        "Output similarity (CKA)",
        "HSIC(o anchor, o current) / sqrt(HSIC(o anchor) HSIC(o current)) over tokens, unbiased HSIC of linear kernels",
        "about 0..1",
        chance="0",
        source="Kornblith et al.; debiased as Nguyen et al.",
        undefined="fewer than 4 tokens, or an expert's outputs do not vary between tokens (B = 0)",
        caveat="Blind to rotation, shift and size of the outputs: 1 does not say that they stayed. Below 0 is chance.",
        section="2",
    ),
)

_OUTPUTLESS = "the experts give no output (B = 0)"
_CODRIFT = (
    Definition(
        "codrift_divergence",
        "Co-drift divergence",
        "mean_i norm(u11_i - u00_i)^2 / (2 mean_i norm(u00_i)^2 + 2 mean_i norm(u11_i)^2)",
        "0..1",
        chance="1/2",
        source=_OWN,
        undefined=_OUTPUTLESS + " at either checkpoint",
        caveat="All of the site's drift on this input, whether upstream or local; impact says if it matters.",
        section="3a",
    ),
    Definition(
        "codrift_router",
        "Router part",
        "mean_i norm(R_i)^2 / n with R_i = sum_e (pi1 - pi0)_e (o0 + o1)_e / 2",
        "0..",
        source=_OWN,
        undefined=_OUTPUTLESS + " at either checkpoint",
        section="3a",
    ),
    Definition(
        "codrift_experts",
        "Expert part",
        "mean_i norm(E_i)^2 / n with E_i = sum_e (pi0 + pi1)_e / 2 (o1 - o0)_e",
        "0..",
        source=_OWN,
        undefined=_OUTPUTLESS + " at either checkpoint",
        section="3a",
    ),
    Definition(
        "codrift_cross",
        "Cross term",
        "mean_i <R_i, E_i> / n; router + experts + 2 cross = divergence",
        "any sign",
        source=_OWN,
        undefined=_OUTPUTLESS + " at either checkpoint",
        section="3a",
    ),
    Definition(
        "coupling",
        "Coupling",
        "cross / sqrt(router part * expert part)",
        "-1..1",
        chance="0",
        source=_OWN,
        undefined="router or experts did not move",
        caveat="Above 0 both push the output the same way; below 0 one repairs the other. Says nothing about size.",
        section="3a",
    ),
    Definition(
        "codrift_share",
        "Co-drift share",
        "2 cross / divergence",
        "<= 1",
        chance="0",
        source=_OWN,
        undefined="nothing moved",
        section="3a",
    ),
    Definition(
        "codrift_inherited",
        "Inherited part",
        "mean_i norm(u(anchor, new input) - u(anchor, old input))^2 / n; inherited + local + 2 cross = divergence",
        "0..",
        source=_OWN,
        undefined=_OUTPUTLESS + " at either checkpoint",
        caveat="What upstream layers changed in the site's input. Needs a recording with a reference.",
        section="3a",
    ),
    Definition(
        "codrift_local",
        "Local part",
        "mean_i norm(u(current, new input) - u(anchor, new input))^2 / n",
        "0..",
        source=_OWN,
        undefined=_OUTPUTLESS + " at either checkpoint",
        caveat="What the site's own parameters changed. Needs a recording with a reference.",
        section="3a",
    ),
    Definition(
        "codrift_origin_cross",
        "Inherited and local together",
        "mean_i <inherited_i, local_i> / n",
        "any sign",
        source=_OWN,
        undefined=_OUTPUTLESS + " at either checkpoint",
        caveat="Below 0 the site makes up for what it is given.",
        section="3a",
    ),
    Definition(
        "impact",
        "Impact",
        "mean_i norm(u11_i - u00_i)^2 / mean_i norm(y_i)^2, y the base module's output",
        "0..",
        source=_OWN,
        undefined="the base module's output is 0 or was not recorded",
        section="3a",
    ),
    Definition(
        "responsibility_divergence",
        "Responsibility drift",
        "mean_i JS(rho00_i, rho11_i), base 2, rho_e = pi_e norm(o_e) / sum_f pi_f norm(o_f)",
        "0..1",
        source=_OWN,
        undefined=_OUTPUTLESS + " at one of the checkpoints",
        caveat="Who acts, not what they do: an overwritten expert keeps its share. Never shown alone.",
        section="3b",
    ),
    Definition(
        "responsibility_router",
        "Router part of responsibility",
        "1/2 [D_R + (D - D_E)]",
        "-1/2..1",
        source=_OWN,
        undefined=_OUTPUTLESS + " at one of the checkpoints",
        section="3b",
    ),
    Definition(
        "responsibility_experts",
        "Expert part of responsibility",
        "1/2 [D_E + (D - D_R)]",
        "-1/2..1",
        source=_OWN,
        undefined=_OUTPUTLESS + " at one of the checkpoints",
        caveat="Under-reports the experts; see codrift_experts.",
        section="3b",
    ),
    Definition(
        "responsibility_synergy",
        "Synergy",
        "D - D_R - D_E",
        "-2..1",
        source=_OWN,
        undefined=_OUTPUTLESS + " at one of the checkpoints",
        section="3b",
    ),
    Definition(
        "retained",
        "Responsibility retained",
        "mean_i sum_e min(rho00, rho11)",
        "0..1",
        source=_OWN,
        undefined=_OUTPUTLESS + " at one of the checkpoints",
        section="3b",
    ),
    Definition(
        "alignment",
        "Alignment",
        "1 - mean_i JS(pi_i, norm(o_i,e) / sum_f norm(o_i,f))",
        "0..1",
        source=_OWN,
        undefined=_OUTPUTLESS,
        section="3b",
    ),
    Definition(
        "alignment_energy",
        "Alignment with energy",
        "alignment with norm(A_e h)^2 / r in place of norm(o_e)",
        "0..1",
        invariance=_NONE,
        within_run=True,
        source="PASs-MoE's pathway energy",
        undefined="no pathway is active",
        section="3b",
    ),
)

_SCORES = (
    Definition("AP", "Average performance", "mean_j a[T, j]", "score", section="5", undefined="a score is missing"),
    Definition(
        "MAA",
        "Mean average accuracy",
        "mean_t mean_{j<=t} a[t, j]",
        "score",
        section="5",
        undefined="a score is missing",
    ),
    Definition(
        "MFT", "Score just after learning", "mean_j a[j, j]", "score", section="5", undefined="a score is missing"
    ),
    Definition(
        "BWT_T",
        "Backward transfer (over T)",
        "(1/T) sum_{j<=T} (a[T, j] - a[j, j])",
        "score difference",
        source="CoIN, PASs-MoE",
        section="5",
        undefined="a score is missing",
        caveat="The last task adds 0; smaller in size than BWT_T-1 by the factor (T-1)/T.",
    ),
    Definition(
        "BWT_T-1",
        "Backward transfer (over T-1)",
        "1/(T-1) sum_{j<T} (a[T, j] - a[j, j])",
        "score difference",
        source="GEM",
        section="5",
        undefined="one task, or a score is missing",
    ),
    Definition(
        "forgetting_max",
        "Forgetting from the best",
        "mean_{j<T} (max_{l<T} a[l, j] - a[T, j]), checkpoint 0 included in the maximum",
        "score difference",
        source="Chaudhry et al.",
        section="5",
        undefined="one task, or a score is missing",
    ),
    Definition(
        "FWT",
        "Forward transfer",
        "mean_{j>1} (a[j-1, j] - a[0, j])",
        "score difference",
        source="GEM",
        section="5",
        undefined="one task, or a score is missing",
    ),
    Definition(
        "format_share",
        "Share of format drift",
        "1 - lenient forgetting / strict forgetting",
        "<= 1, or above if the lenient score rose",
        source="after SAME's observation on letter case",
        section="5",
        undefined="nothing was forgotten under the strict scorer",
    ),
)

MEASURES: dict[str, Definition] = {
    entry.name: entry for group in (_ROUTING, _SUBSPACES, _CODRIFT, _SCORES) for entry in group
}
"""All measures by name."""
