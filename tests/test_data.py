"""Data sets: formats, damaged files, and fetching from a local server."""

import gzip
import hashlib
import io
import os
import pickle
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from gcjax import data

REAL = Path(os.environ.get("GCJAX_DATA") or "/nonexistent")  # read before it is unset
TEXTS = {"train": " a b a <unk>\n \n c a\n", "valid": "a d\n", "test": "c b"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty data folder, and no other place with data."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("GCJAX_DATA", raising=False)
    place = tmp_path / "data"
    place.mkdir()
    return place


def images(n, shape, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, *shape), np.uint8), np.arange(n) % 10


def write_npz(path, shape, **changes):
    x_train, y_train = images(6, shape)
    x_test, y_test = images(4, shape, 1)
    arrays = dict(x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    arrays |= changes
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return arrays


def python2_pickle(content):
    """Pickles as the official files are: Python 2's text and NumPy's old names."""

    class Pickler(pickle._Pickler):
        dispatch = dict(pickle._Pickler.dispatch)

        def save_text(self, text):
            raw = text if isinstance(text, bytes) else text.encode()
            self.write(pickle.BINSTRING + len(raw).to_bytes(4, "little") + raw)
            self.memoize(text)

        dispatch[bytes] = dispatch[str] = save_text

    Pickler(out := io.BytesIO(), 2).dump(content)
    return out.getvalue().replace(b"numpy._core", b"numpy.core")


def cifar10_archive(dump=python2_pickle):
    """A CIFAR-10 archive of 5 x 2 + 3 images, and the images in their order."""
    members, train = {}, []
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for seed, name in enumerate(names):
        x, y = images(3 if "test" in name else 2, (32, 32, 3), seed)
        planes = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
        members[name] = dump({"data": planes, "labels": y.tolist()})
        train.append(x)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue(), np.concatenate(train[:5]), train[5]


def idx_gz(array):
    shape = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return gzip.compress(bytes([0, 0, 8, array.ndim]) + shape + array.tobytes())


def publish(monkeypatch, file, content, url="http://127.0.0.1:1/"):
    """Makes `content` the officially published file."""
    source = data.Source(url, hashlib.md5(content).hexdigest())
    monkeypatch.setitem(data.DOWNLOADS, file, source)


@pytest.fixture
def server():
    """A local server: a function that publishes bytes and gives their address."""
    content = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path not in content:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content[self.path])))
            self.end_headers()
            self.wfile.write(content[self.path])

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
        thread.start()

        def serve(path, body):
            if body is not None:
                content[path] = body
            return f"http://127.0.0.1:{httpd.server_port}{path}"

        yield serve
        httpd.shutdown()
        thread.join()


def one_line_error(kind, *words, **kwargs):
    with pytest.raises(kind) as caught:
        data.load(**kwargs)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert str(word) in text
    return text


# What is there


def test_digits_need_no_file_and_never_change():
    got = data.load("digits")
    assert got["x_train"].shape == (1437, 8, 8, 1) and got["x_test"].shape[0] == 360
    assert got["x_train"].dtype == np.uint8 and got["x_train"].max() == 255
    assert got["y_train"].dtype == np.int32
    assert set(np.bincount(got["y_test"])) <= {35, 36, 37}  # stratified
    np.testing.assert_array_equal(got["x_test"], data.load("digits")["x_test"])


@pytest.mark.parametrize("how", ["argument", "environment", "cache"])
def test_npz_is_found_in_each_place(how, folder, monkeypatch):
    place, argument = folder, None
    if how == "argument":
        argument = folder
    elif how == "environment":
        monkeypatch.setenv("GCJAX_DATA", str(folder))
    else:
        place = folder.parent / "home/.cache/gcjax"
        place.mkdir(parents=True)
    want = write_npz(place / "cifar100_subset.npz", (32, 32, 3))
    got = data.load("cifar100_subset", argument)
    np.testing.assert_array_equal(got["x_train"], want["x_train"])
    np.testing.assert_array_equal(got["y_test"], want["y_test"])
    assert got["y_train"].dtype == np.int32


def test_grey_images_get_a_channel(folder):
    write_npz(folder / "fashion_mnist.npz", (28, 28))
    assert data.load("fashion_mnist", folder)["x_train"].shape == (6, 28, 28, 1)


