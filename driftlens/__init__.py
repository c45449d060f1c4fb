"""DriftLens: where and why a continually trained mixture-of-experts LoRA model forgets."""

__version__ = "0.1.0"
