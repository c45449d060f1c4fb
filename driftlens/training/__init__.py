"""The continual trainer: one method over one stream, one checkpoint per task, every task scored after every task."""

from driftlens.training.config import RunConfig, load_config, parse_config
from driftlens.training.run import Progress, train_run

__all__ = ["Progress", "RunConfig", "load_config", "parse_config", "train_run"]