@pytest.mark.parametrize("dump", [python2_pickle, None], ids=["python2", "python3"])
def test_cifar10_archive(dump, folder, monkeypatch):
    # A pickle of Python 3 has text keys, so the keys are written as bytes there.
    modern = lambda d: pickle.dumps({k.encode(): v for k, v in d.items()}, 2)
    content, train, test = cifar10_archive(dump or modern)
    (folder / "cifar-10-python.tar.gz").write_bytes(content)
    publish(monkeypatch, "cifar-10-python.tar.gz", content)
    got = data.load("cifar10", folder)
    np.testing.assert_array_equal(got["x_train"], train)
    np.testing.assert_array_equal(got["x_test"], test)
    np.testing.assert_array_equal(got["y_train"], [0, 1] * 5)


def test_fashion_mnist_idx_files(folder, monkeypatch):
    files = data.FORMS["fashion_mnist"][-1].files
    x, y = images(5, (28, 28))
    for file in files:
        content = idx_gz(x if "images" in file else y.astype(np.uint8))
        (folder / file).write_bytes(content)
        publish(monkeypatch, file, content)
    got = data.load("fashion_mnist", folder)
    np.testing.assert_array_equal(got["x_train"][..., 0], x)
    np.testing.assert_array_equal(got["y_test"], y)


# Text


def write_texts(folder, texts=TEXTS):
    (folder / "wikitext2").mkdir()
    for part, text in texts.items():
        (folder / f"wikitext2/{part}.txt").write_text(text, encoding="utf-8")


def words(got, part):
    return [got["vocab"][i] for i in got[part]]


def test_wikitext2_words_and_line_ends(folder):
    write_texts(folder)
    got = data.load("wikitext2", folder)
    want = "a b a <unk> <eos> <eos> c a <eos>".split()
    assert words(got, "train") == want
    assert words(got, "valid") == ["a", "d", "<eos>"]
    assert words(got, "test") == ["c", "b", "<eos>"]
    assert got["vocab"] == ["<eos>", "a", "<unk>", "b", "c", "d"]
    assert got["train"].dtype == np.int32


def test_wikitext2_reduced_vocabulary(folder):
    write_texts(folder)
    got = data.load("wikitext2", folder, vocab_size=3)
    assert got["vocab"] == ["<unk>", "<eos>", "a"]
    assert words(got, "valid") == ["a", "<unk>", "<eos>"]
    assert len(data.load("wikitext2", folder, vocab_size=99)["vocab"]) == 5


def test_wikitext2_zip_equals_plain_text(folder, tmp_path):
    write_texts(folder)
    (other := tmp_path / "zip").mkdir()
    with zipfile.ZipFile(other / "wikitext-2-v1.zip", "w") as archive:
        for part, text in TEXTS.items():
            archive.writestr(f"wikitext-2/wiki.{part}.tokens", text)
    plain, packed = data.load("wikitext2", folder), data.load("wikitext2", other)
    np.testing.assert_array_equal(plain["train"], packed["train"])
    assert plain["vocab"] == packed["vocab"]


def test_tinyshakespeare_split(folder):
    (folder / "tinyshakespeare").mkdir()
    text = "To be, or not to be\n" * 5
    (folder / "tinyshakespeare/input.txt").write_text(text)
    got = data.load("tinyshakespeare", folder)
    assert "".join(words(got, "train") + words(got, "test")) == text
    assert len(got["train"]) == 90 and got["vocab"] == sorted(set(text))
    np.testing.assert_array_equal(got["valid"], got["test"])


# Errors


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(name="cifar9"),
        dict(name="digits", vocab_size=10),
        dict(name="wikitext2", vocab_size=1),
    ],
)
def test_bad_arguments(kwargs):
    one_line_error(ValueError, kwargs.get("vocab_size", "valid: digits"), **kwargs)


@pytest.mark.parametrize("name", ["wikitext2", "cifar100_subset"])
def test_not_fetchable(name, folder):
    words = (name, folder, "GCJAX_DATA", "--config.data_dir")
    files = data.FORMS[name][0].files
    one_line_error(FileNotFoundError, *words, *files, name=name, data_dir=folder)


