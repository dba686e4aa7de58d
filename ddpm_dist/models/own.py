"""Networks of the user's own: `model.name=package.module:function` imports one, and its promises are checked at start.

The code is the user's, on the user's path of Python. Nothing is unpickled, and nothing is searched for.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Build = Callable[[Any, tuple[int, int, int], int, int], nn.Module]
ARGUMENTS = "(model, image_shape, num_classes, out_channels)"
PROMISED = "expected forward(x, t{}) -> [B, out_channels, H, W]"


class NotUsable(ValueError):
    """The user's network cannot be used as it is. The message is one line that says why, and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def import_build(name: str) -> Build:
    """The function that builds the network, with its errors turned into one line for the user.

    Args:
        name: `package.module:function`.

    Raises:
        NotUsable: there is no such module or function, it cannot be imported, or it takes other arguments.
    """
    path, _, function_name = name.partition(":")
    if not (function_name.isidentifier() and all(part.isidentifier() for part in path.split("."))):
        raise NotUsable(f"model.name={name}: expected package.module:function, like mynets.small:build")
    module = _import(name, path)
    function = getattr(module, function_name, None)
    if not callable(function):
        callables = [each for each, value in vars(module).items() if callable(value) and not each.startswith("_")]
        near = difflib.get_close_matches(function_name, callables, n=1)
        hint = f"; did you mean {path}:{near[0]}?" if near else ""
        raise NotUsable(f"model.name={name}: {module.__file__} has no function {function_name!r}{hint}")
    try:
        inspect.signature(function).bind(None, (1, 4, 4), 0, 1)
    except TypeError as error:
        raise NotUsable(f"model.name={name}: must take {ARGUMENTS} ({error})") from None
    except ValueError:  # a callable that is not written in Python does not tell what it takes
        pass

    def build(model: Any, image_shape: tuple[int, int, int], num_classes: int, out_channels: int) -> nn.Module:
        try:
            network = function(model, image_shape, num_classes, out_channels)
        except Exception as error:
            raise NotUsable(f"model.name={name}: {function_name} fails with {_described(error)}") from error
        if not isinstance(network, nn.Module):
            raise NotUsable(f"model.name={name}: {function_name} returns a {type(network).__name__}; expected a Module")
        return network

    return build


def _import(name: str, path: str) -> Any:
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not (path == error.name or path.startswith(f"{error.name}.")):
            raise NotUsable(f"model.name={name}: importing {path} fails with {_described(error)}") from error
        here = f"the folder in which the command is started, {Path.cwd()}"
        places = here if {"", str(Path.cwd())} & set(sys.path) else "PYTHONPATH"
        raise NotUsable(
            f"model.name={name}: there is no module {error.name!r}; Python looks in {places}"
            f"{', and in PYTHONPATH' if places == here else ''}"
        ) from None
    except (Exception, SystemExit) as error:
        raise NotUsable(f"model.name={name}: importing {path} fails with {_described(error)}") from error


def _described(error: BaseException) -> str:
    """Type and message of an error in the user's code, and the line of that code."""
    where = ""
    if isinstance(error, SyntaxError):
        where = f" ({error.filename}, line {error.lineno})"
    elif places := [each for each in traceback.extract_tb(error.__traceback__) if _is_users(each.filename)]:
        where = f" ({places[-1].filename}, line {places[-1].lineno})"
    return f"{type(error).__name__}: {getattr(error, 'msg', None) or error}{where}"


def _is_users(file: str) -> bool:
    """Whether a file is neither of this package, nor installed, nor a part of Python."""
    inner = (str(Path(__file__).parents[1]), str(Path(importlib.__file__).parents[1]), "<")
    return not file.startswith(inner) and "site-packages" not in file


def check_promises(
    name: str,
    build: Callable[[], nn.Module],
    x: Tensor,
    t: Tensor,
    cond: Mapping[str, Tensor],
    out_channels: int,
) -> dict[str, list[int]]:
    """See at start whether a network keeps what training relies on, with one small batch.

    It draws nothing from the generators of the caller.

    Args:
        name: model.name, for messages.
        build: builds the network on the device of x, with weights drawn from torch's global generators.
        x: float32 [B, C, H, W].
        t: int64 [B].
        cond: the conditions of the batch, by the name of their argument.
        out_channels: of the output.

    Returns:
        the shape of each weight and buffer, by name.

    Raises:
        NotUsable: a promise is broken; the message says which one, and how to keep it.
    """
    with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []), torch.enable_grad():
        torch.manual_seed(0)
        network = build().train()
        torch.manual_seed(0)
        again = build().state_dict()
        for weight, value in network.state_dict().items():
            if weight not in again or not torch.equal(value, again[weight]):
                raise NotUsable(
                    f"model.name={name}: {weight} is not the same when the network is built twice after "
                    "torch.manual_seed(0); draw it from torch's global generator, so that all ranks start alike"
                )
        _check_forward(name, network, x, t, cond, out_channels)
    return {weight: list(value.shape) for weight, value in again.items()}


def _check_forward(
    name: str, network: nn.Module, x: Tensor, t: Tensor, cond: Mapping[str, Tensor], out_channels: int
) -> None:
    buffers = {buffer: value.clone() for buffer, value in network.named_buffers()}
    promised = PROMISED.format("".join(f", {condition}" for condition in cond))
    try:
        inspect.signature(network.forward).bind(x, t, **cond)
    except TypeError as error:
        raise NotUsable(
            f"model.name={name}: its forward does not take what it is given ({error}); {promised}"
        ) from None
    try:
        output = network(x, t, **cond)
    except Exception as error:
        raise NotUsable(f"model.name={name}: its forward fails with {_described(error)}; {promised}") from error
    expected = [len(x), out_channels, *x.shape[2:]]
    if not isinstance(output, Tensor) or not output.is_floating_point() or list(output.shape) != expected:
        found = f"{output.dtype} {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise NotUsable(f"model.name={name}: its forward returns {found}; expected floating point {expected}")
    for buffer, value in network.named_buffers():
        if not torch.equal(value, buffers[buffer]):
            raise NotUsable(
                f"model.name={name}: its forward changes the buffer {buffer}, which would differ from rank to rank and "
                "has no average; use a norm without running statistics, like GroupNorm"
            )
    _check_gradients(name, list(network.named_parameters()), output)


def _check_gradients(name: str, parameters: Sequence[tuple[str, nn.Parameter]], output: Tensor) -> None:
    frozen = [weight for weight, parameter in parameters if not parameter.requires_grad]
    if frozen or not parameters:
        what = f"{frozen[0]} has requires_grad=False; make it a buffer" if frozen else "it has no weights to train"
        raise NotUsable(f"model.name={name}: {what}")
    found = (
        torch.autograd.grad(output.float().sum(), [parameter for _, parameter in parameters], allow_unused=True)
        if output.requires_grad
        else [None] * len(parameters)
    )
    unused = [weight for (weight, _), gradient in zip(parameters, found, strict=True) if gradient is None]
    if unused:
        more = f", nor do {len(unused) - 1} others" if len(unused) > 1 else ""
        raise NotUsable(
            f"model.name={name}: the weight {unused[0]} gets no gradient{more}; every weight must get one from every "
            "batch, so leave it out, or use it in forward"
        )
