"""A tiny random T5 folder, for several tests."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from pixelflow_jax.data import captioned_digits as digits
from pixelflow_jax.models.t5 import T5Config, T5Encoder, weight_names

T5 = T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=2)


def public_state(seed: int = 0) -> dict[str, np.ndarray]:
    """A random checkpoint by its public names."""
    ids, mask = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
    params = T5Encoder(T5).init(jax.random.key(seed), ids, mask)["params"]
    state = {}
    for path, layer, name in weight_names(T5):
        leaf = params
        for key in path:
            leaf = leaf[key]
        leaf = np.asarray(leaf if layer is None else leaf[layer])
        state[name] = np.ascontiguousarray(leaf.T if path[-1] == "kernel" else leaf)
    return state


def write_t5(folder):
    """A T5 folder with weights in two files and a tokenizer of the captions' words."""
    import tokenizers

    folder.mkdir()
    values = {**{n: getattr(T5, n) for n in T5.__dataclass_fields__}, "feed_forward_proj": "gated-gelu"}
    (folder / "config.json").write_text(json.dumps(values))
    words = {w: i for i, w in enumerate(("<pad>", "</s>", "<unk>", *digits.vocabulary()))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    state = public_state()
    halves = [sorted(state)[0::2], sorted(state)[1::2]]
    places = {}
    for number, names in enumerate(halves):
        file = f"model-{number}.safetensors"
        save_file({name: state[name] for name in names}, str(folder / file))
        places |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder
