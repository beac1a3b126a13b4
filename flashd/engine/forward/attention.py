"""Attention over the KV cache: rotary tables, where the tokens of a pass stand, and the sessions of all layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from flashd.bundle.layer_kinds import AttentionKind
from flashd.bundle.reader import Bundle
from flashd.bundle.rows.kinds import Floats
from flashd.engine.forward.attention_weights import AttentionWeights
from flashd.engine.forward.constants import at_least_two
from flashd.engine.model.branches import Branches
from flashd.engine.model.kv_cache import SPARE, KvCache
from flashd.engine.model.sizes import TREE_NODES
from flashd.engine.model.states import PassStates
from flashd.graphs.layer_stages import NEVER
from flashd.system.onnx_session import in_arena

SCORE_BYTES = 12
"""Of a score, in float32 and in float64, see graphs.tree_attention."""

GAPS = 4 << 20
"""Bytes of free memory that may be too small for the next pass and are kept all the same."""

SHRINKING = ort.RunOptions()
SHRINKING.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")


class Rotary:
    """cos and sin of rotary embedding (arXiv 2104.09864), halves rotated, for each of a model's tables.

    A table gives each pair of a head's dimensions the angle that a position turns it by, 0 for what is not turned,
    and the length that it is stretched to.
    """

    def __init__(self, bundle: Bundle, positions: int) -> None:
        model = bundle.header.model
        values, ends = bundle.floats("rope").astype(np.float64), np.cumsum(model.rope_widths)
        self._arrays: dict[str, Floats] = {}
        for i, table in enumerate(np.split(values, ends[:-1]) if model.ropes else []):
            angle, length = table.reshape(2, -1)  # [D / 2] each
            turned = np.arange(positions)[:, None] * angle  # [positions, D / 2]
            self._arrays[f"cos.{i}"] = (length * np.cos(turned)).astype(np.float32)
            self._arrays[f"sin.{i}"] = (length * np.sin(turned)).astype(np.float32)
        self._values = {name: ort.OrtValue.ortvalue_from_numpy(a) for name, a in self._arrays.items()}

    def bind(self, names: Iterable[str], binding: Any) -> None:
        """Gives a graph those tables that are among the `names` of its inputs."""
        for name in names:
            if name in self._values:
                binding.bind_ortvalue_input(name, self._values[name])


@dataclass(frozen=True)
class Places:
    """Where the T tokens of a pass stand, and which of them each may look at.

    Products take R rows, two or more, see constants.at_least_two; nothing looks at one that is behind the tokens.
    """

    past: int
    tokens: int  # T
    positions: npt.NDArray[np.int64]  # [1, R]
    bias: Floats  # [1, 1, R, past + R], added to attention's scores
    keys: npt.NDArray[np.int64]  # [past + T], where in its text what each slot of the cache holds stands
    runs: Sequence[tuple[int, int]]  # (text, how many tokens) of those that follow one another, see Branches.runs
    _within: dict[int, Floats] = field(default_factory=dict)  # what `within` gave, by the window

    def within(self, window: int) -> Floats:
        """The bias of layers that attend to the last `window` tokens of a text; 0: to all."""
        if not window:
            return self.bias
        if window not in self._within:
            # products of all layers take one array: the scores of keys that are too far are made in a copy of it
            seen = self.bias.copy()
            first = self.positions[0, : self.tokens, None] - window + 1  # [T, 1]
            seen[0, 0, : self.tokens, : len(self.keys)][self.keys < first] = NEVER
            self._within[window] = seen
        return self._within[window]

    def parts(self, most: int) -> list[tuple[slice, Places]]:
        """Up to `most` of the tokens at a time: which, and where they stand behind those before them."""
        parts = [slice(at, min(at + most, self.tokens)) for at in range(0, self.tokens, most)]
        return [(part, self._part(part)) for part in parts]

    def by_text(self, most: int) -> list[tuple[slice, Places]]:
        """The same, but each part's tokens are of one text: layers with a state take in those of one at a time."""
        parts, first = [], 0
        for text, count in self.runs:
            stop = first + count
            parts += [(slice(at, min(at + most, stop)), text) for at in range(first, stop, most)]
            first = stop
        return [(part, self._part(part, text)) for part, text in parts]

    @property
    def text(self) -> int:
        """The text of all tokens of a part that `by_text` gives."""
        return self.runs[0][0]

    @property
    def of_texts(self) -> dict[int, int]:
        """How many tokens each text has."""
        counts: dict[int, int] = {}
        for text, count in self.runs:
            counts[text] = counts.get(text, 0) + count
        return counts

    def _part(self, part: slice, text: int = 0) -> Places:
        stop, runs = self.past + part.stop, [(text, part.stop - part.start)]
        bias = self.bias[0, 0, part, :stop]
        return Places.of(self.past + part.start, self.positions[0, part], bias, self.keys[:stop], runs)

    @classmethod
    def of(
        cls, past: int, positions: npt.NDArray[np.int64], bias: Floats, keys: npt.NDArray[np.int64],
        runs: Sequence[tuple[int, int]],
    ) -> Places:  # fmt: skip
        """positions [T] and bias [T, past + T], filled up with the row that nothing looks at; keys [past + T]."""
        tokens = len(positions)
        more = max(2 - tokens, 0)
        positions = np.append(positions, np.repeat(positions[-1:], more))[None]
        bias = np.pad(np.pad(bias, ((0, 0), (0, more)), constant_values=NEVER), ((0, more), (0, 0)))
        return cls(past, tokens, positions, bias[None, None], keys, runs)

    @classmethod
    def in_line(cls, past: int, tokens: int) -> Places:
        """One token behind the other."""
        every = np.arange(past + tokens)
        bias = np.where(every <= every[past:, None], np.float32(0), NEVER)
        return cls.of(past, every[past:], bias, every, [(0, tokens)])

    @classmethod
    def in_branches(cls, past: int, branches: Branches, known: int = 0) -> Places:
        """They begin behind `past` slots of the cache, which has the first `known` of them already."""
        sees = branches.sees(past)
        positions = sees.sum(1) - 1
        keys = np.append(branches.places(past), positions)
        bias = np.where(sees[known:], np.float32(0), NEVER)
        return cls.of(past + known, positions[known:], bias, keys, branches.runs(known))


