"""Compiled blocks (``torch.compile``) in place of whole compiled models, and the shapes that they are shown.

The blocks that a model repeats are compiled, not the model (regional compilation): one compilation serves all layers
that are alike. What is computed must stay a function of what goes in, whatever was computed before, or a run that is
started again would not end in the same bytes. So each shape is compiled by itself: a kernel for any shape depends on
the shape that came first. Where shapes vary, callers round them up to a few (`rounded`).
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional

from gmail_cli.errors import SetupError

ROWS = 32
"""Compiled text towers read a multiple of so many texts."""
POSITIONS = 16
"""Compiled language models and text towers read a multiple of so many positions, or all that they can."""
_NO_LIMIT = 1_000_000
"""Beyond its limit torch would compute some shapes without compiling them, and which ones would depend on the order."""


def require_compiler(key: str, *, device: str | torch.device) -> None:
    """Stop where torch has nothing to compile with: a C++ compiler for a CPU, a C compiler and Triton for a GPU.

    Args:
        key: Of the profile, for the message.
        device: What is computed on.

    Raises:
        SetupError: Names what is missing.
    """
    from importlib.util import find_spec

    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError) as error:
        raise SetupError(
            f"{key} = true needs a C++ compiler, and there is none that works",
            hint=f"Install g++ (or name one in CXX), or set {key} to false.",
        ) from error
    if torch.device(device).type == "cuda" and find_spec("triton") is None:
        raise SetupError(f"{key} = true needs the package triton on a GPU", hint=f"Install it, or set {key} to false.")


def compile_blocks(module: nn.Module) -> None:
    """Compile the repeated blocks in ``module`` in place, when they are first called; names of weights stay.

    They are those that diffusers says its class repeats; of other models, and where it has none of those, the members
    of its lists and sequences that have parts themselves; of a model without such, the model.
    """
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = _NO_LIMIT
    if hasattr(torch._inductor.config, "deterministic"):  # kernels are chosen without measuring them
        torch._inductor.config.deterministic = True
    for block in _blocks(module):
        block.compile(dynamic=False)


def _blocks(module: nn.Module) -> list[nn.Module]:
    names = getattr(module, "_repeated_blocks", None) or ()
    named = [each for each in module.modules() if type(each).__name__ in names]
    found: list[nn.Module] = []

    def look(inside: nn.Module) -> None:
        several = isinstance(inside, nn.ModuleList | nn.Sequential)
        for child in inside.children():
            if several and any(True for _ in child.children()):
                found.append(child)
            else:
                look(child)

    if not named:
        look(module)
    return named or found or [module]


def is_compiled(module: nn.Module) -> bool:
    """Whether `compile_blocks` has been here."""
    return any(each._compiled_call_impl is not None for each in module.modules())


def rounded(length: int, *, model: nn.Module, most: int) -> int:
    """The length at which a compiled ``model`` reads texts of ``length`` tokens, one of few; of any other ``length``.

    Args:
        length: Of the longest text.
        model: The one that reads.
        most: Tokens that it reads at most.
    """
    if not is_compiled(model):
        return length
    return max(length, min(-(-length // POSITIONS) * POSITIONS, most))


def lengthened(
    rows: Int[Tensor, "rows length"], *, model: nn.Module, value: int, most: int
) -> Int[Tensor, "rows longer"]:
    """Rows of tokens with ``value`` put behind, up to the length that `rounded` gives."""
    more = rounded(rows.shape[1], model=model, most=most) - rows.shape[1]
    return functional.pad(rows, (0, more), value=value) if more else rows


def filled(rows: Int[Tensor, "rows length"], *, model: nn.Module) -> Int[Tensor, "more length"]:
    """Rows of tokens with the first one repeated behind, as many as a compiled ``model`` reads at once."""
    more = -len(rows) % ROWS if is_compiled(model) else 0
    return torch.cat([rows, rows[:1].expand(more, -1)]) if more else rows
