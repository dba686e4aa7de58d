"""A network of the user's own is imported by name, and what it does not keep is said at start, in one line."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import final_state, start, train

from ddpm_dist.build import build_model, check_names, check_own_network
from ddpm_dist.config import load_config
from ddpm_dist.errors import ConfigError, DataError
from ddpm_dist.loading import load_run

NETWORK = """\
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, channels, width, num_classes, out_channels):
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.labels = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.last = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x, t, labels=None):
        h = self.first(x) + torch.sin(t / 100)[:, None, None, None]
        if self.labels is not None:
            h = h + self.labels(labels)[:, :, None, None]
        return self.last(h.relu())


def build(model, image_shape, num_classes, out_channels):
    width = dict(word.split("=") for word in model.options).get("width", model.channels)
    return Net(image_shape[0], int(width), num_classes, out_channels)
"""
NUMBERS = itertools.count()


class TwoImages:
    """A set of images, as far as the check looks at it."""

    shape = (1, 8, 8)
    num_classes = 0

    def conditions(self, indices: Any) -> dict[str, Any]:
        return {"labels": torch.tensor([0, self.num_classes])} if self.num_classes else {}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path of Python."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def write(place: Path, text: str) -> str:
    """A module of a new name, since Python imports each name once. Returns its name."""
    name = f"net{next(NUMBERS)}"
    (place / f"{name}.py").write_text(text)
    return name


def check(name: str, *overrides: str, num_classes: int = 0, weights: Any = None) -> None:
    """What happens at the start of a run."""
    config = load_config(None, [f"model.name={name}", *overrides])
    check_names(config)
    images: Any = TwoImages()
    images.num_classes = num_classes
    check_own_network(config, images, torch.device("cpu"), weights)


@pytest.mark.parametrize("num_classes", [0, 3])
def test_a_network_that_keeps_its_promises_is_accepted_and_draws_nothing(place: Path, num_classes: int) -> None:
    name = write(place, NETWORK)
    before = torch.get_rng_state()
    check(f"{name}:build", "model.options=[width=5]", num_classes=num_classes)
    assert torch.equal(torch.get_rng_state(), before)
    config = load_config(None, [f"model.name={name}:build", "model.options=[width=5]"])
    built = build_model(config, (1, 8, 8), num_classes, torch.device("cpu"), channels_last=False)
    assert built.first.weight.shape == (5, 1, 3, 3)  # type: ignore[union-attr]


FORWARD = "expected forward(x, t) -> [B, out_channels, H, W]"
CHANGES = [
    ("return Net(", "return Net(3, ", "build fails with TypeError: ", ".py, line 21)"),
    ("    return Net", "    return None and Net", "build returns a NoneType; expected a Module", ""),
    ("def build(model, ", "def build(", "must take (model, image_shape, num_classes, out_channels) (", ")"),
    ("def forward(self, x, t, labels=None)", "def forward(self, x)", "does not take what it is given", FORWARD),
    ("torch.sin(t", "torch.sine(t", "its forward fails with AttributeError: ", f".py, line 13); {FORWARD}"),
    ("self.last(h.relu())", "h", "its forward returns torch.float32 [2, 64, 8, 8]; expected floating point ", "8, 8]"),
    ("self.last(h.relu())", "[h]", "its forward returns list; expected floating point [2, 1, 8, 8]", ""),
    ("self.last(h.relu())", "self.last(h.relu()).int()", "its forward returns torch.int32 [2, 1, 8, 8]; expected", ""),
    ("self.last(h.relu())", "h[:, :1]", "the weight last.weight gets no gradient, nor do 1 others; every", ""),
    ("self.last(h.relu())", "self.last(h.relu()).detach()", "the weight first.weight gets no gradient, nor do 3 ", ""),
    ("(channels, width, 3, padding=1)", "(channels, width, 3, padding=1).requires_grad_(False)", "requires_grad=F", ""),
    ("(h.relu())", "(nn.functional.batch_norm(h, self.mean, self.var, training=True))", "the buffer mean", "GroupNorm"),
    ("nn.Embedding(num_classes + 1, width) if num_classes else None", "nn.Parameter(torch.tensor(next(SEED)))",
     "labels is not the same when the network is built twice after torch.manual_seed(0)", "alike"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "says", "ends"), CHANGES, ids=[new for _, new, _, _ in CHANGES])
def test_a_broken_promise_is_one_line_that_says_which(place: Path, old: str, new: str, says: str, ends: str) -> None:
    text = NETWORK.replace(old, new, 1) + "\n\nSEED = iter(torch.rand(9).tolist())\n"
    buffers = "".join(f"        self.register_buffer('{each}', torch.ones(width))\n" for each in ("mean", "var"))
    text = text.replace("__init__()\n", f"__init__()\n{buffers}") if "self.mean" in new else text
    name = write(place, text)
    with pytest.raises(ConfigError) as caught:
        check(f"{name}:build")
    message = str(caught.value)
    assert message.startswith(f"model.name={name}:build: ")
    assert says in message
    assert message.endswith(ends)
    assert "\n" not in message


def test_labels_that_the_network_does_not_take_are_one_line(place: Path) -> None:
    name = write(place, NETWORK.replace(", labels=None", "").replace("self.labels(labels)", "self.labels(0 * t)"))
    check(f"{name}:build")
    with pytest.raises(ConfigError, match=r"unexpected keyword argument 'labels'\); expected forward\(x, t, labels\)"):
        check(f"{name}:build", num_classes=3)


def test_what_cannot_be_imported_is_one_line(place: Path) -> None:
    name = write(place, NETWORK)
    broken = write(place, "import torch\n\ndef build(:\n")
    failing = write(place, "def build(model): ...\n\n1 / 0\n")
    incomplete = write(place, "import no_such_package\n")
    for given, says in (
        ("no_such:build", "there is no module 'no_such'; Python looks in "),
        (f"{name}.inner:build", f"there is no module '{name}.inner'; Python looks in "),
        (f"{name}:biuld", f"has no function 'biuld'; did you mean {name}:build?"),
        (f"{name}:NUMBER", "has no function 'NUMBER'"),
        (f"{name}:", "expected package.module:function, like mynets.small:build"),
        (f"{place}/{name}.py:build", "expected package.module:function, like mynets.small:build"),
        (f"{broken}:build", f"importing {broken} fails with SyntaxError: invalid syntax ({place}/{broken}.py, line 3)"),
        (f"{failing}:build", f"ZeroDivisionError: division by zero ({place}/{failing}.py, line 3)"),
        (f"{incomplete}:build", "ModuleNotFoundError: No module named 'no_such_package' ("),
    ):
        with pytest.raises(ConfigError) as caught:
            check(given)
        assert str(caught.value).startswith(f"model.name={given}: ")
        assert says in str(caught.value)


def test_gradient_checkpointing_needs_the_method_of_that_name(place: Path) -> None:
    config = load_config(None, [f"model.name={write(place, NETWORK)}:build", "train.gradient_checkpointing=true"])
    with pytest.raises(ConfigError, match=r"has no method enable_gradient_checkpointing\(\)"):
        build_model(config, (1, 8, 8), 0, torch.device("cpu"), channels_last=False)


@pytest.mark.slow
def test_a_run_is_resumed_with_the_code_of_step_0_or_not_at_all(place: Path) -> None:
    name = write(place, NETWORK)
    options = (f"model.name={name}:build", "elastic.mode=bitwise", "checkpoint.every=2")
    run = train(2, place, *options, "train.max_steps=4")
    assert set(final_state(run)["model"]) == {"first.weight", "first.bias", "last.weight", "last.bias"}
    network = load_run(run).network
    assert torch.equal(network.state_dict()["first.weight"], final_state(run)["ema"]["first.weight"])
    (place / f"{name}.py").write_text(NETWORK.replace("t / 100", "t / 99"))
    with start(1, place, *options, "train.max_steps=6") as job:
        assert job.wait() == [78]
        assert "on this machine the run cannot go on with the same bits: gradient of a test batch" in job.output()
    (place / f"{name}.py").write_text(NETWORK.replace("int(width)", "int(width) + 1"))
    with start(1, place, *options, "train.max_steps=6") as job:
        assert job.wait() == [65]
        assert "(first.weight: [8, 1, 3, 3] -> [9, 1, 3, 3]); use the code of step 0" in job.output()
    (place / f"{name}.py").unlink()
    with start(2, place, *options, "train.max_steps=6") as job:
        assert job.wait() == [78, 78]
        assert job.output().count(f"error: model.name={name}:build: there is no module {name!r}; Python looks in ") == 1


def test_sampling_says_that_the_module_is_not_there_or_has_changed(place: Path) -> None:
    name = write(place, NETWORK)
    run = train(1, place, f"model.name={name}:build", "train.max_steps=2")
    (place / f"{name}.py").write_text(NETWORK.replace("self.last = ", "self.final = self.last = "))
    sys.modules.pop(name, None)
    with pytest.raises(DataError, match=r"final.weight: not there -> \[1, 8, 3, 3\]"):
        load_run(run)
    (place / f"{name}.py").unlink()
    sys.modules.pop(name, None)
    with pytest.raises(DataError, match=f"step 2 cannot be used here: model.name={name}:build: there is no module"):
        load_run(run)
