"""A checkpoint's sampler as StableHLO, which runs without this package, by jax.export."""

import dataclasses
import functools
import importlib.metadata
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import export
from ml_collections import ConfigDict

from pixelflow_jax import __version__
from pixelflow_jax.common import UserError, arrays, files, optional
from pixelflow_jax.requests.job import PACKAGES, sampler_of
from pixelflow_jax.requests.request import FROM_CONFIG, Request
from pixelflow_jax.sampling.generate import make_generate
from pixelflow_jax.sampling.sampler import Sampler, class_conditions
from pixelflow_jax.text.encoder import JOINT, make_tokenizer
from pixelflow_jax.training.checkpoints import load_params

PLATFORMS = ("cpu", "cuda", "tpu")
README = """\
Images from noise, by JAX alone; made by pixelflow_jax {version} with jax {jax} (settings.json).

    import jax, numpy as np
    program = jax.export.deserialize(bytearray(open("sampler_{platform}.bin", "rb").read()))
    params = dict(np.load("params.npz"))
    seed, number = np.zeros({size}, np.uint32), np.arange({size}, dtype=np.int32)
    pixels = np.asarray(program.call(params, seed, number, {example}))

pip install jax flatbuffers numpy. Pixels are uint8 [{size}, {height}, {width}, 3]. Image i depends on
its seed and number{on}. {inputs}
{attention}"""


def write_export(
    request: Request, platforms: Sequence[str], batch_size: int, out: epath.PathLike
) -> str:
    """Write sampler_<platform>.bin, params.npz, settings.json and README.md; return what was written.

    A program takes (parameters by name, seed uint32 [b], number int32 [b], labels int32 [b]), or token
    ids int32 [b, t] and mask bool [b, t] of a text model with its own encoder, in place of labels. It
    returns uint8 [b, h, w, 3], on CPU those of `sample` with that batch size, bit for bit.

    Raises UserError for unknown platforms, error-controlled steps, and models with a frozen encoder.
    """
    optional("flatbuffers", "export", "--to=stablehlo")
    unknown = {*platforms} - {*PLATFORMS}
    if unknown or not platforms:
        raise UserError(f"--platforms: {', '.join(sorted(unknown)) or 'none'}; they are cpu, cuda, tpu")
    params, config, meta = load_params(request.checkpoint, request.ema)
    sampler = sampler_of(request, config)
    if sampler.control != "fixed":
        raise UserError(f"{sampler.solver} chooses its steps by error: add --step_control=fixed")
    flat = flatten_dict(params, sep="/")
    inputs, null = _inputs(config, batch_size)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs]
    abstract = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in flat.items()}
    one = jax.ShapeDtypeStruct((batch_size,), jnp.uint32), jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    folder = epath.Path(out)
    for platform in platforms:
        program = jax.jit(functools.partial(_sample, _for_platform(sampler, platform), null))
        made = export.export(program, platforms=[platform])(abstract, *one, *shapes)
        files.write_bytes(folder / f"sampler_{platform}.bin", bytes(made.serialize()))
    arrays.write_npz(folder / "params.npz", flat)
    settings = {name: config.sample[name] for name in FROM_CONFIG}
    settings |= {"height": sampler.height, "width": sampler.width, "batch_size": batch_size}
    settings |= {"step": meta["step"], "ema": meta["ema"], "platforms": list(platforms)}
    settings |= {"words": list(config.text.words)} if config.model.context_dim else {}
    settings["versions"] = {name: importlib.metadata.version(name) for name in PACKAGES}
    files.write_json(folder / "settings.json", settings)
    files.write_bytes(folder / "README.md", _readme(config, sampler, platforms, batch_size).encode())
    return f"{', '.join(f'sampler_{x}.bin' for x in platforms)} for {batch_size} images at a time"


def _inputs(config: ConfigDict, size: int) -> tuple[list[np.ndarray], Any]:
    """Return (example condition of a program's calls, the null condition), as arrays."""
    if not config.model.context_dim:
        labels, null = class_conditions(np.zeros(size, np.int32), max(config.model.num_classes, 0))
        return [labels["labels"]], {name: np.asarray(x) for name, x in null.items()}
    if config.text.encoder != JOINT:
        raise UserError(
            f"--to=stablehlo takes models with classes, or with a text encoder of their own; this one "
            f"needs {config.text.encoder or 'a T5'}"
        )
    empty = make_tokenizer(config)([""] * size, config.text.max_length).condition()
    return [empty["text_ids"], empty["text_mask"]], empty


def _for_platform(sampler: Sampler, platform: str) -> Sampler:
    """Return the sampler with the attention that a program for another machine may contain."""
    model = sampler.model.clone(platform={"cuda": "gpu"}.get(platform, platform))
    if platform != "cpu":
        model = model.clone(attention="einsum")  # kernels are tied to versions of the chip's software
    return dataclasses.replace(sampler, model=model)


def _sample(sampler: Sampler, null: Any, params, seed, number, *inputs):
    names = ("labels",) if len(inputs) == 1 else ("text_ids", "text_mask")
    condition = dict(zip(names, inputs, strict=True))
    generate = make_generate(sampler)
    tree = unflatten_dict(params, sep="/")
    return generate(tree, {"index": number, "seed": seed}, condition, null).pixels


def _readme(config: ConfigDict, sampler: Sampler, platforms: Sequence[str], size: int) -> str:
    classes = config.model.num_classes
    if config.model.context_dim:
        length = config.text.max_length
        example = f"np.full(({size}, {length}), 1, np.int32), np.ones(({size}, {length}), bool)"
        inputs = "The last two are token ids and mask: settings.json has the words, whose numbers begin "
        inputs += "at 3, in `words`; a text ends with 1 and is padded with 0, where the mask is False."
        on = " and text"
    else:
        example, on = f"np.full({size}, 3, np.int32)", ", and label"
        inputs = (
            f"Labels are 0 to {classes - 1}." if classes else "The model has no classes: labels are 0."
        )
    other = [platform for platform in platforms if platform != "cpu"]
    attention = f"On {' and '.join(other)}, attention is XLA's own, without kernels." if other else ""
    return README.format(
        version=__version__, jax=jax.__version__, platform=platforms[0], size=size, example=example,
        height=sampler.height, width=sampler.width, on=on, inputs=inputs, attention=attention,
    )  # fmt: skip
