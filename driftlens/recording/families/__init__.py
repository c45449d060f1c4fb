"""The site families that DriftLens ships; importing this package registers them."""

from driftlens.recording.families.foreign import ForeignFamily
from driftlens.recording.families.moe_lora import MoELoraFamily
from driftlens.recording.families.native_moe import NativeMoEFamily
from driftlens.recording.families.peft_fused import PeftFusedFamily
from driftlens.recording.families.peft_lora import PeftLoraFamily
from driftlens.recording.families.peft_mixtures import LilyFamily, PolyFamily, XLoraFamily
from driftlens.recording.sites import SITE_FAMILIES

__all__ = [
    "ForeignFamily",
    "LilyFamily",
    "MoELoraFamily",
    "NativeMoEFamily",
    "PeftFusedFamily",
    "PeftLoraFamily",
    "PolyFamily",
    "XLoraFamily",
]

SITE_FAMILIES.register("foreign", ForeignFamily())
SITE_FAMILIES.register("moe-lora", MoELoraFamily())
SITE_FAMILIES.register("native-moe", NativeMoEFamily())
SITE_FAMILIES.register("peft-fused", PeftFusedFamily())
SITE_FAMILIES.register("peft-lora", PeftLoraFamily())
SITE_FAMILIES.register("peft-lily", LilyFamily())
SITE_FAMILIES.register("peft-poly", PolyFamily())
SITE_FAMILIES.register("peft-xlora", XLoraFamily())
