"""The texts of a data set's examples: from the data or fixed, with a trigger word and in shuffled order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from datasets_lib.errors import InputError
from datasets_lib.images.source import Source
from datasets_lib.images.transforms import draw


class Captions:
    """Captions by row. Raises ValueError for a fixed caption if the data has captions: it would have no effect."""

    def __init__(self, source: Source, args: Any) -> None:
        self.texts, self.args = source.captions, args
        if self.texts is not None and args.caption:
            raise InputError(
                f"base.caption is {args.caption!r}, the text of a data set without captions, but {source.origin} has "
                "captions; unset base.caption, put the text in front of each with base.trigger_word, or remove them"
            )

    @property
    def random(self) -> bool:
        """Whether `draw` uses its generator."""
        return self.args.shuffle_tags or any(isinstance(text, list) for text in self.texts or ())

    @property
    def note(self) -> str | None:
        """The line to show if there are no captions."""
        if self.texts is not None:
            return None
        word = self.args.trigger_word
        trigger = f", with base.trigger_word {word!r} in front" if word else ""
        return f"no captions found: every example has base.caption = {self.args.caption!r}{trigger}"

    def draw(self, row: int, generator: torch.Generator | None) -> str:
        """Return one of the row's captions; without a generator the first, its tags in their order."""
        text = self.args.caption if self.texts is None else choose(self.texts[row], generator)
        if self.args.shuffle_tags and generator is not None:
            text = shuffle(text, self.args.keep_tags, generator)
        return self._triggered(text)

    def all(self, rows: Sequence[int]) -> Iterator[str]:
        """Yield every caption that the rows may have, in the order of its tags."""
        for row in rows:
            texts = self.args.caption if self.texts is None else self.texts[row]
            yield from map(self._triggered, [texts] if isinstance(texts, str) else texts)

    def _triggered(self, text: str) -> str:
        return ", ".join(part for part in (self.args.trigger_word, text) if part)


def choose(caption: str | list[str], generator: torch.Generator | None) -> str:
    """Draw one of several captions, the first without a generator."""
    if isinstance(caption, str):
        return caption
    return caption[0] if generator is None else caption[draw(len(caption), generator)]


def shuffle(caption: str, keep: int, generator: torch.Generator) -> str:
    """Put the comma-separated tags after the first `keep` in a random order."""
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    order = torch.randperm(len(tags[keep:]), generator=generator).tolist()
    return ", ".join(tags[:keep] + [tags[keep + number] for number in order])
