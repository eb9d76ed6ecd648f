"""The cache of text states: nothing twice, nothing lost, the same states as the encoder's."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixelflow_jax import encode, train
from pixelflow_jax.common import UserError
from pixelflow_jax.data import captioned_digits as digits
from pixelflow_jax.distributed import sharding
from pixelflow_jax.text.cache import EmbeddingCache, length_groups
from pixelflow_jax.text.encoder import TextEncoder
from pixelflow_jax.text.tokenizer import read_tokenizer


def captions(count: int) -> list[str]:
    """Different texts of several lengths."""
    words, n = digits.vocabulary(), len(digits.vocabulary())
    return [" ".join(words[(i // n**k) % n] for k in range(3)) + " a" * (i % 25) for i in range(count)]


@pytest.fixture
def caption_file(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_text("\n".join(captions(10_000)) + "\n")
    return path


def test_ten_thousand_captions_once(caption_file, t5_folder, tmp_path, capsys):
    """Catches a text that is encoded twice, lost, or gets another's states."""
    flags = [f"--captions={caption_file}", f"--encoder={t5_folder}", f"--out={tmp_path / 'states'}"]
    encode.main([*flags, "--max_length=32", "--negative_prompt=a blue"])
    assert "10002 texts encoded, 10002 in the cache" in capsys.readouterr().out
    encode.main([*flags, "--max_length=32", "--negative_prompt=a blue"])
    assert "0 texts encoded, 10002 in the cache" in capsys.readouterr().out
    cache = EmbeddingCache(str(tmp_path / "states"), width=16)
    texts = ["", "a blue", *captions(10_000)[:3], captions(10_000)[-1]]
    tokens = read_tokenizer(t5_folder)(texts, 32)
    encoder = TextEncoder(str(t5_folder), sharding.make_mesh(devices=jax.devices()[:1]))
    expected = np.asarray(encoder.condition(tokens.ids, tokens.mask)["context"].astype(jnp.float32))
    found = cache.padded(texts, 32)
    np.testing.assert_array_equal(found["context_mask"], tokens.mask)
    for row, mask in enumerate(tokens.mask):
        difference = found["context"][row][mask].astype(np.float32) - expected[row][mask]
        assert np.abs(difference).max() < 0.05  # bfloat16, and another padding
    with pytest.raises(UserError, match="does not hold the text 'unheard of'"):
        cache("unheard of")
    with pytest.raises(UserError, match="states of 16, the model takes 32"):
        EmbeddingCache(str(tmp_path / "states"), width=32)
    with pytest.raises(UserError, match="cut at 32 tokens, config.text.max_length is 16: encode again"):
        EmbeddingCache(str(tmp_path / "states"), 16, 16)
    with pytest.raises(UserError, match="of another encoder or length"):
        encode.main([*flags, "--max_length=16"])


def test_a_kill_loses_at_most_a_shard(caption_file, t5_folder, tmp_path, capsys):
    """Catches shards that count before they are whole, and a restart that begins anew."""
    out = tmp_path / "states"
    flags = [f"--captions={caption_file}", f"--encoder={t5_folder}", f"--out={out}", "--shard_size=500"]
    command = [sys.executable, "-m", "pixelflow_jax.encode", *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 240
    while len(list(out.glob("*.safetensors"))) < 3 and time.time() < deadline:
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    whole = len(list(out.glob("*.safetensors")))
    held = len(EmbeddingCache(str(out)))
    assert whole >= 3 and held >= 500 * (whole - 1)
    encode.main(flags)
    assert f"{10_001 - held} texts encoded, 10001 in the cache" in capsys.readouterr().out


@pytest.mark.slow
def test_training_from_the_cache(t5_folder, tmp_path):
    """Catches a cache whose states are not those that the encoder gives in training."""
    losses = {}
    small = ["num_heads=2", "head_dim=8", "depth=1", "context_dim=16"]
    flags = ["--config=t2i_tiny", *(f"--config.model.{x}" for x in small), "--config.batch_size=4"]
    flags += ["--config.num_train_steps=3", "--config.log_every=1", "--config.sample_every=3"]
    flags += ["--config.sample.num_images=2", "--config.sample.num_steps=1"]
    flags += [f"--config.text.encoder={t5_folder}", "--config.text.words=()"]
    file, cache = tmp_path / "all.txt", tmp_path / "states"
    everything = digits.CaptionedDigits(encode.default_config().data, "train")
    file.write_text("\n".join(t for i in range(len(everything)) for t in everything.captions(i)))
    encode.main([f"--captions={file}", f"--encoder={t5_folder}", f"--out={cache}", "--max_length=16"])
    for name, extra in (("encoder", []), ("cache", [f"--config.text.cache={cache}"])):
        train.main([*flags, f"--workdir={tmp_path / name}", *extra])
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines]
        assert (tmp_path / name / "samples" / "3.png").exists()
    np.testing.assert_allclose(losses["cache"], losses["encoder"], rtol=1e-3)


def test_length_groups():
    """Catches a text that is left out, encoded twice, or cut where it need not be."""
    lengths = np.random.default_rng(0).integers(1, 100, 300)
    groups = list(length_groups(lengths, 16, 100))
    places = np.concatenate([group for group, _ in groups])
    assert sorted(places.tolist()) == list(range(300))
    assert all(len(group) <= 16 and lengths[group].max() <= length for group, length in groups)
    assert {length for _, length in groups} == {16, 32, 64, 100}


def test_bad_caches(tmp_path):
    """Catches a traceback for what is no cache."""
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match="is not the manifest of a cache"):
        EmbeddingCache(str(tmp_path))
    (tmp_path / "manifest.json").write_text('{"width": 4}')
    (tmp_path / "000000.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="is not a shard of a cache"):
        EmbeddingCache(str(tmp_path))
    with pytest.raises(UserError, match="give either --config or --captions"):
        encode.main([f"--out={tmp_path}", "--encoder=x"])
