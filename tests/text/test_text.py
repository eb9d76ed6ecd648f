"""Text: tokenizers, T5 folders, captioned digits, and a text model from training to prompts."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixelflow_jax import sample, train
from pixelflow_jax.cascade.packing import Group, PackLayout
from pixelflow_jax.common import UserError
from pixelflow_jax.config import build_model, load_config
from pixelflow_jax.data import captioned_digits as digits
from pixelflow_jax.distributed import sharding
from pixelflow_jax.foreign.official import from_official, to_official
from pixelflow_jax.models.conditioning import abstract_params, init_params
from pixelflow_jax.models.t5 import T5Encoder, t5_params
from pixelflow_jax.models.warm_start import from_class_model
from pixelflow_jax.requests import conditions
from pixelflow_jax.requests.layouts import read_prompts_file, write_layout
from pixelflow_jax.sampling.generate import build_sampler, read_image, save_png
from pixelflow_jax.sampling.starts import image_keys
from pixelflow_jax.text.encoder import TextEncoder, make_tokenizer
from pixelflow_jax.text.tokenizer import EOS, UNKNOWN, Tokenizer, read_tokenizer, word_tokenizer
from pixelflow_jax.training.start import check_shapes

from conftest import calm
from tiny_t5 import T5, public_state

TINY = [
    "--config.model.num_heads=2",
    "--config.model.head_dim=8",
    "--config.model.depth=2",
    "--config.model.context_dim=16",
    "--config.text.num_layers=1",
    "--config.batch_size=8",
    "--config.num_train_steps=4",
    "--config.log_every=2",
    "--config.checkpoint_every=2",
    "--config.sample_every=4",
    "--config.sample.num_images=4",
    "--config.sample.num_steps=2",
]


def test_word_tokenizer():
    """Catches a lost end mark, a wrong count of what is cut off, case that matters."""
    tokens = word_tokenizer(("a", "red", ",", "six"))(["A red, six", "a blue", "", "a a a a a a"], 6)
    assert tokens.ids.tolist()[0] == [3, 4, 5, 6, EOS, 0]
    assert tokens.ids.tolist()[1][:3] == [3, UNKNOWN, EOS]
    assert tokens.mask.sum(axis=1).tolist() == [5, 3, 1, 6]
    assert tokens.cut.tolist() == [0, 0, 0, 1] and tokens.ids[3, -1] == EOS
    inside = Tokenizer(lambda text: [5, EOS, 7], 8)(["a </s> b"], 6)  # all of it is seen, or cut aloud
    assert inside.mask.sum() == 4 and inside.cut == 0


def test_sentencepiece_tokenizer(tmp_path):
    """Catches an end mark that is missing or doubled for folders that have spiece.model alone."""
    import sentencepiece

    text = tmp_path / "text.txt"
    text.write_text("\n".join(digits.CaptionedDigits(load_config("t2i_tiny").data, "train")[0][1]))
    trained = dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1, vocab_size=40, minloglevel=2)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "spiece"), **trained, hard_vocab_limit=False
    )
    tokens = read_tokenizer(tmp_path)(["on the left"], 30)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    expected = [*processor.encode("on the left"), EOS]
    assert tokens.ids[0, : len(expected)].tolist() == expected
    assert tokens.mask[0].sum() == len(expected)


def test_t5_does_not_see_padding():
    """Catches states that see padding. What stands there may change no bit, its length only rounding."""
    ids, mask = jnp.arange(16)[None] % 7 + 3, jnp.arange(16)[None] < 9
    state = public_state()
    params = {"params": t5_params(state.__getitem__, state, T5, "test")}
    apply = jax.jit(T5Encoder(T5).apply)
    plain = apply(params, ids, mask)[0, :9]
    np.testing.assert_array_equal(plain, apply(params, jnp.where(mask, ids, 20), mask)[0, :9])
    np.testing.assert_allclose(plain, apply(params, ids[:, :9], mask[:, :9])[0], rtol=0, atol=1e-5)


def test_a_tokenizer_is_read_once_per_process(t5_folder, tmp_path):
    """Catches a file read again for each request of the demo, and another model's tokenizer."""
    config, other = load_config("t2i_256"), load_config("t2i_tiny")
    config.text.encoder = str(t5_folder)
    assert make_tokenizer(config) is make_tokenizer(config.copy_and_resolve_references())
    assert make_tokenizer(config) is not make_tokenizer(other)
    config.text.encoder = str(tmp_path)
    with pytest.raises(UserError, match="holds no tokenizer"):
        make_tokenizer(config)


