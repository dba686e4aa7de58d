"""What is configured is what was meant: precedence, types, refusals that name the answer; YAML runs no code."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import time
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from ddpm_dist.config import (
    Config,
    DataConfig,
    changes,
    check_world_size,
    describe_keys,
    from_flat,
    keys,
    load_config,
    loader_workers,
    to_flat,
    to_yaml,
)
from ddpm_dist.config.declaration import key
from ddpm_dist.config.flat import Key
from ddpm_dist.config.values import convert, given_in
from ddpm_dist.errors import ConfigError, ExitCode

ROOT = Path(__file__).parent.parent
TRICKY = ("no", "on", "1e-4", "null", "~", "0x10", "a: b", "# x", "- a", "é", "'", '"', "2026-01-01", "1:30", "{", "*a")


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def from_text(tmp_path: Path, text: str, *overrides: str) -> Config:
    return load_config(write(tmp_path, text), overrides)


def refusal(*overrides: str, file: Path | None = None, seconds: float = 5.0) -> str:
    """The one line that refuses a config, quickly."""
    start = time.process_time()  # other processes may keep the machine busy
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides)
    assert time.process_time() - start < seconds
    assert caught.value.exit_code == ExitCode.CONFIG
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    assert len(message) < 2000
    return message


# Precedence


def test_the_file_beats_the_defaults_and_the_command_line_beats_the_file(tmp_path: Path) -> None:
    config = from_text(tmp_path, "optim: {lr: 1e-3}\nema: {decay: 0.9}\n", "optim.lr=1e-2")
    assert (config.optim.lr, config.ema.decay, config.data.batch_size) == (1e-2, 0.9, 128)


def test_the_last_override_of_a_key_wins() -> None:
    assert load_config(overrides=["optim.lr=1", "ema.decay=0.5", "optim.lr=3", "optim.lr=2"]).optim.lr == 2


def test_an_override_may_set_a_key_back_to_null(tmp_path: Path) -> None:
    assert from_text(tmp_path, "optim: {grad_clip: 1.0}", "optim.grad_clip=null").optim.grad_clip is None


def test_a_value_may_hold_equals_signs() -> None:
    assert load_config(overrides=["tracking.uri=http://host/?a=b=c"]).tracking.uri == "http://host/?a=b=c"


@pytest.mark.parametrize("text", ["", "# nothing\n", "optim:\n", "optim:\n  # lr: 1\n", "optim: null\n", "{}"])
def test_an_empty_file_or_section_means_the_defaults(tmp_path: Path, text: str) -> None:
    assert from_text(tmp_path, text) == load_config() == Config()


# Round trip


def some_value(random_: random.Random, wanted: Any, bounds: typing.Mapping[str, Any]) -> Any:
    """Any valid value of a type."""
    if isinstance(wanted, types.UnionType):
        if random_.random() < 0.3:
            return None
        (inner,) = (arg for arg in typing.get_args(wanted) if arg is not type(None))
        value = some_value(random_, inner, bounds)
        return "x" if value in ("null", "~") else value
    if typing.get_origin(wanted) is Literal:
        return random_.choice(typing.get_args(wanted))
    if typing.get_origin(wanted) is tuple:
        inner = typing.get_args(wanted)[0]
        return tuple(some_value(random_, inner, bounds) for _ in range(random_.randrange(4)))
    if wanted is bool:
        return random_.random() < 0.5
    if wanted is str:
        return random_.choice(TRICKY)
    if wanted is int:
        return int(bounds["minimum"] or 0) + random_.randrange(10 ** random_.randrange(1, 8))
    return 10.0 ** random_.uniform(-30, -1e-3)  # within (0, 1), mostly in e-notation


# Their values depend on each other: see the cross-key rules below.
TIED = {
    "run.name",
    "run.root",
    "data.root",
    "data.batch_size",
    "data.name",
    "data.image_size",
    "model.channels",
    "model.time_embed_dim",
    "model.options",
    "diffusion.num_timesteps",
    "diffusion.zero_terminal_snr",
    "diffusion.beta_start",
    "diffusion.beta_end",
    "optim.schedule",
    "optim.weight_decay",
    "ema.widths",
    "init.run",
    "init.weights",
    "preview.steps",
    "preview.weights",
    "preview.guidance",
    "preview.guidance_interval",
    "elastic.mode",
    "elastic.shards",
}


def test_a_tilde_is_the_home_folder_where_a_folder_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    config = load_config(overrides=["run.root=~/runs", "data.root=~", "tracking.experiment=~"])
    assert (config.run.root, config.data.root) == ("/home/someone/runs", "/home/someone")
    assert config.tracking.experiment == "~"


@pytest.mark.parametrize("seed", range(30))
def test_any_config_comes_back_from_its_yaml(tmp_path: Path, seed: int) -> None:
    random_ = random.Random(seed)
    values = {
        name: some_value(random_, item.type, item.field.metadata) for name, item in keys().items() if name not in TIED
    }
    values["run.root"], values["data.root"] = "/no", "1e-4"  # `~` is the home folder here
    values["run.name"] = random_.choice(["no", "1e-4", "null", "0x10", "2026-01-01", "true", "12", "1.5", "a=b"])
    config = from_flat(values)
    assert from_text(tmp_path, to_yaml(config)) == config
    assert from_flat(to_flat(config)) == config


def test_the_resolved_config_names_every_key(tmp_path: Path) -> None:
    assert from_text(tmp_path, to_yaml(Config())) == Config()
    for name in keys():
        assert f"  {name.split('.')[1]}:" in to_yaml(Config())
        assert f"  {name}=" in describe_keys()


# Types


def test_text_is_converted_by_the_declared_type_of_its_key(tmp_path: Path) -> None:
    config = from_text(tmp_path, "run: {name: no, root: 1e-4}\noptim: {lr: 1e-4, fused: no}\ntrain: {compile: no}\n")
    assert (config.run.name, config.run.root) == ("no", "1e-4")
    assert config.optim.lr == 1e-4
    assert isinstance(config.optim.lr, float)
    assert config.optim.fused is False
    assert config.train.compile == "false"


@pytest.mark.parametrize("text", ["1e-3", "0.001", ".001", "1E-3", "1.0e-03"])
def test_numbers_may_be_written_in_any_way(tmp_path: Path, text: str) -> None:
    assert from_text(tmp_path, f"optim: {{lr: {text}}}").optim.lr == 0.001
    assert load_config(overrides=[f"optim.lr={text}"]).optim.lr == 0.001


@pytest.mark.parametrize(("text", "value"), [("yes", True), ("On", True), ("1", True), ("FALSE", False), ("0", False)])
def test_booleans_may_be_written_in_any_way(text: str, value: bool) -> None:
    assert load_config(overrides=[f"data.flip={text}"]).data.flip is value


@pytest.mark.parametrize("text", ["null", "~", "", "None"])
def test_null_may_be_written_in_any_way(tmp_path: Path, text: str) -> None:
    assert from_text(tmp_path, f"train: {{max_steps: {text}}}", "train.threads=" + text) == Config()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("optim.lr", "fast", "a number"),
        ("optim.lr", "nan", "finite"),
        ("optim.lr", "inf", "finite"),
        ("optim.lr", "0", "above 0"),
        ("data.batch_size", "many", "a whole number"),
        ("data.batch_size", "8.5", "a whole number"),
        ("data.batch_size", "1e2", "a whole number"),
        ("data.batch_size", "-8", "at least 1"),
        ("data.flip", "maybe", "true or false"),
        ("data.flip", "2", "true or false"),
        ("data.name", "imagenet", "mnist, fashion-mnist, cifar10, mnist5k, folder"),
        ("train.compile", "maybe", "auto, true, false"),
        ("train.max_steps", "0", "at least 1 or null"),
        ("optim.grad_clip", "much", "a number or null"),
        ("ema.decay", "1", "below 1"),
        ("model.dropout", "-0.1", "at least 0"),
        ("checkpoint.keep_last", "1", "at least 2"),
        ("tracking.experiment", "", "text"),
    ],
)
def test_wrong_value_is_refused_with_key_value_and_expectation(
    tmp_path: Path, name: str, value: str, expected: str
) -> None:
    section, key = name.split(".")
    file = write(tmp_path, f"# a comment\n{section}:\n  {key}: '{value}'\n")
    for message, place in (
        (refusal(f"{name}={value}"), "command line"),
        (refusal(file=file), f"{file}:3"),
    ):
        assert message.startswith(f"{place}: {name}={value}: expected ")
        assert expected in message


def test_a_list_or_mapping_where_a_value_belongs_is_refused(tmp_path: Path) -> None:
    for value in ("[1, 2]", "{a: 1}"):
        assert "optim.lr" in refusal(file=write(tmp_path, f"optim: {{lr: {value}}}"))


@pytest.mark.parametrize("text", ["optim: 3", "optim: [lr]", "- optim", "optim", "3"])
def test_a_file_of_another_shape_is_refused_with_its_line(tmp_path: Path, text: str) -> None:
    file = write(tmp_path, text)
    assert f"{file}:1: " in refusal(file=file)


@pytest.mark.parametrize("text", ['run: {name: "a\\nb"}', 'optim: {lr: "1\\n2"}', 'optim: {"l\\nr": 1}'])
def test_a_line_break_in_a_value_does_not_break_the_message(tmp_path: Path, text: str) -> None:
    refusal(file=write(tmp_path, text))  # which asserts one line


# Lists


def listed(tmp_path: Path, declared: Any, text: str, **bounds: float) -> Any:
    """What a key of that type is set to by a text on the command line, and by the same text in a file."""
    item = Key("a.b", declared, key((), "", **bounds))  # type: ignore[arg-type]
    document: Any = yaml.compose(f"a: {{b: {text}}}", Loader=yaml.SafeLoader)
    node = document.value[0][1].value[0][1]
    in_file = convert(item, given_in(node, "a.b", is_list=True), "file")
    assert in_file == convert(item, text, "command line")
    return in_file


@pytest.mark.parametrize(
    ("declared", "text", "value"),
    [
        (tuple[int, ...], "[128,256]", (128, 256)),
        (tuple[int, ...], "[ 128 , 256 ]", (128, 256)),
        (tuple[int, ...], "[7]", (7,)),
        (tuple[int, ...], "[]", ()),
        (tuple[float, ...], "[1e-4, .5]", (1e-4, 0.5)),
        (tuple[str, ...], "[no, 1e-4, null, 'a, b', \"[\"]", ("no", "1e-4", "null", "a, b", "[")),
        (tuple[int, ...] | None, "[1]", (1,)),
        (tuple[int, ...] | None, "null", None),
    ],
)
def test_a_list_is_written_the_same_way_in_a_file_and_on_the_command_line(
    tmp_path: Path, declared: Any, text: str, value: Any
) -> None:
    assert listed(tmp_path, declared, text) == value


@pytest.mark.parametrize(
    ("declared", "text", "words"),
    [
        (tuple[int, ...], "128", "a.b=128: expected a list of whole numbers, like [128, 256]"),
        (tuple[int, ...], "1,2", "a.b=1,2: expected a list of whole numbers, like [128, 256]"),
        (tuple[int, ...], "[1, 2", "a.b=[1, 2: expected a list of whole numbers, like [128, 256]"),
        (tuple[int, ...], "[1, [2]]", "a.b=[1, [2]]: expected a list of whole numbers, like [128, 256]"),
        (tuple[int, ...], "[!!python/name:os.system x]", "expected a list of whole numbers, like [128, 256]"),
        (tuple[int, ...], "[" * 1000, "expected a list of whole numbers, like [128, 256]"),
        (tuple[int, ...] | None, "{a: 1}", "a.b={a: 1}: expected a list of whole numbers, like [128, 256] or null"),
        (tuple[float, ...], "0.9", "a.b=0.9: expected a list of numbers, like [0.9, 0.99]"),
        (tuple[str, ...], "up", "a.b=up: expected a list of words, like [a, b]"),
        (tuple[int, ...], "[1, x]", "a.b=[1, x]: element 2 is 'x'; expected a whole number"),
        (tuple[int, ...], "[1e3]", "a.b=[1e3]: element 1 is '1e3'; expected a whole number in digits, like 1000,"),
        (tuple[int, ...], "[4, 0]", "a.b=[4, 0]: element 2 is '0'; expected a whole number of at least 1"),
        (tuple[float, ...], "[2, inf]", "a.b=[2, inf]: element 2 is 'inf'; expected a finite number"),
        (tuple[str, ...], "[a, '']", "a.b=[a, '']: element 2 is ''; expected some text"),
    ],
)
def test_a_wrong_list_is_refused_with_key_value_and_element(
    tmp_path: Path, declared: Any, text: str, words: str
) -> None:
    item = Key("a.b", declared, key((), "", minimum=1 if declared == tuple[int, ...] else None))
    with pytest.raises(ConfigError) as caught:
        convert(item, text, "command line")
    assert str(caught.value).startswith("command line: ")
    assert words in str(caught.value)


def test_a_list_that_the_shell_has_torn_apart_is_put_together_in_the_message() -> None:
    message = refusal("unet2d.block_out_channels=[1,", "2,", "3]")
    assert message.endswith(
        "'unet2d.block_out_channels=[1, 2, 3]': the shell tears a list apart at its blanks; "
        "write unet2d.block_out_channels=[1,2,3]"
    )


UNET2D = (
    "model.name=unet2d",
    "unet2d.block_out_channels=[32, 64]",
    "unet2d.down_block_types=[DownBlock2D, AttnDownBlock2D]",
    "unet2d.up_block_types=[AttnUpBlock2D, UpBlock2D]",
)


def test_a_config_with_lists_comes_back_from_its_yaml_and_from_plain_json(tmp_path: Path) -> None:
    config = load_config(overrides=UNET2D)
    assert config.unet2d.block_out_channels == (32, 64)
    assert "  block_out_channels: [32, 64]\n" in to_yaml(config)
    assert from_text(tmp_path, to_yaml(config)) == config
    flat = json.loads(json.dumps(to_flat(config)))
    assert flat == to_flat(config)
    assert from_flat(flat) == config
    wider = load_config(overrides=[*UNET2D, "unet2d.block_out_channels=[64, 64]"])
    assert changes(config, wider) == (["unet2d.block_out_channels: [32, 64] -> [64, 64]"], [])


def test_a_list_in_a_file_may_have_one_line_for_each_element(tmp_path: Path) -> None:
    config = from_text(tmp_path, "unet2d:\n  block_out_channels:\n  - 32\n  - 64\n", *UNET2D[2:], UNET2D[0])
    assert config == load_config(overrides=UNET2D)


# Unknown names


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("optm.lr", "optim.lr"),
        ("optim.rl", "optim.lr"),
        ("lr", "optim.lr"),
        ("batch_size", "data.batch_size"),
        ("data.batchsize", "data.batch_size"),
        ("training.max_steps", "train.max_steps"),
        ("diffusion.timesteps", "diffusion.num_timesteps"),
    ],
)
def test_unknown_key_is_refused_with_the_nearest_one(given: str, nearest: str) -> None:
    message = refusal(f"{given}=1")
    assert f"unknown key {given!r}" in message
    assert f"did you mean {nearest!r}?" in message


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("optm", "optim"),
        ("trian", "train"),
        ("diffussion", "diffusion"),
        ("checkpoints", "checkpoint"),
        ("dat", "data"),
    ],
)
def test_unknown_section_is_refused_with_the_nearest_one(tmp_path: Path, given: str, nearest: str) -> None:
    file = write(tmp_path, f"ema: {{decay: 0.9}}\n{given}: {{x: 1}}\n")
    message = refusal(file=file)
    assert f"{file}:2: unknown section {given!r}" in message
    assert f"did you mean '{nearest}" in message


def test_a_name_like_nothing_points_to_the_list_of_keys(tmp_path: Path) -> None:
    assert "--help-config" in refusal("qqqq.zzzz=1")
    assert "--help-config" in refusal(file=write(tmp_path, "qqqq: {zzzz: 1}"))


def test_an_override_without_a_value_is_refused_with_an_example() -> None:
    message = refusal("optim.lr")
    assert "'optim.lr'" in message
    assert "optim.lr=1e-4" in message


# Files that are wrong or hostile


def test_a_key_given_twice_in_a_section_is_refused_with_both_lines(tmp_path: Path) -> None:
    file = write(tmp_path, "ema: {decay: 0.9}\noptim:\n  lr: 1e-3\n  warmup_steps: 3\n  lr: 1e-4\n")
    message = refusal(file=file)
    assert message.startswith(f"{file}:5: optim.lr is given twice")
    assert f"{file}:3" in message


def test_a_section_given_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    file = write(tmp_path, "optim: {lr: 1e-3}\nema: {decay: 0.9}\n'optim': {warmup_steps: 3}\n")
    message = refusal(file=file)
    assert message.startswith(f"{file}:3: optim is given twice")
    assert f"{file}:1" in message


@pytest.mark.parametrize(
    "text",
    [
        "optim: !!python/object/apply:os.system ['touch {marker}']",
        "optim: {{lr: !!python/object/apply:os.system ['touch {marker}']}}",
        "optim: {{lr: !!python/object/apply:os.system {{args: ['touch {marker}']}}}}",
        "!!python/object/apply:os.system ['touch {marker}']",
        "run: {{name: !!python/name:os.system x}}",
        "optim: {{lr: !!python/float 1e-3}}",
        "optim: {{lr: !!python/module:os ''}}",
        "optim: {{lr: !own 1}}",
        "? !!python/object/apply:os.system ['touch {marker}']\n: 3",
        "optim: {{? !!python/object/apply:os.system ['touch {marker}'] : 3}}",
    ],
)
def test_yaml_tags_are_refused_and_nothing_is_executed(tmp_path: Path, text: str) -> None:
    marker = tmp_path / "executed"
    refusal(file=write(tmp_path, text.format(marker=marker)))
    assert not marker.exists()


def test_the_dangerous_tags_above_are_dangerous(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    yaml.unsafe_load(f"optim: !!python/object/apply:os.system ['touch {marker}']")
    assert marker.exists()


@pytest.mark.parametrize("root", ["optim: {lr: *z}", "optim: *z", "*z : {lr: 1}", "optim: {<<: *z}"])
def test_an_alias_bomb_is_refused_quickly(tmp_path: Path, root: str) -> None:
    names = "abcdefghijklmnopqrstuvwxyz"
    layers = [f"&{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in itertools.pairwise(names)]
    bomb = "\n".join(["run: [&a [x, x]", *(f", {layer}" for layer in layers), "]"])
    refusal(file=write(tmp_path, f"{bomb}\n{root}\n"))
    refusal(file=write(tmp_path, f"{bomb.replace('run:', 'run: {name:')}}}\n{root}\n"))


def test_an_alias_of_itself_is_refused_quickly(tmp_path: Path) -> None:
    refusal(file=write(tmp_path, "optim: {lr: &a [*a]}"))
    refusal(file=write(tmp_path, "optim: &a {lr: *a}"))


@pytest.mark.parametrize(
    "text",
    [
        "run: " + "[" * 5000,
        "run: " + "[" * 5000 + "]" * 5000,
        "run: " + "{a: " * 5000,
        "\n".join(" " * depth + "run:" for depth in range(2000)),
        "- " * 20000 + "a",
    ],
    ids=["open brackets", "brackets", "braces", "indents", "dashes"],
)
def test_a_very_deep_file_is_refused_quickly(tmp_path: Path, text: str) -> None:
    refusal(file=write(tmp_path, text))


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"run: \x00", b"run: {name: 'x", b"a: b: c", b"run: {}\n---\n{}"])
def test_a_file_that_is_no_yaml_is_refused_with_its_name(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    assert str(file) in refusal(file=file)


def test_a_missing_file_and_a_folder_are_refused_with_their_names(tmp_path: Path) -> None:
    assert f"{tmp_path / 'none.yaml'}: no such file" in refusal(file=tmp_path / "none.yaml")
    assert str(tmp_path) in refusal(file=tmp_path)
    below_a_file = write(tmp_path, "") / "config.yaml"
    assert str(below_a_file) in refusal(file=below_a_file)


# Rules that bind several keys


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.batch_size=100"], ["data.batch_size=100", "elastic.shards=8", "96", "104"]),
        (["data.batch_size=3"], ["data.batch_size=3", "elastic.shards=8", "8"]),
        (["data.image_size=30"], ["data.image_size=30", "multiple of 4", "28, 32"]),
        (["data.name=folder"], ["data.image_size", "data.name=folder", "4"]),
        (["data.name=folder", "data.image_size=30"], ["data.image_size=30", "4"]),
        (["model.channels=60"], ["model.channels=60", "8"]),
        (["model.time_embed_dim=127"], ["model.time_embed_dim=127", "even"]),
        (["model.options=[depth=4]"], ["model.options=[depth=4]", "model.name=unet ", "package.module:function"]),
        (["unet2d.dropout=0.1"], ["unet2d.dropout=0.1", "model.name=unet does not use it", "model.name=unet2d"]),
        (["model.name=unet2d", "model.dropout=0.1"], ["model.dropout=0.1", "does not use it", "unet2d.*"]),
        (["model.name=unet2d", "data.image_size=36"], ["data.image_size=36", "multiple of 8", "32, 40"]),
        ([*UNET2D, "unet2d.block_out_channels=[]"], ["unet2d.block_out_channels=[]"]),
        ([*UNET2D, "unet2d.block_out_channels=[32, 40]"], ["=[32, 40]", "40", "norm_num_groups=32", "32, 64"]),
        ([*UNET2D, "unet2d.block_out_channels=[32]"], ["down_block_types=[DownBlock2D, Attn", "[32]"]),
        ([*UNET2D, "unet2d.up_block_types=[UpBlock2D]"], ["unet2d.up_block_types=[UpBlock2D]", "[32, 64]"]),
        (
            [*UNET2D, "unet2d.down_block_types=[DownBlock2D, CrossAttnDownBlock2D]"],
            ["element 2 is 'CrossAttnDownBlock2D'", "DownBlock2D, AttnDownBlock2D, ResnetDownsampleBlock2D"],
        ),
        ([*UNET2D, "unet2d.attention_head_dim=24"], ["unet2d.attention_head_dim=24", "64", "null"]),
        ([*UNET2D, "unet2d.attn_norm_num_groups=24"], ["unet2d.attn_norm_num_groups=24", "64"]),
        ([*UNET2D, "unet2d.downsample_padding=2"], ["unet2d.downsample_padding=2", "0 or 1"]),
        ([*UNET2D, "unet2d.freq_shift=16"], ["unet2d.freq_shift=16", "32"]),
        (["diffusion.zero_terminal_snr=true"], ["diffusion.zero_terminal_snr=true", "prediction=eps", "v, x0"]),
        (["diffusion.beta_start=0.03"], ["diffusion.beta_start", "diffusion.beta_end"]),
        (["optim.weight_decay=0.1"], ["optim.weight_decay=0.1", "optim.name=adam,", "optim.name=adamw"]),
        (["preview.steps=1001"], ["preview.steps=1001", "diffusion.num_timesteps=1000"]),
        (["diffusion.num_timesteps=40", "preview.steps=50"], ["preview.steps=50", "diffusion.num_timesteps=40"]),
        (["optim.schedule=cosine", "optim.warmup_steps=9", "train.max_steps=9"], ["optim.warmup_steps=9"]),
        (
            ["optim.schedule=cosine", "optim.warmup_steps=9", "optim.decay_steps=8", "train.max_steps=99"],
            ["optim.warmup_steps=9", "8"],
        ),
    ],
)
def test_keys_that_contradict_each_other_are_refused_by_name(overrides: list[str], words: list[str]) -> None:
    message = refusal(*overrides)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.batch_size=8"],
        ["data.batch_size=3", "elastic.shards=3"],
        ["data.name=folder", "data.image_size=32"],
        ["data.image_size=32"],
        ["model.channels=8", "model.time_embed_dim=4"],
        [*UNET2D, "unet2d.freq_shift=15", "unet2d.attention_head_dim=64", "data.image_size=6"],
        ["model.name=mynets:build", "model.options=[depth=4]", "unet2d.dropout=0.1"],
        ["diffusion.zero_terminal_snr=true", "diffusion.prediction=v"],
        ["optim.weight_decay=0.1", "optim.name=adamw"],
        ["diffusion.beta_start=0.02"],
        ["preview.steps=1000"],
        ["optim.schedule=cosine", "optim.warmup_steps=9", "train.max_steps=10"],
        ["optim.warmup_steps=9", "train.max_steps=9"],
        ["optim.schedule=cosine", "optim.warmup_steps=9"],
    ],
)
def test_keys_that_only_just_agree_are_accepted(overrides: list[str]) -> None:
    load_config(overrides=overrides)


@pytest.mark.parametrize(
    "name", ["..", ".", "a/b", "/a", "../a", "a/..", ".hidden", "-x", "a b", "é", "a\\b", "x" * 201, "a\x00b"]
)
def test_run_name_is_one_plain_directory_name(name: str) -> None:
    assert refusal(f"run.name={name}").startswith(f"command line: run.name={name}: expected one directory name")


@pytest.mark.parametrize("name", ["mnist", "2026-01-01", "lr=1e-4,seed=0", "_x", "a.b", "x" * 200])
def test_run_name_may_say_what_the_run_is(name: str) -> None:
    assert load_config(overrides=[f"run.name={name}"]).directory == Path("runs") / name


# Ranks


@pytest.mark.parametrize("world_size", [3, 5, 6, 16])
def test_impossible_number_of_ranks_is_refused_with_all_possible_ones(world_size: int) -> None:
    with pytest.raises(ConfigError, match=rf"^{world_size} ranks .*elastic\.shards=8.*: 1, 2, 4, 8 "):
        check_world_size(Config(), world_size)


def test_exactly_the_listed_numbers_of_ranks_are_accepted() -> None:
    config = load_config(overrides=["elastic.shards=12", "data.batch_size=24"])
    accepted = [world_size for world_size in range(1, 30) if accepts(config, world_size)]
    assert accepted == [1, 2, 3, 4, 6, 12]


def accepts(config: Config, world_size: int) -> bool:
    try:
        check_world_size(config, world_size)
    except ConfigError:
        return False
    return True


def test_micro_batches_divide_the_images_of_a_rank() -> None:
    config = load_config(overrides=["train.micro_batch_size=32"])
    assert [accepts(config, world_size) for world_size in (1, 2, 4)] == [True, True, True]
    config = load_config(overrides=["train.micro_batch_size=24"])
    with pytest.raises(ConfigError, match=r"train\.micro_batch_size=24.* 64 images.*: 1, 2, 4, 8, 16, 32, 64$"):
        check_world_size(config, 2)


def test_micro_batch_of_more_than_a_rank_has_is_all_it_has() -> None:
    config = load_config(overrides=["train.micro_batch_size=48"])
    assert not accepts(config, 1)
    assert accepts(config, 4)
    assert accepts(config, 8)


# The reference recipe


def test_the_defaults_are_the_reference_recipe() -> None:
    config = load_config()
    assert config.model.channels == 64
    assert config.model.time_embed_dim == 128
    assert config.model.dropout == 0
    assert (config.diffusion.beta_start, config.diffusion.beta_end) == (1e-4, 0.02)
    assert config.diffusion.num_timesteps == 1000
    assert (config.optim.lr, config.optim.schedule, config.optim.warmup_steps) == (2e-4, "constant", 0)
    assert config.optim.grad_clip is None
    assert (config.data.name, config.data.batch_size, config.data.flip) == ("mnist", 128, False)
    assert (config.train.epochs, config.train.max_steps) == (20, None)


def test_every_key_says_what_it_is_for() -> None:
    assert all(len(item.help) > 3 for item in keys().values())


def test_number_of_channels_may_be_written_as_a_number(tmp_path: Path) -> None:
    assert Config().data.channels == "auto"
    config = from_text(tmp_path, "data: {channels: 1}\n")
    assert config.data.channels == load_config(overrides=["data.channels=1"]).data.channels == "1"
    assert from_text(tmp_path, to_yaml(config)) == config
    assert changes(Config(), config)[0] == ["data.channels: auto -> 1"], "it shapes what is learned"
    for text in ("2", "true", "1.0", "null"):
        assert "data.channels" in refusal(f"data.channels={text}")


# The number of loader processes


@pytest.mark.parametrize(("name", "workers"), [("folder", 2), ("mnist", 0), ("cifar10", 0), ("mnist5k", 0)])
def test_loader_processes_are_those_asked_for_or_else_suit_the_data_set(name: Any, workers: int) -> None:
    assert loader_workers(DataConfig(name=name)) == workers
    for asked in (0, 1, 5):
        assert loader_workers(DataConfig(name=name, num_workers=asked)) == asked


# Changes


def test_changes_tell_what_shapes_learning_from_what_does_not() -> None:
    new = load_config(overrides=["optim.lr=1e-3", "model.channels=8", "train.epochs=30", "data.root=/elsewhere"])
    refused, free = changes(Config(), new)
    assert refused == ["model.channels: 64 -> 8", "optim.lr: 0.0002 -> 0.001"]
    assert free == ["data.root: data -> /elsewhere", "train.epochs: 20 -> 30"]
    assert changes(new, new) == ([], [])


def test_whatever_shapes_learning_is_fixed_and_the_rest_is_free() -> None:
    fixed = {name for name, item in keys().items() if not item.free}
    assert {"run.seed", "data.batch_size", "data.name", "data.flip", "elastic.shards", "ema.decay"} < fixed
    assert {name for name in keys() if name.startswith(("model.", "diffusion.", "optim."))} <= fixed
    free = ("checkpoint.", "preview.", "tracking.", "distributed.")
    shapes_averages = {"checkpoint.ema_snapshots"}  # the averages that it asks for go back to step 0
    assert {name for name in fixed if name.startswith(free)} == shapes_averages


# Torch is slow to import, so the commands that need none do without


def run_main(*arguments: str) -> subprocess.CompletedProcess[str]:
    """ddpm_dist.train.main in a fresh process, which then says whether torch was imported."""
    code = (
        "import sys\n"
        "from ddpm_dist.train import main\n"
        "try:\n    code = main(sys.argv[1:])\n"
        "except SystemExit as error:\n    code = error.code\n"
        "print('torch imported:', 'torch' in sys.modules)\n"
        "sys.exit(code)\n"
    )
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, env=environment
    )


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--help"], 0, ["section.key=value", "--dry-run", "resume", "78"]),
        (["--help-config"], 0, ["optim.lr=0.0002", "data.name=mnist", "cifar10"]),
        (["--dry-run", "optim.lr=1e-3"], 0, ["lr: 0.001", "batch_size: 128"]),
        (["optim.lr=fast"], 78, ["optim.lr=fast"]),
        (["--config", "/nowhere.yaml"], 78, ["/nowhere.yaml"]),
    ],
)
def test_help_dry_run_and_config_errors_do_not_import_torch(
    arguments: list[str], code: int, words: Iterable[str]
) -> None:
    done = run_main(*arguments)
    assert done.returncode == code, done.stderr
    assert "torch imported: False" in done.stdout
    for word in words:
        assert word in done.stdout + done.stderr


def test_dry_run_prints_a_config_that_loads_to_the_same(tmp_path: Path) -> None:
    overrides = ["optim.lr=3e-4", "run.name=no", "optim.grad_clip=1", "train.compile=false"]
    printed = run_main("--dry-run", *overrides).stdout.rpartition("torch imported")[0]
    assert from_text(tmp_path, printed) == load_config(overrides=overrides)
