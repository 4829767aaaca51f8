"""Give each row of a model's products the same bits, whatever rows are computed beside it.

A product of 3 rows and one of 300 rows may sum in different orders; torch's vectorised functions
treat the last few numbers of a tensor otherwise than the rest; with several threads, MKL cuts some
sums in two. So passes get a number of tokens that is a multiple of some number, each expert gets at
least so many tokens, and linear layers for which that is not enough are computed in another way:
in float32 by oneDNN, whose products were the same from 2 rows on for every shape and number of
threads that was tried; in bfloat16 (oneDNN's on AMX are not) in blocks of the same number of rows.

`measure` finds out what the loaded model needs, with this machine, library and number of threads.
That nothing else makes engine and trainer differ is proved afterwards, end to end
(`serve.selfcheck`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from gspo.kernels.experts import pad_experts
from gspo.kernels.hf import GATE, backbone, no_mask
from gspo.kernels.kv_cache import head_shapes
from gspo.kernels.linear_ways import BLOCK, other_way
from gspo.kernels.logprob import CPU_BLOCK, Head, full_logits
from gspo.kernels.projection import entry_slices, project
from gspo.kernels.running_softmax import VECTOR
from gspo.kernels.tile_attention import attend, widened

MULTIPLES = (8, 16, 32, 64)
_EXPERT_ROWS = (4, 8, 16, 32, 64)
_FEW = 16  # a linear layer that needs more rows than this is computed in another way
_SEEN = 37
"""Tokens of the pass that shows what modules are given: no model has so many heads."""
_ROWS = (8, 16, 24, 32, 64, 192, 512)
"""Rows of the calls that are compared with the largest of them."""
_MANY = {torch.float32: (1024,), torch.bfloat16: (128, 384, 640, 4096)}
"""Further rows for products, by type: in bfloat16 on AMX the 576 x 576 of SmolLM2 takes another
kernel from 576 rows on, and its 576 x 192 between 40 and 176. In float32 none was seen to from 16
rows on, up to 8,192 (docs/log.md)."""
_OUTPUTS = 2**18
"""Numbers that are compared in bfloat16: rounding hides all but one difference in some 20,000."""


@dataclass(frozen=True)
class Part:
    """Modules of one kind and shape, and what they need.

    Attributes:
        name: of the first of them.
        kind: name of their class.
        multiple: the rows of a call must be a multiple of this; None: none of `MULTIPLES` helps.
        how: what was changed, or "".
    """

    name: str
    kind: str
    multiple: int | None
    how: str = ""


@torch.no_grad()
def measure(lm: Any, head: Head) -> list[Part]:
    """Measure each kind of module of a model, and change those that need it.

    Args:
        lm: the model. Its experts may be padded from now on, its linear layers replaced.
        head: its vocabulary projection.
    """
    calls = sorted(_calls(lm), key=lambda call: not is_experts(call[1][0]))
    parts = list(_settled_linear(lm))
    for name, same, inputs in calls:  # blocks contain the others
        if is_experts(same[0]):
            parts.append(_settle_experts(name, same, inputs))
        else:
            multiple = _multiple(same[0], inputs, _rows_for(same[0]))
            parts.append(Part(name, type(same[0]).__name__, multiple))
    shapes = sorted({(n // k, width) for n, k, width in head_shapes(lm.config.get_text_config())})
    return [*parts, *(_attention(*shape) for shape in shapes), _head(head)]


def _attention(share: int, depth: int) -> Part:
    """One token of each of several sequences that are alike, against many tokens of one.

    Args:
        share: heads that share a key head.
        depth: width of a head.
    """
    rows, keys, values = widened(_numbers(3, 1, 1, BLOCK * share, depth))
    keys, values = keys[:, :, :BLOCK], values[:, :, :BLOCK]
    many, _ = attend(rows, keys, values, None, None)
    alike = [x.expand(BLOCK, -1, -1, -1) for x in (keys, values)]
    each, _ = attend(rows.view(BLOCK, 1, share, -1), alike[0], alike[1], None, None)
    same = torch.equal(each.view(many.shape), many)
    return Part(f"heads of {depth}", "attention", MULTIPLES[0] if same else None)


def _head(head: Head) -> Part:
    """Logits of few rows over the whole vocabulary, against many rows over a block of it."""
    hidden = _numbers(_ROWS[-1], head.weight.shape[1])
    spans = entry_slices(head.size, CPU_BLOCK[0])
    pairs = [(s, project(hidden, head.weight[s], None, None)) for s in (spans[0], spans[-1])]
    plain, wrong = replace(head, bias=None, softcap=None, scale=1.0), set[int]()
    for count in _ROWS[:5]:
        if count == MULTIPLES[-1] and not wrong:
            break  # so many rows of a whole vocabulary take long
        few, some = full_logits(hidden[1 : count + 1], plain), slice(1, count + 1)
        if not all(torch.equal(few[:, span], many[some]) for span, many in pairs):
            wrong.add(count)
    return Part("lm_head", "head", _fitting(wrong))


def undo(lm: Any) -> None:
    """Compute a model's modules as before `measure`."""
    for module in lm.modules():
        if hasattr(module, "gspo_rows"):
            del module.gspo_rows, module.forward
            vars(module).pop(GATE, None)


