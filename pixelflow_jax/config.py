"""Run configurations: every key with its default, loading, overrides, and what they build."""

import argparse
import importlib.util
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict, FieldReference

from pixelflow_jax.cascade.stages import Cascade
from pixelflow_jax.common import UserError, files
from pixelflow_jax.common.config_keys import DTYPES, as_dict, fit, parse
from pixelflow_jax.common.removed import drop_removed
from pixelflow_jax.models.t5 import SPECIAL, T5Config
from pixelflow_jax.models.transformer import PixelFlow

# Keys that determine the results of a run: a resumed run must agree on these.
IDENTITY = ("model", "text", "cascade", "data", "optimizer", "ema", "distill", "lora", "seed")
IDENTITY += ("batch_size",)
# Exceptions: keys that change only the speed of a run, or the location of its data (training/start.py).
FREE = {
    *("model.remat", "model.scan_unroll", "model.attention", "data.path"),
    *("data.num_workers", "data.num_threads", "data.prefetch", "data.max_broken_share"),
    *("text.cache", "distill.teacher"),
}


def default_config() -> ConfigDict:
    """Return every key of a config; the defaults are the released class model's training recipe."""
    run = dict(
        seed=0,
        num_train_steps=1_600_000,
        batch_size=256,  # global
        accumulation_steps=1,  # parts that a batch is split into, to save memory
        init_from="",  # checkpoint (ours or official) with the initial parameters of a new run
        dtype="float32",  # of computation, may change on resume; parameters and EMA stay float32
        log_every=100,
        checkpoint_every=5000,
        sample_every=5000,  # a sample grid; 0 = never
        keep_checkpoints=2,  # the newest ones
        keep_every=0,  # also keep every checkpoint at a multiple of this step; 0 = none
    )
    return ConfigDict({**run, **_model_and_data(), **_training_and_sampling()})


def _model_and_data() -> dict[str, Any]:
    return dict(
        model=dict(
            num_heads=16,
            head_dim=72,
            depth=28,
            # pixels per side; or one per stage, such as (4, 4, 4, 8)
            patch_size=FieldReference(4, field_type=object),
            num_classes=1000,  # 0 = no class labels
            context_dim=0,  # width of the text states; 0 = no text
            cross_gate=False,  # of text models: start as the class model of init_from
            remat="none",  # none, dots, full or offload: what the backward pass recomputes
            scan_unroll=1,
            attention="auto",  # by platform and length; or einsum, blockwise, splash, cudnn
        ),
        text=dict(  # of models with a context_dim
            encoder="",  # T5 folder or hub id; joint: a small T5 that is trained with the model
            cache="",  # folder of states that `encode` wrote, instead of running the encoder
            max_length=128,  # tokens, including the end token; longer texts are cut
            words=(),  # a joint encoder's vocabulary; empty: the words of the captions
            num_layers=2,  # sizes of a joint encoder; its width is model.context_dim
            num_heads=4,
            head_dim=32,
            mlp_dim=256,
        ),
        cascade=dict(num_stages=4, gamma=-1 / 3),
        data=dict(
            source="digits",  # see SOURCES in data/sources.py
            path="",
            name="",  # of a TFDS dataset
            split="train",
            resolution=256,
            max_aspect_ratio=1.0,  # above 1: sizes of resolution^2 pixels, up to this aspect ratio
            bucket_unit=64,  # their sides are multiples of it
            crop="random",  # random (short side to 1.125 x resolution first), center or none
            flip=True,
            label_dropout=0.1,  # share of labels (or captions) dropped, for guidance
            max_broken_share=0.05,  # of images that cannot be read; more stop the run
            num_workers=0,  # loader processes; 0 = threads of this process
            num_threads=8,
            prefetch=4,  # batches that each worker reads ahead
        ),
    )


def _training_and_sampling() -> dict[str, Any]:
    return dict(
        optimizer=dict(
            name="adamw",  # or muon, which takes the matrices of the blocks; AdamW the rest
            learning_rate=1e-4,  # of AdamW
            muon_learning_rate=1e-3,
            schedule="constant",  # constant, or cosine or linear to 0 at num_train_steps
            warmup_steps=0,
            b1=0.9,
            b2=0.999,
            eps=1e-8,
            weight_decay=0.0,
            weight_decay_on="matrices",  # matrices (not biases and norms), or all
            clip_norm=1.0,  # of the gradient; 0 = no clipping
        ),
        ema=dict(
            decays=(0.9999,),  # one average per decay
            half_lives=(),  # in images; one average per half-life
            warmup=False,  # a smaller decay in the first steps
        ),
        distill=dict(  # train a student for few steps; see docs/few.md
            teacher="",  # checkpoint (ours or official) to begin from and to learn from
            guidance_scale=2.4,  # of the teacher; the student needs none
            guidance_schedule="stagewise",
        ),
        lora=dict(rank=0),  # of adapters on the blocks of init_from, which stays frozen; 0 = train all
        # -1 = the remaining devices; context devices share the tokens of their images
        mesh=dict(data=-1, fsdp=1, context=1),
        hosts=dict(  # seconds
            start_timeout=300.0,  # until all processes must have arrived
            heartbeat_timeout=60.0,  # of silence, after which a process counts as lost
            step_timeout=1800.0,  # without progress anywhere, after which the run counts as hanging
        ),
        profile=dict(first_step=10, num_steps=0),  # a profiler trace of these steps; 0 = none
        sample=dict(
            solver="euler",
            step_control="auto",  # fixed, per_image, per_batch: see sampling/solvers.py
            rtol=1e-3,  # of adaptive steps
            atol=1e-6,
            num_steps=(30,),  # per stage: one number for all stages, or one each
            grid="uniform",
            shift=1.0,
            guidance_scale=2.4,
            guidance_schedule="stagewise",
            guidance_interval=(0.0, 1.0),  # between noise (0) and data (1)
            num_images=16,
        ),
    )


