"""What an adapter's files compute, in NumPy and float64: none of hf_lora's code, no torch.

y = W' x + b'    W' = m ∘ V / ‖V‖,  V = W_k + s · B diag(σ) A,  b' = b + s · β, or the trained bias
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
_PREFIX = "base_model.model."
_PARTS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "m",
    "lora_magnitude_vector.weight": "m",
    "lora_diag": "sigma",
    "lora_B.bias": "beta",
}
_ROWS = ".token_adapter.trainable_tokens_delta"
_TRAINING = re.compile(r"\.lora_(velora|monteclora)")  # what only a training reads
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8"}
_NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
_NF4 += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
_NF4 += [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]


def filling(name: str, shape: tuple[int, ...], scale: float = 1.0) -> Array:
    """Numbers in (−scale, scale) that follow from the name alone, exact in float32: a linear congruence."""
    count = math.prod(shape)
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    numbers = np.empty(count, dtype=np.int64)
    for i in range(count):
        seed = (seed * 1103515245 + 12345) % 2**31
        numbers[i] = seed >> 11  # 20 bits
    return ((numbers - 2**19) / 2**19 * scale).reshape(shape)


def read(file: Path) -> dict[str, tuple[Array, bytes]]:
    """The tensors of a safetensors file, in float64, and the bytes of each."""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        raw = data[start + first : start + last]
        if entry["dtype"] == "BF16":  # the upper half of a float32
            wide = np.frombuffer(raw, dtype="<u2").astype(np.uint32) << 16
            values = wide.view(np.float32)
        else:
            values = np.frombuffer(raw, dtype=_DTYPES[entry["dtype"]])
        found[name.removeprefix(_PREFIX)] = values.astype(np.float64).reshape(entry["shape"]), raw
    return found


def scaling(config: Mapping[str, Any], path: str, rank: int) -> float:
    patterns = config.get("alpha_pattern") or {}
    alpha = next((a for key, a in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), config["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _nearest(W: Array) -> Array:
    """W in NF4 (Dettmers et al. 2023, appendix E), in blocks of 64 numbers with their largest as the scale."""
    flat = W.reshape(-1)
    blocks = np.pad(flat, (0, -len(flat) % 64)).reshape(-1, 64)
    scale = np.abs(blocks).max(1, keepdims=True)
    codes = np.array(_NF4)
    near = np.abs((blocks / np.maximum(scale, 1e-300))[..., None] - codes).argmin(-1)
    return (codes[near] * scale).reshape(-1)[: len(flat)].reshape(W.shape)


def _expanded(A: Array, B: Array, in_features: int, config: Mapping[str, Any]) -> tuple[Array, Array]:
    def diagonal(stacked: Array, n: int) -> Array:
        blocks = np.split(stacked, n)
        whole = np.zeros((len(stacked), n * stacked.shape[1]))
        for i, block in enumerate(blocks):
            rows, columns = block.shape
            whole[i * rows : (i + 1) * rows, i * columns : (i + 1) * columns] = block
        return whole

    if config.get("use_bdlora"):
        n = config["use_bdlora"]["nblocks"]
        A = A if A.shape[1] == in_features else diagonal(A, n)
        B = B if B.shape[1] == len(A) else diagonal(B, n)
    if config.get("use_qalora") and A.shape[1] != in_features:
        group = in_features // A.shape[1]
        A = np.repeat(A, group, 1) * A.shape[1] / group
    return A, B


def change(W: Array, parts: Mapping[str, Array], config: Mapping[str, Any], path: str) -> tuple[Array, Array | None]:
    """W' of W (out, in), and what is added to the bias."""
    s = scaling(config, path, len(parts["A"]))
    A, B = _expanded(parts["A"], parts["B"], W.shape[1], config)
    V = _nearest(W) if config.get("init_lora_weights") == "loftq" else W
    if "sigma" in parts:
        U, S, Vh = np.linalg.svd(W, full_matrices=False)
        kept = len(S) - len(A)
        V, B = (U[:, :kept] * S[:kept]) @ Vh[:kept], B * parts["sigma"]
    V = V + s * B @ A
    if "m" in parts:
        V = parts["m"][:, None] * V / np.linalg.norm(V, axis=1, keepdims=True)
    return V, s * parts["beta"] if "beta" in parts else None


