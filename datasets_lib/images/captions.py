"""The texts of a data set's examples: from the data or fixed, with a trigger word and in shuffled order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from datasets_lib.images.source import Source
from datasets_lib.images.transforms import draw


class Captions:
    """Captions by row. Raises ValueError for a fixed caption beside those of the data: it would have no effect."""

    def __init__(self, source: Source, args: Any) -> None:
        self.texts = source.captions
        self.fixed = args.caption
        self.trigger_word = args.trigger_word
        self.shuffle_tags = args.shuffle_tags
        self.keep_tags = args.keep_tags
        if self.texts is not None and self.fixed:
            raise ValueError(
                f"base.caption is {self.fixed!r}, the text of a data set without captions, but {source.origin} has "
                "captions; unset base.caption, put the text in front of each with base.trigger_word, or remove them"
            )

    @property
    def random(self) -> bool:
        """Whether `draw` uses its generator."""
        return self.shuffle_tags or any(isinstance(text, list) for text in self.texts or ())

    @property
    def note(self) -> str | None:
        """The line that a task which reads captions shows where there are none; None where there are."""
        if self.texts is not None:
            return None
        trigger = f", with base.trigger_word {self.trigger_word!r} in front" if self.trigger_word else ""
        return f"no captions found: every example has base.caption = {self.fixed!r}{trigger}"

    def draw(self, row: int, generator: torch.Generator | None) -> str:
        """Return one of the row's captions; without a generator the first, its tags in their order."""
        text = self.fixed if self.texts is None else choose(self.texts[row], generator)
        if self.shuffle_tags and generator is not None:
            text = shuffle(text, self.keep_tags, generator)
        return self._triggered(text)

    def all(self, rows: Sequence[int]) -> Iterator[str]:
        """Yield every caption that the rows may have, in the order of its tags."""
        for row in rows:
            texts = self.fixed if self.texts is None else self.texts[row]
            yield from map(self._triggered, [texts] if isinstance(texts, str) else texts)

    def _triggered(self, text: str) -> str:
        return ", ".join(part for part in (self.trigger_word, text) if part)


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