def test_t5_folder(t5_folder):
    """Catches a shard that is not read, and weights in the wrong place or layout."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    encoder = TextEncoder(str(t5_folder), mesh, jnp.float32, width=16)
    tokens = read_tokenizer(t5_folder)(["a red six", ""], 6)
    state = public_state()
    expected = T5Encoder(T5).apply(
        {"params": t5_params(state.__getitem__, state, T5, "test")}, tokens.ids, tokens.mask
    )
    found = encoder.condition(tokens.ids, tokens.mask)
    np.testing.assert_allclose(found["context"], expected, atol=1e-6)
    with pytest.raises(UserError, match="states of 16, the model takes 32"):
        TextEncoder(str(t5_folder), mesh, width=32)


def test_t5_folders_that_are_none(t5_folder, tmp_path):
    """Catches a traceback, or silence, for each kind of damage."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    for name, match in (("nowhere", "is not a folder"), ("", "needs a text encoder")):
        with pytest.raises(UserError, match=match):
            TextEncoder(name, mesh)
    values = json.loads((t5_folder / "config.json").read_text())
    (t5_folder / "config.json").write_text(json.dumps({**values, "d_ff": 25}))
    with pytest.raises(UserError, match="wi_0.weight has shape .* config.json says"):
        TextEncoder(str(t5_folder), mesh)
    (t5_folder / "config.json").write_text(json.dumps({**values, "feed_forward_proj": "relu"}))
    with pytest.raises(UserError, match="version 1.1"):
        TextEncoder(str(t5_folder), mesh)
    (t5_folder / "config.json").write_text(json.dumps({**values, "d_model": "1024"}))
    with pytest.raises(UserError, match="not a positive number"):
        TextEncoder(str(t5_folder), mesh)
    (t5_folder / "config.json").write_text(json.dumps(values))
    (t5_folder / "model-0.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read as .safetensors"):
        TextEncoder(str(t5_folder), mesh)
    (t5_folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="neither tokenizer.json nor spiece.model"):
        read_tokenizer(t5_folder)


def test_t5_equals_transformers():
    """Catches any difference from the public implementation, on a model it made itself."""
    transformers = pytest.importorskip("transformers")
    import torch

    sizes = {name: getattr(T5, name) for name in T5.__dataclass_fields__}
    config = transformers.T5Config(**sizes, feed_forward_proj="gated-gelu", dropout_rate=0.0)
    theirs = transformers.T5EncoderModel(config).eval()
    ids = np.random.default_rng(0).integers(3, 40, (2, 30))
    mask = np.arange(30) < np.array([[30], [11]])
    with torch.no_grad():
        expected = theirs(torch.tensor(ids), torch.tensor(mask).long()).last_hidden_state.numpy()
    state = {name: x.numpy() for name, x in theirs.state_dict().items()}
    params = t5_params(state.__getitem__, state, T5, "test")
    found = np.asarray(T5Encoder(T5).apply({"params": params}, ids, mask))
    assert np.abs(found - expected)[mask].max() < 1e-5 * np.abs(expected[mask]).max()


def test_captioned_digits():
    """Catches a combination held out that training shows, captions of another picture, and a reserved
    word that a caption uses or the vocabulary lacks."""
    assert digits.vocabulary()[-2:] == tuple(digits.RESERVED)  # last: others' initial values stay
    assert not {*digits.RESERVED} & {*digits.BACKGROUNDS}
    data = load_config("t2i_tiny").data
    for split, held_out in (("train", False), ("test", True)):
        source = digits.CaptionedDigits(data, split)
        for index in range(50):
            picture, captions = source[index]
            attributes = source.attributes(index)
            assert attributes.held_out == held_out and captions == attributes.captions()
            words = attributes.words()
            assert all(word in captions[0] for word in words.values())
            corner = tuple(picture[0, 0].tolist())
            assert corner == digits.BACKGROUNDS[words["background"]]
        np.testing.assert_array_equal(source[3][0], digits.CaptionedDigits(data, split)[3][0])


@pytest.mark.parametrize("kind", ["joint", pytest.param("frozen", marks=pytest.mark.slow)])
def test_from_training_to_prompts(kind, tmp_path, t5_folder, capsys):
    """Catches a break anywhere from captions to pictures, and an encoder or tokenizer that is lost."""
    run = str(tmp_path / "run")
    encoder = [] if kind == "joint" else [f"--config.text.encoder={t5_folder}"]
    train.main(["--config=t2i_tiny", f"--workdir={run}", *TINY, *encoder])
    assert (tmp_path / "run" / "samples" / "4.png").exists()
    prompts = ["a small red six on a blue background, on the left", "two " * 20]
    flags = [f"--checkpoint={run}", f"--out={tmp_path / 'out'}", "--batch_size=2"]
    if kind == "frozen":
        with pytest.raises(UserError, match="--text_encoder"):
            sample.main([*flags, "--prompt=six"])
        flags.append(f"--text_encoder={t5_folder}")
    sample.main([*flags, *(f"--prompt={prompt}" for prompt in prompts)])
    assert conditions._encoder.cache_info().currsize == 0  # nothing of it stays on the devices
    printed = capsys.readouterr()
    assert "is 5 tokens longer than the limit of 16" in printed.err
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert (
        settings["prompts"] == [prompt.strip() for prompt in prompts]
        and settings["negative_prompt"] == ""
    )
    with np.load(tmp_path / "out" / "samples.npz") as file:
        assert file["arr_0"].shape == (2, 16, 16, 3) and file["prompt"].tolist() == [0, 1]


