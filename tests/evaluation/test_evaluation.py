"""Evaluation: metrics against truth, streaming, image sets, the command, the sweep."""

import json
import tracemalloc

import numpy as np
import pytest
import scipy.linalg
from PIL import Image

from pixelflow_jax import convert, evaluate
from pixelflow_jax.common import UserError, arrays
from pixelflow_jax.evaluation import features, metrics
from pixelflow_jax.evaluation.features import PcaFeatures, _flat, collect
from pixelflow_jax.evaluation.judge import Reference
from pixelflow_jax.evaluation.sets import ImageSet, open_images
from pixelflow_jax.requests import run
from pixelflow_jax.requests.job import NotFinite
from pixelflow_jax.training import loop

import parity

RNG = np.random.default_rng(0)


def correlated(count: int, dim: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, dim)) @ rng.normal(size=(dim, dim)) + rng.normal(size=dim)


def test_moments_stream_and_merge():
    """Catches a mean or covariance that depends on how the vectors were cut into batches."""
    x = correlated(101, 9, 0) + 1e4  # far from 0: sums of squares would lose digits
    parts = [metrics.Moments.empty(9) for _ in range(3)]
    for i, batch in enumerate(np.array_split(x, 13)):
        parts[i % 3].add(batch)
    whole = metrics.Moments.empty(9)
    for part in parts:
        whole.merge(part)
    np.testing.assert_allclose(whole.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(whole.covariance, np.cov(x, rowvar=False), rtol=1e-9)


@pytest.mark.parametrize("count", [400, 20])  # 20 vectors of 40 dimensions: singular covariances
def test_frechet_distance(count):
    """Catches a wrong trace term: against scipy's matrix root, and a set against itself."""
    stats = []
    for seed in (1, 2):
        x = correlated(count, 40, seed)
        stats += [x.mean(0), np.cov(x, rowvar=False)]
    mean1, cov1, mean2, cov2 = stats
    root = scipy.linalg.sqrtm(cov1 @ cov2)
    truth = np.square(mean1 - mean2).sum() + np.trace(cov1 + cov2 - 2 * root.real)
    assert metrics.frechet_distance(*stats) == pytest.approx(truth, rel=1e-6)
    assert abs(metrics.frechet_distance(mean1, cov1, mean1, cov1)) < 1e-3


def test_inception_score():
    """Catches wrong splits and a softmax over the wrong axis."""
    logits = RNG.normal(size=(30, 7)) * 3
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    truth = []
    for part in (p[:12], p[12:24], p[24:]):
        truth.append(np.exp(np.mean([np.sum(row * np.log(row / part.mean(0))) for row in part])))
    assert metrics.inception_score(logits, 12) == pytest.approx(np.mean(truth), rel=1e-9)
    assert metrics.inception_score(np.tile(logits[:1], (9, 1))) == pytest.approx(1)


def test_precision_and_recall(monkeypatch):
    """Catches the two exchanged, a neighbour too few, blocks that lose rows, and long silence."""
    monkeypatch.setattr(metrics, "BLOCK", 16)
    reference, samples = RNG.normal(size=(50, 3)), RNG.normal(size=(41, 3)) * 0.5 + 0.5

    def share(points, centres):
        radii = [sorted(np.linalg.norm(centres - c, axis=1))[3] for c in centres]
        return np.mean([any(np.linalg.norm(x - centres, axis=1) <= radii) for x in points])

    expected = share(samples, reference), share(reference, samples)
    heard = []
    assert metrics.precision_recall(reference, samples, watch=heard.append) == expected
    assert expected[0] != expected[1] and len(heard) == 4 + 3 + 3 + 4  # blocks, for the watchdog
    with pytest.raises(metrics.TooFewImages, match="more than 3"):
        metrics.precision_recall(reference[:3], samples)


def test_precision_and_recall_need_one_block_of_memory(monkeypatch):
    """Catches copies of a block of distances, and vectors that are all held in float64."""
    monkeypatch.setattr(metrics, "BLOCK", 256)
    monkeypatch.setattr(metrics, "TILE", 256)
    reference, samples = (RNG.normal(size=(2000, 64)).astype(np.float32) for _ in range(2))
    tracemalloc.start()
    metrics.precision_recall(reference, samples)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * 256 * 2000 * 8


def test_processes_share_the_blocks_of_distances(monkeypatch):
    """Catches a block that two processes compute, or none."""
    monkeypatch.setattr(metrics, "BLOCK", 16)
    points, centres = RNG.normal(size=(50, 3)), RNG.normal(size=(41, 3))
    truth = np.square(points[:, None] - centres).sum(-1)
    for processes in (1, 2, 3, 60):
        monkeypatch.setattr(metrics.jax, "process_count", lambda count=processes: count)
        found, times = np.zeros_like(truth), np.zeros(50)
        for process in range(processes):
            monkeypatch.setattr(metrics.jax, "process_index", lambda index=process: index)
            for begin, squares in metrics._square_distances(points, centres, lambda what: None):
                found[begin : begin + len(squares)] = squares
                times[begin : begin + len(squares)] += 1
        np.testing.assert_allclose(found, truth, atol=1e-12)
        assert (times == 1).all()


def test_what_a_judgement_leaves_out(pictures, monkeypatch):
    """Catches an error in precision and recall that is taken for too few images, and the other way."""
    few = ImageSet("few", 3, lambda begin, end: pictures[0][begin:end])
    reference = Reference(str(pictures[2]), None, 5)
    assert reference.judge(few)["pca_precision"] is None
    monkeypatch.setattr(metrics, "_radii", lambda *args: np.zeros((2, 3, 4)))
    with pytest.raises(ValueError):
        reference.judge(open_images(str(pictures[1]), "samples"))


def test_moments_take_many_batches_at_once(pictures, monkeypatch):
    """Catches a merge a batch, which costs more than the features, and batches that are left behind."""
    merged = []
    monkeypatch.setattr(features, "MERGED", 6)
    add = metrics.Moments.add
    monkeypatch.setattr(metrics.Moments, "add", lambda m, x: (merged.append(len(x)), add(m, x)))
    images = open_images(str(pictures[2]), "samples")
    found = collect(PcaFeatures(images), images, 2, ("pca",))
    assert merged == [6, 6]
    found, vectors = found.moments["pca"], found.vectors["pca"]
    np.testing.assert_allclose(found.mean, vectors.mean(0), atol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(vectors, rowvar=False), rtol=1e-12, atol=1e-12)


@pytest.fixture
def pictures(tmp_path):
    """The same 12 images as a folder and as an npz."""
    pixels = RNG.integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    np.savez_compressed(tmp_path / "images.npz", arr_0=pixels, labels=np.arange(12))
    return pixels, folder, tmp_path / "images.npz"


def test_image_sets(pictures):
    """Catches an order that is not the files', and images read twice or not at all by batches."""
    pixels, folder, npz = pictures
    for path in (folder, npz):
        found = open_images(str(path), "samples")
        np.testing.assert_array_equal(found.read(0, found.count), pixels)
        shared = [b for process in (1, 0) for b in found.batches(5, process, 2)]
        assert sorted(x.tobytes() for b in shared for x in b) == sorted(x.tobytes() for x in pixels)
    assert open_images("configs/digits.py", "reference").count == 450
    held_out = open_images("configs/t2i_tiny.py", "reference")
    assert "test split" in held_out.name and held_out.read(0, 2).shape == (2, 16, 16, 3)
    mixed = open_images(
        "configs/t2i_tiny_buckets.py", "reference"
    )  # sizes of many kinds: cropped as one
    assert len({mixed.read(i, i + 2).shape for i in range(8)}) == 1


@pytest.mark.parametrize(
    ("size", "small"), [((16, 16), (16, 16)), ((48, 40), (24, 20)), ((512, 8), (32, 8))]
)
def test_pca_sees_at_most_32_pixels_a_side(size, small):
    """Catches sizes between 32 and 64 that are left as they are, and strips that lose a side."""
    assert _flat(np.zeros((2, *size, 3), np.uint8)).shape == (2, np.prod(small) * 3)


def test_features_stream(pictures):
    """Catches features that depend on the batch size, and vectors out of order."""
    images = open_images(str(pictures[2]), "samples")
    extract = PcaFeatures(images)
    one, other = (collect(extract, images, size, ("pca",)) for size in (5, 12))
    np.testing.assert_allclose(one.vectors["pca"], other.vectors["pca"], atol=1e-12)
    np.testing.assert_allclose(
        one.moments["pca"].covariance, other.moments["pca"].covariance, atol=1e-12
    )


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Inception-v3 with weights from their names, as the parity case describes them."""
    path = tmp_path_factory.mktemp("inception") / "weights.npz"
    case = parity.DEFAULT_CASES / "inception_v3.npz"
    with np.load(case) as file:
        np.savez(path, **parity.inception_state(file))
    return path


@pytest.mark.slow
def test_fid_by_command(pictures, inception_file, tmp_path):
    """Catches FID of a set with itself that is not 0, and statistics that differ from images.

    The converted weights, our statistics file and ADM's form of it all lead to the same numbers.
    """
    pixels, folder, npz = pictures
    convert.main([f"--source={inception_file}", "--to=inception", f"--out={tmp_path / 'converted'}"])
    weights = f"--inception={tmp_path / 'converted' / 'inception.safetensors'}"
    stats, out = tmp_path / "stats.npz", tmp_path / "metrics.json"
    flags = [weights, "--batch_size=6"]
    evaluate.main(
        [*flags, f"--samples={folder}", f"--reference={npz}", f"--out={out}", f"--save_stats={stats}"]
    )
    direct = json.loads(out.read_text())
    assert abs(direct["fid"]) < 1e-3 and abs(direct["sfid"]) < 1e-3
    assert direct["precision"] == direct["recall"] == 1 and direct["inception_score"] >= 1
    assert direct["num_samples"] == 12 and "not known" in direct["uint8_rule"]
    assert arrays.array_shapes(stats)["mu_s"] == ((7 * 17 * 17,), np.float64)

    half = tmp_path / "half.npz"
    np.savez(half, arr_0=pixels[:6])
    for reference in (npz, stats):
        evaluate.main([*flags, f"--samples={half}", f"--reference={reference}", f"--out={out}"])
        found = json.loads(out.read_text())
        if reference == npz:
            first = found
    assert found["fid"] == pytest.approx(first["fid"], rel=1e-9) and found["fid"] > 0.01
    assert first["recall"] is not None and found["recall"] is None  # statistics hold no images


def test_pca_by_command(pictures, tmp_path):
    """Catches a substitute that is called FID, and a distance to itself that is not 0."""
    _, folder, npz = pictures
    out = tmp_path / "metrics.json"
    evaluate.main([f"--samples={folder}", f"--reference={npz}", "--features=pca", f"--out={out}"])
    found = json.loads(out.read_text())
    assert abs(found["pca_frechet"]) < 1e-6 and "fid" not in found and found["pca_precision"] == 1
    assert "not FID" in found["features"] and found["pca_frechet_of_reference_halves"] > 0


def test_sweep_goes_on_where_it_was(tiny_config, tmp_path):
    """Catches combinations that are left out, judged twice, or mixed with another checkpoint's."""
    tiny_config.optimizer.warmup_steps, tiny_config.optimizer.learning_rate = 0, 0.1
    loop.train(tiny_config, tmp_path / "run")
    flags = ["--sweep", f"--checkpoint={tmp_path / 'run'}", f"--out={tmp_path / 'sweep'}"]
    flags += ["--reference=configs/digits.py", "--features=pca", "--num_images=6"]
    evaluate.main([*flags, "--solver=euler,ab2", "--guidance_scale=1,2"])
    rows = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [(r["solver"], r["guidance_scale"]) for r in rows] == [
        *(("euler", 1), ("ab2", 1), ("euler", 2), ("ab2", 2))
    ]
    assert all(r["nfe"] == 4 and r["seconds_per_image"] > 0 for r in rows)
    assert len({r["pca_frechet"] for r in rows}) > 1
    done = sorted((tmp_path / "sweep").glob("cells/*/row.json"))
    times = [path.stat().st_mtime_ns for path in done]
    done[0].unlink()
    evaluate.main([*flags, "--solver=euler,ab2", "--guidance_scale=1,2"])
    assert [path.stat().st_mtime_ns for path in done][1:] == times[1:]
    again = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [r["pca_frechet"] for r in again] == [r["pca_frechet"] for r in rows]
    with pytest.raises(UserError, match="another checkpoint"):
        evaluate.main([*flags[:-1], "--num_images=7"])


def test_a_sweep_goes_past_what_is_not_finite(trained, tmp_path, monkeypatch, capsys):
    """Catches one bad combination that costs all the others, at each start anew."""
    sample = run.sample

    def breaks(request, watch):
        if request.solver == "heun":
            raise NotFinite("image 0 is not finite")
        return sample(request, watch)

    monkeypatch.setattr(run, "sample", breaks)
    flags = ["--sweep", f"--checkpoint={trained}", "--reference=configs/digits.py", "--features=pca"]
    flags += ["--num_images=4", f"--out={tmp_path / 'sweep'}"]
    evaluate.main([*flags, "--solver=heun,euler"])
    assert "left out: image 0 is not finite" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert row["solver"] == "euler"
    with pytest.raises(UserError, match="no combination gave images that are finite"):
        evaluate.main([*flags[:-1], f"--out={tmp_path / 'none'}", "--solver=heun"])


def test_wrong_inception_weights(inception_file, tmp_path):
    """Catches weights of another network that are loaded in silence."""
    with np.load(inception_file) as file:
        state = dict(file)
    del state["fc.bias"]
    state["Mixed_5b.branch1x1.conv.weight"] = np.zeros((1, 2, 3, 4))
    state["Mixed_9z.bn.weight"] = np.zeros(3)
    np.savez(tmp_path / "bad.npz", **state)
    wrong = r"branch1x1.conv.weight has shape \(1, 2, 3, 4\); left over: Mixed_9z.*; missing: fc.bias"
    with pytest.raises(UserError, match=wrong):
        convert.main([f"--source={tmp_path / 'bad.npz'}", "--to=inception", f"--out={tmp_path / 'o'}"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--samples=nowhere"], "--samples=nowhere does not exist"),
        (["--samples={npz}", "--features=inception"], "--features=pca does without"),
        (["--samples={npz}", "--features=inception", "--inception=no.pth"], "no.pth does not exist"),
        (["--samples={npz}", "--reference={empty}"], "holds no images"),
        (["--samples={npz}", "--batch_size=0"], "at least 1"),
        (["--samples={npz}", "--reference={torn}"], "not a whole npz file"),
        (["--samples={pickle}"], "Python objects"),
        (["--samples={npz}", "--solver=euler"], "goes with --sweep"),
        (["--save_stats=x.npz"], "Inception's statistics"),
        (["--samples={npz}", "--reference=configs/digits.py", "--out={empty}"], "is a folder"),
        (["--samples={mixed}"], "add --resolution"),
        (["--samples={small}"], "must be of one size"),
        ([], "name what to judge"),
        (["--sweep"], "needs --checkpoint"),
        (["--sweep", "--checkpoint=x", "--solver=magic"], "solver must be one of"),
    ],
)
def test_bad_input(pictures, tmp_path, flags, message):
    """Catches a traceback, or an output written for a request that cannot be met."""
    _, folder, npz = pictures
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn.npz").write_bytes(npz.read_bytes()[:500])
    np.savez(tmp_path / "pickle.npz", arr_0=np.array([{}, 1], object))
    np.savez(tmp_path / "small.npz", arr_0=np.zeros((5, 8, 8, 3), np.uint8))
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for side in (8, 9):
        Image.new("RGB", (side, side)).save(mixed / f"{side}.png")
    places = {
        **{"npz": npz, "empty": tmp_path / "empty", "torn": tmp_path / "torn.npz", "mixed": mixed},
        **{"pickle": tmp_path / "pickle.npz", "small": tmp_path / "small.npz"},
    }
    out = tmp_path / "metrics.json"
    defaults = {"reference": npz, "out": out, "features": "pca"}
    given = {flag.split("=")[0].removeprefix("--") for flag in flags}
    flags = [flag.format(**places) for flag in flags]
    flags += [f"--{name}={value}" for name, value in defaults.items() if name not in given]
    with pytest.raises(UserError, match=message):
        evaluate.main(flags)
    assert not out.exists()
