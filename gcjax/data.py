"""Real data sets as NumPy arrays: from a local folder, else from the official address.

`load` looks for the files of a data set in `data_dir`, in the folder that the
environment variable GCJAX_DATA names, and in ~/.cache/gcjax, in this order. What lies
in none of them is fetched into the first one and checked against the published
checksum. The data set "digits" comes with scikit-learn and needs no file.

Plain files (`*.npz`, of images with the arrays x_train, y_train, x_test, y_test;
`*.txt`; `*.json`) are taken as they are; official archives (`*.gz`) must have the
published checksum.
"""

import gzip
import hashlib
import http.client
import json
import os
import pickle
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from tqdm import tqdm

Paths = dict[str, Path]  # of the files of a data set, by their names in `FORMS`


class Source(NamedTuple):
    """Where a file is published."""

    url: str
    md5: str  # 32 hexadecimal digits


class Form(NamedTuple):
    """One form in which a data set may lie in a folder."""

    files: tuple[str, ...]  # relative to the data folder; all are needed
    read: Callable[[Paths], dict[str, Any]]


# Official addresses, by file name in the data folder. WikiText-2 has none any more that
# is reliable and comes with a checksum, and the subset of CIFAR-100 never had one.
_PUBLISHED = {
    "https://www.cs.toronto.edu/~kriz/": {
        "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
        "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
    },
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/": {
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    },
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/": {
        "tinyshakespeare/input.txt": "6fb458f1232090904fb40fe944165e91",
    },
}
DOWNLOADS: dict[str, Source] = {
    file: Source(address + file, md5)
    for address, files in _PUBLISHED.items()
    for file, md5 in files.items()
}

IMAGE_SETS = ("digits", "fashion_mnist", "cifar10", "cifar100", "cifar100_subset")
TEXT_SETS = ("wikitext2", "tinyshakespeare", "shakespeare_roles")
SENSOR_SETS = ("wisdm",)


def load(
    name: str,
    data_dir: str | os.PathLike | None = None,
    vocab_size: int | None = None,
) -> dict[str, Any]:
    """Loads a data set.

    Args:
      name: "digits" (8x8 handwritten digits, 1,437 + 360), "fashion_mnist", "cifar10",
        "cifar100", "cifar100_subset" (any part of CIFAR-100 as one .npz file),
        "wikitext2" (words), "tinyshakespeare" (characters), "shakespeare_roles" (the
        same by speaking role), or "wisdm" (motion of a phone, by user).
      data_dir: Folder looked into first; None or "" stands for the other places.
      vocab_size: For "wikitext2": the `vocab_size` - 1 most frequent training words
        are kept, all others become "<unk>"; None keeps all 33,278. A number above that
        keeps all, too.

    Returns:
      Image sets: x_train uint8 [n, h, w, c] in 0..255, y_train int32 [n], x_test and
      y_test likewise. Text sets: train, valid and test int32 [n], indices into vocab,
      a list of strings. In "wikitext2" each line ends with the word "<eos>". In
      "tinyshakespeare" the last tenth of the text is both valid and test.
      "shakespeare_roles": train, valid and test are lists of such texts, one for each
      role, the last tenth of its lines' characters both valid and test; roles, a list
      of strings "play/ROLE". "wisdm": x_train float32 [n, 43], of which missing values
      are NaN, y_train int32 [n], users_train int32 [n], x_test and so on likewise;
      every sixth user is a test user.

    Raises:
      ValueError: Unknown name, bad vocab_size, or a damaged file.
      FileNotFoundError: Not found and not fetched; says what to put where.

    References:
      Alpaydin and Kaynak, 1998, Optical Recognition of Handwritten Digits, UCI.
      Xiao, Rasul and Vollgraf, 2017, Fashion-MNIST, arXiv:1708.07747.
      Krizhevsky, 2009, Learning Multiple Layers of Features from Tiny Images.
      Merity et al., 2016, Pointer Sentinel Mixture Models, arXiv:1609.07843.
      Karpathy, 2015, char-rnn (github.com/karpathy/char-rnn).
      Caldas et al., 2018, LEAF, arXiv:1812.01097 (roles as clients; the plays here are
        of another edition, and without its filters).
      Kwapisz, Weiss and Moore, 2010, Activity Recognition using Cell Phone
        Accelerometers (WISDM).
    """
    if name not in IMAGE_SETS + TEXT_SETS + SENSOR_SETS:
        valid = ", ".join(IMAGE_SETS + TEXT_SETS + SENSOR_SETS)
        raise ValueError(f"unknown data set {name!r}; valid: {valid}")
    if vocab_size is not None and (name != "wikitext2" or vocab_size < 2):
        raise ValueError(
            "vocab_size must be at least 2 and is for wikitext2 only, got "
            f"{vocab_size} for {name}"
        )
    if name == "digits":
        return _digits()
    content = _read(name, _folders(data_dir))
    if name == "wikitext2":
        return _index_words(content, vocab_size)
    if name == "shakespeare_roles":
        return _index_roles(content)
    return _index_characters(content["input"]) if name == "tinyshakespeare" else content


