"""Streaming moments: equal to numpy's, in any batches and merges, across processes, within memory;
the files of FID tools."""

import socket
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpqdiff.errors import InputError
from mpqdiff.evaluate import statistics
from mpqdiff.evaluate.statistics import Moments, empty, moments


def _rows(n, size, seed=0, offset=0.0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, size)) @ rng.normal(size=(size, size)) + offset


def _close(found: Moments, rows, rtol=1e-10):
    rows = np.asarray(rows, np.float64)
    cov = np.cov(rows, rowvar=False)
    assert found.count == len(rows)
    assert found.mean.dtype == found.m2.dtype == np.float64
    scale = np.abs(cov).max()
    np.testing.assert_allclose(found.cov, cov, rtol=rtol, atol=rtol * scale)
    np.testing.assert_allclose(found.mean, rows.mean(axis=0), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_streamed_moments_equal_numpys_covariance(dtype, offset):
    """Also far from the origin, where sums of squares would lose every digit."""
    rows = _rows(5000, 24, offset=offset).astype(dtype)
    found = empty(24)
    for start in range(0, 5000, 300):
        found = found.update(rows[start : start + 300])
    _close(found, rows)
    _close(moments(rows), rows)


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 60), max_size=8), seed=st.integers(0, 5))
def test_any_batches_and_any_order_of_merging_give_the_same(cuts, seed):
    rows = _rows(60, 5, seed, offset=3.0)
    parts = np.split(rows, sorted(cuts))
    found = [empty(5).update(part) for part in parts]
    forward, backward = empty(5), empty(5)
    for part in found:
        forward = forward.merge(part)
    for part in reversed(found):
        backward = part.merge(backward)
    _close(forward, rows, rtol=1e-9)
    _close(backward, rows, rtol=1e-9)


def test_updating_leaves_the_old_moments_alone():
    first = moments(_rows(50, 4))
    before = first.m2.copy()
    second = first.update(_rows(10, 4, seed=1))
    assert (first.count, second.count) == (50, 60)
    np.testing.assert_array_equal(first.m2, before)


def test_unusable_rows():
    with pytest.raises(InputError, match="4 and 3 dimensions"):
        moments(_rows(9, 4)).update(_rows(9, 3))
    with pytest.raises(InputError, match="1 feature rows"):
        moments(np.ones((1, 3)))
    with pytest.raises(InputError, match="0 feature rows"):
        _ = empty(3).cov
    with pytest.raises(InputError, match="features: 2 of 10 rows"):
        empty(2).update(np.where(np.arange(20).reshape(10, 2) % 11 == 0, np.nan, 1.0))
    with pytest.raises(InputError, match=r"shape \(5,\)"):
        empty(5).update(np.ones(5))


def test_files_go_there_and_back(tmp_path):
    own, spatial = moments(_rows(40, 6)), moments(_rows(40, 3, seed=1))
    statistics.save(tmp_path / "a.npz", own, spatial=spatial)
    found = statistics.load(tmp_path / "a.npz", dimensions=6)
    np.testing.assert_array_equal(found.train_mean, own.mean)
    np.testing.assert_array_equal(found.train_cov, own.cov)
    np.testing.assert_array_equal(found.spatial_mean, spatial.mean)
    np.testing.assert_array_equal(found.spatial_cov, spatial.cov)
    assert found.num_train == 40
    with np.load(tmp_path / "a.npz") as stored:
        assert {"mu", "sigma"} <= set(stored.files)


