"""Programs for accelerators that are not here: traced and lowered for them, with what they would run."""

import itertools
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from pixelflow_jax.common.hardware import platform_of
from pixelflow_jax.config import build_cascade, load_config
from pixelflow_jax.data.buckets import bucket_sizes
from pixelflow_jax.models.attention import attention, choose_backend
from pixelflow_jax.models.conditioning import abstract_params
from pixelflow_jax.sampling import generate
from pixelflow_jax.sampling.generate import build_sampler, image_mesh, make_generate
from pixelflow_jax.training import step
from pixelflow_jax.training.programs import train_program
from pixelflow_jax.training.step import abstract_condition

from conftest import with_devices

CONFIGS = sorted(path.stem for path in pathlib.Path("configs").glob("[!_]*.py"))
TEXT = [name for name in CONFIGS if name.startswith("t2i")]
PLATFORMS = ("cpu", "gpu", "other gpu", "tpu v4", "tpu v5e", "tpu unknown")
DTYPES = ("float32", "bfloat16", "float16", "float64")


def answer_for_an_ampere(patch=setattr) -> None:
    """Stubs what JAX asks cuDNN and the driver before it traces the kernel: an A100's answers."""
    patch(cudnn, "check_cudnn_version", lambda: 91000)
    patch(cudnn, "check_compute_capability", lambda least: float(least) <= 8)
    patch(cudnn, "is_cuda_compute_capability_equal", lambda version: False)


@pytest.fixture(autouse=True)
def an_ampere(monkeypatch):
    answer_for_an_ampere(monkeypatch.setattr)


