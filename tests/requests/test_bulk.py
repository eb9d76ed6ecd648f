"""Many prompts: states made as images need them, and layouts that are written image by image."""

import tracemalloc

import jax
import numpy as np
import pytest
from etils import epath

from pixelflow_jax.config import load_config
from pixelflow_jax.distributed import sharding
from pixelflow_jax.requests import conditions, layouts, request
from pixelflow_jax.requests.conditions import ENCODED, States, read_conditions
from pixelflow_jax.requests.output import chunks
from pixelflow_jax.sampling.generate import read_image
from pixelflow_jax.text.encoder import TextEncoder, make_tokenizer

RNG = np.random.default_rng(0)


@pytest.fixture
def text_config(t5_folder):
    """Of a model for a tiny frozen T5."""
    config = load_config("configs/t2i_tiny.py", ["model.num_heads=2", "model.head_dim=8"])
    config.text.encoder, config.text.words = str(t5_folder), ()
    config.model.context_dim = 16
    return config


def ask(tmp_path, config, count, *flags):
    """The flags of `sample` for `count` prompts, of one to six words."""
    words = "small large red green blue six".split()
    lines = (" ".join(RNG.permutation(words)[: 1 + i % 6]) for i in range(count))
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    file = f"--prompts_file={tmp_path / 'prompts.txt'}"
    encoder = f"--text_encoder={config.text.encoder}"
    return request.parse("", ["--checkpoint=x", "--out=y", file, encoder, *flags])


def test_states_do_not_depend_on_when_they_are_made(text_config, tmp_path, monkeypatch):
    """Catches a text whose states depend on its image's batch, or that gets those of another; and the
    encoder in memory for a few prompts, which are all encoded at once."""
    args = ask(
        tmp_path, text_config, 200, "--negative_prompt=blue", "--num_images=300", "--first_image=7"
    )
    whole = read_conditions(args, text_config, None, {})
    assert whole.table._encoder is None
    monkeypatch.setattr(conditions, "KEPT", 2)
    little = read_conditions(args, text_config, None, {})
    for size in (1, 7, 64):
        index = RNG.integers(0, 300, size)
        for ours, theirs in zip(little.of(index), whole.of(index), strict=True):
            assert ours.keys() == theirs.keys() == {"context", "context_mask"}
            for name, x in ours.items():
                np.testing.assert_array_equal(x, theirs[name])
    texts = [*whole.described["prompts"], "blue"]
    tokens = make_tokenizer(text_config)(texts, text_config.text.max_length)
    mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
    encoder = TextEncoder(text_config.text.encoder, mesh, conditions.DTYPES[text_config.dtype], 16)
    rows = np.array([7, 206 % 200])  # of images 0 and 199
    truth = encoder.condition(tokens.ids[rows], tokens.mask[rows])["context"]
    found = whole.of(np.array([0, 199]))[0]["context"]
    valid = tokens.mask[rows]
    np.testing.assert_allclose(found[valid].astype(float), truth[valid].astype(float), atol=0.05)


def test_a_process_encodes_its_share_alone(text_config, tmp_path, monkeypatch):
    """Catches states of all prompts on every process, and prompts that are encoded again and again."""
    monkeypatch.setattr(conditions, "KEPT", 4)
    encoded = []
    encode = States._encode
    monkeypatch.setattr(States, "_encode", lambda s, b: (encoded.append(b), encode(s, b))[1])
    found = read_conditions(ask(tmp_path, text_config, 960), text_config, None, {})
    assert not encoded, "before the first image"
    for chunk in chunks(960, 2 * ENCODED, 1, 3):
        found.of(chunk)
        assert found.table.of_batch.cache_info().currsize <= 4
    assert len(encoded) == len(set(encoded)) == 960 // ENCODED // 3 + 1  # the negative prompt's too


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize("first", [0, 5])
def test_layouts_hold_few_images(tmp_path, layout, first):
    """Catches a layout that holds all pixels, or puts an image to another prompt or place."""
    count, folder = 32, epath.Path(tmp_path)
    pixels = RNG.integers(0, 256, (4 * count, 64, 64, 3), dtype=np.uint8)
    prompts = (first + np.arange(4 * count)) % count
    np.savez(folder / "samples.npz", arr_0=pixels, prompt=prompts)
    entries = [{"prompt": f"p{i}", "name": f"n{i}"} for i in range(count)]
    heard = []
    tracemalloc.start()
    layouts.write_layout(layout, folder / "samples.npz", entries, folder / "out", heard.append)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < pixels.nbytes / 2 and len(heard) >= count
    for number in range(count):
        mine = pixels[prompts == number]
        if layout == "dpg":
            found = read_image(folder / "out" / f"n{number}.png")
            found = found.reshape(2, 64, 2, 64, 3).swapaxes(1, 2).reshape(4, 64, 64, 3)
        else:
            places = [folder / "out" / f"{number:05d}" / "samples" / f"{i:04d}.png" for i in range(4)]
            found = np.stack([read_image(place) for place in places])
        np.testing.assert_array_equal(found, mine)