def is_experts(module: nn.Module) -> bool:
    return hasattr(module, "_is_expert_parallel")  # transformers' mark of such a module


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _settled_linear(lm: Any) -> Iterator[Part]:
    """Measure the linear layers below the head, each shape once, and change those that need it."""
    alike: dict[tuple[Any, ...], list[tuple[str, Any]]] = {}
    for name, module in lm.named_modules():
        if _is_linear(module) and module is not lm.get_output_embeddings():
            shape = module.in_features, module.out_features, module.bias is not None
            alike.setdefault((*shape, module.weight.dtype), []).append((name, module))
    for shape, layers in alike.items():
        vector = VECTOR * torch.get_num_threads()
        multiple, as_usual = _linear(*shape, torch.get_num_threads())
        way, how = other_way(shape[3])
        for _, layer in [] if as_usual else layers:
            layer.gspo_rows, layer.forward = multiple, MethodType(way, layer)
        # A function of its output, such as sigmoid, must find whole vectors only. Measuring it is
        # not enough: rounding to bfloat16 hides a difference most of the time.
        whole = vector // math.gcd(vector, shape[1])
        multiple = None if multiple is None else math.lcm(multiple, whole)
        yield Part(layers[0][0], type(layers[0][1]).__name__, multiple, "" if as_usual else how)


