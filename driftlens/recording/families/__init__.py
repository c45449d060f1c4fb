"""The site families that DriftLens ships; importing this package registers them."""

from driftlens.recording.families.moe_lora import MoELoraFamily
from driftlens.recording.sites import SITE_FAMILIES

__all__ = ["MoELoraFamily"]

SITE_FAMILIES.register("moe-lora", MoELoraFamily())
