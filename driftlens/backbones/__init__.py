"""Base models: the built-in one, a toy for tests, any hub id or folder; and how samples become their tokens."""

from __future__ import annotations

from driftlens.backbones.assets import AssetPaths, cached_assets, default_cache_dir, fetch_assets
from driftlens.backbones.encoding import ROLES, Encoded, Encoder, collate
from driftlens.backbones.loading import Backbone, decoder_layers, load_backbone

__all__ = [
    "ROLES",
    "AssetPaths",
    "Backbone",
    "Encoded",
    "Encoder",
    "cached_assets",
    "collate",
    "decoder_layers",
    "default_cache_dir",
    "fetch_assets",
    "load_backbone",
]
