"""What a checkpoint from elsewhere may lead to: nothing outside it, whatever its config says."""

import argparse
import os
import sys

import jax
import numpy as np
import pytest

from pixelflow_jax import demo, sample
from pixelflow_jax.common import UserError
from pixelflow_jax.config import build_model, load_config
from pixelflow_jax.models.conditioning import abstract_params
from pixelflow_jax.requests.conditions import encode
from pixelflow_jax.text.encoder import JOINT, KNOWN, trusted_encoder
from pixelflow_jax.training.checkpoints import save_params


def test_encoders_of_a_checkpoint(tmp_path):
    """Catches a way out of the checkpoint's folder: a path, a link, a bucket, or somebody's hub id."""
    run, away = tmp_path / "run", tmp_path / "away"
    for folder in (run / "t5", run / "checkpoints" / "4" / "t5b", away, tmp_path / "run2"):
        folder.mkdir(parents=True)
    (run / "link").symlink_to(away)
    (tmp_path / "moved").symlink_to(run / "checkpoints" / "4")
    for name in ("", JOINT, *KNOWN):
        assert trusted_encoder(name, run) == name
    for checkpoint in (run, run / "checkpoints", run / "checkpoints" / "4"):
        assert trusted_encoder("t5", checkpoint) == str(run / "t5")
        assert trusted_encoder(str(run / "t5"), checkpoint) == str(run / "t5")
        assert trusted_encoder("./t5/../t5", checkpoint).startswith(str(run))
    assert trusted_encoder("t5b", tmp_path / "moved") == str(tmp_path / "moved" / "t5b")
    outside = [str(away), "../away", "t5/../../away", "link", "./link", "..", ".", "/", "../run2"]
    outside += ["someone/model", "google/flan-t5-xl/../../x", "GOOGLE/flan-t5-xl", "gs://bucket/t5"]
    outside += ["gs://b/run/../t5", "http://x/y", "~/t5", "t6", str(run) + "2", "file:///etc"]
    for name in outside:
        for checkpoint in (run, run / "checkpoints", run / "checkpoints" / "4"):
            with pytest.raises(UserError) as error:
                trusted_encoder(name, checkpoint)
            assert f"--text_encoder={name}" in str(error.value)
    for name in ("gs://bucket/t5", "gs://b/run/../t5", "gs://b/run2", "../t5", str(away)):
        with pytest.raises(UserError, match="--text_encoder"):
            trusted_encoder(name, "gs://b/run")


opened = []  # of files; an audit hook stays for the life of the process
sys.addaudithook(lambda event, args: opened.append(args[0]) if event == "open" else None)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A text model whose config names a place outside in every key that could hold one."""
    folder = tmp_path_factory.mktemp("hostile")
    outside = folder / "outside"
    (outside / "train").mkdir(parents=True)
    config = load_config("t2i_tiny", ["model.num_heads=2", "model.head_dim=8", "model.depth=1"])
    config.model.context_dim, config.text.words = 16, ()
    config.text.encoder = config.init_from = config.data.path = config.text.cache = str(outside)
    config.data.source = "caption_folder"
    shapes = abstract_params(build_model(config))
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    save_params(folder / "a", params, config)
    return folder


def test_prompts_wait_for_a_word(tmp_path):
    """Catches sampling that follows the checkpoint before anybody has said that it may."""
    config = load_config("t2i_tiny", ["text.encoder=someone/model", "text.words=()"])
    args = argparse.Namespace(text_encoder=None, checkpoint=str(tmp_path))
    with pytest.raises(UserError, match="--text_encoder=someone/model"):
        encode(args, ["six"], config)


@pytest.mark.slow
def test_sampling_reads_nothing_else(hostile, tmp_path, t5_folder):
    """Catches a key of a checkpoint's config that makes sampling or the demo read or fetch something."""
    flags = [f"--checkpoint={hostile / 'a'}", "--prompt=six", f"--out={tmp_path / 'out'}"]
    with pytest.raises(UserError, match=f"--text_encoder={hostile / 'outside'}"):
        sample.main(flags)
    pytest.importorskip("gradio")
    with pytest.raises(UserError, match="--text_encoder="):
        demo.main([f"--checkpoint={hostile / 'a'}", "--port=0"])
    sample.main([*flags, f"--text_encoder={t5_folder}", "--num_steps=1"])
    outside = [path for path in map(str, opened) if os.fspath(hostile / "outside") in path]
    assert not outside
