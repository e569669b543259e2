"""A checkpoint's own tokenizer, from its folder alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jobs.errors import BadInput
from workers.special_tokens import prompt_ids, tokens_in_front

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a local folder; nothing is fetched and no code of the folder is run."""
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise BadInput(f"{folder}: no such folder; give one that holds the model's tokenizer")
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str, *, bare: bool) -> list[int]:
    """Token ids of `text` as a prompt, by the rule of `workers.special_tokens`."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    probe = tokenizer("a", return_special_tokens_mask=True)
    return prompt_ids(ids, tokens_in_front(probe["input_ids"], probe["special_tokens_mask"]), bare=bare)
