"""Fixtures that read rows by the host's own loading."""

from data_fixtures import config, model_dir, raw_config, tokenizer, trl_prepare  # noqa: F401
