"""A checkpoint's tokenizer as the benchmarks need it: text to token ids, counts, and the frame of its chat template.

It wraps `tokenizers` directly: no transformers, no torch, and counting releases the interpreter lock.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jobs.errors import BadInput, CorruptData
from jobs.foreign_json import load_json
from workers.benchmarks.texts.pieces import SHORTEST, Pieces
from workers.checkpoints.chat_templates import default_template
from workers.special_tokens import prompt_ids, tokens_in_front

if TYPE_CHECKING:
    from workers.benchmarks.texts.chat_template import Arguments, Thoughts

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class Tokenizer:
    """The tokenizer of one tokenizer.json; special tokens are those of `workers.special_tokens`.

    If it is `bare`, its texts come out of a chat template. `special_tokens` are the ones that a template may write.
    """

    def __init__(
        self,
        tokenizer_json: bytes,
        *,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        place: str = "tokenizer.json",
    ) -> None:
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(tokenizer_json)
        except Exception as error:  # the Rust library raises bare Exception and ValueError alike
            raise CorruptData(f"{place}: not a tokenizer ({error}); fetch it again") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._pieces = Pieces(self._tokenizer)
        self.chat_template = chat_template
        self.special_tokens = {"bos_token": "", "eos_token": "", **(special_tokens or {})}
        self.place = place
        self.bare = False
        probe = self._tokenizer.encode("a")
        self._front = tokens_in_front(probe.ids, probe.special_tokens_mask)
        self._adds = sum(probe.special_tokens_mask)
        self._sha256 = hashlib.sha256(tokenizer_json)

    def as_bare(self) -> Tokenizer:
        """The same tokenizer for texts out of its chat template."""
        bare = copy.copy(self)
        bare.bare, bare._front = True, []
        return bare

    @property
    def rule(self) -> str:
        """The special tokens in front of a text, where the tokenizer itself would add others; else empty."""
        return "" if len(self._front) == self._adds else f"only {self._front}"

    @property
    def digest(self) -> str:
        """That of tokenizer.json and of `rule`."""
        digest = self._sha256.copy()
        digest.update(self.rule.encode())
        return digest.hexdigest()

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer of a local checkpoint, with its chat template if it has one."""
        paths = [Path(folder) / name for name in TOKENIZER_FILES]
        return cls.from_files({path.name: path.read_bytes() for path in paths if path.is_file()}, place=str(folder))

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], *, place: str, chat_template: str | None = None) -> Tokenizer:
        """The tokenizer in those of `TOKENIZER_FILES` that there are; `chat_template` replaces its own."""
        if "tokenizer.json" not in files:
            raise BadInput(f"{place}/tokenizer.json: no such file; give a checkpoint with a fast tokenizer")
        try:
            config: Any = load_json(files.get("tokenizer_config.json", b"{}"))
            if not isinstance(config, dict):
                raise ValueError("not a JSON object")
            if chat_template is None and "chat_template.jinja" in files:
                chat_template = files["chat_template.jinja"].decode("utf-8")
        except ValueError as error:
            raise CorruptData(
                f"{place}: tokenizer_config.json or chat_template.jinja is broken ({error}); fetch them again"
            ) from error
        return cls(
            files["tokenizer.json"],
            chat_template=chat_template if chat_template is not None else default_template(config),
            special_tokens={name: _text(token) for name, token in config.items() if name.endswith("_token")},
            place=f"{place}/tokenizer.json",
        )

    @property
    def largest_id(self) -> int:
        """The largest token id there is; a model needs an embedding for it."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str) -> list[int]:
        """The token ids of a text as a prompt."""
        return prompt_ids(self._tokenizer.encode(text, add_special_tokens=False).ids, self._front, bare=self.bare)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self._tokenizer.decode(list(ids))

    def count(self, text: str) -> int:
        """How many tokens a text has, special tokens included; by its pieces, where that is as exact."""
        tokens = None if self._begins(text) else self._pieces.count(text)
        return self.count_whole(text) if tokens is None else len(self._front) + tokens

    def count_whole(self, text: str) -> int:
        """The same by one encoding of the whole."""
        if len(text) < SHORTEST:
            return len(self.encode(text))
        return self.count_each([text])[0]

    def stop_counting_pieces(self) -> None:
        """From now on every text is encoded whole."""
        self._pieces.usable = False

    def count_each(self, texts: Sequence[str], *, special_tokens: bool = True) -> list[int]:
        """How many tokens each text has; the texts are encoded side by side on all cores."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)  # without offsets
        front = len(self._front) if special_tokens else 0
        return [
            len(encoding) + (0 if self._begins(text) else front)
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def _begins(self, text: str) -> bool:
        """Whether a text begins with the special tokens that would stand in front of it."""
        front = "".join(str(self._tokenizer.id_to_token(token)) for token in self._front)
        return bool(front) and text.startswith(front)

    def token_ends(self, text: str) -> NDArray[np.int64]:
        """For each token of a text (special tokens left out), the number of characters read when it ends."""
        offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return np.asarray(offsets, dtype=np.int64).reshape(-1, 2)[:, 1]

    def chat_frame(
        self, *, system: str = "", arguments: Arguments = (), thoughts: Thoughts = "closed"
    ) -> tuple[str, str]:
        """The text that the chat template puts before and after a user's message, with the assistant's turn opened.

        It has its special tokens written out, so that the whole is a text for `as_bare`. `BadInput` if there is no
        template.
        """
        from workers.benchmarks.texts.chat_template import frame_of

        tokens = tuple(sorted(self.special_tokens.items()))
        return frame_of(self.template(), tokens, self.place, system, arguments, thoughts)

    def turns(self, *, system: str = "", arguments: Arguments = ()) -> tuple[str, str]:
        """The texts that the chat template puts around an answer of the assistant, between two messages of the user.

        `BadInput` if there is no template.
        """
        from workers.benchmarks.texts.chat_template import ChatTemplate

        with ChatTemplate(self.template(), self.special_tokens, self.place, system=system, arguments=arguments) as chat:
            return chat.turns()

    def template(self) -> str:
        """The chat template; `BadInput` if there is none."""
        if self.chat_template is None:
            raise BadInput(f"{self.place}: the checkpoint has no chat template; ask it plainly, with `chat: false`")
        return self.chat_template


def _text(token: Any) -> str:
    """A special token as tokenizer_config.json writes it: a string, or a record with its content."""
    return str(token.get("content", "") if isinstance(token, dict) else token or "")