def outputs(folder: Path, weight: Any) -> dict[str, list[float]]:
    """What each changed layer gives for one input: the path, and its outputs.

    Args:
        folder: the adapter.
        weight: path → (the kind of layer: "linear", "conv1d" or "embedding"; its weight as stored; its bias or None).
    """
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    layers: dict[str, dict[str, Array]] = {}
    whole: dict[str, Array] = {}
    for key, (tensor, _) in read(folder / "adapter_model.safetensors").items():
        if _TRAINING.search(key):
            continue
        end = next((end for end in sorted(_PARTS, key=len, reverse=True) if key.endswith("." + end)), None)
        if end is not None:
            layers.setdefault(key.removesuffix("." + end), {})[_PARTS[end]] = tensor
        elif "lora_" not in key:
            whole[key.replace(".base_layer.", ".")] = tensor
        else:
            raise KeyError(f"{key}: no formula is written down for it")
    layers = _unnested(layers, config)
    rows = {key.removesuffix(_ROWS): whole.pop(key) for key in list(whole) if key.endswith(_ROWS)}
    paths = {*layers, *rows, *(key.rpartition(".")[0] for key in whole if not key.startswith("model.embed_tokens"))}
    found = {}
    for path in sorted(paths):
        kind, W, b = weight(path)
        W = whole.get(f"{path}.weight", W) if path not in layers else W
        b = whole.get(f"{path}.bias", b)
        W = W.reshape(len(W), -1) if W.ndim > 2 else W
        if path in rows:
            W = W.copy()
            W[config["trainable_token_indices"]] = rows[path]
        if W.ndim == 1:  # a norm: its bias alone can be trained
            found[path] = b.tolist()
            continue
        W = W if kind == "linear" else W.T
        if path in layers:
            W, added = change(W, layers[path], config, path)
            b = b if added is None else added + (0 if b is None else b)
        y = W @ probe(W.shape[1], kind)
        found[path] = (y if b is None else y + b).tolist()
    return found


def _unnested(layers: dict[str, dict[str, Array]], config: Mapping[str, Any]) -> dict[str, dict[str, Array]]:
    """Pairs under the names of what they change; those of a parameter's experts one by one.

    PEFT wraps a module once for each of its parameters: the innermost is the first. It adds the change of an
    nn.MultiheadAttention's out_proj twice.
    """
    found = {}
    for path, parts in layers.items():
        module, depth = re.sub(r"(\.base_layer)+$", "", path), len(re.findall(r"\.base_layer(?=\.|$)", path))
        if module.endswith(".experts"):
            name = ("down_proj", "gate_up_proj")[depth]
            r = config["r"]
            A = parts["A"].reshape(-1, r, parts["A"].shape[1])
            B = parts["B"].reshape(len(parts["B"]), r, -1)
            found |= {f"{module}.{name}[{e}]": {"A": A[e], "B": B[:, :, e]} for e in range(len(A))}
        elif path.endswith(".base_layer.out_proj"):
            found[path.replace(".base_layer.", ".")] = {**parts, "B": 2 * parts["B"]}
        else:
            found[path] = {key: part.reshape(len(part), -1) if part.ndim > 2 else part for key, part in parts.items()}
    return found


def probe(in_features: int, kind: str) -> Array:
    """The input: numbers, or for an embedding the token 3."""
    return np.eye(in_features)[3] if kind == "embedding" else filling("probe", (in_features,))


def digests(folder: Path) -> dict[str, str]:
    """sha256 of each tensor's bytes."""
    found = read(folder / "adapter_model.safetensors")
    return {name: hashlib.sha256(raw).hexdigest() for name, (_, raw) in sorted(found.items())}
