"""The site families that DriftLens ships; importing this package registers them."""

from driftlens.recording.families.moe_lora import MoELoraFamily
from driftlens.recording.families.peft_lora import PeftLoraFamily
from driftlens.recording.sites import SITE_FAMILIES

__all__ = ["MoELoraFamily", "PeftLoraFamily"]

SITE_FAMILIES.register("moe-lora", MoELoraFamily())
SITE_FAMILIES.register("peft-lora", PeftLoraFamily())
