"""Tries a model's chat template before it is packed: what fails on the board is better known on the workstation."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

from tokenizers import Tokenizer

from flashd.pack.vocabulary import Vocabulary
from flashd.system.chat_template import chat_template, chat_values
from flashd.system.template import TemplateFails

log = logging.getLogger(__name__)

USER = {"role": "user", "content": "How far is the Moon?"}
TALKS = {
    "a user's question": [USER],
    "a system prompt and a question": [{"role": "system", "content": "You are brief."}, USER],
    "a second question": [USER, {"role": "assistant", "content": "384,400 km."}, {"role": "user", "content": "Why?"}],
}
"""What a template is asked to render."""


def try_chat_template(vocabulary: Vocabulary, path: Path) -> None:
    """Warns of each kind of talk that the model's template cannot render."""
    if vocabulary.chat_template is None:
        return
    tokenizer = Tokenizer.from_buffer(vocabulary.tokenizer_json)
    first = (vocabulary.bos, next(iter(vocabulary.eos), None))
    bos, eos = ((tokenizer.id_to_token(token) or "") if token is not None else "" for token in first)
    unk = getattr(tokenizer.model, "unk_token", None) or ""
    template = chat_template(vocabulary.chat_template)
    values = {talk: chat_values(turns, bos, eos, unk) for talk, turns in TALKS.items()}
    with suppress(TemplateFails):
        template.render_each(list(values.values()))
        return
    for talk, each in values.items():  # one of them fails
        try:
            template.render(each)
        except TemplateFails as error:
            log.warning("%s: the chat template fails for %s: %s", path, talk, error)
