"""Tiny runs on the toy stream: seconds, no download."""

from __future__ import annotations

import hashlib
from pathlib import Path

from driftlens.training.config import RunConfig, parse_config


def tiny_config(**sections) -> RunConfig:
    content = {
        "base": "tiny-random",
        "method": {"name": "pass-moe", "lambda_a": 0.1, "lambda_b": 0.01},
        "stream": {"name": "toy", "train_samples": 12, "test_samples": 4},
        "adapter": {"num_experts": 3, "r": 2, "layers": [2, 3], "init_std": 0.1},
        "training": {
            "steps_per_task": 4,
            "batch_size": 4,
            "learning_rate": 0.02,
            "prefix_cache": "memory",
            "device": "cpu",
            "threads": 1,
        },
        "evaluation": {"batch_size": 4, "max_new_tokens": 3},
    }
    for name, values in sections.items():
        if isinstance(values, dict) and name != "method":
            content[name] = content[name] | values
        else:
            content[name] = values
    return parse_config(content, "the test")


def digests(run: Path) -> dict[str, str]:
    """SHA-256 of every file of a run that must be reproducible, by relative path (locks and manifest left out)."""
    return {
        path.relative_to(run).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.name != "manifest.json" and not path.name.startswith(".")
    }
