"""Configurations: one YAML file, overrides, and every problem named at once."""

from __future__ import annotations

import pytest

from driftlens.errors import ConfigError, NotFoundError
from driftlens.training.config import RunConfig, load_config


def test_yaml_round_trip_and_digest(tmp_path):
    config = load_config(None, ["method.name=pass-moe", "method.lambda_a=0.3", "training.seed=3", "name=x"])
    path = tmp_path / "c.yaml"
    path.write_text(config.to_yaml())
    again = load_config(path)
    assert again == config
    assert again.digest() == config.digest()


def test_digest_ignores_the_name_but_not_the_seed():
    config = RunConfig()
    assert config.model_copy(update={"name": "other"}).digest() == config.digest()
    reseeded = load_config(None, ["training.seed=1"])
    assert reseeded.digest() != config.digest()


def test_all_problems_are_listed_at_once_with_the_nearest_names():
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["training.sede=1", "adapter.num_expert=3", "training.batch_size=0", "bose=x"])
    text = str(caught.value)
    assert "4 problem(s)" in text
    assert "training.sede: unknown key. Did you mean 'seed'?" in text
    assert "adapter.num_expert: unknown key. Did you mean 'num_experts'?" in text
    assert "training.batch_size" in text
    assert "found 0" in text
    assert "bose: unknown key. Did you mean 'base'?" in text


def test_unknown_method_stream_and_method_option():
    with pytest.raises(ConfigError, match=r"Unknown method 'pas-moe'. Did you mean 'pass-moe'\?"):
        load_config(None, ["method.name=pas-moe"])
    with pytest.raises(ConfigError, match=r"Unknown stream 'bultin'. Did you mean 'builtin'\?"):
        load_config(None, ["stream.name=bultin"])
    with pytest.raises(ConfigError, match=r"method.lambda_c: unknown key. Did you mean 'lambda_[ab]'\?"):
        load_config(None, ["method.name=pass-moe", "method.lambda_c=1"])
    with pytest.raises(ConfigError, match=r"method.name is missing"):
        load_config(None, ["method={}"])


def test_files_that_are_no_configuration(tmp_path):
    with pytest.raises(NotFoundError, match="No configuration at"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1,")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="holds a list"):
        load_config(tmp_path / "list.yaml")


def test_overrides_that_cannot_be_read():
    with pytest.raises(ConfigError, match=r"Write key=value"):
        load_config(None, ["training.seed"])
    with pytest.raises(ConfigError, match=r"'base', which is a value"):
        load_config(None, ["base=x", "base.y=1"])
