"""Each label is that of its image, from the files to the batch; a share of them is hidden, the same for any ranks."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image
from test_batches import BATCH_SIZE, NUM_SHARDS, Numbered, equal, make, numbers, shards_of
from test_datasets import idx_bytes, make_cifar10, random_pixels, refused
from torch import Tensor

from ddpm_dist.config import DataConfig
from ddpm_dist.data.batches import Batch, join
from ddpm_dist.data.datasets import CLASS_NAMES, DATASETS, IDX_FILES, IDX_LABELS, DataSet, load, missing_files, prepare
from ddpm_dist.data.in_memory import ImagesInMemory
from ddpm_dist.data.labels import DIGITS, LabelledImages, Labels, read_idx_labels

LABELS = np.array([3, 9, 0, 0, 7, 1], dtype=np.uint8)


def label_bytes(labels: np.ndarray, magic: int = 0x801) -> bytes:
    return struct.pack(">2i", magic, len(labels)) + labels.tobytes()


def all_labels(data: DataConfig, **options: Any) -> list[int]:
    images = load(data, labels=True, **options)
    return images.conditions(range(len(images)))["labels"].tolist()


# The files of a set


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_labels_of_an_idx_set_are_those_of_its_file(tmp_path: Path, name: Any) -> None:
    for file, content in (
        (IDX_FILES[name], idx_bytes(random_pixels(6, 28, 28))),
        (IDX_LABELS[name], label_bytes(LABELS)),
    ):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(content)
    data = DataConfig(name=name, root=str(tmp_path), batch_size=4, download=False)
    prepare(data, labels=True)
    images, plain = load(data, labels=True), load(data)
    assert (images.num_classes, images.class_names) == (10, CLASS_NAMES[name])
    labels = images.conditions([5, 1, 1])["labels"]
    assert (labels.dtype, labels.tolist()) == (torch.int64, [1, 9, 9])
    assert torch.equal(images.fetch([2, 0]), plain.fetch([2, 0]))
    assert (plain.num_classes, plain.class_names, plain.conditions([0])) == (0, (), {})
    file = tmp_path / IDX_LABELS[name]
    file.write_bytes(label_bytes(LABELS[::-1]))
    assert load(data, labels=True).fingerprint != images.fingerprint
    file.write_bytes(label_bytes(np.append(LABELS, 0).astype(np.uint8)))
    refused(lambda: load(data, labels=True), file, "7 labels", "6 images")


def test_labels_that_are_missing_are_refused_and_nothing_else_needs_them(tmp_path: Path) -> None:
    path = tmp_path / IDX_FILES["mnist"]
    path.parent.mkdir(parents=True)
    path.write_bytes(idx_bytes(random_pixels(6, 28, 28)))
    data = DataConfig(name="mnist", root=str(tmp_path), batch_size=4, download=False)
    prepare(data)
    load(data)
    assert missing_files(data) == []
    assert missing_files(data, labels=True) == [tmp_path / IDX_LABELS["mnist"]]
    refused(lambda: prepare(data, labels=True), tmp_path / IDX_LABELS["mnist"], "data.download=true")
    refused(lambda: load(data, labels=True), tmp_path / IDX_LABELS["mnist"], "model.class_labels=false")


@pytest.mark.parametrize(
    ("content", "mentions"),
    [
        (b"", "not an IDX file of labels"),
        (label_bytes(LABELS)[:7], "not an IDX file of labels"),
        (label_bytes(LABELS, magic=0x803), "not an IDX file of labels"),
        (label_bytes(LABELS[:0]), "not an IDX file of labels"),
        (label_bytes(LABELS)[:-1], "13 bytes, expected 14"),
        (label_bytes(LABELS) + b"\0", "15 bytes, expected 14"),
        (label_bytes(LABELS + 1), "has the label 10, expected 0 to 9"),
    ],
    ids=["empty", "7 bytes", "images", "no labels", "too short", "too long", "eleven classes"],
)
def test_file_that_is_no_whole_idx_file_of_labels_is_refused(tmp_path: Path, content: bytes, mentions: str) -> None:
    path = tmp_path / "labels"
    path.write_bytes(content)
    refused(lambda: read_idx_labels(path, DIGITS), path, mentions)


def test_names_of_the_clothes_are_torchvisions() -> None:
    assert list(CLASS_NAMES["fashion-mnist"]) == torchvision.datasets.FashionMNIST.classes
    assert [name[0] for name in torchvision.datasets.MNIST.classes] == list(CLASS_NAMES["mnist"])


def test_digits_of_mnist5k_look_like_the_others_of_their_label() -> None:
    data = DataConfig(name="mnist5k", image_size=16)
    labels, images = torch.tensor(all_labels(data)), load(data).fetch(range(5000)).flatten(1).float()
    assert torch.bincount(labels).tolist() == [500] * 10
    means = torch.stack([images[labels == digit].mean(0) for digit in range(10)])
    assert (torch.cdist(images, means).argmin(1) == labels).double().mean() > 0.75


def test_labels_of_cifar10_are_those_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_cifar10(tmp_path, monkeypatch)
    data = DataConfig(name="cifar10", root=str(tmp_path), batch_size=5)
    assert all_labels(data) == [0, 1, 2] * 5
    assert load(data, labels=True).class_names == tuple(map(str, range(10)))


# Folders


def picture(path: Path, red: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (red, 0, 0)).save(path)


def test_label_of_a_picture_is_the_first_sub_folder_in_which_it_lies(tmp_path: Path) -> None:
    places = {"zebra/1.png": 10, "ape/b/deep/2.png": 20, "ape/a/3.png": 30, "bear/zebra/4.png": 40}
    for place, red in places.items():
        picture(tmp_path / place, red)
    data = DataConfig(name="folder", root=str(tmp_path), image_size=8, batch_size=1)
    images = load(data, labels=True)
    assert (images.num_classes, images.class_names) == (3, ("ape", "bear", "zebra"))
    found = dict(zip(images.fetch(range(4))[:, 0, 0, 0].tolist(), all_labels(data), strict=True))
    assert found == {10: 2, 20: 0, 30: 0, 40: 1}


def test_folder_without_classes_is_refused_with_labels_alone(tmp_path: Path) -> None:
    data = DataConfig(name="folder", root=str(tmp_path), image_size=8, batch_size=1)
    picture(tmp_path / "train" / "ape" / "1.png", 1)
    refused(lambda: load(data, labels=True), tmp_path, "one sub-folder, train,", f"data.root={tmp_path / 'train'}")
    picture(tmp_path / "2.png", 1)
    refused(lambda: load(data, labels=True), tmp_path, "2.png lies in no sub-folder", "model.class_labels=false")
    assert len(load(data)) == 2


def test_set_that_has_no_labels_is_refused_with_those_that_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS, "plain", DataSet(lambda data, channels: ImagesInMemory(random_pixels(4, 1, 4, 4))))
    data = DataConfig(name="plain", batch_size=1)  # type: ignore[arg-type]
    refused(lambda: load(data, labels=True), "model.class_labels=true", "data.name=plain", "mnist, fashion-mnist")


# Batches


class Parity(Numbered):
    """The label of an image is its number modulo 10."""

    num_classes = 10

    def conditions(self, indices: Sequence[int]) -> dict[str, Tensor]:
        return {"labels": torch.tensor(indices) % 10}


def hidden(batch: Batch) -> Tensor:
    return batch.cond["labels"] == 10


@pytest.mark.parametrize("world_size", [2, 8])
def test_labels_stay_with_their_images_and_are_hidden_alike_on_any_number_of_ranks(world_size: int) -> None:
    given: Any = {"flip": True, "images": Parity(), "label_dropout": 0.3}
    alone = make(**given)
    ranks = [make(shards_of(rank, world_size), **given) for rank in range(world_size)]
    for step in (0, 5, 6, 100):
        batch = alone[step]
        assert equal(join([batches[step] for batches in ranks]), batch)
        labels = torch.tensor(numbers(batch)) % 10
        assert torch.equal(batch.cond["labels"][~hidden(batch)], labels[~hidden(batch)])
    images = Parity()
    assert images.conditions(range(3))["labels"].tolist() == [0, 1, 2], "the set itself is not changed"


def test_labels_belong_to_resized_images_in_a_batch() -> None:
    images = load(DataConfig(name="mnist5k", image_size=8), labels=True)
    batch = make(images=images, flip=False)[3]
    indices = [index for shard in range(NUM_SHARDS) for index in make(images=images).indices(3, shard)]
    assert batch.cond["labels"].tolist() == [index // 500 for index in indices], "mnist5k is sorted by digit"
    assert torch.equal(batch.images, images.fetch(indices))


def test_hiding_labels_changes_nothing_else_and_hides_the_share_that_is_asked_for() -> None:
    plain, dropped = (make(images=Parity(), flip=True, label_dropout=share) for share in (0.0, 0.2))
    steps = range(200)
    for step in steps[:3]:
        ours, theirs = plain[step], dropped[step]
        assert equal(ours, theirs._replace(cond=ours.cond))
        assert not hidden(ours).any()
    masks = torch.stack([hidden(dropped[step]) for step in steps]).double()
    count = masks.numel()
    assert abs(masks.mean() - 0.2) < 4 * (0.2 * 0.8 / count) ** 0.5
    by_shard = masks.view(len(steps), NUM_SHARDS, -1)
    for one, other in ((by_shard[:, 0], by_shard[:, 1]), (masks[:-1], masks[1:])):  # of two shards, of two steps
        together = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]
        assert abs(together) < 0.2, "drawn anew for each shard and step"
    assert torch.equal(hidden(dropped[7]), hidden(make(images=Parity(), label_dropout=0.2)[7])), "and never otherwise"
    assert not torch.equal(masks[7], hidden(make(images=Parity(), seed=1, label_dropout=0.2)[7]).double())


def test_a_condition_of_another_name_is_never_hidden() -> None:
    class Weather(Numbered):
        num_classes = 2

        def conditions(self, indices: Sequence[int]) -> dict[str, Tensor]:
            return {"weather": torch.tensor(indices) % 2}

    batch = make(images=Weather(), label_dropout=0.9)[0]
    assert batch.cond["weather"].tolist() == [number % 2 for number in numbers(batch)]
    assert len(numbers(batch)) == BATCH_SIZE


def test_more_labels_than_images_are_refused() -> None:
    images = ImagesInMemory(random_pixels(3, 1, 4, 4))
    refused(
        lambda: LabelledImages(images, Labels(torch.zeros(4), ("a",)), "labels.idx"), "labels.idx", "4 labels for 3"
    )


def test_data_without_its_labels_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []
    monkeypatch.setattr("ddpm_dist.data.datasets.download_once", lambda name, root: fetched.append(name))
    path = tmp_path / IDX_FILES["mnist"]
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    data = replace(DataConfig(), root=str(tmp_path))
    prepare(data)
    assert fetched == []
    prepare(data, labels=True)
    assert fetched == ["mnist"]