def test_no_network(folder, monkeypatch):
    publish(monkeypatch, "cifar-10-python.tar.gz", b"")  # nobody listens on port 1
    one_line_error(
        FileNotFoundError,
        "cifar10.npz or cifar-10-python.tar.gz",
        "127.0.0.1",
        name="cifar10",
        data_dir=folder,
    )
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    "change, word",
    [
        (dict(y_test=None), "without array y_test"),
        (dict(x_test=np.zeros((4, 32, 32, 3))), "x_test is float64"),
        (dict(y_test=np.zeros(3, int)), "y_test is int64 (3,) for 4 images"),
    ],
)
def test_wrong_npz(change, word, folder):
    path = folder / "cifar10.npz"
    write_npz(path, (32, 32, 3), **change)
    one_line_error(ValueError, path, word, "delete", name="cifar10", data_dir=folder)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_damaged_npz(damage, folder):
    path = folder / "cifar10.npz"
    write_npz(path, (32, 32, 3))
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[1000] ^= 255
    path.write_bytes({"cut": content[:-500], "empty": b""}.get(damage, content))
    one_line_error(ValueError, path, "delete", name="cifar10", data_dir=folder)


def test_damaged_archives(folder):
    path = folder / "cifar-10-python.tar.gz"
    path.write_bytes(b"not the official archive")
    one_line_error(ValueError, path, "md5", name="cifar10", data_dir=folder)
    path = folder / "wikitext-2-v1.zip"
    path.write_bytes(b"not a zip file")
    one_line_error(ValueError, path, "BadZip", name="wikitext2", data_dir=folder)


def test_damaged_text_is_named(folder):
    write_texts(folder)
    (folder / "wikitext2/valid.txt").write_bytes(b"caf\xe9\n")
    one_line_error(ValueError, "valid.txt: ", name="wikitext2", data_dir=folder)


def test_pickle_that_calls_a_function_is_refused(folder, monkeypatch):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(folder / "evil"),)

    content, _, _ = cifar10_archive(lambda d: pickle.dumps(Evil(), 2))
    (folder / "cifar-10-python.tar.gz").write_bytes(content)
    publish(monkeypatch, "cifar-10-python.tar.gz", content)
    one_line_error(ValueError, "refused", name="cifar10", data_dir=folder)
    assert not (folder / "evil").exists()


# Fetching


def test_fetch(folder, server, monkeypatch):
    content, train, _ = cifar10_archive()
    file = "cifar-10-python.tar.gz"
    publish(monkeypatch, file, content, server("/good", content))
    got = data.load("cifar10", folder / "new")
    np.testing.assert_array_equal(got["x_train"], train)
    assert [p.name for p in (folder / "new").iterdir()] == [file]  # and no .part
    publish(monkeypatch, file, content, server("/gone", None))
    data.load("cifar10", folder / "new")  # from the folder, not fetched again


def test_fetch_into_subfolder(folder, server, monkeypatch):
    file = "tinyshakespeare/input.txt"
    publish(monkeypatch, file, b"abab", server("/input", b"abab"))
    assert data.load("tinyshakespeare", folder)["vocab"] == ["a", "b"]
    assert (folder / file).read_bytes() == b"abab"


def test_fetch_damaged(folder, server, monkeypatch):
    content, _, _ = cifar10_archive()
    url = server("/bad", content[:-1] + b"!")
    publish(monkeypatch, "cifar-10-python.tar.gz", content, url)
    one_line_error(ValueError, url, "md5", folder, name="cifar10", data_dir=folder)
    assert not list(folder.iterdir())


def test_fetch_404(folder, server, monkeypatch):
    url = server("/none", None)
    publish(monkeypatch, "cifar-10-python.tar.gz", b"", url)
    one_line_error(
        FileNotFoundError, url, "404", "cifar10.npz", name="cifar10", data_dir=folder
    )
    assert not list(folder.iterdir())


# Real files, where they are there


@pytest.mark.parametrize(
    "name, train, test",
    [("cifar10", 50_000, 10_000), ("wikitext2", 2_088_628, 245_569)],
)
def test_real_sizes(name, train, test):
    if not any((REAL / form.files[0]).is_file() for form in data.FORMS[name]):
        pytest.skip(f"no {name} in $GCJAX_DATA")
    got = data.load(name, REAL)
    key = "x_" if name in data.IMAGE_SETS else ""
    assert len(got[key + "train"]) == train and len(got[key + "test"]) == test
    if name == "wikitext2":
        assert len(got["valid"]) == 217_646 and len(got["vocab"]) == 33_278