def test_words_of_the_captions(tmp_path):
    """Catches words that are lost, split unlike prompts, or others after a resume."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    captions = ["A red  cat", "cat, red", "Ein Größe-Test", "dog"]

    def describe(captions):
        for number, text in enumerate(captions):
            save_png(folder / f"{number}.png", np.full((16, 16, 3), 40 * number, np.uint8))
            (folder / f"{number}.txt").write_text(text, encoding="utf-8")

    describe(captions)
    own = ["--config.data.source=caption_folder", f"--config.data.path={folder}"]
    own += ["--config.text.words=()", "--config.sample_every=0"]
    flags = ["--config=t2i_tiny", f"--workdir={tmp_path / 'run'}", *TINY, *own]
    train.main([*flags, "--config.num_train_steps=2"])
    described = json.loads((tmp_path / "run" / "config.json").read_text())
    words = described["text"]["words"]
    assert words == [",", "-", "a", "cat", "dog", "ein", "größe", "red", "test"]
    ids = word_tokenizer(words)(captions, 8).ids
    assert not (ids == UNKNOWN).any()

    describe(["corrected", *captions[1:]])
    train.main(flags)
    described = json.loads((tmp_path / "run" / "config.json").read_text())
    assert described["text"]["words"] == words and described["num_train_steps"] == 4
    with pytest.raises(UserError, match="text.words are not those of config.init_from"):
        train.main(
            [
                *flags[:1],
                f"--workdir={tmp_path / 'new'}",
                *flags[2:],
                f"--config.init_from={tmp_path / 'run'}",
            ]
        )


def test_bad_prompts(tmp_path):
    """Catches a traceback, or images of something else than was asked for."""
    run = tmp_path / "run"
    train.main(["--config=t2i_tiny", f"--workdir={run}", *TINY, "--config.sample_every=0"])
    (tmp_path / "latin.txt").write_bytes("größe".encode("latin-1"))
    (tmp_path / "gap.txt").write_text("a six\n\na two\n")
    (tmp_path / "odd.jsonl").write_text('{"prompt": "a\u2028six"}\n', encoding="utf-8")
    assert read_prompts_file(str(tmp_path / "odd.jsonl"))[0]["prompt"] == "a\u2028six"
    for flags, match in (
        ([], "give it a --prompt"),
        (["--prompt= "], "number 1 is empty"),
        (["--labels=3"], "use --prompt, not --labels"),
        ([f"--prompts_file={tmp_path / 'none.txt'}"], "is neither a file nor a folder"),
        ([f"--prompts_file={tmp_path / 'latin.txt'}"], "is not UTF-8"),
        ([f"--prompts_file={tmp_path / 'gap.txt'}"], "line 2 is empty"),
        (["--prompt=six", "--text_encoder=x"], "this model contains its own"),
    ):
        with pytest.raises(UserError, match=match):
            sample.main([f"--checkpoint={run}", f"--out={tmp_path / 'out'}", *flags])
    with pytest.raises(UserError, match="has classes, but the model takes text"):
        train.main(["--config=t2i_tiny", f"--workdir={tmp_path / 'b'}", "--config.data.source=digits"])


def test_text_model_from_a_class_model(noisy_params):
    """Catches a start that is not the class model's, and a gate that the official form loses."""
    sizes = ["model.num_heads=2", "model.head_dim=8", "model.depth=2"]
    classes = load_config("digits", sizes)
    text = load_config("t2i_tiny", [*sizes, "model.context_dim=16", "model.cross_gate=True"])
    text.text.encoder, text.model.patch_size = "", classes.model.patch_size
    old_model, model = build_model(classes), build_model(text)
    old = noisy_params(old_model)
    params = from_class_model(old, init_params(model, 0))
    check_shapes(params, abstract_params(model), "the class model")
    layout = PackLayout((Group(2, 2, 3, classes.model.patch_size),))
    keys = jax.random.split(jax.random.key(0), 3)
    tokens, times = [jax.random.normal(keys[0], (1, 2, 6, 48))], jnp.array([[10.0, 600.0]])
    states, mask = jax.random.normal(keys[1], (1, 2, 5, 16)), jnp.ones((1, 2, 5), bool)
    labels = jnp.full((1, 2), 10)
    (expected,) = old_model.apply({"params": old}, tokens, times, layout, labels=labels)

    def velocity(model, params):
        inputs = dict(context=states, context_mask=mask)
        return model.apply({"params": params}, tokens, times, layout, **inputs)[0]

    found = velocity(model, params)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=3e-5)  # values up to 15
    params["blocks"]["cross_gate"] = jax.random.normal(keys[2], (2, 16))
    gated = velocity(model, params)
    assert np.abs(gated - found).max() > 1e-3
    plain = text.copy_and_resolve_references()
    plain.model.cross_gate = False
    again = from_official(to_official(params, text), plain)
    np.testing.assert_allclose(velocity(build_model(plain), again), gated, rtol=1e-4, atol=1e-5)