class Attention:
    """The attention of all layers, or what they have in its place, with what stands around it.

    That is norms, biases, rotary embedding.

    Args:
        context: tokens that a text may have.
    """

    def __init__(self, bundle: Bundle, weights: AttentionWeights, context: int) -> None:
        self._model, self._weights = bundle.header.model, weights
        self._rotary = Rotary(bundle, context + SPARE)
        self._gaps, self._most = 0, 0  # bytes of scores, and tokens of a pass, since free memory was given back

    def load(self, layer: int) -> None:
        """Takes in the next layer's weights. Raises DamagedRun, CardError."""
        self._weights.load(layer)

    def __call__(
        self, layer: int, x: Floats, places: Places, cache: KvCache, drafting: bool = False
    ) -> tuple[Floats, Floats]:
        """x [T, H] -> x [T, carried_width], h [T, ffn_input_width] behind a layer's attention, see Architecture.

        The tokens' keys and values, or the state, are kept.

        `drafting`: until they are forgotten again.
        """
        x = at_least_two(x)
        session, names = self._weights.opened(layer, len(x), drafting)
        binding = session.io_binding()
        binding.bind_cpu_input("x", x[None])
        self._weights.bind(layer, binding, drafting)
        self._rotary.bind(names, binding)
        bind_positions(binding, names, places.past, places.tokens, places.positions.shape[1])
        kind = self._model.kind(layer)
        adds: tuple[str, ...] = ()
        if isinstance(kind, AttentionKind):
            for name, value in (("bias", places.within(kind.window)), ("positions", places.positions)):
                if name in names:  # a layer may turn nothing
                    binding.bind_cpu_input(name, value)
            adds = () if kind.borrows else ("key", "value")
        bind_kept(binding, cache.layer(layer, places.tokens, drafting, places.text, in_place=False), "")
        for name in (*adds, "x_out", "h_out"):
            binding.bind_output(name, "cpu")
        cache.widen(layer, places.past)
        session.run_with_iobinding(binding, self._options(layer, places, session))
        *made, x, h = (v.numpy()[0] for v in binding.get_outputs())
        if adds:
            key, value = (rows[:, : places.tokens] for rows in made[-2:])  # [kv heads, T, D]
            cache.put(layer, places.past, key, value)
        return x[: places.tokens], h[: places.tokens]

    def _options(self, layer: int, places: Places, session: ort.InferenceSession) -> ort.RunOptions | None:
        """None, or what has onnxruntime give free memory back.

        That is done behind a pass over a prompt, whose memory is then lent, see StreamedFfn.enter. It is also done
        when passes may have left gaps of GAPS bytes: each has longer rows of scores than the one before, which do not
        fit where those were. Sessions that have memory of their own cannot give it back so: onnxruntime would refuse
        the pass.
        """
        self._most = max(self._most, places.tokens)
        if layer > 0 or not in_arena(session):
            return None
        self._gaps += SCORE_BYTES * self._model.heads * places.bias.size
        if self._gaps <= GAPS and (self._most <= TREE_NODES or places.tokens > TREE_NODES):
            return None
        self._gaps, self._most = 0, places.tokens
        return SHRINKING


def bind_positions(binding: Any, names: Iterable[str], past: int, tokens: int, rows: int) -> None:
    """Tells a graph, by those of these that are among the `names` of its inputs, where its rows stand.

    Attention takes `rows` rows behind `past` ones. A state takes in the first `tokens` of them.
    """
    values = {
        "last": np.array([past + rows - 1], np.int32),
        "total": np.array(past + rows, np.int32),
        "tokens": np.array([tokens], np.int64),
    }
    for name in names:
        if name in values:
            binding.bind_cpu_input(name, values[name])


def bind_kept(binding: Any, kept: PassStates, suffix: str) -> None:
    """Gives a graph what a layer keeps of the tokens before: its keys and values, or its state."""
    for name, value in kept.inputs.items():
        binding.bind_ortvalue_input(f"{name}{suffix}", value)
    for name, value in kept.outputs.items():
        binding.bind_ortvalue_output(f"{name}{suffix}", value)
    for name, count in kept.counts.items():
        binding.bind_cpu_input(f"{name}{suffix}", count)
