"""What a Hugging Face folder's tensors are called in a GGUF file of the same model, and the order of their rows."""

from __future__ import annotations

import re
from collections.abc import Iterable

import gguf
import numpy as np
import numpy.typing as npt

from flashd.errors import DataError
from flashd.pack.open_model import GUESSING
from flashd.pack.sources.folder_config import FolderModel

Numbers = npt.NDArray[np.int64]

ENDS = (".weight", ".bias")

STACKS = {".weight": ".weight", "": ".weight", "_bias": ".bias", "_blocks": ".weight", "_scales": ".weight"}
"""Ends of the names of stacks, and GGUF's."""

NOT_READ = (
    ".rotary_emb.inv_freq", ".attention.bias", ".attn.bias", ".masked_bias", ".weight_scale",
    ".mlp.predictor.fc1.weight", ".mlp.predictor.fc2.weight",
)  # fmt: skip
"""Ends of names that are no weights of their own, or a predictor's of which neurons fire: flashd fits its own."""

SIGHT, HEARING = "the part that sees", "the part that hears"

GUESSING_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers")
"""What config.json calls the number of layers behind the model's last."""

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_SEEING = re.compile(r"(model\.)?(vision_tower|visual|multi_modal_projector|audio_tower|embed_vision|embed_audio)\.")
_SPEAKING = re.compile(r"^(model\.)?language_model\.(model\.)?")


class Names:
    """GGUF's names of a folder's tensors."""

    def __init__(self, model: FolderModel) -> None:
        self.folder = model.folder
        self._layers, self._tied = model.layers, model.config.get("tie_word_embeddings") is True
        self._guesses = any(model.config.get(name) for name in GUESSING_LAYERS)
        self._sees = "vision_config" in model.config
        self._known = {
            theirs.format(bid=i) + end: ours.format(bid=i) + end
            for theirs, ours in model.folder.tensors.items()
            for i in range(model.layers)
            for end in ("", *(() if ours.endswith(ENDS) else ENDS))  # some of theirs have no end
        }
        self._split = {
            f"{theirs.format(bid=i)}.weight": [f"{name.format(bid=i)}.weight" for name in ours]
            for theirs, ours in model.folder.split.items()
            for i in range(model.layers)
        }
        self._not_packed = model.folder.left_out
        self.left_out: set[str] = set()  # of what `find` was asked for, that which is not packed, in words
        # a parameter that belongs to no module has a name without an end
        self._known |= {
            theirs.format(bid=i): ours.format(bid=i)
            for theirs, ours in model.folder.tensors.items()
            for i in range(model.layers)
            if ours.endswith(ENDS)
        }
        self._joined = {
            f"{theirs.format(bid=i)}{end}": [f"{name.format(bid=i)}{our_end}" for name in ours]
            for theirs, ours in model.folder.joined.items()
            for end, our_end in STACKS.items()
            for i in range(model.layers)
        }
        known = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        # most that the package does not know are named as Llama is
        kind = known.get(model.architecture, gguf.MODEL_ARCH.LLAMA)
        self._table = gguf.get_tensor_name_map(kind, model.layers)

    def joined(self, name: str) -> list[str]:
        """GGUF's names of what the stack `name` holds one behind the other in each of its matrices; empty if it is
        not such a stack."""
        return self._joined.get(self._spoken(name), [])

    def split(self, name: str) -> list[str]:
        """GGUF's names of the tensors that each have some rows of the tensor `name`; empty if it is one by itself."""
        return self._split.get(self._spoken(name), [])

    def _spoken(self, name: str) -> str:
        """The name that a tensor has in a model that does not see."""
        return _SPEAKING.sub("model.", name).replace("model.lm_head", "lm_head") if self._sees else name

    def find(self, name: str) -> tuple[str, int | None] | None:
        """(GGUF's name, number of the expert in its stack) of a tensor, its own where GGUF has none for it.

        None for what is no weight, or a part of a model that also sees.
        """
        name = self._spoken(name)
        if self._sees and _SEEING.match(name):
            self.left_out.add(HEARING if "audio" in name else SIGHT)
            return None
        if self._guesses and (layer := _LAYER.match(name)) and int(layer[1]) >= self._layers:
            self.left_out.add(GUESSING)
            return None
        for beginning, what in self._not_packed.items():
            if name.startswith(beginning):
                self.left_out.add(what)
                return None
        if name.endswith(NOT_READ) or (self._tied and name == "lm_head.weight"):
            return None
        expert = _EXPERT.search(name)
        merged = _EXPERT.sub(".experts.", name)
        number = int(expert[1]) if expert else None
        if merged in self._known:
            return self._known[merged], number
        found = self._table.get_name(merged, ENDS)
        if found and not found.endswith(ENDS):  # it belongs to no module: attention sinks, for example
            found += ".weight"
        return found or name, number


def part_of(name: str) -> str:
    """What part of a layer a GGUF tensor is, without its end."""
    return name.split(".")[2] if name.startswith("blk.") else name


def column_order(model: FolderModel, name: str, columns: int) -> Numbers | None:
    """For each of so many columns of the GGUF tensor `name`, the column of the folder's; None if they agree.

    Raises DataError if the heads make another number of columns.
    """
    own = model.folder.columns(model.config, part_of(name))
    if own is not None and len(own) != columns:
        raise DataError(f"tensor {name!r} has {columns} columns where its heads make {len(own)}")
    return own


def _parts(names: Iterable[str]) -> list[str]:
    return [part_of(name) for name in names]


def row_order(model: FolderModel, name: str, rows: int) -> Numbers | None:
    """For each of so many rows of the GGUF tensor `name`, the row of the folder's; None if they agree.

    Raises DataError if the heads make another number of rows.
    """
    folder = model.folder
    own = folder.rows(model.config, part_of(name))
    if own is not None:
        together = next(
            (ours for ours in map(_parts, folder.split.values()) if part_of(name) in ours), [part_of(name)]
        )
        orders = [folder.rows(model.config, part) for part in together]
        _check_rows(name, rows, sum(len(order) for order in orders if order is not None))
        return own
    part, width, heads = f".{name}".split(".")[-2], model.head_dim, model.config.get("num_attention_heads", 0)
    shared = model.config.get("num_key_value_heads", heads)
    if isinstance(shared, list):  # of one a layer; those that do not attend have none
        shared = max(shared)
    if model.folder.permuted and part in ("attn_q", "attn_k"):
        n = heads if part == "attn_q" else shared
        _check_rows(name, rows, n * width)
        return _in_pairs(np.arange(n * width).reshape(n, width)).reshape(-1)
    if model.folder.fused and part == "attn_qkv":
        _check_rows(name, rows, (heads + 2 * shared) * width)
        # groups of heads that share a key and a value: [queries of the group, key, value]
        groups = np.arange((heads + 2 * shared) * width).reshape(shared, heads // shared + 2, width)
        turned = _in_pairs(groups[:, :-1]) if model.folder.permuted else groups[:, :-1]
        parts = (turned[:, :-1], turned[:, -1], groups[:, -1])
        return np.concatenate([p.reshape(-1) for p in parts])
    return None


def _in_pairs(heads: Numbers) -> Numbers:
    """Rows of heads [..., D], given in halves, with those that turn together side by side."""
    return heads.reshape(*heads.shape[:-1], 2, -1).swapaxes(-2, -1).reshape(heads.shape)


def _check_rows(name: str, rows: int, made: int) -> None:
    """Raises DataError before a row is numbered for each head that a file claims."""
    if rows != made:
        raise DataError(f"tensor {name!r} has {rows} rows where its heads make {made}")