def _digits() -> dict[str, np.ndarray]:
    """Splits scikit-learn's digits: every fifth of each class is a test image.

    Both parts share the writers, so this is easier than the split by writers of the
    UCI repository.
    """
    from sklearn.datasets import load_digits  # here, as the import takes a second

    digits = load_digits()
    x = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    y = digits.target
    is_test = np.zeros(len(y), bool)
    is_test[np.argsort(y, kind="stable")[::5]] = True  # no generator: never changes
    return _image_set(x[~is_test], y[~is_test], x[is_test], y[is_test])


# Finding and fetching


def _folders(data_dir: str | os.PathLike | None) -> list[Path]:
    """Gives the folders to look into, best first."""
    places = (data_dir, os.environ.get("GCJAX_DATA"), "~/.cache/gcjax")
    return [Path(place).expanduser() for place in places if place]


def _read(name: str, folders: list[Path]) -> dict[str, Any]:
    """Reads a data set from the first folder that has it, else fetches it."""
    for folder in folders:
        for form in FORMS[name]:  # plain files before archives
            paths = {file: folder / file for file in form.files}
            if all(path.is_file() for path in paths.values()):
                return _parse(form, paths)
    form = FORMS[name][-1]  # the official form stands last
    if not set(form.files) <= set(DOWNLOADS):
        raise FileNotFoundError(_advice(name, folders, "no address to fetch it from"))
    paths = {file: folders[0] / file for file in form.files}
    for file, path in paths.items():
        if path.is_file():
            continue
        try:
            _download(DOWNLOADS[file], path)
        except (OSError, http.client.HTTPException) as error:
            reason = f"fetching {DOWNLOADS[file].url} failed: {_one_line(error)}"
            raise FileNotFoundError(_advice(name, folders, reason)) from error
    return _parse(form, paths)


def _advice(name: str, folders: list[Path], reason: str) -> str:
    """Says in one line what was looked for, and what to put where."""
    files = " or ".join(" + ".join(form.files) for form in FORMS[name])
    places = ", ".join(map(str, folders))
    return (
        f"data set {name} not found in {places} ({reason}): put {files} into one of "
        "these folders, or name another folder by GCJAX_DATA or --config.data_dir"
    )


def _download(source: Source, path: Path) -> None:
    """Fetches a file under a temporary name, checks it, then renames it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with _open(source.url) as response, _create(partial) as file:
            size = int(response.headers.get("Content-Length") or 0) or None
            with tqdm(  # disable=None: no bar where nobody watches
                total=size, desc=path.name, unit="B", unit_scale=True, disable=None
            ) as bar:
                while block := response.read(1 << 16):
                    file.write(block)
                    bar.update(len(block))
        if (found := _md5(partial)) != source.md5:
            raise ValueError(
                f"{source.url} gave a damaged {path.name} (md5 {found}, not "
                f"{source.md5}): try again, or put the file into {path.parent}"
            )
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _create(path: Path) -> IO[bytes]:
    """Opens a new file for writing, with the folders that it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return open(path, "wb")


def _open(url: str) -> Any:
    """Opens an address for reading."""
    try:
        return urllib.request.urlopen(url, timeout=30)
    except urllib.error.HTTPError as error:
        error.close()  # it holds the connection open
        raise OSError(f"HTTP status {error.code}") from error


def _md5(path: Path) -> str:
    """Computes the checksum of a file, 32 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _one_line(error: BaseException) -> str:
    """Describes an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


# Reading


def _parse(form: Form, paths: Paths) -> dict[str, Any]:
    """Reads files; an error names the file and says what to do about it."""
    for file, path in paths.items():
        # Plain text stays unchecked here, so that an edited text may be used.
        if file in DOWNLOADS and file.endswith(".gz"):
            if (found := _md5(path)) != DOWNLOADS[file].md5:
                reason = f"md5 {found}, not {DOWNLOADS[file].md5}"
                raise ValueError(f"{path} is damaged ({reason}): {_REMEDY}")
    try:
        return form.read(paths)
    except MemoryError:
        raise
    except Exception as error:  # a broken archive fails in many ways
        names, reason = ", ".join(map(str, paths.values())), _one_line(error)
        raise ValueError(f"cannot read {names} ({reason}): {_REMEDY}") from error


