"""Shapes that signatures of this package share; the tests hold arguments and results to them.

``*site`` stands for any number of leading axes. Names are bound within one signature: two ``token`` axes have the
same length. 0 marks the anchor and 1 the current checkpoint, whose numbers of experts and ranks may differ.
"""

import numpy as np
from jaxtyping import Bool, Float, Float64, Integer, UInt8

__all__ = [
    "Columns0",
    "Columns1",
    "ExpertFactors0",
    "ExpertFactors1",
    "Flags",
    "Gates",
    "Gates0",
    "Gates1",
    "Gram0",
    "Gram1",
    "GramCross",
    "Importance",
    "Norms",
    "Norms0",
    "Norms1",
    "Paths",
    "Paths0",
    "Paths1",
    "PathwayGram",
    "PerExpert",
    "PerPathway",
    "PerSite",
    "PerTask",
    "PerToken",
    "Reasons",
    "Rows0",
    "Rows1",
    "Sample",
    "ScoreMatrix",
    "SiteGram00",
    "SiteGram01",
    "SiteGram11",
    "Ups0",
    "Ups1",
]

Sample = Integer[np.ndarray, "token"]
Gates = Float[np.ndarray, "*site token expert"]
Gates0 = Float[np.ndarray, "*site token expert0"]
Gates1 = Float[np.ndarray, "*site token expert1"]
Norms = Gates
Norms0 = Gates0
Norms1 = Gates1
Paths = Float[np.ndarray, "*site token expert rank"]
Paths0 = Float[np.ndarray, "*site token expert0 rank0"]
Paths1 = Float[np.ndarray, "*site token expert1 rank1"]
ExpertFactors0 = Float[np.ndarray, "*site expert0 d_out rank0"]
ExpertFactors1 = Float[np.ndarray, "*site expert1 d_out rank1"]
SiteGram00 = Float[np.ndarray, "*site expert0*rank0 expert0*rank0"]
SiteGram01 = Float[np.ndarray, "*site expert0*rank0 expert1*rank1"]
SiteGram11 = Float[np.ndarray, "*site expert1*rank1 expert1*rank1"]
Rows0 = Float[np.ndarray, "*site rank0 dim"]
Rows1 = Float[np.ndarray, "*site rank1 dim"]
Columns0 = Float[np.ndarray, "*site dim rank0"]
Columns1 = Float[np.ndarray, "*site dim rank1"]
Ups0 = Float[np.ndarray, "*site dim_out rank0"]
Ups1 = Float[np.ndarray, "*site dim_out rank1"]
Gram0 = Float[np.ndarray, "*site rank0 rank0"]
Gram1 = Float[np.ndarray, "*site rank1 rank1"]
GramCross = Float[np.ndarray, "*site rank0 rank1"]
Importance = Float[np.ndarray, "*site expert rank"]
PerSite = Float64[np.ndarray, "*site"]
PerToken = Float64[np.ndarray, "*site token"]
PerExpert = Float64[np.ndarray, "*site expert"]
Reasons = UInt8[np.ndarray, "*site"]
Flags = Bool[np.ndarray, "*site"]
PathwayGram = Float[np.ndarray, "*site rank rank"]
PerPathway = Float64[np.ndarray, "*site rank"]
PerTask = Float64[np.ndarray, "task"]
ScoreMatrix = Float[np.ndarray, "checkpoint task"]