def test_others_files_are_read(tmp_path):
    """pytorch-fid writes mu and sigma alone; ADM's batches hold images and spatial ones too."""
    mean, cov = np.zeros(4, np.float32), np.eye(4, dtype=np.float32)
    np.savez(tmp_path / "fid.npz", mu=mean, sigma=cov)
    found = statistics.load(tmp_path / "fid.npz")
    assert found.num_train is None
    assert found.spatial_mean is None
    assert found.train_features is None
    assert found.train_cov.dtype == np.float64
    images = np.zeros((2, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "adm.npz", arr_0=images, mu=mean, sigma=cov, mu_s=mean[:2],
             sigma_s=cov[:2, :2])  # fmt: skip
    assert statistics.load(tmp_path / "adm.npz").spatial_mean.shape == (2,)


def test_files_equal_pytorch_fids(tmp_path):
    """Its own writer's keys and normalisation: mean and np.cov."""
    rows = _rows(30, 5)
    np.savez_compressed(tmp_path / "theirs.npz", mu=rows.mean(0), sigma=np.cov(rows, rowvar=False))
    statistics.save(tmp_path / "ours.npz", moments(rows))
    ours, theirs = (statistics.load(tmp_path / f"{name}.npz") for name in ("ours", "theirs"))
    np.testing.assert_allclose(ours.train_mean, theirs.train_mean, rtol=1e-12)
    np.testing.assert_allclose(ours.train_cov, theirs.train_cov, rtol=1e-10)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "not a complete .npz with mu"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, "expected \\[D\\] and \\[D,D\\]"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "NaN or infinite"),
        ({"mu": np.zeros(2), "sigma": [[1.0, 0.5], [0.0, 1.0]]}, "not symmetric"),
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, "another feature network"),
        ({"mu": np.zeros(2), "sigma": np.eye(2), "mu_s": np.zeros(2), "sigma_s": np.eye(3)},
         "mu_s and sigma_s"),
    ],
)  # fmt: skip
def test_unusable_files_say_what_is_wrong(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(InputError, match=message) as error:
        statistics.load(tmp_path / "bad.npz", dimensions=2)
    assert "bad.npz" in str(error.value)


def test_files_that_are_missing_or_cut_short(tmp_path):
    with pytest.raises(InputError, match=r"none\.npz"):
        statistics.load(tmp_path / "none.npz")
    statistics.save(tmp_path / "a.npz", moments(_rows(40, 6)))
    data = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"cut\.npz: not a complete"):
        statistics.load(tmp_path / "cut.npz")


PEAK = """
import resource
import sys
import numpy as np
from mpqdiff.evaluate import frechet, statistics

count, size = map(int, sys.argv[1:])
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = statistics.empty(size)
scale = np.exp(-np.arange(size, dtype=np.float32) * 3 / size)
for batch in range(count // 500):
    rng = np.random.default_rng(batch)
    found = found.update(rng.standard_normal((500, size), np.float32) * scale)
assert found.count == count
if size > 1000:
    frechet.frechet_distance(found.mean, found.cov, np.zeros(size), np.diag(scale**2.0))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(start * 1024, peak * 1024)
"""


def _peak(count, size):
    """(bytes after the imports, peak bytes) of a process that streams `count` rows of `size`."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(count), str(size)], capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    return map(int, done.stdout.split())


def test_memory_is_that_of_a_few_covariances_whatever_the_number_of_rows():
    """The 30,000 rows would be 92 MB, the bound is 68 MB."""
    start, peak = _peak(30_000, 768)
    assert peak - start < 8 * 768**2 * 8 + 30e6


@pytest.mark.slow
def test_50_thousand_rows_of_2048_stay_within_2_gb():
    _, peak = _peak(50_000, 2048)
    assert peak < 2e9


PROCESS = """
import sys
import jax
import numpy as np
port, process = sys.argv[1], int(sys.argv[2])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", num_processes=3, process_id=process)
from mpqdiff.evaluate import statistics
rows = np.load(sys.argv[3])
own = statistics.empty(7).update(np.split(rows, [50, 50])[process])  # the second has none
found = statistics.allreduce(own)
np.savez(f"{sys.argv[3]}.{process}.npz", count=found.count, mean=found.mean, m2=found.m2)
"""


def test_one_process_keeps_its_own():
    own = moments(_rows(9, 4))
    assert statistics.allreduce(own) is own


def test_three_processes_get_the_moments_of_all_rows(tmp_path):
    rows = _rows(120, 7, offset=1e3)
    np.save(tmp_path / "rows.npy", rows)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    path = str(tmp_path / "rows.npy")
    processes = [
        subprocess.Popen([sys.executable, "-c", PROCESS, port, str(i), path],
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for i in range(3)
    ]  # fmt: skip
    texts = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], texts
    found = []
    for i in range(3):
        with np.load(f"{path}.{i}.npz") as stored:
            found.append(Moments(int(stored["count"]), stored["mean"], stored["m2"]))
    _close(found[0], rows)
    for other in found[1:]:
        np.testing.assert_array_equal(other.m2, found[0].m2)
        np.testing.assert_array_equal(other.mean, found[0].mean)