_REMEDY = "delete it or put an intact copy there"


def _read_npz(paths: Paths) -> dict[str, np.ndarray]:
    """Reads an .npz file with the four arrays of an image set."""
    (path,) = paths.values()
    names = ("x_train", "y_train", "x_test", "y_test")
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
        if missing := [name for name in names if name not in arrays]:
            raise ValueError(f"without array {', '.join(missing)}")
        return _image_set(*(arrays[name] for name in names))


def _image_set(x_train, y_train, x_test, y_test) -> dict[str, np.ndarray]:
    """Checks the arrays of an image set; adds a channel axis to grey images."""
    content = {}
    for part, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
        if x.dtype != np.uint8 or x.ndim not in (3, 4):
            raise ValueError(f"x_{part} is {x.dtype} {x.shape}, not uint8 [n, h, w, c]")
        if y.shape != x.shape[:1] or y.dtype.kind not in "iu":
            raise ValueError(f"y_{part} is {y.dtype} {y.shape} for {len(x)} images")
        content[f"x_{part}"] = x if x.ndim == 4 else x[..., None]
        content[f"y_{part}"] = y.astype(np.int32)
    return content


def _read_idx(paths: Paths) -> dict[str, np.ndarray]:
    """Reads the four gzip-packed IDX files of Fashion-MNIST."""
    arrays = []
    for path in paths.values():
        data = gzip.decompress(path.read_bytes())
        shape = np.frombuffer(data, ">u4", count=data[3], offset=4)
        arrays.append(np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)))
        arrays[-1] = arrays[-1].reshape(shape).copy()  # a buffer's view is read-only
    return _image_set(*arrays)


def _read_cifar(labels: bytes, members: list[str]) -> Callable:
    """Makes the reader of an official CIFAR archive.

    Args:
      labels: Key of the class labels.
      members: Names of the pickles in the archive, the one with the test images last.
    """

    def read(paths: Paths) -> dict[str, np.ndarray]:
        (path,) = paths.values()
        with tarfile.open(path) as archive:
            parts = [_ArrayUnpickler.read(archive.extractfile(m)) for m in members]
        planes = [part[b"data"].reshape(-1, 3, 32, 32) for part in parts]
        x = [np.ascontiguousarray(p.transpose(0, 2, 3, 1)) for p in planes]
        y = [np.asarray(part[labels]) for part in parts]
        return _image_set(*map(np.concatenate, (x[:-1], y[:-1], x[-1:], y[-1:])))

    return read


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles arrays, bytes, text, numbers, lists and dicts, and nothing else.

    A pickle can call any function it names, so the names are a closed list.
    """

    _reconstruct = np.zeros(0).__reduce__()[0]
    _allowed = {
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): str.encode,  # how old protocols store bytes
    }

    def find_class(self, module: str, name: str) -> Any:
        """Looks a name up in the closed list."""
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is refused")
        return self._allowed[module, name]

    @classmethod
    def read(cls, file: IO[bytes]) -> Any:
        """Reads one pickle written by Python 2 or 3; Python 2's text becomes bytes."""
        return cls(file, encoding="bytes").load()


def _read_text(paths: Paths) -> dict[str, str]:
    """Reads UTF-8 text files; the keys are their names without folder and suffix."""
    texts = {}
    for path in paths.values():
        try:
            texts[path.stem] = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path.name}: {error}") from error
    return texts


def _read_roles(paths: Paths) -> dict[str, str]:
    """Reads a JSON object of texts, by role."""
    (path,) = paths.values()
    texts = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(texts, dict) or not all(
        isinstance(text, str) and text for text in texts.values()
    ):
        raise ValueError("not an object of texts by role")
    return texts


def _read_wisdm(paths: Paths) -> dict[str, np.ndarray]:
    """Reads the features, labels and users of WISDM; holds out every sixth user."""
    (path,) = paths.values()
    with np.load(path, allow_pickle=False) as arrays:
        x, y, users = (arrays[name] for name in ("features", "labels", "users"))
    if x.ndim != 2 or y.shape != x.shape[:1] or users.shape != y.shape:
        raise ValueError(f"arrays of shapes {x.shape}, {y.shape} and {users.shape}")
    content = {}
    for part, kept in (("train", users % 6 != 0), ("test", users % 6 == 0)):
        content[f"x_{part}"] = x[kept].astype(np.float32)
        content[f"y_{part}"] = y[kept].astype(np.int32)
        content[f"users_{part}"] = users[kept].astype(np.int32)
    return content


