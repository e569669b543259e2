"""The files of a checkpoint beside its weights: which of them belong to a merge, and to which of its parts."""

from __future__ import annotations

import re
from collections.abc import Collection

from workers.storage.keys import check_key

LARGEST_SIDE_FILE = 100_000_000
"""Twice the largest tokenizer. A driver holds side files in memory."""

_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt(\..*)?|gguf|ggml|h5|msgpack|onnx(_data)?|nemo|tflite|mlmodel|npz|npy|pkl|pickle"
    r"|joblib|index\.json)",
    re.IGNORECASE | re.DOTALL,
)
_MODULE = re.compile(r"[1-9]\d*_\w+/")
_RUBBISH_FOLDER = re.compile(
    r"\..*|__pycache__|checkpoint-\d+|global_step\d+|runs|receipts|logs|wandb|tensorboard|original|onnx|openvino"
    r"|coreml|gguf",
    re.IGNORECASE | re.DOTALL,
)
_RUBBISH = re.compile(
    r"\..*"  # of git, of the hub's downloads, of file managers
    r"|readme\.md|manifest\.json|mergekit_config\.ya?ml"  # a merge has its own
    r"|params\.json|adapter_.*"  # of weights in another form
    r"|trainer_state\.json|training_args\..*|(optimizer|scheduler|scaler|rng_state|zero_to_fp32|events\.out)\W?.*|latest"
    r"|(\w+_)?results\.json"
    r"|.*\.(png|jpe?g|gif|svg|webp|pdf|mp4|ipynb|log|lock|sha256|part|tmp|bak)|sha256sums|thumbs\.db|desktop\.ini",
    re.IGNORECASE | re.DOTALL,
)
_CODE = re.compile(r".*\.(py|pyx|sh|js|c|cc|cpp|h|hpp|cu|cuh|so|dll|exe)", re.IGNORECASE | re.DOTALL)
_TOKENIZER = re.compile(
    r"(.*token.*|.*vocab.*|merges\..*|.*bpe.*|spiece.*|.*sentencepiece.*|tekken\..*|.*\.(tiktoken|spm|model)"
    r"|normalizer\.json|chat_template.*|additional_chat_templates/.*)",
    re.IGNORECASE | re.DOTALL,
)


def side_files(keys: Collection[str]) -> list[str]:
    """The files among `keys` that a merge takes over, code included: all but weights, config.json and rubbish.

    Folders with weights are checkpoints of their own and stay behind, except for the numbered modules that
    modules.json of sentence-transformers lists. Rubbish is listed by name: traces of training, of git and of a hub's
    cache, the card and its pictures. `BadInput` for a name that a store does not hold.
    """
    modules = "modules.json" in keys
    weights = {key for key in keys if _WEIGHTS.fullmatch(key) and not (modules and _MODULE.match(key))}
    models = {folder for key in weights if (folder := key.rpartition("/")[0])}
    found: list[str] = []
    for key in sorted(keys):
        *folders, name = key.split("/")
        above = {"/".join(folders[: depth + 1]) for depth in range(len(folders))}
        if key in weights or key == "config.json" or above & models or _RUBBISH.fullmatch(name):
            continue
        if not any(_RUBBISH_FOLDER.fullmatch(folder) for folder in folders):
            found.append(check_key(key))
    return found


def is_code(key: str) -> bool:
    """Whether a file holds a program."""
    return _CODE.fullmatch(key) is not None


def is_of_tokenizer(key: str) -> bool:
    """Whether a side file goes with the tokenizer: vocabulary, special tokens, chat templates, code."""
    return "/" not in key.removeprefix("additional_chat_templates/") and _TOKENIZER.fullmatch(key) is not None


def has_tokenizer(keys: Collection[str]) -> bool:
    """Whether there is a tokenizer among side files; a chat template is none."""
    return any(is_of_tokenizer(key) and not is_code(key) and "chat_template" not in key for key in keys)
