"""Layers that attend to a window of a text: several texts and trees of guesses share passes all the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flashd.engine.decoding.conversation import Conversation
from flashd.engine.decoding.drafting.pace import Pace
from flashd.engine.decoding.line import Line
from flashd.engine.decoding.sampling import Sampling
from flashd.engine.forward.attention import Places
from flashd.engine.model.branches import Branches, behind
from flashd.graphs.layer_stages import NEVER
from flashd.pack.pack import pack
from tests.engine.test_decode import begun, said
from tests.engine.test_paths import opened
from tests.goldens.models import GOLDENS, TOKENS, WINDOW
from tests.reference import relative

WINDOWED = ("gemma2", "gpt-oss", pytest.param("gemma4", marks=pytest.mark.slow))
"""With a cap on scores, with sinks and experts, and with keys that other layers have."""

CONTEXT = 160


def test_a_token_sees_its_text_s_last_tokens_wherever_the_cache_keeps_them() -> None:
    # texts 0: slots 0 1 2 5 6, 1: slots 0 1 3 4; the pass: one behind each, and one behind the first of these
    branches = Branches([np.array([0, 1, 2, 5, 6]), np.array([0, 1, 3, 4])], [behind(0), behind(1), 0])
    places = Places.in_branches(7, branches)
    assert places.positions[0, :3].tolist() == [5, 4, 6]
    assert places.keys.tolist() == [0, 1, 2, 2, 3, 3, 4, 5, 4, 6]
    seen = {window: places.within(window)[0, 0, :3, :10] == 0 for window in (0, 3, 100)}
    assert [np.flatnonzero(row).tolist() for row in seen[0]] == [
        [0, 1, 2, 5, 6, 7],
        [0, 1, 3, 4, 8],
        [0, 1, 2, 5, 6, 7, 9],
    ]
    assert [np.flatnonzero(row).tolist() for row in seen[3]] == [[5, 6, 7], [3, 4, 8], [6, 7, 9]]
    assert (seen[100] == seen[0]).all() and places.within(0) is places.bias
    assert set(np.unique(places.within(3))) == {0, NEVER}
    # one line: a part of it, behind others
    (_, first), (_, second) = Places.in_line(10, 4).parts(2)
    assert [np.flatnonzero(row == 0).tolist() for row in second.within(3)[0, 0, :2, :14]] == [
        [10, 11, 12],
        [11, 12, 13],
    ]
    assert first.within(3).shape == first.bias.shape


@pytest.mark.parametrize("name", WINDOWED)
def test_texts_and_trees_share_a_pass_and_say_what_each_says_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(Pace, "goes_on", lambda self, draft, steps, nodes, ahead: steps < 3)
    pack(GOLDENS[name].write(tmp_path / "m.gguf"), tmp_path / "m.flash", "f16")
    prompts = [TOKENS[:30].tolist(), [*TOKENS[:25].tolist(), 3, 4], TOKENS[20:34].tolist()]
    assert min(map(len, prompts)) > WINDOW
    drawn = (Sampling(), Sampling(0.8, top_p=0.95, repeat_penalty=1.1, seed=5), Sampling(0.5, seed=9))
    with opened(tmp_path / "m.flash", 0.5, CONTEXT) as model:
        assert model.branches
        # a tree whose branches are longer than what lies between them in the cache
        tokens, parents = [7, 8, 9, 10, 11, 13], [behind(0), 0, 1, 0, 3, 2]
        model.forward(np.array(prompts[0]), np.array([0]))
        checked = model.forward(np.array(tokens), np.arange(6), branches=Branches([np.arange(30)], parents))
        for node, text in enumerate([[7], [7, 8], [7, 8, 9], [7, 10], [7, 10, 11], [7, 8, 9, 13]]):
            model.cache.truncate(30)
            line = model.forward(np.array(text), np.array([len(text) - 1]))[0]
            assert relative(checked[node], line) < 1e-5, node
        alone = [said(model, p, s, True, 14)[0] for p, s in zip(prompts, drawn, strict=True)]
        model.cache.truncate(0)
        talk, lines, passes = Conversation(model), list[Line](), 0
        out: list[list[int]] = [[], [], []]
        while talk.lines or not passes:
            if len(lines) < 3:
                assert talk.fits(prompts[len(lines)], 14)
                lines.append(begun(talk, prompts[len(lines)], drawn[len(lines)], 14))
            for one, token in talk.go_on():
                out[lines.index(one)].append(token)
            passes += 1
            for one in [each for each in talk.lines if each.done]:
                talk.end(one)
        assert out == alone and passes < 14 + 3
        assert lines[1].figures.reused_tokens == 25