def _read_wikitext_zip(paths: Paths) -> dict[str, str]:
    """Reads the official archive of WikiText-2."""
    (path,) = paths.values()
    with zipfile.ZipFile(path) as archive:
        return {
            part: archive.read(f"wikitext-2/wiki.{part}.tokens").decode("utf-8")
            for part in ("train", "valid", "test")
        }


_CIFAR10 = [f"cifar-10-batches-py/data_batch_{i}" for i in range(1, 6)]
_CIFAR10 += ["cifar-10-batches-py/test_batch"]
_CIFAR100 = ["cifar-100-python/train", "cifar-100-python/test"]
FORMS: dict[str, tuple[Form, ...]] = {
    "fashion_mnist": (
        Form(("fashion_mnist.npz",), _read_npz),
        Form(tuple(file for file in DOWNLOADS if "idx" in file), _read_idx),
    ),
    "cifar10": (
        Form(("cifar10.npz",), _read_npz),
        Form(("cifar-10-python.tar.gz",), _read_cifar(b"labels", _CIFAR10)),
    ),
    "cifar100": (
        Form(("cifar100.npz",), _read_npz),
        Form(("cifar-100-python.tar.gz",), _read_cifar(b"fine_labels", _CIFAR100)),
    ),
    "cifar100_subset": (Form(("cifar100_subset.npz",), _read_npz),),
    "wikitext2": (
        Form(
            tuple(f"wikitext2/{part}.txt" for part in ("train", "valid", "test")),
            _read_text,
        ),
        Form(("wikitext-2-v1.zip",), _read_wikitext_zip),
    ),
    "tinyshakespeare": (Form(("tinyshakespeare/input.txt",), _read_text),),
    "shakespeare_roles": (Form(("shakespeare_roles/by_role.json",), _read_roles),),
    "wisdm": (Form(("wisdm/wisdm.npz",), _read_wisdm),),
}


# Text to numbers


def _index_words(texts: dict[str, str], vocab_size: int | None) -> dict[str, Any]:
    """Splits texts on blanks, adds <eos> at line ends, and numbers the words."""
    words = {}
    for part, text in texts.items():
        closed = text if text.endswith("\n") or not text else text + "\n"
        words[part] = closed.replace("\n", " <eos> ").split()
    counts = Counter(words["train"])
    # Most frequent first, ties by the alphabet: the same numbers on every machine.
    vocab = sorted(counts, key=lambda word: (-counts[word], word))
    if vocab_size is None:
        unseen = set(words["valid"]) | set(words["test"])
        vocab += sorted(unseen - set(vocab))
    else:
        vocab = [word for word in vocab if word != "<unk>"][: vocab_size - 1]
        vocab = ["<unk>", *vocab]
    index = {word: i for i, word in enumerate(vocab)}
    unknown = index.get("<unk>")  # is looked up only where it has become vocab[0]
    tokens = {
        part: np.fromiter((index.get(w, unknown) for w in some), np.int32, len(some))
        for part, some in words.items()
    }
    return {**tokens, "vocab": vocab}


def _index_characters(text: str) -> dict[str, Any]:
    """Numbers characters; the first 90 % are for training."""
    characters = np.frombuffer(text.encode("utf-32-le"), "<u4")
    codes, tokens = np.unique(characters, return_inverse=True)
    tokens, cut = tokens.astype(np.int32), len(tokens) * 9 // 10
    vocab = [chr(code) for code in codes]
    held_out = tokens[cut:]
    return {"train": tokens[:cut], "valid": held_out, "test": held_out, "vocab": vocab}


def _index_roles(texts: dict[str, str]) -> dict[str, Any]:
    """Numbers the characters of all roles alike; of each 90 % are for training."""
    joined = _index_characters("".join(texts.values()))
    tokens = np.concatenate([joined["train"], joined["test"]])
    ends = np.cumsum([len(text) for text in texts.values()])
    roles = np.split(tokens, ends[:-1])
    held_out = [role[len(role) * 9 // 10 :] for role in roles]
    return {
        "train": [role[: len(role) * 9 // 10] for role in roles],
        "valid": held_out,
        "test": held_out,
        "roles": list(texts),
        "vocab": joined["vocab"],
    }
