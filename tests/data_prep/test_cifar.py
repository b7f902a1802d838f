"""CIFAR in the published form, whole and broken, through the command to the prepared file."""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import subprocess
import sys
import tarfile
from collections import Counter
from types import FunctionType
from typing import ClassVar

import numpy as np
import pytest

from crowdexit.data.classes import ClassStore
from data_prep import cifar

NAMES = [b"airplane", b"automobile", b"bird", b"cat", b"deer", b"dog", b"frog", b"horse", b"ship", b"truck"]


class Python2Pickler(pickle._Pickler):
    """Writes what Python 2 and the NumPy of its time wrote, as the published files are: byte strings, old names."""

    dispatch: ClassVar[dict] = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value):
        data = value.encode() if isinstance(value, str) else value
        short = len(data) < 256
        head = pickle.SHORT_BINSTRING + bytes([len(data)]) if short else pickle.BINSTRING + struct.pack("<i", len(data))
        self.write(head + data)
        self.memoize(value)

    def save_global(self, value, name=None):
        module = "numpy.core.multiarray" if value.__name__ == "_reconstruct" else value.__module__
        self.write(f"c{module}\n{value.__name__}\n".encode())
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_bytes
    dispatch[FunctionType] = dispatch[type] = save_global


def pickled(content, pickler=Python2Pickler) -> bytes:
    file = io.BytesIO()
    pickler(file, protocol=2).dump(content)
    return file.getvalue()


def rows(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 3072), np.uint8)


def cifar_10(n: int = 20) -> dict[str, dict]:
    """What the files of a small CIFAR-10 hold: n images a batch, as many of each class in all together."""
    files = {"batches.meta": {b"num_cases_per_batch": n, b"label_names": NAMES, b"num_vis": 3072}}
    for number in range(1, 7):
        name = f"data_batch_{number}" if number < 6 else "test_batch"
        files[name] = {
            b"batch_label": f"training batch {number} of 5".encode(),
            b"labels": [(i + number) % 10 for i in range(n)],
            b"data": rows(n, number),
            b"filenames": [f"cat_s_{i:06d}.png".encode() for i in range(n)],
        }
    return files


def cifar_100(n: int = 60) -> dict[str, dict]:
    """The same of CIFAR-100, with six fine classes in three coarse ones."""
    files = {
        "meta": {
            b"fine_label_names": [b"apple", b"baby", b"bear", b"bed", b"bee", b"boy"],
            b"coarse_label_names": [b"food", b"people", b"animals"],
        }
    }
    for name, seed in (("train", 1), ("test", 2)):
        fine = [i % 6 for i in range(n)]
        files[name] = {
            b"filenames": [f"bear_s_{i:06d}.png".encode() for i in range(n)],
            b"batch_label": b"training batch 1 of 1",
            b"fine_labels": fine,
            b"coarse_labels": [[0, 1, 2, 0, 2, 1][label] for label in fine],
            b"data": rows(n, seed),
        }
    return files


def write(folder, files, pickler=Python2Pickler):
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else pickled(content, pickler))
    return folder


