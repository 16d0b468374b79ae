"""Parquet in the hub's schema: what was written comes back; what is wrong is said in one line."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import dynanet.data.parquet as loader
from dynanet.core.errors import DataError
from dynanet.data.parquet import load_parquet
from tests.data.make_files import GARBAGE, noise, parquet, png, pyarrow, write_parquet

CLASSES = ["ant", "bee", "cat"]
SHARED = Path(os.environ.get("DYNANET_DATA", Path(__file__).parents[3] / "shared" / "data")) / "cifar10"


def files(count, seed=0):
    return [png(image) for image in noise(count, seed=seed)]


def pixels(count, seed=0):
    return torch.from_numpy(noise(count, seed=seed)).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    "name",
    ["train-00000-of-00001.parquet", "data/train-00000-of-00001.parquet", "plain_text/train/0000.parquet"]
    + ["my-set_train.parquet", "training.parquet", "everything.parquet"],
)
def test_the_hubs_ways_to_name_a_split(tmp_path, name):
    write_parquet(tmp_path / name, files(6), [0, 1, 2] * 2, classes=CLASSES)
    test = name.replace("train", "test").replace("everything", "test")
    write_parquet(tmp_path / test, files(2, seed=1), [2, 0], classes=CLASSES)
    train, test = load_parquet(tmp_path), load_parquet(tmp_path, "test")
    assert torch.equal(train.to_memory().images, pixels(6)) and train.labels.tolist() == [0, 1, 2] * 2
    assert torch.equal(test.to_memory().images, pixels(2, seed=1)) and test.labels.tolist() == [2, 0]
    assert train.classes == ("ant", "bee", "cat")


def test_shards_and_row_groups_in_order(tmp_path):
    for shard in range(3):
        write_parquet(tmp_path / f"val-0000{shard}-of-00003.parquet", files(7, seed=shard), [shard] * 7, group=3)
    data = load_parquet(tmp_path, "validation")
    assert torch.equal(data.to_memory().images, torch.cat([pixels(7, seed=shard) for shard in range(3)]))
    assert data.labels.tolist() == [0] * 7 + [1] * 7 + [2] * 7
    assert data.name(15).endswith("val-00002-of-00003.parquet row 1")
    torch.testing.assert_close(data[20][0], pixels(7, seed=2)[6] / 255)


def test_one_file_and_other_columns(tmp_path):
    path = tmp_path / "train.parquet"
    write_parquet(path, files(3), [0, 1, 1], image="picture", label="fine_label", classes=["x", "y"])
    data = load_parquet(path, image="picture", label="fine_label", classes=["x", "y"])
    assert data.labels.tolist() == [0, 1, 1] and data.classes == ("x", "y")
    with pytest.raises(DataError, match="no column image or img; it has picture, fine_label"):
        load_parquet(path, label="fine_label")


def test_plain_bytes_and_files_without_names_of_classes(tmp_path):
    table = pyarrow.table({"img": files(3), "label": pyarrow.array([0, 4, 1], pyarrow.uint8())})
    parquet.write_table(table, tmp_path / "train.parquet")
    data = load_parquet(tmp_path, classes=6)
    assert torch.equal(data.to_memory().images, pixels(3)) and data.classes == tuple("012345")


def test_only_the_newest_row_groups_are_kept(tmp_path, monkeypatch):
    write_parquet(tmp_path / "train.parquet", files(40), [0] * 40, group=2)
    data = load_parquet(tmp_path)
    monkeypatch.setattr(loader, "KEPT_BYTES", 1000)
    for row in (0, 39, 7, 0, 21):
        torch.testing.assert_close(data[row][0], pixels(40)[row] / 255)
        assert 1 <= len(data._source._kept) <= 5
    assert len(pickle.dumps(data)) < 20_000  # the kept images stay here


def test_workers_read_it(tmp_path):
    write_parquet(tmp_path / "train.parquet", files(12), [0, 1, 2] * 4)
    data = load_parquet(tmp_path)
    data[0]  # something is kept when the workers start
    images = torch.cat([images for images, _ in DataLoader(data, 3, num_workers=2)])
    torch.testing.assert_close(images, pixels(12) / 255)


def test_corrupt_rows_are_named(tmp_path):
    content = files(300)
    content[5], content[6] = GARBAGE, None
    write_parquet(tmp_path / "train.parquet", content, [0, 1, 2] * 100, group=50)
    loaded = load_parquet(tmp_path).to_memory()
    assert len(loaded) == 298
    assert list(loaded.corrupt) == [f"{tmp_path / 'train.parquet'} row 5", f"{tmp_path / 'train.parquet'} row 6"]
    write_parquet(tmp_path / "test.parquet", [None] * 20, [0] * 20)
    with pytest.raises(DataError, match="1 of 20 images found corrupt.*row 0 .the row has no bytes"):
        load_parquet(tmp_path, "test")[0]


def refused(match, *arguments, **options):
    with pytest.raises(DataError, match=match) as caught:
        load_parquet(*arguments, **options)
    assert "\n" not in str(caught.value)


def test_wrong_places(tmp_path):
    refused("cannot read .*absent", tmp_path / "absent")
    refused("write hf://datasets/owner/name", "owner/name")
    refused("has no parquet files", tmp_path)
    write_parquet(tmp_path / "a" / "train.parquet", files(2), [0, 1], classes=CLASSES)
    refused("no split 'test'; its files are a/train.parquet", tmp_path, "test")
    refused("3 classes .*expected 10", tmp_path, classes=10)
    write_parquet(tmp_path / "b" / "train.parquet", files(2), [0, 1])
    refused("several folders .*: a, b; give one", tmp_path)
    write_parquet(tmp_path / "c" / "train-00000-of-00002.parquet", files(2), [0, 1])
    refused("has 1 files and their names say 2", tmp_path / "c")


def test_wrong_columns(tmp_path):
    def written(name, **columns):
        parquet.write_table(pyarrow.table(columns), tmp_path / f"{name}.parquet")
        return tmp_path / f"{name}.parquet"

    path = tmp_path / "train.parquet"
    write_parquet(path, files(2), [0, 1])
    refused("no column 'fine_label'; it has image, label", path, label="fine_label")
    refused("no column 'img'; it has image, label", path, image="img")
    refused("string; expected integer", written("words", image=files(2), label=["a", "b"]))
    refused("int64; expected a struct", written("numbers", image=[1, 2], label=[0, 1]))
    refused("lacks 1 labels", written("holes", image=files(2), label=pyarrow.array([0, None])))
    refused("2 of 2 rows have a negative label", written("hidden", image=files(2), label=[-1, -1]))
    refused("has no rows", written("none", image=pyarrow.array([], pyarrow.binary()), label=pyarrow.array([], "int64")))
    write_parquet(tmp_path / "over.parquet", files(2), [0, 3], classes=CLASSES)
    refused("label 3 in data of 3 classes", tmp_path / "over.parquet")


def test_damaged_files(tmp_path):
    path = tmp_path / "train.parquet"
    path.write_bytes(b"this is no parquet file")
    refused("train.parquet cannot be read as parquet", tmp_path)
    path.write_bytes(b"")
    refused("train.parquet cannot be read as parquet", tmp_path)
    write_parquet(path, files(8), [0] * 8, group=8)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused("train.parquet cannot be read as parquet", tmp_path)
    write_parquet(path, files(8), [0] * 8, group=8)
    data = load_parquet(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read as parquet"):  # not taken for eight corrupt images
        data.to_memory()


def test_metadata_that_says_nothing_useful_is_passed_over(tmp_path):
    for written in (b"no json", b"{}", b'{"info": {"features": {"label": {"names": []}}}}', b"[1]"):
        table = pyarrow.table({"image": files(2), "label": [0, 1]})
        parquet.write_table(table.replace_schema_metadata({"huggingface": written}), tmp_path / "train.parquet")
        assert load_parquet(tmp_path).classes == ("0", "1")


def test_the_hub_is_asked_for_one_split(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    write_parquet(tmp_path / "plain" / "test-00000-of-00001.parquet", files(2), [0, 1])
    asked = {}

    def download(repo, **options):
        asked.update(repo=repo, **options)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    data = load_parquet("hf://datasets/owner/name@v1/plain", "test")
    assert len(data) == 2
    assert (asked["repo"], asked["repo_type"], asked["revision"]) == ("owner/name", "dataset", "v1")
    assert "plain*test*.parquet" in asked["allow_patterns"]

    def unreachable(repo, **options):
        raise hub.errors.LocalEntryNotFoundError("no\nnetwork")

    monkeypatch.setattr(hub, "snapshot_download", unreachable)
    refused("cannot fetch hf://datasets/owner/name from the hub .*no network", "hf://datasets/owner/name")
    refused("does not name a dataset", "hf://datasets/owner")


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no CIFAR-10 at {SHARED}")
def test_the_real_cifar10():
    train, test = load_parquet(SHARED, classes=10), load_parquet(SHARED, "test", classes=10)
    assert train.labels.bincount().tolist() == [5000] * 10 and test.labels.bincount().tolist() == [1000] * 10
    loaded = test.part(torch.arange(500)).to_memory()
    assert loaded.images.shape == (500, 3, 32, 32) and not loaded.corrupt
    torch.testing.assert_close(train[49_999][0].shape, torch.Size([3, 32, 32]))