@cache
@torch.no_grad()
def _linear(
    inputs: int, outputs: int, biased: bool, dtype: torch.dtype, threads: int
) -> tuple[int | None, bool]:
    """The multiple of rows that linear layers of a shape need, and whether they are computed as
    usual then. Measured once in a process, for each number of `threads`."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, biased, dtype=dtype)
    for parameter in layer.parameters():
        parameter.copy_(_numbers(*parameter.shape) / inputs**0.5)
    given, rows = (_numbers(_SEEN, inputs).to(dtype),), (*_ROWS, *_MANY[dtype])
    multiple = _multiple(layer, given, rows)
    if multiple is not None and multiple <= _FEW:
        return multiple, True
    return _multiple(MethodType(other_way(dtype)[0], layer), given, rows), False


def _numbers(*shape: int) -> Tensor:
    """Random numbers that repeat: to draw millions takes longer than to multiply them."""
    count, generator = math.prod(shape), torch.Generator().manual_seed(0)
    few = torch.randn(65_521, generator=generator)  # a prime: rows are other pieces of them
    return few.repeat(-(-count // len(few)))[:count].view(shape)


def _settle_experts(name: str, modules: list[Any], inputs: tuple[Tensor, ...]) -> Part:
    multiple, rows = None, 0
    inputs = tuple(x if x.is_floating_point() else _uneven(x, modules[0]) for x in inputs)
    for module in modules:
        if hasattr(module, GATE):
            setattr(module, GATE, MethodType(_whole_gate, module))
    for rows in _EXPERT_ROWS:
        for module in modules:
            pad_experts(module, rows)
        multiple = _multiple(modules[0], inputs, _rows_for(modules[0]), least=BLOCK)
        if multiple is not None and multiple <= _FEW:
            break
    return Part(name, type(modules[0]).__name__, multiple, f"at least {rows} tokens each")


def _uneven(chosen: Tensor, experts: Any) -> Tensor:
    """Other choices of experts, some of them rare: a router that prefers one shows only that."""
    drawn = torch.rand(len(chosen), experts.num_experts, generator=torch.Generator().manual_seed(0))
    drawn *= torch.linspace(1, 0.2, experts.num_experts)
    return drawn.topk(chosen.shape[1])[1].to(chosen)


def _whole_gate(self: Any, x: Float[Tensor, "*B T N"]) -> Float[Tensor, "*B T E"]:
    """The gate of experts, as many rows that vectors are filled: GPT-OSS takes a sigmoid of all
    numbers in one piece, whose last ones torch computes otherwise (`running_softmax.exp2`)."""
    vector = VECTOR * torch.get_num_threads()
    missing = -x.shape[-2] % (vector // math.gcd(vector, x.shape[-1] // 2))
    padded = functional.pad(x, (0, 0, 0, missing)) if missing else x
    return getattr(type(self), GATE)(self, padded)[..., : x.shape[-2], :]


def _rows_for(module: nn.Module) -> tuple[int, ...]:
    """Rows to try: many for a module that may multiply by a weight of its own."""
    weight = next(module.parameters(recurse=False), None)
    return _ROWS if weight is None else (*_ROWS, *_MANY[weight.dtype])


def _calls(lm: Any) -> Iterator[tuple[str, list[nn.Module], tuple[Tensor, ...]]]:
    """Yield the modules of each kind but linear layers: the name of the first of them, all of them,
    and what one is given in a pass over a few random tokens."""
    calls: dict[object, tuple[str, list[nn.Module], tuple[Tensor, ...]]] = {}
    names = {module: name for name, module in lm.named_modules()}

    def note(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        by_token = [x for x in inputs if isinstance(x, Tensor) and _SEEN in x.shape[:2]]
        if named or not by_token or len(by_token) != len(inputs):
            return
        shapes = tuple(tuple(p.shape) for p in module.parameters())
        kind = (type(module), shapes, *(tuple(x.shape) for x in by_token))
        given = tuple(x.detach().clone() for x in by_token)
        calls.setdefault(kind, (names[module], [], given))[1].append(module)

    modules = [module for module in lm.modules() if not _is_linear(module)]
    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    generator = torch.Generator().manual_seed(0)
    size = lm.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(size, (1, _SEEN), generator=generator).to(lm.device)
    # Positions that begin again: short samples, so that any context holds them.
    positions = (torch.arange(_SEEN, device=lm.device) % 8)[None]
    try:
        backbone(lm)(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=no_mask(lm.device),
            use_cache=False,
        )
    finally:
        for hook in hooks:
            hook.remove()
    yield from calls.values()


def _multiple(
    run: Callable[..., Any], inputs: tuple[Tensor, ...], counts: Sequence[int], least: int = 1
) -> int | None:
    """Find the smallest multiple of rows at which rows have the bits of the call of most rows.

    Args:
        run: a module, or how it is computed.
        inputs: of `_SEEN` tokens; they are repeated, times other numbers.
        counts: rows of the calls, the most last.
        least: rows that are compared at least, in float32.
    """
    most, axes = counts[-1], [x.shape.index(_SEEN) for x in inputs]
    many = [_repeated(x, axis, most) for x, axis in zip(inputs, axes, strict=True)]
    whole, wrong = _first(run(*many)), set[int]()
    for count in counts[:-1] if most in whole.shape else ():  # else it has no rows by token
        rows = least if whole.dtype == torch.float32 else min(most - 1, _OUTPUTS // whole.shape[-1])
        rows = max(rows // count, 1) * count
        start = (most - rows) // 2 | 1  # odd: where a row begins in memory may matter too
        middle = [x.narrow(a, start, rows) for x, a in zip(many, axes, strict=True)]
        calls = zip(*(x.split(count, a) for x, a in zip(middle, axes, strict=True)), strict=True)
        axis = whole.shape.index(most)
        few = torch.cat([_first(run(*call)) for call in calls], axis)
        if not torch.equal(few, whole.narrow(axis, start, rows)):
            wrong.add(count)
    return _fitting(wrong)


def _fitting(wrong: set[int]) -> int | None:
    """The smallest multiple that no call of so many rows was of, whose bits were wrong."""
    return next((m for m in MULTIPLES if all(count % m for count in wrong)), None)


def _repeated(x: Tensor, axis: int, count: int) -> Tensor:
    again = x.index_select(axis, torch.arange(count, device=x.device) % _SEEN)
    return again * (1 + _numbers(*again.shape) / 8).to(x.dtype) if x.is_floating_point() else again


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