def test_layouts_of_the_scorers(tmp_path):
    """Catches a picture under another prompt's name, and metadata that the scorer cannot read."""
    run = tmp_path / "run"
    train.main(["--config=t2i_tiny", f"--workdir={run}", *TINY, "--config.sample_every=0"])
    entries = [{"prompt": "a six", "tag": "x", "include": []}, {"prompt": "a two", "tag": "y"}]
    (tmp_path / "g.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (tmp_path / "prompts").mkdir()
    for name, entry in zip(("first", "second"), entries, strict=True):
        (tmp_path / "prompts" / f"{name}.txt").write_text(entry["prompt"] + "\n")
    flags = [f"--checkpoint={run}", "--num_images=8", "--batch_size=8"]
    images = {}
    for layout, file in (("geneval", "g.jsonl"), ("dpg", "prompts")):
        out = tmp_path / f"out_{layout}"
        extra = [f"--out={out}", f"--prompts_file={tmp_path / file}", f"--layout={layout}"]
        sample.main([*flags, *extra])
        with np.load(out / "samples.npz") as found:
            images[layout] = found["arr_0"]
    folder = tmp_path / "out_geneval" / "geneval" / "00001"
    assert json.loads((folder / "metadata.jsonl").read_text()) == entries[1]
    np.testing.assert_array_equal(read_image(folder / "samples" / "0002.png"), images["geneval"][5])
    grid = read_image(tmp_path / "out_dpg" / "dpg" / "second.png")
    np.testing.assert_array_equal(grid[16:, :16], images["dpg"][5])
    pixels = images["dpg"][:4]
    np.savez(tmp_path / "later.npz", arr_0=pixels, prompt=[1, 0, 1, 0])  # as --first_image=1 has it
    write_layout("geneval", tmp_path / "later.npz", entries, tmp_path / "later")
    later = tmp_path / "later" / "00001" / "samples" / "0001.png"
    np.testing.assert_array_equal(read_image(later), pixels[2])
    (tmp_path / "named.jsonl").write_text(json.dumps({"prompt": "a six", "name": "../../x"}))
    named = [f"--out={tmp_path / 'z'}", f"--prompts_file={tmp_path / 'named.jsonl'}", "--layout=dpg"]
    with pytest.raises(UserError, match="FOLDER"):  # a name from a file could lead elsewhere
        sample.main([flags[0], "--num_images=4", *named])
    for extra, match in (
        (["--num_images=6", "--layout=dpg"], "set --num_images=8"),
        (["--num_images=3", "--layout=geneval"], "as many images for each"),
    ):
        with pytest.raises(UserError, match=match):
            prompts = f"--prompts_file={tmp_path / 'prompts'}"
            sample.main([flags[0], f"--out={tmp_path / 'z'}", prompts, *extra])


@pytest.mark.slow
def test_dopri5_agrees_with_fine_euler():
    """Catches a solver that treats a text model otherwise: Euler must come nearer at its first order."""
    config = load_config("t2i_tiny", ["model.num_heads=2", "model.head_dim=8", "model.depth=2"])
    config.text.encoder, config.text.words, config.model.context_dim = "", (), 16
    config.sample.rtol = config.sample.atol = 1e-5
    states = jax.random.normal(jax.random.key(0), (2, 2, 6, 16))
    mask = jnp.arange(6) < jnp.array([[6], [3]])
    conditions = [{"context": x, "context_mask": mask} for x in states]
    params = calm(build_model(config))

    def image(solver, steps=1):
        config.sample.solver, config.sample.num_steps = solver, (steps,)
        sampler = build_sampler(config)
        noise = sampler.draw_noise(image_keys(0, jnp.arange(2)))
        return jax.jit(sampler.sample)(params, noise, *conditions)[-1]

    truth = image("dopri5")
    coarse, fine = (float(jnp.abs(image("euler", n) - truth).max()) for n in (50, 200))
    assert fine < 0.02 * float(jnp.abs(truth).max()) and 3 < coarse / fine < 5
