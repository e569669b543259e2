"""A checkpoint's tokenizer as the benchmarks need it: text to token ids, counts, and the frame of its chat template.

It wraps `tokenizers` directly: no transformers, no torch, and counting releases the interpreter lock.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.errors import BadInput, CorruptData


class Tokenizer:
    """The tokenizer of one tokenizer.json; special tokens are added as transformers adds them to a plain text."""

    def __init__(
        self,
        tokenizer_json: bytes,
        *,
        chat_template: str | None = None,
        bos_token: str = "",
        place: str = "tokenizer.json",
    ) -> None:
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(tokenizer_json)
        except Exception as error:  # the Rust library raises bare Exception and ValueError alike
            raise CorruptData(f"{place}: not a tokenizer ({error}); fetch it again") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._chat_template = chat_template
        self._bos_token = "" if self._tokenizer.encode("").ids else bos_token
        self.place = place
        self.digest = hashlib.sha256(tokenizer_json).hexdigest()

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer of a local checkpoint, with its chat template if it has one."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise BadInput(f"{path}: no such file; give a checkpoint with a fast tokenizer")
        config_path = folder / "tokenizer_config.json"
        config: dict[str, Any] = json.loads(config_path.read_text(encoding="utf-8")) if config_path.is_file() else {}
        template_path = folder / "chat_template.jinja"
        template = template_path.read_text(encoding="utf-8") if template_path.is_file() else config.get("chat_template")
        return cls(
            path.read_bytes(),
            chat_template=template if isinstance(template, str) else None,
            bos_token=_token_text(config.get("bos_token")),
            place=str(path),
        )

    def encode(self, text: str) -> list[int]:
        """The token ids of a text."""
        return self._tokenizer.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self._tokenizer.decode(list(ids))

    def count(self, text: str) -> int:
        """How many tokens a text has, special tokens included."""
        return len(self._tokenizer.encode_batch_fast([text])[0])

    def count_each(self, texts: Sequence[str], *, special_tokens: bool = True) -> list[int]:
        """How many tokens each text has; the texts are encoded side by side on all cores."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=special_tokens)
        return [len(encoding) for encoding in encodings]

    def token_ends(self, text: str) -> NDArray[np.int64]:
        """For each token of a text (special tokens left out), the number of characters read when it ends."""
        offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return np.asarray(offsets, dtype=np.int64).reshape(-1, 2)[:, 1]

    def chat_frame(self) -> tuple[str, str]:
        """What the chat template puts before and after a user's message, with the assistant's turn opened.

        A beginning-of-text token that encoding adds anyway is left out. `BadInput` if there is no template.
        """
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if self._chat_template is None:
            raise BadInput(f"{self.place}: the checkpoint has no chat template; ask it plainly")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        message = "\x00message\x00"
        text = environment.from_string(self._chat_template).render(
            messages=[{"role": "user", "content": message}],
            add_generation_prompt=True,
            bos_token=self._bos_token,
            eos_token="",
            raise_exception=_refuse,
        )
        before, found, after = text.partition(message)
        if not found:
            raise BadInput(f"{self.place}: the chat template does not show the user's message; ask it plainly")
        return before, after


def _token_text(token: Any) -> str:
    """A special token as tokenizer_config.json writes it: a string, or a record with its content."""
    return str(token.get("content", "") if isinstance(token, dict) else token or "")


def _refuse(message: str) -> None:
    raise BadInput(f"chat template: {message}")