def archived(folder, path, mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        archive.add(folder, folder.name)
    return path


@pytest.fixture
def batches(tmp_path):
    return write(tmp_path / "cifar-10-batches-py", cifar_10())


def prepare(*arguments) -> int:
    return cifar.run(list(map(str, arguments)))


def error(capsys) -> str:
    """The one line that a refusal is."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "preparing" not in line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def test_the_files_of_these_tests_are_as_published(batches):
    """Protocol 2 and byte strings only, as in the true data_batch_1 (which begins so)."""
    data = (batches / "data_batch_1").read_bytes()
    assert data.startswith(b"\x80\x02}q\x00(U\x0bbatch_labelq\x01U\x15training batch 1 of 5q\x02U\x06labels")
    assert b"cnumpy.core.multiarray\n_reconstruct\n" in data
    assert not any("UNICODE" in opcode.name for opcode, _, _ in pickletools.genops(data))


def check_pixels(store: ClassStore, files: dict[str, dict]) -> None:
    """Every value where it belongs: a row is 1024 red, then green, then blue values, each line by line."""
    for split in store.splits():
        for index, id in enumerate(store.ids(split)):
            name, number = id.split("/")
            row = files[name][b"data"][int(number)]
            image = store.image(split, index)
            for channel in range(3):
                np.testing.assert_array_equal(image[..., channel].ravel(), row[1024 * channel : 1024 * (channel + 1)])


def test_cifar_10(batches, tmp_path, capsys):
    assert prepare(batches, tmp_path / "out" / "set.h5") == 0
    assert capsys.readouterr().out.splitlines() == [
        "set.h5: 120 images of 32×32, 10 classes",
        "  train     80 images, 8 a class",
        "  val       20 images, 2 a class",
        "  test      20 images, 2 a class",
    ]
    store, files = ClassStore(tmp_path / "out" / "set.h5"), cifar_10()
    assert store.classes == [name.decode() for name in NAMES]
    assert store.origin == "CIFAR-10 (Krizhevsky, 2009), python version"
    check_pixels(store, files)
    for split in store.splits():
        for id, label in zip(store.ids(split), store.labels(split), strict=True):
            name, number = id.split("/")
            assert label == files[name][b"labels"][int(number)]
    held_back, trained = set(store.ids("val")), set(store.ids("train"))
    assert not held_back & trained
    assert len(held_back | trained) == 100
    assert store.ids("test") == [f"test_batch/{i:05d}" for i in range(20)]
    # The same in every run: another draw would mix what was trained on with what was held back.
    assert store.ids("val")[:4] == [
        "data_batch_1/00005",
        "data_batch_1/00006",
        "data_batch_1/00013",
        "data_batch_1/00017",
    ]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["set.h5"]


def test_the_published_sizes_give_the_papers_split():
    """40,000 and 10,000, by the same draw that prepares the files."""
    for classes in (10, 100):
        labels = np.random.default_rng(0).permutation(np.repeat(np.arange(classes), 50000 // classes))
        val = cifar.stratified(labels, len(labels) // cifar.TRAIN_PER_VAL)
        assert val.sum() == 10000
        assert set(np.bincount(labels[val]).tolist()) == {10000 // classes}


@pytest.mark.parametrize("source", ["parent", "tar.gz", "tar", "python 3"])
def test_other_sources_give_the_same_file(batches, tmp_path, source):
    assert prepare(batches, tmp_path / "one.h5") == 0
    if source == "python 3":  # saved again: text through a codec, NumPy under its new name
        src = write(tmp_path / "again" / "cifar-10-batches-py", cifar_10(), pickle.Pickler)
        assert b"_codecs" in (src / "test_batch").read_bytes()
    else:
        src = archived(batches, tmp_path / "c.tar.gz", "w:gz" if source == "tar.gz" else "w")
        src = tmp_path if source == "parent" else src
    before = sorted(tmp_path.iterdir())
    assert prepare(src, tmp_path / "two.h5") == 0
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "two.h5"])  # nothing is extracted
    one, two = ClassStore(tmp_path / "one.h5"), ClassStore(tmp_path / "two.h5")
    for split in ("train", "val", "test"):
        assert one.ids(split) == two.ids(split)
        assert one.labels(split).tolist() == two.labels(split).tolist()
        for index in range(len(one.ids(split))):
            np.testing.assert_array_equal(one.image(split, index), two.image(split, index))


def test_cifar_100(tmp_path):
    folder, files = write(tmp_path / "cifar-100-python", cifar_100()), cifar_100()
    stores = {}
    for option, key in (("--fine", b"fine_labels"), ("--coarse", b"coarse_labels")):
        assert prepare(folder, tmp_path / f"{option}.h5", option) == 0
        store = stores[option] = ClassStore(tmp_path / f"{option}.h5")
        check_pixels(store, files)
        for split in store.splits():
            for id, label in zip(store.ids(split), store.labels(split), strict=True):
                name, number = id.split("/")
                assert label == files[name][key][int(number)]
    assert stores["--fine"].classes == ["apple", "baby", "bear", "bed", "bee", "boy"]
    assert stores["--coarse"].classes == ["food", "people", "animals"]
    assert "coarse classes" in stores["--coarse"].origin
    # One split for both, balanced by fine classes.
    assert stores["--fine"].ids("val") == stores["--coarse"].ids("val")
    assert Counter(stores["--fine"].labels("val").tolist()) == dict.fromkeys(range(6), 2)
    assert prepare(folder, tmp_path / "default.h5") == 0
    assert ClassStore(tmp_path / "default.h5").classes == stores["--fine"].classes


def stack(*parts: bytes) -> bytes:
    """A batch whose labels are whatever these opcodes leave on the stack."""
    return b"\x80\x02}q\x00(U\x06labels" + b"".join(parts) + b"u."


NUMPY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
MALICIOUS = {
    "os.system": (stack(b"cposix\nsystem\nU\x11touch RAN-ON-READ\x85R"), "'posix' 'system'"),
    "eval": (stack(b"c__builtin__\neval\nU\x18open('RAN-ON-READ', 'w')\x85R"), "'__builtin__' 'eval'"),
    "by instance": (stack(b"(U\x11touch RAN-ON-READios\nsystem\n"), "'os' 'system'"),
    "a dotted name": (stack(b"cnumpy\nndarray.__class__\n"), "'numpy' 'ndarray.__class__'"),
    "numpy's load": (stack(b"cnumpy\nload\nU\x01x\x85R"), "'numpy' 'load'"),
    "protocol 4": (
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x11touch RAN-ON-READ\x85R.",
        "'os' 'system'",
    ),
    "terminal codes": (stack(b"cos\n\x1b[2Jsystem\n"), r"'os' '\x1b[2Jsystem'"),
    # Bytes that NumPy itself would take for pointers: an object dtype that denies being one.
    "pointers": (
        stack(
            NUMPY,
            b"(K\x01K\x01K\x01\x86cnumpy\ndtype\nU\x01OK\x00K\x01\x87R",
            b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08AAAAAAAAtb",
        ),
        "not of type uint8",
    ),
    "an array as large as one likes": (stack(b"cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85\x85R"), "otherwise than arrays"),
    "a list as an array": (
        stack(NUMPY, b"(K\x01K\x01\x85cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R\x89]tb"),
        "not two-dimensional uint8",
    ),
    "another codec": (stack(b"c_codecs\nencode\nX\x01\x00\x00\x00aU\x03bz2\x86R"), "encoded otherwise"),
    "a changed function": (stack(b"c_codecs\nencode\n}U\x01aK\x01sb"), "change a function"),
    "memory": (b"\x80\x02}r\xff\xff\xff\x7f.", "beyond its own length"),
}


@pytest.mark.parametrize("case", MALICIOUS)
@pytest.mark.parametrize("name", ["batches.meta", "data_batch_3", "test_batch"])
def test_a_malicious_pickle_is_refused_and_does_not_run(batches, tmp_path, capsys, monkeypatch, case, name):
    monkeypatch.chdir(tmp_path)
    content, reason = MALICIOUS[case]
    (batches / name).write_bytes(content)
    assert prepare(batches, "set.h5") == 2
    line = error(capsys)
    assert line.startswith(f"error: {name} is refused: ")
    assert reason in line
    assert [p.name for p in tmp_path.iterdir()] == [batches.name]


def test_the_malicious_pickles_would_run(tmp_path, monkeypatch):
    """That the test above tests something: the plain unpickler runs them."""
    monkeypatch.chdir(tmp_path)
    for case in ("os.system", "eval", "by instance", "protocol 4"):
        pickle.loads(MALICIOUS[case][0], encoding="bytes")
        (tmp_path / "RAN-ON-READ").unlink()


def changed(**changes) -> dict:
    return {**cifar_10()["data_batch_3"], **{key.encode(): value for key, value in changes.items()}}


BROKEN = {
    "empty": (b"", "damaged, cut short"),
    "half": (pickled(changed())[:30000], "damaged, cut short"),
    "no pickle": (b"PNG" * 100, "damaged, cut short"),
    "a list": (pickled([1, 2]), "holds no dictionary"),
    "no images": (pickled({b"labels": []}), "holds no images"),
    "none at all": (pickled(changed(data=rows(0, 0), labels=[])), "holds no images"),
    "other images": (pickled(changed(data=rows(20, 0)[:, :784].copy())), "holds no images"),
    "three dimensions": (pickled(changed(data=rows(20, 0).reshape(20, 3, 1024))), "not two-dimensional"),
    "floats": (pickled(changed(data=rows(20, 0).astype(np.float32))), "not of type uint8"),
    "a row too few": (pickled(changed(data=rows(19, 0))), "19 images and 20 labels"),
    "a label too few": (pickled(changed(labels=[0] * 19)), "20 images and 19 labels"),
    "no labels": (pickled(changed(labels=b"cat")), "holds no labels 'labels'"),
    "odd labels": (pickled(changed(labels=[0] * 19 + [10**30])), "holds no labels 'labels'"),
    "labels below": (pickled(changed(labels=[0] * 19 + [-1])), "holds no labels 'labels'"),
    "labels above": (pickled(changed(labels=[0] * 19 + [10])), "10 classes"),
    "an array cut short": (pickled(changed()).replace(b"K\x14M\x00\x0c\x86", b"K\x15M\x00\x0c\x86"), "damaged"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_batch_is_one_line(batches, tmp_path, capsys, case):
    content, reason = BROKEN[case]
    assert content != pickled(changed())
    (batches / "data_batch_3").write_bytes(content)
    assert prepare(batches, tmp_path / "set.h5") == 2
    assert reason in error(capsys)
    assert [p.name for p in tmp_path.iterdir()] == [batches.name]


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (None, "batches.meta holds no 'label_names'"),
        ([1, 2], "batches.meta holds no 'label_names'"),
        ([b"cat"], "at least two different class names"),
        ([b"cat"] * 10, "at least two different class names"),
        ([b"cat", b"dog"], "2 classes"),
    ],
)
def test_broken_names_are_one_line(batches, tmp_path, capsys, names, reason):
    (batches / "batches.meta").write_bytes(pickled({b"label_names": names}))
    assert prepare(batches, tmp_path / "set.h5") == 2
    assert reason in error(capsys)
    assert [p.name for p in tmp_path.iterdir()] == [batches.name]


def test_a_missing_file_is_named(batches, tmp_path, capsys):
    (batches / "data_batch_3").unlink()
    (batches / "test_batch").unlink()
    for src in (batches, archived(batches, tmp_path / "c.tar.gz")):
        assert prepare(src, tmp_path / "set.h5") == 2
        assert error(capsys).endswith("CIFAR-10 without its data_batch_3 and test_batch")


def test_an_absurd_size_is_refused_unread(batches, tmp_path, capsys):
    with (batches / "data_batch_3").open("wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    assert prepare(batches, tmp_path / "set.h5") == 2
    assert "data_batch_3 has 1,099,511,627,776 bytes" in error(capsys)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_an_archive_cut_short(batches, tmp_path, capsys, keep):
    whole = archived(batches, tmp_path / "c.tar.gz")
    data = whole.read_bytes()
    whole.write_bytes(data[: int(keep * len(data))])
    assert prepare(whole, tmp_path / "set.h5") == 2
    assert "damaged, cut short or no tar archive" in error(capsys)
    assert not (tmp_path / "set.h5").exists()


def test_a_damaged_archive(batches, tmp_path, capsys):
    whole = archived(batches, tmp_path / "c.tar.gz")
    data = bytearray(whole.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 2000] = bytes(2000)
    whole.write_bytes(data)
    assert prepare(whole, tmp_path / "set.h5") == 2
    error(capsys)
    assert not (tmp_path / "set.h5").exists()


def test_links_in_an_archive_are_not_followed(batches, tmp_path, capsys):
    (tmp_path / "secret").write_bytes((batches / "data_batch_3").read_bytes())
    (batches / "data_batch_3").unlink()
    (batches / "data_batch_3").symlink_to(tmp_path / "secret")
    assert prepare(archived(batches, tmp_path / "c.tar.gz"), tmp_path / "set.h5") == 2
    assert error(capsys).endswith("without its data_batch_3")


@pytest.mark.parametrize("as_archive", [False, True])
def test_both_at_once(batches, tmp_path, capsys, as_archive):
    write(tmp_path / "cifar-100-python", cifar_100())
    src = tmp_path
    if as_archive:
        src = tmp_path / "both.tar"
        with tarfile.open(src, "w") as archive:
            for folder in ("cifar-100-python", batches.name):
                archive.add(tmp_path / folder / ("meta" if "100" in folder else "batches.meta"), f"{folder}/x")
                for file in sorted((tmp_path / folder).iterdir())[:2]:
                    archive.add(file, f"{folder}/{file.name}")
    assert prepare(src, tmp_path / "set.h5") == 2
    assert "holds both" in error(capsys)


def test_ctrl_c_leaves_nothing(batches, tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cifar, "read_labels", stop)
    assert prepare(batches, tmp_path / "set.h5") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted; nothing was written"
    assert [p.name for p in tmp_path.iterdir()] == [batches.name]


def test_a_file_that_is_there_stays_until_the_new_one_is_whole(batches, tmp_path):
    (tmp_path / "set.h5").write_bytes(b"old")
    (batches / "test_batch").write_bytes(pickled(changed(labels=[77] * 20)))  # found only while writing
    assert prepare(batches, tmp_path / "set.h5") == 2
    assert (tmp_path / "set.h5").read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == [batches.name, "set.h5"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["nowhere", "set.h5"],
        [".", "set.h5"],
        [],
        ["text", "set.h5"],
        ["c.tar", "c.tar"],
        ["cifar-10-batches-py", "folder"],
        ["cifar-10-batches-py", "text/set.h5"],
        ["cifar-10-batches-py", "set.h5", "--coarse"],
        ["cifar-10-batches-py", "set.h5", "--what"],
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("no archive")
    if "." not in arguments:
        archived(write(tmp_path / "cifar-10-batches-py", cifar_10()), tmp_path / "c.tar")
    assert prepare(*arguments) == 2
    error(capsys)
    assert not (tmp_path / "set.h5").exists()


def test_through_the_true_command(batches, tmp_path):
    command = [sys.executable, "-m", "data_prep.cifar", batches, tmp_path / "set.h5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("set.h5: 120 images")


def test_help_has_an_example(capsys):
    assert prepare("--help") == 0
    assert "Example: crowdexit prepare cifar" in capsys.readouterr().out
