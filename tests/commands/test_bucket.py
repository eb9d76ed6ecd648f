"""gs:// paths, against an emulator of Google Cloud Storage: what each costs, that each command works."""

import contextlib
import json
import pathlib
import resource
import signal
import struct
import tarfile
import threading

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from pixelflow_jax import convert, doctor, encode, evaluate, pack, sample
from pixelflow_jax.common import UserError, arrays, files
from pixelflow_jax.config import load_config
from pixelflow_jax.data.sources import open_source
from pixelflow_jax.distributed.preemption import Preempted
from pixelflow_jax.requests.layouts import read_prompts_file, write_layout
from pixelflow_jax.requests.output import OutputFolder
from pixelflow_jax.training import loop, writes
from pixelflow_jax.training.checkpoints import CheckpointFailed, load_params
from pixelflow_jax.training.start import initial_params

import parity
from bucket import Bucket
from conftest import TINY, start_hosts


@pytest.fixture
def bucket():
    """A bucket that is empty."""
    with Bucket() as made:
        yield made


@pytest.fixture(scope="module")
def run(trained):
    """A bucket that holds a run, in run/."""
    with Bucket() as made:
        made.upload(trained, "run")
        yield made


def pictures(folder: pathlib.Path) -> pathlib.Path:
    """A folder of two classes, three captioned images each."""
    for number in range(6):
        path = folder / "abc"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (40 * number, 0, 0)).save(path)
        path.with_suffix(".txt").write_text(f"picture {number}")
    return folder