def shapes_of(name: str) -> set[tuple[int, int, int]]:
    """(head_dim, queries, keys) of every attention of a config, over stages, sizes and devices."""
    config = load_config(f"configs/{name}.py")
    cascade, model, found = build_cascade(config), config.model, set()
    for height, width in bucket_sizes(config.data):
        for stage, patch in enumerate(cascade.patches(model.patch_size)):
            h, w = cascade.size(stage, height, width)
            tokens, keys = h * w // patch**2, [h * w // patch**2]
            keys += [config.text.max_length] if model.context_dim else []
            for shards, m in itertools.product((1, 4), keys):
                if tokens % shards == 0:
                    found.add((model.head_dim, tokens // shards, m))
    return found


def trace(backend: str, platform: str, q, k, key_mask) -> None:
    """Traces attention, both ways, as `backend`, which was chosen for it."""

    def both_ways(q, k, v, key_mask):
        out, pull = jax.vjp(lambda *x: attention(*x, key_mask, backend, platform), q, k, v)
        return out, pull(out)

    out, grads = jax.eval_shape(both_ways, q, k, k, key_mask)
    for ours, given in zip((out, *grads), (q, q, k, k), strict=True):
        assert (ours.shape, ours.dtype) == (given.shape, given.dtype)


def check_choices(dtype: str, shapes, platforms=PLATFORMS) -> set[tuple[str, str]]:
    """Traces what is chosen for each shape, mask and platform; returns (platform, backend) pairs."""
    chosen, done = set(), set()
    for (head_dim, n, m), platform in itertools.product(sorted(shapes), platforms):
        q, k = (jax.ShapeDtypeStruct((2, length, 2, head_dim), dtype) for length in (n, m))
        for mask in (None, jax.ShapeDtypeStruct((2, m), bool)):
            backend = choose_backend(platform, q, k, mask)
            chosen.add((platform, backend))
            key = backend, platform if backend == "splash" else "", head_dim, n, m, mask is None
            if key not in done:
                done.add(key)
                trace(backend, platform, q, k, mask)
    return chosen


@pytest.mark.parametrize(
    "configs, platforms, dtype",
    [
        (["t2i_256"], ("gpu",), "bfloat16"),
        *(pytest.param(CONFIGS, PLATFORMS, dtype, marks=pytest.mark.slow) for dtype in DTYPES),
    ],
)
def test_every_attention_of_every_config_traces_wherever_it_may_run(configs, platforms, dtype):
    """Catches a backend that is chosen for arguments which it refuses: masks, dtypes, lengths, heads."""
    with jax.enable_x64(dtype == "float64"):
        chosen = check_choices(dtype, set().union(*map(shapes_of, configs)), platforms)
    assert (("gpu", "cudnn") in chosen) == (dtype in ("bfloat16", "float16"))
    if "tpu v5e" in platforms:
        assert (("tpu v5e", "splash") in chosen) == (dtype in ("float32", "bfloat16"))
        assert {backend for platform, backend in chosen if platform == "other gpu"} == {"einsum"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_attentions_trace_wherever_they_may_run(dtype):
    """Catches refusals that no config meets: one token, odd lengths, heads too large or uneven."""
    shapes = [(72, 1, 1), (72, 1, 77), (72, 63, 1), (64, 129, 131), (12, 64, 64), (256, 128, 6)]
    with jax.enable_x64(dtype == "float64"):
        check_choices(dtype, shapes)


@pytest.mark.parametrize(
    "device, expected",
    [
        (dict(platform="cpu"), "cpu"),
        (dict(platform="gpu", compute_capability="9.0", version="PJRT C API\ncuda 12080"), "gpu"),
        (dict(platform="gpu", compute_capability="10.3", version="cuda 13000"), "gpu"),
        (dict(platform="cuda"), "gpu"),
        (dict(platform="gpu", compute_capability="7.5", version="cuda 12080"), "other gpu"),  # a T4
        (dict(platform="gpu", compute_capability="gfx942", version="rocm 60300"), "other gpu"),
        (dict(platform="rocm"), "other gpu"),
        (dict(platform="tpu", device_kind="TPU v5 lite"), "tpu v5e"),
        (dict(platform="tpu", device_kind="TPU v99"), "tpu unknown"),
    ],
)
def test_cudnn_is_for_those_gpus_that_have_it(device, expected):
    """Catches cuDNN's fused attention on AMD's GPUs, and on NVIDIA's before Ampere, as a T4."""
    client = types.SimpleNamespace(platform_version=device.pop("version", "cuda"))
    assert platform_of(types.SimpleNamespace(**device, client=client)) == expected


def lowered(name: str, task: str, *overrides: str) -> str:
    """A config's program, lowered for CUDA with one layer of the network."""
    overrides = ("model.depth=1", "batch_size=8", "mesh.fsdp=1", *overrides)
    config = load_config(f"configs/{name}.py", overrides)
    if task == "train":
        program, arguments, *_ = train_program(config, jax.devices())
    else:
        sampler, mesh = build_sampler(config), image_mesh(jax.devices(), config.mesh.context)
        program, condition = make_generate(sampler, mesh=mesh), abstract_condition(config, 8)
        params = abstract_params(sampler.model)
        arguments = params, {"index": jax.ShapeDtypeStruct((8,), jnp.int32)}, condition, condition
    return program.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


ADAPTIVE = (
    "sample.solver=dopri5",
    "sample.step_control=per_image",
    "sample.guidance_interval=(0.2,0.8)",
)
CASES = [("t2i_256", "train")]
MORE = [
    *itertools.product(
        TEXT, ["train"], ["accumulation_steps=2", "model.remat=dots", "model.remat=offload"]
    ),
    *itertools.product(TEXT, ["sample"]),
    *((name, "sample", *ADAPTIVE) for name in TEXT if not name.endswith("_few")),  # Euler alone
]
CASES += [pytest.param(case, marks=pytest.mark.slow) for case in MORE]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_text_models_lower_for_gpus(case, monkeypatch):
    """Catches what cuDNN or JAX refuse of whole programs: masks under remat, scan, vmap, shard_map."""
    for module in (step, generate):
        monkeypatch.setattr(module, "platform_of", lambda device: "gpu")
    text = lowered(*case, "dtype=bfloat16")
    masked, all_of_them = text.count("PADDING"), text.count("custom_call @__cudnn$")
    assert 2 * masked >= all_of_them > 0


@pytest.mark.slow
def test_text_models_with_shared_images_lower_for_gpus():
    """Catches the same where four devices share the tokens of each image."""
    code = """if True:
        import jax, test_platforms as here
        here.answer_for_an_ampere()
        here.step.platform_of = here.generate.platform_of = lambda device: "gpu"
        square = ("batch_size=16", "data.max_aspect_ratio=1", "dtype=bfloat16")
        for task in ("train", "sample"):
            assert "PADDING" in here.lowered("t2i_256", task, "mesh.context=4", *square)
    """
    here = pathlib.Path(__file__).parent
    env = os.environ | with_devices(8) | {"PYTHONPATH": f"{here}:{here.parent}:{here.parent.parent}"}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
