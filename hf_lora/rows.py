"""Which output rows of a fused layer belong to which role.

Every known layout is the same few runs of rows repeated for each group of heads: `groups` times `((role, size), …)`.

    stacked    [q][k][v]                                  GPT-2, Phi-3, MPT, ModernBERT: one group
    equal      as many rows for each role, whatever the heads (a model without a config)
    by_head    [q k v] of head 0, [q k v] of head 1, …    GPT-NeoX, BLOOM
    falcon     [q … q k v] for each key-value head        one such group where a single key-value head serves all
    codegen    four groups of [q][v][k]
    mla        [k v] for each head, of unequal sizes      DeepSeek's kv_b_proj
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .architectures import Fused

__all__ = ["role_rows"]

_Runs = tuple[int, tuple[tuple[str, int], ...]]  # groups, and (role, rows) in the order of one group


def role_rows(fused: Fused, config: Any, out_features: int) -> dict[str, tuple[range, ...]] | None:
    """Output rows of each role of a fused layer, in the order of the layer's rows.

    Args:
        fused: the layer's roles and layout.
        config: the configuration of the (sub)model that the layer belongs to.
        out_features: number of output rows; all of them belong to some role.

    Returns:
        role → ranges (step 1, ascending, adjacent ones joined), or None if the layout does not fit these sizes.
    """
    layout = _LAYOUTS.get(fused.layout)
    try:
        runs = layout(fused.roles, config, out_features) if layout is not None else None
    except (AttributeError, TypeError, ZeroDivisionError):  # this configuration lacks what the layout needs
        runs = None
    if runs is None:
        return None
    groups, order = runs
    if groups < 1 or any(size < 1 for _, size in order) or groups * sum(size for _, size in order) != out_features:
        return None
    rows: dict[str, list[range]] = {role: [] for role, _ in order}
    start = 0
    for _ in range(groups):
        for role, size in order:
            runs_of_role = rows[role]
            if runs_of_role and runs_of_role[-1].stop == start:
                runs_of_role[-1] = range(runs_of_role[-1].start, start + size)
            else:
                runs_of_role.append(range(start, start + size))
            start += size
    return {role: tuple(ranges) for role, ranges in rows.items()}


def _heads(config: Any) -> int:
    for name in ("num_attention_heads", "num_heads", "n_head"):
        value = getattr(config, name, None)
        if value:
            return int(value)
    raise AttributeError("num_attention_heads")


def _grouped(roles: tuple[str, ...], groups: int, q_heads: int, out: int) -> _Runs:
    head = out // (groups * (q_heads + len(roles) - 1))
    return groups, tuple((role, head * q_heads if role == "q" else head) for role in roles)


def _stacked(roles: tuple[str, ...], config: Any, out: int) -> _Runs:
    if "q" not in roles:  # [k][v], [gate][up]: equal parts
        return 1, tuple((role, out // len(roles)) for role in roles)
    heads = _heads(config)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head = out // (heads + (len(roles) - 1) * kv_heads)
    return 1, tuple((role, head * (heads if role == "q" else kv_heads)) for role in roles)


def _by_head(roles: tuple[str, ...], config: Any, out: int) -> _Runs:
    return _grouped(roles, _heads(config), 1, out)


def _falcon(roles: tuple[str, ...], config: Any, out: int) -> _Runs:
    heads = _heads(config)
    if config.new_decoder_architecture:
        return _grouped(roles, config.num_kv_heads, heads // config.num_kv_heads, out)
    return _grouped(roles, 1, heads, out) if config.multi_query else _grouped(roles, heads, 1, out)


def _bigcode(roles: tuple[str, ...], config: Any, out: int) -> _Runs:
    heads = _heads(config)
    return _grouped(roles, 1, heads, out) if config.multi_query else _grouped(roles, heads, 1, out)


def _codegen(roles: tuple[str, ...], config: Any, out: int) -> _Runs:
    return 4, tuple((role, out // (4 * len(roles))) for role in roles)


def _mla(roles: tuple[str, ...], config: Any, out: int) -> _Runs:
    sizes = {"k": config.qk_nope_head_dim, "v": config.v_head_dim}
    return _heads(config), tuple((role, sizes[role]) for role in roles)


def _equal(roles: tuple[str, ...], config: Any, out: int) -> _Runs:
    return 1, tuple((role, out // len(roles)) for role in roles)


_LAYOUTS: Mapping[str, Callable[[tuple[str, ...], Any, int], _Runs]] = {
    "equal": _equal,
    "stacked": _stacked,
    "by_head": _by_head,
    "falcon": _falcon,
    "bigcode": _bigcode,
    "codegen": _codegen,
    "mla": _mla,
}