def test_what_a_file_costs(bucket):
    """Catches a temporary name, a look before a read, and a listing that another's object is not in."""
    path = f"{bucket.url}/a/b/x.bin"
    with bucket.count() as asked:
        files.write_bytes(path, b"hello")
    assert len(asked) == 1
    with bucket.count() as asked:
        assert files.read_bytes(path) == b"hello" and files.read_bytes(path, 1, 3) == b"el"
        assert files.open_file(path).read() == b"hello"
    assert len(asked) == 3
    bucket.put("a/b/empty", b"")
    assert (
        files.read_bytes(f"{bucket.url}/a/b/empty") == files.open_file(f"{bucket.url}/a/b/empty").read()
    )
    for names in (["empty", "x.bin"], ["empty", "later", "x.bin"]):
        with bucket.count() as asked:
            assert files.list_files(f"{bucket.url}/a/b") == names
            assert files.walk(f"{bucket.url}/a") == [("b/", names)]
        assert len(asked) == 2
        bucket.put("a/b/later", b"another process")
    assert (
        files.list_folders(f"{bucket.url}/a") == ["b"] and files.list_folders(f"{bucket.url}/a/b") == []
    )
    assert files.list_files(f"{bucket.url}/nowhere") == files.walk(f"{bucket.url}/nowhere") == []
    with pytest.raises(UserError, match="is a file"):
        files.list_files(path)
    with pytest.raises(FileNotFoundError):
        files.read_bytes(f"{bucket.url}/nowhere")
    with pytest.raises(RuntimeError), files.create(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert files.read_bytes(path) == b"hello"
    files.remove(f"{bucket.url}/a")
    files.remove(f"{bucket.url}/a")
    assert not bucket.names()


def test_a_large_object_is_written_and_read_in_blocks(bucket, monkeypatch):
    """Catches blocks that are lost, doubled or held in memory all at once."""
    monkeypatch.setattr(files, "BLOCK", 2**18)
    images = np.random.default_rng(0).integers(0, 255, (20, 100, 200, 3), np.uint8)
    path = f"{bucket.url}/x.npz"
    arrays.write_npz(path, {"arr_0": (images.shape, images.dtype, iter(images[:, None]))})
    np.testing.assert_array_equal(arrays.read_npz(path, "arr_0"), images)
    with bucket.count("x.npz") as asked:
        np.testing.assert_array_equal(np.concatenate(list(arrays.rows(path, "arr_0", 3))), images)
    assert len(asked) < 40  # 1.2 MB, in blocks of 32 KB and what is asked for
    files.write_bytes(path, images.tobytes())
    assert files.open_file(path).read() == images.tobytes() == bucket.get("x.npz")


def test_a_folder_is_listed_once(bucket, tmp_path):
    """Catches a source that asks for each of its files, before it reads them one request each."""
    path = bucket.upload(pictures(tmp_path), "data")
    for source, most in (("folder", 16), ("caption_folder", 12)):
        data = load_config("configs/digits.py", [f"data.source={source}", f"data.path={path}"]).data
        with bucket.count() as asked:
            opened = open_source(data)
        assert len(opened) == 6 and len(asked) <= most
        assert not any(name.endswith((".png", ".txt")) for _, name in asked)
        with bucket.count() as asked:
            assert len(opened[3][0]) > 50
        assert len(asked) == (1 if source == "folder" else 2)


def test_a_shard_costs_two_requests(bucket):
    """Catches names that are temporary or asked for first, and members that are read one by one."""
    folder = OutputFolder(f"{bucket.url}/out", (16, 16, 3), {"labels": np.arange(8)}, 2)
    pixels = np.random.default_rng(0).integers(0, 255, (8, 16, 16, 3), np.uint8)
    folder.drop_torn_shards(lambda what: None)
    with bucket.count("shards/") as asked:
        for begin in (0, 4):
            index = np.arange(begin, begin + 4)
            folder.write(index, {"arr_0": pixels[index], "nfe": np.full((4, 2), begin, np.int32)})
    assert len(asked) <= 2 * 2
    assert not len(folder.missing())
    with bucket.count("shards/0") as asked:
        folder.finish(lambda number: {}, lambda what: None)
    reads = [request for request in asked if request[0] == "GET"]
    assert len(reads) <= 2 * 2
    assert bucket.names("out/") == [
        f"out/{name}" for name in ("000000.png", "000001.png", "grid.png", "samples.npz")
    ]
    np.testing.assert_array_equal(arrays.read_npz(f"{bucket.url}/out/samples.npz", "arr_0"), pixels)
    assert arrays.read_npz(f"{bucket.url}/out/samples.npz", "nfe")[:, 0].tolist() == [0] * 4 + [4] * 4


def test_metrics_cost_two_requests_a_line_and_nobody_waits(bucket, monkeypatch):
    """Catches a line that holds up the steps, costs more than it must, or is lost at the end."""
    monkeypatch.setattr(writes, "RATE", 1e12)
    gate = threading.Event()
    bucket.refuse = lambda method, path: method == "POST" and not gate.wait(60)
    journal = writes.Journal(f"{bucket.url}/metrics.jsonl", b"old\n")
    with bucket.count() as asked:
        for number in range(50):
            journal.write(b"%d\n" % number)
            journal.flush()  # the bucket does not answer
        gate.set()
        assert journal.settle()
    lines = b"old\n" + b"".join(b"%d\n" % number for number in range(50))
    assert bucket.get("metrics.jsonl") == lines and 1 <= len(asked) <= 3
    with bucket.count() as asked:
        journal.write(b"last\n")
        journal.close()
    assert len(asked) == 1 and bucket.get("metrics.jsonl") == lines + b"last\n"


@contextlib.contextmanager
def full_disk():
    """Lets no file grow."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_journal_outlasts_failures(bucket, tmp_path, monkeypatch, caplog):
    """Catches a write that is given up, in silence or at the first error, or that is made twice."""
    monkeypatch.setattr(writes, "PAUSES", (0.01,) * 5)
    failing = [True, True]
    bucket.refuse = lambda method, path: "POST" == method and bool(failing) and failing.pop()
    journal = writes.Journal(f"{bucket.url}/x")
    bucket.status = 400  # gcsfs itself tries others again
    journal.write(b"a\n")
    journal.close()
    assert bucket.get("x") == b"a\n" and caplog.text.count("again in") == 2
    local = tmp_path / "folder" / "x"
    (tmp_path / "folder").write_text("in the way")
    journal = writes.Journal(local)
    journal.write(b"a\n")
    assert not journal.settle()
    (tmp_path / "folder").unlink()
    journal.write(b"b\n")
    journal.close()
    assert local.read_bytes() == b"a\nb\n"
    (tmp_path / "folder" / "x").unlink()
    (tmp_path / "folder" / "x").mkdir()
    journal = writes.Journal(local)
    journal.write(b"c\n")
    with pytest.raises(OSError, match="lacks its last 2 bytes"):
        journal.close()
    with pytest.raises(OSError, match="lacks its last 2 bytes"), full_disk():
        monkeypatch.setattr(writes, "PAUSES", (3600,) * 5)  # time will not mend it: nobody waits
        journal = writes.Journal(tmp_path / "y")
        journal.write(b"d\n")
        journal.close()


@pytest.fixture
def flags():
    """TINY, with the paths of a run."""
    return [*TINY, "log_every=1", "num_train_steps=4"]


@pytest.mark.slow
def test_train_stop_resume_load(bucket, trained, monkeypatch):
    """Catches a run in a bucket that cannot be stopped, resumed, or sampled from as it is by then."""
    config, workdir = load_config("configs/digits.py", TINY), f"{bucket.url}/run"
    monkeypatch.setattr(loop.PreemptionWatch, "requested", lambda self, step: step == 3)
    with bucket.count("metrics.jsonl") as asked, pytest.raises(Preempted):
        loop.train(config, workdir)
    assert len(asked) <= 2 and load_params(workdir)[2]["step"] == 3
    monkeypatch.undo()
    with bucket.count("metrics.jsonl") as asked:
        loop.train(config, workdir)
    assert len(asked) <= 2 and load_params(workdir)[2]["step"] == 4
    ours, whole = (
        [json.loads(line)["loss"] for line in text.splitlines()]
        for text in (bucket.get("run/metrics.jsonl"), (trained / "metrics.jsonl").read_bytes())
    )
    assert ours == whole and bucket.names("run/tensorboard/")


def test_a_failed_checkpoint_is_saved_again(bucket, flags, monkeypatch, caplog):
    """Catches a run that ends at the first failure, or goes on for ever without a checkpoint."""
    monkeypatch.setattr(writes, "PAUSES", (0.01, 0.01))
    bucket.status = 400
    failing = [True] * 2  # as many as there are pauses, if each hits a save of its own
    bucket.refuse = lambda method, path: (
        method == "POST" and "checkpoints" in path and bool(failing) and failing.pop()
    )
    loop.train(load_config("configs/digits.py", flags), f"{bucket.url}/run")
    assert "again in" in caplog.text and "run/checkpoints/4/meta/metadata" in bucket.names()
    bucket.refuse = lambda method, path: method == "POST" and "checkpoints" in path
    with pytest.raises(CheckpointFailed, match="could not be saved in gs://"):
        loop.train(load_config("configs/digits.py", [*flags, "num_train_steps=6"]), f"{bucket.url}/run")


@pytest.mark.slow
def test_sample_and_evaluate(run):
    """Catches a path of `sample` or `evaluate` that may not be in a bucket."""
    place = f"{run.url}/out"
    common = [f"--checkpoint={run.url}/run", "--num_steps=1", "--seed=3"]
    sample.main([*common, "--num_images=6", f"--out={place}/one", "--batch_size=4", "--save_stages"])
    names = run.names("out/one/")
    assert {"out/one/000005.png", "out/one/samples.npz", "out/one/stages/000000.png"} <= {*names}
    run.storage.delete_file("pixels", "out/one/samples.npz")
    sample.main([*common, "--num_images=6", f"--out={place}/one", "--batch_size=4", "--save_stages"])
    assert run.names("out/one/") == names
    start = [f"--init_image={place}/one/000001.png", "--strength=0.5"]
    sample.main([*common, *start, f"--out={place}/two", "--num_images=1"])
    sample.main(
        [f"--from_png={place}/one/000002.png", f"--checkpoint={run.url}/run", f"--out={place}/three"]
    )
    sample.main([*common[:2], f"--invert={place}/one/000000.png", "--labels=0", f"--out={place}/noise"])
    sample.main([*common[:2], f"--from_noise={place}/noise/noise.npz", f"--out={place}/back"])
    evaluate.main([f"--samples={place}/one", f"--reference={place}/one", "--features=pca",
                   f"--out={place}/metrics.json"])  # fmt: skip
    assert json.loads(run.get("out/metrics.json"))
    for name in ("samples.npz", "stages"):
        files.remove(f"{place}/one/{name}")
    evaluate.main([f"--samples={place}/one", f"--reference={place}/one", "--features=pca",
                   f"--out={place}/folder.json"])  # fmt: skip


@pytest.mark.slow
def test_sweep_statistics_and_weights(run, tmp_path):
    """Catches a sweep, statistics or Inception's weights that may not be in a bucket."""
    place, weights = f"{run.url}/judged", tmp_path / "weights.npz"
    with np.load(parity.DEFAULT_CASES / "inception_v3.npz") as case:
        np.savez(weights, **parity.inception_state(case))
    run.put("judged/weights.npz", weights.read_bytes())
    flags = ["--num_images=4", "--num_steps=1"]
    sample.main([f"--checkpoint={run.url}/run", f"--out={place}/one", *flags])
    judge = [f"--reference={place}/one", f"--inception={place}/weights.npz"]
    evaluate.main([*judge, f"--save_stats={place}/stats.npz"])
    evaluate.main([f"--reference={place}/stats.npz", judge[1], f"--samples={place}/one",
                   f"--out={place}/fid.json"])  # fmt: skip
    assert abs(json.loads(run.get("judged/fid.json"))["fid"]) < 1e-3
    sweep = [
        "--sweep",
        f"--checkpoint={run.url}/run",
        judge[0],
        "--features=pca",
        f"--out={place}/sweep",
    ]
    for solvers in ("euler", "euler,heun"):
        evaluate.main([*sweep, *flags, f"--solver={solvers}", f"--out={place}/sweep"])
        assert len(json.loads(run.get("judged/sweep/sweep.json"))) == len(solvers.split(","))


def write_tar(path: pathlib.Path, folder: pathlib.Path) -> bytes:
    """A WebDataset shard of captioned pictures."""
    with tarfile.open(path, "w") as tar:
        for file in sorted(folder.rglob("*.*")):
            tar.add(file, file.name)
    return path.read_bytes()


def test_sources(bucket, tmp_path):
    """Catches a kind of source that cannot be read from a bucket, or reads it all at each start."""
    folder = pictures(tmp_path / "data")
    bucket.put("tars/0.tar", write_tar(tmp_path / "0.tar", folder))
    path = bucket.upload(folder, "data")
    pack.main([f"--path={path}", f"--out={bucket.url}/packed", "--shard_size=4"])
    assert len(bucket.names("packed/")) == 3
    images = np.zeros((5, 28, 28), np.uint8)
    for name, array in (("images-idx3", images), ("labels-idx1", np.zeros(5, np.uint8))):
        head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
        bucket.put(f"idx/train-{name}-ubyte", head + array.tobytes())
    # array_record reads by C++ of its own, which asks Google alone.
    for place, kind, count in (("tars", "webdataset", 6), ("idx", "idx", 5)):
        overrides = [f"data.source={kind}", f"data.path={bucket.url}/{place}", "data.resolution=32"]
        data = load_config("configs/digits.py", overrides).data
        for _ in range(2):
            with bucket.count(".tar") as asked:
                source = open_source(data)
                assert len(source) == count and source[count - 1][0] is not None
        assert len(asked) <= 1  # the image and its caption together; the index is kept


@pytest.mark.slow
def test_other_commands(run, tmp_path, t5_folder, capsys):
    """Catches `convert`, `doctor`, `encode` and lists of prompts that take no path of a bucket."""
    convert.main([f"--source={run.url}/run", "--to=official", f"--out={run.url}/official"])
    assert "official/config.yaml" in run.names()
    convert.main([f"--source={run.url}/official", f"--out={run.url}/converted"])
    config = load_config("configs/digits.py", [*TINY, f"init_from={run.url}/converted"])
    ours, _ = initial_params("init_from", config.init_from)
    theirs = load_params(f"{run.url}/run")[0]
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(one, other)
    run.put("prompts/a.txt", b"a red seven")
    run.put("prompts/b.txt", b"a blue one")
    assert [entry["name"] for entry in read_prompts_file(f"{run.url}/prompts")] == ["a", "b"]
    assert read_prompts_file(f"{run.url}/prompts/a.txt")[0]["prompt"] == "a red seven"
    encode.main([f"--captions={run.url}/prompts/a.txt", f"--encoder={run.upload(t5_folder, 't5')}",
                 f"--out={tmp_path / 'cache'}"])  # fmt: skip
    made = {"arr_0": np.zeros((8, 8, 8, 3), np.uint8), "prompt": np.arange(8) % 2}
    arrays.write_npz(f"{run.url}/s.npz", {name: (x.shape, x.dtype, [x]) for name, x in made.items()})
    entries = read_prompts_file(f"{run.url}/prompts")
    for layout in ("geneval", "dpg"):
        write_layout(layout, epath.Path(f"{run.url}/s.npz"), entries, epath.Path(f"{run.url}/{layout}"))
    assert run.names("dpg/") == ["dpg/a.png", "dpg/b.png"] and len(run.names("geneval/")) == 10
    flags = [f"--config.{override}" for override in TINY]
    doctor.main([f"--workdir={run.url}/run", *flags])


@pytest.mark.slow
def test_two_hosts_go_on_in_a_bucket(run):
    """Catches shards of another process that a listing of before does not hold."""
    out = f"{run.url}/two"
    command = [f"--checkpoint={run.url}/run", f"--out={out}", "--num_images=8", "--num_steps=1"]
    sample.main([*command, "--batch_size=2"])
    whole = run.get("two/samples.npz")
    kept = {name: part[2:4] for name, part in arrays.read_arrays(f"{out}/samples.npz").items()}
    files.remove(f"{out}/samples.npz")
    shard = {name: (x.shape, x.dtype, [x]) for name, x in kept.items() if name in ("arr_0", "nfe")}
    arrays.write_npz(f"{out}/shards/00000002-00000004.npz", shard)
    children = start_hosts(2, ["pixelflow_jax.sample", *command, "--batch_size=2"])
    said = [child.communicate(timeout=300)[0] for child in children]
    assert all(child.returncode == 0 for child in children), said
    assert run.get("two/samples.npz") == whole and not run.names("two/shards/")