def distilled(config: ConfigDict, teacher: str) -> ConfigDict:
    """Return the config of a student of `teacher`, from that of the teacher; see docs/few.md.

    The guidance of the teacher's samples becomes part of the student, which therefore needs no
    unconditional half and no dropped labels.
    """
    config.distill.teacher = teacher
    config.distill.guidance_scale = config.sample.guidance_scale
    config.distill.guidance_schedule = config.sample.guidance_schedule
    config.sample.guidance_scale = config.data.label_dropout = 0.0
    return config


def load_config(path: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Run `get_config()` of a config file, and apply overrides such as `model.depth=12`.

    If `path` does not exist, its file name is looked up among the installed configs. Raises UserError
    for a missing or broken file, an unknown key, or a value of the wrong type or range.
    """
    file = pathlib.Path(files.clean_text("--config", str(path)))
    if not file.is_file():
        file = _installed_config(path)
    spec = importlib.util.spec_from_file_location(f"pixelflow_config_{file.stem}", file)
    if spec is None:
        raise UserError(f"--config={path}: a config is a Python file, configs/NAME.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except (Exception, SystemExit) as error:  # a config file may raise anything
        raise UserError(f"--config={file} failed: {type(error).__name__}: {error}") from error
    default, what = default_config().to_dict(), f"--config={file}: get_config()"
    fit(as_dict(config, what), default, f"--config={file}: config.")
    config = ConfigDict(config)  # unlike FrozenConfigDict, accepts values; references stay
    with config.unlocked(), config.ignore_type():
        for override in [overrides] if isinstance(overrides, str) else overrides:
            key, separator, text = override.partition("=")
            if not separator:
                raise UserError(f"--config.{override}: write it as --config.{key}=VALUE")
            section, _, leaf = key.rpartition(".")
            value = parse(key, text, default)
            (config[section] if section else config)[leaf] = value
    return check_config(config)


def parse_flags(
    parser: argparse.ArgumentParser, argv: list[str] | None
) -> tuple[argparse.Namespace, ConfigDict | None]:
    """Return a command's flags, and the config of --config with the overrides --config.KEY=VALUE.

    The config is None without --config. Raises UserError for a bad flag or config.
    """
    argv = sys.argv[1:] if argv is None else argv
    overrides = [arg.removeprefix("--config.") for arg in argv if arg.startswith("--config.")]
    for key in overrides:
        if "=" not in key:
            raise UserError(f"--config.{key}: write it as --config.{key}=VALUE")
    args = parser.parse_args([arg for arg in argv if not arg.startswith("--config.")])
    if args.config is None and overrides:
        raise UserError(f"--config.{overrides[0]} needs --config")
    return args, None if args.config is None else load_config(args.config, overrides)


def config_from_dict(values: dict[str, Any]) -> ConfigDict:
    """Return a config from JSON (where tuples have become lists), with defaults for missing keys.

    Raises UserError for an unknown key, or a value of the wrong type or out of bounds.
    """
    config = default_config()
    config.update_from_flattened_dict(fit(values, config.to_dict(), stored=True))
    return config


def differences(config: ConfigDict, values: dict[str, Any]) -> list[str]:
    """Return why `config` cannot continue a run whose config.json holds `values`; empty if it can.

    Each entry names a key: "KEY: NEW, was OLD", or "KEY=VALUE, which was removed". Raises UserError as
    `config_from_dict`.
    """
    new, old = (flatten_dict(x.to_dict(), sep=".") for x in (config, config_from_dict(values)))
    if bool(new["distill.teacher"]) != bool(old["distill.teacher"]):
        was = "distilled" if old["distill.teacher"] else "without a teacher"
        return [f"distill.teacher: {new['distill.teacher']!r}, the run there is {was}"]
    new["text.words"] = new["text.words"] or old["text.words"]  # a run keeps what it collected
    _, effects = drop_removed(flatten_dict(values, sep="."))
    found = [f"{effect}, which was removed" for effect in effects]
    for key in sorted((new.keys() | old.keys()) - FREE):
        if key.partition(".")[0] in IDENTITY and new.get(key) != old.get(key):
            found.append(f"{key}: {new.get(key)!r}, was {old.get(key)!r}")
    return found


def check_config(config: ConfigDict) -> ConfigDict:
    """Return a copy of a config whose values are plain Python values of the defaults' types.

    Raises UserError for keys and values that cannot work; names the key and a right value.
    """
    values, config = as_dict(config, "the config"), default_config()
    config.update_from_flattened_dict(fit(values, config.to_dict()))
    if config.model.head_dim % 4:
        raise UserError(
            f"config.model.head_dim must be a multiple of 4 (2D rotary embedding), got "
            f"{config.model.head_dim}"
        )
    sizes = (config.mesh.data, config.mesh.fsdp)
    if 0 in sizes or sizes == (-1, -1):
        raise UserError(
            f"config.mesh.data and config.mesh.fsdp must be at least 1, or one of them -1 for the "
            f"remaining devices; got {sizes[0]} and {sizes[1]}"
        )
    text = config.text
    if text.encoder == "joint" and text.cache:
        raise UserError("config.text.cache is for frozen encoders; text.encoder=joint has no cache")
    if text.encoder == "joint" and not config.model.context_dim:
        raise UserError("config.text.encoder=joint needs model.context_dim above 0")
    cascade = build_cascade(config)
    cascade.check_size(config.data.resolution, config.data.resolution, config.model.patch_size)
    data, unit = config.data, cascade.unit(config.model.patch_size)
    if data.max_aspect_ratio > 1 and data.bucket_unit % unit:
        raise UserError(
            f"config.data.bucket_unit must be a positive multiple of {unit} (patch_size x "
            f"2^(stages - 1)), got {data.bucket_unit}"
        )
    _check_context(config, cascade)
    _check_distillation(config)
    if config.lora.rank and not config.init_from:
        raise UserError("config.lora.rank needs config.init_from: what the adapters are added to")
    check_batch_size(config)
    return config


def _check_distillation(config: ConfigDict) -> None:
    if not config.distill.teacher:
        return
    if config.init_from:
        raise UserError("config.init_from does nothing with config.distill.teacher: leave it out")
    if not (config.ema.decays or config.ema.half_lives):
        raise UserError(
            "config.distill.teacher needs an average of the student: config.ema.decays=0.999,"
        )


def _check_context(config: ConfigDict, cascade: Cascade) -> None:
    context, side = config.mesh.context, config.data.resolution
    for stage, patch in enumerate(cascade.patches(config.model.patch_size)):
        tokens = (cascade.size(stage, side, side)[0] // patch) ** 2
        if tokens % context:
            raise UserError(
                f"config.mesh.context={context} must divide the tokens of every stage; stage {stage} "
                f"has {tokens}"
            )
    if context > 1 and config.data.max_aspect_ratio > 1:
        raise UserError("config.mesh.context above 1 needs images of one size: data.max_aspect_ratio=1")


def check_batch_size(config: ConfigDict, num_devices: int = 1) -> None:
    """Raise UserError unless every device gets equally many images of every stage in every part."""
    kinds = 2 if config.distill.teacher else 1  # of targets, see training/distillation.py
    unit = config.cascade.num_stages * num_devices * config.accumulation_steps * kinds
    if config.batch_size % unit:
        below, above = config.batch_size // unit * unit, -(-config.batch_size // unit) * unit
        raise UserError(
            f"config.batch_size {config.batch_size} must be a multiple of {unit} = "
            f"{config.cascade.num_stages} stages x {num_devices} devices x "
            f"{config.accumulation_steps} accumulation steps"
            f"{' x 2 kinds of targets' if kinds > 1 else ''}: each gets an equal share; the next is "
            f"{above}" + (f", the one before {below}" if below else "")
        )


def build_cascade(config: ConfigDict) -> Cascade:
    """Return the cascade of a config."""
    return Cascade(config.cascade.num_stages, config.cascade.gamma)


def build_model(config: ConfigDict, dtype: str | None = None) -> PixelFlow:
    """Return the network of a config, computing in `dtype` (default: the config's)."""
    text = joint_encoder(config) if config.text.encoder == "joint" else None
    dtype, intervals = DTYPES[dtype or config.dtype], bool(config.distill.teacher)
    return PixelFlow(**config.model.to_dict(), intervals=intervals, dtype=dtype, text=text)


def joint_encoder(config: ConfigDict) -> T5Config:
    """Return the sizes of a text encoder that is trained with the model."""
    text = config.text
    return T5Config(
        vocab_size=len(SPECIAL) + len(text.words),
        d_model=config.model.context_dim,
        d_kv=text.head_dim,
        d_ff=text.mlp_dim,
        num_layers=text.num_layers,
        num_heads=text.num_heads,
    )


def _installed_config(path: str) -> pathlib.Path:
    """Return the installed config with this name (with or without a folder and `.py`)."""
    package = importlib.util.find_spec("pixelflow_jax.configs")
    folder = pathlib.Path(package.origin).parent if package and package.origin else None
    known = {p.stem: p for p in folder.glob("*.py") if p.stem != "__init__"} if folder else {}
    name = pathlib.Path(path).name.removesuffix(".py")
    if name not in known:
        raise UserError(f"--config={path}: no such file; installed configs: {', '.join(sorted(known))}")
    return known[name]
