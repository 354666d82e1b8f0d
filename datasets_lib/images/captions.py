"""The texts of a data set's examples: from the data or fixed, with a trigger word and in shuffled order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from datasets_lib.errors import InputError
from datasets_lib.foreign import shown
from datasets_lib.images.source import Source
from datasets_lib.images.transforms import draw


class Captions:
    """Captions by row. Raises InputError for a fixed caption if the data has captions: it would have no effect."""

    def __init__(self, source: Source, args: Any) -> None:
        self.texts, self.args, self.trigger_words = source.captions, args, source.trigger_words
        self.fixed = args.caption or ""
        self.problem = self._problem(source)
        if self.texts is not None and args.caption:
            raise InputError(
                f"base.caption is {args.caption!r}, the text of a data set without captions, but {source.origin} has "
                "captions; unset base.caption, put the text in front of each with base.trigger_word, or remove them"
            )

    def _problem(self, source: Source) -> str | None:
        """Names text that looks like captions and is not read, if nobody said that there are none."""
        if self.args.caption is not None or not source.unread:
            return None
        return (
            f"no captions found in {shown(source.origin)}, but what looks like them is not read: "
            f"{', '.join(source.unread)}; captions are texts in NAME.txt or NAME.caption beside an image, or a column "
            "text, caption or prompt (another: base.caption_column) of metadata.jsonl, .csv or .parquet or of the "
            'data set; base.caption="" trains without them'
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
        return f"no captions found: every example has base.caption = {self.fixed!r}{trigger}"

    def draw(self, row: int, generator: torch.Generator | None) -> str:
        """Return one of the row's captions; without a generator the first, its tags in their order."""
        text = self.fixed if self.texts is None else choose(self.texts[row], generator)
        if self.args.shuffle_tags and generator is not None:
            text = shuffle(text, self.args.keep_tags, generator)
        return self._triggered(text, row)

    def all(self, rows: Sequence[int]) -> Iterator[str]:
        """Yield every caption that the rows may have, in the order of its tags."""
        for row in rows:
            texts = self.fixed if self.texts is None else self.texts[row]
            yield from (self._triggered(text, row) for text in ([texts] if isinstance(texts, str) else texts))

    def with_words(self, row: int) -> str | list[str]:
        """Return the captions of a row with the trigger word in front of each."""
        texts = self.fixed if self.texts is None else self.texts[row]
        return self._triggered(texts, row) if isinstance(texts, str) else [self._triggered(text, row) for text in texts]

    def _triggered(self, text: str, row: int) -> str:
        word = self.args.trigger_word if self.trigger_words is None else self.trigger_words[row]
        return ", ".join(part for part in (word, text) if part)


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
